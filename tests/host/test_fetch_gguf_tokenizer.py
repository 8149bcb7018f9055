"""Tokenizers rebuilt from GGUF metadata split, merge and decode like the originals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_gguf as tiny
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from device_runtime.tokenization.sentencepiece_bpe import SentencePieceRules, build_sentencepiece
from host_tools.fetch import fetch

MODEL = tiny.random_model("llama")
FIRST_BYTE = 3
BLANK = "\N{LOWER ONE EIGHTH BLOCK}"


def rebuilt(folder: Path, vocabulary: tiny.Vocabulary) -> Tokenizer:
    tiny.write_gguf(folder / "m.gguf", MODEL, vocabulary=vocabulary)
    return Tokenizer.from_file(
        str(fetch(str(folder / "m.gguf"), folder / "out") / "tokenizer.json")
    )


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """The pieces between which no merge can reach, as plain text."""
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    letters = dict(zip(tiny.byte_tokens(), range(256), strict=True))
    return [
        bytes(letters[letter] for letter in piece).decode()
        for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)
    ]


TEXT = "I'll don't  say 12345\n\n x=3;\tÉté 学习2024年 'S"
# Worked by hand from the regular expressions named in the module.
EXPECTED = {
    # GPT-2: a blank sticks to what follows; of two blanks the last sticks; \n\n stays one piece
    # before a blank; letters, digits and the rest apart.
    "gpt-2": [
        "I", "'ll", " don", "'t", " ", " say", " 12345", "\n\n", " x", "=", "3", ";", "\t",
        "Été", " 学习", "2024", "年", " '", "S",
    ],
    # SmolLM: every digit is cut out first, so the blank before 1 stays alone.
    "smollm": [
        "I", "'ll", " don", "'t", " ", " say", " ", "1", "2", "3", "4", "5", "\n\n", " x", "=",
        "3", ";", "\t", "Été", " 学习", "2", "0", "2", "4", "年", " '", "S",
    ],
    # Llama 3: one character that is no letter, digit or newline may lead letters; digits by three.
    "llama-bpe": [
        "I", "'ll", " don", "'t", " ", " say", " ", "123", "45", "\n\n", " x", "=", "3", ";",
        "\tÉté", " 学习", "202", "4", "年", " '", "S",
    ],
    # Qwen 2: the same with single digits.
    "qwen2": [
        "I", "'ll", " don", "'t", " ", " say", " ", "1", "2", "3", "4", "5", "\n\n", " x", "=",
        "3", ";", "\tÉté", " 学习", "2", "0", "2", "4", "年", " '", "S",
    ],
}  # fmt: skip


@pytest.mark.parametrize("pre", EXPECTED)
def test_text_is_split_as_the_name_says(tmp_path: Path, pre: str) -> None:
    assert pieces(rebuilt(tmp_path, tiny.Vocabulary(pre=pre)), TEXT) == EXPECTED[pre]


@pytest.mark.parametrize("pre", ["default", "gpt2", None])
def test_without_a_telling_name_text_is_split_like_gpt2(tmp_path: Path, pre: str | None) -> None:
    tokenizer = rebuilt(tmp_path, tiny.Vocabulary(pre=pre))
    assert pieces(tokenizer, TEXT) == EXPECTED["gpt-2"]


def test_pieces_are_merged_in_the_order_of_the_file(tmp_path: Path) -> None:
    tokenizer = rebuilt(tmp_path, tiny.Vocabulary())
    letters = {letter: FIRST_BYTE + n for n, letter in enumerate(tiny.byte_tokens())}
    # Tokens after the 256 letters: he 259, ll 260, hell 261, hello 262, " hello" 263, 12 264.
    assert tokenizer.encode("hello hello").ids == [262, 263]
    # The digits are apart before any merge, so "12" is never one token.
    assert tokenizer.encode("12").ids == [letters["1"], letters["2"]]
    assert tokenizer.encode("  hell").ids == [letters["Ġ"], letters["Ġ"], 261]
    assert tokenizer.encode("é").ids == [letters["Ã"], letters["©"]]


def test_decoding_gives_the_text_back(tmp_path: Path) -> None:
    tokenizer = rebuilt(tmp_path, tiny.Vocabulary())
    text = " hello  wörld 12\t\n学🙂\x00\x7f  "
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_marked_tokens_are_found_in_text_and_keep_their_ids(tmp_path: Path) -> None:
    vocabulary = tiny.Vocabulary(
        tokens=[*tiny.Vocabulary().tokens, "<tool>"], types=[*tiny.Vocabulary().types, 4]
    )
    tokenizer = rebuilt(tmp_path, vocabulary)
    assert tokenizer.encode("<|im_start|>hello<|im_end|><tool>").ids == [1, 262, 2, 266]
    # Special ones are left out of decoded text, the user's own are not.
    assert tokenizer.decode([1, 262, 266, 2]) == "hello<tool>"
    assert tokenizer.get_vocab_size() == 267


def test_llama3_takes_whole_words_over_merges_and_begins_with_bos(tmp_path: Path) -> None:
    # No merge leads to "hello", but ignore_merges takes it since it is a token.
    vocabulary = tiny.Vocabulary(pre="llama-bpe", merges=["h e"], flags={})
    tokenizer = rebuilt(tmp_path, vocabulary)
    assert tokenizer.encode("hello").ids == [1, 262]
    assert tokenizer.encode("hello", add_special_tokens=False).ids == [262]


def test_bos_is_added_only_when_the_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "on").mkdir()
    (tmp_path / "off").mkdir()
    on = rebuilt(tmp_path / "on", tiny.Vocabulary(flags={"add_bos_token": True}))
    off = rebuilt(tmp_path / "off", tiny.Vocabulary(flags={}))
    assert on.encode("hello").ids == [1, 262]
    assert on.encode("hello", "hello").ids == [1, 262, 1, 262]
    assert off.encode("hello").ids == [262]


def test_qwen2_text_is_composed_first(tmp_path: Path) -> None:
    tokenizer = rebuilt(tmp_path, tiny.Vocabulary(pre="qwen2"))
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


def test_transformers_loads_the_tokenizer_and_its_template(tmp_path: Path) -> None:
    rebuilt(tmp_path, tiny.Vocabulary())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>hello<|im_end|>"
    assert tokenizer(chat)["input_ids"] == [1, 262, 2]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 1)


SP_TOKENS = [
    "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
    BLANK, "h", "e", "l", "o", "w", f"{BLANK}h", "el", "lo", "llo", "ell", f"{BLANK}hello", "ello",
    BLANK * 2,
]  # fmt: skip
# Scores are minus the rank, as SentencePiece's BPE trainer writes them.
SP_SCORES = [0.0, 0.0, 0.0, *([0.0] * 256), *(-float(n) for n in range(14))]
SP_TYPES = [2, 3, 3, *([6] * 256), *([1] * 14)]


def sentencepiece(**changes: object) -> tiny.Vocabulary:
    settings: dict[str, object] = {
        "tokens": SP_TOKENS,
        "types": SP_TYPES,
        "scores": SP_SCORES,
        "merges": (),
        "model": "llama",
        "pre": None,
        "ids": {"bos": 1, "eos": 2, "unknown": 0},
        "flags": {},
    }
    return tiny.Vocabulary(**{**settings, **changes})  # type: ignore[arg-type]


def sp_ids(*tokens: str) -> list[int]:
    return [SP_TOKENS.index(token) for token in tokens]


def test_sentencepiece_merges_by_score_with_a_blank_in_front(tmp_path: Path) -> None:
    tokenizer = rebuilt(tmp_path, sentencepiece())
    # "_hello": _h (rank 6) first, then el (7), lo (8), then ello = el + lo (12), then _hello (11)
    # = _h + ello, which became possible only now.
    assert tokenizer.encode("hello", add_special_tokens=False).ids == sp_ids(f"{BLANK}hello")
    assert tokenizer.encode("hello").ids == sp_ids("<s>", f"{BLANK}hello")
    assert tokenizer.encode("  lo", add_special_tokens=False).ids == sp_ids(BLANK * 2, BLANK, "lo")
    assert tokenizer.decode(tokenizer.encode("hello lo").ids) == "hello lo"


def test_sentencepiece_spells_unknown_letters_in_bytes(tmp_path: Path) -> None:
    tokenizer = rebuilt(tmp_path, sentencepiece(flags={"add_bos_token": False}))
    # U+00E9 is C3 A9 in UTF-8.
    assert tokenizer.encode("hé").ids == sp_ids(f"{BLANK}h", "<0xC3>", "<0xA9>")
    assert tokenizer.decode(tokenizer.encode("hé🙂").ids) == "hé🙂"


def test_sentencepiece_without_a_space_prefix(tmp_path: Path) -> None:
    flags = {"add_space_prefix": False, "add_bos_token": False}
    tokenizer = rebuilt(tmp_path, sentencepiece(flags=flags))
    assert tokenizer.encode("hello").ids == sp_ids("h", "ello")
    assert tokenizer.decode(tokenizer.encode(" hello").ids) == " hello"


def test_control_pieces_are_never_the_result_of_merging() -> None:
    tokens = ["<unk>", "a", "b", "ab"]
    rules = SentencePieceRules("<unk>", has_space_prefix=False)
    free = build_sentencepiece(tokens, [0, 0, 0, 0], [False, True, True, True], rules)
    bound = build_sentencepiece(tokens, [0, 0, 0, 0], [False, True, True, False], rules)
    assert free.encode("ab").ids == [3]
    assert bound.encode("ab").ids == [1, 2]


def test_the_tokenizer_json_says_the_same_every_time(tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rebuilt(tmp_path / name, tiny.Vocabulary())
        texts.append((tmp_path / name / "out" / "tokenizer.json").read_bytes())
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["model"]["type"] == "BPE"

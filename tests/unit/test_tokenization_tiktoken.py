"""qwen.tiktoken becomes a byte-level tokenizer that merges by rank."""

import base64
import json

import pytest
import tiny_sentencepiece as tiny

from device_runtime.errors import PackageError
from device_runtime.tokenization.folder import convert_tokenizer
from device_runtime.tokenization.tiktoken_ranks import byte_letters, parse_ranks

HE, LL, LLO, HELLO, BLANK_HELLO, END = range(256, 262)


def encode(folder, text):
    return convert_tokenizer(folder).tokenizer.encode(text).ids


def test_the_lowest_rank_is_merged_first(tmp_path):
    tiny.write_ranks(tmp_path)
    # h e l l o: he, ll, then ll + o; he + llo is the whole.
    assert encode(tmp_path, "hello") == [HELLO]
    assert encode(tmp_path, "hellohe") == [HELLO, HE]
    assert encode(tmp_path, "lll") == [LL, ord("l")]


def test_a_piece_that_is_a_token_is_taken_whole(tmp_path):
    # Nothing merges to "hello" (no token in between), but it is looked up first.
    tiny.write_ranks(tmp_path, words=(b"hello",))
    assert encode(tmp_path, "hello") == [256]
    assert encode(tmp_path, "hellohello") == list(b"hellohello")


def test_blanks_digits_and_contractions_are_cut_apart(tmp_path):
    tiny.write_ranks(tmp_path, words=(b"12", b"'ll", b"  ", b"he", b" he"))
    assert encode(tmp_path, "12") == list(b"12")
    assert encode(tmp_path, "he'll") == [259, 257]
    # Of three blanks the last one goes to the word.
    assert encode(tmp_path, "   he") == [258, 260]


def test_text_is_composed_first_and_bytes_are_kept(tmp_path):
    tiny.write_ranks(tmp_path)
    tokenizer = convert_tokenizer(tmp_path).tokenizer
    assert encode(tmp_path, "e\u0301") == list("é".encode())
    text = "\0 é中🙂\n\t hello "
    assert tokenizer.decode(encode(tmp_path, text)) == text


def test_qwens_special_tokens_follow_the_ranks(tmp_path):
    tiny.write_ranks(tmp_path)
    found = convert_tokenizer(tmp_path)
    assert (found.bos_token, found.eos_token, found.adds_bos) == (None, "<|endoftext|>", False)
    assert encode(tmp_path, "<|endoftext|><|im_start|>hello<|im_end|>") == [
        END, END + 1, HELLO, END + 2,
    ]  # fmt: skip
    assert found.tokenizer.token_to_id("<|extra_204|>") == END + 207
    assert found.tokenizer.get_vocab_size() == END + 208
    assert found.tokenizer.decode([END + 1, HELLO]) == "hello"


def test_an_added_token_inside_the_ranks_is_refused(tmp_path):
    tiny.write_ranks(tmp_path)
    listed = {"5": {"content": "<x>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    with pytest.raises(PackageError, match=r"'<x>' has the id 5, the ranks of .* end at 260"):
        convert_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has tokens for 0 bytes, expected all 256"),
        (b"IQ== 0\n", "has tokens for 1 bytes, expected all 256"),
        (b"IQ== 1\n", "line 1 of m has the rank 1 for 1 bytes, expected 0 for at least 1"),
        (b" 0\n", "line 1 of m has the rank 0 for 0 bytes"),
        (b"IQ==\n", "line 1 of m is not a token in base64 and its rank"),
        (b"IQ= 0\n", "line 1 of m is not a token in base64 and its rank"),
        (b"\xff\xff 0\n", "line 1 of m is not a token in base64"),
        (b"\n" * ((1 << 20) + 1), "m has 1048577 lines, expected at most 1048576"),
    ],
)
def test_damaged_ranks_are_refused(content, message):
    with pytest.raises(PackageError, match=message):
        parse_ranks(content, "m")


def test_a_token_with_two_ranks_is_refused(tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes(tiny.ranks() + base64.b64encode(b"he") + b" 261\n")
    with pytest.raises(PackageError, match="has 262 tokens, but 261 different ones"):
        convert_tokenizer(tmp_path)


def test_every_byte_has_its_own_letter():
    letters = byte_letters()
    # GPT-2's table: printable ones stand for themselves, a blank is Ġ and a newline Ċ.
    assert (letters[ord("a")], letters[32], letters[10], letters[0xE9]) == ("a", "Ġ", "Ċ", "é")
    assert len(set(letters)) == 256

"""tokenizer.model becomes a tokenizer that merges, falls back and decodes as SentencePiece does."""

import json
import random

import pytest
import tiny_sentencepiece as tiny
from tiny_sentencepiece import BLANK

from device_runtime.errors import PackageError
from device_runtime.tokenization.folder import convert_tokenizer, tokenizer_definition
from device_runtime.tokenization.sentencepiece_bpe import check_vocabulary
from device_runtime.tokenization.sentencepiece_model import parse_sentencepiece

IDS = {spelling: index for index, (spelling, _, _) in enumerate([*tiny.PIECES, *tiny.MARKERS])}


def encode(folder, text):
    return convert_tokenizer(folder).tokenizer.encode(text, add_special_tokens=False).ids


def test_the_best_piece_is_merged_first(tmp_path):
    tiny.write_model(tmp_path)
    # " hello": the best neighbours are "▁h" (-9), then "el" (-10), "lo" (-11). Left are ▁h, el, lo:
    # "llo", "hel" and "hello" would need parts that are gone.
    ids = [IDS[f"{BLANK}h"], IDS["el"], IDS["lo"]]
    assert encode(tmp_path, " hello") == ids
    # Without a blank "el" and "lo" go first, "h" + "el" is "hel", "hel" + "lo" is "hello".
    assert encode(tmp_path, "hello") == [IDS["hello"]]


def test_what_no_piece_spells_becomes_bytes(tmp_path):
    tiny.write_model(tmp_path)
    # é is C3 A9 in UTF-8, and byte b is piece 3 + b.
    assert encode(tmp_path, "é\0") == [3 + 0xC3, 3 + 0xA9, 3]
    assert encode(tmp_path, "中") == [IDS["中"]]


def test_the_blank_in_front_is_added_and_taken_off(tmp_path):
    tiny.write_model(tmp_path, None, tiny.trainer(), tiny.normalizer(has_prefix=True))
    tokenizer = convert_tokenizer(tmp_path).tokenizer
    assert encode(tmp_path, "h") == [IDS[f"{BLANK}h"]]
    assert encode(tmp_path, " h") == [IDS[BLANK], IDS[f"{BLANK}h"]]
    assert encode(tmp_path, "") == []
    for text in ("h", " h", "  hello\n é ", "\0"):
        assert tokenizer.decode(encode(tmp_path, text)) == text


def test_without_bytes_the_unknown_piece_stands_for_a_run_of_characters(tmp_path):
    pieces = [row for row in tiny.PIECES if row[2] != tiny.BYTE]
    tiny.write_model(tmp_path, pieces, tiny.trainer(has_byte_fallback=False), tiny.normalizer())
    tokenizer = convert_tokenizer(tmp_path).tokenizer
    ids = tokenizer.encode("héàh", add_special_tokens=False).ids
    assert [pieces[index][0] for index in ids] == ["h", "<unk>", "h"]
    # How SentencePiece prints it, blanks included.
    assert tokenizer.decode(ids) == "h \u2047 h"


def test_a_piece_for_nul_is_never_reached_where_there_are_bytes(tmp_path):
    tiny.write_model(tmp_path, [*tiny.PIECES, ("\0", -50.0, tiny.NORMAL)])
    assert encode(tmp_path, "h\0") == [IDS["h"], 3]
    assert convert_tokenizer(tmp_path).tokenizer.decode([len(tiny.PIECES)]) == "\0"


def test_a_user_defined_character_merges_with_nothing(tmp_path):
    pieces = [(s, x, tiny.USER_DEFINED if s == "l" else kind) for s, x, kind in tiny.PIECES]
    tiny.write_model(tmp_path, pieces)
    assert encode(tmp_path, "hello") == [IDS[letter] for letter in "hello"]


def test_texts_start_with_bos_unless_the_config_says_no(tmp_path):
    tiny.write_model(tmp_path)
    found = convert_tokenizer(tmp_path)
    assert (found.bos_token, found.eos_token, found.adds_bos) == ("<s>", "</s>", True)
    assert found.tokenizer.encode("h").ids == [1, IDS["h"]]
    assert found.tokenizer.encode("h", "h").ids == [1, IDS["h"], 1, IDS["h"]]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert convert_tokenizer(tmp_path).tokenizer.encode("h").ids == [IDS["h"]]


def test_a_bos_token_that_the_vocabulary_lacks_is_none(tmp_path):
    tiny.write_model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<start>"}')
    found = convert_tokenizer(tmp_path)
    assert (found.bos_token, found.adds_bos) == (None, False)


def test_an_added_token_without_a_row_in_the_embedding_is_left_out(tmp_path):
    tiny.write_model(tmp_path)
    last = len(IDS) - 1
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": last + 1}))
    assert convert_tokenizer(tmp_path).tokenizer.token_to_id("<pad>") == last + 1
    tokenizer = convert_tokenizer(tmp_path, last + 1).tokenizer
    assert tokenizer.token_to_id("<pad>") is None
    assert max(tokenizer.encode("<pad>").ids) <= last
    assert "<pad>" not in tokenizer_definition(tmp_path, last + 1)


def test_a_bos_token_that_no_template_can_name_is_refused(tmp_path):
    tiny.write_model(tmp_path, [*tiny.PIECES, ("a:b", 0.0, tiny.CONTROL)])
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "a:b"}')
    with pytest.raises(PackageError, match=r"the bos token 'a:b' of .* cannot start a text"):
        convert_tokenizer(tmp_path)


def test_internlm2_pieces_get_the_names_its_templates_use(tmp_path):
    tiny.write_model(tmp_path)
    tokenizer = convert_tokenizer(tmp_path).tokenizer
    assert tokenizer.token_to_id("<|im_end|>") == IDS["[UNUSED_TOKEN_145]"]
    assert tokenizer.token_to_id("<|im_start|>") == IDS["[UNUSED_TOKEN_146]"]
    assert encode(tmp_path, "<|im_start|>h") == [IDS["[UNUSED_TOKEN_146]"], IDS["h"]]
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    assert special == {"<s>", "</s>", "<eoa>", "<|im_end|>", "<|im_start|>"}


def test_markers_are_letters_where_special_tokens_are_switched_off(tmp_path):
    tiny.write_model(tmp_path)
    tokenizer = convert_tokenizer(tmp_path).tokenizer
    tokenizer.encode_special_tokens = True
    # "<", "e", "o", "a", ">": two of them are pieces.
    letters = [3 + ord("<"), IDS["e"], IDS["o"], 3 + ord("a"), 3 + ord(">")]
    assert tokenizer.encode("<eoa>", add_special_tokens=False).ids == letters


def test_added_tokens_rename_pieces_and_follow_the_vocabulary(tmp_path):
    tiny.write_model(tmp_path)
    config = {
        "added_tokens_decoder": {
            str(IDS["[UNUSED_TOKEN_145]"]): {"content": "<|end|>", "special": True},
            str(len(IDS) + 1): {"content": "tool", "special": False, "lstrip": True},
        },
        "additional_special_tokens": ["<pad>", {"content": "<|end|>"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": len(IDS)}))
    tokenizer = convert_tokenizer(tmp_path).tokenizer
    assert encode(tmp_path, "h<|end|><pad>h tool") == [
        IDS["h"], IDS["[UNUSED_TOKEN_145]"], len(IDS), IDS["h"], len(IDS) + 1,
    ]  # fmt: skip
    assert tokenizer.decode([IDS["h"], len(IDS), len(IDS) + 1]) == "htool"


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder in .* is no"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "whose id is not 0 to 1048"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"9": {}}},
            "added token 9 in .* has no",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"9": {"content": ""}}},
            "added token 9 in .* is empty",
        ),
        ("added_tokens.json", {"a": "b"}, "whose id is not 0 to 1048575"),
        ("added_tokens.json", {"a": 999}, "'a' has the id 999, the vocabulary of .* end at 277"),
        ("added_tokens.json", {"hello": 4}, "has 'hello' at 273, an added token has it at 4"),
        ("special_tokens_map.json", [], "special_tokens_map.json is not a JSON object"),
        (
            "added_tokens.json",
            {"\ud83d": 277},
            r"added_tokens.json has the token '\\ud83d', which holds half a character",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"277": {"content": "a\udc00"}}},
            r"tokenizer_config.json has the token 'a\\udc00', which holds half a character",
        ),
        (
            "tokenizer_config.json",
            {"bos_token": "\ud83d"},
            r"tokenizer_config.json has the token '\\ud83d', which holds half a character",
        ),
        (
            "special_tokens_map.json",
            {"additional_special_tokens": [{"content": "\ud83d"}]},
            r"special_tokens_map.json has the token '\\ud83d', which holds half a character",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, file, value, message):
    tiny.write_model(tmp_path)
    (tmp_path / file).write_text(json.dumps(value))
    with pytest.raises(PackageError, match=message):
        convert_tokenizer(tmp_path)


def test_one_spelling_for_two_added_tokens_is_refused(tmp_path):
    tiny.write_model(tmp_path)
    listed = {str(i): {"content": "x"} for i in (300, 301)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    with pytest.raises(PackageError, match="adds 2 tokens, but 1 different ones"):
        convert_tokenizer(tmp_path)


def test_a_setting_that_is_no_json_is_refused(tmp_path):
    tiny.write_model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(PackageError, match=r"tokenizer_config.json is not JSON: Expecting"):
        convert_tokenizer(tmp_path)


USUAL = (tiny.trainer(), tiny.normalizer())
DAMAGED = {
    "kind unigram, expected BPE": tiny.model(None, tiny.trainer(algorithm=1), USUAL[1]),
    "kind 9, expected BPE": tiny.model(None, tiny.trainer(algorithm=9), USUAL[1]),
    "the text normalisation 'identity'": tiny.model(
        None, USUAL[0], tiny.normalizer(more=tiny.content(2, b"map"))
    ),
    "a denormalisation": tiny.model(
        None, *USUAL, tiny.normalizer(more=tiny.content(2, b"map"), number=5)
    ),
    "the removal of extra blanks": tiny.model(None, USUAL[0], tiny.normalizer(removes=True)),
    "blanks that are not escaped": tiny.model(
        None, USUAL[0], tiny.normalizer(more=tiny.integer(5, 0))
    ),
    "blanks at the end of words": tiny.model(
        None, tiny.trainer(more=tiny.integer(24, 1)), USUAL[1]
    ),
    "has 2 unknown pieces, expected 1": tiny.model([*tiny.PIECES, ("<u>", 0.0, tiny.UNKNOWN)]),
    "piece 275 of m is marked unused": tiny.model([*tiny.PIECES, ("u", 0.0, tiny.UNUSED)]),
    "has 256 pieces for bytes, expected 0": tiny.model(
        None, tiny.trainer(has_byte_fallback=False), USUAL[1]
    ),
    "has 0 pieces for bytes, expected 256": tiny.model(tiny.START),
    "piece 0 of m is empty": tiny.model([("", 0.0, tiny.NORMAL)]),
    "piece 0 of m has the score nan": tiny.model([("a", float("nan"), tiny.NORMAL)]),
    "piece 0 of m is of the unknown kind 7": tiny.model([("a", 0.0, 7)]),
    "m has 2 tokens, but 1 different ones": tiny.model([tiny.START[0]] * 2),
    "m has 0 tokens, expected 1 to 1048576": b"",
    "field 1 of piece 0 of m is not UTF-8": tiny.content(1, tiny.content(1, b"\xff")),
    "field 1 of piece 0 of m is not bytes": tiny.content(1, tiny.integer(1, 1)),
    "field 2 of piece 0 of m is not four bytes": tiny.content(1, tiny.content(2, b"123")),
    "field 3 of piece 0 of m is not an integer": tiny.content(1, tiny.content(3, b"1")),
    "ends inside field 1: 200 bytes are announced at byte 0, 1 follow": b"\x0a\xc8\x01a",
    "ends inside a number at byte 1": b"\x80",
    "a number of more than 10 bytes at byte 0": b"\xff" * 11,
    "unknown field kind 3 at byte 0": b"\x0b",
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_model_that_cannot_be_converted_exactly_is_refused(message):
    with pytest.raises(PackageError, match=message):
        parse_sentencepiece(DAMAGED[message], "m")


def test_damage_anywhere_is_a_package_error_or_another_model():
    whole = tiny.model()
    chance = random.Random(1)
    refused = 0
    for _ in range(400):
        position = chance.randrange(len(whole))
        damaged = bytearray(whole[: position if chance.random() < 0.3 else None])
        if position < len(damaged):
            damaged[position] ^= 1 << chance.randrange(8)
        try:
            parse_sentencepiece(bytes(damaged), "m")
        except PackageError:
            refused += 1
    assert refused > 100


def test_vocabularies_that_would_take_minutes_are_refused():
    with pytest.raises(PackageError, match="a token of 5000 characters, expected at most 4096"):
        check_vocabulary(["a" * 5000], "m")
    # 17 tokens of 4096 characters would need 17 * 4096^2 = 285212672 steps.
    tokens = [chr(97 + index) * 4096 for index in range(17)]
    with pytest.raises(PackageError, match="add up to 285212672, expected at most 268435456"):
        check_vocabulary(tokens, "m")
    with pytest.raises(PackageError, match="has 3 tokens, expected 1 to 2"):
        check_vocabulary(["a", "b", "c"], "m", max_tokens=2)


def test_a_folder_without_any_tokenizer_is_refused(tmp_path):
    with pytest.raises(PackageError, match=r"has no tokenizer, expected tokenizer.model or qwen"):
        convert_tokenizer(tmp_path)
    with pytest.raises(PackageError, match=r"tokenizer.json is missing, and so are tokenizer.mod"):
        tokenizer_definition(tmp_path)


def test_a_huge_model_is_not_read(tmp_path):
    with open(tmp_path / "tokenizer.model", "wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(PackageError, match="has 67108865 bytes, expected at most 67108864"):
        convert_tokenizer(tmp_path)


def test_a_tokenizer_json_goes_before_a_model(tmp_path):
    tiny.write_model(tmp_path)
    assert json.loads(tokenizer_definition(tmp_path))["model"]["type"] == "BPE"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_definition(tmp_path) == "{}"

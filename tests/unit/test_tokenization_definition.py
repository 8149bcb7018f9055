"""A tokenizer.json that would hang, panic or end the process is refused before it is built."""

import json

import pytest

from device_runtime.errors import PackageError
from device_runtime.tokenization import definition
from device_runtime.tokenization.definition import build_tokenizer, check_definition

VOCAB = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}
MERGES = [["a", "b"], ["ab", "c"]]


def text_of(model=None, **changes) -> str:
    model = {"type": "BPE", "vocab": VOCAB, "merges": MERGES, **changes} if model is None else model
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model})


@pytest.mark.parametrize("is_thorough", [True, False])
@pytest.mark.parametrize("merges", [MERGES, ["a b", "ab c"]], ids=["pairs", "texts"])
def test_a_sound_one_is_built(merges, is_thorough):
    tokenizer = build_tokenizer(text_of(merges=merges), "x", is_thorough=is_thorough)
    assert tokenizer.encode("abcab").ids == [4, 3]


def test_truncation_and_padding_are_taken_off():
    loaded = json.loads(text_of())
    loaded["truncation"] = {
        "direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    tokenizer = build_tokenizer(json.dumps(loaded), "x", is_thorough=True)
    assert tokenizer.encode("abcab").ids == [4, 3]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"merges": [["", "a"], ["a", ""]], "vocab": {"": 0, "a": 1}}, "merge 0 of x makes 'a' of"),
        ({"merges": [*MERGES, ["abc", ""]]}, "merge 2 of x makes 'abc' of itself, merges must not"),
        ({"merges": [["a", "d"]]}, "merge 0 of x joins 'a' and 'd', of which one or the whole"),
        ({"merges": [["b", "a"]]}, "merge 0 of x joins 'b' and 'a', of which one or the whole"),
        ({"merges": ["a b c"]}, "merge 0 of x is no pair of tokens"),
        ({"merges": [["a", 3]]}, "merge 0 of x is no pair of tokens"),
        ({"merges": [None]}, "merge 0 of x is no pair of tokens"),
        ({"merges": {}}, "its merges or its vocabulary are none"),
        ({"vocab": ["a"]}, "its merges or its vocabulary are none"),
        ({"continuing_subword_prefix": "##"}, "continuing_subword_prefix '##', which is not"),
    ],
)
def test_merges_that_make_no_sense_are_refused(changes, complaint):
    with pytest.raises(PackageError, match=complaint):
        build_tokenizer(text_of(**changes), "x", is_thorough=True)


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "\\u0063ontinuing_subword_prefix"])
def test_what_would_end_the_process_is_always_looked_for(key):
    # The library cuts the second token in the middle of a character and aborts.
    text = text_of(vocab={"a": 0, "é": 1}, merges=[["a", "é"]], other="x")
    text = text.replace('"other"', f'"{key}"')
    with pytest.raises(PackageError, match="continuing_subword_prefix 'x', which is not supported"):
        build_tokenizer(text, "x", is_thorough=False)


def test_what_the_library_finds_itself_is_one_sentence():
    for changes, complaint in (
        ({"merges": [["a", "d"]]}, "x is not a tokenizer: Token `d` out of vocabulary"),
        ({"merges": [["b", "a"]]}, "x is not a tokenizer: .*"),
        ({"type": "Magic"}, "x is not a tokenizer: .*"),
    ):
        with pytest.raises(PackageError, match=complaint):
            build_tokenizer(text_of(**changes), "x", is_thorough=False)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "x is not a tokenizer: it is no JSON"),
        ("[" * 100_000, "x is not a tokenizer: it is no JSON"),
        ("[]", "x is not a tokenizer: it has no model"),
        ('{"model": 3}', "x is not a tokenizer: it has no model"),
    ],
)
def test_what_is_no_definition_is_refused(text, complaint):
    with pytest.raises(PackageError, match=complaint):
        check_definition(text, "x")


def test_absurd_numbers_are_refused(monkeypatch):
    monkeypatch.setattr(definition, "MAX_TOKENS", 4)
    with pytest.raises(PackageError, match="x has 5 tokens, expected at most 4"):
        check_definition(text_of(), "x")
    monkeypatch.setattr(definition, "MAX_TOKENS", 5)
    monkeypatch.setattr(definition, "MAX_MERGES", 1)
    with pytest.raises(PackageError, match="x has 2 merges, expected at most 1"):
        check_definition(text_of(), "x")

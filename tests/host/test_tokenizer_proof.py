"""A converted tokenizer is compared with the library it was made for, and any difference counts."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import sentencepiece
import tiny_sentencepiece as tiny
from tokenizers import decoders

from device_runtime.errors import PackageError, UsageError
from device_runtime.tokenization.folder import convert_tokenizer
from host_tools.datasets import builtin_text
from host_tools.progress import Progress
from host_tools.proof_strings import NUM_STRINGS, first_strings
from host_tools.tokenizer_proof import Comparison, prove_tokenizer

REAL = os.environ.get("TURBOJET_TOKENIZERS", "")
CORPORA = os.environ.get("TURBOJET_CORPORA", "")

# The options that Baichuan2's paper names (arXiv 2309.10305, section 2.2): no normalisation, no
# dummy prefix, single digits, pieces of blanks alone, bytes for rare characters, 32 characters.
BAICHUAN2 = {
    "add_dummy_prefix": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.9999,
    "max_sentencepiece_length": 32,
    "vocab_size": 1200,
    "user_defined_symbols": [f"<reserved_{index}>" for index in range(108)],
}


def differences(folder, count=4000):
    comparison = Comparison(convert_tokenizer(folder))
    return list(comparison.differences(comparison.strings[:count]))


def train(folder, **options):
    """Train a real SentencePiece model on the first lines of the shipped text."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 900,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "character_coverage": 0.99,
        "num_threads": 1,
        "minloglevel": 2,
        **options,
    }
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(builtin_text().splitlines()[:400]),
        model_prefix=str(folder / "tokenizer"),
        **settings,
    )
    return folder


@pytest.mark.parametrize("write", [tiny.write_model, tiny.write_ranks])
def test_a_conversion_is_proved_on_more_than_twenty_thousand_strings(tmp_path, write):
    write(tmp_path)
    assert prove_tokenizer(convert_tokenizer(tmp_path), Progress()) == NUM_STRINGS > 20_000


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<eoa>", "Ｅ", "<|im_end|>"]},
        {"byte_fallback": False, "allow_whitespace_only_pieces": True},
        {"split_digits": True, "max_sentencepiece_length": 32, "split_by_whitespace": False},
        BAICHUAN2,
    ],
    ids=["as Llama", "as InternLM2", "without bytes", "pieces over blanks", "as Baichuan2"],
)
def test_a_trained_model_is_converted_exactly(tmp_path, options):
    assert differences(train(tmp_path, **options), NUM_STRINGS) == []


def test_baichuan2s_markers_are_special_and_texts_start_without_bos(tmp_path):
    train(tmp_path, **BAICHUAN2)
    config = {"add_bos_token": False, "bos_token": {"content": "<s>"}, "sp_model_kwargs": {}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    converted = convert_tokenizer(tmp_path)
    assert (converted.bos_token, converted.adds_bos, converted.eos_token) == ("<s>", False, "</s>")
    tokenizer = converted.tokenizer
    marker = tokenizer.token_to_id("<reserved_106>")
    assert tokenizer.encode("<reserved_106>").ids == [marker]
    tokenizer.encode_special_tokens = True
    assert marker not in tokenizer.encode("a<reserved_106> b").ids


def test_added_tokens_are_compared_too(tmp_path):
    tiny.write_model(tmp_path)
    config = (
        '{"added_tokens_decoder": {"278": {"content": "<tool>", "special": false, "rstrip": true},'
        '"279": {"content": "<s2>", "special": true, "lstrip": true}}}'
    )
    (tmp_path / "tokenizer_config.json").write_text(config)
    comparison = Comparison(convert_tokenizer(tmp_path))
    strings = ["a <tool>  b", "a  <s2> b", "<s2><tool>", "<tool> <s2>x<eoa>", "<tool>\n<|im_end|>"]
    assert list(comparison.differences(strings)) == []
    assert any("<s2>" in text for text in comparison.strings)


def test_other_merges_stop_the_build_with_the_string(tmp_path):
    tiny.write_model(tmp_path / "one")
    # "el" last instead of before "lo" and "hel": "hello" falls apart elsewhere.
    other = [(s, -99.0 if s == "el" else x, kind) for s, x, kind in tiny.PIECES]
    tiny.write_model(tmp_path / "two", [*other, *tiny.MARKERS])
    mixed = dataclasses.replace(
        convert_tokenizer(tmp_path / "one"),
        tokenizer=convert_tokenizer(tmp_path / "two").tokenizer,
    )
    with pytest.raises(PackageError, match=r"not converted exactly: '.*' encodes to \[.*, with se"):
        prove_tokenizer(mixed, Progress())


def test_another_text_stops_the_build_with_the_string(tmp_path):
    tiny.write_model(tmp_path)
    converted = convert_tokenizer(tmp_path)
    converted.tokenizer.decoder = decoders.Fuse()
    with pytest.raises(PackageError, match=r"not converted exactly: '.*' decodes to '.*, with se"):
        prove_tokenizer(converted, Progress())


def test_special_tokens_found_elsewhere_are_a_difference(tmp_path):
    tiny.write_ranks(tmp_path)
    converted = convert_tokenizer(tmp_path)
    comparison = Comparison(converted)
    comparison._added.pop(257 + 5)  # as if <|im_start|> were no token
    found = list(comparison.differences(["he<|im_start|><|im_end|>"]))
    assert [difference.what for difference in found] == ["encodes to"]


def test_the_strings_are_the_same_every_time_and_of_every_kind():
    strings = first_strings(["ab", "cd"], ["<x>"], 12_000)
    assert strings == first_strings(["ab", "cd"], ["<x>"], 12_000)
    text = "".join(strings)
    for sample in ("\0", "\u2581", "天气", "\u3000" * 3, " " * 17, "<x>", "def f(", "\x9f"):
        assert sample in text
    assert any(ord(character) > 0x20000 for character in text)
    assert any(0x1F300 <= ord(character) < 0x1FB00 for character in text)


@pytest.mark.parametrize(
    ("library", "write"), [("sentencepiece", tiny.write_model), ("tiktoken", tiny.write_ranks)]
)
def test_a_missing_library_says_what_to_install(tmp_path, monkeypatch, library, write):
    write(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=f"needs {library} to compare with, install it with"):
        prove_tokenizer(convert_tokenizer(tmp_path), Progress())


def test_a_model_that_only_we_can_read_is_refused(tmp_path):
    # Field number 0 is not allowed, and sentencepiece's own reader says so.
    tiny.write_model(tmp_path, None, tiny.trainer(), tiny.normalizer(), b"\0\0")
    with pytest.raises(PackageError, match=r"sentencepiece does not load .*tokenizer"):
        prove_tokenizer(convert_tokenizer(tmp_path), Progress())


@pytest.mark.skipif(
    not REAL, reason="TURBOJET_TOKENIZERS names no folder with the models' own tokenizers"
)
@pytest.mark.parametrize("name", ["internlm", "internlm2", "llama2", "mistral_v1", "qwen1"])
def test_the_tokenizers_of_real_models_are_converted_exactly(name):
    comparison = Comparison(convert_tokenizer(Path(REAL) / name))
    strings = list(comparison.strings)
    for path in sorted(Path(CORPORA).iterdir()) if CORPORA else ():
        # Lines as they are, blanks and line ends too; long ones are what a corpus has and we not.
        lines = path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True)
        strings += lines[: 4 * NUM_STRINGS]
    print(f"{name}: {len(strings)} strings")
    assert list(comparison.differences(strings)) == []

"""Flags before environment before package before defaults; nothing wrong is ignored."""

from __future__ import annotations

import argparse

import pytest

from device_runtime.apps.chat_settings import (
    ChatSettings,
    add_chat_arguments,
    changed,
    chat_settings,
)
from device_runtime.apps.engine_flags import add_engine_arguments, byte_size, engine_options
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.options import EngineOptions
from device_runtime.errors import RequestError, UsageError

OURS = SamplingParams()
PACKAGE = SamplingParams(temperature=0.5, top_k=7, top_p=0.6, min_p=0.1, repetition_penalty=1.1)


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_chat_arguments(parser)
    add_engine_arguments(parser)
    return parser.parse_args(arguments)


def settings(
    *arguments: str,
    environ: dict[str, str] | None = None,
    package: SamplingParams = OURS,
) -> ChatSettings:
    return chat_settings(parsed(*arguments), environ or {}, package)


def test_without_anything_the_defaults_are_those_of_the_dataclasses() -> None:
    assert settings() == ChatSettings()
    assert engine_options(parsed(), {}) == EngineOptions()


def test_the_package_comes_before_our_defaults() -> None:
    found = settings(package=PACKAGE)
    assert (found.temperature, found.top_k, found.top_p) == (0.5, 7, 0.6)
    assert (found.min_p, found.repetition_penalty) == (0.1, 1.1)
    assert found.max_tokens == ChatSettings().max_tokens


def test_the_environment_comes_before_the_package_and_flags_before_both() -> None:
    environ = {"TURBOJET_TOP_K": "3", "TURBOJET_TEMPERATURE": "0.25"}
    found = settings("--top-k", "2", environ=environ, package=PACKAGE)
    assert (found.top_k, found.temperature, found.top_p) == (2, 0.25, 0.6)


def test_an_empty_variable_counts_as_not_set() -> None:
    assert settings(environ={"TURBOJET_TOP_K": ""}) == ChatSettings()


def test_every_flag_reaches_the_engine() -> None:
    found = settings(
        "--max-tokens=9",
        "--temperature=0.1",
        "--top-k=2",
        "--top-p=0.3",
        "--min-p=0.04",
        "--repetition-penalty=1.5",
        "--seed=6",
        "--stop=END",
        "--stop=\\n\\n",
    )
    params = found.generation_params(found.next_seed())
    assert params.sampling == SamplingParams(0.1, 2, 0.3, 0.04, 1.5, 6)
    assert (params.max_tokens, params.stop) == (9, ("END", "\n\n"))
    options = engine_options(
        parsed(
            "--backend=reference",
            "--quant-policy=8",
            "--cache-max-entry-count=0.5",
            "--session-len=128",
            "--max-batch-size=2",
            "--memory-limit=2G",
        ),
        {},
    )
    assert options == EngineOptions("reference", 0.5, 8, 128, 2, None, 2 << 30)


def test_stop_texts_may_come_from_the_environment() -> None:
    assert settings(environ={"TURBOJET_STOP": "END"}).stop == ("END",)
    assert settings("--stop", "a", environ={"TURBOJET_STOP": "END"}).stop == ("a",)


def test_a_seed_is_drawn_anew_unless_it_is_set() -> None:
    assert settings().next_seed() != settings().next_seed()
    assert settings("--seed", "5").next_seed() == 5
    assert settings("--seed", "random").seed is None


def test_max_tokens_may_be_none() -> None:
    assert settings("--max-tokens", "none").generation_params(0).max_tokens is None


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["--top-k", "x"], {}, "--top-k is 'x', expected a whole number of 0 or more"),
        (["--top-k", "-1"], {}, "--top-k is '-1', expected a whole number of 0 or more"),
        ([], {"TURBOJET_TOP_K": "1.5"}, "TURBOJET_TOP_K is '1.5', expected a whole number"),
        ([], {"TURBOJET_TOP_P": "much"}, "TURBOJET_TOP_P is 'much', expected a number"),
        (["--max-tokens", "0"], {}, "--max-tokens is '0', expected a whole number of 1 or more"),
        (["--seed", "-3"], {}, "--seed is '-3', expected a whole number, or random"),
        (["--stop", ""], {}, "--stop is '', expected at least one character"),
        (["--temperature", "200"], {}, "temperature is 200.0, expected 0 to 100"),
        ([], {"TURBOJET_TEMPERATURE": "nan"}, "temperature is nan, expected 0 to 100"),
    ],
)
def test_wrong_answer_options_are_refused(
    arguments: list[str], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        settings(*arguments, environ=environ)


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["--backend", "gpu"], {}, "--backend is 'gpu', expected one of auto, reference, cuda"),
        ([], {"TURBOJET_QUANT_POLICY": "3"}, "TURBOJET_QUANT_POLICY is '3', expected one of 0, 4"),
        (["--cache-max-entry-count", "0"], {}, "expected a number above 0"),
        (["--cache-max-entry-count", "nan"], {}, "expected a number above 0"),
        (["--session-len", "0"], {}, "--session-len is '0', expected a whole number of 1 or more"),
        ([], {"TURBOJET_MEMORY_LIMIT": "4X"}, "TURBOJET_MEMORY_LIMIT is '4X', expected a size"),
    ],
)
def test_wrong_engine_options_are_refused(
    arguments: list[str], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        engine_options(parsed(*arguments), environ)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1024", 1024),
        ("2k", 2048),
        ("3500M", 3500 << 20),
        ("3.5G", 7 << 29),
        ("4GB", 4 << 30),
        ("4 GiB", 4 << 30),
    ],
)
def test_sizes_take_units_of_1024(text: str, expected: int) -> None:
    assert byte_size(text) == expected


@pytest.mark.parametrize("text", ["", "G", "-1G", "nan", "inf", "1T", "0", "1GG", "1e400"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a size such as"):
        byte_size(text)


def test_a_setting_can_be_changed_by_name() -> None:
    start = ChatSettings()
    assert changed(start, "top_k", "3").top_k == 3
    assert changed(start, "stop", "END").stop == ("END",)
    assert changed(changed(start, "stop", "END"), "stop", "none").stop == ()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("top_q", "1", "there is no setting 'top_q'; there are max_tokens, temperature"),
        ("top_k", "", "top_k is '', expected a whole number"),
        ("top_p", "2", "top_p is 2.0, expected above 0, at most 1"),
    ],
)
def test_a_change_that_means_nothing_is_refused(name: str, value: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        changed(ChatSettings(), name, value)

"""What a person may set about answers: flags, then environment, package and defaults."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

from device_runtime.apps.engine_flags import (
    Option,
    add_options,
    given_values,
    number,
    whole_number,
)
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.generation import GenerationParams
from device_runtime.errors import RequestError, UsageError

DEFAULT_MAX_TOKENS = 1024
"""What LMDeploy's chat asks for (spec section 7.5)."""


@dataclass(frozen=True)
class ChatSettings:
    """How answers are made.

    Attributes:
        temperature, top_k, top_p, min_p, repetition_penalty: see `SamplingParams`.
        seed: None draws a new one for every answer.
        max_tokens: longest answer; None for as long as the context lasts.
        stop: texts that end an answer.
    """

    temperature: float = SamplingParams.temperature
    top_k: int = SamplingParams.top_k
    top_p: float = SamplingParams.top_p
    min_p: float = SamplingParams.min_p
    repetition_penalty: float = SamplingParams.repetition_penalty
    seed: int | None = None
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            RequestError: a value is outside its range.
        """
        self.generation_params(seed=0 if self.seed is None else self.seed)

    def generation_params(self, seed: int) -> GenerationParams:
        """Return what the engine needs for one answer."""
        sampling = SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
        )
        return GenerationParams(max_tokens=self.max_tokens, sampling=sampling, stop=self.stop)

    def next_seed(self) -> int:
        """Return the seed that is set, else a new one."""
        return secrets.randbits(63) if self.seed is None else self.seed


def _seed(text: str) -> int | None:
    if text == "random":
        return None
    try:
        return whole_number(0)(text)
    except ValueError as error:
        raise ValueError("a whole number, or random") from error


def _max_tokens(text: str) -> int | None:
    if text == "none":
        return None
    try:
        return whole_number(1)(text)
    except ValueError as error:
        raise ValueError("a whole number of 1 or more, or none") from error


def _stop(text: str) -> tuple[str, ...]:
    r"""Parse one stop text; ``\n`` and ``\t`` may be written as escapes."""
    if not text:
        raise ValueError("at least one character")
    return (text.replace("\\n", "\n").replace("\\t", "\t"),)


CHAT_OPTIONS = (
    Option(
        "max_tokens", _max_tokens, "N", f"longest answer, or none (default {DEFAULT_MAX_TOKENS})"
    ),
    Option("temperature", number, "X", "0 always takes the likeliest token"),
    Option("top_k", whole_number(0), "N", "draw among the N likeliest tokens; 0 for all"),
    Option("top_p", number, "X", "draw among the likeliest tokens that make up this share"),
    Option("min_p", number, "X", "leave out tokens less likely than X times the likeliest"),
    Option("repetition_penalty", number, "X", "above 1 avoids what was said; 1 for none"),
    Option("seed", _seed, "N", "same seed, same answer (default random)"),
)
STOP_OPTION = Option("stop", _stop, "TEXT", "end the answer at this text; may be repeated")
SETTABLE = {option.name: option for option in (*CHAT_OPTIONS, STOP_OPTION)}
"""What ``/set`` knows."""


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `chat_settings` reads."""
    group = parser.add_argument_group("answers")
    add_options(group, CHAT_OPTIONS)
    group.add_argument(
        STOP_OPTION.flag, action="append", metavar=STOP_OPTION.metavar, help=STOP_OPTION.help
    )


def chat_settings(
    args: argparse.Namespace, environ: Mapping[str, str], defaults: SamplingParams
) -> ChatSettings:
    """Build settings from flags, then the environment, then the package, then our defaults.

    Args:
        args: with the flags of `add_chat_arguments`.
        environ: with ``TURBOJET_*`` variables.
        defaults: the package's.

    Raises:
        UsageError: a value cannot be read or is outside its range.
    """
    settings = ChatSettings(
        temperature=defaults.temperature,
        top_k=defaults.top_k,
        top_p=defaults.top_p,
        min_p=defaults.min_p,
        repetition_penalty=defaults.repetition_penalty,
    )
    values = given_values(CHAT_OPTIONS, args, environ)
    stops = args.stop or (
        [environ[STOP_OPTION.variable]] if environ.get(STOP_OPTION.variable) else []
    )
    if stops:
        spelling = STOP_OPTION.flag if args.stop else STOP_OPTION.variable
        parsed = [STOP_OPTION.parse_as(text, spelling) for text in stops]
        values["stop"] = tuple(text for part in parsed for text in part)  # type: ignore[attr-defined]
    try:
        return replace(settings, **values)  # type: ignore[arg-type]
    except RequestError as error:
        raise UsageError(str(error)) from error


def changed(settings: ChatSettings, name: str, text: str) -> ChatSettings:
    """Return the settings with one value changed, as ``/set NAME TEXT`` asks.

    Raises:
        RequestError: there is no such setting, or it does not take that value.
    """
    if name not in SETTABLE:
        raise RequestError(f"there is no setting {name[:40]!r}; there are {', '.join(SETTABLE)}")
    if name == "stop" and text == "none":
        return replace(settings, stop=())
    try:
        return replace(settings, **{name: SETTABLE[name].parse_as(text, name)})  # type: ignore[arg-type]
    except UsageError as error:
        raise RequestError(str(error)) from error

"""Options that may be a flag, a ``TURBOJET_*`` variable or a default, and those of the engine.

One table row says everything about an option; the command line, the environment and ``/set`` of
the chat read the same row.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from device_runtime.engine.options import EngineOptions
from device_runtime.errors import UsageError

ENVIRONMENT_PREFIX = "TURBOJET_"
_ALMOST = 0.85
"""As difflib counts likeness: SESSIONLEN is almost SESSION_LEN (0.95), TOP_K is not TOP_P (0.8)."""
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: as in the dataclass it fills.
        parse: turns its text into a value; raises ValueError with what was expected.
        metavar: stands for the value in help.
        help: one line.
        flag_name: for a flag that is spelled unlike the field.
    """

    name: str
    parse: Callable[[str], object]
    metavar: str
    help: str
    flag_name: str = ""

    @property
    def flag(self) -> str:
        """How it is spelled on the command line."""
        return "--" + (self.flag_name or self.name).replace("_", "-")

    @property
    def variable(self) -> str:
        """How it is spelled in the environment."""
        return ENVIRONMENT_PREFIX + (self.flag_name or self.name).upper()

    def parse_as(self, text: str, spelling: str) -> object:
        """Parse a value that was given under some name.

        Raises:
            UsageError: the text is no such value.
        """
        try:
            return self.parse(text)
        except ValueError as error:
            raise UsageError(f"{spelling} is {text[:60]!r}, expected {error}") from error


def add_options(parser: argparse._ArgumentGroup, options: tuple[Option, ...]) -> None:
    """Add a flag for each option; what is not given stays None."""
    for option in options:
        parser.add_argument(option.flag, dest=option.name, metavar=option.metavar, help=option.help)


def given_values(
    options: tuple[Option, ...], args: argparse.Namespace, environ: Mapping[str, str]
) -> dict[str, object]:
    """Return the values that the command line, or else the environment, gives.

    An empty variable counts as not set.

    Raises:
        UsageError: a value cannot be read, or a variable is spelled almost as one of these.
    """
    _check_spelling(options, environ)
    values: dict[str, object] = {}
    for option in options:
        text = getattr(args, option.name)
        if text is not None:
            values[option.name] = option.parse_as(text, option.flag)
        elif environ.get(option.variable):
            values[option.name] = option.parse_as(environ[option.variable], option.variable)
    return values


def _check_spelling(options: tuple[Option, ...], environ: Mapping[str, str]) -> None:
    known = {option.variable.removeprefix(ENVIRONMENT_PREFIX) for option in options}
    for variable in environ:
        name = variable.removeprefix(ENVIRONMENT_PREFIX)
        if name == variable or name in known or not environ[variable]:
            continue
        for near in difflib.get_close_matches(name, known, n=1, cutoff=_ALMOST):
            raise UsageError(f"{variable} is not known; did you mean {ENVIRONMENT_PREFIX}{near}")


def whole_number(least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise ValueError(f"a whole number of {least} or more")
        return value

    return parse


def positive_number(text: str) -> float:
    """Parse a number above zero."""
    value = number(text)
    if not 0 < value < float("inf"):
        raise ValueError("a number above 0")
    return value


def number(text: str) -> float:
    """Parse any number."""
    try:
        return float(text)
    except ValueError as error:
        raise ValueError("a number") from error


def one_of(*choices: str) -> Callable[[str], str]:
    """Return a parser of words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text

    return parse


def byte_size(text: str) -> int:
    """Parse a size such as ``3500M``, ``3.5G``, ``4GB`` or ``4GiB``; units are powers of 1024."""
    digits = text.upper().removesuffix("B").removesuffix("I").rstrip("KMG ")
    unit = text.upper().removesuffix("B").removesuffix("I")[len(digits) :].strip()
    try:
        size = float(digits) * _UNITS[unit]
    except (ValueError, KeyError):
        size = 0.0
    if not 1 <= size < 1 << 50:
        raise ValueError("a size such as 3500M or 3.5G")
    return int(size)


ENGINE_OPTIONS = (
    Option("backend", one_of("auto", "reference", "cuda"), "NAME", "auto, reference or cuda"),
    Option(
        "quant_policy",
        lambda text: int(one_of("0", "4", "8")(text)),
        "N",
        "KV cache: 0 fp16, 4 static int8, 8 online int8 (default: the package's)",
    ),
    Option(
        "cache_max_entry_count",
        positive_number,
        "X",
        "KV cache: a share of the free memory, or from 1 on a number of pages",
    ),
    Option("session_len", whole_number(1), "N", "tokens of one conversation"),
    Option("max_batch_size", whole_number(1), "N", "sequences that run together"),
    Option(
        "memory_limit_bytes",
        byte_size,
        "SIZE",
        "take no more memory than this, such as 3.5G",
        flag_name="memory_limit",
    ),
)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `engine_options` reads."""
    add_options(parser.add_argument_group("engine"), ENGINE_OPTIONS)


def engine_options(args: argparse.Namespace, environ: Mapping[str, str]) -> EngineOptions:
    """Build the engine's options from flags, then the environment, then their defaults.

    Raises:
        UsageError: a value cannot be read.
    """
    values = given_values(ENGINE_OPTIONS, args, environ)
    return replace(EngineOptions(), **values)  # type: ignore[arg-type]

"""JSON of untrusted origin into frozen dataclasses: every key known, present and of its type."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from device_runtime.errors import PackageError

Record = TypeVar("Record")
MAX_INTEGER = 2**63 - 1


def parse_object(text: bytes, what: str, max_bytes: int) -> dict[str, object]:
    """Parse one JSON object.

    Args:
        text: UTF-8 bytes, not trusted.
        what: names the document in messages.
        max_bytes: longest text that is looked at.

    Raises:
        PackageError: the text is too long, not UTF-8, not JSON or not an object; or holds a
            repeated key, NaN, an infinity or an integer beyond 64 bits, or nests too deep.
    """
    if len(text) > max_bytes:
        raise PackageError(f"{what} has {len(text)} bytes, expected at most {max_bytes}")

    def refuse(token: str) -> NoReturn:
        raise PackageError(f"{what} holds the number {token[:24]}, which JSON does not have")

    def integer(digits: str) -> int:
        # Longer ones take quadratic time, or raise ValueError, before anything could be compared.
        if len(digits) > 20 or abs(int(digits)) > MAX_INTEGER:
            raise PackageError(f"{what} holds the integer {digits[:24]}, beyond 64 bits")
        return int(digits)

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise PackageError(f"{what} holds the number {digits[:24]}, beyond 64 bits")
        return value

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key, value in pairs:
            if key in result:
                raise PackageError(f"{what} repeats the key {key[:60]!a}")
            result[key] = value
        return result

    try:
        value = json.loads(
            text.decode("utf-8"),
            parse_constant=refuse,
            parse_int=integer,
            parse_float=number,
            object_pairs_hook=unique,
        )
    except RecursionError as error:
        raise PackageError(f"{what} nests too deep to be read") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise PackageError(f"{what} is not JSON: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise PackageError(f"{what} is {_kind(value)}, expected an object")
    return value


def decode(record: type[Record], value: object, what: str) -> Record:
    """Build a dataclass from parsed JSON, nested dataclasses, tuples and unions included.

    Args:
        record: a dataclass whose fields are bool, int, float, str, Literal, tuple[X, ...],
            X | None or such dataclasses.
        value: what `parse_object` returned, or a part of it.
        what: names the place in messages.

    Raises:
        PackageError: a key is missing or unknown, a value has another type, or the dataclass
            itself refuses it.
    """
    if not isinstance(value, Mapping):
        raise PackageError(f"{what} is {_kind(value)}, expected an object")
    hints = get_type_hints(record)
    for key in value:
        if key not in hints:
            raise PackageError(f"{what} has the unknown key {str(key)[:60]!a}")
    for key in hints:
        if key not in value:
            raise PackageError(f"{what} lacks the key {key!r}")
    arguments = {key: _decode(hint, value[key], f"{what}.{key}") for key, hint in hints.items()}
    return record(**arguments)


def encode(record: Any) -> dict[str, object]:
    """Return the JSON object of a dataclass, keys in the order of its fields."""
    return dataclasses.asdict(record)


def _decode(hint: Any, value: object, what: str) -> Any:
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return decode(hint, value, what)  # type: ignore[arg-type]
    if origin is Literal:
        choices = get_args(hint)
        if not isinstance(value, str) or value not in choices:
            shown = ascii(value[:60]) if isinstance(value, str) else _kind(value)
            raise PackageError(f"{what} is {shown}, expected one of {', '.join(choices)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise PackageError(f"{what} is {_kind(value)}, expected a list")
        item = get_args(hint)[0]
        return tuple(_decode(item, entry, f"{what}[{i}]") for i, entry in enumerate(value))
    if origin in (types.UnionType, Union):
        if value is None:
            return None
        return _decode(get_args(hint)[0], value, what)
    return _scalar(hint, value, what)


def _scalar(hint: type, value: object, what: str) -> object:
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise PackageError(f"{what} is {_kind(value)}, expected {_NAMES[hint]}")
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PackageError(f"{what} holds half a surrogate pair") from error
    return value


_NAMES: dict[type, str] = {
    bool: "a boolean",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def _kind(value: object) -> str:
    return _NAMES.get(type(value), type(value).__name__)

"""Tells from an exception of the SDK who can mend it, whatever version raised it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Literal

FailureKind = Literal["missing", "refused", "damaged", "full", "network", "unknown"]

_BY_STATUS: dict[int, FailureKind] = {401: "refused", 403: "refused", 404: "missing"}
_BY_CLASS: dict[str, FailureKind] = {
    "NotExistError": "missing",
    "AuthenticationError": "refused",
    "PermissionDeniedError": "refused",
    "FileIntegrityError": "damaged",
    "FileSizeMismatchError": "damaged",
    "NetworkError": "network",
    "ServerError": "network",
    "RateLimitError": "network",
    "ConnectionError": "network",
    "Timeout": "network",
    "TimeoutError": "network",
}
_MOST_TELLING: tuple[FailureKind, ...] = ("full", "refused", "missing", "damaged", "network")

MAX_REASON_CHARACTERS = 200


def describe_failure(error: BaseException) -> tuple[FailureKind, str]:
    """Return what kind of failure an exception is, and its first line.

    A snapshot that failed holds the exceptions of its files; the kind that most needs a person
    wins.
    """
    found: dict[FailureKind, BaseException] = {}
    for each in _chain(error):
        found.setdefault(_kind(each), each)
    for kind in _MOST_TELLING:
        if kind in found:
            return kind, _first_line(found[kind])
    return "unknown", _first_line(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        failed_files = getattr(each, "failed_files", None)
        if isinstance(failed_files, dict):
            waiting.extend(e for e in failed_files.values() if isinstance(e, BaseException))
        waiting.extend(e for e in (each.__cause__, each.__context__) if e is not None)


def _kind(error: BaseException) -> FailureKind:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "full"
    response = getattr(error, "response", None)
    status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    for base in type(error).__mro__:
        if base.__name__ in _BY_CLASS:
            return _BY_CLASS[base.__name__]
    return "unknown"


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:MAX_REASON_CHARACTERS]

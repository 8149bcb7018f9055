"""Typed access to the metadata of a GGUF file; every complaint names the key."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from device_runtime.errors import PackageError
from host_tools.fetch.gguf_header import GgufHeader

MAX_SIZE = 1 << 24
"""No size of a model is larger; keeps a lie from becoming an allocation."""


class Metadata:
    """The metadata of one file.

    Attributes:
        file_name: of the file, for messages.
    """

    def __init__(self, header: GgufHeader) -> None:
        self.file_name = header.path.name
        self._values = header.metadata

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def keys(self) -> Sequence[str]:
        """Return all keys."""
        return tuple(self._values)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string.

        Raises:
            PackageError: it is missing without a default, or no string.
        """
        value = self._values.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean.

        Raises:
            PackageError: it is none.
        """
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "a boolean")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Return an integer from 1 to :data:`MAX_SIZE`.

        Raises:
            PackageError: it is missing without a default, no integer, or out of range.
        """
        value = self._values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
            raise self._wrong(key, f"an integer from 1 to {MAX_SIZE}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number.

        Raises:
            PackageError: it is missing without a default, or no such number.
        """
        value = self._values.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._wrong(key, "a number")
        if not 0 < value < math.inf:
            raise self._wrong(key, "a positive number")
        return float(value)

    def token_id(self, key: str, num_tokens: int) -> int | None:
        """Return the id of a special token, None where the file names none.

        Raises:
            PackageError: it is no id of the vocabulary.
        """
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < num_tokens:
            raise self._wrong(key, f"a token id below {num_tokens}")
        return value

    def texts(self, key: str) -> list[str]:
        """Return an array of strings.

        Raises:
            PackageError: it is missing, or no such array.
        """
        value = self._values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "an array of strings")
        return [str(item) for item in value]

    def numbers(self, key: str, length: int) -> list[float]:
        """Return an array of ``length`` numbers.

        Raises:
            PackageError: it is missing, no such array, or of another length.
        """
        value = self._values.get(key)
        if not isinstance(value, list) or any(isinstance(item, (str, bool)) for item in value):
            raise self._wrong(key, "an array of numbers")
        if len(value) != length:
            raise PackageError(
                f"{key} of {self.file_name} has {len(value)} elements, expected {length}"
            )
        return [float(item) for item in value]

    def _wrong(self, key: str, expected: str) -> PackageError:
        if key not in self._values:
            return PackageError(f"{self.file_name} has no {key}, expected {expected}")
        shown = repr(self._values[key])[:60]
        return PackageError(f"{key} of {self.file_name} is {shown}, expected {expected}")


def shortest(value: float) -> float:
    """Return the shortest decimal that is the same fp32: the file's 9.99999975e-06 was 1e-05."""
    return float(str(np.float32(value)))

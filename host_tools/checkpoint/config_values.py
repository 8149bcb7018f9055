"""Typed access to what the JSON files of a checkpoint hold, which may be anything."""

from __future__ import annotations

from collections.abc import Mapping

from device_runtime.errors import PackageError

MAX_NUMBER = 1e30
"""No other number of a model is larger."""
MAX_SIZE = 1 << 24
"""No size of a model in config.json is larger; keeps a lie from becoming an allocation."""


class ConfigReader:
    """Typed access to one JSON object by Llama's keys; every complaint names the key it has."""

    def __init__(
        self,
        config: Mapping[str, object],
        keys: Mapping[str, str] | None = None,
        what: str = "config.json",
    ) -> None:
        """Wrap a config.

        Args:
            config: the parsed object.
            keys: what it calls Llama's keys, where it has other names for them.
            what: names the file in errors.
        """
        self._what = what
        self._config = config
        self._keys = keys or {}

    def _get(self, key: str) -> tuple[str, object]:
        own = self._keys.get(key, key)
        return own, self._config.get(own)

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer.

        Raises:
            PackageError: it is missing without a default, no integer or out of range.
        """
        key, value = self._get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
            raise self.fault(key, value, f"an integer from 1 to {MAX_SIZE}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number.

        Raises:
            PackageError: it is missing without a default, or no such number.
        """
        key, value = self._get(key)
        if value is None and default is not None:
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # Compared as it is: a large integer has no float.
        if not is_number or not 0 < value <= MAX_NUMBER:  # type: ignore[operator]
            raise self.fault(key, value, "a positive number")
        return float(value)  # type: ignore[arg-type]

    def text(self, key: str, default: str) -> str:
        """Return a string.

        Raises:
            PackageError: it is something else.
        """
        key, value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fault(key, value, "a string")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """Return true or false; a string that says false would count as true.

        Raises:
            PackageError: it is something else.
        """
        key, value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fault(key, value, "true or false")
        return value

    def items(self, key: str) -> list[object] | None:
        """Return a list, None when it is absent or null.

        Raises:
            PackageError: it is something else.
        """
        key, value = self._get(key)
        if value is not None and not isinstance(value, list):
            raise self.fault(key, value, "a list")
        return value

    def section(self, key: str, keys: Mapping[str, str] | None = None) -> ConfigReader | None:
        """Return an object inside the config, None when it is absent or null.

        Args:
            key: of the object.
            keys: what it calls the usual keys.

        Raises:
            PackageError: it is something else.
        """
        key, value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fault(key, value, "an object")
        return ConfigReader(value, keys, f"{key} in {self._what}")

    def has(self, key: str) -> bool:
        """Tell whether the key is there and not null."""
        return self._get(key)[1] is not None

    def fault(self, key: str, value: object, expected: str) -> PackageError:
        """Return the complaint about a value, or that there is none."""
        found = f"has no {key}" if value is None else f"says {key} {shown(value)}"
        return PackageError(f"{self._what} {found}, expected {expected}")


def shown(value: object) -> str:
    """Return a value as an error may show it."""
    return repr(value)[:60]

"""Reads config.json into the model's facts; what it says is checked against the tensors later."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from device_runtime.errors import PackageError
from device_runtime.package_format.model_config import ModelConfig, RopeKind, RopeScaling
from host_tools.checkpoint.families import Family, find_family

MAX_CONFIG_BYTES = 4 << 20
MAX_SIZE = 1 << 24
"""No size of a model in config.json is larger; keeps a lie from becoming an allocation."""

_ROPE_KINDS: dict[str, RopeKind] = {
    "default": "none",
    "none": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
}


def read_json(path: Path) -> dict[str, object]:
    """Return the object in a small JSON file of a checkpoint.

    Raises:
        PackageError: the file is not there, is too large or holds no JSON object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise PackageError(f"{path.name} has {size} bytes, expected at most {MAX_CONFIG_BYTES}")
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PackageError(f"{path.parent} has no readable {path.name}") from error
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{path.name} in {path.parent} is no JSON, fetch it again") from error
    if not isinstance(loaded, dict):
        raise PackageError(f"{path.name} in {path.parent} holds no JSON object, fetch it again")
    return loaded


class ConfigReader:
    """Typed access to one config.json; every complaint names the key."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self._config = config

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer.

        Raises:
            PackageError: it is missing without a default, no integer or out of range.
        """
        value = self._config.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
            raise PackageError(
                f"config.json says {key} {_shown(value)}, expected an integer from 1 to {MAX_SIZE}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number.

        Raises:
            PackageError: it is missing without a default, or no such number.
        """
        value = self._config.get(key)
        if value is None and default is not None:
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < float(value) < math.inf:  # type: ignore[arg-type]
            raise PackageError(
                f"config.json says {key} {_shown(value)}, expected a positive number"
            )
        return float(value)  # type: ignore[arg-type]

    def text(self, key: str, default: str) -> str:
        """Return a string.

        Raises:
            PackageError: it is something else.
        """
        value = self._config.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise PackageError(f"config.json says {key} {_shown(value)}, expected a string")
        return value

    def section(self, key: str) -> ConfigReader | None:
        """Return an object inside the config, None when it is absent or null.

        Raises:
            PackageError: it is something else.
        """
        value = self._config.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise PackageError(f"config.json says {key} {_shown(value)}, expected an object")
        return ConfigReader(value)

    def has(self, key: str) -> bool:
        """Tell whether the key is there and not null."""
        return self._config.get(key) is not None


def read_family(config: Mapping[str, object]) -> Family:
    """Return the table for the architecture that config.json names, after its refusals.

    Raises:
        PackageError: no architecture, an unknown one, or a feature of it that we do not run.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise PackageError(
            f"config.json says architectures {_shown(architectures)}, expected a list of one name"
        )
    family = find_family(str(architectures[0]))
    for key, meaning in family.refused.items():
        if config.get(key):
            raise PackageError(f"config.json asks for {meaning} ({key}), turbojet does not run it")
    reader = ConfigReader(config)
    activation = reader.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise PackageError(f"config.json says hidden_act {activation[:40]!r}, turbojet runs silu")
    return family


def read_model(config: Mapping[str, object], family: Family, group_size: int) -> ModelConfig:
    """Return the model's facts as config.json states them.

    Args:
        config: the parsed config.json.
        family: its family.
        group_size: of an AWQ checkpoint's codes, 0 for a floating-point one.

    Raises:
        PackageError: a key is missing, wrong or asks for something that we do not run.
    """
    reader = ConfigReader(config)
    hidden_size = reader.integer("hidden_size")
    num_heads = reader.integer("num_attention_heads")
    if not reader.has("head_dim") and hidden_size % num_heads:
        raise PackageError(
            f"config.json says hidden_size {hidden_size}, which num_attention_heads {num_heads} "
            f"does not divide"
        )
    context = reader.integer("max_position_embeddings")
    rope_theta, rope_scaling = _read_rope(reader, context)
    return ModelConfig(
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.integer("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", num_heads),
        head_dim=reader.integer("head_dim", hidden_size // num_heads),
        vocab_size=reader.integer("vocab_size"),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        max_position_embeddings=_full_attention_context(config, context),
        weight_type="int4" if group_size else "fp16",
        group_size=group_size,
        rope_scaling=rope_scaling,
        has_attention_bias=any(family.has_bias(linear, config) for linear in ("q", "o")),
        has_qk_norm=family.has_qk_norm,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _full_attention_context(config: Mapping[str, object], context: int) -> int:
    """Cap the context at a sliding window: within it such a model attends to everything."""
    window = config.get("sliding_window")
    if config.get("use_sliding_window", True) and isinstance(window, int) and window > 0:
        return min(context, window)
    return context


def _read_rope(reader: ConfigReader, context: int) -> tuple[float, RopeScaling]:
    """Read both spellings: ``rope_theta`` + ``rope_scaling``, and newer ``rope_parameters``."""
    section = reader.section("rope_parameters") or reader.section("rope_scaling")
    if section is None:
        return reader.number("rope_theta", 10000.0), RopeScaling()
    for holder in (reader, section):
        if holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise PackageError(
                "config.json asks for partial rotary embeddings, which we do not run"
            )
    theta = section.number("rope_theta", reader.number("rope_theta", 10000.0))
    name = section.text("rope_type", section.text("type", "default"))
    kind = _ROPE_KINDS.get(name)
    if kind is None:
        raise PackageError(
            f"config.json asks for rope scaling {name[:40]!r}, turbojet runs "
            f"{', '.join(key for key in _ROPE_KINDS if key != 'none')}"
        )
    if kind == "none":
        return theta, RopeScaling()
    factor = section.number("factor")
    if kind != "llama3":
        return theta, RopeScaling(kind=kind, factor=factor)
    return theta, RopeScaling(
        kind=kind,
        factor=factor,
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_position_embeddings=section.integer(
            "original_max_position_embeddings", context
        ),
    )


def _shown(value: object) -> str:
    return repr(value)[:60]

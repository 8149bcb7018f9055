"""Reads config.json into the model's facts; what it says is checked against the tensors later."""

from __future__ import annotations

from collections.abc import Mapping

from device_runtime.errors import PackageError
from device_runtime.package_format.model_config import ModelConfig, RopeKind, RopeScaling
from host_tools.checkpoint.config_values import ConfigReader, shown
from host_tools.checkpoint.families import Family, find_family

_ROPE_KINDS: dict[str, RopeKind] = {
    "default": "none",
    "none": "none",
    "origin": "none",  # InternLM 1
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
}


def read_architecture(config: Mapping[str, object]) -> str:
    """Return the model's class by the name that transformers gives it.

    Raises:
        PackageError: config.json does not name one.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ConfigReader(config).fault("architectures", architectures, "a list of one name")
    return str(architectures[0])


def read_family(config: Mapping[str, object]) -> Family:
    """Return the table for the architecture that config.json names, after its refusals.

    Raises:
        PackageError: no architecture, an unknown one, or a feature of it that we do not run.
    """
    family = find_family(read_architecture(config))
    for key, meaning in family.refused.items():
        if config.get(key):
            raise PackageError(f"config.json asks for {meaning} ({key}), turbojet does not run it")
    for key, (expected, meaning) in family.fixed.items():
        if config.get(key) not in (None, expected):
            raise PackageError(
                f"config.json asks for {meaning} ({key} {shown(config[key])}), turbojet does not "
                f"run it"
            )
    for key, meaning in family.needed.items():
        if config.get(key) is None:
            raise PackageError(
                f"config.json has no {key}: this is {meaning}, which turbojet does not run"
            )
    _check_layer_types(config)
    activation = ConfigReader(config).text("hidden_act", "silu")
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
    reader = ConfigReader(config, family.keys)
    hidden_size = reader.integer("hidden_size")
    num_heads = reader.integer("num_attention_heads")
    if not reader.has("head_dim") and hidden_size % num_heads:
        raise PackageError(
            f"config.json says hidden_size {hidden_size}, which num_attention_heads {num_heads} "
            f"does not divide"
        )
    context = reader.integer("max_position_embeddings")
    rope_theta, rope_scaling = _read_rope(reader, config, family, context)
    num_layers = reader.integer("num_hidden_layers")
    intermediate_size = reader.integer("intermediate_size")
    if intermediate_size % family.num_mlp_halves:
        raise PackageError(
            f"config.json says intermediate_size {intermediate_size}, expected a multiple of "
            f"{family.num_mlp_halves}: it counts gate and up"
        )
    return ModelConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size // family.num_mlp_halves,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", num_heads),
        head_dim=reader.integer("head_dim", hidden_size // num_heads),
        vocab_size=reader.integer("vocab_size"),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        max_position_embeddings=context,
        weight_type="int4" if group_size else "fp16",
        group_size=group_size,
        rope_scaling=rope_scaling,
        has_attention_bias=any(family.has_bias(linear, config) for linear in ("q", "o")),
        has_qk_norm=family.has_qk_norm,
        tie_word_embeddings=reader.flag("tie_word_embeddings", family.is_tied),
        use_logn_attn=family.has_stretch and reader.flag("use_logn_attn"),
        layers_without_rope=_layers_without_rope(reader, family.rope_layers, num_layers),
        sliding_window=_sliding_window(reader, family, context),
    )


def _sliding_window(reader: ConfigReader, family: Family, context: int) -> int:
    """Return how far layers look back, 0 where that is the whole context."""
    if not reader.flag("use_sliding_window", family.has_window):
        return 0
    window = reader.integer("sliding_window", context)
    return window if window < context else 0


def _layers_without_rope(reader: ConfigReader, name: str, num_layers: int) -> tuple[int, ...]:
    if not name:
        return ()
    listed = reader.items(f"{name}s")
    if listed is None:
        interval = reader.integer(f"{name}_interval", 4)
        return tuple(range(interval - 1, num_layers, interval))
    if len(listed) < num_layers or not all(entry in (0, 1) for entry in listed):
        raise PackageError(
            f"config.json says {name}s with {len(listed)} entries, expected 0 or 1 for each of "
            f"{num_layers} layers"
        )
    return tuple(layer for layer in range(num_layers) if not listed[layer])


def _check_layer_types(config: Mapping[str, object]) -> None:
    """Refuse layers that are no plain attention.

    Raises:
        PackageError: there are some.
    """
    kinds = config.get("layer_types")
    for kind in kinds if isinstance(kinds, list) else ():
        if kind not in ("full_attention", "sliding_attention"):
            raise PackageError(
                f"config.json asks for layers of the kind {shown(kind)}, turbojet runs "
                f"full_attention"
            )


def _read_rope(
    reader: ConfigReader, config: Mapping[str, object], family: Family, context: int
) -> tuple[float, RopeScaling]:
    """Read both spellings: ``rope_theta`` + ``rope_scaling``, and newer ``rope_parameters``."""
    stated = config.get("rope_parameters")
    if isinstance(stated, dict) and any(isinstance(value, dict) for value in stated.values()):
        raise PackageError(
            "config.json asks for other rotary embeddings by kind of layer (rope_parameters), "
            "which we do not run"
        )
    section = reader.section("rope_parameters") or reader.section("rope_scaling", family.rope_keys)
    for holder in (reader, section):
        if holder is not None and holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise PackageError(
                "config.json asks for partial rotary embeddings, which we do not run"
            )
    theta = reader.number("rope_theta", 10000.0)
    if section is None:
        is_stretched = family.has_stretch and reader.flag("use_dynamic_ntk")
        return theta, RopeScaling("qwen1" if is_stretched else "none")
    theta = section.number("rope_theta", theta)
    name = section.text("rope_type", section.text("type", "default"))
    kind = _ROPE_KINDS.get(name)
    if kind is None:
        raise PackageError(
            f"config.json asks for rope scaling {name[:40]!r}, turbojet runs "
            f"default, {', '.join(key for key, kind in _ROPE_KINDS.items() if kind != 'none')}"
        )
    if kind == "none":
        return theta, RopeScaling()
    factor = section.number("factor", family.rope_factor)
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

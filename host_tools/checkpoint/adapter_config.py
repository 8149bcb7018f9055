"""What adapter_config.json of a LoRA adapter says, and what of it can be merged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from device_runtime.errors import PackageError
from host_tools.checkpoint.config_values import ConfigReader, shown
from host_tools.checkpoint_names import ADAPTER_CONFIG
from host_tools.json_file import read_json

_OFF: tuple[object, ...] = (None, False, [], {}, "", "none", "None")
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "bias": "trained biases",
    "lora_bias": "trained biases",
    "fan_in_fan_out": "transposed weights",
    "rank_pattern": "another rank for some modules",
    "alpha_pattern": "another alpha for some modules",
    "layer_replication": "repeated layers",
    "target_parameters": "parameters that are no linear's",
    "trainable_token_indices": "single trained embeddings",
    "alora_invocation_tokens": "activated LoRA",
    "use_bdlora": "block-diagonal LoRA",
}
"""Keys of peft's LoraConfig that must be off, with what they ask for."""

_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base's own weights as they were."""


@dataclass(frozen=True)
class AdapterConfig:
    """How the two factors of an adapter become a change of a weight.

    Attributes:
        rank: columns of every B, rows of every A.
        scale: on the product B A.
    """

    rank: int
    scale: float


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read the config of an adapter folder.

    Raises:
        PackageError: it is damaged, no LoRA adapter, or asks for what is not merged.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    reader = ConfigReader(config, what=ADAPTER_CONFIG)
    kind = reader.text("peft_type", "LORA")
    if kind != "LORA":
        raise _refused(f"peft_type {kind[:40]!r}")
    for key, meaning in _REFUSED.items():
        if config.get(key) not in _OFF:
            raise _refused(f"{meaning} ({key} {shown(config[key])})")
    _check_base(config)
    rank = reader.integer("r")
    alpha = reader.number("lora_alpha")
    is_rank_stabilised = config.get("use_rslora") is True
    return AdapterConfig(rank, alpha / (math.sqrt(rank) if is_rank_stabilised else rank))


def _check_base(config: Mapping[str, object]) -> None:
    """Refuse an adapter for a base whose weights were changed when its training began."""
    start = config.get("init_lora_weights")
    if start not in _KEEPS_BASE:
        raise PackageError(
            f"{ADAPTER_CONFIG} says init_lora_weights {shown(start)}: the adapter belongs to a "
            f"changed base; save the merged checkpoint and use that"
        )


def _refused(what: str) -> PackageError:
    return PackageError(
        f"{ADAPTER_CONFIG} asks for {what}, turbojet merges plain LoRA; save the merged "
        f"checkpoint and use that"
    )

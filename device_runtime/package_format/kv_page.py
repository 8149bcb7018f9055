"""Bytes of one KV cache page, the unit of every memory plan on host and device."""

from __future__ import annotations

from device_runtime.package_format.config_ini import (
    QUANT_POLICY_ONLINE_INT8,
    QUANT_POLICY_STATIC_INT8,
)
from device_runtime.package_format.model_config import ModelConfig

_FP16_BYTES = 2
_ONLINE_PARAMETERS_BYTES = 2 * _FP16_BYTES
"""Scale and zero of one token and head, fp16 each (spec section 4.5)."""


def kv_token_bytes(model: ModelConfig, quant_policy: int) -> int:
    """Return the bytes that one token takes over all layers, keys and values together.

    fp16 takes ``head_dim`` halves a head, static int8 as many bytes (spec section 3.2); online
    int8 adds a scale and a zero for each head (section 4.5).

    Args:
        model: whole model; one device holds all ranks.
        quant_policy: 0 fp16, 4 static int8, 8 online int8.

    Raises:
        ValueError: another quant_policy.
    """
    head_bytes = {
        0: model.head_dim * _FP16_BYTES,
        QUANT_POLICY_STATIC_INT8: model.head_dim,
        QUANT_POLICY_ONLINE_INT8: model.head_dim + _ONLINE_PARAMETERS_BYTES,
    }
    if quant_policy not in head_bytes:
        raise ValueError(f"quant_policy is {quant_policy}, expected 0, 4 or 8")
    return 2 * model.num_hidden_layers * model.num_kv_heads * head_bytes[quant_policy]


def kv_page_bytes(model: ModelConfig, page_size: int, quant_policy: int) -> int:
    """Return the bytes of one page of ``page_size`` tokens across all layers.

    Raises:
        ValueError: no such quant_policy.
    """
    return page_size * kv_token_bytes(model, quant_policy)

"""The element formats of a KV cache and what a page of each takes."""

from __future__ import annotations

from enum import Enum

from device_runtime.errors import PackageError
from device_runtime.package_format import kv_page
from device_runtime.package_format.config_ini import (
    QUANT_POLICY_ONLINE_INT8,
    QUANT_POLICY_STATIC_INT8,
)
from device_runtime.package_format.model_config import ModelConfig

PAGE_SIZE_MULTIPLE = 64
"""Tokens of a kernel's tile inside a page; page sizes are multiples of it."""


class KvFormat(Enum):
    """How keys and values are stored; the values are config.ini's ``quant_policy``.

    INT8_STATIC uses the package's parameters, one set per layer (spec section 4.4). INT8_ONLINE
    finds a scale and a zero per token and head (spec section 4.5).
    """

    FP16 = 0
    INT8_STATIC = QUANT_POLICY_STATIC_INT8
    INT8_ONLINE = QUANT_POLICY_ONLINE_INT8

    @property
    def title(self) -> str:
        """Words for a person."""
        return {0: "fp16", 4: "static int8", 8: "online int8"}[self.value]


def kv_format(quant_policy: int) -> KvFormat:
    """Return the format of a ``quant_policy``.

    Raises:
        PackageError: there is no such policy.
    """
    try:
        return KvFormat(quant_policy)
    except ValueError as error:
        raise PackageError(
            f"quant_policy is {quant_policy}, expected 0 (fp16 KV cache), "
            "4 (static int8) or 8 (online int8)"
        ) from error


def kv_page_bytes(model: ModelConfig, page_size: int, kv: KvFormat) -> int:
    """Return the bytes of one page over all layers (spec sections 3.2 and 4.5).

    Per token, layer and kv head: ``head_dim`` elements of K and of V; online int8 adds an fp16
    scale and zero for each.
    """
    return kv_page.kv_page_bytes(model, page_size, kv.value)

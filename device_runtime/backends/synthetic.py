"""Packages of real shapes and random weights, without files: to measure any board with any model.

A backend asks such a package for blocks of random data and fills its memory with them; what the
model says means nothing, what it costs is real.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.errors import UsageError
from device_runtime.package_format import names
from device_runtime.package_format.config_ini import TurboMindConfig
from device_runtime.package_format.int4 import pack_scales_zeros
from device_runtime.package_format.model_config import HeadType, ModelConfig
from device_runtime.package_format.package import Package
from device_runtime.package_format.tensors import TensorSpec, tensor_specs

_ELEMENTS = 1 << 20
"""Random elements that are drawn; longer tensors repeat them."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a published model, as its config.json has them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_kv_heads: int
    vocab_size: int
    head_dim: int = 128
    group_size: int = 128
    has_qk_norm: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6


SHAPES = {
    "llama-2-7b": Shape(
        4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096, rope_theta=1e4
    ),
    "llama-2-13b": Shape(
        5120, 13824, 40, 40, 40, 32000, max_position_embeddings=4096, rope_theta=1e4
    ),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=131072),
    "llama-3.2-3b": Shape(
        3072, 8192, 28, 24, 8, 128256, tie_word_embeddings=True, max_position_embeddings=131072
    ),
    "internlm2-1.8b": Shape(2048, 8192, 24, 16, 8, 92544),
    "internlm2-7b": Shape(4096, 14336, 32, 32, 8, 92544),
    "internlm2-20b": Shape(6144, 16384, 48, 48, 8, 92544),
    "qwen3-0.6b": Shape(1024, 3072, 28, 16, 8, 151936, has_qk_norm=True, tie_word_embeddings=True),
    "qwen3-1.7b": Shape(2048, 6144, 28, 16, 8, 151936, has_qk_norm=True, tie_word_embeddings=True),
    "qwen3-4b": Shape(2560, 9728, 36, 32, 8, 151936, has_qk_norm=True, tie_word_embeddings=True),
    "qwen3-8b": Shape(4096, 12288, 36, 32, 8, 151936, has_qk_norm=True),
    "smollm2-135m": Shape(
        576, 1536, 30, 9, 3, 49152, head_dim=64, group_size=64, tie_word_embeddings=True
    ),
}
"""By the name that `turbojet bench --synthetic` takes. Sources: the models' config.json files."""


@dataclass(frozen=True)
class SyntheticPackage(Package):
    """A package whose tensors are drawn when they are asked for."""

    def random_block(self, spec: TensorSpec) -> NDArray[Any]:
        """Return at most a few MiB of elements that fit a tensor, to be repeated over it.

        Its bytes are a whole number of rows of the tensor or the whole tensor.
        """
        rng = np.random.default_rng(zlib.crc32(spec.name.encode()))
        count = min(_ELEMENTS, int(np.prod(spec.shape)))
        if spec.name.endswith(names.SCALES_ZEROS):
            # Codes are uniform, 4.6 their deviation: products keep the size of their inputs.
            num_inputs = spec.shape[0] * self.model.group_size
            size = 1 / (4.6 * np.sqrt(num_inputs))
            scales = (size * rng.uniform(0.5, 1.5, (1, count))).astype(np.float16)
            zeros = rng.integers(7, 9, (1, count), dtype=np.uint8)
            packed: NDArray[np.uint32] = pack_scales_zeros(scales, zeros).ravel()
            return packed
        if spec.dtype.kind in "ui":
            info = np.iinfo(spec.dtype)
            words: NDArray[Any] = rng.integers(info.min, info.max, count, spec.dtype, endpoint=True)
            return words
        if spec.name == names.OUTPUT_SCALES:
            return np.full(count, 1 / (73 * np.sqrt(self.model.hidden_size)), np.float16)
        if len(spec.shape) == 1:  # norms around one
            return rng.uniform(0.9, 1.1, count).astype(spec.dtype)
        size = 1 / np.sqrt(spec.shape[-1])
        values: NDArray[Any] = (size * rng.standard_normal(count, np.float32)).astype(spec.dtype)
        return values

    def tensor(self, name: str) -> NDArray[Any]:
        """See `Package.tensor`."""
        spec = self.spec(name)
        return np.resize(self.random_block(spec), spec.shape)


def synthetic_package(
    name: str,
    *,
    head_type: HeadType = "fp16",
    group_size: int | None = None,
    max_batch_size: int = 8,
    session_len: int | None = None,
) -> SyntheticPackage:
    """Return a W4 package of a known model's shape with an online int8 KV cache.

    Args:
        name: of `SHAPES`.
        head_type: of the output head.
        group_size: of the weights; the model's usual one when None.
        max_batch_size: sequences that run together.
        session_len: tokens of a sequence; at most 8192 of the model's when None.

    Raises:
        UsageError: no such model.
        PackageError: the group size does not fit the model.
    """
    if name not in SHAPES:
        raise UsageError(f"no synthetic model is called {name[:60]!r}; known: {', '.join(SHAPES)}")
    shape = SHAPES[name]
    model = ModelConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        rms_norm_eps=1e-5,
        rope_theta=shape.rope_theta,
        max_position_embeddings=shape.max_position_embeddings,
        weight_type="int4",
        group_size=group_size or shape.group_size,
        has_qk_norm=shape.has_qk_norm,
        # An int8 head is a table of its own (spec section 1.4).
        tie_word_embeddings=shape.tie_word_embeddings,
        head_type=head_type,
    )
    config = TurboMindConfig.from_model(
        model,
        model_name="base",
        start_id=0,
        end_id=0,
        session_len=session_len or min(8192, model.max_position_embeddings),
    )
    config = replace(config, quant_policy=8, max_batch_size=max_batch_size)
    specs = tensor_specs(model, has_kv_scales=False)
    return SyntheticPackage(Path(f"synthetic/{name}"), None, config, model, specs)

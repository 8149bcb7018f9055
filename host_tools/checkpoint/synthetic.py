"""Checkpoints without weight files: real names and shapes, weights drawn from a seed when read.

A folder with config.json and :data:`MARKER` and no weight file is one. It measures what a model
costs, on any machine and without a download; what such a model says means nothing.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from device_runtime.errors import PackageError
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.names import BIAS, WEIGHT
from host_tools.checkpoint.config_reader import read_family, read_model
from host_tools.checkpoint.config_values import ConfigReader
from host_tools.checkpoint.families import Family
from host_tools.checkpoint.linear_weights import linear_shape
from host_tools.checkpoint_names import CONFIG_JSON
from host_tools.json_file import read_json

MARKER = "synthetic-weights.json"
"""``{"seed": 0, "dtype": "float16"}``; both have to be there."""

MAX_TENSOR_BYTES = 8 << 30
"""No weight of a published model is larger; keeps a config that lies from becoming memory."""

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

_POOL = 1 << 24
"""Normal numbers that are drawn; a row of a weight is a run of them from its own place."""


class SyntheticFile:
    """Stands in the place of a checkpoint's weight files."""

    def __init__(self, folder: Path) -> None:
        """Read config and marker.

        Raises:
            PackageError: either is damaged, or a tensor would be absurdly large.
        """
        config, marker = read_json(folder / CONFIG_JSON), read_json(folder / MARKER)
        dtype = DTYPES.get(ConfigReader(marker).text("dtype", ""))
        seed = marker.get("seed")
        if dtype is None or not isinstance(seed, int) or set(marker) != {"seed", "dtype"}:
            raise PackageError(
                f"{MARKER} says {json.dumps(marker)[:80]}, expected a whole seed and a dtype of "
                f"{' or '.join(DTYPES)}"
            )
        self._dtype, self._seed = dtype, seed
        family = read_family(config)
        self._shapes = tensor_shapes(config, family, read_model(config, family, 0))
        for name, shape in self._shapes.items():
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            if num_bytes > MAX_TENSOR_BYTES:
                raise PackageError(
                    f"tensor {name} of {folder} would have {num_bytes} bytes, a synthetic one has "
                    f"at most {MAX_TENSOR_BYTES}"
                )

    def names(self) -> list[str]:
        """Return the names of the tensors."""
        return list(self._shapes)

    def facts(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return dtype and shape of a tensor."""
        return self._dtype, self._shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        """Draw a tensor: the same for the same seed, name and shape.

        Rows are copied from a pool of normal numbers, at the speed of reading a cached file.
        Products keep the size of their inputs; norms lie around one and differ from channel to
        channel, so that there are channels to be scaled.
        """
        shape = self._shapes[name]
        width = shape[-1]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), self._seed))
        pool = _pool(self._seed, self._dtype, 1.0 if len(shape) == 1 else width**-0.5)
        starts = torch.randint(
            0, len(pool) - width + 1, (shape[0] if len(shape) == 2 else 1,), generator=generator
        )
        rows = pool.as_strided((len(pool) - width + 1, width), (1, 1))[starts]
        if len(shape) == 2:
            return rows
        values = rows[0].float()
        drawn = values.mul_(0.5).exp_() if name.endswith(WEIGHT) else values.mul_(0.02)
        return drawn.to(self._dtype)


@lru_cache(maxsize=4)
def _pool(seed: int, dtype: torch.dtype, deviation: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_POOL, generator=generator).mul_(deviation).to(dtype)


def tensor_shapes(
    config: Mapping[str, object], family: Family, model: ModelConfig
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a floating-point checkpoint, by its published name."""
    table = (model.vocab_size, model.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {
        f"{family.embedding}.{WEIGHT}": table,
        f"{family.final_norm}.{WEIGHT}": (model.hidden_size,),
    }
    if not model.tie_word_embeddings:
        shapes[f"{family.head}.{WEIGHT}"] = table
    norms = (
        (family.attention_norm, model.hidden_size),
        (family.ffn_norm, model.hidden_size),
        (family.q_norm, model.head_dim),
        (family.k_norm, model.head_dim),
    )
    for layer in range(model.num_hidden_layers):
        for module, size in norms:
            if module:
                shapes[f"{family.module(layer, module)}.{WEIGHT}"] = (size,)
        for source in family.linears:
            parts = [linear_shape(model, part) for part in source.parts]
            outputs, inputs = sum(part[0] for part in parts), parts[0][1]
            shapes[f"{family.module(layer, source.module)}.{WEIGHT}"] = (outputs, inputs)
            if family.has_bias(source.parts[0], config):
                shapes[f"{family.module(layer, source.module)}.{BIAS}"] = (outputs,)
    return shapes


def write_synthetic(
    folder: Path, config: Mapping[str, object], seed: int = 0, dtype: str = "float16"
) -> Path:
    """Make a folder whose weights are drawn when they are read, and return it.

    Args:
        folder: is made.
        config: config.json of a published model.
        seed: of the weights.
        dtype: of the weights, a name of :data:`DTYPES`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_JSON).write_text(json.dumps(config), encoding="utf-8")
    marker = json.dumps({"seed": seed, "dtype": dtype})
    (folder / MARKER).write_text(marker, encoding="utf-8")
    return folder

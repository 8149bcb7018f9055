"""4-bit checkpoints in other people's packings, written from their words, code by code.

Nothing here is shared with the readers: each packing is a loop over its published formula.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from spec_workspace import awq_words


@dataclass(frozen=True)
class Codes:
    """What one linear holds, whatever its packing: weight = (codes - zeros) * scales.

    codes [K, M], zeros [G, M], scales [G, M].
    """

    codes: np.ndarray
    zeros: np.ndarray
    scales: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """[M, K] fp16, the exact product rounded once."""
        length = len(self.codes) // len(self.zeros)
        steps = self.codes.astype(np.int64) - np.repeat(self.zeros.astype(np.int64), length, 0)
        scales = self.scales.half().double().repeat_interleave(length, 0)
        return (torch.from_numpy(steps).double() * scales).half().T.contiguous()


def random_codes(
    inputs: int, outputs: int, group_size: int, *, seed: int, zeros=(1, 16), dtype=torch.float16
) -> Codes:
    """Codes over their whole range, zeros in a half-open range, scales that make small weights."""
    generator = np.random.default_rng(seed)
    groups = inputs // group_size
    scales = generator.uniform(2e-3, 1.2e-2, (groups, outputs)).astype(np.float32)
    return Codes(
        codes=generator.integers(0, 16, (inputs, outputs), np.uint8),
        zeros=generator.integers(*zeros, (groups, outputs)).astype(np.uint8),
        scales=torch.from_numpy(scales).to(dtype),
    )


def words_along(values: np.ndarray, axis: int) -> torch.Tensor:
    """Eight values after one another along an axis in one int32, the first in the lowest bits."""
    moved = np.moveaxis(values.astype(np.uint64), axis, 0)
    words = np.zeros((moved.shape[0] // 8, *moved.shape[1:]), np.uint64)
    for place in range(8):
        words |= moved[place::8] << np.uint64(4 * place)
    words = np.moveaxis(words, 0, axis).astype(np.uint32)
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))


def awq(linear: Codes) -> dict:
    return {
        "qweight": torch.from_numpy(awq_words(linear.codes)),
        "qzeros": torch.from_numpy(awq_words(linear.zeros)),
        "scales": linear.scales,
    }


def gptq(linear: Codes) -> dict:
    """AutoGPTQ's: zeros less one, and the group of each input in g_idx."""
    return gptq_v2(Codes(linear.codes, linear.zeros - 1, linear.scales))


def gptq_v2(linear: Codes) -> dict:
    length = len(linear.codes) // len(linear.zeros)
    return {
        "qweight": words_along(linear.codes, 0),
        "qzeros": words_along(linear.zeros, 1),
        "scales": linear.scales,
        "g_idx": torch.tensor([k // length for k in range(len(linear.codes))], dtype=torch.int32),
    }


def gptqmodel(linear: Codes) -> dict:
    """GPTQModel's version 1: 0x11111111 is taken from each whole word of version 2."""
    tensors = gptq_v2(linear)
    words = tensors["qzeros"].numpy().view(np.uint32) - np.uint32(0x11111111)
    return {**tensors, "qzeros": torch.from_numpy(words.view(np.int32))}


def symmetric(linear: Codes) -> dict:
    """compressed-tensors without zero points: they are 0 for values stored plus 8."""
    assert (linear.zeros == 8).all()
    outputs, inputs = linear.codes.shape[::-1]
    return {
        "weight_packed": words_along(linear.codes.T, 1),
        "weight_scale": linear.scales.T.contiguous(),
        "weight_shape": torch.tensor([outputs, inputs]),
    }


def asymmetric(linear: Codes) -> dict:
    zeros = {"weight_zero_point": words_along(linear.zeros.T, 0)}
    return {**symmetric(Codes(linear.codes, linear.zeros * 0 + 8, linear.scales)), **zeros}


def gptq_config(group_size: int, **more: object) -> dict:
    config = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False}
    return {**config, "sym": False, **more}


def compressed_config(group_size: int | None, *, is_symmetric: bool) -> dict:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": is_symmetric,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size,
        "actorder": None,
        "dynamic": False,
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }


PACKINGS = {
    "awq": (awq, lambda size: {"quant_method": "awq", "group_size": size}, (0, 16)),
    "gptq": (gptq, gptq_config, (1, 16)),
    "gptq_v2": (gptq_v2, lambda size: gptq_config(size, checkpoint_format="gptq_v2"), (0, 16)),
    "gptqmodel": (
        gptqmodel,
        lambda size: gptq_config(size, meta={"quantizer": ["gptqmodel:7.7.0"]}),
        (0, 16),
    ),
    "symmetric": (symmetric, lambda size: compressed_config(size, is_symmetric=True), (8, 9)),
    "asymmetric": (asymmetric, lambda size: compressed_config(size, is_symmetric=False), (0, 16)),
}
"""Name -> how a linear is packed, what config.json says, range of the zeros."""


def packed_tensors(
    dense: dict, packing: str, group_size: int, *, dtype=torch.float16
) -> tuple[dict, dict[str, Codes]]:
    """Replace every linear of the layers; return the tensors and what each linear holds."""
    pack, _, zeros = PACKINGS[packing]
    tensors, linears = {}, {}
    for seed, (name, value) in enumerate(dense.items()):
        if not name.endswith("_proj.weight"):
            tensors[name] = value
            continue
        module = name.removesuffix(".weight")
        outputs, inputs = value.shape
        size = group_size if group_size > 0 else inputs
        linears[module] = random_codes(inputs, outputs, size, seed=seed, zeros=zeros, dtype=dtype)
        for kind, tensor in pack(linears[module]).items():
            tensors[f"{module}.{kind}"] = tensor
    return tensors, linears

"""Runs LMDeploy's own `convert` and `kv_qparams` without a GPU; runs in LMDeploy's own environment.

Usage: peer_lmdeploy.py JOBS (JSON: a list of [`convert` or `kv_qparams`, keyword arguments]).

Of LMDeploy's C++ module these two need three packing functions alone; here they are written from
the specification's words. The compiled ones give the same bytes (DECISIONS.md).
"""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import spec_workspace as spec
import torch

RELEASE = "0.2.3"


def put(target: torch.Tensor, array: np.ndarray) -> None:
    """Write the bits of an array into a tensor of as many words."""
    words = torch.from_numpy(np.ascontiguousarray(array).view(np.int32).copy())
    target.view(torch.int32).view(-1).copy_(words.view(-1))


def codes_of(words: torch.Tensor, rows: int, outputs: int) -> np.ndarray:
    return spec.unpacked(words.view(rows, outputs // 8).numpy())


def transpose_qk_s4_k_m8(source, target, outputs, inputs, head_dim):
    codes = spec.pair_columns(codes_of(source, inputs, outputs), head_dim)
    put(target, spec.awq_words(codes))


def fuse_w1_w3_s4_k_m8(source, target, outputs, inputs):
    w1, w3 = (codes_of(half, inputs, outputs) for half in source.view(2, inputs, outputs // 8))
    put(target, spec.awq_words(spec.interleaved(w1, w3)))


def convert_s4_k_m8(words, pairs, _space, source, scales, zeros, outputs, inputs, group_size):
    codes = codes_of(source, inputs, outputs)
    put(words, np.frombuffer(spec.turbomind_words(codes), np.int32))
    groups = inputs // group_size
    zeros = codes_of(zeros, groups, outputs)
    halves = spec.scales_zeros(scales.view(groups, outputs).numpy(), zeros)
    put(pairs, np.frombuffer(halves, np.int32))


def stand_in() -> ModuleType:
    """Return what takes the place of `_turbomind`."""
    module = ModuleType("_turbomind")
    module.TensorMap = dict
    for function in (transpose_qk_s4_k_m8, fuse_w1_w3_s4_k_m8, convert_s4_k_m8):
        setattr(module, function.__name__, function)
    return module


def main() -> None:
    sys.modules["_turbomind"] = stand_in()
    torch.Tensor.cuda = lambda self, *_, **__: self.clone()
    torch.cuda.is_bf16_supported = lambda *_, **__: True

    import lmdeploy

    if lmdeploy.__version__ != RELEASE:
        sys.exit(f"this is LMDeploy {lmdeploy.__version__}, not {RELEASE}")
    from lmdeploy.lite.apis import kv_qparams
    from lmdeploy.turbomind.deploy import converter

    mains = {"convert": converter.main, "kv_qparams": kv_qparams.main}
    for name, arguments in json.loads(Path(sys.argv[1]).read_text()):
        mains[name](**arguments)


if __name__ == "__main__":
    main()

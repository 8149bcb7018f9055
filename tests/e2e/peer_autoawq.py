"""Quantizes a checkpoint with AutoAWQ on given tokens; runs in AutoAWQ's own environment.

Usage: peer_autoawq.py CHECKPOINT TOKENS OUTPUT GROUP_SIZE (TOKENS: safetensors with `token_ids`).
"""

import inspect
import sys
import textwrap
from pathlib import Path

import torch
from awq import AutoAWQForCausalLM
from awq.quantize import quantizer
from awq.quantize.quantizer import AwqQuantizer
from safetensors.torch import load_file


def clone_what_is_restored() -> None:
    """Mend AutoAWQ 0.2.9 on the CPU, where `.cpu()` keeps no copy of the weights it will change."""
    source = inspect.getsource(AwqQuantizer._compute_best_scale)
    mended = source.replace("v.cpu() for k, v", "v.detach().cpu().clone() for k, v")
    if mended == source:
        sys.exit("AutoAWQ is not the release that this script mends")
    space = {}
    exec(textwrap.dedent(mended), vars(quantizer), space)
    AwqQuantizer._compute_best_scale = space["_compute_best_scale"]


class Tokens:
    """Stands in for a tokenizer: the windows are token ids already."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.pad_token_id = 0

    def save_pretrained(self, *args: object, **kwargs: object) -> None:
        """The folder is read with the original's tokenizer."""


def main() -> None:
    checkpoint, tokens, output, group_size = sys.argv[1:]
    clone_what_is_restored()
    windows = load_file(tokens)["token_ids"].tolist()
    model = AutoAWQForCausalLM.from_pretrained(
        checkpoint, torch_dtype=torch.float32, device_map="cpu", low_cpu_mem_usage=True
    )
    config = {
        "zero_point": True,
        "q_group_size": int(group_size),
        "w_bit": 4,
        "version": "GEMM",
    }
    model.quantize(
        Tokens(),
        quant_config=config,
        calib_data=windows,
        max_calib_samples=len(windows),
        max_calib_seq_len=len(windows[0]),
    )
    Path(output).mkdir(parents=True, exist_ok=True)
    model.save_quantized(output)


if __name__ == "__main__":
    main()

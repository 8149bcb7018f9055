"""Random tiny checkpoints of every family in its published layout, and packages made of them.

    PYTHONPATH=tests python tests/families.py FOLDER

builds the packages FOLDER/NAME-fp16 and FOLDER/NAME-w4, for machines that only run them
(tests/gpu/test_families.py).
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from family_cases import CASES, HEAD_DIM, FamilyCase
from safetensors.torch import load_file, save_file

from device_runtime.package_format import int4
from device_runtime.package_format.archive_reader import extract_archive
from host_tools.build import build
from host_tools.fetch.options import FetchOptions
from host_tools.options import CalibrateOptions
from host_tools.package_options import BuildOptions
from host_tools.progress import Progress
from host_tools.proof_strings import first_strings

__all__ = ["CASES", "FamilyCase"]
NUM_PROOF_STRINGS = 200
"""That a converted tokenizer is compared on here; all 21,000 are for test_tokenizer_proof.py."""


@dataclass(frozen=True)
class Built:
    """Folders of one family's checkpoint, AWQ checkpoint and packages."""

    case: FamilyCase
    checkpoint: Path
    awq: Path
    fp16: Path
    w4: Path


def reference_model(case: FamilyCase) -> torch.nn.Module:
    """Return the model that the packages are compared with, its weights not set."""
    if case.reference is not None:
        return case.reference(case.config)
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(case.config)
    kind = config.pop("model_type")
    for key in ("architectures", "auto_map"):
        config.pop(key, None)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).float()


class Reference:
    """What a package must give: the published model with the weights of a checkpoint."""

    def __init__(self, case: FamilyCase, state: dict[str, torch.Tensor]) -> None:
        """Load the weights; every one has its place, and every place its weight."""
        self._model = reference_model(case).eval()
        self._is_plain = case.reference is not None
        missing, unexpected = self._model.load_state_dict(
            {name: value.float() for name, value in state.items()}, strict=False
        )
        assert [name for name in missing if not (case.is_tied and name == "lm_head.weight")] == []
        assert [name for name in unexpected if "inv_freq" not in name] == []
        if case.is_tied:
            self._model.tie_weights()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> np.ndarray:
        """Return ``[tokens, vocab_size]`` fp32."""
        if self._is_plain:
            return self._model(torch.tensor(ids)).numpy()
        return self._model(torch.tensor([ids]), use_cache=False).logits[0].numpy()

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Return the likeliest tokens after a prompt, one by one."""
        ids = list(prompt)
        for _ in range(num_tokens):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(prompt) :]


def random_state(case: FamilyCase, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights under the published names; queries and keys point somewhere."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    shapes = {name: value.shape for name, value in reference_model(case).state_dict().items()}
    for name, shape in shapes.items():
        if "inv_freq" in name or (case.is_tied and name == "lm_head.weight"):
            continue
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            value = noise * 0.2 + (0 if name.endswith("bias") else 1)
        elif "emb" in name or "wte" in name:
            value = noise
        else:
            value = noise * shape[1] ** -0.5
            if any(part in name for part in ("q_proj", "k_proj", "wqkv", "c_attn", "W_pack")):
                value = value * 1.5
        state[name] = value.to(case.dtype)
    if case.extra:
        for layer in range(case.config["num_hidden_layers"]):
            for name in case.extra:
                state[f"model.layers.{layer}.{name}"] = torch.ones(HEAD_DIM // 2)
    return state


def write_checkpoint(case: FamilyCase, folder: Path) -> Path:
    """Write a repository: config, shards with their index, tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(case.config, indent=2))
    write_weights(folder, random_state(case), case.shards, is_pickled=case.is_pickled)
    case.write_tokenizer(folder)
    return folder


def dequantized_state(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that the codes of an AWQ folder mean, under the checkpoint's names."""
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    state = {name: value for name, value in stored.items() if value.is_floating_point()}
    for name in [name for name in stored if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        codes, zeros = (
            int4.unpack_awq(stored[f"{module}.{part}"].numpy()) for part in ("qweight", "qzeros")
        )
        scales = state.pop(f"{module}.scales").numpy()
        weight = int4.dequantize(codes, zeros, scales, len(codes) // len(scales))
        state[f"{module}.weight"] = torch.from_numpy(weight.T.copy())
    return state


def write_weights(folder: Path, state: dict, shards: int, *, is_pickled: bool) -> None:
    """Write weights under the names that transformers gives shards."""
    stem, suffix = ("pytorch_model", "bin") if is_pickled else ("model", "safetensors")
    if shards == 1:
        files = {f"{stem}.{suffix}": list(state)}
    else:
        names = list(state)
        step = -(-len(names) // shards)
        files = {
            f"{stem}-{index + 1:05d}-of-{shards:05d}.{suffix}": names[index * step :][:step]
            for index in range(shards)
        }
        total = sum(value.nbytes for value in state.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2))
    for file, names in files.items():
        part = {name: state[name].contiguous() for name in names}
        if is_pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})


def build_packages(
    name: str,
    folder: Path,
    case: FamilyCase | None = None,
    fetch: FetchOptions = FetchOptions(),  # noqa: B008 - frozen
) -> Built:
    """Take one family through the whole pipeline, in fp16 and in 4 bits.

    Args:
        name: of the case; also the package's.
        folder: gets everything.
        case: another than `CASES` has.
        fetch: an adapter to go over it.
    """
    case = case or CASES[name]
    checkpoint = write_checkpoint(case, folder / name)
    text = folder / "text.txt"
    text.write_text("".join(random.Random(0).choices("helowrd \n,.", k=6000)))
    calibration = CalibrateOptions(str(text), num_samples=8, seqlen=32, device="cpu")
    roots = {}
    proof = partial(first_strings, count=NUM_PROOF_STRINGS)
    for kind, method in (("fp16", "none"), ("w4", "awq")):
        options = BuildOptions(
            fetch=fetch,
            calibrate=calibration,
            method=method,
            target="orin-nano-8gb",
            kernels="none",
        )
        archive = folder / f"{name}-{kind}.tgz"
        work = folder / f"{name}-{kind}.work"
        with patch("host_tools.tokenizer_proof.first_strings", proof):
            build(str(checkpoint), archive, work, options, Progress())
        roots[kind] = extract_archive(archive, folder / f"{name}-{kind}").root
    awq = folder / f"{name}-w4.work" / "awq"
    return Built(case, checkpoint, awq, roots["fp16"], roots["w4"])


def main(folder: Path) -> None:
    """Build every package into a folder, and keep nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name in CASES:
            built = build_packages(name, Path(scratch))
            for root in (built.fp16, built.w4):
                root.replace(folder / root.name)
            print(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

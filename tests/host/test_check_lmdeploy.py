"""LMDeploy 0.2.3's own converter writes what ours writes, byte for byte (scripts/check).

``TURBOJET_LMDEPLOY`` names the Python of an environment that has LMDeploy's Python half.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import families
import numpy as np
import pytest
import torch
from family_cases import CASES
from spec_workspace import awq_words
from test_kv_qparams import write_stats

from host_tools.convert import convert
from host_tools.kv_qparams import kv_qparams
from host_tools.package_options import LMDEPLOY, ConvertOptions, KvQparamsOptions
from host_tools.progress import Progress
from host_tools.proof_strings import first_strings

pytestmark = pytest.mark.slow

GROUP_SIZE = 128
RANKS = (1, 2, 4)
TREE_RANKS = 2
"""Of these one is written with ``--for lmdeploy``."""
HERE = Path(__file__).resolve().parent
SQUARE = {"hidden_size": 512, "num_attention_heads": 4, "intermediate_size": 512}
GROUPED = {"hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 512}
ODD_VOCAB = {"vocab_size": 321}
"""Ranks then need rows of padding."""


@dataclass(frozen=True)
class Peer:
    """A family that LMDeploy 0.2.3 knows, at sizes that its 4-bit kernels take."""

    family: str
    model_name: str
    changes: dict[str, Any]
    num_kv_heads: int = 4
    has_wide_scales: bool = False
    """Whether its 4-bit checkpoint is also tried with fp32 scales, as LMDeploy wrote them."""
    own_end_id: bool = False
    """Whether LMDeploy writes a constant of its own as config.ini's ``end_id``."""


PEERS = (
    Peer(
        "llama-2-7b-chat", "llama2", {**GROUPED, **ODD_VOCAB, "num_key_value_heads": 4},
        has_wide_scales=True,
    ),
    Peer("internlm-chat-7b", "internlm-chat-7b", {**SQUARE, **ODD_VOCAB}),
    Peer(
        "internlm2-chat-7b", "internlm2-chat-7b", {**GROUPED, "num_key_value_heads": 4},
        has_wide_scales=True,
    ),
    Peer("internlm2_5-7b-chat", "internlm2-chat-7b", {**GROUPED, "num_key_value_heads": 4}),
    Peer("baichuan2-7b-chat", "baichuan2-7b", {**SQUARE, **ODD_VOCAB}),
    Peer(
        "qwen-7b-chat", "qwen-7b", {**SQUARE, "intermediate_size": 1024, "kv_channels": 128},
        own_end_id=True,
    ),
)  # fmt: skip


@pytest.fixture(scope="session")
def lmdeploy() -> Callable[[list[Any], Path], None]:
    """Run LMDeploy's functions, one job after another."""
    python = os.environ.get("TURBOJET_LMDEPLOY")
    if not python:
        pytest.skip(
            "TURBOJET_LMDEPLOY names no Python with LMDeploy 0.2.3; scripts/check makes one"
        )

    def run(jobs: list[Any], scratch: Path) -> None:
        path = scratch / "jobs.json"
        path.write_text(json.dumps(jobs))
        command = [python, str(HERE / "peer_lmdeploy.py"), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=scratch)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def int4_state(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return random codes, zeros and scales in place of layers' matrices, the rest in fp16."""
    generator = np.random.default_rng(3)
    new = {}
    for name, value in state.items():
        if value.ndim < 2 or ("layers." not in name and ".h." not in name):
            new[name] = value.half()
            continue
        outputs, inputs = value.shape
        module, groups = name.removesuffix(".weight"), inputs // GROUP_SIZE
        codes = generator.integers(0, 16, (inputs, outputs), np.uint8)
        zeros = generator.integers(0, 16, (groups, outputs), np.uint8)
        scales = generator.uniform(1e-3, 0.1, (groups, outputs)).astype(np.float32)
        new[f"{module}.qweight"] = torch.from_numpy(awq_words(codes))
        new[f"{module}.qzeros"] = torch.from_numpy(awq_words(zeros))
        new[f"{module}.scales"] = torch.from_numpy(scales).to(dtype)
    return new


def write_source(peer: Peer, kind: str, folder: Path) -> Path:
    """Write the family's checkpoint, and a class for its config, which LMDeploy executes."""
    case = CASES[peer.family]
    case = replace(case, config={**case.config, **peer.changes})
    config, state = dict(case.config), families.random_state(case)
    is_pickled = case.is_pickled
    if kind != "float":
        state = int4_state(state, torch.float32 if kind == "int4, fp32 scales" else torch.float16)
        section = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE}
        section |= {"version": "gemm", "zero_point": True}
        config |= {"quantization_config": section, "torch_dtype": "float16"}
        is_pickled = False
    folder.mkdir()
    if config["model_type"] != "llama":
        config["auto_map"] = {"AutoConfig": "configuration_tiny.TinyConfig"}
        (folder / "configuration_tiny.py").write_text(
            "from transformers import PretrainedConfig\n\n\nclass TinyConfig(PretrainedConfig):\n"
            f"    model_type = {config['model_type']!r}\n"
        )
    (folder / "config.json").write_text(json.dumps(config))
    families.write_weights(folder, state, 2, is_pickled=is_pickled)
    case.write_tokenizer(folder)
    return folder


def without_tokenizer_code(source: Path, folder: Path) -> Path:
    """Return the same checkpoint for LMDeploy, which then reads tokenizer.model by itself."""
    settings = json.loads((source / "tokenizer_config.json").read_text())
    if settings.get("tokenizer_class") in ("LlamaTokenizer", "QWenTokenizer"):
        return source
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "tokenizer_config.json":
            (folder / path.name).symlink_to(path)
    return folder


def weight_files(workspace: Path) -> dict[str, bytes]:
    """Return the files of a workspace's weights but config.ini, name -> bytes."""
    found = (workspace / "triton_models" / "weights").iterdir()
    return {p.name: p.read_bytes() for p in found if p.name not in ("config.ini", "placeholder")}


def config_lines(workspace: Path, peer: Peer) -> list[str]:
    lines = (workspace / "triton_models" / "weights" / "config.ini").read_text().splitlines()
    return [line for line in lines if not (peer.own_end_id and line.startswith("end_id"))]


def entries(workspace: Path) -> set[str]:
    """Return what a tree holds beside the tokenizer's files: paths, and where links lead."""
    found = set()
    for path in workspace.rglob("*"):
        name = path.relative_to(workspace).as_posix()
        ours = name.startswith(".turbojet") or name == "manifest.json" or "__pycache__" in name
        if not ours and not name.startswith("triton_models/tokenizer/"):
            found.add(f"{name} -> {os.readlink(path)}" if path.is_symlink() else name)
    return found


@pytest.mark.parametrize(
    ("peer", "kind"),
    [(peer, kind) for peer in PEERS for kind in ("float", "int4")]
    + [(peer, "int4, fp32 scales") for peer in PEERS if peer.has_wide_scales],
    ids=lambda value: value.family if isinstance(value, Peer) else value,
)
def test_lmdeploys_converter_writes_the_same_bytes(peer, kind, lmdeploy, tmp_path):
    source = write_source(peer, kind, tmp_path / "source")
    # LMDeploy takes layers in the file's order.
    stats = write_stats(tmp_path / "stats", heads=peer.num_kv_heads, head_dim=128, order=iter)
    plain = without_tokenizer_code(source, tmp_path / "plain")
    quantized = {} if kind == "float" else {"model_format": "awq", "group_size": GROUP_SIZE}
    jobs = []
    for tp in RANKS:
        theirs, sym = str(tmp_path / f"theirs-{tp}"), tmp_path / f"sym-{tp}"
        sym.mkdir()
        names = {"model_name": peer.model_name, "model_path": str(plain), "dst_path": theirs}
        jobs.append(["convert", {**names, "tp": tp, **quantized}])
        weights = f"{theirs}/triton_models/weights"
        kv = {"work_dir": str(stats), "num_tp": tp}
        jobs.append(["kv_qparams", {**kv, "turbomind_dir": weights}])
        jobs.append(["kv_qparams", {**kv, "turbomind_dir": str(sym), "kv_sym": True}])
    lmdeploy(jobs, tmp_path)
    proof = partial(first_strings, count=families.NUM_PROOF_STRINGS)
    for tp in RANKS:
        theirs, ours = tmp_path / f"theirs-{tp}", tmp_path / f"ours-{tp}"
        engine = LMDEPLOY if tp == TREE_RANKS else "turbojet"
        options = ConvertOptions(peer.model_name, tp=tp, engine=engine)
        with patch("host_tools.tokenizer_proof.first_strings", proof):
            convert(source, ours, options, Progress())
        kv_qparams(stats, ours, KvQparamsOptions(tp=tp), Progress())
        ours_files, their_files = weight_files(ours), weight_files(theirs)
        assert ours_files.keys() == their_files.keys()
        assert [name for name, data in ours_files.items() if data != their_files[name]] == []
        lines = config_lines(ours, peer)
        if tp == TREE_RANKS:
            assert entries(ours) == entries(theirs)
            # The one line more is for 0.5.0 to 0.5.3; an empty one ends the file.
            assert lines.pop(-2).startswith("model_arch = ")
        assert lines == config_lines(theirs, peer)

        # LMDeploy writes the two scales alone, its engine wants zero points between them.
        kv_qparams(stats, ours, KvQparamsOptions(tp=tp, is_symmetric=True), Progress())
        ours_files = weight_files(ours)
        for path in (tmp_path / f"sym-{tp}").iterdir():
            found = np.frombuffer(ours_files[path.name], "<f4")
            np.testing.assert_array_equal(found[[0, 2]], np.fromfile(path, "<f4"))
            np.testing.assert_array_equal(found[[1, 3]], [0, 0])

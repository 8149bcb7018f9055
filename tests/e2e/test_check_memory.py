"""A checkpoint of InternLM2-1.8B's shapes goes through in little memory (scripts/check)."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import pytest
from conftest import BIN, Run

pytestmark = pytest.mark.slow

GIB = 1 << 30
# InternLM2-chat-1.8B's config.json, under Llama's tensor names.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 92544,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
}


def write_checkpoint(folder: Path, tokenizer_source: Path) -> None:
    """Random fp16 weights, one shard a layer, as a Hugging Face folder."""
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_source / name, folder / name)
    rng = np.random.default_rng(0)
    hidden, inner, vocab = 2048, 8192, 92544

    def random(*shape: int) -> np.ndarray:
        out = np.empty(shape, np.float16)
        for start in range(0, shape[0], 4096):
            part = out[start : start + 4096]
            part[...] = rng.standard_normal(part.shape, np.float32) * 0.02
        return out

    weight_map: dict[str, str] = {}

    def save(shard: str, tensors: dict[str, np.ndarray]) -> None:
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))

    save("embedding.safetensors", {"model.embed_tokens.weight": random(vocab, hidden)})
    save(
        "head.safetensors",
        {"lm_head.weight": random(vocab, hidden), "model.norm.weight": np.ones(hidden, np.float16)},
    )
    for layer in range(24):
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (1024, hidden),
            "self_attn.v_proj": (1024, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        tensors = {f"model.layers.{layer}.{k}.weight": random(*s) for k, s in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(hidden, np.float16)
        save(f"layer-{layer:02d}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")
    )


def peak_of(*command: str | Path) -> int:
    """Run one of our commands and return the peak of RssAnon, sampled every 20 ms."""
    with Popen([str(BIN / command[0]), *map(str, command[1:])], stderr=PIPE, stdout=PIPE) as child:
        peak = 0
        messages: list[bytes] = []
        assert child.stderr is not None
        drain = threading.Thread(target=lambda: messages.append(child.stderr.read()))  # type: ignore[union-attr]
        drain.start()
        while child.poll() is None:
            peak = max(peak, anonymous_bytes(child.pid))
            time.sleep(0.02)
        drain.join()
    assert child.returncode == 0, messages[-1][-2000:].decode()
    assert peak > 0
    return peak


def test_a_1_8b_model_is_packaged_in_under_3_gb(
    run: Run, demo_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tmp_path / "smollm2"
    run("turbojet-host", "fetch", demo_gguf, "--output", tokenizer)
    checkpoint, work = tmp_path / "checkpoint", tmp_path / "work"
    awq, workspace = tmp_path / "awq", tmp_path / "turbomind"
    write_checkpoint(checkpoint, tokenizer)
    text = Path(__file__).parents[1] / "data" / "evaluation.txt"
    stages: dict[str, tuple[str | Path, ...]] = {
        "calibrate": (
            "calibrate", checkpoint, "--work-dir", work, "--calib-dataset", text,
            "--calib-samples", "1", "--calib-seqlen", "64", "--device", "cpu",
        ),
        "quantize": ("quantize", checkpoint, "--work-dir", work, "--output", awq),
        "convert": ("convert", awq, "--model-name", "internlm2-1_8b", "--output", workspace),
        "kv-qparams": ("kv-qparams", work, workspace),
        "pack": ("pack", workspace, "--output", tmp_path / "x.tgz", "--kernels", "none"),
    }  # fmt: skip
    for name, arguments in stages.items():
        start = time.monotonic()
        peak = peak_of("turbojet-host", *arguments)
        with capsys.disabled():
            print(f"  {name}: peak RssAnon {peak / 1e9:.2f} GB, {time.monotonic() - start:.0f} s")
        assert peak < 3_000_000_000, f"{name}: {peak / 1e9:.2f} GB"
    env = {**os.environ, "TURBOJET_DATA_DIR": str(tmp_path / "data")}
    run("turbojet", "install", tmp_path / "x.tgz", env=env)
    assert (tmp_path / "x.tgz").stat().st_size < 2 * GIB

"""What quantization and int8 KV cost, and agreement with transformers (scripts/check)."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import NAME, Run
from numpy.typing import NDArray

pytestmark = pytest.mark.slow

GROUP_SIZE = 64
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain how a bicycle stays upright.",
    "List three uses of copper.",
    "Translate to French: good morning, my friend.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What is 12 times 7?",
)


def corpus(name: str, hub_name: str) -> str:
    """A corpus file of TURBOJET_CORPORA, else the name under which ModelScope has it."""
    folder = os.environ.get("TURBOJET_CORPORA")
    return str(Path(folder) / name) if folder else hub_name


@pytest.fixture(scope="module")
def folders(run: Run, demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint, plain rounding, ours, and our package, on 8 x 512 tokens of C4."""
    root = tmp_path_factory.mktemp("quality")
    paths = {name: root / name for name in ("checkpoint", "work", "rtn", "awq", "turbomind")}
    run("turbojet-host", "fetch", demo_gguf, "--output", paths["checkpoint"])
    run(
        "turbojet-host", "calibrate", paths["checkpoint"], "--work-dir", paths["work"],
        "--calib-dataset", corpus("c4.utf8", "c4"), "--calib-samples", "8", "--calib-seqlen",
        "512", "--device", "cpu",
    )  # fmt: skip
    for method in ("rtn", "awq"):
        run(
            "turbojet-host", "quantize", paths["checkpoint"], "--work-dir", paths["work"],
            "--output", paths[method], "--w-group-size", str(GROUP_SIZE), "--method", method,
            timeout=1800,
        )  # fmt: skip
    run(
        "turbojet-host", "convert", paths["awq"], "--model-name", NAME, "--output",
        paths["turbomind"],
    )  # fmt: skip
    run("turbojet-host", "kv-qparams", paths["work"], paths["turbomind"])
    return paths


def evaluated(
    run: Run,
    *targets: str | Path,
    dataset: str,
    samples: int,
    seqlen: int,
    quant_policy: int | None = None,
) -> dict[str, Any]:
    policy = () if quant_policy is None else ("--quant-policy", str(quant_policy))
    done = run(
        "turbojet-host", "evaluate", *targets, "--dataset", dataset, "--samples", str(samples),
        "--seqlen", str(seqlen), "--json", *policy, timeout=3000,
    )  # fmt: skip
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def perplexities(
    run: Run, *targets: str | Path, quant_policy: int | None = None
) -> dict[str, float]:
    report = evaluated(
        run, *targets, dataset=corpus("wiki.test.raw", "wikitext2"), samples=16, seqlen=1024,
        quant_policy=quant_policy,
    )  # fmt: skip
    return {row["target"]: float(row["perplexity"]) for row in report["results"]}


def test_quantization_and_int8_kv_cost_what_we_promise(
    run: Run, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = perplexities(run, folders["checkpoint"], folders["rtn"], folders["awq"])
    fp16, rtn, awq = rows.values()
    kv = {
        policy: next(iter(perplexities(run, folders["turbomind"], quant_policy=policy).values()))
        for policy in (0, 4, 8)
    }
    with capsys.disabled():
        print(f"\n  wikitext-2, 16 x 1024: fp16 {fp16:.3f}, rounded {rtn:.3f}, ours {awq:.3f}")
        print(f"  package: fp16 KV {kv[0]:.3f}, static int8 {kv[4]:.3f}, online int8 {kv[8]:.3f}")
    # 22.55 and 30.07: transformers, fp32, on the same tokens; AutoAWQ 0.2.9 likewise: 26.60.
    # Ours: 24.72; the rest is for machines whose sums differ in the last bits.
    assert fp16 == pytest.approx(22.55, rel=1e-3)
    assert rtn == pytest.approx(30.07, rel=1e-2)
    assert awq <= 25.0
    assert kv[0] == pytest.approx(awq, rel=2e-3)
    assert kv[8] / kv[0] < 1.005
    assert kv[4] / kv[0] < 1.01


# KL divergence to the original that our weights may have. Measured on the same windows: 0.124,
# 0.083, 0.094 and 0.078; AutoAWQ 0.2.9 (scripts/compare-quantizers): 0.170, 0.136, 0.155, 0.105.
OTHER_TEXTS = {"code": 0.145, "multilingual": 0.1, "wiki": 0.11, "tiny": 0.09}


def test_the_gain_holds_on_text_unlike_the_calibration_text(
    run: Run, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import argparse
    import heapq
    import textwrap

    code = tmp_path / "code.txt"
    modules = (argparse, subprocess, heapq, textwrap)
    code.write_text("".join(Path(module.__file__).read_text("utf-8") for module in modules))
    for name, limit in OTHER_TEXTS.items():
        text = code if name == "code" else Path(corpus(f"{name}.utf8", ""))
        if not text.is_file():
            continue  # other texts than code come with TURBOJET_CORPORA alone
        targets = (folders["checkpoint"], folders["rtn"], folders["awq"])
        report = evaluated(run, *targets, dataset=str(text), samples=8, seqlen=512)
        fp16, rtn, awq = (row["perplexity"] for row in report["results"])
        rounded, ours = report["comparisons"]
        with capsys.disabled():
            print(f"\n  {name}: fp16 {fp16:.3f}, rounded {rtn:.3f}, ours {awq:.3f}", end="; ")
            for title, row in (("rounded", rounded), ("ours", ours)):
                kl, agreed = row["kl_divergence"], row["top1_agreement"]
                print(f"{title} KL {kl:.4f}, top-1 {agreed:.1%}", end=" ")
        assert ours["kl_divergence"] < limit
        assert ours["kl_divergence"] < 0.55 * rounded["kl_divergence"]
        assert ours["top1_agreement"] > rounded["top1_agreement"]


def dequantized(folder: Path, target: Path) -> Path:
    """Write what the AWQ folder's codes mean as an fp16 checkpoint, without our own reader."""
    from safetensors.numpy import load_file, save_file

    target.mkdir()
    tensors: dict[str, NDArray[Any]] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # nibble that holds column c of a word

    def unpack(words: NDArray[np.int32]) -> NDArray[np.int64]:
        columns = (words.astype(np.int64)[..., None] >> (4 * order)) & 15
        return columns.reshape(words.shape[0], -1)

    out: dict[str, NDArray[np.float16]] = {}
    for name, value in tensors.items():
        if name.endswith(".qweight"):
            base = name.removesuffix(".qweight")
            zeros = unpack(tensors[f"{base}.qzeros"]).repeat(GROUP_SIZE, 0)
            scales = tensors[f"{base}.scales"].astype(np.float32).repeat(GROUP_SIZE, 0)
            weight = ((unpack(value) - zeros) * scales).astype(np.float16)
            out[f"{base}.weight"] = np.ascontiguousarray(weight.T)
        elif not name.endswith((".qzeros", ".scales")):
            out[name] = value.astype(np.float16)
    save_file(out, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target


def package_logits(folder: Path, ids: list[int]) -> NDArray[np.float32]:
    from device_runtime.engine.engine import Engine
    from device_runtime.engine.options import EngineOptions

    with Engine.open(folder, EngineOptions(backend="reference", quant_policy=0)) as engine:
        return engine.logits(ids)


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    x, y = a.astype(np.float64), b.astype(np.float64)
    return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))


def test_the_reference_engine_agrees_with_transformers(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer

    from device_runtime.backends.sampling_params import SamplingParams
    from device_runtime.engine.engine import Engine
    from device_runtime.engine.generation import GenerationParams
    from device_runtime.engine.options import EngineOptions

    model = transformers.AutoModelForCausalLM.from_pretrained(
        dequantized(folders["awq"], tmp_path / "fp16"), dtype=torch.float32
    )
    tokenizer = Tokenizer.from_file(str(folders["checkpoint"] / "tokenizer.json"))
    text = (Path(__file__).parents[1] / "data" / "evaluation.txt").read_text("utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:256]
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    similar = cosines(package_logits(folders["turbomind"], ids), theirs)
    with capsys.disabled():
        print(f"\n  logits at 256 positions: lowest cosine {similar.min():.7f}")
    assert similar.min() > 0.9999

    greedy = GenerationParams(
        max_tokens=64, sampling=SamplingParams(temperature=0), ignore_eos=True
    )
    num_equal = 0
    with Engine.open(
        folders["turbomind"], EngineOptions(backend="reference", quant_policy=0)
    ) as engine:
        for prompt in PROMPTS:
            chat = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
            prompt_ids = tokenizer.encode(chat).ids
            ours = [t for out in engine.generate(prompt_ids, greedy) for t in out.token_ids]
            with torch.no_grad():
                all_ids = model.generate(
                    torch.tensor([prompt_ids]), max_new_tokens=64, min_new_tokens=64,
                    do_sample=False, repetition_penalty=1.0, eos_token_id=None,
                )  # fmt: skip
                logits = model(all_ids).logits[0]
            expected = all_ids[0, len(prompt_ids) :].tolist()
            if ours == expected:
                num_equal += 1
                continue
            first = next(
                i for i, pair in enumerate(zip(ours, expected, strict=True)) if len({*pair}) > 1
            )
            row = logits[len(prompt_ids) + first - 1]
            gap = float(row[expected[first]] - row[ours[first]])
            with capsys.disabled():
                print(f"  {prompt!r}: token {first} differs, logits {gap:.5f} apart")
            assert 0 <= gap < 0.01, "not a near tie"
    with capsys.disabled():
        print(f"  64 greedy tokens equal on {num_equal} of {len(PROMPTS)} prompts")


def test_transformers_loads_the_awq_folder(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs in the environment of scripts/check that has gptqmodel."""
    peers = os.environ.get("TURBOJET_PEERS")
    if not peers:
        pytest.skip("needs gptqmodel in an environment of its own: run scripts/check")
    plain = dequantized(folders["awq"], tmp_path / "fp16")
    script = (
        "import sys, torch, transformers\n"
        "ids = torch.arange(1000, 1128)[None]\n"
        "rows = []\n"
        "for path in sys.argv[1:]:\n"
        "    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)\n"
        "    with torch.no_grad(): rows.append(model(ids).logits[0].double())\n"
        "a, b = rows\n"
        "print(float(torch.nn.functional.cosine_similarity(a, b, dim=1).min()))\n"
        "print(float((a - b).abs().max() / b.abs().max()))\n"
    )
    done = subprocess.run(
        [peers, "-c", script, str(folders["awq"]), str(plain)],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    cosine, error = map(float, done.stdout.split()[-2:])
    with capsys.disabled():
        print(f"\n  AWQ folder in transformers: cosine {cosine:.8f}, largest error {error:.2e}")
    assert cosine > 0.99999
    assert error < 1e-2


def test_speed_of_the_reference_engine(
    run: Run, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from device_runtime.backends.sampling_params import SamplingParams
    from device_runtime.engine.engine import Engine
    from device_runtime.engine.generation import GenerationParams
    from device_runtime.engine.options import EngineOptions

    greedy = GenerationParams(
        max_tokens=128, sampling=SamplingParams(temperature=0), ignore_eos=True
    )
    rng = np.random.default_rng(0)
    prefill, decode = [], []
    with Engine.open(folders["turbomind"], EngineOptions(backend="reference")) as engine:
        for _ in range(5):
            ids = rng.integers(1000, 40000, 1024).tolist()
            start = time.perf_counter()
            marks = [time.perf_counter() for out in engine.generate(ids, greedy) if out.token_ids]
            prefill.append(len(ids) / (marks[0] - start))
            decode.append((len(marks) - 1) / (marks[-1] - marks[0]))
    with capsys.disabled():
        print(f"\n  prefill {np.median(prefill):.0f} tok/s, decode {np.median(decode):.1f} tok/s")
    assert np.median(prefill) >= 250
    assert np.median(decode) >= 20


def test_quantize_takes_under_two_minutes(
    run: Run, demo_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("turbojet-host", "fetch", demo_gguf, "--output", tmp_path / "checkpoint")
    run(
        "turbojet-host", "calibrate", tmp_path / "checkpoint", "--work-dir", tmp_path / "work",
        "--calib-dataset", "builtin", "--calib-samples", "16", "--calib-seqlen", "512",
    )  # fmt: skip
    start = time.monotonic()
    run(
        "turbojet-host", "quantize", tmp_path / "checkpoint", "--work-dir", tmp_path / "work",
        "--output", tmp_path / "awq", "--w-group-size", str(GROUP_SIZE),
    )  # fmt: skip
    seconds = time.monotonic() - start
    with capsys.disabled():
        print(f"\n  quantize, 16 x 512 tokens: {seconds:.0f} s")
    assert seconds < 120

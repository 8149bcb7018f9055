"""Measures calibrate and quantize on published shapes with random weights: time by phase, memory.

Run by ``scripts/measure-quantize``; each model has a process of its own, so peaks are its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from device_runtime.package_format.names import TOKENIZER_JSON
from host_tools.calibrate import calibrate
from host_tools.checkpoint.synthetic import write_synthetic
from host_tools.meter import Meter
from host_tools.options import CalibrateOptions, QuantizeOptions, parse_devices
from host_tools.phase_times import Shares
from host_tools.progress import make_progress
from host_tools.quantize import quantize
from host_tools.stage import RECORD_DIR


def _config(architecture: str, sizes: Sequence[int], **facts: object) -> dict[str, object]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    return {
        "architectures": [architecture],
        **dict(zip(names, sizes, strict=True)),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "bias": False,
        **facts,
    }


PUBLISHED = {
    "internlm2-1.8b": _config(
        "InternLM2ForCausalLM", (2048, 8192, 24, 16, 8, 92544, 32768), rope_theta=1e6
    ),
    "llama-2-7b": _config("LlamaForCausalLM", (4096, 11008, 32, 32, 32, 32000, 4096)),
    "internlm2-20b": _config(
        "InternLM2ForCausalLM", (6144, 16384, 48, 48, 8, 92544, 32768), rope_theta=1e6
    ),
}
"""What the models' config.json files say, as far as it costs time."""

GOALS_S = {"internlm2-1.8b": 45, "llama-2-7b": 150, "internlm2-20b": 360}
"""What calibrate and quantize together may take on one H200."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each model that was asked for and print one line and one JSON object for each."""
    args = build_parser().parse_args(arguments)
    if args.here:
        print(json.dumps(measure(args.model[0], args)))
        return 0
    for name in args.model:
        command = [sys.executable, "-m", "host_tools.measure_quantize", *_own_arguments(args, name)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            place = args.output / f"{name}-{args.device}{args.devices.replace(',', '-')}.json"
            place.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(_line(found), flush=True)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="scripts/measure-quantize", description=__doc__)
    parser.add_argument("--model", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--layers", type=int, default=0, help="of the model; 0: all of them")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--group-size", type=int, default=128, help="inputs that share a scale")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--devices", default="", help="GPUs side by side, such as 0,1")
    parser.add_argument("--scratch", type=Path, help="folder for what the stages write")
    parser.add_argument("--output", type=Path, help="folder for the figures as JSON")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Calibrate and quantize one model and return what it took.

    Args:
        name: of :data:`PUBLISHED`.
        args: of :func:`build_parser`.
    """
    config = PUBLISHED[name] | ({"num_hidden_layers": args.layers} if args.layers else {})
    devices = parse_devices(args.devices)
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="measure-") as scratch:
        folder = Path(scratch)
        checkpoint = write_synthetic(folder / name, config)
        vocab_size = int(str(config["vocab_size"]))
        text = write_words(checkpoint, vocab_size, 2 * args.samples * args.seqlen)
        work, awq = folder / "work", folder / "awq"
        calibration = CalibrateOptions(
            str(text), args.samples, args.seqlen, args.device, devices=devices
        )
        options = QuantizeOptions(group_size=args.group_size, device=args.device, devices=devices)
        progress = make_progress()
        with Meter() as first:
            calibrate(checkpoint, work, calibration, progress)
        with Meter() as second:
            quantize(checkpoint, work, awq, options, progress)
        record = _record(awq, "quantize")
        return {
            "model": name,
            "num_layers": config["num_hidden_layers"],
            "tokens": [args.samples, args.seqlen],
            "device": _device_names(args.device, devices),
            "torch": torch.__version__,
            "calibrate_s": round(first.seconds_s, 2),
            "quantize_s": round(second.seconds_s, 2),
            "calibrate_times": _record(work, "calibrate")["times"],
            "quantize_times": record["times"],
            "peak_anon_bytes": max(first.peak_anon_bytes, second.peak_anon_bytes),
            "peak_gpu_bytes": _peak_gpu_bytes(),
            "outputs": record["outputs"],
        }


def _own_arguments(args: argparse.Namespace, name: str) -> list[str]:
    values = ["--here", "--model", name]
    for flag in ("layers", "samples", "seqlen", "group_size", "device", "devices", "scratch"):
        value = getattr(args, flag)
        if value not in ("", None):
            values += [f"--{flag.replace('_', '-')}", str(value)]
    return values


def write_words(checkpoint: Path, vocab_size: int, num_words: int) -> Path:
    """Give a checkpoint a tokenizer of words w0, w1, ... and return a text of random ones."""
    vocabulary = {f"w{token_id}": token_id for token_id in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(checkpoint / TOKENIZER_JSON))
    words = np.random.default_rng(0).integers(0, vocab_size, num_words)
    path = checkpoint.with_name("words.txt")
    path.write_text(" ".join(f"w{word}" for word in words), encoding="ascii")
    return path


def _record(folder: Path, stage: str) -> Mapping[str, object]:
    text = (folder / RECORD_DIR / f"{stage}.json").read_text(encoding="utf-8")
    record: Mapping[str, object] = json.loads(text)
    return record


def _device_names(device: str, devices: tuple[str, ...]) -> str:
    if device == "cpu" or "cpu" in devices or not torch.cuda.is_available():
        return "cpu"
    numbers = [int(number) for number in devices] or [0]
    return " + ".join(torch.cuda.get_device_name(number) for number in numbers)


def _peak_gpu_bytes() -> list[int]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())]


def _line(found: Mapping[str, object]) -> str:
    """Return one line: seconds of both stages, their shares, peaks."""
    name = str(found["model"])
    total = float(str(found["calibrate_s"])) + float(str(found["quantize_s"]))
    gpu = [f"{int(peak) / 1e9:.2f}" for peak in found["peak_gpu_bytes"]]  # type: ignore[attr-defined]
    return (
        f"{name}, {found['num_layers']} layers on {found['device']}: {total:.1f} s (goal for the "
        f"whole model on an H200: {GOALS_S[name]} s)\n"
        f"  calibrate {found['calibrate_s']} s: {_listed(found['calibrate_times'])}\n"
        f"  quantize {found['quantize_s']} s: {_listed(found['quantize_times'])}\n"
        f"  peak GPU {'+'.join(gpu) or '-'} GB, "
        f"peak RssAnon {int(str(found['peak_anon_bytes'])) / 1e9:.2f} GB"
    )


def _listed(times: object) -> str:
    shares: Shares = times  # type: ignore[assignment]
    own = ", ".join(f"{name} {value:.1f}" for name, value in shares["seconds"].items())
    beside = ", ".join(f"{name} {value:.1f}" for name, value in shares["seconds_beside"].items())
    return f"{own}; beside {beside}" if beside else own


if __name__ == "__main__":
    raise SystemExit(main())

"""The arguments of every verb of `turbojet-host`; their defaults are those of the options."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from host_tools.fetch.options import FetchOptions
from host_tools.options import DEVICES, METHODS, CalibrateOptions, EvaluateOptions, QuantizeOptions
from host_tools.package_options import BUILD_METHODS, ENGINES, HEADS, KvQparamsOptions, PackOptions

ENVIRONMENT_PREFIX = "TURBOJET_"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default in ("", []):
            return action.help
        return super()._get_help_string(action)


def fetch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fetch``."""
    _source(parser)
    parser.add_argument("--output", type=_path, required=True, help="folder for the checkpoint")
    _fetch_options(parser)


def calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``calibrate``."""
    parser.add_argument("checkpoint", type=_path, metavar="CKPT", help="folder of a checkpoint")
    parser.add_argument("--work-dir", type=_path, required=True, help="folder for the statistics")
    _calibrate_options(parser)


def quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``quantize``."""
    defaults = QuantizeOptions()
    parser.add_argument("checkpoint", type=_path, metavar="CKPT", help="folder of a checkpoint")
    parser.add_argument("--work-dir", type=_path, required=True, help="folder of the statistics")
    parser.add_argument("--output", type=_path, required=True, help="folder for the AWQ checkpoint")
    _quantize_options(parser, METHODS, defaults.group_size, "inputs that share a scale")
    _device(parser, defaults.device)
    _devices(parser)


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``convert``."""
    parser.add_argument(
        "checkpoint",
        type=_path,
        metavar="AWQ_OR_FP16_DIR",
        help="folder of a checkpoint, 4-bit or floating-point",
    )
    parser.add_argument("--model-name", required=True, help="name of the package")
    parser.add_argument("--output", type=_path, required=True, help="folder for the workspace")
    _option(
        parser, "--group-size", int, 0, "what a 4-bit checkpoint must have; 0 takes what it has"
    )
    parser.add_argument(
        "--for",
        dest="engine",
        choices=ENGINES,
        default=os.environ.get(f"{ENVIRONMENT_PREFIX}FOR", ENGINES[0]),
        help="lmdeploy adds what LMDeploy 0.1 to 0.5.3 want beside the weights",
    )
    _workspace_options(parser, "v0.2.3's value")


def kv_qparams_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``kv-qparams``."""
    parser.add_argument("work_dir", type=_path, metavar="W", help="folder of the statistics")
    parser.add_argument("workspace", type=_path, metavar="TM_DIR", help="what convert wrote")
    _kv_options(parser)
    _option(parser, "--tp", int, KvQparamsOptions().tp, "ranks; 0 takes what config.ini says")


def pack_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pack``."""
    parser.add_argument("workspace", type=_path, metavar="TM_DIR", help="what convert wrote")
    parser.add_argument("--output", type=_path, required=True, help="the archive, X.tgz")
    _target(parser)


def build_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``build``: those of all stages."""
    _source(parser)
    parser.add_argument("--output", type=_path, required=True, help="the archive, X.tgz")
    parser.add_argument(
        "--work-dir",
        type=_path,
        help="folder of every stage's result (default: X.work beside X.tgz)",
    )
    parser.add_argument(
        "--model-name", default="", help="name of the package (default: the source's)"
    )
    _fetch_options(parser)
    _calibrate_options(parser)
    _quantize_options(
        parser, BUILD_METHODS, 0, "inputs that share a scale; 0 takes the most that fit"
    )
    _kv_options(parser)
    _workspace_options(parser, "planned for the target boards")
    _target(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def kernels_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``kernels``."""
    parser.add_argument("--output", type=_path, required=True, help="folder for the cubins")
    parser.add_argument(
        "--sm", type=int, nargs="+", metavar="N", help="build only for these, such as 87 110"
    )
    parser.add_argument(
        "--compilers",
        type=_path,
        default=None,
        metavar="DIR",
        help="where NVIDIA's compilers are kept, pip fetches what is missing (default: nvrtc in "
        "TURBOJET_CACHE_DIR or the user's cache)",
    )


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``report``."""
    parser.add_argument(
        "work_dir", type=_path, metavar="WORK", help="work folder of a build, X.work beside X.tgz"
    )


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``evaluate``."""
    defaults = EvaluateOptions()
    parser.add_argument(
        "targets",
        nargs="+",
        metavar="TARGET",
        help="checkpoint, AWQ folder, workspace, package folder or archive; the first is compared "
        "with the others",
    )
    _option(
        parser,
        "--dataset",
        str,
        defaults.dataset,
        "wikitext2, ptb, builtin, or a text, jsonl or parquet file",
    )
    _option(parser, "--samples", int, defaults.num_samples, "windows from the start of the text")
    _option(parser, "--seqlen", int, defaults.seqlen, "tokens of a window")
    _device(parser, defaults.device)
    _option(
        parser,
        "--quant-policy",
        int,
        None,
        "KV format of packages: 0, 4 or 8 (default: config.ini's)",
    )
    parser.add_argument(
        "--work-dir", type=_path, metavar="WORK", help="of a build, to add the table to its report"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _path(text: str) -> Path:
    """Return a path; an empty one would be the current folder without a word."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return Path(text)


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="ModelScope id, alias, folder of a checkpoint or .gguf file",
    )


def _fetch_options(parser: argparse.ArgumentParser) -> None:
    defaults = FetchOptions()
    _option(
        parser,
        "--revision",
        str,
        defaults.revision,
        "branch, tag or commit on the hub (default: the hub's)",
    )
    for name, text in (("include", "only"), ("exclude", "no")):
        parser.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="PATTERN",
            help=f"download {text} files that match; may be repeated",
        )
    _option(parser, "--max-workers", int, defaults.max_workers, "files downloaded at a time")
    parser.add_argument(
        "--adapter",
        type=_path,
        metavar="DIR",
        help="folder of a LoRA adapter, merged into SOURCE while it is read",
    )


def _calibrate_options(parser: argparse.ArgumentParser) -> None:
    defaults = CalibrateOptions()
    _option(
        parser,
        "--calib-dataset",
        str,
        defaults.dataset,
        "ptb, wikitext2, c4, pileval, builtin, or a text, jsonl or parquet file",
    )
    _option(parser, "--calib-samples", int, defaults.num_samples, "windows drawn from it")
    _option(parser, "--calib-seqlen", int, defaults.seqlen, "tokens of a window")
    _option(parser, "--seed", int, defaults.seed, "of the draw")
    _device(parser, defaults.device)
    _devices(parser)


def _quantize_options(
    parser: argparse.ArgumentParser, methods: Sequence[str], group_size: int, group_help: str
) -> None:
    defaults = QuantizeOptions()
    _option(parser, "--w-bits", int, defaults.w_bits, "bits of a weight")
    _option(parser, "--w-group-size", int, group_size, group_help)
    _option(parser, "--method", str, defaults.method, METHOD_HELP, methods)
    parser.add_argument(
        "--keep-fp16",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave linears that match in fp16, such as 'layers.0.*' or '*.down'; may be repeated",
    )


def _kv_options(parser: argparse.ArgumentParser) -> None:
    _option(parser, "--kv-bits", int, KvQparamsOptions().kv_bits, "bits of a KV code")
    parser.add_argument("--kv-sym", action="store_true", help="zero points 0")


def _workspace_options(parser: argparse.ArgumentParser, default: str) -> None:
    _option(parser, "--tp", int, 1, "ranks that the files are split for")
    _option(parser, "--head", str, HEADS[0], "how the output head is stored", HEADS)
    _option(parser, "--template", str, "", "a built-in chat template (default: the model's own)")
    for name, kind, text in (
        ("quant-policy", int, "KV cache: 0 fp16, 4 static int8, 8 online int8"),
        ("cache-max-entry-count", float, "share of free memory for KV, or pages when 1 or more"),
        ("cache-block-seq-len", int, "tokens of a KV page"),
        ("cache-chunk-size", int, "pages per allocation; -1: all at once"),
        ("session-len", int, "most tokens of a conversation"),
        ("max-batch-size", int, "sequences decoded together"),
    ):
        _option(parser, f"--{name}", kind, None, f"{text} (default: {default})")


def _target(parser: argparse.ArgumentParser) -> None:
    _option(
        parser,
        "--target",
        str,
        PackOptions().target,
        "boards with commas between them (orin-nano-8gb,agx-orin-64gb), or all that can hold it",
    )
    _option(
        parser,
        "--kernels",
        str,
        PackOptions().kernels,
        "CUDA kernels in the package: auto compiles those of the boards, none leaves them out, or "
        "a folder that turbojet-host kernels made",
    )


METHOD_HELP = (
    "how weights are quantized; awq scales channels, clips ranges and makes up for errors, rtn "
    "rounds to nearest"
)


def _device(parser: argparse.ArgumentParser, default: str) -> None:
    _option(parser, "--device", str, default, "where torch computes", DEVICES)


def _devices(parser: argparse.ArgumentParser) -> None:
    _option(
        parser,
        "--devices",
        str,
        "",
        "GPUs that share the work on each layer, such as 0,1; the result is the same",
    )


def _option(
    parser: argparse.ArgumentParser,
    flag: str,
    kind: Callable[[str], Any],
    default: object,
    help_text: str,
    choices: Sequence[str] | None = None,
) -> None:
    """Add an option whose default may come from the environment: flag > TURBOJET_* > default."""
    variable = ENVIRONMENT_PREFIX + flag.lstrip("-").replace("-", "_").upper()
    # argparse converts and checks a default that is text, as if it were typed.
    parser.add_argument(
        flag,
        type=kind,
        default=os.environ.get(variable, default),
        choices=choices,
        metavar=None if choices else flag.rpartition("-")[2].upper(),
        help=help_text,
    )

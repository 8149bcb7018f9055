"""What each verb of `turbojet-host` does with its arguments; libraries are loaded when needed."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from device_runtime.package_format.amounts import format_bytes
from host_tools.fetch.options import FetchOptions
from host_tools.options import (
    CalibrateOptions,
    EvaluateOptions,
    QuantizeOptions,
    parse_devices,
)
from host_tools.package_options import (
    BuildOptions,
    ConfigValues,
    ConvertOptions,
    KvQparamsOptions,
    PackOptions,
)
from host_tools.printed_tables import plain_summary, print_evaluation, print_summary
from host_tools.progress import make_progress


def run_fetch(args: argparse.Namespace) -> int:
    """Get a checkpoint; the last line on stdout is its folder."""
    from host_tools.fetch.fetch import fetch

    print(fetch(args.source, args.output, fetch_options(args), make_progress()))
    return 0


def run_calibrate(args: argparse.Namespace) -> int:
    """Write statistics into the work folder and print it."""
    from host_tools.calibrate import calibrate
    from host_tools.calibration_time import cpu_notice

    options, progress = calibrate_options(args), make_progress()
    if notice := cpu_notice(args.checkpoint, args.work_dir, options):
        progress.note(notice)
    print(calibrate(args.checkpoint, args.work_dir, options, progress))
    return 0


def run_quantize(args: argparse.Namespace) -> int:
    """Write an AWQ checkpoint and print its folder."""
    from host_tools.quantize import quantize

    options = quantize_options(args)
    print(quantize(args.checkpoint, args.work_dir, args.output, options, make_progress()))
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """Write a workspace and print its folder."""
    from host_tools.convert import convert

    print(convert(args.checkpoint, args.output, convert_options(args), make_progress()))
    return 0


def run_kv_qparams(args: argparse.Namespace) -> int:
    """Write static KV parameters into a workspace and print its folder."""
    from host_tools.kv_qparams import kv_qparams

    print(kv_qparams(args.work_dir, args.workspace, kv_options(args), make_progress()))
    return 0


def run_pack(args: argparse.Namespace) -> int:
    """Write an archive and print it."""
    from host_tools.pack import pack

    summary = pack(args.workspace, args.output, pack_options(args), make_progress())
    print(f"{summary.num_files} files, {format_bytes(summary.archive_bytes)}", file=sys.stderr)
    print(summary.path)
    return 0


def run_kernels(args: argparse.Namespace) -> int:
    """Compile the CUDA kernels and print their folder."""
    from host_tools.kernel_sets import build_kernels
    from host_tools.kernels import BUILDS, KernelCache, builds_for

    cache = KernelCache.default()
    if args.compilers:
        cache = replace(cache, compilers=args.compilers)
    builds = builds_for(args.sm) if args.sm else BUILDS
    print(build_kernels(args.output, builds, cache, make_progress()))
    return 0


def run_build(args: argparse.Namespace) -> int:
    """Run the whole pipeline; print the summary, and the archive last."""
    from host_tools.build import build
    from host_tools.build_choices import default_work_dir

    work_dir = args.work_dir or default_work_dir(args.output)
    report = build(args.source, args.output, work_dir, build_options(args), make_progress())
    if args.json:
        print(json.dumps(plain_summary(report), indent=1))
    else:
        print_summary(report)
        if report.page is not None:
            print(f"report: {report.page}", file=sys.stderr)
        print(report.archive)
    return 0


def run_report(args: argparse.Namespace) -> int:
    """Draw the report of a work folder again and print the page."""
    from host_tools.report.gather import write_report

    print(write_report(args.work_dir))
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Measure perplexity of each target and print them side by side."""
    from host_tools.evaluate import evaluate

    if args.work_dir is not None:
        from host_tools.evaluation_targets import check_target
        from host_tools.report.gather import collect_report
        from host_tools.report.records import measured_targets

        collect_report(args.work_dir)  # what cannot be reported on is said before hours of work
        for target in args.targets:
            check_target(Path(target))
        # An archive that is built anew meanwhile is not the one that was opened.
        measured = measured_targets(args.work_dir, args.targets)
    report = evaluate(args.targets, evaluate_options(args), make_progress())
    if args.work_dir is not None:
        from host_tools.report.gather import write_report
        from host_tools.report.records import add_evaluation, evaluation_table

        add_evaluation(args.work_dir, evaluation_table(report), measured)
        print(f"report: {write_report(args.work_dir)}", file=sys.stderr)
    if args.json:
        print(json.dumps(asdict(report), indent=1))
    else:
        print_evaluation(report)
    return 0


def fetch_options(args: argparse.Namespace) -> FetchOptions:
    """Return what was asked of the download."""
    return FetchOptions(
        args.revision, tuple(args.include), tuple(args.exclude), args.max_workers, args.adapter
    )


def calibrate_options(args: argparse.Namespace) -> CalibrateOptions:
    """Return what was asked of the calibration."""
    return CalibrateOptions(
        args.calib_dataset,
        args.calib_samples,
        args.calib_seqlen,
        args.device,
        args.seed,
        parse_devices(args.devices),
    )


def quantize_options(args: argparse.Namespace) -> QuantizeOptions:
    """Return what was asked of the quantization."""
    return QuantizeOptions(
        w_bits=args.w_bits,
        group_size=args.w_group_size,
        method=args.method,
        device=args.device,
        devices=parse_devices(args.devices),
        keep_fp16=tuple(args.keep_fp16),
    )


def convert_options(args: argparse.Namespace) -> ConvertOptions:
    """Return what was asked of the workspace."""
    return ConvertOptions(
        args.model_name,
        args.tp,
        args.group_size,
        args.template,
        config_values(args),
        args.head,
        args.engine,
    )


def kv_options(args: argparse.Namespace) -> KvQparamsOptions:
    """Return what was asked of the static KV parameters."""
    return KvQparamsOptions(args.kv_bits, args.kv_sym, args.tp)


def pack_options(args: argparse.Namespace) -> PackOptions:
    """Return for which boards the archive is."""
    return PackOptions(args.target, args.kernels)


def build_options(args: argparse.Namespace) -> BuildOptions:
    """Return what was asked of the whole pipeline."""
    return BuildOptions(
        model_name=args.model_name,
        fetch=fetch_options(args),
        calibrate=calibrate_options(args),
        method=args.method,
        w_bits=args.w_bits,
        group_size=args.w_group_size,
        keep_fp16=tuple(args.keep_fp16),
        head=args.head,
        kv=KvQparamsOptions(args.kv_bits, args.kv_sym),
        tp=args.tp,
        template=args.template,
        config=config_values(args),
        target=args.target,
        kernels=args.kernels,
    )


def evaluate_options(args: argparse.Namespace) -> EvaluateOptions:
    """Return what perplexity is measured on."""
    return EvaluateOptions(args.dataset, args.samples, args.seqlen, args.device, args.quant_policy)


def config_values(args: argparse.Namespace) -> ConfigValues:
    """Return the values of config.ini that were given."""
    return ConfigValues(
        quant_policy=args.quant_policy,
        cache_max_entry_count=args.cache_max_entry_count,
        cache_block_seq_len=args.cache_block_seq_len,
        cache_chunk_size=args.cache_chunk_size,
        session_len=args.session_len,
        max_batch_size=args.max_batch_size,
    )

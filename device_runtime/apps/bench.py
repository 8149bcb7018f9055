"""`turbojet bench`: how fast a model answers on this machine."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

from device_runtime.apps.bench_device import describe_machine, memory_use
from device_runtime.apps.bench_engine import OpenEngine, open_engine, step_bytes
from device_runtime.apps.bench_load import measure_load
from device_runtime.apps.bench_nodes import node_times
from device_runtime.apps.bench_project import project_all, rates_alone, slice_rates
from device_runtime.apps.bench_report import (
    Report,
    print_report,
    report_facts,
    result_facts,
    to_csv,
)
from device_runtime.apps.bench_runs import Result, Workload, run_workload
from device_runtime.apps.chat_view import make_console
from device_runtime.apps.engine_flags import add_engine_arguments, engine_options
from device_runtime.apps.model import open_installed
from device_runtime.apps.safe_text import json_text
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.backends.synthetic import SHAPES, synthetic_package
from device_runtime.engine.configure import cache_request
from device_runtime.errors import UsageError
from device_runtime.package_format.boards import parse_targets
from device_runtime.package_format.package import Package

DEFAULT_PROMPT = "128"
DEFAULT_COMPLETION = "128"
DEFAULT_CONCURRENCY = "1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``turbojet bench``."""
    parser.epilog = "Lists are numbers with commas; every combination is measured."
    parser.add_argument(
        "target", metavar="NAME|FOLDER", nargs="?", help="an installed model, or a folder"
    )
    parser.add_argument(
        "--synthetic",
        metavar="MODEL",
        help=f"random weights of a model's shape: {', '.join(SHAPES)}",
    )
    parser.add_argument(
        "--head", choices=("fp16", "int8"), default="fp16", help="output head of --synthetic"
    )
    parser.add_argument("--group-size", type=int, metavar="N", help="of --synthetic: 128, 64 or 32")
    parser.add_argument(
        "--prompt", default=DEFAULT_PROMPT, metavar="N,..", help="tokens of the prompt"
    )
    parser.add_argument(
        "--completion", default=DEFAULT_COMPLETION, metavar="N,..", help="tokens of the answer"
    )
    parser.add_argument(
        "--concurrency", default=DEFAULT_CONCURRENCY, metavar="N,..", help="sequences at once"
    )
    parser.add_argument("--warm-up", type=int, default=1, metavar="N", help="rounds before (1)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds that count (5)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy"
    )
    parser.add_argument(
        "--project",
        metavar="BOARD,..",
        help="compute what boards would do, or all; measures slices of this GPU first",
    )
    parser.add_argument("--load", action="store_true", help="measure also how long loading takes")
    parser.add_argument(
        "--nodes", action="store_true", help="measure each node of a decode step against reading"
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print the results as JSON")
    shape.add_argument("--csv", action="store_true", help="print the results as CSV")
    add_engine_arguments(parser)


def run_bench(args: argparse.Namespace) -> int:
    """Measure every combination and print what came out; return the exit code.

    Raises:
        TurbojetError: an argument means nothing, or the engine does not open.
    """
    workloads = read_workloads(args.prompt, args.completion, args.concurrency)
    if args.warm_up < 0 or args.repeats < 1:
        raise UsageError(
            f"--warm-up is {args.warm_up} and --repeats {args.repeats}, expected at least 0 and 1"
        )
    report = measure(args, workloads)
    if args.json:
        print(json_text(report_facts(report), indent=2))
    elif args.csv:
        print(to_csv([result_facts(result, report.machine) for result in report.results]), end="")
    else:
        print_report(make_console(), report)
    return 0


def measure(args: argparse.Namespace, workloads: list[Workload]) -> Report:
    """Measure workloads and what else the arguments ask for.

    Raises:
        TurbojetError: as `run_bench`.
    """
    boards = parse_targets(args.project) if args.project else ()
    options = engine_options(args, os.environ)
    concurrency = max(workload.concurrency for workload in workloads)
    longest = max(w.prompt_tokens + w.completion_tokens for w in workloads)
    if options.max_batch_size is None:
        options = replace(options, max_batch_size=concurrency)
    package, title = find_target(args, concurrency, longest)
    load = measure_load(package, options, args.repeats) if args.load else None
    opened = open_engine(package, options)
    plan = opened.engine.plan
    with opened.engine:
        machine = describe_machine(opened.backend, package)
        results = tuple(_measure(opened, workload, args) for workload in workloads)
        memory = memory_use(opened.backend, plan)
        slices = tuple(slice_rates(opened.backend, package)) if boards else ()
        nodes = tuple(node_times(opened, workloads[0])) if args.nodes else ()
    per_step = step_bytes(package.model, plan.kv_format.value, replace(workloads[0], concurrency=1))
    return Report(
        title=title,
        backend=opened.backend.name,
        quant_policy=plan.kv_format.value,
        kv_title=plan.kv_format.title,
        machine=machine,
        memory=memory,
        results=results,
        load=load,
        nodes=nodes,
        slices=slices,
        projections=tuple(
            project_all(
                boards,
                package.model,
                cache_request(package, options),
                per_step,
                rates_alone(slices),
            )
        ),
    )


def find_target(args: argparse.Namespace, concurrency: int, longest: int) -> tuple[Package, str]:
    """Return the package to measure and what to call it.

    Raises:
        UsageError: neither or both of a model and --synthetic are given, or there is no such model.
    """
    if (args.target is None) == (args.synthetic is None):
        raise UsageError("bench takes the name of a model, a folder, or --synthetic MODEL")
    if args.synthetic is not None:
        package: Package = synthetic_package(
            args.synthetic,
            head_type=args.head,
            group_size=args.group_size,
            max_batch_size=concurrency,
            session_len=max(longest, 64),
        )
        model = package.model
        return package, f"{args.synthetic} (synthetic, W4 g{model.group_size}, {args.head} head)"
    package = open_installed(args.target)
    return package, package.name


def read_workloads(prompts: str, completions: str, concurrencies: str) -> list[Workload]:
    """Return every combination of three lists.

    Raises:
        UsageError: a list holds something that is not a number above 0.
    """
    lists = [
        read_numbers(text, flag)
        for text, flag in (
            (concurrencies, "--concurrency"),
            (prompts, "--prompt"),
            (completions, "--completion"),
        )
    ]
    return [
        Workload(prompt, completion, concurrency)
        for concurrency in lists[0]
        for prompt in lists[1]
        for completion in lists[2]
    ]


def read_numbers(text: str, flag: str) -> list[int]:
    """Return the numbers of a list such as ``128,512``.

    Raises:
        UsageError: something in it is not a whole number above 0.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UsageError(f"{flag} is {text[:60]!r}, expected whole numbers above 0 with commas")
    return numbers


def _measure(opened: OpenEngine, workload: Workload, args: argparse.Namespace) -> Result:
    engine = opened.engine
    quant_policy = engine.plan.kv_format.value
    return run_workload(
        engine,
        workload,
        warm_up=args.warm_up,
        repeats=args.repeats,
        sampling=SamplingParams(temperature=args.temperature),
        bytes_per_step=step_bytes(engine.package.model, quant_policy, workload),
    )

"""`turbojet info`: all there is to know about a model, and how it would fit here."""

from __future__ import annotations

import argparse
import os

from device_runtime.apps.board_plans import board_facts, board_lines
from device_runtime.apps.engine_flags import add_engine_arguments, engine_options
from device_runtime.apps.model import open_installed
from device_runtime.apps.model_facts import package_facts, package_lines, to_text
from device_runtime.apps.model_plan import plan_facts, plan_lines
from device_runtime.apps.places import data_dir
from device_runtime.apps.safe_text import json_text
from device_runtime.apps.store import Store
from device_runtime.package_format.boards import parse_targets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``turbojet info``."""
    parser.epilog = "With the engine's options it shows what they would change."
    parser.add_argument("target", metavar="NAME|FOLDER", help="an installed model, or a folder")
    parser.add_argument(
        "--release", metavar="ID", help="a release of the model (default: the current one)"
    )
    parser.add_argument(
        "--board", metavar="NAMES", help="show the plan on these Jetsons too, or on all"
    )
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    add_engine_arguments(parser)


def run_info(args: argparse.Namespace) -> int:
    """Print the facts of a package and the memory plan; return the exit code.

    Raises:
        UsageError: there is no such model or board, or an option cannot be read.
        PackageError: the package does not open.
    """
    options = engine_options(args, os.environ)
    release = Store(data_dir()).find(args.target, args.release)
    package = open_installed(args.target, args.release)
    boards = parse_targets(args.board) if args.board is not None else ()
    if args.json:
        facts = package_facts(package, release) | {"plan": plan_facts(package, options)}
        facts |= {"boards": board_facts(package, options, boards)} if boards else {}
        print(json_text(facts, indent=2))
    else:
        lines = package_lines(package, release) + plan_lines(package, options)
        print(to_text(lines + board_lines(package, options, boards)))
    return 0

"""`turbojet selftest`: whether every kernel computes on this device what it should."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from device_runtime.apps.places import data_dir
from device_runtime.apps.store import Store, find_package
from device_runtime.errors import DeviceError
from device_runtime.package_format import names

_EXIT_FAILED = DeviceError.exit_code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``turbojet selftest``."""
    parser.epilog = "Exit code 4 says that a kernel is wrong or that this device has none."
    parser.add_argument(
        "target",
        metavar="NAME|FOLDER",
        nargs="?",
        help="a model whose kernels are tested (default: TURBOJET_KERNELS, else turbojet's own)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random inputs")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run_selftest(args: argparse.Namespace) -> int:
    """Compare every kernel with its reference; return 0 when all agree.

    Raises:
        DeviceError: there is no GPU, or there are no kernels for it.
    """
    from device_runtime.backends.cuda.driver import open_driver
    from device_runtime.backends.cuda.kernel_set import kernel_folders
    from device_runtime.backends.cuda.selftest import run_checks

    start = time.perf_counter()
    with closing(open_driver()) as driver:
        device = f"{driver.device_name}, sm_{driver.sm}"
        checks = []
        for check in run_checks(driver, kernel_folders(_folder(args.target)), args.seed):
            checks.append(check)
            word = "ok  " if check.is_passed else "FAIL"
            row = f"{word}  {check.name:<36}  error {check.error:.1e} of {check.tolerance:.0e}"
            # At once: where a kernel hangs or ends the context, the last row says what came before.
            print(row, file=sys.stderr if args.json else sys.stdout, flush=True)
    seconds = time.perf_counter() - start
    failed = [check for check in checks if not check.is_passed]
    if args.json:
        rows = [asdict(check) | {"is_passed": check.is_passed} for check in checks]
        print(json.dumps({"device": device, "seconds": seconds, "checks": rows}, indent=2))
    else:
        print(f"{len(checks) - len(failed)} of {len(checks)} ok on {device} in {seconds:.1f} s")
    return _EXIT_FAILED if failed else 0


def _folder(target: str | None) -> Path:
    if target is None:
        return Path(names.KERNELS_DIR)
    release = Store(data_dir()).find(target, None)
    root = release.root if release else find_package(target)
    return Path(root) / names.KERNELS_DIR

"""What each verb that manages models does: asks, acts, prints."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import BinaryIO

from device_runtime.apps.end_signals import interruptible
from device_runtime.apps.install import STANDARD_INPUT, InstallOptions
from device_runtime.apps.model import install_archive, outcome_sentence, tell
from device_runtime.apps.model_list import list_releases, to_table
from device_runtime.apps.places import data_dir
from device_runtime.apps.progress_bar import byte_progress
from device_runtime.apps.safe_text import json_text
from device_runtime.apps.store import Store, find_package
from device_runtime.apps.verify import Verified, verify_release
from device_runtime.errors import UsageError
from device_runtime.package_format.amounts import format_bytes, format_duration
from device_runtime.package_format.package import verify_package


def run_install(args: argparse.Namespace) -> int:
    """Install an archive and say what came of it."""
    options = InstallOptions(args.name, is_activated=not args.no_activate, is_forced=args.force)
    store = Store(data_dir())
    done, seconds = install_archive(store, _source(args.archive), options)
    release = done.release
    if args.json:
        _print_json(
            {
                "name": release.name,
                "release": release.release_id,
                "outcome": done.outcome,
                "is_current": release.is_current,
                "path": str(release.root),
                "size_bytes": done.size_bytes,
                "num_files": done.num_files,
                "seconds": round(seconds, 3),
            }
        )
        return 0
    print(outcome_sentence(done, seconds))
    if release.is_current:
        tell(f"talk to it: turbojet chat {release.name}")
    else:
        tell(f"make it current: turbojet rollback {release.name} --release {release.release_id}")
    return 0


def run_list(args: argparse.Namespace) -> int:
    """Print the installed models."""
    rows = list_releases(Store(data_dir()))
    if args.json:
        _print_json([row.as_json() for row in rows])
    elif rows:
        print(to_table(rows))
    else:
        tell("no model is installed; `turbojet install X.tgz` installs one")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Compare every file with its hash."""
    release = Store(data_dir()).find(args.target, args.release)
    start_s = time.monotonic()
    with byte_progress("verify", sys.stderr) as report:
        if release is not None:
            done = verify_release(release, report)
        else:
            manifest = verify_package(find_package(args.target), report).manifest
            done = Verified(
                len(manifest.files) if manifest else 0, manifest.size_bytes if manifest else 0
            )
    seconds = time.monotonic() - start_s
    what = f"{release.name} release {release.release_id}" if release else args.target
    if args.json:
        _print_json(
            {
                "name": release.name if release else args.target,
                "release": release.release_id if release else None,
                "is_intact": True,
                "num_files": done.num_files,
                "size_bytes": done.size_bytes,
                "seconds": round(seconds, 3),
            }
        )
    else:
        size = f"{done.num_files} files, {format_bytes(done.size_bytes)}"
        print(f"{what} is intact: {size}, read in {format_duration(seconds)}")
    return 0


def run_remove(args: argparse.Namespace) -> int:
    """Delete a model, one release of it, or all but the current one."""
    store = Store(data_dir())
    with interruptible(), store.locked(tell):
        if args.release:
            release = store.get(args.name, args.release)
            store.remove_release(release)
            print(f"removed {args.name} release {release.release_id}")
        elif args.old:
            store.get(args.name)
            old = [release for release in store.releases(args.name) if not release.is_current]
            for release in old:
                store.remove_release(release)
            print(f"removed {len(old)} old releases of {args.name}")
        else:
            store.remove(args.name)
            print(f"removed {args.name}")
    return 0


def run_rollback(args: argparse.Namespace) -> int:
    """Make another release of a model current."""
    store = Store(data_dir())
    with store.locked(tell):
        release = store.rollback(args.name, args.release)
    print(f"{release.name} release {release.release_id} is current")
    return 0


def _source(archive: str) -> Path | BinaryIO:
    if archive != STANDARD_INPUT:
        return Path(archive)
    if sys.stdin.isatty():
        raise UsageError("standard input is a terminal, expected an archive: cat X.tgz | turbojet")
    return sys.stdin.buffer


def _print_json(value: object) -> None:
    print(json_text(value, indent=2))

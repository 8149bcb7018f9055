"""Packs a workspace into one archive for its target boards."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from device_runtime.engine.board_plan import longest_sessions, plan_on_board
from device_runtime.engine.configure import cache_request
from device_runtime.engine.options import EngineOptions
from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format import durable, names
from device_runtime.package_format.archive_gzip import GZIP_MAGIC
from device_runtime.package_format.archive_names import MAX_PART_BYTES
from device_runtime.package_format.archive_writer import ArchiveSummary, write_archive
from device_runtime.package_format.boards import BOARDS, parse_targets
from device_runtime.package_format.checksums import hash_files
from device_runtime.package_format.files import list_files
from device_runtime.package_format.manifest import Manifest, write_manifest
from device_runtime.package_format.package import Package, open_package
from host_tools.kernel_sets import kernels_fingerprint, write_package_kernels
from host_tools.kernels import KernelCache
from host_tools.output_folder import check_outside
from host_tools.package_options import ALL_TARGETS, PackOptions
from host_tools.plan import choose_boards, describe_plan, plan_boards
from host_tools.progress import BYTES, Progress
from host_tools.stage import RECORD_DIR, Stage, exclusive

STAGE_VERSION = 1


def pack(workspace: Path, output: Path, options: PackOptions, progress: Progress) -> ArchiveSummary:
    """Seal a workspace for its target boards and write the archive; the workspace stays as it is.

    Args:
        workspace: what ``convert`` wrote, with or without static KV parameters.
        output: the archive; replaced when the new one is complete.
        options: target boards.
        progress: hears of every few MB.

    Returns:
        What was written.

    Raises:
        UsageError: a target is unknown or too small for the model, ``output`` is a folder,
            something that is no archive or in the workspace, or another process packs this one.
        PackageError: the workspace is damaged, or LMDeploy's own.
    """
    check_outside(workspace, output)
    check_archive_place(output)
    package = open_package(workspace)
    manifest = planned_manifest(package, options, progress)
    with exclusive(package.root), _staging(package.root) as folder:
        boards = [BOARDS[name] for name in manifest.target_boards]
        write_package_kernels(
            folder / names.KERNELS_DIR,
            package.model,
            boards,
            options.kernels,
            KernelCache.default(),
            progress,
        )
        for path in content_paths(package):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            _link((package.root / path).resolve(), target)
        with progress.task("hash", total=0, unit=BYTES) as task:
            entries = hash_files(folder, list_files(folder), task.move_to)
        write_manifest(folder, replace(manifest, files=entries))
        durable.sync_folder(folder)
        with _alone_in(output.parent, progress), progress.task("pack", unit=BYTES) as task:
            return write_archive(folder, output, task.move_to)


def check_archive_place(output: Path) -> None:
    """Refuse a name that no file can have, and to write over what is no archive.

    Raises:
        UsageError: the name is too long, or a folder is there, a device, or a file of another kind.
    """
    name_bytes = len(os.fsencode(output.name + durable.PART_SUFFIX))
    if name_bytes > MAX_PART_BYTES:
        raise UsageError(
            f"{output.name}{durable.PART_SUFFIX}, as the archive is called while it is written, "
            f"has {name_bytes} bytes, a file's name at most {MAX_PART_BYTES}; name a shorter output"
        )
    if output.is_dir():
        raise UsageError(f"{output} is a folder, name the archive to write in it")
    if not output.exists():
        return
    start = None
    if output.is_file():  # a pipe would be waited for
        with output.open("rb") as stream:
            start = stream.read(len(GZIP_MAGIC))
    if start not in (GZIP_MAGIC, b""):
        raise UsageError(f"{output} exists and is no archive, name another output or remove it")


def pack_once(
    workspace: Path, output: Path, work_dir: Path, options: PackOptions, progress: Progress
) -> Path:
    """Pack unless the archive is there already, made from the same files; return the archive.

    Args:
        workspace: as for :func:`pack`.
        output: as for :func:`pack`.
        work_dir: keeps the record of the archive.
        options: as for :func:`pack`.
        progress: as for :func:`pack`.

    Raises:
        UsageError: as :func:`pack`.
        PackageError: as :func:`pack`.
    """
    stage = Stage(
        "pack",
        work_dir,
        (workspace,),
        {
            "target": options.target,
            "kernels": kernels_fingerprint(options.kernels),
            "output": str(output.resolve()),
        },
        STAGE_VERSION,
    )
    if stage.is_finished():
        progress.note(f"pack: {output} is up to date")
        return output
    pack(workspace, output, options, progress)
    stage.record([output])
    return output


def planned_manifest(package: Package, options: PackOptions, progress: Progress) -> Manifest:
    """Return the manifest with target boards and the memory arithmetic of each.

    Raises:
        UsageError: a target is unknown or too small for the model.
        PackageError: the workspace has no manifest, or its config.ini was edited to something that
            no device runs.
    """
    manifest = package.manifest
    if manifest is None:
        raise PackageError(
            f"{package.root} has no {names.MANIFEST}; LMDeploy's own workspaces are packed with "
            "tar, or convert the checkpoint with turbojet-host"
        )
    boards = parse_targets(options.target)
    request = cache_request(package, EngineOptions())  # refuses what the device would
    boards, left_out = choose_boards(
        package.model, request, boards, is_all=options.target == ALL_TARGETS
    )
    for sentence in left_out:
        progress.note(sentence)
    memory = plan_boards(package.model, request, boards)
    longest = longest_sessions(package.model, request, boards)
    for board, plan, sessions in zip(boards, memory, longest, strict=True):
        progress.note(f"{describe_plan(plan, request.page_size)}; {sessions.text}")
        for note in plan_on_board(package.model, request, board).notes:
            progress.note(f"warning: {board.name}: {note}")
    return replace(
        manifest, target_boards=tuple(board.name for board in boards), memory=memory, files=()
    )


def content_paths(package: Package) -> tuple[str, ...]:
    """Return the files of a workspace that belong into its package.

    LMDeploy's Triton folders, our records and kernels stay behind.
    """
    weights = {spec.path for spec in package.specs}
    weights.add(f"{names.WEIGHTS_DIR}/{names.CONFIG_INI}")
    others = (
        path for path in list_files(package.root) if path.startswith(f"{names.TOKENIZER_DIR}/")
    )
    return tuple(sorted(weights.union(others)))


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """Give an empty folder beside the workspace's files, for links to them and what is added."""
    folder = root / RECORD_DIR / "package"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alone_in(folder: Path, progress: Progress) -> Iterator[None]:
    """Wait for other processes that pack into a folder: their unfinished archive may be ours.

    The kernel lets go of it when a process dies. A folder that cannot be locked, as on some
    network file systems, is taken as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.note(f"pack: waiting for another process that packs into {folder}")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links, or somebody else's file
        shutil.copyfile(source, target)

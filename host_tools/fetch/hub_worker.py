"""Runs the ModelScope SDK in a process of its own.

The SDK reads its settings at import, logs, draws bars and keeps files in the home folder. Here it
sees an environment made for it and its output goes nowhere; the parent gets one JSON object per
line. When the parent dies, its end of our standard input closes and so do we.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from device_runtime.errors import FetchError, TurbojetError
from device_runtime.package_format.amounts import format_bytes
from host_tools.fetch.hub_errors import describe_failure
from host_tools.fetch.repo_files import RepoFile, select_files

PAGE_SIZE = 200
MAX_PAGES = 500
REPORT_INTERVAL_S = 0.1
SPARE_BYTES = 16 << 20


@dataclass(frozen=True)
class HubRequest:
    """One download.

    Attributes:
        repo_id: ``owner/name``.
        repo_type: "model" or "dataset".
        revision: branch, tag or commit; None is the default branch.
        folder: where the files go, keeping their paths.
        include: patterns of wanted files; empty is what a checkpoint needs.
        exclude: patterns of unwanted ones.
        root: folder of a dataset that is listed; "/" is all of it.
        max_workers: files at a time.
    """

    repo_id: str
    repo_type: str
    revision: str | None
    folder: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    root: str = "/"
    max_workers: int = 4

    def to_json(self) -> str:
        """Return the request as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> HubRequest:
        """Read what :meth:`to_json` wrote."""
        fields = json.loads(line)
        for name in ("include", "exclude"):
            fields[name] = tuple(fields[name])
        return cls(**fields)


class Reporter:
    """Sends events to the parent, bytes not more often than it can show them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._shown_s = 0.0

    def send(self, **event: object) -> None:
        """Send one event."""
        with self._lock:
            print(json.dumps(event), file=self._stream, flush=True)

    def count(self, path: str, num_bytes: int) -> None:
        """Say that so many bytes of a file are there."""
        with self._lock:
            self._done[path] = num_bytes
            now = time.monotonic()
            if now - self._shown_s < REPORT_INTERVAL_S:
                return
            self._shown_s = now
            event = {"event": "bytes", "done": sum(self._done.values())}
            print(json.dumps(event), file=self._stream, flush=True)

    def callback_class(self) -> type:
        """Return the class that the SDK makes one instance of for each file."""
        from modelscope.hub.callback import ProgressCallback

        reporter = self

        class FileCallback(ProgressCallback):  # type: ignore[misc]
            def __init__(self, filename: str, file_size: int) -> None:
                super().__init__(filename, file_size)
                self._num_bytes = 0

            def update(self, size: int) -> None:
                self._num_bytes += size
                reporter.count(self.filename, self._num_bytes)

        return FileCallback


def main() -> int:
    """Serve one request; the exit code is 0 whenever the last event says how it went."""
    reporter = Reporter(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    request = HubRequest.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        chosen = _plan(request, reporter)
        _download(request, chosen, reporter)
    except TurbojetError as error:
        reporter.send(event="refused", kind=type(error).__name__, message=str(error))
    except Exception as error:  # the top of this process: whatever the SDK raises is reported
        kind, reason = describe_failure(error)
        reporter.send(event="failed", kind=kind, reason=reason)
    else:
        reporter.send(event="done")
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _plan(request: HubRequest, reporter: Reporter) -> list[RepoFile]:
    """List the repository, choose files and see that there is room for them.

    Raises:
        FetchError: the disk is too full.
    """
    files = (RepoFile(*fields) for fields in _listed(request))
    chosen = select_files(files, request.include, request.exclude)
    folder = Path(request.folder)
    missing = 0
    for file in chosen:
        path = folder / file.path
        there = path.stat().st_size if path.is_file() else 0
        if there == file.size:
            reporter.count(file.path, file.size)
        else:
            partial = path.with_suffix(f"{path.suffix}.incomplete")
            missing += file.size - (partial.stat().st_size if partial.is_file() else 0)
    free = shutil.disk_usage(folder).free
    if missing + SPARE_BYTES > free:
        raise FetchError(
            f"{request.repo_id} needs {format_bytes(missing)} more in {folder}, but "
            f"{format_bytes(free)} are free"
        )
    total = sum(file.size for file in chosen)
    reporter.send(event="plan", files=[[file.path, file.size] for file in chosen], total=total)
    return chosen


def _listed(request: HubRequest) -> Iterator[tuple[str, int]]:
    from modelscope.hub.api import HubApi

    api = HubApi()
    if request.repo_type == "model":
        entries = api.get_model_files(request.repo_id, revision=request.revision, recursive=True)
    else:
        entries = _dataset_entries(api, request)
    for entry in entries:
        if (entry.get("Type") or "blob") != "tree":
            yield str(entry.get("Path") or entry.get("Name")), int(entry.get("Size") or 0)


def _dataset_entries(api: Any, request: HubRequest) -> Iterator[dict[str, Any]]:
    for page in range(1, MAX_PAGES + 1):
        entries = api.get_dataset_files(
            request.repo_id,
            revision=request.revision or "master",
            root_path=request.root,
            recursive=True,
            page_number=page,
            page_size=PAGE_SIZE,
        )
        yield from entries
        if len(entries) < PAGE_SIZE:
            return


def _download(request: HubRequest, chosen: list[RepoFile], reporter: Reporter) -> None:
    from modelscope.hub.snapshot_download import snapshot_download

    # The SDK lists the repository again: exact names keep it to the files that were checked.
    snapshot_download(
        request.repo_id,
        revision=request.revision,
        repo_type=request.repo_type,
        local_dir=request.folder,
        allow_patterns=[glob.escape(file.path) for file in chosen],
        max_workers=request.max_workers,
        progress_callbacks=[reporter.callback_class()],
    )

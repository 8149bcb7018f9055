"""Downloads from ModelScope through its SDK, which runs in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from device_runtime import errors
from device_runtime.errors import FetchError, InternalError, TurbojetError, UsageError
from device_runtime.package_format.amounts import format_bytes
from device_runtime.package_format.durable import sync_file
from host_tools.fetch.hub_address import check_reachable, hub_host, unreachable
from host_tools.fetch.hub_worker import HubRequest
from host_tools.fetch.options import FetchOptions
from host_tools.progress import BYTES, Progress, Task
from host_tools.stage import RECORD_DIR

TOKEN_VARIABLE = "MODELSCOPE_API_TOKEN"
OLDEST_SDK = (1, 39)
"""Version of the SDK; older ones know another variable for mirrors and check fewer hashes."""

SDK_FOLDER = f"{RECORD_DIR}/sdk"

_PATIENCE = {
    "MODELSCOPE_API_CONNECT_TIMEOUT": "8",
    "MODELSCOPE_API_MAX_RETRIES": "1",
    "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "2",
    # The SDK's hour per file would end a large shard on a slow line.
    "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": str(7 * 24 * 3600),
    # It asks the hub which region this machine is in, and then an address that the hub names.
    "MODELSCOPE_DOWNLOAD_INTRA_CLOUD": "false",
}
"""Settings of the SDK that we choose where the user did not."""


_ROOT = str(Path(__file__).resolve().parents[2])
_START_WORKER = (
    "import sys; sys.path[0] = sys.argv[1]; "
    "from host_tools.fetch.hub_worker import main; sys.exit(main())"
)


def download_model(
    model_id: str, folder: Path, options: FetchOptions, progress: Progress
) -> list[Path]:
    """Download a model's files into ``folder`` and return them.

    Raises:
        FetchError: the hub cannot be reached, lacks or refuses the model, or serves damaged files.
        UsageError: no file is wanted, or the SDK is not installed.
        PackageError: the hub lists names that could leave the folder.
    """
    request = HubRequest(
        repo_id=model_id,
        repo_type="model",
        revision=options.revision,
        folder=str(folder),
        include=options.include,
        exclude=options.exclude,
        max_workers=options.max_workers,
    )
    return download(request, progress)


def download(request: HubRequest, progress: Progress) -> list[Path]:
    """Serve one request with the SDK and return the files, whole and on the disk.

    What an earlier call left is kept: whole files are checked, begun ones are gone on with.

    Raises:
        FetchError: the hub cannot be reached, lacks or refuses the repository, or serves damaged
            files.
        UsageError: no file is wanted, the SDK is not installed, or the token is none.
        PackageError: the hub lists names that could leave the folder.
    """
    _check_sdk()
    folder = Path(request.folder)
    sdk_folder = folder / SDK_FOLDER
    check_reachable(request.repo_id)
    sdk_folder.mkdir(parents=True, exist_ok=True)
    try:
        files = _Worker(request, progress).run(sdk_folder)
    finally:
        shutil.rmtree(sdk_folder, ignore_errors=True)
    for path, size in files:
        if not path.is_file() or path.is_symlink() or path.stat().st_size != size:
            raise InternalError(f"the SDK left no {path} of {size} bytes, run the command again")
        sync_file(path)
    return [path for path, _ in files]


class _Worker:
    """The SDK's process, followed from its plan to its end."""

    def __init__(self, request: HubRequest, progress: Progress) -> None:
        self._request = request
        self._progress = progress
        self._files: list[tuple[str, int]] = []
        self._total = 0
        self._done = 0

    def run(self, sdk_folder: Path) -> list[tuple[Path, int]]:
        """Run to the end.

        Raises:
            FetchError, UsageError, PackageError: as `download` says.
        """
        # Not `-m`: that would look for modules in the current folder first.
        command = [sys.executable, "-c", _START_WORKER, _ROOT]
        with ExitStack() as stack:
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    encoding="utf-8",
                    env=sdk_environment(os.environ, sdk_folder),
                )
            )
            stack.callback(process.kill)
            if process.stdin is None or process.stdout is None:
                raise InternalError("the SDK's process has no pipes")
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(f"{self._request.to_json()}\n")
                process.stdin.flush()
            task: Task | None = None
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "plan":
                    self._files = [(path, size) for path, size in event["files"]]
                    self._total = event["total"]
                    title = f"fetch {self._request.repo_id}"
                    task = stack.enter_context(self._progress.task(title, self._total, BYTES))
                    task.move_to(min(self._done, self._total))
                elif event["event"] == "bytes":
                    self._done = event["done"]
                    if task is not None:
                        task.move_to(min(self._done, self._total))
                elif event["event"] == "done":
                    if task is not None:
                        task.move_to(self._total)
                    folder = Path(self._request.folder)
                    return [(folder / path, size) for path, size in self._files]
                else:
                    raise self._failure(event)
        raise FetchError(
            f"the ModelScope SDK ended without a word while it fetched {self._request.repo_id}, "
            "run the same command again"
        )

    def _failure(self, event: Mapping[str, str]) -> TurbojetError:
        """Make one sentence of what the worker reported."""
        what, host = self._request.repo_id, hub_host()
        if event["event"] == "refused":
            leaf: type[TurbojetError] = getattr(errors, event["kind"])
            return leaf(_without_token(event["message"]))
        kind, reason = event["kind"], _without_token(event["reason"])
        if kind == "missing":
            revision = self._request.revision
            at = f" at revision {revision}" if revision else ""
            return FetchError(f"{host} has no {self._request.repo_type} {what}{at}, check the name")
        if kind == "refused":
            return FetchError(
                f"{host} does not let us read {what}, put a token that may into {TOKEN_VARIABLE}"
            )
        if kind == "full":
            return FetchError(f"the disk under {self._request.folder} is full, make room")
        if kind == "damaged":
            return FetchError(f"{host} serves {what} damaged ({reason}), try again or a mirror")
        if kind == "unknown":
            return FetchError(f"the ModelScope SDK failed to fetch {what} from {host} ({reason})")
        if kind == "network" and not self._files:
            return unreachable(host, what, reason)
        done, total = format_bytes(self._done), format_bytes(self._total)
        return FetchError(
            f"{what} stopped after {done} of {total} from {host} ({reason}), run the same command "
            "again to go on"
        )


def sdk_environment(base: Mapping[str, str], sdk_folder: Path) -> dict[str, str]:
    """Return the environment of the SDK: the user's choices, none of the user's folders.

    A token stays in the environment; the folder for caches, sessions and credentials is ours and
    is removed after the download, so nothing of it stays on the disk.

    Raises:
        UsageError: the token has a character that no token has.
    """
    environment = {**_PATIENCE, **base}
    if TOKEN_VARIABLE in environment:
        environment[TOKEN_VARIABLE] = _checked_token(environment[TOKEN_VARIABLE])
    for name in ("MODELSCOPE_HOME", "MODELSCOPE_CREDENTIALS_PATH", "MODELSCOPE_CACHE"):
        environment[name] = str(sdk_folder.absolute())
    environment["MODELSCOPE_LOG_LEVEL"] = "40"
    environment["TQDM_DISABLE"] = "1"
    environment["PYTHONWARNINGS"] = "ignore"
    return environment


def _checked_token(value: str) -> str:
    """Return a token without the line's end that a secret's file or a Windows editor leaves.

    A header cannot carry other characters, and the SDK then prints the token with its complaint.
    """
    token = value.strip()
    if not token.isascii() or any(not "!" <= character <= "~" for character in token):
        raise UsageError(
            f"{TOKEN_VARIABLE} holds a blank, a control character or a letter beyond ASCII, which "
            "no token has; copy the token again"
        )
    return token


def _without_token(text: str) -> str:
    """Return what the SDK says, the token blackened should it be in it."""
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    return text.replace(token, "***") if token else text


def _check_sdk() -> None:
    try:
        version = importlib.metadata.version("modelscope")
    except importlib.metadata.PackageNotFoundError as error:
        raise UsageError(
            "modelscope is not installed, run: pip install 'turbojet-llm[host]'"
        ) from error
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST_SDK:
        raise UsageError(
            f"modelscope {version} is too old, {'.'.join(map(str, OLDEST_SDK))} or later is "
            "needed: pip install --upgrade modelscope"
        )

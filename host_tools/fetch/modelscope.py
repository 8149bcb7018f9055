"""Downloads from ModelScope through its SDK, which runs in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlparse

from device_runtime import errors
from device_runtime.errors import FetchError, InternalError, TurbojetError, UsageError
from device_runtime.package_format.durable import sync_file
from host_tools.fetch.hub_worker import HubRequest
from host_tools.fetch.options import FetchOptions
from host_tools.progress import BYTES, Progress, Task, format_bytes
from host_tools.stage import RECORD_DIR

TOKEN_VARIABLE = "MODELSCOPE_API_TOKEN"
ENDPOINT_VARIABLES = ("MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN")
"""What the SDK reads, the first that is set wins."""

DEFAULT_HOST = "modelscope.cn"
INTERNATIONAL_HOST = "www.modelscope.ai"
SDK_FOLDER = f"{RECORD_DIR}/sdk"
REACH_TIMEOUT_S = 8.0

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
        UsageError: no file is wanted, or the SDK is not installed.
        PackageError: the hub lists names that could leave the folder.
    """
    if importlib.util.find_spec("modelscope") is None:
        raise UsageError("modelscope is not installed, run: pip install 'turbojet-llm[host]'")
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
            return leaf(event["message"])
        kind, reason = event["kind"], event["reason"]
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
        if kind == "network" and not self._files:
            return unreachable(host, what, reason)
        done, total = format_bytes(self._done), format_bytes(self._total)
        return FetchError(
            f"{what} stopped after {done} of {total} from {host} ({reason}), run the same command "
            "again to go on"
        )


def hub_host() -> str:
    """Return the host that the SDK asks first."""
    address = _chosen_address()
    if address is not None:
        return urlparse(address).hostname or address
    prefers = os.environ.get("MODELSCOPE_PREFER_AI_SITE", "").strip().lower()
    return INTERNATIONAL_HOST if prefers in ("1", "true", "yes", "on") else DEFAULT_HOST


def check_reachable(what: str) -> None:
    """Find out in seconds whether any hub host answers; a proxy is left to the SDK.

    Raises:
        FetchError: none does.
    """
    address = _chosen_address()
    places = [address] if address is not None else [DEFAULT_HOST, INTERNATIONAL_HOST]
    if address is None and hub_host() == INTERNATIONAL_HOST:
        places.reverse()
    reasons = [_try_to_connect(place) for place in places]
    if all(reasons):
        raise unreachable(hub_host(), what, str(reasons[0]))


def unreachable(host: str, what: str, reason: str) -> FetchError:
    """Return the one sentence for a machine without this network."""
    return FetchError(
        f"cannot reach {host} to fetch {what} ({reason}); pass the path of a local folder or file "
        "in its place"
    )


def sdk_environment(base: Mapping[str, str], sdk_folder: Path) -> dict[str, str]:
    """Return the environment of the SDK: the user's choices, none of the user's folders.

    A token stays in the environment; the folder for caches, sessions and credentials is ours and
    is removed after the download, so nothing of it stays on the disk.
    """
    environment = {**_PATIENCE, **base}
    for name in ("MODELSCOPE_HOME", "MODELSCOPE_CREDENTIALS_PATH", "MODELSCOPE_CACHE"):
        environment[name] = str(sdk_folder.absolute())
    environment["MODELSCOPE_LOG_LEVEL"] = "40"
    environment["TQDM_DISABLE"] = "1"
    environment["PYTHONWARNINGS"] = "ignore"
    return environment


def _chosen_address() -> str | None:
    for name in ENDPOINT_VARIABLES:
        value = os.environ.get(name, "").strip()
        if value:
            return value if "://" in value else f"https://{value}"
    return None


def _try_to_connect(place: str) -> str | None:
    """Return why a host does not answer, None when it does or when a proxy stands between."""
    url = urlparse(place if "://" in place else f"https://{place}")
    host, scheme = url.hostname or "", url.scheme
    if urllib.request.getproxies().get(scheme) and not urllib.request.proxy_bypass(host):
        return None
    reasons: list[str | None] = ["no answer in time"]

    def connect() -> None:
        try:
            port = url.port or (80 if scheme == "http" else 443)
            with socket.create_connection((host, port), REACH_TIMEOUT_S):
                reasons[0] = None
        except (OSError, ValueError) as error:
            reasons[0] = str(error)

    # A thread, because a broken resolver takes longer than any timeout of a socket.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    with contextlib.suppress(RuntimeError):
        thread.join(REACH_TIMEOUT_S + 1)
    return reasons[0]

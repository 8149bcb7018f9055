"""The stage `fetch`: any SOURCE becomes a folder that holds a Hugging Face checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from device_runtime.errors import UsageError
from device_runtime.package_format.durable import sync_folder, write_atomically
from device_runtime.package_format.manifest import Provenance
from host_tools.adapter_folder import adapt
from host_tools.content_hash import content_files
from host_tools.fetch.local import check_checkpoint
from host_tools.fetch.options import FetchOptions
from host_tools.fetch.sources import FolderSource, GgufSource, HubSource, parse_source
from host_tools.origin import Origin, write_origin
from host_tools.progress import Progress
from host_tools.stage import RECORD_DIR, Setting, Stage, exclusive

BEGUN = f"{RECORD_DIR}/fetch-begun.json"
"""What a folder is to become, written before the first byte of it."""
PARTIAL = f"{RECORD_DIR}/partial"
BASE_SUFFIX = "-base"
"""Of the folder that a base is fetched into when an adapter goes over it."""


def fetch(
    source: str,
    output: Path,
    options: FetchOptions = FetchOptions(),  # noqa: B008 - frozen
    progress: Progress | None = None,
) -> Path:
    """Make the checkpoint that ``source`` names available and return its folder.

    A local folder is checked and used where it lies: nothing is copied, ``output`` is not made.
    A model of ModelScope is downloaded into ``output``, a GGUF file dequantized into it; a second
    call finds the finished checkpoint and needs no network, an interrupted one goes on.
    With an adapter ``output`` becomes the base under the adapter; a base that is not a local
    folder is then made in ``OUTPUT-base``.

    Args:
        source: ModelScope id, alias, folder or GGUF file.
        output: folder for what is made.
        options: revision and files of a download; an adapter.
        progress: told bytes and facts.

    Raises:
        UsageError: the source is nothing we know, ``output`` holds something else, another fetch
            is at work in it, or options do not go with the source.
        FetchError: the hub cannot be reached, has no such model or refuses it, or the disk is full.
        PackageError: what was found is no checkpoint, damaged or of a kind that does not run.
    """
    shown = progress or Progress()
    if options.adapter is not None:
        own = output.with_name(f"{output.name}{BASE_SUFFIX}")
        base = fetch(source, own, replace(options, adapter=None), shown)
        adapt(base, options.adapter, output, shown)
        check_checkpoint(output)
        return output
    found = parse_source(source)
    if not isinstance(found, HubSource) and options != FetchOptions():
        raise UsageError(
            f"{source} is on this machine: revision, include, exclude and max-workers go with a "
            "ModelScope id"
        )
    if isinstance(found, FolderSource):
        check_checkpoint(found.path)
        return found.path
    if isinstance(found, GgufSource):
        settings: dict[str, Setting] = {"kind": "gguf", "source": found.path.name}
        stage = Stage("fetch", output, (found.path,), settings)
        origin = Origin(Provenance(found.path.name, "gguf"), "none")
        return _run(stage, origin, lambda: _convert(found.path, output, shown), shown)
    settings = {
        "kind": "modelscope",
        "source": found.model_id,
        "revision": options.revision,
        "include": options.include,
        "exclude": options.exclude,
    }
    stage = Stage("fetch", output, (), settings)
    origin = Origin(Provenance(found.model_id, "modelscope", options.revision or ""), "none")
    return _run(stage, origin, lambda: _download(found.model_id, output, options, shown), shown)


def _run(stage: Stage, origin: Origin, make: Callable[[], list[Path]], progress: Progress) -> Path:
    """Run a stage that makes a checkpoint, unless it is finished."""
    output = stage.folder
    begun = json.dumps(dict(stage.settings), indent=1, sort_keys=True).encode()
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file, name a folder")
    _check_is_ours(output, begun)
    with exclusive(output):
        _check_is_ours(output, begun)
        if stage.is_finished():
            progress.note(f"{output} is finished already")
            return output
        stage.forget()
        write_atomically(output / BEGUN, begun)
        files = make()
        check_checkpoint(output)
        write_origin(output, origin)
        stage.record(files)
        shutil.rmtree(output / PARTIAL, ignore_errors=True)
    return output


def _check_is_ours(output: Path, begun: bytes) -> None:
    """Refuse a folder that holds anything but this same checkpoint, begun or finished.

    Raises:
        UsageError: it holds something else.
    """
    if not output.is_dir() or not content_files(output):
        return
    try:
        found = (output / BEGUN).read_bytes()
    except OSError as error:
        raise UsageError(
            f"{output} holds other files, name an empty folder or one that does not exist"
        ) from error
    if found != begun:
        raise UsageError(
            f"{output} holds another checkpoint or one fetched with other settings, name another "
            "folder or delete it"
        )


def _convert(source: Path, output: Path, progress: Progress) -> list[Path]:
    from host_tools.fetch.gguf import convert_gguf

    partial = output / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = []
    for path in convert_gguf(source, partial, progress):
        files.append(path.replace(output / path.name))
    sync_folder(output)
    return files


def _download(model_id: str, output: Path, options: FetchOptions, progress: Progress) -> list[Path]:
    from host_tools.fetch.modelscope import download_model

    return download_model(model_id, output, options, progress)

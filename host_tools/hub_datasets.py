"""The calibration sets that have a name, and where on ModelScope their files lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from device_runtime.errors import FetchError
from host_tools.dataset_files import read_documents, read_zip_text
from host_tools.datasets import BUILTIN
from host_tools.fetch.hub_address import hub_host
from host_tools.fetch.hub_worker import HubRequest
from host_tools.fetch.modelscope import download
from host_tools.progress import Progress
from host_tools.stage import exclusive

Split = Literal["train", "test"]


@dataclass(frozen=True)
class HubDataset:
    """One data set of the hub.

    Attributes:
        repo_id: ``owner/name``.
        patterns: of the files of a split, with ``{split}``; the first that matches any file wins.
        root: folder of the repository that is listed; large ones have too many files elsewhere.
        raw_member: how a split's file inside a zip ends.
    """

    repo_id: str
    patterns: tuple[str, ...]
    root: str = "/"
    raw_member: str = ""


HUB_DATASETS = {
    "ptb": HubDataset(
        "modelscope/ptb_text_only",
        ("*{split}*.parquet", "*{split}*.jsonl", "*ptb.{split}.txt"),
    ),
    "wikitext2": HubDataset(
        "modelscope/wikitext",
        ("*wikitext-2-raw-v1*{split}*.parquet", "*wikitext-2-raw-v1*.zip"),
        raw_member="wiki.{split}.raw",
    ),
    "c4": HubDataset("allenai/c4", ("en/c4-{split}.00000-of-01024.json.gz",), root="en"),
    "pileval": HubDataset("mit-han-lab/pile-val-backup", ("val.jsonl.zst",)),
}


def fetch_split(name: str, split: Split, cache_dir: Path, progress: Progress) -> list[Path]:
    """Return the files of one split, downloaded unless they are there.

    Raises:
        FetchError: the hub cannot be reached, or its repository has no such file.
    """
    dataset = HUB_DATASETS[name]
    folder = cache_dir / name
    patterns = tuple(pattern.format(split=split) for pattern in dataset.patterns)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        finished = folder / f".{split}.finished"
        if not finished.is_file():
            request = HubRequest(
                repo_id=dataset.repo_id,
                repo_type="dataset",
                revision=None,
                folder=str(folder),
                include=patterns,
                root=dataset.root,
            )
            try:
                download(request, progress)
            except FetchError as error:
                hint = f"{BUILTIN} is a text that needs no network"
                raise FetchError(f"{error}; {hint}") from error
            finished.touch()
    for pattern in patterns:
        found = sorted(
            path
            for path in folder.rglob("*")
            if path.is_file() and fnmatchcase(path.relative_to(folder).as_posix(), pattern)
        )
        if found:
            return found
    raise FetchError(
        f"{dataset.repo_id} on {hub_host()} has no {split} files {' or '.join(patterns)}, pass a "
        "text file instead"
    )


def read_split(name: str, split: Split, cache_dir: Path, progress: Progress) -> Iterator[str]:
    """Yield the documents of one split, in order.

    Raises:
        FetchError: as `fetch_split` says.
        UsageError: a file is damaged.
    """
    member = HUB_DATASETS[name].raw_member.format(split=split)
    for path in fetch_split(name, split, cache_dir, progress):
        if path.suffix == ".zip":
            yield from raw_rows(read_zip_text(path, member))
        elif path.suffix == ".txt":
            yield from (line.strip() for line in next(read_documents(path)).splitlines())
        else:
            yield from read_documents(path)


def raw_rows(text: str) -> Iterator[str]:
    """Yield the rows that the published parquet files make of wikitext's raw text.

    A line keeps its newline, and a line of blanks is an empty row (dataset script of
    ``Salesforce/wikitext``).
    """
    for line in text.splitlines(keepends=True):
        yield line if line.strip() else ""

"""Token windows to calibrate on and to measure perplexity on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from tokenizers import Tokenizer

from device_runtime.errors import UsageError
from host_tools.dataset_files import MAX_TEXT_CHARACTERS, JsonLines, read_documents
from host_tools.progress import Progress

BUILTIN = "builtin"
"""The text that ships with the host tools: no download."""

NAMED_SETS = ("ptb", "wikitext2", "c4", "pileval", BUILTIN)
EVALUATION_SETS = ("wikitext2", "ptb", BUILTIN)

MAX_DRAWS = 10_000
"""Documents of c4 that are tried for one sample before the search is given up."""

MAX_PILE_TOKENS = 512
BLANK_LINE = "\n\n"
_HEAD_ENDS = "\n" + "-" * 80 + "\n"

Windows = NDArray[np.int32]


@dataclass(frozen=True)
class WindowRequest:
    """Which windows are wanted.

    Attributes:
        dataset: a named set, or the path of a text, ``.jsonl`` or ``.parquet`` file.
        num_samples: windows.
        seqlen: tokens of each.
        seed: of the windows' places; evaluation takes none.
    """

    dataset: str
    num_samples: int
    seqlen: int
    seed: int = 0


def calibration_windows(
    tokenizer: Tokenizer, request: WindowRequest, cache_dir: Path, progress: Progress
) -> Windows:
    """Draw calibration windows as ``lite calibrate`` does (spec section 4.1).

    ptb, wikitext2 and c4 take random windows with Python's ``random``; pileval joins short
    documents and cuts, so it can give fewer windows than asked for. A file is treated like
    wikitext2, its documents joined by a blank line. The built-in text gives windows at even
    distances, so that few samples see all of its kinds of text.

    Args:
        tokenizer: of the checkpoint.
        request: which windows.
        cache_dir: where downloaded data sets are kept.
        progress: told about downloads and cut text.

    Returns:
        ``[num_samples, seqlen]`` token ids.

    Raises:
        UsageError: the data set is nothing we know, damaged, or has too few tokens.
        FetchError: a named set could not be downloaded.
    """
    draw = random.Random(request.seed)
    name = request.dataset
    if name == "c4":
        return _sample_documents(tokenizer, request, _open_lines(name, cache_dir, progress), draw)
    if name == "pileval":
        return _join_short(tokenizer, request, _open_lines(name, cache_dir, progress), progress)
    if name == BUILTIN:
        token_ids = _encode(tokenizer, builtin_text(), add_special=False)
        return _even_windows(token_ids, request)
    is_named = name in NAMED_SETS
    text = _joined(_documents(name, "train", cache_dir, progress), name, progress)
    return _random_windows(_encode(tokenizer, text, add_special=is_named), request, draw)


def evaluation_windows(
    tokenizer: Tokenizer, request: WindowRequest, cache_dir: Path, progress: Progress
) -> Windows:
    """Cut the start of a text into windows that do not overlap.

    The whole text is tokenized at once, without special tokens. wikitext2 and ptb are the test
    splits, their rows joined by a blank line as in the literature; the raw file of wikitext2
    passed as a path gives other tokens.

    Returns:
        ``[num_samples, seqlen]`` token ids.

    Raises:
        UsageError: the data set is nothing we know, damaged, or has too few tokens.
        FetchError: a named set could not be downloaded.
    """
    name = request.dataset
    if name in NAMED_SETS and name not in EVALUATION_SETS:
        raise UsageError(
            f"{name} has no test text, evaluate on {', '.join(EVALUATION_SETS)} or a file"
        )
    if name == BUILTIN:
        text = builtin_text()
    else:
        text = _joined(_documents(name, "test", cache_dir, progress), name, progress)
    token_ids = _encode(tokenizer, text, add_special=False)
    needed = request.num_samples * request.seqlen
    if len(token_ids) < needed:
        raise UsageError(
            f"{name} has {len(token_ids)} tokens, but {request.num_samples} windows of "
            f"{request.seqlen} need {needed}; ask for fewer or pass a longer text"
        )
    return token_ids[:needed].reshape(request.num_samples, request.seqlen)


def builtin_text() -> str:
    """Return the text that ships with the host tools, without its head about sources."""
    whole = resources.files("host_tools").joinpath("calibration_text.txt").read_text("utf-8")
    return whole.split(_HEAD_ENDS, maxsplit=1)[1]


def _documents(name: str, split: str, cache_dir: Path, progress: Progress) -> Iterator[str]:
    if name in NAMED_SETS:
        from host_tools.hub_datasets import read_split

        return read_split(name, "test" if split == "test" else "train", cache_dir, progress)
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(
            f"there is no file {name}, pass one that exists or one of {', '.join(NAMED_SETS)}"
        )
    return read_documents(path)


def _open_lines(name: str, cache_dir: Path, progress: Progress) -> JsonLines:
    from host_tools.hub_datasets import fetch_split

    return JsonLines(fetch_split(name, "train", cache_dir, progress)[0])


def _joined(documents: Iterable[str], name: str, progress: Progress) -> str:
    """Join documents by blank lines, up to :data:`MAX_TEXT_CHARACTERS`."""
    parts: list[str] = []
    left = MAX_TEXT_CHARACTERS
    for document in documents:
        parts.append(document[:left])
        left -= len(document) + len(BLANK_LINE)
        if left < 0:
            progress.note(f"only the first {MAX_TEXT_CHARACTERS} characters of {name} are used")
            break
    return BLANK_LINE.join(parts)


def _encode(tokenizer: Tokenizer, text: str, *, add_special: bool) -> Windows:
    return np.array(tokenizer.encode(text, add_special_tokens=add_special).ids, dtype=np.int32)


def _check_length(token_ids: Windows, request: WindowRequest) -> int:
    """Return the last place where a window can start.

    Raises:
        UsageError: the text is shorter than one window.
    """
    last = len(token_ids) - request.seqlen
    if last < 0:
        raise UsageError(
            f"{request.dataset} has {len(token_ids)} tokens, a window needs {request.seqlen}; ask "
            "for shorter windows or pass a longer text"
        )
    return last


def _random_windows(token_ids: Windows, request: WindowRequest, draw: random.Random) -> Windows:
    last = _check_length(token_ids, request)
    draws = (draw.randint(0, last) for _ in range(request.num_samples))
    starts = np.fromiter(draws, np.int64, request.num_samples)
    return sliding_window_view(token_ids, request.seqlen)[starts]


def _even_windows(token_ids: Windows, request: WindowRequest) -> Windows:
    last = _check_length(token_ids, request)
    steps = max(1, request.num_samples - 1)
    starts = np.arange(request.num_samples, dtype=np.int64) * last // steps
    return sliding_window_view(token_ids, request.seqlen)[starts]


def _sample_documents(
    tokenizer: Tokenizer, request: WindowRequest, documents: JsonLines, draw: random.Random
) -> Windows:
    """Draw documents until one is long enough, then a window inside it, for every sample."""
    windows: list[Windows] = []
    for _ in range(request.num_samples):
        longest = 0
        for _ in range(MAX_DRAWS):
            text = documents[draw.randint(0, len(documents) - 1)]
            token_ids = _encode(tokenizer, text, add_special=True)
            longest = max(longest, len(token_ids))
            if len(token_ids) >= request.seqlen:
                start = draw.randint(0, len(token_ids) - request.seqlen)
                windows.append(token_ids[start : start + request.seqlen])
                break
        else:
            raise UsageError(
                f"the longest of {MAX_DRAWS} documents of {request.dataset} has {longest} tokens, "
                f"a window needs {request.seqlen}; ask for shorter windows"
            )
    return np.stack(windows)


def _join_short(
    tokenizer: Tokenizer, request: WindowRequest, documents: JsonLines, progress: Progress
) -> Windows:
    """Join the first short documents in shuffled order and cut the whole into windows."""
    # datasets.Dataset.shuffle(seed) is this permutation of numpy's default generator.
    order = np.random.default_rng(request.seed).permutation(len(documents))
    chosen: list[Windows] = []
    for index in order:
        token_ids = _encode(tokenizer, documents[int(index)].strip(), add_special=True)
        if 1 <= len(token_ids) <= MAX_PILE_TOKENS:
            chosen.append(token_ids)
        if len(chosen) == request.num_samples:
            break
    joined = np.concatenate([np.empty(0, np.int32), *chosen])
    num_windows = min(len(joined) // request.seqlen, request.num_samples)
    _check_length(joined, request)
    if num_windows < request.num_samples:
        progress.note(
            f"{request.dataset} gives {num_windows} windows of {request.seqlen} tokens for "
            f"{request.num_samples} documents of at most {MAX_PILE_TOKENS}"
        )
    return joined[: num_windows * request.seqlen].reshape(num_windows, request.seqlen)

"""Calibration and evaluation windows, from files and from data sets of a hub on this machine."""

from __future__ import annotations

import gzip
import json
import os
import random
import tracemalloc
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hub_server import Hub, serving
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from device_runtime.errors import FetchError, UsageError
from host_tools import dataset_files, datasets, hub_datasets
from host_tools.dataset_files import JsonLines, read_documents
from host_tools.datasets import WindowRequest, calibration_windows, evaluation_windows
from host_tools.progress import Progress

BOS = 999
SILENT = Progress()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Word n ("n7") is token 7, anything else token 0; BOS in front when special tokens are on."""
    vocab = {"?": 0, "[BOS]": BOS, **{f"n{n}": n for n in range(1, 900)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="[BOS] $A", pair="[BOS] $A $B", special_tokens=[("[BOS]", BOS)]
    )
    return tokenizer


def words(*numbers: int) -> str:
    return " ".join(f"n{n}" for n in numbers)


def lines_of(documents: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({field: text}).encode() + b"\n" for text in documents)


class Notes(Progress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def test_windows_of_a_file_start_where_python_random_says(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(words(*range(1, 101)))
    request = WindowRequest(str(tmp_path / "a.txt"), 3, 10, seed=0)
    windows = calibration_windows(tokenizer, request, tmp_path, SILENT)
    # random.seed(0); randint(0, 90) three times gives 49, 53, 5.
    assert windows.dtype == np.int32
    assert windows[:, 0].tolist() == [50, 54, 6]
    assert windows[1].tolist() == list(range(54, 64))
    random.seed(0)
    assert [random.randint(0, 90) for _ in range(3)] == [49, 53, 5]


def test_many_windows_take_little_more_than_their_token_ids() -> None:
    token_ids = np.arange(100, dtype=np.int32)
    request = WindowRequest("a.txt", 20_000, 4)
    make = partial(datasets._random_windows, token_ids, request, random.Random(0))
    for cut in (make, partial(datasets._even_windows, token_ids, request)):
        tracemalloc.start()
        windows = cut()
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # 16 bytes a window, and 8 of its place, twice while even ones are computed.
        assert windows.nbytes == 320_000
        assert peak_bytes < 320_000 + 2 * 160_000 + 20_000


def test_a_text_of_exactly_one_window_is_enough(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_text(words(*range(1, 11)))
    request = WindowRequest(str(tmp_path / "a.raw"), 2, 10)
    windows = calibration_windows(tokenizer, request, tmp_path, SILENT)
    assert windows.tolist() == [list(range(1, 11))] * 2


def test_evaluation_windows_follow_each_other_without_bos(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(words(*range(1, 8)))
    request = WindowRequest(str(tmp_path / "a.txt"), 2, 3)
    windows = evaluation_windows(tokenizer, request, tmp_path, SILENT)
    assert windows.dtype == np.int32
    assert windows.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("field", ["text", "sentence"])
def test_documents_come_out_of_every_kind_of_file(tmp_path: Path, ending: str, field: str) -> None:
    documents = ["first\nof two lines", "zweites – 学", ""]
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        table = pa.table({"id": [1, 2, 3, 4], field: [*documents, None]})
        parquet.write_table(table, path)
    elif ending.endswith(".gz"):
        path.write_bytes(gzip.compress(lines_of(documents, field)))
    elif ending.endswith(".zst"):
        path.write_bytes(pa.compress(lines_of(documents, field), "zstd", asbytes=True))
    else:
        path.write_bytes(lines_of(documents, field) + b"\n")
    assert list(read_documents(path)) == documents


def test_documents_of_a_file_are_joined_by_a_blank_line(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([words(1, 2), words(3)]))
    whole = datasets._joined(read_documents(path), "a", SILENT)
    assert whole == "n1 n2\n\nn3"
    windows = evaluation_windows(tokenizer, WindowRequest(str(path), 1, 3), tmp_path, SILENT)
    assert windows.tolist() == [[1, 2, 3]]


def test_text_beyond_the_limit_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "MAX_TEXT_CHARACTERS", 7)
    notes = Notes()
    assert datasets._joined(["abc", "defgh", "ijk"], "big.txt", notes) == "abc\n\nde"
    assert notes.texts == ["only the first 7 characters of big.txt are used"]


def test_line_ends_of_a_text_file_are_read_as_python_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "mixed.txt"
    path.write_bytes(b"one\r\ntwo\rthree\n")
    assert list(read_documents(path)) == ["one\ntwo\nthree\n"]


def test_a_long_text_file_is_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_files, "MAX_TEXT_CHARACTERS", 2)
    (tmp_path / "a.txt").write_text("学习中文")  # three bytes each, eight are read
    assert list(read_documents(tmp_path / "a.txt")) == ["学习"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"\xff\xfe\x00", "a.txt is not UTF-8 at byte 0, save it as UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"te', "line 2 of .*a.jsonl is no JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 of .*a.jsonl is no JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1 of .*a.jsonl has no text in text or sentence"),
        ("a.jsonl", b'{"text": 5}\n', "line 1 of .*a.jsonl has no text in text or sentence"),
        ("a.jsonl", b'"text"\n', "line 1 of .*a.jsonl has no text in text or sentence"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9],
            "a.jsonl.gz cannot be read",
        ),
        ("a.jsonl.zst", b"no zstd at all", "a.jsonl.zst cannot be read"),
        ("a.parquet", b"PAR1 or not", "a.parquet is no whole parquet file"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message):
        list(read_documents(tmp_path / name))


def test_a_parquet_file_without_text_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="has the columns id, body, expected text or sentence"):
        list(read_documents(tmp_path / "a.parquet"))


def test_a_line_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_files, "MAX_LINE_BYTES", 10)
    (tmp_path / "a.jsonl").write_bytes(lines_of(["long enough"]))
    with pytest.raises(UsageError, match=r"line 1 of .* has 24 bytes, expected at most 10"):
        list(read_documents(tmp_path / "a.jsonl"))


def test_a_text_that_is_too_short_is_said_with_both_numbers(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(words(1, 2, 3))
    with pytest.raises(UsageError, match=r"a.txt has 3 tokens, a window needs 4"):
        calibration_windows(tokenizer, WindowRequest(str(path), 1, 4), tmp_path, SILENT)
    with pytest.raises(UsageError, match="has 3 tokens, but 2 windows of 2 need 4"):
        evaluation_windows(tokenizer, WindowRequest(str(path), 2, 2), tmp_path, SILENT)


def test_names_of_nothing_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    request = WindowRequest("wikitext3", 1, 4)
    with pytest.raises(UsageError, match=r"no file wikitext3, pass .* ptb, wikitext2, c4, pileval"):
        calibration_windows(tokenizer, request, tmp_path, SILENT)
    with pytest.raises(UsageError, match="c4 has no test text, evaluate on wikitext2, ptb, built"):
        evaluation_windows(tokenizer, WindowRequest("c4", 1, 4), tmp_path, SILENT)
    with pytest.raises(UsageError, match=r"there is no file .*gone.jsonl to read text from"):
        list(read_documents(tmp_path / "gone.jsonl"))


def test_the_builtin_text_feeds_the_demo_from_end_to_end(tokenizer: Tokenizer) -> None:
    text = datasets.builtin_text()
    assert "ODC-BY" not in text[:500], "the head about sources is no part of the text"
    assert 60_000 < len(text.encode()) < 120_000
    for sign in ("def ", "#include", "SELECT", "Assistant:", "水", "bibliothèque"):
        assert sign in text
    request = WindowRequest("builtin", 16, 512)
    windows = calibration_windows(tokenizer, request, Path("nowhere"), SILENT)
    assert windows.shape == (16, 512)
    windows = evaluation_windows(tokenizer, WindowRequest("builtin", 2, 64), Path("no"), SILENT)
    assert windows.shape == (2, 64)


def test_builtin_windows_lie_at_even_distances() -> None:
    token_ids = np.arange(101, dtype=np.int32)
    windows = datasets._even_windows(token_ids, WindowRequest("builtin", 5, 21))
    # last start 80, four steps of 20
    assert windows[:, 0].tolist() == [0, 20, 40, 60, 80]
    assert windows[-1, -1] == 100
    one = datasets._even_windows(token_ids, WindowRequest("builtin", 1, 21))
    assert one[:, 0].tolist() == [0]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in list(os.environ):
        if name.startswith("MODELSCOPE_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with serving(Hub()) as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.address)
        yield hub


def test_wikitext_comes_from_the_hub_once(
    hub: Hub, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repo = "modelscope/wikitext"
    for split, number in (("train", 1), ("test", 50)):
        rows = [words(number, number + 1), "", words(number + 2)]
        parquet.write_table(pa.table({"text": rows}), tmp_path / "x.parquet")
        name = f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
        hub.files[name] = (tmp_path / "x.parquet").read_bytes()
    hub.files["wikitext-103-raw-v1/train-00000-of-00001.parquet"] = b"not wanted"
    cache = tmp_path / "cache"
    request = WindowRequest("wikitext2", 1, 4)
    windows = calibration_windows(tokenizer, request, cache, SILENT)
    # A named set is tokenized with special tokens, as `lite calibrate` does.
    assert windows.tolist() == [[BOS, 1, 2, 3]]
    windows = evaluation_windows(tokenizer, WindowRequest("wikitext2", 1, 3), cache, SILENT)
    assert windows.tolist() == [[50, 51, 52]]
    assert not hub.asked_for("wikitext-103-raw-v1/train-00000-of-00001.parquet")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    assert calibration_windows(tokenizer, request, cache, SILENT).tolist() == [[BOS, 1, 2, 3]]


def test_a_data_set_that_is_not_there_is_said(
    hub: Hub, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(FetchError, match=r"127.0.0.1 has no dataset modelscope/ptb_text_only"):
        calibration_windows(tokenizer, WindowRequest("ptb", 1, 4), tmp_path, SILENT)


def ready(cache: Path, name: str, split: str, files: dict[str, bytes]) -> Path:
    """A cache in which a split is finished, so that no hub is asked."""
    for path, data in files.items():
        (cache / name / path).parent.mkdir(parents=True, exist_ok=True)
        (cache / name / path).write_bytes(data)
    (cache / name / f".{split}.finished").touch()
    return cache


def test_a_split_without_its_files_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    cache = ready(tmp_path, "ptb", "test", {"README": b""})
    with pytest.raises(FetchError, match=r"ptb_text_only on .* has no test files \*test\*.parquet"):
        evaluation_windows(tokenizer, WindowRequest("ptb", 1, 4), cache, SILENT)


def test_wikitext_inside_a_zip_gives_the_rows_of_the_parquet_files(tmp_path: Path) -> None:
    path = tmp_path / "wikitext2" / "wikitext-2-raw-v1.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.train.raw", " \n = Title = \n \n Text\n")
        archive.writestr("wikitext-2-raw/wiki.test.raw", "other")
    cache = ready(tmp_path, "wikitext2", "train", {})
    rows = list(hub_datasets.read_split("wikitext2", "train", cache, SILENT))
    assert rows == ["", " = Title = \n", "", " Text\n"]


def test_a_zip_that_is_damaged_or_lacks_the_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK nothing")
    with pytest.raises(UsageError, match=r"a.zip cannot be read"):
        dataset_files.read_zip_text(tmp_path / "a.zip", ".raw")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("x.txt", "x")
    with pytest.raises(UsageError, match=r"b.zip has 0 members .raw, expected one of at most"):
        dataset_files.read_zip_text(tmp_path / "b.zip", ".raw")


def test_ptb_lines_are_its_sentences(tmp_path: Path) -> None:
    cache = ready(
        tmp_path, "ptb", "train", {"data/ptb.train.txt": b" aer banknote \n no it was \n"}
    )
    rows = list(hub_datasets.read_split("ptb", "train", cache, SILENT))
    assert rows == ["aer banknote", "no it was"]


C4 = "en/c4-train.00000-of-01024.json.gz"


def test_c4_draws_documents_until_one_is_long_enough(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = [words(*range(n * 50 + 1, n * 50 + 1 + (3, 20, 2, 30)[n])) for n in range(4)]
    cache = ready(tmp_path, "c4", "train", {C4: gzip.compress(lines_of(documents))})
    windows = calibration_windows(tokenizer, WindowRequest("c4", 5, 10), cache, SILENT)
    draw = random.Random(0)
    expected = []
    while len(expected) < 5:
        index = draw.randint(0, 3)
        if index in (1, 3):  # the long ones: BOS and 20, BOS and 30 tokens
            ids = [BOS, *range(index * 50 + 1, index * 50 + 1 + (20 if index == 1 else 30))]
            start = draw.randint(0, len(ids) - 10)
            expected.append(ids[start : start + 10])
    assert windows.tolist() == expected
    assert (cache / "c4" / C4.removesuffix(".gz")).is_file(), "unpacked once"


def test_c4_without_a_long_document_gives_up(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "MAX_DRAWS", 50)
    cache = ready(tmp_path, "c4", "train", {C4: gzip.compress(lines_of([words(1, 2)]))})
    with pytest.raises(
        UsageError, match="longest of 50 documents of c4 has 3 tokens, a window nee"
    ):
        calibration_windows(tokenizer, WindowRequest("c4", 1, 10), cache, SILENT)


def pile(cache: Path, documents: list[str]) -> Path:
    packed = pa.compress(lines_of(documents), "zstd", asbytes=True)
    return ready(cache, "pileval", "train", {"val.jsonl.zst": packed})


def test_pileval_joins_short_documents_and_cuts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = [words(1, 2), f"  {words(3, 4, 5)} ", words(*[7] * 600), words(6)]
    # numpy's default generator shuffles range(4) with seed 0 into 2, 0, 1, 3: the first is too
    # long, the next three have 3 + 4 + 2 tokens with BOS; asking for 3 windows of 4 gives 2.
    assert np.random.default_rng(0).permutation(4).tolist() == [2, 0, 1, 3]
    notes = Notes()
    cache = pile(tmp_path, documents)
    windows = calibration_windows(tokenizer, WindowRequest("pileval", 3, 4), cache, notes)
    assert windows.tolist() == [[BOS, 1, 2, BOS], [3, 4, 5, BOS]]
    assert notes.texts == ["pileval gives 2 windows of 4 tokens for 3 documents of at most 512"]


def test_pileval_with_too_little_text_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    cache = pile(tmp_path, [words(1, 2), words(*[7] * 600)])
    with pytest.raises(UsageError, match="pileval has 3 tokens, a window needs 4"):
        calibration_windows(tokenizer, WindowRequest("pileval", 9, 4), cache, SILENT)


def test_lines_are_found_by_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(["zero", "eins", "二"]))
    documents = JsonLines(tmp_path / "a.jsonl")
    assert (len(documents), documents[2], documents[0]) == (3, "二", "zero")
    (tmp_path / "b.jsonl").write_bytes(b"")
    with pytest.raises(UsageError, match=r"b.jsonl holds no line"):
        JsonLines(tmp_path / "b.jsonl")


def test_without_a_network_the_text_that_ships_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        FetchError, match=r"cannot reach 127\.0\.0\.1 .*; builtin is a text that needs no network"
    ):
        hub_datasets.fetch_split("ptb", "train", tmp_path, SILENT)

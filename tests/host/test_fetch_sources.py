"""What a SOURCE names, which files of a repository are taken, what a checkpoint needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from device_runtime.errors import PackageError, UsageError
from host_tools.fetch import FetchOptions, fetch
from host_tools.fetch.aliases import ALIASES
from host_tools.fetch.local import check_checkpoint
from host_tools.fetch.repo_files import MAX_FILES, RepoFile, select_files
from host_tools.fetch.sources import FolderSource, GgufSource, HubSource, parse_source
from host_tools.json_file import MAX_CONFIG_BYTES


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "model_id"),
    [
        (
            "Shanghai_AI_Laboratory/internlm2-chat-1_8b",
            "Shanghai_AI_Laboratory/internlm2-chat-1_8b",
        ),
        ("internlm2-chat-1_8b", "Shanghai_AI_Laboratory/internlm2-chat-1_8b"),
        ("InternLM2-Chat-1_8B", "Shanghai_AI_Laboratory/internlm2-chat-1_8b"),
        ("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("https://modelscope.cn/models/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("https://www.modelscope.cn/models/Qwen/Qwen3-0.6B/summary", "Qwen/Qwen3-0.6B"),
    ],
)
def test_ids_aliases_and_pages_name_a_model_of_the_hub(
    here: Path, text: str, model_id: str
) -> None:
    assert parse_source(text) == HubSource(model_id)


def test_every_alias_is_lower_case_and_names_a_proper_id() -> None:
    for alias, model_id in ALIASES.items():
        assert alias == alias.lower()
        assert re.fullmatch(r"[\w-]+/[\w.-]+", model_id), model_id


@pytest.mark.parametrize(
    "alias",
    [
        "internlm-chat-7b", "internlm-chat-20b",
        "internlm2-chat-1_8b", "internlm2-chat-7b", "internlm2-chat-20b",
        "internlm2_5-1_8b-chat", "internlm2_5-7b-chat", "internlm2_5-20b-chat",
        "internlm3-8b-instruct", "llama-2-7b-chat", "llama-2-13b-chat", "llama-3-8b-instruct",
        "llama-3.1-8b-instruct", "llama-3.2-1b-instruct", "llama-3.2-3b-instruct",
        "qwen-7b-chat", "qwen-14b-chat", "qwen1.5-7b-chat", "qwen2-7b-instruct",
        "qwen2.5-7b-instruct", "qwen3-8b", "mistral-7b-instruct-v0.1", "baichuan2-7b-chat",
        "smollm2-135m-instruct", "smollm3-3b",
    ],
)  # fmt: skip
def test_every_family_has_a_short_name(here: Path, alias: str) -> None:
    source = parse_source(alias)
    assert isinstance(source, HubSource)
    simple = re.sub(r"[^a-z0-9]", "", source.model_id.rpartition("/")[2].lower())
    assert simple.removeprefix("meta").removesuffix("ms") == re.sub(r"[^a-z0-9]", "", alias)


def test_folders_and_gguf_files_on_disk_come_before_ids(here: Path) -> None:
    (here / "team" / "model").mkdir(parents=True)
    (here / "m.GGUF").write_bytes(b"GGUF")
    assert parse_source("team/model") == FolderSource(Path("team/model"))
    assert parse_source("m.GGUF") == GgufSource(Path("m.GGUF"))


def test_an_alias_is_not_hidden_by_a_folder_of_its_name(here: Path) -> None:
    (here / "qwen3-0.6b").mkdir()
    assert parse_source("qwen3-0.6b") == HubSource("Qwen/Qwen3-0.6B")
    assert parse_source("./qwen3-0.6b") == FolderSource(Path("qwen3-0.6b"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gone.gguf", "there is no file gone.gguf, name a GGUF file that exists"),
        ("notes.txt", "notes.txt is a file but no .gguf"),
        ("internlm2-chat-1_8", "is no folder, .* did you mean internlm2-chat-1_8b"),
        ("", "the source is an empty text, name a folder, a GGUF file or a model id"),
        ("what is this", "'what is this' is no folder, GGUF file, alias or ModelScope id"),
        ("../../etc", "is no folder, GGUF file, alias or ModelScope id"),
        ("team/..", "is no folder, GGUF file, alias or ModelScope id"),
        ("https://example.org/models/a/b", "is no folder, GGUF file, alias or ModelScope id"),
    ],
)
def test_anything_else_is_a_usage_error(here: Path, text: str, message: str) -> None:
    (here / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=message):
        parse_source(text)


def test_workers_are_at_least_one() -> None:
    with pytest.raises(UsageError, match="max-workers is 0, expected at least 1"):
        FetchOptions(max_workers=0)


LISTED = [
    RepoFile(path, 10)
    for path in (
        ".gitattributes",
        "README.md",
        "LICENSE",
        "config.json",
        "configuration.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "training_args.bin",
        "tokenizer.model",
        "tokenization_internlm2.py",
        "onnx/model.onnx",
        "original/consolidated.00.pth",
        "image.png",
    )
]


def names(files: list[RepoFile]) -> list[str]:
    return [file.path for file in files]


def test_by_default_a_checkpoint_is_taken_once_and_nothing_else() -> None:
    assert names(select_files(LISTED, (), ())) == [
        "LICENSE",
        "config.json",
        "configuration.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenization_internlm2.py",
        "tokenizer.model",
    ]


def test_pickled_weights_are_taken_where_there_are_no_others() -> None:
    files = [file for file in LISTED if "safetensors" not in file.path]
    assert "pytorch_model.bin" in names(select_files(files, (), ()))
    assert "training_args.bin" not in names(select_files(files, (), ()))


def test_include_and_exclude_are_patterns_over_whole_paths() -> None:
    chosen = select_files(LISTED, ("*.bin", "onnx/*"), ("training*",))
    assert names(chosen) == ["onnx/model.onnx", "pytorch_model.bin"]


def test_nothing_left_is_a_usage_error_that_shows_some_names() -> None:
    with pytest.raises(UsageError, match=r"none of the 17 files .* it has .gitattributes, README"):
        select_files(LISTED, ("*.gguf",), ())
    with pytest.raises(UsageError, match=r"none of the 0 files .* it has none"):
        select_files([], (), ())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../evil.json", "climbs out of its folder"),
        ("/etc/evil.json", "is absolute"),
        ("a/../../evil.json", "climbs out of its folder"),
        ("a//b.json", "is not normalised"),
        ("a\\b.json", "holds a control character or a backslash"),
        ("a\nb.json", "holds a control character or a backslash"),
        ("a,b.json", "has a comma or a blank at its edge"),
        (" a.json", "has a comma or a blank at its edge"),
        (".turbojet/fetch.json", "lies in .turbojet, which is ours"),
    ],
)
def test_names_that_could_leave_the_folder_are_refused(path: str, message: str) -> None:
    with pytest.raises(PackageError, match=message):
        select_files([RepoFile(path, 1)], ("*",), ())


def test_listings_that_cannot_be_are_refused() -> None:
    with pytest.raises(PackageError, match="lists a file twice"):
        select_files([RepoFile("a.json", 1)] * 2, (), ())
    with pytest.raises(PackageError, match=r"'a.json' has -1 bytes"):
        select_files([RepoFile("a.json", -1)], (), ())
    many = [RepoFile(f"{n}.json", 1) for n in range(MAX_FILES + 1)]
    with pytest.raises(PackageError, match=r"lists 10001 files to fetch, expected at most 10000"):
        select_files(many, (), ())


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_local_checkpoint_is_used_where_it_lies(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "local")
    assert fetch(str(folder), tmp_path / "out") == folder
    assert not (tmp_path / "out").exists()


def test_a_folder_is_no_place_for_download_options(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "local")
    with pytest.raises(UsageError, match="is on this machine: revision, include, exclude"):
        fetch(str(folder), tmp_path / "out", FetchOptions(include=("*.json",)))


def index(*files: str) -> str:
    return json.dumps({"weight_map": {f"t{n}": name for n, name in enumerate(files)}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config.json": None}, "local has no readable config.json, expected the folder of a"),
        ({"config.json": "{"}, "config.json is no JSON, fetch it again"),
        ({"config.json": "[" * 100_000}, "config.json is no JSON, fetch it again"),
        ({"config.json": "[]"}, "config.json holds no JSON object"),
        ({"config.json": "{}"}, "config.json in .* names no architecture"),
        ({"config.json": " " * (MAX_CONFIG_BYTES + 1)}, "has 4194305 bytes, expected at most"),
        ({"model.safetensors": None}, "local has no .safetensors or .bin weights"),
        (
            {"model.safetensors": None, "m.Q4_0.gguf": ""},
            "has no .safetensors or .bin weights, pass the file m.Q4_0.gguf instead",
        ),
        ({"tokenizer.json": None}, "local has no tokenizer, expected one of tokenizer.json, tok"),
        (
            {"model.safetensors.index.json": index("model.safetensors", "b.safetensors")},
            "lacks 1 of the 2 weight files that its index names, such as 'b.safetensors'",
        ),
        (
            {"model.safetensors.index.json": index("../model.safetensors")},
            "points to '../model.safetensors', outside of the checkpoint's folder",
        ),
        ({"model.safetensors.index.json": '{"weight_map": 3}'}, "has no weight_map"),
        (
            {"model.safetensors.index.json": '{"weight_map": {"a": 3}}'},
            "says that tensor 'a' is in 3, expected the name of a file; fetch it again",
        ),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(
    tmp_path: Path, changes: dict[str, str | None], message: str
) -> None:
    folder = checkpoint(tmp_path / "local")
    for name, content in changes.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
    with pytest.raises(PackageError, match=message):
        check_checkpoint(folder)


def test_an_index_of_weights_that_were_left_out_does_not_matter(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "local")
    (folder / "pytorch_model.bin.index.json").write_text(index("pytorch_model-1.bin"))
    check_checkpoint(folder)

from pathlib import Path

import pytest

from device_runtime.errors import PackageError
from host_tools.checkpoint_folder import check_folder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 123\n"


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00002.safetensors", "pytorch_model.bin", "tokenizer.json", "merges.txt"],
)
def test_a_pointer_of_git_lfs_is_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(PackageError, match=f"{name} in .* is a pointer of Git LFS .*git lfs pull"):
        check_folder(tmp_path)


def test_pointers_that_nobody_reads_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_text(POINTER)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text(POINTER + " " * 1024)  # longer than any pointer
    check_folder(tmp_path)


def test_a_folder_of_a_hubs_cache_names_the_checkpoint_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name"
    revision = folder / "snapshots" / "0a1b"
    revision.mkdir(parents=True)
    check_folder(folder)  # nothing in it to name
    (revision / "config.json").write_text("{}")
    with pytest.raises(PackageError, match=r"name the checkpoint in it, .*/snapshots/0a1b$"):
        check_folder(folder)
    check_folder(revision)

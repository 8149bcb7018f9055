import dataclasses
import resource
import signal
import threading
import time

import numpy as np
import pytest
from format_samples import FP16, INT4, config_of, random_array

from device_runtime.errors import DeviceError, PackageError
from device_runtime.package_format import durable, names
from device_runtime.package_format.checksums import hash_files
from device_runtime.package_format.files import check_file, list_files
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.manifest import FileEntry
from device_runtime.package_format.package import open_package
from device_runtime.package_format.tensors import tensor_specs
from device_runtime.package_format.workspace import WorkspaceWriter

QWEIGHT = "layers.0.attention.w_qkv.0.qweight"


def weight(root, name):
    return root / names.WEIGHTS_DIR / name


def test_the_writer_checks_names_shapes_and_types(tmp_path):
    writer = WorkspaceWriter(tmp_path, INT4)
    with pytest.raises(PackageError, match=r"no tensor called 'layers.0.attention.w_qkv.0.weight'"):
        writer.write("layers.0.attention.w_qkv.0.weight", np.zeros((64, 128), np.float16))
    with pytest.raises(PackageError, match=r"norm.weight is float16 \[63\], expected float16 \[64"):
        writer.write("norm.weight", np.zeros(63, np.float16))
    with pytest.raises(PackageError, match=r"norm.weight is float32 \[64\], expected float16 \[64"):
        writer.write("norm.weight", np.zeros(64, np.float32))
    with pytest.raises(PackageError, match=r"num_layer 2, the manifest 3"):
        WorkspaceWriter(tmp_path, dataclasses.replace(INT4, num_hidden_layers=3)).write_config(
            config_of(INT4)
        )
    assert list_files(tmp_path) == ()


def test_views_are_written_in_row_order(tmp_path):
    writer = WorkspaceWriter(tmp_path, FP16)
    matrix = np.arange(70 * 64, dtype=np.float16).reshape(64, 70)
    writer.write("output.weight", matrix.T)
    assert weight(tmp_path, "output.weight").read_bytes() == matrix.T.tobytes()


def test_large_tensors_are_written_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("device_runtime.package_format.workspace._CHUNK_BYTES", 3 * 128)
    writer = WorkspaceWriter(tmp_path, FP16)
    array = random_array(writer.spec("output.weight"))
    writer.write("output.weight", array)
    assert weight(tmp_path, "output.weight").read_bytes() == array.tobytes()


def test_finish_names_what_is_missing(tmp_path):
    writer = WorkspaceWriter(tmp_path, INT4)
    with pytest.raises(PackageError, match=r"has no config.ini, write it before finish"):
        writer.finish()
    writer.write_config(config_of(INT4))
    for spec in tensor_specs(INT4, has_kv_scales=False):
        with pytest.raises(PackageError, match=f"{spec.name} is missing from .*, expected"):
            writer.finish()
        writer.write(spec.name, random_array(spec))
    writer.finish()
    writer.write_kv_scale(0, 0, KvScale(1.0, 0.0, 1.0, 0.0))
    with pytest.raises(PackageError, match=r"has 1 past_kv_scale files, expected 2 or none"):
        writer.finish()
    writer.write_kv_scale(1, 0, KvScale(2.0, 0.5, 1.0, 0.0))
    writer.finish()
    assert open_package(tmp_path).kv_scale(1) == KvScale(2.0, 0.5, 1.0, 0.0)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    durable.write_atomically(path, b"old")
    with pytest.raises(RuntimeError, match=r"disk"), durable.replacing(path) as file:
        file.write(b"new")
        raise RuntimeError("disk")
    assert path.read_bytes() == b"old"
    assert list_files(tmp_path) == ("file",)
    durable.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_one_sentence(tmp_path):
    (tmp_path / "no-folder").write_bytes(b"")
    with pytest.raises(DeviceError, match=r"cannot write .*no-folder/file: Not a directory"):
        durable.write_atomically(tmp_path / "no-folder" / "file", b"new")
    writer = WorkspaceWriter(tmp_path, INT4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(DeviceError, match=rf"cannot write .*{QWEIGHT}: File too large"):
            writer.write(QWEIGHT, np.zeros(1024, "<u4"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list_files(tmp_path) == ("no-folder",)


def test_hashes_are_those_of_sha256(tmp_path):
    (tmp_path / "b").write_bytes(b"abc")
    (tmp_path / "a").write_bytes(b"")
    # FIPS 180-4's example for "abc", and the hash of nothing.
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert hash_files(tmp_path, ("b", "a")) == (FileEntry("a", 0, nothing), FileEntry("b", 3, abc))
    with pytest.raises(PackageError, match=r"^c is missing from"):
        hash_files(tmp_path, ("c",))


def test_progress_of_hashing_comes_one_call_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("device_runtime.package_format.checksums._CHUNK_BYTES", 7)
    for name in "abcdef":
        (tmp_path / name).write_bytes(bytes(100))
    busy = threading.Lock()
    seen = []

    def progress(done, total):
        assert busy.acquire(blocking=False)
        seen.append(done)
        assert total == 600
        time.sleep(0.0005)
        busy.release()

    hash_files(tmp_path, tuple("abcdef"), progress)
    assert seen == sorted(seen)
    assert seen[-1] == 600


def test_listing_finds_links_and_hidden_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".hidden").write_bytes(b"")
    (tmp_path / "a-link").symlink_to("b")
    assert list_files(tmp_path) == ("a-link", "b/.hidden")


def test_files_of_any_size_are_allowed_without_a_size(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    assert check_file(tmp_path, "a") == 3
    assert check_file(tmp_path, "a", 4, 3) == 3
    with pytest.raises(PackageError, match=r"a has 3 bytes, expected 4"):
        check_file(tmp_path, "a", 4)

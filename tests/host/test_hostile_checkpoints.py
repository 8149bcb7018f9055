"""Damaged and hostile checkpoints end in one sentence; nothing in them runs."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import save_file

from device_runtime.errors import DeviceError, PackageError
from host_tools.checkpoint import Checkpoint, tensor_files
from host_tools.checkpoint.tensor_files import PickledFile, SafetensorsFile, TensorFiles
from host_tools.checkpoint_names import MAX_INDEX_BYTES
from host_tools.json_file import MAX_CONFIG_BYTES

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_llama(tmp_path / "checkpoint")


@pytest.fixture
def sharded(folder: Path) -> Path:
    tiny.write_shards(folder, tiny.read_tensors(folder), 2)
    return folder


def refused(folder: Path, complaint: str) -> None:
    with pytest.raises(PackageError, match=complaint):
        Checkpoint.open(folder)


class Payload:
    """Runs a command when a careless unpickler meets it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


def test_a_pickle_with_code_is_not_executed(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload(tmp_path / "owned")}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin is no plain torch file of tensors")
    assert not (tmp_path / "owned").exists()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torch_files_hold_tensors_and_nothing_else(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    refused(folder, "holds a list, expected tensors")
    torch.save({"epoch": 3}, folder / "pytorch_model.bin")
    refused(folder, "holds 'epoch', which is no tensor")
    torch.save({"huge": torch.zeros(1).expand(10**6)}, folder / "pytorch_model.bin")
    refused(folder, "tensor huge of pytorch_model.bin claims 1000000 elements")
    nested = torch.nested.as_nested_tensor([torch.zeros(2), torch.zeros(3)])
    torch.save({"ragged": nested}, folder / "pytorch_model.bin")
    refused(folder, "tensor ragged of pytorch_model.bin claims 5 elements")
    (folder / "pytorch_model.bin").write_bytes(b"not a zip at all")
    refused(folder, "is no plain torch file")


def test_parameters_of_a_torch_file_are_tensors_without_gradients(folder: Path) -> None:
    tensors = tiny.read_tensors(folder)
    (folder / "model.safetensors").unlink()
    parameters = {name: torch.nn.Parameter(value) for name, value in tensors.items()}
    torch.save(parameters, folder / "pytorch_model.bin")
    checkpoint = Checkpoint.open(folder)
    for name, value in tensors.items():
        assert not checkpoint.tensor(name).requires_grad
        assert np.array_equal(checkpoint.tensor(name).numpy(), value.numpy())


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors_are_refused(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int(len(data) * keep) if isinstance(keep, float) else keep
    path.write_bytes(data[:size])
    refused(folder, "model.safetensors is no whole safetensors file")


def test_a_header_that_claims_more_than_the_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    refused(folder, "is no whole safetensors file")


def test_a_dtype_of_no_checkpoint_is_refused(folder: Path) -> None:
    tensors = tiny.read_tensors(folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "tensor model.norm.weight of model.safetensors has dtype F8_E4M3")


def test_integers_where_floats_belong_are_refused(folder: Path) -> None:
    tensors = tiny.read_tensors(folder)
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "model.norm.weight is torch.int32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(folder: Path, value: float) -> None:
    tensors = tiny.read_tensors(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    checkpoint.layer(0)
    with pytest.raises(PackageError, match=r"1.mlp.up_proj.weight .* holds NaN or infinity"):
        checkpoint.layer(1)


def test_scales_beyond_fp16_are_refused(folder: Path) -> None:
    tensors = tiny.quantize_tensors(tiny.read_tensors(folder), 32, scales_dtype=torch.float32)
    tensors["model.layers.0.mlp.up_proj.scales"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(PackageError, match="holds a scale that fp16 cannot"):
        Checkpoint.open(folder).layer(0)


def test_incomplete_awq_tensors_are_refused(folder: Path) -> None:
    whole = tiny.quantize_tensors(tiny.read_tensors(folder), 32)
    module = "model.layers.0.mlp.up_proj"
    for change, complaint in (
        ({f"{module}.scales": None}, "up_proj.scales is missing beside qweight"),
        ({f"{module}.qzeros": None}, "up_proj.qzeros is missing"),
        ({f"{module}.scales": torch.zeros(1, 96).half()}, r"mixes group sizes \[32, 64\]"),
        ({f"{module}.scales": torch.zeros(3, 96).half()}, "which is no AWQ gemm pair"),
        ({f"{module}.qzeros": torch.zeros(2, 11, dtype=torch.int32)}, "up_proj.qzeros is .*means"),
    ):
        tensors = {key: change.get(key, value) for key, value in whole.items()}
        save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
        refused(folder, complaint)


def test_tensors_that_the_family_does_not_have_are_refused(folder: Path) -> None:
    tensors = tiny.read_tensors(folder)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, folder / "model.safetensors")
    Checkpoint.open(folder)
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(16)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "q_norm.weight has no place in a llama model")


def test_an_index_that_points_outside_is_refused(sharded: Path) -> None:
    for target in ("../secret.safetensors", "/etc/passwd", "..", "a\\b", ""):
        (sharded / INDEX).write_text(json.dumps({"weight_map": {"x": target}}))
        refused(sharded, "outside of the checkpoint's folder")


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        (None, "says that tensor 'x' is in None, expected the name of a file; fetch it again"),
        (["model.safetensors"], r"tensor 'x' is in \['model.safetensors'\], expected the name"),
        # 129 letters of two bytes each
        ("é" * 129, "points to 'é{80}' and on, a name of 258 bytes, expected at most 255; fetch"),
        ("a" * 5000, "points to 'a{80}' and on, a name of 5000 bytes, expected at most 255"),
        ("\ud800", "is missing in"),
    ],
)
def test_an_index_that_names_no_file_is_refused(sharded: Path, file, complaint: str) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"x": file}}))
    refused(sharded, complaint)


def test_an_index_that_is_no_index_is_refused(sharded: Path) -> None:
    for text, complaint in (
        ("{", "index.json is no JSON"),
        ("[" * 100_000, "index.json is no JSON"),
        ("[]", "index.json holds no JSON object"),
        ("{}", "index.json has no weight_map"),
        ('{"weight_map": 3}', "index.json has no weight_map"),
    ):
        (sharded / INDEX).write_text(text)
        refused(sharded, complaint)
    (sharded / INDEX).write_text('{"weight_map": {}}')
    refused(sharded, "lists no tensors")


def test_an_index_of_absurd_size_is_not_read(sharded: Path) -> None:
    with (sharded / INDEX).open("wb") as stream:
        stream.truncate(MAX_INDEX_BYTES + 1)
    refused(sharded, f"has {MAX_INDEX_BYTES + 1} bytes, expected at most")


def test_an_index_must_agree_with_its_shards(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "model-00002-of-00002.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "is in model-00002-of-00002.safetensors, which does not hold it")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, "model-00002-of-00002.safetensors is missing")
    (sharded / INDEX).unlink()
    refused(sharded, "model-00001-of-00002.safetensors is one of 2 shards, 1 belong")


def test_a_shard_of_another_set_is_named(sharded: Path) -> None:
    extra = sharded / "model-00003-of-00003.safetensors"
    save_file({"x": torch.zeros(1)}, extra)
    refused(sharded, "model-00003-of-00003.safetensors lies beside the 2 shards")


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "other.safetensors")
    refused(folder, "tensor model.norm.weight is in model.safetensors and in other.safetensors")


def test_folders_without_a_checkpoint_are_refused(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "nowhere", "is no folder")
    refused(tmp_path, "has no readable config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(PackageError, match=r"has no model\.safetensors, pytorch_model\.bin"):
        TensorFiles.open(folder)


def test_a_config_that_is_no_object_is_refused(folder: Path) -> None:
    for text, complaint in (
        ("{", "config.json is no JSON"),
        ("[" * 100_000, "config.json is no JSON"),
        ("[]", "holds no JSON object"),
        (" " * (MAX_CONFIG_BYTES + 1), f"has {MAX_CONFIG_BYTES + 1} bytes"),
    ):
        (folder / "config.json").write_text(text)
        refused(folder, complaint)


def test_a_byte_order_mark_before_a_config_is_read_over(sharded: Path) -> None:
    expected = Checkpoint.open(sharded)
    for name in ("config.json", INDEX):
        (sharded / name).write_bytes(b"\xef\xbb\xbf" + (sharded / name).read_bytes())
    found = Checkpoint.open(sharded)
    assert (found.model, found.names()) == (expected.model, expected.names())


def test_links_of_a_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--team--tiny"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    source = tiny.write_llama(tmp_path / "source")
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / f"sha{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/sha{number}")
    assert Checkpoint.open(snapshot).model.num_hidden_layers == 2
    # What lies beside the blobs is no blob.
    (repository / "refs").write_text("{}")
    (snapshot / "generation_config.json").symlink_to("../../refs")
    refused(snapshot, "generation_config.json in .* is a link that leads out of it")


def test_weights_may_lie_elsewhere_and_settings_inside(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    (folder / "settings").mkdir()
    (folder / "config.json").rename(folder / "settings" / "config.json")
    (folder / "config.json").symlink_to("settings/config.json")
    Checkpoint.open(folder)


def test_a_path_that_is_not_utf8_is_told_of(folder: Path, monkeypatch) -> None:
    other = folder.with_name(os.fsdecode(b"r\xe9sum\xe9"))
    folder.rename(other)
    refused(other, r"^the path .*/r\udce9sum\udce9 is not UTF-8, rename what is not")
    monkeypatch.chdir(other)
    refused(Path(), r"^the path .*/r\udce9sum\udce9 is not UTF-8")


@pytest.mark.parametrize("opener", [SafetensorsFile, PickledFile])
def test_a_weight_file_whose_name_is_not_utf8_is_told_of(tmp_path: Path, opener) -> None:
    path = tmp_path / os.fsdecode(b"mod\xe9l")
    path.write_bytes(b"")
    with pytest.raises(PackageError, match=r"^the path .*/mod\udce9l is not UTF-8, rename"):
        opener(path)


def test_a_shard_that_cannot_be_mapped_is_the_machines_fault(folder: Path, monkeypatch) -> None:
    def refuse(path: Path, **more: object) -> None:
        # What torch says of a file of 1 TB.
        raise RuntimeError(
            f"unable to mmap 9 bytes from file <{path}>: Cannot allocate memory (12)"
        )

    monkeypatch.setattr(tensor_files, "safe_open", refuse)
    size = (folder / "model.safetensors").stat().st_size
    complaint = (
        rf"^model.safetensors has {size} bytes, .* map \(Cannot allocate memory \(12\)\); take"
    )
    with pytest.raises(DeviceError, match=complaint):
        Checkpoint.open(folder)


def test_weights_that_cannot_be_read_are_named(folder: Path, monkeypatch) -> None:
    opened = Path.open

    def refuse(self: Path, *arguments: object, **more: object):
        if self.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)
    refused(folder, r"model.safetensors cannot be read \(Permission denied\)")

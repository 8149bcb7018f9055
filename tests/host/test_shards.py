"""Safetensors files written in a stream are those that the library reads."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from device_runtime.errors import DeviceError, InternalError
from host_tools.shards import TensorPlan, split_shards, write_shards

ARRAYS = {
    "a": np.arange(12, dtype=np.float16).reshape(3, 4),
    "b": np.arange(5, dtype=np.int32),
    "c": np.arange(6, dtype=np.uint8).reshape(2, 3),
}
PLANS = [TensorPlan(name, array.dtype.name, array.shape) for name, array in ARRAYS.items()]


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    rows = (
        [row[None] for row in array] if array.ndim > 1 else [array] for array in ARRAYS.values()
    )
    assert write_shards(tmp_path, PLANS, rows) == [tmp_path / "model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_the_bytes_are_the_header_and_then_the_tensors(tmp_path: Path) -> None:
    write_shards(tmp_path, PLANS[1:2], [[ARRAYS["b"]]])
    header = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"I32","shape":[5],"data_offsets":[0,20]}}'
    )
    assert len(header) == 86  # so two blanks pad it to 88
    expected = (88).to_bytes(8, "little") + header + b"  " + ARRAYS["b"].tobytes()
    assert (tmp_path / "model.safetensors").read_bytes() == expected


def test_a_shard_is_closed_before_it_grows_too_large(tmp_path: Path) -> None:
    # a has 24 bytes, b 20, c 6: 24 | 20 + 6
    paths = write_shards(tmp_path, PLANS, [[array] for array in ARRAYS.values()], 30)
    assert [path.name for path in paths] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads(paths[-1].read_text())
    assert index["metadata"] == {"total_size": 50}
    assert index["weight_map"] == {"a": paths[0].name, "b": paths[1].name, "c": paths[1].name}
    np.testing.assert_array_equal(load_file(paths[1])["c"], ARRAYS["c"])


def test_a_tensor_larger_than_a_shard_gets_its_own() -> None:
    assert [len(group) for _, group in split_shards(PLANS, 1)] == [1, 1, 1]


def test_a_full_disk_is_said_with_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # less than the header
    try:
        with pytest.raises(DeviceError, match=r"cannot write .*model\.safetensors: File too large"):
            write_shards(tmp_path, PLANS[1:2], [[ARRAYS["b"]]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_parts_of_another_type_or_size_are_our_own_mistake(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="tensor b came as float64, planned int32"):
        write_shards(tmp_path, PLANS[1:2], [[np.zeros(5)]])
    with pytest.raises(InternalError, match="tensor b came with 16 bytes, planned 20"):
        write_shards(tmp_path, PLANS[1:2], [[ARRAYS["b"][:4]]])

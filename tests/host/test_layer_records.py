"""Records of layers: written, read back, refused when damaged."""

from pathlib import Path

import pytest

from device_runtime.errors import PackageError
from host_tools import layer_records as records

DOWN = records.LinearRecord("down", 8, 32, 4, 10.0, 2.0, 1.5, 1.2, 0.9, 0.45, (0, 1))
KEPT = records.LinearRecord("o", 8, 8, 16)
LAYER = records.LayerRecord(3, (KEPT, DOWN), records.LayerSeconds(1.0, 2.0, 0.25, 0.5))


def test_a_layer_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    records.write_layer_record(tmp_path / "layer.json", LAYER)
    assert records.read_layer_record(tmp_path / "layer.json") == LAYER


def test_a_quantization_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    record = records.QuantizeRecord("ab" * 32, "awq", 32, "cpu", (LAYER,))
    assert records.write_quantize_record(tmp_path, record) == tmp_path / records.LAYER_RECORDS
    assert records.read_quantize_record(tmp_path) == record


def test_without_a_record_there_is_none(tmp_path: Path) -> None:
    assert records.read_quantize_record(tmp_path) is None


def test_the_final_error_is_that_of_the_last_step_taken() -> None:
    assert DOWN.final == 0.9
    assert records.LinearRecord("down", 8, 32, 4, 10.0, 2.0, 1.5).final == 1.5
    assert KEPT.final is None


def test_kept_shares_are_counted_to_the_nearest_fortieth() -> None:
    # 1.0 is number 40, 0.975 number 39; 0.52 * 40 = 20.8 goes to 21.
    counts = records.clip_counts([1.0, 1.0, 0.975, 0.52])
    assert len(counts) == 41
    assert {place: count for place, count in enumerate(counts) if count} == {40: 2, 39: 1, 21: 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "layer_records.json is not JSON"),
        (b"{}", "layer_records.json lacks the key 'fingerprint'"),
        (b'{"extra": 1}', "unknown key 'extra'"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / records.LAYER_RECORDS).write_bytes(content)
    with pytest.raises(PackageError, match=message):
        records.read_quantize_record(tmp_path)


def test_a_missing_layer_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"layer\.json cannot be read"):
        records.read_layer_record(tmp_path / "layer.json")

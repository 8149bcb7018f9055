from pathlib import Path

import pytest

from device_runtime.errors import UsageError
from host_tools.adapter_folder import adapt
from host_tools.build import build
from host_tools.calibrate import calibrate
from host_tools.convert import convert
from host_tools.options import CalibrateOptions, QuantizeOptions
from host_tools.output_folder import check_outside
from host_tools.pack import pack
from host_tools.package_options import BuildOptions, ConvertOptions, PackOptions
from host_tools.progress import Progress
from host_tools.quantize import quantize

REFUSED = "lies in .*, which stays as it is; name a place outside of it"


def test_places_beside_a_checkpoint_are_outside_of_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    check_outside(checkpoint, tmp_path / "model.work", tmp_path, checkpoint / ".." / "out")
    (tmp_path / "link").symlink_to(checkpoint)
    for place in (checkpoint, checkpoint / "work", tmp_path / "link" / "work"):
        with pytest.raises(UsageError, match=REFUSED):
            check_outside(checkpoint, tmp_path, place)


@pytest.mark.parametrize(
    "run",
    [
        lambda model, away: calibrate(model, model / "w", CalibrateOptions(), Progress()),
        lambda model, away: quantize(model, model, away, QuantizeOptions(), Progress()),
        lambda model, away: quantize(model, away, model / "awq", QuantizeOptions(), Progress()),
        lambda model, away: convert(model, model / "tm", ConvertOptions("tiny"), Progress()),
        lambda model, away: build(str(model), model / "x.tgz", away, BuildOptions(), Progress()),
        lambda model, away: build(str(model), away, model / "w", BuildOptions(), Progress()),
        lambda model, away: adapt(model, away, model / "merged", Progress()),
        lambda model, away: pack(model, model / "x.tgz", PackOptions("thor"), Progress()),
    ],
    ids=[
        "calibrate",
        "quantize in",
        "quantize to",
        "convert",
        "build to",
        "build in",
        "adapt",
        "pack",
    ],
)
def test_no_stage_writes_into_the_checkpoint(tmp_path: Path, run) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match=REFUSED):
        run(tmp_path / "model", tmp_path / "away")
    assert list((tmp_path / "model").iterdir()) == []

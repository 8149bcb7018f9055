"""Every verb through the command line on a tiny checkpoint: what it prints, where, and when."""

import json

import pytest
from test_build import source  # noqa: F401  the fixture
from tiny_tokenizer import VOCAB_SIZE

from device_runtime.package_format.boards import BOARDS
from device_runtime.package_format.package import open_package
from host_tools import cli


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):  # noqa: F811  the fixture
    """Folders that the verbs, run one after another, have filled."""
    folder = tmp_path_factory.mktemp("stages")
    return source, folder


def run(capsys, *argv):
    """Run a verb; return the lines of stdout and stderr."""
    code = cli.main([str(arg) for arg in argv])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out.splitlines(), shown.err.splitlines()


def test_the_stages_one_by_one(made, capsys):
    source, folder = made  # noqa: F811
    text = source.parent / "text.txt"
    out, _ = run(capsys, "fetch", source, "--output", folder / "checkpoint")
    assert out == [str(source)]

    work = folder / "work"
    calibration = ["--calib-dataset", text, "--calib-samples", "2", "--calib-seqlen", "64"]
    out, err = run(capsys, "calibrate", source, "--work-dir", work, *calibration, "--device", "cpu")
    assert out == [str(work)]
    assert err[0].startswith(f"calibrate: 2 x 64 tokens of {text} on the CPU take about ")
    assert err[-2].startswith("calibrate on cpu: 2 of 2 layers in ")
    assert err[-1].startswith("calibrate took ")

    out, _ = run(
        capsys, "quantize", source, "--work-dir", work, "--output", folder / "awq",
        "--w-bits", "4", "--w-group-size", "64", "--device", "cpu",
    )  # fmt: skip
    assert out == [str(folder / "awq")]

    out, err = run(
        capsys, "convert", folder / "awq", "--model-name", "tiny", "--output", folder / "tm",
        "--group-size", "64", "--quant-policy", "4",
    )  # fmt: skip
    assert out == [str(folder / "tm")]
    assert err[-1].startswith("convert: 3 of 3 parts in ")

    out, _ = run(capsys, "kv-qparams", work, folder / "tm", "--kv-bits", "8", "--tp", "1")
    assert out == [str(folder / "tm")]
    package = open_package(folder / "tm")
    assert package.has_kv_scales
    assert package.config.quant_policy == 4

    out, err = run(
        capsys,
        "pack",
        folder / "tm",
        "--output",
        folder / "x.tgz",
        "--kernels",
        "none",
        "--target",
        "thor,orin-nx-8gb",
    )
    assert out == [str(folder / "x.tgz")]
    assert any(line.startswith("orin-nx-8gb: weights ") for line in err)

    out, _ = run(
        capsys, "evaluate", source, folder / "x.tgz", "--dataset", text, "--samples", "2",
        "--seqlen", "32", "--json",
    )  # fmt: skip
    report = json.loads("\n".join(out))
    assert [result["target"] for result in report["results"]] == [
        str(source), str(folder / "x.tgz"),
    ]  # fmt: skip
    # random weights know little: about one in VOCAB_SIZE
    assert all(1 < result["perplexity"] < 100 * VOCAB_SIZE for result in report["results"])
    assert len(report["comparisons"]) == 1

    out, _ = run(
        capsys, "evaluate", source, folder / "awq", "--dataset", text, "--samples", "1",
        "--seqlen", "32",
    )  # fmt: skip
    assert out[0].startswith("1 windows of 32 tokens of text.txt")
    assert any("AWQ" in line for line in out)


def test_build_prints_a_table_and_the_archive_last(made, capsys):
    source, folder = made  # noqa: F811
    text = source.parent / "text.txt"
    argv = [
        "build", source, "--output", folder / "b.tgz", "--kernels", "none", "--calib-dataset", text,
        "--calib-samples", "2", "--calib-seqlen", "64", "--device", "cpu", "--method", "rtn",
        "--model-name", "robot", "--target", "thor",
    ]  # fmt: skip
    out, _ = run(capsys, *argv)
    assert out[0].strip() == "build of robot"
    assert out[-1] == str(folder / "b.tgz")
    table = "\n".join(out)
    for word in ("stage", "seconds", "peak memory", "size", "quantize", "convert", "pack", "MB"):
        assert word in table
    assert "kept" not in table
    # The checkpoint was made for 256 tokens, which fit a Thor in both formats.
    board = next(line.replace("│", " ").split() for line in out if "thor" in line)
    assert board[-2:] == ["256", "256"]
    assert int(board[4]) == BOARDS["thor"].usable_bytes >> 20
    assert (folder / "b.work").is_dir()

    out, _ = run(capsys, *argv, "--json")
    report = json.loads("\n".join(out))
    assert report["archive"] == str(folder / "b.tgz")
    assert report["name"] == "robot"
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert list(stages) == ["fetch", "quantize", "convert", "pack"]
    assert all(stages[name]["is_kept"] for name in ("quantize", "convert", "pack"))
    assert set(stages["pack"]) == {
        "name", "seconds_s", "peak_anon_bytes", "size_bytes", "is_kept", "result",
    }  # fmt: skip
    assert stages["pack"]["size_bytes"] == (folder / "b.tgz").stat().st_size
    assert report["memory"][0]["board"] == "thor"
    assert report["longest"] == [{"board": "thor", "int8_tokens": 256, "fp16_tokens": 256}]


def test_a_build_of_something_unknown_names_it(made, capsys):
    _, folder = made
    assert cli.main(["build", "no-such-model", "--output", str(folder / "n.tgz")]) == 2
    assert "no-such-model" in capsys.readouterr().err

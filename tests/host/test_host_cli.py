"""The command line: help without torch, exit codes, one sentence for every error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import OutOfMemoryError

from device_runtime import __version__
from device_runtime.errors import FetchError, PackageError, UsageError
from host_tools import cli, commands
from host_tools.options import CalibrateOptions, EvaluateOptions, QuantizeOptions
from host_tools.package_options import BuildOptions, ConvertOptions, KvQparamsOptions, PackOptions

ROOT = Path(__file__).resolve().parents[2]
VERBS = ("fetch", "calibrate", "quantize", "convert", "kv-qparams", "pack", "build", "evaluate")

# What each verb needs to be complete.
MINIMAL = {
    "fetch": ["src", "--output", "d"],
    "calibrate": ["ckpt", "--work-dir", "w"],
    "quantize": ["ckpt", "--work-dir", "w", "--output", "awq"],
    "convert": ["awq", "--model-name", "m", "--output", "tm"],
    "kv-qparams": ["w", "tm"],
    "pack": ["tm", "--output", "x.tgz"],
    "build": ["src", "--output", "x.tgz"],
    "evaluate": ["ckpt"],
}


def run_without(library, *argv):
    """Run the command in a process where a library is not installed."""
    code = (
        "import sys; from importlib.abc import MetaPathFinder\n"
        "class Missing(MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {library!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from host_tools.cli import main\n"
        f"sys.exit(main({list(argv)!r}))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def parse(verb, *more):
    return cli.build_parser().parse_args([verb, *MINIMAL[verb], *more])


def test_help_works_without_any_library_of_the_host_extra():
    for argv in (["--help"], *([verb, "--help"] for verb in VERBS)):
        done = run_without(cli.HOST_LIBRARIES, *argv)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: turbojet-host")


@pytest.mark.parametrize(
    "argv",
    [
        ["calibrate", "ckpt", "--work-dir", "w"],
        ["quantize", "ckpt", "--work-dir", "w", "--output", "awq"],
        ["convert", "ckpt", "--model-name", "m", "--output", "tm"],
        ["kv-qparams", "w", "tm"],
        ["build", "source", "--output", "x.tgz"],
        ["evaluate", "ckpt"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_verb_that_needs_torch_says_what_to_install(argv):
    done = run_without(("torch",), *argv)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "turbojet-host: torch is not installed; pip install 'turbojet-llm[host]'\n"
    )


def test_packing_needs_no_torch():
    done = run_without(cli.HOST_LIBRARIES, "pack", "nowhere", "--output", "x.tgz")
    assert done.returncode == 3
    assert "nowhere is not a folder" in done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_unknown_options_and_abbreviations_are_errors(verb, capsys):
    for flag in ("--no-such-option", "--outpu", "--calib-sample"):
        with pytest.raises(SystemExit) as stop:
            parse(verb, f"{flag}=1")
        assert stop.value.code == 2
        assert flag in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["build", "m", "--output="],
        ["build", "m", "--output=x.tgz", "--work-dir="],
        ["pack", "", "--output=x.tgz"],
    ],
)
def test_an_empty_path_is_not_the_current_folder(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "expected a path, got an empty text" in capsys.readouterr().err


def test_the_version_is_the_distributions(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"turbojet-host {__version__}\n"


def test_no_verb_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "VERB" in capsys.readouterr().err


def test_defaults_are_those_of_the_dataclasses():
    assert commands.calibrate_options(parse("calibrate")) == CalibrateOptions()
    assert commands.quantize_options(parse("quantize")) == QuantizeOptions()
    assert commands.evaluate_options(parse("evaluate")) == EvaluateOptions()
    assert commands.convert_options(parse("convert")) == ConvertOptions("m")
    assert commands.kv_options(parse("kv-qparams")) == KvQparamsOptions()
    assert commands.pack_options(parse("pack")) == PackOptions()
    assert commands.build_options(parse("build")) == BuildOptions()


def test_every_option_of_the_stages_reaches_build():
    args = parse(
        "build", "--model-name", "m", "--revision", "v1", "--include", "*.json",
        "--include", "*.st",
        "--exclude", "*.bin", "--max-workers", "2", "--calib-dataset", "c4", "--calib-samples", "8",
        "--calib-seqlen", "512", "--seed", "1", "--device", "cpu", "--w-bits", "4",
        "--w-group-size", "64", "--method", "rtn", "--kv-bits", "8", "--kv-sym", "--tp", "2",
        "--template", "llama2", "--quant-policy", "4", "--cache-max-entry-count", "0.5",
        "--cache-block-seq-len", "128", "--cache-chunk-size", "1", "--session-len", "2048",
        "--max-batch-size", "2", "--target", "thor", "--kernels", "none",
        "--keep-fp16", "*.down", "--keep-fp16", "layers.0.*", "--head", "int8",
    )  # fmt: skip
    options = commands.build_options(args)
    default = BuildOptions()
    for name in vars(default):
        expected_same = name in ("w_bits",)  # 4 is the only one there is
        assert (getattr(options, name) == getattr(default, name)) == expected_same, name
    assert options.fetch.include == ("*.json", "*.st")
    assert options.calibrate == CalibrateOptions("c4", 8, 512, "cpu", 1)
    assert options.kv == KvQparamsOptions(8, True, 0)
    assert vars(options.config) == {
        "quant_policy": 4, "cache_max_entry_count": 0.5, "cache_block_seq_len": 128,
        "cache_chunk_size": 1, "session_len": 2048, "max_batch_size": 2,
    }  # fmt: skip


def test_flags_beat_the_environment_which_beats_the_default(monkeypatch):
    monkeypatch.setenv("TURBOJET_CALIB_SAMPLES", "16")
    assert parse("calibrate").calib_samples == 16
    assert parse("calibrate", "--calib-samples", "4").calib_samples == 4


def test_a_bad_value_in_the_environment_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("TURBOJET_CALIB_SAMPLES", "many")
    with pytest.raises(SystemExit) as stop:
        parse("calibrate")
    assert stop.value.code == 2
    assert "invalid int value: 'many'" in capsys.readouterr().err
    monkeypatch.setenv("TURBOJET_CALIB_SAMPLES", "8")
    monkeypatch.setenv("TURBOJET_DEVICE", "tpu")
    with pytest.raises(UsageError, match="device is 'tpu', choose one of auto, cpu, cuda"):
        commands.calibrate_options(parse("calibrate"))


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UsageError("bad flag"), 2, "bad flag"),
        (PackageError("damaged"), 3, "damaged"),
        (FetchError("no hub"), 5, "no hub"),
        (OSError(28, "No space left on device", "/disk"), 4, "/disk: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here"),
        (RuntimeError("oops"), 1, "internal error, RuntimeError: oops; TURBOJET_DEBUG=1 shows"),
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
            4,
            "CUDA out of memory. Tried to allocate 2.00 GiB; free memory of the GPU or use",
        ),
        (ModuleNotFoundError("x", name="modelscope.hub"), 2, "modelscope is not installed; pip"),
        (ModuleNotFoundError("No module named 'y'", name="y"), 1, "internal error, ModuleNotFound"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_error_is_one_sentence_with_its_exit_code(monkeypatch, capsys, error, code, text):
    def fail(args):
        raise error

    monkeypatch.setattr(commands, "run_pack", fail)
    assert cli.main(["pack", *MINIMAL["pack"]]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"turbojet-host: {text}")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("oops"), OSError(5, "I/O error")])
def test_debugging_shows_where(monkeypatch, error):
    def fail(args):
        raise error

    monkeypatch.setattr(commands, "run_pack", fail)
    monkeypatch.setenv("TURBOJET_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["pack", *MINIMAL["pack"]])


def test_a_reader_that_went_away_is_no_traceback():
    code = (
        "import sys; from host_tools import cli, commands\n"
        "def run(args):\n"
        "    for _ in range(100000): print('x' * 100)\n"
        "commands.run_pack = run\n"
        "sys.exit(cli.main(['pack', 'tm', '--output', 'x.tgz']))"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, timeout=60
    )
    os.close(write_end)
    assert done.stderr == b""
    assert done.returncode == 1

"""The command `turbojet`: verbs, exit codes, what goes to stdout and what to stderr."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import format_samples
import pytest
from archive_samples import archive_of, members_of, tgz_of, whole_package
from fake_cuda import write_cubins

from device_runtime import __version__, cli
from device_runtime.apps import commands, progress_bar
from device_runtime.apps.model_facts import package_facts, package_lines
from device_runtime.apps.progress_bar import PlainReport, byte_progress
from device_runtime.errors import (
    DeviceError,
    InternalError,
    PackageError,
    RequestError,
    TurbojetError,
    UsageError,
)
from device_runtime.kernels.cubins import SOURCES
from device_runtime.package_format import names
from device_runtime.package_format.amounts import format_bytes, format_duration
from device_runtime.package_format.manifest import Provenance, Quantization
from device_runtime.package_format.model_config import RopeScaling
from device_runtime.package_format.package import Package

NAME = "tiny-1.0"


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    for seed in range(2):
        archive_of(whole_package(folder / f"p{seed}", seed=seed), folder / f"{seed}.tgz")
    return [str(folder / f"{seed}.tgz") for seed in range(2)]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBOJET_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv(cli.DEBUG, raising=False)
    return tmp_path / "data"


@pytest.fixture
def turbojet(capsys, data):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*argv):
        code = cli.main(argv)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def release_of(text):
    return re.search(r"release ([0-9a-f]{12}(-\d+)?)", text).group(1)


def test_a_model_from_installing_to_removing(turbojet, archives) -> None:
    assert turbojet("list") == (
        0,
        "",
        "no model is installed; `turbojet install X.tgz` installs one\n",
    )
    code, out, err = turbojet("install", archives[0])
    first = release_of(out)
    assert code == 0
    assert re.fullmatch(
        rf"installed {NAME} release {first}: 25 files, 57\.6 kB, verified, in \d\.\d s\n", out
    )
    assert err == f"talk to it: turbojet chat {NAME}\n"
    code, out, _ = turbojet("install", archives[0])
    assert out == f"{NAME} release {first} is already installed, nothing to do\n"
    second = release_of(turbojet("install", archives[1])[1])
    code, out, err = turbojet("list")
    heading, *rows = out.splitlines()
    assert heading.split() == ["NAME", "RELEASE", "WEIGHTS", "SIZE", "INSTALLED"]
    assert [row.split()[:4] for row in rows] == [
        [NAME, second, "int4", "g32"],
        [NAME, first, "int4", "g32"],
    ]
    assert rows[0].endswith("current")
    assert turbojet("rollback", NAME) == (0, f"{NAME} release {first} is current\n", "")
    code, out, _ = turbojet("install", archives[1])
    assert out == f"{NAME} release {second} was already installed and is current again\n"
    code, out, _ = turbojet("verify", NAME)
    assert re.fullmatch(
        rf"{NAME} release {second} is intact: 25 files, 57\.6 kB, read in \d\.\d s\n", out
    )
    assert turbojet("remove", NAME, "--release", first)[1] == f"removed {NAME} release {first}\n"
    assert turbojet("remove", NAME) == (0, f"removed {NAME}\n", "")
    assert turbojet("list")[1] == ""


def test_removing_old_releases_keeps_the_current_one(turbojet, archives) -> None:
    for archive in archives:
        turbojet("install", archive)
    current = json.loads(turbojet("list", "--json")[1])[0]["release"]
    assert turbojet("remove", NAME, "--old")[1] == f"removed 1 old releases of {NAME}\n"
    assert [row["release"] for row in json.loads(turbojet("list", "--json")[1])] == [current]
    assert turbojet("remove", NAME, "--old")[1] == f"removed 0 old releases of {NAME}\n"
    code, _, err = turbojet("remove", "other", "--old")
    assert (code, err) == (2, f"turbojet: no model is called 'other'; installed: {NAME}\n")


def test_a_release_that_is_not_activated_says_how_to(turbojet, archives) -> None:
    turbojet("install", archives[0])
    _, out, err = turbojet("install", archives[1], "--no-activate", "--name", NAME)
    release = release_of(out)
    assert err == f"make it current: turbojet rollback {NAME} --release {release}\n"
    code, out, _ = turbojet("rollback", NAME, "--release", release)
    assert (code, out) == (0, f"{NAME} release {release} is current\n")


def test_machines_get_json(turbojet, archives, data) -> None:
    installed = json.loads(turbojet("install", archives[0], "--json")[1])
    root = data / "models" / NAME / installed["release"]
    assert installed.pop("seconds") >= 0
    assert installed == {
        "name": NAME,
        "release": installed["release"],
        "outcome": "installed",
        "is_current": True,
        "path": str(root),
        "size_bytes": sum(
            p.stat().st_size for p in root.rglob("*") if p.is_file() and p.name != names.MANIFEST
        ),
        "num_files": 25,
    }
    rows = json.loads(turbojet("list", "--json")[1])
    assert rows[0].pop("installed_at").endswith("+00:00")
    assert rows == [
        {
            "name": NAME,
            "release": installed["release"],
            "is_current": True,
            "weights": "int4 g32",
            "size_bytes": rows[0]["size_bytes"],
            "damage": "",
        }
    ]
    verified = json.loads(turbojet("verify", NAME, "--json")[1])
    assert verified["is_intact"] is True
    assert (verified["num_files"], verified["size_bytes"]) == (25, installed["size_bytes"])
    facts = json.loads(turbojet("info", NAME, "--json")[1])
    assert facts["release"] == installed["release"]
    assert facts["model"]["num_hidden_layers"] == 2
    assert facts["quantization"]["group_size"] == 32
    assert facts["config"]["session_len"] == 136
    assert facts["memory"][0]["board"] == "orin-nano-8gb"
    assert json.loads(turbojet("install", archives[0], "--json")[1])["outcome"] == "unchanged"
    assert turbojet("list", "--json")[2] == ""


def test_info_tells_a_person_everything(turbojet, archives, data) -> None:
    turbojet("install", archives[0])
    code, out, err = turbojet("info", NAME)
    assert (code, err) == (0, "")
    lines = {line[:10].strip(): line[11:].strip() for line in out.splitlines()}
    assert lines["name"] == NAME
    assert lines["release"].endswith(", current")
    assert lines["installed"].endswith("from 0.tgz")
    assert lines["model"] == "2 layers of 64, 2 heads on 1 KV heads of 32, vocabulary 70"
    # 2 layers x 128 tokens x (K and V) x 1 head x 32 halves
    assert lines["KV cache"] == ("fp16; 128 tokens a page of 32.8 kB; cache_max_entry_count 0.8")
    assert lines["session"] == "136 tokens, up to 64 at a time"
    assert lines["origin"] == "Shanghai_AI_Laboratory/tiny (modelscope), revision v1.0.3"
    assert lines["quantized"] == "awq, 4 bits; calibrated on 8 x 512 tokens of c4"
    assert lines["template"] == "internlm2-chat (builtin)"
    assert lines["boards"] == "orin-nano-8gb"
    # 500 + 100 + 10 x 40 = 1000
    assert lines["planned"] == (
        "orin-nano-8gb: weights 500 B + workspace and process 100 B + KV 10 x 40 B = 1.0 kB of "
        "1.0 kB; sessions of 640 tokens"
    )


def test_info_shows_the_memory_plan_for_this_machine(turbojet, archives) -> None:
    turbojet("install", archives[0])
    options = ("--backend", "reference", "--memory-limit", "1G", "--cache-max-entry-count", "3")
    out = turbojet("info", NAME, *options)[1]
    # 3 pages of 128 tokens x 2 layers x (K and V) x 1 head x 32 halves.
    pattern = r"here +reference: weights .* \+ KV 3 x 32\.8 kB = .* of 1\.07 GB available\n"
    assert re.search(pattern, out)
    assert "fp16 KV; sessions of 136 tokens, up to 64 at a time\n" in out
    plan = json.loads(turbojet("info", NAME, "--json", *options)[1])["plan"]
    assert (plan["num_pages"], plan["page_bytes"], plan["kv_bytes"]) == (3, 32768, 98304)
    assert plan["available_bytes"] == 1 << 30
    assert plan["total_bytes"] == sum(
        plan[f"{part}_bytes"] for part in ("weight", "workspace", "context", "kv")
    )


def test_info_says_why_a_model_does_not_fit(turbojet, archives) -> None:
    turbojet("install", archives[0])
    for options, reason in (
        (("--memory-limit", "1M"), "one KV page needs 32768 bytes"),
        (("--quant-policy", "4"), "past_kv_scale"),
    ):
        code, out, _ = turbojet("info", NAME, "--backend", "reference", *options)
        assert code == 0
        assert reason in out.splitlines()[-1]
        facts = json.loads(turbojet("info", NAME, "--json", *options)[1])
        assert reason in facts["plan"]["error"]
    code, _, err = turbojet("info", NAME, "--memory-limit", "much")
    assert code == 2
    assert "--memory-limit is 'much'" in err


def test_info_names_what_is_special_about_a_model(tmp_path) -> None:
    model = dataclasses.replace(
        format_samples.FP16,
        tie_word_embeddings=True,
        has_attention_bias=True,
        has_qk_norm=True,
        rope_scaling=RopeScaling(kind="linear", factor=2.0),
    )
    config = format_samples.config_of(model, quant_policy=2)
    manifest = format_samples.manifest_of(
        model,
        provenance=Provenance(source="x", source_kind="folder"),
        quantization=Quantization("none", 16, 0, kv_scales="symmetric"),
        memory=(),
        target_boards=(),
    )
    package = Package(tmp_path, manifest, config, model, specs=())
    lines = {line.label: line.text for line in package_lines(package, None)}
    assert lines["kernels"].startswith("none: it runs on the reference engine")
    write_cubins(tmp_path / names.KERNELS_DIR, sm=87, cuda="12.6")
    lines = {line.label: line.text for line in package_lines(package, None)}
    assert lines["model"].endswith("vocabulary 70, biases, q/k norms, rope scaling linear")
    assert lines["weights"] == "0 B: fp16, head tied to the embeddings"
    assert lines["KV cache"].startswith("quant_policy 2, which this turbojet does not run;")
    assert lines["package"] == "not packed yet, format 1"
    assert lines["origin"] == "x (folder)"
    assert lines["quantized"] == "none, 16 bits, symmetric KV scales"
    assert lines["boards"] == "not planned"
    number, size = len(SOURCES), 5 * len(SOURCES)  # "cubin" in each
    assert lines["kernels"] == f"sm_87 by CUDA 12.6 ({number} files, {size} B)"
    assert package_facts(package, None)["kernels"] == ["sm_87 by CUDA 12.6"]
    int8_head = dataclasses.replace(model, tie_word_embeddings=False, head_type="int8")
    package = dataclasses.replace(package, model=int8_head)
    lines = {line.label: line.text for line in package_lines(package, None)}
    assert lines["weights"] == "0 B: fp16, head int8"
    kept = ("layers.0.attention.wo", "layers.1.feed_forward.w2")
    mixed = dataclasses.replace(
        int8_head,
        weight_type="int4",
        group_size=32,
        fp16_linears=kept,
        tie_word_embeddings=True,
    )
    lines = {
        line.label: line.text
        for line in package_lines(dataclasses.replace(package, model=mixed), None)
    }
    assert lines["weights"] == "0 B: int4, groups of 32, 2 matrices fp16, head int8"


def test_info_and_verify_take_a_folder_too(turbojet, archives, tmp_path) -> None:
    package = Path(archives[0]).parent / "p0"
    assert f"path       {package}\n" in turbojet("info", str(package))[1]
    assert turbojet("verify", str(package))[1].startswith(f"{package} is intact: 25 files")
    plain = format_samples.write_workspace(tmp_path / "ws", format_samples.INT4)
    assert "none: a plain LMDeploy workspace" in turbojet("info", str(plain))[1]
    code, _, err = turbojet("verify", str(plain))
    assert code == 3
    assert "lists no hashes to compare with" in err
    code, _, err = turbojet("info", str(package), "--release", "0123456789ab")
    assert (code, "no model is called" in err) == (2, True)


def test_a_workspace_of_lmdeploy_is_a_model_like_any_other(turbojet, tmp_path) -> None:
    plain = format_samples.write_workspace(tmp_path / "ws", format_samples.INT4)
    (tmp_path / "ws.tgz").write_bytes(tgz_of(*members_of(plain)))
    assert turbojet("install", str(tmp_path / "ws.tgz"), "--name", "mine")[0] == 0
    assert turbojet("verify", "mine")[0] == 0
    assert "none: a plain LMDeploy workspace" in turbojet("info", "mine")[1]


def test_a_damaged_model_is_listed_as_such(turbojet, archives, data) -> None:
    release = release_of(turbojet("install", archives[0])[1])
    weight = data / "models" / NAME / release / names.weight_path(names.FINAL_NORM)
    weight.write_bytes(b"")
    assert turbojet("list")[1].splitlines()[1].endswith("  current, damaged")
    damage = (
        f"turbojet: {NAME} is damaged: {names.weight_path(names.FINAL_NORM)} has 0 bytes, "
        "expected 128; `turbojet install --force` of its archive repairs it\n"
    )
    for verb in ("verify", "info", "chat", "bench"):
        assert turbojet(verb, NAME) == (3, "", damage), verb
    # A path is taken as one, whatever is behind it.
    code, out, err = turbojet("info", str(data / "models" / NAME / "current"))
    assert (code, out, "has 0 bytes, expected 128" in err) == (3, "", True)
    assert "installed" in turbojet("install", archives[0])[1]
    assert turbojet("verify", NAME)[0] == 0


def test_a_release_of_a_later_format_is_not_called_damaged(turbojet, archives, data) -> None:
    release = release_of(turbojet("install", archives[0])[1])
    manifest = data / "models" / NAME / release / names.MANIFEST
    manifest.write_text(
        re.sub(r'"format_version": 1\b', '"format_version": 2', manifest.read_text())
    )
    for verb in ("info", "verify"):
        code, _, err = turbojet(verb, NAME)
        assert code == 3
        assert "version 2 is newer than 1" in err
        assert err.endswith("; update turbojet\n")


def test_what_a_package_says_cannot_steer_the_terminal(turbojet, tmp_path) -> None:
    root = whole_package(tmp_path / "package")
    said = "a\x1b]0;title\x07\u202eb\x9b2J\nname  other"
    manifest = json.loads((root / names.MANIFEST).read_text())
    manifest["provenance"]["source"] = said
    (root / names.MANIFEST).write_text(json.dumps(manifest))
    (origin,) = [line for line in turbojet("info", str(root))[1].splitlines() if "title" in line]
    assert r"a\x1b]0;title\x07\u202eb\x9b2J\nname  other" in origin
    out = turbojet("info", str(root), "--json")[1]
    assert [char for char in out if not char.isprintable() and char != "\n"] == []
    assert json.loads(out)["provenance"]["source"] == said


def test_what_a_terminal_obeys_is_shown_and_not_obeyed(turbojet) -> None:
    code, _, err = turbojet("install", "no\x1b[2J\nsuch\udcff\u4f60.tgz")
    assert code == 2
    assert "cannot read no\\x1b[2J\\nsuch\\udcff\u4f60.tgz: " in err
    assert err.count("\n") == 1


def test_a_pipe_is_installed(turbojet, archives, monkeypatch, tmp_path) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(Path(archives[0]).read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert turbojet("install", "-")[0] == 0
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", Terminal())
    code, _, err = turbojet("install", "-")
    assert (code, "standard input is a terminal" in err) == (2, True)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TurbojetError("x"), 1),
        (InternalError("x"), 1),
        (UsageError("x"), 2),
        (PackageError("x"), 3),
        (DeviceError("x"), 4),
        (RequestError("x"), 5),
    ],
)
def test_every_error_is_one_sentence_and_its_exit_code(turbojet, monkeypatch, error, code) -> None:
    monkeypatch.setattr(commands, "run_list", lambda args: raises(error))
    assert turbojet("list") == (code, "", "turbojet: x\n")


def raises(error):
    raise error


def test_no_traceback_reaches_a_terminal(turbojet, monkeypatch) -> None:
    monkeypatch.setattr(commands, "run_list", lambda args: raises(ZeroDivisionError("by zero")))
    code, out, err = turbojet("list")
    assert (code, out) == (1, "")
    assert err.startswith("turbojet: internal error, ZeroDivisionError: by zero; TURBOJET_DEBUG=1")
    monkeypatch.setattr(commands, "run_list", lambda args: raises(PermissionError(13, "No", "/x")))
    assert turbojet("list") == (4, "", "turbojet: /x: No\n")
    monkeypatch.setattr(commands, "run_list", lambda args: raises(KeyboardInterrupt()))
    assert turbojet("list") == (130, "", "turbojet: interrupted\n")


def test_debug_shows_where(turbojet, monkeypatch) -> None:
    monkeypatch.setenv(cli.DEBUG, "1")
    for error in (ZeroDivisionError("by zero"), PermissionError(13, "No", "/x")):
        monkeypatch.setattr(commands, "run_list", lambda args, error=error: raises(error))
        with pytest.raises(type(error)):
            cli.main(["list"])


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--nonsense"],
        ["instal", "x.tgz"],
        ["install"],
        ["install", "x.tgz", "--forc"],
        ["list", "extra"],
        ["remove", "x", "--old", "--release", "y"],
    ],
)
def test_bad_usage_is_exit_code_2(argv, capsys, data) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(argv)
    assert exit_info.value.code == 2
    assert "usage: turbojet" in capsys.readouterr().err


def test_help_names_every_verb_and_version_is_ours(capsys) -> None:
    text = cli.build_parser().format_help()
    for verb in ("install", "list", "info", "verify", "remove", "rollback", "chat"):
        assert re.search(rf"^    {verb} ", text, re.MULTILINE)
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"turbojet {__version__}\n"


def test_a_missing_archive_is_bad_usage(turbojet, tmp_path) -> None:
    code, _, err = turbojet("install", str(tmp_path / "none.tgz"))
    assert (code, err) == (
        2,
        f"turbojet: cannot read {tmp_path}/none.tgz: No such file or directory\n",
    )
    code, _, err = turbojet("install", str(tmp_path))
    assert (code, "is a folder" in err) == (2, True)


def command(*argv):
    return [sys.executable, "-m", "device_runtime.cli", *argv]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_an_install_and_leaves_nothing(archives, data, number) -> None:
    # The pipe stays open, so that the install waits for more when the signal comes.
    process = subprocess.Popen(
        command("install", "-"), stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=False
    )
    process.stdin.write(Path(archives[0]).read_bytes()[:-3000])
    process.stdin.flush()
    deadline = time.monotonic() + 20
    while not (data / "models" / ".lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, b"turbojet: interrupted\n")
    assert os.listdir(data / "models") == [".lock"]


@pytest.mark.parametrize("descriptor", [0, 1, 2])
def test_a_stream_that_is_closed_is_none_that_matters(archives, data, descriptor) -> None:
    package = str(Path(archives[0]).parent / "p0")
    shell = f'exec "$@" {descriptor}>&-'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", *command("info", package)], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (b"name " in done.stdout) == (descriptor != 1)


def test_a_reader_that_goes_away_is_no_traceback(archives, data) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    package = Path(archives[0]).parent / "p0"
    done = subprocess.run(
        command("info", str(package)), stdout=write_end, stderr=subprocess.PIPE, timeout=30
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


def test_plain_progress_speaks_every_five_seconds() -> None:
    stream = io.StringIO()
    times = iter([0.0, 1.0, 5.0, 6.0, 11.0, 16.5])
    report = PlainReport("install", stream, lambda: next(times))
    report(10, 100)
    report(25_000_000, 100_000_000)
    report(30_000_000, 100_000_000)
    report(40_000_000, None)
    report(0, 100)
    assert stream.getvalue() == (
        "install: 25.0 MB of 100.0 MB, 25%, 15 s left\ninstall: 40.0 MB\ninstall: 0 B\n"
    )


def test_a_terminal_gets_a_bar_without_colour_if_asked(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for no_colour, has_colour in (("1", False), ("", True)):
        monkeypatch.setenv("NO_COLOR", no_colour)
        stream = Terminal()
        with byte_progress("install", stream) as report:
            report(1_000_000, 2_000_000)
        assert "install" in stream.getvalue()
        assert "1.0/2.0 MB" in stream.getvalue()
        assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", stream.getvalue())) == has_colour
    with byte_progress("install", io.StringIO()) as report:
        assert isinstance(report, progress_bar.PlainReport)


def test_sizes_and_times_are_short() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 98_200_000, 3_740_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "98.2 MB",
        "3.74 GB",
    ]
    assert [format_duration(s) for s in (0.44, 9.96, 42, 59.4, 185, 3600, 7800)] == [
        "0.4 s",
        "10.0 s",
        "42 s",
        "59 s",
        "3 min 05 s",
        "1 h 00 min",
        "2 h 10 min",
    ]

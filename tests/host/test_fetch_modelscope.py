"""Downloads through the real ModelScope SDK from a hub on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import MODEL, Hub, serving

from device_runtime.errors import FetchError, InternalError, PackageError, UsageError
from host_tools import cli
from host_tools.fetch import FetchOptions, fetch, hub_address
from host_tools.fetch import modelscope as hub_module
from host_tools.fetch.hub_errors import describe_failure
from host_tools.fetch.hub_worker import HubRequest
from host_tools.origin import read_origin
from host_tools.progress import Progress, Task

TOKEN = "ms-not-to-be-written-anywhere"
WEIGHTS = bytes(range(256)) * 6000
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b'{"model": {}}',
    "README.md": b"# tiny",
    "onnx/model.onnx": b"onnx",
    "modeling_tiny.py": b"raise SystemExit('never run')",
}
TAKEN = ["config.json", "model.safetensors", "modeling_tiny.py", "tokenizer.json"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    for name in list(os.environ):
        if name.startswith("MODELSCOPE_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with serving(Hub(files=dict(FILES))) as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.address)
        yield hub


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".turbojet" not in path.parts
    }


class Recorder(Progress):
    """Keeps the last task."""

    def _start(self, title: str, total: float | None, unit: str) -> Task:
        self.last = Task(title, total, unit)
        return self.last


def test_a_model_is_downloaded_and_a_second_fetch_needs_no_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    hub.token = TOKEN
    hub.revisions = ("v1.0",)
    shown = Recorder()
    options = FetchOptions(revision="v1.0")
    folder = fetch(MODEL, tmp_path / "out", options, shown)
    assert content(folder) == {name: FILES[name] for name in TAKEN}
    total = sum(len(FILES[name]) for name in TAKEN)
    assert (shown.last.title, shown.last.completed, shown.last.total) == (
        f"fetch {MODEL}",
        total,
        total,
    )
    # The token went out with every request, and to no file.
    assert all(r.headers["authorization"] == f"Bearer {TOKEN}" for r in hub.requests)
    assert all(r.query["Revision"] == "v1.0" for r in hub.requests)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    # The SDK left nothing in the home folder or in ours.
    assert not (tmp_path / "home").exists()
    assert not (folder / ".turbojet" / "sdk").exists()
    provenance = read_origin(folder, is_quantized=False).provenance
    assert (provenance.source, provenance.source_kind) == (MODEL, "modelscope")
    assert provenance.revision == "v1.0"

    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    assert fetch(MODEL, tmp_path / "out", options) == folder


@pytest.mark.parametrize("end", ["\r", "\n", " "])
def test_the_end_of_a_line_after_the_token_does_no_harm(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN + end)
    hub.token = TOKEN
    fetch(MODEL, tmp_path / "out")
    assert all(r.headers["authorization"] == f"Bearer {TOKEN}" for r in hub.requests)


@pytest.mark.parametrize("token", ["two words", "a\rb", "schlüssel"])
def test_what_can_be_no_token_is_refused_and_not_repeated(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", token)
    with pytest.raises(UsageError, match="MODELSCOPE_API_TOKEN holds a blank, a control") as error:
        fetch(MODEL, tmp_path / "out")
    assert token not in str(error.value)
    assert hub.requests == []


def test_a_reason_that_spells_the_token_is_said_without_it(monkeypatch) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", f"{TOKEN}\n")
    worker = hub_module._Worker(HubRequest("team/tiny", "model", None, ""), Progress())
    event = {"event": "failed", "kind": "unknown", "reason": f"bad header 'Bearer {TOKEN}'"}
    assert str(worker._failure(event)).endswith(r"(bad header 'Bearer ***')")


def test_a_connection_cut_in_the_middle_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    hub.cuts["model.safetensors"] = [400_000]
    folder = fetch(MODEL, tmp_path / "out")
    assert content(folder)["model.safetensors"] == WEIGHTS
    asked = [r.headers.get("range") for r in hub.asked_for("model.safetensors")]
    assert asked == [None, "bytes=400000-"]


def test_a_fetch_that_gave_up_is_gone_on_with_by_the_next(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "0")
    hub.cuts["model.safetensors"] = [500_000]
    with pytest.raises(FetchError, match=r"stopped after .* of 1.5 MB from 127.0.0.1 .* to go on"):
        fetch(MODEL, tmp_path / "out")
    assert "model.safetensors" not in content(tmp_path / "out")
    hub.requests.clear()
    folder = fetch(MODEL, tmp_path / "out")
    assert content(folder) == {name: FILES[name] for name in TAKEN}
    assert [r.headers.get("range") for r in hub.asked_for("model.safetensors")] == ["bytes=500000-"]
    assert not hub.asked_for("tokenizer.json"), "a whole file is not fetched again"


def test_a_file_corrupted_on_the_way_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.corruptions["model.safetensors"] = 1
    folder = fetch(MODEL, tmp_path / "out")
    assert content(folder)["model.safetensors"] == WEIGHTS
    assert len(hub.asked_for("model.safetensors")) == 2


def test_a_file_that_stays_corrupted_is_no_checkpoint(hub: Hub, tmp_path: Path) -> None:
    hub.corruptions["config.json"] = 99
    with pytest.raises(FetchError, match=r"127.0.0.1 serves team/tiny damaged \(.*config.json"):
        fetch(MODEL, tmp_path / "out")
    assert "config.json" not in content(tmp_path / "out")


def test_a_model_or_revision_that_is_not_there_is_said(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"127.0.0.1 has no model team/other, check the name"):
        fetch("team/other", tmp_path / "other")
    with pytest.raises(FetchError, match="has no model team/tiny at revision v9, check the name"):
        fetch(MODEL, tmp_path / "out", FetchOptions(revision="v9"))


def test_a_private_model_without_a_token_names_the_variable(hub: Hub, tmp_path: Path) -> None:
    hub.token = TOKEN
    with pytest.raises(
        FetchError, match=r"not let us read team/tiny, put a token .* MODELSCOPE_API"
    ):
        fetch(MODEL, tmp_path / "out")


def test_only_included_files_are_fetched(hub: Hub, tmp_path: Path) -> None:
    options = FetchOptions(include=("*.json", "*.safetensors", "onnx/*"), exclude=("token*",))
    hub.files["vocab.json"] = b"{}"
    folder = fetch(MODEL, tmp_path / "out", options)
    assert sorted(content(folder)) == [
        "config.json",
        "model.safetensors",
        "onnx/model.onnx",
        "vocab.json",
    ]


def test_a_repository_that_is_no_checkpoint_is_refused(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    with pytest.raises(PackageError, match=r"out has no .safetensors or .bin weights"):
        fetch(MODEL, tmp_path / "out")


def test_a_hostile_listing_writes_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.listed_names = ["../evil.json"]
    with pytest.raises(PackageError, match="climbs out of its folder"):
        fetch(MODEL, tmp_path / "out", FetchOptions(include=("*",)))
    assert content(tmp_path / "out") == {}
    assert not (tmp_path / "evil.json").exists()


def test_too_little_room_is_said_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.listed_size["model.safetensors"] = 10**18
    with pytest.raises(
        FetchError, match=r"team/tiny needs 10000000[\d.]+ GB more in .*, but .* free"
    ):
        fetch(MODEL, tmp_path / "out")
    assert content(tmp_path / "out") == {}


def test_the_older_variable_for_a_mirror_is_honoured(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODELSCOPE_ENDPOINT")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", hub.address)
    assert content(fetch(MODEL, tmp_path / "out")).keys() == set(TAKEN)


def test_two_fetches_into_one_folder_do_not_fight(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from host_tools.fetch import fetch\n"
        f"fetch({MODEL!r}, Path({str(tmp_path / 'out')!r}))"
    )
    root = Path(hub_module.__file__).parents[2]
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    messages = [process.communicate()[1] for process in processes]
    codes = sorted(process.returncode for process in processes)
    # Either the second found the first at work, or it came after it and found its result.
    assert codes[0] == 0, messages
    assert codes[1] == 0 or any("another turbojet-host is at work" in text for text in messages)
    assert content(tmp_path / "out") == {name: FILES[name] for name in TAKEN}


def test_files_are_fetched_side_by_side(hub: Hub, tmp_path: Path) -> None:
    # No file is sent before all four are asked for; one after the other would never end.
    hub.meeting = threading.Barrier(len(TAKEN), timeout=30)
    folder = fetch(MODEL, tmp_path / "out", FetchOptions(max_workers=4))
    assert content(folder) == {name: FILES[name] for name in TAKEN}
    assert not hub.meeting.broken


def test_a_hub_without_hashes_is_trusted_by_size(hub: Hub, tmp_path: Path) -> None:
    hub.has_hashes = False
    folder = fetch(MODEL, tmp_path / "out")
    assert content(folder) == {name: FILES[name] for name in TAKEN}


def test_a_fetch_that_was_killed_is_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    hub.stalls["model.safetensors"] = 1_000_000
    command = [sys.executable, "-m", "host_tools.cli", "fetch", MODEL, "--output"]
    output = tmp_path / "out"
    root = Path(hub_module.__file__).parents[2]
    process = subprocess.Popen([*command, str(output)], cwd=root, stderr=subprocess.DEVNULL)
    waited_s = 0.0
    while not _partial_bytes(output) and waited_s < 60:
        time.sleep(0.05)
        waited_s += 0.05
    process.kill()
    process.wait()
    begun = _partial_bytes(output)
    assert begun
    assert "model.safetensors" not in content(output)
    hub.stalls.clear()
    hub.go.set()
    hub.requests.clear()
    # The worker of the killed one ends on its own; until then it may still write.
    time.sleep(1.0)
    fetch(MODEL, output)
    assert content(output) == {name: FILES[name] for name in TAKEN}
    ranges = [r.headers.get("range") for r in hub.asked_for("model.safetensors")]
    assert len(ranges) == 1
    assert ranges[0] is not None, "it starts where the killed one was"


def _partial_bytes(output: Path) -> int:
    """Bytes of files that are on their way, wherever the SDK keeps them."""
    if not output.is_dir():
        return 0
    found = [path for path in output.rglob("*") if "incomplete" in path.name and path.is_file()]
    return sum(path.stat().st_size for path in found)


def test_the_command_takes_revision_patterns_and_workers(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.revisions = ("v2",)
    hub.files["vocab.json"] = b"{}"
    arguments = ["fetch", MODEL, "--output", str(tmp_path / "out"), "--revision", "v2"]
    arguments += ["--include", "*.json", "--include", "*.safetensors", "--exclude", "vocab*"]
    assert cli.main([*arguments, "--max-workers", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert sorted(content(tmp_path / "out")) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert all(r.query["Revision"] == "v2" for r in hub.requests)


def test_no_network_is_said_in_one_quick_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    started = time.monotonic()
    with pytest.raises(
        FetchError,
        match=r"cannot reach 127.0.0.1 to fetch team/tiny \(.*refused\); pass the path of a local",
    ):
        fetch(MODEL, tmp_path / "out")
    assert time.monotonic() - started < 5


def test_a_name_that_does_not_resolve_is_no_network(
    monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "hub.invalid")
    with pytest.raises(FetchError, match=r"cannot reach hub.invalid to fetch x"):
        hub_address.check_reachable("x")


@pytest.mark.parametrize("variable", hub_address.ENDPOINT_VARIABLES)
def test_an_endpoint_that_is_no_address_is_named(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, variable: str
) -> None:
    monkeypatch.delenv("MODELSCOPE_ENDPOINT")
    monkeypatch.setenv(variable, "https://[::1")
    with pytest.raises(
        FetchError,
        match=rf"^{variable} is 'https://\[::1', which is no address \(Invalid IPv6 URL\)",
    ):
        hub_address.check_reachable("x")


def test_a_host_that_never_answers_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.setattr(hub_address, "REACH_TIMEOUT_S", -0.8)

    def hang(place: tuple[str, int], timeout: float) -> socket.socket:
        time.sleep(1)
        raise OSError("too late")

    monkeypatch.setattr(hub_address.socket, "create_connection", hang)
    with pytest.raises(FetchError, match=r"cannot reach 127.0.0.1 .* \(no answer in time\)"):
        hub_address.check_reachable("x")


def test_without_a_choice_either_site_may_answer(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.delenv("MODELSCOPE_ENDPOINT")
    asked: list[str] = []

    def connect(place: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(place[0])
        if place[0] == "modelscope.cn":
            raise OSError("blocked")
        return socket.socket()

    monkeypatch.setattr(hub_address.socket, "create_connection", connect)
    hub_address.check_reachable("x")
    assert asked == ["modelscope.cn", "www.modelscope.ai"]
    monkeypatch.setenv("MODELSCOPE_PREFER_AI_SITE", "true")
    assert hub_address.hub_host() == "www.modelscope.ai"


def test_a_proxy_is_left_to_the_sdk(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    hub_address.check_reachable("x")


def test_without_the_sdk_or_with_an_old_one_the_command_is_named(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, tmp_path: Path
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UsageError, match=r"modelscope is not installed, run: pip install 'turboj"):
        fetch(MODEL, tmp_path / "out")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.38.1")
    with pytest.raises(UsageError, match=r"modelscope 1.38.1 is too old, 1.39 or later is needed"):
        fetch(MODEL, tmp_path / "out")


def request(folder: Path) -> HubRequest:
    return HubRequest(MODEL, "model", None, str(folder))


def test_an_sdk_that_dies_is_said(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub_module, "_START_WORKER", "raise SystemExit(1)")
    with pytest.raises(FetchError, match="ended without a word while it fetched team/tiny"):
        hub_module.download(request(tmp_path), Progress())
    assert not (tmp_path / ".turbojet" / "sdk").exists()


def test_an_sdk_that_claims_what_is_not_there_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, tmp_path: Path
) -> None:
    lines = '{"event": "plan", "files": [["a.json", 3]], "total": 3}\\n{"event": "done"}'
    monkeypatch.setattr(hub_module, "_START_WORKER", f"print('{lines}')")
    with pytest.raises(InternalError, match=r"the SDK left no .*a.json of 3 bytes"):
        hub_module.download(request(tmp_path), Progress())


def test_a_full_disk_in_the_middle_is_said(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, tmp_path: Path
) -> None:
    line = '{"event": "failed", "kind": "full", "reason": "no space"}'
    monkeypatch.setattr(hub_module, "_START_WORKER", f"print('{line}')")
    with pytest.raises(FetchError, match=r"the disk under .* is full, make room"):
        hub_module.download(request(tmp_path), Progress())


def test_a_hub_that_fails_while_listing_counts_as_unreachable(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, tmp_path: Path
) -> None:
    line = '{"event": "failed", "kind": "network", "reason": "ServerError: 500"}'
    monkeypatch.setattr(hub_module, "_START_WORKER", f"print('{line}')")
    with pytest.raises(FetchError, match=r"cannot reach 127.0.0.1 to .* \(ServerError: 500\)"):
        hub_module.download(request(tmp_path), Progress())


def test_a_failure_without_a_name_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, tmp_path: Path
) -> None:
    line = '{"event": "failed", "kind": "unknown", "reason": "TypeError: x"}'
    monkeypatch.setattr(hub_module, "_START_WORKER", f"print('{line}')")
    with pytest.raises(FetchError, match=r"SDK failed to fetch team/tiny from .* \(TypeError: x\)"):
        hub_module.download(request(tmp_path), Progress())


def test_the_failure_that_a_person_can_mend_is_told() -> None:
    class FileIntegrityError(Exception):
        pass

    class FileDownloadError(Exception):
        def __init__(self) -> None:
            a, b = ConnectionError("gone"), FileIntegrityError("hash\nof b")
            self.failed_files = {"a": a, "b": b}

    assert describe_failure(FileDownloadError()) == ("damaged", "FileIntegrityError: hash")
    full = OSError(28, "No space left on device")
    try:
        raise RuntimeError("wrapped") from full
    except RuntimeError as error:
        assert describe_failure(error)[0] == "full"
    assert describe_failure(ValueError("x" * 999)) == ("unknown", f"ValueError: {'x' * 188}")
    answered = Exception("nope")
    answered.status_code = 403  # type: ignore[attr-defined]
    assert describe_failure(answered)[0] == "refused"


def test_the_worker_ends_when_its_parent_does(tmp_path: Path, hub: Hub) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", hub_module._START_WORKER, hub_module._ROOT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=hub_module.sdk_environment(
            {**os.environ, "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}, tmp_path
        ),
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(request(tmp_path).to_json() + "\n")
    process.stdin.close()
    started = time.monotonic()
    assert process.wait(30) == 1
    assert time.monotonic() - started < 10

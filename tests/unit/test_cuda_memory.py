"""What the CUDA backend takes beside weights and KV pages, and what `turbojet info` says of it."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from fake_cuda import install, write_cubins
from tiny_package import make_package, tiny_model

from device_runtime import cli
from device_runtime.backends.cuda.footprint import LAUNCH_BYTES, pinned_bytes
from device_runtime.backends.cuda.sizes import STAGING_BYTES, step_limits
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.backends.synthetic import SHAPES, synthetic_package
from device_runtime.engine.board_plan import plan_on_board
from device_runtime.engine.configure import cache_request
from device_runtime.engine.engine import Engine, GenerationParams
from device_runtime.engine.options import EngineOptions
from device_runtime.errors import DeviceError
from device_runtime.kernels import libcuda
from device_runtime.package_format.boards import BOARDS
from device_runtime.package_format.package import open_package

H200_SMS = 132


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_takes_little_beside_weights_and_pages(name) -> None:
    package = synthetic_package(name, max_batch_size=8, session_len=4096)
    request = cache_request(package, EngineOptions(max_batch_size=8))
    limits = step_limits(package.model, request, H200_SMS)
    # A board with 16 SMs has a smaller workspace still: blocks hand each other fewer sums.
    assert limits.num_bytes + LAUNCH_BYTES < 0.15e9
    if name == "llama-2-7b":
        assert limits.num_bytes + LAUNCH_BYTES < 0.12e9
    small = step_limits(package.model, request, 16)
    assert small.num_bytes < limits.num_bytes
    assert pinned_bytes(limits) == 2 * STAGING_BYTES  # all else that is pinned takes less


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.delenv("TURBOJET_KERNELS", raising=False)
    install(monkeypatch)
    model = tiny_model(head_dim=64)
    made = make_package(tmp_path / "tiny", model, session_len=256, max_batch_size=2)
    write_cubins(made.root / "kernels")
    return made.root


def test_ten_thousand_tokens_of_coming_and_going_leave_memory_where_it_was(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.delenv("TURBOJET_KERNELS", raising=False)
    fake = install(monkeypatch)
    made = make_package(tmp_path / "tiny", tiny_model(head_dim=64), max_batch_size=8)
    write_cubins(made.root / "kernels")
    rng = np.random.default_rng(0)
    active, generated = [], 0
    with Engine.open(made.root, EngineOptions(backend="cuda")) as engine:
        before = (fake.num_bytes, len(fake.pinned))
        while generated < 10_000:
            while len(active) < 10:
                count = int(rng.integers(1, 200))
                params = GenerationParams(count, SamplingParams(seed=count), ignore_eos=True)
                prompt = rng.integers(3, 300, int(rng.integers(1, 120))).tolist()
                active.append(engine.add(prompt, params))
            if rng.random() < 0.02:
                engine.cancel(int(rng.choice(active)))
            for output in engine.step():
                generated += len(output.token_ids)
                if output.finish_reason is not None:
                    active.remove(output.sequence_id)
            fake.launches.clear()
            fake.calls.clear()
        engine.check_integrity()
        assert (fake.num_bytes, len(fake.pinned)) == before
    assert (fake.num_bytes, fake.pinned, fake.contexts) == (0, {}, 0)


def test_info_prints_the_plan_against_what_is_free(root, capsys) -> None:
    assert cli.main(["info", str(root), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["backend"] == "cuda"
    assert plan["available_bytes"] == 1 << 33
    parts = ("weight_bytes", "workspace_bytes", "context_bytes", "kv_bytes")
    assert plan["total_bytes"] == sum(plan[part] for part in parts) < 1 << 33
    assert plan["longest_session_tokens"] == 512  # what the model was made for
    assert cli.main(["info", str(root)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "cuda: weights" in line)
    assert "workspace" in line and "KV 32 x" in line
    assert line.endswith("of 8.59 GB available")


def test_info_shows_what_a_small_board_would_have(root, capsys) -> None:
    assert cli.main(["info", str(root), "--memory-limit", "150M"]) == 0
    out = capsys.readouterr().out
    assert "of 157.3 MB available" in out
    assert "alone a conversation can have 512 tokens here\n" in out
    assert cli.main(["info", str(root), "--memory-limit", "20M"]) == 0
    assert "close other programs, raise the memory limit" in capsys.readouterr().out


def no_driver():
    raise DeviceError("no CUDA driver was found")


def test_info_shows_the_plan_of_boards_that_are_not_here(root, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    monkeypatch.setattr(libcuda, "_load", no_driver)
    assert cli.main(["info", str(root)]) == 0
    assert "no GPU is used here; --board NAME shows the plan" in capsys.readouterr().out
    argv = ["info", str(root), "--board", "orin-nano-4gb,thor", "--session-len", "128"]
    assert cli.main([*argv, "--json"]) == 0
    found = {board["board"]: board for board in json.loads(capsys.readouterr().out)["boards"]}
    assert list(found) == ["orin-nano-4gb", "thor"]
    package = open_package(root)
    request = cache_request(package, EngineOptions(session_len=128))
    for name, facts in found.items():
        plan = plan_on_board(package.model, request, BOARDS[name])
        assert facts["total_bytes"] == plan.total_bytes
        assert facts["available_bytes"] == BOARDS[name].usable_bytes
        # The model was made for 512 tokens.
        assert (facts["session_len"], facts["int8_tokens"], facts["fp16_tokens"]) == (128, 512, 512)
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("orin-nano-4gb"))
    assert re.search(r"cuda: weights .* \+ context and process .* of 2\.15 GB available", lines[at])
    assert lines[at + 1].endswith(
        "alone a conversation can have 512 tokens with int8 KV, 512 with fp16"
    )


def test_info_says_why_a_model_does_not_run_on_a_board(root, tmp_path, capsys) -> None:
    argv = ["info", str(root), "--board", "thor", "--memory-limit", "200M"]
    assert cli.main(argv) == 0
    assert re.search(r"thor +weights .* of 200 MiB; one KV page needs", capsys.readouterr().out)
    assert cli.main([*argv, "--json"]) == 0
    (thor,) = json.loads(capsys.readouterr().out)["boards"]
    assert list(thor) == ["board", "error"]
    odd = make_package(tmp_path / "odd", tiny_model())
    assert cli.main(["info", str(odd.root), "--board", "thor"]) == 0
    assert re.search(r"thor +head_dim is 32, the kernels take", capsys.readouterr().out)
    assert cli.main(["info", str(root), "--board", "thro"]) == 2
    assert "no board is called 'thro'; did you mean thor" in capsys.readouterr().err

"""The plan made for a board is the plan that the CUDA engine makes there, and what it allocates."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda import ATTRIBUTES, FakeCuda, install, write_cubins
from tiny_package import DEFAULT_KV_SCALE, make_package, tiny_model

from device_runtime.backends.cuda import survey
from device_runtime.backends.cuda.footprint import LAUNCH_BYTES, pinned_bytes
from device_runtime.backends.cuda.sizes import STAGING_BYTES, step_limits
from device_runtime.backends.kv_format import KvFormat
from device_runtime.backends.memory_plan import CacheRequest
from device_runtime.engine.board_plan import (
    LongestSession,
    assumed_bytes,
    board_survey,
    fitting_tokens,
    kernels_refusal,
    longest_sessions,
    plan_on_board,
)
from device_runtime.engine.configure import cache_request
from device_runtime.engine.engine import Engine, EngineOptions
from device_runtime.package_format.amounts import MIB
from device_runtime.package_format.boards import BOARDS
from device_runtime.package_format.package import open_package

NANO = BOARDS["orin-nano-4gb"]
CUDA = EngineOptions(backend="cuda")
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
}
FP16 = {"weight_type": "fp16", "group_size": 0}
MIXED = ("layers.0.attention.w_qkv", "layers.1.feed_forward.w13")
PACKAGES = {
    "groups of 128": ({"group_size": 128}, 8),
    "groups of 64": ({"group_size": 64}, 8),
    "int8 head": ({"group_size": 128, "head_type": "int8", "vocab_size": 317}, 8),
    "tied head, q/k norms": ({"tie_word_embeddings": True, "has_qk_norm": True}, 8),
    "two ranks, biases": ({"tensor_para_size": 2, "has_attention_bias": True}, 0),
    "some fp16 matrices": ({"fp16_linears": MIXED}, 8),
    "layers without rope": ({"layers_without_rope": (1,)}, 0),
    "fp16": (FP16, 0),
    "bf16": ({**FP16, "weight_type": "bf16"}, 8),
    "static int8 KV": ({"group_size": 128}, 4),
}


class MeasuredCuda(FakeCuda):
    """Adds up what is asked of the driver."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sizes: dict[int, int] = {}
        self.pinned_sizes: dict[int, int] = {}
        self.most_pinned = 0

    @property
    def taken(self) -> int:
        return sum(self.sizes.values())

    def do_cuMemAlloc_v2(self, address, size):
        if not (result := super().do_cuMemAlloc_v2(address, size)):
            self.sizes[address._obj.value] = size.value
        return result

    def do_cuMemFree_v2(self, address):
        self.sizes.pop(address.value, None)
        return super().do_cuMemFree_v2(address)

    def do_cuMemHostAlloc(self, pointer, size, flags):
        super().do_cuMemHostAlloc(pointer, size, flags)
        self.pinned_sizes[pointer._obj.value] = size.value
        self.most_pinned = max(self.most_pinned, sum(self.pinned_sizes.values()))

    def do_cuMemFreeHost(self, pointer):
        self.pinned_sizes.pop(pointer.value, None)
        return super().do_cuMemFreeHost(pointer)


def package_root(folder: Path, kind: str, max_batch_size: int) -> Path:
    changes, policy = PACKAGES[kind]
    model = tiny_model(**{**SIZES, **changes})
    scale = DEFAULT_KV_SCALE if policy == 4 else None
    made = make_package(
        folder / "tiny",
        model,
        kv_scale=scale,
        quant_policy=policy,
        max_batch_size=max_batch_size,
        session_len=512,
        cache_max_entry_count=0.8,
    )
    write_cubins(made.root / "kernels", sm=87, group_size=model.group_size or 128)
    return made.root


def on_board(monkeypatch, board, assumed) -> MeasuredCuda:
    """Put a driver in place whose GPU has a board's SMs and shares the board's memory."""
    attributes = ATTRIBUTES | {16: board.num_sms, 18: 1, 75: 8, 76: 7}
    fake = MeasuredCuda(attributes=attributes)
    monkeypatch.delenv("TURBOJET_KERNELS", raising=False)
    monkeypatch.setattr(
        survey,
        "available_memory_bytes",
        lambda: board.usable_bytes - (assumed if fake.contexts else 0),
    )
    install(monkeypatch, fake)
    return fake


@pytest.mark.parametrize("max_batch_size", [1, 8])
@pytest.mark.parametrize("kind", PACKAGES)
def test_the_engine_allocates_what_was_planned_for_the_board(
    tmp_path, monkeypatch, kind, max_batch_size
) -> None:
    root = package_root(tmp_path, kind, max_batch_size)
    package = open_package(root)
    model, request = package.model, cache_request(package, EngineOptions())
    planned = plan_on_board(model, request, NANO)
    fake = on_board(monkeypatch, NANO, assumed_bytes(model, NANO))
    with Engine.open(root, CUDA) as engine:
        assert engine.plan == planned
        pinned = pinned_bytes(step_limits(model, planned, NANO.num_sms))
        buffers = planned.workspace_bytes - LAUNCH_BYTES - pinned
        assert fake.taken == planned.weight_bytes + planned.kv_bytes + buffers
        assert fake.most_pinned == pinned == 2 * STAGING_BYTES
        assert 0 < sum(fake.pinned_sizes.values()) < pinned  # the ring and the uploads stay


def test_a_gpu_of_its_own_memory_counts_no_pinned_memory(tmp_path, monkeypatch) -> None:
    root = package_root(tmp_path, "groups of 128", 8)
    fake = on_board(monkeypatch, NANO, 0)
    fake.attributes[18] = 0
    with Engine.open(root, CUDA) as engine:
        plan = engine.plan
        beside = plan.workspace_bytes - LAUNCH_BYTES
        assert fake.taken == plan.weight_bytes + plan.kv_bytes + beside


def test_a_session_that_is_cut_takes_no_more_than_planned(tmp_path, monkeypatch) -> None:
    root = package_root(tmp_path, "groups of 128", 8)
    fake = on_board(monkeypatch, NANO, 0)
    with Engine.open(root, dataclasses.replace(CUDA, cache_max_entry_count=2.0)) as engine:
        plan = engine.plan
        assert (plan.num_pages, plan.session_len) == (2, 128)
        buffers = plan.workspace_bytes - LAUNCH_BYTES - 2 * STAGING_BYTES
        assert fake.taken <= plan.weight_bytes + plan.kv_bytes + buffers


def test_what_is_assumed_for_the_process_by_hand() -> None:
    # 96 MiB of the driver, 4 MiB for each of 8 SMs, 80 MiB of Python, 800 bytes a token.
    nano = BOARDS["orin-nano-8gb"]
    model = tiny_model(vocab_size=1000)
    assert assumed_bytes(model, nano) == (96 + 32 + 80) * MIB + 800_000
    request = CacheRequest(0.8, 64, 512, 1, 512, KvFormat.FP16)
    found = board_survey(model, request, nano)
    assert (found.available_bytes, found.context_bytes) == (
        nano.usable_bytes, assumed_bytes(model, nano),
    )  # fmt: skip


def test_a_longest_session_ends_with_the_memory_or_with_the_model() -> None:
    model = tiny_model(num_hidden_layers=32, max_position_embeddings=1 << 20)
    request = CacheRequest(3.0, 64, 512, 8, 512, KvFormat.FP16)
    (longest,) = longest_sessions(model, request, [NANO])
    alone = dataclasses.replace(request, session_len=1 << 20, max_batch_size=1)
    share = int(board_survey(model, alone, NANO).free_bytes * 0.800000012)  # 0.8 as fp32
    # K and V of 32 layers, 2 heads: of 32 halves 8192 bytes a token, of 36 bytes 4608
    assert longest.fp16_tokens == share // (64 * 8192) * 64
    assert longest.int8_tokens == share // (64 * 4608) * 64
    assert longest.text == (
        f"alone a conversation can have {longest.int8_tokens} tokens with int8 KV, "
        f"{longest.fp16_tokens} with fp16"
    )
    short = dataclasses.replace(model, max_position_embeddings=1000)
    tiny_board = dataclasses.replace(NANO, name="tiny", usable_bytes=200 * MIB)
    assert longest_sessions(short, request, [NANO, tiny_board]) == (
        LongestSession(NANO.name, 1000, 1000),
        LongestSession("tiny", 0, 0),
    )


def test_pages_that_are_asked_for_count_as_far_as_they_fit() -> None:
    model = tiny_model()
    request = CacheRequest(3.0, 64, 512, 1, 512, KvFormat.FP16)
    assert fitting_tokens(model, request, NANO) == 192
    # 2 layers, K and V, 2 heads of 32 halves: 512 bytes a token, 32768 a page
    many = dataclasses.replace(request, cache_max_entry_count=1e9)
    free = board_survey(model, many, NANO).free_bytes
    assert fitting_tokens(model, many, NANO) == free // 32768 * 64


def test_models_that_the_kernels_do_not_run_are_told() -> None:
    assert kernels_refusal(tiny_model(**SIZES)) == ""
    assert kernels_refusal(tiny_model()).startswith("head_dim is 32, the kernels take 64 and 128")


def test_planning_needs_no_driver_and_no_torch() -> None:
    code = (
        "import sys; import device_runtime.engine.board_plan;"
        "heavy = {'torch', 'pycuda', 'tokenizers', 'device_runtime.kernels.libcuda',"
        "'device_runtime.backends.cuda.driver'};"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"loaded to plan: {done.stderr}"

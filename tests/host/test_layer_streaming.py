"""What streams layers through devices: placement, reading ahead, searches side by side, times."""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch

from device_runtime.errors import DeviceError, PackageError
from device_runtime.package_format.model_config import ModelConfig
from host_tools.awq.linear_solver import search_bytes
from host_tools.checkpoint import Checkpoint, QuantizedLinear
from host_tools.decoder import devices as devices_module
from host_tools.decoder.compact import CompactActivations, row_factors
from host_tools.decoder.devices import (
    choose_devices,
    place_activations,
    tensor_cores,
    working_bytes,
)
from host_tools.decoder.layer import gpu_attention, plain_attention
from host_tools.decoder.prefetch import Upload, read_ahead, ready_layers
from host_tools.decoder.snapshots import Snapshots
from host_tools.decoder.stream import Activations, LayerRunner
from host_tools.phase_times import PhaseTimes
from host_tools.tap_passes import TapPasses

CPU = torch.device("cpu")
CUDA, OTHER_CUDA = torch.device("cuda", 0), torch.device("cuda", 1)

LLAMA_2_7B = ModelConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=4096,
    weight_type="fp16",
    group_size=0,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(tiny.write_llama(tmp_path / "checkpoint", num_hidden_layers=4))


@pytest.fixture
def two_gpus(monkeypatch) -> list[str]:
    names = ["NVIDIA H200", "NVIDIA H200", "NVIDIA L4"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    return names


def test_devices_are_named_by_number(two_gpus) -> None:
    assert choose_devices("cpu", ("0", "1")) == (torch.device("cuda:0"), torch.device("cuda:1"))
    assert choose_devices("cpu", ("1", "1")) == (torch.device("cuda:1"),) * 2
    assert choose_devices("cpu", ("cpu", "cpu")) == (CPU, CPU)
    assert choose_devices("cpu", ()) == (CPU,)


def test_a_device_that_is_not_there_is_refused(two_gpus) -> None:
    with pytest.raises(DeviceError, match="there is no GPU 3, torch sees 3 of them"):
        choose_devices("auto", ("0", "3"))


def test_devices_whose_bits_would_differ_are_refused(two_gpus) -> None:
    complaint = "the devices 0,2 are NVIDIA H200 and NVIDIA L4, whose sums differ"
    with pytest.raises(DeviceError, match=complaint):
        choose_devices("auto", ("0", "2"))


def test_a_cpu_computes_as_before_and_a_gpu_on_tensor_cores() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    with tensor_cores(CPU):
        assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(KeyError), tensor_cores(CUDA):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_rows_are_divided_by_a_power_of_two() -> None:
    rows = torch.tensor([[1.0, -3.0], [65504.0, 2.0**20], [0.0, 0.0], [2.0**-130, 0.0]])
    # 3 is below 4: divided by 2^-13 it is below 2^15. The last two: the smallest normal number.
    assert row_factors(rows)[:, 0].tolist() == [2.0**-13, 2.0**6, 2.0**-126, 2.0**-126]


def test_compact_activations_keep_eleven_bits_of_every_value() -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(3, 5, 64, generator=generator)
    states[0, 0, 0] = 3e6  # beyond fp16
    states[1] *= 1e-9  # below it
    states[2, 1] = 0.0
    activations = CompactActivations.make((3, 5, 64), CPU)
    activations.store(slice(0, 2), states[0:2])
    activations.store(slice(2, 3), states[2:])
    loaded = activations.load(slice(0, 3), CPU)
    assert loaded.dtype == torch.float32
    # Half a unit in the last of 11 bits; no value here is below 2^-28 of the greatest in its row.
    assert torch.all((loaded - states).abs() <= 2.0**-11 * states.abs())
    assert activations.num_bytes == 3 * 5 * (64 * 2 + 4)


def test_compact_activations_run_through_a_layer_as_full_ones_do(checkpoint: Checkpoint) -> None:
    token_ids = torch.arange(60, dtype=torch.int32).view(3, 20)
    full = Activations.embed(checkpoint, token_ids)
    compact = CompactActivations.make((3, 20, 64), CPU)
    compact.fill(checkpoint, token_ids)
    assert torch.equal(compact.load(slice(0, 3), CPU), full.states)  # the checkpoint is fp16
    runner = LayerRunner(checkpoint, 20, CPU)
    for activations in (full, compact):
        for index in range(4):
            runner.advance(runner.layer(index), activations)
    error = (compact.load(slice(0, 3), CPU) - full.states).norm() / full.states.norm()
    assert 0 < error < 4 * 2.0**-11  # four layers' roundings


def test_compact_activations_survive_in_a_snapshot(tmp_path: Path) -> None:
    saved = CompactActivations.make((2, 3, 8), CPU)
    saved.store(slice(0, 2), torch.randn(2, 3, 8))
    with Snapshots(tmp_path, [saved]) as snapshots:
        snapshots.save(5)
    assert (tmp_path / "before-00005.states").stat().st_size == 2 * 3 * (8 * 2 + 4) + 8
    loaded = CompactActivations.make((2, 3, 8), CPU)
    assert Snapshots(tmp_path, [loaded]).load() == (5, b"")
    assert torch.equal(loaded.states, saved.states)
    assert torch.equal(loaded.factors, saved.factors)
    assert Snapshots(tmp_path, [Activations(torch.empty(2, 3, 8))]).load() == (0, b"")


def test_states_are_handed_out_when_the_gpu_that_sent_them_is_done(monkeypatch) -> None:
    class OnSecondGpu(torch.Tensor):
        is_cuda = True
        device = OTHER_CUDA

    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    activations = CompactActivations.make((1, 2, 8), CPU)
    activations.store(slice(0, 1), torch.ones(1, 2, 8))
    activations.parts()
    assert waited == []
    activations.store(slice(0, 1), torch.ones(1, 2, 8).as_subclass(OnSecondGpu))
    activations.parts()
    assert waited == [OTHER_CUDA]  # not the current one, which is the first


def test_a_llama_2_7b_needs_less_than_8_gb_beside_its_windows() -> None:
    # 202 M weights at 6 bytes. Moments of down, what 4096 tokens become on their way there, and
    # gate and up as they were quantized: more than down's factorization, 5 matrices of 11008
    # inputs squared and 4 of its weights.
    weights = 4096 * (3 * 4096 + 4096 + 3 * 11008)
    moments = 2 * 11008**2 + 4096 * 11008
    batch = 4096 * (4 * 11008 + 8 * 4096 + 3 * 4 * 4096)
    partial = 2 * 4096 * 11008
    search = search_bytes(LLAMA_2_7B, 128)
    assert search == 4 * (5 * 11008**2 + 4 * 4096 * 11008)
    needed = working_bytes(LLAMA_2_7B, 2, 2048, search)
    assert needed == 6 * weights + 4 * (moments + batch + partial)
    states = 128 * 2048 * (2 * 4096 + 4)
    assert needed + states < 8e9 < needed + 2 * states
    assert working_bytes(LLAMA_2_7B, 1, 2048) < needed  # calibrate searches nothing


def test_small_groups_need_more_for_their_systems() -> None:
    # Two strips of 2048 outputs, each with a system of 344 x 344 and its copy.
    systems = 2 * 2048 * 344**2
    strip = 8 * 2048 * 11008
    expected = 4 * (2 * 11008**2 + 4096 * 11008 + strip + systems)
    assert search_bytes(LLAMA_2_7B, 32) == expected
    weights = 6 * 4096 * (3 * 4096 + 4096 + 3 * 11008)
    assert working_bytes(LLAMA_2_7B, 2, 2048, expected) == weights + expected


@pytest.mark.parametrize(
    ("devices", "free_gb", "places"),
    [
        ([CUDA], 140, [CUDA]),
        ([CUDA], 5, [CPU]),
        ([CUDA, CUDA], 140, [CUDA, CPU]),  # both would be more than 8 GB
        ([CUDA, CUDA], 6, [CPU, CPU]),
        ([OTHER_CUDA, CUDA], 140, [OTHER_CUDA, CUDA]),
    ],
)
def test_activations_lie_on_the_gpu_as_far_as_8_gb_go(
    monkeypatch, tmp_path, devices, free_gb, places
) -> None:
    made = []
    free_bytes = int(free_gb * 1e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 80 << 30))
    monkeypatch.setattr(
        devices_module.CompactActivations, "make", lambda shape, device: made.append(device)
    )
    windows = torch.zeros(128, 2048, dtype=torch.int32)
    searching = search_bytes(LLAMA_2_7B, 128)
    place_activations(LLAMA_2_7B, windows, devices, tmp_path, searching)
    assert made == places


def test_a_model_that_no_small_gpu_holds_takes_what_there_is(monkeypatch, tmp_path) -> None:
    made = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (140e9, 140e9))
    monkeypatch.setattr(
        devices_module.CompactActivations, "make", lambda shape, device: made.append(device)
    )
    large = replace(LLAMA_2_7B, hidden_size=8192, intermediate_size=28672)
    place_activations(large, torch.zeros(128, 2048), [CUDA, CUDA], tmp_path)
    assert made == [CUDA, CUDA]


def test_a_cpu_keeps_whole_numbers(tmp_path) -> None:
    windows = torch.zeros(2, 8, dtype=torch.int32)
    (kept,) = place_activations(LLAMA_2_7B, windows, [CPU], tmp_path)
    assert (kept.states.shape, kept.states.dtype) == ((2, 8, 4096), torch.float32)


def test_layers_are_read_one_ahead_and_in_order() -> None:
    started = [threading.Event() for _ in range(4)]

    def read(index: int) -> str:
        started[index].set()
        return f"layer {index}"

    found = []
    for index, weights in read_ahead(read, range(3)):
        found.append((index, weights))
        if index < 2:
            assert started[index + 1].wait(10)
        assert not started[min(index + 2, 3)].is_set()
    assert found == [(0, "layer 0"), (1, "layer 1"), (2, "layer 2")]
    assert list(read_ahead(read, ())) == []


def test_a_layer_that_was_handed_over_is_not_held() -> None:
    class Layer:
        pass

    is_second_read = threading.Event()

    def read(index: int) -> Layer:
        if index == 1:
            is_second_read.set()
        return Layer()

    layers = read_ahead(read, range(2))
    _, layer = next(layers)
    assert is_second_read.wait(10)  # so the thread is done with the first
    there = weakref.ref(layer)
    del layer
    assert there() is None


def test_the_exact_stream_may_run_on_a_device_of_its_own(checkpoint: Checkpoint) -> None:
    # torch takes cpu:0 for another device than cpu, and it computes the same.
    devices = (CPU, torch.device("cpu", 0))
    found = []
    for exact_device in devices:
        token_ids = torch.arange(60, dtype=torch.int32).view(3, 20)
        streams = [Activations.embed(checkpoint, token_ids) for _ in range(2)]
        streams[1].states.mul_(1.1)
        runners = [LayerRunner(checkpoint, 20, device) for device in (CPU, exact_device)]
        passes = TapPasses(*runners, *streams)
        original, stored = runners[0].layer(0), runners[0].layer(1)
        exact_layer = passes.on_exact_device(original)
        assert (exact_layer is original) == (exact_device == CPU)
        found.append(
            [
                passes.after_norm("attention", original, exact_layer),
                passes.before_sum("attention", stored, exact_layer),
                streams[0].states,
            ]
        )
    for moments, others in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(moments.gram, others.gram)
        assert torch.equal(moments.drift, others.drift)
        assert torch.equal(moments.magnitude, others.magnitude)
        assert others.drift.device == CPU
    assert torch.equal(found[0][1].residual_drift, found[1][1].residual_drift)
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_attention_of_a_gpu_is_that_of_a_cpu(monkeypatch, scale: float) -> None:
    generator = torch.Generator().manual_seed(4)
    queries, keys, values = (
        torch.randn(2, heads, 33, 16, generator=generator) for heads in (6, 2, 2)
    )
    values *= scale  # 1e5 is beyond fp16
    expected = plain_attention(queries, keys, values)
    # Sums in another order, at most.
    torch.testing.assert_close(gpu_attention(queries, keys, values), expected)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    found = gpu_attention(queries, keys, values)
    assert found.dtype == torch.float32
    error = (found - expected).norm() / expected.norm()
    # Factors of 11 bits where they fit, else 24.
    assert error < (1e-3 if scale == 1.0 else 1e-6)
    assert (error > 1e-5) == (scale == 1.0)


def test_what_reading_raises_reaches_the_caller() -> None:
    def read(index: int) -> str:
        if index == 1:
            raise PackageError("tensor x holds NaN")
        return "fine"

    layers = read_ahead(read, range(3))
    assert next(layers) == (0, "fine")
    with pytest.raises(PackageError, match="tensor x holds NaN"):
        next(layers)


def test_ready_layers_are_those_of_the_checkpoint(checkpoint: Checkpoint) -> None:
    times = PhaseTimes()
    found = list(ready_layers(checkpoint, (2, 0), CPU, times))
    assert [ready.index for ready in found] == [2, 0]
    for ready in found:
        expected = checkpoint.layer(ready.index).up.weight.float()
        assert torch.equal(ready.layer.weights.up.weight, expected)
        assert ready.waited_s > 0
    assert "reading" in times.shares()["seconds"]


def test_what_is_sent_ahead_stays_until_it_was_read(checkpoint: Checkpoint, monkeypatch) -> None:
    """The stand-ins count what a GPU would be told; the GPU's own test is in tests/gpu."""
    told: list[object] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            assert device == CPU

        def synchronize(self) -> None:
            told.append("synchronized")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the consumer's stream")
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: told.append(stream))
    upload = Upload(checkpoint, CPU)
    weights = upload(2)
    assert torch.equal(weights.down.weight, checkpoint.layer(2).down.weight)
    # Seven linears and two norms; the copies have arrived before anybody gets them.
    assert told == ["the consumer's stream"] * 9 + ["synchronized"]


def test_a_gpu_dequantizes_to_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(2)
    scales = torch.rand(3, 40, generator=generator).mul_(0.1).half()
    scales[0, 0], scales[1, 1] = 2.0**-15, 2.0**-14  # the first is subnormal: zero
    linear = QuantizedLinear(
        codes=torch.randint(0, 16, (96, 40), generator=generator, dtype=torch.uint8),
        zeros=torch.randint(0, 16, (3, 40), generator=generator, dtype=torch.uint8),
        scales=scales,
        group_size=32,
    )
    assert torch.equal(linear.computed_on(CPU), linear.weight)
    assert not linear.weight[0, :32].any()

"""The whole CUDA backend with kernels that compute, on the CPU emulator, against the reference.

tests/gpu runs the same and more on a GPU; here every change to a kernel or to what launches it
meets the reference engine where there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from emulated_cuda import EmulatedCuda
from emulator import emulator
from fake_cuda import install, write_cubins
from tiny_package import make_package, tiny_model

from device_runtime.apps.bench_engine import open_engine
from device_runtime.apps.bench_nodes import node_times
from device_runtime.apps.bench_runs import Workload
from device_runtime.backends.cuda.bf16_weights import to_half
from device_runtime.backends.cuda.graph_set import EAGER_VARIABLE
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.engine import Engine, EngineOptions, GenerationParams, Request
from device_runtime.errors import DeviceError
from device_runtime.package_format import bfloat16, names
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.package import open_package

pytestmark = pytest.mark.skipif(
    not emulator.has_compiler(), reason="the kernels run on the CPU where there is g++"
)

GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(seed=7, repetition_penalty=1.1)
CUDA = EngineOptions(backend="cuda")
REFERENCE = EngineOptions(backend="reference")


@dataclass(frozen=True)
class Case:
    """A model, a KV format, and flags of the kernels' compiler."""

    model: ModelConfig
    quant_policy: int = 8
    flags: tuple[str, ...] = ()


MODEL = tiny_model(head_dim=64)
HALF = dataclasses.replace(MODEL, weight_type="fp16", group_size=0)
CASES = {
    "group 32, online int8": Case(MODEL),
    "plain kernels": Case(MODEL, flags=("-DTURBOJET_PLAIN=1",)),
    "group 64, 576 columns, nine heads on three, tied head, fp16 cache": Case(
        tiny_model(
            hidden_size=576,
            num_attention_heads=9,
            num_kv_heads=3,
            head_dim=64,
            group_size=64,
            tie_word_embeddings=True,
        ),
        quant_policy=0,
    ),
    "group 128, head_dim 128, biases, norms, two ranks, int8 head, static int8": Case(
        tiny_model(
            hidden_size=256,
            intermediate_size=256,
            num_attention_heads=2,
            head_dim=128,
            group_size=128,
            has_attention_bias=True,
            has_qk_norm=True,
            head_type="int8",
            tensor_para_size=2,
        ),
        quant_policy=4,
    ),
    "some linears fp16": Case(
        dataclasses.replace(
            MODEL,
            fp16_linears=(
                "layers.0.attention.w_qkv",
                "layers.0.feed_forward.w13",
                "layers.1.attention.wo",
                "layers.1.feed_forward.w2",
            ),
        )
    ),
    "fp16, two ranks": Case(dataclasses.replace(HALF, tensor_para_size=2)),
    "bf16": Case(dataclasses.replace(HALF, weight_type="bf16"), quant_policy=0),
}


@dataclass(frozen=True)
class Prepared:
    """A package on disk and the device that shall run it."""

    root: Path
    fake: EmulatedCuda


def prepare(
    root: Path,
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    device: type[EmulatedCuda] = EmulatedCuda,
) -> Prepared:
    monkeypatch.delenv("TURBOJET_KERNELS", raising=False)
    group_size = case.model.group_size or 128
    if not root.exists():
        make_package(
            root,
            case.model,
            kv_scale=KvScale(1 / 16, 0.1, 1 / 16, -0.1) if case.quant_policy == 4 else None,
            quant_policy=case.quant_policy,
            session_len=256,
            max_batch_size=8,
        )
        write_cubins(root / names.KERNELS_DIR, group_size=group_size)
    fake = device(group_size=group_size, flags=case.flags)
    return Prepared(root, install(monkeypatch, fake))


@pytest.fixture(params=CASES)
def prepared(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Prepared]:
    folder = tmp_path_factory.mktemp("package") / "tiny"
    prepared = prepare(folder, CASES[request.param], monkeypatch)
    yield prepared
    left = (prepared.fake.num_bytes, prepared.fake.contexts, prepared.fake.pinned)
    assert left == (0, 0, {})


@pytest.fixture
def plainest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    return prepare(tmp_path / "tiny", Case(MODEL), monkeypatch)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 317, length).tolist()


def tokens_of(
    engine: Engine, prompts: list[list[int]], params: GenerationParams
) -> list[list[int]]:
    got: list[list[int]] = [[] for _ in prompts]
    for index, output in engine.generate_many([Request(tuple(p), params) for p in prompts]):
        got[index] += output.token_ids
    return got


def test_logits_and_tokens_are_the_references(prepared: Prepared) -> None:
    ids = prompt(75)
    params = GenerationParams(max_tokens=8, sampling=GREEDY, ignore_eos=True)
    with Engine.open(prepared.root, CUDA) as cuda, Engine.open(prepared.root, REFERENCE) as known:
        for count in (1, 9, 75):
            want, got = known.logits(ids[:count]), cuda.logits(ids[:count])
            norms = np.linalg.norm(want, axis=1) * np.linalg.norm(got, axis=1)
            # Activations are rounded to fp16 between kernels, 2^-11 each.
            assert ((want * got).sum(1) / norms).min() > 0.9999
            assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)
        (chosen,) = tokens_of(cuda, [ids[:20]], params)
        logits = known.logits(ids[:20] + chosen)[19:-1]
        cuda.check_integrity()
    # Where two tokens are closer than rounding, either may win.
    best = logits.max(1)
    assert (best - logits[np.arange(8), chosen] < 0.05 * logits.std(1)).all()


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_graphs_and_single_launches_choose_the_same_tokens(
    plainest: Prepared, monkeypatch: pytest.MonkeyPatch, sampling: SamplingParams
) -> None:
    params = GenerationParams(max_tokens=6, sampling=sampling, ignore_eos=True)
    prompts = [prompt(5), prompt(12, seed=1)]
    with Engine.open(plainest.root, CUDA) as engine:
        by_graph = tokens_of(engine, prompts, params)
    assert "cuGraphLaunch" in plainest.fake.calls
    plainest.fake.calls.clear()
    monkeypatch.setenv(EAGER_VARIABLE, "1")
    with Engine.open(plainest.root, CUDA) as engine:
        assert tokens_of(engine, prompts, params) == by_graph
    assert "cuGraphLaunch" not in plainest.fake.calls


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_sequence_gives_the_same_tokens_alone_and_in_a_batch_of_8(
    plainest: Prepared, sampling: SamplingParams
) -> None:
    params = GenerationParams(max_tokens=5, sampling=sampling, ignore_eos=True)
    prompts = [prompt(length, seed=length) for length in (9, 3, 70, 20, 33, 64, 65, 12)]
    # Not all prompts fit a step.
    with Engine.open(plainest.root, dataclasses.replace(CUDA, max_tokens_per_step=72)) as engine:
        together = tokens_of(engine, prompts, params)
    for index in (0, 2):
        with Engine.open(plainest.root, CUDA) as engine:
            assert tokens_of(engine, [prompts[index]], params) == [together[index]]


def test_more_sequences_decode_together_than_a_step_takes_tokens_of_prompts(
    plainest: Prepared,
) -> None:
    params = GenerationParams(max_tokens=4, sampling=GREEDY, ignore_eos=True)
    prompts = [prompt(length, seed=length) for length in (6, 3, 1, 2, 5)]
    narrow = dataclasses.replace(CUDA, max_batch_size=8, max_tokens_per_step=3)
    with Engine.open(plainest.root, narrow) as engine:
        assert engine.plan.max_batch_size == 8
        together = tokens_of(engine, prompts, params)
    with Engine.open(plainest.root, narrow) as engine:
        assert [tokens_of(engine, [each], params)[0] for each in prompts] == together


def test_a_conversation_goes_on_from_its_pages(plainest: Prepared) -> None:
    params = GenerationParams(max_tokens=5, sampling=GREEDY, ignore_eos=True)
    with Engine.open(plainest.root, CUDA) as engine:
        session = engine.new_session()
        first = prompt(70)
        answer = [t for output in engine.generate(first, params, session) for t in output.token_ids]
        longer = first + answer + prompt(9, seed=5)
        outputs = list(engine.generate(longer, params, session))
        assert outputs[-1].num_cached_tokens >= 70 + 4
        again = [token for output in outputs for token in output.token_ids]
    with Engine.open(plainest.root, REFERENCE) as known:
        logits = known.logits(longer + again)[len(longer) - 1 : -1]
    best = logits.max(1)
    assert (best - logits[np.arange(5), again] < 0.05 * logits.std(1)).all()


def test_sequences_that_were_preempted_answer_like_the_reference(plainest: Prepared) -> None:
    # Three pages of 64 tokens for three sequences that come to need two each.
    small = dataclasses.replace(CUDA, cache_max_entry_count=3.0, session_len=128)
    params = GenerationParams(max_tokens=8, sampling=GREEDY, ignore_eos=True)
    prompts = [prompt(60, seed=seed) for seed in range(3)]
    with Engine.open(plainest.root, small) as engine:
        found = tokens_of(engine, prompts, params)
        assert engine._scheduler.num_preemptions > 0
        engine.check_integrity()
    with Engine.open(plainest.root, REFERENCE) as known:
        for ids, chosen in zip(prompts, found, strict=True):
            logits = known.logits(ids + chosen)[59:-1]
            assert (logits.max(1) - logits[np.arange(8), chosen] < 0.05 * logits.std(1)).all()


def test_sequences_that_join_leave_and_are_cancelled_lose_nothing(plainest: Prepared) -> None:
    rng = np.random.default_rng(3)
    with Engine.open(plainest.root, CUDA) as engine:
        taken, active, generated = plainest.fake.num_bytes, [], 0
        while generated < 60:
            while len(active) < 6:
                params = GenerationParams(
                    max_tokens=int(rng.integers(1, 9)),
                    sampling=SamplingParams(seed=int(rng.integers(1 << 40))),
                )
                active.append(engine.add(prompt(int(rng.integers(1, 40)), len(active)), params))
            if rng.random() < 0.3:
                engine.cancel(active[int(rng.integers(len(active)))])
            for output in engine.step():
                generated += len(output.token_ids)
                if output.finish_reason is not None:
                    active.remove(output.sequence_id)
            engine.check_integrity()
        assert plainest.fake.num_bytes == taken


@pytest.mark.parametrize("width", [1, 3])
def test_the_nodes_of_a_step_are_measured_beside_reading(plainest: Prepared, width: int) -> None:
    opened = open_engine(open_package(plainest.root), CUDA)
    nodes = node_times(opened, Workload(40, 9, width))
    read = {node.name: node for node in nodes if node.num_bytes}
    # 40 tokens of 2 kv heads: 64 codes, scale and zero, of keys and of values.
    assert read["attention"].num_bytes == 40 * width * 2 * 2 * (64 + 4)
    # 4 bits a weight and 4 bytes a group of 32: qkv 128 x 512, wo 256 x 128, w13 128 x 384.
    sizes = [read[name].num_bytes for name in ("qkv", "wo", "gate+up", "down")]
    assert sizes == [count * 5 // 8 for count in (65536, 32768, 49152, 24576)]
    assert read["layer"].num_bytes == sum(sizes) + read["attention"].num_bytes
    # The fake's events are half a millisecond apart; there are two layers.
    assert all(node.seconds == pytest.approx(0.25e-3) for node in nodes)
    assert read["qkv"].ratio == pytest.approx(1.0)
    assert read["layer"].ratio == pytest.approx(1 / 5)
    others = {node.kernel for node in nodes if not node.num_bytes}
    assert others == ({"w4a16_quantize_norm_4", "w4a16_quantize_4"} if width > 1 else set())


def test_bf16_values_become_the_nearest_fp16() -> None:
    values = np.array([1.0, -2.5, 65280.0, 2.0**-24, 0.0, np.inf], np.float32)
    halves = to_half(bfloat16.from_float32(values), "a")
    assert halves.astype(np.float32).tolist() == values.tolist()


def test_bf16_values_that_fp16_cannot_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(tmp_path / "tiny", CASES["bf16"], monkeypatch)
    for name in (names.FINAL_NORM, names.layer_tensor(1, names.W1, 0, names.WEIGHT)):
        path = prepared.root / names.weight_path(name)
        sound = path.read_bytes()
        bits = np.frombuffer(sound, np.uint16).copy()
        bits[5] = bfloat16.from_float32(np.array([-70000.0], np.float32))[0]
        path.write_bytes(bits.tobytes())
        with pytest.raises(DeviceError, match=rf"{name} holds 70144 in bf16, .* ends at 65504"):
            Engine.open(prepared.root, CUDA)
        path.write_bytes(sound)
        assert (prepared.fake.num_bytes, prepared.fake.pinned) == (0, {})

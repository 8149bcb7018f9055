"""The CUDA backend over a fake driver: what it launches, what it uploads, what it leaves behind."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest
from fake_cuda import FakeCuda, install, write_cubins
from tiny_package import make_package, tiny_model

from device_runtime import cli
from device_runtime.apps.bench_engine import open_engine
from device_runtime.backends.cuda import state as state_module
from device_runtime.backends.cuda.linears import Linears
from device_runtime.backends.cuda.slices import measure_slices
from device_runtime.backends.cuda.slots import IDLE, Slots
from device_runtime.backends.cuda.uploads import Uploads
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.backends.synthetic import SHAPES, synthetic_package
from device_runtime.engine.engine import Engine, EngineOptions, GenerationParams, Request
from device_runtime.errors import (
    DeviceError,
    InternalError,
    OutOfMemoryError,
    PackageError,
    UsageError,
)
from device_runtime.kernels.gemm_shape import GemmOutput
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.package import open_package

GREEDY = SamplingParams(temperature=0.0)
CUDA = EngineOptions(backend="cuda")
MODEL = tiny_model(
    hidden_size=256,
    intermediate_size=448,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    made = make_package(
        folder / "tiny", MODEL, quant_policy=8, session_len=512, max_batch_size=4
    ).root
    write_cubins(made / "kernels")
    return made


@pytest.fixture
def fake(monkeypatch) -> FakeCuda:
    monkeypatch.delenv("TURBOJET_KERNELS", raising=False)
    return install(monkeypatch)


def params(count: int, **sampling: float) -> GenerationParams:
    drawn = SamplingParams(**sampling) if sampling else GREEDY
    return GenerationParams(max_tokens=count, sampling=drawn, ignore_eos=True)


def tokens_of(engine: Engine, prompts, generation) -> list[list[int]]:
    got: list[list[int]] = [[] for _ in prompts]
    for index, output in engine.generate_many([Request(tuple(p), generation) for p in prompts]):
        got[index] += output.token_ids
    return got


def names_of(fake: FakeCuda) -> list[str]:
    """Kernels in order, those of a GEMM with what becomes of the product."""
    return [
        f"{row.name} {GemmOutput(row.arguments[-1]).name}" if "_gemm_" in row.name else row.name
        for row in fake.launches
    ]


def test_auto_takes_cuda_where_a_gpu_has_kernels(root, fake) -> None:
    with Engine.open(root, EngineOptions()) as engine:
        assert engine.backend_name == "cuda"
    assert (fake.num_bytes, fake.contexts, fake.pinned) == (0, 0, {})


def test_auto_takes_the_reference_where_kernels_are_missing(root, fake, monkeypatch) -> None:
    fake.attributes[75] = 12
    with Engine.open(root, EngineOptions()) as engine:
        assert engine.backend_name == "reference"
        assert engine.plan.notes[0].startswith("the GPU is not used: no kernels for sm_120 and")
    assert fake.contexts == 0
    with pytest.raises(DeviceError, match="no kernels for sm_120"):
        Engine.open(root, CUDA)


def test_auto_takes_the_reference_where_there_is_no_driver(root, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with Engine.open(root, EngineOptions()) as engine:
        assert engine.backend_name == "reference"
        assert not [note for note in engine.plan.notes if "GPU" in note]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 32}, "head_dim is 32, the kernels take 64 and 128; use the reference"),
        ({"num_attention_heads": 34}, "17 query heads share a kv head, the kernels take up to 16"),
        ({"group_size": 16}, "group_size is 16, the kernels take 128, 64 and 32"),
        ({"hidden_size": 224}, "hidden_size is 224, the kernels take multiples of 64"),
        (
            {"weight_type": "fp16", "group_size": 0, "intermediate_size": 450},
            "intermediate_size is 450, the kernels take multiples of 32",
        ),
    ],
)
def test_models_that_the_kernels_do_not_run_are_refused(tmp_path, fake, change, message) -> None:
    sizes = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        **change,
    }
    made = make_package(tmp_path / "odd", tiny_model(**sizes))
    with pytest.raises(DeviceError, match=message):
        Engine.open(made.root, CUDA)
    assert fake.contexts == 0


def test_layers_without_rope_get_a_rotation_that_turns_nothing(tmp_path, fake) -> None:
    model = dataclasses.replace(MODEL, num_hidden_layers=3, layers_without_rope=(1,))
    made = make_package(tmp_path / "nope", model, quant_policy=8, session_len=512)
    write_cubins(made.root / "kernels")
    with Engine.open(made.root, CUDA) as engine:
        tokens_of(engine, [range(3, 80)], params(2))
        # The rotation's place among the arguments: out, pages, partials, qkv, two norms
        # in decode_attention; pages, qkv, k_norm in store_kv; out, pages, qkv, q_norm in prefill.
        for name, place in (("decode_", 6), ("store_kv", 3), ("prefill_", 4)):
            used = [run.arguments[place] for run in fake.launches if run.name.startswith(name)]
            assert len(set(used[:3])) == 2, name
            assert used[0] == used[2] != used[1]
        plain = np.frombuffer(ctypes.string_at(used[1], 8 * 512 * 32), np.float32)
        assert (plain.reshape(-1, 2) == [1, 0]).all()


def test_a_decode_step_replays_one_graph_whatever_the_position(root, fake) -> None:
    with Engine.open(root, CUDA) as engine:
        fake.launches.clear()
        (tokens,) = tokens_of(engine, [range(3, 12)], params(30))
        # 3 + (7 * slot + position) % 300 of slot 0, from position 9 on.
        assert tokens == list(range(12, 42))
        names = names_of(fake)
    assert fake.calls.count("cuGraphLaunch") >= 29
    per_layer = [
        "w4a16_gemv_norm_1",
        "decode_attention_online",
        "w4a16_gemv_paired_add_1",
        "w4a16_gemv_norm_silu_1",
        "w4a16_gemv_paired_add_1",
    ]
    step = ["embed_f16", *per_layer * 2, "head_f16", "sample_top_f32"]
    first = names.index("sample_top_f32") + 1
    assert names[first : first + len(step)] == step
    assert "sample_draw_f32" not in names


def test_a_step_begins_when_all_before_it_is_done(root, fake) -> None:
    # Decode attention reads positions, which the sampler of the step before writes, ahead of its
    # wait: no launch of a step may overtake the one before, in a graph or outside.
    with Engine.open(root, CUDA) as engine:
        fake.launches.clear()
        tokens_of(engine, [[5, 6, 7]], params(4))
    assert sum(run.name == "embed_f16" for run in fake.launches) >= 4
    assert all(run.is_programmatic == (run.name != "embed_f16") for run in fake.launches)


def test_copies_that_no_stream_knows_of_are_there_before_anything_runs(root, fake) -> None:
    with Engine.open(root, EngineOptions(backend="cuda", quant_policy=0)):
        calls = fake.calls
        copies = [place for place, name in enumerate(calls) if name == "cuMemcpyHtoD_v2"]
        waits = [place for place, name in enumerate(calls) if name == "cuCtxSynchronize"]
        captured = calls.index("cuStreamBeginCapture_v2")
    assert max(copies, default=0) < waits[-1] < captured


def test_nothing_is_allocated_or_waited_for_while_it_decodes(root, fake) -> None:
    with Engine.open(root, CUDA) as engine:
        sequence_id = engine.add(range(3, 12), params(100))
        for _ in range(5):
            engine.step()
        fake.calls.clear()
        for _ in range(40):
            engine.step()
        assert set(fake.calls) == {"cuGraphLaunch"}
        engine.cancel(sequence_id)
        engine.step()


def test_a_new_page_is_one_word(root, fake) -> None:
    with Engine.open(root, CUDA) as engine:
        engine.add(range(3, 63), params(100))  # 60 tokens; the 65th opens a page
        engine.step()  # the prompt and three steps that run ahead
        fake.calls.clear()
        for _ in range(10):
            engine.step()
        assert fake.calls.count("cuMemsetD32Async") == 1


def test_sampling_that_is_not_greedy_runs_the_sampler(root, fake) -> None:
    with Engine.open(root, CUDA) as engine:
        fake.launches.clear()
        tokens_of(engine, [range(3, 12)], params(5, temperature=0.7, repetition_penalty=1.2))
        names = names_of(fake)
    assert names.count("sample_draw_f32") >= 5
    assert names.count("mark_seen") == 1


def test_prompts_beyond_8_tokens_take_gemms_and_no_longer_ones_stall_decoding(root, fake) -> None:
    options = EngineOptions(backend="cuda", max_tokens_per_step=64)
    with Engine.open(root, options) as engine:
        engine.add(range(3, 12), params(60))
        for _ in range(6):
            engine.step()
        fake.launches.clear()
        engine.add(np.arange(203) % 300, params(3))
        for _ in range(10):
            engine.step()
        names = names_of(fake)
    chunks = [
        index
        for index, launched in enumerate(fake.launches)
        if launched.name == "embed_f16" and launched.grid[1] > 8
    ]
    assert len(chunks) == 4  # 64 + 64 + 64 + 11
    for before, after in itertools.pairwise(chunks):
        assert "w4a16_gemv_norm_1" in names[before:after]
    assert any(name.startswith("w4a16_gemm") for name in names)


def test_fp16_models_run_norm_and_gemm_at_every_width(tmp_path, fake) -> None:
    made = make_package(
        tmp_path / "half", dataclasses.replace(MODEL, weight_type="fp16", group_size=0)
    )
    write_cubins(made.root / "kernels")
    with Engine.open(made.root, CUDA) as engine:
        fake.launches.clear()
        (tokens,) = tokens_of(engine, [range(3, 12)], params(4))
        assert len(tokens) == 4
        names = names_of(fake)
    first = names.index("sample_top_f32") + 2
    assert names[first : first + 7] == [
        "rms_norm_f16",
        "f16_gemm_8 HALF",
        "decode_attention_half",
        "f16_gemm_8 ADD",
        "rms_norm_f16",
        "f16_gemm_8 SILU",
        "f16_gemm_8 ADD",
    ]


def test_linears_that_stay_fp16_take_their_own_kernels(tmp_path, fake) -> None:
    kept = ("layers.0.attention.w_qkv", "layers.0.feed_forward.w13", "layers.1.feed_forward.w2")
    made = make_package(
        tmp_path / "mixed", dataclasses.replace(MODEL, fp16_linears=kept), max_batch_size=2
    )
    write_cubins(made.root / "kernels")
    with Engine.open(made.root, CUDA) as engine:
        fake.launches.clear()
        tokens_of(engine, [range(3, 12)], params(4))
        names = names_of(fake)
        fake.launches.clear()
        engine.logits(list(range(3, 60)))
        engine.logits(list(range(3, 43)))
        prompts = [name for name in names_of(fake) if "gem" in name or "norm" in name]
    first = names.index("sample_top_f32") + 2
    assert names[first : first + 11] == [
        "rms_norm_f16",
        "f16_gemm_8 HALF",
        "decode_attention_half",
        "w4a16_gemv_paired_add_1",
        "rms_norm_f16",
        "f16_gemm_8 SILU",
        "w4a16_gemv_paired_add_1",
        "w4a16_gemv_norm_1",
        "decode_attention_half",
        "w4a16_gemv_paired_add_1",
        "w4a16_gemv_norm_silu_1",
    ]
    assert names[first + 11] == "f16_gemm_8 ADD"
    # 57 and 40 tokens: tile 64 of both kinds.
    passes = [
        *("rms_norm_f16", "f16_gemm_64 HALF", "w4a16_gemm_64 ADD"),
        *("rms_norm_f16", "f16_gemm_64 SILU", "w4a16_gemm_64 ADD"),
        *("rms_norm_f16", "w4a16_gemm_64 HALF", "w4a16_gemm_64 ADD"),
        *("rms_norm_f16", "w4a16_gemm_64 SILU", "f16_gemm_64 ADD"),
    ]
    assert prompts == passes * 2


def test_passes_share_launches_only_where_both_kinds_of_matrices_do(root, fake) -> None:
    mixed = dataclasses.replace(MODEL, fp16_linears=("layers.0.attention.wo",))
    kernels, buffers = object(), {}
    keys = {
        # 12 and 16 tokens: W4 tile 16, fp16 tile 32; 33 to 64: both 64; 90: W4 tile 32.
        model: [Linears(model, kernels, buffers).program_key(n) for n in (5, 12, 16, 33, 64, 90)]
        for model in (MODEL, mixed)
    }
    assert keys[MODEL] == [5, 16000, 16000, 64000, 64000, 32000]
    assert keys[mixed] == [5, 16032, 16032, 64064, 64064, 32064]


def test_sequences_in_any_slot_decode_in_the_narrowest_graph(root, fake) -> None:
    with Engine.open(root, CUDA) as engine:
        lengths = (5, 6, 7, 40)
        for length in lengths:
            engine.add(range(3, 12), params(length))
        for _ in range(16):
            engine.step()
        fake.launches.clear()
        for _ in range(10):
            engine.step()
        widths = {launched.grid[1] for launched in fake.launches if "attention" in launched.name}
        assert widths == {1}


def test_tokens_survive_moves_and_slots_that_change_hands(root, fake) -> None:
    # The token depends on the position alone, whatever slot the sequence has.
    fake.choose = lambda slot, position: 3 + position % 300
    rng = np.random.default_rng(5)
    with Engine.open(root, CUDA) as engine:
        wanted, got = {}, {}
        for _ in range(400):
            if len(wanted) < 60 and rng.random() < 0.5:
                length, count = int(rng.integers(1, 90)), int(rng.integers(1, 25))
                sequence_id = engine.add(rng.integers(3, 300, length).tolist(), params(count))
                wanted[sequence_id] = [3 + p % 300 for p in range(length, length + count)]
                got[sequence_id] = []
            for output in engine.step():
                got[output.sequence_id] += output.token_ids
            engine.check_integrity()
        assert len(wanted) == 60
        assert got == wanted


def test_a_token_that_is_not_finite_is_a_package_error(root, fake) -> None:
    fake.choose = lambda slot, position: -1 if position == 14 else 5
    with Engine.open(root, CUDA) as engine:
        with pytest.raises(PackageError, match="the logits at position 14 are not finite"):
            tokens_of(engine, [range(3, 12)], params(30))
        fake.choose = lambda slot, position: 7
        assert tokens_of(engine, [range(3, 12)], params(3)) == [[7, 7, 7]]
    assert fake.num_bytes == 0


def test_a_failing_step_ends_generations_and_leaves_the_engine_usable(root, fake) -> None:
    with Engine.open(root, CUDA) as engine:
        fake.failing["cuGraphLaunch"] = 700
        with pytest.raises(DeviceError, match="cuGraphLaunch failed"):
            tokens_of(engine, [range(3, 12)], params(30))
        engine.check_integrity()
        fake.failing.clear()
        assert len(tokens_of(engine, [range(3, 12)], params(30))[0]) == 30
    assert (fake.num_bytes, fake.contexts) == (0, 0)


def test_pages_that_did_not_go_up_go_up_in_a_later_step(root, fake, monkeypatch) -> None:
    put = Uploads.put
    with Engine.open(root, CUDA) as engine:
        table = engine._backend._runner.memory.buffers["page_table"]

        def interrupted(uploads, address, values) -> None:
            if address == table:
                raise KeyboardInterrupt
            put(uploads, address, values)

        monkeypatch.setattr(Uploads, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokens_of(engine, [[5] * 100], params(3))
        monkeypatch.setattr(Uploads, "put", put)
        tokens_of(engine, [[5] * 100], params(3))
        used = engine._backend._runner.state.slots.pages[0]
        assert len(used) == 2
        assert tuple((ctypes.c_int32 * 2).from_address(table)) == used


def test_a_lost_device_is_told_once_and_the_context_is_left(root, fake) -> None:
    with (
        pytest.raises(DeviceError, match=r"^cuGraphLaunch failed: .*700\); start again, and if"),
        Engine.open(root, CUDA) as engine,
    ):
        engine.add(range(3, 12), params(30))
        engine.step()
        fake.is_lost = True
        for _ in range(30):
            engine.step()
    assert fake.contexts == 0


def test_a_device_that_is_silent_is_told(root, fake, monkeypatch) -> None:
    monkeypatch.setattr(state_module, "_CHECK_EVERY", 10)
    monkeypatch.setattr(state_module, "_SPINS", 5)
    with Engine.open(root, CUDA) as engine:
        monkeypatch.setattr(fake, "_sample", lambda launched: None)
        with pytest.raises(InternalError, match="the device chose no token for position 9"):
            tokens_of(engine, [range(3, 12)], params(3))
        fake.failing |= {"cuStreamQuery": 719, "cuStreamSynchronize": 719}
        with pytest.raises(DeviceError, match="cuStreamSynchronize failed"):
            tokens_of(engine, [range(3, 12)], params(3))


def test_everything_is_freed_when_loading_fails_at_any_call(root, fake) -> None:
    for call in ("cuModuleGetFunction", "cuStreamEndCapture", "cuMemcpyHtoDAsync_v2"):
        fake.failing = {call: 719}
        with pytest.raises(DeviceError, match=f"{call} failed"):
            Engine.open(root, CUDA)
        assert (fake.num_bytes, fake.contexts, fake.pinned) == (0, 0, {}), call


def test_the_plan_counts_what_is_taken(root, fake) -> None:
    with Engine.open(root, CUDA) as engine:
        plan = engine.plan
        assert plan.backend == "cuda"
        taken = fake.num_bytes
        # Blocks are rounded up, the launch reserve is for the driver.
        assert plan.weight_bytes + plan.kv_bytes <= taken <= plan.total_bytes + 4096
        assert sum(len(block) for block in fake.pinned.values()) < 1 << 20


def test_a_memory_limit_makes_a_small_device_of_a_big_one(root, fake) -> None:
    with Engine.open(root, EngineOptions(backend="cuda", memory_limit_bytes=1 << 27)) as engine:
        assert engine.plan.available_bytes == 1 << 27
    with pytest.raises(OutOfMemoryError, match=r"weights 0 MiB \+ workspace .* take \d+ MiB of 4"):
        Engine.open(root, EngineOptions(backend="cuda", memory_limit_bytes=1 << 22))
    with Engine.open(root, EngineOptions(backend="cuda", memory_limit_bytes=1 << 40)) as engine:
        assert any("the memory limit of 1048576 MiB is more" in note for note in engine.plan.notes)


def test_unified_memory_goes_by_memavailable(root, fake, monkeypatch) -> None:
    fake.attributes[18] = 1
    monkeypatch.setattr(
        "device_runtime.backends.cuda.survey.available_memory_bytes", lambda: 3 << 30
    )
    with Engine.open(root, CUDA) as engine:
        assert engine.plan.available_bytes == 3 << 30


def test_static_int8_needs_its_parameters(tmp_path, root, fake) -> None:
    with pytest.raises(PackageError, match="needs past_kv_scale files"):
        Engine.open(root, EngineOptions(backend="cuda", quant_policy=4))
    made = make_package(tmp_path / "scaled", MODEL, kv_scale=KvScale(1 / 8, 0.5, 1 / 4, -0.5))
    write_cubins(made.root / "kernels")
    with Engine.open(made.root, EngineOptions(backend="cuda", quant_policy=4)) as engine:
        fake.launches.clear()
        tokens_of(engine, [range(3, 12)], params(2))
        launched = next(f for f in fake.launches if f.name == "decode_attention_static")
        row = (ctypes.c_float * 4).from_address(int(launched.arguments[8]))
        assert list(row) == [0.125, 0.5, 0.25, -0.5]


def test_a_synthetic_model_is_filled_on_the_device(fake, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TURBOJET_KERNELS", str(write_cubins(tmp_path, group_size=64)))
    package = synthetic_package("smollm2-135m", max_batch_size=1, session_len=128)
    opened = open_engine(package, CUDA)
    with opened.engine as engine:
        (tokens,) = tokens_of(engine, [range(3, 12)], params(4))
        assert len(tokens) == 4
    assert (fake.num_bytes, fake.contexts) == (0, 0)


def test_synthetic_models_are_known_by_name() -> None:
    with pytest.raises(UsageError, match="no synthetic model is called 'gpt-5'; known: llama-2-7b"):
        synthetic_package("gpt-5")
    for name in SHAPES:
        package = synthetic_package(name, head_type="int8")
        assert package.model.head_type == "int8"
    # 32 x (4096 x 12288 + 4096 x 4096 + 3 x 4096 x 11008) weights of 4.25 bits, two fp16 tables.
    assert synthetic_package("llama-2-7b").weight_bytes == pytest.approx(3.97e9, rel=0.01)


def test_slots_are_given_lowest_first_and_taken_back() -> None:
    slots = Slots(3)
    taken = [slots.take(i, GREEDY, 1e4) for i in (10, 11, 12)]
    assert [slot.index for slot in taken] == [0, 1, 2]
    with pytest.raises(InternalError, match="all 3 slots of the device are taken"):
        slots.take(13, GREEDY, 1e4)
    slots.drop(11)
    slots.drop(11)
    assert slots.take(13, GREEDY, 1e4).index == 1
    assert slots.num_taken == 3


def test_moves_bring_decoding_slots_inside_and_others_out() -> None:
    slots = Slots(6)
    a, b, c, d = (slots.take(i, GREEDY, 1e4) for i in range(4))
    slots.positions[:4] = [5, 6, 7, 8]
    # c and d decode in a graph of two: a and b make way for them.
    moves = slots.plan_moves([c, d], 2)
    assert [(slot.index, place) for slot, place in moves] == [(0, 4), (2, 0), (1, 5), (3, 1)]
    for slot, place in moves:
        slots.move(slot, place)
    assert [s.index for s in (a, b, c, d)] == [4, 5, 0, 1]
    assert slots.positions[:2] == [7, 8]
    assert IDLE == -1


def test_the_report_of_a_bench_is_json(root, fake, capsys, monkeypatch) -> None:
    monkeypatch.setattr("device_runtime.backends.cuda.probe._READ_BYTES", 1 << 20)
    arguments = ["bench", str(root), "--prompt", "4,9", "--completion", "3", "--repeats", "2"]
    assert cli.main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backend"] == "cuda"
    assert facts["machine"]["device"] == "Fake GPU"
    # 8 reads of a MiB in half a millisecond.
    assert facts["machine"]["read_bytes_s"] == pytest.approx(8 * (1 << 20) / 0.5e-3)
    assert [row["prompt_tokens"] for row in facts["results"]] == [4, 9]


def test_slices_count_their_sms_and_clocks(root, fake) -> None:
    probe = fake._run

    def run(launched) -> None:
        probe(launched)
        if launched.name.startswith(("w4a16_gemv_add", "w4a16_gemv_paired_add")):
            # Half a millisecond for each 4096 outputs.
            outputs = launched.arguments[8]
            fake.milliseconds = 0.5 * outputs / 4096 if is_steady else 0.5
        if launched.name == "sm_probe":
            ids, spins = launched.arguments[:2]
            for block in range(launched.grid[0]):
                ctypes.c_uint32.from_address(ids + 4 * block).value = block % fake_sms
                ctypes.c_uint64.from_address(spins + 16 * block).value = 2_000_000
                ctypes.c_uint64.from_address(spins + 16 * block + 8).value = 1_000_000

    fake._run = run
    is_steady = True
    with open_engine(open_package(root), CUDA).engine as engine:
        driver = engine._backend.driver
        fake_sms = 132
        rates = measure_slices(driver, engine.package)
        assert [(rate.num_sms, rate.num_tokens) for rate in rates] == [
            (sms, tokens) for sms in (8, 14, 16) for tokens in (1, 4, 8)
        ]
        # 4096 outputs more take 20 launches 0.5 ms longer, at 2 GHz:
        # 4096 x 4096 / (25 us x 2 GHz x 8 SMs)
        assert rates[0].weights_per_clock == pytest.approx(4096 * 4096 / (25e-6 * 2e9 * 8))
        fake_sms = 3
        with pytest.raises(DeviceError, match="8 blocks ran on 3 SMs, expected one on each"):
            measure_slices(driver, engine.package)
        is_steady = False
        with pytest.raises(DeviceError, match=r"8192 outputs took 25\.0 us, one of 4096 25\.0;"):
            measure_slices(driver, engine.package)
    assert fake.num_bytes == 0

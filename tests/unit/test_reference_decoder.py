"""The reference backend against a plain fp64 model, for every shape it has to know."""

import dataclasses

import numpy as np
import plain_model
import pytest
from tiny_package import DEFAULT_KV_SCALE, make_package, tiny_model

from device_runtime.backends.reference.backend import ReferenceBackend, available_memory_bytes
from device_runtime.engine.batch_builder import build_evaluation_batch
from device_runtime.engine.engine import Engine, EngineOptions
from device_runtime.errors import (
    DeviceError,
    InternalError,
    OutOfMemoryError,
    PackageError,
    UsageError,
)
from device_runtime.package_format.model_config import RopeScaling

FLOAT = {"weight_type": "fp16", "group_size": 0}
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_position_embeddings=64)
MIXED = (
    "layers.0.attention.w_qkv",
    "layers.0.feed_forward.w13",
    "layers.1.attention.wo",
    "layers.1.feed_forward.w2",
)
MODELS = {
    "w4 group 32": {},
    "w4 group 64 head_dim 64 one kv head": {
        "group_size": 64,
        "head_dim": 64,
        "num_kv_heads": 1,
        "num_attention_heads": 2,
    },
    "w4 group 128 head_dim 128 no sharing": {
        "group_size": 128,
        "head_dim": 128,
        "num_attention_heads": 2,
        "num_kv_heads": 2,
        "intermediate_size": 256,
    },
    "eight query heads to a kv head": {"num_attention_heads": 8, "num_kv_heads": 1},
    "three query heads to a kv head": {"num_attention_heads": 6, "num_kv_heads": 2},
    "biases": {"has_attention_bias": True},
    "q and k norms": {"has_qk_norm": True},
    "tied head": {"tie_word_embeddings": True},
    "int8 head": {"head_type": "int8"},
    "int8 head of a tied model": {"head_type": "int8", "tie_word_embeddings": True},
    "fp16 weights": FLOAT,
    "bf16 weights, biases, norms": {
        "weight_type": "bf16",
        "group_size": 0,
        "has_attention_bias": True,
        "has_qk_norm": True,
    },
    "two ranks": {"tensor_para_size": 2, "has_attention_bias": True},
    "two ranks of fp16, odd vocabulary": {**FLOAT, "tensor_para_size": 2, "vocab_size": 301},
    "some linears fp16": {"fp16_linears": MIXED},
    "some linears fp16, two ranks, biases": {
        "fp16_linears": MIXED,
        "tensor_para_size": 2,
        "has_attention_bias": True,
    },
    "linear rope": {"rope_scaling": RopeScaling("linear", 4.0)},
    "llama3 rope": {"rope_scaling": LLAMA3},
    "layers without rope": {"num_hidden_layers": 3, "layers_without_rope": (0, 2)},
    "log-n attention without rope in one layer": {
        "layers_without_rope": (1,),
        "use_logn_attn": True,
        "max_position_embeddings": 40,
    },
    "log-n attention": {"use_logn_attn": True, "max_position_embeddings": 40},
}


def token_ids(count, seed=3):
    return np.random.default_rng(seed).integers(3, 300, count).tolist()


def open_tiny(tmp_path, model, options=None, **config):
    made = make_package(tmp_path / "p", model, **config)
    return made, Engine.open(made.root, options or EngineOptions())


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_logits_are_those_of_the_plain_model(tmp_path, changes) -> None:
    made, engine = open_tiny(tmp_path, tiny_model(**changes), session_len=256)
    ids = token_ids(70)
    with engine:
        found = engine.logits(ids)
    expected = plain_model.logits(made, ids)
    assert found.shape == expected.shape == (70, made.model.vocab_size)
    # fp32 against fp64: about 1e-5; a key that rounds to the other fp16 neighbour: a few 1e-4.
    assert np.abs(found - expected).max() < 2e-3
    assert expected.std() > 0.5


def test_dynamic_ntk_follows_the_planned_length(tmp_path) -> None:
    model = tiny_model(rope_scaling=RopeScaling("dynamic", 2.0), max_position_embeddings=32)
    made, engine = open_tiny(tmp_path, model, session_len=256)
    with engine:
        long, short = engine.logits(token_ids(70)), engine.logits(token_ids(30))
    # s = 2 * 70 / 32 - 1 = 3.375, theta' = 10000 * 3.375^(32/30); 30 tokens stay below 32.
    theta = 10000 * 3.375 ** (32 / 30)
    expected = plain_model.logits(made, token_ids(70), theta=theta)
    assert np.abs(long - expected).max() < 2e-3
    assert np.abs(short - plain_model.logits(made, token_ids(30))).max() < 2e-3


def test_qwen1_stretches_rope_by_powers_of_two(tmp_path) -> None:
    model = tiny_model(rope_scaling=RopeScaling("qwen1"), max_position_embeddings=32)
    made, engine = open_tiny(tmp_path, model, session_len=256)
    with engine:
        long, short = engine.logits(token_ids(70)), engine.logits(token_ids(32))
    # ceil(log2(70 / 32) + 1) is 3, so s = 2^3 - 1 = 7 and theta' = 10000 * 7^(32/30).
    expected = plain_model.logits(made, token_ids(70), theta=10000 * 7 ** (32 / 30))
    assert np.abs(long - expected).max() < 2e-3
    assert np.abs(short - plain_model.logits(made, token_ids(32))).max() < 2e-3


def test_a_session_longer_than_a_sliding_window_is_refused(tmp_path) -> None:
    model = tiny_model(sliding_window=96)
    made = make_package(tmp_path / "p", model, session_len=96)
    with pytest.raises(UsageError, match=r"session_len is 128, the layers .* look back 96 tokens"):
        Engine.open(made.root, EngineOptions(session_len=128))
    with Engine.open(made.root, EngineOptions(backend="reference")) as engine:
        assert engine.session_len == 96
    make_package(tmp_path / "edited", model, session_len=97)
    with pytest.raises(PackageError, match=r"session_len is 97, the layers .* look back 96 tokens"):
        Engine.open(tmp_path / "edited")


@pytest.mark.parametrize(
    ("policy", "kv", "tolerance"), [(0, "fp16", 2e-3), (4, "static", 0.12), (8, "online", 0.12)]
)
def test_each_kv_format_gives_the_logits_of_its_arithmetic(tmp_path, policy, kv, tolerance) -> None:
    made, engine = open_tiny(
        tmp_path,
        tiny_model(**FLOAT),
        kv_scale=DEFAULT_KV_SCALE,
        session_len=256,
        quant_policy=policy,
    )
    ids = token_ids(60)
    with engine:
        found = engine.logits(ids)
    expected = plain_model.logits(made, ids, kv=kv, kv_scale=DEFAULT_KV_SCALE)
    # fp32 and fp64 round some code to different neighbours; a wrong formula moves every code.
    difference = np.abs(found - expected)
    assert difference.max() < tolerance
    assert np.median(difference) < tolerance / 10
    exact = plain_model.logits(made, ids, kv="exact")
    assert np.abs(found - exact).mean() > 3 * difference.mean()


def test_the_option_overrides_the_quant_policy_of_config_ini(tmp_path) -> None:
    made = make_package(tmp_path / "p", quant_policy=8)
    with (
        Engine.open(made.root) as online,
        Engine.open(made.root, EngineOptions(quant_policy=0)) as half,
    ):
        assert online.plan.kv_format.value == 8
        assert half.plan.kv_format.value == 0


def test_static_int8_without_its_files_is_a_package_error(tmp_path) -> None:
    made = make_package(tmp_path / "p", quant_policy=4)
    with pytest.raises(PackageError, match=r"needs past_kv_scale files, package tiny has none"):
        Engine.open(made.root)


def test_an_unknown_quant_policy_is_a_package_error(tmp_path) -> None:
    made = make_package(tmp_path / "p", quant_policy=3)
    with pytest.raises(PackageError, match="quant_policy is 3"):
        Engine.open(made.root)


@pytest.mark.parametrize(("policy", "tolerance"), [(0, 2e-3), (8, 0.12)])
def test_chunks_of_any_length_give_the_same_logits(tmp_path, policy, tolerance) -> None:
    made = make_package(tmp_path / "p", quant_policy=policy, session_len=256)
    ids = token_ids(150)
    found = []
    for chunk in (512, 64, 7, 1):
        with Engine.open(made.root, EngineOptions(max_tokens_per_step=chunk)) as engine:
            found.append(engine.logits(ids))
    for other in found[1:]:
        # Only sums in another order; now and then a key rounds to its other neighbour.
        assert np.median(np.abs(other - found[0])) < tolerance / 50
        assert np.abs(other - found[0]).max() < tolerance


def test_queries_are_worked_off_in_tiles_without_a_trace(tmp_path, monkeypatch) -> None:
    made = make_package(tmp_path / "p", session_len=256)
    with Engine.open(made.root) as engine:
        whole = engine.logits(token_ids(130))
        monkeypatch.setattr("device_runtime.backends.reference.attention.MAX_SCORES", 2000)
        tiled = engine.logits(token_ids(130))
    assert np.abs(whole - tiled).max() < 2e-3  # as above


def test_weights_that_do_not_fit_are_streamed_with_the_same_result(tmp_path) -> None:
    model = tiny_model(num_hidden_layers=4, head_type="int8")
    made = make_package(tmp_path / "p", model, session_len=64, cache_max_entry_count=1.0)
    ids = token_ids(40)
    with Engine.open(made.root) as engine:
        resident = engine.logits(ids)
        needed = engine.plan.total_bytes
        assert engine.plan.num_streamed_layers == 0
    options = EngineOptions(memory_limit_bytes=needed - 200_000)
    with Engine.open(made.root, options) as engine:
        assert 0 < engine.plan.num_streamed_layers <= 4
        assert "layers are read again in every step" in engine.plan.notes[0]
        assert np.abs(engine.logits(ids) - resident).max() < 1e-4


def test_too_little_memory_shows_the_arithmetic(tmp_path) -> None:
    made = make_package(tmp_path / "p")
    with pytest.raises(OutOfMemoryError, match=r"weights \d+ MiB \+ workspace \d+ MiB"):
        Engine.open(made.root, EngineOptions(memory_limit_bytes=1 << 20))


def test_an_allocation_that_the_system_refuses_is_a_sentence(tmp_path, monkeypatch) -> None:
    def refuse(*args):
        raise MemoryError

    monkeypatch.setattr("device_runtime.backends.reference.backend.make_kv_cache", refuse)
    made = make_package(tmp_path / "p")
    with pytest.raises(OutOfMemoryError, match=r"the system refuses \d+ MiB although \d+ MiB are"):
        Engine.open(made.root)


@pytest.mark.parametrize(
    ("content", "message"), [("MemFree: 5 kB", "has no MemAvailable"), (None, "cannot be read")]
)
def test_a_system_that_hides_its_memory_is_a_device_error(
    tmp_path, monkeypatch, content, message
) -> None:
    path = tmp_path / "meminfo"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr("device_runtime.backends.reference.backend._MEMORY_INFO", str(path))
    with pytest.raises(DeviceError, match=message):
        available_memory_bytes()


def test_a_backend_without_a_package_and_chained_rows_are_our_mistake() -> None:
    backend = ReferenceBackend()
    batch = build_evaluation_batch([5, 6], 0, 2, [0], 1e4)
    with pytest.raises(InternalError, match="has no package loaded"):
        backend.submit(batch)
    with pytest.raises(InternalError, match="no token outstanding to chain to"):
        backend.submit(dataclasses.replace(batch, is_chained=(True,)))


def test_weights_that_overflow_are_noticed_not_sampled(tmp_path) -> None:
    made = make_package(tmp_path / "p", tiny_model(**FLOAT, tie_word_embeddings=True))
    path = made.root / "triton_models/weights/norm.weight"
    values = np.fromfile(path, np.float16)
    values[3] = np.nan
    values.tofile(path)
    with Engine.open(made.root) as engine:
        with pytest.raises(PackageError, match="logits at position 4 hold nan"):
            list(engine.generate([5, 6, 7, 8]))
        engine.check_integrity()


def test_keys_beyond_fp16_are_noticed(tmp_path) -> None:
    made = make_package(tmp_path / "p", tiny_model(**FLOAT))
    path = made.root / "triton_models/weights/layers.1.attention.w_qkv.0.weight"
    np.full(path.stat().st_size // 2, 6e4, np.float16).tofile(path)
    with (
        Engine.open(made.root, EngineOptions(quant_policy=0)) as engine,
        pytest.raises(
            PackageError,
            match=r"a key or value of layer 1 is .*, the fp16 KV cache holds up to 65504",
        ),
    ):
        engine.logits([5, 6, 7])
    with (
        Engine.open(made.root, EngineOptions(quant_policy=8)) as engine,
        pytest.raises(
            PackageError,
            match=r"a key or value of layer 1 is .*, the int8 KV cache holds up to 65504",
        ),
    ):
        engine.logits([5, 6, 7])


def test_a_plain_workspace_gives_the_same_logits_as_a_package(tmp_path) -> None:
    with_manifest = make_package(tmp_path / "a", session_len=128)
    without = make_package(tmp_path / "b", session_len=128, has_manifest=False)
    with Engine.open(with_manifest.root) as one, Engine.open(without.root) as other:
        assert np.array_equal(one.logits([7, 8, 9]), other.logits([7, 8, 9]))

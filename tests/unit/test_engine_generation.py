"""The engine over the reference backend: options, sampling, sessions, stops."""

import dataclasses
import math
import sys

import numpy as np
import pytest
from tiny_package import DEFAULT_KV_SCALE, make_package, tiny_model

from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.engine import Engine, EngineOptions
from device_runtime.engine.generation import GenerationParams, Request
from device_runtime.errors import DeviceError, PackageError, RequestError, UsageError
from device_runtime.kernels import libcuda
from device_runtime.package_format.model_config import RopeScaling

GREEDY = SamplingParams(temperature=0.0)
WARM = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, seed=11)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_package(
        tmp_path_factory.mktemp("tiny") / "p", kv_scale=DEFAULT_KV_SCALE, session_len=256
    )


@pytest.fixture
def engine(made):
    with Engine.open(made.root) as opened:
        yield opened
        opened.check_integrity()


def prompt(length, seed=0):
    return tuple(np.random.default_rng(seed).integers(3, 250, length).tolist())


def params(sampling=GREEDY, max_tokens=20, **changes):
    return GenerationParams(max_tokens, sampling, **{"ignore_eos": True} | changes)


def tokens_of(outputs):
    return [token for output in outputs for token in output.token_ids]


def test_greedy_takes_the_largest_logit_of_each_position(engine) -> None:
    ids = list(prompt(9))
    answer = tokens_of(engine.generate(ids, params(max_tokens=12)))
    logits = engine.logits(ids + answer)
    assert answer == logits[len(ids) - 1 : -1].argmax(axis=-1).tolist()


@pytest.mark.parametrize("policy", [0, 4, 8])
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_sequence_answers_the_same_alone_and_in_a_batch(made, policy, sampling) -> None:
    with Engine.open(made.root, EngineOptions(quant_policy=policy)) as engine:
        prompts = [prompt(3 + 25 * n, seed=n) for n in range(4)]
        alone = [tokens_of(engine.generate(p, params(sampling))) for p in prompts]
    with Engine.open(made.root, EngineOptions(quant_policy=policy)) as engine:
        together = [[] for _ in prompts]
        requests = [Request(p, params(sampling)) for p in prompts]
        for index, output in engine.generate_many(requests):
            together[index].extend(output.token_ids)
    assert together == alone


def test_a_prefix_from_the_cache_gives_the_same_answer(engine) -> None:
    ids = prompt(150)
    fresh = list(engine.generate(ids, params(WARM)))
    cached = list(engine.generate(ids, params(WARM)))
    assert fresh[-1].num_cached_tokens == 0
    assert cached[-1].num_cached_tokens == 128
    assert tokens_of(fresh) == tokens_of(cached)


def test_preempted_sequences_answer_the_same(made) -> None:
    prompts = [prompt(40, seed=n) for n in range(4)]
    penalised = dataclasses.replace(WARM, repetition_penalty=1.3)
    setting = params(penalised, max_tokens=60)
    with Engine.open(made.root) as engine:
        alone = [tokens_of(engine.generate(p, setting)) for p in prompts]
    tight = EngineOptions(cache_max_entry_count=3.0, session_len=128)
    with Engine.open(made.root, tight) as engine:
        together = [[] for _ in prompts]
        for index, output in engine.generate_many([Request(p, setting) for p in prompts]):
            together[index].extend(output.token_ids)
        engine.check_integrity()
        assert engine._scheduler.num_preemptions > 0
    assert together == alone


def test_a_seed_reproduces_an_answer_and_another_gives_another(engine) -> None:
    def answer(seed):
        return tokens_of(engine.generate(prompt(5), params(dataclasses.replace(WARM, seed=seed))))

    assert answer(1) == answer(1)
    assert len({tuple(answer(seed)) for seed in range(5)}) == 5


def test_a_strong_repetition_penalty_forbids_every_token_seen(engine) -> None:
    ids = list(range(3, 160))  # longer than a chunk below, so the history grows over steps
    strong = SamplingParams(temperature=0.0, repetition_penalty=100.0)
    answer = tokens_of(engine.generate(ids, params(strong, max_tokens=40)))
    assert len(set(answer)) == 40
    assert not set(answer) & set(ids)


def test_the_penalty_knows_the_tokens_of_cached_pages_and_earlier_chunks(made) -> None:
    strong = params(SamplingParams(temperature=0.0, repetition_penalty=100.0), max_tokens=20)
    ids = list(range(3, 160))
    with Engine.open(made.root, EngineOptions(max_tokens_per_step=50)) as engine:
        first = tokens_of(engine.generate(ids, strong))
        second = list(engine.generate(ids, strong))
    assert second[-1].num_cached_tokens == 128
    assert tokens_of(second) == first
    assert not set(first) & set(ids)


def test_text_pieces_join_to_the_text_of_the_tokens(engine) -> None:
    outputs = list(engine.generate(prompt(6), params(WARM, max_tokens=60)))
    whole = engine.tokenizer.decode(tokens_of(outputs))
    assert "".join(output.text for output in outputs) == whole


def test_a_stop_string_ends_the_answer_before_it(engine) -> None:
    outputs = list(engine.generate(prompt(6), params(WARM, max_tokens=60)))
    whole = "".join(output.text for output in outputs)
    stop = whole[20:24]
    cut = list(engine.generate(prompt(6), params(WARM, max_tokens=60, stop=("never", stop))))
    assert "".join(output.text for output in cut) == whole[: whole.index(stop)]
    assert (cut[-1].finish_reason, cut[-1].stop_reason) == ("stop", stop)
    assert cut[-1].num_generated < 60


def test_eos_ends_an_answer_unless_it_is_ignored(tmp_path) -> None:
    found = make_package(tmp_path / "p", tiny_model(vocab_size=259), seed=4, session_len=2048)
    flat = SamplingParams(temperature=100.0, top_k=0, top_p=1.0)
    with Engine.open(found.root) as engine:
        ended = list(engine.generate(prompt(4), params(flat, 2000, ignore_eos=False)))
        assert ended[-1].finish_reason == "stop"
        assert ended[-1].stop_reason == 2
        assert 2 not in tokens_of(ended)
        assert ended[-1].num_generated == len(tokens_of(ended)) + 1
        ignoring = list(engine.generate(prompt(4), params(flat, ended[-1].num_generated + 5)))
        assert ignoring[-1].finish_reason == "length"
        assert 2 in tokens_of(ignoring)


def test_a_stop_string_that_spells_a_special_token_means_the_token(tmp_path) -> None:
    found = make_package(tmp_path / "p", tiny_model(vocab_size=259), seed=4, session_len=2048)
    flat = SamplingParams(temperature=100.0, top_k=0, top_p=1.0)
    with Engine.open(found.root) as engine:
        outputs = list(engine.generate(prompt(4), params(flat, 2000, stop=("<|im_start|>",))))
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", 1)
    assert 1 not in tokens_of(outputs)


def test_an_answer_stops_where_the_session_is_full(engine) -> None:
    outputs = list(engine.generate(prompt(250), params(max_tokens=None)))
    assert outputs[-1].finish_reason == "length"
    assert outputs[-1].num_generated == 6
    assert outputs[-1].num_prompt_tokens == 250


def test_an_output_tells_its_speed(engine) -> None:
    outputs = list(engine.generate(prompt(20), params(max_tokens=4)))
    assert outputs[0].ttft_s > 0
    assert outputs[0].decode_tok_s == 0.0
    assert outputs[-1].decode_tok_s > 0
    assert [output.num_generated for output in outputs] == [1, 2, 3, 4]


def test_options_go_before_config_ini_and_config_ini_before_defaults(tmp_path) -> None:
    found = make_package(
        tmp_path / "p",
        session_len=192,
        max_batch_size=3,
        quant_policy=8,
        cache_max_entry_count=5.0,
        cache_block_seq_len=128,
        num_tokens_per_iter=96,
    )
    with Engine.open(found.root) as engine:
        plan = engine.plan
        assert (plan.num_pages, plan.page_size) == (5, 128)
        assert (plan.session_len, plan.max_batch_size, plan.max_tokens_per_step) == (192, 3, 96)
        assert plan.kv_format.value == 8
        assert engine.session_len == 192
        assert engine.backend_name == "reference"
    options = EngineOptions("reference", 2.0, 0, 100, 2, 40)
    with Engine.open(found.root, options) as engine:
        plan = engine.plan
        assert (plan.num_pages, plan.kv_format.value, plan.session_len) == (2, 0, 100)
        assert (plan.max_batch_size, plan.max_tokens_per_step) == (2, 40)
    with Engine.open(make_package(tmp_path / "q").root) as engine:
        assert engine.plan.max_tokens_per_step == 512


def test_a_share_of_memory_is_capped_at_what_the_batch_can_use(tmp_path) -> None:
    found = make_package(
        tmp_path / "p", session_len=130, max_batch_size=3, cache_max_entry_count=0.5
    )
    with Engine.open(found.root) as engine:
        assert engine.plan.num_pages == 3 * math.ceil(130 / 64)


def test_a_small_cache_cuts_session_len_and_says_so(made) -> None:
    with Engine.open(made.root, EngineOptions(cache_max_entry_count=2.0)) as engine:
        assert engine.session_len == 128
        assert "session_len is cut from 256 to 128 tokens" in engine.plan.notes[0]
        with pytest.raises(RequestError, match="session_len is 128"):
            engine.generate(prompt(128))


def test_a_page_size_without_whole_tiles_is_refused(tmp_path) -> None:
    found = make_package(tmp_path / "p", cache_block_seq_len=100)
    with pytest.raises(PackageError, match="cache_block_seq_len is 100"):
        Engine.open(found.root)


@pytest.mark.parametrize(
    "name",
    [
        "cache_max_entry_count",
        "session_len",
        "max_batch_size",
        "max_tokens_per_step",
        "memory_limit_bytes",
    ],
)
def test_options_that_mean_nothing_are_refused(name) -> None:
    with pytest.raises(UsageError, match=f"{name} is 0, expected more than 0"):
        EngineOptions(**{name: 0})


def test_backends_that_are_not_there_are_refused(made, monkeypatch) -> None:
    def no_library() -> object:
        raise DeviceError("no CUDA driver was found (libcuda.so.1)")

    monkeypatch.setattr(libcuda, "_load", no_library)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(UsageError, match="backend is 'tpu', expected one of auto, reference, cuda"):
        Engine.open(made.root, EngineOptions(backend="tpu"))
    with pytest.raises(DeviceError, match="no CUDA driver was found"):
        Engine.open(made.root, EngineOptions(backend="cuda"))


def test_generation_params_outside_their_range_are_refused() -> None:
    with pytest.raises(RequestError, match="max_tokens is 0, expected at least 1"):
        GenerationParams(max_tokens=0)
    with pytest.raises(RequestError, match="a stop string is empty"):
        GenerationParams(stop=("a", ""))
    with pytest.raises(RequestError, match="65 stop strings, expected at most 64"):
        GenerationParams(stop=("x",) * 65)


def test_the_packages_sampling_defaults_are_offered(made, tmp_path) -> None:
    with Engine.open(made.root) as engine:
        assert engine.default_sampling == SamplingParams(0.8, 40, 0.8, 0.0, 1.0, 0)
    plain = make_package(tmp_path / "p", has_manifest=False, name="baichuan2-7b")
    with Engine.open(plain.root) as engine:
        assert engine.default_sampling.temperature == 0.3
        assert engine.template.name == "baichuan2-7b"


def test_a_plain_workspace_of_no_known_family_uses_its_own_template(tmp_path) -> None:
    plain = make_package(tmp_path / "p", has_manifest=False, name="somebody")
    with Engine.open(plain.root) as engine:
        assert engine.template.name == "tokenizer_config.json"


def test_dynamic_rope_is_decided_by_the_first_turn_and_never_shares_pages(tmp_path) -> None:
    model = tiny_model(rope_scaling=RopeScaling("dynamic", 2.0), max_position_embeddings=64)
    found = make_package(tmp_path / "p", model, session_len=256)
    ids = prompt(70)
    with Engine.open(found.root) as engine:
        session = engine.new_session()
        list(engine.generate(ids, params(max_tokens=10), session))
        decided = session.rope_theta
        assert decided > model.rope_theta
        longer = list(engine.generate(ids, params(max_tokens=150)))
        assert longer[-1].num_cached_tokens == 0  # another planned length, another rotation
        again = list(engine.generate([*ids, 5], params(max_tokens=100), session))
        assert again[-1].num_cached_tokens == 70
        assert session.rope_theta == decided
        engine.close_session(session)
        assert session.rope_theta == 0.0
        engine.check_integrity()


def test_logits_come_in_chunks_and_leave_no_pages_behind(made) -> None:
    with Engine.open(made.root, EngineOptions(max_tokens_per_step=100)) as engine:
        before = engine._scheduler.pool.num_available
        chunks = [len(chunk) for chunk in engine.iter_logits(prompt(250))]
        assert chunks == [100, 100, 50]
        stream = engine.iter_logits(prompt(250))
        next(stream)
        stream.close()
        assert engine._scheduler.pool.num_available == before
        engine.check_integrity()

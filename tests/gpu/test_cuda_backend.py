"""The CUDA backend against the reference backend on random packages; needs a GPU and cubins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tiny_package import make_package, tiny_model

from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.engine import Engine, EngineOptions, GenerationParams, Request
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.model_config import ModelConfig, RopeScaling

GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Case:
    """A model, a KV format and what config.ini says."""

    model: ModelConfig
    quant_policy: int = 8
    page_size: int = 64


def model(**changes: object) -> ModelConfig:
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 448,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "group_size": 32,
    }
    return tiny_model(**(sizes | changes))


CASES = {
    "group 32, online int8": Case(model()),
    "group 64, 576 columns, three heads on one, fp16 cache": Case(
        model(
            hidden_size=576,
            intermediate_size=1536,
            num_attention_heads=9,
            num_kv_heads=3,
            group_size=64,
            tie_word_embeddings=True,
        ),
        quant_policy=0,
    ),
    "group 128, head_dim 128, norms and biases, static int8, two ranks": Case(
        model(
            hidden_size=512,
            intermediate_size=768,
            head_dim=128,
            group_size=128,
            has_attention_bias=True,
            has_qk_norm=True,
            tensor_para_size=2,
            rope_scaling=RopeScaling("linear", 2.0),
        ),
        quant_policy=4,
        page_size=128,
    ),
    "int8 head, eight heads on one": Case(
        model(hidden_size=512, num_attention_heads=8, num_kv_heads=1, head_type="int8")
    ),
    "fp16, two ranks": Case(
        model(weight_type="fp16", group_size=0, tensor_para_size=2, has_attention_bias=True)
    ),
    "some linears fp16": Case(
        model(
            fp16_linears=(
                "layers.0.attention.w_qkv",
                "layers.0.feed_forward.w13",
                "layers.1.attention.wo",
                "layers.1.feed_forward.w2",
            )
        )
    ),
    "a vocabulary of 317": Case(model(vocab_size=317)),
    "log-n attention": Case(model(use_logn_attn=True, max_position_embeddings=128)),
}


@pytest.fixture(params=CASES, scope="module")
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("package") / "tiny"
    make_package(
        folder,
        case.model,
        kv_scale=KvScale(1 / 16, 0.1, 1 / 16, -0.1) if case.quant_policy == 4 else None,
        quant_policy=case.quant_policy,
        cache_block_seq_len=case.page_size,
        session_len=512,
        max_batch_size=8,
    )
    return folder


@pytest.fixture
def cuda(root: Path) -> Iterator[Engine]:
    with Engine.open(root, EngineOptions(backend="cuda")) as engine:
        yield engine
        engine.check_integrity()


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 317, length).tolist()


def tokens_of(
    engine: Engine, prompts: list[list[int]], params: GenerationParams
) -> list[list[int]]:
    got: list[list[int]] = [[] for _ in prompts]
    requests = [Request(tuple(ids), params) for ids in prompts]
    for index, output in engine.generate_many(requests):
        got[index] += output.token_ids
    return got


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """The smallest cosine of two rows."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.min((a * b).sum(1) / norms))


@pytest.mark.parametrize("length", [1, 5, 8, 9, 64, 150, 300])
def test_logits_of_a_prompt_are_the_references(root: Path, cuda: Engine, length: int) -> None:
    ids = prompt(length)
    with Engine.open(root, EngineOptions(backend="reference")) as reference:
        want = reference.logits(ids)
    got = cuda.logits(ids)
    assert got.shape == want.shape
    # Activations are rounded to fp16 between kernels, 2^-11 each.
    assert similarity(got, want) > 0.9999
    assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)


def test_greedy_tokens_follow_the_references_logits(root: Path, cuda: Engine) -> None:
    ids = prompt(37, seed=1)
    params = GenerationParams(max_tokens=120, sampling=GREEDY, ignore_eos=True)
    (chosen,) = tokens_of(cuda, [ids], params)
    assert len(chosen) == 120
    with Engine.open(root, EngineOptions(backend="reference")) as reference:
        logits = reference.logits(ids + chosen)[len(ids) - 1 : -1]
    # Where two tokens are closer than rounding, either may win: none is far below the best.
    best = logits.max(1)
    assert (best - logits[np.arange(120), chosen] < 0.05 * logits.std(1)).all()
    assert (logits.argmax(1) == chosen).mean() > 0.9


def test_a_sequence_gives_the_same_tokens_alone_and_in_a_batch_of_8(
    root: Path, cuda: Engine
) -> None:
    prompts = [prompt(length, seed=length) for length in (9, 3, 70, 20, 33, 64, 65, 12)]
    for sampling in (GREEDY, SamplingParams(seed=7, repetition_penalty=1.1)):
        params = GenerationParams(max_tokens=60, sampling=sampling, ignore_eos=True)
        together = tokens_of(cuda, prompts, params)
        for index in (0, 2, 7):
            # A fresh engine: pages that hold the start of a prompt save computing, and what is
            # left of it goes through kernels that round differently.
            with Engine.open(root, EngineOptions(backend="cuda")) as fresh:
                (alone,) = tokens_of(fresh, [prompts[index]], params)
            assert alone == together[index]


def test_sequences_join_leave_and_are_cancelled(cuda: Engine) -> None:
    rng = np.random.default_rng(3)
    active: list[int] = []
    generated = 0
    while generated < 1500:
        while len(active) < 10 and rng.random() < 0.7:
            sampling = SamplingParams(
                seed=int(rng.integers(1 << 40)), temperature=rng.choice([0.0, 0.9])
            )
            params = GenerationParams(
                max_tokens=int(rng.integers(1, 60)),
                sampling=sampling,
                ignore_eos=bool(rng.random() < 0.5),
            )
            active.append(
                cuda.add(prompt(int(rng.integers(1, 130)), int(rng.integers(99))), params)
            )
        if active and rng.random() < 0.05:
            cuda.cancel(int(rng.choice(active)))
        for output in cuda.step():
            generated += len(output.token_ids)
            if output.finish_reason is not None:
                active.remove(output.sequence_id)
        cuda.check_integrity()


def test_a_conversation_goes_on_from_its_pages(root: Path, cuda: Engine) -> None:
    session = cuda.new_session()
    params = GenerationParams(max_tokens=20, sampling=GREEDY, ignore_eos=True)
    first = prompt(40)
    answer = [t for output in cuda.generate(first, params, session) for t in output.token_ids]
    longer = first + answer + prompt(9, seed=5)
    outputs = list(cuda.generate(longer, params, session))
    again = [t for output in outputs for t in output.token_ids]
    assert outputs[-1].num_cached_tokens >= 59
    with Engine.open(root, EngineOptions(backend="reference")) as reference:
        logits = reference.logits(longer + again)[len(longer) - 1 : -1]
    best = logits.max(1)
    assert (best - logits[np.arange(20), again] < 0.05 * logits.std(1)).all()

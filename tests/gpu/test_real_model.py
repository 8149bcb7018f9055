"""A real small model on the GPU against the reference engine; TURBOJET_TEST_PACKAGE names it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.engine import Engine, EngineOptions, GenerationParams, Request

VARIABLE = "TURBOJET_TEST_PACKAGE"
TEXT = Path(__file__).parents[1] / "data" / "evaluation.txt"
GREEDY = SamplingParams(temperature=0.0)

pytestmark = pytest.mark.skipif(
    not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no package of a real model"
)


@pytest.fixture(scope="module")
def root() -> Path:
    return Path(os.environ[VARIABLE])


@pytest.fixture(scope="module")
def reference(root: Path) -> Iterator[Engine]:
    with Engine.open(root, EngineOptions(backend="reference", session_len=1024)) as engine:
        yield engine


def open_cuda(root: Path) -> Engine:
    return Engine.open(root, EngineOptions(backend="cuda", session_len=1024, max_batch_size=8))


@pytest.fixture
def cuda(root: Path) -> Iterator[Engine]:
    with open_cuda(root) as engine:
        yield engine
        engine.check_integrity()


def text_ids(engine: Engine, count: int) -> list[int]:
    return engine.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:count]


def mean_loss(logits: np.ndarray, ids: list[int]) -> float:
    rows = logits[:-1].astype(np.float64)
    top = rows.max(1, keepdims=True)
    log_sum = np.log(np.exp(rows - top).sum(1)) + top[:, 0]
    return float(np.mean(log_sum - rows[np.arange(len(rows)), ids[1:]]))


def test_logits_are_the_references(reference: Engine, cuda: Engine) -> None:
    ids = text_ids(reference, 256)
    want, got = reference.logits(ids), cuda.logits(ids)
    norms = np.linalg.norm(want, axis=1) * np.linalg.norm(got, axis=1)
    cosine = (want.astype(np.float64) * got).sum(1) / norms
    print(f"cosine {cosine.min():.6f}, same top-1 {(want.argmax(1) == got.argmax(1)).mean():.4f}")
    assert cosine.min() > 0.9999
    assert (want.argmax(1) == got.argmax(1)).mean() >= 0.99


def test_perplexity_is_within_a_fifth_of_a_per_cent(reference: Engine, cuda: Engine) -> None:
    ids = text_ids(reference, 1000)
    want, got = (np.exp(mean_loss(engine.logits(ids), ids)) for engine in (reference, cuda))
    print(f"perplexity {want:.4f} and {got:.4f}")
    assert abs(got / want - 1) < 0.002


def test_a_prompt_gives_the_same_tokens_alone_and_in_a_batch_of_8(root: Path, cuda: Engine) -> None:
    ids = text_ids(cuda, 400)
    prompts = [ids[start : start + 20 + 9 * index] for index, start in enumerate(range(0, 320, 40))]
    params = GenerationParams(max_tokens=64, sampling=GREEDY, ignore_eos=True)
    together: list[list[int]] = [[] for _ in prompts]
    for index, output in cuda.generate_many([Request(tuple(p), params) for p in prompts]):
        together[index] += output.token_ids
    for index in (0, 3, 7):
        with open_cuda(root) as fresh:
            outputs = list(fresh.generate(prompts[index], params))
        assert [t for output in outputs for t in output.token_ids] == together[index]


def test_ten_thousand_tokens_leave_memory_where_it_was(cuda: Engine) -> None:
    rng = np.random.default_rng(0)
    ids = text_ids(cuda, 900)
    driver = cuda._backend.driver
    active: list[int] = []
    generated, before = 0, driver.memory_info()[0]
    while generated < 10_000:
        while len(active) < 10:
            start, length = rng.integers(0, 600), rng.integers(1, 200)
            sampling = SamplingParams(seed=int(rng.integers(1 << 40)))
            params = GenerationParams(max_tokens=int(rng.integers(1, 200)), sampling=sampling)
            active.append(cuda.add(ids[start : start + length], params))
        if rng.random() < 0.02:
            cuda.cancel(int(rng.choice(active)))
        for output in cuda.step():
            generated += len(output.token_ids)
            if output.finish_reason is not None:
                active.remove(output.sequence_id)
    cuda.check_integrity()
    assert driver.memory_info()[0] == before


def test_it_answers(cuda: Engine) -> None:
    from device_runtime.engine.chat_session import ChatSession

    session = ChatSession(cuda)
    params = GenerationParams(max_tokens=40, sampling=GREEDY)
    answer = "".join(
        output.text for output in session.send("What is the capital of France?", params)
    )
    print(answer)
    assert "Paris" in answer

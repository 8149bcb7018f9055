"""The engine over a backend that checks every page, also when it runs ahead of the host."""

import dataclasses
import random

import pytest
from fake_backend import EOS, FakeBackend, expected_answer
from tiny_package import make_package

from device_runtime.backends.memory_plan import plan_memory
from device_runtime.engine.configure import cache_request, package_template
from device_runtime.engine.engine import Engine, EngineOptions
from device_runtime.engine.generation import GenerationParams, Request
from device_runtime.engine.tokenizer import Tokenizer
from device_runtime.errors import InternalError, RequestError
from device_runtime.package_format.package import open_package


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return open_package(make_package(tmp_path_factory.mktemp("fake") / "p").root)


def make_engine(package, backend, *, pages=16, page_size=64, session_len=512, batch=4, chunk=64):
    """An engine of real parts over a fake backend; small pages need a plan of its own."""
    tokenizer = Tokenizer.open(package)
    request = cache_request(package, EngineOptions(cache_max_entry_count=float(pages)))
    plan = plan_memory(package.model, request, backend.survey(package, request, None))
    plan = dataclasses.replace(
        plan,
        page_size=page_size,
        num_pages=pages,
        session_len=min(session_len, pages * page_size),
        max_batch_size=batch,
        max_tokens_per_step=chunk,
    )
    backend.load(package, plan)
    return Engine(package, tokenizer, package_template(package, tokenizer), plan, backend)


def answer_of(outputs):
    """All tokens and the finish reason of a stream."""
    outputs = list(outputs)
    assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
    return [t for o in outputs for t in o.token_ids], outputs[-1].finish_reason


@pytest.mark.parametrize("ahead", [0, 1, 3, 7])
def test_answers_are_right_however_far_the_backend_runs_ahead(package, ahead) -> None:
    backend = FakeBackend(ahead)
    engine = make_engine(package, backend)
    deepest = 0
    for seed in range(12):
        prompt = random.Random(seed).choices(range(3, 250), k=1 + 29 * seed % 170)
        stream = engine.generate(prompt, GenerationParams(max_tokens=50))
        tokens = []
        for output in stream:
            deepest = max(deepest, len(backend.outstanding))
            tokens.extend(output.token_ids)
            last = output
        expected = expected_answer(prompt, 50)
        assert tokens == expected
        assert last.finish_reason == ("length" if len(expected) == 50 else "stop")
        assert last.stop_reason == (None if len(expected) == 50 else EOS)
        assert last.num_generated == len(expected) + (len(expected) < 50)
        engine.check_integrity()
    assert deepest == ahead
    assert engine.num_unfinished == 0


def test_chained_rows_appear_exactly_when_the_backend_runs_ahead(package) -> None:
    chained = {}
    for ahead in (0, 2):
        backend = FakeBackend(ahead, stops=False)
        engine = make_engine(package, backend)
        list(engine.generate([5, 6, 7], GenerationParams(max_tokens=10)))
        chained[ahead] = sum(any(batch.is_chained) for batch in backend.steps)
        # Nobody asked for an eleventh token, so no step was wasted.
        assert len(backend.steps) == 10
    assert chained == {0: 0, 2: 9}


def test_an_answer_that_stopped_leaves_the_same_pages_behind_at_any_depth(package) -> None:
    cached = []
    for ahead in (0, 3):
        engine = make_engine(package, FakeBackend(ahead), page_size=4, pages=64)
        prompt = list(range(10, 31))
        tokens, _ = answer_of(engine.generate(prompt, GenerationParams(max_tokens=40)))
        assert tokens == expected_answer(prompt, 40)
        again = [*prompt, *tokens, 9]
        last = list(engine.generate(again, GenerationParams(max_tokens=1)))[-1]
        cached.append(last.num_cached_tokens)
        engine.check_integrity()
    assert cached[0] == cached[1] > 20


@pytest.mark.parametrize("ahead", [0, 3])
def test_sequences_together_answer_as_alone(package, ahead) -> None:
    engine = make_engine(package, FakeBackend(ahead), pages=64, page_size=16, batch=3)
    rng = random.Random(5)
    prompts = [rng.choices(range(3, 250), k=rng.randrange(1, 120)) for _ in range(9)]
    requests = [Request(tuple(p), GenerationParams(max_tokens=30)) for p in prompts]
    tokens = {index: [] for index in range(9)}
    reasons = {}
    for index, output in engine.generate_many(requests):
        tokens[index].extend(output.token_ids)
        reasons[index] = output.finish_reason
    for index, prompt in enumerate(prompts):
        assert tokens[index] == expected_answer(prompt, 30)
        assert reasons[index] in ("stop", "length")
    engine.check_integrity()


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_preemption_changes_no_token(package, ahead) -> None:
    backend = FakeBackend(ahead, stops=False)
    engine = make_engine(package, backend, pages=12, page_size=4, session_len=48, batch=4)
    prompts = [list(range(20 * n + 3, 20 * n + 11)) for n in range(4)]
    requests = [Request(tuple(p), GenerationParams(max_tokens=30)) for p in prompts]
    tokens = {index: [] for index in range(4)}
    for index, output in engine.generate_many(requests):
        tokens[index].extend(output.token_ids)
        engine.check_integrity()
    assert engine._scheduler.num_preemptions > 3
    for index, prompt in enumerate(prompts):
        assert tokens[index] == expected_answer(prompt, 30, stops=False)


@pytest.mark.parametrize("ahead", [0, 3])
def test_two_streams_can_be_read_in_turns(package, ahead) -> None:
    engine = make_engine(package, FakeBackend(ahead, stops=False))
    first = engine.generate([5, 6], GenerationParams(max_tokens=6))
    second = engine.generate([7, 8, 9], GenerationParams(max_tokens=9))
    tokens = ([], [])
    for _ in range(3):
        tokens[0].extend(next(first).token_ids)
        tokens[1].extend(next(second).token_ids)
    tokens[1].extend(answer_of(second)[0])
    tokens[0].extend(answer_of(first)[0])
    assert tokens[0] == expected_answer([5, 6], 6, stops=False)
    assert tokens[1] == expected_answer([7, 8, 9], 9, stops=False)
    engine.check_integrity()


@pytest.mark.parametrize("ahead", [0, 3])
def test_a_session_computes_only_what_is_new(package, ahead) -> None:
    engine = make_engine(package, FakeBackend(ahead), page_size=16, pages=64)
    session = engine.new_session()
    history = [11, 12, 13]
    for turn in range(6):
        prompt = [*history, 100 + turn, 101 + turn]
        outputs = list(engine.generate(prompt, GenerationParams(max_tokens=25), session))
        tokens = [t for o in outputs for t in o.token_ids]
        assert tokens == expected_answer(prompt, 25)
        if turn:
            # All but the last answer's last token, whose key was never needed, and the new ones.
            assert outputs[-1].num_cached_tokens >= len(history) - 1
        history = prompt + tokens
        engine.check_integrity()
    engine.close_session(session)
    assert session.pages == []
    engine.check_integrity()


@pytest.mark.parametrize("ahead", [0, 3])
def test_closing_a_stream_early_cancels_it_and_loses_nothing(package, ahead) -> None:
    engine = make_engine(package, FakeBackend(ahead, stops=False))
    stream = engine.generate([5, 6, 7], GenerationParams(max_tokens=100))
    next(stream)
    stream.close()
    assert engine.num_unfinished == 0
    assert engine.logits([5, 6]).shape == (2, 320)  # what ran ahead is taken in first
    assert answer_of(engine.generate([9], GenerationParams(max_tokens=5)))[1] == "length"
    engine.check_integrity()


def test_cancel_ends_a_stream_with_a_reason(package) -> None:
    engine = make_engine(package, FakeBackend(2, stops=False))
    stream = engine.generate([5, 6, 7], GenerationParams(max_tokens=100))
    first = next(stream)
    engine.cancel(first.sequence_id)
    engine.cancel(12345)  # nobody: ignored
    rest = list(stream)
    assert rest[-1].finish_reason == "cancelled"
    assert rest[-1].stop_reason is None
    engine.check_integrity()


def test_a_stream_that_is_never_read_runs_nothing(package) -> None:
    engine = make_engine(package, FakeBackend())
    engine.generate([5, 6, 7])
    assert engine.num_unfinished == 0
    assert engine.step() == []


def test_a_failing_step_ends_every_generation_and_keeps_the_books(package) -> None:
    backend = FakeBackend(1, stops=False)
    engine = make_engine(package, backend)
    session = engine.new_session()
    first = engine.generate([5, 6], GenerationParams(max_tokens=50), session)
    second = engine.generate([7, 8], GenerationParams(max_tokens=50))
    next(first), next(second)
    backend.fails_at = len(backend.steps)
    with pytest.raises(RuntimeError, match="the device is lost"):
        list(first)
    with pytest.raises(InternalError, match=r"sequence \d+ was given up when a step failed"):
        list(second)
    engine.check_integrity()
    assert engine.num_unfinished == 0
    assert not session.is_busy
    backend.fails_at = None
    again = engine.generate([5, 6], GenerationParams(max_tokens=20), session)
    assert answer_of(again)[0] == expected_answer([5, 6], 20, stops=False)
    engine.check_integrity()


def test_a_backend_that_answers_for_others_is_caught(package) -> None:
    backend = FakeBackend()
    engine = make_engine(package, backend)
    backend.collect = lambda: [(999, 5)]
    with pytest.raises(InternalError, match=r"the backend drew for \[999\], expected \["):
        list(engine.generate([5, 6]))


def test_sequences_that_nothing_can_run_are_our_mistake(package, monkeypatch) -> None:
    engine = make_engine(package, FakeBackend())
    monkeypatch.setattr(engine._scheduler, "schedule", lambda: ())
    with pytest.raises(InternalError, match="1 sequences wait and none can run"):
        list(engine.generate([5, 6]))


def test_an_evaluation_without_pages_is_our_mistake(package) -> None:
    engine = make_engine(package, FakeBackend(), pages=1)
    assert engine._scheduler.take_page() is not None
    with pytest.raises(InternalError, match="no page is free for token 2 although nothing runs"):
        engine.logits([5, 6])


def test_what_cannot_be_asked_is_refused_at_once(package) -> None:
    engine = make_engine(package, FakeBackend(), pages=2, session_len=100)
    with pytest.raises(RequestError, match="the prompt has no tokens"):
        engine.generate([])
    with pytest.raises(
        RequestError, match="the prompt has 100 tokens and session_len is 100: shorten"
    ):
        engine.generate([5] * 100)
    with pytest.raises(RequestError, match="the prompt has the token 320, expected 0 to 319"):
        engine.generate([5, 320])
    with pytest.raises(RequestError, match="the prompt has the token -1, expected 0 to 319"):
        engine.logits([-1])
    with pytest.raises(RequestError, match="the prompt has 101 tokens and session_len is 100"):
        engine.logits([5] * 101)
    with pytest.raises(RequestError, match="token 400"):
        engine.generate_many([Request((5,)), Request((400,))])
    assert engine.num_unfinished == 0
    assert len(answer_of(engine.generate([5] * 99))[0]) <= 1


def test_a_busy_session_and_a_busy_engine_refuse(package) -> None:
    engine = make_engine(package, FakeBackend(stops=False))
    session = engine.new_session()
    stream = engine.generate([5, 6], GenerationParams(max_tokens=9), session)
    next(stream)
    with pytest.raises(RequestError, match=r"session \d+ is busy, wait for its answer"):
        engine.generate([5, 6], session=session)
    with pytest.raises(RequestError, match=r"session \d+ is busy, cancel its generation first"):
        engine.close_session(session)
    with pytest.raises(RequestError, match="1 generations are running, finish them first"):
        engine.logits([5])
    list(stream)
    engine.close_session(session)


def test_a_closed_engine_refuses(package) -> None:
    with make_engine(package, FakeBackend()) as engine:
        stream = engine.generate([5])
        next(stream)
    engine.close()
    with pytest.raises(RequestError, match="the engine is closed"):
        list(stream)
    with pytest.raises(RequestError, match="the engine is closed"):
        engine.generate([5])


@pytest.mark.parametrize("ahead", [0, 3])
def test_thousands_of_tokens_of_coming_and_going_leave_the_books_right(package, ahead) -> None:
    """Sequences join, stop, are cancelled, preempted and go on in sessions, in few small pages."""
    rng = random.Random(ahead)
    backend = FakeBackend(ahead)
    engine = make_engine(
        package, backend, pages=40, page_size=4, session_len=120, batch=5, chunk=24
    )
    sessions = [engine.new_session() for _ in range(3)]
    history = {session.session_id: [9] for session in sessions}
    running = {}
    num_done = num_tokens = 0
    for round_ in range(1500):
        if len(running) < 9 and rng.random() < 0.4:
            session = rng.choice([None, *(s for s in sessions if not s.is_busy)])
            start = [rng.randrange(3, 6) for _ in range(rng.randrange(1, 40))]
            if session is not None:
                start = (history[session.session_id] + start)[-90:]
            max_tokens = rng.randrange(1, 30)
            number = engine.add(start, GenerationParams(max_tokens=max_tokens), session)
            running[number] = (start, max_tokens, session, [])
        if running and rng.random() < 0.03:
            engine.cancel(rng.choice(list(running)))
        for output in engine.step():
            start, max_tokens, session, tokens = running[output.sequence_id]
            tokens.extend(output.token_ids)
            num_tokens += len(output.token_ids)
            if output.finish_reason is None:
                continue
            del running[output.sequence_id]
            num_done += 1
            expected = expected_answer(start, min(max_tokens, 120 - len(start)))
            if output.finish_reason == "cancelled":
                assert tokens == expected[: len(tokens)]
            else:
                assert tokens == expected
            if session is not None:
                history[session.session_id] = start + tokens
        if round_ % 10 == 0:
            engine.check_integrity()
    while engine.num_unfinished:
        engine.step()
    engine.logits([5])
    engine.check_integrity()
    for session in sessions:
        engine.close_session(session)
    engine.check_integrity()
    assert engine._scheduler.pool.num_available == 40
    assert engine._scheduler.num_preemptions > 20
    assert num_done > 200 and num_tokens > 2000
    engine.step()
    assert not backend.known

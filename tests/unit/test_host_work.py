"""What the host does for a token, counted in calls: it must not grow, and not come back."""

from __future__ import annotations

import io
import sys
import time

import pytest
from fake_cuda import FakeCuda, install, write_cubins
from rich.console import Console
from rich.text import Text
from tiny_package import make_package, tiny_model

from device_runtime.apps.chat_stream import PlainStream
from device_runtime.apps.chat_view import AnswerView
from device_runtime.backends.cuda import kernel_set
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.detokenizer import Detokenizer
from device_runtime.engine.engine import Engine, EngineOptions, GenerationParams
from device_runtime.engine.tokenizer import Tokenizer
from device_runtime.package_format.package import open_package

CUDA = EngineOptions(backend="cuda", cache_max_entry_count=64.0)
PARAMS = GenerationParams(
    max_tokens=450, sampling=SamplingParams(temperature=0.0), ignore_eos=True, stop=("never",)
)
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
        folder / "tiny", MODEL, quant_policy=8, session_len=1024, max_batch_size=8
    ).root
    write_cubins(made / "kernels")
    return made


@pytest.fixture
def fake(monkeypatch) -> FakeCuda:
    monkeypatch.delenv("TURBOJET_KERNELS", raising=False)
    return install(monkeypatch)


def decode(engine: Engine, num_sequences: int) -> None:
    """Start sequences and let their prompts be done."""
    for first in range(num_sequences):
        engine.add(range(3 + first, 12 + first), PARAMS)
    for _ in range(12):
        engine.step()


def num_calls(engine: Engine, num_steps: int) -> int:
    """Calls of functions, Python's and C's, that the product's own code makes."""
    places: list[str] = []

    def note(frame, event, _) -> None:
        if event == "c_call":
            places.append(frame.f_code.co_filename)
        elif event == "call" and frame.f_back is not None:
            places.append(frame.f_back.f_code.co_filename)

    sys.setprofile(note)
    for _ in range(num_steps):
        engine.step()
    sys.setprofile(None)
    return sum("device_runtime" in place for place in places)


@pytest.mark.parametrize("num_sequences", [1, 4, 8])
def test_a_step_is_one_call_of_the_driver(root, fake, num_sequences) -> None:
    with Engine.open(root, CUDA) as engine:
        decode(engine, num_sequences)
        fake.calls.clear()
        for _ in range(30):  # positions 24 to 54: no page begins
            engine.step()
        assert fake.calls == ["cuGraphLaunch"] * 30


# When this was written it was 131 and 564 calls a step.
@pytest.mark.parametrize(("num_sequences", "most"), [(1, 150), (8, 650)])
def test_the_last_tokens_of_an_answer_cost_what_the_first_do(
    root, fake, num_sequences, most
) -> None:
    with Engine.open(root, CUDA) as engine:
        decode(engine, num_sequences)
        early = num_calls(engine, 64)
        started = time.process_time()
        for _ in range(256):
            engine.step()
        step_us = (time.process_time() - started) / 256 * 1e6
        late = num_calls(engine, 64)
    print(f"{early / 64:.0f} calls and {step_us:.0f} us a step of {num_sequences}, fake included")
    # 64 steps begin one page of each sequence; stop strings and windows of text differ a little.
    assert abs(late - early) < 0.1 * early
    assert early < 64 * most


def test_a_token_decodes_a_few_tokens_whatever_came_before(root) -> None:
    tokenizer = Tokenizer.open(open_package(root))
    num_decoded = 0

    def counting(token_ids) -> str:
        nonlocal num_decoded
        num_decoded += len(token_ids)
        return tokenizer.decode(token_ids)

    stream = Detokenizer(counting, range(3, 60))
    for token in range(1000):
        stream.push(3 + token * 7 % 250)
    # A window of 6 to 16 tokens for each, and 6 to 11 again where one begins.
    assert num_decoded < 16 * 1000


def test_launches_are_laid_out_before_anybody_waits_for_a_token(root, fake, monkeypatch) -> None:
    with Engine.open(root, CUDA) as engine:
        monkeypatch.setattr(kernel_set, "to_arguments", None)  # whoever lays one out calls it
        fake.calls.clear()
        for length in (9, 40, 90, 500):
            outputs = list(engine.generate([5] * length, GenerationParams(max_tokens=3)))
            assert outputs[0].ttft_s > 0
        assert "cuModuleGetFunction" not in fake.calls


def test_while_an_answer_is_painted_the_engine_gets_the_interpreter_back_soon() -> None:
    before = sys.getswitchinterval()
    console = Console(file=io.StringIO(), force_terminal=True, width=40, height=10)
    with AnswerView(console, PlainStream(), lambda width: Text("status")):
        assert sys.getswitchinterval() < 1.5e-3 < before
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize("call", ["start", "join"])
def test_the_interpreters_own_interval_comes_back_whatever_ends_an_answer(
    monkeypatch, call
) -> None:
    before = sys.getswitchinterval()
    view = AnswerView(Console(file=io.StringIO()), PlainStream(), lambda width: Text("status"))

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(view._thread, call, interrupted)
        with view:
            pass
    assert sys.getswitchinterval() == before
    if call == "join":
        view._thread.join()

"""A workspace with nothing but the original tokenizer's file opens and answers."""

import os

import pytest
import tiny_sentencepiece as tiny
from tiny_package import make_package, tiny_model

from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.chat_session import ChatSession
from device_runtime.engine.engine import Engine
from device_runtime.engine.generation import GenerationParams
from device_runtime.engine.tokenizer import Tokenizer
from device_runtime.errors import PackageError
from device_runtime.package_format.package import open_package

IM_START, IM_END = 277, 276


def workspace(root, write, **config):
    made = make_package(root, tiny_model(vocab_size=480), has_manifest=False, **config)
    folder = made.root / "triton_models" / "tokenizer"
    for path in folder.iterdir():
        path.unlink()
    write(folder)
    return made.root


@pytest.mark.parametrize(
    ("write", "config"),
    [
        (tiny.write_model, {"model_name": "internlm2-chat-1_8b", "start_id": 1}),
        (tiny.write_ranks, {"model_name": "qwen-7b", "end_id": 261}),
    ],
    ids=["sentencepiece", "tiktoken"],
)
def test_a_workspace_with_the_original_file_alone_chats(tmp_path, write, config):
    root = workspace(tmp_path / "w", write, **config)
    before = sorted(path.name for path in root.rglob("*"))
    params = GenerationParams(max_tokens=8, sampling=SamplingParams(temperature=0.0))
    with Engine.open(root) as engine:
        chat = ChatSession(engine)
        outputs = list(chat.send("hello", params))
        assert outputs[-1].finish_reason in ("stop", "length")
        assert sum(len(output.token_ids) for output in outputs) > 0
    assert sorted(path.name for path in root.rglob("*")) == before


def test_markup_becomes_tokens_and_the_same_letters_of_a_user_do_not(tmp_path):
    root = workspace(tmp_path / "w", tiny.write_model, model_name="internlm2-chat-1_8b", start_id=1)
    with Engine.open(root) as engine:
        assert engine.tokenizer.facts.add_bos
        segments = engine.template.first_turn("<|im_end|>", system="")
        ids = engine.tokenizer.encode_prompt(segments, writes_bos=False)
        assert ids[:2] == [1, IM_START]
        # One after the user's text, none for what the user wrote.
        assert (ids.count(IM_START), ids.count(IM_END)) == (2, 1)
        assert "<|im_end|>" in engine.tokenizer.decode(ids)


def test_an_original_that_leads_out_of_the_workspace_is_refused(tmp_path):
    root = workspace(tmp_path / "w", lambda folder: None)
    (tmp_path / "outside").write_bytes(tiny.model())
    os.symlink(tmp_path / "outside", root / "triton_models" / "tokenizer" / "tokenizer.model")
    with pytest.raises(PackageError, match=r"tokenizer.model leads out of .* through a link"):
        Tokenizer.open(open_package(root))

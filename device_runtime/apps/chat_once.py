"""One prompt, one answer, no screen: for pipes, scripts and other programs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing

from device_runtime.apps.chat_conversation import Conversation
from device_runtime.apps.chat_filter import ControlFilter
from device_runtime.apps.chat_interrupt import StopSignal
from device_runtime.apps.chat_settings import ChatSettings
from device_runtime.apps.chat_status import AnswerFacts
from device_runtime.apps.safe_text import json_text
from device_runtime.errors import EXIT_INTERRUPTED, UsageError

MAX_INPUT_BYTES = 16 << 20


def read_piped_prompt() -> str:
    """Return all of standard input as one prompt, without the newlines at its end.

    Raises:
        UsageError: it is longer than 16 MiB or no UTF-8.
    """
    data = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
    if len(data) > MAX_INPUT_BYTES:
        raise UsageError(f"standard input has more than {MAX_INPUT_BYTES} bytes, shorten it")
    try:
        return data.decode("utf-8").removeprefix("\ufeff").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 at byte {error.start}") from error


def answer_as_text(conversation: Conversation, prompt: str, settings: ChatSettings) -> int:
    """Print the answer as it comes, without control sequences; return the exit code.

    Raises:
        RequestError: the prompt does not fit.
    """
    control_filter = ControlFilter()
    last = "\n"

    def write(text: str) -> None:
        nonlocal last
        shown = control_filter.feed(text)
        if shown:
            last = shown
            sys.stdout.write(shown)
            sys.stdout.flush()

    facts, is_stopped = _generate(conversation, prompt, settings, settings.next_seed(), write)
    if not last.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    if is_stopped:
        return EXIT_INTERRUPTED
    note = length_note(facts, settings, conversation)
    if note:
        print(f"turbojet: {note}", file=sys.stderr)
    return 0


def answer_as_json(
    conversation: Conversation, prompt: str, settings: ChatSettings, *, model: str, backend: str
) -> int:
    """Print one JSON object when the answer is complete; return the exit code.

    ``text`` is what the model said, unchanged; control characters are escaped.

    Raises:
        RequestError: the prompt does not fit.
    """
    parts: list[str] = []
    seed = settings.next_seed()
    facts, is_stopped = _generate(conversation, prompt, settings, seed, parts.append)
    result = {
        "model": model,
        "backend": backend,
        "text": "".join(parts),
        "finish_reason": facts.finish_reason,
        "num_prompt_tokens": facts.num_prompt_tokens,
        "num_cached_tokens": facts.num_cached_tokens,
        "num_generated_tokens": facts.num_generated,
        "ttft_s": round(facts.ttft_s, 6),
        "prefill_tok_s": round(facts.prefill_tok_s, 3),
        "decode_tok_s": round(facts.decode_tok_s, 3),
        "seed": seed,
    }
    print(json_text(result))
    return EXIT_INTERRUPTED if is_stopped else 0


def length_note(
    facts: AnswerFacts, settings: ChatSettings, conversation: Conversation
) -> str | None:
    """Return why an answer was cut, and what helps; None when it was not."""
    if facts.finish_reason != "length":
        return None
    if settings.max_tokens is not None and facts.num_generated >= settings.max_tokens:
        return f"the answer was cut at max_tokens {settings.max_tokens}"
    return (
        f"the answer was cut where the conversation reached session_len "
        f"{conversation.session_len} tokens"
    )


def _generate(
    conversation: Conversation,
    prompt: str,
    settings: ChatSettings,
    seed: int,
    write: Callable[[str], None],
) -> tuple[AnswerFacts, bool]:
    """Run one turn; return its facts, and whether Ctrl-C ended it."""
    facts = AnswerFacts()
    params = settings.generation_params(seed)
    stop = StopSignal(conversation.cancel)
    with stop, closing(conversation.send(prompt, params)) as outputs:
        for output in outputs:
            facts = AnswerFacts.of(output)
            write(output.text)
    return facts, stop.is_set

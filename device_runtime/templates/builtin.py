"""Templates for models that ship none: the strings of LMDeploy (spec section 6) or of makers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from device_runtime.errors import RequestError
from device_runtime.package_format.manifest import SamplingDefaults
from device_runtime.templates.message import Message, Segment, merged

INTERNLM_SYSTEM = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI "
    "Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the "
    "user such as English and 中文.\n"
)
LLAMA2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe. Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't "
    "share false information."
)
QWEN_SYSTEM = "You are a helpful assistant."
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

_PLAIN_SAMPLING = SamplingDefaults()
_QWEN_SAMPLING = SamplingDefaults(temperature=1.0, top_p=0.5)


@dataclass(frozen=True)
class BuiltinTemplate:
    """The markers around the messages of one family.

    A first turn is system_start, SYS, system_end, first_user_start, U, user_end; a later one
    answer_end, separator, user_start, U, user_end (spec sections 6.1 and 6.4). An empty system
    message drops its block, a given one replaces the default (section 6.2).

    Attributes:
        name: LMDeploy's first name for it.
        aliases: LMDeploy's other names.
        system_start: before a system message.
        system_end: after it.
        default_system: system message of a conversation that brings none, "" for no block.
        keeps_empty_system: emit the block even around nothing.
        first_user_start: before the first user message when a system block precedes it.
        user_start: before any other user message.
        user_end: after a user message, the assistant's opener included.
        answer_end: after an answer; also what the model says to stop.
        separator: between an ended answer and the next turn.
        stop_words: end an answer.
        session_len: tokens; ``convert`` writes 8 more.
        sampling: what the REPL uses.
    """

    name: str
    aliases: tuple[str, ...] = ()
    system_start: str = ""
    system_end: str = ""
    default_system: str = ""
    keeps_empty_system: bool = False
    first_user_start: str = ""
    user_start: str = ""
    user_end: str = ""
    answer_end: str = ""
    separator: str = ""
    stop_words: tuple[str, ...] = ()
    session_len: int = 2048
    sampling: SamplingDefaults = _PLAIN_SAMPLING

    @property
    def writes_bos(self) -> bool:
        """False: the tokenizer says whether a conversation starts with bos (section 6.3)."""
        return False

    def first_turn(self, user: str, system: str | None = None) -> tuple[Segment, ...]:
        """Return the prompt of a conversation's first turn.

        Args:
            user: what the user says.
            system: None for the default, "" for none.
        """
        system = self.default_system if system is None else system
        has_system = bool(system) or self.keeps_empty_system
        start = self.first_user_start if has_system else self.user_start
        return merged(
            (
                *(self._system(system) if has_system else ()),
                Segment(start, True),
                Segment(user, False),
                Segment(self.user_end, True),
            )
        )

    def later_turn(self, user: str) -> tuple[Segment, ...]:
        """Return what follows an answer whose ``answer_end`` is already in the history."""
        return merged(
            (
                Segment(self.separator + self.user_start, True),
                Segment(user, False),
                Segment(self.user_end, True),
            )
        )

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[Segment, ...]:
        """Return the prompt of a conversation; ends with the assistant's opener or an answer.

        Raises:
            RequestError: the messages do not alternate, or do not end with the user's where an
                answer is asked for.
        """
        system = None
        if messages and messages[0].role == "system":
            system, messages = messages[0].content, messages[1:]
        _check_order(messages, add_generation_prompt)
        segments: list[Segment] = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                segments.append(Segment(message.content, False))
                segments.append(Segment(self.answer_end, True))
            elif index == 0:
                segments.extend(self.first_turn(message.content, system))
            else:
                segments.extend(self.later_turn(message.content))
        return merged(segments)

    def _system(self, system: str) -> tuple[Segment, ...]:
        return (
            Segment(self.system_start, True),
            Segment(system, False),
            Segment(self.system_end, True),
        )


def _check_order(messages: Sequence[Message], ends_with_user: bool) -> None:
    for index, message in enumerate(messages):
        expected = "assistant" if index % 2 else "user"
        if message.role != expected:
            raise RequestError(
                f"message {index} after the system message has the role {message.role}, "
                f"expected {expected}: user and assistant take turns"
            )
    if ends_with_user and len(messages) % 2 == 0:
        last = messages[-1].role if messages else "nobody"
        raise RequestError(f"the last message is from {last}, expected one from the user")


def _internlm(name: str, *aliases: str, session_len: int) -> BuiltinTemplate:
    return BuiltinTemplate(
        name,
        aliases,
        system_start="<|System|>:",
        system_end="\n",
        default_system=INTERNLM_SYSTEM,
        first_user_start="<|User|>:",
        user_start="<|User|>:",
        user_end="\n<|Bot|>:",
        answer_end="<eoa>",
        separator="\n",
        stop_words=("<eoa>",),
        session_len=session_len,
    )


def _chatml(
    name: str,
    *aliases: str,
    system: str,
    session_len: int,
    stop_words: tuple[str, ...] = ("<|im_end|>",),
    keeps_empty_system: bool = False,
    sampling: SamplingDefaults = _PLAIN_SAMPLING,
) -> BuiltinTemplate:
    return BuiltinTemplate(
        name,
        aliases,
        system_start="<|im_start|>system\n",
        system_end="<|im_end|>\n",
        default_system=system,
        keeps_empty_system=keeps_empty_system,
        first_user_start="<|im_start|>user\n",
        user_start="<|im_start|>user\n",
        user_end="<|im_end|>\n<|im_start|>assistant\n",
        answer_end="<|im_end|>",
        separator="\n",
        stop_words=stop_words,
        session_len=session_len,
        sampling=sampling,
    )


BUILTIN_TEMPLATES = (
    _internlm("internlm-chat-7b", "internlm-chat", session_len=2048),
    _internlm("internlm-chat-20b", "internlm-chat-7b-8k", "internlm-chat-8k", session_len=8192),
    _chatml(
        "internlm2-chat",
        "internlm2-chat-1_8b",
        "internlm2-chat-7b",
        "internlm2-chat-20b",
        system=INTERNLM_SYSTEM,
        stop_words=("<|im_end|>", "<|action_end|>"),
        session_len=32768,
    ),
    BuiltinTemplate(
        "llama2",
        ("llama-2", "llama-2-chat"),
        system_start="[INST] <<SYS>>\n ",
        system_end=" \n<</SYS>>\n\n",
        default_system=LLAMA2_SYSTEM,
        user_start="[INST] ",
        user_end=" [/INST] ",
        session_len=4096,
    ),
    _chatml(
        "qwen-7b",
        "qwen-14b",
        "qwen-chat",
        "qwen",
        system=QWEN_SYSTEM,
        session_len=8192,
        sampling=_QWEN_SAMPLING,
    ),
    _chatml("qwen2d5", system=QWEN25_SYSTEM, session_len=32768, sampling=_QWEN_SAMPLING),
    _chatml(
        "qwen3", system="", keeps_empty_system=True, session_len=32768, sampling=_QWEN_SAMPLING
    ),
    # Families that v0.2.3 does not know, as their makers' own templates have them.
    BuiltinTemplate(
        "llama3",
        ("llama-3", "llama-3-instruct"),
        system_start="<|start_header_id|>system<|end_header_id|>\n\n",
        system_end="<|eot_id|>",
        first_user_start="<|start_header_id|>user<|end_header_id|>\n\n",
        user_start="<|start_header_id|>user<|end_header_id|>\n\n",
        user_end="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        answer_end="<|eot_id|>",
        stop_words=("<|eot_id|>",),
        session_len=8192,
    ),
    BuiltinTemplate(
        "mistral-instruct",
        ("mistral-7b-instruct",),
        system_start="[INST] ",
        system_end="\n\n",
        user_start="[INST] ",
        user_end=" [/INST]",
        answer_end="</s>",
        session_len=32768,
    ),
    _chatml("smollm2", "smollm2-instruct", "smollm3", system=SMOLLM_SYSTEM, session_len=8192),
    BuiltinTemplate(
        "baichuan2-7b",
        ("baichuan2-chat",),
        first_user_start="<reserved_106>",
        user_start="<reserved_106>",
        user_end="<reserved_107>",
        sampling=SamplingDefaults(temperature=0.3, top_k=5, top_p=0.85, repetition_penalty=1.05),
    ),
    BuiltinTemplate(
        "baichuan-7b", ("baichuan-base",), sampling=SamplingDefaults(repetition_penalty=1.1)
    ),
    BuiltinTemplate(
        "internlm2",
        ("internlm2-1_8b", "internlm2-7b", "internlm2-20b"),
        session_len=32768,
    ),
    BuiltinTemplate("internlm-20b", session_len=4096),
    BuiltinTemplate("base", ("internlm", "internlm-7b", "llama")),
)
"""Spec sections 6.1 and 6.2, LMDeploy's registered names first, and the families after it."""

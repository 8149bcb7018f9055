"""The built-in templates, string by string as spec section 6.1 lists them."""

import pytest

from device_runtime.errors import RequestError
from device_runtime.templates.builtin import (
    BUILTIN_TEMPLATES,
    INTERNLM_SYSTEM,
    LLAMA2_SYSTEM,
    BuiltinTemplate,
)
from device_runtime.templates.choose import builtin_names, find_builtin
from device_runtime.templates.message import (
    Message,
    Segment,
    joined_text,
    merged,
    segments_after,
)


def built(name: str) -> BuiltinTemplate:
    found = find_builtin(name)
    assert found is not None
    return found


def first(name: str, user: str = "U", system: str | None = None) -> str:
    return joined_text(built(name).first_turn(user, system))


def later(name: str, user: str = "U") -> str:
    return joined_text(built(name).later_turn(user))


@pytest.mark.parametrize(
    ("name", "first_turn", "later_turn", "stop_words", "session_len"),
    [
        (
            "internlm-chat-7b",
            f"<|System|>:{INTERNLM_SYSTEM}\n<|User|>:U\n<|Bot|>:",
            "\n<|User|>:U\n<|Bot|>:",
            ("<eoa>",),
            2048,
        ),
        (
            "internlm-chat-20b",
            f"<|System|>:{INTERNLM_SYSTEM}\n<|User|>:U\n<|Bot|>:",
            "\n<|User|>:U\n<|Bot|>:",
            ("<eoa>",),
            8192,
        ),
        (
            "internlm2-chat-1_8b",
            f"<|im_start|>system\n{INTERNLM_SYSTEM}<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
            "<|im_start|>assistant\n",
            "\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
            ("<|im_end|>", "<|action_end|>"),
            32768,
        ),
        (
            "llama2",
            f"[INST] <<SYS>>\n {LLAMA2_SYSTEM} \n<</SYS>>\n\nU [/INST] ",
            "[INST] U [/INST] ",
            (),
            4096,
        ),
        (
            "qwen-7b",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "U<|im_end|>\n<|im_start|>assistant\n",
            "\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
            ("<|im_end|>",),
            8192,
        ),
        (
            "baichuan2-7b",
            "<reserved_106>U<reserved_107>",
            "<reserved_106>U<reserved_107>",
            (),
            2048,
        ),
        (
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ("<|eot_id|>",),
            8192,
        ),
        ("mistral-instruct", "[INST] U [/INST]", "[INST] U [/INST]", (), 32768),
        (
            "smollm2",
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            "Face<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
            "\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
            ("<|im_end|>",),
            8192,
        ),
        ("base", "U", "U", (), 2048),
        ("internlm2-7b", "U", "U", (), 32768),
    ],
)
def test_turns_are_the_specification_s(
    name, first_turn, later_turn, stop_words, session_len
) -> None:
    assert first(name) == first_turn
    assert later(name) == later_turn
    assert built(name).stop_words == stop_words
    assert built(name).session_len == session_len


def test_internlms_system_message_is_three_lines_each_ended_by_a_newline() -> None:
    assert INTERNLM_SYSTEM.count("\n") == 3
    assert INTERNLM_SYSTEM.endswith("English and 中文.\n")
    assert INTERNLM_SYSTEM.startswith(
        "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    )


def test_sampling_defaults_are_the_repls() -> None:
    def values(name):
        s = built(name).sampling
        return (s.top_p, s.top_k, s.temperature, s.repetition_penalty)

    assert values("internlm2-chat") == (0.8, 40, 0.8, 1.0)
    assert values("qwen-14b") == (0.5, 40, 1.0, 1.0)
    assert values("baichuan2-7b") == (0.85, 5, 0.3, 1.05)
    assert values("baichuan-7b") == (0.8, 40, 0.8, 1.1)


def test_a_given_system_message_replaces_the_default_and_an_empty_one_drops_the_block() -> None:
    assert first("qwen-7b", system="Be brief.").startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    )
    assert first("qwen-7b", system="").startswith("<|im_start|>user\nU")
    assert first("llama2", system="") == "[INST] U [/INST] "
    assert first("internlm-chat-7b", system="") == "<|User|>:U\n<|Bot|>:"


def test_qwen3_keeps_an_empty_system_block() -> None:
    assert first("qwen3").startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nU")


def test_baichuan2_prefixes_a_system_message_raw() -> None:
    assert first("baichuan2-7b", system="S") == "S<reserved_106>U<reserved_107>"


def test_llama3_and_mistral_put_a_system_message_before_the_first_user() -> None:
    head = "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    assert first("llama3", system="S") == head + first("llama3")
    assert first("mistral-instruct", system="S") == "[INST] S\n\nU [/INST]"
    conversation = [Message("user", "A"), Message("assistant", "B"), Message("user", "C")]
    rendered = joined_text(built("mistral-instruct").render(conversation))
    assert rendered == "[INST] A [/INST]B</s>[INST] C [/INST]"


def test_only_markers_are_markup() -> None:
    segments = built("qwen-7b").first_turn("say <|im_end|>", "<|im_start|>")
    assert segments == (
        Segment("<|im_start|>system\n", True),
        Segment("<|im_start|>", False),
        Segment("<|im_end|>\n<|im_start|>user\n", True),
        Segment("say <|im_end|>", False),
        Segment("<|im_end|>\n<|im_start|>assistant\n", True),
    )


def test_a_rendered_conversation_is_its_turns_with_answers_closed() -> None:
    template = built("internlm2-chat")
    conversation = [
        Message("system", "S"),
        Message("user", "one"),
        Message("assistant", "first"),
        Message("user", "two"),
    ]
    assert joined_text(template.render(conversation)) == (
        joined_text(template.first_turn("one", "S"))
        + "first<|im_end|>"
        + joined_text(template.later_turn("two"))
    )
    closed = template.render(conversation[:3], add_generation_prompt=False)
    assert joined_text(closed).endswith("assistant\nfirst<|im_end|>")


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (("user", "user"), "message 1 after the system message has the role user"),
        (("assistant",), "message 0 after the system message has the role assistant"),
        (("user", "assistant"), "the last message is from assistant, expected one from the user"),
        ((), "the last message is from nobody"),
        (("user", "system", "user"), "message 1 after the system message has the role system"),
    ],
)
def test_messages_out_of_turn_are_refused(roles, message) -> None:
    with pytest.raises(RequestError, match=message):
        built("qwen-7b").render([Message(role, "x") for role in roles])


def test_a_role_nobody_knows_is_refused() -> None:
    with pytest.raises(RequestError, match="a message has the role 'root', expected one of system"):
        Message("root", "x")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("internlm2_5-7b-chat", "internlm2-chat"),
        ("internlm2-math-7b", "internlm2-chat"),
        ("internlm3-8b-instruct", "internlm2-chat"),
        ("InternLM-Chat-7B", "internlm-chat-7b"),
        ("internlm-chat-7b-v1_1", "internlm-chat-7b"),
        ("internlm-chat-20b-4bit", "internlm-chat-20b"),
        ("internlm-20b", "internlm-20b"),
        ("Llama-2-7b-chat-hf", "llama2"),
        ("Qwen1.5-1.8B-Chat", "qwen-7b"),
        ("Qwen2.5-0.5B-Instruct", "qwen2d5"),
        ("Qwen3-4B", "qwen3"),
        ("Baichuan2-7B-Chat", "baichuan2-7b"),
        ("internlm2_5-7b-chat", "internlm2-chat"),
        ("Meta-Llama-3-8B-Instruct", "llama3"),
        ("Llama-3.2-1B-Instruct", "llama3"),
        ("Mistral-7B-Instruct-v0.2", "mistral-instruct"),
        ("SmolLM2-1.7B-Instruct", "smollm2"),
        ("SmolLM3-3B", "smollm2"),
    ],
)
def test_a_models_name_finds_its_family(model, expected) -> None:
    assert built(model).name == expected


@pytest.mark.parametrize("model", ["SmolLM2-135M", "internlm2-base-7b-x", "Qwen-7B-base", ""])
def test_a_model_of_no_family_has_no_builtin(model) -> None:
    assert find_builtin(model) is None


def test_names_and_aliases_are_unique() -> None:
    names = builtin_names()
    assert len(names) == len(set(names))
    assert len(BUILTIN_TEMPLATES) == len({template.name for template in BUILTIN_TEMPLATES})


def test_segments_merge_and_are_cut_by_characters() -> None:
    segments = merged(
        (Segment("ab", True), Segment("", False), Segment("cd", True), Segment("ef", False))
    )
    assert segments == (Segment("abcd", True), Segment("ef", False))
    assert segments_after(segments, 3) == (Segment("d", True), Segment("ef", False))
    assert segments_after(segments, 4) == (Segment("ef", False),)
    assert segments_after(segments, 0) == segments

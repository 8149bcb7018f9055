"""Short names of the models people ask for, and their ids on ModelScope."""

from __future__ import annotations

_SHANGHAI = "Shanghai_AI_Laboratory"
_LLAMA = "LLM-Research"
_SMOL = "HuggingFaceTB"

ALIASES = {
    "internlm-chat-7b": f"{_SHANGHAI}/internlm-chat-7b",
    "internlm-chat-7b-8k": f"{_SHANGHAI}/internlm-chat-7b-8k",
    "internlm-chat-20b": f"{_SHANGHAI}/internlm-chat-20b",
    "internlm2-chat-1_8b": f"{_SHANGHAI}/internlm2-chat-1_8b",
    "internlm2-chat-7b": f"{_SHANGHAI}/internlm2-chat-7b",
    "internlm2-chat-20b": f"{_SHANGHAI}/internlm2-chat-20b",
    "internlm2_5-1_8b-chat": f"{_SHANGHAI}/internlm2_5-1_8b-chat",
    "internlm2_5-7b-chat": f"{_SHANGHAI}/internlm2_5-7b-chat",
    "internlm2_5-20b-chat": f"{_SHANGHAI}/internlm2_5-20b-chat",
    "internlm3-8b-instruct": f"{_SHANGHAI}/internlm3-8b-instruct",
    "llama-2-7b-chat": "modelscope/Llama-2-7b-chat-ms",
    "llama-2-13b-chat": "modelscope/Llama-2-13b-chat-ms",
    "llama-3-8b-instruct": f"{_LLAMA}/Meta-Llama-3-8B-Instruct",
    "llama-3.1-8b-instruct": f"{_LLAMA}/Meta-Llama-3.1-8B-Instruct",
    "llama-3.2-1b-instruct": f"{_LLAMA}/Llama-3.2-1B-Instruct",
    "llama-3.2-3b-instruct": f"{_LLAMA}/Llama-3.2-3B-Instruct",
    "mistral-7b-instruct-v0.1": "AI-ModelScope/Mistral-7B-Instruct-v0.1",
    "mistral-7b-instruct-v0.2": "AI-ModelScope/Mistral-7B-Instruct-v0.2",
    "mistral-7b-instruct-v0.3": f"{_LLAMA}/Mistral-7B-Instruct-v0.3",
    "baichuan2-7b-chat": "baichuan-inc/Baichuan2-7B-Chat",
    "qwen-7b-chat": "Qwen/Qwen-7B-Chat",
    "qwen-14b-chat": "Qwen/Qwen-14B-Chat",
    **{
        f"qwen1.5-{size.lower()}-chat": f"Qwen/Qwen1.5-{size}-Chat"
        for size in ("0.5B", "1.8B", "4B", "7B", "14B")
    },
    **{
        f"qwen2-{size.lower()}-instruct": f"Qwen/Qwen2-{size}-Instruct"
        for size in ("0.5B", "1.5B", "7B")
    },
    **{
        f"qwen2.5-{size.lower()}-instruct": f"Qwen/Qwen2.5-{size}-Instruct"
        for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B")
    },
    **{
        f"qwen3-{size.lower()}": f"Qwen/Qwen3-{size}"
        for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")
    },
    "smollm2-135m-instruct": f"{_SMOL}/SmolLM2-135M-Instruct",
    "smollm2-360m-instruct": f"{_SMOL}/SmolLM2-360M-Instruct",
    "smollm2-1.7b-instruct": f"{_SMOL}/SmolLM2-1.7B-Instruct",
    "smollm3-3b": f"{_SMOL}/SmolLM3-3B",
}
"""Lower-case alias to ModelScope id, ``owner/name``."""

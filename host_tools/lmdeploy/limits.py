"""Which models LMDeploy 0.1 to 0.5.3 compute from a workspace; anything else is refused here.

TurboMind only warns about files that it misses and then runs on whatever memory holds (spec
section 1.2), so a workspace that it cannot run must not be made for it.
"""

from __future__ import annotations

from collections.abc import Iterator

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format.model_config import ModelConfig, RopeKind

MODEL_NAMES = (
    "baichuan-7b",
    "baichuan2-7b",
    "base",
    "chatglm2-6b",
    "codellama",
    "falcon",
    "internlm",
    "internlm-20b",
    "internlm-chat",
    "internlm-chat-20b",
    "internlm-chat-7b",
    "internlm-chat-7b-8k",
    "internlm2",
    "internlm2-1_8b",
    "internlm2-20b",
    "internlm2-7b",
    "internlm2-chat",
    "internlm2-chat-1_8b",
    "internlm2-chat-20b",
    "internlm2-chat-7b",
    "llama",
    "llama-2",
    "llama-2-chat",
    "llama2",
    "puyu",
    "qwen-14b",
    "qwen-7b",
    "solar",
    "solar-70b",
    "ultracm",
    "ultralm",
    "vicuna",
    "wizardlm",
    "yi",
    "yi-200k",
    "yi-34b",
    "yi-chat",
)
"""Chat templates that v0.2.3 registers (``lmdeploy list``); it crashes on any other name."""

HEAD_DIM = 128
GROUP_SIZE = 128
"""Where head_dim and groups are 128, every rank's matrices fit the tiles of their 4-bit kernels."""


PLAIN_WITHIN_CONTEXT: tuple[RopeKind, ...] = ("none", "dynamic", "qwen1")
"""Rope scaling that changes nothing within the trained context; v0.2.3 leaves it out (spec 3)."""


def check_model_name(model_name: str) -> None:
    """Check that LMDeploy finds a chat template under the name in config.ini.

    Raises:
        UsageError: it has none.
    """
    if model_name not in MODEL_NAMES:
        raise UsageError(
            f"model-name {model_name} is none that LMDeploy 0.2.3 knows, choose one whose chat "
            f"template fits (ChatML: qwen-7b; none at all: base): {', '.join(MODEL_NAMES)}"
        )


def check_runs(model: ModelConfig) -> None:
    """Check that TurboMind of 0.1 to 0.5.3 computes this model.

    Args:
        model: as the workspace holds it, with its ranks.

    Raises:
        PackageError: it does not; the sentence names the first reason.
    """
    for reason in _reasons(model):
        raise PackageError(
            f"LMDeploy 0.1 to 0.5.3 cannot run this model from a workspace: {reason}; convert it "
            f"without --for lmdeploy, or serve the checkpoint's own folder with a newer release"
        )


def _reasons(model: ModelConfig) -> Iterator[str]:
    """Yield what no kernel or key of these releases stands for (spec sections 1.2, 1.3, 3)."""
    if model.head_dim != HEAD_DIM:
        yield f"head_dim is {model.head_dim}, their attention has {HEAD_DIM} alone"
    if model.q_size != model.hidden_size:
        yield (
            f"hidden_size is {model.hidden_size}, config.ini means heads x head_dim = "
            f"{model.q_size}"
        )
    if model.has_qk_norm:
        yield "queries and keys are normalised per head"
    if model.rope_scaling.kind not in PLAIN_WITHIN_CONTEXT:
        yield f"rope scaling {model.rope_scaling.kind} is not theirs"
    if model.layers_without_rope:
        yield f"{len(model.layers_without_rope)} layers do not rotate queries and keys"
    if model.head_type != "fp16":
        yield f"the output head is {model.head_type}, use --head fp16"
    if model.fp16_linears:
        yield f"{len(model.fp16_linears)} linears are fp16 among 4-bit ones"
    if model.weight_type == "int4" and model.group_size != GROUP_SIZE:
        yield f"group_size is {model.group_size}, their kernels have {GROUP_SIZE} alone"

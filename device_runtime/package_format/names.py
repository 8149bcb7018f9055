"""Every file and tensor name of a package, spelled once (spec sections 1.1 to 1.4)."""

from __future__ import annotations

import re

from device_runtime.errors import PackageError

MANIFEST = "manifest.json"
TRITON_MODELS = "triton_models"
WEIGHTS_DIR = f"{TRITON_MODELS}/weights"
TOKENIZER_DIR = f"{TRITON_MODELS}/tokenizer"
KERNELS_DIR = "kernels"
CONFIG_INI = "config.ini"
CONFIG_PATH = f"{WEIGHTS_DIR}/{CONFIG_INI}"

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_TIKTOKEN = "qwen.tiktoken"
"""Qwen-1's ranks: what LMDeploy copies where there is no tokenizer.model (spec section 1.1)."""

TOK_EMBEDDINGS = "tok_embeddings.weight"
FINAL_NORM = "norm.weight"
OUTPUT = "output.weight"
OUTPUT_QWEIGHT = "output.qweight"
OUTPUT_SCALES = "output.scales"

ATTENTION_NORM = "attention_norm"
FFN_NORM = "ffn_norm"
W_QKV = "attention.w_qkv"
WO = "attention.wo"
Q_NORM = "attention.q_norm"
K_NORM = "attention.k_norm"
W1 = "feed_forward.w1"
W2 = "feed_forward.w2"
W3 = "feed_forward.w3"
W13 = "feed_forward.w13"
PAST_KV_SCALE = "past_kv_scale"

LAYER_LINEARS = (W_QKV, WO, W13, W2)
"""The linears of a layer that are quantized, or stay fp16, as one: w13 stands for w1 and w3."""

WEIGHT = "weight"
BIAS = "bias"
QWEIGHT = "qweight"
SCALES_ZEROS = "scales_zeros"

PACKAGE_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
MAX_PATH_CHARACTERS = 240

_PACKAGE_NAME = re.compile(PACKAGE_NAME_PATTERN)
_CONTROL_OR_BACKSLASH = re.compile(r"[\x00-\x1f\x7f\\]")


def layer_tensor(layer: int, module: str, rank: int | None, kind: str) -> str:
    """Return the name of a layer's tensor; ``rank`` is None for tensors that are never split.

    ``layer_tensor(3, W_QKV, 0, QWEIGHT)`` is ``layers.3.attention.w_qkv.0.qweight``.
    """
    middle = module if rank is None else f"{module}.{rank}"
    return f"layers.{layer}.{middle}.{kind}"


def layer_linear(layer: int, module: str) -> str:
    """Return the name of one of `LAYER_LINEARS` of a layer, ``layers.3.attention.w_qkv``."""
    return f"layers.{layer}.{module}"


def kv_scale_tensor(layer: int, rank: int) -> str:
    """Return the name of the static int8 KV parameters of one layer and rank (section 4.3)."""
    return layer_tensor(layer, PAST_KV_SCALE, rank, WEIGHT)


def weight_path(tensor_name: str) -> str:
    """Return the path of a tensor's file relative to the root of the package."""
    return f"{WEIGHTS_DIR}/{tensor_name}"


def tokenizer_path(file_name: str) -> str:
    """Return the path of a tokenizer file relative to the root of the package."""
    return f"{TOKENIZER_DIR}/{file_name}"


def check_package_name(name: str) -> str:
    """Return ``name`` when it can be a folder on every device.

    Raises:
        PackageError: the name is empty, too long, hidden or holds other characters.
    """
    if not _PACKAGE_NAME.fullmatch(name):
        raise PackageError(
            f"package name {name[:120]!a} is not 1 to 96 letters, digits, '.', '_' or '-' "
            "that start with a letter or digit"
        )
    return name


def check_relative_path(path: str) -> str:
    """Return ``path`` when it is a normalised relative POSIX path that stays in its folder.

    Raises:
        PackageError: the path is empty, absolute, too long, not normalised, climbs with ``..``
            or holds control characters, backslashes or text that is not UTF-8.
    """
    shown = ascii(path[:120])
    if not path or len(path) > MAX_PATH_CHARACTERS:
        raise PackageError(
            f"path {shown} has {len(path)} characters, expected 1 to {MAX_PATH_CHARACTERS}"
        )
    if path.startswith("/"):
        raise PackageError(f"path {shown} is absolute, expected a relative one")
    if _CONTROL_OR_BACKSLASH.search(path):
        raise PackageError(f"path {shown} holds a control character or a backslash")
    try:
        path.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PackageError(f"path {shown} cannot be written as UTF-8") from error
    parts = path.split("/")
    if ".." in parts:
        raise PackageError(f"path {shown} climbs out of its folder with '..'")
    if "" in parts or "." in parts:
        raise PackageError(f"path {shown} is not normalised, it has an empty or '.' part")
    return path

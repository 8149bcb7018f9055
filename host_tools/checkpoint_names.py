"""Names of the files of a Hugging Face checkpoint, for modules that must not load torch."""

from __future__ import annotations

from device_runtime.package_format import names
from device_runtime.templates.choose import CHAT_TEMPLATE_FILE
from device_runtime.tokenization.added_tokens import ADDED_TOKENS

CONFIG_JSON = "config.json"

SAFETENSORS = ".safetensors"
PICKLED = ".bin"
JSON = ".json"
PYTHON = ".py"
INDEX_SUFFIX = ".index.json"
SECOND_WEIGHTS = "consolidated"
"""Starts the names of the same weights in their maker's own layout (Meta, Mistral)."""
SINGLE_SAFETENSORS = f"model{SAFETENSORS}"
SAFETENSORS_INDEX = f"{SINGLE_SAFETENSORS}{INDEX_SUFFIX}"

VOCABULARY_FILES = (
    names.TOKENIZER_JSON,
    names.TOKENIZER_MODEL,
    names.TOKENIZER_TIKTOKEN,
    "vocab.json",
)
"""A folder with one of them has a tokenizer of its own."""

TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    names.TOKENIZER_CONFIG,
    ADDED_TOKENS,
    names.SPECIAL_TOKENS_MAP,
    CHAT_TEMPLATE_FILE,
)
"""All of a tokenizer, chat template included."""

MAX_INDEX_BYTES = 16 << 20
"""The index of the largest public checkpoints is below 10 MB; more is an attack or a mistake."""

ADAPTER_DIR = "adapter"
"""Folder inside a checkpoint's that holds a LoRA adapter to be merged."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = (f"adapter_model{SAFETENSORS}", f"adapter_model{PICKLED}")

GGUF = ".gguf"

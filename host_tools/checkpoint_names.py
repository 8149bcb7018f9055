"""Names of the files of a Hugging Face checkpoint, for modules that must not load torch."""

from __future__ import annotations

CONFIG_JSON = "config.json"

SAFETENSORS = ".safetensors"
PICKLED = ".bin"
JSON = ".json"
PYTHON = ".py"
INDEX_SUFFIX = ".index.json"
SINGLE_SAFETENSORS = f"model{SAFETENSORS}"
SAFETENSORS_INDEX = f"{SINGLE_SAFETENSORS}{INDEX_SUFFIX}"

GGUF = ".gguf"

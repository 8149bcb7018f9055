"""Reads Hugging Face checkpoints: float and AWQ, safetensors and torch files, never code."""

from host_tools.checkpoint.linear_weights import (
    DenseLinear,
    LayerWeights,
    Linear,
    QuantizedLinear,
)
from host_tools.checkpoint.reader import Checkpoint

__all__ = ["Checkpoint", "DenseLinear", "LayerWeights", "Linear", "QuantizedLinear"]

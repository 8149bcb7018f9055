"""Triton model ``postprocessing``: TOKENS_BATCH and sequence_length become OUTPUT, the text.

This file is copied to ``triton_models/postprocessing/1/model.py`` and run by the Triton server.
"""

# Python 3.8 runs this too: the image of LMDeploy has no newer one.
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from .tokenizer.tokenizer import open_tokenizer  # type: ignore[import-not-found]


class TritonPythonModel:
    """What the server calls; the class must have this name."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the tokenizer."""
        config = json.loads(args["model_config"])
        self._tokenizer = open_tokenizer(Path(__file__).parent, config["parameters"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with the text of its sequences."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Have nothing to close."""

    def _answer(self, request: Any) -> Any:
        tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()
        lengths = pb_utils.get_input_tensor_by_name(request, "sequence_length").as_numpy()
        # Clients of LMDeploy 0.1.0 do not send this one.
        skips = pb_utils.get_input_tensor_by_name(request, "skip_special_tokens")
        skip = np.ones_like(lengths) if skips is None else skips.as_numpy()
        skip = np.broadcast_to(skip, lengths.shape)
        texts = []
        for place in np.ndindex(*lengths.shape):
            ids = tokens[place][: int(lengths[place])]
            texts.append(self._tokenizer.decode(ids.tolist(), bool(skip[place])))
        output = np.array([text.encode("utf-8") for text in texts], np.object_)
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("OUTPUT", output)])

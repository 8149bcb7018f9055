"""Triton model ``preprocessing``: QUERY, one string, becomes INPUT_ID and REQUEST_INPUT_LEN.

This file is copied to ``triton_models/preprocessing/1/model.py`` and run by the Triton server.
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
        """Answer each request with the ids of its strings, padded to the longest."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Have nothing to close."""

    def _answer(self, request: Any) -> Any:
        query = pb_utils.get_input_tensor_by_name(request, "QUERY").as_numpy()
        ids = [self._tokenizer.encode(row.reshape(-1)[0].decode("utf-8")) for row in query]
        lengths = [[len(row)] for row in ids]
        padded = np.full((len(ids), max(len(row) for row in ids)), self._tokenizer.eos_id, np.int64)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = tokens
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor("INPUT_ID", padded.astype(np.uint32)),
                pb_utils.Tensor("REQUEST_INPUT_LEN", np.array(lengths, np.uint32)),
            ]
        )

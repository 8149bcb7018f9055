"""The engine that a benchmark measures: of an installed package, or of random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass

from device_runtime.apps.bench_runs import Workload
from device_runtime.backends.base import Backend
from device_runtime.backends.memory_plan import plan_memory
from device_runtime.backends.select import create_backend
from device_runtime.backends.synthetic import SyntheticPackage
from device_runtime.engine.configure import cache_request, package_template
from device_runtime.engine.engine import Engine
from device_runtime.engine.options import EngineOptions
from device_runtime.engine.tokenizer import Tokenizer
from device_runtime.package_format import names
from device_runtime.package_format.kv_page import kv_token_bytes
from device_runtime.package_format.manifest import TokenizerFacts
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.package import Package
from device_runtime.package_format.tensors import tensor_specs
from device_runtime.templates.builtin import BUILTIN_TEMPLATES
from device_runtime.templates.message import ChatTemplate

_TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"},
}
"""Knows one word: a synthetic model's tokens mean nothing."""


@dataclass(frozen=True)
class OpenEngine:
    """An engine and the backend below it, for its device's facts; close the engine."""

    engine: Engine
    backend: Backend


def open_engine(package: Package, options: EngineOptions) -> OpenEngine:
    """Open a package, or load random weights of a synthetic one.

    Raises:
        TurbojetError: as `Engine.open`.
    """
    if isinstance(package, SyntheticPackage):
        tokenizer = Tokenizer(json.dumps(_TOKENIZER), TokenizerFacts(0, False, ()))
        template: ChatTemplate = next(built for built in BUILTIN_TEMPLATES if built.name == "base")
    else:
        tokenizer = Tokenizer.open(package)
        template = package_template(package, tokenizer)
    backend = create_backend(options.backend, package)
    try:
        request = cache_request(package, options)
        survey = backend.survey(package, request, options.memory_limit_bytes)
        plan = plan_memory(package.model, request, survey)
        backend.load(package, plan)
        return OpenEngine(Engine(package, tokenizer, template, plan, backend), backend)
    except BaseException:
        backend.close()
        raise


def decode_weight_bytes(model: ModelConfig) -> int:
    """Return the bytes of weights that every decode step reads: all but the embedding table.

    A table that is also the output head counts once.
    """
    is_head = model.tie_word_embeddings and model.head_type != "int8"
    return sum(
        spec.size_bytes
        for spec in tensor_specs(model, has_kv_scales=False)
        if is_head or spec.name != names.TOK_EMBEDDINGS
    )


def step_bytes(model: ModelConfig, quant_policy: int, workload: Workload) -> int:
    """Return the bytes that a decode step reads, at the mean length of its sequences."""
    length = workload.prompt_tokens + workload.completion_tokens / 2
    kv_bytes = kv_token_bytes(model, quant_policy) * length * workload.concurrency
    return decode_weight_bytes(model) + int(kv_bytes)

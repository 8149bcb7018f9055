"""Tiny models and packages for the tests of the package format."""

import dataclasses

import numpy as np

from device_runtime.package_format import names
from device_runtime.package_format.checksums import hash_files
from device_runtime.package_format.config_ini import TurboMindConfig
from device_runtime.package_format.files import list_files
from device_runtime.package_format.manifest import (
    Calibration,
    Manifest,
    PlannedMemory,
    Provenance,
    Quantization,
    TemplateChoice,
    TokenizerFacts,
    ToolVersion,
    write_manifest,
)
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.tensors import tensor_specs
from device_runtime.package_format.workspace import WorkspaceWriter

INT4 = ModelConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_kv_heads=1,
    head_dim=32,
    vocab_size=70,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=128,
    weight_type="int4",
    group_size=32,
)
FP16 = dataclasses.replace(INT4, weight_type="fp16", group_size=0)


def random_array(spec, seed=0):
    rng = np.random.default_rng([seed, *spec.name.encode()])
    return rng.integers(0, 256, spec.size_bytes, np.uint8).view(spec.dtype).reshape(spec.shape)


def config_of(model, **settings):
    config = TurboMindConfig.from_model(
        model, model_name="tiny", start_id=1, end_id=2, session_len=136
    )
    return dataclasses.replace(config, **settings)


def manifest_of(model, **fields):
    values = {
        "name": "tiny-1.0",
        "model": model,
        "quantization": Quantization("awq" if model.group_size else "none", 4, model.group_size),
        "template": TemplateChoice("builtin", "internlm2-chat"),
        "tokenizer": TokenizerFacts(bos_id=1, add_bos=True, eos_ids=(2,), stop_ids=(3, 4)),
        "provenance": Provenance(
            source="Shanghai_AI_Laboratory/tiny",
            source_kind="modelscope",
            revision="v1.0.3",
            calibration=Calibration("c4", 8, 512, 0),
            tools=(ToolVersion("turbojet-llm", "0.1.0"),),
        ),
        "target_boards": ("orin-nano-8gb",),
        "memory": (PlannedMemory("orin-nano-8gb", 1000, 500, 100, 40, 10, 640, 8),),
    }
    return Manifest(**(values | fields))


def write_workspace(root, model, *, is_sealed=None, has_kv_scales=False):
    """Write a whole package below root; is_sealed None leaves the manifest out."""
    writer = WorkspaceWriter(root, model)
    for spec in tensor_specs(model, has_kv_scales=False):
        writer.write(spec.name, random_array(spec))
    if has_kv_scales:
        for spec in tensor_specs(model):
            if spec.is_optional:
                writer.write(spec.name, np.array([0.5, 0.25, 0.125, -1.0], "<f4"))
    writer.write_config(config_of(model))
    writer.finish()
    if is_sealed is not None:
        tokenizer = root / names.TOKENIZER_DIR
        tokenizer.mkdir()
        (tokenizer / names.TOKENIZER_JSON).write_text("{}")
        files = hash_files(root, list_files(root)) if is_sealed else ()
        write_manifest(root, manifest_of(model, files=files))
    return root

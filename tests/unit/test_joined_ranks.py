"""A package split for several GPUs runs on one: its parts joined are the package of one rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from test_cuda_weights import load
from tiny_package import make_package, tiny_model

from device_runtime.backends.cuda import loader, loader_pairs
from device_runtime.backends.cuda.loader import plan_fills
from device_runtime.backends.cuda.weights import layer_name
from device_runtime.backends.reference.blas_threads import _find_setter
from device_runtime.engine.engine import Engine, EngineOptions
from device_runtime.package_format import int4, names
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.model_config import ModelConfig

INT4 = tiny_model(
    num_kv_heads=4, intermediate_size=256, has_attention_bias=True, has_qk_norm=True
)  # fmt: skip
FP16 = dataclasses.replace(INT4, weight_type="fp16", group_size=0)
MODELS = {
    "int4": INT4,
    "fp16": FP16,
    "bf16": dataclasses.replace(FP16, weight_type="bf16"),
    "odd vocabulary": dataclasses.replace(INT4, vocab_size=301),
    "some linears fp16": dataclasses.replace(
        INT4, fp16_linears=("layers.0.attention.w_qkv", "layers.1.feed_forward.w13")
    ),
}
STAGINGS = {"one buffer": 1 << 20, "small buffers": 4096}


def packages(folder: Path, model: ModelConfig, **config: object) -> dict[int, Path]:
    """The same weights, split for 1, 2 and 4 ranks."""
    return {
        ranks: make_package(
            folder / str(ranks), dataclasses.replace(model, tensor_para_size=ranks), **config
        ).root
        for ranks in (1, 2, 4)
    }


@pytest.mark.parametrize(
    ("name", "quant_policy"),
    [("int4", 4), ("fp16", 0), ("odd vocabulary", 0), ("some linears fp16", 0)],
)
def test_logits_are_those_of_one_rank_bit_for_bit(
    tmp_path: Path, name, quant_policy, monkeypatch
) -> None:
    # Two threads of OpenBLAS share a product differently from one array's place to another's.
    if set_threads := _find_setter():
        set_threads(1)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    scale = KvScale(1 / 32, 0.0, 1 / 32, 0.0)
    ids = np.random.default_rng(1).integers(3, 300, 40).tolist()
    logits = []
    for root in packages(tmp_path, MODELS[name], kv_scale=scale).values():
        options = EngineOptions(backend="reference", quant_policy=quant_policy)
        with Engine.open(root, options) as engine:
            logits.append(engine.logits(ids))
    assert logits[0].std() > 0.5
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])


def by_heads(columns: np.ndarray, model: ModelConfig, ranks: int) -> np.ndarray:
    """Columns [q k v of rank 0 | q k v of rank 1 | ...] as all q, all k, all v."""
    q, kv = model.q_size // ranks, model.kv_size // ranks
    whole = columns.reshape(*columns.shape[:-1], ranks, q + 2 * kv)
    parts = (whole[..., :q], whole[..., q : q + kv], whole[..., q + kv :])
    return np.concatenate([part.reshape(*columns.shape[:-1], -1) for part in parts], axis=-1)


def columns_of(loaded: dict[str, np.ndarray], name: str, model: ModelConfig) -> np.ndarray:
    """A joined w_qkv tensor with its columns on the last axis."""
    if name.endswith(names.QWEIGHT):
        return int4.unpack_words(loaded[name].view(np.uint32), model.hidden_size, model.qkv_size)
    kind = np.uint32 if name.endswith(names.SCALES_ZEROS) else np.uint16
    return loaded[name].view(kind).reshape(-1, model.qkv_size)


@pytest.mark.parametrize("staging", STAGINGS)
@pytest.mark.parametrize("name", MODELS)
def test_the_gpu_gets_the_bytes_of_one_rank(tmp_path: Path, monkeypatch, name, staging) -> None:
    size = STAGINGS[staging]
    monkeypatch.setattr(loader, "STAGING_BYTES", size)
    monkeypatch.setattr(loader_pairs, "STAGING_BYTES", size)
    monkeypatch.setattr(loader, "plan_fills", lambda pieces: plan_fills(pieces, size))
    model = MODELS[name]
    loaded = {ranks: load(root, monkeypatch) for ranks, root in packages(tmp_path, model).items()}
    table = model.vocab_size * model.hidden_size * 2
    for ranks in (2, 4):
        assert loaded[ranks].keys() == loaded[1].keys()
        for key, whole in loaded[1].items():
            joined = loaded[ranks][key]
            if names.W_QKV in key:
                # Attention kernels are told the ranks and find each head where it lies.
                found = by_heads(columns_of(loaded[ranks], key, model), model, ranks)
                assert np.array_equal(found, columns_of(loaded[1], key, model)), key
            elif key in (names.TOK_EMBEDDINGS, names.OUTPUT):
                assert np.array_equal(joined[:table], whole[:table]), key
            else:
                assert np.array_equal(joined, whole), key
    assert layer_name(0, names.W_QKV, names.BIAS) in loaded[1]

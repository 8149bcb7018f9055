"""The packages that tests are made on are packages."""

import numpy as np
import pytest
from tiny_package import DEFAULT_KV_SCALE, make_package, tiny_model

from device_runtime.package_format import names
from device_runtime.package_format.package import open_package, verify_package


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_type": "fp16", "group_size": 0, "tie_word_embeddings": True},
        {"weight_type": "bf16", "group_size": 0, "has_attention_bias": True},
        {"has_qk_norm": True, "head_type": "int8"},
        {"has_attention_bias": True, "tensor_para_size": 2},
        {"fp16_linears": ("layers.0.feed_forward.w13",), "tensor_para_size": 2},
    ],
)
def test_a_tiny_package_opens_and_verifies(tmp_path, changes) -> None:
    made = make_package(
        tmp_path / "p", tiny_model(**changes), is_sealed=True, kv_scale=DEFAULT_KV_SCALE
    )
    package = verify_package(made.root)
    assert package.model == made.model
    assert package.kv_scale(1, made.model.tensor_para_size - 1) == DEFAULT_KV_SCALE
    embedding = package.tensor(names.TOK_EMBEDDINGS)
    assert embedding.shape[0] >= made.embedding.shape[0] == made.model.vocab_size
    assert made.layers[1].down.shape == (made.model.hidden_size, made.model.intermediate_size)
    assert made.embedding.dtype == made.head.dtype == np.float32


def test_a_tiny_workspace_without_a_manifest_opens(tmp_path) -> None:
    made = make_package(tmp_path / "p", has_manifest=False, session_len=100)
    package = open_package(made.root)
    assert package.manifest is None
    assert package.config.session_len == 100


def test_the_same_seed_makes_the_same_files(tmp_path) -> None:
    first = make_package(tmp_path / "a", is_sealed=True)
    second = make_package(tmp_path / "b", is_sealed=True)
    other = make_package(tmp_path / "c", is_sealed=True, seed=1)
    manifests = [(made.root / names.MANIFEST).read_bytes() for made in (first, second, other)]
    assert manifests[0] == manifests[1] != manifests[2]

"""A dequantized package is the package: same weights, same logits."""

from __future__ import annotations

import numpy as np
import pytest
from half_package import write_half_package
from tiny_package import make_package, tiny_model

from device_runtime.engine.engine import Engine, EngineOptions
from device_runtime.errors import PackageError
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.package import open_package

MIXED = tiny_model(fp16_linears=("layers.0.attention.w_qkv", "layers.1.feed_forward.w13"))


@pytest.mark.parametrize("model", [tiny_model(has_attention_bias=True), MIXED])
def test_a_dequantized_package_has_the_same_logits(tmp_path, model) -> None:
    made = make_package(tmp_path / "w4", model, kv_scale=KvScale(1 / 16, 0.1, 1 / 16, -0.1))
    write_half_package(open_package(made.root), tmp_path / "half")
    half = open_package(tmp_path / "half")
    assert (half.model.weight_type, half.model.group_size) == ("fp16", 0)
    ids = list(range(3, 40))
    logits = []
    for root in (made.root, half.root):
        with Engine.open(root, EngineOptions(backend="reference", quant_policy=4)) as engine:
            logits.append(engine.logits(ids))
    assert np.allclose(logits[0], logits[1], rtol=1e-5, atol=1e-5)


def test_packages_of_several_ranks_are_not_dequantized(tmp_path) -> None:
    made = make_package(tmp_path / "w4", tiny_model(tensor_para_size=2))
    with pytest.raises(PackageError, match="only a package of one rank with a manifest"):
        write_half_package(open_package(made.root), tmp_path / "half")

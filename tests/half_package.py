"""A 4-bit package's weights as an fp16 package: the same numbers, other kernels."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from device_runtime.errors import PackageError
from device_runtime.package_format import fusion, int4, names
from device_runtime.package_format.manifest import Quantization, write_manifest
from device_runtime.package_format.package import Package
from device_runtime.package_format.tensors import linear_shapes
from device_runtime.package_format.workspace import WorkspaceWriter


def write_half_package(package: Package, root: Path) -> None:
    """Dequantize a package of one rank into a new folder; static KV parameters go along.

    Raises:
        PackageError: the package has several ranks or no manifest.
    """
    if package.manifest is None or package.model.tensor_para_size != 1:
        raise PackageError("only a package of one rank with a manifest is dequantized here")
    model = dataclasses.replace(package.model, weight_type="fp16", group_size=0, fp16_linears=())
    writer = WorkspaceWriter(root, model)
    quantized = {
        names.layer_tensor(layer, shape.module, 0, kind)
        for layer in range(model.num_hidden_layers)
        for shape in linear_shapes(package.model, layer)
        for kind in (names.QWEIGHT, names.SCALES_ZEROS)
        if shape.is_quantized
    }
    for spec in package.specs:
        if spec.name not in quantized:
            writer.write(spec.name, package.tensor(spec.name))
    for layer in range(model.num_hidden_layers):
        for shape in linear_shapes(package.model, layer):
            if not shape.is_quantized:
                continue
            weights = _dequantized(package, layer, shape.module, shape.num_inputs)
            parts = {shape.module: weights}
            if shape.module == names.W13:
                parts = dict(zip((names.W1, names.W3), fusion.split_w13(weights), strict=True))
            for module, matrix in parts.items():
                writer.write(names.layer_tensor(layer, module, 0, names.WEIGHT), matrix)
    config = dataclasses.replace(package.config, weight_type="fp16", group_size=0)
    writer.write_config(config)
    writer.finish()
    shutil.copytree(package.tokenizer_dir, root / names.TOKENIZER_DIR)
    manifest = dataclasses.replace(
        package.manifest,
        model=model,
        quantization=Quantization("none", 16, 0, package.manifest.quantization.kv_scales),
        files=(),
    )
    write_manifest(root, manifest)


def _dequantized(package: Package, layer: int, module: str, num_inputs: int) -> NDArray[np.float16]:
    words = package.tensor(names.layer_tensor(layer, module, 0, names.QWEIGHT))
    pairs = package.tensor(names.layer_tensor(layer, module, 0, names.SCALES_ZEROS))
    codes = int4.unpack_words(words, num_inputs, pairs.shape[-1])
    scales, zeros = int4.unpack_scales_zeros(pairs)
    return int4.dequantize(codes, zeros, scales, package.model.group_size)

"""Writes ``triton_models/weights`` of a workspace, one checked tensor at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.errors import PackageError
from device_runtime.package_format import durable, names
from device_runtime.package_format.config_ini import TurboMindConfig
from device_runtime.package_format.files import check_file
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.tensors import FP32, TensorSpec, tensor_specs

_CHUNK_BYTES = 16 << 20


class WorkspaceWriter:
    """Writes the weight files of one model into a new or an existing workspace.

    Every file appears whole under its name, or not at all. Not thread-safe for one name;
    different names may be written from different threads.
    """

    def __init__(self, root: Path, model: ModelConfig) -> None:
        self.root = Path(root)
        self.model = model
        self._specs = {spec.name: spec for spec in tensor_specs(model)}
        self._weights = self.root / names.WEIGHTS_DIR
        self._weights.mkdir(parents=True, exist_ok=True)

    def spec(self, name: str) -> TensorSpec:
        """Return what the format says about a tensor.

        Raises:
            PackageError: this model has no such tensor.
        """
        if name not in self._specs:
            raise PackageError(f"this model has no tensor called {name[:120]!r}")
        return self._specs[name]

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Write one tensor; copies at most 16 MB of it at a time.

        Args:
            name: a name of `tensor_specs`.
            array: exactly the spec's shape and element type, in any memory order.

        Raises:
            PackageError: the model has no such tensor, or shape or element type differ.
            DeviceError: the disk is full or fails.
        """
        spec = self.spec(name)
        if array.shape != spec.shape or array.dtype != spec.dtype:
            raise PackageError(
                f"{name} is {array.dtype} {list(array.shape)}, "
                f"expected {spec.dtype} {list(spec.shape)}"
            )
        row_bytes = max(1, spec.size_bytes // spec.shape[0])
        rows = max(1, _CHUNK_BYTES // row_bytes)
        with durable.replacing(self._weights / name) as file:
            for start in range(0, spec.shape[0], rows):
                chunk = np.ascontiguousarray(array[start : start + rows], spec.dtype)
                file.write(chunk.reshape(-1).view(np.uint8).data)

    def write_kv_scale(self, layer: int, rank: int, scale: KvScale) -> None:
        """Write the static int8 KV parameters of one layer and rank."""
        values = np.frombuffer(scale.to_bytes(), FP32)
        self.write(names.kv_scale_tensor(layer, rank), values)

    def write_config(self, config: TurboMindConfig) -> None:
        """Write config.ini.

        Raises:
            PackageError: a size in it is not the model's.
        """
        config.check_model(self.model)
        path = self._weights / names.CONFIG_INI
        durable.write_atomically(path, config.to_text().encode("utf-8"))

    def finish(self) -> None:
        """Check that nothing is missing and wait until all of it is on the disk.

        Raises:
            PackageError: config.ini or a tensor is missing or has another size; the static KV
                parameters may be missing for all layers together.
        """
        if not (self._weights / names.CONFIG_INI).is_file():
            raise PackageError(f"{self._weights} has no {names.CONFIG_INI}, write it before finish")
        present = check_tensor_files(self.root, self.model)
        for spec in present:
            durable.sync_file(self._weights / spec.name)
        durable.sync_folder(self._weights)


def check_tensor_files(root: Path, model: ModelConfig) -> tuple[TensorSpec, ...]:
    """Return the specs of the weight files that are there, all that are required among them.

    Raises:
        PackageError: a file is missing, is no regular file, leaves the package through a link or
            has another size; or some layers have static KV parameters and some have not.
    """
    required = tensor_specs(model, has_kv_scales=False)
    for spec in required:
        check_file(root, spec.path, spec.size_bytes)
    optional = [spec for spec in tensor_specs(model) if spec.is_optional]
    there = [spec for spec in optional if os.path.lexists(root / spec.path)]
    if not there:
        return required
    if len(there) != len(optional):
        raise PackageError(
            f"{root} has {len(there)} past_kv_scale files, expected {len(optional)} or none; "
            "run kv-qparams again"
        )
    for spec in there:
        # The 8-byte form is LMDeploy's --kv-sym (section 4.3).
        check_file(root, spec.path, spec.size_bytes, spec.size_bytes // 2)
    return required + tuple(there)

"""A package or workspace on disk, opened for reading: complete, or it does not open."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.errors import PackageError
from device_runtime.package_format import names
from device_runtime.package_format.checksums import BytesProgress, hash_files
from device_runtime.package_format.config_ini import MAX_CONFIG_BYTES, TurboMindConfig
from device_runtime.package_format.files import check_file, list_files
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.manifest import Manifest, read_manifest
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.tensors import TensorSpec
from device_runtime.package_format.workspace import check_tensor_files


@dataclass(frozen=True)
class Package:
    """Facts and files of one model.

    Attributes:
        root: folder of the package, resolved.
        manifest: None for a plain LMDeploy workspace.
        config: config.ini as it is on disk; see `TurboMindConfig.resolved`.
        model: from the manifest, else from config.ini alone.
        specs: of every weight file that is there, past_kv_scale only where present.
    """

    root: Path
    manifest: Manifest | None
    config: TurboMindConfig
    model: ModelConfig
    specs: tuple[TensorSpec, ...]

    @property
    def name(self) -> str:
        """The manifest's name, else config.ini's model_name."""
        return self.manifest.name if self.manifest else self.config.model_name

    @property
    def weights_dir(self) -> Path:
        """Folder of config.ini and the weight files."""
        return self.root / names.WEIGHTS_DIR

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of the tokenizer's files."""
        return self.root / names.TOKENIZER_DIR

    @property
    def kernels_dir(self) -> Path:
        """Folder of the cubins; may not exist."""
        return self.root / names.KERNELS_DIR

    @property
    def has_kv_scales(self) -> bool:
        """Whether the static int8 KV parameters are there, which they are for all layers."""
        return any(spec.is_optional for spec in self.specs)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(spec.size_bytes for spec in self.specs)

    @cached_property
    def _specs_by_name(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.specs}

    def spec(self, name: str) -> TensorSpec:
        """Return the spec of a weight file.

        Raises:
            PackageError: the package has no such file.
        """
        if name not in self._specs_by_name:
            raise PackageError(f"package {self.name} has no tensor called {name[:120]!r}")
        return self._specs_by_name[name]

    def tensor(self, name: str) -> NDArray[Any]:
        """Map a weight file read-only, with the spec's shape and element type.

        Raises:
            PackageError: the package has no such file, or it changed since it was opened.
        """
        spec = self.spec(name)
        check_file(self.root, spec.path, spec.size_bytes)
        mapped = np.memmap(self.root / spec.path, spec.dtype, mode="r", shape=spec.shape)
        return np.asarray(mapped)

    def kv_scale(self, layer: int, rank: int = 0) -> KvScale | None:
        """Return the static int8 KV parameters of a layer, None when the package has none.

        Raises:
            PackageError: the file is damaged, or there is no such layer.
        """
        if not self.has_kv_scales:
            return None
        spec = self.spec(names.kv_scale_tensor(layer, rank))
        return KvScale.from_bytes((self.root / spec.path).read_bytes())


def open_package(path: Path | str) -> Package:
    """Open a package, or a workspace that LMDeploy 0.1 to 0.2.5 wrote.

    Looks at every file's size, and at no weight's content; see `verify_package`.

    Raises:
        PackageError: it is neither, or a file is missing, has another size, leaves the folder
            through a link, or contradicts another.
    """
    root = Path(path)
    if not root.is_dir():
        raise PackageError(f"{root} is not a folder, expected a package or a workspace")
    root = root.resolve()
    manifest = None
    if os.path.lexists(root / names.MANIFEST):
        check_file(root, names.MANIFEST)
        manifest = read_manifest(root)
    if manifest is None and not (root / names.TRITON_MODELS).is_dir():
        raise PackageError(
            f"{root} has neither {names.MANIFEST} nor {names.TRITON_MODELS}, "
            "expected a package or a workspace"
        )
    for entry in manifest.files if manifest else ():
        check_file(root, entry.path, entry.size_bytes)
    config = _read_config(root)
    if manifest is None:
        model = config.model_config()
    else:
        model = manifest.model
        config.check_model(model)
        check_file(root, names.tokenizer_path(names.TOKENIZER_JSON))
    specs = check_tensor_files(root, model)
    if manifest is not None and manifest.is_sealed:
        _check_listed(manifest, specs)
    return Package(root=root, manifest=manifest, config=config, model=model, specs=specs)


def verify_package(path: Path | str, progress: BytesProgress | None = None) -> Package:
    """Open a package and compare the SHA-256 of every file with the manifest's.

    Args:
        path: folder of the package.
        progress: called after every few MB.

    Raises:
        PackageError: it does not open, lists no hashes, a file differs, or there is a file that
            the manifest does not list.
    """
    package = open_package(path)
    manifest = package.manifest
    if manifest is None or not manifest.is_sealed:
        raise PackageError(f"{package.root} was not packed and lists no hashes to compare with")
    listed = {entry.path for entry in manifest.files} | {names.MANIFEST}
    for found in list_files(package.root):
        if found not in listed:
            raise PackageError(f"{found} in {package.root} is not listed in {names.MANIFEST}")
    paths = [entry.path for entry in manifest.files]
    actual = {entry.path: entry for entry in hash_files(package.root, paths, progress)}
    for entry in manifest.files:
        if actual[entry.path] != entry:
            raise PackageError(
                f"{entry.path} has sha256 {actual[entry.path].sha256[:16]}..., the manifest says "
                f"{entry.sha256[:16]}...; install or pack again"
            )
    return package


def _read_config(root: Path) -> TurboMindConfig:
    path = names.CONFIG_PATH
    size_bytes = check_file(root, path)
    if size_bytes > MAX_CONFIG_BYTES:
        raise PackageError(f"{path} has {size_bytes} bytes, expected at most {MAX_CONFIG_BYTES}")
    try:
        text = (root / path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PackageError(f"{path} is not UTF-8 at byte {error.start}") from error
    return TurboMindConfig.from_text(text)


def _check_listed(manifest: Manifest, specs: tuple[TensorSpec, ...]) -> None:
    listed = {entry.path for entry in manifest.files}
    needed = [names.CONFIG_PATH]
    needed.append(names.tokenizer_path(names.TOKENIZER_JSON))
    needed += [spec.path for spec in specs]
    for path in needed:
        if path not in listed:
            raise PackageError(f"{path} is not listed in {names.MANIFEST}, pack again")

"""A package or workspace on disk, opened for reading: complete, or it does not open."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.errors import PackageError
from device_runtime.package_format import names
from device_runtime.package_format.config_ini import MAX_CONFIG_BYTES, TurboMindConfig
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.manifest import FileEntry, Manifest, read_manifest
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.tensors import TensorSpec
from device_runtime.package_format.workspace import check_file, check_tensor_files

BytesProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

_HASH_CHUNK_BYTES = 4 << 20


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
    manifest = read_manifest(root) if os.path.lexists(root / names.MANIFEST) else None
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
    done_bytes = 0
    for entry in manifest.files:
        digest = hashlib.sha256()
        for chunk in _chunks(package.root / entry.path):
            digest.update(chunk)
            done_bytes += len(chunk)
            if progress:
                progress(done_bytes, manifest.size_bytes)
        if digest.hexdigest() != entry.sha256:
            raise PackageError(
                f"{entry.path} has sha256 {digest.hexdigest()[:16]}..., the manifest says "
                f"{entry.sha256[:16]}...; install or pack again"
            )
    return package


def list_files(root: Path) -> tuple[str, ...]:
    """Return the relative paths of all files below ``root``, sorted; links count as files."""
    found = []
    for folder, folders, files in os.walk(root):
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in files + linked]
    return tuple(sorted(found))


def hash_files(
    root: Path, paths: tuple[str, ...], progress: BytesProgress | None = None
) -> tuple[FileEntry, ...]:
    """Return the manifest's entries for ``paths``, sorted by path.

    Raises:
        PackageError: a file is missing, not regular or outside ``root``.
    """
    total_bytes = sum(check_file(root, path) for path in paths)
    done_bytes = 0
    entries = []
    for path in sorted(paths):
        digest = hashlib.sha256()
        size_bytes = 0
        for chunk in _chunks(root / path):
            digest.update(chunk)
            size_bytes += len(chunk)
            done_bytes += len(chunk)
            if progress:
                progress(done_bytes, total_bytes)
        entries.append(FileEntry(path, size_bytes, digest.hexdigest()))
    return tuple(entries)


def _chunks(path: Path) -> Iterator[memoryview]:
    buffer = bytearray(_HASH_CHUNK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield view[:count]


def _read_config(root: Path) -> TurboMindConfig:
    path = f"{names.WEIGHTS_DIR}/{names.CONFIG_INI}"
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
    needed = [f"{names.WEIGHTS_DIR}/{names.CONFIG_INI}"]
    needed.append(names.tokenizer_path(names.TOKENIZER_JSON))
    needed += [spec.path for spec in specs]
    for path in needed:
        if path not in listed:
            raise PackageError(f"{path} is not listed in {names.MANIFEST}, pack again")

"""Named tensors over the weight files of one folder; a file is mapped, never executed or copied."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from device_runtime.errors import DeviceError, PackageError
from host_tools.checkpoint.synthetic import MARKER, SyntheticFile
from host_tools.checkpoint_folder import check_path
from host_tools.checkpoint_names import INDEX_SUFFIX, SECOND_WEIGHTS
from host_tools.shard_index import check_shards, read_index

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 16 << 20
"""Names, dtypes and shapes of one file; those of the largest public shards take less than 1 MB."""

_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OSError,
    MemoryError,
    AssertionError,
)
"""What torch.load was seen to raise on damaged or hostile files."""


class TensorFile(Protocol):
    """One open weight file."""

    def names(self) -> list[str]:
        """Return the names of its tensors."""

    def facts(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return dtype and shape of a tensor without reading it."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor whose memory is the mapped file."""


class SafetensorsFile:
    """A safetensors file: the library checks header, offsets and length when it opens."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            PackageError: it is damaged, or its path is not UTF-8.
            DeviceError: the machine cannot map it.
        """
        self._path = path
        check_path(path)
        _check_header(path)
        try:
            self._file: Any = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise PackageError(
                f"{path.name} is no whole safetensors file ({_first_line(error)}), fetch it again"
            ) from error
        except RuntimeError as error:  # torch maps the file once more, as if it were to be written
            reason = str(error).rpartition(": ")[2]
            raise DeviceError(
                f"{path.name} has {path.stat().st_size} bytes, which this machine cannot map "
                f"({reason[:160]}); take a checkpoint of smaller shards or a machine of more memory"
            ) from error

    def names(self) -> list[str]:
        """Return the names of its tensors."""
        return list(self._file.keys())

    def facts(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return dtype and shape of a tensor from the header.

        Raises:
            PackageError: the dtype is one that no supported checkpoint uses.
        """
        view = self._file.get_slice(name)
        dtype = _SAFETENSORS_DTYPES.get(view.get_dtype())
        if dtype is None:
            raise PackageError(
                f"tensor {name} of {self._path.name} has dtype {view.get_dtype()}, "
                f"expected one of {', '.join(_SAFETENSORS_DTYPES)}"
            )
        return dtype, tuple(view.get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor whose memory is the mapped file."""
        return cast(torch.Tensor, self._file.get_tensor(name))


class PickledFile:
    """A ``pytorch_model*.bin`` file, read with torch's unpickler that knows tensors alone."""

    def __init__(self, path: Path) -> None:
        check_path(path)
        _check_archive(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except _UNPICKLING_ERRORS as error:
            raise PackageError(
                f"{path.name} is no plain torch file of tensors ({_first_line(error)}); "
                f"nothing in it was executed, get the safetensors version of the checkpoint"
            ) from error
        if not isinstance(loaded, dict):
            raise PackageError(f"{path.name} holds a {type(loaded).__name__}, expected tensors")
        for name, value in loaded.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                raise PackageError(f"{path.name} holds {str(name)[:80]!r}, which is no tensor")
            # A stride of 0 would let a small file claim any size, and so would a tensor without
            # memory (device meta) or with another layout; a nested one has no shape.
            is_plain = value.layout == torch.strided and value.device.type == "cpu"
            if not is_plain or value.is_nested or value.numel() > value.untyped_storage().nbytes():
                raise PackageError(
                    f"tensor {name[:80]} of {path.name} claims {value.numel()} elements, "
                    f"more than the file holds"
                )
        # Parameters are saved with their wish for gradients, which keeps numpy away.
        self._tensors: dict[str, torch.Tensor] = {
            name: value.detach() for name, value in loaded.items()
        }

    def names(self) -> list[str]:
        """Return the names of its tensors."""
        return list(self._tensors)

    def facts(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return dtype and shape of a tensor."""
        value = self._tensors[name]
        return value.dtype, tuple(value.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor whose memory is the mapped file."""
        return self._tensors[name]


class TensorFiles:
    """All tensors of a checkpoint folder by name."""

    def __init__(self, files: dict[str, TensorFile]) -> None:
        """Index the tensors of open files.

        Args:
            files: open weight files by file name.

        Raises:
            PackageError: two files hold a tensor of the same name.
        """
        self._files = files
        self._file_of: dict[str, str] = {}
        for file_name, file in files.items():
            for name in file.names():
                if name in self._file_of:
                    raise PackageError(
                        f"tensor {name[:80]} is in {self._file_of[name]} and in {file_name}, "
                        f"remove the weight files that do not belong to the checkpoint"
                    )
                self._file_of[name] = file_name

    @classmethod
    def open(cls, folder: Path) -> TensorFiles:
        """Open every weight file of a checkpoint: safetensors where there are any, else ``.bin``.

        Raises:
            PackageError: no weight file, a missing, extra, damaged or hostile one, or an index
                that disagrees with the files.
        """
        for suffix, index_name, opener in (
            ("safetensors", "model.safetensors.index.json", SafetensorsFile),
            ("bin", "pytorch_model.bin.index.json", PickledFile),
        ):
            index = folder / index_name
            if index.is_file():
                weight_map = read_index(index)
                shards = sorted(set(weight_map.values()))
                whole = index_name.removesuffix(INDEX_SUFFIX)
                if whole not in shards and (folder / whole).is_file():
                    raise PackageError(
                        f"{folder} has {whole} beside {index_name}, which names other files; "
                        f"remove {whole}, or the index and its shards"
                    )
                check_shards(folder, shards)
                files = cls({name: opener(folder / name) for name in shards})
                files._check_index(index_name, weight_map)
                return files
            pattern = "*.safetensors" if suffix == "safetensors" else "pytorch_model*.bin"
            found = sorted(path.name for path in folder.glob(pattern) if path.is_file())
            shards = [name for name in found if not name.startswith(SECOND_WEIGHTS)]
            if shards:
                check_shards(folder, shards)
                return cls({name: opener(folder / name) for name in shards})
        if (folder / MARKER).is_file():
            return cls({MARKER: SyntheticFile(folder)})
        raise PackageError(
            f"{folder} has no model.safetensors, pytorch_model.bin or shards of them, "
            f"name a folder with a whole checkpoint"
        )

    def wrapped(self, wrap: Callable[[TensorFile], TensorFile]) -> TensorFiles:
        """Return the same tensors, each file seen through what ``wrap`` makes of it."""
        return TensorFiles({name: wrap(file) for name, file in self._files.items()})

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def facts(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return dtype and shape of a tensor without reading it."""
        return self._files[self._file_of[name]].facts(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor whose memory is the mapped file; it must not be written to.

        Raises:
            PackageError: a floating-point tensor holds NaN or infinity.
        """
        file_name = self._file_of[name]
        value = self._files[file_name].tensor(name)
        if value.is_floating_point() and not is_finite(value):
            raise PackageError(
                f"tensor {name} of {file_name} holds NaN or infinity, fetch the file again"
            )
        return value

    def _check_index(self, index_name: str, weight_map: dict[str, str]) -> None:
        for name, file_name in weight_map.items():
            if self._file_of.get(name) != file_name:
                raise PackageError(
                    f"{index_name} says that tensor {name[:80]} is in {file_name}, "
                    f"which does not hold it; fetch the checkpoint again"
                )


def is_finite(value: torch.Tensor) -> bool:
    """Tell whether a floating-point tensor holds neither NaN nor infinity."""
    if not value.numel():
        return True
    # aminmax hands NaN on and is an order of magnitude faster than isfinite.
    low, high = torch.aminmax(value)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _check_header(path: Path) -> None:
    """Look at the length of a safetensors header before the library reads it as JSON.

    Raises:
        PackageError: it is longer than any checkpoint's.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if MAX_HEADER_BYTES < length <= path.stat().st_size:
                raise PackageError(
                    f"{path.name} has a header of {length} bytes, expected at most "
                    f"{MAX_HEADER_BYTES}; it is no shard of a checkpoint"
                )
    except OSError as error:
        raise PackageError(f"{path.name} cannot be read ({error.strerror})") from error


def _check_archive(path: Path) -> None:
    """Look at the sizes in a torch file, which is a zip archive of stored entries.

    What is no archive is left to torch, which says so.

    Raises:
        PackageError: an entry is compressed, so that it may become any size, or the pickle is huge.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return
    for entry in entries:
        is_huge = entry.filename.endswith(".pkl") and entry.file_size > MAX_HEADER_BYTES
        if entry.compress_type != zipfile.ZIP_STORED or is_huge:
            raise PackageError(
                f"{path.name} is no plain torch file of tensors ({entry.filename[:60]!a} has "
                f"{entry.file_size} bytes in {entry.compress_size}); nothing in it was executed, "
                f"get the safetensors version of the checkpoint"
            )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]

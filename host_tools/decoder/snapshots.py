"""Saves the activations of a long run as often as it costs little, so that a kill costs a layer."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from device_runtime.errors import DeviceError
from device_runtime.package_format import durable
from host_tools.decoder.stream import Activations

WORK_PER_WRITE = 20.0
"""Seconds of work for each second that the run waited while its states were written: up to 5% more
time. A layer that takes that long is never computed again after a kill."""

WORK_PER_SYNC = 2.0
"""Seconds of work for each second that the disk then needed: half of its time is for others."""

ASSUMED_BYTES_PER_S = 1e9
"""Speed of the first write: into memory, as the disk follows in a thread."""

_NAME = re.compile(r"^before-(\d{5})\.states$")
_PART = "next.states.part"
_FOOTER_BYTES = 8


class Snapshots:
    """Activations on disk, at most one set, that of the latest layer.

    The file's name says which layer comes next. It holds the states of every stream as they lie in
    memory, then what the caller notes beside them, then the number of bytes of the states. The
    caller waits until the kernel has all of it; a thread waits for the disk and gives the file its
    name, so a power cut finds this snapshot or the one before, and a kill too.

    Attributes:
        folder: belongs to the run alone.
    """

    def __init__(
        self,
        folder: Path,
        streams: Sequence[Activations],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the folder and the thread.

        Args:
            folder: belongs to the run alone.
            streams: what is saved and loaded.
            clock: for tests.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._streams = streams
        self._clock = clock
        self._saved_s = clock()
        self._num_bytes = sum(activations.num_bytes for activations in streams)
        self._due_s = WORK_PER_WRITE * self._num_bytes / ASSUMED_BYTES_PER_S
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="snapshot-writer")
        self._syncing: Future[float] | None = None

    def __enter__(self) -> Snapshots:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)

    def is_due(self) -> bool:
        """Tell whether enough work was done since the last time, and the disk is done with that.

        Raises:
            DeviceError: the disk failed meanwhile.
        """
        if self._syncing is not None:
            if not self._syncing.done():
                return False
            self._drain()
        return self._clock() - self._saved_s >= self._due_s

    def save(self, next_layer: int, notes: bytes = b"") -> None:
        """Save the activations that enter ``next_layer``; older ones are dropped once it is whole.

        Args:
            next_layer: index of the layer.
            notes: of the caller, which :meth:`load` gives back.

        Raises:
            DeviceError: the disk is full or fails.
        """
        self._drain()
        started_s = self._clock()
        part = self.folder / _PART
        path = self.folder / f"before-{next_layer:05d}.states"
        try:
            with part.open("wb") as stream:
                for tensor in self._parts():
                    for sample in tensor:
                        stream.write(sample.cpu().contiguous().numpy().data)
                stream.write(notes)
                stream.write(self._num_bytes.to_bytes(_FOOTER_BYTES, "little"))
        except OSError as error:
            part.unlink(missing_ok=True)
            raise DeviceError(f"cannot write {path}: {error.strerror or error}") from error
        self._syncing = self._pool.submit(self._name, part, path)
        self._saved_s = self._clock()
        self._due_s = WORK_PER_WRITE * (self._saved_s - started_s)

    def load(self) -> tuple[int, bytes]:
        """Fill the activations from the latest snapshot.

        Returns:
            The layer that comes next and the notes; 0, and nothing filled, when there is no
            snapshot of such streams.
        """
        for path in sorted(self.folder.iterdir(), reverse=True):
            match = _NAME.match(path.name)
            notes = None if match is None else self._notes(path)
            if match is None or notes is None:
                continue
            saved = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
            start = 0
            for tensor in self._parts():
                values = saved[start : start + tensor.nbytes].view(tensor.dtype).view_as(tensor)
                for sample, value in zip(tensor, values, strict=True):
                    sample.copy_(value)
                start += tensor.nbytes
            return int(match[1]), notes
        return 0, b""

    def _notes(self, path: Path) -> bytes | None:
        """Return what was noted, None where the states are not of these streams' size."""
        with path.open("rb") as stream:
            notes_end = path.stat().st_size - _FOOTER_BYTES
            if notes_end < self._num_bytes:
                return None
            stream.seek(notes_end)
            if int.from_bytes(stream.read(), "little") != self._num_bytes:
                return None
            stream.seek(self._num_bytes)
            return stream.read(notes_end - self._num_bytes)

    def _parts(self) -> list[torch.Tensor]:
        return [part for activations in self._streams for part in activations.parts()]

    def _name(self, part: Path, path: Path) -> float:
        """Give a file its name once it is on the disk; return the seconds that this took."""
        try:
            started_s = self._clock()
            durable.sync_file(part)
            seconds_s = self._clock() - started_s
            part.replace(path)
            durable.sync_folder(self.folder)  # the name is there before the older one goes
            for other in self.folder.iterdir():
                if _NAME.match(other.name) and other != path:
                    other.unlink()
        except OSError as error:
            raise DeviceError(f"cannot write {path}: {error.strerror or error}") from error
        return seconds_s

    def _drain(self) -> None:
        """Wait for the disk; raise what it said."""
        if self._syncing is not None:
            syncing, self._syncing = self._syncing, None
            self._due_s = max(self._due_s, WORK_PER_SYNC * syncing.result())

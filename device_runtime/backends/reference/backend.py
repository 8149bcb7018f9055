"""The `Backend` interface over the numpy decoder: one step at a time, nothing outstanding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.base import Batch
from device_runtime.backends.kv_format import KvFormat, kv_page_bytes
from device_runtime.backends.memory_plan import CacheRequest, MemoryPlan, MemorySurvey
from device_runtime.backends.reference.attention import MAX_SCORES
from device_runtime.backends.reference.blas_threads import make_governor
from device_runtime.backends.reference.decoder import Decoder
from device_runtime.backends.reference.kv_cache import make_kv_cache, read_kv_scales
from device_runtime.backends.reference.sampler import sample
from device_runtime.backends.reference.weights import (
    Weights,
    head_weight_bytes,
    layer_weight_bytes,
)
from device_runtime.errors import DeviceError, InternalError, OutOfMemoryError
from device_runtime.package_format.amounts import MIB
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.package import Package

_MEMORY_INFO = "/proc/meminfo"


class ReferenceBackend:
    """Runs on any machine with numpy; the oracle of every other backend."""

    name = "reference"
    max_steps_ahead = 0

    def __init__(self, note: str = "") -> None:
        """Load nothing yet.

        Args:
            note: first of the plan's notes, such as why no faster backend runs.
        """
        self._note = note
        self._weights: Weights | None = None
        self._decoder: Decoder | None = None
        self._seen: dict[int, NDArray[np.bool_]] = {}
        self._finished: list[list[tuple[int, int]]] = []

    def survey(
        self, package: Package, request: CacheRequest, memory_limit_bytes: int | None
    ) -> MemorySurvey:
        """See `Backend.survey`; weights that do not fit as fp32 are read again in every step."""
        if request.kv_format is KvFormat.INT8_STATIC:
            read_kv_scales(package)
        model = package.model
        available = available_memory_bytes()
        if memory_limit_bytes is not None:
            available = min(available, memory_limit_bytes)
        workspace = workspace_bytes(model, request)
        page_bytes = kv_page_bytes(model, request.page_size, request.kv_format)
        one_session = -(-request.session_len // request.page_size) * page_bytes
        layer, head = layer_weight_bytes(model), head_weight_bytes(model)
        weights, num_streamed = model.num_hidden_layers * layer + head, 0
        notes = [self._note] if self._note else []
        room = available - workspace - one_session
        if weights > room:
            # One layer more is in memory while it is used; the head goes block by block.
            num_kept = max(0, min(room // layer - 1, model.num_hidden_layers - 1))
            weights = (num_kept + 1) * layer
            num_streamed = model.num_hidden_layers - num_kept
            notes.append(
                f"{num_streamed} of {model.num_hidden_layers} layers are read again in every step, "
                f"which is slow: {available // MIB} MiB are available, weights as fp32 take "
                f"{(model.num_hidden_layers * layer + head) // MIB} MiB"
            )
        return MemorySurvey(
            backend=self.name,
            available_bytes=available,
            weight_bytes=weights,
            workspace_bytes=workspace,
            num_streamed_layers=num_streamed,
            is_capped_at_use=True,
            notes=tuple(notes),
        )

    def load(self, package: Package, plan: MemoryPlan) -> None:
        """See `Backend.load`."""
        model = package.model
        num_kept = model.num_hidden_layers - plan.num_streamed_layers
        with _memory_errors(plan):
            cache = make_kv_cache(package, plan)
            self._weights = Weights(
                package, num_kept, is_head_resident=not plan.num_streamed_layers
            )
        self._decoder = Decoder(model, self._weights, cache, plan.page_size, make_governor())

    def submit(self, batch: Batch) -> None:
        """Run the step now; `collect` hands out its tokens.

        Raises:
            InternalError: nothing is loaded, or a row is chained.
            PackageError: the weights give numbers that are not finite.
        """
        if any(batch.is_chained):
            raise InternalError("the reference backend has no token outstanding to chain to")
        decoder, weights = self._loaded()
        self._learn(batch)
        hidden = decoder.run(batch)
        rows = np.flatnonzero(batch.is_sampled)
        last = np.array(batch.query_start)[rows + 1] - 1
        logits = weights.logits(hidden[last])
        drawn = []
        for row, token, scores in zip(rows, last, logits, strict=True):
            sequence_id = batch.sequence_ids[row]
            seen = self._seen.get(sequence_id)
            position = int(batch.positions[token]) + 1
            token_id = sample(scores, batch.sampling[row], position, seen)
            if seen is not None:
                seen[token_id] = True
            drawn.append((sequence_id, token_id))
        self._finished = [drawn]

    def collect(self) -> list[tuple[int, int]]:
        """See `Backend.collect`."""
        return self._finished.pop(0)

    def logits(self, batch: Batch) -> NDArray[np.float32]:
        """See `Backend.logits`."""
        decoder, weights = self._loaded()
        return weights.logits(decoder.run(batch))

    def forget(self, sequence_id: int) -> None:
        """See `Backend.forget`."""
        self._seen.pop(sequence_id, None)

    def release(self, pages: list[int]) -> None:
        """Nothing to do: pages are overwritten in place."""

    def close(self) -> None:
        """See `Backend.close`."""
        self._decoder = self._weights = None
        self._seen.clear()

    def _loaded(self) -> tuple[Decoder, Weights]:
        if self._decoder is None or self._weights is None:
            raise InternalError("the reference backend has no package loaded")
        return self._decoder, self._weights

    def _learn(self, batch: Batch) -> None:
        """Note the tokens of sequences whose repetition penalty needs them."""
        for row, sequence_id in enumerate(batch.sequence_ids):
            if batch.sampling[row].repetition_penalty == 1.0:
                continue
            token_ids = batch.history[row]
            if len(token_ids):
                self._seen[sequence_id] = np.zeros(self._loaded()[1].vocab_size, bool)
            else:
                token_ids = batch.token_ids[batch.query_start[row] : batch.query_start[row + 1]]
            self._seen[sequence_id][token_ids] = True


@contextmanager
def _memory_errors(plan: MemoryPlan) -> Iterator[None]:
    """Turn a failed allocation into a sentence: the plan fitted, the system says no."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError(
            f"the system refuses {plan.total_bytes // MIB} MiB although "
            f"{plan.available_bytes // MIB} MiB are available (a limit of this process, or "
            "vm.overcommit_memory 2); set a memory limit or a smaller cache_max_entry_count"
        ) from error


def available_memory_bytes() -> int:
    """Return what new allocations may take: MemAvailable, not what is unused (unified memory).

    Raises:
        DeviceError: the system does not say.
    """
    try:
        with open(_MEMORY_INFO, encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError) as error:
        raise DeviceError(f"{_MEMORY_INFO} cannot be read: {error}") from error
    raise DeviceError(f"{_MEMORY_INFO} has no MemAvailable, expected a Linux of 3.14 or later")


def workspace_bytes(model: ModelConfig, request: CacheRequest) -> int:
    """Return the bytes of the largest temporaries of a step, generously."""
    token = 4 * model.hidden_size + 2 * model.qkv_size + 5 * model.intermediate_size
    context = 4 * model.kv_size * request.session_len
    logits = 2 * request.max_batch_size * model.vocab_size
    num_tokens = request.max_tokens_per_step + request.max_batch_size
    return 4 * (num_tokens * token + context + logits + 2 * MAX_SCORES)

"""One loaded package on the device: turns planned steps into graphs, passes and small uploads."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.base import Batch
from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.graph_set import GraphSet
from device_runtime.backends.cuda.loading import LoadedMemory, load_memory
from device_runtime.backends.cuda.prompt import PromptRunner, single_row
from device_runtime.backends.cuda.sizes import STEPS_IN_FLIGHT, upload_bytes
from device_runtime.backends.cuda.slots import IDLE, Slot
from device_runtime.backends.cuda.state import Awaited, StepState
from device_runtime.backends.cuda.uploads import Uploads
from device_runtime.backends.memory_plan import MemoryPlan
from device_runtime.errors import DeviceError, InternalError
from device_runtime.package_format.package import Package


class Runner:
    """Owns everything on the device but the context; close it before the driver.

    Attributes:
        memory: what was loaded.
        programs: launches over it.
        state: rows of sequences.
    """

    def __init__(self, driver: CudaDriver, package: Package, plan: MemoryPlan) -> None:
        """Load the package.

        Raises:
            OutOfMemoryError: the plan does not fit after all.
            DeviceError: the device cannot run it.
            PackageError: a file cannot be read.
        """
        self._exits = ExitStack()
        try:
            memory: LoadedMemory = load_memory(driver, package, plan, self._exits)
            self._stream = memory.stream
            self._limits = memory.limits
            part_bytes = upload_bytes(self._limits)
            self._uploads = Uploads(driver, self._stream, STEPS_IN_FLIGHT, part_bytes)
            self._exits.callback(self._uploads.close)
            self.state = StepState(
                driver, self._stream, self._limits, memory.buffers, self._uploads
            )
            self._exits.callback(self.state.close)
            self.memory = memory
            self.programs = programs = memory.programs(self.state.ring_address)
            self._graphs = GraphSet(driver, self._stream, programs, plan.max_batch_size)
            self._exits.callback(self._graphs.close)
            self._prompts = PromptRunner(
                driver, self._stream, self._limits, programs, memory.buffers, self._uploads
            )
            self._stream.synchronize()
        except BaseException:
            self.close()
            raise

    def submit(self, batch: Batch) -> list[Awaited]:
        """Enqueue a step; return what tokens it will choose, in the batch's order."""
        self._uploads.begin()
        slots = [self._slot(batch, row) for row in range(batch.num_sequences)]
        chosen = self.state.slots.chosen
        bounds = pairwise(batch.query_start)
        decoding, prompts = [], []
        for row, (slot, (start, end)) in enumerate(zip(slots, bounds, strict=True)):
            is_ready = chosen[slot.index] == batch.num_cached[row]
            if batch.is_sampled[row] and end - start == 1 and is_ready:
                decoding.append(row)
            elif batch.is_chained[row]:
                raise InternalError("a row is chained to a token that the device did not choose")
            else:
                prompts.append(row)
        awaited: dict[int, Awaited] = {}
        if decoding:
            awaited |= self._decode(batch, slots, decoding)
        for row in prompts:
            # One by one, so that a prompt's numbers do not depend on what else is in the step.
            self._prompts.run(batch, row, slots[row].index)
            if slots[row].sampling.repetition_penalty != 1.0 and not len(batch.history[row]):
                self._prompts.mark(slots[row].index, single_row(batch, row))
            if batch.is_sampled[row]:
                awaited[row] = self._choose_first(batch, row, slots[row])
        self._uploads.end()
        return [awaited[row] for row in sorted(awaited)]

    def logits(self, batch: Batch) -> NDArray[np.float32]:
        """Return ``[num_tokens, vocab_size]``; waits for everything."""
        self._uploads.begin()
        slots = [self._slot(batch, row) for row in range(batch.num_sequences)]
        try:
            if batch.num_sequences != 1:
                raise InternalError(f"logits of {batch.num_sequences} sequences, expected 1")
            self._prompts.run(batch, 0, slots[0].index)
            result = self._prompts.read_logits(batch.num_tokens)
            self._uploads.end()
        finally:
            for sequence_id in batch.sequence_ids:
                self.forget(sequence_id)
        return result

    def forget(self, sequence_id: int) -> None:
        """Free a sequence's slot."""
        self.state.slots.drop(sequence_id)

    def reset(self) -> None:
        """Wait for what is enqueued and make every slot idle; a lost device is left alone."""
        with suppress(DeviceError):
            self._stream.synchronize()
            self.state.reset()

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        # A lost device refuses every call; its context goes next, and with it all that is in it.
        with suppress(DeviceError):
            if hasattr(self, "_stream"):
                self._stream.synchronize()
        with suppress(DeviceError):
            self._exits.close()

    def _slot(self, batch: Batch, row: int) -> Slot:
        sequence_id = batch.sequence_ids[row]
        slot = self.state.slots.get(sequence_id)
        if slot is None:
            slot = self.state.open_slot(sequence_id, batch.sampling[row], batch.rope_theta[row])
            if slot.sampling.repetition_penalty != 1.0:
                self._prompts.mark(slot.index, batch.history[row])
        return slot

    def _decode(self, batch: Batch, slots: list[Slot], rows: list[int]) -> dict[int, Awaited]:
        state = self.state
        width = self._graphs.width(len(rows))
        for slot, place in state.slots.plan_moves([slots[row] for row in rows], width):
            state.move(slot, place)
        active = {slots[row].index for row in rows}
        for index in range(width):
            if index not in active:
                state.set_position(index, IDLE)
        awaited = {}
        for row in rows:
            slot, position = slots[row], batch.num_cached[row]
            state.set_pages(slot, batch.pages[row])
            state.set_position(slot.index, position)
            awaited[row] = state.expect(batch.sequence_ids[row], slot.index, position + 1)
        is_greedy = all(slots[row].sampling.temperature == 0.0 for row in rows)
        self._graphs.launch(width, is_greedy=is_greedy)
        return awaited

    def _choose_first(self, batch: Batch, row: int, slot: Slot) -> Awaited:
        num_tokens = batch.query_start[row + 1] - batch.query_start[row]
        last = batch.num_cached[row] + num_tokens - 1
        self.state.set_position(slot.index, last)
        awaited = self.state.expect(batch.sequence_ids[row], slot.index, last + 1)
        is_greedy = slot.sampling.temperature == 0.0
        self._prompts.sample(num_tokens - 1, slot.index, is_greedy=is_greedy)
        return awaited

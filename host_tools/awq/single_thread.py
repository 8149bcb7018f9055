"""Runs many small tensor operations on one thread, where threads cost more than they give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_thread(device: torch.device) -> Iterator[None]:
    """Keep torch's operations on this thread for the block; on a GPU nothing changes.

    Thousands of operations on a few thousand numbers each wait for each other's threads: on two
    busy cores a layer was measured to take 140 s with two threads and 7 s with one. It also keeps
    the bits of the codes from depending on the number of threads.

    Args:
        device: where the tensors lie.
    """
    if device.type != "cpu":
        yield
        return
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)

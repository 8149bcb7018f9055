"""Processes that work for this one and end with it, whatever ends it.

A forked worker would hold the locks of its parent: killed by ``kill -9`` the parent would leave
workers that wait for ever, and folders in which another turbojet-host seems to be at work.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection


def worker_processes(num_workers: int | None = None) -> ProcessPoolExecutor:
    """Return a pool of fresh processes, which import what they run.

    Args:
        num_workers: at most; None for one a core.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    threading.Thread(target=_wait_for_parents_end, daemon=True).start()


def _wait_for_parents_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:  # always, in a worker
        connection.wait([parent.sentinel])
        os._exit(1)

"""Processes that work for this one and end with it, whatever ends it.

A forked worker would hold the locks of its parent: killed by ``kill -9`` the parent would leave
workers that wait for ever, and folders in which another turbojet-host seems to be at work.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection


@contextmanager
def worker_processes(num_workers: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of fresh processes, which import what they run.

    An exception in the block, Ctrl-C too, kills them in the middle of what they do.

    Args:
        num_workers: at most; None for one a core.
    """
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_begin) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                if process not in others:
                    process.kill()
            raise


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which hears it too, ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:  # always, in a worker
        connection.wait([parent.sentinel])
        os._exit(1)

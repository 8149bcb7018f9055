"""Puts this folder on the path, so that every test finds `tiny_package`."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core of its own; threads of its libraries would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

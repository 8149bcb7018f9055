"""Where models and settings live on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from device_runtime.errors import UsageError

DATA_DIR_VARIABLE = "TURBOJET_DATA_DIR"
"""Names the folder that replaces ``$XDG_DATA_HOME/turbojet``."""

_XDG_VARIABLE = "XDG_DATA_HOME"


def data_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return the folder of all that Turbojet keeps; it need not exist.

    Args:
        environ: the process's own when None.

    Raises:
        UsageError: a variable holds a relative path, or there is no home folder to start from.
    """
    variables = os.environ if environ is None else environ
    own = _absolute(variables, DATA_DIR_VARIABLE)
    if own is not None:
        return own
    xdg = _absolute(variables, _XDG_VARIABLE)
    if xdg is None:
        home = _absolute(variables, "HOME")
        if home is None:
            raise UsageError(f"there is no HOME to keep models in; set {DATA_DIR_VARIABLE}")
        xdg = home / ".local" / "share"
    return xdg / "turbojet"


def _absolute(variables: Mapping[str, str], name: str) -> Path | None:
    """Return the variable as a path; None where it is unset or empty, as XDG asks."""
    value = variables.get(name, "")
    if not value:
        return None
    if not os.path.isabs(value):
        raise UsageError(f"{name} is {value!r}, expected an absolute path")
    return Path(value)

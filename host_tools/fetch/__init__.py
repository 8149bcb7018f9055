"""Gets a checkpoint: from ModelScope, from a folder, or from a GGUF file."""

from host_tools.fetch.fetch import fetch
from host_tools.fetch.options import FetchOptions

__all__ = ["FetchOptions", "fetch"]

"""What `fetch` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from host_tools.options import check_at_least_one


@dataclass(frozen=True)
class FetchOptions:
    """How a model is got; a local folder and a GGUF file know none of these but the adapter.

    Attributes:
        revision: branch, tag or commit; None is the hub's default branch.
        include: only files that match one of these patterns (``*.safetensors``); empty takes what
            a checkpoint needs.
        exclude: of those, no file that matches one of these.
        max_workers: files downloaded at a time.
        adapter: folder of a LoRA adapter to go over the model, local or not.
    """

    revision: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_workers: int = 4
    adapter: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            UsageError: fewer than one worker.
        """
        check_at_least_one("max-workers", self.max_workers)

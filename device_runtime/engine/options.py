"""What a user may ask of an engine; light to import, so that command lines can."""

from __future__ import annotations

import math
from dataclasses import dataclass

from device_runtime.errors import UsageError

DEFAULT_TOKENS_PER_STEP = 512


@dataclass(frozen=True)
class EngineOptions:
    """None means: what the package's config.ini says.

    Attributes:
        backend: "reference", "cuda", or "auto" for the best that runs here.
        cache_max_entry_count: share of free memory, or number of pages (spec section 3.2).
        quant_policy: KV format: 0 fp16, 4 static int8, 8 online int8.
        session_len: most tokens of one conversation.
        max_batch_size: sequences that run together.
        max_tokens_per_step: tokens of prompts in one step, so the length of a prefill chunk; None
            takes ``num_tokens_per_iter`` where config.ini sets it, else 512.
        memory_limit_bytes: use no more than this, as on a smaller board.
    """

    backend: str = "auto"
    cache_max_entry_count: float | None = None
    quant_policy: int | None = None
    session_len: int | None = None
    max_batch_size: int | None = None
    max_tokens_per_step: int | None = None
    memory_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            UsageError: a number is not positive, or not finite.
        """
        for name in (
            "cache_max_entry_count",
            "session_len",
            "max_batch_size",
            "max_tokens_per_step",
            "memory_limit_bytes",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} is {value}, expected more than 0 and less than infinity")

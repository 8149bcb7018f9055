"""How one sequence's next token is drawn; the same meaning on every backend."""

from __future__ import annotations

from dataclasses import dataclass

from device_runtime.errors import RequestError
from device_runtime.package_format.sampling_ranges import sampling_fault


@dataclass(frozen=True)
class SamplingParams:
    """Filters apply in the order penalty, temperature, top-k, top-p, min-p; then Gumbel-max.

    ``temperature`` 0 is greedy and ignores the other filters but the penalty. ``top_k`` 0,
    ``top_p`` 1 and ``min_p`` 0 switch a filter off. The defaults are TurboMind's REPL defaults
    (spec section 6.1).

    Every filter is a threshold on the logits: what ties with the last token that stays, stays.
    The token with the largest sum of logit over temperature and noise is drawn, the lowest index
    of equal ones. The noise of vocabulary index i at position p is ``-log(-log(u))`` with
    ``u = ((word >> 9) + 0.5) / 2^23`` in fp32, word ``i % 4`` of Philox4x32-10 for the counter
    ``(i // 4, p, 0, 0)`` and the seed as key, low half first.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.8
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            RequestError: a value is outside its range.
        """
        fault = sampling_fault(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        if fault is not None:
            raise RequestError(fault)
        if not 0 <= self.seed < 2**64:
            raise RequestError(f"seed is {self.seed}, expected 0 to 2^64 - 1")

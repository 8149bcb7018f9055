"""How one sequence's next token is drawn; the same meaning on every backend."""

from __future__ import annotations

from dataclasses import dataclass

from device_runtime.errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """Filters apply in the order penalty, temperature, top-k, top-p, min-p; then Gumbel-max.

    ``temperature`` 0 is greedy and ignores the other filters but the penalty. ``top_k`` 0,
    ``top_p`` 1 and ``min_p`` 0 switch a filter off. The defaults are TurboMind's REPL defaults
    (spec section 6.1).
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
        checks = (
            ("temperature", self.temperature, 0.0 <= self.temperature <= 100.0, "0 to 100"),
            ("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 or more"),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            ("min_p", self.min_p, 0.0 <= self.min_p < 1.0, "0 to below 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0.0 < self.repetition_penalty <= 100.0,
                "above 0, at most 100",
            ),
            ("seed", self.seed, 0 <= self.seed < 2**64, "0 to 2^64 - 1"),
        )
        for name, value, is_valid, expected in checks:
            if not is_valid:
                raise RequestError(f"{name} is {value}, expected {expected}")

"""What the sampling numbers may be, alike in the defaults of a package and in a request."""

from __future__ import annotations

MAX_TOP_K = 2**31 - 1


def sampling_fault(
    *, temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float
) -> str | None:
    """Return a sentence about the first number outside its range, None when all are inside."""
    checks = (
        ("temperature", temperature, 0.0 <= temperature <= 100.0, "0 to 100"),
        ("top_k", top_k, 0 <= top_k <= MAX_TOP_K, "0 or more"),
        ("top_p", top_p, 0.0 < top_p <= 1.0, "above 0, at most 1"),
        ("min_p", min_p, 0.0 <= min_p < 1.0, "0 to below 1"),
        (
            "repetition_penalty",
            repetition_penalty,
            0.0 < repetition_penalty <= 100.0,
            "above 0, at most 100",
        ),
    )
    for name, value, is_inside, expected in checks:
        if not is_inside:
            return f"{name} is {value}, expected {expected}"
    return None

"""Sizes and times as a person reads them, on either machine."""

from __future__ import annotations

MIB = 1 << 20


def format_bytes(num_bytes: float) -> str:
    """Return a size in decimal units: ``"512 B"``, ``"1.5 kB"``, ``"98.2 MB"``, ``"3.74 GB"``."""
    if num_bytes < 1000:
        return f"{int(num_bytes)} B"
    if num_bytes < 1e6:
        return f"{num_bytes / 1e3:.1f} kB"
    if num_bytes < 1e9:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / 1e9:.2f} GB"


def format_duration(seconds: float) -> str:
    """Return ``"0.4 s"``, ``"42 s"``, ``"3 min 05 s"`` or ``"2 h 10 min"``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

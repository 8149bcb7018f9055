"""The output head as int8 codes with one fp16 scale a row: half the bytes of every decode step."""

from __future__ import annotations

import torch

from device_runtime.errors import PackageError

MAX_CODE = 127
ROWS_AT_ONCE = 8192


def quantize_rows(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to multiples of its own scale; a row of zeros has scale 0.

    The scale is the row's greatest magnitude over 127, rounded to fp16, and one step up where that
    would cut the greatest off. Codes are the nearest for the scale as it is stored.

    Args:
        table: ``[rows, columns]`` of any float type.

    Returns:
        Codes ``[rows, columns]`` int8 from -127 to 127, and scales ``[rows]`` fp16.

    Raises:
        PackageError: a row is too large for an fp16 scale.
    """
    codes = torch.empty(table.shape, dtype=torch.int8)
    scales = torch.empty(len(table), dtype=torch.float16)
    for start in range(0, len(table), ROWS_AT_ONCE):
        rows = table[start : start + ROWS_AT_ONCE].float()
        stored = _row_scales(rows)
        steps = torch.where(stored > 0, stored.float(), 1.0).unsqueeze(1)
        codes[start : start + len(rows)] = (
            (rows / steps).round_().clamp_(-MAX_CODE, MAX_CODE).to(torch.int8)
        )
        scales[start : start + len(rows)] = stored
    return codes, scales


def dequantize_rows(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the fp32 values that codes and scales stand for (spec section 1.4)."""
    return codes.float() * scales.float().unsqueeze(1)


def _row_scales(rows: torch.Tensor) -> torch.Tensor:
    greatest = rows.abs().amax(dim=1)
    scales = (greatest / MAX_CODE).half()
    if not torch.isfinite(scales).all():
        raise PackageError(
            f"the output head reaches {float(greatest.max()):.3g}, beyond what an int8 head with "
            f"fp16 scales holds; use --head fp16"
        )
    # Half a step beyond the last code still rounds to it.
    is_short = greatest > scales.float() * (MAX_CODE + 0.5)
    above = (scales.view(torch.int16) + 1).view(torch.float16)
    return torch.where(is_short, above, scales)

"""Which linears of a 4-bit model stay fp16: names that people see, and the fused files behind them.

TurboMind stores q, k and v as one matrix, and gate and up as one; so do the kernels. Such a matrix
is 4-bit or fp16 as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from device_runtime.errors import UsageError
from device_runtime.package_format import names
from host_tools.checkpoint.families import LINEARS, LogicalLinear

FUSED: dict[str, tuple[LogicalLinear, ...]] = {
    names.W_QKV: ("q", "k", "v"),
    names.WO: ("o",),
    names.W13: ("gate", "up"),
    names.W2: ("down",),
}
"""The linears of each of `names.LAYER_LINEARS`, in its order of columns."""


@dataclass(frozen=True)
class KeptLinears:
    """What patterns chose.

    Attributes:
        fp16_linears: as in `ModelConfig`.
        notes: what to tell the person, one sentence each.
    """

    fp16_linears: tuple[str, ...]
    notes: tuple[str, ...]

    def of_layer(self, layer: int) -> frozenset[LogicalLinear]:
        """Return the linears of a layer that stay fp16, whole fused matrices of them."""
        return kept_in_layer(self.fp16_linears, layer)


def linear_name(layer: int, linear: LogicalLinear) -> str:
    """Return what a linear is called in patterns and reports, ``layers.3.down``."""
    return f"layers.{layer}.{linear}"


def kept_linears(patterns: Sequence[str], num_layers: int) -> KeptLinears:
    """Return the linears that patterns such as ``layers.0.*`` or ``*.down`` choose.

    Args:
        patterns: with ``*``, ``?`` and ``[...]``, of `linear_name`.
        num_layers: of the model.

    Raises:
        UsageError: a pattern chooses nothing, or all of them together choose every linear.
    """
    every = {
        linear_name(layer, linear): (layer, linear)
        for layer in range(num_layers)
        for linear in LINEARS
    }
    chosen: set[tuple[int, LogicalLinear]] = set()
    for pattern in patterns:
        found = {place for name, place in every.items() if fnmatchcase(name, pattern)}
        if not found:
            raise UsageError(
                f"keep-fp16 {pattern[:80]!r} matches no linear; they are called layers.0.q to "
                f"layers.{num_layers - 1}.down, with {', '.join(LINEARS)}"
            )
        chosen |= found
    kept, widened = _fused_names(num_layers, lambda layer, linear: (layer, linear) in chosen)
    if len(kept) == num_layers * len(FUSED):
        raise UsageError("keep-fp16 keeps every linear in fp16, use --method none for that")
    notes = []
    if widened:
        layer, module = widened[0]
        others = f", {len(widened)} such in all" if len(widened) > 1 else ""
        notes.append(
            f"keep-fp16: layers.{layer} keeps {' and '.join(FUSED[module])} together, which are "
            f"one matrix in the package{others}"
        )
    return KeptLinears(kept, tuple(notes))


def float_linears(num_layers: int, is_float: Callable[[int, LogicalLinear], bool]) -> KeptLinears:
    """Return which linears of a 4-bit checkpoint are floating-point, and so become fp16.

    Args:
        num_layers: of the model.
        is_float: tells for one linear.
    """
    kept, widened = _fused_names(num_layers, is_float)
    notes = []
    if widened:
        layer, module = widened[0]
        notes.append(
            f"layers.{layer} has some of {', '.join(FUSED[module])} in 4 bits and some not; what "
            f"is one matrix in a package is stored in fp16 ({len(widened)} in all)"
        )
    return KeptLinears(kept, tuple(notes))


def kept_in_layer(fp16_linears: Iterable[str], layer: int) -> frozenset[LogicalLinear]:
    """Return the linears of a layer that `ModelConfig.fp16_linears` names."""
    there = set(fp16_linears)
    return frozenset(
        linear
        for module, linears in FUSED.items()
        if names.layer_linear(layer, module) in there
        for linear in linears
    )


def _fused_names(
    num_layers: int, is_chosen: Callable[[int, LogicalLinear], bool]
) -> tuple[tuple[str, ...], list[tuple[int, str]]]:
    """Return names of fused matrices with a chosen part, and those with one that was not."""
    kept: list[str] = []
    widened: list[tuple[int, str]] = []
    for layer in range(num_layers):
        for module, linears in FUSED.items():
            chosen = [is_chosen(layer, linear) for linear in linears]
            if any(chosen):
                kept.append(names.layer_linear(layer, module))
                if not all(chosen):
                    widened.append((layer, module))
    return tuple(kept), widened

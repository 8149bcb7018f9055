"""The residual stream in half the bytes, on the device that computes or in pinned host memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from host_tools.decoder.stream import Activations

_MANTISSA_BITS = 23
_HEADROOM = 14
"""A row is divided by the power of two that brings its greatest value into 2^14 to 2^15."""


class CompactActivations(Activations):
    """States as fp16 with one power of two for each token.

    fp16 alone would overflow where a model keeps a few huge channels; the factor keeps every value
    to 11 bits down to 2^-28 of the token's greatest. Products on tensor cores see as many.

    Attributes:
        states: ``[num_samples, seqlen, hidden_size]`` fp16, values over factors.
        factors: ``[num_samples, seqlen, 1]`` fp32, powers of two.
    """

    def __init__(self, states: torch.Tensor, factors: torch.Tensor) -> None:
        super().__init__(states)
        self.factors = factors
        self._source: torch.device | None = None  # the GPU whose copies may be on their way

    @classmethod
    def make(cls, shape: tuple[int, int, int], device: torch.device) -> CompactActivations:
        """Make room for ``[num_samples, seqlen, hidden_size]``.

        Args:
            shape: of the states.
            device: where they lie; in host memory they are pinned where there is a GPU.
        """
        is_pinned = device.type == "cpu" and torch.cuda.is_available()
        return cls(
            torch.empty(shape, dtype=torch.float16, device=device, pin_memory=is_pinned),
            torch.empty((*shape[:2], 1), dtype=torch.float32, device=device, pin_memory=is_pinned),
        )

    def parts(self) -> Sequence[torch.Tensor]:
        """See `Activations.parts`; what was stored has arrived."""
        if self._source is not None:
            torch.cuda.synchronize(self._source)
        return (self.states, self.factors)

    def load(self, batch: slice, device: torch.device) -> torch.Tensor:
        """See `Activations.load`."""
        states = self.states[batch].to(device, non_blocking=True)
        return states.float().mul_(self.factors[batch].to(device, non_blocking=True))

    def store(self, batch: slice, hidden: torch.Tensor) -> None:
        """See `Activations.store`."""
        if self.states.is_cuda:
            hidden = hidden.to(self.states.device)
        elif hidden.is_cuda:
            self._source = hidden.device
        hidden = hidden.float()
        factors = row_factors(hidden)
        # Copies to the host stay in the stream's order, so the next load sees what was stored.
        self.factors[batch].copy_(factors, non_blocking=True)
        self.states[batch].copy_((hidden / factors).half(), non_blocking=True)


def row_factors(values: torch.Tensor) -> torch.Tensor:
    """Return the power of two of each row that brings its greatest value below 2^15.

    Args:
        values: ``[..., columns]`` fp32.

    Returns:
        ``[..., 1]`` fp32, normal numbers.
    """
    greatest = values.abs().amax(dim=-1, keepdim=True)
    exponents = (greatest.view(torch.int32) >> _MANTISSA_BITS).sub_(_HEADROOM).clamp_(min=1)
    return (exponents << _MANTISSA_BITS).view(torch.float32)

"""What a package takes of a device: one definition for the device and for who plans for it.

Nothing here needs a device, a driver or a package's files.
"""

from __future__ import annotations

from dataclasses import dataclass

from device_runtime.backends.cuda.sizes import (
    STAGING_BYTES,
    STEPS_IN_FLIGHT,
    step_limits,
    upload_bytes,
)
from device_runtime.backends.cuda.weights import weight_layout
from device_runtime.backends.cuda.workspace import StepLimits
from device_runtime.backends.memory_plan import CacheRequest, MemorySurvey
from device_runtime.package_format.model_config import ModelConfig

BACKEND_NAME = "cuda"
LAUNCH_BYTES = 48 << 20
"""What modules and graphs take of the device, measured with all widths of a 32-layer model."""


@dataclass(frozen=True)
class DeviceFigures:
    """What of a device decides a plan.

    Attributes:
        num_sms: streaming multiprocessors.
        is_integrated: whether host and GPU share one memory.
        available_bytes: what the process may take, the context included.
        context_bytes: what of it is the context's.
    """

    num_sms: int
    is_integrated: bool
    available_bytes: int
    context_bytes: int


def package_survey(
    model: ModelConfig, request: CacheRequest, device: DeviceFigures, notes: tuple[str, ...] = ()
) -> MemorySurvey:
    """Return what a package takes there, for `plan_memory`."""
    limits = step_limits(model, request, device.num_sms)
    pinned = pinned_bytes(limits) if device.is_integrated else 0
    return MemorySurvey(
        backend=BACKEND_NAME,
        available_bytes=device.available_bytes,
        weight_bytes=weight_layout(model).num_bytes,
        workspace_bytes=limits.num_bytes + LAUNCH_BYTES + pinned,
        context_bytes=device.context_bytes,
        is_capped_at_use=True,
        notes=notes,
    )


def pinned_bytes(limits: StepLimits) -> int:
    """Return the host memory that is pinned at most.

    The staging buffers are free again before the ring and the uploads are allocated.
    """
    staging = 2 * STAGING_BYTES
    return max(staging, limits.ring_bytes + STEPS_IN_FLIGHT * upload_bytes(limits))

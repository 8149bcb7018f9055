"""What a benchmark says about the machine: device, clocks, power mode, memory, read bandwidth."""

from __future__ import annotations

import re
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from device_runtime.backends.base import Backend
from device_runtime.backends.memory_plan import MemoryPlan
from device_runtime.package_format.package import Package

_MODEL_FILE = "/proc/device-tree/model"
_JETPACK_FILE = "/etc/nv_tegra_release"
_POWER_STATUS_FILE = "/var/lib/nvpmodel/status"
_POWER_MODES_FILE = "/etc/nvpmodel.conf"
_DEVFREQ = "/sys/class/devfreq"
_CPU_ARRAY_BYTES = 256 << 20


@dataclass(frozen=True)
class Machine:
    """Facts of the machine; "" or 0 where it does not say.

    Attributes:
        device: name of the GPU or the processor.
        board: of a Jetson.
        sm: 87 for sm_87.
        num_sms: streaming multiprocessors.
        gpu_mhz: GPU clock after it has worked, else the highest the driver names.
        power_mode: nvpmodel's name for it.
        software: L4T release or CUDA version.
        driver: who owns the context, "pycuda" or "libcuda".
        read_bytes_s: that a kernel, or numpy, reads when it does nothing else.
    """

    device: str
    board: str
    sm: int
    num_sms: int
    gpu_mhz: int
    power_mode: str
    software: str
    driver: str
    read_bytes_s: float


@dataclass(frozen=True)
class MemoryUse:
    """Bytes by what they are for.

    ``other_bytes`` is the device's use beyond the plan's weights, pages and context; the host's
    peak is that of this process.
    """

    weight_bytes: int
    kv_bytes: int
    context_bytes: int
    other_bytes: int
    host_peak_bytes: int


def describe_machine(backend: Backend, package: Package) -> Machine:
    """Look at the machine and measure how fast it reads.

    Raises:
        DeviceError: the measurement failed.
    """
    from device_runtime.backends.cuda.backend import CudaBackend

    if not isinstance(backend, CudaBackend):
        return Machine(
            device=_processor(),
            board=_read(_MODEL_FILE),
            sm=0,
            num_sms=0,
            gpu_mhz=0,
            power_mode=power_mode(),
            software=_read(_JETPACK_FILE).partition("\n")[0],
            driver="numpy",
            read_bytes_s=_host_read_bandwidth(),
        )
    from device_runtime.backends.cuda.nvml import sm_clock_mhz
    from device_runtime.backends.cuda.probe import device_facts, measure_read_bandwidth

    facts = device_facts(backend.driver)
    # Before the clock is asked for: an idle device lowers it.
    read_bytes_s = measure_read_bandwidth(backend.driver, package)
    return Machine(
        device=facts.name,
        board=_read(_MODEL_FILE),
        sm=facts.sm,
        num_sms=facts.num_sms,
        gpu_mhz=_gpu_clock_mhz() or sm_clock_mhz() or facts.max_clock_mhz,
        power_mode=power_mode(),
        software=_read(_JETPACK_FILE).partition("\n")[0] or f"CUDA {facts.cuda}",
        driver=facts.driver,
        read_bytes_s=read_bytes_s,
    )


def memory_use(backend: Backend, plan: MemoryPlan) -> MemoryUse:
    """Return what is in use now, split as the plan splits it."""
    from device_runtime.backends.cuda.backend import CudaBackend

    other = plan.workspace_bytes
    if isinstance(backend, CudaBackend):
        planned = plan.weight_bytes + plan.kv_bytes + plan.context_bytes
        other = max(0, backend.used_bytes() - planned)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return MemoryUse(plan.weight_bytes, plan.kv_bytes, plan.context_bytes, other, peak_kib * 1024)


def machine_facts(machine: Machine, memory: MemoryUse) -> dict[str, object]:
    """Return both as JSON values."""
    return {"machine": asdict(machine), "memory": asdict(memory)}


def power_mode() -> str:
    """Return nvpmodel's name of the power mode, "" where there is none.

    The status holds the number, the configuration its name (jetson facts D.4).
    """
    number = re.search(r"pmode:(\d+)", _read(_POWER_STATUS_FILE))
    if number is None:
        return ""
    wanted = int(number.group(1))
    for match in re.finditer(
        r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", _read(_POWER_MODES_FILE)
    ):
        if int(match.group(1)) == wanted:
            return match.group(2)
    return f"mode {wanted}"


def _gpu_clock_mhz() -> int:
    folder = Path(_DEVFREQ)
    if not folder.is_dir():
        return 0
    for entry in sorted(folder.iterdir()):
        if entry.name.endswith((".gpu", ".ga10b", ".gv11b")) or entry.name.startswith("gpu-gpc"):
            text = _read(str(entry / "cur_freq"))
            return int(text) // 1_000_000 if text.isdigit() else 0
    return 0


def _processor() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match.group(1).strip() if match else "CPU"


def _host_read_bandwidth() -> float:
    """Return bytes per second of one thread that sums an array, the best of several."""
    array = np.ones(_CPU_ARRAY_BYTES // 8, np.int64)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        array.sum()
        best = max(best, array.nbytes / (time.perf_counter() - start))
    return best


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""

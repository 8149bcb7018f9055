"""Facts of the Jetson boards that a package can be planned for.

Source: NVIDIA's module data sheets as collected in the table of boards; clocks are the highest
mode, Super where there is one.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from device_runtime.errors import UsageError

_GIB = 1 << 30


@dataclass(frozen=True)
class Board:
    """One module.

    Attributes:
        name: what ``--target`` takes.
        title: what people call it.
        memory_bytes: nominal unified memory.
        usable_bytes: what weights, KV pages and workspace may take together; see `usable_bytes`.
        sm: compute capability times ten, the suffix of ``sm_87``.
        num_sms: streaming multiprocessors.
        gpu_mhz: highest GPU clock.
        bandwidth_gb_s: nominal memory bandwidth, 10^9 bytes per second.
        jetpacks: major JetPack releases that run on it.
    """

    name: str
    title: str
    memory_bytes: int
    usable_bytes: int
    sm: int
    num_sms: int
    gpu_mhz: int
    bandwidth_gb_s: float
    jetpacks: tuple[int, ...]


def usable_bytes(memory_bytes: int) -> int:
    """Return what a model may take of a board's nominal memory.

    Seven eighths (firmware carve-outs, page tables, NvMap's limit: an 8 GB Orin Nano gives about
    5.5 GiB in all) less 1.5 GiB for the system without a desktop.
    """
    return memory_bytes // 8 * 7 - 3 * _GIB // 2


def _board(
    name: str,
    title: str,
    memory_gib: int,
    chip: tuple[int, int, int, float],
    jetpacks: tuple[int, ...],
) -> Board:
    sm, num_sms, gpu_mhz, bandwidth_gb_s = chip
    memory_bytes = memory_gib * _GIB
    return Board(
        name=name,
        title=title,
        memory_bytes=memory_bytes,
        usable_bytes=usable_bytes(memory_bytes),
        sm=sm,
        num_sms=num_sms,
        gpu_mhz=gpu_mhz,
        bandwidth_gb_s=bandwidth_gb_s,
        jetpacks=jetpacks,
    )


_XAVIER_NX = (72, 6, 1100, 59.7)
_AGX_XAVIER = (72, 8, 1377, 136.5)
_ORIN_NX = (87, 8, 1173, 102.4)

BOARDS: dict[str, Board] = {
    board.name: board
    for board in (
        _board("xavier-nx-8gb", "Jetson Xavier NX 8GB", 8, _XAVIER_NX, (5,)),
        _board("xavier-nx-16gb", "Jetson Xavier NX 16GB", 16, _XAVIER_NX, (5,)),
        _board("agx-xavier-16gb", "Jetson AGX Xavier 16GB", 16, _AGX_XAVIER, (5,)),
        _board("agx-xavier-32gb", "Jetson AGX Xavier 32GB", 32, _AGX_XAVIER, (5,)),
        _board("agx-xavier-64gb", "Jetson AGX Xavier 64GB", 64, _AGX_XAVIER, (5,)),
        _board("orin-nano-4gb", "Jetson Orin Nano 4GB", 4, (87, 4, 1020, 51.0), (5, 6, 7)),
        _board("orin-nano-8gb", "Jetson Orin Nano 8GB", 8, (87, 8, 1020, 102.0), (5, 6, 7)),
        _board("orin-nx-8gb", "Jetson Orin NX 8GB", 8, _ORIN_NX, (5, 6, 7)),
        _board("orin-nx-16gb", "Jetson Orin NX 16GB", 16, _ORIN_NX, (5, 6, 7)),
        _board("agx-orin-32gb", "Jetson AGX Orin 32GB", 32, (87, 14, 930, 204.8), (5, 6, 7)),
        _board("agx-orin-64gb", "Jetson AGX Orin 64GB", 64, (87, 16, 1300, 204.8), (5, 6, 7)),
        _board("thor", "Jetson AGX Thor (T5000)", 128, (110, 20, 1575, 273.0), (7,)),
    )
}


def parse_targets(text: str) -> tuple[Board, ...]:
    """Return the boards of ``a,b`` or ``all``, each once, in the order of `BOARDS`.

    Raises:
        UsageError: a name is unknown, or none is given.
    """
    wanted = [name.strip() for name in text.split(",")]
    if wanted == ["all"]:
        return tuple(BOARDS.values())
    for name in wanted:
        if name not in BOARDS:
            near = difflib.get_close_matches(name, BOARDS, n=1)
            hint = f"did you mean {near[0]}" if near else f"known: {', '.join(BOARDS)}, all"
            raise UsageError(f"no board is called {name[:60]!r}; {hint}")
    return tuple(board for name, board in BOARDS.items() if name in wanted)

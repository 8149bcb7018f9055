"""The machine code of the GEMV's weight copies, which carry a policy for the L2 cache."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path

import pytest

from host_tools.kernels import BUILDS, Build, KernelCache, Unit, cached_unit
from host_tools.nvrtc import WHEELS

CACHE = Path(__file__).resolve().parents[2] / ".cache"
# The low 12 bits of LDGSTS, as nvdisasm names them: shared memory addressed by a register, and by a
# register and a uniform register.
BY_REGISTER = 0xFAE
BY_UNIFORM = 0xDAE


def opcodes(cubin: bytes) -> Counter[int]:
    """Return how often each opcode is in the code of a cubin, 16 bytes an instruction."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_bytes, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * entry_bytes) for i in range(count)
    ]
    found: Counter[int] = Counter()
    for header in headers:
        name = headers[names_index][4] + header[0]
        if cubin[name : name + 6] == b".text.":
            words = struct.iter_unpack("<HHIQ", cubin[header[4] : header[4] + header[5]])
            found.update(word[0] & 0xFFF for word in words)
    return found


@pytest.mark.skipif(
    not all((CACHE / "nvrtc" / release).is_dir() for release in WHEELS),
    reason="scripts/fetch-compilers gets the compilers; scripts/test runs it",
)
@pytest.mark.parametrize(
    "build", [build for build in BUILDS if not build.is_plain], ids=lambda build: build.name
)
def test_no_copy_with_a_policy_has_a_uniform_register_in_its_address(build: Build) -> None:
    # Of an address that is partly in a uniform register ptxas makes a copy with a policy whose
    # descriptor is register 1, odd for a pair: an illegal instruction on an H200 (error 715).
    cubin = cached_unit(
        Unit("w4a16_gemv_1", build, 128), KernelCache(CACHE / "nvrtc", CACHE / "cubins")
    )
    found = opcodes(cubin)
    assert found[BY_REGISTER] > 0
    assert found[BY_UNIFORM] == 0

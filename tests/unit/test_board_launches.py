"""What the engine launches on each kind of board, laid out for models of published shapes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from fake_cuda import ATTRIBUTES, FakeCuda, install, write_cubins

from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.kernel_set import KernelSet, find_cubins
from device_runtime.backends.cuda.programs import Memory, Programs
from device_runtime.backends.cuda.sizes import step_limits
from device_runtime.backends.cuda.support import sources_for
from device_runtime.backends.kv_format import KvFormat
from device_runtime.backends.memory_plan import CacheRequest
from device_runtime.backends.synthetic import synthetic_package
from device_runtime.kernels.head_shape import head_shapes

KIB = 1024
# SM, its CUDA release, SMs of a board, KiB of shared memory that a block may have (CUDA C++
# programming guide, table of technical specifications).
BOARDS = ((72, "11.8", 8, 96), (87, "12.6", 8, 163), (110, "13.0", 20, 227))


@pytest.mark.parametrize(("sm", "cuda", "num_sms", "shared_kib"), BOARDS)
@pytest.mark.parametrize("head_type", ["fp16", "int8"])
@pytest.mark.parametrize("name", ["internlm2-1.8b", "llama-2-7b", "internlm2-20b"])
def test_every_launch_fits_the_shared_memory_of_every_board(
    tmp_path, monkeypatch, name, head_type, sm, cuda, num_sms, shared_kib
) -> None:
    model = replace(synthetic_package(name, head_type=head_type).model, num_hidden_layers=1)
    attributes = {16: num_sms, 18: 1, 75: sm // 10, 76: sm % 10, 97: shared_kib * KIB}
    install(monkeypatch, FakeCuda(attributes=ATTRIBUTES | attributes))
    folder = write_cubins(tmp_path, sm, cuda, model.group_size)
    addresses = defaultdict(lambda: 4096)
    with CudaDriver() as driver:
        files = find_cubins((folder,), sources_for(model), model.group_size, driver)
        kernels = KernelSet(driver, files)
        for kv_format in KvFormat:
            request = CacheRequest(0.8, 64, 8192, 16, 512, kv_format)
            limits = step_limits(model, request, num_sms)
            memory = Memory(addresses, addresses, (4096,), 4096)
            programs = Programs(kernels, limits, memory)
            for width in (1, 2, 4, 8, 16):  # a launch that does not fit is refused
                assert programs.decode(width, is_greedy=False)
            for num_tokens in (1, 4, 8, 9, 40, 100, 512):
                assert programs.prompt(num_tokens)
            assert programs.head(8)
        kernels.close()


# 82464 bytes and 8256 for each row of 4096 (the head's own test): 98304 of sm_72 hold 1 row, 166912
# of sm_87 all 8; of 6144, 12352 a row, sm_87 holds 6. Rows are shared out alike.
@pytest.mark.parametrize(
    ("hidden_size", "shared_kib", "num_rows", "expected"),
    [
        (4096, 96, 3, [1, 1, 1]),
        (4096, 163, 8, [8]),
        (4096, 163, 12, [6, 6]),
        (6144, 163, 8, [4, 4]),
        (6144, 163, 6, [6]),
        (2048, 96, 8, [2, 3, 3]),  # 4160 a row: 3 fit
        (16384, 96, 2, [1, 1]),  # none fits: the launch itself is refused
    ],
)
def test_rows_of_the_head_are_as_many_as_fit(hidden_size, shared_kib, num_rows, expected) -> None:
    limit = shared_kib * KIB
    shapes = head_shapes(num_rows, hidden_size, is_int8=False, max_shared_bytes=limit)
    assert [shape.num_rows for shape in shapes] == expected

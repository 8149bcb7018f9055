"""What the readers of 4-bit checkpoints share: one interface, group sizes, plain nibbles.

A packed format knows which tensors a 4-bit linear consists of. It checks dtypes and shapes when a
checkpoint is opened and unpacks one linear at a time into codes, zeros and scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from device_runtime.errors import PackageError
from device_runtime.package_format.int4 import CODES_PER_WORD, MAX_CODE
from host_tools.checkpoint.linear_weights import QuantizedLinear
from host_tools.checkpoint.tensor_files import TensorFiles
from host_tools.options import GROUP_SIZES

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BITS = 4

Expected = tuple[str, tuple[torch.dtype, ...], tuple[int, ...]]
"""Name, accepted dtypes and shape of one tensor."""


class PackedFormat(Protocol):
    """Reads the 4-bit linears of one checkpoint."""

    @property
    def name(self) -> str:
        """The method as people say it ("gptq")."""

    @property
    def group_size(self) -> int:
        """Inputs that share a scale and a zero in what `read` returns."""

    def is_packed(self, module: str) -> bool:
        """Tell whether a module of the checkpoint has codes in the place of a weight."""

    def check(self, module: str, outputs: int, inputs: int) -> list[str]:
        """Check the tensors of one linear and return their names.

        Raises:
            PackageError: one is missing, of another dtype or shape, or asks for what we do not run.
        """

    def read(self, module: str, bias: torch.Tensor | None) -> QuantizedLinear:
        """Unpack one linear.

        Raises:
            PackageError: a scale is not finite in fp16, or a zero has no exact meaning.
        """


def check_expected(files: TensorFiles, expected: Sequence[Expected]) -> list[str]:
    """Check dtypes and shapes of one linear's tensors and return their names.

    Raises:
        PackageError: a tensor is missing, or its dtype or shape is another one.
    """
    for name, dtypes, shape in expected:
        if name not in files:
            raise PackageError(f"tensor {name} is missing, fetch or quantize the checkpoint again")
        dtype, found = files.facts(name)
        if dtype not in dtypes or found != shape:
            raise PackageError(
                f"tensor {name} is {dtype} {list(found)}, config.json means {dtypes[0]} "
                f"{list(shape)}"
            )
    return [name for name, _, _ in expected]


def read_scales(files: TensorFiles, name: str) -> torch.Tensor:
    """Return scales in fp16, rounded to nearest even where they were not.

    Raises:
        PackageError: a scale is not finite in fp16.
    """
    scales = files.tensor(name).to(torch.float16)
    if not torch.isfinite(scales).all():
        raise PackageError(f"{name} holds a scale that fp16 cannot, quantize again")
    return scales


def common_group_size(lengths: Iterable[int], stated: object) -> int:
    """Return the largest group size that we run and that every group of the checkpoint is made of.

    A longer group, up to a whole column, is written as several with the same scale and zero,
    which changes no weight.

    Args:
        lengths: inputs that share a scale, of each linear.
        stated: group size in the config, for the error.

    Raises:
        PackageError: there is none.
    """
    common = math.gcd(*lengths)
    for size in GROUP_SIZES:
        if common and common % size == 0:
            return size
    raise PackageError(
        f"the checkpoint has groups of {common} inputs (group_size {str(stated)[:20]}), turbojet "
        f"runs multiples of {GROUP_SIZES[-1]}"
    )


def paired_group_length(
    files: TensorFiles, codes: str, scales: str, *, inputs_axis: int, kind: str
) -> int:
    """Return how many inputs of a linear share a scale, by the shapes of its codes and scales.

    Args:
        files: has both.
        codes: name of the tensor with eight inputs to a word.
        scales: name of the tensor with a scale per group.
        inputs_axis: along which inputs and groups lie; outputs are along the other.
        kind: what the pair would be, for the error.

    Raises:
        PackageError: one is missing, their outputs differ, or the groups do not divide the inputs.
    """
    for name in (codes, scales):
        if name not in files:
            raise PackageError(f"tensor {name} is missing, quantize the checkpoint again")
    words, groups = files.facts(codes)[1], files.facts(scales)[1]
    outputs_axis = 1 - inputs_axis
    if len(words) != 2 or len(groups) != 2 or words[outputs_axis] != groups[outputs_axis]:
        raise PackageError(
            f"{codes} {list(words)} and {scales} {list(groups)} are no 4-bit {kind} pair"
        )
    inputs, num_groups = words[inputs_axis] * CODES_PER_WORD, groups[inputs_axis]
    if inputs < 1 or num_groups < 1 or inputs % num_groups:
        raise PackageError(f"{codes} has {inputs} inputs in {num_groups} groups, quantize it again")
    return inputs // num_groups


def finer_groups(rows: torch.Tensor, inputs: int, group_size: int) -> torch.Tensor:
    """Repeat each group's row ``[groups, outputs]`` so that there is one for ``group_size``."""
    factor = inputs // group_size // rows.shape[0]
    return rows if factor == 1 else rows.repeat_interleave(factor, dim=0)


def check_group_order(files: TensorFiles, name: str, inputs: int, length: int) -> list[str]:
    """Check that a tensor of group indices says what it would be without activation order.

    Returns:
        Its name; nothing where there is none.

    Raises:
        PackageError: inputs are in another order than their groups, or it is no such tensor.
    """
    if name not in files:
        return []
    found = check_expected(files, ((name, (torch.int32,), (inputs,)),))
    index = files.tensor(name)
    plain = torch.arange(inputs, dtype=index.dtype) // length
    if not torch.equal(index, plain):
        first = int((index != plain).nonzero()[0])
        raise PackageError(
            f"{name} puts input {first} into group {int(index[first])} instead of "
            f"{int(plain[first])}: the checkpoint is quantized with activation order (desc_act), "
            f"which TurboMind's layout cannot hold; quantize it without"
        )
    return found


def unpack_columns(words: NDArray[Any]) -> NDArray[np.uint8]:
    """Unpack codes that lie in a word one after the other, the first in the lowest bits.

    Args:
        words: ``[rows, words]`` of 32-bit integers.

    Returns:
        ``[rows, 8 * words]`` uint8, each 0..15.
    """
    packed = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    codes = np.empty((words.shape[0], words.shape[1] * CODES_PER_WORD), np.uint8)
    np.bitwise_and(packed, MAX_CODE, out=codes[:, 0::2])
    np.right_shift(packed, 4, out=codes[:, 1::2])
    return codes


def unpack_rows(words: NDArray[Any]) -> NDArray[np.uint8]:
    """Unpack words that hold codes of one column each, eight rows one after the other.

    Args:
        words: ``[words, columns]`` of 32-bit integers, the first row in the lowest bits.

    Returns:
        ``[8 * words, columns]`` uint8, each 0..15.
    """
    rows, columns = words.shape
    packed = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    packed = packed.reshape(rows, columns, 4)
    codes = np.empty((rows, CODES_PER_WORD, columns), np.uint8)
    for byte in range(4):
        np.bitwise_and(packed[..., byte], MAX_CODE, out=codes[:, 2 * byte])
        np.right_shift(packed[..., byte], 4, out=codes[:, 2 * byte + 1])
    return codes.reshape(rows * CODES_PER_WORD, columns)

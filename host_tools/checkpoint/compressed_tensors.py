"""compressed-tensors checkpoints in the format pack-quantized (llm-compressor's W4A16).

A linear of K inputs and M outputs is ``weight_packed`` int32 ``[M, K / 8]``, eight inputs to a
word, the first in the lowest bits; ``weight_scale`` ``[M, G]``; where it is asymmetric
``weight_zero_point`` int32 ``[M / 8, G]``, eight outputs to a word; ``weight_shape`` [M, K].
Codes and zeros are stored plus 8, so the weight is ``(code - zero) * scale`` with both as stored
and zero 8 where there is none (compressed-tensors 0.20.0
``compressors/pack_quantized/{base,helpers}.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from device_runtime.errors import PackageError
from device_runtime.package_format.int4 import CODES_PER_WORD
from host_tools.checkpoint.linear_weights import QuantizedLinear
from host_tools.checkpoint.packed_format import (
    BITS,
    SCALE_DTYPES,
    check_expected,
    check_group_order,
    common_group_size,
    finer_groups,
    paired_group_length,
    read_scales,
    unpack_columns,
    unpack_rows,
)
from host_tools.checkpoint.tensor_files import TensorFiles

PACKED = "weight_packed"
SCALE = "weight_scale"
ZERO_POINT = "weight_zero_point"
SHAPE = "weight_shape"
G_IDX = "weight_g_idx"

PACK_QUANTIZED = "pack-quantized"
SYMMETRIC_ZERO = 8

_IN_PLACE_ORDERS = (None, False, "weight", "static")
"""Activation orders that leave inputs where they are: the order of calibration alone."""


@dataclass(frozen=True)
class CompressedTensors:
    """The packed linears of one compressed-tensors checkpoint.

    Attributes:
        files: its tensors.
        group_size: of what `read` returns.
        symmetries: values of ``symmetric`` over the config's groups.
    """

    files: TensorFiles
    group_size: int
    symmetries: frozenset[bool]
    name: str = "compressed-tensors"

    def is_packed(self, module: str) -> bool:
        """Tell whether a module has codes."""
        return f"{module}.{PACKED}" in self.files

    def check(self, module: str, outputs: int, inputs: int) -> list[str]:
        """Check the tensors of one linear and return their names.

        Raises:
            PackageError: one is missing or another than it should be, or there is activation order.
        """
        length = _length(self.files, module)
        groups = inputs // length
        zeros = f"{module}.{ZERO_POINT}"
        expected = [
            (f"{module}.{PACKED}", (torch.int32,), (outputs, inputs // CODES_PER_WORD)),
            (f"{module}.{SCALE}", SCALE_DTYPES, (outputs, groups)),
            (f"{module}.{SHAPE}", (torch.int64, torch.int32), (2,)),
        ]
        if self._has_zeros(module):
            expected.append((zeros, (torch.int32,), (outputs // CODES_PER_WORD, groups)))
        found = check_expected(self.files, expected)
        shape = self.files.tensor(f"{module}.{SHAPE}").tolist()
        if shape != [outputs, inputs]:
            raise PackageError(
                f"{module}.{SHAPE} says {shape}, config.json means {[outputs, inputs]}"
            )
        return found + check_group_order(self.files, f"{module}.{G_IDX}", inputs, length)

    def read(self, module: str, bias: torch.Tensor | None) -> QuantizedLinear:
        """Unpack one linear.

        Raises:
            PackageError: a scale is not finite in fp16.
        """
        codes = torch.from_numpy(unpack_rows(self.files.tensor(f"{module}.{PACKED}").numpy().T))
        inputs = codes.shape[0]
        scales = read_scales(self.files, f"{module}.{SCALE}").T.contiguous()
        if self._has_zeros(module):
            words = self.files.tensor(f"{module}.{ZERO_POINT}").numpy().T
            zeros = torch.from_numpy(unpack_columns(words))
        else:
            zeros = torch.full(scales.shape, SYMMETRIC_ZERO, dtype=torch.uint8)
        return QuantizedLinear(
            codes=codes,
            zeros=finer_groups(zeros, inputs, self.group_size),
            scales=finer_groups(scales, inputs, self.group_size),
            group_size=self.group_size,
            bias=bias,
        )

    def _has_zeros(self, module: str) -> bool:
        """Tell whether a linear has zero points; one that is missing is asked for in `check`."""
        if len(self.symmetries) == 1:
            return False in self.symmetries
        return f"{module}.{ZERO_POINT}" in self.files


def find_compressed(files: TensorFiles, section: Mapping[str, object]) -> CompressedTensors:
    """Return the reader of a compressed-tensors checkpoint.

    Args:
        files: its tensors.
        section: ``quantization_config`` or ``compression_config`` of config.json.

    Raises:
        PackageError: the config asks for what we do not run, or the groups do not go together.
    """
    _check_whole(section)
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise PackageError("config.json says compressed-tensors without config_groups")
    weights = [_weights_of(str(name)[:40], group) for name, group in groups.items()]
    modules = [name.removesuffix(f".{PACKED}") for name in files if name.endswith(f".{PACKED}")]
    if not modules:
        raise PackageError(
            f"config.json says compressed-tensors, no tensor is called {PACKED}, fetch it again"
        )
    lengths = {_length(files, module) for module in modules}
    stated = {arguments.get("group_size") for arguments in weights}
    sizes = {size for size in stated if isinstance(size, int) and size > 0}
    if len(sizes) == len(stated) and not lengths <= sizes:
        raise PackageError(
            f"config.json says group_size {sorted(sizes)[0]}, the tensors have {sorted(lengths)[0]}"
        )
    return CompressedTensors(
        files=files,
        group_size=common_group_size(lengths, next(iter(stated))),
        symmetries=frozenset(arguments.get("symmetric", True) is True for arguments in weights),
    )


def _length(files: TensorFiles, module: str) -> int:
    return paired_group_length(
        files, f"{module}.{PACKED}", f"{module}.{SCALE}", inputs_axis=1, kind=PACK_QUANTIZED
    )


def _check_whole(section: Mapping[str, object]) -> None:
    """Refuse by name what the whole config asks for and we do not run.

    Raises:
        PackageError: another format, sparsity, a transform or a quantized KV cache.
    """
    _check_format(section.get("format"))
    sparsity = section.get("sparsity_config")
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else "dense"
    if sparse != "dense":
        raise PackageError(
            f"the checkpoint is compressed-tensors with sparsity {str(sparse)[:40]}, turbojet "
            f"reads dense ones"
        )
    for key, meaning in (
        ("kv_cache_scheme", "scales of a quantized KV cache"),
        ("transform_config", "transforms of activations"),
    ):
        if section.get(key):
            raise PackageError(
                f"the checkpoint is compressed-tensors with {meaning} ({key}), turbojet does not "
                f"run them"
            )


def _weights_of(name: str, group: object) -> Mapping[str, object]:
    """Return the weight arguments of one of the config's groups, after its refusals.

    Raises:
        PackageError: it quantizes activations, or weights otherwise than we run.
    """
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(weights, Mapping):
        raise PackageError(f"config.json says {name} of config_groups without weights")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise PackageError(
                f"the checkpoint is compressed-tensors with {key} in {name}, turbojet runs 4-bit "
                f"weights with 16-bit activations"
            )
    _check_format(group.get("format"))
    order = weights.get("actorder")
    if order not in _IN_PLACE_ORDERS:
        raise PackageError(
            f"the checkpoint is compressed-tensors with activation order (actorder "
            f"{str(order)[:20]}), which TurboMind's layout cannot hold; quantize it with actorder "
            f"static"
        )
    size = weights.get("group_size")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
        raise PackageError(
            f"config.json says group_size {str(size)[:20]} in {name} of config_groups, expected an "
            f"integer"
        )
    kind = (weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy"))
    if kind not in ((BITS, "int", "group"), (BITS, "int", "channel")):
        raise PackageError(
            f"the checkpoint is compressed-tensors with weights of {str(kind[0])[:10]} bits, type "
            f"{str(kind[1])[:10]}, strategy {str(kind[2])[:20]}; turbojet reads {BITS} bits, int, "
            f"group or channel"
        )
    return weights


def _check_format(found: object) -> None:
    if found not in (None, PACK_QUANTIZED):
        raise PackageError(
            f"the checkpoint is compressed-tensors in the format {str(found)[:40]}, turbojet reads "
            f"{PACK_QUANTIZED}"
        )

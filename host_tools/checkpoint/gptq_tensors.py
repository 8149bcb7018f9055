"""GPTQ checkpoints of AutoGPTQ and GPTQModel: names, refusals, unpacking.

A linear of K inputs and M outputs is ``qweight`` int32 ``[K / 8, M]``, eight inputs of one output
to a word, the first in the lowest bits; ``qzeros`` int32 ``[G, M / 8]``, eight outputs to a word;
``scales`` ``[G, M]``; ``g_idx`` int32 ``[K]``, the group of each input. The weight is
``(code - zero) * scale``, where version 1 (``checkpoint_format`` gptq) stores zero - 1 and
version 2 the zero itself (AutoGPTQ 0.7.1 ``nn_modules/qlinear/qlinear_cuda.py``, GPTQModel 7.7.0
``nn_modules/qlinear/torch.py`` and ``utils/model.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from device_runtime.errors import PackageError
from device_runtime.package_format.int4 import CODES_PER_WORD, MAX_CODE
from device_runtime.package_format.names import QWEIGHT
from host_tools.checkpoint.awq_tensors import QZEROS, SCALES
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

G_IDX = "g_idx"

_ONES = np.uint32(0x11111111)
_VERSIONS = {"gptq": 1, "gptq_v2": 2}


@dataclass(frozen=True)
class GptqTensors:
    """The packed linears of one GPTQ checkpoint.

    Attributes:
        files: its tensors.
        group_size: of what `read` returns.
        version: 1 stores each zero less 1, 2 stores it as it is.
        is_word_wise: a version 1 whose zeros were lessened word by word, so that a zero of 0
            borrows from the next (GPTQModel); AutoGPTQ's cannot hold it at all.
    """

    files: TensorFiles
    group_size: int
    version: int
    is_word_wise: bool
    name: str = "gptq"

    def is_packed(self, module: str) -> bool:
        """Tell whether a module has codes."""
        return f"{module}.{QWEIGHT}" in self.files

    def check(self, module: str, outputs: int, inputs: int) -> list[str]:
        """Check the tensors of one linear and return their names.

        Raises:
            PackageError: one is missing or another than it should be, or there is activation order.
        """
        length = _length(self.files, module)
        groups = inputs // length
        found = check_expected(
            self.files,
            (
                (f"{module}.{QWEIGHT}", (torch.int32,), (inputs // CODES_PER_WORD, outputs)),
                (f"{module}.{QZEROS}", (torch.int32,), (groups, outputs // CODES_PER_WORD)),
                (f"{module}.{SCALES}", SCALE_DTYPES, (groups, outputs)),
            ),
        )
        return found + check_group_order(self.files, f"{module}.{G_IDX}", inputs, length)

    def read(self, module: str, bias: torch.Tensor | None) -> QuantizedLinear:
        """Unpack one linear.

        Raises:
            PackageError: a scale is not finite in fp16, or a stored zero has several meanings.
        """
        codes = torch.from_numpy(unpack_rows(self.files.tensor(f"{module}.{QWEIGHT}").numpy()))
        inputs = codes.shape[0]
        return QuantizedLinear(
            codes=codes,
            zeros=finer_groups(torch.from_numpy(self._zeros(module)), inputs, self.group_size),
            scales=finer_groups(
                read_scales(self.files, f"{module}.{SCALES}"), inputs, self.group_size
            ),
            group_size=self.group_size,
            bias=bias,
        )

    def _zeros(self, module: str) -> NDArray[np.uint8]:
        """Return the zeros ``[groups, outputs]``, each 0..15."""
        words = self.files.tensor(f"{module}.{QZEROS}").numpy().view(np.uint32)
        if self.version == 2:
            return unpack_columns(words)
        if self.is_word_wise:
            return unpack_columns(words + _ONES)
        zeros = unpack_columns(words)
        if zeros.size and int(zeros.max()) == MAX_CODE:
            raise PackageError(
                f"{module}.{QZEROS} stores a zero point of {MAX_CODE}, which AutoGPTQ's kernels "
                f"read as {MAX_CODE + 1} or as 0; quantize the checkpoint again with GPTQModel"
            )
        zeros += np.uint8(1)
        return zeros


def find_gptq(files: TensorFiles, section: Mapping[str, object]) -> GptqTensors:
    """Return the reader of a GPTQ checkpoint.

    Args:
        files: its tensors.
        section: ``quantization_config``, or AutoGPTQ's quantize_config.json.

    Raises:
        PackageError: the config asks for what we do not run, or the groups do not go together.
    """
    _check_variant(section)
    modules = [name.removesuffix(f".{QWEIGHT}") for name in files if name.endswith(f".{QWEIGHT}")]
    if not modules:
        raise PackageError(f"config.json says gptq, no tensor is called {QWEIGHT}, fetch it again")
    lengths = {_length(files, module) for module in modules}
    stated = section.get("group_size")
    if isinstance(stated, int) and stated > 0 and lengths != {stated}:
        raise PackageError(
            f"config.json says group_size {stated}, the tensors have {sorted(lengths)[0]}"
        )
    version = _VERSIONS[_checkpoint_format(section)]
    meta = section.get("meta")
    quantizer = str(meta.get("quantizer", "")) if isinstance(meta, Mapping) else ""
    return GptqTensors(
        files=files,
        group_size=common_group_size(lengths, stated),
        version=version,
        is_word_wise=version == 1 and "gptqmodel" in quantizer.lower(),
    )


def _length(files: TensorFiles, module: str) -> int:
    return paired_group_length(
        files, f"{module}.{QWEIGHT}", f"{module}.{SCALES}", inputs_axis=0, kind="GPTQ"
    )


def _checkpoint_format(section: Mapping[str, object]) -> str:
    return str(section.get("checkpoint_format") or section.get("format") or "gptq").lower()


def _check_variant(section: Mapping[str, object]) -> None:
    """Refuse by name what we do not run.

    Raises:
        PackageError: another number of bits, activation order, or another packing.
    """
    bits = section.get("bits", BITS)
    if bits != BITS:
        raise PackageError(
            f"the checkpoint is gptq with {str(bits)[:10]} bits, turbojet reads {BITS}"
        )
    if section.get("desc_act"):
        raise PackageError(
            "the checkpoint is gptq with activation order (desc_act), which TurboMind's layout "
            "cannot hold; quantize it with desc_act false"
        )
    packing = _checkpoint_format(section)
    if section.get("is_marlin_format"):
        packing = "marlin"
    if packing not in _VERSIONS:
        raise PackageError(
            f"the checkpoint is gptq in the format {packing[:40]}, turbojet reads "
            f"{' and '.join(_VERSIONS)}"
        )
    pack_dtype = str(section.get("pack_dtype") or "int32")
    if pack_dtype != "int32":
        raise PackageError(f"the checkpoint is gptq packed in {pack_dtype[:20]}, expected int32")

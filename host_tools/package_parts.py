"""What a package is made of, by size: which files are codes, scales, embeddings and the rest."""

from __future__ import annotations

from device_runtime.package_format import names
from device_runtime.package_format.package import Package
from device_runtime.package_format.tensors import TensorSpec
from host_tools.pack import content_paths
from host_tools.report.data import Part

CODES = "4-bit codes"
SCALES = "scales and zeros"
FLOAT_LINEARS = "linears in 16 bits"
EMBEDDING = "embedding"
HEAD = "output head"
SMALL = "norms and biases"
KV_PARAMETERS = "static KV parameters"
TOKENIZER = "tokenizer"
KERNELS = "kernels"
SETTINGS = "config.ini"

_LINEAR_MODULES = (names.W_QKV, names.WO, names.W1, names.W2, names.W3, names.W13)


def package_parts(package: Package) -> tuple[Part, ...]:
    """Return the parts of a package, largest first; the manifest is not among them."""
    sizes: dict[str, list[int]] = {}
    by_path = {spec.path: spec for spec in package.specs}
    for path in content_paths(package):
        spec = by_path.get(path)
        part = _part_of_path(path) if spec is None else part_of_tensor(spec)
        size = (package.root / path).stat().st_size
        sizes.setdefault(part, []).append(size)
    parts = (Part(name, len(found), sum(found)) for name, found in sizes.items())
    return tuple(sorted(parts, key=lambda part: (-part.size_bytes, part.name)))


def part_of_tensor(spec: TensorSpec) -> str:
    """Return the part that a weight file belongs to."""
    if spec.name == names.TOK_EMBEDDINGS:
        return EMBEDDING
    if spec.name in (names.OUTPUT, names.OUTPUT_QWEIGHT, names.OUTPUT_SCALES):
        return HEAD
    if spec.is_optional:
        return KV_PARAMETERS
    kind = spec.name.rpartition(".")[2]
    if kind == names.QWEIGHT:
        return CODES
    if kind == names.SCALES_ZEROS:
        return SCALES
    module = ".".join(spec.name.split(".")[2:-2])
    return FLOAT_LINEARS if kind == names.WEIGHT and module in _LINEAR_MODULES else SMALL


def linear_bytes(package: Package) -> int:
    """Return what the linears of the decoder layers take, scales and zeros included."""
    kinds = (CODES, SCALES, FLOAT_LINEARS)
    return sum(spec.size_bytes for spec in package.specs if part_of_tensor(spec) in kinds)


def num_linear_weights(package: Package) -> int:
    """Return the number of weights in the linears of the decoder layers."""
    model = package.model
    columns = model.qkv_size + model.q_size + 3 * model.intermediate_size
    return model.num_hidden_layers * model.hidden_size * columns


def _part_of_path(path: str) -> str:
    if path.startswith(f"{names.TOKENIZER_DIR}/"):
        return TOKENIZER
    return KERNELS if path.startswith(f"{names.KERNELS_DIR}/") else SETTINGS

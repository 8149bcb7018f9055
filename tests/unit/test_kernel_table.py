"""The .cu files against table.py, without a compiler: names, argument types, block sizes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from device_runtime.kernels import table

FOLDER = Path(table.__file__).parent
SOURCES = sorted(path.stem for path in FOLDER.glob("*.cu"))
ENTRY = re.compile(
    r'extern "C" __global__ void __launch_bounds__\(([^)]*)\)\s*(\w+)\(([^)]*)\)', re.DOTALL
)
INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)
CONSTANT = re.compile(r"^constexpr int (\w+) = ([^;]+);", re.MULTILINE)
DEFINE = re.compile(r"^#define (\w+) (\w+)$", re.MULTILINE)
# gemm.cuh: Tile<warps along outputs, warps along tokens, ...>, kThreads is their product by 32.
GEMM_TILE = re.compile(r"^#define TURBOJET_GEMM_TILE (\d+), (\d+),", re.MULTILINE)


def text_of(name: str) -> str:
    text = (FOLDER / name).read_text()
    return "".join(text_of(header) for header in INCLUDE.findall(text)) + text


def constants_of(text: str) -> dict[str, str]:
    tiles = [f"{outputs} * {tokens} * 32" for outputs, tokens in GEMM_TILE.findall(text)]
    gemm = {"GemmTile::kThreads": tiles[0]} if tiles else {}
    return {**dict(DEFINE.findall(text)), **dict(CONSTANT.findall(text)), **gemm}


def number(expression: str, constants: dict[str, str]) -> int:
    """What a constant expression of integers comes to."""
    for _ in range(8):
        names = re.findall(r"[A-Za-z_][\w:]*", expression)
        if not names:
            break
        for name in names:
            expression = re.sub(rf"\b{name}\b", f"({constants[name]})", expression)
    assert re.fullmatch(r"[\d\s()+*/-]+", expression), expression
    return int(eval(expression.replace("/", "//")))


def letter(parameter: str) -> str:
    """P for a pointer, i for int32_t, f for float."""
    if "*" in parameter:
        return "P"
    return {"int32_t": "i", "float": "f"}[parameter.replace("const", "").split()[0]]


def declarations(source: str) -> dict[str, tuple[str, int]]:
    """Arguments as letters and threads of a block, of each entry point of a .cu file."""
    constants = constants_of(text_of(f"{source}.cu"))
    found = {}
    for bounds, name, parameters in ENTRY.findall((FOLDER / f"{source}.cu").read_text()):
        letters = "".join(letter(parameter) for parameter in parameters.split(","))
        found[name] = (letters, number(bounds.split(",")[0], constants))
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_entry_points_are_those_of_the_table(source: str) -> None:
    rows = {row.name: (row.arguments, row.block) for row in table.KERNELS if row.source == source}
    assert declarations(source) == rows
    assert rows


def test_every_row_has_a_source() -> None:
    assert {row.source for row in table.KERNELS} == set(SOURCES)
    assert len({row.name for row in table.KERNELS}) == len(table.KERNELS)


def test_every_entry_point_is_declared_in_the_same_way() -> None:
    # One that the pattern misses would not be compared.
    for source in SOURCES:
        text = (FOLDER / f"{source}.cu").read_text()
        assert text.count('extern "C"') == len(ENTRY.findall(text)), source


def test_swapped_types_are_seen() -> None:
    assert letter("const float* x") == "P"
    assert letter(" int32_t inputs") == "i"
    assert letter("float eps") == "f"
    with pytest.raises(KeyError, match="uint8_t"):
        letter("uint8_t flag")


def test_constants_of_the_gemv_are_those_of_its_shape() -> None:
    from device_runtime.kernels import gemv_shape

    for width, stages in table.GEMV_STAGES.items():
        constants = constants_of(text_of(f"w4a16_gemv_{width}.cu"))
        assert number("TURBOJET_GEMV_WARPS", constants) == table.GEMV_WARPS
        assert number("kUnitInputs", constants) == gemv_shape.UNIT_INPUTS
        assert number("kStretchInputs", constants) == gemv_shape.STRETCH_INPUTS
        assert number("kTileOutputs", constants) == gemv_shape.TILE_OUTPUTS
        assert number("TURBOJET_GEMV_STAGES", constants) == stages
        assert number("kTokens", constants) == width
    constants = constants_of(text_of("w4a16_gemv_paired_1.cu"))
    assert number("TURBOJET_GEMV_WARPS", constants) == table.PAIRED_GEMV_WARPS
    assert number("TURBOJET_GEMV_STAGES", constants) == table.GEMV_STAGES[1]
    assert number("kTokens", constants) == 1

"""The import rules of the two halves, held by reading the source, not by running it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEVICE = ROOT / "device_runtime"
HOST = ROOT / "host_tools"

# Lowest first: a module may import from its own layer and from layers before it.
LAYERS = (
    "errors",
    "package_format",
    "tokenization",
    "templates",
    "kernels",
    "backends",
    "engine",
    "apps",
    "cli",
)
HOST_MAY_IMPORT = ("errors", "package_format", "tokenization", "templates", "kernels", "engine")
DEVICE_LIBRARIES = {
    "numpy",
    "rich",
    "tokenizers",
    "jinja2",
    "prompt_toolkit",
    "pycuda",
    "markdown_it",
}


def imported_modules(path: Path) -> set[str]:
    """Every module a file imports, relative imports resolved, imports inside functions included."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def layer_of(module: str) -> str:
    """The layer of a dotted name inside the device half; the package itself counts as errors."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "errors"


def source_files(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*.py"))
    assert files, f"no source files under {folder}"
    return files


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", source_files(DEVICE), ids=names)
def test_the_device_half_imports_only_its_own_libraries(path: Path) -> None:
    roots = {module.split(".")[0] for module in imported_modules(path)}
    allowed = DEVICE_LIBRARIES | set(sys.stdlib_module_names) | {"device_runtime"}
    assert roots <= allowed, f"{names(path)} imports {sorted(roots - allowed)}"


@pytest.mark.parametrize("path", source_files(DEVICE / "package_format"), ids=names)
def test_the_format_imports_only_numpy_and_the_errors(path: Path) -> None:
    for module in imported_modules(path):
        root = module.split(".")[0]
        if root == "device_runtime":
            assert layer_of(module) in ("errors", "package_format"), f"{names(path)}: {module}"
        else:
            assert root == "numpy" or root in sys.stdlib_module_names, f"{names(path)}: {module}"


@pytest.mark.parametrize(
    "path", [p for p in source_files(DEVICE) if p != DEVICE / "__init__.py"], ids=names
)
def test_imports_inside_the_device_half_go_down(path: Path) -> None:
    own = LAYERS.index(path.relative_to(DEVICE).with_suffix("").parts[0])
    for module in imported_modules(path):
        if module.startswith("device_runtime.") and layer_of(module) in LAYERS:
            assert LAYERS.index(layer_of(module)) <= own, f"{names(path)} imports up: {module}"


@pytest.mark.parametrize("path", source_files(HOST), ids=names)
def test_the_host_half_uses_the_device_half_only_through_its_shared_layers(path: Path) -> None:
    for module in imported_modules(path):
        if module.startswith("device_runtime.") and layer_of(module) in LAYERS:
            assert layer_of(module) in HOST_MAY_IMPORT, f"{names(path)}: {module}"


def test_the_rules_see_every_module_of_the_device_half() -> None:
    top = {p.stem if p.is_file() else p.name for p in DEVICE.iterdir() if p.suffix in ("", ".py")}
    assert top - {"__init__", "__main__", "__pycache__", "py"} <= set(LAYERS)


def test_help_of_the_device_command_loads_no_heavy_library() -> None:
    code = (
        "import sys; from device_runtime import cli; cli.build_parser().format_help();"
        "heavy = {'torch', 'pycuda', 'transformers', 'prompt_toolkit', 'jinja2'};"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"loaded at --help: {done.stderr}"


def test_no_name_of_a_top_level_folder_shadows_a_library() -> None:
    assert not (ROOT / "packaging" / "__init__.py").exists()
    assert not list((ROOT / "packaging").rglob("*.py"))

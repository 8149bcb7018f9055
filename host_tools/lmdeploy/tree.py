"""Makes a workspace the full tree that LMDeploy's convert writes (spec section 1.1).

The weights and config.ini are there already. What is added serves LMDeploy's own tokenizer loader,
which reads ``triton_models/tokenizer`` as a Hugging Face folder, and its Triton server.
"""

from __future__ import annotations

import json
import os
import shutil
from importlib import resources
from pathlib import Path

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format import durable, names
from device_runtime.package_format.config_ini import TurboMindConfig
from device_runtime.package_format.manifest import Manifest
from host_tools.checkpoint_names import JSON, PYTHON
from host_tools.lmdeploy import pbtxt, triton
from host_tools.lmdeploy.service import SERVICE_SCRIPT, service_script

MODEL_REPOSITORY = "model_repository"
PLACEHOLDER = "placeholder"
TOKENIZER_PY = "tokenizer.py"
MODEL_PY = "model.py"
PACKAGE_INIT = "__init__.py"
PBTXT = "config.pbtxt"
VERSION = "1"

LINKS = {
    f"{MODEL_REPOSITORY}/turbomind": f"../{names.TRITON_MODELS}/interactive",
    f"{MODEL_REPOSITORY}/preprocessing": f"../{names.TRITON_MODELS}/preprocessing",
    f"{MODEL_REPOSITORY}/postprocessing": f"../{names.TRITON_MODELS}/postprocessing",
    f"{names.TRITON_MODELS}/interactive/{VERSION}/weights": "../../weights",
    f"{names.TRITON_MODELS}/preprocessing/{VERSION}/tokenizer": "../../tokenizer",
    f"{names.TRITON_MODELS}/postprocessing/{VERSION}/tokenizer": "../../tokenizer",
}
"""Relative symbolic links, path -> target."""

TOP_LEVEL = (MODEL_REPOSITORY, SERVICE_SCRIPT)
"""What lies beside ``triton_models`` in the root."""


def write_tree(
    root: Path, manifest: Manifest, config: TurboMindConfig, checkpoint_dir: Path
) -> list[Path]:
    """Add to a workspace what LMDeploy wants beside weights and tokenizer.json.

    Args:
        root: the workspace, with weights, config.ini and the tokenizer's files.
        manifest: of the workspace.
        config: its config.ini.
        checkpoint_dir: its ``*.json`` and ``*.py`` are copied, as data (see `copy_settings`).

    Returns:
        The files written, links not among them.

    Raises:
        UsageError: the disk cannot hold symbolic links.
        PackageError: tokenizer.json is damaged.
    """
    models = root / names.TRITON_MODELS
    tokenizer = root / names.TOKENIZER_DIR
    written = copy_settings(checkpoint_dir, tokenizer)
    plain_merges(tokenizer / names.TOKENIZER_JSON)
    facts = manifest.tokenizer
    parameters = {
        "tokenizer_path": f"tokenizer/{names.TOKENIZER_JSON}",
        "bos_id": "" if facts.bos_id is None else str(facts.bos_id),
        "eos_id": str(config.end_id),
        "add_bos": str(int(facts.add_bos)),
    }
    interactive = pbtxt.interactive_config(config.tensor_para_size, config.model_name)
    texts = {
        root / SERVICE_SCRIPT: service_script(config.tensor_para_size),
        tokenizer / PLACEHOLDER: "",
        tokenizer / TOKENIZER_PY: _source("tokenizer"),
        models / "interactive" / PBTXT: interactive,
        models / "interactive" / VERSION / PLACEHOLDER: "",
        models / "preprocessing" / PBTXT: pbtxt.preprocessing_config(parameters),
        models / "preprocessing" / VERSION / MODEL_PY: _source("preprocessing"),
        models / "postprocessing" / PBTXT: pbtxt.postprocessing_config(parameters),
        models / "postprocessing" / VERSION / MODEL_PY: _source("postprocessing"),
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    (root / SERVICE_SCRIPT).chmod(0o755)
    for path in written:
        durable.sync_file(path)
    _link_all(root)
    return written


def is_tree(root: Path) -> bool:
    """Tell whether every link of the tree is there and leads to where it should."""
    return all((root / path).exists() and os.readlink(root / path) == LINKS[path] for path in LINKS)


def remove_tree(root: Path) -> None:
    """Remove what a run that was killed left beside ``triton_models``."""
    shutil.rmtree(root / MODEL_REPOSITORY, ignore_errors=True)
    (root / SERVICE_SCRIPT).unlink(missing_ok=True)


def copy_settings(checkpoint_dir: Path, tokenizer: Path) -> list[Path]:
    """Copy the ``*.json`` and ``*.py`` of a checkpoint that are not there yet.

    LMDeploy's tokenizer is transformers' AutoTokenizer, which reads config.json and may run the
    checkpoint's own code; we only carry it. Not ``__init__.py``: Python would run that when the
    server's models import our ``tokenizer.py`` from the same folder.
    """
    copied = []
    for path in sorted(checkpoint_dir.iterdir()):
        target = tokenizer / path.name
        is_setting = path.suffix in (JSON, PYTHON) and path.name != PACKAGE_INIT
        if is_setting and path.is_file() and not target.exists():
            copied.append(Path(shutil.copyfile(path, target)))
    return copied


def plain_merges(path: Path) -> None:
    """Write the merges of a byte-pair tokenizer as text, as libraries before 2024 read them.

    `tokenizers` up to 0.19, which goes with LMDeploy 0.1 to 0.5.3, knows "a b" and not ["a", "b"];
    newer ones read both. A merge with a blank in it can only be written the new way.

    Raises:
        PackageError: the file is no JSON object.
    """
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
        model = definition["model"]
        merges = model.get("merges")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PackageError(f"{path.name} is no tokenizer, fetch the checkpoint again") from error
    if not merges or not isinstance(merges, list) or not isinstance(merges[0], list):
        return
    if any(" " in part for merge in merges for part in merge):
        return
    model["merges"] = [" ".join(merge) for merge in merges]
    text = json.dumps(definition, ensure_ascii=False, indent=2)
    durable.write_atomically(path, text.encode("utf-8"))


def _source(name: str) -> str:
    return resources.files(triton).joinpath(f"{name}{PYTHON}").read_text(encoding="utf-8")


def _link_all(root: Path) -> None:
    for path, target in LINKS.items():
        link = root / path
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(target)
        except OSError as error:
            raise UsageError(
                f"{link} cannot be a symbolic link ({error.strerror}), which LMDeploy's tree has; "
                f"name an output on another disk"
            ) from error

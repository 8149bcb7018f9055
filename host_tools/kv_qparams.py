"""Turns K/V statistics into the parameters of TurboMind's static int8 KV cache (spec section 4)."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format import names
from device_runtime.package_format.config_ini import TurboMindConfig
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.manifest import Manifest, read_manifest, write_manifest
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.workspace import WorkspaceWriter
from host_tools.package_options import KvQparamsOptions
from host_tools.progress import Progress
from host_tools.stage import Stage
from host_tools.statistics import KEY_STATS as KEY_STATS
from host_tools.statistics import VALUE_STATS as VALUE_STATS

KvScales = Literal["none", "asymmetric", "symmetric"]

_LAYER_NUMBER = re.compile(r"\.(\d+)$")


def kv_qparams(
    work_dir: Path, workspace_dir: Path, options: KvQparamsOptions, progress: Progress
) -> Path:
    """Write ``past_kv_scale`` of every layer and rank into a workspace.

    Args:
        work_dir: holds the statistics of ``calibrate``.
        workspace_dir: what ``convert`` wrote; its ``triton_models/weights`` folder, which
            LMDeploy's tutorials name here, does as well.
        options: bits, symmetry and ranks.
        progress: hears of every layer.

    Returns:
        The root of the workspace.

    Raises:
        UsageError: ``tp`` is not the workspace's.
        PackageError: statistics or workspace are missing, damaged or of another model.
    """
    root = workspace_root(workspace_dir)
    manifest = read_manifest(root) if (root / names.MANIFEST).exists() else None
    if manifest is not None and manifest.is_sealed:
        raise UsageError(
            f"{root} is a packed package, whose files are final; run kv-qparams on the workspace "
            "that convert wrote"
        )
    model = manifest.model if manifest is not None else _plain_model(root)
    ranks = model.tensor_para_size
    if options.tp not in (0, ranks):
        raise UsageError(f"tp is {options.tp}, {root} is split for {ranks}; use --tp {ranks}")
    stage = _stage(work_dir, root, model, options)
    if stage.is_finished():
        progress.note(f"kv-qparams: {root} is up to date")
        return root
    scales = _scales(work_dir, model, options)
    # Half of the files would make the workspace unreadable, so none are there meanwhile.
    if manifest is not None:
        write_manifest(root, _with_kv_scales(manifest, "none"))
    for old in _scale_files(root):
        old.unlink()
    writer = WorkspaceWriter(root, model)
    with progress.task("kv-qparams", total=len(scales), unit="layers") as task:
        for layer, of_ranks in enumerate(scales):
            for rank, scale in enumerate(of_ranks):
                writer.write_kv_scale(layer, rank, scale)
            task.advance()
    writer.finish()
    if manifest is not None:
        kind: KvScales = "symmetric" if options.is_symmetric else "asymmetric"
        write_manifest(root, _with_kv_scales(manifest, kind))
    stage.record(_scale_files(root))
    return root


def _stage(work_dir: Path, root: Path, model: ModelConfig, options: KvQparamsOptions) -> Stage:
    return Stage(
        "kv-qparams",
        root,
        (_there(work_dir / KEY_STATS), _there(work_dir / VALUE_STATS)),
        {
            "kv_bits": options.kv_bits,
            "is_symmetric": options.is_symmetric,
            "tp": model.tensor_para_size,
        },
    )


def _scale_files(root: Path) -> list[Path]:
    return sorted((root / names.WEIGHTS_DIR).glob(f"*.{names.PAST_KV_SCALE}.*"))


def _there(path: Path) -> Path:
    """Return a file of statistics.

    Raises:
        PackageError: it is not there.
    """
    if not path.is_file():
        raise PackageError(f"{path} is not there, run calibrate with this work folder first")
    return path


def _with_kv_scales(manifest: Manifest, kind: KvScales) -> Manifest:
    return replace(manifest, quantization=replace(manifest.quantization, kv_scales=kind))


def _plain_model(root: Path) -> ModelConfig:
    """Return the model of a workspace that has no manifest, LMDeploy's own."""
    path = root / names.WEIGHTS_DIR / names.CONFIG_INI
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PackageError(f"{path} cannot be read, name a workspace that convert wrote") from error
    return TurboMindConfig.from_text(text).model_config()


def workspace_root(folder: Path) -> Path:
    """Return the root of a workspace, given it or its weights folder."""
    weights = Path(names.WEIGHTS_DIR)
    if (folder / names.CONFIG_INI).is_file() and folder.resolve().parts[-2:] == weights.parts:
        return folder.resolve().parents[1]
    return folder


def _scales(work_dir: Path, model: ModelConfig, options: KvQparamsOptions) -> list[list[KvScale]]:
    """Return the parameters of each layer's ranks, all computed before any is written."""
    keys = read_extrema(work_dir / KEY_STATS, model)
    values = read_extrema(work_dir / VALUE_STATS, model)
    ranks = model.tensor_para_size
    return [
        [
            KvScale.from_extrema(*extrema, bits=options.kv_bits, is_symmetric=options.is_symmetric)
            for extrema in zip(
                *(part.chunk(ranks) for part in (*keys[layer], *values[layer])), strict=True
            )
        ]
        for layer in range(model.num_hidden_layers)
    ]


def read_extrema(path: Path, model: ModelConfig) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Read (min, max), each ``[num_kv_heads, head_dim]`` fp16, of every layer in order.

    Raises:
        PackageError: the file is missing, damaged, or of another model.
    """
    stats = _load(path)
    try:
        least, most = _by_layer(stats["min"]), _by_layer(stats["max"])
    except (KeyError, TypeError, AttributeError) as error:
        raise PackageError(f"{path} holds no min and max of layers, calibrate again") from error
    expected = list(range(model.num_hidden_layers))
    if sorted(least) != expected or sorted(most) != expected:
        raise PackageError(
            f"{path} holds statistics of {len(least)} layers, the workspace has "
            f"{len(expected)}; calibrate the same checkpoint"
        )
    shape = (model.num_kv_heads, model.head_dim)
    for layer in expected:
        for tensor in (least[layer], most[layer]):
            if tuple(tensor.shape) != shape:
                raise PackageError(
                    f"{path} holds {list(tensor.shape)} for layer {layer}, the workspace has "
                    f"{list(shape)} KV heads and dims; calibrate the same checkpoint"
                )
    return [(least[layer].half(), most[layer].half()) for layer in expected]


def _load(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise PackageError(f"{path} is no file of statistics, calibrate again") from error
    if not isinstance(loaded, dict):
        raise PackageError(f"{path} is no file of statistics, calibrate again")
    return loaded


def _by_layer(tensors: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Key statistics by the number that ends a layer's module path."""
    found = {}
    for name, tensor in tensors.items():
        match = _LAYER_NUMBER.search(name)
        if match is None:
            raise KeyError(name)
        found[int(match.group(1))] = tensor
    return found

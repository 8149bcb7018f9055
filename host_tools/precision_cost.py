"""What the static int8 KV cache and an int8 head cost in perplexity, measured while building.

The converted checkpoint is run layer by layer on the host, once as it is and once with keys and
values as the cache gives them back; both heads then read the same states. A few windows of the
text that ships with the host tools are enough to see a cost that matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from device_runtime.package_format.config_ini import QUANT_POLICY_STATIC_INT8
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.package import Package, open_package
from host_tools.checkpoint import Checkpoint
from host_tools.costs import (
    BOTH,
    INT8_HEAD,
    STATIC_KV,
    Cost,
    CostReport,
    cost_sentences,
    forget_costs,
    read_costs,
    write_costs,
)
from host_tools.datasets import BUILTIN, WindowRequest, calibration_windows
from host_tools.decoder.devices import choose_devices
from host_tools.decoder.layer import Observer, rms_norm
from host_tools.decoder.stream import HEAD_ROWS, Activations, LayerRunner
from host_tools.int8_head import dequantize_rows, quantize_rows
from host_tools.perplexity_figures import perplexity_of
from host_tools.progress import Progress
from host_tools.stage import Stage
from host_tools.tokenizer_folder import SourceTokenizer

NUM_SAMPLES = 4
SEQLEN = 512
ROWS_AT_ONCE = 256
STAGE_VERSION = 1


class StaticKv(Observer):
    """Gives keys and values back as the static int8 cache of one layer does (spec section 4.4)."""

    def __init__(self, scales: Sequence[KvScale], num_kv_heads: int, device: torch.device) -> None:
        """Take the parameters of each rank, which its share of the heads has in common."""
        numbers = [(s.k_scale, s.k_zero_point, s.v_scale, s.v_zero_point) for s in scales]
        of_heads = torch.tensor(numbers, dtype=torch.float32, device=device).repeat_interleave(
            num_kv_heads // len(scales), dim=0
        )
        self._numbers = of_heads.T[:, None, :, None, None]

    def cached(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Observer.cached`."""
        k_scale, k_zero, v_scale, v_zero = self._numbers
        return _through_int8(keys, k_scale, k_zero), _through_int8(values, v_scale, v_zero)


def measure_costs(
    checkpoint_dir: Path,
    workspace: Path,
    work_dir: Path,
    device: str,
    progress: Progress,
    devices: Sequence[str] = (),
) -> CostReport | None:
    """Measure what the workspace saves on; a finished measurement is kept.

    Args:
        checkpoint_dir: what the workspace was converted from.
        workspace: with its static KV parameters, where it uses them.
        work_dir: gets what `costs.write_costs` writes.
        device: auto, cpu or cuda.
        progress: hears of every layer, and a sentence for each cost.
        devices: GPU numbers in place of ``device``; the first one measures.

    Returns:
        None where nothing is saved on.

    Raises:
        PackageError: the checkpoint is damaged.
        DeviceError: the device is not there.
    """
    package = open_package(workspace)
    is_static = package.config.quant_policy == QUANT_POLICY_STATIC_INT8 and package.has_kv_scales
    has_int8_head = package.model.head_type == "int8"
    if not (is_static or has_int8_head):
        forget_costs(work_dir)
        return None
    stage = _stage(checkpoint_dir, package, work_dir, is_static=is_static)
    if stage.is_finished():
        report = read_costs(work_dir)
    else:
        report = _measure(
            checkpoint_dir, package, choose_devices(device, devices)[0], is_static, progress
        )
        stage.record([write_costs(work_dir, report)])
    if report is not None:
        for sentence in cost_sentences(report):
            progress.note(sentence)
    return report


def _stage(checkpoint_dir: Path, package: Package, work_dir: Path, *, is_static: bool) -> Stage:
    scales = [package.root / spec.path for spec in package.specs if spec.is_optional]
    return Stage(
        "costs",
        work_dir,
        (checkpoint_dir, *(scales if is_static else [])),
        {
            "head": package.model.head_type,
            "is_static": is_static,
            "num_samples": NUM_SAMPLES,
            "seqlen": SEQLEN,
        },
        STAGE_VERSION,
    )


@torch.no_grad()
def _measure(
    checkpoint_dir: Path,
    package: Package,
    device: torch.device,
    is_static: bool,
    progress: Progress,
) -> CostReport:
    checkpoint = Checkpoint.open(checkpoint_dir)
    model = checkpoint.model
    seqlen = min(SEQLEN, model.context_tokens)
    tokenizer = SourceTokenizer.open(checkpoint_dir, model.vocab_size).tokenizer
    request = WindowRequest(BUILTIN, NUM_SAMPLES, seqlen)
    windows = calibration_windows(tokenizer, request, Path(), progress)
    token_ids = torch.from_numpy(np.ascontiguousarray(windows))
    plain = Activations.embed(checkpoint, token_ids)
    static = Activations.embed(checkpoint, token_ids) if is_static else None
    runner = LayerRunner(checkpoint, seqlen, device)
    with progress.task(
        f"measure costs on {device.type}", model.num_hidden_layers, "layers"
    ) as task:
        for index in range(model.num_hidden_layers):
            layer = runner.layer(index)
            runner.advance(layer, plain)
            if static is not None:
                runner.advance(layer, static, _static_kv(package, index, device))
            task.advance()
    heads = _heads(checkpoint, has_int8=package.model.head_type == "int8")
    streams = [(False, plain)] + ([(True, static)] if static is not None else [])
    found = {}
    with progress.task("score", len(streams) * len(heads), "passes") as task:
        for is_kv, states in streams:
            for is_int8, head in enumerate(heads):
                found[is_kv, is_int8] = _perplexity(checkpoint, states, head, token_ids, device)
                task.advance()
    exact = found[False, 0]
    named = {(True, 0): STATIC_KV, (False, 1): INT8_HEAD, (True, 1): BOTH}
    costs = tuple(
        Cost(name, found[key], found[key] / exact - 1)
        for key, name in named.items()
        if key in found
    )
    return CostReport(BUILTIN, len(token_ids), seqlen, exact, costs)


def _static_kv(package: Package, layer: int, device: torch.device) -> StaticKv:
    ranks = range(package.model.tensor_para_size)
    scales = [package.kv_scale(layer, rank) for rank in ranks]
    return StaticKv(
        [scale for scale in scales if scale is not None], package.model.num_kv_heads, device
    )


def _through_int8(
    vectors: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    """Return ``[batch, heads, tokens, head_dim]`` stored and loaded again."""
    codes = vectors.sub(zero_point).div_(scale).add_(128.0).round_().clamp_(0, 255)
    return codes.sub_(128.0).mul_(scale).add_(zero_point)


def _heads(checkpoint: Checkpoint, *, has_int8: bool) -> list[_Head]:
    table = checkpoint.head()
    heads = [_Head(table, None)]
    if has_int8:
        heads.append(_Head(*quantize_rows(table)))
    return heads


@dataclass(frozen=True)
class _Head:
    """A table of rows, or codes with their scales."""

    rows: torch.Tensor
    scales: torch.Tensor | None

    def part(self, start: int, device: torch.device) -> torch.Tensor:
        """Return `HEAD_ROWS` rows or what is left, fp32."""
        rows = self.rows[start : start + HEAD_ROWS].to(device)
        if self.scales is None:
            return rows.float()
        return dequantize_rows(rows, self.scales[start : start + HEAD_ROWS].to(device))


def _perplexity(
    checkpoint: Checkpoint,
    activations: Activations,
    head: _Head,
    token_ids: torch.Tensor,
    device: torch.device,
) -> float:
    """Return e to the mean negative log-likelihood of the windows' tokens but the first, capped."""
    norm = checkpoint.final_norm().to(device=device, dtype=torch.float32)
    loss, num_predictions = 0.0, 0
    for sample, ids in enumerate(token_ids):
        states = activations.load(slice(sample, sample + 1), device)[0, :-1]
        following = ids[1:].long().to(device)
        for hidden, targets in zip(
            torch.split(states, ROWS_AT_ONCE), torch.split(following, ROWS_AT_ONCE), strict=True
        ):
            normed = rms_norm(hidden, norm, checkpoint.model.rms_norm_eps)
            logits = torch.empty(len(normed), len(head.rows), device=device)
            for start in range(0, len(head.rows), HEAD_ROWS):
                part = head.part(start, device)
                torch.mm(normed, part.T, out=logits[:, start : start + len(part)])
            scores = logits.log_softmax(-1).gather(1, targets[:, None])
            loss -= float(scores.sum(dtype=torch.float64))
            num_predictions += len(targets)
    return perplexity_of(loss, num_predictions)

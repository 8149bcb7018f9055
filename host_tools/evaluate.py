"""Measures perplexity of checkpoints and packages on the same windows, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from device_runtime.errors import UsageError
from host_tools.datasets import WindowRequest, evaluation_windows
from host_tools.evaluation_targets import Target, dataset_cache_dir, open_target
from host_tools.options import EvaluateOptions
from host_tools.perplexity_figures import capped, perplexity_of
from host_tools.progress import Progress


@dataclass(frozen=True)
class PerplexityResult:
    """How well one target predicts the text.

    Attributes:
        target: as the person wrote it.
        kind: what it is and how it ran.
        perplexity: e to the mean negative log-likelihood of a token, at most `MAX_FIGURE`.
        num_predictions: tokens predicted; the first of each window has nothing before it.
        seconds_s: that the target took.
    """

    target: str
    kind: str
    perplexity: float
    num_predictions: int
    seconds_s: float


@dataclass(frozen=True)
class Comparison:
    """How far a target is from the first one.

    Attributes:
        target: the other one.
        perplexity_increase: relative; 0.01 is one percent worse.
        kl_divergence: mean over tokens of KL(first || other), in nats, at most `MAX_FIGURE`.
        top1_agreement: share of tokens for which both rank the same token first.
    """

    target: str
    perplexity_increase: float
    kl_divergence: float
    top1_agreement: float


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found.

    Attributes:
        dataset: name of the text.
        num_samples: windows; ``seqlen``: tokens of each.
        results: one for each target, in order.
        comparisons: of every target after the first with the first.
    """

    dataset: str
    num_samples: int
    seqlen: int
    results: tuple[PerplexityResult, ...]
    comparisons: tuple[Comparison, ...]


def perplexity(
    target: str | Path, options: EvaluateOptions, progress: Progress
) -> PerplexityResult:
    """Return how well one target predicts the text; see :func:`evaluate`."""
    return evaluate([target], options, progress).results[0]


def evaluate(
    targets: Sequence[str | Path], options: EvaluateOptions, progress: Progress
) -> EvaluationReport:
    """Measure every target on the same windows and compare it with the first.

    Args:
        targets: checkpoints, AWQ folders, workspaces, packages or archives.
        options: text, windows, KV format of packages.
        progress: hears of layers and windows.

    Raises:
        UsageError: no target, a text that is too short, or targets that cut it into other tokens.
        PackageError: a target is damaged.
    """
    if not targets:
        raise UsageError("no target is named, name a checkpoint, AWQ folder, package or archive")
    with ExitStack() as stack:
        tallies = []
        windows: torch.Tensor | None = None
        for path in targets:  # all of them, before the first takes its hours
            started_s = time.perf_counter()
            target = open_target(Path(path), options)
            stack.callback(target.close)
            own = _windows(target, options, progress)
            if windows is not None and not torch.equal(own, windows):
                raise UsageError(
                    f"{path} cuts the text into other tokens than {targets[0]} does, their "
                    f"perplexities cannot be compared"
                )
            windows = own
            tallies.append(_Tally(target, time.perf_counter() - started_s))
        for tally in tallies:
            started_s = time.perf_counter()
            tally.target.prepare(own, progress)
            tally.seconds_s += time.perf_counter() - started_s
        _run(tallies, own, progress)
        return EvaluationReport(
            dataset=Path(options.dataset).name,
            num_samples=options.num_samples,
            seqlen=options.seqlen,
            results=tuple(tally.result() for tally in tallies),
            comparisons=tuple(tally.comparison(tallies[0]) for tally in tallies[1:]),
        )


class _Tally:
    """Sums of one target on the way."""

    def __init__(self, target: Target, seconds_s: float) -> None:
        self.target = target
        self.seconds_s = seconds_s
        self._loss = 0.0
        self._num_predictions = 0
        self._num_tokens = 0
        self._divergence = 0.0
        self._num_agreed = 0

    def add(self, scores: torch.Tensor, following: torch.Tensor) -> None:
        """Count log-probabilities ``[tokens, vocab_size]`` and the tokens that follow.

        The last token of a window is followed by none, so ``following`` may be one shorter.
        """
        count = len(following)
        self._loss -= float(scores[:count].gather(1, following[:, None]).sum(dtype=torch.float64))
        self._num_predictions += count

    def compare(self, scores: torch.Tensor, reference: torch.Tensor) -> None:
        """Count how far log-probabilities are from the reference's, both ``[tokens, vocab]``."""
        divergence = functional.kl_div(scores, reference, reduction="sum", log_target=True)
        self._divergence += float(divergence)
        self._num_agreed += int((scores.argmax(-1) == reference.argmax(-1)).sum())
        self._num_tokens += len(scores)

    def result(self) -> PerplexityResult:
        """Return what was found."""
        return PerplexityResult(
            target=self.target.name,
            kind=self.target.kind,
            perplexity=perplexity_of(self._loss, self._num_predictions),
            num_predictions=self._num_predictions,
            seconds_s=self.seconds_s,
        )

    def comparison(self, first: _Tally) -> Comparison:
        """Return how far this is from the first target."""
        return Comparison(
            target=self.target.name,
            perplexity_increase=self.result().perplexity / first.result().perplexity - 1,
            kl_divergence=capped(self._divergence / self._num_tokens),
            top1_agreement=self._num_agreed / self._num_tokens,
        )


def _windows(target: Target, options: EvaluateOptions, progress: Progress) -> torch.Tensor:
    request = WindowRequest(options.dataset, options.num_samples, options.seqlen)
    windows = evaluation_windows(target.tokenizer, request, dataset_cache_dir(), progress)
    return torch.from_numpy(np.ascontiguousarray(windows))


@torch.no_grad()
def _run(tallies: list[_Tally], windows: torch.Tensor, progress: Progress) -> None:
    """Take all targets through the windows side by side, chunk by chunk."""
    num_samples, seqlen = windows.shape
    with progress.task("evaluate", num_samples, "windows") as task:
        for sample in range(num_samples):
            streams = [tally.target.logits(sample) for tally in tallies]
            position = 0
            while position < seqlen:
                reference: torch.Tensor | None = None
                for tally, stream in zip(tallies, streams, strict=True):
                    started_s = time.perf_counter()
                    scores = next(stream).log_softmax(-1)
                    following = windows[sample, position + 1 : position + 1 + len(scores)]
                    tally.add(scores, following.long())
                    if reference is None:
                        reference = scores
                    else:
                        tally.compare(scores, reference)
                    tally.seconds_s += time.perf_counter() - started_s
                position += len(scores)
            task.advance()

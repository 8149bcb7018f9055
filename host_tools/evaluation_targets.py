"""What can be evaluated, behind one interface: a checkpoint, or a package in the device engine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer

from device_runtime.engine.engine import Engine
from device_runtime.engine.options import EngineOptions
from device_runtime.engine.tokenizer import package_definition
from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format import names
from device_runtime.package_format.archive_reader import extract_archive
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.package import Package, open_package
from device_runtime.tokenization.definition import build_tokenizer
from host_tools.checkpoint import Checkpoint
from host_tools.checkpoint_names import CONFIG_JSON
from host_tools.decoder.stream import Activations, LayerRunner, choose_device, head_logits
from host_tools.options import EvaluateOptions
from host_tools.progress import Progress
from host_tools.tokenizer_folder import SourceTokenizer

CHUNK_TOKENS = 256
"""Rows of logits at once: with 150,000 tokens in the vocabulary they are 150 MB in fp32."""

KINDS = {"awq": "AWQ", "gptq": "GPTQ"}
"""How the methods of 4-bit checkpoints are written."""

KV_NAMES = {0: "fp16", 4: "static int8", 8: "online int8"}


class Target(Protocol):
    """A model that gives logits.

    Attributes:
        name: as the person wrote it.
        kind: "checkpoint", "AWQ checkpoint" or "package, online int8 KV".
        model: its facts.
        tokenizer: its own.
    """

    name: str
    kind: str
    model: ModelConfig
    tokenizer: Tokenizer

    def prepare(self, windows: torch.Tensor, progress: Progress) -> None:
        """Do what is done for all windows ``[num_samples, seqlen]`` at once."""

    def logits(self, sample: int) -> Iterator[torch.Tensor]:
        """Yield the logits of a window, ``[CHUNK_TOKENS or what is left, vocab_size]`` fp32."""

    def close(self) -> None:
        """Free everything."""


class CheckpointTarget:
    """A Hugging Face folder, run by the host's decoder layer by layer."""

    def __init__(self, path: Path, options: EvaluateOptions) -> None:
        self.name = str(path)
        self._device = choose_device(options.device)
        self._checkpoint = Checkpoint.open(path)
        self.model = self._checkpoint.model
        packed = self._checkpoint.packed
        self.kind = f"{KINDS.get(packed.name, packed.name)} checkpoint" if packed else "checkpoint"
        self.tokenizer = SourceTokenizer.open(path, self.model.vocab_size).tokenizer
        _check_context(self, options)

    def prepare(self, windows: torch.Tensor, progress: Progress) -> None:
        """Run every layer over all windows."""
        self._activations = Activations.embed(self._checkpoint, windows)
        runner = LayerRunner(self._checkpoint, windows.shape[1], self._device)
        num_layers = self.model.num_hidden_layers
        title = f"run {Path(self.name).name} on {self._device.type}"
        with progress.task(title, num_layers, "layers") as task:
            for index in range(num_layers):
                runner.advance(runner.layer(index), self._activations)
                task.advance()

    def logits(self, sample: int) -> Iterator[torch.Tensor]:
        """Yield the logits of a window from the last layer's states."""
        for hidden in torch.split(self._activations.states[sample], CHUNK_TOKENS):
            yield head_logits(self._checkpoint, hidden, self._device).to("cpu")

    def close(self) -> None:
        """Drop the weights."""
        del self._checkpoint


class PackageTarget:
    """A package, workspace or archive, run by the device's engine."""

    def __init__(self, path: Path, options: EvaluateOptions) -> None:
        self.name = str(path)
        with ExitStack() as stack:
            package = open_package(_unpacked(path, stack))
            self.model = package.model
            self.tokenizer = _package_tokenizer(package)
            _check_context(self, options)
            self._engine = Engine.open(package, _engine_options(package, options))
            stack.callback(self._engine.close)
            policy = options.quant_policy
            policy = package.config.quant_policy if policy is None else policy
            self.kind = f"package, {KV_NAMES.get(policy, policy)} KV, {self._engine.backend_name}"
            self._stack = stack.pop_all()

    def prepare(self, windows: torch.Tensor, progress: Progress) -> None:
        """Keep the windows: the engine takes one after another."""
        self._windows = windows

    def logits(self, sample: int) -> Iterator[torch.Tensor]:
        """Yield the logits of a window, chunk by chunk through the KV cache."""
        token_ids: list[int] = self._windows[sample].tolist()
        for chunk in self._engine.iter_logits(token_ids):
            yield torch.from_numpy(chunk)

    def close(self) -> None:
        """Close the engine and remove what was unpacked."""
        self._stack.close()


def open_target(path: Path, options: EvaluateOptions) -> Target:
    """Open what lies at ``path``.

    Raises:
        UsageError: nothing is there, or a KV format was asked of a checkpoint.
        PackageError: it is damaged, or neither checkpoint nor package.
    """
    check_target(path)
    return PackageTarget(path, options) if _is_package(path) else CheckpointTarget(path, options)


def check_target(path: Path) -> None:
    """Refuse what cannot be opened, as far as names tell.

    Raises:
        UsageError: nothing is there.
        PackageError: it is neither checkpoint nor package.
    """
    if not path.exists():
        raise UsageError(f"there is no {path}, name a checkpoint, AWQ folder, package or archive")
    if not (_is_package(path) or (path / CONFIG_JSON).is_file()):
        raise PackageError(
            f"{path} has neither {CONFIG_JSON} nor {names.TRITON_MODELS}, it is no checkpoint and "
            f"no package"
        )


def dataset_cache_dir() -> Path:
    """Return where downloaded data sets are kept between evaluations."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return cache / "turbojet" / "datasets"


def _is_package(path: Path) -> bool:
    return path.is_file() or (path / names.TRITON_MODELS).is_dir()


def _check_context(target: Target, options: EvaluateOptions) -> None:
    if options.seqlen > target.model.context_tokens:
        raise UsageError(
            f"seqlen is {options.seqlen}, the context of {target.name} has "
            f"{target.model.context_tokens} tokens"
        )


def _unpacked(path: Path, stack: ExitStack) -> Path:
    """Return the folder of a package; an archive is unpacked for as long as the stack lives."""
    if path.is_dir():
        return path
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="turbojet-evaluate-"))
    return extract_archive(path, Path(folder) / "package").root


def _engine_options(package: Package, options: EvaluateOptions) -> EngineOptions:
    """Return options for one window at a time, with as many KV pages as it needs."""
    page_size = package.config.resolved().cache_block_seq_len
    return EngineOptions(
        quant_policy=options.quant_policy,
        session_len=options.seqlen,
        max_batch_size=1,
        max_tokens_per_step=CHUNK_TOKENS,
        cache_max_entry_count=-(-options.seqlen // page_size) + 1,
    )


def _package_tokenizer(package: Package) -> Tokenizer:
    path = package.tokenizer_dir / names.TOKENIZER_JSON
    return build_tokenizer(package_definition(package), str(path), is_thorough=True)

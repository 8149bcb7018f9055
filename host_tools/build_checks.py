"""What the last stages of a build would refuse, found before the first one takes its hours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from device_runtime.errors import UsageError
from device_runtime.package_format.boards import Board
from device_runtime.package_format.model_config import ModelConfig
from host_tools.checkpoint import Checkpoint
from host_tools.kernel_sets import check_kernels
from host_tools.output_folder import check_outside
from host_tools.pack import check_archive_place
from host_tools.package_facts import describe
from host_tools.package_options import ConvertOptions
from host_tools.report.gather import WORKSPACE_DIR
from host_tools.tokenizer_folder import SourceTokenizer


def check_places(output: Path, work_dir: Path) -> None:
    """Refuse an archive that cannot be written where it shall be.

    Raises:
        UsageError: its name is too long, something else is there, or it and the work folder are in
            each other's way.
    """
    check_archive_place(output)
    if work_dir.resolve().is_relative_to(output.resolve()):
        raise UsageError(
            f"the work folder {work_dir} would lie where the archive {output} goes, name another "
            "work-dir"
        )
    check_outside(work_dir / WORKSPACE_DIR, output)


def check_package(
    checkpoint: Checkpoint,
    model: ModelConfig,
    options: ConvertOptions,
    kernels: str,
    boards: Sequence[Board],
) -> None:
    """Refuse a source of which no package can be made, before its weights are looked at.

    Args:
        checkpoint: the source.
        model: as the workspace will hold it.
        options: how that will be written.
        kernels: as `PackOptions.kernels`.
        boards: that the package is for.

    Raises:
        UsageError: there is no such chat template, or the kernels are not those of the boards.
        PackageError: the tokenizer or a file of settings is damaged, no token ends an answer, or
            the chat template is broken.
    """
    source = SourceTokenizer.open(checkpoint.path, model.vocab_size)
    describe(checkpoint, model, source, options, source_sha256="")
    check_kernels(kernels, model, boards)

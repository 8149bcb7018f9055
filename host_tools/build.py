"""The whole pipeline: fetch, calibrate, quantize, convert, kv-qparams, pack; finished work is kept.

Every stage recognises its finished work by a hash of inputs and settings, writes beside and
renames, so a build that was killed at any moment goes on where it was and ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from device_runtime.engine.board_plan import LongestSession, longest_sessions
from device_runtime.engine.configure import cache_request
from device_runtime.engine.options import EngineOptions
from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format.boards import Board, parse_targets
from device_runtime.package_format.config_ini import QUANT_POLICY_STATIC_INT8
from device_runtime.package_format.manifest import PlannedMemory
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.package import open_package
from host_tools.build_checks import check_package, check_places
from host_tools.build_choices import default_name, largest_group_size
from host_tools.calibrate import calibrate
from host_tools.calibration_time import cpu_notice
from host_tools.checkpoint import Checkpoint
from host_tools.checkpoint.mixed import kept_linears
from host_tools.content_hash import content_files
from host_tools.convert import convert, target_model
from host_tools.costs import COSTS, forget_costs
from host_tools.fetch.fetch import fetch
from host_tools.fetch.sources import FolderSource, parse_source
from host_tools.kv_qparams import kv_qparams
from host_tools.meter import Meter
from host_tools.options import QuantizeOptions
from host_tools.output_folder import check_outside
from host_tools.pack import pack_once, planned_manifest
from host_tools.package_options import (
    ALL_TARGETS,
    BuildOptions,
    ConvertOptions,
    PackOptions,
)
from host_tools.plan import fitting_boards, plan_config
from host_tools.precision_cost import measure_costs
from host_tools.progress import Progress
from host_tools.quantize import check_quantizable, quantize
from host_tools.report.data import ArchiveFacts, StageFigures
from host_tools.report.gather import AWQ_DIR, CHECKPOINT_DIR, WORKSPACE_DIR, write_report
from host_tools.report.records import BuildRecord, write_build_record
from host_tools.stage import exclusive, read_record


@dataclass(frozen=True)
class StageReport:
    """What one stage of a build took.

    Attributes:
        name: the verb.
        seconds_s: wall time.
        peak_anon_bytes: highest anonymous memory of the process meanwhile.
        size_bytes: of everything in the stage's result.
        is_kept: whether the stage found its work finished.
        result: file or folder.
    """

    name: str
    seconds_s: float
    peak_anon_bytes: int
    size_bytes: int
    is_kept: bool
    result: Path


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        archive: the package.
        name: the package's name.
        stages: in order.
        memory: the arithmetic for each target board.
        longest: how long conversations can be there.
        page: the report, report.html of the work folder; None where a record of it is damaged.
    """

    archive: Path
    name: str
    stages: tuple[StageReport, ...]
    memory: tuple[PlannedMemory, ...]
    longest: tuple[LongestSession, ...]
    page: Path | None


def build(
    source: str, output: Path, work_dir: Path, options: BuildOptions, progress: Progress
) -> BuildReport:
    """Turn a source into a package for its target boards.

    Args:
        source: ModelScope id, alias, folder or GGUF file.
        output: the archive.
        work_dir: every stage's result, kept for the next build.
        options: of all stages.
        progress: hears of every stage.

    Raises:
        TurbojetError: what the stages raise; sizes that do not fit a board are found before the
            long stages begin.
    """
    check_places(output, work_dir)
    boards = parse_targets(options.target)
    found = parse_source(source)
    if isinstance(found, FolderSource):
        check_outside(found.path, output, work_dir)
    with exclusive(work_dir, "build-lock"):
        return _Build(source, output, work_dir, options, progress).run(boards)


class _Build:
    """One build on its way: measures each stage and remembers its report."""

    def __init__(
        self, source: str, output: Path, work_dir: Path, options: BuildOptions, progress: Progress
    ) -> None:
        self._source = source
        self._output = output
        self._work = work_dir
        self._options = options
        self._progress = progress
        self._is_for_all = options.target == ALL_TARGETS
        self._reports: list[StageReport] = []

    def run(self, boards: tuple[Board, ...]) -> BuildReport:
        """Run the stages in order."""
        options, progress, work = self._options, self._progress, self._work
        folder, awq = work / CHECKPOINT_DIR, work / AWQ_DIR
        source_dir = self._stage(
            "fetch", folder, lambda: fetch(self._source, folder, options.fetch, progress)
        )
        checkpoint = Checkpoint.open(source_dir)
        quantizer = self._quantizer(checkpoint)
        model = self._target_model(checkpoint, quantizer)
        converter = self._planned(model, boards)
        is_calibrated = self._is_calibrated(checkpoint, quantizer, converter)
        fitting, _ = fitting_boards(model, boards, options.config, is_all=self._is_for_all)
        check_package(checkpoint, model, converter, options.kernels, fitting)
        del checkpoint  # its mapped files would count as ours while other stages run
        if is_calibrated:
            if notice := cpu_notice(source_dir, work, options.calibrate):
                progress.note(notice)
            self._stage(
                "calibrate",
                work,
                lambda: calibrate(source_dir, work, options.calibrate, progress),
            )
        weights_dir = source_dir
        if quantizer is not None:
            chosen = quantizer
            weights_dir = self._stage(
                "quantize", awq, lambda: quantize(source_dir, work, awq, chosen, progress)
            )
        workspace = self._stage(
            "convert",
            work / WORKSPACE_DIR,
            lambda: convert(weights_dir, work / WORKSPACE_DIR, converter, progress),
        )
        if is_calibrated:
            self._stage(
                "kv-qparams",
                workspace,
                lambda: kv_qparams(work, workspace, options.kv, progress),
            )
        if converter.config.quant_policy == QUANT_POLICY_STATIC_INT8 or converter.head == "int8":
            self._stage("costs", work, lambda: self._costs(weights_dir, workspace))
        else:
            forget_costs(work)
        packer = PackOptions(options.target, options.kernels)
        self._stage(
            "pack", work, lambda: pack_once(workspace, self._output, work, packer, progress)
        )
        package = open_package(workspace)
        manifest = planned_manifest(package, packer, Progress())
        return BuildReport(
            archive=self._output,
            name=manifest.name,
            stages=tuple(self._reports),
            memory=manifest.memory,
            longest=longest_sessions(
                package.model,
                cache_request(package, EngineOptions()),
                [board for board in boards if board.name in manifest.target_boards],
            ),
            page=self._write_report(),
        )

    def _write_report(self) -> Path | None:
        """Note what the stages took and draw the report; the archive counts without it too."""
        packed = read_record(self._work, "pack")
        archive = ArchiveFacts(
            self._output.name,
            self._output.stat().st_size,
            packed.hashes[0] if packed and packed.hashes else "",
        )
        stages = tuple(
            StageFigures(stage.name, stage.seconds_s, stage.peak_anon_bytes, stage.size_bytes)
            for stage in self._reports
        )
        kept = frozenset(stage.name for stage in self._reports if stage.is_kept)
        write_build_record(self._work, BuildRecord(self._options.target, archive, stages), kept)
        try:
            return write_report(self._work)
        except PackageError as error:
            self._progress.note(f"build: there is no report: {error}")
            return None

    def _costs(self, weights_dir: Path, workspace: Path) -> Path:
        compute = self._options.calibrate
        measure_costs(
            weights_dir, workspace, self._work, compute.device, self._progress, compute.devices
        )
        return self._work / COSTS

    def _quantizer(self, checkpoint: Checkpoint) -> QuantizeOptions | None:
        """Return how the weights are quantized, None where they stay as they are."""
        options = self._options
        if checkpoint.is_quantized:
            self._progress.note(
                f"build: {checkpoint.path} is quantized already, in groups of "
                f"{checkpoint.model.group_size}; it is converted as it is"
            )
            return None
        if options.method == "none":
            return None
        group_size = options.group_size
        if not group_size:
            group_size, reason = largest_group_size(checkpoint.model, options.tp)
            because = f", {reason}" if reason else ""
            self._progress.note(f"build: w-group-size {group_size}{because}")
        return QuantizeOptions(
            w_bits=options.w_bits,
            group_size=group_size,
            method=options.method,
            device=options.calibrate.device,
            devices=options.calibrate.devices,
            keep_fp16=options.keep_fp16,
        )

    def _converter(self) -> ConvertOptions:
        """Return how the workspace is written, as far as the person said."""
        options = self._options
        return ConvertOptions(
            options.model_name or default_name(self._source, options.fetch.adapter),
            options.tp,
            template=options.template,
            head=options.head,
        )

    def _target_model(
        self, checkpoint: Checkpoint, quantizer: QuantizeOptions | None
    ) -> ModelConfig:
        """Return the model as the workspace will hold it."""
        model = target_model(checkpoint, self._converter())
        if quantizer is None:
            return model
        check_quantizable(checkpoint, quantizer.group_size)
        kept = kept_linears(quantizer.keep_fp16, model.num_hidden_layers)
        try:
            return replace(
                model,
                weight_type="int4",
                group_size=quantizer.group_size,
                fp16_linears=kept.fp16_linears,
            )
        except PackageError as error:
            raise UsageError(
                f"w-group-size {quantizer.group_size} does not fit tp {model.tensor_para_size}: "
                f"{error}; choose a smaller one"
            ) from error

    def _planned(self, model: ModelConfig, boards: tuple[Board, ...]) -> ConvertOptions:
        """Return how the workspace is written, its values planned for the boards."""
        values, notes = plan_config(model, boards, self._options.config, is_all=self._is_for_all)
        for note in notes:
            self._progress.note(note)
        return replace(self._converter(), config=values)

    def _is_calibrated(
        self, checkpoint: Checkpoint, quantizer: QuantizeOptions | None, converter: ConvertOptions
    ) -> bool:
        """Tell whether statistics are needed: for AWQ, or for the static int8 KV cache.

        Raises:
            UsageError: they are, but the checkpoint is quantized already.
        """
        is_static = converter.config.quant_policy == QUANT_POLICY_STATIC_INT8
        if checkpoint.is_quantized and is_static:
            raise UsageError(
                f"quant-policy 4 needs statistics of the floating-point original, "
                f"{checkpoint.path} is quantized already; use 8 or 0"
            )
        return is_static or (quantizer is not None and quantizer.method == "awq")

    def _stage(self, name: str, folder: Path, run: Callable[[], Path]) -> Path:
        """Run one stage and note what it took; ``folder`` is where its record lies."""
        before = read_record(folder, name)
        with Meter() as meter:
            result = run()
        record = read_record(folder, name)
        size_bytes = sum(path.stat().st_size for _, path in content_files(result))
        self._reports.append(
            StageReport(
                name=name,
                seconds_s=meter.seconds_s,
                peak_anon_bytes=meter.peak_anon_bytes,
                size_bytes=record.size_bytes if record else size_bytes,
                is_kept=record is not None and record == before,
                result=result,
            )
        )
        return result

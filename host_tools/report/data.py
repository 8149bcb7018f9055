"""What the report of a build holds: report.json is exactly this, report.html is drawn from it."""

from __future__ import annotations

from dataclasses import dataclass

from device_runtime.package_format.manifest import (
    PlannedMemory,
    Provenance,
    Quantization,
    ToolVersion,
)
from device_runtime.package_format.model_config import ModelConfig
from host_tools.layer_records import QuantizeRecord

REPORT_VERSION = 1
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"


@dataclass(frozen=True)
class ArchiveFacts:
    """The archive that a build wrote.

    Attributes:
        file: its name.
        size_bytes: its size.
        sha256: of it, in hex.
    """

    file: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """Files of a package that belong together ("4-bit codes").

    Attributes:
        name: in words.
        num_files: of them.
        size_bytes: of all of them.
    """

    name: str
    num_files: int
    size_bytes: int


@dataclass(frozen=True)
class PackageFacts:
    """What is in the package.

    Attributes:
        model: sizes, types.
        quantization: method, bits, group size.
        provenance: where it comes from.
        template: the chat template's name.
        quant_policy: KV format: 0 fp16, 4 static int8, 8 online int8.
        page_size: tokens of a KV page.
        session_len: most tokens of one conversation.
        max_batch_size: sequences decoded together.
        cache_max_entry_count: share of memory or number of pages.
        num_linear_weights: of the linears in the decoder layers.
        linear_bytes: that they take, scales included.
        parts: of the files, largest first.
        memory: the plan of each target board.
    """

    model: ModelConfig
    quantization: Quantization
    provenance: Provenance
    template: str
    quant_policy: int
    page_size: int
    session_len: int
    max_batch_size: int
    cache_max_entry_count: float
    num_linear_weights: int
    linear_bytes: int
    parts: tuple[Part, ...]
    memory: tuple[PlannedMemory, ...]


@dataclass(frozen=True)
class KvRange:
    """Extrema of keys and values over the calibration's tokens, all heads of one layer."""

    layer: int
    k_min: float
    k_max: float
    v_min: float
    v_max: float


@dataclass(frozen=True)
class Phase:
    """Part of a stage's time.

    Attributes:
        name: "search".
        seconds_s: that it took.
        is_beside: whether it ran while other phases did, and so adds nothing to the whole.
    """

    name: str
    seconds_s: float
    is_beside: bool


@dataclass(frozen=True)
class StageFigures:
    """What one stage took when it last had work to do.

    Attributes:
        name: the verb.
        seconds_s: wall time.
        peak_anon_bytes: highest anonymous memory of the process meanwhile.
        size_bytes: of its result.
        phases: where the time went, where the stage notes it.
    """

    name: str
    seconds_s: float
    peak_anon_bytes: int
    size_bytes: int
    phases: tuple[Phase, ...] = ()


@dataclass(frozen=True)
class PerplexityRow:
    """One target that was measured.

    Attributes:
        target: path or what was saved on.
        kind: what it is and how it ran.
        perplexity: e to the mean negative log-likelihood of a token.
        increase: against the first row; None in the first row.
        kl_divergence: of the first row's predictions from these, in nats, where it was measured.
        top1_agreement: share of tokens where both rank the same token first, likewise.
    """

    target: str
    kind: str
    perplexity: float
    increase: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class PerplexityTable:
    """Targets measured on the same windows, the first one being what the others are held against.

    Attributes:
        title: what was done, "evaluate" or "savings of the package".
        dataset: name of the text.
        num_samples: windows.
        seqlen: tokens of a window.
        rows: the targets.
    """

    title: str
    dataset: str
    num_samples: int
    seqlen: int
    rows: tuple[PerplexityRow, ...]


@dataclass(frozen=True)
class Setting:
    """One setting of a stage, its value as text."""

    stage: str
    name: str
    value: str


@dataclass(frozen=True)
class Report:
    """Everything; what no stage has noted is None or empty.

    Attributes:
        report_version: of this schema.
        name: of the package, or of the work folder.
        archive: what was packed.
        package: what is in it.
        quantize: errors, clipping and seconds of every layer.
        kv_ranges: of every layer.
        stages: what each took, in order.
        perplexities: what was measured.
        settings: of every stage.
        versions: of the programs.
    """

    report_version: int
    name: str
    archive: ArchiveFacts | None
    package: PackageFacts | None
    quantize: QuantizeRecord | None
    kv_ranges: tuple[KvRange, ...]
    stages: tuple[StageFigures, ...]
    perplexities: tuple[PerplexityTable, ...]
    settings: tuple[Setting, ...]
    versions: tuple[ToolVersion, ...]

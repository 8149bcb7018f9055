"""manifest.json: everything about a package that its weights cannot say."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from device_runtime.errors import PackageError
from device_runtime.package_format import names, strict_json
from device_runtime.package_format.durable import write_atomically
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.sampling_ranges import sampling_fault

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILES = 16_384
MAX_FILE_BYTES = 1 << 42
MAX_TEMPLATE_CHARACTERS = 256 * 1024

_SHA256 = re.compile(r"[0-9a-f]{64}")
_BOARD_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


class NewerFormatError(PackageError):
    """A package of a later turbojet: whole, but not for this one."""


@dataclass(frozen=True)
class FileEntry:
    """One file of the package: path relative to its root, size and lower-case hex SHA-256."""

    path: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Refuse what cannot be a file of a package.

        Raises:
            PackageError: the path leaves the package, the size or the hash is impossible.
        """
        names.check_relative_path(self.path)
        if self.path == names.MANIFEST:
            raise PackageError(f"{names.MANIFEST} lists itself, which no hash can describe")
        if not 0 <= self.size_bytes <= MAX_FILE_BYTES:
            raise PackageError(
                f"{self.path} has size_bytes {self.size_bytes}, expected 0 to {MAX_FILE_BYTES}"
            )
        if not _SHA256.fullmatch(self.sha256):
            raise PackageError(
                f"{self.path} has sha256 {self.sha256[:80]!a}, expected 64 hex digits"
            )


@dataclass(frozen=True)
class Quantization:
    """How the weights got their bits, and which KV formats the package is made for.

    Attributes:
        method: "none" for float weights, else the algorithm.
        w_bits: bits of a stored weight.
        group_size: inputs that share a scale; 0 for float weights.
        kv_scales: static int8 KV parameters in the package (section 4.2), or "none".
    """

    method: Literal["none", "rtn", "awq", "gptq", "awq+gptq"]
    w_bits: int
    group_size: int
    kv_scales: Literal["none", "asymmetric", "symmetric"] = "none"


@dataclass(frozen=True)
class Calibration:
    """The data that statistics and scales were found on."""

    dataset: str
    num_samples: int
    seqlen: int
    seed: int


@dataclass(frozen=True)
class ToolVersion:
    """A program or library that had a hand in the package."""

    name: str
    version: str


@dataclass(frozen=True)
class Provenance:
    """Where the package comes from. Holds no dates: same input, same bytes.

    Attributes:
        source: model id, folder name or file name.
        source_kind: how the source was read.
        revision: commit or tag of the hub, "" where there is none.
        source_sha256: fingerprint of the checkpoint's files, "" when unknown.
        calibration: None when the weights needed none.
        tools: versions, Turbojet's own first.
    """

    source: str
    source_kind: Literal["modelscope", "folder", "gguf", "synthetic"]
    revision: str = ""
    source_sha256: str = ""
    calibration: Calibration | None = None
    tools: tuple[ToolVersion, ...] = ()


@dataclass(frozen=True)
class TemplateChoice:
    """The chat template that the host chose for this package.

    Attributes:
        kind: "builtin" for one of our table, "jinja" for the model's own.
        name: the built-in's name, or the file that the jinja source was found in.
        source: jinja source; "" for a built-in.
    """

    kind: Literal["builtin", "jinja"]
    name: str
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse a choice that says too little or too much.

        Raises:
            PackageError: no name, a jinja template without source, or a built-in with one.
        """
        if not self.name:
            raise PackageError(f"the {self.kind} chat template has no name")
        if (self.kind == "jinja") != bool(self.source):
            raise PackageError(
                f"the {self.kind} chat template {self.name[:60]!r} has "
                f"{len(self.source)} characters of source"
            )
        if len(self.source) > MAX_TEMPLATE_CHARACTERS:
            raise PackageError(
                f"the chat template has {len(self.source)} characters, "
                f"expected at most {MAX_TEMPLATE_CHARACTERS}"
            )


@dataclass(frozen=True)
class TokenizerFacts:
    """Special token ids, as the host found them.

    Attributes:
        bos_id: None when the model has none.
        add_bos: whether a conversation starts with bos.
        eos_ids: end an answer and leave no trace in the history (section 6.4).
        stop_ids: end an answer too, and stay in the history, such as ``<|im_end|>``.
    """

    bos_id: int | None
    add_bos: bool
    eos_ids: tuple[int, ...]
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request gets that asks for nothing; the REPL's values of section 6.1."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.8
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            PackageError: a value is outside its range.
        """
        if fault := sampling_fault(**asdict(self)):
            raise PackageError(f"the package's sampling {fault}")


@dataclass(frozen=True)
class PlannedMemory:
    """The arithmetic behind config.ini for one target board.

    ``weight_bytes + workspace_bytes + num_pages * page_bytes <= usable_bytes``.

    Attributes:
        board: name of the board.
        usable_bytes: what a model may take there.
        weight_bytes: weights as they lie in memory.
        workspace_bytes: all else: activations, staging, kernels, CUDA context and Python.
        page_bytes: one KV page over all layers.
        num_pages: pages that fit.
        session_len: tokens of one conversation that the pages hold.
        quant_policy: KV format the pages are counted for.
    """

    board: str
    usable_bytes: int
    weight_bytes: int
    workspace_bytes: int
    page_bytes: int
    num_pages: int
    session_len: int
    quant_policy: int


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json; the file's keys are the fields, in order.

    ``files`` is empty in a workspace that has not been packed yet: its files may still change,
    config.ini by hand. Packing lists every file but the manifest itself, sorted by path.
    """

    format_version: int = field(default=FORMAT_VERSION, kw_only=True)
    name: str
    model: ModelConfig
    quantization: Quantization
    template: TemplateChoice
    tokenizer: TokenizerFacts
    provenance: Provenance
    sampling: SamplingDefaults = SamplingDefaults()
    target_boards: tuple[str, ...] = ()
    memory: tuple[PlannedMemory, ...] = ()
    files: tuple[FileEntry, ...] = ()

    def __post_init__(self) -> None:
        """Check what the reader of a package relies on.

        Raises:
            PackageError: a name, id, board or path is impossible or repeated.
        """
        _check_version(self.format_version)
        names.check_package_name(self.name)
        for board in self.target_boards:
            if not _BOARD_NAME.fullmatch(board):
                raise PackageError(f"{names.MANIFEST} has the target board {board[:60]!a}")
        _check_token_ids(self.tokenizer, self.model.vocab_size)
        if self.quantization.group_size != self.model.group_size:
            raise PackageError(
                f"{names.MANIFEST} has group_size {self.quantization.group_size} in quantization, "
                f"{self.model.group_size} in model"
            )
        _check_files(self.files)

    @property
    def is_sealed(self) -> bool:
        """Whether every file is listed with its size and hash."""
        return bool(self.files)

    @property
    def size_bytes(self) -> int:
        """Bytes of all listed files."""
        return sum(entry.size_bytes for entry in self.files)

    def to_json(self) -> bytes:
        """Return the file: UTF-8, ASCII only, one key or array entry a line."""
        return (json.dumps(strict_json.encode(self), indent=1) + "\n").encode("ascii")

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        """Read a manifest that nobody vouches for.

        Raises:
            PackageError: it is not one, is of a future version, or breaks a rule.
        """
        value = strict_json.parse_object(text, names.MANIFEST, MAX_MANIFEST_BYTES)
        version = value.get("format_version")
        if type(version) is not int:
            raise PackageError(f"{names.MANIFEST} has no whole number as format_version")
        _check_version(version)
        return strict_json.decode(cls, value, names.MANIFEST)


def read_manifest(root: Path) -> Manifest:
    """Read ``root/manifest.json``.

    Raises:
        PackageError: it cannot be read, or breaks a rule.
    """
    try:
        with open(root / names.MANIFEST, "rb") as file:
            return Manifest.from_json(file.read(MAX_MANIFEST_BYTES + 1))
    except OSError as error:
        raise PackageError(f"{root / names.MANIFEST} cannot be read: {error.strerror}") from error


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write ``root/manifest.json``, whole or not at all."""
    write_atomically(root / names.MANIFEST, manifest.to_json())


def _check_version(version: int) -> None:
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"package format version {version} is newer than {FORMAT_VERSION}, the newest that "
            "this turbojet reads; update turbojet"
        )
    if version < 1:
        raise PackageError(f"package format version {version} does not exist")


def _check_token_ids(tokenizer: TokenizerFacts, vocab_size: int) -> None:
    bos = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    for token_id in (*bos, *tokenizer.eos_ids, *tokenizer.stop_ids):
        if not 0 <= token_id < vocab_size:
            raise PackageError(
                f"{names.MANIFEST} has the special token {token_id}, expected 0 to {vocab_size - 1}"
            )
    if tokenizer.add_bos and tokenizer.bos_id is None:
        raise PackageError(f"{names.MANIFEST} has add_bos without a bos_id")


def _check_files(files: tuple[FileEntry, ...]) -> None:
    if len(files) > MAX_FILES:
        raise PackageError(f"{names.MANIFEST} lists {len(files)} files, at most {MAX_FILES}")
    paths = {entry.path for entry in files}
    if len(paths) != len(files):
        counts = Counter(entry.path for entry in files)
        repeated = next(path for path, count in counts.items() if count > 1)
        raise PackageError(f"{names.MANIFEST} lists {repeated!a} twice")
    for path in paths:
        for parent in Path(path).parents:
            if str(parent) in paths:
                raise PackageError(
                    f"{names.MANIFEST} lists {str(parent)!a} as a file and as a folder"
                )

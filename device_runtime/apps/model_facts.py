"""What there is to know about a package, for machines as JSON and for people as lines."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from device_runtime.apps.release import Release
from device_runtime.apps.safe_text import one_line
from device_runtime.kernels.cubins import read_record
from device_runtime.package_format.amounts import format_bytes
from device_runtime.package_format.kv_page import kv_page_bytes
from device_runtime.package_format.manifest import Manifest, PlannedMemory
from device_runtime.package_format.package import Package

_KV_FORMATS = {0: "fp16", 4: "int8, static scales", 8: "int8, online"}


@dataclass(frozen=True)
class Line:
    """One fact for a person."""

    label: str
    text: str


def to_text(lines: list[Line]) -> str:
    """Return lines with their labels in one column; an empty label goes on with the one before."""
    width = max(len(line.label) for line in lines)
    return "\n".join(f"{line.label:<{width}}  {one_line(line.text)}" for line in lines)


def package_facts(package: Package, release: Release | None) -> dict[str, object]:
    """Return the facts as JSON values, with the keys of manifest.json where it has them."""
    manifest = package.manifest
    facts: dict[str, object] = {"name": package.name, "path": str(package.root)}
    if release is not None:
        record = release.record()
        facts |= {
            "name": release.name,
            "release": release.release_id,
            "is_current": release.is_current,
            "is_previous": release.is_previous,
            "installed_at": record.installed_at,
            "source": record.source,
        }
    facts |= {
        "weight_bytes": package.weight_bytes,
        "model": asdict(package.model),
        "config": asdict(package.config),
        "kernels": _kernels(package),
    }
    if manifest is not None:
        facts |= {
            "format_version": manifest.format_version,
            "size_bytes": manifest.size_bytes,
            "num_files": len(manifest.files),
            "quantization": asdict(manifest.quantization),
            "template": {"kind": manifest.template.kind, "name": manifest.template.name},
            "tokenizer": asdict(manifest.tokenizer),
            "sampling": asdict(manifest.sampling),
            "provenance": asdict(manifest.provenance),
            "target_boards": list(manifest.target_boards),
            "memory": [asdict(plan) for plan in manifest.memory],
        }
    return facts


def package_lines(package: Package, release: Release | None) -> list[Line]:
    """Return the facts as lines."""
    lines = [Line("name", release.name if release else package.name)]
    if release is not None:
        record = release.record()
        state = "current" if release.is_current else "previous" if release.is_previous else "kept"
        lines.append(Line("release", f"{release.release_id}, {state}"))
        lines.append(Line("installed", f"{record.installed_at} from {record.source}"))
    lines.append(Line("path", str(package.root)))
    lines += _model_lines(package)
    lines += _config_lines(package)
    if package.manifest is None:
        lines.append(Line("manifest", "none: a plain LMDeploy workspace"))
    else:
        lines += _manifest_lines(package.manifest)
    lines.append(Line("kernels", _kernels_text(package)))
    return lines


def _kernels(package: Package) -> list[str]:
    """Return the builds of the CUDA kernels that a package carries ("sm_87 by CUDA 12.6")."""
    return list(dict.fromkeys(cubin.build for cubin in read_record(package.kernels_dir)))


def _kernels_text(package: Package) -> str:
    builds = _kernels(package)
    if not builds:
        return "none: it runs on the reference engine, or with TURBOJET_KERNELS"
    sizes = [
        (package.kernels_dir / cubin.file).stat().st_size
        for cubin in read_record(package.kernels_dir)
    ]
    return f"{', '.join(builds)} ({len(sizes)} files, {format_bytes(sum(sizes))})"


def _model_lines(package: Package) -> list[Line]:
    model = package.model
    weights: str = model.weight_type
    if model.group_size:
        weights += f", groups of {model.group_size}"
    if model.is_mixed:
        num_kept = len(model.fp16_linears)
        weights += f", {num_kept} {'matrices' if num_kept > 1 else 'matrix'} fp16"
    if model.head_type != "fp16":
        weights += f", head {model.head_type}"
    elif model.tie_word_embeddings:
        weights += ", head tied to the embeddings"
    extras = [
        text
        for text, is_so in (
            ("biases", model.has_attention_bias),
            ("q/k norms", model.has_qk_norm),
            (f"rope scaling {model.rope_scaling.kind}", model.rope_scaling.kind != "none"),
            (f"split for {model.tensor_para_size} ranks", model.tensor_para_size > 1),
        )
        if is_so
    ]
    shape = (
        f"{model.num_hidden_layers} layers of {model.hidden_size}, "
        f"{model.num_attention_heads} heads on {model.num_kv_heads} KV heads of {model.head_dim}, "
        f"vocabulary {model.vocab_size}"
    )
    return [
        Line("model", ", ".join([shape, *extras])),
        Line("weights", f"{format_bytes(package.weight_bytes)}: {weights}"),
    ]


def _config_lines(package: Package) -> list[Line]:
    config = package.config.resolved()
    policy = config.quant_policy
    cache = f"quant_policy {policy}, which this turbojet does not run"
    if policy in _KV_FORMATS:
        page_bytes = kv_page_bytes(package.model, config.cache_block_seq_len, policy)
        cache = f"{_KV_FORMATS[policy]}; {config.cache_block_seq_len} tokens a page"
        cache += f" of {format_bytes(page_bytes)}"
    return [
        Line("KV cache", f"{cache}; cache_max_entry_count {config.cache_max_entry_count:g}"),
        Line("session", f"{config.session_len} tokens, up to {config.max_batch_size} at a time"),
    ]


def _manifest_lines(manifest: Manifest) -> list[Line]:
    source = manifest.provenance
    origin = f"{source.source} ({source.source_kind})"
    if source.revision:
        origin += f", revision {source.revision}"
    quantization = manifest.quantization
    how = f"{quantization.method}, {quantization.w_bits} bits"
    if quantization.kv_scales != "none":
        how += f", {quantization.kv_scales} KV scales"
    if source.calibration is not None:
        text = source.calibration
        how += f"; calibrated on {text.num_samples} x {text.seqlen} tokens of {text.dataset}"
    size = "not packed yet"
    if manifest.is_sealed:
        size = f"{format_bytes(manifest.size_bytes)} in {len(manifest.files)} files"
    lines = [
        Line("package", f"{size}, format {manifest.format_version}"),
        Line("origin", origin),
        Line("quantized", how),
        Line("made with", ", ".join(f"{tool.name} {tool.version}" for tool in source.tools) or "?"),
        Line("template", f"{manifest.template.name} ({manifest.template.kind})"),
        Line("boards", ", ".join(manifest.target_boards) or "not planned"),
    ]
    return lines + [Line("planned", _planned(plan)) for plan in manifest.memory]


def _planned(plan: PlannedMemory) -> str:
    kv_bytes = plan.num_pages * plan.page_bytes
    return (
        f"{plan.board}: weights {format_bytes(plan.weight_bytes)} + workspace and process "
        f"{format_bytes(plan.workspace_bytes)} + KV {plan.num_pages} x "
        f"{format_bytes(plan.page_bytes)} = "
        f"{format_bytes(plan.weight_bytes + plan.workspace_bytes + kv_bytes)} of "
        f"{format_bytes(plan.usable_bytes)}; sessions of {plan.session_len} tokens"
    )

"""Converts a checkpoint, float or AWQ, into a TurboMind workspace that opens as a package."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format import durable, names
from device_runtime.package_format.manifest import write_manifest
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.package import open_package
from device_runtime.package_format.workspace import WorkspaceWriter
from device_runtime.templates.choose import PLAIN_TEXT
from host_tools.checkpoint import Checkpoint
from host_tools.checkpoint.families import QWEN1
from host_tools.lmdeploy.limits import check_model_name, check_runs
from host_tools.lmdeploy.tree import TOP_LEVEL, is_tree, remove_tree, write_tree
from host_tools.origin import read_origin
from host_tools.output_folder import behind_link, check_outside, replace_folder
from host_tools.package_facts import describe
from host_tools.package_options import LMDEPLOY, ConvertOptions
from host_tools.progress import Progress
from host_tools.stage import RECORD_DIR, Stage, exclusive
from host_tools.tokenizer_folder import SourceTokenizer
from host_tools.tokenizer_proof import prove_tokenizer
from host_tools.turbomind_tensors import global_tensors, layer_tensors

STAGE_VERSION = 4


def convert(
    checkpoint_dir: Path, output: Path, options: ConvertOptions, progress: Progress
) -> Path:
    """Write the workspace of a checkpoint; finished work is recognised and kept.

    Args:
        checkpoint_dir: a Hugging Face folder, float or AWQ.
        output: the workspace; one that is there is replaced whole when the new one is complete.
        options: name, ranks and values of config.ini.
        progress: hears of every layer.

    Returns:
        ``output``.

    Raises:
        UsageError: ``output`` holds something else or lies in the checkpoint, another process
            writes it, or the group size is not the checkpoint's, or its sizes do not split over the
            ranks, or the library of its tokenizer is not installed, or the name is none of
            LMDeploy's where the workspace is for it.
        PackageError: the checkpoint is damaged or cannot be laid out so, its tokenizer.model or
            qwen.tiktoken cannot be converted exactly, or LMDeploy cannot run the model it is for.
    """
    output = behind_link(output)
    check_outside(checkpoint_dir, output)
    stage = convert_stage(checkpoint_dir, output, options)
    if is_converted(stage):
        progress.note(f"convert: {output} is up to date")
        return output
    _check_replaceable(output)
    is_for_lmdeploy = options.engine == LMDEPLOY
    if is_for_lmdeploy:
        check_model_name(options.model_name)
    checkpoint = Checkpoint.open(checkpoint_dir)
    for note in checkpoint.notes:
        progress.note(f"convert: {note}")
    model = target_model(checkpoint, options)
    if is_for_lmdeploy:
        check_runs(model)
    part = output.with_name(f".{output.name}{durable.PART_SUFFIX}")
    source = SourceTokenizer.open(checkpoint_dir, model.vocab_size)
    manifest, config = describe(
        checkpoint, model, source, options, source_sha256=stage.input_hashes[0]
    )
    if manifest.template == PLAIN_TEXT and not options.template:
        suggested = checkpoint.family.template or "llama3"
        progress.note(
            f"convert: no chat template is known for {options.model_name}, text goes in as it is; "
            f"name one for a chat model, such as --template {suggested}"
        )
    if source.converted is not None:
        num_strings = prove_tokenizer(source.converted, progress)
        progress.note(
            f"convert: {source.converted.path.name} became {names.TOKENIZER_JSON}, equal to "
            f"{source.converted.kind} on {num_strings} strings"
        )
    with exclusive(part):
        shutil.rmtree(part / names.TRITON_MODELS, ignore_errors=True)
        remove_tree(part)
        writer = WorkspaceWriter(part, model)
        _write_tensors(checkpoint, writer, progress)
        for path in source.copy_to(part / names.TOKENIZER_DIR):
            durable.sync_file(path)
        writer.write_config(config)
        writer.finish()
        write_manifest(part, manifest)
        tree = write_tree(part, manifest, config, checkpoint_dir) if is_for_lmdeploy else []
        open_package(part)
        # config.ini may be edited by hand and kv-qparams changes the manifest: neither is watched.
        weights = (part / names.WEIGHTS_DIR).iterdir()
        tensors = [path for path in weights if path.name != names.CONFIG_INI]
        others = [path for path in tree if path.parent != part / names.TOKENIZER_DIR]
        stage.record([*tensors, part / names.TOKENIZER_DIR, *others], part)
        replace_folder(part, output)
    return output


def convert_stage(checkpoint_dir: Path, output: Path, options: ConvertOptions) -> Stage:
    """Return the record of converting this checkpoint so."""
    origin = read_origin(checkpoint_dir, is_quantized=False)
    return Stage(
        "convert",
        output,
        (checkpoint_dir,),
        {
            "model_name": options.model_name,
            "tp": options.tp,
            "group_size": options.group_size,
            "template": options.template,
            "head": options.head,
            "origin": repr(origin),
            **asdict(options.config),
            **({"for": LMDEPLOY} if options.engine == LMDEPLOY else {}),
        },
        STAGE_VERSION,
    )


def is_converted(stage: Stage) -> bool:
    """Tell whether the workspace is finished and opens."""
    if not stage.is_finished():
        return False
    if stage.settings.get("for") == LMDEPLOY and not is_tree(stage.folder):
        return False
    try:
        open_package(stage.folder)
    except PackageError:
        return False
    return True


def target_model(checkpoint: Checkpoint, options: ConvertOptions) -> ModelConfig:
    """Return the model as the workspace will hold it.

    bf16 checkpoints stay bf16, Qwen-1 becomes bf16 whatever its config says, everything else
    becomes fp16 or stays int4 (spec section 1.2).

    Raises:
        UsageError: the group size asked for is not the checkpoint's, or the sizes do not split over
            the ranks.
    """
    model = checkpoint.model
    if options.group_size not in (0, model.group_size):
        found = f"group size {model.group_size}" if model.group_size else "float weights"
        raise UsageError(
            f"group-size is {options.group_size}, {checkpoint.path} has {found}; "
            "leave the option out or quantize again"
        )
    stated = checkpoint.config.get("torch_dtype", checkpoint.config.get("dtype"))
    is_bf16 = stated == "bfloat16" or checkpoint.family.name == QWEN1
    if model.weight_type == "fp16" and is_bf16:
        model = replace(model, weight_type="bf16")
    if options.engine == LMDEPLOY:
        # It knows no tied heads: without the file it would run on whatever memory holds.
        model = replace(model, tie_word_embeddings=False)
    try:
        return replace(model, tensor_para_size=options.tp, head_type=options.head)
    except PackageError as error:
        raise UsageError(
            f"tp {options.tp} does not fit {checkpoint.path}: {error}; choose fewer ranks"
        ) from error


def _write_tensors(checkpoint: Checkpoint, writer: WorkspaceWriter, progress: Progress) -> None:
    model = writer.model
    with progress.task("convert", total=model.num_hidden_layers + 1, unit="parts") as task:
        for name, array in global_tensors(checkpoint, model):
            writer.write(name, array)
        task.advance()
        for layer in range(model.num_hidden_layers):
            for name, array in layer_tensors(checkpoint.layer(layer), model, layer):
                writer.write(name, array)
            task.advance()


def _check_replaceable(output: Path) -> None:
    """Refuse to replace a folder that no ``convert`` wrote.

    Raises:
        UsageError: there is a file, or a folder with something else in it.
    """
    if not os.path.lexists(output):
        return
    known = {names.MANIFEST, names.TRITON_MODELS, names.KERNELS_DIR, RECORD_DIR, *TOP_LEVEL}
    found = {path.name for path in output.iterdir()} if output.is_dir() else {""}
    # LMDeploy's own tree has the same names but the first and the record's.
    is_ours = not found or (found <= known and found & {names.MANIFEST, RECORD_DIR})
    if not is_ours:
        raise UsageError(
            f"{output} exists and is not a workspace of ours, name another output or remove it"
        )

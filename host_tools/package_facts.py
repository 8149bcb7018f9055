"""What a workspace says about its model: manifest and config.ini."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace
from typing import cast

from device_runtime.errors import PackageError
from device_runtime.package_format import names
from device_runtime.package_format.config_ini import TurboMindConfig
from device_runtime.package_format.manifest import (
    Manifest,
    Quantization,
    SamplingDefaults,
    TemplateChoice,
    TokenizerFacts,
)
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.templates.choose import (
    builtin_names,
    choose_template,
    find_builtin,
    open_template,
)
from host_tools.checkpoint import Checkpoint
from host_tools.checkpoint.config_reader import read_architecture
from host_tools.checkpoint_names import CONFIG_JSON
from host_tools.origin import Method, Origin, read_origin, tool_versions
from host_tools.package_options import LMDEPLOY, ConfigValues, ConvertOptions
from host_tools.plan import check_session
from host_tools.tokenizer_folder import SourceTokenizer

BITS_OF_WEIGHT_TYPE = {"int4": 4, "fp16": 16, "bf16": 16}
RECIPE = "recipe.yaml"
MAX_RECIPE_CHARACTERS = 1 << 16
EXTRA_SESSION_LEN = 8
"""What v0.2.3's convert adds to the template's session_len (spec section 3)."""


def describe(
    checkpoint: Checkpoint,
    model: ModelConfig,
    source: SourceTokenizer,
    options: ConvertOptions,
    *,
    source_sha256: str,
) -> tuple[Manifest, TurboMindConfig]:
    """Return manifest and config.ini of a workspace.

    Args:
        checkpoint: where the weights come from.
        model: as the workspace holds it.
        source: the checkpoint's tokenizer.
        options: name, template and values of config.ini.
        source_sha256: of the checkpoint, where it does not know that of what it was made from.

    Raises:
        UsageError: there is no template of the name asked for, or the session asked for is longer
            than a sliding window.
        PackageError: the checkpoint names no token that ends an answer, or its template is broken.
    """
    origin = read_origin(
        checkpoint.path,
        is_quantized=checkpoint.is_quantized,
        method=quantization_method(checkpoint),
    )
    template = choose(source, options, origin)
    tokens = tokenizer_facts(source, template)
    manifest = Manifest(
        name=options.model_name,
        model=model,
        quantization=Quantization(
            method=origin.method,
            w_bits=BITS_OF_WEIGHT_TYPE[model.weight_type],
            group_size=model.group_size,
        ),
        template=template,
        tokenizer=tokens,
        provenance=replace(
            origin.provenance,
            source_sha256=origin.provenance.source_sha256 or source_sha256,
            tools=tool_versions(),
        ),
        sampling=source.sampling_defaults(_base_sampling(template)),
    )
    check_session(model, options.config)
    config = TurboMindConfig.from_model(
        model,
        model_name=options.model_name,
        start_id=tokens.bos_id or 0,
        end_id=source.eos_ids[0],
        session_len=default_session_len(options.model_name, model),
    )
    if options.engine == LMDEPLOY:
        config = replace(config, model_arch=read_architecture(checkpoint.config))
    return manifest, apply_values(config, options.config)


def quantization_method(checkpoint: Checkpoint) -> Method:
    """Return how somebody else's weights were quantized, as far as their folder tells.

    A compressed-tensors checkpoint names its method in llm-compressor's recipe only.
    """
    name = checkpoint.packed.name if checkpoint.packed is not None else "none"
    if name in ("awq", "gptq", "none"):
        return cast(Method, name)
    recipe, path = "", checkpoint.path / RECIPE
    if path.is_file():  # a pipe would be waited for
        with suppress(OSError), path.open(encoding="utf-8", errors="replace") as stream:
            recipe = stream.read(MAX_RECIPE_CHARACTERS)
    found = [method for method in ("awq", "gptq") if f"{method.upper()}Modifier" in recipe]
    return cast(Method, "+".join(found) or "rtn")


def choose(source: SourceTokenizer, options: ConvertOptions, origin: Origin) -> TemplateChoice:
    """Return the chat template: the one asked for, the model's own, or its family's.

    The family is told by the package's name, or by the name of what it was made from.

    Raises:
        UsageError: there is no template of the name asked for.
        PackageError: the model's own template is broken.
    """
    name = options.model_name
    if find_builtin(name) is None:
        name = origin.provenance.source.rpartition("/")[2]
    try:
        return choose_template(source.folder, name, requested=options.template or None)
    except PackageError as error:
        raise PackageError(f"{error} (in {source.folder})") from error


def tokenizer_facts(source: SourceTokenizer, choice: TemplateChoice) -> TokenizerFacts:
    """Return the special ids; the template's stop words stay in the history, eos does not.

    Raises:
        PackageError: no token ends an answer.
    """
    if not source.eos_ids:
        raise PackageError(
            f"{source.folder} names no eos token in {names.TOKENIZER_CONFIG}, "
            f"{names.GENERATION_CONFIG} or {CONFIG_JSON}, add eos_token_id to {CONFIG_JSON}"
        )
    template = open_template(choice, source.folder, special_tokens=())
    ids = (source.tokenizer.token_to_id(word) for word in template.stop_words)
    stop_ids = tuple(token_id for token_id in ids if token_id is not None)
    return TokenizerFacts(
        bos_id=source.bos_id,
        add_bos=source.adds_bos,
        eos_ids=tuple(token_id for token_id in source.eos_ids if token_id not in stop_ids),
        stop_ids=stop_ids,
    )


def default_session_len(model_name: str, model: ModelConfig) -> int:
    """Return v0.2.3's session_len: of the template that LMDeploy has under this name, else ours.

    A model without one gets max_position_embeddings (spec section 1.4); both get 8 more, but never
    more than a sliding window.
    """
    built = find_builtin(model_name) if model_name.lower() in builtin_names() else None
    session_len = built.session_len if built is not None else model.max_position_embeddings
    session_len += EXTRA_SESSION_LEN
    return min(session_len, model.sliding_window or session_len)


def apply_values(config: TurboMindConfig, values: ConfigValues) -> TurboMindConfig:
    """Return the config with every value that was given."""
    given = {key: value for key, value in asdict(values).items() if value is not None}
    return replace(config, **given)


def _base_sampling(choice: TemplateChoice) -> SamplingDefaults:
    """Return what LMDeploy's REPL uses with a built-in template (spec section 6.1)."""
    built = find_builtin(choice.name) if choice.kind == "builtin" else None
    return built.sampling if built is not None else SamplingDefaults()

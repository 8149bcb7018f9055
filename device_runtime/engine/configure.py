"""From a package's config.ini and a user's options to what an engine needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from device_runtime.backends.kv_format import kv_format
from device_runtime.backends.memory_plan import CacheRequest
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.options import DEFAULT_TOKENS_PER_STEP, EngineOptions
from device_runtime.engine.tokenizer import Tokenizer
from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format.manifest import SamplingDefaults, TemplateChoice
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.package import Package
from device_runtime.templates.choose import choose_template, find_builtin, open_template
from device_runtime.templates.message import ChatTemplate


@dataclass(frozen=True)
class StopRules:
    """What ends an answer when the request does not ask for it.

    Attributes:
        token_ids: eos, the package's stop tokens and the template's stop words that are tokens.
        strings: the template's stop words that are not.
    """

    token_ids: frozenset[int]
    strings: tuple[str, ...]


def cache_request(package: Package, options: EngineOptions) -> CacheRequest:
    """Return what config.ini asks for, the user's options first.

    Raises:
        PackageError: quant_policy or cache_block_seq_len has a value that means nothing, or
            config.ini's session_len is longer than a sliding window.
        UsageError: the session asked for is.
    """
    config = package.config.resolved()
    policy = config.quant_policy if options.quant_policy is None else options.quant_policy
    return CacheRequest(
        cache_max_entry_count=options.cache_max_entry_count or config.cache_max_entry_count,
        page_size=config.cache_block_seq_len,
        session_len=_session_len(package.model, options.session_len, config.session_len),
        max_batch_size=options.max_batch_size or config.max_batch_size,
        max_tokens_per_step=options.max_tokens_per_step
        or package.config.num_tokens_per_iter
        or DEFAULT_TOKENS_PER_STEP,
        kv_format=kv_format(policy),
    )


def _session_len(model: ModelConfig, asked: int | None, configured: int) -> int:
    session_len, limit = asked or configured, model.sliding_window
    if limit and session_len > limit:
        error = UsageError if asked else PackageError
        raise error(
            f"session_len is {session_len}, the layers of this model look back {limit} tokens; "
            "turbojet runs it up to that"
        )
    return session_len


def package_template(package: Package, tokenizer: Tokenizer) -> ChatTemplate:
    """Return the chat template of a package, or the one that fits a plain workspace.

    Raises:
        PackageError: the template does not exist or is broken.
    """
    folder: Path = package.tokenizer_dir
    choice: TemplateChoice
    if package.manifest is not None:
        choice = package.manifest.template
    else:
        built = find_builtin(package.config.model_name)
        if built is None or built.name == "base":
            choice = choose_template(folder, package.config.model_name)
        else:
            choice = TemplateChoice("builtin", built.name)
    return open_template(choice, folder, special_tokens=tokenizer.special_tokens)


def stop_rules(package: Package, tokenizer: Tokenizer, template: ChatTemplate) -> StopRules:
    """Return what ends answers of this package (spec sections 6.3 and 6.4)."""
    ids = {*tokenizer.facts.eos_ids, *tokenizer.facts.stop_ids}
    strings = []
    for word in template.stop_words:
        token_id = tokenizer.token_id(word)
        if token_id is None:
            strings.append(word)
        else:
            ids.add(token_id)
    return StopRules(frozenset(ids), tuple(strings))


def package_sampling(package: Package) -> SamplingParams:
    """Return the package's sampling defaults, or those of a plain workspace's template; seed 0."""
    built = find_builtin(package.config.model_name)
    found = SamplingDefaults() if built is None else built.sampling
    if package.manifest is not None:
        found = package.manifest.sampling
    return SamplingParams(
        temperature=found.temperature,
        top_k=found.top_k,
        top_p=found.top_p,
        min_p=found.min_p,
        repetition_penalty=found.repetition_penalty,
    )

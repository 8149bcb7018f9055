"""Which template a package uses: decided on the host, recorded, opened on the device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from device_runtime.errors import PackageError, RequestError, UsageError
from device_runtime.package_format import names
from device_runtime.package_format.manifest import TemplateChoice
from device_runtime.templates.builtin import BUILTIN_TEMPLATES, BuiltinTemplate
from device_runtime.templates.jinja_template import JinjaTemplate
from device_runtime.templates.message import ChatTemplate, Message
from device_runtime.tokenization.settings_files import read_settings, read_text

PLAIN_TEXT = TemplateChoice("builtin", "base")
"""For models of which no template is known."""

CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""Where checkpoints of transformers 4.52 and later keep it, beside tokenizer_config.json."""

_PATTERNS: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    # Words that all occur, words of which one occurs (or none given), built-in; first match wins.
    (("internlm3",), ("instruct", "chat"), "internlm2-chat"),
    (("internlm2",), ("chat", "math"), "internlm2-chat"),
    (("internlm", "chat"), ("20b", "8k"), "internlm-chat-20b"),
    (("internlm", "chat"), (), "internlm-chat-7b"),
    (("llama-2", "chat"), (), "llama2"),
    (("llama2", "chat"), (), "llama2"),
    (("qwen3",), (), "qwen3"),
    (("qwen2.5",), (), "qwen2d5"),
    (("qwen2_5",), (), "qwen2d5"),
    (("qwen",), ("chat", "instruct"), "qwen-7b"),
    (("baichuan2", "chat"), (), "baichuan2-7b"),
    (("llama-3",), ("instruct", "chat"), "llama3"),
    (("llama3",), ("instruct", "chat"), "llama3"),
    (("mistral",), ("instruct",), "mistral-instruct"),
    (("smollm3",), (), "smollm2"),
    (("smollm",), ("instruct",), "smollm2"),
)


def builtin_names() -> tuple[str, ...]:
    """Return every name and alias, sorted, for help texts."""
    return tuple(
        sorted(name for built in BUILTIN_TEMPLATES for name in (built.name, *built.aliases))
    )


def find_builtin(model_name: str) -> BuiltinTemplate | None:
    """Return the built-in of a model: LMDeploy's name for it, else its family's.

    Args:
        model_name: of config.ini, or the last part of a model id; case does not matter.
    """
    name = model_name.lower()
    by_name = {
        alias: built for built in BUILTIN_TEMPLATES for alias in (built.name, *built.aliases)
    }
    if name in by_name:
        return by_name[name]
    for needed, one_of, target in _PATTERNS:
        if all(word in name for word in needed) and (
            not one_of or any(word in name for word in one_of)
        ):
            return by_name[target]
    return None


def choose_template(
    tokenizer_dir: Path, model_name: str, *, requested: str | None = None
) -> TemplateChoice:
    """Decide which template a package of this model uses, and try it.

    The model's own goes first, then its family's built-in, then plain text (``base``).

    Args:
        tokenizer_dir: folder with tokenizer_config.json and perhaps chat_template.jinja.
        model_name: for the family.
        requested: a built-in's name that the user insists on.

    Raises:
        UsageError: there is no built-in of the requested name.
        PackageError: the model's own template is broken, hostile or refuses a plain question.
    """
    if requested is not None:
        built = find_builtin(requested)
        if built is None:
            raise UsageError(
                f"there is no chat template {requested!r}, expected one of "
                f"{', '.join(builtin_names())}"
            )
        return TemplateChoice("builtin", built.name)
    own = _own_template(tokenizer_dir)
    if own is None:
        built = find_builtin(model_name)
        return TemplateChoice("builtin", built.name) if built else PLAIN_TEXT
    template = open_template(own, tokenizer_dir, special_tokens=())
    try:
        template.render([Message("user", "hello")])
    except RequestError as error:
        raise PackageError(
            f"{own.name} takes no plain question ({error}), choose a built-in chat template"
        ) from error
    return own


def open_template(
    choice: TemplateChoice, tokenizer_dir: Path, *, special_tokens: Sequence[str]
) -> ChatTemplate:
    """Return the template that a manifest names.

    Args:
        choice: from the manifest, or `choose_template`.
        tokenizer_dir: for the variables of a jinja template, such as ``bos_token``.
        special_tokens: spellings that must not come from a message.

    Raises:
        PackageError: there is no such built-in, or tokenizer_config.json or
            special_tokens_map.json cannot be read.
    """
    if choice.kind == "jinja":
        return JinjaTemplate(
            name=choice.name,
            source=choice.source,
            variables={
                **_token_variables(read_settings(tokenizer_dir / names.SPECIAL_TOKENS_MAP)),
                **_token_variables(read_settings(tokenizer_dir / names.TOKENIZER_CONFIG)),
            },
            special_tokens=tuple(special_tokens),
        )
    for built in BUILTIN_TEMPLATES:
        if choice.name in (built.name, *built.aliases):
            return built
    raise PackageError(
        f"the package asks for the built-in chat template {choice.name[:60]!r}, which this "
        "turbojet does not have; update turbojet or convert again"
    )


def _own_template(tokenizer_dir: Path) -> TemplateChoice | None:
    path = tokenizer_dir / CHAT_TEMPLATE_FILE
    if path.is_file():
        return TemplateChoice("jinja", CHAT_TEMPLATE_FILE, read_text(path))
    source = read_settings(tokenizer_dir / names.TOKENIZER_CONFIG).get("chat_template")
    if isinstance(source, list):
        # Several named ones, for tools and the like; "default" is the one for a chat.
        entries = [entry for entry in source if isinstance(entry, dict)]
        found = [entry.get("template") for entry in entries if entry.get("name") == "default"]
        source = found[-1] if found else None
    if isinstance(source, str) and source:
        return TemplateChoice("jinja", names.TOKENIZER_CONFIG, source)
    return None


def _token_variables(config: dict[str, object]) -> dict[str, str]:
    """Return bos_token and its like; each is a string or an object with a ``content``."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = value.get("content")
        if key.endswith("_token") and isinstance(value, str):
            found[key] = value
    return found

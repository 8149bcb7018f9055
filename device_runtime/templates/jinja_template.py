"""A model's own chat template, in jinja2, as tokenizer_config.json carries it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from jinja2 import Template
from jinja2.exceptions import TemplateError

from device_runtime.errors import PackageError, RequestError
from device_runtime.templates.message import Message, Segment, merged
from device_runtime.templates.sandbox import GuardedEnvironment, TemplateLimitError, TemplateRaised

_FIRST_PLACEHOLDER = 0x100000
"""Plane 16 is private use: no tokenizer and no template knows its characters."""
_LAST_PLACEHOLDER = 0x10FFFD


@dataclass(frozen=True)
class JinjaTemplate:
    """Renders messages in the sandbox and knows afterwards which text was whose.

    Where a message spells a special token, a private-use character stands for it during the
    rendering, so the template may trim, test and cut the text as it likes; afterwards the spelling
    comes back as text that is not markup.

    Attributes:
        name: file the template comes from.
        source: jinja2.
        variables: what the template may ask for beside the messages, such as ``bos_token``.
        special_tokens: spellings of the tokenizer's special tokens.
    """

    name: str
    source: str
    variables: Mapping[str, str]
    special_tokens: tuple[str, ...]

    @cached_property
    def _compiled(self) -> tuple[GuardedEnvironment, Template]:
        environment = GuardedEnvironment()
        return environment, environment.compiled(self.source)

    @property
    def writes_bos(self) -> bool:
        """True: the template says where bos goes."""
        return True

    @property
    def stop_words(self) -> tuple[str, ...]:
        """None beside the tokenizer's: a jinja template does not tell."""
        return ()

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[Segment, ...]:
        """Return the prompt of a conversation.

        Raises:
            RequestError: the template refuses the messages.
            PackageError: the template is broken, hostile or does too much.
        """
        contents = [message.content for message in messages]
        spellings = _spelled(contents, self.special_tokens)
        placeholders = _placeholders(spellings, [*contents, self.source])
        entries = [
            {"role": message.role, "content": _hide(message.content, placeholders)}
            for message in messages
        ]
        text = self._run(
            {
                **self.variables,
                "messages": entries,
                "add_generation_prompt": add_generation_prompt,
                "tools": None,
                "documents": None,
            }
        )
        return _segments(text, placeholders)

    def _run(self, variables: dict[str, object]) -> str:
        try:
            environment, template = self._compiled
            return environment.run(template, variables)
        except TemplateRaised as error:
            raise RequestError(f"the model's chat template refuses: {error}") from error
        except TemplateLimitError as error:
            raise PackageError(
                f"the chat template of {self.name} does too much: {error}"
            ) from error
        except TemplateError as error:
            reason = " ".join(str(error).split())[:300]
            raise PackageError(
                f"the chat template of {self.name} is not usable: {reason}"
            ) from error
        except Exception as error:  # any Python error that the template's code runs into
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise PackageError(f"the chat template of {self.name} fails with {reason}") from error


def _spelled(contents: Sequence[str], special_tokens: Sequence[str]) -> list[str]:
    """Return the special tokens that the contents spell, longest first."""
    found = {token for token in special_tokens if token and any(token in text for text in contents)}
    return sorted(found, key=lambda token: (-len(token), token))


def _placeholders(spellings: Sequence[str], texts: Sequence[str]) -> dict[str, str]:
    """Return an unused private character for each spelling."""
    used = {character for text in texts for character in text if ord(character) >= 0x100000}
    free = (
        chr(code)
        for code in range(_FIRST_PLACEHOLDER, _LAST_PLACEHOLDER + 1)
        if chr(code) not in used
    )
    return dict(zip(spellings, free, strict=False))


def _hide(text: str, placeholders: Mapping[str, str]) -> str:
    if not placeholders:
        return text
    pattern = "|".join(re.escape(spelling) for spelling in placeholders)
    return re.sub(pattern, lambda match: placeholders[match.group()], text)


def _segments(text: str, placeholders: Mapping[str, str]) -> tuple[Segment, ...]:
    if not placeholders:
        return merged((Segment(text, True),))
    spelling_of = {placeholder: spelling for spelling, placeholder in placeholders.items()}
    parts = re.split("([" + "".join(spelling_of) + "])", text)
    return merged(Segment(spelling_of.get(part, part), part not in spelling_of) for part in parts)

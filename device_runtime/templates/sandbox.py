"""Running a chat template that nobody vouches for: it cannot escape, hang or eat the memory.

jinja2's sandbox keeps a template from Python's internals. What it leaves open are operations that
take no time to write and forever to do (`'a' * 10**9`, nested loops, doubling strings or lists).
Here every operation that makes a string or a container pays for it from a budget, and a clock
is looked at on every line.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_SECONDS = 5.0
MAX_CHARACTERS = 4_000_000
"""Of one string."""
MAX_SPENT = 64_000_000
"""Characters and container entries made in one rendering, all together."""
MAX_ENTRIES = 200_000
"""Of one container and those inside it, shared parts counted as often as they appear."""
MAX_INTEGER_BITS = 128

_STRING_METHODS = frozenset(
    (
        *("capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit"),
        *("islower", "isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "partition"),
        *("removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit"),
        *("rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"),
    )
)
_FILTERS = frozenset(
    (
        *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int"),
        *("items", "last", "length", "list", "lower", "map", "max", "min", "reject"),
        *("rejectattr", "reverse", "select", "selectattr", "sort", "title", "trim", "unique"),
        "upper",
    )
)
_STRFTIME = re.compile(r"(?:[^%]|%-?[A-Za-z%]){0,200}")


_CONTAINERS = (list, tuple, dict, set, frozenset)


class TemplateLimitError(Exception):
    """A template did more than any chat needs."""


class TemplateRaised(Exception):
    """The template itself refuses the messages, through ``raise_exception``."""


class _GuardedCode(CodeGenerator):
    """Writes every string and container expression as a call that pays."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_values((")
        for value in node.nodes:
            self.visit(value, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._paid(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._paid(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._paid(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._paid(super().visit_Getitem, node, frame, "pay_flat")
        else:
            super().visit_Getitem(node, frame)

    def _paid(
        self, write: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame, how: str = "pay"
    ) -> None:
        self.write(f"environment.{how}(")
        write(node, frame)
        self.write(")")


class _GenerationTag(Extension):
    """``{% generation %}`` marks answers for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """An environment for one rendering at a time, set up as transformers sets up its own."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    code_generator_class = _GuardedCode

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _GenerationTag],
            finalize=self._finalize,
            cache_size=0,
        )
        kept = {name: function for name, function in self.filters.items() if name in _FILTERS}
        self.filters = {name: self._paying(function) for name, function in kept.items()}
        self.filters["tojson"] = self._to_json
        self.filters["replace"] = self._replace
        self.filters["indent"] = self._indent
        self.filters["join"] = self._join
        self.filters["safe"] = self.filters["string"] = self._to_text
        self.globals = {
            "range": self.globals["range"],
            "dict": _make_dict,
            "namespace": Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self._spent = 0

    def compiled(self, source: str) -> Template:
        """Return a template of this environment.

        Raises:
            TemplateLimitError: compiling it, constants folded, does too much.
            TemplateError: it is no template.
            Exception: whatever wrong constants raise.
        """
        self._spent = 0
        with _deadline(MAX_SECONDS):
            return self.from_string(source)

    def run(self, template: Template, variables: dict[str, Any]) -> str:
        """Render a template of this environment within the limits.

        Raises:
            TemplateLimitError: it does too much.
            TemplateRaised: it refuses the messages.
            TemplateError: it touches what it must not.
            Exception: whatever wrong code raises.
        """
        self._spent = 0
        with _deadline(MAX_SECONDS):
            return template.render(variables)

    def pay(self, value: Any) -> Any:
        """Return ``value`` once its size is taken off the budget.

        Raises:
            TemplateLimitError: it is too large, or the budget is used up.
        """
        if isinstance(value, str):
            self._spend(len(value))
        elif isinstance(value, _CONTAINERS):
            self._spend(_measure(value)[0])
        return value

    def pay_flat(self, value: Any) -> Any:
        """Do the same for a value that holds nothing deeper than its parts did."""
        if isinstance(value, (str, *_CONTAINERS)):
            self._spend(len(value))
        return value

    def concat(self, parts: Iterable[str]) -> str:
        """Join pieces of output, stopping at the limit and not after it."""
        total = 0
        kept = []
        for part in parts:
            total += len(part)
            if total > MAX_CHARACTERS:
                raise TemplateLimitError(f"it writes more than {MAX_CHARACTERS} characters")
            kept.append(part)
        self._spend(total)
        return "".join(kept)

    def join_values(self, values: Iterable[Any]) -> str:
        """Return ``a ~ b ~ c``."""
        return self.concat(self._to_text(value) for value in values)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Run an operator whose result cannot be too large."""
        if operator in ("%", "**") and not _are_numbers(left, right):
            raise SecurityError(f"operator {operator} on {type(left).__name__} is not allowed")
        if operator == "**" and (abs(left) > 1 << 16 or abs(right) > 64):
            raise TemplateLimitError(f"it raises {left} to the power {right}")
        if operator == "*":
            sizes = [len(v) if isinstance(v, (str, list, tuple)) else 0 for v in (left, right)]
            times = left if isinstance(left, int) else right
            if any(sizes) and max(sizes) * times > MAX_CHARACTERS:
                raise TemplateLimitError(f"it repeats {max(sizes)} entries {times} times")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_INTEGER_BITS:
            raise TemplateLimitError(f"it computes a number of {result.bit_length()} bits")
        return self.pay_flat(result)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Let strings have the methods that chat templates use, and no others."""
        if isinstance(obj, str) and attr not in _STRING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Leave ``str.format`` to `is_safe_attribute`, which refuses it."""
        return

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template may call, with the costly string methods replaced."""
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            name = function.__name__
            if name == "replace":
                return self._replace(owner, *args, **kwargs)
            if name == "join":
                return self._join(args[0] if args else (), owner)
        return self.pay(super().call(context, function, *args, **kwargs))

    def _spend(self, amount: int) -> None:
        if amount > MAX_CHARACTERS:
            raise TemplateLimitError(f"it makes a value of {amount} characters or entries")
        self._spent += amount
        if self._spent > MAX_SPENT:
            raise TemplateLimitError(f"it makes more than {MAX_SPENT} characters and entries")

    def _to_text(self, value: Any) -> str:
        if isinstance(value, Namespace):
            raise SecurityError("a namespace cannot be written")
        if isinstance(value, _CONTAINERS):
            self._spend(sum(_measure(value)))
        return str(value)

    def _finalize(self, value: Any) -> Any:
        return value if isinstance(value, (str, Undefined)) else self._to_text(value)

    def _paying(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def paid(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(argument, Namespace) for argument in args):
                raise SecurityError("a namespace cannot be filtered")
            return self.pay(function(*args, **kwargs))

        if hasattr(function, "jinja_pass_arg"):  # wants the context or the environment first
            paid.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return paid

    def _to_json(self, value: Any, indent: int | None = None, **options: Any) -> str:
        """Dump as transformers does: no HTML escapes, letters stay letters."""
        self._spend(sum(_measure(value)))
        if indent is not None and not 0 <= indent <= 16:
            raise TemplateLimitError(f"it indents by {indent}")
        options.pop("ensure_ascii", None)
        text = json.dumps(value, ensure_ascii=False, indent=indent, **options)
        self._spend(len(text))
        return text

    def _replace(self, value: Any, old: Any, new: Any, count: int = -1) -> str:
        text, old, new = self._to_text(value), self._to_text(old), self._to_text(new)
        found = text.count(old)
        if 0 <= count < found:
            found = count
        self._spend(max(0, len(text) + found * (len(new) - len(old))))
        return text.replace(old, new, found)

    def _indent(self, value: Any, width: int | str = 4, first: bool = False) -> str:
        text = self._to_text(value)
        margin = width if isinstance(width, str) else " " * min(int(width), 1000)
        self._spend(len(text) + len(margin) * (text.count("\n") + 1))
        lines = text.splitlines()
        rest = ["".join((margin, line)) if line else line for line in lines[1:]]
        return (margin if first else "") + "\n".join([*lines[:1], *rest])

    def _join(self, values: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
        separator = self._to_text(d)

        def parts() -> Iterator[str]:
            for index, value in enumerate(values):
                if index:
                    yield separator
                yield self._to_text(value if attribute is None else self.getitem(value, attribute))

        return self.concat(parts())


def _measure(value: Any) -> tuple[int, int]:
    """Return the entries and the characters in a container, shared parts counted each time."""
    entries = characters = 0
    stack = [value]
    while stack:
        item = stack.pop()
        entries += 1
        if isinstance(item, str):
            characters += len(item)
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, _CONTAINERS):
            stack.extend(item)
        elif isinstance(item, Namespace):
            raise SecurityError("a namespace cannot be put into a container")
        if entries + len(stack) > MAX_ENTRIES:
            raise TemplateLimitError(f"it makes a container of more than {MAX_ENTRIES} entries")
    return entries, characters


def _are_numbers(left: Any, right: Any) -> bool:
    return isinstance(left, (int, float)) and isinstance(right, (int, float))


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: Any) -> None:
    raise TemplateRaised(str(message)[:500])


def _strftime_now(pattern: str) -> str:
    if not _STRFTIME.fullmatch(pattern):
        raise TemplateError("strftime_now got a pattern with a width")
    return datetime.now().strftime(pattern)


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Stop the code inside after so many seconds, wherever its template is.

    A trace function sees every line of the compiled template and every call below it, in any
    thread and without signals; a template cannot catch what it raises.
    """
    end = time.monotonic() + seconds

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TemplateLimitError(f"it runs for more than {seconds:g} seconds")
        return look if frame.f_code.co_filename.startswith("<template") else None

    before = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)

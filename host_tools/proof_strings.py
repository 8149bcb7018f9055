"""Strings on which two tokenizers are compared: the same ones every time."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice

from host_tools.datasets import builtin_text

NUM_STRINGS = 21_000
_SEED = 20_240_131  # any; the strings must be the same in every run

_CODE = (
    "def f(x: int = 0) -> list[int]:\n    return [i ** 2 for i in range(x) if i % 3 != 0]\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[n - i - 1];\n}\r\n",
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;\n",
    '{"key": [1, 2.5e-3, null, true], "next": {"text": "\\u4e2d\\n"}}',
    "<div class='a b'>\n  <p>&nbsp;&lt;b&gt;</p>\n</div>\n",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", 0x7FFF\'FFFF); }\n',
    "$ grep -rn 'TODO' ./src | awk -F: '{print $1}' | sort -u\n",
    "\\begin{equation} e^{i\\pi} + 1 = 0 \\end{equation}\n",
    "- [x] **bold** _it_ `code` [link](https://example.org/?q=a%20b#c)\n\n| a | b |\n|---|---|\n",
)
_CHINESE = (
    "今天天气很好，我们去公园散步吧。",
    "人工智能（AI）正在改变世界：2024年的10大趋势！",
    "臺灣與香港使用繁體字；「引號」、『書名』——省略號……",
    "日本語のテキスト、カタカナとひらがな。한국어 문장도 있습니다.",
    "他说：“你好！”她回答：‘再见？’１２３ＡＢＣ",
)
_WORDS = (
    *("I'll", "don't", "we've", "THEY'RE", "it'S", "'tis", "Naïve", "façade", "Ωmega", "Привет"),
    *("мир", "مرحبا", "שלום", "नमस्ते", "สวัสดี", "3.14159", "1,000,000", "0xdeadbeef", "½", "Ⅷ", "①"),
    *("2024-01-31T23:59:59Z", "²", "ǅ", "ﬁ", "\u212b", "e\u0301", "n\u0303", "\ufeffbom"),
)
_BLANKS = (" ", "  ", "    ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u3000", "\u2028", "\u2581")
_EMOJI_RANGES = ((0x1F300, 0x1FAFF), (0x2600, 0x27BF), (0x1F1E6, 0x1F1FF))


def proof_strings(vocabulary: Sequence[str], markers: Sequence[str]) -> Iterator[str]:
    """Yield the shipped text in parts, then code, Chinese, emoji, control characters and the like.

    Args:
        vocabulary: the tokenizer's own tokens as text, from which hard strings are joined.
        markers: spellings of the special tokens.
    """
    yield ""
    yield from builtin_text().splitlines(keepends=True)
    chance = random.Random(_SEED)
    makers: tuple[Callable[[random.Random], str], ...] = (
        _code,
        _chinese,
        _emoji,
        _control,
        _rare,
        _blanks,
        _mixed,
        lambda chance: _joined(chance, vocabulary),
        lambda chance: _look_alike(chance, markers),
        _excerpt,
    )
    while True:
        for make in makers:
            yield make(chance)


def first_strings(
    vocabulary: Sequence[str], markers: Sequence[str], count: int = NUM_STRINGS
) -> list[str]:
    """Return the first strings of `proof_strings`, and all of the shipped text."""
    return list(islice(proof_strings(vocabulary, markers), count))


def _code(chance: random.Random) -> str:
    snippet = chance.choice(_CODE)
    name = "_".join(chance.choices(("get", "Value", "x2", "HTTPServer", "i", "__init__"), k=2))
    indented = snippet.replace("\n", "\n" + " " * chance.randrange(13))
    return indented[chance.randrange(8) :] + f"{name}({chance.randrange(10**9)});"


def _chinese(chance: random.Random) -> str:
    text = chance.choice(_CHINESE)
    start = chance.randrange(len(text))
    drawn = "".join(chr(chance.randrange(0x4E00, 0x9FA6)) for _ in range(chance.randrange(12)))
    return text[start:] + drawn + text[:start]


def _emoji(chance: random.Random) -> str:
    parts = []
    for _ in range(chance.randrange(1, 8)):
        parts.append(chr(chance.randrange(*chance.choice(_EMOJI_RANGES))))
        parts.append(chance.choice(("", "", "\u200d", "\ufe0f", "\U0001f3fd", " ", "ok")))
    return "".join(parts)


def _control(chance: random.Random) -> str:
    codes = (*range(0x20), *range(0x7F, 0xA0), 0xAD, 0x200B, 0x200E, 0x2060, 0xFFFD, 0xFEFF)
    return "".join(
        chr(chance.choice(codes)) if chance.random() < 0.5 else chance.choice("ab 1\u4e2d")
        for _ in range(chance.randrange(1, 12))
    )


def _rare(chance: random.Random) -> str:
    alphabet = _assigned()
    size = chance.randrange(1, 10)
    return "".join(
        chance.choice(alphabet) if chance.random() < 0.7 else chance.choice("ab 1.")
        for _ in range(size)
    )


def _blanks(chance: random.Random) -> str:
    def run() -> str:
        return chance.choice(_BLANKS) * chance.choice((1, 1, 2, 3, 5, 8, 17, 40))

    words = (chance.choice(_WORDS) for _ in range(chance.randrange(4)))
    return run() + "".join(word + run() for word in words)


def _mixed(chance: random.Random) -> str:
    return "".join(
        chance.choice(_WORDS) + chance.choice((" ", " ", "", "\n", ", "))
        for _ in range(chance.randrange(1, 12))
    )


def _joined(chance: random.Random, vocabulary: Sequence[str]) -> str:
    """Return tokens in a row, cut at both ends: neighbours that all want to merge."""
    text = "".join(chance.choice(vocabulary) for _ in range(chance.randrange(1, 9)))
    return text[chance.randrange(3) : len(text) - chance.randrange(3)]


def _look_alike(chance: random.Random, markers: Sequence[str]) -> str:
    marker = chance.choice((*markers, "<|im_end|>", "<s>", "<unk>", "<0x0A>", "[INST]"))
    damaged = chance.choice(
        (marker, marker, marker[:-1], marker[1:], marker.upper(), marker[0] + marker)
    )
    before, after = (chance.choice(("", " ", "a", "\n", "中", "  ")) for _ in range(2))
    return before + damaged + after + chance.choice(("", marker, "user\nhello"))


def _excerpt(chance: random.Random) -> str:
    text = builtin_text()
    start = chance.randrange(len(text))
    return text[start : start + chance.randrange(1, 400)]


@cache
def _assigned() -> str:
    """Return every character of Unicode but surrogates and those for private use."""
    unwanted = ("Cn", "Cs", "Co")
    characters = map(chr, range(0xE01F0))  # what follows is for private use
    return "".join(one for one in characters if unicodedata.category(one) not in unwanted)

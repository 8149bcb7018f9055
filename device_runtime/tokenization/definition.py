"""Checks a tokenizer.json before the library sees it: it panics on some, and some end the process.

A merge makes one token of two. Where both have letters and the whole is longer than its parts, no
chain of merges comes back to where it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from tokenizers import Tokenizer

from device_runtime.errors import PackageError
from device_runtime.tokenization.sentencepiece_bpe import MAX_TOKENS

MAX_MERGES = 1 << 22


_UNUSUAL = re.compile(r'\\u00[4-7]|"continuing_subword_prefix"\s*:(?!\s*(?:null\b|""))')
"""What the files of real models never hold; without it no text ends the process.

Escapes of ASCII letters could hide the key.
"""


def build_tokenizer(text: str, what: str, *, is_thorough: bool) -> Tokenizer:
    """Build the tokenizer that a tokenizer.json describes, without truncation and padding.

    Args:
        text: of the file, not trusted.
        what: names the file in errors.
        is_thorough: check every merge first, which takes as long as building. Without that the
            library itself finds what is wrong, though not in its own words.

    Raises:
        PackageError: it is no tokenizer, or one whose merges make no sense.
    """
    if is_thorough or _UNUSUAL.search(text):
        check_definition(text, what)
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library reports with Exception and panics with its own
        reason = " ".join(str(error).split())[:200]
        raise PackageError(f"{what} is not a tokenizer: {reason}") from error
    return tokenizer


def check_definition(text: str, what: str) -> None:
    """Check vocabulary and merges of a tokenizer.json.

    Args:
        text: of the file, not trusted.
        what: names the file in errors.

    Raises:
        PackageError: the text is no JSON object, there are too many tokens or merges, a merge
            takes or makes what is no token, or goes in a circle.
    """
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{what} is not a tokenizer: it is no JSON") from error
    model = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(model, dict):
        raise PackageError(f"{what} is not a tokenizer: it has no model")
    vocab = model.get("vocab")
    if isinstance(vocab, (dict, list)) and len(vocab) > MAX_TOKENS:
        raise PackageError(f"{what} has {len(vocab)} tokens, expected at most {MAX_TOKENS}")
    if "merges" in model:
        _check_merges(model, vocab, what)


def _check_merges(model: Mapping[str, object], vocab: object, what: str) -> None:
    merges = model["merges"]
    if not isinstance(merges, list) or not isinstance(vocab, dict):
        raise PackageError(f"{what} is not a tokenizer: its merges or its vocabulary are none")
    if len(merges) > MAX_MERGES:
        raise PackageError(f"{what} has {len(merges)} merges, expected at most {MAX_MERGES}")
    prefix = model.get("continuing_subword_prefix")
    if prefix:
        raise PackageError(
            f"{what} has the continuing_subword_prefix {ascii(prefix)[:40]}, which is not supported"
        )
    try:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        if {text for a, b in pairs for text in (a, b, a + b)} <= vocab.keys() - {""}:
            return
    except (TypeError, ValueError):  # some pair is none
        pass
    for index, merge in enumerate(merges):
        _check_merge(merge, vocab, f"merge {index} of {what}")
    raise PackageError(f"{what} is not a tokenizer: its merges are no pairs of tokens")


def _check_merge(merge: object, vocab: Mapping[object, object], what: str) -> None:
    """Find what is wrong with a merge.

    Raises:
        PackageError: something is.
    """
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
        raise PackageError(f"{what} is no pair of tokens")
    first, second = pair
    if not first or not second:
        raise PackageError(
            f"{what} makes {(first + second)[:60]!a} of itself, merges must not go in a circle"
        )
    if not {first, second, first + second} <= vocab.keys():
        raise PackageError(
            f"{what} joins {first[:60]!a} and {second[:60]!a}, of which one or the whole is no "
            "token"
        )

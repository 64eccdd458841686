"""Rationales that say the same in nearly the same words, of which a question needs one only."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*|[+*/×÷=<>%]|(?<=[\d\s)])[-−](?=[\s\d(])")
_GRAM = 3


def tokens(text: str) -> tuple[str, ...]:
    """Words with their case folded, numbers and operators; white space and punctuation are left out."""
    return tuple(_TOKEN.findall(text.casefold()))


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of two texts' sets of three tokens in a row, in [0, 1].

    A text of less than three tokens is one gram. 1 is kept for texts whose tokens are the same in the same order.
    """
    return _similarity(tokens(a), tokens(b))


def without_near_duplicates(texts: Sequence[str], threshold: float) -> tuple[str, ...]:
    """The texts whose similarity to every earlier one that is kept lies below `threshold` (0 < threshold <= 1)."""
    kept: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for text in texts:
        own = tokens(text)
        if own in seen or (threshold < 1.0 and any(_similarity(own, other) >= threshold for other in seen)):
            continue
        seen.add(own)
        kept.append(text)
    return tuple(kept)


def _similarity(a: tuple[str, ...], b: tuple[str, ...]) -> float:
    if a == b:
        return 1.0
    first, second = _grams(a), _grams(b)
    common = len(first & second)
    return min(common / (len(first) + len(second) - common), 1.0 - 1e-9)


def _grams(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {words[i : i + _GRAM] for i in range(max(1, len(words) - _GRAM + 1))}

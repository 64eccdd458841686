"""Corrupted rationales: word masking and replacement, with which appendix A.3 balances the discriminator's negatives.

The paper takes word classes from StanfordNLP. Here they are crude: numbers, operators, short lists of words that stand
in for each other, and for all other words their first letter's case and their ending.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from qcrd_ray.seeding import stable_hash

# Kept apart from masking, so that a discriminator cannot tell a negative by its mask tokens alone: a student's real
# negatives have none.
STYLES = ("mask", "replace", "replace", "mixed")
LEAST_SHARE, GREATEST_SHARE = 0.15, 0.4

OPERATORS = ("+", "-", "*", "/", "×", "÷")
INTERCHANGEABLE = (
    ("a", "an", "the", "this", "that", "each", "every"),
    ("of", "in", "on", "at", "from", "to", "with", "by", "for", "into"),
    ("and", "or", "but", "because", "so", "if", "while", "although"),
    ("he", "she", "it", "they", "we", "you", "i"),
    ("his", "her", "its", "their", "our", "your", "my"),
    ("is", "are", "was", "were", "has", "have", "had"),
    ("can", "cannot", "could", "must", "may", "might", "should", "would", "will"),
    ("more", "less", "fewer"),
    ("all", "some", "no", "none", "most", "many", "few"),
    ("always", "never", "often", "sometimes", "not"),
    ("add", "subtract", "multiply", "divide"),
    ("plus", "minus", "times"),
    ("sum", "difference", "product", "quotient"),
    ("total", "rest", "remainder", "half", "double"),
    ("first", "second", "last"),
    ("before", "after"),
    ("true", "false"),
    ("entailment", "neutral", "contradiction"),
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
)
CLASS_OF = {word: name for name, words in enumerate(INTERCHANGEABLE) for word in words}
ENDINGS = ("ing", "ed", "ly", "er", "ion", "s")

_PIECE = re.compile(r"\s+|\d+(?:[.,]\d+)*|[^\W\d]+(?:['’][^\W\d]+)*|.", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def corrupt(rationale: str, question: str, rng: random.Random, *, mask_token: str = "[MASK]") -> str:
    """A copy of a rationale in which 15 to 40 % of the words, one at least, are masked, replaced, swapped or dropped.

    A number becomes another number of the question or one nearby, an operator another one, a word another word of its
    class out of the question and the rationale. A quarter of the copies are only masked, half only replaced.

    Args:
        rng: decides everything; the same state gives the same copy.
        mask_token: what stands for a masked word.

    Returns:
        A text that differs from `rationale` in more than white space and has at least one word; `rationale` itself
        where it has no word.
    """
    pieces = _PIECE.findall(rationale)
    places = [place for place, piece in enumerate(pieces) if _is_word(piece) or _is_operator(pieces, place)]
    words = [place for place in places if _is_word(pieces[place])]
    if not words:
        return rationale
    style = rng.choice(STYLES)
    share = rng.uniform(LEAST_SHARE, GREATEST_SHARE)
    chosen = sorted(rng.sample(places, max(1, round(share * len(places)))))
    vocabulary = sorted({piece for piece in _PIECE.findall(question) + pieces if _is_word(piece)})
    result = list(pieces)
    for place in chosen:
        action = style if style != "mixed" else rng.choice(("mask", "replace", "replace", "swap", "drop"))
        if action == "replace":
            result[place] = _replacement(pieces[place], vocabulary, rng) or mask_token
        elif action == "swap":
            other = rng.choice(words)
            result[place], result[other] = result[other], result[place]
        elif action == "drop" and sum(map(_is_word, result)) > 1:
            result[place] = ""
        else:
            result[place] = mask_token
    text = _join(result)
    if text.split() == rationale.split() or not _PIECE.search(text) or not any(map(_is_word, _PIECE.findall(text))):
        place = words[0]  # two swaps can cancel each other, a swap can exchange the same word
        pieces[place] = mask_token if pieces[place] != mask_token else mask_token + mask_token
        text = _join(pieces)
    return text


def fill_negatives(
    positives: Sequence[str], negatives: Sequence[str], question: str, count: int, seed_parts: Sequence[object]
) -> list[str]:
    """A question's negatives, filled with corrupted positives up to `count`.

    Args:
        count: negatives that are wanted, usually as many as there are positives; more of them are kept.
        seed_parts: what the corruption is seeded with, for example the config's seed and the question's id.

    Returns:
        The given negatives, then corrupted positives in turn, none of which equals a positive or another negative;
        fewer than `count` only where the positives have no words to corrupt.
    """
    filled = list(negatives)
    taken = set(positives) | set(negatives)
    if not positives:
        return filled
    for number in range(4 * max(0, count - len(filled))):  # short texts can give the same copy more than once
        if len(filled) >= count:
            break
        rng = random.Random(stable_hash("corruption", *seed_parts, number))
        copy = corrupt(positives[number % len(positives)], question, rng)
        if copy not in taken:
            taken.add(copy)
            filled.append(copy)
    return filled


def _is_word(piece: str) -> bool:
    return bool(piece) and piece[0].isalnum()


def _is_operator(pieces: Sequence[str], place: int) -> bool:
    """An operator between two spaces; a bare '-' or '/' is more often a hyphen, a sign or a date."""
    spaced = 0 < place < len(pieces) - 1 and pieces[place - 1].isspace() and pieces[place + 1].isspace()
    return pieces[place] in OPERATORS and spaced


def _replacement(piece: str, vocabulary: Sequence[str], rng: random.Random) -> str | None:
    """Another piece of the same class, None where there is none."""
    if piece in OPERATORS:
        return rng.choice([operator for operator in OPERATORS if operator != piece])
    if _NUMBER.fullmatch(piece):
        return _other_number(piece, vocabulary, rng)
    lowered = piece.lower()
    listed = CLASS_OF.get(lowered)
    if listed is not None:
        other = rng.choice([word for word in INTERCHANGEABLE[listed] if word != lowered])
        return other.capitalize() if piece[0].isupper() and piece != "I" else other
    same = [word for word in vocabulary if word.lower() != lowered and _class(word) == _class(piece)]
    return rng.choice(same) if same else None


def _class(word: str) -> tuple[bool, bool, str] | None:
    """Crude class of a word that no list names: upper-case initial, a single letter, ending."""
    if _NUMBER.fullmatch(word) or word.lower() in CLASS_OF:
        return None
    ending = next((ending for ending in ENDINGS if word.lower().endswith(ending) and len(word) > len(ending) + 2), "")
    return word[0].isupper(), len(word) == 1, ending


def _other_number(piece: str, vocabulary: Sequence[str], rng: random.Random) -> str:
    others = [word for word in vocabulary if _NUMBER.fullmatch(word) and _value(word) != _value(piece)]
    if others and rng.random() < 0.5:
        return rng.choice(others)
    value = _value(piece)
    step = rng.choice((1, 1, 2, 3, 10))
    changed = value - step if value >= step and rng.random() < 0.5 else value + step
    decimals = len(piece.rpartition(".")[2]) if "." in piece else 0
    return f"{changed:.{decimals}f}"


def _value(number: str) -> float:
    whole, point, decimals = number.replace(",", "").partition(".")
    return float(whole + point + decimals.replace(".", ""))


def _join(pieces: Sequence[str]) -> str:
    """The text of the pieces, without the white space that a dropped word leaves doubled."""
    kept: list[str] = []
    for piece in pieces:
        if piece.isspace() and (not kept or kept[-1].isspace()):
            continue
        if piece:
            kept.append(piece)
    return "".join(kept).rstrip()

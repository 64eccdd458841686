"""Corrupted rationales: word masking and replacement, with which appendix A.3 balances the discriminator's negatives.

The paper takes parts of speech from StanfordNLP; `kinds` gives them, where spaCy or stanza is there. Without them the
classes are crude: numbers, operators, short lists of words that stand in for each other, and for all other words their
first letter's case and their ending.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

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


@dataclass(frozen=True)
class Corruption:
    """A corrupted copy of a rationale.

    Attributes:
        positive_index: which of the positives it was made of.
        method: `mask`, `replace` (a word that nothing can stand in for is masked), or `mixed` (both, and words
            swapped and dropped).
    """

    text: str
    method: str
    positive_index: int = 0


@dataclass(frozen=True)
class WordKinds:
    """Parts of speech of a rationale's words, and the words that there are of each.

    Attributes:
        places: (begin, end) of a word in the rationale, to its part of speech.
        words: part of speech to the words of the question and of its rationales.
    """

    places: Mapping[tuple[int, int], str] = field(default_factory=dict)
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)


def corrupt(
    rationale: str, question: str, rng: random.Random, *, mask_token: str = "[MASK]", kinds: WordKinds | None = None
) -> str:
    """The text of `corrupted`."""
    return corrupted(rationale, question, rng, mask_token=mask_token, kinds=kinds).text


def corrupted(
    rationale: str, question: str, rng: random.Random, *, mask_token: str = "[MASK]", kinds: WordKinds | None = None
) -> Corruption:
    """A copy of a rationale in which 15 to 40 % of the words, one at least, are masked, replaced, swapped or dropped.

    A number becomes another number of the question or one nearby, an operator another one, a word another word of its
    class out of the question and the rationale. A quarter of the copies are only masked, half only replaced.

    Args:
        rng: decides everything; the same state gives the same copy.
        mask_token: what stands for a masked word.
        kinds: parts of speech; a word that has one becomes another word of the same.

    Returns:
        A text that differs from `rationale` in more than white space and has at least one word; `rationale` itself
        where it has no word.
    """
    matches = list(_PIECE.finditer(rationale))
    pieces = [match[0] for match in matches]
    places = [place for place, piece in enumerate(pieces) if _is_word(piece) or _is_operator(pieces, place)]
    words = [place for place in places if _is_word(pieces[place])]
    if not words:
        return Corruption(rationale, "mask")
    style = rng.choice(STYLES)
    share = rng.uniform(LEAST_SHARE, GREATEST_SHARE)
    chosen = sorted(rng.sample(places, max(1, round(share * len(places)))))
    vocabulary = sorted({piece for piece in _PIECE.findall(question) + pieces if _is_word(piece)})
    result = list(pieces)
    for place in chosen:
        action = style if style != "mixed" else rng.choice(("mask", "replace", "replace", "swap", "drop"))
        if action == "replace":
            same = _same_kind(pieces[place], matches[place].span(), kinds, rng) if kinds is not None else None
            crude = vocabulary if kinds is None or _NUMBER.fullmatch(pieces[place]) else ()
            result[place] = same or _replacement(pieces[place], crude, rng) or mask_token
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
        return Corruption(_join(pieces), "mask")
    return Corruption(text, style)


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
    made = make_negatives(positives, negatives, question, count - len(negatives), seed_parts)
    return [*negatives, *(corruption.text for corruption in made)]


def make_negatives(
    positives: Sequence[str],
    negatives: Sequence[str],
    question: str,
    count: int,
    seed_parts: Sequence[object],
    kinds: Sequence[WordKinds] | None = None,
) -> list[Corruption]:
    """`count` corrupted positives in turn, none of which equals a positive, a negative or another of them.

    Args:
        kinds: parts of speech of each positive.

    Returns:
        Fewer than `count` only where the positives have too few words to corrupt.
    """
    made: list[Corruption] = []
    taken = set(positives) | set(negatives)
    for number in range(4 * max(0, count) * bool(positives)):  # short texts can give the same copy more than once
        if len(made) >= count:
            break
        rng = random.Random(stable_hash("corruption", *seed_parts, number))
        index = number % len(positives)
        copy = corrupted(positives[index], question, rng, kinds=kinds[index] if kinds is not None else None)
        if copy.text not in taken:
            taken.add(copy.text)
            made.append(replace(copy, positive_index=index))
    return made


def _is_word(piece: str) -> bool:
    return bool(piece) and piece[0].isalnum()


def _is_operator(pieces: Sequence[str], place: int) -> bool:
    """An operator between two spaces; a bare '-' or '/' is more often a hyphen, a sign or a date."""
    spaced = 0 < place < len(pieces) - 1 and pieces[place - 1].isspace() and pieces[place + 1].isspace()
    return pieces[place] in OPERATORS and spaced


def _same_kind(piece: str, place: tuple[int, int], kinds: WordKinds, rng: random.Random) -> str | None:
    """Another word of the same part of speech, None where the piece has none or there is no other."""
    part = kinds.places.get(place)
    lowered = piece.lower()
    others = [word for word in kinds.words.get(part or "", ()) if word.lower() != lowered]
    if not others:
        return None
    other = rng.choice(others)
    if piece[0].isupper():
        return other[0].upper() + other[1:]
    began_a_sentence = other[0].isupper() and not other[1:].isupper() and other != "I"
    is_name = (part or "").startswith("PROPN")
    return other[0].lower() + other[1:] if began_a_sentence and not is_name else other


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


@lru_cache(maxsize=1 << 16)
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

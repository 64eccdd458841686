"""What can be measured of a rationale without an LLM: its arithmetic, its own answer, copying, length, diversity.

Nothing here calls a model. Intervals are percentile bootstraps over questions, since the samples of a question are no
independent draws.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from operator import eq
from typing import Any

import numpy as np

from qcrd_ray.evaluation.arithmetic_steps import find_steps
from qcrd_ray.rationales.near_duplicates import similarity, tokens
from qcrd_ray.tasks.arithmetic import canonical_number, evaluate
from qcrd_ray.tasks.base import Choices, Task, normalise

CONFIDENCE = 0.95
MAX_CHARACTERS = 20_000
"""A longer rationale is measured up to here; its length in words and tokens is that of all of it."""

_NUMBER = re.compile(r"(?<![\w.,])-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?![\w])")
_UNFINISHED = re.compile(
    r"[0-9)]\s*[-+*/×÷·−x]\s*[($]*[0-9]|[0-9]\s*%|[0-9]\s*(?:dozen|hundred|thousand|million|billion)", re.IGNORECASE
)
"""Behind a result: an expression, a percentage or a scale, with which it is another number than it looks."""
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_DENIALS = frozenset(
    ["not", "cannot", "never", "neither", "nor", "no", "unlike", "except", "without", "rather", "instead"]
)
_ENDINGS = frozenset(["s", "es", "ies", "ied", "ed", "d", "ing", "er", "ers", "r", "rs"])


@dataclass(frozen=True)
class Rationale:
    """A rationale and what it belongs to.

    Attributes:
        question: as the student reads it, choices among it.
        label: what stands beside the rationale as its answer: the teacher's own, or the student's label. None: none.
        gold: the right answer, None where it is not known.
        tokens: that it took to generate, None where nobody counted.
        cut: whether its limit of tokens ended it, None where that is not known.
    """

    id: str
    question: str
    text: str
    label: str | None = None
    gold: str | None = None
    choices: Choices = None
    tokens: int | None = None
    cut: bool | None = None


@dataclass(frozen=True)
class Measured:
    """The measures of one rationale.

    Attributes:
        steps, wrong_steps: arithmetic steps it states, and those that do not hold.
        wrong: the wrong ones as they are read.
        states_answer: whether it names an answer itself (`stated_answer`).
        contradicts: whether that is another answer than its label; None where it names none or has no label.
        right: whether its label is the gold answer; None without one of them.
        copied_share: share of its n-grams that the question has too; None where it is shorter than an n-gram.
        longest_copied: tokens in a row that stand in the question as they are.
    """

    id: str
    words: int
    tokens: int | None
    cut: bool | None
    steps: int
    wrong_steps: int
    wrong: tuple[str, ...]
    states_answer: bool
    contradicts: bool | None
    right: bool | None
    copied_share: float | None
    longest_copied: int


def measure(rationale: Rationale, task: Task, ngram: int = 4) -> Measured:
    """The measures of a rationale."""
    text = rationale.text[:MAX_CHARACTERS]
    steps = find_steps(text)
    wrong = tuple(step.text for step in steps if not step.right)
    stated = stated_answer(text, task, rationale.choices)
    label, gold = rationale.label, rationale.gold
    contradicts = None
    if stated is not None and label is not None and task.canonical_answer(label, rationale.choices) is not None:
        same = task.same_answer(stated, label, rationale.choices)
        contradicts = not (same or _is_rounded(*(task.canonical_answer(t, rationale.choices) for t in (stated, label))))
    right = None
    if label is not None and gold is not None:
        right = task.same_answer(label, gold, rationale.choices)
    share, longest = copying(text, rationale.question, ngram)
    return Measured(
        id=rationale.id,
        words=len(rationale.text.split()),
        tokens=rationale.tokens,
        cut=rationale.cut,
        steps=len(steps),
        wrong_steps=len(wrong),
        wrong=wrong,
        states_answer=stated is not None,
        contradicts=contradicts,
        right=right,
        copied_share=share,
        longest_copied=longest,
    )


def _is_rounded(one: str | None, other: str | None) -> bool:
    """Whether one of two numbers is the other, rounded or cut at its last decimal."""
    for text, longer in ((one or "", other or ""), (other or "", one or "")):
        short, value, decimals = evaluate(text), evaluate(longer), len(text.partition(".")[2])
        if short is not None and value is not None and decimals:
            unit, more = Fraction(1, 10**decimals), abs(value) - abs(short)
            if abs(value - short) <= unit / 2 or (value * short >= 0 and 0 <= more < unit):
                return True
    return False


def stated_answer(text: str, task: Task, choices: Choices = None) -> str | None:
    """The answer that a rationale itself comes to, None where it names none beyond doubt.

    The task's own parsing (`The answer is …`) where it finds one. Else, where answers are numbers, the result of the
    last arithmetic, if the text names no other number after it; where they are choices, the only one that the last
    sentence names.
    """
    parsed = task.parse_teacher_output(text, choices).answer
    if parsed is not None:
        return parsed
    if choices:
        return _named_choice(text, choices)
    return _last_result(text) if task.canonical_answer("7.0") == "7" else None


def _last_result(text: str) -> str | None:
    _, equal, after = text.rpartition("=")
    if _UNFINISHED.search(after):
        return None
    numbers = [evaluate(number) for number in _NUMBER.findall(after.replace("−", "-").replace("$", ""))]
    steps = find_steps(text)
    if not equal or not steps or not numbers or numbers[0] is None:
        return None
    last = evaluate(steps[-1].text.rpartition(" ")[2].rstrip("%"))
    stated = all(number == numbers[0] for number in numbers) and last is not None and abs(last) == abs(numbers[0])
    return canonical_number(numbers[0]) if stated else None


def _named_choice(text: str, choices: Sequence[str]) -> str | None:
    sentences = [sentence for sentence in _SENTENCE.split(text.strip()) if sentence]
    if not sentences:
        return None
    last = tokens(sentences[-1])
    near = {own: choice for choice in choices if _holds(last, own := tokens(choice), _is_inflected)}
    # `ice cream` names no `ice`: a choice within a longer one that is named does not count.
    named = [
        own for own in near if not any(len(own) < len(other) and _holds(other, own, _is_inflected) for other in near)
    ]
    # Of `theaters` and `movies` either may be meant; of `cars` alone, `car` is not said beyond doubt.
    if len(named) != 1 or not _holds(last, named[0]):
        return None
    others = [word for word in last if word not in named[0]]
    if any(word in _DENIALS or word.endswith(("n't", "n’t")) for word in others):
        return None
    return normalise(near[named[0]])


def _holds(text: Sequence[str], part: Sequence[str], same: Callable[[str, str], bool] = eq) -> bool:
    """Whether a text has these tokens in a row."""
    places = range(len(text) - len(part) + 1) if part else ()
    return any(all(map(same, text[place : place + len(part)], part)) for place in places)


def _is_inflected(one: str, other: str) -> bool:
    """Whether two words are the same but for an ending, as `hospital` and `hospitals`, `party` and `parties`."""
    short, long = sorted((one, other), key=len)
    stem = short[:-1] if short.endswith(("y", "e")) else short
    ending = long[len(stem) :]
    return one == other or (len(stem) > 2 and long.startswith(stem) and ending in _ENDINGS)


def copying(text: str, question: str, ngram: int = 4) -> tuple[float | None, int]:
    """(share of a text's n-grams that stand in the question, longest run of tokens that does).

    Tokens are words with their case folded, numbers and operators (`near_duplicates.tokens`). The share is None for a
    text of fewer than `ngram` tokens.
    """
    own, other = tokens(text), tokens(question)
    grams = [own[i : i + ngram] for i in range(len(own) - ngram + 1)]
    there = {other[i : i + ngram] for i in range(len(other) - ngram + 1)}
    share = sum(gram in there for gram in grams) / len(grams) if grams else None
    places: dict[str, list[int]] = defaultdict(list)
    for place, token in enumerate(other):
        places[token].append(place)
    longest = 0
    runs: dict[int, int] = {}
    for token in own:
        runs = {place: runs.get(place - 1, 0) + 1 for place in places.get(token, ())}
        longest = max(longest, *runs.values()) if runs else longest
    return share, longest


@dataclass(frozen=True)
class Diversity:
    """How the K samples of a question differ.

    Attributes:
        samples: K.
        distinct_1, distinct_2: different words, or pairs of them, over all of the samples' (Li et al. 2016).
        similarity: mean over pairs of samples of the Jaccard similarity of their triples of tokens.
        duplicates: share of samples whose tokens an earlier one has in the same order.
    """

    id: str
    samples: int
    distinct_1: float | None
    distinct_2: float | None
    similarity: float
    duplicates: float


def diversity(question: str, texts: Sequence[str]) -> Diversity:
    """The diversity of two or more samples of a question.

    Args:
        question: its id.

    Raises:
        ValueError: fewer than two samples.
    """
    if len(texts) < 2:
        raise ValueError(f"{question}: the diversity of {len(texts)} sample(s)")
    texts = [text[:MAX_CHARACTERS] for text in texts]
    own = [tokens(text) for text in texts]
    return Diversity(
        id=question,
        samples=len(texts),
        distinct_1=_distinct(own, 1),
        distinct_2=_distinct(own, 2),
        similarity=float(np.mean([similarity(a, b) for a, b in combinations(texts, 2)])),
        duplicates=1.0 - len(set(own)) / len(own),
    )


def _distinct(texts: Sequence[tuple[str, ...]], n: int) -> float | None:
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


# Summaries. A measure is a ratio of two sums over rationales: (part, whole), None where one has no say in it.

Ratio = Callable[[Measured], tuple[float, float] | None]


def _mean(value: Callable[[Measured], float | bool | None]) -> Ratio:
    def ratio(one: Measured) -> tuple[float, float] | None:
        found = value(one)
        return None if found is None else (float(found), 1.0)

    return ratio


RATIOS: Mapping[str, Ratio] = {
    "words": _mean(lambda one: one.words),
    "tokens": _mean(lambda one: one.tokens),
    "cut": _mean(lambda one: one.cut),
    "right": _mean(lambda one: one.right),
    "with_steps": _mean(lambda one: one.steps > 0),
    "wrong_steps": lambda one: (one.wrong_steps, one.steps) if one.steps else None,
    "with_wrong_steps": _mean(lambda one: one.wrong_steps > 0 if one.steps else None),
    "states_answer": _mean(lambda one: one.states_answer),
    "contradicts": _mean(lambda one: one.contradicts),
    "copied_share": _mean(lambda one: one.copied_share),
    "longest_copied": _mean(lambda one: one.longest_copied),
}
"""By name in the summary. `wrong_steps` is over steps, `with_wrong_steps` over rationales that have one, `contradicts`
over those that name an answer and have a label, the others over all."""

DIVERSITY = ("distinct_1", "distinct_2", "similarity", "duplicates")


def summarise(
    measured: Sequence[Measured], diversities: Sequence[Diversity] = (), *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Counts, and for each measure {value, low, high, n}: 95 % percentile bootstrap over questions, n what it is over.

    Args:
        measured: of any questions, in any order.
        diversities: of the questions that have more than one sample.
        resamples: bootstrap resamples; 0 leaves the intervals out.
    """
    questions = {question: row for row, question in enumerate(dict.fromkeys(one.id for one in measured))}
    summary: dict[str, Any] = {
        "rationales": len(measured),
        "questions": len(questions),
        "empty": sum(not one.words for one in measured),
        "steps": sum(one.steps for one in measured),
        "wrong_steps_found": sum(one.wrong_steps for one in measured),
    }
    measures: dict[str, Any] = {}
    for name, ratio in RATIOS.items():
        sums = np.zeros((len(questions), 2))
        for one in measured:
            found = ratio(one)
            if found is not None:
                sums[questions[one.id]] += found
        measures[name] = _estimate(sums, resamples, seed)
    for name in DIVERSITY:
        values = [getattr(one, name) for one in diversities]
        sums = np.array([(value, 1.0) for value in values if value is not None]).reshape(-1, 2)
        measures[name] = _estimate(sums, resamples, seed)
    return {**summary, "measures": {name: found for name, found in measures.items() if found is not None}}


def _estimate(sums: np.ndarray, resamples: int, seed: int) -> dict[str, Any] | None:
    """Ratio of column sums of [Q, 2], None where the second is 0; no interval where all questions have one ratio."""
    part, whole = sums.sum(0)
    if whole == 0:
        return None
    estimate: dict[str, Any] = {"value": part / whole, "low": None, "high": None, "n": int(whole)}
    if resamples and np.ptp(sums[sums[:, 1] > 0, 0] / sums[sums[:, 1] > 0, 1]) > 0:
        generator = np.random.default_rng(seed)
        ratios = []
        for _ in range(resamples):
            drawn = sums[generator.integers(len(sums), size=len(sums))].sum(0)
            ratios.append(drawn[0] / drawn[1] if drawn[1] else np.nan)
        tail = (1.0 - CONFIDENCE) / 2.0
        estimate["low"], estimate["high"] = map(float, np.nanquantile(ratios, [tail, 1.0 - tail]))
    return {**estimate, "value": float(estimate["value"])}

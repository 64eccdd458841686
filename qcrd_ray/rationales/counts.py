"""What became of the questions and the samples: what is reported of the tables."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

IDS_SHOWN = 5


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DroppedCount(_Record):
    """Questions that cannot be used for one reason: how many, and the first few ids."""

    count: int
    ids: tuple[str, ...]


class ByGold(_Record):
    """The paper's appendix table 2, over the questions used that have a gold answer."""

    questions: int
    average_right: float | None
    only_right: float | None
    only_wrong: float | None


class ByVote(_Record):
    """The same with the vote in the place of gold, over the questions used that have a vote."""

    questions: int
    average_positives: float | None
    only_positives: float | None


class TrainCounts(_Record):
    """Counts of a training split.

    Attributes:
        questions: questions read; with `data.limit` those up to the last one used.
        samples: samples voted on, at most `teacher.samples` a question.
        samples_recorded: samples there were to choose from.
        parsed, unparsed: voted samples with and without an answer.
        too_long, empty: samples left out before the vote.
        cut: samples whose rationale ran on into another question and was cut there.
        near_duplicates: positives left out because they come near an earlier one (`data.near_duplicates`).
        orphans: samples of a flat table that belong to no question (0 where `data.limit` ended the reading).
        short_of_samples: questions with some samples, but fewer than `teacher.samples`.
        single_sample_accuracy: right samples over voted samples, unparsed ones counting as wrong.
        vote_accuracy: questions whose vote is gold over questions with samples; no vote counts as wrong.
        wrongly_voted: questions used whose vote is not gold.
        agreement_histogram: questions used by agreement, ten bins of a tenth; the last one holds 1.
    """

    questions: int
    used: int
    dropped: dict[str, DroppedCount]
    teachers: tuple[str, ...]
    samples: int
    samples_recorded: int
    parsed: int
    unparsed: int
    too_long: int
    empty: int
    cut: int
    near_duplicates: int
    orphans: int
    short_of_samples: int
    single_sample_accuracy: float | None
    vote_accuracy: float | None
    wrongly_voted: int
    by_gold: ByGold
    by_vote: ByVote
    agreement_mean: float | None
    agreement_histogram: tuple[int, ...]


class HeldOutCounts(_Record):
    """Counts of a split that a student is evaluated on."""

    questions: int
    used: int
    dropped: dict[str, DroppedCount]


class AugmentedCounts(_Record):
    """Corrupted positives made for the discriminator.

    Attributes:
        tagger: what told the parts of speech: `spacy:MODEL VERSION`, `stanza:VERSION` or `rules`.
        negatives: how many were made.
        questions: questions that got some.
        unbalanced: questions that still have fewer negatives than positives.
    """

    tagger: str
    negatives: int
    questions: int
    unbalanced: int


class Counts(_Record):
    """Counts of all tables in a folder.

    Attributes:
        fingerprint: a hash of all that determines the tables.
        asked: the same without what a live teacher had answered by then.
        simulated: whether the samples are a simulated teacher's.
        augmented: None where nothing uses corrupted positives.
        reused: whether the tables were there already.
    """

    fingerprint: str
    asked: str
    task: str
    teacher: str
    simulated: bool
    train: TrainCounts
    held_out: dict[str, HeldOutCounts]
    augmented: AugmentedCounts | None = None
    reused: bool = False


class Drops:
    """Collects dropped questions by reason."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._ids: dict[str, list[str]] = {}

    def add(self, reason: str, question_id: str) -> None:
        self._counts[reason] = self._counts.get(reason, 0) + 1
        ids = self._ids.setdefault(reason, [])
        if len(ids) < IDS_SHOWN:
            ids.append(question_id)

    def result(self) -> dict[str, DroppedCount]:
        return {r: DroppedCount(count=n, ids=tuple(self._ids[r])) for r, n in sorted(self._counts.items())}


def describe_drops(dropped: dict[str, DroppedCount]) -> str:
    """`no_samples 212 (id-1, id-2, …)`, for one line of a log or an error."""
    texts = []
    for reason, drop in dropped.items():
        ids = ", ".join(drop.ids) + (", …" if drop.count > len(drop.ids) else "")
        texts.append(f"{reason} {drop.count} ({ids})")
    return "; ".join(texts)


class TrainTally:
    """Adds up batches of voted questions, column by column."""

    def __init__(self, samples_wanted: int) -> None:
        self._wanted = samples_wanted
        self._drops = Drops()
        self._teachers: set[str] = set()
        self._sums: dict[str, int] = {}
        self._agreement = 0.0
        self._histogram = np.zeros(10, dtype=np.int64)
        self.orphans = 0

    @property
    def used(self) -> int:
        return self._sums.get("used", 0)

    @property
    def questions(self) -> int:
        return self._sums.get("questions", 0)

    def add(self, batch: pa.Table, teachers: Iterable[str]) -> None:
        """Add a batch with the columns `id`, `reason` and those of `Tally`."""
        self._teachers.update(teachers)
        used = _nulls(batch, "reason")
        dropped = batch.filter(pa.array(~used)).select(["id", "reason"])
        for question_id, reason in zip(dropped["id"].to_pylist(), dropped["reason"].to_pylist(), strict=True):
            self._drops.add(reason, question_id)
        voted, parsed, majority = (_ints(batch, name) for name in ("voted", "parsed", "majority"))
        right, has_gold = _ints(batch, "right"), ~_nulls(batch, "right")
        votes_gold = _ints(batch, "votes_gold")
        asked = has_gold & (voted > 0)
        by_gold, by_vote = used & asked, used & (parsed > 0)
        counted = {
            "questions": len(used),
            "used": used.sum(),
            "samples": voted.sum(),
            "samples_recorded": _ints(batch, "recorded").sum(),
            "parsed": parsed.sum(),
            "too_long": _ints(batch, "too_long").sum(),
            "empty": _ints(batch, "empty").sum(),
            "cut": _ints(batch, "cut").sum(),
            "near_duplicates": _ints(batch, "near_duplicates")[used].sum(),
            "short_of_samples": ((voted > 0) & (voted < self._wanted)).sum(),
            "asked": asked.sum(),
            "asked_samples": voted[asked].sum(),
            "asked_right": right[asked].sum(),
            "asked_votes_gold": votes_gold[asked].sum(),
            "wrongly_voted": (by_gold & (parsed > 0) & (votes_gold == 0)).sum(),
            "gold_questions": by_gold.sum(),
            "gold_right": right[by_gold].sum(),
            "gold_only_right": (by_gold & (right > 0) & (right == parsed)).sum(),
            "gold_only_wrong": (by_gold & (right == 0)).sum(),
            "vote_questions": by_vote.sum(),
            "vote_positives": majority[by_vote].sum(),
            "vote_only_positives": (by_vote & (majority == parsed)).sum(),
        }
        for name, count in counted.items():
            self._sums[name] = self._sums.get(name, 0) + int(count)
        self._agreement += float((majority[by_vote] / parsed[by_vote]).sum())
        tenths = np.minimum(majority[by_vote] * 10 // parsed[by_vote], 9)
        self._histogram += np.bincount(tenths, minlength=10)

    def result(self) -> TrainCounts:
        total = {**dict.fromkeys(("questions", "samples", "parsed", "asked"), 0), **self._sums}

        def share(part: str, whole: str) -> float | None:
            return total[part] / total[whole] if total.get(whole) else None

        return TrainCounts(
            **{
                name: total.get(name, 0)
                for name in (
                    "questions",
                    "used",
                    "samples",
                    "samples_recorded",
                    "parsed",
                    "too_long",
                    "empty",
                    "cut",
                    "near_duplicates",
                    "short_of_samples",
                    "wrongly_voted",
                )
            },
            orphans=self.orphans,
            dropped=self._drops.result(),
            teachers=tuple(sorted(self._teachers)),
            unparsed=total["samples"] - total["parsed"],
            single_sample_accuracy=share("asked_right", "asked_samples"),
            vote_accuracy=share("asked_votes_gold", "asked"),
            by_gold=ByGold(
                questions=total.get("gold_questions", 0),
                average_right=share("gold_right", "gold_questions"),
                only_right=share("gold_only_right", "gold_questions"),
                only_wrong=share("gold_only_wrong", "gold_questions"),
            ),
            by_vote=ByVote(
                questions=total.get("vote_questions", 0),
                average_positives=share("vote_positives", "vote_questions"),
                only_positives=share("vote_only_positives", "vote_questions"),
            ),
            agreement_mean=self._agreement / total["vote_questions"] if total.get("vote_questions") else None,
            agreement_histogram=tuple(int(count) for count in self._histogram),
        )


def _ints(batch: pa.Table, name: str) -> np.ndarray:
    return np.asarray(batch[name].cast(pa.int64()).fill_null(0).to_numpy(), dtype=np.int64)


def _nulls(batch: pa.Table, name: str) -> np.ndarray:
    return np.asarray(batch[name].is_null().to_numpy(), dtype=bool)

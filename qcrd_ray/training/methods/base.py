"""What a method is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from qcrd_ray.config import ExperimentConfig, LossConfig
from qcrd_ray.rationales.streaming import TrainingRow
from qcrd_ray.sampling.negatives import Negative


@dataclass
class Candidates:
    """The rationales of one question that a step may use. An empty negative keeps its place, masked."""

    row: TrainingRow
    positives: list[list[int]] = field(default_factory=list)
    positive_texts: list[str] = field(default_factory=list)
    negatives: list[list[int]] = field(default_factory=list)
    negative_texts: list[str] = field(default_factory=list)


class Terms(Protocol):
    """The terms that a loss may take: over the targets of one pass, each a sum divided by the global batch.

    A term that is not taken costs nothing, and one that is taken stands in the step's metrics.
    """

    def label(self) -> Tensor:
        """Cross-entropy of the label, L_pred of equation (8)."""

    def rationale(self) -> Tensor:
        """Cross-entropy of the rationale."""

    def contrastive(self) -> Tensor:
        """Equation (3), L_cl of equation (8)."""

    def mutual_information(self) -> Tensor:
        """Of the label task and the rationale task: qcrd_ray/objectives/mutual_information.py."""


@dataclass(frozen=True)
class Method:
    """One way to train a student.

    Attributes:
        rationales: which rationales of a question a step may use.
        loss: of one pass; the step's loss is the sum over its passes.
    """

    rationales: Callable[[ExperimentConfig, TrainingRow, Sequence[Negative]], Candidates]
    loss: Callable[[LossConfig, Terms], Tensor]


def no_rationales(config: ExperimentConfig, row: TrainingRow, negatives: Sequence[Negative]) -> Candidates:
    return Candidates(row)


def first_rationale(config: ExperimentConfig, row: TrainingRow, negatives: Sequence[Negative]) -> Candidates:
    """The teacher's first sample, whatever the vote says of it."""
    return Candidates(row, [row.first], [row.first_text])


def contrasted_rationales(config: ExperimentConfig, row: TrainingRow, negatives: Sequence[Negative]) -> Candidates:
    """The positives, and the negatives of the config's sources."""
    ids = [negative.ids for negative in negatives]
    texts = [negative.text for negative in negatives]
    if config.negatives.source.endswith("self_consistency"):
        ids, texts = ids + row.minority, texts + row.minority_texts
    return Candidates(row, row.positives, row.positive_texts, ids, texts)

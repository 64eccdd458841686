"""One step of any method: a batch is turned into losses in passes over the student.

There are two kinds of passes. The choice pass looks, without gradients and in
evaluation mode, at every candidate rationale; the gradient passes hold only what the loss is made of: the label, the
chosen positive and the chosen negative of each question. All ranks make the same number of passes; where one has less
to do it runs a pass of weight 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.models.student import Item, Student, cut_into_passes
from qcrd_ray.objectives.contrastive import CHOOSING_SCHEMES, Choice, choose, contrastive_loss
from qcrd_ray.objectives.mutual_information import cross_entropy_of_peaks
from qcrd_ray.rationales.streaming import StepBatch, TrainingRow
from qcrd_ray.sampling.negatives import Negative
from qcrd_ray.seeding import stable_uniform
from qcrd_ray.training.engine import TrainEngine
from qcrd_ray.training.judge import OnlineJudge
from qcrd_ray.training.kept_choices import NONE, KeptChoices
from qcrd_ray.training.methods import Candidates, method_of

LABEL = "label"
Key = tuple[str, int, int]
"""(LABEL, "+" or "-"; the question's place in the rank's share; the rationale's place among its own)."""


@dataclass
class StepLosses:
    """Sums over this rank's share; divided by the global batch they add up to the step's means."""

    total: float = 0.0
    label: float = 0.0
    positive: float = 0.0
    negative: float = 0.0
    mutual_information: float = 0.0
    active: int = 0
    with_negative: int = 0
    negatives_used: int = 0
    negatives_empty: int = 0
    positive_score: float = 0.0
    negative_score: float = 0.0
    scored_positive: int = 0
    scored_negative: int = 0
    tokens: int = 0
    passes: int = 0
    choices_kept: int = 0

    def vector(self) -> list[float]:
        return [float(getattr(self, name)) for name in self.__dataclass_fields__]


@dataclass
class Plan:
    """Masks, scores and choice of a batch: everything about the contrastive loss except the cross-entropies."""

    positive_mask: Tensor
    negative_mask: Tensor
    choice: Choice
    positive_score: Tensor | None = None
    negative_score: Tensor | None = None
    items: list[Item] = field(default_factory=list)
    label_peaks: dict[int, Tensor] = field(default_factory=dict)  # [V] each, by the question's place: what MI aims at


def candidates(
    config: ExperimentConfig, rows: Sequence[TrainingRow], sampled: list[list[Negative]]
) -> list[Candidates]:
    """The rationales that the method lets each question use."""
    method = method_of(config)
    return [method.rationales(config, row, negatives) for row, negatives in zip(rows, sampled, strict=True)]


def train_on_batch(
    engine: TrainEngine,
    config: ExperimentConfig,
    batch: StepBatch,
    batch_candidates: list[Candidates],
    judge: OnlineJudge | None,
    kept: KeptChoices | None = None,
) -> StepLosses:
    """Add the gradients of equation (8)'s first two terms to the engine's step, and say what they were made of.

    Args:
        kept: choices of earlier steps; those of this step are added.
    """
    student: Student = engine.module  # type: ignore[assignment]
    method = method_of(config)
    losses = StepLosses()
    plan = _plan(engine, config, batch, batch_candidates, losses, kept)
    _score(config, plan, batch_candidates, judge, losses)
    plan.items = _gradient_items(config, plan, batch_candidates)

    passes = _gradient_passes(student, config, plan.items)
    total = _most(len(passes))
    world = dist.get_world_size()
    for number in range(total):
        last = number == total - 1
        if number >= len(passes):
            engine.backward(engine.forward([_dummy(student)]).sum() * 0.0, last=last)
            continue
        terms = _PassTerms(config, plan, passes[number], batch.global_size, losses)
        terms.run(engine)
        loss = method.loss(config.loss, terms)
        losses.total += float(loss.detach()) * batch.global_size
        engine.backward(loss * world, last=last)
        losses.tokens += sum(item.size for item in passes[number])
        losses.passes += 1
    return losses


def _plan(
    engine: TrainEngine,
    config: ExperimentConfig,
    batch: StepBatch,
    found: list[Candidates],
    losses: StepLosses,
    kept: KeptChoices | None,
) -> Plan:
    """Masks, and the choice of columns: by a pass without gradients where the scheme goes by cross-entropy."""
    student: Student = engine.module  # type: ignore[assignment]
    device = student.device
    positive_mask = _mask([[bool(ids) for ids in c.positives] for c in found]).to(device)
    negative_mask = _mask([[bool(ids) for ids in c.negatives] for c in found]).to(device)
    losses.negatives_used = int(negative_mask.sum())
    losses.negatives_empty = sum(not ids for c in found for ids in c.negatives)
    if config.is_contrastive:
        losses.with_negative = int(negative_mask.any(1).sum())
    if not config.is_contrastive or config.scheme not in CHOOSING_SCHEMES:
        first = positive_mask.any(1).long() - 1 if positive_mask.shape[1] else _none(len(found), device)
        return Plan(positive_mask, negative_mask, Choice(first, _none(len(found), device)))

    uniforms = torch.tensor(
        [[stable_uniform(config.train.seed, "choice", batch.step, c.row.id, s) for s in ("+", "-")] for c in found],
        dtype=torch.float64,
        device=device,
    ).reshape(len(found), 2)
    iteration = batch.step // config.train.iteration_steps
    open_mask = _without_kept(positive_mask, batch, iteration, kept)
    positive_ce, negative_ce = _choice_pass(engine, config, found, open_mask, negative_mask)
    choice = choose(positive_ce, negative_ce, open_mask, negative_mask, scheme=config.scheme, uniforms=uniforms)
    if kept is not None:
        is_kept = (open_mask != positive_mask).any(1)
        losses.choices_kept = int(is_kept.sum())
        chosen = torch.where(is_kept, NONE, choice.positive).tolist()
        kept.keep([row.row for row in batch.rows], chosen, iteration, batch.global_size)
    if not student.has_dropout and choice.negative.numel() and negative_ce.shape[1]:
        # Without dropout the choice pass gave the value that the loss would have: a negative at rest has no gradient.
        picked = negative_ce.gather(1, choice.negative.clamp_min(0).unsqueeze(1)).squeeze(1)
        at_rest = picked >= config.loss.margin
        choice = Choice(choice.positive, torch.where(at_rest, -1, choice.negative))
    return Plan(positive_mask, negative_mask, choice)


def _without_kept(positive_mask: Tensor, batch: StepBatch, iteration: int, kept: KeptChoices | None) -> Tensor:
    """[B, m]: the positives between which there is a choice; of a question that keeps its own, that one."""
    if kept is None:
        return positive_mask
    columns = torch.tensor([kept.of(row.row, iteration) for row in batch.rows], device=positive_mask.device)
    only = torch.arange(positive_mask.shape[1], device=positive_mask.device) == columns.unsqueeze(1)
    return torch.where((columns != NONE).unsqueeze(1), only, positive_mask)


def _choice_pass(
    engine: TrainEngine,
    config: ExperimentConfig,
    found: list[Candidates],
    positive_mask: Tensor,
    negative_mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies [B, m] and [B, k] of the candidates between which there is a choice; 0 elsewhere.

    A single positive needs none. A negative is looked at where there are several, and, without dropout, also to learn
    whether it is at rest. Equal rationales of a question are computed once.
    """
    student: Student = engine.module  # type: ignore[assignment]
    by_value = config.scheme != "sampling"
    see_negative = not student.has_dropout
    positive_ce = torch.zeros(positive_mask.shape, device=positive_mask.device)
    negative_ce = torch.zeros(negative_mask.shape, device=negative_mask.device)
    items = []
    for index, (c, is_open) in enumerate(zip(found, positive_mask.tolist(), strict=True)):
        positive_keys = [("+", index, j) for j, open_one in enumerate(is_open) if open_one]
        negative_keys = [("-", index, j) for j, ids in enumerate(c.negatives) if ids]
        keys = positive_keys if by_value and len(positive_keys) > 1 else []
        if see_negative or (by_value and len(negative_keys) > 1):
            keys = keys + negative_keys
        equal: dict[tuple[int, ...], list[Key]] = {}
        for key in keys:
            equal.setdefault(tuple((c.positives if key[0] == "+" else c.negatives)[key[2]]), []).append(key)
        if equal:
            items.append(Item(c.row.explain, list(equal), list(equal.values())))
    passes = cut_into_passes(student, items, config.train.tokens_per_pass, split=True)
    total = _most(len(passes))
    engine.train(False)
    with torch.no_grad():
        for number in range(total):
            if number >= len(passes):
                engine.forward([_dummy(student)])
                continue
            values = engine.forward(passes[number])
            owners = [keys for item in passes[number] for keys in item.key]
            for value, keys in zip(values, owners, strict=True):
                for side, index, j in keys:
                    (positive_ce if side == "+" else negative_ce)[index, j] = value
    engine.train(True)
    return positive_ce, negative_ce


def _score(
    config: ExperimentConfig,
    plan: Plan,
    found: list[Candidates],
    judge: OnlineJudge | None,
    losses: StepLosses,
) -> None:
    """The judge's scores of the chosen rationales, or of all where the scheme weighs all."""
    if judge is None or not config.is_contrastive or config.scheme == "mean":
        return
    everything = config.scheme not in CHOOSING_SCHEMES
    places: list[tuple[str, int, int]] = []
    for index, c in enumerate(found):
        if everything:
            places += [("+", index, j) for j, ids in enumerate(c.positives) if ids]
            places += [("-", index, j) for j, ids in enumerate(c.negatives) if ids]
        else:
            positive, negative = int(plan.choice.positive[index]), int(plan.choice.negative[index])
            places += [("+", index, positive)] * (positive >= 0) + [("-", index, negative)] * (negative >= 0)
    questions = [found[index].row.question for _, index, _ in places]
    texts = [(found[i].positive_texts if side == "+" else found[i].negative_texts)[j] for side, i, j in places]
    scores = judge.score(questions, texts)
    plan.positive_score = torch.zeros(plan.positive_mask.shape, device=plan.positive_mask.device)
    plan.negative_score = torch.zeros(plan.negative_mask.shape, device=plan.negative_mask.device)
    for score, (side, index, j) in zip(scores.tolist(), places, strict=True):
        if side == "+":
            plan.positive_score[index, j] = score
            losses.positive_score += score
            losses.scored_positive += 1
        else:
            plan.negative_score[index, j] = score
            losses.negative_score += score
            losses.scored_negative += 1


def _gradient_items(config: ExperimentConfig, plan: Plan, found: list[Candidates]) -> list[Item]:
    """What the loss of each question is made of: its label, and its chosen rationales (all of them for the means)."""
    everything = config.is_contrastive and config.scheme not in CHOOSING_SCHEMES
    items = []
    for index, c in enumerate(found):
        items.append(Item(c.row.predict, [c.row.label], [(LABEL, index, 0)]))
        if everything:
            keys = [("+", index, j) for j, ids in enumerate(c.positives) if ids]
            keys += [("-", index, j) for j, ids in enumerate(c.negatives) if ids]
        else:
            positive, negative = int(plan.choice.positive[index]), int(plan.choice.negative[index])
            keys = [("+", index, positive)] * (positive >= 0) + [("-", index, negative)] * (negative >= 0)
        if keys:
            targets = [(c.positives if side == "+" else c.negatives)[j] for side, _, j in keys]
            items.append(Item(c.row.explain, targets, keys))
    return items


def _gradient_passes(student: Student, config: ExperimentConfig, items: list[Item]) -> list[list[Item]]:
    """The passes of a step. Where the tasks are coupled the labels come first: what is said of them is aimed at."""
    budget = config.train.tokens_per_pass
    if not config.couples_tasks:
        return cut_into_passes(student, items, budget, split=False)
    labels = [item for item in items if item.key[0][0] == LABEL]
    rationales = [item for item in items if item.key[0][0] != LABEL]
    return [p for group in (labels, rationales) for p in cut_into_passes(student, group, budget, split=False)]


class _PassTerms:
    """`Terms` of one pass. What a loss takes is added to the step's losses."""

    def __init__(
        self, config: ExperimentConfig, plan: Plan, items: list[Item], questions: int, losses: StepLosses
    ) -> None:
        """
        Args:
            questions: of the global batch.
        """
        self._config, self._plan, self._items, self._questions, self._losses = config, plan, items, questions, losses
        self._keys: list[Key] = [key for item in items for key in item.key]
        self._ce = torch.empty(0)
        self._peaks: dict[Key, Tensor] = {}

    def run(self, engine: TrainEngine) -> None:
        """Forward. A collective."""
        if not self._config.couples_tasks:
            self._ce = engine.forward(self._items)
            return
        wanted = [place for place, key in enumerate(self._keys) if key[0] in (LABEL, "+")]
        self._ce, peaks = engine.forward(self._items, peaks_of=wanted)
        self._peaks = {self._keys[place]: peak for place, peak in zip(wanted, peaks, strict=True)}
        for (kind, index, _), peak in self._peaks.items():
            if kind == LABEL:
                self._plan.label_peaks[index] = peak.detach()

    def label(self) -> Tensor:
        labels = [place for place, key in enumerate(self._keys) if key[0] == LABEL]
        loss = self._ce[labels].sum() / self._questions if labels else self._ce.sum() * 0.0
        self._losses.label += self._counted(loss)
        return loss

    def rationale(self) -> Tensor:
        ce, _ = self._grid("+")
        loss = ce.sum() / self._questions
        self._losses.positive += self._counted(loss)
        return loss

    def contrastive(self) -> Tensor:
        plan, weights = self._plan, self._config.loss
        (positive_ce, positive_mask), (negative_ce, negative_mask) = self._grid("+"), self._grid("-")
        choice = None
        if self._config.scheme in CHOOSING_SCHEMES:
            choice = Choice(
                torch.where(positive_mask.any(1), plan.choice.positive, -1),
                torch.where(negative_mask.any(1), plan.choice.negative, -1),
            )
        found = contrastive_loss(
            positive_ce,
            negative_ce,
            positive_mask,
            negative_mask,
            plan.positive_score,
            plan.negative_score,
            beta=weights.beta,
            margin=weights.margin,
            scheme=self._config.scheme,
            questions=self._questions,
            choice=choice,
        )
        self._losses.positive += self._counted(found.positive)
        self._losses.negative += self._counted(found.negative)
        self._losses.active += int(found.active_negatives.sum())
        return found.loss

    def mutual_information(self) -> Tensor:
        """A question's is the mean over the positives that it takes; with a choosing scheme there is one."""
        places = [key for key in self._keys if key[0] == "+"]
        if not places:
            return self._ce.sum() * 0.0
        of_question = Counter(index for _, index, _ in places)
        found = cross_entropy_of_peaks(
            torch.stack([self._peaks[key] for key in places]),
            torch.stack([self._plan.label_peaks[index] for _, index, _ in places]),
        )
        shares = found.new_tensor([1.0 / of_question[index] for _, index, _ in places])
        loss = (found * shares).sum() / self._questions
        self._losses.mutual_information += self._counted(loss)
        return loss

    def _counted(self, loss: Tensor) -> float:
        return float(loss.detach()) * self._questions

    def _grid(self, side: str) -> tuple[Tensor, Tensor]:
        """Cross-entropies and mask of the whole batch, cut down to what this pass holds; the rest is masked, adds 0."""
        whole = self._plan.positive_mask if side == "+" else self._plan.negative_mask
        here = [(place, key[1], key[2]) for place, key in enumerate(self._keys) if key[0] == side]
        grid, mask = self._ce.new_zeros(whole.shape), torch.zeros_like(whole)
        if here:
            at, rows, columns = (torch.tensor(values, device=self._ce.device) for values in zip(*here, strict=True))
            grid = grid.index_put((rows, columns), self._ce[at])
            mask[rows, columns] = True
        return grid, mask


def _mask(rows: list[list[bool]]) -> Tensor:
    width = max((len(row) for row in rows), default=0)
    padded = [row + [False] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.bool).reshape(len(rows), width)


def _none(count: int, device: torch.device) -> Tensor:
    return torch.full((count,), -1, dtype=torch.long, device=device)


def _dummy(student: Student) -> Item:
    return Item([student.tokenizer.end], [[student.tokenizer.end]])


def _most(count: int) -> int:
    """The largest of all ranks' counts, at least 1."""
    most = torch.tensor([max(count, 1)])
    if dist.get_world_size() > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)

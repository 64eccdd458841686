"""The discriminator beside the student: pretrained on the teacher's rationales, then learning online."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.models.discriminator import Discriminator
from qcrd_ray.objectives.discriminator import discriminator_loss
from qcrd_ray.rationales.augmentation import AUGMENTED
from qcrd_ray.rationales.order import DataOrder
from qcrd_ray.rationales.tables import open_rationale_table, rows_at
from qcrd_ray.run_folder import RunFolder
from qcrd_ray.tasks import get_task
from qcrd_ray.training.engine import TrainEngine

SETTLED = 0.95
SETTLED_STEPS = 10
ALIKE = 0.1


@dataclass(frozen=True)
class JudgedQuestion:
    """A question with rationales that are to score high and rationales that are to score low."""

    question: str
    positives: list[str]
    negatives: list[str]


@dataclass(frozen=True)
class JudgeUpdate:
    """Global means of one update: the loss, and the mean scores of both sides before it."""

    loss: float
    positive_score: float
    negative_score: float

    @property
    def scores_alike(self) -> bool:
        """Whether both sides score nearly the same, or the negatives higher: then the scores weigh nothing."""
        return self.positive_score - self.negative_score < ALIKE


class OnlineJudge:
    """The discriminator in an engine of its own, replicated on every rank (ZeRO 0, fp32)."""

    def __init__(self, discriminator: Discriminator, config: ExperimentConfig) -> None:
        self.config = config
        self.engine = TrainEngine(
            discriminator, lr=config.judge.lr, weight_decay=0.0, clip=1.0, zero_stage=0, precision="fp32"
        )
        self.discriminator = discriminator
        self.steps = 0
        self.pretrained_steps = 0
        self.reused = False
        """Whether it was pretrained by another run."""

    @property
    def updates(self) -> int:
        """Online updates, pretraining not counted."""
        return self.steps - self.pretrained_steps

    def score(self, questions: Sequence[str], rationales: Sequence[str]) -> Tensor:
        """Scores in [0, 1] of (question, rationale) pairs: [N] float32 on the CPU, no gradient."""
        return self.discriminator.score(questions, rationales, self.config.train.tokens_per_pass).cpu()

    def learning_rate(self, iteration: int) -> float:
        """Adam takes no notice of a factor on the loss, so α₃ 0.9^t of equation (8) scales its learning rate."""
        return self.config.judge.lr * self.alpha(iteration)

    def alpha(self, iteration: int) -> float:
        return self.config.loss.alpha_judge * self.config.loss.judge_decay**iteration

    def update(self, rows: Sequence[JudgedQuestion], lr: float) -> JudgeUpdate:
        """One optimizer step on equation (2) over all ranks' questions. A collective."""
        usable = [row for row in rows if row.positives and row.negatives]
        questions = int(_sum([float(len(usable))])[0])
        if questions == 0:
            return JudgeUpdate(0.0, math.nan, math.nan)
        # One question a pass of the encoder at least, so that a batch of long rationales fits into memory.
        size = max(1, self.config.train.tokens_per_pass // (self.config.judge.max_tokens * 4))
        groups = [usable[i : i + size] for i in range(0, len(usable), size)]
        total = int(_largest(len(groups)))
        self.engine.train()
        sums = [0.0] * 5
        for number in range(total):
            last = number == total - 1
            if number >= len(groups):
                self.engine.backward(self._scores([("", "")]).sum() * 0.0, last=last)
                continue
            loss, parts = self._loss(groups[number], questions)
            self.engine.backward(loss * dist.get_world_size(), last=last)
            sums = [a + b for a, b in zip(sums, parts, strict=True)]
        self.engine.step(lr)
        self.steps += 1
        loss_sum, positive, positives, negative, negatives = _sum(sums)
        return JudgeUpdate(loss_sum, _over(positive, positives), _over(negative, negatives))

    def _loss(self, rows: Sequence[JudgedQuestion], questions: int) -> tuple[Tensor, list[float]]:
        m, k = max(len(row.positives) for row in rows), max(len(row.negatives) for row in rows)
        positive_mask = torch.tensor([[j < len(row.positives) for j in range(m)] for row in rows])
        negative_mask = torch.tensor([[j < len(row.negatives) for j in range(k)] for row in rows])
        pairs = [(row.question, text) for row in rows for text in row.positives]
        count = len(pairs)
        pairs += [(row.question, text) for row in rows for text in row.negatives]
        scores = self._scores(pairs)
        positive_mask, negative_mask = positive_mask.to(scores.device), negative_mask.to(scores.device)
        positive = scores.new_zeros(len(rows), m).masked_scatter(positive_mask, scores[:count])
        negative = scores.new_zeros(len(rows), k).masked_scatter(negative_mask, scores[count:])
        loss = discriminator_loss(positive, negative, positive_mask, negative_mask, questions=questions)
        seen = scores.detach()
        sums = [float(seen[:count].sum()), float(count), float(seen[count:].sum()), float(len(pairs) - count)]
        return loss, [float(loss.detach()), *sums]

    def _scores(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        encoded = self.discriminator.encode_pairs([question for question, _ in pairs], [text for _, text in pairs])
        return self.engine.forward(encoded["input_ids"], encoded["attention_mask"])

    def pretrain(self, run: RunFolder, rank: int, world: int) -> JudgeUpdate | None:
        """Up to `judge.pretrain_steps` on the teacher's positives against its minority and corrupted positives (A.3).

        Ends early once the scores have been settled for some steps. The same questions whatever the number of ranks.

        Args:
            run: holds the rationale sets, and the corrupted positives unless `judge.augmentation` is none.
        """
        settings = self.config.judge
        table = open_rationale_table(run.table("train"))
        augmented_path = run.find_table(f"train.{AUGMENTED}")
        augmented = open_rationale_table(augmented_path) if augmented_path is not None else None
        order = DataOrder(table.num_rows, settings.pretrain_batch_size, self.config.train.seed + 1)
        task = get_task(self.config)
        update: JudgeUpdate | None = None
        settled = 0
        for step in range(settings.pretrain_steps):
            rows = []
            share = order.share(step, rank, world)
            filled = rows_at(augmented, share) if augmented is not None else [{"negatives": []}] * len(share)
            for record, corrupted in zip(rows_at(table, share), filled, strict=True):
                question = task.student_input(record["question"], record["choices"])
                negatives = record["negatives"] + corrupted["negatives"]
                rows.append(JudgedQuestion(question, record["positives"], negatives))
            update = self.update(rows, settings.lr)
            done = update.positive_score >= SETTLED and update.negative_score <= 1.0 - SETTLED
            settled = settled + 1 if done else 0
            if settled >= SETTLED_STEPS:
                break
        self.pretrained_steps = self.steps
        return update


def _over(total: float, count: float) -> float:
    return total / count if count else math.nan


def _sum(values: list[float]) -> list[float]:
    """Sums over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def _largest(value: int) -> int:
    tensor = torch.tensor([value])
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)

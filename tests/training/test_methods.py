"""Each method's loss and gradients on a fixed batch, against its formula computed by hand from a plain model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from qcrd_ray.config import ExperimentConfig, config_from_dict
from qcrd_ray.rationales.streaming import StepBatch, TrainingRow
from qcrd_ray.sampling.negatives import Negative
from qcrd_ray.seeding import stable_uniform
from qcrd_ray.training.engine import TrainEngine
from qcrd_ray.training.methods import METHODS
from qcrd_ray.training.step import candidates, train_on_batch
from tests.tiny_students import tiny_student

BATCH = 4
BETA, MARGIN = 0.3, 4.11  # near log 61: some negatives of an untrained student lie inside, others beyond
SEQUENCES = [[7, 11, 9, 1], [23, 5, 40, 33, 8, 1], [12, 1]]


def rows() -> list[TrainingRow]:
    """Four questions: of several positives, of one, of equal ones; the last has no rationale in its minority."""
    made = []
    for place in range(BATCH):
        positives = [[3 + place, *ids] for ids in SEQUENCES[: 1 + place % 3]] + [[3 + place, *SEQUENCES[0]]] * (
            place == 2
        )
        minority = [[50 - place, 4, 1], [41, 42, 43 + place, 1]][: 2 - place % 3]
        made.append(
            TrainingRow(
                row=place,
                id=f"q{place}",
                question=f"question {place}",
                predict=[2, 30 + place, 31],
                explain=[3, 30 + place, 31],
                label=[20 + place, 21, 1][place % 2 :],
                positives=positives,
                positive_texts=[f"positive {place} {index}" for index in range(len(positives))],
                minority=minority,
                minority_texts=[f"minority {place} {index}" for index in range(len(minority))],
                first=[9, 8 + place, 1],
                first_text="first",
                cut_prompts=0,
                cut_targets=0,
            )
        )
    return made


SAMPLED = [[[13, 14, 15, 1], []], [[16, 1]], [], [[17, 18, 1], [19, 1], [13, 1]]]
"""Negatives of the four questions. One is empty, one question has none."""


class ByLength:
    """A judge of fixed scores: what is tested is where a score goes. (Its learning has tests of its own.)"""

    def score(self, questions: list[str], texts: list[str]) -> Tensor:
        return torch.tensor([self.of(question, text) for question, text in zip(questions, texts, strict=True)])

    @staticmethod
    def of(question: str, text: str) -> float:
        return 0.05 + 0.9 * (sum(map(ord, question + text)) % 17) / 17


@dataclass
class Naive:
    """What a plain transformers model says, one prompt and one target at a time."""

    model: Any
    cache: dict[Any, Tensor] = field(default_factory=dict)

    def logits(self, prompt: list[int], target: list[int]) -> Tensor:
        key = (tuple(prompt), tuple(target))
        if key not in self.cache:
            if self.model.config.is_encoder_decoder:
                out = self.model(input_ids=torch.tensor([prompt]), labels=torch.tensor([target])).logits[0]
            else:
                out = self.model(input_ids=torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
            self.cache[key] = out
        return self.cache[key]

    def ce(self, prompt: list[int], target: list[int]) -> Tensor:
        probabilities = self.logits(prompt, target).softmax(-1)
        return -torch.stack([probabilities[at, token].log() for at, token in enumerate(target)]).mean()

    def mutual_information(self, row: TrainingRow, rationale: list[int]) -> Tensor:
        """Chen et al. 2024 as their code has it: a cross-entropy whose logits are softmaxed already."""
        p = self.logits(row.explain, rationale).softmax(-1).max(0).values
        q = self.logits(row.predict, row.label).softmax(-1).max(0).values.detach()
        return -(q * (p.exp() / p.exp().sum()).log()).sum()


def by_hand(config: ExperimentConfig, model: Any) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """(loss, its part of the mutual information) of the batch: equations (3) to (8), and the baselines; (questions with
    a negative, those of them whose negative, for the means any, lies within the margin)."""
    naive, alpha, total, coupled = Naive(model), 0.5, torch.zeros(()), torch.zeros(())
    with_negative = active = 0
    judged = config.judge.enabled
    for row, sampled in zip(rows(), SAMPLED, strict=True):
        total = total + alpha * naive.ce(row.predict, row.label)
        if config.method in ("finetune", "single_task"):
            continue
        if config.method in ("dss", "mi"):
            total = total + alpha * naive.ce(row.explain, row.first)
            coupled = coupled + naive.mutual_information(row, row.first) * (config.method == "mi")
            continue
        negatives = [(ids, f"negative {index}") for index, ids in enumerate(sampled) if ids]
        if config.negatives.source == "none":
            negatives = []
        if config.negatives.source.endswith("self_consistency"):
            negatives += list(zip(row.minority, row.minority_texts, strict=True))
        positives = list(zip(row.positives, row.positive_texts, strict=True))
        near = [(naive.ce(row.explain, ids), ByLength.of(row.question, text)) for ids, text in positives]
        far = [(naive.ce(row.explain, ids), 1 - ByLength.of(row.question, text)) for ids, text in negatives]
        low = min(range(len(near)), key=lambda i: float(near[i][0]))
        high = max(range(len(near)), key=lambda i: float(near[i][0]))
        near_at = {"min_max": [low], "max_min": [high]}.get(config.scheme, list(range(len(near))))
        far_at = list(range(len(far)))
        if config.scheme == "sampling":
            drawn = [stable_uniform(config.train.seed, "choice", 0, row.id, side) for side in ("+", "-")]
            near_at, far_at = [int(drawn[0] * len(near))], [int(drawn[1] * len(far))] if far else []
        if config.scheme in ("min_max", "max_min") and far:
            far_at = [(max if config.scheme == "min_max" else min)(far_at, key=lambda i: float(far[i][0]))]
        weighted = judged and config.scheme != "mean"
        positive = sum(near[i][0] * (near[i][1] if weighted else 1) for i in near_at) / len(near_at)
        negative = torch.zeros(())
        if far_at:
            beyond = [(far[i][0] - MARGIN).clamp(max=0) * (far[i][1] if weighted else 1) for i in far_at]
            negative = torch.stack(beyond).sum() / len(far_at)
            with_negative += 1
            active += any(float(far[i][0]) < MARGIN for i in far_at)
        total = total + alpha * (positive - BETA * negative)
        if config.method == "mi+qcrd":
            coupled = coupled + sum(naive.mutual_information(row, row.positives[i]) for i in near_at) / len(near_at)
    loss = (total + config.loss.alpha_mutual_information * coupled) / BATCH
    return loss, coupled / BATCH, (with_negative, active)


CASES: list[dict[str, Any]] = [
    {"method": "finetune"},
    {"method": "single_task"},
    {"method": "dss"},
    {"method": "mi"},
    {"method": "mi", "loss": {"alpha_mutual_information": 3.0}},
    {"method": "qcrd"},
    {"method": "mi+qcrd"},
    {"method": "qcrd", "scheme": "max_min"},
    {"method": "qcrd", "scheme": "sampling"},
    {"method": "qcrd", "scheme": "mean"},
    {"method": "qcrd", "scheme": "weighted_mean"},
    {"method": "mi+qcrd", "scheme": "weighted_mean"},
    {"method": "qcrd", "negatives": {"source": "none"}},
    {"method": "qcrd", "negatives": {"source": "self_consistency"}},
    {"method": "qcrd", "negatives": {"source": "lagged+self_consistency"}},
    {"method": "qcrd", "judge": {"enabled": False}},
    {"method": "qcrd", "judge": {"enabled": False}, "negatives": {"source": "none"}},
]


def config_of(case: dict[str, Any], **train: Any) -> ExperimentConfig:
    loss = {"beta": BETA, "margin": MARGIN, **case.get("loss", {})}
    return config_from_dict({**case, "loss": loss, "train": {"precision": "fp32", "tokens_per_pass": 40, **train}})


def trained(
    family: str, config: ExperimentConfig, questions: list[TrainingRow] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """The losses of one step on the batch, and its gradients."""
    network = tiny_student(family)
    engine = TrainEngine(network, lr=1e-3, weight_decay=0.0, clip=0.0, zero_stage=0, precision="fp32")
    questions = questions or rows()
    sampled = [
        [Negative(ids, f"negative {index}", 0) for index, ids in enumerate(found)] if config.sampled_negatives else []
        for found in SAMPLED
    ]
    judge: Any = ByLength() if config.judge.enabled else None
    found = candidates(config, questions, sampled)
    losses = train_on_batch(engine, config, StepBatch(0, 0, BATCH, questions), found, judge)
    return losses, {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_a_method_gives_the_loss_of_its_formula(case: dict[str, Any], family: str, one_rank: None) -> None:
    config = config_of(case)
    losses, gradients = trained(family, config)
    network = tiny_student(family)
    expected, coupled, negatives = by_hand(config, network.model)
    expected.backward()
    assert (losses.with_negative, losses.active) == negatives
    assert losses.total / BATCH == pytest.approx(expected.item(), abs=1e-5)
    assert losses.mutual_information / BATCH == pytest.approx(coupled.item(), abs=1e-5)
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, atol=2e-6, rtol=1e-4), name


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_pass_budget_changes_nothing(method: str, family: str, one_rank: None) -> None:
    small, small_gradients = trained(family, config_of({"method": method}, tokens_per_pass=1))
    large, large_gradients = trained(family, config_of({"method": method}, tokens_per_pass=10_000))
    assert small.passes > large.passes
    assert small.total == pytest.approx(large.total, abs=1e-5)
    assert all(torch.allclose(small_gradients[name], g, atol=2e-6) for name, g in large_gradients.items())


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_qcrd_with_all_of_it_off_is_dss_to_the_digit(family: str, one_rank: None) -> None:
    off = {"method": "qcrd", "positives": "first", "negatives": {"source": "none"}, "judge": {"enabled": False}}
    alone = [  # what positives=first makes of the tables
        TrainingRow(**{**row.__dict__, "positives": [row.first], "positive_texts": [row.first_text], "minority": [],
                       "minority_texts": []})
        for row in rows()
    ]  # fmt: skip
    ours, our_gradients = trained(family, config_of(off), alone)
    dss, dss_gradients = trained(family, config_of({"method": "dss"}), rows())
    assert ours.vector() == dss.vector()
    assert all(torch.equal(our_gradients[name], gradient) for name, gradient in dss_gradients.items())


def test_every_method_of_the_config_is_there() -> None:
    from typing import get_args

    from qcrd_ray.config import MethodName

    assert set(METHODS) == set(get_args(MethodName))

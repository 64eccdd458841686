"""`train.choice_interval`: what a question keeps, for how long, and what a step makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qcrd_ray.errors import UserError
from qcrd_ray.rationales.streaming import StepBatch
from qcrd_ray.training.engine import TrainEngine
from qcrd_ray.training.kept_choices import NONE, KeptChoices
from qcrd_ray.training.step import StepLosses, candidates, train_on_batch
from tests.tiny_students import tiny_student
from tests.training.test_methods import BATCH, config_of, rows


@pytest.mark.usefixtures("one_rank")
def test_a_choice_is_kept_for_the_iterations_asked_for() -> None:
    kept = KeptChoices(2, 5)
    assert kept.of(3, 7) == NONE
    kept.keep([3, 1], [2, NONE], 7, 2)
    assert [kept.of(3, iteration) for iteration in (7, 8, 9)] == [2, 2, NONE]
    assert kept.of(1, 7) == kept.of(0, 7) == NONE
    kept.keep([3], [0], 9, 1)
    assert [kept.of(3, iteration) for iteration in (9, 10, 11)] == [0, 0, NONE]


@pytest.mark.usefixtures("one_rank")
def test_a_checkpoint_holds_them(tmp_path: Path) -> None:
    kept = KeptChoices(4, 6)
    kept.keep([5, 2], [1, 0], 3, 2)
    kept.save(tmp_path)
    restored = KeptChoices(4, 6)
    restored.restore(tmp_path)
    assert [restored.of(row, 4) for row in range(6)] == [kept.of(row, 4) for row in range(6)]
    with pytest.raises(UserError, match="of another training table"):
        KeptChoices(4, 7).restore(tmp_path)
    with pytest.raises(UserError, match="missing"):
        KeptChoices(4, 6).restore(tmp_path / "none")


class Watched:
    """An engine that notes how many rationales its passes without gradients look at."""

    def __init__(self, family: str) -> None:
        self.engine = TrainEngine(
            tiny_student(family), lr=1e-3, weight_decay=0.0, clip=0.0, zero_stage=0, precision="fp32"
        )
        self.looked_at = 0

    @property
    def gradients(self) -> list[torch.Tensor]:
        return [weight.grad for weight in self.engine.parameters if weight.grad is not None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def forward(self, items: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            self.looked_at += sum(len(item.targets) for item in items)
        return self.engine.forward(items, **options)


def one_step(family: str, kept: KeptChoices | None, step: int = 0) -> tuple[StepLosses, Watched]:
    config = config_of({"method": "qcrd", "judge": {"enabled": False}, "negatives": {"source": "none"}})
    engine, questions = Watched(family), rows()
    found = candidates(config, questions, [[] for _ in questions])
    losses = train_on_batch(engine, config, StepBatch(step, 0, BATCH, questions), found, None, kept)  # type: ignore[arg-type]
    return losses, engine


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.usefixtures("one_rank")
def test_a_kept_positive_is_trained_on_without_another_look(family: str) -> None:
    kept = KeptChoices(1, BATCH)
    first, engine = one_step(family, kept)
    assert engine.looked_at > 0 and first.choices_kept == 0
    again, engine_again = one_step(family, kept)
    several = sum(len(row.positives) > 1 for row in rows())
    assert engine_again.looked_at <= 1  # a pass of every rank, whether it has something to look at or not
    assert again.choices_kept == several
    assert again.total == pytest.approx(first.total, abs=1e-6)
    assert len(engine.gradients) > 10
    torch.testing.assert_close(engine_again.gradients, engine.gradients, atol=1e-6, rtol=1e-4)

    several_iterations = KeptChoices(2, BATCH)
    looks = [one_step(family, several_iterations, step=100 * iteration)[1].looked_at for iteration in range(5)]
    assert [look > 1 for look in looks] == [True, False, True, False, True]

    best = [int(column) for column in kept.column]
    other = next(row for row in rows() if len(set(map(tuple, row.positives))) > 1)
    kept.keep([other.row], [1 - min(best[other.row], 1)], 0, 1)
    worse, _ = one_step(family, kept)
    assert worse.positive > first.positive + 1e-4
    later, engine = one_step(family, kept, step=100)  # the next iteration: chosen anew
    assert engine.looked_at > 1 and later.total == pytest.approx(first.total, abs=1e-6)
    assert [int(column) for column in kept.column] == best

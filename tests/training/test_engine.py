"""One module under DeepSpeed, on one rank."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from qcrd_ray.models.student import Item
from qcrd_ray.training.engine import TrainEngine
from tests.tiny_students import tiny_student

ITEMS = [Item([5, 6, 7], [[8, 9, 1], [10, 1]]), Item([11, 12], [[13, 14, 15, 16, 1]])]


def engine_of(student: Any, stage: int, precision: str) -> TrainEngine:
    return TrainEngine(student, lr=1e-3, weight_decay=0.0, clip=1.0, zero_stage=stage, precision=precision)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16")])
@pytest.mark.usefixtures("one_rank")
def test_the_norm_of_the_gradient_is_that_of_all_its_numbers(
    stage: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcrd_ray.training.engine.IN_CACHE", 100)
    student = tiny_student("llama")
    alone = copy.deepcopy(student).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    (1000 * alone(ITEMS).sum()).backward()
    gradients = torch.cat([weight.grad.flatten() for weight in alone.parameters() if weight.grad is not None])
    engine = engine_of(student, stage, precision)
    engine.backward(1000 * engine.forward(ITEMS).sum(), last=True)
    assert engine.step(1e-3) == pytest.approx(float(gradients.double().norm()), rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.usefixtures("one_rank")
def test_a_gradient_that_is_no_number_changes_no_weight(stage: int) -> None:
    engine = engine_of(tiny_student("llama"), stage, "bf16")
    before = [weight.detach().clone() for weight in engine.module.parameters()]
    engine.backward(engine.forward(ITEMS).sum() * float("nan"), last=True)
    engine.step(1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.usefixtures("one_rank")
def test_updates_are_those_of_adamw_on_float32_masters(stage: int) -> None:
    """Three steps of two passes each."""
    student = tiny_student("llama").to(torch.bfloat16)
    alone = copy.deepcopy(student)
    masters = [weight.detach().float() for weight in alone.parameters()]
    adam = torch.optim.AdamW(masters, lr=1e-2, weight_decay=0.1)
    engine = TrainEngine(student, lr=1e-2, weight_decay=0.1, clip=1e9, zero_stage=stage, precision="bf16")
    for number in range(3):
        alone.zero_grad()
        for items, last in ((ITEMS, False), (ITEMS[1:], True)):
            engine.backward(engine.forward(items).sum(), last=last)
            alone(items).sum().backward()
        engine.step(1e-2 / (1 + number))
        for master, weight in zip(masters, alone.parameters(), strict=True):
            master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()
        adam.param_groups[0]["lr"] = 1e-2 / (1 + number)
        adam.step()
        for master, weight in zip(masters, alone.parameters(), strict=True):
            weight.data.copy_(master)
    held = {name: tensors["weight"] for name, tensors in engine.full_state()}
    for (name, weight), master, own in zip(alone.named_parameters(), masters, engine.module.parameters(), strict=True):
        torch.testing.assert_close(held[name], master, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own, weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e9])
@pytest.mark.usefixtures("one_rank")
def test_gradients_are_clipped_by_their_norm(clip: float) -> None:
    """Adam's first moment is a tenth of the first gradient, as it was clipped."""
    student = tiny_student("llama")
    alone = copy.deepcopy(student)
    alone(ITEMS).sum().backward()
    [expected] = [
        w.grad for name, w in alone.named_parameters() if name.endswith("norm.weight") and "layers" not in name
    ]
    norm = torch.nn.utils.get_total_norm([w.grad for w in alone.parameters() if w.grad is not None])
    for stage in (0, 1):
        engine = TrainEngine(
            copy.deepcopy(student), lr=1e-3, weight_decay=0.0, clip=clip, zero_stage=stage, precision="fp32"
        )
        engine.backward(engine.forward(ITEMS).sum(), last=True)
        engine.step(1e-3)
        moments = next(t["exp_avg"] for name, t in engine.full_state() if name.endswith("model.norm.weight"))
        factor = min(1.0, clip / float(norm)) if clip else 1.0
        torch.testing.assert_close(moments, 0.1 * factor * expected, rtol=1e-4, atol=1e-7)

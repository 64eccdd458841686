import math

import numpy as np
import pytest
import torch
from torch import nn

from qcrd_ray.objectives.contrastive import contrastive_loss
from qcrd_ray.objectives.discriminator import discriminator_loss, questions_with_both


def reference(positive, negative, positive_mask, negative_mask, divisor=None):
    """Equation (2), question by question."""
    parts = []
    for row in range(len(positive)):
        above = [math.exp(s) for s, valid in zip(positive[row], positive_mask[row], strict=True) if valid]
        below = [math.exp(s) for s, valid in zip(negative[row], negative_mask[row], strict=True) if valid]
        if above and below:
            parts.append(-math.log(sum(above) / sum(below)))
    return sum(parts) / (divisor or max(len(parts), 1))


def random_case(seed):
    rng = np.random.default_rng(seed)
    batch, m, k = int(rng.integers(1, 7)), int(rng.integers(0, 5)), int(rng.integers(0, 5))
    arrays = []
    for width in (m, k):
        score, mask = rng.random((batch, width)), rng.random((batch, width)) < 0.6
        score[~mask] = rng.choice([math.nan, math.inf, -math.inf, 1e30], size=int((~mask).sum()))
        arrays.append((score, mask))
    return arrays[0][0], arrays[1][0], arrays[0][1], arrays[1][1]


def test_agrees_with_the_slow_reference_under_any_mask():
    for seed in range(300):
        case = random_case(seed)
        tensors = [torch.tensor(array) for array in case]
        tensors[0].requires_grad_()
        tensors[1].requires_grad_()
        loss = discriminator_loss(*tensors)
        assert loss.dtype == torch.float64
        assert float(loss.detach()) == pytest.approx(reference(*case), abs=1e-10)
        assert float(discriminator_loss(*tensors, questions=9).detach()) == pytest.approx(
            reference(*case, divisor=9), abs=1e-10
        )
        loss.backward()
        for tensor, mask in zip(tensors[:2], case[2:], strict=True):
            assert torch.isfinite(tensor.grad).all()
            assert (tensor.grad.numpy()[~mask] == 0.0).all()


def test_gradcheck():
    torch.manual_seed(1)
    positive = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    negative = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    positive_mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    negative_mask = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(
        lambda p, n: discriminator_loss(p, n, positive_mask, negative_mask), (positive, negative)
    )


@pytest.mark.parametrize("shape", [(2, 3, 2), (2, 0, 2), (2, 3, 0), (2, 0, 0), (0, 1, 1)])
def test_no_question_with_both_gives_a_zero_that_can_be_differentiated(shape):
    batch, m, k = shape
    source = torch.zeros((), requires_grad=True)
    loss = discriminator_loss(
        torch.full((batch, m), math.nan) + source,
        torch.rand(batch, k) + source,
        torch.zeros(batch, m, dtype=torch.bool),
        torch.ones(batch, k, dtype=torch.bool),
    )
    loss.backward()
    assert float(loss.detach()) == 0.0 and float(source.grad) == 0.0


def test_parts_of_a_batch_add_up_to_the_whole():
    for seed in range(50):
        tensors = [torch.tensor(array) for array in random_case(seed)]
        count = int(questions_with_both(tensors[2], tensors[3]).sum())
        if count == 0:
            continue
        cut = tensors[0].shape[0] // 2
        parts = [
            discriminator_loss(*[tensor[rows] for tensor in tensors], questions=count)
            for rows in (slice(0, cut), slice(cut, None))
        ]
        assert float(sum(parts)) == pytest.approx(float(discriminator_loss(*tensors)), abs=1e-12)


def test_shapes_are_checked():
    score, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(1, 3\)"):
        discriminator_loss(score, score[:1], mask, mask[:1])
    with pytest.raises(ValueError, match=r"negative_mask: expected shape \(2, 3\), found \(2, 2\)"):
        discriminator_loss(score, score, mask, mask[:, :2])
    with pytest.raises(ValueError, match="torch.bool"):
        discriminator_loss(score, score, mask.float(), mask)


def test_one_step_parts_the_scores_and_leaves_the_student_alone():
    torch.manual_seed(0)
    student, judge = nn.Linear(6, 1), nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid())
    positives, negatives = torch.randn(5, 2, 6) + 1.0, torch.randn(5, 3, 6) - 1.0
    positive_mask, negative_mask = torch.ones(5, 2, dtype=torch.bool), torch.ones(5, 3, dtype=torch.bool)

    def scores():
        return judge(positives)[..., 0], judge(negatives)[..., 0]

    positive_score, negative_score = scores()
    discriminator_loss(positive_score, negative_score, positive_mask, negative_mask).backward()
    torch.optim.SGD(judge.parameters(), lr=0.5).step()
    new_positive, new_negative = scores()
    assert (new_positive > positive_score).all() and (new_negative < negative_score).all()
    assert all(parameter.grad is None for parameter in student.parameters())

    judge.zero_grad(set_to_none=True)
    total = (
        contrastive_loss(
            student(positives)[..., 0].abs(), student(negatives)[..., 0].abs(), positive_mask, negative_mask, *scores()
        ).loss
        + discriminator_loss(*scores(), positive_mask, negative_mask) * 0.0
    )
    total.backward()
    assert all((parameter.grad == 0).all() for parameter in judge.parameters())
    assert any((parameter.grad != 0).any() for parameter in student.parameters())

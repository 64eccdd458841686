import math

import numpy as np
import pytest
import torch

from qcrd_ray.objectives.mutual_information import mutual_information_loss


def reference(rationale, label, rationale_mask, label_mask):
    """A tenth of the cross-entropy between the highest probabilities of each word, question by question."""

    def highest(logits, mask):
        best = np.zeros(logits.shape[-1])
        for position in np.flatnonzero(mask):
            shifted = np.exp(logits[position] - logits[position].max())
            best = np.maximum(best, shifted / shifted.sum())
        return best

    total = 0.0
    for row in range(len(rationale)):
        if rationale_mask[row].any() and label_mask[row].any():
            p, q = highest(rationale[row], rationale_mask[row]), highest(label[row], label_mask[row])
            total -= float((q * (p - math.log(np.exp(p).sum()))).sum())
    return 0.1 * total / len(rationale)


def random_case(seed):
    rng = np.random.default_rng(seed)
    batch, vocabulary = int(rng.integers(1, 5)), int(rng.integers(2, 9))
    sides = []
    for longest in (6, 3):
        length = int(rng.integers(0, longest))
        logits, mask = rng.normal(0, 3, (batch, length, vocabulary)), rng.random((batch, length)) < 0.7
        logits[~mask] = math.nan
        sides.append((logits, mask))
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


def test_agrees_with_the_slow_reference_and_keeps_padding_out():
    for seed in range(100):
        case = random_case(seed)
        tensors = [torch.tensor(array) for array in case]
        rationale, label = tensors[0].requires_grad_(), tensors[1].requires_grad_()
        loss = mutual_information_loss(*tensors)
        assert float(loss.detach()) == pytest.approx(reference(*case), abs=1e-10)
        loss.backward()
        assert label.grad is None
        assert torch.isfinite(rationale.grad).all() and (rationale.grad.numpy()[~case[2]] == 0.0).all()


def test_equals_the_published_form_without_padding():
    torch.manual_seed(0)
    rationale, label = torch.randn(3, 5, 7), torch.randn(3, 2, 7)
    published = torch.nn.CrossEntropyLoss()(rationale.softmax(-1).amax(-2), label.softmax(-1).amax(-2))
    ours = mutual_information_loss(
        rationale, label, torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool)
    )
    assert float(ours) == pytest.approx(0.1 * float(published), abs=1e-6)


def test_gradcheck_and_shapes():
    torch.manual_seed(0)
    rationale, label = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 5).double()
    rationale_mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    label_mask = torch.ones(2, 3, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x: mutual_information_loss(x, label, rationale_mask, label_mask), rationale)
    with pytest.raises(ValueError, match="rationale_mask: expected shape"):
        mutual_information_loss(rationale, label, rationale_mask[:, :3], label_mask)
    with pytest.raises(ValueError, match="of one B and V"):
        mutual_information_loss(rationale, label[..., :4], rationale_mask, label_mask)

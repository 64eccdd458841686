"""The cross-entropy over a vocabulary: PyTorch's values and gradients, without its copies of the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qcrd_ray.models import cross_entropy
from qcrd_ray.models.cross_entropy import token_cross_entropy


def head_and_hidden(dtype: torch.dtype, tokens: int, words: int = 41) -> tuple[torch.nn.Linear, Tensor, Tensor]:
    torch.manual_seed(3)
    head = torch.nn.Linear(6, words, bias=False).to(dtype)
    return head, (4 * torch.randn(tokens, 6)).to(dtype).requires_grad_(), torch.randint(0, words, (tokens,))


@pytest.mark.parametrize("in_cache", [1, 41, 3 * 41, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients_are_pytorch_s(dtype: torch.dtype, in_cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "IN_CACHE", in_cache)
    head, hidden, targets = head_and_hidden(dtype, tokens=7)
    weights = torch.linspace(-1.0, 2.0, 7)  # 0 and negative ones among them, as of a negative rationale
    logits = head(hidden)
    expected = F.cross_entropy(logits if dtype == torch.float64 else logits.float(), targets, reduction="none")
    wanted = torch.autograd.grad((expected * weights).sum(), [hidden, head.weight])

    found = token_cross_entropy(head, hidden, targets)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    gradients = torch.autograd.grad((found * weights).sum(), [hidden, head.weight])
    for gradient, right in zip(gradients, wanted, strict=True):
        # In bfloat16 a gradient of a logit may be rounded the other way.
        tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(gradient, right, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(token_cross_entropy(head, hidden, targets), found.detach(), rtol=0, atol=0)


def test_logits_of_huge_size_stay_finite() -> None:
    head, hidden, targets = head_and_hidden(torch.float32, tokens=5)
    found = token_cross_entropy(lambda states: 1e4 * head(states), hidden, targets)
    found.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all() and found.isfinite().all()


def test_nothing_is_kept_but_the_logits_as_the_head_gives_them() -> None:
    head, hidden, targets = head_and_hidden(torch.bfloat16, tokens=64, words=1000)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_cross_entropy(head, hidden, targets)
    small = sum(tensor.untyped_storage().nbytes() for tensor in (hidden, head.weight, targets))
    assert sum(kept.values()) == 64 * 1000 * 2 + small


def test_a_second_backward_pass_is_refused() -> None:
    head, hidden, targets = head_and_hidden(torch.float32, tokens=3)
    loss = token_cross_entropy(head, hidden, targets).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()

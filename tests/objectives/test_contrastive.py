import math

import numpy as np
import pytest
import torch
from torch import nn

from qcrd_ray.objectives.contrastive import CHOOSING_SCHEMES, SCHEMES, Choice, choose, contrastive_loss

GARBAGE = [float("nan"), float("inf"), float("-inf"), -1e30, 7.0]


def reference(case, beta, margin, scheme, divisor):
    """Equations (3) to (7) and section 5.1, question by question, in plain Python floats."""
    total_positive = total_negative = 0.0
    chosen = [], []
    active = []
    for row in range(len(case["positive_ce"])):
        sides = []
        for side, name in enumerate(("positive", "negative")):
            ce, mask, score = case[f"{name}_ce"][row], case[f"{name}_mask"][row], case[f"{name}_score"]
            valid = [i for i in range(len(mask)) if mask[i]]
            s = {i: 1.0 if score is None else float(score[row][i]) for i in valid}
            if name == "negative":
                weight = {i: 1.0 if score is None else 1.0 - s[i] for i in valid}
                value = {i: min(float(ce[i]) - margin, 0.0) for i in valid}
            else:
                weight, value = s, {i: float(ce[i]) for i in valid}
            wants_least = (scheme == "min_max") == (name == "positive")
            pick = -1
            part = 0.0
            if valid and scheme in ("min_max", "max_min"):
                pick = valid[0]
                for i in valid[1:]:
                    if (ce[i] < ce[pick]) if wants_least else (ce[i] > ce[pick]):
                        pick = i
            elif valid and scheme == "sampling":
                pick = valid[math.floor(float(case["uniforms"][row][side]) * len(valid))]
            elif valid and scheme == "mean":
                part = sum(value.values()) / len(valid)
            elif valid and scheme == "weighted_mean":
                part = sum(weight[i] * value[i] for i in valid) / len(valid)
            if pick >= 0:
                part = weight[pick] * value[pick]
            sides.append(part)
            chosen[side].append(pick)
            if name == "negative":
                looked_at = [pick] if pick >= 0 else [] if scheme in CHOOSING_SCHEMES else valid
                active.append(any(ce[i] < margin for i in looked_at))
        total_positive += sides[0]
        total_negative += sides[1]
    positive, negative = total_positive / divisor, total_negative / divisor
    return positive - beta * negative, positive, negative, chosen[0], chosen[1], active


def random_case(seed):
    rng = np.random.default_rng(seed)
    batch, m, k = int(rng.integers(1, 7)), int(rng.integers(0, 6)), int(rng.integers(0, 4))
    case = {"uniforms": rng.random((batch, 2))}
    with_scores = rng.random() < 0.6
    for name, width in (("positive", m), ("negative", k)):
        ce = rng.uniform(0.0, 6.0, (batch, width))
        if rng.random() < 0.3:
            ce = np.round(ce)  # ties, and values on the margin
        mask = rng.random((batch, width)) < 0.7
        mask[rng.random(batch) < 0.15] = False
        score = rng.random((batch, width))
        for array in (ce, score):
            array[~mask] = rng.choice(GARBAGE, size=int((~mask).sum()))
        case |= {f"{name}_ce": ce, f"{name}_mask": mask, f"{name}_score": score if with_scores else None}
    return case


def as_tensors(case, dtype=torch.float64):
    return [
        None if case[name] is None else torch.tensor(case[name], dtype=torch.bool if "mask" in name else dtype)
        for name in (
            "positive_ce",
            "negative_ce",
            "positive_mask",
            "negative_mask",
            "positive_score",
            "negative_score",
        )
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_agrees_with_the_slow_reference(scheme):
    compared = 0
    for seed in range(200):
        case = random_case(seed)
        if scheme == "weighted_mean" and case["positive_score"] is None:
            continue
        tensors = as_tensors(case)
        uniforms = torch.tensor(case["uniforms"])
        batch = len(case["uniforms"])
        for divisor in (None, batch + 3):
            got = contrastive_loss(*tensors, beta=0.3, margin=3.0, scheme=scheme, uniforms=uniforms, questions=divisor)
            want = reference(case, 0.3, 3.0, scheme, divisor or batch)
            assert [float(x) for x in (got.loss, got.positive, got.negative)] == pytest.approx(want[:3], abs=1e-10)
            assert got.chosen_positive.tolist() == want[3]
            assert got.chosen_negative.tolist() == want[4]
            assert got.active_negatives.tolist() == want[5]
            assert got.loss.dtype == torch.float64 and got.loss.ndim == 0
            assert float(got.negative) <= 0.0
            compared += 1
    assert compared >= 200


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float32_agrees_too(scheme):
    for seed in range(40):
        case = random_case(seed)
        if scheme == "weighted_mean" and case["positive_score"] is None:
            continue
        got = contrastive_loss(*as_tensors(case, torch.float32), scheme=scheme, uniforms=torch.tensor(case["uniforms"]))
        want = reference(case, 0.2, 3.0, scheme, len(case["uniforms"]))
        assert got.loss.dtype == torch.float32
        assert float(got.loss) == pytest.approx(want[0], abs=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_exact_and_reach_neither_scores_nor_masked_entries(scheme):
    for seed in range(60):
        case = random_case(seed)
        tensors = as_tensors(case)
        if scheme == "weighted_mean" and tensors[4] is None:
            continue
        for tensor in (*tensors[:2], *tensors[4:]):
            if tensor is not None:
                tensor.requires_grad_()
        result = contrastive_loss(
            *tensors, beta=0.2, margin=3.0, scheme=scheme, uniforms=torch.tensor(case["uniforms"])
        )
        result.loss.backward()
        for score in tensors[4:]:
            assert score is None or score.grad is None
        batch = len(case["uniforms"])
        chosen = result.chosen_positive, result.chosen_negative
        for side, name in enumerate(("positive", "negative")):
            ce, mask, score = case[f"{name}_ce"], case[f"{name}_mask"], case[f"{name}_score"]
            want = np.zeros_like(ce)
            for row in range(batch):
                for column in np.flatnonzero(mask[row]):
                    if scheme in CHOOSING_SCHEMES and chosen[side][row] != column:
                        continue
                    weight = 1.0 if score is None or scheme == "mean" else score[row, column]
                    if scheme not in CHOOSING_SCHEMES:
                        share = 1.0 / mask[row].sum()
                    else:
                        share = 1.0
                    if name == "negative":
                        weight = 1.0 if score is None or scheme == "mean" else 1.0 - weight
                        weight = -0.2 * weight if ce[row, column] < 3.0 else 0.0
                    want[row, column] = weight * share / batch
            gradient = tensors[side].grad.numpy()
            np.testing.assert_allclose(gradient, want, atol=1e-12)
            assert (gradient[~mask] == 0.0).all()


@pytest.mark.parametrize(
    ("scheme", "with_scores"), [(s, True) for s in SCHEMES] + [(s, False) for s in SCHEMES if s != "weighted_mean"]
)
def test_gradcheck(scheme, with_scores):
    torch.manual_seed(3)
    positive = (torch.rand(4, 3, dtype=torch.float64) * 5).requires_grad_()
    negative = (torch.rand(4, 2, dtype=torch.float64) * 5).requires_grad_()
    positive_mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    negative_mask = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0]], dtype=torch.bool)
    scores = (torch.rand(4, 3).double(), torch.rand(4, 2).double()) if with_scores else (None, None)
    uniforms = torch.rand(4, 2)

    def loss(p, n):
        return contrastive_loss(p, n, positive_mask, negative_mask, *scores, scheme=scheme, uniforms=uniforms).loss

    assert torch.autograd.gradcheck(loss, (positive, negative))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_parts_of_a_batch_add_up_to_the_whole(scheme):
    for seed in range(30):
        case = random_case(seed)
        tensors = as_tensors(case)
        if scheme == "weighted_mean" and tensors[4] is None:
            continue
        uniforms = torch.tensor(case["uniforms"])
        batch = len(uniforms)
        whole = contrastive_loss(*tensors, scheme=scheme, uniforms=uniforms)
        cut = batch // 2  # with one question, the first rank has none
        parts = [
            contrastive_loss(
                *[None if tensor is None else tensor[rows] for tensor in tensors],
                scheme=scheme,
                uniforms=uniforms[rows],
                questions=batch,
            )
            for rows in (slice(0, cut), slice(cut, batch))
        ]
        for name in ("loss", "positive", "negative"):
            assert float(sum(getattr(part, name) for part in parts)) == pytest.approx(
                float(getattr(whole, name)), abs=1e-12
            )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 0, 2), (3, 2, 0), (3, 0, 0), (0, 2, 2)])
def test_nothing_valid_gives_a_zero_that_can_be_differentiated(scheme, shape):
    batch, m, k = shape
    source = torch.zeros((), requires_grad=True)
    positive, negative = torch.full((batch, m), math.nan) + source, torch.full((batch, k), math.nan) + source
    result = contrastive_loss(
        positive,
        negative,
        torch.zeros(batch, m, dtype=torch.bool),
        torch.zeros(batch, k, dtype=torch.bool),
        torch.full((batch, m), math.nan),
        torch.full((batch, k), math.nan),
        scheme=scheme,
        uniforms=torch.rand(batch, 2),
    )
    assert float(result.loss.detach()) == 0.0
    assert result.chosen_positive.tolist() == result.chosen_negative.tolist() == [-1] * batch
    assert not result.active_negatives.any()
    result.loss.backward()
    assert float(source.grad) == 0.0


def test_ties_take_the_lowest_valid_column():
    ce = torch.tensor([[9.0, 2.0, 2.0, 2.0]])
    mask = torch.tensor([[False, False, True, True]])
    for scheme in ("min_max", "max_min"):
        choice = choose(ce, ce, mask, mask, scheme=scheme)
        assert choice.positive.tolist() == choice.negative.tolist() == [2]


def test_an_infinite_valid_value_wins_over_a_masked_one():
    ce = torch.tensor([[1.0, math.inf, 1.0, math.inf]])
    mask = torch.tensor([[False, True, False, True]])
    for scheme in ("min_max", "max_min"):
        choice = choose(ce, ce, mask, mask, scheme=scheme)
        assert choice.positive.tolist() == choice.negative.tolist() == [1]


def test_a_valid_nan_is_not_hidden():
    good, bad = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, math.nan]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    for scheme in ("min_max", "max_min", "mean"):
        assert math.isnan(contrastive_loss(bad, good, mask, mask, scheme=scheme).loss)
        assert math.isnan(contrastive_loss(good, bad, mask, mask, scheme=scheme).loss)


def test_at_the_margin_a_negative_is_at_rest():
    negative = torch.tensor([[3.0]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for scheme in ("min_max", "max_min", "mean"):
        result = contrastive_loss(torch.ones(1, 1), negative, mask, mask, scheme=scheme, margin=3.0)
        assert float(result.negative.detach()) == 0.0 and not result.active_negatives.any()
        (gradient,) = torch.autograd.grad(result.loss, negative)
        assert float(gradient) == 0.0


def test_sampling_is_floor_of_u_times_count():
    mask = torch.tensor([[False, True, False, True, True]] * 4)
    uniforms = torch.tensor([[0.0, 0.999999], [0.333, 0.334], [0.666, 0.667], [0.99999994, 0.0]])
    choice = choose(torch.zeros(4, 5), torch.zeros(4, 5), mask, mask, scheme="sampling", uniforms=uniforms)
    assert choice.positive.tolist() == [1, 1, 3, 4]
    assert choice.negative.tolist() == [4, 3, 4, 1]


def test_a_given_choice_is_used_and_the_margin_applies_to_the_new_values():
    mask = torch.ones(2, 2, dtype=torch.bool)
    choice = choose(
        torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([[1.0, 2.0], [2.0, 2.9]]), mask, mask, scheme="min_max"
    )
    assert (choice.positive.tolist(), choice.negative.tolist()) == ([0, 1], [1, 1])
    # With dropout other columns are extreme, and the second negative has moved beyond the margin.
    positive = torch.tensor([[5.0, 0.1], [math.nan, 4.0]], requires_grad=True)
    negative = torch.tensor([[9.0, 2.0], [math.nan, 3.5]], requires_grad=True)
    result = contrastive_loss(positive, negative, mask, mask, scheme="min_max", beta=0.5, choice=choice)
    assert float(result.positive.detach()) == pytest.approx(4.5)
    assert float(result.negative.detach()) == pytest.approx(-0.5)
    assert result.active_negatives.tolist() == [True, False]
    result.loss.backward()
    assert positive.grad.tolist() == [[0.5, 0.0], [0.0, 0.5]]
    assert negative.grad.tolist() == [[0.0, -0.25], [0.0, 0.0]]


def test_a_choice_carries_no_gradient():
    ce = torch.rand(2, 3, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    choice = choose(ce, ce, mask, mask, scheme="min_max")
    assert choice.positive.dtype == torch.int64 and not choice.positive.requires_grad
    assert choose(ce, ce, mask, mask, scheme="mean").positive.tolist() == [-1, -1]


def test_what_is_wrong_is_said():
    ce, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for arguments, options, message in (
        ((ce, ce, mask, mask), {"scheme": "minmax"}, "scheme: expected one of min_max.*found 'minmax'"),
        ((ce, ce, mask, mask), {"scheme": "sampling"}, r"uniforms of shape \(2, 2\)"),
        ((ce, ce, mask, mask), {"scheme": "sampling", "uniforms": torch.zeros(2, 3)}, r"\(2, 2\), found \(2, 3\)"),
        ((ce, ce, mask, mask), {"scheme": "sampling", "uniforms": torch.ones(2, 2)}, r"\[0, 1\)"),
        ((ce, ce, mask, mask), {"scheme": "weighted_mean"}, "needs positive_score and negative_score"),
        ((ce, ce, mask, mask, ce), {"scheme": "weighted_mean"}, "needs positive_score and negative_score"),
        ((ce, ce, mask[:, :2], mask), {}, r"positive_mask: expected shape \(2, 3\), found \(2, 2\)"),
        ((ce, ce, mask, mask.long()), {}, "negative_mask: expected dtype torch.bool"),
        ((ce, ce[:1], mask, mask[:1]), {}, r"\(2, 3\) and \(1, 3\)"),
        ((ce[0], ce, mask[0], mask), {}, r"\(3,\) and \(2, 3\)"),
        ((ce, ce, mask, mask, ce[:, :1]), {}, r"positive_score: expected shape \(2, 3\), found \(2, 1\)"),
        ((ce, ce, mask, mask), {"questions": 0}, "questions: expected at least 1, found 0"),
        ((ce, ce, mask, mask), {"choice": Choice(torch.tensor([0, 3]), torch.tensor([0, 0]))}, "row 1 names column 3"),
        ((ce, ce, mask, ~mask), {"choice": Choice(torch.tensor([0, 0]), torch.tensor([-1, 0]))}, "choice.negative"),
    ):
        with pytest.raises(ValueError, match=message):
            contrastive_loss(*arguments, **options)


def sequence_ce(model, sequences):
    """Mean cross-entropy of each token sequence under a bigram model: [B, n, T] -> [B, n]."""
    logits = model(sequences[..., :-1])
    tokens = sequences[..., 1:]
    ce = nn.functional.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none")
    return ce.view(tokens.shape).mean(dim=-1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_step_lowers_the_chosen_positive_and_raises_the_active_negative(scheme):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Embedding(12, 16), nn.Tanh(), nn.Linear(16, 12))
    positives, negatives = torch.randint(0, 6, (4, 3, 8)), torch.randint(6, 12, (4, 2, 8))
    positive_mask, negative_mask = torch.ones(4, 3, dtype=torch.bool), torch.ones(4, 2, dtype=torch.bool)
    scores = torch.full((4, 3), 0.9), torch.full((4, 2), 0.1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)

    positive_ce, negative_ce = sequence_ce(student, positives), sequence_ce(student, negatives)
    result = contrastive_loss(
        positive_ce,
        negative_ce,
        positive_mask,
        negative_mask,
        *scores,
        beta=1.0,
        margin=6.0,
        scheme=scheme,
        uniforms=torch.rand(4, 2),
    )
    assert result.active_negatives.all()
    result.loss.backward()
    optimizer.step()
    with torch.no_grad():
        positive_change = sequence_ce(student, positives) - positive_ce
        negative_change = sequence_ce(student, negatives) - negative_ce
    if scheme in CHOOSING_SCHEMES:
        positive_change = positive_change.gather(1, result.chosen_positive[:, None])
        negative_change = negative_change.gather(1, result.chosen_negative[:, None])
    assert (positive_change < 0).all()
    assert (negative_change > 0).all()


def test_a_negative_at_rest_moves_nothing():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 12))
    ce = sequence_ce(student, torch.randint(0, 12, (4, 2, 8)))
    mask = torch.ones(4, 2, dtype=torch.bool)
    result = contrastive_loss(ce[:, :0], ce, mask[:, :0], mask, margin=0.5)
    result.loss.backward()
    assert all((parameter.grad == 0).all() for parameter in student.parameters())

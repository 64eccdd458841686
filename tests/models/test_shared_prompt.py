"""Shared-prompt passes against the naive way: every target with a prompt of its own, nothing shared, nothing packed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qcrd_ray.errors import UserError
from qcrd_ray.models.student import Item, Student, cut_into_passes
from tests.tiny_students import tiny_student

VOCABULARY = 97


def make_student(family: str, seed: int = 0) -> Student:
    made: Student = tiny_student(family, VOCABULARY, seed)
    return made


def make_items(seed: int, questions: int = 5, most: int = 4) -> list[Item]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    counts = torch.randint(1, most + 1, (questions,), generator=generator).tolist()
    return [
        Item(tokens(1, 12), [tokens(1, 15) for _ in range(count)], [(q, t) for t in range(count)])
        for q, count in enumerate(counts)
    ]


def naive_ce(student: Student, prompt: list[int], target: list[int]) -> torch.Tensor:
    """One sequence by itself, by the library's own forward."""
    if student.is_seq2seq:
        start = [student.model.config.decoder_start_token_id, *target[:-1]]
        logits = student.model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start])).logits[0]
    else:
        logits = student.model(input_ids=torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(target))


def gradients(student: Student) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5", "bart", "llama", "qwen2"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shared_prompts_give_the_naive_losses_and_gradients(family: str, seed: int) -> None:
    student, items = make_student(family, seed), make_items(seed)
    weights = torch.rand(sum(len(item.targets) for item in items), generator=torch.Generator().manual_seed(seed))

    expected = torch.stack([naive_ce(student, item.prompt, t) for item in items for t in item.targets])
    (expected * weights).sum().backward()
    naive = gradients(student)
    student.zero_grad()

    found = student(items)
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    shared = gradients(student)
    assert naive.keys() == shared.keys()
    for name in naive:
        torch.testing.assert_close(shared[name], naive[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_sliding_window_counts_from_the_prompt_on(window: int) -> None:
    student, items = tiny_student("qwen2", VOCABULARY, sliding_window=window), make_items(window)
    expected = torch.stack([naive_ce(student, item.prompt, t) for item in items for t in item.targets])
    torch.testing.assert_close(student(items), expected, atol=1e-5, rtol=0)
    whole = make_student("qwen2")(items)
    assert (whole - expected).abs().max() > 1e-3  # the window hides something


def test_a_causal_student_is_its_network_to_everybody_else() -> None:
    student, plain = make_student("llama"), make_student("llama").model
    plain.set_attn_implementation("sdpa")
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [0] + [1] * 8])
    inputs = {"input_ids": ids, "attention_mask": mask}
    found, expected = student.model(**inputs).logits, plain(**inputs).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])
    generated = [network.generate(**inputs, max_new_tokens=6, do_sample=False) for network in (student.model, plain)]
    assert generated[0].tolist() == generated[1].tolist()


def test_a_model_with_layers_that_do_not_attend_is_refused() -> None:
    """They would carry what one target says to the next."""
    student = make_student("llama")
    student.model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UserError, match="student.model: LlamaForCausalLM: 1 of 2 layers attend"):
        student(make_items(0))


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("budget", [1, 30, 60, 10_000])
def test_passes_hold_every_target_once_whatever_the_budget(family: str, budget: int) -> None:
    student, items = make_student(family), make_items(3, questions=7)
    expected = dict(zip([key for item in items for key in item.key], student(items).tolist(), strict=True))
    passes = cut_into_passes(student, items, budget, split=True)
    found = {}
    for part in passes:
        if sum(len(item.targets) for item in part) > 1:
            assert student.padded_tokens(part) <= budget
        values = student(part).tolist()
        found.update(zip([key for item in part for key in item.key], values, strict=True))
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_rationale_ce_is_a_grid_with_nan_where_a_question_has_fewer(family: str) -> None:
    student, items = make_student(family), make_items(4)
    grid = student.rationale_ce([item.prompt for item in items], [item.targets for item in items])
    assert grid.shape == (len(items), max(len(item.targets) for item in items))
    for row, item in zip(grid, items, strict=True):
        assert row.isnan().sum() == grid.shape[1] - len(item.targets)
    torch.testing.assert_close(grid[~grid.isnan()], student(items))
    labels = student.label_ce([item.prompt for item in items], [item.targets[0] for item in items])
    torch.testing.assert_close(labels, grid[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["t5", "bart", "llama"])
@pytest.mark.parametrize("together", [1, 7, 64])
def test_logits_made_a_few_at_a_time_give_the_same_losses(
    family: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, items = make_student(family), make_items(5)
    whole = student(items).detach()
    monkeypatch.setattr("qcrd_ray.models.cross_entropy.TOKENS_TOGETHER", together)
    sizes: list[int] = []
    student.model.lm_head.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        torch.testing.assert_close(student(items), whole)
    tokens = sum(len(target) for item in items for target in item.targets)
    assert len(sizes) == -(-tokens // together) and max(sizes) == min(tokens, together)


@pytest.mark.parametrize("family", ["t5", "umt5", "llama"])
def test_gradient_checkpointing_changes_no_number(family: str) -> None:
    student, items = make_student(family), make_items(5)
    expected = student(items)
    expected.sum().backward()
    plain = gradients(student)
    student.zero_grad()
    student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student.train()
    found = student(items)
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, plain[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_no_product_runs_over_padding(family: str) -> None:
    """A long target among short ones: what is computed is little more than what is there."""
    student = make_student(family)
    items = [Item([5] * 6, [[7] * (40 if number == 0 else 3)]) for number in range(9)]
    seen: list[int] = []
    layer = student.model.decoder.block[0].layer[-1] if family == "t5" else student.model.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    student(items)
    real = sum(len(target) for item in items for target in item.targets) if family == "t5" else 9 * 6 + 39 + 8 * 2
    assert seen[0] <= 1.25 * real
    assert student.padded_tokens(items) <= 1.25 * sum(item.size for item in items)


def test_dropout_is_on_while_training_and_off_otherwise() -> None:
    student, items = make_student("t5"), make_items(6)
    quiet = student(items)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
        if hasattr(module, "key_value_proj_dim"):
            module.dropout = 0.3
    student.train()
    torch.manual_seed(1)
    first = student(items)
    torch.manual_seed(1)
    torch.testing.assert_close(student(items), first)
    assert not torch.allclose(student(items), first)
    assert not torch.allclose(quiet, first)
    student.eval()
    torch.testing.assert_close(student(items), quiet)


def test_dropout_that_is_no_module_is_known() -> None:
    student, items = make_student("bart"), make_items(0)
    assert not student.has_dropout and torch.equal(student(items), student(items))
    student.model.config.dropout = 0.1
    for module in student.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.1
    assert student.has_dropout and not torch.equal(student(items), student(items))

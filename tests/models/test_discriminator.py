import json
import random

import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from qcrd_ray.config import JudgeConfig
from qcrd_ray.errors import UserError
from qcrd_ray.models.discriminator import Discriminator, build_discriminator, check_encoder
from qcrd_ray.objectives.discriminator import discriminator_loss
from qcrd_ray.rationales.corruption import corrupt

THINGS = ("apples", "pens", "books", "coins", "cards", "shells")
NAMES = ("Ann", "Bob", "Eve", "Joe", "Mia", "Tom")


def word_problem(rng):
    name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 9), rng.randint(2, 9)
    question = f"{name} has {a} {thing} and buys {b} more {thing}. How many {thing} does {name} have?"
    return question, f"{name} starts with {a} {thing} and gets {b} more, so {a} + {b} = {a + b} {thing}."


@pytest.fixture(scope="module")
def problems():
    rng = random.Random(0)
    return [word_problem(rng) for _ in range(300)]


@pytest.fixture(scope="module")
def scratch(problems):
    texts = [text for problem in problems for text in problem]
    return build_discriminator(JudgeConfig(encoder="scratch:bert-tiny", max_tokens=96), texts=texts)


@pytest.fixture(scope="module")
def minilm():
    return build_discriminator(JudgeConfig())


@pytest.fixture
def t5_folder(scratch, tmp_path):
    config = T5Config(
        vocab_size=len(scratch.tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    scratch.tokenizer.save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


@pytest.mark.parametrize("name", ["scratch", "minilm"])
def test_padding_and_grouping_have_no_part_in_a_score(name, problems, request):
    discriminator = request.getfixturevalue(name)
    questions, rationales = map(list, zip(*problems[:12], strict=True))
    rationales[3] = "Yes."
    rationales[7] = " ".join([rationales[7]] * 4)
    alone = torch.cat([discriminator.score([q], [r]) for q, r in zip(questions, rationales, strict=True)])
    for tokens_per_pass in (1, 200, 100_000):
        together = discriminator.score(questions, rationales, tokens_per_pass)
        assert together.shape == (12,) and together.dtype == torch.float32
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_the_maximum_is_over_real_tokens_only(scratch):
    scratch.eval()
    batch = scratch.encode_pairs(["How many?", "How many apples does Ann have?"], ["7", "so 3 + 4 = 7 apples"])
    assert batch["attention_mask"][0].sum() < batch["attention_mask"][1].sum()
    with torch.no_grad():
        states = scratch.encoder(**batch).last_hidden_state
        states[0, ~batch["attention_mask"][0].bool()] = 1e4
        handle = scratch.encoder.register_forward_hook(lambda *_: type("Output", (), {"last_hidden_state": states}))
        poisoned = scratch(**batch)
        handle.remove()
        torch.testing.assert_close(poisoned, scratch(**batch), atol=1e-6, rtol=0)


def test_padding_gets_no_gradient_and_all_weights_do(scratch):
    scratch.zero_grad()
    batch = scratch.encode_pairs(["How many?", "How many apples does Ann have?"], ["7", "so 3 + 4 = 7 apples"])
    scratch(**batch).sum().backward()
    assert all(parameter.grad is not None for parameter in scratch.parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in scratch.parameters())
    scratch.zero_grad()


def test_fresh_scores_are_near_a_half(scratch, minilm, problems):
    questions, rationales = zip(*problems[:20], strict=True)
    for discriminator in (scratch, minilm):
        scores = discriminator.score(questions, rationales)
        assert ((scores > 0.35) & (scores < 0.65)).all()


def test_the_seed_decides_the_weights_and_leaves_torch_alone(problems):
    texts = [rationale for _, rationale in problems[:50]]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    built = [
        build_discriminator(JudgeConfig(encoder="scratch:bert-tiny"), seed=seed, texts=texts) for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.rand(3), expected)
    first, same, other = (discriminator.score(texts[:3], texts[:3]) for discriminator in built)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_scoring_leaves_the_mode_and_the_graph_alone(scratch):
    scratch.train()
    scores = scratch.score(["How many?"] * 2, ["7", "8"])
    assert scratch.training and not scores.requires_grad
    assert torch.equal(scores, scratch.score(["How many?"] * 2, ["7", "8"]))
    assert scratch.score([], []).shape == (0,)


def test_a_long_pair_keeps_its_rationale(scratch):
    tokenizer = scratch.tokenizer
    rationale = "so 3 + 4 = 7 apples"
    kept = scratch.encode_pairs(["many " * 500], [rationale])["input_ids"]
    assert kept.shape == (1, 96)
    assert tokenizer.decode(kept[0]).endswith(f"[SEP] {rationale} [SEP]")
    both = scratch.encode_pairs(["How many apples?"], ["more " * 500])["input_ids"]
    assert both.shape == (1, 96) and "apples?" in tokenizer.decode(both[0]).replace(" ?", "?")
    assert scratch.encode_pairs(["How many?", "many " * 500], ["", rationale])["input_ids"].shape == (2, 96)


def test_passes_hold_to_their_budget(scratch, problems):
    questions, rationales = zip(*problems[:40], strict=True)
    seen = []
    for positions, batch in scratch.passes(questions, rationales, 300):
        assert batch["input_ids"].numel() <= 300
        assert batch["attention_mask"].sum(1).min() >= 0.75 * batch["input_ids"].shape[1]
        seen += positions
    assert sorted(seen) == list(range(40))
    assert [len(p) for p, _ in scratch.passes(questions[:3], rationales[:3], 1)] == [1, 1, 1]


@pytest.mark.parametrize("kind", ["scratch", "t5"])
def test_what_is_saved_is_what_is_loaded(kind, scratch, t5_folder, problems, tmp_path):
    discriminator = scratch if kind == "scratch" else build_discriminator(JudgeConfig(encoder=str(t5_folder)))
    questions, rationales = zip(*problems[:5], strict=True)
    folder = tmp_path / "runs" / "judge"
    for _ in range(2):  # the second one replaces the first
        discriminator.save(folder)
        loaded = Discriminator.load(folder)
        assert torch.equal(loaded.score(questions, rationales), discriminator.score(questions, rationales))
    state, loaded_state = discriminator.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    assert all(torch.equal(state[name], loaded_state[name]) for name in state)
    assert (loaded.hidden_size, loaded.max_tokens) == (discriminator.hidden_size, discriminator.max_tokens)
    assert [path.name for path in folder.parent.iterdir()] == ["judge"]
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert AutoModel.from_pretrained(folder / "encoder") is not None


def test_gathered_weights_can_be_saved(scratch, tmp_path):
    state = {name: torch.zeros_like(tensor) for name, tensor in scratch.state_dict().items()}
    scratch.save(tmp_path / "judge", state)
    assert all((tensor == 0).all() for tensor in Discriminator.load(tmp_path / "judge").state_dict().values())


def test_a_broken_folder_is_named(scratch, tmp_path):
    with pytest.raises(UserError, match="judge folder .*nowhere: no discriminator.json"):
        Discriminator.load(tmp_path / "nowhere")
    scratch.save(tmp_path / "judge")
    (tmp_path / "judge" / "head.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="not readable as a discriminator"):
        Discriminator.load(tmp_path / "judge")
    (tmp_path / "judge" / "discriminator.json").write_text(json.dumps({"hidden": 1}))
    with pytest.raises(UserError, match="not readable as a discriminator"):
        Discriminator.load(tmp_path / "judge")


def test_only_the_encoder_of_t5_is_loaded(t5_folder, problems):
    discriminator = build_discriminator(JudgeConfig(encoder=str(t5_folder)))
    assert not [name for name, _ in discriminator.named_parameters() if "decoder" in name or "lm_head" in name]
    source = T5ForConditionalGeneration.from_pretrained(t5_folder)
    assert torch.equal(discriminator.encoder.get_input_embeddings().weight, source.shared.weight)
    questions, rationales = zip(*problems[:6], strict=True)
    alone = torch.cat([discriminator.score([q], [r]) for q, r in zip(questions, rationales, strict=True)])
    torch.testing.assert_close(discriminator.score(questions, rationales), alone, atol=1e-6, rtol=0)


def test_what_is_no_encoder_is_refused(scratch, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    llama = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    scratch.encoder.config.save_pretrained(tmp_path / "bare")
    for name, message in (
        (str(tmp_path / "llama"), "is a llama model, no encoder"),
        (str(tmp_path / "empty"), "has no config.json"),
        (str(tmp_path / "nowhere"), "not found"),
        ("embedded:minilm", "did you mean embedded:minilm-l6"),
        ("scratch:bert", "did you mean scratch:bert-tiny"),
    ):
        with pytest.raises(UserError, match=f"config key judge.encoder: .*{message}"):
            check_encoder(name)
        with pytest.raises(UserError, match=f"config key judge.encoder: .*{message}"):
            build_discriminator(JudgeConfig(encoder=name))
    with pytest.raises(UserError, match="config key judge.encoder: .*no readable weights"):
        build_discriminator(JudgeConfig(encoder=str(tmp_path / "bare")))
    with pytest.raises(ValueError, match="needs texts or a tokenizer"):
        build_discriminator(JudgeConfig(encoder="scratch:bert-tiny"))


def test_ranks_can_share_a_tokenizer(scratch, tmp_path):
    scratch.tokenizer.save_pretrained(tmp_path)
    config = JudgeConfig(encoder="scratch:bert-tiny", max_tokens=96)
    assert torch.equal(
        build_discriminator(config, tokenizer=tmp_path).score(["How many?"], ["so 7"]),
        build_discriminator(config, tokenizer=tmp_path).score(["How many?"], ["so 7"]),
    )


def test_it_learns_to_tell_right_rationales_from_corrupted_ones(problems):
    texts = [text for problem in problems for text in problem]
    discriminator = build_discriminator(JudgeConfig(encoder="scratch:bert-tiny", max_tokens=96), texts=texts, seed=1)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3)
    rng = random.Random(0)
    discriminator.train()
    torch.manual_seed(0)  # dropout
    mask = torch.ones(16, 1, dtype=torch.bool)
    for _ in range(150):
        batch = rng.sample(problems[:240], 16)
        questions = [question for question, _ in batch] * 2
        rationales = [right for _, right in batch] + [corrupt(right, question, rng) for question, right in batch]
        scores = discriminator(**discriminator.encode_pairs(questions, rationales))
        loss = discriminator_loss(scores[:16, None], scores[16:, None], mask, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    questions, rationales = zip(*problems[240:], strict=True)
    corrupted = [corrupt(right, question, rng) for question, right in problems[240:]]
    right, wrong = discriminator.score(questions, rationales), discriminator.score(questions, corrupted)
    assert (right > wrong).float().mean() > 0.9
    assert right.mean() > 0.8 and wrong.mean() < 0.35

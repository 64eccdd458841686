"""Every engine on small random models: the same seeds, the same texts; the weights that they say they hold."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from qcrd_ray.models.scratch import build_scratch
from qcrd_ray.sampling.engine import EngineSpec, Generation, Request, SamplingEngine, SamplingParameters, start_engine
from qcrd_ray.sampling.t5 import T5Engine

TEXTS = [f"What is {a} + {b}? {a} + {b} = {a + b}." for a in range(40) for b in range(5)]
HOT = SamplingParameters(temperature=1.5, top_k=20, max_tokens=12)
GREEDY = SamplingParameters(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models; the causal one has tied embeddings, and `other` has the same shape and other weights."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "t5": build_scratch("t5-tiny", TEXTS, folder / "t5", seed=0),
        "t5-other": build_scratch("t5-tiny", TEXTS, folder / "t5-other", seed=1),
        "llama": build_scratch("llama-tiny", TEXTS, folder / "llama", seed=0),
        "llama-other": build_scratch("llama-tiny", TEXTS, folder / "llama-other", seed=1),
    }


def spec(engine: str, model: Path, precision: str = "fp32") -> EngineSpec:
    return EngineSpec(engine, str(model), precision=precision, max_sequences=8, max_model_tokens=128)


def prompts(count: int = 11) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(3, 250, (3 + index % 7,), generator=generator).tolist()) for index in range(count)]


def sample(engine: SamplingEngine, parameters: SamplingParameters, order: list[int], n: int = 1) -> dict[int, Any]:
    given = prompts()
    requests = [Request(given[index], parameters, seed=1000 + index, n=n) for index in order]
    return dict(zip(order, engine.generate(requests), strict=True))


def mean_logprob(folder: Path, prompt: tuple[int, ...], generation: Generation, end: int) -> float:
    """By the library's own forward."""
    ids = list(generation.token_ids) + ([end] if generation.finish_reason == "stop" else [])
    if (folder / "config.json").read_text().find("T5") >= 0:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        with torch.no_grad():
            return -float(model(input_ids=torch.tensor([prompt]), labels=torch.tensor([ids])).loss)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).mean())


@pytest.fixture(scope="module", params=[("transformers", "t5"), ("transformers", "llama"), ("t5", "t5")], ids="-".join)
def reference(request: Any, models: dict[str, Path]) -> tuple[str, Any]:
    kind, family = request.param
    return family, start_engine(spec(kind, models[family]))


def test_a_text_depends_on_its_seed_alone(reference: tuple[str, Any]) -> None:
    _, engine = reference
    forward = sample(engine, HOT, list(range(11)))
    backward = sample(engine, HOT, [9, 3, 5])
    for index in (9, 3, 5):
        assert forward[index][0].token_ids == backward[index][0].token_ids
        assert forward[index][0].mean_logprob == pytest.approx(backward[index][0].mean_logprob, abs=1e-5)
    assert len({forward[index][0].token_ids for index in forward}) > 8
    many = sample(engine, HOT, [4], n=5)[4]
    assert len({generation.token_ids for generation in many}) == 5


def test_mean_logprob_is_minus_the_cross_entropy(reference: tuple[str, Any], models: dict[str, Path]) -> None:
    family, engine = reference
    for index, [generation] in sample(engine, HOT, list(range(6))).items():
        assert len(generation.token_ids) <= HOT.max_tokens
        expected = mean_logprob(models[family], prompts()[index], generation, engine.end)
        assert generation.mean_logprob == pytest.approx(expected, abs=1e-4)


def test_target_logprobs_are_those_of_the_sampled_tokens(reference: tuple[str, Any]) -> None:
    _, engine = reference
    generations = [generation for [generation] in sample(engine, HOT, list(range(11))).values()]
    ends = [[engine.end] if generation.finish_reason == "stop" else [] for generation in generations]
    targets = [[*generation.token_ids, *end] for generation, end in zip(generations, ends, strict=True)]
    found = engine.target_logprobs(prompts(), targets)
    assert [len(values) for values in found] == [len(target) for target in targets]
    for values, generation in zip(found, generations, strict=True):
        assert sum(values) / len(values) == pytest.approx(generation.mean_logprob, abs=1e-5)


def test_greedy_is_what_the_library_generates(reference: tuple[str, Any]) -> None:
    _, engine = reference
    for index, [generation] in sample(engine, GREEDY, list(range(5))).items():
        prompt = torch.tensor([prompts()[index]])
        with torch.no_grad():
            ids = engine.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
            )[0].tolist()
        new = ids[1:] if engine.is_seq2seq else ids[prompt.shape[1] :]
        assert [token for token in new if token != engine.end] == list(generation.token_ids)


def test_swapped_weights_are_those_of_the_folder(models: dict[str, Path]) -> None:
    for kind, family in (("transformers", "t5"), ("transformers", "llama"), ("t5", "t5")):
        engine = start_engine(spec(kind, models[family]))
        before = sample(engine, GREEDY, [0, 1, 2])
        engine.load_weights(models[f"{family}-other"])
        fresh = start_engine(spec(kind, models[f"{family}-other"]))
        assert sample(engine, HOT, [0, 1, 2]) == sample(fresh, HOT, [0, 1, 2])
        engine.load_weights(models[family])
        assert sample(engine, GREEDY, [0, 1, 2]) == before
        with pytest.raises(RuntimeError, match="snapshot"):
            engine.load_weights(models["llama" if family == "t5" else "t5"])


def test_the_likeliest_tokens_are_all_that_top_k_leaves(models: dict[str, Path]) -> None:
    engine = start_engine(spec("transformers", models["llama"]))
    prompt = prompts()[0]
    first = AutoModelForCausalLM.from_pretrained(models["llama"])(torch.tensor([prompt])).logits[0, -1]
    likeliest = set(first.topk(3).indices.tolist())
    parameters = SamplingParameters(temperature=5.0, top_k=3, max_tokens=1)
    [generations] = engine.generate([Request(prompt, parameters, seed=1, n=60)])
    seen = {generation.token_ids[0] for generation in generations if generation.token_ids}
    assert seen <= likeliest
    assert len(seen) == len(likeliest - {engine.end})
    assert all(not math.isnan(generation.mean_logprob) for generation in generations)


LETTERS, CHOICES = ("W", "7", "+", "?"), ("What is 1", "+ 2", "7 =")


def assert_held_to_choices(engine: SamplingEngine, tokenizer: Any) -> None:
    """Greedy takes the likeliest of choices of one token, and heat finds all, long ones too."""
    anchor = len(tokenizer(":", add_special_tokens=False)["input_ids"])
    tokens = [tokenizer(f":{letter}", add_special_tokens=False)["input_ids"][anchor:] for letter in LETTERS]
    assert all(len(ids) == 1 for ids in tokens)
    greedy = sample(engine, replace(GREEDY, choices=LETTERS), list(range(11)))
    for index, [generation] in greedy.items():
        values = engine.target_logprobs([prompts()[index]] * len(tokens), tokens)
        assert [*generation.token_ids] == tokens[values.index(max(values))]
        assert generation.finish_reason == "stop"
    hot = sample(engine, replace(HOT, temperature=2.0, top_k=0, choices=CHOICES), [3], n=200)[3]
    assert {tokenizer.decode(generation.token_ids) for generation in hot} == set(CHOICES)
    assert tokenizer.decode(sample(engine, GREEDY, [0])[0][0].token_ids) not in LETTERS + CHOICES


def test_a_text_is_one_of_its_choices(reference: tuple[str, Any]) -> None:
    _, engine = reference
    if isinstance(engine, T5Engine):
        with pytest.raises(ValueError, match="holds no text to choices"):
            sample(engine, replace(GREEDY, choices=CHOICES), [0])
    else:
        assert_held_to_choices(engine, engine.tokenizer)


@pytest.mark.slow
@pytest.mark.beside
def test_vllm_samples_by_seed_and_holds_the_weights_it_was_given(models: dict[str, Path]) -> None:
    engine = start_engine(spec("vllm", models["llama"]))
    forward = sample(engine, HOT, list(range(11)))
    backward = sample(engine, HOT, [9, 3, 5])
    assert [backward[index][0].token_ids for index in (9, 3, 5)] == [forward[index][0].token_ids for index in (9, 3, 5)]
    for index in range(5):
        generation = forward[index][0]
        expected = mean_logprob(models["llama"], prompts()[index], generation, engine.end)
        assert generation.mean_logprob == pytest.approx(expected, abs=1e-3)
    assert len({generation.token_ids for generation in sample(engine, HOT, [4], n=5)[4]}) == 5
    assert_held_to_choices(engine, AutoTokenizer.from_pretrained(models["llama"]))

    targets = [prompt[::-1] for prompt in prompts()]
    first = engine.target_logprobs(prompts(), targets)
    reference = start_engine(spec("transformers", models["llama"])).target_logprobs(prompts(), targets)
    assert max(abs(a - b) for x, y in zip(first, reference, strict=True) for a, b in zip(x, y, strict=True)) < 1e-3
    engine.load_weights(models["llama-other"])
    swapped = engine.target_logprobs(prompts(), targets)
    texts = sample(engine, HOT, list(range(11)))
    engine.close()
    fresh_engine = start_engine(spec("vllm", models["llama-other"]))
    fresh = fresh_engine.target_logprobs(prompts(), targets)
    fresh_texts = sample(fresh_engine, HOT, list(range(11)))
    fresh_engine.close()
    difference = [abs(a - b) for x, y in zip(swapped, fresh, strict=True) for a, b in zip(x, y, strict=True)]
    moved = [abs(a - b) for x, y in zip(swapped, first, strict=True) for a, b in zip(x, y, strict=True)]
    assert max(difference) < 0.05
    assert max(moved) > 0.1
    assert {i: g[0].token_ids for i, g in texts.items()} == {i: g[0].token_ids for i, g in fresh_texts.items()}

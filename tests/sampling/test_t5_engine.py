"""The T5 engine against transformers: the same log-probabilities, distribution, greedy texts and seeded texts."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    MT5Config,
    T5Config,
    UMT5Config,
)
from transformers import MT5ForConditionalGeneration as MT5
from transformers import T5ForConditionalGeneration as T5
from transformers import UMT5ForConditionalGeneration as UMT5

from qcrd_ray.config import config_from_dict
from qcrd_ray.models.scratch import build_scratch
from qcrd_ray.sampling import cpu_attention
from qcrd_ray.sampling.cpu_attention import CpuAttention
from qcrd_ray.sampling.engine import EngineSpec, Generation, Request, SamplingEngine, SamplingParameters, start_engine
from qcrd_ray.sampling.student_engine import engine_spec

TEXTS = [f"What is {a} + {b}? {a} + {b} = {a + b}." for a in range(40) for b in range(5)]
VOCABULARY = 384
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    d_model=48,
    d_kv=32,
    d_ff=96,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    dropout_rate=0.0,
    decoder_start_token_id=0,
)
VARIANTS: dict[str, Callable[[], Any]] = {
    "relu, tied, scaled": lambda: T5(T5Config(feed_forward_proj="relu", **SHAPE)),
    "gated, untied, unscaled": lambda: T5(T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **SHAPE)),
    "gated, untied, scaled": lambda: T5(T5Config(feed_forward_proj="gated-gelu", **SHAPE)),
    "gated silu, tied, unscaled": lambda: T5(
        T5Config(feed_forward_proj="gated-silu", tie_word_embeddings=False, **SHAPE)
    ),
    "mt5": lambda: MT5(MT5Config(feed_forward_proj="gated-gelu", **SHAPE)),
    "umt5": lambda: UMT5(UMT5Config(feed_forward_proj="gated-gelu", **SHAPE)),
}
HOT = SamplingParameters(temperature=1.5, top_k=50, max_tokens=90)
GREEDY = SamplingParameters(temperature=0.0, max_tokens=20)


def build(name: str, folder: Path, tokenizer: Path, seed: int) -> Path:
    """A random model of a variant whose distributions are neither flat nor certain."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VARIANTS[name]()
        with torch.no_grad():
            if "untied" in name:
                model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, SHAPE["d_model"]))
            if getattr(model.config, "scale_decoder_outputs", name == "umt5"):
                model.decoder.final_layer_norm.weight.mul_(SHAPE["d_model"] ** 0.5)
            model.lm_head.weight.mul_(0.2)
            for parameter_name, parameter in model.named_parameters():
                if "layer_norm" in parameter_name:
                    parameter.mul_(1.0 + 0.2 * torch.randn(parameter.shape))
                if "relative_attention_bias" in parameter_name:
                    parameter.copy_(torch.randn(parameter.shape))
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("t5")
    tokenizer = build_scratch("t5-tiny", TEXTS, root / "tokenizer", seed=0)
    return {name: build(name, root / str(number), tokenizer, seed=number) for number, name in enumerate(VARIANTS)}


def engine(name: str, model: Path, precision: str = "fp32", max_sequences: int = 8) -> Any:
    return start_engine(EngineSpec(name, str(model), precision=precision, max_sequences=max_sequences))


def prompts(count: int = 13) -> list[tuple[int, ...]]:
    numbers = random.Random(3)
    return [tuple(numbers.randrange(3, VOCABULARY) for _ in range(numbers.randint(4, 40))) for _ in range(count)]


def targets(count: int = 13) -> list[tuple[int, ...]]:
    numbers = random.Random(4)
    return [(*(numbers.randrange(3, VOCABULARY) for _ in range(numbers.randint(1, 80))), 1) for _ in range(count)]


def by_the_library(folder: Path, given: Sequence[Sequence[int]], asked: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probabilities by the library's teacher-forced forward, one text at a time."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    found = []
    with torch.no_grad():
        for prompt, target in zip(given, asked, strict=True):
            labels = torch.tensor([target])
            logprobs = model(input_ids=torch.tensor([prompt]), labels=labels).logits.log_softmax(-1)
            found.append(logprobs[0].gather(1, labels[0].unsqueeze(1)).squeeze(1).tolist())
    return found


def differences(left: list[list[float]], right: list[list[float]]) -> torch.Tensor:
    assert [len(row) for row in left] == [len(row) for row in right]
    return torch.tensor([a - b for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)]).abs()


def alike(mine: list[list[Generation]], theirs: list[list[Generation]]) -> None:
    """The same generations. One in ten may part where a number falls on the edge between two tokens."""
    pairs = [pair for row in zip(mine, theirs, strict=True) for pair in zip(*row, strict=True)]
    parted = [pair for pair in pairs if pair[0].token_ids != pair[1].token_ids]
    assert len(parted) <= len(pairs) / 10
    for one, other in pairs:
        if one.token_ids == other.token_ids:
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
            assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_it_computes_what_transformers_computes(name: str, models: dict[str, Path]) -> None:
    fast, reference = engine("t5", models[name]), engine("transformers", models[name])
    expected = by_the_library(models[name], prompts(), targets())
    assert differences(fast.target_logprobs(prompts(), targets()), expected).max() < 1e-3
    assert differences(reference.target_logprobs(prompts(), targets()), expected).max() < 1e-3
    values = torch.tensor([value for row in expected for value in row])
    assert values.std() > 1.0, "a flat distribution proves nothing"

    for prompt, [generation] in zip(
        prompts(), fast.generate([Request(prompt, GREEDY) for prompt in prompts()]), strict=True
    ):
        # Its cache has a layer for each of the encoder's, which the decoder may outnumber.
        ids = reference.model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, use_cache=False)[
            0, 1:
        ].tolist()
        assert [token for token in ids if token != 1] == list(generation.token_ids)

    requests = [Request(prompt, HOT, seed=7 + index, n=2) for index, prompt in enumerate(prompts())]
    alike(fast.generate(requests), reference.generate(requests))
    fast.network.kernel = None  # as on a GPU, and where there is no compiler
    assert differences(fast.target_logprobs(prompts(), targets()), expected).max() < 1e-3
    alike(fast.generate(requests), reference.generate(requests))


@pytest.mark.parametrize("name", VARIANTS)
def test_in_bf16_it_is_as_near_to_the_truth_as_transformers(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    # The truth: the same rounded weights, computed in fp32.
    model = AutoModelForSeq2SeqLM.from_pretrained(models[name], dtype=torch.bfloat16)
    model.float().save_pretrained(tmp_path)
    truth = by_the_library(tmp_path, prompts(), targets())
    mine = engine("t5", models[name], "bf16").target_logprobs(prompts(), targets())
    theirs = engine("transformers", models[name], "bf16").target_logprobs(prompts(), targets())
    # A logit that bfloat16 rounds the other way differs by a unit in the last place, in any two implementations.
    assert differences(mine, theirs).mean() < 0.025
    assert differences(mine, theirs).quantile(0.99) < 0.1
    assert differences(mine, truth).mean() < 1.2 * differences(theirs, truth).mean() + 1e-3
    for one, other in zip(mine, theirs, strict=True):
        assert sum(one) / len(one) == pytest.approx(sum(other) / len(other), abs=0.05)


@pytest.mark.parametrize(("kind", "precision"), [("t5", "fp32"), ("t5", "bf16"), ("transformers", "fp32")])
def test_first_tokens_have_the_distribution_asked_for(kind: str, precision: str, models: dict[str, Path]) -> None:
    folder, prompt, draws = models["relu, tied, scaled"], prompts()[0], 2000
    parameters = SamplingParameters(temperature=1.5, top_k=50, max_tokens=1)
    [generations] = engine(kind, folder, precision, 64).generate([Request(prompt, parameters, seed=5, n=draws)])
    counted = Counter(generation.token_ids[0] if generation.token_ids else 1 for generation in generations)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0]])).logits[0, -1].float()
    values, tokens = logits.topk(54)
    expected = ((values[:50] / 1.5).softmax(-1) * draws).tolist()
    found = [counted[token] for token in tokens.tolist()]
    assert sum(found) == draws
    if precision == "fp32":
        assert sum(found[:50]) == draws
    # In bfloat16 two computations may differ in which token is the fiftieth: the last ones are counted together.
    found, expected = [*found[:46], sum(found[46:])], [*expected[:46], sum(expected[46:])]
    # The chi-square statistic of 46 degrees of freedom is 46 on average and below 91 with probability 0.9999.
    assert sum((a - b) ** 2 / b for a, b in zip(found, expected, strict=True)) < 91
    assert sum(abs(a - b) for a, b in zip(found, expected, strict=True)) / 2 / draws < 0.08


def test_a_text_depends_on_its_seed_and_not_on_its_neighbours(models: dict[str, Path]) -> None:
    numbers = random.Random(1)
    requests = [
        Request(
            prompt,
            SamplingParameters(1.5, 50, max_tokens=numbers.choice([1, 5, 40, 150]), ignore_end=True),
            seed=index,
            n=numbers.randint(1, 3),
        )
        for index, prompt in enumerate(prompts(30))
    ]
    for name in ("relu, tied, scaled", "umt5"):
        expected = engine("transformers", models[name], max_sequences=100).generate(requests)
        for rows in (1, 5, 64):
            alike(engine("t5", models[name], max_sequences=rows).generate(requests), expected)
        alike(engine("t5", models[name]).generate([requests[20], requests[3]]), [expected[20], expected[3]])


def test_every_way_of_sampling_is_the_reference_s(models: dict[str, Path]) -> None:
    ways = [
        SamplingParameters(1.5, 0, max_tokens=12),
        SamplingParameters(1.5, 0, 0.7, max_tokens=12),
        SamplingParameters(0.7, 20, 0.9, max_tokens=12),
        SamplingParameters(5.0, 1, max_tokens=12),
        SamplingParameters(0.0, 0, max_tokens=12, ignore_end=True),
        SamplingParameters(1.5, 50, max_tokens=60, stop=("=", "7")),
    ]
    requests = [
        Request(prompt, ways[index % len(ways)], seed=index) for index, prompt in enumerate(prompts(4 * len(ways)))
    ]
    folder = models["gated, untied, unscaled"]
    mine, theirs = engine("t5", folder).generate(requests), engine("transformers", folder).generate(requests)
    alike(mine, theirs)
    assert {one.finish_reason for [one] in mine} == {"stop", "length"}


def test_the_whole_vocabulary_is_drawn_from_where_top_k_is_0(models: dict[str, Path]) -> None:
    parameters = SamplingParameters(temperature=8.0, top_k=0, max_tokens=1)
    [generations] = engine("t5", models["mt5"], max_sequences=64).generate([Request(prompts()[0], parameters, n=3000)])
    assert len({generation.token_ids for generation in generations}) > 0.9 * VOCABULARY


@pytest.mark.parametrize("name", ["relu, tied, scaled", "gated, untied, unscaled"])
def test_swapped_weights_reach_every_product(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    other = build(name, tmp_path / "other", models[name], seed=99)
    fast = engine("t5", models[name])
    before = fast.target_logprobs(prompts(), targets())
    fast.load_weights(other)
    swapped = fast.target_logprobs(prompts(), targets())
    assert differences(swapped, engine("t5", other).target_logprobs(prompts(), targets())).max() == 0.0
    assert differences(swapped, by_the_library(other, prompts(), targets())).max() < 1e-3
    assert differences(swapped, before).max() > 0.1
    fast.load_weights(models[name])
    assert fast.target_logprobs(prompts(), targets()) == before
    with pytest.raises(RuntimeError, match="snapshot"):
        fast.load_weights(models["umt5"])


def test_an_untied_snapshot_is_not_loaded_into_a_tied_model(models: dict[str, Path]) -> None:
    fast: SamplingEngine = engine("t5", models["gated silu, tied, unscaled"])
    with pytest.raises(RuntimeError, match="tied"):
        fast.load_weights(models["gated, untied, unscaled"])


def test_nothing_asked_for_is_nothing_given(models: dict[str, Path]) -> None:
    for kind in ("t5", "transformers"):
        empty = engine(kind, models["mt5"])
        assert empty.generate([]) == []
        assert empty.target_logprobs([], []) == []
        assert empty.target_logprobs([[5, 1]], [[]]) == [[]]


def test_it_is_chosen_for_its_family_only(models: dict[str, Path], tmp_path: Path) -> None:
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
        )
    )
    bart.save_pretrained(tmp_path)
    for file in models["mt5"].glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    chosen = {
        model: engine_spec(config_from_dict({"student": {"model": model}})).engine
        for model in ("scratch:t5-tiny", "scratch:llama-tiny", str(models["mt5"]), str(models["umt5"]), str(tmp_path))
    }
    assert list(chosen.values()) == ["t5", "vllm", "t5", "t5", "transformers"]
    with pytest.raises(ValueError, match="engine t5 runs t5, mt5, umt5, not bart"):
        engine("t5", tmp_path)


@pytest.mark.skipif(not any(map(shutil.which, cpu_attention.COMPILERS)), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_attends_to_what_each_row_has(dtype: torch.dtype) -> None:
    rows, heads, length, size = 7, 3, 64, 64
    kernel = CpuAttention.build(size, dtype)
    assert kernel is not None
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(2, rows, heads, length, size, generator=generator).to(dtype)
    query = torch.randn(rows, 3, heads, size, generator=generator).to(dtype)[:, 1]
    bias = 3.0 * torch.randn(heads, length, generator=generator)
    counts = torch.tensor([1, 5, 64, 33, 2, 60, 17])
    for newest, given in ((-1, None), (0, bias), (10, bias), (63, bias)):
        found = kernel(query, memory, given, counts, newest).view(rows, heads, size)
        for row, count in enumerate(counts.tolist()):
            last = count - 1 if newest < 0 else newest
            slots = torch.tensor([(last - back) % length for back in reversed(range(count))])
            keys, values = memory[:, row, :, slots].double()
            scores = (keys @ query[row].double().unsqueeze(-1)).squeeze(-1)
            if given is not None:
                scores = scores + given[:, length - count :]
            expected = (scores.softmax(-1).unsqueeze(1) @ values).squeeze(1)
            torch.testing.assert_close(
                found[row].double(), expected, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 4e-3
            )


def test_without_a_compiler_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    assert CpuAttention.build(24, torch.float32) is None
    monkeypatch.setattr(cpu_attention, "COMPILERS", ("false",))
    assert CpuAttention.build(64, torch.float32) is None
    monkeypatch.setattr(cpu_attention, "COMPILERS", ("no-such-compiler",))
    assert CpuAttention.build(64, torch.float32) is None
    assert len(caplog.records) == 3

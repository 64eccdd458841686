"""A local teacher: a sample depends on its seed, never on what it is asked with; no question stops the others."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qcrd_ray.models.scratch import build_scratch
from qcrd_ray.sampling.engine import EngineSpec, SamplingParameters
from qcrd_ray.sampling.local_teacher import LocalTeacher
from qcrd_ray.sampling.teacher_engine import Answered, Ask, Prompt

TEXTS = [f"What is {a} + {b}? {a} + {b} = {a + b}." for a in range(40) for b in range(5)]
CONTEXT = 128
PARAMETERS = SamplingParameters(temperature=1.0, max_tokens=12, logprobs=False)


def prompt(number: int) -> Prompt:
    """Of different lengths, so that a batch of them would be cut into several prefills."""
    return Prompt(text=" ".join(f"What is {number} + {i}?" for i in range(1 + number % 6)))


def answer(teacher: LocalTeacher, asks: list[Ask]) -> list[Answered]:
    async def gather() -> list[Answered]:
        return await asyncio.gather(*map(teacher.ask, asks))

    return asyncio.run(gather())


def texts(answered: Answered) -> dict[int, str]:
    return {index: reply.text for index, reply in answered.replies.items()}


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.parametrize(("engine", "model"), [("vllm", "llama-tiny"), ("transformers", "t5-tiny")])
def test_a_sample_depends_on_its_seed_alone(tmp_path: Path, engine: str, model: str) -> None:
    folder = build_scratch(model, TEXTS, tmp_path / model, seed=0)
    spec = EngineSpec(engine, str(folder), precision="fp32", max_sequences=8, max_model_tokens=CONTEXT)
    teacher = LocalTeacher(spec, PARAMETERS)
    try:
        asks = [Ask(f"q{number}", prompt(number), (0, 1, 2, 3, 4), 1000 * number) for number in range(12)]
        whole = answer(teacher, asks)
        assert all(sorted(one.replies) == [0, 1, 2, 3, 4] and not one.failed for one in whole)
        assert all(0 < (r.completion_tokens or 0) <= 12 for one in whole for r in one.replies.values())
        assert len({text for one in whole for text in texts(one).values()}) > 30

        first = answer(teacher, [Ask(ask.id, ask.prompt, (0, 1), ask.seed) for ask in reversed(asks)])[::-1]
        rest = answer(teacher, [Ask(ask.id, ask.prompt, (2, 4), ask.seed) for ask in asks])
        for all_of_it, one, other in zip(whole, first, rest, strict=True):
            expected = texts(all_of_it)
            assert texts(one) | texts(other) == {index: expected[index] for index in (0, 1, 2, 4)}

        long = Ask("long", Prompt(text="What is 1 + 1? " * 200), (0, 1), 5)
        empty = Ask("empty", Prompt(text=""), (0,), 5)
        beside = answer(teacher, [long, asks[0], empty])
        assert beside[0] == Answered(failed={0: "prompt too long", 1: "prompt too long"})
        assert texts(beside[1]) == texts(whole[0])
        if engine == "vllm":
            assert beside[2].failed == {0: "empty prompt"}
    finally:
        asyncio.run(teacher.close())


@pytest.mark.slow
@pytest.mark.beside
def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unrecognized model"):
        LocalTeacher(EngineSpec("transformers", str(tmp_path)), PARAMETERS)

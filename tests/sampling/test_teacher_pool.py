from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcrd_ray.config import load_config
from qcrd_ray.sampling.sample_store import SampleSet
from qcrd_ray.sampling.teacher_engine import Answered, Ask, Reply
from qcrd_ray.sampling.teacher_pool import Plan, Totals, sample_missing
from qcrd_ray.sampling.teacher_prompt import PromptBuilder

TINY = Path(__file__).parents[2] / "jobs" / "configs" / "tiny.yaml"
QUESTIONS = 64


@pytest.mark.slow
@pytest.mark.beside
def test_who_watches_ends_the_sampling_and_what_was_sampled_is_kept(ray_session: Any, tmp_path: Path) -> None:
    class SlowTeacher:  # in here, so that Ray's workers get it with the job
        stopped: str | None = None

        async def ask(self, ask: Ask) -> Answered:
            await asyncio.sleep(0.25)
            return Answered({index: Reply("It is 1.", "stop", 4) for index in ask.indices}, {}, 5, 4)

        async def close(self) -> None:
            pass

    config = load_config(
        TINY,
        ["teacher.engine=transformers", "teacher.model=embedded:smollm2-135m", "teacher.samples=1",
         "teacher.max_sequences=1", "teacher.prompt=few_shot"],
    )  # fmt: skip
    sample_set = SampleSet(tmp_path / "set")
    seen: list[int] = []

    def show(plan: Plan, totals: Totals) -> None:
        seen.append(totals.answered)
        if totals.answered >= 2:
            raise KeyboardInterrupt

    def sample(show: Callable[[Plan, Totals], None]) -> Any:
        with sample_set.locked(patience_s=30.0) as lock:
            sample_set.create({"teacher": "slow"})
            return sample_missing(
                config, sample_set, PromptBuilder(config, False), lambda spent: SlowTeacher, show, lock
            )

    with pytest.raises(KeyboardInterrupt):
        sample(show)
    kept = sample_set.rows()
    assert 2 <= kept < QUESTIONS
    outcome = sample(lambda plan, totals: None)
    assert outcome.plan.reused == kept and outcome.plan.samples == QUESTIONS - kept
    assert outcome.stopped is None and sample_set.rows() == QUESTIONS

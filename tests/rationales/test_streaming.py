"""The stream of a worker's batches, on real Ray Data."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcrd_ray.config import load_config
from qcrd_ray.models.scratch import write_scratch
from qcrd_ray.rationales import streaming
from qcrd_ray.rationales.streaming import StreamSpec, read_steps, stream_batches
from qcrd_ray.rationales.tables import prepare_tables
from qcrd_ray.run_folder import DATA, RunFolder
from qcrd_ray.sampling.scripted import ScriptedTeacher
from qcrd_ray.tasks import get_task
from qcrd_ray.tasks.prompts import SEPARATOR, load_tokenizer
from qcrd_ray.training.initial_models import write_models

STEPS = 70


@pytest.fixture
def spec(ray_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StreamSpec:
    monkeypatch.setattr(streaming, "WINDOW_QUESTIONS", 64)  # of two workers with two questions each: 32 steps
    config = load_config(Path(__file__).parents[2] / "jobs" / "configs" / "tiny.yaml", [f"run.storage_path={tmp_path}"])
    run = RunFolder(str(tmp_path), "run")
    run.create()
    tables = run.working_folder(DATA)
    tables.mkdir(parents=True, exist_ok=True)
    prepare_tables(config, tables, ScriptedTeacher(config))
    write_models(config, run)
    return StreamSpec(run, config, rank=1, world=2)


def started() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in ("blocks-ahead", "next-batches")]


def end_within(seconds: float) -> None:
    for thread in started():
        thread.join(seconds)
    assert not started()


@pytest.mark.parametrize("first", [0, 5])
def test_the_batches_of_all_steps_come_in_order(spec: StreamSpec, first: int) -> None:
    batches = list(stream_batches(spec, first, STEPS))
    assert [batch.step for batch in batches] == list(range(first, STEPS))
    expected = [step["rows"] for step in read_steps(range(first, STEPS), spec).to_pylist()]
    assert [[vars(row) for row in batch.rows] for batch in batches] == expected
    assert {batch.epoch for batch in batches} == {0, 1, 2, 3, 4}  # 64 questions, 4 a step
    end_within(10)


@pytest.mark.parametrize("taken", [1, 20, STEPS - 1])
def test_a_stream_that_is_left_leaves_nothing_running(spec: StreamSpec, taken: int) -> None:
    batches = stream_batches(spec, 0, STEPS)
    for _ in range(taken):
        next(batches)
    batches.close()  # type: ignore[attr-defined]
    end_within(10)


def test_what_goes_wrong_in_a_task_is_raised_where_batches_are_taken(spec: StreamSpec) -> None:
    Path(spec.run.table("train")).unlink()
    streaming._open.cache_clear()
    with pytest.raises(Exception, match="train"):
        next(stream_batches(spec, 0, STEPS))
    end_within(10)


def test_each_item_is_made_while_the_one_before_it_is_used() -> None:
    asked: queue.SimpleQueue[int] = queue.SimpleQueue()

    def numbers() -> Iterator[int]:
        for number in range(3):
            asked.put(number)
            yield number

    items = streaming._one_ahead(numbers())
    assert asked.get(timeout=5) == 0
    for expected in range(3):
        assert next(items) == expected
        if expected < 2:
            assert asked.get(timeout=5) == expected + 1
        assert asked.empty()
    assert list(items) == []
    end_within(5)


def test_a_single_sequence_keeps_its_label_whatever_the_length_of_its_rationale(tmp_path: Path) -> None:
    overrides = ["method=single_task", "student.max_rationale_tokens=8", "student.max_label_tokens=4"]
    config = load_config(Path(__file__).parents[2] / "jobs" / "configs" / "tiny.yaml", overrides)
    rationales = ["3 + 4 = 7.", "3 + 4 = 7, " * 20]
    write_scratch("llama-tiny", [*rationales, SEPARATOR, "What is 3 + 4?"], tmp_path / "student", seed=0)
    tokenizer = load_tokenizer(str(tmp_path / "student"), config.student)
    records = [
        {"id": str(i), "question": "What is 3 + 4?", "choices": None, "label": "8", "positives": [], "negatives": [],
         "sample0": rationale, "sample0_label": "7"}
        for i, rationale in enumerate(rationales)
    ]  # fmt: skip
    length = len(tokenizer.targets(rationales[:1], 100)[0].ids)
    student = config.student.model_copy(update={"max_rationale_tokens": length})
    config = config.model_copy(update={"student": student})
    short, long = streaming._tokenize([0, 1], records, config, (tokenizer, get_task(config)))
    assert tokenizer.decode(list(short.label)) == f"{rationales[0]}{SEPARATOR}7"
    written, _, label = tokenizer.decode(list(long.label)).partition(SEPARATOR)
    assert label == "7" and long.label[-1] == tokenizer.end
    assert rationales[1].startswith(written) and 0 < len(written) < 20
    assert (short.cut_targets, long.cut_targets) == (0, 1)

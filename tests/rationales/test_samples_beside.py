"""Samples that lie beside the questions: flat tables and the stored samples of a live teacher."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qcrd_ray.config import ExperimentConfig, config_from_dict
from qcrd_ray.errors import UserError
from qcrd_ray.rationales import sample_index, tables
from qcrd_ray.rationales.columns import Columns
from qcrd_ray.rationales.raw_chunks import file_chunks
from qcrd_ray.rationales.sample_index import PartWriter, merge
from qcrd_ray.rationales.schema import STORED_SAMPLES, Question
from qcrd_ray.rationales.sources import SeenIds
from qcrd_ray.seeding import stable_hash
from qcrd_ray.tasks import Task


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def config(folder: Path, **keys: Any) -> ExperimentConfig:
    return config_from_dict({"task": "svamp", **keys, "data": {"path": str(folder), **keys.get("data", {})}})


def questions(count: int) -> list[dict[str, Any]]:
    return [{"id": f"q{i}", "question": f"How many is {i}?", "answer": str(i)} for i in range(count)]


def flat_samples(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"q{i}", "teacher": f"t{j % 2}", "rationale": f"{i} by way {j}", "answer": str(i + (j == 3))}
        for i in range(count)
        for j in range(5)
    ]


def test_an_index_gives_what_a_dictionary_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_index, "MERGED_AT_ONCE", 700)
    rows = flat_samples(800)
    random.Random(0).shuffle(rows)
    write_lines(tmp_path / "samples.jsonl", rows)
    writer = PartWriter(tmp_path)
    chunks = list(file_chunks(tmp_path / "samples.jsonl", 20_000))
    assert len(chunks) > 5
    for chunk in chunks:
        assert writer.write_chunk(chunk, Columns(config(tmp_path), "folder")) is None
    index = merge(tmp_path)
    expected: dict[str, list[str]] = {}
    for row in rows:
        expected.setdefault(row["id"], []).append(row["rationale"])
    asked = [f"q{i}" for i in random.Random(1).choices(range(900), k=400)]
    found = index.find([stable_hash(name) for name in asked])
    assert [[sample.text for sample in samples] for samples in found] == [expected.get(name, []) for name in asked]
    assert index.find([]) == []
    known = np.sort(np.array([stable_hash(f"q{i}") for i in range(0, 800, 2)]))
    assert index.count_others(known) == 400 * 5
    assert index.count_others(known[:0]) == 800 * 5


def test_ids_that_stand_twice_are_found_like_by_a_dictionary() -> None:
    generator = random.Random(3)
    for _ in range(50):
        seen, first_of, number = SeenIds(), dict[int, int](), 0
        for _ in range(20):
            block = [generator.randrange(3000) for _ in range(generator.randrange(20))]
            numbers = list(range(number, number + len(block)))
            expected = None
            for place, (identity, at) in enumerate(zip(block, numbers, strict=True)):
                if first_of.setdefault(identity, at) != at:
                    expected = (place, first_of[identity])
                    break
            assert seen.add(np.array(block, np.int64), np.array(numbers, np.int64)) == expected
            if expected is not None:
                break
            number += len(block)
        else:
            assert seen.sorted().tolist() == sorted(first_of)


def test_flat_tables_of_many_parts_equal_nested_samples(
    ray_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_LEAST_INDEX_BYTES", 50_000)
    count = 3000
    samples = flat_samples(count)
    nested = [{**q, "teacher_samples": samples[5 * i : 5 * i + 5]} for i, q in enumerate(questions(count))]
    random.Random(0).shuffle(samples)
    extra = [{"id": "nobody", "rationale": "x", "answer": "1"}] * 3
    for name in ("nested", "flat", "parquet"):
        (tmp_path / name).mkdir()
    write_lines(tmp_path / "nested" / "train.jsonl", nested)
    write_lines(tmp_path / "flat" / "train.jsonl", questions(count))
    write_lines(tmp_path / "flat" / "train.teacher_samples.jsonl", samples + extra)
    pq.write_table(pa.Table.from_pylist(questions(count)), tmp_path / "parquet" / "train.parquet")
    table = pa.Table.from_pylist(samples + extra)
    pq.write_table(table, tmp_path / "parquet" / "train.teacher_samples.parquet", row_group_size=999)
    made = {
        n: tables.prepare_tables(config(tmp_path / n), tmp_path / f"{n}-out") for n in ("nested", "flat", "parquet")
    }
    assert made["nested"].train.samples == 5 * count
    for name in ("flat", "parquet"):
        assert made[name].train.orphans == 3
        assert made[name].train.model_copy(update={"orphans": 0}) == made["nested"].train
        for folder in ("teacher_samples", "rationale_sets"):
            assert pq.read_table(tmp_path / f"{name}-out" / folder).equals(
                pq.read_table(tmp_path / "nested-out" / folder)
            )
        assert not (tmp_path / f"{name}-out" / "index").exists()


def flat_error(tmp_path: Path, question_rows: list[Any], sample_rows: list[Any], **data: Any) -> str:
    write_lines(tmp_path / "train.jsonl", question_rows)
    write_lines(tmp_path / "train.teacher_samples.jsonl", sample_rows)
    with pytest.raises(UserError) as caught:
        tables.prepare_tables(config(tmp_path, data=data), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_faults_of_a_flat_table_are_met_in_order(ray_session: Any, tmp_path: Path) -> None:
    good = flat_samples(3)
    bad = {"id": "q1", "rationale": 7, "answer": "1"}
    where = "train.teacher_samples.jsonl:17: column 'rationale': expected a string, found a number"
    assert where in flat_error(tmp_path, questions(3), [*good, {**bad, "id": "nobody"}, bad])
    assert "train.jsonl:4: no valid JSON" in flat_error(tmp_path, [*questions(3), "{"], [*good, {**bad, "id": "no"}])
    assert "train.jsonl:2: id 'q0' stands twice, first at line 1" in flat_error(
        tmp_path, [questions(1)[0], *questions(2)], [*good, bad]
    )
    assert "samples.jsonl:16: no valid JSON" in flat_error(tmp_path, ["{"], [*good, "{", bad])
    assert "samples.jsonl:1: no column 'id'" in flat_error(tmp_path, questions(1), [{"rationale": "x"}])
    assert "no samples of 't7'; known: t0, t1" in flat_error(tmp_path, questions(3), good, teachers=["t7"])
    write_lines(tmp_path / "train.teacher_samples.jsonl", [*good, {**bad, "id": "q2"}])
    counts = tables.prepare_tables(config(tmp_path, data={"limit": 2}), tmp_path / "out")
    assert (counts.train.used, counts.train.orphans) == (2, 0)


@dataclass(frozen=True)
class Stored:
    parts: tuple[Path, ...]
    name: str = "live"
    simulated: bool = False
    fingerprint: str = "abc"
    temperature: float = 0.7

    def key(self, task: Task, question: Question) -> int:
        return stable_hash(question.id, question.question)


def stored_row(number: int, index: int, answer: int | str, **more: Any) -> dict[str, Any]:
    text = f"Way {index} of {number}. The answer is {answer}."
    key = stable_hash(f"q{number}", f"How many is {number}?")
    row = {"key": key, "id": f"q{number}", "sample_index": index, "text": text, "seed": 100 + index}
    return {**row, "finish_reason": "stop", "completion_tokens": 9, **more}


def write_parts(folder: Path, *parts: list[dict[str, Any]], row_group_size: int = 1000) -> tuple[Path, ...]:
    folder.mkdir(exist_ok=True)
    paths = []
    for number, rows in enumerate(parts):
        paths.append(folder / f"run-{number}.parquet")
        table = pa.Table.from_pylist(rows, schema=STORED_SAMPLES)
        pq.write_table(table, paths[-1], row_group_size=row_group_size)
    return tuple(paths)


def test_stored_samples_become_tables(ray_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_index, "PART_BYTES", 1)
    write_lines(tmp_path / "train.jsonl", questions(5))
    one = [stored_row(0, i, 0) for i in (4, 3, 0, 1)]  # sample 2 failed
    one += [stored_row(1, i, 1 + i // 3) for i in range(7)]  # more than are asked for
    two = [
        stored_row(0, 1, 77),
        stored_row(2, 0, 2, text="x" * 300),
        stored_row(2, 1, 2, text=" \n"),
        stored_row(2, 2, 2),
    ]
    two += [stored_row(9, 0, 1), {**stored_row(3, 0, 3), "key": 5}]  # no question of ours; another prompt
    teacher = Stored(write_parts(tmp_path / "store", one, two, row_group_size=3))
    chosen = config(tmp_path, data={"max_rationale_chars": 200}, teacher={"engine": "vllm", "model": "m", "samples": 5})
    counts = tables.prepare_tables(chosen, tmp_path / "out", teacher)
    samples = pq.read_table(tmp_path / "out" / "teacher_samples").to_pylist()
    places = [(row["id"], row["sample_index"]) for row in samples]
    assert places == [("q0", 0), ("q0", 1), ("q0", 3), ("q0", 4), *[("q1", i) for i in range(5)], ("q2", 2)]
    assert samples[1]["answer"] == "0"  # of two with one index the first counts
    first = {name: samples[0][name] for name in ("rationale", "teacher", "seed", "finish_reason", "fingerprint")}
    assert first == {
        "rationale": "Way 0 of 0.",
        "teacher": "live",
        "seed": 100,
        "finish_reason": "stop",
        "fingerprint": "abc",
    }
    assert samples[0]["completion_tokens"] == 9
    train = counts.train
    assert (train.questions, train.used, train.too_long, train.empty, train.samples) == (5, 3, 1, 1, 10)
    assert train.dropped["no_samples"].ids == ("q3", "q4")
    assert (train.orphans, train.short_of_samples, counts.teacher) == (0, 2, "live")
    sets = tables.open_rationale_table(tmp_path / "out" / "train.arrow").to_pylist()
    assert sets[1]["positives"] == ["Way 0 of 1.", "Way 1 of 1.", "Way 2 of 1."]
    assert tables.prepare_tables(chosen, tmp_path / "out", teacher).reused


def test_a_limit_counts_questions_that_a_teacher_is_asked(ray_session: Any, tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [*questions(6), "no json"])
    parts = write_parts(tmp_path / "store", [stored_row(i, 0, i) for i in (1, 2, 5)])
    chosen = config(tmp_path, data={"limit": 4}, teacher={"engine": "vllm", "model": "m"})
    counts = tables.prepare_tables(chosen, tmp_path / "out", Stored(parts))
    assert (counts.train.questions, counts.train.used) == (4, 2)
    assert tables.prepare_tables(config(tmp_path, data={"limit": 6}), tmp_path / "two", Stored(parts)).train.used == 3


def test_tables_of_stored_samples_know_the_parts(ray_session: Any, tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", questions(3))
    parts = write_parts(tmp_path / "store", [stored_row(i, 0, i) for i in range(2)])
    keys = {"engine": "vllm", "model": "m"}
    tables.prepare_tables(config(tmp_path, teacher=keys), tmp_path / "out", Stored(parts))
    elsewhere = config(tmp_path, teacher={**keys, "actors": 3, "store": "s", "cpus": 2.0, "threads": 1})
    assert tables.prepare_tables(elsewhere, tmp_path / "out", Stored(parts)).reused
    more = write_parts(tmp_path / "store", [stored_row(i, 0, i) for i in range(2)], [stored_row(2, 0, 2)])
    kept = tables.existing_tables(elsewhere, tmp_path / "out", Stored(more))
    assert kept is not None
    assert kept.train.used == 2
    assert tables.existing_tables(elsewhere, tmp_path / "out", Stored(more, fingerprint="other")) is None
    assert tables.existing_tables(elsewhere, tmp_path / "nowhere", Stored(more)) is None
    assert tables.prepare_tables(elsewhere, tmp_path / "out", Stored(more)).train.used == 3
    fewer = config(tmp_path, teacher={**keys, "samples": 4})
    assert not tables.prepare_tables(fewer, tmp_path / "out", Stored(more)).reused


def test_a_part_that_is_none_is_one_line(ray_session: Any, tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", questions(1))
    part = tmp_path / "part.parquet"
    part.write_text("nothing of the kind")
    chosen = config(tmp_path, teacher={"engine": "vllm", "model": "m"})
    with pytest.raises(UserError, match=r"part\.parquet: no valid Parquet"):
        tables.prepare_tables(chosen, tmp_path / "out", Stored((part,)))
    pq.write_table(pa.table({"key": [1]}), part)
    with pytest.raises(UserError, match=r"part\.parquet: no column 'id'"):
        tables.prepare_tables(chosen, tmp_path / "out", Stored((part,)))
    with pytest.raises(UserError, match="no_samples 1"):
        tables.prepare_tables(chosen, tmp_path / "out", Stored(()))

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from qcrd_ray.config import ExperimentConfig, config_from_dict
from qcrd_ray.errors import UserError
from qcrd_ray.rationales import tables
from qcrd_ray.rationales.counts import Counts
from qcrd_ray.rationales.schema import HELD_OUT, RATIONALE_SETS, TEACHER_SAMPLES, check_table
from qcrd_ray.rationales.table_files import open_rationale_table
from qcrd_ray.sampling import teacher as live
from qcrd_ray.sampling.scripted import NAME, ScriptedTeacher, slip_probability


def prepare_tables(chosen: ExperimentConfig, output: Path) -> Counts:
    return tables.prepare_tables(
        chosen, output, ScriptedTeacher(chosen) if chosen.teacher.engine == "scripted" else None
    )


def source(folder: Path, answers: dict[str, list[str | None]], gold: str = "1") -> Path:
    """A folder whose questions have samples with the given answers."""
    folder.mkdir(exist_ok=True)
    lines = []
    for name, given in answers.items():
        samples = [{"teacher": "t", "rationale": f"{name} {i}", "answer": a} for i, a in enumerate(given)]
        lines.append({"id": name, "question": f"{name}?", "answer": gold, "teacher_samples": samples})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "valid.jsonl").write_text(json.dumps({"id": "v", "question": "v?", "answer": "2", "equation": "( 2 )"}))
    return folder


def config(path: Path | str, **keys: Any) -> ExperimentConfig:
    data = {"path": str(path), **keys.pop("data", {})}
    return config_from_dict({"task": "svamp", **keys, "data": data})


ANSWERS: dict[str, list[str | None]] = {
    "only-right": ["1", "1.0", "1"],
    "split": ["1", "2", "2"],
    "unparsed": [None, None],
    "none": [],
    "only-wrong": ["3", "3", None],
}


def test_labels_alone_are_learned_from_the_questions_of_all_methods(ray_session: Any, tmp_path: Path) -> None:
    def used(place: Path, **keys: Any) -> list[str]:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        prepare_tables(config(place, **keys), out)
        return [str(name) for name in open_rationale_table(out / "train.arrow")["id"].to_pylist()]

    answered = source(tmp_path / "answered", ANSWERS)
    assert used(answered, method="finetune") == used(answered, method="dss") == ["only-right", "split", "only-wrong"]
    assert used(answered, method="finetune", data={"unanswered": "keep"}) == list(ANSWERS)
    assert used(answered, method="dss", data={"unanswered": "keep"}) == used(answered, method="dss")
    unasked = source(tmp_path / "unasked", {name: [] for name in ANSWERS})
    assert used(unasked, method="finetune") == list(ANSWERS)
    with pytest.raises(UserError, match="no_samples 5"):
        used(unasked, method="finetune", data={"unanswered": "drop"})


def test_tables_and_counts(ray_session: Any, tmp_path: Path) -> None:
    counts = prepare_tables(config(source(tmp_path / "in", ANSWERS)), tmp_path / "out")
    train = counts.train
    assert (train.questions, train.used) == (5, 3)
    assert train.dropped["no_parsed_answer"].ids == ("unparsed",)
    assert train.dropped["no_samples"].ids == ("none",)
    assert (train.samples, train.parsed, train.unparsed, train.short_of_samples) == (11, 8, 3, 4)
    assert train.single_sample_accuracy == 4 / 11
    assert train.vote_accuracy == 1 / 4
    assert train.wrongly_voted == 2
    assert (train.by_gold.average_right, train.by_gold.only_right, train.by_gold.only_wrong) == (4 / 3, 1 / 3, 1 / 3)
    assert (train.by_vote.average_positives, train.by_vote.only_positives) == (7 / 3, 2 / 3)
    assert train.agreement_histogram == (0, 0, 0, 0, 0, 0, 1, 0, 0, 2)
    assert train.agreement_mean == pytest.approx((1 + 2 / 3 + 1) / 3)

    table = tables.open_rationale_table(tmp_path / "out" / "train.arrow")
    check_table(table.schema, RATIONALE_SETS, "train.arrow")
    assert table["id"].to_pylist() == ["only-right", "split", "only-wrong"]
    assert table.equals(pq.read_table(tmp_path / "out" / "rationale_sets").cast(RATIONALE_SETS))
    held_out = tables.open_rationale_table(tmp_path / "out" / "valid.arrow")
    check_table(held_out.schema, HELD_OUT, "valid.arrow")
    assert held_out.to_pylist()[0]["label"] == "( 2 )"
    samples = pq.read_table(tmp_path / "out" / "teacher_samples")
    check_table(samples.schema, TEACHER_SAMPLES, "teacher_samples")
    assert samples.num_rows == 11
    assert samples["sample_index"].to_pylist() == [0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 2]


def test_order_is_the_source_s_over_many_blocks(ray_session: Any, tmp_path: Path) -> None:
    answers: dict[str, list[str | None]] = {f"q{i}": ["1"] if i % 3 else [] for i in range(2000)}
    folder = source(tmp_path / "in", answers)
    counts = prepare_tables(config(folder, data={"limit": 1100}), tmp_path / "out")
    table = tables.open_rationale_table(tmp_path / "out" / "train.arrow")
    assert table["id"].to_pylist() == [name for name, given in answers.items() if given][:1100]
    assert table["id"].num_chunks == 2
    assert [row["id"] for row in tables.rows_at(table, [1099, 0])] == [table["id"][1099].as_py(), "q1"]
    assert counts.train.used == 1100
    assert counts.train.questions == 1650


def test_tables_are_reused_until_something_changes(ray_session: Any, tmp_path: Path) -> None:
    folder = source(tmp_path / "in", ANSWERS)
    output = tmp_path / "out"
    assert not prepare_tables(config(folder), output).reused
    before = (output / "train.arrow").stat().st_mtime_ns
    assert prepare_tables(config(folder), output).reused
    assert (output / "train.arrow").stat().st_mtime_ns == before
    assert not prepare_tables(config(folder, labels="teacher_vote"), output).reused
    source(folder, {"other": ["1"]})
    assert prepare_tables(config(folder), output).train.questions == 1
    (output / "counts.json").unlink()
    assert not prepare_tables(config(folder), output).reused


def test_an_error_leaves_the_old_tables(ray_session: Any, tmp_path: Path) -> None:
    folder = source(tmp_path / "in", ANSWERS)
    output = tmp_path / "out"
    prepare_tables(config(folder), output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with (folder / "train.jsonl").open("a") as file:
        file.write("no json\n")
    with pytest.raises(UserError, match=r"train\.jsonl:6"):
        prepare_tables(config(folder), output)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_what_a_limit_leaves_unread_is_not_judged(ray_session: Any, tmp_path: Path) -> None:
    folder = source(tmp_path / "in", ANSWERS)
    with (folder / "train.jsonl").open("a") as file:
        file.write("no json\n")
    assert prepare_tables(config(folder, data={"limit": 3}), tmp_path / "out").train.used == 3


def test_an_unknown_teacher_is_named_even_with_a_limit(ray_session: Any, tmp_path: Path) -> None:
    folder = source(tmp_path / "in", ANSWERS)
    with pytest.raises(UserError, match="'nobody'; known: t"):
        prepare_tables(config(folder, data={"limit": 1, "teachers": ["t", "nobody"]}), tmp_path / "out")


def test_a_teacher_that_is_killed_leaves_nothing_that_looks_complete(ray_session: Any, tmp_path: Path) -> None:
    stale = tmp_path / "out" / f".tables-{tables.socket.gethostname()}-999999999.tmp"
    stale.mkdir(parents=True)
    (stale / "counts.json").write_text("{}")
    assert not prepare_tables(config(source(tmp_path / "in", ANSWERS)), tmp_path / "out").reused
    assert not stale.exists()


def test_cut_and_near_duplicate_rationales_are_counted(ray_session: Any, tmp_path: Path) -> None:
    texts = ["It is 1.", "it is  1", "It is 1.\n\nQ: What else?\nA: 2", "One it is.", "It is 2."]
    samples = [{"rationale": text, "answer": "2" if "2." in text else "1"} for text in texts]
    row = {"id": "a", "question": "q", "answer": "1", "teacher_samples": samples}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    counts = prepare_tables(config(tmp_path, data={"near_duplicates": 1.0}), tmp_path / "out").train
    assert (counts.cut, counts.near_duplicates, counts.samples) == (1, 2, 5)
    assert counts.by_vote.average_positives == 4  # all of them vote
    (made,) = tables.open_rationale_table(tmp_path / "out" / "train.arrow").to_pylist()
    assert sorted(text.lower().strip(".") for text in made["positives"]) in (
        ["it is 1", "one it is"],
        ["it is  1", "one it is"],
    )
    assert made["agreement"] == pytest.approx(0.8)
    both = prepare_tables(config(tmp_path, data={"near_duplicates": 1.0, "max_positives": 2}), tmp_path / "two").train
    assert both.near_duplicates == 2
    assert prepare_tables(config(tmp_path), tmp_path / "all").train.near_duplicates == 0


def scripted(**keys: Any) -> ExperimentConfig:
    teacher = {"engine": "scripted", **keys.pop("teacher", {})}
    return config("generated:chain_sum", task="chain_sum", teacher=teacher, **keys)


def test_scripted_teacher_slips_as_often_as_the_paper_s(ray_session: Any, tmp_path: Path) -> None:
    counts = prepare_tables(scripted(), tmp_path / "out")
    assert counts.simulated
    assert counts.teacher == NAME
    assert counts.train.by_gold.average_right == pytest.approx(3.9, abs=0.12)
    assert counts.held_out["test"].used == 200
    teachers = pq.read_table(tmp_path / "out" / "teacher_samples")["teacher"].unique().to_pylist()
    assert teachers == [NAME]


def test_scripted_teacher_is_right_at_temperature_zero(ray_session: Any, tmp_path: Path) -> None:
    few = {"generated": {"train": 40, "valid": 5}}
    counts = prepare_tables(scripted(teacher={"temperature": 0.0}, data=few), tmp_path / "cold")
    assert counts.train.single_sample_accuracy == 1.0
    again = prepare_tables(scripted(data=few), tmp_path / "one")
    assert again.train == prepare_tables(scripted(data=few), tmp_path / "two").train
    one, two = (tables.open_rationale_table(tmp_path / name / "train.arrow") for name in ("one", "two"))
    assert one.equals(two)
    assert 0.0 == slip_probability(0.0) < slip_probability(0.7) < slip_probability(10.0) < 1.0


def test_scripted_teacher_needs_a_script(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scripted"):
        prepare_tables(config(source(tmp_path / "in", ANSWERS), teacher={"engine": "scripted"}), tmp_path / "out")
    with pytest.raises(UserError, match=r"teacher\.engine=scripted"):
        live.prepare_tables(config("generated:chain_sum", task="chain_sum"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        tables.open_rationale_table(tmp_path / "train.arrow")
    (tmp_path / "train.arrow").write_text("text")
    with pytest.raises(UserError, match="no Arrow file"):
        tables.open_rationale_table(tmp_path / "train.arrow")
    with pytest.raises(UserError, match="no column 'label'"):
        check_table(TEACHER_SAMPLES, RATIONALE_SETS, "samples", ["id", "label"])


def svamp(benchmark_data: Path, output: Path, samples: int) -> Counts:
    data = {"teachers": ["gpt35turbo-mcckd"]}
    return prepare_tables(
        config(benchmark_data / "svamp", data=data, teacher={"samples": samples}, judge={"augmentation": "none"}),
        output,
    )


def test_right_first_files_give_what_shuffled_ones_give(benchmark_data: Path, ray_session: Any, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (benchmark_data / "svamp" / "train.jsonl").open(encoding="utf-8")]
    bare = [{name: value for name, value in row.items() if name != "teacher_samples"} for row in lines]
    made = {}
    for order in ("sorted", "shuffled"):
        nested, flat = tmp_path / f"{order}-nested", tmp_path / f"{order}-flat"
        nested.mkdir(), flat.mkdir()
        for row in lines:
            given = [s for s in row["teacher_samples"] if s["teacher"] == "gpt35turbo-mcckd"]
            given.sort(key=lambda s: s["answer"] is None or float(s["answer"]) != float(row["answer"]))
            if order == "shuffled":
                random.Random(row["id"]).shuffle(given)
            row["teacher_samples"] = given
        samples = [{"id": row["id"], **sample} for row in lines for sample in row["teacher_samples"]]
        if order == "shuffled":
            random.Random(0).shuffle(samples)
        for path, rows in (
            (nested / "train.jsonl", lines),
            (flat / "train.jsonl", bare),
            (flat / "train.teacher_samples.jsonl", samples),
        ):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for folder in (nested, flat):
            output = tmp_path / f"{folder.name}-out"
            counts = prepare_tables(config(folder, teacher={"samples": 10}, judge={"augmentation": "none"}), output)
            made[folder.name] = (
                counts.train,
                pq.read_table(output / "teacher_samples"),
                pq.read_table(output / "rationale_sets"),
            )
    first = made.pop("sorted-nested")
    for other in made.values():
        assert other[0] == first[0]
        assert other[1].equals(first[1])
        assert other[2].equals(first[2])
    assert 0.67 < first[0].single_sample_accuracy < 0.69
    assert 0.82 < first[0].vote_accuracy < 0.85
    one = prepare_tables(config(tmp_path / "sorted-nested", teacher={"samples": 1}), tmp_path / "one").train
    assert 0.62 < one.single_sample_accuracy < 0.74  # sample 0 is no better than any other


def test_raw_outputs_of_palm_are_cut_and_parsed(benchmark_data: Path, ray_session: Any, tmp_path: Path) -> None:
    counts = prepare_tables(config(benchmark_data / "dss" / "svamp"), tmp_path / "out").train
    assert counts.questions == 800
    assert counts.parsed >= 760
    assert 0.70 < counts.single_sample_accuracy < 0.80
    assert counts.cut > 700
    rationales = pq.read_table(tmp_path / "out" / "teacher_samples")["rationale"].to_pylist()
    assert not any("Q:" in rationale for rationale in rationales)


def test_gpt35_on_svamp(benchmark_data: Path, ray_session: Any, tmp_path: Path) -> None:
    ten, five = (svamp(benchmark_data, tmp_path / str(n), n).train for n in (10, 5))
    assert ten.used == five.used == 508
    assert ten.dropped["no_samples"].count == 212
    assert ten.single_sample_accuracy == pytest.approx(0.678, abs=0.01)
    assert ten.vote_accuracy == pytest.approx(0.835, abs=0.015)
    assert five.vote_accuracy == pytest.approx(0.807, abs=0.02)


def test_a_smaller_number_of_samples_is_the_first_of_a_larger(
    benchmark_data: Path, ray_session: Any, tmp_path: Path
) -> None:
    for samples in (5, 10):
        assert svamp(benchmark_data, tmp_path / str(samples), samples).train.samples > 60 * samples
    found: dict[str, list[tuple[str, str | None]]] = {}
    for row in pq.read_table(tmp_path / "10" / "teacher_samples").sort_by("sample_index").to_pylist():
        found.setdefault(row["id"], []).append((row["rationale"], row["answer"]))
    for samples in (5, 10):
        rows = pq.read_table(tmp_path / str(samples) / "rationale_sets").to_pylist()
        assert len(rows) > 60
        for row in rows:
            parsed = [text for text, answer in found[row["id"]][:samples] if answer is not None]
            assert sorted(row["positives"] + row["negatives"]) == sorted(parsed)


def test_a_share_is_part_of_a_larger_share(tmp_path: Path) -> None:
    path = source(tmp_path / "source", {f"q{i}": ["1", "1", "2"] for i in range(41)} | {"none": []})
    used: dict[float, list[str]] = {}
    for share in (1.0, 0.5, 0.125):
        output = tmp_path / f"tables-{share}"
        counts = prepare_tables(config(path, data={"share": share}), output)
        table = tables.open_rationale_table(output / "train.arrow")
        check_table(table.schema, RATIONALE_SETS, "train")
        used[share] = table["id"].to_pylist()
        assert pq.read_table(output / "rationale_sets")["id"].to_pylist() == used[share]
        assert counts.train.used == len(used[share]) == round(41 * share)
        left_out = counts.train.dropped.get("beyond_share")
        assert (left_out.count if left_out else 0) == 41 - len(used[share])
        assert counts.train.dropped["no_samples"].count == 1
    assert used[1.0] == [f"q{i}" for i in range(41)]
    assert used[0.5] == [q for q in used[1.0] if q in set(used[0.5])]
    assert set(used[0.125]) < set(used[0.5])
    assert used[0.125] != used[1.0][:5]

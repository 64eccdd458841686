"""What a trained run keeps to look at, without a student; tests/reporting/test_report.py has a whole run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from qcrd_ray.config import ExperimentConfig, load_config
from qcrd_ray.rationales.schema import HELD_OUT, RATIONALE_SETS
from qcrd_ray.rationales.table_files import ArrowFile
from qcrd_ray.run_folder import OBSERVATIONS_FILE, RunFolder
from qcrd_ray.training.observations import observe, temperatures, the_teacher_s
from qcrd_ray.training.stopping import Stop


def sample(answer: str, text: str) -> dict[str, str]:
    return {"rationale": text, "answer": answer}


def prepared(folder: Path, *overrides: str) -> tuple[ExperimentConfig, RunFolder]:
    """A source with samples of held-out questions, and a run with the tables of it."""
    data = folder / "data"
    data.mkdir()
    lines: list[dict[str, Any]] = [
        {"id": f"v{n}", "question": f"question {n}", "answer": "a", "teacher_samples": [
            sample("a", f"right {n}"), sample("b", f"wrong {n}"), sample("a", f"right too {n}")]}
        for n in range(5)
    ]  # fmt: skip
    del lines[1]["teacher_samples"]
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = load_config(None, ["task=custom", f"data.path={data}", f"run.storage_path={folder}", "run.name=run",
                                "evaluation.observed=3", *overrides])  # fmt: skip
    run = RunFolder(str(folder), "run")
    (folder / "run" / "data").mkdir(parents=True)
    held_out = [{"id": f"v{n}", "question": f"question {n}", "answer": "a", "label": "a"} for n in range(5)]
    sets = [
        {**row, "id": f"t{n}", "positives": ["p"], "negatives": ["n", "m"], "sample0": "p"}
        for n, row in enumerate(held_out)
    ]
    with ArrowFile(folder / "run" / "data" / "valid.arrow", HELD_OUT) as valid:
        valid.write(pa.Table.from_pylist(held_out, schema=HELD_OUT))
    with ArrowFile(folder / "run" / "data" / "train.arrow", RATIONALE_SETS) as train:
        train.write(pa.Table.from_pylist(sets, schema=RATIONALE_SETS))
    return config, run


def test_the_teacher_s_rationales_of_held_out_and_of_training_questions(tmp_path: Path) -> None:
    config, run = prepared(tmp_path)
    rows = list(the_teacher_s(config, run, "valid"))
    found = {(row["split"], row["kind"], row["id"]): row["rationale"] for row in rows}
    held_out = {(row["id"], row["kind"], row["rationale"]) for row in rows if row["split"] == "valid"}
    assert held_out == {
        (f"v{n}", kind, f"{text} {n}")
        for n in (0, 2)  # the second has no samples; no more than three are looked at
        for kind, text in (("positive", "right"), ("positive", "right too"), ("negative", "wrong"))
    }
    assert [key for key in found if key[0] == "train"] == [
        ("train", kind, f"t{n}") for n in range(3) for kind in ("positive", "negative")
    ]
    assert all(row["question"].startswith("question") and row["score"] is None for row in rows)


def test_a_live_teacher_and_a_source_that_is_gone_leave_those_of_training_questions(tmp_path: Path) -> None:
    config, run = prepared(tmp_path)
    live = load_config(None, ["task=custom", f"data.path={tmp_path / 'data'}", "teacher.engine=openai",
                              "teacher.model=m", "evaluation.observed=3"])  # fmt: skip
    assert {row["split"] for row in the_teacher_s(live, run, "valid")} == {"train"}
    (tmp_path / "data" / "valid.jsonl").unlink()
    assert {row["split"] for row in the_teacher_s(config, run, "valid")} == {"train"}


def test_the_temperature_of_the_negatives_is_always_among_them() -> None:
    assert temperatures(load_config(None)) == [0.0, 0.7, 1.5, 2.0]
    config = load_config(None, ["negatives.temperature=1.1", "evaluation.temperatures=[2.0, 0.5]"])
    assert temperatures(config) == [0.5, 1.1, 2.0]


def test_what_fails_is_logged_and_costs_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, run = prepared(tmp_path)
    (tmp_path / "run" / "data" / "valid.arrow").unlink()
    with caplog.at_level(logging.WARNING):
        observe(config, run, None, None, 1, "valid", Stop())
    assert "no rationales are kept for the report" in caplog.text and "valid.arrow" in caplog.text
    assert not run.exists(OBSERVATIONS_FILE)


@pytest.mark.parametrize("override", ["evaluation.observed=0", "method=finetune"])
def test_nothing_is_asked_for_where_nothing_is_to_be_observed(
    override: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, run = prepared(tmp_path, override)
    observe(config, run, None, None, 1, "valid", Stop())
    assert caplog.text == "" and not run.exists(OBSERVATIONS_FILE)

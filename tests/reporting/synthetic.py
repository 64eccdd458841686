"""A run's folder of any size, made by the project's own writers, without a student."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qcrd_ray.cli import result_line
from qcrd_ray.config import ExperimentConfig, config_to_yaml, load_config
from qcrd_ray.rationales.schema import HELD_OUT, NEGATIVES, OBSERVATIONS, RATIONALE_SETS, TEACHER_SAMPLES
from qcrd_ray.rationales.table_files import ArrowFile, ParquetParts
from qcrd_ray.run_folder import (
    CONFIG,
    DATA,
    EVALUATIONS,
    EVALUATIONS_SUMMARY,
    OBSERVATIONS_FILE,
    RESULT,
    Metrics,
    RunFolder,
)
from qcrd_ray.sampling.negatives import write_negatives
from qcrd_ray.sampling.schedule import Schedule
from qcrd_ray.sampling.snapshot import Snapshot

HOSTILE = [
    "<script>document.title = 'hacked'; window.hacked = 1</script>",
    '</style></script><img src=x onerror="window.hacked = 2">',
    "x" * 100_000,
    "\u202eright to left, reversed\u202d and \u05d0\u05d1\u05d2 \u0645\u0631\u062d\u0628\u0627",
    "{{ 7 * 7 }} {% raw %} ${7 * 7} &lt;b&gt; \" ' ` \x00\ufffe",
]
WORDS = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split()
NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivo", "Jane"]


def config_of(folder: Path | str, *overrides: str) -> ExperimentConfig:
    return load_config(None, [
        "task=custom", "data.path=nowhere", f"run.storage_path={folder}", "train.iteration_steps=100",
        "negatives.lag=5", "sampler.chunk_questions=64", "student.model=scratch:t5-tiny", *overrides,
    ])  # fmt: skip


def write_run(
    folder: Path | str,
    name: str = "run",
    steps: int = 40,
    questions: int = 30,
    held_out: int = 12,
    overrides: tuple[str, ...] = (),
    hostile: bool = False,
    seed: int = 0,
    judge: bool = True,
) -> RunFolder:
    """A complete run. Its texts are prose of a length as of the paper's data; with `hostile` some are none.

    Args:
        steps, questions, held_out: how large it is.
        judge: whether there are scores.
    """
    config = config_of(folder, f"run.name={name}", f"train.max_steps={steps}", *overrides)
    generator = random.Random(seed)
    run = RunFolder(str(folder), name)
    run.create()
    run.write(CONFIG, config_to_yaml(config))
    sets = [_rationale_set(generator, number) for number in range(questions)]
    valid = [_held_out(generator, number) for number in range(held_out)]
    if hostile:
        sets[0] |= {
            "id": HOSTILE[0],
            "question": HOSTILE[1],
            "label": HOSTILE[0],
            "positives": HOSTILE,
            "negatives": HOSTILE,
        }
        valid[0] |= {"id": HOSTILE[1], "question": HOSTILE[3], "label": HOSTILE[1]}
    _write_tables(run, sets, valid)
    _write_metrics(run, config, generator, steps)
    evaluations = _write_evaluations(run, config, generator, valid)
    _write_negatives(run, config, generator, [row["id"] for row in sets], hostile)
    _write_observations(run, config, generator, sets[:20], valid[:50], hostile, judge)
    last = evaluations[-1]
    run.write(RESULT, result_line({
        "job": "train", "name": name, "method": config.method, "task": config.task, "student": config.student.model,
        "steps": steps, "seconds": 12.5, "train_tokens_per_second": 1234.5, "evaluations": evaluations,
        "accuracy": {"before": evaluations[0]["accuracy"], "after": last["accuracy"], "split": "valid",
                     "n": len(valid), "student": "last", "step": steps},
        "negatives": {"used": 8 * steps, "lag_min": 0, "lag_max": 5, "active_fraction": 0.4, "stall_seconds": 0.5,
                      "stall_fraction": 0.004, "warmup_seconds": 2.0, "sampler": {"tokens": 900, "busy_seconds": 3.0}},
    }) + "\n")  # fmt: skip
    return run


VOCABULARY = 3 * WORDS + [str(number) for number in range(200)]


def prose(generator: random.Random, words: int) -> str:
    return " ".join(generator.choices(VOCABULARY, k=words))


def _rationale_set(generator: random.Random, number: int) -> dict[str, Any]:
    positives = [prose(generator, generator.randrange(20, 45)) for _ in range(generator.randrange(3, 6))]
    answer = str(generator.randrange(4))
    return {
        "id": f"train-{number}",
        "question": f"{generator.choice(NAMES)} asks {number}: {prose(generator, 28)}?",
        "choices": None,
        "answer": answer,
        "label": answer,
        "positives": positives,
        "negatives": [prose(generator, 30) for _ in range(5 - len(positives))],
        "agreement": len(positives) / 5,
        "votes_gold": generator.random() < 0.9,
        "sample0": positives[0],
        "sample0_label": answer,
    }


def _held_out(generator: random.Random, number: int) -> dict[str, Any]:
    answer = str(generator.randrange(4))
    return {
        "id": f"valid-{number}",
        "question": prose(generator, 25),
        "choices": None,
        "answer": answer,
        "label": answer,
    }


def _write_tables(run: RunFolder, sets: list[dict[str, Any]], valid: list[dict[str, Any]]) -> None:
    folder = run.working_folder(DATA)
    folder.mkdir(parents=True)
    with (
        ArrowFile(folder / "train.arrow", RATIONALE_SETS) as train,
        ArrowFile(folder / "valid.arrow", HELD_OUT) as held_out,
        ParquetParts(folder / "teacher_samples", TEACHER_SAMPLES) as samples,
    ):
        train.write(pa.Table.from_pylist(sets, schema=RATIONALE_SETS))
        held_out.write(pa.Table.from_pylist(valid, schema=HELD_OUT))
        rows = []
        for row in sets:
            voted = row["answer"] if row["votes_gold"] else str((int(row["answer"]) + 1) % 4)
            other = str((int(voted) + 1) % 4)
            texts = [(text, voted) for text in row["positives"]] + [(text, other) for text in row["negatives"]]
            rows += [
                {"id": row["id"], "sample_index": index, "rationale": text, "answer": answer}
                for index, (text, answer) in enumerate(texts)
            ]
        samples.write(pa.Table.from_pylist(rows, schema=TEACHER_SAMPLES))
    counts = {"teacher": "scripted (simulated)", "simulated": True, "held_out": {"valid": {"used": len(valid)}}}
    (folder / "counts.json").write_text(json.dumps(counts))
    if run.root is None:
        run.put_folder(folder, DATA)


def _write_metrics(run: RunFolder, config: ExperimentConfig, generator: random.Random, steps: int) -> None:
    metrics = Metrics(run)
    metrics.add({"judge_pretrained_steps": 5, "judge_reused": False, "judge_pretrain_loss": 0.2, "seconds": 1.0})
    lines = []
    for step in range(steps):
        noise, gone = generator.gauss(0, 0.1), step / steps
        record: dict[str, Any] = {
            "step": step, "iteration": step // 100, "epoch": 0, "loss": 3 - 2 * gone + noise,
            "loss_label": 2 - gone + noise, "loss_positive": 2.5 - gone + noise, "loss_negative": -1 + gone + noise,
            "active_fraction": generator.random(), "score_positive": 0.9, "score_negative": None if step % 3 else 0.2,
            "tokens": 900, "rows": [1, 2, 3], "negatives": 8, "lag": 5, "wait_seconds": 2.0 if step == 0 else 0.01,
            "publish_seconds": 0.0, "seconds": 0.3, "lr": 5e-5 * (1 - gone), "gradient_norm": 1.0,
        }  # fmt: skip
        if step % 100 == 0:
            record |= {"judge_loss": 0.5 - 0.4 * gone, "judge_positive_score": 0.8, "judge_negative_score": 0.2}
        lines.append(json.dumps(record) + "\n")
    # A line at a time, as a run does it, takes a minute for ten thousand of them.
    run.write("metrics.jsonl", run.read("metrics.jsonl") + "".join(lines).encode() if run.root else "".join(lines))


def _write_evaluations(
    run: RunFolder, config: ExperimentConfig, generator: random.Random, valid: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    entries = []
    for number in range(Schedule.of(config).iterations + 1):
        lines = []
        for row in valid:
            right = generator.random() < 0.1 + 0.8 * number / Schedule.of(config).iterations
            lines.append({"id": row["id"], "prediction": row["label"] if right else "no idea", "correct": right})
        step = min(number * config.train.iteration_steps, config.train.max_steps)
        accuracy = sum(line["correct"] for line in lines) / len(lines)
        entries.append({"step": step, "snapshot": number, "split": "valid", "accuracy": accuracy, "n": len(valid)})
        run.write(f"{EVALUATIONS}/valid-{number:06d}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    run.write(EVALUATIONS_SUMMARY, json.dumps(entries))
    return entries


def _write_negatives(
    run: RunFolder, config: ExperimentConfig, generator: random.Random, ids: list[str], hostile: bool
) -> None:
    schedule = Schedule.of(config)
    batch = config.train.batch_size
    chunks = [chunk for iteration in range(schedule.iterations) for chunk in schedule.chunks(iteration)]
    for chunk in chunks[-250:]:
        rows = [
            {
                "epoch": 0, "step": step, "iteration": chunk.iteration,
                "snapshot": schedule.snapshot_for(chunk.iteration),
                "id": ids[(step * batch + place) % len(ids)], "negative_index": 0,
                "rationale": generator.choice(HOSTILE) if hostile else prose(generator, 40), "token_ids": [1, 2, 3],
                "mean_logprob": -3.0, "finish_reason": "stop", "temperature": 1.5, "top_k": 50, "seed": 1,
            }
            for step in range(chunk.first, chunk.last) for place in range(batch)
        ]  # fmt: skip
        write_negatives(run, chunk, Snapshot(0, "snapshots/000000", "d"), pa.Table.from_pylist(rows, schema=NEGATIVES))


def _write_observations(
    run: RunFolder, config: ExperimentConfig, generator: random.Random, sets: list[dict[str, Any]],
    valid: list[dict[str, Any]], hostile: bool, judge: bool,
) -> None:  # fmt: skip
    def row(
        split: str, of: dict[str, Any], kind: str, temperature: float | None, text: str, mean: float
    ) -> dict[str, Any]:
        score = min(1.0, max(0.0, generator.gauss(mean, 0.1))) if judge else None
        return {"split": split, "id": of["id"], "question": of["question"], "kind": kind, "temperature": temperature,
                "rationale": text, "score": score}  # fmt: skip

    rows = [row("train", of, "positive", None, text, 0.95) for of in sets for text in of["positives"]]
    rows += [row("train", of, "negative", None, text, 0.3) for of in sets for text in of["negatives"]]
    for place, of in enumerate(valid):
        for temperature in config.evaluation.temperatures:
            text = HOSTILE[place % len(HOSTILE)] if hostile else prose(generator, 30)
            rows.append(row("valid", of, "student", temperature, text, 0.8 - 0.3 * temperature))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=OBSERVATIONS), sink)
    run.write(OBSERVATIONS_FILE, sink.getvalue().to_pybytes())

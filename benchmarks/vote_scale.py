"""Votes over a synthetic table of the size of e-SNLI and measures the time and the memory of every process.

    python benchmarks/vote_scale.py                                  # 549,367 questions, 5 samples each, all layouts
    python benchmarks/vote_scale.py --layout flat --questions 100000 --json flat.json
    python benchmarks/vote_scale.py --quick

The table is made in a temporary folder and voted by the job in a process of its own, as a user runs it. Each second the
resident memory (shared pages among it) of each process of the job is read. Some thousand questions of the result are
held against a naive vote.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from figures import figure, write_figures

from qcrd_ray.config import config_from_dict
from qcrd_ray.rationales.schema import STORED_SAMPLES, Question
from qcrd_ray.seeding import stable_hash

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = ("nested", "flat", "stored")
LABELS = ("entailment", "neutral", "contradiction")
CHECKED = 3000
PART_QUESTIONS = 1024

PEOPLE = ("A man in a red jacket", "Two young girls", "An older woman", "A group of workers", "The boy with the hat")
ACTS = (
    "is riding a bicycle",
    "are waiting for a bus",
    "sits on a wooden bench",
    "plays a guitar",
    "is cooking outside",
)
PLACES = ("near the river", "in front of a shop", "at the market", "on a crowded street", "beside an old church")
REASONS = (
    "so the hypothesis restates what the premise already says",
    "but nothing in the premise tells why that would be so",
    "which cannot happen at the same time as what is described",
    "and someone who does this must be outdoors at that moment",
    "although it may be true, it does not have to follow from it",
    "as both sentences talk about one and the same scene",
)


@dataclass(frozen=True)
class Synthetic:
    """Questions and samples, each a function of its number."""

    gold: np.ndarray
    answers: np.ndarray
    words: np.ndarray

    @staticmethod
    def make(questions: int, samples: int) -> Synthetic:
        generator = np.random.default_rng(0)
        gold = generator.integers(0, 3, questions)
        right = generator.random((questions, samples)) < 0.7
        answers = np.where(right, gold[:, None], generator.integers(0, 3, (questions, samples)))
        answers[generator.random((questions, samples)) < 0.03] = -1
        return Synthetic(gold, answers, generator.integers(0, 30, (questions, samples, 3)).astype(np.int8))

    def question(self, i: int) -> dict[str, Any]:
        a, b, c = int(i) % 5, int(i) // 5 % 5, int(i) // 25 % 5
        text = f"premise: {PEOPLE[a]} {ACTS[b]} {PLACES[c]} {i}.\nhypothesis: {PEOPLE[a]} {ACTS[c]}."
        return {"id": f"esnli-train-{i:07d}", "question": text, "answer": LABELS[self.gold[i]]}

    def rationale(self, i: int, j: int) -> str:
        a, b, c = self.words[i, j].tolist()
        return f"{PEOPLE[a % 5]} {ACTS[b % 5]} {PLACES[c % 5]} ({j}), {REASONS[a // 5]}."

    def sample(self, i: int, j: int) -> dict[str, Any]:
        answer = int(self.answers[i, j])
        return {"teacher": "made", "rationale": self.rationale(i, j), "answer": LABELS[answer] if answer >= 0 else None}

    def output(self, i: int, j: int) -> str:
        answer = int(self.answers[i, j])
        return self.rationale(i, j) + (f" The answer is {LABELS[answer]}." if answer >= 0 else "")


@dataclass(frozen=True)
class StoredParts:
    """A live teacher whose samples are all there."""

    parts: tuple[Path, ...]
    name: str = "made"
    simulated: bool = True
    fingerprint: str = "made"
    temperature: float = 0.7

    def key(self, task: Any, question: Question) -> int:
        return stable_hash(question.id, task.teacher_prompt(question.question, question.choices))


def write(data: Synthetic, layout: str, folder: Path) -> int:
    """Write the table in a layout. Returns its bytes."""
    questions, samples = data.answers.shape
    with (folder / "train.jsonl").open("w") as file:
        for i in range(questions):
            row = data.question(i)
            if layout == "nested":
                row["teacher_samples"] = [data.sample(i, j) for j in range(samples)]
            file.write(json.dumps(row) + "\n")
    (folder / "valid.jsonl").write_text(json.dumps({"id": "v", "question": "v", "answer": "neutral"}) + "\n")
    if layout == "flat":
        order = np.random.default_rng(1).permutation(questions * samples)
        with (folder / "train.teacher_samples.jsonl").open("w") as file:
            for place in order.tolist():
                i, j = divmod(place, samples)
                file.write(json.dumps({"id": f"esnli-train-{i:07d}", **data.sample(i, j)}) + "\n")
    if layout == "stored":
        _write_parts(data, folder / "store")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write_parts(data: Synthetic, folder: Path) -> None:
    from qcrd_ray.tasks import get_task

    folder.mkdir()
    task = get_task(config_from_dict({"task": "esnli"}))
    questions, samples = data.answers.shape
    teacher = StoredParts(())
    for begin in range(0, questions, PART_QUESTIONS):
        rows = []
        for i in range(begin, min(begin + PART_QUESTIONS, questions)):
            question = Question(**data.question(i))
            key = teacher.key(task, question)
            for j in range(samples):
                row = {"key": key, "id": question.id, "sample_index": j, "text": data.output(i, j), "seed": i + j}
                rows.append({**row, "finish_reason": "stop", "completion_tokens": 30})
        table = pa.Table.from_pylist(rows, schema=STORED_SAMPLES)
        pq.write_table(table, folder / f"part-{begin:08d}.parquet", compression="zstd")


def keys(folder: Path, output: Path, samples: int, augmentation: str = "none") -> list[str]:
    return [
        "task=esnli",
        "labels=teacher_vote",
        f"data.path={folder}",
        f"output={output}",
        f"teacher.samples={samples}",
        f"judge.augmentation={augmentation}",
    ]


def vote_stored(folder: Path, output: Path, samples: int) -> None:
    """What the job does once a live teacher has answered all."""
    from qcrd_ray.config import load_config
    from qcrd_ray.rationales.tables import prepare_tables

    parts = tuple(sorted((folder / "store").glob("*.parquet")))
    prepare_tables(load_config(None, keys(folder, output, samples)), output, StoredParts(parts))


def run_measured(command: list[str]) -> tuple[float, float, dict[str, float]]:
    """Run a process. Returns its seconds, the CPU seconds of all its processes, and their peak memory.

    Memory is the peak resident memory of one process of each kind, in GiB. Ray's workers run at a low priority: on a
    machine that others use, CPU seconds tell more than seconds.
    """
    start = time.monotonic()
    peaks: dict[str, float] = {}
    cpu: dict[int, float] = {}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            for number, kind, gib, seconds in _processes(root):
                peaks[kind] = max(peaks.get(kind, 0.0), gib)
                cpu[number] = max(cpu.get(number, 0.0), seconds)
            time.sleep(1.0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return time.monotonic() - start, sum(cpu.values()), peaks


def _processes(root: psutil.Process) -> Iterator[tuple[int, str, float, float]]:
    """(id, kind, resident GiB, CPU seconds) of a process and of all below it."""
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            words = " ".join(process.cmdline()[:1]).split("(")[0].split("/")[-1].split(".")[0].split() or [
                process.name()
            ]
            kind = "driver" if process == root else words[0]
            times = process.cpu_times()
            yield process.pid, kind, process.memory_info().rss / 2**30, times.user + times.system
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def check(data: Synthetic, output: Path) -> None:
    """Hold some questions against a vote that could not be simpler. Raises AssertionError."""
    table = pq.read_table(output / "rationale_sets", columns=["id", "positives", "negatives", "agreement", "label"])
    rows = np.random.default_rng(2).choice(table.num_rows, min(CHECKED, table.num_rows), replace=False)
    for row in table.take(pa.array(rows)).to_pylist():
        i = int(row["id"].rsplit("-", 1)[1])
        answers = data.answers[i].tolist()
        votes = Counter(answer for answer in answers if answer >= 0)
        winner = LABELS.index(row["label"])
        assert votes[winner] == max(votes.values()), row
        rationales = [data.rationale(i, j) for j in range(len(answers))]
        assert sorted(row["positives"]) == sorted(r for r, a in zip(rationales, answers, strict=True) if a == winner)
        others = sorted(r for r, a in zip(rationales, answers, strict=True) if a not in (winner, -1))
        assert sorted(row["negatives"]) == others, row
        assert abs(row["agreement"] - votes[winner] / votes.total()) < 1e-6, row
    counts = json.loads((output / "counts.json").read_text())["train"]
    assert counts["samples"] == data.answers.size
    assert counts["parsed"] == int((data.answers >= 0).sum())
    assert counts["used"] == table.num_rows == int((data.answers >= 0).any(axis=1).sum())


def measure(data: Synthetic, layout: str, augmentation: str) -> list[dict[str, Any]]:
    questions, samples = data.answers.shape
    with tempfile.TemporaryDirectory(prefix="vote-scale-") as name:
        folder, output = Path(name) / "in", Path(name) / "out"
        folder.mkdir()
        size = write(data, layout, folder)
        print(f"{layout}: {questions} questions x {samples} samples, {size / 2**20:.0f} MiB", flush=True)
        if layout == "stored":
            command = [__file__, "--vote-stored", str(folder), str(output), "--samples", str(samples)]
        else:
            command = [str(ROOT / "jobs" / "sample_teacher.py"), *keys(folder, output, samples, augmentation)]
        seconds, cpu_seconds, peaks = run_measured([sys.executable, *command])
        check(data, output)
    found = [
        ("seconds", seconds, "s"),
        ("cpu_seconds", cpu_seconds, "s"),
        ("questions_per_second", questions / seconds, "questions/s"),
    ]
    found += [(f"peak_rss/{kind}", gib, "GiB") for kind, gib in sorted(peaks.items(), key=lambda item: -item[1])]
    found.append(("peak_rss/largest", max(peaks.values()), "GiB"))
    for metric, value, unit in found:
        print(f"  {metric:40} {value:10.2f} {unit}", flush=True)
    case = f"{layout}/{questions}x{samples}"
    return [figure(case, metric, [value], unit) for metric, value, unit in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=549_367)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--layout", choices=LAYOUTS, help="default: all of them")
    parser.add_argument("--augmentation", default="none", help="judge.augmentation, where samples are nested or flat")
    parser.add_argument("--quick", action="store_true", help="20,000 questions")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--vote-stored", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.vote_stored:
        vote_stored(*arguments.vote_stored, arguments.samples)
        return
    data = Synthetic.make(20_000 if arguments.quick else arguments.questions, arguments.samples)
    layouts = [arguments.layout] if arguments.layout else LAYOUTS
    rows = [row for layout in layouts for row in measure(data, layout, arguments.augmentation)]
    write_figures(arguments.json, rows, {})


if __name__ == "__main__":
    main()

"""What a training worker waits for Ray Data: from a table of a million questions, at ten times the speed of a step.

    python benchmarks/ingest.py [--questions N] [--step-ms MS] [--seconds S] [--json FILE]
    python benchmarks/ingest.py --quick

The table has the lengths of SVAMP with GPT-3.5 (a question of 45 tokens, five rationales of 100), 8 questions a step,
SmolLM2's tokenizer. The worker is `stream_batches` with a sleep instead of the step: 19 ms by default, a tenth of what
a step of `dss` with T5-base takes on one H100. `wait`: the share of its time, after the first batch, in which it waited
for the next one. `memory`: the peak of each kind of process, what it shares with others divided among them; `mapped`:
of files such as the table's, pages that stay in memory as long as nobody else wants it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
from figures import figure, write_figures

QUESTIONS_A_STEP, RATIONALES = 8, 5
WORDS = ("the", "cat", "has", "two", "red", "apples", "and", "sells", "half", "of", "them", "for", "3", "coins")
ROWS_TOGETHER = 10_000


def write_table(path: Path, questions: int) -> None:
    from qcrd_ray.rationales.schema import RATIONALE_SETS
    from qcrd_ray.rationales.table_files import ArrowFile

    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    pool = [text(max(8, int(rng.lognormvariate(0, 0.45) * 90))) for _ in range(4_096)]
    with ArrowFile(path, RATIONALE_SETS) as file:
        for first in range(0, questions, ROWS_TOGETHER):
            rows = []
            for number in range(first, min(first + ROWS_TOGETHER, questions)):
                positives = [f"{rng.choice(pool)} ({number})" for _ in range(RATIONALES)]
                rows.append(
                    {"id": f"q-{number}", "question": f"{text(40)} ({number})", "choices": None, "answer": "3",
                     "label": "( 1.0 + 2.0 )", "positives": positives, "negatives": [], "agreement": 1.0,
                     "votes_gold": True, "sample0": positives[0], "sample0_label": None}
                )  # fmt: skip
            file.write(pa.Table.from_pylist(rows, schema=RATIONALE_SETS))


class Memory:
    """Watches this process and all below it."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self.mapped: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._ended.wait(1.0):
            for process in [own, *own.children(recursive=True)]:
                try:
                    name = "worker" if process == own else " ".join(process.cmdline()[:1])[:60]
                    own_gib, mapped = memory_of(process.pid)
                except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                    continue
                self.peaks[name] = max(self.peaks.get(name, 0.0), own_gib)
                self.mapped[name] = max(self.mapped.get(name, 0.0), mapped)


def memory_of(pid: int) -> tuple[float, float]:
    """GiB of a process, and of the files that it has mapped, by their proportional set sizes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return (kib["Pss_Anon"] + kib["Pss_Shmem"]) / 2**20, kib["Pss_File"] / 2**20


def measure(questions: int, step_seconds: float, seconds: float) -> dict[str, Any]:
    from qcrd_ray.config import load_config
    from qcrd_ray.rationales.streaming import StreamSpec, stream_batches
    from qcrd_ray.ray_session import ray_session
    from qcrd_ray.run_folder import DATA, RunFolder
    from qcrd_ray.training.initial_models import write_models

    steps = int(seconds / step_seconds)
    with tempfile.TemporaryDirectory(prefix="ingest-") as place:
        config = load_config(
            Path(__file__).resolve().parents[1] / "jobs" / "configs" / "smollm2_135m.yaml",
            ["student.model=embedded:smollm2-135m", "task=svamp", f"data.path={place}", f"run.storage_path={place}",
             "judge.enabled=false", f"train.max_steps={steps}", f"train.batch_size={QUESTIONS_A_STEP}"],
        )  # fmt: skip
        run = RunFolder(place, "ingest")
        run.create()
        table = run.working_folder(DATA)
        table.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        write_table(Path(run.table("train")), questions)
        written = time.perf_counter() - begin
        size = Path(run.table("train")).stat().st_size / 2**30
        write_models(config, run)
        with ray_session(2.0), Memory() as memory:
            waits = []
            batches = stream_batches(StreamSpec(run, config, 0, 1), 0, steps)
            begin = time.perf_counter()
            next(batches)
            first = time.perf_counter() - begin
            begin = time.perf_counter()
            for _ in range(steps - 1):
                time.sleep(step_seconds)
                asked = time.perf_counter()
                next(batches)
                waits.append(time.perf_counter() - asked)
            whole = time.perf_counter() - begin
    return {
        "questions": questions,
        "table_gib": size,
        "table_seconds": written,
        "steps": steps,
        "step_ms": 1000 * step_seconds,
        "first_batch_seconds": first,
        "wait": sum(waits) / whole,
        "longest_wait_ms": 1000 * max(waits),
        "memory_gib": memory.peaks,
        "mapped_gib": memory.mapped,
        "largest_gib": max(memory.peaks.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1_000_000)
    parser.add_argument("--step-ms", type=float, default=19.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--quick", action="store_true", help="20,000 questions, 15 seconds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    questions, seconds = (20_000, 15.0) if arguments.quick else (arguments.questions, arguments.seconds)
    found = measure(questions, arguments.step_ms / 1000, seconds)
    for name, value in found.items():
        print(f"{name:24} {json.dumps(value)}", flush=True)
    units = {
        "table_gib": "GiB",
        "largest_gib": "GiB",
        "table_seconds": "s",
        "first_batch_seconds": "s",
        "longest_wait_ms": "ms",
    }
    rows = [figure(f"{questions} questions", name, [found[name]], unit) for name, unit in units.items()]
    rows += [figure(name, "memory", [gib], "GiB") for name, gib in found["memory_gib"].items()]
    rows += [figure(name, "mapped", [gib], "GiB") for name, gib in found["mapped_gib"].items()]
    write_figures(
        arguments.json, rows, {"wait_fraction": found["wait"]}, steps=found["steps"], step_ms=found["step_ms"]
    )


if __name__ == "__main__":
    main()

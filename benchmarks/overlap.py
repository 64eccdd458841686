"""What it costs to have negatives from the student's own past: sampled ahead, sampled in the loop, recorded.

    python benchmarks/overlap.py [--student smollm2|t5-tiny] [--steps N] [--rounds N] [--json FILE]
    python benchmarks/overlap.py --quick
    python benchmarks/overlap.py --simulate [--figure docs/overlap.svg] [--json FILE]

The same run of `jobs/train.py`, each in a process of its own, in an order that turns with the rounds:

* `ahead`: as `train` does it, the pool samples iterations before they are trained on.
* `in_loop`: `sampler.ahead_iterations=0`: negatives are sampled when a step asks for them, while training waits.
* `recorded`: the negatives of the first `ahead` run are read from its files: the floor.

`seconds` is the time of the training steps, without start, warm-up and the judge's pretraining. `need` is the time that
the samplers were at work over the time of the training steps: below 1 / 1.2 the pool is fast enough by a fifth.

`--simulate` runs the real scheduler, `SamplingService`, with engines and training workers that sleep: 1, 4, 16 and 64
workers, pools of 0.6 to 2 times the throughput that training needs. It also measures what the scheduler itself costs
a request, with engines that answer at once, inside one process and through Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import figure, write_figures

ROOT = Path(__file__).resolve().parents[1]
CASES = ("ahead", "in_loop", "recorded")
STUDENTS = {
    "smollm2": ["--config", str(ROOT / "jobs/configs/quickstart.yaml"), "data.generated.valid=8",
                "data.generated.test=8", "judge.pretrain_steps=5", "evaluation.examples=0"],
    "t5-tiny": ["--config", str(ROOT / "jobs/configs/tiny.yaml"), "train.iteration_steps=10", "train.batch_size=8",
                "evaluation.examples=0", "judge.pretrain_steps=5"],
}  # fmt: skip
WORKERS = (1, 4, 16, 64)
THROUGHPUTS = (0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0)
STEP_SECONDS, ITERATION_STEPS, ITERATIONS, LAG, JITTER = 0.05, 8, 24, 2, 0.3
REQUESTS_WORKERS, REQUESTS_EACH = 64, 64


# Real runs, each in a process of its own


def run_case(case: str, folder: Path, name: str, arguments: Sequence[str], recorded: Path | None) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", case, "--recorded", str(recorded or ""), *arguments]
    command += [f"run.storage_path={folder}", f"run.name={name}"]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-3000:]}")
    whole = time.perf_counter() - begin
    result = json.loads(done.stdout.strip().splitlines()[-1])
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "step" in record]
    warmup = result["negatives"]["warmup_seconds"]
    seconds = sum(record["seconds"] for record in steps) - warmup
    waits = sum(record["wait_seconds"] for record in steps) - warmup
    iterations = max(record["iteration"] for record in steps) + 1
    sampler = result["negatives"]["sampler"]
    return {
        "seconds": seconds,
        "stall_fraction": max(waits, 0.0) / seconds,
        "publish_fraction": result["snapshots"]["publish_seconds"] / seconds,
        "publish_ms": 1000 * result["snapshots"]["publish_seconds"] / max(1, result["snapshots"]["published"]),
        "iteration_seconds": seconds / iterations,
        "need": sampler["busy_seconds"] / seconds,
        "warmup_seconds": warmup,
        "tokens_per_second": result["train_tokens_per_second"],
        "whole_seconds": whole,
    }


def train_case(case: str, recorded: str, arguments: list[str]) -> None:
    """What `jobs/train.py` does; `recorded` takes samplers that read instead of sampling."""
    import qcrd_ray.training.trainer as trainer
    from qcrd_ray.cli import job_main
    from qcrd_ray.sampling.pool import Sampler

    class RecordedSampler(Sampler):
        """Gives the negatives that another run has written."""

        def sample(self, chunk: Any, snapshot: Any) -> tuple[dict[str, Any], Any]:
            import pyarrow.parquet as pq

            from qcrd_ray.rationales.schema import NEGATIVES

            table = pq.read_table(Path(recorded) / chunk.file_name).select(NEGATIVES.names).cast(NEGATIVES)
            return {"tokens": 0, "load_seconds": 0.0, "seconds": 0.0}, table

    if case == "recorded":
        trainer.Sampler = RecordedSampler  # type: ignore[misc]
    if case == "in_loop":
        arguments = [*arguments, "sampler.ahead_iterations=0", "sampler.chunk_questions=1"]
    raise SystemExit(job_main("train", "", trainer.train, arguments))


def real_runs(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    settings = [*STUDENTS[arguments.student], f"train.max_steps={arguments.steps}", *arguments.overrides]
    found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory(prefix="overlap-") as place:
        folder = Path(place)
        recorded = folder / "ahead-0" / "negatives"
        for number in range(arguments.rounds):
            turn = number % len(CASES)
            for case in CASES if number == 0 else CASES[turn:] + CASES[:turn]:
                found[case].append(run_case(case, folder, f"{case}-{number}", settings, recorded))
                print(f"{case}: {found[case][-1]['seconds']:.1f} s", file=sys.stderr)
    rows = []
    for case, runs in found.items():
        for metric in runs[0]:
            values = [one[metric] for one in runs]
            unit = "s" if "seconds" in metric else "ms" if metric.endswith("_ms") else "1/s" if "per" in metric else "1"
            rows.append(figure(case, metric, values, unit))
    median = {case: statistics.median(one["seconds"] for one in runs) for case, runs in found.items()}
    ratios = {
        "stall_fraction": statistics.median(one["stall_fraction"] for one in found["ahead"]),
        "ahead_over_in_loop": median["ahead"] / median["in_loop"],
        "ahead_over_recorded": median["ahead"] / median["recorded"],
        "in_loop_over_recorded": median["in_loop"] / median["recorded"],
        "publish_fraction": statistics.median(one["publish_fraction"] for one in found["ahead"]),
        "throughput_over_need": 1 / max(1e-9, statistics.median(one["need"] for one in found["ahead"])),
    }
    return rows, ratios


# The simulation


class _Method:
    """`actor.method.remote(…)` and `.options(…).remote(…)` of something that is no actor."""

    def __init__(self, call: Any) -> None:
        self.remote = call

    def options(self, **_: Any) -> _Method:
        return self


class SleepingSampler:
    """Takes as long for a chunk as it is told, give or take the jitter."""

    def __init__(self, seconds: float, seed: int) -> None:
        self.seconds = seconds
        self.random = random.Random(seed)
        self.ready = _Method(self._ready)
        self.sample = _Method(self._sample)

    async def _ready(self) -> str:
        return "sleeping"

    def _sample(self, chunk: Any, snapshot: Any) -> tuple[Any, Any]:
        return self._stats(), (chunk, snapshot)

    async def _stats(self) -> dict[str, float]:
        seconds = self.seconds * self.random.uniform(1 - JITTER, 1 + JITTER)
        if seconds:
            await asyncio.sleep(seconds)
        return {"tokens": 0, "seconds": seconds, "load_seconds": 0.0}


def simulated_config(workers: int, folder: str, steps: int, iteration_steps: int) -> Any:
    from qcrd_ray.config import load_config

    return load_config(
        ROOT / "jobs/configs/tiny.yaml",
        [f"train.workers={workers}", f"train.batch_size={workers}", f"train.max_steps={steps}",
         f"train.iteration_steps={iteration_steps}", f"negatives.lag={LAG}", f"sampler.chunk_questions={workers}",
         "train.keep_snapshots=true", f"run.storage_path={folder}", "run.name=simulated"],
    )  # fmt: skip


async def simulate(workers: int, throughput: float) -> float:
    """The share of its time that a training worker waited, warm-up excluded."""
    from qcrd_ray.run_folder import RunFolder
    from qcrd_ray.sampling.lagged_student import SamplingService

    with tempfile.TemporaryDirectory() as folder:
        config = simulated_config(workers, folder, ITERATION_STEPS * ITERATIONS, ITERATION_STEPS)
        run = RunFolder(folder, "simulated")
        run.create()
        engines = max(1, workers // 4)
        samplers = [SleepingSampler(STEP_SECONDS * engines / throughput, seed) for seed in range(engines)]
        service = SamplingService(config, run, samplers)
        await service.start()
        await service.publish(0, "snapshots/000000", "0")
        waited = [0.0] * workers
        warm = [0.0] * workers
        barrier = asyncio.Barrier(workers)
        await asyncio.gather(*(_train(service, config, rank, barrier, waited, warm) for rank in range(workers)))
        for task in service.tasks:
            task.cancel()
    training = STEP_SECONDS * ITERATION_STEPS * ITERATIONS
    return max(w / (training + w) for w in waited)


async def _train(
    service: Any, config: Any, rank: int, barrier: asyncio.Barrier, waited: list[float], warm: list[float]
) -> None:
    from qcrd_ray.sampling.schedule import Schedule

    schedule = Schedule.of(config)
    asked: Any = None
    for step in range(config.train.max_steps):
        if schedule.starts_iteration(step) and rank == 0:
            number = schedule.iteration_of(step)
            if number:
                await service.publish(number, f"snapshots/{number:06d}", str(number))
            await service.progress(step, [])
        chunk = schedule.chunk_of(step)
        if chunk.first == step:
            begin = time.perf_counter()
            [(got, snapshot)] = await (asked or service.chunk(chunk))
            (warm if step == 0 else waited)[rank] += time.perf_counter() - begin
            assert got == chunk and snapshot.number == schedule.snapshot_for(chunk.iteration)
            if chunk.last < schedule.max_steps:
                asked = asyncio.create_task(service.chunk(schedule.chunk_of(chunk.last)))
        await asyncio.sleep(STEP_SECONDS)
        await barrier.wait()


async def scheduler_cost() -> float:
    """Milliseconds of processor time a request, with engines that answer at once: everything that the service does."""
    from qcrd_ray.run_folder import RunFolder
    from qcrd_ray.sampling.lagged_student import SamplingService
    from qcrd_ray.sampling.schedule import Schedule

    with tempfile.TemporaryDirectory() as folder:
        config = simulated_config(REQUESTS_WORKERS, folder, REQUESTS_EACH, REQUESTS_EACH)
        run = RunFolder(folder, "simulated")
        run.create()
        service = SamplingService(config, run, [SleepingSampler(0.0, seed) for seed in range(16)])
        schedule = Schedule.of(config)
        begin = time.process_time()
        await service.start()
        await service.publish(0, "snapshots/000000", "0")

        async def worker() -> None:
            for step in range(REQUESTS_EACH):
                await service.chunk(schedule.chunk_of(step))

        await asyncio.gather(*(worker() for _ in range(REQUESTS_WORKERS)))
        seconds = time.process_time() - begin
        for task in service.tasks:
            task.cancel()
    return 1000 * seconds / (REQUESTS_WORKERS * REQUESTS_EACH)


def scheduler_through_ray() -> float:
    """Milliseconds a request of wall time, asked by 64 coroutines in four actors of the service as a Ray actor."""
    import ray

    from qcrd_ray.ray_session import ray_session
    from qcrd_ray.run_folder import RunFolder
    from qcrd_ray.sampling.lagged_student import SamplingService
    from qcrd_ray.sampling.schedule import Schedule

    class AtOnce:
        def ready(self) -> str:
            return "at once"

        def sample(self, chunk: Any, snapshot: Any) -> tuple[dict[str, float], str]:
            return {"tokens": 0, "seconds": 0.0, "load_seconds": 0.0}, "table"

    class Client:
        async def ask(self, service: Any, chunks: list[Any], workers: int) -> None:
            async def worker() -> None:
                for chunk in chunks:
                    await service.chunk.remote(chunk)

            await asyncio.gather(*(worker() for _ in range(workers)))

    with tempfile.TemporaryDirectory() as folder, ray_session(8):
        config = simulated_config(REQUESTS_WORKERS, folder, REQUESTS_EACH, REQUESTS_EACH)
        run = RunFolder(folder, "simulated")
        run.create()
        schedule = Schedule.of(config)
        samplers = [ray.remote(AtOnce).options(num_cpus=0.1).remote() for _ in range(2)]
        service = ray.remote(SamplingService).options(num_cpus=0, max_concurrency=1000).remote(config, run, samplers)
        clients = [ray.remote(Client).options(num_cpus=0.1).remote() for _ in range(4)]
        chunks = [schedule.chunk_of(step) for step in range(REQUESTS_EACH)]
        ray.get([service.start.remote(), service.publish.remote(0, "snapshots/000000", "0")])
        ray.get([client.ask.remote(service, chunks[:2], 1) for client in clients])
        begin = time.perf_counter()
        ray.get([client.ask.remote(service, chunks, REQUESTS_WORKERS // len(clients)) for client in clients])
        return 1000 * (time.perf_counter() - begin) / (REQUESTS_WORKERS * REQUESTS_EACH)


def simulation(figure: str | None, quick: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
    workers = WORKERS[:2] if quick else WORKERS
    throughputs = (0.8, 1.2) if quick else THROUGHPUTS
    shares: dict[int, list[float]] = {count: [] for count in workers}
    rows = []
    for count in workers:
        for throughput in throughputs:
            share = asyncio.run(simulate(count, throughput))
            shares[count].append(share)
            rows.append(figure(f"{count} workers, throughput {throughput:g} of need", "stall_fraction", [share], "1"))
            print(f"{count} workers, {throughput:g}: {share:.4f}", file=sys.stderr)
    inside = [asyncio.run(scheduler_cost()) for _ in range(3)]
    rows.append(figure("64 workers x 64 requests", "scheduler_cpu_per_request", inside, "ms"))
    through = [scheduler_through_ray()]
    rows.append(figure("64 workers x 64 requests", "request_through_ray", through, "ms"))
    ratios = {
        f"stall_fraction/simulated_{count}_workers_at_{throughput:g}": share
        for count in workers
        for throughput, share in zip(throughputs, shares[count], strict=True)
        if throughput in (0.8, 1.2)
    }
    if figure:
        draw(figure, throughputs, shares)
    return rows, ratios


def draw(file: str, throughputs: Sequence[float], shares: dict[int, list[float]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "overlap", "font.size": 10})
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(figsize=(7, 4))
    for (count, values), marker in zip(shares.items(), "osD^", strict=False):
        axes.plot(
            throughputs, [100 * value for value in values], marker=marker, label=f"{count} worker" + "s" * (count > 1)
        )
    axes.plot(throughputs, [100 * max(0.0, 1 - t) for t in throughputs], "k--", lw=1, label="1 - throughput / need")
    axes.axvline(1.2, color="grey", lw=0.8, ls=":")
    axes.set_xlabel("throughput of the pool / need of training")
    axes.set_ylabel("time that a worker waited, %")
    axes.set_title("Sleeping engines and trainers under the real scheduler")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(file, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=STUDENTS, default="smollm2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a scratch student, and the simulation of 1 and 4 workers")
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--figure", metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--recorded", help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    arguments.overrides = overrides
    if arguments.case:
        train_case(arguments.case, arguments.recorded, overrides)
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    if arguments.quick:
        arguments.student, arguments.steps = "t5-tiny", 60
    if arguments.quick or not arguments.simulate:
        rows, ratios = real_runs(arguments)
    if arguments.quick or arguments.simulate:
        more, shares = simulation(arguments.figure, arguments.quick)
        rows, ratios = rows + more, ratios | shares
    for one in rows:
        print(f"{one['case']:<40} {one['metric']:<26} {one['median']:>10.4f} ({one['min']:.4f} to {one['max']:.4f}) "
              f"{one['unit']}")  # fmt: skip
    for name, value in ratios.items():
        print(f"{name}: {value:.4f}")
    write_figures(arguments.json, rows, ratios)


if __name__ == "__main__":
    main()

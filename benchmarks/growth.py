"""How the time and memory of a step grow with m, k, the length of rationales, the student and the number of workers.

    python benchmarks/growth.py [--student t5_small ...] [--rounds N] [--json FILE]
    python benchmarks/growth.py --quick

From one setting, `qcrd` without a judge on 8 questions of 45 tokens, m = 5 rationales of 104 tokens each and k = 1
negative of as many, one thing at a time is varied: m from 1 to 20, k from 0 to 3, the length from 32 to 512, and the
number of workers, 1 and 2, each with one thread on a core of its own and half of the batch. Token ids are random, and
every negative lies within the margin, so that the loss is at its dearest. Students are those of step_data.py.

Each point is a process of its own: the median of its steps after one to warm up, and the peak of its resident set above
that of the imported libraries (of rank 0 where there are two). `slope`: seconds and MiB a unit, by least squares.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from figures import figure, write_figures
from step_data import QUESTIONS, STUDENTS, Setting

BASE = {"m": 5, "k": 1, "length": 104, "workers": 1}
AXES: dict[str, Sequence[int]] = {
    "m": (1, 2, 5, 10, 20),
    "k": (0, 1, 2, 3),
    "length": (32, 64, 128, 256, 512),
    "workers": (1, 2),
}
PROMPT, LABEL = 45, 8


def batch_of(student: Any, point: dict[str, int], rank: int, seed: int) -> tuple[Any, list[list[Any]]]:
    """This rank's share of a batch, and its negatives."""
    from qcrd_ray.rationales.streaming import StepBatch, TrainingRow
    from qcrd_ray.sampling.negatives import Negative

    rng = random.Random(seed)
    vocabulary = student.model.config.vocab_size

    def ids(length: int) -> list[int]:
        return [rng.randrange(100, vocabulary) for _ in range(length)]

    rows, negatives = [], []
    for number in range(QUESTIONS):
        positives = [ids(point["length"]) for _ in range(point["m"])]
        rows.append(
            TrainingRow(
                row=number, id=str(number), question="", predict=ids(PROMPT), explain=ids(PROMPT), label=ids(LABEL),
                positives=positives, positive_texts=[""] * len(positives), minority=[], minority_texts=[],
                first=positives[0], first_text="", cut_prompts=0, cut_targets=0,
            )
        )  # fmt: skip
        negatives.append([Negative(ids(point["length"]), "", 1) for _ in range(point["k"])])
    world = point["workers"]
    return StepBatch(seed, 0, QUESTIONS, rows[rank::world]), negatives[rank::world]


def worker(rank: int, name: str, point: dict[str, int], rounds: int, place: str) -> None:
    import torch
    import torch.distributed as dist
    from memory import import_everything, status

    from qcrd_ray.training.engine import TrainEngine
    from qcrd_ray.training.step import candidates, train_on_batch

    world = point["workers"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1 if "threads" in point else (os.cpu_count() or 1))
    import_everything()
    idle = status("VmRSS")
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=world)
    setting = Setting.of(name)
    config = setting.config
    loss = config.loss.model_copy(update={"margin": 1e6})
    judge = config.judge.model_copy(update={"enabled": False})
    config = config.model_copy(update={"method": "qcrd", "loss": loss, "judge": judge})
    settings: dict[str, Any] = {"zero_stage": config.train.zero_stage, "precision": config.train.precision}
    engine = TrainEngine(setting.student, lr=0.0, weight_decay=0.0, clip=1.0, **settings)
    seconds = []
    for step in range(rounds + 1):
        batch, negatives = batch_of(setting.student, point, rank, step)
        begin = time.perf_counter()
        train_on_batch(engine, config, batch, candidates(config, batch.rows, negatives), None)
        engine.step(0.0)
        seconds.append(time.perf_counter() - begin)
    if rank == 0:
        found = {"seconds": statistics.median(seconds[1:]), "memory": (status("VmHWM") - idle) / 2**20}
        Path(place, "found.json").write_text(json.dumps(found))


def one(name: str, point: dict[str, int], rounds: int) -> dict[str, float]:
    """A point, in processes of its own."""
    with tempfile.TemporaryDirectory(prefix="growth-") as place:
        command = [sys.executable, __file__, "--one", name, json.dumps(point), str(rounds), place]
        ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.DEVNULL) for rank in range(point["workers"])]
        if any(process.wait() for process in ranks):
            raise SystemExit(f"error: {name} {point} failed")
        found: dict[str, float] = json.loads(Path(place, "found.json").read_text())
        return found


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    x, y = statistics.mean(xs), statistics.mean(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def points(axis: str, values: Sequence[int]) -> Iterator[tuple[int, dict[str, int]]]:
    for value in values:
        yield value, {**BASE, axis: value, **({"threads": 1} if axis == "workers" else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", nargs="+", choices=STUDENTS, default=["t5_small"])
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the ends of each axis, one round")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, point, rounds, place, rank = arguments.one
        worker(int(rank), name, json.loads(point), int(rounds), place)
        return
    rounds = 1 if arguments.quick else arguments.rounds
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for name in arguments.student:
        for axis in arguments.axis:
            values = AXES[axis][:: len(AXES[axis]) - 1] if arguments.quick else AXES[axis]
            found = {value: one(name, point, rounds) for value, point in points(axis, values)}
            print(f"\n| {name}, {axis} | {' | '.join(map(str, found))} | slope |")
            print("|---|" + "---:|" * (len(found) + 1))
            for quantity, form, unit in (("seconds", ".2f", "s"), ("memory", ".0f", "MiB")):
                ys = [point[quantity] for point in found.values()]
                cells = [format(y, form) for y in ys]
                gain = slope(list(found), ys)
                print(f"| {quantity} | {' | '.join(cells)} | {gain:.3g} |", flush=True)
                rows += [figure(f"{name}/{axis}={x}", quantity, [y], unit) for x, y in zip(found, ys, strict=True)]
                rows.append(figure(f"{name}/{axis}", f"{quantity}_slope", [gain], f"{unit} a unit"))
            if axis == "m":
                ratios[f"memory_m20_over_m1/{name}"] = found[20]["memory"] / found[1]["memory"]
                print(f"memory_m20_over_m1/{name}: {ratios[f'memory_m20_over_m1/{name}']:.2f}", flush=True)
    write_figures(arguments.json, rows, ratios, base=BASE)


if __name__ == "__main__":
    main()

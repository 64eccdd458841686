"""Whether all that makes a step cheap leaves its losses as they are: the same batches, step by step, for many updates.

    python benchmarks/equality.py [--student t5_small ...] [--data cqa] [--steps N] [--questions N] [--json FILE]

Students with the same weights get the same batches, in fp32, without dropout, judged by the same judge, and are updated
by AdamW:

* `ours`, by the framework's step: packed sequences and shared prompts, the choice without gradients and without logits
  in memory, equal rationales once, no backward for a negative at rest;
* `naive`, by naive_step.py, which has none of that;
* `naive again`, the same with its questions one by one: what the order of sums alone does.

`same weights`: the naive loss with the weights that `ours` has at that step. `own updates`: the loss of the student
that was updated by naive steps since the beginning; `again` of the one that takes them one by one, against `naive`.
AdamW divides a gradient by its size, so that an element whose gradient is no more than rounding is moved by its sign,
and what is trained apart drifts apart at a pace that `again` shows. The margin δ is set once, so that a quarter of the
first batches' negatives lie within it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from naive_step import NaiveStep
from step_data import ACTIVE, DATA, STUDENTS, Setting, batches_of, examples, margin_of


def compare(name: str, data: str, steps: int, questions: int, lr: float) -> dict[str, Any]:
    from qcrd_ray.models.discriminator import build_discriminator
    from qcrd_ray.training.engine import TrainEngine
    from qcrd_ray.training.judge import OnlineJudge
    from qcrd_ray.training.step import candidates, train_on_batch

    setting = Setting.of(name, "fp32")
    config, student = setting.config, setting.student
    judge = OnlineJudge(build_discriminator(config.judge), config)
    settings: dict[str, Any] = {"lr": lr, "weight_decay": 0.0, "clip": 1.0, "zero_stage": 0, "precision": "fp32"}
    naive = {"naive": NaiveStep(copy.deepcopy(student)), "again": NaiveStep(copy.deepcopy(student), together=1)}
    engines = {way: TrainEngine(step.student, **settings) for way, step in naive.items()}
    engine, same = TrainEngine(student, **settings), NaiveStep(student)
    batches = batches_of(student, config, examples(data, questions * steps), questions)
    margin = margin_of(engine, batches[: -(-16 // questions)], ACTIVE)
    loss = config.loss.model_copy(update={"margin": margin})
    config = config.model_copy(update={"method": "qcrd", "loss": loss})

    losses: dict[str, list[float]] = {"ours": [], "same weights": [], "naive": [], "again": []}
    active = 0
    for batch, negatives in batches:
        scores = same.scores(judge, batch, negatives)
        losses["same weights"].append(same.loss(config, batch, negatives, scores))
        found = train_on_batch(engine, config, batch, candidates(config, batch.rows, negatives), judge)
        engine.step(lr)
        losses["ours"].append(found.total / questions)
        active += found.active
        for way, step in naive.items():
            losses[way].append(step.add_gradients(engines[way], config, batch, negatives, scores))
            engines[way].step(lr)
        print(f"{name} {data} step {batch.step}: {' '.join(f'{v[-1]:.6f}' for v in losses.values())}", flush=True)
    return {
        "losses": losses,
        "same_weights": _greatest(losses["ours"], losses["same weights"]),
        "own_updates": _greatest(losses["ours"], losses["naive"]),
        "again": _greatest(losses["again"], losses["naive"]),
        "active": active / (questions * steps),
        "lr": lr,
    }


def _greatest(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def main() -> None:
    import torch.distributed as dist

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", nargs="+", choices=STUDENTS, default=["t5_small", "smollm2"])
    parser.add_argument("--data", choices=DATA, default="cqa")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--questions", type=int, default=2, help="a step")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    results = {}
    with tempfile.TemporaryDirectory(prefix="equality-") as place:
        dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=0, world_size=1)
        for name in arguments.student:
            found = compare(name, arguments.data, arguments.steps, arguments.questions, arguments.lr)
            results[f"{name}/{arguments.data}"] = found
            first, last = (found["losses"]["ours"][place] for place in (0, -1))
            print(
                f"{name}, {arguments.data}: {arguments.steps} steps at {arguments.lr:g}, losses {first:.3f} to "
                f"{last:.3f}, {found['active']:.2f} of the negatives active; greatest differences: same weights "
                f"{found['same_weights']:.1e}, own updates {found['own_updates']:.1e}, again {found['again']:.1e}",
                flush=True,
            )
        dist.destroy_process_group()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

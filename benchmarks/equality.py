"""Whether all that makes a step cheap leaves its losses as they are: two students side by side, updated for many steps.

    python benchmarks/equality.py [--student t5_small ...] [--data svamp] [--steps N] [--questions N] [--json FILE]

Both begin with the same weights and get the same batches, in fp32, without dropout. One is trained by the framework's
step: packed sequences and shared prompts, the choice without gradients and without logits in memory, equal rationales
once, no backward for a negative at rest. The other by naive_step.py, which has none of that. The margin δ is
set once, so that a quarter of the first batches' negatives lie within it. Adam updates both at the same rate.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from naive_step import NaiveStep
from step_data import DATA, STUDENTS, Setting, batches_of, examples

ACTIVE = 0.25


def compare(name: str, data: str, steps: int, questions: int, lr: float) -> dict[str, Any]:
    import torch

    from qcrd_ray.models.discriminator import build_discriminator
    from qcrd_ray.training.engine import TrainEngine
    from qcrd_ray.training.judge import OnlineJudge
    from qcrd_ray.training.step import candidates, train_on_batch

    setting = Setting.of(name, "fp32")
    config = setting.config
    judge = OnlineJudge(build_discriminator(config.judge), config)
    other = copy.deepcopy(setting.student)
    settings: dict[str, Any] = {"weight_decay": 0.0, "clip": 1.0, "zero_stage": 0, "precision": "fp32"}
    engine, plain = (TrainEngine(student, lr=lr, **settings) for student in (setting.student, other))
    batches = batches_of(setting.student, config, examples(data, questions * steps), questions)

    engine.train(False)
    with torch.no_grad():
        first = [
            setting.student.rationale_ce([row.explain for row in batch.rows], [[n.ids for n in row] for row in found])
            for batch, found in batches[: max(1, 16 // questions)]
        ]
    engine.train(True)
    margin = float(torch.quantile(torch.cat(first).flatten(), ACTIVE))
    loss = config.loss.model_copy(update={"margin": margin})
    config = config.model_copy(update={"method": "qcrd", "loss": loss})

    ours, naive, active = [], [], 0
    for batch, negatives in batches:
        found = train_on_batch(engine, config, batch, candidates(config, batch.rows, negatives), judge)
        engine.step(lr)
        ours.append(found.total / questions)
        active += found.active
        step = NaiveStep(other)
        naive.append(sum(step.add_gradients(plain, config, batch, negatives, step.scores(judge, batch, negatives))))
        naive[-1] /= questions
        plain.step(lr)
        print(f"{name} {data} step {batch.step}: {ours[-1]:.6f} {naive[-1]:.6f}", flush=True)
    return {
        "losses": ours,
        "naive": naive,
        "greatest_difference": max(abs(a - b) for a, b in zip(ours, naive, strict=True)),
        "active": active / (questions * steps),
        "lr": lr,
    }


def main() -> None:
    import torch.distributed as dist

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", nargs="+", choices=STUDENTS, default=["t5_small", "smollm2"])
    parser.add_argument("--data", choices=DATA, default="svamp")
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
            print(
                f"{name}, {arguments.data}: {arguments.steps} steps, losses {found['losses'][0]:.3f} to "
                f"{found['losses'][-1]:.3f}, {found['active']:.2f} of the negatives active, greatest difference "
                f"{found['greatest_difference']:.2e}",
                flush=True,
            )
        dist.destroy_process_group()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Whether all that makes a step cheap leaves its losses as they are: the same batches, step by step, for many updates.

    python benchmarks/equality.py [--student t5_small ...] [--data cqa] [--steps N] [--json FILE]
    python benchmarks/equality.py --quick

Students with the same weights get the same batches, no dropout and the same judge, and are updated by AdamW:

* `ours`, by the framework's step: packed sequences and shared prompts, the choice without gradients and without logits
  in memory, equal rationales once, no backward for a negative at rest;
* `naive`, by naive_step.py, which has none of that;
* `naive again`, the same with its questions one by one: what the order of sums alone does.

`same_weights`: the greatest difference between the losses of `ours` and the naive losses with the weights that `ours`
has at that step. `own_updates`: between the losses of `ours` and of `naive`, each with the weights of its own updates
since the beginning; `again`: between the two naive ones. AdamW divides a gradient by its size, so that an element whose
gradient is no more than rounding is moved by its sign, and what is trained apart in fp32 drifts apart at a pace that
`again` shows. In fp64 (`--precision`; layer norms too, which transformers has in fp32) there is no such rounding.

The margin δ is set once, so that a quarter of the first batches' negatives lie within it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import figure, write_figures
from naive_step import NaiveStep
from step_data import ACTIVE, DATA, STUDENTS, Setting, batches_of, examples, margin_of


class DoubleEngine:
    """What TrainEngine does, in float64, which DeepSpeed has not."""

    def __init__(self, module: Any, lr: float, clip: float) -> None:
        import torch

        self.module, self.clip = module.double(), clip
        for norm in module.modules():
            if hasattr(norm, "variance_epsilon"):  # T5's, Llama's and Qwen's
                norm.forward = functools.partial(double_norm, norm)
        self.module.train()
        self.adam = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.module(*arguments, **options)

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def backward(self, loss: Any, *, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> None:
        import torch

        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.adam.step()
        self.adam.zero_grad()


def double_norm(norm: Any, states: Any) -> Any:
    """A root mean square norm without float32 in between."""
    return norm.weight * states * (states.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def engine_of(student: Any, precision: str, lr: float) -> Any:
    from qcrd_ray.training.engine import TrainEngine

    if precision == "fp64":
        return DoubleEngine(student, lr, clip=1.0)
    return TrainEngine(student, lr=lr, weight_decay=0.0, clip=1.0, zero_stage=0, precision=precision)


def compare(name: str, data: str, precision: str, steps: int, questions: int, lr: float) -> dict[str, Any]:
    from qcrd_ray.models.discriminator import build_discriminator
    from qcrd_ray.training.judge import OnlineJudge
    from qcrd_ray.training.step import candidates, train_on_batch

    setting = Setting.of(name, "fp32")
    config, student = setting.config, setting.student
    judge = OnlineJudge(build_discriminator(config.judge), config)
    naive = {"naive": NaiveStep(copy.deepcopy(student)), "again": NaiveStep(copy.deepcopy(student), together=1)}
    engines = {way: engine_of(step.student, precision, lr) for way, step in naive.items()}
    engine, same = engine_of(student, precision, lr), NaiveStep(student)
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
        print(
            f"{name} {data} {precision} step {batch.step}: {' '.join(f'{v[-1]:.6f}' for v in losses.values())}",
            flush=True,
        )
    return {
        "losses": losses,
        "same_weights": _greatest(losses["ours"], losses["same weights"]),
        "own_updates": _greatest(losses["ours"], losses["naive"]),
        "again": _greatest(losses["again"], losses["naive"]),
        "active": active / (questions * steps),
    }


def _greatest(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def main() -> None:
    import torch.distributed as dist

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", nargs="+", choices=STUDENTS, default=["t5_small", "smollm2_135m"])
    parser.add_argument("--data", choices=DATA, default="cqa")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "fp64"), default=["fp32", "fp64"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--questions", type=int, default=2, help="a step")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--quick", action="store_true", help="T5-small, 8 steps")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    steps, students, lr = arguments.steps, arguments.student, arguments.lr
    if arguments.quick:
        steps, students = 8, ["t5_small"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="equality-") as place:
        dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=0, world_size=1)
        for name in students:
            for precision in arguments.precision:
                found = compare(name, arguments.data, precision, steps, arguments.questions, lr)
                case = f"{name}/{arguments.data}/{precision}"
                rows += [figure(f"{case}/{way}", "loss", values, "nats") for way, values in found["losses"].items()]
                for metric in ("same_weights", "own_updates", "again"):
                    rows.append(figure(case, metric, [found[metric]], "nats"))
                first, last = (found["losses"]["ours"][place] for place in (0, -1))
                print(
                    f"{case}: {steps} steps at {lr:g}, losses {first:.3f} to {last:.3f}, {found['active']:.2f} of the "
                    f"negatives active; greatest differences: same weights {found['same_weights']:.1e}, own updates "
                    f"{found['own_updates']:.1e}, again {found['again']:.1e}",
                    flush=True,
                )
        dist.destroy_process_group()
    write_figures(arguments.json, rows, {}, steps=steps, lr=lr)


if __name__ == "__main__":
    main()

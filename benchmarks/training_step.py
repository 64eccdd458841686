"""What a training step costs by each method: seconds, their parts, counted operations, peak memory.

    python benchmarks/training_step.py [--student t5_base ...] [--data svamp ...] [--rounds N] [--json FILE]
    python benchmarks/training_step.py --quick

Students: `t5_small` and `t5_base` (random weights of these shapes), `smollm2_135m` (embedded). Data:
`svamp` and `cqa`, see step_data.py; the first line says whether the texts are real. 8 questions a step, five positives
and one negative each, all cores, one process, no pool beside it. `--precision auto` is what the framework takes on this
machine.

A round takes a batch of its own through every case, in an order that turns with the rounds; medians over rounds. The
learning rate is 0, so that the weights, and with them what is chosen, stay the same. The margin δ of a batch is set
so that a quarter of its negatives are active, without which most of them would need no gradient.

Cases: `finetune`, `dss`, `qcrd` (the judge a MiniLM of 6 layers), `qcrd_no_judge`; `qcrd_kept`, a step between those in
which `train.choice_interval` has positives chosen anew; `qcrd_all_active`, every negative within the margin;
`qcrd_t5_judge`, an encoder of T5-base's shape as the judge; `naive`, QCRD as one would write it first, see
naive_step.py, which generates negatives as long as those that the other cases are given.

Parts: `prompt`, the encoder forward, in the choice and in the gradient passes; `choice`, the pass without gradients;
`gradient`, forward and backward; `judge`, scores, and a share of its update, which falls due once an iteration of
`train.iteration_steps` steps; `optimizer`; `sampling`, of `naive` alone. Tokenization is done ahead by Ray Data and is
in no sum. A decoder-only student reads its prompts in the passes themselves. Beside each part's seconds stand its
operations in units of 10^12, two a multiply-add, counted in products of matrices and in attention on that timed batch
whose number of tokens is the median.

`memory`: the peak of a process of its own that does nothing but this case, above the same process with the libraries
imported (`--memory`, for all cases). For `qcrd` it is measured with one and with twenty positives a question.

Ratios: `qcrd_over_dss/STUDENT` and `memory_m20_over_m1/STUDENT`, the greatest over the data, `naive_over_qcrd/STUDENT`,
the least; `.../STUDENT/DATA` for each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from figures import figure, median_ratio, write_figures
from naive_step import NaiveStep
from step_data import (
    ACTIVE,
    DATA,
    POSITIVES,
    PRECISIONS,
    QUESTIONS,
    STUDENTS,
    T5_SHAPES,
    T5_VOCABULARY,
    Setting,
    batches_of,
    examples,
    margin_of,
)

CASES = ("finetune", "dss", "qcrd", "qcrd_no_judge", "qcrd_kept", "qcrd_all_active", "qcrd_t5_judge", "naive")
PARTS = ("prompt", "choice", "gradient", "judge", "optimizer", "sampling")


# What is measured


class Parts:
    """Seconds and operations by part of a step. The innermost part that is open takes them."""

    def __init__(self, counter: Any = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.operations: dict[str, float] = defaultdict(float)
        self.counter = counter
        self.open: list[str] = []
        self.since = (0.0, 0.0)

    def _account(self) -> None:
        now = (time.perf_counter(), float(self.counter.get_total_flops()) if self.counter else 0.0)
        if self.open:
            self.seconds[self.open[-1]] += now[0] - self.since[0]
            self.operations[self.open[-1]] += now[1] - self.since[1]
        self.since = now

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        self._account()
        self.open.append(part)
        try:
            yield
        finally:
            self._account()
            self.open.pop()


class WatchedEngine:
    """A TrainEngine whose time is told by part."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.module, self.parts = engine, engine.module, Parts()
        if self.module.is_seq2seq:
            # Its dropout is the first and the last thing that an encoder does, whoever walks through its layers.
            contexts: list[Any] = []

            def enter(*_: Any) -> None:
                if not contexts:
                    contexts.append(self.parts.of("prompt"))
                    contexts[-1].__enter__()
                else:
                    contexts.append(None)

            def leave(*_: Any) -> None:
                if len(contexts) == 2:
                    contexts[0].__exit__(None, None, None)
                    contexts.clear()

            dropout = self.module.model.get_encoder().dropout
            dropout.register_forward_pre_hook(enter)
            dropout.register_forward_hook(leave)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        with self.parts.of("gradient" if self.module.training else "choice"):
            return self.engine.forward(*arguments, **options)

    def train(self, mode: bool = True) -> None:
        self.engine.train(mode)

    def backward(self, loss: Any, *, last: bool) -> None:
        with self.parts.of("gradient"):
            self.engine.backward(loss, last=last)

    def step(self, lr: float) -> None:
        with self.parts.of("optimizer"):
            self.engine.step(lr)


class WatchedJudge:
    """An OnlineJudge whose scores are told by part."""

    def __init__(self, judge: Any, engine: WatchedEngine) -> None:
        self.judge, self.engine = judge, engine

    def score(self, questions: Sequence[str], texts: Sequence[str]) -> Any:
        with self.engine.parts.of("judge"):
            return self.judge.score(questions, texts)


class Bench:
    """A student, its engine, the judges and the batches: what all cases share."""

    def __init__(
        self, student: str, precision: str, data: str, rounds: int, cases: Sequence[str], positives: int = POSITIVES
    ) -> None:
        import torch.distributed as dist

        from qcrd_ray.training.engine import TrainEngine

        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        store = Path(tempfile.mkdtemp(prefix="training-step-")) / "store"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        setting = Setting.of(student, precision)
        self.student, self.config = setting.student, setting.config
        train = self.config.train
        settings: dict[str, Any] = {"zero_stage": train.zero_stage, "precision": train.precision}
        self.engine = WatchedEngine(TrainEngine(self.student, lr=0.0, weight_decay=0.0, clip=1.0, **settings))
        self.batches = batches_of(self.student, self.config, examples(data, QUESTIONS * (rounds + 1), positives))
        self.judges = {case: self._judge(case) for case in cases if case.startswith("qcrd") and case != "qcrd_no_judge"}
        if "naive" in cases:
            self.judges["naive"] = self._judge("qcrd")

    def tokens_of(self, number: int) -> int:
        """Tokens of all texts of a batch."""
        batch, negatives = self.batches[number]
        return sum(
            len(ids)
            for row, own in zip(batch.rows, negatives, strict=True)
            for ids in (row.predict, row.explain, row.label, *row.positives, *(negative.ids for negative in own))
        )

    def _judge(self, case: str) -> Any:
        import torch
        from transformers import T5Config, T5EncoderModel

        from qcrd_ray.models.discriminator import Discriminator, build_discriminator
        from qcrd_ray.training.judge import OnlineJudge

        found = build_discriminator(self.config.judge)
        if case == "qcrd_t5_judge":
            torch.manual_seed(1)
            encoder = T5EncoderModel(T5Config(**T5_SHAPES["t5_base"], vocab_size=T5_VOCABULARY, dropout_rate=0.0))
            found = Discriminator(encoder, found.tokenizer, max_tokens=self.config.judge.max_tokens)
        return OnlineJudge(found, self.config)

    def case_config(self, case: str, margin: float) -> Any:
        method = case if case in ("finetune", "dss") else "qcrd"
        loss = self.config.loss.model_copy(update={"margin": margin})
        judge = self.config.judge.model_copy(update={"enabled": case in self.judges})
        return self.config.model_copy(update={"method": method, "loss": loss, "judge": judge})

    def step(self, case: str, number: int, parts: Parts) -> dict[str, float]:
        """One step of a case on batch `number`. Returns its seconds and counts."""
        from qcrd_ray.training.kept_choices import KeptChoices
        from qcrd_ray.training.step import candidates, train_on_batch

        batch, negatives = self.batches[number]
        self.engine.parts = Parts()
        margin = margin_of(self.engine, [self.batches[number]], 1.0 if case == "qcrd_all_active" else ACTIVE)
        config = self.case_config(case, margin)
        self.engine.parts = parts
        judge = WatchedJudge(self.judges[case], self.engine) if case in self.judges else None
        kept = KeptChoices(2, QUESTIONS * len(self.batches))
        kept.keep([row.row for row in batch.rows], [0] * QUESTIONS, 0, QUESTIONS)
        begin = time.perf_counter()
        if case == "naive":
            naive = NaiveStep(self.student)
            with parts.of("sampling"):
                naive.sample(batch, negatives)
            with parts.of("judge"):
                scores = naive.scores(self.judges[case], batch, negatives)
            with parts.of("gradient"):
                loss = naive.add_gradients(self.engine, config, batch, negatives, scores)
            self.engine.step(0.0)
            return {"loss": loss * len(batch.rows), "seconds": time.perf_counter() - begin}
        found = candidates(config, batch.rows, negatives)
        losses = train_on_batch(self.engine, config, batch, found, judge, kept if case == "qcrd_kept" else None)
        self.engine.step(0.0)
        seconds = time.perf_counter() - begin
        return {"tokens": losses.tokens, "active": losses.active, "loss": losses.total, "seconds": seconds}

    def update_judge(self, case: str, number: int) -> float:
        """The seconds that the judge's update takes of a step: it falls due once an iteration."""
        from qcrd_ray.training.judge import JudgedQuestion

        batch, negatives = self.batches[number]
        rows = [
            JudgedQuestion(row.question, row.positive_texts, [n.text for n in found])
            for row, found in zip(batch.rows, negatives, strict=True)
        ]
        begin = time.perf_counter()
        self.judges[case].update(rows, 0.0)
        steps = self.config.train.iteration_steps * self.config.judge.update_interval
        return (time.perf_counter() - begin) / steps


def measure(student: str, precision: str, data: str, rounds: int, cases: Sequence[str]) -> dict[str, Any]:
    """{case: {"seconds", "parts", "tokens" of each round, "operations", "active"}}."""
    from torch.utils.flop_counter import FlopCounterMode

    bench = Bench(student, precision, data, rounds, cases)
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    operations = {}
    by_tokens = sorted(range(1, rounds + 1), key=bench.tokens_of)
    for case in cases:  # also the warm-up
        with FlopCounterMode(display=False, custom_mapping=attention_operations()) as counter:
            parts = Parts(counter)
            bench.step(case, by_tokens[(rounds - 1) // 2], parts)
        operations[case] = {part: parts.operations[part] / 1e12 for part in PARTS}
        if case in bench.judges:
            bench.update_judge(case, 0)
    for number in range(1, rounds + 1):
        turn = number % len(cases)
        for case in [*cases[turn:], *cases[:turn]]:
            parts = Parts()
            counts = bench.step(case, number, parts)
            if case in bench.judges:
                update = bench.update_judge(case, number)
                parts.seconds["judge"] += update
                counts["seconds"] += update
            found[case].append({"parts": dict(parts.seconds), **counts})
            print(f"{student} {data} round {number} {case}: {counts['seconds']:.2f} s", file=sys.stderr, flush=True)
    return {
        case: {
            "seconds": [row["seconds"] for row in found[case]],
            "parts": {part: [row["parts"].get(part, 0.0) for row in found[case]] for part in PARTS},
            "operations": operations[case],
            "tokens": [row.get("tokens", 0) for row in found[case]],
            "active": statistics.mean(row.get("active", 0) for row in found[case]) / QUESTIONS,
        }
        for case in cases
    }


def attention_operations() -> dict[Any, Any]:
    """For attention on a CPU, what torch counts on a GPU."""
    import torch

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        batch, heads, length, width = query
        return int(2 * batch * heads * length * key[2] * (width + value[3]))

    def backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
        batch, heads, length, width = query
        return int(2 * batch * heads * length * key[2] * (3 * width + 2 * value[3]))  # the weights are made once more

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def peak_memory(student: str, precision: str, data: str, case: str, positives: int = POSITIVES) -> float:
    """GiB above the libraries, in a process of its own."""
    command = [sys.executable, __file__, "--one", student, precision, data, case, str(positives)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def one_case(student: str, precision: str, data: str, case: str, positives: str) -> None:
    from memory import import_everything, status

    import_everything()
    idle = status("VmRSS")
    bench = Bench(student, precision, data, 2, [case], int(positives))
    for number in range(3):
        bench.step(case, number, Parts())
    print((status("VmHWM") - idle) / 2**30)


def lines(student: str, data: str, found: dict[str, Any]) -> Iterator[str]:
    base = found["dss"]["seconds"] if "dss" in found else None
    yield f"\n{student}, {data}: seconds (10^12 operations)"
    yield f"| case | step s | over dss | {' | '.join(PARTS)} | trained tokens | active | memory GiB |"
    yield "|---|" + "---:|" * (len(PARTS) + 5)
    for case, row in found.items():
        over = f"{median_ratio(row['seconds'], base):.2f}" if base else ""
        seconds = {part: statistics.median(row["parts"][part]) for part in PARTS}
        cells = [f"{seconds[part]:.2f} ({row['operations'][part]:.2f})" if seconds[part] else "" for part in PARTS]
        memory = f"{row['memory']:.2f}" if "memory" in row else ""
        yield (
            f"| `{case}` | {statistics.median(row['seconds']):.2f} | {over} | {' | '.join(cells)} "
            f"| {statistics.mean(row['tokens']):.0f} | {row['active']:.2f} | {memory} |"
        )


def rows_of(name: str, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for case, result in found.items():
        yield figure(f"{case}/{name}", "step", result["seconds"], "s")
        for part in PARTS:
            if any(result["parts"][part]):
                yield figure(f"{case}/{name}", part, result["parts"][part], "s")
                yield figure(f"{case}/{name}", f"{part}_operations", [result["operations"][part]], "10^12")
        yield figure(f"{case}/{name}", "trained_tokens", result["tokens"], "tokens")
        for metric in ("memory", "memory_m1", "memory_m20"):
            if metric in result:
                yield figure(f"{case}/{name}", metric, [result[metric]], "GiB")


def ratios_of(found: dict[str, Any]) -> dict[str, float]:
    """Of one student and data."""
    ratios = {}
    for name, one, other in (("qcrd_over_dss", "qcrd", "dss"), ("naive_over_qcrd", "naive", "qcrd")):
        if one in found and other in found:
            ratios[name] = median_ratio(found[one]["seconds"], found[other]["seconds"])
    if "memory_m1" in found.get("qcrd", {}):
        ratios["memory_m20_over_m1"] = found["qcrd"]["memory_m20"] / found["qcrd"]["memory_m1"]
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="measure the peak memory of each case too")
    parser.add_argument("--quick", action="store_true", help="T5-small on the lengths of CommonsenseQA, three rounds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--measured", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    precision = arguments.precision
    if arguments.measured:
        found = measure(arguments.student[0], precision, arguments.data[0], arguments.rounds, arguments.case)
        arguments.measured.write_text(json.dumps(found))
        return
    if arguments.one:
        one_case(*arguments.one)
        return
    students, data, rounds = arguments.student, arguments.data, arguments.rounds
    if arguments.quick:
        students, data, rounds = ["t5_small"], ["cqa"], 3
    texts = "real" if os.environ.get("QCRD_BENCHMARK_DATA") else "made up (QCRD_BENCHMARK_DATA is not set)"
    print(f"texts: {texts}", flush=True)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for student in students:
        for name in data:
            # A process a student and data: what DeepSpeed has set up stays as long as the process.
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                command = [sys.executable, __file__, "--measured", file.name, "--student", student, "--data", name]
                command += ["--precision", precision, "--rounds", str(rounds), "--case", *arguments.case]
                subprocess.run(command, check=True)
                found = json.loads(Path(file.name).read_text())
            if arguments.memory:
                for case in arguments.case:
                    found[case]["memory"] = peak_memory(student, precision, name, case)
            if "qcrd" in found:
                for positives in (1, 20):
                    found["qcrd"][f"memory_m{positives}"] = peak_memory(student, precision, name, "qcrd", positives)
            rows += rows_of(f"{student}/{name}", found)
            print("\n".join(lines(student, name, found)), flush=True)
            for ratio, value in ratios_of(found).items():
                worse = min if ratio.startswith("naive") else max
                ratios[f"{ratio}/{student}/{name}"] = value
                ratios[f"{ratio}/{student}"] = worse(value, ratios.get(f"{ratio}/{student}", value))
                print(f"{ratio}/{student}/{name}: {value:.2f}", flush=True)
    write_figures(arguments.json, rows, ratios, texts=texts)


if __name__ == "__main__":
    main()

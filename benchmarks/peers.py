"""Real training tokens a second against trainers that people use: transformers' Seq2SeqTrainer, TRL's SFTTrainer.

    python benchmarks/peers.py [--student t5_base ...] [--data svamp] [--rounds N] [--steps N] [--json FILE]
    python benchmarks/peers.py --quick

Rationale fine-tuning of the same student on the same batches, 8 questions a step, each a label and a rationale:

* `ours`: `method=dss`, packed sequences.
* `seq2seq_trainer` (T5 students): as Distilling step-by-step does it, two padded batches a step, its two losses.
* `trl` (SmolLM2): both sequences of each question in one padded batch of 16; `trl_packed`: its packing on, with as many
  packed rows a step as hold its tokens, and only the tokens of those rows counted.

The same dtype, batch and optimizer (fused AdamW, clipping at 1) for all. With bf16, `ours` computes in bfloat16 and
keeps float32 masters of the weights, and so does a peer with its `bf16` option (`_autocast`). `_bf16` is a peer whose
weights themselves are bfloat16, with no masters: it has less to do, and loses every update below a 256th of a weight.
Ratios, each in the same round: `dss_over_seq2seq_trainer`, `causal_over_trl`, `causal_over_trl_packed`, the least over
the students, data and precisions; `.../STUDENT/DATA/PRECISION` for each, with `_without_masters` behind the name
against `_bf16`. Only tokens of prompts and targets count, never padding.

Each peer runs in an environment of its own, which is made under `--environments` from PyPI with the versions below,
each case in a process of its own, one after another, in an order that turns with the rounds. Students and data are
those of step_data.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from figures import figure, median_ratio, write_figures
from step_data import DATA, STUDENTS

TORCH = ["torch==2.13.0", "numpy", "safetensors"]
ENVIRONMENTS = {
    "transformers": [*TORCH, "transformers==5.19.0", "accelerate==1.15.0"],
    "trl": [*TORCH, "transformers==5.19.0", "accelerate==1.15.0", "datasets==5.2.0", "trl==1.16.0"],
}
PEERS = {"seq2seq_trainer": "transformers", "trl": "trl", "trl_packed": "trl"}
NAMES = {
    "seq2seq_trainer": "dss_over_seq2seq_trainer", "trl": "causal_over_trl", "trl_packed": "causal_over_trl_packed"
}  # fmt: skip
SUFFIXES = {"bf16": ("_autocast", "_bf16"), "fp32": ("",)}
WARM_UP = 2
LEARNING_RATE = 5e-5


# In the environment of a peer, where this project is not installed


def real_tokens(job: dict[str, Any]) -> int:
    """Of prompts and targets, in the steps that count."""
    return sum(len(ids) for step in job["steps"][WARM_UP:] for row in step for ids in row.values())


class Steps:
    """Seconds from the beginning of the first step that counts to the end of the last."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        self.begin = 0.0

    def callback(self) -> Any:
        from transformers import TrainerCallback

        steps = self

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                steps.begin = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                steps.times.append((steps.begin, time.perf_counter()))

        return Clock()

    @property
    def seconds(self) -> float:
        return self.times[-1][1] - self.times[WARM_UP][0]


def trainer_arguments(place: str, batch: int, steps: int, case: str) -> dict[str, Any]:
    return {
        "output_dir": place, "per_device_train_batch_size": batch, "max_steps": steps, "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant", "optim": "adamw_torch_fused", "max_grad_norm": 1.0, "report_to": "none",
        "save_strategy": "no", "logging_strategy": "no", "remove_unused_columns": False, "use_cpu": True,
        "disable_tqdm": True, "bf16": case.endswith("_autocast"),
    }  # fmt: skip


def seq2seq_trainer(job: dict[str, Any], case: str) -> tuple[float, int]:
    """Seconds, and the real tokens of the steps that count."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Any:
        width = max(map(len, rows))
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    def batch(prompts: list[list[int]], targets: list[list[int]]) -> dict[str, Any]:
        ids = padded(prompts, job["pad"])
        mask = padded([[1] * len(row) for row in prompts], 0)
        return {"input_ids": ids, "attention_mask": mask, "labels": padded(targets, -100)}

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "predict": batch([row["predict"] for row in rows], [row["label"] for row in rows]),
            "explain": batch([row["explain"] for row in rows], [row["rationale"] for row in rows]),
        }

    class StepByStep(Seq2SeqTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: dict[str, Any], **_: Any) -> Any:
            return 0.5 * model(**inputs["predict"]).loss + 0.5 * model(**inputs["explain"]).loss

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [row for step in job["steps"] for row in step]
    dtype = torch.bfloat16 if case.endswith("_bf16") else torch.float32
    model = AutoModelForSeq2SeqLM.from_pretrained(job["model"], dtype=dtype)
    steps = Steps()
    with tempfile.TemporaryDirectory() as place:
        arguments = Seq2SeqTrainingArguments(**trainer_arguments(place, len(job["steps"][0]), len(job["steps"]), case))
        StepByStep(
            model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[steps.callback()]
        ).train()
    return steps.seconds, real_tokens(job)


def trl(job: dict[str, Any], case: str) -> tuple[float, int]:
    """Seconds, and the real tokens of the steps that count."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    sequences = []
    for step in job["steps"]:
        for row in step:
            for prompt, target in ((row["predict"], row["label"]), (row["explain"], row["rationale"])):
                mask = [0] * len(prompt) + [1] * len(target)
                sequences.append({"input_ids": [*prompt, *target], "completion_mask": mask})
    dtype = torch.bfloat16 if case.endswith("_bf16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    steps, packed = Steps(), case.startswith("trl_packed")
    questions, count = len(job["steps"][0]), len(job["steps"])
    with tempfile.TemporaryDirectory() as place:
        longest = max(len(row["input_ids"]) for row in sequences)
        # Packed, a row is as long as the longest sequence, and as many of them make a step as hold its tokens.
        tokens = sum(len(row["input_ids"]) for row in sequences) / count
        rows = max(1, round(tokens / longest)) if packed else 2 * questions
        config = SFTConfig(
            **trainer_arguments(place, rows, count, case), packing=packed, max_length=longest,
            gradient_checkpointing=False, dataset_num_proc=None,
        )  # fmt: skip
        trainer = InOrder(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(sequences),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[steps.callback()],
        )
        trainer.train()
    counted = trainer.train_dataset[WARM_UP * rows : count * rows]["input_ids"]
    return steps.seconds, sum(len(ids) for ids in counted)


# Here


def ours(job: dict[str, Any], precision: str) -> tuple[float, int]:
    """Seconds, and the real tokens of the steps that count."""
    import torch
    import torch.distributed as dist
    from step_data import batches_of_ids

    from qcrd_ray.config import load_config
    from qcrd_ray.models.student import load_student
    from qcrd_ray.training.engine import TrainEngine
    from qcrd_ray.training.step import candidates, train_on_batch

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    config = load_config(job["config"], ["student.model=" + job["model"], "method=dss", f"train.precision={precision}"])
    student = load_student(job["model"], config.student, torch.bfloat16 if precision == "bf16" else torch.float32)
    with tempfile.TemporaryDirectory() as place:
        dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=0, world_size=1)
        settings: dict[str, Any] = {"zero_stage": config.train.zero_stage, "precision": precision}
        engine = TrainEngine(student, lr=LEARNING_RATE, weight_decay=0.0, clip=1.0, **settings)
        begin = 0.0
        for number, batch in enumerate(batches_of_ids(job["steps"])):
            if number == WARM_UP:
                begin = time.perf_counter()
            found = candidates(config, batch.rows, [[] for _ in batch.rows])
            train_on_batch(engine, config, batch, found, None)
            engine.step(LEARNING_RATE)
        seconds = time.perf_counter() - begin
        dist.destroy_process_group()
    return seconds, real_tokens(job)


def environment(folder: Path, name: str) -> Path:
    """The Python of a peer's environment, which is made where it is not there."""
    place = folder / name
    python, ready = place / "bin" / "python", place / "ready.json"
    wanted = json.dumps(ENVIRONMENTS[name])
    if not ready.exists() or ready.read_text() != wanted:
        print(f"installing {', '.join(ENVIRONMENTS[name])} into {place}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *ENVIRONMENTS[name]], check=True)
        ready.write_text(wanted)
    return python


def jobs(student: str, data: str, steps: int, folder: Path) -> dict[str, Any]:
    """The batches as token ids, and where the student is."""
    from step_data import QUESTIONS, Setting, batches_of, examples

    setting = Setting.of(student)
    if student == "smollm2_135m":
        model = setting.embedded
    else:
        model = folder / "student"
        setting.student.model.save_pretrained(model)
        setting.student.tokenizer.tokenizer.save_pretrained(model)
    batches = batches_of(setting.student, setting.config, examples(data, QUESTIONS * (steps + WARM_UP)))
    rows = [
        [{"predict": r.predict, "explain": r.explain, "label": r.label, "rationale": r.first} for r in batch.rows]
        for batch, _ in batches
    ]
    return {"model": str(model), "pad": setting.student.tokenizer.pad, "steps": rows, "config": str(setting.file)}


def compare(student: str, data: str, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    peers = ["seq2seq_trainer"] if student != "smollm2_135m" else ["trl", "trl_packed"]
    cases = ["ours", *(peer + suffix for peer in peers for suffix in SUFFIXES[precision])]
    pythons = {peer: environment(arguments.environments, PEERS[peer]) for peer in peers}
    found: dict[str, list[float]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(prefix="peers-") as place:
        job = jobs(student, data, arguments.steps, Path(place))
        file = Path(place) / "job.json"
        file.write_text(json.dumps(job))
        for number in range(arguments.rounds):
            turn = number % len(cases)
            for case in [*cases[turn:], *cases[:turn]]:
                peer = next((name for name in sorted(peers, key=len, reverse=True) if case.startswith(name)), None)
                python = str(pythons[peer]) if peer else sys.executable
                command = [python, __file__, "--run", case, str(file), precision]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                seconds, tokens = json.loads(done.stdout.strip().splitlines()[-1])
                found[case].append(tokens / seconds)
                print(
                    f"{student} {data} {precision} {case}: {found[case][-1]:.1f} tokens/s", file=sys.stderr, flush=True
                )
    ratios = {
        NAMES[peer] + ("_without_masters" if suffix == "_bf16" else ""): median_ratio(
            found["ours"], found[peer + suffix]
        )
        for peer in peers
        for suffix in SUFFIXES[precision]
    }
    return {"tokens_per_second": found, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", nargs="+", choices=STUDENTS, default=["t5_base", "smollm2_135m"])
    parser.add_argument("--data", nargs="+", choices=DATA, default=["svamp"])
    parser.add_argument("--precision", nargs="+", choices=tuple(SUFFIXES), help="default: the faster on this machine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="that count; two more come first")
    parser.add_argument("--environments", type=Path, default=Path("runs/peers"))
    parser.add_argument(
        "--quick", action="store_true", help="T5-small on CommonsenseQA's lengths, one round of six steps"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        case, file, precision = arguments.run
        job = json.loads(Path(file).read_text())
        peers: dict[str, Callable[[dict[str, Any], str], tuple[float, int]]] = {
            "seq2seq_trainer": seq2seq_trainer,
            "trl": trl,
        }
        run = next((run for name, run in peers.items() if case.startswith(name)), None)
        print(json.dumps(run(job, case) if run else ours(job, precision)))
        return
    from qcrd_ray.hardware import cpu_gains_by_bf16

    precisions = arguments.precision or ["bf16" if cpu_gains_by_bf16() else "fp32"]
    arguments.environments = arguments.environments.absolute()
    if arguments.quick:
        arguments.student, arguments.data, arguments.rounds, arguments.steps = ["t5_small"], ["cqa"], 1, 6
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for student in arguments.student:
        for data in arguments.data:
            for precision in precisions:
                found = compare(student, data, precision, arguments)
                name = f"{student}/{data}/{precision}"
                print(f"\n{student}, {data}, {precision}: real tokens a second, median (least to greatest)")
                for case, values in found["tokens_per_second"].items():
                    rows.append(figure(f"{case}/{name}", "speed", values, "tokens/s"))
                    print(f"{case:28} {statistics.median(values):8.1f} ({min(values):.1f} to {max(values):.1f})")
                for ratio, value in found["ratios"].items():
                    ratios[f"{ratio}/{name}"] = value
                    ratios[ratio] = min(value, ratios.get(ratio, value))  # over all that was compared
                    print(f"{ratio}/{name}: {value:.2f}", flush=True)
                write_figures(arguments.json, rows, ratios, environments=ENVIRONMENTS)  # what comes next takes minutes


if __name__ == "__main__":
    main()

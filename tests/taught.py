"""Small students that were really taught a few answers, in folders as a run leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qcrd_ray.config import ExperimentConfig, load_config
from qcrd_ray.models.scratch import write_scratch
from qcrd_ray.models.student import Item, load_student, save_student
from qcrd_ray.run_folder import RunFolder
from qcrd_ray.sampling.schedule import Schedule
from qcrd_ray.tasks import get_task
from qcrd_ray.tasks.prompts import EXPLAIN, PREDICT, SEPARATOR
from qcrd_ray.training.export import export

SUMS = [(3, 4), (5, 2), (8, 1), (2, 2), (6, 7), (9, 9)]
ANSWERS = {f"What is {a} + {b}?": (str(a + b), f"{a} + {b} = {a + b}.") for a, b in SUMS}
"""Label and rationale of each question."""
CHOSEN = {("Which is it?", ("red", "blue")): "red", ("Which is it?", ("blue", "green")): "green"}
"""Label of a question with its choices: the same question each time."""
TEACHER = "Teacher <b>1</b> | `x`"


def student_config(model: str, method: str, *overrides: str) -> ExperimentConfig:
    settings = [f"student.model=scratch:{model}", f"method={method}", "student.max_rationale_tokens=32", *overrides]
    return load_config(Path(__file__).parents[1] / "jobs" / "configs" / "tiny.yaml", settings)


def teach(config: ExperimentConfig, folder: Path) -> RunFolder:
    """A run whose last snapshot was taught ANSWERS (CHOSEN, for task cqa), and its `student/`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of so small a network, threads would mostly wait for each other
    try:
        return _teach(config, folder)
    finally:
        torch.set_num_threads(threads)


def _teach(config: ExperimentConfig, folder: Path) -> RunFolder:
    run = RunFolder(str(folder), "run")
    run.create()
    task = get_task(config)
    name = config.student.model.removeprefix("scratch:")
    asked: list[tuple[str, str, str]] = []
    if config.task == "cqa":
        for (question, choices), label in CHOSEN.items():
            text = task.student_input(question, choices)
            asked += [(PREDICT, text, label), (EXPLAIN, text, f"It is {label}.")]
    else:
        for question, (label, rationale) in ANSWERS.items():
            text = task.student_input(question)
            if config.method == "single_task":
                asked.append((PREDICT, text, f"{rationale}{SEPARATOR}{label}"))
            else:
                asked += [(PREDICT, text, label), (EXPLAIN, text, rationale)]
    texts = [f"{prefix} {text}\n{target}" for prefix, text, target in asked]
    last = Schedule.of(config).iterations
    with run.new_folder(run.snapshot(last)) as snapshot:
        write_scratch(name, texts, snapshot, seed=0)
        student = load_student(str(snapshot), config.student)
        tools = student.tokenizer
        items = [Item(tools.prompt(prefix, text)[0], [tools.target(target, 64).ids]) for prefix, text, target in asked]
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
        for _ in range(400):
            losses = student(items)
            if float(losses.detach().max()) < 0.01:
                break
            optimizer.zero_grad()
            losses.sum().backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
        else:
            raise AssertionError(f"not learned: {losses.detach().tolist()}")
        save_student(student, snapshot)
    export(config, run, last, result_of_a_run(config))
    return run


def result_of_a_run(config: ExperimentConfig) -> dict[str, Any]:
    """What a card takes from `result.json`, with texts that try to be markup."""
    question = "Which is it?\nAnswer Choices: (a) red (b) blue" if config.task == "cqa" else "What is 3 + 4?"
    example = {"id": "1", "question": question, "gold": "7", "rationale": "3 + 4 = 7.", "label": "7"}
    before = {"rationale_before": "<script>alert(1)</script> [x](http://y.z) *a* | @b", "label_before": ""}
    train = {
        "questions": 64, "used": 60, "dropped": {"no_samples": {"count": 4, "ids": ["<i>"]}}, "teachers": [TEACHER],
        "samples": 300, "single_sample_accuracy": 0.8, "vote_accuracy": 0.97, "wrongly_voted": 2,
    }  # fmt: skip
    return {
        "name": "run", "method": config.method, "task": config.task, "steps": config.train.max_steps,
        "accuracy": {"before": 0.0, "after": 0.25, "split": "test", "n": 16, "student": "last", "step": 12},
        "evaluations": [{"step": step, "split": "valid", "accuracy": 0.125, "n": 16} for step in (0, 4, 12)],
        "examples": [{**example, **before}],
        "data": {
            "teacher": TEACHER, "simulated": config.teacher.engine == "scripted", "train": train,
            "held_out": {"valid": {"used": 16}, "test": {"used": 16}},
        },
        "negatives": {
            "used": 40, "requested": 48, "engine": "t5", "lag_min": 0, "lag_max": 2, "active_fraction": 0.5,
        },
        "judge": {"pretrained_steps": 5, "updates": 3, "reused": False},
    }  # fmt: skip

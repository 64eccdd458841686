"""Progress of a run on standard error: stages, and a line every few steps."""

from __future__ import annotations

import time
from typing import Any

from rich.markup import escape
from rich.table import Table

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.rationales.counts import Counts, describe_drops
from qcrd_ray.reporting.console import standard_error
from qcrd_ray.run_folder import RunFolder


class Progress:
    """Prints stages as they begin, and what a follower tells it of the steps and evaluations."""

    def __init__(self, run: RunFolder, config: ExperimentConfig) -> None:
        self.config = config
        self.console = standard_error()
        self.begin = time.monotonic()
        self.window: list[dict[str, Any]] = []
        self.console.print(f"[bold]{escape(str(run))}[/bold]", soft_wrap=True)

    def _print(self, text: str) -> None:
        self.console.print(f"{clock(time.monotonic() - self.begin):>7}  {escape(text)}", soft_wrap=True)

    def stage(self, name: str, resumed_from: int = 0) -> None:
        what = {
            "tables": "questions and rationale sets",
            "samplers": f"starting {self.config.sampler.actors} sampler(s)",
            "training": f"training {self.config.student.model} by {self.config.method}",
            "evaluation": "evaluating",
        }.get(name, name)
        self._print(what + (f", resumed from step {resumed_from}" if resumed_from else ""))

    def counts(self, counts: Counts) -> None:
        train = counts.train
        teacher = f"{counts.teacher}" + (
            " - simulated" if counts.simulated and "simulated" not in counts.teacher else ""
        )
        self._print(
            f"{train.used} of {train.questions} questions, teacher {teacher}: {train.samples} samples, "
            f"{_percent(train.single_sample_accuracy)} right, vote {_percent(train.vote_accuracy)} right"
        )
        if train.dropped:
            self._print(f"not used: {describe_drops(train.dropped)}")

    def record(self, record: dict[str, Any], before: bool) -> None:
        if not before:
            self._show(record)

    def evaluation(self, entry: dict[str, Any], before: bool) -> None:
        if not before:
            self._print(f"step {entry['step']}: accuracy {entry['accuracy']:.3f} on {entry['n']} of {entry['split']}")

    def _show_judge(self, record: dict[str, Any]) -> None:
        steps = record["judge_pretrained_steps"]
        if not steps:
            self._print(
                "judge not pretrained: no question has a positive and a negative (no minority of a vote, and "
                f"judge.augmentation={self.config.judge.augmentation})"
            )
            return
        sides = ((side, record[f"judge_pretrain_{side}_score"]) for side in ("positive", "negative"))
        scores = ", ".join(f"{score:.2f} of {side}s" for side, score in sides if score is not None)
        self._print(f"judge pretrained for {steps} steps" + (f": mean score {scores}" if scores else ""))
        if record.get("judge_scores_alike"):
            self._print(
                "its scores are alike, so they weigh nothing: try more judge.pretrain_steps or another judge.lr"
            )

    def _show(self, record: dict[str, Any]) -> None:
        window = self.window
        if "judge_pretrained_steps" in record:
            self._show_judge(record)
        if "step" not in record:
            return
        window.append(record)
        done, steps = record["step"] + 1, self.config.train.max_steps
        if done % self.config.train.log_interval and done != steps and done != 1:
            return
        seconds = sum(r["seconds"] for r in window)
        rate = sum(r["tokens"] for r in window) / max(seconds, 1e-9)
        left = seconds / len(window) * (steps - done)
        parts = [
            f"step {done}/{steps}",
            f"iteration {record['iteration']}",
            f"loss {_mean(window, 'loss'):.3f} (label {_mean(window, 'loss_label'):.3f}, "
            f"positive {_mean(window, 'loss_positive'):.3f}, negative {_mean(window, 'loss_negative'):.3f})",
        ]
        if self.config.is_contrastive:
            active = [r["active_fraction"] for r in window if r["active_fraction"] is not None]
            parts.append(f"active {sum(active) / len(active):.2f}" if active else "no negatives")
        if record.get("score_positive") is not None:
            negative = record.get("score_negative")
            parts.append(f"scores {record['score_positive']:.2f}/{'-' if negative is None else f'{negative:.2f}'}")
        parts += [f"{rate:.0f} tokens/s", f"{clock(left)} left"]
        self._print(" · ".join(parts))
        window.clear()


def show_result(result: dict[str, Any]) -> None:
    """The table before / after, and the example questions, on standard error."""
    console = standard_error()
    accuracy, negatives = result["accuracy"], result["negatives"]
    table = Table(title=f"{result['name']}: accuracy on {accuracy['n']} questions of {accuracy['split']}")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("accuracy", f"{accuracy['before']:.3f}", f"{accuracy['after']:.3f}")
    console.print(table)
    console.print(
        f"student: {accuracy['student']}, step {accuracy['step']} · negatives: {negatives['used']} used, lag up to "
        f"{negatives['lag_max']}, {negatives['active_fraction']:.2f} active, {negatives['stall_fraction']:.1%} stall",
        soft_wrap=True,
    )
    for example in result["examples"]:
        console.rule(style="dim")
        console.print(
            f"[bold]{escape(_short(example['question']))}[/bold]  (gold: {escape(example['gold'])})", soft_wrap=True
        )
        for when, rationale, label in (
            ("before", example["rationale_before"], example["label_before"]),
            ("after ", example["rationale"], example["label"]),
        ):
            console.print(f"  {when}: {escape(_short(rationale))} → {escape(_short(label, 40))}", soft_wrap=True)


def _mean(records: list[dict[str, Any]], key: str) -> float:
    values = [r[key] for r in records if r.get(key) is not None]
    return sum(values) / len(values) if values else float("nan")


def _short(text: str, length: int = 240) -> str:
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= length else flat[: length - 1] + "…"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def clock(seconds: float) -> str:
    """`1:05`, `2:01:05`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

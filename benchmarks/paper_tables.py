"""The paper's other tables on generated sums: what each choice of the method does to a student's accuracy.

    python benchmarks/paper_tables.py [--only SPACE ...] [--points PATTERN] [--seeds N] [--output runs/paper_tables]
        [--pieces FOLDER] [key=value ...]

The spaces are those of `tune/sweep.py`. The teacher is the scripted one, which is simulated: it explains its sums, and
about a third of its samples are wrong. The student is the SmolLM2-135M of `quickstart.yaml`. So the tables say what the
parts of the method do where the teacher is noisy, and nothing of any benchmark.

Whatever ends it, the same command goes on, with `--pieces` also where the runs are not. `OUTPUT/SPACE.json` holds what
`docs/results.md` shows: means over seeds with 95 % intervals by Student's t, and the paired difference of each point to
the default: of the two means of a question over seeds, its interval over questions, and the p of a sign-flip test.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pieces import all_trials, p_value, paired, right_answers, shown

from qcrd_ray.config import ExperimentConfig, config_to_yaml, load_config
from qcrd_ray.run_folder import write_text_atomic
from qcrd_ray.sweeps.space import Axis, Choice, Point, Space
from qcrd_ray.sweeps.summary import TrialRow, summarise

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tune"))

from search_spaces import SPACES  # noqa: E402

NAMES = (
    "methods", "ablations", "schemes", "negative_source", "labels", "negatives_k", "positives_m", "temperature",
    "data_share", "ablations_all",
)  # fmt: skip
SETTINGS = (
    "data.generated.test=300", "train.max_steps=32", "train.iteration_steps=2", "negatives.lag=5",
    "train.checkpoint_interval=32", "evaluation.observed=0", "train.precision=bf16", "sampler.precision=bf16",
    "train.threads=1", "sampler.threads=1", "train.cpus_per_worker=0.6", "sampler.cpus=0.1", "sampler.kv_cache_gib=0.5",
)  # fmt: skip
"""Sixteen iterations, so that lags of 3, 5 and 10 differ; two runs at once on two cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--points", default="", help="regular expression that the name of a point must match")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/paper_tables"))
    parser.add_argument(
        "--pieces",
        type=Path,
        help="where trials that have ended are kept, and found by a later start; default: --output",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for found in tables(arguments.only, arguments):
        write_text_atomic(arguments.output / f"{found['name']}.json", json.dumps(found, indent=1) + "\n")
        print("\n".join(lines_of(found)), flush=True)


def tables(names: Sequence[str], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the trials of the points of these tables say of each, every point run once, whatever tables it is in."""
    base = load_config(
        ROOT / "jobs" / "configs" / "quickstart.yaml",
        [*SETTINGS, f"run.storage_path={arguments.output.absolute()}", *arguments.overrides],
    )
    spaces = {name: Space(SPACES[name]) for name in NAMES}
    choices: dict[str, Choice] = {}
    for name, space in spaces.items():
        for point in space.grid():
            choices.setdefault(
                identity(base, point), Choice(f"{name}, {point}", point.settings, pretrained=point.pretrained)
            )
    chosen = {name: [p for p in spaces[name].grid() if re.search(arguments.points, str(p))] for name in names}
    labels = {name: {str(point): choices[identity(base, point)].label for point in chosen[name]} for name in names}
    pieces = arguments.pieces or arguments.output
    seeds = range(base.train.seed, base.train.seed + arguments.seeds)
    trials = all_trials(
        base,
        Axis("point", "a point of any table", tuple(choices.values())),
        {seed: pieces / f"tables-seed-{seed}.json" for seed in seeds},
        {label for of_points in labels.values() for label in of_points.values()},
    )
    by_label: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        by_label.setdefault(trial["labels"]["point"], []).append(trial)
    only = ["--points", f"'{arguments.points}'"] if arguments.points else []
    overrides = " ".join([*only, "--seeds", str(arguments.seeds), *arguments.overrides])
    for name in names:
        points, default = chosen[name], spaces[name].default(base)
        of_point = {str(point): by_label[labels[name][str(point)]] for point in points}
        rows = [_row(trial, point) for point in points for trial in of_point[str(point)]]
        answers = {point: right_answers(of_trials) for point, of_trials in of_point.items()}
        yield {
            "name": name,
            "source": SPACES[name][0].source,
            "title": " × ".join(axis.title for axis in SPACES[name]),
            "command": f"python benchmarks/paper_tables.py --only {name} {overrides}",
            "config": config_to_yaml(shown(base)),
            "default": str(default) if default else None,
            "points": [asdict(point) for point in summarise(points, rows, default)],
            "differences": {
                point: paired(answers[point], answers[str(default)])
                for point in answers
                if str(default) in answers and point != str(default)
            },
            "trials": [asdict(row) for row in rows],
        }


def _row(trial: Mapping[str, Any], point: Point) -> TrialRow:
    """A trial as one of this point, whatever table it was run for."""
    own = {field.name: trial[field.name] for field in fields(TrialRow)}
    return TrialRow(**own | {"point": str(point), "labels": point.labels})


def identity(base: ExperimentConfig, point: Point) -> str:
    """The same for points that differ from the base config in the same."""
    flat = base.flat()
    differing = {key: value for key, value in point.settings.items() if flat[key] != value}
    return json.dumps([differing, point.pretrained], sort_keys=True)


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """The table, in Markdown."""
    axes = list(found["points"][0]["labels"])
    yield f"{found['title']} ({found['source']})\n"
    columns = [
        *axes, "test accuracy, 95 % over seeds", "difference, 95 % over questions", "p", "teacher's samples right",
        "votes right", "active negatives", "s a run",
    ]  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for point in found["points"]:
        own = [row for row in found["trials"] if row["point"] == point["point"] and row["accuracy"] is not None]
        labels = [point["labels"][axis] for axis in axes]
        half = "" if point["low"] is None else f" ± {(point['high'] - point['low']) / 2:.3f}"
        active = [row["active_fraction"] for row in own if row["negatives_used"]]
        teacher = [[row[key] for row in own if row[key] is not None] for key in ("teacher_accuracy", "vote_accuracy")]
        cells = [
            *labels, f"{point['mean']:.3f}{half}", *_difference(found["differences"].get(point["point"])),
            *(_mean(values, ".3f") for values in teacher), _mean(active, ".2f"),
            _mean([row["seconds"] for row in own], ".0f"),
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _difference(found: Mapping[str, float] | None) -> tuple[str, str]:
    return (f"{found['difference']:+.3f} ± {found['half']:.3f}", p_value(found["p"])) if found else ("", "")


def _mean(values: list[float], form: str) -> str:
    return format(sum(values) / len(values), form) if values else ""


if __name__ == "__main__":
    main()

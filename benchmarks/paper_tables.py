"""The paper's other tables on generated sums: what each choice of the method does to a student's accuracy.

    python benchmarks/paper_tables.py [--only SPACE ...] [--seeds N] [--output runs/paper_tables] [key=value ...]

The spaces are those of `tune/sweep.py`. The teacher is the scripted one, which is simulated: it explains its sums, and
about a third of its samples are wrong. The student is the SmolLM2-135M of `quickstart.yaml`. So the tables say what the
parts of the method do where the teacher is noisy, and nothing of any benchmark.

Whatever ends it, the same command goes on. `OUTPUT/SPACE.json` holds what `docs/results.md` shows.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qcrd_ray.config import ExperimentConfig, config_to_yaml, load_config
from qcrd_ray.run_folder import write_text_atomic
from qcrd_ray.sweeps.driver import sweep
from qcrd_ray.sweeps.plan import Plan
from qcrd_ray.sweeps.settings import SweepSettings
from qcrd_ray.sweeps.space import Axis, Choice, Point, Space
from qcrd_ray.sweeps.summary import TrialRow, summarise

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tune"))

from search_spaces import SPACES  # noqa: E402

NAMES = (
    "methods", "labels", "ablations_all", "schemes", "negative_source", "positives_m", "negatives_k", "temperature",
    "data_share",
)  # fmt: skip
SETTINGS = (
    "data.generated.test=300", "train.max_steps=48", "train.checkpoint_interval=24", "evaluation.observed=0",
    "train.threads=1", "sampler.threads=1", "train.cpus_per_worker=0.6", "sampler.cpus=0.1", "sampler.kv_cache_gib=0.5",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/paper_tables"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for found in tables(arguments.only, arguments):
        write_text_atomic(arguments.output / f"{found['name']}.json", json.dumps(found, indent=1) + "\n")
        print("\n".join(lines_of(found)), flush=True)


def tables(names: Sequence[str], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One sweep over the points of all tables, each once, whatever tables it is in; what it says of each table."""
    base = load_config(
        ROOT / "jobs" / "configs" / "quickstart.yaml",
        [*SETTINGS, f"run.storage_path={arguments.output.absolute()}", *arguments.overrides],
    )
    spaces = {name: Space(SPACES[name]) for name in names}
    choices: dict[str, Choice] = {}
    for name, space in spaces.items():
        for point in space.grid():
            choices.setdefault(
                identity(base, point), Choice(f"{name}, {point}", point.settings, pretrained=point.pretrained)
            )
    settings = SweepSettings(name="+".join(names), seeds=arguments.seeds)
    union = Space((Axis("point", "a point of any table", tuple(choices.values())),))
    result = sweep(settings, base, union)
    if result["failures"]:
        raise SystemExit(f"error: {result['failures'][0]['trial']}: {result['failures'][0]['reason']}")
    by_label: dict[str, list[TrialRow]] = {}
    for row in Plan(settings, base, union).rows():
        by_label.setdefault(row.labels["point"], []).append(row)
    for name, space in spaces.items():
        points, default = space.grid(), space.default(base)
        rows = [
            replace(row, point=str(point), labels=point.labels)
            for point in points
            for row in by_label[choices[identity(base, point)].label]
        ]
        yield {
            "name": name,
            "source": SPACES[name][0].source,
            "title": " × ".join(axis.title for axis in SPACES[name]),
            "command": " ".join(["python", "benchmarks/paper_tables.py", *sys.argv[1:]]),
            "config": config_to_yaml(base.model_copy(update={"run": type(base.run)()})),
            "default": default.labels if default else None,
            "points": [asdict(point) for point in summarise(points, rows, default)],
            "trials": [asdict(row) for row in rows],
        }


def identity(base: ExperimentConfig, point: Point) -> str:
    """The same for points that differ from the base config in the same."""
    flat = base.flat()
    differing = {key: value for key, value in point.settings.items() if flat[key] != value}
    return json.dumps([differing, point.pretrained], sort_keys=True)


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """The table, in Markdown."""
    axes = list(found["points"][0]["labels"])
    yield f"{found['title']} ({found['source']})\n"
    columns = ["test accuracy, 95 % over seeds", "difference", "teacher's samples right", "votes right"]
    yield f"| {' | '.join([*axes, *columns])} | active negatives | s a run |"
    yield "|---" * (len(axes) + 6) + "|"
    for point in found["points"]:
        own = [row for row in found["trials"] if row["point"] == point["point"] and row["accuracy"] is not None]
        labels = [point["labels"][axis] for axis in axes]
        half = "" if point["low"] is None else f" ± {(point['high'] - point['low']) / 2:.3f}"
        active = [row["active_fraction"] for row in own if row["negatives_used"]]
        teacher = [[row[key] for row in own if row[key] is not None] for key in ("teacher_accuracy", "vote_accuracy")]
        right = [_mean(values, ".3f") for values in teacher]
        cells = [*labels, f"{point['mean']:.3f}{half}", _difference(point), *right, _mean(active, ".2f")]
        yield f"| {' | '.join(cells)} | {_mean([row['seconds'] for row in own], '.0f')} |"


def _difference(point: Mapping[str, Any]) -> str:
    if point["difference"] is None:
        return ""
    if point["difference_interval"] is None:
        return f"{point['difference']:+.3f}"
    return f"{point['difference']:+.3f} ± {point['difference_interval']:.3f}"


def _mean(values: list[float], form: str) -> str:
    return format(sum(values) / len(values), form) if values else ""


if __name__ == "__main__":
    main()

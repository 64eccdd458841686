"""The driver of a sweep: checks every point, samples the teacher once, runs the trials, sums them up."""

from __future__ import annotations

import io
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pyarrow.csv
import pyarrow.parquet

from qcrd_ray.cli import result_line
from qcrd_ray.config import ExperimentConfig, config_to_yaml
from qcrd_ray.errors import Stopped
from qcrd_ray.run_folder import CONFIG, RESULT
from qcrd_ray.run_lock import RunLock
from qcrd_ray.sampling.teacher import LIVE, LiveTeacher, sample_teacher
from qcrd_ray.sweeps.page import write_page
from qcrd_ray.sweeps.plan import SWEEP, Plan, check_folder, check_plan
from qcrd_ray.sweeps.settings import SweepSettings
from qcrd_ray.sweeps.space import Space
from qcrd_ray.sweeps.summary import (
    MISSING,
    PointRow,
    TrialRow,
    points_table,
    selected_by,
    summarise,
    trials_table,
)
from qcrd_ray.sweeps.trial import FAILED, FINISHED, STOPPED
from qcrd_ray.sweeps.tuning import run_trials
from qcrd_ray.training.stopping import Stop
from qcrd_ray.training.trainer import logical_cpus, session


def sweep(settings: SweepSettings, base: ExperimentConfig, space: Space) -> dict[str, Any]:
    """Run or go on with a sweep. Returns the object that its `result.json` holds.

    Raises:
        UserError: what a user can mend, found before anything is started or written where that is possible.
        Stopped: a signal asked it to end; the same command goes on.
    """
    begin = time.monotonic()
    plan = Plan(settings, base, space)
    check_plan(plan)
    check_folder(plan)
    stop = Stop()
    plan.folder.create()
    with RunLock(plan.folder):
        plan.folder.write(SWEEP, json.dumps(plan.identity(), indent=1, sort_keys=True) + "\n")
        plan.folder.write(CONFIG, config_to_yaml(base))
        sampled = {"sampled": 0, "reused": 0}
        try:
            with _ray(plan.configs()), stop.on_signals():
                sampled = _sample_teacher(plan)
                with stop.orderly():
                    run_trials(plan, stop)
        except KeyboardInterrupt:
            if not stop.asked:
                raise
        rows = plan.rows()
        if stop.asked:
            done = sum(row.status == FINISHED for row in rows)
            raise Stopped(done, len(rows), stop.signal, "trial")
        points = summarise(list(plan.points.values()), rows, plan.default)
        result = _result(plan, rows, points, sampled, time.monotonic() - begin)
        _write(plan, rows, points, result)
    return result


@contextmanager
def _ray(configs: Sequence[ExperimentConfig]) -> Iterator[None]:
    """Ray for all trials: on one machine, room for each of them at least."""
    settings = {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no accuracy
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with session(max(configs, key=logical_cpus)):
        yield


def _sample_teacher(plan: Plan) -> dict[str, int]:
    """Have a live teacher asked for the most that any trial wants of it, so that trials find all that they need.

    Returns:
        Samples that it was asked for, and samples that were there.

    Raises:
        UserError: too many questions failed.
    """
    total = {"sampled": 0, "reused": 0}
    wanted: dict[str, ExperimentConfig] = {}
    for trial in plan.probes():
        config = trial.config
        if config.teacher.engine in LIVE and config.uses_rationales:
            key = f"{LiveTeacher(config).fingerprint} {config.data.model_dump_json(exclude={'share'})}"
            if key not in wanted or config.teacher.samples > wanted[key].teacher.samples:
                wanted[key] = config
    for config in wanted.values():
        assert plan.store is not None  # checked with the plan
        outcome = sample_teacher(config, plan.store)
        total["sampled"] += outcome.sampled
        total["reused"] += outcome.plan.reused
    return total


def _result(
    plan: Plan, rows: Sequence[TrialRow], points: Sequence[PointRow], sampled: Mapping[str, int], seconds: float
) -> dict[str, Any]:
    statuses = {status: sum(row.status == status for row in rows) for status in (FINISHED, STOPPED, FAILED, MISSING)}
    pretrained = [row for row in rows if row.judge_pretrained_steps]
    best = next((point for point in points if point.is_best), None)
    return {
        "job": "sweep",
        "name": plan.folder.name,
        "task": plan.base.task,
        "student": plan.base.student.model,
        "axes": {axis.name: list(axis.keys) for axis in plan.space.axes},
        "searcher": plan.settings.searcher,
        "scheduler": plan.settings.scheduler,
        "seeds": plan.settings.seeds,
        "trials": {"total": len(rows), **statuses},
        "selected_by": selected_by(rows),
        "best": best.labels if best else None,
        "default": plan.default.labels if plan.default else None,
        "points": [asdict(point) for point in points],
        "failures": [{"trial": row.trial, "reason": row.reason} for row in rows if row.status == FAILED],
        "teacher_simulated": any(row.teacher_simulated for row in rows),
        "reused": {
            "teacher_samples_asked": sampled["sampled"] + sum(row.teacher_sampled for row in rows),
            "teacher_samples_reused": sampled["reused"],
            "judges_pretrained": sum(row.judge_reused is False for row in pretrained),
            "judges_reused": sum(row.judge_reused is True for row in pretrained),
        },
        "seconds": round(seconds, 1),
        "sweep": str(plan.folder),
    }


def _write(plan: Plan, rows: Sequence[TrialRow], points: Sequence[PointRow], result: dict[str, Any]) -> None:
    """Tables, figures, page, and the result last."""
    for name, table in (("trials", trials_table(rows)), ("points", points_table(points))):
        csv, parquet = io.BytesIO(), io.BytesIO()
        pyarrow.csv.write_csv(table, csv)
        pyarrow.parquet.write_table(table, parquet)
        plan.folder.write(f"{name}.csv", csv.getvalue())
        plan.folder.write(f"{name}.parquet", parquet.getvalue())
    write_page(plan.folder, plan.space, plan.base, points, rows, result)
    plan.folder.write(RESULT, result_line(result) + "\n")

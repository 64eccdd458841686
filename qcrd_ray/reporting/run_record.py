"""A run as its report sees it: what its folder holds, wherever that is, and what is missing there.

Nothing in the folder is taken for granted: a run may be under way, may have been stopped, or may be an older one.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from qcrd_ray.config import ExperimentConfig, config_from_dict, flatten
from qcrd_ray.errors import UserError
from qcrd_ray.rationales.schema import OBSERVATIONS as OBSERVATIONS_SCHEMA
from qcrd_ray.rationales.table_files import open_rationale_table, rows_at
from qcrd_ray.run_folder import CONFIG, DATA, EVALUATIONS, EVALUATIONS_SUMMARY, METRICS, NEGATIVES, RESULT, RunFolder
from qcrd_ray.run_folder import OBSERVATIONS_FILE as OBSERVATIONS
from qcrd_ray.storage import is_uri, local_folder

TRAIN_ROWS, HELD_OUT_ROWS = 10_000, 2_500
"""Questions of each kind that a report shows; of more, a seeded sample."""
HELD_OUT_SPLITS = ("test", "valid")
NEGATIVE_FILES = 200
SAMPLE_PARTS = 4
"""Files that are read at most: of the negatives the newest, of the teacher's samples the first."""
MOST_OBSERVED = 200
"""What `evaluation.observed` may be."""
DAMAGED = (UserError, OSError, ValueError, pa.ArrowException)
"""What reading a damaged table raises: pyarrow's own are of all three."""
LARGEST = 1e30
"""Beyond it nothing is drawn."""


@dataclass
class RunRecord:
    """What is known of a run.

    Attributes:
        label: its name, unlike that of every other run of the report.
        where: its folder.
        raw_config: dotted keys and values, as they were written.
        config: the same as this version understands it; None where it does not.
        steps: a column of `metrics.jsonl` by its name, [steps] float, NaN where a line has none.
        pretraining: the line of the discriminator's pretraining.
        evaluations: {"step", "snapshot", "split", "accuracy", "n"} in the order of the steps.
        train: rows of `RATIONALE_SETS`.
        train_total: how many there are.
        votes: (agreement, whether the vote is gold, questions) over all of them.
        samples: of a training question's id, its teacher's samples in their order, as far as they were read.
        negatives: of a training question's id, its newest sampled negatives.
        held_out: rows of `HELD_OUT` of `split`.
        predictions: of `split`, by "before" and "after": {id: (prediction, whether it is right)}.
        observed: rows of `OBSERVATIONS`.
        missing: what is not there, a sentence each.
    """

    label: str
    where: str
    raw_config: dict[str, Any]
    config: ExperimentConfig | None = None
    result: dict[str, Any] | None = None
    steps: dict[str, np.ndarray] = field(default_factory=dict)
    pretraining: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, Any] | None = None
    train: list[dict[str, Any]] = field(default_factory=list)
    train_total: int = 0
    votes: list[tuple[float, bool, int]] = field(default_factory=list)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    negatives: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    split: str | None = None
    held_out: list[dict[str, Any]] = field(default_factory=list)
    held_out_total: int = 0
    predictions: dict[str, dict[str, tuple[str, bool]]] = field(default_factory=dict)
    observed: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def column(self, name: str) -> np.ndarray:
        """[steps] float, NaN where it is unknown."""
        return self.steps.get(name, np.full(self.step_count, np.nan))

    @property
    def step_count(self) -> int:
        return len(self.steps.get("step", ()))

    @property
    def max_steps(self) -> int | None:
        steps = finite(self.raw_config.get("train.max_steps"))
        return None if steps is None else int(steps)

    @property
    def best(self) -> dict[str, Any] | None:
        """The best evaluation of a trained student on the split that selects, or on the one that there is."""
        trained = [e for e in self.evaluations if e["step"] > 0]
        valid = [e for e in trained if e["split"] == "valid"]
        return max(valid or trained, key=lambda e: (e["accuracy"], -e["step"]), default=None)

    @property
    def temperature(self) -> float | None:
        """Of the negatives, None where the run samples none."""
        sampled = self.config is None or self.config.sampled_negatives
        return finite(self.raw_config.get("negatives.temperature")) if sampled else None


def finite(value: Any) -> float | None:
    """A number as a float; None for what is none, or for one that cannot be drawn."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= LARGEST:
        return None
    return float(value)


def part(of: Any, key: str) -> dict[str, Any]:
    """A mapping within a mapping, empty where there is none."""
    found = of.get(key) if isinstance(of, dict) else None
    return found if isinstance(found, dict) else {}


def open_run(path: str) -> RunFolder:
    """The folder of a run by its path or URI. Raises UserError where there is no run."""
    if is_uri(path):
        base, mark, options = path.partition("?")
        parent, _, name = base.rstrip("/").rpartition("/")
        run = RunFolder(f"{parent}{mark}{options}", name)
        if not name or parent.endswith((":", ":/")):
            raise UserError(f"run {path}: expected a run's folder, as s3://bucket/runs/NAME")
    else:
        folder = local_folder(path).resolve()
        run = RunFolder(str(folder.parent), folder.name)
        if not folder.is_dir():
            raise UserError(f"run {path}: no such folder; expected one that jobs/train.py wrote, as runs/NAME")
    if not run.exists(CONFIG):
        trials = "; it holds trials: give one of them, or several" if run.exists("trials") else ""
        raise UserError(f"run {path}: no {CONFIG} in it; expected a folder that jobs/train.py wrote{trials}")
    return run


def read_run(run: RunFolder, label: str | None = None) -> RunRecord:
    """Read what a report shows of a run. Raises UserError for a config that is no mapping, or a storage that fails."""
    raw = _raw_config(run)
    record = RunRecord(label or run.name, str(run), flatten(raw))
    try:
        record.config = config_from_dict(raw)
    except UserError as error:
        record.missing.append(f"This version does not read the run's config ({error}); it is shown as it was written.")
    _read_result(run, record)
    _read_metrics(run, record)
    _read_tables(run, record)
    _read_predictions(run, record)
    _read_samples(run, record)
    _read_negatives(run, record)
    _read_observations(run, record)
    return record


def _raw_config(run: RunFolder) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(run.read(CONFIG))
    except FileNotFoundError:
        raise UserError(f"run {run}: no {CONFIG} in it; expected a folder that jobs/train.py wrote") from None
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{run.where(CONFIG)}: no valid YAML") from None
    if not isinstance(raw, dict):
        raise UserError(f"{run.where(CONFIG)}: expected a mapping of keys to values")
    return raw


def _json(run: RunFolder, name: str, record: RunRecord, kind: type) -> Any:
    """What a JSON file holds, if it is of that type."""
    try:
        value = run.read_json(name)
    except (ValueError, UnicodeDecodeError):
        record.missing.append(f"{name} is damaged.")
        return None
    if value is not None and not isinstance(value, kind):
        record.missing.append(f"{name} is damaged.")
        return None
    return value


def _read_result(run: RunFolder, record: RunRecord) -> None:
    record.result = _json(run, RESULT, record, dict)
    record.counts = _json(run, f"{DATA}/counts.json", record, dict)
    found = _json(run, EVALUATIONS_SUMMARY, record, list) or []
    record.evaluations = [e for e in found if _is_evaluation(e)]
    if len(record.evaluations) < len(found):
        record.missing.append(f"{EVALUATIONS_SUMMARY} is damaged: {len(found) - len(record.evaluations)} left out.")
    if not record.evaluations:
        record.missing.append("No evaluation yet: no accuracy over steps.")


def _is_evaluation(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.get("split") not in HELD_OUT_SPLITS:
        return False
    whole = all(isinstance(number := entry.get(key), int) and 0 <= number < 10**9 for key in ("step", "snapshot", "n"))
    accuracy = finite(entry.get("accuracy"))
    return whole and accuracy is not None and 0.0 <= accuracy <= 1.0


def _read_metrics(run: RunFolder, record: RunRecord) -> None:
    try:
        lines = run.read(METRICS).split(b"\n")
    except FileNotFoundError:
        lines = []
    rows = []
    for line in lines:
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:  # one that is being written
            continue
        if isinstance(row, dict) and finite(row.get("step")) is not None:
            rows.append(row)
        elif isinstance(row, dict) and "judge_pretrained_steps" in row:
            record.pretraining = row
    for name in sorted({name for row in rows for name in row}):
        values = [row.get(name) for row in rows]
        if any(isinstance(value, list | str | dict) for value in values):
            continue
        known = map(finite, values)
        record.steps[name] = np.array([math.nan if value is None else value for value in known])
    done, steps = record.step_count, record.max_steps
    diverged = record.column("step")[~np.isfinite(record.column("loss"))] if "loss" in record.steps else np.empty(0)
    if len(diverged):
        record.missing.append(
            f"The loss is no finite number at {len(diverged):,} of {done:,} steps, the first time at step "
            f"{int(diverged[0]) + 1:,}: the training diverged, and the curves leave these steps out."
        )
    if not done:
        record.missing.append("No step is trained yet: no losses, no throughput.")
    if record.result is None:
        record.missing.append(f"The run is not complete: {done:,} of {steps or '?'} steps so far, no result.json.")


@contextmanager
def _table(run: RunFolder, split: str) -> Iterator[pa.Table]:
    """A table of the run, memory-mapped; one on another filesystem is fetched for as long as it is read.

    Raises FileNotFoundError.
    """
    name = f"{DATA}/{split}.arrow"
    if run.root is not None:
        if not (run.root / name).is_file():
            raise FileNotFoundError(name)
        yield open_rationale_table(run.root / name)
        return
    with tempfile.TemporaryDirectory(prefix="qcrd_ray-") as folder:
        target = Path(folder) / "table.arrow"
        run.patiently(name, lambda: run.storage.get_file(name, target))
        yield open_rationale_table(target)


def _some(total: int, limit: int) -> Sequence[int]:
    """All rows, or a sample of them that is the same every time."""
    return range(total) if total <= limit else sorted(random.Random(0).sample(range(total), limit))


def _rows(table: pa.Table, rows: Sequence[int]) -> list[dict[str, Any]]:
    return table.to_pylist() if len(rows) == table.num_rows else rows_at(table, rows)


def _read_tables(run: RunFolder, record: RunRecord) -> None:
    try:
        with _table(run, "train") as table:
            record.train_total = table.num_rows
            record.train = _rows(table, _some(table.num_rows, TRAIN_ROWS))
            votes = table.select(["agreement", "votes_gold"]).drop_null()
            agreement = votes["agreement"].to_numpy().round(4)
            for is_gold in (False, True):
                values, counts = np.unique(agreement[votes["votes_gold"].to_numpy() == is_gold], return_counts=True)
                record.votes += [(float(v), is_gold, int(n)) for v, n in zip(values, counts, strict=True)]
    except FileNotFoundError:
        record.missing.append("No table of training questions yet.")
    except DAMAGED as error:
        record.missing.append(f"The table of training questions cannot be read: {error}")
    splits = {e["split"] for e in record.evaluations} | set(part(record.counts, "held_out"))
    record.split = next((split for split in HELD_OUT_SPLITS if split in splits), None)
    if record.split is None:
        return
    try:
        with _table(run, record.split) as table:
            total = record.held_out_total = table.num_rows
            first = range(min(MOST_OBSERVED, total))  # the student's rationales are of these
            record.held_out = _rows(table, sorted({*first, *_some(total, HELD_OUT_ROWS)}))
    except FileNotFoundError:
        record.missing.append(f"No table of the questions of {record.split}.")
    except DAMAGED as error:
        record.missing.append(f"The table of the questions of {record.split} cannot be read: {error}")


def read_predictions(run: RunFolder, file: str) -> dict[str, tuple[str, bool]]:
    """Of a file of evaluations/: {id: (prediction, whether it is right)}."""
    rows = [json.loads(line) for line in run.read(file).splitlines() if line.strip()]
    return {row["id"]: (str(row["prediction"]), bool(row["correct"])) for row in rows}


def _read_predictions(run: RunFolder, record: RunRecord) -> None:
    """Of the untouched student, and of the one that is reported (of a run under way: the newest)."""
    if record.split is None:
        return
    numbers = sorted({int(e["snapshot"]) for e in record.evaluations if e["split"] == record.split})
    chosen = {"before": numbers[:1] if numbers[:1] == [0] else [], "after": [n for n in numbers if n > 0][-1:]}
    for name, snapshots in chosen.items():
        for number in snapshots:
            file = f"{EVALUATIONS}/{record.split}-{number:06d}.jsonl"
            try:
                record.predictions[name] = read_predictions(run, file)
            except FileNotFoundError:
                record.missing.append(f"{file} is not there: no predictions {name} training.")
            except (ValueError, KeyError, TypeError):
                record.missing.append(f"{file} is damaged: no predictions {name} training.")


def _parquet(run: RunFolder, name: str, columns: Sequence[str], record: RunRecord) -> list[dict[str, Any]]:
    """The rows of a Parquet file, none where it is not there; `record.missing` says where it cannot be read."""
    try:
        content = run.read(name)
    except FileNotFoundError:
        return []
    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read(columns=list(columns))
        if table.column_names == list(columns):
            return list(table.to_pylist())
    except DAMAGED:
        pass
    record.missing.append(f"{name} is damaged, and left out.")
    return []


def _read_samples(run: RunFolder, record: RunRecord) -> None:
    wanted = {row["id"] for row in record.train}
    folder = f"{DATA}/teacher_samples"
    for name in [name for name in run.list(folder) if name.endswith(".parquet")][:SAMPLE_PARTS]:
        table = _parquet(run, f"{folder}/{name}", ["id", "sample_index", "rationale", "answer", "target"], record)
        for row in table:
            if row["id"] in wanted:
                record.samples.setdefault(row["id"], []).append(row)


def _read_negatives(run: RunFolder, record: RunRecord) -> None:
    """The newest sampled negatives of the questions shown, from the newest files."""
    if record.config is not None and not record.config.sampled_negatives:
        return
    wanted = {row["id"] for row in record.train}
    columns = ["id", "step", "snapshot", "rationale"]
    for name in list(reversed(run.list(NEGATIVES)))[:NEGATIVE_FILES]:
        if len(record.negatives) == len(wanted):
            break
        table = _parquet(run, f"{NEGATIVES}/{name}", columns, record)
        fresh: dict[str, list[dict[str, Any]]] = {}
        for row in table:
            if row["id"] in wanted and row["id"] not in record.negatives:
                kept = fresh.setdefault(row["id"], [])
                if kept and kept[0]["step"] < row["step"]:
                    kept.clear()
                kept.append(row)
        record.negatives |= fresh
    if not record.negatives and record.train and not run.list(NEGATIVES):
        record.missing.append("No sampled negatives yet.")


def _read_observations(run: RunFolder, record: RunRecord) -> None:
    for row in _parquet(run, OBSERVATIONS, OBSERVATIONS_SCHEMA.names, record):
        row |= {"score": finite(row["score"]), "temperature": finite(row["temperature"])}
        if row["kind"] != "student" or row["temperature"] is not None:
            record.observed.append(row)
    if not record.observed and run.exists(OBSERVATIONS):
        record.missing.append("No rationales at several temperatures and no scores.")
    elif not record.observed:
        reason = f"no {OBSERVATIONS}, which a run writes once it is trained"
        if record.raw_config.get("method") == "finetune":
            reason = "a student that finetune trains writes no rationales"
        elif record.raw_config.get("evaluation.observed") == 0:
            reason = "evaluation.observed is 0"
        record.missing.append(f"No rationales at several temperatures and no scores: {reason}.")
    elif all(row["score"] is None for row in record.observed):
        record.missing.append("The run has no discriminator: no scores.")

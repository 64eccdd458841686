"""TensorBoard, Weights & Biases and MLflow, by config: fed from what a run writes, and no part of what it does.

A tracker works in a thread of its own. One that fails is tried again, then left behind with a count; the run goes on.
`tracking/<tracker>.json` in the run's folder says what a tracker has, so that the next start logs what is missing and
no step twice. A step that is done again after a resume has the values that it had, and keeps those.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import netrc
import os
import re
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from qcrd_ray.config import ExperimentConfig, config_to_yaml
from qcrd_ray.errors import UserError
from qcrd_ray.run_folder import RunFolder

logger = logging.getLogger(__name__)

TENSORBOARD, TRACKING = "tensorboard", "tracking"
BATCH = 500
PENDING_LIMIT = 200_000
"""Points that wait for a tracker that fails; the oldest go first."""
RETRY_SECONDS = 30.0
CLOSE_SECONDS = 60.0
NOT_VALUES = frozenset({"step", "rows"})

Ending = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True)
class Point:
    """Values of one step.

    Attributes:
        step: optimizer steps that were done; 0 is the untrained student.
        values: by their names, `train/loss` or `evaluation/valid/accuracy`.
        time: seconds since the epoch at which it was read.
        evaluation: the split, where this is an evaluation.
    """

    step: int
    values: dict[str, float]
    time: float
    evaluation: str | None = None


@dataclass
class State:
    """What a tracker has of a run. `extra` is the tracker's own: the id under which it knows the run.

    Attributes:
        step: the last step that it has; -1: none.
        evaluations: [step, split] of those that it has.
    """

    step: int = -1
    evaluations: list[list[Any]] = field(default_factory=list)
    extra: dict[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """One library. Any method may raise: it is called again."""

    name: str
    durable: bool
    """Whether what `log` took outlives the process."""

    def start(self, state: State) -> None:
        """Connect; `state` is what was there before, and takes the tracker's id of the run."""
        ...

    def log(self, points: Sequence[Point]) -> None: ...

    def close(self, ending: Ending) -> None: ...


def check_tracking(config: ExperimentConfig, run: RunFolder) -> None:
    """Find what keeps a tracker from working, before anything is started.

    Raises:
        UserError: a library or a key is missing, or W&B would have nowhere to keep an offline run.
    """
    tracking = config.tracking
    wanted = {
        "tracking.tensorboard": ("tensorboard", tracking.tensorboard),
        "tracking.wandb.project": ("wandb", bool(tracking.wandb.project)),
        "tracking.mlflow.experiment": ("mlflow", bool(tracking.mlflow.experiment)),
    }
    for key, (library, on) in wanted.items():
        if on and importlib.util.find_spec(library) is None:
            raise UserError(f'config key {key}: {library} is not installed; pip install "qcrd_ray[tracking]"')
    if tracking.wandb.project and tracking.wandb.mode == "online" and not _has_wandb_key():
        raise UserError(
            "config key tracking.wandb.project: no key for Weights & Biases; set WANDB_API_KEY, or "
            "tracking.wandb.mode=offline"
        )
    offline = tracking.wandb.project and tracking.wandb.mode == "offline"
    if offline and run.root is None and "WANDB_DIR" not in os.environ:
        raise UserError(
            "config key tracking.wandb.mode: offline keeps the run in its folder, and run.storage_path is none; set "
            "WANDB_DIR to a folder of the driver's machine"
        )


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:  # where `wandb login` puts it
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


@contextmanager
def open_trackers(config: ExperimentConfig, run: RunFolder) -> Iterator[list[Feeder]]:
    """The trackers that the config names, as listeners of a Follower. All is flushed at the end, however it comes."""
    tracking = config.tracking
    trackers: list[Tracker] = []
    if tracking.tensorboard:
        trackers.append(TensorBoard(config, run))
    if tracking.wandb.project:
        trackers.append(Wandb(config, run))
    if tracking.mlflow.experiment:
        trackers.append(Mlflow(config, run))
    feeders = [Feeder(tracker, run) for tracker in trackers]
    ending: Ending = "failed"
    try:
        yield feeders
        ending = "finished"
    except (KeyboardInterrupt, SystemExit):
        ending = "interrupted"
        raise
    finally:
        for feeder in feeders:
            feeder.close(ending)
        end = time.monotonic() + CLOSE_SECONDS
        for feeder in feeders:
            feeder.join(max(0.0, end - time.monotonic()))


class Feeder:
    """Feeds one tracker in a thread of its own. A Listener."""

    def __init__(self, tracker: Tracker, run: RunFolder) -> None:
        self.tracker = tracker
        self.run = run
        self.state = self._read_state()
        self.dropped = 0
        self._step = self.state.step
        self._evaluations = {(int(step), str(split)) for step, split in self.state.evaluations}
        self._pending: deque[Point] = deque()
        self._changed = threading.Condition()
        self._ending: Ending | None = None
        self._started = False
        self._warned = False
        self._thread = threading.Thread(target=self._work, name=f"tracking-{tracker.name}", daemon=True)
        self._thread.start()

    # As a listener

    def record(self, record: dict[str, Any], before: bool) -> None:
        step = record.get("step", -1) + 1
        if step > self._step:
            self._step = step
            self._add(Point(step, values_of(record), time.time()))

    def evaluation(self, entry: dict[str, Any], before: bool) -> None:
        step, split = int(entry["step"]), str(entry["split"])
        if (step, split) not in self._evaluations:
            self._evaluations.add((step, split))
            self._add(Point(step, {f"evaluation/{split}/accuracy": float(entry["accuracy"])}, time.time(), split))

    def _add(self, point: Point) -> None:
        with self._changed:
            self._pending.append(point)
            if len(self._pending) > PENDING_LIMIT:
                self._pending.popleft()
                self.dropped += 1
            self._changed.notify()

    def close(self, ending: Ending) -> None:
        with self._changed:
            self._ending = ending
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait for the tracker to have everything; say what it did not get."""
        self._thread.join(seconds)
        missing = self.dropped + len(self._pending)
        if missing:
            logger.warning(
                "%s did not get %d of the run's points; metrics.jsonl and evaluations/ in %s have them all",
                self.tracker.name,
                missing,
                self.run,
            )
        elif self._thread.is_alive():
            logger.warning(
                "%s had not closed after %g s; it may lack the run's last points", self.tracker.name, seconds
            )

    # The thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._started or self._pending or self._ending)
                batch = [self._pending[index] for index in range(min(BATCH, len(self._pending)))]
                ending = self._ending
            try:
                if not self._started:
                    self.tracker.start(self.state)
                    self._save_state()
                    self._started = True
                if batch:
                    self.tracker.log(batch)
                    self._took(batch)
                elif ending is not None:
                    self.tracker.close(ending)
                    self._save_state(closed=True)
                    return
            except Exception as error:  # whatever a library or the network throws: the run goes on
                self._warn(error, "as the run ended" if ending else "and is tried again while the run goes on")
                if ending is not None:
                    return
                with self._changed:
                    self._changed.wait_for(lambda: self._ending, timeout=RETRY_SECONDS)

    def _took(self, batch: Sequence[Point]) -> None:
        with self._changed:
            for point in batch:
                if self._pending and self._pending[0] is point:  # not dropped meanwhile
                    self._pending.popleft()
        for point in batch:
            if point.evaluation is None:
                self.state.step = max(self.state.step, point.step)
            else:
                self.state.evaluations.append([point.step, point.evaluation])
        self._save_state()

    def _warn(self, error: Exception, when: str) -> None:
        log = logger.debug if self._warned else logger.warning
        log("%s failed, %s: %s", self.tracker.name, when, _one_line(error))
        self._warned = True

    # What it has

    @property
    def _state_file(self) -> str:
        return f"{TRACKING}/{self.tracker.name}.json"

    def _read_state(self) -> State:
        try:
            return State(**(self.run.read_json(self._state_file) or {}))
        except (TypeError, ValueError):
            logger.warning("%s cannot be read; %s logs anew", self.run.where(self._state_file), self.tracker.name)
            return State()

    def _save_state(self, closed: bool = False) -> None:
        if self.tracker.durable or closed:
            self.run.write(self._state_file, json.dumps(vars(self.state)) + "\n")


def values_of(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics, by the names that trackers show."""
    values = {}
    for key, value in record.items():
        if key in NOT_VALUES or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if math.isfinite(value):
            name = key.removeprefix("judge_")
            values[f"judge/{name}" if name != key else f"train/{key}"] = float(value)
    if "step" in record and record["seconds"] > 0:
        values["train/tokens_per_second"] = record["tokens"] / record["seconds"]
    return values


def hyperparameters(config: ExperimentConfig) -> dict[str, str | int | float | bool]:
    """The resolved config by dotted keys; lists and what is unset as text."""
    flat = config.flat().items()
    return {key: value if isinstance(value, (str, int, float, bool)) else json.dumps(value) for key, value in flat}


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return re.sub(r"://[^@/\s]*@", "://", text)  # a URI of the environment may hold a password


class TensorBoard:
    """Event files in the run's `tensorboard/`; on a bucket they are written beside the driver and copied at the end."""

    name = "tensorboard"

    def __init__(self, config: ExperimentConfig, run: RunFolder) -> None:
        self.config = config
        self.run = run
        self.durable = run.root is not None
        self.folder = run.working_folder(TENSORBOARD)
        self.writer: Any = None

    def start(self, state: State) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        if not self.durable:
            shutil.rmtree(self.folder, ignore_errors=True)  # what was not copied is logged anew
        # A kill may have left events of steps that `state` does not know of; TensorBoard hides them.
        self.writer = SummaryWriter(str(self.folder), purge_step=state.step + 1)
        if state.step < 0:
            self.writer.add_text("config", f"```yaml\n{config_to_yaml(self.config)}```", 0)
            for summary in hparams(hyperparameters(self.config), {"train/loss": 0.0, "evaluation/valid/accuracy": 0.0}):
                self.writer.file_writer.add_summary(summary)

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            for name, value in point.values.items():
                self.writer.add_scalar(name, value, point.step, point.time)
        self.writer.flush()

    def close(self, ending: Ending) -> None:
        self.writer.close()
        if not self.durable:
            for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
                self._put(file, f"{TENSORBOARD}/{file.relative_to(self.folder)}")

    def _put(self, file: Path, name: str) -> None:
        self.run.patiently(name, lambda: self.run.storage.put_file(file, name))


class Wandb:
    """A Weights & Biases run. The step is a value of its own (W&B drops what comes late, as evaluations do)."""

    name = "wandb"
    durable = True

    def __init__(self, config: ExperimentConfig, run: RunFolder) -> None:
        self.config = config
        self.folder = Path(os.environ.get("WANDB_DIR") or run.root or run.working_folder("wandb"))
        self.run_name = run.name
        self.run: Any = None
        self.state = State()
        self.step = -1

    def start(self, state: State) -> None:
        import wandb

        settings = self.config.tracking.wandb
        id_ = state.extra.setdefault("id", uuid.uuid4().hex[:12])
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            name=self.run_name,
            id=id_,
            resume="allow" if settings.mode == "online" else None,
            mode=settings.mode,
            dir=str(self.folder),
            config=self.config.model_dump(mode="json"),
            allow_val_change=True,  # another number of workers, say
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, init_timeout=CLOSE_SECONDS / 2),
        )
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("evaluation/step", hidden=True)
        for part in ("train/*", "judge/*"):
            self.run.define_metric(part, step_metric="step")
        self.run.define_metric("evaluation/*", step_metric="evaluation/step")
        # A kill may have left W&B with steps that `state` does not know of.
        known = self.run.summary.get("step") if settings.mode == "online" else None
        self.step = known if isinstance(known, int) else -1
        self.state = state

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            if point.evaluation is not None:
                self._log({**point.values, "evaluation/step": point.step})
            elif point.step > self.step:
                self._log({**point.values, "step": point.step})
                self.step = point.step  # a batch that fails halfway is sent again

    def _log(self, values: dict[str, float]) -> None:
        """Log one row. Online W&B numbers the rows itself; offline it would begin at 0 with each start."""
        if self.config.tracking.wandb.mode == "online":
            self.run.log(values)
            return
        row = int(self.state.extra.get("rows", "0"))
        self.run.log(values, step=row)
        self.state.extra["rows"] = str(row + 1)

    def close(self, ending: Ending) -> None:
        self.run.finish(exit_code=0 if ending == "finished" else 1)


MLFLOW_POINTS = 40
"""Points of up to 25 values in a batch of MLflow's, which takes 1000 values."""


class Mlflow:
    """A run of an MLflow experiment."""

    name = "mlflow"
    durable = True

    def __init__(self, config: ExperimentConfig, run: RunFolder) -> None:
        self.config = config
        self.place = str(run)
        self.run_name = run.name
        self.client: Any = None
        self.id = ""
        self.step = -1

    def start(self, state: State) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        settings = self.config.tracking.mlflow
        self.client = MlflowClient(tracking_uri=settings.uri)
        if "run_id" in state.extra:
            self.client.update_run(state.extra["run_id"], status="RUNNING")
            # A kill may have left MLflow with steps that `state` does not know of.
            history = self.client.get_metric_history(state.extra["run_id"], "train/loss")
            self.step = max((metric.step for metric in history), default=-1)
        else:
            assert settings.experiment is not None
            found = self.client.get_experiment_by_name(settings.experiment)
            experiment = found.experiment_id if found else self.client.create_experiment(settings.experiment)
            run = self.client.create_run(experiment, run_name=self.run_name, tags={"qcrd_ray.run": self.place})
            state.extra["run_id"] = run.info.run_id
        self.id = state.extra["run_id"]
        if "params" not in state.extra:
            params = [Param(key, str(value)[:500]) for key, value in hyperparameters(self.config).items()]
            for first in range(0, len(params), 100):  # MLflow's limit
                self.client.log_batch(self.id, params=params[first : first + 100])
            state.extra["params"] = "logged"

    def log(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        for first in range(0, len(points), MLFLOW_POINTS):  # a batch that fails is sent again, those before it are not
            part = [p for p in points[first : first + MLFLOW_POINTS] if p.evaluation is not None or p.step > self.step]
            metrics = [
                Metric(name, value, int(point.time * 1000), point.step)
                for point in part
                for name, value in point.values.items()
            ]
            if metrics:
                self.client.log_batch(self.id, metrics=metrics)
            self.step = max([self.step, *(point.step for point in part if point.evaluation is None)])

    def close(self, ending: Ending) -> None:
        statuses: dict[Ending, str] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
        self.client.set_terminated(self.id, statuses[ending])

"""The driver of a training run, top to bottom: tables, samplers, training, evaluation and the result."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow.compute as pc
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qcrd_ray.cli import result_line
from qcrd_ray.config import ExperimentConfig, config_to_yaml
from qcrd_ray.errors import Stopped, UserError
from qcrd_ray.rationales.streaming import DATA_CPUS
from qcrd_ray.rationales.table_files import open_rationale_table
from qcrd_ray.rationales.tables import trained_questions
from qcrd_ray.ray_session import ray_session
from qcrd_ray.reporting.follower import Follower
from qcrd_ray.reporting.progress import Progress as ProgressDisplay
from qcrd_ray.reporting.report import write_report
from qcrd_ray.reporting.sampling import SamplingDisplay
from qcrd_ray.reporting.tracking import open_trackers
from qcrd_ray.run_folder import CONFIG, DATA, RESULT, RunFolder
from qcrd_ray.run_lock import RunLock
from qcrd_ray.sampling.lagged_student import SamplingService, fixed_snapshot
from qcrd_ray.sampling.pool import Sampler
from qcrd_ray.sampling.student_engine import engine_spec
from qcrd_ray.sampling.teacher import Prepared, failures_message, prepare_tables, teacher_cpus
from qcrd_ray.sampling.teacher_pool import Plan, Totals
from qcrd_ray.training.checkpoint import newest_progress
from qcrd_ray.training.checks import check, open_run
from qcrd_ray.training.fit import fit
from qcrd_ray.training.initial_models import uses_judge
from qcrd_ray.training.loop import WorkerSpec
from qcrd_ray.training.model_process import model_process
from qcrd_ray.training.observations import observe
from qcrd_ray.training.outcome import evaluate, held_out, reported_split, result_of
from qcrd_ray.training.placement import placed, sampler_place, train_settings
from qcrd_ray.training.stopping import Stop

logger = logging.getLogger(__name__)


def train(config: ExperimentConfig, stop: Stop | None = None) -> dict[str, Any]:
    """Run or resume a training run. Returns the object that `result.json` holds.

    Args:
        stop: by which another thread can ask the run to end early. In the main thread SIGTERM and SIGINT ask for it.

    Raises:
        UserError: anything that a user can mend, found before anything is written where that is possible.
        Stopped: the run was asked to end early; the same config goes on from its newest checkpoint.
    """
    stop = stop or Stop()
    run = RunFolder(config.run.storage_path, config.run_name, config.run.storage_timeout_s)
    check(config, run)
    finished = open_run(config, run)
    if finished is not None:
        logger.info("run %s is complete; this is its result. For a new one set run.name", run)
        return finished
    try:
        with stop.on_signals():
            return _train(config, run, stop)
    except KeyboardInterrupt:
        if not stop.asked:
            raise
    progress = newest_progress(run)
    raise Stopped(progress.step if progress else 0, config.train.max_steps, stop.signal)


def _train(config: ExperimentConfig, run: RunFolder, stop: Stop) -> dict[str, Any]:
    """`train`, in a run that is not complete. Raises KeyboardInterrupt where it was asked to end early."""
    begin = time.perf_counter()
    with _new_run(run), RunLock(run) as lock:
        progress = newest_progress(run, check=True)
        resumed_from = progress.step if progress else 0
        display = ProgressDisplay(run, config)
        with session(config):
            display.stage("tables")
            models = model_process()
            prepared = _tables(config, run, progress is not None, stop)
            counts = prepared.counts
            stop.check()
            run.write(CONFIG, config_to_yaml(config))
            display.counts(counts)
            if config.is_contrastive and config.negatives.source.endswith("self_consistency"):
                _warn_without_minority(config, run)
            ray.get(models.write_models.remote(config, run))
            stop.check()
            display.stage("samplers")
            with (
                open_trackers(config, run) as trackers,
                placed(config, run, stop.check) as group,
                _samplers(config, run, lock.token, group, stop) as service,
                Follower(run, [display, *trackers]) as follower,
            ):
                before = {split: service.evaluate.remote(0, split) for split in held_out(counts)}
                examples_before = service.explain.remote(0, reported_split(counts), config.evaluation.examples)
                display.stage("training", resumed_from)
                follower.start()
                fit(config, run, WorkerSpec(config, run, service, lock.token, uses_judge(config)), group, stop)
                display.stage("evaluation")
                outcome = evaluate(config, run, counts, service, before, examples_before, stop)
                observe(config, run, service, models, outcome.snapshot, reported_split(counts), stop)
                statistics = ray.get(service.statistics.remote())
            run.remove_leftovers()  # of a sampler or a worker that was killed as it wrote
            seconds = time.perf_counter() - begin
            result = result_of(config, run, prepared, outcome, statistics, resumed_from, seconds)
            ray.get(models.export.remote(config, run, outcome.snapshot, result))
            run.write(RESULT, result_line(result) + "\n")
            _report(run)
    run.clear_cache()
    return result


def _report(run: RunFolder) -> None:
    """Write the run's report. The run is complete without it, and `jobs/report.py` makes it again."""
    try:
        write_report(run)
    except Exception as error:
        logger.warning("the report of run %s could not be written: %s", run, error)


@contextmanager
def _new_run(run: RunFolder) -> Iterator[None]:
    """Make the run's folder; take it away again where nothing came to be in it."""
    root = run.root
    made = [folder for folder in (root, *root.parents) if not folder.exists()] if root is not None else []
    run.create()
    try:
        yield
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()  # only where it is empty


def _tables(config: ExperimentConfig, run: RunFolder, keep: bool, stop: Stop) -> Prepared:
    """The run's tables, in its storage."""
    display = SamplingDisplay(config)

    def show(plan: Plan, totals: Totals) -> None:
        stop.check()
        display.show(plan, totals)

    folder = run.working_folder(DATA)
    if run.root is None and not (folder / "counts.json").is_file() and run.has_folder(DATA):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run.get_folder(DATA), folder)
    before = trained_questions(folder) if keep else None
    prepared = prepare_tables(config, folder, keep, show)
    if before is not None and prepared.counts.train.used != before:
        raise UserError(
            f"run {run}: it was begun on {before} training questions, of the same data there are now "
            f"{prepared.counts.train.used}; start it under another run.name"
        )
    if prepared.outcome is not None and (failed := failures_message(config, prepared.outcome)) is not None:
        raise UserError(failed)
    if run.root is None and not (prepared.counts.reused and run.has_folder(DATA)):
        run.put_folder(folder, DATA)
    return prepared


# Ray and its actors


@contextmanager
def session(config: ExperimentConfig) -> Iterator[None]:
    """Ray with room for the run, on a machine of its own or on the cluster that there is."""
    for name, value in train_settings(config).items():
        os.environ.setdefault(name, value)
    # A trainer and a sampler share a laptop's cores: a thread that waits must sleep, not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with ray_session(logical_cpus(config), config.run.verbose):
        yield


def logical_cpus(config: ExperimentConfig) -> float:
    """What the run takes at once: its workers, samplers and data, or its teacher before that."""
    train, sampler = config.train, config.sampler
    training = train.workers * train.cpus_per_worker + sampler.actors * sampler.cpus + DATA_CPUS
    return max(training, teacher_cpus(config))


def _warn_without_minority(config: ExperimentConfig, run: RunFolder) -> None:
    """As it is with a sample a question, or with `positives=first`."""
    negatives = open_rationale_table(run.table("train"))["negatives"]
    if not pc.any(pc.greater(pc.list_value_length(negatives), 0)).as_py():
        logger.warning(
            "negatives.source=%s: no question has a sample that the vote left out, so these negatives are none",
            config.negatives.source,
        )


@contextmanager
def _samplers(config: ExperimentConfig, run: RunFolder, token: str, group: PlacementGroup, stop: Stop) -> Iterator[Any]:
    """The sampling service over its actors, which start while training does. Closes the engines at the end."""
    spec = engine_spec(config)
    samplers = [
        ray.remote(Sampler)
        .options(
            num_cpus=config.sampler.cpus,
            num_gpus=config.sampler.gpus,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy=sampler_place(config, group, index),
        )
        .remote(config, run, spec, token)
        for index in range(config.sampler.actors)
    ]
    # The service lives and dies with the driver: no other node's death takes it away.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    service = (
        ray.remote(SamplingService)
        .options(num_cpus=0, max_concurrency=10_000, scheduling_strategy=here)
        .remote(config, run, samplers, token)
    )
    try:
        if config.negatives.source.startswith("fixed"):
            fixed = fixed_snapshot(run)
            ray.get(service.publish.remote(fixed.number, fixed.folder, fixed.digest))
        ray.get(service.start.remote())
        if 0 < config.sampler.gpus < 1:  # its engine measures what is free of a GPU that training will share
            stop.get(service.until_up.remote())
        yield service
    finally:
        closing = [sampler.close.remote() for sampler in samplers]
        # One that is still starting would answer late; who asks the run to end may not wait for long.
        ray.wait(closing, num_returns=len(closing), timeout=2 if stop.asked else 20)
        for handle in (*samplers, service):
            ray.kill(handle)

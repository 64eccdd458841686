"""The driver of a training run: tables, samplers, the TorchTrainer, evaluation and the result."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

from qcrd_ray.cli import write_result
from qcrd_ray.config import ExperimentConfig, config_to_yaml
from qcrd_ray.errors import UserError
from qcrd_ray.models.discriminator import build_discriminator, check_encoder
from qcrd_ray.models.student import check_student
from qcrd_ray.rationales.counts import Counts
from qcrd_ray.rationales.sources import splits_available
from qcrd_ray.rationales.streaming import DATA_CPUS
from qcrd_ray.rationales.tables import open_rationale_table
from qcrd_ray.ray_session import await_resources, cluster_state, ray_session
from qcrd_ray.reporting.progress import Progress as ProgressDisplay
from qcrd_ray.reporting.sampling import SamplingDisplay
from qcrd_ray.run_folder import RunFolder, atomic_folder, write_text_atomic
from qcrd_ray.sampling.lagged_student import Sampler, SamplingService
from qcrd_ray.sampling.schedule import FIXED, Schedule
from qcrd_ray.sampling.student_engine import engine_spec, is_seq2seq
from qcrd_ray.sampling.teacher import check_teacher, failures_message, prepare_tables, teacher_cpus
from qcrd_ray.training.checkpoint import read_progress
from qcrd_ray.training.engine import read_deepspeed_json
from qcrd_ray.training.loop import WorkerSpec, train_worker

logger = logging.getLogger(__name__)


def train(config: ExperimentConfig) -> dict[str, Any]:
    """Run or resume a training run. Returns the object that `result.json` holds.

    Raises:
        UserError: anything that a user can mend, found before anything is written where that is possible.
    """
    run = RunFolder(Path(config.run.storage_path).absolute() / config.run_name)
    _check(config)
    finished = _open_run(config, run)
    if finished is not None:
        logger.info("run %s is complete; this is its result. For a new one set run.name", run.root)
        return finished
    progress = read_progress(run)
    resumed_from = progress.step if progress else 0
    begin = time.perf_counter()
    with _ray(config), ProgressDisplay(run, config) as display:
        display.stage("tables")
        prepared = prepare_tables(config, run.data, progress is not None, SamplingDisplay(config).show)
        if prepared.outcome is not None and (failed := failures_message(config, prepared.outcome)) is not None:
            raise UserError(failed)
        counts = prepared.counts
        write_text_atomic(run.config, config_to_yaml(config))
        display.counts(counts)
        model = student_source(config, run)
        judge = _judge_source(config, run)
        display.stage("samplers")
        with _samplers(config, run, model) as service:
            before = {split: service.evaluate.remote(0, split) for split in _held_out(counts)}
            examples_before = service.explain.remote(0, _reported_split(counts), config.evaluation.examples)
            display.stage("training", resumed_from)
            display.follow()
            _fit(config, run, WorkerSpec(config, run, model, judge, service))
            display.stage("evaluation")
            outcome = _evaluate(config, run, counts, service, before, examples_before)
            statistics = ray.get(service.statistics.remote())
    seconds = time.perf_counter() - begin
    result = _result(config, run, counts, outcome, statistics, resumed_from, seconds)
    write_result(run.root, result)
    return result


def _check(config: ExperimentConfig) -> None:
    """Find what is wrong before anything is started or written."""
    read_deepspeed_json(config.train, config.optim.clip)
    model = config.student.model
    if model.startswith("embedded:"):
        from qcrd_ray.models.embedded import embedded_student

        embedded_student(model.removeprefix("embedded:"))
    elif model.startswith("scratch:"):
        from qcrd_ray.models.scratch import SCRATCH_MODELS

        if model.removeprefix("scratch:") not in SCRATCH_MODELS:
            known = ", ".join(f"scratch:{name}" for name in SCRATCH_MODELS)
            raise UserError(f"config key student.model: {model} is unknown; expected one of {known}")
    else:
        check_student(model, config.student)
    if _uses_judge(config):
        check_encoder(config.judge.encoder)
    if config.negatives.checkpoint and config.negatives.source.startswith("fixed"):
        folder = Path(config.negatives.checkpoint)
        if not (folder / "config.json").is_file():
            raise UserError(f"config key negatives.checkpoint: {folder} is no student folder (no config.json in it)")
    if config.sampler.engine == "vllm" and is_seq2seq(config):
        raise UserError("config key sampler.engine: vllm runs no encoder-decoder student; set it to transformers")
    if engine_spec(config, model).engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("config key sampler.engine: vllm is not installed; run make setup, or set it to transformers")
    check_teacher(config)
    if not {"valid", "test"} & set(splits_available(config)):
        raise UserError(
            f"config key data.path: {config.data.path} has no valid and no test split; accuracy is reported on one"
        )


def _open_run(config: ExperimentConfig, run: RunFolder) -> dict[str, Any] | None:
    """Check the run's folder against the config. Returns the result of a run that is complete, else None."""
    if not run.config.exists():
        if config.run.resume == "must":
            raise UserError(f"run.resume=must, but there is no run at {run.root}")
        return None
    if config.run.resume == "never":
        raise UserError(f"run {run.root} exists and run.resume=never; choose another run.name or remove the folder")
    before = ExperimentConfig.model_validate(yaml.safe_load(run.config.read_text(encoding="utf-8"))).identity()
    now = config.identity()
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if differing:
        shown = ", ".join(f"{key} ({before.get(key)} there, {now.get(key)} here)" for key in differing[:5])
        raise UserError(f"run {run.root} has another config: {shown}; choose another run.name or remove the folder")
    if run.result.exists():
        finished: dict[str, Any] = json.loads(run.result.read_text(encoding="utf-8"))
        return finished
    return None


# Ray and its actors


@contextmanager
def _ray(config: ExperimentConfig) -> Iterator[None]:
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(config.run.placement_timeout_s))
    # A trainer and a sampler share a laptop's cores: a thread that waits must sleep, not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with ray_session(max(sum(_cpus(config)) + DATA_CPUS, teacher_cpus(config)), config.run.verbose):
        yield


def _cpus(config: ExperimentConfig) -> tuple[float, float]:
    """Logical CPUs of all workers, and of all samplers."""
    return config.train.workers * config.train.cpus_per_worker, config.sampler.actors * config.sampler.cpus


@contextmanager
def _samplers(config: ExperimentConfig, run: RunFolder, model: str) -> Iterator[Any]:
    """The sampling service over its actors, all of them up. Closes the engines at the end."""
    _await_resources(config)
    spec = engine_spec(config, model)
    actor = ray.remote(Sampler).options(
        num_cpus=config.sampler.cpus, num_gpus=config.sampler.gpus, max_restarts=-1, max_task_retries=0
    )
    samplers = [actor.remote(config, run, model, spec) for _ in range(config.sampler.actors)]
    service = ray.remote(SamplingService).options(num_cpus=0, max_concurrency=1000).remote(config, run, samplers)
    try:
        ready, missing = ray.wait(
            [sampler.ready.remote() for sampler in samplers],
            num_returns=len(samplers),
            timeout=config.sampler.timeout_s,
        )
        if missing:
            raise UserError(
                f"{len(missing)} of {len(samplers)} samplers were not up after {config.sampler.timeout_s} s "
                f"(sampler.timeout_s); {describe_resources(config)}"
            )
        ray.get(ready)
        if config.negatives.source.startswith("fixed"):
            ray.get(service.publish.remote(FIXED, str(Path(config.negatives.checkpoint or "").absolute())))
        ray.get(service.start.remote())
        yield service
    finally:
        closing = [sampler.close.remote() for sampler in samplers]
        ray.wait(closing, num_returns=len(closing), timeout=20)
        for handle in (*samplers, service):
            ray.kill(handle)


def _await_resources(config: ExperimentConfig) -> None:
    """Wait until the cluster has what the run asks for (an autoscaler may bring it), or say what is missing."""
    workers, samplers = _cpus(config)
    wanted = {
        "CPU": workers + samplers + DATA_CPUS,
        "GPU": config.train.workers * config.train.gpus_per_worker + config.sampler.actors * config.sampler.gpus,
    }
    await_resources(wanted, config.run.placement_timeout_s, lambda: describe_resources(config))


def describe_resources(config: ExperimentConfig) -> str:
    """What the run asks for and what the cluster has, in one line."""
    train, sampler = config.train, config.sampler
    return (
        f"asked for {train.workers} workers of {train.cpus_per_worker:g} CPU and {train.gpus_per_worker:g} GPU, "
        f"{sampler.actors} samplers of {sampler.cpus:g} CPU and {sampler.gpus:g} GPU, and {DATA_CPUS:g} CPU for data; "
        f"{cluster_state()}"
    )


def _fit(config: ExperimentConfig, run: RunFolder, spec: WorkerSpec) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = config.train.gpus_per_worker > 0
    resources = {"CPU": config.train.cpus_per_worker}
    if gpu:
        resources["GPU"] = config.train.gpus_per_worker
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"spec": spec},
        scaling_config=ScalingConfig(num_workers=config.train.workers, use_gpu=gpu, resources_per_worker=resources),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=config.train.collective_timeout_s
        ),
        # Ray Train resumes silently under a name it knows; what is resumed here is decided by our own checkpoints.
        run_config=RunConfig(
            name=f"train-{uuid.uuid4().hex[:8]}",
            storage_path=str(run.root / ".ray_train"),
            failure_config=FailureConfig(max_failures=config.train.max_failures),
        ),
    )
    try:
        trainer.fit()
    finally:
        shutil.rmtree(run.root / ".ray_train", ignore_errors=True)


def _train_loop(settings: dict[str, Any]) -> None:
    train_worker(settings["spec"])


# Models


def student_source(config: ExperimentConfig, run: RunFolder) -> str:
    """Where workers and samplers load the untouched student from; a scratch one is built on the task's text."""
    model = config.student.model
    if model.startswith("embedded:"):
        from qcrd_ray.models.embedded import embedded_student

        return str(embedded_student(model.removeprefix("embedded:")))
    if model.startswith("scratch:"):
        from qcrd_ray.models.scratch import build_scratch

        folder = run.root / "scratch_student"
        if not folder.exists():
            build_scratch(model.removeprefix("scratch:"), task_texts(config, run), folder, config.train.seed)
        return str(folder)
    return model


def task_texts(config: ExperimentConfig, run: RunFolder, limit: int = 2000) -> Iterator[str]:
    """Questions, labels and rationales of the first rows of the training table."""
    from qcrd_ray.tasks import get_task
    from qcrd_ray.tasks.prompts import EXPLAIN, PREDICT

    task = get_task(config)
    for record in open_rationale_table(run.table("train")).slice(0, limit).to_pylist():
        text = task.student_input(record["question"], record["choices"])
        yield from (f"{PREDICT} {text}\n", f"{EXPLAIN} {text}\n", record["label"], *record["positives"])
        yield from record["negatives"]


def _uses_judge(config: ExperimentConfig) -> bool:
    return config.judge.enabled and config.is_contrastive


def _judge_source(config: ExperimentConfig, run: RunFolder) -> str | None:
    """The discriminator's first weights, written once so that every worker starts from the same."""
    if not _uses_judge(config):
        return None
    folder = run.root / "initial_judge"
    if not folder.exists():
        discriminator = build_discriminator(config.judge, seed=config.train.seed, texts=task_texts(config, run))
        discriminator.save(folder)
    return str(folder)


# Evaluation and result


@dataclass(frozen=True)
class Outcome:
    accuracy: dict[str, Any]
    snapshot: int
    examples: list[dict[str, Any]]


def _held_out(counts: Counts) -> list[str]:
    return [split for split in ("valid", "test") if split in counts.held_out]


def _reported_split(counts: Counts) -> str:
    return _held_out(counts)[-1]


def _evaluate(
    config: ExperimentConfig, run: RunFolder, counts: Counts, service: Any, before: dict[str, Any], examples_before: Any
) -> Outcome:
    """Keep the best student by valid, report on test; without a test split the last student on valid."""
    last = Schedule.of(config).iterations
    split = _reported_split(counts)
    chosen = last
    selected = "last"
    if split == "test" and "valid" in counts.held_out:
        ray.get(service.evaluate_and_keep_best.remote(last))
        best = ray.get(service.best_snapshot.remote())
        chosen, selected = int(best["snapshot"]), "best by valid"
    after = ray.get(service.evaluate.remote(chosen, split))
    first = ray.get(before[split])
    explained = ray.get(service.explain.remote(chosen, split, config.evaluation.examples))
    examples = [
        {**new, "rationale_before": old["rationale"], "label_before": old["label"]}
        for old, new in zip(ray.get(examples_before), explained, strict=True)
    ]
    with atomic_folder(run.student) as folder:
        shutil.copytree(run.snapshot(chosen), folder, dirs_exist_ok=True)
    if chosen != last:
        with atomic_folder(run.root / "last_student") as folder:
            shutil.copytree(run.snapshot(last), folder, dirs_exist_ok=True)
    accuracy = {
        "before": first["accuracy"],
        "after": after["accuracy"],
        "split": split,
        "n": after["n"],
        "student": selected,
        "step": min(chosen * config.train.iteration_steps, config.train.max_steps),
    }
    return Outcome(accuracy, chosen, examples)


def _result(
    config: ExperimentConfig,
    run: RunFolder,
    counts: Counts,
    outcome: Outcome,
    statistics: dict[str, Any],
    resumed_from: int,
    seconds: float,
) -> dict[str, Any]:
    progress = read_progress(run)
    assert progress is not None
    sampled = config.sampled_negatives > 0
    steps_seconds = max(progress.seconds, 1e-9)
    return {
        "job": "train",
        "name": config.run_name,
        "method": config.method,
        "task": config.task,
        "student": config.student.model,
        "steps": progress.step,
        "seconds": round(seconds, 1),
        "accuracy": outcome.accuracy,
        "train_tokens_per_second": round(progress.tokens / steps_seconds, 1),
        "negatives": {
            "requested": progress.negatives_requested,
            "used": progress.negatives_used,
            "empty": progress.negatives_empty,
            "lag_min": progress.lag_min,
            "lag_max": progress.lag_max,
            "active_fraction": progress.active / progress.with_negative if progress.with_negative else 0.0,
            "stall_seconds": round(progress.stall_seconds, 2),
            "stall_fraction": round(progress.stall_seconds / steps_seconds, 4),
            "warmup_seconds": round(progress.warmup_seconds, 2),
            "engine": engine_spec(config, "").engine if sampled else None,
            "sampler": statistics,
        },
        "judge": {
            "pretrained_steps": progress.judge_pretrained_steps,
            "updates": progress.judge_steps - progress.judge_pretrained_steps,
        },  # fmt: skip
        "cut": {"prompts": progress.cut_prompts, "targets": progress.cut_targets},
        "data": counts.model_dump(mode="json"),
        "examples": outcome.examples,
        "resumed_from_step": resumed_from,
        "run": str(run.root),
    }

"""What one training worker does, top to bottom."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.models.discriminator import Discriminator
from qcrd_ray.models.student import Student, load_student
from qcrd_ray.rationales.corruption import fill_negatives
from qcrd_ray.rationales.streaming import StepBatch, StreamSpec, stream_batches
from qcrd_ray.run_folder import RunFolder, append_json_line, atomic_folder, write_text_atomic
from qcrd_ray.sampling.lagged_student import NegativesClient
from qcrd_ray.sampling.schedule import Schedule
from qcrd_ray.seeding import stable_hash
from qcrd_ray.training.checkpoint import (
    Progress,
    checkpoint_folder,
    checkpoint_steps,
    read_progress,
    restore_optimizer,
    save_checkpoint,
)
from qcrd_ray.training.engine import TrainEngine, read_deepspeed_json
from qcrd_ray.training.judge import JudgedQuestion, OnlineJudge
from qcrd_ray.training.methods import Candidates, StepLosses, candidates, train_on_batch
from qcrd_ray.training.snapshots import publish_snapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSpec:
    """What every worker is started with.

    Attributes:
        model: where the untouched student is loaded from.
        judge: where the discriminator starts from, None without one.
        service: handle of the SamplingService.
    """

    config: ExperimentConfig
    run: RunFolder
    model: str
    judge: str | None
    service: Any


def train_worker(spec: WorkerSpec) -> None:
    """Train the student from the newest checkpoint, or from the start, to the last step."""
    config, run = spec.config, spec.run
    rank, world = dist.get_rank(), dist.get_world_size()
    _set_up_process(config)
    schedule = Schedule.of(config)

    progress = read_progress(run) or Progress(step=0)
    resumed = checkpoint_folder(run, progress.step) if progress.step else None
    torch.manual_seed(stable_hash(config.train.seed, "init"))
    student = load_student(str(resumed / "student") if resumed else spec.model, config.student, _dtype(config))
    engine = _student_engine(student, config)
    judge = _judge(spec, resumed)
    if resumed:
        restore_optimizer(resumed, engine, judge, progress)
    if rank == 0:
        _drop_metrics_from(run, progress.step)
        ray.get(spec.service.rewind.remote(progress.step))
    dist.barrier()
    if not resumed:
        _publish(spec, engine, student, 0)
        if judge:
            _pretrain(spec, judge, rank, world)

    client = NegativesClient(spec.service, config, student.tokenizer.end)
    stream = StreamSpec(str(run.table("train")), spec.model, config, rank, world)
    clock = _Clock(progress, config)
    for batch in stream_batches(stream, progress.step, config.train.max_steps):
        step, iteration = batch.step, schedule.iteration_of(batch.step)
        if schedule.starts_iteration(step):
            if step > 0 and _wants_snapshot(config, schedule, iteration):
                _publish(spec, engine, student, iteration)
            if rank == 0:
                spec.service.progress.remote(step, checkpoint_steps(run))
        clock.start()
        torch.manual_seed(stable_hash(config.train.seed, "dropout", step, rank))
        negatives = client.take(step, [row.id for row in batch.rows])
        clock.waited()
        found = candidates(config, batch.rows, negatives)

        lr = learning_rate(config, step)
        losses = train_on_batch(engine, config, batch, found, judge)
        gradient_norm = engine.step(lr)
        judged = _update_judge(config, schedule, judge, step, found)

        record, progress = clock.account(progress, batch, losses, client, judge, negatives)
        record |= {"step": step, "iteration": iteration, "epoch": batch.epoch, "lr": lr, "gradient_norm": gradient_norm}
        record |= judged
        if rank == 0:
            _log(config, run, record, step)
        done = step + 1
        if done % config.train.checkpoint_interval == 0 or done == config.train.max_steps:
            save_checkpoint(run, engine, student, judge, progress, config.train.checkpoints_kept)

    _publish(spec, engine, student, schedule.iterations)
    if judge and rank == 0:
        with atomic_folder(run.judge) as folder:
            judge.discriminator.save(folder)
    dist.barrier()


def learning_rate(config: ExperimentConfig, step: int) -> float:
    """Linear warm-up, then linear decay to 0 at `train.max_steps`."""
    warmup, steps = config.optim.warmup_steps, config.train.max_steps
    if step < warmup:
        return config.optim.lr * (step + 1) / warmup
    return config.optim.lr * (steps - step) / max(1, steps - warmup)


def _drop_metrics_from(run: RunFolder, step: int) -> None:
    """Metrics of steps that will be done again, and a line that a kill cut short, go."""
    if run.metrics.exists():
        lines = run.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if step and line.endswith("\n") and json.loads(line).get("step", -1) < step]
        write_text_atomic(run.metrics, "".join(kept))


def _set_up_process(config: ExperimentConfig) -> None:
    threads = config.train.threads or max(1, (os.cpu_count() or 1) // config.train.workers)
    torch.set_num_threads(threads)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def _dtype(config: ExperimentConfig) -> torch.dtype:
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def _student_engine(student: Student, config: ExperimentConfig) -> TrainEngine:
    return TrainEngine(
        student,
        lr=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        clip=config.optim.clip,
        zero_stage=config.train.zero_stage,
        precision=config.train.precision,
        overrides=read_deepspeed_json(config.train, config.optim.clip),
    )


def _judge(spec: WorkerSpec, resumed: Path | None) -> OnlineJudge | None:
    if spec.judge is None:
        return None
    torch.manual_seed(stable_hash(spec.config.train.seed, "judge"))
    if resumed:
        return OnlineJudge(Discriminator.load(resumed / "judge"), spec.config)
    return OnlineJudge(Discriminator.load(Path(spec.judge)), spec.config)


def _pretrain(spec: WorkerSpec, judge: OnlineJudge, rank: int, world: int) -> None:
    begin = time.perf_counter()
    torch.manual_seed(stable_hash(spec.config.train.seed, "pretrain", rank))
    update = judge.pretrain(spec.run.table("train"), spec.model, rank, world)
    if rank == 0 and update:
        record = {
            "judge_pretrained_steps": judge.pretrained_steps,
            "judge_pretrain_loss": update.loss,
            "judge_pretrain_positive_score": update.positive_score,
            "judge_pretrain_negative_score": update.negative_score,
            "seconds": time.perf_counter() - begin,
        }
        append_json_line(spec.run.metrics, record)
        logger.info(
            "judge pretrained for %d steps: mean score %.2f of positives, %.2f of negatives",
            judge.pretrained_steps,
            update.positive_score,
            update.negative_score,
        )


def _is_evaluated(config: ExperimentConfig, iteration: int) -> bool:
    """Whether an evaluation falls due between the start of the iteration before and that of this one."""
    interval, steps = config.train.eval_interval, config.train.iteration_steps
    return interval > 0 and iteration > 0 and iteration * steps // interval > (iteration - 1) * steps // interval


def _wants_snapshot(config: ExperimentConfig, schedule: Schedule, iteration: int) -> bool:
    """Whether an iteration to come samples from θ_`iteration`, or it is to be evaluated."""
    return _is_evaluated(config, iteration) or (config.sampled_negatives > 0 and schedule.is_needed(iteration))


def _publish(spec: WorkerSpec, engine: TrainEngine, student: Student, number: int) -> None:
    """Write θ_`number` and tell the service, which also evaluates it where the config says so. A collective."""
    folder = publish_snapshot(spec.run, number, engine, student)
    if folder is None:
        return
    ray.get(spec.service.publish.remote(number, folder))
    if number < Schedule.of(spec.config).iterations and _is_evaluated(spec.config, number):
        spec.service.evaluate_and_keep_best.remote(number)


def _update_judge(
    config: ExperimentConfig, schedule: Schedule, judge: OnlineJudge | None, step: int, found: list[Candidates]
) -> dict[str, float]:
    """L_D of equation (8): at the first step of every `update_interval`-th iteration, on the batch's own rationales."""
    iteration = schedule.iteration_of(step)
    if judge is None or not schedule.starts_iteration(step) or iteration % config.judge.update_interval:
        return {}
    rows = []
    for c in found:
        negatives = [text for ids, text in zip(c.negatives, c.negative_texts, strict=True) if ids]
        if not negatives:
            seed = (config.train.seed, "online", step, c.row.id)
            negatives = fill_negatives(c.positive_texts, [], c.row.question, len(c.positive_texts), seed)
        rows.append(JudgedQuestion(c.row.question, c.positive_texts, negatives))
    torch.manual_seed(stable_hash(config.train.seed, "judge", step, dist.get_rank()))
    update = judge.update(rows, judge.learning_rate(iteration))
    alpha = judge.alpha(iteration)
    return {
        "judge_loss": update.loss,
        "judge_loss_weighted": alpha * update.loss,
        "judge_positive_score": update.positive_score,
        "judge_negative_score": update.negative_score,
    }


class _Clock:
    """Counts a worker's steps and sums them over ranks."""

    def __init__(self, progress: Progress, config: ExperimentConfig) -> None:
        self.config = config
        self.begin = time.perf_counter()
        self.base = progress
        self.step_begin = self.begin

    def start(self) -> None:
        self.step_begin = time.perf_counter()
        self.take_seconds = 0.0

    def waited(self) -> None:
        self.take_seconds = time.perf_counter() - self.step_begin

    def account(
        self,
        progress: Progress,
        batch: StepBatch,
        losses: StepLosses,
        client: NegativesClient,
        judge: OnlineJudge | None,
        negatives: list[list[Any]],
    ) -> tuple[dict[str, Any], Progress]:
        """The step's line of metrics (means over the global batch), and the run's progress after it."""
        lags = [negative.lag for row in negatives for negative in row if negative.lag is not None]
        cuts = [sum(row.cut_prompts for row in batch.rows), sum(row.cut_targets for row in batch.rows)]
        extremes = torch.tensor([-min(lags, default=10**9), max(lags, default=-1), client.stall_seconds,
                                 client.warmup_seconds or 0.0], dtype=torch.float64)  # fmt: skip
        sums = torch.tensor([*losses.vector(), *cuts, sum(map(len, negatives))], dtype=torch.float64)
        if dist.get_world_size() > 1:
            dist.all_reduce(sums)
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        names = [f.name for f in dataclasses.fields(StepLosses)]
        total = dict(zip(names, sums.tolist(), strict=False))
        cut_prompts, cut_targets, requested = sums.tolist()[len(names) :]
        lag_min, lag_max = int(-extremes[0]), int(extremes[1])
        known = lag_max >= 0
        questions = batch.global_size
        seconds = time.perf_counter() - self.step_begin
        after = dataclasses.replace(
            progress,
            step=batch.step + 1,
            tokens=progress.tokens + int(total["tokens"]),
            seconds=self.base.seconds + time.perf_counter() - self.begin,
            negatives_used=progress.negatives_used + int(total["negatives_used"]),
            negatives_requested=progress.negatives_requested + int(requested),
            negatives_empty=progress.negatives_empty + int(total["negatives_empty"]),
            active=progress.active + int(total["active"]),
            with_negative=progress.with_negative + int(total["with_negative"]),
            stall_seconds=self.base.stall_seconds + float(extremes[2]),
            warmup_seconds=self.base.warmup_seconds + float(extremes[3]),
            cut_prompts=progress.cut_prompts + int(cut_prompts),
            cut_targets=progress.cut_targets + int(cut_targets),
            judge_steps=judge.steps if judge else 0,
            judge_pretrained_steps=judge.pretrained_steps if judge else 0,
            lag_min=_least(progress.lag_min, lag_min) if known else progress.lag_min,
            lag_max=max(progress.lag_max or 0, lag_max) if known else progress.lag_max,
        )
        record = {
            "loss": total["total"] / questions,
            "loss_label": total["label"] / questions,
            "loss_positive": total["positive"] / questions,
            "loss_negative": total["negative"] / questions,
            "active_fraction": _ratio(total["active"], total["with_negative"]),
            "score_positive": _ratio(total["positive_score"], total["scored_positive"]),
            "score_negative": _ratio(total["negative_score"], total["scored_negative"]),
            "tokens": int(total["tokens"]),
            "passes": int(total["passes"]),
            "negatives": int(total["negatives_used"]),
            "lag": lag_max if known else None,
            "wait_seconds": round(self.take_seconds, 4),
            "seconds": round(seconds, 4),
        }
        return record, after


def _least(a: int | None, b: int) -> int:
    return b if a is None else min(a, b)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _log(config: ExperimentConfig, run: RunFolder, record: dict[str, Any], step: int) -> None:
    """One line of metrics a step, and every `log_interval` steps one for a person."""
    clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in record.items()}
    append_json_line(run.metrics, clean)
    done, steps = step + 1, config.train.max_steps
    if done % config.train.log_interval == 0 or done == steps or step == 0:
        logger.info(json.dumps(clean))

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
from qcrd_ray.errors import UserError, find_user_error
from qcrd_ray.models.discriminator import Discriminator
from qcrd_ray.models.named import local_model
from qcrd_ray.models.student import Student
from qcrd_ray.rationales.corruption import fill_negatives
from qcrd_ray.rationales.streaming import StepBatch, StreamSpec, stream_batches
from qcrd_ray.rationales.tables import open_rationale_table
from qcrd_ray.run_folder import INITIAL_JUDGE, JUDGE, Metrics, RunFolder
from qcrd_ray.run_lock import check_attempt
from qcrd_ray.sampling.negatives import NegativesClient
from qcrd_ray.sampling.schedule import Schedule
from qcrd_ray.seeding import stable_hash
from qcrd_ray.training import judge_store
from qcrd_ray.training.checkpoint import (
    Progress,
    build_student,
    checkpoint_name,
    checkpoint_steps,
    newest_progress,
    restore_optimizer,
    save_checkpoint,
)
from qcrd_ray.training.engine import TrainEngine, read_deepspeed_json
from qcrd_ray.training.judge import JudgedQuestion, OnlineJudge
from qcrd_ray.training.kept_choices import KeptChoices
from qcrd_ray.training.methods import Candidates
from qcrd_ray.training.prometheus import TrainingExporter
from qcrd_ray.training.snapshots import SnapshotPublisher
from qcrd_ray.training.step import StepLosses, candidates, train_on_batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSpec:
    """What every worker is started with.

    Attributes:
        service: handle of the SamplingService.
        token: of the driver that has the run.
        judged: whether a discriminator weighs the rationales.
    """

    config: ExperimentConfig
    run: RunFolder
    service: Any
    token: str
    judged: bool


def train_worker(spec: WorkerSpec) -> None:
    """Train the student from the newest checkpoint, or from the start, to the last step, or to where it is stopped.

    Raises:
        UserError: what only the user can mend.
    """
    try:
        _train(spec)
    except Exception as error:
        told = find_user_error(error)
        if told is None:
            raise
        raise UserError(str(told)) from None  # plain: it goes through two processes


def _train(spec: WorkerSpec) -> None:
    config, run = spec.config, spec.run
    rank, world = dist.get_rank(), dist.get_world_size()
    _set_up_process(config)
    schedule = Schedule.of(config)
    model = local_model(run, config.student.model)

    progress = newest_progress(run) or Progress(step=0)
    batches = stream_batches(StreamSpec(run, config, rank, world), progress.step, config.train.max_steps)
    resumed = run.get_folder(checkpoint_name(progress.step), check=False) if progress.step else None
    torch.manual_seed(stable_hash(config.train.seed, "init"))
    student = build_student(model, config.student, _dtype(config), resumed)
    engine = _student_engine(student, config)
    judge = _judge(spec, resumed)
    choices = _kept_choices(spec, resumed)
    if resumed:
        restore_optimizer(resumed, engine, judge, progress)
    metrics = Metrics(run)
    if rank == 0:
        attempt = ray.get(spec.service.rewind.remote(progress.step))
        metrics.begin(progress.step)
    dist.barrier()

    def fence() -> None:
        """Of rank 0, before it writes what others build on."""
        check_attempt(run, spec.token, attempt)

    publisher = SnapshotPublisher(run, config, engine, student, model, fence)
    if not resumed:
        _publish(spec, publisher, 0)
        if judge:
            _pretrain(spec, judge, metrics, rank)

    ray.get(spec.service.until_up.remote())  # what their start takes is no stall, and no step that a stop waits for
    checkpoints = checkpoint_steps(run) if rank == 0 else []
    stop = spec.service.until_stop.remote() if rank == 0 else None
    client = NegativesClient(spec.service, run, config, student.tokenizer.end)
    clock = _Clock(progress, config, publisher)
    exported = TrainingExporter(config, progress) if rank == 0 else None
    for batch in batches:
        step, iteration = batch.step, schedule.iteration_of(batch.step)
        clock.start()
        if schedule.starts_iteration(step):
            if step > 0 and _wants_snapshot(config, schedule, iteration):
                _publish(spec, publisher, iteration)
            if rank == 0:
                fence()
                spec.service.progress.remote(step, checkpoints)
        torch.manual_seed(stable_hash(config.train.seed, "dropout", step, rank))
        clock.waits()
        negatives = client.take(step, [row.id for row in batch.rows])
        clock.waited()
        found = candidates(config, batch.rows, negatives)

        lr = learning_rate(config, step)
        losses = train_on_batch(engine, config, batch, found, judge, choices)
        gradient_norm = engine.step(lr)
        judged = _update_judge(config, schedule, judge, step, found)

        asked = stop is not None and _is_ready(stop)
        record, progress, stopped = clock.account(progress, batch, losses, client, judge, negatives, asked)
        record |= {"step": step, "iteration": iteration, "epoch": batch.epoch, "lr": lr, "gradient_norm": gradient_norm}
        record |= judged
        if rank == 0:
            _log(config, metrics, record, step)
        if exported:
            exported.step(record, progress)
        done = step + 1
        if stopped or done % config.train.checkpoint_interval == 0 or done == config.train.max_steps:
            # What a resume samples from must be there before the checkpoint is.
            publisher.wait()
            metrics.flush()
            begin = time.perf_counter()
            keep = config.train.checkpoints_kept
            checkpoints = save_checkpoint(run, engine, student, judge, progress, keep, fence, choices)
            seconds = time.perf_counter() - begin
            clock.checkpoint_seconds += seconds
            if exported:
                exported.checkpoint(seconds)
        if stopped and done < config.train.max_steps:
            return

    _publish(spec, publisher, schedule.iterations)
    publisher.wait()
    if judge and rank == 0:
        run.write_folder(JUDGE, judge.discriminator.save)
    dist.barrier()


def _is_ready(reference: Any) -> bool:
    """Whether a reference is ready. Raises what it failed with."""
    if not ray.wait([reference], timeout=0)[0]:
        return False
    ray.get(reference)
    return True


def learning_rate(config: ExperimentConfig, step: int) -> float:
    """Linear warm-up, then linear decay to 0 at `train.max_steps`."""
    warmup, steps = config.optim.warmup_steps, config.train.max_steps
    if step < warmup:
        return config.optim.lr * (step + 1) / warmup
    return config.optim.lr * (steps - step) / max(1, steps - warmup)


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
    if not spec.judged:
        return None
    torch.manual_seed(stable_hash(spec.config.train.seed, "judge"))
    source = resumed / "judge" if resumed else spec.run.get_folder(INITIAL_JUDGE)
    return OnlineJudge(Discriminator.load(source), spec.config)


def _kept_choices(spec: WorkerSpec, resumed: Path | None) -> KeptChoices | None:
    config = spec.config
    if not config.keeps_choices:
        return None
    found = KeptChoices(config.train.choice_interval, open_rationale_table(spec.run.table("train")).num_rows)
    if resumed:
        found.restore(resumed)
    return found


def _pretrain(spec: WorkerSpec, judge: OnlineJudge, metrics: Metrics, rank: int) -> None:
    begin = time.perf_counter()
    config = spec.config
    torch.manual_seed(stable_hash(config.train.seed, "pretrain", rank))
    update = judge_store.pretrain(judge, config, spec.run)
    if rank == 0 and update:
        record = {
            "judge_pretrained_steps": judge.pretrained_steps,
            "judge_reused": judge.reused,
            "judge_pretrain_loss": update.loss,
            "judge_pretrain_positive_score": update.positive_score,
            "judge_pretrain_negative_score": update.negative_score,
            "judge_scores_alike": update.scores_alike,
            "seconds": time.perf_counter() - begin,
        }
        metrics.add(_finite(record))


def _wants_snapshot(config: ExperimentConfig, schedule: Schedule, iteration: int) -> bool:
    """Whether an iteration to come samples from θ_`iteration`, or it is to be evaluated."""
    return schedule.is_evaluated(iteration) or (config.sampled_negatives > 0 and schedule.is_needed(iteration))


def _publish(spec: WorkerSpec, publisher: SnapshotPublisher, number: int) -> None:
    """Have θ_`number` written and the service told, which also evaluates it where the config says so. A collective."""
    config = spec.config
    evaluate = Schedule.of(config).is_evaluated(number)
    step = min(number * config.train.iteration_steps, config.train.max_steps)

    def announce(number: int, folder: str, digest: str) -> None:
        ray.get(spec.service.publish.remote(number, folder, digest, evaluate))

    publisher.publish(number, step, announce)


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

    def __init__(self, progress: Progress, config: ExperimentConfig, publisher: SnapshotPublisher) -> None:
        self.config = config
        self.publisher = publisher
        self.checkpoint_seconds = 0.0
        self.begin = time.perf_counter()
        self.base = progress
        self.step_begin = self.begin

    def start(self) -> None:
        self.step_begin = time.perf_counter()
        self.published = self.publisher.seconds

    def waits(self) -> None:
        self.wait_begin = time.perf_counter()

    def waited(self) -> None:
        self.take_seconds = time.perf_counter() - self.wait_begin

    def account(
        self,
        progress: Progress,
        batch: StepBatch,
        losses: StepLosses,
        client: NegativesClient,
        judge: OnlineJudge | None,
        negatives: list[list[Any]],
        asked: bool,
    ) -> tuple[dict[str, Any], Progress, bool]:
        """The step's line of metrics (means over the global batch), the run's progress after it, and whether it ends.

        Args:
            asked: this rank knows that the run is asked to end. All ranks end at the same step.
        """
        lags = [negative.lag for row in negatives for negative in row if negative.lag is not None]
        cuts = [sum(row.cut_prompts for row in batch.rows), sum(row.cut_targets for row in batch.rows)]
        extremes = torch.tensor([-min(lags, default=10**9), max(lags, default=-1), client.stall_seconds,
                                 client.warmup_seconds or 0.0, self.publisher.seconds, self.checkpoint_seconds,
                                 float(asked)], dtype=torch.float64)  # fmt: skip
        rank, world = dist.get_rank(), dist.get_world_size()
        rows = [0] * batch.global_size
        rows[rank::world] = [row.row for row in batch.rows]
        sums = torch.tensor([*losses.vector(), *cuts, sum(map(len, negatives)), *rows], dtype=torch.float64)
        if world > 1:
            dist.all_reduce(sums)
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        names = [f.name for f in dataclasses.fields(StepLosses)]
        total = dict(zip(names, sums.tolist(), strict=False))
        cut_prompts, cut_targets, requested, *trained = sums.tolist()[len(names) :]
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
            snapshots=self.base.snapshots + self.publisher.count,
            publish_seconds=self.base.publish_seconds + float(extremes[4]),
            checkpoint_seconds=self.base.checkpoint_seconds + float(extremes[5]),
            cut_prompts=progress.cut_prompts + int(cut_prompts),
            cut_targets=progress.cut_targets + int(cut_targets),
            judge_steps=judge.steps if judge else 0,
            judge_pretrained_steps=judge.pretrained_steps if judge else 0,
            judge_reused=judge.reused if judge else False,
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
            "rows": [int(row) for row in trained],
            "negatives": int(total["negatives_used"]),
            "lag": lag_max if known else None,
            "wait_seconds": round(self.take_seconds, 4),
            "publish_seconds": round(self.publisher.seconds - self.published, 4),
            "seconds": round(seconds, 4),
        }
        if self.config.keeps_choices:
            record["choices_kept"] = int(total["choices_kept"])
        if self.config.couples_tasks:
            record["loss_mutual_information"] = total["mutual_information"] / questions
        return record, after, bool(extremes[6])


def _least(a: int | None, b: int) -> int:
    return b if a is None else min(a, b)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """With null for what is no number: JSON has no NaN."""
    return {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in record.items()}


def _log(config: ExperimentConfig, metrics: Metrics, record: dict[str, Any], step: int) -> None:
    """One line of metrics a step, and every `log_interval` steps one for a person."""
    clean = _finite(record)
    metrics.add(clean)
    done, steps = step + 1, config.train.max_steps
    if done % config.train.log_interval == 0 or done == steps or step == 0:
        logger.info(json.dumps(clean))

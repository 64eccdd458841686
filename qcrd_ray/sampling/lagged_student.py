"""The lagged student: negatives of every iteration from exactly the snapshot that the schedule names, sampled ahead.

`SamplingService` is the one actor that knows what is published, wanted and ready. It hands chunks of work to free
samplers (pool.py), in the order of the iterations, and never touches a token itself; training workers fetch from it
(negatives.py). What a dead sampler had is asked again; what nobody can mend ends the run with one line.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError, find_user_error, last_line
from qcrd_ray.prometheus import (
    CHUNKS_READY,
    SAMPLER_BUSY_SECONDS,
    SAMPLER_LOAD_SECONDS,
    SAMPLER_QUEUE_DEPTH,
    SAMPLER_RESTARTS,
    SAMPLER_TOKENS,
    SAMPLERS_UP,
    SNAPSHOT_AGE_SECONDS,
    Exporter,
)
from qcrd_ray.rationales.tables import open_rationale_table
from qcrd_ray.run_folder import (
    EVALUATIONS,
    FIXED_STUDENT,
    NEGATIVES,
    DamagedFolder,
    RunFolder,
)
from qcrd_ray.run_lock import begin_attempt
from qcrd_ray.sampling.evaluations import Entry, Evaluations
from qcrd_ray.sampling.negatives import negatives_file, read_negatives
from qcrd_ray.sampling.predictions import Prediction
from qcrd_ray.sampling.schedule import FIXED, Chunk, Schedule
from qcrd_ray.sampling.snapshot import Snapshot

logger = logging.getLogger(__name__)

EVALUATED_TOGETHER = 128
ATTEMPTS = 5
"""Failures of one piece of work after which the run ends."""


@dataclass(order=True)
class Job:
    """A piece of work for one sampler. Lower priorities come first.

    Attributes:
        kind: "sample", "predict", "explain" or "observe".
        what: a Chunk, or the arguments of the sampler's method before the snapshot.
        future: gets the result of what is not "sample".
        generation: of the training that asked; work of an earlier one is dropped.
    """

    priority: float
    number: int
    kind: str = field(compare=False)
    snapshot: Snapshot = field(compare=False)
    what: Any = field(compare=False)
    future: asyncio.Future[Any] | None = field(compare=False)
    generation: int = field(compare=False)
    failures: int = field(default=0, compare=False)


class SamplingService:
    """Knows which snapshots are published, what they owe to which iteration, and what lies ready. A Ray actor."""

    def __init__(self, config: ExperimentConfig, run: RunFolder, samplers: Sequence[Any], token: str = "") -> None:
        """
        Args:
            token: of the driver that has the run.
        """
        self.config = config
        self.run = run
        self.token = token
        self.schedule = Schedule.of(config)
        self.samplers = samplers
        self.published: dict[int, Snapshot] = {}
        self.step = 0
        self.generation = 0
        self.queue: list[Job] = []
        self.numbers = itertools.count()
        self.work = asyncio.Condition()
        self.enqueued: set[int] = set()
        self.asked: set[Chunk] = set()
        self.written: set[str] = set()
        self.tables: dict[Chunk, Any] = {}
        self.waiting: dict[Chunk, asyncio.Event] = defaultdict(asyncio.Event)
        self.running: list[Job] = []
        self.evaluations = Evaluations(config, run, self._predict)
        self.failure: str | None = None
        self.stopping = asyncio.Event()
        self.stepping = False
        self.up: set[int] = set()
        self.began: set[int] = set()
        self.all_began = asyncio.Event()
        self.tokens = 0
        self.sampled = 0
        self.reused = 0
        self.busy_seconds = 0.0
        self.load_seconds = 0.0
        self.restarts = 0
        self.starts: list[int] = []
        self.published_at: float | None = None
        self.exporter = Exporter(config.run_name)
        self.tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Begin to hand out work."""
        if not self.tasks:
            await self.evaluations.read()
            for index in range(len(self.samplers)):
                self._spawn(self._serve(index))
            self._spawn(self._watch())
            self._spawn(self._export_each_second())

    async def until_up(self) -> None:
        """Return once every sampler has been up.

        Raises:
            UserError: one could not be started, or was not up within `sampler.timeout_s`.
        """
        seconds = self.config.sampler.timeout_s
        try:
            await asyncio.wait_for(self.all_began.wait(), seconds)
        except TimeoutError:
            missing = len(self.samplers) - len(self.began)
            raise UserError(
                f"{missing} of {len(self.samplers)} samplers were not up after {seconds} s (sampler.timeout_s)"
            ) from None
        if self.failure is not None:
            raise UserError(self.failure)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    # What is published

    async def rewind(self, step: int) -> int:
        """Training starts (again) at `step`: forget every snapshot taken after it, and all that came from them.

        Returns:
            The number of this attempt, which its workers hold against `attempt.json`.

        Raises:
            UserError: a snapshot that training will need is damaged or gone.
        """
        self.generation += 1
        self.stepping = False
        self.starts.append(step)
        self.step = step
        self.enqueued.clear()
        self.asked.clear()
        self.tables.clear()
        self.published = {n: s for n, s in self.published.items() if n == FIXED}
        self.evaluations.rewind(step)
        self._drop_jobs()
        found = await asyncio.to_thread(self._rewind_storage, step)
        self.published.update(found)
        self.evaluations.begin_what_is_due(self.published)
        self._refill()
        return self.generation

    def _rewind_storage(self, step: int) -> dict[int, Snapshot]:
        """Remove what training will make again; give back the snapshots that stay."""
        begin_attempt(self.run, self.token, self.generation)
        self.run.remove_leftovers()
        last = step // self.config.train.iteration_steps
        found = {}
        for number in self.run.snapshot_numbers():
            if number * self.config.train.iteration_steps > step:
                self.run.remove(self.run.snapshot(number))
            else:
                found[number] = Snapshot.of(self.run, number, self.run.snapshot(number))
        if step and self.config.sampled_negatives and self.schedule.lag is not None:
            for iteration in range(self.schedule.iteration_of(step), self.schedule.iterations):
                number = self.schedule.snapshot_for(iteration)
                # θ_t of a checkpoint at the start of iteration t is taken there, if it is not there yet.
                if number not in found and number * self.config.train.iteration_steps < step:
                    raise DamagedFolder(
                        f"snapshot {self.run.where(self.run.snapshot(number))}: not there, or not complete; iteration "
                        f"{iteration} takes its negatives from it: remove the checkpoints after step "
                        f"{number * self.config.train.iteration_steps} to have it made again"
                    )
        for name in self.run.list(EVALUATIONS):
            stem, _, kind = name.partition(".")
            if kind == "jsonl" and int(stem.rsplit("-", 1)[1]) > last:
                self.run.remove(f"{EVALUATIONS}/{name}")
        self.written = set(self.run.list(NEGATIVES))
        for iteration in range(self.schedule.iterations):
            if self.schedule.snapshot_for(iteration) > last:
                for chunk in self.schedule.chunks(iteration):
                    if chunk.file_name in self.written:
                        self.run.remove(negatives_file(chunk))
                        self.written.discard(chunk.file_name)
        return found

    def _drop_jobs(self) -> None:
        """Sampling is asked anew; an evaluation goes on if its snapshot stays."""
        kept = []
        for job in self.queue:
            gone = job.snapshot.number * self.config.train.iteration_steps > self.step
            if job.kind != "sample" and not gone:
                kept.append(job)
            elif job.future is not None:
                job.future.cancel()
        self.queue = kept
        heapq.heapify(self.queue)

    async def publish(self, number: int, folder: str, digest: str, evaluate: bool = False) -> None:
        """Snapshot θ_`number` is complete in the storage; with `evaluate`, score it on the split that selects."""
        self.published[number] = Snapshot(number, folder, digest)
        self.published_at = time.monotonic()
        if evaluate:
            self.evaluations.begin(number)
        self._refill()

    async def progress(self, step: int, checkpoints: list[int]) -> None:
        """Training is at `step` and could resume from any of `checkpoints` (steps). Drops what none of them needs."""
        self.step = step
        for chunk in [c for c in self.tables if c.last <= step - self.config.train.iteration_steps]:
            del self.tables[chunk]
            self.waiting.pop(chunk, None)
        self._refill()
        if self.config.train.keep_snapshots:
            return
        now = self.schedule.iteration_of(step)
        resumable = [self.schedule.iteration_of(checkpoint) for checkpoint in checkpoints]
        busy = {job.snapshot.number for job in (*self.queue, *self.running)} | self.evaluations.snapshots_under_way()
        best = self.evaluations.best()
        for number, snapshot in list(self.published.items()):
            needed = number <= 0 or number >= self.schedule.snapshot_for(now) or number in busy
            # A resume publishes what comes after its checkpoint anew; what it samples from before that must be there.
            needed = needed or any(self.schedule.snapshot_for(i) <= number <= i for i in resumable)
            if not needed and not (best and best["snapshot"] == number):
                del self.published[number]
                self._spawn(self._remove(snapshot))

    async def _remove(self, snapshot: Snapshot) -> None:
        try:
            await asyncio.to_thread(self.run.remove, snapshot.folder)
        except UserError as error:
            logger.warning("an old snapshot could not be removed: %s", error)

    def _refill(self) -> None:
        """Queue the chunks of every iteration whose snapshot is out and that is near enough."""
        if self.config.sampled_negatives and self.config.sampler.ahead_iterations:
            now = self.schedule.iteration_of(self.step)
            last = min(self.schedule.iterations, now + self.config.sampler.ahead_iterations)
            for iteration in range(now, last):
                snapshot = self.published.get(self.schedule.snapshot_for(iteration))
                if snapshot is None or iteration in self.enqueued:
                    continue
                self.enqueued.add(iteration)
                for chunk in self.schedule.chunks(iteration):
                    if chunk.last > self.step:
                        self._push(iteration, "sample", snapshot, chunk)

    def _push(self, priority: float, kind: str, snapshot: Snapshot, what: Any) -> asyncio.Future[Any] | None:
        future = None if kind == "sample" else asyncio.get_running_loop().create_future()
        heapq.heappush(self.queue, Job(priority, next(self.numbers), kind, snapshot, what, future, self.generation))
        self._wake()
        return future

    def _wake(self) -> None:
        async def notify() -> None:
            async with self.work:
                self.work.notify_all()

        self._spawn(notify())

    # Samplers at work

    async def _serve(self, index: int) -> None:
        """Give one sampler one piece of work after the other."""
        while self.failure is None:
            await self._until_up(index)
            async with self.work:
                await self.work.wait_for(lambda: self.queue or self.failure)
            if self.failure or not self.queue:  # another sampler was faster
                continue
            job = heapq.heappop(self.queue)
            self.running.append(job)
            try:
                await asyncio.wait_for(self._do(index, job), self.config.sampler.timeout_s)
            except Exception as error:  # a dead actor, a failed engine, a full disk: asked again, then said
                self.up.discard(index)
                self._failed(index, job, error)
            finally:
                self.running.remove(job)

    async def _until_up(self, index: int) -> None:
        """Return once the sampler answers. Others go on meanwhile with what it leaves."""
        said = False
        while index not in self.up and self.failure is None:
            try:
                await asyncio.wait_for(self.samplers[index].ready.remote(), self.config.sampler.timeout_s)
                self.up.add(index)
                self.began.add(index)
                if len(self.began) == len(self.samplers):
                    self.all_began.set()
            except TimeoutError:
                continue
            except Exception as error:
                if (told := find_user_error(error)) is not None:
                    self._fail(str(told))
                    return
                if getattr(error, "actor_init_failed", False) and index not in self.began:
                    self._fail(f"a sampler could not be started: {last_line(error)}")
                    return
                if not said:
                    logger.warning("sampler %d is not up: %s", index, last_line(error))
                said = True
                await asyncio.sleep(1.0)

    async def _watch(self) -> None:
        """End the run where no sampler has been up for `sampler.timeout_s`, though there is work."""
        since: float | None = None
        while self.failure is None:
            await asyncio.sleep(1.0)
            if self.up or not self.queue:
                since = None
                continue
            since = since or time.monotonic()
            if time.monotonic() - since > self.config.sampler.timeout_s:
                self._fail(
                    f"none of {len(self.samplers)} samplers has been up for {self.config.sampler.timeout_s} s "
                    "(sampler.timeout_s); start again once the cluster has room for one"
                )

    async def _export_each_second(self) -> None:
        """Give what Prometheus sees its values."""
        while self.failure is None:
            await asyncio.sleep(1.0)
            self.exporter.set(SAMPLER_QUEUE_DEPTH, len(self.queue))
            self.exporter.set(SAMPLERS_UP, len(self.up))
            self.exporter.set(CHUNKS_READY, sum(chunk.last > self.step for chunk in self.tables))
            if self.published_at is not None:
                self.exporter.set(SNAPSHOT_AGE_SECONDS, time.monotonic() - self.published_at)

    def _failed(self, index: int, job: Job, error: Exception) -> None:
        sampler = self.samplers[index]
        told = find_user_error(error)
        if told is not None:
            self._fail(str(told))
            return
        died = isinstance(error, ray.exceptions.RayActorError)
        reason = "no answer" if isinstance(error, TimeoutError) else last_line(error)
        self.restarts += 1
        self.exporter.add(SAMPLER_RESTARTS, 1, sampler=str(index))
        job.failures += 1
        logger.warning("a sampler failed (%d of %d) at %s: %s", job.failures, ATTEMPTS, job.kind, reason)
        if not died and isinstance(sampler, ray.actor.ActorHandle):
            ray.kill(sampler, no_restart=False)  # an engine that failed is not asked again: a fresh one takes its place
        if job.failures >= ATTEMPTS:
            self._fail(f"a sampler failed {ATTEMPTS} times at the same work, last with: {reason}")
            return
        heapq.heappush(self.queue, job)
        self._wake()

    async def _do(self, index: int, job: Job) -> None:
        if job.kind == "sample":
            await self._sample(index, job)
            return
        assert job.future is not None
        if not job.future.done():
            result = await getattr(self.samplers[index], job.kind).remote(*job.what, job.snapshot)
            if not job.future.done():
                job.future.set_result(result)

    async def _sample(self, index: int, job: Job) -> None:
        chunk: Chunk = job.what
        if job.generation != self.generation:
            return
        table: Any = None
        if chunk.file_name in self.written:
            found = await asyncio.to_thread(read_negatives, self.run, chunk, job.snapshot)
            table = ray.put(found) if found is not None else None
            self.reused += table is not None
        if table is None:
            stats_ref, table = self.samplers[index].sample.options(num_returns=2).remote(chunk, job.snapshot)
            stats = await stats_ref
            self.tokens += stats["tokens"]
            self.busy_seconds += stats["seconds"]
            self.load_seconds += stats["load_seconds"]
            self.exporter.add(SAMPLER_TOKENS, stats["tokens"], sampler=str(index))
            self.exporter.add(SAMPLER_BUSY_SECONDS, stats["seconds"], sampler=str(index))
            self.exporter.add(SAMPLER_LOAD_SECONDS, stats["load_seconds"], sampler=str(index))
            self.sampled += 1
        if job.generation == self.generation:
            self.tables[chunk] = table
            self.waiting[chunk].set()

    # Faults

    def _fail(self, reason: str) -> None:
        if self.failure is not None:
            return
        self.failure = reason
        logger.error("%s", reason)
        self.all_began.set()
        for event in self.waiting.values():
            event.set()
        for job in (*self.queue, *self.running):
            if job.future is not None and not job.future.done():
                job.future.set_exception(UserError(reason))
        self._wake()

    # What training workers and the driver ask for

    async def chunk(self, chunk: Chunk) -> list[Any]:
        """[reference to the table of negatives] of a chunk, once it is ready.

        Raises:
            UserError: the samplers failed for good.
        """
        if not self.config.sampler.ahead_iterations and chunk not in self.tables and chunk not in self.asked:
            self.asked.add(chunk)
            snapshot = await self._snapshot(self.schedule.snapshot_for(chunk.iteration))
            self._push(chunk.iteration, "sample", snapshot, chunk)
        while chunk not in self.tables:
            if self.failure:
                raise UserError(self.failure)
            event = self.waiting[chunk]
            event.clear()
            await event.wait()
        return [self.tables[chunk]]

    async def _snapshot(self, number: int) -> Snapshot:
        while number not in self.published:
            if self.failure:
                raise UserError(self.failure)
            await asyncio.sleep(0.1)
        return self.published[number]

    async def evaluate(self, snapshot: int, split: str) -> Entry:
        """Accuracy of a snapshot on a split, once it is published: {"step", "snapshot", "split", "accuracy", "n"}.

        The predictions are written to `evaluations/`, the accuracies to `evaluations/summary.json`.
        """
        return await self.evaluations.begin(snapshot, split)

    async def _predict(self, number: int, split: str) -> list[Prediction]:
        snapshot = await self._snapshot(number)
        rows = (await asyncio.to_thread(open_rationale_table, self.run.table(split))).num_rows
        futures = [
            self._push(self._beside(number), "predict", snapshot, (split, first, min(first + EVALUATED_TOGETHER, rows)))
            for first in range(0, rows, EVALUATED_TOGETHER)
        ]
        return [p for part in await asyncio.gather(*(f for f in futures if f)) for p in part]

    def _beside(self, number: int) -> float:
        """The priority of what training does not wait for: after the negatives of that snapshot."""
        return number + (self.schedule.lag or 0) + 0.5

    async def best_snapshot(self) -> Entry | None:
        """The best of all snapshots evaluated on valid, once every evaluation under way has ended."""
        await self.evaluations.until_done()
        return self.evaluations.best()

    async def explain(self, snapshot: int, split: str, count: int) -> list[dict[str, str]]:
        """Greedy rationales of a published snapshot for a split's first questions."""
        found = await self._snapshot(snapshot)
        future = self._push(self._beside(snapshot), "explain", found, (split, count))
        assert future is not None
        result: list[dict[str, str]] = await future
        return result

    async def observe(self, snapshot: int, split: str, count: int, temperature: float) -> list[str]:
        """Rationales of a published snapshot for a split's first questions, sampled at a temperature."""
        found = await self._snapshot(snapshot)
        future = self._push(self._beside(snapshot), "observe", found, (split, count, temperature))
        assert future is not None
        result: list[str] = await future
        return result

    async def stop(self) -> bool:
        """Have training end after the step at hand, with a checkpoint.

        Returns:
            Whether steps are trained yet; before, nothing would look at it for as long as the judge is pretrained.
        """
        self.stopping.set()
        return self.stepping

    async def until_stop(self) -> None:
        """For rank 0, which calls it as its first step begins: returns once `stop` was called."""
        self.stepping = True
        await self.stopping.wait()

    async def statistics(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "chunks": self.sampled,
            "chunks_reused": self.reused,
            "busy_seconds": round(self.busy_seconds, 3),
            "load_seconds": round(self.load_seconds, 3),
            "sampler_restarts": self.restarts,
            "training_starts": self.starts,
        }

    async def all_evaluations(self) -> list[Entry]:
        """What `evaluate` gave so far, in the order of the steps."""
        return self.evaluations.entries


def fixed_snapshot(run: RunFolder) -> Snapshot:
    """The student of `negatives.source=fixed`, which the driver copied into the run."""
    return Snapshot.of(run, FIXED, FIXED_STUDENT)

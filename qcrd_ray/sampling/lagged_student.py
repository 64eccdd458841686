"""The lagged student: negatives of every iteration from exactly the snapshot that the schedule names, sampled ahead.

`Sampler` is a Ray actor around one engine. `SamplingService` is the one actor that knows what is published, wanted and
ready; it hands chunks of work to free samplers and never touches a token itself. `NegativesClient` is a training
worker's end. A sampler is told the snapshot with every piece of work, so a restarted one goes on by itself, and no
piece can run on other weights than its own.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import logging
import math
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.rationales.schema import NEGATIVES
from qcrd_ray.rationales.streaming import student_tools, training_order
from qcrd_ray.rationales.tables import open_rationale_table
from qcrd_ray.run_folder import RunFolder, write_text_atomic
from qcrd_ray.sampling.engine import EngineSpec, Request, SamplingParameters, start_engine
from qcrd_ray.sampling.predictions import Prediction, explain, predict
from qcrd_ray.sampling.schedule import FIXED, Chunk, Schedule
from qcrd_ray.seeding import stable_hash
from qcrd_ray.tasks.prompts import EXPLAIN

logger = logging.getLogger(__name__)

EVALUATED_TOGETHER = 128
ATTEMPTS = 5


class Sampler:
    """One engine that serves one snapshot at a time. Runs as a Ray actor."""

    def __init__(self, config: ExperimentConfig, run: RunFolder, model: str, spec: EngineSpec) -> None:
        self.config = config
        self.run = run
        self.model = model
        self.engine = start_engine(spec)
        self.loaded = spec.model

    def ready(self) -> str:
        """Answers once the engine is up: the engine's class."""
        return type(self.engine).__name__

    def _load(self, folder: str) -> None:
        if self.loaded != folder:
            self.engine.load_weights(Path(folder))
            self.loaded = folder

    def sample(self, chunk: Chunk, snapshot: int, folder: str) -> tuple[dict[str, Any], pa.Table]:
        """Negatives of a chunk's questions, written to `negatives/` and given back."""
        begin = time.perf_counter()
        self._load(folder)
        loaded = time.perf_counter()
        tokenizer, task = student_tools(self.model, self.config)
        settings = self.config.negatives
        table = open_rationale_table(self.run.table("train"))
        order = training_order(str(self.run.table("train")), self.config)
        parameters = SamplingParameters(
            temperature=settings.temperature,
            top_k=settings.top_k,
            max_tokens=settings.max_tokens or self.config.student.max_rationale_tokens,
        )
        keys: list[tuple[int, int, str, int, int]] = []
        requests: list[Request] = []
        for step in range(chunk.first, chunk.last):
            epoch = order.epoch_of(step)
            for record in table.take(pa.array(order.batch(step))).to_pylist():
                prompt, _ = tokenizer.prompt(EXPLAIN, task.student_input(record["question"], record["choices"]))
                for index in range(settings.count):
                    seed = stable_hash(self.config.train.seed, "negative", epoch, step, record["id"], index)
                    keys.append((epoch, step, record["id"], index, seed))
                    requests.append(Request(tuple(prompt), parameters, seed))
        rows: list[dict[str, Any]] = []
        generations = self.engine.generate(requests)
        for (epoch, step, id_, index, seed), [generation] in zip(keys, generations, strict=True):
            rows.append(
                {
                    "epoch": epoch,
                    "step": step,
                    "iteration": chunk.iteration,
                    "snapshot": snapshot,
                    "id": id_,
                    "negative_index": index,
                    "rationale": generation.text,
                    "token_ids": list(generation.token_ids),
                    "mean_logprob": None if math.isnan(generation.mean_logprob) else generation.mean_logprob,
                    "finish_reason": generation.finish_reason,
                    "temperature": settings.temperature,
                    "top_k": settings.top_k,
                    "seed": seed,
                }
            )
        result = pa.Table.from_pylist(rows, schema=NEGATIVES)
        path = self.run.negatives / chunk.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        pq.write_table(result, temporary)
        temporary.replace(path)
        end = time.perf_counter()
        tokens = sum(len(row["token_ids"]) for row in rows)
        return {"tokens": tokens, "load_seconds": loaded - begin, "seconds": end - loaded}, result

    def predict(self, split: str, first: int, last: int, folder: str) -> list[Prediction]:
        """Greedy labels of rows first..last-1 of a held-out split, scored by the task."""
        self._load(folder)
        return predict(self.engine, self.config, self.model, self._records(split, first, last))

    def explain(self, split: str, count: int, folder: str) -> list[dict[str, str]]:
        """Greedy rationales and labels of a split's first questions."""
        self._load(folder)
        return explain(self.engine, self.config, self.model, self._records(split, 0, count))

    def _records(self, split: str, first: int, last: int) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = (
            open_rationale_table(self.run.table(split)).slice(first, last - first).to_pylist()
        )
        return records

    def close(self) -> None:
        self.engine.close()


class SamplingService:
    """Knows which snapshots are published, what they owe to which iteration, and what lies ready. A Ray actor."""

    def __init__(self, config: ExperimentConfig, run: RunFolder, samplers: list[Any]) -> None:
        self.config = config
        self.run = run
        self.schedule = Schedule.of(config)
        self.samplers = samplers
        self.published: dict[int, str] = {}
        self.step = 0
        self.generation = 0
        self.queue: list[tuple[Any, ...]] = []
        self.order = itertools.count()
        self.wake = asyncio.Event()
        self.enqueued: set[int] = set()
        self.tables: dict[Chunk, Any] = {}
        self.waiting: dict[Chunk, asyncio.Event] = defaultdict(asyncio.Event)
        self.running: list[str] = []
        self.evaluations: list[asyncio.Task[None]] = []
        self.best: dict[str, Any] | None = None
        self.failure: str | None = None
        self.tokens = 0
        self.sampled = 0
        self.busy_seconds = 0.0
        self.load_seconds = 0.0
        self.restarts = 0
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to hand out work."""
        if not self.tasks:
            self.tasks = [asyncio.create_task(self._serve(sampler)) for sampler in self.samplers]

    async def rewind(self, step: int) -> None:
        """Training starts (again) at `step`: forget every snapshot taken after it, and all that came from them."""
        self.generation += 1
        self.step = step
        self.best = self._recorded_best()
        last = step // self.config.train.iteration_steps
        self.enqueued.clear()
        self.tables.clear()
        for number in [n for n in self.published if n > last]:
            del self.published[number]
        for folder in self.run.snapshots.glob("[0-9]*"):
            if int(folder.name) > last or int(folder.name) * self.config.train.iteration_steps > step:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                self.published[int(folder.name)] = str(folder)
        for path in (self.run.root / "evaluations").glob("*-[0-9]*.jsonl"):
            if int(path.stem.rsplit("-", 1)[1]) > last:
                path.unlink()
        for iteration in range(self.schedule.iterations):
            if self.schedule.snapshot_for(iteration) > last:
                for chunk in self.schedule.chunks(iteration):
                    (self.run.negatives / chunk.file_name).unlink(missing_ok=True)
        self._drop_jobs()
        self._refill()

    def _drop_jobs(self) -> None:
        """Sampling is asked anew; an evaluation goes on if its snapshot is still there."""
        kept = [job for job in self.queue if job[2] != "sample" and Path(job[3]).exists()]
        for job in self.queue:
            if job[2] != "sample" and job not in kept:
                job[5].cancel()
        self.queue = kept
        heapq.heapify(self.queue)

    def _recorded_best(self) -> dict[str, Any] | None:
        try:
            best: dict[str, Any] = json.loads((self.run.root / "best.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return best if best["snapshot"] * self.config.train.iteration_steps <= self.step else None

    async def publish(self, snapshot: int, folder: str) -> None:
        """`folder` holds snapshot θ_`snapshot`, complete."""
        self.published[snapshot] = folder
        self._refill()

    async def progress(self, step: int, checkpoints: list[int]) -> None:
        """Training is at `step` and could resume from any of `checkpoints` (steps). Drops what none of them needs."""
        self.step = step
        for chunk in [c for c in self.tables if c.last <= step - self.config.train.iteration_steps]:
            del self.tables[chunk]
            self.waiting.pop(chunk, None)
        now = self.schedule.iteration_of(step)
        resumable = [self.schedule.iteration_of(checkpoint) for checkpoint in checkpoints]
        busy = {job[3] for job in self.queue} | set(self.running)
        for number, folder in list(self.published.items()):
            needed = number <= 0 or number >= self.schedule.snapshot_for(now) or folder in busy
            # A resume publishes what comes after its checkpoint anew; what it samples from before that must be there.
            needed = needed or any(self.schedule.snapshot_for(i) <= number <= i for i in resumable)
            if not needed and not (self.best and self.best["snapshot"] == number):
                del self.published[number]
                shutil.rmtree(folder, ignore_errors=True)
        self._refill()

    def _refill(self) -> None:
        """Queue the chunks of every iteration whose snapshot is out and that is near enough."""
        if self.config.sampled_negatives:
            now = self.schedule.iteration_of(self.step)
            last = min(self.schedule.iterations, now + self.config.sampler.ahead_iterations)
            for iteration in range(now, last):
                folder = self.published.get(self.schedule.snapshot_for(iteration))
                if folder is None or iteration in self.enqueued:
                    continue
                self.enqueued.add(iteration)
                for chunk in self.schedule.chunks(iteration):
                    if chunk.last > self.step:
                        self._push(iteration, "sample", folder, chunk, None)
        self.wake.set()

    def _push(self, priority: float, kind: str, folder: str, what: Any, future: Any) -> None:
        heapq.heappush(self.queue, (priority, next(self.order), kind, folder, what, future, self.generation))
        self.wake.set()

    async def _serve(self, sampler: Any) -> None:
        """Give one sampler one piece of work after the other."""
        while self.failure is None:
            if not self.queue:
                self.wake.clear()
                await self.wake.wait()
                continue
            job = heapq.heappop(self.queue)
            self.running.append(job[3])
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    await self._run(sampler, job)
                    break
                except Exception as error:  # a dead actor, a failed engine, a full disk: asked again, then said
                    self.restarts += isinstance(error, ray.exceptions.RayActorError)
                    logger.warning("sampler failed (%d of %d): %s", attempt, ATTEMPTS, _first_line(error))
                    if attempt == ATTEMPTS:
                        self.queue.append(job)
                        self._fail(f"a sampler failed {ATTEMPTS} times in a row, last with: {_first_line(error)}")
                        break
                    await asyncio.sleep(min(2.0**attempt, 15.0))
            self.running.remove(job[3])

    async def _run(self, sampler: Any, job: tuple[Any, ...]) -> None:
        _, _, kind, folder, what, future, generation = job
        if generation != self.generation and kind == "sample":
            return
        if kind == "predict":
            result = await sampler.predict.remote(*what, folder)
            if not future.done():
                future.set_result(result)
            return
        if kind == "explain":
            result = await sampler.explain.remote(*what, folder)
            if not future.done():
                future.set_result(result)
            return
        chunk: Chunk = what
        path = self.run.negatives / chunk.file_name
        if path.exists():
            table = ray.put(pq.read_table(path, schema=NEGATIVES))
        else:
            snapshot = self.schedule.snapshot_for(chunk.iteration)
            stats_ref, table = sampler.sample.options(num_returns=2).remote(chunk, snapshot, folder)
            stats = await stats_ref
            if generation != self.generation:
                if chunk not in self.tables:
                    path.unlink(missing_ok=True)
                return
            self.tokens += stats["tokens"]
            self.busy_seconds += stats["seconds"]
            self.load_seconds += stats["load_seconds"]
        self.sampled += 1
        self.tables[chunk] = table
        self.waiting[chunk].set()

    def _fail(self, reason: str) -> None:
        self.failure = reason
        for event in self.waiting.values():
            event.set()
        for job in self.queue:
            if job[5] is not None and not job[5].done():
                job[5].set_exception(RuntimeError(reason))

    async def chunk(self, chunk: Chunk) -> list[Any]:
        """[reference to the table of negatives] of a chunk, once it is ready.

        Raises:
            RuntimeError: the samplers failed for good.
        """
        while chunk not in self.tables:
            if self.failure:
                raise RuntimeError(self.failure)
            event = self.waiting[chunk]
            event.clear()
            await event.wait()
        return [self.tables[chunk]]

    async def _folder_of(self, snapshot: int) -> str:
        while snapshot not in self.published:
            if self.failure:
                raise RuntimeError(self.failure)
            await asyncio.sleep(0.1)
        return self.published[snapshot]

    async def evaluate_and_keep_best(self, snapshot: int) -> None:
        """Evaluate a snapshot on the held-out split that selects, and keep it if it is the best so far."""
        task = asyncio.create_task(self._evaluate_and_keep_best(snapshot))
        self.evaluations.append(task)

    async def _evaluate_and_keep_best(self, snapshot: int) -> None:
        found = await self.evaluate(snapshot, "valid")
        if self.best is None or found["accuracy"] > self.best["accuracy"]:
            self.best = found
            write_text_atomic(self.run.root / "best.json", json.dumps(found))

    async def best_snapshot(self) -> dict[str, Any] | None:
        """The best of all snapshots evaluated, once every evaluation under way has ended."""
        evaluations, self.evaluations = self.evaluations, []
        for outcome in await asyncio.gather(*evaluations, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
                raise outcome
        return self.best

    async def evaluate(self, snapshot: int, split: str) -> dict[str, Any]:
        """Accuracy of a snapshot on a split, as soon as it is published: {"snapshot", "split", "accuracy", "n"}.

        The predictions are written to `evaluations/`, and a second call reads them there.
        """
        path = self.run.root / "evaluations" / f"{split}-{snapshot:06d}.jsonl"
        if not path.exists():
            rows = open_rationale_table(self.run.table(split)).num_rows
            folder = await self._folder_of(snapshot)
            loop = asyncio.get_running_loop()
            futures = []
            for first in range(0, rows, EVALUATED_TOGETHER):
                future = loop.create_future()
                futures.append(future)
                last = min(first + EVALUATED_TOGETHER, rows)
                self._push(snapshot + (self.schedule.lag or 0) + 0.5, "predict", folder, (split, first, last), future)
            predictions = [p for part in await asyncio.gather(*futures) for p in part]
            lines = [{"id": p.id, "prediction": p.text, "correct": p.correct} for p in predictions]
            write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
        correct = [json.loads(line)["correct"] for line in path.read_text(encoding="utf-8").split("\n") if line]
        return {"snapshot": snapshot, "split": split, "accuracy": sum(correct) / len(correct), "n": len(correct)}

    async def explain(self, snapshot: int, split: str, count: int) -> list[dict[str, str]]:
        """Greedy rationales of a published snapshot for a split's first questions."""
        future = asyncio.get_running_loop().create_future()
        folder = await self._folder_of(snapshot)
        self._push(snapshot + (self.schedule.lag or 0) + 0.5, "explain", folder, (split, count), future)
        result: list[dict[str, str]] = await future
        return result

    async def statistics(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "chunks": self.sampled,
            "busy_seconds": round(self.busy_seconds, 3),
            "load_seconds": round(self.load_seconds, 3),
            "sampler_restarts": self.restarts,
        }


@dataclass(frozen=True)
class Negative:
    """One negative of one question, ready to train on. `ids` end with the end token unless it was cut by length."""

    ids: list[int]
    text: str
    lag: int | None


class NegativesClient:
    """A training worker's end: the negatives of its questions, asked for one chunk ahead."""

    def __init__(self, service: Any, config: ExperimentConfig, end_token: int) -> None:
        self.service = service
        self.schedule = Schedule.of(config)
        self.timeout = config.sampler.timeout_s
        self.count = config.sampled_negatives
        self.limit = config.student.max_rationale_tokens
        self.end_token = end_token
        self.asked: dict[Chunk, Any] = {}
        self.current: Chunk | None = None
        self.rows: dict[tuple[int, str], list[Negative]] = {}
        self.warmup_seconds: float | None = None
        self.stall_seconds = 0.0

    def take(self, step: int, ids: list[str]) -> list[list[Negative]]:
        """The negatives of a step's questions, in their order.

        Raises:
            TimeoutError: they were not ready within `sampler.timeout_s`.
        """
        if not self.count:
            return [[] for _ in ids]
        chunk = self.schedule.chunk_of(step)
        if chunk != self.current:
            self._fetch(chunk)
        return [self.rows[step, id_] for id_ in ids]

    def _fetch(self, chunk: Chunk) -> None:
        begin = time.perf_counter()
        asked = self.asked.pop(chunk, None) or self.service.chunk.remote(chunk)
        try:
            [reference] = ray.get(asked, timeout=self.timeout)
            table = ray.get(reference, timeout=self.timeout)
        except ray.exceptions.GetTimeoutError:
            snapshot = self.schedule.snapshot_for(chunk.iteration)
            raise TimeoutError(
                f"waited {self.timeout} s (sampler.timeout_s) for the negatives of iteration {chunk.iteration}, steps "
                f"{chunk.first} to {chunk.last - 1}, from snapshot {snapshot}"
            ) from None
        waited = time.perf_counter() - begin
        if self.warmup_seconds is None:
            self.warmup_seconds = waited
        else:
            self.stall_seconds += waited
        self.current = chunk
        self.rows = defaultdict(list)
        snapshot = self.schedule.snapshot_for(chunk.iteration)
        lag = None if snapshot == FIXED else chunk.iteration - snapshot
        for row in table.to_pylist():
            if row["iteration"] != chunk.iteration or row["snapshot"] != self.schedule.snapshot_for(chunk.iteration):
                raise RuntimeError(
                    f"negative of step {row['step']} comes from snapshot {row['snapshot']}, expected "
                    f"{self.schedule.snapshot_for(chunk.iteration)}"
                )
            ids = row["token_ids"][: self.limit]
            if ids and row["finish_reason"] == "stop" and len(ids) < self.limit:
                ids = [*ids, self.end_token]
            self.rows[row["step"], row["id"]].append(Negative(ids, row["rationale"], lag))
        if chunk.last < self.schedule.max_steps:
            following = self.schedule.chunk_of(chunk.last)
            self.asked[following] = self.service.chunk.remote(following)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__

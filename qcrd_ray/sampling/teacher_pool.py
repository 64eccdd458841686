"""A pool of teachers that answers what is missing from a set of samples, as a Ray Data job.

    plan (questions whose samples are missing, in chunks) ──Ray Data──▶ TeacherActor pool ──▶ parts of the sample set

What comes back through Ray Data is only what failed: the samples go from the actor that made them straight to the
store, so that no driver ever holds them and a kill finds them there.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.rationales.schema import Question
from qcrd_ray.rationales.sources import read_rows
from qcrd_ray.ray_session import await_resources, cluster_state, data_settings
from qcrd_ray.sampling.engine import SamplingParameters
from qcrd_ray.sampling.sample_store import Chunk, SampleSet, SetLock, StoreIndex, Usage
from qcrd_ray.sampling.teacher_engine import Answered, Ask, TeacherEngine
from qcrd_ray.sampling.teacher_prompt import PromptBuilder, first_seed, question_key
from qcrd_ray.tasks import get_task

FAILURES_IN_A_ROW = 25
"""Questions that fail one after another, none answered between them, after which a teacher is not asked any more."""
POLL_SECONDS = 1.0
_PLAN_ROWS = 8
_CHUNK_QUESTIONS = 512
_CALLS = 64
_OF_THE_QUESTION = ("prompt too long", "empty prompt", "content filter")
"""Reasons that say nothing about the next question."""

_PLAN = pa.schema(
    [
        pa.field("key", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("choices", pa.list_(pa.string())),
        pa.field("missing", pa.list_(pa.int32()), nullable=False),
    ]
)
FAILURES = pa.schema(
    [pa.field("id", pa.string()), pa.field("sample_index", pa.int32()), pa.field("reason", pa.string())]
)


@dataclass(frozen=True)
class Plan:
    """What is asked in this run.

    Attributes:
        questions: questions of the split (of `data.limit`).
        open_questions: those of which samples are missing.
        samples: samples that are missing.
        reused: samples that are there.
    """

    path: Path
    questions: int
    open_questions: int
    samples: int
    reused: int


@dataclass(frozen=True)
class Outcome:
    """What became of a plan.

    Attributes:
        sampled: samples written in this run.
        failures: (id, sample index, reason) of every sample that failed.
        failed_questions: questions with a failed sample.
        stopped: why the sampling ended early, None where it did not.
        engine_start_seconds: of the slowest engine to start.
        seconds: from the first question asked to the last one answered.
    """

    plan: Plan
    sampled: int = 0
    failures: tuple[tuple[str, int, str], ...] = ()
    stopped: str | None = None
    usage: Usage = field(default_factory=Usage)
    engine_start_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def failed_questions(self) -> int:
        return len({question for question, _, _ in self.failures})

    @property
    def reasons(self) -> dict[str, int]:
        """Failed samples by reason."""
        return dict(Counter(reason for _, _, reason in self.failures).most_common())


@dataclass
class Totals:
    """How far the pool is."""

    answered: int = 0
    samples: int = 0
    failed: int = 0
    usage: Usage = field(default_factory=Usage)
    start_seconds: float = 0.0
    begin: float | None = None
    end: float | None = None
    stopped: str | None = None


class Ledger:
    """Adds up what all actors report. An actor of Ray."""

    def __init__(self) -> None:
        self._totals = Totals()
        self._interrupted = False

    def started(self, seconds: float) -> None:
        self._totals.start_seconds = max(self._totals.start_seconds, seconds)

    def asking(self, now: float) -> None:
        self._totals.begin = min(now, self._totals.begin or now)

    def add(self, now: float, samples: int, failed: int, usage: Usage) -> None:
        totals = self._totals
        totals.answered += 1
        totals.samples += samples
        totals.failed += failed
        totals.usage += usage
        totals.end = max(now, totals.end or now)

    def stopped(self, reason: str) -> None:
        self._totals.stopped = reason

    def totals(self) -> Totals:
        return self._totals

    def interrupt(self) -> None:
        """Have the actors end after the questions at hand."""
        self._interrupted = True

    def interrupted(self) -> bool:
        return self._interrupted


@dataclass(frozen=True)
class PoolJob:
    """All that an actor needs.

    Attributes:
        start: starts the teacher, in the actor.
        run: names the parts of this run.
        chunk_batches: record batches of the plan that make a chunk.
    """

    config: ExperimentConfig
    chat: bool
    folder: Path
    plan: Path
    run: str
    chunk_batches: int
    start: Callable[[], TeacherEngine]


class TeacherActor:
    """One engine, or one client of an endpoint. Works on several chunks at a time, so that none of them waits."""

    def __init__(self, job: PoolJob, ledger: Any) -> None:
        self._job, self._ledger = job, ledger
        self._builder = PromptBuilder(job.config, job.chat)
        self._teacher: TeacherEngine | None = None
        self._starting: asyncio.Task[TeacherEngine] | None = None
        self._heeding: asyncio.Task[None] | None = None
        self._failed_in_row = 0
        self._stopped: str | None = None
        settings = job.config.teacher
        self._seeded = settings.engine != "openai" or settings.endpoint.send_seed
        # Those that are handed to a teacher that answers nothing cannot be taken back.
        self._handed = asyncio.Semaphore(_questions_handed(job.config))
        self._lock = SetLock(job.folder)
        self._lock.share()  # a driver that comes after a kill waits until this process is gone

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Answer a chunk. Returns what failed (`FAILURES`); a row without an id says what the user must mend."""
        try:
            failures = await self._answer(int(batch["chunk"][0].as_py()))
        except UserError as error:  # as an exception it would come through Ray Data without its type
            self._stopped = str(error)
            failures = [{"id": None, "sample_index": None, "reason": str(error)}]
        return pa.Table.from_pylist(failures, schema=FAILURES)

    async def _answer(self, number: int) -> list[dict[str, Any]]:
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
            self._heeding = asyncio.create_task(self._heed_interrupt())
        self._teacher = await self._starting
        chunk = Chunk(self._job.folder, f"{self._job.run}-{number:06d}")
        try:
            done = chunk.done()
            rows = _read_plan(self._job.plan, number * self._job.chunk_batches, self._job.chunk_batches)
            answers = await asyncio.gather(*(self._ask(chunk, row, done) for row in rows))
            with self._writing():
                chunk.finish()
        finally:
            chunk.close()
        self._report_stop()
        return [failure for answer in answers for failure in answer]

    async def _start(self) -> TeacherEngine:
        begin = time.time()
        teacher = await asyncio.to_thread(self._job.start)
        self._ledger.started.remote(time.time() - begin)
        self._ledger.asking.remote(time.time())
        return teacher

    async def _heed_interrupt(self) -> None:
        """Ask nothing more once the driver wants it."""
        with contextlib.suppress(ray.exceptions.RayError):  # the ledger is gone: so is the driver
            while not await self._ledger.interrupted.remote():
                await asyncio.sleep(POLL_SECONDS)
            self._stopped = "interrupted"

    async def _ask(self, chunk: Chunk, row: dict[str, Any], done: set[tuple[int, int]]) -> list[dict[str, Any]]:
        missing = tuple(index for index in row["missing"] if (row["key"], index) not in done)
        if not missing:
            return []
        async with self._handed:
            assert self._teacher is not None
            return [] if self._teacher.stopped or self._stopped else await self._sample(chunk, row, missing)

    async def _sample(self, chunk: Chunk, row: dict[str, Any], missing: tuple[int, ...]) -> list[dict[str, Any]]:
        assert self._teacher is not None
        choices = tuple(row["choices"]) if row["choices"] is not None else None
        prompt = self._builder.build(Question(row["id"], row["question"], choices=choices))
        seed = first_seed(self._job.config.teacher.seed, row["id"])
        answered = await self._teacher.ask(Ask(row["id"], prompt, missing, seed))
        samples = [
            {
                "key": row["key"],
                "id": row["id"],
                "sample_index": index,
                "text": reply.text.encode("utf-8", "replace").decode(),
                "seed": seed + index if self._seeded else None,
                "finish_reason": reply.finish_reason,
                "completion_tokens": reply.completion_tokens,
            }
            for index, reply in sorted(answered.replies.items())
        ]
        usage = self._usage(answered)
        if samples or usage.prompt_tokens:
            with self._writing():
                chunk.append(samples, usage)
        self._watch(answered)
        if samples or answered.failed:
            self._ledger.add.remote(time.time(), len(samples), len(answered.failed), usage)
        return [{"id": row["id"], "sample_index": i, "reason": why} for i, why in sorted(answered.failed.items())]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"samples in {self._job.folder} cannot be written: {error.strerror or error}; what was written is "
                "kept: make room and start again"
            ) from None

    def _usage(self, answered: Answered) -> Usage:
        prices = self._job.config.teacher.endpoint
        cost = answered.prompt_tokens * prices.price_input + answered.completion_tokens * prices.price_output
        return Usage(1, answered.prompt_tokens, answered.completion_tokens, cost / 1e6)

    def _watch(self, answered: Answered) -> None:
        """Stop asking a teacher that answers nothing at all."""
        reasons = [reason for reason in answered.failed.values() if not reason.startswith(_OF_THE_QUESTION)]
        if answered.replies:
            self._failed_in_row = 0
        elif reasons:
            self._failed_in_row += 1
        if self._failed_in_row >= FAILURES_IN_A_ROW and self._stopped is None:
            self._stopped = f"{self._failed_in_row} questions failed one after another, the last with: {reasons[0]}"

    def _report_stop(self) -> None:
        """Once a chunk: questions that were under way together end without a word as the teacher stops."""
        assert self._teacher is not None
        reason = self._teacher.stopped or self._stopped
        if reason is not None:
            self._ledger.stopped.remote(reason)


def sample_missing(
    config: ExperimentConfig,
    sample_set: SampleSet,
    builder: PromptBuilder,
    start: Callable[[float], Callable[[], TeacherEngine]],
    show: Callable[[Plan, Totals], None],
    lock: SetLock,
) -> Outcome:
    """Ask for every sample of the training questions that the set does not have yet.

    Args:
        start: from what the set has cost so far, a function that starts a teacher inside an actor.
        show: called each second, in a thread of its own, with what was asked for and what is there. It may raise
            KeyboardInterrupt: the pool then ends after the questions at hand, and so does this function, with the same.
        lock: on the set; it is shared with the actors.

    Raises:
        UserError: what the user must mend before any question can be answered. What was sampled is kept.
        KeyboardInterrupt: `show` did. What was sampled is kept.
    """
    sample_set.recover()
    run = uuid.uuid4().hex[:12]
    path = sample_set.folder / f".{run}-plan.tmp"
    try:
        plan = _write_plan(config, sample_set.index(), path)
        if not plan.samples:
            return Outcome(plan)
        before, rows = sample_set.usage(), sample_set.rows()
        lock.share()
        failures, totals = _run_pool(config, builder, sample_set.folder, plan, run, start(before.cost), show)
    finally:
        path.unlink(missing_ok=True)
    return Outcome(
        plan=plan,
        sampled=sample_set.rows() - rows,
        failures=tuple(failures),
        stopped=totals.stopped,
        usage=sample_set.usage() - before,
        engine_start_seconds=totals.start_seconds,
        seconds=(totals.end or 0.0) - (totals.begin or 0.0),
    )


def _write_plan(config: ExperimentConfig, index: StoreIndex, path: Path) -> Plan:
    """Write the questions that lack samples, in the order of the source."""
    questions = open_questions = samples = reused = 0
    with pa.ipc.new_file(str(path), _PLAN) as file:
        rows: list[dict[str, Any]] = []
        for question, missing in _missing(config, index):
            questions += 1
            samples += len(missing)
            reused += config.teacher.samples - len(missing)
            if not missing:
                continue
            open_questions += 1
            rows.append(
                {
                    "key": question_key(question),
                    "id": question.id,
                    "question": question.question,
                    "choices": question.choices,
                    "missing": missing,
                }
            )
            if len(rows) == _PLAN_ROWS:
                file.write_table(pa.Table.from_pylist(rows, schema=_PLAN))
                rows = []
        if rows:
            file.write_table(pa.Table.from_pylist(rows, schema=_PLAN))
    return Plan(path, questions, open_questions, samples, reused)


def _missing(config: ExperimentConfig, index: StoreIndex) -> Iterator[tuple[Question, list[int]]]:
    task = get_task(config)
    wanted = range(config.teacher.samples)
    for number, row in enumerate(read_rows(config, task, "train", samples=False)):
        if number == config.data.limit:
            return
        there = index.of(question_key(row.question))
        yield row.question, [i for i in wanted if i not in there]


def _read_plan(path: Path, first: int, count: int) -> list[dict[str, Any]]:
    with pa.memory_map(str(path)) as source:
        file = pa.ipc.open_file(source)
        batches = range(first, min(first + count, file.num_record_batches))
        return [row for number in batches for row in file.get_batch(number).to_pylist()]


def _run_pool(
    config: ExperimentConfig,
    builder: PromptBuilder,
    folder: Path,
    plan: Plan,
    run: str,
    start: Callable[[], TeacherEngine],
    show: Callable[[Plan, Totals], None],
) -> tuple[list[tuple[str, int, str]], Totals]:
    from ray.data import ActorPoolStrategy

    settings = config.teacher
    wanted = {"CPU": settings.actors * settings.cpus, "GPU": settings.actors * actor_gpus(config)}
    await_resources(wanted, config.run.placement_timeout_s, lambda: _describe(config))

    batches = math.ceil(plan.open_questions / _PLAN_ROWS)
    most = settings.max_actors or settings.actors
    chunk_batches = min(_CHUNK_QUESTIONS // _PLAN_ROWS, max(1, batches // (8 * most)))
    chunks = math.ceil(batches / chunk_batches)
    calls = min(_CALLS, chunks, max(2, math.ceil(_questions_at_once(config) / (chunk_batches * _PLAN_ROWS)) + 1))
    job = PoolJob(config, builder.chat, folder, plan.path, run, chunk_batches, start)

    ledger = ray.remote(Ledger).options(num_cpus=0).remote()
    failures: list[tuple[str, int, str]] = []
    try:
        with data_settings(preserve_order=False), _Watch(ledger, lambda totals: show(plan, totals)):
            numbers = ray.data.from_arrow([pa.table({"chunk": pa.array([n], pa.int64())}) for n in range(chunks)])
            failed = numbers.map_batches(
                TeacherActor,
                fn_constructor_args=(job, ledger),
                batch_format="pyarrow",
                batch_size=None,
                compute=ActorPoolStrategy(
                    min_size=min(settings.actors, chunks),
                    max_size=min(most, chunks),
                    max_tasks_in_flight_per_actor=calls,
                    max_concurrent_calls_per_actor=calls,
                    enable_true_multi_threading=True,
                ),
                num_cpus=settings.cpus,
                num_gpus=actor_gpus(config) or None,
            )
            for block in failed.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in block.to_pylist():
                    if row["id"] is None:
                        raise UserError(row["reason"])
                    failures.append((row["id"], row["sample_index"], row["reason"]))
        totals: Totals = ray.get(ledger.totals.remote(), timeout=60)
    finally:
        ray.kill(ledger)
    return failures, totals


class _Watch:
    """Shows the ledger each second, in a thread, and once more at the end.

    Where `show` raises KeyboardInterrupt the actors are told, and the block that is then soon through ends with it.
    """

    def __init__(self, ledger: Any, show: Callable[[Totals], None]) -> None:
        self._ledger, self._show = ledger, show
        self._end = threading.Event()
        self._interrupted = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not (self._interrupted or self._end.wait(POLL_SECONDS)):
            self._once()

    def _once(self) -> None:
        try:
            totals = ray.get(self._ledger.totals.remote(), timeout=10)
        except ray.exceptions.RayError:
            return  # the node of the ledger is busy or gone; the job itself tells
        try:
            self._show(totals)
        except KeyboardInterrupt:
            self._interrupted = True
            self._ledger.interrupt.remote()

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end.set()
        self._thread.join(timeout=15)
        if not self._interrupted:
            self._once()
        if self._interrupted and kind is None:
            raise KeyboardInterrupt


def _questions_at_once(config: ExperimentConfig) -> int:
    if config.teacher.engine == "openai":
        return config.teacher.endpoint.max_in_flight
    return math.ceil(config.teacher.max_sequences / config.teacher.samples)


def _questions_handed(config: ExperimentConfig) -> int:
    """Enough that a teacher is busy where some wait for a retry, or lack one sample only."""
    settings = config.teacher
    return 4 * settings.endpoint.max_in_flight if settings.engine == "openai" else 2 * settings.max_sequences


def actor_gpus(config: ExperimentConfig) -> float:
    """GPUs of an engine actor: all that the model is spread over."""
    settings = config.teacher
    return max(settings.gpus, float(settings.tensor_parallel)) if settings.tensor_parallel > 1 else settings.gpus


def _describe(config: ExperimentConfig) -> str:
    settings = config.teacher
    return (
        f"asked for {settings.actors} teachers of {settings.cpus:g} CPU and {actor_gpus(config):g} GPU; "
        f"{cluster_state()}"
    )


def sampling_parameters(config: ExperimentConfig, stop: tuple[str, ...]) -> SamplingParameters:
    """How a local teacher samples."""
    settings = config.teacher
    return SamplingParameters(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        max_tokens=settings.max_tokens,
        stop=stop,
        logprobs=False,
    )

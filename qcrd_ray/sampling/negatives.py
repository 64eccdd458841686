"""Negatives on their way from a sampler to a training worker: the files of `negatives/`, and the worker's end."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.rationales.schema import NEGATIVES as SCHEMA
from qcrd_ray.run_folder import NEGATIVES, RunFolder
from qcrd_ray.sampling.schedule import FIXED, Chunk, Schedule
from qcrd_ray.sampling.snapshot import Snapshot

DIGEST_KEY = b"snapshot_digest"


def negatives_file(chunk: Chunk) -> str:
    return f"{NEGATIVES}/{chunk.file_name}"


def write_negatives(run: RunFolder, chunk: Chunk, snapshot: Snapshot, table: pa.Table) -> None:
    """Write a chunk's negatives, and in the file's metadata which content of the snapshot they come from."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({DIGEST_KEY: snapshot.digest.encode()}), sink)
    run.write(negatives_file(chunk), sink.getvalue().to_pybytes())


def read_negatives(run: RunFolder, chunk: Chunk, snapshot: Snapshot | None = None) -> pa.Table | None:
    """A chunk's negatives; None where there are none, or none of just this snapshot, or no readable ones."""
    try:
        data = run.read(negatives_file(chunk))
        table = pq.read_table(pa.BufferReader(data))
    except (FileNotFoundError, pa.ArrowException):
        return None
    digest = (table.schema.metadata or {}).get(DIGEST_KEY, b"").decode()
    if snapshot is not None and digest != snapshot.digest:
        return None
    return table.select(SCHEMA.names).cast(SCHEMA)


@dataclass(frozen=True)
class Negative:
    """One negative of one question, ready to train on. `ids` end with the end token unless it was cut by length."""

    ids: list[int]
    text: str
    lag: int | None


class NegativesClient:
    """A training worker's end: the negatives of its questions, asked for one chunk ahead."""

    def __init__(self, service: Any, run: RunFolder, config: ExperimentConfig, end_token: int) -> None:
        self.service = service
        self.run = run
        self.schedule = Schedule.of(config)
        self.timeout = config.sampler.timeout_s
        self.ahead = config.sampler.ahead_iterations > 0
        self.count = config.sampled_negatives
        self.limit = config.student.max_rationale_tokens
        self.end_token = end_token
        self.asked: dict[Chunk, Any] = {}
        self.current: Chunk | None = None
        self.table: pa.Table | None = None
        self.warmup_seconds: float | None = None
        self.stall_seconds = 0.0

    def take(self, step: int, ids: list[str]) -> list[list[Negative]]:
        """The negatives of a step's questions, in their order.

        Raises:
            TimeoutError: they were not ready within `sampler.timeout_s`.
            RuntimeError: one of them does not come from the snapshot that the schedule names.
        """
        if not self.count:
            return [[] for _ in ids]
        chunk = self.schedule.chunk_of(step)
        if chunk != self.current:
            self._fetch(chunk)
        assert self.table is not None
        mine = pc.and_(pc.equal(self.table["step"], step), pc.is_in(self.table["id"], pa.array(ids, pa.string())))
        found: dict[str, list[Negative]] = defaultdict(list)
        for row in self.table.filter(mine).to_pylist():
            found[row["id"]].append(self._negative(row, chunk))
        missing = [id_ for id_ in ids if len(found[id_]) != self.count]
        if missing:
            raise RuntimeError(
                f"step {step}: question {missing[0]} has {len(found[missing[0]])} of {self.count} negatives"
            )
        return [found[id_] for id_ in ids]

    def _negative(self, row: dict[str, Any], chunk: Chunk) -> Negative:
        expected = self.schedule.snapshot_for(chunk.iteration)
        if row["iteration"] != chunk.iteration or row["snapshot"] != expected:
            raise RuntimeError(
                f"negative of step {row['step']} comes from snapshot {row['snapshot']}, expected {expected}"
            )
        ids = row["token_ids"][: self.limit]
        if ids and row["finish_reason"] == "stop" and len(ids) < self.limit:
            ids = [*ids, self.end_token]
        return Negative(ids, row["rationale"], None if expected == FIXED else chunk.iteration - expected)

    def _fetch(self, chunk: Chunk) -> None:
        begin = time.perf_counter()
        self.table = self._table(chunk)
        waited = time.perf_counter() - begin
        if self.warmup_seconds is None:
            self.warmup_seconds = waited
        else:
            self.stall_seconds += waited
        self.current = chunk
        if self.ahead and chunk.last < self.schedule.max_steps:
            following = self.schedule.chunk_of(chunk.last)
            self.asked[following] = self.service.chunk.remote(following)

    def _table(self, chunk: Chunk) -> pa.Table:
        asked = self.asked.pop(chunk, None) or self.service.chunk.remote(chunk)
        try:
            [reference] = ray.get(asked, timeout=self.timeout)
        except ray.exceptions.GetTimeoutError:
            snapshot = self.schedule.snapshot_for(chunk.iteration)
            raise TimeoutError(
                f"waited {self.timeout} s (sampler.timeout_s) for the negatives of iteration {chunk.iteration}, steps "
                f"{chunk.first} to {chunk.last - 1}, from snapshot {snapshot}"
            ) from None
        try:
            return ray.get(reference, timeout=self.timeout)
        except ray.exceptions.RayError:
            # The node that held them is gone; they were written before they were announced.
            table = read_negatives(self.run, chunk)
            if table is None:
                raise
            return table

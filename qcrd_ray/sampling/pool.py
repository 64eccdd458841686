"""The samplers: Ray actors, each around one engine that holds one snapshot at a time."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pyarrow as pa

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.models.named import local_model
from qcrd_ray.rationales.schema import NEGATIVES
from qcrd_ray.rationales.streaming import student_tools, training_table
from qcrd_ray.rationales.tables import open_rationale_table, rows_at
from qcrd_ray.run_folder import DamagedFolder, RunFolder
from qcrd_ray.run_lock import check_owner
from qcrd_ray.sampling.engine import EngineSpec, Generation, Request, SamplingParameters, start_engine
from qcrd_ray.sampling.negatives import write_negatives
from qcrd_ray.sampling.predictions import Prediction, explain, observe, predict
from qcrd_ray.sampling.schedule import Chunk
from qcrd_ray.sampling.snapshot import Snapshot, check_weights, probe, probe_tolerance
from qcrd_ray.seeding import stable_hash
from qcrd_ray.tasks.prompts import EXPLAIN


class Sampler:
    """One engine. It is told the snapshot with every piece of work, so a restarted one goes on by itself, and no piece
    can run on other weights than its own."""

    def __init__(self, config: ExperimentConfig, run: RunFolder, spec: EngineSpec, token: str) -> None:
        """
        Args:
            spec: its model as in `student.model`.
            token: of the driver that has the run.
        """
        self.config = config
        self.run = run
        self.token = token
        self.model = local_model(run, spec.model)
        self.engine = start_engine(replace(spec, model=self.model))
        self.holds: str | None = None
        self.loaded: list[Snapshot] = []
        self.probe = probe(run, self.model, config) if config.sampler.verify_weights else None

    def ready(self) -> str:
        """Answers once the engine is up: the engine's class."""
        return type(self.engine).__name__

    def _load(self, snapshot: Snapshot) -> None:
        if self.holds == snapshot.digest:
            return
        try:
            folder = self.run.get_folder(snapshot.folder)
        except DamagedFolder as error:
            step = max(0, snapshot.number) * self.config.train.iteration_steps
            raise DamagedFolder(
                f"snapshot {error}; remove it and the checkpoints after step {step} to have it made again"
            ) from None
        self.holds = None
        self.engine.load_weights(folder)
        if self.probe is not None:
            check_weights(
                self.engine, folder, self.probe, probe_tolerance(self.config), self.run.where(snapshot.folder)
            )
        self.holds = snapshot.digest
        self._forget_older(snapshot)

    def _forget_older(self, snapshot: Snapshot) -> None:
        """Drop this node's copies of snapshots that no sampler here is likely to load again."""
        for older in [one for one in self.loaded if one.number < snapshot.number - 1]:
            self.run.forget_cached(older.folder)
            self.loaded.remove(older)
        self.loaded.append(snapshot)

    def sample(self, chunk: Chunk, snapshot: Snapshot) -> tuple[dict[str, Any], pa.Table]:
        """Negatives of a chunk's questions, written to `negatives/` and given back."""
        begin = time.perf_counter()
        self._load(snapshot)
        loaded = time.perf_counter()
        keys, requests = self._requests(chunk)
        generations = self.engine.generate(requests)
        self.engine.rest()
        rows = [
            self._row(key, chunk, snapshot, generation) for key, [generation] in zip(keys, generations, strict=True)
        ]
        table = pa.Table.from_pylist(rows, schema=NEGATIVES)
        check_owner(self.run, self.token)
        write_negatives(self.run, chunk, snapshot, table)
        end = time.perf_counter()
        tokens = sum(len(row["token_ids"]) for row in rows)
        return {"tokens": tokens, "load_seconds": loaded - begin, "seconds": end - loaded}, table

    def _requests(self, chunk: Chunk) -> tuple[list[tuple[int, int, str, int, int]], list[Request]]:
        """(epoch, step, id, negative index, seed) of each negative wanted, and what to ask the engine for it."""
        tokenizer, task = student_tools(self.model, self.config)
        settings = self.config.negatives
        table, order = training_table(self.run, self.config)
        parameters = SamplingParameters(
            temperature=settings.temperature,
            top_k=settings.top_k,
            max_tokens=settings.max_tokens or self.config.student.max_rationale_tokens,
        )
        keys: list[tuple[int, int, str, int, int]] = []
        requests: list[Request] = []
        for step in range(chunk.first, chunk.last):
            epoch = order.epoch_of(step)
            for record in rows_at(table, order.batch(step)):
                prompt, _ = tokenizer.prompt(EXPLAIN, task.student_input(record["question"], record["choices"]))
                for index in range(settings.count):
                    seed = stable_hash(self.config.train.seed, "negative", epoch, step, record["id"], index)
                    keys.append((epoch, step, record["id"], index, seed))
                    requests.append(Request(tuple(prompt), parameters, seed))
        return keys, requests

    def _row(
        self, key: tuple[int, int, str, int, int], chunk: Chunk, snapshot: Snapshot, generation: Generation
    ) -> dict[str, Any]:
        epoch, step, id_, index, seed = key
        return {
            "epoch": epoch,
            "step": step,
            "iteration": chunk.iteration,
            "snapshot": snapshot.number,
            "id": id_,
            "negative_index": index,
            "rationale": generation.text,
            "token_ids": list(generation.token_ids),
            "mean_logprob": None if math.isnan(generation.mean_logprob) else generation.mean_logprob,
            "finish_reason": generation.finish_reason,
            "temperature": self.config.negatives.temperature,
            "top_k": self.config.negatives.top_k,
            "seed": seed,
        }

    def predict(self, split: str, first: int, last: int, snapshot: Snapshot) -> list[Prediction]:
        """Greedy labels of rows first..last-1 of a held-out split, scored by the task."""
        self._load(snapshot)
        predictions = predict(self.engine, self.config, self.model, self._records(split, first, last))
        self.engine.rest()
        return predictions

    def explain(self, split: str, count: int, snapshot: Snapshot) -> list[dict[str, str]]:
        """Greedy rationales and labels of a split's first questions."""
        self._load(snapshot)
        explained = explain(self.engine, self.config, self.model, self._records(split, 0, count))
        self.engine.rest()
        return explained

    def observe(self, split: str, count: int, temperature: float, snapshot: Snapshot) -> list[str]:
        """A rationale of each of a split's first questions, sampled at a temperature."""
        self._load(snapshot)
        texts = observe(self.engine, self.config, self.model, self._records(split, 0, count), temperature)
        self.engine.rest()
        return texts

    def _records(self, split: str, first: int, last: int) -> list[dict[str, Any]]:
        table = open_rationale_table(self.run.table(split))
        records: list[dict[str, Any]] = table.slice(first, last - first).to_pylist()
        return records

    def close(self) -> None:
        self.engine.close()

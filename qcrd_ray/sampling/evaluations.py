"""Evaluation beside training: the accuracy of a snapshot on a split, made once, attached to the step it belongs to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.run_folder import EVALUATIONS, EVALUATIONS_SUMMARY, RunFolder
from qcrd_ray.sampling.predictions import Prediction
from qcrd_ray.sampling.schedule import Schedule

Entry = dict[str, Any]
"""{"step", "snapshot", "split", "accuracy", "n"}, as `evaluations/summary.json` lists them."""


class Evaluations:
    """The evaluations of a run, done and under way. For one event loop.

    Args:
        predict: snapshot number, split -> what that snapshot answers to every question of the split, in order.
    """

    def __init__(
        self, config: ExperimentConfig, run: RunFolder, predict: Callable[[int, str], Awaitable[list[Prediction]]]
    ) -> None:
        self.train = config.train
        self.run = run
        self.schedule = Schedule.of(config)
        self.predict = predict
        self.entries: list[Entry] = []
        self._under_way: dict[tuple[int, str], asyncio.Task[Entry]] = {}

    async def read(self) -> None:
        """Take up what an earlier attempt of the run had finished."""
        self.entries = await asyncio.to_thread(self.run.read_json, EVALUATIONS_SUMMARY) or []

    def rewind(self, step: int) -> None:
        """Forget all that belongs to a step after `step`."""
        self.entries = [entry for entry in self.entries if entry["step"] <= step]
        for key, task in list(self._under_way.items()):
            if key[0] * self.train.iteration_steps > step:
                task.cancel()
                del self._under_way[key]

    def begin(self, snapshot: int, split: str = "valid") -> asyncio.Task[Entry]:
        """The one evaluation of a snapshot on a split, begun if it was not."""
        key = (snapshot, split)
        if key not in self._under_way:
            self._under_way[key] = asyncio.create_task(self._evaluate(snapshot, split))
            # An evaluation that nobody waits for yet keeps its error until somebody does.
            self._under_way[key].add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._under_way[key]

    def begin_what_is_due(self, snapshots: Iterable[int]) -> None:
        """Begin those that were due before a restart and had not ended."""
        done = {(entry["snapshot"], entry["split"]) for entry in self.entries}
        for number in snapshots:
            if self.schedule.is_evaluated(number) and (number, "valid") not in done:
                self.begin(number)

    async def _evaluate(self, snapshot: int, split: str) -> Entry:
        for entry in self.entries:
            if (entry["snapshot"], entry["split"]) == (snapshot, split):
                self._under_way.pop((snapshot, split), None)
                return entry
        predictions = await self.predict(snapshot, split)
        entry = {
            "step": min(snapshot * self.train.iteration_steps, self.train.max_steps),
            "snapshot": snapshot,
            "split": split,
            "accuracy": sum(p.correct for p in predictions) / len(predictions),
            "n": len(predictions),
        }
        lines = [{"id": p.id, "prediction": p.text, "correct": p.correct} for p in predictions]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self.entries.append(entry)
        self.entries.sort(key=lambda e: (e["step"], e["split"]))
        summary = json.dumps(self.entries, indent=1) + "\n"
        await asyncio.to_thread(self.run.write, f"{EVALUATIONS}/{split}-{snapshot:06d}.jsonl", text)
        await asyncio.to_thread(self.run.write, EVALUATIONS_SUMMARY, summary)
        self._under_way.pop((snapshot, split), None)
        return entry

    def snapshots_under_way(self) -> set[int]:
        return {snapshot for snapshot, _ in self._under_way}

    def best(self) -> Entry | None:
        """The best of the snapshots that were evaluated to select one; the earliest of equals."""
        found = [e for e in self.entries if e["split"] == "valid" and e["snapshot"] > 0]
        return max(found, key=lambda e: (e["accuracy"], -e["snapshot"]), default=None)

    async def until_done(self) -> None:
        """Return once every evaluation under way has ended."""
        await asyncio.gather(*self._under_way.values())

"""Publishing θ_t: a copy is taken between two steps; it is written and announced beside the training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.models.lora import ADAPTER, adapter_state, merge_adapters, save_adapter
from qcrd_ray.models.student import Item, Student, cut_into_passes, save_student
from qcrd_ray.run_folder import RunFolder
from qcrd_ray.sampling.snapshot import probe, write_description
from qcrd_ray.training.checkpoint import network_state
from qcrd_ray.training.engine import TrainEngine

Announce = Callable[[int, str, str], None]
"""Tells of snapshot `number` in `folder` with `digest`."""


class SnapshotPublisher:
    """One snapshot is written at a time; the next one waits for it, so that no more than one copy lies in memory.

    All ranks call `publish` and `wait`; rank 0 writes.
    """

    def __init__(
        self,
        run: RunFolder,
        config: ExperimentConfig,
        engine: TrainEngine,
        student: Student,
        model: str,
        fence: Callable[[], None],
    ) -> None:
        """
        Args:
            model: folder or name that the student's tokenizer is loaded from.
            fence: raises where this process may write no more.
        """
        self._run, self._engine, self._student, self._fence = run, engine, student, fence
        verified = config.sampler.verify_weights and config.sampled_negatives > 0
        self._probe = probe(run, model, config) if verified else None
        self._budget = config.train.tokens_per_pass
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.seconds = 0.0
        """How long training has stood still for it, copies and waiting included."""
        self.count = 0

    def publish(self, number: int, step: int, announce: Announce) -> None:
        """Take a copy of the student as it is now; write it and announce it beside what follows. A collective.

        A snapshot that is there already, complete, is announced as it is.

        Raises:
            UserError: the snapshot before could not be written.
        """
        begin = time.perf_counter()
        self.wait()
        logprob = self._probe_logprob()
        weights = self._engine.weights()
        if dist.get_rank() == 0 and weights is not None:
            copy = _copied(network_state(weights))
            self._thread = threading.Thread(target=self._write, args=(number, step, copy, logprob, announce))
            self._thread.start()
        self.count += 1
        self.seconds += time.perf_counter() - begin

    def wait(self) -> None:
        """Return once what was published is in the storage. Raises what kept it from getting there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _probe_logprob(self) -> float | None:
        """Mean log-probability of the probe texts, nats a token, as training computes it."""
        if self._probe is None:
            return None
        items = [Item(prompt, [target]) for prompt, target in self._probe]
        total = 0.0
        self._engine.train(False)
        with torch.no_grad():
            for some in cut_into_passes(self._student, items, self._budget, split=False):
                lengths = [len(target) for item in some for target in item.targets]
                total += sum(float(ce) * n for ce, n in zip(self._engine.forward(some), lengths, strict=True))
        self._engine.train(True)
        return -total / sum(len(target) for _, target in self._probe)

    def _write(
        self, number: int, step: int, weights: dict[str, Tensor], logprob: float | None, announce: Announce
    ) -> None:
        name = self._run.snapshot(number)
        try:
            if not self._run.has_folder(name):
                self._fence()
                self._run.write_folder(name, self._filler(number, step, weights, logprob))
            announce(number, name, self._run.digest(name))
        except BaseException as error:
            self._error = error

    def _filler(
        self, number: int, step: int, weights: dict[str, Tensor], logprob: float | None
    ) -> Callable[[Path], None]:
        """What writes the snapshot's files, as often as it is called; the adapters are merged once, here."""
        student, lora = self._student, self._student.lora
        adapters = adapter_state(weights) if lora else {}
        merged = merge_adapters(weights, lora) if lora else weights

        def fill(folder: Path) -> None:
            save_student(student, folder, merged)
            if lora:
                save_adapter(lora, adapters, folder / ADAPTER)
            write_description(folder, number, step, logprob)

        return fill


def _copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU in which what shared its memory (tied embeddings) still does."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    result = {}
    for name, value in weights.items():
        key = (value.data_ptr(), value.shape)
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        result[name] = copies[key]
    return result

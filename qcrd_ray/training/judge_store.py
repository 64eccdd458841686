"""Pretrained discriminators that runs share: one that started from the same, saw the same and did the same is taken.

What is kept is the state after pretraining, weights and moments, so that a run that takes it goes on exactly as the one
that made it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch.distributed as dist

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.rationales.augmentation import AUGMENTED
from qcrd_ray.rationales.tables import open_rationale_table
from qcrd_ray.run_folder import INITIAL_JUDGE, DamagedFolder, RunFolder
from qcrd_ray.storage import LocalStorage
from qcrd_ray.training.checkpoint import StateWriter, load_state, save_state
from qcrd_ray.training.judge import JudgeUpdate, OnlineJudge

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised where the code of pretraining changes what comes out of it."""
STATE, OUTCOME = "judge_optimizer", "pretraining.json"


def open_store(config: ExperimentConfig) -> RunFolder | None:
    """The folder judges/ in `judge.store`, None where there is none."""
    if config.judge.store is None:
        return None
    return RunFolder(config.judge.store, "judges", config.run.storage_timeout_s, "judge.store")


def check_store(config: ExperimentConfig) -> None:
    """Raise UserError where `judge.store` is no storage path, or nothing can be made there. Nothing is written."""
    store = open_store(config)
    if store is None:
        return
    storage = store.storage  # raises for a URI that cannot be opened
    if isinstance(storage, LocalStorage):
        there = next(folder for folder in (storage.base, *storage.base.parents) if folder.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise UserError(
                f"config key judge.store: {there} is no folder that this user may write to; set another one"
            )


def pretraining_key(config: ExperimentConfig, run: RunFolder) -> str:
    """A hash of all that decides a pretrained discriminator: what it starts from, what it sees, how it learns.

    Equal rows in batches of other sizes give another key: then one more is pretrained, and none that is wrong is taken.
    """
    judge, train = config.judge, config.train
    decides = {
        "format": FORMAT,
        "start": run.digest(INITIAL_JUDGE),
        "task": config.task,
        "custom": config.custom.model_dump(),
        "steps": [judge.pretrain_steps, judge.pretrain_batch_size],
        "lr": judge.lr,
        "tokens": [judge.max_tokens, train.tokens_per_pass],
        "seed": train.seed,
        "workers": train.workers,  # each has a dropout of its own
    }
    digest = hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=16)
    for chunk in _seen(run):
        digest.update(chunk)
    return digest.hexdigest()


def _seen(run: RunFolder) -> Iterator[pa.Buffer]:
    """The columns of the tables that pretraining reads."""
    yield from _columns(run.table("train"), ["question", "choices", "positives", "negatives"])
    augmented = run.find_table(f"train.{AUGMENTED}")
    if augmented is not None:
        yield from _columns(augmented, ["negatives"])


def _columns(path: Path, names: list[str]) -> Iterator[pa.Buffer]:
    for batch in open_rationale_table(path).select(names).to_batches():
        # A batch of a memory-mapped file may have unused room in its buffers: it is written anew.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        yield sink.getvalue()


def pretrain(judge: OnlineJudge, config: ExperimentConfig, run: RunFolder) -> JudgeUpdate | None:
    """Pretrain the discriminator, or take one from `judge.store` that was pretrained alike. A collective.

    Returns:
        The last update.

    Raises:
        UserError: the store cannot be read or written.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    store = open_store(config)
    if store is None or not config.judge.pretrain_steps:
        return judge.pretrain(run, rank, world)
    found: list[Any] = [_find(store, config, run) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(found)
    key, there = found[0]
    if there:
        return _take(judge, store.get_folder(key, check=False))
    update = judge.pretrain(run, rank, world)
    # Another run may have made it meanwhile, and a third may be reading that.
    writes = rank == 0 and not store.has_folder(key)
    with store.new_folder(key) if writes else nullcontext() as folder:
        write = StateWriter(store, key, folder)
        save_state(judge.engine, write, STATE)
        outcome = {"steps": judge.pretrained_steps, "update": asdict(update) if update else None}
        write(lambda place: (place / OUTCOME).write_text(json.dumps(outcome), encoding="utf-8"))
    return update


def _find(store: RunFolder, config: ExperimentConfig, run: RunFolder) -> tuple[str, bool]:
    """The key, and whether a complete folder of that name is there; one that is damaged is removed."""
    store.create()
    key = pretraining_key(config, run)
    if not store.has_folder(key):
        return key, False
    try:
        store.get_folder(key)
    except DamagedFolder as error:
        logger.warning("a pretrained discriminator is damaged and is made again: %s", error)
        store.remove(key)
        return key, False
    return key, True


def _take(judge: OnlineJudge, folder: Path) -> JudgeUpdate | None:
    outcome = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    judge.steps = judge.pretrained_steps = int(outcome["steps"])
    judge.reused = True
    load_state(judge.engine, folder, STATE, judge.steps)
    return JudgeUpdate(**outcome["update"]) if outcome["update"] else None

"""Ray Data streams a worker's questions, tokenized, in the order that `DataOrder` fixes.

The rows of a step are known from the seed and the step, so the stream runs over steps: a Ray Data source whose tasks
read the rows of some steps from the memory-mapped table and tokenize them. It starts at any
step, has no end of epoch to wait for, and gives the same batches to any number of workers.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import pyarrow as pa
import ray
import yaml

from qcrd_ray.config import ExperimentConfig, config_from_dict, config_to_yaml
from qcrd_ray.rationales.order import DataOrder
from qcrd_ray.rationales.tables import open_rationale_table, rows_at
from qcrd_ray.run_folder import TOKENIZER, RunFolder
from qcrd_ray.tasks import Task, get_task
from qcrd_ray.tasks.prompts import (
    EXPLAIN,
    PREDICT,
    SEPARATOR,
    StudentTokenizer,
    load_run_tokenizer,
    load_tokenizer,
)

_Item = TypeVar("_Item")

STEPS_PER_BLOCK = 16
WINDOW_QUESTIONS = 2048
"""Questions of a worker in a window; twice as many lie in the object store at most."""
DATA_CPUS = 0.25
"""Logical CPUs of a task that reads and tokenizes, beside what workers and samplers hold."""


@dataclass(frozen=True)
class TrainingRow:
    """One question of a step, ready to train on. Token ids of targets end with the end token unless they were cut."""

    row: int
    id: str
    question: str
    predict: list[int]
    explain: list[int]
    label: list[int]
    positives: list[list[int]]
    positive_texts: list[str]
    minority: list[list[int]]
    minority_texts: list[str]
    first: list[int]
    first_text: str
    cut_prompts: int
    cut_targets: int


@dataclass(frozen=True)
class StepBatch:
    """A rank's share of the global batch of one step."""

    step: int
    epoch: int
    global_size: int
    rows: list[TrainingRow]


@dataclass(frozen=True)
class StreamSpec:
    """What the pipeline's tasks need; small, sent to each of them.

    Attributes:
        run: holds the training table and the student's tokenizer.
    """

    run: RunFolder
    config: ExperimentConfig
    rank: int
    world: int


def stream_batches(spec: StreamSpec, start_step: int, max_steps: int) -> Iterator[StepBatch]:
    """Batches of the steps start_step..max_steps-1 for one worker, tokenized ahead of the training step.

    The first block is asked for at once, and each one turned into batches while those of the one before it are used.
    """
    blocks = _BlocksAhead(spec, range(start_step, max_steps))
    ahead = _one_ahead(map(_batches, blocks))

    def batches() -> Iterator[StepBatch]:
        with blocks:
            for found in ahead:
                yield from found

    return batches()


def _batches(block: Any) -> list[StepBatch]:
    steps = ray.get(block).to_pylist()
    return [StepBatch(rows=[TrainingRow(**row) for row in step.pop("rows")], **step) for step in steps]


def _one_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """The same items. Each is made, in a thread, when the one before it is handed out; the first one at once."""
    end = object()
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    made: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def make() -> None:
        while wanted.get():
            try:
                made.put((next(items, end), None))
            except BaseException as error:
                made.put((end, error))

    def handed_out() -> Iterator[_Item]:
        try:
            while True:
                item, error = made.get()
                if error is not None:
                    raise error
                if item is end:
                    return
                wanted.put(True)
                yield item
        finally:
            wanted.put(False)

    # One thread for all: to start one, its starter waits until it runs, and then for the interpreter that it holds.
    threading.Thread(target=make, name="next-batches", daemon=True).start()
    wanted.put(True)
    return handed_out()


class _BlocksAhead:
    """References to tables of the steps, in order, by a thread that is up to two windows of them ahead.

    The steps are cut into windows, each a data set of its own, whose blocks are taken as soon as they are there. A data
    set that had to wait for a slow consumer would keep its scheduler looking for work in this process, all the time.
    """

    def __init__(self, spec: StreamSpec, steps: range) -> None:
        share = -(-spec.config.train.batch_size // spec.world)
        window = STEPS_PER_BLOCK * max(1, WINDOW_QUESTIONS // (share * STEPS_PER_BLOCK))
        self._spec = spec
        self._windows = [steps[first : first + window] for first in range(0, len(steps), window)]
        self._found: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room = threading.Semaphore(2)
        self._closed = False
        threading.Thread(target=self._run, name="blocks-ahead", daemon=True).start()

    def __enter__(self) -> _BlocksAhead:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread, and whoever waits for what it finds."""
        self._closed = True
        self._room.release()
        self._found.put(None)

    def __iter__(self) -> Iterator[Any]:
        for _ in self._windows:
            while (found := self._found.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                yield found
            if self._closed:
                return
            self._room.release()

    def _run(self) -> None:
        try:
            for steps in self._windows:
                self._room.acquire()
                if self._closed:
                    return
                first = steps is self._windows[0]
                for bundle in _dataset(self._spec, steps, 1 if first else None).iter_internal_ref_bundles():
                    for block in bundle.block_refs:
                        ray.wait([block], timeout=0)  # a block of another node sets out for this one
                        self._found.put(block)
                    if self._closed:
                        return
                self._found.put(None)
        except BaseException as error:
            self._found.put(error)


def _dataset(spec: StreamSpec, steps: range, at_once: int | None) -> Any:
    """A block for every few steps.

    Args:
        at_once: tasks that read at a time, None for as many as there is room for. Each may take a new process, which
            imports for seconds; while training starts, whose imports need the same cores, one has to do.
    """
    import ray.data

    dataset = ray.data.read_datasource(
        _steps_source(spec, steps.start, steps.stop),
        override_num_blocks=-(-len(steps) // STEPS_PER_BLOCK),
        num_cpus=DATA_CPUS,
        concurrency=at_once,
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return dataset


def _steps_source(spec: StreamSpec, start_step: int, max_steps: int) -> Any:
    """A Ray Data source whose every read task gives the tokenized batches of some steps."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Steps(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            tasks = []
            for first in range(start_step, max_steps, STEPS_PER_BLOCK):
                steps = range(first, min(first + STEPS_PER_BLOCK, max_steps))
                metadata = BlockMetadata(num_rows=len(steps), size_bytes=None, exec_stats=None, input_files=None)
                tasks.append(ReadTask(partial(_read, steps, spec), metadata, schema=_SCHEMA))
            return tasks

    return Steps()


def _read(steps: range, spec: StreamSpec) -> list[pa.Table]:
    return [read_steps(steps, spec)]


def read_steps(numbers: Iterable[int], spec: StreamSpec) -> pa.Table:
    """A row a step, with the rank's questions as a list of structs."""
    table, order = training_table(spec.run, spec.config)
    tools = _run_tools(spec.run, config_to_yaml(spec.config))
    shares = {step: [int(row) for row in order.share(step, spec.rank, spec.world)] for step in numbers}
    wanted = [row for share in shares.values() for row in share]
    rows = iter(_tokenize(wanted, rows_at(table, wanted), spec.config, tools))
    steps = [
        {
            "step": step,
            "epoch": order.epoch_of(step),
            "global_size": len(order.batch(step)),
            "rows": [vars(row) for row in itertools.islice(rows, len(share))],
        }
        for step, share in shares.items()
    ]
    return pa.Table.from_pylist(steps, schema=_SCHEMA)


@lru_cache(maxsize=4)
def _open(run: RunFolder, batch_size: int, seed: int) -> tuple[pa.Table, DataOrder]:
    table = open_rationale_table(run.table("train"))
    return table, DataOrder(table.num_rows, batch_size, seed)


def training_table(run: RunFolder, config: ExperimentConfig) -> tuple[pa.Table, DataOrder]:
    """A run's training table, and its order under the config's seed and batch size."""
    return _open(run, config.train.batch_size, config.train.seed)


@lru_cache(maxsize=2)
def _run_tools(run: RunFolder, config_yaml: str) -> tuple[StudentTokenizer, Task]:
    """What a run's rows are tokenized with, made once a process."""
    config = _parsed(config_yaml)
    return load_run_tokenizer(str(run.get_folder(TOKENIZER)), config.student), get_task(config)


@lru_cache(maxsize=2)
def _tools(model: str, config_yaml: str) -> tuple[StudentTokenizer, Task]:
    config = _parsed(config_yaml)
    return load_tokenizer(model, config.student), get_task(config)


def _parsed(config_yaml: str) -> ExperimentConfig:
    return config_from_dict(yaml.safe_load(config_yaml))


def student_tools(model: str, config: ExperimentConfig) -> tuple[StudentTokenizer, Task]:
    """What a student is asked with, made once a process."""
    return _tools(model, config_to_yaml(config))


def _decoded(tokenizer: StudentTokenizer, ids: Sequence[int]) -> str:
    """Text of ids that may end within a character."""
    return tokenizer.decode(list(ids)).rstrip("\ufffd")


def _tokenize(
    rows: Sequence[int],
    records: Sequence[Mapping[str, Any]],
    config: ExperimentConfig,
    tools: tuple[StudentTokenizer, Task],
) -> list[TrainingRow]:
    """All texts of one kind in one call, which costs half of a call for each."""
    tokenizer, task = tools
    limits = config.student
    texts = [task.student_input(record["question"], record["choices"]) for record in records]
    predict, explain = tokenizer.prompts(PREDICT, texts), tokenizer.prompts(EXPLAIN, texts)
    if config.method == "single_task":
        [separator] = tokenizer.targets([SEPARATOR], limits.max_rationale_tokens)
        label_limit = limits.max_rationale_tokens + len(separator.ids) + limits.max_label_tokens
        firsts = [record["sample0"] for record in records]
        cut = tokenizer.targets(firsts, limits.max_rationale_tokens)
        # The label stands behind a long rationale too: what is too long of that is left out, not the label.
        firsts = [_decoded(tokenizer, t.ids) if t.cut else text for t, text in zip(cut, firsts, strict=True)]
        joined = [f"{first}{SEPARATOR}{r['sample0_label']}" for first, r in zip(firsts, records, strict=True)]
    else:
        label_limit, joined = limits.max_label_tokens, [record["label"] for record in records]
    labels = tokenizer.targets(joined, label_limit)
    rationales = [(*r["positives"], *r["negatives"], r["sample0"]) for r in records]
    targets = iter(tokenizer.targets([text for own in rationales for text in own], limits.max_rationale_tokens))
    found = []
    for number, (row, record, own) in enumerate(zip(rows, records, rationales, strict=True)):
        of_row = list(itertools.islice(targets, len(own)))
        ids, positives = [target.ids for target in of_row], len(record["positives"])
        found.append(
            TrainingRow(
                row=row,
                id=record["id"],
                question=texts[number],
                predict=predict[number][0],
                explain=explain[number][0],
                label=labels[number].ids,
                positives=ids[:positives],
                positive_texts=record["positives"],
                minority=ids[positives:-1],
                minority_texts=record["negatives"],
                first=ids[-1],
                first_text=record["sample0"],
                cut_prompts=int(predict[number][1]) + int(explain[number][1]),
                cut_targets=sum(target.cut for target in [labels[number], *of_row]),
            )
        )
    return found


_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.int64()),
        ("global_size", pa.int64()),
        (
            "rows",
            pa.list_(
                pa.struct(
                    [
                        ("row", pa.int64()),
                        ("id", pa.string()),
                        ("question", pa.string()),
                        ("predict", _IDS),
                        ("explain", _IDS),
                        ("label", _IDS),
                        ("positives", pa.list_(_IDS)),
                        ("positive_texts", pa.list_(pa.string())),
                        ("minority", pa.list_(_IDS)),
                        ("minority_texts", pa.list_(pa.string())),
                        ("first", _IDS),
                        ("first_text", pa.string()),
                        ("cut_prompts", pa.int32()),
                        ("cut_targets", pa.int32()),
                    ]
                )
            ),
        ),
    ]
)

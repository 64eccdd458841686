"""From a source to the tables that a student trains on, through Ray Data, in the order of the source.

    reader ──blocks──▶ map_batches: sample (a live teacher), vote ──in order──▶ Parquet parts and one Arrow file

The Parquet tables are for exchange; training reads `train.arrow`, an uncompressed Arrow file, by row through a memory
map. All is written under a temporary name and renamed; `counts.json` comes last and says that the tables are complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import qcrd_ray.tasks
from qcrd_ray.config import ExperimentConfig, config_to_yaml
from qcrd_ray.errors import UserError
from qcrd_ray.rationales.counts import (
    Counts,
    Drops,
    HeldOutCounts,
    TrainCounts,
    TrainTally,
    describe_drops,
)
from qcrd_ray.rationales.schema import (
    HELD_OUT,
    QUESTIONS_WITH_SAMPLES,
    RATIONALE_SETS,
    TEACHER_SAMPLES,
    Question,
    TeacherSample,
)
from qcrd_ray.rationales.self_consistency import RationaleSet, vote_and_tally
from qcrd_ray.rationales.sources import (
    BATCH_ROWS,
    check_teachers,
    read_rows,
    read_split_with_error_row,
    source_fingerprint,
    splits_available,
)
from qcrd_ray.tasks import Task, get_task

log = logging.getLogger(__name__)

TRAIN = "train"
ARROW_BATCH_ROWS = 1024
PARQUET_PART_ROWS = 16_384
RECORDED = "recorded"
_BLOCK_BYTES = 4 << 20

_COUNTED = ("recorded", "too_long", "empty", "orphans", "voted", "parsed", "majority", "right")
_VOTED = pa.schema(
    [
        *(field.with_nullable(True) for field in RATIONALE_SETS),
        QUESTIONS_WITH_SAMPLES.field("samples").with_nullable(True),
        pa.field("error", pa.string()),
        pa.field("reason", pa.string()),
        *(pa.field(name, pa.int32()) for name in _COUNTED),
    ]
)
"""What the voting stage gives: a row of `rationale_sets` or the reason why there is none, the samples, the counts."""


class Teacher(Protocol):
    """A teacher that is asked as the tables are made. It is sent to Ray's workers."""

    name: str
    simulated: bool
    fingerprint: str

    def sample(self, task: Task, question: Question) -> list[TeacherSample]: ...


def prepare_tables(config: ExperimentConfig, output: Path, teacher: Teacher | None = None) -> Counts:
    """Write all tables of a source into a folder, or reuse those that are there.

    Folder: `teacher_samples/*.parquet`, `rationale_sets/*.parquet`, `train.arrow` (`RATIONALE_SETS`), `valid.arrow`
    and `test.arrow` (`HELD_OUT`) for the splits there are, `config.yaml`, `counts.json`.

    Args:
        teacher: makes the samples; None takes the recorded ones.

    Raises:
        UserError: a source that cannot be read or of which nothing can be used. The folder is left as it was.
    """
    task = get_task(config)
    splits = splits_available(config)
    if TRAIN not in splits:
        next(read_rows(config, task, TRAIN))  # raises, with what is there
        raise UserError(f"config key data.path: {config.data.path} has no training split")
    fingerprint = _fingerprint(config, teacher)
    if (counts := _existing(output, fingerprint, splits)) is not None:
        log.info("tables in %s are up to date, %d rationale sets are reused", output, counts.train.used)
        return counts.model_copy(update={"reused": True})
    if teacher is not None and teacher.simulated:
        log.info("the teacher is simulated: %s", teacher.name)

    with _staging(output) as staging:
        train = write_rationale_sets(config, task, TRAIN, staging, teacher)
        held_out = {
            split: write_held_out(config, task, split, staging / f"{split}.arrow") for split in splits if split != TRAIN
        }
        counts = Counts(
            fingerprint=fingerprint,
            task=config.task,
            teacher=teacher.name if teacher is not None else RECORDED,
            simulated=teacher is not None and teacher.simulated,
            train=train,
            held_out=held_out,
        )
        (staging / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
        (staging / "counts.json").write_text(counts.model_dump_json(indent=1), encoding="utf-8")
        _publish(staging, output)
    log.info("%s: %d of %d questions used; %s", output, train.used, train.questions, describe_drops(train.dropped))
    return counts


def write_rationale_sets(
    config: ExperimentConfig, task: Task, split: str, out_dir: Path, teacher: Teacher | None = None
) -> TrainCounts:
    """Vote over a split and write `teacher_samples/`, `rationale_sets/` and `<split>.arrow` into a folder.

    Rows keep the order of the source. With `data.limit` the reading ends at the last question used.
    """
    tally = TrainTally(config.teacher.samples)
    limit = config.data.limit
    reached = False
    with (
        _ParquetParts(out_dir / "teacher_samples", TEACHER_SAMPLES) as samples,
        _ParquetParts(out_dir / "rationale_sets", RATIONALE_SETS) as sets,
        _ArrowFile(out_dir / f"{split}.arrow", RATIONALE_SETS) as arrow,
    ):
        for voted in _voted_blocks(config, split, teacher):
            block = voted
            errors = block["error"].drop_null().to_pylist()
            if errors:
                block = block.filter(block["error"].is_null())
            if limit is not None:
                block, reached = _first_used(block, limit - tally.used)
            flat = _flat_samples(block)
            tally.add(block, pc.unique(flat["teacher"]).drop_null().to_pylist())
            samples.write(flat)
            used = block.filter(block["reason"].is_null()).select(RATIONALE_SETS.names).cast(RATIONALE_SETS)
            sets.write(used)
            arrow.write(used)
            if reached:
                break
            if errors:
                raise UserError(errors[0])
    counts = tally.result()
    if reached and teacher is None and set(config.data.teachers or ()) - set(counts.teachers):
        check_teachers(config, task, split)
    if not counts.used:
        raise UserError(
            f"no question of the split {split!r} in {config.data.path} can be used: {describe_drops(counts.dropped)}; "
            f"samples left out: {counts.too_long} too long, {counts.empty} empty"
        )
    return counts


def write_held_out(config: ExperimentConfig, task: Task, split: str, path: Path) -> HeldOutCounts:
    """Write the questions of a held-out split as an Arrow file; those without a usable gold answer are counted."""
    drops = Drops()
    questions = used = 0
    with _ArrowFile(path, HELD_OUT) as arrow:
        rows: list[dict[str, Any]] = []
        for source in read_rows(config, task, split, samples=False):
            if used == config.data.eval_limit:
                break
            questions += 1
            question = source.question
            gold = question.answer if question.answer is not None else question.target
            if gold is None or task.canonical_answer(gold, question.choices) is None:
                drops.add("no_gold_answer", question.id)
                continue
            used += 1
            label = task.default_target(gold, question.target)
            row = {"id": question.id, "question": question.question, "choices": question.choices}
            rows.append({**row, "answer": gold, "label": label})
            if len(rows) == BATCH_ROWS:
                arrow.write(pa.Table.from_pylist(rows, schema=HELD_OUT))
                rows = []
        if rows:
            arrow.write(pa.Table.from_pylist(rows, schema=HELD_OUT))
    counts = HeldOutCounts(questions=questions, used=used, dropped=drops.result())
    if not used:
        raise UserError(
            f"no question of the split {split!r} in {config.data.path} can be used: {describe_drops(counts.dropped)}"
        )
    return counts


def open_rationale_table(path: str | Path) -> pa.Table:
    """A table of `prepare_tables`, memory-mapped: rows are read from the file as they are touched.

    Raises:
        UserError: a file that is missing or no Arrow file.
    """
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except FileNotFoundError:
        raise UserError(f"table {path}: not found") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"table {path}: no Arrow file: {error}") from None


def rows_at(table: pa.Table, rows: Iterable[int]) -> list[dict[str, Any]]:
    """Rows of a memory-mapped table by index. `Table.take` would read whole columns for the same."""
    return [row for index in rows for row in table.slice(int(index), 1).to_pylist()]


# The pipeline.


def _voted_blocks(config: ExperimentConfig, split: str, teacher: Teacher | None) -> Iterator[pa.Table]:
    import ray
    from ray.data import DataContext

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    context = DataContext.get_current()
    before = (
        context.execution_options.preserve_order,
        context.target_max_block_size,
        context.enable_progress_bars,
        context.print_on_execution_start,
    )
    # A data set copies the context as it is made: order is kept, and blocks are small enough to stream.
    context.execution_options.preserve_order = True
    context.target_max_block_size = _BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        rows = ray.data.read_datasource(_datasource(config, split, teacher is None), num_cpus=0, override_num_blocks=1)
        voted = rows.map_batches(
            _vote_batch,
            batch_format="pyarrow",
            batch_size=BATCH_ROWS,
            fn_kwargs={"config": config, "teacher": teacher},
        )
        for block in voted.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            yield block.select(_VOTED.names).cast(_VOTED)
    finally:
        (
            context.execution_options.preserve_order,
            context.target_max_block_size,
            context.enable_progress_bars,
            context.print_on_execution_start,
        ) = before


def _datasource(config: ExperimentConfig, split: str, samples: bool) -> Any:
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    def read() -> Iterable[pa.Table]:
        task = get_task(config)
        for batch in read_split_with_error_row(config, task, split, samples):
            yield pa.Table.from_batches([batch])

    class Questions(Datasource):
        """One read task, on the driver's node, where the user's files are (a head node may have no CPU to give)."""

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
            return [ReadTask(read, metadata, schema=QUESTIONS_WITH_SAMPLES)]

        @property
        def supports_distributed_reads(self) -> bool:
            return False

    return Questions()


def _vote_batch(batch: pa.Table, config: ExperimentConfig, teacher: Teacher | None) -> pa.Table:
    task = get_task(config)
    return pa.Table.from_pylist([_voted_row(row, task, config, teacher) for row in batch.to_pylist()], schema=_VOTED)


def _voted_row(row: dict[str, Any], task: Task, config: ExperimentConfig, teacher: Teacher | None) -> dict[str, Any]:
    if row["error"] is not None:
        return {"error": row["error"]}
    question = Question(
        id=row["id"],
        question=row["question"],
        answer=row["answer"],
        target=row["target"],
        choices=tuple(row["choices"]) if row["choices"] is not None else None,
    )
    if teacher is None:
        samples = [TeacherSample(**sample) for sample in row["samples"]]
    else:
        samples = teacher.sample(task, question)
    result, tally = vote_and_tally(question, samples, task, config)
    voted = asdict(result) if isinstance(result, RationaleSet) else {"reason": result.reason}
    return {
        **voted,
        "id": question.id,
        "votes_gold": tally.votes_gold,
        "samples": [asdict(sample) for sample in samples],
        "recorded": len(samples),
        "too_long": row["too_long"],
        "empty": row["empty"],
        "orphans": row["orphans"],
        "voted": tally.samples,
        "parsed": tally.parsed,
        "majority": tally.majority,
        "right": tally.right,
    }


def _first_used(block: pa.Table, wanted: int) -> tuple[pa.Table, bool]:
    """The block up to its `wanted`-th used row, and whether that row is in it."""
    used = 0
    for index, reason in enumerate(block["reason"].to_pylist()):
        used += reason is None
        if used == wanted:
            return block.slice(0, index + 1), True
    return block, False


def _flat_samples(block: pa.Table) -> pa.Table:
    """Rows of `teacher_samples`; the place in a question's list is the `sample_index`."""
    tables = []
    for batch in block.select(["id", "samples"]).to_batches():
        lists = batch["samples"]
        parents = pc.list_parent_indices(lists)
        lengths = pc.list_value_length(lists).fill_null(0).to_pylist()
        index = pa.array([i for length in lengths for i in range(length)], pa.int32())
        values = pc.list_flatten(lists)
        columns = {"id": pc.take(batch["id"], parents), "sample_index": index}
        for field in values.type:
            columns[field.name] = pc.struct_field(values, field.name)
        tables.append(pa.table(columns).select(TEACHER_SAMPLES.names).cast(TEACHER_SAMPLES))
    return pa.concat_tables(tables) if tables else TEACHER_SAMPLES.empty_table()


# Files.


class _Chunks:
    """Cuts a stream of tables into pieces of a fixed number of rows, so that files do not depend on block sizes."""

    def __init__(self, rows: int, schema: pa.Schema, sink: Callable[[pa.Table], None]) -> None:
        self._rows, self._sink = rows, sink
        self._held = schema.empty_table()

    def write(self, table: pa.Table) -> None:
        self._held = pa.concat_tables([self._held, table])
        while self._held.num_rows >= self._rows:
            self._sink(self._held.slice(0, self._rows).combine_chunks())
            self._held = self._held.slice(self._rows)

    def flush(self) -> None:
        if self._held.num_rows:
            self._sink(self._held.combine_chunks())


class _ParquetParts:
    """Parquet files `part-00000.parquet` and so on; one at least, so that an empty table has its schema."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True)
        self._folder, self._schema = folder, schema
        self._parts = 0
        self._chunks = _Chunks(PARQUET_PART_ROWS, schema, self._write_part)

    def _write_part(self, table: pa.Table) -> None:
        pq.write_table(table, self._folder / f"part-{self._parts:05d}.parquet")
        self._parts += 1

    def write(self, table: pa.Table) -> None:
        self._chunks.write(table)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._chunks.flush()
            if not self._parts:
                self._write_part(self._schema.empty_table())


class _ArrowFile:
    """An uncompressed Arrow file in batches of a fixed number of rows."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pa.ipc.new_file(str(path), schema)
        self._chunks = _Chunks(ARROW_BATCH_ROWS, schema, self._writer.write_table)

    def write(self, table: pa.Table) -> None:
        self._chunks.write(table)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._chunks.flush()
        self._writer.close()


@contextlib.contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A temporary folder inside `output`, gone at the end; so are the folders made for it, if nothing came of it."""
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    _remove_stale(output)
    staging = output / f".tables-{socket.gethostname()}-{os.getpid()}.tmp"
    try:
        staging.mkdir()
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where it is empty


def _remove_stale(output: Path) -> None:
    """Remove what killed processes of this host left."""
    for folder in output.glob(f".tables-{socket.gethostname()}-*.tmp"):
        process = folder.name.removesuffix(".tmp").rsplit("-", 1)[1]
        if not process.isdigit():
            continue
        try:
            os.kill(int(process), 0)  # signal 0 only asks whether the process is there
            alive = int(process) != os.getpid()
        except (ProcessLookupError, OverflowError):
            alive = False
        except PermissionError:
            alive = True
        if not alive:
            shutil.rmtree(folder, ignore_errors=True)


def _publish(staging: Path, output: Path) -> None:
    """Move the tables to their names; between the first and the last move there is no `counts.json`."""
    (output / "counts.json").unlink(missing_ok=True)
    for split in ("valid", "test"):
        (output / f"{split}.arrow").unlink(missing_ok=True)
    for source in sorted(staging.iterdir(), key=lambda path: path.name == "counts.json"):
        target = output / source.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(source, target)


def _existing(output: Path, fingerprint: str, splits: tuple[str, ...]) -> Counts | None:
    try:
        counts = Counts.model_validate_json((output / "counts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = all((output / f"{split}.arrow").is_file() for split in splits)
    return counts if whole and counts.fingerprint == fingerprint else None


def _fingerprint(config: ExperimentConfig, teacher: Teacher | None) -> str:
    """A hash of all that decides what is in the tables: config, input files, teacher, and the code of the way."""
    decides = {
        "task": config.task,
        "custom": config.custom.model_dump(),
        "data": config.data.model_dump(exclude={"path"}),
        "teacher": config.teacher.model_dump(),
        "positives": config.positives,
        "labels": config.labels,
        "uses_rationales": config.uses_rationales,
        "single_task": config.method == "single_task",
        "source": source_fingerprint(config),
        "made_by": teacher.fingerprint if teacher is not None else RECORDED,
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    here = Path(__file__).parent
    code = [here / f"{name}.py" for name in ("counts", "schema", "self_consistency", "sources", "tables")]
    for path in code + sorted(Path(str(qcrd_ray.tasks.__file__)).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()

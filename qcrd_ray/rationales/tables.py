"""From a source to the tables that a student trains on, through Ray Data, in the order of the source.

    reader ──chunks──▶ map_batches: parse, sample (a scripted teacher), vote ──in order──▶ Parquet parts, one Arrow file
                            ▲
    flat or stored samples ─┴─ a sample_index in the same folder, made first, also by a Ray Data job

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
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import qcrd_ray.tasks
from qcrd_ray.config import ExperimentConfig, config_to_yaml
from qcrd_ray.errors import UserError
from qcrd_ray.rationales.augmentation import AUGMENTED, augmentation_tagger, write_augmented
from qcrd_ray.rationales.columns import Columns
from qcrd_ray.rationales.counts import (
    IDS_SHOWN,
    Counts,
    DroppedCount,
    Drops,
    HeldOutCounts,
    TrainCounts,
    TrainTally,
    describe_drops,
)
from qcrd_ray.rationales.raw_chunks import CHUNKS, chunks_as_tables, chunks_of_table, file_chunks, raw_chunks
from qcrd_ray.rationales.ray_data import stream_tables
from qcrd_ray.rationales.sample_index import PartWriter, SampleIndex, StoredGroup, merge, stored_groups
from qcrd_ray.rationales.schema import HELD_OUT, RATIONALE_SETS, TEACHER_SAMPLES, Question
from qcrd_ray.rationales.sources import (
    SeenIds,
    SplitReader,
    StoredLookup,
    check_teachers,
    empty_split,
    flat_table,
    read_rows,
    sample_columns,
    source_fingerprint,
    splits_available,
    stands_twice,
)
from qcrd_ray.rationales.table_files import (
    ARROW_BATCH_ROWS,
    ArrowFile,
    ParquetParts,
    open_rationale_table,
    rows_at,
)
from qcrd_ray.rationales.taggers import NONE
from qcrd_ray.rationales.voting import VOTED, AskedTeacher, InlineTeacher, VotingStage
from qcrd_ray.run_folder import is_running
from qcrd_ray.seeding import stable_hash
from qcrd_ray.tasks import Task, get_task

__all__ = [
    "InlineTeacher",
    "StoredTeacher",
    "Teacher",
    "existing_tables",
    "open_rationale_table",
    "prepare_tables",
    "rows_at",
    "write_held_out",
    "write_rationale_sets",
]

log = logging.getLogger(__name__)

TRAIN = "train"
RECORDED = "recorded"
BEYOND_SHARE = "beyond_share"
"""Why a usable question is not used: `data.share`."""
_LEAST_INDEX_BYTES, _MOST_INDEX_BYTES, _INDEX_PARTS = 8 << 20, 64 << 20, 64
"""A flat table becomes about that many parts of its index, of that many bytes each: a look-up opens all it needs."""
_INDEXED_PART = pa.schema([pa.field("error", pa.string())])


@runtime_checkable
class StoredTeacher(AskedTeacher, Protocol):
    """A live teacher whose samples are kept in Parquet parts (`STORED_SAMPLES`), which Ray's workers can read."""

    @property
    def parts(self) -> tuple[Path, ...]: ...

    @property
    def temperature(self) -> float: ...

    def key(self, task: Task, question: Question) -> int: ...


Teacher = InlineTeacher | StoredTeacher


def prepare_tables(config: ExperimentConfig, output: Path, teacher: Teacher | None = None) -> Counts:
    """Write all tables of a source into a folder, or reuse those that are there.

    Folder: `teacher_samples/*.parquet`, `rationale_sets/*.parquet`, `train.arrow` (`RATIONALE_SETS`), `valid.arrow`
    and `test.arrow` (`HELD_OUT`) for the splits there are, `config.yaml`, `counts.json`; where a discriminator is to be
    pretrained, `augmented_negatives/*.parquet` and `train.augmented.arrow` too (`augmentation`).

    Args:
        teacher: makes the samples, or has made them; None takes the recorded ones.

    Raises:
        UserError: a source that cannot be read or of which nothing can be used. The folder is left as it was.
    """
    task = get_task(config)
    splits = splits_available(config)
    if TRAIN not in splits:
        next(read_rows(config, task, TRAIN))  # raises, with what is there
        raise UserError(f"config key data.path: {config.data.path} has no training split")
    config = _decided(config, task, teacher)
    fingerprint = _fingerprint(config, teacher)
    if (counts := _existing(output, splits)) is not None and counts.fingerprint == fingerprint:
        log.info("tables in %s are up to date, %d rationale sets are reused", output, counts.train.used)
        return counts.model_copy(update={"reused": True})
    tagger = augmentation_tagger(config)
    if teacher is not None and teacher.simulated:
        log.info("the teacher is simulated: %s", teacher.name)

    with _staging(output) as staging:
        train = write_rationale_sets(config, task, TRAIN, staging, teacher)
        held_out = {
            split: write_held_out(config, task, split, staging / f"{split}.arrow") for split in splits if split != TRAIN
        }
        augmented = write_augmented(config, TRAIN, staging, tagger) if tagger != NONE else None
        counts = Counts(
            fingerprint=fingerprint,
            asked=_asked(config, teacher),
            task=config.task,
            teacher=teacher.name if teacher is not None else RECORDED,
            simulated=teacher is not None and teacher.simulated,
            train=train,
            held_out=held_out,
            augmented=augmented,
        )
        (staging / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
        (staging / "counts.json").write_text(counts.model_dump_json(indent=1), encoding="utf-8")
        _publish(staging, output)
    log.info("%s: %d of %d questions used; %s", output, train.used, train.questions, describe_drops(train.dropped))
    return counts


def _decided(config: ExperimentConfig, task: Task, teacher: Teacher | None) -> ExperimentConfig:
    """The config with `data.unanswered=auto` as drop or keep, where that makes a difference."""
    recorded = teacher is None and config.teacher.engine == RECORDED
    if config.data.unanswered != "auto" or config.needs_samples or not recorded:
        return config
    answered = flat_table(config, TRAIN) is not None or any(row.samples for row in read_rows(config, task, TRAIN))
    data = config.data.model_copy(update={"unanswered": "drop" if answered else "keep"})
    return config.model_copy(update={"data": data})


def trained_questions(output: Path) -> int | None:
    """Rows of the training table that is there, None without one that can be read, whatever made it."""
    table = output / f"{TRAIN}.arrow"
    try:
        return open_rationale_table(table).num_rows if table.is_file() else None
    except UserError:
        return None


def existing_tables(config: ExperimentConfig, output: Path, teacher: Teacher | None = None) -> Counts | None:
    """The counts of tables that are there and that this config and this teacher would ask for; None without them.

    Whether a live teacher has been given more samples since does not matter here.
    """
    counts = _existing(output, splits_available(config))
    if counts is None or counts.asked != _asked(config, teacher):
        return None
    return counts.model_copy(update={"reused": True})


def write_rationale_sets(
    config: ExperimentConfig, task: Task, split: str, out_dir: Path, teacher: Teacher | None = None
) -> TrainCounts:
    """Vote over a split and write `teacher_samples/`, `rationale_sets/` and `<split>.arrow` into a folder.

    Rows keep the order of the source. With `data.limit` the reading ends at the last question used; that of a teacher
    that is asked at the last question asked, used or not. With `data.share` the two tables of rationale sets hold that
    share of the usable questions; the samples, and the statistics over them, are those of all.
    """
    tally = TrainTally(config.teacher.samples)
    limit = config.data.limit
    wanted = set(config.data.teachers or ()) if teacher is None else set()
    seen, known = SeenIds(), set[str]()
    reached = False
    with (
        _index(config, split, out_dir, teacher) as index,
        ParquetParts(out_dir / "teacher_samples", TEACHER_SAMPLES) as samples,
        ParquetParts(out_dir / "rationale_sets", RATIONALE_SETS) as sets,
        ArrowFile(out_dir / f"{split}.arrow", RATIONALE_SETS) as arrow,
    ):
        for voted in _voted_blocks(config, split, teacher, index):
            block, error = _good_rows(config, split, seen, voted)
            known.update(*block["teachers"].drop_null().to_pylist())
            if not reached:
                if limit is not None:
                    asked = limit - (tally.used if teacher is None else tally.questions)
                    block, reached = _first_used(block, asked) if teacher is None else _first(block, asked)
                flat = _flat_samples(block)
                tally.add(block, pc.unique(flat["teacher"]).drop_null().to_pylist())
                samples.write(flat)
                used = block.filter(block["reason"].is_null()).select(RATIONALE_SETS.names).cast(RATIONALE_SETS)
                sets.write(used)
                arrow.write(used)
            if reached and not wanted - known:
                break
            if error is not None:
                raise UserError(error)
        if not tally.questions:
            raise UserError(empty_split(config, split))
        if index is not None and teacher is None and not reached:
            tally.orphans = index.count_others(seen.sorted())
    if wanted:
        check_teachers(config, known)
    counts = tally.result()
    if config.data.share < 1.0 and counts.used:
        left_out = _keep_share(out_dir, split, config.data.share)
        dropped = DroppedCount(count=len(left_out), ids=tuple(left_out[:IDS_SHOWN]))
        counts = counts.model_copy(
            update={"used": counts.used - len(left_out), "dropped": {**counts.dropped, BEYOND_SHARE: dropped}}
        )
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
    with ArrowFile(path, HELD_OUT) as arrow:
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
            if len(rows) == ARROW_BATCH_ROWS:
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


# The pipeline.


@contextlib.contextmanager
def _index(
    config: ExperimentConfig, split: str, out_dir: Path, teacher: Teacher | None
) -> Iterator[SampleIndex | None]:
    """The index of the samples that lie beside the questions, beside the tables until they are done."""
    table = flat_table(config, split) if teacher is None else None
    if table is None and not isinstance(teacher, StoredTeacher):
        yield None
        return
    folder = (out_dir / "index").absolute()
    folder.mkdir()
    writer = PartWriter(folder)
    if table is not None:
        read = partial(_read_file, table)
        transform = partial(_index_block, writer=writer, columns=sample_columns(config))
        blocks = stream_tables([read], CHUNKS, transform, here=True)
    else:
        assert isinstance(teacher, StoredTeacher)
        groups = stored_groups(teacher.parts)
        limits = (config.teacher.samples, config.data.max_rationale_chars)
        blocks = stream_tables([partial(_index_group, group, writer, *limits) for group in groups], _INDEXED_PART)
    for block in blocks:
        for error in block["error"].drop_null().to_pylist():
            raise UserError(error)
    index = merge(folder)
    try:
        yield index
    finally:
        index.remove()


def _read_file(path: Path) -> Iterable[pa.Table]:
    part = min(_MOST_INDEX_BYTES, max(_LEAST_INDEX_BYTES, path.stat().st_size // _INDEX_PARTS))
    return chunks_as_tables(file_chunks(path, part))


def _index_block(block: pa.Table, writer: PartWriter, columns: Columns) -> pa.Table:
    errors = [writer.write_chunk(chunk, columns) for chunk in chunks_of_table(block)]
    return pa.table([pa.array(errors, pa.string())], schema=_INDEXED_PART)


def _index_group(group: StoredGroup, writer: PartWriter, samples: int, max_chars: int) -> Iterable[pa.Table]:
    error = None
    try:
        writer.write_stored(group, samples, max_chars)
    except UserError as wrong:
        error = str(wrong)
    return [pa.table([pa.array([error], pa.string())], schema=_INDEXED_PART)]


def _voted_blocks(
    config: ExperimentConfig, split: str, teacher: Teacher | None, index: SampleIndex | None
) -> Iterator[pa.Table]:
    inline, stored = None, None
    if isinstance(teacher, StoredTeacher):
        assert index is not None
        stored = StoredLookup(index, teacher.key, teacher.name, teacher.temperature, teacher.fingerprint)
    else:
        inline = teacher
    reader = SplitReader(config, split, inline is None, index if stored is None else None, stored)
    limit = config.data.limit if teacher is not None else None
    read = partial(_read_split, config, split, limit)
    return stream_tables([read], CHUNKS, VotingStage(config, reader, inline), here=True)


def _read_split(config: ExperimentConfig, split: str, limit: int | None) -> Iterable[pa.Table]:
    return chunks_as_tables(raw_chunks(config, split, limit))


def _good_rows(config: ExperimentConfig, split: str, seen: SeenIds, voted: pa.Table) -> tuple[pa.Table, str | None]:
    """The rows of a block up to the first that the user must mend, and what is wrong with that."""
    block = voted.select(VOTED.names).cast(VOTED)
    wrong = np.flatnonzero(block["error"].is_valid().to_numpy())
    error: str | None = None
    if len(wrong):
        error = block["error"][int(wrong[0])].as_py()
        block = block.slice(0, int(wrong[0]) + 1)
    named = block.filter(block["identity"].is_valid())
    if len(wrong):
        block = block.slice(0, int(wrong[0]))
    numbers = named["number"].to_numpy()
    twice = seen.add(named["identity"].to_numpy(), numbers)
    if twice is None:
        return block, error
    place, first = twice
    return block.slice(0, place), stands_twice(config, split, named["id"][place].as_py(), int(numbers[place]), first)


def _first(block: pa.Table, wanted: int) -> tuple[pa.Table, bool]:
    """The block up to its `wanted`-th row, and whether that row is in it."""
    return block.slice(0, wanted), block.num_rows >= wanted


def _first_used(block: pa.Table, wanted: int) -> tuple[pa.Table, bool]:
    """The block up to its `wanted`-th used row, and whether that row is in it."""
    used = 0
    for index, reason in enumerate(block["reason"].to_pylist()):
        used += reason is None
        if used == wanted:
            return block.slice(0, index + 1), True
    return block, False


def _keep_share(folder: Path, split: str, share: float) -> list[str]:
    """Cut `rationale_sets/` and `<split>.arrow` down to a share of their questions. Gives the ids that went.

    A hash of the ids ranks the questions, so that a smaller share is part of a larger one.
    """
    path = folder / f"{split}.arrow"
    table = open_rationale_table(path)
    ids = table["id"].to_pylist()
    ranked = sorted(range(len(ids)), key=lambda row: (stable_hash("share", ids[row]), row))
    kept = np.zeros(len(ids), dtype=bool)
    kept[ranked[: max(1, round(share * len(ids)))]] = True
    shutil.rmtree(folder / "rationale_sets")
    smaller = path.with_suffix(".share")
    with ParquetParts(folder / "rationale_sets", RATIONALE_SETS) as sets, ArrowFile(smaller, RATIONALE_SETS) as arrow:
        row = 0
        for batch in table.to_batches():
            part = pa.Table.from_batches([batch]).filter(pa.array(kept[row : row + batch.num_rows]))
            sets.write(part)
            arrow.write(part)
            row += batch.num_rows
    os.replace(smaller, path)
    return [name for name, stays in zip(ids, kept, strict=True) if not stays]


def _flat_samples(block: pa.Table) -> pa.Table:
    """Rows of `teacher_samples`."""
    tables = []
    for batch in block.select(["id", "samples"]).to_batches():
        values = pc.list_flatten(batch["samples"])
        columns = {"id": pc.take(batch["id"], pc.list_parent_indices(batch["samples"]))}
        for field in values.type:
            columns[field.name] = pc.struct_field(values, field.name)
        tables.append(pa.table(columns).select(TEACHER_SAMPLES.names).cast(TEACHER_SAMPLES))
    return pa.concat_tables(tables) if tables else TEACHER_SAMPLES.empty_table()


# Files.


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
        if process.isdigit() and (int(process) == os.getpid() or not is_running(int(process))):
            shutil.rmtree(folder, ignore_errors=True)


def _publish(staging: Path, output: Path) -> None:
    """Move the tables to their names; between the first and the last move there is no `counts.json`."""
    (output / "counts.json").unlink(missing_ok=True)
    for name in ("valid", "test", f"{TRAIN}.{AUGMENTED}"):
        (output / f"{name}.arrow").unlink(missing_ok=True)
    shutil.rmtree(output / "augmented_negatives", ignore_errors=True)
    for source in sorted(staging.iterdir(), key=lambda path: path.name == "counts.json"):
        target = output / source.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(source, target)


def _existing(output: Path, splits: tuple[str, ...]) -> Counts | None:
    """The counts of a folder whose tables are whole."""
    try:
        counts = Counts.model_validate_json((output / "counts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    wanted = [*splits, *([f"{TRAIN}.{AUGMENTED}"] if counts.augmented is not None else [])]
    return counts if all((output / f"{name}.arrow").is_file() for name in wanted) else None


def _fingerprint(config: ExperimentConfig, teacher: Teacher | None) -> str:
    """A hash of all that decides what is in the tables: config, input files, teacher, and the code of the way."""
    parts: list[tuple[str, int, int]] = []
    if isinstance(teacher, StoredTeacher):
        for part in teacher.parts:
            try:
                parts.append((part.name, part.stat().st_size, pq.read_metadata(part).num_rows))
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{part}: no valid Parquet: {error}") from None
    return hashlib.sha256(json.dumps([_asked(config, teacher), parts]).encode()).hexdigest()


def _asked(config: ExperimentConfig, teacher: Teacher | None) -> str:
    """The same without what a live teacher has answered by now."""
    decides = {
        "task": config.task,
        "custom": config.custom.model_dump(),
        "data": config.data.model_dump(exclude={"path"}),
        # Of the teacher's other keys, those that decide its samples are in its own fingerprint.
        "teacher": [config.teacher.samples, config.teacher.seed],
        "positives": config.positives,
        "labels": config.labels,
        "uses_rationales": config.uses_rationales,
        "single_task": config.method == "single_task",
        "source": source_fingerprint(config),
        "augmentation": augmentation_tagger(config),
        "made_by": teacher.fingerprint if teacher is not None else RECORDED,
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    code = sorted(Path(__file__).parent.glob("*.py")) + sorted(Path(str(qcrd_ray.tasks.__file__)).parent.glob("*.py"))
    for path in code:
        if path.name not in _NO_CONTENT:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


_NO_CONTENT = ("order.py", "streaming.py", "ray_data.py")
"""Code that decides nothing of what is in the tables."""

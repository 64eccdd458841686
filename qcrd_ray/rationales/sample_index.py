"""Samples that lie beside the questions, in any order and any number, found by a key without holding them.

    part-00000.arrow …   samples in their order, checked (`INDEXED`), one record batch a file
    keys.npy             the key of every sample, sorted; [samples] int64
    places.npy           where each of them is: part << 32 | row; [samples] int64

Parts are made independently of each other, in parallel, in a folder that every node sees; `merge` then sorts their keys
range by range. A process that looks samples up maps the files and reads only the rows that it asks for.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qcrd_ray.errors import UserError
from qcrd_ray.rationales.columns import RAW, TOO_LONG, WRONG, Columns, RecordedSample
from qcrd_ray.rationales.raw_chunks import RawChunk, chunk_rows
from qcrd_ray.rationales.schema import STORED_SAMPLES, check_table
from qcrd_ray.seeding import stable_hash

INDEXED = pa.schema(
    [
        pa.field("state", pa.int8()),
        pa.field("text", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("target", pa.string()),
        pa.field("teacher", pa.string()),
        pa.field("temperature", pa.float64()),
        pa.field("seed", pa.int64()),
        pa.field("finish_reason", pa.string()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("fingerprint", pa.string()),
        pa.field("sample_index", pa.int32()),
    ]
)
"""A row is a `RecordedSample`."""

PART_BYTES = 16 << 20
MERGED_AT_ONCE = 4 << 20
"""Keys that are sorted in memory together."""


@dataclass(frozen=True)
class StoredGroup:
    """Row groups of stored samples that become one part: (file, row group) each."""

    number: int
    row_groups: tuple[tuple[str, int], ...]


class PartWriter:
    """Writes parts into a folder. Sent to Ray's workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write_chunk(self, chunk: RawChunk, columns: Columns) -> str | None:
        """A part of a chunk of a flat table. Returns the error at which the table cannot be read further, or None."""
        keys: list[int] = []
        samples: list[RecordedSample] = []
        error: str | None = None
        try:
            for _, place, row in chunk_rows(chunk):
                keys.append(stable_hash(columns.sample_id(row, place)))
                try:
                    sample = columns.sample(row, place)
                except UserError as wrong:  # said when its question is met, if it ever is
                    sample = RecordedSample(WRONG, str(wrong), *[None] * (len(INDEXED) - 2))
                samples.append(sample)
        except UserError as wrong:
            error = str(wrong)
            keys = keys[: len(samples)]
        table = INDEXED.empty_table()
        if samples:
            columns_of = zip(zip(*samples, strict=True), INDEXED, strict=True)
            table = pa.table([pa.array(values, field.type) for values, field in columns_of], schema=INDEXED)
        self._write(chunk.first, np.array(keys, dtype=np.int64), table)
        return error

    def write_stored(self, group: StoredGroup, samples: int, max_chars: int) -> None:
        """A part of a live teacher's stored samples: those of the first `samples` indices.

        Raises:
            UserError: a file that is no valid Parquet, or of another schema.
        """
        tables = []
        for path, row_group in group.row_groups:
            try:
                with pq.ParquetFile(path) as file:
                    check_table(file.schema_arrow, STORED_SAMPLES, path)
                    tables.append(file.read_row_group(row_group, columns=STORED_SAMPLES.names).cast(STORED_SAMPLES))
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{path}: no valid Parquet: {error}") from None
        stored = pa.concat_tables(tables)
        stored = stored.filter(pc.less(stored["sample_index"], samples))
        is_long = pc.greater(pc.utf8_length(stored["text"]), max_chars)
        given = {name: stored[name] for name in ("seed", "finish_reason", "completion_tokens", "sample_index")}
        given["text"] = pc.if_else(is_long, None, stored["text"])
        given["state"] = pc.if_else(is_long, TOO_LONG, RAW)
        nothing = pa.nulls(stored.num_rows)
        arrays = [given.get(field.name, nothing).cast(field.type) for field in INDEXED]
        self._write(group.number, stored["key"].to_numpy(), pa.table(arrays, schema=INDEXED))

    def _write(self, number: int, keys: np.ndarray, table: pa.Table) -> None:
        if not table.num_rows:
            return
        name = f"part-{number:012d}"
        with pa.ipc.new_file(str(self.folder / f"{name}.arrow"), INDEXED) as file:
            file.write_table(table.combine_chunks())
        order = np.argsort(keys, kind="stable")
        np.save(self.folder / f"{name}.keys.npy", keys[order])
        np.save(self.folder / f"{name}.rows.npy", order.astype(np.int64))


def stored_groups(parts: Sequence[Path]) -> Iterator[StoredGroup]:
    """Row groups of the parts, in order, gathered to about `PART_BYTES` of Parquet each.

    Raises:
        UserError: a file that is no valid Parquet.
    """
    held: list[tuple[str, int]] = []
    size = number = 0
    for part in parts:
        try:
            metadata = pq.read_metadata(part)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{part}: no valid Parquet: {error}") from None
        for row_group in range(metadata.num_row_groups):
            held.append((str(part), row_group))
            size += metadata.row_group(row_group).total_byte_size
            if size >= PART_BYTES:
                yield StoredGroup(number, tuple(held))
                held, size, number = [], 0, number + 1
    if held:
        yield StoredGroup(number, tuple(held))


def merge(folder: Path) -> SampleIndex:
    """Sort the keys of all parts of a folder, `MERGED_AT_ONCE` at a time."""
    names = sorted(path.stem for path in folder.glob("part-*.arrow"))
    keys = [np.load(folder / f"{name}.keys.npy", mmap_mode="r") for name in names]
    rows = [np.load(folder / f"{name}.rows.npy", mmap_mode="r") for name in names]
    total = sum(map(len, keys))
    if not total:
        return SampleIndex(folder, (), 0)
    out = [np.lib.format.open_memmap(folder / f"{n}.npy", "w+", np.int64, (total,)) for n in ("keys", "places")]
    begins = [0] * len(names)
    at = 0
    for bound in _bounds(keys, total):
        ends = [len(part) if bound is None else int(np.searchsorted(part, bound)) for part in keys]
        spans = [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]
        some = np.concatenate([part[span] for part, span in zip(keys, spans, strict=True)])
        numbered = enumerate(zip(rows, spans, strict=True))
        places = np.concatenate([np.asarray(part[span]) | number << 32 for number, (part, span) in numbered])
        order = np.argsort(some, kind="stable")
        out[0][at : at + len(some)] = some[order]
        out[1][at : at + len(some)] = places[order]
        at += len(some)
        begins = ends
    for array in out:
        array.flush()
    for name in names:
        for kind in ("keys", "rows"):
            (folder / f"{name}.{kind}.npy").unlink()
    return SampleIndex(folder, tuple(f"{name}.arrow" for name in names), total)


def _bounds(keys: list[np.ndarray], total: int) -> list[int | None]:
    """Upper bounds of ranges with about `MERGED_AT_ONCE` keys each; None for the last."""
    pieces = -(-total // MERGED_AT_ONCE)
    if pieces <= 1:
        return [None]
    few = np.sort(np.concatenate([part[::1024] for part in keys]))
    cuts = np.unique(few[[len(few) * piece // pieces for piece in range(1, pieces)]])
    return [*map(int, cuts), None]


@dataclass(frozen=True)
class SampleIndex:
    """Looks samples up. Small; sent to Ray's workers, which must see its folder."""

    folder: Path
    parts: tuple[str, ...]
    samples: int

    def find(self, keys: Sequence[int]) -> list[list[RecordedSample]]:
        """The samples of each key, in the order in which they were recorded."""
        if not self.samples or not len(keys):
            return [[] for _ in keys]
        asked = np.asarray(keys, dtype=np.int64)
        sorted_keys = np.load(self.folder / "keys.npy", mmap_mode="r")
        begins, ends = np.searchsorted(sorted_keys, asked), np.searchsorted(sorted_keys, asked, side="right")
        counts = ends - begins
        if not counts.any():
            return [[] for _ in keys]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        entries = np.repeat(begins - offsets[:-1], counts) + np.arange(offsets[-1])
        samples = self._read(np.load(self.folder / "places.npy", mmap_mode="r")[entries])
        return [samples[offsets[i] : offsets[i + 1]] for i in range(len(keys))]

    def _read(self, places: np.ndarray) -> list[RecordedSample]:
        """Rows of the parts. The maps are closed at once, so that a process holds no more than it asked for."""
        order = np.argsort(places, kind="stable")
        ordered = places[order]
        numbers = ordered >> 32
        tables = []
        for number in np.unique(numbers):
            begin, end = np.searchsorted(numbers, [number, number + 1])
            rows = ordered[begin:end] & 0xFFFFFFFF
            with pa.memory_map(str(self.folder / self.parts[number])) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
                if rows[-1] - rows[0] == len(rows) - 1:
                    tables.append(pa.table(batch.slice(int(rows[0]), len(rows))))
                else:
                    tables.append(pa.table(batch.take(pa.array(rows))))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        columns = [column.to_pylist() for column in pa.concat_tables(tables).columns]
        samples = list(map(RecordedSample, *columns))
        return [samples[place] for place in back.tolist()]

    def count_others(self, keys: np.ndarray) -> int:
        """Samples whose key is none of `keys` (sorted, [n] int64)."""
        sorted_keys = np.load(self.folder / "keys.npy", mmap_mode="r")
        others = 0
        for begin in range(0, self.samples, MERGED_AT_ONCE):
            some = np.asarray(sorted_keys[begin : begin + MERGED_AT_ONCE])
            if not len(keys):
                others += len(some)
                continue
            near = np.minimum(np.searchsorted(keys, some), len(keys) - 1)
            others += int((keys[near] != some).sum())
        return others

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

"""The files of the tables: Parquet parts for exchange, uncompressed Arrow files for training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from qcrd_ray.errors import UserError

ARROW_BATCH_ROWS = 1024
PARQUET_PART_ROWS = 16_384


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
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"table {path}: no Arrow file: {error}") from None


def rows_at(table: pa.Table, rows: Iterable[int]) -> list[dict[str, Any]]:
    """Rows of a memory-mapped table by index. `Table.take` would read whole columns for the same."""
    return [row for index in rows for row in table.slice(int(index), 1).to_pylist()]


class _TableFile:
    """Takes tables of any size and writes them in pieces of a fixed number of rows, whatever the blocks were."""

    def __init__(self, rows: int, schema: pa.Schema, sink: Callable[[pa.Table], None]) -> None:
        self._rows, self._sink = rows, sink
        self._held = schema.empty_table()

    def write(self, table: pa.Table) -> None:
        self._held = pa.concat_tables([self._held, table])
        while self._held.num_rows >= self._rows:
            self._sink(self._held.slice(0, self._rows).combine_chunks())
            self._held = self._held.slice(self._rows)

    def _close(self, whole: bool) -> None:
        """Finish the file; `whole` says that all tables were given."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._held.num_rows:
            self._sink(self._held.combine_chunks())
        self._close(kind is None)


class ParquetParts(_TableFile):
    """Parquet files `part-00000.parquet` and so on; one at least, so that an empty table has its schema."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True)
        super().__init__(PARQUET_PART_ROWS, schema, self._write_part)
        self._folder, self._schema, self._parts = folder, schema, 0

    def _write_part(self, table: pa.Table) -> None:
        pq.write_table(table, self._folder / f"part-{self._parts:05d}.parquet")
        self._parts += 1

    def _close(self, whole: bool) -> None:
        if whole and not self._parts:
            self._write_part(self._schema.empty_table())


class ArrowFile(_TableFile):
    """An uncompressed Arrow file in batches of a fixed number of rows."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pa.ipc.new_file(str(path), schema)
        super().__init__(ARROW_BATCH_ROWS, schema, self._writer.write_table)

    def _close(self, whole: bool) -> None:
        self._writer.close()

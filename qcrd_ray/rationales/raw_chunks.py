"""Chunks of some hundred rows of a source, in its order, unparsed: quick to cut, and parsed wherever they are sent."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.rationales.columns import Place, Row, nearest, place_at
from qcrd_ray.tasks import get_task

CHUNK_ROWS = 1024
CHUNK_BYTES = 256 << 10
LEAST_CHUNK_ROWS, MOST_CHUNK_ROWS = 64, 1 << 16
"""Of Parquet: its files say how large their columns are, but not how large without their dictionaries."""
MOST_CSV_CELL = 1 << 24
DSS_TEACHER = "palm540b"

CHUNKS = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("unit", pa.string()),
        pa.field("first", pa.int64()),
        pa.field("number", pa.int64()),
        pa.field("encoding", pa.string()),
        pa.field("payload", pa.large_binary()),
    ]
)


@dataclass(frozen=True)
class RawChunk:
    """Consecutive rows of a source as they stand there.

    Attributes:
        source: the file, for errors.
        unit: what its rows are numbered by.
        first: rows of the source before the chunk.
        number: line or row number of its first row, from 1.
        encoding: `lines` of JSON, an `arrow` stream, `rows` in JSON ((number, row) each), or an `error`, with which a
            source ends that cannot be read further: its text, which so is met in order.
    """

    source: str
    unit: Literal["line", "row"]
    first: int
    number: int
    encoding: Literal["lines", "arrow", "rows", "error"]
    payload: bytes


def raw_chunks(config: ExperimentConfig, split: str, limit: int | None = None) -> Iterator[RawChunk]:
    """The chunks of a split, about `limit` rows of it where that is set. Raises nothing; see `RawChunk.encoding`."""
    return _ending_with_error(lambda: _chunks_of(config, split, limit))


def file_chunks(path: Path, chunk_bytes: int = CHUNK_BYTES) -> Iterator[RawChunk]:
    """The chunks of one .jsonl, .parquet or .csv file. Raises nothing; see `RawChunk.encoding`."""
    return _ending_with_error(lambda: _file_chunks(path, None, chunk_bytes))


def chunks_as_tables(chunks: Iterable[RawChunk]) -> Iterator[pa.Table]:
    """A table with one row (`CHUNKS`) a chunk."""
    for chunk in chunks:
        yield pa.Table.from_pylist([chunk.__dict__], schema=CHUNKS)


def chunks_of_table(table: pa.Table) -> list[RawChunk]:
    return [RawChunk(**row) for row in table.to_pylist()]


def chunk_rows(chunk: RawChunk) -> Iterator[tuple[int, Place, Row]]:
    """(number, place, row) of each row of a chunk. Raises UserError at the first that cannot be parsed."""
    if chunk.encoding == "error":
        raise UserError(chunk.payload.decode())
    if chunk.encoding == "lines":
        yield from _parsed_lines(chunk)
        return
    rows: Iterable[tuple[int, Row]]
    if chunk.encoding == "arrow":
        try:
            rows = enumerate(pa.ipc.open_stream(chunk.payload).read_all().to_pylist(), start=chunk.number)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{chunk.source}: no valid Parquet: {error}") from None
    else:
        rows = json.loads(chunk.payload)
    for number, row in rows:
        yield number, place_at(chunk.source, chunk.unit, number), row


def source_name(config: ExperimentConfig, split: str) -> str:
    """What to call a split in an error."""
    kind, location = source_of(config)
    if kind in ("hub", "generated"):
        return str(config.data.path)
    return str(question_file(kind, Path(location), split) or location)


def _parsed_lines(chunk: RawChunk) -> Iterator[tuple[int, Place, Row]]:
    for number, line in enumerate(io.BytesIO(chunk.payload), start=chunk.number):
        if not line.strip():
            continue
        place = place_at(chunk.source, chunk.unit, number)
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{place()}: no valid UTF-8") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{place()}: no valid JSON: {error.msg} (column {error.colno})") from None
        except RecursionError:
            raise UserError(f"{place()}: no valid JSON: nested too deep") from None
        if not isinstance(row, dict):
            raise UserError(f"{place()}: expected a JSON object, found {type(row).__name__}")
        yield number, place, row


def _ending_with_error(chunks: Callable[[], Iterator[RawChunk]]) -> Iterator[RawChunk]:
    """A pipeline that reads ahead would raise an error of row 5000 sooner or later than its consumer sees row 10."""
    try:
        yield from chunks()
    except UserError as error:
        yield RawChunk("", "row", 0, 0, "error", str(error).encode())


def _chunks_of(config: ExperimentConfig, split: str, limit: int | None) -> Iterator[RawChunk]:
    kind, location = source_of(config)
    if kind == "generated":
        rows = _generated_rows(config, split, location)
        yield from _row_chunks(rows, f"generated:{location} {split}", "row", limit)
        return
    if kind == "hub":
        name, rows = _hub_rows(location, split)
        yield from _row_chunks(rows, name, "row", limit)
        return
    folder = Path(location)
    path = question_file(kind, folder, split)
    if path is None:
        there = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
        near = nearest(f"{split}.jsonl", there)
        raise UserError(
            f"{folder}: no {split}.jsonl, .parquet or .csv{near or '; there are: ' + (', '.join(there) or 'no files')}"
        )
    if kind == "dss":
        yield from _row_chunks(_dss_rows(path, folder, split), str(path), "line", limit)
    else:
        yield from _file_chunks(path, limit, CHUNK_BYTES)


def _file_chunks(path: Path, limit: int | None, chunk_bytes: int) -> Iterator[RawChunk]:
    if path.suffix.lower() == ".parquet":
        yield from _parquet_chunks(path, limit, chunk_bytes)
    elif path.suffix.lower() == ".csv":
        yield from _row_chunks(_csv_rows(path), str(path), "line", limit)
    else:
        yield from _line_chunks(path, limit, chunk_bytes)


def _line_chunks(path: Path, limit: int | None, chunk_bytes: int) -> Iterator[RawChunk]:
    first, number = 0, 1
    with path.open("rb") as file:
        while limit is None or first < limit:
            lines = file.readlines(chunk_bytes)
            if not lines:
                return
            full = [place for place, line in enumerate(lines, start=1) if line.strip()]
            rows = len(full)
            if limit is not None and first + rows > limit:
                rows = limit - first
                lines = lines[: full[rows - 1]]
            yield RawChunk(str(path), "line", first, number, "lines", b"".join(lines))
            first, number = first + rows, number + len(lines)


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    for number, row in csv_rows(path):
        if isinstance(row, UserError):
            raise row
        yield number, row


def csv_rows(path: Path) -> Iterator[tuple[int, Row | UserError]]:
    """Rows by the header's names, with the line that each begins at. An empty cell is null.

    A row of more or fewer cells than the header is the error that it is.

    Raises:
        UserError: what follows cannot be read.
    """
    csv.field_size_limit(MOST_CSV_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        number = 1
        try:
            header = next(reader, [])
            number = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    yield number, UserError(f"{path}:{number}: {len(cells)} cells, but the header has {len(header)}")
                elif cells:
                    yield number, {name: cell or None for name, cell in zip(header, cells, strict=True)}
                number = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{number}: no valid CSV: {error}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: no valid UTF-8 after line {number}") from None


def _parquet_chunks(path: Path, limit: int | None, chunk_bytes: int) -> Iterator[RawChunk]:
    try:
        with pq.ParquetFile(path) as file:
            first = 0
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            bytes_a_row = sum(group.total_byte_size for group in groups) / max(1, file.metadata.num_rows)
            rows = int(min(MOST_CHUNK_ROWS, max(LEAST_CHUNK_ROWS, chunk_bytes / max(1.0, bytes_a_row))))
            for batch in file.iter_batches(batch_size=rows):
                payload = pa.BufferOutputStream()
                with pa.ipc.new_stream(payload, batch.schema) as stream:
                    stream.write_batch(batch)
                yield RawChunk(str(path), "row", first, first + 1, "arrow", payload.getvalue().to_pybytes())
                first += batch.num_rows
                if limit is not None and first >= limit:
                    return
    except pa.ArrowException as error:
        raise UserError(f"{path}: no valid Parquet: {error}") from None


def _row_chunks(
    rows: Iterator[tuple[int, Row]], source: str, unit: Literal["line", "row"], limit: int | None
) -> Iterator[RawChunk]:
    held: list[tuple[int, Row]] = []
    first = 0

    def chunk() -> RawChunk:
        return RawChunk(source, unit, first, held[0][0], "rows", json.dumps(held, default=str).encode())

    try:
        for row in rows:
            held.append(row)
            if len(held) == CHUNK_ROWS or first + len(held) == limit:
                yield chunk()
                first += len(held)
                held = []
                if first == limit:
                    return
    except UserError:
        if held:
            yield chunk()
        raise
    if held:
        yield chunk()


def _dss_rows(path: Path, folder: Path, split: str) -> Iterator[tuple[int, Row]]:
    outputs = _dss_outputs(folder, split)
    for chunk in _line_chunks(path, None, CHUNK_BYTES):
        for number, _, row in chunk_rows(chunk):
            output = next(outputs, None)
            samples = {} if output is None else {"teacher_samples": [{"teacher": DSS_TEACHER, "rationale": output}]}
            yield number, {**row, **samples}
    if next(outputs, None) is not None:
        raise UserError(f"{folder}/llm: more outputs of the teacher for {split!r} than questions in {path.name}")


def _dss_outputs(folder: Path, split: str) -> Iterator[str]:
    numbered = re.compile(rf"{split}_CoT_(\d+)\.json")
    found = {int(m[1]): p for p in folder.glob(f"llm/{split}_CoT_*.json") if (m := numbered.fullmatch(p.name))}
    for expected, number in enumerate(sorted(found)):
        if number != expected:
            raise UserError(f"{folder}/llm: no {split}_CoT_{expected}.json, but {found[number].name} is there")
        try:
            outputs = json.loads(found[number].read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{found[number]}: no valid JSON: {error}") from None
        if not isinstance(outputs, list) or not all(isinstance(output, str) for output in outputs):
            raise UserError(f"{found[number]}: expected a JSON list of strings")
        yield from outputs


def _generated_rows(config: ExperimentConfig, split: str, family: str) -> Iterator[tuple[int, Row]]:
    task = get_task(config)
    generate = getattr(task, "generate_questions", None)
    if generate is None or family != task.name:
        raise UserError(f"config key data.path: generated:{family} does not go with task={task.name}")
    count = config.data.generated.get(split)
    if not count:
        raise UserError(f"config key data.generated: no split {split!r}; there are: {', '.join(config.data.generated)}")
    for number, question in enumerate(generate(split, count, config.teacher.seed), start=1):
        yield (
            number,
            {
                "id": question.id,
                "question": question.question,
                "answer": question.answer,
                "target": getattr(question, "target", None),
                "choices": getattr(question, "choices", None),
            },
        )


def _hub_rows(location: str, split: str) -> tuple[str, Iterator[tuple[int, Row]]]:
    names = hub_splits(location)
    theirs = hub_split(names, split)
    if theirs is None:
        raise UserError(f"hub:{location}: no split {split!r}; there are: {', '.join(names)}")
    library = _hub_library()
    name, configuration = _hub_name(location)
    try:
        data = library.load_dataset(name, configuration, split=theirs)
    except (OSError, ValueError, RuntimeError, LookupError, library.exceptions.DatasetsError) as error:
        raise UserError(f"config key data.path: hub:{location} cannot be read: {error}") from None
    words = {c: f.int2str for c, f in data.features.items() if type(f).__name__ == "ClassLabel"}

    def rows() -> Iterator[tuple[int, Row]]:
        for number, row in enumerate(data, start=1):
            yield (
                number,
                {c: words[c](v) if c in words and isinstance(v, int) and v >= 0 else v for c, v in row.items()},
            )

    return f"hub:{location} {theirs}", rows()


def source_of(config: ExperimentConfig) -> tuple[str, str]:
    """(kind, location): generated, hub, dss or folder."""
    path = config.data.path
    if not path:
        raise UserError(
            "config key data.path: not set; give a folder with train.jsonl and valid.jsonl (or .parquet, .csv), "
            "hub:NAME or generated:chain_sum"
        )
    for kind in ("generated", "hub"):
        if path.startswith(f"{kind}:"):
            return kind, path.removeprefix(f"{kind}:")
    folder = Path(path).expanduser()
    if not folder.exists():
        siblings = [str(sibling) for sibling in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"config key data.path: {folder} not found{nearest(str(folder), siblings)}")
    if not folder.is_dir():
        raise UserError(f"config key data.path: {folder} is a file; give the folder that holds it")
    if find_file(folder, "train") is None and any(folder.glob("*_train.json")):
        return "dss", str(folder)
    return "folder", str(folder)


def find_file(folder: Path, stem: str) -> Path | None:
    found = [path for suffix in (".jsonl", ".parquet", ".csv") if (path := folder / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise UserError(f"{folder}: both {found[0].name} and {found[1].name} are there; keep one")
    return found[0] if found else None


def question_file(kind: str, folder: Path, split: str) -> Path | None:
    if kind == "dss":
        name = _dss_name(folder)
        path = folder / f"{name}_{split}.json"
        return path if path.is_file() else None
    return find_file(folder, split)


def _dss_name(folder: Path) -> str:
    names = sorted(path.name.removesuffix("_train.json") for path in folder.glob("*_train.json"))
    if len(names) > 1:
        raise UserError(f"{folder}: several data sets in one folder: {', '.join(names)}; keep one")
    return names[0]


def _hub_library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("config key data.path: hub:… needs the package datasets: pip install 'qcrd_ray[hub]'") from None
    return datasets


def _hub_name(location: str) -> tuple[str, str | None]:
    name, _, configuration = location.partition(":")
    return name, configuration or None


def hub_splits(location: str) -> list[str]:
    library = _hub_library()
    name, configuration = _hub_name(location)
    try:
        return list(library.get_dataset_split_names(name, configuration))
    except (OSError, ValueError, RuntimeError, LookupError, library.exceptions.DatasetsError) as error:
        raise UserError(f"config key data.path: hub:{location} cannot be read: {error}") from None


def hub_split(names: list[str], split: str) -> str | None:
    aliases = {"valid": ("valid", "validation", "dev")}.get(split, (split,))
    return next((name for alias in aliases for name in (alias, f"{alias}_r1") if name in names), None)

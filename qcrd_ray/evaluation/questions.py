"""Questions as they come, from a file or a pipe: in order, a batch at a time, the bad ones with their place."""

from __future__ import annotations

import json
import os
import re
import select
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError, printable
from qcrd_ray.rationales.columns import Columns
from qcrd_ray.rationales.raw_chunks import chunk_rows, csv_rows, file_chunks

Format = Literal["auto", "jsonl", "lines"]
OTHER_TABLES = (".tsv", ".xls", ".xlsx", ".arrow", ".feather", ".orc")
_ARRAY = re.compile(rb"\[\s*(?:$|[\[{\"])")
STANDARD_INPUT = 0
READ_BYTES = 1 << 18
MOST_LINE_BYTES = 1 << 24
SHOWN = 60
MOST_CHOICES = 26
TEXT_COLUMNS = (("question",), ("premise", "hypothesis"), ("Body", "Question"))
_COLUMNS = Columns(ExperimentConfig(), "folder")


@dataclass(frozen=True)
class Asked:
    """One question.

    Attributes:
        number: of its line or row in the input, from 1.
        id: what it came with; its answer carries it.
    """

    number: int
    question: str
    choices: tuple[str, ...] | None = None
    id: str | int | None = None


@dataclass(frozen=True)
class Bad:
    """An input that is no question: where it is and what is wrong with it, as a line that can be printed."""

    number: int
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", printable(self.message))


Input = Asked | Bad


def read_questions(file: Path | None, form: Format, batch: int, linger_s: float) -> Iterator[list[Input]]:
    """Batches of a file's questions, or of standard input's.

    Args:
        file: .jsonl, .csv, .parquet or plain lines; None is standard input.
        form: of lines; `auto` is JSONL where the first line begins with a brace, else a question a line, unless that is
            what no question looks like: another kind of table, or a JSON array.
        batch: inputs that come together at most.
        linger_s: seconds from the first line of a batch on after which what is there of a pipe is one.

    Raises:
        UserError: no such file, or one that cannot be read on.
    """
    if file is None:
        yield from _parsed(_lines(STANDARD_INPUT, "standard input", batch, linger_s), "standard input", form)
    elif (suffix := file.suffix.lower()) in (".csv", ".parquet"):
        if form != "auto":
            raise UserError(f"{file}: --format is for lines, not for {suffix}")
        check_file(file)
        yield from _rows(file, batch)
    elif form == "auto" and suffix in OTHER_TABLES:
        raise UserError(f"{file}: {suffix} is not read; expected .csv, .parquet, .jsonl or a question a line")
    else:
        check_file(file)
        with file.open("rb") as opened:
            yield from _parsed(_lines(opened.fileno(), str(file), batch, linger_s), str(file), form)


def check_file(file: Path) -> None:
    """Raises UserError where a file cannot be read."""
    try:
        if stat.S_ISFIFO(file.stat().st_mode):
            return  # to open and close it would end the one that writes to it
        with file.open("rb") as opened:
            opened.read(0)
    except FileNotFoundError:
        raise UserError(f"{file}: not found") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class _Line:
    number: int
    content: bytes
    whole: bool


def _lines(source: int, name: str, batch: int, linger_s: float) -> Iterator[list[_Line]]:
    """Batches of the lines of a file descriptor, blank ones left out.

    A batch waits `linger_s` for more lines from its first one on, and then takes what is there already.

    Reads the descriptor itself: a thread that waits in one of Python's own buffered files would keep its lock at exit.
    """
    waits = not stat.S_ISREG(os.fstat(source).st_mode)
    lines: list[_Line] = []
    rest, number, dropped, ended = bytearray(), 0, False, False
    due = 0.0
    while not ended:
        if waits and lines and not select.select([source], [], [], max(0.0, due - time.monotonic()))[0]:
            yield lines
            lines = []
        try:
            data = os.read(source, READ_BYTES)
        except OSError as error:
            raise UserError(f"{name}: cannot be read: {error.strerror}") from None
        ended = not data
        if not lines:
            due = time.monotonic() + linger_s
        *full, last = data.split(b"\n")
        if ended and (rest or dropped):
            full, last = [b""], b""
        for part in full:
            number += 1
            rest += part
            if dropped or rest.strip():
                lines.append(_Line(number, bytes(rest[:MOST_LINE_BYTES]), not dropped and len(rest) <= MOST_LINE_BYTES))
            rest, dropped = bytearray(), False
        rest += last
        if len(rest) > MOST_LINE_BYTES:
            rest, dropped = bytearray(), True
        while len(lines) >= batch:
            yield lines[:batch]
            lines = lines[batch:]
    if lines:
        yield lines


def _parsed(batches: Iterator[list[_Line]], name: str, form: Format) -> Iterator[list[Input]]:
    parsers: dict[str, Callable[[str], Any]] = {"jsonl": json.loads, "lines": _as_question}
    parse = parsers.get(form)
    for lines in batches:
        if parse is None:
            first = lines[0].content.removeprefix(b"\xef\xbb\xbf").lstrip()
            if _ARRAY.match(first):
                raise UserError(
                    f"{name}:{lines[0].number}: a JSON array; expected a JSON object a line, or a question a line "
                    "(--format lines takes these lines as questions)"
                )
            parse = parsers["jsonl" if first.startswith(b"{") else "lines"]
        yield [_input_of(line, f"{name}:{line.number}", parse) for line in lines]


def _as_question(text: str) -> dict[str, str]:
    return {"question": text.strip()}


def _input_of(line: _Line, place: str, parse: Callable[[str], Any]) -> Input:
    if not line.whole:
        return Bad(line.number, f"{place}: a line of more than {MOST_LINE_BYTES >> 20} MiB")
    try:
        text = line.content.decode("utf-8-sig" if line.number == 1 else "utf-8")
        if "\0" in text:
            return Bad(line.number, f"{place}: it holds NUL characters; expected text in UTF-8")
        row = parse(text)
    except UnicodeDecodeError:
        return Bad(line.number, f"{place}: no valid UTF-8")
    except json.JSONDecodeError as error:
        return Bad(line.number, f"{place}: no valid JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError):  # a number of too many digits, brackets in brackets
        return Bad(line.number, f"{place}: no valid JSON that can be read")
    if not isinstance(row, dict):
        return Bad(line.number, f"{place}: expected a JSON object, found {_shown(row)}")
    return _asked(line.number, place, row)


def _asked(number: int, place: str, row: dict[str, Any]) -> Input:
    """A row as a question, its columns as training reads them."""
    if not any(all(name in row for name in names) for names in TEXT_COLUMNS):
        there = ", ".join(map(str, row))[:SHOWN] or "none"
        return Bad(number, f"{place}: no column 'question' (or premise and hypothesis); there are: {there}")
    try:
        question, choices = _COLUMNS.asked(row, lambda: place)
    except UserError as error:
        return Bad(number, str(error))
    name = row.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        return Bad(number, f"{place}: column 'id': expected a text or a whole number, found {_shown(name)}")
    if isinstance(name, str) and not is_unicode(name):
        return Bad(number, f"{place}: column 'id': half of a surrogate pair, no valid Unicode")
    if choices is not None and len(choices) > MOST_CHOICES:
        return Bad(number, f"{place}: column 'choices': expected {MOST_CHOICES} at most, found {len(choices)}")
    return Asked(number, question, choices or None, name)


def is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _rows(file: Path, batch: int) -> Iterator[list[Input]]:
    inputs: list[Input] = []
    for one in _table_inputs(file):
        inputs.append(one)
        if len(inputs) == batch:
            yield inputs
            inputs = []
    if inputs:
        yield inputs


def _table_inputs(file: Path) -> Iterator[Input]:
    if file.suffix.lower() == ".csv":
        for number, found in csv_rows(file):
            if isinstance(found, UserError):
                yield Bad(number, str(found))
            else:
                yield _asked(number, f"{file}:{number}", dict(found))
    else:
        for chunk in file_chunks(file):
            for number, place, row in chunk_rows(chunk):
                yield _asked(number, place(), dict(row))

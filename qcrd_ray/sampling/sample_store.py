"""Where a live teacher's samples are kept: written as they come, found again by whatever run asks for the same.

    STORE/<fingerprint>/set.json                what decides these samples: model, prompt, shots, parameters
                        <run>-<chunk>.parquet   samples of a chunk of questions (`STORED_SAMPLES`), whole or absent
                        <run>-<chunk>-*.jsonl   journal of a chunk in the making: a line for each question answered

A line is written as soon as a question is answered, so a kill loses what was being generated and nothing else. A
chunk that is done becomes a Parquet part and its journals go; journals that a killed run left become parts as the
next run opens the set. What was spent stands in the parts' metadata.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qcrd_ray.errors import UserError
from qcrd_ray.rationales.schema import STORED_SAMPLES
from qcrd_ray.run_folder import is_running, write_text_atomic

LOCK_SECONDS = 60.0
"""Time that the actors of a killed run have to end."""
_USAGE = b"qcrd_ray.usage"
_MERGED = b"qcrd_ray.journals"


@dataclass(frozen=True)
class Usage:
    """What samples took.

    Attributes:
        requests: prompts that were processed.
        cost: in the currency of the config's prices.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cost + other.cost,
        )

    def __sub__(self, other: Usage) -> Usage:
        return self + Usage(-other.requests, -other.prompt_tokens, -other.completion_tokens, -other.cost)


class StoreIndex:
    """Which samples of which question there are."""

    def __init__(self, keys: np.ndarray, indices: np.ndarray) -> None:
        order = np.lexsort((indices, keys))
        self._keys, self._indices = keys[order], indices[order]

    def of(self, key: int) -> set[int]:
        """Sample indices that are there for a question's key."""
        begin, end = np.searchsorted(self._keys, [key, key + 1])
        return set(self._indices[begin:end].tolist())


class SampleSet:
    """The samples of one fingerprint, in a folder that every node sees."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create(self, description: dict[str, Any]) -> None:
        """Make the folder and say in it what its samples are, unless it is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "set.json").exists():
            write_text_atomic(self.folder / "set.json", json.dumps(description, indent=1, ensure_ascii=False) + "\n")

    def parts(self) -> list[Path]:
        """Parquet parts by name."""
        return sorted(self.folder.glob("*.parquet"))

    def index(self) -> StoreIndex:
        """Read the keys of all parts."""
        keys, indices = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
        for part in self.parts():
            table = _read_part(part, ["key", "sample_index"])
            keys.append(table["key"].to_numpy())
            indices.append(table["sample_index"].to_numpy())
        return StoreIndex(np.concatenate(keys), np.concatenate(indices))

    def rows(self) -> int:
        """Samples in all parts."""
        return sum(_metadata(part).num_rows for part in self.parts())

    def usage(self) -> Usage:
        """What all samples of the set took, in this run and in others."""
        total = Usage()
        for part in self.parts():
            total += Usage(**json.loads((_metadata(part).metadata or {}).get(_USAGE, b"{}")))
        return total

    def recover(self) -> int:
        """Turn the journals that a killed run left into parts. Returns their number. Only under the lock."""
        for temporary in self.folder.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)
        stems = {journal.name.rsplit("-", 1)[0] for journal in self.folder.glob("*.jsonl")}
        for stem in sorted(stems):
            Chunk(self.folder, stem).finish()
        return len(stems)

    @contextlib.contextmanager
    def locked(self, seconds: float = LOCK_SECONDS, *, patience_s: float = 0.0) -> Iterator[SetLock]:
        """Keep other runs off. The lock ends with the process, and with the actors that share it.

        Args:
            seconds: to wait for what a run that is gone, or one of another machine, has left.
            patience_s: to wait for a run of this machine that works on the set.

        Raises:
            UserError: another run works on the set.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = SetLock(self.folder)
        try:
            lock.take(seconds, patience_s=patience_s)
            yield lock
        finally:
            lock.close()


class SetLock:
    """A lock on a set: a driver has it alone, then shares it with its actors, until all of them are gone."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._file = self._path.open("a+")

    def take(self, seconds: float, *, patience_s: float = 0.0) -> None:
        begin = time.monotonic()
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                owner = self._owner()
                waited = time.monotonic() - begin
                if waited > (patience_s if _is_running(owner) else max(patience_s, seconds)):
                    raise UserError(
                        f"samples in {self._path.parent}: another run ({owner or 'unknown'}) is sampling them; "
                        "wait for it, or end it and start again"
                    ) from None
                time.sleep(0.2)
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"{socket.gethostname()} process {os.getpid()}")
        self._file.flush()

    def share(self) -> None:
        """Let others have it too; a driver that wants it alone waits for all of them."""
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def _owner(self) -> str:
        self._file.seek(0)
        return self._file.read(200)

    def close(self) -> None:
        self._file.close()


def _is_running(owner: str) -> bool:
    """Whether a lock's owner is a living process of this machine."""
    host, _, process = owner.partition(" process ")
    return host == socket.gethostname() and process.isdigit() and is_running(int(process))


@dataclass
class Chunk:
    """The samples of a chunk of questions in the making. One process works on it at a time."""

    folder: Path
    stem: str
    _journal: Any = field(default=None, repr=False)
    _error: OSError | None = field(default=None, repr=False)

    @property
    def part(self) -> Path:
        return self.folder / f"{self.stem}.parquet"

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.stem}-*.jsonl"))

    def done(self) -> set[tuple[int, int]]:
        """(key, sample index) of what an earlier attempt at this chunk has written."""
        places = {(row["key"], row["sample_index"]) for line in self._lines(self._journals()) for row in line["rows"]}
        if self.part.exists():
            table = _read_part(self.part, ["key", "sample_index"])
            places |= set(zip(table["key"].to_pylist(), table["sample_index"].to_pylist(), strict=True))
        return places

    def append(self, rows: Sequence[dict[str, Any]], usage: Usage) -> None:
        """Write the samples of one question (`STORED_SAMPLES`), and what they took, as one line.

        Raises:
            OSError: the disk does not take it. Nothing more is written by this object then.
        """
        if self._error is not None:
            raise self._error
        if self._journal is None:
            path = self.folder / f"{self.stem}-{uuid.uuid4().hex[:8]}.jsonl"
            self._journal = path.open("ab", buffering=0)
        data = (json.dumps({"rows": list(rows), "usage": usage.__dict__}) + "\n").encode()
        try:
            if self._journal.write(data) != len(data):
                raise OSError(errno.ENOSPC, "the disk took only a part of a line", self._journal.name)
        except OSError as error:
            self._error = error  # nothing may follow a line that is cut short
            self.close()
            raise

    def finish(self) -> None:
        """Make one Parquet part of the journals, those of earlier attempts among them, and remove them."""
        self.close()
        journals = self._journals()
        rows: dict[tuple[int, int], dict[str, Any]] = {}
        usage = Usage()
        merged: list[str] = []
        if self.part.exists():
            with _naming(self.part):
                table = pq.read_table(self.part)
            rows = {(row["key"], row["sample_index"]): row for row in table.to_pylist()}
            usage = Usage(**json.loads((table.schema.metadata or {}).get(_USAGE, b"{}")))
            merged = json.loads((table.schema.metadata or {}).get(_MERGED, b"[]"))
        new = [journal for journal in journals if journal.name not in merged]
        for line in self._lines(new):
            usage += Usage(**line["usage"])
            for row in line["rows"]:
                rows.setdefault((row["key"], row["sample_index"]), row)
        if new:
            names = json.dumps([*merged, *(journal.name for journal in new)])
            metadata = {_USAGE: json.dumps(usage.__dict__).encode(), _MERGED: names.encode()}
            written = [rows[place] for place in sorted(rows)]
            table = pa.Table.from_pylist(written, schema=STORED_SAMPLES.with_metadata(metadata))
            temporary = self.folder / f".{self.stem}-{uuid.uuid4().hex[:8]}.tmp"
            try:
                pq.write_table(table, temporary, compression="zstd")
                os.replace(temporary, self.part)
            finally:
                temporary.unlink(missing_ok=True)
        for journal in journals:
            journal.unlink(missing_ok=True)

    def _lines(self, journals: Sequence[Path]) -> Iterator[dict[str, Any]]:
        for journal in journals:
            with journal.open("rb") as file:
                for raw in file:
                    try:
                        yield json.loads(raw)
                    except ValueError:  # cut short by a kill or a full disk; nothing follows it
                        break

    def close(self) -> None:
        """Close the journal; what is in it is found again."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def _read_part(part: Path, columns: list[str]) -> pa.Table:
    with _naming(part):
        return pq.read_table(part, columns=columns)


def _metadata(part: Path) -> pq.FileMetaData:
    with _naming(part):
        return pq.read_metadata(part)


@contextlib.contextmanager
def _naming(part: Path) -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as error:
        raise UserError(f"{part}: no valid Parquet ({error}); remove it, and its samples are asked again") from None

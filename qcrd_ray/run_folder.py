"""Where a run keeps what, on whatever storage. A file is whole or absent; a folder is complete or absent.

A folder that others read (a checkpoint, a snapshot, the student) holds a `manifest.json` with the size and the checksum
of each of its files. It is written last, so a folder without one is not there, and one that was damaged is found out.
What lies on another filesystem is read through a cache of the node's, which fetches it once for all processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

from filelock import FileLock

from qcrd_ray.errors import UserError
from qcrd_ray.storage import (
    LocalStorage,
    Storage,
    is_uri,
    local_folder,
    open_storage,
    shown,
    storage_message,
    with_patience,
    write_bytes_atomic,
)

T = TypeVar("T")
MANIFEST = "manifest.json"
CONFIG, RESULT, METRICS = "config.yaml", "result.json", "metrics.jsonl"
DATA, SNAPSHOTS, CHECKPOINTS, NEGATIVES = "data", "snapshots", "checkpoints", "negatives"
STUDENT, JUDGE, SCRATCH_STUDENT, INITIAL_JUDGE = "student", "judge", "scratch_student", "initial_judge"
TOKENIZER, FIXED_STUDENT, LAST_STUDENT = "tokenizer", "fixed_student", "last_student"
EVALUATIONS = "evaluations"
EVALUATIONS_SUMMARY = f"{EVALUATIONS}/summary.json"
OBSERVATIONS = "observations"
OBSERVATIONS_FILE = f"{OBSERVATIONS}/rationales.parquet"
FETCH_SECONDS = 1800.0
DIGEST_BYTES = 16


class DamagedFolder(UserError):
    """A folder of a run whose files are not those that were written."""


@dataclass(frozen=True)
class RunFolder:
    """`<storage_path>/<name>/`: config.yaml, data/, checkpoints/, snapshots/, negatives/, student/, judge/, …

    Attributes:
        storage_path: a folder, or a URI that pyarrow opens.
        name: of the run.
        patience_s: seconds for which a storage that fails is tried again.
        key: of the config, that names the path.
    """

    storage_path: str
    name: str
    patience_s: float = 120.0
    key: str = "run.storage_path"

    def __post_init__(self) -> None:
        if not is_uri(self.storage_path):  # other processes may work in other directories
            object.__setattr__(self, "storage_path", str(local_folder(self.storage_path)))

    @property
    def storage(self) -> Storage:
        return open_storage(self.storage_path, self.name, self.key)

    @property
    def root(self) -> Path | None:
        """The folder, where it is one; None on another filesystem."""
        return None if is_uri(self.storage_path) else local_folder(self.storage_path) / self.name

    def __str__(self) -> str:
        return str(self.root or f"{shown(self.storage_path).rstrip('/')}/{self.name}")

    def where(self, name: str) -> str:
        """The place of a file or folder, for messages."""
        return f"{self}/{name}" if name else str(self)

    def patiently(self, name: str, action: Callable[[], T]) -> T:
        """Do something with `name` in the storage, again and again where it fails for a moment.

        Raises:
            FileNotFoundError: it is missing from a storage that is there.
            UserError: it failed for good.
        """
        return with_patience(self.storage, self.where(name), self.patience_s, action, self.key)

    # Files

    def create(self) -> None:
        """Make the run's folder. Raises UserError at once where that cannot be."""
        try:
            self.storage.create()
        except OSError as error:
            raise UserError(f"config key {self.key}: {storage_message(str(self), error, 0, self.key)}") from None

    def exists(self, name: str = "") -> bool:
        found: bool = self.patiently(name, lambda: self.storage.exists(name))
        return found

    def read(self, name: str, start: int = 0) -> bytes:
        """A file's bytes from `start` on. Raises FileNotFoundError."""
        data: bytes = self.patiently(name, lambda: self.storage.read(name, start))
        return data

    def read_json(self, name: str) -> Any:
        """What a JSON file holds, None where there is none."""
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes | str) -> None:
        content = data.encode("utf-8") if isinstance(data, str) else data
        self.patiently(name, lambda: self.storage.write(name, content))

    def list(self, name: str) -> list[str]:
        """Names in a folder, sorted, without those that are being written or removed."""
        names: list[str] = self.patiently(name, lambda: self.storage.list(name))
        return [found for found in names if not found.startswith(".")]

    def remove(self, name: str) -> None:
        self.patiently(name, lambda: self.storage.remove(name))

    def remove_leftovers(self) -> None:
        """Remove what a kill left half written."""
        for folder in ("", DATA, SNAPSHOTS, CHECKPOINTS, NEGATIVES, EVALUATIONS, OBSERVATIONS):
            for name in self.patiently(folder, partial(self.storage.list, folder)):
                if re.fullmatch(r"\..+\.[0-9a-f]{8}\.(tmp|old)", name):
                    self.remove(f"{folder}/{name}" if folder else name)

    # Folders

    @contextmanager
    def new_folder(self, name: str) -> Iterator[Path]:
        """A folder to fill that becomes `name` when the block ends well, and nothing when it does not.

        Raises:
            UserError: the storage cannot take it.
        """
        if self.root is None:
            temporary = Path(tempfile.mkdtemp(prefix="qcrd_ray-"))
        else:
            target = self.root / name
            temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
            self.patiently(name, self.storage.check)
            self.patiently(name, lambda: temporary.mkdir(parents=True))
        try:
            yield temporary
            if self.root is None:
                self.put_folder(temporary, name)
            else:
                self.patiently(name, lambda: _seal(temporary, target))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def write_folder(self, name: str, fill: Callable[[Path], None]) -> None:
        """`new_folder`, filled by a function that is called again where the storage fails for a moment."""
        with self.new_folder(name) as folder:
            self.patiently(name, lambda: fill(folder))

    def put_folder(self, source: Path, name: str) -> None:
        """Copy a folder into the storage, its manifest last."""
        manifest = _manifest(source)
        if self.exists(f"{name}/{MANIFEST}"):
            self.remove(name)
        for file in json.loads(manifest)["files"]:
            put = partial(self.storage.put_file, source / file, f"{name}/{file}")
            self.patiently(f"{name}/{file}", put)
        self.write(f"{name}/{MANIFEST}", manifest)

    def has_folder(self, name: str) -> bool:
        """Whether a folder is there, complete."""
        return MANIFEST in self.list(name)

    def digest(self, name: str) -> str:
        """What a folder holds, as a checksum. Raises DamagedFolder where there is no complete one."""
        return hashlib.blake2b(self._manifest_of(name), digest_size=DIGEST_BYTES).hexdigest()

    def _manifest_of(self, name: str) -> bytes:
        try:
            return self.read(f"{name}/{MANIFEST}")
        except FileNotFoundError:
            raise DamagedFolder(f"{self.where(name)}: not there, or not complete (no {MANIFEST})") from None

    def get_folder(self, name: str, check: bool = True) -> Path:
        """A folder as files of this machine, every one of them checked against the manifest.

        Args:
            check: False trusts a folder that lies on this machine, where somebody has just checked it.

        Raises:
            DamagedFolder: a file is missing, short or changed; the line says which.
        """
        if self.root is not None and not check:
            return self.root / name
        manifest = self._manifest_of(name)
        files = _files_of(manifest, self.where(name))
        if self.root is not None:
            _check_files(self.root / name, files, self.where(name))
            return self.root / name
        target = self._cache() / f"{name}-{hashlib.blake2b(manifest, digest_size=8).hexdigest()}"
        with self._fetching(target):
            if not target.is_dir():
                with atomic_folder(target) as folder:
                    for file in files:
                        self._fetch(f"{name}/{file}", folder / file)
                    _check_files(folder, files, self.where(name))
        return target

    def get_file(self, folder: str, file: str) -> Path:
        """One file of a folder, as a file of this machine."""
        if self.root is not None:
            return self.root / folder / file
        manifest = self._manifest_of(folder)
        target = self._cache() / f"{folder}-{hashlib.blake2b(manifest, digest_size=8).hexdigest()}.files" / file
        with self._fetching(target):
            if not target.is_file():
                temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
                try:
                    self._fetch(f"{folder}/{file}", temporary)
                    os.replace(temporary, target)
                finally:
                    temporary.unlink(missing_ok=True)
        return target

    def copy_folder(
        self, source: str, target: str, without: Sequence[str] = (), fill: Callable[[Path], None] | None = None
    ) -> None:
        """Copy a complete folder to another name, without the files of these names.

        Args:
            fill: writes what comes besides into the copy, before it is there.
        """
        origin = self.get_folder(source)
        with self.new_folder(target) as folder:
            for file in sorted(origin.rglob("*")):
                if file.is_file() and file.name not in (MANIFEST, *without):
                    copy = folder / file.relative_to(origin)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)
            if fill is not None:
                fill(folder)

    def forget_cached(self, name: str) -> None:
        """Remove this node's copies of a folder."""
        if self.root is None:
            parent = (self._cache() / name).parent
            for path in parent.glob(f"{Path(name).name}-*"):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def clear_cache(self) -> None:
        """Remove this node's copies of everything in the run."""
        if self.root is None:
            shutil.rmtree(self._cache(), ignore_errors=True)

    def _cache(self) -> Path:
        key = hashlib.blake2b(f"{self.storage_path}\n{self.name}".encode(), digest_size=8).hexdigest()
        return cache_folder() / "runs" / f"{self.name}-{key}"

    @contextmanager
    def _fetching(self, target: Path) -> Iterator[None]:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock", timeout=FETCH_SECONDS):
            yield

    def _fetch(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.patiently(name, lambda: self.storage.get_file(name, target))
        except FileNotFoundError:
            raise DamagedFolder(f"{self.where(name)}: missing") from None

    # What the run consists of

    def snapshot(self, number: int) -> str:
        return f"{SNAPSHOTS}/{number:06d}"

    def snapshot_numbers(self) -> Sequence[int]:
        """Snapshots that are there, complete."""
        return [int(n) for n in self.list(SNAPSHOTS) if n.isdigit() and self.has_folder(f"{SNAPSHOTS}/{n}")]

    def table(self, split: str) -> Path:
        """The table of a split, as a file of this machine."""
        return self.get_file(DATA, f"{split}.arrow")

    def find_table(self, name: str) -> Path | None:
        """A table that need not be there."""
        if self.root is not None:
            path = self.root / DATA / f"{name}.arrow"
            return path if path.is_file() else None
        return self.table(name) if f"{name}.arrow" in self.list(DATA) else None

    def working_folder(self, name: str) -> Path:
        """Where the driver makes a folder: in its place, or in the node's cache to be `put_folder` from there."""
        return self.root / name if self.root is not None else self._cache() / "working" / name


def _manifest(folder: Path) -> bytes:
    """{"files": {path: [bytes, checksum]}} of a folder, sorted."""
    files = {
        str(path.relative_to(folder)): [path.stat().st_size, _checksum(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    return (json.dumps({"files": files}, indent=1) + "\n").encode()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()


def _files_of(manifest: bytes, where: str) -> dict[str, tuple[int, str]]:
    try:
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in json.loads(manifest)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedFolder(f"{where}/{MANIFEST}: no manifest of files") from None
    for name in files:
        if name.startswith("/") or ".." in Path(name).parts:
            raise DamagedFolder(f"{where}/{MANIFEST}: {name!r} is no file of this folder")
    return files


def _check_files(folder: Path, files: dict[str, tuple[int, str]], where: str) -> None:
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                raise DamagedFolder(f"{where}: {name} has {found} bytes, expected {size}")
            if _checksum(path) != digest:
                raise DamagedFolder(f"{where}: {name} is not what was written (checksum)")
        except OSError as error:
            raise DamagedFolder(f"{where}: {name} cannot be read ({error.strerror or error})") from None


def cache_folder() -> Path:
    """QCRD_CACHE, or qcrd_ray below XDG_CACHE_HOME, or ~/.cache/qcrd_ray."""
    if own := os.environ.get("QCRD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcrd_ray"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends well, and nothing when it does not."""
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _rename_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _seal(folder: Path, target: Path) -> None:
    write_bytes_atomic(folder / MANIFEST, _manifest(folder))
    _rename_folder(folder, target)


def _rename_folder(folder: Path, target: Path) -> None:
    if target.exists():
        old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
        os.rename(target, old)
        os.rename(folder, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(folder, target)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, text.encode("utf-8"))


def writable_folder(folder: str | Path, key: str) -> Path:
    """A folder of the user's, made where it is not there.

    Args:
        key: of the config, that names it.

    Raises:
        UserError: nothing can be written there.
    """
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"config key {key}: {path} is no folder that can be written to: {error.strerror}") from None
    return path


@contextmanager
def text_file_atomic(path: Path) -> Iterator[TextIO]:
    """A file to write, which is there once the block ends well. A device or a pipe is written as it is.

    Raises:
        UserError: it cannot be written there.
    """
    path = path.expanduser()
    direct = path.exists() and (not path.is_file() or path.parts[1:2] in (("dev",), ("proc",)))
    path = path if direct else path.resolve()  # the file that a link names, not the link, is replaced
    temporary = path if direct else path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        file = temporary.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        yield file
        try:
            file.flush()
            if not direct:
                os.fsync(file.fileno())
            file.close()
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        if not direct:
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # what the buffer holds could not be written before either
            file.close()
        if not direct:
            temporary.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


class Metrics:
    """`metrics.jsonl`: appended to where the storage is a folder; elsewhere kept here and written whole now and then.

    One process writes it at a time.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._lines: list[str] = []
        self._fresh = False

    def begin(self, step: int) -> None:
        """Training starts (again) at `step`: what will be done again, and a line that a kill cut short, goes."""
        try:
            lines = self._run.read(METRICS).decode("utf-8", "replace").splitlines(keepends=True)
        except FileNotFoundError:
            lines = []
        self._lines = [
            line for line in lines if step and line.endswith("\n") and json.loads(line).get("step", -1) < step
        ]
        if lines or not isinstance(self._run.storage, LocalStorage):
            self._fresh = True
            self.flush()

    def add(self, record: dict[str, Any]) -> None:
        line = json.dumps(record) + "\n"
        root = self._run.root
        if root is None:
            self._lines.append(line)
            self._fresh = True
            return

        def append() -> None:
            with (root / METRICS).open("a", encoding="utf-8") as file:  # one write: a kill leaves whole lines
                file.write(line)

        with_patience(self._run.storage, self._run.where(METRICS), self._run.patience_s, append)

    def flush(self) -> None:
        """Have all lines in the storage."""
        if self._fresh:
            self._run.write(METRICS, "".join(self._lines))
            self._fresh = False
        if self._run.root is not None:
            self._lines = []

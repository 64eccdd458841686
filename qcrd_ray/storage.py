"""Where a run's files lie: a folder, or any filesystem that pyarrow speaks (S3, GCS, HDFS, …).

A file is written whole or not at all. What fails for a moment is tried again; what fails for good, or cannot be mended
by waiting, is one line for the user.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from qcrd_ray.errors import UserError, first_line

logger = logging.getLogger(__name__)

T = TypeVar("T")
HOPELESS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG})
"""Errors that no waiting mends."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0


class Storage(Protocol):
    """Files by their path relative to a base. What is missing raises FileNotFoundError, all else OSError."""

    def check(self) -> None:
        """Raise OSError where the base is not there (any more)."""
        ...

    def create(self) -> None: ...

    def exists(self, name: str) -> bool: ...

    def read(self, name: str, start: int = 0) -> bytes:
        """A file from byte `start` on."""
        ...

    def write(self, name: str, data: bytes) -> None: ...

    def list(self, name: str) -> list[str]:
        """Names of the files and folders in a folder, sorted; none where there is no such folder."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all that is in it; nothing happens where it is not there."""
        ...

    def put_file(self, source: Path, name: str) -> None: ...

    def get_file(self, name: str, target: Path) -> None: ...


class LocalStorage:
    """A folder of this machine, or one that is mounted on it."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def check(self) -> None:
        if not self.base.is_dir():
            raise OSError(errno.ENODEV, f"{self.base} is gone, or was never on this host ({socket.gethostname()})")

    def create(self) -> None:
        self.base.mkdir(parents=True, exist_ok=True)

    def exists(self, name: str) -> bool:
        return (self.base / name).exists()

    def read(self, name: str, start: int = 0) -> bytes:
        with (self.base / name).open("rb") as file:
            file.seek(start)
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        write_bytes_atomic(self._ready(name), data)

    def list(self, name: str) -> list[str]:
        self.check()
        folder = self.base / name
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def remove(self, name: str) -> None:
        path = self.base / name
        if path.is_dir():
            # Renamed first: a kill in the middle must not leave half a folder under its name.
            gone = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, gone)
                shutil.rmtree(gone, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def put_file(self, source: Path, name: str) -> None:
        target = self._ready(name)
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            shutil.copyfile(source, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def get_file(self, name: str, target: Path) -> None:
        shutil.copyfile(self.base / name, target)

    def _ready(self, name: str) -> Path:
        """The path of a file whose folder is there; the base itself is never made anew: it may be an empty mount."""
        self.check()
        path = self.base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class ArrowStorage:
    """A filesystem of pyarrow. Object stores show a file once it is whole; elsewhere it is renamed."""

    def __init__(self, filesystem: Any, base: str) -> None:
        self.filesystem, self.base = filesystem, base.rstrip("/")
        self.whole = filesystem.type_name in ("s3", "gcs", "abfs")

    def _path(self, name: str) -> str:
        return f"{self.base}/{name}" if name else self.base

    def check(self) -> None:
        self.filesystem.get_file_info(self.base)

    def create(self) -> None:
        self.filesystem.create_dir(self.base, recursive=True)

    def exists(self, name: str) -> bool:
        return bool(self._info(name).type)

    def _info(self, name: str) -> Any:
        return self.filesystem.get_file_info(self._path(name))

    def read(self, name: str, start: int = 0) -> bytes:
        with self.filesystem.open_input_file(self._path(name)) as file:
            file.seek(start)
            return bytes(file.read())

    def write(self, name: str, data: bytes) -> None:
        def fill(stream: Any) -> None:
            stream.write(data)

        self._write(name, fill)

    def put_file(self, source: Path, name: str) -> None:
        def fill(stream: Any) -> None:
            with source.open("rb") as file:
                shutil.copyfileobj(file, stream, 1 << 23)

        self._write(name, fill)

    def _write(self, name: str, fill: Callable[[Any], None]) -> None:
        path = self._path(name)
        folder, _, last = path.rpartition("/")
        if self.whole:
            # An abandoned stream is never closed: closing it would make a short file of it.
            stream = self.filesystem.open_output_stream(path)
            fill(stream)
            stream.close()
            return
        self.filesystem.create_dir(folder, recursive=True)
        temporary = f"{folder}/.{last}.{uuid.uuid4().hex[:8]}.tmp"
        with self.filesystem.open_output_stream(temporary) as stream:
            fill(stream)
        self.filesystem.move(temporary, path)

    def list(self, name: str) -> list[str]:
        import pyarrow.fs

        selector = pyarrow.fs.FileSelector(self._path(name), allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector) if info.base_name)

    def remove(self, name: str) -> None:
        import pyarrow.fs

        kind = self._info(name).type
        if kind == pyarrow.fs.FileType.Directory:
            # The manifest says that a folder is complete: it goes first.
            for first in ("manifest.json", ""):
                path = self._path(f"{name}/{first}" if first else name)
                with contextlib.suppress(FileNotFoundError):
                    self.filesystem.delete_file(path) if first else self.filesystem.delete_dir(path)
        elif kind == pyarrow.fs.FileType.File:
            self.filesystem.delete_file(self._path(name))

    def get_file(self, name: str, target: Path) -> None:
        with self.filesystem.open_input_stream(self._path(name)) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 23)


def is_uri(path: str) -> bool:
    """Whether a storage path names a filesystem (`s3://…`); `file://` is a folder like any other."""
    return "://" in path and not path.startswith("file://")


def local_folder(path: str) -> Path:
    """The folder of a storage path that is no URI of another filesystem."""
    return Path(path.removeprefix("file://")).expanduser().absolute()


def below(path: str, name: str) -> str:
    """The storage path of `name` below another; a URI keeps its options behind it."""
    if not is_uri(path):
        return str(local_folder(path) / name)
    base, mark, options = path.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{options}"


@lru_cache(maxsize=16)
def open_storage(path: str, name: str, key: str = "run.storage_path") -> Storage:
    """The storage of `name` below a storage path.

    Args:
        key: of the config, that names the path.

    Raises:
        UserError: a URI that pyarrow cannot open.
    """
    if not is_uri(path):
        return LocalStorage(local_folder(path) / name)
    import pyarrow as pa
    import pyarrow.fs

    try:
        filesystem, base = pyarrow.fs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, TypeError) as error:
        raise UserError(
            f"config key {key}: {shown(path)} is no folder and no URI that pyarrow opens ({first_line(error)})"
        ) from None
    return ArrowStorage(filesystem, f"{base.rstrip('/')}/{name}")


def shown(path: str) -> str:
    """A storage path without its options, for messages."""
    return path.partition("?")[0]


def with_patience(
    storage: Storage, where: str, seconds: float, action: Callable[[], T], key: str = "run.storage_path"
) -> T:
    """Do something with a storage, again and again for `seconds` where it fails.

    Args:
        key: of the config, that names the storage.

    Raises:
        FileNotFoundError: what is asked for is missing from a storage that is there.
        UserError: it failed for good: one line with where, why and what to do.
    """
    end = time.monotonic() + seconds
    pause = FIRST_PAUSE_S
    while True:
        try:
            return action()
        except Exception as error:
            found = as_os_error(error)
            if found is None:
                raise
            failure = found
        if isinstance(failure, FileNotFoundError):
            # Missing, or the whole storage has gone away?
            try:
                storage.check()
            except OSError as error:
                failure = error
            else:
                raise failure
        if failure.errno in HOPELESS or time.monotonic() + pause > end:
            raise UserError(storage_message(where, failure, seconds, key)) from None
        if pause == FIRST_PAUSE_S:
            logger.warning("storage %s: %s; trying again", where, first_line(failure))
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def as_os_error(error: Exception) -> OSError | None:
    """The operating system's error in an exception (safetensors only names its number), None where there is none."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def storage_message(where: str, error: OSError, seconds: float, key: str) -> str:
    """One line about a storage that cannot be used."""
    reason = error.strerror or first_line(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        todo = "make room and start again"
    elif error.errno in HOPELESS:
        todo = f"give this user the right to write there, or set another {key}, and start again"
    else:
        todo = f"it was tried for {seconds:g} s (run.storage_timeout_s); bring it back and start again"
    return f"storage {where}: {reason}; what was written before is untouched: {todo}"


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, into a folder that is there."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

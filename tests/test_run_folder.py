from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcrd_ray.run_lock as run_lock
from qcrd_ray.config import load_config
from qcrd_ray.errors import UserError
from qcrd_ray.run_folder import (
    MANIFEST,
    METRICS,
    DamagedFolder,
    Metrics,
    RunFolder,
    text_file_atomic,
    writable_folder,
)
from qcrd_ray.run_lock import LostRun, RunLock, check_owner
from qcrd_ray.storage import below
from tests.s3_server import S3Server, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server("bucket") as server:
        yield server


@pytest.fixture(params=["folder", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("QCRD_CACHE", str(tmp_path / "cache"))
    path = str(tmp_path / "runs")
    if request.param == "s3":
        path = request.getfixturevalue("server").uri(f"bucket/{tmp_path.name}")
    folder = RunFolder(path, "one", 5.0)
    folder.create()
    return folder


def fill(folder: Path, text: str = "a") -> None:
    (folder / "deep").mkdir(exist_ok=True)
    (folder / "x.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "deep" / "y.txt").write_text(text)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/runs", "/runs/a/b"),
        ("/runs?/", "/runs?/a/b"),
        ("file:///runs", "/runs/a/b"),
        ("s3://b/runs/", "s3://b/runs/a/b"),
        ("s3://b/runs?x=y&z=w:1", "s3://b/runs/a/b?x=y&z=w:1"),
        ("s3://b", "s3://b/a/b"),
    ],
)
def test_a_place_below_a_storage_path(path: str, expected: str) -> None:
    assert below(path, "a/b") == expected


def test_what_is_below_a_storage_path_is_in_it(run: RunFolder) -> None:
    RunFolder(below(run.storage_path, "one"), "deep", 5.0).create()
    RunFolder(below(run.storage_path, "one"), "deep", 5.0).write("a.txt", "a")
    assert run.read("deep/a.txt") == b"a"


def test_files(run: RunFolder) -> None:
    assert not run.exists("a.txt")
    assert run.read_json("a.txt") is None
    with pytest.raises(FileNotFoundError):
        run.read("a.txt")
    run.write("a.txt", "one")
    run.write("folder/b.txt", b"two")
    run.write("a.txt", "three")
    assert run.read("a.txt") == b"three"
    assert run.read("a.txt", 2) == b"ree"
    assert run.list("") == ["a.txt", "folder"]
    assert run.list("none") == []
    run.remove("a.txt")
    run.remove("a.txt")
    run.remove("folder")
    assert run.list("") == []


def test_a_folder_is_complete_or_absent_and_read_back_whole(run: RunFolder) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.write_folder("snapshots/000001", fail)
    assert not run.has_folder("snapshots/000001")
    run.write_folder("snapshots/000001", fill)
    assert run.has_folder("snapshots/000001")
    assert run.snapshot_numbers() == [1]
    read = run.get_folder("snapshots/000001")
    assert (read / "x.bin").read_bytes() == bytes(range(256)) * 40
    assert (read / "deep" / "y.txt").read_text() == "a"
    first = run.digest("snapshots/000001")
    run.write_folder("snapshots/000001", lambda folder: fill(folder, "b"))
    assert run.digest("snapshots/000001") != first
    assert (run.get_folder("snapshots/000001") / "deep" / "y.txt").read_text() == "b"
    run.copy_folder("snapshots/000001", "student", without=["x.bin"])
    assert not (run.get_folder("student") / "x.bin").exists()
    assert (run.get_file("student", "deep/y.txt")).read_text() == "b"
    run.remove("snapshots/000001")
    with pytest.raises(DamagedFolder, match="not there, or not complete"):
        run.get_folder("snapshots/000001")


def test_a_folder_without_its_manifest_is_not_there(run: RunFolder) -> None:
    run.write("snapshots/000002/x.bin", b"half")
    assert not run.has_folder("snapshots/000002")
    assert run.snapshot_numbers() == []


@pytest.mark.parametrize("damage", ["short", "changed", "missing", "manifest"])
def test_damage_is_found_and_named(run: RunFolder, damage: str) -> None:
    run.write_folder("checkpoints/00000004", fill)
    name = "checkpoints/00000004/x.bin"
    data = run.read(name)
    if damage == "short":
        run.write(name, data[:100])
    elif damage == "changed":
        run.write(name, b"\xff" + data[1:])
    elif damage == "missing":
        run.remove(name)
    else:
        run.write(f"checkpoints/00000004/{MANIFEST}", "{")
    with pytest.raises(DamagedFolder) as raised:
        run.get_folder("checkpoints/00000004")
    words = {"short": "x.bin has 100 bytes, expected 10240", "changed": "checksum", "missing": "x.bin",
             "manifest": "no manifest"}  # fmt: skip
    assert words[damage] in str(raised.value)
    assert "checkpoints/00000004" in str(raised.value)


def test_a_manifest_names_no_file_outside_of_its_folder(run: RunFolder) -> None:
    run.write(f"evil/{MANIFEST}", json.dumps({"files": {"../../x": [1, "0"]}}))
    with pytest.raises(DamagedFolder, match="no file of this folder"):
        run.get_folder("evil")


def test_what_a_kill_left_half_written_goes(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path), "one")
    run.create()
    code = (
        "import sys, time; from qcrd_ray.run_folder import RunFolder\n"
        "run = RunFolder(sys.argv[1], 'one')\n"
        "with run.new_folder('checkpoints/00000001') as folder:\n"
        "    (folder / 'x').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    assert run.list("checkpoints") == []
    assert len(os.listdir(tmp_path / "one" / "checkpoints")) == 1
    run.remove_leftovers()
    assert os.listdir(tmp_path / "one" / "checkpoints") == []


def test_a_storage_that_is_away_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path), "one", 30.0)
    run.create()
    run.write("a.txt", "a")
    os.rename(tmp_path / "one", tmp_path / "away")
    threading.Timer(1.0, lambda: os.rename(tmp_path / "away", tmp_path / "one")).start()
    assert run.read("a.txt") == b"a"
    os.rename(tmp_path / "one", tmp_path / "away")
    threading.Timer(1.0, lambda: os.rename(tmp_path / "away", tmp_path / "one")).start()
    run.write("b.txt", "b")
    assert run.list("") == ["a.txt", "b.txt"]


def test_a_storage_that_is_gone_is_one_line_and_is_not_made_anew(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path), "one", 0.5)
    run.create()
    os.rename(tmp_path / "one", tmp_path / "away")
    with pytest.raises(UserError, match=r"one/a.txt: .*is gone, .*untouched: it was tried for 0.5 s"):
        run.write("a.txt", "a")
    with pytest.raises(UserError, match="is gone"), run.new_folder("checkpoints/00000001"):
        pass
    with pytest.raises(UserError, match="is gone"):
        run.list("checkpoints")
    assert not (tmp_path / "one").exists()


def test_an_s3_server_that_does_not_answer_for_a_moment(server: S3Server, tmp_path: Path) -> None:
    run = RunFolder(server.uri(f"bucket/{tmp_path.name}"), "one", 60.0)
    run.create()
    run.write("a.txt", "a")
    server.stop()
    timer = threading.Timer(6.0, server.go_on)
    timer.start()
    begin = time.monotonic()
    run.write("b.txt", "b")
    assert time.monotonic() - begin > 3
    assert run.read("b.txt") == b"b"


def test_an_s3_server_that_is_gone(tmp_path: Path) -> None:
    with s3_server("bucket") as server:
        run = RunFolder(server.uri("bucket/runs"), "one", 1.0)
        run.create()
        server.process.kill()
        server.process.wait()
        with pytest.raises(UserError, match=r"storage s3://bucket/runs/one/a.txt: .*run.storage_timeout_s"):
            run.write("a.txt", "a")


def test_a_full_disk_is_one_line_at_once(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.decode()[:100]}")
    try:
        run = RunFolder(str(mount), "one", 60.0)
        run.create()
        run.write("good.txt", "good")
        run.write_folder("snapshots/000001", fill)
        begin = time.monotonic()
        with pytest.raises(UserError, match="No space left on device; .*make room and start again"):
            run.write("large", b"x" * 400_000)
        with pytest.raises(UserError, match="No space left"), run.new_folder("snapshots/000002") as folder:
            run.patiently("snapshots/000002", lambda: (folder / "x").write_bytes(b"x" * 400_000))
        with pytest.raises(UserError, match="No space left"):
            run.write_folder("snapshots/000003", _save_large_tensor)
        metrics = Metrics(run)
        with pytest.raises(UserError, match="No space left"):
            metrics.add({"step": 0, "text": "x" * 400_000})
        assert time.monotonic() - begin < 10
        assert run.snapshot_numbers() == [1]
        assert run.get_folder("snapshots/000001").is_dir()
        assert run.read("good.txt") == b"good"
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def _save_large_tensor(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(200_000)}, folder / "x.safetensors")


def test_errors_that_waiting_does_not_mend_end_at_once(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path), "one", 60.0)
    run.create()

    def refuse() -> None:
        raise OSError(errno.EACCES, "Permission denied")

    begin = time.monotonic()
    with pytest.raises(UserError, match="Permission denied"):
        run.patiently("x", refuse)
    assert time.monotonic() - begin < 1


def test_another_filesystem_is_fetched_once_a_node(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCRD_CACHE", str(tmp_path / "cache"))
    run = RunFolder(server.uri(f"bucket/{tmp_path.name}"), "one", 10.0)
    run.create()
    run.write_folder("snapshots/000001", fill)
    first = run.get_folder("snapshots/000001")
    stamp = (first / "x.bin").stat().st_mtime_ns
    code = (
        "import sys; from qcrd_ray.run_folder import RunFolder\n"
        "print(RunFolder(sys.argv[1], 'one').get_folder('snapshots/000001'))"
    )
    done = [
        subprocess.Popen([sys.executable, "-c", code, run.storage_path], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert {process.communicate()[0].strip() for process in done} == {str(first)}
    assert (first / "x.bin").stat().st_mtime_ns == stamp
    run.forget_cached("snapshots/000001")
    assert not first.exists()


def test_metrics_drop_what_is_done_again(run: RunFolder) -> None:
    metrics = Metrics(run)
    metrics.begin(0)
    metrics.add({"judge_pretrained_steps": 3})
    for step in range(6):
        metrics.add({"step": step})
    metrics.flush()
    if run.root is not None:
        with (run.root / METRICS).open("a") as file:
            file.write('{"step": 6, "lo')
    again = Metrics(run)
    again.begin(4)
    again.add({"step": 4})
    again.flush()
    lines = [json.loads(line) for line in run.read(METRICS).decode().splitlines()]
    assert lines == [{"judge_pretrained_steps": 3}, *({"step": step} for step in range(5))]


# One driver a run


def test_a_living_driver_keeps_its_run_and_a_dead_one_leaves_it(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path), "one")
    run.create()
    code = (
        "import sys, time; from qcrd_ray.run_folder import RunFolder; from qcrd_ray.run_lock import RunLock\n"
        "with RunLock(RunFolder(sys.argv[1], 'one')) as lock: print(lock.token, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    token = process.stdout.readline().strip()
    check_owner(run, token)
    with pytest.raises(UserError, match=f"is being trained by process {process.pid} of"), RunLock(run):
        pass
    check_owner(run, token)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begin = time.monotonic()
    with RunLock(run) as lock:
        check_owner(run, lock.token)
        with pytest.raises(LostRun, match="another driver has taken over"):
            check_owner(run, token)
    assert time.monotonic() - begin < 5
    assert not run.exists("owner.json")


def test_a_driver_of_another_machine_is_known_by_its_heartbeat(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SILENCE_SECONDS", 2.0)
    owner = {"token": "other", "host": "elsewhere", "machine": "elsewhere 1", "process": 5, "beat": 0}
    run.write("owner.json", json.dumps(owner))
    beats = threading.Timer(0.5, lambda: run.write("owner.json", json.dumps(owner | {"beat": 1})))
    beats.start()
    with pytest.raises(UserError, match="process 5 of elsewhere"), RunLock(run):
        pass
    with RunLock(run) as lock:  # no beat any more
        check_owner(run, lock.token)


def test_a_key_in_the_storage_path_is_refused_and_not_shown() -> None:
    for path in ("s3://id:topsecret@bucket/runs", "s3://bucket/runs?secret_key=topsecret"):
        with pytest.raises(UserError, match="keys are taken from the environment only") as raised:
            load_config(None, [f"run.storage_path={path}"])
        assert "topsecret" not in str(raised.value)


def test_a_file_is_there_once_it_is_whole_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")

    def write_half() -> None:
        with text_file_atomic(tmp_path / "link") as file:
            file.write("ne")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        write_half()
    assert (tmp_path / "real").read_text() == "old"
    with text_file_atomic(tmp_path / "link") as file:
        file.write("new")
        assert (tmp_path / "real").read_text() == "old"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_pipe_is_written_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    with text_file_atomic(tmp_path / "pipe") as file:
        file.write("text")
    reader.join()
    assert read == ["text"] and (tmp_path / "pipe").is_fifo()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    assert writable_folder(tmp_path / "a" / "b", "output").is_dir()
    (tmp_path / "file").write_text("")
    for place in ("file", "file/deeper", "/proc/nowhere"):
        with pytest.raises(UserError, match=r"config key output: .* is no folder that can be written to: "):
            writable_folder(tmp_path / place, "output")

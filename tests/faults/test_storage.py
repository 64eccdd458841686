"""Runs whose storage is damaged, full, away for a moment, or no folder at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcrd_ray.run_folder import RunFolder
from tests.faults.runs import Run, audit, losses_of, steps_of
from tests.s3_server import s3_server

SETTINGS = ("train.max_steps=48", "train.iteration_steps=6", "train.checkpoint_interval=8", "judge.enabled=false",
            "evaluation.examples=0")  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("owner.json", "attempt.json")
    }


def truncate(path: Path) -> bytes:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return data


def refused(folder: Path, *arguments: str) -> str:
    """The one line that a start ends with."""
    with Run(folder, "run", *SETTINGS, *arguments) as run:
        run.wait(code=2)
    last = run.said.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that a run fills, or a folder like any other where none can be mounted."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=110m", "tmpfs", str(mount)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        print(f"no small disk can be mounted here: {done.stderr.decode()[:100]}")
    yield mount
    if not done.returncode:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk_ends_a_run_what_is_damaged_is_named_and_the_rest_goes_on(small_disk: Path) -> None:
    settings = ("train.keep_snapshots=true",)
    with Run(small_disk, "run", *SETTINGS, *settings) as run:
        if os.path.ismount(small_disk):
            run.wait(code=2)
            # The log lies on the full disk too: what fits of it must be no traceback.
            assert "Traceback" not in run.said.split("error:")[-1]
            complete = complete_checkpoints(run.folder)
            last = run.said.strip().splitlines()[-1] if run.log.stat().st_size else ""
            if last.startswith("error: "):
                assert "No space left on device" in last
                assert f"goes on from step {int(complete[-1].name)}" in last
            subprocess.run(["mount", "-o", "remount,size=600m", str(small_disk)], check=True)
        else:
            run.until_step(28)
            run.kill_driver()
    folder = run.folder
    checkpoints = complete_checkpoints(folder)
    assert len(checkpoints) == 2
    older, _ = (int(path.name) for path in checkpoints)

    before = content(folder)
    last = refused(small_disk, *settings, "loss.beta=0.3", "optim.lr=0.002")
    assert "loss.beta (0.2 there, 0.3 here)" in last
    assert "optim.lr (0.001 there, 0.002 here)" in last
    assert content(folder) == before

    weights = checkpoints[1] / "optimizer-00000.safetensors"
    data = truncate(weights)
    damaged = content(folder)
    last = refused(small_disk, *settings)
    assert f"optimizer-00000.safetensors has {len(data) // 2} bytes, expected {len(data)}" in last
    assert f"remove that folder to go on from step {older}" in last
    assert content(folder) == damaged
    shutil.rmtree(checkpoints[1])

    needed = older // 6 - 1  # for the iteration after that of the older checkpoint
    snapshot = folder / "snapshots" / f"{needed:06d}" / "model.safetensors"
    data = truncate(snapshot)
    for file in folder.glob("negatives/*.parquet"):  # those that are there are not sampled again
        if int(file.name.split("-")[1]) > older // 6:
            file.unlink()
    last = refused(small_disk, *settings)
    assert f"snapshot {folder}/snapshots/{needed:06d}: model.safetensors has {len(data) // 2} bytes" in last
    assert f"the checkpoints after step {needed * 6}" in last
    assert complete_checkpoints(folder) == checkpoints[:1]
    snapshot.write_bytes(data)

    with Run(small_disk, "run", *SETTINGS, *settings) as again:
        result = again.wait()
    assert result["resumed_from_step"] == older
    audit(folder)


def complete_checkpoints(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("checkpoints/0*/manifest.json"))


def test_s3_that_stops_answering_and_a_driver_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the bucket is shared: the second driver has an empty cache."""
    with s3_server("bucket") as server:
        place = server.uri("bucket/runs")

        def start(cache: str) -> Run:
            arguments = (*SETTINGS, f"run.storage_path={place}", "train.workers=2")
            return Run(tmp_path, "run", *arguments, QCRD_CACHE=str(tmp_path / cache))

        monkeypatch.setenv("QCRD_CACHE", str(tmp_path / "reader"))
        stored = RunFolder(place, "run")
        with start("one") as run:
            run.until(lambda: len(stored.list("checkpoints")) >= 2)
            server.stop()
            threading.Timer(4.0, server.go_on).start()
            run.until(lambda: len(stored.list("negatives")) >= 10)
            run.kill_driver()
        steps = [int(name) for name in stored.list("checkpoints") if stored.has_folder(f"checkpoints/{name}")]
        with start("two") as again:
            result = again.wait()
        assert result["resumed_from_step"] == steps[-1] > 0
        assert result["run"] == "s3://bucket/runs/run"
        copy = tmp_path / "copy"
        download(stored, "", copy)
        audit(copy)
        assert len(steps_of(copy)) == len(losses_of(copy)) == 48
        assert not list((tmp_path / "two").glob("runs/*"))
        assert os.listdir(tmp_path / "one" / "runs")  # the killed driver's, which nobody cleared


def download(stored: RunFolder, name: str, target: Path) -> None:
    for child in stored.list(name):
        path = f"{name}/{child}" if name else child
        try:
            data = stored.read(path)
        except OSError:
            download(stored, path, target / child)
            continue
        (target / child).parent.mkdir(parents=True, exist_ok=True)
        (target / child).write_bytes(data)

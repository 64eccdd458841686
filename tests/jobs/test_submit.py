"""Jobs under `ray job submit`: on a cluster whose interpreter knows what the package needs, and not the package."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.runs import audit, below, end_ray, gone_after, steps_of, until
from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
RUNTIME_ENV = ROOT / "jobs" / "runtime_env.yaml"
TINY = ("--config", "jobs/configs/tiny.yaml", "sampler.cpus=0.5", "judge.pretrain_steps=2", "train.log_interval=5")
SECONDS = 600

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Head:
    """One node with its dashboard, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = image_without_the_package(folder / "image")
        ports = free_ports(5)
        self.address = f"http://127.0.0.1:{ports[1]}"
        # Paths of sockets may have about a hundred characters, and pytest's folders are long.
        self.temp = Path("/tmp") / f"qcrd-{secrets.token_hex(3)}"
        names = (
            "port",
            "dashboard-port",
            "ray-client-server-port",
            "dashboard-agent-listen-port",
            "metrics-export-port",
        )
        options = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))},
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        start = ["-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=4", "--include-dashboard=true",
                 "--object-store-memory=200000000", f"--temp-dir={self.temp}", *options]  # fmt: skip
        self.log = folder / "head.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(self.python), *start], stdout=log, stderr=log, cwd=folder, env=self.environment,
                start_new_session=True,
            )  # fmt: skip

    def until_up(self) -> None:
        until(lambda: "Ray runtime started" in self.log.read_text(), SECONDS, self.process, self.log)
        until(lambda: self.ray("job", "list", code=None).returncode == 0, SECONDS, self.process, self.log)

    def end(self) -> None:
        end_ray(self.process)
        shutil.rmtree(self.temp, ignore_errors=True)

    def ray(self, *arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(self.python), "-m", "ray.scripts.scripts", *arguments], capture_output=True, text=True,
            timeout=SECONDS, cwd=ROOT, env={**self.environment, "RAY_API_SERVER_ADDRESS": self.address},
        )  # fmt: skip
        assert code is None or done.returncode == code, f"{arguments}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def submit(self, name: str, *entrypoint: str, code: int = 0, wait: bool = True, **env_vars: str) -> str:
        """`ray job submit` with the file that the project ships, less what installs. Gives the log if it waits."""
        runtime_env = yaml.safe_load(RUNTIME_ENV.read_text())
        if "PIP_NO_INDEX" not in env_vars:
            del runtime_env["pip"]
        runtime_env["env_vars"] |= env_vars
        options = ["--submission-id", name, "--working-dir", ".", "--runtime-env-json", json.dumps(runtime_env)]
        options += ["--log-style=record", *([] if wait else ["--no-wait"])]
        said = self.ray("job", "submit", *options, "--", *entrypoint, code=code).stdout
        if not wait:
            return ""
        # After the job's log the command itself says how it ended, below a rule.
        log, end = re.split(rf"\n[^\n]* -- -+\n[^\n]* -- Job '{name}' (?=succeeded|failed)", said)
        assert end.startswith("succeeded" if code == 0 else "failed")
        return log_of(log)

    def logs(self, name: str) -> str:
        return log_of(self.ray("job", "logs", name, "--log-style=record").stdout)

    def info(self, name: str) -> dict[str, Any]:
        """What the cluster says of a job."""
        import requests

        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        found: dict[str, Any] = requests.get(f"{self.address}/api/jobs/{name}", headers=token, timeout=30).json()
        return found


def log_of(text: str) -> str:
    """A job's log in what a command said. It must read well where nothing moves a cursor."""
    text = text[text.index("Running entrypoint for job") :]
    assert "\r" not in text and "\x1b" not in text
    return text.rstrip()


def image_without_the_package(folder: Path) -> Path:
    """An interpreter with all that is installed here but the package. Gives its executable."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    [site] = (folder / "lib").glob("python3*/site-packages")
    # Of a folder that is named like this the .pth files are not read, and an editable install is nothing but one.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    known = subprocess.run([str(python), "-c", "import ray, qcrd_ray"], capture_output=True, text=True, cwd=folder)
    if "No module named 'qcrd_ray'" not in known.stderr:
        pytest.skip("the package is installed among its dependencies, not as make setup does it")
    return python


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    head = Head(tmp_path_factory.mktemp("head"))
    try:
        head.until_up()
        yield head
    finally:
        head.end()


def test_a_job_succeeds_and_its_result_is_the_last_line(head: Head, tmp_path: Path) -> None:
    output = tmp_path / "tables"
    text = head.submit("sample", "python", "jobs/sample_teacher.py", *TINY, f"output={output}")
    result = json.loads(text.splitlines()[-1])
    assert result == json.loads((output / "result.json").read_text())
    assert result["job"] == "sample_teacher"
    assert head.info("sample")["status"] == "SUCCEEDED"


def test_a_config_that_fails_is_seen_by_who_submits(head: Head, tmp_path: Path) -> None:
    bad = ("optim.lrr=1", f"run.storage_path={tmp_path / 'runs'}")
    text = head.submit("bad", "python", "jobs/train.py", *TINY, *bad, code=1)  # Ray's own code for a job that failed
    assert text.splitlines()[-1].startswith("error: config key optim.lrr: unknown; did you mean optim.lr?")
    assert "Traceback" not in text
    info = head.info("bad")
    assert (info["status"], info["driver_exit_code"]) == ("FAILED", 2)
    assert not (tmp_path / "runs").exists()


def test_a_stopped_job_goes_on_from_its_last_step(head: Head, tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = 110  # so many that the run still trains when `ray job stop`, which takes seconds, comes to it
    command = ("python", "jobs/train.py", *TINY, f"run.storage_path={tmp_path}", "run.name=run",
               f"train.max_steps={steps}", "train.iteration_steps=6", "train.checkpoint_interval=1000")  # fmt: skip
    head.submit("stopped", *command, wait=False)

    def trains() -> bool:
        ended = head.info("stopped")["status"] in ("FAILED", "SUCCEEDED", "STOPPED")
        assert not ended, head.logs("stopped")[-3000:]
        return len(steps_of(run)) >= 8

    until(trains, SECONDS)
    kinds = ("jobs/train.py", "RayTrainWorker", "Sampler", "TrainController")
    of_the_run = {kind: below(head.process.pid, kind) for kind in kinds}
    assert all(of_the_run.values()), of_the_run
    head.ray("job", "stop", "stopped")
    gone_after([process for processes in of_the_run.values() for process in processes])

    assert head.info("stopped")["status"] == "STOPPED"
    text = head.logs("stopped")
    [checkpoint] = sorted(entry.name for entry in (run / "checkpoints").iterdir())
    step = int(checkpoint)
    assert 8 <= step < steps
    assert text.splitlines()[-1] == f"stopped at step {step} of {steps}; the same command goes on from there"
    assert "Traceback" not in text
    assert len(steps_of(run)) == step
    assert not (run / "result.json").exists() and not (run / "owner.json").exists()

    result = json.loads(head.submit("again", *command).splitlines()[-1])
    assert (result["resumed_from_step"], result["steps"]) == (step, steps)
    assert result["training_starts"] == [step]
    audit(run)


def test_the_runtime_environment_installs_the_package(head: Head) -> None:
    shown = "import importlib.metadata as m, qcrd_ray; print(m.version('qcrd_ray'), qcrd_ray.__file__)"
    # The working directory is on PYTHONPATH: without it, only what is installed is found. The rest is there offline.
    entrypoint = ("env", "-C", "/", "-u", "PYTHONPATH", "python", "-c", shown)
    # pip stores what follows the "no": PIP_NO_BUILD_ISOLATION=0 is --no-build-isolation, and 1 would be the contrary.
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    text = head.submit("installed", *entrypoint, **offline)
    version, place = text.splitlines()[-1].split(" ", 1)
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"], text
    assert "/runtime_resources/pip/" in place and "site-packages" in place, text

"""A wheel of the project, installed elsewhere, runs the jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.beside
def test_a_wheel_installs_and_runs_elsewhere(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "build", "*.egg-info", "__pycache__")
    )
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    shutil.rmtree(source)
    shutil.copytree(ROOT / "jobs", tmp_path / "elsewhere" / "jobs")
    line = {
        "id": "a",
        "question": "What is 1 + 1?",
        "answer": "2",
        "teacher_samples": [{"rationale": "r", "answer": "2"}],
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import qcrd_ray; print(qcrd_ray.__file__)"],
        capture_output=True, text=True, check=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert where.stdout.startswith(str(site))
    done = subprocess.run(
        [sys.executable, "jobs/sample_teacher.py", "task=svamp", f"data.path={tmp_path}", f"output={tmp_path / 'out'}"],
        capture_output=True, text=True, check=False, cwd=tmp_path / "elsewhere", env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["train"]["used"] == 1

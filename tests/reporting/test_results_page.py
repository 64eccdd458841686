"""docs/results.md says what the files say that the benchmarks wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_files_say() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "results_page.py", "--check"], stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stderr

"""What tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def benchmark_data() -> Path:
    """The folder of the benchmark data."""
    folder = os.environ.get("QCRD_BENCHMARK_DATA")
    if not folder:
        pytest.skip("QCRD_BENCHMARK_DATA is not set: no benchmark data")
    if not Path(folder).is_dir():
        pytest.skip(f"QCRD_BENCHMARK_DATA={folder} is no folder: no benchmark data")
    return Path(folder)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """Ray in this process, with four logical CPUs, whatever the machine has."""
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()

"""What tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it for what it starts behind itself
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what the tests start would inherit it
    config.pluginmanager.register(_FailuresAtOnce(config))


class _FailuresAtOnce:
    """Shows what failed as it fails: of a run that is cut short, nothing else would be left."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line("")
            terminal.write_line(f"{report.nodeid} ({report.when})", red=True)
            terminal.write_line(report.longreprtext[-4000:])


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

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone. One for all tests: DeepSpeed keeps its groups as long as the process.

    Engines of vLLM that run in this process use it too, and may not end it as they close.
    """
    import torch.distributed as dist

    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", lambda *_: None)
        yield
    dist.destroy_process_group()


@pytest.fixture
def one_rank(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the only training worker."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)

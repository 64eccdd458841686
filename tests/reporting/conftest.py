"""One small run with every tracker, on a Ray that exports metrics, for all tests of this folder."""

from __future__ import annotations

import sys
import time

import pytest

from tests.faults.runs import TINY, Job, kill, steps_of
from tests.ports import free_ports
from tests.reporting.observed import STEPS, Observed

SECONDS = 600
DRIVER = """
import json, sys
import ray
from qcrd_ray.config import load_config
from qcrd_ray.training.trainer import train

port, *arguments = sys.argv[1:]
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _metrics_export_port=int(port),
         _system_config={"metrics_report_interval_ms": 1000})
print(json.dumps(train(load_config(arguments[0], arguments[1:]))))
"""


@pytest.fixture(scope="session")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    base = tmp_path_factory.mktemp("observed")
    [port] = free_ports(1)
    command = [sys.executable, "-c", DRIVER, str(port), str(TINY), f"run.storage_path={base}", "run.name=observed",
               f"train.max_steps={STEPS}", "train.checkpoint_interval=10",
               "tracking.tensorboard=true", "tracking.wandb.project=tests", "tracking.wandb.mode=offline",
               "tracking.mlflow.experiment=tests", f"tracking.mlflow.uri=sqlite:///{base}/mlflow.db"]  # fmt: skip
    seen = Observed(base / "observed", {}, base)
    killed = False
    end = time.monotonic() + SECONDS
    with Job(command, base / "log") as job:
        while job.process.poll() is None:
            assert time.monotonic() < end, job.said[-4000:]
            seen.scrape(port)
            if not killed and len(steps_of(seen.folder)) >= 2:
                for sampler in job.below("ray::Sampler"):
                    kill(sampler.pid)  # one that dies is counted
                    killed = True
            time.sleep(0.2)
        seen.result = job.wait()
    assert killed
    return seen

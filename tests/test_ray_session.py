"""A local cluster of Ray, as a job starts it."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import os, time, ray
from qcrd_ray.ray_session import ray_session

@ray.remote(num_cpus=0)
def task():
    time.sleep(1.0)
    return os.getpid()

def processes():
    return set(ray.get([task.remote() for _ in range(os.cpu_count() + 2)]))

with ray_session(1.0):
    processes()  # each has one of its own by now
    before = processes()
    time.sleep(4.0)
    print(len(before), len(before & processes()))
"""

TWICE = """
import ray
from qcrd_ray.ray_session import ray_session
from qcrd_ray.training.model_process import model_process

for _ in range(2):
    with ray_session(1.0):
        ray.get(model_process().__ray_ready__.remote())
"""


def test_idle_workers_wait_for_the_next_task() -> None:
    """Ray's own default ends it after a second where there are more workers than cores, and the next task pays."""
    before, same = map(int, run(PROGRAM).split()[-2:])
    assert same == before == (os.cpu_count() or 1) + 2


def test_runs_of_one_process_each_have_a_ray() -> None:
    """As in a notebook: what the first left behind, the second does not take for its own."""
    run(TWICE)


def run(program: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=120
    )
    return done.stdout

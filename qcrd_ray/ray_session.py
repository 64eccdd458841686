"""Ray for the length of a job: the cluster that the job was submitted to, or one of this machine alone."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from qcrd_ray.errors import UserError

LOCAL_OBJECT_STORE_BYTES = 1 << 30
"""Blocks in flight are few and small; Ray's own default is a third of the machine's memory."""


@contextmanager
def ray_session(cpus: float, verbose: bool = False) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names (a submitted job has it), or start one on this machine.

    Args:
        cpus: logical CPUs that a local one has at least; they may outnumber the cores.
        verbose: show the logs of every worker.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # A trainer and a sampler share a laptop's cores: a thread that waits must sleep, not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("ray.data", "ray.train", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if ray.is_initialized():
        yield
        return
    settings: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.WARNING}
    try:
        if "RAY_ADDRESS" in os.environ:
            ray.init(**settings)
        else:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                include_dashboard=False,
                **settings,
            )
        yield
    finally:
        ray.shutdown()


def await_resources(wanted: Mapping[str, float], seconds: float, describe: Callable[[], str]) -> None:
    """Wait until the cluster has what is asked for (an autoscaler may bring it).

    Raises:
        UserError: it has not after `seconds`; `describe` says what was asked for and what there is.
    """
    end = time.monotonic() + seconds
    while any(ray.cluster_resources().get(name, 0.0) < amount for name, amount in wanted.items()):
        if time.monotonic() > end:
            raise UserError(f"not enough resources after {seconds:g} s (run.placement_timeout_s): {describe()}")
        time.sleep(1.0)


def cluster_state() -> str:
    """What the cluster has and what of it is free, in one line."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return (
        f"the cluster has {total.get('CPU', 0):g} CPU ({free.get('CPU', 0):g} free) and {total.get('GPU', 0):g} GPU "
        f"({free.get('GPU', 0):g} free)"
    )

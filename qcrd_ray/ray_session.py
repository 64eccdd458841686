"""Ray for the length of a job: the cluster that the job was submitted to, or one of this machine alone."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from qcrd_ray.errors import UserError

LOCAL_OBJECT_STORE_BYTES = 1 << 30
"""Blocks in flight are few and small; Ray's own default is a third of the machine's memory."""

IDLE_SECONDS = 60
"""For which a worker of a local cluster waits for its next task. By default Ray ends those of a machine with few cores
after one second, so that each task of the data stream would start a process and import everything anew."""


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
    if "RAY_ADDRESS" not in os.environ:
        # An actor that asks whether a node is about to be taken away; this machine is not.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    if ray.is_initialized():
        yield
        return
    try:
        start_ray(cpus, verbose)
        yield
    finally:
        ray.shutdown()


def start_ray(cpus: float = 1.0, verbose: bool = False) -> None:
    """Have Ray in this process; see `ray_session`, which also ends it."""
    import ray.data
    import ray.train

    for name in ("ray.data", "ray.train", "httpx"):  # each sets its own level as it is imported
        logging.getLogger(name).setLevel(logging.WARNING)
    if ray.is_initialized():
        return
    settings: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.WARNING}
    if "RAY_ADDRESS" not in os.environ:
        settings |= {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, math.ceil(cpus)),
            "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_system_config": {"idle_worker_killing_time_threshold_ms": IDLE_SECONDS * 1000},
        }
    with _sigterm_as_it_is():
        ray.init(**settings)


@contextmanager
def _sigterm_as_it_is() -> Iterator[None]:
    """Keep a handler of SIGTERM that somebody has set: `ray.init` sets one of its own, which exits without a word."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before not in (signal.SIG_DFL, None) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def data_settings(preserve_order: bool, block_bytes: int | None = None) -> Iterator[None]:
    """How the data sets that are made inside run: quietly. A data set copies the context as it is made."""
    from ray.data import DataContext

    context = DataContext.get_current()
    before = (
        context.execution_options.preserve_order,
        context.target_max_block_size,
        context.enable_progress_bars,
        context.print_on_execution_start,
    )
    context.execution_options.preserve_order = preserve_order
    context.target_max_block_size = block_bytes or context.target_max_block_size
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        yield
    finally:
        (
            context.execution_options.preserve_order,
            context.target_max_block_size,
            context.enable_progress_bars,
            context.print_on_execution_start,
        ) = before


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

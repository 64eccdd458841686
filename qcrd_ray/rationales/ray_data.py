"""Ray Data, run so that what comes out is in the order of what went in, in blocks small enough to stream."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

BLOCK_BYTES = 4 << 20
LOCAL_OBJECT_STORE_BYTES = 1 << 30
"""Blocks in flight are few; Ray's own default is a third of the machine's memory."""


def start_ray() -> None:
    """Start Ray on this machine, or join the cluster of RAY_ADDRESS, where no job has yet."""
    import ray

    if ray.is_initialized():
        return
    local = {} if "RAY_ADDRESS" in os.environ else {"object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING, **local)


def stream_tables(
    sources: Sequence[Callable[[], Iterable[pa.Table]]],
    schema: pa.Schema,
    transform: Callable[[pa.Table], pa.Table] | None = None,
    batch_rows: int | None = None,
    here: bool = False,
) -> Iterator[pa.Table]:
    """Blocks of what the sources give, in order, each of them read by a task of its own.

    Args:
        sources: sent to Ray's workers.
        schema: of the sources' tables.
        transform: applied to blocks in parallel, `batch_rows` rows at a time (None: a block at a time).
        here: read on this node, where the user's files are, with no CPU of it (a head node may have none to give).
    """
    import ray
    from ray.data import DataContext

    if not sources:
        return
    start_ray()
    with _settings(DataContext.get_current()):
        read_options: dict[str, Any] = {"num_cpus": 0} if here else {}
        data = ray.data.read_datasource(
            _datasource(sources, schema, not here), override_num_blocks=len(sources), **read_options
        )
        if transform is not None:
            data = data.map_batches(transform, batch_format="pyarrow", batch_size=batch_rows)
        yield from data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


@contextlib.contextmanager
def _settings(context: Any) -> Iterator[None]:
    before = (
        context.execution_options.preserve_order,
        context.target_max_block_size,
        context.enable_progress_bars,
        context.print_on_execution_start,
    )
    # A data set copies the context as it is made.
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES
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


def _datasource(sources: Sequence[Callable[[], Iterable[pa.Table]]], schema: pa.Schema, anywhere: bool) -> Any:
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Tables(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
            return [ReadTask(source, metadata, schema=schema) for source in sources]

        @property
        def supports_distributed_reads(self) -> bool:
            return anywhere

    return Tables()

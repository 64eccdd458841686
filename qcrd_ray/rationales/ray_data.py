"""Ray Data, run so that what comes out is in the order of what went in, in blocks small enough to stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from qcrd_ray.ray_session import data_settings, start_ray

BLOCK_BYTES = 4 << 20


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
    if not sources:
        return
    start_ray()
    import ray

    with data_settings(preserve_order=True, block_bytes=BLOCK_BYTES):
        read_options: dict[str, Any] = {"num_cpus": 0} if here else {}
        data = ray.data.read_datasource(
            _datasource(sources, schema, not here), override_num_blocks=len(sources), **read_options
        )
        if transform is not None:
            data = data.map_batches(transform, batch_format="pyarrow", batch_size=batch_rows)
        yield from data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


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

from __future__ import annotations

import pytest

from qcrd_ray.rationales.order import DataOrder


@pytest.mark.parametrize(("rows", "batch"), [(10, 3), (7, 7), (5, 8), (1, 1), (64, 8)])
def test_every_row_comes_once_an_epoch_in_another_order(rows: int, batch: int) -> None:
    order = DataOrder(rows, batch, seed=3)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        assert {order.epoch_of(step) for step in steps} == {epoch}
        seen = [row for step in steps for row in order.batch(step)]
        assert sorted(seen) == list(range(rows))
        epochs.append(seen)
    if rows > 5:
        assert epochs[0] != epochs[1] != epochs[2]
    assert [list(DataOrder(rows, batch, seed=3).batch(step)) for step in range(9)] == [
        list(order.batch(step)) for step in range(9)
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_of_all_ranks_are_the_global_batch(world: int) -> None:
    order = DataOrder(13, 4, seed=0)
    for step in range(8):
        shares = [row for rank in range(world) for row in order.share(step, rank, world)]
        assert sorted(shares) == sorted(order.batch(step))


def test_another_seed_is_another_order() -> None:
    assert list(DataOrder(100, 100, 0).batch(0)) != list(DataOrder(100, 100, 1).batch(0))


def test_an_empty_table_has_no_order() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        DataOrder(0, 1, 0)

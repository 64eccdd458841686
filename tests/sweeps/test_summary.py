from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from qcrd_ray.sweeps.room import Need, count_that_fit
from qcrd_ray.sweeps.space import axis_of_key, cross
from qcrd_ray.sweeps.summary import TrialRow, mean_and_interval, points_table, summarise, trials_table, welch

SPACE = cross([axis_of_key("negatives.count", [0, 1, 2])])


def row(count: int, seed: int, accuracy: float | None, **keys: Any) -> TrialRow:
    status = keys.pop("status", "finished" if accuracy is not None else "failed")
    labels = {"count": str(count)}
    return TrialRow(f"t{count}-{seed}", f"count={count}", labels, seed, status, accuracy=accuracy, **keys)


def test_intervals_are_those_of_scipy() -> None:
    generator = np.random.default_rng(0)
    for n in (2, 3, 10):
        a, b = generator.normal(0.6, 0.05, n).tolist(), generator.normal(0.5, 0.1, n + 1).tolist()
        mean, std, half = mean_and_interval(a)
        assert mean == pytest.approx(np.mean(a)) and std == pytest.approx(np.std(a, ddof=1))
        low, high = stats.t.interval(0.95, n - 1, loc=np.mean(a), scale=stats.sem(a))
        assert (mean - half, mean + half) == pytest.approx((low, high))  # type: ignore[operator]
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
        difference, noise = welch(a, b)
        assert (difference - noise, difference + noise) == pytest.approx((interval.low, interval.high))  # type: ignore[operator]


def test_with_too_few_seeds_nothing_is_known_of_the_noise() -> None:
    assert mean_and_interval([]) == (None, None, None)
    assert mean_and_interval([0.5]) == (0.5, None, None)
    assert welch([0.5], [0.25]) == (0.25, None)
    assert welch([0.5, 0.5], [0.25, 0.25]) == (0.25, None)
    assert welch([], [0.5]) == (None, None)


def test_points_in_order_with_the_best_and_what_is_beyond_the_noise() -> None:
    points = SPACE.grid()
    rows = [
        *(row(0, seed, 0.50 + 0.001 * seed) for seed in range(4)),
        *(row(1, seed, 0.70 + 0.001 * seed) for seed in range(4)),
        *(row(2, seed, value) for seed, value in enumerate((0.4, 1.0, 0.8, None))),
        row(2, 4, None, status="stopped"),
    ]
    zero, one, two = summarise(points, rows, points[1])
    assert [p.is_default for p in (zero, one, two)] == [False, True, False]
    assert [p.is_best for p in (zero, one, two)] == [False, False, True]
    assert zero.beyond_noise is True and zero.difference == pytest.approx(-0.2)
    assert one.difference is None and one.beyond_noise is None
    assert two.beyond_noise is False
    assert (two.seeds, two.failed, two.stopped, two.missing) == (3, 1, 1, 0)


def test_the_best_is_chosen_on_valid_where_there_is_one() -> None:
    rows = [row(0, 0, 0.9, valid_accuracy=0.5), row(1, 0, 0.5, valid_accuracy=0.6), row(2, 0, 0.7, valid_accuracy=0.4)]
    assert [p.is_best for p in summarise(SPACE.grid(), rows, None)] == [False, True, False]
    rows[2] = row(2, 0, 0.95)  # one has none: all are held against each other on what is reported
    assert [p.is_best for p in summarise(SPACE.grid(), rows, None)] == [False, False, True]


def test_a_point_without_a_trial_that_finished() -> None:
    rows = [row(0, 0, None), row(1, 0, 0.5)]
    zero, one, two = summarise(SPACE.grid(), rows, SPACE.grid()[0])
    assert zero.mean is None and one.difference is None and two.mean is None
    assert one.is_best and not zero.is_best


def test_tables_have_the_axes_and_every_field() -> None:
    rows = [row(0, 0, 0.5), row(1, 0, None, reason="it broke")]
    table = trials_table(rows)
    assert table.column_names[:3] == ["count", "trial", "point"]
    assert table["count"].to_pylist() == ["0", "1"]
    assert table["accuracy"].to_pylist() == [0.5, None]
    assert table["reason"].to_pylist() == [None, "it broke"]
    assert table.schema.field("judge_reused").type == pa.bool_()
    points = points_table(summarise(SPACE.grid(), rows, None))
    assert points.num_rows == 3
    assert points["mean"].to_pylist() == [0.5, None, None]
    assert not any(math.isnan(value) for value in points["mean"].drop_null().to_pylist())


def test_room_is_what_fits_on_the_nodes() -> None:
    worker, engine = Need({"CPU": 2.0, "GPU": 1.0}, {"pool": "train"}), Need({"CPU": 1.0}, {"pool": "sample"})
    trial = [worker, worker, engine]
    train = ({"CPU": 8.0, "GPU": 4.0}, {"pool": "train"})
    sample = ({"CPU": 1.0}, {"pool": "sample"})
    assert count_that_fit(trial, [train, sample]) == 1
    assert count_that_fit(trial, [train, sample, sample]) == 2
    assert count_that_fit(trial, [train, sample, sample, sample]) == 2  # the trainers' GPUs are all taken
    assert count_that_fit(trial, [train]) == 0
    # Two CPUs on two nodes hold no worker of two.
    assert count_that_fit([Need({"CPU": 2.0}, {})], [({"CPU": 1.0}, {}), ({"CPU": 1.0}, {})]) == 0
    assert count_that_fit([Need({"CPU": 0.5}, {})] * 2, [({"CPU": 1.0}, {}), ({"CPU": 1.0}, {})]) == 2
    assert count_that_fit([Need({"GPU": 0.3}, {})], [({"GPU": 1.0}, {})]) == 3

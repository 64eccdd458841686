from __future__ import annotations

from qcrd_ray.sampling.schedule import FIXED, Schedule


def test_iteration_t_takes_its_negatives_from_t_minus_j() -> None:
    schedule = Schedule(max_steps=100, iteration_steps=10, chunk_steps=4, lag=3)
    assert [schedule.snapshot_for(t) for t in range(7)] == [0, 0, 0, 0, 1, 2, 3]
    assert Schedule(100, 10, 4, lag=0).snapshot_for(5) == 5
    assert Schedule(100, 10, 4, lag=None).snapshot_for(5) == FIXED


def test_chunks_cover_every_step_once_and_never_span_two_iterations() -> None:
    for steps, iteration, size in ((100, 10, 4), (23, 7, 3), (5, 100, 64), (9, 1, 8)):
        schedule = Schedule(steps, iteration, size, lag=2)
        chunks = [chunk for t in range(schedule.iterations) for chunk in schedule.chunks(t)]
        assert [s for c in chunks for s in range(c.first, c.last)] == list(range(steps))
        for chunk in chunks:
            assert {schedule.iteration_of(s) for s in range(chunk.first, chunk.last)} == {chunk.iteration}
            assert all(schedule.chunk_of(s) == chunk for s in range(chunk.first, chunk.last))


def test_only_snapshots_that_an_iteration_asks_for_are_needed() -> None:
    schedule = Schedule(max_steps=100, iteration_steps=10, chunk_steps=4, lag=3)
    asked = {schedule.snapshot_for(t) for t in range(schedule.iterations)}
    assert {number for number in range(schedule.iterations) if schedule.is_needed(number)} == asked

"""The scheduler with samplers that take no time, or as long as a test tells them to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from qcrd_ray.config import ExperimentConfig, load_config
from qcrd_ray.errors import UserError
from qcrd_ray.run_folder import RunFolder
from qcrd_ray.run_lock import RunLock
from qcrd_ray.sampling.lagged_student import ATTEMPTS, SamplingService
from qcrd_ray.sampling.schedule import Schedule
from qcrd_ray.sampling.snapshot import Snapshot

TINY = Path(__file__).parents[2] / "jobs" / "configs" / "tiny.yaml"
Behaviour = Callable[[Any, Snapshot], Awaitable[None]]


class Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call

    def options(self, **_: Any) -> Method:
        return self


class FakeSampler:
    """Has the methods of the actor, and a list of what it was asked for."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour
        self.asked: list[tuple[Any, Snapshot]] = []
        self.ready = Method(self._ready)
        self.sample = Method(self._sample)

    async def _ready(self) -> str:
        return "fake"

    def _sample(self, chunk: Any, snapshot: Snapshot) -> tuple[Any, Any]:
        self.asked.append((chunk, snapshot))
        return self._statistics(chunk, snapshot), ("table", chunk, snapshot)

    async def _statistics(self, chunk: Any, snapshot: Snapshot) -> dict[str, float]:
        if self.behaviour is not None:
            await self.behaviour(chunk, snapshot)
        return {"tokens": 1, "seconds": 0.0, "load_seconds": 0.0}


def config_of(folder: Path, *overrides: str) -> ExperimentConfig:
    return load_config(
        TINY,
        ["train.max_steps=24", "train.iteration_steps=4", "negatives.lag=2", "sampler.chunk_questions=8",
         f"run.storage_path={folder}", *overrides],
    )  # fmt: skip


def serve(
    folder: Path,
    samplers: list[FakeSampler],
    scenario: Callable[[SamplingService, Schedule, RunFolder], Awaitable[None]],
    *overrides: str,
) -> None:
    config = config_of(folder, *overrides)
    run = RunFolder(str(folder), "run")
    run.create()

    async def play() -> None:
        with RunLock(run) as lock:
            service = SamplingService(config, run, samplers, lock.token)
            await service.start()
            try:
                await asyncio.wait_for(scenario(service, Schedule.of(config), run), 30)
            finally:
                for task in service.tasks:
                    task.cancel()

    asyncio.run(play())


def folder_of(number: int) -> str:
    return f"snapshots/{number:06d}"


async def publish(service: SamplingService, number: int) -> None:
    await service.publish(number, folder_of(number), f"digest {number}")


async def settle() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


def test_every_chunk_comes_from_its_snapshot_and_each_engine_swaps_once_an_iteration(tmp_path: Path) -> None:
    samplers = [FakeSampler(), FakeSampler()]

    async def scenario(service: SamplingService, schedule: Schedule, run: RunFolder) -> None:
        for iteration in range(schedule.iterations):
            await publish(service, iteration)
            await service.progress(iteration * 4, [])
            for chunk in schedule.chunks(iteration):
                [(_, got, snapshot)] = await service.chunk(chunk)
                assert got == chunk
                assert snapshot.number == max(0, iteration - 2)
        for sampler in samplers:
            numbers = [snapshot.number for _, snapshot in sampler.asked]
            assert numbers == sorted(numbers)  # in order, and never back and forth between two
        assert sorted(c.first for s in samplers for c, _ in s.asked) == list(range(0, 24, 2))

    serve(tmp_path, samplers, scenario)


def test_no_more_than_asked_for_lies_ready(tmp_path: Path) -> None:
    sampler = FakeSampler()

    async def scenario(service: SamplingService, schedule: Schedule, run: RunFolder) -> None:
        for number in range(4):
            await publish(service, number)
        await settle()
        assert {chunk.iteration for chunk, _ in sampler.asked} == {0, 1}
        await service.progress(4, [])
        await settle()
        assert {chunk.iteration for chunk, _ in sampler.asked} == {0, 1, 2}
        await service.progress(12, [])
        await settle()
        assert {chunk.iteration for chunk, _ in sampler.asked} == {0, 1, 2, 3, 4}
        assert min(chunk.last for chunk in service.tables) > 8  # what is trained on is dropped

    serve(tmp_path, [sampler], scenario, "sampler.ahead_iterations=2")


def test_in_the_loop_nothing_is_sampled_before_it_is_asked_for(tmp_path: Path) -> None:
    sampler = FakeSampler()

    async def scenario(service: SamplingService, schedule: Schedule, run: RunFolder) -> None:
        await publish(service, 0)
        await settle()
        assert sampler.asked == []
        chunk = schedule.chunk_of(0)
        first, second = await asyncio.gather(service.chunk(chunk), service.chunk(chunk))
        assert first == second
        assert [c for c, _ in sampler.asked] == [chunk]

    serve(tmp_path, [sampler], scenario, "sampler.ahead_iterations=0")


def test_what_fails_is_asked_again_and_by_another_sampler(tmp_path: Path) -> None:
    async def fail(chunk: Any, snapshot: Snapshot) -> None:
        raise RuntimeError("out of memory")

    broken, good = FakeSampler(fail), FakeSampler()

    async def scenario(service: SamplingService, schedule: Schedule, run: RunFolder) -> None:
        await publish(service, 0)
        for chunk in schedule.chunks(0) + schedule.chunks(1):
            [(_, got, snapshot)] = await service.chunk(chunk)
            assert (got, snapshot.number) == (chunk, 0)
        assert service.failure is None

    # It is asked once, and is then not up any more.
    async def never() -> str:
        if broken.asked:
            await asyncio.sleep(3600)
        return "fake"

    broken.ready = Method(never)
    serve(tmp_path, [broken, good], scenario)
    assert len(broken.asked) == 1


def test_what_fails_again_and_again_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    async def fail(chunk: Any, snapshot: Snapshot) -> None:
        raise RuntimeError("first line\nout of memory")

    sampler = FakeSampler(fail)

    async def scenario(service: SamplingService, schedule: Schedule, run: RunFolder) -> None:
        await publish(service, 0)
        with pytest.raises(UserError, match=f"failed {ATTEMPTS} times at the same work, last with: out of memory"):
            await service.chunk(schedule.chunk_of(0))
        assert len(sampler.asked) == ATTEMPTS

    serve(tmp_path, [sampler], scenario)


def test_what_only_the_user_can_mend_is_not_asked_again(tmp_path: Path) -> None:
    async def fail(chunk: Any, snapshot: Snapshot) -> None:
        raise UserError("snapshot 3: model.safetensors has 7 bytes")

    sampler = FakeSampler(fail)

    async def scenario(service: SamplingService, schedule: Schedule, run: RunFolder) -> None:
        await publish(service, 0)
        with pytest.raises(UserError, match="7 bytes"):
            await service.chunk(schedule.chunk_of(0))
        assert len(sampler.asked) == 1

    serve(tmp_path, [sampler], scenario)


def test_a_sampler_that_does_not_answer_loses_its_work(tmp_path: Path) -> None:
    async def hang(chunk: Any, snapshot: Snapshot) -> None:
        if chunk.first == 0 and len(slow.asked) == 1:
            await asyncio.sleep(3600)

    slow = FakeSampler(hang)

    async def scenario(service: SamplingService, schedule: Schedule, run: RunFolder) -> None:
        await publish(service, 0)
        await service.chunk(schedule.chunk_of(0))
        assert [chunk.first for chunk, _ in slow.asked][:2] == [0, 0]

    serve(tmp_path, [slow], scenario, "sampler.timeout_s=1")


def test_no_sampler_for_too_long_ends_the_run(tmp_path: Path) -> None:
    sampler = FakeSampler()

    async def never() -> str:
        raise RuntimeError("The actor is restarting")

    sampler.ready = Method(never)

    async def scenario(service: SamplingService, schedule: Schedule, run: RunFolder) -> None:
        await publish(service, 0)
        with pytest.raises(UserError, match=r"none of 1 samplers has been up for 1 s \(sampler.timeout_s\)"):
            await service.chunk(schedule.chunk_of(0))

    serve(tmp_path, [sampler], scenario, "sampler.timeout_s=1")


def test_work_of_a_training_that_was_set_back_is_not_used(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def wait(chunk: Any, snapshot: Snapshot) -> None:
        if snapshot.digest == "old":
            await gate.wait()

    sampler = FakeSampler(wait)

    async def scenario(service: SamplingService, schedule: Schedule, run: RunFolder) -> None:
        await publish(service, 0)
        for number in (0, 1):
            run.write_folder(folder_of(number), lambda folder: None)
        await service.rewind(4)
        await service.publish(2, folder_of(2), "old")
        await service.progress(8, [])
        await settle()
        assert sampler.asked[-1][1].digest == "old"
        assert await service.rewind(4) == 2
        gate.set()
        await service.publish(2, folder_of(2), "new")
        for chunk in schedule.chunks(4):
            [(_, _, snapshot)] = await service.chunk(chunk)
            assert snapshot.digest == "new"

    serve(tmp_path, [sampler], scenario)


class Unstarted(FakeSampler):
    """Its start takes for ever, or fails as an actor's whose creation raises."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails = fails

    async def _ready(self) -> str:
        if not self.fails:
            await asyncio.sleep(60)
        raise RayActorError(error_msg="no\nImportError: no such engine", actor_init_failed=True)


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (True, "a sampler could not be started: ImportError: no such engine"),
        (False, r"1 of 2 samplers were not up after 1 s \(sampler.timeout_s\)"),
    ],
)
def test_training_waits_for_all_samplers_and_is_told_of_one_that_does_not_start(
    tmp_path: Path, fails: bool, said: str
) -> None:
    async def scenario(service: SamplingService, schedule: Schedule, run: RunFolder) -> None:
        with pytest.raises(UserError, match=said):
            await service.until_up()

    serve(tmp_path, [FakeSampler(), Unstarted(fails)], scenario, "sampler.timeout_s=1")

    async def all_up(service: SamplingService, schedule: Schedule, run: RunFolder) -> None:
        await service.until_up()

    serve(tmp_path / "other", [FakeSampler(), FakeSampler()], all_up)


def test_a_snapshot_stays_as_long_as_something_may_sample_from_it(tmp_path: Path) -> None:
    async def scenario(service: SamplingService, schedule: Schedule, run: RunFolder) -> None:
        for number in range(6):
            run.write_folder(folder_of(number), lambda folder: None)
            await publish(service, number)
        await settle()
        # At step 20 iteration 5 samples from 3. A resume at step 9 would go on in iteration 2, from 0, 1 and 2.
        await service.progress(20, [9])
        await asyncio.sleep(0.3)
        assert run.snapshot_numbers() == [0, 1, 2, 3, 4, 5]
        await service.progress(20, [17])
        await asyncio.sleep(0.3)
        assert run.snapshot_numbers() == [0, 2, 3, 4, 5]
        await service.rewind(17)
        assert run.snapshot_numbers() == [0, 2, 3, 4]
        run.remove(folder_of(3))
        with pytest.raises(
            UserError, match=r"000003: not there, or not complete; iteration 5 .* checkpoints after step 12"
        ):
            await service.rewind(17)

    serve(tmp_path, [FakeSampler()], scenario)

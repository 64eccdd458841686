from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcrd_ray.config import ExperimentConfig, load_config
from qcrd_ray.errors import UserError
from qcrd_ray.run_folder import RunFolder

TINY = Path(__file__).parents[2] / "jobs" / "configs" / "tiny.yaml"
RUN = RunFolder("runs", "placed")


def config_of(*overrides: str) -> ExperimentConfig:
    return load_config(TINY, ["run.placement_timeout_s=1", *overrides])


@pytest.mark.slow
def test_workers_and_samplers_lie_in_one_group_that_goes_with_the_run(ray_session: Any) -> None:
    from ray.util.placement_group import placement_group_table

    from qcrd_ray.training.placement import placed, sampler_place

    config = config_of("train.workers=2", "sampler.actors=2", "sampler.cpus=0.25", "run.placement_timeout_s=20")
    with placed(config, RUN) as group:
        bundles = placement_group_table(group)["bundles"]
        assert [bundles[i]["CPU"] for i in range(4)] == [1.0, 1.0, 0.25, 0.25]
        assert sampler_place(config, group, 1).placement_group_bundle_index == 3
    assert placement_group_table(group)["state"] == "REMOVED"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.workers=64"], "asked for 64 workers of 1 CPU and 0 GPU"),
        (["sampler.gpus=0.5"], "1 samplers of 0.5 CPU and 0.5 GPU"),
        (["sampler.node_labels={pool: sample}"], "1 samplers of 0.5 CPU and 0 GPU on nodes with pool=sample"),
    ],
)
def test_what_does_not_fit_is_a_line_with_both_sides(ray_session: Any, overrides: list[str], expected: str) -> None:
    from qcrd_ray.training.placement import placed

    with pytest.raises(UserError, match="not enough resources after 1 s") as raised, placed(config_of(*overrides), RUN):
        pass
    assert expected in str(raised.value)
    assert "the cluster has 4 CPU" in str(raised.value)


def test_sleep_and_patience_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="it needs sampler.gpus"):
        config_of("sampler.sleep=true")
    with pytest.raises(UserError, match="no less than train.collective_timeout_s=60"):
        config_of("train.collective_timeout_s=60")

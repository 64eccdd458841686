from __future__ import annotations

import importlib.util
import math
import random
from pathlib import Path
from typing import Any

import pytest

from qcrd_ray.config import ExperimentConfig, config_from_dict, load_config
from qcrd_ray.errors import UserError
from qcrd_ray.sweeps.space import Axis, Range, Space, axis_of_key, configure, cross, trials_of

ROOT = Path(__file__).parents[2]


def named_spaces() -> dict[str, tuple[Axis, ...]]:
    spec = importlib.util.spec_from_file_location("search_spaces", ROOT / "tune" / "search_spaces.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    spaces: dict[str, tuple[Axis, ...]] = module.SPACES
    return spaces


SPACES = named_spaces()
TINY = load_config(ROOT / "jobs" / "configs" / "tiny.yaml")


def settings(name: str) -> list[dict[str, Any]]:
    return [point.settings for point in cross(SPACES[name]).grid()]


def test_the_paper_s_grids() -> None:
    assert settings("positives_m") == [{"teacher.samples": m} for m in (1, 5, 10, 20)]
    assert settings("negatives_k") == [{"negatives.count": k} for k in (0, 1, 2, 3)]
    assert settings("temperature") == [{"negatives.temperature": t} for t in (0.0, 0.7, 1.5, 2.0)]
    assert settings("schemes") == [{"scheme": s} for s in ("min_max", "max_min", "sampling", "mean", "weighted_mean")]
    assert settings("negative_source") == [
        *({"negatives.source": "lagged", "negatives.lag": j} for j in (3, 5, 10)),
        {"negatives.source": "fixed"},
        {"negatives.source": "self_consistency"},
    ]
    assert len(settings("data_share")) == 10
    assert len(settings("ablations_all")) == 8


def test_a_row_of_the_ablation_switches_off_what_it_does_not_name() -> None:
    rows = {point.labels["modules"]: configure(TINY, point.settings) for point in cross(SPACES["ablations"]).grid()}
    assert list(rows) == ["none", "ED", "ED+NK", "ED+NK+QJ"]
    on = {
        name: (config.positives == "vote", config.sampled_negatives > 0, config.judge.enabled)
        for name, config in rows.items()
    }
    assert on == {
        "none": (False, False, False),
        "ED": (True, False, False),
        "ED+NK": (True, True, False),
        "ED+NK+QJ": (True, True, True),
    }
    assert rows["ED+NK+QJ"].identity() == TINY.identity()


@pytest.mark.parametrize("name", list(SPACES))
def test_every_named_space_gives_trials_of_its_own(name: str) -> None:
    space = cross(SPACES[name])
    trials = list(trials_of(TINY, space.grid(), 2))
    of_points = [trial for trial in trials if trial.point is not None]
    assert len(of_points) == 2 * len(space.grid())
    assert len({trial.name for trial in trials}) == len(trials)
    identities = {str(sorted(trial.config.identity().items(), key=lambda item: item[0])) for trial in of_points}
    assert len(identities) == len(of_points)
    assert {trial.seed for trial in trials} == {0, 1}
    assert {trial.config.train.seed for trial in trials} == {0, 1}
    assert space.default(TINY) is not None


def test_the_default_is_the_base_config_s_own_point_or_the_paper_s() -> None:
    k, source = cross(SPACES["negatives_k"]), cross(SPACES["negative_source"])
    assert k.default(TINY).labels == {"k": "1"}  # type: ignore[union-attr]
    assert k.default(configure(TINY, {"negatives.count": 3})).labels == {"k": "3"}  # type: ignore[union-attr]
    assert source.default(TINY).labels == {"source": "j=5"}  # type: ignore[union-attr]  # its own lag is 2
    assert source.default(configure(TINY, {"negatives.lag": 10})).labels == {"source": "j=10"}  # type: ignore[union-attr]
    both = cross([*SPACES["ablations"], *SPACES["temperature"]])
    assert both.default(TINY).labels == {"modules": "ED+NK+QJ", "tau": "1.5"}  # type: ignore[union-attr]
    without = configure(TINY, {"judge.enabled": False})
    assert cross(SPACES["ablations"]).default(without).labels == {"modules": "ED+NK"}  # type: ignore[union-attr]


def test_a_fixed_source_needs_a_student_of_its_seed() -> None:
    points = cross(SPACES["negative_source"]).grid()
    trials = list(trials_of(TINY, points, 2))
    makers = [trial for trial in trials if trial.point is None]
    assert [(trial.seed, trial.config.method) for trial in makers] == [(0, "dss"), (1, "dss")]
    takers = [trial for trial in trials if trial.needs]
    assert [(trial.seed, trial.needs) for trial in takers] == [(0, makers[0].name), (1, makers[1].name)]
    assert all(trial.config.negatives.source == "fixed" for trial in takers)
    own = configure(TINY, {"negatives.checkpoint": "somewhere"})
    assert not [trial for trial in trials_of(own, points, 2) if trial.point is None or trial.needs]


def test_any_key_is_an_axis() -> None:
    axis = axis_of_key("optim.lr", [1e-4, 5e-4])
    assert isinstance(axis, Axis)
    assert [(choice.label, choice.number) for choice in axis.choices] == [("0.0001", 1e-4), ("0.0005", 5e-4)]
    space = cross([axis, axis_of_key("judge.enabled", [True, False])])
    assert [point.labels for point in space.grid()] == [
        {"lr": lr, "enabled": enabled} for lr in ("0.0001", "0.0005") for enabled in ("true", "false")
    ]
    assert configure(TINY, space.grid()[-1].settings).judge.enabled is False


def test_draws_stay_inside_and_are_the_same_for_a_seed() -> None:
    space = cross(
        [
            axis_of_key("optim.lr", {"loguniform": [1e-5, 1e-2]}),
            axis_of_key("negatives.count", {"randint": [1, 3]}),
            axis_of_key("loss.beta", [0.1, 0.2]),
        ]
    )
    points = space.draws(400, seed=7)
    assert points == space.draws(400, seed=7)
    assert points[:100] == space.draws(100, seed=7)
    assert points != space.draws(400, seed=8)
    rates = [point.settings["optim.lr"] for point in points]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    # Uniform in the logarithm: each of the three decades has a third of them.
    decades = [sum(10.0**d <= rate < 10.0 ** (d + 1) for rate in rates) for d in (-5, -4, -3)]
    assert all(100 < count < 170 for count in decades)
    counts = [point.settings["negatives.count"] for point in points]
    assert set(counts) == {1, 2, 3} and all(isinstance(count, int) for count in counts)
    assert {point.settings["loss.beta"] for point in points} == {0.1, 0.2}


def test_what_a_label_says_is_what_runs() -> None:
    axis = Range("lr", "optim.lr", "optim.lr", 1e-5, 1e-2, log=True)
    for _ in range(50):
        choice = axis.draw(random.Random(_))
        assert math.isclose(float(choice.label), choice.settings["optim.lr"], rel_tol=0, abs_tol=0)


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("optim.learning_rate", [1], "space optim.learning_rate: unknown config key"),
        ("optim.lr", [], "expected a list of values"),
        ("optim.lr", 3, "expected a list of values"),
        ("optim.lr", [0.1, 0.1], "a value is given twice"),
        ("optim.lr", {"normal": [0, 1]}, "loguniform"),
        ("optim.lr", {"uniform": [0]}, "uniform|loguniform|randint"),
        ("optim.lr", {"uniform": [1, 0]}, "low < high"),
        ("optim.lr", {"loguniform": [0, 1]}, "low > 0"),
    ],
)
def test_a_wrong_axis_is_one_line(key: str, values: Any, message: str) -> None:
    with pytest.raises(UserError) as told:
        axis_of_key(key, values)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_axes_that_do_not_go_together() -> None:
    with pytest.raises(UserError, match="no space to sweep"):
        cross([])
    with pytest.raises(UserError, match=r"k: negatives.count is set by count too"):
        cross([axis_of_key("negatives.count", [1]), *SPACES["negatives_k"]])
    with pytest.raises(UserError, match="seeds=N"):
        cross([axis_of_key("train.seed", [1, 2])])
    with pytest.raises(UserError, match="the sweep decides"):
        cross([axis_of_key("run.name", ["a", "b"])])
    with pytest.raises(UserError, match="a range has no grid"):
        cross([axis_of_key("optim.lr", {"uniform": [0.1, 0.2]})]).grid()
    with pytest.raises(UserError, match=r"point count=-1: config key negatives.count"):
        list(trials_of(TINY, cross([axis_of_key("negatives.count", [-1])]).grid(), 1))


def test_names_are_folder_names_and_tell_configs_apart() -> None:
    space = cross([axis_of_key("custom.template", ["{question}", "../{question} / <x>"])])
    base: ExperimentConfig = config_from_dict({"task": "custom"})
    names = [trial.name for trial in trials_of(base, space.grid(), 1)]
    assert len(set(names)) == 2
    for name in names:
        assert "/" not in name and ".." not in name.split("-")[0]
        configure(base, {"run.name": name})  # checked by the config


def test_a_space_without_axes_has_one_point() -> None:
    assert [point.settings for point in Space().grid()] == [{}]


def test_keys_with_the_same_last_part_are_two_axes() -> None:
    space = cross([axis_of_key("optim.lr", [0.1, 0.2]), axis_of_key("judge.lr", [0.3, 0.4])])
    assert [axis.name for axis in space.axes] == ["optim.lr", "judge.lr"]
    assert [point.settings for point in space.grid()] == [
        {"optim.lr": a, "judge.lr": b} for a in (0.1, 0.2) for b in (0.3, 0.4)
    ]


def test_a_range_has_no_default_where_the_base_config_lies_outside() -> None:
    inside = cross([axis_of_key("optim.lr", {"loguniform": [1e-4, 1e-2]})])
    assert inside.default(TINY).settings == {"optim.lr": 1e-3}  # type: ignore[union-attr]
    assert cross([axis_of_key("optim.lr", {"uniform": [1e-6, 1e-5]})]).default(TINY) is None
    assert cross([axis_of_key("data.limit", {"randint": [1, 5]})]).default(TINY) is None  # it has none


def test_corners_are_the_ends_of_ranges_and_every_choice() -> None:
    space = cross([axis_of_key("loss.beta", [0.1, 0.2]), axis_of_key("negatives.count", {"randint": [1, 3]})])
    assert [point.settings for point in space.corners()] == [
        {"loss.beta": beta, "negatives.count": count} for beta in (0.1, 0.2) for count in (1, 3)
    ]

from __future__ import annotations

from pathlib import Path

import pytest

from qcrd_ray.config import (
    ExperimentConfig,
    config_from_dict,
    config_to_yaml,
    differing_keys,
    load_config,
    option_lines,
)
from qcrd_ray.errors import UserError
from qcrd_ray.hardware import cpu_gains_by_bf16, gains_by_bf16

PRESETS = sorted((Path(__file__).parents[2] / "jobs" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_loads_and_its_resolved_form_is_itself(preset: Path, tmp_path: Path) -> None:
    config = load_config(preset)
    (tmp_path / "resolved.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config
    assert load_config(tmp_path / "resolved.yaml").run_name == config.run_name


@pytest.mark.parametrize("name", ["t5_small", "t5_base", "t5_large", "qwen2.5_0.5b"])
def test_the_paper_s_presets_hold_the_paper_s_settings(name: str) -> None:
    config = load_config(next(path for path in PRESETS if path.stem == name))
    assert (config.teacher.samples, config.teacher.temperature) == (5, 0.7)
    assert (config.negatives.count, config.negatives.temperature, config.negatives.lag) == (1, 1.5, 5)
    assert (config.loss.beta, config.loss.margin) == (0.2, 3.0)
    assert (config.loss.alpha_label, config.loss.alpha_contrastive, config.loss.alpha_judge) == (0.5, 0.5, 0.5)
    assert (config.train.batch_size, config.optim.lr, config.train.max_steps) == (8, 5e-5, 10_000)


def test_overrides_are_dotted_yaml() -> None:
    config = load_config(
        None,
        ["optim.lr=1e-4", "data.teachers=[a, b]", "negatives.top_k=0", "run.name=x.1", "data.columns={answer: gold}"],
    )
    assert config.optim.lr == 1e-4
    assert config.data.teachers == ["a", "b"]
    assert config.negatives.top_k == 0
    assert config.run_name == "x.1"
    assert config.data.columns == {"answer": "gold"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.learn=1"], "config key optim.learn: unknown"),
        (["data.pth=x"], "did you mean data.path"),
        (["tsk=svamp"], "did you mean task"),
        (["optim.lr=-1"], "config key optim.lr: Input should be greater than 0, got -1"),
        (["optim.lr=.nan"], "config key optim.lr"),
        (["train.max_steps=1.5"], "config key train.max_steps"),
        (["scheme=median"], "config key scheme"),
        (["optim"], "expected key=value"),
        (["optim.lr.x=1"], "config key optim.lr"),
        (["run.name=a/b"], "is no folder name"),
        (["run.name=.."], "is no folder name"),
        (["scheme=weighted_mean", "judge.enabled=false"], "judge.enabled=true"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(None, overrides)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_key_given_twice_and_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for text, expected in (
        ("task: svamp\ntask: cqa\n", "given twice"),
        ("- 1\n", "expected a mapping"),
        ("{", "no valid YAML"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=expected):
            load_config(file)


def test_infrastructure_is_no_part_of_a_run_s_identity() -> None:
    base = config_from_dict({})
    elsewhere = config_from_dict(
        {"train": {"workers": 4, "zero_stage": 2}, "sampler": {"actors": 3}, "run": {"storage_path": "x"}}
    )
    assert base.run_name == elsewhere.run_name
    assert base.run_name != config_from_dict({"loss": {"beta": 0.3}}).run_name


def test_adapters_are_part_of_a_run_s_identity_where_there_are_any() -> None:
    def of(**lora: object) -> ExperimentConfig:
        return config_from_dict({"student": {"lora": lora}})

    without = config_from_dict({})
    assert not [key for key in without.identity() if "lora" in key]
    assert of(rank=0, alpha=8).run_name == without.run_name
    assert len({without.run_name, of(rank=8).run_name, of(rank=16).run_name, of(rank=8, alpha=8).run_name}) == 4


def test_every_key_has_a_description() -> None:
    assert all(description for *_, description in option_lines())


def test_the_keys_in_which_two_identities_differ() -> None:
    before = {"a": 1, "b": 2, "c": 3}
    assert differing_keys(before, dict(before)) == ""
    assert differing_keys(before, {"a": 1, "b": 5, "d": None}) == "b (2 there, 5 here), c (3 there, None here)"
    many = differing_keys({}, {f"k{i}": i for i in range(7)})
    assert many.startswith("k0 (None there, 0 here), ") and many.endswith("k4 (None there, 4 here) and 2 more")


def test_a_key_in_the_store_of_judges_is_refused_and_not_shown() -> None:
    for place in ("s3://id:topsecret@bucket/judges", "s3://bucket/judges?secret_key=topsecret"):
        with pytest.raises(UserError, match="store holds a key") as raised:
            load_config(None, [f"judge.store={place}"])
        assert "topsecret" not in str(raised.value)


@pytest.mark.parametrize(
    ("cpu_info", "expected"),
    [
        ("processor: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512_bf16 sse\n", True),
        ("processor: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512_bf16 sse\n", False),
        ("vendor_id\t: GenuineIntel\nflags\t: fpu avx512_bf16 amx_bf16\n", True),
        ("flags\t: fpu avx512bw amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("model name: bf16\nflags\t: fpu avx avx2 avx512bw\n", False),
        ("", False),
    ],
)
def test_what_a_cpu_gains_by_bf16(cpu_info: str, expected: bool) -> None:
    assert gains_by_bf16(cpu_info) is expected


def test_precision_is_that_of_the_machine_unless_it_is_set() -> None:
    found = "bf16" if cpu_gains_by_bf16() else "fp32"
    for raw in ({}, {"train": {"precision": "auto"}, "sampler": {"precision": "auto", "gpus": 0}}):
        config = config_from_dict(raw)
        assert (config.train.precision, config.sampler.precision, config.teacher.precision) == (found,) * 3
    gpus = config_from_dict({"train": {"gpus_per_worker": 0.5}, "sampler": {"gpus": 1}, "teacher": {"gpus": 0.25}})
    assert (gpus.train.precision, gpus.sampler.precision, gpus.teacher.precision) == ("bf16",) * 3
    for precision in ("bf16", "fp32"):
        section = {"precision": precision}
        config = config_from_dict(dict.fromkeys(("train", "sampler", "teacher"), section))
        assert (config.train.precision, config.sampler.precision, config.teacher.precision) == (precision,) * 3
        # What a run writes down is what its machine found.
        assert config_from_dict(config.model_dump(mode="json")) == config

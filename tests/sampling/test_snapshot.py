"""How far apart an engine and training may be on the probe texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.sampling.snapshot import WrongWeights, check_weights, probe_tolerance, write_description


@pytest.mark.parametrize(
    ("train", "sampler", "rank", "tolerance"),
    [
        ("fp32", "fp32", 0, 0.001),
        ("fp32", "fp32", 8, 0.001),
        ("bf16", "bf16", 0, 0.05),
        ("bf16", "fp32", 0, 0.05),
        ("fp32", "bf16", 0, 1.0),
        ("bf16", "bf16", 8, 1.0),
    ],
)
def test_an_engine_that_rounds_weights_is_held_to_less(train: str, sampler: str, rank: int, tolerance: float) -> None:
    sections: dict[str, Any] = {"train": {"precision": train}, "student": {"lora": {"rank": rank}}}
    assert probe_tolerance(ExperimentConfig(**sections, sampler={"precision": sampler})) == tolerance
    asked = ExperimentConfig(**sections, sampler={"precision": sampler, "verify_tolerance": 0.3})
    assert probe_tolerance(asked) == 0.3


class Engine:
    def target_logprobs(self, prompts: Sequence[Any], targets: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[-float(token) for token in target] for target in targets]


def test_every_token_of_every_text_counts_alike(tmp_path: Path) -> None:
    texts = [([1], [2]), ([1, 1], [4, 4, 2])]  # -12 nats on four tokens
    write_description(tmp_path, 3, 40, -3.04)
    assert json.loads((tmp_path / "snapshot.json").read_text())["snapshot"] == 3
    assert check_weights(Engine(), tmp_path, texts, 0.05, "here") == pytest.approx(0.04)  # type: ignore[arg-type]
    with pytest.raises(WrongWeights, match="here: the engine gives the probe texts -3.0000 nats a token"):
        check_weights(Engine(), tmp_path, texts, 0.03, "here")  # type: ignore[arg-type]
    write_description(tmp_path, 3, 40, float("nan"))
    with pytest.raises(WrongWeights):
        check_weights(Engine(), tmp_path, texts, 0.05, "here")  # type: ignore[arg-type]

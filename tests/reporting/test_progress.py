"""What a person reads of a run while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcrd_ray.config import config_from_dict
from qcrd_ray.reporting.progress import Progress
from qcrd_ray.run_folder import RunFolder


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({}, "judge pretrained for 5 steps: mean score 0.90 of positives, 0.40 of negatives", "alike"),
        ({"judge_scores_alike": True}, "its scores are alike", "not pretrained"),
        # JSON has null for what is no number.
        (
            {"judge_pretrain_positive_score": None, "judge_pretrain_negative_score": None},
            "judge pretrained for 5 steps",
            "mean score",
        ),
        (
            {
                "judge_pretrained_steps": 0,
                "judge_pretrain_positive_score": None,
                "judge_pretrain_negative_score": None,
            },
            "judge not pretrained: no question has a positive and a negative (no minority of a vote, and "
            "judge.augmentation=none)",
            "steps",
        ),
    ],
)
def test_it_says_what_came_of_the_judge_s_pretraining(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str, unsaid: str
) -> None:
    progress = Progress(RunFolder(str(tmp_path), "one"), config_from_dict({"judge": {"augmentation": "none"}}))
    record = {
        "judge_pretrained_steps": 5, "judge_pretrain_positive_score": 0.9, "judge_pretrain_negative_score": 0.4,
        "judge_scores_alike": False,
    }  # fmt: skip
    progress.record(record | changes, before=False)
    lines = capsys.readouterr().err
    assert said in lines and unsaid not in lines

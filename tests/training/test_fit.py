from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import WorkerGroupError

from qcrd_ray.config import config_from_dict
from qcrd_ray.errors import UserError
from qcrd_ray.run_folder import RunFolder
from qcrd_ray.training.fit import told_as

DEAD = ray.exceptions.ActorDiedError()


@pytest.mark.parametrize(
    ("failures", "stopping", "expected"),
    [
        ({0: DEAD}, False, "training workers failed 4 times"),
        ({0: DEAD}, True, KeyboardInterrupt),
        ({0: UserError("no room")}, False, "no room; there is no checkpoint yet"),
        ({0: UserError("no room")}, True, "no room; there is no checkpoint yet"),
        ({0: ZeroDivisionError("a bug")}, False, None),
        ({0: ZeroDivisionError("a bug")}, True, KeyboardInterrupt),
    ],
)
def test_how_training_that_failed_is_told(
    tmp_path: Path, failures: dict[int, Exception], stopping: bool, expected: Any
) -> None:
    run = RunFolder(str(tmp_path), "one")
    run.create()
    told = told_as(
        config_from_dict({"train": {"max_failures": 3}}), run, WorkerGroupError("failed", failures), stopping
    )
    if isinstance(expected, str):
        assert isinstance(told, UserError) and expected in str(told)
    elif expected is None:
        assert told is None
    else:
        assert isinstance(told, expected)

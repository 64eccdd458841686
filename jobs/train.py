"""Distil a teacher's reasoning into a student: rationale sets, negatives of the student's own past, judge, training.

    python jobs/train.py --config jobs/configs/quickstart.yaml
    python jobs/train.py --config jobs/configs/t5_base.yaml task=svamp data.path=DATA/svamp optim.lr=1e-4
    ray job submit --working-dir . -- python jobs/train.py --config jobs/configs/quickstart.yaml

The run is in `runs/<name>/`; the last line of standard output is its result. The same command goes on where a run
that was ended stopped.
"""

from __future__ import annotations

import sys
from typing import Any

from qcrd_ray.cli import job_main
from qcrd_ray.config import ExperimentConfig


def run(config: ExperimentConfig) -> dict[str, Any]:
    from qcrd_ray.reporting.progress import show_result
    from qcrd_ray.training.trainer import train

    result = train(config)
    show_result(result)
    return result


if __name__ == "__main__":
    sys.exit(job_main("train", __doc__ or "", run))

"""Score a student folder on a split of its task.

    python jobs/evaluate.py --config jobs/configs/smollm2_135m.yaml task=svamp data.path=DATA/svamp \
        student.model=runs/NAME/student evaluation.split=valid output=scores

The last line of standard output is the result; with `output`, every prediction is written there.
"""

from __future__ import annotations

import sys
from typing import Any

from qcrd_ray.cli import job_main
from qcrd_ray.config import ExperimentConfig


def run(config: ExperimentConfig) -> dict[str, Any]:
    from qcrd_ray.evaluation.accuracy import evaluate

    return evaluate(config)


if __name__ == "__main__":
    sys.exit(job_main("evaluate", __doc__ or "", run))

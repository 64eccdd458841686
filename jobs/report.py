"""Write the report of a run, or of several runs beside each other, as one HTML file that needs no network.

    python jobs/report.py runs/NAME
    python jobs/report.py runs/ONE runs/OTHER --output comparison.html
    python jobs/report.py s3://bucket/runs/NAME --output report.html

A run is a folder that jobs/train.py wrote, here or on any storage that it can write to; it may still be under way. The
last line of standard output says where the report is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from qcrd_ray.cli import run_job
from qcrd_ray.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def prepare() -> Callable[[], Mapping[str, Any]]:
    parser = _Parser(
        prog="python jobs/report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder or URI of a run")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="where to write; default: report.html in the run's folder, comparison.html here for several runs",
    )
    arguments = parser.parse_intermixed_args()

    def run() -> Mapping[str, Any]:
        from qcrd_ray.reporting.report import make_report

        return make_report(arguments.runs, arguments.output)

    return run


if __name__ == "__main__":
    sys.exit(run_job(prepare))

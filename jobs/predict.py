"""Ask a trained student: label and rationale of each question, a JSON line each, in order.

    python jobs/predict.py --student runs/NAME/student "What is 3 + 4?"
    python jobs/predict.py --student runs/NAME/student --file questions.jsonl > answers.jsonl
    cat questions.jsonl | python jobs/predict.py --student runs/NAME/student --no-rationale | jq -r .label

An input is a line {"question": …, "id": …, "choices": […]} or, where the first line is no JSON object, the question
itself; a file may be .csv or .parquet too. An answer is {"id": …, "question": …, "label": …, "rationale": …}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

import pydantic

from qcrd_ray.cli import run_filter
from qcrd_ray.config import PredictionConfig, section_lines
from qcrd_ray.errors import UserError

STANDARD_OUTPUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help (a question that begins with a dash goes behind --)")


def parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog="python jobs/predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    made.add_argument("question", nargs="*", help="questions; without one, --file or standard input is read")
    made.add_argument("--student", required=True, type=Path, metavar="FOLDER", help="runs/NAME/student")
    made.add_argument("--file", type=Path, help="questions: .jsonl, .csv, .parquet, or a question a line")
    made.add_argument("--format", choices=("auto", "jsonl", "lines"), default="auto", help="of lines; default auto")
    made.add_argument(
        "--output", type=Path, metavar="FILE", help="write there, once all is done; default, and -: standard output"
    )
    made.add_argument("--no-rationale", action="store_true", help="labels alone")
    made.add_argument("--skip-bad", action="store_true", help='answer a bad input {"error": …} instead of ending there')
    made.add_argument("--config", metavar="FILE", help="of the run, for a folder without qcrd_ray.json")
    made.add_argument("--trust-remote-code", action="store_true", help="run Python code that the folder holds")
    for name, kind, default, description in section_lines(PredictionConfig()):
        shown = description if default == "null" else f"{description}; default {default}"
        made.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar=kind.upper(), help=shown.replace("%", "%%"))
    return made


def prepare() -> Callable[[TextIO], None]:
    options_given, behind = sys.argv[1:], []
    if "--" in options_given:
        place = options_given.index("--")
        options_given, behind = options_given[:place], options_given[place + 1 :]
    arguments = parser().parse_intermixed_args(options_given)
    arguments.question += behind
    if str(arguments.output) in STANDARD_OUTPUT:
        arguments.output = None
    given = {name: value for name in PredictionConfig.model_fields if (value := getattr(arguments, name)) is not None}
    try:
        options = PredictionConfig.model_validate(given)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{option}: {first['msg']}, got {str(first.get('input'))[:60]!r}") from None
    if arguments.question and arguments.file:
        raise UserError("a question and --file are given; give one of them")

    def run(stdout: TextIO) -> None:
        from qcrd_ray.evaluation.predict import predict_job

        predict_job(arguments, options, stdout)

    return run


if __name__ == "__main__":
    sys.exit(run_filter(prepare))

"""Search a space of configs by Ray Tune: the paper's grids, or any keys of the config, each point with several seeds.

    python tune/sweep.py --config jobs/configs/tiny.yaml --space negatives_k seeds=2 train.max_steps=20
    python tune/sweep.py --config jobs/configs/t5_base.yaml --space positives_m --space temperature seeds=3 \\
        task=svamp data.path=DATA/svamp
    python tune/sweep.py --config jobs/configs/t5_base.yaml --space 'optim.lr={loguniform: [1e-5, 1e-3]}' \\
        --space 'loss.beta=[0.1, 0.2, 0.4]' searcher=optuna trials=20 scheduler=asha train.eval_interval=500 \\
        task=svamp data.path=DATA/svamp

The sweep is in `runs/<name>/`: tables, figures, `report.html`, and the trials' runs. The last line of standard output
is its result. The same command goes on where a sweep that was ended stopped; more seeds may be added.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pydantic
from search_spaces import SPACES

from qcrd_ray.cli import key_help, option_parser, run_job
from qcrd_ray.config import config_to_yaml, load_config, parse_value, section_lines
from qcrd_ray.errors import UserError
from qcrd_ray.sweeps.settings import SweepSettings
from qcrd_ray.sweeps.space import Axis, Range, axis_of_key, cross


def prepare() -> Callable[[], Mapping[str, Any]] | None:
    parser = option_parser("tune/sweep.py", __doc__ or "", "--space SPACE [--space SPACE ...] ", list(_help()))
    parser.add_argument(
        "--space", action="append", default=[], metavar="SPACE", help="a named space, key=[value, ...] or key={...}"
    )
    arguments = parser.parse_intermixed_args()
    own = [override for override in arguments.overrides if override.partition("=")[0] in SweepSettings.model_fields]
    settings = _settings(own)
    base = load_config(arguments.config, [override for override in arguments.overrides if override not in own])
    if arguments.show_config:
        print(config_to_yaml(base), end="", flush=True)
        return None
    space = cross([axis for text in arguments.space for axis in _axes(text)])

    def run() -> Mapping[str, Any]:
        from qcrd_ray.sweeps.driver import sweep
        from qcrd_ray.sweeps.show import show_result

        result = sweep(settings, base, space)
        show_result(result)
        return result

    return run


def _settings(overrides: list[str]) -> SweepSettings:
    values = {}
    for override in overrides:
        key, _, text = override.partition("=")
        values[key] = parse_value(override, text)
    try:
        return SweepSettings.model_validate(values)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"sweep key {first['loc'][0]}: {message}, got {first.get('input')!r}") from None


def _axes(text: str) -> tuple[Axis | Range, ...]:
    """The axes of one --space."""
    key, equals, value = text.partition("=")
    if equals:
        return (axis_of_key(key, parse_value(text, value)),)
    if text not in SPACES:
        import difflib

        near = difflib.get_close_matches(text, SPACES, 1, 0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--space {text}: unknown; expected one of {', '.join(SPACES)}, or key=[value, ...]{hint}")
    return SPACES[text]


def _help() -> Iterator[str]:
    yield "named spaces:"
    for name, axes in SPACES.items():
        sources = " × ".join(f"{axis.title}: {', '.join(c.label for c in axis.choices)}" for axis in axes)
        yield f"  {name}  ({axes[0].source})"
        yield f"      {sources}"
    yield "keys of the sweep:"
    for line in section_lines(SweepSettings()):
        yield from key_help(*line)


if __name__ == "__main__":
    sys.exit(run_job(prepare))

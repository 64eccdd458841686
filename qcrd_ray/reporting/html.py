"""HTML pages of one file: templates whose values are escaped, and what all pages share of numbers and style."""

from __future__ import annotations

import math
from typing import Any

PAGE = "report.html"


def render(package: str, template: str, **values: Any) -> str:
    """A template of a package's `templates/`, which may include those of this one.

    Every value is escaped, unless the template says that it is markup.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    packages = dict.fromkeys((package, "qcrd_ray.reporting"))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in packages]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"number": number, "percent": percent, "whole": whole}
    text = environment.get_template(template).render(**values)
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no UTF-8


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f} %"


def whole(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:,.0f}"

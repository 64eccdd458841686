"""The form in which all benchmarks write what they have measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def figure(case: str, metric: str, values: Sequence[float], unit: str) -> dict[str, Any]:
    """A row: a figure of a case, over its rounds."""
    summary = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {"case": case, "metric": metric, **summary, "unit": unit}


def median_ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios of what was measured in the same round."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def write_figures(
    file: Path | None, rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, float], **more: Any
) -> None:
    """Write rows, each on a line, ratios, and what else a reader may want, to `--json FILE`, if one was asked for."""
    if file is None:
        return
    lines = ",\n".join(json.dumps(row) for row in rows)
    others = json.dumps({"ratios": ratios, **more}, indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{{\n"rows": [\n{lines}\n],{others[1:]}\n', encoding="utf-8")

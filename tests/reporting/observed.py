"""A run, and what its node's agent exported while it went."""

from __future__ import annotations

import re
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcrd_ray.prometheus import Metric

STEPS = 40
"""Of the run: enough that the restart of a sampler, killed near its beginning, is exported before its end."""


@dataclass
class Observed:
    """
    Attributes:
        base: the folder that holds the run's and MLflow's.
        samples: all values of a metric, by its name and its labels.
        kinds: of the metrics, as `# TYPE` names them.
    """

    folder: Path
    result: dict[str, Any]
    base: Path
    samples: dict[str, dict[tuple[tuple[str, str], ...], list[float]]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def scrape(self, port: int) -> None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:  # the agent is not up yet, or not any more
            return
        for line in text.splitlines():
            if kind := re.match(r"# TYPE (ray_qcrd_\w+) (\w+)", line):
                self.kinds[kind[1]] = kind[2]
            if found := re.match(r"(ray_qcrd_\w+)\{(.*)\} (\S+)$", line):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', found[2]))
                ours = tuple((key, labels[key]) for key in ("run", "sampler") if key in labels)
                self.samples.setdefault(found[1], {}).setdefault(ours, []).append(float(found[3]))

    def last(self, metric: Metric) -> float:
        """The last value, summed over its labels."""
        return sum(values[-1] for values in self.samples[metric.exported].values())

    def values(self, metric: Metric) -> list[float]:
        return [value for values in self.samples[metric.exported].values() for value in values]

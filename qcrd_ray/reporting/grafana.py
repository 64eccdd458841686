"""The Grafana dashboard of a cluster's runs, in the schema of the dashboards that Ray generates for its own Grafana.

    python -m qcrd_ray.reporting.grafana            # into the folder that Ray's Grafana reads, on the head node
    python -m qcrd_ray.reporting.grafana FOLDER

`cluster/grafana/qcrd_ray.json` is what this writes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcrd_ray import prometheus as names
from qcrd_ray.errors import UserError
from qcrd_ray.prometheus import Metric
from qcrd_ray.run_folder import write_text_atomic

FILE = "qcrd_ray.json"
RAY_DASHBOARDS = Path("/tmp/ray/session_latest/metrics/grafana/dashboards")
COLUMNS, WIDTH, HEIGHT, ROW_HEIGHT = 2, 12, 8, 1


@dataclass(frozen=True)
class Panel:
    """One graph.

    Attributes:
        unit: as Grafana names it.
        targets: (PromQL, legend) pairs.
    """

    title: str
    description: str
    unit: str
    targets: Sequence[tuple[str, str]]


def _gauge(metric: Metric) -> str:
    return f'max({metric.exported}{{run=~"$run"}}) by (run)'


def _rate(metric: Metric) -> str:
    return f'sum(rate({metric.exported}{{run=~"$run"}}[$window])) by (run)'


ROWS: dict[str, list[Panel]] = {
    "Training": [
        Panel(
            "Tokens a second",
            "Tokens that all workers train on, and tokens of negatives that all samplers make.",
            "short",
            [(_rate(names.TRAIN_TOKENS), "{{run}}, trained"), (_rate(names.SAMPLER_TOKENS), "{{run}}, sampled")],
        ),
        Panel(
            "Tokens a second of the last step",
            "The last step's tokens by its seconds, without what lies between steps.",
            "short",
            [(_gauge(names.TRAIN_TOKENS_PER_SECOND), "{{run}}")],
        ),
        Panel(
            "Share of the time for which training waits",
            "Stall: for negatives. Snapshots and checkpoints: to have them taken. 1 is all of the time.",
            "percentunit",
            [
                (_rate(names.TRAIN_STALL_SECONDS), "{{run}}, stall"),
                (_rate(names.TRAIN_WARMUP_SECONDS), "{{run}}, first negatives"),
                (_rate(names.TRAIN_PUBLISH_SECONDS), "{{run}}, snapshots"),
                (_rate(names.TRAIN_CHECKPOINT_SECONDS), "{{run}}, checkpoints"),
            ],
        ),
        Panel("Step", "Optimizer steps done.", "short", [(_gauge(names.TRAIN_STEP), "{{run}}")]),
        Panel("Loss", names.TRAIN_LOSS.description, "none", [(_gauge(names.TRAIN_LOSS), "{{run}}")]),
        Panel(
            "Negatives inside the margin",
            f"{names.TRAIN_ACTIVE_RATIO.description} At 0 the negatives teach nothing.",
            "percentunit",
            [(_gauge(names.TRAIN_ACTIVE_RATIO), "{{run}}")],
        ),
        Panel(
            "Seconds a checkpoint",
            "Mean seconds for which training stands still to write one.",
            "s",
            [(f"{_rate(names.TRAIN_CHECKPOINT_SECONDS)} / {_rate(names.TRAIN_CHECKPOINTS)}", "{{run}}")],
        ),
    ],
    "Sampling": [
        Panel(
            "Work that waits, and negatives that lie ready",
            "A queue that grows while nothing lies ready: training waits for samplers.",
            "short",
            [
                (_gauge(names.SAMPLER_QUEUE_DEPTH), "{{run}}, pieces of work"),
                (_gauge(names.CHUNKS_READY), "{{run}}, chunks ready"),
            ],
        ),
        Panel(
            "Age of the snapshot in use",
            "Steps since the snapshot of the current negatives was taken: between lag and lag + 1 iterations.",
            "short",
            [(_gauge(names.SNAPSHOT_AGE_STEPS), "{{run}}")],
        ),
        Panel(
            "Age of the newest snapshot",
            names.SNAPSHOT_AGE_SECONDS.description,
            "s",
            [(_gauge(names.SNAPSHOT_AGE_SECONDS), "{{run}}")],
        ),
        Panel(
            "Samplers",
            "Samplers that answer, and failures so far.",
            "short",
            [
                (_gauge(names.SAMPLERS_UP), "{{run}}, up"),
                (f'sum({names.SAMPLER_RESTARTS.exported}{{run=~"$run"}}) by (run)', "{{run}}, failures"),
            ],
        ),
        Panel(
            "Samplers at work",
            "Samplers that make negatives or load a snapshot, in the mean.",
            "short",
            [
                (_rate(names.SAMPLER_BUSY_SECONDS), "{{run}}, sampling"),
                (_rate(names.SAMPLER_LOAD_SECONDS), "{{run}}, loading"),
            ],
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        grid = {"h": ROW_HEIGHT, "w": COLUMNS * WIDTH, "x": 0, "y": y}
        panels.append(
            {"collapsed": False, "gridPos": grid, "id": len(panels) + 1, "title": title, "type": "row", "panels": []}
        )
        y += ROW_HEIGHT
        for index, panel in enumerate(row):
            down, right = divmod(index, COLUMNS)
            grid = {"h": HEIGHT, "w": WIDTH, "x": right * WIDTH, "y": y + down * HEIGHT}
            panels.append(_graph(panel, len(panels) + 1, grid))
        y += -(-len(row) // COLUMNS) * HEIGHT
    return {
        "annotations": {
            "list": [
                {
                    "builtIn": 1,
                    "datasource": "-- Grafana --",
                    "enable": True,
                    "hide": True,
                    "iconColor": "rgba(0, 211, 255, 1)",
                    "name": "Annotations & Alerts",
                    "type": "dashboard",
                }
            ]
        },
        "editable": True,
        "graphTooltip": 1,
        "panels": panels,
        "refresh": "10s",
        "schemaVersion": 27,
        "style": "dark",
        "tags": ["ray", "qcrd_ray"],
        "templating": {"list": _variables()},
        "time": {"from": "now-1h", "to": "now"},
        "title": "QCRD training",
        "uid": "qcrdRayDashboard",
        "version": 1,
    }


def _variables() -> list[dict[str, Any]]:
    runs = f"label_values({names.SAMPLERS_UP.exported}, run)"
    windows = ("30s", "1m", "5m", "15m")
    return [
        {
            "current": {"selected": False},
            "description": "The Prometheus that scrapes the cluster.",
            "hide": 0,
            "includeAll": False,
            "multi": False,
            "name": "datasource",
            "options": [],
            "query": "prometheus",
            "refresh": 1,
            "regex": "",
            "skipUrlSync": False,
            "type": "datasource",
        },
        {
            "allValue": ".*",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
            "datasource": "${datasource}",
            "definition": runs,
            "description": "Names of runs.",
            "hide": 0,
            "includeAll": True,
            "multi": True,
            "name": "run",
            "query": {"query": runs, "refId": "StandardVariableQuery"},
            "refresh": 2,
            "sort": 2,
            "type": "query",
        },
        {
            "auto": False,
            "auto_count": 30,
            "auto_min": "10s",
            "current": {"selected": True, "text": "1m", "value": "1m"},
            "description": "Time over which rates are averaged; three scrapes at least.",
            "hide": 0,
            "label": "Window",
            "name": "window",
            "options": [{"selected": text == "1m", "text": text, "value": text} for text in windows],
            "query": ",".join(windows),
            "refresh": 2,
            "type": "interval",
        },
    ]


def _graph(panel: Panel, number: int, grid: dict[str, int]) -> dict[str, Any]:
    def axis(unit: str) -> dict[str, Any]:
        return {"format": unit, "label": "", "logBase": 1, "max": None, "min": None, "show": True}

    targets = [
        {
            "exemplar": True,
            "expr": expression,
            "interval": "",
            "legendFormat": legend,
            "queryType": "randomWalk",
            "refId": chr(ord("A") + index),
        }
        for index, (expression, legend) in enumerate(panel.targets)
    ]
    return {
        "aliasColors": {},
        "bars": False,
        "dashLength": 10,
        "dashes": False,
        "datasource": "${datasource}",
        "description": panel.description,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "fill": 0,
        "fillGradient": 0,
        "gridPos": grid,
        "hiddenSeries": False,
        "id": number,
        "legend": {
            "alignAsTable": True,
            "avg": True,
            "current": True,
            "hideEmpty": False,
            "hideZero": False,
            "max": True,
            "min": False,
            "rightSide": False,
            "show": True,
            "sort": "current",
            "sortDesc": True,
            "total": False,
            "values": True,
        },
        "lines": True,
        "linewidth": 1,
        "nullPointMode": None,
        "options": {"alertThreshold": True},
        "percentage": False,
        "pluginVersion": "7.5.17",
        "pointradius": 2,
        "points": False,
        "renderer": "flot",
        "seriesOverrides": [],
        "spaceLength": 10,
        "stack": False,
        "steppedLine": False,
        "targets": targets,
        "thresholds": [],
        "timeFrom": None,
        "timeRegions": [],
        "timeShift": None,
        "title": panel.title,
        "tooltip": {"shared": True, "sort": 0, "value_type": "individual"},
        "type": "graph",
        "xaxis": {"buckets": None, "mode": "time", "name": None, "show": True, "values": []},
        "yaxes": [axis(panel.unit), axis("short")],
        "yaxis": {"align": False, "alignLevel": None},
    }


def write_dashboard(folder: Path) -> Path:
    """Write the dashboard into a folder that Grafana reads. Raises UserError where there is no such folder."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; Ray makes {RAY_DASHBOARDS} on a head node that has its dashboard on, or name "
            "the folder that your Grafana reads"
        )
    write_text_atomic(folder / FILE, json.dumps(dashboard(), indent=2) + "\n")
    return folder / FILE


def main(argv: Sequence[str]) -> int:
    try:
        print(write_dashboard(Path(argv[0]) if argv else RAY_DASHBOARDS))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

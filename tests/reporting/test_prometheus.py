"""What a run exports, scraped from Ray's agent while it goes, and the dashboard that shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcrd_ray import prometheus
from qcrd_ray.errors import UserError
from qcrd_ray.prometheus import METRICS
from qcrd_ray.reporting.grafana import FILE, dashboard, main, write_dashboard
from tests.reporting.observed import STEPS, Observed

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "cluster" / "grafana" / "qcrd_ray.json"


@pytest.mark.slow
def test_every_metric_is_exported_with_its_kind_and_tags(observed: Observed) -> None:
    assert observed.kinds == {metric.exported: metric.kind for metric in METRICS}
    for metric in METRICS:
        for labels in observed.samples[metric.exported]:
            assert [name for name, _ in labels] == ["run", *metric.tags]
            assert dict(labels)["run"] == "observed"


@pytest.mark.slow
def test_the_values_are_those_of_the_run(observed: Observed) -> None:
    records = [json.loads(line) for line in (observed.folder / "metrics.jsonl").read_text().splitlines()]
    steps = {record["step"] + 1: record for record in records if "step" in record}
    result = observed.result
    assert max(values := observed.values(prometheus.TRAIN_STEP)) <= STEPS
    assert set(values) <= set(steps)
    losses = {record["loss"] for record in steps.values()}
    assert all(any(abs(loss - value) < 1e-6 for loss in losses) for value in observed.values(prometheus.TRAIN_LOSS))
    assert 0 < observed.last(prometheus.TRAIN_TOKENS) <= sum(record["tokens"] for record in steps.values())
    assert min(observed.values(prometheus.TRAIN_TOKENS_PER_SECOND)) > 0
    assert all(0 <= value <= 1 for value in observed.values(prometheus.TRAIN_ACTIVE_RATIO))
    # The sampler was killed: training waited for what it had, and no more than the result says.
    assert observed.last(prometheus.SAMPLER_RESTARTS) == result["negatives"]["sampler"]["sampler_restarts"] >= 1
    assert 0 < observed.last(prometheus.TRAIN_STALL_SECONDS) <= result["negatives"]["stall_seconds"] + 0.01
    assert 0 < observed.last(prometheus.SAMPLER_TOKENS) <= result["negatives"]["sampler"]["tokens"]
    assert observed.last(prometheus.SAMPLER_BUSY_SECONDS) <= result["negatives"]["sampler"]["busy_seconds"] + 0.01
    assert 1 <= observed.last(prometheus.TRAIN_CHECKPOINTS) <= 4
    # Lag 2, iterations of 2 steps: the snapshot of the last step's negatives is 4 or 5 steps old, younger at the start.
    assert set(observed.values(prometheus.SNAPSHOT_AGE_STEPS)) <= {0, 1, 2, 3, 4, 5}
    assert max(observed.values(prometheus.SAMPLERS_UP)) == 1
    assert max(observed.values(prometheus.SNAPSHOT_AGE_SECONDS)) < result["seconds"]


def panels_of(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in node.get("panels", []):
        yield panel
        yield from panels_of(panel)


def test_the_dashboard_asks_for_metrics_that_are_exported_and_shows_them_all() -> None:
    exported = {metric.exported: metric for metric in METRICS}
    asked = set()
    for panel in panels_of(dashboard()):
        for target in panel.get("targets", []):
            names = re.findall(r"ray_\w+", target["expr"])
            assert names
            for name in names:
                asked.add(name)
                assert ("rate(" in target["expr"]) == (exported[name].kind == "counter") or "restarts" in name
            assert target["expr"].count("(") == target["expr"].count(")")
            assert target["expr"].count('{run=~"$run"}') == len(names)
    assert asked == set(exported)


def test_the_dashboard_has_the_schema_of_those_that_ray_makes() -> None:
    factory = pytest.importorskip("ray.dashboard.modules.metrics.grafana_dashboard_factory")
    rays = [json.loads(factory.generate_train_grafana_dashboard()[0]),
            json.loads(factory.generate_default_grafana_dashboard()[0])]  # fmt: skip
    ours = dashboard()
    assert ours["schemaVersion"] == rays[0]["schemaVersion"]
    assert ours["uid"] not in {ray["uid"] for ray in rays}
    assert set(rays[0]) - {"rayMeta"} == set(ours)
    by_type = {panel["type"]: panel for ray in rays for panel in panels_of(ray)}
    for panel in panels_of(ours):
        assert set(panel) == set(by_type[panel["type"]])
        for target in panel.get("targets", []):
            assert set(target) == set(by_type["graph"]["targets"][0])
            assert panel["datasource"] == by_type["graph"]["datasource"] == "${datasource}"
    variables = {variable["type"]: variable for ray in rays for variable in ray["templating"]["list"]}
    assert [variable["name"] for variable in ours["templating"]["list"]] == ["datasource", "run", "window"]
    for variable in ours["templating"]["list"]:
        assert set(variable) <= set(variables[variable["type"]]) | {"label"}


def test_the_dashboards_panels_do_not_overlap() -> None:
    panels = list(panels_of(dashboard()))
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        grid = panel["gridPos"]
        assert grid["x"] >= 0 and grid["x"] + grid["w"] <= 24
        taken = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
        assert not taken & cells, panel["title"]
        cells |= taken


def test_the_file_is_what_the_command_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_dashboard(tmp_path) == tmp_path / FILE
    assert (tmp_path / FILE).read_text() == DASHBOARD.read_text()
    with pytest.raises(UserError, match="no such folder"):
        write_dashboard(tmp_path / "none")
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_documentation_lists_every_metric() -> None:
    text = (ROOT / "docs" / "observability.md").read_text()
    rows = re.findall(r"^\| `(qcrd_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", text, re.MULTILINE)
    assert rows == [(m.name, m.kind, " ".join(f"`{tag}`" for tag in ("run", *m.tags)), m.description) for m in METRICS]

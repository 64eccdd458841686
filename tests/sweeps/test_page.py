"""A sweep's page and figures, from rows that no training had to make."""

from __future__ import annotations

import html.parser
import xml.etree.ElementTree
from dataclasses import asdict
from pathlib import Path

from qcrd_ray.config import config_from_dict
from qcrd_ray.run_folder import RunFolder
from qcrd_ray.sweeps.page import write_page
from qcrd_ray.sweeps.space import Space, axis_of_key, cross
from qcrd_ray.sweeps.summary import TrialRow, summarise

HOSTILE = "<script>alert(1)</script></style>\u202e" + "x" * 3000


class _Page(html.parser.HTMLParser):
    """Counts elements, and finds what would leave the page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")
        ]


def written(space: Space, rows: list[TrialRow], folder: Path) -> str:
    run = RunFolder(str(folder), "sweep")
    run.create()
    base = config_from_dict({"task": "custom", "custom": {"template": "<b>{question}</b>"}})
    points = summarise(space.grid() if not space.ranges else space.draws(4, 0), rows, None)
    result = {
        "name": "sweep", "task": "custom", "student": "s", "searcher": "grid", "scheduler": "none", "seeds": 2,
        "trials": {"total": len(rows), "finished": 1, "stopped": 0, "failed": 1, "missing": 0},
        "selected_by": "accuracy", "teacher_simulated": True, "points": [asdict(point) for point in points],
        "reused": dict.fromkeys(
            ("teacher_samples_asked", "teacher_samples_reused", "judges_pretrained", "judges_reused"), 0
        ),
    }  # fmt: skip
    write_page(run, space, base, points, rows, result)
    return (folder / "sweep" / "report.html").read_text()


def rows_of(space: Space, seeds: int = 2) -> list[TrialRow]:
    points = space.grid() if not space.ranges else space.draws(4, 0)
    return [
        TrialRow(f"t{n}-{seed}", str(point), point.labels, seed, "finished", accuracy=0.1 * n + 0.01 * seed)
        for n, point in enumerate(points)
        for seed in range(seeds)
    ]


def test_a_figure_for_each_axis_and_a_heat_map_for_two(tmp_path: Path) -> None:
    space = cross([axis_of_key("teacher.samples", [1, 5]), axis_of_key("scheme", ["min_max", "mean"])])
    text = written(space, rows_of(space), tmp_path)
    names = {path.name for path in tmp_path.glob("sweep/figures/*")}
    assert names == {"accuracy-over-samples.svg", "accuracy-over-scheme.svg", "heat-map-samples-scheme.svg"}
    for path in tmp_path.glob("sweep/figures/*"):
        assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")
        assert "var(--ink)" in path.read_text()
    page = _Page()
    page.feed(text)
    assert page.tags.count("svg") == 3
    assert not page.links and "script" not in page.tags
    assert "The teacher is simulated." in text
    assert "http-equiv" not in text and "@import" not in text


def test_a_range_is_a_scatter(tmp_path: Path) -> None:
    space = cross([axis_of_key("optim.lr", {"loguniform": [1e-5, 1e-2]})])
    written(space, rows_of(space), tmp_path)
    assert [path.name for path in tmp_path.glob("sweep/figures/*")] == ["accuracy-over-lr.svg"]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    space = cross([axis_of_key("custom.template", [HOSTILE, "$x^$ {question}"])])
    rows = rows_of(space)
    rows.append(TrialRow("t9", rows[0].point, rows[0].labels, 9, "failed", reason=HOSTILE))
    text = written(space, rows, tmp_path)
    page = _Page()
    page.feed(text)
    assert "script" not in page.tags
    assert page.tags.count("style") == text.count("<style")
    assert "&lt;script&gt;alert(1)" in text


def test_a_sweep_in_which_nothing_finished_has_a_page(tmp_path: Path) -> None:
    space = cross([axis_of_key("teacher.samples", [1, 5]), axis_of_key("negatives.count", [1, 2])])
    rows = [TrialRow("t", str(p), p.labels, 0, "failed", reason="no") for p in space.grid()]
    assert "no" in written(space, rows, tmp_path)

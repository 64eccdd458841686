from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from qcrd_ray.run_folder import METRICS, RunFolder
from qcrd_ray.sweeps.display import SHOWN_ROWS, SweepDisplay
from tests.faults.runs import until


def display(folder: Path, names: list[str], finished: dict[str, float]) -> SweepDisplay:
    found = SweepDisplay("a sweep", 20, 2)
    for name in names:
        found.add(name, RunFolder(str(folder), name), "finished" if name in finished else "waiting", finished.get(name))
    return found


def shown(found: SweepDisplay) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(found._table())
    return console.export_text()


def test_the_table_says_where_each_trial_stands(tmp_path: Path) -> None:
    found = display(tmp_path, ["a", "b", "c", "d"], {"a": 0.5})
    found.started("b")
    found.evaluated("b", 10, 0.25)
    found.started("c")
    found.ended("c", "failed", None, "[red]a reason[/red] that is [no markup]")
    text = shown(found)
    assert "3 of 4" not in text and "2 of 4 trials" in text
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") > 4}
    assert "finished" in lines["a"] and "20/20" in lines["a"] and "0.500" in lines["a"]
    assert "running" in lines["b"] and "10/20" in lines["b"] and "0.250" in lines["b"]
    assert "failed" in lines["c"] and "[red]a reason[/red] that is [no markup]" in lines["c"]
    assert "waiting" in lines["d"]


def test_a_long_sweep_shows_what_runs_first(tmp_path: Path) -> None:
    names = [f"t{n:03d}" for n in range(60)]
    found = display(tmp_path, names, dict.fromkeys(names[:30], 0.5))
    found.started("t059")
    text = shown(found)
    assert "t059" in text and "and 36 more" in text
    assert sum(name in text for name in names) == SHOWN_ROWS


def test_a_trial_s_step_is_read_from_its_metrics(tmp_path: Path) -> None:
    found = display(tmp_path, ["a", "b"], {})
    with found:
        found.started("a")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / METRICS).write_text(json.dumps({"judge_pretrained_steps": 5}) + "\n")
        (tmp_path / "a" / METRICS).write_text(json.dumps({"step": 6}) + "\n" + '{"step": 7')  # a line in the making
        until(lambda: found.states["a"].step == 7, 20)
    assert found.states["a"].step == 7

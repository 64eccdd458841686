"""What a report says: curves, densities, votes, differing configs, runs that are not complete."""

from __future__ import annotations

import base64
import gzip
import html.parser
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from qcrd_ray.errors import UserError
from qcrd_ray.models.discriminator import Discriminator
from qcrd_ray.rationales.schema import OBSERVATIONS
from qcrd_ray.reporting import charts
from qcrd_ray.reporting.curves import density, downsample, interval
from qcrd_ray.reporting.figures import figure, short
from qcrd_ray.reporting.questions import pack, question_rows
from qcrd_ray.reporting.report import differing, make_report, report_of
from qcrd_ray.reporting.run_record import open_run, read_run
from qcrd_ray.reporting.votes import agreement_rows, vote_confusion
from qcrd_ray.run_folder import JUDGE, RunFolder
from tests.reporting.observed import Observed
from tests.reporting.synthetic import HOSTILE, write_run
from tests.s3_server import s3_server

ROOT = Path(__file__).parents[2]


class _Page(html.parser.HTMLParser):
    """Elements, what would leave the page, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")
        ]

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.said).split())


def page_of(*runs: RunFolder) -> _Page:
    return _Page(report_of([read_run(run) for run in runs]))


def unpacked(data: str) -> dict[str, Any]:
    return json.loads(gzip.decompress(base64.b64decode(data)))


# Curves


def test_a_long_curve_keeps_its_extremes_and_its_end() -> None:
    generator = np.random.default_rng(0)
    y = generator.normal(size=10_007)
    y[3_000], y[7_001], y[5] = 50.0, -50.0, np.nan
    curve = downsample(np.arange(10_007.0), y, 240)
    assert curve is not None
    assert len(curve.x) == 240 and not curve.is_exact
    assert (curve.high.max(), curve.low.min()) == (50.0, -50.0)
    assert (curve.x[-1], curve.last[-1]) == (10_006, y[-1])
    assert np.all(curve.low <= curve.mean) and np.all(curve.mean <= curve.high)
    known = np.isfinite(y)
    sizes = np.diff(np.searchsorted(np.arange(10_007)[known], curve.x, "right"), prepend=0)
    assert np.isclose((curve.mean * sizes).sum(), y[known].sum())


def test_a_short_curve_stays_as_it_is() -> None:
    curve = downsample(np.arange(5.0), np.array([1.0, np.nan, 3.0, 2.0, np.inf]))
    assert curve is not None and curve.is_exact
    assert curve.x.tolist() == [0, 2, 3] and curve.mean.tolist() == [1, 3, 2]
    assert downsample(np.arange(2.0), np.full(2, np.nan)) is None


@pytest.mark.parametrize("scores", [[0.5], [0.0] * 9, [1.0, 1.0, 0.99], np.linspace(0, 1, 50)])
def test_a_density_integrates_to_one_over_the_scores_there_can_be(scores: Any) -> None:
    found = density(np.array(scores, dtype=float), points=4001)
    assert found is not None
    at, heights = found
    assert (at[0], at[-1]) == (0.0, 1.0)
    assert np.trapezoid(heights, at) == pytest.approx(1.0, abs=0.01)


def test_wilson_s_interval() -> None:
    assert interval(0.5, 100) == pytest.approx((0.404, 0.596), abs=0.001)
    low, high = interval(1.0, 10)
    assert low == pytest.approx(0.722, abs=0.001) and high == pytest.approx(1.0)


# A run


def test_a_run_s_page_has_every_part_and_leaves_for_nowhere(tmp_path: Path) -> None:
    run = write_run(tmp_path, "run", steps=300, overrides=("train.iteration_steps=50",))
    page = page_of(run)
    titles = ["Accuracy", "Losses", "Quality of rationales", "One question at several temperatures",
              "Throughput and stall", "The vote", "Questions", "Config"]  # fmt: skip
    assert [title for title in titles if title not in page.said] == []
    drawn = ["Loss", "Label", "Positive part", "Negative part", "Discriminator", "Scores of rationales",
             "Scores in training", "Active negatives", "Throughput", "Waiting for negatives"]  # fmt: skip
    assert [title for title in drawn if title not in page.said] == []
    assert page.tags.count("svg") == len(drawn) + 1
    assert page.links == []
    record = read_run(run)
    best = max((e for e in record.evaluations if e["step"]), key=lambda e: (e["accuracy"], -e["step"]))
    assert record.best == best and f"best: {best['accuracy']:.3f}" in page.words
    assert record.missing == [] and "What is not here" not in page.words
    assert "The teacher is simulated." in page.words
    # Figure 5 is there without JavaScript too.
    students = [row for row in record.observed if row["kind"] == "student"]
    of = {row["id"]: [r["rationale"] for r in students if r["id"] == row["id"]] for row in students}
    assert any(all(text in page.words for text in texts) for texts in of.values())


def test_scores_are_grouped_as_in_the_paper_s_figure_6(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path))
    groups, split = charts.score_groups(record)
    assert [group.name for group in groups] == [
        "teacher, positive", "teacher, negative", "student, temperature 1.5", "student, temperature 2",
    ]  # fmt: skip
    assert split == "train"  # the teacher has no samples of held-out questions here, and the page says so
    assert "there are none of its samples for held-out ones" in page_of(RunFolder(str(tmp_path), "run")).words
    scores = [row["score"] for row in record.observed if row["kind"] == "student" and row["temperature"] == 1.5]
    assert groups[2].scores.tolist() == scores
    record.observed += [{**row, "split": "valid"} for row in record.observed if row["kind"] == "positive"][:4]
    groups, split = charts.score_groups(record)
    assert split == "valid" and len(groups[0].scores) == 4


def test_the_vote_against_gold_and_the_first_sample(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path, questions=200))
    rows = agreement_rows(record)
    assert [row.agreement for row in rows] == [1.0, 0.8, 0.6]
    assert sum(row.right + row.wrong for row in rows) == 200
    right = sum(row["votes_gold"] for row in record.train)
    assert sum(row.right for row in rows) == right
    confusion = vote_confusion(record)
    assert confusion is not None and confusion.questions == 200
    assert confusion.first_and_vote == {(True, True): right, (False, False): 200 - right}
    assert confusion.labels == ["0", "1", "2", "3"]
    assert sum(confusion.matrix[place][place] for place in range(4)) == right
    record.samples = {row["id"]: list(reversed(record.samples[row["id"]])) for row in record.train}  # order is theirs
    assert vote_confusion(record) == confusion


def test_the_packed_table_holds_texts_scores_and_verdicts(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path, questions=30, held_out=12, overrides=("train.iteration_steps=10",)))
    rows = question_rows([record])
    table = unpacked(pack([record], rows).data)
    assert len(table["rows"]) == 42 and pack([record], rows).note is None
    by_id = {row[1]: row for row in table["rows"]}
    first = record.train[0]
    _, _, question, values, items = by_id[first["id"]]
    assert table["texts"][question] == first["question"]
    positives = [table["texts"][text] for _, kind, _, text, _ in items if table["kinds"][kind] == "positive"]
    assert positives == first["positives"]
    shown = dict(zip([column["title"] for column in table["columns"]], values, strict=True))
    scores = [o["score"] for o in record.observed if o["id"] == first["id"] and o["kind"] == "positive"]
    assert shown["Score of positives"] == pytest.approx(np.mean(scores), abs=1e-3)
    assert shown["Agreement"] == pytest.approx(first["agreement"])
    assert any(table["kinds"][kind] == "sampled negative" for _, kind, *_ in items)
    held_out = by_id["valid-0"]
    after = record.predictions["after"]["valid-0"]
    assert dict(zip([c["title"] for c in table["columns"]], held_out[3], strict=True))["Prediction right"] == after[1]


def test_a_table_that_would_be_large_is_cut_and_says_so(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path, questions=30, hostile=True))
    record.train[1]["positives"] = ["".join(map(chr, np.random.default_rng(0).integers(33, 126, 50_000)))]
    rows = question_rows([record])
    cut = pack([record], rows, most_bytes=30_000)
    assert len(cut.data) <= 30_000 and cut.note is not None and "no text beyond" in cut.note
    assert max(map(len, unpacked(cut.data)["texts"])) < 4_010
    few = pack([record], rows, most_bytes=4_000)
    assert few.rows < len(rows) and few.note is not None and f"{few.rows} of {len(rows)} questions" in few.note


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path, hostile=True, overrides=("custom.template=<script>{question}</script>",))
    text = report_of([read_run(run)])
    page = _Page(text)
    assert page.tags.count("script") == 2 and page.tags.count("img") == 0
    assert page.tags.count("style") == text.count("<style")
    assert "<script>document.title" not in text and "&lt;script&gt;" in text
    [packed] = [data for data in page.said if data.startswith("H4sI")]
    assert set(HOSTILE) <= set(unpacked(packed)["texts"])


# Runs that are not complete, or of other kinds


def test_a_run_under_way_says_what_is_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=40, overrides=("train.iteration_steps=10",))
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "observations" / "rationales.parquet").unlink()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    page = page_of(run)
    assert "The run is not complete: 40 of 40 steps so far, no result.json." in page.words
    assert "No rationales at several temperatures and no scores: no observations/rationales.parquet" in page.words
    assert "Losses" in page.said and "Questions" in page.said
    assert "of 320 negatives" in page.words and "iterations of lag" in page.words and "stall: 0.4 s" in page.words


def test_before_and_after_of_a_run_under_way_are_of_one_split(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (tmp_path / "run" / "result.json").unlink()
    file = tmp_path / "run" / "evaluations" / "summary.json"
    one = json.loads(file.read_text())[0]
    found = [("test", 0, 0.3), ("valid", 0, 0.1), ("valid", 20, 0.2)]
    file.write_text(json.dumps([{**one, "split": s, "step": n, "accuracy": a, "n": 50} for s, n, a in found]))
    words = page_of(run).words
    assert "20.0 % accuracy on 50 of valid" in words and "10.0 % before training" in words


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for name in ("metrics.jsonl", "result.json", "evaluations", "observations", "negatives", "data"):
        run.remove(name)
    page = page_of(run)
    for sentence in ("No step is trained yet", "No evaluation yet", "No table of training questions yet"):
        assert sentence in page.words
    assert page.tags.count("svg") == 0 and "Config" in page.said


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for name in ("result.json", "evaluations/summary.json", "evaluations/valid-000001.jsonl"):
        (tmp_path / "run" / name).write_text("{ no")
    (tmp_path / "run" / "observations" / "rationales.parquet").write_bytes(b"PAR1 no")
    page = page_of(run)
    assert "observations/rationales.parquet is damaged" in page.words
    assert "result.json is damaged." in page.words and "evaluations/summary.json is damaged." in page.words
    assert "Losses" in page.said


def test_damaged_bytes_of_a_table_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    folder = run.root
    assert folder is not None
    generator = np.random.default_rng(0)
    damaged = [
        *sorted((folder / "negatives").iterdir()),
        folder / "observations" / "rationales.parquet",
        folder / "data" / "train.arrow",
        folder / "data" / "valid.arrow",
    ]
    for file in damaged:
        content = np.frombuffer(file.read_bytes(), np.uint8).copy()
        content[8 + generator.choice(len(content) - 16, len(content) // 20)] ^= 0xFF
        file.write_bytes(content.tobytes())
    words = page_of(run).words
    assert "observations/rationales.parquet is damaged" in words and "is damaged, and left out." in words
    assert "Losses" in words and "No sampled negatives yet" not in words
    (folder / "config.yaml").write_text("a: 2024-13-45\n")
    with pytest.raises(UserError, match="no valid YAML"):
        read_run(run)


def test_a_run_that_diverged_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=40)
    assert run.root is not None
    file = run.root / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        if row.get("step", 0) >= 20:
            row["loss"] = None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "The loss is no finite number at 20 of 40 steps, the first time at step 21" in page_of(run).words


def test_values_that_are_no_numbers_cost_a_report_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    folder = tmp_path / "run"
    file = folder / "observations" / "rationales.parquet"
    rows = pq.read_table(file).to_pylist()
    for row in rows:
        row["score"] = math.nan
    rows[-1]["temperature"] = math.nan
    pq.write_table(pa.Table.from_pylist(rows, schema=OBSERVATIONS), file)
    good = json.loads((folder / "evaluations" / "summary.json").read_text())
    bad = [{**good[0], "accuracy": math.nan}, {**good[0], "snapshot": "?"}, {**good[0], "split": ["valid"]}, None]
    (folder / "evaluations" / "summary.json").write_text(json.dumps([*bad, *good]))
    result = json.loads((folder / "result.json").read_text())
    result |= {"accuracy": {"after": "high"}, "negatives": [1], "seconds": "long", "train_tokens_per_second": None}
    (folder / "result.json").write_text(json.dumps(result))
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": "x", "loss": 1.0}\n{"step": 41, "loss": 1e308, "tokens": Infinity}\n')
        metrics.write(json.dumps({"step": 42, "loss": 10**400}) + "\n")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("max_steps: 40", "max_steps: some") + 'odd: "\\ud800"\n')
    (folder / "data" / "train.arrow").write_bytes(b"no table")
    record = read_run(run)
    assert record.evaluations == good and len(record.observed) == len(rows) - 1
    assert {"evaluations/summary.json is damaged: 4 left out.", "The run has no discriminator: no scores."} <= {
        *record.missing
    }
    page = page_of(run)
    assert "The table of training questions cannot be read" in page.words and "Losses" in page.said
    assert f"{100 * good[-1]['accuracy']:.1f} % accuracy" in page.words


def test_a_run_without_a_discriminator_and_one_without_rationales(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, "dss", overrides=("method=dss",), judge=False))
    assert "The run has no discriminator: no scores." in page.words
    assert "One question at several temperatures" in page.said
    run = write_run(tmp_path, "finetune", overrides=("method=finetune", "evaluation.observed=0"))
    run.remove("observations")
    assert "no scores: a student that finetune trains writes no rationales" in page_of(run).words
    run = write_run(tmp_path, "unobserved", overrides=("evaluation.observed=0",))
    run.remove("observations")
    assert "no scores: evaluation.observed is 0" in page_of(run).words


def test_a_part_that_a_method_has_not_is_no_curve_at_zero(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    file = tmp_path / "run" / "metrics.jsonl"
    assert {"Positive part", "Negative part"} <= {
        drawing.title for drawing in charts.over_steps([read_run(run)], charts.LOSSES)
    }
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "loss_positive": 0.0, "loss_negative": 0.0}) + "\n" for row in rows))
    titles = {drawing.title for drawing in charts.over_steps([read_run(run)], charts.LOSSES)}
    assert "Label" in titles and not titles & {"Positive part", "Negative part"}


def test_a_config_of_another_version_is_shown_as_it_was_written(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text() + "from_the_future: {key: 7}\n")
    page = page_of(run)
    assert "This version does not read the run's config" in page.words
    assert "from_the_future.key" in page.said


@pytest.mark.slow
def test_a_run_ends_with_its_observations_and_its_report(observed: Observed) -> None:
    run = RunFolder(str(observed.base), observed.folder.name)
    record = read_run(run)
    assert record.missing == []
    ids = [row["id"] for row in record.held_out]
    students = [row for row in record.observed if row["kind"] == "student"]
    for temperature in (0.0, 0.7, 1.5, 2.0):
        of = {row["id"]: row["rationale"] for row in students if row["temperature"] == pytest.approx(temperature)}
        assert list(of) == ids
        if temperature == 0.0:  # the same student as in the result's examples
            assert {e["id"]: e["rationale"] for e in observed.result["examples"]}.items() <= of.items()
    teachers = {(row["split"], row["kind"]) for row in record.observed} - {(record.split, "student")}
    both = ("positive", "negative")
    assert teachers == {(split, kind) for split in ("train", record.split) for kind in both}
    scored = [row for row in record.observed if row["rationale"]]
    judge = Discriminator.load(run.get_folder(JUDGE))
    some = scored[:: len(scored) // 10]
    scores = judge.score([row["question"] for row in some], [row["rationale"] for row in some]).tolist()
    assert [row["score"] for row in some] == pytest.approx(scores, abs=1e-5)
    page = _Page(run.read("report.html").decode())
    assert "Scores of rationales" in page.said and f"The teacher's are of questions of {record.split}." in page.words


# Comparisons


def test_a_comparison_shows_what_differs_and_nothing_else(tmp_path: Path) -> None:
    first = write_run(tmp_path, "first")
    overrides = ("optim.lr=1e-3", "method=dss", "sampler.actors=2", "train.iteration_steps=20")
    second = write_run(tmp_path, "second", overrides=overrides, judge=False)
    records = [read_run(run) for run in (first, second)]
    assert {row.key: row.values for row in differing(records)} == {
        "method": ("qcrd", "dss"),
        "optim.lr": ("5e-05", "0.001"),
        "train.iteration_steps": ("100", "20"),
        "sampler.actors": ("1", "2"),
        "run.name": ("first", "second"),
    }
    page = page_of(first, second)
    words = page.words
    assert "What differs in the config" in words and "What decides only where and how fast a run goes (2)" in words
    assert page.tags.count("svg") == 11  # those of one run: only one has scores, all others are shared
    right = [{id_: right for id_, (_, right) in record.predictions["after"].items()} for record in records]
    found = [(right[0][id_], right[1][id_]) for id_ in right[0]]
    counts = [found.count(both) for both in ((True, True), (True, False), (False, True), (False, False))]
    assert sum(counts) == 12 and f"first and second {' '.join(map(str, counts))} " in words
    table = unpacked(next(data for data in page.said if data.startswith("H4sI")))
    assert [column["title"] for column in table["columns"]] == ["Label", "Right: first", "Right: second", "Agreement"]


def test_a_comparison_has_labels_and_agreement_of_each_run_where_they_differ(tmp_path: Path) -> None:
    records = [read_run(write_run(tmp_path, name)) for name in ("first", "second")]
    row = records[1].train[3]
    row |= {"label": "another", "agreement": 0.25}
    table = unpacked(pack(records, question_rows(records)).data)
    titles = [column["title"] for column in table["columns"]]
    assert titles == [
        "Label: first", "Label: second", "Right: first", "Right: second", "Agreement: first", "Agreement: second"
    ]  # fmt: skip
    shown = dict(zip(titles, next(found[3] for found in table["rows"] if found[1] == row["id"]), strict=True))
    mine = records[0].train[3]
    assert (shown["Label: first"], shown["Label: second"]) == (mine["label"], "another")
    assert (shown["Agreement: first"], shown["Agreement: second"]) == (pytest.approx(mine["agreement"]), 0.25)


def test_two_runs_are_compared_on_all_that_both_predicted(tmp_path: Path) -> None:
    records = [read_run(write_run(tmp_path, name)) for name in ("first", "second")]
    for record in records:
        record.held_out = record.held_out[:5]  # of more than are shown
    page = _Page(report_of(records))
    right = [{id_: right for id_, (_, right) in record.predictions["after"].items()} for record in records]
    found = [(right[0][id_], right[1][id_]) for id_ in right[0]]
    counts = [found.count(both) for both in ((True, True), (True, False), (False, True), (False, False))]
    assert sum(counts) == 12 and f"first and second {' '.join(map(str, counts))} " in page.words
    records[1].held_out[0]["question"] = "Another one of the same id"
    right_of_four = _Page(report_of(records)).words
    assert f"first and second {' '.join(map(str, counts))} " not in right_of_four


def test_names_that_differ_at_their_ends_are_told_apart_in_a_legend() -> None:
    names = ("chain_sum-qcrd-embedded-smollm2-135m-57109e", "chain_sum-qcrd-embedded-smollm2-135m-b8ec7d")
    first, second = (short(name, 30) for name in names)
    assert first != second and len(first) == len(second) == 30
    assert first.endswith("57109e") and first.startswith("chain_sum")
    with figure() as (_, plot, made):
        plot.plot([0, 1], label=short("_hidden"))
        plot.legend()
    assert "_hidden" in made[0]


def test_a_comparison_says_where_accuracies_are_of_different_questions(tmp_path: Path) -> None:
    first, second = write_run(tmp_path, "first"), write_run(tmp_path, "second")
    assert "scored on different questions" not in page_of(first, second).words
    result = json.loads((second.root / "result.json").read_text())
    result["accuracy"]["split"] = "elsewhere"
    (second.root / "result.json").write_text(json.dumps(result))
    words = page_of(first, second).words
    assert "scored on different questions" in words and ", elsewhere" in words
    assert "their accuracies do not compare" in words
    result["accuracy"] |= {"split": "valid", "n": 6}
    (second.root / "result.json").write_text(json.dumps(result))
    assert "12, 6 questions" in page_of(first, second).words
    result["accuracy"]["n"] = 12
    (second.root / "result.json").write_text(json.dumps(result))
    predictions = second.root / "evaluations" / "valid-000001.jsonl"
    predictions.write_text(predictions.read_text().replace("valid-3", "another"))
    assert "their ids differ" in page_of(first, second).words
    config = (second.root / "config.yaml").read_text()
    task = yaml.safe_load(config)["task"]
    (second.root / "config.yaml").write_text(config.replace(f"task: {task}", "task: anli1"))
    assert f"tasks {task}, anli1" in page_of(first, second).words


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    places = [tmp_path / place for place in ("a", "b", "c/trials", "d/trials")]
    for place in places:
        write_run(place)
    result = make_report([str(place / "run") for place in places], tmp_path / "all.html")
    said = _Page((tmp_path / "all.html").read_text()).said
    assert {"a/run", "b/run", "c/trials/run", "d/trials/run"} <= {*said}
    assert result["report"] == str(tmp_path / "all.html")


# The job


def report(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "report.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_the_job_writes_beside_the_run_or_where_it_is_told(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path, name)
    done = report("one", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["report"] == str(tmp_path / "one" / "report.html")
    assert result["bytes"] == (tmp_path / "one" / "report.html").stat().st_size
    both = report("one", "two/", folder=tmp_path)
    assert both.returncode == 0, both.stderr
    assert (tmp_path / "comparison.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: RUN"),
        (["missing"], "no such folder; expected one that jobs/train.py wrote"),
        (["."], "no config.yaml in it"),
        (["run", "./run"], "is given 2 times"),
        (["run", "--output", "nowhere/x.html"], "lies in a folder that is not there"),
        (["s3://bucket"], "expected a run's folder"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], expected: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    done = report(*arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_sweep_s_folder_is_told_from_a_run_s(tmp_path: Path) -> None:
    (tmp_path / "sweep" / "trials").mkdir(parents=True)
    with pytest.raises(UserError, match="it holds trials: give one of them"):
        open_run(str(tmp_path / "sweep"))


@pytest.mark.slow
def test_a_run_on_another_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCRD_CACHE", str(tmp_path / "cache"))
    with s3_server("bucket") as server:
        run = write_run(server.uri("bucket/runs"), steps=20, questions=10)
        result = make_report([server.uri("bucket/runs/run")])
        assert result["missing"] == {} and result["report"] == "s3://bucket/runs/run/report.html"
        page = _Page(run.read("report.html").decode())
    assert "One question at several temperatures" in page.said and "The vote" in page.said
    assert not (tmp_path / "cache" / "runs" / "run").exists()

"""The report in a real Chromium: nothing goes wrong, the search works, and hostile text stays text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qcrd_ray.reporting.report import make_report
from tests.reporting.browser import Page, browser_page, find_browser
from tests.reporting.synthetic import HOSTILE, write_run

BROWSER = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium, or put one on the PATH"),
]
LARGEST_BYTES = 10_000_000


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports by name: of a run, of one with hostile texts, of both."""
    folder = tmp_path_factory.mktemp("runs")
    plain = write_run(folder, "plain", steps=60, overrides=("train.iteration_steps=10",))
    hostile = write_run(
        folder, "hostile", hostile=True, seed=1, overrides=("optim.lr=1e-3", "train.iteration_steps=10")
    )
    for run in (plain, hostile):
        make_report([str(run)])
    make_report([str(plain), str(hostile)], folder / "comparison.html")
    return {
        "run": folder / "plain" / "report.html",
        "hostile": folder / "hostile" / "report.html",
        "comparison": folder / "comparison.html",
    }


@pytest.fixture
def page() -> Iterator[Page]:
    assert BROWSER is not None
    with browser_page(BROWSER) as opened:
        yield opened


def shown(page: Page) -> list[str]:
    """Ids of the questions on the page of the table."""
    return page.run("[...document.querySelectorAll('.id')].map((id) => id.textContent)")


def search(page: Page, text: str) -> str:
    """What the page says that it has found."""
    page.run(
        f"(() => {{ const box = document.getElementById('search'); box.value = {text!r}; window.searched = false;"
        "box.dispatchEvent(new Event('input')); setTimeout(() => { window.searched = true; }, 200); })()"
    )
    page.until("window.searched")  # the page waits a moment for more to be typed
    found: str = page.run("document.getElementById('found').textContent")
    return found


def test_no_report_says_an_error_or_asks_for_anything(page: Page, reports: dict[str, Path]) -> None:
    for report in reports.values():
        page.open(report)
        assert page.errors == []
        assert page.requests == [report.as_uri()]
        for width in (390, 1200):
            page.resize(width, 844, phone=width < 500)
            assert page.run("document.documentElement.scrollWidth <= window.innerWidth"), f"{report} at {width}"
        page.call("Emulation.clearDeviceMetricsOverride")


def test_the_table_is_searched_sorted_and_turned_over(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["run"])
    assert len(shown(page)) == 25
    assert page.run("document.getElementById('found').textContent") == "1 to 25 of 42 questions"
    page.run("document.getElementById('next').click()")
    assert len(shown(page)) == 17
    assert search(page, "train-7") == "1 to 1 of 1 questions"
    assert shown(page) == ["train train-7"]
    page.run("document.querySelector('.more').click()")
    texts = page.run("[...document.querySelectorAll('.item .model')].map((text) => text.textContent)")
    assert len(texts) >= 5 and all(texts)
    not_open = " ".join(texts[1].split()[:4])
    assert search(page, f"{not_open} train-7") == "1 to 1 of 1 questions"
    assert search(page, "there is no such text") == "0 questions"
    assert shown(page) == []
    assert search(page, "") == "1 to 25 of 42 questions"

    def sort(title: str) -> list[str]:
        page.run(f"[...document.querySelectorAll('.sort')].find((b) => b.textContent === {title!r}).click()")
        return page.run(
            "(() => { const heads = [...document.querySelectorAll('#heads th')];"
            "const place = heads.findIndex((head) => head.ariaSort !== 'none');"
            "return [...document.querySelectorAll('.question')].map((row) => row.children[place].textContent); })()"
        )

    descending = [float(value) for value in sort("Agreement")]
    assert descending == sorted(descending, reverse=True) and len(set(descending)) > 1
    ascending = [value for value in sort("Agreement") if value != "–"]
    assert [float(value) for value in ascending] == sorted(map(float, ascending))
    assert sort("Prediction right")[0] == "✓ yes"
    labels = sort("Label")
    assert labels == sorted(labels, key=int)
    page.run("document.querySelector('.more').click()")
    assert page.run("document.activeElement.ariaExpanded") == "true"  # whoever opens a row by the keyboard stays there
    page.run(
        "(() => { const choice = document.getElementById('split'); choice.value = 'valid';"
        "choice.dispatchEvent(new Event('change')); })()"
    )
    assert all(name.startswith("valid ") for name in shown(page)) and len(shown(page)) == 12


def test_another_question_s_rationales_are_shown(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["comparison"])
    before = page.run("document.getElementById('case-rows').textContent")
    temperatures = page.run("[...document.querySelectorAll('#case-rows th')].map((t) => t.textContent)")
    assert temperatures == ["0 (greedy)", "0.7", "1.5", "2"]
    page.run(
        "(() => { const choice = document.getElementById('case'); choice.selectedIndex = choice.selectedIndex ? 0 : 1;"
        "choice.dispatchEvent(new Event('change')); })()"
    )
    assert page.run("document.getElementById('case-rows').textContent") != before
    assert page.run("[...document.querySelectorAll('#case-rows th')].map((t) => t.textContent)") == temperatures


def test_hostile_text_stays_text(page: Page, reports: dict[str, Path]) -> None:
    for name in ("hostile", "comparison"):
        page.open(reports[name])
        found = page.run("document.getElementById('found').textContent")
        assert search(page, HOSTILE[0].split()[0]) != found and shown(page)
        assert search(page, "") == found
        page.run("document.querySelectorAll('.more').forEach((_, i) => document.querySelectorAll('.more')[i].click())")
        page.run("document.querySelectorAll('.all').forEach((button) => button.click())")
        texts = page.run("[...document.querySelectorAll('.model')].map((text) => text.textContent)")
        for text in HOSTILE:
            assert text in texts, f"{text[:40]!r} in {name}"
        assert (
            page.run("document.querySelectorAll('#rows script, #rows img, #rows style, #case-rows script').length") == 0
        )
        assert page.run("window.hacked === undefined && document.title !== 'hacked'")
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth")
        # What is written from right to left ends with its own text.
        directions = page.run("[...document.querySelectorAll('.model')].map((t) => getComputedStyle(t).unicodeBidi)")
        assert set(directions) <= {"isolate", "plaintext"} and directions
        assert page.errors == []


def test_a_script_that_is_not_the_report_s_own_does_not_run(
    page: Page, reports: dict[str, Path], tmp_path: Path
) -> None:
    text = reports["run"].read_text()
    assert "</h1>" in text
    injected = tmp_path / "injected.html"
    injected.write_text(text.replace("</h1>", "</h1><script>window.hacked = 1</script><img src=https://example.org/x>"))
    page.open(injected)
    assert page.run("window.hacked === undefined")
    page.until("performance.now() > 1000")  # what would be fetched has been by then
    assert page.requests == [injected.as_uri()]
    assert len([error for error in page.errors if "Content Security Policy" in error]) == 2


def test_light_dark_and_print_have_colours_of_their_own(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["run"])
    colours = {}
    for name, media, scheme in (("light", "", "light"), ("dark", "", "dark"), ("print", "print", "dark")):
        page.call(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        colours[name] = page.run("getComputedStyle(document.body).backgroundColor")
    assert colours["light"] == colours["print"] == "rgb(255, 255, 255)"
    assert colours["dark"] == "rgb(20, 23, 26)"
    printed = page.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"]
    assert printed.startswith("JVBER")  # %PDF
    page.resize(718, 1000)  # a page of A4 within its margins
    for report in (reports["run"], reports["comparison"]):
        page.open(report)
        wide = page.run(
            "[...document.querySelectorAll('table')].filter((t) => t.getBoundingClientRect().right > 718)"
            ".map((t) => t.className + t.getBoundingClientRect().right)"
        )
        assert wide == []
        assert page.run("document.querySelector('details table').getBoundingClientRect().height > 0")


def test_a_run_of_ten_thousand_steps_and_questions_is_small(page: Page, tmp_path: Path) -> None:
    run = write_run(tmp_path, "large", steps=10_000, questions=10_000, held_out=1_000)
    size = make_report([str(run)])["bytes"]
    assert size < LARGEST_BYTES
    seconds = page.open(tmp_path / "large" / "report.html")
    print(f"{size:,} bytes, open after {seconds:.2f} s")
    assert page.run("document.getElementById('found').textContent") == "1 to 25 of 11,000 questions"
    assert search(page, "train-9999") == "1 to 1 of 1 questions"
    assert page.errors == []

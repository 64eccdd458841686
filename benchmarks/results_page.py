"""Write the tables of `docs/results.md` from the files in `docs/results/`: those of `accuracy.py`, `paper_tables.py`.

    python benchmarks/results_page.py [--check]

In the page a table stands between `<!-- NAME -->` and `<!-- end -->`, NAME the file without its ending. `--check`
writes nothing, and ends with 1 where the page says anything else than the files.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import accuracy
import paper_tables

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, RESULTS = DOCS / "results.md", DOCS / "results"
TABLE = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def table(name: str) -> str:
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    lines = list((accuracy if "pairs" in found else paper_tables).lines_of(found))
    seconds = sum(row["seconds"] for row in found["trials"])
    command = f"    {found['command']}\n\n{len(found['trials'])} runs, {seconds / 60:.0f} minutes of runs.\n"
    return "\n".join([f"<!-- {name} -->", command, *lines, "<!-- end -->"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = TABLE.sub(lambda match: table(match.group(1)), before)
    shown = set(TABLE.findall(before))
    missing = sorted({file.stem for file in RESULTS.glob("*.json")} - shown)
    if missing:
        print(f"error: {PAGE.name} has no table for {', '.join(missing)}", file=sys.stderr)
        return 1
    if arguments.check and after != before:
        print(f"error: {PAGE.name} is not what the files say; run python benchmarks/results_page.py", file=sys.stderr)
        return 1
    if not arguments.check:
        PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes the figures of a full run into docs/reliability.md:

LLM_ORM_MATRIX_REPORT=figures.json pytest -m matrix && python -m matrix.report figures.json docs/reliability.md
"""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
HEADS = {
    "crashes": "| turn | database | points | crashes | violations |",
    "faults": "| turn | database | points | faults | violations |",
}


def read(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The figures of each scenario on each database, the last where it was run more than once."""
    last = {}
    for line in lines:
        figures = json.loads(line)
        last[figures["matrix"], figures["scenario"], figures["database"]] = figures
    return list(last.values())


def tables(figures: list[dict[str, Any]]) -> str:
    """What stands between the marks: a sentence with the sums, and a table for each matrix."""
    parts = []
    for matrix, head in HEADS.items():
        ours = sorted(
            (each for each in figures if each["matrix"] == matrix),
            key=lambda each: (each["scenario"], each["database"]),
        )
        points, runs, violations = (sum(each[name] for each in ours) for name in ("points", "runs", "violations"))
        rows = [f"| {' | '.join(str(each[name]) for name in COLUMNS)} |" for each in ours]
        line = "|---|---|---|---|---|"
        parts.append(f"{points} points, {runs} {matrix}, {violations} violations.\n\n" + "\n".join([head, line, *rows]))
    return "\n\n".join(parts)


COLUMNS = ("scenario", "database", "points", "runs", "violations")


def put(page: str, text: str) -> str:
    """The page with the tables in it; raises `ValueError` where it has no place for them."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs {BEGIN} and {END}, each once")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def sums(page: str) -> dict[str, tuple[int, int, int]]:
    """{"crashes": (points, crashes, violations), "faults": …}, added up from the tables of a page; raises `ValueError`
    where its sentences say something else."""
    text = page.split(BEGIN)[1].split(END)[0]
    found = {}
    for matrix, head in HEADS.items():
        said = re.search(rf"^(\d+) points, (\d+) {matrix}, (\d+) violations\.$", text, re.M)
        table = text.partition(head)[2].split("\n\n")[0]
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:] if row]
        added = tuple(sum(int(row[column]) for row in cells) for column in (2, 3, 4))
        if said is None or not cells or added != tuple(map(int, said.groups())):
            raise ValueError(f"{matrix}: the page says {said and said[0]!r}, and its table adds up to {added}")
        found[matrix] = added
    return found


def main(figures: str, page: str) -> None:
    path = Path(page)
    with open(figures) as lines:
        path.write_text(put(path.read_text(), tables(read(lines))))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The figures in docs/reliability.md are those of a full run, and say that nothing was lost."""

import json
from pathlib import Path

import pytest

from matrix.report import BEGIN, END, main, sums

PAGE = Path(__file__).parent.parent.parent / "docs" / "reliability.md"
FIGURES = [
    {"matrix": "crashes", "scenario": "plain", "database": "sqlite", "points": 2, "runs": 9, "violations": 1},
    {"matrix": "crashes", "scenario": "plain", "database": "sqlite", "points": 26, "runs": 78, "violations": 0},
    {"matrix": "crashes", "scenario": "plain", "database": "postgresql", "points": 10, "runs": 30, "violations": 0},
    {"matrix": "faults", "scenario": "watched", "database": "sqlite", "points": 5, "runs": 7, "violations": 0},
]


def test_the_page_says_what_the_last_run_of_each_turn_found(tmp_path):
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe rest.\n")
    figures.write_text("".join(json.dumps(each) + "\n" for each in FIGURES))
    main(str(figures), str(page))
    assert sums(page.read_text()) == {"crashes": (36, 108, 0), "faults": (5, 7, 0)}
    assert page.read_text().startswith("# Title\n\n" + BEGIN)
    assert page.read_text().endswith(END + "\n\nThe rest.\n")
    with pytest.raises(ValueError, match="adds up to"):
        sums(page.read_text().replace("| 78 |", "| 79 |"))


def test_the_full_run_on_the_page_found_no_violation():
    for points, runs, violations in sums(PAGE.read_text()).values():
        assert points > 100
        assert runs > 1000
        assert violations == 0

"""A process that is killed at any point of a turn loses nothing, and whoever comes next goes on from the rows alone.

At each yield of the turn, before and after each SQL statement, at each chunk of a stream, in the model's call and in
its tools: see `points`. What must be true afterwards, of the rows and of the provider's and the tools' own books: see
`invariants`. Every point is tried by `pytest -m matrix`, some of them always.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest

from matrix.harness import SEED, Place, Report, crashes, sample
from matrix.scenarios import ALL, Scenario

Record = Callable[[str, Any], None]


def told(record_property: Record, reports: list[Report], seed: int | None = None) -> None:
    """Say what was tried; no violation was found."""
    for report in reports:
        figures = {"matrix": report.matrix, "points": report.points, "runs": report.runs}
        record_property("matrix", {**figures, "violations": len(report.violations), "seed": seed})
        print(report.written() if seed is None else report)
    found = [str(violation) for report in reports for violation in report.violations]
    assert not found, "\n".join(found)


def test_a_process_that_dies_at_some_point_loses_nothing(place: Place, record_property: Record):
    chosen = random.Random(f"{SEED} {place.name}").sample(ALL, 5)
    told(record_property, [crashes(place, scenario, sample(SEED, 3)) for scenario in chosen], SEED)


@pytest.mark.matrix
@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_a_process_that_dies_at_any_point_loses_nothing(place: Place, scenario: Scenario, record_property: Record):
    told(record_property, [crashes(place, scenario)])

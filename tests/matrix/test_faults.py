"""Whatever goes wrong at any point of a turn, nothing is lost, and the caller is told.

The database refuses or is gone, the provider fails in the middle of a stream, tools and hooks raise, a signal comes, a
task is cancelled, a stream is dropped: see `faults`. Every point is tried by `pytest -m matrix`, some of them always.
"""

import random

import pytest

from matrix.harness import SEED, Place, faults, sample
from matrix.scenarios import BY_NAME, Scenario
from matrix.test_crashes import Record, told

SCENARIOS = [
    BY_NAME[name]
    for name in (
        "plain",
        "streamed",
        "asyncio, streamed",
        "two rounds",
        "two rounds, asyncio",
        "tools side by side",
        "parking",
        "approved",
        "fallback",
        "kept, streamed",
        "watched",
        "with a key, two rounds",
        "saved, streamed",
        "retried, kept",
    )
]


def test_what_goes_wrong_at_some_point_loses_nothing(place: Place, record_property: Record):
    chosen = random.Random(f"{SEED} {place.name}").sample(SCENARIOS, 4)
    told(record_property, [faults(place, scenario, sample(SEED, 4)) for scenario in chosen], SEED)


@pytest.mark.matrix
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_what_goes_wrong_at_any_point_loses_nothing(place: Place, scenario: Scenario, record_property: Record):
    told(record_property, [faults(place, scenario)])

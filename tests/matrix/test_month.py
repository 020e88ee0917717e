"""A month with thousands of requests: every surface says what was billed, to the cent, on both databases."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from conftest import Schema
from provider import Provider
from test_month import SURFACES, Spent, Surface, as_billed, check, facts, spend

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def months(
    real_litellm: None, tmp_path_factory: pytest.TempPathFactory, postgres_schema: Schema
) -> Iterator[dict[str, Spent]]:
    with Provider() as provider, ExitStack() as stack:
        yield spend(stack, tmp_path_factory.mktemp("month"), postgres_schema, 2_200, provider)


def test_each_request_of_thousands_is_as_it_was_billed(months: dict[str, Spent]):
    rows = {name: as_billed(month) for name, month in months.items()}
    assert rows["sqlite"] == rows["postgresql"]
    for name, month in months.items():
        assert sorted(map(facts, month.ledger.calls), key=repr) == rows[name]
    assert len(rows["sqlite"]) >= 3_000


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.title)
def test_what_is_said_of_thousands_is_what_was_billed(months: dict[str, Spent], surface: Surface):
    check(months, surface)

"""The process that forks, and the two places where turns are broken off."""

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Schema

from matrix.harness import Place, PostgresPlace, SqlitePlace, Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


@pytest.fixture(scope="session")
def sqlite_place(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> SqlitePlace:
    return SqlitePlace(zygote, tmp_path_factory.mktemp("crashes"))


@pytest.fixture(scope="session")
def postgres_place(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, postgres_schema: Schema
) -> Iterator[PostgresPlace]:
    url = postgres_schema.empty()
    yield PostgresPlace(zygote, tmp_path_factory.mktemp("crashes"), url)
    postgres_schema.drop(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest) -> Place:
    return request.getfixturevalue({"sqlite": "sqlite_place", "postgresql": "postgres_place"}[request.param])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how much was tried, which no test that passes can."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    told = [value for report in reports for name, value in report.user_properties if name == "matrix"]
    for matrix in sorted({each["matrix"] for each in told}):
        ours = [each for each in told if each["matrix"] == matrix]
        points, runs, violations = (sum(each[name] for each in ours) for name in ("points", "runs", "violations"))
        seed = f", seed {ours[0]['seed']}" if ours[0]["seed"] is not None else ""
        terminalreporter.write_line(f"{points} points, {runs} {matrix}, {violations} violations{seed}")

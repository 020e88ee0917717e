"""The views say what `stats()` and `usage()` say, whatever becomes of the tables, and who reads them can rely on it."""

import json
import random
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import peewee as pw
import pytest

from llm_orm import Store, connect, create_chat, load_chat, search, usage
from llm_orm.records import money, uuid7
from llm_orm.sums import stats_of
from llm_orm_schema.compare import differences
from llm_orm_schema.ddl import ddl, dialect_of
from llm_orm_schema.migrate import applied, migrate

DOCS = Path(__file__).parents[2] / "docs"

VIEWS = ["usage_daily", "usage_hourly", "request_detail", "tool_usage_daily", "chat_cost"]

SUMS = (
    "requests failed_requests retried_requests input_tokens output_tokens cached_tokens cache_write_tokens "
    "thinking_tokens cost unpriced_requests"
).split()


def read(store: Store, query: str) -> list[dict[str, Any]]:
    with store.connection():
        cursor = store.database.execute_sql(query)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def run(store: Store, *statements: str) -> None:
    with store.connection():
        for statement in statements:
            store.database.execute_sql(statement)


def traffic(store: Store) -> Store:
    """Three days of requests and tool calls of four chats, one of which was deleted since."""
    dice = random.Random(42)
    records = store.records
    chats = [create_chat(store, model="m") for _ in range(4)]
    requests, calls = [], []
    for number in range(300):
        chat, turn = dice.choice(chats), uuid7()
        at = datetime(2026, 11, 1, tzinfo=UTC) + timedelta(seconds=dice.randrange(3 * 86400))
        failed = dice.random() < 0.1
        requests.append(
            {
                "chat": chat.id,
                "turn_id": turn,
                "provider": dice.choice(["openai", "anthropic"]),
                "model": dice.choice(["gpt", "claude"]),
                "attempt": dice.choice([1, 1, 1, 2]),
                "status_code": 500 if failed else 200,
                "error": "ServerError" if failed else None,
                "duration_ms": dice.randrange(5000),
                "input_tokens": 2_000_000_000 if number == 7 else dice.randrange(5000),
                "output_tokens": 2_000_000_000 if number == 7 else dice.randrange(500),
                "cached_tokens": dice.randrange(100),
                "cache_write_tokens": dice.randrange(10),
                "thinking_tokens": dice.randrange(50),
                "cost": None if dice.random() < 0.2 else Decimal(dice.randrange(10**13)).scaleb(-12),
                "created_at": at,
            }
        )
        calls.append(
            {
                "chat": chat.id,
                "turn_id": turn,
                "round": 0,
                "position": 0,
                "tool_call_id": f"c_{number}",
                "name": dice.choice(["look", "pay"]),
                "arguments": "{}",
                "status": dice.choice(["completed", "failed", "rejected"]),
                "duration_ms": dice.choice([None, dice.randrange(100)]),
                "created_at": at,
            }
        )
    with store.connection():
        records.agent_session.create(chat=chats[0].id, agent_class="Clerk")
        records.tool_call.insert_many(calls).execute()
        records.request.insert_many(requests).execute()
    chats[3].delete()
    return store


def as_day(value: Any) -> date:
    return date.fromisoformat(value) if isinstance(value, str) else value


def as_time(value: Any) -> datetime:
    return (datetime.fromisoformat(value) if isinstance(value, str) else value).astimezone(UTC)


def figures(row: Any) -> dict[str, Any]:
    return {name: money(row[name]) if name == "cost" else int(row[name]) for name in SUMS}


def test_the_totals_of_the_views_are_those_of_stats(store: Store):
    stats = stats_of(traffic(store))

    for view in ("usage_daily", "usage_hourly", "chat_cost"):
        rows = [figures(row) | {"duration_ms": row["duration_ms"]} for row in read(store, f"SELECT * FROM llm_{view}")]
        found = {name: sum(row[name] for row in rows) for name in rows[0]}
        assert found.pop("retried_requests") > 0
        assert found == {name: getattr(stats, name) for name in found}, view
        (row,) = read(store, f"SELECT SUM(cost) AS cost FROM llm_{view}")
        assert round(Decimal(row["cost"]), 2) == round(stats.cost, 2)

    counted = "SELECT COUNT(*) AS requests, SUM(cost) AS cost, SUM(total_tokens) AS tokens FROM llm_request_detail"
    (row,) = read(store, counted)
    assert (row["requests"], round(Decimal(row["cost"]), 2)) == (300, round(stats.cost, 2))
    assert row["tokens"] == stats.input_tokens + stats.output_tokens > 2**31


@pytest.mark.parametrize(("view", "period"), [("usage_daily", "day"), ("usage_hourly", "hour")])
def test_each_row_of_a_period_is_that_of_usage(store: Store, view: str, period: str):
    traffic(store)
    as_period = as_day if period == "day" else as_time

    found = {
        (as_period(row[period]), row["provider"], row["model"], row["source"]): (
            figures(row),
            row["duration_max_ms"],
        )
        for row in read(store, f"SELECT * FROM llm_{view}")
    }

    by = (period, "provider", "model", "source")
    said = {tuple(row[name] for name in by): row for row in usage(store, by=by) if row.requests}
    assert found == {key: (figures(row), row.duration_max_ms) for key, row in said.items()}
    assert len(found) > 10


def test_the_tools_of_a_day_are_those_of_usage(store: Store):
    traffic(store)

    found = {
        (as_day(row["day"]), row["name"]): (row["calls"], row["failed"], row["duration_max_ms"])
        for row in read(store, "SELECT * FROM llm_tool_usage_daily")
    }

    said = {(row.day, row.tool): row for row in usage(store, by=("day", "tool")) if row.tool_calls}
    assert found == {key: (row.tool_calls, row.tool_failures, row.duration_max_ms) for key, row in said.items()}
    assert all(type(row["duration_avg_ms"]) is float for row in read(store, "SELECT * FROM llm_tool_usage_daily"))


def test_each_chat_has_its_cost_and_those_that_were_deleted_have_one_together(store: Store):
    traffic(store)
    rows = {row["chat_id"]: row for row in read(store, "SELECT * FROM llm_chat_cost")}

    gone = rows.pop(None)
    assert len(rows) == 3
    for key, row in rows.items():
        chat = load_chat(store, key)
        assert chat is not None
        stats = chat.stats()
        assert (money(row["cost"]), row["requests"]) == (stats.cost, stats.requests)
        assert row["turns"] == stats.requests
        assert as_time(row["first_request_at"]) < as_time(row["last_request_at"])
    assert gone["requests"] == 300 - sum(row["requests"] for row in rows.values())


def test_a_request_says_what_it_was(store: Store):
    traffic(store)
    for row in read(store, "SELECT * FROM llm_request_detail"):
        assert row["is_failed"] == (row["error"] is not None)
        assert row["is_retry"] == (row["attempt"] > 1)
        assert row["is_unpriced"] == (row["cost"] is None)
    rows = read(store, "SELECT agent_class, COUNT(*) AS n FROM llm_request_detail GROUP BY 1")
    assert {row["agent_class"] for row in rows} == {"Clerk", None}


def test_without_a_row_the_views_are_empty(store: Store):
    assert [read(store, f"SELECT * FROM llm_{view}") for view in VIEWS] == [[]] * 5


def test_both_databases_have_the_same_columns(sqlite_url: str, postgres_url: str):
    columns = []
    for url in (sqlite_url, postgres_url):
        with connect(url) as store, store.connection():
            store.create_tables()
            cursors = [store.database.execute_sql(f"SELECT * FROM llm_{view}") for view in VIEWS]
            columns.append([[column[0] for column in cursor.description] for cursor in cursors])
    assert columns[0] == columns[1]


# As a part of the schema


@pytest.mark.parametrize(
    ("options", "stem"),
    [
        ({"table_prefix": "app_"}, "app_llm"),
        ({"table_names": {"request": "shop_request"}}, "shop"),
        ({"table_names": {"request": "calls"}}, "calls"),
        ({"table_names": {"request": "_request"}}, "_request"),
        ({"table_names": {"request": "ShopRequest", "message": "ShopMessage"}}, "ShopRequest"),
    ],
)
def test_the_names_of_the_views_follow_that_of_the_request_table(database_url: str, options: dict[str, Any], stem: str):
    with connect(database_url, **options) as store:
        migrate(store)
        assert [read(store, f'SELECT * FROM "{stem}_{view}"') for view in VIEWS] == [[]] * 5
        assert differences(store) == []
        create_chat(store, model="m").add_message("user", "apple")
        assert len(search(store, "apple")) == 1


def test_dropping_the_tables_of_one_store_leaves_the_views_of_another(database_url: str):
    with connect(database_url) as one, connect(one.database, table_prefix="app_") as two:
        one.create_tables()
        two.create_tables()
        one.drop_tables()

        assert read(two, "SELECT * FROM app_llm_usage_daily") == []
        assert differences(two) == []
        assert len(differences(one)) > 6


@pytest.fixture
def complete(database_url: str) -> Iterator[Store]:
    with connect(database_url, chat_fields={"user_id": pw.TextField(null=True)}) as store:
        migrate(store)
        yield store


def test_a_view_that_is_missing_or_otherwise_is_named_and_made_again(complete: Store):
    run(
        complete,
        "DROP VIEW llm_chat_cost",
        "DROP VIEW llm_usage_daily",
        "CREATE VIEW llm_usage_daily AS SELECT 1 AS day",
    )

    assert [(entry.kind, entry.name, entry.message) for entry in differences(complete)] == [
        ("wrong view", "llm_usage_daily", "view llm_usage_daily is not as it should be"),
        ("missing view", "llm_chat_cost", "view llm_chat_cost is missing"),
    ]
    run(complete, "DROP VIEW llm_usage_daily")
    complete.create_tables()
    assert differences(complete) == []


def test_what_search_needs_and_is_missing_is_named_and_made_again(sqlite_url: str):
    with connect(sqlite_url) as store:
        migrate(store)
        chat = create_chat(store, model="m")
        chat.add_message("user", "apple one")
        run(store, "DROP TRIGGER llm_message_search_insert")
        chat.add_message("user", "apple two")
        assert len(search(store, "apple")) == 1

        (difference,) = differences(store)
        assert (difference.kind, difference.table) == ("missing trigger", "llm_message")
        assert difference.message == "trigger llm_message_search_insert on llm_message is missing"
        store.create_tables()
        assert differences(store) == []
        assert len(search(store, "apple")) == 2

        run(store, "DROP TABLE llm_search", "DROP TABLE llm_search_row")
        assert [entry.kind for entry in differences(store)] == ["missing search table"] * 2
        store.create_tables()
        assert len(search(store, "apple")) == 2


def test_tables_without_their_views_are_recognised_and_given_them(database_url: str):
    with connect(database_url) as store:
        store.create_tables()
        create_chat(store, model="m").add_message("user", "apple")
        run(store, "DROP VIEW llm_chat_cost")

        assert migrate(store)[-1] == "0004_views_and_search"
        assert list(applied(store))[-1] == "0004_views_and_search"
        assert differences(store) == []
        assert len(search(store, "apple")) == 1


def test_the_application_adds_and_drops_its_columns_under_the_views(complete: Store):
    run(complete, "ALTER TABLE llm_request ADD COLUMN team TEXT", "ALTER TABLE llm_message ADD COLUMN stars INTEGER")
    run(complete, "ALTER TABLE llm_chat DROP COLUMN user_id", "ALTER TABLE llm_request DROP COLUMN team")
    run(complete, "ALTER TABLE llm_message DROP COLUMN stars")

    assert [read(complete, f"SELECT * FROM llm_{view}") for view in VIEWS] == [[]] * 5
    assert [entry.name for entry in differences(complete)] == ["user_id"]


def test_the_sql_of_init_makes_the_views_and_the_search(database_url: str):
    with connect(database_url) as store:
        run(store, *ddl(dialect_of(store.database)))
        assert differences(store) == []
        create_chat(store, model="m").add_message("user", "apple")
        assert len(search(store, "apple")) == 1


# In the docs

SQL_BLOCK = re.compile(r"^```sql\n(.*?)^```$", re.M | re.S)


def test_the_queries_of_the_page_run_on_both_databases(store: Store):
    traffic(store)
    blocks = SQL_BLOCK.findall((DOCS / "schema.md").read_text())

    assert len(blocks) > 8
    for block in blocks:
        for statement in filter(str.strip, block.split(";")):
            assert read(store, statement), statement


def test_the_page_names_every_column_of_every_view(sqlite_store: Store):
    sections = (DOCS / "schema.md").read_text().split("\n### ")
    with sqlite_store.connection():
        for view in VIEWS:
            section = next(section for section in sections if section.startswith(f"llm_{view}\n"))
            columns = [row[0] for row in sqlite_store.database.execute_sql(f"SELECT * FROM llm_{view}").description]
            assert [column for column in columns if f"`{column}`" not in section] == [], view


GRAFANA = json.loads((DOCS / "grafana" / "llm_orm.json").read_text())

QUERIES = {panel["title"]: target["rawSql"] for panel in GRAFANA["panels"] for target in panel["targets"]}


def as_grafana_asks(query: str) -> str:
    """A query with what Grafana puts into it."""
    span = "BETWEEN '2026-11-01T00:00:00Z' AND '2026-11-03T23:59:59.999Z'"
    query = re.sub(r"\$__timeFilter\((\w+)\)", rf"\1 {span}", query)
    group = r'floor(extract(epoch from \1)/3600)*3600 AS "time"'
    query = re.sub(r"\$__timeGroupAlias\((\w+),\s*\$__interval\)", group, query)
    query = query.replace("$model", "'gpt','claude'")
    assert "$" not in query
    return query


def test_each_query_of_the_grafana_dashboard_runs(postgres_url: str):
    with connect(postgres_url) as store:
        store.create_tables()
        stats = stats_of(traffic(store))
        found = {title: read(store, as_grafana_asks(query)) for title, query in QUERIES.items()}
        models = [each["query"] for each in GRAFANA["templating"]["list"] if each["name"] == "model"]
        assert read(store, models[0]) == [{"model": "claude"}, {"model": "gpt"}]

    assert all(found.values())
    assert found["Spend"] == [{"spend": stats.cost}]
    assert found["Requests"] == [{"requests": 300}]
    assert found["Total tokens"] == [{"tokens": stats.input_tokens + stats.output_tokens}]
    assert found["Requests without a price"] == [{"unpriced": stats.unpriced_requests}]
    assert found["Error rate"] == [{"error_rate": pytest.approx(stats.failed_requests / 300)}]
    for title in ("Spend by model", "By day and model", "Models"):
        assert sum(row["cost"] for row in found[title] if row["cost"] is not None) == stats.cost, title
    for panel in GRAFANA["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        if panel["type"] == "timeseries":
            assert "time" in found[panel["title"]][0]


def test_the_dashboard_can_be_imported():
    assert GRAFANA["uid"] == "llm-orm"
    assert "id" not in GRAFANA
    ids = [panel["id"] for panel in GRAFANA["panels"]]
    assert len(set(ids)) == len(ids) > 12
    assert {each["name"] for each in GRAFANA["templating"]["list"]} == {"datasource", "model"}
    places = [panel["gridPos"] for panel in GRAFANA["panels"]]
    covered = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(covered)) == len(covered)
    assert max(x for x, _ in covered) < 24

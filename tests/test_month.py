"""A month of traffic: whatever says what it cost says what the providers billed, to the cent, on both databases."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner
from conftest import CHAT_FIELDS, Schema
from month import BERLIN, END, FIRST, Bill, Ledger, Month, nearest_rank
from prometheus_client.parser import text_string_to_metric_families
from provider import Provider
from starlette.testclient import TestClient

from llm_orm import Budget, Store, budget_status, connect, load_chat, usage
from llm_orm.chronicle import chronicle
from llm_orm.dashboard import create_app
from llm_orm.export import export
from llm_orm.groups import OF_TOOLS
from llm_orm.listing import chats, requests
from llm_orm.metrics import metrics_text
from llm_orm.sums import stats_of
from llm_orm.usage import MEASURES
from llm_orm_cli import main

Row = Mapping[str, Any]
Rows = Iterable[Row]
Read = Callable[[Store, str], Rows]
"""What a surface says of a store, which is at a URL: rows by the names of dimensions and measures."""


Only = Callable[[tuple[Any, ...], Row], Any]


def of_chats_that_are_there(group: tuple[Any, ...], figures: Row) -> bool:
    return None not in group


def that_failed(group: tuple[Any, ...], figures: Row) -> bool:
    return figures["failed_requests"] > 0


def that_cost(group: tuple[Any, ...], figures: Row) -> bool:
    return figures["cost"] > 0 and None not in group


@dataclass(frozen=True)
class Surface:
    """What says what was spent: of which groups, and how it is read.

    of_tools     whether it counts the calls of tools
    only         which groups of the ledger it knows of
    """

    name: str
    by: tuple[str, ...]
    read: Read
    tz: str = "UTC"
    of_tools: bool = False
    only: Only = lambda group, figures: True

    @property
    def title(self) -> str:
        return f"{self.name} by {', '.join(self.by) or 'nothing'}, {self.tz}"

    def differences(self, store: Store, url: str, ledger: Ledger) -> list[Any]:
        """(group, measure, what is said, what was billed) wherever they are not the same."""
        billed = ledger.by(*self.by, tz=self.tz, of_tools=self.of_tools)
        said = {tuple(plain(name, row[name]) for name in self.by): row for row in self.read(store, url)}
        billed = {group: figures for group, figures in billed.items() if self.only(group, figures)}
        said = {group: row for group, row in said.items() if group in billed or is_something(row)}
        wrong: list[Any] = [(group, "is there", group in said, group in billed) for group in set(said) ^ set(billed)]
        compared = Counter[str]()
        for group in set(said) & set(billed):
            for name, value in billed[group].items():
                if name in said[group]:
                    compared[name] += 1
                    if plain(name, said[group][name]) != value:
                        wrong.append((group, name, said[group][name], value))
        assert compared or wrong, "nothing was compared"
        return wrong


def is_something(row: Row) -> bool:
    """Whether it is more than a period in which nothing was."""
    return any(plain(name, row.get(name)) for name in ("requests", "tool_calls", "cost"))


UNITS: dict[str, Callable[[str], Any]] = {
    "cost": lambda text: Decimal(text).quantize(Decimal("1e-12")),
    "day": date.fromisoformat,
    "week": date.fromisoformat,
    "month": date.fromisoformat,
    "hour": lambda text: datetime.fromisoformat(text).astimezone(UTC),
    "chat": UUID,
    "streamed": lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()],
    "duration_avg_ms": lambda text: round(float(text), 1),
}
NUMBERS = {"status", *MEASURES, "total_tokens"} - set(UNITS)


def plain(name: str, value: Any) -> Any:
    """A value as Python has it, whatever it was written as."""
    if value is None or value == "":
        return None
    if name in NUMBERS:
        return int(float(value))
    return UNITS[name](str(value)) if name in UNITS else str(value)


SPAN: Any = {"since": FIRST, "until": END}


def of_usage(*by: str, tz: str = "UTC", **options: Any) -> Surface:
    of_tools = "tool" in by
    measures = [*OF_TOOLS, "tool_calls", "tool_failures"] if of_tools else MEASURES

    def read(store: Store, url: str) -> Rows:
        span = {"since": date(2025, 10, 1), "until": date(2025, 11, 2), "tz": tz}
        rows = usage(store, by, **span, **options)
        return [{**row.by, **{name: row[name] for name in measures}} for row in rows]

    return Surface("usage()", by, read, tz, of_tools)


def of_view(view: str, *by: str, of_tools: bool = False, **renamed: str) -> Surface:
    def read(store: Store, url: str) -> Rows:
        return [{renamed.get(name, name): value for name, value in row.items()} for row in selected(store, view)]

    return Surface(view, by, read, of_tools=of_tools)


OF_TOOL_VIEW = {"name": "tool", "calls": "tool_calls", "failed": "tool_failures"}


def selected(store: Store, name: str) -> list[dict[str, Any]]:
    with store.connection():
        cursor = store.database.execute_sql(f"SELECT * FROM {name}")
        columns = [each[0] for each in cursor.description]
        return [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]


def of_command(*by: str, tz: str = "UTC", written: str = "--json") -> Surface:
    def read(store: Store, url: str) -> Rows:
        span = ["--since", "2025-10-01", "--until", "2025-11-02", "--tz", tz]
        named = ["--by", ",".join(by)] if by else []
        result = CliRunner().invoke(main, ["stats", *named, *span, written, "--database-url", url])
        assert result.exit_code == 0, result.output
        if written == "--csv":
            return list(csv.DictReader(io.StringIO(result.stdout)))
        found = json.loads(result.stdout, parse_float=Decimal)
        return found if isinstance(found, list) else [found]

    return Surface(f"llm-orm stats {written}", by, read, tz, "tool" in by)


def of_page(path: str, table: str, *by: str, tz: str = "UTC", query: str = "", **more: Any) -> Surface:
    def read(store: Store, url: str) -> Rows:
        address = f"{path}.json?since=2025-10-01&until=2025-11-02&tz={tz}&table={table}{query}"
        with TestClient(create_app(store), base_url="http://127.0.0.1:8377") as client:
            answer = client.get(address)
        assert answer.status_code == 200, answer.text
        if table == "summary":
            return [{row["figure"]: row["value"] for row in answer.json()}]
        return [{**row, "chat": row.get("id")} for row in answer.json()]

    return Surface(f"dashboard {path}.json", by, read, tz, "tool" in by, **more)


def of_rows(name: str, read: Callable[[Store], Rows], *by: str) -> Surface:
    """Rows of requests, summed here."""

    def summed(store: Store, url: str) -> Rows:
        figures = Ledger([as_bill(row) for row in read(store)]).by(*by)
        no_tools = ("tool_calls", "tool_failures")
        return [
            {**dict(zip(by, group, strict=True)), **{name: row[name] for name in row if name not in no_tools}}
            for group, row in figures.items()
        ]

    return Surface(name, by, summed)


def as_bill(row: Row) -> Bill:
    """A request row, as a bill; of a view, a list or a file."""
    known: Any = {"user_id": row.get("user_id"), "plan": None, "agent_class": row["agent_class"] or None}
    known |= {"chat": plain("chat", row["chat_id"]), "at": datetime.fromisoformat(str(row["created_at"]))}
    known |= {"status": int(row["status_code"]), "error": row["error"] or None, "cost": plain("cost", row["cost"])}
    known |= {"streamed": plain("streamed", row["streamed"]), "first_token_ms": None}
    if row["first_token_ms"] not in (None, ""):
        known["first_token_ms"] = int(row["first_token_ms"])
    for each in fields(Bill):
        if each.name in row and each.name not in known:
            known[each.name] = int(row[each.name]) if each.type is int else row[each.name]
    return Bill(**{name: value for name, value in known.items() if name not in ("tool", "failed")})


def exported(store: Store) -> Rows:
    file = io.StringIO()
    export(store, file, "csv", **SPAN)
    return csv.DictReader(io.StringIO(file.getvalue()))


def stats_of_chats(store: Store, url: str) -> Iterator[Row]:
    for row in store.records.chat.select():
        chat = load_chat(store, row.id)
        assert chat is not None
        yield {"chat": row.id, **chat.stats().as_dict()}


def chronicles(store: Store, url: str) -> Iterator[Row]:
    """What the turns of each chat come to, with what is besides."""
    for row in store.records.chat.select():
        found = chronicle(store, row.id)
        assert found is not None
        calls = [step for step in found.besides if step.kind == "model"]
        costs = [turn.cost for turn in found.turns] + [step.cost for step in calls if step.cost is not None]
        yield {
            "chat": row.id,
            "requests": sum(turn.stats.requests for turn in found.turns) + len(calls),
            "cost": sum(costs, Decimal(0)),
            "unpriced_requests": sum(turn.unpriced_requests for turn in found.turns)
            + sum(step.cost is None for step in calls),
            "duration_ms": sum(turn.duration_ms for turn in found.turns) + sum(step.duration_ms or 0 for step in calls),
        }
        assert found.stats == load_chat(store, row.id).stats()  # type: ignore[union-attr]


def of_budget(*by: str) -> Surface:
    """What a budget has counted, for all time, of each who has one."""

    def read(store: Store, url: str) -> Rows:
        budget = Budget(1_000_000, per="total", by=by[0] if by else None)
        # Those without a value share one, in which the requests of deleted chats are not.
        known = [each for each in budget_status(store, [budget]) if None not in each.who.values()]
        return [{**each.who, "cost": each.spent} for each in known]

    return Surface("budget_status()", by, read, only=that_cost)


def listed_chats(store: Store, url: str) -> Rows:
    result = CliRunner().invoke(main, ["chats", "--limit", "1000", "--json", "--database-url", url])
    assert result.exit_code == 0, result.output
    return [{**row, "chat": row["id"]} for row in json.loads(result.stdout, parse_float=Decimal)]


def scraped(kind: str, *by: str, **more: Any) -> Surface:
    """One family of Prometheus, or all that have these labels."""
    families = {
        "requests": {"requests": "requests"},
        "models": {
            "cost_dollars": "cost",
            "unpriced_requests": "unpriced_requests",
            "retried_requests": "retried_requests",
        },
        "failures": {"failed_requests": "failed_requests"},
        "tools": {"tool_calls": "tool_calls", "failed_tool_calls": "tool_failures"},
    }[kind]

    def read(store: Store, url: str) -> Rows:
        rows: dict[tuple[str, ...], dict[str, Any]] = {}
        for family in text_string_to_metric_families(metrics_text(store).decode()):
            name = family.name.removeprefix("llm_orm_")
            for sample in family.samples:
                if name == "tokens" and kind == "models" and sample.name.endswith("_total"):
                    labels = dict(sample.labels)
                    measure = f"{labels.pop('type')}_tokens"
                elif name in families and sample.name.endswith("_total"):
                    labels, measure = dict(sample.labels), families[name]
                else:
                    continue
                rows.setdefault(tuple(labels[each] for each in by), {**labels})[measure] = repr(sample.value)
        return rows.values()

    return Surface(f"Prometheus, {kind}", by, read, of_tools=kind == "tools", **more)


GROUPS: list[tuple[str, ...]] = [
    *((), ("day",), ("hour",), ("week",), ("month",), ("model",), ("provider",), ("user_id",), ("metadata.plan",)),
    *(("agent_class",), ("status",), ("error",), ("streamed",), ("source",), ("chat",), ("day", "model")),
    *(("user_id", "metadata.plan", "model"), ("tool",), ("day", "tool"), ("model", "tool")),
]
GROUPS_IN_TIME = [("day",), ("hour",), ("month",), ("day", "model"), ("day", "tool")]

SURFACES: list[Surface] = [
    *(of_usage(*by) for by in GROUPS),
    *(of_usage(*by, tz=BERLIN) for by in GROUPS_IN_TIME),
    Surface("stats_of()", (), lambda store, url: [stats_of(store).as_dict()]),
    Surface("Chat.stats()", ("chat",), stats_of_chats, only=of_chats_that_are_there),
    Surface(
        "chats()",
        ("chat",),
        lambda store, url: [{**line.as_dict(), "chat": line.id} for line in chats(store, limit=None)],
        only=of_chats_that_are_there,
    ),
    Surface("chronicle()", ("chat",), chronicles, only=of_chats_that_are_there),
    of_rows(
        "requests()",
        lambda store: [line.as_dict() for line in requests(store, limit=None)],
        *("provider", "model", "agent_class"),
    ),
    of_view("llm_usage_daily", "day", "provider", "model", "source"),
    of_view("llm_usage_hourly", "hour", "provider", "model", "source"),
    of_view("llm_tool_usage_daily", "day", "tool", of_tools=True, **OF_TOOL_VIEW),
    of_view("llm_chat_cost", "chat", chat_id="chat"),
    of_rows(
        "llm_request_detail",
        lambda store: selected(store, "llm_request_detail"),
        *("day", "provider", "model", "agent_class", "error"),
    ),
    of_rows("export(csv)", exported, "user_id", "model", "agent_class"),
    of_command(),
    of_command("day", "model"),
    of_command("day", tz=BERLIN),
    of_command("user_id", written="--csv"),
    of_command("metadata.plan", "status", written="--csv"),
    of_command("tool"),
    Surface("llm-orm chats --json", ("chat",), listed_chats, only=of_chats_that_are_there),
    of_page("/overview", "summary"),
    of_page("/overview", "groups", "error", query="&by=error"),
    of_page("/overview", "time", "day", tz=BERLIN),
    of_page("/models", "models", "provider", "model"),
    of_page("/users", "users", "user_id", query="&by=user_id"),
    of_page("/users", "users", "metadata.plan", query="&by=metadata.plan"),
    of_page("/agents", "agents", "agent_class"),
    of_page("/tools", "tools", "tool"),
    of_page("/chats", "chats", "chat", query="&limit=1000", only=of_chats_that_are_there),
    scraped("requests", "provider", "model", "source", "status"),
    scraped("models", "provider", "model"),
    scraped("failures", "provider", "model", "error", only=that_failed),
    scraped("tools", "tool"),
    of_budget(),
    of_budget("model"),
    of_budget("user_id"),
    of_budget("metadata.plan"),
    of_budget("agent_class"),
]
"""All that says what was spent."""


@dataclass(frozen=True)
class Spent:
    store: Store
    url: str
    ledger: Ledger


def spend(stack: ExitStack, folder: Path, schema: Schema, turns: int, provider: Provider) -> dict[str, Spent]:
    """The same month on both databases."""
    postgres_url = schema.empty()
    stack.callback(schema.drop, postgres_url)
    months = {}
    for name, url in {"sqlite": f"sqlite:///{folder}/month.db", "postgresql": postgres_url}.items():
        store = stack.enter_context(connect(url, chat_fields=CHAT_FIELDS))
        store.create_tables()
        months[name] = Spent(store, url, Month(store, url).spend(turns, provider))
    return months


def check(months: Mapping[str, Spent], surface: Surface) -> None:
    for name, month in months.items():
        assert surface.differences(month.store, month.url, month.ledger) == [], name


def as_billed(month: Spent) -> list[tuple[Any, ...]]:
    """Each request as its row has it; nothing of it is an id."""
    lines = [as_bill({**line.as_dict(), "at": line.created_at}) for line in requests(month.store, limit=None)]
    return sorted(map(facts, lines), key=repr)


def facts(bill: Bill) -> tuple[Any, ...]:
    names = [each.name for each in fields(Bill) if each.name not in ("chat", "user_id", "plan", "tool", "failed")]
    return tuple(plain(name, getattr(bill, name)) if name == "cost" else getattr(bill, name) for name in names)


@pytest.fixture(scope="module")
def months(
    real_litellm: None, tmp_path_factory: pytest.TempPathFactory, postgres_schema: Schema
) -> Iterator[dict[str, Spent]]:
    with Provider() as provider, ExitStack() as stack:
        yield spend(stack, tmp_path_factory.mktemp("month"), postgres_schema, 48, provider)


def test_each_request_is_as_it_was_billed_and_both_databases_have_the_same(months: dict[str, Spent]):
    rows = {name: as_billed(month) for name, month in months.items()}
    assert rows["sqlite"] == rows["postgresql"]
    for name, month in months.items():
        assert sorted(map(facts, month.ledger.calls), key=repr) == rows[name]
    assert len(rows["sqlite"]) >= 120


def test_the_month_has_something_of_everything(months: dict[str, Spent]):
    """What a month without it would not show."""
    calls, tools = months["sqlite"].ledger.calls, months["sqlite"].ledger.tools
    assert {bill.status for bill in calls} >= {200, 400, 429, 499, 503, 0}
    assert {"ProcessDied", "GeneratorExit", "APIConnectionError", None} <= {bill.error for bill in calls}
    assert {bill.provider for bill in calls} == {"acme", "bell", "openai", "anthropic", "gemini"}
    assert {bill.failed for bill in tools} == {True, False}
    assert any(bill.chat is None and bill.cost for bill in calls)
    assert all(any(getattr(bill, name) for bill in calls) for name in ("cached_tokens", "cache_write_tokens"))
    days = [Counter(named["day"] for named in by_day(months["sqlite"], tz)) for tz in ("UTC", BERLIN)]
    assert days[0] != days[1]


def by_day(month: Spent, tz: str) -> list[dict[str, Any]]:
    return [{"day": day} for (day,), row in month.ledger.by("day", tz=tz).items() for _ in range(row["requests"])]


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.title)
def test_what_is_said_is_what_was_billed(months: dict[str, Spent], surface: Surface):
    check(months, surface)


@pytest.mark.parametrize("percent", [50, 95])
@pytest.mark.parametrize("count", [1, 2, 3, 19, 20, 21, 100])
def test_the_nearest_rank_is_a_value_that_so_many_do_not_exceed(percent: int, count: int):
    values = list(range(count, 0, -1))
    rank = nearest_rank(values, percent)
    assert rank in values
    assert sum(value <= rank for value in values) * 100 >= percent * count
    assert sum(value < rank for value in values) * 100 < percent * count

"""usage(): what was spent, on whom, for what, and when; summed by the database."""

import asyncio
import copy
import pickle
import random
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import peewee as pw
import pytest
from freezegun import freeze_time

from llm_orm import (
    Budget,
    Chat,
    InvalidValue,
    Store,
    UnknownKeyword,
    UsageRow,
    ausage,
    budget_status,
    chats,
    connect,
    create_agent_session,
    create_chat,
    define_agent,
    requests,
    usage,
)
from llm_orm.records import LlmChat, uuid7
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

NOON = datetime(2026, 11, 2, 12, tzinfo=UTC)
BERLIN = "Europe/Berlin"


def a_chat(store: Store, **keywords: Any) -> Chat:
    return create_chat(store, model="m", llm=ScriptedLLM(), **keywords)


def spend(store: Store, chat: Chat | None = None, at: datetime = NOON, **columns: Any) -> None:
    """One request row."""
    row = {"provider": "p", "model": "m", "status_code": 200, "duration_ms": 100, "cost": "0.25", **columns}
    with store.connection():
        store.records.request.insert(id=uuid7(), chat=chat and chat.id, created_at=at, **row).execute()


def figures(rows: list[UsageRow], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


def test_without_anything_to_group_by_there_is_one_row_of_totals(store):
    spend(store, input_tokens=10, output_tokens=5, cached_tokens=4, cache_write_tokens=2, thinking_tokens=3)
    spend(store, input_tokens=1, output_tokens=1, cost=None, duration_ms=300, first_token_ms=40, streamed=True)
    spend(store, status_code=429, error="RateLimitError", cost=0, attempt=2, duration_ms=200)
    spend(store, cost=0, duration_ms=200)
    (row,) = usage(store, by=())
    assert row.as_dict() == {
        "requests": 4,
        "failed_requests": 1,
        "retried_requests": 1,
        "input_tokens": 11,
        "output_tokens": 6,
        "total_tokens": 17,
        "cached_tokens": 4,
        "cache_write_tokens": 2,
        "thinking_tokens": 3,
        "cost": Decimal("0.25"),
        "unpriced_requests": 1,
        "duration_ms": 800,
        "duration_avg_ms": 200.0,
        "duration_p50_ms": 200,
        "duration_p95_ms": 300,
        "duration_max_ms": 300,
        "first_token_p50_ms": 40,
        "first_token_p95_ms": 40,
        "tool_calls": 0,
        "tool_failures": 0,
    }


def test_where_nothing_was_spent_the_totals_are_zero_and_times_unknown(store):
    (row,) = usage(store, by=())
    assert (row.requests, row.cost, row.unpriced_requests, row.tool_calls) == (0, Decimal(0), 0, 0)
    assert (row.duration_avg_ms, row.duration_p95_ms, row.duration_max_ms, row.first_token_p50_ms) == (None,) * 4
    assert type(row.cost) is Decimal
    assert usage(store) == usage(store, by="model") == usage(store, by="tool") == []


def test_costs_add_up_to_the_last_place(store):
    for _ in range(30):
        spend(store, cost="999.999999999999")
    assert usage(store, by=())[0].cost == Decimal("29999.99999999997")


def test_each_day_and_model_has_a_row_and_empty_days_have_zeros(store):
    spend(store, model="a", at=NOON)
    spend(store, model="a", at=NOON + timedelta(days=2), cost="1")
    spend(store, model="b", at=NOON + timedelta(days=2), cost="0.5")
    rows = usage(store, since="2026-11-01", until="2026-11-06")
    days = [date(2026, 11, day) for day in range(1, 6)]
    assert sorted(figures(rows, "day", "model")) == [(day, model) for day in days for model in "ab"]
    assert [row.day for row in rows] == sorted(row.day for row in rows)
    spent = {(row.day.day, row.model): row.cost for row in rows if row.requests}
    assert spent == {(2, "a"): Decimal("0.25"), (4, "a"): Decimal(1), (4, "b"): Decimal("0.5")}
    assert {(row.requests, row.cost, row.duration_p50_ms) for row in rows if row.day.day in (1, 3, 5)} == {(0, 0, None)}


def test_days_without_a_request_are_there_even_where_nothing_was_spent_at_all(store):
    rows = usage(store, by="day", since="2026-11-01", until="2026-11-04")
    assert figures(rows, "day", "requests", "cost") == [(date(2026, 11, day), 0, 0) for day in (1, 2, 3)]


@freeze_time(NOON + timedelta(days=2))
def test_without_bounds_it_goes_from_the_first_request_to_now(store):
    spend(store)
    assert [row.day.day for row in usage(store, by="day")] == [2, 3, 4]
    assert [row.day.day for row in usage(store, by="day", since="1d")] == [3, 4]
    assert [row.day.day for row in usage(store, by="day", since=timedelta(hours=36))] == [3, 4]


def test_tool_calls_without_a_request_are_in_their_days(store):
    def fine() -> str:
        return "done"

    quiet: Any = {"llm": ScriptedLLM(Call("fine"), "Hi."), "tools": [fine], "persistence": {"requests": False}}
    with freeze_time(NOON):
        create_chat(store, model="m", **quiet).ask("Hello")
    assert figures(usage(store, by="day"), "day", "tool_calls")[0] == (date(2026, 11, 2), 1)


def test_a_span_begins_with_its_first_moment_and_ends_before_its_last(store):
    for moment in (NOON, NOON + timedelta(hours=1)):
        spend(store, at=moment)
    assert usage(store, by=(), since=NOON, until=NOON + timedelta(hours=1))[0].requests == 1
    assert usage(store, by=(), since=NOON)[0].requests == 2
    assert usage(store, by=(), since=NOON + timedelta(microseconds=1))[0].requests == 1
    assert [row.requests for row in usage(store, by="hour", since=NOON, until=NOON + timedelta(minutes=150))] == [
        1,
        1,
        0,
    ]
    spend(store, at=NOON + timedelta(minutes=50))
    assert [row.requests for row in usage(store, by="hour", since=NOON, until=NOON + timedelta(minutes=40))] == [1]


def test_days_are_those_of_the_time_zone(store):
    spend(store, at=datetime(2026, 11, 1, 23, 30, tzinfo=UTC))  # in Berlin, the 2nd
    for tz, day in (("UTC", 1), (BERLIN, 2), (ZoneInfo("America/New_York"), 1)):
        rows = usage(store, by="day", since="2026-11-01", until="2026-11-04", tz=tz)
        assert [row.day.day for row in rows if row.requests] == [day]
        assert len(rows) == 3


def test_the_hour_that_clocks_are_put_back_by_is_there_twice(store):
    for minute in (0, 60, 61):  # 2:00 and 2:00, 2:01 in Berlin
        spend(store, at=datetime(2026, 10, 25, 0, 0, tzinfo=UTC) + timedelta(minutes=minute))
    rows = usage(store, by="hour", since="2026-10-25", until="2026-10-26", tz=BERLIN)
    assert len(rows) == 25
    assert [(row.hour.hour, str(row.hour.utcoffset()), row.requests) for row in rows if row.requests] == [
        (2, "2:00:00", 1),
        (2, "1:00:00", 2),
    ]
    spring = usage(store, by="hour", since="2026-03-29", until="2026-03-30", tz=BERLIN)
    assert [row.hour.hour for row in spring] == [0, 1, *range(3, 24)]


def test_weeks_begin_on_monday_and_months_on_their_first(store):
    for day in (date(2026, 11, 1), date(2026, 11, 2), date(2026, 12, 31)):
        spend(store, at=datetime(day.year, day.month, day.day, 12, tzinfo=UTC))
    weeks = usage(store, by="week", since="2026-11-01", until="2027-01-01")
    assert [(row.week.isoformat(), row.requests) for row in weeks if row.requests] == [
        ("2026-10-26", 1),
        ("2026-11-02", 1),
        ("2026-12-28", 1),
    ]
    months = usage(store, by="month", since="2026-10-15", until="2027-02-01")
    assert figures(months, "month", "requests") == [
        (date(2026, 10, 1), 0),
        (date(2026, 11, 1), 2),
        (date(2026, 12, 1), 1),
        (date(2027, 1, 1), 0),
    ]


def test_requests_are_grouped_by_what_is_known_of_them(store):
    spend(store, provider="openai", model="a", source="chat", streamed=True)
    spend(store, provider="openai", model="a", status_code=429, error="RateLimitError", cost=0)
    spend(store, provider="x", model="b", cost="1")
    for by, expected in {
        "provider": [("x", 1), ("openai", 2)],
        "status": [(200, 2), (429, 1)],
        "error": [(None, 2), ("RateLimitError", 1)],
        "source": [("chat", 3)],
        "streamed": [(False, 2), (True, 1)],
    }.items():
        assert figures(usage(store, by=by), by, "requests") == expected
    assert figures(usage(store, by=("provider", "status")), "provider", "status", "requests") == [
        ("x", 200, 1),
        ("openai", 200, 1),
        ("openai", 429, 1),
    ]


def test_requests_are_grouped_by_what_the_application_says_of_the_chat(store):
    ann = a_chat(store, user_id="ann", metadata={"plan": "free", "seats": 3, "trial": True, "tags": ["a"]})
    bob = a_chat(store, user_id="bob", metadata={"plan": 'it\'s "pro"', "seats": 3.5, "trial": None})
    for chat in (ann, ann, bob, None):
        spend(store, chat)
    assert figures(usage(store, by="user_id"), "user_id", "requests") == [("ann", 2), (None, 1), ("bob", 1)]
    assert figures(usage(store, by="chat"), "chat", "cost")[0] == (ann.id, Decimal("0.5"))
    assert type(usage(store, by="chat")[0].chat) is UUID
    for key, expected in {
        "plan": {"free": 2, 'it\'s "pro"': 1, None: 1},
        "seats": {3: 2, 3.5: 1, None: 1},
        "trial": {True: 2, None: 2},
        "nothing": {None: 4},
        "it's": {None: 4},
    }.items():
        name = f"metadata.{key}"
        assert dict(figures(usage(store, by=name), name, "requests")) == expected
    assert ["a"] in [row["metadata.tags"] for row in usage(store, by="metadata.tags")]


def test_requests_are_grouped_by_agent(store):
    agent = define_agent("Helper", model="m")
    session = create_agent_session(store, agent, llm=ScriptedLLM("Hi."))
    session.ask("Hello?")
    spend(store)
    assert set(figures(usage(store, by="agent_class"), "agent_class", "requests")) == {("Helper", 1), (None, 1)}
    assert usage(store, by=(), where={"agent_class": "Helper"})[0].requests == 1


def test_the_metadata_of_an_agents_session_counts_where_the_chat_has_none_of_that_name(store):
    agent = define_agent("Helper", model="m")
    for metadata in ({"plan": "free", "seats": 3}, {"plan": None}, None):
        create_agent_session(store, agent, metadata=metadata, llm=ScriptedLLM("Hi.")).ask("Hello?")
    both = create_agent_session(store, agent, metadata={"plan": "free"}, llm=ScriptedLLM("Hi."))
    both.ask("Hello?")
    with store.connection():
        store.records.chat.update(metadata={"plan": "pro"}).where(store.records.chat.id == both.chat_id).execute()
    rows = usage(store, by="metadata.plan")
    assert dict(figures(rows, "metadata.plan", "requests")) == {"free": 1, "pro": 1, None: 2}
    for where, count in (
        ({"metadata.plan": "free"}, 1),
        ({"metadata.plan": "pro"}, 1),
        ({"metadata.seats": 3}, 1),
        ({"metadata.plan": None}, 2),
    ):
        assert usage(store, by=(), where=where)[0].requests == count, where
        assert len(chats(store, where=where)) == count, where


def test_requests_of_deleted_chats_count_and_what_the_chat_said_is_unknown(store):
    chat = a_chat(store, user_id="ann")
    spend(store, chat)
    chat.delete()
    assert figures(usage(store, by=("user_id", "chat")), "user_id", "chat", "cost") == [(None, None, Decimal("0.25"))]
    assert usage(store, by=(), where={"user_id": None})[0].requests == 1


def test_where_says_which_requests(store):
    ann = a_chat(store, user_id="ann", metadata={"plan": "free", "seats": 3})
    bob = a_chat(store, user_id="bob", metadata={"plan": "pro"})
    spend(store, ann, model="a", streamed=True)
    spend(store, bob, model="b", status_code=500, error="InternalServerError")
    spend(store, model="c")
    for where, count in (
        ({"user_id": "ann"}, 1),
        ({"user_id": ["ann", "bob"]}, 2),
        ({"user_id": ["ann", None]}, 2),
        ({"model": ("a", "c")}, 2),
        ({"model": "a", "user_id": "bob"}, 0),
        ({"metadata.plan": "free"}, 1),
        ({"metadata.seats": 3}, 1),
        ({"metadata.seats": "3"}, 0),
        ({"metadata.plan": None}, 1),
        ({"metadata.plan": ["pro", None]}, 2),
        ({"chat": ann.id}, 1),
        ({"chat": str(bob.id)}, 1),
        ({"chat": None}, 1),
        ({"status": 500}, 1),
        ({"status": "500"}, 1),
        ({"error": None}, 2),
        ({"error": "InternalServerError"}, 1),
        ({"streamed": True}, 1),
        ({"streamed": "false"}, 2),
        ({"user_id": "' OR 1=1 --"}, 0),
        ({"metadata.'\"": "x"}, 0),
    ):
        assert usage(store, by=(), where=where)[0].requests == count, where


def test_tool_calls_are_those_of_the_requests_that_asked_for_them(store):
    def fine() -> str:
        return "ok"

    def broken() -> str:
        raise ValueError("no")

    script = [
        Say(calls=[Call("fine"), Call("broken")]),
        ProviderError(429, "slow down", retry_after=0),
        Say(calls=[Call("fine")]),
        Say("Done."),
    ]
    chat = create_chat(store, model="m", llm=ScriptedLLM(*script), tools=[fine, broken], user_id="ann")
    chat.ask("Go.")
    (row,) = usage(store, by=("model", "user_id"))
    assert (row.requests, row.tool_calls, row.tool_failures) == (4, 3, 1)
    rows = usage(store, by=("tool", "user_id"))
    assert figures(rows, "tool", "user_id", "tool_calls", "tool_failures") == [
        ("fine", "ann", 2, 0),
        ("broken", "ann", 1, 1),
    ]
    assert {(row.requests, row.cost, row.input_tokens) for row in rows} == {(None, None, None)}
    assert figures(usage(store, by=("tool", "model")), "tool", "model") == [("fine", "m"), ("broken", "m")]
    assert usage(store, by=(), where={"tool": "fine"})[0].tool_calls == 2
    assert usage(store, by="status")[0].tool_calls == 3
    assert usage(store, by=(), where={"error": "RateLimitError"})[0].tool_calls == 0


def test_a_tool_call_has_the_model_that_asked_for_it_and_not_the_one_of_an_earlier_try(store):
    def fine() -> str:
        return "ok"

    first = [Say(calls=[Call("fine")]), ProviderError(400, "no")]
    chat = create_chat(store, model="old", llm=ScriptedLLM(*first), tools=[fine])
    with pytest.raises(ProviderError):
        chat.ask("Go.")
    chat.with_model("new").retry(llm=ScriptedLLM(Say(calls=[Call("fine")]), "Done."))
    assert figures(usage(store, by=("tool", "model")), "model", "tool_calls") == [("new", 1), ("old", 1)]
    assert usage(store, by=())[0].tool_calls == 2


def test_tool_calls_of_one_turn_have_the_models_of_their_rounds(store):
    chat, turn = a_chat(store), uuid7()
    for place, model in enumerate("ab"):
        at = NOON + timedelta(seconds=place)
        spend(store, chat, at, model=model, turn_id=turn, round=place)
        call = {"chat": chat.id, "turn_id": turn, "round": place, "position": 0, "tool_call_id": model, "name": "t"}
        with store.connection():
            store.records.tool_call.create(**call, arguments="{}", created_at=NOON + timedelta(minutes=1))
    assert figures(usage(store, by="model", order="model"), "model", "tool_calls") == [("a", 1), ("b", 1)]


def test_a_request_that_could_not_be_written_yet_is_written_and_counted(store):
    row = {"id": uuid7(), "provider": "p", "model": "m", "status_code": 200, "duration_ms": 1, "cost": Decimal(2)}
    defaults = {"source": "chat", "round": 0, "attempt": 1, "streamed": False, "usage_estimated": False}
    tokens = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "thinking_tokens")
    row |= defaults | dict.fromkeys(tokens, 0) | {"created_at": NOON}
    store.owe(store.statements.insert(store.records.request, row))
    assert usage(store, by=())[0].cost == 2


def test_how_long_tools_took_is_measured_where_they_are_counted(store):
    chat = create_chat(store, model="m", llm=ScriptedLLM("Hi."))
    chat.ask("Hello?")
    call = {"chat": chat.id, "turn_id": uuid7(), "round": 0, "name": "t", "arguments": "{}"}
    with store.connection():
        for place, took in enumerate((10, 30, None)):
            store.records.tool_call.create(**call, position=place, tool_call_id=str(place), duration_ms=took)
    (row,) = usage(store, by="tool")
    assert (row.duration_ms, row.duration_avg_ms, row.duration_p50_ms, row.duration_max_ms) == (40, 20.0, 10, 30)
    assert row.tool_calls == 3


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 100])
def test_percentiles_are_those_of_the_nearest_rank(store, count):
    values = random.Random(count).sample(range(100_000), count)
    row = {"provider": "p", "model": "m", "status_code": 200}
    with store.connection():
        store.records.request.insert_many(
            [{**row, "id": uuid7(), "duration_ms": each, "first_token_ms": each // 2} for each in values]
        ).execute()
    values.sort()
    p50, p95 = values[(count + 1) // 2 - 1], values[-(-count * 95 // 100) - 1]
    (found,) = usage(store, by=())
    assert (found.duration_p50_ms, found.duration_p95_ms) == (p50, p95)
    assert (found.first_token_p50_ms, found.first_token_p95_ms) == (p50 // 2, p95 // 2)


def test_the_most_expensive_comes_first_unless_another_order_is_asked_for(store):
    for model, cost, tokens in (("a", "1", 30), ("b", "3", 10), ("c", None, 20)):
        spend(store, model=model, cost=cost, input_tokens=tokens)

    def models(**options: Any) -> str:
        return "".join(row.model for row in usage(store, by="model", **options))

    assert models() == "bac"
    assert models(order="cost") == "cab"
    assert models(order="-input_tokens") == "acb"
    assert models(order="-model") == "cba"
    assert models(limit=2) == "ba"
    assert models(order="model", limit=1) == "a"


def test_with_a_time_the_limit_is_of_groups_and_each_has_all_its_periods(store):
    for day, model, cost in ((1, "a", "9"), (2, "b", "6"), (3, "b", "6"), (3, "c", "1")):
        spend(store, model=model, cost=cost, at=datetime(2026, 11, day, tzinfo=UTC))
    span: dict[str, Any] = {"since": "2026-11-01", "until": "2026-11-04"}
    rows = usage(store, by=("day", "model"), limit=2, **span)
    assert figures(rows, "model", "cost") == [("a", 9), ("b", 0), ("b", 6), ("a", 0), ("b", 6), ("a", 0)]
    assert {row.model for row in usage(store, by=("day", "model"), limit=1, **span)} == {"b"}
    days = usage(store, by="day", order="-cost", limit=1, **span)
    assert figures(days, "day", "cost") == [(date(2026, 11, 1), 9)]


def test_what_is_ordered_by_need_not_be_asked_for(store):
    for model, cost, took in (("a", "1", 30), ("b", "3", 10), ("c", "2", 20)):
        spend(store, model=model, cost=cost, duration_ms=took)
    for options, models in (
        ({"order": "-cost"}, "bca"),
        ({"order": "duration_p95_ms"}, "bca"),
        ({}, "bca"),
        ({"order": "-cost", "limit": 1}, "b"),
    ):
        rows = usage(store, by="model", measures="requests", **options)
        assert "".join(row.model for row in rows) == models
        assert {(row.requests, row.cost, row.duration_p95_ms) for row in rows} == {(1, None, None)}


def test_only_the_measures_that_were_asked_for_are_counted(store):
    spend(store)
    (row,) = usage(store, by="model", measures=("cost", "duration_avg_ms", "duration_p95_ms"))
    assert {name: value for name, value in row.as_dict().items() if value is not None} == {
        "model": "m",
        "cost": Decimal("0.25"),
        "duration_avg_ms": 100.0,
        "duration_p95_ms": 100,
    }


def test_a_row_has_its_groups_and_measures_as_attributes_and_by_name(store):
    spend(store, a_chat(store, user_id="ann", metadata={"plan": "free"}))
    (row,) = usage(store, by=("user_id", "metadata.plan"))
    assert (row.user_id, row["user_id"], row["metadata.plan"], row["cost"], row.cost) == (
        "ann",
        "ann",
        "free",
        Decimal("0.25"),
        Decimal("0.25"),
    )
    assert list(row.by) == ["user_id", "metadata.plan"]
    with pytest.raises(AttributeError, match=r"by user_id, metadata\.plan has no 'model'"):
        row.model
    assert copy.copy(row) == row == pickle.loads(pickle.dumps(row))


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"by": None}, InvalidValue, "by=None"),
    ({"by": "metadata."}, InvalidValue, "no key behind"),
    ({"by": "modl"}, UnknownKeyword, "does not know 'modl'.*did you mean 'model'"),
    ({"by": ("day", "hour")}, InvalidValue, "group by one of hour, day, week, month"),
    ({"by": ("model", "model")}, InvalidValue, "each name once"),
    ({"where": {"day": "2026-11-01"}}, UnknownKeyword, "does not know 'day'"),
    ({"where": {"custmer": "x"}}, UnknownKeyword, "custmer"),
    ({"where": {"user_id": []}}, InvalidValue, "has no value"),
    ({"where": {"user_id": {"a": 1}}}, InvalidValue, "one value"),
    ({"where": "user_id"}, InvalidValue, "where is like"),
    ({"where": {"status": "many"}}, InvalidValue, "where='status' cannot be 'many'"),
    ({"where": {"streamed": "perhaps"}}, InvalidValue, "true or false"),
    ({"where": {"chat": "x"}}, InvalidValue, r"usage\(\): where='chat' .* not the id of a chat"),
    ({"where": {"model": 7}}, InvalidValue, r"usage\(\): where='model' .* a text, not 7"),
    ({"where": 5}, InvalidValue, "where is like"),
    ({"by": None}, InvalidValue, "by=None: it is a name"),
    ({"by": ("model", ["day"])}, InvalidValue, r"\['day'\] is none"),
    ({"measures": 5}, InvalidValue, "measures=5: it is a name"),
    ({"by": "month", "since": "9999-11-01", "until": "9999-12-31"}, InvalidValue, "ends with the year 9999"),
    ({"where": {"metadata.plan": [1, {}]}}, InvalidValue, "a text, a number or a bool"),
    ({"where": {"user_id": "a\0"}}, InvalidValue, "NUL"),
    ({"since": "yesterday"}, InvalidValue, "since='yesterday' is not a time"),
    ({"since": datetime(2026, 11, 1)}, InvalidValue, "has no time zone"),  # noqa: DTZ001
    ({"since": "2026-11-02", "until": "2026-11-01"}, InvalidValue, "is not before"),
    ({"tz": "Mars/Olympus"}, InvalidValue, "not a time zone"),
    ({"tz": "../etc/passwd"}, InvalidValue, "not a time zone"),
    ({"order": "price"}, InvalidValue, "order='price'"),
    ({"limit": 0}, InvalidValue, "limit=0"),
    ({"measures": ["costs"]}, InvalidValue, "measures has 'costs'"),
    ({"by": "hour", "since": "1990-01-01"}, InvalidValue, "more than 10,000 periods"),
]


@pytest.mark.parametrize(("options", "error", "text"), REFUSED)
def test_what_it_cannot_be_asked_is_refused_with_a_reason(sqlite_url, options, error, text):
    from peewee import TextField

    with connect(sqlite_url, chat_fields={"user_id": TextField(null=True)}) as store:
        store.create_tables()
        with pytest.raises(error, match=text):
            usage(store, **options)


def test_it_may_be_asked_while_rows_of_the_same_connection_are_read(store):
    for _ in range(3):
        spend(store)
    with store.connection():
        read = [usage(store, by=())[0].duration_p50_ms for _ in store.records.request.select().iterator()]
    assert read == [100, 100, 100]


def test_a_column_that_is_called_as_one_of_its_names_does_not_take_it_over(database_url):
    from peewee import TextField

    own = {name: TextField(null=True) for name in ("status", "source", "error", "tool", "streamed")}
    with connect(database_url, chat_fields=own) as store:
        store.create_tables()
        spend(store, a_chat(store, **dict.fromkeys(own, "theirs")), status_code=429, error="RateLimitError")
        rows = usage(store, by=("status", "source", "error", "streamed"), where={"status": "429"})
        assert figures(rows, "status", "source", "error", "streamed") == [(429, "chat", "RateLimitError", False)]
        assert usage(store, by="tool") == requests(store, where={"error": "theirs"}) == []
        assert [line.columns["status"] for line in chats(store, where={"status": "theirs"})] == ["theirs"]
        by_theirs = budget_status(store, [Budget("1", per="total", by="status", where={"error": "theirs"})])
        assert [(each.who, each.spent) for each in by_theirs] == [({"status": "theirs"}, Decimal("0.25"))]


def test_a_foreign_key_is_compared_with_a_row_or_its_key(sqlite_url):
    with connect(sqlite_url) as tables:

        class Team(pw.Model):
            id: Any = pw.AutoField()

            class Meta:
                database = tables.database

        class TeamChat(LlmChat):
            team = pw.ForeignKeyField(Team, null=True)

        with connect(tables.database, models=[TeamChat]) as store:
            tables.database.create_tables([Team])
            store.create_tables()
            team = Team.create()
            spend(store, a_chat(store, team=team))
            for given in (team, team.id):
                (row,) = usage(store, by="team", where={"team": given})
                assert (row.team, row.requests, len(chats(store, where={"team": given}))) == (team.id, 1, 1)
                (status,) = budget_status(store, [Budget("1", per="total", where={"team": given})])
                assert status.spent == Decimal("0.25")


def test_it_is_one_query(store, monkeypatch):
    spend(store, a_chat(store, user_id="ann"))
    asked: list[str] = []
    execute = store.database.execute_sql
    monkeypatch.setattr(store.database, "execute_sql", lambda text, *more: asked.append(text) or execute(text, *more))
    usage(store, by=("day", "user_id", "agent_class", "metadata.plan"), since="2026-11-01", until="2026-11-05")
    assert len([text for text in asked if "llm_request" in text]) == 1


def test_it_uses_the_index_of_times(store):
    for _ in range(3):
        spend(store)
    asked: list[Any] = []
    execute = store.database.execute_sql
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.database, "execute_sql", lambda *given: asked.append(given) or execute(*given))
        usage(store, by=("day", "model"), since="2026-11-01", until="2026-11-05", measures="cost")
    with store.connection(), store.database.atomic():
        if not store.is_sqlite:
            store.database.execute_sql("SET LOCAL enable_seqscan = off")
        explain = "EXPLAIN QUERY PLAN " if store.is_sqlite else "EXPLAIN "
        plan = " ".join(str(row) for row in execute(explain + asked[-1][0], asked[-1][1]).fetchall())
    assert "llm_request_created_at" in plan


def test_both_databases_give_the_same_rows(sqlite_url, postgres_url):
    from peewee import TextField

    found = []
    for url in (sqlite_url, postgres_url):
        pick = random.Random(5)
        with connect(url, chat_fields={"user_id": TextField(null=True)}) as store:
            store.create_tables()
            chats = [a_chat(store, user_id=f"u_{number}", metadata={"plan": "ab"[number % 2]}) for number in range(4)]
            for _ in range(80):
                spend(
                    store,
                    pick.choice([None, *chats]),
                    NOON + timedelta(minutes=pick.randrange(10_000)),
                    model=pick.choice("xyz"),
                    cost=pick.choice([None, f"{pick.random():.12f}"]),
                    duration_ms=pick.randrange(5000),
                    first_token_ms=pick.choice([None, pick.randrange(900)]),
                )
            by = ("day", "user_id", "metadata.plan", "model")
            rows = usage(store, by, since="2026-11-02", until="2026-11-10", tz="America/New_York")
            found.append([row.as_dict() for row in rows])
    assert found[0] == found[1]
    assert len(found[0]) > 80


def test_asyncio_has_it_too(store):
    spend(store)
    assert asyncio.run(ausage(store, by="model")) == usage(store, by="model")


def test_a_column_of_json_is_no_group_on_postgresql(postgres_url):
    with connect(postgres_url, chat_fields={"tags": pw.JSONField(null=True)}) as store:
        store.create_tables()
        spend(store, a_chat(store, tags=["a"]))
        with pytest.raises(InvalidValue, match=r"by=\['tags'\].* cannot be a group"):
            usage(store, by="tags")

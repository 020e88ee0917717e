"""stats(): sums over request rows, exact, made by the database."""

import asyncio
import logging
from decimal import Decimal
from typing import Any

import pytest
from conftest import Ask

from llm_orm import Chat, InvalidValue, Stats, Store, ToolError, connect, create_chat, load_chat, register_price
from llm_orm.records import uuid7
from llm_orm.sums import stats_of
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

PRICES = {"input_cost_per_token": "0.001", "output_cost_per_token": "0.01"}


def echo(text: str) -> str:
    return text


def a_chat(store: Store, *script: Any, **keywords: Any) -> Chat:
    return create_chat(store, **{"model": "test", "llm": ScriptedLLM(*script, **PRICES), **keywords})


def with_costs(store: Store, costs: list[Decimal | None]) -> Chat:
    """A chat with one request row for each of the costs."""
    chat = a_chat(store)
    values = {"chat": chat.id, "provider": "p", "model": "m", "status_code": 200, "duration_ms": 1}
    with store.connection(), store.database.atomic():
        table = store.records.request
        for start in range(0, len(costs), 100):
            table.insert_many(
                [{**values, "id": uuid7(), "cost": cost} for cost in costs[start : start + 100]]
            ).execute()
    return chat


def test_a_new_chat_has_zeros(store: Store) -> None:
    stats = a_chat(store).stats()
    assert stats == Stats(cost=Decimal(0))
    assert set(stats.as_dict().values()) == {0}
    assert type(stats.cost) is Decimal
    assert str(stats.cost) == "0"


def test_a_store_without_chats_has_zeros(store: Store) -> None:
    assert stats_of(store) == Stats()


def test_every_sum_of_a_mixed_run(store: Store, ask: Ask) -> None:
    usage = {"cached_tokens": 40, "cache_write_tokens": 20, "thinking_tokens": 7}
    chat = a_chat(
        store,
        Say("One.", input_tokens=100, output_tokens=10, cost="0.5", **usage),
        Say(calls=[Call("echo", text="a"), Call("echo", text="b")], input_tokens=200, output_tokens=20),
        ProviderError(429, "slow down", retry_after=0),
        Say("Two.", input_tokens=300, output_tokens=30),
        ProviderError(400, "no"),
        tools=[echo],
    )
    ask(chat, "First")
    ask(chat, "Second")
    with pytest.raises(ProviderError):
        ask(chat, "Third")
    chat.ask("Fourth", llm=ScriptedLLM(Say("Free?", input_tokens=1, output_tokens=1)))
    stats = chat.stats()
    requests = chat.requests()
    assert stats.as_dict() == {
        "input_tokens": 601,
        "output_tokens": 61,
        "total_tokens": 662,
        "cached_tokens": 40,
        "cache_write_tokens": 20,
        "thinking_tokens": 7,
        "cost": Decimal("0.5") + Decimal("0.2") + Decimal("0.2") + Decimal("0.3") + Decimal("0.3"),
        "requests": 6,
        "failed_requests": 2,
        "unpriced_requests": 1,
        "tool_calls": 2,
        "duration_ms": sum(request.duration_ms for request in requests),
    }
    assert len(requests) == 6


def test_each_number_comes_from_its_own_column(store: Store) -> None:
    for name in Stats.__slots__:
        assert sums_of_one_row(store, name) == expected_sums(name), name


def sums_of_one_row(store: Store, name: str) -> dict[str, Any]:
    """The sums over one row that has a number in one column."""
    columns = {
        "total_tokens": {"input_tokens": 3, "output_tokens": 4},
        "cost": {"cost": Decimal(7)},
        "failed_requests": {"error": "Boom"},
        "unpriced_requests": {"cost": None},
        "requests": {},
        "tool_calls": {},
    }.get(name, {name: 7})
    chat = with_costs(store, [])
    table = store.records.request
    row = {"chat": chat.id, "provider": "p", "model": "m", "status_code": 200, "duration_ms": 0, "cost": 0, **columns}
    with store.connection():
        table.create(**row)
        if name == "tool_calls":
            call = {"turn_id": uuid7(), "round": 0, "position": 0, "name": "echo", "arguments": "{}"}
            for number in range(7):
                store.records.tool_call.create(chat=chat.id, tool_call_id=str(number), **call)
    return chat.stats().as_dict()


def expected_sums(name: str) -> dict[str, Any]:
    counted = 1 if name in ("failed_requests", "unpriced_requests", "requests") else 7
    expected = {**dict.fromkeys(Stats.__slots__, 0), "requests": 1, name: counted}
    if name in ("input_tokens", "output_tokens"):
        expected["total_tokens"] = 7
    if name == "total_tokens":
        expected |= {"input_tokens": 3, "output_tokens": 4}
    return expected


def test_stats_are_of_one_chat_and_stats_of_all(store: Store) -> None:
    one = with_costs(store, [Decimal("0.1")])
    other = with_costs(store, [Decimal("0.2"), None])
    assert (one.stats().cost, one.stats().requests) == (Decimal("0.1"), 1)
    assert (other.stats().cost, other.stats().unpriced_requests) == (Decimal("0.2"), 1)
    assert (stats_of(store).cost, stats_of(store).requests) == (Decimal("0.3"), 3)


COSTS = [
    ["0.1", "0.2"],
    ["0.1"] * 10,
    ["0.000000000001"] * 500,
    ["1.005", "2.675", "999.999999999999"],
    ["33.333333333333"] * 300 + ["0.000000000001"] * 3,
    ["12345.678901", "0.000000000001"],
]


def test_money_adds_up_exactly(store: Store) -> None:
    for costs in COSTS:
        exact = [Decimal(cost) for cost in costs]
        assert with_costs(store, [*exact, None]).stats().cost == sum(exact)


def test_money_of_one_unpriced_request_is_zero_and_said_to_be_unpriced(store: Store) -> None:
    stats = with_costs(store, [None]).stats()
    assert (stats.cost, stats.unpriced_requests) == (Decimal(0), 1)


def test_stats_are_one_query(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    chat = a_chat(store, Call("echo", text="x"), "Done.", tools=[echo])
    chat.ask("Go")
    with caplog.at_level(logging.DEBUG, logger="peewee"):
        assert chat.stats().tool_calls == 1
    queries = [record.msg[0] for record in caplog.records if record.name == "peewee"]
    assert [query[:6] for query in queries if not query.startswith("PRAGMA")] == ["SELECT"]


def test_a_turn_that_was_rolled_back_still_counts(store: Store, ask: Ask) -> None:
    def refuse(text: str) -> str:
        raise ToolError("no", fatal=True)

    first = Say(calls=[Call("echo", text="x")], input_tokens=100, output_tokens=10, cost="1.25")
    chat = a_chat(store, first, ProviderError(503, "down"), tools=[echo], retries=0)
    with pytest.raises(ProviderError):
        ask(chat, "Go")
    stats = chat.stats()
    assert [message.role for message in chat.messages()] == ["user"]
    assert (stats.cost, stats.input_tokens, stats.output_tokens) == (Decimal("1.25"), 100, 10)
    assert (stats.requests, stats.failed_requests, stats.tool_calls) == (2, 1, 1)

    costly = ScriptedLLM(Say(calls=[Call("refuse", text="x")], cost="5"))
    with pytest.raises(ToolError):
        ask(chat, "Go", llm=costly, tools=[refuse])
    assert chat.stats().cost == Decimal("6.25")


def test_a_hook_that_stops_a_turn_after_it_was_paid_does_not_lose_the_cost(store: Store, ask: Ask) -> None:
    class TooExpensive(Exception):
        pass

    def guard(reply: Any) -> None:
        raise TooExpensive

    chat = a_chat(store, Say("Done.", cost="5")).after_response(guard)
    with pytest.raises(TooExpensive):
        ask(chat, "Go")
    assert chat.stats().cost == Decimal(5)


def test_a_price_of_ones_own_is_exact(store: Store) -> None:
    class Priceless(ScriptedLLM):
        cost_per_token = None  # type: ignore[assignment]

    register_price("house-model", input_per_million="0.075", output_per_million="0.30", cached_per_million="0.01875")
    usage = {"input_tokens": 1000, "output_tokens": 10, "cached_tokens": 400}
    chat = a_chat(store, model="house-model", llm=Priceless(*[Say("Done.", **usage)] * 3))
    for _ in range(3):
        chat.ask("Go")
    once = (600 * Decimal("0.075") + 400 * Decimal("0.01875") + 10 * Decimal("0.30")) / 1_000_000
    assert [request.cost for request in chat.requests()] == [once] * 3
    assert chat.stats().cost == 3 * once


def test_a_price_that_is_a_float_is_refused() -> None:
    with pytest.raises(InvalidValue, match=r"write '0\.1' as a string or a Decimal"):
        register_price("house-model", input_per_million=0.1, output_per_million=1)  # type: ignore[arg-type]


def test_stats_read_the_same_after_loading_and_from_asyncio(store: Store) -> None:
    chat = a_chat(store, Say("Done.", cost="0.1"), Say("Done.", cost="0.2"))
    chat.ask("Go")
    chat.ask("Go")
    loaded = load_chat(store, chat.id)
    assert loaded is not None
    assert loaded.stats() == chat.stats() == asyncio.run(chat.astats())
    assert chat.stats().cost == Decimal("0.3")


def test_stats_are_the_same_on_both_databases(sqlite_url: str, postgres_url: str) -> None:
    found = []
    for url in (sqlite_url, postgres_url):
        with connect(url) as store:
            store.create_tables()
            chat = with_costs(store, [Decimal(number) / 7 for number in range(200)])
            found.append((chat.stats(), sorted(str(request.cost) for request in chat.requests())))
    assert found[0] == found[1]

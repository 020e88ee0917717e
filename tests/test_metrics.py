"""What Prometheus scrapes: the figures of usage(), to the cent, which never fall."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from click.testing import CliRunner
from freezegun import freeze_time
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from llm_orm import (
    Budget,
    Chat,
    DatabaseUnavailable,
    InvalidValue,
    Retries,
    Store,
    connect,
    create_chat,
    load_chat,
    prune,
    recover,
    tool,
)
from llm_orm.metrics import CONTENT_TYPE, COUNTERS, GAUGES, Collector, metrics_text
from llm_orm.records import now
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM
from llm_orm.usage import usage
from llm_orm_cli import main

AT_ONCE = Retries(attempts=1, first_wait_s=0)
PRICES = {"input_cost_per_token": "0.000123456789", "output_cost_per_token": "0.1"}


@tool
def get_weather(city: str) -> str:
    """Current weather in a city."""
    return f"rain in {city}"


@tool
def fail() -> str:
    raise ValueError("no")


@tool(requires_approval=True)
def refund() -> str:
    return "refunded"


def chat_with(store: Store, *script: Any, model: str = "pro", **options: Any) -> Chat:
    llm = ScriptedLLM(*script, provider="acme", **(PRICES if options.pop("priced", True) else {}))
    return create_chat(store, model=model, llm=llm, **{"tools": [get_weather, fail, refund], **options})


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: bytes) -> Samples:
    families = text_string_to_metric_families(text.decode())
    return {(each.name, frozenset(each.labels.items())): each.value for family in families for each in family.samples}


class Scraped:
    """What a Prometheus would get of a collector that keeps nothing."""

    def __init__(self, store: Store, **options: Any):
        self.registry = CollectorRegistry()
        self.registry.register(Collector(store, **{"max_age": 0, **options}))

    def __call__(self, name: str = "", **labels: str) -> Any:
        found = samples(generate_latest(self.registry))
        if not name:
            return found
        return sum(
            value
            for (full, given), value in found.items()
            if full == f"llm_orm_{name}" and set(labels.items()) <= set(given)
        )


def talk(store: Store) -> None:
    says = Say("Let me look.", calls=[Call("get_weather", city="Rome"), Call("fail")], cached_tokens=3, input_tokens=7)
    chat = chat_with(store, ProviderError(429), says, ProviderError(404), "Rain.", fallbacks=["other"])
    chat.ask("Weather?", retries=AT_ONCE)
    chat_with(store, Say("Hm.", thinking_tokens=2), priced=False, model="free").ask("Hi")


def test_the_text_says_what_usage_says_to_the_cent(store: Store) -> None:
    talk(store)

    scraped = samples(metrics_text(store))

    def said(name: str, **labels: Any) -> Any:
        return scraped["llm_orm_" + name, frozenset({name: str(value) for name, value in labels.items()}.items())]

    for row in usage(store, ("provider", "model")):
        of = {"provider": row.provider, "model": row.model}
        assert Decimal(said("cost_dollars_total", **of)).quantize(Decimal("1e-12")) == row.cost
        assert said("unpriced_requests_total", **of) == row.unpriced_requests
        assert said("retried_requests_total", **of) == row.retried_requests
        assert said("request_seconds_total", **of) == row.duration_ms / 1000
        for kind in ("input", "output", "cached", "cache_write", "thinking"):
            assert said("tokens_total", **of, type=kind) == row[f"{kind}_tokens"]
        for quantile, measure in (("0.5", "duration_p50_ms"), ("0.95", "duration_p95_ms")):
            assert said("request_duration_seconds", **of, quantile=quantile) == row[measure] / 1000
    for row in usage(store, ("provider", "model", "source", "status")):
        assert said("requests_total", **row.by) == row.requests
    for row in usage(store, ("provider", "model", "error"), where={"error": "ProviderError"}):
        assert said("failed_requests_total", **row.by) == row.failed_requests
    for row in usage(store, "tool"):
        assert said("tool_calls_total", tool=row.tool) == row.tool_calls
        assert said("failed_tool_calls_total", tool=row.tool) == row.tool_failures
    assert said("chats") == 2
    assert [said("turns", state=state) for state in ("running", "parked", "dead")] == [0, 0, 0]
    assert sum(value for (name, _), value in scraped.items() if name == "llm_orm_failed_requests_total") == 2


def test_streams_have_the_time_to_their_first_token(store: Store) -> None:
    list(chat_with(store, "Hello!").ask_stream("Hi"))

    (row,) = usage(store, "model")
    assert Scraped(store)("first_token_seconds", quantile="0.95") == row.first_token_p95_ms / 1000


def test_a_store_with_nothing_in_it_can_be_scraped(store: Store) -> None:
    assert Scraped(store)() == {
        ("llm_orm_chats", frozenset()): 0,
        **{("llm_orm_turns", frozenset({("state", state)})): 0 for state in ("running", "parked", "dead")},
    }


@pytest.mark.parametrize("model", ['a "quoted" one', "two\nlines", "back\\slash", "ünïcode 🌧", "{le=1}", ""])
def test_a_model_may_be_called_anything(sqlite_store: Store, model: str) -> None:
    chat_with(sqlite_store, "Hello!").ask("Hi")
    with sqlite_store.connection():
        sqlite_store.records.request.update(model=model).execute()

    scraped = Scraped(sqlite_store)
    assert scraped("requests_total", model=model) == 1
    assert b"\nlines" not in generate_latest(scraped.registry)


def test_turns_that_are_not_over_are_running_parked_or_dead(store: Store) -> None:
    scraped = Scraped(store)
    seen = []

    def look(keywords: Any) -> str:
        seen.append([scraped("turns", state=state) for state in ("running", "parked", "dead")])
        return "Hello!"

    chat_with(store, Call("refund")).ask("My money!")
    chat = chat_with(store, look)
    chat.ask("Hi")
    with store.connection():
        long_ago = now() - timedelta(hours=1)
        store.records.message.create(chat=chat.id, position=9, role="assistant", status="pending", updated_at=long_ago)

    assert seen == [[1, 1, 0]]
    assert [scraped("turns", state=state) for state in ("running", "parked", "dead")] == [0, 1, 1]
    recover(store)
    assert scraped("turns", state="dead") == 0


def test_budgets_say_how_much_of_them_is_spent(sqlite_url: str) -> None:
    budgets = [Budget("1", by="chat", name="of a chat"), Budget("100", name="of all")]
    with connect(sqlite_url, budgets=budgets) as store:
        store.create_tables()
        for words in ("a b c d", " ".join("x" * 10)):
            chat_with(store, words).ask("Hi")

        scraped = Scraped(store)
        spent = usage(store, ())[0].cost
        assert scraped("budget_share", budget="of all") == pytest.approx(float(spent / 100))
        assert scraped("budget_share", budget="of a chat") == pytest.approx(1.000123456789)
        assert scraped("budget_exceeded", budget="of a chat") == 1
        assert scraped("budget_exceeded", budget="of all") == 0


# Counters do not fall


def age(store: Store, by: timedelta) -> None:
    """Make all that there is older."""
    for record in (store.records.chat, store.records.message, store.records.tool_call, store.records.request):
        table: Any = record
        with store.connection():
            for row in table.select():
                changed = {"created_at": row.created_at - by}
                if hasattr(row, "updated_at"):
                    changed["updated_at"] = row.updated_at - by
                table.update(changed).where(table.id == row.id).execute()


@pytest.mark.parametrize("age_of_it", [timedelta(minutes=1), timedelta(days=90)])
def test_a_counter_goes_on_from_where_it_was_when_its_rows_are_deleted(store: Store, age_of_it: timedelta) -> None:
    chat_with(store, Call("get_weather", city="Rome"), "Rain.").ask("Weather?")
    age(store, age_of_it)
    scraped = Scraped(store)
    before = scraped()

    pruned = prune(store, older_than=30)
    assert pruned.requests == 2
    after = scraped()
    gauges = {f"llm_orm_{name}" for name in GAUGES}
    assert {key: value for key, value in after.items() if key[0] not in gauges} == {
        key: value for key, value in before.items() if key[0] not in gauges
    }
    assert (before["llm_orm_chats", frozenset()], after["llm_orm_chats", frozenset()]) == (1, 0)

    chat_with(store, "Hello!").ask("Hi")
    assert scraped("requests_total") == 3
    spent = before["llm_orm_cost_dollars_total", frozenset({("provider", "acme"), ("model", "pro")})]
    assert scraped("cost_dollars_total") == pytest.approx(spent + float(usage(store, ())[0].cost))
    assert scraped("tool_calls_total") == 1


def test_a_process_that_starts_after_rows_were_deleted_says_what_is_there(store: Store) -> None:
    chat_with(store, "Hello!").ask("Hi")
    age(store, timedelta(days=90))
    prune(store, older_than=30, keep_requests=True)
    assert Scraped(store)("requests_total") == 1

    prune(store, older_than=30)
    assert Scraped(store)("requests_total") == 0


def test_what_is_settled_is_summed_once_and_what_is_new_each_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, Any]] = []

    def watched(*arguments: Any, since: Any = None, until: Any = None, **options: Any) -> Any:
        if "requests" in options["measures"]:
            asked.append((since, until))
        return usage(*arguments, since=since, until=until, **options)

    monkeypatch.setattr("llm_orm.metrics.usage", watched)
    scraped = Scraped(store)
    with freeze_time("2026-11-25 12:30:00+00:00") as clock:
        for hours in (0, 0, 2, 30):
            clock.tick(timedelta(hours=hours))
            chat_with(store, Call("get_weather", city="Rome"), "Rain.").ask("Hi")
            everything, tools = usage(store, ())[0], usage(store, "tool")[0]
            assert scraped("requests_total") == everything.requests
            assert scraped("cost_dollars_total") == pytest.approx(float(everything.cost))
            assert scraped("tool_calls_total") == tools.tool_calls

    first, second, third = (datetime(2026, 11, day, hour, tzinfo=UTC) for day, hour in ((25, 6), (25, 8), (26, 14)))
    settled = [(since, until) for since, until in asked if until is not None]
    assert settled == [(None, first), (first, second), (second, third)]
    assert {since for since, until in asked if until is None} == {first, second, third}


def test_a_cost_that_is_known_later_is_counted_then(store: Store) -> None:
    chat_with(store, "Hello!", priced=False).ask("Hi")
    scraped = Scraped(store)
    assert scraped("cost_dollars_total") == 0

    with store.connection():
        store.records.request.update(cost=Decimal("0.25")).execute()
    assert scraped("cost_dollars_total") == 0.25


def test_a_tool_call_that_waited_and_failed_is_counted_once(store: Store) -> None:
    @tool(requires_approval=True, name="refund")
    def broken() -> str:
        raise ValueError("no")

    chat = chat_with(store, Call("refund"), "Done.", tools=[broken])
    chat.ask("My money!")
    scraped = Scraped(store)
    assert (scraped("tool_calls_total"), scraped("failed_tool_calls_total")) == (1, 0)

    chat.approve(chat.pending_approvals()[0])
    chat.resume()
    assert (scraped("tool_calls_total"), scraped("failed_tool_calls_total")) == (1, 1)


# Scraping


def test_to_scrape_often_asks_the_database_seldom(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("llm_orm.metrics.time.monotonic", lambda: clock[0])
    scraped = Scraped(sqlite_store, max_age=15)
    assert scraped("requests_total") == 0
    chat_with(sqlite_store, "Hello!").ask("Hi")

    clock[0] += 14
    assert scraped("requests_total") == 0
    clock[0] += 1
    assert scraped("requests_total") == 1


def test_the_text_of_a_store_is_kept_with_it(sqlite_store: Store) -> None:
    before = metrics_text(sqlite_store)
    chat_with(sqlite_store, "Hello!").ask("Hi")

    assert metrics_text(sqlite_store) == before
    assert CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"


def test_to_register_asks_nothing_of_the_database(sqlite_url: str) -> None:
    registry = CollectorRegistry(auto_describe=True)
    with connect(sqlite_url) as store:  # which has no tables
        registry.register(Collector(store))
        with pytest.raises(ValueError, match="Duplicated timeseries"):
            registry.register(Collector(store))


def test_a_database_that_is_not_there_fails_the_scrape() -> None:
    with connect("postgresql://nobody@127.0.0.1:1/none") as store, pytest.raises(DatabaseUnavailable):
        metrics_text(store)


@pytest.mark.parametrize("max_age", [-1, "15", True, float("nan")])
def test_max_age_is_seconds(sqlite_store: Store, max_age: Any) -> None:
    with pytest.raises(InvalidValue, match="max_age must be seconds, 0 or more"):
        Collector(sqlite_store, max_age=max_age)


def test_every_metric_has_its_help_and_its_kind(sqlite_store: Store) -> None:
    text = metrics_text(sqlite_store).decode()

    for name in COUNTERS:
        assert f"# TYPE llm_orm_{name}_total counter\n" in text
    for name in GAUGES:
        assert f"# TYPE llm_orm_{name} gauge\n" in text


def test_the_command_prints_the_text(sqlite_url: str) -> None:
    with connect(sqlite_url) as store:
        store.create_tables()
        chat_with(store, "Hello!").ask("Hi")
        assert load_chat(store, chat_with(store, "Hello!").id) is not None
        text = metrics_text(store)

    result = CliRunner().invoke(main, ["metrics", "--database-url", sqlite_url])

    assert result.exit_code == 0
    assert result.stdout_bytes == text

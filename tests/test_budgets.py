"""Budgets: what may be spent in a period, by whom, checked in the database before each call of a model."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from conftest import CHAT_FIELDS, Ask, rows
from freezegun import freeze_time

from llm_orm import (
    REPLACE,
    Agent,
    AsyncTool,
    Budget,
    BudgetExceeded,
    BudgetStatus,
    Chat,
    ChatGone,
    InvalidValue,
    LlmOrmError,
    Middleware,
    Store,
    TurnFailed,
    UnknownKeyword,
    abudget_status,
    budget_status,
    connect,
    create_agent_session,
    create_chat,
    erase,
    load_chat,
    tool,
    usage,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

A_DOLLAR = Say("Hi.", cost="1")


@tool
def look() -> str:
    """Look around."""
    return "rain"


def chat_in(store: Store, *script: Any, **options: Any) -> Chat:
    return create_chat(store, **{"model": "test", "llm": ScriptedLLM(*script), **options})


@contextmanager
def kept(database_url: str, *budgets: Budget) -> Iterator[Store]:
    """The tables of the `store`, with budgets for all chats."""
    with connect(database_url, chat_fields=CHAT_FIELDS, budgets=budgets) as store:
        yield store


def calls_of(chat: Chat) -> int:
    return len(chat.options.llm.requests)


# The check


def test_a_call_is_refused_once_the_limit_is_spent(store: Store, database_url: str, ask: Ask):
    with kept(database_url, Budget("2.50", by="user_id", name="per user")) as shop:
        chat = chat_in(shop, *[A_DOLLAR] * 4, user_id="u_1")
        for _ in range(3):
            ask(chat, "Hi")
        with pytest.raises(BudgetExceeded) as raised:
            ask(chat, "More")
        assert calls_of(chat) == 3
        assert [message.role for message in chat.messages()] == ["user", "assistant"] * 3 + ["user"]
        assert len(rows(store, "request", "id")) == 3
        error = raised.value
        assert isinstance(error, TurnFailed)
        assert (error.who, error.spent, error.limit) == ({"user_id": "u_1"}, 3, Decimal("2.5"))
        assert error.budget is shop.budgets[0]
        assert str(error).startswith("the budget 'per user' of user_id='u_1' is spent: $3 of $2.5, and the next call,")
        assert f"It resets at {error.resets_at}; or raise the limit" in str(error)
        assert ask(chat_in(shop, A_DOLLAR, user_id="u_2"), "Hi").content == "Hi."


def test_it_is_looked_up_before_each_round_of_tools(store: Store):
    chat = chat_in(store, Say(calls=[Call("look")], cost="1"), "never", tools=[look], budgets=[Budget(1)])
    with pytest.raises(BudgetExceeded):
        chat.ask("Look.")
    assert calls_of(chat) == 1
    assert rows(store, "tool_call", "status", "result") == [("completed", "rain")]
    assert rows(store, "request", "cost") == [(1,)]


def test_it_is_looked_up_before_a_retry_and_is_no_reason_for_one(store: Store):
    def fail(keywords: Any) -> ProviderError:
        chat_in(store, A_DOLLAR).ask("Hi")  # somebody else is faster
        return ProviderError(500, retry_after=0)

    chat = chat_in(store, fail, "never", retries=2, fallbacks=["other"], budgets=[Budget(1, by="user_id")])
    with pytest.raises(BudgetExceeded):
        chat.ask("Hi")
    assert calls_of(chat) == 1
    assert rows(store, "request", "status_code") == [(200,), (500,)]


def test_it_is_looked_up_before_a_fallback(store: Store):
    llm = ScriptedLLM(ProviderError(401), "never")
    chat = create_chat(store, model="test", llm=llm, fallbacks=["other"])
    chat.with_budgets(Budget(1, by="model", where={"model": "other"}, per="total"))
    chat_in(store, A_DOLLAR, model="other").ask("Hi")
    with pytest.raises(BudgetExceeded, match="It never resets: raise the limit") as raised:
        chat.ask("Hi")
    assert (raised.value.who, raised.value.resets_at) == ({"model": "other"}, None)
    assert calls_of(chat) == 1


def test_middlewares_hear_of_it_and_may_put_a_reply_in_its_place(store: Store):
    class Apology(Middleware):
        def on_error(self, context: Any, error: Exception) -> Any:
            return REPLACE("Come back tomorrow.") if isinstance(error, BudgetExceeded) else None

    chat = chat_in(store, A_DOLLAR, "never", budgets=[Budget(1)], middlewares=[Apology()])
    assert [chat.ask("Hi").content for _ in range(2)] == ["Hi.", "Come back tomorrow."]
    assert calls_of(chat) == 1


def test_with_n_calls_under_way_the_spend_ends_below_the_limit_and_the_cost_of_these(store: Store, database_url: str):
    at_once, limit = 6, Decimal("3.5")
    barrier = threading.Barrier(at_once)

    def together(keywords: Any) -> Say:
        barrier.wait(timeout=30)  # all of them have been checked, and none is on record
        return Say("Hi.", cost="2")

    with kept(database_url, Budget(limit, warn=())) as shop:
        chat_in(shop, Say("Hi.", cost="3.4")).ask("Hi")
        chats = [chat_in(shop, together, "never") for _ in range(at_once)]
        with ThreadPoolExecutor(at_once) as threads:
            list(threads.map(lambda chat: chat.ask("Hi"), chats))
        (status,) = budget_status(shop)
        assert status.spent == Decimal("3.4") + at_once * 2 < limit + at_once * 2
        for chat in chats:
            with pytest.raises(BudgetExceeded):
                chat.ask("More")


# Whose limit


def test_each_way_to_say_by_whom_counts_those_alone(store: Store):
    class Support(Agent):
        model = "test"

    chats = {
        "user_id": [chat_in(store, A_DOLLAR, user_id=name) for name in ("u_1", "u_2")],
        "metadata.plan": [chat_in(store, A_DOLLAR, metadata={"plan": plan}) for plan in ("free", 7, None)],
        "model": [chat_in(store, A_DOLLAR, model=name) for name in ("m1", "m2")],
        "provider": [chat_in(store, llm=ScriptedLLM(A_DOLLAR, provider=name)) for name in ("p1", "p2")],
        "agent_class": [create_agent_session(store, Support, llm=ScriptedLLM(A_DOLLAR))],
        "chat": [chat_in(store, A_DOLLAR)],
    }
    for each in chats.values():
        for chat in each:
            chat.ask("Hi")
    for by, each in chats.items():
        found = {str(status.who[by]): status.spent for status in budget_status(store, [Budget(9, by=by)])}
        counted = {str(row[by]): row.cost for row in usage(store, by=(by,)) if row[by] is not None}
        assert counted.items() <= found.items()
        assert sum(found.values()) == 11
        for chat in each:
            chat.options.llm.add("never")
            with pytest.raises(BudgetExceeded) as raised:
                chat.ask("Hi", budgets=[Budget(1, by=by)])
            assert raised.value.spent == found[str(raised.value.who[by])]


def test_those_without_a_value_share_one_limit(store: Store):
    for _ in range(2):
        chat_in(store, A_DOLLAR).ask("Hi")
    with pytest.raises(BudgetExceeded, match="of user_id=None is spent: \\$2 of"):
        chat_in(store, "never", budgets=[Budget(2, by="user_id")]).ask("Hi")
    assert chat_in(store, "Hi.", user_id="u_1", budgets=[Budget(2, by="user_id")]).ask("Hi")


def test_a_budget_of_a_chat_counts_that_chat_and_one_of_the_store_all(store: Store, database_url: str):
    with kept(database_url, Budget(3)) as shop:
        first = chat_in(shop, *[A_DOLLAR] * 2, budgets=[Budget(2, per="hour")])
        second = chat_in(shop, *[A_DOLLAR] * 2, budgets=[Budget(2, per="hour")])
        for chat in (first, first, second):
            chat.ask("Hi")
        with pytest.raises(BudgetExceeded) as of_all:
            second.ask("Hi")
        assert (of_all.value.who, of_all.value.spent) == ({}, 3)
    with pytest.raises(BudgetExceeded) as of_one:
        load_chat(store, first.id, llm=ScriptedLLM("never"), budgets=[Budget(2, per="hour")]).ask("Hi")  # type: ignore[union-attr]
    assert (of_one.value.who, of_one.value.spent) == ({"chat": first.id}, 2)


def test_where_says_whose_spend_counts_and_who_is_refused(store: Store, database_url: str):
    where = {"metadata.plan": ["free", "trial"], "user_id": "u_1", "model": "test"}
    with kept(database_url, Budget(1, where=where)) as shop:
        free = chat_in(shop, *[A_DOLLAR] * 2, user_id="u_1", metadata={"plan": "free"})
        gold = chat_in(shop, *[A_DOLLAR] * 2, user_id="u_1", metadata={"plan": "gold"})
        for chat in (gold, free, gold):
            chat.ask("Hi")
        assert [status.spent for status in budget_status(shop)] == [1]
        with pytest.raises(BudgetExceeded):
            free.ask("Hi")
        assert free.ask("Hi", model="other").content == "Hi."


def test_a_budget_of_one_turn_does_away_with_none_of_the_chats(store: Store):
    chat = chat_in(store, A_DOLLAR, "never").with_budgets(Budget(1))
    chat.ask("Hi")
    with pytest.raises(BudgetExceeded):
        chat.ask("Hi", budgets=[Budget(100)])


def test_an_agent_may_have_budgets(store: Store):
    class Frugal(Agent):
        model = "test"
        budgets = [Budget(1)]

    session = create_agent_session(store, Frugal, llm=ScriptedLLM(A_DOLLAR, "never"))
    session.ask("Hi")
    with pytest.raises(BudgetExceeded):
        session.ask("Hi")


def test_what_other_code_made_of_the_chats_columns_counts(store: Store):
    chat = chat_in(store, A_DOLLAR, "never", user_id="u_1")
    chat.ask("Hi")
    record = store.records.chat
    with store.connection():
        record.update(user_id="u_9").where(record.id == chat.id).execute()
    with pytest.raises(BudgetExceeded, match="user_id='u_9'"):
        chat.ask("Hi", budgets=[Budget(1, by="user_id")])


def test_unpriced_calls_count_nothing(store: Store):
    chat = chat_in(store, *["Hi."] * 3, budgets=[Budget("0.000000000001")])
    for _ in range(3):
        chat.ask("Hi")
    assert calls_of(chat) == 3


def test_deleted_chats_count_where_a_budget_is_not_about_chats_and_erased_ones_everywhere(store: Store):
    budgets = [Budget(9, name="all"), Budget(9, by="model"), Budget(9, by="user_id"), Budget(9, by="chat")]
    deleted, erased = (chat_in(store, A_DOLLAR, user_id="u_1") for _ in range(2))
    for chat in (deleted, erased):
        chat.ask("Hi")
    deleted.delete()
    erase(store, {"id": erased.id})
    assert [(status.who, status.spent) for status in budget_status(store, budgets)] == [
        ({}, 2),
        ({"model": "test"}, 2),
        ({"user_id": "u_1"}, 1),
        ({"chat": erased.id}, 1),
    ]


def test_a_chat_that_was_deleted_calls_no_model(store: Store):
    chat = chat_in(store, "never", budgets=[Budget(1, by="user_id")])
    chat.before_request(lambda messages: load_chat(store, chat.id).delete())  # type: ignore[union-attr]
    with pytest.raises(ChatGone):
        chat.ask("Hi")
    assert calls_of(chat) == 0


def test_sums_are_exact(store: Store):
    chat = chat_in(store, *[Say("Hi.", cost="0.1")] * 10, "never", budgets=[Budget(1)], history=1)
    for _ in range(10):
        chat.ask("Hi")
    with pytest.raises(BudgetExceeded) as raised:
        chat.ask("Hi")
    assert raised.value.spent == 1


# Periods


@pytest.mark.parametrize(
    ("budget", "spent_at", "refused_at", "free_at"),
    [
        (Budget(1, "hour"), "2026-11-02 10:00:00", "2026-11-02 10:59:59", "2026-11-02 11:00:00"),
        (Budget(1, "day"), "2026-11-02 00:00:00", "2026-11-02 23:59:59", "2026-11-03 00:00:00"),
        (Budget(1, "week"), "2026-11-02 00:00:00", "2026-11-08 23:59:59", "2026-11-09 00:00:00"),
        (Budget(1, "month"), "2026-11-01 00:00:00", "2026-11-30 23:59:59", "2026-12-01 00:00:00"),
        # 23 hours: clocks go from 02:00 to 03:00.
        (Budget(1, tz="Europe/Berlin"), "2026-03-28 23:00:00", "2026-03-29 21:59:59", "2026-03-29 22:00:00"),
        (Budget(1, "month", tz="Europe/Berlin"), "2026-02-28 23:00:00", "2026-03-31 21:59:59", "2026-03-31 22:00:00"),
        (Budget(1, "hour", tz="Asia/Kolkata"), "2026-11-02 10:30:00", "2026-11-02 11:29:59", "2026-11-02 11:30:00"),
    ],
    ids=lambda given: given.label if isinstance(given, Budget) else "",
)
def test_a_budget_resets_where_the_next_period_begins(
    store: Store, budget: Budget, spent_at: str, refused_at: str, free_at: str
):
    chat = chat_in(store, A_DOLLAR, "Again.", budgets=[budget])
    with freeze_time(spent_at, real_asyncio=True):
        chat.ask("Hi")
    with freeze_time(refused_at, real_asyncio=True), pytest.raises(BudgetExceeded) as raised:
        chat.ask("Hi")
    assert raised.value.resets_at == datetime.fromisoformat(free_at).replace(tzinfo=UTC)
    with freeze_time(free_at, real_asyncio=True):
        assert chat.retry().content == "Again."


def test_the_hour_that_is_there_twice_is_two():
    budget = Budget(1, "hour", tz="Europe/Berlin")
    for hour in (0, 1):  # 02:59 of summer, 02:59 of winter
        period = budget.period_at(datetime(2026, 10, 25, hour, 59, tzinfo=UTC))
        assert [each and each.astimezone(UTC).hour for each in period] == [hour, hour + 1]


# Warnings


def test_a_share_is_told_of_by_whoever_reaches_it(store: Store, ask: Ask):
    told: list[tuple[BudgetStatus, Decimal]] = []
    budget = Budget(10, warn=(0.5, "0.8"), on_warn=lambda status, share: told.append((status, share)))
    chat = chat_in(store, *[Say("Hi.", cost="3")] * 4, budgets=[budget])
    heard = []
    for _ in range(4):
        ask(chat, "Hi")
        heard.append([(status.who, status.spent, share) for status, share in told])
        told.clear()
    who = {"chat": chat.id}
    assert heard == [[], [(who, 6, Decimal("0.5"))], [(who, 9, Decimal("0.8"))], []]


def test_a_share_is_told_of_in_the_middle_of_a_turn_and_once(store: Store):
    told: list[Any] = []
    script = [Say(calls=[Call("look")], cost="5"), Say(calls=[Call("look")], cost="1"), Say("Rain.", cost="1")]
    chat = chat_in(store, *script, tools=[look])
    chat.with_budgets(
        Budget(10, warn=(0.5,), on_warn=lambda status, share: told.append((calls_of(chat), status.spent)))
    )
    chat.ask("Look.")
    assert told == [(1, 5)]


def test_a_turn_that_fails_tells_of_what_it_had_reached(store: Store):
    told: list[Any] = []
    llm = ScriptedLLM(Say("It was", error=ProviderError(400)), input_cost_per_token="1", output_cost_per_token="1")
    budget = Budget(4, warn=(0.5,), on_warn=lambda status, share: told.append(status.spent))
    chat = create_chat(store, model="test", llm=llm, budgets=[budget])
    with pytest.raises(ProviderError):
        list(chat.ask_stream("Hi"))
    assert told == [3] == [chat.stats().cost]


def test_what_a_model_reached_is_told_of_although_another_answers(store: Store):
    told: list[Any] = []
    broken = Say(None, calls=[Call("look")], error=ProviderError(500))  # a stream of which nothing was shown
    llm = ScriptedLLM(broken, "Hi.", input_cost_per_token="1", output_cost_per_token="1")
    budget = Budget(9, by="model", warn=(0.1,), on_warn=lambda status, share: told.append(status.who["model"]))
    chat = create_chat(store, model="test", llm=llm, budgets=[budget], retries=0)
    list(chat.with_fallbacks("other").ask_stream("Hi"))
    assert told == ["test", "other"]


def test_what_on_warn_raises_costs_nobody_a_reply(store: Store, ask: Ask, caplog: pytest.LogCaptureFixture):
    def broken(status: BudgetStatus, share: Decimal) -> None:
        raise RuntimeError("no mail server")

    chat = chat_in(store, Say(calls=[Call("look")], cost="5"), Say("Rain.", cost="4"), tools=[look])
    chat.with_budgets(Budget(10, warn=(0.5, 0.9), on_warn=broken))
    assert ask(chat, "Look.").content == "Rain."
    assert rows(store, "request", "cost") == [(5,), (4,)]
    failures = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert [text.partition(": ")[2] for text in failures] == [
        "$5 of $10; on_warn failed: no mail server",
        "$9 of $10; on_warn failed: no mail server",
    ]


def test_on_warn_may_be_async_and_then_a_plain_ask_is_refused(store: Store):
    told: list[Any] = []

    async def tell(status: BudgetStatus, share: Decimal) -> None:
        await asyncio.sleep(0)
        told.append(status.spent)

    chat = chat_in(store, A_DOLLAR, budgets=[Budget(1, on_warn=tell)])
    with pytest.raises(AsyncTool, match=r"the on_warn of a budget .* is async: use aask\(\)"):
        chat.ask("Hi")
    assert rows(store, "message", "role") == []
    asyncio.run(chat.aask("Hi"))
    assert told == [1]


def test_without_a_function_to_call_it_is_logged(store: Store, caplog: pytest.LogCaptureFixture):
    chat_in(store, A_DOLLAR, budgets=[Budget("1.25", by="user_id")], user_id="u_1").ask("Hi")
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("llm_orm", logging.WARNING)
    assert record.getMessage() == (
        "the budget '$1.25 per day by user_id' of user_id='u_1' has reached 80%: $1 of $1.25"
    )


def test_a_share_of_a_new_period_is_told_of_anew(store: Store):
    told: list[Any] = []
    days = iter(["2026-11-02 23:59:00", "2026-11-03 00:01:00"])

    def at_midnight(keywords: Any) -> Say:
        frozen.move_to(next(days))
        return Say(calls=[Call("look")], cost="9") if len(told) == 0 else Say("Rain.", cost="9")

    chat = chat_in(store, at_midnight, at_midnight, tools=[look])
    chat.with_budgets(Budget(10, on_warn=lambda status, share: told.append(status.resets_at.day)))  # type: ignore[union-attr]
    with freeze_time("2026-11-02 23:58:00", real_asyncio=True) as frozen:
        chat.ask("Look.")
    assert told == [3, 4]


def test_a_look_at_the_end_that_fails_costs_nobody_a_reply(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    chat = chat_in(store, A_DOLLAR, budgets=[Budget(1)])
    read = store.read

    def broken(statement: Any) -> Any:
        if "SUM(" in statement.text and calls_of(chat):
            raise LlmOrmError("the database is gone")
        return read(statement)

    monkeypatch.setattr(store, "read", broken)
    assert chat.ask("Hi").content == "Hi."
    assert "what is left of the budgets could not be read: the database is gone" in caplog.text


# Where they stand


def test_the_status_says_where_each_budget_stands_the_highest_share_first(store: Store, database_url: str):
    with kept(database_url, Budget(10, name="all"), Budget("2.00", "week", by="user_id")) as shop:
        for name, cost in (("u_1", "1"), ("u_2", "1.5"), ("u_2", "1.5")):
            chat_in(shop, Say("Hi.", cost=cost), user_id=name).ask("Hi")
        found = budget_status(shop)
        assert [(each.budget.label, each.who, each.spent, each.remaining) for each in found] == [
            ("$2 per week by user_id", {"user_id": "u_2"}, 3, 0),
            ("$2 per week by user_id", {"user_id": "u_1"}, 1, 1),
            ("all", {}, 4, 6),
        ]
        assert [(each.share, each.is_exceeded) for each in found] == [
            (Decimal("1.5"), True),
            (Decimal("0.5"), False),
            (Decimal("0.4"), False),
        ]
        assert all(each.resets_at == each.budget.period_at(datetime.now(UTC))[1] for each in found)
        assert asyncio.run(abudget_status(shop)) == found
        assert found[2].spent == usage(shop, by=())[0].cost


def test_a_budget_for_all_stands_at_nothing_before_anything_is_spent(store: Store):
    found = budget_status(store, [Budget(10), Budget(10, by="user_id")])
    assert [(each.who, each.spent) for each in found] == [({}, 0)]


# What is refused


@pytest.mark.parametrize("limit", [0, -1, "free", 1.5, True, None, "NaN"])
def test_a_limit_is_money(limit: Any):
    with pytest.raises(InvalidValue, match="the limit of a Budget must be US dollars, over 0"):
        Budget(limit)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"per": "year"}, "a Budget is per hour, day, week, month, total, not 'year'"),
        ({"by": ""}, "the by of a Budget is"),
        ({"by": "metadata."}, "the by of a Budget is"),
        ({"where": {}}, "the where of a Budget is like"),
        ({"where": {"user_id": []}}, "user_id=\\[\\]: that is never so"),
        ({"where": {"chat": "c_1"}}, "chat='c_1': that is never so, or cannot be compared"),
        ({"where": {"metadata.plan": None}}, "metadata.plan=None"),
        ({"where": {"model": 4}}, "model=4"),
        ({"where": {"user_id": {"in": "u"}}}, "cannot be compared"),
        ({"tz": "Berlin"}, "tz='Berlin' is not a time zone"),
        ({"warn": (80,)}, "shares of its limit, over 0 and up to 1"),
        ({"warn": 0.8}, "shares of its limit"),
        ({"on_warn": "mail"}, "must be a function"),
        ({"name": ""}, "must be some text"),
    ],
)
def test_what_makes_no_budget_is_refused_when_it_is_made(wrong: dict[str, Any], message: str):
    with pytest.raises(InvalidValue, match=message):
        Budget(1, **wrong)


def test_a_name_that_the_store_does_not_know_is_refused_before_anything_is_written(store: Store, database_url: str):
    wrong = Budget(1, by="usr_id")

    class Wrong(Agent):
        model = "test"
        budgets = [wrong]

    chat = chat_in(store, "never")
    for give in (
        lambda: connect(database_url, chat_fields=CHAT_FIELDS, budgets=[wrong]),
        lambda: create_chat(store, budgets=[wrong]),
        lambda: load_chat(store, chat.id, budgets=[Budget(1, where={"usr_id": "u_1"})]),
        lambda: chat.with_budgets(wrong),
        lambda: chat.ask("Hi", budgets=[wrong]),
        lambda: create_agent_session(store, Wrong),
        lambda: budget_status(store, [wrong]),
    ):
        with pytest.raises(UnknownKeyword, match=r"a Budget cannot be by 'usr_id'.*did you mean 'user_id'\?"):
            give()
    with pytest.raises(InvalidValue, match=r"budgets must be a list of budgets, as \[Budget"):
        create_chat(store, budgets=Budget(1))
    assert rows(store, "chat", "id") == [(chat.id,)]
    assert rows(store, "message", "id") == []


def test_a_budget_needs_the_rows_that_it_sums_up(store: Store):
    chat = chat_in(store, "never", budgets=[Budget(1)], persistence={"requests": False})
    with pytest.raises(InvalidValue, match='"requests": False'):
        chat.ask("Hi")
    assert rows(store, "message", "role") == []


def test_a_store_without_budgets_asks_nothing(store: Store, monkeypatch: pytest.MonkeyPatch):
    texts: list[str] = []
    read = store.read
    monkeypatch.setattr(store, "read", lambda statement: texts.append(statement.text) or read(statement))
    chat = chat_in(store, "Hi.", "Hi.")
    chat.ask("Hi")
    without = len(texts)
    chat.ask("Hi", budgets=[Budget(1)])
    assert not any("SUM(" in text for text in texts[:without])
    assert any("SUM(" in text for text in texts[without:])


def test_a_session_spends_what_its_own_metadata_says(store: Store, database_url: str):
    class Helper(Agent):
        model = "test"

    with kept(database_url, Budget(1, by="metadata.plan", where={"metadata.plan": "free"})) as shop:
        for plan, calls in (("free", 1), ("pro", 2)):
            session = create_agent_session(shop, Helper, metadata={"plan": plan}, llm=ScriptedLLM(*[A_DOLLAR] * 2))
            session.ask("Hi")
            if calls == 1:
                with pytest.raises(BudgetExceeded, match=r"metadata\.plan='free'"):
                    session.ask("More")
            else:
                session.ask("More")
        (status,) = budget_status(shop)
        assert (status.who, status.spent) == ({"metadata.plan": "free"}, 1)


def test_a_key_that_no_database_can_hold_is_refused():
    with pytest.raises(InvalidValue, match="the by of a Budget is"):
        Budget(1, by="metadata.a\0")

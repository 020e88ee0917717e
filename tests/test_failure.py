"""Turns that fail: what is rolled back, what is kept, what the caller gets, and that no paid call is ever lost."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from typing import Any

import peewee as pw
import pytest
from conftest import WAYS, Ask, rows

from llm_orm import (
    Chat,
    ChatGone,
    DatabaseUnavailable,
    NothingToRetry,
    ReplyNotSaved,
    Retries,
    Store,
    StoreClosed,
    TablesMissing,
    ToolError,
    connect,
    create_chat,
    load_chat,
    tool,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

AT_ONCE = Retries(attempts=2, first_wait_s=0.0)
LONDON, PARIS = Call("get_weather", city="London"), Call("get_weather", city="Paris")
STREAMS = ["ask_stream", "aask_stream"]


@tool
def get_weather(city: str) -> str:
    return f"rain in {city}"


@tool
def stop() -> str:
    raise ToolError("the order is locked", fatal=True)


def chat_with(store: Store, *script: Any, **options: Any) -> Chat:
    return create_chat(store, model="test", llm=ScriptedLLM(*script), **options)


def sent(chat: Chat) -> list[tuple[str, str | None]]:
    """What the model was shown on its last call: (role, content)."""
    return [(message["role"], message["content"]) for message in chat.options.llm.requests[-1]["messages"]]


# Rollback


def test_a_failed_turn_leaves_the_question_alone_and_raises_the_providers_own_error(store, ask):
    error = ProviderError(400, "no such thing")
    with pytest.raises(ProviderError) as raised:
        ask(chat_with(store, error), "Hi")
    assert raised.value is error
    assert not getattr(error, "__notes__", [])
    assert rows(store, "message", "position", "role", "status", "content") == [(0, "user", "completed", "Hi")]


def test_a_failed_request_keeps_its_error(store, ask):
    """NodeLLM's C8: failed calls were not logged at all, and the status was always 200."""
    with pytest.raises(ProviderError):
        ask(chat_with(store, ProviderError(400, "no such thing")), "Hi")
    columns = "status_code", "error", "error_message", "input_tokens", "output_tokens", "cost", "provider", "model"
    assert rows(store, "request", *columns) == [
        (400, "ProviderError", "no such thing", 0, 0, Decimal(0), "scripted", "test")
    ]
    assert rows(store, "request", "message", "finish_reason", "attempt", "round") == [(None, None, 1, 0)]


def test_a_call_that_reached_nobody_knows_of_has_no_status_and_no_cost(store, ask):
    with pytest.raises(ConnectionError):
        ask(chat_with(store, ConnectionError("reset by peer")), "Hi", retries=0)
    assert rows(store, "request", "status_code", "error", "cost") == [(0, "ConnectionError", None)]


def test_what_was_billed_before_a_failure_stays_on_record(store, ask):
    """NodeLLM's C5: $1.25 for the first call, then a 503, and stats() said nothing was spent."""
    first = Say(calls=[LONDON], cost="1.25", input_tokens=100, output_tokens=20)
    chat = chat_with(store, first, ProviderError(503), tools=[get_weather])
    with pytest.raises(ProviderError):
        ask(chat, "Weather?", retries=0)
    stats = chat.stats()
    assert (stats.cost, stats.input_tokens, stats.output_tokens) == (Decimal("1.25"), 100, 20)
    assert (stats.requests, stats.failed_requests, stats.tool_calls) == (2, 1, 1)
    assert rows(store, "tool_call", "status", "result", "message") == [("completed", "rain in London", None)]


def test_an_overspend_that_a_hook_refuses_stays_on_record(store, ask):
    """NodeLLM's C6: a cost guard that tripped erased the overspend."""
    chat = chat_with(store, Say(calls=[LONDON], cost="5.00"), tools=[get_weather])

    @chat.after_response
    def guard(reply: Any) -> None:
        if reply.cost > 1:
            raise RuntimeError(f"{reply.cost} is too much")

    with pytest.raises(RuntimeError, match=r"5\.00 is too much"):
        ask(chat, "Weather?")
    assert chat.stats().cost == Decimal(5)
    assert rows(store, "message", "role") == [("user",)]


def test_every_attempt_has_its_own_row(store, ask):
    """NodeLLM's C8: retries were invisible."""
    script = ProviderError(503, "busy"), ProviderError(429, "slow down", retry_after=0), "Hello!"
    reply = ask(chat_with(store, *script), "Hi", retries=AT_ONCE)
    assert rows(store, "request", "attempt", "status_code", "error_message") == [
        (1, 503, "busy"),
        (2, 429, "slow down"),
        (3, 200, None),
    ]
    assert {row[0] for row in rows(store, "request", "message")} == {reply.id}
    assert rows(store, "message", "content") == [("Hi",), ("Hello!",)]


def test_attempts_that_all_fail_are_all_on_record(store, ask):
    last = ProviderError(502, "three")
    with pytest.raises(ProviderError) as raised:
        ask(chat_with(store, ProviderError(500, "one"), ProviderError(503, "two"), last), "Hi", retries=AT_ONCE)
    assert raised.value is last
    assert rows(store, "request", "attempt", "status_code") == [(1, 500), (2, 503), (3, 502)]


def test_what_cannot_succeed_is_not_tried_again(store, ask):
    llm = ScriptedLLM(ProviderError(400), "never")
    with pytest.raises(ProviderError):
        ask(create_chat(store, model="test", llm=llm), "Hi", retries=AT_ONCE)
    assert len(llm.requests) == 1


def test_attempts_are_counted_anew_in_each_round(store, ask):
    script = ProviderError(500), [LONDON], ProviderError(500), "Rain."
    ask(chat_with(store, *script, tools=[get_weather]), "Weather?", retries=AT_ONCE)
    assert rows(store, "request", "round", "attempt") == [(0, 1), (0, 2), (1, 1), (1, 2)]


@pytest.mark.parametrize("way", STREAMS)
def test_a_stream_that_has_shown_something_is_not_tried_again(store, way):
    llm = ScriptedLLM(Say("one two", error=ProviderError(503)), "never")
    with pytest.raises(ProviderError):
        WAYS[way](create_chat(store, model="test", llm=llm), "Count!", retries=AT_ONCE)
    assert len(llm.requests) == 1
    assert rows(store, "request", "status_code", "output_tokens", "usage_estimated") == [(503, 2, True)]


@pytest.mark.parametrize("way", STREAMS)
def test_a_stream_that_has_shown_nothing_is_tried_again(store, way):
    chat = chat_with(store, Say(None, error=ProviderError(503)), "one two")
    assert WAYS[way](chat, "Count!", retries=AT_ONCE).content == "one two"
    assert rows(store, "request", "attempt", "status_code") == [(1, 503), (2, 200)]


# What goes wrong while something goes wrong


def rename_messages(url: str, *names: str) -> None:
    with connect(url) as other:
        other.database.execute_sql("ALTER TABLE {} RENAME TO {}".format(*names))


def test_a_rollback_that_fails_never_hides_why_there_was_one(store, database_url, ask):
    """NodeLLM's C7: the failing DELETE was raised, and the provider's error was gone."""
    error = ProviderError(400, "no such thing")

    def model(keywords: dict[str, Any]) -> BaseException:
        rename_messages(database_url, "llm_message", "elsewhere")
        return error

    chat = chat_with(store, model, "Hello!")
    with pytest.raises(ProviderError) as raised:
        ask(chat, "Hi")
    assert raised.value is error
    notes = getattr(error, "__notes__", [])
    assert len(notes) == 2
    assert notes[0].startswith("llm_orm: the request row of this call could not be written")
    assert notes[1].startswith("llm_orm: the turn's placeholder could not be cleared")
    rename_messages(database_url, "elsewhere", "llm_message")
    assert rows(store, "message", "role", "status") == [("user", "completed"), ("assistant", "pending")]
    assert ask(chat, "Again?", stale_after=0).content == "Hello!"


@pytest.mark.parametrize(("script", "statuses"), [((503, "Hello!"), [503, 200]), ((400,), [400])])
def test_the_row_of_a_failed_call_that_the_database_did_not_take_goes_with_what_is_written_next(
    store, ask, monkeypatch, script, statuses
):
    transact, asked = store.transact, []

    def blinking(*statements: Any) -> Any:
        asked.append(statements)
        if len(asked) == 2:  # the claim is written, the row of the call that failed is not
            raise DatabaseUnavailable("gone for a moment")
        return transact(*statements)

    monkeypatch.setattr(store, "transact", blinking)
    chat = chat_with(store, *(ProviderError(each) if isinstance(each, int) else each for each in script))
    with suppress(ProviderError):
        ask(chat, "Hi", retries=AT_ONCE)
    assert [status for (status,) in rows(store, "request", "status_code")] == statuses
    assert rows(store, "message", "status") == [("completed",)] * len(statuses)


@pytest.mark.parametrize("way", ["ask", "ask_stream"])
def test_a_store_that_is_closed_while_a_model_fails_does_not_hide_why(database_url, way):
    store, error = connect(database_url), ProviderError(400, "no such thing")
    store.create_tables()
    with pytest.raises(ProviderError) as raised:
        WAYS[way](chat_with(store, lambda keywords: store.close() or error), "Hi")
    assert raised.value is error
    assert "was closed: connect() again" in getattr(error, "__notes__", [""])[0]


def test_a_reply_that_cannot_be_written_is_in_the_error_whole(store, database_url, ask):
    """NodeLLM's C7: a failing final UPDATE deleted the paid reply with its request row."""

    def model(keywords: dict[str, Any]) -> Say:
        rename_messages(database_url, "llm_message", "elsewhere")
        return Say("Hello!", input_tokens=10, output_tokens=2)

    with pytest.raises(ReplyNotSaved) as raised:
        ask(chat_with(store, model), "Hi")
    reply = raised.value.reply
    assert (reply.content, reply.usage.input_tokens, reply.usage.output_tokens) == ("Hello!", 10, 2)
    assert raised.value.__cause__ is not None
    rename_messages(database_url, "elsewhere", "llm_message")


def test_a_reply_that_does_not_fit_leaves_the_row_of_its_request(store, database_url, ask):
    """Only the reply cannot be written: what it cost is on record in its own right."""
    with connect(database_url) as other:
        forbid_replies(other)
        chat = chat_with(store, Say("Hello!", cost="0.25"))
        with pytest.raises(ReplyNotSaved) as raised:
            ask(chat, "Hi")
    assert raised.value.reply.content == "Hello!"
    assert rows(store, "request", "status_code", "error", "cost", "input_tokens") == [
        (200, "ReplyNotSaved", Decimal("0.25"), 1)
    ]
    assert rows(store, "message", "role") == [("user",)]


def forbid_replies(store: Store) -> None:
    """A trigger of the database's own that lets no reply be completed."""
    if "sqlite" in repr(store):
        store.database.execute_sql(
            "CREATE TRIGGER forbid BEFORE UPDATE ON llm_message WHEN NEW.status = 'completed' "
            "BEGIN SELECT RAISE(ABORT, 'forbidden'); END"
        )
    else:
        store.database.execute_sql(
            "CREATE FUNCTION forbid() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'forbidden'; END $$"
        )
        store.database.execute_sql(
            "CREATE TRIGGER forbid BEFORE UPDATE ON llm_message FOR EACH ROW WHEN (NEW.status = 'completed') "
            "EXECUTE FUNCTION forbid()"
        )


def test_a_reply_that_could_not_be_completed_can_be_kept_and_is_replayed_once(store, database_url, ask):
    with connect(database_url) as other:
        forbid_replies(other)
        chat = chat_with(store, Say("Looking.", calls=[LONDON]), "Rain.", "Yes.", tools=[get_weather], on_error="keep")
        with pytest.raises(ReplyNotSaved):
            ask(chat, "Weather?")
        other.database.execute_sql("DROP TRIGGER forbid" + ("" if "sqlite" in repr(other) else " ON llm_message"))
    assert rows(store, "message", "status", "content")[1] == ("failed", "Rain.")
    ask(chat, "Sure?")
    assert sent(chat) == [
        ("user", "Weather?"),
        ("assistant", "Looking."),
        ("tool", "rain in London"),
        ("assistant", "Rain."),
        ("user", "Sure?"),
    ]


def test_a_chat_that_is_deleted_meanwhile_leaves_the_reply_in_the_error_and_its_request(store, ask):
    chats: list[Chat] = []

    def model(keywords: dict[str, Any]) -> Say:
        chats[0].delete()
        return Say("Hello!", cost="0.5")

    chats.append(chat_with(store, model))
    with pytest.raises(ReplyNotSaved, match="deleted") as raised:
        ask(chats[0], "Hi")
    assert raised.value.reply.content == "Hello!"
    assert rows(store, "request", "chat", "message", "status_code", "cost") == [(None, None, 200, Decimal("0.5"))]
    assert rows(store, "message", "id") == []
    with pytest.raises(ChatGone):
        ask(chats[0], "Still there?")


def test_a_chat_that_is_deleted_while_a_call_fails_keeps_the_failed_request(store, ask):
    chats: list[Chat] = []
    error = ProviderError(400)
    chats.append(chat_with(store, lambda keywords: chats[0].delete() or error))
    with pytest.raises(ProviderError) as raised:
        ask(chats[0], "Hi")
    assert raised.value is error
    assert rows(store, "request", "chat", "message", "status_code") == [(None, None, 400)]


def test_a_chat_that_is_deleted_before_a_round_is_written_leaves_the_request(store, ask):
    chats: list[Chat] = []
    asked = Say("Looking.", calls=[LONDON], cost="0.5")
    chats.append(chat_with(store, lambda keywords: chats[0].delete() or asked, tools=[get_weather]))
    with pytest.raises(ReplyNotSaved) as raised:
        ask(chats[0], "Weather?")
    assert [call.name for call in raised.value.reply.tool_calls] == ["get_weather"]
    assert rows(store, "request", "chat", "cost") == [(None, Decimal("0.5"))]
    assert rows(store, "tool_call", "id") == []


def test_deleting_a_message_keeps_its_requests_and_tool_calls(store, ask):
    chat = chat_with(store, Say(calls=[LONDON], cost="1"), Say("Rain.", cost="2"), tools=[get_weather])
    ask(chat, "Weather?")
    with store.connection():
        store.records.message.delete().execute()
    assert rows(store, "request", "chat", "message", "cost") == [
        (chat.id, None, Decimal(1)),
        (chat.id, None, Decimal(2)),
    ]
    assert rows(store, "tool_call", "message", "result") == [(None, "rain in London")]
    assert chat.stats().cost == 3


def test_deleting_a_chat_keeps_its_requests(store, ask):
    chat = chat_with(store, [LONDON], Say("Rain.", cost="2"), tools=[get_weather])
    ask(chat, "Weather?")
    chat.delete()
    assert rows(store, "request", "chat", "message", "cost") == [(None, None, None), (None, None, Decimal(2))]
    assert [rows(store, table, "id") for table in ("chat", "message", "tool_call")] == [[], [], []]


def test_a_history_function_that_raises_leaves_the_chat_free(store, ask):
    def broken(messages: Any) -> Any:
        raise RuntimeError("my function broke")

    chat = chat_with(store, "Hello!")
    with pytest.raises(RuntimeError, match="my function broke"):
        ask(chat, "Hi", history=broken)
    assert rows(store, "message", "role") == [("user",)]
    assert ask(chat, "Again?").content == "Hello!"


def test_a_table_that_is_missing_while_history_is_read_leaves_the_chat_free(store, ask):
    chat = chat_with(store, [LONDON], "Rain.", "Still here.", tools=[get_weather])
    ask(chat, "Weather?")
    with store.connection():
        store.database.execute_sql("ALTER TABLE llm_tool_call RENAME TO elsewhere")
    with pytest.raises(TablesMissing):
        ask(chat.reload(), "Sure?")
    with store.connection():
        store.database.execute_sql("ALTER TABLE elsewhere RENAME TO llm_tool_call")
    assert ask(chat, "And now?").content == "Still here."


# on_error="keep"


def test_a_kept_failure_is_a_row_of_its_own(store, ask):
    chat = chat_with(store, ProviderError(400, "no"), on_error="keep")
    with pytest.raises(ProviderError):
        ask(chat, "Hi")
    columns = "role", "status", "content", "model_id", "provider", "input_tokens", "output_tokens"
    assert rows(store, "message", *columns)[1:] == [("assistant", "failed", None, "test", "scripted", 0, 0)]
    assert rows(store, "request", "message")[0][0] == chat.messages()[1].id


def test_a_turn_that_fails_before_its_model_is_called_can_be_kept_too(store, ask):
    def broken(messages: Any) -> None:
        raise RuntimeError("my hook broke")

    chat = chat_with(store, on_error="keep").before_request(broken)
    with pytest.raises(RuntimeError):
        ask(chat, "Hi")
    assert rows(store, "message", "status", "content", "model_id", "provider")[1] == (
        "failed",
        None,
        "test",
        "scripted",
    )
    assert rows(store, "request", "id") == []


@pytest.mark.parametrize("way", STREAMS)
def test_what_came_of_a_failing_stream_is_kept_and_replayed(store, way):
    """NodeLLM's C34: a stream's error discarded what had been received."""
    broken = Say("one two three", thinking="I count.", error=ProviderError(503, "gone"))
    chat = chat_with(store, broken, "four five", on_error="keep", retries=0)
    with pytest.raises(ProviderError):
        WAYS[way](chat, "Count!")
    columns = "role", "status", "content", "thinking_text"
    assert rows(store, "message", *columns)[1] == ("assistant", "failed", "one two three", "I count.")
    assert rows(store, "message", "output_tokens")[1] == rows(store, "request", "output_tokens")[0] != (0,)
    WAYS[way](chat, "Go on!")
    assert sent(chat) == [("user", "Count!"), ("assistant", "one two three"), ("user", "Go on!")]


def test_a_kept_failure_that_said_nothing_is_not_shown_to_the_model(store, ask):
    """RubyLLM's #118: an empty assistant message made the provider refuse every later turn."""
    chat = chat_with(store, ProviderError(400), "Hello!", on_error="keep")
    with pytest.raises(ProviderError):
        ask(chat, "Hi")
    ask(chat, "Anybody?")
    assert sent(chat) == [("user", "Hi"), ("user", "Anybody?")]


def test_a_kept_failure_keeps_its_finished_tool_rounds_and_shows_them_again(store, ask):
    chat = chat_with(
        store, Say("Looking.", calls=[LONDON]), ProviderError(400), "Rain.", tools=[get_weather], on_error="keep"
    )
    with pytest.raises(ProviderError):
        ask(chat, "Weather?")
    ask(chat, "Well?")
    assert sent(chat) == [
        ("user", "Weather?"),
        ("assistant", "Looking."),
        ("tool", "rain in London"),
        ("user", "Well?"),
    ]


def test_a_kept_failure_never_shows_a_tool_call_without_its_result(store, ask):
    """RubyLLM's #269: tool calls without results made the chat unusable for ever."""
    chat = chat_with(
        store, Say("Looking.", calls=[Call("stop"), PARIS]), "Rain.", tools=[get_weather, stop], on_error="keep"
    )
    with pytest.raises(ToolError):
        ask(chat, "Weather?")
    assert rows(store, "message", "status", "content")[1] == ("failed", "Looking.")
    assert rows(store, "tool_call", "status") == [("failed",), ("failed",)]
    ask(chat, "Well?")
    assert sent(chat) == [
        ("user", "Weather?"),
        ("assistant", "Looking."),
        ("tool", "Error executing tool 'stop': the order is locked"),
        ("tool", "Not run: the turn was broken off before."),
        ("user", "Well?"),
    ]


def test_a_fatal_error_of_the_only_tool_is_replayed_as_its_result(store, ask):
    chat = chat_with(store, Call("stop"), "Locked.", tools=[stop], on_error="keep")
    with pytest.raises(ToolError):
        ask(chat, "Order!")
    ask(chat, "Why?")
    told = ("tool", "Error executing tool 'stop': the order is locked")
    assert sent(chat) == [("user", "Order!"), ("assistant", None), told, ("user", "Why?")]


# Retry


def _retry_stream(chat: Chat, **options: Any) -> Any:
    stream = chat.retry_stream(**options)
    for _ in stream:
        pass
    return stream.message


@pytest.fixture(params=["retry", "retry_stream", "aretry", "aretry_stream"])
def retry(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """retry(chat, **options) → the stored reply, in the four ways."""

    def run(chat: Chat, **options: Any) -> Any:
        async def read() -> Any:
            stream = chat.aretry_stream(**options)
            async for _ in stream:
                pass
            return stream.message

        if request.param == "aretry_stream":
            return asyncio.run(read())
        if request.param == "retry_stream":
            return _retry_stream(chat, **options)
        return asyncio.run(chat.aretry(**options)) if request.param == "aretry" else chat.retry(**options)

    return run


def failed_chat(store: Store, *script: Any, ask: Ask = WAYS["ask"], **options: Any) -> Chat:
    chat = chat_with(store, ProviderError(400), *script, **options)
    with pytest.raises(ProviderError):
        ask(chat, "Hi")
    return chat


def test_a_retry_answers_the_question_without_asking_it_twice(store, retry):
    """NodeLLM's C34: to try again meant to send the question twice."""
    chat = failed_chat(store, "Hello!")
    reply = retry(chat)
    assert reply.content == "Hello!"
    assert rows(store, "message", "position", "role", "status", "content") == [
        (0, "user", "completed", "Hi"),
        (1, "assistant", "completed", "Hello!"),
    ]
    assert sent(chat) == [("user", "Hi")]
    turns = {row[0] for row in rows(store, "request", "turn_id")}
    assert turns == {chat.messages()[0].id}


def test_a_retry_takes_the_place_of_a_kept_failure(store, retry):
    script = Say("Looking.", calls=[LONDON]), ProviderError(400), [PARIS], "Rain."
    chat = chat_with(store, *script, tools=[get_weather], on_error="keep")
    with pytest.raises(ProviderError):
        chat.ask("Weather?")
    reply = retry(chat)
    assert rows(store, "message", "position", "status", "content") == [
        (0, "completed", "Weather?"),
        (1, "completed", "Rain."),
    ]
    assert rows(store, "request", "status_code") == [(200,), (400,), (200,), (200,)]
    assert rows(store, "tool_call", "result", "message") == [("rain in London", None), ("rain in Paris", reply.id)]
    assert [role for role, _ in sent(chat)] == ["user", "assistant", "tool"]


def test_a_retry_that_fails_can_be_tried_again(store, retry):
    chat = failed_chat(store, ProviderError(400), ProviderError(400), "Hello!")
    for _ in range(2):
        with pytest.raises(ProviderError):
            retry(chat)
    assert retry(chat).content == "Hello!"
    assert rows(store, "message", "role", "content") == [("user", "Hi"), ("assistant", "Hello!")]
    assert rows(store, "request", "status_code") == [(400,), (400,), (400,), (200,)]


def test_a_retry_takes_the_options_of_one_turn(store, retry):
    other = ScriptedLLM("Hello!")
    retry(failed_chat(store), llm=other, temperature=0.1)
    assert other.requests[0]["temperature"] == 0.1


def test_a_retry_works_in_a_chat_that_was_loaded_anew(store, retry):
    chat = load_chat(store, failed_chat(store, on_error="keep").id, llm=ScriptedLLM("Hello!"))
    assert retry(chat).content == "Hello!"
    assert rows(store, "message", "content") == [("Hi",), ("Hello!",)]


def test_a_chat_that_goes_on_after_a_retry_shows_the_new_answer_only(store, ask, retry):
    chat = chat_with(store, "One.", ProviderError(400), "Two.", "Three.", on_error="keep")
    ask(chat, "1?")
    with pytest.raises(ProviderError):
        ask(chat, "2?")
    retry(chat)
    ask(chat, "3?")
    assert sent(chat) == [("user", "1?"), ("assistant", "One."), ("user", "2?"), ("assistant", "Two."), ("user", "3?")]


def test_a_retry_by_another_holder_of_the_chat_is_seen_by_the_first(store, retry):
    chat = failed_chat(store, "Fine.", on_error="keep")
    retry(load_chat(store, chat.id, llm=ScriptedLLM("Hello!")))
    chat.ask("How are you?")
    assert sent(chat) == [("user", "Hi"), ("assistant", "Hello!"), ("user", "How are you?")]


def test_there_is_nothing_to_retry_in_an_empty_or_an_answered_chat(store, retry):
    chat = chat_with(store, "Hello!")
    with pytest.raises(NothingToRetry):
        retry(chat)
    chat.ask("Hi")
    with pytest.raises(NothingToRetry):
        retry(chat)
    assert rows(store, "message", "content") == [("Hi",), ("Hello!",)]


def test_a_question_that_was_answered_meanwhile_is_not_answered_twice(store, retry):
    """Another turn answers it between the look at the chat and the claim of its place."""
    chat = failed_chat(store, "never")
    other = load_chat(store, chat.id, llm=ScriptedLLM("Hello!"))
    read, looks = store.read, []

    def read_late(statement: Any) -> Any:
        found = read(statement)
        looks.append(statement)
        if len(looks) == 1:
            assert other is not None
            other.retry()
        return found

    store.read = read_late
    with pytest.raises(NothingToRetry):
        retry(chat)
    assert rows(store, "message", "content") == [("Hi",), ("Hello!",)]


def test_a_closed_store_says_so(store, ask):
    chat = chat_with(store, "Hello!")
    store.close()
    with pytest.raises(StoreClosed):
        ask(chat, "Hi")


def test_a_kept_answer_outlives_a_retry_that_was_cleared_as_dead_and_was_not(store):
    def sleep(keywords: dict[str, Any]) -> str:
        other = load_chat(store, chat.id, llm=ScriptedLLM("Hello!"), stale_after=0)
        assert other is not None
        other.ask("Anybody?")
        return "Too late."

    chat = chat_with(store, Say("Half", error=ProviderError(400)), sleep, on_error="keep")
    with pytest.raises(ProviderError):
        WAYS["ask_stream"](chat, "Hi")
    with pytest.raises(ReplyNotSaved):
        chat.retry()
    assert rows(store, "message", "role", "status", "content") == [
        ("user", "completed", "Hi"),
        ("assistant", "failed", "Half"),
        ("user", "completed", "Anybody?"),
        ("assistant", "completed", "Hello!"),
    ]


def test_a_kept_answer_outlives_a_retry_that_gives_nothing(store, ask):
    llm = ScriptedLLM(Say("half of it", error=ProviderError(400)), ProviderError(401), "All of it.")
    chat = create_chat(store, model="m", llm=llm, retries=0, on_error="keep")
    with pytest.raises(ProviderError):
        for _ in chat.ask_stream("Tell me."):
            pass

    with pytest.raises(ProviderError):
        chat.retry()

    assert rows(store, "message", "role", "status", "content") == [
        ("user", "completed", "Tell me."),
        ("assistant", "failed", "half of it"),
    ]
    assert chat.retry().content == "All of it."
    assert rows(store, "message", "position", "status", "content") == [
        (0, "completed", "Tell me."),
        (1, "completed", "All of it."),
    ]
    assert [message["role"] for message in llm.requests[-1]["messages"]] == ["user"]


def test_a_unique_index_of_the_applications_is_not_taken_for_another_turn(store, ask):
    chat = create_chat(store, model="m", llm=ScriptedLLM("One.", "Two."))
    table = store.records.message._meta.table_name
    with store.connection():
        store.database.execute_sql(f"CREATE UNIQUE INDEX mine ON {table} (chat_id, content) WHERE role = 'user'")
    ask(chat, "hi")

    with pytest.raises(pw.IntegrityError):
        ask(chat, "hi")

    assert ask(chat, "hello").content == "Two."


def test_tool_rounds_in_the_table_are_seen_by_a_chat_that_writes_none(store, ask):
    llm = ScriptedLLM(Call("get_weather", city="London"), "Cold.", "Yes.")
    chat = create_chat(store, model="m", llm=llm, tools=[get_weather])
    ask(chat, "London?")

    ask(load_chat(store, chat.id, llm=llm, persistence={"tool_calls": False}), "Sure?")

    assert [m["role"] for m in llm.requests[-1]["messages"]] == ["user", "assistant", "tool", "assistant", "user"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_signal_between_the_reply_and_its_row_loses_neither(store, monkeypatch, streamed):
    """A handler's exception (SystemExit, a worker's soft time limit) may come between any two lines."""
    import llm_orm.play

    chat = create_chat(store, model="m", llm=ScriptedLLM("Paid for.", "Fine."))
    advance = llm_orm.play.advance
    told = []

    def interrupted(flow, value=None, error=None, call=None):
        if call is not None and not told:
            told.append(call)
            raise SystemExit("stop")
        return advance(flow, value, error, call)

    monkeypatch.setattr(llm_orm.play, "advance", interrupted)
    with pytest.raises(SystemExit):
        if streamed:
            list(chat.ask_stream("Hi."))
        else:
            chat.ask("Hi.")

    assert len(chat.requests()) == 1
    assert chat.messages()[-1].content == "Paid for."
    assert chat.ask("Again?").content == "Fine."


def test_an_async_tool_whose_own_task_was_cancelled_has_failed_and_the_turn_goes_on(store):
    async def look(where: str) -> str:
        """Look somewhere."""
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        return await future

    chat = create_chat(store, model="m", llm=ScriptedLLM(Call("look", where="there"), "Well."), tools=[look])

    assert asyncio.run(chat.aask("Look.")).content == "Well."
    assert rows(store, "tool_call", "status") == [("failed",)]


@pytest.mark.parametrize("way", ["ask", "aask"])
def test_as_many_tools_run_side_by_side_as_was_said(store, way):
    together = threading.Barrier(16)

    def meet(number: int) -> str:
        """Meet the others."""
        together.wait(timeout=30)
        return str(number)

    calls = [Call("meet", number=number) for number in range(16)]
    chat = create_chat(store, model="m", llm=ScriptedLLM(calls, "Met."), tools=[meet], tool_concurrency=16)

    assert WAYS[way](chat, "Meet.").content == "Met."
    assert rows(store, "tool_call", "result") == [(str(number),) for number in range(16)]

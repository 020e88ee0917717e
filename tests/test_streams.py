"""Turns that are broken off: streams left early, tasks cancelled, Ctrl-C, and that the chat is free at once."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peewee as pw
import pytest
from conftest import WAYS, rows

from llm_orm import (
    REPLACE,
    Chat,
    InsideTransaction,
    LlmOrmError,
    Middleware,
    Retries,
    Store,
    TurnContext,
    connect,
    create_chat,
    load_chat,
    tool,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

LONDON = Call("get_weather", city="London")
ERASED = [("user", "completed", "Count!")]
ON_ERROR = ["rollback", "keep"]


@tool
def get_weather(city: str) -> str:
    return f"rain in {city}"


def chat_with(store: Store, *script: Any, **options: Any) -> Chat:
    return create_chat(store, model="test", llm=ScriptedLLM(*script), **options)


def messages(store: Store) -> list[Any]:
    return rows(store, "message", "role", "status", "content")


HUNG_UP = ("status_code", "error", "usage_estimated", "input_tokens", "output_tokens")


def check_at_rest(chat: Chat) -> None:
    """Nothing is running, every call has its row, and the chat can be asked again at once."""
    store, llm = chat.store, chat.options.llm
    of_this = [row for row in rows(store, "message", "chat", "status", "role", "content") if row[0] == chat.id]
    assert "pending" not in {row[1] for row in of_this}
    assert {row[0] for row in rows(store, "tool_call", "status")} <= {"completed", "failed"}
    assert len([row for row in rows(store, "request", "chat") if row[0] == chat.id]) == len(llm.requests)
    again = load_chat(store, chat.id, llm=ScriptedLLM("Still here."))
    assert again is not None
    assert again.ask("Again?").content == "Still here."
    shown = again.options.llm.requests[0]["messages"]
    assert all(message["content"] or message.get("tool_calls") for message in shown)
    called = [call["id"] for message in shown for call in message.get("tool_calls") or ()]
    assert called == [message["tool_call_id"] for message in shown if message["role"] == "tool"]


# Left early


def break_off(chat: Chat, **options: Any) -> None:
    for _ in chat.ask_stream("Count!", **options):
        break


def close(chat: Chat, **options: Any) -> None:
    stream = chat.ask_stream("Count!", **options)
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def leave_block(chat: Chat, **options: Any) -> None:
    with chat.ask_stream("Count!", **options) as stream:
        next(stream)


def raise_in_reader(chat: Chat, **options: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in chat.ask_stream("Count!", **options):
            1 / 0


def aclose(chat: Chat, **options: Any) -> None:
    async def read() -> None:
        stream = chat.aask_stream("Count!", **options)
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(read())


def leave_async_block(chat: Chat, **options: Any) -> None:
    async def read() -> None:
        async with chat.aask_stream("Count!", **options) as stream:
            await anext(stream)

    asyncio.run(read())


def break_off_async(chat: Chat, **options: Any) -> None:
    async def read() -> None:
        async for _ in chat.aask_stream("Count!", **options):
            break

    asyncio.run(read())


def cancel_between_chunks(chat: Chat, **options: Any) -> None:
    async def read() -> None:
        never, read_one = asyncio.Event(), asyncio.Event()

        async def reader() -> None:
            async with chat.aask_stream("Count!", **options) as stream:
                async for _ in stream:
                    read_one.set()
                    await never.wait()

        task = asyncio.create_task(reader())
        await read_one.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(read())


EARLY = [
    break_off,
    close,
    leave_block,
    raise_in_reader,
    aclose,
    leave_async_block,
    break_off_async,
    cancel_between_chunks,
]


@pytest.mark.parametrize("leave", EARLY)
def test_a_stream_that_is_left_early_is_rolled_back_and_on_record(store, leave):
    """NodeLLM's C12: a NULL placeholder stayed, no request was on record, and the next turn showed the model ""."""
    chat = chat_with(store, "one two three")
    leave(chat)
    assert messages(store) == ERASED
    ((status, error, estimated, input_tokens, output_tokens),) = rows(store, "request", *HUNG_UP)
    assert (status, estimated, input_tokens, output_tokens) == (499, True, 1, 1)
    assert error in ("GeneratorExit", "CancelledError")
    check_at_rest(chat)


@pytest.mark.parametrize("leave", EARLY)
def test_a_stream_that_is_left_early_can_be_kept_as_far_as_it_came(store, leave):
    chat = chat_with(store, "one two three", "four")
    leave(chat, on_error="keep")
    assert messages(store) == [*ERASED, ("assistant", "incomplete", "one ")]
    chat.ask("Go on!")
    shown = [message["content"] for message in chat.options.llm.requests[-1]["messages"]]
    assert shown == ["Count!", "one ", "Go on!"]


@pytest.mark.parametrize("leave", EARLY)
def test_a_stream_that_is_left_in_its_second_round_keeps_the_first(store, leave):
    chat = chat_with(store, Say(calls=[LONDON]), tools=[get_weather])
    leave(chat)  # at the chunk that shows the tool call
    assert rows(store, "tool_call", "id") == []
    assert rows(store, "request", "round", "status_code") == [(0, 499)]
    check_at_rest(chat)


def test_a_stream_that_is_left_behind_its_tools_has_them_on_record(store):
    chat = chat_with(store, [LONDON], "It rains.", tools=[get_weather])
    for chunk in chat.ask_stream("Weather?"):
        if chunk.content:
            break
    assert rows(store, "tool_call", "result", "status", "message") == [("rain in London", "completed", None)]
    assert rows(store, "request", "round", "status_code") == [(0, 200), (1, 499)]
    check_at_rest(chat)


def test_an_async_stream_that_is_dropped_frees_its_chat_for_whoever_waits(store):
    chat = chat_with(store, "one two three", "Hello!")

    async def main() -> Any:
        async for _ in chat.aask_stream("Count!"):
            break
        return await chat.aask("Hi", wait=10)

    assert asyncio.run(main()).content == "Hello!"
    assert messages(store) == [*ERASED, ("user", "completed", "Hi"), ("assistant", "completed", "Hello!")]


def test_a_stream_that_is_never_read_does_nothing(store):
    llm = ScriptedLLM("never")
    chat = create_chat(store, model="test", llm=llm)
    chat.ask_stream("Count!").close()
    chat.ask_stream("Count!")
    chat.aask_stream("Count!")
    asyncio.run(chat.aask_stream("Count!").aclose())
    assert (llm.requests, messages(store)) == ([], [])


def test_a_stream_has_its_message_once_it_has_ended(store):
    stream = chat_with(store, "one two").ask_stream("Count!")
    assert [(chunk.content, stream.message) for chunk in stream] == [("one ", None), ("two", None)]
    assert stream.message is not None
    assert stream.message.content == "one two"
    stream.close()
    assert messages(store)[1] == ("assistant", "completed", "one two")


def test_a_stream_shows_each_piece_once(store):
    """NodeLLM's C34: what came together with thinking was shown twice ("HiHi")."""
    script = Say("Hi there", thinking="Hm. Well.", signature="sig", calls=[LONDON]), "It rains."
    chat = chat_with(store, *script, tools=[get_weather])
    chunks = list(chat.ask_stream("Hello"))
    assert [chunk.thinking for chunk in chunks if chunk.thinking] == ["Hm. ", "Well."]
    assert [chunk.content for chunk in chunks if chunk.content] == ["Hi ", "there", "It ", "rains."]
    assert [chunk.tool_call.name for chunk in chunks if chunk.tool_call] == ["get_weather"]


def test_a_stream_can_be_read_and_left_on_another_thread(store):
    chat = chat_with(store, "one two three")
    stream = chat.ask_stream("Count!")
    next(stream)
    thread = threading.Thread(target=stream.close)
    thread.start()
    thread.join()
    assert messages(store) == ERASED
    check_at_rest(chat)


def test_a_stream_that_is_first_read_inside_a_transaction_is_refused(store):
    """It was asked for outside; its rows would be undone with the transaction."""
    llm = ScriptedLLM("never")
    stream = create_chat(store, model="test", llm=llm).ask_stream("Count!")
    with store.connection(), store.database.atomic():
        with pytest.raises(InsideTransaction):
            next(stream)
    assert (llm.requests, messages(store)) == ([], [])


def test_a_stream_that_is_read_on_inside_a_transaction_is_refused_and_goes_on_outside(store):
    """The reply and its request would be undone with it, and the chat would be busy with a turn that has ended."""
    chat = chat_with(store, "one two three")
    stream = chat.ask_stream("Count!")
    next(stream)
    with pytest.raises(InsideTransaction):
        with store.connection(), store.database.atomic():
            list(stream)
    assert "".join(chunk.content for chunk in stream) == "two three"
    assert messages(store) == [*ERASED, ("assistant", "completed", "one two three")]
    check_at_rest(chat)


# Cancelled


async def cancelled(work: Any, when: Callable[[], Any]) -> None:
    """Cancel the work once `when()` is true, and see that it says so."""
    task = asyncio.ensure_future(work)
    while not when():
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)


def reading(chat: Chat, way: str, **options: Any) -> Any:
    async def read() -> None:
        async for _ in chat.aask_stream("Count!", **options):
            pass

    return read() if way == "aask_stream" else chat.aask("Count!", **options)


ASYNC_WAYS = pytest.mark.parametrize("way", ["aask", "aask_stream"])


@ASYNC_WAYS
@pytest.mark.parametrize("on_error", ON_ERROR)
def test_a_turn_that_is_cancelled_while_its_model_thinks_is_on_record(store, way, on_error):
    chat = chat_with(store, Say("one two", delay_s=60))
    asyncio.run(cancelled(reading(chat, way, on_error=on_error), lambda: chat.options.llm.requests))
    assert messages(store) == ERASED + ([("assistant", "incomplete", None)] if on_error == "keep" else [])
    assert rows(store, "request", *HUNG_UP) == [(499, "CancelledError", True, 1, 0)]
    check_at_rest(chat)


@pytest.mark.parametrize("on_error", ON_ERROR)
def test_a_stream_that_is_cancelled_while_it_waits_for_a_chunk_is_on_record(store, on_error):
    chat = chat_with(store, Say("one two", until=threading.Event()))
    shown: list[Any] = []

    async def read() -> None:
        async for chunk in chat.aask_stream("Count!", on_error=on_error):
            shown.append(chunk)

    asyncio.run(cancelled(read(), lambda: shown))
    assert messages(store) == ERASED + ([("assistant", "incomplete", "one ")] if on_error == "keep" else [])
    assert rows(store, "request", *HUNG_UP) == [(499, "CancelledError", True, 1, 1)]
    check_at_rest(chat)


@ASYNC_WAYS
def test_a_turn_that_is_cancelled_while_an_async_tool_runs_cancels_the_tool(store, way):
    started, ended = [], []

    @tool
    async def hang() -> str:
        started.append(1)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(1)
        return "never"

    chat = chat_with(store, [Call("hang"), LONDON], tools=[hang, get_weather])
    asyncio.run(cancelled(reading(chat, way), lambda: started))
    assert ended
    assert messages(store) == ERASED
    assert rows(store, "tool_call", "status", "error", "result") == [("failed", "interrupted", None)] * 2
    check_at_rest(chat)


@ASYNC_WAYS
def test_a_turn_that_is_cancelled_while_a_plain_tool_runs_does_not_wait_for_it(store, way):
    started, release = threading.Event(), threading.Event()

    @tool
    def hang() -> str:
        started.set()
        release.wait(20)
        return "too late"

    async def main() -> None:
        await cancelled(reading(chat, way), started.is_set)
        assert messages(store) == ERASED
        release.set()

    chat = chat_with(store, Call("hang"), tools=[hang])
    asyncio.run(main())
    assert rows(store, "tool_call", "status", "error", "result") == [("failed", "interrupted", None)]
    check_at_rest(chat)


@ASYNC_WAYS
def test_a_turn_that_is_cancelled_twice_is_cleared_all_the_same(store, way):
    started, cleaning = [], []

    @tool
    async def stubborn() -> str:
        started.append(1)
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.append(1)
            await asyncio.sleep(0)
        return "never"

    async def main() -> None:
        task = asyncio.ensure_future(reading(chat, way))
        while not started:
            await asyncio.sleep(0)
        task.cancel()
        while not cleaning:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    chat = chat_with(store, Call("stubborn"), tools=[stubborn])
    asyncio.run(main())
    assert messages(store) == ERASED
    check_at_rest(chat)


@ASYNC_WAYS
def test_a_turn_that_is_cancelled_while_it_waits_to_be_tried_again_is_cleared(store, way):
    waiting = []
    chat = chat_with(store, ProviderError(429, "slow down", retry_after=50))
    chat.before_request(waiting.append)
    asyncio.run(cancelled(reading(chat, way), lambda: rows(store, "request", "id")))
    assert messages(store) == ERASED
    assert rows(store, "request", "status_code") == [(429,)]
    check_at_rest(chat)


@ASYNC_WAYS
def test_a_turn_that_is_cancelled_while_it_waits_for_the_database_is_cleared(store, database_url, way):
    chat = chat_with(store, "never")

    async def main() -> None:
        with connect(database_url) as other, other.connection():
            other.database.execute_sql("BEGIN IMMEDIATE" if "sqlite" in database_url else "BEGIN")
            if "sqlite" not in database_url:
                other.database.execute_sql("LOCK TABLE llm_message IN ACCESS EXCLUSIVE MODE")
            task = asyncio.ensure_future(reading(chat, way))
            while not store.database._in_use:
                await asyncio.sleep(0)
            for _ in range(10):
                task.cancel()
                await asyncio.sleep(0)
            assert not task.done()
            other.database.execute_sql("COMMIT")
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert messages(store) == ERASED
    assert chat.options.llm.requests == []
    check_at_rest(chat)


@ASYNC_WAYS
def test_a_turn_that_is_cancelled_while_it_waits_for_a_busy_chat_leaves_no_row(store, way):
    busy = Say("one two", until=threading.Event())
    chat = chat_with(store)

    async def main() -> None:
        async with chat.aask_stream("First", llm=ScriptedLLM(busy)) as first:
            await anext(first)
            looks = itertools.count()
            await cancelled(reading(chat, way, wait=60), lambda: next(looks) > 50)
            assert messages(store) == [("user", "completed", "First"), ("assistant", "pending", None)]

    asyncio.run(main())
    assert messages(store) == [("user", "completed", "First")]


@contextmanager
def at_statement(store: Store, number: int, act: Callable[[], None], *, behind: bool = False) -> Iterator[list[str]]:
    """Act right before statement `number` (from 0) is sent to the database, or behind it; gives what was sent."""
    database: Any = store.database
    execute, said = database.execute_sql, []

    def execute_sql(sql: str, *arguments: Any, **keywords: Any) -> Any:
        if threading.current_thread().name == "llm_orm heart":
            return execute(sql, *arguments, **keywords)  # which looks in where a turn takes long
        said.append(sql)
        if len(said) != number + 1:
            return execute(sql, *arguments, **keywords)
        if behind:
            cursor = execute(sql, *arguments, **keywords)
            if cursor.description:
                cursor.fetchall()
        act()
        return execute(sql, *arguments, **keywords)

    database.execute_sql = execute_sql
    try:
        yield said
    finally:
        del database.execute_sql


def tool_chat(store: Store, on_error: str) -> Chat:
    script = Say("Looking.", calls=[LONDON, LONDON]), ProviderError(503), "It rains."
    return chat_with(store, *script, tools=[get_weather], on_error=on_error, retries=Retries(1, 0.0))


@pytest.mark.parametrize(("way", "on_error"), [("aask", "rollback"), ("aask_stream", "keep")])
def test_a_turn_can_be_cancelled_at_every_statement(store, way, on_error):
    for number in itertools.count():
        chat = tool_chat(store, on_error)
        if not asyncio.run(cancel_at(chat, way, number)):
            break
        check_at_rest(chat)
    assert number >= 6


async def cancel_at(chat: Chat, way: str, number: int) -> bool:
    """Cancel the turn while the database works on a statement; False where it has fewer of them."""
    loop, told = asyncio.get_running_loop(), threading.Event()

    def cancel() -> None:
        loop.call_soon_threadsafe(lambda: (task.cancel(), told.set()))
        told.wait(20)

    with at_statement(chat.store, number, cancel) as said:
        task = asyncio.ensure_future(reading(chat, way))
        await asyncio.wait([task])
    if len(said) <= number:
        assert not task.cancelled()
        return False
    assert task.cancelled()
    return True


@ASYNC_WAYS
def test_a_turn_can_be_cancelled_at_every_step_of_the_loop(store, way):
    async def main(steps: int) -> None:
        task = asyncio.ensure_future(reading(chat, way))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    for steps in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233):
        chat = chat_with(store, [LONDON], "It rains.", tools=[get_weather])
        asyncio.run(main(steps))
        check_at_rest(chat)


# Ctrl-C


@pytest.mark.parametrize("on_error", ON_ERROR)
def test_ctrl_c_while_a_model_is_waited_for_is_on_record_and_passed_on(store, ask, on_error):
    def model(keywords: dict[str, Any]) -> BaseException:
        return KeyboardInterrupt()

    chat = chat_with(store, model)
    with pytest.raises(KeyboardInterrupt):
        ask(chat, "Count!", on_error=on_error)
    assert messages(store) == ERASED + ([("assistant", "incomplete", None)] if on_error == "keep" else [])
    assert rows(store, "request", *HUNG_UP) == [(499, "KeyboardInterrupt", True, 1, 0)]
    check_at_rest(chat)


def test_ctrl_c_while_the_tokens_of_a_reply_are_counted_loses_nothing_of_it(store, ask):
    class Counting(ScriptedLLM):
        counted = 0

        def token_counter(self, *arguments: Any, **keywords: Any) -> int:
            self.counted += 1
            if self.counted <= 2:  # whoever presses it once, presses it twice
                raise KeyboardInterrupt
            return super().token_counter(*arguments, **keywords)

    chat = create_chat(store, model="test", llm=Counting(Say("one two", usage=False)), on_error="keep")
    with pytest.raises(KeyboardInterrupt):
        ask(chat, "Count!")
    assert rows(store, "request", *HUNG_UP) == [(499, "KeyboardInterrupt", True, 1, 2)]
    assert messages(store) == [*ERASED, ("assistant", "incomplete", "one two")]
    check_at_rest(chat)


@pytest.mark.parametrize("way", ["ask", "ask_stream"])
def test_ctrl_c_in_a_tool_leaves_its_call_interrupted(store, way):
    @tool
    def interrupt() -> str:
        raise KeyboardInterrupt

    chat = chat_with(store, [Call("interrupt"), LONDON], tools=[interrupt, get_weather])
    with pytest.raises(KeyboardInterrupt):
        WAYS[way](chat, "Count!")
    assert rows(store, "tool_call", "status", "error") == [("failed", "interrupted")] * 2
    assert messages(store) == ERASED
    check_at_rest(chat)


@pytest.mark.parametrize(
    ("way", "on_error", "behind"),
    [
        ("ask", "rollback", False),
        ("ask", "keep", True),
        ("ask_stream", "keep", False),
        ("ask_stream", "rollback", True),
    ],
)
def test_ctrl_c_at_any_statement_leaves_the_chat_at_rest(store, way, on_error, behind):
    """Behind a statement its work is done, and nobody heard of it: what was spent is still on record, once."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    notes: list[str] = []
    for number in itertools.count():
        chat = chat_with(
            store, Say("Looking.", calls=[LONDON, LONDON]), "It rains.", tools=[get_weather], on_error=on_error
        )
        with at_statement(store, number, interrupt, behind=behind) as said:
            try:
                WAYS[way](chat, "Count!")
            except KeyboardInterrupt as interruption:
                notes += getattr(interruption, "__notes__", [])
        if len(said) <= number:
            break
        check_at_rest(chat)
    assert number >= 5
    assert notes == []


# A database that does not answer, once


class Rescue(Middleware):
    def on_error(self, context: TurnContext, error: Exception) -> REPLACE:
        return REPLACE("Sorry.")


@pytest.mark.parametrize(("way", "rescued"), [("ask", False), ("ask_stream", True)])
def test_a_statement_that_fails_once_loses_no_paid_call_and_leaves_no_tool_running(store, way, rescued):
    def fail() -> None:
        raise pw.OperationalError("gone")

    for number in itertools.count():
        script = Say("Looking.", calls=[LONDON, LONDON]), Say(calls=[LONDON])
        chat = chat_with(store, *script, tools=[get_weather], max_tool_calls=1, middlewares=[Rescue()] * rescued)
        with at_statement(store, number, fail) as said:
            try:
                WAYS[way](chat, "Count!")
            except LlmOrmError:
                pass
        if len(said) <= number:
            break
        assert len(chat.requests()) == len(chat.options.llm.requests)
        if "pending" not in {message.status for message in chat.messages()}:
            assert {call.status for call in chat.tool_calls()} <= {"completed", "failed"}
    assert number >= 5


# Death


class Died(BaseException):
    """The process is gone: nothing that it would still do is done."""


@pytest.mark.parametrize(("way", "on_error"), [("ask", "rollback"), ("ask_stream", "keep")])
def test_a_chat_can_be_asked_again_after_death_at_any_statement(store, database_url, way, on_error):
    def die() -> None:
        database: Any = dying.database

        def execute_sql(*_: Any, **__: Any) -> Any:
            raise Died

        database.execute_sql = execute_sql
        raise Died

    for number in itertools.count():
        dying = connect(database_url)
        chat = chat_with(dying, Say("Looking.", calls=[LONDON, LONDON]), "It rains.", tools=[get_weather])
        with at_statement(dying, number, die) as said:
            try:
                WAYS[way](chat, "Count!", on_error=on_error)
            except Died:
                pass
        dying.close()
        if len(said) <= number:
            break
        again = load_chat(store, chat.id, llm=ScriptedLLM("Still here."), stale_after=0, on_error=on_error)
        assert again is not None
        assert again.ask("Again?").content == "Still here."
        assert "pending" not in {row[0] for row in rows(store, "message", "status")}
        assert {row[0] for row in rows(store, "tool_call", "status")} <= {"completed", "failed"}
        shown = again.options.llm.requests[0]["messages"]
        assert all(message["content"] or message.get("tool_calls") for message in shown)
        called = [call["id"] for message in shown for call in message.get("tool_calls") or ()]
        assert called == [message["tool_call_id"] for message in shown if message["role"] == "tool"]
    assert number >= 5

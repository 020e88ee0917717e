"""chat.cancel(): a running turn is stopped from anywhere, whatever it waits for, and its chat is free at once."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from unittest.mock import patch

import pytest
from conftest import WAYS, rows
from freezegun import freeze_time
from processes import Process
from provider import Answer, Provider

from llm_orm import (
    LLM,
    AwaitsApproval,
    Chat,
    ChatBusy,
    InvalidValue,
    NothingToResume,
    PIIMask,
    Store,
    TurnCancelled,
    connect,
    create_chat,
    load_chat,
    tool,
)
from llm_orm import aside as aside_module
from llm_orm.heart import LOOK_EVERY_S
from llm_orm.rows import Rows
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

LONDON = Call("get_weather", city="London")
ERASED = [("user", "completed", "Count!")]
STOPPED = ("status_code", "error", "usage_estimated", "input_tokens", "output_tokens")
A_SECOND = 4.0
"""What a second may take on a machine that is busy with other things; what is waited for here never comes."""

STREAMS = ["ask_stream", "aask_stream"]
ON_ERROR = pytest.mark.parametrize("on_error", ["rollback", "keep"])


@tool
def get_weather(city: str) -> str:
    return f"rain in {city}"


@tool(requires_approval=True)
def refund(order: str) -> str:
    return f"refunded {order}"


def chat_with(store: Store, *script: Any, **options: Any) -> Chat:
    return create_chat(store, model="test", llm=ScriptedLLM(*script), **options)


def again(chat: Chat, *script: Any, **options: Any) -> Chat:
    """Another holder of the chat."""
    loaded = load_chat(chat.store, chat.id, llm=ScriptedLLM(*script), **options)
    assert loaded is not None
    return loaded


def messages(store: Store) -> list[Any]:
    return rows(store, "message", "role", "status", "content")


def check_free(chat: Chat) -> None:
    """The chat can be asked again at once, and shows the model no half of anything."""
    next_one = again(chat, "Still here.")
    assert next_one.ask("Again?").content == "Still here."
    shown = next_one.options.llm.requests[0]["messages"]
    assert all(message["content"] or message.get("tool_calls") for message in shown)
    called = [call["id"] for message in shown for call in message.get("tool_calls") or ()]
    assert called == [message["tool_call_id"] for message in shown if message["role"] == "tool"]
    assert not {row[0] for row in rows(chat.store, "tool_call", "status")} & {"pending", "running"}


@contextmanager
def running(function: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Future[Any]]:
    """Something goes on on another thread, which nobody waits for where the test fails."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(function(*arguments, **options))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield outcome
    thread.join(20)
    assert not thread.is_alive()


def check_stopped(turn: Future[Any], since: float) -> None:
    with pytest.raises(TurnCancelled, match=r"chat\.cancel\(\)"):
        turn.result(timeout=20)
    assert time.monotonic() - since < A_SECOND


def wait_until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """What is waited for until the test is over."""
    event = threading.Event()
    yield event
    event.set()


# From another thread


def silent(ask: Any, asked: threading.Event, never: threading.Event) -> Callable[[dict[str, Any]], Any]:
    """A model that says nothing at all."""

    def model(keywords: dict[str, Any]) -> Any:
        asked.set()
        if ask in (WAYS["aask"], WAYS["aask_stream"]):
            return Say("never", delay_s=60)
        never.wait(60)
        return "never"

    return model


@ON_ERROR
def test_a_turn_is_stopped_while_its_model_says_nothing(store, ask, never, on_error):
    asked = threading.Event()
    chat = chat_with(store, silent(ask, asked, never), on_error=on_error)
    with running(ask, chat, "Count!") as turn:
        assert asked.wait(20)
        since = time.monotonic()
        assert again(chat).cancel() is True
        check_stopped(turn, since)
    assert messages(store) == ERASED + ([("assistant", "incomplete", None)] if on_error == "keep" else [])
    assert rows(store, "request", *STOPPED) == [(499, "TurnCancelled", True, 1, 0)]
    check_free(chat)


@pytest.mark.parametrize("way", STREAMS)
@ON_ERROR
def test_a_stream_is_stopped_while_it_waits_for_the_next_piece(store, way, never, on_error):
    shown = threading.Event()
    chat = chat_with(store, Say("one two", until=never), "Go on.", on_error=on_error)
    with running(read, chat, way, lambda chunk: shown.set()) as turn:
        assert shown.wait(20)
        since = time.monotonic()
        assert chat.cancel() is True
        check_stopped(turn, since)
    assert messages(store) == ERASED + ([("assistant", "incomplete", "one ")] if on_error == "keep" else [])
    assert rows(store, "request", *STOPPED, "streamed") == [(499, "TurnCancelled", True, 1, 1, True)]
    check_free(chat)


def read(chat: Chat, way: str, see: Callable[[Any], Any], **options: Any) -> None:
    """Read a stream, and see each of its chunks."""

    async def read_async() -> None:
        async with chat.aask_stream("Count!", **options) as stream:
            async for chunk in stream:
                see(chunk)

    if way == "aask_stream":
        asyncio.run(read_async())
        return
    with chat.ask_stream("Count!", **options) as stream:
        for chunk in stream:
            see(chunk)


class Watched(ScriptedLLM):
    """A model that says two pieces, and nothing more, and notices when its stream is hung up on."""

    def __init__(self, *script: Any, goes_on: threading.Event):
        super().__init__(*script)
        self.goes_on = goes_on
        self.said = 0
        self.hung_up = threading.Event()

    def _stream(self, say: Say, keywords: dict[str, Any]) -> Iterator[Any]:
        try:
            for part in self._parts(say, keywords):
                if self.said == 2:
                    self.goes_on.wait(60)
                self.said += 1
                yield part
        finally:
            self.hung_up.set()

    async def _astream(self, say: Say, keywords: dict[str, Any]) -> Any:
        try:
            for part in self._parts(say, keywords):
                if self.said == 2:
                    await asyncio.sleep(60)
                self.said += 1
                yield part
        finally:
            self.hung_up.set()


@pytest.mark.parametrize("way", STREAMS)
@ON_ERROR
def test_a_stream_is_stopped_between_two_pieces_and_the_provider_is_hung_up_on(store, way, never, on_error):
    """Nothing more is asked of the provider, who may take its time."""
    llm = Watched("one two three four", goes_on=never)
    chat = create_chat(store, model="test", llm=llm, on_error=on_error)
    seen: list[str] = []

    def see(chunk: Any) -> None:
        seen.append(chunk.content)
        if len(seen) == 2:
            assert chat.cancel() is True

    with pytest.raises(TurnCancelled):
        read(chat, way, see)
    assert llm.hung_up.is_set()
    assert (llm.said, seen) == (2, ["one ", "two "])
    assert messages(store) == ERASED + ([("assistant", "incomplete", "one two ")] if on_error == "keep" else [])
    assert rows(store, "request", "status_code", "output_tokens", "usage_estimated") == [(499, 2, True)]
    check_free(chat)


def test_a_stream_that_was_stopped_has_no_message_and_no_more_pieces(store, never):
    chat = chat_with(store, Say("one two", until=never))
    stream = chat.ask_stream("Count!")
    assert next(stream).content == "one "
    chat.cancel()
    with pytest.raises(TurnCancelled):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert stream.message is None
    stream.close()


def test_a_reader_who_leaves_a_stream_that_was_stopped_hears_nothing_of_it(store):
    chat = chat_with(store, "one two three")
    with chat.ask_stream("Count!") as stream:
        next(stream)
        chat.cancel()
    assert messages(store) == ERASED
    assert rows(store, "request", "status_code") == [(499,)]
    check_free(chat)


def test_what_the_turn_had_done_is_kept_and_shown_again(store, ask, never):
    asked = threading.Event()
    first = Say("Looking.", calls=[LONDON], input_tokens=10, output_tokens=3, cost="0.25")
    chat = chat_with(store, first, silent(ask, asked, never), "Rain.", tools=[get_weather], on_error="keep")
    with running(ask, chat, "Weather?") as turn:
        assert asked.wait(20)
        since = time.monotonic()
        chat.cancel()
        check_stopped(turn, since)
    assert rows(store, "message", "status")[1] == ("incomplete",)
    assert rows(store, "message", "input_tokens")[1][0] > 10
    assert rows(store, "tool_call", "status", "result") == [("completed", "rain in London")]
    assert rows(store, "request", "round", "status_code") == [(0, 200), (1, 499)]
    assert str(chat.stats().cost) == "0.25"
    chat.ask("Well?")
    assert [message["role"] for message in chat.options.llm.requests[-1]["messages"]] == [
        "user",
        "assistant",
        "tool",
        "user",
    ]


def test_a_turn_that_was_stopped_can_be_retried(store, ask, never):
    asked = threading.Event()
    chat = chat_with(store, silent(ask, asked, never), "Hello!", on_error="keep")
    with running(ask, chat, "Hi") as turn:
        assert asked.wait(20)
        since = time.monotonic()
        chat.cancel()
        check_stopped(turn, since)
    assert chat.retry().content == "Hello!"
    assert messages(store) == [("user", "completed", "Hi"), ("assistant", "completed", "Hello!")]


@ON_ERROR
def test_a_turn_is_stopped_while_it_waits_to_be_tried_again(store, ask, on_error):
    chat = chat_with(store, ProviderError(429, "slow down", retry_after=50), "never", on_error=on_error)
    with running(ask, chat, "Count!") as turn:
        wait_until(lambda: rows(store, "request", "id"))
        since = time.monotonic()
        assert chat.cancel() is True
        check_stopped(turn, since)
    assert messages(store) == ERASED + ([("assistant", "incomplete", None)] if on_error == "keep" else [])
    assert rows(store, "request", "status_code", "error") == [(429, "ProviderError")]
    assert len(chat.options.llm.requests) == 1
    check_free(chat)


def test_a_call_that_was_stopped_is_neither_tried_again_nor_made_of_another_model(store, ask, never):
    asked = threading.Event()
    chat = chat_with(store, silent(ask, asked, never), "never", retries=3, fallbacks=["other"])
    with running(ask, chat, "Count!") as turn:
        assert asked.wait(20)
        since = time.monotonic()
        chat.cancel()
        check_stopped(turn, since)
    assert len(chat.options.llm.requests) == 1
    assert len(rows(store, "request", "id")) == 1


@pytest.mark.parametrize("way", ["aask", "aask_stream"])
def test_a_turn_is_stopped_while_async_tools_run_and_so_are_they(store, way):
    started, ended = threading.Semaphore(0), []

    @tool
    async def hang(name: str) -> str:
        started.release()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)
        return "never"

    calls = [Call("hang", name="one"), Call("hang", name="two"), Call("hang", name="three")]
    chat = chat_with(store, calls, "never", tools=[hang], tool_concurrency=2)
    with running(WAYS[way], chat, "Count!") as turn:
        assert started.acquire(timeout=20)
        assert started.acquire(timeout=20)
        since = time.monotonic()
        assert chat.cancel() is True
        check_stopped(turn, since)
    assert sorted(ended) == ["one", "two"]
    assert messages(store) == ERASED
    assert rows(store, "tool_call", "status", "error", "result") == [("failed", "interrupted", None)] * 3
    assert rows(store, "request", "status_code") == [(200,)]
    check_free(chat)


@pytest.mark.parametrize("way", ["ask", "ask_stream"])
def test_a_tool_that_runs_alone_is_let_finish_first(store, way):
    started, release = threading.Event(), threading.Event()

    @tool
    def slow(name: str) -> str:
        started.set()
        assert release.wait(20)
        return f"{name} is done"

    chat = chat_with(store, [Call("slow", name="one"), Call("slow", name="two")], "never", tools=[slow])
    with running(WAYS[way], chat, "Count!") as turn:
        assert started.wait(20)
        assert chat.cancel() is True
        release.set()
        with pytest.raises(TurnCancelled):
            turn.result(timeout=20)
    assert rows(store, "tool_call", "status", "result") == [("completed", "one is done"), ("failed", None)]
    assert messages(store) == ERASED
    check_free(chat)


@ON_ERROR
@pytest.mark.parametrize("way", ["ask", "ask_stream"])
def test_a_turn_that_is_stopped_during_its_last_tool_does_not_wait_for_approval(store, database_url, way, on_error):
    """Whoever stopped it may be another process, which cannot tell it at once."""

    @tool
    def stop() -> str:
        with connect(database_url) as elsewhere:
            asked = load_chat(elsewhere, chat.id)
            assert asked is not None
            assert asked.cancel() is True
        return "stopped"

    script = [[Call("stop"), Call("refund", order="7")]]
    chat = chat_with(store, *script, tools=[stop, refund], on_error=on_error)
    with pytest.raises(TurnCancelled):
        WAYS[way](chat, "Count!")
    assert messages(store) == ERASED + ([("assistant", "incomplete", None)] if on_error == "keep" else [])
    assert {row[0] for row in rows(store, "message", "parked_at")} == {None}
    told = "Not run: the turn was broken off before." if on_error == "keep" else None
    assert rows(store, "tool_call", "status", "result") == [("completed", "stopped"), ("failed", told)]
    assert chat.pending_approvals() == []
    check_free(chat)


@pytest.mark.parametrize("way", list(WAYS))
def test_no_hook_is_called_any_more_once_a_turn_is_to_stop(store, way):
    called: list[str] = []
    chat = chat_with(store, LONDON, "never", tools=[get_weather])
    chat.on_tool_call_end(lambda call, outcome: chat.cancel())
    chat.on_tool_call_end(lambda call, outcome: called.append("end"))
    with pytest.raises(TurnCancelled):
        WAYS[way](chat, "Count!")
    assert called == []


def test_a_hook_that_takes_its_time_to_stop_may_be_told_so_again(store):
    problems: list[Any] = []

    async def slow(messages: Any) -> None:
        try:
            assert await chat.acancel() is True
            await asyncio.Event().wait()
        finally:
            assert await chat.acancel() is True
            await asyncio.sleep(0)

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
        with pytest.raises(TurnCancelled):
            await chat.aask("Count!")

    chat = chat_with(store, "never").before_request(slow)
    asyncio.run(ask())
    assert problems == []
    assert messages(store) == ERASED


@pytest.mark.parametrize("way", list(WAYS))
def test_a_call_that_was_not_made_any_more_is_not_on_record(store, way):
    """A turn that is stopped while its tool runs has spent what it has spent, and no guess of what would come."""
    chats: list[Chat] = []

    def stop() -> str:
        """Stop the turn."""
        assert chats[0].cancel() is True
        return "stopped"

    chats.append(chat_with(store, Call("stop"), "never", tools=[stop]))
    with pytest.raises(TurnCancelled):
        WAYS[way](chats[0], "Count!")
    assert len(chats[0].options.llm.requests) == 1
    assert rows(store, "request", "round", "status_code") == [(0, 200)]
    check_free(chats[0])


@pytest.mark.parametrize("way", list(WAYS))
def test_a_turn_that_is_stopped_in_a_hook_before_its_first_call_makes_none(store, way):
    chat = chat_with(store, "never")
    chat.before_request(lambda messages: chat.cancel())
    with pytest.raises(TurnCancelled):
        WAYS[way](chat, "Count!")
    assert chat.options.llm.requests == []
    assert rows(store, "request", "id") == []
    assert messages(store) == ERASED


@pytest.mark.parametrize("way", list(WAYS))
def test_tools_side_by_side_are_not_waited_for(store, way, never):
    started = threading.Semaphore(0)

    @tool
    def slow(name: str) -> str:
        started.release()
        never.wait(20)
        return "too late"

    calls = [Call("slow", name="one"), Call("slow", name="two"), Call("slow", name="three")]
    chat = chat_with(store, calls, "never", tools=[slow], tool_concurrency=2)
    with running(WAYS[way], chat, "Count!") as turn:
        assert started.acquire(timeout=20)
        assert started.acquire(timeout=20)
        since = time.monotonic()
        assert chat.cancel() is True
        check_stopped(turn, since)
    never.set()
    assert rows(store, "tool_call", "status", "result") == [("failed", None)] * 3
    assert messages(store) == ERASED
    check_free(chat)
    wait_until(lambda: not [each for each in threading.enumerate() if each.name.startswith("llm_orm tool")])


def test_a_turn_is_stopped_from_asyncio_too(store, never):
    chat = chat_with(store, Say("never", delay_s=60))

    async def main() -> None:
        assert await chat.acancel() is False
        turn = asyncio.create_task(chat.aask("Count!"))
        while not chat.options.llm.requests:
            await asyncio.sleep(0.001)
        assert await chat.acancel() is True
        with pytest.raises(TurnCancelled):
            await asyncio.wait_for(turn, 20)
        assert not turn.cancelled()

    asyncio.run(main())
    assert messages(store) == ERASED


def test_other_turns_of_the_process_go_on(store, ask, never):
    asked, release = threading.Event(), threading.Event()
    stopped = chat_with(store, silent(ask, asked, never))
    other = chat_with(store, Say("Mine.", until=release))
    with running(WAYS["ask"], other, "Hi") as theirs, running(ask, stopped, "Count!") as turn:
        assert asked.wait(20)
        wait_until(lambda: other.options.llm.requests)
        since = time.monotonic()
        stopped.cancel()
        check_stopped(turn, since)
        release.set()
        assert theirs.result(20).content == "Mine."


# From another process


def test_a_turn_is_stopped_by_a_store_that_does_not_run_it(store, database_url, ask, never):
    """What another process does: it can only write, and the turn's own process looks every half a second."""
    asked = threading.Event()
    chat = chat_with(store, silent(ask, asked, never))
    with connect(database_url) as other, running(ask, chat, "Count!") as turn:
        assert asked.wait(20)
        since = time.monotonic()
        elsewhere = load_chat(other, chat.id)
        assert elsewhere is not None
        assert elsewhere.cancel() is True
        check_stopped(turn, since)
    assert messages(store) == ERASED
    assert rows(store, "request", *STOPPED) == [(499, "TurnCancelled", True, 1, 0)]
    check_free(chat)


def test_half_a_second_and_a_look_make_less_than_a_second():
    assert LOOK_EVERY_S <= 0.5


CHILD = """
import sys, threading
from llm_orm import TurnCancelled, connect, load_chat
from llm_orm.testing import ScriptedLLM

def model(keywords):
    print("asked", flush=True)
    threading.Event().wait()

try:
    load_chat(connect(sys.argv[1]), sys.argv[2], llm=ScriptedLLM(model)).ask("Count!")
except TurnCancelled:
    print("stopped", flush=True)
"""


@contextmanager
def child(url: str, chat: Chat) -> Iterator[Process]:
    """A process that asks the chat a question which its model does not answer."""
    with Process(CHILD, url, str(chat.id)) as process:
        assert process.stdout.readline() == "asked\n"
        yield process


def test_the_turn_of_another_process_is_stopped(store, database_url):
    chat = chat_with(store)
    with child(database_url, chat) as process:
        since = time.monotonic()
        assert chat.cancel() is True
        assert process.stdout.readline() == "stopped\n"
        assert time.monotonic() - since < A_SECOND
        assert process.wait(20) == 0
    assert messages(store) == ERASED
    assert rows(store, "request", "status_code", "error") == [(499, "TurnCancelled")]
    check_free(chat)


def test_a_turn_that_is_to_be_stopped_and_whose_process_has_died_is_cleared_like_any_other(store, database_url):
    chat = chat_with(store)
    with child(database_url, chat) as process:
        process.kill()
    assert chat.cancel() is True  # nobody knows yet
    with pytest.raises(ChatBusy):
        chat.ask("Now?")
    assert again(chat, "Still here.").ask("Now?", stale_after=0).content == "Still here."
    assert rows(store, "message", "role", "cancelled_at") == [("user", None), ("user", None), ("assistant", None)]


@ON_ERROR
def test_a_turn_that_is_known_to_be_dead_ends_at_once(store, database_url, on_error):
    chat = chat_with(store, on_error=on_error)
    with child(database_url, chat) as process:
        process.kill()
    with freeze_time(datetime.now(UTC) + timedelta(seconds=61)):
        assert chat.cancel() is True
        assert chat.cancel() is False
    assert messages(store) == ERASED + ([("assistant", "incomplete", None)] if on_error == "keep" else [])
    with pytest.raises(NothingToResume):
        chat.resume()
    check_free(chat)


def test_a_turn_that_was_alive_a_moment_ago_ends_by_itself_whatever_counts_as_dead(store, ask, never):
    asked = threading.Event()
    chat = chat_with(store, silent(ask, asked, never), stale_after=0)
    with running(ask, chat, "Count!") as turn:
        assert asked.wait(20)
        since = time.monotonic()
        chat.cancel()
        check_stopped(turn, since)


def test_a_turn_that_was_to_be_stopped_can_be_resumed_once_its_process_has_died(store, database_url):
    chat = chat_with(store, "Here.")
    with child(database_url, chat) as process:
        process.kill()
    chat.cancel()
    assert chat.resume(stale_after=0).content == "Here."
    assert rows(store, "message", "status", "cancelled_at")[1] == ("completed", None)


# Where nothing runs


def test_there_is_nothing_to_stop_in_a_chat_at_rest(store):
    chat = chat_with(store, "Hello.", ProviderError(400))
    assert chat.cancel() is False
    chat.ask("Hi")
    assert chat.cancel() is False
    with pytest.raises(ProviderError):
        chat.ask("Again?")
    assert chat.cancel() is False
    assert asyncio.run(chat.acancel()) is False
    chat.delete()
    assert chat.cancel() is False


def test_a_reply_that_is_stored_stays(store, ask):
    told: list[bool] = []
    chat = chat_with(store, "Hello.")
    chat.on_end_message(lambda message: told.append(chat.cancel()))
    reply = ask(chat, "Hi")
    assert (reply.status, reply.content, told) == ("completed", "Hello.", [False])
    assert messages(store)[1] == ("assistant", "completed", "Hello.")
    assert rows(store, "request", "status_code") == [(200,)]


def test_a_stop_that_is_noticed_too_late_changes_nothing(store, ask):
    """The look found the turn still running; when it says so, the reply is written."""
    heard: list[str] = []
    chat = chat_with(store, "Hello.")
    chat.on_end_message(lambda message: store.heart.cancel(message.id))

    async def hear(message: Any) -> None:
        await asyncio.sleep(0)
        heard.append(message.content)

    chat.on_end_message(hear if ask in (WAYS["aask"], WAYS["aask_stream"]) else lambda m: heard.append(m.content))
    assert ask(chat, "Hi").content == "Hello."
    assert heard == ["Hello."]
    assert messages(store)[1] == ("assistant", "completed", "Hello.")


# Parked


@ON_ERROR
def test_a_turn_that_waits_for_approval_ends_at_once(store, ask, on_error):
    first = Say("Let me see.", calls=[LONDON, Call("refund", order="7")])
    chat = chat_with(store, first, tools=[get_weather, refund], on_error=on_error)
    ask(chat, "Count!")
    (call,) = chat.pending_approvals()

    assert again(chat, on_error=on_error).cancel() is True

    assert chat.cancel() is False
    kept = [("assistant", "incomplete", "Let me see.")] if on_error == "keep" else []
    assert messages(store) == [*ERASED, *kept]
    assert {row[0] for row in rows(store, "message", "parked_at")} == {None}
    assert rows(store, "tool_call", "name", "status", "error") == [
        ("get_weather", "completed", None),
        ("refund", "failed", "interrupted"),
    ]
    assert rows(store, "request", "status_code") == [(200,)]
    assert chat.pending_approvals() == []
    for act in (lambda: chat.approve(call), lambda: chat.deny(call)):
        with pytest.raises(InvalidValue):
            act()
    with pytest.raises(NothingToResume):
        chat.resume()
    check_free(chat)


def test_a_turn_that_waits_for_approval_is_stopped_from_asyncio_too(store):
    chat = chat_with(store, Call("refund", order="7"), tools=[refund])
    chat.ask("Count!")
    assert asyncio.run(chat.acancel()) is True
    assert messages(store) == ERASED


def test_a_turn_that_is_resumed_at_the_moment_in_which_it_is_stopped_goes_on(store):
    """One of the two is first, and the other sees it."""
    chat = chat_with(store, Call("refund", order="7"), "Done.", tools=[refund])
    chat.ask("Count!")
    chat.approve("call_1")
    read = store.read

    def read_and_resume(statement: Any) -> Any:
        found = read(statement)
        store.read = read  # type: ignore[method-assign]
        assert chat.resume().content == "Done."
        return found

    store.read = read_and_resume  # type: ignore[method-assign]
    assert again(chat).cancel() is False
    assert messages(store)[1] == ("assistant", "completed", "Done.")
    assert rows(store, "tool_call", "status") == [("completed",)]


def test_a_turn_that_was_resumed_a_moment_ago_is_stopped_all_the_same(store, never):
    """Its tool runs with what the model wrote, and so does whoever would resume it: less of that is kept only then."""

    @tool(requires_approval=True)
    def write_to(address: str) -> str:
        seen.extend([address, *rows(store, "tool_call", "arguments")])
        raise SystemExit

    seen: list[Any] = []
    mask = PIIMask(stored=True)
    chat = chat_with(store, Call("write_to", address="anna@example.com"), tools=[write_to], middlewares=[mask])
    chat.ask("Count!")
    chat.approve("call_1")
    read = store.read

    def read_and_resume(statement: Any) -> Any:
        found = read(statement)
        store.read = read  # type: ignore[method-assign]
        with patch.object(Rows, "give_up", lambda self, error: None), pytest.raises(SystemExit):
            chat.resume()
        return found

    store.read = read_and_resume  # type: ignore[method-assign]
    assert again(chat, middlewares=[mask]).cancel() is True
    assert rows(store, "tool_call", "status", "arguments") == [("running", seen[1][0])]
    assert "anna@example.com" in seen[1][0]
    assert rows(store, "message", "cancelled_at")[1] != (None,)


def test_a_resumed_turn_is_stopped_like_any_other(store, never):
    asked = threading.Event()
    chat = chat_with(store, Call("refund", order="7"), tools=[refund])
    chat.ask("Count!")
    chat.options.llm.add(silent(None, asked, never))
    with pytest.raises(AwaitsApproval):
        chat.resume()
    chat.approve("call_1")
    with running(chat.resume) as turn:
        assert asked.wait(20)
        since = time.monotonic()
        assert chat.cancel() is True
        check_stopped(turn, since)
    assert messages(store) == ERASED
    assert rows(store, "request", "round", "status_code") == [(0, 200), (1, 499)]
    check_free(chat)


# Over HTTP, by the real litellm


def chat_on(store: Store, provider: Provider, wire: str, **options: Any) -> Chat:
    settings = getattr(provider, wire)()
    model = settings.pop("model")
    return create_chat(store, **{"model": model, "llm": LLM(**settings), **options})


SLOW = Answer("one two three four five six", input_tokens=12, output_tokens=9, chunks=6)
WIRES = pytest.mark.parametrize("wire", ["openai", "anthropic", "gemini"])


@WIRES
def test_a_provider_that_says_nothing_does_not_keep_a_turn_from_being_stopped(sqlite_store, provider, wire):
    chat = chat_on(sqlite_store, provider, wire)
    provider.hang(SLOW)
    with running(chat.ask, "Count!") as turn:
        provider.wait_until(lambda: provider.requests != [], timeout=20)
        since = time.monotonic()
        assert chat.cancel() is True
        check_stopped(turn, since)
    assert messages(sqlite_store) == ERASED
    ((status, error, estimated, input_tokens, _),) = rows(sqlite_store, "request", *STOPPED)
    assert (status, error, estimated) == (499, "TurnCancelled", True)
    assert input_tokens > 0
    assert rows(sqlite_store, "request", "cost")[0][0] > 0
    provider.release()


@WIRES
@pytest.mark.parametrize("way", STREAMS)
def test_a_stream_of_a_provider_that_hangs_is_stopped_and_kept_as_far_as_it_came(sqlite_store, provider, wire, way):
    chat = chat_on(sqlite_store, provider, wire, on_error="keep")
    provider.hang(SLOW, chunk=5)
    shown: list[str] = []
    with running(read, chat, way, lambda chunk: shown.append(chunk.content)) as turn:
        wait_until(lambda: shown)
        since = time.monotonic()
        assert chat.cancel() is True
        check_stopped(turn, since)
    if way == "aask_stream":
        provider.wait_until(lambda: provider.ledger[0].disconnected)
    provider.release()
    ((role, status, content),) = messages(sqlite_store)[1:]
    assert (role, status) == ("assistant", "incomplete")
    assert content.startswith("one")
    assert "six" not in content
    ((status_code, _, estimated, input_tokens, output_tokens),) = rows(sqlite_store, "request", *STOPPED)
    assert (status_code, estimated) == (499, True)
    assert min(input_tokens, output_tokens) > 0
    provider.reply("Still here.")
    assert chat.ask("Again?").content == "Still here."


@WIRES
def test_a_provider_is_hung_up_on_where_its_stream_is_stopped_between_two_pieces(sqlite_store, provider, wire):
    chat = chat_on(sqlite_store, provider, wire)
    provider.hang(SLOW, chunk=5)
    with chat.ask_stream("Count!") as stream:
        next(stream)
        assert chat.cancel() is True
        with pytest.raises(TurnCancelled):
            next(stream)
    provider.wait_until(lambda: provider.ledger[0].disconnected)


def test_a_provider_that_was_given_up_is_hung_up_on_when_it_speaks_again(sqlite_store, provider):
    chat = chat_on(sqlite_store, provider, "openai")
    provider.hang(Answer("one two three " * 50_000, chunks=5_000), chunk=3)
    shown: list[str] = []
    idle = len(aside_module._idle)
    with running(read, chat, "ask_stream", lambda chunk: shown.append(chunk.content)) as turn:
        wait_until(lambda: shown)
        since = time.monotonic()
        chat.cancel()
        check_stopped(turn, since)
    provider.release()
    provider.wait_until(lambda: provider.ledger[0].disconnected)
    wait_until(lambda: len(aside_module._idle) >= max(idle, 1))


def test_what_a_cancelled_call_did_cost_is_put_in_the_place_of_its_estimate_when_the_answer_comes_after_all(store):
    answered = threading.Event()
    slow = Say("Too late.", input_tokens=1000, output_tokens=500, until=answered)
    llm = ScriptedLLM(slow, "Next.", input_cost_per_token="0.001", output_cost_per_token="0.002")
    chat = create_chat(store, model="test", llm=llm)

    def ask() -> None:
        with pytest.raises(TurnCancelled):
            chat.ask("Hello?")

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: llm.requests)
    assert chat.cancel()
    asking.join()
    ((tokens, estimated),) = rows(store, "request", "output_tokens", "usage_estimated")
    assert (tokens, estimated) == (0, True)

    answered.set()

    wait_until(lambda: rows(store, "request", "usage_estimated") == [(False,)])
    names = ("status_code", "error", "input_tokens", "output_tokens", "cost", "finish_reason")
    assert rows(store, "request", *names) == [(499, "TurnCancelled", 1000, 500, Decimal(2), "stop")]
    assert [message.role for message in chat.messages()] == ["user"]
    assert chat.retry().content == "Next."


@pytest.mark.parametrize("way", ["ask", "aask"])
def test_a_tool_whose_thread_comes_to_it_when_the_turn_is_over_is_not_run(store, way):
    waits, gate, ran, threads = threading.Semaphore(0), threading.Event(), [], []

    @tool
    def note(name: str) -> str:
        ran.append(name)
        return "noted"

    class Slow(ThreadPoolExecutor):
        """Threads that take a while to begin."""

        def submit(self, run: Any, *arguments: Any) -> Any:
            def begin() -> Any:
                threads.append(threading.current_thread())
                waits.release()
                gate.wait(20)
                return run(*arguments)

            return super().submit(begin)

    chat = chat_with(
        store, [Call("note", name="one"), Call("note", name="two")], "never", tools=[note], tool_concurrency=2
    )
    with patch("llm_orm.play.ThreadPoolExecutor", Slow), running(WAYS[way], chat, "Count!") as turn:
        assert waits.acquire(timeout=20)
        assert waits.acquire(timeout=20)
        since = time.monotonic()
        assert chat.cancel() is True
        check_stopped(turn, since)
    gate.set()
    for thread in threads:
        thread.join()
    assert ran == []
    check_free(chat)

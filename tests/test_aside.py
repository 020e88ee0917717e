"""Threads that wait for models: few of them, which know where they were called from; none is left behind."""

import contextvars
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import WAYS, rows

from llm_orm import TurnCancelled, create_chat, tool
from llm_orm.testing import Call, Say, ScriptedLLM

ERASED = [("user", "completed", "Count!")]


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """What is waited for until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def model_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "llm_orm model"}


def wait_until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


def press_ctrl_c() -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


class Stuttering(ScriptedLLM):
    """A model that streams one piece, does something, and waits before it goes on."""

    def __init__(self, *script: Any, meanwhile: Callable[[], Any], goes_on: threading.Event):
        super().__init__(*script)
        self.meanwhile, self.goes_on = meanwhile, goes_on
        self.said = 0
        self.hung_up = threading.Event()

    def _stream(self, say: Say, keywords: dict[str, Any]) -> Iterator[Any]:
        try:
            for part in self._parts(say, keywords):
                self.said += 1
                if self.said == 2:
                    self.meanwhile()
                    self.goes_on.wait(60)
                yield part
        finally:
            self.hung_up.set()


def test_hundreds_of_asks_take_a_handful_of_threads(sqlite_store):
    before, used = threading.active_count(), set()

    def model(keywords: dict[str, Any]) -> str:
        used.add(threading.get_ident())
        return "Hello."

    chat = create_chat(sqlite_store, model="test", llm=ScriptedLLM(*[model] * 300), history=0)
    for number in range(300):
        if number % 2:
            chat.ask("Hi")
        else:
            list(chat.ask_stream("Hi"))
    assert len(used) <= 8
    assert threading.active_count() <= before + 8
    assert len(rows(sqlite_store, "request", "id")) == 300


def test_turns_that_are_stopped_before_they_call_a_model_take_none(sqlite_store):
    chat = create_chat(sqlite_store, model="test", llm=ScriptedLLM())
    chat.before_request(lambda messages: chat.cancel())
    before = model_threads()
    for _ in range(20):
        with pytest.raises(TurnCancelled):
            chat.ask("Hi")
    assert model_threads() <= before


where = contextvars.ContextVar("where", default="nowhere")


def test_the_models_library_hooks_and_tools_know_where_they_are_called_from(store, ask):
    """A tracing library finds its span, an application its request."""
    seen: list[str] = []

    def model(reply: Any) -> Callable[[Any], Any]:
        return lambda keywords: seen.append(f"model: {where.get()}") or reply

    @tool
    def look() -> str:
        seen.append(f"tool: {where.get()}")
        return "seen"

    llm = ScriptedLLM(model(Call("look")), model([Call("look"), Call("look")]), model("Done."))
    chat = create_chat(store, model="test", llm=llm, tools=[look], tool_concurrency=2)
    chat.before_request(lambda messages: seen.append(f"hook: {where.get()}"))
    token = where.set("here")
    try:
        ask(chat, "Look!")
    finally:
        where.reset(token)
    assert len(seen) == 9
    assert {line.partition(": ")[2] for line in seen} == {"here"}


def test_a_stream_of_the_models_library_keeps_its_context_from_piece_to_piece(sqlite_store):
    class Library(ScriptedLLM):
        def _stream(self, say: Say, keywords: dict[str, Any]) -> Iterator[Any]:
            where.set("in a span")
            for part in self._parts(say, keywords):
                spans.append(where.get())
                yield part

    spans: list[str] = []
    chat = create_chat(sqlite_store, model="test", llm=Library("one two three"))
    for _ in chat.ask_stream("Count!"):
        assert where.get() == "nowhere"
    assert set(spans) == {"in a span"}


@pytest.mark.parametrize("way", ["ask", "ask_stream"])
@pytest.mark.parametrize("on_error", ["rollback", "keep"])
def test_ctrl_c_ends_a_turn_whose_model_says_nothing(store, way, on_error, never):
    def model(keywords: dict[str, Any]) -> str:
        press_ctrl_c()
        never.wait(60)
        return "never"

    chat = create_chat(store, model="test", llm=ScriptedLLM(model, "Still here."), on_error=on_error)
    before = model_threads()
    with pytest.raises(KeyboardInterrupt):
        WAYS[way](chat, "Count!")
    kept = [("assistant", "incomplete", None)] if on_error == "keep" else []
    assert rows(store, "message", "role", "status", "content") == ERASED + kept
    assert rows(store, "request", "status_code", "error", "usage_estimated") == [(499, "KeyboardInterrupt", True)]
    assert chat.ask("Again?").content == "Still here."
    never.set()
    wait_until(lambda: is_at_rest(model_threads() - before))


def is_at_rest(threads: set[threading.Thread]) -> bool:
    """Whether the threads are there for the next turns: none more than as many turns at once take."""
    from llm_orm import aside

    return len(aside._idle) >= len(threads)


@pytest.mark.parametrize("on_error", ["rollback", "keep"])
def test_ctrl_c_ends_a_stream_that_waits_for_its_next_piece(store, on_error, never):
    llm = Stuttering("one two", meanwhile=press_ctrl_c, goes_on=never)
    chat = create_chat(store, model="test", llm=llm, on_error=on_error)
    with pytest.raises(KeyboardInterrupt):
        for chunk in chat.ask_stream("Count!"):
            assert chunk.content == "one "
    kept = [("assistant", "incomplete", "one ")] if on_error == "keep" else []
    assert rows(store, "message", "role", "status", "content") == ERASED + kept
    assert rows(store, "request", "status_code", "error", "output_tokens") == [(499, "KeyboardInterrupt", 1)]
    never.set()
    assert llm.hung_up.wait(20)


def test_a_stream_that_was_given_up_is_closed_when_its_provider_speaks_again(store, never):
    waits = threading.Event()
    llm = Stuttering("one two three four five", meanwhile=waits.set, goes_on=never)
    chat = create_chat(store, model="test", llm=llm)
    stream = chat.ask_stream("Count!")
    next(stream)

    def stop() -> None:
        assert waits.wait(20)
        chat.cancel()

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(TurnCancelled):
        next(stream)
    stopper.join()
    assert not llm.hung_up.is_set()
    never.set()
    assert llm.hung_up.wait(20)
    assert llm.said == 2
    assert rows(store, "message", "role", "status", "content") == ERASED


UNREAD = """
import sys
from llm_orm import connect, create_chat
from llm_orm.testing import ScriptedLLM

store = connect(sys.argv[1])
stream = create_chat(store, model="test", llm=ScriptedLLM("one two three")).ask_stream("Count!")
print(next(stream).content)
"""


def test_a_process_that_leaves_a_stream_unread_ends_and_its_turn_with_it(store, database_url):
    """When Python ends, the threads that models are called on run no more, and are not waited for."""
    command = [sys.executable, "-c", UNREAD, database_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("one \n", 0), done.stderr
    assert rows(store, "message", "role", "status", "content") == ERASED
    assert rows(store, "request", "status_code", "error") == [(499, "GeneratorExit")]


FORK = """
import asyncio, os, sys, threading
from llm_orm import connect, create_chat, load_chat, tool
from llm_orm.testing import Call, ScriptedLLM

store = connect(sys.argv[1])

def chat(*script, **options):
    return create_chat(store, model="test", llm=ScriptedLLM(*script), **options)

async def read(chat):
    async with chat.aask_stream("Hi") as stream:
        return [chunk.content async for chunk in stream]

def ask_each_way(who):
    assert chat(who).ask("Hi").content == who
    assert [chunk.content for chunk in chat(who).ask_stream("Hi")] == [who]
    assert asyncio.run(chat(who).aask("Hi")).content == who
    assert asyncio.run(read(chat(who))) == [who]

def in_a_fork(function, *arguments):
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        return "forked"
    failed = 1
    try:
        function(*arguments)
        failed = 0
    finally:
        os._exit(failed)

ask_each_way("parent")
in_a_fork(ask_each_way, "child")
ask_each_way("parent")

# A turn that runs while the process is forked is the parent's.

def look():
    turns = dict(store.heart._turns)
    assert turns == {}, turns
    ask_each_way("child of a tool")

@tool
def fork() -> str:
    return in_a_fork(look)

assert chat(Call("fork"), "Done.", tools=[fork]).ask("Fork!").content == "Done."
print("fine")
"""


def test_a_process_that_was_forked_asks_as_its_parent_does(store, database_url):
    command = [sys.executable, "-c", FORK, database_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "fine\n", done.stderr
    contents = [row[0] for row in rows(store, "message", "content") if row[0] not in ("Hi", "Fork!")]
    assert sorted(set(contents)) == ["Done.", "child", "child of a tool", "parent"]
    assert contents.count("child") == 4

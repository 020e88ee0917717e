"""Many processes at once, as a deployment has them: no turn is lost, and nobody keeps a connection while it waits."""

import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from conftest import WAYS, after_read, rows
from crew import check_nothing_is_lost, crew

from llm_orm import Chat, DatabaseUnavailable, ReplyNotSaved, Store, connect, create_chat, load_chat, tool
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM


def chat_with(store: Store, *script: Any, **options: Any) -> Chat:
    return create_chat(store, model="test", llm=ScriptedLLM(*script), **options)


def again(chat: Chat, *script: Any, **options: Any) -> Chat:
    """Another holder of the chat."""
    loaded = load_chat(chat.store, chat.id, llm=ScriptedLLM(*script), **options)
    assert loaded is not None
    return loaded


def wait_until(holds: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.002)


class Watcher:
    """Looks at the connections of one application_name, or of those that begin with it, from one of its own."""

    def __init__(self, url: str, name: str):
        self.connection = psycopg2.connect(url)
        self.connection.autocommit = True
        self.name = name

    def connections(self) -> list[tuple[str, bool, bool]]:
        """(application_name, whether a transaction is open and nothing runs in it, whether it waits for a lock)"""
        with self.connection.cursor() as cursor:
            cursor.execute(
                "SELECT application_name, state LIKE 'idle in transaction%%', wait_event_type IS NOT DISTINCT FROM "
                "'Lock' FROM pg_stat_activity WHERE application_name LIKE %s AND state IS NOT NULL",
                (f"{self.name}%",),
            )
            return cursor.fetchall()


@contextmanager
def watcher(url: str, name: str) -> Iterator[Watcher]:
    watching = Watcher(url, name)
    try:
        yield watching
    finally:
        watching.connection.close()


def most_connections(watching: Watcher, goes_on: Callable[[], bool]) -> dict[str, int]:
    """How many connections of each name there were at once, at the most, while something went on."""
    most: dict[str, int] = {}
    while goes_on():
        names = [name for name, _, _ in watching.connections()]
        for name in names:
            most[name] = max(most.get(name, 0), names.count(name))
    return most


# Nothing is lost


matrix = pytest.mark.matrix


@pytest.mark.parametrize(
    ("processes", "many", "orders"),
    [
        pytest.param({"sqlite": 3, "postgresql": 4}, 5, {"turns": 3}, id="a few"),
        pytest.param({"sqlite": 8, "postgresql": 32}, 40, {"seconds": 20}, id="many chats", marks=matrix),
        pytest.param({"sqlite": 8, "postgresql": 32}, 1, {"seconds": 20}, id="one chat", marks=matrix),
    ],
)
def test_processes_that_ask_at_once_lose_no_turn(store, database_url, tmp_path, processes, many, orders):
    """One row for each call, one reply for each caller, at positions without a gap; and no process fails."""
    chats = [chat_with(store).id for _ in range(many)]
    size = processes["sqlite" if store.is_sqlite else "postgresql"]
    with crew(tmp_path / "ledger", url=database_url, chats=chats, processes=size, threads=2, **orders) as running:
        happened = check_nothing_is_lost(store, running.wait())
    assert happened["reply"]
    assert not happened["error"] + happened["not saved"]


def test_a_turn_that_is_taken_back_while_the_next_one_begins_leaves_no_gap(postgres_url):
    """The next one's question would stand behind a placeholder that is gone when its own is written."""
    with connect(postgres_url) as store:
        store.create_tables()
        chat = chat_with(store, ProviderError(400), "Second.")
        other = psycopg2.connect(postgres_url)
        taken_back = threading.Event()

        def take_back() -> None:
            if not taken_back.is_set():
                taken_back.set()
                other.commit()

        def model(keywords: dict[str, Any]) -> str:
            with other.cursor() as cursor:
                cursor.execute("DELETE FROM llm_message WHERE status = 'pending'")
            after_read(store, 1, take_back)  # where the next one looks who is in its way
            with ThreadPoolExecutor(1) as threads:
                asked = threads.submit(again(chat, "Second.").ask, "Two", wait=30)
                with watcher(postgres_url, "llm_orm") as watching:
                    wait_until(lambda: taken_back.is_set() or any(waits for _, _, waits in watching.connections()))
                take_back()
                asked.result()
            return "First."

        chat.options.llm.script[:] = [model]
        with pytest.raises(ReplyNotSaved):
            chat.ask("One")
        other.close()
        assert rows(store, "message", "position", "content") == [(0, "One"), (1, "Two"), (2, "Second.")]


def test_who_waits_for_sqlites_lock_looks_for_it_all_the_time(sqlite_url):
    """Left to itself, SQLite looks ten times a second after a while, and others are always there before."""
    with connect(sqlite_url, pragmas={"busy_timeout": 5000}) as store, sqlite3.connect(sqlite_url[10:]) as other:
        store.create_tables()
        chat, looked, run = chat_with(store, "Mine."), [], store.database.execute_sql

        def look(sql: str, *arguments: Any, **options: Any) -> Any:
            if sql == "BEGIN IMMEDIATE":
                looked.append(sql)
                if len(looked) == 3:
                    other.rollback()
            return run(sql, *arguments, **options)

        other.execute("BEGIN IMMEDIATE")
        store.database.execute_sql = look  # type: ignore[method-assign]
        assert chat.ask("Hi").content == "Mine."
        with store.connection():
            assert run("PRAGMA busy_timeout").fetchone() == (5000,)
    other.close()


@pytest.mark.parametrize("patience_ms", [0, 60])
def test_sqlites_lock_is_waited_for_as_long_as_the_pragma_says(sqlite_url, patience_ms):
    with connect(sqlite_url, pragmas={"busy_timeout": patience_ms}) as store, sqlite3.connect(sqlite_url[10:]) as other:
        store.create_tables()
        chat = chat_with(store, "never")
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match="database is locked"):
            chat.ask("Hi")
        assert time.monotonic() - began >= patience_ms / 1000
        other.rollback()
        assert chat.options.llm.requests == rows(store, "message", "id") == []
    other.close()


@pytest.mark.parametrize(("processes", "many"), [(3, 4), pytest.param(16, 40, marks=matrix)], ids=["few", "many"])
def test_processes_that_ask_with_one_key_get_one_answer(store, database_url, tmp_path, processes, many):
    """Two threads each, in every way: it is paid for once, and whoever waits has the same message in hand."""
    orders = {"job": "ask_with_a_key", "processes": processes, "threads": 2}
    chats = [chat_with(store).id for _ in range(many)]
    with crew(tmp_path / "ledger", url=database_url, chats=chats, **orders) as running:
        ledger = running.wait()
    happened = Counter(each["kind"] for each in ledger)
    assert set(happened) <= {"call", "reply", "busy"}
    assert happened["call"] == many
    assert happened["reply"] >= processes * many
    assert len({each["message"] for each in ledger if each["kind"] == "reply"}) == many
    assert rows(store, "message", "status", "content")[::2] == [("completed", "Book it.")] * many
    assert len(rows(store, "message", "id")) == 2 * many
    assert rows(store, "request", "status_code") == [(200,)] * many


# Turns whose process died


@pytest.fixture
def dead_chats(store: Store, database_url: str, tmp_path: Path) -> list[Any]:
    """Three chats with a turn each whose process was killed an hour ago, behind a tool and before the next reply."""
    chats = [chat_with(store).id for _ in range(3)]
    with crew(tmp_path / "dead", url=database_url, job="hang", processes=3, chats=chats) as running:
        wait_until(lambda: len(running.ledger) == 6)
        running.kill()
    with store.connection():
        message = store.records.message
        message.update(updated_at=datetime.now(UTC) - timedelta(hours=1)).where(message.status == "pending").execute()
    return chats


@pytest.mark.parametrize(
    "job", ["resume_or_end", pytest.param("resume", marks=matrix), pytest.param("end_dead_turns", marks=matrix)]
)
def test_of_those_who_take_up_a_dead_turn_at_once_one_gets_it(store, database_url, tmp_path, dead_chats, job):
    """Four processes, which go on with the turns or end them; nobody pays for what another has taken."""
    with crew(tmp_path / "ledger", url=database_url, job=job, processes=4, threads=2, chats=dead_chats) as running:
        ledger = running.wait()
    taken = [each["message"] for each in ledger if each["kind"] in ("reply", "recovered")]
    pending = {str(message_id) for (message_id,) in rows(store, "message", "id")[1::2]}
    assert len(taken) == len(set(taken)) == 3
    assert set(taken) == pending
    kinds = Counter(each["kind"] for each in ledger)
    assert kinds["call"] == kinds["reply"]
    assert {each["type"] for each in ledger if each["kind"] == "error"} <= {"NothingToResume"}
    replies = [row for row in rows(store, "message", "status", "content") if row[0] == "completed"]
    assert replies.count(("completed", "It rains.")) == kinds["reply"]
    assert rows(store, "tool_call", "status", "result") == [("completed", "rain in London")] * 3
    assert not [status for (status,) in rows(store, "message", "status") if status == "pending"]


# Connections while a model or a tool is waited for

goes_on, arrived = threading.Event(), threading.Semaphore(0)


@tool
def wait_for_it() -> str:
    arrived.release()
    assert goes_on.wait(60)
    return "It came."


@pytest.mark.parametrize("waits_for", ["model", "tool"])
@pytest.mark.parametrize("way", list(WAYS))
def test_turns_that_wait_hold_no_connection_and_no_transaction(postgres_url, waits_for, way):
    """Twenty turns at once over a pool of two: while all of them wait, it has two connections at most, both idle."""
    at_once, name = 20, f"waiting_{way}_{waits_for}"
    goes_on.clear()
    with connect(f"{postgres_url}&application_name={name}", pool_size=2) as store, watcher(postgres_url, name) as seen:
        store.create_tables()
        first = Say("It is there.", until=goes_on) if waits_for == "model" else Call("wait_for_it")
        chats = [chat_with(store, first, "It is there.", tools=[wait_for_it]) for _ in range(at_once)]
        with ThreadPoolExecutor(at_once) as threads:
            asked = [threads.submit(WAYS[way], chat, "Is it there?") for chat in chats]
            try:
                if waits_for == "model":
                    wait_until(lambda: all(chat.options.llm.requests for chat in chats))
                else:
                    assert all(arrived.acquire(timeout=20) for _ in chats)
                wait_until(lambda: not store.database._in_use)  # type: ignore[attr-defined]
                connections = seen.connections()
                assert 1 <= len(connections) <= 2
                assert not any(is_open for _, is_open, _ in connections)
                assert rows(store, "message", "status") == [("completed",), ("pending",)] * at_once
            finally:
                goes_on.set()
            assert [each.result().content for each in asked] == ["It is there."] * at_once
        assert len(seen.connections()) <= 2


@pytest.mark.parametrize(
    ("processes", "orders"), [(3, {"turns": 4}), pytest.param(32, {"seconds": 20}, marks=matrix)], ids=["few", "many"]
)
def test_a_process_never_has_more_connections_than_its_pool(postgres_url, tmp_path, processes, orders):
    """Each talks in more threads than it may have connections, with a model that takes its time."""
    with connect(postgres_url) as store, watcher(postgres_url, "crew_") as watching:
        store.create_tables()
        orders = {**orders, "url": f"{postgres_url}&application_name=crew_", "processes": processes, "threads": 5}
        with crew(tmp_path / "ledger", **orders, chats=[chat_with(store).id for _ in range(20)]) as running:
            most = most_connections(watching, lambda: running.is_at_work)
            check_nothing_is_lost(store, running.wait())
    assert len(most) == processes
    assert max(most.values()) == 2


# More threads than connections


@contextmanager
def all_connections_taken(store: Store, number: int) -> Iterator[None]:
    """Connections that the application itself has taken, in threads of its own, and gives back after the block."""
    taken, release = threading.Barrier(number + 1, timeout=20), threading.Event()

    def take() -> None:
        with store.connection():
            taken.wait()
            assert release.wait(60)

    with ThreadPoolExecutor(number) as threads:
        for _ in range(number):
            threads.submit(take)
        taken.wait()
        try:
            yield
        finally:
            release.set()


@pytest.mark.parametrize("way", list(WAYS))
def test_a_turn_without_a_connection_waits_for_one_and_then_says_so(database_url, way):
    with connect(database_url, pool_size=2, pool_timeout=0.15) as store:
        store.create_tables()
        chat = chat_with(store, "Now.")
        with all_connections_taken(store, 2):
            began = time.monotonic()
            with pytest.raises(DatabaseUnavailable, match=r"no connection of .* became free: all 2 are in use"):
                WAYS[way](chat, "Hi")
            assert time.monotonic() - began >= 0.15
        assert chat.options.llm.requests == rows(store, "message", "id") == rows(store, "request", "id") == []
        assert WAYS[way](chat, "Hi again").content == "Now."
        assert rows(store, "message", "position", "content") == [(0, "Hi again"), (1, "Now.")]


@pytest.mark.parametrize("way", list(WAYS))
def test_a_reply_for_which_no_connection_became_free_is_in_the_error(database_url, way):
    """The turn is as one whose process died: whoever asks next clears it, or it is resumed."""
    with connect(database_url, pool_size=2, pool_timeout=0.02) as store, ExitStack() as taken:
        store.create_tables()

        def model(keywords: dict[str, Any]) -> Say:
            taken.enter_context(all_connections_taken(store, 2))
            return Say("Paid for.", input_tokens=7)

        chat = chat_with(store, model, "Now.")
        with pytest.raises(ReplyNotSaved, match="became free") as raised:
            WAYS[way](chat, "Hi")
        assert (raised.value.reply.content, raised.value.reply.usage.input_tokens) == ("Paid for.", 7)
        taken.close()
        assert rows(store, "message", "status", "content") == [("completed", "Hi"), ("pending", None)]
        assert chat.ask("Again?", stale_after=0).content == "Now."
        assert rows(store, "message", "position", "content") == [(0, "Hi"), (1, "Again?"), (2, "Now.")]


# Processes that were forked

FORK = """
import os, signal, sys, threading
import psycopg2
from llm_orm import connect, create_chat
from llm_orm.testing import ScriptedLLM

store = connect(sys.argv[1])
connecting, goes_on, really = threading.Event(), threading.Event(), psycopg2.connect

def slowly(*arguments, **options):
    if threading.current_thread() is slow:
        connecting.set()
        goes_on.wait()
    return really(*arguments, **options)

def ask(who):
    print(create_chat(store, model="test", llm=ScriptedLLM(who)).ask("Hi").content, flush=True)

psycopg2.connect = slowly
slow = threading.Thread(target=ask, args=["parent"])
slow.start()
connecting.wait()
child = os.fork()
if not child:
    signal.alarm(20)
    ask("child")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
goes_on.set()
slow.join()
"""


def test_a_process_that_is_forked_while_a_thread_connects_asks_as_its_parent_does(postgres_url):
    with connect(postgres_url) as store:
        store.create_tables()
        done = subprocess.run([sys.executable, "-c", FORK, postgres_url], capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.returncode) == ("child\nparent\n", 0), done.stderr
        assert rows(store, "message", "status", "content") == [
            ("completed", "Hi"),
            ("completed", "child"),
            ("completed", "Hi"),
            ("completed", "parent"),
        ]

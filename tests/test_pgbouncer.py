"""Through PgBouncer in transaction mode: each transaction of a turn may be another connection of the server's."""

import asyncio
import os
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from conftest import WAYS, rows
from crew import check_nothing_is_lost, crew, get_weather
from psycopg2.extensions import parse_dsn

from llm_orm import (
    AwaitsApproval,
    Chat,
    DatabaseUnavailable,
    Store,
    TurnCancelled,
    connect,
    create_chat,
    load_chat,
    tool,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM
from llm_orm_schema import compare, migrate

COMMAND = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")

pytestmark = pytest.mark.skipif(COMMAND is None, reason="PgBouncer is not installed: apt-get install pgbouncer")

SERVER_CONNECTIONS = 2

SETTINGS = """
[databases]
{name} = {database}

[pgbouncer]
listen_addr =
listen_port = 6432
unix_socket_dir = {folder}
auth_type = any
pool_mode = transaction
default_pool_size = {size}
server_round_robin = 1
max_client_conn = 300
query_wait_timeout = 20
logfile = {folder}/log
"""
"""server_round_robin: the next transaction is never run by the connection of the last one, where there are two."""


class PgBouncer:
    """A PgBouncer before a database of its own."""

    def __init__(self, server: str, folder: Path):
        self.server, self.folder = server, folder
        self.name = f"pgbouncer_{uuid.uuid4().hex}"
        self._on_the_server(f"CREATE DATABASE {self.name}")
        self.admin = psycopg2.connect(**{**parse_dsn(server), "dbname": self.name})
        self.admin.autocommit = True

    @property
    def url(self) -> str:
        return f"postgresql://somebody@/{self.name}?host={self.folder}&port=6432"

    def start(self) -> None:
        given = {**parse_dsn(self.server), "dbname": self.name}
        database = " ".join(f"{name}='{value}'" for name, value in given.items() if name != "options")
        settings = SETTINGS.format(name=self.name, database=database, folder=self.folder, size=SERVER_CONNECTIONS)
        (self.folder / "settings.ini").write_text(settings)
        user = self._user(given.get("host", ""))
        if user:
            shutil.chown(self.folder, user)
        command = [str(COMMAND), "-q", str(self.folder / "settings.ini")]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, user=user, extra_groups=[] if user else None
        )
        wait_until(self._answers)

    def _user(self, host: str) -> str | None:
        """As whom it runs where we are root, which it refuses to be: whose the server's socket is."""
        if os.geteuid() != 0:
            return None
        owner = Path(host).owner() if host.startswith("/") else "root"
        return "nobody" if owner == "root" else owner

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()
        try:
            psycopg2.connect(self.url).close()
        except psycopg2.OperationalError:
            return False
        return True

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def remove(self) -> None:
        self.stop()
        self.admin.close()
        self._on_the_server(f"DROP DATABASE {self.name} WITH (FORCE)")

    def server_connections(self) -> list[str]:
        """The states of its connections to the server."""
        with self.admin.cursor() as cursor:
            cursor.execute(
                "SELECT state FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid() "
                "AND backend_type = 'client backend'",
                (self.name,),
            )
            return [state for (state,) in cursor.fetchall()]

    def _on_the_server(self, sql: str) -> None:
        admin = psycopg2.connect(self.server)
        admin.autocommit = True
        with admin.cursor() as cursor:
            cursor.execute(sql)
        admin.close()


@pytest.fixture(scope="session")
def pgbouncer(postgres_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PgBouncer]:
    bouncer = PgBouncer(postgres_server, tmp_path_factory.mktemp("pgbouncer"))
    try:
        bouncer.start()
        with connect(bouncer.url) as store:
            store.create_tables()
        yield bouncer
    finally:
        bouncer.remove()


@pytest.fixture
def pooled(pgbouncer: PgBouncer) -> Iterator[Store]:
    """A store through PgBouncer, which is empty."""
    with connect(pgbouncer.url, pool_size=20) as store:
        with store.connection():
            for record in reversed(list(store.records)):
                record.delete().execute()
        yield store


def wait_until(holds: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def chat_with(store: Store, *script: Any, **options: Any) -> Chat:
    return create_chat(store, model="test", llm=ScriptedLLM(*script), **options)


def again(chat: Chat, *script: Any, **options: Any) -> Chat:
    """Another holder of the chat."""
    loaded = load_chat(chat.store, chat.id, llm=ScriptedLLM(*script), **options)
    assert loaded is not None
    return loaded


LONDON, PARIS = Call("get_weather", city="London"), Call("get_weather", city="Paris")


@pytest.mark.parametrize("way", list(WAYS))
def test_a_turn_with_tools_runs_through_it_in_every_way(pooled, way):
    chat = chat_with(pooled, [LONDON, PARIS], "Rain.", "Still rain.", tools=[get_weather])
    assert WAYS[way](chat, "Weather?").content == "Rain."
    assert WAYS[way](chat, "And now?").content == "Still rain."
    said = [(0, "Weather?"), (1, "Rain."), (2, "And now?"), (3, "Still rain.")]
    assert rows(pooled, "message", "position", "content") == said
    assert rows(pooled, "tool_call", "status", "result") == [
        ("completed", "rain in London"),
        ("completed", "rain in Paris"),
    ]
    assert rows(pooled, "request", "status_code") == [(200,)] * 3
    shown = again(chat, "Yes.")
    WAYS[way](shown, "Sure?")
    assert [message["role"] for message in shown.options.llm.requests[0]["messages"]][:4] == [
        "user",
        "assistant",
        "tool",
        "tool",
    ]


@pytest.mark.parametrize("on_error", ["rollback", "keep"])
def test_a_turn_that_fails_ends_through_it_as_elsewhere(pooled, on_error):
    chat = chat_with(pooled, Say("Half a", error=ProviderError(400)), "Whole.", on_error=on_error)
    with pytest.raises(ProviderError):
        WAYS["ask_stream"](chat, "Hi")
    kept = [("failed", "Half a")] if on_error == "keep" else []
    assert rows(pooled, "message", "status", "content") == [("completed", "Hi"), *kept]
    assert chat.retry().content == "Whole."
    assert rows(pooled, "message", "position", "content") == [(0, "Hi"), (1, "Whole.")]


@pytest.mark.parametrize("way", ["resume", "resume_stream", "aresume"])
def test_a_turn_is_approved_and_resumed_through_it(pooled, way):
    @tool(requires_approval=True)
    def refund(order: str) -> str:
        return f"refunded {order}"

    chat = chat_with(pooled, Call("refund", order="o_1"), tools=[refund])
    assert chat.ask("Refund it").status == "pending"
    with pytest.raises(AwaitsApproval):
        again(chat, tools=[refund]).ask("Well?")
    other = again(chat, "Done.", tools=[refund])
    other.approve(other.pending_approvals()[0])
    if way == "resume_stream":
        assert [chunk.content for chunk in other.resume_stream()] == ["Done."]
    else:
        assert (other.resume() if way == "resume" else asyncio.run(other.aresume())).content == "Done."
    assert rows(pooled, "tool_call", "approval", "result") == [("approved", "refunded o_1")]
    assert rows(pooled, "message", "status", "content") == [("completed", "Refund it"), ("completed", "Done.")]


@pytest.mark.parametrize("way", ["ask_stream", "aask"])
def test_a_turn_is_cancelled_through_it_from_another_store(pooled, pgbouncer, way):
    never = threading.Event()
    chat = chat_with(pooled, Say("one two", until=never))
    with connect(pgbouncer.url) as elsewhere, ThreadPoolExecutor(1) as threads:
        asked = threads.submit(WAYS[way], chat, "Count!")
        wait_until(lambda: chat.options.llm.requests)
        try:
            other = load_chat(elsewhere, chat.id)
            assert other is not None
            assert other.cancel()
            with pytest.raises(TurnCancelled):
                asked.result(20)
        finally:
            never.set()
    assert rows(pooled, "message", "status", "content") == [("completed", "Count!")]
    assert rows(pooled, "request", "status_code") == [(499,)]


def test_turns_that_wait_for_a_model_leave_its_connections_to_others(pooled, pgbouncer):
    goes_on = threading.Event()
    chats = [chat_with(pooled, Say("There.", until=goes_on)) for _ in range(12)]
    with ThreadPoolExecutor(12) as threads:
        asked = [threads.submit(WAYS[list(WAYS)[number % 4]], chat, "Hi") for number, chat in enumerate(chats)]
        try:
            wait_until(lambda: all(chat.options.llm.requests for chat in chats))
            wait_until(lambda: set(pgbouncer.server_connections()) == {"idle"})
            assert len(pgbouncer.server_connections()) <= SERVER_CONNECTIONS
            assert chat_with(pooled, "Between.").ask("And me?").content == "Between."
        finally:
            goes_on.set()
        assert {each.result().content for each in asked} == {"There."}


@pytest.mark.parametrize(
    ("processes", "orders"),
    [(3, {"turns": 2}), pytest.param(24, {"seconds": 20}, marks=pytest.mark.matrix)],
    ids=["few", "many"],
)
def test_processes_that_ask_at_once_through_it_lose_no_turn(pooled, pgbouncer, tmp_path, processes, orders):
    """Three threads and three connections each, over two of the server's for all of them."""
    chats, most = [chat_with(pooled).id for _ in range(7)], 0
    orders = {**orders, "processes": processes, "threads": 3, "pool_size": 3}
    with crew(tmp_path / "ledger", url=pgbouncer.url, chats=chats, **orders) as running:
        while running.is_at_work:
            most = max(most, len(pgbouncer.server_connections()))
        happened = check_nothing_is_lost(pooled, running.wait())
    assert happened["reply"]
    assert not happened["error"] + happened["not saved"]
    assert most == SERVER_CONNECTIONS


def test_tables_are_made_and_compared_through_it(pgbouncer):
    with connect(pgbouncer.url, table_prefix="other_") as store:
        try:
            assert migrate.pending(store)
            migrate.migrate(store)
            assert migrate.pending(store) == []
            assert compare.differences(store) == []
        finally:
            store.drop_tables()


def test_a_search_path_of_the_url_is_refused_with_what_pgbouncer_says(pgbouncer):
    with connect(f"{pgbouncer.url}&options=-csearch_path%3Dpublic") as store:
        with pytest.raises(DatabaseUnavailable, match=r"unsupported startup parameter.*options"):
            create_chat(store, model="test")


def test_a_name_and_a_timeout_of_the_url_reach_the_server(pgbouncer):
    url = f"{pgbouncer.url}&application_name=shop&connect_timeout=3"
    with connect(url) as store, store.connection():
        assert store.database.execute_sql("SELECT current_setting('application_name')").fetchone() == ("shop",)


def test_a_store_goes_on_where_pgbouncer_was_started_anew(pooled, pgbouncer):
    chat = chat_with(pooled, "One.", "Two.")
    chat.ask("1")
    pgbouncer.stop()
    pgbouncer.start()
    assert chat.ask("2").content == "Two."
    assert rows(pooled, "message", "position", "content") == [(0, "1"), (1, "One."), (2, "2"), (3, "Two.")]

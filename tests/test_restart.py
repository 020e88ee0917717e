"""PostgreSQL is restarted in the middle of turns: each of them ends well or with a clear error, and none half there."""

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peewee as pw
import psycopg2
import pytest
from conftest import WAYS, rows, start_postgres
from crew import Ledger, Model, ask_in_one_way, check_nothing_is_lost, crew, told

from llm_orm import Chat, DatabaseUnavailable, ReplyNotSaved, Store, connect, create_chat, load_chat
from llm_orm.testing import Say, ScriptedLLM


class Server:
    """A server that is stopped and started while others use it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.server = start_postgres(folder)
        self.url = self.server.get_uri()
        admin = psycopg2.connect(self.url)
        admin.autocommit = True
        with admin.cursor() as cursor:  # nobody cuts the power in these tests
            cursor.execute("ALTER SYSTEM SET fsync = off")
        admin.close()

    def run(self, *command: str) -> None:
        """Run pg_ctl, which ends when what it was told is done."""
        user = self.server.system_user
        subprocess.run(
            [str(self.server.bin_path / "pg_ctl"), "-w", "-D", str(self.folder), "-l", str(self.server.log), *command],
            check=True,
            stdout=subprocess.DEVNULL,
            user=user,
            extra_groups=[] if user else None,
            cwd="/",
        )

    def restart(self, mode: str) -> None:
        self.run("restart", "-m", mode)

    @contextmanager
    def stopped(self, mode: str) -> Iterator[None]:
        settings = (self.folder / "postmaster.opts").read_text().split('"')
        self.run("stop", "-m", mode)
        try:
            yield
        finally:
            self.run("-o", " ".join(f"'{word}'" for word in settings[1::2]), "start")

    def close(self) -> None:
        self.run("stop", "-m", "immediate")
        self.server.cleanup()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("restarted"))
    yield server
    server.close()


@pytest.fixture
def own_store(server: Server) -> Iterator[Store]:
    """A store on the server that is restarted, which is empty."""
    with connect(server.url, pool_size=8) as store:
        store.create_tables()
        yield store
        store.drop_tables()


def wait_until(holds: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


class Waiting:
    """Eight turns at once, two in each way, whose models wait until `go_on`."""

    def __init__(self, store: Store):
        self.goes_on = threading.Event()
        self.chats = [
            create_chat(store, model="test", llm=ScriptedLLM(Say("one two", input_tokens=7, until=self.goes_on)))
            for _ in range(8)
        ]
        self.threads = ThreadPoolExecutor(8)
        self.asked = [
            self.threads.submit(WAYS[way], chat, "Hi") for chat, way in zip(self.chats, [*WAYS] * 2, strict=True)
        ]
        wait_until(lambda: all(chat.options.llm.requests for chat in self.chats))

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, *exc: object) -> None:
        self.goes_on.set()
        self.threads.shutdown()


def ask_again(store: Store, chat: Chat, way: str = "ask") -> str | None:
    loaded = load_chat(store, chat.id, llm=ScriptedLLM("Still here."))
    assert loaded is not None
    return WAYS[way](loaded, "Again?", stale_after=0).content


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_turns_whose_models_answer_after_a_restart_end_as_if_there_had_been_none(server, own_store, mode):
    with Waiting(own_store) as waiting:
        server.restart(mode)
        waiting.goes_on.set()
        assert [each.result().content for each in waiting.asked] == ["one two"] * 8
    assert rows(own_store, "message", "role", "status") == [("user", "completed"), ("assistant", "completed")] * 8
    assert rows(own_store, "request", "status_code", "input_tokens") == [(200, 7)] * 8


@pytest.mark.parametrize("mode", ["fast", pytest.param("immediate", marks=pytest.mark.matrix)])
def test_turns_whose_models_answer_while_there_is_no_server_hand_over_what_was_paid_for(server, own_store, mode):
    with Waiting(own_store) as waiting, server.stopped(mode):
        waiting.goes_on.set()
        for each in waiting.asked:
            with pytest.raises(ReplyNotSaved) as raised:
                each.result()
            assert (raised.value.reply.content, raised.value.reply.usage.input_tokens) == ("one two", 7)
    assert rows(own_store, "message", "role", "status") == [("user", "completed"), ("assistant", "pending")] * 8
    assert [ask_again(own_store, chat, way) for chat, way in zip(waiting.chats, [*WAYS] * 2, strict=True)] == [
        "Still here."
    ] * 8
    assert {status for (status,) in rows(own_store, "message", "status")} == {"completed"}


def test_a_lost_connection_is_one_by_whatever_name_the_driver_calls_it(own_store):
    """psycopg2 says it now as an OperationalError, now as a plain DatabaseError: peewee's reached the caller."""
    chat = create_chat(own_store, model="test", llm=ScriptedLLM("Here."))
    run, lost = own_store.database.execute_sql, []

    def break_once(*arguments: Any, **options: Any) -> Any:
        if not lost:
            lost.append(True)
            raise pw.DatabaseError("server closed the connection") from psycopg2.DatabaseError()
        return run(*arguments, **options)

    own_store.database.execute_sql = break_once
    with own_store.database.connection_context(), pytest.raises(DatabaseUnavailable, match="did not answer"):
        chat.messages()  # on a connection of our own, it is for us to connect anew
    lost.clear()
    assert chat.ask("Hi").content == "Here."
    assert rows(own_store, "message", "position", "content") == [(0, "Hi"), (1, "Here.")]


@pytest.mark.parametrize(
    ("restarts", "processes", "many"),
    [
        pytest.param(["immediate"], 2, 8, id="once"),
        pytest.param(["immediate", "fast"] * 5, 12, 400, id="time and again", marks=pytest.mark.matrix),
    ],
)
def test_processes_that_ask_while_the_server_is_restarted_lose_no_turn(
    server, own_store, tmp_path, restarts, processes, many
):
    """Whatever its caller was told holds: a reply is in the rows, or is in the error; and all go on by themselves."""
    chats, ends = [create_chat(own_store, model="test").id for _ in range(many)], tmp_path / "ends"
    orders = {"until": str(ends), "calm": True, "wait": 0, "threads": 3, "chats": chats, "processes": processes}
    with crew(tmp_path / "ledger", url=server.url, **orders) as running:

        def all_have_a_reply(seen: int) -> bool:
            assert running.is_at_work
            return len({each["by"] for each in running.ledger[seen:] if each["kind"] == "reply"}) == 3 * processes

        wait_until(lambda: all_have_a_reply(0))
        for mode in restarts:
            server.restart(mode)
            seen = len(running.ledger)
            wait_until(lambda: all_have_a_reply(seen))  # noqa: B023
        ends.touch()
        ledger = running.wait()
    assert {each["type"] for each in ledger if each["kind"] == "error"} <= {"DatabaseUnavailable"}
    own = Ledger(tmp_path / "ledger")
    model = Model("test", own)
    for chat_id in chats:  # a turn whose end could not be written is as one whose process died
        chat = load_chat(own_store, chat_id, llm=model.says("Yes."))
        told(own, "test", ask_in_one_way, chat, "ask", "Still there?", stale_after=0)
    check_nothing_is_lost(own_store, running.ledger)

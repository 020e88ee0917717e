"""One turn at a time in a chat, across threads, tasks and processes; many chats at once; turns whose process died."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import after_read, rows
from freezegun import freeze_time
from processes import Process

from llm_orm import Chat, ChatBusy, ReplyNotSaved, Store, connect, create_chat, load_chat, tool
from llm_orm.heart import Heart
from llm_orm.statements import INTERRUPTED, NEVER_RUN
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

LONDON = Call("get_weather", city="London")


@tool
def get_weather(city: str) -> str:
    return f"rain in {city}"


def chat_with(store: Store, *script: Any, **options: Any) -> Chat:
    return create_chat(store, model="test", llm=ScriptedLLM(*script), **options)


def again(chat: Chat, *script: Any, **options: Any) -> Chat:
    """Another holder of the chat."""
    loaded = load_chat(chat.store, chat.id, llm=ScriptedLLM(*script), **options)
    assert loaded is not None
    return loaded


def messages(store: Store) -> list[Any]:
    return rows(store, "message", "position", "role", "status", "content")


# One turn at a time


def test_the_second_turn_at_once_is_refused_without_a_row_or_a_token(store, ask):
    chats: list[Chat] = []

    def model(keywords: dict[str, Any]) -> str:
        second = again(chats[0], "never")
        before = messages(store)
        with pytest.raises(ChatBusy, match=r"busy with another turn; wait=seconds"):
            second.ask("Me too")
        assert second.options.llm.requests == []
        assert messages(store) == before
        assert rows(store, "request", "id") == []
        return "First."

    chats.append(chat_with(store, model))
    assert ask(chats[0], "One").content == "First."


def test_a_task_that_asks_a_busy_chat_is_refused(store):
    async def main() -> None:
        chat = chat_with(store, "one two")
        async with chat.aask_stream("One") as stream:
            await anext(stream)
            with pytest.raises(ChatBusy):
                await again(chat).aask("Two")
            with pytest.raises(ChatBusy):
                await anext(again(chat).aask_stream("Two"))
            with pytest.raises(ChatBusy):
                await again(chat).aretry()

    asyncio.run(main())


def test_wait_gives_the_second_its_turn_when_the_first_has_ended(store):
    release = threading.Event()
    chat = chat_with(store, Say("First.", until=release))
    second = again(chat, "Second.")
    with ThreadPoolExecutor() as threads:
        first = threads.submit(chat.ask, "One")
        while not chat.options.llm.requests:
            pass
        after_read(store, 1, release.set)  # the second one's look at who is busy
        assert second.ask("Two", wait=30).content == "Second."
        assert first.result().content == "First."
    assert [row[3] for row in messages(store)] == ["One", "First.", "Two", "Second."]
    assert [message["content"] for message in second.options.llm.requests[0]["messages"]] == ["One", "First.", "Two"]


def test_wait_gives_the_second_task_its_turn_too(store):
    async def main() -> None:
        release = threading.Event()
        chat = chat_with(store, Say("First.", until=release))
        first = asyncio.create_task(chat.aask("One"))
        while not chat.options.llm.requests:
            await asyncio.sleep(0)
        after_read(store, 1, release.set)
        assert (await again(chat, "Second.").aask("Two", wait=30)).content == "Second."
        await first

    asyncio.run(main())
    assert [row[3] for row in messages(store)] == ["One", "First.", "Two", "Second."]


def test_wait_ends_in_chat_busy(store, ask):
    chats: list[Chat] = []

    def model(keywords: dict[str, Any]) -> str:
        with pytest.raises(ChatBusy):
            again(chats[0]).ask("Two", wait=0.02)
        return "First."

    chats.append(chat_with(store, model))
    ask(chats[0], "One")


def test_two_retries_at_once_give_one_answer(store):
    """The second begins between the first one's look at the chat and its claim."""
    chat = chat_with(store, ProviderError(400), on_error="keep")
    with pytest.raises(ProviderError):
        chat.ask("Hi")
    asked, release = threading.Event(), threading.Event()
    second = again(chat, lambda keywords: asked.set() or (release.wait(20) and "Second."), on_error="keep")
    first = again(chat, "never", on_error="keep")
    with ThreadPoolExecutor() as threads:
        started: list[Any] = []
        after_read(store, 2, lambda: started.append(threads.submit(second.retry)) or asked.wait(20))
        with pytest.raises(ChatBusy):
            first.retry()
        release.set()
        assert started[0].result().content == "Second."
    assert messages(store) == [(0, "user", "completed", "Hi"), (1, "assistant", "completed", "Second.")]
    assert first.options.llm.requests == []


# Processes

CHILD = """
import sys
from llm_orm import ChatBusy, connect, load_chat, tool
from llm_orm.testing import Call, ScriptedLLM

url, chat_id, hangs_at = sys.argv[1:]

def say(text):
    print(text, flush=True)

def hang(where):
    if where == hangs_at:
        say(where)
        sys.stdin.readline()

@tool
def get_weather(city: str) -> str:
    hang("tool")
    return f"rain in {city}"

def first(keywords):
    hang("model")
    return [Call("get_weather", city="London"), Call("get_weather", city="Paris")]

def second(keywords):
    hang("second round")
    return "From the child."

chat = load_chat(connect(url), chat_id, llm=ScriptedLLM(first, second), tools=[get_weather])
say("ready")
sys.stdin.readline()
try:
    say(chat.ask("Child?").content)
except ChatBusy:
    say("busy")
"""


def child(url: str, chat: Chat, hangs_at: str = "model") -> Process:
    """A process that asks the chat when told to, and says where it hangs; `tell` and `hear` a line."""
    return Process(CHILD, url, str(chat.id), hangs_at)


def hear(process: Any) -> str:
    return process.stdout.readline().strip()


def tell(process: Any) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def test_of_two_processes_that_ask_one_chat_at_once_one_gets_an_answer(store, database_url):
    chat = chat_with(store)
    with child(database_url, chat) as one, child(database_url, chat) as other:
        assert [hear(one), hear(other)] == ["ready", "ready"]
        tell(one)
        tell(other)
        heard = {hear(one): one, hear(other): other}
        assert set(heard) == {"model", "busy"}
        tell(heard["model"])
        assert hear(heard["model"]) == "From the child."
    assert messages(store) == [
        (0, "user", "completed", "Child?"),
        (1, "assistant", "completed", "From the child."),
    ]
    assert rows(store, "request", "round", "status_code") == [(0, 200), (1, 200)]
    assert len(rows(store, "tool_call", "id")) == 2


@contextmanager
def killed(url: str, chat: Chat, hangs_at: str) -> Iterator[None]:
    with child(url, chat, hangs_at) as process:
        assert hear(process) == "ready"
        tell(process)
        assert hear(process) == hangs_at
        process.kill()
    yield


@pytest.mark.parametrize("on_error", ["rollback", "keep"])
@pytest.mark.parametrize("hangs_at", ["model", "tool", "second round"])
def test_a_turn_whose_process_was_killed_is_cleared_by_the_next(store, database_url, hangs_at, on_error):
    dead = chat_with(store)
    with killed(database_url, dead, hangs_at):
        chat = again(dead, "Still here.", on_error=on_error)
        with pytest.raises(ChatBusy):
            chat.ask("Too early?")
        assert chat.ask("Now?", stale_after=0).content == "Still here."
    left = [("user", "completed"), ("assistant", "incomplete"), ("user", "completed"), ("assistant", "completed")]
    assert rows(store, "message", "role", "status") == [
        row for row in left if on_error == "keep" or row[1] == "completed"
    ]
    told = [INTERRUPTED, NEVER_RUN] if on_error == "keep" else [None, None]
    calls = {
        "model": [],
        "tool": [("failed", "interrupted", text) for text in told],
        "second round": [("completed", None, "rain in London"), ("completed", None, "rain in Paris")],
    }
    assert rows(store, "tool_call", "status", "error", "result") == calls[hangs_at]
    under_way = {"model": [(0, "ProcessDied")], "tool": [], "second round": [(1, "ProcessDied")]}[hangs_at]
    of_the_dead = [] if hangs_at == "model" else [(0, None)]
    assert rows(store, "request", "round", "error") == [*of_the_dead, *under_way, (0, None)]
    shown = [message["role"] for message in chat.options.llm.requests[0]["messages"]]
    is_replayed = on_error == "keep" and hangs_at != "model"
    assert shown == ["user", *(["assistant", "tool", "tool"] if is_replayed else []), "user"]


def test_a_question_whose_process_was_killed_can_be_retried(store, database_url):
    dead = chat_with(store)
    with killed(database_url, dead, "second round"):
        assert again(dead, "Here.").retry(stale_after=0).content == "Here."
    assert messages(store) == [(0, "user", "completed", "Child?"), (1, "assistant", "completed", "Here.")]


def dead_turn(store: Store) -> Chat:
    """A chat with a turn of which nobody has heard since now."""
    chat = chat_with(store)
    times = {"created_at": datetime.now(UTC), "updated_at": datetime.now(UTC)}
    with store.connection():
        record = store.records.message
        record.create(chat=chat.id, position=0, role="user", content="Hi", **times)
        record.create(chat=chat.id, position=1, role="assistant", status="pending", **times)
    return chat


def test_a_silent_turn_counts_as_dead_after_its_time_and_not_before(store, ask):
    dead = dead_turn(store)
    now = datetime.now(UTC)
    with freeze_time(now + timedelta(seconds=55), real_asyncio=True):
        with pytest.raises(ChatBusy, match="stale_after=60"):
            ask(again(dead), "Early?")
    with freeze_time(now + timedelta(seconds=61), real_asyncio=True):
        assert ask(again(dead, "Yes."), "Now?").content == "Yes."
    assert [row[3] for row in messages(store)] == ["Hi", "Now?", "Yes."]


def test_a_turn_of_a_clock_that_is_ahead_of_ours_can_be_cleared_at_once(store, ask):
    with freeze_time(datetime.now(UTC) + timedelta(hours=1)):
        dead = dead_turn(store)
    with pytest.raises(ChatBusy):
        ask(again(dead), "Early?")
    assert ask(again(dead, "Yes."), "Now?", stale_after=0).content == "Yes."


def test_a_turn_that_gives_a_sign_of_life_while_it_is_taken_for_dead_is_left_alone(store):
    with freeze_time(datetime.now(UTC) - timedelta(hours=1)):
        dead = dead_turn(store)
    with store.connection():
        call = {"turn_id": dead.id, "round": 0, "position": 0, "tool_call_id": "a", "name": "a", "arguments": "{}"}
        message = store.records.message.get(status="pending").id
        store.records.tool_call.create(chat=dead.id, message=message, status="running", **call)
    after_read(store, 1, lambda: store._beat([message]))
    with pytest.raises(ChatBusy):
        again(dead).ask("Dead?")
    assert messages(store)[1] == (1, "assistant", "pending", None)
    assert rows(store, "tool_call", "status") == [("running",)]


def test_of_two_that_clear_a_dead_turn_at_once_one_gets_the_chat(store):
    with freeze_time(datetime.now(UTC) - timedelta(hours=1)):
        dead = dead_turn(store)
    together, release = threading.Barrier(2, timeout=20), threading.Event()
    read, waited = store.read, threading.local()

    def read_together(statement: Any) -> Any:
        found = read(statement)
        if not getattr(waited, "once", False):
            waited.once = True
            together.wait()  # both have seen the dead turn
        return found

    store.read = read_together  # type: ignore[method-assign]

    def ask() -> str:
        try:
            return again(dead, lambda keywords: release.wait(20) and "Mine.").ask("Now?").content or ""
        except ChatBusy:
            release.set()
            return "busy"

    with ThreadPoolExecutor() as threads:
        found = sorted(task.result() for task in [threads.submit(ask), threads.submit(ask)])
    assert found == ["Mine.", "busy"]
    assert [row[2:] for row in messages(store)] == [("completed", "Hi"), ("completed", "Now?"), ("completed", "Mine.")]


@pytest.mark.parametrize("on_error", ["rollback", "keep"])
def test_a_turn_that_was_taken_for_dead_loses_its_chat_and_not_its_reply(store, ask, on_error):
    chats: list[Chat] = []

    def model(keywords: dict[str, Any]) -> Say:
        again(chats[0], "Second.", on_error=on_error).ask("Two", stale_after=0)
        return Say("First.", input_tokens=7)

    chats.append(chat_with(store, model, on_error=on_error))
    with pytest.raises(ReplyNotSaved, match="cleared as dead") as raised:
        ask(chats[0], "One")
    assert raised.value.reply.content == "First."
    kept = [("assistant", "incomplete", None)] if on_error == "keep" else []
    assert rows(store, "message", "role", "status", "content") == [
        ("user", "completed", "One"),
        *kept,
        ("user", "completed", "Two"),
        ("assistant", "completed", "Second."),
    ]
    assert sorted(rows(store, "request", "status_code", "input_tokens")) == [(200, 2), (200, 7)]


@pytest.mark.parametrize("on_error", ["rollback", "keep"])
def test_a_turn_that_was_taken_for_dead_does_not_answer_in_place_of_its_retry(store, on_error):
    asked, release = threading.Event(), threading.Event()

    def slow(keywords: dict[str, Any]) -> Say:
        asked.set()
        release.wait(20)
        return Say("Looking.", calls=[LONDON])

    chat = chat_with(store, slow, tools=[get_weather], on_error=on_error)
    with ThreadPoolExecutor() as threads:
        zombie = threads.submit(chat.ask, "Hi")
        asked.wait(20)

        def model(keywords: dict[str, Any]) -> str:
            release.set()
            with pytest.raises(ReplyNotSaved):
                zombie.result(20)
            return "Second."

        again(chat, [LONDON], model, tools=[get_weather], on_error=on_error).retry(stale_after=0)
    assert messages(store) == [(0, "user", "completed", "Hi"), (1, "assistant", "completed", "Second.")]
    finished = [row for row in rows(store, "tool_call", "status", "message") if row[1] is not None]
    assert finished == [("completed", rows(store, "message", "id")[1][0])]
    assert not {row[0] for row in rows(store, "tool_call", "status")} & {"pending", "running"}


# Signs of life


def test_a_turn_that_gives_signs_of_life_is_not_taken_for_dead(store, database_url, ask):
    beats = threading.Semaphore(0)

    def beat(message_ids: list[Any]) -> None:
        store._beat(message_ids)
        beats.release()

    store.heart = Heart(beat, every_s=0.005)
    chats: list[Chat] = []

    def model(keywords: dict[str, Any]) -> str:
        with connect(database_url) as other:
            record = other.records.message
            with other.connection():
                record.update(updated_at=datetime.now(UTC) - timedelta(hours=1)).execute()
            while beats.acquire(blocking=False):
                pass
            for _ in range(2):  # the first may have begun before
                assert beats.acquire(timeout=20)
            with pytest.raises(ChatBusy):
                load_chat(other, chats[0].id, llm=ScriptedLLM()).ask("Dead?", stale_after=60)
        return "Alive."

    chats.append(chat_with(store, model))
    assert ask(chats[0], "Hi").content == "Alive."
    store.heart.stop()


def test_a_heart_goes_on_after_a_missed_beat_and_beats_for_running_turns_only(caplog):
    heard: list[Any] = []
    enough = threading.Event()

    def beat(message_ids: list[Any]) -> None:
        heard.append(list(message_ids))
        if len(heard) == 1:
            raise RuntimeError("no database")
        enough.set()

    heart = Heart(beat, every_s=0.001)
    with heart.beating("one"):  # type: ignore[arg-type]
        assert enough.wait(20)
    heart.stop()
    assert heard[0] == heard[1] == ["one"]
    assert "could not tell the database that 1 turns are alive: no database" in caplog.text


# Many chats


@pytest.fixture
def small_store(database_url: str) -> Iterator[Store]:
    with connect(database_url, pool_size=5) as store:
        store.create_tables()
        yield store


def check_fifty(store: Store, chats: list[Chat]) -> None:
    for number, chat in enumerate(chats):
        assert [message.content for message in chat.messages()] == [f"question {number}", f"answer {number}"]
    assert len(rows(store, "request", "id")) == 100
    assert rows(store, "tool_call", "status", "result") == [("completed", "rain in London")] * 50


def fifty(store: Store) -> list[Chat]:
    return [chat_with(store, [LONDON], f"answer {number}", tools=[get_weather]) for number in range(50)]


def test_fifty_threads_ask_fifty_chats_over_a_pool_of_five(small_store):
    chats, together = fifty(small_store), threading.Barrier(50, timeout=30)

    def ask(number: int) -> None:
        together.wait()
        chats[number].ask(f"question {number}")

    with ThreadPoolExecutor(50) as threads:
        list(threads.map(ask, range(50)))
    check_fifty(small_store, chats)


@pytest.mark.parametrize("streamed", [False, True], ids=["aask", "aask_stream"])
def test_fifty_tasks_ask_fifty_chats_over_a_pool_of_five(small_store, streamed):
    chats = fifty(small_store)

    async def ask(number: int) -> None:
        if streamed:
            async for _ in chats[number].aask_stream(f"question {number}"):
                pass
        else:
            await chats[number].aask(f"question {number}")

    async def main() -> None:
        await asyncio.gather(*(ask(number) for number in range(50)))

    asyncio.run(main())
    check_fifty(small_store, chats)


def test_many_threads_ask_one_chat_and_each_gets_its_turn(store):
    chats = [chat_with(store)]
    chats += [again(chats[0], f"answer {number}", wait=60) for number in range(8)]

    def ask(number: int) -> None:
        chats[number + 1].ask(f"question {number}")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(8)))
    said = [row[3] for row in messages(store)]
    assert [row[0] for row in messages(store)] == list(range(16))
    assert [text.replace("question", "answer") for text in said[::2]] == said[1::2]

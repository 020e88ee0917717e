"""What is erased is gone, from the rows and from the files; what was spent stays. And old chats that are pruned."""

import asyncio
import threading
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import peewee as pw
import pytest
from conftest import rows
from freezegun import freeze_time

from llm_orm import (
    Agent,
    Chat,
    ChatBusy,
    ChatGone,
    Erased,
    InvalidValue,
    NothingToResume,
    NothingToRetry,
    Pruned,
    Store,
    UnknownKeyword,
    aerase,
    aprune,
    connect,
    create_agent_session,
    create_chat,
    erase,
    load_chat,
    prune,
    tool,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

SECRET = "canary-4711"
DAY = 24 * 3600.0
PRICE = {"input_cost_per_token": "0.001", "output_cost_per_token": "0.01"}


@tool
def look_up(name: str) -> str:
    """Look somebody up."""
    if name == "nobody":
        raise LookupError(f"{SECRET} is not here")
    return f"{SECRET} lives here"


@tool(requires_approval=True)
def pay(to: str) -> str:
    """Pay somebody."""
    return f"paid {to}"


def a_long_story(store: Store, *, words: int = 1, **columns: Any) -> Chat:
    """A chat that has said the secret in every column that can hold it."""
    told = f"{SECRET} " * words
    llm = ScriptedLLM(
        Say(told, thinking=told, signature=SECRET, calls=[Call("look_up", name=told), Call("look_up", name="nobody")]),
        Say(told, images=[f"\x89PNG{SECRET}".encode()]),
        ProviderError(400, f"you said {SECRET}"),
        provider="scripted",
        **PRICE,
    )
    chat = create_chat(
        store,
        model="test",
        llm=llm,
        tools=[look_up, pay],
        instructions=f"You help {SECRET}.",
        metadata={"name": SECRET, "plan": "free", "visits": 3, "is_new": True},
        on_error="keep",
        **columns,
    )
    chat.ask(told, files=[(f"{SECRET}.txt", told.encode())])
    chat.add_message("system", told)
    with pytest.raises(ProviderError):
        chat.ask(told)
    return chat


def everything(store: Store) -> str:
    """All rows of all tables, as text."""
    with store.connection():
        return "\n".join(
            str([bytes(cell) if isinstance(cell, memoryview) else cell for cell in row])
            for record in store.records
            for row in store.database.execute_sql(f'SELECT * FROM "{record._meta.table_name}"').fetchall()  # type: ignore[attr-defined]
        )


def age(store: Store, chat: Chat, days: float) -> None:
    """Let a chat be as if nothing had happened in it for some days."""
    then = datetime.now(UTC) - timedelta(days=days)
    records: Any = store.records
    with store.connection():
        records.chat.update(updated_at=then).where(records.chat.id == chat.chat_id).execute()
        for record in (records.message, records.agent_session):
            record.update(updated_at=then).where(record.chat == chat.chat_id).execute()
        records.request.update(created_at=then).where(records.request.chat == chat.chat_id).execute()


# Erasing one chat


def test_what_was_said_is_gone_from_every_row(store):
    chat = a_long_story(store, user_id="u_1")
    assert everything(store).count(SECRET) > 15
    erased = chat.erase()
    assert SECRET not in everything(store)
    assert (erased.chats, erased.messages, erased.tool_calls, erased.requests) == (1, 5, 2, 3)
    assert erased.attachments == 2
    assert (erased.busy, erased.is_still_in_log) == ((), False)


def test_what_it_cost_stays_by_user_by_chat_and_by_tool(store):
    chat = a_long_story(store, user_id="u_1")
    before, kept = chat.stats(), ("role", "status", "input_tokens", "output_tokens", "model_id", "created_at")
    messages, calls = rows(store, "message", *kept), rows(store, "tool_call", "name", "status", "duration_ms", "round")
    spent = rows(store, "request", "cost", "model", "provider", "error", "status_code", "message", "turn_id")
    chat.erase()
    assert chat.stats() == before
    assert before.cost > Decimal(0)
    assert rows(store, "message", *kept) == messages
    assert rows(store, "tool_call", "name", "status", "duration_ms", "round") == calls
    assert rows(store, "request", "cost", "model", "provider", "error", "status_code", "message", "turn_id") == spent
    assert rows(store, "chat", "user_id", "model") == [("u_1", "test")]


def test_an_erased_chat_goes_on_with_an_empty_history(store, ask):
    chat = a_long_story(store)
    chat.erase()
    assert [message.content for message in chat.messages()] == [None] * 5
    assert (chat.history, chat.attachments(), chat.instructions, chat.metadata) == ([], [], None, None)
    chat.options.llm.add("Hello, whoever you are.")
    assert ask(chat, "Hello?").content == "Hello, whoever you are."
    assert chat.options.llm.requests[-1]["messages"] == [{"role": "user", "content": "Hello?"}]
    assert [message.position for message in chat.messages()] == list(range(7))


def test_an_erased_chat_can_be_loaded_forked_and_added_to(store):
    chat = a_long_story(store, user_id="u_1")
    chat.erase()
    again = load_chat(store, chat.id, llm=ScriptedLLM("Yes?", "No."), user_id="u_1")
    assert again is not None
    copy = again.fork()
    copy.add_message("user", "Are you there?")
    assert copy.retry().content == "Yes?"
    assert again.erase().messages == 5  # a second time there is nothing more to do, and no error


def test_an_erased_question_is_not_answered(store):
    """With on_error="keep" a failed answer stands behind it, else nothing does: retry() has nothing to ask."""
    for on_error in ("rollback", "keep"):
        chat = create_chat(store, model="test", llm=ScriptedLLM(ProviderError(400)), on_error=on_error)
        with pytest.raises(ProviderError):
            chat.ask("Hello?")
        chat.erase()
        with pytest.raises(NothingToRetry):
            chat.retry()
        assert len(chat.options.llm.requests) == 1


def test_a_question_that_is_only_a_file_is_still_answered(store):
    chat = create_chat(store, model="test", llm=ScriptedLLM(ProviderError(400), "A picture."))
    with pytest.raises(ProviderError):
        chat.ask("", files=[("a.txt", b"text")])
    assert chat.retry().content == "A picture."


def test_other_chats_are_left_as_they_are(store):
    mine, other = a_long_story(store, user_id="u_1"), a_long_story(store, user_id="u_1")
    before = [(message.content, message.content_raw) for message in other.messages()]
    mine.erase()
    assert [(message.content, message.content_raw) for message in other.messages()] == before
    assert other.tool_calls()[0].result == f"{SECRET} lives here"
    assert len(other.attachments()) == 2


def test_columns_of_the_application_go_where_they_are_named(database_url):
    fields = {"user_id": pw.TextField(null=True), "email": pw.TextField(null=True), "team": pw.TextField()}
    with connect(database_url, chat_fields=fields) as store:
        store.create_tables()
        chat = a_long_story(store, user_id="u_1", email=f"{SECRET}@example.com", team="blue")
        for names, problem, text in [
            (["emial"], UnknownKeyword, r"erases columns of the application, not 'emial'; it has user_id, email, team"),
            (["model"], UnknownKeyword, "not 'model'"),
            (["team"], InvalidValue, "'team' cannot be NULL"),
        ]:
            with pytest.raises(problem, match=text):
                chat.erase(names)
        assert chat.messages()[0].content is not None
        chat.erase(columns=["email"])
        assert rows(store, "chat", "user_id", "email", "team") == [("u_1", None, "blue")]


def test_the_inputs_of_a_session_are_gone_with_its_chat(store):
    class Support(Agent):
        model = "test"
        instructions = "Be kind."

    session = create_agent_session(store, Support, metadata={"name": SECRET}, llm=ScriptedLLM("Hi.", "Again."))
    session.ask(f"I am {SECRET}")
    asyncio.run(session.aerase())
    assert session.metadata is None
    assert SECRET not in everything(store)
    assert session.ask("Hello?").content == "Again."
    assert session.update_metadata({"name": "Ada"}).metadata == {"name": "Ada"}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_chat_with_a_running_turn_is_busy_and_nothing_of_it_is_written(store, is_streamed):
    begun, release = threading.Event(), threading.Event()
    llm = ScriptedLLM("One.", Say("Two three", until=release))
    chat = create_chat(store, model="test", llm=llm, instructions="Be brief.", user_id="u_1")
    chat.ask("First")

    def turn() -> None:
        for _ in chat.ask_stream("Second") if is_streamed else [chat.ask("Second")]:
            begun.set()

    thread = threading.Thread(target=turn)
    thread.start()
    while len(llm.requests) < 2:
        pass
    other = load_chat(store, chat.id)
    assert other is not None
    before = everything(store)
    with pytest.raises(ChatBusy, match=r"busy with a turn: erase it when that has ended, or cancel\(\) it first"):
        other.erase()
    found = erase(store, {"user_id": "u_1"})
    assert (found.chats, found.busy) == (0, (chat.id,))
    assert erase(store, {"user_id": "u_1"}, dry_run=True).busy == (chat.id,)
    assert everything(store) == before
    release.set()
    thread.join()
    assert [message.content for message in chat.messages()] == ["First", "One.", "Second", "Two three"]


def test_a_turn_that_waits_for_a_person_is_ended_first(store):
    chat = create_chat(store, model="test", llm=ScriptedLLM(Call("pay", to=SECRET), "Hi."), tools=[pay])
    chat.ask(f"Pay {SECRET}")
    chat.erase()
    assert SECRET not in everything(store)
    assert rows(store, "tool_call", "name", "status", "arguments") == [("pay", "failed", "")]
    assert [(message.role, message.status) for message in chat.messages()] == [("user", "completed")]
    assert chat.pending_approvals() == []
    with pytest.raises(NothingToResume):
        chat.resume()
    assert chat.ask("Hello?").content == "Hi."


def test_a_turn_whose_process_died_is_ended_first(store):
    chat = create_chat(store, model="test", llm=ScriptedLLM(Call("pay", to=SECRET), "Hi."), tools=[pay])
    waiting = chat.ask(f"Pay {SECRET}")
    record: Any = store.records.message
    dead = {"parked_at": None, "updated_at": datetime.now(UTC) - timedelta(seconds=90)}
    with store.connection():
        record.update(dead).where(record.id == waiting.id).execute()
    assert erase(store, {"id": chat.id}).chats == 1
    assert SECRET not in everything(store)
    assert {message.status for message in chat.messages()} == {"completed"}
    assert chat.reload().ask("Hello?").content == "Hi."


def test_a_chat_that_was_deleted_cannot_be_erased(store):
    chat = create_chat(store, model="test")
    chat.delete()
    with pytest.raises(ChatGone):
        chat.erase()


def test_a_claim_that_comes_while_a_chat_is_erased_waits_and_finds_it_empty(store):
    """Else half of the chat would be erased, and a turn be asked with the other half."""
    chat = create_chat(store, model="test", llm=ScriptedLLM("One.", "Two."))
    chat.ask(SECRET)
    other = load_chat(store, chat.id, llm=ScriptedLLM("Two."))
    assert other is not None
    told: list[Any] = []
    thread = threading.Thread(target=lambda: told.append(other.ask("Next")))
    original = store.records.message.update

    def update(*args: Any, **kwargs: Any) -> Any:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        return original(*args, **kwargs)

    store.records.message.update = update  # type: ignore[method-assign]
    try:
        chat.erase()
    finally:
        store.records.message.update = original  # type: ignore[method-assign]
    thread.join()
    assert told[0].content == "Two."
    assert other.options.llm.requests[0]["messages"] == [{"role": "user", "content": "Next"}]
    assert [message.content for message in chat.messages()] == [None, None, "Next", "Two."]


def test_within_a_transaction_of_the_callers_it_is_a_part_of_it(store):
    chat = a_long_story(store)
    with store.transaction() as _, pytest.raises(ZeroDivisionError), store.database.atomic():
        chat.erase()
        raise ZeroDivisionError
    assert SECRET in everything(store)
    with store.transaction():
        assert chat.erase().is_still_in_log == store.is_sqlite
    assert SECRET not in everything(store)


# The files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "chats.db"


def left_in(file: Path) -> dict[str, int]:
    """How often the secret is in each file of the database."""
    return {path.name: path.read_bytes().count(SECRET.encode()) for path in sorted(file.parent.glob(f"{file.name}*"))}


@pytest.mark.parametrize("way", ["erase", "prune"])
def test_the_files_of_sqlite_have_nothing_of_it_left(file, way):
    """Versions of a row that it had before, and pages that are free, too."""
    with connect(f"sqlite:///{file}") as store:
        store.create_tables()
        chats = [a_long_story(store, words=words) for words in (1, 3, 40, 700, 2, 90, 1, 1500)]
        assert sum(left_in(file).values()) > 1000
        if way == "erase":
            found = erase(store, {"id": [chat.id for chat in chats]})
            assert found.chats == 8
        else:
            found = prune(store, 1e-6)
            assert found.messages == 40
        assert not found.is_still_in_log
        assert set(left_in(file).values()) == {0}
        assert store.database.execute_sql("PRAGMA integrity_check").fetchone() == ("ok",)


def test_what_is_erased_is_overwritten_even_where_the_application_says_otherwise(file):
    with connect(f"sqlite:///{file}", pragmas={"secure_delete": 0}) as store:
        store.create_tables()
        chat = create_chat(store, model="test")
        chat.add_message("user", f"{SECRET} " * 500)
        chat.add_message("user", SECRET)
        with store.connection():  # its settings are its own again afterwards
            chat.erase()
            assert store.database.execute_sql("PRAGMA secure_delete").fetchone() == (0,)
            assert store.database.execute_sql("PRAGMA busy_timeout").fetchone() == (30000,)
        assert set(left_in(file).values()) == {0}


def test_a_store_overwrites_whatever_it_deletes(file):
    with connect(f"sqlite:///{file}") as store:
        assert dict(store.database._pragmas)["secure_delete"] == 1  # type: ignore[attr-defined]


def test_a_reader_who_is_in_the_way_of_the_log_is_said_to_be(file, monkeypatch):
    monkeypatch.setattr("llm_orm.retention.CHECKPOINT_WAIT_MS", 1)
    with connect(f"sqlite:///{file}") as store, connect(f"sqlite:///{file}") as other:
        store.create_tables()
        chat = a_long_story(store)
        with other.connection(), other.database.atomic():
            list(other.records.message.select())
            assert chat.erase().is_still_in_log
        assert sum(left_in(file).values()) > 0
        assert not chat.erase().is_still_in_log
        assert set(left_in(file).values()) == {0}


def test_a_database_in_memory_can_be_erased():
    with connect("sqlite:///:memory:") as store:
        store.create_tables()
        assert not a_long_story(store).erase().is_still_in_log
        assert SECRET not in everything(store)


# Many chats


FOUND: list[tuple[dict[str, Any], str]] = [
    ({"user_id": "u_1"}, "ab"),
    ({"user_id": ["u_1", "u_2"]}, "abc"),
    ({"user_id": None}, "d"),
    ({"user_id": ["u_2", None]}, "cd"),
    ({"user_id": ["u_1", *map(str, range(2000))]}, "ab"),
    ({"metadata.plan": ["gold", *map(str, range(150))]}, "b"),
    ({"user_id": "u_1", "model": "other"}, "b"),
    ({"provider": "custom"}, "b"),
    ({"metadata.plan": "free"}, "ac"),
    ({"metadata.plan": ["gold", "free"], "user_id": "u_1"}, "ab"),
    ({"metadata.visits": 3}, "a"),
    ({"metadata.visits": "3"}, "b"),
    ({"metadata.visits": 2.5}, "c"),
    ({"metadata.visits": True}, "d"),
    ({"metadata.visits": 1}, ""),
    ({"metadata.a.b": "dots"}, "d"),
    ({"metadata.0": "in a list"}, ""),
    ({"user_id": "u_1' OR 1=1 --"}, ""),
]


def test_chats_are_found_by_columns_models_and_metadata(store):
    chats = {
        "a": create_chat(store, model="test", user_id="u_1", metadata={"plan": "free", "visits": 3}),
        "b": create_chat(
            store, model="other", provider="custom", user_id="u_1", metadata={"plan": "gold", "visits": "3"}
        ),
        "c": create_chat(store, model="test", user_id="u_2", metadata={"plan": "free", "visits": 2.5}),
        "d": create_chat(store, model="test", metadata={"a.b": "dots", "visits": True}),
        "e": create_chat(store, model="test", user_id="u_3", metadata=["in a list"]),
        "f": create_chat(store, model="test", user_id="u_3", metadata="text"),
    }
    for chat in chats.values():
        chat.add_message("user", SECRET)
    for where, expected in FOUND:
        assert erase(store, where, dry_run=True) == Erased(chats=len(expected), messages=len(expected)), where
        found = erase(store, where)
        assert (found.chats, found.messages) == (len(expected), len(expected))
        gone = [name for name, chat in chats.items() if chat.messages()[0].content is None]
        assert "".join(gone) == expected
        with store.connection():
            store.records.message.update(content=SECRET).execute()
            for chat in chats.values():
                chat.record.save(only=[store.records.chat.metadata])


WRONG: list[tuple[Any, type[Exception], str]] = [
    ({}, InvalidValue, "needs to be told which chats: where="),
    ("user_id", InvalidValue, "needs to be told which chats"),
    ({"userid": "u_1"}, UnknownKeyword, r"does not know 'userid'; .*did you mean 'user_id'"),
    (
        {"user_id": "u_1", "nope": 1},
        UnknownKeyword,
        r"it takes id, model, provider, agent_class, metadata\.<key>; columns of",
    ),
    ({"metadata": "x"}, UnknownKeyword, "does not know 'metadata'"),
    ({"instructions": "x"}, UnknownKeyword, "does not know 'instructions'"),
    ({7: "x"}, InvalidValue, "names that are no strings"),
    ({"user_id": []}, InvalidValue, "where='user_id' has no value"),
    ({"id": "nonsense"}, InvalidValue, "'nonsense' is not the id of a chat"),
    ({"id": None}, InvalidValue, "None is not the id of a chat"),
    ({"metadata.plan": None}, InvalidValue, "a text, a number or a bool"),
    ({"metadata.plan": {"a": 1}}, InvalidValue, "a text, a number or a bool"),
    ({"metadata.plan": float("nan")}, InvalidValue, "a text, a number or a bool"),
    ({"user_id": "u\x001"}, InvalidValue, "NUL"),
    ({"metadata.a\x00b": "x"}, InvalidValue, "NUL"),
]


@pytest.mark.parametrize("act", [erase, lambda store, where: prune(store, DAY, where=where)], ids=["erase", "prune"])
def test_who_does_not_say_which_chats_erases_nothing(store, act):
    chat = a_long_story(store, user_id="u_1")
    age(store, chat, 9)
    before = everything(store)
    for where, problem, text in WRONG:
        with pytest.raises(problem, match=text):
            act(store, where)
    assert everything(store) == before


def test_a_value_that_the_column_cannot_have_is_refused_by_postgresql(postgres_url):
    with connect(postgres_url, chat_fields={"customer": pw.IntegerField(null=True)}) as store:
        store.create_tables()
        with pytest.raises(InvalidValue, match=r"erase\(\): .*; the columns .*: customer='x'"):
            erase(store, {"customer": "x"})


def test_many_chats_are_erased_some_at_a_time(store, monkeypatch):
    monkeypatch.setattr("llm_orm.retention.AT_ONCE", 3)
    for number in range(8):
        create_chat(store, model="test", user_id="u_1").add_message("user", f"{SECRET} {number}")
    transactions = []
    begin = store.transaction
    monkeypatch.setattr(store, "transaction", lambda: transactions.append(1) or begin())
    found = asyncio.run(aerase(store, {"user_id": "u_1"}))
    assert (found.chats, found.messages, len(transactions)) == (8, 8, 3)
    assert SECRET not in everything(store)


def test_an_interrupted_run_leaves_each_chat_whole_or_erased(store, monkeypatch):
    monkeypatch.setattr("llm_orm.retention.AT_ONCE", 2)
    chats = [a_long_story(store, user_id="u_1") for _ in range(4)]
    chat, update, count = store.records.chat, store.records.chat.update, iter(range(9))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(count) == 1:
            raise KeyboardInterrupt
        return update(*args, **kwargs)

    monkeypatch.setattr(chat, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        erase(store, {"user_id": "u_1"})
    left = [[message.content for message in each.messages()].count(None) for each in chats]
    assert left == [5, 5, 1, 1]  # of a kept answer without a word the content is NULL from the beginning


def test_a_store_without_the_tables_that_it_does_not_write_can_be_erased(database_url):
    with connect(database_url) as store:
        store.create_tables()
        persistence = {"tool_calls": False, "requests": False}
        with store.connection():
            store.database.drop_tables([store.records.tool_call, store.records.request], cascade=not store.is_sqlite)
        llm = ScriptedLLM(Call("look_up", name=SECRET), SECRET)
        chat = create_chat(store, model="test", llm=llm, tools=[look_up], persistence=persistence)
        chat.ask(SECRET)
        assert chat.erase().messages == 2
        assert prune(store, 1e-6).chats == 1


# Pruning


@pytest.fixture
def chats(store: Store) -> dict[str, Chat]:
    """One chat that is old, one that is not, and one that is old and was deleted, with its requests left."""
    made = {name: a_long_story(store, user_id=name) for name in ("old", "new", "deleted")}
    for name in ("old", "deleted"):
        age(store, made[name], 91)
    made["deleted"].delete()
    return made


def counted(store: Store) -> dict[str, int]:
    with store.connection():
        return {record.__name__: record.select().count() for record in store.records}


def test_old_chats_are_deleted_with_all_that_belongs_to_them(store, chats):
    expected = prune(store, 90 * DAY, dry_run=True)
    assert counted(store)["LlmChat"] == 2
    found = asyncio.run(aprune(store, 90 * DAY))
    assert found == expected == Pruned(chats=1, messages=5, tool_calls=2, requests=6, attachments=2)
    assert counted(store) == {
        "LlmChat": 1,
        "LlmMessage": 5,
        "LlmToolCall": 2,
        "LlmRequest": 3,
        "LlmAgentSession": 0,
        "LlmAttachment": 2,
    }
    assert chats["new"].messages()[0].content == f"{SECRET} "
    assert prune(store, 90 * DAY) == Pruned()


def test_requests_can_be_kept_and_then_say_what_was_spent_and_no_more(store, chats):
    before = sum(row[0] for row in rows(store, "request", "cost"))
    expected = prune(store, 90 * DAY, keep_requests=True, dry_run=True)
    assert prune(store, 90 * DAY, keep_requests=True) == expected
    assert (expected.chats, expected.requests) == (1, 0)
    assert sum(row[0] for row in rows(store, "request", "cost")) == before
    assert len(rows(store, "request", "id")) == 9
    chat_id = chats["old"].id
    of_the_old = [row for row in rows(store, "request", "chat", "turn_id", "error_message") if row[0] == chat_id]
    assert of_the_old == []
    assert sum(row[0] is not None for row in rows(store, "request", "error_message")) == 2  # the new, the deleted


def test_a_narrower_prune_leaves_the_requests_of_deleted_chats(store, chats):
    found = prune(store, 90 * DAY, where={"user_id": ["old", "new"]})
    assert (found.chats, found.requests) == (1, 3)
    assert prune(store, 90 * DAY, where={"user_id": "old"}) == Pruned()
    assert prune(store, 90 * DAY).requests == 3


@pytest.mark.parametrize("activity", ["ask", "fail", "add_message", "update_metadata", "park"])
def test_a_chat_in_which_something_happened_is_not_old(store, activity):
    class Support(Agent):
        model = "test"
        tools = (pay,)

    script = {"fail": ProviderError(400), "park": Call("pay", to="Bob")}.get(activity, "Hi.")
    chat = create_agent_session(store, Support, llm=ScriptedLLM("Hi.", script))
    chat.ask("Hello?")
    age(store, chat, 91)
    if activity == "ask":
        chat.ask("And now?")
    elif activity == "fail":
        with pytest.raises(ProviderError):
            chat.ask("And now?")
    elif activity == "add_message":
        chat.add_message("user", "By the way")
    elif activity == "update_metadata":
        chat.update_metadata({"name": "Ada"})
    else:
        assert chat.ask("And now?").status == "pending"
        age(store, chat, 91)
    assert prune(store, 90 * DAY, dry_run=True) == Pruned()
    assert prune(store, 90 * DAY) == Pruned()
    assert len(chat.messages()) >= 2


def test_a_living_turn_is_not_pruned_from_under_its_model(store):
    chats: list[Chat] = []

    def model(keywords: dict[str, Any]) -> str:
        age(store, chats[0], 0.0001)  # ten seconds
        assert prune(store, 1.0, dry_run=True).chats == 0
        assert prune(store, 1.0).chats == 0
        return "Still here."

    chats.append(create_chat(store, model="test", llm=ScriptedLLM(model)))
    assert chats[0].ask("Hello?").content == "Still here."


def test_a_chat_whose_turn_died_long_ago_is_pruned_and_its_call_stays_on_record(store):
    chat = create_chat(store, model="test", llm=ScriptedLLM(Call("pay", to="Bob")), tools=[pay])
    waiting = chat.ask("Pay Bob")
    record: Any = store.records.message
    with store.connection():
        record.update(parked_at=None).where(record.id == waiting.id).execute()
    age(store, chat, 91)
    assert prune(store, 90 * DAY, keep_requests=True).chats == 1
    assert rows(store, "chat", "id") == []
    assert rows(store, "request", "chat", "status_code")[0] == (None, 200)


def test_many_chats_and_requests_are_pruned_some_at_a_time(store, monkeypatch):
    monkeypatch.setattr("llm_orm.retention.AT_ONCE", 1)
    for number in range(4):
        chat = create_chat(store, model="test", llm=ScriptedLLM("Hi."))
        chat.ask("Hello?")
        age(store, chat, 91)
        if number % 2:
            chat.delete()
    assert prune(store, 90 * DAY) == Pruned(chats=2, messages=4, requests=4)


@pytest.mark.parametrize("older_than", [0, -1, True, "90d", None, float("nan"), 1e300])
def test_an_age_is_seconds(store, older_than):
    with pytest.raises(InvalidValue, match="must be seconds, more than 0"):
        prune(store, older_than)


def test_the_clock_is_that_of_the_process(store):
    create_chat(store, model="test")
    with freeze_time(datetime.now(UTC) + timedelta(days=90, seconds=1)):
        assert prune(store, 90 * DAY).chats == 1

"""check(): what a sound database is, and every way in which one is not."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from conftest import rows
from cryptography.fernet import Fernet

from llm_orm import (
    Chat,
    ChatGone,
    Finding,
    InvalidValue,
    Middleware,
    Store,
    TablesMissing,
    TurnCancelled,
    acheck,
    check,
    connect,
    create_agent_session,
    create_chat,
    define_agent,
    erase,
    load_chat,
    tool,
)
from llm_orm.records import uuid7
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
LATER = 1e9
"""No turn of these tests is as old as that."""


@tool
def look(at: str) -> str:
    return f"{at} is there"


@tool(requires_approval=True)
def pay(amount: int) -> str:
    return f"paid {amount}"


def a_chat(store: Store, *script: Any, **options: Any) -> Chat:
    """A chat of a plain turn, and one that called a tool twice: four messages, two tool calls, three requests."""
    replies = script or ("Hello!", [Call("look", id="call_1", at="A"), Call("look", id="call_2", at="B")], "Both.")
    chat = create_chat(
        store,
        model="test",
        llm=ScriptedLLM(*replies),
        tools=[look] if "persistence" in options else [look, pay],
        **options,
    )
    if not script:
        chat.ask("Hi")
        chat.ask("Look")
    return chat


class Unwilling(Middleware):
    """Lets arguments be stored until it refuses to."""

    refuses = False

    def stored_text(self, text: str) -> str:
        if self.refuses and text.startswith("{"):
            raise RuntimeError("not this")
        return text


def change(store: Store, record: str, values: dict[str, Any], **where: Any) -> None:
    """Write into rows as something else than llm_orm does."""
    table: Any = getattr(store.records, record)
    with store.connection():
        changed = table.update(values).where(True, *(getattr(table, name) == value for name, value in where.items()))
        assert changed.execute()


def remove(store: Store, record: str, **where: Any) -> None:
    table: Any = getattr(store.records, record)
    with store.connection():
        gone = table.delete().where(*(getattr(table, name) == value for name, value in where.items())).execute()
    assert gone


@contextmanager
def unguarded(store: Store) -> Iterator[Callable[[str], Any]]:
    """Run SQL in a database that enforces neither foreign keys nor what is unique."""
    run = store.database.execute_sql
    with store.connection():
        if store.is_sqlite:
            run("PRAGMA foreign_keys = 0")
            indexes = run("SELECT name FROM sqlite_master WHERE type = 'index' AND sql LIKE '%UNIQUE%'").fetchall()
        else:
            keys = "SELECT conrelid::regclass, conname FROM pg_constraint WHERE contype = 'f' AND connamespace = "
            for table, key in run(keys + "current_schema()::regnamespace").fetchall():
                run(f'ALTER TABLE {table} DROP CONSTRAINT "{key}"')
            unique = (
                "SELECT i.indexrelid::regclass::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE "
            )
            unique += "i.indisunique AND NOT i.indisprimary AND c.relnamespace = current_schema()::regnamespace"
            indexes = run(unique).fetchall()
        for (name,) in indexes:
            run(f'DROP INDEX "{name}"')
        yield run
        if store.is_sqlite:
            run("PRAGMA foreign_keys = 1")


def kinds(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.kind, finding.table) for finding in found]


def the_finding(store: Store, **options: Any) -> Finding:
    """The only one there is; of the chat alone it is the same."""
    (finding,) = check(store, **{"stale_after": LATER, **options})
    if finding.chat_id is not None and rows(store, "chat", "id").count((finding.chat_id,)):
        assert check(store, chat_id=finding.chat_id, **{"stale_after": LATER, **options}) == [finding]
    return finding


# What is sound


def test_a_database_without_a_row_is_sound(store: Store) -> None:
    assert check(store) == []


def test_what_turns_of_every_kind_leave_is_sound(store: Store, ask: Any) -> None:
    ask(a_chat(store, Say("Here.", images=[PNG])), "Draw", files=PNG)
    failing = a_chat(store, Say("Wait.", calls=[Call("look", at="A")]), ProviderError(400), "Done.", on_error="keep")
    with pytest.raises(ProviderError):
        ask(failing, "Go")
    failing.fork()
    failing.retry()
    ask(a_chat(store, Call("look", at="A"), "Done.", persistence={"tool_calls": False}), "Go")
    ask(a_chat(store, Call("look", at="A"), "Done.", persistence={"requests": False}), "Go")
    parked = a_chat(store, [Call("pay", amount=1), Call("look", at="B")], "Paid.")
    ask(parked, "Pay")
    assert check(store) == []
    parked.approve(parked.pending_approvals()[0])
    assert check(store) == []
    parked.resume()
    parked.delete()
    assert check(store) == []


def test_a_turn_that_was_rolled_back_leaves_a_sound_database(store: Store) -> None:
    chat = a_chat(store, Call("look", at="A"), ProviderError(400), "Hello!")
    with pytest.raises(ProviderError):
        chat.ask("Go")
    assert rows(store, "tool_call", "message", "status") == [(None, "completed")]
    chat.retry()
    assert check(store) == []


def test_a_call_that_was_cancelled_leaves_a_sound_database(store: Store) -> None:
    chats: list[Chat] = []
    chats.append(a_chat(store, lambda keywords: chats[0].cancel() and "Too late.", on_error="keep"))
    with pytest.raises(TurnCancelled):
        chats[0].ask("Go")
    assert rows(store, "message", "status") == [("completed",), ("incomplete",)]
    change(store, "request", {"input_tokens": 99, "usage_estimated": False})  # as when the answer comes after all
    assert check(store) == []


def test_a_call_that_a_middleware_does_not_let_be_stored_is_not_left_running(store: Store) -> None:
    mask = Unwilling()

    @tool
    def stop(at: str) -> str:
        mask.refuses = True
        raise KeyboardInterrupt

    chat = a_chat(store, Call("stop", at="A"), middlewares=[mask])
    with pytest.raises(KeyboardInterrupt):
        chat.ask("Go", tools=[stop])
    assert rows(store, "tool_call", "message", "status", "error") == [(None, "failed", "interrupted")]
    assert check(store) == []


def test_tokens_beyond_what_a_column_holds_are_sound(store: Store) -> None:
    chat = a_chat(store)
    message = chat.messages()[3]
    change(store, "request", {"input_tokens": 2**31 - 1}, message=message.id)
    change(store, "message", {"input_tokens": 2**31 - 1}, id=message.id)
    assert check(store) == []


def test_a_database_that_was_erased_is_sound(store: Store) -> None:
    chat = a_chat(store)
    with pytest.raises(ProviderError):
        a_chat(store, Call("look", at="A"), ProviderError(400)).ask("Go")
    chat.ask("And this?", files=PNG, llm=ScriptedLLM("A cat."))
    erase(store, {"model": None, "id": [row[0] for row in rows(store, "chat", "id")]} | {"model": "test"})
    assert rows(store, "tool_call", "result") == [(None,)] * 3
    assert check(store) == []


def test_a_chat_that_keeps_no_rows_of_calls_and_requests_needs_no_tables_of_them(database_url: str) -> None:
    with connect(database_url) as store:
        store.create_tables()
        with store.connection():
            store.database.drop_tables([store.records.tool_call, store.records.request], cascade=not store.is_sqlite)
        neither = {"tool_calls": False, "requests": False}
        a_chat(store, Call("look", at="A"), "Done.", persistence=neither).ask("Go")
        assert check(store) == []
        change(store, "message", {"position": 5}, position=1)
        assert kinds(check(store)) == [("positions", "llm_message")]


def test_encrypted_content_is_sound_and_is_not_looked_into(database_url: str) -> None:
    with connect(database_url, encrypt=Fernet.generate_key()) as store:
        store.create_tables()
        chat = a_chat(store)
        with pytest.raises(ProviderError):
            chat.ask("Go", llm=ScriptedLLM(Call("look", at="A"), ProviderError(400)))
        assert check(store) == []
        change(store, "tool_call", {"tool_call_id": "other"}, tool_call_id="call_1")
        change(store, "message", {"position": 9}, position=4)
        assert kinds(check(store)) == [("positions", "llm_message")]


# What is not


def test_a_message_that_was_deleted_leaves_a_gap(store: Store) -> None:
    chat = a_chat(store)
    remove(store, "message", position=1)
    finding = the_finding(store)
    (message,) = [message for message in chat.messages() if message.position == 2]
    assert finding == Finding("positions", "llm_message", message.id, chat.id, finding.detail)
    assert finding.detail.startswith(f"message {message.id} is at position 2, right behind 0 (")
    assert finding.detail.endswith(f"put it back, or number the messages of chat {chat.id} anew from 0")


def test_a_chat_that_does_not_begin_at_0_has_a_gap(store: Store) -> None:
    chat = a_chat(store)
    remove(store, "message", position=0)
    finding = the_finding(store)
    assert finding.row_id == chat.messages()[0].id
    assert "is at position 1, right behind -1 " in finding.detail


def test_two_messages_at_one_position_are_found(store: Store) -> None:
    a_chat(store)
    with unguarded(store) as run:
        run("UPDATE llm_message SET position = 2 WHERE position = 3")
    assert "is at position 2, right behind 2 " in the_finding(store).detail


def test_each_of_two_pending_messages_is_found(store: Store) -> None:
    chat = a_chat(store, "Hi")
    with unguarded(store):
        for position in (0, 1):
            store.records.message.create(chat=chat.id, position=position, role="assistant", status="pending")
    found = check(store)
    assert kinds(found) == [("pending", "llm_message")] * 3
    assert {finding.row_id for finding in found[:2]} == {message for (message,) in rows(store, "message", "id")}
    assert f"one of 2 pending messages of chat {chat.id}" in found[0].detail
    assert "llm-orm sync" in found[0].detail


def test_a_message_behind_a_pending_one_is_found(store: Store) -> None:
    chat = a_chat(store, "Hi")
    with store.connection():
        for position, status in enumerate(("pending", "completed")):
            store.records.message.create(chat=chat.id, position=position, role="assistant", status=status)
    finding = the_finding(store)
    assert (finding.kind, finding.row_id) == ("pending", rows(store, "message", "id")[0][0])
    assert "is pending and others follow it" in finding.detail


def test_a_turn_without_a_sign_of_life_is_stale_and_one_that_lives_is_not(store: Store) -> None:
    chat = a_chat(store)
    seen = datetime.now(UTC) - timedelta(seconds=61)
    with store.connection():
        create = store.records.message.create
        create(chat=chat.id, position=4, role="assistant", status="pending", updated_at=seen)
    finding = the_finding(store, stale_after=60)
    assert finding.kind == "stale"
    assert seen.isoformat(" ", "microseconds") in finding.detail
    assert f"llm-orm recover --chat {chat.id}" in finding.detail
    assert check(store) == [finding]
    assert check(store, stale_after=90) == []
    assert kinds(check(store, stale_after=0)) == [("stale", "llm_message")]
    assert check(store, stale_after=1e12) == []


def test_a_turn_that_waits_for_approval_is_never_stale(store: Store) -> None:
    a_chat(store, Call("pay", amount=1)).ask("Pay")
    change(store, "message", {"updated_at": datetime(2020, 1, 1, tzinfo=UTC)}, status="pending")
    assert check(store) == []


def test_a_parked_turn_whose_calls_are_lost_is_found(store: Store) -> None:
    a_chat(store, Call("pay", amount=1)).ask("Pay")
    remove(store, "tool_call", name="pay")
    finding = the_finding(store)
    assert (finding.kind, finding.table) == ("parked", "llm_message")
    assert "no call of it was ever to be approved" in finding.detail


def test_a_call_that_waits_for_approval_in_a_turn_that_is_not_parked_is_found(store: Store) -> None:
    a_chat(store, Call("pay", amount=1)).ask("Pay")
    change(store, "message", {"parked_at": None}, status="pending")
    finding = the_finding(store)
    assert (finding.kind, finding.table) == ("approval", "llm_tool_call")
    assert "(pay) waits for approval in a turn that is not parked" in finding.detail


@pytest.mark.parametrize("status", ["pending", "running"])
def test_a_call_that_nobody_will_finish_is_found(store: Store, status: str) -> None:
    chat = a_chat(store)
    change(store, "tool_call", {"status": status, "finished_at": None}, tool_call_id="call_1")
    finding = the_finding(store)
    assert (finding.kind, finding.table) == ("unfinished", "llm_tool_call")
    assert finding.row_id == chat.tool_calls()[0].id
    assert f"(look) is {status}, and its message is completed" in finding.detail
    change(store, "tool_call", {"message": None}, tool_call_id="call_1")
    assert f"(look) is {status}, and its message is gone" in check(store)[0].detail


@pytest.mark.parametrize("missing", ["result", "finished_at"])
@pytest.mark.parametrize("status", ["completed", "failed", "rejected"])
def test_a_call_that_ended_has_a_result_and_a_time(store: Store, status: str, missing: str) -> None:
    a_chat(store)
    change(store, "tool_call", {"status": status, missing: None}, tool_call_id="call_2")
    finding = the_finding(store)
    assert (finding.kind, finding.table) == ("result", "llm_tool_call")
    assert f"(look) is {status} and has no {missing}:" in finding.detail


def test_a_call_that_was_interrupted_needs_no_result(store: Store) -> None:
    a_chat(store)
    change(store, "tool_call", {"status": "failed", "error": "interrupted", "result": None}, tool_call_id="call_2")
    assert check(store) == []


def test_a_call_whose_row_is_gone_is_found(store: Store) -> None:
    chat = a_chat(store)
    remove(store, "tool_call", tool_call_id="call_1")
    finding = the_finding(store)
    assert (finding.kind, finding.table, finding.row_id) == ("rounds", "llm_message", chat.messages()[3].id)
    assert "says that the tool call 'call_1' was asked for, and it has no row" in finding.detail


def test_a_call_that_its_message_does_not_know_is_found(store: Store) -> None:
    chat = a_chat(store)
    rounds = chat.messages()[3].content_raw["rounds"]
    rounds[0]["tool_calls"] = rounds[0]["tool_calls"][:1]
    change(store, "message", {"content_raw": {"rounds": rounds}}, position=3)
    finding = the_finding(store)
    assert (finding.kind, finding.table) == ("rounds", "llm_tool_call")
    assert "where it would be 'call_2'" in finding.detail
    change(store, "message", {"content_raw": None}, position=3)
    assert kinds(check(store)) == [("rounds", "llm_tool_call")] * 2


@pytest.mark.parametrize("record", ["tool_call", "request"])
def test_a_row_of_another_chat_than_its_messages_is_found(store: Store, record: str) -> None:
    a_chat(store)
    other = create_chat(store, model="test")
    change(store, record, {"chat": other.id}, **({"tool_call_id": "call_1"} if record == "tool_call" else {"round": 1}))
    found = check(store)
    assert ("chat", f"llm_{record}") in kinds(found)
    assert f"is of chat {other.id}, and its message is of another" in found[0].detail


def test_a_call_whose_question_is_in_no_message_of_its_chat_is_found(store: Store) -> None:
    a_chat(store)
    change(store, "tool_call", {"turn_id": uuid7()}, tool_call_id="call_1")
    finding = the_finding(store)
    assert (finding.kind, finding.table) == ("turn", "llm_tool_call")
    assert "set its turn_id to the id of the user message" in finding.detail


@pytest.mark.parametrize("name", ["input_tokens", "output_tokens", "cached_tokens", "thinking_tokens"])
def test_tokens_that_are_not_the_sum_of_the_requests_are_found(store: Store, name: str) -> None:
    chat = a_chat(store)
    message = chat.messages()[3]
    change(store, "request", {name: 1000}, message=message.id, round=0)
    finding = the_finding(store)
    assert (finding.kind, finding.table, finding.row_id) == ("tokens", "llm_message", message.id)
    change(store, "message", {name: None}, id=message.id)
    assert kinds(check(store)) == [("tokens", "llm_message")]


def test_a_request_row_that_is_gone_is_missed_in_the_tokens(store: Store) -> None:
    chat = a_chat(store)
    message = chat.messages()[3]
    remove(store, "request", message=message.id, round=1)
    spent = chat.requests()[1]
    said = f"(input {message.input_tokens} and {spent.input_tokens}; output {message.output_tokens} and "
    assert said + f"{spent.output_tokens}; cached 0 and 0; thinking 0 and 0)" in the_finding(store).detail
    remove(store, "request", message=message.id)
    assert check(store) == []


def test_a_turn_whose_process_died_may_have_spent_more_than_its_message_says_but_not_less(store: Store) -> None:
    chat = a_chat(store)
    message = chat.messages()[3]
    change(store, "request", {"error": "ProcessDied", "status_code": 0, "input_tokens": 10**6}, round=1)
    assert check(store) == []
    change(store, "message", {"input_tokens": 10**7}, id=message.id)
    assert the_finding(store).kind == "tokens"


def test_a_reply_that_ends_with_a_request_for_tools_is_found(store: Store) -> None:
    chat = a_chat(store)
    message = chat.messages()[3]
    change(store, "message", {"content_raw": {"rounds": message.content_raw["rounds"][:1]}}, id=message.id)
    finding = the_finding(store)
    assert (finding.kind, finding.row_id) == ("reply", message.id)
    assert "the last of its rounds asks for tools" in finding.detail
    change(store, "message", {"status": "incomplete"}, id=message.id)
    assert check(store) == []


@pytest.mark.parametrize("mark", ["partial", "sent_back"])
def test_a_mark_of_a_pending_message_on_a_settled_one_is_found(store: Store, mark: str) -> None:
    a_chat(store, "Hi").ask("Hello")
    change(store, "message", {"content_raw": {mark: True}}, position=1)
    finding = the_finding(store)
    assert finding.kind == "marks"
    assert f"its content_raw has {mark!r}" in finding.detail
    change(store, "message", {"status": "pending"}, position=1)
    assert check(store) == []


@pytest.mark.parametrize("content", ['"a text"', "[1]", "5", "{"])
def test_content_that_is_no_object_is_found(store: Store, content: str) -> None:
    a_chat(store)
    if content == "{" and not store.is_sqlite:
        content = "[]"  # JSONB has nothing in it that is not JSON
    with store.connection():
        store.database.execute_sql(f"UPDATE llm_message SET content_raw = '{content}' WHERE position = 1")
    assert the_finding(store).kind == "unreadable"


@pytest.mark.parametrize(
    "content",
    [{"rounds": 1}, {"rounds": ["a", {"tool_calls": [3]}, {"tool_calls": 2}]}, {"rounds": {}, "attachments": "some"}],
    ids=str,
)
def test_content_of_another_shape_stands_in_nobodys_way(store: Store, content: Any) -> None:
    a_chat(store)
    change(store, "message", {"content_raw": content}, position=1)
    assert check(store) == []


def test_files_that_are_gone_are_found(store: Store) -> None:
    chat = a_chat(store, Say("Here.", images=[PNG]))
    chat.ask("Draw", files=[PNG, b"%PDF-1.4"])
    for message, said in zip(chat.messages(), (2, 1), strict=True):
        remove(store, "attachment", message=message.id, position=0)
        (finding,) = [finding for finding in check(store) if finding.row_id == message.id]
        assert (finding.kind, finding.table) == ("files", "llm_message")
        assert f"that it has {said} files, and {said - 1} rows of files name it" in finding.detail


def test_a_file_that_its_message_does_not_know_is_found(store: Store) -> None:
    chat = a_chat(store, "A cat.")
    chat.ask("What is it?", files=PNG)
    change(store, "message", {"content_raw": None}, position=0)
    assert "that it has 0 files, and 1 rows of files name it" in the_finding(store).detail


@pytest.mark.parametrize(
    "values",
    [{"cost": "-0.1"}, {"duration_ms": -1}, {"cache_write_tokens": -1}, {"attempt": 0}, {"status_code": 500}],
    ids=str,
)
def test_a_request_that_no_turn_writes_is_found(store: Store, values: dict[str, Any]) -> None:
    a_chat(store)
    change(store, "request", values, round=1)
    finding = the_finding(store)
    assert (finding.kind, finding.table) == ("request", "llm_request")
    assert "something else than a turn wrote it" in finding.detail


def test_rows_that_name_what_is_gone_are_found(store: Store) -> None:
    chat = a_chat(store)
    chat.ask("And this?", files=PNG, llm=ScriptedLLM("A cat."))
    agent = define_agent("Support", model="test")
    session = create_agent_session(store, agent, llm=ScriptedLLM("Hello!"))
    session.ask("Hi")
    with unguarded(store) as run:
        run("DELETE FROM llm_message")
        run("DELETE FROM llm_chat")
    found = check(store)
    assert {(finding.kind, finding.table) for finding in found} == {
        ("orphan", f"llm_{name}") for name in ("tool_call", "request", "agent_session", "attachment")
    } | {("turn", "llm_tool_call")}
    details = {finding.detail.partition(" names ")[2].partition(",")[0] for finding in found}
    assert {detail.partition(" ")[0] for detail in details if detail} == {"the"}
    of_session = next(finding for finding in found if finding.table == "llm_agent_session")
    assert of_session.chat_id == session.chat_id
    assert of_session.detail.startswith(f"agent_session {of_session.row_id} names the chat ")
    assert of_session.detail.endswith("delete the row")
    of_file = next(finding for finding in found if finding.table == "llm_attachment")
    assert of_file.chat_id is None


def test_messages_without_a_chat_are_found(store: Store) -> None:
    chat = a_chat(store, "Hi")
    chat.ask("Hello")
    with unguarded(store) as run:
        run("DELETE FROM llm_chat")
        run("DELETE FROM llm_request")
    assert kinds(check(store)) == [("orphan", "llm_message")] * 2


# How it is called


def test_findings_of_other_chats_are_left_out(store: Store) -> None:
    chat, other = a_chat(store), a_chat(store)
    change(store, "request", {"input_tokens": 1000}, chat=chat.id)
    remove(store, "message", chat=other.id, position=1)
    assert [finding.kind for finding in check(store)] == ["positions", "tokens", "tokens"]
    assert [finding.kind for finding in check(store, chat_id=chat.id)] == ["tokens", "tokens"]
    assert [finding.kind for finding in check(store, chat_id=str(other.id))] == ["positions"]


def test_no_more_is_found_than_was_asked_for(store: Store) -> None:
    for _ in range(3):
        a_chat(store, "Hi").ask("Hello")
    change(store, "message", {"position": 5}, position=1)
    change(store, "request", {"cost": "-1"})
    assert len(check(store)) == 6
    assert kinds(check(store, limit=4)) == [*[("positions", "llm_message")] * 3, ("request", "llm_request")]
    assert len(check(store, limit=2)) == 2


def test_a_url_will_do_and_tables_of_other_names_are_named_as_they_are(store: Store, database_url: str) -> None:
    a_chat(store)
    assert check(database_url) == []
    with connect(database_url, table_prefix="app_") as other:
        other.create_tables()
        a_chat(other)
        change(other, "request", {"cost": -1}, round=1)
        assert kinds(check(other)) == [("request", "app_llm_request")]
        other.drop_tables()


def test_asyncio_gets_the_same(store: Store) -> None:
    chat = a_chat(store)
    remove(store, "message", position=1)
    assert asyncio.run(acheck(store, chat_id=chat.id)) == check(store)


def test_the_number_of_queries_does_not_depend_on_the_number_of_rows(store: Store) -> None:
    asked: list[Any] = []
    read = store.read
    store.read = lambda statement: asked.append(statement) or read(statement)  # type: ignore[method-assign]
    check(store)
    few = len(asked)
    for _ in range(5):
        a_chat(store)
    asked.clear()
    check(store)
    assert len(asked) == few


def test_a_chat_that_is_not_there_is_an_error(store: Store) -> None:
    nobody = UUID("01a1f8c8-18bf-7346-8b7e-b94b1b67b901")
    with pytest.raises(ChatGone, match=f"there is no chat {nobody} in <Store "):
        check(store, chat_id=nobody)
    assert load_chat(store, nobody) is None


@pytest.mark.parametrize(
    "wrong",
    [{"stale_after": -1}, {"stale_after": "60"}, {"stale_after": float("nan")}, {"limit": 0}, {"chat_id": "nonsense"}],
    ids=str,
)
def test_a_wrong_call_says_which_value_is_wrong(store: Store, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match=next(iter(wrong))):
        check(store, **wrong)


def test_a_database_without_messages_table_says_what_to_run(database_url: str) -> None:
    with connect(database_url) as store, pytest.raises(TablesMissing, match="llm-orm migrate"):
        check(store)

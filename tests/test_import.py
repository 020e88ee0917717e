"""Chats from files and other databases: whole or not at all, once however often, and what did not come in, and why."""

import io
import json
import re
import sqlite3
import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import peewee as pw
import psycopg2
import pytest

from llm_orm import Agent as AgentClass
from llm_orm import (
    Imported,
    InvalidValue,
    Store,
    UnknownKeyword,
    check,
    connect,
    create_chat,
    export_lines,
    import_chats,
    load_agent_session,
    load_chat,
    tool,
)
from llm_orm.formats import jsonl
from llm_orm.importing import MOST_SKIPPED
from llm_orm.testing import Call, ScriptedLLM


@tool
def look(q: str) -> str:
    """Look something up."""
    return f"found {q}"


def written(store: Store, chats: int = 1) -> list[dict[str, Any]]:
    """An export, line by line, of chats with four messages, a file, a tool call and three requests each."""
    for number in range(chats):
        llm = ScriptedLLM(Call("look", q="a"), f"Found, {number}.", "Bye.")
        chat = create_chat(store, model="test", llm=llm, tools=[look], **dict.fromkeys(store.chat_columns, "u_1"))
        chat.ask("Look.", files=("a.txt", b"A"))
        chat.ask("Bye.")
    return [json.loads(line) for line in export_lines(store)]


def empty(store: Store) -> None:
    with store.connection():
        for record in reversed(list(store.records)):
            record.delete().execute()


def text_of(lines: list[Any]) -> str:
    return "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)


def take(store: Store, lines: list[Any] | str, **options: Any) -> Imported:
    return import_chats(store, io.StringIO(lines if isinstance(lines, str) else text_of(lines)), **options)


def counts(found: Imported) -> dict[str, int]:
    return {name: count for name, count in found.as_dict().items() if isinstance(count, int) and count}


ALL = {"chats": 2, "messages": 8, "tool_calls": 2, "requests": 6, "attachments": 2}


# Once, and whole


def test_what_is_there_is_left_as_it_is(store):
    lines = written(store, 2)
    chats = [line["row"]["id"] for line in lines if line.get("table") == "chat"]
    load_chat(store, chats[0], llm=ScriptedLLM("More.")).ask("More?")
    assert counts(take(store, lines)) == {"already_there": 2}
    assert len(load_chat(store, chats[0]).messages()) == 6
    load_chat(store, chats[0]).delete()
    load_chat(store, chats[1], llm=ScriptedLLM("Yes.")).ask("Are you there?")
    found = take(store, lines)
    assert (found.chats, found.requests, found.already_there, found.skipped_in_all) == (1, 3, 1, 0)
    assert load_chat(store, chats[0]).stats().requests == 3  # its requests had outlived it
    empty(store)
    assert counts(take(store, lines)) == ALL
    assert [json.loads(line) for line in export_lines(store)][1:] == lines[1:]


def test_a_dry_run_says_the_same_and_writes_nothing(store):
    lines = written(store, 2)
    lines[2]["row"]["role"] = "pilot"
    empty(store)
    dry = take(store, lines, dry_run=True)
    with store.connection():
        assert [record.select().count() for record in store.records] == [0] * 6
    assert dry == take(store, lines)
    assert (dry.chats, dry.skipped_in_all) == (1, 1)


def test_an_import_that_was_broken_off_is_run_again(store):
    lines = written(store, 3)
    empty(store)

    def stop(done: int, total: int | None) -> None:
        assert total == 3
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(store, lines, progress=stop)
    assert check(store) == []
    found = take(store, lines)
    assert (found.chats, found.already_there) == (1, 2)
    assert [json.loads(line) for line in export_lines(store)][1:] == lines[1:]


def test_requests_of_deleted_chats_come_in_once(store):
    written(store, 2)
    for row in list(store.records.chat.select()):
        load_chat(store, row.id).delete()
    lines = [json.loads(line) for line in export_lines(store)]
    lines.insert(3, {"table": "request", "row": {**lines[2]["row"], "id": str(uuid.uuid4()), "source": "nowhere"}})
    kept = lines[1]["row"]["id"]
    with store.connection():
        store.records.request.delete().where(store.records.request.id != kept).execute()
    found = take(store, lines)
    assert counts(found) == {"requests": 5, "already_there": 1, "skipped_in_all": 1}
    assert found.skipped[0].where == "line 4"
    assert "'nowhere' cannot be request.source: it is one of chat, response, run" in found.skipped[0].reason
    assert counts(take(store, lines)) == {"already_there": 6, "skipped_in_all": 1}


# What does not fit


def row(table: str, nth: int = 0, **changes: Any) -> Any:
    """What changes a row of an export."""

    def change(lines: list[Any]) -> None:
        own = [line for line in lines if isinstance(line, dict) and line.get("table") == table]
        own[nth]["row"].update(changes)

    return change


def replaced(index: int, line: Any) -> Any:
    def change(lines: list[Any]) -> None:
        lines[index] = line

    return change


BAD = {
    "not JSON": (replaced(3, "{nonsense\n"), "line 4: it is not JSON: Expecting property name"),
    "not UTF-8": (replaced(3, '"\udcff"\n'), "line 4: it is not in UTF-8"),
    "no object": (replaced(3, "[1]\n"), "line 4: it is not a JSON object"),
    "no number": (row("request", duration_ms=float("nan")), "NaN is not a number"),
    "deep": (replaced(3, "[" * 100_000 + "]" * 100_000 + "\n"), "line 4: it is nested too deeply"),
    "no row": (replaced(3, {"table": "message"}), 'line 4: it has no "row"'),
    "no table": (replaced(3, {"table": "memory", "row": {}}), "line 4: its table is 'memory': it is one of chat"),
    "a role that is none": (row("message", role="pilot"), "'pilot' cannot be message.role: it is one of user"),
    "a status that is none": (row("tool_call", status="lost"), "'lost' cannot be tool_call.status"),
    "a position twice": (row("message", 1, position=0), "line 4: two messages of the chat have the position 0"),
    "no position": (row("message", position=-1), "-1 cannot be message.position: the first is 0"),
    "NUL": (row("message", content="a\0b"), "content has a NUL character"),
    "NUL in JSON": (row("chat", metadata={"a": ["\0"]}), "metadata has a NUL character"),
    "half a character": (row("message", content="\ud800"), "content has half a character"),
    "an unknown column": (row("message", mood="good"), "the message has the column 'mood', which the store does not"),
    "another chat's": (row("message", chat_id=str(uuid.uuid4())), "line 3: the message is of chat"),
    "a message elsewhere": (row("request", message_id=str(uuid.uuid4())), "which is not in its chat"),
    "no base64": (row("attachment", content="&"), "'&' cannot be attachment.content: it is no base64"),
    "no time": (row("message", created_at="noon"), "'noon' cannot be message.created_at"),
    "no zone": (row("message", created_at="2026-11-01T12:00:00"), "it needs a time zone"),
    "no money": (row("request", cost="free"), "'free' cannot be request.cost"),
    "infinite money": (row("request", cost="Infinity"), "'Infinity' cannot be request.cost"),
    "too much money": (row("request", cost="1" * 40), "request"),
    "text for a number": (row("message", position="0"), "'0' cannot be message.position"),
    "number for a text": (row("message", content=7), "7 cannot be message.content"),
    "number for a flag": (row("request", streamed=1), "1 cannot be request.streamed"),
    "NULL": (row("request", provider=None), "llm_request"),
    "rounds that are none": (row("message", content_raw=[1]), "[1] cannot be message.content_raw"),
    "no id": (row("message", 3, id="1"), "line 6: '1' cannot be message.id"),
    "no id of a request": (row("request", id="1"), "'1' cannot be request.id"),
    "a chat without an id": (row("chat", id=None), "line 2: 'None' is not the id of a chat"),
    "one id twice": (row("request", 1, id=str(uuid.UUID(int=7))), None),
}


@pytest.mark.parametrize("what", list(BAD))
def test_a_chat_with_a_row_that_does_not_fit_is_skipped_whole(sqlite_store, what):
    is_skipped_whole(sqlite_store, what)


@pytest.mark.parametrize("what", ["NULL", "too much money", "one id twice", "NUL in JSON"])
def test_a_chat_with_a_row_that_the_database_refuses_is_skipped_whole(store, what):
    is_skipped_whole(store, what)


def is_skipped_whole(store: Store, what: str) -> None:
    change, complaint = BAD[what]
    lines = written(store, 2)
    change(lines)
    if complaint is None:
        row("request", 0, id=str(uuid.UUID(int=7)))(lines)
    empty(store)
    found = import_chats(store, io.BytesIO(text_of(lines).encode(errors="surrogateescape")))
    assert (found.chats, found.messages, found.skipped_in_all) == (1, 4, 1)
    said = f"{found.skipped[0].where}: {found.skipped[0].reason}"
    assert complaint is None or complaint in said
    assert re.match(r"lines? \d+", said)
    with store.connection():
        assert [record.select().count() for record in store.records] == [1, 4, 1, 3, 0, 1]
    assert check(store) == []


def test_a_message_whose_chat_is_not_there_is_reported(sqlite_store):
    lines = written_plainly(sqlite_store)
    message = lines.pop(2)
    lines.insert(1, message)
    found = take(sqlite_store, lines)
    assert found.skipped[0].where == "line 2"
    assert found.skipped[0].reason == "the message is of no chat: the line of its chat must come before it"


def written_plainly(store: Store, chats: int = 1) -> list[dict[str, Any]]:
    for _ in range(chats):
        create_chat(store, model="test", llm=ScriptedLLM("Hi.")).ask("Hello.")
    lines = [json.loads(line) for line in export_lines(store)]
    empty(store)
    return lines


def test_the_lines_of_an_export_can_be_given_as_they_come(sqlite_store, tmp_path):
    lines = written_plainly(sqlite_store, 2)
    take(sqlite_store, lines)
    with connect(f"sqlite:///{tmp_path}/other.db", chat_fields={"user_id": pw.TextField(null=True)}) as other:
        other.create_tables()
        assert import_chats(other, export_lines(sqlite_store)).chats == 2
        assert [json.loads(line) for line in export_lines(other)][1:] == lines[1:]


def test_a_file_may_have_come_from_windows(sqlite_store):
    lines = written_plainly(sqlite_store)
    text = "\ufeff" + text_of(lines).replace("\n", "\r\n\r\n")
    assert import_chats(sqlite_store, io.BytesIO(text.encode())).chats == 1


def test_a_file_that_was_cut_off_brings_in_no_half_chat(sqlite_store):
    lines = written_plainly(sqlite_store, 2)
    found = take(sqlite_store, lines[:-2])
    assert (found.chats, found.skipped_in_all) == (1, 1)
    assert "the file was cut off" in found.skipped[0].reason
    assert counts(take(sqlite_store, lines)) == {"chats": 1, "messages": 2, "requests": 1, "already_there": 1}


def test_a_line_that_is_too_long_is_never_read_whole(sqlite_store, monkeypatch):
    lines = written_plainly(sqlite_store, 2)
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 5000)
    lines[2]["row"]["content"] = "x" * 50_000

    class File(io.BytesIO):
        def readline(self, size: int = -1) -> bytes:  # type: ignore[override]
            assert 0 < size <= 5000
            return super().readline(size)

    found = import_chats(sqlite_store, File(text_of(lines).encode()))
    assert (found.chats, found.skipped_in_all) == (1, 1)
    assert found.skipped[0].where == "line 3"
    assert "it is longer than" in found.skipped[0].reason


def test_a_long_chat_waits_on_the_disk_and_comes_in(sqlite_store, monkeypatch):
    monkeypatch.setattr(jsonl, "IN_MEMORY", 1000)
    chat = create_chat(sqlite_store, model="test")
    said = [{"chat": chat.id, "role": "user", "position": number, "content": f"{number}"} for number in range(450)]
    sqlite_store.records.message.insert_many(said).execute()
    lines = [json.loads(line) for line in export_lines(sqlite_store)]
    empty(sqlite_store)
    assert take(sqlite_store, lines).messages == 450
    assert [json.loads(line) for line in export_lines(sqlite_store)][1:] == lines[1:]


def test_what_was_skipped_is_counted_beyond_what_is_told(sqlite_store):
    found = take(sqlite_store, '{"messages": 7}\n' * (MOST_SKIPPED + 5))
    assert (len(found.skipped), found.skipped_in_all) == (MOST_SKIPPED, MOST_SKIPPED + 5)


def test_columns_that_the_store_does_not_have_are_refused_before_anything_comes_in(store, tmp_path):
    lines = written(store)
    with connect(f"sqlite:///{tmp_path}/other.db") as other:
        other.create_tables()
        with pytest.raises(
            InvalidValue, match=r"columns that the store does not have: chat.user_id; give them to conn"
        ):
            take(other, lines)
        assert other.records.chat.select().count() == 0


def test_a_store_without_a_table_says_so(sqlite_store):
    lines = written_plainly(sqlite_store)
    sqlite_store.database.execute_sql("DROP TABLE llm_request")
    found = take(sqlite_store, lines)
    assert found.skipped[0].reason == "the store has no table for a request"


@pytest.mark.parametrize(
    ("source", "options", "complaint"),
    [
        ("no such file", {}, "cannot read 'no such file': No such file"),
        (7, {}, "source=7: import_chats() reads a path, an open file, lines, or"),
        (io.StringIO(""), {}, "it is empty: there is nothing to import"),
        (io.StringIO("id,model\n"), {}, "it begins with 'id,model"),
        (io.StringIO('{"llm_orm": 2}\n'), {}, "its format is version 2, and this llm_orm reads version 1"),
        (io.StringIO("{}"), {"format": "jsonl"}, "its format is version None"),
        (io.StringIO("x"), {"format": "jsonl"}, 'it is no export() in "jsonl": line 1: it is not JSON'),
        (io.StringIO(""), {"format": "jsonl"}, 'it is no export() in "jsonl"'),
        ("x", {"format": "xml"}, "format='xml': it is one of 'jsonl', 'openai', 'nodellm'"),
        ("sqlite:///nowhere.db", {}, "there is no database file 'nowhere.db'"),
        (io.BytesIO(b""), {"format": "nodellm"}, "is named by its URL, or the path of its file"),
    ],
)
def test_what_is_no_source_is_refused(sqlite_store, source, options, complaint):
    with pytest.raises(InvalidValue) as caught:
        import_chats(sqlite_store, source, **options)
    assert complaint in str(caught.value)


# The messages of OpenAI


LOOK = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"q": "a"}'}}
AGAIN = {**LOOK, "id": "call_2"}

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Look twice."},
    {"role": "assistant", "content": "Well.", "tool_calls": [LOOK, AGAIN]},
    {"role": "tool", "tool_call_id": "call_2", "content": "found b"},
    {"role": "tool", "tool_call_id": "call_1", "content": "found a"},
    {"role": "assistant", "content": None, "tool_calls": [{**LOOK, "id": "call_3"}]},
    {"role": "tool", "tool_call_id": "call_3", "content": ""},
    {"role": "assistant", "content": "Both."},
    {"role": "system", "content": "Now be kind."},
    {"role": "user", "content": "And again."},
    {"role": "assistant", "content": None, "tool_calls": [LOOK]},
    {"role": "tool", "tool_call_id": "call_1", "content": "1"},
    {"role": "assistant", "content": None, "tool_calls": [LOOK]},
    {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    {"role": "assistant", "content": "Twice."},
    {"role": "assistant", "content": "Anything else?"},
    {"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {}}]},
    {"role": "assistant", "content": "A picture."},
]
TALK[-2]["content"][1]["image_url"]["url"] = "data:image/png;base64,iVBORw0KGgo="  # type: ignore[index]


def test_the_model_is_shown_exactly_the_messages_that_came_in(store):
    found = take(store, [{"messages": TALK, "model": "gpt-4o", "metadata": {"plan": "free"}, "id": 17}])
    assert counts(found) == {"chats": 1, "messages": 9, "tool_calls": 5, "attachments": 1}
    assert check(store) == []
    (record,) = store.records.chat.select()
    assert (record.model, record.instructions) == ("gpt-4o", "Be brief.")
    assert record.metadata == {"plan": "free", "source_id": 17}
    llm = ScriptedLLM("Fine.")
    load_chat(store, record.id, llm=llm).ask("Next?")
    shown, wanted = llm.requests[0]["messages"], [*TALK, {"role": "user", "content": "Next?"}]
    results = slice(3, 5)  # of one round, which are shown in the order in which they were asked for
    assert sorted(map(str, shown[results])) == sorted(map(str, wanted[results]))
    assert [*shown[:3], *shown[5:]] == [*wanted[:3], *wanted[5:]]


def test_what_is_exported_for_fine_tuning_comes_back_the_same(store):
    take(store, [{"messages": TALK}])
    first = "".join(export_lines(store, "openai"))
    empty(store)
    take(store, first)
    assert "".join(export_lines(store, "openai")) == first


def test_importing_twice_imports_once_by_id_or_by_what_is_said(store):
    named = str(uuid.uuid4())
    hello = [{"role": "user", "content": "Hello."}]
    lines = [{"messages": hello}, {"messages": hello, "id": "a"}, {"messages": hello, "id": named}]
    assert take(store, lines).chats == 3
    lines[1]["messages"] = [{"role": "user", "content": "Hello again."}]
    assert counts(take(store, lines)) == {"already_there": 3}
    assert load_chat(store, named) is not None


def test_a_call_without_a_result_at_the_end_is_a_reply_that_was_interrupted(store):
    asked = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": "Hm.", "tool_calls": [LOOK]}]
    take(
        store, [{"messages": each, "model": "test"} for each in (asked, [*asked, {"role": "user", "content": "Well?"}])]
    )
    assert check(store) == []
    for record in store.records.chat.select():
        llm = ScriptedLLM("Fine.")
        load_chat(store, record.id, llm=llm).ask("Next?")
        assert [message["content"] for message in llm.requests[0]["messages"][:2]] == ["Look.", "Hm."]
    assert {call.status for call in store.records.tool_call.select()} == {"failed"}


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "pilot", "content": "x"}, "line 1, message 1: its role is 'pilot': it is one of system, developer"),
        ({"content": "x"}, "its role is 'None'"),
        ({"role": "user", "content": ""}, "the user says nothing in it"),
        ({"role": "user", "content": 7}, "neither a text nor a list of parts"),
        (
            {"role": "user", "content": [{"type": "video", "video": {}}]},
            "of the type 'video', is none that can be kept",
        ),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}, "no valid data: URL"),
        ({"role": "user", "content": [{"type": "file", "file": {"file_id": "f_1"}}]}, "none that can be kept"),
        (
            {"role": "tool", "tool_call_id": "x", "content": "y"},
            "result of 'x', which no message right before it calls",
        ),
        ({"role": "assistant", "function_call": {"name": "look"}}, "function_call, of before there were tools"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "a tool call is like"),
        ({"role": "assistant", "tool_calls": [LOOK, LOOK]}, "two of its tool calls have the id 'call_1'"),
        ({"role": "user", "content": "a\0"}, "content has a NUL character"),
    ],
)
def test_messages_that_cannot_be_kept_are_named(store, message, complaint):
    found = take(store, [{"messages": [{"role": "user", "content": "Hi."}, message]}, {"messages": TALK}])
    assert (found.chats, found.skipped_in_all) == (1, 1)
    assert complaint in f"{found.skipped[0].where}: {found.skipped[0].reason}"


def test_a_tool_that_is_called_before_anybody_spoke_is_refused(sqlite_store):
    found = take(sqlite_store, [{"messages": [{"role": "assistant", "tool_calls": [LOOK]}]}])
    assert "calls tools before the user has said anything" in found.skipped[0].reason
    assert take(sqlite_store, [{"messages": [{"role": "assistant", "content": "Welcome!"}], "id": True}]).chats == 0
    assert take(sqlite_store, [{"messages": [{"role": "assistant", "content": "Welcome!"}]}]).chats == 1


# NodeLLM


SCHEMA = """
CREATE TABLE "LlmChat" ("id" TEXT PRIMARY KEY, "model" TEXT, "provider" TEXT, "instructions" TEXT, "metadata" {json},
    "createdAt" {time} NOT NULL, "updatedAt" {time} NOT NULL, "userId" TEXT, "projectId" TEXT);
CREATE TABLE "LlmMessage" ("id" TEXT PRIMARY KEY, "chatId" TEXT NOT NULL, "role" TEXT NOT NULL, "content" TEXT,
    "contentRaw" TEXT, "reasoning" TEXT, "thinkingText" TEXT, "thinkingSignature" TEXT, "thinkingTokens" INTEGER,
    "inputTokens" INTEGER, "outputTokens" INTEGER, "modelId" TEXT, "provider" TEXT, "createdAt" {time} NOT NULL);
CREATE TABLE "LlmToolCall" ("id" TEXT PRIMARY KEY, "messageId" TEXT NOT NULL, "toolCallId" TEXT NOT NULL,
    "name" TEXT NOT NULL, "arguments" TEXT NOT NULL, "thought" TEXT, "thoughtSignature" TEXT, "result" TEXT,
    "createdAt" {time} NOT NULL);
CREATE TABLE "LlmRequest" ("id" TEXT PRIMARY KEY, "chatId" TEXT NOT NULL, "messageId" TEXT, "provider" TEXT NOT NULL,
    "model" TEXT NOT NULL, "statusCode" INTEGER NOT NULL, "duration" INTEGER NOT NULL, "inputTokens" INTEGER NOT NULL,
    "outputTokens" INTEGER NOT NULL, "cost" DOUBLE PRECISION, "correctionRounds" INTEGER, "createdAt" {time} NOT NULL);
CREATE TABLE "LlmAgentSession" ("id" TEXT PRIMARY KEY, "agentClass" TEXT NOT NULL, "chatId" TEXT NOT NULL,
    "metadata" {json}, "createdAt" {time} NOT NULL, "updatedAt" {time} NOT NULL);
"""

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)

CHAT = "3f0a2f0e-6d53-4a0b-9c86-0c6f5b0d9f11"


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def nodellm_rows() -> dict[str, list[dict[str, Any]]]:
    chat, plain = {"chatId": CHAT}, {"chatId": "cmd4x2k9p0000v8l4"}
    twice = json.dumps(json.dumps({"q": "a"}))
    request = {"provider": "openai", "model": "gpt-4o", "statusCode": 200}
    message = {"modelId": "gpt-4o", "provider": "openai"}
    return {
        "LlmChat": [
            {"id": CHAT, "model": "gpt-4o", "provider": "openai", "instructions": "Be brief.", "userId": "u_1"}
            | {"metadata": json.dumps({"plan": "free"}), "createdAt": at(0), "updatedAt": at(60), "projectId": "p_1"},
            {"id": "cmd4x2k9p0000v8l4", "model": "gpt-4o", "createdAt": at(5), "updatedAt": at(5)},
        ],
        "LlmMessage": [
            # Of one millisecond, and the id of the answer sorts first.
            {"id": "b", **chat, "role": "user", "content": "Look twice.", "createdAt": at(1)},
            {"id": "a", **chat, **message, "role": "assistant", "content": "Both.", "createdAt": at(1)}
            | {"inputTokens": 30, "outputTokens": 10, "thinkingText": "Hm.", "thinkingTokens": 4},
            {"id": "c", **chat, "role": "user", "content": "A story.", "createdAt": at(10)},
            {"id": "d", **chat, **message, "role": "assistant", "content": "Once.", "createdAt": at(10.001)}
            | {"inputTokens": 0, "outputTokens": 0},
            {"id": "e", **chat, "role": "user", "content": "Gone?", "createdAt": at(20)},
            {"id": "f", **chat, "role": "assistant", "content": None, "createdAt": at(20.001)},
            {"id": "g", **plain, "role": "user", "content": "Look.", "createdAt": at(30)},
            {"id": "h", **plain, "role": "assistant", "content": None, "createdAt": at(30.001)},
        ],
        "LlmToolCall": [
            {"id": "t1", "messageId": "a", "toolCallId": "call_1", "name": "look", "arguments": twice}
            | {"result": "found a", "createdAt": at(2.1)},
            {"id": "t2", "messageId": "a", "toolCallId": "call_2", "name": "look", "arguments": '{"q": "b"}'}
            | {"result": None, "createdAt": at(2.2)},
            {"id": "t3", "messageId": "a", "toolCallId": "call_3", "name": "look", "arguments": "not JSON"}
            | {"result": "found c", "createdAt": at(3.1)},
            {"id": "t4", "messageId": "h", "toolCallId": "call_1", "name": "look", "arguments": "{}"}
            | {"result": "found", "createdAt": at(31)},
        ],
        "LlmRequest": [
            {"id": "r1", **chat, **request, "messageId": "a", "duration": 0, "inputTokens": 10, "outputTokens": 5}
            | {"cost": 0.000125, "createdAt": at(2)},
            {"id": "r2", **chat, **request, "messageId": "a", "duration": 7, "inputTokens": 20, "outputTokens": 5}
            | {"cost": 0.1, "correctionRounds": 1, "createdAt": at(3)},
            {"id": "r3", **chat, **request, "messageId": "d", "duration": 0, "inputTokens": 50, "outputTokens": 9}
            | {"cost": -0.0072, "createdAt": at(11)},
            {"id": "r4", **chat, **request, "messageId": None, "duration": 0, "inputTokens": 5, "outputTokens": 0}
            | {"cost": 0, "createdAt": at(12)},
        ],
        "LlmAgentSession": [
            {"id": "s1", "agentClass": "Support", "chatId": CHAT, "metadata": json.dumps({"ticket": 7})}
            | {"createdAt": at(0), "updatedAt": at(0)},
        ],
    }


def as_number(moment: datetime) -> Any:
    return round(moment.timestamp() * 1000)


def as_text(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def nodellm_file(path: Path, rows: dict[str, list[dict[str, Any]]], time: Any = as_number) -> Path:
    database = sqlite3.connect(path)
    database.executescript(SCHEMA.format(json="JSONB", time="DATETIME"))
    for table, some in rows.items():
        for each in some:
            values = [time(value) if isinstance(value, datetime) else value for value in each.values()]
            names = ", ".join(f'"{name}"' for name in each)
            database.execute(f'INSERT INTO "{table}" ({names}) VALUES ({", ".join("?" * len(each))})', values)
    database.commit()
    database.close()
    return path


class Support(AgentClass):
    model = "gpt-4o"


@pytest.mark.parametrize("time", [as_number, as_text])
def test_a_database_of_nodellms_comes_in_with_its_history(store, tmp_path, time):
    path = nodellm_file(tmp_path / "node.db", nodellm_rows(), time)
    before = path.read_bytes()
    dry = import_chats(store, path, dry_run=True)
    found = import_chats(store, path)
    assert dry == found
    assert counts(found) == {
        "chats": 2,
        "messages": 7,
        "tool_calls": 4,
        "requests": 4,
        "agent_sessions": 1,
        "left_out": 1,
    }
    assert (found.skipped, found.columns_left_out) == ((), ("LlmChat.projectId",))
    assert check(store) == []
    assert path.read_bytes() == before
    came_in_right(store)
    assert counts(import_chats(store, f"sqlite:///{path}")) == {"already_there": 2, "left_out": 1}


def came_in_right(store: Store) -> None:
    llm = ScriptedLLM("Yes.")
    chat = load_chat(store, CHAT, llm=llm, user_id="u_1")
    assert chat is not None
    assert (chat.metadata, chat.record.created_at) == ({"plan": "free"}, at(0))
    assert [message.position for message in chat.messages()] == [0, 1, 2, 3, 4]
    assert [message.created_at for message in chat.messages()][:4] == [at(1), at(1), at(10), at(10.001)]
    assert [message.input_tokens for message in chat.messages()] == [None, 30, None, 50, None]
    assert chat.messages()[1].thinking_text == "Hm."
    requests = sorted(chat.requests(), key=lambda request: request.created_at)
    assert [request.cost for request in requests] == [Decimal("0.000125"), Decimal("0.1"), None, None]
    assert [request.round for request in requests] == [0, 1, 0, 0]
    chat.ask("There?")
    called = [
        {"id": f"call_{number}", "type": "function", "function": {"name": "look", "arguments": arguments}}
        for number, arguments in ((1, '{"q": "a"}'), (2, '{"q": "b"}'), (3, "not JSON"))
    ]
    assert llm.requests[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look twice."},
        {"role": "assistant", "content": None, "tool_calls": called[:2]},
        {"role": "tool", "tool_call_id": "call_1", "content": "found a"},
        {"role": "tool", "tool_call_id": "call_2"}
        | {"content": "The tool was interrupted while it ran. Whether it did its work is not known."},
        {"role": "assistant", "content": None, "tool_calls": called[2:]},
        {"role": "tool", "tool_call_id": "call_3", "content": "found c"},
        {"role": "assistant", "content": "Both."},
        {"role": "user", "content": "A story."},
        {"role": "assistant", "content": "Once."},
        {"role": "user", "content": "Gone?"},
        {"role": "user", "content": "There?"},
    ]
    (other,) = store.records.chat.select().where(store.records.chat.id != CHAT)
    assert other.metadata == {"nodellm_id": "cmd4x2k9p0000v8l4"}
    assert [message.status for message in load_chat(store, other.id).messages()] == ["completed", "incomplete"]
    (session,) = store.records.agent_session.select()
    assert load_agent_session(store, Support, session.id).metadata == {"ticket": 7}


def test_it_may_be_in_postgresql_with_prismas_url_and_other_names(store, postgres_server):
    schema = f"node_{uuid.uuid4().hex}"
    admin = psycopg2.connect(postgres_server)
    admin.autocommit = True
    names = {table: table.replace("Llm", "Assistant") for table in ("LlmChat", "LlmMessage", "LlmToolCall")}
    with admin.cursor() as cursor:
        cursor.execute(f"CREATE SCHEMA {schema}; SET search_path = {schema}; SET timezone = 'UTC'")
        sql = SCHEMA.format(json="JSONB", time="TIMESTAMP(3)")
        for table, name in names.items():
            sql = sql.replace(f'"{table}"', f'"{name}"')
        cursor.execute(sql)
        for table, some in nodellm_rows().items():
            for each in some:
                columns = ", ".join(f'"{name}"' for name in each)
                values = [
                    value.replace(tzinfo=None) if isinstance(value, datetime) else value for value in each.values()
                ]
                marks = ", ".join(["%s"] * len(each))
                cursor.execute(f'INSERT INTO "{names.get(table, table)}" ({columns}) VALUES ({marks})', values)
    url = f"{postgres_server}{'&' if '?' in postgres_server else '?'}schema={schema}&connection_limit=5"
    with pytest.raises(
        InvalidValue, match="has no tables LlmChat and LlmMessage with NodeLLM's columns; it has Assist"
    ):
        import_chats(store, url)
    with pytest.raises(UnknownKeyword, match="source_tables has"):
        import_chats(store, url, source_tables={"chats": "x"})
    tables = {"chat": "AssistantChat", "message": "AssistantMessage", "tool_call": "assistanttoolcall"}
    found = import_chats(store, url, source_tables=tables)
    with admin.cursor() as cursor:
        cursor.execute(f"DROP SCHEMA {schema} CASCADE")
    admin.close()
    assert (found.chats, found.skipped, found.columns_left_out) == (2, (), ("AssistantChat.projectId",))
    assert check(store) == []
    came_in_right(store)


def test_a_chat_of_nodellms_that_does_not_fit_is_skipped_and_named(store, tmp_path):
    rows = nodellm_rows()
    rows["LlmMessage"][6]["role"] = "pilot"
    found = import_chats(store, nodellm_file(tmp_path / "node.db", rows))
    assert (found.chats, found.skipped_in_all) == (1, 1)
    assert found.skipped[0].where == "LlmMessage g"
    assert "its role is 'pilot'" in found.skipped[0].reason
    rows["LlmMessage"][6] |= {"role": "user", "createdAt": "noon"}
    (tmp_path / "node.db").unlink()
    path = nodellm_file(tmp_path / "node.db", rows, as_text)
    assert "'noon' is not a time" in import_chats(store, path).skipped[0].reason


def test_columns_of_the_application_are_found_by_either_name(tmp_path):
    fields: dict[str, Any] = {"userId": pw.TextField(null=True), "project_id": pw.TextField(null=True)}
    with connect(f"sqlite:///{tmp_path}/chats.db", chat_fields=fields) as store:
        store.create_tables()
        found = import_chats(store, nodellm_file(tmp_path / "node.db", nodellm_rows()))
        assert found.columns_left_out == ()
        chat: Any = store.records.chat.get_by_id(CHAT)
        assert (chat.userId, chat.project_id) == ("u_1", "p_1")


def test_a_database_of_ours_is_not_taken_for_one_of_nodellms(sqlite_store, sqlite_url):
    with pytest.raises(InvalidValue, match="what llm_orm wrote is read by export"):
        import_chats(sqlite_store, sqlite_url)

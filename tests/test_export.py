"""Chats as files: every row of them, fine-tuning data, transcripts, a table of requests."""

import asyncio
import csv
import io
import json
import os
import stat
import sys
import threading
import tracemalloc
import uuid
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import peewee as pw
import pytest
from cryptography.fernet import Fernet

from llm_orm import (
    Agent,
    Exported,
    InvalidValue,
    Store,
    UnknownKeyword,
    WrongKey,
    aexport,
    aimport_chats,
    check,
    connect,
    create_agent_session,
    create_chat,
    export,
    export_lines,
    import_chats,
    load_chat,
    tool,
)
from llm_orm.export import _Reader
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

PNG = b"\x89PNG\r\n\x1a\nnot really"

FIELDS = {
    "user_id": pw.TextField(null=True),
    "born": pw.DateField(null=True),
    "seen": pw.DateTimeField(null=True),
    "alarm": pw.TimeField(null=True),
    "budget": pw.DecimalField(max_digits=12, decimal_places=5, null=True),
    "owner_id": pw.UUIDField(null=True),
    "visits": pw.BigIntegerField(null=True),
    "ratio": pw.FloatField(null=True),
    "is_vip": pw.BooleanField(null=True),
    "settings": pw.JSONField(null=True),
    "badge": pw.BlobField(null=True),
}


def look(q: str) -> str:
    """Look something up."""
    return f"found {q}"


@tool(requires_approval=True)
def pay(amount: int) -> str:
    """Pay."""
    return f"paid {amount}"


class Support(Agent):
    model = "test"
    instructions = "Help."


def say(store: Store, *script: Any, **columns: Any) -> Any:
    return create_chat(store, model="test", llm=ScriptedLLM(*(script or ("Hi, Ada.",))), tools=[look, pay], **columns)


def fill(store: Store) -> None:
    """Rows of every kind that turns leave, and some that only a crash does."""
    odd = "emoji 🐘, a line\u2028break, e\u0301, \ufeff, 'quotes\"; enc:v1:not a token, ```"
    chat = say(
        store,
        Say("It is late.", thinking="Hm.", signature="sig", calls=[Call("look", q=odd)], cost="0.000000000001"),
        Say("Here.", images=[PNG], cost=Decimal("999.999999999999")),
        metadata={"z": 1, "a": [None, True, 1.5, odd], "nested": {"b": {}, "a": []}},
        instructions=odd,
        user_id="u_1",
        born=date(1815, 12, 10),
        seen=datetime(2026, 11, 1, 12, 30, 15, 120),  # noqa: DTZ001
        alarm=datetime(2026, 1, 1, 7, 30).time(),  # noqa: DTZ001
        budget=Decimal("12.5"),
        owner_id=uuid.uuid4(),
        visits=2**40,
        ratio=0.1,
        is_vip=True,
        settings={"theme": {"dark": True}},
        badge=b"\x00\xff",
    )
    chat.ask(odd, files=[("notes.md", b"# Notes"), ("pixel.png", PNG)], key="once")
    parked = say(store, Say("", calls=[Call("pay", amount=3), Call("look", q="a")]))
    parked.ask("Pay.")
    failed = say(store, ProviderError(400, "no such thing"))
    with pytest.raises(ProviderError):
        failed.ask("Fail.", on_error="keep")
    create_agent_session(store, Support, metadata={"customer": "c_1"}, llm=ScriptedLLM("Yes?")).ask("Help me.")
    deleted = say(store)
    deleted.ask("Forget me.")
    deleted.delete()
    erased = say(store, user_id="u_2")
    erased.ask("Secret.")
    erased.erase()
    records: Any = store.records
    crashed = create_chat(store, model="test")
    asked = crashed.add_message("user", "Are you there?")
    more = {"chat": crashed.id, "role": "assistant"}
    with store.connection():
        cut = records.message.create(**more, position=1, status="incomplete", content="I am", owner=uuid.uuid4())
        died = {"provider": "", "model": "test", "status_code": 0, "error": "ProcessDied", "duration_ms": 0}
        records.request.create(chat=crashed.id, message=cut, turn_id=asked.id, **died)
        spent = {**died, "status_code": 200, "error": None, "cost": Decimal("12345678.123456789012")}
        records.request.create(chat=crashed.id, message=cut, turn_id=asked.id, round=1, **spent)
        records.message.create(chat=crashed.id, role="user", position=2, content="Hello?")
        records.message.create(**more, position=3, status="pending")


def rows_of(store: Store) -> list[str]:
    return list(export_lines(store))[1:]


def everything(store: Store) -> str:
    return "".join(export_lines(store))


@pytest.fixture
def filled(tmp_path: Path) -> Any:
    with connect(f"sqlite:///{tmp_path}/filled.db", chat_fields=FIELDS) as store:
        store.create_tables()
        fill(store)
        yield store


# Lossless


@pytest.mark.parametrize("begins", ["sqlite", "postgresql"])
def test_every_row_comes_through_both_databases_and_back_to_the_letter(sqlite_url, postgres_url, tmp_path, begins):
    urls = [sqlite_url, postgres_url] if begins == "sqlite" else [postgres_url, sqlite_url]
    with connect(urls[0], chat_fields=FIELDS) as first, connect(urls[1], chat_fields=FIELDS) as second:
        for store in (first, second):
            store.create_tables()
        fill(first)
        if begins == "postgresql":
            first.database.execute_sql("UPDATE llm_request SET cost = 1234567.125 WHERE cost > 1000")
        path = tmp_path / "chats.jsonl"
        written = export(first, path)
        assert import_chats(second, path).as_dict() == {
            **{name: count for name, count in written.as_dict().items() if name != "left_out"},
            **dict.fromkeys(("already_there", "left_out", "skipped_in_all"), 0),
            "skipped": [],
            "columns_left_out": [],
        }
        assert rows_of(second) == rows_of(first) == path.read_text().splitlines(keepends=True)[1:]
        assert all(written.as_dict()[name] for name in written.as_dict() if name != "left_out")
        first.drop_tables()
        first.create_tables()
        import_chats(first, io.StringIO(everything(second)))
        assert rows_of(first) == rows_of(second)
        assert check(second) == check(first) == []
        types = {name: type(value) for name, value in _columns(second).items()}
        assert types == {name: type(value) for name, value in _columns(first).items()}


def _columns(store: Store) -> dict[str, Any]:
    chat: Any = store.records.chat
    with store.connection():
        found = chat.get(chat.visits.is_null(False))
        return {name: getattr(found, name) for name in FIELDS if name != "badge"}  # a view of bytes, on one of them


def test_a_cost_of_twenty_digits_is_written_and_read_as_it_is(postgres_url):
    with connect(postgres_url) as store:
        store.create_tables()
        fill_requests(store, 1, cost=Decimal("12345678.123456789012"))
        written = everything(store)
        store.drop_tables()
        store.create_tables()
        import_chats(store, io.StringIO(written))
        assert '"cost": "12345678.123456789012"' in written
        assert everything(store).splitlines()[1:] == written.splitlines()[1:]


def fill_requests(store: Store, many: int, **values: Any) -> None:
    record: Any = store.records.request
    row = {"provider": "p", "model": "m", "status_code": 200, "duration_ms": 5, **values}
    with store.connection():
        record.insert_many([row] * many).execute()


def test_content_is_clear_in_the_file_and_sealed_in_an_encrypted_store(store, database_url, tmp_path):
    say(store, user_id="u_1").ask("I am Ada.", files=("a.txt", b"Ada's"))
    written = everything(store)
    store.drop_tables()
    store.create_tables()
    key = Fernet.generate_key()
    with connect(database_url, chat_fields={"user_id": pw.TextField(null=True)}, encrypt=key) as encrypted:
        assert import_chats(encrypted, io.StringIO(written)).chats == 1
        assert rows_of(encrypted) == written.splitlines(keepends=True)[1:]
        path = tmp_path / "chats.jsonl"
        export(encrypted, path)
        assert "I am Ada." in path.read_text()
    with store.connection():
        held = store.database.execute_sql(
            "SELECT content FROM llm_message UNION ALL SELECT filename FROM llm_attachment"
        )
        assert all(value.startswith("enc:v1:") for (value,) in held.fetchall())
    with connect(database_url, encrypt=Fernet.generate_key()) as wrong, pytest.raises(WrongKey):
        export(wrong, tmp_path / "other.jsonl")
    assert [each.name for each in tmp_path.iterdir() if "other" in each.name] == []


# Which chats


def test_chats_are_chosen_as_everywhere(store):
    ada, ben = say(store, user_id="u_1"), say(store, user_id="u_2")
    for chat in (ada, ben):
        chat.ask("Hello.")
    ben.delete()
    assert [row["row"]["id"] for row in chats_in(export_lines(store, where={"user_id": "u_1"}))] == [str(ada.id)]
    assert list(chats_in(export_lines(store, since=timedelta(hours=1))))
    assert not list(chats_in(export_lines(store, until="2020-01-01")))
    assert not list(chats_in(export_lines(store, where={"user_id": "u_3"})))
    with store.connection():
        store.records.chat.update(updated_at=datetime(2026, 1, 1, tzinfo=UTC)).execute()
    assert not list(chats_in(export_lines(store, since="2026-01-02")))
    assert list(chats_in(export_lines(store, since="2026-01-01")))
    in_all = [json.loads(line) for line in export_lines(store, where={})]
    assert sum(row.get("table") == "request" for row in in_all) == 2
    chosen = [json.loads(line) for line in export_lines(store, where={"user_id": "u_1"})]
    assert sum(row.get("table") == "request" for row in chosen) == 1  # the other is of no chat


def chats_in(lines: Any) -> Any:
    return (row for row in map(json.loads, lines) if row.get("table") == "chat")


@pytest.mark.parametrize(
    ("wrong", "error", "complaint"),
    [
        ({"format": "yaml"}, InvalidValue, "one of 'jsonl', 'openai', 'markdown', 'csv'"),
        ({"where": {"user": "u_1"}}, UnknownKeyword, "export() does not know 'user'"),
        ({"since": "soon"}, InvalidValue, "since='soon' is not a time"),
        ({"format": "csv", "where": {"tool": "look"}}, InvalidValue, "a request is not of one tool"),
        ({"tz": "Mars"}, InvalidValue, "'Mars' is not a time zone"),
        ({"tools": [3]}, InvalidValue, "3 is not a tool"),
    ],
)
def test_what_makes_no_sense_is_refused_before_there_is_a_file(sqlite_store, tmp_path, wrong, error, complaint):
    with pytest.raises(error) as caught:
        export(sqlite_store, tmp_path / "chats.jsonl", **wrong)
    assert complaint in str(caught.value)
    assert not (tmp_path / "chats.jsonl").exists()


# Files


def test_a_file_is_for_its_owner_and_is_there_only_when_it_is_complete(sqlite_store, tmp_path):
    for _ in range(3):
        say(sqlite_store).ask("Hello.")
    path = tmp_path / "out" / "chats.jsonl"
    path.parent.mkdir()

    def stop(done: int, total: int | None) -> None:
        assert [each.suffix for each in path.parent.iterdir()] == [".part"]
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(sqlite_store, path, progress=stop)
    assert list(path.parent.iterdir()) == []
    os.umask(os.umask(0))  # it is not the umask that makes it so
    export(sqlite_store, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(InvalidValue, match="is there already"):
        export(sqlite_store, path)
    path.write_text("old")
    assert export(sqlite_store, str(path), overwrite=True).chats == 3
    assert len(path.read_text().splitlines()) == 3 * 4 + 2
    assert [each.name for each in path.parent.iterdir()] == ["chats.jsonl"]
    for wrong, complaint in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "x", "there is no folder"),
        (3, "a path or"),
    ):
        with pytest.raises(InvalidValue, match=complaint):
            export(sqlite_store, wrong)


def test_an_open_file_of_text_or_bytes_is_written_to_and_stays_open(sqlite_store):
    say(sqlite_store).ask("Grüße.")
    as_text, as_bytes = io.StringIO(), io.BytesIO()
    assert export(sqlite_store, as_text, "openai") == export(sqlite_store, as_bytes, "openai")
    assert as_text.getvalue().encode() == as_bytes.getvalue()
    assert "Grüße." in as_text.getvalue()


def test_progress_is_told_chat_by_chat(sqlite_store):
    for _ in range(3):
        say(sqlite_store).ask("Hello.")
    told: list[Any] = []
    for format in ("jsonl", "openai", "markdown", "csv"):
        told.clear()
        export(sqlite_store, io.StringIO(), format, progress=lambda done, total: told.append((done, total)))
        assert told[-1] == (3, 3), format
        assert [done for done, _ in told] == ([3] if format == "csv" else [1, 2, 3])


def test_no_transaction_is_open_while_the_reader_takes_its_time(store):
    chats = [say(store) for _ in range(2)]
    for chat in chats:
        chat.ask("Hello.")
    lines = export_lines(store)
    next(lines)
    for _ in lines:
        assert store.database.is_closed()
        say(store).ask("I write meanwhile.")
        break
    assert sum(1 for line in lines if '"table": "chat"' in line) >= 1


def test_a_chat_is_exported_as_it_was_at_one_moment(store, monkeypatch):
    chat = say(store, "One.", "Two.")
    chat.ask("First.")
    exporting = export_lines(store)
    rows, seen = _Reader._rows, []

    def rows_and_more(reader: Any, record: Any, *where: Any, **options: Any) -> Any:
        found = rows(reader, record, *where, **options)
        if record is store.records.message and not seen:
            seen.append(1)
            thread = threading.Thread(target=chat.ask, args=("Second.",))
            thread.start()
            thread.join()
        return found

    monkeypatch.setattr(_Reader, "_rows", rows_and_more)
    read = [json.loads(line) for line in exporting]
    assert [row["table"] for row in read if "table" in row].count("request") == 1
    assert [row["row"]["content"] for row in read if row.get("table") == "message"] == ["First.", "One."]


def test_it_can_be_had_from_asyncio(store, tmp_path):
    say(store, user_id="u_1").ask("Hello.")

    async def both() -> tuple[Exported, Any]:
        written = await aexport(store, tmp_path / "chats.jsonl", where={"user_id": "u_1"})
        return written, await aimport_chats(store, tmp_path / "chats.jsonl")

    written, read = asyncio.run(both())
    assert (written.chats, read.already_there, read.skipped) == (1, 1, ())


def bulk(store: Store, first: int, many: int) -> None:
    """Chats with two messages and a request each."""
    records: Any = store.records
    time = datetime(2026, 11, 1, tzinfo=UTC)
    text = "x" * 2000
    for start in range(first, first + many, 500):
        ids = [uuid.UUID(int=number) for number in range(start + 1, min(start + 500, first + many) + 1)]
        times = {"created_at": time, "updated_at": time}
        with store.transaction():
            records.chat.insert_many([{"id": key, "model": "m", **times} for key in ids]).execute()
            for position, role in enumerate(("user", "assistant")):
                records.message.insert_many(
                    {"chat": key, "position": position, "role": role, "content": text, **times} for key in ids
                ).execute()
            spent = {"provider": "p", "model": "m", "status_code": 200, "duration_ms": 5, "created_at": time}
            records.request.insert_many({"chat": key, **spent} for key in ids).execute()


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("format", "first", "more"),
    [("jsonl", 500, 1500), ("openai", 500, 1500), ("csv", 500, 1500), ("markdown", 80, 160)],
)
def test_memory_does_not_grow_with_the_number_of_chats(sqlite_store, format, first, more):
    def peak() -> int:
        tracemalloc.start()
        for _ in export_lines(sqlite_store, format):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    bulk(sqlite_store, 0, first)
    peak()  # what is made once
    few = peak()
    bulk(sqlite_store, first, more)
    assert peak() < few + 500_000
    assert few < 8_000_000


def test_more_chats_than_a_page_has_are_all_exported_once(sqlite_store):
    bulk(sqlite_store, 0, 130)
    lines = list(chats_in(export_lines(sqlite_store)))
    assert [uuid.UUID(row["row"]["id"]).int for row in lines] == list(range(1, 131))
    fill_requests(sqlite_store, 600)
    read = list(csv.DictReader(io.StringIO("".join(export_lines(sqlite_store, "csv")))))
    assert len({row["id"] for row in read}) == len(read) == 730
    assert sum('"table": "request"' in line for line in export_lines(sqlite_store)) == 730


def test_chats_with_many_messages_are_read_a_few_at_a_time(sqlite_store, monkeypatch):
    bulk(sqlite_store, 0, 7)
    monkeypatch.setattr(sys.modules["llm_orm.export"], "MESSAGES_AT_ONCE", 4)
    sqlite_store.records.message.insert_many(
        {"chat": uuid.UUID(int=3), "position": number, "role": "user", "content": "x"} for number in range(2, 9)
    ).execute()
    together = list(_Reader(sqlite_store, []).ids())
    assert [[key.int for key in ids] for ids in together] == [[1, 2], [3], [4, 5], [6, 7]]
    assert len(list(chats_in(export_lines(sqlite_store)))) == 7


# Fine-tuning


def test_fine_tuning_data_is_what_the_model_was_shown(sqlite_store):
    llm = ScriptedLLM(Say("Let me see.", thinking="Hm.", calls=[Call("look", q="Ada")]), "She is here.", "Bye.", "?")
    chat = create_chat(sqlite_store, model="test", instructions="Be brief.", tools=[look], llm=llm)
    chat.ask("Where is Ada?")
    chat.ask("Bye.")
    chat.ask("Next.")
    (line,) = export_lines(sqlite_store, "openai", tools=[look])
    written = json.loads(line)
    assert written["messages"][:-1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where is Ada?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"q": "Ada"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "found Ada"},
        {"role": "assistant", "content": "She is here."},
        {"role": "user", "content": "Bye."},
        {"role": "assistant", "content": "Bye."},
        {"role": "user", "content": "Next."},
    ]
    assert written["tools"] == llm.requests[0]["tools"]
    assert "tools" not in json.loads(next(export_lines(sqlite_store, "openai")))


def test_turns_that_are_not_complete_are_left_out_and_counted(filled):
    written = io.StringIO()
    done = export(filled, written, "openai")
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    asked = [message["content"] for line in lines for message in line["messages"] if message["role"] == "user"]
    assert (done.chats, done.left_out) == (2, 10)
    assert [len(line["messages"]) for line in lines] == [5, 2]
    assert asked[1] == "Help me."
    assert [part["type"] for part in asked[0]] == ["text", "text", "image_url"]


def test_a_question_that_was_asked_again_is_one_turn_with_its_answer(sqlite_store):
    chat = say(sqlite_store, ProviderError(400), "Now.", ProviderError(400))
    for text in ("Hello?", "Hello!", "Never."):
        try:
            chat.ask(text)
        except ProviderError:
            pass
    chat.add_message("system", "Be kind.")
    (line,) = export_lines(sqlite_store, "openai")
    assert [message["content"] for message in json.loads(line)["messages"]] == ["Hello?", "Hello!", "Now.", "Be kind."]


def test_a_greeting_stays_and_a_picture_that_the_model_made_is_told_in_words(sqlite_store):
    chat = say(sqlite_store, Say("", images=[PNG]))
    chat.add_message("assistant", "Welcome!")
    chat.ask("Draw.")
    (line,) = export_lines(sqlite_store, "openai")
    assert json.loads(line)["messages"] == [
        {"role": "assistant", "content": "Welcome!"},
        {"role": "user", "content": "Draw."},
        {"role": "assistant", "content": "[A picture came with this message; it cannot be shown to this model.]"},
    ]


# To be read


def test_a_transcript_shows_everything_and_nothing_breaks_out_of_its_fence(sqlite_store):
    evil = "```\n# Not a heading\n````\n<script>alert(1)</script>\n"
    chat = say(sqlite_store, Say("", calls=[Call("look", q=evil)]), evil, metadata={"a\nb": "`x`"}, instructions=evil)
    chat.ask(evil, files=("`odd`\n# name.txt", evil.encode()))
    (text,) = export_lines(sqlite_store, "markdown")
    outside = outside_fences(text)
    assert not any("script" in line or "Not a heading" in line for line in outside)
    assert [line for line in outside if line.startswith("#")] == [
        f"# Chat {chat.id}",
        "## Instructions",
        *[line for line in outside if line.startswith(("## User (", "## Assistant ("))],
    ]
    assert sum(line.startswith("## ") for line in outside) == 3
    assert text.count("<script>alert(1)</script>") == 5
    assert "- Tool `look`: completed" in text


def outside_fences(text: str) -> list[str]:
    """The lines that a reader of Markdown takes for more than the content of a fence."""
    outside, fence = [], ""
    for line in text.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if fence:
            fence = "" if len(ticks) >= len(fence) and line == ticks else fence
        elif len(ticks) >= 3:
            fence = ticks
        else:
            outside.append(line)
    assert not fence
    return outside


def test_transcripts_of_every_kind_of_chat_can_be_written(filled):
    text = "".join(export_lines(filled, "markdown", tz="Europe/Berlin"))
    assert export(filled, io.StringIO(), "markdown").chats == text.count("\n# Chat ") + 1
    for said in ("Thinking:", "- Agent: `Support`", "*Nothing: it was erased", "incomplete", "+01:00", "`notes.md`"):
        assert said in text


# Requests


def test_requests_are_a_table_with_the_columns_of_the_application(store):
    say(store, Say("Hi.", cost=Decimal("0.0000001")), user_id="u_1").ask("Hello.")
    session = create_agent_session(store, Support, llm=ScriptedLLM("Yes?"), user_id='=1+1,"x"\n')
    session.ask("Help me.")
    failed = say(store, ProviderError(400, "@no"))
    with pytest.raises(ProviderError):
        failed.ask("Fail.")
    failed.delete()
    read = list(csv.DictReader(io.StringIO("".join(export_lines(store, "csv")), newline="")))
    assert [row["user_id"] for row in read] == ["u_1", '\'=1+1,"x"\n', ""]
    assert [row["agent_class"] for row in read] == ["", "Support", ""]
    assert [row["cost"] for row in read] == ["0.0000001", "", "0"]
    assert (read[2]["status_code"], read[2]["chat_id"], read[2]["streamed"]) == ("400", "", "false")
    assert read[2]["error_message"].startswith("'@no")
    assert datetime.fromisoformat(read[0]["created_at"]).tzinfo is not None


@pytest.mark.parametrize(
    ("where", "found"),
    [({"status": 400}, 1), ({"error": None}, 1), ({"user_id": "u_1"}, 1), ({"model": "test"}, 2), ({"model": "x"}, 0)],
)
def test_requests_are_chosen_by_their_own_names(store, where, found):
    say(store, user_id="u_1").ask("Hello.")
    with pytest.raises(ProviderError):
        say(store, ProviderError(400)).ask("Fail.")
    assert export(store, io.StringIO(), "csv", where=where).requests == found
    assert export(store, io.StringIO(), "csv", where=where, until="2020-01-01").requests == 0


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", "\t=1", "\r=1", "\n=1"])
def test_a_text_that_a_spreadsheet_would_run_is_made_a_text(sqlite_store, text):
    fill_requests(sqlite_store, 1, model=text, duration_ms=5)
    (row,) = csv.DictReader(io.StringIO("".join(export_lines(sqlite_store, "csv")), newline=""))
    assert row["model"] == f"'{text}"


def test_loaded_again_a_chat_goes_on_where_it_was(filled, tmp_path):
    export(filled, tmp_path / "chats.jsonl")
    with connect(f"sqlite:///{tmp_path}/other.db", chat_fields=FIELDS) as other:
        other.create_tables()
        import_chats(other, tmp_path / "chats.jsonl")
        parked: Any = next(row.chat_id for row in other.records.tool_call.select() if row.approval == "required")
        llm = ScriptedLLM("Paid.")
        chat = load_chat(other, parked, llm=llm, tools=[look, pay])
        assert chat is not None
        for call in chat.pending_approvals():
            chat.approve(call)
        assert chat.resume().content == "Paid."
        assert [message["content"] for message in llm.requests[0]["messages"][2:]] == ["paid 3", "found a"]

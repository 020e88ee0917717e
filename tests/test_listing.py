"""chats() and requests(): lists, a page at a time."""

import asyncio
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import peewee as pw
import pytest
from cryptography.fernet import Fernet

from llm_orm import (
    Agent,
    Chat,
    InvalidValue,
    Store,
    UnknownKeyword,
    achats,
    arequests,
    chats,
    connect,
    create_agent_session,
    create_chat,
    requests,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

NEVER = "01a1f8c8-18bf-7346-8b7e-b94b1b67b901"


class Support(Agent):
    model = "support-model"


def echo(text: str) -> str:
    return text


def a_chat(store: Store, *script: Any, **keywords: Any) -> Chat:
    return create_chat(store, **{"model": "test", "llm": ScriptedLLM(*script), "tools": [echo], **keywords})


@pytest.fixture
def three(store: Store) -> list[Any]:
    """The ids of three chats: one of u_1, whose second turn failed, an agent's for u_2, and one of no words."""
    calls = Say(calls=[Call("echo", text="a")], cost="0.5", input_tokens=10, output_tokens=1)
    again = Say("Done.", cost="0.25", input_tokens=20, output_tokens=2)
    first = a_chat(store, calls, again, ProviderError(400, "no"), user_id="u_1", metadata={"plan": "free", "seats": 3})
    first.ask("  Where is\nmy order?  ")
    with pytest.raises(ProviderError):
        first.ask("And now?")
    llm = ScriptedLLM(Say("Hi!", cost="2"), Say("Ho!"))
    second = create_agent_session(store, Support, llm=llm, user_id="u_2")
    second.ask("Hello")
    second.ask("Hello again")
    return [first.id, second.chat_id, create_chat(store).id]


def test_a_line_says_what_the_chat_took(store: Store, three: list[Any]) -> None:
    line = next(line for line in chats(store) if line.id == three[0])
    assert (line.title, line.model, line.provider, line.agent_class) == ("Where is my order?", "test", None, None)
    assert (line.metadata, line.columns) == ({"plan": "free", "seats": 3}, {"user_id": "u_1"})
    assert (line.messages, line.turns, line.status) == (3, 2, "completed")
    assert (line.requests, line.failed_requests, line.unpriced_requests) == (3, 1, 0)
    assert (line.cost, line.total_tokens) == (Decimal("0.75"), 33)
    assert line.created_at < line.updated_at
    assert list(line.as_dict()) == list(type(line).__slots__)


def test_a_chat_in_which_nothing_was_said_has_zeros(store: Store, three: list[Any]) -> None:
    line = next(line for line in chats(store) if line.id == three[2])
    assert (line.title, line.status, line.messages, line.turns, line.requests, line.cost) == (None, None, 0, 0, 0, 0)
    assert type(line.cost) is Decimal


def test_sums_of_the_lines_are_those_of_the_chats(store: Store) -> None:
    made = [a_chat(store, *[Say("Hi", cost=Decimal(turn) / 7) for turn in range(chat)]) for chat in range(1, 5)]
    for count, chat in enumerate(made, 1):
        for _ in range(count):
            chat.ask("Hello")
    assert {line.id: line.cost for line in chats(store)} == {chat.id: chat.stats().cost for chat in made}


ORDERS = {
    "-updated_at": [2, 1, 0],
    "created_at": [0, 1, 2],
    "-id": [2, 1, 0],
    "-cost": [1, 0, 2],
    "cost": [2, 0, 1],
    "-requests": [0, 1, 2],
    "-total_tokens": [0, 1, 2],
    "-messages": [1, 0, 2],
    "turns": [2, 0, 1],
    "model": [0, 1, 2],
    "-model": [0, 2, 1],
    "-user_id": [1, 0, 2],
    "agent_class": [1, 0, 2],
    "-agent_class": [1, 2, 0],
}
"""Which of the three comes first, second, third."""


def test_chats_come_in_the_order_that_is_asked_for(store: Store, three: list[Any]) -> None:
    found = {order: [three.index(line.id) for line in chats(store, order=order)] for order in ORDERS}
    assert found == ORDERS


@pytest.mark.parametrize("order", ["created_at", "-requests"])
def test_chats_are_filtered(store: Store, three: list[Any], order: str) -> None:
    wanted: list[tuple[dict[str, Any], list[int]]] = [
        ({"user_id": "u_1"}, [0]),
        ({"user_id": ["u_1", "u_2"]}, [0, 1]),
        ({"user_id": None}, [2]),
        ({"agent_class": "Support"}, [1]),
        ({"metadata.plan": "free", "metadata.seats": 3}, [0]),
        ({"model": "test", "user_id": "u_2"}, []),
        ({}, [0, 1, 2]),
    ]
    for where, places in wanted:
        found = [three.index(line.id) for line in chats(store, where=where, order=order)]
        assert found == places, where


def test_chats_of_a_span_are_those_in_use_in_it(store: Store) -> None:
    first, second = create_chat(store, model="test"), create_chat(store, model="test")
    chat: Any = store.records.chat
    days = [datetime(2026, 11, day, 12, tzinfo=UTC) for day in range(1, 8)]
    with store.connection():
        chat.update(created_at=days[0], updated_at=days[3]).where(chat.id == first.id).execute()
        chat.update(created_at=days[4], updated_at=days[6]).where(chat.id == second.id).execute()

    def found(since: Any, until: Any) -> list[Any]:
        return [line.id for line in chats(store, since=since, until=until, order="created_at")]

    assert found(days[1], days[2]) == [first.id]
    assert found(date(2026, 11, 4), "2026-11-06") == [first.id, second.id]
    assert found("2026-11-05", None) == [second.id]
    assert found(None, days[0]) == []
    with pytest.raises(InvalidValue, match="nothing is between them"):
        found("2026-11-05", "2026-11-05")


def test_pages_follow_each_other(store: Store, three: list[Any]) -> None:
    pages = [chats(store, order="-cost", limit=1, offset=offset) for offset in range(4)]
    assert [[three.index(line.id) for line in page] for page in pages] == [[1], [0], [2], []]
    assert [len(chats(store, limit=None, offset=offset)) for offset in (0, 2)] == [3, 1]
    assert [len(requests(store, limit=2, offset=offset)) for offset in (0, 2, 4)] == [2, 2, 1]
    assert len(requests(store, limit=None, offset=1)) == 4


def test_a_long_title_is_cut(store: Store) -> None:
    a_chat(store, "Hi").ask("word " * 1000)
    (line,) = chats(store)
    assert line.title is not None
    assert line.title == ("word " * 16)[:79].rstrip() + "…"


def test_a_title_begins_with_what_is_there(store: Store) -> None:
    files, marked = a_chat(store, "Hi", "Ho"), a_chat(store, "Hi")
    files.ask("", files=[("notes.txt", b"1")])
    files.ask("And now?")
    marked.ask("enc:v1:gAAAA is how a token begins")
    assert [line.title for line in chats(store, order="created_at")] == [
        "And now?",
        "enc:v1:gAAAA is how a token begins",
    ]
    files.erase()
    assert chats(store, order="created_at")[0].title is None


def test_titles_and_errors_of_an_encrypted_store_are_clear(database_url: str) -> None:
    with connect(database_url, encrypt=Fernet.generate_key()) as store:
        store.create_tables()
        chat = a_chat(store, ProviderError(400, "not like this"))
        with pytest.raises(ProviderError):
            chat.ask("A secret " * 100)
        (line,), (request,) = chats(store), requests(store)
    assert line.title is not None
    assert line.title.startswith("A secret A secret")
    assert request.error_message == "not like this"


def test_a_page_is_one_query_whatever_is_on_it(store: Store, monkeypatch: pytest.MonkeyPatch, three: list[Any]) -> None:
    asked: list[str] = []
    execute = store.database.execute_sql
    monkeypatch.setattr(
        store.database, "execute_sql", lambda sql, *rest, **more: (asked.append(sql), execute(sql, *rest, **more))[1]
    )
    chats(store)
    requests(store)
    reading = [sql for sql in asked if "llm_message" in sql or "llm_request" in sql]
    assert len(reading) == 2


def test_lists_do_without_tables_that_are_not_there(sqlite_url: str) -> None:
    with connect(sqlite_url) as store:
        store.create_tables()
        a_chat(store, "Hi").ask("Hello")
        store.records.agent_session.drop_table()
        assert [request.agent_class for request in requests(store)] == [None]
        store.records.request.drop_table()
        for order in ("-updated_at", "-cost", "agent_class"):
            (line,) = chats(store, order=order)
            assert (line.title, line.requests, line.cost, line.agent_class) == ("Hello", 0, 0, None)


def test_a_request_has_all_of_its_row(store: Store, three: list[Any]) -> None:
    lines = requests(store, order="created_at")
    record: Any = store.records.request
    rows = store.found(record.select().order_by(record.created_at))
    for line, row in zip(lines, rows, strict=True):
        own = {name: getattr(row, name) for name in line.as_dict() if name != "agent_class"}
        assert line.as_dict() == own | {"agent_class": "Support" if row.chat_id == three[1] else None}


def test_requests_are_filtered(store: Store, three: list[Any]) -> None:
    wanted: list[tuple[dict[str, Any], int]] = [
        ({"model": "support-model"}, 2),
        ({"provider": "scripted", "status": 200}, 4),
        ({"status": [400, 429]}, 1),
        ({"error": "ProviderError"}, 1),
        ({"error": None}, 4),
        ({"source": "chat", "streamed": False}, 5),
        ({"streamed": True}, 0),
        ({"user_id": "u_1"}, 3),
        ({"user_id": ["u_1", "u_2"]}, 5),
        ({"agent_class": "Support"}, 2),
        ({"agent_class": None}, 3),
        ({"metadata.plan": "free", "status": 400}, 1),
        ({"tool": "echo"}, 1),
        ({"tool": ["other"]}, 0),
        ({"chat": NEVER}, 0),
    ]
    for where, count in wanted:
        assert len(requests(store, where=where)) == count, where


def test_requests_of_one_chat_and_of_deleted_ones(store: Store, three: list[Any]) -> None:
    assert {line.chat_id for line in requests(store, where={"chat": str(three[1])})} == {three[1]}
    with store.connection():
        store.records.chat.delete().where(store.records.chat.id == three[1]).execute()  # type: ignore[attr-defined]
    lost = requests(store, where={"user_id": None}, order="-cost")
    assert [(line.chat_id, line.cost) for line in lost] == [(None, 2), (None, None)]
    assert len(requests(store, where={"chat": None})) == 2


def test_requests_of_a_span(store: Store) -> None:
    chat = a_chat(store, *["Hi"] * 3)
    record: Any = store.records.request
    for day in (1, 2, 3):
        chat.ask("Hello")
        last = requests(store, limit=1)[0].id
        with store.connection():
            time = datetime(2026, 11, day, 23, 30, tzinfo=UTC) - timedelta(days=30)
            record.update(created_at=time).where(record.id == last).execute()
    assert len(requests(store, since="2026-10-03", until="2026-10-04")) == 1
    assert len(requests(store, since="2026-10-03", until="2026-10-04", tz="Europe/Berlin")) == 1
    assert [line.created_at.day for line in requests(store, until="2026-10-05", order="created_at")] == [2, 3, 4]
    assert [line.created_at.day for line in requests(store, until="2026-10-05", tz="Europe/Berlin")] == [3, 2]


def test_what_is_not_known_comes_last(store: Store, three: list[Any]) -> None:
    for order in ("-cost", "cost", "-first_token_ms", "-error", "agent_class", "-chat_id", "model"):
        values = [getattr(line, order.removeprefix("-")) for line in requests(store, order=order)]
        known = [value for value in values if value is not None]
        nothing = [None] * (len(values) - len(known))
        assert values == sorted(known, reverse=order.startswith("-")) + nothing, order


@pytest.mark.parametrize("listed", [chats, requests])
def test_without_a_table_of_sessions_no_chat_has_an_agent(database_url: str, listed: Any) -> None:
    with connect(database_url) as store:
        store.create_tables()
        a_chat(store, "Hi.").ask("Hello")
        with store.connection():
            store.database.drop_tables([store.records.agent_session], cascade=not store.is_sqlite)

        assert [line.agent_class for line in listed(store, order="-agent_class")] == [None]


@pytest.mark.parametrize("listed", [chats, requests])
def test_what_cannot_be_asked_for_is_refused(sqlite_store: Store, listed: Any) -> None:
    for order in ("nonsense", "-title" if listed is chats else "error_message", 3, "cost; DROP TABLE llm_chat"):
        with pytest.raises(InvalidValue, match="cannot order by"):
            listed(sqlite_store, order=order)
    for page in ({"limit": -1}, {"limit": True}, {"offset": None}, {"offset": "1"}, {"limit": 2.0}):
        with pytest.raises(InvalidValue, match="is not a whole number"):
            listed(sqlite_store, **page)
    with pytest.raises(UnknownKeyword, match="nonsense"):
        listed(sqlite_store, where={"nonsense": 1})
    with pytest.raises(InvalidValue, match="is not a time"):
        listed(sqlite_store, since="yesterday")


def test_a_value_that_a_column_cannot_have_is_refused(postgres_url: str) -> None:
    with connect(postgres_url, chat_fields={"seats": pw.IntegerField(null=True)}) as store:
        store.create_tables()
    with connect(postgres_url, chat_fields={"seats": pw.BareField(null=True)}) as store:
        for listed in (chats, requests):
            assert listed(store, where={"seats": "3"}) == []
            with pytest.raises(InvalidValue, match="columns of the application that were given: seats="):
                listed(store, where={"seats": ["many"]})


def test_a_refusal_says_what_was_meant(sqlite_store: Store) -> None:
    with pytest.raises(InvalidValue, match="did you mean 'updated_at'"):
        chats(sqlite_store, order="-update_at")
    with pytest.raises(InvalidValue, match="'status' cannot be 'many'"):
        requests(sqlite_store, where={"status": "many"})


def test_lists_read_the_same_from_asyncio(store: Store, three: list[Any]) -> None:
    options: dict[str, Any] = {"where": {"user_id": "u_1"}, "order": "-cost", "limit": 2, "offset": 1, "since": "1d"}
    assert asyncio.run(arequests(store, **options)) == requests(store, **options)
    options |= {"offset": 0}
    assert asyncio.run(achats(store, **options)) == chats(store, **options)


def test_a_request_that_is_owed_is_in_the_list(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = a_chat(store, "Hi")
    chat.ask("Hello")
    record: Any = store.records.request
    (row,) = store.found(record.select().dicts())
    with store.connection():
        record.delete().execute()
    columns = {field.column_name: row[field.name] for field in record._meta.sorted_fields}
    store.owe(store.statements.insert(record, columns))
    assert [line.requests for line in chats(store)] == [1]

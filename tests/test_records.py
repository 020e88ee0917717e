"""The six tables as the database has them: columns, types, indexes, checks, and what goes when something is deleted."""

import time
import uuid
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import peewee as pw
import pytest
from conftest import rows
from freezegun import freeze_time

from llm_orm import Chat, LlmOrmError, Store, connect, create_chat, load_chat
from llm_orm.records import uuid7
from llm_orm.testing import Call, ProviderError, ScriptedLLM

COLUMNS = {
    "llm_chat": "id model? provider? instructions? metadata? created_at updated_at user_id?",
    "llm_message": "id chat_id position role status content? content_raw? thinking_text? thinking_signature? "
    "thinking_tokens? input_tokens? output_tokens? cached_tokens? model_id? provider? request_key? "
    "created_at updated_at parked_at? cancelled_at? owner?",
    "llm_tool_call": "id chat_id message_id? turn_id round position tool_call_id name arguments thought? "
    "thought_signature? result? status approval? error? duration_ms? metadata? created_at finished_at?",
    "llm_request": "id chat_id? message_id? turn_id? source round attempt provider model status_code error? "
    "error_message? finish_reason? duration_ms first_token_ms? streamed input_tokens output_tokens cached_tokens "
    "cache_write_tokens thinking_tokens usage_estimated cost? correction_rounds? provider_request_id? created_at",
    "llm_agent_session": "id agent_class chat_id metadata? created_at updated_at",
    "llm_attachment": "id message_id position media_type filename? size sha256 content? url?",
}
"""? may be NULL."""

UNIQUE = {
    "llm_chat": [],
    "llm_message": [["chat_id"], ["chat_id", "position"], ["chat_id", "request_key"]],
    "llm_tool_call": [["message_id", "tool_call_id"]],
    "llm_request": [],
    "llm_agent_session": [["chat_id"]],
    "llm_attachment": [["message_id", "position"]],
}

NOT_UNIQUE = {
    "llm_chat": [["created_at"], ["updated_at"], ["user_id"]],
    "llm_message": [["created_at"]],
    "llm_tool_call": [["chat_id", "turn_id"], ["created_at"]],
    "llm_request": [["chat_id", "created_at"], ["created_at"], ["message_id"], ["turn_id"]],
    "llm_agent_session": [["agent_class"], ["created_at"]],
    "llm_attachment": [],
}

TOKYO = timezone(timedelta(hours=9))


def echo(text: str) -> str:
    return text


def a_chat(store: Store, *script: Any, **keywords: Any) -> Chat:
    return create_chat(store, model="test", llm=ScriptedLLM(*script), **keywords)


def add(store: Store, record: str, **values: Any) -> Any:
    """A row, written straight into its table."""
    needed: dict[str, dict[str, Any]] = {
        "message": {"role": "user"},
        "tool_call": {"turn_id": uuid7(), "round": 0, "position": 0, "name": "echo", "arguments": "{}"},
        "request": {"provider": "p", "model": "m", "status_code": 200, "duration_ms": 1},
        "attachment": {"media_type": "image/png", "size": 3, "sha256": "…", "position": 0},
    }
    with store.connection():
        return getattr(store.records, record).create(**{**needed.get(record, {}), **values})


# Tables


def test_every_table_has_the_columns_of_the_design(store: Store) -> None:
    with store.connection():
        for table, columns in COLUMNS.items():
            found = {column.name + "?" * column.null for column in store.database.get_columns(table)}
            assert found == set(columns.split()), table


def test_every_table_has_the_indexes_of_the_design(store: Store) -> None:
    with store.connection():
        for table in COLUMNS:
            indexes = [
                index
                for index in store.database.get_indexes(table)
                if index.columns != ["id"] and not index.name.endswith("_search")
            ]
            assert sorted(index.columns for index in indexes if index.unique) == UNIQUE[table], table
            assert sorted(index.columns for index in indexes if not index.unique) == NOT_UNIQUE[table], table


def test_keys_times_json_and_money_have_the_native_types_of_postgresql(postgres_url: str) -> None:
    with connect(postgres_url) as store:
        store.create_tables()
        with store.connection():
            found = store.database.execute_sql(
                "SELECT table_name, column_name, data_type, numeric_precision, numeric_scale "
                "FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name) "
                "WHERE table_schema = current_schema() AND table_type = 'BASE TABLE'"
            ).fetchall()
    types = {(table, column): kind for table, column, kind, _, _ in found}
    assert len(types) == sum(len(columns.split()) for columns in COLUMNS.values()) - 1  # user_id
    for (table, column), kind in types.items():
        if column in ("id", "chat_id", "message_id", "turn_id"):
            assert kind == "uuid", (table, column)
        if column.endswith("_at"):
            assert kind == "timestamp with time zone", (table, column)
        if column in ("metadata", "content_raw"):
            assert kind == "jsonb", (table, column)
        if column.endswith(("_tokens", "_ms")):
            assert kind == "integer", (table, column)
    assert ("llm_request", "cost", "numeric", 20, 12) in found
    assert types["llm_attachment", "content"] == "bytea"
    assert types["llm_request", "streamed"] == "boolean"


def test_making_the_tables_twice_changes_nothing(store: Store) -> None:
    chat = a_chat(store, "Hello!")
    chat.ask("Hi")
    store.create_tables()
    assert [message.content for message in chat.messages()] == ["Hi", "Hello!"]


def test_tables_are_made_all_or_none(database_url: str) -> None:
    with connect(database_url) as store:
        with store.connection():
            store.database.execute_sql("CREATE VIEW llm_attachment AS SELECT 1 AS message_id, 2 AS position")
        with pytest.raises((pw.PeeweeException, LlmOrmError)):
            store.create_tables()  # a view cannot have the table's index
        with store.connection():
            assert set(store.database.get_tables()) <= {"sqlite_sequence"}  # SQLite's own


def test_dropping_the_tables_leaves_none(store: Store) -> None:
    store.drop_tables()
    with store.connection():
        assert set(store.database.get_tables()) <= {"sqlite_sequence"}  # SQLite's own


# Unique


def test_a_position_is_taken_once_in_a_chat(store: Store) -> None:
    one, other = a_chat(store), a_chat(store)
    add(store, "message", chat=one.id, position=0)
    add(store, "message", chat=other.id, position=0)
    with pytest.raises(pw.IntegrityError):
        add(store, "message", chat=one.id, position=0)


def test_a_request_key_is_used_once_in_a_chat(store: Store) -> None:
    one, other = a_chat(store), a_chat(store)
    add(store, "message", chat=one.id, position=0, request_key="k")
    add(store, "message", chat=other.id, position=0, request_key="k")
    add(store, "message", chat=one.id, position=1)
    add(store, "message", chat=one.id, position=2)
    with pytest.raises(pw.IntegrityError):
        add(store, "message", chat=one.id, position=3, request_key="k")


def test_a_chat_has_one_pending_message_at_the_most(store: Store) -> None:
    one, other = a_chat(store), a_chat(store)
    add(store, "message", chat=one.id, position=0, role="assistant", status="pending")
    add(store, "message", chat=other.id, position=0, role="assistant", status="pending")
    add(store, "message", chat=one.id, position=1, role="assistant", status="completed")
    with pytest.raises(pw.IntegrityError):
        add(store, "message", chat=one.id, position=2, role="assistant", status="pending")


def test_a_tool_call_id_is_unique_within_its_message_only(store: Store) -> None:
    chat = a_chat(store)
    one = add(store, "message", chat=chat.id, position=0)
    other = add(store, "message", chat=chat.id, position=1)
    add(store, "tool_call", chat=chat.id, message=one, tool_call_id="call_1")
    add(store, "tool_call", chat=chat.id, message=other, tool_call_id="call_1")
    add(store, "tool_call", chat=chat.id, message=None, tool_call_id="call_1")
    add(store, "tool_call", chat=chat.id, message=None, tool_call_id="call_1")
    with pytest.raises(pw.IntegrityError):
        add(store, "tool_call", chat=chat.id, message=one, tool_call_id="call_1")


def test_a_chat_has_one_agent_session_at_the_most(store: Store) -> None:
    chat = a_chat(store)
    add(store, "agent_session", agent_class="a.B", chat=chat.id)
    with pytest.raises(pw.IntegrityError):
        add(store, "agent_session", agent_class="a.C", chat=chat.id)


# Checks


@pytest.mark.parametrize(
    ("record", "bad"),
    [
        ("message", {"role": "robot"}),
        ("message", {"status": "done"}),
        ("tool_call", {"status": "done"}),
        ("request", {"source": "elsewhere"}),
    ],
)
def test_a_word_that_a_column_does_not_know_is_refused(store: Store, record: str, bad: dict[str, str]) -> None:
    chat = a_chat(store)
    more = {"message": {"position": 0}, "tool_call": {"tool_call_id": "call_1"}}.get(record, {})
    with pytest.raises(pw.IntegrityError):
        add(store, record, chat=chat.id, **more, **bad)


@pytest.mark.parametrize(
    ("record", "column", "words"),
    [
        ("message", "role", ["user", "assistant", "system", "tool"]),
        ("message", "status", ["pending", "completed", "incomplete", "failed"]),
        ("tool_call", "status", ["pending", "running", "completed", "failed", "rejected"]),
        ("request", "source", ["chat", "response", "run"]),
    ],
)
def test_every_word_of_the_design_is_taken(store: Store, record: str, column: str, words: list[str]) -> None:
    chat = a_chat(store)
    for position, word in enumerate(words):
        more = {"message": {"position": position}, "tool_call": {"tool_call_id": word}}.get(record, {})
        add(store, record, chat=chat.id, **more, **{column: word})
    assert [row[0] for row in rows(store, record, column)] == words


# Deleting


def a_full_chat(store: Store) -> Chat:
    chat = a_chat(store, Call("echo", text="x"), "Done.", tools=[echo])
    message = chat.ask("Go")
    add(store, "agent_session", agent_class="a.B", chat=chat.id)
    add(store, "attachment", message=message.id, content=b"\x00\xff\n")
    return chat


def test_deleting_a_chat_leaves_its_requests_and_nothing_else(store: Store) -> None:
    chat = a_full_chat(store)
    chat.delete()
    assert rows(store, "request", "chat", "message", "round") == [(None, None, 0), (None, None, 1)]
    with store.connection():
        counts = {record._meta.name: record.select().count() for record in store.records}  # type: ignore[attr-defined]
    assert set(counts.values()) == {0, 2}
    assert counts["llmrequest"] == 2


def test_deleting_a_message_keeps_its_tool_calls_and_requests(store: Store) -> None:
    chat = a_full_chat(store)
    record = store.records.message
    with store.connection():
        record.delete().where(record.chat == chat.id, record.role == "assistant").execute()
        attachments = store.records.attachment.select().count()
    assert attachments == 0
    assert rows(store, "tool_call", "chat", "message", "result") == [(chat.id, None, "x")]
    assert rows(store, "request", "chat", "message") == [(chat.id, None), (chat.id, None)]


def test_what_a_deleted_chat_cost_still_counts(store: Store) -> None:
    from llm_orm.sums import stats_of

    llm = ScriptedLLM("Hello!", input_cost_per_token="0.001", output_cost_per_token="0.002")
    chat = create_chat(store, model="test", llm=llm)
    chat.ask("Hi")
    chat.delete()
    assert stats_of(store).cost == Decimal("0.003")
    assert chat.stats().requests == 0


# Keys


def test_keys_are_uuids_of_version_7_that_sort_by_time() -> None:
    before = time.time_ns() // 1_000_000
    keys = []
    for moment in range(5):
        with freeze_time(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(milliseconds=10 * moment)):
            keys.append(uuid7())
    fresh = uuid7()
    assert [(key.version, key.variant) for key in keys] == [(7, uuid.RFC_4122)] * 5
    assert keys == sorted(keys)
    assert [key.hex for key in keys] == sorted(key.hex for key in keys)  # as text, too
    assert before <= fresh.int >> 80 <= time.time_ns() // 1_000_000
    assert len({uuid7() for _ in range(1000)}) == 1000


def test_every_row_of_a_turn_has_a_key_of_version_7(store: Store) -> None:
    a_chat(store, Call("echo", text="x"), "Done.", tools=[echo]).ask("Go")
    for record in ("chat", "message", "tool_call", "request"):
        keys = [key for (key,) in rows(store, record, "id")]
        assert keys
        assert {(type(key), key.version) for key in keys} == {(uuid.UUID, 7)}


# Times


@pytest.fixture
def tokyo_store(database_url: str) -> Any:
    """A store whose PostgreSQL session thinks that it is in Tokyo."""
    with connect(database_url + "%20-ctimezone%3DAsia/Tokyo" * database_url.startswith("postgresql")) as store:
        store.create_tables()
        yield store


def test_times_come_back_as_aware_utc_whatever_the_time_zone_of_the_session(tokyo_store: Store) -> None:
    moment = datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=UTC)
    with freeze_time(moment):
        chat = a_chat(tokyo_store, Call("echo", text="x"), "Done.", tools=[echo])
        chat.ask("Go")
    loaded = load_chat(tokyo_store, chat.id)
    assert loaded is not None
    times = [loaded.record.created_at, loaded.record.updated_at, chat.tool_calls()[0].finished_at]
    times += [message.created_at for message in chat.messages()] + [request.created_at for request in chat.requests()]
    assert times == [moment] * 7
    assert {found.utcoffset() for found in times if found is not None} == {timedelta(0)}


def test_a_time_is_stored_as_the_moment_that_it_is(tokyo_store: Store) -> None:
    chat = a_chat(tokyo_store)
    moment = datetime(2026, 1, 1, 9, tzinfo=TOKYO)
    request = add(tokyo_store, "request", chat=chat.id, created_at=moment)
    record = tokyo_store.records.request
    with tokyo_store.connection():
        assert record.get_by_id(request.id).created_at == datetime(2026, 1, 1, tzinfo=UTC)
        assert record.select().where(record.created_at == moment).count() == 1
        assert record.select().where(record.created_at < datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC)).count() == 1
        assert record.select().where(record.created_at >= "2026-01-01T08:00:00+08:00").count() == 1
        assert record.select().where(record.created_at > "2026-01-01T00:00:00Z").count() == 0


@pytest.mark.parametrize("naive", [datetime(2026, 1, 1), "2026-01-01", datetime(2026, 1, 1).date()])  # noqa: DTZ001
def test_a_time_without_a_time_zone_is_refused(store: Store, naive: Any) -> None:
    chat = a_chat(store)
    with pytest.raises(ValueError, match=r"created_at needs a time with a time zone, not .*2026"):
        add(store, "request", chat=chat.id, created_at=naive)
    assert rows(store, "request", "id") == []


def test_frozen_time_moves_every_time_of_a_turn(store: Store) -> None:
    with freeze_time("2030-05-06 07:08:09") as frozen:
        chat = a_chat(store, "Hello!", ProviderError(400), "Bye.")
        frozen.tick(60)
        chat.ask("Hi")
    made, asked = datetime(2030, 5, 6, 7, 8, 9, tzinfo=UTC), datetime(2030, 5, 6, 7, 9, 9, tzinfo=UTC)
    assert rows(store, "chat", "created_at", "updated_at") == [(made, asked)]
    assert rows(store, "message", "created_at", "updated_at") == [(asked, asked)] * 2
    assert rows(store, "request", "created_at") == [(asked,)]


# Money


COSTS = "0 0.000000000001 0.1 0.3 0.000123456789 0.0000001 1 10 100 123.45 1200 999.999999999999".split()


def test_money_is_exact_to_twelve_places(store: Store) -> None:
    record = store.records.request
    for cost in COSTS:
        chat = a_chat(store)
        add(store, "request", chat=chat.id, cost=Decimal(cost))
        [found] = [request.cost for request in chat.requests()]
        assert type(found) is Decimal
        assert found == Decimal(cost)
        assert f"{found:f}" == cost
        assert chat.stats().cost == Decimal(cost)
        with store.connection():
            assert record.select().where(record.cost == Decimal(cost), record.chat == chat.id).count() == 1


def test_everyday_money_prints_without_an_exponent(store: Store) -> None:
    for cost in ("0", "0.25", "10", "1200"):
        chat = a_chat(store)
        add(store, "request", chat=chat.id, cost=Decimal(cost))
        assert str(chat.requests()[0].cost) == str(chat.stats().cost) == cost


def test_money_finer_than_twelve_places_is_rounded(store: Store) -> None:
    chat = a_chat(store)
    add(store, "request", chat=chat.id, cost=Decimal("0.12345678901251"))
    add(store, "request", chat=chat.id, cost=Decimal("1E-13"))
    assert sorted(request.cost or 0 for request in chat.requests()) == [Decimal(0), Decimal("0.123456789013")]


def test_an_unknown_cost_is_null_and_not_zero(store: Store) -> None:
    chat = a_chat(store, "Hello!")
    chat.ask("Hi")
    assert rows(store, "request", "cost") == [(None,)]
    with store.connection():
        table = store.records.request
        assert table.select().where(table.cost.is_null()).count() == 1


# JSON and bytes


METADATA: list[Any] = [
    {"customer": "c_1", "tags": ["a", {"b": None}], "n": 1.5, "yes": True},
    {"text": 'Grüße, 東京 🗼 "quoted" \\ back\\u0000slash \n'},
    {},
    [],
    "text",
    0,
    False,
    "",
    10**20,
]


def test_metadata_comes_back_as_it_was_given(store: Store) -> None:
    for metadata in METADATA:
        loaded = load_chat(store, a_chat(store, metadata=metadata).id)
        assert loaded is not None
        assert loaded.metadata == metadata
        assert type(loaded.metadata) is type(metadata)


def test_metadata_reads_the_same_before_and_after_loading(store: Store) -> None:
    chat = a_chat(store, metadata={1: ("a", "b")})
    loaded = load_chat(store, chat.id)
    assert loaded is not None
    assert chat.metadata == loaded.metadata == {"1": ["a", "b"]}


def test_no_metadata_is_null(store: Store) -> None:
    a_chat(store)
    with store.connection():
        table = store.records.chat
        assert table.select().where(table.metadata.is_null()).count() == 1


def test_bytes_of_an_attachment_come_back_as_they_were(store: Store) -> None:
    chat = a_chat(store, "Hello!")
    message = chat.ask("Hi")
    content = bytes(range(256))
    add(store, "attachment", message=message.id, content=content, size=2**40)
    with store.connection():
        [found] = store.records.attachment.select()
    assert bytes(found.content) == content
    assert found.size == 2**40


def test_related_rows_can_be_reached_by_name(store: Store) -> None:
    chat = a_full_chat(store)
    with store.connection():
        assert [message.role for message in chat.record.messages.order_by(store.records.message.position)] == [
            "user",
            "assistant",
        ]
        assert chat.record.tool_calls.count() == 1
        assert chat.record.requests.count() == 2
        assert chat.record.agent_sessions.count() == 1

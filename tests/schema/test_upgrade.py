"""From the tables of the first version, with rows in them, to what the records say."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click.testing
import peewee as pw
import pytest

from llm_orm import LlmMessage, LlmToolCall, Store, connect, load_chat, search
from llm_orm.records import Record, uuid7
from llm_orm.testing import ScriptedLLM
from llm_orm_cli import main
from llm_orm_schema.catalog import Table, read_tables
from llm_orm_schema.compare import differences
from llm_orm_schema.ddl import table_names_of
from llm_orm_schema.migrate import MIGRATIONS, applied, migrate, pending

FIRST, *_ = ALL = sorted({path.name.partition(".")[0] for path in MIGRATIONS.iterdir()})

ADDED = {"message": ["parked_at", "cancelled_at", "owner"], "tool_call": ["approval"]}
"""The columns that the migrations after the first bring."""


VIEWS = ["usage_daily", "usage_hourly", "request_detail", "tool_usage_daily", "chat_cost"]

OF_THE_SEARCH = [
    "search table llm_search",
    "search table llm_search_row",
    *(
        f"trigger {table}_search_{verb} on {table}"
        for table in ("llm_message", "llm_tool_call")
        for verb in ("insert", "update", "delete")
    ),
]
"""What SQLite has besides the tables."""


class Message(LlmMessage):
    stars = pw.IntegerField(constraints=[pw.SQL("DEFAULT 5")])

    class Meta:
        table_name = "llm_message"


class MessageOfTheFirst(Message):
    parked_at = cancelled_at = owner = None

    class Meta:
        table_name = "llm_message"


class ToolCallOfTheFirst(LlmToolCall):
    approval = None

    checks = tuple(check for check in LlmToolCall.checks if check[0] != "approval")

    class Meta:
        table_name = "llm_tool_call"


def opened(url: str, models: tuple[type[Record], ...] = (Message,), **options: Any) -> Store:
    """A store with columns of the application on the chat and the message."""
    return connect(url, chat_fields={"user_id": pw.TextField(null=True, index=True)}, models=list(models), **options)


def opened_by_the_first_version(url: str) -> Store:
    return opened(url, (MessageOfTheFirst, ToolCallOfTheFirst))


def migrate_to_the_first(older: Store, folder: Path) -> None:
    (folder / f"{FIRST}.sql").write_text((MIGRATIONS / f"{FIRST}.sql").read_text())
    assert migrate(older, folder) == [FIRST, "index llm_chat_user_id"]


def create(older: Store, folder: Path) -> None:
    """As its `create_tables` did, which recorded nothing."""
    migrate_to_the_first(older, folder)
    with older.connection():
        older.database.execute_sql("DROP TABLE llm_chat_migration")


@pytest.fixture(params=[create, migrate_to_the_first], ids=["created", "migrated"])
def older(request: pytest.FixtureRequest, database_url: str, tmp_path: Path) -> Iterator[Store]:
    """A store of the first version, a row in each of its tables; they have a history only where it migrated."""
    make: Callable[[Store, Path], None] = request.param
    with opened_by_the_first_version(database_url) as store:
        make(store, tmp_path)
        add_rows(store)
        yield store


def add_rows(store: Store) -> None:
    records, turn_id = store.records, uuid7()
    with store.connection():
        chat = records.chat.create(model="test", user_id="u_1", metadata={"plan": "free"})
        records.message.create(id=turn_id, chat=chat, position=0, role="user", content="Hi", stars=4)
        reply = records.message.create(chat=chat, position=1, role="assistant", content="Hello!", stars=3)
        of_the_turn = {"chat": chat, "message": reply, "turn_id": turn_id}
        records.tool_call.create(
            **of_the_turn, round=0, position=0, tool_call_id="c_1", name="echo", arguments="{}", status="completed"
        )
        records.request.create(
            **of_the_turn, provider="p", model="test", status_code=200, duration_ms=1, cost="0.000000000001"
        )
        records.agent_session.create(chat=chat, agent_class="Greeter", metadata={"name": "Ann"})
        records.attachment.create(
            message=turn_id, position=0, media_type="image/png", size=2, sha256="ab", content=b"\x00\xff"
        )


def rows_of(store: Store) -> dict[str, list[dict[str, Any]]]:
    with store.connection():
        return {record._meta.table_name: list(record.select().order_by(record.id).dicts()) for record in store.records}


def tables_of(store: Store) -> dict[str, Table]:
    with store.connection():
        return read_tables(store.database, table_names_of(store.records).values())


def test_older_tables_become_what_the_records_say(older: Store, database_url: str):
    missing = [name for name in ALL if name not in applied(older)]
    with opened(database_url) as store:
        assert pending(store) == missing
        assert migrate(store) == missing

        assert list(applied(store)) == ALL
        assert pending(store) == []
        assert differences(store) == []
        migrated = tables_of(store)
        store.drop_tables()
        store.create_tables()
        assert tables_of(store) == migrated


def test_the_rows_of_older_tables_are_kept(older: Store, database_url: str):
    before = rows_of(older)
    assert [len(rows) for rows in before.values()] == [1, 2, 1, 1, 1, 1]

    with opened(database_url) as store:
        migrate(store)

        assert rows_of(older) == before
        after = rows_of(store)
        for name, columns in ADDED.items():
            for row in after[f"llm_{name}"]:
                assert {column: row[column] for column in columns} == dict.fromkeys(columns)


def test_a_chat_of_the_older_version_goes_on(older: Store, database_url: str):
    ((row,), *_) = rows_of(older).values()
    with opened(database_url, llm=ScriptedLLM("Still here.")) as store:
        migrate(store)
        chat = load_chat(store, row["id"], user_id="u_1")

        assert chat is not None
        assert chat.ask("Are you there?").content == "Still here."
        assert [message.content for message in chat.messages()] == ["Hi", "Hello!", "Are you there?", "Still here."]


def test_what_was_said_before_is_found(older: Store, database_url: str):
    with older.connection():
        older.records.tool_call.update(result="an apple").execute()
    with opened(database_url, llm=ScriptedLLM("No apple.")) as store:
        migrate(store)

        assert [found.snippet for found in search(store, "hello")] == ["Hello!"]
        assert [found.name for found in search(store, "apple")] == ["echo"]
        (row,) = search(store, "hi")
        chat = load_chat(store, row.chat_id)
        assert chat is not None
        chat.ask("Hi again")
        assert len(search(store, "hi")) == len(search(store, "apple")) == 2
        chat.delete()
        assert search(store, "hi") + search(store, "apple") == []


def test_the_command_names_what_older_tables_lack_and_adds_it(older: Store, database_url: str):
    def run(command: str) -> click.testing.Result:
        return click.testing.CliRunner().invoke(main, [command, "--database-url", database_url], prog_name="llm-orm")

    missing = [name for name in ALL if name not in applied(older)]
    before = run("sync")
    done = run("migrate")
    after = run("sync")

    assert before.exit_code == 1
    lacks = [line.partition(" is missing")[0].partition(" (")[0] for line in before.stdout.splitlines()]
    is_sqlite = older.is_sqlite
    assert [line for line in lacks if line.startswith("index")] == [
        "index llm_chat_updated_at on llm_chat",
        *([] if is_sqlite else ["index llm_message_search on llm_message"]),
        *([] if is_sqlite else ["index llm_tool_call_search on llm_tool_call"]),
        "index llm_request_turn_id on llm_request",
    ]
    assert [line for line in lacks if line.startswith(("view", "search", "trigger"))] == [
        *(f"view llm_{name}" for name in VIEWS),
        *(OF_THE_SEARCH if is_sqlite else []),
    ]
    assert [line for line in lacks if line.startswith(("column", "check"))] == [
        "column llm_message.parked_at",
        "column llm_message.cancelled_at",
        "column llm_message.owner",
        "column llm_tool_call.approval",
        "check llm_tool_call_approval_check on llm_tool_call",
    ]
    assert done.stdout.splitlines() == [f"applied {name}" for name in missing]
    assert (after.exit_code, done.stderr) == (0, "")
    assert after.stdout.endswith("is in sync with the records\n")


def test_older_tables_that_were_given_views_and_search_can_be_migrated(older: Store, database_url: str):
    """As by `create_tables` of today, when the application starts before it migrates."""
    with opened(database_url) as store:
        store.create_tables()
        migrate(store)

        assert differences(store) == []
        assert [found.snippet for found in search(store, "hello")] == ["Hello!"]


@pytest.fixture(params=["created", "migrated", "upgraded"])
def current(request: pytest.FixtureRequest, database_url: str) -> Iterator[Store]:
    """A store with today's tables, made in each of the ways there are, and a row in each."""
    if request.param == "upgraded":
        with opened_by_the_first_version(database_url) as older:
            older.create_tables()
    with opened(database_url) as store:
        if request.param == "created":
            store.create_tables()
        else:
            migrate(store)
        add_rows(store)
        yield store


def test_an_approval_is_one_of_four_and_no_other(current: Store):
    call = current.records.tool_call
    with current.connection():
        for approval in ("required", "approved", "denied", None):
            call.update(approval=approval).execute()
            assert [row.approval for row in call.select()] == [approval]
        for approval in ("", "pending", "APPROVED"):
            with pytest.raises(pw.IntegrityError, match="llm_tool_call_approval_check"):
                call.update(approval=approval).execute()
            assert [row.approval for row in call.select()] == [None]

"""The way from an empty database, or an older one, to the tables that the records say."""

import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import peewee as pw
import psycopg2
import pytest

from llm_orm import InsideTransaction, LlmChat, LlmRequest, Store, TablesMissing, connect, create_chat
from llm_orm.testing import ScriptedLLM
from llm_orm_schema.catalog import Table, read_tables
from llm_orm_schema.compare import differences
from llm_orm_schema.ddl import table_names_of
from llm_orm_schema.migrate import MIGRATIONS, MigrationFailed, applied, migrate, pending, sql

ALL = sorted({path.name.partition(".")[0] for path in MIGRATIONS.iterdir()})

USER_ID = {"user_id": pw.TextField(null=True, index=True)}


@pytest.fixture
def empty(database_url: str) -> Iterator[Store]:
    """A store in a database without tables."""
    with connect(database_url, llm=ScriptedLLM("Hello!")) as store:
        yield store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Our migrations, for a test to add to."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    for path in MIGRATIONS.iterdir():
        (folder / path.name).write_text(path.read_text())
    return folder


def tables_of(store: Store) -> dict[str, Table]:
    with store.connection():
        return read_tables(store.database, table_names_of(store.records).values())


def run(store: Store, statement: str, *params: Any) -> list[Any]:
    with store.connection():
        cursor = store.database.execute_sql(statement, params)
        return cursor.fetchall() if cursor.description else []


class Customer(pw.Model):
    class Meta:
        table_name = "customer"


class Request(LlmRequest):
    team = pw.TextField(null=True, unique=True)

    indexes = (*LlmRequest.indexes, ("team", "model"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"table_prefix": "app_", "table_names": {"chat": "assistant_chat"}},
        {"chat_fields": {**USER_ID, "customer": pw.ForeignKeyField(Customer, on_delete="CASCADE")}},
        {"chat_fields": {"plan": pw.CharField(20, constraints=[pw.SQL("DEFAULT 'free'"), pw.Check("plan <> ''")])}},
        {"models": [Request]},
    ],
    ids=["plain", "renamed", "with_a_reference", "with_a_default_and_a_check", "with_models"],
)
def test_the_migrations_make_what_create_tables_makes(database_url: str, options: dict[str, Any]):
    with connect(database_url, **options) as store:
        run(store, "CREATE TABLE customer (id INTEGER NOT NULL PRIMARY KEY)")
        store.create_tables()
        created = tables_of(store)
        store.drop_tables()

        migrate(store)

        assert tables_of(store) == created
        assert len(created) == 6
        assert differences(store) == []
        assert pending(store) == []


def test_a_chat_works_on_migrated_tables(empty: Store):
    assert migrate(empty) == ALL

    assert create_chat(empty, model="test").ask("Hi").content == "Hello!"


def test_without_tables_the_error_says_what_to_run(empty: Store):
    with pytest.raises(TablesMissing, match='run "llm-orm migrate"'):
        create_chat(empty, model="test")


def test_migrating_twice_is_a_no_op(empty: Store):
    migrate(empty)

    assert migrate(empty) == []
    assert pending(empty) == []
    assert sql(empty) == ""


@pytest.fixture
def far_from_greenwich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("far_from_greenwich")
def test_it_is_known_what_was_applied_and_when(empty: Store):
    assert applied(empty) == {}
    assert pending(empty) == ALL
    assert tables_of(empty) == {}

    migrate(empty)

    assert list(applied(empty)) == ALL
    assert all(abs(datetime.now(UTC) - when) < timedelta(minutes=5) for when in applied(empty).values())


def test_tables_that_create_tables_made_are_recognised(store: Store):
    chat = create_chat(store, model="test", user_id="u_1", llm=ScriptedLLM("Hello!"))
    chat.ask("Hi")

    assert migrate(store) == ALL
    assert list(applied(store)) == ALL
    assert len(chat.messages()) == 2


def test_tables_of_an_older_version_are_recognised_and_brought_up_to_date(empty: Store, folder: Path):
    empty.create_tables()
    (folder / "8001_stars.sql").write_text('ALTER TABLE "{message}" ADD COLUMN "stars" {bigint};\n')
    (folder / "8002_moons.sql").write_text('ALTER TABLE "{message}" ADD COLUMN "moons" {json};\n')
    is_sqlite = isinstance(empty.database, pw.SqliteDatabase)
    run(empty, f"ALTER TABLE llm_message ADD COLUMN stars {'INTEGER' if is_sqlite else 'BIGINT'}")

    assert migrate(empty, folder) == [*ALL, "8001_stars", "8002_moons"]
    assert {"stars", "moons"} <= set(tables_of(empty)["llm_message"].columns)


def test_tables_without_a_column_of_the_application_are_recognised_and_given_it(database_url: str):
    with connect(database_url) as before:
        before.create_tables()
    with connect(database_url, chat_fields=USER_ID) as store:
        assert migrate(store) == [*ALL, "column llm_chat.user_id", "index llm_chat_user_id"]


@pytest.mark.parametrize("harm", ["DROP TABLE llm_attachment", "DROP INDEX llm_message_one_pending"])
def test_tables_that_are_incomplete_are_refused_by_name(empty: Store, harm: str):
    empty.create_tables()
    run(empty, harm)

    with pytest.raises(MigrationFailed, match=rf"{harm.split()[-1]}.* is missing"):
        migrate(empty)

    assert applied(empty) == {}


def test_a_table_of_the_same_name_that_is_not_ours_is_refused(empty: Store):
    run(empty, "CREATE TABLE llm_chat (number INTEGER)")

    with pytest.raises(MigrationFailed, match=r"column llm_chat\.id .* is missing.*table llm_message is missing"):
        migrate(empty)

    assert list(tables_of(empty)["llm_chat"].columns) == ["number"]


def test_two_stores_in_one_database_have_a_history_each(empty: Store):
    with connect(empty.database, table_prefix="app_") as other:
        migrate(other)

        assert pending(empty) == ALL
        assert migrate(empty) == ALL
        assert differences(other) == differences(empty) == []


def test_tables_that_were_dropped_are_made_again(empty: Store):
    migrate(empty)
    empty.drop_tables()

    assert applied(empty) == {}
    assert migrate(empty) == ALL
    assert differences(empty) == []


def test_a_column_that_the_application_added_since_is_added(database_url: str):
    with connect(database_url) as before:
        migrate(before)
        create_chat(before, model="test")
    columns = {
        **USER_ID,
        "plan": pw.TextField(default="it's free"),
        "is_paid": pw.BooleanField(default=True),
        "level": pw.IntegerField(constraints=[pw.SQL("DEFAULT 7")]),
        "customer": pw.ForeignKeyField(Customer, null=True, on_delete="CASCADE"),
    }
    with connect(database_url, chat_fields=columns) as store:
        run(store, "CREATE TABLE customer (id INTEGER NOT NULL PRIMARY KEY)")
        names = ["user_id", "plan", "is_paid", "level", "customer_id"]
        steps = [f"column llm_chat.{name}" for name in names]
        steps += ["index llm_chat_user_id", "index llm_chat_customer_id"]

        assert pending(store) == steps
        assert migrate(store) == steps

        assert differences(store) == []
        assert run(store, f"SELECT {', '.join(names)} FROM llm_chat") == [(None, "it's free", True, 7, None)]


@pytest.mark.parametrize("default", [None, datetime.now], ids=["none", "computed"])
def test_a_column_that_no_row_has_a_value_for_is_refused(database_url: str, default: Any):
    with connect(database_url) as before:
        migrate(before)
    with connect(database_url, chat_fields={"tenant": pw.DateTimeField(default=default)}) as store:
        with pytest.raises(MigrationFailed, match=r"'tenant' cannot be added to llm_chat: it is NOT NULL.*null=True"):
            migrate(store)

        assert "tenant" not in tables_of(store)["llm_chat"].columns


def test_an_index_of_the_application_is_not_made_twice(database_url: str):
    class Chat(LlmChat):
        class Meta:
            table_name = "llm_chat"

        indexes = (*LlmChat.indexes, ("model", "provider"))

    with connect(database_url) as before:
        migrate(before)
        run(before, "CREATE INDEX by_model ON llm_chat (model, provider)")
    with connect(database_url, models=[Chat]) as store:
        assert migrate(store) == []


def test_a_migration_that_fails_leaves_nothing_and_can_be_run_again(empty: Store, folder: Path):
    good = 'ALTER TABLE "{chat}" ADD COLUMN "stars" INTEGER;\n\n'
    (folder / "8001_good.sql").write_text(good.replace("stars", "moons"))
    (folder / "8002_bad.sql").write_text(good + 'ALTER TABLE "{chat}" ADD COLUMN "stars" INTEGER;\n')

    with pytest.raises(MigrationFailed, match=r"8002_bad failed, and nothing of it was applied: .*stars"):
        migrate(empty, folder)

    assert list(applied(empty)) == [*ALL, "8001_good"]
    assert "moons" in tables_of(empty)["llm_chat"].columns
    assert "stars" not in tables_of(empty)["llm_chat"].columns

    (folder / "8002_bad.sql").write_text(good)
    assert migrate(empty, folder) == ["8002_bad"]


def test_a_migration_can_say_something_else_to_each_dialect(empty: Store, folder: Path):
    for dialect in ("sqlite", "postgresql"):
        (folder / f"8001_own.{dialect}.sql").write_text(
            f"CREATE TABLE \"{{chat}}_{dialect}\" (name TEXT CHECK (name LIKE 'a%'));\n"
        )

    assert migrate(empty, folder) == [*ALL, "8001_own"]

    dialect = "sqlite" if isinstance(empty.database, pw.SqliteDatabase) else "postgresql"
    with empty.connection():
        assert list(read_tables(empty.database, ["llm_chat_sqlite", "llm_chat_postgresql"])) == [f"llm_chat_{dialect}"]


def test_a_table_of_sqlite_can_be_made_anew_without_losing_what_refers_to_it(sqlite_url: str, folder: Path):
    with connect(sqlite_url, llm=ScriptedLLM("Hello!")) as store:
        migrate(store, folder)
        chat = create_chat(store, model="test")
        chat.ask("Hi")
        (folder / "8001_anew.sql").write_text(
            'CREATE TABLE "{chat}_new" AS SELECT * FROM "{chat}";\n\n'
            'DROP TABLE "{chat}";\n\n'
            'ALTER TABLE "{chat}_new" RENAME TO "{chat}";\n'
        )

        migrate(store, folder)

        assert len(chat.messages()) == 2
        assert run(store, "PRAGMA foreign_keys") == [(1,)]


def test_the_sql_of_what_is_pending_can_be_run_by_hand(database_url: str):
    with connect(database_url, chat_fields=USER_ID) as store:
        script = sql(store)
        assert tables_of(store) == {}
        if database_url.startswith("sqlite"):
            connection: Any = sqlite3.connect(store.database.database)
            connection.executescript(script)
        else:
            connection = psycopg2.connect(database_url)
            connection.autocommit = True
            connection.cursor().execute(script)
        connection.close()

        assert list(applied(store)) == ALL
        assert pending(store) == []
        assert differences(store) == []


def test_migrating_inside_a_transaction_is_refused(empty: Store):
    with empty.connection(), empty.database.atomic():
        with pytest.raises(InsideTransaction, match="migrate"):
            migrate(empty)


class BusyAtFirst(pw.SqliteDatabase):
    """A new file that another process is switching to WAL."""

    refusals = 2

    def _connect(self) -> sqlite3.Connection:
        if self.refusals:
            self.refusals -= 1
            raise pw.OperationalError("database is locked")
        return super()._connect()


def test_a_file_that_another_process_makes_ready_is_waited_for(tmp_path: Path):
    with connect(BusyAtFirst(tmp_path / "new.db")) as store:
        assert migrate(store) == ALL


def test_of_many_at_once_one_migrates(database_url: str):
    begin = threading.Barrier(6)
    done: list[list[str]] = []

    def one() -> None:
        with connect(database_url, chat_fields=USER_ID) as store:
            begin.wait()
            done.append(migrate(store))

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(name for names in done for name in names) == [*ALL, "index llm_chat_user_id"]
    assert len(done) == 6

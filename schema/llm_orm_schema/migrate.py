"""Brings the tables of a database up to date, one numbered migration of migrations/ after the other.

A migration is SQL as it was on the day it was written: it never changes afterwards, whatever the records say. Its
statements are separated by blank lines; {chat}, {message}, … are the names of the tables, {chat_columns}, … the
application's own columns of a table that it creates, {stem} what the names of views begin with, and TYPES has the words
that each dialect spells in its own way. Literal braces are doubled. Where one text cannot do for both:
0002_name.sqlite.sql and 0002_name.postgresql.sql.

A view that changes is dropped and created anew. On SQLite, what makes a table anew creates its triggers again, too, and
drops the views of it before it renames.

What has been applied stands in a table beside the others, called after the chat's: llm_chat_migration.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peewee as pw

from llm_orm.database import described
from llm_orm.errors import InsideTransaction, WrongSetup
from llm_orm.records import Record
from llm_orm.store import Store
from llm_orm.views import stem_of

from .catalog import Table, imagined, read_tables, run
from .compare import compare, compare_shapes, expected_shape
from .ddl import application_columns, application_indexes, column, dialect_of, literal, made_of, table_names_of

MIGRATIONS = Path(__file__).parent / "migrations"

TYPES = {
    "sqlite": {
        "uuid": "TEXT",
        "json": "TEXT",
        "boolean": "INTEGER",
        "bigint": "INTEGER",
        "decimal": "DECIMAL",
        "blob": "BLOB",
    },
    "postgresql": {
        "uuid": "UUID",
        "json": "JSONB",
        "boolean": "BOOLEAN",
        "bigint": "BIGINT",
        "decimal": "NUMERIC",
        "blob": "BYTEA",
    },
}


class MigrationFailed(WrongSetup):
    """A migration could not be applied, and nothing of it was"""


@dataclass(frozen=True)
class Step:
    """One transaction on the way.

    names       of the migration; or of several, where the tables are there and this is only recorded; or
                "column llm_chat.user_id", "index llm_chat_user_id" for what the application added
    statements  with those that record the migrations
    """

    names: tuple[str, ...]
    statements: tuple[str, ...]


def migrate(store: Store, folder: Path = MIGRATIONS) -> list[str]:
    """Apply what is pending, each step in a transaction of its own; the names of what was applied.

    Several processes may call it at once: one applies a step, the others wait and find it done. Tables that
    `store.create_tables()` made, or the SQL of `llm-orm init`, are recognised, and go on from there.
    Raises `MigrationFailed`.
    """
    if store.database.in_transaction():
        raise InsideTransaction("migrate() was called inside a transaction of yours: each migration is one of its own")
    done: list[str] = []
    with store.connection():
        while True:
            with _alone(store):
                step = next(iter(_steps(store, folder)), None)
                if step is None:
                    return done
                _run(store, step)
            done += step.names


def pending(store: Store, folder: Path = MIGRATIONS) -> list[str]:
    """The names of what migrate() would apply, in order."""
    with store.connection():
        return [name for step in _steps(store, folder) for name in step.names]


def applied(store: Store) -> dict[str, datetime]:
    """When each migration was applied, by name, in order."""
    history = _history_table(store)
    with store.connection():
        found = read_tables(store.database, [history, *table_names_of(store.records).values()])
        if set(found) <= {history} or history not in found:
            return {}  # what is recorded of tables that were dropped is void
        rows = store.database.execute_sql(f'SELECT name, applied_at FROM "{history}" ORDER BY name').fetchall()
        return {name: _aware(time) for name, time in rows}


def sql(store: Store, folder: Path = MIGRATIONS) -> str:
    """What migrate() would run, as a script for the database's own shell; empty where nothing is pending."""
    with store.connection():
        return "\n".join(_script(step) for step in _steps(store, folder))


def _script(step: Step) -> str:
    head = f"-- {', '.join(step.names)}\nBEGIN;"
    return "\n\n".join([head, *(f"{text};" for text in step.statements), "COMMIT;\n"])


def _steps(store: Store, folder: Path) -> list[Step]:
    existing = read_tables(store.database, table_names_of(store.records).values())
    done = applied(store)
    names = [name for name in _names(folder) if name not in done]
    known = _recognised(store, folder) if existing and not done else 0
    steps = [Step(tuple(names[:known]), _recorded(store, *names[:known]))] if known else []
    steps += [Step((name,), (*_texts(store, folder, name), *_recorded(store, name))) for name in names[known:]]
    if not existing and steps:
        begin = (_create_history(store), f'DELETE FROM "{_history_table(store)}"')
        steps[0] = Step(steps[0].names, (*begin, *steps[0].statements))
    return steps + list(_application_steps(store, existing))


def _names(folder: Path) -> list[str]:
    return sorted({path.name.partition(".")[0] for path in folder.glob("*.sql")})


def _texts(store: Store, folder: Path, name: str, *, with_application: bool = True) -> list[str]:
    """The statements of a migration, for the store's dialect and tables."""
    dialect = dialect_of(store.database)
    own = folder / f"{name}.{dialect}.sql"
    text = (own if own.exists() else folder / f"{name}.sql").read_text(encoding="utf-8")
    tables = table_names_of(store.records)
    columns = {}
    for table in tables:
        record = getattr(store.records, table)
        fields = application_columns(record) if with_application else []
        columns[f"{table}_columns"] = "".join(f",\n    {column(record, field)}" for field in fields)
    filled = text.format(**tables, **columns, stem=stem_of(tables), **TYPES[dialect])
    return [statement.strip().removesuffix(";") for statement in filled.split("\n\n") if statement.strip()]


# The history


def _history_table(store: Store) -> str:
    return f"{table_names_of(store.records)['chat']}_migration"


def _create_history(store: Store) -> str:
    return (
        f'CREATE TABLE IF NOT EXISTS "{_history_table(store)}" '
        "(name TEXT NOT NULL PRIMARY KEY, applied_at TIMESTAMPTZ NOT NULL DEFAULT CURRENT_TIMESTAMP)"
    )


def _recorded(store: Store, *names: str) -> tuple[str, ...]:
    insert = f'INSERT INTO "{_history_table(store)}" (name) VALUES '
    return _create_history(store), insert + ", ".join(f"('{name}')" for name in names)


def _aware(time: Any) -> datetime:
    time = datetime.fromisoformat(time) if isinstance(time, str) else time
    return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)


def _recognised(store: Store, folder: Path) -> int:
    """How many migrations the tables are the result of, where none was recorded."""
    names, made = _names(folder), [each.name for each in made_of(store.records)]
    missing = []
    for count in range(len(names), 0, -1):
        texts = [text for name in names[:count] for text in _texts(store, folder, name, with_application=False)]
        shape = imagined(store.database, texts, table_names_of(store.records).values(), made)
        missing = compare_shapes(store, shape)
        if not missing:
            return count
    raise MigrationFailed(
        f"{described(store.database)} has tables of these names that no migration made, and that are not what "
        f"{names[0]} makes: {'; '.join(map(str, missing))}. Complete them, drop them, or choose other names for ours"
    )


# The application's own columns


def _application_steps(store: Store, existing: dict[str, Table]) -> Iterator[Step]:
    """What the application's columns and indexes need: those of a table that does not exist yet come with it."""
    indexes = application_indexes(store.records)
    if not indexes and not any(application_columns(record) for record in store.records):
        return
    missing = {(entry.kind, entry.table, entry.name) for entry in compare(expected_shape(store)[0], existing)}
    for record in store.records:
        table = record._meta.table_name  # type: ignore[attr-defined]
        for field in application_columns(record):
            if ("missing column", table, field.column_name) in missing:
                text = f'ALTER TABLE "{table}" ADD COLUMN {_addable(record, field)}'
                yield Step((f"column {table}.{field.column_name}",), (text,))
    for table, name, text in indexes:
        if table not in existing or ("missing index", table, name) in missing:
            yield Step((f"index {name}",), (text,))


def _addable(record: type[Record], field: pw.Field) -> str:
    """The definition of a column that rows can be given which exist already."""
    definition = column(record, field)
    if field.null or " DEFAULT " in definition.upper():
        return definition
    if field.default is None or callable(field.default):
        raise MigrationFailed(
            f"column {field.column_name!r} cannot be added to {record._meta.table_name}: it is NOT NULL, and rows that "  # type: ignore[attr-defined]
            "exist would have no value. Declare it with null=True, or with a default= that is a plain value"
        )
    return f"{definition} DEFAULT {literal(record, field, field.default)}"


# Running a step


def _run(store: Store, step: Step) -> None:
    try:
        run(store.database, step.statements)
    except pw.PeeweeException as error:
        reason = " ".join(str(error).split())
        raise MigrationFailed(f"{step.names[0]} failed, and nothing of it was applied: {reason}") from error


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    """A transaction that no other process can migrate these tables in."""
    database = store.database
    if not isinstance(database, pw.SqliteDatabase):
        with database.atomic():
            lock = "SELECT pg_advisory_xact_lock(hashtext('llm_orm_schema'), hashtext(%s))"
            database.execute_sql(lock, (_history_table(store),))
            yield
        return
    # To change a table, SQLite may need it made anew; with foreign keys on, dropping the old one empties its children.
    enforced = database.execute_sql("PRAGMA foreign_keys").fetchone()[0]
    database.execute_sql("PRAGMA foreign_keys = 0")
    try:
        with database.atomic("IMMEDIATE"):
            yield
    finally:
        database.execute_sql(f"PRAGMA foreign_keys = {enforced}")

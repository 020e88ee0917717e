"""What `sync` says of a database that is not as the records say."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import peewee as pw
import pytest

from llm_orm import Store, WrongSetup, connect
from llm_orm_schema.catalog import read_tables
from llm_orm_schema.compare import Difference, compare, differences, expected_shape
from llm_orm_schema.ddl import statements, table_names_of

Line = Callable[[str], str | None]


@contextmanager
def harmed(store: Store, *harm: str) -> Iterator[None]:
    """The tables after some SQL, until the block ends."""
    with store.connection(), store.database.atomic() as transaction:
        for statement in harm:
            store.database.execute_sql(statement)
        yield
        transaction.rollback()


def rewritten(store: Store, table: str, line: Line) -> list[str]:
    """SQL that makes an empty table anew, each line of its definition replaced by another or, for None, left out."""
    cascade = "" if isinstance(store.database, pw.SqliteDatabase) else " CASCADE"
    (create,) = [text for text in statements(store.records) if text.startswith(f'CREATE TABLE "{table}" (')]
    head, *lines, _ = create.split("\n")
    kept = [new for old in lines if (new := line(old.strip().rstrip(","))) is not None]
    indexes = [text for text in statements(store.records) if "INDEX" in text and f'ON "{table}" ' in text]
    made = f"{head} {', '.join(kept)})"
    return [f'DROP TABLE "{table}"{cascade}', made, *(text for text in indexes if all_columns_in(text, made))]


SEARCHED = {"llm_message": ["content", "status"], "llm_tool_call": ["result"]}


def all_columns_in(index: str, table: str) -> bool:
    if "USING GIN" in index:
        return all(f'"{column}" TEXT' in table for column in SEARCHED[index.partition('"')[2].partition("_search")[0]])
    columns = index.partition(" (")[2].partition(")")[0].split(", ")
    if "WHERE status" in index:
        columns.append('"status"')
    return all(f" {column} " in table for column in columns)


def without(start: str) -> Line:
    return lambda line: None if line.startswith(start) else line


def without_column(name: str) -> Line:
    marks = (f'"{name}" ', f'FOREIGN KEY ("{name}")')
    return lambda line: None if line.startswith(marks) or f"CHECK ({name} " in line else line


def with_text(old: str, new: str) -> Line:
    return lambda line: line.replace(old, new)


class Compared:
    """Compares again and again with one picture of what is expected, which costs most of the time."""

    def __init__(self, store: Store):
        self.store = store
        with store.connection():
            self.expected, _ = expected_shape(store)

    def after(self, *harm: str) -> list[Difference]:
        with harmed(self.store, *harm):
            names = table_names_of(self.store.records).values()
            return compare(self.expected, read_tables(self.store.database, names))


@pytest.fixture
def compared(store: Store) -> Compared:
    return Compared(store)


def named(found: list[Difference]) -> set[tuple[str, str, str]]:
    for difference in found:
        assert difference.table in str(difference)
        assert difference.name in str(difference)
    return {(difference.kind, difference.table, difference.name) for difference in found}


def test_tables_as_they_should_be_are_in_sync(store: Store):
    assert differences(store) == []


def test_each_missing_table_is_named(store: Store, compared: Compared):
    for table in table_names_of(store.records).values():
        cascade = "" if isinstance(store.database, pw.SqliteDatabase) else " CASCADE"
        found = named(compared.after(f'DROP TABLE "{table}"{cascade}'))

        assert ("missing table", table, table) in found
        assert {kind for kind, _, _ in found} <= {"missing table", "missing foreign key"}


def test_each_missing_column_is_named(store: Store, compared: Compared):
    count = 0
    for table, shape in compared.expected.items():
        for column in set(shape.columns) - {"id"}:
            harm = rewritten(store, table, without_column(column))
            assert ("missing column", table, column) in named(compared.after(*harm))
            count += 1
    assert count == sum(len(record._meta.fields) - 1 for record in store.records)


def test_each_missing_index_is_named(store: Store, compared: Compared):
    indexes = [(table, index.name) for table, shape in compared.expected.items() for index in shape.indexes]
    for table, index in indexes:
        assert named(compared.after(f'DROP INDEX "{index}"')) == {("missing index", table, index)}
    assert len(indexes) == (18 if compared.store.is_sqlite else 20)


def test_each_missing_check_is_named(store: Store, compared: Compared):
    checks = [(table, check.name or "") for table, shape in compared.expected.items() for check in shape.checks]
    for table, check in checks:
        harm = rewritten(store, table, without(f'CONSTRAINT "{check}"'))
        assert ("missing check", table, check) in named(compared.after(*harm))
    assert len(checks) == 5


def test_each_missing_foreign_key_and_delete_rule_is_named(store: Store, compared: Compared):
    keys = [(table, key) for table, shape in compared.expected.items() for key in shape.foreign_keys]
    for table, key in keys:
        (column,) = key.columns
        harm = rewritten(store, table, without(f'FOREIGN KEY ("{column}")'))
        assert ("missing foreign key", table, column) in named(compared.after(*harm))

        found = compared.after(*rewritten(store, table, with_text(f" ON DELETE {key.on_delete}", "")))
        (rule,) = [entry for entry in found if (entry.kind, entry.name) == ("wrong delete rule", column)]
        assert rule.message.endswith(f"is ON DELETE NO ACTION, and should be ON DELETE {key.on_delete}")
    assert len(keys) == 7


@pytest.mark.parametrize(
    ("table", "old", "new", "kind", "name", "message"),
    [
        (
            "llm_message",
            '"content" TEXT',
            '"content" CHAR(9)',
            "wrong type",
            "content",
            r"(?i)is char.*9\), and should be text",
        ),
        ("llm_message", '"role" TEXT NOT NULL', '"role" TEXT', "wrong nullability", "role", "should be NOT NULL"),
        ("llm_message", '"content" TEXT', '"content" TEXT NOT NULL', "wrong nullability", "content", "take NULL"),
        ("llm_attachment", " PRIMARY KEY", "", "wrong primary key", "id", "should be the primary key"),
        (
            "llm_message",
            ", 'tool')",
            ")",
            "missing check",
            "llm_message_role_check",
            r"is .*'system'.*, and should be .*'tool'",
        ),
    ],
)
def test_what_is_otherwise_is_named(
    compared: Compared, table: str, old: str, new: str, kind: str, name: str, message: str
):
    import re

    found = compared.after(*rewritten(compared.store, table, with_text(old, new)))

    (difference,) = [entry for entry in found if entry.kind not in ("missing foreign key", "missing index")]
    assert (difference.kind, difference.table, difference.name) == (kind, table, name)
    assert re.search(message, difference.message)


@pytest.mark.parametrize(
    "other",
    [
        'CREATE UNIQUE INDEX "llm_message_one_pending" ON "llm_message" ("chat_id")',
        'CREATE UNIQUE INDEX "llm_message_one_pending" ON "llm_message" ("chat_id") WHERE status = \'failed\'',
        'CREATE INDEX "llm_message_one_pending" ON "llm_message" ("chat_id") WHERE status = \'pending\'',
        'CREATE UNIQUE INDEX "llm_message_one_pending" ON "llm_message" ("role") WHERE status = \'pending\'',
    ],
    ids=["condition", "other condition", "uniqueness", "columns"],
)
def test_an_index_of_the_right_name_and_another_shape_is_named(compared: Compared, other: str):
    (difference,) = compared.after("DROP INDEX llm_message_one_pending", other)

    assert (difference.kind, difference.name) == ("missing index", "llm_message_one_pending")
    assert "and should be UNIQUE (chat_id) WHERE status = 'pending'" in str(difference)


def test_an_index_that_could_not_be_built_is_missing(postgres_url: str):
    with connect(postgres_url) as store:
        store.create_tables()
        # As CREATE INDEX CONCURRENTLY leaves it where a row is in the way; that would wait for the whole server here.
        index = "'llm_chat_created_at'::regclass"
        with harmed(store, f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = {index}"):
            assert named(differences(store)) == {("missing index", "llm_chat", "llm_chat_created_at")}


def test_what_the_application_has_besides_is_no_difference(store: Store, compared: Compared):
    assert (
        compared.after(
            "ALTER TABLE llm_chat ADD COLUMN tenant TEXT DEFAULT 'none'",
            "CREATE INDEX by_tenant ON llm_chat (tenant)",
            "CREATE TABLE llm_bookmark (chat_id INTEGER)",
        )
        == []
    )


def test_an_index_may_have_another_name(compared: Compared):
    harm = ["DROP INDEX llm_request_created_at", "CREATE INDEX by_time ON llm_request (created_at)"]

    assert compared.after(*harm) == []


def test_a_missing_column_of_the_application_is_named_with_its_index(store: Store):
    with harmed(store, "DROP INDEX llm_chat_user_id", "ALTER TABLE llm_chat DROP COLUMN user_id"):
        found = differences(store)

    assert named(found) == {
        ("missing column", "llm_chat", "user_id"),
        ("missing index", "llm_chat", "llm_chat_user_id"),
    }


class Customer(pw.Model):
    class Meta:
        table_name = "customer"


def test_a_reference_and_a_default_of_the_application_that_are_missing_are_named(database_url: str):
    columns = {
        "customer": pw.ForeignKeyField(Customer, null=True, on_delete="CASCADE", index=False),
        "plan": pw.CharField(20, constraints=[pw.SQL("DEFAULT 'free'")]),
    }
    with connect(database_url) as before:
        before.create_tables()
    with connect(database_url, chat_fields=columns) as store:
        with harmed(
            store,
            "ALTER TABLE llm_chat ADD COLUMN customer_id INTEGER",
            "ALTER TABLE llm_chat ADD COLUMN plan VARCHAR(20) NOT NULL DEFAULT 'paid'",
        ):
            found = differences(store)

    assert named(found) == {("missing foreign key", "llm_chat", "customer_id"), ("wrong default", "llm_chat", "plan")}


class MoodField(pw.TextField):
    field_type = "MOOD"


def test_a_type_of_the_application_can_be_compared(postgres_url: str):
    with connect(postgres_url, chat_fields={"mood": MoodField(null=True)}) as store, store.connection():
        with pytest.raises(WrongSetup, match=r'the tables cannot be compared.* type "mood" does not exist'):
            differences(store)
        store.database.execute_sql("CREATE DOMAIN mood AS TEXT CHECK (value IN ('glad', 'sad'))")
        store.create_tables()

        assert differences(store) == []


def test_comparing_leaves_no_trace(store: Store):
    with store.connection():
        names = sorted(store.database.get_tables())
        path = "SELECT current_setting('search_path')"
        is_sqlite = isinstance(store.database, pw.SqliteDatabase)
        before = None if is_sqlite else store.database.execute_sql(path).fetchone()
        differences(store)

        assert sorted(store.database.get_tables()) == names
        assert before is None or store.database.execute_sql(path).fetchone() == before
        assert not store.database.in_transaction()

"""The shape of tables and of what is made of them, read from a database's own catalog into values to compare."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import peewee as pw

from llm_orm.errors import WrongSetup


@dataclass(frozen=True)
class Column:
    name: str
    type: str
    null: bool
    default: str | None
    is_key: bool


@dataclass(frozen=True)
class Index:
    """An index other than the primary key's; UNIQUE constraints are such, too."""

    name: str
    columns: tuple[str, ...]
    unique: bool
    where: str | None

    @property
    def shape(self) -> tuple[tuple[str, ...], bool, str | None]:
        return self.columns, self.unique, self.where

    def __str__(self) -> str:
        condition = f" WHERE {self.where}" if self.where else ""
        return f"{'UNIQUE ' if self.unique else ''}({', '.join(self.columns)}){condition}"


@dataclass(frozen=True)
class Check:
    name: str | None
    definition: str


@dataclass(frozen=True)
class ForeignKey:
    columns: tuple[str, ...]
    table: str
    targets: tuple[str, ...]
    on_delete: str
    on_update: str

    def __str__(self) -> str:
        return f"({', '.join(self.columns)}) REFERENCES {self.table} ({', '.join(self.targets)})"


@dataclass(frozen=True)
class Table:
    name: str
    columns: dict[str, Column]
    indexes: frozenset[Index]
    checks: frozenset[Check]
    foreign_keys: frozenset[ForeignKey]


def read_tables(database: pw.Database, names: Iterable[str]) -> dict[str, Table]:
    """The tables of these names that exist, by name."""
    if isinstance(database, pw.SqliteDatabase):
        tables = {name: _sqlite_table(database, name) for name in names}
        return {name: table for name, table in tables.items() if table is not None}
    return _postgresql_tables(database, names)


def read_made(database: pw.Database, names: Iterable[str], schema: str | None = None) -> dict[str, str]:
    """The definitions of the views, triggers and tables of the search that exist, by name."""
    if isinstance(database, pw.SqliteDatabase):
        marks = ", ".join("?" for _ in names)
        found = _all(database, f"SELECT name, sql FROM sqlite_master WHERE name IN ({marks})", *names)
        return {name: _joined(_tokens(sql)) for name, sql in found}
    query = f"""
        SELECT name, pg_get_viewdef(class.oid) FROM unnest(%s::text[]) AS name
        JOIN pg_class AS class ON class.oid = {_class_of(schema)} AND class.relkind = 'v'
    """
    return dict(_all(database, query, list(names), *_of_schema(schema)))


Shape = tuple[dict[str, Table], dict[str, str]]
"""The tables, and the definitions of what is made of them, by name."""


def imagined(database: pw.Database, statements: Sequence[str], names: Iterable[str], made: Iterable[str] = ()) -> Shape:
    """What would be there after the statements, in an empty database of this very kind and version.

    The server itself spells types, conditions and checks, so that they compare equal to those of existing tables.
    """
    try:
        if not isinstance(database, pw.SqliteDatabase):
            return _postgresql_imagined(database, statements, names, made)
        with pw.SqliteDatabase(":memory:") as empty:
            run(empty, statements)
            return read_tables(empty, names), read_made(empty, made)
    except (pw.ProgrammingError, pw.InternalError) as error:
        reason = " ".join(str(error).split())
        raise WrongSetup(f"the tables cannot be compared, as a temporary copy of them failed: {reason}") from error


def _postgresql_imagined(
    database: pw.Database, statements: Sequence[str], names: Iterable[str], made: Iterable[str]
) -> Shape:
    with database.atomic() as transaction:
        # Tables made while this schema comes first are temporary, and hide those of the same name.
        path = _all(database, "SELECT current_setting('search_path')")[0][0]
        database.execute_sql("SELECT set_config('search_path', %s, true)", ("pg_temp" + (f", {path}" if path else ""),))
        try:
            run(database, statements)
            return _postgresql_tables(database, names, schema="pg_temp"), read_made(database, made, schema="pg_temp")
        finally:
            transaction.rollback()


def run(database: pw.Database, statements: Sequence[str]) -> None:
    """Run SQL that takes no parameters, to the letter."""
    for statement in statements:
        # peewee hands psycopg2 an empty list of parameters, which then reads a % as the place of one.
        is_sqlite = isinstance(database, pw.SqliteDatabase)
        database.execute_sql(statement if is_sqlite else statement.replace("%", "%%"))


def _all(database: pw.Database, query: str, *params: Any) -> list[Any]:
    return database.execute_sql(query, params).fetchall()


# SQLite can be asked for most of a table's definition, but checks and conditions only stand in its text.


def _sqlite_table(database: pw.Database, name: str) -> Table | None:
    found = _all(database, "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = ?", name)
    if not found:
        return None
    columns = {
        column: Column(column, type.upper().replace(" ", ""), not required and not key, default, bool(key))
        for column, type, required, default, key in _all(
            database, 'SELECT name, type, "notnull", dflt_value, pk FROM pragma_table_info(?)', name
        )
    }
    return Table(
        name, columns, _sqlite_indexes(database, name), _sqlite_checks(found[0][0]), _sqlite_keys(database, name)
    )


def _sqlite_indexes(database: pw.Database, table: str) -> frozenset[Index]:
    query = """
        SELECT list.name, list."unique", sqlite_master.sql FROM pragma_index_list(?) AS list
        LEFT JOIN sqlite_master ON sqlite_master.type = 'index' AND sqlite_master.name = list.name
        WHERE list.origin <> 'pk'
    """
    indexes = []
    for name, unique, sql in _all(database, query, table):
        columns = _all(database, "SELECT name FROM pragma_index_info(?) ORDER BY seqno", name)
        tokens = _tokens(sql or "")
        words = [token.upper() for token in tokens]
        where = _joined(tokens[words.index("WHERE") + 1 :]) if "WHERE" in words else None
        indexes.append(Index(name, tuple(column or "an expression" for (column,) in columns), bool(unique), where))
    return frozenset(indexes)


def _sqlite_keys(database: pw.Database, table: str) -> frozenset[ForeignKey]:
    by_id: dict[int, list[Any]] = {}
    query = 'SELECT id, "table", "from", "to", on_delete, on_update FROM pragma_foreign_key_list(?) ORDER BY id, seq'
    for id, *rest in _all(database, query, table):
        by_id.setdefault(id, []).append(rest)
    return frozenset(
        ForeignKey(tuple(row[1] for row in rows), rows[0][0], tuple(row[2] for row in rows), rows[0][3], rows[0][4])
        for rows in by_id.values()
    )


def _sqlite_checks(sql: str) -> frozenset[Check]:
    tokens = _tokens(sql)
    checks = []
    for start, token in enumerate(tokens):
        if token.upper() == "CHECK" and tokens[start + 1] == "(":
            end = _closing(tokens, start + 1)
            is_named = tokens[start - 2].upper() == "CONSTRAINT"
            checks.append(Check(tokens[start - 1] if is_named else None, _joined(tokens[start + 2 : end])))
    return frozenset(checks)


_TOKEN = re.compile(
    r"""--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|\[[^]]*]|\w+|<>|[<>=!|]+|\S""", re.DOTALL
)


def _tokens(sql: str) -> list[str]:
    """The words of SQL without comments and without the quotes of names."""
    found = (token for token in _TOKEN.findall(sql) if not token.startswith(("--", "/*")))
    return [token[1:-1] if token[0] in '"`[' else token for token in found]


def _closing(tokens: Sequence[str], opening: int) -> int:
    depth = 0
    for place in range(opening, len(tokens)):
        depth += {"(": 1, ")": -1}.get(tokens[place], 0)
        if depth == 0:
            return place
    raise ValueError("a parenthesis is not closed")


def _joined(tokens: Sequence[str]) -> str:
    return re.sub(r"(?<=\() | (?=[),])", "", " ".join(tokens))


# PostgreSQL can be asked for everything, in its own spelling.

_RULES = {"a": "NO ACTION", "r": "RESTRICT", "c": "CASCADE", "n": "SET NULL", "d": "SET DEFAULT"}

_COLUMNS = """
    SELECT attribute.attrelid, attribute.attname, format_type(attribute.atttypid, attribute.atttypmod),
        NOT attribute.attnotnull, pg_get_expr(value.adbin, value.adrelid),
        EXISTS (SELECT 1 FROM pg_index WHERE indrelid = attribute.attrelid AND indisprimary
            AND attribute.attnum = ANY (indkey))
    FROM pg_attribute AS attribute
    LEFT JOIN pg_attrdef AS value ON value.adrelid = attribute.attrelid AND value.adnum = attribute.attnum
    WHERE attribute.attrelid = ANY (%s::oid[]) AND attribute.attnum > 0 AND NOT attribute.attisdropped
    ORDER BY attribute.attnum
"""

# An index that is not valid was left by a CREATE INDEX CONCURRENTLY that failed.
_INDEXES = """
    SELECT entry.indrelid, class.relname,
        ARRAY(SELECT coalesce(attname::text, pg_get_indexdef(entry.indexrelid, place, true))
            FROM generate_series(1, entry.indnkeyatts::int) AS place
            LEFT JOIN pg_attribute ON attrelid = entry.indrelid AND attnum > 0 AND attnum = entry.indkey[place - 1]
            ORDER BY place),
        entry.indisunique, pg_get_expr(entry.indpred, entry.indrelid, true)
    FROM pg_index AS entry JOIN pg_class AS class ON class.oid = entry.indexrelid
    WHERE entry.indrelid = ANY (%s::oid[]) AND NOT entry.indisprimary AND entry.indisvalid
"""

_CONSTRAINTS = """
    SELECT entry.conrelid, entry.conname, entry.contype::text, pg_get_constraintdef(entry.oid, true), target.relname,
        ARRAY(SELECT attname::text FROM unnest(entry.conkey) WITH ORDINALITY AS key (number, place)
            JOIN pg_attribute ON attrelid = entry.conrelid AND attnum = key.number ORDER BY place),
        ARRAY(SELECT attname::text FROM unnest(entry.confkey) WITH ORDINALITY AS key (number, place)
            JOIN pg_attribute ON attrelid = entry.confrelid AND attnum = key.number ORDER BY place),
        entry.confdeltype::text, entry.confupdtype::text
    FROM pg_constraint AS entry LEFT JOIN pg_class AS target ON target.oid = entry.confrelid
    WHERE entry.conrelid = ANY (%s::oid[]) AND entry.contype IN ('c', 'f')
"""


def _class_of(schema: str | None) -> str:
    return "to_regclass(" + ("format('%%I.%%I', %s::text, name)" if schema else "quote_ident(name)") + ")"


def _of_schema(schema: str | None) -> list[str]:
    return [schema] if schema else []


def _postgresql_tables(database: pw.Database, names: Iterable[str], schema: str | None = None) -> dict[str, Table]:
    query = f"SELECT {_class_of(schema)}::oid::bigint, name FROM unnest(%s::text[]) AS name"
    oids = {oid: name for oid, name in _all(database, query, *_of_schema(schema), list(names)) if oid}
    columns: dict[int, dict[str, Column]] = {oid: {} for oid in oids}
    indexes: dict[int, set[Index]] = {oid: set() for oid in oids}
    checks: dict[int, set[Check]] = {oid: set() for oid in oids}
    keys: dict[int, set[ForeignKey]] = {oid: set() for oid in oids}
    for oid, name, type, null, default, is_key in _all(database, _COLUMNS, list(oids)):
        columns[oid][name] = Column(name, type, null, default, is_key)
    for oid, name, on, unique, where in _all(database, _INDEXES, list(oids)):
        indexes[oid].add(Index(name, tuple(on), unique, where))
    for oid, name, kind, text, table, on, targets, deleted, updated in _all(database, _CONSTRAINTS, list(oids)):
        if kind == "c":
            checks[oid].add(Check(name, text.removeprefix("CHECK ")))
        else:
            keys[oid].add(ForeignKey(tuple(on), table, tuple(targets), _RULES[deleted], _RULES[updated]))
    return {
        name: Table(name, columns[oid], frozenset(indexes[oid]), frozenset(checks[oid]), frozenset(keys[oid]))
        for oid, name in oids.items()
    }

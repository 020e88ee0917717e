"""The tables of llm_orm as SQL, made from the records, and the views over them. Needs no database.

python -m llm_orm_schema.ddl     writes sqlite.sql and postgresql.sql anew
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import peewee as pw

from llm_orm.records import BASES, Record, Records, records_for
from llm_orm.store import connect
from llm_orm.views import objects_of
from llm_orm.words import Made

Dialect = Literal["sqlite", "postgresql"]

DATABASES: dict[Dialect, type[pw.Database]] = {"sqlite": pw.SqliteDatabase, "postgresql": pw.PostgresqlDatabase}


def ddl(
    dialect: Dialect,
    table_prefix: str = "",
    table_names: Mapping[str, str] | None = None,
    chat_fields: Mapping[str, pw.Field] | None = None,
    models: Mapping[str, type[Record]] | list[type[Record]] | None = None,
) -> list[str]:
    """The CREATE statements in the order to run them; the keywords are those of connect()."""
    database = DATABASES[dialect](None)
    options: Any = {"table_prefix": table_prefix, "table_names": table_names, "chat_fields": chat_fields}
    return statements(connect(database, models=models, **options).records)


def script(dialect: Dialect, *arguments: Any, **options: Any) -> str:
    """The statements as a file to run."""
    return "".join(f"{statement};\n\n" for statement in ddl(dialect, *arguments, **options)).rstrip("\n") + "\n"


def dialect_of(database: pw.Database) -> Dialect:
    return "sqlite" if isinstance(database, pw.SqliteDatabase) else "postgresql"


def table_names_of(records: Records) -> dict[str, str]:
    """{"chat": "llm_chat", …} as these records have them."""
    return records.table_names


def statements(records: Records, *, only_ours: bool = False) -> list[str]:
    """What creates the tables and what is made of them; only_ours leaves out references to the application's tables."""
    ours = set(records) if only_ours else None
    tables = [text for record in records for text in (_create_table(record, ours), *create_indexes(record).values())]
    return [*tables, *(made.create for made in made_of(records))]


def made_of(records: Records) -> list[Made]:
    """What the database makes of the tables: views, and what search looks into."""
    database = records.chat._meta.database  # type: ignore[attr-defined]
    return objects_of(table_names_of(records), is_sqlite=dialect_of(database) == "sqlite")


def create_indexes(record: type[Record]) -> dict[str, str]:
    """The CREATE INDEX statements of a record's table, by the name of the index."""
    indexes = record._meta.fields_to_index()  # type: ignore[attr-defined]
    return {index._name: _text(record, index.safe(False)) for index in indexes}


def application_columns(record: type[Record]) -> list[pw.Field]:
    """The columns that the application added to the record."""
    base = next(base for base in BASES.values() if issubclass(record, base))
    return [field for field in record._meta.sorted_fields if field.name not in base._meta.fields]  # type: ignore[attr-defined]


def application_indexes(records: Records) -> list[tuple[str, str, str]]:
    """(table, name, CREATE INDEX statement) of the indexes that the application added."""
    database = records.chat._meta.database  # type: ignore[attr-defined]
    ours = {name for record in records_for(database, table_names_of(records)) for name in create_indexes(record)}
    return [
        (record._meta.table_name, name, text)  # type: ignore[attr-defined]
        for record in records
        for name, text in create_indexes(record).items()
        if name not in ours
    ]


def column(record: type[Record], field: pw.Field) -> str:
    """The definition of one column, its reference included, as CREATE TABLE and ADD COLUMN take it."""
    definition = _text(record, field.ddl(_context(record)))
    if isinstance(field, pw.ForeignKeyField):
        definition += " " + _reference(record, field).partition(") ")[2]
    return definition


def literal(record: type[Record], field: pw.Field, value: Any) -> str:
    """A value of the column as SQL."""
    if isinstance(value, bool):
        return str(value).upper()  # peewee writes 1, which is no boolean to PostgreSQL
    return _text(record, pw.Value(value, converter=field.db_value))


def _create_table(record: type[Record], ours: set[type[Record]] | None) -> str:
    meta: Any = record._meta  # type: ignore[attr-defined]
    lines = [_text(record, field.ddl(_context(record))) for field in meta.sorted_fields]
    for field in meta.sorted_fields:
        if isinstance(field, pw.ForeignKeyField) and (ours is None or field.rel_model in ours):
            lines.append(_reference(record, field))
    lines += [_text(record, constraint) for constraint in meta.constraints or ()]
    return f'CREATE TABLE "{meta.table_name}" (\n    ' + ",\n    ".join(lines) + "\n)"


def _reference(record: type[Record], field: pw.ForeignKeyField) -> str:
    return _text(record, field.foreign_key_constraint())


def _context(record: type[Record]) -> Any:
    return record._schema._create_context()  # type: ignore[attr-defined]


def _text(record: type[Record], node: Any) -> str:
    return _context(record).sql(pw.ValueLiterals(node)).query()[0]


def generated_files() -> dict[Path, str]:
    """What sqlite.sql and postgresql.sql must hold."""
    notice = "-- Made from llm_orm/records.py and llm_orm/views.py by: python -m llm_orm_schema.ddl\n\n"
    folder = Path(__file__).parent
    return {folder / f"{dialect}.sql": notice + script(dialect) for dialect in DATABASES}


if __name__ == "__main__":
    for path, text in generated_files().items():
        path.write_text(text)

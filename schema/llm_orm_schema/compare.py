"""What a database lacks of what the records say."""

from collections.abc import Iterator
from dataclasses import dataclass

import peewee as pw

from llm_orm.store import Store
from llm_orm.words import Made

from .catalog import ForeignKey, Shape, Table, imagined, read_made, read_tables
from .ddl import made_of, statements, table_names_of


@dataclass(frozen=True)
class Difference:
    """One thing that is not as the records say.

    kind      "missing table", "missing column", "wrong type", "wrong nullability", "wrong default",
              "wrong primary key", "missing index", "missing check", "missing foreign key" or "wrong delete rule";
              "missing view", "wrong view"; of what search looks into: "missing search table", "wrong search table",
              "missing trigger", "wrong trigger"
    table     its name; of a view, the view's
    name      of the column, index, check, foreign key column, view or trigger; of a table that is missing, the table's
    message   a line for a person, which names all of these
    """

    kind: str
    table: str
    name: str
    message: str

    def __str__(self) -> str:
        return self.message


def differences(store: Store) -> list[Difference]:
    """What the database lacks or has otherwise; empty when it is in sync.

    Further tables, columns, indexes and checks of the database are the application's affair, and no difference.
    """
    with store.connection():
        return compare_shapes(store, expected_shape(store))


def compare_shapes(store: Store, wanted: Shape) -> list[Difference]:
    """What the database of a store lacks of a shape, or has otherwise."""
    tables, definitions = wanted
    made = [each for each in made_of(store.records) if each.name in definitions]
    existing = read_made(store.database, [each.name for each in made])
    return compare(tables, read_tables(store.database, tables)) + list(_made(made, definitions, existing))


def expected_shape(store: Store) -> Shape:
    """The tables as the store's records say, and what is made of them."""
    names, made = table_names_of(store.records).values(), [each.name for each in made_of(store.records)]
    tables, definitions = imagined(store.database, statements(store.records, only_ours=True), names, made)
    for record in store.records:
        name = record._meta.table_name  # type: ignore[attr-defined]
        keys = {_foreign_key(field) for field in record._meta.refs}  # type: ignore[attr-defined]
        tables[name] = Table(**{**vars(tables[name]), "foreign_keys": frozenset(keys)})
    return tables, definitions


def _foreign_key(field: pw.ForeignKeyField) -> ForeignKey:
    rule = field.on_delete or "NO ACTION"
    target = field.rel_model._meta.table_name
    return ForeignKey(
        (field.column_name,), target, (field.rel_field.column_name,), rule, field.on_update or "NO ACTION"
    )


def compare(expected: dict[str, Table], existing: dict[str, Table]) -> list[Difference]:
    """What of the expected tables does not exist, or is otherwise."""
    found: list[Difference] = []
    for name, table in expected.items():
        if name not in existing:
            found.append(Difference("missing table", name, name, f"table {name} is missing"))
            continue
        found += _columns(table, existing[name])
        found += _indexes(table, existing[name])
        found += _checks(table, existing[name])
        found += _foreign_keys(table, existing[name])
    return found


def _columns(expected: Table, existing: Table) -> Iterator[Difference]:
    for name, wanted in expected.columns.items():
        column, where = existing.columns.get(name), f"column {expected.name}.{name}"
        if column is None:
            yield Difference("missing column", expected.name, name, f"{where} ({wanted.type}) is missing")
            continue
        if column.type != wanted.type:
            message = f"{where} is {column.type}, and should be {wanted.type}"
            yield Difference("wrong type", expected.name, name, message)
        if column.is_key != wanted.is_key:
            message = f"{where} {'should' if wanted.is_key else 'should not'} be the primary key"
            yield Difference("wrong primary key", expected.name, name, message)
        elif column.null != wanted.null:
            message = f"{where} should {'take NULL' if wanted.null else 'be NOT NULL'}"
            yield Difference("wrong nullability", expected.name, name, message)
        if wanted.default is not None and column.default != wanted.default:
            message = f"{where} has the default {column.default}, and should have {wanted.default}"
            yield Difference("wrong default", expected.name, name, message)


def _indexes(expected: Table, existing: Table) -> Iterator[Difference]:
    shapes = {index.shape for index in existing.indexes}
    by_name = {index.name: index for index in existing.indexes}
    for index in sorted(expected.indexes, key=lambda index: index.name):
        if index.shape not in shapes:
            message = f"index {index.name} on {expected.name} {index} is missing"
            if index.name in by_name:
                message = f"index {index.name} on {expected.name} is {by_name[index.name]}, and should be {index}"
            yield Difference("missing index", expected.name, index.name, message)


def _checks(expected: Table, existing: Table) -> Iterator[Difference]:
    definitions = {check.definition for check in existing.checks}
    by_name = {check.name: check.definition for check in existing.checks}
    for check in sorted(expected.checks, key=lambda check: (check.name or "", check.definition)):
        if check.definition not in definitions:
            called = check.name or "without a name"
            message = f"check {called} on {expected.name} is missing: {check.definition}"
            if check.name in by_name:
                message = (
                    f"check {called} on {expected.name} is {by_name[check.name]}, and should be {check.definition}"
                )
            yield Difference("missing check", expected.name, check.name or "", message)


def _foreign_keys(expected: Table, existing: Table) -> Iterator[Difference]:
    by_target = {str(key): key for key in existing.foreign_keys}
    for key in sorted(expected.foreign_keys, key=str):
        name, where = ", ".join(key.columns), f"foreign key on {expected.name} {key}"
        if str(key) not in by_target:
            message = f"{where} ON DELETE {key.on_delete} is missing"
            yield Difference("missing foreign key", expected.name, name, message)
        elif by_target[str(key)].on_delete != key.on_delete:
            message = f"{where} is ON DELETE {by_target[str(key)].on_delete}, and should be ON DELETE {key.on_delete}"
            yield Difference("wrong delete rule", expected.name, name, message)


def _made(made: list[Made], expected: dict[str, str], existing: dict[str, str]) -> Iterator[Difference]:
    for each in made:
        called = f"{each.kind} {each.name}" + (f" on {each.table}" if each.kind == "trigger" else "")
        if each.name not in existing:
            yield Difference(f"missing {each.kind}", each.table, each.name, f"{called} is missing")
        elif existing[each.name] != expected[each.name]:
            yield Difference(f"wrong {each.kind}", each.table, each.name, f"{called} is not as it should be")

"""The SQL that a turn runs, made from the records once and used again: building it anew costs more than running it."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import peewee as pw

from .errors import WrongKey
from .records import Content, JSONContent, JSONField, Record, Records, TextContent, now, uuid7
from .values import Attachment, as_uuid

DIED = "ProcessDied"
"""The `error` of a request row that stands for a call which may have been under way when its process died."""


INTERRUPTED = "The tool was interrupted while it ran. Whether it did its work is not known."
NEVER_RUN = "Not run: the turn was broken off before."
"""What the model is told of calls whose turn was broken off, where it is shown them."""


class Sql(NamedTuple):
    text: str
    params: tuple = ()
    opened: Callable[[list[tuple]], list[tuple]] | None = None
    """What makes the rows that come of it clear, where content is among them."""


class Statements:
    def __init__(self, records: Records, database: pw.Database):
        self.records = records
        self.param = database.param
        self._texts: dict[Any, str] = {}
        self._selects: dict[Any, Sql] = {}
        self._adapters = {record: _adapters(record) for record in records}
        chat, message = _table(records.chat), _table(records.message)
        self._next_position = f"(SELECT COALESCE(MAX(position), -1) + 1 FROM {message} WHERE chat_id = {self.param})"
        self._living_message = f"(SELECT id FROM {message} WHERE id = {self.param})"
        self._living_chat = f"(SELECT id FROM {chat} WHERE id = {self.param})"

    # Values for columns that the database computes

    def next_position(self, chat_id: UUID) -> Sql:
        return Sql(self._next_position, (chat_id.hex,))

    def next_idle_position(self, chat_id: UUID) -> Sql:
        """The same, or that of the reply in the making, which is taken while a turn is at work."""
        return Sql(f"{self._next_position[:-1]} AND status <> 'pending')", (chat_id.hex,))

    def living_message(self, message_id: UUID) -> Sql:
        """The id, or NULL where the message was deleted meanwhile."""
        return Sql(self._living_message, (message_id.hex,))

    def living_chat(self, chat_id: UUID) -> Sql:
        return Sql(self._living_chat, (chat_id.hex,))

    def place_behind(self, message_id: UUID) -> Sql:
        """The position behind a message, or NULL, which no row can have, where the message is gone."""
        return Sql(
            f"(SELECT position + 1 FROM {_table(self.records.message)} WHERE id = {self.param})", (message_id.hex,)
        )

    def place_if_free(self, chat_id: UUID, position: int) -> Sql:
        """A new position for a message of the chat, or its own where another has that."""
        table = _table(self.records.message)
        taken = f"SELECT 1 FROM {table} WHERE chat_id = {self.param} AND position = {self.param}"
        return Sql(f"CASE WHEN EXISTS ({taken}) THEN position ELSE {self.param} END", (chat_id.hex, position, position))

    def chat_of(self, **message: Any) -> Sql:
        """The id of the chat of a message of which something is true, or NULL."""
        conditions, params = self._values(self.records.message, message)
        table = _table(self.records.message)
        return Sql(f"(SELECT chat_id FROM {table} WHERE {_all_of(message, conditions)})", tuple(params))

    def next_attempt(self, message_id: UUID, round_number: int) -> Sql:
        """The number of the next try of a call."""
        text = (
            f"(SELECT COALESCE(MAX(attempt), 0) + 1 FROM {_table(self.records.request)} "
            f"WHERE message_id = {self.param} AND round = {self.param})"
        )
        return Sql(text, (message_id.hex, round_number))

    # Writing

    def insert(self, record: type[Record], *rows: Mapping[str, Any]) -> Sql:
        """Insert rows that have the same keys: names of fields, or of their columns; those whose id is there stay."""
        names = tuple(rows[0])
        texts: list[str] = []
        params: list[Any] = []
        for row in rows:
            row_texts, row_params = self._values(record, row)
            texts.append("(" + ", ".join(row_texts) + ")")
            params += row_params
        values = ", ".join(texts)
        return Sql(f"{self._insert_into(record, names)} VALUES {values} ON CONFLICT (id) DO NOTHING", tuple(params))

    def insert_where(
        self,
        record: type[Record],
        row: Mapping[str, Any],
        there: type[Record],
        where: Mapping[str, Any],
        unless: Mapping[str, Any],
    ) -> Sql:
        """Insert a row if another is there, of which something is true, unless it is of one of its own kind."""
        texts, params = self._values(record, row)
        conditions, more = self._values(there, where)
        exceptions, yet_more = self._values(record, unless)
        text = (
            f"{self._insert_into(record, tuple(row))} SELECT {', '.join(texts)} "
            f"WHERE EXISTS (SELECT 1 FROM {_table(there)} WHERE {_all_of(where, conditions)}) "
            f"AND NOT EXISTS (SELECT 1 FROM {_table(record)} WHERE {_all_of(unless, exceptions)})"
        )
        return Sql(text, (*params, *more, *yet_more))

    def copy(self, record: type[Record], row_id: UUID, **changes: Any) -> Sql:
        """Insert a row once more, with some columns changed; nothing of it leaves the database."""
        texts, params = self._values(record, changes)
        key = ("copy", record, tuple(changes))
        if key not in self._texts:
            names = [f'"{field.column_name}"' for field in record._meta.sorted_fields]  # type: ignore[attr-defined]
            kept = ", ".join(name for name in names if name.strip('"') not in changes)
            self._texts[key] = (
                f"{self._insert_into(record, tuple(changes))[:-1]}, {kept}) "
                f'SELECT {", ".join(texts)}, {kept} FROM {_table(record)} WHERE "id" = {self.param} '
                "ON CONFLICT (id) DO NOTHING"
            )
        return Sql(self._texts[key], (*params, row_id.hex))

    def update(
        self, record: type[Record], values: Mapping[str, Any], *, returning: str | None = None, **where: Any
    ) -> Sql:
        texts, params = self._values(record, values)
        conditions, more = self._values(record, where)
        key = ("update", record, tuple(values), tuple(where), tuple(texts), tuple(conditions), returning)
        if key not in self._texts:
            changes = ", ".join(f'"{name}" = {text}' for name, text in zip(values, texts, strict=True))
            self._texts[key] = f"UPDATE {_table(record)} SET {changes} WHERE {_all_of(where, conditions)}" + (
                f" RETURNING {returning}" if returning else ""
            )
        return Sql(self._texts[key], tuple(params + more))

    def delete(self, record: type[Record], *, returning: str | None = None, **where: Any) -> Sql:
        conditions, params = self._values(record, where)
        text = f"DELETE FROM {_table(record)} WHERE {_all_of(where, conditions)}"
        return Sql(f"{text} RETURNING {returning}" if returning else text, tuple(params))

    def insert_files(self, message_id: UUID, files: Sequence[Attachment], first: int = 0) -> list[Sql]:
        """The rows of the files of a message, from a position on."""
        names = ("media_type", "filename", "size", "sha256", "content", "url")
        rows = [
            {"id": uuid7(), "message_id": message_id, "position": position}
            | {name: getattr(file, name) for name in names}
            for position, file in enumerate(files, first)
        ]
        return [self.insert(self.records.attachment, *rows)] if rows else []

    def delete_files(self, message_id: UUID, first: int) -> Sql:
        """Delete the files of a message from a position on."""
        table, param = _table(self.records.attachment), self.param
        return Sql(f"DELETE FROM {table} WHERE message_id = {param} AND position >= {param}", (message_id.hex, first))

    def interrupt_tool_calls(self, *, told: bool, **message: Any) -> Sql:
        """Say of a message's calls that will not be finished that they were not.

        told    whether the model is, for the message is kept
        """
        conditions, params = self._values(self.records.message, message)
        ended: dict[str, Any] = {"status": "failed", "error": "interrupted", "finished_at": now()}
        if told:
            texts = [self._values(self.records.tool_call, {"result": text})[1][0] for text in (INTERRUPTED, NEVER_RUN)]
            which = f"CASE WHEN status = 'running' THEN {self.param} ELSE {self.param} END"
            ended["result"] = Sql(which, tuple(texts))
        changes, values = self._values(self.records.tool_call, ended)
        return Sql(
            f"UPDATE {_table(self.records.tool_call)} SET {_list_of(ended, changes)} "
            "WHERE status IN ('pending', 'running') AND message_id IN "
            f"(SELECT id FROM {_table(self.records.message)} WHERE {_all_of(message, conditions)})",
            (*values, *params),
        )

    def forget_deaths(self, chat_id: UUID, turn_id: UUID, since: datetime) -> Sql:
        """Delete the rows that stand for calls of a turn whose process was taken for dead."""
        text = (
            f"DELETE FROM {_table(self.records.request)} WHERE chat_id = {self.param} AND turn_id = {self.param} "
            f"AND error = '{DIED}' AND created_at > {self.param}"
        )
        return Sql(text, (chat_id.hex, turn_id.hex, since.isoformat(" ", "microseconds")))

    def beat(self, message_ids: Sequence[UUID]) -> Sql:
        marks = ", ".join([self.param] * len(message_ids))
        return Sql(
            f"UPDATE {_table(self.records.message)} SET updated_at = {self.param} "
            f"WHERE id IN ({marks}) AND status = 'pending'",
            (now().isoformat(" ", "microseconds"), *(message_id.hex for message_id in message_ids)),
        )

    def park(self, tool_call_ids: Sequence[str], **message: Any) -> tuple[Sql, Sql]:
        """Let a turn wait for its calls to be approved; (cancelled_at), where it is still there to wait."""
        record, time = self.records.message, now()
        calls = self._where_in({"message_id": message["id"]}, "tool_call_id", tool_call_ids)
        asked = Sql(
            f"UPDATE {_table(self.records.tool_call)} SET approval = 'required' WHERE {calls.text}", calls.params
        )
        parked = {"parked_at": time, "updated_at": time}
        return asked, self.update(record, parked, returning="cancelled_at", **message)

    def start_tool_calls(self, message_id: UUID, tool_call_ids: Sequence[str]) -> Sql:
        calls = self._where_in({"message_id": message_id}, "tool_call_id", tool_call_ids)
        return Sql(f"UPDATE {_table(self.records.tool_call)} SET status = 'running' WHERE {calls.text}", calls.params)

    def reject_tool_calls(self, message_id: UUID, tool_call_ids: Sequence[str], result: str, error: str) -> Sql:
        calls = self._where_in({"message_id": message_id}, "tool_call_id", tool_call_ids)
        told = {"result": result, "error": error, "finished_at": now()}
        return Sql(
            f"UPDATE {_table(self.records.tool_call)} SET status = 'rejected', result = {self.param}, "
            f"error = {self.param}, finished_at = {self.param} WHERE {calls.text}",
            (*self._values(self.records.tool_call, told)[1], *calls.params),
        )

    def _where_in(self, where: Mapping[str, Any], column: str, values: Sequence[Any]) -> Sql:
        conditions, params = self._values(self.records.tool_call, where)
        marks = ", ".join([self.param] * len(values))
        return Sql(f"{_all_of(where, conditions)} AND {column} IN ({marks})", (*params, *values))

    # Reading

    def cancelled(self, message_ids: Sequence[UUID]) -> Sql:
        """(id) of those that somebody wants to end."""
        marks = ", ".join([self.param] * len(message_ids))
        return Sql(
            f"SELECT id FROM {_table(self.records.message)} WHERE id IN ({marks}) AND cancelled_at IS NOT NULL",
            tuple(message_id.hex for message_id in message_ids),
        )

    def attachments(self, message_ids: Sequence[UUID]) -> Sql:
        """(message_id, media_type, filename, content, url, size, sha256) in order."""
        marks = ", ".join([self.param] * len(message_ids))
        return self._select(
            self.records.attachment,
            "message_id, media_type, filename, content, url, size, sha256",
            f"message_id IN ({marks}) ORDER BY message_id, position",
            tuple(message_id.hex for message_id in message_ids),
        )

    def message_at(self, chat_id: UUID, position: int) -> Sql:
        """(id, role, status)"""
        return Sql(
            f"SELECT id, role, status FROM {_table(self.records.message)} "
            f"WHERE chat_id = {self.param} AND position = {self.param}",
            (chat_id.hex, position),
        )

    def messages_after(self, chat_id: UUID, position: int) -> Sql:
        """(id, position, role, status, content, content_raw, provider) in order."""
        return self._select(
            self.records.message,
            "id, position, role, status, content, content_raw, provider",
            f"chat_id = {self.param} AND position > {self.param} ORDER BY position",
            (chat_id.hex, position),
        )

    def tool_results(self, message_ids: Sequence[UUID]) -> Sql:
        """(message_id, tool_call_id, result) of the calls that have one."""
        marks = ", ".join([self.param] * len(message_ids))
        return self._select(
            self.records.tool_call,
            "message_id, tool_call_id, result",
            f"message_id IN ({marks}) AND result IS NOT NULL",
            tuple(message_id.hex for message_id in message_ids),
        )

    def last_message(self, chat_id: UUID) -> Sql:
        """(id, position, role, status, is_erased) of the last message that is not pending."""
        return Sql(
            f"SELECT id, position, role, status, {_IS_ERASED} FROM {_table(self.records.message)} "
            f"WHERE chat_id = {self.param} AND status <> 'pending' ORDER BY position DESC LIMIT 1",
            (chat_id.hex,),
        )

    def turn_of(self, chat_id: UUID, position: int) -> Sql:
        """(id) of the user message that the message at a position answers, where that is not erased."""
        return Sql(
            f"SELECT id FROM {_table(self.records.message)} "
            f"WHERE chat_id = {self.param} AND role = 'user' AND position < {self.param} AND NOT ({_IS_ERASED}) "
            "ORDER BY position DESC LIMIT 1",
            (chat_id.hex, position),
        )

    def chat_exists(self, chat_id: UUID) -> Sql:
        return Sql(f"SELECT 1 FROM {_table(self.records.chat)} WHERE id = {self.param}", (chat_id.hex,))

    # How

    def _select(self, record: type[Record], columns: str, where: str, params: tuple) -> Sql:
        """A query whose rows come out clear, whatever it selects."""
        key = (record, columns)
        if key not in self._selects:
            opened = _opened(record, columns.split(", "))
            self._selects[key] = Sql(f"SELECT {columns} FROM {_table(record)} WHERE ", (), opened)
        select = self._selects[key]
        return Sql(select.text + where, params, select.opened)

    def _insert_into(self, record: type[Record], names: tuple[str, ...]) -> str:
        key = ("insert", record, names)
        if key not in self._texts:
            columns = ", ".join(f'"{name}"' for name in names)
            self._texts[key] = f"INSERT INTO {_table(record)} ({columns})"
        return self._texts[key]

    def _values(self, record: type[Record], values: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
        adapters = self._adapters[record]
        texts: list[str] = []
        params: list[Any] = []
        for name, value in values.items():
            if type(value) is Sql:
                texts.append(value.text)
                params += value.params
            else:
                texts.append(self.param)
                adapt = adapters[name]
                params.append(value if adapt is None or value is None else adapt(value))
        return texts, params


_IS_ERASED = "content IS NULL AND content_raw IS NULL"
"""Of a user message: one that has a text, or files, has one of the two."""


def _table(record: type[Record]) -> str:
    return f'"{record._meta.table_name}"'  # type: ignore[attr-defined]


def _list_of(values: Mapping[str, Any], texts: list[str]) -> str:
    return ", ".join(f'"{name}" = {text}' for name, text in zip(values, texts, strict=True))


def _all_of(where: Mapping[str, Any], texts: list[str]) -> str:
    return " AND ".join(f'"{name}" = {text}' for name, text in zip(where, texts, strict=True))


def _adapters(record: type[Record]) -> dict[str, Any]:
    """What makes a value of Python one of the driver's, by column; None where it already is."""
    adapters: dict[str, Any] = {}
    for field in record._meta.sorted_fields:  # type: ignore[attr-defined]
        if isinstance(field, JSONContent):
            adapters[field.column_name] = _dumped(field)
        elif isinstance(field, JSONField):
            adapters[field.column_name] = json.dumps
        elif isinstance(field, TextContent):
            adapters[field.column_name] = field.sealed
        elif isinstance(field, (pw.TextField, pw.IntegerField, pw.BooleanField)):
            adapters[field.column_name] = None
        else:
            adapters[field.column_name] = field.db_value
    return adapters


def _dumped(field: JSONContent) -> Callable[[Any], str]:
    return lambda value: json.dumps(field.sealed(value))


def _opened(record: Any, columns: list[str]) -> Callable[[list[tuple]], list[tuple]] | None:
    """What makes rows of the columns clear; None where no content is among them."""
    fields = record._meta.columns
    content = [(index, fields[name]) for index, name in enumerate(columns) if isinstance(fields[name], Content)]
    return (lambda rows: [_clear(row, columns, content) for row in rows]) if content else None


def _clear(row: tuple, columns: list[str], content: list[tuple[int, Content]]) -> tuple:
    try:
        found = [(index, field.unsealed(row[index])) for index, field in content if row[index] is not None]
        if all(value is row[index] for index, value in found):
            return row
    except WrongKey as error:
        name, row_id = columns[0], as_uuid(row[0])
        place = f"{error.table}.{error.column}"
        text = str(error).replace(place, f"{place} of {name} {row_id}", 1)
        raise WrongKey(text, table=error.table, column=error.column, row=row_id if name == "id" else None) from None
    values = list(row)
    for index, value in found:
        values[index] = value
    return tuple(values)

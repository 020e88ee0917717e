"""Chats from files and other databases: our own JSONL, the messages of OpenAI's API, a database of NodeLLM's.

Each chat comes in whole, in one transaction, or not at all; what is there already is left as it is, so that an import
which was broken off is run again.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any
from uuid import UUID

import peewee as pw

from .checks import check_storable
from .errors import InvalidValue, LlmOrmError
from .formats.interchange import Bad, Incoming, IncomingRow, Progress, Row
from .formats.json_values import NotOne, readers
from .formats.jsonl import ROWS_AT_ONCE, Lines, Ours, parsed
from .formats.nodellm import is_database, nodellm
from .formats.openai_messages import chat_of_messages
from .store import Store, as_store

FORMATS = ("jsonl", "openai", "nodellm")

MOST_SKIPPED = 1000
"""So many are described; all are counted."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """What did not come in.

    where     "line 17" of a file, or a table and an id
    reason    what is wrong with it
    """

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Imported:
    """What came in, or would: rows by table.

    already_there       chats, and requests of no chat, whose id was in the store: left as they were
    left_out            messages of NodeLLM's without any content, which a crash or an unread stream left behind
    skipped             what did not come in, and why: the first 1000
    skipped_in_all      how many there are of these
    columns_left_out    columns of a NodeLLM database that the store does not have, as "LlmChat.projectId"
    """

    chats: int = 0
    messages: int = 0
    tool_calls: int = 0
    requests: int = 0
    agent_sessions: int = 0
    attachments: int = 0
    already_there: int = 0
    left_out: int = 0
    skipped: tuple[Skipped, ...] = ()
    skipped_in_all: int = 0
    columns_left_out: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        skipped = [{"where": each.where, "reason": each.reason} for each in self.skipped]
        return values | {"skipped": skipped, "columns_left_out": list(self.columns_left_out)}


def import_chats(
    store: Store | pw.Database | str | None,
    source: Any,
    format: str | None = None,
    *,
    dry_run: bool = False,
    source_tables: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Bring chats into a store, and say what came in, what was there already, and what was skipped and why.

    source          a path; an open file, of text or bytes; lines, as `export_lines` gives them; the URL of a database
                    of NodeLLM's, postgresql://… or sqlite:///…
    format          "jsonl", as `export` writes it; "openai", a chat a line: {"messages": […]}; "nodellm", a database of
                    Prisma's with the tables LlmChat, LlmMessage, …; default: as the source begins
    dry_run         bring nothing in, and say the same; what stands twice in the source counts twice
    source_tables   names of single tables of NodeLLM's: {"chat": "AssistantChat", "message": …, "tool_call": …,
                    "request": …, "agent_session": …}
    progress        called with (done, total) as chats are looked at; total is None where nobody knows

    A chat whose id is there is left as it is. Every other comes in whole, in a transaction of its own; one with a row
    that does not fit is skipped whole. So an import that was broken off is run again. Chats without an id get one that
    is made of what they say, and is the same the next time. What the store encrypts, it encrypts.

    Raises `InvalidValue` for what is not a source, for a version of the format that is not known, and for columns that
    the store does not have; nothing has come in then.
    """
    store = as_store(store)
    if format is not None and format not in FORMATS:
        raise InvalidValue(f"format={format!r}: it is one of {', '.join(map(repr, FORMATS))}; None: as it begins")
    importing = _Importing(store, dry_run, progress)
    if format == "nodellm" or (format is None and is_database(source)):
        with nodellm(source, source_tables, store) as database:
            importing.total = database.count()
            importing.take(database.chats())
            importing.columns_left_out, importing.left_out = database.columns_left_out, database.left_out
        return importing.done
    with _opened(source) as file:
        lines = Lines(file)
        if (format or lines.format()) == "jsonl":
            ours = Ours(store, lines)
            importing.total = ours.total
            importing.take(ours.chats())
        else:
            importing.take(_of_messages(lines))
    return importing.done


async def aimport_chats(
    store: Store | pw.Database | str | None,
    source: Any,
    format: str | None = None,
    *,
    dry_run: bool = False,
    source_tables: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Imported:
    """`import_chats`, from asyncio; `progress` is called on a thread."""
    store = as_store(store)
    return await store.off_the_loop(
        lambda: import_chats(store, source, format, dry_run=dry_run, source_tables=source_tables, progress=progress)
    )


# Into the store


class _DryRun(Exception):
    """Takes back what was written to see whether it can be."""


@dataclass
class _Importing:
    store: Store
    is_dry: bool
    progress: Progress | None
    total: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    skipped_in_all: int = 0
    left_out: int = 0
    columns_left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        records = vars(self.store.records)
        self.readers = {name: readers(record) for name, record in records.items()}
        self.there = {name for name, record in records.items() if self.store.has_table(record)}

    @property
    def done(self) -> Imported:
        return Imported(
            **self.counts,
            left_out=self.left_out,
            skipped=tuple(self.skipped),
            skipped_in_all=self.skipped_in_all,
            columns_left_out=self.columns_left_out,
        )

    def take(self, chats: Iterable[Incoming]) -> None:
        done = 0
        for chat in chats:
            try:
                counts = self.store.patiently(lambda chat=chat: self._taken(chat))
            except Bad as bad:
                if chat.pieces is not None:
                    self.take(chat.pieces())
                else:
                    self._skip(bad.where or chat.where, bad.reason)
            else:
                for name, count in counts.items():
                    self.counts[name] = self.counts.get(name, 0) + count
            done += chat.chat_id is not None
            if self.progress is not None:
                self.progress(done, self.total if self.total is None else max(done, self.total))

    def _skip(self, where: str, reason: str) -> None:
        self.skipped_in_all += 1
        if len(self.skipped) < MOST_SKIPPED:
            self.skipped.append(Skipped(where, reason))

    def _taken(self, chat: Incoming) -> dict[str, int]:
        """Write a chat with all that belongs to it; raises `Bad`."""
        if chat.problem is not None:
            raise chat.problem
        if chat.chat_id is not None and self._is_there("chat", chat.chat_id):
            return {"already_there": 1}
        counts: dict[str, int] = {}
        try:
            with self.store.transaction():
                for rows in _batches(chat.rows()):
                    self._write(rows, counts, is_alone=chat.chat_id is None)
                if self.is_dry:
                    raise _DryRun
        except _DryRun:
            pass
        except Bad:
            if chat.chat_id is not None and self._is_there("chat", chat.chat_id):
                return {"already_there": 1}  # another import was faster
            raise
        return counts

    def _write(self, batch: list[IncomingRow], counts: dict[str, int], is_alone: bool) -> None:
        table, record = batch[0].table, getattr(self.store.records, batch[0].table)
        rows = [self._read(row) for row in batch]
        where = batch[0].where if len(batch) == 1 else f"{batch[0].where} to {batch[-1].where}"
        if is_alone:
            there = self._those_there(table, [row["id"] for row in rows])
            counts["already_there"] = counts.get("already_there", 0) + len(there)
            rows = [row for row in rows if row["id"] not in there]
        elif table == "request":
            given_back = self._given_back(rows)
            counts["requests"] = counts.get("requests", 0) + len(given_back)
            rows = [row for row in rows if row["id"] not in given_back]
        if not rows:
            return
        names = {each.column_name: each.name for each in record._meta.sorted_fields}
        try:
            record.insert_many([{names[name]: value for name, value in row.items()} for row in rows]).execute()
        except (pw.IntegrityError, pw.DataError, OverflowError, TypeError, ValueError, ArithmeticError) as error:
            if isinstance(error, LlmOrmError):
                raise Bad(where, str(error)) from error
            problem = str(error).partition("\n")[0] or type(error).__name__
            raise Bad(where, f"{record._meta.table_name}: {problem}") from error
        counts[f"{table}s"] = counts.get(f"{table}s", 0) + len(rows)

    def _given_back(self, rows: list[Row]) -> set[UUID]:
        """The requests that outlived the chat, which is there again: theirs is what they belong to."""
        record: Any = self.store.records.request
        outlived = record.select(record.id).where(record.id.in_([row["id"] for row in rows]), record.chat.is_null())
        ids = {row[0] for row in outlived.tuples()}
        for row in rows:
            if row["id"] in ids:
                ties = {"chat": row["chat_id"], "message": row.get("message_id")}
                record.update(**ties).where(record.id == row["id"]).execute()
        return ids

    def _read(self, row: IncomingRow) -> Row:
        if row.table not in self.there:
            raise Bad(row.where, f"the store has no table for a {row.table.replace('_', ' ')}")
        readers = self.readers[row.table]
        if "id" not in row.values:
            raise Bad(row.where, f"the {row.table} has no id")
        try:
            return {name: _value(row, name, readers.get(name), value) for name, value in row.values.items()}
        except RecursionError:
            raise Bad(row.where, "it is nested too deeply") from None

    def _is_there(self, table: str, row_id: UUID) -> bool:
        return bool(self._those_there(table, [row_id]))

    def _those_there(self, table: str, ids: list[UUID]) -> set[UUID]:
        record: Any = getattr(self.store.records, table)
        return {row[0] for row in self.store.found(record.select(record.id).where(record.id.in_(ids)).tuples())}


def _batches(rows: Iterable[IncomingRow]) -> Iterator[list[IncomingRow]]:
    """Rows that one statement can write: of one table, with the same columns; of files, one."""
    for (table, _), some in itertools.groupby(rows, lambda row: (row.table, tuple(row.values))):
        at_once = 1 if table == "attachment" else ROWS_AT_ONCE
        while batch := list(itertools.islice(some, at_once)):
            yield batch


def _value(row: IncomingRow, name: str, read: Callable[[Any], Any] | None, value: Any) -> Any:
    if read is None:
        raise Bad(row.where, f"the {row.table} has the column {name!r}, which the store does not have")
    if value is None:
        return None
    try:
        for text in _texts(value):
            check_storable(name, text)
        made = read(value)
    except InvalidValue as error:
        raise Bad(row.where, str(error)) from error
    except (TypeError, ValueError, ArithmeticError) as error:
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
        why = f": {error}" if isinstance(error, NotOne) else ""
        raise Bad(row.where, f"{shown} cannot be {row.table}.{name}{why}") from error
    return made


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield name
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


# From a file


@contextmanager
def _opened(source: Any) -> Iterator[Any]:
    if isinstance(source, str | os.PathLike):
        try:
            file = open(source, "rb")  # noqa: SIM115
        except OSError as error:
            raise InvalidValue(f"cannot read {os.fspath(source)!r}: {error.strerror or error}") from error
        with file:
            yield file
    elif hasattr(source, "readline"):
        yield source
    elif isinstance(source, Iterable):
        yield _Given(iter(source))
    else:
        raise InvalidValue(
            f"source={source!r}: import_chats() reads a path, an open file, lines, or the URL of a NodeLLM database"
        )


@dataclass
class _Given:
    """Lines that somebody has, read as those of a file are."""

    lines: Iterator[Any]

    def readline(self, size: int) -> Any:
        return next(self.lines, b"")


def _of_messages(lines: Lines) -> Iterator[Incoming]:
    for number, line in lines:
        where = f"line {number}"
        try:
            yield chat_of_messages(parsed(number, line), where)
        except Bad as bad:
            yield Incoming(where, problem=Bad(bad.where or where, bad.reason))

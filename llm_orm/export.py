"""Chats as files: every row of them, fine-tuning data, a transcript to be read, or a table of requests.

Read page by page, in short transactions: what is written does not grow in memory with the number of chats.
"""

import io
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import peewee as pw

from .chronicle import chronicle
from .dimensions import conditions as request_conditions
from .dimensions import joins
from .errors import InvalidValue
from .filters import Moment, Where, chat_conditions, span, within
from .formats.interchange import FORMAT_VERSION, Progress, Row, snapshot
from .formats.json_values import as_json, dumped
from .formats.markdown import as_markdown
from .formats.openai_messages import complete_turns, for_fine_tuning
from .formats.spreadsheet import csv_line
from .periods import zone
from .records import BytesContent, now
from .statements import Sql
from .store import Store, as_store
from .tools import Toolbox
from .transcript import Transcript
from .values import Attachment, Message, as_uuid

FORMATS = ("jsonl", "openai", "markdown", "csv")

CHATS_AT_ONCE = 50
MESSAGES_AT_ONCE = 500
"""So many chats are read together, or fewer that have so many messages; one of them may have more."""

REQUESTS_AT_ONCE = 500

OF_NO_PROVIDER = "-"
"""What each provider wrote is shown without that provider's own fields."""


@dataclass(frozen=True, slots=True)
class Exported:
    """How much was written.

    chats       of "jsonl", "openai" and "markdown"
    messages, tool_calls, requests, agent_sessions, attachments
                rows of "jsonl"; of "openai" the messages that were shown; of "csv" the requests
    left_out    messages that are not in "openai", for their turns are not complete, or were erased
    """

    chats: int = 0
    messages: int = 0
    tool_calls: int = 0
    requests: int = 0
    agent_sessions: int = 0
    attachments: int = 0
    left_out: int = 0

    def as_dict(self) -> dict[str, int]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


def export(
    store: Store | pw.Database | str | None,
    to: Any,
    format: str = "jsonl",
    *,
    where: Where | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    tz: Any = "UTC",
    tools: Iterable[Any] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write chats to a file, and say how much that was.

    to             a path, or an open file, of text or bytes, which stays open
    format         "jsonl": every row of the chats, all columns, to be imported again with `import_chats`;
                   "openai": a chat a line, {"messages": […]}, as fine-tuning takes it: complete turns only;
                   "markdown": transcripts to be read; "csv": a request a line
    where          which chats, as of `erase`; for "csv" which requests, as of `usage`
    since, until   chats in which something was said from `since` on, and which were made before `until`; for "csv" the
                   requests that ended in between
    tz             the time zone of days in these, and of the times in "markdown"
    tools          for "openai": functions and tools as of a chat, which are described in the lines of chats that call
                   tools; the database does not have them
    overwrite      whether a file that is there is replaced
    progress       called with (done, total) as chats are written; of "csv", requests

    CONTENT IS CLEAR IN THE FILE, also that of an encrypted store. A path is created for its owner alone (mode 0600),
    and is there only once it is complete. Each chat is as it was at one moment, two chats may be of two moments; a chat
    of "markdown" in which a turn runs may have more of it than was there when it began.
    Raises `InvalidValue` and `UnknownKeyword` before anything is written.
    """
    exporting = _Exporting(as_store(store), format, where, since, until, tz, tools, progress)
    with _writing(to, overwrite) as write:
        for text in exporting.texts():
            write(text)
    return exporting.done


async def aexport(
    store: Store | pw.Database | str | None,
    to: Any,
    format: str = "jsonl",
    *,
    where: Where | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    tz: Any = "UTC",
    tools: Iterable[Any] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """`export`, from asyncio; `progress` is called on a thread."""
    store = as_store(store)
    return await store.off_the_loop(
        lambda: export(
            store,
            to,
            format,
            where=where,
            since=since,
            until=until,
            tz=tz,
            tools=tools,
            overwrite=overwrite,
            progress=progress,
        )
    )


def export_lines(
    store: Store | pw.Database | str | None,
    format: str = "jsonl",
    *,
    where: Where | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    tz: Any = "UTC",
    tools: Iterable[Any] = (),
    progress: Progress | None = None,
) -> Iterator[str]:
    """What `export` writes, piece by piece, each with the end of its line: for a response that is streamed.

    No transaction is open and no connection held while the reader takes its time.
    """
    return _Exporting(as_store(store), format, where, since, until, tz, tools, progress).texts()


class _Exporting:
    def __init__(
        self,
        store: Store,
        format: str,
        where: Where | None,
        since: Any,
        until: Any,
        tz: Any,
        tools: Iterable[Any],
        progress: Progress | None,
    ):
        if format not in FORMATS:
            raise InvalidValue(f"format={format!r}: it is one of {', '.join(map(repr, FORMATS))}")
        self.store, self.format, self.where, self.tz = store, format, where, zone(tz)
        self.since, self.until = span(since, until, self.tz)
        self.schemas = Toolbox(tools).schemas
        self.progress = progress
        self.counts = dict.fromkeys(Exported().as_dict(), 0)
        self.reader = _Reader(store, self._chat_conditions() if format != "csv" else [])
        if format == "csv" and "tool" in (where or {}):
            raise InvalidValue("export(): a request is not of one tool: leave 'tool' out of where")
        self.asked = request_conditions(store, "export()", where) if format == "csv" else ([], set())

    @property
    def done(self) -> Exported:
        return Exported(**self.counts)

    def texts(self) -> Iterator[str]:
        self.store.pay()
        yield from {"jsonl": self._jsonl, "openai": self._openai, "markdown": self._markdown, "csv": self._csv}[
            self.format
        ]()

    def _chat_conditions(self) -> list[Any]:
        chat: Any = self.store.records.chat
        found = chat_conditions(self.store, "export()", self.where) if self.where else []
        found += [chat.updated_at >= self.since] if self.since else []
        found += [chat.created_at < self.until] if self.until else []
        return found

    def _tell(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, max(done, total))

    # Every row

    def _jsonl(self) -> Iterator[str]:
        total = self.reader.count()
        columns = {
            name: {field.column_name: field.field_type for field in record._meta.sorted_fields}
            for name, record in vars(self.store.records).items()
        }
        header = {"llm_orm": FORMAT_VERSION, "exported_at": as_json(now()), "chats": total, "columns": columns}
        yield dumped(header, in_order=True) + "\n"
        for page in self.reader.pages():
            for chat in page.chats:
                yield self._line("chat", chat)
                for session in page.sessions.get(chat["id"], ()):
                    yield self._line("agent_session", session)
                messages = page.messages.get(chat["id"], [])
                for message in messages:
                    yield self._line("message", message)
                for file in (file for message in messages for file in page.files.get(message["id"], ())):
                    yield self._line("attachment", self.reader.with_content(file))
                for name, rows in (("tool_call", page.tool_calls), ("request", page.requests)):
                    for row in rows.get(chat["id"], ()):
                        yield self._line(name, row)
                self._tell(self.counts["chats"], total)
        if not self.where:
            for row in self.reader.requests_without_chat(self.since, self.until):
                yield self._line("request", row)
        written = {name: count for name, count in self.counts.items() if name != "left_out"}
        yield dumped({"end": written}) + "\n"

    def _line(self, table: str, row: Row) -> str:
        self.counts[f"{table}s"] += 1
        values = ", ".join(f"{dumped(name)}: {dumped(as_json(value))}" for name, value in row.items())
        return f'{{"table": "{table}", "row": {{{values}}}}}\n'

    # Fine-tuning

    def _openai(self) -> Iterator[str]:
        total, looked_at = self.reader.count(), 0
        for page in self.reader.pages():
            for chat in page.chats:
                rows = page.messages.get(chat["id"], [])
                kept = complete_turns(rows)
                messages = self._shown(chat, kept, page.tool_calls.get(chat["id"], ())) if kept else []
                self.counts["left_out"] += len(rows) - len(kept)
                looked_at += 1
                if messages:
                    self.counts["chats"] += 1
                    self.counts["messages"] += len(messages)
                    with_tools = self.schemas and any(message.get("tool_calls") for message in messages)
                    line = {"messages": messages} | ({"tools": self.schemas} if with_tools else {})
                    yield dumped(line, in_order=True) + "\n"
                self._tell(looked_at, total)

    def _shown(self, chat: Row, rows: Sequence[Row], calls: Iterable[Row]) -> list[Message]:
        names = ("id", "position", "role", "status", "content", "content_raw", "provider")
        results = {(call["message_id"], call["tool_call_id"]): call["result"] for call in calls}
        transcript = Transcript()
        transcript.add(
            [tuple(row[name] for name in names) for row in rows],
            lambda message_ids: {key: result for key, result in results.items() if result is not None},
            self.reader.files_of,
        )
        shown = transcript.shown(chat["instructions"], provider=OF_NO_PROVIDER)
        return [for_fine_tuning(message) for message in shown]

    # To be read

    def _markdown(self) -> Iterator[str]:
        total = self.reader.count()
        for ids in self.reader.ids():
            for chat_id in ids:
                told = chronicle(self.store, chat_id)
                if told is None:
                    continue  # deleted in this moment
                yield ("\n" if self.counts["chats"] else "") + as_markdown(told, self.tz)
                self.counts["chats"] += 1
                self._tell(self.counts["chats"], total)

    # Requests

    def _csv(self) -> Iterator[str]:
        own = self.store.chat_columns
        record: Any = self.store.records.request
        names = [field.column_name for field in record._meta.sorted_fields]
        yield csv_line([*names, "agent_class", *own])
        total = self.reader.count_requests(self._requests())
        for page in self.reader.pages_of_requests(self._requests()):
            for row, agent_class, columns in page:
                self.counts["requests"] += 1
                yield csv_line([*row, agent_class, *columns])
            self._tell(self.counts["requests"], total)

    def _requests(self) -> Sql:
        """FROM … WHERE …, of requests r."""
        found, needs = self.asked
        wheres = [Sql("1 = 1"), *found, *within(self.store, "r.created_at", self.since, self.until)]
        text = f"{joins(self.store, needs)} WHERE {' AND '.join(each.text for each in wheres)}"
        return Sql(text, tuple(value for each in wheres for value in each.params))


# Rows


@dataclass(frozen=True, slots=True)
class Page:
    """Some chats, and all that belongs to them, as it was at one moment; files without their content."""

    chats: list[Row]
    sessions: dict[UUID, list[Row]]
    messages: dict[UUID, list[Row]]
    """By chat, as are sessions, tool calls and requests; in order."""
    files: dict[UUID, list[Row]]
    """By message; in order."""
    tool_calls: dict[UUID, list[Row]]
    requests: dict[UUID, list[Row]]


class _Reader:
    """Reads chats in pages, by their ids, and each page in a transaction of its own."""

    def __init__(self, store: Store, conditions: list[Any]):
        self.store, self.conditions = store, conditions
        self.records: Any = store.records
        tables = ("agent_session", "attachment", "tool_call", "request")
        self.there = {name for name in tables if store.has_table(getattr(store.records, name))}

    def count(self) -> int:
        chat = self.records.chat
        return self.store.found(chat.select(pw.fn.COUNT(pw.SQL("*"))).where(EVERY, *self.conditions).tuples())[0][0]

    def pages(self) -> Iterator[Page]:
        for ids in self.ids():
            yield self.store.patiently(lambda ids=ids: self._page(ids))

    def ids(self) -> Iterator[list[UUID]]:
        """Of the chats, as many together as can be read together."""
        chat, message = self.records.chat, self.records.message
        many = message.select(pw.fn.COUNT(pw.SQL("*"))).where(message.chat == chat.id)
        many = many.alias("made_many")  # by the name of a column peewee would choose what reads its values
        last: list[Any] = []
        while True:
            query = chat.select(chat.id, many).where(EVERY, *self.conditions, *last).order_by(chat.id)
            found = self.store.found(query.limit(CHATS_AT_ONCE).tuples())
            yield from _grouped(found)
            if len(found) < CHATS_AT_ONCE:
                return
            last = [chat.id > found[-1][0]]

    def _page(self, ids: list[UUID]) -> Page:
        records = self.records
        message, file = records.message, records.attachment
        with snapshot(self.store):
            chats = self._rows(records.chat, records.chat.id.in_(ids), *self.conditions)
            messages = self._rows(message, message.chat.in_(ids), by=(message.chat, message.position))
            of_chats = message.select(message.id).where(message.chat.in_(ids))
            files: list[Row] = []
            if "attachment" in self.there:
                is_one, by = file.message.in_(of_chats), (file.message, file.position)
                files = self._rows(file, is_one, by=by, without=(BytesContent,))
            sessions, calls, requests = (
                self._rows(record, record.chat.in_(ids)) if name in self.there else []
                for name, record in (
                    ("agent_session", records.agent_session),
                    ("tool_call", records.tool_call),
                    ("request", records.request),
                )
            )
        return Page(
            chats,
            _by(sessions, "chat_id"),
            _by(messages, "chat_id"),
            _by(files, "message_id"),
            _by(calls, "chat_id"),
            _by(requests, "chat_id"),
        )

    def _rows(self, record: Any, *where: Any, by: Sequence[Any] = (), without: tuple[type, ...] = ()) -> list[Row]:
        chosen = [field for field in record._meta.sorted_fields if not isinstance(field, without)]
        names = [field.column_name for field in chosen]
        query = record.select(*chosen).where(EVERY, *where).order_by(*(by or (record.id,)))
        return [dict(zip(names, row, strict=True)) for row in query.tuples()]

    def with_content(self, file: Row) -> Row:
        """The row of a file with its content: NULL, as where files are not kept, if it was erased in this moment."""
        record = self.records.attachment
        held = [field for field in record._meta.sorted_fields if isinstance(field, BytesContent)]
        found = self.store.found(record.select(*held).where(record.id == file["id"]).tuples())
        values = found[0] if found else [None] * len(held)
        content = {field.column_name: value for field, value in zip(held, values, strict=True)}
        names = [field.column_name for field in record._meta.sorted_fields]
        return {name: content[name] if name in content else file[name] for name in names}

    def files_of(self, message_ids: list[UUID]) -> dict[UUID, list[Attachment]]:
        files: dict[UUID, list[Attachment]] = {}
        for message_id, *values in self.store.read(self.store.statements.attachments(message_ids)):
            media_type, filename, content, url, size, sha256 = values
            content = None if content is None else bytes(content)
            file = Attachment(media_type, filename, content, url, size=size, sha256=sha256)
            files.setdefault(as_uuid(message_id), []).append(file)
        return files

    def requests_without_chat(self, since: datetime | None, until: datetime | None) -> Iterator[Row]:
        record = self.records.request
        if "request" not in self.there:
            return
        conditions = [record.chat.is_null()]
        conditions += [record.created_at >= since] if since else []
        conditions += [record.created_at < until] if until else []
        names = [field.column_name for field in record._meta.sorted_fields]
        last: list[Any] = []
        while True:
            query = record.select().where(*conditions, *last).order_by(record.id).limit(REQUESTS_AT_ONCE)
            rows = [dict(zip(names, row, strict=True)) for row in self.store.found(query.tuples())]
            yield from rows
            if len(rows) < REQUESTS_AT_ONCE:
                return
            last = [record.id > rows[-1]["id"]]

    def count_requests(self, which: Sql) -> int:
        return self.store.read(Sql(f"SELECT COUNT(*) FROM {which.text}", which.params))[0][0]

    def pages_of_requests(self, which: Sql) -> Iterator[list[tuple[tuple, str | None, tuple]]]:
        """(request, its agent, the application's columns of its chat)"""
        records, param = self.records, self.store.database.param
        request, chat, session = records.request, records.chat, records.agent_session
        own = [getattr(chat, name) for name in self.store.chat_columns]
        agent = session.select(session.agent_class).where(session.chat == request.chat)
        agent = (agent if "agent_session" in self.there else pw.Value(None)).alias("made_agent")
        columns = list(request._meta.sorted_fields)
        last = UUID(int=0)
        while True:
            text = f"SELECT r.id FROM {which.text} AND r.id > {param} ORDER BY r.id LIMIT {REQUESTS_AT_ONCE}"
            ids = [as_uuid(row[0]) for row in self.store.read(Sql(text, (*which.params, last.hex)))]
            query = request.select(*columns, agent, *own).join(chat, pw.JOIN.LEFT_OUTER, on=(request.chat == chat.id))
            rows = self.store.found(query.where(request.id.in_(ids)).order_by(request.id).tuples()) if ids else []
            cut = len(columns)
            yield [(row[:cut], row[cut], row[cut + 1 :]) for row in rows]
            if len(ids) < REQUESTS_AT_ONCE:
                return
            last = ids[-1]


EVERY = pw.SQL("1 = 1")


def _grouped(found: Sequence[tuple[UUID, int]]) -> Iterator[list[UUID]]:
    ids: list[UUID] = []
    messages = 0
    for chat_id, many in found:
        if ids and messages + many > MESSAGES_AT_ONCE:
            yield ids
            ids, messages = [], 0
        ids.append(chat_id)
        messages += many
    if ids:
        yield ids


def _by(rows: Iterable[Row], column: str) -> dict[UUID, list[Row]]:
    found: dict[UUID, list[Row]] = {}
    for row in rows:
        found.setdefault(row[column], []).append(row)
    return found


# Files


@contextmanager
def _writing(to: Any, overwrite: bool) -> Iterator[Callable[[str], Any]]:
    """What writes text to a path or an open file. A path is there once the block has ended well."""
    if isinstance(to, str | os.PathLike):
        with _writing_path(Path(to), overwrite) as file:
            yield file.write
    elif hasattr(to, "write"):
        yield (lambda text: to.write(text.encode())) if _takes_bytes(to) else to.write
    else:
        raise InvalidValue(f"to={to!r}: export() writes to a path or an open file")


@contextmanager
def _writing_path(path: Path, overwrite: bool) -> Iterator[Any]:
    is_there = path.exists()
    if is_there and not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        with path.open("w", encoding="utf-8", newline="") as file:  # a pipe, a device
            yield file
        return
    _check_free(path, overwrite)
    path = Path(os.path.realpath(path))
    # Made by mkstemp for its owner alone, beside the target, so that it can take its place in one step.
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(number, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _check_free(path, overwrite)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _check_free(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise InvalidValue(f"{str(path)!r} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise InvalidValue(f"{str(path)!r} is there already: name another, or give overwrite=True")
    if not path.absolute().parent.is_dir():
        raise InvalidValue(f"{str(path)!r}: there is no folder {str(path.absolute().parent)!r}")


def _takes_bytes(file: Any) -> bool:
    if isinstance(file, io.TextIOBase):
        return False
    try:
        file.write(b"")
    except TypeError:
        return False
    return True

"""Our own JSONL, read line by line: each chat once it is there whole."""

import json
import tempfile
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from ..errors import InvalidValue
from ..store import Store
from .interchange import FORMAT_VERSION, Bad, Incoming, IncomingRow, Row

LONGEST_LINE = 256 * 1024 * 1024
"""Bytes. A longer line is passed over, and its chat with it; no more than this is ever read at once."""

ROWS_AT_ONCE = 200

IN_MEMORY = 8 * 1024 * 1024
"""Of the lines of one chat; more of them wait in a temporary file until the chat is there whole."""


class Lines:
    """The lines of a file, each bounded, and numbered from 1; the first can be looked at before."""

    def __init__(self, file: Any):
        self.file = file
        self.number = 0
        self._first: bytes | None = self._read()

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        """(number, line), less the empty ones; None for one that is too long."""
        line, self._first = self._first, b""
        while line != b"":
            self.number += 1
            if line is None or line.strip():
                yield self.number, line
            line = self._read()

    def format(self) -> str:
        """ "jsonl" or "openai"; raises `InvalidValue`."""
        try:
            first = json.loads(self._first or b"")
        except ValueError:
            first = None
        if isinstance(first, dict) and "llm_orm" in first:
            return "jsonl"
        if isinstance(first, dict) and "messages" in first:
            return "openai"
        if not self._first:
            raise InvalidValue("it is empty: there is nothing to import")
        raise InvalidValue(
            f"it begins with {(self._first or b'')[:40].decode(errors='replace')!r}, which is neither the first line "
            'of an export() in "jsonl" nor a chat of OpenAI\'s, {"messages": […]}; nor a file of SQLite'
        )

    def _read(self) -> bytes | None:
        line = self._piece()
        if len(line) < LONGEST_LINE or line.endswith(b"\n"):
            return line
        while line and not line.endswith(b"\n"):
            line = self._piece()
        return None

    def _piece(self) -> bytes:
        line = self.file.readline(LONGEST_LINE)
        return line.encode(errors="surrogatepass") if isinstance(line, str) else line


def parsed(number: int, line: bytes | None) -> dict[str, Any]:
    """The JSON object of a line; raises `Bad`."""
    where = f"line {number}"
    if line is None:
        raise Bad(where, f"it is longer than {LONGEST_LINE // 2**20} MiB")
    try:
        read = json.loads(line, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise Bad(where, f"it is not in UTF-8: {error.reason}") from error
    except RecursionError:
        raise Bad(where, "it is nested too deeply") from None
    except ValueError as error:
        raise Bad(where, f"it is not JSON: {error}") from error
    if not isinstance(read, dict):
        raise Bad(where, "it is not a JSON object")
    return read


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


class Ours:
    """What `export` wrote: the header, then each chat followed by its rows, then requests of no chat, then the end."""

    def __init__(self, store: Store, lines: Lines):
        self.lines = iter(lines)
        try:
            header = parsed(*next(self.lines, (1, b"")))
        except Bad as bad:
            raise InvalidValue(f'it is no export() in "jsonl": {bad.where}: {bad.reason}') from bad
        if header.get("llm_orm") != FORMAT_VERSION:
            raise InvalidValue(
                f"its format is version {header.get('llm_orm')!r}, and this llm_orm reads version {FORMAT_VERSION}: "
                "import it with the llm_orm that wrote it, or a newer one"
            )
        total = header.get("chats")
        self.total = total if isinstance(total, int) else None
        self._check_columns(store, header.get("columns"))
        self.is_ended = False

    def _check_columns(self, store: Store, columns: Any) -> None:
        said = columns if isinstance(columns, dict) else {}
        unknown = [
            f"{table}.{name}"
            for table, record in vars(store.records).items()
            for name in (said[table] if isinstance(said.get(table), dict | list) else ())
            if name not in record._meta.columns
        ]
        if unknown:
            raise InvalidValue(
                f"the file has columns that the store does not have: {', '.join(unknown)}; give them to connect(…, "
                "chat_fields=…) or models=…, and make them in the tables; on the command line: "
                "llm-orm migrate --store MODULE:NAME, then import with that --store; nothing was imported"
            )

    def chats(self) -> Iterator[Incoming]:
        waiting: _Lot | None = None
        try:
            for number, line in self.lines:
                where = f"line {number}"
                try:
                    read = parsed(number, line)
                    kind = "end" if "end" in read else read.get("table")
                    if kind == "end":
                        self.is_ended = True
                        break
                    row = _row(where, kind, read)
                    if _begins_anew(waiting, kind, row):
                        yield from _given(waiting)
                        waiting = _lot(where, kind, row)
                    if waiting is None:
                        raise Bad(where, f"the {kind} is of no chat: the line of its chat must come before it")
                    waiting.add(number, line or b"")
                except Bad as bad:
                    if waiting is None:
                        yield Incoming(where, problem=bad)
                    else:
                        waiting.problem = waiting.problem or bad
            if waiting is not None and waiting.chat_id is not None and not self.is_ended:
                cut = Bad(waiting.where, "the file was cut off: it ends behind this chat, without its last line")
                waiting.problem = waiting.problem or cut
            yield from _given(waiting)
        finally:
            if waiting is not None:
                waiting.file.close()


def _given(lot: "_Lot | None") -> Iterator[Incoming]:
    if lot is not None:
        try:
            yield lot.incoming()
        finally:
            lot.file.close()


OF_CHAT = ("agent_session", "message", "attachment", "tool_call", "request")


def _row(where: str, kind: Any, read: dict[str, Any]) -> Row:
    if kind not in ("chat", *OF_CHAT):
        raise Bad(where, f"its table is {str(kind)[:60]!r}: it is one of chat, {', '.join(OF_CHAT)}")
    if not isinstance(read.get("row"), dict):
        raise Bad(where, 'it has no "row": an object')
    return read["row"]


def _lot(where: str, kind: Any, row: Row) -> "_Lot | None":
    if kind != "chat":
        return _Lot(where, None) if kind == "request" and row.get("chat_id") is None else None
    try:
        return _Lot(where, UUID(row["id"]))
    except (KeyError, AttributeError, TypeError, ValueError):
        lot = _Lot(where, UUID(int=0))
        lot.problem = Bad(where, f"{str(row.get('id'))[:60]!r} is not the id of a chat")
        return lot


def _begins_anew(waiting: "_Lot | None", kind: Any, row: Row) -> bool:
    """Whether the row is not of those that wait: of a new chat, or of none."""
    if kind == "chat":
        return True
    if kind != "request" or row.get("chat_id") is not None:
        return waiting is not None and waiting.chat_id is None
    return waiting is None or waiting.chat_id is not None or len(waiting.numbers) >= ROWS_AT_ONCE


class _Lot:
    """The lines of one chat, or of requests of none, until they are there whole."""

    def __init__(self, where: str, chat_id: UUID | None):
        self.where, self.chat_id = where, chat_id
        self.problem: Bad | None = None
        self.numbers: list[int] = []
        self.file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115

    def add(self, number: int, line: bytes) -> None:
        if self.problem is None:
            self.numbers.append(number)
            self.file.write(line if line.endswith(b"\n") else line + b"\n")

    def incoming(self) -> Incoming:
        pieces = self._pieces if self.chat_id is None and len(self.numbers) > 1 else None
        return Incoming(self.where, self.chat_id, self._rows, self.problem, pieces)

    def _pieces(self) -> Iterator[Incoming]:
        for row in self._rows():
            yield Incoming(row.where, None, lambda row=row: [row])

    def _rows(self) -> Iterator[IncomingRow]:
        self.file.seek(0)
        messages: set[str] = set()
        positions: set[str] = set()
        for number, line in zip(self.numbers, self.file, strict=True):
            read = parsed(number, line)
            table, values, where = read["table"], read["row"], f"line {number}"
            if self.chat_id is not None:
                self._check(where, table, values, messages, positions)
            yield IncomingRow(where, table, values)

    def _check(self, where: str, table: str, row: Row, messages: set[str], positions: set[str]) -> None:
        """That it is of this chat: what it names must not be another's that is there already."""
        if "chat_id" in row and row["chat_id"] != str(self.chat_id):
            raise Bad(where, f"the {table} is of chat {str(row['chat_id'])[:60]!r}, and stands behind {self.chat_id}")
        if table == "message":
            position = str(row.get("position"))
            if position in positions:
                raise Bad(where, f"two messages of the chat have the position {position[:60]}")
            messages.add(str(row.get("id")))
            positions.add(position)
        elif row.get("message_id") is not None and str(row["message_id"]) not in messages:
            raise Bad(where, f"the {table} names the message {str(row['message_id'])[:60]!r}, which is not in its chat")

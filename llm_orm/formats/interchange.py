"""What export and import share: the version of the format, a moment to read at, and a chat on its way in."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from ..store import Store

FORMAT_VERSION = 1
"""Of our JSONL; the first line says it."""

Row = dict[str, Any]
"""A row by the names of its columns."""

Progress = Callable[[int, int | None], Any]
"""Called with the chats (of "csv": requests) that are done, and how many there are, None where nobody knows."""

NAMESPACE = UUID("8d3f5bb4-5f0e-5a52-9d3a-6d4f2f0f6c1e")
"""Of the ids that are made of what a source says, so that importing twice imports once."""


@contextmanager
def snapshot(store: Store) -> Iterator[None]:
    """A transaction that only reads, and sees the database as it was at one moment; in one of the caller's, that."""
    with store.connection():
        if store.database.in_transaction():
            yield
            return
        with store.database.atomic():
            if not store.is_sqlite:
                store.database.execute_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            yield


class Bad(Exception):
    """Something of a chat that does not fit, for which the chat is skipped.

    where    "line 17", or a table and an id; None: wherever its chat is
    """

    def __init__(self, where: str | None, reason: str):
        super().__init__(reason)
        self.where = where
        self.reason = reason


@dataclass(frozen=True, slots=True)
class IncomingRow:
    where: str
    table: str
    """"chat", "message", …: as the store's records are named."""
    values: Row
    """Of Python, or of JSON."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A chat on its way in; or rows that are of no chat, with no id.

    rows       its rows, in an order in which they can be inserted, as often as they are asked for
    problem    why it cannot come in
    pieces     of rows of no chat: each by itself
    """

    where: str
    chat_id: UUID | None = None
    rows: Callable[[], Iterable[IncomingRow]] = field(default=tuple)
    problem: Bad | None = None
    pieces: Callable[[], Iterable["Incoming"]] | None = None

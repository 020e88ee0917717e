"""Content that is there, sealed anew with the first key: in short transactions, while turns run.

A row is read, and written only if it still holds what was read. What is sealed with the first key already is passed
over, so a rotation that was broken off is begun again.
"""

import copy
import json
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from .encryption import Cipher
from .errors import TryAgain, WrongKey
from .records import BytesContent, Content, JSONContent
from .statements import Sql
from .values import as_uuid

ROWS_AT_ONCE = 100
"""Read and written together. Of files one: each may have megabytes."""

MOST_TRIES = 20
"""How often a row is read again that a turn has written in the meantime."""

HEAD = 64
"""A token differs from every other within so many bytes, and files are not changed in place."""


@dataclass(frozen=True, slots=True)
class Rotated:
    """What `Store.rotate_keys` found in one table.

    table         its name
    rows          how many there are
    changed       those that were written anew, or would be: clear ones, and those of an older key
    unreadable    the ids of those that none of the keys opens; they stay as they are
    """

    table: str
    rows: int
    changed: int
    unreadable: tuple[UUID, ...]


def rotate(store: Any, *, check: bool, decrypt: bool) -> list[Rotated]:
    """Rotate every table of a store that has content; see `Store.rotate_keys`."""
    return [_Table(store, record, check, decrypt).rotate() for record in store.records if _content_of(record)]


class _Table:
    def __init__(self, store: Any, record: Any, check: bool, decrypt: bool):
        self.store = store
        self.is_check = check
        self.param = store.statements.param
        self.name = record._meta.table_name
        self.fields = _content_of(record)
        self.writers = [copy.copy(field) for field in self.fields]
        for writer in self.writers:
            writer.cipher = Cipher() if decrypt else writer.cipher
        self.rows, self.changed = 0, 0
        self.unreadable: dict[UUID, None] = {}

    def rotate(self) -> Rotated:
        at_once = 1 if any(isinstance(field, BytesContent) for field in self.fields) else ROWS_AT_ONCE
        last, more = UUID(int=0), True
        while more:
            found = self._read(f"id > {self.param} ORDER BY id LIMIT {at_once}", last.hex)
            more = len(found) == at_once
            if found:
                last = as_uuid(found[-1][0])
                self.rows += len(found)
                self._write(found)
        return Rotated(self.name, self.rows, self.changed, tuple(self.unreadable))

    def _read(self, where: str, *params: Any) -> list[tuple]:
        columns = ", ".join(map(_compared, self.fields))
        return self.store.read(Sql(f'SELECT id, {columns} FROM "{self.name}" WHERE {where}', params))

    def _write(self, rows: list[tuple]) -> None:
        updates = {as_uuid(row[0]): update for row in rows if (update := self._update(row)) is not None}
        written: set[UUID] = set(updates)
        if updates and not self.is_check:
            with self.store.transaction():
                written = {row_id for row_id in self._free(list(updates)) if self.store.read(updates[row_id])}
        self.changed += len(written)
        for row_id in updates.keys() - written:
            self._write_alone(row_id)

    def _free(self, ids: list[UUID]) -> list[UUID]:
        """Those that nobody is writing at this moment: who waits for a row with others locked may wait for ever."""
        if self.store.is_sqlite:
            return ids
        marks = ", ".join([self.param] * len(ids))
        text = f'SELECT id FROM "{self.name}" WHERE id IN ({marks}) ORDER BY id FOR NO KEY UPDATE SKIP LOCKED'
        return [as_uuid(row[0]) for row in self.store.read(Sql(text, tuple(row_id.hex for row_id in ids)))]

    def _write_alone(self, row_id: UUID) -> None:
        for _ in range(MOST_TRIES):
            found = self._read(f"id = {self.param}", row_id.hex)
            update = self._update(found[0]) if found else None
            if update is None:
                return  # deleted, or sealed by a turn
            if self.store.transact(update):
                self.changed += 1
                return
        raise TryAgain(f"row {row_id} of {self.name} is written all the time: rotate again")

    def _update(self, row: tuple) -> Sql | None:
        """What writes a row anew if it holds what was read; None where there is nothing to write."""
        row_id, *values = row
        texts: list[str] = []
        params: list[Any] = []
        conditions: list[str] = [f"id = {self.param}"]
        compared: list[Any] = [as_uuid(row_id).hex]
        for field, writer, stored in zip(self.fields, self.writers, values, strict=True):
            if stored is None:
                continue
            try:
                anew = _anew(field, writer, stored)
            except WrongKey:
                self.unreadable[as_uuid(row_id)] = None
                continue
            if anew is None:
                continue
            texts.append(f'"{field.column_name}" = {self.param}')
            params.append(anew)
            if isinstance(field, BytesContent):
                column = f'"{field.column_name}"'
                conditions.append(f"length({column}) = {self.param} AND substr({column}, 1, {HEAD}) = {self.param}")
                compared += [len(stored), bytes(stored[:HEAD])]
            else:
                conditions.append(f"{_compared(field)} = {self.param}")
                compared.append(stored)
        text = f'UPDATE "{self.name}" SET {", ".join(texts)} WHERE {" AND ".join(conditions)} RETURNING id'
        return Sql(text, (*params, *compared)) if texts else None


def _content_of(record: Any) -> list[Any]:
    return [field for field in record._meta.sorted_fields if isinstance(field, Content)]


def _compared(field: Any) -> str:
    # JSON as text: what PostgreSQL makes of a document may not be what Python would write for it.
    column = f'"{field.column_name}"'
    return f"CAST({column} AS TEXT)" if isinstance(field, JSONContent) else column


def _anew(field: Any, writer: Any, stored: Any) -> Any:
    """What is to be in the place of what is stored; None where that is as it should be. Raises `WrongKey`."""
    is_json = isinstance(field, JSONContent)
    held = json.loads(stored) if is_json else bytes(stored) if isinstance(field, BytesContent) else stored
    if isinstance(held, str | bytes) and writer.cipher.is_current(held):
        return None
    anew = writer.sealed(field.unsealed(held))
    if anew == held:
        return None
    return json.dumps(anew) if is_json else anew

"""Writing history that no turn made: single messages, and copies of a whole chat."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any
from uuid import UUID

import peewee as pw

from .attachments import reference_only
from .checks import as_key, clear_about, said_text
from .errors import ChatBusy, ChatGone, InvalidValue
from .records import LlmAgentSession, LlmChat, LlmMessage, Record, now, uuid7
from .stopped import pending_message
from .store import Store
from .values import Attachment

ROLES = ("user", "assistant", "system")

MOST_TRIES = 20
"""How often a message is written again whose place another took at the same moment."""

ROWS_AT_ONCE = 200
"""How many rows a statement copies: SQLite takes some 32,000 values in one."""


def add_message(
    store: Store, chat_id: UUID, role: str, content: str, files: Sequence[Attachment], *, keeps_files: bool = True
) -> LlmMessage:
    if role not in ROLES:
        why = "; a tool's result belongs to its call, which only a turn makes" if role == "tool" else ""
        raise InvalidValue(f"role={role!r}: a message is of {', '.join(map(repr, ROLES))}{why}")
    if files and role != "user":
        raise InvalidValue(f"files come with messages of the user, not with role={role!r}")
    text = said_text(content, may_be_empty=bool(files))
    kept = [file if keeps_files else reference_only(file) for file in files]
    sql, records, time = store.statements, store.records, now()
    row: dict[str, Any] = {"id": uuid7(), "chat_id": chat_id, "position": sql.next_idle_position(chat_id), "role": role}
    row |= {"status": "completed", "content": text or None, "created_at": time, "updated_at": time}
    if kept:
        row["content_raw"] = {"attachments": len(kept)}
    statements = [sql.insert(records.message, row), *sql.insert_files(row["id"], kept)]
    statements.append(sql.update(records.chat, {"updated_at": time}, id=chat_id))
    with store.connection():
        for tries in itertools.count(1):
            try:
                # Where it is refused within a transaction of the caller's, that one goes on.
                with store.database.atomic() if store.database.in_transaction() else nullcontext():
                    store.transact(*statements)
                break
            except pw.IntegrityError as error:
                problem = _why_not(store, chat_id)
                if problem is not None:
                    raise problem from error
                if tries == MOST_TRIES:
                    raise  # it is not another message that is in the way
        return records.message.get_by_id(row["id"])


def _why_not(store: Store, chat_id: UUID) -> Exception | None:
    """What was in the way; None where it was another message, written at the same moment."""
    if not store.read(store.statements.chat_exists(chat_id)):
        return ChatGone(f"there is no chat {chat_id}: it was deleted")
    if pending_message(store, chat_id) is not None:
        return ChatBusy(
            f"chat {chat_id} is busy with a turn, or has one that waits for approval; its reply comes first: try "
            "again when it has ended; one whose process died is cleared by the next ask()"
        )
    return None


def fork(
    store: Store, chat: LlmChat, at: Any, copies_tool_calls: bool, session: LlmAgentSession | None = None
) -> LlmChat:
    """A new chat's row, with copies of the settled messages up to one, their tool calls and files; one transaction."""
    records: Any = store.records
    message, chat_id = records.message, uuid7()
    with store.transaction():
        original = _there(records.chat, chat.id, "chat")
        own = _there(records.agent_session, session.id, "session") if session is not None else None
        rows = list(
            message.select()
            .where(message.chat == chat.id, message.status != "pending")
            .order_by(message.position)
            .dicts()
        )
        rows = rows[: _index(rows, at, chat.id) + 1]
        copy = _columns(records.chat, original, id=chat_id, created_at=now(), updated_at=now())
        with clear_about("fork()", {name: original[name] for name in store.chat_columns}):
            records.chat.insert(copy).execute()
        if own is not None:
            again = _columns(records.agent_session, own, id=uuid7(), chat_id=chat_id, created_at=now())
            records.agent_session.insert({**again, "updated_at": now()}).execute()
        ids = {row["id"]: uuid7() for row in rows}
        _copy_messages(store, rows, ids, chat_id)
        if copies_tool_calls:
            _copy_tool_calls(store, ids, chat_id)
        _copy_files(store, ids)
    with store.connection():
        return records.chat.get_by_id(chat_id)


def _there(record: Any, row_id: UUID, what: str) -> dict[str, Any]:
    found = record.get_or_none(record.id == row_id)
    if found is None:
        raise ChatGone(f"there is no {what} {row_id}: it was deleted")
    return found.__data__


def _copy_messages(store: Store, rows: list[dict[str, Any]], ids: dict[UUID, UUID], chat_id: UUID) -> None:
    # What they cost was spent in the chat that they come from.
    spent = dict.fromkeys(("input_tokens", "output_tokens", "cached_tokens", "thinking_tokens"))
    own = {"chat_id": chat_id, "request_key": None, "owner": None, **spent}
    record = store.records.message
    _insert(store, record, [_columns(record, row, id=ids[row["id"]], **own) for row in rows])


def _copy_tool_calls(store: Store, ids: dict[UUID, UUID], chat_id: UUID) -> None:
    record: Any = store.records.tool_call
    for some in _in_pieces(list(ids)):
        rows = record.select().where(record.message.in_(some)).order_by(record.id).dicts()
        copies = []
        for row in rows:
            turn = ids.get(row["turn_id"], row["turn_id"])
            own = {"id": uuid7(), "chat_id": chat_id, "message_id": ids[row["message"]], "turn_id": turn}
            copies.append(_columns(record, row, **own))
        _insert(store, record, copies)


def _copy_files(store: Store, ids: dict[UUID, UUID]) -> None:
    record: Any = store.records.attachment
    for some in _in_pieces(list(ids)):
        found = list(record.select(record.id, record.message).where(record.message.in_(some)).tuples())
        for rows in _in_pieces(found):
            copies = (store.statements.copy(record, row, id=uuid7(), message_id=ids[of]) for row, of in rows)
            store.transact(*copies)


def _insert(store: Store, record: type[Record], rows: list[dict[str, Any]]) -> None:
    for some in _in_pieces(rows):
        store.transact(store.statements.insert(record, *some))


def _in_pieces(items: list[Any]) -> Iterator[list[Any]]:
    return (items[start : start + ROWS_AT_ONCE] for start in range(0, len(items), ROWS_AT_ONCE))


def _columns(record: Any, row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A row by the names of its columns, some of them changed."""
    return {field.column_name: row[field.name] for field in record._meta.sorted_fields} | changes


def _index(rows: list[dict[str, Any]], at: Any, chat_id: UUID) -> int:
    if at is None:
        return len(rows) - 1
    key = at.id if isinstance(at, LlmMessage) else None if isinstance(at, int) else as_key(at)
    for index, row in enumerate(rows):
        if row["id"] == key or (isinstance(at, int) and not isinstance(at, bool) and row["position"] == at):
            return index
    raise InvalidValue(f"at={key or at!r}: chat {chat_id} has no such message that is settled; see chat.messages()")

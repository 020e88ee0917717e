"""Writing history that no turn made: single messages, and copies of a whole chat."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import peewee as pw

from .attachments import reference_only
from .checks import as_key, said_text
from .errors import ChatBusy, ChatGone, InvalidValue
from .records import LlmAgentSession, LlmChat, LlmMessage, now, uuid7
from .store import Store
from .values import Attachment

ROLES = ("user", "assistant", "system")


def add_message(
    store: Store, chat_id: UUID, role: str, content: str, files: Sequence[Attachment], *, keeps_files: bool = True
) -> LlmMessage:
    if role not in ROLES:
        why = "; a tool's result belongs to its call, which only a turn makes" if role == "tool" else ""
        raise InvalidValue(f"role={role!r}: a message is of {', '.join(map(repr, ROLES))}{why}")
    if files and role != "user":
        raise InvalidValue(f"files come with messages of the user, not with role={role!r}")
    text = said_text(content, may_be_empty=bool(files))
    sql, records, time = store.statements, store.records, now()
    row: dict[str, Any] = {"id": uuid7(), "chat_id": chat_id, "position": sql.next_position(chat_id), "role": role}
    row |= {"status": "completed", "content": text or None, "created_at": time, "updated_at": time}
    if files:
        row["content_raw"] = {"attachments": len(files)}
    kept = [file if keeps_files else reference_only(file) for file in files]
    statements = [sql.insert(records.message, row), *sql.insert_files(row["id"], kept)]
    _check_idle(store, chat_id)
    try:
        store.transact(*statements, sql.update(records.chat, {"updated_at": time}, id=chat_id))
    except pw.IntegrityError as error:
        raise _nobody_there(store, chat_id) from error
    with store.connection():
        return records.message.get_by_id(row["id"])


def fork(
    store: Store, chat: LlmChat, at: Any, copies_tool_calls: bool, session: LlmAgentSession | None = None
) -> LlmChat:
    """A new chat's row, with copies of the settled messages up to one, their tool calls and files; one transaction."""
    records: Any = store.records
    with store.connection(), store.database.atomic("IMMEDIATE") if store.is_sqlite else store.database.atomic():
        message = records.message
        rows = list(
            message.select().where(message.chat == chat.id, message.status != "pending").order_by(message.position)
        )
        rows = rows[: _index(rows, at, chat.id) + 1]
        ids = {row.id: uuid7() for row in rows}
        copy = _copied(chat, id=uuid7(), created_at=now(), updated_at=now())
        records.chat.insert(copy).execute()
        if session is not None:
            again = _copied(session, id=uuid7(), chat=copy["id"], created_at=now(), updated_at=now())
            records.agent_session.insert(again).execute()
        for row in rows:
            # What they cost was spent in the chat that they come from.
            spent = dict.fromkeys(("input_tokens", "output_tokens", "cached_tokens", "thinking_tokens"))
            message.insert(_copied(row, id=ids[row.id], chat=copy["id"], request_key=None, **spent)).execute()
        tables = [records.attachment, *([records.tool_call] if copies_tool_calls else [])]
        for table in tables if ids else ():
            for row in table.select().where(table.message.in_(list(ids))):
                values = _copied(row, id=uuid7(), message=ids[row.message_id])
                if table is records.tool_call:
                    values |= {"chat": copy["id"], "turn_id": ids.get(row.turn_id, row.turn_id)}
                table.insert(values).execute()
    with store.connection():
        return records.chat.get_by_id(copy["id"])


def _copied(row: pw.Model, **changes: Any) -> dict[str, Any]:
    return {**row.__data__, **changes}


def _index(rows: list[LlmMessage], at: Any, chat_id: UUID) -> int:
    if at is None:
        return len(rows) - 1
    key = at.id if isinstance(at, LlmMessage) else None if isinstance(at, int) else as_key(at)
    for index, row in enumerate(rows):
        if row.id == key or (isinstance(at, int) and not isinstance(at, bool) and row.position == at):
            return index
    raise InvalidValue(f"at={key or at!r}: chat {chat_id} has no such message that is settled; see chat.messages()")


def _check_idle(store: Store, chat_id: UUID) -> None:
    if store.read(store.statements.pending_message(chat_id)):
        raise ChatBusy(f"chat {chat_id} is busy with a turn, whose reply comes first: try again when it has ended")


def _nobody_there(store: Store, chat_id: UUID) -> Exception:
    if not store.read(store.statements.chat_exists(chat_id)):
        return ChatGone(f"there is no chat {chat_id}: it was deleted")
    return ChatBusy(f"another message of chat {chat_id} was written at this moment: try again")

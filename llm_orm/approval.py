"""What a person says to a turn: that a tool call may run, that it may not, or that the turn is to end."""

from typing import Any
from uuid import UUID

from .checks import as_key, check_storable
from .errors import InvalidValue
from .records import LlmToolCall, now
from .statements import Sql
from .store import Store
from .values import as_uuid


def pending_approvals(store: Store, chat_id: UUID) -> list[LlmToolCall]:
    record: Any = store.records.tool_call
    waiting = record.select().where(record.chat == chat_id, record.approval == "required", record.status == "pending")
    with store.connection():
        return list(waiting.order_by(record.created_at, record.round, record.position))


def approve(store: Store, chat_id: UUID, given: Any) -> LlmToolCall:
    return _decide(store, chat_id, given, {"approval": "approved"})


def deny(store: Store, chat_id: UUID, given: Any, reason: str | None) -> LlmToolCall:
    if reason is not None and not isinstance(reason, str):
        raise InvalidValue(f"the reason must be a string, not {type(reason).__name__}")
    check_storable("the reason", reason or "")
    call = _waiting(store, chat_id, given)
    told = f"The user denied the {call.name} tool call." + (f" Reason: {reason}" if reason else "")
    denied = {
        "approval": "denied",
        "status": "rejected",
        "result": told,
        "error": reason or "denied",
        "finished_at": now(),
    }
    return _decide(store, chat_id, call, denied)


def _decide(store: Store, chat_id: UUID, given: Any, columns: dict[str, Any]) -> LlmToolCall:
    call = _waiting(store, chat_id, given)
    record: Any = store.records.tool_call
    with store.connection():
        decided = record.update(columns).where(
            record.id == call.id, record.approval == "required", record.status == "pending"
        )
        if not decided.execute():
            raise InvalidValue(f"the tool call {call.id} was decided by another at this moment")
        return record.get_by_id(call.id)


def _waiting(store: Store, chat_id: UUID, given: Any) -> LlmToolCall:
    """The call that is meant: by its row, its id, or the name that the model gave it."""
    key = given.id if isinstance(given, LlmToolCall) else as_key(given)
    waiting = pending_approvals(store, chat_id)
    for call in waiting:
        if call.id == key or call.tool_call_id == given:
            return call
    names = ", ".join(f"{call.name} ({call.id})" for call in waiting)
    raise InvalidValue(f"no tool call {key or given!r} of this chat waits for approval; waiting: {names or 'none'}")


def cancel(store: Store, chat_id: UUID, on_error: str, stores_tool_calls: bool) -> bool:
    """Ask the running turn to end, or end the one that waits for approval; whether there was one."""
    sql, message = store.statements, store.records.message
    pending = store.read(sql.pending_message(chat_id))
    if not pending:
        return False
    message_id, _, parked = pending[0]
    ours = {"id": as_uuid(message_id), "status": "pending"}
    if parked is None:
        asked = store.transact(sql.update(message, {"cancelled_at": now()}, returning="id", **ours))
        store.heart.cancel(as_uuid(message_id))
        return bool(asked)
    ours["parked_at"] = Sql(sql.param, (parked,))
    statements = [sql.interrupt_tool_calls(**ours)] if stores_tool_calls else []
    if on_error == "keep":
        ended = {"status": "incomplete", "parked_at": None, "updated_at": now()}
        statements.append(sql.update(message, ended, returning="id", **ours))
    else:
        statements.append(sql.delete(message, returning="id", **ours))
    return bool(store.transact(*statements))

"""What a person says to a turn: that a tool call may run, that it may not, or that the turn is to end."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

from .checks import as_key, check_storable
from .errors import InvalidValue
from .heart import BEAT_EVERY_S
from .options import Options
from .records import LlmToolCall, now
from .stopped import age_of, end, mark_of, pending_message
from .store import Store
from .values import storable


def pending_approvals(store: Store, chat_id: UUID) -> list[LlmToolCall]:
    record: Any = store.records.tool_call
    waiting = record.select().where(record.chat == chat_id, record.approval == "required", record.status == "pending")
    return store.found(waiting.order_by(record.created_at, record.round, record.position))


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
    record: Any = store.records.tool_call
    meant = record.id == key if key else record.tool_call_id == storable(str(given))
    with store.connection():
        decided = record.get_or_none((record.chat == chat_id) & meant & record.approval.in_(("approved", "denied")))
    if decided is not None:
        raise InvalidValue(f"the tool call {decided.name} ({decided.id}) was {decided.approval} already")
    names = ", ".join(f"{call.name} ({call.id})" for call in waiting)
    raise InvalidValue(f"no tool call {key or given!r} of this chat waits for approval; waiting: {names or 'none'}")


def cancel(
    store: Store,
    chat_id: UUID,
    options: Options,
    kept: Callable[[str], str] = lambda arguments: arguments,
) -> bool:
    """Ask the running turn to end, or end the one that waits for approval, or is dead; whether there was one.

    kept    what the database is to keep of the arguments of tool calls that will not run
    """
    sql = store.statements
    message = pending_message(store, chat_id)
    if message is None:
        return False
    # One that was alive a moment ago gets to say so itself, whatever counts as dead.
    if message.parked_at is None and age_of(message.updated_at) < max(options.stale_after, 2 * BEAT_EVERY_S):
        ours = {"id": message.id, "status": "pending"}
        asked = store.transact(
            sql.update(store.records.message, {"cancelled_at": now()}, returning="parked_at", **ours)
        )
        if asked and asked[0][0] is not None:  # it was parked at this moment
            return cancel(store, chat_id, options, kept)
        store.heart.cancel(message.id)
        return bool(asked)
    outcome = end(
        store,
        message,
        keep=options.on_error == "keep",
        kept=kept,
        stores_tool_calls=options.stores_tool_calls,
        stores_requests=options.stores_requests,
    )
    if outcome is not None:
        return True
    found = pending_message(store, chat_id)  # the turn that was seen was taken up, or has ended, at this moment
    return found is not None and mark_of(found) != mark_of(message) and cancel(store, chat_id, options, kept)

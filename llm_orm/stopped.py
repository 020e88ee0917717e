"""A turn that stopped without an end: what its rows say of it, and how it is ended where nobody goes on with it."""

from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

from .records import LlmMessage, LlmToolCall, TimeField, now, uuid7
from .statements import DIED, Sql
from .store import Store
from .values import as_uuid

FAILED = ("failed", "incomplete")
"""The status of an answer that was kept, and may be asked for again."""

TOKENS = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "thinking_tokens")


def age_of(seen: Any) -> float:
    """Seconds since a sign of life. The clocks of two machines differ: one from the future is one from now."""
    return max((now() - TimeField().python_value(seen)).total_seconds(), 0.0)


def pending_message(store: Store, chat_id: UUID) -> LlmMessage | None:
    record: Any = store.records.message
    found = store.found(record.select().where(record.chat == chat_id, record.status == "pending").limit(1))
    return found[0] if found else None


def calls_of(store: Store, message_id: UUID) -> list[LlmToolCall]:
    record: Any = store.records.tool_call
    return store.found(record.select().where(record.message == message_id).order_by(record.round, record.position))


def rounds_of(message: LlmMessage) -> list[dict[str, Any]]:
    return (message.content_raw or {}).get("rounds") or []


def is_whole(message: LlmMessage) -> bool:
    """Whether the reply of a pending message is there, and was only to be looked at."""
    rounds = rounds_of(message)
    is_asking = bool(rounds and rounds[-1].get("tool_calls"))
    return bool(rounds or message.content) and not is_asking and not is_partial(message)


def is_partial(message: LlmMessage) -> bool:
    """Whether the text of a pending message is what `save_every` kept of a stream."""
    return bool((message.content_raw or {}).get("partial"))


def is_sent_back(message: LlmMessage) -> bool:
    """Whether the reply of a pending message was not good enough, and the model is asked for another."""
    return "sent_back" in (message.content_raw or {})


def next_round(message: LlmMessage, calls: list[LlmToolCall]) -> int:
    """Which call of the model would come next."""
    if is_sent_back(message):
        return message.content_raw["sent_back"]
    said = len(rounds_of(message)) or int(is_whole(message))
    return max((call.round for call in calls), default=said - 1) + 1


def was_calling(message: LlmMessage, calls: list[LlmToolCall]) -> bool:
    """Whether a call of the model may have been under way when the process died."""
    if message.parked_at is not None or any(call.status in ("pending", "running") for call in calls):
        return False
    return not is_whole(message) or is_sent_back(message)


def mark_of(message: LlmMessage) -> dict[str, Any]:
    """What tells that the turn is as it was seen: another who took it has changed it."""
    name: str = "updated_at" if message.parked_at is None else "parked_at"
    return {"id": message.id, "status": "pending", name: getattr(message, name)}


def taken(store: Store, message: LlmMessage, calls: list[LlmToolCall], stores_requests: bool) -> list[Sql]:
    """Statements that begin the transaction which takes a turn that stopped: from here on nobody else does; and a call
    that may have been under way is on record."""
    sql, mark = store.statements, mark_of(message)
    # The first changes nothing, and makes whoever else would take the turn wait until it is seen to be taken.
    locked = sql.update(store.records.message, {"status": "pending"}, **mark)
    if not stores_requests or not was_calling(message, calls):
        return [locked]
    return [locked, _died(store, message, calls, mark)]


def _died(store: Store, message: LlmMessage, calls: list[LlmToolCall], mark: Mapping[str, Any]) -> Sql:
    sql, number = store.statements, next_round(message, calls)
    question = store.read(sql.turn_of(message.chat_id, message.position))
    row = {
        "id": uuid7(),
        "chat_id": message.chat_id,
        "message_id": message.id,
        "turn_id": as_uuid(question[0][0]) if question else None,
        "source": "chat",
        "round": number,
        "attempt": sql.next_attempt(message.id, number),
        "provider": message.provider or "",
        "model": message.model_id or "",
        "status_code": 0,
        "error": DIED,
        "error_message": "the process died while this call may have been under way: what it cost is not known",
        "duration_ms": 0,
        "streamed": is_partial(message),
        **dict.fromkeys(TOKENS, 0),
        "usage_estimated": False,
        "created_at": now(),
    }
    # The call may be on record, where its process is alive and could write nothing but that.
    answered = {"message_id": message.id, "round": number, "status_code": 200}
    return sql.insert_where(store.records.request, row, store.records.message, mark, unless=answered)


def end(
    store: Store,
    message: LlmMessage,
    *,
    keep: bool,
    kept: Callable[[str], str] | None = None,
    stores_tool_calls: bool = True,
    stores_requests: bool = True,
) -> str | None:
    """End it for good: "completed" where its reply was whole, "kept" as incomplete, or "removed"; None where another
    was faster.

    keep    whether what it said is to be kept; what `save_every` kept is, in any case
    kept    what the database is to keep of the arguments of tool calls that will not run
    """
    sql, record, mark = store.statements, store.records.message, mark_of(message)
    calls = calls_of(store, message.id) if stores_tool_calls else []
    statements = taken(store, message, calls, stores_requests)
    if kept is not None:
        statements += _kept_arguments(store, calls, kept, mark)
    replaced = replaced_by(store, message)
    said = bool(message.content or rounds_of(message))
    is_kept = is_partial(message) or (keep and (said or replaced is None))
    is_answered = is_whole(message) and not is_sent_back(message)
    outcome = "completed" if is_answered else "kept" if is_kept else "removed"
    if stores_tool_calls:
        statements.append(sql.interrupt_tool_calls(told=outcome != "removed", **mark))
    if outcome == "removed":
        statements.append(sql.delete(record, returning="id", **mark))
    else:
        raw = {name: value for name, value in (message.content_raw or {}).items() if name not in MARKS}
        status = "completed" if outcome == "completed" else "incomplete"
        ended = {"status": status, "content_raw": raw or None, "parked_at": None, "updated_at": now()}
        if replaced is not None:
            statements.append(sql.delete(record, id=replaced, chat_id=sql.chat_of(**mark)))
            ended["position"] = message.position - 1
        statements.append(sql.update(record, ended, returning="id", **mark))
    return outcome if store.transact(*statements) else None


def replaced_by(store: Store, message: LlmMessage) -> UUID | None:
    """The failed answer in whose place this one was to come."""
    before = store.read(store.statements.message_at(message.chat_id, message.position - 1))
    failed = before and before[0][1] == "assistant" and before[0][2] in FAILED
    return as_uuid(before[0][0]) if failed else None


MARKS = ("partial", "sent_back")
"""What is said in `content_raw` of a pending message only."""


def _kept_arguments(
    store: Store, calls: list[LlmToolCall], kept: Callable[[str], str], mark: Mapping[str, Any]
) -> list[Sql]:
    """Let go of the arguments of calls, of which less is to be kept now that they will not run."""
    sql, record = store.statements, store.records.tool_call
    ours = sql.chat_of(**mark)
    return [
        sql.update(record, {"arguments": text}, id=call.id, chat_id=ours)
        for call in calls
        if (text := kept(call.arguments)) != call.arguments
    ]

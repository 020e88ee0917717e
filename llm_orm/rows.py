"""What a turn writes: its requests, its tool calls, and its message, from placeholder to reply.

What was paid for is written before anything else happens that may fail, and what could not be written is handed over
in the error.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from .attachments import reworded
from .errors import ChatGone, DatabaseUnavailable, ReplyNotSaved, TablesMissing, TurnCancelled
from .middleware import methods_of, stored
from .options import Setting
from .records import LlmMessage, now, uuid7
from .statements import NEVER_RUN, Sql
from .store import Store
from .sums import stats_of
from .values import (
    MOST_TOKENS,
    Answer,
    Attachment,
    Message,
    Reply,
    Stats,
    ToolCall,
    ToolOutcome,
    Usage,
    as_uuid,
    storable,
    text_of,
)

log = logging.getLogger("llm_orm")


HELD_BACK = 64
"""Characters at the end of a stream that is under way, which are not stored where a middleware masks what is."""

MOST_ROWS = 500
"""Rows of one statement: SQLite takes 32,766 values in one."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One call of the model that has ended, and where in the turn it was made."""

    answer: Answer
    round: int
    number: int
    """1 for the first try of a round."""
    correction_rounds: int | None
    ended_at: datetime = field(default_factory=now)


@dataclass
class Rows:
    """The rows of one turn."""

    store: Store
    setting: Setting

    message_id: UUID = field(default_factory=uuid7)
    """The assistant message, from placeholder to reply."""
    turn_id: UUID = field(default_factory=uuid7)
    """The user message."""
    owner: UUID = field(default_factory=uuid7)
    """What says in the message's row that it is ours."""
    position: int = -1
    opened_at: datetime = field(default_factory=now)
    taken_at: datetime | None = None
    """When a turn that had stopped was taken up; None for one that was opened."""
    replaces: tuple[UUID, int] | None = None
    """The failed answer that gives way to this one, once there is one: (id, position)."""
    rounds: list[Message] = field(default_factory=list)
    """What the model said so far, as it is to be shown again."""
    writer: str = ""
    """The provider who wrote them, but for those that name another."""
    results: dict[str, str] = field(default_factory=dict)
    usage: Usage = Usage()
    received: Reply | None = None
    """What the model said last, whole or in part."""
    request_id: UUID = field(default_factory=uuid7)
    """Of the last call's row: written twice, where it is not known whether it was, it is there once."""
    owed: list[Sql] = field(default_factory=list)
    """Request rows of failed calls that the database was not there to take."""
    late: tuple[UUID, Answer] | None = None
    """The answer to a call that was given up before it came."""
    unrecorded: Attempt | None = None
    """A call whose request row is not known to be written."""
    unwritten_calls: list[dict[str, Any]] = field(default_factory=list)
    unwritten: list[Sql] = field(default_factory=list)
    """Rows of tool calls and files of the last reply that are not known to be written."""
    open_calls: dict[str, ToolCall] = field(default_factory=dict)
    """Those that are stored as they are to be run, even where a middleware keeps less of them."""
    attachments: int = 0
    """How many files the model has made."""
    is_settled: bool = False

    def __post_init__(self) -> None:
        self._masks = methods_of(self.setting.middlewares, "stored_text")

    # Calls of the model

    def ended(self, attempt: Attempt) -> None:
        """Take note of a call that has ended: from here on it cannot be lost."""
        self.unrecorded = attempt
        self.received = attempt.answer.reply
        self._now_called(attempt.answer.reply.provider)
        self.usage = _sum(self.usage, attempt.answer.reply.usage)

    def _now_called(self, provider: str) -> None:
        """Note of the rounds so far who wrote them, where another provider goes on, whom the row will name."""
        if self.rounds and self.writer != provider:
            self.rounds = [{"written_by": self.writer, **message} for message in self.rounds]
        self.writer = provider

    def expect_late(self) -> Callable[[Answer], None]:
        """Begin a call: what takes its answer, from another thread, where it comes when the turn is over."""
        self.request_id = uuid7()
        return functools.partial(self._amend, self.request_id)

    def _amend(self, request_id: UUID, answer: Answer) -> None:
        """Put what the call did cost in the place of what it was thought to."""
        self.late = request_id, answer
        usage = answer.reply.usage
        columns = {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
            "thinking_tokens": usage.thinking_tokens,
            "usage_estimated": usage.estimated,
            "cost": answer.reply.cost,
            "finish_reason": answer.reply.finish_reason,
            "provider_request_id": answer.reply.provider_request_id,
        }
        if self.setting.options.stores_requests:
            self.store.transact(self.store.statements.update(self.store.records.request, columns, id=request_id))

    def record(self) -> None:
        """Write the request row of a call in its own right. Nothing that goes wrong here hides how the call ended."""
        attempt, self.unrecorded = self.unrecorded, None
        if attempt is None or not self.setting.options.stores_requests:
            return
        answer = attempt.answer
        try:
            self.store.transact(self._request(attempt))
            if self.late is not None:  # it came before there was a row to put it in
                self._amend(*self.late)
        except Exception as problem:
            if answer.error is None:
                self.unrecorded = attempt  # it is tried once more when the turn is given up
                raise ReplyNotSaved(
                    f"the request row of a paid call could not be written: {problem}; the reply is in .reply",
                    reply=answer.reply,
                ) from problem
            if isinstance(problem, DatabaseUnavailable | TablesMissing):
                self.owed.append(self._request(attempt))  # it goes with what is written next
            answer.error.add_note(f"llm_orm: the request row of this call could not be written: {problem}")
            log.warning("the request row of a call could not be written, and is tried again: %s", problem)
        except BaseException:
            self.unrecorded = attempt
            raise

    def save(self, reply: Reply, calls: Sequence[ToolCall], number: int, started: int) -> None:
        """Write what the model said so far: its request, the tool calls that it asks for, and the message; one
        transaction.

        started    so many of the calls are run at once
        """
        if self.rounds or not reply.is_plain:
            self.rounds.append(reply.message)
        self.unwritten_calls = []
        if calls and self.setting.options.stores_tool_calls:
            self.unwritten_calls = [self._tool_call(call, number, place, started) for place, call in enumerate(calls)]
            self.open_calls |= {call.id: call for call in calls}
        self.unwritten = self._made(reply)
        columns = self._columns(reply, "pending")
        self._write(reply, columns, *self._inserted(self.unwritten_calls), self._update_message(columns))

    def _inserted(self, calls: list[dict[str, Any]]) -> list[Sql]:
        pieces = (calls[first : first + MOST_ROWS] for first in range(0, len(calls), MOST_ROWS))
        return [self.store.statements.insert(self.store.records.tool_call, *piece) for piece in pieces]

    def save_partly(self, text: str, thinking: str) -> None:
        """Write what has come of a stream so far. Where that fails nothing is lost: all of it is written at the end."""
        try:
            if self._masks:  # what they look for may be there in part
                text, thinking = text[:-HELD_BACK], thinking[:-HELD_BACK]
            columns = {"content": self._stored(text or None), "thinking_text": self._stored(thinking or None)}
            self._mark("partial", columns)
        except Exception as problem:
            log.warning("the part of a reply that has come could not be written: %s", problem)

    def save_sent_back(self, number: int) -> None:
        """Write that the reply that is stored is not the last word: call `number` of the model asks for another."""
        self._mark("sent_back", {}, number)

    def _mark(self, name: str, columns: dict[str, Any], value: Any = True) -> None:
        raw = {**(self._content_raw() or {}), name: value}
        self.store.transact(self._update_message({**columns, "content_raw": raw, "updated_at": now()}))

    def spent(self) -> Stats:
        return stats_of(self.store, chat_id=self.setting.chat_id, tool_calls=False)

    def spent_in_turn(self) -> Decimal:
        """What the turn has cost until it stopped, as far as that is on record."""
        if not self.setting.options.stores_requests:
            return Decimal(0)
        return stats_of(self.store, message_id=self.message_id, tool_calls=False).cost

    # Tool calls

    def start(self, calls: Sequence[ToolCall]) -> None:
        """Write that the calls are being run."""
        if calls and self.setting.options.stores_tool_calls:
            ids = [call.id for call in calls]
            self.store.transact(self.store.statements.start_tool_calls(self.message_id, ids))

    def save_outcome(self, outcome: ToolOutcome, following: ToolCall | None = None) -> None:
        """Write a tool's result, together with the mark that the next one starts."""
        self.results[outcome.call.id] = outcome.result
        if not self.setting.options.stores_tool_calls:
            return
        sql = self.store.statements
        ended = {
            "status": outcome.status,
            "result": self._stored(outcome.result),
            "error": self._stored(outcome.error),
            "duration_ms": outcome.duration_ms,
            "finished_at": now(),
        }
        statements = [self._update_tool_call(ended, outcome.call.id), *self._closed([outcome.call])]
        if following is not None:
            statements.append(sql.start_tool_calls(self.message_id, [following.id]))
        self.store.transact(*statements)
        self.open_calls.pop(outcome.call.id, None)

    def reject(self, calls: Sequence[ToolCall], result: str, error: str) -> None:
        """Write of calls that will not be run what the model is told instead."""
        if not calls:
            return
        self.results |= dict.fromkeys((call.id for call in calls), result)
        if self.setting.options.stores_tool_calls:
            ids = [call.id for call in calls]
            kept = self._stored(result)
            rejected = self.store.statements.reject_tool_calls(self.message_id, ids, kept, error)
            self.store.transact(rejected, *self._closed(calls))
            for call in calls:
                self.open_calls.pop(call.id, None)

    def _closed(self, calls: Sequence[ToolCall]) -> list[Sql]:
        """Let go of the arguments of calls that have ended, where a middleware keeps less of them."""
        if not self._masks or not self.setting.options.stores_tool_calls:
            return []
        kept = {call.id: self._stored(call.arguments) for call in calls}
        return [self._update_tool_call({"arguments": text}, call_id) for call_id, text in kept.items()]

    def has_arguments_of(self, call: ToolCall) -> bool:
        """Whether the arguments are those that the model wrote, and not what a middleware let be kept of them."""
        return call.id in self.open_calls or not self._masks

    def park(self, calls: Sequence[ToolCall]) -> LlmMessage:
        """Let the turn wait for a person, with nothing in memory; the message as it waits."""
        rows = self.store.transact(*self.store.statements.park([call.id for call in calls], **self._ours))
        if rows and rows[0][0] is not None:
            raise TurnCancelled()  # in the middle of its last tool
        self.is_settled = True
        if not rows:
            raise ChatGone(
                f"the turn of chat {self.setting.chat_id} that was to wait for approval is no longer there: the chat "
                "was deleted, or the turn was cleared as dead by another process"
            )
        return self._message_as_stored()

    # The end

    def finish(self, reply: Reply) -> LlmMessage:
        """Write the reply for good, together with what of its call is not written yet; one transaction."""
        if self.unrecorded is not None:
            if self.rounds or not reply.is_plain:
                self.rounds.append(reply.message)
            self.unwritten = self._made(reply)
        return self._settle_as(reply, "completed", *self._closed([*self.open_calls.values()]))

    def end_with(self, reply: Reply) -> LlmMessage:
        """Write a reply for good that is not what the model said last; where it names no model, none said it."""
        if self.unrecorded is not None:
            self.record()
        last = self.received if self.received and self.rounds and self.rounds[-1] is self.received.message else Reply()
        reply = replace(reply, attachments=tuple(file for file in reply.attachments if file not in last.attachments))
        if self.rounds or not reply.is_plain or reply.attachments:
            message = {**reply.message, "role": "assistant", "content": reply.content}
            message |= {"tool_calls": None, "attachments": len(reply.attachments) or None}
            self.rounds.append({name: value for name, value in message.items() if value or name == "content"})
        if self.rounds and not reply.provider:
            reply = replace(reply, provider=self.writer)  # the rounds before it are still their provider's
        unfinished: list[Sql] = []
        if self.open_calls and self.setting.options.stores_tool_calls:
            calls = [*self.open_calls.values()]
            interrupted = self.store.statements.interrupt_tool_calls(told=True, **self._ours)
            unfinished = [interrupted, *self._closed(calls)]
        self.unwritten = self._made(reply)
        return self._settle_as(reply, "completed", *unfinished)

    def take_back(self) -> None:
        """Forget what the model said last; something else takes its place."""
        if self.rounds and not self.rounds[-1].get("tool_calls"):
            files = self.rounds.pop().get("attachments") or 0
            if files:
                self.attachments -= files
                gone = self.store.statements.delete_files(self.message_id, self.attachments)
                columns = {"content": None, "content_raw": self._content_raw(), "updated_at": now()}
                self.store.transact(gone, self._update_message(columns))

    def give_up(self, error: BaseException) -> None:
        """Leave the chat as `on_error` says, with every call on record."""
        if self.unrecorded is not None:
            attempt = self.unrecorded
            if attempt.answer.error is None:
                self.unrecorded = replace(attempt, answer=_ended_by(attempt.answer, error))
            self.record()
        sql = self.store.statements
        gone = sql.delete(self.store.records.message, returning="id", **self._ours)
        try:
            kept, closed = self._kept(error), self._closed([*self.open_calls.values()])
        except Exception:  # what a middleware does not let be stored is not kept
            kept, closed = [], []
        statements: list[Sql] = []
        if self.rounds and self.setting.options.stores_tool_calls:
            statements += [sql.interrupt_tool_calls(told=bool(kept), **self._ours), *closed]
        if kept:
            ended = {"status": "failed", "error": "interrupted", "result": NEVER_RUN, "finished_at": now()}
            statements += [*self.unwritten, *self._inserted([call | ended for call in self.unwritten_calls])]
        statements += kept or [gone]
        if self.clear_placeholder(error, *self.owed, *statements):
            self.owed = []
        for row in self.owed:
            self.store.owe(row)

    def clear_placeholder(self, error: BaseException, *statements: Sql) -> bool:
        """Clear it, and say whether that succeeded; where it fails, it does not hide why it was to be done."""
        try:
            if not self.store.transact(*statements) and self.setting.options.stores_requests:
                # Who took this turn for dead has put a call on record that it knew nothing of; we do.
                since = self.taken_at or self.opened_at
                self.store.transact(self.store.statements.forget_deaths(self.setting.chat_id, self.turn_id, since))
        except Exception as problem:
            error.add_note(f"llm_orm: the turn's placeholder could not be cleared: {problem}")
            return False
        return True

    def _kept(self, error: BaseException) -> list[Sql]:
        """What keeps the failed answer, where it is to be kept; an empty one does not replace another."""
        if self.setting.options.on_error != "keep":
            return []
        first = self.setting.candidates[0]
        # Of a turn that was taken up again, what it said is still its provider's.
        received = self.received or Reply(model=first.model, provider=self.writer or first.answering_provider)
        if self.replaces and not (self.rounds or received.content or received.attachments):
            return []
        made: list[Sql] = []
        if (self.rounds or received.attachments) and received.message is not (self.rounds or [None])[-1]:
            made, files = self._made(received), len(received.attachments)
            if received.content or files:
                kept = {"role": "assistant", "content": received.content}
                self.rounds.append({**kept, "attachments": files} if files else kept)
        stopped = isinstance(error, TurnCancelled) or not isinstance(error, Exception)
        columns = self._columns(received, "incomplete" if stopped else "failed")
        return [*made, *self._settle({**columns, "parked_at": None})]

    # Reading

    def tool_results(self, message_ids: list[UUID]) -> dict[tuple[UUID, str], str]:
        """The results of the tool calls of earlier messages, by (message id, tool call id)."""
        try:
            rows = self.store.read(self.store.statements.tool_results(message_ids))
        except TablesMissing:
            if self.setting.options.stores_tool_calls:
                raise
            return {}
        return {(as_uuid(message_id), call_id): result for message_id, call_id, result in rows}

    def files(self, message_ids: list[UUID]) -> dict[UUID, list[Attachment]]:
        """The files of earlier messages, by message id."""
        files: dict[UUID, list[Attachment]] = {}
        for row in self.store.read(self.store.statements.attachments(message_ids)):
            message_id, media_type, filename, content, url, size, sha256 = row
            kept = None if content is None else bytes(content)
            files.setdefault(as_uuid(message_id), []).append(
                Attachment(media_type, filename, kept, url, size=size, sha256=sha256)
            )
        return files

    # What the rows say

    def message(self, values: Mapping[str, Any], position: Sql | int) -> Sql:
        """A new message of the turn."""
        times = {"created_at": self.opened_at, "updated_at": self.opened_at}
        row = {**values, "chat_id": self.setting.chat_id, "position": position, **times}
        if row.get("content"):
            row["content"] = self._stored(row["content"])
        return self.store.statements.insert(self.store.records.message, row)

    def as_kept(self, file: Attachment) -> Attachment:
        """A file as the middlewares let it be stored."""
        return reworded(file, self._stored) if self._masks else file

    def _made(self, reply: Reply) -> list[Sql]:
        first, self.attachments = self.attachments, self.attachments + len(reply.attachments)
        return self.store.statements.insert_files(self.message_id, reply.attachments, first)

    def _request(self, attempt: Attempt) -> Sql:
        sql, answer = self.store.statements, attempt.answer
        reply, error = answer.reply, answer.error
        return sql.insert(
            self.store.records.request,
            {
                "id": self.request_id,
                "chat_id": sql.living_chat(self.setting.chat_id),
                "message_id": sql.living_message(self.message_id),
                "turn_id": self.turn_id,
                "source": "chat",
                "round": attempt.round,
                "attempt": attempt.number,
                "provider": reply.provider,
                "model": reply.model,
                "status_code": answer.status_code,
                "error": type(error).__name__ if error else None,
                "error_message": self._stored_or_nothing(answer.error_message),
                "finish_reason": reply.finish_reason,
                "duration_ms": answer.duration_ms,
                "first_token_ms": answer.first_token_ms,
                "streamed": answer.streamed,
                "input_tokens": reply.usage.input_tokens,
                "output_tokens": reply.usage.output_tokens,
                "cached_tokens": reply.usage.cached_tokens,
                "cache_write_tokens": reply.usage.cache_write_tokens,
                "thinking_tokens": reply.usage.thinking_tokens,
                "usage_estimated": reply.usage.estimated,
                "cost": reply.cost,
                "correction_rounds": attempt.correction_rounds,
                "provider_request_id": reply.provider_request_id,
                "created_at": attempt.ended_at,
            },
        )

    def _tool_call(self, call: ToolCall, number: int, position: int, started: int) -> dict[str, Any]:
        return {
            "id": uuid7(),
            "chat_id": self.setting.chat_id,
            "message_id": self.message_id,
            "turn_id": self.turn_id,
            "round": number,
            "position": position,
            "tool_call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
            "thought_signature": call.thought_signature,
            "status": "running" if position < started else "pending",
            "created_at": now(),
        }

    def _columns(self, reply: Reply, status: str) -> dict[str, Any]:
        return {
            "status": status,
            "content": self._stored(reply.content),
            "content_raw": self._content_raw(),
            "thinking_text": self._stored(reply.thinking),
            "thinking_signature": reply.thinking_signature,
            "thinking_tokens": self.usage.thinking_tokens,
            "input_tokens": self.usage.input_tokens,
            "output_tokens": self.usage.output_tokens,
            "cached_tokens": self.usage.cached_tokens,
            "model_id": reply.model or None,
            "provider": reply.provider or None,
            "updated_at": now(),
        }

    def _content_raw(self) -> dict[str, Any] | None:
        raw: dict[str, Any] = {}
        if self.rounds:
            raw["rounds"] = [self._stored_round(message) for message in self.rounds] if self._masks else self.rounds
        if self.rounds and self.results and not self.setting.options.stores_tool_calls:
            raw["results"] = {call_id: self._stored(result) for call_id, result in self.results.items()}
        if self.attachments:
            raw["attachments"] = self.attachments
        return raw or None

    def _stored(self, text: Any) -> Any:
        """The text as the middlewares let it be kept."""
        try:
            return stored(self._masks, text)
        except Exception as problem:
            if self.received is None:
                raise
            raise ReplyNotSaved(
                f"a middleware's stored_text failed: {problem}; the model's reply is in .reply, whole",
                reply=self.received,
            ) from problem

    def _stored_or_nothing(self, text: str | None) -> str | None:
        """The same, of a row that must be written; what a middleware fails at is not kept."""
        try:
            return stored(self._masks, text)
        except Exception as problem:
            log.warning("a middleware's stored_text failed, and the text of an error is not kept: %s", problem)
            return None

    def _stored_round(self, message: Message) -> Message:
        stored = {**message, "content": self._stored(message.get("content"))}
        if stored.get("reasoning_content"):
            stored["reasoning_content"] = self._stored(stored["reasoning_content"])
        if stored.get("tool_calls"):
            stored["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": self._stored(call["function"]["arguments"])}}
                for call in stored["tool_calls"]
            ]
        if stored.get("thinking_blocks"):
            # A block whose text is changed no longer fits its signature, and no provider takes it back.
            blocks = [b for b in stored["thinking_blocks"] if self._stored(b.get("thinking")) == b.get("thinking")]
            stored["thinking_blocks"] = blocks
            if not blocks:
                del stored["thinking_blocks"]
        return stored

    # How

    def _settle_as(self, reply: Reply, status: str, *statements: Sql) -> LlmMessage:
        columns = self._columns(reply, status)
        time = {"updated_at": columns["updated_at"]}
        touched = self.store.statements.update(self.store.records.chat, time, id=self.setting.chat_id)
        self._write(reply, columns, *statements, touched, *self._settle(columns))
        self.is_settled = True
        return self._stored_message(columns)

    def _write(self, reply: Reply, columns: dict[str, Any], *statements: Sql) -> None:
        """Write what a paid call gave, the last statement updating its message to the columns; nothing is lost."""
        try:
            recorded = self.unrecorded if self.setting.options.stores_requests else None
            request = [self._request(recorded)] if recorded else []
            rows = self.store.transact(*self.owed, *request, *self.unwritten, *statements)
            calls, self.unwritten_calls = self.unwritten_calls, []
            self.unrecorded, self.owed, self.unwritten = None, [], []
        except Exception as problem:
            raise ReplyNotSaved(
                f"the model's reply could not be written: {problem}; it is in .reply, whole", reply=reply
            ) from problem
        if not rows and not self._is_written(columns):
            lost = ReplyNotSaved(
                f"chat {self.setting.chat_id} was deleted, or this turn was cleared as dead by another process; "
                "its reply is in .reply, whole",
                reply=reply,
            )
            self._withdraw(calls, lost)
            raise lost

    def _withdraw(self, calls: list[dict[str, Any]], error: BaseException) -> None:
        """Delete the rows of calls that were just written: they stand in the message of whoever took the turn."""
        sql, record = self.store.statements, self.store.records.tool_call
        if calls:
            self.clear_placeholder(error, *(sql.delete(record, returning="id", id=call["id"]) for call in calls))

    def _is_written(self, columns: dict[str, Any]) -> bool:
        """Whether it was written before the connection was lost that would have said so."""
        record: Any = self.store.records.message
        ours = (record.id == self.message_id, record.updated_at == columns["updated_at"])
        return bool(self.store.found(record.select(record.id).where(*ours)))

    @property
    def _ours(self) -> dict[str, Any]:
        """What is true of the assistant message as long as nobody has ended the turn, or taken it up."""
        return {"id": self.message_id, "status": "pending", "owner": self.owner}

    def _update_message(self, columns: dict[str, Any]) -> Sql:
        """Update the assistant message, as long as it is still ours."""
        return self.store.statements.update(self.store.records.message, columns, returning="id", **self._ours)

    def _update_tool_call(self, columns: dict[str, Any], tool_call_id: str) -> Sql:
        ours = {"message_id": self.message_id, "tool_call_id": tool_call_id}
        return self.store.statements.update(self.store.records.tool_call, columns, **ours)

    def _settle(self, columns: dict[str, Any]) -> list[Sql]:
        """Update the message for good, in the place of the failed answer that it replaces."""
        if self.replaces is None:
            return [self._update_message(columns)]
        replaced, self.position = self.replaces
        # Where this one was cleared as dead, the other stays.
        ours = self.store.statements.chat_of(**self._ours)
        gone = self.store.statements.delete(self.store.records.message, id=replaced, chat_id=ours)
        place = self.store.statements.place_if_free(self.setting.chat_id, self.position)
        return [gone, self._update_message({**columns, "position": place})]

    def _message_as_stored(self) -> LlmMessage:
        record: Any = self.store.records.message
        found = self.store.found(record.select().where(record.id == self.message_id))
        if not found:
            raise ChatGone(f"chat {self.setting.chat_id} was deleted, or its turn was ended, at this moment")
        message = found[0]
        message.reply_schema = self.setting.options.schema
        return message

    def stored_placeholder(self) -> LlmMessage:
        return self._stored_message({"status": "pending", "updated_at": self.opened_at})

    def _stored_message(self, columns: dict[str, Any]) -> LlmMessage:
        message = self.store.records.message(
            id=self.message_id,
            chat_id=self.setting.chat_id,
            position=self.position,
            role="assistant",
            owner=self.owner,
            created_at=self.opened_at,
            **columns,
        )
        message.reply_schema = self.setting.options.schema
        return message


def _sum(one: Usage, other: Usage) -> Usage:
    return Usage(
        min(one.input_tokens + other.input_tokens, MOST_TOKENS),
        min(one.output_tokens + other.output_tokens, MOST_TOKENS),
        min(one.cached_tokens + other.cached_tokens, MOST_TOKENS),
        min(one.cache_write_tokens + other.cache_write_tokens, MOST_TOKENS),
        min(one.thinking_tokens + other.thinking_tokens, MOST_TOKENS),
        one.estimated or other.estimated,
    )


def _ended_by(answer: Answer, error: BaseException) -> Answer:
    """The same paid call, as its request row is written once its reply could not be."""
    return replace(answer, error=error, error_message=storable(text_of(error)))

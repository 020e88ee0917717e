"""One turn of a chat, in order, as a generator.

`Turn.run()` reads and writes the database itself, in short steps, and *yields* what has to happen outside of it:
`CallModel`, `RunTools`, `CallHook`, `Wait`. `play.py` performs what is yielded and sends back how it went. No
transaction is open across a yield, and the rows alone say what is to be done next.
"""

import copy
import itertools
import logging
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import peewee as pw

from .errors import (
    ChatBusy,
    ChatGone,
    NothingToRetry,
    ReplyNotSaved,
    TablesMissing,
    ToolRoundsExceeded,
    WrongSetup,
)
from .options import Options
from .records import LlmMessage, TimeField, now, uuid7
from .statements import Sql
from .store import Store
from .tools import ToolContext
from .transcript import Transcript, as_uuid
from .values import Answer, Message, ModelRequest, Reply, ToolCall, ToolOutcome, Usage

log = logging.getLogger("llm_orm")

POLL_EVERY_S = 0.05
"""How often a caller who waits for a busy chat looks again."""

MOST_TRIES = 5
"""How often a claim is tried again at once, where nobody is seen in its way."""


@dataclass(frozen=True, slots=True)
class CallModel:
    """Sends back an `Answer`, also where the call failed or was given up."""

    request: ModelRequest


@dataclass(frozen=True, slots=True)
class RunTools:
    """Starts those of the calls that are not running yet; sends back the first `ToolOutcome` there is."""

    calls: tuple[tuple[ToolCall, ToolContext], ...]


@dataclass(frozen=True, slots=True)
class CallHook:
    """Calls a function of the application; sends back what it returned."""

    function: Callable[..., Any]
    arguments: tuple


@dataclass(frozen=True, slots=True)
class Wait:
    seconds: float


Effect = CallModel | RunTools | CallHook | Wait
Flow = Generator[Effect, Any, LlmMessage]

Hooks = Mapping[str, tuple[Callable[..., Any], ...]]


@dataclass(frozen=True, slots=True)
class Setting:
    """All that a turn needs to know of its chat."""

    chat_id: UUID
    model: str
    provider: str | None
    instructions: str | None
    metadata: Any
    options: Options
    hooks: Hooks
    llm: Any
    answering_provider: str
    """The provider that will be called: the one named, or the one that the model belongs to."""


@dataclass
class Turn:
    """A turn in progress. `text` is what the user says; None answers the last message that was left unanswered."""

    store: Store
    setting: Setting
    transcript: Transcript
    text: str | None
    stream: bool = False

    message_id: UUID = field(default_factory=uuid7)
    """The assistant message, from placeholder to reply."""
    turn_id: UUID = field(default_factory=uuid7)
    """The user message."""
    position: int = -1
    messages: list[Message] = field(default_factory=list)
    rounds: list[Message] = field(default_factory=list)
    results: dict[str, str] = field(default_factory=dict)
    call_ids: set[str] = field(default_factory=set)
    usage: Usage = Usage()
    received: Reply | None = None
    """What the model said last, whole or in part."""
    request_id: UUID = field(default_factory=uuid7)
    """Of the last call's row: written twice, where it is not known whether it was, it is there once."""
    opened_at: datetime = field(default_factory=now)
    is_settled: bool = False
    unrecorded: tuple[Answer, int, int] | None = None
    """A call whose request row is not known to be written: (answer, round, attempt)."""
    replaces: tuple[UUID, int] | None = None
    """The failed answer that gives way to this one, once there is one: (id, position)."""

    def run(self) -> Flow:
        rows = yield from self._claim()
        try:
            self._read(rows)
            with self.store.heart.beating(self.message_id):
                return (yield from self._converse())
        except BaseException as error:
            if not self.is_settled:
                self._give_up(error)
            raise

    # The claim: the user's message and the placeholder, or ChatBusy

    def _claim(self) -> Generator[Effect, Any, list[tuple]]:
        waited, tries = 0.0, 0
        while True:
            try:
                return self._open()
            except pw.IntegrityError as error:
                tries += 1
                if self._make_room(error):
                    if tries > MOST_TRIES:
                        raise  # it is not another turn that is in the way
                    continue
                if waited >= self.setting.options.wait:
                    raise self._busy() from error
                pause = min(POLL_EVERY_S, self.setting.options.wait - waited)
                waited, tries = waited + pause, 0
                yield Wait(pause)

    def _read(self, rows: list[tuple]) -> None:
        if len(rows) < 2 or as_uuid(rows[-2][0]) != self.turn_id:
            # The transcript knows the question already, or messages that were deleted since.
            rows = self.store.read(self.store.statements.messages_after(self.setting.chat_id, -1))
        if self.replaces:
            rows = [row for row in rows if as_uuid(row[0]) != self.replaces[0]]
        self.position = rows[-1][1]
        self.transcript.add(rows, self._tool_results)
        setting = self.setting
        self.messages = self.transcript.shown(setting.instructions, setting.options.history, setting.answering_provider)
        self._log("opened at position %d, %d messages", self.position, len(self.messages))

    def _open(self) -> list[tuple]:
        """Write the turn's first two rows and read what the transcript has not seen yet: one transaction."""
        sql, chat_id = self.store.statements, self.setting.chat_id
        self.opened_at = now()
        written: list[Sql] = []
        if self.text is None:
            place = self._find_unanswered()
        else:
            place = sql.next_position(chat_id)
            user = {"id": self.turn_id, "role": "user", "status": "completed", "content": self.text}
            written.append(self._message(user, place))
        placeholder = {"id": self.message_id, "role": "assistant", "status": "pending"}
        unread = sql.messages_after(chat_id, self.transcript.position)
        try:
            return self.store.transact(*written, self._message(placeholder, place), unread)
        except (pw.IntegrityError, WrongSetup):
            raise
        except BaseException as error:
            # Broken off in the middle of it, the rows may be there.
            if not getattr(error, "nothing_was_sent", False):
                self._clear_placeholder(error, sql.delete(self.store.records.message, id=self.message_id))
            raise

    def _message(self, values: dict[str, Any], position: Sql | int) -> Sql:
        times = {"created_at": self.opened_at, "updated_at": self.opened_at}
        row = {**values, "chat_id": self.setting.chat_id, "position": position, **times}
        return self.store.statements.insert(self.store.records.message, row)

    def _find_unanswered(self) -> int:
        """Where the answer to the last user message goes; behind an answer that failed, until it takes its place.

        The place is named, not computed anew: where another turn answers meanwhile, it is taken.
        """
        sql, chat_id = self.store.statements, self.setting.chat_id
        last = self.store.read(sql.last_message(chat_id))
        row_id, position, role, status = last[0] if last else (None, -1, None, None)
        if role == "user":
            self.turn_id, self.replaces = as_uuid(row_id), None
            return position + 1
        question = self.store.read(sql.turn_of(chat_id, position))
        if role == "assistant" and status in ("failed", "incomplete") and question:
            self.turn_id, self.replaces = as_uuid(question[0][0]), (as_uuid(row_id), position)
            return position + 1
        raise NothingToRetry(f"chat {chat_id} has no unanswered user message: use ask()")

    def _make_room(self, error: pw.IntegrityError) -> bool:
        """Find out why the claim failed; True where it may succeed now, False where another turn is running."""
        sql, chat_id = self.store.statements, self.setting.chat_id
        pending = self.store.read(sql.pending_message(chat_id))
        if not pending:
            if not self.store.read(sql.chat_exists(chat_id)):
                raise ChatGone(f"there is no chat {chat_id}: it was deleted") from error
            return True  # the other turn has ended meanwhile
        message_id, seen = pending[0]
        # The clocks of two machines differ: a sign of life from the future is one from now.
        age = max((now() - TimeField().python_value(seen)).total_seconds(), 0.0)
        if age < self.setting.options.stale_after:
            return False
        self._log("clearing a turn without a sign of life for %.1f s", age)
        self._clear(as_uuid(message_id), seen)
        return True

    def _clear(self, message_id: UUID, seen: Any) -> None:
        """End a dead turn as its process would have: by `on_error`. Where two try, one finds nothing left to do."""
        sql = self.store.statements
        where = {"id": message_id, "status": "pending", "updated_at": Sql(sql.param, (seen,))}
        statements: list[Sql] = []
        if self.setting.options.stores_tool_calls:
            statements.append(sql.interrupt_tool_calls(**where))
        if self.setting.options.on_error == "keep":
            statements.append(sql.update(self.store.records.message, {"status": "incomplete"}, **where))
        else:
            statements.append(sql.delete(self.store.records.message, **where))
        self.store.transact(*statements)

    def _busy(self) -> ChatBusy:
        return ChatBusy(
            f"chat {self.setting.chat_id} is busy with another turn; wait=seconds waits for it; a stream of yours that "
            "was left unread is a turn, too, until you close() it; a turn whose process died is cleared once it gave "
            f"no sign of life for stale_after={self.setting.options.stale_after:g} seconds"
        )

    # The conversation with the model: rounds of calls and tools, to the last word

    def _converse(self) -> Generator[Effect, Any, LlmMessage]:
        for number in itertools.count():
            answer, attempt = yield from self._ask_model(number)
            reply = answer.reply
            if not reply.tool_calls:
                message = self._finish(answer, number, attempt)
                yield from self._call_hooks("after_response", reply)
                return message
            if number == self.setting.options.max_tool_calls:
                self._record(answer, number, attempt)
                yield from self._call_hooks("after_response", reply)
                raise ToolRoundsExceeded(
                    f"the model asked for tools {number + 1} times in one turn; max_tool_calls={number} allows {number}"
                )
            self._save_round(answer, number, attempt)
            yield from self._call_hooks("after_response", reply)
            yield from self._run_tools(number, reply.tool_calls)
        raise AssertionError("unreachable")

    def _ask_model(self, number: int) -> Generator[Effect, Any, tuple[Answer, int]]:
        """One call of the model, tried again while that may help. Every attempt leaves its request row."""
        options = self.setting.options
        for attempt in itertools.count(1):
            yield from self._call_hooks("before_request", self.messages)
            answer: Answer = yield CallModel(
                ModelRequest(
                    llm=self.setting.llm,
                    model=self.setting.model,
                    provider=self.setting.provider,
                    messages=self.messages,
                    options=options.for_completion(),
                    stream=self.stream,
                    taken_call_ids=frozenset(self.call_ids),
                )
            )
            self._log("round %d, attempt %d: %s", number, attempt, answer.status_code)
            self.usage = _sum(self.usage, answer.reply.usage)
            self.received, self.request_id = answer.reply, uuid7()
            self.unrecorded = (answer, number, attempt)
            if answer.error is None:
                return answer, attempt
            self._record(answer, number, attempt)
            may_help = answer.retryable and not answer.shown
            wait = options.retries.wait_before(attempt, answer.retry_after) if may_help else None  # type: ignore[union-attr]
            if wait is None:
                raise answer.error
            yield Wait(wait)
        raise AssertionError("unreachable")

    def _run_tools(self, number: int, calls: tuple[ToolCall, ...]) -> Generator[Effect, Any, None]:
        """Run a round's calls, so many side by side; each is marked as it starts, and its result written as it ends."""
        waiting = deque(calls[self._at_once :])
        running = list(calls[: self._at_once])
        for call in running:
            yield from self._call_hooks("on_tool_call_start", call)
        failure: Exception | None = None
        while running:
            outcome: ToolOutcome = yield RunTools(tuple((call, self._context(call)) for call in running))
            running.remove(outcome.call)
            failure = failure or outcome.fatal
            following = waiting.popleft() if waiting and failure is None else None
            self._save_outcome(number, outcome, following)
            try:
                yield from self._call_hooks("on_tool_call_end", outcome.call, outcome)
                if following is not None:
                    yield from self._call_hooks("on_tool_call_start", following)
                    running.append(following)
            except Exception as error:
                # What runs side by side has its effects: its result is waited for, and written, before the turn ends.
                failure = failure or error
        if failure is not None:
            raise failure
        self.messages += [{"role": "tool", "tool_call_id": call.id, "content": self.results[call.id]} for call in calls]

    @property
    def _at_once(self) -> int:
        return self.setting.options.tool_concurrency

    def _context(self, call: ToolCall) -> ToolContext:
        return ToolContext(self.setting.chat_id, call.id, self.setting.metadata)

    def _call_hooks(self, name: str, *arguments: Any) -> Generator[Effect, Any, None]:
        for function in self.setting.hooks.get(name, ()):
            yield CallHook(function, arguments)

    # What is written

    def _record(self, answer: Answer, number: int, attempt: int) -> None:
        """Write the request row of a call in its own right. Nothing that goes wrong here hides how the call ended."""
        if not self.setting.options.stores_requests:
            return
        try:
            self.store.transact(self._request(answer, number, attempt))
            self.unrecorded = None
        except Exception as problem:
            self.unrecorded = None
            if answer.error is None:
                raise ReplyNotSaved(
                    f"the request row of a paid call could not be written: {problem}; the reply is in .reply",
                    reply=answer.reply,
                ) from problem
            answer.error.add_note(f"llm_orm: the request row of this call could not be written: {problem}")
            log.warning("the request row of a failed call could not be written: %s", problem)

    def _request(self, answer: Answer, number: int, attempt: int) -> Sql:
        sql, reply, error = self.store.statements, answer.reply, answer.error
        return sql.insert_once(
            self.store.records.request,
            {
                "id": self.request_id,
                "chat_id": sql.living_chat(self.setting.chat_id),
                "message_id": sql.living_message(self.message_id),
                "turn_id": self.turn_id,
                "source": "chat",
                "round": number,
                "attempt": attempt,
                "provider": reply.provider,
                "model": reply.model,
                "status_code": answer.status_code,
                "error": type(error).__name__ if error else None,
                "error_message": answer.error_message,
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
                "provider_request_id": reply.provider_request_id,
                "created_at": now(),
            },
        )

    def _save_round(self, answer: Answer, number: int, attempt: int) -> None:
        """Write a round that asks for tools: its request, its tool calls, and what the model said; one transaction."""
        sql, calls = self.store.statements, answer.reply.tool_calls
        self.rounds.append(answer.reply.message)
        self.messages.append(copy.deepcopy(answer.reply.message))
        self.call_ids |= {call.id for call in calls}
        written: list[Sql] = []
        if self.setting.options.stores_tool_calls:
            rows = [self._tool_call(call, number, position) for position, call in enumerate(calls)]
            written.append(sql.insert(self.store.records.tool_call, *rows))
        self._write(answer, number, attempt, *written, self._update_message(self._columns(answer.reply, "pending")))

    def _tool_call(self, call: ToolCall, number: int, position: int) -> dict[str, Any]:
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
            "status": "running" if position < self._at_once else "pending",
            "created_at": now(),
        }

    def _save_outcome(self, number: int, outcome: ToolOutcome, following: ToolCall | None) -> None:
        """Write a tool's result, together with the mark that the next one starts."""
        self.results[outcome.call.id] = outcome.result
        self._log("tool %s %s", outcome.call.name, outcome.status)
        if not self.setting.options.stores_tool_calls:
            return
        sql, tool_call = self.store.statements, self.store.records.tool_call
        ended = {
            "status": outcome.status,
            "result": outcome.result,
            "error": outcome.error,
            "duration_ms": outcome.duration_ms,
            "finished_at": now(),
        }
        statements = [sql.update(tool_call, ended, message_id=self.message_id, tool_call_id=outcome.call.id)]
        if following is not None:
            start = {"status": "running"}
            statements.append(sql.update(tool_call, start, message_id=self.message_id, tool_call_id=following.id))
        self.store.transact(*statements)

    def _finish(self, answer: Answer, number: int, attempt: int) -> LlmMessage:
        """Write the reply, together with the last request row; one transaction."""
        if self.rounds or not answer.reply.is_plain:
            self.rounds.append(answer.reply.message)
        columns = self._columns(answer.reply, "completed")
        time = {"updated_at": columns["updated_at"]}
        touched = self.store.statements.update(self.store.records.chat, time, id=self.setting.chat_id)
        self._write(answer, number, attempt, touched, *self._settle(columns))
        self.is_settled = True
        return self._stored_message(columns)

    def _write(self, answer: Answer, number: int, attempt: int, *statements: Sql) -> None:
        """Write what a paid call gave, the last statement updating its message; lost is nothing of it."""
        try:
            request = [self._request(answer, number, attempt)] if self.setting.options.stores_requests else []
            rows = self.store.transact(*request, *statements)
            self.unrecorded = None
        except Exception as problem:
            raise ReplyNotSaved(
                f"the model's reply could not be written: {problem}; it is in .reply, whole", reply=answer.reply
            ) from problem
        if not rows:
            raise ReplyNotSaved(
                f"chat {self.setting.chat_id} was deleted, or this turn was cleared as dead by another process; "
                "its reply is in .reply, whole",
                reply=answer.reply,
            )

    def _update_message(self, columns: dict[str, Any]) -> Sql:
        """Update the assistant message, as long as it is still ours."""
        ours = {"id": self.message_id, "status": "pending"}
        return self.store.statements.update(self.store.records.message, columns, returning="id", **ours)

    def _settle(self, columns: dict[str, Any]) -> list[Sql]:
        """Update the message for good, in the place of the failed answer that it replaces."""
        if self.replaces is None:
            return [self._update_message(columns)]
        replaced, self.position = self.replaces
        gone = self.store.statements.delete(self.store.records.message, id=replaced)
        return [gone, self._update_message({**columns, "position": self.position})]

    def _columns(self, reply: Reply, status: str) -> dict[str, Any]:
        return {
            "status": status,
            "content": reply.content,
            "content_raw": self._content_raw(),
            "thinking_text": reply.thinking,
            "thinking_signature": reply.thinking_signature,
            "thinking_tokens": self.usage.thinking_tokens,
            "input_tokens": self.usage.input_tokens,
            "output_tokens": self.usage.output_tokens,
            "cached_tokens": self.usage.cached_tokens,
            "model_id": reply.model,
            "provider": reply.provider or None,
            "updated_at": now(),
        }

    def _content_raw(self) -> dict[str, Any] | None:
        if not self.rounds:
            return None
        raw: dict[str, Any] = {"rounds": self.rounds}
        if self.results and not self.setting.options.stores_tool_calls:
            raw["results"] = self.results
        return raw

    def _stored_message(self, columns: dict[str, Any]) -> LlmMessage:
        return self.store.records.message(
            id=self.message_id,
            chat_id=self.setting.chat_id,
            position=self.position,
            role="assistant",
            created_at=self.opened_at,
            **columns,
        )

    def _give_up(self, error: BaseException) -> None:
        """Leave the chat as `on_error` says, with every call on record."""
        sql = self.store.statements
        if self.unrecorded is not None:
            answer, number, attempt = self.unrecorded
            self._record(answer if answer.error else _ended_by(answer, error), number, attempt)
        statements: list[Sql] = []
        if self.rounds and self.setting.options.stores_tool_calls:
            statements.append(sql.interrupt_tool_calls(id=self.message_id))
        statements += self._kept(error) or [
            sql.delete(self.store.records.message, id=self.message_id, status="pending")
        ]
        self._clear_placeholder(error, *statements)
        self._log("gave up: %s", type(error).__name__)

    def _kept(self, error: BaseException) -> list[Sql]:
        """What keeps the failed answer, where it is to be kept; an empty one does not replace another."""
        if self.setting.options.on_error != "keep":
            return []
        received = self.received or Reply(model=self.setting.model, provider=self.setting.answering_provider)
        if self.replaces and not (self.rounds or received.content):
            return []
        if self.rounds and received.content and received.message is not self.rounds[-1]:
            self.rounds.append({"role": "assistant", "content": received.content})
        return self._settle(self._columns(received, "failed" if isinstance(error, Exception) else "incomplete"))

    def _clear_placeholder(self, error: BaseException, *statements: Sql) -> None:
        """Clear it; where that fails, it does not hide why it was to be done."""
        try:
            self.store.transact(*statements)
        except Exception as problem:
            error.add_note(f"llm_orm: the turn's placeholder could not be cleared: {problem}")

    def _tool_results(self, message_ids: list[UUID]) -> dict[tuple[UUID, str], str]:
        try:
            rows = self.store.read(self.store.statements.tool_results(message_ids))
        except TablesMissing:
            if self.setting.options.stores_tool_calls:
                raise
            return {}
        return {(as_uuid(message_id), call_id): result for message_id, call_id, result in rows}

    def _log(self, text: str, *values: Any) -> None:
        if log.isEnabledFor(logging.DEBUG):
            log.debug(f"chat {self.setting.chat_id}: {text}", *values)


def _sum(one: Usage, other: Usage) -> Usage:
    return Usage(
        one.input_tokens + other.input_tokens,
        one.output_tokens + other.output_tokens,
        one.cached_tokens + other.cached_tokens,
        one.cache_write_tokens + other.cache_write_tokens,
        one.thinking_tokens + other.thinking_tokens,
        one.estimated or other.estimated,
    )


def _ended_by(answer: Answer, error: BaseException) -> Answer:
    """The same paid call, as its request row is written once its reply could not be."""
    return Answer(
        reply=answer.reply,
        error=error,
        error_message=str(error),
        status_code=answer.status_code,
        duration_ms=answer.duration_ms,
        first_token_ms=answer.first_token_ms,
        streamed=answer.streamed,
    )

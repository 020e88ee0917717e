"""How a turn gets hold of its chat: with a new message, one that was left unanswered, or where another turn stopped.

The database lets one turn have it at a time: there is one pending message in a chat, or none.
"""

import logging
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import peewee as pw

from .attachments import reference_only
from .errors import AwaitsApproval, ChatBusy, ChatGone, InvalidValue, NothingToResume, NothingToRetry, WrongSetup
from .middleware import methods_of, stored
from .records import LlmMessage, LlmToolCall, TimeField, now
from .rows import Rows, kept_arguments
from .statements import Sql
from .values import Attachment, Message, Reply, ToolCall, Usage, as_uuid

log = logging.getLogger("llm_orm")

POLL_EVERY_S = 0.05
"""How often a caller who waits for a busy chat looks again."""

MOST_TRIES = 5
"""How often a claim is tried again at once, where nobody is seen in its way."""


@dataclass(frozen=True, slots=True)
class Wait:
    seconds: float


@dataclass(frozen=True, slots=True)
class Said:
    """A new message of the user."""

    text: str
    files: tuple[Attachment, ...] = ()


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The last message of the user, which was left without an answer."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A turn that was parked, or whose process died."""


Start = Said | Unanswered | Unfinished


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a turn had come that is taken up again."""

    calls: tuple[ToolCall, ...] = ()
    """The tool calls of its last round."""
    approved: frozenset[str] = frozenset()
    interrupted: frozenset[str] = frozenset()
    """Those that were running when their process died."""
    rounds: int = 0
    next_round: int = 0
    last_word: Reply | None = None
    """Its reply, where that is there already, and was only to be looked at."""
    unseen: Reply | None = None
    """What asked for them, where none of them was begun: whoever looks at replies may not have seen it yet."""
    call_ids: frozenset[str] = frozenset()
    provider: str = ""
    """Who said what it said."""


class Claim:
    """Gets a chat for a turn, and writes its first rows."""

    def __init__(self, rows: Rows, start: Start, position: int):
        self.rows = rows
        self.start = start
        self.position = position
        """Of the last row that is known already."""
        self.store = rows.store
        self.sql = rows.store.statements
        self.setting = rows.setting
        self.chat_id = rows.setting.chat_id
        self.progress: Progress | None = None

    def take(self) -> Generator[Wait, Any, list[tuple]]:
        """The chat's message rows that are not known yet; raises `ChatBusy` where another turn has it."""
        waited, tries = 0.0, 0
        while True:
            error = None
            try:
                rows = self._take_over() if isinstance(self.start, Unfinished) else self._open()
                if rows is not None:
                    return rows
            except pw.IntegrityError as problem:
                error = problem
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

    # With a message of the user

    def _open(self) -> list[tuple]:
        """Write the turn's first two rows and read what is not known yet: one transaction."""
        rows = self.rows
        rows.opened_at = now()
        written: list[Sql] = []
        if isinstance(self.start, Said):
            place = self.sql.next_position(self.chat_id)
            written += self._question(self.start, place)
        else:
            place = self._find_unanswered()
        placeholder = {"id": rows.message_id, "role": "assistant", "status": "pending"}
        unread = self.sql.messages_after(self.chat_id, self.position)
        try:
            return self.store.transact(*written, rows.message(placeholder, place), unread)
        except (pw.IntegrityError, WrongSetup):
            raise
        except BaseException as error:
            # Broken off in the middle of it, the rows may be there.
            if not getattr(error, "nothing_was_sent", False):
                rows.clear_placeholder(error, self.sql.delete(self.store.records.message, id=rows.message_id))
            raise

    def _question(self, said: Said, place: Sql) -> list[Sql]:
        keeps = self.setting.options.store_files
        kept = [self.rows.as_kept(file if keeps else reference_only(file)) for file in said.files]
        user = {"id": self.rows.turn_id, "role": "user", "status": "completed", "content": said.text or None}
        if kept:
            user["content_raw"] = {"attachments": len(kept)}
        return [self.rows.message(user, place), *self.sql.insert_files(self.rows.turn_id, kept)]

    def _find_unanswered(self) -> int:
        """Where the answer to the last user message goes; behind an answer that failed, until it takes its place.

        The place is named, not computed anew: where another turn answers meanwhile, it is taken.
        """
        last = self.store.read(self.sql.last_message(self.chat_id))
        row_id, position, role, status = last[0] if last else (None, -1, None, None)
        if role == "user":
            self.rows.turn_id, self.rows.replaces = as_uuid(row_id), None
            return position + 1
        question = self.store.read(self.sql.turn_of(self.chat_id, position))
        if role == "assistant" and status in ("failed", "incomplete") and question:
            self.rows.turn_id, self.rows.replaces = as_uuid(question[0][0]), (as_uuid(row_id), position)
            return position + 1
        raise NothingToRetry(f"chat {self.chat_id} has no unanswered user message: use ask()")

    def _make_room(self, error: pw.IntegrityError) -> bool:
        """Find out why the claim failed; True where it may succeed now, False where another turn is running."""
        pending = self.store.read(self.sql.pending_message(self.chat_id))
        if not pending:
            if not self.store.read(self.sql.chat_exists(self.chat_id)):
                raise ChatGone(f"there is no chat {self.chat_id}: it was deleted") from error
            return True  # the other turn has ended meanwhile
        message_id, seen, parked = pending[0]
        if parked is not None:
            raise self._awaits_approval(as_uuid(message_id)) from error
        age = age_of(seen)
        if age < self.setting.options.stale_after:
            return False
        log.debug("chat %s: clearing a turn without a sign of life for %.1f s", self.chat_id, age)
        self._clear(as_uuid(message_id), seen)
        return True

    def _clear(self, message_id: UUID, seen: Any) -> None:
        """End a dead turn as its process would have: by `on_error`. Where two try, one finds nothing left to do."""
        where = {"id": message_id, "status": "pending", "updated_at": Sql(self.sql.param, (seen,))}
        statements: list[Sql] = []
        if self.setting.options.stores_tool_calls:
            masks = methods_of(self.setting.middlewares, "stored_text")
            statements += kept_arguments(self.store, where["id"], lambda text: stored(masks, text)) if masks else []
            statements.append(self.sql.interrupt_tool_calls(**where))
        if self.setting.options.on_error == "keep":
            statements.append(self.sql.update(self.store.records.message, {"status": "incomplete"}, **where))
        else:
            statements.append(self.sql.delete(self.store.records.message, **where))
        self.store.transact(*statements)

    # Where another turn stopped

    def _take_over(self) -> list[tuple] | None:
        """Take a turn that was parked, or whose process died; None where it is alive, or another was faster."""
        message = self._find_unfinished()
        parked, seen = message.parked_at, message.updated_at
        if parked is None and age_of(seen) < self.setting.options.stale_after:
            return None
        calls = self._calls_of(message) if self._keeps_calls or parked is not None else []
        self._check_decided(message, calls)
        self._read_progress(message, calls)
        self._find_question(message.position)
        mark = {"updated_at": seen} if parked is None else {"parked_at": parked}
        alive = {"parked_at": None, "cancelled_at": None, "updated_at": now()}
        ours = {"id": message.id, "status": "pending", **mark}
        taken = self.store.transact(self.sql.update(self.store.records.message, alive, returning="id", **ours))
        return self.store.read(self.sql.messages_after(self.chat_id, self.position)) if taken else None

    def _find_unfinished(self) -> LlmMessage:
        record: Any = self.store.records.message
        with self.store.connection():
            message = record.select().where(record.chat == self.chat_id, record.status == "pending").first()
        if message is None:
            raise NothingToResume(f"chat {self.chat_id} has no unfinished turn: use ask(), or retry()")
        return message

    def _calls_of(self, message: LlmMessage) -> list[LlmToolCall]:
        record: Any = self.store.records.tool_call
        with self.store.connection():
            calls = record.select().where(record.message == message.id)
            return list(calls.order_by(record.round, record.position))

    @property
    def _keeps_calls(self) -> bool:
        return self.setting.options.stores_tool_calls

    def _check_decided(self, message: LlmMessage, calls: list[LlmToolCall]) -> None:
        known = self.setting.options.toolbox.by_name
        for call in calls:
            if call.approval == "required":
                raise self._awaits_approval(message.id)
            if call.approval == "approved" and call.status == "pending" and call.name not in known:
                raise InvalidValue(
                    f"the call {call.tool_call_id!r} of the tool {call.name!r} was approved, and this chat has no tool "
                    "of that name: give tools=[…] to load_chat(), or to the agent's class, before you resume()"
                )

    def _read_progress(self, message: LlmMessage, calls: list[LlmToolCall]) -> None:
        rows, raw, provider = self.rows, message.content_raw or {}, message.provider or ""
        rows.message_id, rows.position, rows.opened_at = message.id, message.position, message.created_at
        rows.rounds, rows.writer, rows.attachments = raw.get("rounds") or [], provider, raw.get("attachments") or 0
        rows.usage = Usage(
            message.input_tokens or 0,
            message.output_tokens or 0,
            message.cached_tokens or 0,
            thinking_tokens=message.thinking_tokens or 0,
        )
        results = {call.tool_call_id: call.result for call in calls if call.result is not None}
        rows.results = results or raw.get("results") or {}
        asked = {call.tool_call_id: _as_asked(call) for call in calls}
        denied = {call.tool_call_id for call in calls if call.approval == "denied"}
        rows.open_calls = {key: call for key, call in asked.items() if key not in rows.results or key in denied}
        last = rows.rounds[-1].get("tool_calls") or [] if rows.rounds else []
        running = {call.tool_call_id for call in calls if call.status == "running"}
        if not self._keeps_calls:  # nobody wrote which of them were started
            running = {call["id"] for call in last} - set(rows.results)
        begun = {call.tool_call_id for call in calls if call.status != "pending" or call.approval is not None}
        known = tuple(asked.get(call["id"]) or _parsed(call) for call in last)
        is_unseen = bool(last) and self._keeps_calls and begun.isdisjoint(call.id for call in known)
        self.progress = Progress(
            calls=known,
            approved=frozenset(call.tool_call_id for call in calls if call.approval == "approved"),
            interrupted=frozenset(running),
            rounds=sum(1 for said in rows.rounds if said.get("tool_calls")),
            next_round=max((call.round for call in calls), default=len(rows.rounds) - 1) + 1,
            last_word=None if last or not (rows.rounds or message.content) else _reply_in(message, rows.rounds),
            unseen=replace(_reply_in(message, rows.rounds), tool_calls=known) if is_unseen else None,
            call_ids=frozenset(call["id"] for said in rows.rounds for call in said.get("tool_calls") or ()),
            provider=provider,
        )

    def _find_question(self, position: int) -> None:
        rows = self.rows
        before = self.store.read(self.sql.message_at(self.chat_id, position - 1))
        rows.replaces = None
        if before and before[0][1] == "assistant" and before[0][2] in ("failed", "incomplete"):
            rows.replaces = (as_uuid(before[0][0]), position - 1)
        question = self.store.read(self.sql.turn_of(self.chat_id, position))
        if question:
            rows.turn_id = as_uuid(question[0][0])

    # What is said where it cannot be had

    def _awaits_approval(self, message_id: UUID) -> AwaitsApproval:
        record: Any = self.store.records.tool_call
        with self.store.connection():
            calls: list[LlmToolCall] = list(
                record.select()
                .where(record.message == message_id, record.approval == "required")
                .order_by(record.round, record.position)
            )
        if not calls:
            return AwaitsApproval(
                f"the turn of chat {self.chat_id} was parked, and its tool calls are decided: go on with resume()"
            )
        names = ", ".join(f"{call.name} ({call.id})" for call in calls)
        return AwaitsApproval(
            f"the turn of chat {self.chat_id} waits for a person: approve() or deny() {names}, then resume(); or end "
            "it with cancel()",
            calls=calls,
        )

    def _busy(self) -> ChatBusy:
        return ChatBusy(
            f"chat {self.chat_id} is busy with another turn; wait=seconds waits for it; a stream of yours that "
            "was left unread is a turn, too, until you close() it; a turn whose process died is cleared once it gave "
            f"no sign of life for stale_after={self.setting.options.stale_after:g} seconds"
        )


def age_of(seen: Any) -> float:
    """Seconds since a sign of life. The clocks of two machines differ: one from the future is one from now."""
    return max((now() - TimeField().python_value(seen)).total_seconds(), 0.0)


def _as_asked(call: LlmToolCall) -> ToolCall:
    return ToolCall(call.tool_call_id, call.name, call.arguments, call.thought_signature)


def _reply_in(message: LlmMessage, rounds: list[Message]) -> Reply:
    return Reply(
        content=message.content,
        thinking=message.thinking_text,
        thinking_signature=message.thinking_signature,
        message=rounds[-1] if rounds else {"role": "assistant", "content": message.content},
        model=message.model_id or "",
        provider=message.provider or "",
    )


def _parsed(call: Message) -> ToolCall:
    function = call["function"]
    signature = (call.get("provider_specific_fields") or {}).get("thought_signature")
    return ToolCall(call["id"], function["name"], function["arguments"], signature)

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
from .errors import (
    AwaitsApproval,
    ChatBusy,
    ChatGone,
    InvalidValue,
    NothingToResume,
    NothingToRetry,
    WrongKey,
    WrongSetup,
)
from .middleware import methods_of, stored
from .records import LlmMessage, LlmToolCall, now
from .rows import Rows
from .statements import Sql
from .stopped import (
    FAILED,
    age_of,
    calls_of,
    end,
    is_whole,
    mark_of,
    next_round,
    pending_message,
    replaced_by,
    taken,
)
from .sums import stats_of
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
    key: str | None = None
    """Says that it is one message, however often it is sent."""


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


@dataclass(frozen=True, slots=True)
class Before:
    """What has become of a message that was said before, with the same key; nothing, where it was not."""

    answer: LlmMessage | None = None
    """Its answer; one that waits for a person's approval, too."""
    place: int | None = None
    """Where its answer goes: it has none."""
    dead: UUID | None = None
    """The answer that was in the making when its process died."""
    left: UUID | None = None
    """The message, where the chat has gone on without an answer to it."""


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
        self.new_id = rows.turn_id
        self.progress: Progress | None = None
        self.before = Before()

    def take(self) -> Generator[Wait, Any, list[tuple]]:
        """The chat's message rows that are not known yet, or none where what is said was answered `before`; raises
        `ChatBusy` where another turn has it."""
        waited, tries = 0.0, 0
        while True:
            error = None
            try:
                is_begun = isinstance(self.start, Unfinished) or self.before.dead is not None
                rows = self._take_over() if is_begun else self._open()
                if rows is not None:
                    return rows
            except pw.IntegrityError as problem:
                error = problem
                tries += 1
                pending = pending_message(self.store, self.chat_id)
                if pending is not None and pending.id == self.rows.message_id:
                    # It was written before the connection was lost that would have said so.
                    return self.store.read(self.sql.messages_after(self.chat_id, self.position))
                self._look_before()
                if self.before.answer is not None:
                    return []
                if self.before.dead is not None or self._make_room(pending, error):
                    if tries > MOST_TRIES:
                        raise  # it is not another turn that is in the way
                    continue
            except NothingToResume:
                if self.before.dead is None:
                    raise
                self.before = Before()  # another was faster, and has ended it
                continue
            self.before = Before() if self.before.dead is not None else self.before
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
        if self.before.place is not None:
            place: Sql | int = self.before.place
        elif isinstance(self.start, Said):
            # In the place of another's placeholder, not behind it: taken back at this moment, it would leave a gap.
            written += self._question(self.start, self.sql.next_idle_position(self.chat_id))
            place = self.sql.next_position(self.chat_id)
        else:
            place = self._find_unanswered()
        if rows.replaces is not None:  # it is gone where another turn has put its reply in its place
            place = self.sql.place_behind(rows.replaces[0])
        called = self.setting.candidates[0]
        placeholder = {
            "id": rows.message_id,
            "role": "assistant",
            "status": "pending",
            "owner": rows.owner,
            "model_id": called.name,
            "provider": called.answering_provider,
        }
        unread = self.sql.messages_after(self.chat_id, self.position)
        try:
            return self.store.transact(*written, rows.message(placeholder, place), unread)
        except WrongKey as error:
            # The history cannot be read, and now has rows of this turn: whoever can read it shall not find them in it.
            message = self.store.records.message
            said = [self.sql.delete(message, id=rows.turn_id)] if written else []
            rows.clear_placeholder(error, self.sql.delete(message, id=rows.message_id), *said)
            raise
        except (pw.IntegrityError, WrongSetup):
            raise
        except BaseException as error:
            # Broken off in the middle of it, the rows may be there.
            if not getattr(error, "nothing_was_sent", False):
                rows.clear_placeholder(error, self.sql.delete(self.store.records.message, id=rows.message_id))
            raise

    def _question(self, said: Said, place: Sql) -> list[Sql]:
        kept = self._kept_files(said)
        user = {"id": self.rows.turn_id, "role": "user", "status": "completed", "content": said.text or None}
        if kept:
            user["content_raw"] = {"attachments": len(kept)}
        free: list[Sql] = []
        if said.key is not None:
            user["request_key"] = said.key
            if self.before.left is not None:
                old = {"id": self.before.left, "request_key": said.key}
                free.append(self.sql.update(self.store.records.message, {"request_key": None}, **old))
        return [*free, self.rows.message(user, place), *self.sql.insert_files(self.rows.turn_id, kept)]

    def _kept_files(self, said: Said) -> list[Attachment]:
        keeps = self.setting.options.store_files
        return [self.rows.as_kept(file if keeps else reference_only(file)) for file in said.files]

    def _look_before(self) -> None:
        """Find out whether what is said was said before, by its key, and what has become of it."""
        if not isinstance(self.start, Said) or self.start.key is None:
            return
        record: Any = self.store.records.message
        of_chat = record.select().where(record.chat == self.chat_id)
        found: list[LlmMessage] = self.store.found(of_chat.where(record.request_key == self.start.key))
        self.rows.turn_id, self.rows.replaces, self.before = self.new_id, None, Before()
        if not found:
            return
        question = found[0]
        self._check_same(self.start, question)
        behind = of_chat.where(record.position > question.position).order_by(record.position)
        following: list[LlmMessage] = self.store.found(behind.limit(3))
        failed = [message for message in following[:1] if message.role == "assistant" and message.status in FAILED]
        answer = next(iter(following[len(failed) :]), None)
        if answer is None:
            self.rows.turn_id = question.id
            self.rows.replaces = (failed[0].id, failed[0].position) if failed else None
            self.before = Before(place=question.position + 1 + len(failed))
        elif answer.role != "assistant" or (failed and answer.status != "pending"):
            self.before = Before(left=question.id)
        elif answer.status != "pending" or answer.parked_at is not None:
            self.before = Before(answer=answer)
        elif age_of(answer.updated_at) >= self.setting.options.stale_after:
            self.before = Before(dead=answer.id)

    def _check_same(self, said: Said, question: LlmMessage) -> None:
        kept = stored(methods_of(self.setting.middlewares, "stored_text"), said.text or None)
        if question.content != kept or self._sums_of(question) != [file.sha256 for file in self._kept_files(said)]:
            raise InvalidValue(
                f"key={said.key!r} of chat {self.chat_id} was given with another message before: a key stands for one "
                "message, so that it is answered once; give this one a key of its own"
            )

    def _sums_of(self, question: LlmMessage) -> list[str]:
        """What tells the files of a question apart; of addresses nothing does: a signed one is another each time."""
        if question.content_raw is None:
            return []
        record: Any = self.store.records.attachment
        files = record.select(record.sha256).where(record.message == question.id).order_by(record.position)
        return [file.sha256 for file in self.store.found(files)]

    def _find_unanswered(self) -> int:
        """Where the answer to the last user message goes; behind an answer that failed, until it takes its place.

        The place is named, not computed anew: where another turn answers meanwhile, it is taken.
        """
        last = self.store.read(self.sql.last_message(self.chat_id))
        row_id, position, role, status, is_erased = last[0] if last else (None, -1, None, None, False)
        if role == "user" and not is_erased:
            self.rows.turn_id, self.rows.replaces = as_uuid(row_id), None
            return position + 1
        question = self.store.read(self.sql.turn_of(self.chat_id, position))
        if role == "assistant" and status in FAILED and question:
            self.rows.turn_id, self.rows.replaces = as_uuid(question[0][0]), (as_uuid(row_id), position)
            return position + 1
        raise NothingToRetry(f"chat {self.chat_id} has no unanswered user message: use ask()")

    def _make_room(self, message: LlmMessage | None, error: pw.IntegrityError) -> bool:
        """Find out why the claim failed; True where it may succeed now, False where another turn is running."""
        if message is None:
            if not self.store.read(self.sql.chat_exists(self.chat_id)):
                raise ChatGone(f"there is no chat {self.chat_id}: it was deleted") from error
            return True  # the other turn has ended meanwhile
        if message.parked_at is not None:
            raise self._awaits_approval(message.id) from error
        age = age_of(message.updated_at)
        if age < self.setting.options.stale_after:
            return False
        log.debug("chat %s: clearing a turn without a sign of life for %.1f s", self.chat_id, age)
        self._clear(message)
        return True

    def _clear(self, message: LlmMessage) -> None:
        """End a dead turn as its process would have: by `on_error`. Where two try, one finds nothing left to do."""
        options = self.setting.options
        masks = methods_of(self.setting.middlewares, "stored_text")
        end(
            self.store,
            message,
            keep=options.on_error == "keep",
            kept=(lambda text: stored(masks, text)) if masks else None,
            stores_tool_calls=options.stores_tool_calls,
            stores_requests=options.stores_requests,
        )

    # Where another turn stopped

    def _take_over(self) -> list[tuple] | None:
        """Take a turn that was parked, or whose process died; None where it is alive, or another was faster."""
        message = self._find_unfinished()
        if self.before.dead not in (None, message.id):
            return None  # another was faster, and the chat has gone on
        parked = message.parked_at
        if parked is None and age_of(message.updated_at) < self.setting.options.stale_after:
            return None
        calls = calls_of(self.store, message.id) if self._keeps_calls or parked is not None else []
        self._check_decided(message, calls)
        begun = taken(self.store, message, calls, self.setting.options.stores_requests)
        self.rows.taken_at = now()  # behind the row of a call that died: that one is not to be forgotten
        alive = {"parked_at": None, "cancelled_at": None, "updated_at": self.rows.taken_at, "owner": self.rows.owner}
        ours = self.sql.update(self.store.records.message, alive, returning="id", **mark_of(message))
        # Read before anything is changed: a turn that was taken and could not be read would pass for one at work.
        unread = self.store.read(self.sql.messages_after(self.chat_id, self.position))
        self._find_question(message)
        try:
            if not self.store.transact(*begun, ours) and not self._is_taken():
                return None
            self._read_progress(message, calls)
        except BaseException as error:
            self._put_back(message, error)
            raise
        return unread

    def _put_back(self, message: LlmMessage, error: BaseException) -> None:
        """Let a turn be as it was found, where taking it was broken off: nobody would be at work on it."""
        found = {"parked_at": message.parked_at, "updated_at": message.updated_at}
        ours = {"id": message.id, "status": "pending", "owner": self.rows.owner}
        try:
            self.store.transact(self.sql.update(self.store.records.message, found, **ours))
        except Exception as problem:
            error.add_note(f"llm_orm: the turn could not be put back: {problem}")

    def _is_taken(self) -> bool:
        """Whether it was us who took it, before the connection was lost that would have said so."""
        message = pending_message(self.store, self.chat_id)
        return message is not None and message.updated_at == self.rows.taken_at

    def _find_unfinished(self) -> LlmMessage:
        message = pending_message(self.store, self.chat_id)
        if message is None:
            raise NothingToResume(f"chat {self.chat_id} has no unfinished turn: use ask(), or retry()")
        return message

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
        rows.usage = self._used(message)
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
            next_round=next_round(message, calls),
            last_word=_reply_in(message, rows.rounds) if is_whole(message) else None,
            unseen=replace(_reply_in(message, rows.rounds), tool_calls=known) if is_unseen else None,
            call_ids=frozenset(call["id"] for said in rows.rounds for call in said.get("tool_calls") or ()),
            provider=provider,
        )

    def _used(self, message: LlmMessage) -> Usage:
        """What the turn has used: its calls that failed since it was last written, too."""
        of: Any = message
        if self.setting.options.stores_requests:
            of = stats_of(self.store, message_id=message.id, tool_calls=False)
        tokens = (of.input_tokens or 0, of.output_tokens or 0, of.cached_tokens or 0)
        return Usage(*tokens, thinking_tokens=of.thinking_tokens or 0)

    def _find_question(self, message: LlmMessage) -> None:
        rows, replaced = self.rows, replaced_by(self.store, message)
        rows.replaces = None if replaced is None else (replaced, message.position - 1)
        question = self.store.read(self.sql.turn_of(self.chat_id, message.position))
        if question:
            rows.turn_id = as_uuid(question[0][0])

    # What is said where it cannot be had

    def _awaits_approval(self, message_id: UUID) -> AwaitsApproval:
        record: Any = self.store.records.tool_call
        waiting = record.select().where(record.message == message_id, record.approval == "required")
        calls: list[LlmToolCall] = self.store.found(waiting.order_by(record.round, record.position))
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

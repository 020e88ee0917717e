"""A chat as it happened: turn by turn, what was said, which models were called, which tools ran, and what it took."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import peewee as pw

from .checks import as_key
from .errors import InvalidValue
from .store import Store, as_store
from .sums import stats_of
from .values import Stats


@dataclass(frozen=True, slots=True)
class TurnFile:
    """A file that came with a message, without its content."""

    id: UUID
    media_type: str
    filename: str | None
    size: int
    """Bytes."""
    url: str | None

    def as_dict(self) -> dict[str, Any]:
        return _as_dict(self)


@dataclass(frozen=True, slots=True)
class TurnMessage:
    """A message. `text` is None where it has none, and where it was erased."""

    id: UUID
    position: int
    role: str
    """user, assistant, system or tool"""
    status: str
    """completed, pending, incomplete or failed"""
    text: str | None
    thinking: str | None
    files: tuple[TurnFile, ...]
    model: str | None
    provider: str | None
    created_at: datetime
    updated_at: datetime
    parked_at: datetime | None = None
    cancelled_at: datetime | None = None

    def as_dict(self) -> dict[str, Any]:
        return _as_dict(self)


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A call of a model.

    id          of its request row; None where there is no such row, as in a copy of a chat: then only its text is known
    text, thinking
                what the model said, where it is stored: not of a call that failed, or whose turn was rolled back
    is_reply    whether that is the reply of the turn, where the same text stands
    cost        None where it is unknown
    """

    id: UUID | None
    round: int
    attempt: int = 1
    model: str | None = None
    provider: str | None = None
    status_code: int | None = None
    """HTTP status; 499 where we hung up, 0 where the connection failed."""
    error: str | None = None
    error_message: str | None = None
    finish_reason: str | None = None
    streamed: bool = False
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    thinking_tokens: int = 0
    usage_estimated: bool = False
    cost: Decimal | None = None
    duration_ms: int | None = None
    first_token_ms: int | None = None
    correction_rounds: int | None = None
    source: str = "chat"
    provider_request_id: str | None = None
    created_at: datetime | None = None
    """When it had ended."""
    text: str | None = None
    thinking: str | None = None
    is_reply: bool = False

    kind = "model"

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **_as_dict(self)}


@dataclass(frozen=True, slots=True)
class ToolRun:
    """A tool call, and its result.

    id        of its row; None where there is no such row, and it is known from the message alone
    status    pending: asked for, not started; running; completed; failed; rejected: a person said no
    approval  required: it waits for a person; approved; denied; None: it needs nobody's approval
    """

    id: UUID | None
    tool_call_id: str
    name: str
    arguments: str
    """JSON, to the letter as the model wrote it."""
    round: int
    position: int
    result: str | None = None
    status: str = "completed"
    error: str | None = None
    approval: str | None = None
    duration_ms: int | None = None
    created_at: datetime | None = None
    finished_at: datetime | None = None

    kind = "tool"

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **_as_dict(self)}


Step = ModelCall | ToolRun


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, what was done to answer it, and the reply.

    question    the message that opened it: of the user; of the role system or tool, where `add_message` or an import
                put it there; None where a message of the assistant stands alone
    steps       calls of models and of tools, in the order in which they happened
    reply       the assistant's message; None where there is none
    status      completed; pending: it runs, or its process died; parked: it waits for an approval; failed, incomplete:
                its reply was kept as that; rolled_back: models were called, and no reply was kept; unanswered
    stats       sums over its steps
    """

    question: TurnMessage | None
    steps: tuple[Step, ...]
    reply: TurnMessage | None
    status: str
    stats: Stats

    @property
    def is_asked(self) -> bool:
        """Whether it is a turn of the user's, and not a message that stands alone."""
        return self.question is not None and self.question.role == "user"

    @property
    def position(self) -> int:
        """That of the message that opened it."""
        said = self.question or self.reply
        return said.position if said else -1

    @property
    def cost(self) -> Decimal:
        """US dollars, of the calls whose price is known."""
        return self.stats.cost

    @property
    def unpriced_requests(self) -> int:
        return self.stats.unpriced_requests

    @property
    def total_tokens(self) -> int:
        return self.stats.total_tokens

    @property
    def duration_ms(self) -> int:
        """Time spent waiting for models."""
        return self.stats.duration_ms

    def as_dict(self) -> dict[str, Any]:
        return _as_dict(self)


@dataclass(frozen=True, slots=True)
class Chronicle:
    """A chat as it happened.

    turns            in order
    besides          calls of models and tools whose turn is not there any longer: its question was deleted
    turns_before     how many earlier turns were left out, by `last` or `before`
    stats            sums over the whole chat, as of `Chat.stats`
    columns          the application's own: {"user_id": "u_1"}
    session_metadata the inputs of its agent's session
    """

    id: UUID
    model: str | None
    provider: str | None
    instructions: str | None
    metadata: Any
    columns: Mapping[str, Any]
    agent_class: str | None
    session_metadata: Any
    created_at: datetime
    updated_at: datetime
    turns: tuple[Turn, ...]
    besides: tuple[Step, ...]
    turns_before: int
    stats: Stats

    def as_dict(self) -> dict[str, Any]:
        return _as_dict(self)


def _as_dict(value: Any) -> dict[str, Any]:
    return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value.as_dict() if hasattr(value, "as_dict") else value


def chronicle(
    store: Store | pw.Database | str | None,
    chat_id: UUID | str | None,
    *,
    last: int | None = None,
    before: int | None = None,
) -> Chronicle | None:
    """A chat as it happened, or None where there is no such chat; a query for each table.

    last      only so many turns, the latest
    before    only turns that opened before this position: `turns[0].position` of the page that came last

    Sums over its turns and what is `besides` are those of `Chat.stats`, to the cent.
    """
    store, key = as_store(store), as_key(chat_id)
    _check_page(last, before)
    if key is None:
        return None
    store.pay()
    rows = _Rows(store, key)
    chat = rows.chat()
    if chat is None:
        return None
    first = rows.first_position(last, before)
    messages = rows.messages(first, before)
    turns_before = rows.turns_before(first)
    ids = None if first is None and before is None else rows.turn_ids(first, before)
    session = rows.session()
    turns, besides = _Story(messages, rows.files(messages), rows.requests(ids), rows.tool_calls(ids)).told()
    return Chronicle(
        id=chat.id,
        model=chat.model,
        provider=chat.provider,
        instructions=chat.instructions,
        metadata=chat.metadata,
        columns={name: chat.__data__.get(name) for name in store.chat_columns},  # of a foreign key, the key alone
        agent_class=session.agent_class if session else None,
        session_metadata=session.metadata if session else None,
        created_at=chat.created_at,
        updated_at=chat.updated_at,
        turns=turns,
        besides=besides,
        turns_before=turns_before,
        stats=rows.stats(),
    )


async def achronicle(
    store: Store | pw.Database | str | None,
    chat_id: UUID | str | None,
    *,
    last: int | None = None,
    before: int | None = None,
) -> Chronicle | None:
    """`chronicle`, from asyncio."""
    store = as_store(store)
    return await store.off_the_loop(lambda: chronicle(store, chat_id, last=last, before=before))


def _check_page(last: Any, before: Any) -> None:
    for name, value, least in (("last", last, 1), ("before", before, 0)):
        is_number = isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31
        if value is not None and not is_number:
            raise InvalidValue(f"{name}={value!r} is not a whole number from {least} on")


# What is read


class _Rows:
    """The rows of one chat, of the tables that are there."""

    def __init__(self, store: Store, key: UUID):
        self.store, self.key, self.records = store, key, store.records
        self.there: dict[Any, bool] = {}

    def chat(self) -> Any:
        record: Any = self.records.chat
        found = self.store.found(record.select().where(record.id == self.key))
        return found[0] if found else None

    def session(self) -> Any:
        record: Any = self.records.agent_session
        found = self._found(record, record.select().where(record.chat == self.key).limit(1))
        return found[0] if found else None

    def first_position(self, last: int | None, before: int | None) -> int | None:
        """Where the last turns begin; None where that is the beginning."""
        if last is None:
            return None
        record: Any = self.records.message
        users = record.select(record.position).where(record.chat == self.key, record.role == "user")
        users = users if before is None else users.where(record.position < before)
        found = self.store.found(users.order_by(record.position.desc()).limit(1).offset(last - 1).tuples())
        return found[0][0] if found else None

    def turns_before(self, first: int | None) -> int:
        if first is None:
            return 0
        record: Any = self.records.message
        users = record.select(pw.fn.COUNT(record.id)).where(record.chat == self.key, record.role == "user")
        return self.store.found(users.where(record.position < first).tuples())[0][0]

    def messages(self, first: int | None, before: int | None) -> list[Any]:
        record: Any = self.records.message
        query = record.select(*(getattr(record, name) for name in OF_MESSAGE))
        return self.store.found(self._between(query, first, before).order_by(record.position))

    def turn_ids(self, first: int | None, before: int | None) -> Callable[[Any], Any]:
        """What is true of rows of the turns that are shown; and of those whose turn is not there, on the last page."""
        record: Any = self.records.message
        shown = self._between(record.select(record.id), first, before)
        others = record.select(record.id).where(record.chat == self.key)
        if before is not None:
            return lambda turn: turn.in_(shown)
        return lambda turn: turn.in_(shown) | turn.is_null() | turn.not_in(others)

    def _between(self, query: Any, first: int | None, before: int | None) -> Any:
        record: Any = self.records.message
        conditions = [record.chat == self.key]
        conditions += [record.position >= first] if first is not None else []
        conditions += [record.position < before] if before is not None else []
        return query.where(*conditions)

    def files(self, messages: Sequence[Any]) -> dict[UUID, list[TurnFile]]:
        record: Any = self.records.attachment
        ids = [message.id for message in messages if (message.content_raw or {}).get("attachments")]
        files: dict[UUID, list[TurnFile]] = {}
        names = (record.message, record.id, record.media_type, record.filename, record.size, record.url)
        for start in range(0, len(ids), IDS_AT_ONCE):
            some = record.message.in_(ids[start : start + IDS_AT_ONCE])
            query = record.select(*names).where(some).order_by(record.message, record.position)
            for message_id, *file in self._found(record, query.tuples()):
                files.setdefault(message_id, []).append(TurnFile(*file))
        return files

    def requests(self, of_turns: Callable[[Any], Any] | None) -> list[Any]:
        record: Any = self.records.request
        query = self._of_chat(record, CALLED)
        query = query if of_turns is None else query.where(of_turns(record.turn_id))
        return self._found(record, query.order_by(record.created_at, record.round, record.attempt, record.id))

    def tool_calls(self, of_turns: Callable[[Any], Any] | None) -> list[Any]:
        record: Any = self.records.tool_call
        query = self._of_chat(record, RAN)
        query = query if of_turns is None else query.where(of_turns(record.turn_id))
        return self._found(record, query.order_by(record.created_at, record.round, record.position, record.id))

    def _of_chat(self, record: Any, names: Sequence[str]) -> Any:
        columns = [getattr(record, name) for name in (*names, "message", "turn_id")]
        return record.select(*columns).where(record.chat == self.key)

    def stats(self) -> Stats:
        with_calls = self._has(self.records.tool_call)
        if self._has(self.records.request):
            return stats_of(self.store, chat_id=self.key, tool_calls=with_calls)
        call: Any = self.records.tool_call
        counted = call.select(pw.fn.COUNT(call.id)).where(call.chat == self.key)
        return Stats(tool_calls=self.store.found(counted.tuples())[0][0] if with_calls else 0)

    def _found(self, record: Any, query: Any) -> list[Any]:
        return self.store.found(query) if self._has(record) else []

    def _has(self, record: Any) -> bool:
        if record not in self.there:
            self.there[record] = self.store.has_table(record)
        return self.there[record]


IDS_AT_ONCE = 500

OF_MESSAGE = (
    "id position role status content content_raw thinking_text model_id provider created_at updated_at parked_at "
    "cancelled_at"
).split()


# How it is put together


@dataclass
class _Draft:
    """A turn in the making."""

    question: Any = None
    replies: list[Any] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)


class _Story:
    """The rows of a chat, put into the order in which things happened."""

    def __init__(
        self, messages: list[Any], files: Mapping[UUID, list[TurnFile]], requests: list[Any], calls: list[Any]
    ):
        self.files = files
        self.drafts: list[_Draft] = []
        self.besides = _Draft()
        self._of_message: dict[UUID, _Draft] = {}
        self._put_messages(messages, {row.message_id: row.turn_id for row in (*requests, *calls) if row.message_id})
        for row in requests:
            self._draft_of(row).requests.append(row)
        for row in calls:
            self._draft_of(row).calls.append(row)

    def told(self) -> tuple[tuple[Turn, ...], tuple[Step, ...]]:
        return tuple(self._turn(draft) for draft in self.drafts), tuple(_steps(self.besides))

    def _put_messages(self, messages: list[Any], turns: Mapping[UUID, UUID | None]) -> None:
        asked: _Draft | None = None
        for message in messages:
            if message.role != "assistant":
                draft = self._opened(question=message)
                asked = draft if message.role == "user" else asked
            else:
                turn_id = turns.get(message.id)
                draft = asked if turn_id is None else self._of_message.get(turn_id)
                if draft is None or draft.replies:
                    draft = self._opened()
                draft.replies.append(message)
            self._of_message[message.id] = draft

    def _opened(self, question: Any = None) -> _Draft:
        self.drafts.append(_Draft(question))
        return self.drafts[-1]

    def _draft_of(self, row: Any) -> _Draft:
        for key in (row.turn_id, row.message_id):
            if key in self._of_message:
                return self._of_message[key]
        return self.besides

    def _turn(self, draft: _Draft) -> Turn:
        reply = draft.replies[0] if draft.replies else None
        steps = _steps(draft)
        return Turn(
            question=self._said(draft.question),
            steps=tuple(steps),
            reply=self._said(reply),
            status=_status(draft, reply),
            stats=_stats(draft),
        )

    def _said(self, message: Any) -> TurnMessage | None:
        if message is None:
            return None
        return TurnMessage(
            id=message.id,
            position=message.position,
            role=message.role,
            status=message.status,
            text=message.content,
            thinking=message.thinking_text,
            files=tuple(self.files.get(message.id, ())),
            model=message.model_id,
            provider=message.provider,
            created_at=message.created_at,
            updated_at=message.updated_at,
            parked_at=message.parked_at,
            cancelled_at=message.cancelled_at,
        )


def _status(draft: _Draft, reply: Any) -> str:
    if reply is not None:
        return "parked" if reply.status == "pending" and reply.parked_at is not None else reply.status
    if draft.question is not None and draft.question.role != "user":
        return draft.question.status
    return "rolled_back" if draft.requests or draft.calls else "unanswered"


def _stats(draft: _Draft) -> Stats:
    rows = draft.requests
    names = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "thinking_tokens", "duration_ms")
    sums = {name: sum(getattr(row, name) for row in rows) for name in names}
    return Stats(
        **sums,
        total_tokens=sums["input_tokens"] + sums["output_tokens"],
        cost=sum((row.cost for row in rows if row.cost is not None), Decimal(0)),
        requests=len(rows),
        failed_requests=sum(row.error is not None for row in rows),
        unpriced_requests=sum(row.cost is None for row in rows),
        tool_calls=len(draft.calls),
    )


def _steps(draft: _Draft) -> list[Step]:
    """The calls of models, and behind each of them those of the tools that it asked for."""
    draft.requests = [draft.requests[place] for place in _in_order(draft.requests)]
    order: list[Any] = list(draft.requests)
    said: dict[int, dict[str, Any]] = {}  # by the place in `order`
    behind: dict[int, list[ToolRun]] = {}
    unmade: dict[Any, int] = {}

    def place_of(row: Any) -> int:
        """Where the call of a model stands that asked for a tool; one without a request row comes to stand there."""
        found = _nearest(draft.requests, row)
        if found is not None:
            return found
        key = (row.message_id, row.round)
        if key not in unmade:
            unmade[key] = len(order)
            order.append(row)
        return unmade[key]

    for row in draft.calls:
        behind.setdefault(place_of(row), []).append(_tool_run(row))
    for reply in draft.replies:
        _add_what_was_said(draft, reply, order, behind, said, place_of)
    steps: list[Step] = []
    for index in _in_order(order):
        steps.append(_model_call(order[index], index < len(draft.requests), said.get(index, {})))
        steps += behind.get(index, ())
    return steps


@dataclass(frozen=True)
class _Unrecorded:
    """A call of a model of which there is neither a request row nor a tool call's: only what it said."""

    round: int
    created_at: datetime
    message_id: UUID | None = None


def _add_what_was_said(
    draft: _Draft,
    reply: Any,
    order: list[Any],
    behind: dict[int, list[ToolRun]],
    said: dict[int, dict[str, Any]],
    place_of: Callable[[Any], int],
) -> None:
    """Find for each round of a reply the call of the model in which it was said."""
    raw = reply.content_raw or {}
    rounds = raw.get("rounds") or []
    known = {row.tool_call_id: row for row in draft.calls if row.message_id == reply.id}
    good = [i for i, row in enumerate(draft.requests) if row.message_id == reply.id and row.error is None]
    asking = [i for i in good if draft.requests[i].finish_reason == "tool_calls"]
    if len(asking) < sum(bool(message.get("tool_calls")) for message in rounds):
        asking = good  # not every provider says why it stopped
    unnamed = iter(asking)
    for number, message in enumerate(rounds):
        calls = message.get("tool_calls") or []
        if not calls:
            continue
        rows = [known[call.get("id")] for call in calls if call.get("id") in known]
        place = place_of(rows[0]) if rows else next(unnamed, None)
        if place is None:
            place = len(order)
            order.append(_Unrecorded(number, reply.created_at, reply.id))
        said[place] = {"text": message.get("content") or None, "thinking": _thinking(message)}
        runs = behind.setdefault(place, [])
        results = raw.get("results") or {}
        for position, call in enumerate(calls):
            if call.get("id") not in known:
                runs.append(_run_in_message(call, number, position, results))
    last = good[-1] if good else None
    is_told = bool(reply.model_id) and not (rounds and rounds[-1].get("tool_calls"))
    if last is not None and last not in said and is_told:
        said[last] = {"text": reply.content, "thinking": reply.thinking_text, "is_reply": True}


def _nearest(requests: list[Any], row: Any) -> int | None:
    """Which of the calls of a model asked for a tool: of its round and message, one that did not fail; the nearest."""
    places = [i for i, each in enumerate(requests) if each.round == row.round and each.message_id == row.message_id]

    def distance(place: int) -> tuple[bool, timedelta]:
        return requests[place].error is not None, abs(requests[place].created_at - row.created_at)

    return min(places, key=distance, default=None)


def _in_order(calls: list[Any]) -> list[int]:
    """The places of calls of a model as they were made: those of one reply by round, the rest by time."""
    began: dict[Any, datetime] = {}
    for row in calls:
        began[row.message_id] = min(row.created_at, began.get(row.message_id, row.created_at))

    def order(place: int) -> tuple[Any, ...]:
        row, key = calls[place], calls[place].message_id
        # Tries that were rolled back have no message, and each of them begins with round 0.
        first = row.created_at if key is None else began[key]
        return first, str(key), row.round, row.created_at, getattr(row, "attempt", 0), place

    return sorted(range(len(calls)), key=order)


def _thinking(message: Mapping[str, Any]) -> str | None:
    if message.get("reasoning_content"):
        return message["reasoning_content"]
    blocks: Iterable[Any] = message.get("thinking_blocks") or ()
    return "\n".join(block["thinking"] for block in blocks if block.get("thinking")) or None


CALLED = [each.name for each in fields(ModelCall) if each.name not in ("text", "thinking", "is_reply")]
RAN = [each.name for each in fields(ToolRun)]


def _model_call(row: Any, is_recorded: bool, said: Mapping[str, Any]) -> ModelCall:
    if not is_recorded:
        return ModelCall(None, row.round, created_at=row.created_at, **said)
    return ModelCall(**{name: getattr(row, name) for name in CALLED}, **said)


def _tool_run(row: Any) -> ToolRun:
    return ToolRun(**{name: getattr(row, name) for name in RAN})


def _run_in_message(call: Mapping[str, Any], number: int, position: int, results: Mapping[str, str]) -> ToolRun:
    function: Mapping[str, Any] = call.get("function") or {}
    key, result = str(call.get("id") or ""), results.get(str(call.get("id")))
    return ToolRun(
        id=None,
        tool_call_id=key,
        name=str(function.get("name") or ""),
        arguments=str(function.get("arguments") or ""),
        round=number,
        position=position,
        result=result,
        status="completed" if result is not None else "pending",
    )

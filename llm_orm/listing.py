"""Chats and requests as lists, a page at a time."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import peewee as pw

from .checks import clear_about
from .dimensions import conditions, joins, own_columns
from .encryption import MARKED
from .errors import InvalidValue, meant
from .filters import Moment, Where, chat_conditions, span, within
from .periods import zone
from .statements import Sql
from .store import Store, as_store
from .sums import dollars, summable

EVERYTHING = pw.SQL("1 = 1")

NO_TEXT = "CAST(NULL AS TEXT)"
"""What PostgreSQL orders by; by a bare NULL it does not."""

LONGEST_TITLE = 80
READ_FOR_TITLE = 400
"""Characters of a message that are read for its title: some of them are spaces."""


@dataclass(frozen=True, slots=True)
class ChatLine:
    """A chat in a list: what it is called, and what it took until now.

    title      the beginning of the user's first message, on one line; None where there is none, or it was erased
    status     of its last message: completed, pending, incomplete, failed; None where it has none
    turns      how often the user said something
    cost       of the requests whose price is known, in US dollars; `unpriced_requests` are left out
    columns    the application's own: {"user_id": "u_1"}
    """

    id: UUID
    title: str | None
    model: str | None
    provider: str | None
    agent_class: str | None
    metadata: Any
    created_at: datetime
    updated_at: datetime
    status: str | None
    messages: int
    turns: int
    requests: int
    failed_requests: int
    unpriced_requests: int
    cost: Decimal
    total_tokens: int
    columns: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True, slots=True)
class RequestLine:
    """A request in a list: its row, and the agent of its chat. `chat_id` is None once the chat was deleted."""

    id: UUID
    chat_id: UUID | None
    message_id: UUID | None
    turn_id: UUID | None
    agent_class: str | None
    source: str
    round: int
    attempt: int
    provider: str
    model: str
    status_code: int
    error: str | None
    error_message: str | None
    finish_reason: str | None
    duration_ms: int
    first_token_ms: int | None
    streamed: bool
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    thinking_tokens: int
    usage_estimated: bool
    cost: Decimal | None
    correction_rounds: int | None
    provider_request_id: str | None
    created_at: datetime

    def as_dict(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


# Chats


def chats(
    store: Store | pw.Database | str | None,
    *,
    where: Where | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    order: str = "-updated_at",
    limit: int | None = 50,
    offset: int = 0,
    tz: Any = "UTC",
) -> list[ChatLine]:
    """A page of the chats, with what each of them took; one query.

    where           as of `erase`: {"user_id": "u_1"}; all of them hold; of several values in a list, one does
    since, until    those in which something was said from `since` on, and which were made before `until`
    order           a figure, a time or a column of the line, behind "-" the largest first: "-cost", "created_at"
    limit, offset   so many, behind so many; limit=None: all

    Raises `InvalidValue` and `UnknownKeyword`.
    """
    store = as_store(store)
    chat: Any = store.records.chat
    which = [] if where is None or where == {} else chat_conditions(store, "chats()", where)
    first, end = span(since, until, zone(tz))
    which += [chat.updated_at >= first] if first else []
    which += [chat.created_at < end] if end else []
    store.pay()
    query = _ChatLines(store).page(which, order, *_checked_page("chats()", limit, offset))
    return [_chat_line(store, row) for row in store.found(query.tuples())]


async def achats(
    store: Store | pw.Database | str | None,
    *,
    where: Where | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    order: str = "-updated_at",
    limit: int | None = 50,
    offset: int = 0,
    tz: Any = "UTC",
) -> list[ChatLine]:
    """`chats`, from asyncio."""
    store, span = as_store(store), {"since": since, "until": until, "tz": tz}
    return await store.off_the_loop(lambda: chats(store, where=where, order=order, limit=limit, offset=offset, **span))


OF_MESSAGES = ("messages", "turns")
OF_REQUESTS = ("requests", "failed_requests", "unpriced_requests", "cost", "total_tokens")
OF_CHAT = ("id", "model", "provider", "metadata", "created_at", "updated_at")


class _ChatLines:
    """The query behind a page: its ids first, then the sums over the rows of these chats alone."""

    def __init__(self, store: Store):
        records: Any = store.records
        self.store, self.chat, self.message = store, records.chat, records.message
        self.session = records.agent_session if store.has_table(records.agent_session) else None
        self.request = records.request if store.has_table(records.request) else None

    def page(self, conditions: list[Any], order: str, limit: int | None, offset: int) -> Any:
        chat, key = self.chat, "chat_id"
        by, is_descending, is_nullable, sums = self._order(order, conditions)
        ids = chat.select(chat.id, by)
        if sums is not None:
            ids = ids.join(sums, pw.JOIN.LEFT_OUTER, on=(sums.c.chat_id == chat.id))
        in_order = [_ordered(by, is_descending, is_nullable), _ordered(chat.id, is_descending)]
        ids = ids.where(EVERYTHING, *conditions).order_by(*in_order).limit(limit).offset(offset)
        page = ids.cte("page", columns=("id", "by"))
        chosen = page.select(page.c.id)
        said, spent = self._said(chosen).cte("said"), self._spent(chosen).cte("spent")
        source = page.join(chat, pw.JOIN.LEFT_OUTER, on=(chat.id == page.c.id))
        source = source.join(said, pw.JOIN.LEFT_OUTER, on=(said.c[key] == page.c.id))
        source = source.join(spent, pw.JOIN.LEFT_OUTER, on=(spent.c[key] == page.c.id))
        counts = [pw.fn.COALESCE(said.c[name], 0) for name in OF_MESSAGES]
        counts += [pw.fn.COALESCE(spent.c[name], 0).coerce(False) for name in OF_REQUESTS]
        own = [getattr(chat, name) for name in self.store.chat_columns]
        named = [getattr(chat, name) for name in OF_CHAT]
        made = [self._agent(), self._title(), self._status(), *counts]
        # By the name of a column, peewee would choose what reads its values.
        made = [each.alias(f"made_{number}") for number, each in enumerate(made)]
        columns = [*named, *made, *own]
        in_order = [_ordered(page.c.by, is_descending, is_nullable), _ordered(page.c.id, is_descending)]
        return chat.select(*columns).from_(source).with_cte(page, said, spent).order_by(*in_order)

    def _order(self, order: str, conditions: list[Any]) -> tuple[Any, bool, bool, Any]:
        """(what to order by, whether the largest comes first, whether it may be NULL, what is to be joined for it)"""
        chat, known = self.chat, ("title", "status", "metadata")
        names = [each.name for each in fields(ChatLine) if each.name not in (*known, "columns")]
        name, is_descending = _order_of("chats()", order, (*names, *self.store.chat_columns))
        if name in OF_MESSAGES + OF_REQUESTS:
            meant = chat.select(chat.id).where(*conditions) if conditions else None
            sums = (self._said(meant) if name in OF_MESSAGES else self._spent(meant)).alias("sums")
            return pw.fn.COALESCE(sums.c[name], 0), is_descending, False, sums
        if name == "agent_class":
            return self._agent(), is_descending, True, None
        return getattr(chat, name), is_descending, getattr(chat, name).null, None

    def _said(self, chosen: Any = None) -> Any:
        message, fn = self.message, pw.fn
        turns = fn.SUM(pw.Case(None, [(message.role == "user", 1)], 0))
        query = message.select(message.chat, fn.COUNT(message.id).alias("messages"), turns.alias("turns"))
        return self._of(query, message, chosen)

    def _spent(self, chosen: Any = None) -> Any:
        request, fn = self.request, pw.fn
        if request is None:
            nothing = [pw.Value(0).alias(name) for name in OF_REQUESTS]
            return self.chat.select(self.chat.id.alias("chat_id"), *nothing).where(pw.SQL("1 = 0"))
        sums = (
            fn.COUNT(request.id),
            fn.SUM(pw.Case(None, [(request.error.is_null(False), 1)], 0)),
            fn.SUM(pw.Case(None, [(request.cost.is_null(), 1)], 0)),
            fn.SUM(summable(self.store, request.cost)),
            fn.SUM(request.input_tokens) + fn.SUM(request.output_tokens),
        )
        columns = [each.alias(name) for name, each in zip(OF_REQUESTS, sums, strict=True)]
        return self._of(request.select(request.chat, *columns), request, chosen)

    def _of(self, query: Any, record: Any, chosen: Any) -> Any:
        which = record.chat.is_null(False) if chosen is None else record.chat.in_(chosen)
        return query.where(which).group_by(record.chat)

    def _agent(self) -> Any:
        session = self.session
        if session is None:
            return pw.SQL(NO_TEXT)
        return session.select(session.agent_class).where(session.chat == self.chat.id)

    def _title(self) -> Any:
        message = self.message.alias("first_message")
        text = message.content
        # A token is read whole; of a text of ten megabytes, the beginning.
        is_token = pw.fn.SUBSTR(text, 1, len(MARKED)) == pw.Value(MARKED, converter=False)
        beginning = pw.Case(None, [(is_token, text)], pw.fn.SUBSTR(text, 1, READ_FOR_TITLE)).coerce(False)
        said = message.select(beginning).where(message.chat == self.chat.id, message.role == "user")
        return said.where(text.is_null(False)).order_by(message.position).limit(1)

    def _status(self) -> Any:
        message = self.message.alias("last_message")
        last = message.select(message.status).where(message.chat == self.chat.id)
        return last.order_by(message.position.desc()).limit(1)


def _chat_line(store: Store, row: tuple) -> ChatLine:
    key, model, provider, metadata, created_at, updated_at, agent, title, status, *rest = row
    messages, turns, requests, failed, unpriced, cost, tokens = rest[:7]
    text = None if title is None else store.records.message.content.python_value(title)
    return ChatLine(
        id=key,
        title=title_of(text),
        model=model,
        provider=provider,
        agent_class=agent,
        metadata=metadata,
        created_at=created_at,
        updated_at=updated_at,
        status=status,
        messages=int(messages),
        turns=int(turns),
        requests=int(requests),
        failed_requests=int(failed),
        unpriced_requests=int(unpriced),
        cost=dollars(store, cost),
        total_tokens=int(tokens),
        columns=dict(zip(store.chat_columns, rest[7:], strict=True)),
    )


def title_of(text: str | None) -> str | None:
    """The beginning of a text, on one line."""
    line = " ".join((text or "")[:READ_FOR_TITLE].split())
    if len(line) <= LONGEST_TITLE:
        return line or None
    return line[: LONGEST_TITLE - 1].rstrip() + "…"


# Requests


def requests(
    store: Store | pw.Database | str | None,
    *,
    where: Where | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    order: str = "-created_at",
    limit: int | None = 50,
    offset: int = 0,
    tz: Any = "UTC",
) -> list[RequestLine]:
    """A page of the requests, of chats that are there and of those that were deleted; one query.

    where           by the names of `usage`: {"model": "gpt-4o", "status": [429, 503], "user_id": "u_1"}; "chat" is the
                    id of its chat, "tool" one that the model asked for in it; None is what is not known
    since, until    when the call had ended
    order           a column of the row, behind "-" the largest first: "-cost", "created_at"
    limit, offset   so many, behind so many; limit=None: all

    Raises `InvalidValue` and `UnknownKeyword`.
    """
    store = as_store(store)
    limit, offset = _checked_page("requests()", limit, offset)
    name, is_descending = _order_of("requests()", order, [each for each in REQUEST_COLUMNS if each != "error_message"])
    wheres, needs = _request_conditions(store, where)
    first, end = span(since, until, zone(tz))
    wheres += within(store, "r.created_at", first, end)
    has_agents = store.has_table(store.records.agent_session)
    columns = {each: f'r."{each}"' for each in REQUEST_COLUMNS}
    columns["agent_class"] = "s.agent_class" if has_agents else NO_TEXT
    direction = "DESC" if is_descending else "ASC"
    last = " NULLS LAST" if name in NULLABLE else ""
    page = f"LIMIT {-1 if store.is_sqlite else 'ALL'}" if limit is None else f"LIMIT {limit}"
    text = (
        f"SELECT {', '.join(columns.values())} FROM {joins(store, needs | ({'s'} if has_agents else set()))} "
        f"{'WHERE ' if wheres else ''}{' AND '.join(each.text for each in wheres)} "
        f"ORDER BY {columns[name]} {direction}{last}, r.id {direction} {page} OFFSET {offset}"
    )
    params = tuple(value for each in wheres for value in each.params)
    store.pay()
    with clear_about("requests()", own_columns(store, where)):
        rows = store.read(Sql(text, params))
    return list(_request_lines(store, rows))


async def arequests(
    store: Store | pw.Database | str | None,
    *,
    where: Where | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    order: str = "-created_at",
    limit: int | None = 50,
    offset: int = 0,
    tz: Any = "UTC",
) -> list[RequestLine]:
    """`requests`, from asyncio."""
    store, span = as_store(store), {"since": since, "until": until, "tz": tz}
    return await store.off_the_loop(
        lambda: requests(store, where=where, order=order, limit=limit, offset=offset, **span)
    )


REQUEST_COLUMNS = [each.name for each in fields(RequestLine)]
NULLABLE = {"chat_id", "message_id", "turn_id", "agent_class", "error", "finish_reason", "first_token_ms", "cost"}
NULLABLE |= {"correction_rounds", "provider_request_id"}


def _request_conditions(store: Store, where: Where | None) -> tuple[list[Sql], set[str]]:
    """What `where` says of r, a request; of a tool: that the call of the model asked for it."""
    found, needs = conditions(store, "requests()", where)
    for place, name in enumerate(where or {}):
        if name == "tool":
            tool_call = store.records.tool_call._meta.table_name  # type: ignore[attr-defined]
            same = "t.chat_id = r.chat_id AND t.turn_id = r.turn_id AND t.round = r.round"
            text = f'EXISTS (SELECT 1 FROM "{tool_call}" t WHERE {same} AND {found[place].text})'
            found[place] = Sql(text, found[place].params)
    return found, needs


def _request_lines(store: Store, rows: Iterable[tuple]) -> Iterable[RequestLine]:
    columns = store.records.request._meta.columns  # type: ignore[attr-defined]
    read = [columns[name].python_value if name in columns else lambda value: value for name in REQUEST_COLUMNS]
    for row in rows:
        yield RequestLine(*(how(value) for how, value in zip(read, row, strict=True)))


# Pages


def _checked_page(call: str, limit: Any, offset: Any) -> tuple[int | None, int]:
    for name, value in (("limit", limit), ("offset", offset)):
        is_number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        if not is_number and not (name == "limit" and value is None):
            raise InvalidValue(f"{call}: {name}={value!r} is not a whole number from 0 on")
    return limit, offset


def _order_of(call: str, order: Any, known: Any) -> tuple[str, bool]:
    """(the name, whether the largest comes first)"""
    name = order.removeprefix("-") if isinstance(order, str) else ""
    if name not in known:
        right = meant(name, list(known))
        hint = f"; did you mean {right!r}?" if right else ""
        raise InvalidValue(f"{call} cannot order by {order!r}; it takes {', '.join(known)}, or -cost{hint}")
    return name, order.startswith("-")


def _ordered(by: Any, is_descending: bool, is_nullable: bool = False) -> Any:
    # Where there is no NULL, not to speak of it lets the database go along an index.
    last: Any = {"nulls": "last"} if is_nullable else {}
    return pw.Ordering(by, "DESC" if is_descending else "ASC", **last)

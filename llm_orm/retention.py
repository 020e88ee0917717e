"""What is not kept: the contents of chats that are erased, and chats that nobody has used for long."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import peewee as pw

from .errors import ChatBusy, ChatGone, InvalidValue, UnknownKeyword
from .filters import Where, chat_conditions
from .heart import BEAT_EVERY_S
from .options import Options
from .records import LlmMessage, now
from .stopped import age_of, end
from .store import Store, as_store
from .views import stem_of
from .words import search_table

AT_ONCE = 50
"""How many chats go in one transaction."""

STALE_AFTER_S = Options().stale_after

WORDS_AT_ONCE = 1000
"""How many pages of the words of the search are written in one transaction."""

CHECKPOINT_WAIT_MS = 2000
"""How long readers of SQLite are waited for; writers wait meanwhile."""


@dataclass(frozen=True, slots=True)
class Erased:
    """What was erased, or would be: of how many rows the content is gone. Attachments are gone as rows.

    busy              chats with a running turn, by id: they are as they were, and may be erased once it has ended
    is_still_in_log   whether SQLite's log may still have the content, for somebody was reading, or a transaction of
                      yours is open; its next checkpoint overwrites it
    """

    chats: int = 0
    messages: int = 0
    tool_calls: int = 0
    requests: int = 0
    attachments: int = 0
    busy: tuple[UUID, ...] = ()
    is_still_in_log: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many rows were deleted, or would be; `is_still_in_log` as of `Erased`."""

    chats: int = 0
    messages: int = 0
    tool_calls: int = 0
    requests: int = 0
    attachments: int = 0
    is_still_in_log: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


Counts = dict[str, Any]
"""{"chats": 1, "messages": 2, …}"""


def erase(
    store: Store | pw.Database | str | None, where: Where, *, columns: Iterable[str] = (), dry_run: bool = False
) -> Erased:
    """Do away with what was said in chats; what it cost stays.

    where      which chats: {"user_id": "u_1"}. Columns of the application, "id", "model", "provider", "metadata.key";
               all of them hold; of several values in a list, one does
    columns    columns of the application to erase, too: they become NULL; others stay as they are
    dry_run    count only

    As `Chat.erase`, chat by chat. Those with a running turn are left alone, and named in the result. An interrupted run
    leaves each chat whole or erased. Raises `InvalidValue` and `UnknownKeyword` before anything is written.
    """
    store = as_store(store)
    conditions = chat_conditions(store, "erase()", where, may_be_unset=False)
    emptied = _own_columns(store, "erase()", columns)
    if dry_run:
        at_work = _has_turn(store, alive=True)
        busy = [key for ids in _batches(store, [*conditions, at_work]) for key in ids]
        return Erased(**_counted(store, [*conditions, ~at_work]), busy=tuple(busy))
    counts: Counts = {}
    busy = []
    with _overwriting(store) as log:
        for ids in _batches(store, conditions):
            erased, left = store.patiently(lambda ids=ids: _erase(store, ids, conditions, emptied, STALE_AFTER_S))
            _add(counts, erased)
            busy += left
    return Erased(**counts, busy=tuple(busy), is_still_in_log=log.is_kept)


async def aerase(
    store: Store | pw.Database | str | None, where: Where, *, columns: Iterable[str] = (), dry_run: bool = False
) -> Erased:
    """`erase`, from asyncio."""
    store = as_store(store)
    return await store.off_the_loop(lambda: erase(store, where, columns=columns, dry_run=dry_run))


def erase_chat(store: Store, chat_id: UUID, columns: Iterable[str], stale_after: float) -> Erased:
    """Erase one chat; raises `ChatBusy` and `ChatGone`."""
    emptied = _own_columns(store, "erase()", columns)
    with _overwriting(store) as log:
        stale_after = max(stale_after, 2 * BEAT_EVERY_S)
        counts, busy = store.patiently(lambda: _erase(store, [chat_id], [], emptied, stale_after))
    if busy:
        raise ChatBusy(f"chat {chat_id} is busy with a turn: erase it when that has ended, or cancel() it first")
    if not counts["chats"]:
        raise ChatGone(f"there is no chat {chat_id}: it was deleted")
    return Erased(**counts, is_still_in_log=log.is_kept)


def prune(
    store: Store | pw.Database | str | None,
    older_than: float,
    *,
    keep_requests: bool = False,
    dry_run: bool = False,
    where: Where | None = None,
) -> Pruned:
    """Delete the chats in which nothing has happened for long, with all that belongs to them.

    older_than       seconds: 90 * 24 * 3600
    keep_requests    whether their request rows stay, without a chat and without the texts of errors: what was spent
    dry_run          count only
    where            which chats only, as in `erase`; default: all

    Chats with a turn that runs, or waits for approval, stay. Request rows of that age whose chats were deleted before
    go, too, unless they are to be kept, or `where` says which chats. Goes in short transactions; an interrupted run has
    deleted whole chats.
    """
    store = as_store(store)
    before = _moment(older_than)
    conditions = chat_conditions(store, "prune()", where, may_be_unset=False) if where is not None else []
    conditions += _unused_since(store, before)
    takes_orphans = not keep_requests and where is None
    takes_orphans = takes_orphans and store.has_table(store.records.request)
    if dry_run:
        at_rest = [~_has_turn(store, alive=True), ~_has_turn(store, parked=True)]
        counts = _counted(store, [*conditions, *at_rest])
        counts["requests"] = 0 if keep_requests else counts["requests"]
        if takes_orphans:
            with store.connection():
                counts["requests"] += _orphans(store, before).count()
        return Pruned(**counts)
    counts: Counts = {}
    with _overwriting(store) as log:
        for ids in _batches(store, conditions):
            _add(counts, store.patiently(lambda ids=ids: _prune(store, ids, conditions, keep_requests)))
        if takes_orphans:
            _add(counts, {"requests": _delete_orphans(store, before)})
    return Pruned(**counts, is_still_in_log=log.is_kept)


async def aprune(
    store: Store | pw.Database | str | None,
    older_than: float,
    *,
    keep_requests: bool = False,
    dry_run: bool = False,
    where: Where | None = None,
) -> Pruned:
    """`prune`, from asyncio."""
    store = as_store(store)
    return await store.off_the_loop(
        lambda: prune(store, older_than, keep_requests=keep_requests, dry_run=dry_run, where=where)
    )


# Which chats


def _own_columns(store: Store, call: str, columns: Iterable[str]) -> list[str]:
    own = store.chat_columns
    names = [columns] if isinstance(columns, str) else list(columns)
    for name in names:
        if name not in own:
            raise UnknownKeyword(
                f"{call} erases columns of the application, not {name!r}; it has {', '.join(own) or 'none'}"
            )
        if not getattr(store.records.chat, name).null:
            raise InvalidValue(f"{call}: the column {name!r} cannot be NULL, so it cannot be erased")
    return names


def _has_turn(store: Store, *, alive: bool = False, parked: bool = False) -> Any:
    """Whether a chat has a turn that is at work, or one that waits."""
    record, chat = store.records.message.alias("turn"), store.records.chat
    found = record.select(pw.Value(1)).where(record.chat == chat.id, record.status == "pending")
    if alive:
        since = now() - timedelta(seconds=STALE_AFTER_S)
        found = found.where(record.parked_at.is_null(), record.updated_at > since)
    if parked:
        found = found.where(record.parked_at.is_null(False))
    return pw.fn.EXISTS(found)


def _unused_since(store: Store, moment: datetime) -> list[Any]:
    # A turn that failed leaves the chat's own row as it was.
    chat, records = store.records.chat, store.records
    conditions: list[Any] = [chat.updated_at < moment]
    for record in (records.message, records.agent_session):
        if store.has_table(record):
            other = record.alias("used")
            used = other.select(pw.Value(1)).where(other.chat == chat.id, other.updated_at >= moment)
            conditions.append(~pw.fn.EXISTS(used))
    return conditions


def _moment(older_than: Any) -> datetime:
    try:
        if isinstance(older_than, bool) or not older_than > 0:
            raise ValueError
        return now() - timedelta(seconds=older_than)
    except (TypeError, ValueError, OverflowError):
        raise InvalidValue(f"older_than={older_than!r}: it must be seconds, more than 0") from None


def _batches(store: Store, conditions: list[Any]) -> Iterator[list[UUID]]:
    """The ids of the chats, some at a time."""
    chat: Any = store.records.chat
    last: list[Any] = []
    while True:
        found = store.found(chat.select(chat.id).where(*conditions, *last).order_by(chat.id).limit(AT_ONCE).tuples())
        ids = [row[0] for row in found]
        if not ids:
            return
        yield ids
        last = [chat.id > ids[-1]]


# What is done with some of them, in one transaction


def _erase(
    store: Store, ids: list[UUID], conditions: list[Any], columns: list[str], stale_after: float
) -> tuple[Counts, list[UUID]]:
    records: Any = store.records
    message, tool_call, request, attachment = records.message, records.tool_call, records.request, records.attachment
    with store.transaction():
        chosen, busy = _at_rest(store, ids, conditions, stale_after)
        counts: Counts = {"chats": 0}
        if not chosen:
            return counts, busy
        files = message.select(message.id).where(message.chat.in_(chosen))
        if store.has_table(attachment):
            counts["attachments"] = attachment.delete().where(attachment.message.in_(files)).execute()
        if store.has_table(tool_call):
            blank = {"arguments": "", **dict.fromkeys(("thought", "thought_signature", "result", "error", "metadata"))}
            counts["tool_calls"] = tool_call.update(blank).where(tool_call.chat.in_(chosen)).execute()
        if store.has_table(request):
            blank = {"error_message": None, "provider_request_id": None}
            counts["requests"] = request.update(blank).where(request.chat.in_(chosen)).execute()
        if store.has_table(records.agent_session):
            session = records.agent_session
            session.update(metadata=None).where(session.chat.in_(chosen)).execute()
        names = ("content", "content_raw", "thinking_text", "thinking_signature", "request_key")
        counts["messages"] = message.update(dict.fromkeys(names)).where(message.chat.in_(chosen)).execute()
        blank = dict.fromkeys(("instructions", "metadata", *columns))
        counts["chats"] = records.chat.update(blank).where(records.chat.id.in_(chosen)).execute()
    return counts, busy


def _prune(store: Store, ids: list[UUID], conditions: list[Any], keep_requests: bool) -> Counts:
    records: Any = store.records
    message, tool_call, request, attachment = records.message, records.tool_call, records.request, records.attachment
    counts: Counts = {}
    with store.transaction():
        chosen, _ = _at_rest(store, ids, conditions, STALE_AFTER_S, spares_parked=True)
        if not chosen:
            return counts
        files = message.select(message.id).where(message.chat.in_(chosen))
        if store.has_table(request):
            if keep_requests:
                blank = {"error_message": None, "provider_request_id": None}
                request.update(blank).where(request.chat.in_(chosen)).execute()
            else:
                counts["requests"] = request.delete().where(request.chat.in_(chosen)).execute()
        if store.has_table(attachment):
            counts["attachments"] = attachment.delete().where(attachment.message.in_(files)).execute()
        if store.has_table(tool_call):
            counts["tool_calls"] = tool_call.delete().where(tool_call.chat.in_(chosen)).execute()
        counts["messages"] = message.delete().where(message.chat.in_(chosen)).execute()
        counts["chats"] = records.chat.delete().where(records.chat.id.in_(chosen)).execute()
    return counts


def _at_rest(
    store: Store, ids: list[UUID], conditions: list[Any], stale_after: float, *, spares_parked: bool = False
) -> tuple[list[UUID], list[UUID]]:
    """Those of the chats that no turn works on, and until the transaction ends none can; and those that one does.

    A turn that was parked, or whose process died, is ended.
    """
    chat: Any = store.records.chat
    message: Any = store.records.message
    locked = chat.select(chat.id).where(chat.id.in_(ids)).order_by(chat.id)
    pending = message.select().where(message.chat.in_(ids), message.status == "pending").order_by(message.id)
    if not store.is_sqlite:  # there a transaction has the lock from its beginning
        locked, pending = locked.for_update(), pending.for_update()
    list(locked.tuples())
    turns: list[LlmMessage] = list(pending)
    # What they were chosen by may have changed before they were locked.
    meant = [row[0] for row in chat.select(chat.id).where(chat.id.in_(ids), *conditions).order_by(chat.id).tuples()]
    working = {turn.chat_id for turn in turns if turn.parked_at is None and age_of(turn.updated_at) < stale_after}
    waiting = {turn.chat_id for turn in turns if turn.parked_at is not None and spares_parked}
    chosen = [key for key in meant if key not in working | waiting]
    for turn in turns:
        if turn.chat_id in chosen:
            calls, requests = store.has_table(store.records.tool_call), store.has_table(store.records.request)
            end(store, turn, keep=False, stores_tool_calls=calls, stores_requests=requests)
    return chosen, [key for key in meant if key in working]


def _delete_orphans(store: Store, before: datetime) -> int:
    """Delete the request rows whose chats were deleted, some at a time."""
    request: Any = store.records.request
    deleted = 0
    while True:
        with store.transaction():
            some = [row[0] for row in _orphans(store, before).limit(20 * AT_ONCE).tuples()]
            deleted += request.delete().where(request.id.in_(some)).execute() if some else 0
        if not some:
            return deleted


def _orphans(store: Store, before: datetime) -> Any:
    request: Any = store.records.request
    return request.select(request.id).where(request.chat.is_null(), request.created_at < before)


# Counting


def _counted(store: Store, conditions: list[Any]) -> Counts:
    records: Any = store.records
    chosen = records.chat.select(records.chat.id).where(*conditions)
    messages = records.message.select(records.message.id).where(records.message.chat.in_(chosen))
    with store.connection():
        counts: Counts = {"chats": chosen.count(), "messages": messages.count()}
        for name, record in (("tool_calls", records.tool_call), ("requests", records.request)):
            there = store.has_table(record)
            counts[name] = record.select().where(record.chat.in_(chosen)).count() if there else 0
        files = records.attachment
        there = store.has_table(files)
        counts["attachments"] = files.select(files.id).where(files.message.in_(messages)).count() if there else 0
    return counts


def _add(counts: Counts, more: Counts) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


# On the disk


class _Log:
    is_kept = False


@contextmanager
def _overwriting(store: Store) -> Iterator[_Log]:
    """On SQLite, what is deleted in the block is overwritten in its files, and in its log when the block has ended."""
    log = _Log()
    if not store.is_sqlite:
        yield log
        return
    with store.connection():
        before = _pragma(store, "secure_delete")
        _pragma(store, "secure_delete = 1")
        try:
            yield log
            _forget_words(store)
        finally:
            _pragma(store, f"secure_delete = {before}")
        log.is_kept = not _checkpoint(store)


def _forget_words(store: Store) -> None:
    """Write the words that search knows anew, without those of what was deleted: until then they are only marked."""
    table = search_table(stem_of(store.records.table_names))
    database = store.database
    if not database.execute_sql("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
        return
    pages, merge = -WORDS_AT_ONCE, f'INSERT INTO "{table}" ("{table}", rank) VALUES (\'merge\', ?)'
    while True:
        before = database.connection().total_changes
        database.execute_sql(merge, (pages,))
        if database.connection().total_changes - before < 2:
            return
        pages = WORDS_AT_ONCE


def _checkpoint(store: Store) -> bool:
    """Write SQLite's log into the file, and empty it; whether nobody was in the way."""
    if store.database.in_transaction():
        return False
    wait = _pragma(store, "busy_timeout")
    _pragma(store, f"busy_timeout = {min(wait, CHECKPOINT_WAIT_MS)}")
    try:
        return not _pragma(store, "wal_checkpoint(TRUNCATE)")
    finally:
        _pragma(store, f"busy_timeout = {wait}")


def _pragma(store: Store, text: str) -> Any:
    row = store.database.execute_sql(f"PRAGMA {text}").fetchone()
    return row[0] if row else None

"""What goes wrong at a point of a turn that lives on: the database, the provider, the tools, a signal, the caller."""

import asyncio
import os
import signal
import socket
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peewee as pw
import psycopg2
from playhouse.pool import MaxConnectionsExceeded

from llm_orm import LlmOrmError, Reply, Store, ToolError
from llm_orm import store as store_module
from llm_orm.testing import ProviderError

from . import continuations
from .invariants import Rows, Story, violations
from .points import Point, Points
from .scenarios import ANSWER, Cast

SQL = ("before",)
PROVIDER = ("asked", "part")
EVERYWHERE = ("connect", "before", "after", "out", "in", "chunk", *PROVIDER, "answered", "tool", "hook")


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    strikes    the kinds of points that it can go wrong at
    act        makes it go wrong
    passes     whether the turn must succeed all the same
    """

    name: str
    act: Callable[..., Any]
    strikes: tuple[str, ...] = SQL
    databases: tuple[str, ...] = ("sqlite", "postgresql")
    passes: bool = False
    lasts: bool = False
    """Whether it goes wrong from there on, until the turn has ended."""
    is_async: bool | None = None
    """Whether it can only go wrong in asyncio."""


class Broken(RuntimeError):
    """What a tool or a hook of a test raises."""


# The database


def lost_before(point: Point, *, cursor: Any, **about: Any) -> None:
    _hang_up(cursor)  # the driver finds out when it sends the statement


def lost_after(point: Point, *, cursor: Any, sql: str, params: Any, **about: Any) -> Any:
    """The server has done it, and nobody gets to know."""
    cursor.execute(sql, params)
    _hang_up(cursor)
    cursor.execute("SELECT 1")


def _hang_up(cursor: Any) -> None:
    with socket.socket(fileno=os.dup(cursor.connection.fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)


def refused(code: str, text: str, after: bool = False) -> Callable[..., Any]:
    """PostgreSQL itself raises it, before the statement does anything or once it has done all of it."""
    raises = f"DO $$ BEGIN RAISE EXCEPTION '{text}' USING ERRCODE = '{code}'; END $$"

    def act(point: Point, *, cursor: Any, sql: str, params: Any, **about: Any) -> Any:
        cursor.execute(f"{sql};\n{raises}" if after else raises, params)

    return act


def sqlite_says(text: str, rolls_back: bool = False) -> Callable[..., Any]:
    def act(point: Point, *, cursor: Any, **about: Any) -> Any:
        if rolls_back:
            cursor.connection.rollback()  # as SQLite does by itself after some errors
        raise sqlite3.OperationalError(text)

    return act


def gone(point: Point, *, cursor: Any = None, **about: Any) -> Any:
    """It is not there from now on, neither for statements nor for connections."""
    if isinstance(cursor, sqlite3.Cursor):
        raise sqlite3.OperationalError("disk I/O error")
    if cursor is not None:
        return lost_before(point, cursor=cursor)
    raise pw.OperationalError(psycopg2.OperationalError("connection refused"), "connection refused")


def exhausted(point: Point, **about: Any) -> Any:
    raise MaxConnectionsExceeded("Max connections exceeded, timed out attempting to connect.")


# Everybody else


def interrupted(point: Point, **about: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.raise_signal(signal.SIGINT)
    else:
        os.kill(os.getpid(), signal.SIGINT)


def cancelled(point: Point, *, points: Points, **about: Any) -> None:
    loop = points.task.get_loop()
    loop.call_soon_threadsafe(points.task.cancel)


def dropped(point: Point, **about: Any) -> str:
    return "drop"


def raising(make: Callable[[], BaseException]) -> Callable[..., Any]:
    def act(point: Point, *, points: Points, **about: Any) -> None:
        points.raised = make()
        raise points.raised

    return act


ALL = [
    Fault("connection lost before", lost_before, databases=("postgresql",)),
    Fault("connection lost after", lost_after, databases=("postgresql",)),
    Fault("serialization failure", refused("40001", "could not serialize"), databases=("postgresql",), passes=True),
    Fault("late serialization failure", refused("40001", "late", after=True), databases=("postgresql",), passes=True),
    Fault("deadlock", refused("40P01", "deadlock detected"), databases=("postgresql",), passes=True),
    Fault("statement timeout", refused("57014", "canceling statement"), databases=("postgresql",)),
    Fault("disk full on PostgreSQL", refused("53100", "could not extend file"), databases=("postgresql",)),
    Fault("read-only transaction", refused("25006", "cannot execute"), databases=("postgresql",)),
    Fault("disk full", sqlite_says("database or disk is full", rolls_back=True), databases=("sqlite",)),
    Fault("read-only file", sqlite_says("attempt to write a readonly database"), databases=("sqlite",)),
    Fault("database is locked", sqlite_says("database is locked"), databases=("sqlite",)),
    Fault("database gone", gone, ("before", "connect"), lasts=True),
    Fault("pool exhausted", exhausted, ("connect",)),
    Fault("Ctrl-C", interrupted, EVERYWHERE),
    Fault("task cancelled", cancelled, EVERYWHERE, is_async=True),
    Fault("stream dropped", dropped, ("chunk",)),
    Fault("tool raises", raising(Broken), ("tool",)),
    Fault("tool ends the turn", raising(lambda: ToolError("stop", fatal=True)), ("tool",)),
    Fault("hook raises", raising(Broken), ("hook",)),
    Fault("provider fails", raising(lambda: ProviderError(503)), PROVIDER),
    Fault("provider refuses", raising(lambda: ProviderError(400)), PROVIDER),
    Fault("provider hangs up", raising(lambda: ProviderError(None)), PROVIDER),
]
BY_NAME = {fault.name: fault for fault in ALL}


def suffer(store: Store, job: dict[str, Any], run: Callable[[Points], Any], cast: Callable[[], Cast]) -> dict[str, Any]:
    """Run a turn with something going wrong at a point, and go on once it is over; what is wrong."""
    store_module.PAUSES_S = tuple(0.0 for _ in store_module.PAUSES_S)
    fault = BY_NAME[job["fault"]]
    points = Points(job["point"]["number"], fault.act, fault.strikes, fault.lasts)
    message, error = None, None
    try:
        message = run(points)
    except BaseException as problem:
        error = problem
    points.is_on = False
    if not points.has_struck:
        return {"violations": [], "struck": False}
    actor = cast()
    rows, ledger = Rows.of(store, job["chat"]), actor.ledger.read()
    told = list(_told(error))
    known: dict[str, Any] = {
        "scenario": actor.scenario,
        "before": rows,
        "ledger_before": ledger,
        "deaths": int(any(message["parked_at"] is None for message in rows.pending)),
        "losses": 0,
        "handed_over": [_plain(each.reply) for each in told if getattr(each, "reply", None) is not None],
        "unwritten": sum("request row" in note for each in told for note in getattr(each, "__notes__", [])),
    }
    at_rest = Story(rows=rows, ledger=ledger, findings=continuations.findings_of(store, job["chat"]), **known)
    found = [{**each, "when": "at rest"} for each in violations(at_rest)]
    then = [*_of_the_caller(fault, points, error, message), *_of_the_end(rows, error)]
    found += [{"promise": promise, "detail": detail, "when": "then"} for promise, detail in then]
    found += continuations.gone_on(store, actor, job, **known)
    if found:
        found = [{**each, "detail": f"{each['detail']} [the caller got {error!r}]"} for each in found]
    return {"violations": found, "struck": True}


def _plain(reply: Reply) -> dict[str, Any]:
    return {
        "input_tokens": reply.usage.input_tokens,
        "output_tokens": reply.usage.output_tokens,
        "cost": reply.cost,
        "text": reply.content,
        "tools": [call.id for call in reply.tool_calls],
    }


def _told(error: BaseException | None) -> Any:
    """The error with all that led to it."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _of_the_caller(fault: Fault, points: Points, error: BaseException | None, message: Any) -> Any:
    if error is None:
        if fault.name == "stream dropped" or (message is not None and message.status == "pending"):
            return
        if message is None or (message.status, message.content) != ("completed", ANSWER):
            yield "a turn that succeeds gives its answer", repr(message and (message.status, message.content))
        return
    if fault.passes and points.in_turn:
        yield "what passes is waited for", "the turn failed"
    signals = (KeyboardInterrupt, asyncio.CancelledError)
    is_ours = isinstance(error, LlmOrmError) or error is points.raised
    if not is_ours and not (isinstance(error, signals) and fault.act in (interrupted, cancelled)):
        yield "the caller gets an error of ours, or what was raised", type(error).__name__
    if fault.act in (interrupted, cancelled, dropped):
        return
    told = list(_told(error))
    if points.raised is not None and points.raised not in told:
        yield "the original error is not hidden", repr(told)
    drivers = (pw.PeeweeException, psycopg2.Error, sqlite3.Error, MaxConnectionsExceeded)
    if points.raised is None and not any(isinstance(each, drivers) for each in told):
        yield "the original error is not hidden", repr(told)


def _of_the_end(rows: Rows, error: BaseException | None) -> Any:
    """A turn that failed is over, unless the database was not there to say so, which the error notes."""
    notes = [note for each in _told(error) for note in getattr(each, "__notes__", [])]
    at_work = [message for message in rows.pending if message["parked_at"] is None]
    if at_work and not any("could not be cleared" in note or "could not be put back" in note for note in notes):
        yield (
            "a turn that failed is over",
            f"{len(at_work)} messages are pending, and the error does not say so: {notes}",
        )

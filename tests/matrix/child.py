"""A clean process that has everything imported, and forks for each thing to be done: to begin one anew takes a second.

It reads jobs from its standard input, a line of JSON each, and answers each with a line.
"""

import gc
import json
import logging
import os
import signal
import sys
import traceback
from typing import Any

from llm_orm import Store, connect, soundness

from . import continuations, faults, scenarios
from .ledger import Ledger
from .points import Point, Points

LONGEST_S = 30


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Make a chat, with what leads to the turn."""
    with _store(job) as store:
        cast = _cast(job, Points())
        chat = cast.make(store)
        cast.scenario.prepare(chat)
        return {"key": str(chat.id), "chat": chat.chat_id.hex}


def create_tables(job: dict[str, Any]) -> dict[str, Any]:
    with _store(job) as store:
        store.create_tables()
    return {}


def count(job: dict[str, Any]) -> dict[str, Any]:
    """The points of the turn, none of which does it any harm."""
    points = Points()
    with _store(job) as store:
        run(job, store, points)
    return {"points": [point.as_dict() for point in points.met]}


def kill(job: dict[str, Any]) -> dict[str, Any]:
    """Run the turn, and die at a point."""

    def die(point: Point, **about: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    points = Points(job["point"]["number"], die)
    with _store(job) as store:
        run(job, store, points)
    return {"met": len(points.met)}  # it was done before it came so far


def run(job: dict[str, Any], store: Store, points: Points) -> Any:
    cast = _cast(job, points)
    chat = cast.load(store, job["key"])
    points.watch(store)
    points.is_on = True
    try:
        return cast.scenario.act(chat, points)
    finally:
        points.is_on = False


def survive(job: dict[str, Any]) -> dict[str, Any]:
    """Go on with what a process left that was killed, and say what is wrong with it."""
    with _store(job) as store:
        return {"violations": continuations.survive(store, _cast(job, Points()), job)}


def check(job: dict[str, Any]) -> dict[str, Any]:
    """What `llm-orm check` says of the whole database."""
    with _store(job) as store:
        return {"findings": [each.detail for each in soundness.check(store, stale_after=0)]}


def fault(job: dict[str, Any]) -> dict[str, Any]:
    """Run the turn with something going wrong at a point, go on, and say what is wrong."""
    with _store(job) as store:
        return faults.suffer(store, job, lambda points: run(job, store, points), lambda: _cast(job, Points()))


_stores: dict[str, Store] = {}


def _store(job: dict[str, Any]) -> Store:
    """A store that has opened nothing, and whose records were made before the process forked."""
    store = _stores[_kind(job["url"])]
    if store.is_sqlite:
        store.database.database = job["url"].removeprefix("sqlite:///")
    return store


def _kind(url: str) -> str:
    return "sqlite:///nowhere.db" if url.startswith("sqlite") else url


def _cast(job: dict[str, Any], points: Points) -> scenarios.Cast:
    return scenarios.Cast(scenarios.BY_NAME[job["scenario"]], Ledger(job["ledger"]), points)


JOBS = {job.__name__: job for job in (prepare, create_tables, count, kill, survive, fault, check)}


def main() -> None:
    logging.disable()
    gc.collect()
    gc.disable()  # no child lives long enough
    for line in sys.stdin:
        print(json.dumps(_in_a_fork(json.loads(line))), flush=True)


def _in_a_fork(job: dict[str, Any]) -> dict[str, Any]:
    kind = _kind(job["url"])
    if kind not in _stores:
        _stores[kind] = connect(kind, pool_size=4, pool_timeout=2)
        gc.freeze()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        signal.alarm(LONGEST_S)
        try:
            answer = JOBS[job["do"]](job)
        except BaseException:
            answer = {"failed": traceback.format_exc()}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    return json.loads(text)


if __name__ == "__main__":
    main()

"""The points of a turn: before and after each SQL statement, each yield, each chunk, each thing that others do for it.

They are numbered in the order in which they are met. `Points` counts them, and lets something happen at one of them.
"""

import math
import re
import threading
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from typing import Any

from llm_orm import Store
from llm_orm.turn import Turn


@dataclass(frozen=True)
class Point:
    number: int
    kind: str
    """before, after (SQL); connect; out, in (a yield); chunk; asked, part, answered (the provider); tool; hook"""
    label: str
    """The first words of the statement, the class of what is yielded, …"""

    def __str__(self) -> str:
        return f"{self.number} {self.kind} {self.label}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Points:
    """Counts the points of this process, and calls `act(point, …)` at number `target`.

    kinds    of points that it can be called at: where another is met first, for threads take turns as they like, it is
             called at the next one of these
    lasts    whether it is called at each of them from there on
    """

    def __init__(
        self,
        target: float = math.inf,
        act: Callable[..., Any] = lambda point, **about: None,
        kinds: tuple[str, ...] = (),
        lasts: bool = False,
    ):
        self.met: list[Point] = []
        self.target, self.act, self.kinds, self.lasts = target, act, kinds, lasts
        self.is_on = False
        self.has_struck = False
        self.in_turn = False
        """Whether the turn has begun."""
        self.raised: BaseException | None = None
        """What a fault raised."""
        self.task: Any = None
        """The turn's, in asyncio."""
        self._lock = threading.RLock()

    def meet(self, kind: str, label: str, **about: Any) -> Any:
        """Be at the next point; what `act` returns, where it is the point's turn."""
        if not self.is_on or threading.current_thread().name == "llm_orm heart":
            return None
        with self._lock:
            point = Point(len(self.met), kind, label)
            self.met.append(point)
            is_fit = point.number >= self.target and (not self.kinds or kind in self.kinds)
            if not is_fit or (self.has_struck and not self.lasts):
                return None
            self.has_struck = True
        return self.act(point, points=self, **about)

    def watch(self, store: Store) -> None:
        """Meet a point before and after each statement of the store's, and at each yield of a turn."""
        database: Any = store.database
        cursor, connect, run, meet = database.cursor, database.connect, Turn.run, self.meet

        def watched_cursor(*arguments: Any, **keywords: Any) -> Any:
            return _Cursor(cursor(*arguments, **keywords), meet)

        def watched_connect(*arguments: Any, **keywords: Any) -> Any:
            meet("connect", "", database=database)
            return connect(*arguments, **keywords)

        def watched_run(turn: Turn) -> Generator[Any, Any, Any]:
            flow, self.in_turn = run(turn), True
            value, error = None, None
            try:
                while True:
                    try:
                        effect = flow.send(value) if error is None else flow.throw(error)
                    except StopIteration as stop:
                        return stop.value
                    name = type(effect).__name__
                    meet("out", name)
                    value, error = None, None
                    try:
                        value = yield effect
                    except BaseException as problem:
                        error = problem
                    try:
                        meet("in", name)
                    except BaseException as problem:  # as a signal that comes when the turn goes on
                        value, error = None, problem
            finally:
                flow.close()

        database.cursor, database.connect, Turn.run = watched_cursor, watched_connect, watched_run


class _Cursor:
    """A driver's cursor that meets a point before and after what it executes."""

    def __init__(self, cursor: Any, meet: Callable[..., Any]):
        self._cursor = cursor
        self._meet = meet

    def execute(self, sql: str, params: Any = ()) -> Any:
        label = first_words(sql)
        self._meet("before", label, cursor=self._cursor, sql=sql, params=params)
        self._cursor.execute(sql, params)
        self._meet("after", label)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)

    def __iter__(self) -> Any:
        return iter(self._cursor)


def first_words(sql: str) -> str:
    """What a transaction does, in short: "INSERT message, INSERT message, SELECT message"."""
    words = []
    for statement in sql.split(";\n"):
        verb = statement.split(None, 1)[0].upper()
        table = re.search(r'"?\bllm_(\w+)"?', statement)
        words.append(f"{verb} {table[1]}" if table else " ".join(statement.split()[:2]))
    return ", ".join(words)

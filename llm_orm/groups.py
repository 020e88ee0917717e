"""The query behind usage(): requests and tool calls in groups, and the sums of each; one query on either database."""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

import peewee as pw

from .checks import clear_about
from .dimensions import NAMED, Dimension, conditions, dimension, joins, own_columns
from .errors import InvalidValue
from .filters import Where, check_where, stored_time, within
from .periods import Period
from .statements import Sql
from .store import Store
from .sums import dollars, summed

PERCENTILES = (50, 95)

OF_TOOLS = ("duration_ms", "duration_avg_ms", "duration_p50_ms", "duration_p95_ms", "duration_max_ms")
"""Measures that tool calls have, too."""

_SUMS: Mapping[str, tuple[str | None, str | None]] = {
    "size": ("COUNT(*)", "COUNT(*)"),
    "failed_requests": ("SUM(CASE WHEN r.error IS NOT NULL THEN 1 ELSE 0 END)", None),
    "retried_requests": ("SUM(CASE WHEN r.attempt > 1 THEN 1 ELSE 0 END)", None),
    "input_tokens": ("SUM(r.input_tokens)", None),
    "output_tokens": ("SUM(r.output_tokens)", None),
    "cached_tokens": ("SUM(r.cached_tokens)", None),
    "cache_write_tokens": ("SUM(r.cache_write_tokens)", None),
    "thinking_tokens": ("SUM(r.thinking_tokens)", None),
    "cost": ("r.cost", None),
    "unpriced_requests": ("SUM(CASE WHEN r.cost IS NULL THEN 1 ELSE 0 END)", None),
    "duration_ms": ("SUM(r.duration_ms)", "SUM(t.duration_ms)"),
    "duration_max_ms": ("MAX(r.duration_ms)", "MAX(t.duration_ms)"),
    "duration_ranks": ("r.duration_ms", "t.duration_ms"),
    "first_token_ranks": ("r.first_token_ms", None),
    "timed": (None, "COUNT(t.duration_ms)"),
    "tool_failures": (None, "SUM(CASE WHEN t.status = 'failed' THEN 1 ELSE 0 END)"),
}
"""What is summed up of requests, and of tool calls: SQL, but for costs and percentiles, which each database writes in
its own way."""

_MADE_OF = {
    "requests": ("size",),
    "total_tokens": ("input_tokens", "output_tokens"),
    "duration_avg_ms": ("duration_ms", "timed"),
    "duration_p50_ms": ("duration_ranks",),
    "duration_p95_ms": ("duration_ranks",),
    "first_token_p50_ms": ("first_token_ranks",),
    "first_token_p95_ms": ("first_token_ranks",),
    "tool_calls": ("size",),
}
"""The sums that a measure is made of, where it is not one itself."""

Sums = Mapping[str, Any]
"""{"size": 3, "cost": …} of one group."""

Groups = dict[tuple, tuple[Sums, Sums]]
"""Sums of requests, and of tool calls, by (place of the period, values as the database has them)."""


class Question:
    """What is grouped, counted and left out; every name and value was looked at once it is made."""

    def __init__(self, store: Store, names: Sequence[str], where: Where | None, measures: tuple[str, ...]):
        self.store = store
        self.where = where
        self.names = names
        check_where(store, "usage()", {} if where is None else where, NAMED)
        self.counts_tools = "tool" in names or "tool" in (where or {})
        conditions(store, "usage()", where, of_tools=self.counts_tools)
        self.dimensions = self._dimensions(of_tools=self.counts_tools)
        of_tools = tuple(name for name in measures if name.startswith("tool_"))
        others = tuple(name for name in measures if name not in of_tools)
        self.of_requests = () if self.counts_tools else others
        self.of_tools = of_tools + tuple(name for name in others if name in OF_TOOLS) if self.counts_tools else of_tools

    def _dimensions(self, *, of_tools: bool) -> list[Dimension]:
        return [dimension(self.store, name, of_tools=of_tools) for name in self.names]

    def first(self) -> datetime | None:
        """When the first of all that is counted was."""
        records: list[Any] = [] if self.counts_tools else [self.store.records.request]
        records += [self.store.records.tool_call] if self._looks_at_tools else []  # with or without a request's row
        firsts = [self.store.found(each.select(pw.fn.MIN(each.created_at)).tuples())[0][0] for each in records]
        return min((first for first in firsts if first is not None), default=None)

    @property
    def _looks_at_tools(self) -> bool:
        return bool(self.of_tools) and (self.counts_tools or self.store.has_table(self.store.records.tool_call))

    def groups(self, first: datetime | None, end: datetime | None, periods: Sequence[Period] = ()) -> Groups:
        parts = []
        if not self.counts_tools:
            parts.append(self._select(first, end, by_period=bool(periods), of_tools=False))
        if self._looks_at_tools:
            parts.append(self._select(first, end, by_period=bool(periods), of_tools=True))
        text = _listed(self.store, periods) + " UNION ALL ".join(part.text for part in parts)
        keys = len(self.names) + bool(periods)
        found: Groups = {}
        with clear_about("usage()", own_columns(self.store, self.where)):
            rows = _read(self.store, Sql(text, tuple(value for part in parts for value in part.params)))
        for of_tools, *values in rows:
            sums = dict(zip(_SUMS, values[keys:], strict=True))
            key = tuple(values[:keys])
            try:
                requests, tools = found.get(key, ({}, {}))
            except TypeError:  # a column of JSON or an array, of PostgreSQL
                raise InvalidValue(f"by={self.names!r}: {key!r} cannot be a group; metadata.key can") from None
            found[key] = (requests, sums) if of_tools else (sums, tools)
        return found

    def _select(self, first: datetime | None, end: datetime | None, *, by_period: bool, of_tools: bool) -> Sql:
        """(whether of tools, period, dimensions, sums)"""
        at = "t.created_at" if of_tools else "r.created_at"
        dimensions = self._dimensions(of_tools=of_tools)
        wheres, needs = conditions(self.store, "usage()", self.where, of_tools=of_tools)
        needs |= {alias for each in dimensions for alias in each.needs}
        groups = [each.sql for each in dimensions]
        sources = joins(self.store, needs, of_tools=of_tools)
        if by_period:
            # SQLite goes through a CROSS JOIN from left to right, and finds the rows of each period by the index.
            groups, sources = [Sql("p.place"), *groups], f"llm_orm_period p CROSS JOIN {sources}"
            wheres = [Sql(f"{at} >= p.start AND {at} < p.stop"), *wheres]
        else:
            wheres += within(self.store, at, first, end)
        columns = [*(group.text for group in groups), *self._sums(of_tools=of_tools)]
        text = f"SELECT {int(of_tools)}, {', '.join(columns)} FROM {sources}"
        if wheres:
            text += f" WHERE {' AND '.join(each.text for each in wheres)}"
        if groups:
            text += f" GROUP BY {', '.join(str(place) for place in range(2, 2 + len(groups)))}"
        return Sql(text, tuple(value for each in (*groups, *wheres) for value in each.params))

    def _sums(self, *, of_tools: bool) -> Iterator[str]:
        measures = self.of_tools if of_tools else self.of_requests
        wanted = {"size"}.union(*(_MADE_OF.get(name, (name,)) for name in measures))
        for name, texts in _SUMS.items():
            text = texts[of_tools]
            if text is None or name not in wanted:
                yield "NULL"
            elif name == "cost":
                yield summed(self.store, text)
            else:
                yield _ranks(self.store, text) if name.endswith("_ranks") else text

    def values(self, raw: Sequence[Any]) -> dict[str, Any]:
        """What a group is called, by dimension."""
        return {
            each.name: None if value is None else each.read(value)
            for each, value in zip(self.dimensions, raw, strict=True)
        }

    def measured(self, sums: tuple[Sums, Sums]) -> dict[str, Any]:
        requests, tools = sums
        counted = {name: _measure(self.store, name, requests) for name in self.of_requests}
        return counted | {name: _measure(self.store, name, tools) for name in self.of_tools}


def _measure(store: Store, name: str, sums: Sums) -> Any:
    if name == "cost":
        return dollars(store, sums.get("cost"))
    if name.endswith(("_p50_ms", "_p95_ms")):
        kind, _, percent = name.removesuffix("_ms").rpartition("_p")
        ranks = sums.get(f"{kind}_ranks")
        ranks = json.loads(ranks) if isinstance(ranks, str) else ranks
        return ranks[PERCENTILES.index(int(percent))] if ranks else None
    if name == "duration_avg_ms":
        count = sums.get("timed") or sums.get("size")
        return round(int(sums["duration_ms"]) / count, 1) if count and sums["duration_ms"] is not None else None
    if name == "duration_max_ms":
        return sums.get(name)
    return sum(int(sums.get(part) or 0) for part in _MADE_OF.get(name, (name,)))


def _listed(store: Store, periods: Sequence[Period]) -> str:
    # As literals: SQLite takes so many parameters and no more.
    if not periods:
        return ""
    as_time = "" if store.is_sqlite else "::timestamptz"
    values = ", ".join(
        f"({place}, '{stored_time(start)}'{as_time}, '{stored_time(stop)}'{as_time})"
        for place, (_, start, stop) in enumerate(periods)
    )
    return f"WITH llm_orm_period (place, start, stop) AS (VALUES {values}) "


def _ranks(store: Store, column: str) -> str:
    if store.is_sqlite:
        return f"{PERCENTILES_OF}({column})"
    shares = ", ".join(str(percent / 100) for percent in PERCENTILES)
    return f"percentile_disc(ARRAY[{shares}]) WITHIN GROUP (ORDER BY {column})"


PERCENTILES_OF = "llm_orm_percentiles"


class _Percentiles:
    """What SQLite lacks: an aggregate of the percentiles, as JSON."""

    def __init__(self) -> None:
        self.values: list[int] = []

    def step(self, value: int | None) -> None:
        if value is not None:
            self.values.append(value)

    def finalize(self) -> str | None:
        count = len(self.values)
        if not count:
            return None
        self.values.sort()
        return json.dumps([self.values[(count * percent + 99) // 100 - 1] for percent in PERCENTILES])


def _read(store: Store, query: Sql) -> list[tuple]:
    def read() -> list[tuple]:
        with store.connection():
            if store.is_sqlite:
                connection: Any = store.database.connection()
                # It is there already where somebody still reads rows of this connection: then SQLite refuses.
                with suppress(sqlite3.OperationalError):
                    connection.create_aggregate(PERCENTILES_OF, 1, _Percentiles)
            return store.read(query)

    return store.patiently(read)

"""usage(): what requests took and cost, by time, model, user or anything else that is known of them; summed in SQL."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, tzinfo
from decimal import Decimal
from typing import Any

import peewee as pw

from .checks import clear_about
from .dimensions import NAMED, Dimension, check_names, conditions, dimension, joins
from .errors import InvalidValue
from .filters import Moment, Where, check_where, span
from .periods import TIMES, Period, periods_of, zone
from .records import now
from .statements import Sql
from .store import Store, as_store
from .sums import dollars, summed

PERCENTILES = (50, 95)


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What the requests of one group took and cost: `row.cost`, `row.model`, `row["metadata.plan"]`.

    by      the group: {"day": date(2026, 11, 1), "model": "gpt-4o"}. An hour is the aware time of its beginning; a day,
            week or month is the date of its first day; a chat is a UUID; what is not known is None

    Measures that were not asked for are None, and so are those of requests where tool calls are counted.
    """

    by: Mapping[str, Any]
    requests: Any = None
    failed_requests: Any = None
    retried_requests: Any = None
    """Requests that were a second try, or a further one."""
    input_tokens: Any = None
    """With those that were read from the provider's cache, or written to it."""
    output_tokens: Any = None
    """With those that were thought."""
    total_tokens: Any = None
    """Both together."""
    cached_tokens: Any = None
    cache_write_tokens: Any = None
    thinking_tokens: Any = None
    cost: Any = None
    """Dollars, exact: of the requests that have a price."""
    unpriced_requests: Any = None
    """Requests whose cost is unknown."""
    duration_ms: Any = None
    """All that was spent waiting for models; where tool calls are counted, for tools. So are the next four."""
    duration_avg_ms: Any = None
    duration_p50_ms: Any = None
    """Nearest rank: so many of a hundred took this long or less."""
    duration_p95_ms: Any = None
    duration_max_ms: Any = None
    first_token_p50_ms: Any = None
    """Of the streamed requests; None where there is none."""
    first_token_p95_ms: Any = None
    tool_calls: Any = None
    tool_failures: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return {}[name] if name == "by" else self.by[name]  # a copy in the making has none yet
        except KeyError:
            raise AttributeError(f"a row of usage() by {', '.join(self.by) or 'nothing'} has no {name!r}") from None

    def __getitem__(self, name: str) -> Any:
        return self.by[name] if name in self.by else getattr(self, name)

    def as_dict(self) -> dict[str, Any]:
        """The group and its measures, by name."""
        return {**self.by, **{name: getattr(self, name) for name in MEASURES}}


MEASURES = tuple(field.name for field in fields(UsageRow))[1:]

OF_TOOLS = ("duration_ms", "duration_avg_ms", "duration_p50_ms", "duration_p95_ms", "duration_max_ms")
"""Measures that tool calls have, too."""

ADDED_UP = tuple(name for name in MEASURES if not name.startswith(("duration_", "first_")) or name == "duration_ms")


def usage(
    store: Store | pw.Database | str | None,
    by: str | Iterable[str] = ("day", "model"),
    *,
    since: Moment | None = None,
    until: Moment | None = None,
    where: Where | None = None,
    tz: str | tzinfo = "UTC",
    order: str | None = None,
    limit: int | None = None,
    measures: Iterable[str] | None = None,
) -> list[UsageRow]:
    """What was used and spent, a row for each group; one query.

    by         what to group by: "hour", "day", "week" or "month"; "provider", "model", "status" (of HTTP), "error",
               "source", "streamed", "agent_class", "chat", "tool"; a column of yours of the chat; "metadata.key".
               () is one row of totals
    since      from then on: an aware time, a date, a timedelta (so long ago), or a text such as "2026-11-01" or "7d"
    until      before then; default: now
    where      which requests only: {"user_id": "u_1", "model": ["gpt-4o", "o3"], "metadata.plan": "free"}, by the same
               names but those of time; None is what is not known
    tz         the time zone of hours, days, weeks (from Monday) and months: "Europe/Berlin"
    order      the name of a measure or of what it is grouped by, "-cost" for the largest first; default: by time, and
               then the most expensive first
    limit      so many groups at the most: the first of that order. With a time, a group has all its periods
    measures   count these only, ("requests", "cost"): percentiles and tool calls take the longest

    All periods of the span are there for each group, with zeros where nothing was. With "tool", by or in where, tool
    calls are counted, and the measures of requests are None. Requests of deleted chats count; what was said of the chat
    is None there. Both databases give the same figures. Raises `InvalidValue` and `UnknownKeyword`.
    """
    store = as_store(store)
    names = _names("by", by)
    counted = _counted(measures)
    check_names(store, "usage()", names, TIMES)
    kind = _time_of(names)
    _check_order(order, names)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InvalidValue(f"limit={limit!r}: it must be a whole number, 1 or more")
    clock = zone(tz)
    first, end = span(since, until, clock)
    besides = [name for name in _ordered_by(order, names) if name in MEASURES and name not in counted]
    query = _Query(store, [name for name in names if name != kind], where, (*counted, *besides))
    store.pay()
    periods: list[Period] = []
    if kind is not None:
        first = first or query.first()
        periods = [] if first is None else periods_of(kind, first, end or now(), clock)
        if not periods:
            return []
    rows = _rows(query.groups(first, end, periods), query, names, kind, periods)
    rows = _in_order(rows, [name for name in names if name != kind], kind, order, limit)
    return [replace(row, **dict.fromkeys(besides)) for row in rows] if besides else rows


async def ausage(
    store: Store | pw.Database | str | None, by: str | Iterable[str] = ("day", "model"), **options: Any
) -> list[UsageRow]:
    """`usage`, from asyncio; the same keywords."""
    store = as_store(store)
    return await store.off_the_loop(lambda: usage(store, by, **options))


def _names(what: str, given: Any) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    for name in names:
        if not isinstance(name, str):
            raise InvalidValue(f"{what}={given!r}: it is a name, or several of them, and {name!r} is none")
    return names


def _counted(measures: Iterable[str] | None) -> tuple[str, ...]:
    asked = MEASURES if measures is None else _names("measures", measures)
    for name in asked:
        if name not in MEASURES:
            raise InvalidValue(f"measures has {name!r}; it takes {', '.join(MEASURES)}")
    return asked


def _time_of(names: Sequence[str]) -> str | None:
    times = [name for name in names if name in TIMES]
    if len(times) > 1 or len(set(names)) < len(names):
        raise InvalidValue(f"by={names!r}: group by one of {', '.join(TIMES)}, and by each name once")
    if taken := set(names) & set(MEASURES):
        raise InvalidValue(f"by={names!r}: the column {min(taken)!r} has the name of a measure")
    return times[0] if times else None


def _ordered_by(order: str | None, names: Sequence[str]) -> tuple[str, ...]:
    if order is not None:
        return (order.removeprefix("-"),)
    return ("tool_calls",) if "tool" in names else ("cost", "requests")


def _check_order(order: Any, names: Sequence[str]) -> None:
    if order is not None and (not isinstance(order, str) or order.removeprefix("-") not in (*names, *MEASURES)):
        raise InvalidValue(f'order={order!r}: name a measure or one of {names!r}, as "cost" or "-cost"')


# The query

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


class _Query:
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
        own = {name: value for name, value in (self.where or {}).items() if name in self.store.chat_columns}
        with clear_about("usage()", own):
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
            bounds = ((first, ">="), (end, "<"))
            param = self.store.database.param
            wheres += [Sql(f"{at} {sign} {param}", (_stored(bound),)) for bound, sign in bounds if bound is not None]
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


def _stored(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(" ", "microseconds")


def _listed(store: Store, periods: Sequence[Period]) -> str:
    # As literals: SQLite takes so many parameters and no more.
    if not periods:
        return ""
    as_time = "" if store.is_sqlite else "::timestamptz"
    values = ", ".join(
        f"({place}, '{_stored(start)}'{as_time}, '{_stored(stop)}'{as_time})"
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


# The rows


def _rows(
    groups: Groups, query: _Query, names: Sequence[str], kind: str | None, periods: Sequence[Period]
) -> list[UsageRow]:
    """A row for each group; in each period, where there is time."""
    nothing: tuple[Sums, Sums] = ({}, {})
    if kind is None:
        groups = groups if query.names else {(): next(iter(groups.values()), nothing)}
        return [UsageRow(query.values(key), **query.measured(sums)) for key, sums in groups.items()]
    others = dict.fromkeys(key[1:] for key in groups) if query.names else {(): None}
    rows = []
    for other in others:
        values = query.values(other)
        for place, (name, _, _) in enumerate(periods):
            by = {each: name if each == kind else values[each] for each in names}
            rows.append(UsageRow(by, **query.measured(groups.get((place, *other), nothing))))
    return rows


def _in_order(
    rows: list[UsageRow], names: Sequence[str], kind: str | None, order: str | None, limit: int | None
) -> list[UsageRow]:
    """The rows as they are to be shown; names are what they are grouped by, but for time."""
    if kind is not None and names and limit is not None:
        rows, limit = _of_the_first(rows, names, order or "-cost", limit), None
    rows = sorted(rows, key=lambda row: [_sortable(row[name]) for name in names])
    if order is not None:
        rows.sort(key=lambda row: _sortable(row[order.removeprefix("-")]), reverse=order.startswith("-"))
        return rows[:limit]
    rows.sort(key=lambda row: [_sortable(row[name]) for name in ("cost", "requests", "tool_calls")], reverse=True)
    if kind is not None:
        rows.sort(key=lambda row: _sortable(row[kind]))
    return rows[:limit]


def _of_the_first(rows: list[UsageRow], names: Sequence[str], order: str, limit: int) -> list[UsageRow]:
    """Those of so many groups, in the order of what each comes to in all its periods."""
    measure, groups = order.removeprefix("-"), {}
    for row in rows:
        groups.setdefault(repr([row[name] for name in names]), []).append(row[measure])
    total: Any = sum if measure in ADDED_UP else max
    totals = {
        group: _sortable(total([value for value in values if value is not None] or [0]))
        for group, values in groups.items()
    }
    first = sorted(totals, key=lambda group: totals[group], reverse=order.startswith("-"))[:limit]
    return [row for row in rows if repr([row[name] for name in names]) in first]


def _sortable(value: Any) -> tuple[Any, ...]:
    """What puts values of one kind in order, and nothing before them all."""
    if value is None:
        return (0,)
    if isinstance(value, datetime):
        return 1, "", value.astimezone(UTC).isoformat()  # of one zone, they would be compared by the clock
    if isinstance(value, int | float | Decimal):
        return 1, "", value
    return 1, type(value).__name__, str(value)

"""usage(): what requests took and cost, by time, model, user or anything else that is known of them; summed in SQL."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, tzinfo
from decimal import Decimal
from typing import Any

import peewee as pw

from .dimensions import check_names
from .errors import InvalidValue
from .filters import Moment, Where, span
from .groups import Groups, Question, Sums
from .periods import TIMES, Period, periods_of, zone
from .records import now
from .store import Store, as_store


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
    query = Question(store, [name for name in names if name != kind], where, (*counted, *besides))
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


def _rows(
    groups: Groups, query: Question, names: Sequence[str], kind: str | None, periods: Sequence[Period]
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

"""Usage by something: models, users or any column, agents, tools."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import InvalidValue
from ...filters import METADATA
from ...store import Store
from ...usage import usage
from .. import shown
from ..charts import MOST_SERIES, Chart, stacked
from ..page import Page
from ..query import OWN, Query
from ..tables import Column, Table

MOST_GROUPS = 100

USAGE = (
    Column("cost", "Cost", "money", "cost"),
    Column("unpriced_requests", "Unpriced", "number", "unpriced_requests", hint="Requests whose cost is unknown"),
    Column("requests", "Requests", "number", "requests"),
    Column("failed_requests", "Failed", "number", "failed_requests"),
    Column("error_rate", "Error rate", "percent", minor=True),
    Column("input_tokens", "Input tokens", "number", "input_tokens"),
    Column("output_tokens", "Output tokens", "number", "output_tokens"),
    Column("cached_tokens", "Cached", "number", "cached_tokens", minor=True),
    Column("thinking_tokens", "Thinking", "number", "thinking_tokens", minor=True),
    Column("duration_p50_ms", "p50", "ms", "duration_p50_ms", hint="Half of the requests took this long or less"),
    Column("duration_p95_ms", "p95", "ms", "duration_p95_ms", hint="95 of a hundred requests took this long or less"),
    Column("first_token_p50_ms", "First token p50", "ms", "first_token_p50_ms", minor=True),
    Column("first_token_p95_ms", "First token p95", "ms", "first_token_p95_ms", minor=True),
)

TOOLS = (
    Column("tool_calls", "Calls", "number", "tool_calls"),
    Column("tool_failures", "Failures", "number", "tool_failures"),
    Column("failure_rate", "Failure rate", "percent", minor=True),
    Column("duration_avg_ms", "Average", "ms", "duration_avg_ms", minor=True),
    Column("duration_p50_ms", "p50", "ms", "duration_p50_ms"),
    Column("duration_p95_ms", "p95", "ms", "duration_p95_ms"),
    Column("duration_max_ms", "Longest", "ms", "duration_max_ms"),
)


def values(row: Any) -> dict[str, Any]:
    """A row of usage() as a table has it, with its rates."""
    found = row.as_dict()
    found["error_rate"] = shown.ratio(row.failed_requests, row.requests)
    found["failure_rate"] = shown.ratio(row.tool_failures, row.tool_calls)
    return found


MEASURES = tuple(column.name for column in USAGE if column.sort)

SPEND = ("cost", "requests", "unpriced_requests")
"""What it takes to say what was spent, and whether that is known."""


def usage_table(
    store: Store, query: Query, by: Sequence[str], *, name: str, title: str, total: Callable[[], Any] | None = None
) -> Table:
    """What was used by each, the most expensive first; a filter for each is behind its name.

    total    of all, where the caller has it
    """
    asked: Any = {**query.time, "where": query.where or None, "measures": MEASURES}
    rows = usage(store, by, **asked, order=query.order or "-cost", limit=MOST_GROUPS + 1)
    whole = None if query.is_export else total() if total else usage(store, (), **asked)[0]
    return Table(
        name,
        title,
        [*(named_column(each) for each in by), *USAGE],
        [values(row) for row in rows[:MOST_GROUPS]],
        links={each: lambda row, each=each: filter_link(query, each, row[each]) for each in by},
        total=values(whole) if whole else None,
        note=f"The first {MOST_GROUPS} of this order; the total is of all." if len(rows) > MOST_GROUPS else "",
    )


def named_column(name: str) -> Column:
    return Column(name, shown.title(name), "name", name, by=name)


def filter_link(query: Query, name: str, value: Any) -> str | None:
    """The Overview of what has this value."""
    return query.filtered(name, value, "/")


def top(store: Store, query: Query, by: str, measure: str = "cost", table: Table | None = None) -> list[Any]:
    """The values with the largest figures, as many as a chart has colours for; out of a table that is in that order."""
    rows: Sequence[Any] = table.rows[:MOST_SERIES] if table and query.order in (None, f"-{measure}") else ()
    asked: Any = {**query.time, "where": query.where or None, "measures": (measure,)}
    rows = rows or usage(store, (by,), **asked, order=f"-{measure}", limit=MOST_SERIES)
    return [row[by] for row in rows]


def totals_over_time(store: Store, query: Query, measures: Sequence[str]) -> Any:
    """usage() by period."""
    return usage(store, (query.period,), **query.time, where=query.where or None, measures=measures)


def parts_over_time(store: Store, query: Query, by: str, keys: list[Any], measures: Sequence[str]) -> Any:
    """usage() by period of what has one of these values."""
    if not keys:
        return []
    return usage(store, (query.period, by), **query.time, where={**query.where, by: keys}, measures=measures)


def spend_chart(store: Store, query: Query, by: str) -> Chart:
    """Dollars over time, for the most expensive and for the others together."""
    keys = top(store, query, by)
    totals = totals_over_time(store, query, SPEND)
    parts = parts_over_time(store, query, by, keys, SPEND)
    return over_time(
        query,
        "spend",
        f"Spend by {shown.title(by).lower() if by in shown.TITLES else by}",
        "money",
        by,
        keys,
        totals,
        parts,
        "cost",
    )


def over_time(
    query: Query, name: str, title: str, unit: str, by: str, keys: list[Any], totals: Any, parts: Any, *measures: str
) -> Chart:
    def value(row: Any) -> Any:
        if measures == ("cost",):
            return shown.known_cost(row.cost, row.requests, row.unpriced_requests)
        figures = [getattr(row, measure) or 0 for measure in measures]
        return figures[0] if len(figures) == 1 else figures[0] + figures[1]

    periods = [row[query.period] for row in totals]
    series = stacked(periods, parts, totals, keys, by, query.period, value)
    return Chart(name, title, "bars", unit, labels(query, periods), series, hours(query, periods))


def labels(query: Query, periods: Sequence[Any]) -> list[str]:
    return [shown.period(each, query.period, query.tz) for each in periods]


def hours(query: Query, periods: Sequence[Any]) -> list[tuple[str, str]]:
    """The day and the hour of each, where they are hours."""
    if query.period != "hour":
        return []
    return [(f"{each:%b %-d}", f"{each:%H:%M}") for each in (moment.astimezone(query.tz) for moment in periods)]


def models_page(store: Store, query: Query) -> Page:
    return _page(store, query, "Models", ("provider", "model"))


def agents_page(store: Store, query: Query) -> Page:
    return _page(store, query, "Agents", ("agent_class",))


def users_page(store: Store, query: Query) -> Page:
    """By any column of the application's, or any key of the metadata."""
    choices = [name for name in store.chat_columns if name not in OWN]
    by = query.by or (choices[0] if choices else None)
    if by is None:
        return Page("Users", "users.html", choices=choices)
    if by not in choices and not by.startswith(METADATA):
        names = ", ".join([*choices, "metadata.<key>"])
        raise InvalidValue(f"by={by!r} is no column of yours of the chat: there are {names}")
    return _page(store, query, "Users", (by,), title=f"By {by}", by=by, choices=choices)


def tools_page(store: Store, query: Query) -> Page:
    where = query.where or None

    def table() -> Table:
        measures = [column.name for column in TOOLS if column.sort]
        order = query.order or "-tool_calls"
        rows = usage(store, ("tool",), **query.time, where=where, order=order, limit=MOST_GROUPS, measures=measures)
        links: Mapping[str, Any] = {"tool": lambda row: query.filtered("tool", row["tool"])}
        return Table(
            "tools",
            "Tools",
            [named_column("tool"), *TOOLS],
            [values(row) for row in rows],
            links,
            empty="No tool was called in this span of time.",
        )

    def chart() -> Chart:
        keys = top(store, query, "tool", "tool_calls")
        parts = parts_over_time(store, query, "tool", keys, ("tool_calls",))
        totals = totals_over_time(store, query, ("tool_calls",))
        return over_time(query, "calls", "Calls by tool", "number", "tool", keys, totals, parts, "tool_calls")

    return Page("Tools", "groups.html", {"tools": table}, lambda: {"charts": [chart()]})


def _page(store: Store, query: Query, name: str, each: tuple[str, ...], *, title: str = "", **more: Any) -> Page:
    """What was used by each of something, and by the last of its names over time."""
    table = functools.partial(usage_table, store, query, each, name=name.lower(), title=title or name)

    def charts() -> dict[str, Any]:
        return {"charts": [spend_chart(store, query, each[-1])]}

    return Page(name, "groups.html", {name.lower(): table}, charts, **more)

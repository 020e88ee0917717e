"""Overview: what was spent, on what, and whether it is getting worse."""

from dataclasses import dataclass
from typing import Any

from ...errors import InvalidValue
from ...store import Store
from ...usage import usage
from .. import shown
from ..charts import Chart, Series, change, sparkline
from ..page import Page, ignored, without
from ..query import Query, dimensions
from ..tables import Column, Table
from .groups import MEASURES, labels, over_time, parts_over_time, top, usage_table

PLAIN = ("requests", "failed_requests", "input_tokens", "output_tokens", "cost", "unpriced_requests")
LATENCY = ("duration_p50_ms", "duration_p95_ms", "first_token_p50_ms", "first_token_p95_ms")


@dataclass(frozen=True)
class Card:
    """One figure: of the span, of the span before it, and how it went.

    value    as usage() has it
    worse    whether more of it is bad
    """

    name: str
    title: str
    value: Any
    shown: str
    before: str
    change: Any
    worse: bool = False
    detail: str = ""
    points: str = ""
    exact: str = ""


def overview_page(store: Store, query: Query) -> Page:
    by = query.by or "model"
    if by == "tool":
        raise InvalidValue("by='tool' is what the page Tools shows")
    where = without(query, "tool")
    (now,) = usage(store, (), **query.time, where=where, measures=MEASURES)
    past: Any = {"since": query.before, "until": query.since, "tz": query.tz}
    (before,) = usage(store, (), **past, where=where, measures=(*PLAIN, *LATENCY))
    totals = usage(store, (query.period,), **query.time, where=where, measures=(*PLAIN, *LATENCY))
    figures = cards(now, before, totals)
    title = f"By {shown.title(by).lower()}"
    table = usage_table(store, query, (by,), where=where, name="groups", title=title, total=now)
    return Page(
        "Overview",
        "overview.html",
        [table, summary(figures), over_time_table(query, totals)],
        {"cards": figures, "charts": charts(store, query, by, where, totals, table)},
        by=by,
        choices=[name for name in dimensions(store) if name != "tool"],
        ignored=ignored(query, "tool"),
    )


def cards(now: Any, before: Any, totals: Any) -> list[Card]:
    def card(name: str, title: str, show: Any, *, worse: bool = False, detail: str = "", exact: str = "") -> Card:
        value, was = getattr(now, name), getattr(before, name)
        points = sparkline([getattr(row, name) for row in totals])
        return Card(name, title, value, show(value), show(was), change(value, was), worse, detail, points, exact)

    rate, was = (shown.ratio(row.failed_requests, row.requests) for row in (now, before))
    rates = sparkline([shown.ratio(row.failed_requests, row.requests) for row in totals])
    failed = f"{shown.number(now.failed_requests)} failed"
    return [
        card("cost", "Spend", shown.spend, exact=shown.exact(now.cost)),
        card("requests", "Requests", shown.number),
        card("input_tokens", "Input tokens", shown.compact, exact=shown.number(now.input_tokens)),
        card("output_tokens", "Output tokens", shown.compact, exact=shown.number(now.output_tokens)),
        Card(
            "error_rate",
            "Error rate",
            rate,
            shown.percent(rate),
            shown.percent(was),
            change(rate, was),
            True,
            failed,
            rates,
        ),
        card("duration_p50_ms", "Latency p50", shown.milliseconds, worse=True),
        card("duration_p95_ms", "Latency p95", shown.milliseconds, worse=True),
        card("first_token_p50_ms", "First token p50", shown.milliseconds, worse=True),
        card("first_token_p95_ms", "First token p95", shown.milliseconds, worse=True),
        card("unpriced_requests", "Unpriced requests", shown.number, worse=True),
    ]


def summary(figures: list[Card]) -> Table:
    columns = [Column("figure", "Figure"), Column("value", "Value"), Column("before", "Before")]
    rows = [{"figure": each.name, "value": each.value, "before": each.before} for each in figures]
    return Table("summary", "Figures", columns, rows)


def over_time_table(query: Query, totals: Any) -> Table:
    period = query.period
    columns = [Column(period, period.capitalize()), *(Column(name, name) for name in (*PLAIN, *LATENCY))]
    return Table("time", f"By {period}", columns, [row.as_dict() for row in totals])


def charts(store: Store, query: Query, by: str, where: Any, totals: Any, table: Table) -> list[Chart]:
    # What failed cost nothing: by error, what happened most often.
    is_of_errors = by in ("status", "error")
    keys = top(store, query, by, where, "requests") if is_of_errors else top(store, query, by, where, table=table)
    parts = parts_over_time(store, query, by, keys, where, PLAIN)
    word = shown.title(by).lower() if by in shown.TITLES else by
    names = labels(query, [row[query.period] for row in totals])

    def by_key(name: str, title: str, unit: str, *measures: str) -> Chart:
        return over_time(query, name, f"{title} by {word}", unit, by, keys, totals, parts, *measures)

    def lines(*given: tuple[str, str, str]) -> list[Series]:
        return [Series(label, color, [getattr(row, name) for row in totals]) for label, color, name in given]

    return [
        by_key("spend", "Spend", "money", "cost"),
        by_key("tokens", "Tokens", "number", "input_tokens", "output_tokens"),
        by_key("requests", "Requests", "number", "requests"),
        by_key("failures", "Failed requests", "number", "failed_requests"),
        Chart(
            "latency",
            "Latency",
            "lines",
            "ms",
            names,
            lines(
                ("p50", "c1", "duration_p50_ms"),
                ("p95", "c2", "duration_p95_ms"),
                ("first token p50", "c3", "first_token_p50_ms"),
                ("first token p95", "c4", "first_token_p95_ms"),
            ),
        ),
    ]

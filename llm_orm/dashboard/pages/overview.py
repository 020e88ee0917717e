"""Overview: what was spent, on what, and whether it is getting worse."""

import functools
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ...errors import InvalidValue
from ...store import Store
from ...usage import usage
from .. import shown
from ..charts import Chart, Series, change, sparkline
from ..page import Page
from ..query import Query, dimensions
from ..tables import Column, Table
from .groups import MEASURES, hours, labels, over_time, parts_over_time, top, totals_over_time, usage_table

PLAIN = ("requests", "failed_requests", "input_tokens", "output_tokens", "cost", "unpriced_requests")
LATENCY = ("duration_p50_ms", "duration_p95_ms", "first_token_p50_ms", "first_token_p95_ms")


@dataclass(frozen=True)
class Card:
    """One figure: of the span, of the span before it, and how it went.

    value    as usage() has it; of cost, `shown` says less where no price is known
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

    def total(since: datetime, until: datetime, *measures: str) -> Any:
        return usage(store, (), since=since, until=until, tz=query.tz, where=query.where or None, measures=measures)[0]

    now = functools.cache(lambda: total(query.since, query.until, *MEASURES))
    totals = functools.cache(lambda: totals_over_time(store, query, (*PLAIN, *LATENCY)))
    figures = functools.cache(lambda: cards(now(), total(query.before, query.since, *PLAIN, *LATENCY), totals()))
    title = f"By {shown.title(by).lower()}"
    groups = functools.cache(lambda: usage_table(store, query, (by,), name="groups", title=title, total=now))
    return Page(
        "Overview",
        "overview.html",
        {
            "groups": groups,
            "summary": lambda: summary(figures()),
            "time": lambda: over_time_table(query, totals()),
        },
        lambda: {"cards": figures(), "charts": charts(store, query, by, totals(), groups())},
        by=by,
        choices=[name for name in dimensions(store) if name != "tool"],
    )


def cards(now: Any, before: Any, totals: Any) -> list[Card]:
    def card(name: str, title: str, show: Any, *, worse: bool = False, detail: str = "", exact: str = "") -> Card:
        value, was = getattr(now, name), getattr(before, name)
        points = sparkline([getattr(row, name) for row in totals])
        return Card(name, title, value, show(value), show(was), change(value, was), worse, detail, points, exact)

    def spend() -> Card:
        cost, was = (shown.known_cost(row.cost, row.requests, row.unpriced_requests) for row in (now, before))
        points, unpriced = sparkline([row.cost for row in totals]), shown.unpriced(now.unpriced_requests)
        went = change(cost, was)
        both = shown.spend(cost), shown.spend(was)
        return Card("cost", "Spend", now.cost, *both, went, detail=unpriced, points=points, exact=shown.exact(cost))

    rate, was = (shown.ratio(row.failed_requests, row.requests) for row in (now, before))
    rates = sparkline([shown.ratio(row.failed_requests, row.requests) for row in totals])
    failed = f"{shown.number(now.failed_requests)} failed"
    return [
        spend(),
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


def charts(store: Store, query: Query, by: str, totals: Any, table: Table) -> list[Chart]:
    # What failed cost nothing: by error, what happened most often.
    is_of_errors = by in ("status", "error")
    keys = top(store, query, by, "requests") if is_of_errors else top(store, query, by, table=table)
    parts = parts_over_time(store, query, by, keys, PLAIN)
    word = shown.title(by).lower() if by in shown.TITLES else by
    periods = [row[query.period] for row in totals]

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
            labels(query, periods),
            lines(
                ("p50", "c1", "duration_p50_ms"),
                ("p95", "c2", "duration_p95_ms"),
                ("first token p50", "c3", "first_token_p50_ms"),
                ("first token p95", "c4", "first_token_p95_ms"),
            ),
            hours(query, periods),
        ),
    ]

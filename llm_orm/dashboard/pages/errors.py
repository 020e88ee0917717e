"""Errors: what failed, where, and the latest of it."""

import functools
from typing import Any

from ...store import Store
from ...usage import usage
from .. import shown
from ..charts import Chart
from ..page import Page
from ..query import Query
from ..tables import Column, Table
from .groups import MOST_GROUPS, named_column, over_time, parts_over_time, top, totals_over_time
from .requests import request_rows, requests_table

FAILED = ("requests", "failed_requests")
LATEST = 20


def errors_page(store: Store, query: Query) -> Page:
    by_error = functools.cache(lambda: table(store, query, ("error",), "errors", "By error"))

    def failed() -> Table:
        classes = [row["error"] for row in by_error().rows]
        rows: Any = []
        if classes:
            only = {**query.where, "error": classes}
            rows = requests_table(store, query, only, limit=LATEST, order="-created_at", offset=0)[0].rows
        return request_rows(query, rows, name="failed", title="Latest failed requests")

    tables = {
        "errors": by_error,
        "statuses": lambda: table(store, query, ("status",), "statuses", "By status"),
        "models": lambda: table(store, query, ("provider", "model"), "models", "By model"),
        "failed": failed,
    }
    return Page("Errors", "errors.html", tables, lambda: {"charts": [chart(store, query)]})


def table(store: Store, query: Query, by: tuple[str, ...], name: str, title: str) -> Table:
    """What of each failed; those of which nothing did are left out."""
    asked: Any = {**query.time, "where": query.where or None, "measures": FAILED}
    rows = usage(store, by, **asked, order="-failed_requests", limit=MOST_GROUPS)
    rate = (Column("requests", "Of requests", "number"), Column("error_rate", "Error rate", "percent"))
    columns = [
        *(named_column(each) for each in by),
        Column("failed_requests", "Failed", "number"),
        *(rate if "model" in by else ()),  # of an error, or a status, all have failed
    ]
    found = [{**row.as_dict(), "error_rate": shown.ratio(row.failed_requests, row.requests)} for row in rows]
    links = {each: lambda row, each=each: query.filtered(each, row[each]) for each in by}
    return Table(
        name,
        title,
        columns,
        [row for row in found if row["failed_requests"]],
        links,
        empty="Nothing failed in this span of time.",
    )


def chart(store: Store, query: Query) -> Chart:
    keys = [key for key in top(store, query, "error", "failed_requests") if key is not None]
    totals = totals_over_time(store, query, FAILED)
    parts = parts_over_time(store, query, "error", keys, FAILED)
    return over_time(
        query, "failures", "Failed requests by error", "number", "error", keys, totals, parts, "failed_requests"
    )

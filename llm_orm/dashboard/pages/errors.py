"""Errors: what failed, where, and the latest of it."""

from typing import Any

from ...store import Store
from ...usage import usage
from .. import shown
from ..charts import Chart
from ..page import Page, ignored, without
from ..query import Query
from ..tables import Column, Table
from .groups import MOST_GROUPS, named_column, over_time, parts_over_time, top
from .requests import request_rows, requests_table

FAILED = ("requests", "failed_requests")
LATEST = 20


def errors_page(store: Store, query: Query) -> Page:
    where = without(query, "tool")
    by_error = table(store, query, where, ("error",), "errors", "By error")
    classes = [row["error"] for row in by_error.rows]
    failed: Any = []
    if classes:
        only = {**(where or {}), "error": classes}
        failed = requests_table(store, query, only, limit=LATEST, order="-created_at", offset=0)[0].rows
    tables = [
        by_error,
        table(store, query, where, ("status",), "statuses", "By status"),
        table(store, query, where, ("provider", "model"), "models", "By model"),
        request_rows(query, failed, name="failed", title="Latest failed requests"),
    ]
    return Page(
        "Errors", "errors.html", tables, {"charts": [chart(store, query, where)]}, ignored=ignored(query, "tool")
    )


def table(store: Store, query: Query, where: Any, by: tuple[str, ...], name: str, title: str) -> Table:
    """What of each failed; those of which nothing did are left out."""
    rows = usage(store, by, **query.time, where=where, order="-failed_requests", limit=MOST_GROUPS, measures=FAILED)
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


def chart(store: Store, query: Query, where: Any) -> Chart:
    keys = [key for key in top(store, query, "error", where, "failed_requests") if key is not None]
    totals = usage(store, (query.period,), **query.time, where=where, measures=FAILED)
    parts = parts_over_time(store, query, "error", keys, where, FAILED)
    return over_time(
        query, "failures", "Failed requests by error", "number", "error", keys, totals, parts, "failed_requests"
    )

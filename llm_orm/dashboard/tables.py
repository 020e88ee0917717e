"""A table: what a page shows of it, its CSV and its JSON, which have the same rows."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from ..formats.spreadsheet import defused
from . import shown

RIGHT = ("number", "money", "dollars", "ms", "percent", "share")


@dataclass(frozen=True)
class Column:
    """A column: what it is called in an export, and on the page.

    kind     text, number, money (with a bar, the longest of the largest), dollars, ms, percent, share (with a bar of
             its own), time, status; name: a value of the dimension `by`
    sort     what `order=` calls it; None: rows cannot be put in its order
    minor    left out on a phone
    wraps    may take several lines
    """

    name: str
    title: str
    kind: str = "text"
    sort: str | None = None
    by: str = ""
    minor: bool = False
    hint: str = ""
    wraps: bool = False

    @property
    def is_right(self) -> bool:
        return self.kind in RIGHT


@dataclass(frozen=True)
class Table:
    """Rows under columns.

    name     what its exports are called
    links    for a column, where its cell leads, told the row: an address, or None
    marks    for a row, the class of its line on the page
    total    a last row, of all there is; not in the exports
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    links: Mapping[str, Callable[[Mapping[str, Any]], str | None]] = field(default_factory=dict)
    marks: Callable[[Mapping[str, Any]], str] = lambda row: ""
    total: Mapping[str, Any] | None = None
    empty: str = "Nothing in this span of time."
    note: str = ""

    def link(self, column: Column, row: Mapping[str, Any]) -> str | None:
        return self.links[column.name](row) if column.name in self.links else None

    def share(self, column: Column, row: Mapping[str, Any]) -> int | None:
        """How long the bar of a cell is, in percent; None where the column has none."""
        if column.kind == "share":
            return min(100, round(100 * row[column.name]))
        if column.kind != "money":
            return None
        values = [each[column.name] or 0 for each in self.rows]
        most = max(values, default=0)
        return round(100 * (row.get(column.name) or 0) / most) if most else None

    def as_csv(self) -> str:
        """Lines of CSV; a text that a spreadsheet would take for a formula has a quote before it."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([column.name for column in self.columns])
        for row in self.rows:
            writer.writerow([_csv_cell(row.get(column.name)) for column in self.columns])
        return text.getvalue()

    def as_json(self) -> str:
        """A list of objects; money is a string in it, so that no reader rounds it."""
        rows = [{column.name: row.get(column.name) for column in self.columns} for row in self.rows]
        return json.dumps(rows, default=_plain, ensure_ascii=False, indent=1)


def _csv_cell(value: Any) -> str:
    text = "" if value is None else value if isinstance(value, str) else _text(value)
    return text if _is_number(value) else defused(text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return json.dumps(value, default=_plain, ensure_ascii=False)
    plain = _plain(value)
    return plain if isinstance(plain, str) else str(plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, datetime | date):
        return value.isoformat()
    return value if isinstance(value, int | float) else str(value)


def priced(column: Column, row: Mapping[str, Any]) -> Any:
    """A row's value, less a cost of which nothing is known."""
    value = row.get(column.name)
    if column.name != "cost":
        return value
    return shown.known_cost(value, row.get("requests"), row.get("unpriced_requests"))


def beside(column: Column, row: Mapping[str, Any]) -> str:
    """What is said beside a cell."""
    return shown.unpriced(row.get("unpriced_requests")) if column.name == "cost" else ""


def cell(value: Any, column: Column, tz: Any) -> str:
    """A cell's text on the page."""
    if column.kind == "name":
        return shown.named(value, column.by)
    if value is None:
        return shown.NOTHING
    show: dict[str, Callable[[Any], str]] = {
        "number": shown.number,
        "money": shown.dollars,
        "dollars": shown.dollars,
        "ms": shown.milliseconds,
        "percent": lambda share: shown.percent(float(share)),
        "share": lambda share: shown.percent(float(share)),
        "time": lambda moment: shown.moment(moment, tz),
    }
    return show[column.kind](value) if column.kind in show else _text(value)

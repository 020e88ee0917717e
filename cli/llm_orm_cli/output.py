"""How rows are printed: a table on a terminal, tab-separated when piped, or JSON, or CSV."""

import csv
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import click


def print_rows(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    title: str | None = None,
    as_json: bool = False,
    as_csv: bool = False,
    cut: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> None:
    """Print rows under the names of their columns.

    cut      columns that on a terminal are cut where they would be folded
    whole    columns that on a terminal are neither cut nor folded: ids that somebody may copy
    """
    rows = list(rows)
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    elif as_csv:
        print_csv(columns, rows)
    elif is_terminal():
        _draw(columns, _cut(columns, rows, cut) if cut else rows, title, whole)
    else:
        if title:
            click.echo(title)
        for row in (columns, *rows):
            click.echo("\t".join(plain(value) for value in row))


def print_values(values: Mapping[str, Any], *, title: str | None = None, as_json: bool = False) -> None:
    """Print values behind their names, one on a line."""
    if as_json:
        print_json(values)
    elif is_terminal():
        _draw(None, list(values.items()), title)
    else:
        if title:
            click.echo(title)
        for name, value in values.items():
            click.echo(f"{name}\t{plain(value)}")


def print_json(value: Any) -> None:
    """Print JSON; money is a string in it, so that no reader rounds it."""
    click.echo(json.dumps(value, default=text, ensure_ascii=False, indent=2))


def print_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print CSV. A text that a spreadsheet would take for a formula stands behind an apostrophe."""
    from llm_orm.formats.spreadsheet import defused

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([defused(text(value)) if isinstance(value, str) else text(value) for value in row] for row in rows)


def is_terminal() -> bool:
    return sys.stdout.isatty()


def text(value: Any) -> str:
    """A value as people write it: money with all its digits and no exponent, nothing for NULL."""
    if value is None:
        return ""
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, bool | dict | list):
        return json.dumps(value, default=text, ensure_ascii=False)
    if isinstance(value, datetime):
        return value.isoformat(" ", "milliseconds")
    return str(value)


def plain(value: Any) -> str:
    """A value on one line and in one column."""
    return printable(text(value).replace("\t", "\\t").replace("\r", "\\r").replace("\n", "\\n"))


def printable(text: str) -> str:
    """The text less what would move the cursor or change the colours of a terminal."""
    return _CONTROL.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and what turns the direction of a line around."""


class Figure(str):
    """A figure with a word to it: it stands where numbers stand."""


def shown_cost(cost: Decimal | None, requests: int | None, unpriced: int | None) -> Any:
    """A cost as it is shown to people, who would take 0 for nothing: None where no request has a price."""
    if cost is None or (unpriced and unpriced == requests):
        return None
    return Figure(f"{text(cost)} +{unpriced:,} unpriced") if unpriced else cost


def bars(values: Sequence[Any], columns: int, largest: float | None = None) -> list[str]:
    """A bar for each of the values, the largest as long as there are columns."""
    largest = max(map(float, values), default=0.0) if largest is None else largest
    if not largest or columns < 1:
        return ["" for _ in values]
    if "utf" not in (sys.stdout.encoding or "").lower():
        return ["#" * round(columns * float(value) / largest) for value in values]
    eighths = [round(8 * columns * float(value) / largest) for value in values]
    # What is not nothing is seen to be something.
    eighths = [max(count, 1) if value else 0 for count, value in zip(eighths, values, strict=True)]
    return ["█" * (count // 8) + ("", *"▏▎▍▌▋▊▉")[count % 8] for count in eighths]


def columns_left(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> int:
    """How many columns of the terminal a table leaves free; less than 0 where it has too few."""
    from rich.cells import cell_len
    from rich.console import Console

    widths = [cell_len(name) for name in columns]
    for row in rows:
        for index, value in enumerate(row):
            widths[index] = max(widths[index], cell_len(printable(text(value))))
    taken = sum(width + len("  ") for width in widths)
    return Console(file=sys.stdout).width - taken


SHORTEST_CUT = 12
"""Columns of the terminal that are left to a text that is cut."""


def _cut(columns: Sequence[str], rows: Sequence[Sequence[Any]], cut: Sequence[str]) -> list[list[Any]]:
    """The rows, with those columns cut to what the others leave."""
    from rich.cells import cell_len, set_cell_size

    places = [index for index, name in enumerate(columns) if name in cut]
    without = [["" if index in places else value for index, value in enumerate(row)] for row in rows]
    room = max(SHORTEST_CUT, columns_left(columns, without) // max(1, len(places)))
    cut_rows = [list(row) for row in rows]
    for row in cut_rows:
        for index in places:
            shown = printable(text(row[index]))
            if row[index] is not None and cell_len(shown) > room:
                row[index] = f"{set_cell_size(shown, room - 1).rstrip()}…"
    return cut_rows


def _draw(
    columns: Sequence[str] | None, rows: Sequence[Sequence[Any]], title: str | None, whole: Sequence[str] = ()
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=None if title is None else Text(printable(title)),
        title_justify="left",
        title_style="bold",
        show_header=columns is not None,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for index, name in enumerate(columns or ("", "")):
        cells = [row[index] for row in rows if row[index] is not None]
        are_numbers = bool(cells) and all(_is_number(cell) for cell in cells)
        is_whole = are_numbers or name in whole
        table.add_column(name, justify="right" if are_numbers else "left", no_wrap=is_whole, overflow="fold")
    for row in rows:
        table.add_row(*(Text("\N{EN DASH}" if value is None else printable(text(value))) for value in row))
    Console(file=sys.stdout, highlight=False).print(table)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal | Figure) and not isinstance(value, bool)

"""How rows are printed: a table on a terminal, tab-separated when piped, or JSON."""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import click


def print_rows(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None, as_json: bool = False
) -> None:
    """Print rows under the names of their columns."""
    rows = list(rows)
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    elif is_terminal():
        _draw(columns, rows, title)
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
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _draw(columns: Sequence[str] | None, rows: Sequence[Sequence[Any]], title: str | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title,
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
        table.add_column(name, justify="right" if are_numbers else "left", no_wrap=are_numbers, overflow="fold")
    for row in rows:
        table.add_row(*(Text("\N{EN DASH}" if value is None else printable(text(value))) for value in row))
    Console(file=sys.stdout, highlight=False).print(table)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | Decimal) and not isinstance(value, bool)

"""`llm-orm stats`: what was spent, on whom, for what, and when."""

from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from .application import opened_with_its_columns, store_option
from .options import chat_named, csv_option, database_options, json_option, not_both, span_options, where_option
from .output import bars, columns_left, is_terminal, print_csv, print_rows, print_values, shown_cost

if TYPE_CHECKING:
    from llm_orm.usage import UsageRow

FIGURES = (
    "input_tokens output_tokens total_tokens cached_tokens cache_write_tokens thinking_tokens cost requests "
    "failed_requests unpriced_requests tool_calls duration_ms retried_requests duration_avg_ms duration_p50_ms "
    "duration_p95_ms duration_max_ms first_token_p50_ms first_token_p95_ms tool_failures"
).split()
"""What is printed of each group: `Stats`, and behind it what `usage` has besides."""

MADE_OF = {"cost": ("cost", "requests", "unpriced_requests")}
"""The measures that a figure is made of, or without which it cannot be understood."""

OF_REQUESTS = "requests failed_requests input_tokens output_tokens cost unpriced_requests duration_p95_ms".split()
OF_TOOLS = "tool_calls tool_failures duration_avg_ms duration_p95_ms".split()
"""What a terminal has room for."""

LEFT_OUT = ("failed_requests", "unpriced_requests", "tool_failures")
"""What is not shown on a terminal where all of it is 0."""

GIVING_WAY = ("duration_p95_ms", "output_tokens", "input_tokens", "failed_requests")
"""What is left out, one after the other, on a terminal that has no room for it and a bar."""

HEADINGS = {
    "failed_requests": "failed",
    "unpriced_requests": "unpriced",
    "input_tokens": "tokens in",
    "output_tokens": "tokens out",
    "duration_avg_ms": "avg ms",
    "duration_p95_ms": "p95 ms",
    "tool_calls": "tool calls",
    "tool_failures": "failures",
}

LONGEST_BAR = 24
SHORTEST_BAR = 6


def _names(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """What was said in one option, or in several: day,model."""
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())


@click.command()
@click.argument("chat_id", required=False)
@click.option(
    "--by",
    metavar="NAMES",
    multiple=True,
    callback=_names,
    help="A row for each hour, day, week, month; provider, model, status, error, source, streamed, agent_class, chat, "
    "tool; column of yours of the chat; metadata.KEY. Several: day,model.",
)
@where_option(
    "Of which requests: model=gpt-4o, status=429, user_id=u_1, metadata.plan=free, and what else --by takes but times. "
    "Repeatable: all of them hold; of several values for one name, one does."
)
@span_options
@click.option(
    "--order", metavar="NAME", help='By which of its columns, "-cost" for the largest first; default: by time.'
)
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="So many groups only, the first in that order.")
@click.option(
    "--columns", metavar="NAMES", multiple=True, callback=_names, help="Only these of the figures: requests,cost."
)
@database_options
@store_option
@json_option
@csv_option
def stats(
    chat_id: str | None,
    by: tuple[str, ...],
    conditions: dict[str, list[Any]],
    since: str | None,
    until: str | None,
    tz: str,
    order: str | None,
    top: int | None,
    columns: tuple[str, ...],
    as_json: bool,
    as_csv: bool,
    **database: Any,
) -> None:
    """Sum up tokens, cost and time.

    Of the chat CHAT_ID, or of all chats, deleted ones included; with --by, a row for each group. Cost is in US dollars,
    and leaves out the unpriced requests; duration is the time spent waiting for models.
    """
    not_both(as_json, as_csv)
    if (order or top) and not by:
        raise click.UsageError("--order and --top are for the rows of --by")
    from llm_orm.usage import usage

    measures = [each for name in columns for each in MADE_OF.get(name, (name,))]
    with opened_with_its_columns(**database) as store:
        chat = {"chat": [chat_named(store, chat_id)]} if chat_id is not None else {}
        rows = usage(
            store,
            by,
            since=since,
            until=until,
            where={**conditions, **chat},
            tz=tz,
            order=order,
            limit=top,
            measures=measures or None,
        )
    figures = columns or FIGURES
    if by:
        _print_groups(rows, by, figures, is_chosen=bool(columns), as_json=as_json, as_csv=as_csv)
        return
    values = {name: rows[0][name] for name in figures}
    if as_csv:
        print_csv(list(values), [list(values.values())])
    elif as_json or not is_terminal():
        print_values(values, as_json=as_json)
    else:
        print_values({name: _shown(rows[0], name, figures) for name in figures})


def _print_groups(
    rows: list["UsageRow"], by: tuple[str, ...], measures: Any, *, is_chosen: bool, as_json: bool, as_csv: bool
) -> None:
    names = [*by, *measures]
    if as_json or as_csv or not is_terminal():
        print_rows(names, [[row[name] for name in names] for row in rows], as_json=as_json, as_csv=as_csv)
        return
    figures = list(measures) if is_chosen else _figures(rows)
    columns, cells = _table(rows, by, figures)
    for name in GIVING_WAY:
        if columns_left([*columns, ""], cells) < SHORTEST_BAR and not is_chosen and name in figures:
            figures.remove(name)
            columns, cells = _table(rows, by, figures)
    room = min(columns_left([*columns, ""], cells), LONGEST_BAR)
    measure = next((name for name in ("cost", "requests", "tool_calls") if any(row[name] for row in rows)), None)
    if measure and room >= SHORTEST_BAR:
        drawn = bars([row[measure] or 0 for row in rows], room)
        columns, cells = [*columns, ""], [[*row, bar] for row, bar in zip(cells, drawn, strict=True)]
    print_rows(columns, cells)


def _figures(rows: list["UsageRow"]) -> list[str]:
    are_tools = any(row.requests is None for row in rows)
    names = OF_TOOLS if are_tools else OF_REQUESTS
    return [name for name in names if name not in LEFT_OUT or any(row[name] for row in rows)]


def _table(rows: list["UsageRow"], by: tuple[str, ...], figures: list[str]) -> tuple[list[str], list[list[Any]]]:
    places = _places([row.cost for row in rows if row.cost])
    cells = [[*(row[name] for name in by), *(_shown(row, name, figures, places) for name in figures)] for row in rows]
    return [HEADINGS.get(name, name) for name in (*by, *figures)], cells


def _places(costs: list[Decimal]) -> int:
    """How many places tell the smallest of the costs from nothing, to two digits."""
    return min(12, max([2, *(1 - cost.adjusted() for cost in costs)]))


def _shown(row: "UsageRow", name: str, figures: Sequence[str], places: int | None = None) -> Any:
    """A figure as a terminal shows it; of a cost, how many requests it leaves out, where no column says so."""
    if name != "cost" or row.cost is None:
        return row[name]
    cost = row.cost if places is None else round(row.cost, places)
    shown = shown_cost(cost, row.requests, row.unpriced_requests)
    return cost if shown is not None and "unpriced_requests" in figures else shown

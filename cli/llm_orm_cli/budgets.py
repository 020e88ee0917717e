"""`llm-orm budgets`: where the budgets stand."""

from typing import TYPE_CHECKING, Any

import click

from .application import opened_with_its_columns, store_option
from .options import database_options, json_option
from .output import Figure, bars, columns_left, is_terminal, print_json, print_rows

if TYPE_CHECKING:
    from datetime import datetime

    from llm_orm import BudgetStatus

COLUMNS = ("budget", "who", "spent", "limit", "remaining", "share", "resets_at")

GIVING_WAY = ("remaining", "limit")
"""What is left out, one after the other, on a terminal that has no room for it and a bar."""

LONGEST_BAR = 20
SHORTEST_BAR = 6


@click.command()
@click.option("--limit", metavar="DOLLARS", help='A budget to look at, in the place of the store\'s: "5.00".')
@click.option(
    "--per",
    type=click.Choice(["hour", "day", "week", "month", "total"]),
    default="day",
    show_default=True,
    help="The period of --limit.",
)
@click.option(
    "--by",
    metavar="NAME",
    help="Who has the limit each: chat, model, provider, agent_class, a column of yours, metadata.KEY.",
)
@click.option("--tz", metavar="ZONE", default="UTC", show_default=True, help="Whose calendar: Europe/Berlin.")
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="So many lines only, of the highest shares.")
@database_options
@store_option
@json_option
@click.pass_context
def budgets(
    context: click.Context,
    limit: str | None,
    per: Any,
    by: str | None,
    tz: str,
    top: int | None,
    as_json: bool,
    **database: Any,
) -> None:
    """Show where budgets stand in their current periods, the highest share first.

    Of the budgets that the application's store has, which --store names; or of one that is given here, with --limit: to
    see what it would mean before it is set. One line for each who has spent. Exits with 1 where one is used up.
    """
    if limit is None and database["application"] is None:
        raise click.UsageError("say which budgets: --store MODULE:NAME, or --limit 5.00 --per day --by user_id")
    from llm_orm import Budget, InvalidValue, budget_status

    try:
        given = None if limit is None else [Budget(limit, per=per, by=by, tz=tz)]
    except InvalidValue as error:
        raise click.UsageError(str(error)) from error
    with opened_with_its_columns(**database) as store:
        if given is None and not store.budgets:
            raise click.ClickException("the store has no budgets: connect(…, budgets=[…]), or give one with --limit")
        found = budget_status(store, given)
    shown = found[:top]
    if as_json:
        print_json([status.as_dict() for status in shown])
    elif is_terminal():
        _draw(shown)
    else:
        print_rows(COLUMNS, [[row[name] for name in COLUMNS] for row in map(_row, shown)])
    context.exit(1 if any(status.is_exceeded for status in found) else 0)


def _row(status: "BudgetStatus") -> dict[str, Any]:
    return status.as_dict() | {"who": status.whom or "all", "share": f"{int(status.share * 100)}%"}


def _draw(found: list["BudgetStatus"]) -> None:
    rows = [_row(status) | {"resets_at": _short(status.resets_at)} for status in found]
    rows = [row | {"share": Figure(row["share"])} for row in rows]
    columns = list(COLUMNS)
    labels = {row["budget"] for row in rows}
    title = labels.pop() if len(labels) == 1 else None
    if title is not None:
        columns.remove("budget")

    def cells() -> list[list[Any]]:
        return [[row[name] for name in columns] for row in rows]

    for name in GIVING_WAY:
        if columns_left([*columns, ""], cells()) < SHORTEST_BAR:
            columns.remove(name)
    room = min(columns_left([*columns, ""], cells()), LONGEST_BAR)
    drawn = bars([min(status.share, 1) for status in found], room, 1.0) if room >= SHORTEST_BAR else []
    lines = [[*row, bar] for row, bar in zip(cells(), drawn, strict=True)] if drawn else cells()
    print_rows([*columns, ""] if drawn else columns, lines, title=title, whole=("resets_at",))


def _short(moment: "datetime | None") -> str:
    return "never" if moment is None else f"{moment:%Y-%m-%d %H:%M} {moment.tzname()}"

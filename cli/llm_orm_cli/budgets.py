"""`llm-orm budgets`: where the budgets stand."""

from typing import Any

import click

from .application import opened_with_its_columns, store_option
from .options import database_options, json_option
from .output import print_json, print_rows

COLUMNS = ("budget", "who", "spent", "limit", "remaining", "share", "resets_at")


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
@database_options
@store_option
@json_option
@click.pass_context
def budgets(
    context: click.Context, limit: str | None, per: Any, by: str | None, tz: str, as_json: bool, **database: Any
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
    if as_json:
        print_json([status.as_dict() for status in found])
    else:
        rows = [
            status.as_dict() | {"who": status.whom or "all", "share": f"{int(status.share * 100)}%"} for status in found
        ]
        print_rows(COLUMNS, [[row[name] for name in COLUMNS] for row in rows])
    context.exit(1 if any(status.is_exceeded for status in found) else 0)

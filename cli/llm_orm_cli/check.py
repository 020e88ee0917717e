"""`llm-orm check`: whether a database is sound."""

import dataclasses
from typing import Any

import click

from .application import opened, store_option
from .options import DURATION, chat_named, chat_option, database_options, json_option
from .output import print_json, print_rows

MOST = 1000


@click.command()
@database_options
@store_option
@click.option(
    "--older-than",
    type=DURATION,
    default="60s",
    show_default=True,
    help="A turn without a sign of life for so long counts as dead: 90, 90s, 15m, 2h or 30d.",
)
@chat_option("Look at this chat only.")
@json_option
@click.pass_context
def check(context: click.Context, older_than: float, chat_id: str | None, as_json: bool, **database: Any) -> None:
    """Prove that a database is sound.

    Prints every row that does not fit the others, what is wrong with it, and what to do: gaps in a chat's positions,
    turns whose process died, tool calls that nobody will finish, tokens that are not the sum of their requests, rows
    that name what is not there. Exits with 1 if there is any, at most 1000 of them printed. Changes nothing, and may
    run beside turns at work.
    """
    from llm_orm import check as findings_in
    from llm_orm.soundness import counted

    with opened(**database) as store:
        key = None if chat_id is None else chat_named(store, chat_id)
        found = findings_in(store, stale_after=older_than, chat_id=key, limit=MOST)
        if as_json:
            print_json([dataclasses.asdict(finding) for finding in found])
        elif found:
            columns = [field.name for field in dataclasses.fields(found[0])]
            print_rows(columns, [dataclasses.astuple(finding) for finding in found])
        else:
            counts = counted(store, key).items()
            click.echo("sound: " + ", ".join(f"{count} {_named(name, count)}" for name, count in counts))
    if len(found) == MOST:
        click.echo(f"there may be more: these are the first {MOST}", err=True)
    context.exit(1 if found else 0)


def _named(record: str, count: int) -> str:
    return record.replace("_", " ") + ("" if count == 1 else "s")

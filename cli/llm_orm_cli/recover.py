"""`llm-orm recover`: an end for the turns whose process died."""

import dataclasses
from typing import Any

import click

from .application import opened, store_option
from .options import DURATION, chat_named, chat_option, database_options, json_option
from .output import print_json, print_rows

SHOWN = 60
"""How much is shown of what a turn had said."""


@click.command()
@database_options
@store_option
@click.option(
    "--older-than",
    type=DURATION,
    default="15m",
    show_default=True,
    help="Of turns that gave no sign of life for so long: 90, 90s, 15m, 2h or 30d.",
)
@chat_option("Of this chat only.")
@click.option("--dry-run", is_flag=True, help="Show the turns; change nothing.")
@json_option
def recover(older_than: float, chat_id: str | None, dry_run: bool, as_json: bool, **database: Any) -> None:
    """End the turns whose process died.

    Prints what became of each: "completed", where its reply was there whole; "kept", as an incomplete message with what
    it had said; "removed", where it had said nothing, and the question can be asked again with retry(). Turns at work,
    and those that wait for approval, are left alone. To go on with a turn in place of ending it, call
    load_chat(...).resume() before.
    """
    from llm_orm import InvalidValue
    from llm_orm.recovery import recover as recovered

    with opened(**database) as store:
        key = None if chat_id is None else chat_named(store, chat_id)
        try:
            turns = recovered(store, older_than=older_than, chat_id=key, dry_run=dry_run)
        except InvalidValue as error:
            raise click.BadParameter(str(error), param_hint="--older-than") from error
    if as_json:
        print_json([dataclasses.asdict(turn) for turn in turns])
    elif turns:
        columns = [field.name for field in dataclasses.fields(turns[0])]
        print_rows(columns, [_row(dataclasses.asdict(turn)) for turn in turns])
    else:
        click.echo(f"nothing to recover: no turn has been silent for {older_than:g} s")


def _row(turn: dict[str, Any]) -> list[Any]:
    said = turn["text"] or ""
    shown = said if len(said) <= SHOWN else said[: SHOWN - 1] + "…"
    return list((turn | {"silent_s": round(turn["silent_s"]), "text": shown or None}).values())

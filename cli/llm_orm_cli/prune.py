"""`llm-orm prune`: chats that nobody has used for long, gone."""

from typing import Any

import click

from .application import opened_with_its_columns, store_option
from .erase import confirm, counted, named, which_chats
from .options import DURATION, database_options, json_option
from .output import print_values


@click.command()
@click.option(
    "--older-than",
    type=DURATION,
    required=True,
    metavar="DURATION",
    help="For how long nothing has happened in a chat that goes: 90d, 12h, 30m, or seconds.",
)
@click.option("--keep-requests", is_flag=True, help="Keep the request rows, without a chat: what was spent.")
@which_chats
@database_options
@store_option
@json_option
def prune(
    older_than: float,
    keep_requests: bool,
    conditions: dict[str, list[Any]],
    chats: tuple[str, ...],
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **database: Any,
) -> None:
    """Delete the chats in which nothing has happened for long.

    With all that belongs to them, and the request rows of that age whose chats were deleted before. Chats with a turn
    that runs, or waits for approval, stay. Asks before it does so.
    """
    from llm_orm import prune as prune_chats

    with opened_with_its_columns(**database) as store:
        options: dict[str, Any] = {"keep_requests": keep_requests, "where": named(store, conditions, chats) or None}
        found = prune_chats(store, older_than, dry_run=True, **options)
        if not dry_run:
            confirm(yes, f"Delete for good ({counted(found.as_dict())})?")
            found = prune_chats(store, older_than, **options)
    print_values(found.as_dict(), as_json=as_json)

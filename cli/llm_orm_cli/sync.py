"""`llm-orm sync`: whether a database has the tables that the records say."""

import dataclasses
from typing import Any

import click

from .application import opened, store_option
from .options import database_options, json_option
from .output import print_json, printable


@click.command()
@database_options
@store_option
@json_option
@click.pass_context
def sync(context: click.Context, as_json: bool, **database: Any) -> None:
    """Compare a database with the records.

    Prints every table, column, index, check and foreign key that is missing or otherwise than it should be, and exits
    with 1 if there is any. Changes nothing. What the application has besides is no difference.
    """
    from llm_orm_schema.compare import differences

    with opened(**database) as store:
        found = differences(store)
        if as_json:
            print_json([dataclasses.asdict(difference) for difference in found])
        elif not found:
            click.echo(f"{store!r} is in sync with the records")
        for difference in found if not as_json else ():
            click.echo(printable(difference.message))
    context.exit(1 if found else 0)

"""`llm-orm import`: chats from a file, or from another database."""

import sys
from typing import Any

import click

from .application import opened_with_its_columns, store_option
from .export import progress
from .options import database_options, json_option
from .output import print_json, print_values, printable

SHOWN = 20
"""So many of those that were skipped are printed; with --json, a thousand."""


@click.command("import")
@click.argument("source", metavar="SOURCE")
@click.option(
    "--format",
    "format",
    type=click.Choice(("jsonl", "openai", "nodellm")),
    help="Default: as the source begins.",
)
@click.option(
    "--source-table",
    "tables",
    metavar="NAME=TABLE",
    multiple=True,
    help="Of a NodeLLM database, the name of one table, as in chat=AssistantChat; repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Bring nothing in; say what would be.")
@database_options
@store_option
@json_option
@click.pass_context
def import_(
    context: click.Context,
    source: str,
    format: str | None,
    tables: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    **database: Any,
) -> None:
    """Bring chats in: from what "llm-orm export" wrote, from OpenAI's messages, or from a NodeLLM database.

    SOURCE is a file, "-" for standard input, or the URL of a database: postgresql://… or sqlite:///…. Chats that are
    there are left as they are, so an import that was broken off is run again. Each comes in whole, or is skipped; then
    it exits with 1, and says which and why.
    """
    from llm_orm import import_chats

    names = dict(_named(each) for each in tables)
    with opened_with_its_columns(**database) as store, progress("chats") as told:
        given = sys.stdin.buffer if source == "-" else source
        found = import_chats(store, given, format, dry_run=dry_run, source_tables=names or None, progress=told)
    values = found.as_dict()
    if as_json:
        print_json(values)
    else:
        lists = ("skipped", "skipped_in_all", "columns_left_out")
        counts = {name: value for name, value in values.items() if name not in lists}
        print_values({**counts, "skipped": found.skipped_in_all})
    for each in found.skipped[:SHOWN]:
        click.echo(printable(f"skipped: {each.where}: {each.reason}"), err=True)
    if found.skipped_in_all > SHOWN:
        click.echo(f"and {found.skipped_in_all - SHOWN} more; --json has the first 1000", err=True)
    if found.columns_left_out:
        columns = ", ".join(found.columns_left_out)
        click.echo(f"the store has no such columns, and their values were left out: {columns}", err=True)
    context.exit(1 if found.skipped_in_all or found.columns_left_out else 0)


def _named(given: str) -> tuple[str, str]:
    name, equals, table = given.partition("=")
    if not equals or not table:
        raise click.BadParameter(f"{given!r} is not NAME=TABLE", param_hint="--source-table")
    return name, table

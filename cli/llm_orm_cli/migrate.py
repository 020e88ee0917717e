"""`llm-orm migrate`: the tables, up to date."""

from typing import Any

import click

from .application import opened, store_option
from .options import database_options, json_option
from .output import print_json, print_rows


@click.command()
@database_options
@store_option
@click.option("--list", "as_list", is_flag=True, help="Show what is applied and what is pending; change nothing.")
@click.option("--sql", "as_sql", is_flag=True, help="Print the SQL of what is pending; change nothing.")
@json_option
def migrate(as_list: bool, as_sql: bool, as_json: bool, **database: Any) -> None:
    """Create the tables, or bring them up to date.

    Each migration runs in a transaction of its own, and is recorded. Several processes may do this at once.
    """
    from llm_orm_schema import migrate as migrations

    if as_sql and (as_list or as_json):
        raise click.UsageError("--sql goes with neither --list nor --json")
    with opened(**database, create=True) as store:
        if as_sql:
            click.echo(migrations.sql(store), nl=False)
        elif as_list:
            rows: list[tuple[str, str, Any]] = [
                (name, "applied", when) for name, when in migrations.applied(store).items()
            ]
            rows += [(name, "pending", None) for name in migrations.pending(store)]
            print_rows(("migration", "state", "applied_at"), rows, as_json=as_json)
        elif as_json:
            print_json(migrations.migrate(store))
        else:
            _print_changes(store, migrations.migrate(store))


def _print_changes(store: Any, done: list[str]) -> None:
    from llm_orm_schema.compare import differences

    for name in done:
        click.echo(f"applied {name}")
    if not done:
        click.echo(f"nothing to apply to {store!r}")
    if missing := len(differences(store)):
        click.echo(f'{missing} difference{"s" if missing > 1 else ""} left: see "llm-orm sync"', err=True)

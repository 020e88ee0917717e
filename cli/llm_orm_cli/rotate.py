"""`llm-orm rotate`: content encrypted anew, with the key that comes first."""

from typing import Any

import click

from .application import opened, store_option
from .options import database_options, json_option
from .output import print_rows


@click.command()
@click.option("--check", is_flag=True, help="Change nothing: count what would be, and list the rows that no key opens.")
@click.option("--decrypt", is_flag=True, help="Make all content clear, to be read without keys.")
@database_options
@store_option
@json_option
@click.pass_context
def rotate(context: click.Context, check: bool, decrypt: bool, as_json: bool, **database: Any) -> None:
    """Encrypt all content anew with the first key.

    What an older key encrypted, and what is clear. The keys are those of --store, or in $LLM_ORM_ENCRYPTION_KEYS with
    commas between them, the new one first. Turns may run meanwhile; what was broken off is begun again. Exits with 1
    if there are rows that no key opens.
    """
    with opened(**database) as store:
        found = store.rotate_keys(check=check, decrypt=decrypt)
    rows = [
        (each.table, each.rows, each.changed, len(each.unreadable), [str(row_id) for row_id in each.unreadable] or None)
        for each in found
    ]
    print_rows(("table", "rows", "to_change" if check else "changed", "unreadable", "ids"), rows, as_json=as_json)
    context.exit(1 if any(each.unreadable for each in found) else 0)

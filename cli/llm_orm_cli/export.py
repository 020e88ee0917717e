"""`llm-orm export`: chats as a file."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .application import opened_with_its_columns, store_option
from .erase import named
from .options import chat_option, database_options, json_option, span_options, where_option
from .output import print_values


@click.command()
@click.argument("to", metavar="FILE")
@click.option(
    "--format",
    "format",
    type=click.Choice(("jsonl", "openai", "markdown", "csv")),
    help="Default: as the file is named, .md or .csv; else jsonl.",
)
@where_option(
    "Of which chats: user_id=u_1, model=gpt-4o, metadata.plan=free; with csv of which requests: status=429, "
    "error=Timeout. Repeatable: all of them hold; of several values for one name, one does."
)
@chat_option("A chat by its id; repeatable.", multiple=True)
@span_options
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@database_options
@store_option
@json_option
def export(
    to: str,
    format: str | None,
    conditions: dict[str, list[Any]],
    chats: tuple[str, ...],
    since: str | None,
    until: str | None,
    tz: str,
    force: bool,
    as_json: bool,
    **database: Any,
) -> None:
    """Write chats to FILE, or to standard output where it is "-".

    As jsonl every row, all columns, for "llm-orm import"; as openai a chat a line, {"messages": […]}, for fine-tuning:
    complete turns only; as markdown transcripts to be read; as csv a request a line. With --since and --until, chats in
    which something was said in that time, and requests that ended in it.

    Content is clear in the file, that of an encrypted store, too. It is made for you alone to read, and is there only
    when it is complete. Where columns of yours are not plain text and numbers, --store keeps their types.
    """
    from llm_orm import export as export_chats

    format = format or {".md": "markdown", ".csv": "csv"}.get(Path(to).suffix, "jsonl")
    if to != "-" and not force and Path(to).is_file():
        raise click.ClickException(f"{to!r} is there already: name another, or replace it with --force")
    with opened_with_its_columns(**database) as store, progress(format) as told:
        where = named(store, conditions, chats, key="chat" if format == "csv" else "id")
        target = sys.stdout.buffer if to == "-" else to
        found = export_chats(
            store,
            target,
            format,
            where=where or None,
            since=since,
            until=until,
            tz=tz,
            overwrite=force,
            progress=told,
        )
    if to != "-":
        print_values(found.as_dict(), as_json=as_json)
    if found.left_out:
        click.echo(f"{found.left_out} messages of turns that are not complete were left out", err=True)


@contextmanager
def progress(format: str) -> Iterator[Callable[[int, int | None], None] | None]:
    """What is told how far it is: a bar on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("requests" if format == "csv" else "chats", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

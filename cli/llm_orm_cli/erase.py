"""`llm-orm erase`: what was said, gone; what it cost, kept."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .application import opened_with_its_columns, store_option
from .options import chat_named, chat_option, database_options, json_option, where_option
from .output import print_values

if TYPE_CHECKING:
    from llm_orm import Store

Command = TypeVar("Command", bound=Callable[..., Any])


def which_chats(command: Command) -> Command:
    """--where and --chat, together as `where`; --dry-run and --yes."""
    where = where_option(
        "Of which chats: user_id=u_1, model=gpt-4o, metadata.plan=free. Repeatable: all of them hold; of several "
        "values for one name, one does."
    )
    chat = chat_option("A chat by its id; repeatable.", multiple=True)
    dry_run = click.option("--dry-run", is_flag=True, help="Count only; change nothing.")
    yes = click.option("--yes", is_flag=True, help="Do not ask first. Needed where nobody is there to be asked.")
    return where(chat(dry_run(yes(command))))


@click.command()
@which_chats
@click.option("--column", "columns", metavar="NAME", multiple=True, help="A column of yours to empty, too; repeatable.")
@database_options
@store_option
@json_option
@click.pass_context
def erase(
    context: click.Context,
    conditions: dict[str, list[Any]],
    chats: tuple[str, ...],
    dry_run: bool,
    yes: bool,
    columns: tuple[str, ...],
    as_json: bool,
    **database: Any,
) -> None:
    """Erase what was said in chats, and keep what it cost.

    Texts, thinking, files, tools' arguments and results, instructions and metadata go; tokens, costs, times, and the
    names of models and tools stay. Asks before it does so. Chats with a running turn are left alone and listed, and
    then it exits with 1.
    """
    if not (conditions or chats):
        raise click.UsageError("say which chats: --where user_id=u_1, or --chat ID")
    from llm_orm import erase as erase_chats

    with opened_with_its_columns(**database) as store:
        where = named(store, conditions, chats)
        expected = erase_chats(store, where, columns=columns, dry_run=True)
        if dry_run:
            found = expected
        else:
            confirm(yes, f"Erase for good what was said ({counted(expected.as_dict())})?")
            found = erase_chats(store, where, columns=columns)
    print_values(found.as_dict() | {"busy": [str(key) for key in found.busy]}, as_json=as_json)
    if not found.chats and not found.busy:
        click.echo("no chat is of that kind: nothing was erased", err=True)
    if found.busy:
        click.echo("chats with a running turn were left alone: erase them once it has ended", err=True)
    context.exit(1 if found.busy else 0)


def named(
    store: "Store", conditions: dict[str, list[Any]], chats: tuple[str, ...], *, key: str = "id"
) -> dict[str, Any]:
    """What `where=` is in Python; `key` is what it calls the id of a chat."""
    ids = [*conditions.get(key, ()), *(chat_named(store, each) for each in chats)]
    return conditions | ({key: ids} if ids else {})


def confirm(yes: bool, question: str) -> None:
    """Go on if somebody says so; else it ends the command."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("nobody is there to be asked: give --yes, or --dry-run to see what it would do")
    click.confirm(question, abort=True, err=True)


def counted(counts: dict[str, Any]) -> str:
    names = ("chats", "messages", "tool_calls", "requests", "attachments")
    return ", ".join(f"{name.replace('_', ' ')}: {counts[name]}" for name in names)

"""`llm-orm erase`: what was said, gone; what it cost, kept."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .application import opened, store_option
from .options import database_options, json_option
from .output import print_values

if TYPE_CHECKING:
    from llm_orm import Store

Command = TypeVar("Command", bound=Callable[..., Any])


def _conditions(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, list[Any]]:
    conditions: dict[str, list[Any]] = {}
    for given in values:
        name, equals, value = given.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{given!r} is not NAME=VALUE")
        conditions.setdefault(name, []).extend(_meant(value) if name.startswith("metadata.") else [value])
    return conditions


def _meant(value: str) -> list[Any]:
    """What a value in JSON may be: 7 is a number, or the text of one."""
    try:
        read = json.loads(value)
    except ValueError:
        return [value]
    is_plain = isinstance(read, bool | int) or (isinstance(read, float) and value not in ("NaN", "Infinity"))
    return [value, read] if is_plain else [value]


def which_chats(command: Command) -> Command:
    """--where and --chat, together as `where`; --dry-run and --yes."""
    where = click.option(
        "--where",
        "conditions",
        metavar="NAME=VALUE",
        multiple=True,
        callback=_conditions,
        help="Of which chats: user_id=u_1, model=gpt-4o, metadata.plan=free. Repeatable: all of them hold; of several "
        "values for one name, one does.",
    )
    chat = click.option("--chat", "chats", metavar="ID", multiple=True, help="A chat by its id; repeatable.")
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
    where = named(conditions, chats)
    if not where:
        raise click.UsageError("say which chats: --where user_id=u_1, or --chat ID")
    from llm_orm import erase as erase_chats

    with opened_with_its_columns(**database) as store:
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


def named(conditions: dict[str, list[Any]], chats: tuple[str, ...]) -> dict[str, Any]:
    """What `where=` is in Python."""
    ids = [*conditions.get("id", ()), *chats]
    return conditions | ({"id": ids} if ids else {})


def confirm(yes: bool, question: str) -> None:
    """Go on if somebody says so; else it ends the command."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("nobody is there to be asked: give --yes, or --dry-run to see what it would do")
    click.confirm(question, abort=True, err=True)


@contextmanager
def opened_with_its_columns(application: str | None, **database: Any) -> Iterator["Store"]:
    """The store; where --store does not name it, with the columns that the table of the chats has besides ours."""
    with opened(application, **database) as store:
        if application is not None:
            yield store
            return
        columns = _other_columns(store)
    from llm_orm import connect

    names = {"table_prefix": database["table_prefix"], "table_names": database["table_names"]}
    with connect(database["database_url"], **names, chat_fields=columns) as store:
        yield store


def _other_columns(store: "Store") -> dict[str, Any]:
    from peewee import BareField

    record: Any = store.records.chat
    with store.connection():
        found = store.database.execute_sql(f'SELECT * FROM "{record._meta.table_name}" LIMIT 0')
        names = [column[0] for column in found.description]
    ours = {field.column_name for field in record._meta.sorted_fields}
    return {
        name: BareField(null=True)
        for name in names
        if name not in ours and name.isidentifier() and not hasattr(record, name)
    }


def counted(counts: dict[str, Any]) -> str:
    names = ("chats", "messages", "tool_calls", "requests", "attachments")
    return ", ".join(f"{name.replace('_', ' ')}: {counts[name]}" for name in names)

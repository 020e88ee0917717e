"""The options that several commands share, and the store that they name."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from uuid import UUID

    from llm_orm import Store

Command = TypeVar("Command", bound=Callable[..., Any])

TABLES = ("chat", "message", "tool_call", "request", "agent_session", "attachment")

SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
LONGEST_S = 36500 * SECONDS["d"]


class Duration(click.ParamType):
    """A span of time, in seconds: "90", "90s", "15m", "2h" or "30d"."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd]?)", value.strip().lower())
        if found is None:
            self.fail(f"{value!r} is no duration: write 90, 90s, 15m, 2h or 30d", param, ctx)
        seconds = float(found[1]) * SECONDS[found[2]]
        if seconds > LONGEST_S:
            self.fail(f"{value!r} is longer than a hundred years", param, ctx)
        return seconds


DURATION = Duration()


def database_options(command: Command) -> Command:
    """--database-url, --table-prefix and --table-name, as the arguments that `open_store` takes."""
    url = click.option(
        "--database-url",
        metavar="URL",
        help="sqlite:///file.db or postgresql://user:password@host/name; default: $LLM_ORM_DATABASE_URL, else "
        "$DATABASE_URL, else sqlite:///llm_orm.db.",
    )
    return url(table_options(command))


def table_options(command: Command) -> Command:
    """--table-prefix and --table-name, as `table_prefix` and `table_names`."""
    prefix = click.option(
        "--table-prefix", metavar="PREFIX", default="", help='Put before each table\'s name: "app_" makes app_llm_chat.'
    )
    names = click.option(
        "--table-name",
        "table_names",
        metavar="NAME=TABLE",
        multiple=True,
        callback=_table_names,
        help=f"Name of one table, as in chat=assistant_chat; repeatable. NAME is one of {', '.join(TABLES)}.",
    )
    return prefix(names(command))


def json_option(command: Command) -> Command:
    """--json, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def open_store(
    database_url: str | None, table_prefix: str = "", table_names: dict[str, str] | None = None, *, create: bool = False
) -> "Store":
    """The store that the options name, to be used in a `with` block.

    create    whether an SQLite file that is not there may come into being; else it is an error
    """
    from llm_orm import connect

    store = connect(database_url, table_prefix=table_prefix, table_names=table_names, encrypt=environment_keys())
    if not create:
        _check_file_exists(store)
    return store


def environment_keys() -> list[str] | None:
    """The keys of content in $LLM_ORM_ENCRYPTION_KEYS: on a command line everybody could read them."""
    return os.environ.get("LLM_ORM_ENCRYPTION_KEYS", "").replace(",", " ").split() or None


def chat_in(store: "Store", chat_id: str | None) -> "UUID | None":
    """The id that --chat gives, of a chat that is there; None without one. Its content need not be readable."""
    from llm_orm.checks import as_key

    key = None if chat_id is None else as_key(chat_id)
    if chat_id is not None and (key is None or not store.read(store.statements.chat_exists(key))):
        raise click.ClickException(f"there is no chat {chat_id!r} in {store!r}")
    return key


def _table_names(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    names = {}
    for value in values:
        name, equals, table = value.partition("=")
        if not equals or name not in TABLES:
            raise click.BadParameter(f"{value!r} is not NAME=TABLE, with a NAME of {', '.join(TABLES)}")
        names[name] = table
    return names


def _check_file_exists(store: "Store") -> None:
    import peewee

    path = store.database.database
    # To connect would leave an empty file behind.
    if isinstance(store.database, peewee.SqliteDatabase) and path != ":memory:" and not Path(path).exists():
        raise click.ClickException(
            f'there is no database file {path!r}: name another with --database-url, or make it with "llm-orm migrate"'
        )

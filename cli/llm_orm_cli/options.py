"""The options that several commands share, and the store that they name."""

import json
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

NONE = "(none)"
"""How --where says that nothing is there, as the dashboard's addresses do: user_id=(none)."""

SHORTEST_PREFIX = 6
"""Characters of an id, less its dashes, by which a chat is looked for."""


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


def csv_option(command: Command) -> Command:
    """--csv, as `as_csv`."""
    return click.option("--csv", "as_csv", is_flag=True, help="Print CSV, for a spreadsheet.")(command)


def chat_option(help: str, *, multiple: bool = False) -> Callable[[Command], Command]:
    """--chat, as `chat_id`, or as `chats` where it may be given several times; `chat_named` finds what it says."""
    name = "chats" if multiple else "chat_id"
    help = f"{help} The beginning of its id will do, of {SHORTEST_PREFIX} characters at the least."
    return click.option("--chat", name, metavar="ID", multiple=multiple, help=help)


def where_option(help: str) -> Callable[[Command], Command]:
    """--where, as `conditions`: {"user_id": ["u_1", None, …]}."""
    help = f'{help} "user_id={NONE}": without one.'
    return click.option("--where", "conditions", metavar="NAME=VALUE", multiple=True, callback=_conditions, help=help)


def span_options(command: Command) -> Command:
    """--since, --until and --tz, as texts."""
    since = click.option(
        "--since",
        metavar="TIME",
        help='From then on: "2026-11-01", "2026-11-01T12:00:00+01:00", or so long ago: 7d, 24h.',
    )
    until = click.option("--until", metavar="TIME", help="Before then, in the same way; default: now.")
    zone = click.option(
        "--tz", default="UTC", show_default=True, metavar="ZONE", help="Of which time zone days are: Europe/Berlin."
    )
    return since(until(zone(command)))


def not_both(as_json: bool, as_csv: bool) -> None:
    if as_json and as_csv:
        raise click.UsageError("--json or --csv, not both")


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


def chat_named(store: "Store", text: str) -> "UUID":
    """The chat of an id, or of the beginning of one that no other has."""
    from uuid import UUID

    from llm_orm.checks import as_key

    record: Any = store.records.chat
    digits, length = text.replace("-", "").lower(), 32
    is_prefix = SHORTEST_PREFIX <= len(digits) < length and re.fullmatch("[0-9a-f]+", digits)
    key = as_key(text)
    if is_prefix:
        first, last = (UUID(digits + filling * (length - len(digits))) for filling in "0f")
        found = [row.id for row in store.found(record.select(record.id).where(record.id.between(first, last)).limit(3))]
        if len(found) > 1:
            shown = ", ".join(map(str, found[:2])) + (", …" if len(found) > 2 else "")
            raise click.ClickException(f"{text!r} is the beginning of more than one chat's id: {shown}")
        key = found[0] if found else None
    if key is None or not store.read(store.statements.chat_exists(key)):
        is_short = len(digits) < SHORTEST_PREFIX and re.fullmatch("[0-9a-f]+", digits)
        hint = f": give at least {SHORTEST_PREFIX} characters of its id" if is_short else ""
        raise click.ClickException(f"there is no chat {text!r} in {store!r}{hint}")
    return key


def _conditions(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, list[Any]]:
    conditions: dict[str, list[Any]] = {}
    for given in values:
        name, equals, value = given.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{given!r} is not NAME=VALUE")
        conditions.setdefault(name, []).extend(_meant(name, value))
    return conditions


def _meant(name: str, value: str) -> list[Any]:
    """What a value may stand for: in metadata, 7 is a number, or the text of one."""
    if value == NONE:
        return [None]
    if not name.startswith("metadata."):
        return [value]
    try:
        read = json.loads(value.lower() if value.lower() in ("true", "false") else value)
    except ValueError:
        return [value]
    is_plain = isinstance(read, bool | int) or (isinstance(read, float) and value not in ("NaN", "Infinity"))
    return [value, read] if is_plain else [value]


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

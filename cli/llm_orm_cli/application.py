"""--store: the store as the application makes it, with its own columns, models and table names."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .options import environment_keys, open_store

if TYPE_CHECKING:
    from llm_orm import Store

Command = TypeVar("Command", bound=Callable[..., Any])


def store_option(command: Command) -> Command:
    """--store, as the `application` argument of `opened`."""
    return click.option(
        "--store",
        "application",
        metavar="MODULE:NAME",
        help="The application's own Store, or a function that returns it, for the columns that it adds.",
    )(command)


@contextmanager
def opened(
    application: str | None,
    database_url: str | None,
    table_prefix: str,
    table_names: dict[str, str],
    *,
    create: bool = False,
) -> Iterator["Store"]:
    """The application's store where it is named, else the one that the database options name."""
    if application is None:
        with open_store(database_url, table_prefix, table_names, create=create) as store:
            yield store
    elif database_url or table_prefix or table_names:
        raise click.UsageError("--store says which database and tables: leave out the options that do")
    else:
        yield _imported(application)


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
    with connect(database["database_url"], **names, chat_fields=columns, encrypt=environment_keys()) as store:
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


def _imported(application: str) -> "Store":
    from llm_orm import Store

    module, colon, name = application.partition(":")
    if not (module and colon and name):
        raise click.BadParameter(f"{application!r} is not MODULE:NAME", param_hint="--store")
    sys.path.insert(0, os.getcwd())  # as `python -m` has it: a console script starts elsewhere
    try:
        found = getattr(importlib.import_module(module), name)
        store = found() if callable(found) else found
    except Exception as error:
        raise click.ClickException(f"--store {application}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(store, Store):
        raise click.ClickException(f"--store {application}: {store!r} is not a Store, as connect() returns")
    return store

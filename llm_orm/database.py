"""What names a database → a peewee Database with the right settings; and how it may be printed."""

import os
import re
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import peewee as pw
from playhouse.pool import PooledPostgresqlDatabase, PooledSqliteDatabase

from .errors import InvalidDatabase

DEFAULT_URL = "sqlite:///llm_orm.db"

SQLITE_PRAGMAS = {
    "busy_timeout": 30_000,  # milliseconds to wait for another writer
    "journal_mode": "wal",
    "foreign_keys": 1,
    "synchronous": "full",  # a paid reply survives a power cut
    "trusted_schema": 1,  # the triggers that keep the index of search write into a virtual table
    "secure_delete": 1,  # what is erased is not left in the file, nor are its earlier versions
}

WAL_TIMEOUT = 5.0
"""Seconds to wait for another process to make a new file of SQLite ready."""


def default_url() -> str:
    return os.environ.get("LLM_ORM_DATABASE_URL") or os.environ.get("DATABASE_URL") or DEFAULT_URL


def open_url(
    url: str, *, pool_size: int = 10, pool_timeout: float = 30.0, pragmas: Mapping[str, Any] | None = None
) -> pw.Database:
    """A pooled peewee Database for a URL; nothing is opened yet."""
    scheme = url.partition(":")[0].partition("+")[0].lower()
    if scheme in ("postgresql", "postgres"):
        _check_credentials(url)
        dsn = "postgresql:" + url.partition(":")[2]
        defaults = {"connect_timeout": 10, "application_name": "llm_orm"}
        ours = {name: value for name, value in defaults.items() if f"{name}=" not in url}
        return PooledPostgresqlDatabase(dsn, max_connections=pool_size, timeout=pool_timeout or None, **ours)
    if scheme == "sqlite":
        return _open_sqlite(url, pool_size, pool_timeout, pragmas)
    raise InvalidDatabase(
        f"{without_password(url)!r} names no database: give sqlite:///file.db or postgresql://user:password@host/name"
    )


def _check_credentials(url: str) -> None:
    # libpq would take a piece of the password for the host or the port, and say so in its error.
    credentials, _, _ = url.partition("://")[2].partition("?")[0].rpartition("@")
    if not re.fullmatch(r"([^/@%#]|%[0-9A-Fa-f]{2})*", credentials):
        raise InvalidDatabase(
            f"{without_password(url)!r}: the password has a character that means something in a URL; "
            'write it as urllib.parse.quote(password, safe="") does'
        )


def _open_sqlite(url: str, pool_size: int, pool_timeout: float, pragmas: Mapping[str, Any] | None) -> pw.Database:
    if sqlite3.sqlite_version_info < (3, 38):
        raise InvalidDatabase(f"SQLite 3.38 or newer is needed; this Python has {sqlite3.sqlite_version}")
    parts = urlsplit(url)
    path = unquote(parts.path).removeprefix("/")
    if parts.netloc:
        raise InvalidDatabase(f"{url!r} has two slashes: write sqlite:///relative.db or sqlite:////absolute.db")
    if parts.query:
        raise InvalidDatabase(f"{url!r} has options; give them as connect(…, pragmas={dict(parse_qsl(parts.query))!r})")
    in_memory = path in ("", ":memory:")
    if not in_memory and Path(path).is_dir():
        raise InvalidDatabase(f"{url!r} is a folder: name a file in it")
    if not in_memory and not Path(path).absolute().parent.is_dir():
        raise InvalidDatabase(f"{url!r}: there is no folder {str(Path(path).absolute().parent)!r}")
    return PooledSqliteDatabase(
        ":memory:" if in_memory else path,
        pragmas={**SQLITE_PRAGMAS, **(pragmas or {})},
        # A database in memory lives in one connection, which its users take turns with.
        max_connections=1 if in_memory else pool_size,
        timeout=pool_timeout or None,
        check_same_thread=False,
    )


def application_database(database: Any) -> pw.Database:
    if not isinstance(database, pw.Database):
        raise InvalidDatabase(f"{database!r} is neither a URL nor a peewee Database")
    if not isinstance(database, (pw.SqliteDatabase, pw.PostgresqlDatabase)) or hasattr(database, "aconnect"):
        raise InvalidDatabase(
            f"{type(database).__name__} is not supported: give a SqliteDatabase or a PostgresqlDatabase, pooled or not"
        )
    if isinstance(database, pw.SqliteDatabase):
        # Without it SQLite ignores the delete rules of the tables.
        database._pragmas = [*dict(database._pragmas or ()).items(), ("foreign_keys", 1)]  # type: ignore[attr-defined]
        if not database.is_closed():
            database.execute_sql("PRAGMA foreign_keys = 1")
    return database


def open_connection(database: pw.Database) -> None:
    # Where several open a new file of SQLite at once, one switches it to WAL, and SQLite does not let the others wait.
    deadline = time.monotonic() + WAL_TIMEOUT
    while True:
        try:
            database.connect()
            return
        except pw.OperationalError as error:
            if "database is locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def is_lost_when_closed(database: pw.Database) -> bool:
    return (
        isinstance(database, pw.SqliteDatabase)
        and database.database in ("", ":memory:")
        and not isinstance(database, PooledSqliteDatabase)
    )


def described(database: pw.Database) -> str:
    """The database as it may be printed: without its password."""
    if isinstance(database, pw.SqliteDatabase):
        return f"sqlite:///{database.database}"
    name = str(database.database)
    return without_password(name) if "://" in name or "=" in name else f"postgresql database {name!r}"


def hide_password(error: BaseException) -> None:
    """Take it out of the texts of an error, and of what led to it: libpq repeats an address that it cannot read."""
    for one in (error, error.__cause__, error.__context__):
        if one is not None:
            one.args = tuple(without_password(part) if isinstance(part, str) else part for part in one.args)


def without_password(text: str) -> str:
    text = re.sub(r"(://[^:/@\s]*):.*@", r"\1:***@", text)
    return re.sub(r"(password=)('[^']*'|[^&\s]*)", r"\1***", text)

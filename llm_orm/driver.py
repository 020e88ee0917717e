"""What a database driver's error means: which of ours it is, and whether it is likely to pass."""

import re
from typing import Any

import peewee as pw
from playhouse.pool import MaxConnectionsExceeded

from .database import described, hide_password, without_password
from .errors import DatabaseUnavailable, InvalidDatabase, InvalidValue, LlmOrmError, TablesMissing


def translated(error: Exception, database: pw.Database) -> LlmOrmError | None:
    """Our error for one of the driver's, or None where it is the statement's own: a constraint, a wrong type."""
    text = without_password(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
    if isinstance(error, MaxConnectionsExceeded):
        return DatabaseUnavailable(
            f"no connection of {described(database)} became free: all {database._max_connections} are in "  # type: ignore[attr-defined]
            "use; give connect(…, pool_size=, pool_timeout=) more, or close connections that you opened"
        )
    if isinstance(error, (pw.OperationalError, pw.ProgrammingError)) and _is_missing(error, text):
        return TablesMissing(f'{described(database)}: {text}; run "llm-orm migrate" or store.create_tables()')
    if _UNSTORABLE.search(text):
        return InvalidValue(f"a value cannot be stored in {described(database)}: {text}")
    of_databases = (pw.OperationalError, pw.InterfaceError, pw.InternalError)  # the last: it is read-only
    if isinstance(error, of_databases) or is_lost(error):
        return DatabaseUnavailable(f"{described(database)} did not answer: {text}")
    if _NO_DATABASE.search(text):
        hide_password(error)
        return InvalidDatabase(f"{described(database)} cannot be opened: {text}")
    return None


_MISSING = re.compile(r"no such (table|column)|has no column named")
_MISSING_CODES = ("42P01", "42703", "3F000")
"""PostgreSQL's for a table, a column, a schema; its texts are in the language of the server."""

_UNSTORABLE = re.compile(r"can't adapt type|[Ee]rror binding parameter")
_NO_DATABASE = re.compile(r"file is not a database|^invalid dsn")


_PASSING_CODES = ("40001", "40P01", "57P01", "57P02", "57P03")
"""PostgreSQL's for a serialization failure, a deadlock, and a server that shuts down, has crashed or is starting."""


def may_pass(error: Exception) -> bool:
    """Whether what went wrong is likely to pass: the server took the transaction back, or the connection was lost."""
    if is_lost(error):
        return True
    original = _original(error)
    if not isinstance(error, (pw.OperationalError, pw.InterfaceError)) or not hasattr(original, "pgcode"):
        return False  # SQLite has waited for others already
    return original.pgcode is None or original.pgcode in _PASSING_CODES


def is_lost(error: Exception) -> bool:
    """Whether psycopg2 says of a connection that it broke by nothing but a plain DatabaseError, as it does at times."""
    return type(error) is pw.DatabaseError and getattr(_original(error), "pgcode", "") is None


def _original(error: Exception) -> Any:
    return getattr(error, "orig", None) or error.__cause__ or error.__context__


def _is_missing(error: pw.PeeweeException, text: str) -> bool:
    code = getattr(getattr(error, "orig", None), "pgcode", None)
    return code in _MISSING_CODES or bool(_MISSING.search(text))

"""connect(url) → Store: a database with the right settings, and the records in it.

The only file that talks to the database driver: connections are borrowed and given back here, and the driver's errors
become ours here.
"""

import asyncio
import contextvars
import functools
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import peewee as pw
from playhouse.pool import MaxConnectionsExceeded

from .database import (
    application_database,
    default_url,
    described,
    is_lost_when_closed,
    open_connection,
    open_url,
    without_password,
)
from .errors import (
    DatabaseUnavailable,
    InsideTransaction,
    InvalidDatabase,
    InvalidValue,
    LlmOrmError,
    StoreClosed,
    TablesMissing,
    UnknownKeyword,
)
from .heart import Heart
from .middleware import check_middleware
from .records import BASES, Record, Records, default_table_names, records_for
from .statements import Sql, Statements
from .values import as_uuid

T = TypeVar("T")


class Store:
    """A database, its records, and what is shared by the chats in it.

    database    the peewee Database; yours to query with
    records     the record classes tied to it: .chat, .message, .tool_call, .request, .agent_session, .attachment
    llm         what chats call models with, unless they say otherwise; None for litellm
    middlewares what is put around every call of its chats, before their own
    """

    def __init__(
        self,
        database: pw.Database,
        records: Records,
        *,
        llm: Any = None,
        middlewares: Iterable[Any] = (),
        threads: int = 10,
        is_ours: bool = False,
    ):
        self.database = database
        self.records = records
        self.llm = llm
        self.middlewares = tuple(map(check_middleware, middlewares))
        self.statements = Statements(records, database)
        self.heart = Heart(self._beat, self._cancelled)
        self.is_sqlite = isinstance(database, pw.SqliteDatabase)
        self._is_closed = False
        self._is_ours = is_ours
        self._threads = threads
        self._executor: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._users = _Users()

    def __repr__(self) -> str:
        return f"<Store {described(self.database)}>"

    def use(self, *middlewares: Any) -> "Store":
        """Put middlewares around the turns of every chat of this store, from their next turn on."""
        self.middlewares = (*self.middlewares, *map(check_middleware, middlewares))
        return self

    # The shape of the database

    def create_tables(self) -> None:
        """Create the tables that are not there yet. For small apps and tests; production runs "llm-orm migrate"."""
        with self.connection(), self.database.atomic():
            self.database.create_tables(list(self.records))

    def drop_tables(self) -> None:
        """Drop the tables with everything in them."""
        with self.connection(), self.database.atomic():
            self.database.drop_tables(list(self.records))

    @property
    def chat_columns(self) -> list[str]:
        """The names of the application's own columns of the chat."""
        return [name for name in self.records.chat._meta.fields if name not in BASES["chat"]._meta.fields]  # type: ignore[attr-defined]

    # Connections and transactions

    @contextmanager
    def connection(self) -> Iterator[None]:
        """An open connection for the block: the caller's own where this thread has one, else one given back after.

        Raises `DatabaseUnavailable`, `TablesMissing`, `InvalidDatabase`, `StoreClosed`.
        """
        if self._is_closed:
            raise StoreClosed(f"{self!r} was closed: connect() again")
        if self._process != os.getpid():
            self._begin_anew()
        database = self.database
        opened = database.is_closed()
        if opened and is_lost_when_closed(database):
            raise InvalidDatabase(
                "a SqliteDatabase in memory is there only for the thread that opened it, and as long as it is open: "
                'use connect("sqlite:///:memory:"), whose .database all threads may use'
            )
        is_open = not opened
        try:
            with self._users.one():
                try:
                    if opened:
                        open_connection(database)
                        is_open = True
                    yield
                finally:
                    if opened:
                        database.close()
        except (pw.PeeweeException, MaxConnectionsExceeded) as error:
            ours = self._translated(error)
            if ours is None:
                raise
            if isinstance(ours, DatabaseUnavailable):
                ours.nothing_was_sent = not is_open
            raise ours from error

    def transact(self, *statements: Sql) -> list[tuple]:
        """Run the statements as one transaction and return the rows of the last.

        On PostgreSQL they travel together, in one round trip, which the server runs as one transaction.
        """
        with self.connection():
            if not self.is_sqlite:
                text = ";\n".join(statement.text for statement in statements)
                return self._execute(text, [p for statement in statements for p in statement.params])
            if self.database.in_transaction():
                return self._execute_each(statements)
            # SQLite refuses to upgrade a read into a write, so a transaction takes the lock when it begins.
            self._execute("BEGIN IMMEDIATE", ())
            try:
                rows = self._execute_each(statements)
                self._execute("COMMIT", ())
            except BaseException:
                self._rollback_sqlite()
                raise
            return rows

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction for the block, on a connection as of `connection()`; in one of the caller's, a part of it."""
        # SQLite refuses to upgrade a read into a write, so a transaction takes the lock when it begins.
        with self.connection(), self.database.atomic("IMMEDIATE") if self.is_sqlite else self.database.atomic():
            yield

    def read(self, statement: Sql) -> list[tuple]:
        """Run one query, in no transaction of its own."""
        with self.connection():
            return self._execute(statement.text, statement.params)

    def _execute(self, text: str, params: Any) -> list[tuple]:
        cursor = self.database.execute_sql(text, params)
        try:
            return cursor.fetchall() if cursor.description else []
        finally:
            cursor.close()  # one left open by Ctrl-C would be in the way of the next COMMIT

    def _execute_each(self, statements: tuple[Sql, ...]) -> list[tuple]:
        rows: list[tuple] = []
        for statement in statements:
            rows = self._execute(statement.text, statement.params)
        return rows

    def _rollback_sqlite(self) -> None:
        # SQLite has rolled back by itself after some errors, and then knows of no transaction.
        if self.database.connection().in_transaction:
            self._execute("ROLLBACK", ())

    def check_outside_transaction(self) -> None:
        """Raise `InsideTransaction` where this thread has a transaction open: a turn's rows must outlive it."""
        if self.database.in_transaction():
            raise InsideTransaction(
                "ask() was called inside a transaction of yours; call it outside of `with database.atomic()`, and of "
                "peewee's `with database:`, which opens one too (`with database.connection_context():` does not): "
                "the rows of a turn must survive a rollback, and no transaction may be open while a model is waited for"
            )

    # asyncio

    async def off_the_loop(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run database code on a thread of the store's own, to its end even if the caller is cancelled."""
        if self._process != os.getpid():
            self._begin_anew()
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self._threads, thread_name_prefix="llm_orm")
        run = functools.partial(contextvars.copy_context().run, function, *arguments)
        work: asyncio.Future[T] = asyncio.get_running_loop().run_in_executor(self._executor, run)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            while not work.done():
                try:
                    await asyncio.wait([work])
                except asyncio.CancelledError:
                    continue  # told twice: still to its end
            raise

    # The end

    def close(self) -> None:
        """Close the store for good, and every connection, unless they are those of a Database that you gave.

        What another thread is doing in the database at this moment is waited for.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self.heart.stop()
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None  # a turn in progress still has to end, and to say why it cannot be written
        if self._is_ours:
            self._users.wait_for_others()
            self.database.close_all()  # type: ignore[attr-defined]

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _begin_anew(self) -> None:
        """In a forked process: the threads are gone, and the connections are the parent's to use and to close."""
        self._process, self._executor, self._users = os.getpid(), None, _Users()
        database: Any = self.database
        if self._is_ours and database.database != ":memory:":
            _connections_of_parents.append((database._connections, database._in_use))
            database.dispose()

    def _beat(self, message_ids: list[Any]) -> None:
        self.transact(self.statements.beat(message_ids))

    def _cancelled(self, message_ids: list[Any]) -> list[Any]:
        return [as_uuid(row[0]) for row in self.read(self.statements.cancelled(message_ids))]

    def _translated(self, error: Exception) -> LlmOrmError | None:
        text = without_password(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        if isinstance(error, MaxConnectionsExceeded):
            return DatabaseUnavailable(
                f"no connection of {described(self.database)} became free: all {self.database._max_connections} are in "  # type: ignore[attr-defined]
                "use; give connect(…, pool_size=, pool_timeout=) more, or close connections that you opened"
            )
        if isinstance(error, (pw.OperationalError, pw.ProgrammingError)) and _is_missing(error, text):
            return TablesMissing(f'{described(self.database)}: {text}; run "llm-orm migrate" or store.create_tables()')
        if _UNSTORABLE.search(text):
            return InvalidValue(f"a value cannot be stored in {described(self.database)}: {text}")
        if isinstance(error, (pw.OperationalError, pw.InterfaceError)):
            return DatabaseUnavailable(f"{described(self.database)} did not answer: {text}")
        if _NO_DATABASE.search(text):
            return InvalidDatabase(f"{described(self.database)} cannot be opened: {text}")
        return None


LONGEST_USE_S = 30.0
"""How long a store that is being closed waits for a statement of another thread."""


class _Users:
    """The threads that are using connections of a store: to close one under a statement ends the process."""

    def __init__(self) -> None:
        self._uses: Counter[int] = Counter()
        self._changed = threading.Condition()

    @contextmanager
    def one(self) -> Iterator[None]:
        thread = threading.get_ident()
        with self._changed:
            self._uses[thread] += 1
        try:
            yield
        finally:
            with self._changed:
                self._uses[thread] -= 1
                if not self._uses[thread]:
                    del self._uses[thread]
                    self._changed.notify_all()

    def wait_for_others(self) -> None:
        thread = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: set(self._uses) <= {thread}, timeout=LONGEST_USE_S)


_connections_of_parents: list[Any] = []
"""Kept, for what nothing refers to is closed."""

_MISSING = re.compile(r"no such (table|column)|has no column named")
_MISSING_CODES = ("42P01", "42703", "3F000")
"""PostgreSQL's for a table, a column, a schema; its texts are in the language of the server."""

_UNSTORABLE = re.compile(r"can't adapt type|[Ee]rror binding parameter")
_NO_DATABASE = re.compile(r"file is not a database|^invalid dsn")


def _is_missing(error: pw.PeeweeException, text: str) -> bool:
    code = getattr(getattr(error, "orig", None), "pgcode", None)
    return code in _MISSING_CODES or bool(_MISSING.search(text))


def connect(
    database: "str | pw.Database | Store | None" = None,
    *,
    table_prefix: str = "",
    table_names: Mapping[str, str] | None = None,
    chat_fields: Mapping[str, pw.Field] | None = None,
    models: Mapping[str, type[Record]] | list[type[Record]] | None = None,
    llm: Any = None,
    middlewares: Iterable[Any] = (),
    pool_size: int = 10,
    pool_timeout: float = 30.0,
    pragmas: Mapping[str, Any] | None = None,
) -> Store:
    """A store in the database that is named.

    database       "sqlite:///relative.db", "sqlite:////absolute.db", "sqlite:///:memory:", any libpq URL
                   ("postgresql://user:pw@host/db", a Unix socket in ?host=), a peewee Database; or None for
                   $LLM_ORM_DATABASE_URL, else $DATABASE_URL, else sqlite:///llm_orm.db
    table_prefix   put before each table's name: "app_" makes "app_llm_chat"
    table_names    names of single tables: {"chat": "assistant_chat", "message": …, "tool_call": …, "request": …,
                   "agent_session": …, "attachment": …}
    chat_fields    the application's own columns of the chat: {"user_id": TextField(null=True, index=True)}
    models         the application's own subclasses of the records, as `llm-orm init --models` writes them
    llm            what to call models with: anything with completion() and acompletion(); default litellm
    middlewares    what is put around every call of its chats: `Middleware` objects
    pool_size      connections at the most
    pool_timeout   seconds to wait for one of them; 0: not at all
    pragmas        of SQLite, over ours: {"synchronous": "normal"}

    Nothing is opened yet: a database that cannot be reached is reported by the first call that needs it, as
    `DatabaseUnavailable`. Raises `InvalidDatabase` for what is not a database, `InvalidValue` for a bad table name.
    """
    if isinstance(database, Store):
        return database
    if not isinstance(pool_size, int) or pool_size < 1:
        raise InvalidValue(f"pool_size={pool_size!r}: pool_size must be 1 or more connections")
    if not isinstance(pool_timeout, int | float) or pool_timeout < 0:
        raise InvalidValue(f"pool_timeout={pool_timeout!r}: pool_timeout must be seconds")
    if llm is not None and not callable(getattr(llm, "completion", None)):
        raise InvalidValue(f"llm={llm!r}: llm must have completion() and acompletion(), as LLM(…) and litellm do")
    _check_chat_fields(chat_fields)
    bases = _models_by_name(models)
    names = _table_names(table_prefix, table_names, bases)
    if database is None:
        database = default_url()
    is_ours = isinstance(database, str)
    if isinstance(database, str):
        opened = open_url(database, pool_size=pool_size, pool_timeout=pool_timeout, pragmas=pragmas)
    else:
        opened = application_database(database)
    records = records_for(opened, names, chat_fields, bases)
    return Store(opened, records, llm=llm, middlewares=middlewares, threads=pool_size, is_ours=is_ours)


_stores: dict[str | pw.Database, Store] = {}
_stores_lock = threading.Lock()


def as_store(store: Store | pw.Database | str | None) -> Store:
    """The store itself, or the one of a URL or a peewee Database: always the same, so that its pool is shared."""
    if isinstance(store, Store):
        return store
    named = default_url() if store is None else store
    if not isinstance(named, str | pw.Database):
        raise InvalidDatabase(f"{store!r} is neither a Store, a peewee Database nor a URL")
    with _stores_lock:
        if named not in _stores or _stores[named]._is_closed:
            _stores[named] = connect(named)
        return _stores[named]


def _check_chat_fields(fields: Any) -> None:
    if not isinstance(fields, Mapping | None):
        raise InvalidValue(f'chat_fields={fields!r}: chat_fields must be like {{"user_id": TextField(null=True)}}')
    for name, field in (fields or {}).items():
        if not isinstance(field, pw.Field):
            raise InvalidValue(f"chat_fields has {name!r}: {field!r}, which is not a field: write TextField(null=True)")
        if not isinstance(name, str) or not name.isidentifier() or hasattr(BASES["chat"], name):
            raise InvalidValue(f"chat_fields has {name!r}, which cannot be a column of yours: choose another name")


def _models_by_name(models: Mapping[str, type[Record]] | list[type[Record]] | None) -> dict[str, type[Record]]:
    if models is None:
        return {}
    by_name = {}
    for model in models.values() if isinstance(models, Mapping) else models:
        name = next((name for name, base in BASES.items() if isinstance(model, type) and issubclass(model, base)), None)
        if name is None:
            raise InvalidValue(f"models: {model!r} is not a subclass of a record of llm_orm.records")
        by_name[name] = model
        if name != "chat":
            _check_columns_need_no_value(model, BASES[name])
    return by_name


def _check_columns_need_no_value(model: type[Record], base: type[Record]) -> None:
    # Rows of the chat are given the application's columns by create_chat(); the others are written by a turn.
    for field in model._meta.sorted_fields:  # type: ignore[attr-defined]
        texts = [str(getattr(constraint, "sql", "")).upper() for constraint in field.constraints or ()]
        if field.name not in base._meta.fields and not field.null and not any("DEFAULT " in text for text in texts):  # type: ignore[attr-defined]
            raise InvalidValue(
                f'models: {model.__name__}.{field.name} must be null=True or have constraints=[SQL("DEFAULT …")]: '
                "a turn writes the rows of this table, and has no value for it"
            )


_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,37}")  # PostgreSQL cuts names at 63, and ours get endings


def _table_names(prefix: str, names: Mapping[str, str] | None, bases: Mapping[str, type[Record]]) -> dict[str, str]:
    unknown = set(names or ()) - set(BASES)
    if unknown:
        raise UnknownKeyword(f"table_names has {sorted(unknown)!r}; it takes {', '.join(BASES)}")
    own = {name: base._meta.table_name for name, base in bases.items()}  # type: ignore[attr-defined]
    chosen = {**default_table_names(prefix), **own, **(names or {})}
    for name, table in chosen.items():
        if not isinstance(table, str) or not isinstance(prefix, str) or not _IDENTIFIER.fullmatch(table):
            raise InvalidValue(
                f"{table!r} cannot be the name of the {name} table: use letters, digits and underscores, 38 at most"
            )
    if len(set(chosen.values())) < len(chosen):
        raise InvalidValue(f"two tables have one name: {chosen}")
    return chosen

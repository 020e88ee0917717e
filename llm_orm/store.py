"""connect(url) → Store: a database with the right settings, and the records in it.

The only file that talks to the database driver: connections are borrowed and given back here, and what is likely to
pass is waited for here. What the driver's errors mean is in `driver.py`.
"""

import asyncio
import contextvars
import functools
import logging
import math
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import peewee as pw
from playhouse.pool import MaxConnectionsExceeded

from .budgets import Budget, check_against, check_budgets
from .database import (
    application_database,
    default_url,
    described,
    is_lost_when_closed,
    open_connection,
    open_url,
)
from .driver import may_pass, translated
from .encryption import Cipher, Keys
from .errors import (
    DatabaseUnavailable,
    InsideTransaction,
    InvalidDatabase,
    InvalidValue,
    StoreClosed,
    TablesMissing,
    UnknownKeyword,
    WrongSetup,
)
from .heart import Heart
from .middleware import check_middleware
from .records import BASES, Record, Records, default_table_names, records_for
from .rotation import Rotated, rotate
from .statements import Sql, Statements
from .values import as_uuid
from .views import create_objects, drop_objects

T = TypeVar("T")

log = logging.getLogger("llm_orm")


class Store:
    """A database, its records, and what is shared by the chats in it.

    database    the peewee Database; yours to query with
    records     the record classes tied to it: .chat, .message, .tool_call, .request, .agent_session, .attachment
    llm         what chats call models with, unless they say otherwise; None for litellm
    middlewares what is put around every call of its chats, before their own
    budgets     what all its chats may spend, or each of them
    """

    def __init__(
        self,
        database: pw.Database,
        records: Records,
        *,
        llm: Any = None,
        middlewares: Iterable[Any] = (),
        budgets: Iterable[Budget] = (),
        threads: int = 10,
        is_ours: bool = False,
    ):
        self.database = database
        self.records = records
        self.llm = llm
        self.middlewares = tuple(map(check_middleware, middlewares))
        self.budgets = check_budgets(budgets)
        check_against(records.chat, self.budgets)
        self.statements = Statements(records, database)
        self.heart = Heart(self._beat, self._cancelled)
        self.is_sqlite = isinstance(database, pw.SqliteDatabase)
        self._is_closed = False
        self._is_ours = is_ours
        self._owed: deque[Sql] = deque()
        self._was_reached = False
        self._waited_until = -math.inf
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
        """Create the tables that are not there yet, and what is made of them: views, and what search looks into.

        For small apps and tests; production runs "llm-orm migrate".
        """
        with self.connection(), self.database.atomic():
            self.database.create_tables(list(self.records))
            create_objects(self.database, self.records.table_names)

    def drop_tables(self) -> None:
        """Drop the tables with everything in them."""
        with self.connection(), self.database.atomic():
            drop_objects(self.database, self.records.table_names)
            self.database.drop_tables(list(self.records))

    def has_table(self, record: type[Record]) -> bool:
        """Whether the table of a record exists: with persistence={…: False} an application may do without some."""
        name = record._meta.table_name  # type: ignore[attr-defined]
        if self.is_sqlite:
            return bool(self.read(Sql("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (name,))))
        return self.read(Sql("SELECT to_regclass(%s)", (f'"{name}"',)))[0][0] is not None

    @property
    def chat_columns(self) -> list[str]:
        """The names of the application's own columns of the chat."""
        return [name for name in self.records.chat._meta.fields if name not in BASES["chat"]._meta.fields]  # type: ignore[attr-defined]

    # Content at rest

    def rotate_keys(self, *, check: bool = False, decrypt: bool = False) -> list[Rotated]:
        """Encrypt all content anew with the first key of `connect(…, encrypt=[KEY, OLDER])`: what an older one
        encrypted, and what is clear. What was found, by table.

        check      change nothing; what would be changed, and what cannot be read
        decrypt    make all content clear in its place

        Turns may run meanwhile, and a rotation that was broken off is begun again. Raises `WrongSetup` without keys.
        """
        if not (check or self.is_encrypted):
            raise WrongSetup("rotate_keys() needs the keys of the content: connect(…, encrypt=[KEY, OLDER])")
        return rotate(self, check=check, decrypt=decrypt)

    @property
    def is_encrypted(self) -> bool:
        """Whether the content that it writes is."""
        return self.records.message.content.cipher.is_on

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
                    self._was_reached = self._was_reached or is_open
                    yield
                except BaseException as error:
                    if opened and not isinstance(error, Exception):
                        self._close_for_good()
                    raise
                finally:
                    if opened:
                        database.close()
        except (pw.PeeweeException, MaxConnectionsExceeded) as error:
            ours = translated(error, self.database)
            if ours is None:
                raise
            if isinstance(ours, DatabaseUnavailable):
                ours.nothing_was_sent = not is_open
                # Where it was never reached, it is more likely that its name is wrong.
                ours.may_pass = may_pass(error) and (is_open or self._was_reached)
            raise ours from error

    def _close_for_good(self) -> None:
        # A signal may have left a cursor open, and as long as its traceback lives no COMMIT of SQLite's succeeds there.
        database: Any = self.database
        if hasattr(database, "manual_close") and database.database != ":memory:":
            database.manual_close()

    def transact(self, *statements: Sql) -> list[tuple]:
        """Run the statements as one transaction and return the rows of the last.

        On PostgreSQL they travel together, in one round trip, which the server runs as one transaction. Where the
        server takes them back for another's sake, or the connection is lost, they are run once more: they must allow
        for having been run already, as an insert of a row whose id is there does by changing nothing.
        """
        return self.patiently(lambda: self._transact(statements))

    def _transact(self, statements: tuple[Sql, ...]) -> list[tuple]:
        with self.connection():
            if not self.is_sqlite:
                text = ";\n".join(statement.text for statement in statements)
                return self._clear(statements, self._execute(text, [p for each in statements for p in each.params]))
            if self.database.in_transaction():
                return self._clear(statements, self._execute_each(statements))
            try:
                self._begin_sqlite()
                rows = self._execute_each(statements)
                self._execute("COMMIT", ())
            except BaseException:
                self._rollback_sqlite()
                raise
            return self._clear(statements, rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction for the block, on a connection as of `connection()`; in one of the caller's, a part of it."""
        # SQLite refuses to upgrade a read into a write, so a transaction takes the lock when it begins.
        with self.connection(), self.database.atomic("IMMEDIATE") if self.is_sqlite else self.database.atomic():
            yield

    def read(self, statement: Sql) -> list[tuple]:
        """Run one query, in no transaction of its own; once more where the connection is lost."""
        return self.patiently(lambda: self._read(statement))

    def _read(self, statement: Sql) -> list[tuple]:
        with self.connection():
            return self._clear((statement,), self._execute(statement.text, statement.params))

    def owe(self, row: Sql) -> None:
        """Keep a row that the database was not there to take, for as long as the process lives; it is tried again
        before the next turn."""
        self._owed.append(row)

    def pay(self) -> None:
        """Write what is owed, as far as the database is there."""
        while self._owed:
            row = self._owed.popleft()
            try:
                self.transact(row)
            except (DatabaseUnavailable, TablesMissing):
                self._owed.appendleft(row)
                return
            except Exception as problem:
                log.error("a request row could not be written, and is given up: %s", problem)

    def found(self, query: Any) -> list[Any]:
        """What a query of peewee's finds; asked once more where the connection is lost."""

        def find() -> list[Any]:
            with self.connection():
                return list(query.clone())

        return self.patiently(find)

    def patiently(self, work: Callable[[], T]) -> T:
        """Do a piece of work with the database that may be done twice; again, for a second or two, where what keeps it
        from being done is likely to pass."""
        is_fresh = time.monotonic() > self._waited_until + REST_S
        for pause in PAUSES_S if is_fresh else PAUSES_S[:1]:
            try:
                return work()
            except DatabaseUnavailable as error:
                # On a connection of the caller's own, it is for the caller to connect or to begin again.
                if not error.may_pass or not self.database.is_closed():
                    raise
                log.warning("%s; trying again in %g s", error, pause)
            self._drop_idle_connections()
            time.sleep(pause)
            self._waited_until = time.monotonic() if pause == PAUSES_S[-1] else self._waited_until
        return work()

    def _drop_idle_connections(self) -> None:
        """What is in the pool was most likely lost together with the one that was."""
        if self._is_ours:
            self.database.close_idle()  # type: ignore[attr-defined]

    def _clear(self, statements: tuple[Sql, ...], rows: list[tuple]) -> list[tuple]:
        """The rows of the last statement, with their content as it was said."""
        opened = statements[-1].opened
        return rows if opened is None else opened(rows)

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

    def _begin_sqlite(self) -> None:
        # SQLite refuses to upgrade a read into a write, so a transaction takes the lock when it begins. Who has waited
        # for it a while looks only ten times a second, and is overtaken for ever by those who have just come: so it is
        # told to wait for a moment, time and again.
        connection = self.database.connection()
        patience_ms = connection.execute("PRAGMA busy_timeout").fetchone()[0]
        deadline = time.monotonic() + patience_ms / 1000
        connection.execute(f"PRAGMA busy_timeout = {min(patience_ms, LOCK_LOOK_MS)}")
        try:
            while True:
                try:
                    self._execute("BEGIN IMMEDIATE", ())
                    return
                except pw.OperationalError as error:
                    if "database is locked" not in str(error) or time.monotonic() >= deadline:
                        raise
        finally:
            connection.execute(f"PRAGMA busy_timeout = {patience_ms}")

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
            # The old ones may be held for ever, by a thread of the parent's that was connecting at that moment.
            database._lock, database._pool_lock = threading.Lock(), threading.RLock()
            database._pool_available = threading.Condition(database._pool_lock)
            database.dispose()

    def _beat(self, message_ids: list[Any]) -> None:
        self.transact(self.statements.beat(message_ids))

    def _cancelled(self, message_ids: list[Any]) -> list[Any]:
        return [as_uuid(row[0]) for row in self.read(self.statements.cancelled(message_ids))]


PAUSES_S = (0.0, 0.1, 0.4, 1.0)
"""How long is waited for a database that is not there before it is tried again, one time after the other."""

REST_S = 10.0
"""For how long after that it is not waited for again."""

LOCK_LOOK_MS = 20
"""For how long SQLite waits for its lock by itself, looking less and less often."""

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


def connect(
    database: "str | pw.Database | Store | None" = None,
    *,
    table_prefix: str = "",
    table_names: Mapping[str, str] | None = None,
    chat_fields: Mapping[str, pw.Field] | None = None,
    models: Mapping[str, type[Record]] | list[type[Record]] | None = None,
    llm: Any = None,
    middlewares: Iterable[Any] = (),
    budgets: Iterable[Budget] = (),
    pool_size: int = 10,
    pool_timeout: float = 30.0,
    pragmas: Mapping[str, Any] | None = None,
    encrypt: Keys | None = None,
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
    budgets        what may be spent: `Budget` objects
    pool_size      connections at the most
    pool_timeout   seconds to wait for one of them; 0: not at all
    pragmas        of SQLite, over ours: {"synchronous": "normal"}
    encrypt        a key of Fernet, which encrypts all content, or a list of keys: the first encrypts, and each decrypts

    Nothing is opened yet: a database that cannot be reached is reported by the first call that needs it, as
    `DatabaseUnavailable`. Raises `InvalidDatabase` for what is not a database, `InvalidValue` for a bad table name.
    """
    if isinstance(database, Store):
        return database
    if not isinstance(pool_size, int) or pool_size < 1:
        raise InvalidValue(f"pool_size={pool_size!r}: pool_size must be 1 or more connections")
    if not isinstance(pool_timeout, int | float) or pool_timeout < 0:
        raise InvalidValue(f"pool_timeout={pool_timeout!r}: pool_timeout must be seconds")
    cipher = Cipher(encrypt)
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
    records = records_for(opened, names, chat_fields, bases, cipher)
    return Store(opened, records, llm=llm, middlewares=middlewares, budgets=budgets, threads=pool_size, is_ours=is_ours)


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

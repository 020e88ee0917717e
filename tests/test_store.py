"""connect(): what names a database, pools, names of tables, columns of the application, threads and asyncio."""

import asyncio
import gc
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peewee as pw
import pytest
from conftest import Ask, rows
from playhouse.pool import PooledPostgresqlDatabase, PooledSqliteDatabase

from llm_orm import (
    Chat,
    DatabaseUnavailable,
    InvalidDatabase,
    InvalidValue,
    LlmChat,
    LlmMessage,
    LlmToolCall,
    Store,
    StoreClosed,
    UnknownKeyword,
    acreate_chat,
    aload_chat,
    connect,
    create_chat,
    load_chat,
)
from llm_orm.store import as_store
from llm_orm.testing import Call, ScriptedLLM


def echo(text: str) -> str:
    """Say it again."""
    return text


def a_chat(store: Any, *script: Any, **keywords: Any) -> Chat:
    return create_chat(store, model="test", llm=ScriptedLLM(*script or ["Hello!"]), **keywords)


def loaded(store: Store, chat_id: Any, **keywords: Any) -> Chat:
    chat = load_chat(store, chat_id, **keywords)
    assert chat is not None
    return chat


@pytest.fixture
def plain(database_url: str) -> Iterator[Store]:
    """A store with its tables and no column of an application."""
    with connect(database_url) as store:
        store.create_tables()
        yield store


def works(store: Store) -> bool:
    store.create_tables()
    chat = a_chat(store)
    return chat.ask("Hi").content == "Hello!" and len(loaded(store, chat.id).messages()) == 2


# What names a database


def test_a_sqlite_url_with_three_slashes_is_relative_to_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with connect("sqlite:///chats.db") as store:
        assert works(store)
    assert (tmp_path / "chats.db").is_file()


def test_a_sqlite_url_with_four_slashes_is_absolute(tmp_path: Path) -> None:
    with connect(f"sqlite:///{tmp_path}/with%20space.db") as store:
        assert works(store)
    assert (tmp_path / "with space.db").is_file()


@pytest.mark.parametrize("url", ["sqlite:///:memory:", "sqlite://", "sqlite:///"])
def test_a_database_in_memory_lives_as_long_as_its_store(url: str) -> None:
    with connect(url) as store:
        assert works(store)
        assert len(rows(store, "chat", "id")) == 1
    with connect(url) as another:
        another.create_tables()
        assert rows(another, "chat", "id") == []


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg2", "POSTGRESQL"])
def test_every_way_to_write_a_postgresql_url_works(postgres_url: str, scheme: str) -> None:
    with connect(scheme + postgres_url.removeprefix("postgresql")) as store:
        assert works(store)


def test_a_postgresql_url_may_name_its_application(postgres_url: str) -> None:
    for url, name in [(postgres_url, "llm_orm"), (postgres_url + "&application_name=shop", "shop")]:
        with connect(url) as store, store.connection():
            assert store.database.execute_sql("SHOW application_name").fetchone() == (name,)


def test_without_an_argument_the_environment_names_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(connect().database.database) == "llm_orm.db"
    monkeypatch.setenv("DATABASE_URL", "sqlite:///general.db")
    assert str(connect().database.database) == "general.db"
    monkeypatch.setenv("LLM_ORM_DATABASE_URL", "sqlite:///ours.db")
    assert str(connect().database.database) == "ours.db"
    as_store(None).create_tables()
    a_chat(None)
    assert len(rows(connect("sqlite:///ours.db"), "chat", "id")) == 1
    as_store(None).close()


def test_a_database_of_peewee_can_be_given(database_url: str, tmp_path: Path) -> None:
    if database_url.startswith("sqlite"):
        databases: list[Any] = [
            pw.SqliteDatabase(tmp_path / "plain.db"),
            PooledSqliteDatabase(tmp_path / "pooled.db", check_same_thread=False),
        ]
    else:
        databases = [pw.PostgresqlDatabase(database_url), PooledPostgresqlDatabase(database_url, max_connections=2)]
    for database in databases:
        with connect(database) as store:
            assert store.database is database
            assert works(store)


def test_the_first_argument_may_be_a_store_a_url_or_a_database(plain: Store, database_url: str) -> None:
    one = a_chat(plain)
    other = a_chat(database_url)
    third = a_chat(plain.database)
    assert {chat_id for (chat_id,) in rows(plain, "chat", "id")} == {one.id, other.id, third.id}
    assert loaded(plain, third.id).id == third.id
    assert load_chat(database_url, one.id) is not None
    assert load_chat(plain.database, other.id) is not None
    assert load_chat(store=plain, chat_id=str(one.id)) is not None
    other.store.close()


def test_a_url_and_a_database_have_one_store_each_until_it_is_closed(plain: Store, database_url: str) -> None:
    for named in (database_url, plain.database):
        store = as_store(named)
        assert as_store(named) is store
        store.close()
        assert as_store(named) is not store
        as_store(named).close()
    assert as_store(plain) is plain
    assert connect(plain) is plain


def test_an_empty_url_is_not_the_default_one() -> None:
    for start in (connect, create_chat):
        with pytest.raises(InvalidDatabase, match="'' names no database"):
            start("")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "5 is neither"),
        (None.__class__, "is neither"),
        ("chats.db", "'chats.db' names no database: give sqlite:///file.db or postgresql://"),
        ("mysql://u:secret@h/d", "'mysql://u:***@h/d' names no database"),
        ("sqlite://chats.db", "has two slashes: write sqlite:///relative.db"),
        ("sqlite:///chats.db?timeout=5", "give them as connect(…, pragmas={'timeout': '5'})"),
        ("sqlite:////no/such/folder/chats.db", "there is no folder '/no/such/folder'"),
        ("sqlite:////", "is a folder: name a file in it"),
        (pw.MySQLDatabase("x"), "MySQLDatabase is not supported: give a SqliteDatabase or a PostgresqlDatabase"),
    ],
)
def test_what_is_no_database_is_refused_at_once(given: Any, message: str) -> None:
    with pytest.raises(InvalidDatabase) as caught:
        connect(given)
    assert message in str(caught.value)
    if not isinstance(given, str | pw.Database):
        with pytest.raises(InvalidDatabase, match="is neither a Store, a peewee Database nor a URL"):
            create_chat(given)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"pool_size": 0}, "pool_size=0: pool_size must be 1 or more"),
        ({"pool_size": "5"}, "pool_size='5'"),
        ({"pool_timeout": -1}, "pool_timeout=-1: pool_timeout must be seconds"),
        ({"pool_timeout": None}, "pool_timeout=None"),
        ({"llm": "gpt-4o"}, "llm='gpt-4o': llm must have completion() and acompletion()"),
        ({"chat_fields": ["user_id"]}, 'must be like {"user_id": TextField(null=True)}'),
        ({"chat_fields": {"user_id": pw.TextField}}, "chat_fields has 'user_id': <class 'peewee.TextField'>, which is"),
        ({"chat_fields": {"user_id": "text"}}, "chat_fields has 'user_id': 'text', which is not a field"),
        ({"chat_fields": {"model": pw.TextField()}}, "chat_fields has 'model', which cannot be a column of yours"),
        ({"chat_fields": {"messages": pw.TextField()}}, "chat_fields has 'messages'"),
        ({"chat_fields": {"save": pw.TextField()}}, "chat_fields has 'save'"),
        ({"chat_fields": {"user id": pw.TextField()}}, "chat_fields has 'user id'"),
        ({"models": [int]}, "models: <class 'int'> is not a subclass of a record"),
        ({"table_prefix": "my-"}, "'my-llm_chat' cannot be the name of the chat table"),
        ({"table_prefix": None}, "cannot be the name of the chat table"),
        ({"table_names": {"chat": "x; DROP TABLE y"}}, "cannot be the name of the chat table: use letters"),
        ({"table_names": {"chat": "x" * 39}}, "38 at most"),
        ({"table_names": {"chat": "talk", "message": "talk"}}, "two tables have one name"),
    ],
)
def test_a_bad_option_of_connect_is_named(option: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        connect("sqlite:///:memory:", **option)
    assert message in str(caught.value)


def test_an_unknown_table_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownKeyword, match=r"table_names has \['chats'\]; it takes chat, message, tool_call"):
        connect("sqlite:///:memory:", table_names={"chats": "talks"})


def test_a_sqlite_database_in_memory_of_the_application_must_stay_open() -> None:
    database = pw.SqliteDatabase(":memory:")
    store = connect(database)
    with pytest.raises(InvalidDatabase, match='use connect\\("sqlite:///:memory:"\\)'):
        store.create_tables()
    with database.connection_context():
        assert works(store)
        with pytest.raises(InvalidDatabase, match="only for the thread that opened it"):
            asyncio.run(acreate_chat(store, model="test"))


# Passwords


def test_a_password_is_in_no_text_that_is_printed() -> None:
    urls = [
        "postgresql://app:hunter2@127.0.0.1:1/db",
        "postgresql://app@127.0.0.1:1/db?password=hunter2",
        "postgresql://app:hunter2@127.0.0.1:1/db?connect_timeout=1&user=me@corp",
    ]
    for url in urls:
        store = connect(url)
        with pytest.raises(DatabaseUnavailable) as caught:
            store.create_tables()
        assert "hunter2" not in f"{store!r} {caught.value} {a_repr_of_everything(store)}"
        assert "127.0.0.1" in str(caught.value)
    store = connect(pw.PostgresqlDatabase("db", host="127.0.0.1", port=1, user="app", password="hunter2"))
    with pytest.raises(DatabaseUnavailable) as caught:
        store.create_tables()
    assert "hunter2" not in f"{store!r} {caught.value}"
    store = connect(pw.PostgresqlDatabase("host=127.0.0.1 port=1 password='hunter2 and more'"))
    assert "hunter2" not in repr(store)
    assert "more" not in repr(store)


def a_repr_of_everything(store: Store) -> str:
    return " ".join(repr(value) for value in vars(store).values())


@pytest.mark.parametrize("password", ["hunter%2", "hunt@er2", "hunter/2", "hunter#2"])
def test_a_password_that_must_be_quoted_is_refused_without_showing_it(password: str) -> None:
    with pytest.raises(InvalidDatabase, match=r"urllib\.parse\.quote") as caught:
        connect(f"postgresql://app:{password}@127.0.0.1:1/db")
    assert "hunt" not in str(caught.value)


def test_a_password_that_is_quoted_is_taken() -> None:
    assert connect("postgresql://app:hunt%40er%25%2F%23@127.0.0.1/db")


# Settings of SQLite


def pragma(store: Store, name: str) -> Any:
    with store.connection():
        return store.database.execute_sql(f"PRAGMA {name}").fetchone()[0]


def test_our_sqlite_survives_a_power_cut_and_reads_while_it_writes(sqlite_url: str) -> None:
    with connect(sqlite_url) as store:
        found = [pragma(store, name) for name in ("journal_mode", "synchronous", "foreign_keys")]
    assert found == ["wal", 2, 1]
    with connect(sqlite_url, pragmas={"synchronous": "normal"}) as store:
        assert [pragma(store, name) for name in ("synchronous", "foreign_keys")] == [1, 1]


@pytest.mark.parametrize("is_open", [False, True])
def test_foreign_keys_are_enforced_on_the_applications_own_sqlite(tmp_path: Path, is_open: bool) -> None:
    database = pw.SqliteDatabase(tmp_path / "app.db", pragmas={"cache_size": -1000})
    if is_open:
        database.connect()
    store = connect(database)
    store.create_tables()
    chat = a_chat(store)
    chat.ask("Hi")
    chat.delete()
    assert pragma(store, "cache_size") == -1000
    assert rows(store, "message", "id") == []
    assert len(rows(store, "request", "id")) == 1
    database.close()


# Connections and pools


def test_connections_are_given_back(store: Store) -> None:
    pool: Any = store.database
    enough = max(1, len(pool._connections))
    for _ in range(3):
        chat = a_chat(store)
        chat.ask("Hi")
        chat.stats()
        assert pool.is_closed()
        assert len(pool._in_use) == 0
        assert len(pool._connections) == enough


def test_a_connection_that_the_caller_opened_stays_open(store: Store) -> None:
    store.database.connect()
    a_chat(store).ask("Hi")
    assert not store.database.is_closed()
    store.database.close()


@pytest.mark.parametrize("pool_timeout", [0, 0.05])
def test_an_exhausted_pool_says_so(database_url: str, pool_timeout: float) -> None:
    with connect(database_url, pool_size=1, pool_timeout=pool_timeout) as store:
        store.create_tables()
        with store.connection(), ThreadPoolExecutor(1) as elsewhere:
            with pytest.raises(DatabaseUnavailable) as caught:
                elsewhere.submit(a_chat, store).result()
    assert "no connection of" in str(caught.value)
    assert "all 1 are in use; give connect(…, pool_size=, pool_timeout=) more" in str(caught.value)


def test_a_caller_waits_for_a_connection_of_the_pool(database_url: str) -> None:
    with connect(database_url, pool_size=1, pool_timeout=10) as store, ThreadPoolExecutor(1) as elsewhere:
        store.create_tables()
        started = threading.Event()

        def ask() -> str | None:
            started.set()
            return a_chat(store).ask("Hi").content

        with store.connection():
            answer = elsewhere.submit(ask)
            started.wait(10)
        assert answer.result(10) == "Hello!"


def test_fifty_threads_share_a_pool_of_five(database_url: str) -> None:
    with connect(database_url, pool_size=5) as store:
        store.create_tables()
        with ThreadPoolExecutor(50) as threads:
            chats = list(threads.map(lambda _: a_chat(store), range(50)))
            answers = list(threads.map(lambda chat: chat.ask("Hi").content, chats))
        assert answers == ["Hello!"] * 50
        assert len(rows(store, "message", "id")) == 100
        pool: Any = store.database
        assert len(pool._connections) <= 5


# Closing


def test_a_closed_store_says_so(store: Store) -> None:
    chat = a_chat(store)
    store.close()
    store.close()
    for act in (lambda: a_chat(store), lambda: chat.ask("Hi"), chat.messages, chat.stats, store.create_tables):
        with pytest.raises(StoreClosed, match=r"was closed: connect\(\) again"):
            act()
    with pytest.raises(StoreClosed):
        asyncio.run(chat.aask("Hi"))


def test_a_closed_store_leaves_no_connection_behind(sqlite_url: str) -> None:
    before = open_connections()
    store = connect(sqlite_url)
    store.create_tables()
    asyncio.run(acreate_chat(store, model="test"))
    assert open_connections() != before
    store.close()
    assert open_connections() == before


def open_connections() -> set[int]:
    gc.collect()
    return {id(found) for found in gc.get_objects() if isinstance(found, sqlite3.Connection) and is_open(found)}


def is_open(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("SELECT 1")
    except sqlite3.ProgrammingError:
        return False
    return True


def test_closing_a_store_leaves_the_applications_database_open(tmp_path: Path) -> None:
    database = pw.SqliteDatabase(tmp_path / "app.db")
    with database.connection_context():
        with connect(database) as store:
            store.create_tables()
        assert not database.is_closed()
        assert "llm_chat" in database.get_tables()


# Names of tables


def test_two_stores_live_side_by_side_in_one_database(database_url: str) -> None:
    with (
        connect(database_url, table_prefix="shop_") as shop,
        connect(database_url, table_names={"chat": "talk", "message": "said", "request": "spent"}) as talks,
    ):
        shop.create_tables()
        talks.create_tables()
        of_shop = a_chat(shop, Call("echo", text="shop"), "Shop.", tools=[echo])
        of_talks = a_chat(talks, Call("echo", text="talk"), "Talk.", tools=[echo])
        of_shop.ask("One")
        of_talks.ask("Two")
        assert [message.content for message in of_shop.messages()] == ["One", "Shop."]
        assert [message.content for message in of_talks.messages()] == ["Two", "Talk."]
        assert [row[0] for row in rows(shop, "tool_call", "result")] == ["shop"]
        assert [row[0] for row in rows(talks, "tool_call", "result")] == ["talk"]
        assert load_chat(shop, of_talks.id) is None
        assert load_chat(talks, of_shop.id) is None
        of_shop.delete()
        assert len(rows(talks, "message", "id")) == 2
        assert [len(rows(store, "request", "id")) for store in (shop, talks)] == [2, 2]
        with shop.connection():
            tables = set(shop.database.get_tables())
        assert tables >= {"shop_llm_chat", "shop_llm_tool_call", "talk", "said", "spent", "llm_tool_call"}


PASCAL_CASE = {
    "chat": "AssistantChat",
    "message": "AssistantMessage",
    "tool_call": "AssistantToolCall",
    "request": "AssistantRequest",
    "agent_session": "AssistantAgentSession",
    "attachment": "AssistantAttachment",
}


def test_pascal_case_names_work_through_whole_turns(database_url: str, ask: Ask) -> None:
    with connect(database_url, table_names=PASCAL_CASE) as store:
        store.create_tables()
        chat = a_chat(store, Call("echo", text="x"), "One.", "Two.", tools=[echo])
        ask(chat, "First")
        ask(chat, "Second")
        again = loaded(store, chat.id, llm=ScriptedLLM(ValueError("down"), "Three."), retries=0)
        with pytest.raises(ValueError, match="down"):
            ask(again, "Third")
        assert again.retry().content == "Three."
        assert again.stats().requests == 5
        with store.connection():
            tables = {
                name for name in store.database.get_tables() if "_search" not in name and name != "sqlite_sequence"
            }
            assert tables == set(PASCAL_CASE.values())
        chat.delete()
        assert rows(store, "tool_call", "id") == []


# Columns of the application


def test_columns_of_the_application_are_written_and_read(store: Store) -> None:
    chat = a_chat(store, user_id="u_1")
    assert chat.record.user_id == "u_1"  # type: ignore[attr-defined]
    assert loaded(store, chat.id).record.user_id == "u_1"  # type: ignore[attr-defined]
    assert rows(store, "chat", "user_id") == [("u_1",)]
    assert store.chat_columns == ["user_id"]


def test_a_tenant_cannot_load_the_chat_of_another(store: Store) -> None:
    mine, nobodys = a_chat(store, user_id="u_1"), a_chat(store)
    assert loaded(store, mine.id, user_id="u_1").id == mine.id
    assert load_chat(store, mine.id, user_id="u_2") is None
    assert load_chat(store, mine.id, user_id=None) is None
    assert load_chat(store, nobodys.id, user_id="u_1") is None
    assert loaded(store, nobodys.id, user_id=None).id == nobodys.id
    assert asyncio.run(aload_chat(store, mine.id, user_id="u_2")) is None
    assert asyncio.run(aload_chat(store, mine.id, user_id="u_1")) is not None


def test_an_unknown_keyword_is_refused_with_the_known_ones_before_anything_is_written(store: Store) -> None:
    with pytest.raises(UnknownKeyword) as caught:
        a_chat(store, usr_id="u_1")
    assert str(caught.value).startswith("create_chat() does not know 'usr_id'; it takes model, provider, instructions,")
    assert str(caught.value).endswith("; columns of the application: user_id; did you mean 'user_id'?")
    with pytest.raises(UnknownKeyword, match=r"load_chat\(\) does not know 'metadata'.*application: user_id"):
        load_chat(store, "x", metadata={})
    with pytest.raises(UnknownKeyword):
        asyncio.run(acreate_chat(store, usr_id="u_1"))
    assert rows(store, "chat", "id") == []


def test_one_dictionary_of_columns_serves_many_stores(tmp_path: Path) -> None:
    fields = {"user_id": pw.TextField(null=True)}
    with (
        connect(f"sqlite:///{tmp_path}/a.db", chat_fields=fields) as one,
        connect(f"sqlite:///{tmp_path}/b.db", chat_fields=fields, table_prefix="b_") as other,
    ):
        for store in (one, other):
            store.create_tables()
        chats = [a_chat(store, user_id="u_1") for store in (one, other)]
        for store, chat in zip((one, other), chats, strict=True):
            assert loaded(store, chat.id, user_id="u_1").id == chat.id
            assert load_chat(store, chat.id, user_id="u_2") is None


def test_a_column_may_point_at_a_table_of_the_application(database_url: str) -> None:
    class Customer(pw.Model):
        name = pw.TextField()

    store = connect(database_url, chat_fields={"customer": pw.ForeignKeyField(Customer, on_delete="CASCADE")})
    Customer.bind(store.database)
    with store.connection():
        store.database.create_tables([Customer])
        ada = Customer.create(name="Ada")
        bob = Customer.create(name="Bob")
    store.create_tables()
    chat = a_chat(store, customer=ada)
    assert loaded(store, chat.id, customer=ada).id == chat.id
    assert load_chat(store, chat.id, customer=bob) is None
    with store.connection():
        ada.delete_instance()
        store.database.drop_tables([store.records.chat, Customer], cascade=database_url.startswith("postgresql"))
    assert store.chat_columns == ["customer"]
    store.close()


@pytest.mark.parametrize("name", ["tools", "history", "chat_id"])
def test_a_column_cannot_have_the_name_of_an_option(name: str) -> None:
    with connect("sqlite:///:memory:", chat_fields={name: pw.TextField(null=True)}) as store:
        store.create_tables()
        with pytest.raises(InvalidValue, match=f"the column '{name}' of the chat has the name of a keyword"):
            create_chat(store)


def test_a_column_that_must_be_given_is_missed_by_name(database_url: str) -> None:
    with connect(database_url, chat_fields={"tenant": pw.TextField(unique=True)}) as store:
        store.create_tables()
        with pytest.raises(InvalidValue, match=r"create_chat\(\): .*tenant.*"):
            create_chat(store, model="test")
        create_chat(store, model="test", tenant="t_1")
        with pytest.raises(InvalidValue, match=r"create_chat\(\): .*; the columns .* were given: tenant='t_1'"):
            create_chat(store, model="test", tenant="t_1")
        assert len(rows(store, "chat", "id")) == 1


@pytest.mark.parametrize("value", ["\x00", "\ud800", 10**30, object()])
def test_a_value_that_a_column_cannot_hold_is_refused(database_url: str, value: Any) -> None:
    with connect(database_url, chat_fields={"number": pw.IntegerField(null=True)}) as store:
        store.create_tables()
        with pytest.raises(InvalidValue):
            create_chat(store, model="test", number=value)
        create_chat(store, model="test")
        try:
            assert load_chat(store, rows(store, "chat", "id")[0][0], number=value) is None
        except InvalidValue:
            pass  # PostgreSQL compares with a number that the column cannot hold
        assert rows(store, "chat", "number") == [(None,)]


class ShopChat(LlmChat):
    user_id = pw.TextField(null=True, index=True)
    stars = pw.IntegerField(default=3)

    class Meta:
        table_name = "shop_chat"
        constraints = [pw.Check("stars BETWEEN 1 AND 5", "stars_check")]

    def is_good(self) -> bool:
        return self.stars > 3  # type: ignore[operator]


class ShopMessage(LlmMessage):
    flagged = pw.BooleanField(null=True)

    class Meta:
        table_name = "shop_message"


@pytest.mark.parametrize("models", [[ShopChat, ShopMessage], {"chat": ShopChat, "message": ShopMessage}])
def test_records_of_the_application_keep_their_columns_checks_and_methods(database_url: str, models: Any) -> None:
    with connect(database_url, models=models) as store:
        store.create_tables()
        chat = a_chat(store, user_id="u_1", stars=5)
        chat.ask("Hi")
        again = loaded(store, chat.id, user_id="u_1")
        assert isinstance(again.record, ShopChat)
        assert again.record.is_good()
        assert load_chat(store, chat.id, stars=4) is None
        assert [type(message).__name__ for message in again.messages()] == ["ShopMessage"] * 2
        assert [message.flagged for message in again.messages()] == [None, None]  # type: ignore[attr-defined]
        with pytest.raises(InvalidValue, match="stars_check"):
            a_chat(store, stars=6)
        with store.connection():
            assert {"shop_chat", "shop_message", "llm_request"} <= set(store.database.get_tables())


def test_one_record_of_the_application_serves_two_stores(sqlite_url: str, tmp_path: Path) -> None:
    urls = sqlite_url, f"sqlite:///{tmp_path}/other.db"
    with connect(urls[0], models=[ShopChat]) as one, connect(urls[1], models=[ShopChat]) as other:
        for store in (one, other):
            store.create_tables()
        chat = a_chat(one, user_id="u_1")
        assert loaded(one, chat.id, user_id="u_1").messages() == []
        assert load_chat(other, chat.id) is None


def test_a_needed_column_in_a_table_that_a_turn_writes_is_refused() -> None:
    class Strict(LlmToolCall):
        team = pw.TextField()

    with pytest.raises(InvalidValue, match=r"Strict\.team must be null=True"):
        connect("sqlite:///:memory:", models=[Strict])


# asyncio


def test_all_of_it_works_from_asyncio(store: Store) -> None:
    async def act() -> None:
        chat = await acreate_chat(store, model="test", llm=ScriptedLLM("Hello!", "Bye."), user_id="u_1")
        assert (await chat.aask("Hi")).content == "Hello!"
        assert await aload_chat(store, chat.id, user_id="u_2") is None
        again = await aload_chat(store, chat.id, user_id="u_1")
        assert again is not None
        assert [message.content for message in await again.amessages()] == ["Hi", "Hello!"]
        assert (await again.astats()).requests == 1
        assert len(await again.arequests()) == 1
        assert await again.atool_calls() == []
        assert (await again.areload()).id == chat.id
        await again.adelete()
        assert await chat.amessages() == []
        assert await aload_chat(store, chat.id) is None

    asyncio.run(act())


def test_a_database_in_memory_works_from_asyncio_and_threads() -> None:
    async def act(store: Store) -> list[str | None]:
        chats = [await acreate_chat(store, model="test", llm=ScriptedLLM("Hello!")) for _ in range(10)]
        answers = await asyncio.gather(*(chat.aask("Hi") for chat in chats))
        return [answer.content for answer in answers]

    with connect("sqlite:///:memory:") as store:
        store.create_tables()
        assert asyncio.run(act(store)) == ["Hello!"] * 10
        with ThreadPoolExecutor(10) as threads:
            answers = list(threads.map(lambda _: a_chat(store).ask("Hi").content, range(10)))
        assert answers == ["Hello!"] * 10
        assert len(rows(store, "message", "id")) == 40


def test_a_store_serves_one_event_loop_after_another(store: Store) -> None:
    chat = a_chat(store, "One.", "Two.", "Three.")
    answers = [asyncio.run(chat.aask("Hi")).content for _ in range(2)]
    assert [*answers, chat.ask("Hi").content] == ["One.", "Two.", "Three."]


def test_database_work_does_not_hold_up_the_event_loop(database_url: str) -> None:
    async def act(store: Store) -> str | None:
        chat = await acreate_chat(store, model="test", llm=ScriptedLLM("Hello!"))
        with store.connection():  # the only one: work elsewhere has to wait for it, and this task does not
            asking = asyncio.create_task(chat.aask("Hi"))
            for _ in range(5):
                await asyncio.sleep(0)
            assert not asking.done()
        return (await asking).content

    with connect(database_url, pool_size=1, pool_timeout=10) as store:
        store.create_tables()
        assert asyncio.run(act(store)) == "Hello!"


def test_a_store_that_is_closed_waits_for_what_another_thread_is_doing_in_it(store):
    """SQLite ends the process where a connection is closed under a statement."""
    begun, finish, order = threading.Event(), threading.Event(), []

    def work() -> None:
        with store.connection():
            begun.set()
            finish.wait(10)
            store.database.execute_sql("SELECT 1").fetchall()
            order.append("worked")

    def close() -> None:
        store.close()
        order.append("closed")

    working, closing = threading.Thread(target=work), threading.Thread(target=close)
    working.start()
    begun.wait(10)
    closing.start()
    closing.join(0.05)
    finish.set()
    working.join()
    closing.join()
    assert order == ["worked", "closed"]


def test_a_store_may_be_closed_by_the_thread_that_uses_it(store):
    with store.connection():
        store.close()
    with pytest.raises(StoreClosed):
        store.create_tables()

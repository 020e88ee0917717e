"""What cannot work is refused with words that say what to do, and leaves no row behind."""

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peewee as pw
import pytest
from conftest import Ask, rows

from llm_orm import (
    LLM,
    Agent,
    AsyncTool,
    Chat,
    ChatGone,
    DatabaseUnavailable,
    EmptyMessage,
    InsideTransaction,
    InvalidDatabase,
    InvalidValue,
    LlmOrmError,
    NoModel,
    NothingToRetry,
    Retries,
    Store,
    TablesMissing,
    UnknownKeyword,
    UnknownModel,
    acreate_chat,
    connect,
    create_agent_session,
    create_chat,
    define_agent,
    load_agent_session,
    load_chat,
)
from llm_orm.testing import ScriptedLLM

RECORDS = ("chat", "message", "tool_call", "request", "agent_session")


@pytest.fixture
def memory() -> Iterator[Store]:
    """For what is refused before any database is asked."""
    with connect("sqlite:///:memory:") as store:
        store.create_tables()
        yield store


def counts(store: Store) -> dict[str, int]:
    return {record: len(rows(store, record, "id")) for record in RECORDS}


def a_chat(store: Any, **keywords: Any) -> Chat:
    return create_chat(store, **{"model": "test", "llm": ScriptedLLM("Hello!"), **keywords})


def refused(store: Store, error: type[LlmOrmError], act: Callable[[], Any]) -> str:
    """The message of the error with which an act ends that writes nothing."""
    before = counts(store)
    with pytest.raises(error) as caught:
        act()
    assert type(caught.value) is error
    assert counts(store) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Messages


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", EmptyMessage, "the message is empty (''): say something"),
        (" \n\t ", EmptyMessage, "the message is empty (' \\n\\t '): say something"),
        (None, InvalidValue, "a message must be a string, not NoneType"),
        (5, InvalidValue, "a message must be a string, not int"),
        (b"Hi", InvalidValue, "a message must be a string, not bytes"),
        (["Hi"], InvalidValue, "a message must be a string, not list"),
        ("a\x00b", InvalidValue, "the message has a NUL character, which a database cannot hold as text"),
        ("a\ud83db", InvalidValue, "the message has half a character (a lone surrogate) at 1"),
    ],
)
def test_what_is_no_message_is_refused(memory: Store, text: Any, error: type[LlmOrmError], message: str) -> None:
    chat = a_chat(memory)
    assert refused(memory, error, lambda: chat.ask(text)) == message
    assert refused(memory, error, lambda: chat.ask_stream(text)) == message


def test_no_message_is_refused_in_every_way(store: Store, ask: Ask) -> None:
    chat = a_chat(store)
    with pytest.raises(ValueError, match="after all"):
        ask(chat, "Hi", llm=ScriptedLLM(ValueError("after all")), retries=0)
    # None must not be taken for "answer what was left unanswered", which is retry().
    refused(store, InvalidValue, lambda: ask(chat, None))
    refused(store, EmptyMessage, lambda: ask(chat, ""))


def test_a_bad_message_is_a_value_error_too(memory: Store) -> None:
    chat = a_chat(memory)
    for text in ("", "\x00"):
        with pytest.raises(ValueError):
            chat.ask(text)


def test_nothing_to_retry_is_said(memory: Store) -> None:
    chat = a_chat(memory, llm=ScriptedLLM("Hello!", "Bye."))
    assert "has no unanswered user message: use ask()" in refused(memory, NothingToRetry, chat.retry)
    chat.ask("Hi")
    refused(memory, NothingToRetry, chat.retry)


# Models


@pytest.mark.parametrize("llm", [None, LLM(api_key="no key")])
def test_a_model_of_no_known_provider_is_refused(memory: Store, ask: Ask, llm: Any, real_litellm: None) -> None:
    chat = a_chat(memory, model="nonsense-9000", llm=llm)
    message = refused(memory, UnknownModel, lambda: ask(chat, "Hi"))
    assert message.startswith("no provider is known for the model 'nonsense-9000'; write it as provider/model")


def test_a_chat_without_a_model_needs_one(memory: Store, ask: Ask) -> None:
    chat = create_chat(memory, llm=ScriptedLLM("Hello!"))
    message = refused(memory, NoModel, lambda: ask(chat, "Hi"))
    assert message == 'The chat names no model: give create_chat(…, model="gpt-4o") or ask(…, model=…)'
    refused(memory, NoModel, lambda: ask(chat, "Hi", model=""))
    assert ask(chat, "Hi", model="test").model_id == "test"


# Databases that are not there


def everything(store: Store) -> list[Callable[[], Any]]:
    """All that reads or writes the store's database first of all."""
    return [
        store.create_tables,
        lambda: create_chat(store, model="test"),
        lambda: load_chat(store, "0190f6a0-0000-7000-8000-000000000000"),
        lambda: asyncio.run(acreate_chat(store, model="test")),
    ]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://127.0.0.1:1/x", 'connection to server at "127.0.0.1", port 1 failed: Connection refused'),
        ("postgresql://app:secret@127.0.0.1:1/x", "postgresql://app:***@127.0.0.1:1/x did not answer: "),
        ("postgresql:///x?host=/no/such/folder", 'socket "/no/such/folder/.s.PGSQL.5432" failed: No such file'),
    ],
)
def test_a_postgresql_that_cannot_be_reached_is_unavailable(url: str, message: str) -> None:
    with connect(url) as store:
        for act in everything(store):
            with pytest.raises(DatabaseUnavailable) as caught:
                act()
            assert "did not answer: " in str(caught.value)
            assert message in str(caught.value)
            assert "secret" not in str(caught.value)


def test_a_database_that_does_not_exist_on_the_server_is_named(postgres_server: str) -> None:
    url = re.sub(r"/\w+\?", "/no_such_database?", postgres_server, count=1)
    with connect(url) as store, pytest.raises(DatabaseUnavailable, match='database "no_such_database" does not exist'):
        store.create_tables()


def test_an_option_that_postgresql_does_not_know_is_named() -> None:
    with connect("postgresql://app:secret@127.0.0.1:1/x?colour=red") as store:
        for act in everything(store):
            with pytest.raises(InvalidDatabase, match='invalid URI query parameter: "colour"') as caught:
                act()
            assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("This is not a database. " * 100)
    for store in (connect(f"sqlite:///{path}"), connect(pw.SqliteDatabase(path))):
        for act in everything(store):
            with pytest.raises(InvalidDatabase, match=r"notes\.txt cannot be opened: file is not a database"):
                act()
        store.close()
    assert path.read_text().startswith("This is not a database.")


def test_a_missing_folder_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidDatabase, match=r"there is no folder '.*missing'"):
        connect(f"sqlite:///{tmp_path}/missing/chats.db")
    with pytest.raises(InvalidDatabase, match="is a folder: name a file in it"):
        connect(f"sqlite:///{tmp_path}")
    with pytest.raises(InvalidDatabase, match="there is no folder"):
        create_chat(f"sqlite:///{tmp_path}/missing/chats.db")
    with connect(pw.SqliteDatabase(tmp_path / "missing" / "chats.db")) as store:
        with pytest.raises(DatabaseUnavailable, match=r"chats\.db did not answer: unable to open database file"):
            store.create_tables()


# Tables that are not there


def test_missing_tables_say_how_to_make_them(database_url: str) -> None:
    with connect(database_url) as store:
        for act in everything(store)[1:]:
            with pytest.raises(TablesMissing) as caught:
                act()
            assert "llm_chat" in str(caught.value)
            assert str(caught.value).endswith('; run "llm-orm migrate" or store.create_tables()')
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record", ["message", "request"])
def test_a_missing_table_of_a_turn_is_named(store: Store, record: str) -> None:
    chat = a_chat(store)
    with store.connection():
        name = f"llm_{record}"
        cascade = "" if store.is_sqlite else " CASCADE"
        store.database.execute_sql(f"DROP TABLE {name}{cascade}")
    with pytest.raises(LlmOrmError, match=f"{name}.*run .llm-orm migrate.") as caught:
        chat.ask("Hi")
    assert isinstance(caught.value if record == "message" else caught.value.__cause__, TablesMissing)


def test_a_missing_column_is_named(store: Store, database_url: str) -> None:
    with connect(database_url, chat_fields={"team": pw.TextField(null=True)}) as grown:
        message = refused(store, TablesMissing, lambda: a_chat(grown, team="t"))
        assert "team" in message
        assert 'run "llm-orm migrate"' in message
        with pytest.raises(TablesMissing, match="team"):
            load_chat(grown, a_chat(store).id)


def test_a_missing_schema_of_postgresql_counts_as_missing_tables(postgres_url: str) -> None:
    with connect(re.sub(r"search_path%3D\w+", "search_path%3Dno_such_schema", postgres_url)) as store:
        for act in everything(store)[:2]:
            with pytest.raises(TablesMissing, match="llm-orm migrate"):
                act()


# Values of the chat


class Thing:
    pass


def a_circle() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


def a_tower() -> list[Any]:
    tower: list[Any] = []
    for _ in range(100_000):
        tower = [tower]
    return tower


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (Thing(), "metadata cannot be written as JSON: Object of type Thing is not JSON serializable"),
        ({"ids": {1, 2}}, "metadata cannot be written as JSON: Object of type set is not JSON serializable"),
        (
            {"share": float("nan")},
            "metadata cannot be written as JSON: Out of range float values are not JSON compliant",
        ),
        (float("inf"), "metadata cannot be written as JSON: Out of range float values are not JSON compliant"),
        ({("a", "b"): 1}, "metadata cannot be written as JSON: keys must be str, int, float, bool or None"),
        (b"bytes", "metadata cannot be written as JSON: Object of type bytes is not JSON serializable"),
        (a_circle(), "metadata cannot be written as JSON: Circular reference detected"),
        (a_tower(), "metadata cannot be written as JSON: maximum recursion depth exceeded"),
        ({"text": "a\x00b"}, "metadata has a NUL character, which a database cannot hold as text"),
        ({"a\x00b": 1}, "metadata has a NUL character, which a database cannot hold as text"),
        ({"text": "\\\x00"}, "metadata has a NUL character, which a database cannot hold as text"),
        ({"text": "a\ud83db"}, "metadata has half a character (a lone surrogate)"),
    ],
)
def test_metadata_that_is_no_json_is_refused(memory: Store, metadata: Any, message: str) -> None:
    assert message in refused(memory, InvalidValue, lambda: a_chat(memory, metadata=metadata))


@pytest.mark.parametrize("name", ["model", "provider", "instructions"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "must be a string, not int"),
        (["gpt-4o"], "must be a string, not list"),
        ("a\x00b", "has a NUL character"),
        ("\ud83d", "has half a character"),
    ],
)
def test_a_bad_model_provider_or_instructions_is_refused(memory: Store, name: str, value: Any, message: str) -> None:
    chat = a_chat(memory)
    for act in (
        lambda: a_chat(memory, **{name: value}),
        lambda: load_chat(memory, chat.id, **{name: value}),
        lambda: chat.ask("Hi", **{name: value}),
    ):
        assert refused(memory, InvalidValue, act).startswith(f"{name} {message}")


# Keywords


def test_an_unknown_keyword_of_ask_is_refused_with_the_known_ones(memory: Store, ask: Ask) -> None:
    chat = a_chat(memory)
    message = refused(memory, UnknownKeyword, lambda: ask(chat, "Hi", temprature=0.5))
    assert message.startswith("ask() does not know 'temprature'; it takes llm, tools, temperature, ")
    assert message.endswith("model, provider, instructions, files, key; did you mean 'temperature'?")
    for name in ("persistence", "debug", "metadata", "user_id"):
        refused(memory, UnknownKeyword, lambda name=name: ask(chat, "Hi", **{name: {}}))


def test_a_parameter_that_a_signature_names_is_among_the_known_ones(memory: Store) -> None:
    session = create_agent_session(memory, Named)
    for act, meant in (
        (lambda: a_chat(memory, instruction="Be brief."), "instructions"),
        (lambda: session.ask("Hi", file=b"text"), "files"),
        (lambda: session.ask("Hi", input={}), "inputs"),
        (lambda: create_agent_session(memory, Named, metdata={}), "metadata"),
        (lambda: load_agent_session(memory, Named, session.id, skip_class_validaton=True), "skip_class_validation"),
    ):
        message = refused(memory, UnknownKeyword, act)
        assert f", {meant}" in message
        assert message.endswith(f"; did you mean {meant!r}?")
    assert "did you mean" not in refused(memory, UnknownKeyword, lambda: session.retry(files=b"text"))


class Named(Agent):
    model = "test"


def test_a_session_without_a_model_says_that_its_class_needs_one(memory: Store) -> None:
    session = create_agent_session(memory, define_agent("Nameless"), llm=ScriptedLLM("Hello!"))
    assert refused(memory, NoModel, lambda: session.ask("Hi")).startswith("The agent names no model: set model = ")


@pytest.mark.parametrize("wrong", [None, "all", ["a text"], 5])
def test_what_a_history_function_returns_must_be_messages(memory: Store, ask: Ask, wrong: Any) -> None:
    chat = a_chat(memory, history=lambda messages: wrong)
    with pytest.raises(InvalidValue, match="the history function must return a list of messages, not "):
        ask(chat, "Hi")


def test_an_async_history_function_is_refused(memory: Store) -> None:
    async def last(messages: list[Any]) -> list[Any]:
        return messages[-1:]

    assert "a plain function" in refused(memory, InvalidValue, lambda: a_chat(memory, history=last))


def test_tokens_are_counted_of_a_string(memory: Store) -> None:
    chat = a_chat(memory)
    assert refused(memory, InvalidValue, lambda: chat.count_tokens(3)) == "a message must be a string, not int"


def test_an_unknown_keyword_is_a_type_error_too(memory: Store) -> None:
    for act in (lambda: a_chat(memory, colour="red"), lambda: load_chat(memory, "x", colour="red")):
        with pytest.raises(TypeError):
            act()


BAD_OPTIONS: list[tuple[str, Any, str]] = [
    ("llm", "gpt-4o", "llm='gpt-4o': llm must have completion() and acompletion(), as LLM(…) and litellm do"),
    ("llm", object(), "llm must have completion() and acompletion()"),
    ("llm", ScriptedLLM, "llm must have completion() and acompletion()"),
    ("temperature", "hot", "temperature='hot': temperature must be a number"),
    ("temperature", float("nan"), "temperature=nan: temperature must be a number"),
    ("temperature", True, "temperature must be a number"),
    ("max_tokens", 0, "max_tokens=0: max_tokens must be 1 or more"),
    ("max_tokens", 1.5, "max_tokens must be 1 or more"),
    ("thinking", "high", 'thinking=\'high\': thinking must be {"effort": …} or {"budget": tokens}'),
    ("thinking", {}, "thinking={}: thinking must be"),
    ("thinking", {"effort": "low", "budgett": 1}, "thinking with 'effort', 'budgett': thinking must be"),
    ("params", None, "params=None: params must be keywords of completion(), less model, messages, stream, tools"),
    ("params", {"stream": True}, "params with 'stream': params must be"),
    ("params", {"num_retries": 3}, "params with 'num_retries': params must be"),
    ("headers", None, "headers=None: headers must be strings by name"),
    ("headers", "x", "headers given as str: headers must be strings by name"),
    ("headers", {"X-Team": 5}, "headers with 'X-Team': headers must be strings by name"),
    ("request_timeout", -1, "request_timeout=-1: request_timeout must be seconds"),
    ("request_timeout", "1m", "request_timeout='1m': request_timeout must be seconds"),
    ("max_tool_calls", -1, "max_tool_calls=-1: max_tool_calls must be 0 or more rounds"),
    ("max_tool_calls", None, "max_tool_calls must be 0 or more rounds"),
    ("max_tool_calls", True, "max_tool_calls must be 0 or more rounds"),
    ("tool_concurrency", 0, "tool_concurrency=0: tool_concurrency must be 1 or more"),
    ("retries", -1, "retries=-1: retries must be a number of retries, 0 or more, or a Retries"),
    ("retries", None, "retries=None: retries must be"),
    ("retries", "3", "retries='3': retries must be"),
    ("retries", True, "retries=True: retries must be"),
    ("history", -1, "history=-1: history must be a number of turns or a plain function"),
    ("history", "all", "history='all': history must be"),
    ("persistence", None, 'persistence=None: persistence takes "tool_calls" and "requests", True or False'),
    ("persistence", {"messages": False}, "persistence with 'messages': persistence takes"),
    ("persistence", {"requests": "no"}, "persistence with 'requests': persistence takes"),
    ("on_error", "raise", 'on_error=\'raise\': on_error must be "rollback" or "keep"'),
    ("wait", -1, "wait=-1: wait must be seconds"),
    ("wait", None, "wait=None: wait must be seconds"),
    ("wait", float("nan"), "wait=nan: wait must be seconds"),
    ("wait", True, "wait=True: wait must be seconds"),
    ("save_every", -1, "save_every=-1: save_every must be seconds"),
    ("stale_after", "1m", "stale_after='1m': stale_after must be 0, or 10 seconds or more"),
    ("stale_after", 2, "stale_after=2: stale_after must be 0, or 10 seconds or more"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"), BAD_OPTIONS, ids=[f"{name}={value!r:.20}" for name, value, _ in BAD_OPTIONS]
)
def test_a_bad_option_is_refused_by_name(memory: Store, name: str, value: Any, message: str) -> None:
    chat = a_chat(memory)
    acts = [lambda: a_chat(memory, **{name: value}), lambda: load_chat(memory, chat.id, **{name: value})]
    if name != "persistence" and value is not None:
        acts.append(lambda: chat.ask("Hi", **{name: value}))
    for act in acts:
        assert message in refused(memory, InvalidValue, act)


def test_the_keys_in_options_are_printed_nowhere(memory: Store) -> None:
    chat = a_chat(memory, params={"api_key": "sk-1"}, headers={"Authorization": "Bearer sk-2"})
    assert "sk-" not in f"{chat!r} {chat.options!r} {LLM(api_key='sk-3')!r}"
    for options in ({"params": {"api_key": "sk-1", "model": "x"}}, {"headers": {"Authorization": "sk-2", "X": 1}}):
        assert "sk-" not in refused(memory, InvalidValue, lambda options=options: a_chat(memory, **options))


def test_good_options_at_the_edge_are_taken(memory: Store) -> None:
    chat = a_chat(
        memory,
        tools=None,
        temperature=0,
        max_tokens=1,
        thinking={"type": "enabled", "budget_tokens": 1024},
        request_timeout=0.5,
        max_tool_calls=0,
        retries=Retries(attempts=0),
        history=0,
        persistence={"requests": True},
        wait=float("inf"),
        stale_after=0,
    )
    assert chat.ask("Hi").content == "Hello!"


# Tools, transactions, chats that are gone


def test_an_async_tool_is_refused_in_a_plain_ask(store: Store) -> None:
    async def later(text: str) -> str:
        return text

    chat = a_chat(store, tools=[later])
    for act in (lambda: chat.ask("Hi"), lambda: chat.ask_stream("Hi"), chat.retry):
        message = refused(store, AsyncTool, act)
        assert message == "the tool 'later' is async: use aask() or aask_stream(), or make it a plain function"


def test_a_turn_inside_the_callers_transaction_is_refused(store: Store, ask: Ask) -> None:
    chat = a_chat(store)
    before = counts(store)
    with store.connection():
        for block in (store.database.atomic, store.database.transaction):
            with block(), pytest.raises(InsideTransaction, match=r"outside of `with database\.atomic\(\)`"):
                ask(chat, "Hi")
    with store.database, pytest.raises(InsideTransaction, match="connection_context"):
        ask(chat, "Hi")
    assert counts(store) == before
    assert ask(chat, "Hi").content == "Hello!"


def test_a_chat_made_in_a_transaction_goes_with_it(store: Store) -> None:
    with store.connection():
        with store.database.atomic() as transaction:
            chat = a_chat(store)
            transaction.rollback()
    assert load_chat(store, chat.id) is None


def test_an_id_that_is_none_loads_nothing(store: Store) -> None:
    for chat_id in [None, "", "x", "0190f6a0", 5, b"\x00" * 16, "\x00", "💥" * 32, [], object()]:
        assert load_chat(store, chat_id) is None  # type: ignore[arg-type]


def test_a_chat_can_be_loaded_by_any_way_to_write_its_id(store: Store) -> None:
    chat = a_chat(store)
    for chat_id in (chat.id, str(chat.id), chat.id.hex, str(chat.id).upper(), chat.id.urn):
        loaded = load_chat(store, chat_id)
        assert loaded is not None
        assert loaded.id == chat.id


def test_asking_a_deleted_chat_says_that_it_is_gone(store: Store, ask: Ask) -> None:
    chat = a_chat(store)
    chat.delete()
    message = refused(store, ChatGone, lambda: ask(chat, "Hi"))
    assert message == f"there is no chat {chat.id}: it was deleted"
    refused(store, ChatGone, chat.reload)
    assert chat.messages() == []
    chat.delete()

"""Secrets reach nothing that is kept or printed, a tenant reaches no other's rows, and no string becomes SQL."""

import asyncio
import json
import logging
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peewee as pw
import pytest
from click.testing import CliRunner
from conftest import WAYS, Ask, rows
from provider import Answer, Provider
from provider import Call as Asked

import llm_orm
from llm_orm import (
    LLM,
    Agent,
    Chat,
    InvalidValue,
    LlmOrmError,
    PIIMask,
    Store,
    ToolError,
    UnknownKeyword,
    aload_agent_session,
    aload_chat,
    connect,
    create_agent_session,
    create_chat,
    erase,
    load_agent_session,
    load_chat,
    prune,
    tool,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM
from llm_orm_cli import main

KEY, HEADER, BODY, ELSEWHERE = "canary-of-the-key", "canary-of-a-header", "canary-of-the-body", "canary-of-a-tool"
PASSWORD = "canary-of-a-password"


# Secrets


@tool
def look_up(name: str) -> str:
    """A tool that calls a provider itself, whose error says the keys."""
    if name == "known":
        return "found"
    try:
        raise PermissionError(f"{ELSEWHERE} was refused, and so was {KEY}")
    except PermissionError as cause:
        error = RuntimeError(f"bad key {KEY}, bad header {HEADER}, bad {BODY}, {ELSEWHERE}, sk-canary12345678")
        error.add_note(f"it was sent with {KEY}")
        if name == "fatal":
            raise ToolError(f"again {KEY}", fatal=True) from error
        raise error from cause


def holders(provider: Provider) -> dict[str, Any]:
    """Everywhere that an application may give a key."""
    return {
        "llm": LLM(api_key=KEY, api_base=f"{provider.url}/v1"),
        "headers": {"X-Tenant": HEADER, "X-Authorization": f"Bearer {HEADER}"},
        "params": {"extra_body": {"auth_token": BODY}},
    }


def run_turns_of_every_kind(store: Store, provider: Provider, ask: Ask) -> tuple[list[Any], list[BaseException]]:
    """The chats, and the errors of their turns."""
    echo = f"Incorrect API key {KEY}, header {HEADER}, token {BODY}"
    chats, errors = [], []

    def fails(chat: Chat, **options: Any) -> None:
        with pytest.raises(Exception) as caught:
            ask(chat, "Hello?", **options)
        errors.append(caught.value)

    def chat_with(**options: Any) -> Chat:
        known = {"model": "openai/gpt-4o", "tools": [look_up], "retries": 0, "user_id": "u_1"}
        chats.append(create_chat(store, **(known | holders(provider) | options)))
        return chats[-1]

    chat = chat_with()
    provider.reply("Hi.", Answer(tool_calls=[Asked("look_up", {"name": "known"})]), "Found.")
    ask(chat, "Hello?")
    ask(chat, "Look me up.")
    for on_error in ("rollback", "keep"):
        provider.fail(401, echo)
        fails(chat, on_error=on_error)
    provider.fail(500, echo)
    provider.reply("From the second.")
    ask(chat, "Hello?", fallbacks=["openai/gpt-4o-mini"])
    provider.fail(429, echo, times=2)
    fails(chat, retries=llm_orm.Retries(1, first_wait_s=0.0))
    provider.stream_error("One two three", status=401, message=echo)
    fails(chat, on_error="keep")
    provider.hang()
    fails(chat, request_timeout=0.05)
    provider.drop()
    fails(chat)
    provider.reply(Answer(tool_calls=[Asked("look_up", {"name": "unknown"})]), "It failed.")
    ask(chat, "Look somebody up.")
    provider.reply(Answer(tool_calls=[Asked("look_up", {"name": "fatal"})]))
    fails(chat)
    return chats, errors


def kept_in(store: Store, folder: Path) -> str:
    """All that the database holds: the bytes of SQLite's files, the rows of PostgreSQL's tables as text."""
    if store.is_sqlite:
        return "".join(path.read_bytes().decode("latin-1") for path in folder.glob("chats.db*"))
    with store.connection():
        tables = [record._meta.table_name for record in store.records]  # type: ignore[attr-defined]
        found = [store.database.execute_sql(f"SELECT t::text FROM {table} t").fetchall() for table in tables]
    return str(found)


def texts_of(error: BaseException | None) -> Iterator[str]:
    """All that can be printed of an error, and of what led to it."""
    while error is not None:
        yield from (str(error), repr(error), *getattr(error, "__notes__", ()))
        yield from texts_of(error.__cause__)
        error = error.__context__


@pytest.mark.parametrize("way", ["ask", "aask_stream"])
def test_no_key_is_in_a_row_a_log_an_error_or_a_repr(store, provider, way, tmp_path, caplog, monkeypatch, capfd):
    """NodeLLM: nothing looks for keys in what a provider answers."""
    monkeypatch.setenv("OTHER_SERVICE_TOKEN", ELSEWHERE)
    for name in ("llm_orm", "llm_orm.usage"):
        caplog.set_level(logging.DEBUG, name)
    store.use(llm_orm.UsageLogger())
    chats, errors = run_turns_of_every_kind(store, provider, WAYS[way])
    assert len(errors) == 7
    assert any(KEY in str(request.headers) + str(request.body) for request in provider.requests)
    printed = [text for error in errors for text in texts_of(error)]
    printed += ["".join(traceback.format_exception(error)) for error in errors]
    logged = [record for record in caplog.records if record.name.startswith("llm_orm")]
    printed += [logging.Formatter().format(record) + str(record.args) for record in logged]
    for chat in chats:
        printed += [repr(each) for each in (store, chat, chat.options, chat.options.llm, chat.config, chat.record)]
        printed += [repr(row.__data__) for row in (*chat.messages(), *chat.tool_calls(), *chat.requests())]
    out = capfd.readouterr()
    everything = "\n".join([kept_in(store, tmp_path), *printed, out.out, out.err])
    assert "Incorrect API key ***, header ***, token ***" in everything
    assert "bad key ***, bad header ***, bad ***, ***, ***" in everything
    assert "canary-of" not in everything
    assert "canary12345678" not in everything


def test_a_key_in_an_error_is_taken_out_however_it_is_said(store, ask):
    class Odd(ProviderError):
        """An error whose text cannot be changed."""

        @property
        def message(self) -> str:
            return "fixed"

    error = Odd(401, f"{KEY} is bad")
    error.__cause__ = ExceptionGroup("two", [OSError(5, f"{KEY}!"), ValueError(7, [f"{KEY}?"])])
    error.__cause__.__context__ = error  # a circle
    error.add_note(f"sent with {KEY}")
    chat = create_chat(store, model="test", llm=ScriptedLLM(error), params={"api_key": KEY})
    with pytest.raises(Odd) as caught:
        ask(chat, "Hello?")
    assert (str(caught.value), caught.value.__notes__) == ("*** is bad", ["sent with ***"])
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert rows(store, "request", "error_message") == [("*** is bad",)]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://app:{}@127.0.0.1:1/x",
        "postgresql://app@127.0.0.1:1/x?password={}",
        "postgresql://app:{}@127.0.0.1:1/x?colour=red",
        "postgresql://app:{}@[host/db",
        "mysql://app:{}@host/db",
        "postgresql://app:a{}@b@127.0.0.1:1/x",
    ],
)
def test_the_password_of_the_database_is_in_no_error(url, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(LlmOrmError) as caught:
        create_chat(connect(url.format(PASSWORD)), model="test")
    result = CliRunner().invoke(main, ["stats", "--database-url", url.format(PASSWORD)])
    told = [*texts_of(caught.value), *texts_of(result.exception), result.output, caplog.text]
    assert PASSWORD not in "".join([*told, *traceback.format_exception(caught.value)])


def test_a_mask_that_counts_for_the_database_counts_for_the_texts_of_errors(store, ask):
    llm = ScriptedLLM(ProviderError(400, "you said bob@example.com"), Call("write", to="bob@example.com"), "Done.")

    @tool
    def write(to: str) -> str:
        """Write."""
        raise ValueError(f"no such address: {to}")

    chat = create_chat(store, model="test", llm=llm, tools=[write], middlewares=[PIIMask(stored=True)])
    with pytest.raises(ProviderError, match=r"bob@example\.com"):
        ask(chat, "Hello?")
    ask(chat, "Write to Bob.")
    assert rows(store, "request", "error_message") == [("you said [REDACTED]",), (None,), (None,)]
    assert rows(store, "tool_call", "error") == [("ValueError: no such address: [REDACTED]",)]


def test_a_mask_that_fails_costs_the_text_of_an_error_and_not_the_row(store, ask):
    class Broken(llm_orm.Middleware):
        def stored_text(self, text: str) -> str:
            if "refused" in text:
                raise ZeroDivisionError
            return text

    chat = create_chat(store, model="test", llm=ScriptedLLM(ProviderError(400, "refused")), middlewares=[Broken()])
    with pytest.raises(ProviderError):
        ask(chat, "Hello?")
    assert rows(store, "request", "status_code", "error_message") == [(400, None)]


# Tenants


class Support(Agent):
    model = "test"


@tool(requires_approval=True)
def pay(to: str) -> str:
    """Pay somebody."""
    return f"paid {to}"


def chat_of(store: Store, user: str, *script: Any) -> Chat:
    chat = create_chat(store, model="test", llm=ScriptedLLM("Hi.", *script), tools=[pay], user_id=user)
    chat.ask(f"I am {user}", files=[(f"{user}.txt", user.encode())])
    return chat


@pytest.mark.parametrize("user", ["u_2", None, "", "U_1", "u_1 ", "%", "u_1' OR '1'='1", "u_1\\"])
def test_no_loader_gives_one_tenant_the_chat_of_another(store, user):
    chat = chat_of(store, "u_1")
    session = create_agent_session(store, Support, user_id="u_1")

    async def loaded() -> list[Any]:
        return [
            await aload_chat(store, chat.id, user_id=user),
            await aload_agent_session(store, Support, session.id, user_id=user),
        ]

    assert load_chat(store, chat.id, user_id=user) is None
    assert load_chat(store, session.chat_id, user_id=user) is None
    assert load_agent_session(store, Support, session.id, user_id=user) is None
    assert load_agent_session(store, Support, session.id, user_id=user, skip_class_validation=True) is None
    assert asyncio.run(loaded()) == [None, None]
    assert load_chat(store, chat.id, user_id="u_1") is not None


@pytest.mark.parametrize("given", [["u_1"], ["u_1", "u_2"], [], ("u_1",), {"u_1"}, {"a": 1}, pw.SQL("user_id")])
def test_what_is_more_than_a_value_names_no_tenant(store, given):
    """A list that came as JSON, or an expression, would be compared in ways that nobody meant."""
    chat, session = chat_of(store, "u_1"), create_agent_session(store, Support, user_id="u_1")
    for load in (
        lambda: load_chat(store, chat.id, user_id=given),
        lambda: load_agent_session(store, Support, session.id, user_id=given),
    ):
        with pytest.raises(InvalidValue, match="user_id must be one value"):
            load()


def test_the_id_of_a_session_is_not_that_of_a_chat_nor_the_other_way_round(store):
    session = create_agent_session(store, Support, user_id="u_1")
    assert load_chat(store, session.id, user_id="u_1") is None
    assert load_agent_session(store, Support, session.chat_id, user_id="u_1") is None


def test_a_chat_reaches_no_message_call_or_file_of_another(store):
    theirs = chat_of(store, "u_1", Call("pay", to="u_1"))
    assert theirs.ask("Pay me.").status == "pending"
    (call,) = theirs.pending_approvals()
    mine = chat_of(store, "u_2")
    for given in (call, call.id, str(call.id), call.tool_call_id):
        for decide in (mine.approve, mine.deny):
            with pytest.raises(InvalidValue, match="of this chat waits for approval"):
                decide(given)
    for message in theirs.messages():
        assert mine.attachments(message) == mine.attachments(message.id) == mine.attachments(str(message.id)) == []
        for at in (message, message.id, str(message.id)):
            with pytest.raises(InvalidValue, match="has no such message"):
                mine.fork(at=at)
    assert [file.filename for file in mine.attachments()] == ["u_2.txt"]
    assert (mine.pending_approvals(), mine.tool_calls(), mine.cancel()) == ([], [], False)
    assert {request.chat_id for request in mine.requests()} == {mine.id}
    assert "u_1" not in str(mine.history) + str([message.content for message in mine.messages()])
    assert theirs.pending_approvals() == [call]


def test_erasing_and_pruning_for_one_tenant_leaves_the_others_rows(store):
    chats = {user: chat_of(store, user) for user in ("u_1", "u_2", "u_3")}
    with store.connection():
        before = list(store.records.message.select().where(store.records.message.chat == chats["u_2"].id).dicts())
    assert erase(store, {"user_id": "u_1"}).chats == 1
    assert erase(store, {"user_id": "u_1", "id": chats["u_2"].id}).chats == 0
    assert prune(store, 1e-9, where={"user_id": "u_3"}).chats == 1
    assert prune(store, 1e-9, where={"user_id": "u_1", "id": chats["u_2"].id}).chats == 0
    with store.connection():
        after = list(store.records.message.select().where(store.records.message.chat == chats["u_2"].id).dicts())
    assert after == before
    assert rows(store, "chat", "user_id") == [("u_1",), ("u_2",)]


# SQL in strings

HOSTILE = [
    "a' OR 1=1 --",
    '"; DROP TABLE llm_chat; --',
    "'); DELETE FROM llm_message; --",
    "%s %(id)s %% {} {0}",
    "? ?1 :id $1 @id $$dollar$$ /* x */",
    "back\\slash \\' \\\" \\\\ E'\\x27' \N{RIGHT SINGLE QUOTATION MARK} \N{SNOWMAN}",
    "line\nbreak\ttab\r",
]


@pytest.fixture
def tables(store: Store) -> Iterator[Callable[[], None]]:
    """Looks whether the tables, and a chat of somebody's, are as they were; once more at the end of the test."""
    bystander = chat_of(store, "bystander")

    def are_intact() -> None:
        assert [message.content for message in bystander.messages()] == ["I am bystander", "Hi."]
        assert [file.content for file in bystander.attachments()] == [b"bystander"]
        assert bystander.stats().requests == 1

    yield are_intact
    are_intact()


@pytest.mark.parametrize("text", HOSTILE)
def test_every_string_is_stored_to_the_letter(store, tables, text):
    llm = ScriptedLLM(
        Say(text, thinking=text, signature=text, calls=[Call("echo", call_id=text, text=text)]),
        text,
        ProviderError(400, text),
    )

    @tool
    def echo(text: str) -> str:
        """Say it again."""
        return text

    named = {"model": text, "provider": text, "instructions": text, "metadata": {text: text}, "user_id": text}
    chat = create_chat(store, llm=llm, tools=[echo], **named)
    chat.ask(text, files=[(f"{text}.txt", text.encode())])
    chat.add_message("system", text)
    with pytest.raises(ProviderError):
        chat.ask(text)
    again = load_chat(store, chat.id, user_id=text)
    assert again is not None
    assert (again.model, again.provider, again.instructions, again.metadata) == (text, text, text, {text: text})
    assert [message.content for message in again.messages()] == [text] * 4
    assert again.messages()[1].content_raw["rounds"][0]["thinking_blocks"][0]["thinking"] == text
    (call,) = again.tool_calls()
    assert (call.tool_call_id, call.result, json.loads(call.arguments)) == (text, text, {"text": text})
    assert [request.error_message for request in again.requests()] == [None, None, text]
    tables()
    copy = again.fork()
    assert (copy.messages()[0].content, copy.record.user_id) == (text, text)  # type: ignore[attr-defined]
    copy.delete()
    for where in ({"user_id": text}, {"model": text}, {"provider": text}, {f"metadata.{text}": text}):
        assert erase(store, where, dry_run=True).chats == 1
    assert erase(store, {f"metadata.{text}": text}).messages == 4
    assert [message.content for message in again.messages()] == [None] * 4


@pytest.mark.parametrize("text", [*HOSTILE, "x\x00y", "\ud800"])
def test_an_id_that_is_none_finds_nothing(store, tables, text):
    chat = create_chat(store, model="test")
    assert load_chat(store, text) is None
    assert load_agent_session(store, Support, text) is None
    assert chat.attachments(text) == []
    for act in (chat.approve, chat.deny, lambda given: chat.fork(at=given)):
        with pytest.raises(InvalidValue):
            act(text)
    with pytest.raises(InvalidValue, match=r"is not the id of a chat|NUL|surrogate"):
        erase(store, {"id": text})


@pytest.mark.parametrize("name", [*HOSTILE, "llm_chat; --", 'x" AS y', "a.b", "", "x\x00y", "1x", "ü"])
def test_no_name_becomes_sql(store, tables, name):
    """A name is refused that is not one of ours, or not a plain identifier."""
    if name:
        with pytest.raises(InvalidValue, match="cannot be the name of the chat table"):
            connect("sqlite:///:memory:", table_prefix=name)
    for names in ({"chat": name}, {"message": name}):
        with pytest.raises(InvalidValue, match="cannot be the name of the"):
            connect("sqlite:///:memory:", table_names=names)
    with pytest.raises(UnknownKeyword):
        connect("sqlite:///:memory:", table_names={name: "x"})
    for act in (erase, lambda store, where, **more: prune(store, 1.0, where=where, **more)):
        with pytest.raises((UnknownKeyword, InvalidValue)):
            act(store, {name: "x"}, dry_run=True)
    for act in (create_chat, lambda store, **more: load_chat(store, None, **more)):
        with pytest.raises(UnknownKeyword):
            act(store, **{name: "x"})
    chat = create_chat(store, model="test", llm=ScriptedLLM())
    with pytest.raises(UnknownKeyword):
        chat.erase(columns=[name])
    with pytest.raises(InvalidValue):
        chat.add_message(name, "x")
    if name not in ("a.b", "1x"):  # which some provider takes
        with pytest.raises(InvalidValue, match="cannot be the name of a tool"):
            chat.ask("x", tools=[_named(name)])
    if not name.isidentifier():
        with pytest.raises(InvalidValue, match="cannot be a column of yours"):
            connect("sqlite:///:memory:", chat_fields={name: pw.TextField(null=True)})


def _named(name: str) -> Any:
    def function() -> str:
        """Do it."""
        return "x"

    made = tool(function)
    made.name = name
    return made


@pytest.mark.parametrize("text", [*HOSTILE, "ü", "x\x00y"])
def test_no_option_of_the_command_line_becomes_sql(store, database_url, tables, text):
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, [*arguments, "--database-url", database_url])

    for arguments in (
        ("stats", "--table-name", f"chat={text}"),
        ("stats", "--table-prefix", text),
        ("erase", "--where", f"user_id={text}", "--table-name", f"chat={text}", "--yes"),
        ("erase", "--where", f"{text}=x", "--yes"),
        ("erase", "--chat", text, "--yes"),
        ("erase", "--where", "user_id=bystander", "--column", text, "--yes"),
        ("prune", "--older-than", text, "--yes"),
        ("prune", "--older-than", "1s", "--where", f"{text}=x", "--yes"),
        ("stats", text),
    ):
        result = run(*arguments)
        assert result.exit_code in (1, 2), arguments
        assert "Error: " in result.stderr
    for name in ("user_id", "model", f"metadata.{text}"):
        result = run("erase", "--where", f"{name}={text}", "--yes", "--json")
        assert json.loads(result.stdout)["chats"] == 0 if "\x00" not in text else result.exit_code == 1


def test_a_text_that_no_database_can_hold_is_refused_or_stored_in_another_form(store, tables):
    for text in ("x\x00y", "\ud800"):
        chat = create_chat(store, model="test", llm=ScriptedLLM(text))
        for act in (
            lambda: chat.ask(text),  # noqa: B023
            lambda: chat.add_message("user", text),  # noqa: B023
            lambda: create_chat(store, model="test", user_id=text),  # noqa: B023
            lambda: create_chat(store, model="test", metadata={text: "x"}),  # noqa: B023
            lambda: create_chat(store, model=text),  # noqa: B023
            lambda: erase(store, {"user_id": text}),  # noqa: B023
            lambda: erase(store, {f"metadata.{text}": "x"}),  # noqa: B023
            lambda: erase(store, {"metadata.x": text}),  # noqa: B023
        ):
            with pytest.raises(InvalidValue, match=r"NUL|surrogate"):
                act()
        assert chat.messages() == []
        assert json.loads(chat.ask("Hello?").content) == text


def test_many_who_say_such_things_at_once_disturb_nobody(store, tables):
    def say(text: str) -> list[str | None]:
        chat = create_chat(store, model="test", llm=ScriptedLLM(text), user_id=text)
        chat.ask(text)
        return [message.content for message in chat.messages()]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(say, HOSTILE)) == [[text, text] for text in HOSTILE]

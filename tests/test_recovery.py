"""Turns whose process died: what is on record of them, and how they are ended."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from unittest.mock import patch

import peewee as pw
import pytest
from conftest import WAYS, Ask, rows
from cryptography.fernet import Fernet
from freezegun import freeze_time

from llm_orm import (
    RETRY,
    Chat,
    DatabaseUnavailable,
    InvalidValue,
    Middleware,
    PIIMask,
    Recovered,
    ReplyNotSaved,
    Store,
    TurnContext,
    WrongKey,
    connect,
    create_chat,
    load_chat,
    recover,
    tool,
)
from llm_orm.claim import Claim
from llm_orm.rows import Rows
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

DIED = (0, "ProcessDied", None)


class Dies(BaseException):
    """Of a process that is killed nothing hears of it."""


@contextmanager
def killed() -> Iterator[None]:
    """What a killed process does not do: give its turn up."""
    with patch.object(Rows, "give_up", lambda self, error: None), pytest.raises(Dies):
        yield


def dies(keywords: dict[str, Any]) -> str:
    raise Dies


def chat_with(store: Store, *script: Any, **options: Any) -> Chat:
    return create_chat(store, model="gpt-4o", llm=ScriptedLLM(*script), retries=0, **options)


def again(chat: Chat, *script: Any, **options: Any) -> Chat:
    loaded = load_chat(chat.store, chat.chat_id, llm=ScriptedLLM(*script), retries=0, **options)
    assert loaded is not None
    return loaded


def unrecorded(store: Store) -> None:
    """The dying process has written nothing of the call that it died in."""
    with store.connection():
        store.records.request.delete().where(store.records.request.error == "Dies").execute()


@tool
def look(city: str) -> str:
    return f"rain in {city}"


def messages(store: Store) -> list[tuple]:
    return rows(store, "message", "role", "status", "content")


QUESTION = ("user", "completed", "Weather?")


# recover()


def test_a_turn_that_had_said_nothing_leaves_its_question(store: Store):
    chat = chat_with(store, dies)
    with killed():
        chat.ask("Weather?")
    done = recover(store, older_than=0)
    assert [(each.chat_id, each.outcome, each.text) for each in done] == [(chat.chat_id, "removed", None)]
    assert messages(store) == [QUESTION]
    assert recover(store, older_than=0) == []
    assert again(chat, "Rain.").retry().content == "Rain."


@pytest.mark.parametrize("table", ["tool_call", "request"])
def test_a_table_that_the_application_does_without_is_not_missed(store: Store, table: str):
    chat = chat_with(store, dies, persistence={f"{table}s": False})
    with store.connection():
        getattr(store.records, table).drop_table(cascade=not store.is_sqlite)
    with killed():
        chat.ask("Weather?")
    assert [each.outcome for each in recover(store, older_than=0)] == ["removed"]
    assert messages(store) == [QUESTION]


def test_what_a_turn_had_said_before_its_tools_is_kept_as_incomplete(store: Store):
    chat = chat_with(store, Say("Let me see.", calls=[Call("look", city="Rome")]), dies, tools=[look])
    with killed():
        chat.ask("Weather?")
    assert [each.outcome for each in recover(store, older_than=0)] == ["kept"]
    assert messages(store) == [QUESTION, ("assistant", "incomplete", "Let me see.")]
    later = again(chat, "Rain.")
    later.ask("And?")
    shown = later.options.llm.requests[0]["messages"]
    assert [message["role"] for message in shown] == ["user", "assistant", "tool", "user"]


def test_a_reply_that_was_whole_and_only_to_be_looked_at_is_completed(store: Store, ask: Ask):
    def look_at(reply: Any) -> None:
        raise Dies

    chat = chat_with(store, "It rains.").after_response(look_at)
    with patch.object(Rows, "finish", lambda self, reply: None), killed():
        ask(chat, "Weather?")
    assert messages(store)[1] == ("assistant", "pending", "It rains.")
    assert [each.outcome for each in recover(store, older_than=0)] == ["completed"]
    assert messages(store) == [QUESTION, ("assistant", "completed", "It rains.")]


def test_a_reply_that_was_whole_is_not_lost_to_whoever_asks_next(store: Store):
    def look_at(reply: Any) -> None:
        raise Dies

    chat = chat_with(store, "It rains.").after_response(look_at)
    with patch.object(Rows, "finish", lambda self, reply: None), killed():
        chat.ask("Weather?")
    again(chat, "Yes.").ask("Sure?", stale_after=0)
    assert messages(store)[:2] == [QUESTION, ("assistant", "completed", "It rains.")]


def test_a_dry_run_says_what_it_found_and_changes_nothing(store: Store):
    with freeze_time(datetime(2030, 1, 1, tzinfo=UTC), real_asyncio=True) as time:
        chat = chat_with(store, dies)
        with killed():
            chat.ask("Weather?")
        before = messages(store)
        time.tick(timedelta(seconds=1000))
        found = recover(store, dry_run=True)
        message = chat.messages()[1]
        assert found == [Recovered(chat.chat_id, message.id, silent_s=1000.0, text=None, outcome=None)]
    assert messages(store) == before


def test_a_turn_counts_as_dead_after_its_time_and_not_before(store: Store):
    with freeze_time(datetime(2030, 1, 1, tzinfo=UTC), real_asyncio=True) as time:
        chat = chat_with(store, dies)
        with killed():
            chat.ask("Weather?")
        time.tick(timedelta(seconds=899))
        assert recover(store) == []
        time.tick(timedelta(seconds=2))
        assert len(recover(store)) == 1


def test_a_turn_of_another_chat_is_left_alone(store: Store):
    chats = [chat_with(store, dies), chat_with(store, dies)]
    for chat in chats:
        with killed():
            chat.ask("Weather?")
    assert [each.chat_id for each in recover(store, older_than=0, chat_id=str(chats[1].chat_id))] == [chats[1].chat_id]
    assert [each.chat_id for each in recover(store, older_than=0)] == [chats[0].chat_id]


def test_a_turn_that_waits_for_a_person_is_left_alone(store: Store):
    pay = tool(requires_approval=True)(look.execute)
    chat = chat_with(store, Call(pay.name, city="Rome"), "Done.", tools=[pay])
    assert chat.ask("Weather?").status == "pending"
    assert recover(store, older_than=0) == []
    chat.approve(chat.pending_approvals()[0])
    assert chat.resume().content == "Done."


def test_a_turn_that_is_taken_up_at_this_moment_is_left_to_who_took_it(store: Store):
    chat = chat_with(store, dies)
    with killed():
        chat.ask("Weather?")
    later, found = again(chat, "Rain."), store.found

    def resumed_meanwhile(query: Any) -> list[Any]:
        store.found = found  # type: ignore[method-assign]
        messages = found(query)
        later.resume(stale_after=0)
        return messages

    store.found = resumed_meanwhile  # type: ignore[method-assign]
    assert recover(store, older_than=0) == []
    assert messages(store) == [QUESTION, ("assistant", "completed", "Rain.")]


def test_a_parked_turn_whose_resume_is_broken_off_is_parked_still(store: Store):
    pay = tool(requires_approval=True)(look.execute)
    chat = chat_with(store, Call(pay.name, city="Rome"), "Done.", tools=[pay])
    chat.ask("Weather?")
    chat.approve(chat.pending_approvals()[0])
    with patch.object(Claim, "_read_progress", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        chat.resume()
    assert rows(store, "message", "parked_at")[1] != (None,)
    assert chat.resume().content == "Done."


@pytest.mark.parametrize("older_than", [-1, 5, float("nan"), float("inf"), "15m", None, True])
def test_a_time_in_which_no_turn_can_be_told_to_be_dead_is_refused(store: Store, older_than: Any):
    with pytest.raises(InvalidValue, match="older_than"):
        recover(store, older_than=older_than)


def test_an_id_that_is_none_is_refused(store: Store):
    with pytest.raises(InvalidValue, match="'x' is not the id of a chat"):
        recover(store, chat_id="x")


# A call that may have been under way


def recovered(chat: Chat) -> None:
    recover(chat.store, older_than=0)


def resumed(chat: Chat) -> None:
    again(chat, "Rain.", tools=[look]).resume(stale_after=0)


def asked(chat: Chat) -> None:
    again(chat, "Rain.", tools=[look]).ask("And?", stale_after=0)


def cancelled(chat: Chat) -> None:
    with freeze_time(datetime.now(UTC) + timedelta(minutes=5), real_asyncio=True):
        assert chat.cancel()


ENDS = [recovered, resumed, asked, cancelled]


@pytest.mark.parametrize("end", ENDS)
def test_a_call_in_which_its_process_died_is_on_record_with_its_cost_unknown(store: Store, end: Callable):
    chat = chat_with(store, Call("look", city="Rome"), dies, tools=[look])
    with killed():
        chat.ask("Weather?")
    unrecorded(store)
    end(chat)
    known = rows(store, "request", "status_code", "error", "cost", "round", "model", "provider", "turn_id")
    question = chat.messages()[0].id
    assert known[1] == (*DIED, 1, "gpt-4o", known[0][5], question)
    assert [row[:2] for row in known[2:]] == ([(200, None)] if end in (resumed, asked) else [])


@pytest.mark.parametrize("end", ENDS)
def test_a_turn_that_died_in_a_tool_had_no_call_under_way(store: Store, end: Callable):
    @tool(name="look")
    def looks_and_dies(city: str) -> str:
        raise Dies

    chat = chat_with(store, Call("look", city="Rome"), tools=[looks_and_dies])
    with killed():
        chat.ask("Weather?")
    end(chat)
    assert "ProcessDied" not in [row[0] for row in rows(store, "request", "error")]


def test_a_correction_in_which_its_process_died_is_on_record_and_what_was_sent_back_is_not_completed(store: Store):
    class SendsBack(Middleware):
        def on_response(self, context: TurnContext, reply: Any) -> Any:
            return RETRY("Again.")

    chat = chat_with(store, "No.", dies, middlewares=[SendsBack()])
    with killed():
        chat.ask("Weather?")
    unrecorded(store)
    assert [each.outcome for each in recover(store, older_than=0)] == ["kept"]
    assert messages(store)[1] == ("assistant", "incomplete", "No.")
    assert [row[:2] for row in rows(store, "request", "status_code", "error")] == [(200, None), DIED[:2]]


def test_a_turn_that_was_taken_for_dead_says_itself_what_its_call_did_cost(store: Store, ask: Ask):
    """Whoever ended it put a call on record of which nothing was known; that row goes once something is."""
    chats: list[Chat] = []

    def model(keywords: dict[str, Any]) -> Say:
        recover(store, older_than=0)
        assert [row[0] for row in rows(store, "request", "error")] == ["ProcessDied"]
        return Say("Late.", input_tokens=7)

    chats.append(chat_with(store, model))
    with pytest.raises(ReplyNotSaved) as raised:
        ask(chats[0], "Weather?")
    assert raised.value.reply.content == "Late."
    assert rows(store, "request", "status_code", "error", "input_tokens") == [(200, None, 7)]


# What a stream had said


@pytest.mark.parametrize("way", ["ask_stream", "aask_stream"])
def test_the_text_of_a_stream_that_was_saved_survives_its_process(store: Store, way: str):
    chat = chat_with(store, Say("One two three", chunks=["One ", "two ", "three"], error=Dies()), save_every=0)
    with killed():
        WAYS[way](chat, "Count")
    unrecorded(store)
    assert messages(store)[1] == ("assistant", "pending", "One two three")
    again(chat, "Fine.").ask("And?", stale_after=0)  # which would otherwise roll the dead turn back
    assert messages(store)[:2] == [("user", "completed", "Count"), ("assistant", "incomplete", "One two three")]
    assert rows(store, "message", "content_raw")[1] == (None,)
    assert rows(store, "request", "error", "streamed")[0] == ("ProcessDied", True)


def test_what_was_saved_of_a_stream_is_not_taken_for_its_reply(store: Store):
    chat = chat_with(store, Say("One two three", chunks=["One ", "two "], error=Dies()), save_every=0)
    with killed():
        for _ in chat.ask_stream("Count"):
            pass
    assert again(chat, "One two three four").resume(stale_after=0).content == "One two three four"


def test_a_stream_that_cannot_be_saved_on_the_way_goes_on(store: Store, caplog: pytest.LogCaptureFixture):
    chat = chat_with(store, Say("One two", chunks=["One ", "two"]), save_every=0)
    with patch.object(Rows, "_mark", side_effect=DatabaseUnavailable("gone")):
        assert [chunk.content for chunk in chat.ask_stream("Count")] == ["One ", "two"]
    assert messages(store)[1] == ("assistant", "completed", "One two")
    assert "could not be written: gone" in caplog.text


def test_what_is_masked_is_not_kept_in_part(store: Store):
    """A number that a stream is in the middle of does not look like one yet."""
    chunks = ["Yours is, as far as I can see from the papers that you have sent me, 4111 1111 ", "1111 1111"]
    chat = chat_with(store, Say("".join(chunks), chunks=chunks, error=Dies()), save_every=0, middlewares=[Masks()])
    with killed():
        for _ in chat.ask_stream("Which card?"):
            pass
    saved = messages(store)[1][2]
    assert "Yours is".startswith(saved[:8])
    assert "4111" not in saved


class Masks(PIIMask):
    def __init__(self) -> None:
        super().__init__(stored=True)


# Errors of the database that pass


def fails_once(store: Store, word: str, sql: str, *, behind: bool = False) -> list[int]:
    """The first statement with a word in it meets an error of the server's, before or behind it; (how often it ran)."""
    database: Any = store.database
    execute, ran = database.execute_sql, []

    def execute_sql(text: str, *arguments: Any, **keywords: Any) -> Any:
        if word in text:
            ran.append(1)
            if len(ran) == 1:
                if behind:
                    execute(text, *arguments, **keywords)
                return execute(sql)
        return execute(text, *arguments, **keywords)

    database.execute_sql = execute_sql
    return ran


SERIALIZATION = "DO $$ BEGIN RAISE EXCEPTION 'could not serialize' USING ERRCODE = '40001'; END $$"
DEADLOCK = "DO $$ BEGIN RAISE EXCEPTION 'deadlock detected' USING ERRCODE = '40P01'; END $$"
LOST = "SELECT pg_terminate_backend(pg_backend_pid())"


@pytest.fixture
def postgres_store(postgres_url: str) -> Iterator[Store]:
    with connect(postgres_url) as store:
        store.create_tables()
        yield store


@pytest.mark.parametrize("word", ["INSERT INTO", "UPDATE"], ids=["claim", "end"])
@pytest.mark.parametrize("sql", [SERIALIZATION, DEADLOCK, LOST], ids=["serialization", "deadlock", "lost"])
def test_a_transaction_that_failed_for_what_passes_is_run_again(postgres_store: Store, ask: Ask, word: str, sql: str):
    store = postgres_store
    chat = chat_with(store, "Rain.")
    ran = fails_once(store, word, sql)
    assert ask(chat, "Weather?").content == "Rain."
    assert len(ran) >= 2
    assert messages(store) == [QUESTION, ("assistant", "completed", "Rain.")]
    assert rows(store, "request", "status_code") == [(200,)]


@pytest.mark.parametrize("script", [["Rain."], [Call("look", city="Rome"), "Rain."]], ids=["plain", "tools"])
@pytest.mark.parametrize("word", ["'pending'", "UPDATE"], ids=["claim", "end"])
def test_what_was_committed_before_the_connection_was_lost_is_there_once(
    postgres_store: Store, ask: Ask, word: str, script: list[Any]
):
    store = postgres_store
    chat = chat_with(store, *script, tools=[look])
    fails_once(store, word, LOST, behind=True)
    assert ask(chat, "Weather?").content == "Rain."
    assert messages(store) == [QUESTION, ("assistant", "completed", "Rain.")]
    assert len(rows(store, "request", "id")) == len(script)
    assert len(rows(store, "tool_call", "id")) == len(script) - 1
    assert again(chat, "Dry.").ask("And?").content == "Dry."


def test_a_turn_that_was_taken_up_before_the_connection_was_lost_is_taken_up_once(postgres_store: Store):
    chat = chat_with(postgres_store, dies)
    with killed():
        chat.ask("Weather?")
    unrecorded(postgres_store)
    later = again(chat, "Rain.")
    fails_once(postgres_store, '"cancelled_at" = NULL', LOST, behind=True)
    fails_once(postgres_store, "parked_at", LOST, behind=True)
    assert later.resume(stale_after=0).content == "Rain."
    assert [row[0] for row in rows(postgres_store, "request", "error")] == ["ProcessDied", None]


@pytest.mark.parametrize("code", ["57014", "53100", "25006"], ids=["timeout", "disk full", "read-only"])
def test_an_error_that_does_not_pass_is_told_at_once(postgres_store: Store, code: str):
    chat = chat_with(postgres_store, "Rain.")
    ran = fails_once(
        postgres_store, "INSERT INTO", f"DO $$ BEGIN RAISE EXCEPTION 'it says no' USING ERRCODE = '{code}'; END $$"
    )
    with pytest.raises(DatabaseUnavailable, match="it says no"):
        chat.ask("Weather?")
    assert ran == [1]
    assert messages(postgres_store) == []


def test_a_statement_on_a_connection_of_the_callers_own_is_not_run_again(postgres_store: Store):
    chat = chat_with(postgres_store, "Rain.")
    ran = fails_once(postgres_store, "INSERT INTO", LOST)
    with postgres_store.connection(), pytest.raises(DatabaseUnavailable):
        chat.ask("Weather?")
    assert ran == [1]


# A turn that was taken for dead, and is alive


@pytest.mark.parametrize("on_error", ["rollback", "keep"])
def test_a_turn_that_was_taken_for_dead_does_not_end_the_one_that_took_it_up(store: Store, ask: Ask, on_error: str):
    def model(keywords: dict[str, Any]) -> str:
        assert taken_up == []
        stream = again(chats[0], "Rain, I say.", on_error=on_error).resume_stream(stale_after=0)
        taken_up.append(stream)
        next(stream)
        raise ProviderError(400)

    taken_up: list[Any] = []
    chats = [chat_with(store, model, on_error=on_error)]
    with pytest.raises(ProviderError):
        ask(chats[0], "Weather?")
    for _ in taken_up[0]:
        pass
    assert taken_up[0].message.content == "Rain, I say."
    assert messages(store) == [QUESTION, ("assistant", "completed", "Rain, I say.")]
    assert [row[0] for row in rows(store, "request", "status_code")] == [400, 200]


# What the model is told of tools that were broken off


@pytest.mark.parametrize("end", [recovered, asked], ids=["recover", "ask"])
def test_the_model_is_told_of_the_tools_that_ran_and_of_the_one_that_nobody_knows_of(store: Store, end: Callable):
    @tool
    def book(city: str) -> str:
        if city == "Paris":
            raise Dies
        return f"booked {city}"

    cities = [Call("book", city=city) for city in ("Rome", "Paris", "Oslo")]
    chat = chat_with(store, cities, tools=[book])
    with killed():
        chat.ask("Weather?")
    later = again(chat, "Rain.", "Well.", tools=[book], on_error="keep")
    if end is recovered:
        recover(store, older_than=0)
    later.ask("And?", stale_after=0)
    told = [message["content"] for message in later.options.llm.requests[0]["messages"] if message["role"] == "tool"]
    assert told == [
        "booked Rome",
        "The tool was interrupted while it ran. Whether it did its work is not known.",
        "Not run: the turn was broken off before.",
    ]


# What is owed


def test_the_row_of_a_call_that_the_database_did_not_take_is_written_before_the_next_turn(store: Store, ask: Ask):
    database: Any = store.database
    execute, is_gone = database.execute_sql, []

    def execute_sql(text: str, *arguments: Any, **keywords: Any) -> Any:
        if is_gone and "cancelled_at IS NOT NULL" not in text:
            raise pw.OperationalError("gone")
        return execute(text, *arguments, **keywords)

    def model(keywords: dict[str, Any]) -> Say:
        is_gone.append(1)
        return Say("Paid.", cost="0.25")

    database.execute_sql = execute_sql
    chat = chat_with(store, model, "Free.")
    with pytest.raises(ReplyNotSaved):
        ask(chat, "Weather?")
    is_gone.clear()
    assert chat.stats().cost == Decimal("0.25")
    ask(chat, "And?", stale_after=0)
    assert [row[0] for row in rows(store, "request", "error")] == ["ReplyNotSaved", None]


def test_a_turn_that_cannot_be_read_does_not_keep_the_others_from_being_ended(database_url: str):
    one, other = (Fernet.generate_key() for _ in range(2))
    for key in (one, other):
        with connect(database_url, encrypt=key) as store:
            store.create_tables()
            with killed():
                chat_with(store, Say("Let me see.", calls=[Call("look", city="Rome")]), dies, tools=[look]).ask("Hi")
    with connect(database_url, encrypt=other) as store:
        with pytest.raises(WrongKey):
            recover(store, older_than=0)
        assert sorted(rows(store, "message", "role", "status")) == [
            ("assistant", "incomplete"),
            ("assistant", "pending"),
            ("user", "completed"),
            ("user", "completed"),
        ]

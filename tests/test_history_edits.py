"""History that no turn wrote: messages that are added, copies of a chat, and how many tokens it all comes to."""

import asyncio
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from uuid import uuid4

import peewee as pw
import pytest
from conftest import WAYS, Ask, rows
from provider import Answer, Provider
from provider import Call as ProviderCall

from llm_orm import (
    LLM,
    Agent,
    Attachment,
    Chat,
    ChatBusy,
    ChatGone,
    EmptyMessage,
    InvalidFile,
    InvalidValue,
    NoModel,
    NothingToRetry,
    PIIMask,
    Retries,
    Stats,
    Store,
    UnknownKeyword,
    connect,
    create_agent_session,
    create_chat,
    load_agent_session,
    load_chat,
    tool,
)
from llm_orm.records import LlmMessage
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

PNG = b"\x89PNG\r\n\x1a\n\x00\x00a cat"
BLUE = b"\x89PNG\r\n\x1a\n\x00\x00a blue cat"
NO_RETRY = Retries(attempts=0)


@tool
def look(where: str) -> str:
    """Look somewhere."""
    return f"looked {where}"


@tool(requires_approval=True)
def send(to: str) -> str:
    """Send it."""
    return f"sent to {to}"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def new_chat(store: Store, *script: Any, **options: Any) -> Chat:
    return create_chat(store, **{"model": "test", "llm": ScriptedLLM(*script), "retries": NO_RETRY, **options})


def shown(chat: Chat) -> list[dict[str, Any]]:
    """What the model was shown last."""
    return chat.options.llm.requests[-1]["messages"]


def everything(store: Store) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table."""
    with store.connection():
        return {record.__name__: list(record.select().order_by(record.id).dicts()) for record in store.records}


# add_message


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_a_message_can_be_added_in_three_roles(store: Store, ask: Ask, role: str):
    chat = new_chat(store, "One.", "Two.")
    ask(chat, "1?")

    message = chat.add_message(role, "It is late.")

    assert (message.role, message.content, message.status, message.position) == (role, "It is late.", "completed", 2)
    assert chat.messages()[-1] == message
    assert rows(store, "message", "position", "role", "content", "content_raw", "input_tokens")[2:] == [
        (2, role, "It is late.", None, None)
    ]
    ask(chat, "2?")
    assert shown(chat) == [user("1?"), said("One."), {"role": role, "content": "It is late."}, user("2?")]
    assert len(rows(store, "request", "id")) == 2


def test_a_conversation_that_is_imported_goes_on(store: Store, ask: Ask):
    chat = new_chat(store, "Ada.", instructions="Be brief.")
    chat.add_message("system", "It is Monday.")
    chat.add_message("user", "I am Ada.")
    chat.add_message("assistant", "Hello Ada!")
    assert [message.position for message in chat.messages()] == [0, 1, 2]
    ask(chat, "Who am I?")
    assert shown(chat) == [
        system("Be brief."),
        system("It is Monday."),
        user("I am Ada."),
        said("Hello Ada!"),
        user("Who am I?"),
    ]
    assert chat.stats().requests == 1


def test_a_question_that_was_added_is_answered_by_retry(store: Store):
    chat = new_chat(store, "Ada.")
    chat.add_message("user", "I am Ada. Who am I?", files=PNG)
    chat.retry()
    assert rows(store, "message", "role", "content")[1] == ("assistant", "Ada.")
    assert len(shown(chat)[0]["content"]) == 2
    with pytest.raises(NothingToRetry):
        chat.retry()


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("tool", r"role='tool': a message is of 'user', 'assistant', 'system'; a tool's result belongs to its call"),
        ("model", r"role='model': a message is of 'user', 'assistant', 'system'$"),
        (None, "role=None"),
    ],
)
def test_other_roles_are_refused(store: Store, role: Any, message: str):
    chat = new_chat(store)
    with pytest.raises(InvalidValue, match=message):
        chat.add_message(role, "Hi")
    assert rows(store, "message", "id") == []


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", EmptyMessage),
        (" \n", EmptyMessage),
        ("a\x00b", InvalidValue),
        ("\ud800", InvalidValue),
        (None, InvalidValue),
        (7, InvalidValue),
    ],
)
def test_a_text_that_says_nothing_or_cannot_be_stored_is_refused(store: Store, content: Any, error: type[Exception]):
    chat = new_chat(store)
    for role in ("user", "assistant", "system"):
        with pytest.raises(error):
            chat.add_message(role, content)
    assert rows(store, "message", "id") == []


def test_no_message_is_added_while_a_turn_runs(store: Store):
    chat = new_chat(store, "One two three.", "Two.")
    with chat.ask_stream("1?") as stream:
        next(stream)
        before = everything(store)
        for each in (chat, load_chat(store, chat.id)):
            assert each is not None
            with pytest.raises(ChatBusy, match=r"busy with a turn.*try again when it has ended"):
                each.add_message("system", "It is late.")
            with pytest.raises(ChatBusy):
                each.add_message("user", "It is late.", files=PNG)
        assert everything(store) == before
        list(stream)
    chat.add_message("system", "It is late.")
    assert [message.role for message in chat.messages()] == ["user", "assistant", "system"]


def test_no_message_is_added_while_a_turn_waits_for_approval(store: Store):
    chat = new_chat(store, Call("send", to="Ada"), "Sent.", tools=[send])
    chat.ask("Send it.")
    with pytest.raises(ChatBusy, match="waits for approval"):
        chat.add_message("user", "And hurry.")
    chat.approve(chat.pending_approvals()[0])
    chat.resume()
    assert chat.add_message("user", "Thanks.").position == 2


def test_files_can_be_added_with_a_message_of_the_user(store: Store, ask: Ask):
    chat = new_chat(store, "A cat.", "Yes.")
    message = chat.add_message("user", "", files=[PNG, ("a.txt", b"Hi")])
    assert (message.content, message.content_raw) == (None, {"attachments": 2})
    assert [(row.position, row.content) for row in chat.attachments(message)] == [(0, PNG), (1, b"Hi")]
    ask(chat, "What is it?")
    assert [part["type"] for part in shown(chat)[0]["content"]] == ["image_url", "text"]
    for role in ("assistant", "system"):
        with pytest.raises(InvalidValue, match=f"files come with messages of the user, not with role='{role}'"):
            chat.add_message(role, "Here.", files=PNG)
    before = everything(store)
    with pytest.raises(InvalidFile, match="is empty"):
        chat.add_message("user", "Here.", files=[PNG, b""])
    assert everything(store) == before


def test_of_added_files_only_the_reference_is_kept_where_files_are_not(store: Store):
    chat = new_chat(store, store_files=False)
    chat.add_message("user", "Here.", files=PNG)
    assert [(row.content, row.size) for row in chat.attachments()] == [(None, len(PNG))]


def test_what_a_mask_lets_the_database_keep_holds_for_messages_that_are_added(store: Store):
    chat = new_chat(store, middlewares=[PIIMask(stored=True)])
    chat.add_message("user", "I am ada@example.com", files=("a.txt", b"bob@example.com wrote"))
    assert rows(store, "message", "content") == [("I am [REDACTED]",)]
    assert chat.attachments()[0].content == b"[REDACTED] wrote"


def test_no_message_is_added_to_a_chat_that_was_deleted(store: Store):
    chat = new_chat(store)
    other = load_chat(store, chat.id)
    assert other is not None
    other.delete()
    with pytest.raises(ChatGone):
        chat.add_message("user", "Hi")
    with pytest.raises(ChatGone):
        chat.add_message("user", "Hi", files=PNG)
    assert everything(store)["LlmMessage"] == []


def test_an_added_message_touches_its_chat(store: Store):
    chat = new_chat(store)
    with store.connection():
        earlier = chat.record.updated_at - timedelta(days=1)
        store.records.chat.update(updated_at=earlier).execute()
    message = chat.add_message("user", "Hi")
    assert chat.reload().record.updated_at == message.created_at


def test_a_long_lived_chat_sees_what_another_holder_added(store: Store, database_url: str, ask: Ask):
    mine = new_chat(store, "One.", "Two.")
    ask(mine, "1?")
    with connect(database_url) as other:
        theirs = load_chat(other, mine.id)
        assert theirs is not None
        theirs.add_message("system", "It is late.")
        theirs.add_message("user", "Look.", files=PNG)
    ask(mine, "2?")
    assert [message["role"] for message in shown(mine)] == ["user", "assistant", "system", "user", "user"]


def test_messages_are_added_in_a_transaction_of_the_callers(store: Store):
    chat, busy = new_chat(store), new_chat(store, "One two.")
    with busy.ask_stream("1?") as stream:
        next(stream)
        with store.connection(), store.database.atomic():
            chat.add_message("user", "1?")
            with pytest.raises(ChatBusy):
                busy.add_message("user", "2?")
            chat.add_message("assistant", "One.")
        with pytest.raises(RuntimeError), store.connection(), store.database.atomic():
            chat.add_message("user", "2?")
            raise RuntimeError
    assert [message.content for message in chat.messages()] == ["1?", "One."]


def test_a_message_whose_place_another_takes_at_that_moment_comes_after_it(store: Store):
    chat = new_chat(store)
    with ThreadPoolExecutor(1) as executor:
        with store.connection(), store.database.atomic():
            chat.add_message("user", "first")
            other = executor.submit(chat.add_message, "user", "second")
            while not store.is_sqlite and not other.done() and not is_waited_for(store):
                pass
        assert other.result().position == 1
    assert [message.content for message in chat.messages()] == ["first", "second"]


def is_waited_for(store: Store) -> bool:
    return bool(store.database.execute_sql("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone())


def test_a_message_is_added_from_asyncio(store: Store):
    chat = new_chat(store)
    message = asyncio.run(chat.aadd_message("user", "Hi", files=PNG))
    assert (message.position, len(chat.attachments(message))) == (0, 1)


# A chat with everything in it


COLUMNS = {"user_id": "u_1"}


def rich_chat(store: Store, **options: Any) -> Chat:
    """Imported messages, files, thinking, tool rounds, pictures, an answer that failed, something the system said."""
    rounds = Say("Let me look.", thinking="Up.", signature="sig-0", calls=[Call("look", where="up", signature="g-1")])
    script = (
        rounds,
        Say(images=[BLUE], calls=[Call("look", where="down"), Call("look", where="left")]),
        Say("A cat.", thinking="Sure.", signature="sig-1"),
        ProviderError(400),
        Say("Here.", images=[PNG]),
    )
    chat = new_chat(store, *script, tools=[look], instructions="Be brief.", metadata={"plan": "pro"}, **options)
    chat.add_message("user", "I am Ada.")
    chat.add_message("assistant", "Hello Ada!")
    chat.ask("What is it?", files=[PNG, ("notes.md", b"# Notes"), "https://files.test/a.png"])
    with pytest.raises(ProviderError):
        chat.ask("And that?")
    chat.add_message("system", "It is late.")
    chat.ask("Draw it.")
    return chat


def test_a_chat_with_everything_in_it_is_shown_the_same_after_it_is_loaded(store: Store, database_url: str, ask: Ask):
    chat = rich_chat(store)
    within = chat.options.llm.requests[2]["messages"]
    copy = chat.fork()
    ask(chat, "Sure?", llm=(llm := ScriptedLLM("Yes.")))
    expected = llm.requests[0]["messages"]
    assert expected[: len(within)] == within
    assert [message["role"] for message in expected] == [
        *["system", "user", "assistant", "user"],
        *["assistant", "tool", "assistant", "tool", "tool", "assistant"],
        *["user", "system", "user", "assistant", "user"],
    ]
    with connect(database_url) as other:
        again = load_chat(other, chat.id, llm=ScriptedLLM("Yes!"))
        forked = load_chat(other, copy.id, llm=ScriptedLLM("Yes."))
        assert again is not None
        assert forked is not None
        ask(again, "Really?")
        ask(forked, "Sure?")
        assert shown(again) == [*expected, said("Yes."), user("Really?")]
        assert shown(forked) == expected


# fork


def test_a_fork_copies_the_history_and_leaves_the_original_alone(store: Store):
    chat = rich_chat(store, **COLUMNS)
    before = everything(store)

    copy = chat.fork()

    after = everything(store)
    known = {row["id"] for each in before.values() for row in each}
    assert {name: [row for row in each if row["id"] in known] for name, each in after.items()} == before
    assert copy.id not in known
    for name, own in (
        ("LlmMessage", {"id", "chat", "owner", "input_tokens", "output_tokens", "cached_tokens", "thinking_tokens"}),
        ("LlmToolCall", {"id", "chat", "message", "turn_id"}),
        ("LlmAttachment", {"id", "message"}),
    ):
        copies = [row for row in after[name] if row["id"] not in known]
        assert in_order(copies, own) == in_order(before[name], own)
    assert after["LlmRequest"] == before["LlmRequest"]


def in_order(rows: list[dict[str, Any]], own: set[str]) -> list[dict[str, Any]]:
    """Rows less what is their own, in an order that their copies have too."""
    kept = [{name: value for name, value in row.items() if name not in own} for row in rows]
    return sorted(kept, key=lambda row: repr(sorted(row.items())))


def test_a_fork_has_cost_nothing(store: Store):
    copy = rich_chat(store).fork()
    assert (copy.requests(), copy.stats()) == ([], Stats(tool_calls=3))
    tokens = ("input_tokens", "output_tokens", "cached_tokens", "thinking_tokens")
    assert {getattr(message, name) for message in copy.messages() for name in tokens} == {None}


def test_a_fork_keeps_model_metadata_and_the_applications_columns(store: Store):
    chat = create_chat(
        store, model="test", provider="p", instructions="Be brief.", metadata={"a": [1, None]}, user_id="u_1"
    )
    with store.connection():  # which another process has changed meanwhile
        store.records.chat.update(user_id="u_2").execute()
    copy = chat.fork()
    again = load_chat(store, copy.id, user_id="u_2")
    assert again is not None
    for each in (copy, again):
        assert (each.model, each.provider, each.instructions) == ("test", "p", "Be brief.")
        assert (each.metadata, each.record.user_id) == ({"a": [1, None]}, "u_2")  # type: ignore[attr-defined]
    assert copy.record.created_at > chat.record.created_at


def test_a_fork_asks_as_the_chat_does(store: Store, ask: Ask):
    told: list[str] = []
    chat = new_chat(store, "One.", Call("look", where="up"), "Two.", tools=[look], temperature=0.5)
    chat.with_instructions("Be brief.").on_end_message(lambda message: told.append(message.content))
    ask(chat, "1?")
    copy = chat.fork()
    ask(copy, "2?")
    request = chat.options.llm.requests[-1]
    assert (request["temperature"], request["messages"][0]) == (0.5, system("Be brief."))
    assert told == ["One.", "Two."]
    copy.with_instructions("Be long.", replace=True)
    assert chat.instructions == "Be brief."


def test_a_fork_goes_its_own_way(store: Store, ask: Ask):
    chat = new_chat(store, "One.", "Two.", "Other.", "Three.")
    ask(chat, "1?")
    copy = chat.fork()
    ask(chat, "2?")
    ask(copy, "Other?")
    ask(chat, "3?")
    assert shown(chat) == [user("1?"), said("One."), user("2?"), said("Two."), user("3?")]
    assert [message.content for message in copy.messages()] == ["1?", "One.", "Other?", "Other."]
    assert copy.stats().requests == 1
    copy.delete()
    assert len(chat.messages()) == 6


AT: dict[str, Callable[[LlmMessage], Any]] = {
    "message": lambda message: message,
    "id": lambda message: message.id,
    "id as text": lambda message: str(message.id),
    "position": lambda message: message.position,
}


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize("position", [0, 1, 3, 5])
def test_a_fork_goes_as_far_as_the_message_that_is_named(store: Store, at: str, position: int):
    chat = rich_chat(store)
    copy = chat.fork(AT[at](chat.messages()[position]))
    assert [message.content for message in copy.messages()] == [
        message.content for message in chat.messages()[: position + 1]
    ]
    calls = 3 if position >= 3 else 0
    assert (len(copy.tool_calls()), len(copy.attachments())) == (calls, [0, 0, 0, 4, 4, 4][position])


UNKNOWN: dict[str, Callable[[Chat], Any]] = {
    "a position behind the last": lambda other: 4,
    "a negative position": lambda other: -1,
    "True": lambda other: True,
    "nobody's id": lambda other: uuid4(),
    "no id": lambda other: "the last one",
    "a message of another chat": lambda other: other.messages()[0],
    "its id": lambda other: other.messages()[0].id,
}


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize("case", UNKNOWN)
def test_a_fork_at_a_message_that_is_not_there_is_refused(store: Store, case: str):
    chat, other = new_chat(store, "One.", "Two."), new_chat(store, "Other.")
    chat.ask("1?")
    chat.ask("2?")
    other.ask("1?")
    before = everything(store)
    with pytest.raises(InvalidValue, match=rf"at=.*: chat {chat.id} has no such message that is settled"):
        chat.fork(UNKNOWN[case](other))
    assert everything(store) == before


def test_a_fork_at_a_question_is_answered_by_retry(store: Store):
    chat = new_chat(store, "One.", "Two.", "Better.")
    chat.ask("1?")
    chat.ask("2?", files=PNG)
    question = chat.messages()[2]
    copy = chat.fork(question)

    copy.retry()

    first, second = (request["messages"] for request in chat.options.llm.requests[1:])
    assert first == second
    assert [message.content for message in copy.messages()] == ["1?", "One.", "2?", "Better."]
    assert [message.content for message in chat.messages()] == ["1?", "One.", "2?", "Two."]


def test_the_tool_calls_of_a_fork_belong_to_its_own_messages(store: Store):
    chat = rich_chat(store)
    copy = chat.fork()
    question, reply = copy.messages()[2:4]
    assert {(call.message_id, call.turn_id, call.chat_id) for call in copy.tool_calls()} == {
        (reply.id, question.id, copy.id)
    }
    assert [(call.round, call.position) for call in copy.tool_calls()] == [(0, 0), (1, 0), (1, 1)]


def test_a_fork_leaves_a_reply_in_the_making_out(store: Store):
    chat = new_chat(store, "One.", "Two three.", "Other.")
    chat.ask("1?")
    with chat.ask_stream("2?") as stream:
        next(stream)
        copy = chat.fork()
        pending = chat.messages()[-1]
        with pytest.raises(InvalidValue, match="no such message that is settled"):
            chat.fork(pending)
        list(stream)
    assert [message.content for message in copy.messages()] == ["1?", "One.", "2?"]
    copy.retry()
    assert shown(copy) == [user("1?"), said("One."), user("2?")]


def test_a_fork_leaves_a_turn_that_waits_for_approval_out(store: Store):
    chat = new_chat(store, Call("send", to="Ada"), tools=[send])
    chat.ask("Send it.")
    copy = chat.fork()
    assert [message.role for message in copy.messages()] == ["user"]
    assert (copy.tool_calls(), len(copy.pending_approvals())) == ([], 0)
    assert len(chat.pending_approvals()) == 1


def test_a_fork_is_there_whole_or_not_at_all(store: Store):
    chat = rich_chat(store)
    before = everything(store)
    with refusing_files(store), pytest.raises(Exception, match="forbidden"):
        chat.fork()
    assert everything(store) == before


class refusing_files:
    """A trigger of the database's own that lets no file be written."""

    def __init__(self, store: Store):
        self.store = store

    def __enter__(self) -> None:
        with self.store.connection():
            run = self.store.database.execute_sql
            if self.store.is_sqlite:
                says = "BEGIN SELECT RAISE(ABORT, 'forbidden'); END"
                run(f"CREATE TRIGGER forbid BEFORE INSERT ON llm_attachment {says}")
                return
            run("CREATE FUNCTION forbid() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'forbidden'; END $$")
            run("CREATE TRIGGER forbid BEFORE INSERT ON llm_attachment FOR EACH ROW EXECUTE FUNCTION forbid()")

    def __exit__(self, *exc: object) -> None:
        with self.store.connection():
            if self.store.is_sqlite:
                self.store.database.execute_sql("DROP TRIGGER forbid")
            else:
                self.store.database.execute_sql("DROP FUNCTION forbid CASCADE")


def test_an_empty_chat_forks(store: Store, ask: Ask):
    copy = new_chat(store, "One.").fork()
    ask(copy, "1?")
    assert shown(copy) == [user("1?")]


def test_a_chat_that_was_deleted_does_not_fork(store: Store):
    chat = new_chat(store)
    chat.delete()
    with pytest.raises(ChatGone):
        chat.fork()
    assert everything(store)["LlmChat"] == []


def test_a_column_that_no_two_chats_may_share_is_named(database_url: str):
    with connect(database_url, chat_fields={"ticket": pw.TextField(unique=True)}) as store:
        store.create_tables()
        chat = create_chat(store, model="test", ticket="t_1")
        with pytest.raises(InvalidValue, match=r"fork\(\): .*ticket='t_1'"):
            chat.fork()
        assert len(everything(store)["LlmChat"]) == 1


def test_a_fork_keeps_the_applications_columns_of_other_tables(database_url: str):
    class Message(LlmMessage):
        mood: Any = pw.TextField(null=True, column_name="app_mood")

    with connect(database_url, models=[Message]) as store:
        store.create_tables()
        chat = new_chat(store, "One.")
        chat.ask("1?")
        with store.connection():
            store.records.message.update(mood="glad").execute()
        assert [message.mood for message in chat.fork().messages()] == ["glad", "glad"]  # type: ignore[attr-defined]


def test_without_rows_of_tool_calls_a_fork_is_shown_their_results_all_the_same(store: Store, ask: Ask):
    chat = new_chat(store, Call("look", where="up"), "Up.", tools=[look], persistence={"tool_calls": False})
    ask(chat, "Look.")
    copy = chat.fork()
    ask(copy, "Sure?", llm=(llm := ScriptedLLM("Yes.")))
    assert [message["role"] for message in llm.requests[0]["messages"]] == "user assistant tool assistant user".split()


def test_of_files_that_were_not_kept_a_fork_has_the_reference(store: Store):
    chat = new_chat(store, "A cat.", store_files=False)
    chat.ask("What is it?", files=PNG)
    assert [(row.content, row.size) for row in chat.fork().attachments()] == [(None, len(PNG))]


def test_a_fork_from_asyncio(store: Store):
    chat = rich_chat(store)
    copy = asyncio.run(chat.afork(at=3))
    assert len(copy.messages()) == 4


class Painter(Agent):
    model = "test"
    instructions = lambda inputs: f"Paint for {inputs['name']}."  # noqa: E731


def test_a_session_forks_into_a_session(store: Store, ask: Ask):
    llm = ScriptedLLM("One.", "Two.", "Three.")
    session = create_agent_session(store, Painter, metadata={"name": "Ada"}, llm=llm)
    ask(session, "1?")
    copy = session.fork()
    assert copy.id != session.id
    ask(copy, "2?")
    again = load_agent_session(store, Painter, copy.id, llm=llm)
    assert again is not None
    ask(again, "3?")
    expected = [system("Paint for Ada."), user("1?"), said("One."), user("2?"), said("Two."), user("3?")]
    assert llm.requests[-1]["messages"] == expected
    assert len(session.messages()) == 2


def test_a_long_chat_forks_in_few_statements(store: Store, monkeypatch: pytest.MonkeyPatch):
    chat = new_chat(store)
    made = [
        {"chat": chat.id, "position": at, "role": "assistant" if at % 2 else "user", "content": f"{at}", "id": uuid4()}
        for at in range(2_000)
    ]
    calls = [
        {"chat": chat.id, "message": each["id"], "turn_id": uuid4(), "round": 0, "position": 0, "tool_call_id": "c"}
        for each in made[1::2]
    ]
    with store.connection():
        store.records.message.insert_many(made).execute()
        store.records.tool_call.insert_many([{**call, "name": "look", "arguments": "{}"} for call in calls]).execute()
    number = itertools.count()
    execute = store.database.execute_sql

    def counting(*args: Any, **kwargs: Any) -> Any:
        next(number)
        return execute(*args, **kwargs)

    monkeypatch.setattr(store.database, "execute_sql", counting)
    copy = chat.fork()

    assert next(number) < 60
    assert [message.content for message in copy.messages()] == [str(at) for at in range(2_000)]
    assert len(copy.tool_calls()) == 1_000


# count_tokens


class Counting(ScriptedLLM):
    """Notes what it is given to count."""

    def token_counter(self, model: str, messages: Any = None, text: Any = None, tools: Any = ()) -> int:
        self.counted = {"model": model, "messages": messages, "tools": list(tools)}
        return super().token_counter(model, messages, text, tools)


def test_what_is_counted_is_what_is_sent_then(store: Store, ask: Ask):
    chat = rich_chat(store)
    llm = Counting("Yes.")
    before = everything(store)

    number = chat.count_tokens("Sure about it?", files=("a.txt", b"one two three"), llm=llm)

    assert everything(store) == before
    assert llm.requests == []
    counted = llm.counted
    ask(chat, "Sure about it?", files=("a.txt", b"one two three"), llm=llm)
    request = llm.requests[0]
    assert counted == {"model": "test", "messages": request["messages"], "tools": request["tools"]}
    assert number == llm.token_counter("test", messages=request["messages"], tools=request["tools"])


def test_every_part_of_what_is_sent_counts(store: Store):
    chat = new_chat(store, "One two three.")
    assert chat.count_tokens() == 0
    assert chat.count_tokens("one two") == 2
    assert chat.count_tokens("one two", instructions="Be brief.") == 4
    assert chat.count_tokens("", files=("a.txt", b"one two")) == len("File 'a.txt' (text/plain): one two".split())
    with_tools = chat.count_tokens("one two", tools=[look])
    assert with_tools > 2
    chat.ask("1?")
    assert chat.count_tokens("one two") == 1 + 3 + 2
    assert chat.count_tokens() == 1 + 3
    assert chat.count_tokens("one two", tools=[look]) == with_tools + 4


def test_history_limits_what_is_counted(store: Store):
    chat = new_chat(store, "One.", "Two two.", "Three.")
    chat.ask("1?")
    chat.ask("2?")
    assert [chat.count_tokens("3?", history=turns) for turns in (0, 1, 2, None)] == [1, 4, 6, 6]
    assert chat.count_tokens("3?", history=lambda messages: messages[:1]) == 2
    counted = chat.count_tokens("3?", history=1)
    chat.ask("3?", history=1)
    assert sum(len(message["content"].split()) for message in shown(chat)) == counted


def test_fields_of_another_provider_are_not_counted(store: Store):
    chat = new_chat(store, Say("One.", thinking="Hm.", signature="sig"))
    chat.ask("1?")
    same, other = Counting(), Counting(provider="other")
    chat.count_tokens("2?", llm=same)
    chat.count_tokens("2?", llm=other)
    assert "thinking_blocks" in same.counted["messages"][1]
    assert other.counted["messages"][1] == said("One.")


def test_tokens_are_counted_while_a_turn_runs(store: Store):
    chat = new_chat(store, "One two.")
    with chat.ask_stream("1?") as stream:
        next(stream)
        assert chat.count_tokens("2?") == 2
        list(stream)
    assert chat.count_tokens("2?") == 4


def test_what_could_not_be_asked_cannot_be_counted(store: Store):
    chat = new_chat(store)
    with pytest.raises(UnknownKeyword, match="nonsense"):
        chat.count_tokens("1?", nonsense=1)  # type: ignore[call-arg]
    with pytest.raises(InvalidFile, match="is empty"):
        chat.count_tokens("1?", files=b"")
    with pytest.raises(InvalidFile, match="too large"):
        chat.count_tokens("1?", files=b"123", max_file_bytes=2)
    with pytest.raises(NoModel):
        create_chat(store).count_tokens("1?")


def test_tokens_are_counted_from_asyncio(store: Store):
    chat = new_chat(store, "One.")
    assert asyncio.run(chat.acount_tokens("one two", instructions="Be brief.")) == 4
    assert asyncio.run(chat.acount_tokens(files=("a.txt", b"one"))) == 4


def test_litellm_counts_by_the_models_tokenizer(sqlite_store: Store, real_litellm: None):
    chat = create_chat(sqlite_store, model="openai/gpt-4o", instructions="Be brief.")
    few = chat.count_tokens("Hello world")
    assert few < chat.count_tokens("Hello world", tools=[look]) < few + 100
    assert chat.count_tokens("Hello world" * 100) > few + 150
    sound = Attachment("audio/wav", content=b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(100_000))
    assert chat.count_tokens("Hello world", files=sound) < few + 100
    pdf = b"%PDF-1.7\n\x00" + bytes(100_000)
    assert chat.count_tokens("Hello world", files=pdf) < few + 1_000


# On the wire


@pytest.mark.parametrize("way", ["ask", "aask_stream"])
@pytest.mark.parametrize("wire", ["openai", "anthropic", "gemini"])
def test_chat_loaded_chat_and_fork_send_the_same_bodies(sqlite_store: Store, provider: Provider, wire: str, way: str):
    ask = WAYS[way]
    given = getattr(provider, wire)()
    settings: dict[str, Any] = {"model": given.pop("model"), "llm": LLM(**given), "tools": [look], "retries": NO_RETRY}
    thinks = {} if wire == "openai" else {"thinking": {"budget": 2000}}
    chat = create_chat(sqlite_store, **settings, **thinks, instructions="Be brief.")
    chat.add_message("user", "I am Ada.")
    chat.add_message("assistant", "Hello Ada!")
    images = [BLUE] if wire == "gemini" else []
    up = ProviderCall("look", {"where": "up"}, signature="c2lnbmVk")
    provider.reply(
        Answer("Let me look.", thinking="Up.", signature="c2ln", tool_calls=[up]),
        Answer("A cat.", thinking="Sure.", signature="c2ln", images=images),
        "Yes.",
        "Yes.",
        "Yes.",
    )
    ask(chat, "What is it?", files=[PNG, ("notes.md", b"# Notes")])
    chat.add_message("system", "It is late.")
    copy = chat.fork()
    again = load_chat(sqlite_store, copy.id, **settings, **thinks)
    other = copy.fork()
    assert again is not None
    for each in (chat, again, other):
        ask(each, "Sure?")

    *_, mine, loaded, forked = (request.body for request in provider.requests)
    assert mine == loaded == forked
    sent = json.dumps(mine)
    assert "It is late." in sent
    assert "Be brief." in sent
    assert "looked up" in sent
    within = provider.requests[1].body
    earlier, later = (body.get("contents") or body["messages"] for body in (within, mine))
    assert later[: len(earlier)] == earlier

"""persistence={"tool_calls": False, "requests": False}: a chat that leaves those tables alone, or has none."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Ask, rows

from llm_orm import Chat, InvalidValue, Store, TablesMissing, ToolError, connect, create_chat, load_chat
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

NEITHER = {"tool_calls": False, "requests": False}


def echo(text: str) -> str:
    return text


def fail(text: str) -> str:
    raise ToolError("stop", fatal=True)


@pytest.fixture
def bare(database_url: str) -> Iterator[Store]:
    """A store in whose database the tables of tool calls and requests do not exist."""
    with connect(database_url) as store:
        store.create_tables()
        with store.connection():
            store.database.drop_tables([store.records.tool_call, store.records.request], cascade=not store.is_sqlite)
        yield store


def a_chat(store: Store, *script: Any, **keywords: Any) -> Chat:
    keywords = {"persistence": NEITHER, "tools": [echo, fail], **keywords}
    return create_chat(store, model="test", llm=ScriptedLLM(*script), **keywords)


def loaded(chat: Chat, *script: Any, **keywords: Any) -> Chat:
    keywords = {"persistence": NEITHER, "tools": [echo, fail], **keywords}
    again = load_chat(chat.store, chat.id, llm=ScriptedLLM(*script), **keywords)
    assert again is not None
    return again


def sent(chat: Chat) -> list[dict[str, Any]]:
    """The messages of the last call of the chat's model."""
    return chat.options.llm.requests[-1]["messages"]


def test_a_whole_turn_needs_no_table_of_tool_calls_or_requests(bare: Store, ask: Ask) -> None:
    chat = a_chat(bare, "Hello!", [Call("echo", text="a"), Call("echo", text="b")], Call("echo", text="c"), "Done.")
    assert ask(chat, "Hi").content == "Hello!"
    assert ask(chat, "Go").content == "Done."
    assert rows(bare, "message", "role", "status", "content") == [
        ("user", "completed", "Hi"),
        ("assistant", "completed", "Hello!"),
        ("user", "completed", "Go"),
        ("assistant", "completed", "Done."),
    ]


def test_tool_rounds_are_replayed_verbatim(bare: Store, ask: Ask) -> None:
    thinking = Say(thinking="Hm.", signature="sig", calls=[Call("echo", text="a"), Call("echo", text="ü\x00")])
    chat = a_chat(bare, thinking, Call("echo", text="c"), "Done.", "Again.")
    ask(chat, "Go")
    once = sent(chat)
    ask(chat, "More")
    assert sent(chat)[: len(once)] == once
    again = loaded(chat, "Again.")
    again.ask("And more")
    assert sent(again)[: len(once)] == once
    assert [message["content"] for message in once if message["role"] == "tool"] == ["a", '"ü\\u0000"', "c"]
    assert sent(again)[len(once)] == {"role": "assistant", "content": "Done."}


def test_a_failed_turn_is_rolled_back(bare: Store) -> None:
    chat = a_chat(bare, Call("echo", text="a"), ProviderError(400), "Hello!")
    with pytest.raises(ProviderError):
        chat.ask("Go")
    assert rows(bare, "message", "role", "content") == [("user", "Go")]
    assert chat.retry().content == "Hello!"
    assert rows(bare, "message", "role", "content") == [("user", "Go"), ("assistant", "Hello!")]


def test_a_failed_turn_is_kept_and_answered_again(bare: Store, ask: Ask) -> None:
    chat = a_chat(bare, Say("Wait.", calls=[Call("echo", text="a")]), ProviderError(400), "Done.", on_error="keep")
    with pytest.raises(ProviderError):
        ask(chat, "Go")
    assert rows(bare, "message", "role", "status") == [("user", "completed"), ("assistant", "failed")]
    assert loaded(chat, "Done.").retry().content == "Done."
    assert rows(bare, "message", "role", "status", "content") == [
        ("user", "completed", "Go"),
        ("assistant", "completed", "Done."),
    ]


def test_a_fatal_tool_ends_the_turn(bare: Store) -> None:
    chat = a_chat(bare, Call("fail", text="a"))
    with pytest.raises(ToolError, match="stop"):
        chat.ask("Go")
    assert rows(bare, "message", "role") == [("user",)]


def test_a_dead_turn_is_cleared(bare: Store) -> None:
    chat = a_chat(bare, "Hello!")
    with bare.connection():
        bare.records.message.create(chat=chat.id, position=0, role="user", content="Hi")
        bare.records.message.create(chat=chat.id, position=1, role="assistant", status="pending")
    assert chat.ask("Still there?", stale_after=0).content == "Hello!"


def test_a_chat_can_be_deleted(bare: Store) -> None:
    chat = a_chat(bare, Call("echo", text="a"), "Done.")
    chat.ask("Go")
    chat.delete()
    assert rows(bare, "message", "id") == []


def test_stats_say_that_there_is_nothing_to_sum_up(bare: Store) -> None:
    chat = a_chat(bare, "Hello!")
    chat.ask("Hi")
    for act in (chat.stats, lambda: asyncio.run(chat.astats())):
        with pytest.raises(InvalidValue) as caught:
            act()
        assert str(caught.value) == (
            'stats() sums up request rows, and this chat writes none: persistence={"requests": False}'
        )


def test_lists_of_what_is_not_stored_say_that_the_table_is_missing(bare: Store) -> None:
    chat = a_chat(bare)
    with pytest.raises(TablesMissing, match="llm_tool_call"):
        chat.tool_calls()
    with pytest.raises(TablesMissing, match="llm_request"):
        chat.requests()


@pytest.mark.parametrize(
    ("persistence", "stored"),
    [
        ({}, (1, 2)),
        ({"tool_calls": True, "requests": True}, (1, 2)),
        ({"tool_calls": False}, (0, 2)),
        ({"requests": False}, (1, 0)),
        (NEITHER, (0, 0)),
    ],
)
def test_each_table_is_left_alone_by_itself(
    store: Store, persistence: dict[str, bool], stored: tuple[int, int]
) -> None:
    chat = a_chat(store, Call("echo", text="a"), "Done.", persistence=persistence)
    chat.ask("Go")
    assert (len(rows(store, "tool_call", "id")), len(rows(store, "request", "id"))) == stored
    once = sent(chat)
    again = loaded(chat, "Again.", persistence=persistence)
    again.ask("More")
    assert sent(again)[: len(once)] == once
    if stored[1]:
        assert (chat.stats().requests, chat.stats().tool_calls) == (3, stored[0])


def test_a_chat_may_begin_to_store_and_leave_off_again(store: Store) -> None:
    chat = a_chat(store, Call("echo", text="a"), "One.")
    chat.ask("First")
    stored = loaded(chat, Call("echo", text="b", call_id="call_b"), "Two.", persistence={})
    stored.ask("Second")
    again = loaded(chat, "Three.")
    again.ask("Third")
    shown = [(message["role"], message["content"]) for message in sent(again)]
    assert ("tool", "a") in shown
    assert [call.result for call in again.tool_calls()] == ["b"]
    both = loaded(chat, "Four.", persistence={})
    both.ask("Fourth")
    assert [m["content"] for m in sent(both) if m["role"] == "tool"] == ["a", "b"]

"""Hooks: all of them called, in order, with what the rows say; and no row is lost where one raises."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import WAYS, Ask, rows

from llm_orm import (
    CONTINUE,
    REPLACE,
    RETRY,
    STOP,
    AsyncTool,
    Chat,
    InvalidValue,
    Middleware,
    Reply,
    Retries,
    Store,
    ToolError,
    create_chat,
    load_chat,
    tool,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

AT_ONCE = Retries(attempts=2, first_wait_s=0.0)
LONDON, BROKEN, LOCKED = Call("get_weather", city="London"), Call("broken"), Call("locked")

HOOKS = (
    "before_request",
    "on_new_message",
    "after_response",
    "on_tool_call_start",
    "on_tool_call_error",
    "on_tool_call_end",
    "on_tool_result",
    "on_end_message",
)
"""In the order of a turn."""


@tool
def get_weather(city: str) -> str:
    """Current weather in a city."""
    return f"rain in {city}"


@tool
def broken() -> str:
    raise ValueError("no such place")


@tool
def locked() -> str:
    raise ToolError("the order is locked", fatal=True)


TOOLS = [get_weather, broken, locked]


def chat_with(store: Store, *script: Any, **options: Any) -> Chat:
    llm = ScriptedLLM(*script, input_cost_per_token="0.001", output_cost_per_token="0.001")
    return create_chat(store, **{"model": "test", "llm": llm, "tools": TOOLS, "retries": AT_ONCE, **options})


def again(chat: Chat, ask: Ask) -> str | None:
    """What the chat says when it is asked by who knows of no hook."""
    other = load_chat(chat.store, chat.id, llm=ScriptedLLM("Still here."))
    assert other is not None
    return ask(other, "Again?").content


# In order


def test_every_hook_is_called_in_its_place_and_in_the_order_added(store: Store, ask: Ask):
    """NodeLLM's C18: a hook took the place of the one before, and of those that wrote the rows."""
    called: list[str] = []
    chat = chat_with(store, [LONDON, BROKEN], "Rain.")
    for name in HOOKS:
        for number in (1, 2):
            assert getattr(chat, name)(lambda *_, said=(name, number): called.append(said)) is chat

    ask(chat, "Weather?")

    call = ["before_request", "on_new_message", "after_response"]
    good = ["on_tool_call_start", "on_tool_call_end", "on_tool_result"]
    bad = ["on_tool_call_start", "on_tool_call_error", "on_tool_call_end", "on_tool_result"]
    expected = [*call, *good, *bad, *call, "on_end_message"]
    assert called == [(name, number) for name in expected for number in (1, 2)]
    assert rows(store, "request", "status_code") == [(200,)] * 2
    assert rows(store, "tool_call", "status") == [("completed",), ("failed",)]


@pytest.mark.parametrize("way", ["aask", "aask_stream"])
def test_plain_and_async_hooks_are_called_in_the_order_added(store: Store, way: str):
    called: list[Any] = []
    chat = chat_with(store, [LONDON, BROKEN], "Rain.")
    for name in HOOKS:

        async def hook(*_: Any, name: str = name) -> None:
            await asyncio.sleep(0)
            called.append((name, "async"))

        getattr(chat, name)(hook)
        getattr(chat, name)(lambda *_, name=name: called.append((name, "plain")))
    WAYS[way](chat, "Weather?")
    assert called[::2] == [(name, "async") for name, _ in called[::2]]
    assert called[1::2] == [(name, "plain") for name, _ in called[::2]]
    assert {name for name, _ in called} == set(HOOKS)


@pytest.mark.parametrize("way", ["ask", "ask_stream"])
@pytest.mark.parametrize("name", HOOKS)
def test_an_async_hook_in_a_plain_ask_is_refused_before_anything_is_written(store: Store, name: str, way: str):
    async def hook(*_: Any) -> None:
        pass

    chat = chat_with(store, "Hi")
    getattr(chat, name)(hook)
    with pytest.raises(AsyncTool, match=rf"hook {name} .*is async: use aask"):
        WAYS[way](chat, "Hello")
    assert rows(store, "message", "role") == []


def test_a_hook_gets_what_the_rows_say(store: Store, ask: Ask):
    got: dict[str, Any] = {}
    chat = chat_with(store, [LONDON], "Rain.")
    chat.on_new_message(lambda message: got.setdefault("new", []).append((message.id, message.status, message.content)))
    chat.on_end_message(lambda message: got.update(end=message))
    chat.on_tool_result(lambda result: got.update(result=result))

    reply = ask(chat, "Weather?")

    assert got["new"] == [(reply.id, "pending", None)] * 2
    assert (got["end"].id, got["end"].status, got["end"].content) == (reply.id, "completed", "Rain.")
    assert (got["end"].input_tokens, got["end"].position) == (reply.input_tokens, 1)
    assert got["result"] == "rain in London"


def test_a_tools_row_is_there_when_its_hooks_are_called(store: Store, ask: Ask):
    """NodeLLM's C4: the row was written beside the hooks, and came too late."""
    seen: list[Any] = []
    chat = chat_with(store, [LONDON, BROKEN], "Rain.")
    for name in HOOKS[3:7]:
        getattr(chat, name)(lambda *_: seen.append(rows(store, "tool_call", "status", "result")))
    chat.after_response(lambda reply: seen.append(rows(store, "request", "status_code")))

    ask(chat, "Weather?")

    done = ("completed", "rain in London")
    failed = ("failed", "Error executing tool 'broken': no such place")
    assert seen[0] == [(200,)]
    assert seen[1][0][0] == "running"
    assert [each[0] for each in seen[2:4]] == [done, done]
    assert seen[5:8] == [[done, failed]] * 3
    assert seen[8] == [(200,)] * 2


def test_hooks_are_called_for_each_attempt_with_the_messages_as_they_were(store: Store, ask: Ask):
    chat = chat_with(store, ProviderError(500), ProviderError(503), "Hi.")
    chat.before_request(lambda messages: messages.append({"role": "system", "content": "softly"}))
    chat.before_request(lambda messages: messages[0].update(content=messages[0]["content"] + "!"))
    new: list[Any] = []
    chat.on_new_message(new.append)

    ask(chat, "Hello")

    sent = [[each["content"] for each in request["messages"]] for request in chat.options.llm.requests]
    assert sent == [["Hello!", "softly"]] * 3
    assert len(new) == 3
    assert rows(store, "message", "content")[0] == ("Hello",)


# What they return


def test_a_list_that_before_request_returns_goes_to_the_next_and_to_the_model(store: Store, ask: Ask):
    chat = chat_with(store, [LONDON], "Hi.", "Hi.")
    chat.before_request(lambda messages: [*messages, {"role": "system", "content": f"{len(messages)} so far"}])
    chat.before_request(lambda messages: None)
    chat.before_request(lambda messages: [*messages, {"role": "system", "content": f"{len(messages)} by now"}])

    ask(chat, "Hello")

    first, second = [request["messages"] for request in chat.options.llm.requests]
    assert [each["content"] for each in first] == ["Hello", "1 so far", "2 by now"]
    assert [each["content"] for each in second][-3:] == ["rain in London", "3 so far", "4 by now"]
    assert [message.content for message in chat.messages()] == ["Hello", "Hi."]


def test_a_reply_that_after_response_returns_goes_to_the_next_and_into_the_row(store: Store, ask: Ask):
    chat = chat_with(store, "hi there", "Bye.")
    chat.after_response(lambda reply: replace(reply, content=reply.content.upper()) if "hi" in reply.content else None)
    chat.after_response(lambda reply: None)
    chat.after_response(lambda reply: replace(reply, content=reply.content + "!") if "HI" in reply.content else None)

    reply = ask(chat, "Hello")

    assert (reply.content, reply.model_id) == (chat.messages()[-1].content, "test") == ("HI THERE!", "test")
    assert rows(store, "request", "status_code", "output_tokens") == [(200, 2)]
    ask(chat, "Bye")
    assert chat.options.llm.requests[1]["messages"][1] == {"role": "assistant", "content": "HI THERE!"}


def test_the_reader_of_a_stream_is_told_of_a_reply_in_the_place_of_another(store: Store):
    chat = chat_with(store, "hi there").after_response(lambda reply: replace(reply, content="HI"))
    chunks = list(chat.ask_stream("Hello"))
    shown = "".join(chunk.content for chunk in chunks)
    restart = next(index for index, chunk in enumerate(chunks) if chunk.restart)
    assert shown == "hi thereHI"
    assert "".join(chunk.content for chunk in chunks[restart:]) == "HI"


def test_a_reply_may_take_the_place_of_one_that_asks_for_tools(store: Store, ask: Ask):
    chat = chat_with(store, [LONDON, LONDON], "Bye.")
    chat.after_response(lambda reply: Reply(content="No weather today.") if reply.tool_calls else None)

    assert ask(chat, "Weather?").content == "No weather today."

    assert rows(store, "tool_call", "status") == [("rejected",)] * 2
    assert rows(store, "request", "status_code") == [(200,)]
    assert ask(chat, "Bye.").content == "Bye."


def test_a_reply_of_a_hook_cannot_ask_for_tools(store: Store, ask: Ask):
    chat = chat_with(store, [LONDON]).after_response(lambda reply: replace(reply, content="Let me look."))
    with pytest.raises(InvalidValue, match="cannot ask for tools"):
        ask(chat, "Weather?")
    assert rows(store, "request", "status_code") == [(200,)]
    assert rows(store, "tool_call", "status") == [("failed",)]
    assert again(chat, ask) == "Still here."


# Tools that fail


def test_on_tool_call_error_is_told_of_each_kind_of_failure(store: Store, ask: Ask):
    """NodeLLM's C27: what failed in a tool of a class was told to nobody."""
    told: list[Any] = []
    calls = [BROKEN, Call("no_such_tool"), Call("get_weather", raw='{"city": '), LONDON]
    chat = chat_with(store, calls, "Done.").on_tool_call_error(lambda call, error: told.append((call.name, str(error))))

    ask(chat, "Weather?")

    assert [name for name, _ in told] == ["broken", "no_such_tool", "get_weather"]
    assert told[0][1] == "no such place"
    assert rows(store, "tool_call", "status") == [("failed",)] * 3 + [("completed",)]


def flaky(*fails: BaseException) -> tuple[list[int], Any]:
    """A tool that fails so often, and the runs that it had."""
    left, runs = list(fails), []

    @tool
    def flaky() -> str:
        runs.append(len(runs))
        if left:
            raise left.pop(0)
        return "at last"

    return runs, flaky


def test_retry_runs_a_failed_tool_once_more(store: Store, ask: Ask):
    """NodeLLM's C30: its row was inserted twice, which ended the turn."""
    runs, made = flaky(ValueError("once"))
    chat = chat_with(store, [Call("flaky")], "Done.", tools=[made]).on_tool_call_error(lambda call, error: RETRY())

    ask(chat, "Go!")

    assert len(runs) == 2
    assert rows(store, "tool_call", "status", "result", "error") == [("completed", "at last", None)]


def test_retry_runs_a_tool_once_more_and_not_over_and_over(store: Store, ask: Ask):
    told: list[str] = []
    runs, made = flaky(*(ValueError(f"number {number}") for number in range(5)))
    chat = chat_with(store, [Call("flaky")], "Done.", tools=[made])
    chat.on_tool_call_error(lambda call, error: told.append(str(error)) or RETRY())  # type: ignore[func-returns-value]

    assert ask(chat, "Go!").content == "Done."

    assert (len(runs), told) == (2, ["number 0", "number 1"])
    assert rows(store, "tool_call", "status", "error") == [("failed", "ValueError: number 1")]


def test_stop_ends_the_turn_with_the_tools_own_error(store: Store, ask: Ask):
    chat = chat_with(store, [BROKEN, LONDON]).on_tool_call_error(lambda call, error: STOP)
    with pytest.raises(ValueError, match="no such place"):
        ask(chat, "Weather?")
    assert rows(store, "tool_call", "status", "error") == [
        ("failed", "ValueError: no such place"),
        ("failed", "interrupted"),
    ]
    assert rows(store, "message", "role") == [("user",)]
    assert rows(store, "request", "status_code") == [(200,)]
    assert again(chat, ask) == "Still here."


def test_continue_goes_on_behind_a_fatal_error(store: Store, ask: Ask):
    chat = chat_with(store, [LOCKED, LONDON], "Done.").on_tool_call_error(lambda call, error: CONTINUE)
    assert ask(chat, "Weather?").content == "Done."
    assert rows(store, "tool_call", "status") == [("failed",), ("completed",)]


def test_a_fatal_error_stays_fatal_where_a_hook_says_nothing(store: Store, ask: Ask):
    """NodeLLM's C28: it was swallowed."""
    told: list[Any] = []
    chat = chat_with(store, [LOCKED]).on_tool_call_error(lambda call, error: told.append(error))
    with pytest.raises(ToolError, match="the order is locked") as raised:
        ask(chat, "Weather?")
    assert told == [raised.value]


def test_replace_gives_the_model_another_result(store: Store, ask: Ask):
    seen: list[Any] = []
    chat = chat_with(store, [LOCKED], "Done.").on_tool_call_error(lambda call, error: REPLACE("Try again tomorrow."))
    chat.on_tool_call_end(lambda call, outcome: seen.append(outcome.result)).on_tool_result(seen.append)

    assert ask(chat, "Weather?").content == "Done."

    assert chat.options.llm.requests[1]["messages"][-1]["content"] == "Try again tomorrow."
    assert seen == ["Try again tomorrow."] * 2
    assert rows(store, "tool_call", "status", "result", "error") == [
        ("failed", "Try again tomorrow.", "ToolError: the order is locked")
    ]


def test_the_first_directive_counts_and_a_middlewares_before_a_hooks(store: Store, ask: Ask):
    told: list[str] = []

    def says(name: str, directive: Any) -> Callable[..., Any]:
        return lambda *_: told.append(name) or directive  # type: ignore[func-returns-value]

    class Guard(Middleware):
        def on_tool_call_error(self, context: Any, call: Any, error: Exception) -> Any:
            told.append("middleware")
            return REPLACE("of the middleware") if error.args == ("no such place",) else None

    chat = chat_with(store, [BROKEN, LOCKED], "Done.", middlewares=[Guard()])
    for name, directive in (("one", None), ("two", REPLACE("of the hook")), ("three", STOP)):
        chat.on_tool_call_error(says(name, directive))

    assert ask(chat, "Weather?").content == "Done."

    assert told == ["middleware", "one", "two", "three"] * 2
    assert rows(store, "tool_call", "result") == [("of the middleware",), ("of the hook",)]


@pytest.mark.parametrize("way", ["aask", "aask_stream"])
def test_an_async_on_tool_call_error_may_say_what_is_to_be_done(store: Store, way: str):
    runs, made = flaky(ValueError("once"))

    async def retry(call: Any, error: Exception) -> Any:
        await asyncio.sleep(0)
        return RETRY()

    chat = chat_with(store, [Call("flaky")], "Done.", tools=[made]).on_tool_call_error(retry)
    assert WAYS[way](chat, "Go!").content == "Done."
    assert len(runs) == 2


def test_a_failed_tool_that_is_run_again_leaves_those_beside_it_alone(store: Store, ask: Ask):
    runs, made = flaky(ValueError("once"))
    chat = chat_with(store, [Call("flaky"), LONDON, LONDON], "Done.", tools=[made, get_weather], tool_concurrency=2)
    chat.on_tool_call_error(lambda call, error: RETRY())

    ask(chat, "Go!")

    assert rows(store, "tool_call", "status", "result") == [
        ("completed", "at last"),
        ("completed", "rain in London"),
        ("completed", "rain in London"),
    ]
    assert len(runs) == 2


# Where one raises


@pytest.mark.parametrize("on_error", ["rollback", "keep"])
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_raises_ends_the_turn_and_loses_nothing(store: Store, ask: Ask, name: str, on_error: Any):
    """NodeLLM's C34: the reply and its request row were lost."""
    problem = RuntimeError("my hook broke")

    def raises(*_: Any) -> None:
        raise problem

    script = [[BROKEN, LONDON], "Rain."]
    chat = chat_with(store, *script, on_error=on_error)
    getattr(chat, name)(raises)

    with pytest.raises(RuntimeError) as raised:
        ask(chat, "Weather?")

    assert raised.value is problem
    billed = {"before_request": 0, "on_new_message": 0, "on_end_message": 2}.get(name, 1)
    costs = [row[1] for row in rows(store, "request", "status_code", "cost")]
    assert rows(store, "request", "status_code", "error") == [(200, None)] * billed
    assert all(cost > 0 for cost in costs)
    assert chat.stats().requests == len(chat.options.llm.requests) == billed
    failed, stopped = ("failed", "ValueError: no such place"), ("failed", "interrupted")
    assert rows(store, "tool_call", "status", "error") == {
        "before_request": [],
        "on_new_message": [],
        "after_response": [stopped, stopped],
        "on_tool_call_start": [stopped, stopped],
        "on_end_message": [failed, ("completed", None)],
    }.get(name, [failed, stopped])
    kept = [("assistant", "failed")] if on_error == "keep" else []
    done = [("assistant", "completed")] if name == "on_end_message" else kept
    assert rows(store, "message", "role", "status") == [("user", "completed"), *done]
    assert again(chat, ask) == "Still here."


@pytest.mark.parametrize("name", ["before_request", "on_new_message", "after_response", "on_end_message"])
def test_a_hook_that_raises_in_a_later_round_keeps_what_was_billed_before(store: Store, ask: Ask, name: str):
    def raises(*_: Any) -> None:
        if len(chat.options.llm.requests) == (1 if name in ("before_request", "on_new_message") else 2):
            raise RuntimeError("my hook broke")

    chat = chat_with(store, [LONDON], "Rain.")
    getattr(chat, name)(raises)
    with pytest.raises(RuntimeError, match="my hook broke"):
        ask(chat, "Weather?")
    billed = len(chat.options.llm.requests)
    assert rows(store, "request", "round", "status_code") == [(number, 200) for number in range(billed)]
    assert rows(store, "tool_call", "status", "result") == [("completed", "rain in London")]
    assert chat.stats().cost > 0


def test_a_hook_that_raises_keeps_those_behind_it_from_being_called(store: Store, ask: Ask):
    called: list[int] = []

    def raises(reply: Any) -> None:
        called.append(1)
        raise RuntimeError("my hook broke")

    chat = chat_with(store, "Hi.").after_response(raises).after_response(lambda reply: called.append(2))
    with pytest.raises(RuntimeError):
        ask(chat, "Hello")
    assert called == [1]
    assert [message.content for message in chat.messages()] == ["Hello", "Hi."]


@pytest.mark.parametrize("way", ["aask", "aask_stream"])
@pytest.mark.parametrize("name", HOOKS)
def test_an_async_hook_that_raises_ends_the_turn_as_a_plain_one_does(store: Store, name: str, way: str):
    async def raises(*_: Any) -> None:
        await asyncio.sleep(0)
        raise RuntimeError("my hook broke")

    chat = chat_with(store, [BROKEN, LONDON], "Rain.")
    getattr(chat, name)(raises)
    with pytest.raises(RuntimeError, match="my hook broke"):
        WAYS[way](chat, "Weather?")
    assert len(rows(store, "request", "id")) == len(chat.options.llm.requests)
    assert rows(store, "message", "status")[1:] == ([("completed",)] if name == "on_end_message" else [])
    assert again(chat, WAYS[way]) == "Still here."


def test_a_hook_that_raises_of_a_failed_tool_waits_for_the_tools_beside_it(store: Store, ask: Ask):
    release = threading.Event()

    @tool
    def slow() -> str:
        release.wait(10)
        return "slow but sure"

    def raises(call: Any, error: Any) -> None:
        release.set()
        raise RuntimeError("my hook broke")

    chat = chat_with(store, [BROKEN, Call("slow"), LONDON], tools=[broken, slow, get_weather], tool_concurrency=2)
    chat.on_tool_call_error(raises)
    with pytest.raises(RuntimeError, match="my hook broke"):
        ask(chat, "Weather?")
    assert rows(store, "tool_call", "status", "error") == [
        ("failed", "ValueError: no such place"),
        ("completed", None),
        ("failed", "interrupted"),
    ]


def test_hooks_of_a_failed_call_are_those_of_the_reply_that_came_at_last(store: Store, ask: Ask):
    heard: list[Any] = []
    chat = chat_with(store, ProviderError(500), Say("Hi.", thinking="Hm."))
    chat.after_response(lambda reply: heard.append((reply.content, reply.thinking, reply.cost is not None)))
    ask(chat, "Hello")
    assert heard == [("Hi.", "Hm.", True)]
    assert rows(store, "request", "attempt", "status_code") == [(1, 500), (2, 200)]

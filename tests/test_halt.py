"""Halt: a tool ends the turn with a text of its own, and no model is called any more."""

import threading
from typing import Any

import pytest
from conftest import WAYS, rows

from llm_orm import Chat, Halt, Store, Tool, ToolError, create_chat, load_chat, tool
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

LONDON, PARIS = Call("get_weather", city="London"), Call("get_weather", city="Paris")
CANCEL = Call("cancel_order", order="7")


@tool
def get_weather(city: str) -> str:
    return f"rain in {city}"


@tool
def cancel_order(order: str) -> Halt:
    return Halt(f"Your order {order} is cancelled.")


def chat_with(store: Store, *script: Any, **options: Any) -> Chat:
    return create_chat(
        store, model="test", llm=ScriptedLLM(*script), **{"tools": [get_weather, cancel_order], **options}
    )


def shown(chat: Chat) -> list[tuple[str, str | None]]:
    """What the model was shown on its last call: (role, content)."""
    return [(message["role"], message["content"]) for message in chat.options.llm.requests[-1]["messages"]]


def test_a_tool_ends_the_turn_with_its_own_text(store, ask):
    chat = chat_with(store, Say("One moment.", calls=[CANCEL]), "never")

    reply = ask(chat, "Cancel 7!")

    assert (reply.content, reply.status, reply.position) == ("Your order 7 is cancelled.", "completed", 1)
    assert len(chat.options.llm.requests) == 1
    assert rows(store, "message", "role", "status", "content") == [
        ("user", "completed", "Cancel 7!"),
        ("assistant", "completed", "Your order 7 is cancelled."),
    ]
    assert rows(store, "tool_call", "status", "result", "error") == [("completed", reply.content, None)]
    assert rows(store, "request", "status_code", "message") == [(200, reply.id)]


def test_the_text_of_a_halt_is_said_by_no_model(store, ask):
    ask(chat_with(store, CANCEL), "Cancel 7!")
    assert rows(store, "message", "model_id")[1] == (None,)
    assert rows(store, "request", "model", "output_tokens") == [("test", 2)]


@pytest.mark.parametrize("way", ["ask_stream", "aask_stream"])
def test_a_stream_shows_the_text_of_a_halt(store, way):
    """NodeLLM's C29: a stream took no notice of a halt, and called the model again."""
    import asyncio

    chat = chat_with(store, Say("One moment. ", calls=[CANCEL]))

    async def read() -> list[Any]:
        return [chunk async for chunk in chat.aask_stream("Cancel 7!")]

    chunks = asyncio.run(read()) if way == "aask_stream" else list(chat.ask_stream("Cancel 7!"))

    assert "".join(chunk.content for chunk in chunks) == "One moment. Your order 7 is cancelled."
    assert [chunk.tool_call.name for chunk in chunks if chunk.tool_call] == ["cancel_order"]
    assert not any(chunk.restart for chunk in chunks)


def test_the_calls_behind_a_halt_are_not_run_and_are_on_record(store, ask):
    chat = chat_with(store, [LONDON, CANCEL, PARIS])
    started: list[str] = []
    chat.on_tool_call_start(lambda call: started.append(call.arguments))

    ask(chat, "Cancel 7!")

    assert len(started) == 2
    assert rows(store, "tool_call", "position", "status", "result", "error") == [
        (0, "completed", "rain in London", None),
        (1, "completed", "Your order 7 is cancelled.", None),
        (2, "rejected", "Not run: another tool ended the turn.", "skipped"),
    ]


@pytest.mark.parametrize("loaded", [False, True], ids=["same", "loaded"])
def test_the_history_behind_a_halt_is_whole(store, ask, loaded):
    """NodeLLM's C23: after a halt the model was shown two tool calls and one result, which providers refuse."""
    chat = chat_with(store, Say("One moment.", calls=[CANCEL, LONDON]), "You are welcome.")
    ask(chat, "Cancel 7!")
    if loaded:
        chat = load_chat(store, chat.id, llm=chat.options.llm, tools=[get_weather, cancel_order])

    ask(chat, "Thanks!")

    assert shown(chat) == [
        ("user", "Cancel 7!"),
        ("assistant", "One moment."),
        ("tool", "Your order 7 is cancelled."),
        ("tool", "Not run: another tool ended the turn."),
        ("assistant", "Your order 7 is cancelled."),
        ("user", "Thanks!"),
    ]
    called, *results = chat.options.llm.requests[-1]["messages"][1:4]
    assert [call["id"] for call in called["tool_calls"]] == [result["tool_call_id"] for result in results]


def test_the_history_behind_a_halt_is_whole_where_no_tool_calls_are_stored(store, ask):
    chat = chat_with(store, [CANCEL, LONDON], "You are welcome.", persistence={"tool_calls": False})
    ask(chat, "Cancel 7!")
    ask(load_chat(store, chat.id, llm=chat.options.llm), "Thanks!")
    assert [role for role, _ in shown(chat)] == ["user", "assistant", "tool", "tool", "assistant", "user"]


def test_a_halt_in_a_later_round_sums_up_what_the_turn_took(store, ask):
    first = Say(calls=[LONDON], input_tokens=10, output_tokens=2, cached_tokens=4, cost="0.25")
    second = Say(calls=[CANCEL], input_tokens=30, output_tokens=5, thinking_tokens=3, cost="0.50")
    chat = chat_with(store, first, second)

    reply = ask(chat, "Is it wet? Then cancel 7.")

    assert reply.content == "Your order 7 is cancelled."
    columns = "input_tokens", "output_tokens", "cached_tokens", "thinking_tokens"
    assert rows(store, "message", *columns)[1] == (40, 7, 4, 3)
    assert rows(store, "request", "round", "input_tokens") == [(0, 10), (1, 30)]
    assert str(chat.stats().cost) == "0.75"


def test_hooks_hear_of_a_halt_as_of_any_tool_and_any_reply(store, ask):
    chat, heard = chat_with(store, CANCEL), []
    chat.on_tool_result(heard.append)
    chat.on_end_message(lambda message: heard.append((message.status, message.content)))
    ask(chat, "Cancel 7!")
    assert heard == ["Your order 7 is cancelled.", ("completed", "Your order 7 is cancelled.")]


def test_a_tool_class_may_halt(store, ask):
    class CancelOrder(Tool):
        """Cancel an order."""

        def execute(self, order: str) -> Halt:
            return Halt("Done.")

    assert ask(chat_with(store, CANCEL, tools=[CancelOrder]), "Cancel 7!").content == "Done."


@pytest.mark.parametrize("way", ["aask", "aask_stream"])
def test_an_async_tool_may_halt(store, way):
    @tool
    async def hang_up() -> Halt:
        return Halt("Goodbye.")

    chat = chat_with(store, [Call("hang_up"), LONDON], tools=[hang_up, get_weather])

    assert WAYS[way](chat, "Bye!").content == "Goodbye."
    assert rows(store, "tool_call", "status", "error") == [("completed", None), ("rejected", "skipped")]


@pytest.mark.parametrize("text", ["", {"order": 7}], ids=["empty", "JSON"])
def test_a_halt_may_say_nothing_or_some_json(store, ask, text):
    @tool
    def stop() -> Halt:
        return Halt(text)

    chat = chat_with(store, Call("stop"), "Yes?", tools=[stop])
    assert ask(chat, "Stop!").content == ("" if text == "" else '{"order":7}')
    ask(chat, "Hello?")
    assert [role for role, _ in shown(chat)] == ["user", "assistant", "tool", *["assistant"] * bool(text), "user"]


def test_what_runs_beside_a_halt_is_waited_for_and_what_does_not_run_yet_is_skipped(store, ask):
    halted = threading.Event()

    @tool
    def slow() -> str:
        assert halted.wait(20)
        return "slow, and done"

    @tool
    def stop() -> Halt:
        return Halt("Stopped.")

    chat = chat_with(store, [Call("slow"), Call("stop"), LONDON], tools=[slow, stop, get_weather], tool_concurrency=2)
    chat.on_tool_call_end(lambda call, outcome: halted.set())

    assert ask(chat, "Stop!").content == "Stopped."
    assert rows(store, "tool_call", "name", "status", "result") == [
        ("slow", "completed", "slow, and done"),
        ("stop", "completed", "Stopped."),
        ("get_weather", "rejected", "Not run: another tool ended the turn."),
    ]


def test_of_two_halts_side_by_side_the_first_has_the_last_word(store, ask):
    together = threading.Barrier(2, timeout=20)
    first_is_in = threading.Event()

    @tool
    def stop(text: str) -> Halt:
        together.wait()
        if text == "second":
            assert first_is_in.wait(20)
        return Halt(text)

    calls = [Call("stop", text="second"), Call("stop", text="first")]
    chat = chat_with(store, calls, tools=[stop], tool_concurrency=2)
    chat.on_tool_call_end(lambda call, outcome: first_is_in.set())

    assert ask(chat, "Stop!").content == "first"
    assert rows(store, "tool_call", "status", "result") == [("completed", "second"), ("completed", "first")]


def test_a_fatal_error_beside_a_halt_ends_the_turn(store, ask):
    together = threading.Barrier(2, timeout=20)

    @tool
    def stop() -> Halt:
        together.wait()
        return Halt("Stopped.")

    @tool
    def burn() -> str:
        together.wait()
        raise ToolError("fire", fatal=True)

    chat = chat_with(store, [Call("stop"), Call("burn")], "never", tools=[stop, burn], tool_concurrency=2)

    with pytest.raises(ToolError, match="fire"):
        ask(chat, "Stop!")
    assert rows(store, "message", "role") == [("user",)]
    assert sorted(rows(store, "tool_call", "name", "status")) == [("burn", "failed"), ("stop", "completed")]


def test_a_halt_lets_no_call_of_its_round_wait_for_approval(store, ask):
    @tool(requires_approval=True)
    def refund(order: str) -> str:
        raise AssertionError("nobody approved it")

    chat = chat_with(store, [Call("refund", order="7"), CANCEL], tools=[refund, cancel_order])

    assert ask(chat, "Cancel 7!").status == "completed"
    assert chat.pending_approvals() == []
    assert rows(store, "tool_call", "name", "status", "error", "approval") == [
        ("refund", "rejected", "skipped", None),
        ("cancel_order", "completed", None, None),
    ]


def test_an_approved_tool_may_halt_the_turn_that_waited_for_it(store, ask):
    @tool(requires_approval=True)
    def refund(order: str) -> Halt:
        return Halt(f"Refunded {order}.")

    first = Say(calls=[Call("refund", order="7"), LONDON], input_tokens=10, output_tokens=3)
    chat = chat_with(store, first, "You are welcome.", tools=[refund, get_weather])
    ask(chat, "Refund 7!")
    chat.approve("call_1")

    reply = chat.resume()

    assert (reply.content, reply.status, reply.input_tokens) == ("Refunded 7.", "completed", 10)
    ask(chat, "Thanks!")
    assert [text for _, text in shown(chat)] == [
        "Refund 7!",
        None,
        "Refunded 7.",
        "rain in London",
        "Refunded 7.",
        "Thanks!",
    ]


def test_a_halt_takes_the_place_of_a_failed_answer_that_was_kept(store, ask):
    chat = chat_with(store, ProviderError(400), CANCEL, on_error="keep")
    with pytest.raises(ProviderError):
        ask(chat, "Cancel 7!")
    chat.retry()
    assert rows(store, "message", "position", "status", "content") == [
        (0, "completed", "Cancel 7!"),
        (1, "completed", "Your order 7 is cancelled."),
    ]

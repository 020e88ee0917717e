"""Tool calls that wait for a person; turns that are taken up again, after that or after their process died."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import peewee as pw
import pytest
from conftest import WAYS, after_read, rows
from freezegun import freeze_time
from processes import Process, run

from llm_orm import (
    RETRY,
    STOP,
    Agent,
    AsyncTool,
    AwaitsApproval,
    Chat,
    ChatBusy,
    InvalidValue,
    Middleware,
    NothingToResume,
    NothingToRetry,
    PIIMask,
    Reply,
    StoppedByMiddleware,
    Store,
    Tool,
    ToolRoundsExceeded,
    TurnContext,
    connect,
    create_agent_session,
    create_chat,
    load_agent_session,
    load_chat,
    tool,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

LONDON, PARIS = Call("get_weather", city="London"), Call("get_weather", city="Paris")
REFUND = Call("refund", order="7")
WAITS = ("refund", "pending", "required", None)


@tool
def get_weather(city: str) -> str:
    return f"rain in {city}"


@tool(requires_approval=True)
def refund(order: str) -> str:
    return f"refunded {order}"


TOOLS = [get_weather, refund]


def chat_with(store: Store, *script: Any, **options: Any) -> Chat:
    return create_chat(store, model="test", llm=ScriptedLLM(*script), **{"tools": TOOLS, **options})


def again(chat: Chat, *script: Any, **options: Any) -> Chat:
    """Another holder of the chat."""
    loaded = load_chat(chat.store, chat.id, llm=ScriptedLLM(*script), **{"tools": TOOLS, **options})
    assert loaded is not None
    return loaded


def parked(store: Store, *script: Any, first: Any = REFUND, **options: Any) -> Chat:
    """A chat whose turn waits for a refund to be approved."""
    chat = chat_with(store, first, *script, **options)
    assert chat.ask("Refund 7!").status == "pending"
    return chat


def calls(store: Store) -> list[Any]:
    return rows(store, "tool_call", "name", "status", "approval", "result")


def messages(store: Store) -> list[Any]:
    return rows(store, "message", "position", "role", "status", "content")


def everything(store: Store) -> list[Any]:
    """All that a turn could write."""
    message = rows(store, "message", "id", "status", "content", "parked_at", "updated_at")
    return [message, calls(store), rows(store, "request", "id")]


def shown(chat: Chat) -> list[tuple[str, str | None]]:
    """What the model was shown on its last call: (role, content)."""
    return [(message["role"], message["content"]) for message in chat.options.llm.requests[-1]["messages"]]


Resume = Callable[..., Any]


def _resume(chat: Chat, **options: Any) -> Any:
    return chat.resume(**options)


def _resume_stream(chat: Chat, **options: Any) -> Any:
    with chat.resume_stream(**options) as stream:
        for _ in stream:
            pass
    return stream.message


def _aresume(chat: Chat, **options: Any) -> Any:
    return asyncio.run(chat.aresume(**options))


def _aresume_stream(chat: Chat, **options: Any) -> Any:
    async def read() -> Any:
        async with chat.aresume_stream(**options) as stream:
            async for _ in stream:
                pass
        return stream.message

    return asyncio.run(read())


RESUMES = {"resume": _resume, "resume_stream": _resume_stream, "aresume": _aresume, "aresume_stream": _aresume_stream}


@pytest.fixture(params=list(RESUMES))
def resume(request: pytest.FixtureRequest) -> Resume:
    """resume(chat, **options) → the stored reply, in the four ways."""
    return RESUMES[request.param]


# Parked


def test_a_call_that_requires_approval_parks_the_turn(store, ask):
    chat = chat_with(store, Say("Let me see.", calls=[REFUND], input_tokens=9), "never")

    reply = ask(chat, "Refund 7!")

    assert (reply.status, reply.content, reply.input_tokens) == ("pending", "Let me see.", 9)
    assert reply.parked_at is not None
    assert calls(store) == [WAITS]
    assert messages(store) == [(0, "user", "completed", "Refund 7!"), (1, "assistant", "pending", "Let me see.")]
    assert rows(store, "message", "parked_at")[1] == (reply.parked_at,)
    assert rows(store, "request", "status_code", "message") == [(200, reply.id)]
    assert len(chat.options.llm.requests) == 1


def test_a_parked_turn_holds_no_connection_and_gives_no_signs_of_life(store, ask):
    ask(chat_with(store, REFUND), "Refund 7!")
    assert store.heart._turns == {}
    assert store.database._in_use == {}


def test_a_parked_turn_is_there_for_who_loads_the_chat(store):
    chat = again(parked(store))
    assert [message.status for message in chat.messages()] == ["completed", "pending"]
    assert [call.name for call in chat.pending_approvals()] == ["refund"]


def test_a_stream_ends_where_its_turn_is_parked(store):
    chat = chat_with(store, Say("Let me see.", calls=[REFUND]))
    chunks = list(chat.ask_stream("Refund 7!"))
    assert "".join(chunk.content for chunk in chunks) == "Let me see."
    assert [chunk.tool_call.name for chunk in chunks if chunk.tool_call] == ["refund"]


def test_the_calls_of_the_round_that_need_no_approval_run_at_once(store, ask):
    chat = chat_with(store, [LONDON, REFUND, PARIS])
    assert ask(chat, "Refund 7, and the weather?").status == "pending"
    assert calls(store) == [
        ("get_weather", "completed", None, "rain in London"),
        WAITS,
        ("get_weather", "completed", None, "rain in Paris"),
    ]


def test_a_function_of_the_arguments_says_which_calls_wait(store, ask):
    asked: list[Any] = []

    @tool(requires_approval=lambda arguments: asked.append(arguments) or arguments["amount"] > 100)
    def pay(amount: int, currency: str = "EUR") -> str:
        return f"paid {amount}"

    chat = chat_with(store, [Call("pay", amount=50), Call("pay", amount=500)], tools=[pay])
    assert ask(chat, "Pay!").status == "pending"
    assert calls(store) == [("pay", "completed", None, "paid 50"), ("pay", "pending", "required", None)]
    assert [arguments["amount"] for arguments in asked] == [50, 500]


class Pay(Tool):
    """Pay somebody."""

    name = "pay"
    requires_approval = True

    def execute(self, amount: int) -> str:
        return f"paid {amount}"


class PayMuch(Pay):
    name = "pay"

    def requires_approval(self, arguments: dict[str, Any]) -> bool:  # type: ignore[override]
        return arguments["amount"] > 100


@pytest.mark.parametrize("kind", [Pay, PayMuch])
def test_a_tool_class_may_require_approval(store, ask, kind):
    chat = chat_with(store, Call("pay", amount=500), Call("pay", amount=5), "Paid.", tools=[kind])
    ask(chat, "Pay!")
    chat.approve(chat.pending_approvals()[0])
    assert chat.resume().status == ("pending" if kind is Pay else "completed")
    assert [row[3] for row in calls(store)] == ["paid 500", None if kind is Pay else "paid 5"]


@pytest.mark.parametrize("way", list(WAYS))
def test_an_async_function_may_say_so_too_where_it_can_be_awaited(store, way):
    async def is_much(arguments: dict[str, Any]) -> bool:
        await asyncio.sleep(0)
        return arguments["amount"] > 100

    @tool(requires_approval=is_much)
    def pay(amount: int) -> str:
        return f"paid {amount}"

    chat = chat_with(store, [Call("pay", amount=500), Call("pay", amount=5)], tools=[pay])
    if way in ("aask", "aask_stream"):
        assert WAYS[way](chat, "Pay!").status == "pending"
        assert [row[1] for row in calls(store)] == ["pending", "completed"]
    else:
        with pytest.raises(AsyncTool, match="requires_approval"):
            WAYS[way](chat, "Pay!")
        assert messages(store) == []


@pytest.mark.parametrize("raw", ['{"amount": ', "[500]", "null", "{}", '{"amount": "much"}'])
def test_nobody_is_asked_about_a_call_that_cannot_run(store, ask, raw):
    """The model is told what is wrong with its arguments, as ever; the function gets none that it cannot read."""

    @tool(requires_approval=lambda arguments: arguments["amount"] > 100)
    def pay(amount: int) -> str:
        return f"paid {amount}"

    chat = chat_with(store, Call("pay", raw=raw), "I see.", tools=[pay])
    assert ask(chat, "Pay!").content == "I see."
    assert shown(chat)[-1][1].startswith("Invalid tool arguments")


def test_the_function_gets_the_arguments_that_the_tool_would(store, ask):
    asked: list[Any] = []

    @tool(requires_approval=lambda arguments: asked.append(arguments))
    def pay(amount: int, currency: str = "EUR") -> str:
        return f"paid {amount} {currency}"

    ask(chat_with(store, Call("pay", amount="500"), "Paid.", tools=[pay]), "Pay!")
    assert asked == [{"amount": 500, "currency": "EUR"}]


def test_a_function_that_raises_ends_the_turn_before_anything_runs(store, ask):
    def broken(arguments: dict[str, Any]) -> bool:
        raise RuntimeError("my rule broke")

    pay = tool(requires_approval=broken, name="pay")(lambda amount: "paid")
    chat = chat_with(store, [LONDON, Call("pay", amount=1)], tools=[get_weather, pay])
    with pytest.raises(RuntimeError, match="my rule broke"):
        ask(chat, "Pay!")
    assert messages(store) == [(0, "user", "completed", "Pay!")]
    assert [row[1:3] for row in calls(store)] == [("failed", None)] * 2
    assert len(rows(store, "request", "id")) == 1


def test_approval_needs_its_rows(store, ask):
    chat = chat_with(store, REFUND, persistence={"tool_calls": False})
    with pytest.raises(InvalidValue, match="requires approval needs its row"):
        ask(chat, "Refund 7!")
    assert messages(store) == []


# While it waits


def test_whoever_asks_meanwhile_is_told_what_is_waited_for(store, ask):
    chat = parked(store, first=[REFUND, LONDON, Call("refund", order="8")])
    before = everything(store)
    with pytest.raises(AwaitsApproval) as raised:
        ask(again(chat), "Hello?")
    first, second = chat.pending_approvals()
    assert raised.value.calls == [first, second]
    assert f"approve() or deny() refund ({first.id}), refund ({second.id}), then resume()" in str(raised.value)
    assert "cancel()" in str(raised.value)
    assert everything(store) == before


@pytest.mark.parametrize("way", ["retry", "resume"])
def test_neither_a_retry_nor_a_resume_goes_past_a_person(store, way):
    chat = parked(store)
    before = everything(store)
    for options in ({}, {"stale_after": 0}, {"wait": 60}):
        with pytest.raises(AwaitsApproval, match=str(chat.pending_approvals()[0].id)):
            getattr(again(chat), way)(**options)
    assert everything(store) == before


def test_an_ask_that_would_wait_for_a_turn_does_not_wait_for_a_person(store, ask):
    chat = parked(store)
    with pytest.raises(AwaitsApproval):
        ask(again(chat), "Hello?", wait=600)


def test_a_parked_turn_is_never_taken_for_dead(store, ask):
    chat = parked(store)
    before = everything(store)
    with freeze_time(datetime.now(UTC) + timedelta(days=365), real_asyncio=True):
        with pytest.raises(AwaitsApproval):
            ask(again(chat), "A year later?", stale_after=0)
    assert everything(store) == before


def test_a_turn_whose_calls_are_decided_is_to_be_resumed(store, ask):
    chat = parked(store)
    chat.approve("call_1")
    with pytest.raises(AwaitsApproval, match=r"decided: go on with resume\(\)") as raised:
        ask(again(chat), "Hello?")
    assert raised.value.calls == []


def test_a_resume_names_the_calls_that_are_not_decided_yet(store, resume):
    chat = parked(store, first=[REFUND, Call("refund", order="8")])
    first, second = chat.pending_approvals()
    chat.approve(first)
    with pytest.raises(AwaitsApproval) as raised:
        resume(chat)
    assert [call.id for call in raised.value.calls] == [second.id]
    assert calls(store) == [("refund", "pending", "approved", None), WAITS]


# Deciding


@pytest.mark.parametrize("name", [lambda call: call, lambda call: call.id, lambda call: str(call.id)])
def test_a_call_is_approved_or_denied_by_its_row_or_its_id(store, name):
    chat = parked(store, first=[REFUND, Call("refund", order="8")])
    first, second = chat.pending_approvals()
    assert [call.arguments for call in (first, second)] == ['{"order": "7"}', '{"order": "8"}']
    approved, denied = chat.approve(name(first)), chat.deny(name(second))
    assert (approved.id, approved.approval, approved.status) == (first.id, "approved", "pending")
    assert (denied.id, denied.approval, denied.status) == (second.id, "denied", "rejected")
    assert denied.finished_at is not None
    assert chat.pending_approvals() == []


def test_a_call_is_approved_or_denied_by_the_models_name_of_it(store):
    chat = parked(store, first=[Call("refund", order="7", call_id="one"), Call("refund", order="8", call_id="two")])
    chat.deny("two")
    assert chat.approve("one").tool_call_id == "one"
    assert [row[2] for row in calls(store)] == ["approved", "denied"]


def test_calls_are_decided_from_asyncio_too(store):
    chat = parked(store, first=[REFUND, Call("refund", order="8")])

    async def decide() -> None:
        first, second = await chat.apending_approvals()
        await chat.aapprove(first)
        assert (await chat.adeny(second.id, "no")).error == "no"
        assert await chat.apending_approvals() == []

    asyncio.run(decide())
    assert [row[2] for row in calls(store)] == ["approved", "denied"]


@pytest.mark.parametrize("decide", [Chat.approve, Chat.deny])
def test_only_a_call_of_this_chat_that_waits_can_be_decided(store, decide):
    other, idle = parked(store), chat_with(store, "Hi.")
    chat = parked(store, first=[LONDON, Call("refund", order="7", call_id="mine")])
    before = everything(store)
    (theirs,) = other.pending_approvals()
    finished = chat.tool_calls()[0]
    assert finished.name == "get_weather"
    for wrong in (theirs, theirs.id, finished, chat.id, "call_2", "", 7, None):
        with pytest.raises(InvalidValue, match="waits for approval; waiting: refund"):
            decide(chat, wrong)
    with pytest.raises(InvalidValue, match="waiting: none"):
        decide(idle, theirs)
    assert everything(store) == before


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize("first", [Chat.approve, Chat.deny])
@pytest.mark.parametrize("second", [Chat.approve, Chat.deny])
def test_a_call_is_decided_once(store, first, second):
    chat = parked(store)
    first(chat, "call_1")
    before = everything(store)
    with pytest.raises(InvalidValue, match=r"the tool call refund \(.*\) was (approved|denied) already"):
        second(again(chat), "call_1")
    assert everything(store) == before


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize("first", [Chat.approve, Chat.deny])
@pytest.mark.parametrize("second", [Chat.approve, Chat.deny])
def test_of_two_people_who_decide_at_once_one_is_heard(store, first, second):
    """The first decides between the second one's look at the calls and its word."""
    chat = parked(store)
    execute = store.database.execute_sql

    def execute_late(sql: str, *arguments: Any, **keywords: Any) -> Any:
        if sql.startswith("UPDATE"):
            del store.database.execute_sql
            with ThreadPoolExecutor() as threads:
                threads.submit(first, again(chat), "call_1").result()
        return execute(sql, *arguments, **keywords)

    store.database.execute_sql = execute_late  # type: ignore[method-assign]
    with pytest.raises(InvalidValue, match="decided by another at this moment"):
        second(chat, "call_1")
    assert [row[2] for row in calls(store)] == ["approved" if first is Chat.approve else "denied"]


def test_a_call_that_was_denied_is_the_models_to_hear_of(store, resume):
    chat = parked(store, "I am sorry.", first=[REFUND, Call("refund", order="8")])
    chat.deny("call_1", "it is too old")
    chat.deny("call_2")
    assert resume(chat).content == "I am sorry."
    assert shown(chat)[2:] == [
        ("tool", "The user denied the refund tool call. Reason: it is too old"),
        ("tool", "The user denied the refund tool call."),
    ]
    assert rows(store, "tool_call", "status", "error") == [("rejected", "it is too old"), ("rejected", "denied")]


@pytest.mark.parametrize("reason", [7, ["no"], "no\x00"])
def test_a_reason_that_cannot_be_stored_is_refused(store, reason):
    chat = parked(store)
    with pytest.raises(InvalidValue, match="the reason"):
        chat.deny("call_1", reason)
    assert calls(store) == [WAITS]


# Resumed


def test_an_approved_call_runs_and_the_turn_goes_on(store, resume):
    first = Say("Let me see.", calls=[REFUND], input_tokens=10, output_tokens=4, cached_tokens=3, cost="0.25")
    chat = parked(store, Say("Done.", input_tokens=20, output_tokens=1, thinking_tokens=1, cost="0.50"), first=first)
    waiting = chat.messages()[1]
    chat.approve("call_1")

    reply = resume(chat)

    assert (reply.id, reply.status, reply.content) == (waiting.id, "completed", "Done.")
    assert messages(store) == [(0, "user", "completed", "Refund 7!"), (1, "assistant", "completed", "Done.")]
    assert rows(store, "message", "parked_at", "cancelled_at")[1] == (None, None)
    assert calls(store) == [("refund", "completed", "approved", "refunded 7")]
    assert shown(chat) == [("user", "Refund 7!"), ("assistant", "Let me see."), ("tool", "refunded 7")]
    columns = "input_tokens", "output_tokens", "cached_tokens", "thinking_tokens"
    assert rows(store, "message", *columns)[1] == (30, 5, 3, 1)
    assert (reply.input_tokens, reply.output_tokens) == (30, 5)
    question = chat.messages()[0].id
    assert rows(store, "request", "message", "turn_id", "round") == [(reply.id, question, 0), (reply.id, question, 1)]
    assert (chat.stats().cost, chat.stats().tool_calls) == (Decimal("0.75"), 1)


def test_a_resumed_stream_shows_the_second_half(store):
    chat = parked(store, "All done.", first=Say("Let me see.", calls=[REFUND]))
    chat.approve("call_1")
    stream = chat.resume_stream()
    assert [chunk.content for chunk in stream] == ["All ", "done."]
    assert stream.message is not None
    assert rows(store, "request", "streamed") == [(False,), (True,)]


def test_what_ran_before_the_turn_was_parked_does_not_run_again(store, resume):
    ran: list[str] = []

    def note(city: str) -> str:
        """Note a city."""
        ran.append(city)
        return f"noted {city}"

    chat = parked(store, "Done.", first=[Call("note", city="London"), REFUND], tools=[note, refund])
    chat.approve("call_2")
    assert resume(again(chat, "Done.", tools=[note, refund])).content == "Done."
    assert ran == ["London"]


@pytest.mark.parametrize("loaded", [False, True], ids=["same", "loaded"])
def test_the_history_of_a_turn_that_waited_is_that_of_one_that_did_not(store, ask, resume, loaded):
    """Thinking, its signatures, the order of calls and results: as the model wrote them, to the next turn too."""

    def script() -> list[Any]:
        thought = {"thinking": "Hm. Well.", "signature": "c2ln"}
        signed = Call("refund", order="7", signature="dGhvdWdodA==")
        return ["Hello.", Say("Let me see.", calls=[LONDON, signed, PARIS], **thought), "Done.", "Bye."]

    def talk(chat: Chat, waits: bool) -> list[Any]:
        ask(chat, "Hi")
        ask(chat, "Refund 7!")
        if waits:
            chat.approve("call_2")
            if loaded:
                chat = load_chat(store, chat.id, llm=chat.options.llm, tools=TOOLS)
            resume(chat)
        ask(chat, "Thanks")
        return [request["messages"] for request in chat.options.llm.requests]

    free = tool(name="refund")(refund.execute)
    assert talk(chat_with(store, *script()), True) == talk(
        chat_with(store, *script(), tools=[get_weather, free]), False
    )


def test_a_turn_may_wait_more_than_once(store, ask, resume):
    chat = chat_with(store, [REFUND, LONDON], Say("And 8.", calls=[Call("refund", order="8")]), "Enough.")
    waiting = ask(chat, "Refund all!")
    chat.approve("call_1")

    half = resume(chat)

    assert (half.id, half.status, half.content) == (waiting.id, "pending", "And 8.")
    assert half.parked_at > waiting.parked_at
    (call,) = chat.pending_approvals()
    assert (call.round, call.arguments) == (1, '{"order": "8"}')
    with pytest.raises(AwaitsApproval):
        resume(chat)
    chat.deny(call, "once is enough")
    reply = resume(chat)
    assert (reply.id, reply.status, reply.content) == (waiting.id, "completed", "Enough.")
    assert [text for _, text in shown(chat)] == [
        "Refund all!",
        None,
        "refunded 7",
        "rain in London",
        "And 8.",
        "The user denied the refund tool call. Reason: once is enough",
    ]
    assert rows(store, "request", "round") == [(0,), (1,), (2,)]


def test_the_rounds_of_a_turn_are_counted_over_both_halves(store, resume):
    chat = parked(store, LONDON, max_tool_calls=1)
    chat.approve("call_1")
    with pytest.raises(ToolRoundsExceeded):
        resume(chat)
    assert messages(store) == [(0, "user", "completed", "Refund 7!")]
    assert len(rows(store, "request", "id")) == 2


@pytest.mark.parametrize("resume", [_resume, _aresume])
def test_approved_calls_run_side_by_side(store, ask, resume):
    together = threading.Barrier(2, timeout=20)

    @tool(requires_approval=True)
    def meet(name: str) -> str:
        together.wait()
        return f"{name} was there"

    first = [Call("meet", name="Ada"), LONDON, Call("meet", name="Bob"), PARIS]
    chat = chat_with(store, first, "They met.", tools=[meet, get_weather], tool_concurrency=2)
    ask(chat, "Meet!")
    assert [row[1] for row in calls(store)] == ["pending", "completed", "pending", "completed"]
    for call in chat.pending_approvals():
        chat.approve(call)
    assert resume(chat).content == "They met."
    assert [text for _, text in shown(chat)][2:] == [
        "Ada was there",
        "rain in London",
        "Bob was there",
        "rain in Paris",
    ]


def test_hooks_hear_of_an_approved_call_once(store, ask, resume):
    chat, heard = chat_with(store, [REFUND, LONDON], "Done."), []
    chat.on_tool_call_start(lambda call: heard.append(call.name))
    chat.on_tool_result(heard.append)
    chat.on_end_message(lambda message: heard.append(message.content))
    ask(chat, "Refund 7!")
    assert heard == ["get_weather", "rain in London"]
    chat.approve("call_1")
    resume(chat)
    assert heard[2:] == ["refund", "refunded 7", "Done."]


def test_a_resumed_turn_takes_the_options_of_one_turn(store, resume):
    other = ScriptedLLM("Done.")
    chat = parked(store)
    chat.approve("call_1")
    resume(chat, llm=other, temperature=0.1)
    assert other.requests[0]["temperature"] == 0.1


def test_a_session_waits_and_is_resumed_with_the_tools_of_its_class(store, resume):
    class Clerk(Agent):
        model = "test"
        tools = TOOLS

    session = create_agent_session(store, Clerk, llm=ScriptedLLM(REFUND))
    assert session.ask("Refund 7!").status == "pending"
    session = load_agent_session(store, Clerk, session.id, llm=ScriptedLLM("Done."))
    assert session is not None
    session.approve(session.pending_approvals()[0])
    assert resume(session).content == "Done."
    assert calls(store) == [("refund", "completed", "approved", "refunded 7")]


def test_tools_that_are_missing_are_noticed_before_anything_happens(store, resume):
    chat = parked(store)
    chat.approve("call_1")
    before = everything(store)
    bare = again(chat, "never", tools=[get_weather])
    with pytest.raises(InvalidValue, match=r"tool 'refund' was approved, .*tools=\[…\]"):
        resume(bare)
    assert everything(store) == before
    assert bare.options.llm.requests == []
    assert resume(again(chat, "Done.")).content == "Done."


def test_a_call_that_was_denied_needs_no_tool(store, resume):
    chat = parked(store)
    chat.deny("call_1")
    assert resume(again(chat, "I see.", tools=[])).content == "I see."


@pytest.mark.parametrize("on_error", ["rollback", "keep"])
def test_a_resumed_turn_that_fails_is_rolled_back_or_kept_and_can_be_retried(store, resume, on_error):
    script = ProviderError(400, "no"), REFUND, "Done."
    chat = parked(store, *script, first=Say("Let me see.", calls=[REFUND]), on_error=on_error)
    chat.approve("call_1")
    with pytest.raises(ProviderError):
        resume(chat)
    kept = [(1, "assistant", "failed", None)] if on_error == "keep" else []
    assert messages(store) == [(0, "user", "completed", "Refund 7!"), *kept]
    assert calls(store) == [("refund", "completed", "approved", "refunded 7")]
    assert rows(store, "request", "status_code") == [(200,), (400,)]
    with pytest.raises(NothingToResume):
        resume(chat)

    assert chat.retry().status == "pending"
    chat.approve(chat.pending_approvals()[0])
    assert resume(chat).content == "Done."
    assert messages(store) == [(0, "user", "completed", "Refund 7!"), (1, "assistant", "completed", "Done.")]
    assert [role for role, _ in shown(chat)] == ["user", "assistant", "tool"]


def test_an_ask_after_a_resumed_turn_was_rolled_back_shows_none_of_it(store, ask, resume):
    chat = parked(store, ProviderError(400), "Hello.")
    chat.approve("call_1")
    with pytest.raises(ProviderError):
        resume(chat)
    ask(chat, "Hello?")
    assert shown(chat) == [("user", "Refund 7!"), ("user", "Hello?")]


def test_there_is_nothing_to_resume_in_a_chat_at_rest(store, resume):
    chat = chat_with(store, "Hello.", ProviderError(400))
    with pytest.raises(NothingToResume, match=r"ask\(\), or retry\(\)"):
        resume(chat)
    chat.ask("Hi")
    with pytest.raises(NothingToResume):
        resume(chat)
    with pytest.raises(ProviderError):
        chat.ask("Again?")
    with pytest.raises(NothingToResume):
        resume(chat)
    assert len(chat.options.llm.requests) == 2


def test_a_turn_that_was_resumed_is_not_resumed_again(store, resume):
    chat = parked(store, "Done.")
    chat.approve("call_1")
    resume(chat)
    with pytest.raises(NothingToResume):
        resume(chat)
    with pytest.raises(NothingToRetry):
        chat.retry()
    assert len(calls(store)) == 1


def test_a_live_turn_is_not_resumed(store, resume):
    chats: list[Chat] = []

    def model(keywords: dict[str, Any]) -> str:
        for options in ({}, {"wait": 0.01}):
            with pytest.raises(ChatBusy):
                chats[0].resume(**options)
        return "Mine."

    chats.append(chat_with(store, model))
    assert chats[0].ask("Hi").content == "Mine."
    with pytest.raises(NothingToResume):
        resume(chats[0])


def test_who_waits_to_resume_a_live_turn_has_nothing_left_to_do(store, resume):
    asked, release = threading.Event(), threading.Event()
    chat = chat_with(store, lambda keywords: asked.set() or (release.wait(20) and "Mine."))
    with ThreadPoolExecutor() as threads:
        turn = threads.submit(chat.ask, "Hi")
        assert asked.wait(20)
        after_read(store, 1, release.set)
        with pytest.raises(NothingToResume):
            resume(again(chat), wait=20)
        assert turn.result().content == "Mine."


def test_of_two_that_resume_at_once_one_gets_the_turn(store, resume):
    ran: list[str] = []
    together, release = threading.Barrier(2, timeout=20), threading.Event()

    @tool(requires_approval=True, name="refund")
    def hold(order: str) -> str:
        ran.append(order)
        assert release.wait(20)
        return f"refunded {order}"

    chat = parked(store)
    chat.approve("call_1")
    transact, number = store.transact, itertools.count()

    def transact_together(*statements: Any) -> Any:
        if next(number) < 2:
            together.wait()  # both have seen the parked turn
        return transact(*statements)

    store.transact = transact_together  # type: ignore[method-assign]

    def take() -> str:
        try:
            return resume(again(chat, "Done.", tools=[hold])).content
        except ChatBusy:
            release.set()
            return "busy"

    with ThreadPoolExecutor() as threads:
        assert sorted(task.result() for task in [threads.submit(take), threads.submit(take)]) == ["Done.", "busy"]
    assert ran == ["7"]
    assert calls(store) == [("refund", "completed", "approved", "refunded 7")]
    assert len(rows(store, "request", "id")) == 2


# Processes

CHILD = """
import asyncio, sys
from llm_orm import connect, load_chat, tool
from llm_orm.testing import Call, ScriptedLLM

url, hangs_at, *chat_ids = sys.argv[1:]

def say(text):
    print(text, flush=True)

def hang(where):
    if where == hangs_at:
        say(where)
        sys.stdin.readline()

@tool
def get_weather(city: str) -> str:
    hang("tool")
    return f"rain in {city}"

@tool(requires_approval=True)
def refund(order: str) -> str:
    hang("approved tool")
    return f"refunded {order} in another process"

def load(chat_id, *script):
    return load_chat(connect(url), chat_id, llm=ScriptedLLM(*script), tools=[get_weather, refund])

def first(keywords):
    hang("model")
    return [Call("get_weather", city="London"), Call("get_weather", city="Paris")]

def second(keywords):
    hang("second round")
    return "From the child."
"""

RESUME_EACH_WAY = """
async def read(chat):
    async with chat.aresume_stream() as stream:
        async for chunk in stream:
            pass
    return stream.message

def read_plain(chat):
    with chat.resume_stream() as stream:
        list(stream)
    return stream.message

ways = [
    lambda chat: chat.resume(),
    read_plain,
    lambda chat: asyncio.run(chat.aresume()),
    lambda chat: asyncio.run(read(chat)),
]
for resume, chat_id in zip(ways, chat_ids, strict=True):
    chat = load(chat_id, "From the child.")
    for call in chat.pending_approvals():
        chat.approve(call)
    say(resume(chat).content)
"""

ASK = "load(chat_ids[0], first, second).ask('Child?')"
RESUME = "load(chat_ids[0], second).resume()"


def test_a_turn_is_resumed_by_another_process(store, database_url):
    chats = [parked(store) for _ in RESUMES]
    printed = run(CHILD + RESUME_EACH_WAY, database_url, "nowhere", *(str(c.id) for c in chats))
    assert printed.splitlines() == ["From the child."] * 4
    assert [row[2:] for row in calls(store)] == [("approved", "refunded 7 in another process")] * 4
    for chat in chats:
        assert [message.content for message in chat.messages()] == ["Refund 7!", "From the child."]
        assert chat.options.llm.requests[1:] == []
        chat.options.llm.add("Still here.")
        assert chat.ask("And now?").content == "Still here."
        assert [role for role, _ in shown(chat)] == ["user", "assistant", "tool", "assistant", "user"]


@contextmanager
def killed(url: str, chat: Chat, hangs_at: str, does: str = ASK) -> Iterator[None]:
    """A process has died in the middle of a turn."""
    with Process(CHILD + does, url, hangs_at, str(chat.id)) as process:
        assert process.stdout.readline().strip() == hangs_at
        process.kill()
        yield


UNKNOWN = "The tool 'get_weather' was interrupted while it ran. Whether it did its work is not known."


@pytest.mark.parametrize("hangs_at", ["model", "tool", "second round"])
def test_a_turn_whose_process_was_killed_goes_on_where_it_stopped(store, database_url, hangs_at):
    dead = chat_with(store)
    with killed(database_url, dead, hangs_at):
        chat = again(dead, *([[LONDON, PARIS]] if hangs_at == "model" else []), "Back again.")
        with pytest.raises(ChatBusy):
            chat.resume()
        reply = chat.resume(stale_after=0)
    assert messages(store) == [(0, "user", "completed", "Child?"), (1, "assistant", "completed", "Back again.")]
    done, unknown = ("completed", "rain in London", None), ("failed", UNKNOWN, "interrupted")
    first = unknown if hangs_at == "tool" else done
    assert rows(store, "tool_call", "status", "result", "error") == [first, ("completed", "rain in Paris", None)]
    assert {row[0] for row in rows(store, "tool_call", "message")} == {reply.id}
    under_way = {"model": [(0, "ProcessDied", None)], "tool": [], "second round": [(1, "ProcessDied", None)]}[hangs_at]
    known = [row for row in rows(store, "request", "round", "error", "cost") if row not in under_way]
    assert [row[0] for row in known] == [0, 1]
    assert len(rows(store, "request", "round")) == len(known) + len(under_way)
    assert shown(chat) == [("user", "Child?"), ("assistant", None), ("tool", first[1]), ("tool", "rain in Paris")]


def test_a_tool_that_says_it_may_is_run_again(store, database_url):
    weather = tool(name="get_weather", idempotent=True)(get_weather.execute)
    dead = chat_with(store)
    with killed(database_url, dead, "tool"):
        chat = again(dead, "Back again.", tools=[weather])
        chat.resume(stale_after=0)
    assert rows(store, "tool_call", "status", "result") == [
        ("completed", "rain in London"),
        ("completed", "rain in Paris"),
    ]


def test_an_approved_tool_whose_process_was_killed_is_not_run_again(store, database_url):
    dead = parked(store)
    dead.approve("call_1")
    with killed(database_url, dead, "approved tool", RESUME):
        chat = again(dead, "Who knows.")
        with pytest.raises(ChatBusy):
            chat.resume()
        assert chat.resume(stale_after=0).content == "Who knows."
    told = "The tool 'refund' was interrupted while it ran. Whether it did its work is not known."
    assert calls(store) == [("refund", "failed", "approved", told)]


def test_a_tool_whose_calls_are_not_stored_is_not_run_twice_either(store, database_url):
    """Nobody knows of it whether it ran."""
    ran: list[str] = []

    @tool(name="get_weather")
    def weather(city: str) -> str:
        ran.append(city)
        return f"rain in {city}"

    def die() -> None:
        raise Died

    options: Any = {"tools": [weather], "persistence": {"tool_calls": False}}
    dying = connect(database_url)
    chat = chat_with(dying, [LONDON], lambda keywords: die_in(dying), **options)
    with pytest.raises(Died):
        chat.ask("Weather?")
    dying.close()
    survivor = load_chat(store, chat.id, llm=ScriptedLLM("Who knows."), **options)
    assert survivor is not None
    assert survivor.resume(stale_after=0).content == "Who knows."
    assert ran == ["London"]
    assert shown(survivor)[-1] == ("tool", UNKNOWN)


def test_a_tool_that_may_run_again_is_not_run_with_what_a_mask_has_left_of_its_arguments(store, database_url):
    sent: list[str] = []

    @tool(idempotent=True)
    def mail(to: str) -> str:
        sent.append(to)
        return "sent"

    options: Any = {"tools": [mail], "persistence": {"tool_calls": False}, "middlewares": [PIIMask(stored=True)]}
    dying = connect(database_url)
    chat = chat_with(dying, Call("mail", to="ada@example.com"), lambda keywords: die_in(dying), **options)
    with pytest.raises(Died):
        chat.ask("Write to her.")
    dying.close()
    survivor = load_chat(store, chat.id, llm=ScriptedLLM("Who knows."), **options)
    assert survivor is not None
    assert survivor.resume(stale_after=0).content == "Who knows."
    assert sent == ["ada@example.com"]


@pytest.mark.parametrize("says", ["STOP", "RETRY", "nothing"])
def test_who_had_not_seen_what_a_reply_asks_for_sees_it_before_it_is_run(store, database_url, says):
    """The process died while it was looked at; no tool had begun."""
    ran: list[str] = []

    @tool
    def wipe() -> str:
        ran.append("wipe")
        return "wiped"

    class Guard(Middleware):
        def on_response(self, context: TurnContext, reply: Reply) -> Any:
            if context.chat_id not in seen:
                seen.add(context.chat_id)
                die_in(dying)
            told = {"STOP": STOP, "RETRY": RETRY("Do not."), "nothing": None}
            return told[says] if reply.tool_calls else None

    seen: set[Any] = set()
    options: Any = {"tools": [wipe], "middlewares": [Guard()]}
    dying = connect(database_url)
    chat = chat_with(dying, Call("wipe"), **options)
    with pytest.raises(Died):
        chat.ask("Clean up.")
    dying.close()
    survivor = load_chat(store, chat.id, llm=ScriptedLLM("Fine."), stale_after=0, **options)
    assert survivor is not None
    with pytest.raises(StoppedByMiddleware) if says == "STOP" else nullcontext():
        assert survivor.resume().content == "Fine."
    assert ran == (["wipe"] if says == "nothing" else [])
    if says == "RETRY":
        assert shown(survivor)[-1] == ("tool", "Do not.")


def test_a_call_id_that_a_provider_uses_again_after_a_death_is_another_one(store, database_url):
    options: Any = {"tools": [get_weather], "persistence": {"tool_calls": False}}
    first, second = Call("get_weather", city="London", call_id="0"), Call("get_weather", city="Paris", call_id="0")
    dying = connect(database_url)
    chat = chat_with(dying, [first], lambda keywords: die_in(dying), **options)
    with pytest.raises(Died):
        chat.ask("Weather?")
    dying.close()
    survivor = load_chat(store, chat.id, llm=ScriptedLLM([second], "Who knows."), **options)
    assert survivor is not None
    survivor.resume(stale_after=0)
    assert [content for role, content in shown(survivor) if role == "tool"][1:] == ["rain in Paris"]
    ids = [message["tool_call_id"] for message in survivor.history if message["role"] == "tool"]
    assert len(set(ids)) == 2


# Death in this process


class Died(BaseException):
    """The process is gone: nothing that it would still do is done."""


def die_in(store: Store) -> Any:
    def execute_sql(*_: Any, **__: Any) -> Any:
        raise pw.OperationalError("the process is gone") if is_heart() else Died

    store.database.execute_sql = execute_sql  # type: ignore[method-assign]
    raise Died


def is_heart() -> bool:
    """Whether it is not the turn that speaks, but who looks in where a turn takes long."""
    return threading.current_thread().name == "llm_orm heart"


def deadly(store: Store, number: int) -> list[str]:
    """Have the process die right before statement `number` (from 0); gives the statements that were sent."""
    execute, said = store.database.execute_sql, []

    def execute_sql(sql: str, *arguments: Any, **keywords: Any) -> Any:
        if is_heart():
            return execute(sql, *arguments, **keywords)
        said.append(sql)
        if len(said) == number + 1:
            die_in(store)
        return execute(sql, *arguments, **keywords)

    store.database.execute_sql = execute_sql  # type: ignore[method-assign]
    return said


def finish(chat: Chat) -> Any:
    """See the chat's turn through, whatever state it is in."""
    while True:
        for call in chat.pending_approvals():
            chat.approve(call)
        try:
            reply = chat.resume(stale_after=0)
        except NothingToResume:
            return chat.messages()[-1] if chat.messages() else None
        if reply.status != "pending":
            return reply


@pytest.mark.parametrize(
    ("database_url", "way"), [("sqlite", "ask"), ("postgresql", "aask_stream")], indirect=["database_url"]
)
def test_a_turn_goes_on_after_death_at_any_statement(store, database_url, way):
    """Asked, approved and resumed by a process that dies, and seen through by another: no tool runs twice."""
    for number in itertools.count():
        ran: list[str] = []

        def note(city: str) -> str:
            """Note a city."""
            ran.append(city)  # noqa: B023
            return f"noted {city}"

        @tool(requires_approval=True)
        def pay(amount: int) -> str:
            ran.append(str(amount))  # noqa: B023
            return f"paid {amount}"

        def model(keywords: dict[str, Any]) -> Any:
            roles = [message["role"] for message in keywords["messages"]]
            if "tool" in roles:
                return "Done."
            return Say(
                "Let me see.", calls=[Call("note", call_id="a", city="London"), Call("pay", call_id="b", amount=7)]
            )

        options: Any = {"tools": [note, pay], "on_error": "keep"}
        chat_id = create_chat(store, model="test").id
        dying = connect(database_url)
        chat: Any = load_chat(dying, chat_id, llm=ScriptedLLM(*[model] * 4), **options)
        said = deadly(dying, number)
        try:
            WAYS[way](chat, "Pay!")
            chat.approve("b")
            RESUMES[way.replace("ask", "resume")](chat)
        except Died:
            pass
        dying.close()
        survivor: Any = load_chat(store, chat_id, llm=ScriptedLLM(*[model] * 4, "Bye."), **options)
        reply = finish(survivor)
        if reply is not None:
            assert (reply.status, reply.content) == ("completed", "Done.")
            survivor.options.llm.script[:] = ["Bye."]
            survivor.ask("Thanks!")
            history = survivor.options.llm.requests[-1]["messages"]
            assert [message["role"] for message in history] == [
                "user",
                "assistant",
                "tool",
                "tool",
                "assistant",
                "user",
            ]
            results = [row for row in rows(store, "tool_call", "chat", "result", "status") if row[0] == chat_id]
            assert [message["content"] for message in history if message["role"] == "tool"] == [r[1] for r in results]
            assert {row[2] for row in results} <= {"completed", "failed"}
            assert len(set(ran)) == len(ran)
        if len(said) <= number:
            break
    assert number >= 10


def test_a_reply_that_was_whole_when_its_process_died_is_only_said_to_be_so(store, database_url, resume):
    dying = connect(database_url)
    chat = chat_with(dying, Say("Whole.", input_tokens=7), tools=[]).after_response(lambda reply: die_in(dying))
    with pytest.raises(Died):
        chat.ask("Hi")
    dying.close()
    assert messages(store)[1] == (1, "assistant", "pending", "Whole.")
    survivor = load_chat(store, chat.id, llm=ScriptedLLM())
    assert survivor is not None
    reply = resume(survivor, stale_after=0)
    assert (reply.status, reply.content, reply.input_tokens) == ("completed", "Whole.", 7)
    assert messages(store)[1] == (1, "assistant", "completed", "Whole.")
    assert len(rows(store, "request", "id")) == 1


def test_a_turn_that_died_before_it_was_parked_is_parked_by_who_resumes_it(store, database_url, resume):
    dying = connect(database_url)

    @tool(name="get_weather", idempotent=True)
    def die(city: str) -> str:
        return die_in(dying)

    chat = chat_with(dying, Say("Let me see.", calls=[REFUND, LONDON], input_tokens=5), tools=[die, refund])
    with pytest.raises(Died):
        chat.ask("Refund 7!")
    dying.close()
    survivor = load_chat(
        store, chat.id, llm=ScriptedLLM("Done."), tools=[*TOOLS[1:], tool(idempotent=True)(get_weather.execute)]
    )
    assert survivor is not None
    reply = resume(survivor, stale_after=0)
    assert (reply.status, reply.content, reply.input_tokens) == ("pending", "Let me see.", 5)
    assert calls(store) == [WAITS, ("get_weather", "completed", None, "rain in London")]
    survivor.approve("call_1")
    assert resume(survivor).content == "Done."

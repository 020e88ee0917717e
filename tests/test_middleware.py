"""What is put around every call of a model and of a tool: who is called, in which order, and what they can say."""

import asyncio
import json
import logging
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydantic
import pytest
from conftest import WAYS, Ask, rows

from llm_orm import (
    CONTINUE,
    REPLACE,
    RETRY,
    STOP,
    AsyncTool,
    Chat,
    CorrectionsExceeded,
    CostGuard,
    CostLimitExceeded,
    InvalidReply,
    InvalidValue,
    Middleware,
    PIIMask,
    Reply,
    ReplyNotSaved,
    SchemaSelfCorrection,
    Stats,
    StoppedByMiddleware,
    Store,
    ToolError,
    TurnContext,
    UsageLogger,
    connect,
    create_agent_session,
    create_chat,
    define_agent,
    load_chat,
    tool,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

METHODS = ("on_request", "on_response", "on_error", "on_tool_call_start", "on_tool_call_end", "on_tool_call_error")

LONDON, PARIS = Call("get_weather", city="London"), Call("get_weather", city="Paris")

ran: list[str] = []


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    ran.clear()


@tool
def get_weather(city: str) -> str:
    """Current weather in a city."""
    ran.append(city)
    return f"rain in {city}"


@tool
def fail(city: str = "") -> str:
    ran.append("fail")
    raise ValueError(f"no such place: {city}")


@tool
def stop(city: str = "") -> str:
    ran.append("stop")
    raise ToolError("the order is locked", fatal=True)


TOOLS = (get_weather, fail, stop)


def chat_with(store: Store, *script: Any, **options: Any) -> Chat:
    return create_chat(store, model="test", llm=ScriptedLLM(*script), **{"tools": TOOLS, **options})


def says(**answers: Any) -> Any:
    """A middleware with these methods; each returns what it is given here, or what that returns, or raises it."""

    def method(answer: Any) -> Callable[..., Any]:
        def said(*arguments: Any) -> Any:
            given = answer(*arguments) if callable(answer) else answer
            if isinstance(given, Exception):
                raise given
            return given

        return said

    return SimpleNamespace(**{name: method(answer) for name, answer in answers.items()})


def once(answer: Any) -> Callable[..., Any]:
    """The answer when asked for the first time, and None from then on."""
    left = [answer]
    return lambda *_: left.pop() if left else None


def sent(chat: Chat, number: int = -1) -> list[tuple[str, Any]]:
    """What the model was shown on a call."""
    messages = chat.options.llm.requests[number]["messages"]
    return [(message["role"], message["content"]) for message in messages]


def calls_of_the_model(chat: Chat) -> int:
    return len(chat.options.llm.requests)


def chunks_of(chat: Chat, text: str = "Hi", **options: Any) -> list[Any]:
    return list(chat.ask_stream(text, **options))


def shown(chunks: list[Any]) -> str:
    """What the reader of a stream is left with, who heeds `restart`."""
    text = ""
    for chunk in chunks:
        text = "" if chunk.restart else text + chunk.content
    return text


# Who is called, with what, in which order


class Listener(Middleware):
    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.contexts: list[TurnContext] = []

    def hear(self, name: str, context: TurnContext, *said: Any) -> None:
        self.contexts.append(context)
        self.heard.append((name, context.round, *said))

    def on_request(self, context: TurnContext) -> None:
        self.hear("on_request", context, [message["role"] for message in context.messages])

    def on_response(self, context: TurnContext, reply: Reply) -> None:
        assert context.duration_ms >= 0
        names = [call.name for call in reply.tool_calls]
        self.hear("on_response", context, reply.content, names, reply.usage.input_tokens, reply.cost)

    def on_error(self, context: TurnContext, error: Exception) -> None:
        self.hear("on_error", context, error)

    def on_tool_call_start(self, context: TurnContext, call: Any) -> None:
        self.hear("on_tool_call_start", context, call.name, call.parsed_arguments)

    def on_tool_call_end(self, context: TurnContext, call: Any, outcome: Any) -> None:
        self.hear("on_tool_call_end", context, call.name, outcome.status, outcome.result)

    def on_tool_call_error(self, context: TurnContext, call: Any, error: Exception) -> None:
        self.hear("on_tool_call_error", context, call.name, repr(error))


def test_each_method_is_called_with_what_it_is_about(store: Store, ask: Ask):
    listener, broken = Listener(), ProviderError(400, "no more")
    chat = chat_with(store, Say("Let me look.", calls=[LONDON, Call("fail")]), "Rain.", broken, middlewares=[listener])
    ask(chat, "How is the weather?")
    told = "Error executing tool 'fail': no such place: "
    assert listener.heard == [
        ("on_request", 0, ["user"]),
        ("on_response", 0, "Let me look.", ["get_weather", "fail"], 4, None),
        ("on_tool_call_start", 0, "get_weather", {"city": "London"}),
        ("on_tool_call_end", 0, "get_weather", "completed", "rain in London"),
        ("on_tool_call_start", 0, "fail", {}),
        ("on_tool_call_error", 0, "fail", "ValueError('no such place: ')"),
        ("on_tool_call_end", 0, "fail", "failed", told),
        ("on_request", 1, ["user", "assistant", "tool", "tool"]),
        ("on_response", 1, "Rain.", [], 17, None),
    ]
    listener.heard.clear()
    with pytest.raises(ProviderError):
        ask(chat, "And now?")
    assert listener.heard == [
        ("on_request", 0, ["user", "assistant", "tool", "tool", "assistant", "user"]),
        ("on_error", 0, broken),
    ]


def test_a_middleware_is_told_which_turn_of_which_chat_it_is_called_in(store: Store, ask: Ask, request: Any):
    listener = Listener()
    chat = chat_with(store, LONDON, "Rain.", "Hello!", metadata={"customer": "c_1"}, effort="low").use(listener)
    first, second = ask(chat, "How is the weather?"), ask(chat, "Hi")
    contexts = list({id(context): context for context in listener.contexts}.values())
    assert len(contexts) == 2  # one for the whole turn
    for context, reply in zip(contexts, (first, second), strict=True):
        question = chat.messages()[reply.position - 1]
        assert (context.chat_id, context.turn_id, context.metadata) == (chat.id, question.id, {"customer": "c_1"})
        assert (context.model, context.provider, context.schema) == ("test", "scripted", None)
        assert context.options.thinking == {"effort": "low"}
        assert context.streamed is request.node.callspec.params["ask"].endswith("stream")


def ordered(name: str, heard: list[str]) -> Any:
    return says(**{method: lambda *_, said=f"{method} {name}": heard.append(said) for method in METHODS})


def test_global_ones_come_before_local_ones_ends_come_in_reverse_and_the_chats_hooks_within(
    store: Store, database_url: str, ask: Ask
):
    """NodeLLM's C18, C46: hooks took each other's place, and a stream asked nobody at its end."""
    heard: list[str] = []
    names = ["connect", "store.use", "chat", "chat.use", "ask"]
    made = {name: ordered(name, heard) for name in names}
    with connect(database_url, middlewares=[made["connect"]]) as other:
        other.use(made["store.use"])
        chat = chat_with(other, [LONDON, Call("fail")], "Rain.", ProviderError(400), middlewares=[made["chat"]])
        chat.use(made["chat.use"])
        for hook in (
            *("before_request", "after_response", "on_new_message", "on_end_message"),
            *("on_tool_call_start", "on_tool_call_end", "on_tool_result", "on_tool_call_error"),
        ):
            getattr(chat, hook)(lambda *_, said=f"hook {hook}": heard.append(said))
        ask(chat, "How is the weather?", middlewares=[made["ask"]])

        def forth(method: str) -> list[str]:
            return [f"{method} {name}" for name in names]

        def back(method: str) -> list[str]:
            return forth(method)[::-1]

        a_call = [
            *forth("on_request"),
            *("hook before_request", "hook on_new_message", "hook after_response"),
            *back("on_response"),
        ]
        start = [*forth("on_tool_call_start"), "hook on_tool_call_start"]
        end = ["hook on_tool_call_end", *back("on_tool_call_end"), "hook on_tool_result"]
        failure = [*back("on_tool_call_error"), "hook on_tool_call_error"]
        assert heard == [*a_call, *start, *end, *start, *failure, *end, *a_call, "hook on_end_message"]

        heard.clear()
        with pytest.raises(ProviderError):
            ask(chat, "And now?", middlewares=[made["ask"]])
        before = [*forth("on_request"), "hook before_request", "hook on_new_message"]
        assert heard == [*before, *back("on_error")]


def test_those_of_one_ask_are_gone_with_it_and_take_nobodys_place(store: Store, ask: Ask):
    heard: list[str] = []
    chat = chat_with(store, "One.", "Two.", middlewares=[ordered("chat", heard)])
    ask(chat, "1", middlewares=[ordered("ask", heard)])
    ask(chat, "2")
    assert heard == [
        *("on_request chat", "on_request ask", "on_response ask", "on_response chat"),
        *("on_request chat", "on_response chat"),
    ]


def test_those_of_one_ask_leave_an_agent_its_rescues(store: Store, ask: Ask):
    agent = define_agent("Careful", model="test", rescues={"ProviderError": "We are busy."})
    session = create_agent_session(store, agent, llm=ScriptedLLM(ProviderError(400)))
    assert ask(session, "Hi", middlewares=[Listener()]).content == "We are busy."


@pytest.mark.parametrize("way", ["aask", "aask_stream"])
def test_async_methods_are_awaited_and_what_they_return_counts(store: Store, way: str):
    heard: list[str] = []

    def method(name: str) -> Callable[..., Any]:
        async def said(*_: Any) -> Any:
            await asyncio.sleep(0)
            heard.append(name)
            return REPLACE("never mind") if name.endswith("error") else None

        return said

    chat = chat_with(store, Call("fail"), ProviderError(400)).use(SimpleNamespace(**{m: method(m) for m in METHODS}))
    assert WAYS[way](chat, "Hi").content == "never mind"
    assert heard == [
        *("on_request", "on_response", "on_tool_call_start", "on_tool_call_error", "on_tool_call_end"),
        *("on_request", "on_error"),
    ]
    assert rows(store, "tool_call", "result") == [("never mind",)]


@pytest.mark.parametrize("way", ["ask", "ask_stream"])
@pytest.mark.parametrize("name", METHODS)
def test_an_async_method_in_a_plain_ask_is_refused_before_anything_is_written(store: Store, way: str, name: str):
    async def method(*_: Any) -> None:
        pass

    chat = chat_with(store, "Hi", middlewares=[SimpleNamespace(**{name: method})])
    with pytest.raises(AsyncTool, match=rf"{name} of a middleware .* is async: use aask\(\) or aask_stream\(\)"):
        WAYS[way](chat, "Hello")
    assert rows(store, "message", "role") == []


class Later:
    """Async, and nobody can see it from the outside."""

    def on_request(self, context: TurnContext) -> Any:
        async def wait() -> None:
            pass

        return wait()


@pytest.mark.parametrize("way", ["ask", "ask_stream"])
def test_an_awaitable_that_a_plain_ask_is_given_is_a_clear_error(store: Store, way: str):
    chat = chat_with(store, "Hi", middlewares=[Later()])
    with pytest.raises(AsyncTool, match=r"on_request.* is async: use aask"):
        WAYS[way](chat, "Hello")
    assert rows(store, "message", "role") == [("user",)]


def test_an_object_with_one_of_the_methods_will_do(store: Store, ask: Ask):
    roles: list[str] = []

    class Mine:
        def on_request(self, context: TurnContext) -> None:
            roles.extend(message["role"] for message in context.messages)

    ask(chat_with(store, "Hello!", middlewares=[Mine()]), "Hi")
    assert roles == ["user"]


def test_what_is_no_middleware_is_refused_wherever_it_is_given(store: Store, database_url: str):
    chat = chat_with(store, "Hello!")
    for give in (
        lambda given: connect(database_url, middlewares=[given]),
        lambda given: store.use(given),
        lambda given: create_chat(store, model="test", middlewares=[given]),
        lambda given: load_chat(store, chat.id, middlewares=[given]),
        lambda given: chat.use(given),
        lambda given: chat.ask("Hi", middlewares=[given]),
    ):
        with pytest.raises(InvalidValue, match="is not a middleware: it needs one of on_request, "):
            give(object())
        with pytest.raises(InvalidValue, match=r"make it one: UsageLogger\(\)"):
            give(UsageLogger)
    with pytest.raises(InvalidValue, match="must be a list of middlewares"):
        chat.ask("Hi", middlewares=UsageLogger())
    assert rows(store, "chat", "id") == [(chat.id,)]
    assert rows(store, "message", "id") == []


def test_what_is_stored_cannot_be_waited_for(store: Store):
    async def stored_text(text: str) -> str:
        return text

    with pytest.raises(InvalidValue, match=r"the stored_text of .* must be a plain function"):
        chat_with(store, middlewares=[SimpleNamespace(stored_text=stored_text)])


def test_what_a_middleware_keeps_is_there_until_the_turn_ends(store: Store, ask: Ask):
    counts: list[int] = []

    def count(context: TurnContext) -> None:
        context.state["calls"] = context.state.get("calls", 0) + 1
        counts.append(context.state["calls"])

    chat = chat_with(store, LONDON, "Rain.", "Hello!", middlewares=[says(on_request=count)])
    ask(chat, "How is the weather?")
    ask(chat, "Hi")
    assert counts == [1, 2, 1]


PRICED = {"input_cost_per_token": "0.5", "output_cost_per_token": "2"}


def test_what_the_chat_has_cost_is_read_before_each_call_for_those_who_ask(store: Store, ask: Ask):
    heard: list[Any] = []

    class Sums(Middleware):
        needs_spent = True

        def on_request(self, context: TurnContext) -> None:
            heard.append(context.spent)

    script = [Say(calls=[LONDON], input_tokens=10, output_tokens=1), Say("Rain.", input_tokens=20, output_tokens=1)]
    chat = create_chat(store, model="test", llm=ScriptedLLM(*script, "Hello!", "Bye.", **PRICED), tools=TOOLS)
    ask(chat, "Weather?", middlewares=[Sums()])
    ask(chat, "Hi", middlewares=[Sums()])
    assert all(isinstance(spent, Stats) for spent in heard)
    assert [(spent.requests, spent.input_tokens, spent.cost) for spent in heard] == [
        (0, 0, 0),
        (1, 10, Decimal(7)),
        (2, 30, Decimal(19)),
    ]
    heard.clear()
    ask(chat, "Bye", middlewares=[says(on_request=lambda context: heard.append(context.spent))])
    assert heard == [None]


def test_what_the_turn_has_cost_counts_its_own_calls_alone(store: Store, ask: Ask):
    heard: list[Decimal] = []
    script = [Say("One.", cost="3"), Say(calls=[LONDON], cost="0.25"), Say("Rain.", cost="0.5")]
    chat = chat_with(store, *script, middlewares=[says(on_request=lambda context: heard.append(context.spent_in_turn))])
    ask(chat, "1")
    ask(chat, "Weather?")
    assert heard == [0, 0, Decimal("0.25")]


def test_a_call_is_estimated_by_what_will_be_sent_and_the_most_that_may_come_back(store: Store, ask: Ask):
    heard: list[Any] = []

    def shorten(context: TurnContext) -> None:
        heard.append(context.estimate())
        context.messages = [{"role": "user", "content": "one two"}]
        heard.append(context.estimate())

    llm = ScriptedLLM("Hello!", "Hello!", **PRICED)
    chat = create_chat(store, model="test", llm=llm, middlewares=[says(on_request=shorten)])
    ask(chat, "one two three four")
    ask(chat, "one two three four", max_tokens=10, history=0)
    assert heard == [Decimal(2), Decimal(1), Decimal(22), Decimal(21)]

    heard.clear()
    ask(chat_with(store, "Hello!").use(says(on_request=lambda context: heard.append(context.estimate()))), "Hi")
    assert heard == [None]


def test_a_middleware_is_told_of_the_model_that_is_asked_in_the_place_of_another(store: Store, ask: Ask):
    listener, heard = Listener(), []
    chat = chat_with(store, ProviderError(401), "Hello!", fallbacks="other", middlewares=[listener])
    chat.use(says(on_request=lambda context: heard.append((context.model, context.round))))
    ask(chat, "Hi")
    assert heard == [("test", 0), ("other", 0)]
    assert [said[0] for said in listener.heard] == ["on_request", "on_request", "on_response"]  # and of no error


# RETRY


def test_what_a_reply_is_sent_back_with_reaches_the_model(store: Store, ask: Ask):
    """NodeLLM's C9: the second request was the first, byte by byte, and correction_rounds were never written."""
    bad = ("Bad.", "Worse.")
    retry = says(on_response=lambda context, reply: RETRY(f"No: {reply.content}") if reply.content in bad else None)
    chat = chat_with(store, "Bad.", "Worse.", "Good.", "Hello again!", middlewares=[retry])
    reply = ask(chat, "Say something good.")

    assert reply.content == "Good."
    assert sent(chat) == [
        ("user", "Say something good."),
        *[("assistant", "Bad."), ("user", "No: Bad.")],
        *[("assistant", "Worse."), ("user", "No: Worse.")],
    ]
    assert rows(store, "request", "round", "attempt", "status_code", "correction_rounds") == [
        (0, 1, 200, None),
        (1, 1, 200, 1),
        (2, 1, 200, 2),
    ]
    assert rows(store, "message", "role", "content", "content_raw", "input_tokens") == [
        ("user", "Say something good.", None, None),
        ("assistant", "Good.", None, 3 + 6 + 9),
    ]
    ask(chat, "Hi")
    assert sent(chat) == [("user", "Say something good."), ("assistant", "Good."), ("user", "Hi")]


def test_a_reply_that_was_sent_back_is_not_in_the_rounds_of_its_turn(store: Store, ask: Ask):
    chat = chat_with(store, LONDON, "Sun.", Say("Rain.", thinking="Oh."), "Bye.")
    retry = says(on_response=lambda context, reply: RETRY("Sure?") if reply.content == "Sun." else None)
    ask(chat, "Weather?", middlewares=[retry])
    ask(chat, "Thanks.")
    assert sent(chat) == [
        *[("user", "Weather?"), ("assistant", None), ("tool", "rain in London"), ("assistant", "Rain.")],
        ("user", "Thanks."),
    ]
    assert "Sun." not in str(rows(store, "message", "content", "content_raw"))


def test_a_retry_without_a_message_asks_the_same_again(store: Store, ask: Ask):
    chat = chat_with(store, "Bad.", "Good.", middlewares=[says(on_response=once(RETRY()))])
    assert ask(chat, "Hi").content == "Good."
    assert sent(chat, 0) == sent(chat, 1) == [("user", "Hi")]


def test_retry_may_be_returned_bare_as_stop_and_continue_are(store: Store, ask: Ask):
    chat = chat_with(store, "No.", "Yes.", middlewares=[says(on_response=once(RETRY))])
    assert ask(chat, "Hi").content == "Yes."


@pytest.mark.parametrize("directive", [STOP, RETRY, RETRY("Again."), REPLACE("Cached.")])
def test_a_directive_where_none_is_heeded_is_refused_before_the_call(store: Store, ask: Ask, directive: Any):
    chat = chat_with(store, "Hello.", middlewares=[says(on_request=directive)])
    with pytest.raises(
        InvalidValue, match=r"on_request returned .*, and decides nothing: to end the turn there, raise"
    ):
        ask(chat, "Hi")
    assert calls_of_the_model(chat) == 0


def test_a_model_is_not_sent_back_for_ever(store: Store, ask: Ask):
    heard: list[Any] = []
    endless = says(on_response=RETRY("Again."), on_error=lambda context, error: heard.append(error) or RETRY("Again."))
    chat = chat_with(store, *["Bad."] * 30, middlewares=[endless])
    with pytest.raises(CorrectionsExceeded, match=rf"21 times in one turn of chat {chat.id}: bound what") as raised:
        ask(chat, "Hi")
    assert heard == [raised.value]
    assert rows(store, "request", "status_code", "correction_rounds") == [(200, number or None) for number in range(21)]
    assert rows(store, "message", "role") == [("user",)]
    assert ask(chat_again(chat), "Again?").content == "Still here."


def chat_again(chat: Chat) -> Chat:
    """The same chat, without what stood in its way."""
    again = load_chat(chat.store, chat.id, llm=ScriptedLLM("Still here."))
    assert again is not None
    return again


@pytest.mark.parametrize("way", ["ask_stream", "aask_stream"])
def test_the_reader_of_a_stream_is_told_that_the_reply_begins_anew(store: Store, way: str):
    """NodeLLM's C46: streams ignored what on_response returned."""
    retry = says(on_response=once(RETRY("Again.")))
    chat = chat_with(store, "Bad one.", "Good one.", middlewares=[retry])
    if way == "ask_stream":
        chunks = chunks_of(chat)
    else:

        async def read() -> list[Any]:
            return [chunk async for chunk in chat.aask_stream("Hi")]

        chunks = asyncio.run(read())
    assert [(chunk.content, chunk.restart) for chunk in chunks] == [
        *[("Bad ", False), ("one.", False)],
        ("", True),
        *[("Good ", False), ("one.", False)],
    ]
    assert shown(chunks) == chat.messages()[-1].content == "Good one."


def test_nothing_restarts_where_nothing_was_shown(store: Store):
    chat = chat_with(store, Say(None), "Good.", middlewares=[says(on_response=once(RETRY("Say something.")))])
    assert [(chunk.content, chunk.restart) for chunk in chunks_of(chat)] == [("Good.", False)]


def test_tool_calls_that_are_sent_back_do_not_run_and_their_result_says_why(store: Store, ask: Ask):
    retry = says(on_response=once(RETRY("Ask for Paris alone.")))
    script = [Say("Both.", calls=[LONDON, PARIS]), PARIS, "Rain.", "Bye."]
    chat = chat_with(store, *script, middlewares=[retry])
    assert ask(chat, "Weather?").content == "Rain."
    assert ran == ["Paris"]
    rejected = "Ask for Paris alone."
    told = [("user", "Weather?"), ("assistant", "Both."), ("tool", rejected), ("tool", rejected)]
    assert sent(chat, 1) == told
    assert rows(store, "tool_call", "round", "status", "result", "error") == [
        (0, "rejected", rejected, "a middleware sent the model back"),
        (0, "rejected", rejected, "a middleware sent the model back"),
        (1, "completed", "rain in Paris", None),
    ]
    assert rows(store, "request", "correction_rounds") == [(None,), (1,), (1,)]
    ask(chat, "Thanks.")
    assert sent(chat)[:4] == told  # it did ask, and was told


def test_a_failed_call_of_the_model_is_made_again_where_on_error_says_so(store: Store, ask: Ask):
    chat = chat_with(store, ProviderError(400, "too long"), "Good.").use(says(on_error=once(RETRY("Be brief."))))
    assert ask(chat, "Hi").content == "Good."
    assert sent(chat) == [("user", "Hi"), ("user", "Be brief.")]
    assert rows(store, "request", "status_code", "error_message", "correction_rounds") == [
        (400, "too long", None),
        (200, None, 1),
    ]
    assert rows(store, "message", "role", "status") == [("user", "completed"), ("assistant", "completed")]


@pytest.mark.parametrize("way", ["ask_stream", "aask_stream"])
def test_what_a_broken_stream_gave_is_said_to_the_model_and_taken_back_from_the_reader(store: Store, way: str):
    broken = Say("It was a", error=ProviderError(500))
    chat = chat_with(store, broken, "dark night.", middlewares=[says(on_error=once(RETRY("Go on.")))], retries=0)
    chunks = chunks_of(chat) if way == "ask_stream" else []
    reply = chat.messages()[-1] if chunks else WAYS[way](chat, "Hi")
    assert sent(chat) == [("user", "Hi"), ("assistant", "It was a"), ("user", "Go on.")]
    assert reply.content == "dark night."
    assert not chunks or shown(chunks) == "dark night."


def test_only_a_failed_call_of_the_model_can_be_made_again(store: Store, ask: Ask):
    again, refusal = says(on_error=RETRY("Again.")), PermissionError("not you")
    cases: list[tuple[Any, dict[str, Any], type[Exception], int]] = [
        (Call("stop"), {}, ToolError, 1),
        ("Hello!", {"middlewares": [says(on_request=refusal)]}, PermissionError, 0),
        (LONDON, {"middlewares": [says(on_tool_call_start=refusal)]}, PermissionError, 1),
        ("no JSON", {"schema": dict[str, int], "corrections": 0}, InvalidReply, 1),
    ]
    for said, more, error, calls in cases:
        chat = chat_with(store, said, "never", **more).use(again)
        with pytest.raises(error):
            ask(chat, "Hi")
        assert calls_of_the_model(chat) == calls
        assert [message.role for message in chat.messages()] == ["user"]


def test_a_failed_tool_is_run_once_more_and_not_twice(store: Store, ask: Ask):
    """NodeLLM's C30: a second run was a second row, which the database refused."""
    heard: list[str] = []

    def again(context: TurnContext, call: Any, error: Exception) -> RETRY:
        heard.append(str(error))
        return RETRY()

    @tool
    def flaky(times: int) -> str:
        ran.append("flaky")
        if len(ran) <= times:
            raise ValueError(f"failed {len(ran)}")
        return "done"

    chat = chat_with(store, Call("flaky", times=1), "Good.", tools=[flaky]).use(says(on_tool_call_error=again))
    ask(chat, "Try.")
    assert (len(ran), heard) == (2, ["failed 1"])
    assert rows(store, "tool_call", "status", "result", "error") == [("completed", "done", None)]

    ran.clear()
    heard.clear()
    chat.options.llm.add(Call("flaky", times=9), "Bad.")
    assert ask(chat, "Try.").content == "Bad."
    assert (len(ran), heard) == (2, ["failed 1", "failed 2"])
    assert rows(store, "tool_call", "status", "result", "error")[1:] == [
        ("failed", "Error executing tool 'flaky': failed 2", "ValueError: failed 2")
    ]


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_tool_that_is_run_once_more_is_started_and_ended_once(store: Store, ask: Ask, at_once: int):
    listener = Listener()
    chat = chat_with(
        store,
        [LONDON, Call("fail"), PARIS],
        "Rain.",
        middlewares=[listener, says(on_tool_call_error=RETRY())],
        tool_concurrency=at_once,
    )
    ask(chat, "Weather?")
    heard = [said[0] for said in listener.heard if said[2] == "fail"]
    assert heard == ["on_tool_call_start", *["on_tool_call_error"] * 2, "on_tool_call_end"]
    assert sorted(ran) == ["London", "Paris", "fail", "fail"]
    assert rows(store, "tool_call", "status") == [("completed",), ("failed",), ("completed",)]


# REPLACE


@pytest.mark.parametrize("response", ["Never mind.", Reply(content="Never mind.", thinking="hidden")])
def test_a_reply_is_replaced_by_a_text_or_another_reply(store: Store, ask: Ask, response: Any):
    chat = chat_with(store, Say("Secret.", thinking="Secret, too.", signature="sig"), "Bye.")
    reply = ask(chat, "Hi", middlewares=[says(on_response=REPLACE(response))])
    assert (reply.status, reply.content, reply.model_id) == ("completed", "Never mind.", None)
    columns = ("content", "content_raw", "thinking_text", "thinking_signature")
    assert "Secret" not in str(rows(store, "message", *columns))
    assert rows(store, "request", "status_code", "output_tokens") == [(200, 1)]
    ask(chat, "Thanks.")
    assert sent(chat) == [("user", "Hi"), ("assistant", "Never mind."), ("user", "Thanks.")]


def test_the_reader_of_a_stream_is_shown_what_a_reply_is_replaced_by(store: Store):
    chat = chat_with(store, "Secret words.", middlewares=[says(on_response=REPLACE("Never mind."))])
    chunks = chunks_of(chat)
    assert [(chunk.content, chunk.restart) for chunk in chunks] == [
        *[("Secret ", False), ("words.", False), ("", True), ("Never mind.", False)],
    ]


def test_to_replace_a_reply_that_asks_for_tools_ends_the_turn_and_runs_none(store: Store, ask: Ask):
    chat = chat_with(store, Say("Both.", calls=[LONDON, PARIS]), "Bye.")
    assert ask(chat, "Weather?", middlewares=[says(on_response=REPLACE("Look outside."))]).content == "Look outside."
    assert ran == []
    assert rows(store, "tool_call", "status", "result") == [("rejected", "Not run."), ("rejected", "Not run.")]
    ask(chat, "Thanks.")
    assert sent(chat) == [
        *[("user", "Weather?"), ("assistant", "Both."), ("tool", "Not run."), ("tool", "Not run.")],
        *[("assistant", "Look outside."), ("user", "Thanks.")],
    ]


def test_a_reply_in_the_place_of_another_cannot_ask_for_tools(store: Store, ask: Ask):
    asking = says(on_response=lambda context, reply: REPLACE(Reply(tool_calls=reply.tool_calls)))
    chat = chat_with(store, LONDON, middlewares=[asking])
    with pytest.raises(InvalidValue, match="cannot ask for tools"):
        ask(chat, "Weather?")
    assert rows(store, "request", "status_code") == [(200,)]


def test_an_error_is_replaced_by_a_reply(store: Store, ask: Ask):
    chat = chat_with(store, ProviderError(400, "no"), Call("stop"), "Bye.")
    busy = says(on_error=lambda context, error: REPLACE(f"Sorry: {error}"))
    reply = ask(chat, "Hi", middlewares=[busy])
    assert (reply.status, reply.content, reply.model_id) == ("completed", "Sorry: no", None)
    assert rows(store, "request", "status_code", "error", "error_message") == [(400, "ProviderError", "no")]

    assert ask(chat, "Order!", middlewares=[busy]).content == "Sorry: the order is locked"
    assert rows(store, "tool_call", "status", "error") == [("failed", "ToolError: the order is locked")]

    ask(chat, "Thanks.")
    assert sent(chat) == [
        *[("user", "Hi"), ("assistant", "Sorry: no"), ("user", "Order!"), ("assistant", None)],
        *[("tool", "Error executing tool 'stop': the order is locked"), ("assistant", "Sorry: the order is locked")],
        ("user", "Thanks."),
    ]


def test_a_broken_stream_is_replaced_before_its_readers_eyes(store: Store):
    broken = Say("It was a", error=ProviderError(500))
    chat = chat_with(store, broken, middlewares=[says(on_error=REPLACE("Sorry."))], retries=0)
    assert shown(chunks_of(chat)) == chat.messages()[-1].content == "Sorry."
    assert rows(store, "request", "status_code") == [(500,)]


@pytest.mark.parametrize("name", ["fail", "stop"])
def test_a_tools_error_is_replaced_by_a_result(store: Store, ask: Ask, name: str):
    chat = chat_with(store, Call(name), "Good.", middlewares=[says(on_tool_call_error=REPLACE("Ask the manager."))])
    assert ask(chat, "Order!").content == "Good."
    assert sent(chat)[-1] == ("tool", "Ask the manager.")
    ((status, result, error),) = rows(store, "tool_call", "status", "result", "error")
    assert (status, result) == ("failed", "Ask the manager.")
    assert error.startswith(("ValueError: no such place", "ToolError: the order is locked"))


# CONTINUE and STOP


def test_a_fatal_error_of_a_tool_may_be_gone_on_from(store: Store, ask: Ask):
    chat = chat_with(store, Call("stop"), "I see.", middlewares=[says(on_tool_call_error=CONTINUE)])
    assert ask(chat, "Order!").content == "I see."
    assert sent(chat)[-1] == ("tool", "Error executing tool 'stop': the order is locked")


def test_an_error_of_a_tool_that_is_not_fatal_may_end_the_turn(store: Store, ask: Ask):
    chat = chat_with(store, [Call("fail"), LONDON], middlewares=[says(on_tool_call_error=STOP)])
    with pytest.raises(ValueError, match="no such place"):
        ask(chat, "Weather?")
    assert ran == ["fail"]
    assert rows(store, "message", "role") == [("user",)]
    assert rows(store, "tool_call", "status", "error") == [
        ("failed", "ValueError: no such place: "),
        ("failed", "interrupted"),
    ]


def test_the_first_that_says_something_from_the_last_one_on_is_heeded_and_all_are_told(store: Store, ask: Ask):
    heard: list[str] = []

    def saying(name: str, directive: Any) -> Any:
        return says(on_tool_call_error=lambda *_: heard.append(name) or directive)

    chat = chat_with(store, Call("fail"), "Good.")
    chat.use(saying("first", REPLACE("one")), saying("second", STOP), saying("third", REPLACE("three")))
    chat.use(saying("fourth", None), saying("fifth", "no directive"))
    chat.on_tool_call_error(lambda *_: heard.append("hook") or STOP)
    ask(chat, "Weather?")
    assert heard == ["fifth", "fourth", "third", "second", "first", "hook"]
    assert sent(chat)[-1] == ("tool", "three")


@pytest.mark.parametrize("calls", [(), (LONDON,)])
def test_a_reply_can_stop_the_turn(store: Store, ask: Ask, calls: Any):
    chat = chat_with(store, Say("Secret.", calls=calls), middlewares=[says(on_response=STOP)])
    with pytest.raises(StoppedByMiddleware, match=rf"stopped the turn of chat {chat.id} after a reply of 'test'"):
        ask(chat, "Hi")
    assert ran == []
    assert rows(store, "message", "role") == [("user",)]
    assert rows(store, "request", "status_code", "error") == [(200, None)]
    assert rows(store, "tool_call", "status", "error") == [("failed", "interrupted")] * len(calls)
    with pytest.raises(StoppedByMiddleware):
        ask(chat_again(chat).use(says(on_response=STOP)), "Hi", on_error="keep")
    assert rows(store, "message", "status", "content")[-1] == ("failed", "Still here.")


@pytest.mark.parametrize("directive", [CONTINUE, STOP, None])
def test_an_error_that_nobody_replaces_is_the_callers(store: Store, ask: Ask, directive: Any):
    problem = ProviderError(400, "no")
    chat = chat_with(store, problem, middlewares=[says(on_error=directive)])
    with pytest.raises(ProviderError) as raised:
        ask(chat, "Hi")
    assert raised.value is problem
    assert rows(store, "message", "role") == [("user",)]


BUNDLED = [CostGuard("100"), PIIMask(), UsageLogger(), SchemaSelfCorrection()]


def test_fatal_stays_fatal_with_any_of_ours(store: Store, ask: Ask):
    """NodeLLM's C17, C28, C48: SchemaSelfCorrection went on from every fatal error of a tool."""
    chat = chat_with(store, [Call("stop"), LONDON], "never", middlewares=[*BUNDLED, Listener()], schema=dict[str, int])
    with pytest.raises(ToolError, match="the order is locked"):
        ask(chat, "Order!")
    assert ran == ["stop"]
    assert calls_of_the_model(chat) == 1


class Refused(Exception):
    def __init__(self, **status: Any):
        super().__init__("who are you?")
        self.__dict__.update(status)


@pytest.mark.parametrize(
    "status",
    [{"status_code": 401}, {"status": 403}, {"response": SimpleNamespace(status_code=403)}],
    ids=["status_code", "status", "response"],
)
def test_a_tool_that_has_no_right_to_what_it_needs_ends_the_turn(store: Store, ask: Ask, status: dict[str, Any]):
    @tool
    def look_up() -> str:
        raise Refused(**status)

    chat = chat_with(store, Call("look_up"), Call("look_up"), "I see.", tools=[look_up], middlewares=BUNDLED)
    with pytest.raises(Refused):
        ask(chat, "Look it up.")
    assert rows(store, "tool_call", "status", "error") == [("failed", "Refused: who are you?")]
    assert ask(chat, "Again.", middlewares=[says(on_tool_call_error=CONTINUE)]).content == "I see."


def test_a_tool_that_was_asked_for_too_much_does_not_end_the_turn(store: Store, ask: Ask):
    @tool
    def look_up() -> str:
        raise Refused(status_code=404)

    assert ask(chat_with(store, Call("look_up"), "Not there.", tools=[look_up]), "Look.").content == "Not there."


# What none of them can do


def test_what_the_model_sees_may_be_changed_and_not_what_is_stored(store: Store, ask: Ask):
    def change(context: TurnContext) -> None:
        for message in context.messages:
            message["content"] = "***"
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = "{}"
        context.messages = [{"role": "system", "content": "Be brief."}, *context.messages]

    chat = chat_with(store, LONDON, "Rain.", "Bye.")
    ask(chat, "my password is 1234", middlewares=[says(on_request=change)])
    assert sent(chat) == [("system", "Be brief."), ("user", "***"), ("assistant", "***"), ("tool", "***")]
    assert rows(store, "message", "content") == [("my password is 1234",), ("Rain.",)]
    ask(chat, "Thanks.")
    assert sent(chat) == [
        *[("user", "my password is 1234"), ("assistant", None), ("tool", "rain in London"), ("assistant", "Rain.")],
        ("user", "Thanks."),
    ]
    (asked,) = chat.options.llm.requests[-1]["messages"][1]["tool_calls"]
    assert asked["function"]["arguments"] == '{"city": "London"}'


def test_what_is_changed_for_one_call_is_not_for_the_next(store: Store, ask: Ask):
    first = once("***")

    def change(context: TurnContext) -> None:
        for message in context.messages:
            message["content"] = first() or message["content"]

    chat = chat_with(store, LONDON, "Rain.", middlewares=[says(on_request=change)])
    ask(chat, "Weather?")
    assert sent(chat, 0) == [("user", "***")]
    assert sent(chat, 1) == [("user", "Weather?"), ("assistant", None), ("tool", "rain in London")]


def test_no_tool_is_said_to_run_before_its_reply_was_looked_at(store: Store, ask: Ask):
    heard: list[Any] = []

    def look(context: TurnContext, reply: Reply) -> None:
        heard.append([call.status for call in chat.tool_calls()])

    chat = chat_with(store, [LONDON, PARIS], "Rain.", middlewares=[says(on_response=look)], tool_concurrency=2)
    ask(chat, "Weather?")
    assert heard == [["pending"] * 2, ["completed"] * 2]


RAISED: dict[str, tuple[Any, list[Any], list[Any]]] = {
    # where: what is left of the tool calls, the requests, the messages
    "on_request": ([], [], [("user", "completed")]),
    "on_response": ([("failed", "interrupted")] * 2, [(200, None)], [("user", "completed")]),
    "on_tool_call_start": ([("failed", "interrupted")] * 2, [(200, None)], [("user", "completed")]),
    "on_tool_call_end": (
        [("failed", "ValueError: no such place: "), ("failed", "interrupted")],
        [(200, None)],
        [("user", "completed")],
    ),
}
RAISED["on_tool_call_error"] = RAISED["on_tool_call_end"]


@pytest.mark.parametrize("name", RAISED)
def test_one_that_raises_ends_the_turn_and_loses_no_row(store: Store, ask: Ask, name: str):
    problem = RuntimeError("broken")
    chat = chat_with(store, [Call("fail"), LONDON], "never").use(Listener(), says(**{name: problem}), UsageLogger())
    with pytest.raises(RuntimeError) as raised:
        ask(chat, "Weather?")
    assert raised.value is problem
    calls, requests, messages = RAISED[name]
    assert rows(store, "tool_call", "status", "error") == calls
    assert rows(store, "request", "status_code", "error") == requests
    assert rows(store, "message", "role", "status") == messages
    assert ask(chat_again(chat), "Again?").content == "Still here."


def test_one_that_raises_behind_a_complete_reply_leaves_it_stored(store: Store, ask: Ask):
    """NodeLLM's C34: the reply and its request row were lost."""
    chat = chat_with(store, "Hello!", middlewares=[says(on_response=RuntimeError("broken"))])
    with pytest.raises(RuntimeError, match="broken"):
        ask(chat, "Hi")
    assert rows(store, "message", "role", "status", "content")[1] == ("assistant", "completed", "Hello!")
    assert rows(store, "request", "status_code", "error") == [(200, None)]


def test_one_that_raises_when_told_of_an_error_does_not_lose_it(store: Store, ask: Ask):
    problem = ProviderError(400, "no")
    chat = chat_with(store, problem, middlewares=[says(on_error=RuntimeError("broken"))])
    with pytest.raises(RuntimeError, match="broken") as raised:
        ask(chat, "Hi")
    assert raised.value.__context__ is problem
    assert rows(store, "request", "status_code", "error_message") == [(400, "no")]
    assert rows(store, "message", "role") == [("user",)]
    assert ask(chat_again(chat), "Again?").content == "Still here."


@pytest.mark.parametrize("on_error", ["rollback", "keep"])
@pytest.mark.parametrize("script", [["Hello!"], [LONDON, "Rain."]])
def test_a_reply_that_one_does_not_let_be_stored_is_handed_over(
    store: Store, ask: Ask, script: list[Any], on_error: str
):
    def stored_text(text: str) -> str:
        if text in ("Hello!", "Rain."):
            raise RuntimeError("broken")
        return text

    chat = chat_with(store, *script, middlewares=[SimpleNamespace(stored_text=stored_text)], on_error=on_error)
    with pytest.raises(ReplyNotSaved, match="stored_text failed: broken") as raised:
        ask(chat, "Hi")
    assert raised.value.reply.content in ("Hello!", "Rain.")
    assert len(rows(store, "request", "id")) == len(script)
    assert rows(store, "message", "role") == [("user",)]
    assert ask(chat_again(chat), "Again?").content == "Still here."


def test_a_question_that_one_does_not_let_be_stored_is_not_asked(store: Store, ask: Ask):
    chat = chat_with(store, "Hello!", middlewares=[says(stored_text=RuntimeError("broken"))])
    with pytest.raises(RuntimeError, match="broken"):
        ask(chat, "Hi")
    assert calls_of_the_model(chat) == 0
    assert rows(store, "message", "role") == []


def test_what_is_stored_is_a_text(store: Store, ask: Ask):
    chat = chat_with(store, "Hello!", middlewares=[says(stored_text=None)])
    with pytest.raises(InvalidValue, match="a stored_text must return a text, not NoneType"):
        ask(chat, "Hi")
    assert rows(store, "message", "role") == []


def test_none_can_switch_persistence_off(store: Store, ask: Ask):
    """NodeLLM's C13: a hook of the application took the place of the one that wrote the rows."""

    def grab(context: TurnContext, *_: Any) -> str:
        context.chat_id = context.turn_id = context.options = context.metadata = None
        context.model = context.provider = "another"
        context.messages.clear()
        context.state = {}
        return "anything"

    quiet, loud = (chat_with(store, [LONDON, Call("fail")], "Rain.") for _ in range(2))
    loud.use(says(**dict.fromkeys(METHODS, grab)))
    for chat in (quiet, loud):
        ask(chat, "Weather?")
    names = {
        "messages": ("position", "role", "status", "content", "content_raw", "model_id", "provider"),
        "tool_calls": ("round", "position", "name", "arguments", "status", "result", "error"),
        "requests": ("round", "attempt", "model", "provider", "status_code", "finish_reason"),
    }
    for table, columns in names.items():
        found = [[[getattr(row, name) for name in columns] for row in getattr(chat, table)()] for chat in (quiet, loud)]
        first, second = (str(cells).replace("call_", "") for cells in found)
        assert first == second
        assert found[0]


# CostGuard


def priced(store: Store, *script: Any, **options: Any) -> Chat:
    """A chat whose calls cost what their replies say, and are expected to cost a cent a word."""
    llm = ScriptedLLM(*script, input_cost_per_token="0.01", output_cost_per_token="0.01")
    return create_chat(store, model="test", llm=llm, **options)


def test_a_guard_stops_before_the_call_that_would_cost_too_much(store: Store, ask: Ask):
    chat = priced(store, Say("One.", cost="0.06"), Say("Two.", cost="0.03"), "Three.", middlewares=[CostGuard("0.1")])
    ask(chat, "one", history=0)
    ask(chat, "one two three four", history=0)
    with pytest.raises(CostLimitExceeded, match="it was not made") as raised:
        ask(chat, "one two", history=0)
    assert calls_of_the_model(chat) == 2
    error = raised.value
    assert (error.limit, error.spent, error.estimate) == (Decimal("0.1"), Decimal("0.09"), Decimal("0.02"))
    assert chat.stats().cost == Decimal("0.09")
    assert [message.role for message in chat.messages()] == ["user", "assistant"] * 2 + ["user"]
    assert ask(chat, "one", history=0).content == "Three."


def test_a_guard_stops_between_the_rounds_of_a_turn_and_what_was_spent_is_on_record(store: Store, ask: Ask):
    """NodeLLM's C6, C23: the trip rolled back what had been paid, and stats() said nothing was."""
    guard = CostGuard("5")
    chat = priced(store, Say(calls=[LONDON], cost="7"), "never", tools=TOOLS, middlewares=[guard])
    with pytest.raises(CostLimitExceeded) as raised:
        ask(chat, "Weather?")
    assert raised.value.spent == 7
    assert calls_of_the_model(chat) == 1
    assert (chat.stats().cost, chat.stats().requests) == (7, 1)
    assert rows(store, "tool_call", "status", "result") == [("completed", "rain in London")]
    again = load_chat(store, chat.id, llm=chat.options.llm, middlewares=[guard])
    assert again is not None
    with pytest.raises(CostLimitExceeded):
        ask(again, "Hi")


def test_a_guard_counts_a_corrected_reply_once(store: Store, ask: Ask):
    """NodeLLM's C32, C47: three attempts of a dollar counted as six."""
    attempts = [Say("Bad.", cost="1"), Say("Bad.", cost="1"), Say("Good.", cost="1")]
    retry = says(on_response=lambda context, reply: RETRY() if reply.content == "Bad." else None)
    chat = priced(store, *attempts, "never", middlewares=[CostGuard("3"), retry])
    assert ask(chat, "one").content == "Good."
    with pytest.raises(CostLimitExceeded) as raised:
        ask(chat, "one", history=0)
    assert raised.value.spent == chat.stats().cost == 3


def test_one_guard_serves_many_chats(store: Store, ask: Ask):
    """NodeLLM's C32: a global guard added the chats up."""
    store.use(CostGuard("4.015"))
    chats = [priced(store, Say("One.", cost="4"), "never") for _ in range(3)]
    for chat in chats:
        assert ask(chat, "one").content == "One."
    for chat in chats:
        with pytest.raises(CostLimitExceeded):
            ask(chat, "one two", history=0)


def test_a_guard_of_a_turn_lets_each_turn_spend_as_much(store: Store, ask: Ask):
    chat = priced(store, *[Say(calls=[LONDON], cost="1"), Say("Rain.", cost="1")] * 2, Say(calls=[LONDON], cost="9"))
    chat.with_tools(*TOOLS).use(CostGuard("6", per="turn"))
    for _ in range(2):
        ask(chat, "Weather?", history=0)
    with pytest.raises(CostLimitExceeded, match="the turn has cost"):
        ask(chat, "Weather?", history=0)
    assert chat.stats().cost == 13


def test_a_guard_of_a_turn_knows_what_the_turn_had_cost_before_it_waited(store: Store):
    @tool(requires_approval=True)
    def refund() -> str:
        return "refunded"

    chat = priced(store, Say("Hi.", cost="9"), Say(calls=[Call("refund")], cost="7"), "never")
    chat.with_tools(refund).use(CostGuard("6", per="turn"))
    chat.ask("Hello.", history=0)
    chat.ask("My money!", history=0)
    chat.approve(chat.pending_approvals()[0])
    with pytest.raises(CostLimitExceeded) as raised:
        chat.resume(history=0)
    assert raised.value.spent == 7


def test_a_failed_attempt_counts_with_what_it_cost(store: Store):
    chat = priced(store, Say("one two", error=ProviderError(500)), "never", middlewares=[CostGuard("0.05")], retries=0)
    with pytest.raises(ProviderError):
        chunks_of(chat, "one two")
    spent = chat.stats().cost
    assert spent == Decimal("0.04")
    with pytest.raises(CostLimitExceeded) as raised:
        chat.ask("one two", history=0)
    assert raised.value.spent == spent


def test_a_guard_needs_the_rows_that_it_sums_up(store: Store, ask: Ask):
    chat = priced(store, "Hello!", "Hello!", middlewares=[CostGuard("4")], persistence={"requests": False})
    with pytest.raises(InvalidValue, match='"requests": False'):
        ask(chat, "Hi")
    assert rows(store, "message", "role") == []
    free = priced(store, "Hello!", middlewares=[CostGuard("4", per="turn")], persistence={"requests": False})
    assert ask(free, "Hi").content == "Hello!"


@pytest.mark.parametrize("way", list(WAYS))
def test_what_was_sent_back_is_not_kept_where_the_turn_fails_before_the_next_call(store: Store, way: str):
    class Guard(Middleware):
        def on_request(self, context: TurnContext) -> None:
            if context.correction_rounds:
                raise InvalidValue("enough")

        def on_response(self, context: TurnContext, reply: Reply) -> RETRY:
            return RETRY("Again.")

    llm = ScriptedLLM(Say("Sorry.", thinking="Hm.", signature="sig"), "Bye.")
    chat = create_chat(store, model="test", llm=llm, on_error="keep")
    with pytest.raises(InvalidValue, match="enough"):
        WAYS[way](chat, "Hi", middlewares=[Guard()])
    assert rows(store, "message", "role", "status", "content") == [
        ("user", "completed", "Hi"),
        ("assistant", "failed", None),
    ]
    WAYS[way](chat, "Bye")
    assert "Sorry" not in str(llm.requests[-1])
    assert len(chat.requests()) == 2


# PIIMask

CANARY = "canary.bob@example.com"
MASK = "[REDACTED]"


@tool
def send(to: str) -> str:
    ran.append(to)
    return f"sent to {CANARY}"


@tool
def lose(to: str) -> str:
    ran.append(to)
    raise ValueError(f"no such address: {to}")


@tool(requires_approval=True)
def pay(to: str) -> str:
    ran.append(to)
    return f"paid {CANARY}"


SEND, LOSE, PAY = (Call(name, to=CANARY) for name in ("send", "lose", "pay"))
KNOWS = Say(f"I wrote to {CANARY}.", thinking=f"{CANARY}, hm.", signature="sig", calls=[SEND, LOSE])


def test_the_model_sees_no_personal_data_and_the_database_keeps_it(store: Store, ask: Ask):
    chat = chat_with(store, KNOWS, f"Done, {CANARY}.", "Bye.", tools=[send, lose], instructions=f"You help {CANARY}.")
    chat.use(PIIMask())
    ask(chat, f"I am {CANARY}.")
    ask(chat, "Thanks.")
    shown_to_the_model = str([request["messages"] for request in chat.options.llm.requests])
    assert shown_to_the_model.count(CANARY) == shown_to_the_model.count(f"{CANARY}, hm.")  # thinking is signed
    assert sent(chat)[:4] == [
        ("system", f"You help {MASK}."),
        ("user", f"I am {MASK}."),
        ("assistant", f"I wrote to {MASK}."),
        ("tool", f"sent to {MASK}"),
    ]
    assert ran == [CANARY, CANARY]
    assert [message.content for message in chat.messages()][:2] == [f"I am {CANARY}.", f"Done, {CANARY}."]
    assert [call.arguments for call in chat.tool_calls()] == [f'{{"to": "{CANARY}"}}'] * 2


def everything_in(url: str) -> str:
    """All that a database keeps: of SQLite every byte of its files, of PostgreSQL every cell."""
    if url.startswith("sqlite"):
        database = Path(url.removeprefix("sqlite:///"))
        return "".join(file.read_bytes().decode(errors="replace") for file in database.parent.glob(f"{database.name}*"))
    with connect(url) as store:
        tables = {name: getattr(store.records, name)._meta.fields for name in ("message", "tool_call", "request")}
        return str([rows(store, name, *columns) for name, columns in tables.items()])


def test_nothing_in_the_database_is_personal_and_the_tools_get_the_real_thing(database_url: str, ask: Ask):
    """NodeLLM's C33: the model's copy was masked, and the database kept it all."""
    masked: dict[str, Any] = {"model": "test", "tools": [send, lose, pay], "middlewares": [PIIMask(stored=True)]}
    # Without this, SQLite leaves what was overwritten where it was, unless it was built otherwise.
    with connect(database_url, pragmas={"secure_delete": "on"}) as store:
        store.create_tables()

        def chat_of(*script: Any, **options: Any) -> Chat:
            return create_chat(store, llm=ScriptedLLM(*script), **masked, **options)

        def elsewhere(chat: Chat) -> Chat:
            again = load_chat(store, chat.id, **{**masked, "llm": chat.options.llm})
            assert again is not None
            return again

        chat = chat_of(KNOWS, Say(f"Done, {CANARY}.", thinking=f"{CANARY}!", signature="sig"))
        assert ask(chat, f"I am {CANARY}.").content == f"Done, {MASK}."
        chat.add_message("user", f"Imported from {CANARY}")

        for decide in (Chat.approve, lambda chat, call: chat.deny(call, f"{CANARY} has no money")):
            chat = chat_of([PAY, SEND], f"Done, {CANARY}.")
            assert ask(chat, f"Pay {CANARY}.").status == "pending"
            (waiting,) = elsewhere(chat).pending_approvals()
            assert json.loads(waiting.arguments) == {"to": CANARY}
            decide(elsewhere(chat), waiting)
            assert elsewhere(chat).resume().content == f"Done, {MASK}."
        assert ran.count(CANARY) == 2 + (1 + 1) + 1

        for on_error in ("rollback", "keep"):
            chat = chat_of(PAY, on_error=on_error)
            ask(chat, f"Pay {CANARY}.")
            assert chat.cancel()

            chat = chat_of(KNOWS, on_error=on_error).on_tool_call_start(lambda call: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                ask(chat, f"I am {CANARY}.")

            chat = chat_of(PAY, "Hello!", on_error=on_error)
            died(store, ask(chat, f"Pay {CANARY}."))
            assert ask(elsewhere(chat), "Hi", stale_after=0, on_error=on_error).content == "Hello!"

        chat = chat_of(KNOWS, ProviderError(400), persistence={"tool_calls": False}, on_error="keep")
        with pytest.raises(ProviderError):
            ask(chat.with_tools(send, lose, replace=True), f"I am {CANARY}.")

    kept = everything_in(database_url)
    assert "canary" not in kept
    assert kept.count(MASK) > 50


def died(store: Store, message: Any) -> None:
    """Leave a turn that waits for approval as one whose process died."""
    record: Any = store.records.message
    with store.connection():
        record.update(parked_at=None).where(record.id == message.id).execute()


def test_a_masked_chat_goes_on_with_what_was_kept(store: Store, ask: Ask):
    chat = chat_with(store, KNOWS, "Done.", "Bye.", tools=[send, lose], middlewares=[PIIMask(stored=True)])
    ask(chat, f"I am {CANARY}.")
    ask(chat, "Thanks.")
    assert CANARY not in str(chat.options.llm.requests[-1]["messages"])
    # A thinking block whose text was changed no longer fits its signature, and no provider would take it back.
    assert all("thinking_blocks" not in message for message in chat.options.llm.requests[-1]["messages"])
    assert sent(chat)[0] == ("user", f"I am {MASK}.")


# stored_text


def test_every_text_is_kept_as_all_of_them_let_it(store: Store, ask: Ask):
    store.use(SimpleNamespace(stored_text=lambda text: f"<{text}>"))
    chat = chat_with(store, KNOWS, Say("Done.", thinking="Hm."), tools=[send, lose])
    chat.use(SimpleNamespace(stored_text=lambda text: text.removeprefix("<").replace(CANARY, "Bob").replace("{", "(")))
    reply = ask(chat, f"I am {CANARY}.")
    assert (reply.content, reply.thinking_text) == ("<Done.>", "<Hm.>")
    assert rows(store, "message", "content", "thinking_text") == [("<I am Bob.>", None), ("<Done.>", "<Hm.>")]
    first, last = rows(store, "message", "content_raw")[1][0]["rounds"]
    assert first["content"] == "<I wrote to Bob.>"
    assert [call["function"]["arguments"] for call in first["tool_calls"]] == ['<("to": "Bob"}>'] * 2
    assert (last["content"], last["reasoning_content"]) == ("<Done.>", "<Hm.>")
    assert "thinking_blocks" not in first
    problem = "no such address: Bob"
    assert rows(store, "tool_call", "arguments", "result", "error") == [
        ('<("to": "Bob"}>', "<sent to Bob>", None),
        ('<("to": "Bob"}>', f"<Error executing tool 'lose': {problem}>", f"<ValueError: {problem}>"),
    ]
    assert sent(chat)[0] == ("user", f"I am {CANARY}.")  # what is kept is not what is sent


def test_what_a_rejected_call_is_told_is_kept_as_any_result(store: Store, ask: Ask):
    loud = SimpleNamespace(stored_text=str.upper, on_response=once(RETRY("Not now.")))
    chat = chat_with(store, LONDON, "Good.", middlewares=[loud])
    ask(chat, "Weather?")
    assert rows(store, "tool_call", "result") == [("NOT NOW.",)]
    assert sent(chat)[-1] == ("tool", "Not now.")


# UsageLogger


def test_each_call_is_logged_with_its_figures_and_without_what_was_said(
    store: Store, ask: Ask, caplog: pytest.LogCaptureFixture
):
    script = [Say("SECRET", calls=[LONDON], input_tokens=7, output_tokens=5, cost="0.25"), "SECRET"]
    store.use(UsageLogger(prefix="[app] "))
    chat = chat_with(store, *script, ProviderError(401, "SECRET"), instructions="SECRET", metadata="SECRET")
    chat.with_headers(authorization="Bearer SECRET").with_params(api_key="SECRET")
    with caplog.at_level(logging.INFO, "llm_orm.usage"):
        ask(chat, "SECRET SECRET")
        with pytest.raises(ProviderError):
            ask(chat, "SECRET")

    lines = [record for record in caplog.records if record.name == "llm_orm.usage"]
    about = f"[app] chat {chat.id}, call"
    assert [(record.levelname, record.getMessage().partition(" thinking")[0]) for record in lines] == [
        ("INFO", f"{about} 0 of scripted/test: 7 tokens in (0 cached), 5 out (0"),
        ("INFO", f"{about} 1 of scripted/test: 7 tokens in (0 cached), 1 out (0"),
        ("WARNING", f"{about} 0 of scripted/test failed: ProviderError"),
    ]
    first, second, third = (vars(record) for record in lines)
    requests = chat.requests()
    for fields, request in zip((first, second), requests[:2], strict=True):
        for name in ("chat_id", "turn_id", "input_tokens", "output_tokens", "cost", "duration_ms"):
            assert fields[name] == getattr(request, name)

    assert (third["error"], third["turn_id"]) == ("ProviderError", requests[2].turn_id)
    assert "SECRET" not in caplog.text + str([vars(record) for record in lines])


# SchemaSelfCorrection


class City(pydantic.BaseModel):
    name: str
    population: int


def test_a_reply_that_does_not_match_is_sent_back_as_often_as_said(store: Store, ask: Ask):
    chat = chat_with(store, "{}", '{"name": "Paris"}', '{"name": "Paris", "population": 2}', schema=City)
    chat.use(SchemaSelfCorrection(max_retries=2))
    assert ask(chat, "Which city?", corrections=0).parsed == City(name="Paris", population=2)
    first, second = (content for role, content in sent(chat)[1:] if role == "user")
    assert "name: Field required; population: Field required" in first
    assert "schema. population: Field required" in second
    assert rows(store, "request", "correction_rounds") == [(None,), (1,), (2,)]

    chat.options.llm.add("{}", "{}", "{}", "never")
    with pytest.raises(InvalidReply, match="after 2 corrections") as raised:
        ask(chat, "And now?")
    assert raised.value.text == "{}"
    assert calls_of_the_model(chat) == 6

"""What OpenTelemetry is told of a turn, and what the turn is told of OpenTelemetry: nothing."""

import asyncio
import importlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Ask, rows
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llm_orm import (
    Chat,
    ChatBusy,
    InvalidValue,
    Middleware,
    PIIMask,
    ReplyNotSaved,
    Retries,
    Store,
    ToolError,
    TurnFailed,
    WrongSetup,
    create_agent_session,
    create_chat,
    define_agent,
    tool,
)
from llm_orm.middleware import LOOKS_ON
from llm_orm.telemetry import CAPTURE, SECONDS, TOKENS, OpenTelemetry
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

PRICES = {"input_cost_per_token": "0.001", "output_cost_per_token": "0.01"}
LONDON, PARIS = Call("get_weather", city="London"), Call("get_weather", city="Paris")
AT_ONCE = Retries(attempts=1, first_wait_s=0)


class Heard:
    """What an application's exporters would get."""

    def __init__(self) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.tracer = self.provider.get_tracer("the application")

    def telemetry(self, **options: Any) -> OpenTelemetry:
        return OpenTelemetry(tracer_provider=self.provider, meter_provider=self.meters, **options)

    def spans(self, beginning: str = "") -> list[Any]:
        """In the order in which they began."""
        found = [span for span in self.exporter.get_finished_spans() if span.name.startswith(beginning)]
        return sorted(found, key=lambda span: span.start_time)

    def parent_of(self, span: Any) -> str | None:
        by_id = {each.context.span_id: each.name for each in self.spans()}
        return None if span.parent is None else by_id[span.parent.span_id]

    def points(self) -> dict[str, list[Any]]:
        data = self.reader.get_metrics_data()
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
        return {metric.name: list(metric.data.data_points) for scope in scopes for metric in scope.metrics}


@pytest.fixture
def heard() -> Iterator[Heard]:
    heard = Heard()
    yield heard
    heard.provider.shutdown()
    heard.meters.shutdown()


@tool
def get_weather(city: str) -> str:
    """Current weather in a city."""
    return f"rain in {city}"


@tool
def fail(city: str = "") -> str:
    raise ToolError(f"no such place: {city}")


def chat_with(store: Store, *script: Any, **options: Any) -> Chat:
    llm = ScriptedLLM(*script, provider="gemini", **PRICES)
    return create_chat(store, model="pro", llm=llm, **{"tools": [get_weather, fail], **options})


# Spans


def test_each_request_row_has_a_span_and_each_tool(store: Store, heard: Heard, ask: Ask) -> None:
    says = Say("Let me look.", calls=[LONDON], cached_tokens=2, thinking_tokens=1, input_tokens=9)
    chat = chat_with(
        store.use(heard.telemetry()), ProviderError(429), says, ProviderError(404), "Rain.", fallbacks=["other"]
    )

    ask(chat, "Weather?", retries=AT_ONCE, temperature=0.5, max_tokens=99, params={"top_p": 1, "seed": True})

    columns = (
        "model round attempt error input_tokens output_tokens cached_tokens thinking_tokens cost status_code "
        "finish_reason duration_ms first_token_ms"
    ).split()
    calls = heard.spans("chat ")
    assert [span.name for span in calls] == ["chat pro", "chat pro", "chat pro", "chat other"]
    assert [figures(span) for span in calls] == [
        {**dict(zip(columns, row, strict=True)), "cost": float(row[8])} for row in rows(store, "request", *columns)
    ]
    assert all(
        span.attributes.items()
        >= {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "gcp.gemini",
            "gen_ai.conversation.id": str(chat.id),
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.max_tokens": 99,
            "gen_ai.request.top_p": 1,
            "llm_orm.turn_id": str(chat.messages()[0].id),
        }.items()
        and "gen_ai.request.seed" not in span.attributes
        and span.attributes.get("gen_ai.request.stream", False) == (ask.__name__ in ("_ask_stream", "_aask_stream"))
        and span.kind is trace.SpanKind.CLIENT
        for span in calls
    )
    (run,) = heard.spans("execute_tool ")
    assert run.name == "execute_tool get_weather"
    assert run.kind is trace.SpanKind.INTERNAL
    assert run.attributes["gen_ai.tool.call.id"] == "call_1"
    assert run.attributes["gen_ai.tool.type"] == "function"
    assert [milliseconds(run)] == [row for (row,) in rows(store, "tool_call", "duration_ms")]
    (turn,) = heard.spans("invoke_agent")
    assert turn.parent is None
    assert turn.status.status_code is trace.StatusCode.UNSET
    assert {heard.parent_of(span) for span in (*calls, run)} == {"invoke_agent"}


def milliseconds(span: Any) -> int:
    return (span.end_time - span.start_time) // 1_000_000


def figures(span: Any) -> dict[str, Any]:
    """What a request row says, as its span says it."""
    said = span.attributes
    failed = span.status.status_code is trace.StatusCode.ERROR
    assert failed == ("error.type" in said) == ("gen_ai.response.model" not in said)
    first = said.get("gen_ai.response.time_to_first_chunk")
    return {
        "model": said["gen_ai.request.model"],
        "round": said["llm_orm.round"],
        "attempt": said["llm_orm.attempt"],
        "error": said.get("error.type"),
        "input_tokens": said["gen_ai.usage.input_tokens"],
        "output_tokens": said["gen_ai.usage.output_tokens"],
        "cached_tokens": said.get("gen_ai.usage.cache_read.input_tokens", 0),
        "thinking_tokens": said.get("gen_ai.usage.reasoning.output_tokens", 0),
        "cost": said["llm_orm.cost_usd"],
        "status_code": said["http.response.status_code"],
        "finish_reason": said.get("gen_ai.response.finish_reasons", (None,))[0],
        "duration_ms": milliseconds(span),
        "first_token_ms": None if first is None else round(first * 1000),
    }


def test_a_stream_that_its_reader_leaves_has_a_span_with_what_came_of_it(store: Store, heard: Heard) -> None:
    chat = chat_with(store.use(heard.telemetry()), "It rains in London today.")

    with chat.ask_stream("Weather?") as stream:
        next(stream)

    (call,), (turn,) = heard.spans("chat"), heard.spans("invoke_agent")
    ((error, tokens, cost),) = rows(store, "request", "error", "output_tokens", "cost")
    assert call.attributes["error.type"] == turn.attributes["error.type"] == error == "GeneratorExit"
    assert call.attributes["gen_ai.usage.output_tokens"] == tokens
    assert call.attributes["llm_orm.cost_usd"] == float(cost)
    assert call.attributes["llm_orm.usage_estimated"] is True
    assert heard.parent_of(call) == "invoke_agent"


def test_an_async_stream_that_its_reader_leaves_leaves_no_span_behind(store: Store, heard: Heard) -> None:
    chat = chat_with(store.use(heard.telemetry()), "It rains in London today.")

    async def read() -> Any:
        with heard.tracer.start_as_current_span("the application's"):
            async with chat.aask_stream("Weather?") as stream:
                await anext(stream)
                return trace.get_current_span().name  # type: ignore[attr-defined]

    assert asyncio.run(read()) == "the application's"
    assert [(span.name, heard.parent_of(span)) for span in heard.spans()] == [
        ("the application's", None),
        ("invoke_agent", "the application's"),
        ("chat pro", "invoke_agent"),
    ]
    assert len(rows(store, "request", "id")) == 1


def test_a_call_that_fails_before_its_request_is_sent_has_a_span_for_its_row(
    sqlite_store: Store, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_orm.gateway.Call._client", lambda _: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        chat_with(sqlite_store.use(heard.telemetry()), "Hello!").ask("Hi")

    (call,) = heard.spans("chat")
    assert rows(sqlite_store, "request", "error", "duration_ms") == [("ZeroDivisionError", milliseconds(call))]
    assert call.attributes["error.type"] == "ZeroDivisionError"
    assert heard.parent_of(call) == "invoke_agent"


def test_spans_are_children_of_what_is_current_in_the_application(store: Store, heard: Heard, ask: Ask) -> None:
    def sees(keywords: Any) -> Any:
        seen.append(trace.get_current_span().name)  # type: ignore[attr-defined]
        with heard.tracer.start_as_current_span("POST"):
            return "Hello!"

    seen: list[str] = []
    chat = chat_with(store.use(heard.telemetry()), sees)

    with heard.tracer.start_as_current_span("the application's"):
        ask(chat, "Hi")
        assert trace.get_current_span().name == "the application's"  # type: ignore[attr-defined]

    assert seen == ["chat pro"]
    assert [(span.name, heard.parent_of(span)) for span in heard.spans()] == [
        ("the application's", None),
        ("invoke_agent", "the application's"),
        ("chat pro", "invoke_agent"),
        ("POST", "chat pro"),
    ]


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_what_a_tool_does_is_a_child_of_its_own_span_also_side_by_side(
    sqlite_store: Store, heard: Heard, kind: str
) -> None:
    def work(city: str) -> str:
        with heard.tracer.start_as_current_span(f"look at {city}"):
            return trace.get_current_span().name  # type: ignore[attr-defined]

    @tool(name="look")
    def plain(city: str) -> str:
        return work(city)

    @tool(name="look")
    async def waits(city: str) -> str:
        await asyncio.sleep(0)
        return work(city)

    calls = [Call("look", city=city) for city in ("London", "Paris", "Rome")]
    chat = chat_with(sqlite_store.use(heard.telemetry()), calls, "Done.", tools=[plain if kind == "plain" else waits])

    if kind == "plain":
        chat.ask("Look.", tool_concurrency=2)
    else:
        asyncio.run(chat.aask("Look.", tool_concurrency=2))

    runs = {span.context.span_id: span.attributes["gen_ai.tool.call.id"] for span in heard.spans("execute_tool look")}
    assert {(span.name, runs[span.parent.span_id]) for span in heard.spans("look at")} == {
        ("look at London", "call_1"),
        ("look at Paris", "call_2"),
        ("look at Rome", "call_3"),
    }
    assert {heard.parent_of(span) for span in heard.spans("execute_tool")} == {"invoke_agent"}


def test_an_agent_has_its_name_and_one_that_a_tool_asks_is_within_the_tool(sqlite_store: Store, heard: Heard) -> None:
    sqlite_store.use(heard.telemetry())
    inner = define_agent("Inner", model="small")
    outer = define_agent("Outer", model="large", tools=[tool(lambda: ask_inner(), name="delegate")])

    def ask_inner() -> str:
        session = create_agent_session(sqlite_store, inner, llm=ScriptedLLM("From inside."))
        return session.ask("Hi").content or ""

    create_agent_session(sqlite_store, outer, llm=ScriptedLLM(Call("delegate"), "Done.")).ask("Hi")

    assert [(span.name, heard.parent_of(span)) for span in heard.spans()] == [
        ("invoke_agent Outer", None),
        ("chat large", "invoke_agent Outer"),
        ("execute_tool delegate", "invoke_agent Outer"),
        ("invoke_agent Inner", "execute_tool delegate"),
        ("chat small", "invoke_agent Inner"),
        ("chat large", "invoke_agent Outer"),
    ]
    assert [span.attributes.get("gen_ai.agent.name") for span in heard.spans("chat")] == ["Outer", "Inner", "Outer"]


def test_a_tool_that_fails_has_the_class_of_its_error(sqlite_store: Store, heard: Heard) -> None:
    calls = [Call("fail"), Call("nothing"), Call("get_weather", raw="{"), LONDON]
    chat = chat_with(sqlite_store.use(heard.telemetry()), calls, "Done.")

    chat.ask("Go.")

    runs = heard.spans("execute_tool")
    assert [span.attributes.get("error.type") for span in runs] == [
        "ToolError",
        "Unavailable",
        "InvalidArguments",
        None,
    ]
    assert [span.status.status_code.name for span in runs] == ["ERROR", "ERROR", "ERROR", "UNSET"]
    assert [span.status.description for span in runs] == [None] * 4


def test_a_tool_that_is_run_once_more_has_a_span_for_each_run(sqlite_store: Store, heard: Heard) -> None:
    from llm_orm import RETRY

    again = SimpleNamespace(on_tool_call_error=lambda *_: RETRY())
    chat = chat_with(sqlite_store.use(heard.telemetry()), Call("fail"), "Done.", middlewares=[again])

    chat.ask("Go.")

    assert [span.attributes["error.type"] for span in heard.spans("execute_tool")] == ["ToolError", "ToolError"]


def test_a_tool_that_runs_when_its_turn_is_broken_off_has_a_span_that_ends_with_it(
    sqlite_store: Store, heard: Heard
) -> None:
    async def start() -> None:
        begun = asyncio.Event()

        @tool
        async def wait() -> str:
            begun.set()
            await asyncio.Event().wait()
            return "never"

        chat = chat_with(sqlite_store.use(heard.telemetry()), Call("wait"), tools=[wait])
        task = asyncio.ensure_future(chat.aask("Wait."))
        await begun.wait()
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(start())

    (run,), (turn,) = heard.spans("execute_tool"), heard.spans("invoke_agent")
    assert run.attributes["error.type"] == turn.attributes["error.type"] == "CancelledError"
    assert run.end_time <= turn.end_time


def test_a_turn_that_waits_and_is_resumed_is_two_spans_of_one_turn(sqlite_store: Store, heard: Heard) -> None:
    @tool(requires_approval=True)
    def refund() -> str:
        return "refunded"

    chat = chat_with(sqlite_store.use(heard.telemetry()), Call("refund"), "Done.", tools=[refund])
    chat.ask("My money!")
    chat.approve(chat.pending_approvals()[0])
    chat.resume()

    first, second = heard.spans("invoke_agent")
    assert first.attributes["llm_orm.turn_id"] == second.attributes["llm_orm.turn_id"] == str(chat.messages()[0].id)
    assert "error.type" not in {**first.attributes, **second.attributes}
    assert len(heard.spans("chat")) == 2


def test_a_turn_that_cannot_begin_is_a_span_with_its_error(sqlite_store: Store, heard: Heard) -> None:
    chat = chat_with(sqlite_store.use(heard.telemetry()), "Hello!", "Hello!")

    def busy(keywords: Any) -> str:
        with pytest.raises(ChatBusy):
            chat.ask("Me too.")
        return "Hello!"

    chat.options.llm.script.insert(0, busy)
    chat.ask("Hi")

    _, second = heard.spans("invoke_agent")
    assert second.attributes["error.type"] == "ChatBusy"
    assert len(heard.spans("chat")) == 1


@pytest.mark.parametrize(
    ("provider", "known"),
    [
        ("openai", "openai"),
        ("anthropic", "anthropic"),
        ("azure", "azure.ai.openai"),
        ("bedrock", "aws.bedrock"),
        ("vertex_ai", "gcp.vertex_ai"),
        ("mistral", "mistral_ai"),
        ("xai", "x_ai"),
        ("my-own", "my-own"),
    ],
)
def test_a_provider_is_called_as_the_conventions_call_it(
    sqlite_store: Store, heard: Heard, provider: str, known: str
) -> None:
    llm = ScriptedLLM("Hello!", provider=provider)
    create_chat(sqlite_store.use(heard.telemetry()), model=f"{provider}/m", llm=llm).ask("Hi")

    assert {span.attributes["gen_ai.provider.name"] for span in heard.spans()} == {known}
    assert heard.spans("chat ")[0].name == "chat m"


# Metrics


def test_the_metrics_add_up_to_the_request_rows(store: Store, heard: Heard, ask: Ask) -> None:
    script = (ProviderError(429), LONDON, Say("Rain.", usage=False))
    chat = chat_with(store.use(heard.telemetry()), *script)

    ask(chat, "Weather?", retries=AT_ONCE)

    stats, points = chat.stats(), heard.points()
    tokens = points["gen_ai.client.token.usage"]
    assert {point.attributes["gen_ai.token.type"]: point.sum for point in tokens} == {
        "input": stats.input_tokens,
        "output": stats.output_tokens,
    }
    assert [point.count for point in tokens] == [2, 2]  # the call that failed used none
    assert {tuple(point.explicit_bounds) for point in tokens} == {TOKENS}
    durations = points["gen_ai.client.operation.duration"]
    assert {point.attributes.get("error.type"): point.count for point in durations} == {"ProviderError": 1, None: 2}
    assert {tuple(point.explicit_bounds) for point in durations} == {SECONDS}
    assert sum(point.sum for point in durations) * 1000 == pytest.approx(stats.duration_ms)
    assert sum(point.value for point in points["llm_orm.cost"]) == pytest.approx(float(stats.cost))
    streamed = [first for (first,) in rows(store, "request", "first_token_ms") if first is not None]
    chunks = points.get("gen_ai.client.operation.time_to_first_chunk", [])
    assert sum(point.count for point in chunks) == len(streamed)
    assert all(
        point.attributes["gen_ai.provider.name"] == "gcp.gemini" and point.attributes["gen_ai.request.model"] == "pro"
        for point in (*tokens, *durations, *points["llm_orm.cost"])
    )


def test_an_unpriced_call_has_no_cost(sqlite_store: Store, heard: Heard) -> None:
    create_chat(sqlite_store.use(heard.telemetry()), model="m", llm=ScriptedLLM("Hello!")).ask("Hi")

    assert "llm_orm.cost_usd" not in heard.spans("chat")[0].attributes
    assert "llm_orm.cost" not in heard.points()


# What was said


def everything(heard: Heard) -> str:
    return "".join(span.to_json() for span in heard.spans()) + str(heard.points())


WORDS = ("Weather at home", "Let me see", "London", "rain in", "Bad place", "It rains", "broken words")


def talk(store: Store, **options: Any) -> None:
    says = Say("Let me see.", thinking="Let me see.", calls=[LONDON, Call("fail", city="Bad place")])
    chat = chat_with(store, ProviderError(429, "broken words"), says, "It rains.", **options)
    chat.ask("Weather at home?", retries=AT_ONCE)


def test_nothing_of_what_was_said_is_told_by_itself(sqlite_store: Store, heard: Heard) -> None:
    talk(sqlite_store.use(heard.telemetry()))

    assert [word for word in WORDS if word in everything(heard)] == []


@pytest.mark.parametrize("said", ["true", "SPAN_AND_EVENT"])
def test_what_was_said_is_told_where_the_environment_says_so(
    sqlite_store: Store, heard: Heard, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CAPTURE, said)
    talk(sqlite_store.use(heard.telemetry()))

    assert [word for word in WORDS if word not in everything(heard)] == []
    first, second, last = heard.spans("chat")
    assert first.status.description == "broken words"
    assert json.loads(first.attributes["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": "Weather at home?"}]}
    ]
    asked = [
        {"type": "tool_call", "id": "call_1", "name": "get_weather", "arguments": {"city": "London"}},
        {"type": "tool_call", "id": "call_2", "name": "fail", "arguments": {"city": "Bad place"}},
    ]
    see = {"type": "text", "content": "Let me see."}
    assert json.loads(second.attributes["gen_ai.output.messages"]) == [
        {"role": "assistant", "parts": [{**see, "type": "reasoning"}, see, *asked], "finish_reason": "tool_calls"}
    ]
    assert json.loads(last.attributes["gen_ai.input.messages"])[1:3] == [
        {"role": "assistant", "parts": [see, *asked]},
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "call_1", "response": "rain in London"}]},
    ]
    worked, failed = heard.spans("execute_tool")
    assert json.loads(worked.attributes["gen_ai.tool.call.arguments"]) == {"city": "London"}
    assert worked.attributes["gen_ai.tool.call.result"] == "rain in London"
    assert "Bad place" in failed.status.description


def test_what_may_not_be_stored_is_not_told_either(sqlite_store: Store, heard: Heard) -> None:
    class Echo(Middleware):
        def on_request(self, context: Any) -> None:
            context.messages[-1]["content"] += " ada@example.com"

    mail = "ada@example.com"
    chat = chat_with(
        sqlite_store.use(heard.telemetry(capture_content=True), PIIMask(stored=True)),
        ProviderError(400, mail),
        Say(f"Of {mail}.", calls=[Call("get_weather", city=mail), Call("fail", city=mail)]),
        f"To {mail}.",
        middlewares=[Echo()],
    )
    with pytest.raises(Exception, match=mail):
        chat.ask(f"I am {mail}.")
    chat.retry()

    assert mail not in everything(heard)
    assert "[REDACTED]" in everything(heard)


def test_a_file_is_told_of_as_that(sqlite_store: Store, heard: Heard) -> None:
    chat = chat_with(sqlite_store.use(heard.telemetry(capture_content=True)), "A cat.")
    chat.ask("What is it?", files=[b"\x89PNG\r\n\x1a\n" + bytes(9)])

    (message,) = json.loads(heard.spans("chat")[0].attributes["gen_ai.input.messages"])
    assert message["parts"] == [{"type": "text", "content": "What is it?"}, {"type": "image_url"}]


def test_capture_content_is_true_or_false() -> None:
    with pytest.raises(InvalidValue, match="capture_content must be True or False, not 'no'"):
        OpenTelemetry(capture_content="no")  # type: ignore[arg-type]


# Who looks on has no say


class Broken:
    """Looks on at everything, and fails at it."""

    def __init__(self, *names: str):
        for name in names:
            setattr(self, name, self.fail)

    def fail(self, *_: Any) -> Any:
        raise RuntimeError("cannot look")


@contextmanager
def swallowing() -> Iterator[None]:
    try:
        yield
    except BaseException:
        pass


@contextmanager
def breaking() -> Iterator[None]:
    yield
    raise RuntimeError("cannot look")


def without_ids(store: Store) -> list[Any]:
    return [
        rows(store, "message", "role", "status", "content"),
        rows(store, "request", "error", "input_tokens", "round", "attempt"),
        rows(store, "tool_call", "name", "status", "result"),
    ]


SCRIPT = (ProviderError(429), [LONDON, Call("fail")], "Rain.")


@pytest.mark.parametrize("name", LOOKS_ON)
def test_one_that_fails_to_look_on_changes_nothing(
    store: Store, ask: Ask, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    chat = chat_with(store.use(Broken(name)), *SCRIPT)

    with caplog.at_level(logging.WARNING, "llm_orm"):
        reply = ask(chat, "Weather?", retries=AT_ONCE)

    assert (reply.status, reply.content) == ("completed", "Rain.")
    assert "looks on at a turn and failed, which changes nothing: cannot look" in caplog.text
    assert without_ids(store) == [
        [("user", "completed", "Weather?"), ("assistant", "completed", "Rain.")],
        [("ProviderError", 0, 0, 1), (None, 1, 0, 2), (None, rows(store, "request", "input_tokens")[2][0], 1, 1)],
        [
            ("get_weather", "completed", "rain in London"),
            ("fail", "failed", "Error executing tool 'fail': no such place: "),
        ],
    ]


@pytest.mark.parametrize("around", [swallowing, breaking])
def test_what_is_put_around_a_call_can_neither_swallow_its_error_nor_fail_it(
    sqlite_store: Store, around: Callable[[], Any]
) -> None:
    looks_on = SimpleNamespace(around_call=lambda _: around(), around_tool=lambda *_: around())
    chat = chat_with(sqlite_store.use(looks_on), *SCRIPT)

    assert chat.ask("Weather?", retries=AT_ONCE).content == "Rain."
    assert [status for (status,) in rows(sqlite_store, "tool_call", "status")] == ["completed", "failed"]
    assert [error for (error,) in rows(sqlite_store, "request", "error")] == ["ProviderError", None, None]


def test_the_reply_of_a_turn_that_cannot_be_saved_is_handed_over_all_the_same(
    sqlite_store: Store, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(keywords: Any) -> str:
        monkeypatch.setattr(sqlite_store, "transact", lambda *_: 1 / 0)
        return "Hello!"

    chat = chat_with(sqlite_store.use(Broken(*LOOKS_ON), heard.telemetry()), lose)
    with pytest.raises(ReplyNotSaved) as raised:
        chat.ask("Hi")

    assert raised.value.reply.content == "Hello!"
    assert heard.spans("invoke_agent")[0].attributes["error.type"] == "ReplyNotSaved"
    assert len(heard.spans("chat")) == 1
    monkeypatch.undo()


def test_to_look_on_costs_no_statement(store: Store, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    execute, statements = store.database.execute_sql, []
    monkeypatch.setattr(store.database, "execute_sql", lambda sql, *rest: statements.append(sql) or execute(sql, *rest))

    def count(*middlewares: Any) -> int:
        chat = chat_with(store, *SCRIPT, middlewares=middlewares)
        statements.clear()
        chat.ask("Weather?", retries=AT_ONCE)
        return len(statements)

    assert count(heard.telemetry()) == count()
    assert count(SimpleNamespace(on_response=lambda *_: None)) > count()


def test_they_are_told_in_order_of_each_attempt_once_its_row_is_settled(store: Store, ask: Ask) -> None:
    heard: list[Any] = []

    class Listener(Middleware):
        def on_turn_start(self, context: Any) -> None:
            heard.append("start")

        def around_call(self, context: Any) -> None:
            heard.append(("sends", context.round, context.attempt, context.model, len(context.messages)))

        def on_answer(self, context: Any, answer: Any) -> None:
            heard.append(("answer", context.attempt, answer.status_code, answer.reply.content))

        def around_tool(self, context: Any, call: Any) -> None:
            heard.append(("runs", call.name))

        def on_outcome(self, context: Any, outcome: Any) -> None:
            heard.append(("ran", outcome.call.name, outcome.status, rows(store, "tool_call", "status")))

        def on_turn_end(self, context: Any, ended: Any) -> None:
            heard.append((ended.status, ended.content))

    ask(chat_with(store.use(Listener()), ProviderError(429), LONDON, "Rain."), "Weather?", retries=AT_ONCE)

    assert heard == [
        "start",
        ("sends", 0, 1, "pro", 1),
        ("answer", 1, 429, None),
        ("sends", 0, 2, "pro", 1),
        ("answer", 2, 200, None),
        ("runs", "get_weather"),
        ("ran", "get_weather", "completed", [("completed",)]),
        ("sends", 1, 1, "pro", 3),
        ("answer", 1, 200, "Rain."),
        ("completed", "Rain."),
    ]


@pytest.mark.parametrize("name", LOOKS_ON)
def test_whoever_looks_on_is_plain(sqlite_store: Store, name: str) -> None:
    async def look(*_: Any) -> None: ...

    with pytest.raises(InvalidValue, match=f"the {name} of .* must be a plain function"):
        sqlite_store.use(SimpleNamespace(**{name: look}))


def test_an_error_that_ends_the_turn_is_told_of_as_what_the_caller_gets(sqlite_store: Store) -> None:
    ended: list[Any] = []
    chat = chat_with(sqlite_store.use(SimpleNamespace(on_turn_end=lambda _, how: ended.append(how))), LONDON, LONDON)

    with pytest.raises(TurnFailed) as raised:
        chat.ask("Weather?", max_tool_calls=1)

    assert ended == [raised.value]


# Nothing is imported that is not used


def test_llm_orm_imports_no_telemetry() -> None:
    code = "import sys, llm_orm; print([name for name in sys.modules if name.startswith(('opentel', 'prometh'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("module", "package", "said"),
    [
        ("llm_orm.telemetry", "opentelemetry", r'needs opentelemetry-api: pip install "llm-orm\[otel\]"'),
        ("llm_orm.metrics", "prometheus_client", r'needs prometheus_client: pip install "llm-orm\[dashboard\]"'),
    ],
)
def test_a_package_that_is_missing_is_named_with_how_to_get_it(
    module: str, package: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module, raising=False)

    with pytest.raises(WrongSetup, match=said):
        importlib.import_module(module)

"""OpenTelemetry: a span for each turn, each call of a model and each tool, and the metrics of the GenAI conventions.

>>> store.use(OpenTelemetry())

What is written here are the names of the semantic conventions for generative AI, which are still in development; what
they have no name for begins with "llm_orm.".
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .errors import InvalidValue, WrongSetup
from .middleware import Middleware
from .values import Answer, Message, Reply, ToolCall, ToolOutcome, TurnContext, Usage

try:
    from opentelemetry import context as contexts
    from opentelemetry import metrics, trace
except ImportError as error:
    raise WrongSetup('llm_orm.telemetry needs opentelemetry-api: pip install "llm-orm[otel]"') from error

CAPTURE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"

PROVIDERS = {
    "azure": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "azure_text": "azure.ai.openai",
    "bedrock": "aws.bedrock",
    "bedrock_converse": "aws.bedrock",
    "codestral": "mistral_ai",
    "cohere_chat": "cohere",
    "gemini": "gcp.gemini",
    "mistral": "mistral_ai",
    "moonshot": "moonshot_ai",
    "text-completion-openai": "openai",
    "vertex_ai": "gcp.vertex_ai",
    "vertex_ai_beta": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai",
    "watsonx_text": "ibm.watsonx.ai",
    "xai": "x_ai",
}
"""What the conventions call a provider, where litellm calls it otherwise."""

SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKENS = tuple(4**power for power in range(14))
"""Bounds of the buckets, as the conventions have them."""


@dataclass
class _Open:
    """A span that has begun."""

    span: trace.Span
    started_ns: int = field(default_factory=time.time_ns)

    def end(self, duration_ms: int | None = None) -> None:
        self.span.end(None if duration_ms is None else self.started_ns + duration_ms * 1_000_000)


@dataclass
class _Turn:
    """The spans of a turn that have begun, and not ended."""

    turn: _Open
    context: contexts.Context
    """That in which it is the current one."""
    call: _Open | None = None
    tools: dict[str, _Open] = field(default_factory=dict)


class OpenTelemetry(Middleware):
    """Tells OpenTelemetry of every turn: `store.use(OpenTelemetry())`.

    tracer_provider, meter_provider
                       default: those that the application has set
    capture_content    whether spans carry what was said too: prompts, replies, tools' arguments and results, texts of
                       errors; default: $OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT, else not

    A turn is a span "invoke_agent {agent}"; in it each attempt of a call of a model is a span "chat {model}", one for
    each request row, and each run of a tool a span "execute_tool {tool}", which is the current one while the tool runs.
    Raises `WrongSetup` where opentelemetry-api is not installed.
    """

    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        capture_content: bool | None = None,
    ):
        if not isinstance(capture_content, bool | None):
            raise InvalidValue(f"capture_content must be True or False, not {capture_content!r}")
        said = os.environ.get(CAPTURE, "").lower()
        self.captures = said in ("true", "span_only", "span_and_event") if capture_content is None else capture_content
        self._tracer = trace.get_tracer("llm_orm", _version(), tracer_provider)
        meter = metrics.get_meter("llm_orm", _version(), meter_provider)
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Number of input and output tokens used.",
            explicit_bucket_boundaries_advisory=TOKENS,
        )
        self._duration = meter.create_histogram(
            "gen_ai.client.operation.duration",
            unit="s",
            description="GenAI operation duration.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._first_chunk = meter.create_histogram(
            "gen_ai.client.operation.time_to_first_chunk",
            unit="s",
            description="Time to receive the first chunk of a stream.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._cost = meter.create_counter("llm_orm.cost", unit="{USD}", description="What priced calls have cost.")

    # A turn

    def on_turn_start(self, context: TurnContext) -> None:
        name = "invoke_agent" if context.agent is None else f"invoke_agent {context.agent}"
        attributes = {**self._about(context, "invoke_agent"), "gen_ai.request.model": _model(context)}
        span = self._tracer.start_span(name, kind=trace.SpanKind.INTERNAL, attributes=attributes)
        context.state[self._key] = _Turn(_Open(span), trace.set_span_in_context(span))

    def on_turn_end(self, context: TurnContext, ended: Any) -> None:
        turn: _Turn = context.state.pop(self._key)
        turn.turn.span.set_attribute("llm_orm.turn_id", str(context.turn_id))
        for opened in (*turn.tools.values(), turn.turn):
            if isinstance(ended, BaseException):
                self._failed(context, opened, ended)
            opened.end()

    # A call of a model

    @contextmanager
    def around_call(self, context: TurnContext) -> Iterator[None]:
        turn: _Turn = context.state[self._key]
        turn.call = self._call(context, turn)
        with _current(turn.call.span):
            yield

    def on_answer(self, context: TurnContext, answer: Answer) -> None:
        turn: _Turn = context.state[self._key]
        opened, turn.call = turn.call, None
        if opened is None:  # it was broken off before the request was sent
            opened = self._call(context, turn, time.time_ns() - answer.duration_ms * 1_000_000)
        reply = answer.reply
        attributes = {
            "gen_ai.provider.name": _provider(reply.provider),
            "gen_ai.response.id": reply.provider_request_id,
            "gen_ai.response.finish_reasons": reply.finish_reason and [reply.finish_reason],
            "gen_ai.response.time_to_first_chunk": _seconds(answer.first_token_ms),
            "http.response.status_code": answer.status_code or None,
            "llm_orm.cost_usd": None if reply.cost is None else float(reply.cost),
            **_figures(reply.usage),
        }
        try:
            if answer.error is None:
                attributes["gen_ai.response.model"] = reply.model
            else:
                self._failed(context, opened, answer.error, answer.error_message)
            if self.captures:
                attributes["gen_ai.output.messages"] = _json([_output(context, reply)])
        finally:
            opened.span.set_attributes({name: value for name, value in attributes.items() if value is not None})
            opened.end(answer.duration_ms)
            self._measure(context, answer, trace.set_span_in_context(opened.span, turn.context))

    def _call(self, context: TurnContext, turn: _Turn, started_ns: int | None = None) -> _Open:
        params = context.options.params
        attributes = {
            **self._about(context, "chat"),
            "gen_ai.request.model": _model(context),
            "gen_ai.request.stream": context.streamed or None,
            "gen_ai.request.temperature": context.options.temperature,
            "gen_ai.request.max_tokens": context.options.max_tokens,
            "gen_ai.output.type": None if context.schema is None else "json",
            "llm_orm.turn_id": str(context.turn_id),
            "llm_orm.round": context.round,
            "llm_orm.attempt": context.attempt,
        }
        for name, kind in _PARAMS.items():
            value = params.get(name)
            if isinstance(value, kind) and not isinstance(value, bool):
                attributes[f"gen_ai.request.{name}"] = value
        given = {name: value for name, value in attributes.items() if value is not None}
        opened = self._opened(f"chat {_model(context)}", trace.SpanKind.CLIENT, given, turn, started_ns)
        if self.captures:
            opened.span.set_attribute("gen_ai.input.messages", _json([_input(context, m) for m in context.messages]))
        return opened

    def _measure(self, context: TurnContext, answer: Answer, here: contexts.Context) -> None:
        reply, usage = answer.reply, answer.reply.usage
        about = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": _provider(reply.provider),
            "gen_ai.request.model": _model(context),
        }
        if answer.error is None:
            about["gen_ai.response.model"] = reply.model
        if usage != Usage():
            for kind, count in (("input", usage.input_tokens), ("output", usage.output_tokens)):
                self._tokens.record(count, {**about, "gen_ai.token.type": kind}, here)
        if reply.cost is not None:
            self._cost.add(float(reply.cost), about, here)
        if answer.first_token_ms is not None:
            self._first_chunk.record(answer.first_token_ms / 1000, about, here)
        failed = {} if answer.error is None else {"error.type": type(answer.error).__name__}
        self._duration.record(answer.duration_ms / 1000, about | failed, here)

    # A tool

    @contextmanager
    def around_tool(self, context: TurnContext, call: ToolCall) -> Iterator[None]:
        turn: _Turn = context.state[self._key]
        attributes = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.conversation.id": str(context.chat_id),
            "gen_ai.tool.name": call.name,
            "gen_ai.tool.call.id": call.id,
            "gen_ai.tool.type": "function",
            "llm_orm.turn_id": str(context.turn_id),
        }
        opened = self._opened(f"execute_tool {call.name}", trace.SpanKind.INTERNAL, attributes, turn)
        turn.tools[call.id] = opened
        if self.captures:
            opened.span.set_attribute("gen_ai.tool.call.arguments", context.stored(call.arguments))
        with _current(opened.span):
            yield

    def on_outcome(self, context: TurnContext, outcome: ToolOutcome) -> None:
        turn: _Turn = context.state[self._key]
        opened = turn.tools.pop(outcome.call.id)
        try:
            if outcome.exception is not None:
                self._failed(context, opened, outcome.exception, outcome.error)
            if self.captures:
                opened.span.set_attribute("gen_ai.tool.call.result", context.stored(outcome.result))
        finally:
            opened.end(outcome.duration_ms)

    # How

    @property
    def _key(self) -> str:
        """Where a turn keeps its spans: there may be two of us."""
        return f"llm_orm.telemetry {id(self)}"

    def _about(self, context: TurnContext, operation: str) -> dict[str, Any]:
        about = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": _provider(context.provider),
            "gen_ai.conversation.id": str(context.chat_id),
        }
        return about if context.agent is None else {**about, "gen_ai.agent.name": context.agent}

    def _failed(self, context: TurnContext, opened: _Open, error: BaseException, said: str | None = None) -> None:
        opened.span.set_attribute("error.type", type(error).__name__.lstrip("_"))
        opened.span.set_status(trace.StatusCode.ERROR, context.stored(said) if said and self.captures else None)

    def _opened(
        self,
        name: str,
        kind: trace.SpanKind,
        attributes: Mapping[str, Any],
        turn: _Turn,
        started_ns: int | None = None,
    ) -> _Open:
        started_ns = time.time_ns() if started_ns is None else started_ns
        span = self._tracer.start_span(name, turn.context, kind, attributes, start_time=started_ns)
        return _Open(span, started_ns)


_PARAMS: dict[str, Any] = {
    "top_p": int | float,
    "top_k": int | float,
    "frequency_penalty": int | float,
    "presence_penalty": int | float,
    "seed": int,
}


def _current(span: trace.Span) -> Any:
    """The block in which it is the current span; it is ended elsewhere."""
    return trace.use_span(span, end_on_exit=False, record_exception=False, set_status_on_exception=False)


def _model(context: TurnContext) -> str:
    return context.model.removeprefix(f"{context.provider}/")


def _provider(name: str) -> str:
    return PROVIDERS.get(name, name) or "unknown"


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _figures(usage: Usage) -> dict[str, Any]:
    return {
        "gen_ai.usage.input_tokens": usage.input_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens or None,
        "gen_ai.usage.cache_creation.input_tokens": usage.cache_write_tokens or None,
        "gen_ai.usage.reasoning.output_tokens": usage.thinking_tokens or None,
        "llm_orm.usage_estimated": usage.estimated or None,
    }


# What was said, in the shape of the conventions: {"role": …, "parts": [{"type": "text", "content": …}, …]}


def _input(context: TurnContext, message: Message) -> dict[str, Any]:
    content = message.get("content")
    if message["role"] == "tool":
        answer = {"type": "tool_call_response", "id": message.get("tool_call_id")}
        return {"role": "tool", "parts": [{**answer, "response": _kept(context, content)}]}
    parts = [_part(context, part) for part in content] if isinstance(content, list) else _texts(context, content)
    for call in message.get("tool_calls") or ():
        parts.append(_asked(context, call["id"], call["function"]["name"], call["function"].get("arguments")))
    return {"role": message["role"], "parts": parts}


def _output(context: TurnContext, reply: Reply) -> dict[str, Any]:
    parts = [{**part, "type": "reasoning"} for part in _texts(context, reply.thinking)]
    parts += _texts(context, reply.content)
    parts += [_asked(context, call.id, call.name, call.arguments) for call in reply.tool_calls]
    return {"role": "assistant", "parts": parts, "finish_reason": reply.finish_reason or "error"}


def _texts(context: TurnContext, text: str | None) -> list[dict[str, Any]]:
    return [{"type": "text", "content": _kept(context, text)}] if text else []


def _part(context: TurnContext, part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a message; of a file, that there was one."""
    kind = part.get("type")
    return {"type": kind, "content": _kept(context, part.get("text"))} if kind == "text" else {"type": kind}


def _asked(context: TurnContext, call_id: Any, name: str, arguments: Any) -> dict[str, Any]:
    kept = _kept(context, arguments)
    try:
        kept = json.loads(kept or "{}")
    except ValueError:
        pass  # as the model wrote it
    return {"type": "tool_call", "id": call_id, "name": name, "arguments": kept}


def _kept(context: TurnContext, text: Any) -> Any:
    """A text as the middlewares let it be stored."""
    return context.stored(text) if isinstance(text, str) else text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _version() -> str:
    try:
        return version("llm-orm")
    except PackageNotFoundError:  # run from its source
        return ""

"""The only file that imports litellm: calls, streams, usage, cost, and what an error means.

litellm is imported on the first call of a model: it takes seconds.
"""

import email.utils
import functools
import os
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from .errors import InvalidValue, UnknownModel
from .values import Answer, Chunk, Message, ModelRequest, Reply, ToolCall, Usage


class LLM:
    """litellm with settings of its own: a key, an address, and defaults for every call. Its key is never printed.

    >>> LLM(provider="openai", api_base="http://localhost:8000/v1", api_key="…", temperature=0)

    provider    litellm's name of it; then models need no prefix
    api_key, api_base, defaults
                passed to each call of litellm, under what the chat says
    """

    def __init__(
        self, *, provider: str | None = None, api_key: str | None = None, api_base: str | None = None, **defaults: Any
    ):
        given = {"custom_llm_provider": provider, "api_key": api_key, "api_base": api_base}
        self.provider = provider
        self.defaults = {**defaults, **{name: value for name, value in given.items() if value is not None}}

    def __repr__(self) -> str:
        return f"<LLM provider={self.provider!r} api_base={self.defaults.get('api_base')!r}>"

    def completion(self, **kwargs: Any) -> Any:
        return litellm().completion(**{**self.defaults, **kwargs})

    async def acompletion(self, **kwargs: Any) -> Any:
        return await litellm().acompletion(**{**self.defaults, **kwargs})

    def get_llm_provider(self, model: str, custom_llm_provider: str | None = None) -> Any:
        return litellm().get_llm_provider(model, custom_llm_provider=custom_llm_provider or self.provider)


def litellm() -> Any:
    # Keeps the import off the network: litellm brings a price map along, and would look for a newer one.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    return litellm


# Models


def check_model(llm: Any, model: str, provider: str | None) -> None:
    """Raise `UnknownModel` where no provider is known for the model, before anything is written."""
    try:
        resolve(llm, model, provider)
    except UnknownModel:
        raise
    names = getattr(llm, "model_names", None)  # of a litellm.Router
    if names and model not in names:
        raise UnknownModel(f"the router has no model {model!r}; it has {', '.join(sorted(names))}")


def resolve(llm: Any, model: str, provider: str | None) -> tuple[str, str]:
    """(model, provider) by the provider's own names: "anthropic/claude-x" → ("claude-x", "anthropic")."""
    if llm is None or isinstance(llm, LLM):
        return _resolved(model, provider or (llm.provider if llm else None))
    own = getattr(llm, "get_llm_provider", None)
    if own is None:
        return model, provider or ""
    return _two_of(own, model, provider)


@functools.cache
def _resolved(model: str, provider: str | None) -> tuple[str, str]:
    return _two_of(litellm().get_llm_provider, model, provider)


def _two_of(get_llm_provider: Any, model: str, provider: str | None) -> tuple[str, str]:
    try:
        name, found, *_ = get_llm_provider(model, custom_llm_provider=provider)
    except Exception as error:
        raise UnknownModel(
            f"no provider is known for the model {model!r}; write it as provider/model (as in "
            '"anthropic/claude-sonnet-4-5") or give provider='
        ) from error
    return name, found


# Prices


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per token."""

    input: Decimal
    output: Decimal
    cached: Decimal
    cache_write: Decimal

    def of(self, usage: Usage) -> Decimal:
        fresh = max(usage.input_tokens - usage.cached_tokens - usage.cache_write_tokens, 0)
        return (
            fresh * self.input
            + usage.cached_tokens * self.cached
            + usage.cache_write_tokens * self.cache_write
            + usage.output_tokens * self.output
        )


_prices: dict[str, Price] = {}


def register_price(
    model: str,
    *,
    input_per_million: Decimal | str | int,
    output_per_million: Decimal | str | int,
    cached_per_million: Decimal | str | int | None = None,
    cache_write_per_million: Decimal | str | int | None = None,
) -> None:
    """Say what a private model costs, in US dollars per million tokens. Goes before litellm's price map.

    model                      "my-model", or "provider/my-model"
    cached_per_million         of input read from the provider's cache; default: as input
    cache_write_per_million    of input written to it; default: as input
    """

    def per_token(value: Decimal | str | int) -> Decimal:
        if isinstance(value, float):
            raise InvalidValue(f"a price must be exact: write {str(value)!r} as a string or a Decimal, not a float")
        return Decimal(value) / 1_000_000

    plain = per_token(input_per_million)
    _prices[model] = Price(
        input=plain,
        output=per_token(output_per_million),
        cached=plain if cached_per_million is None else per_token(cached_per_million),
        cache_write=plain if cache_write_per_million is None else per_token(cache_write_per_million),
    )


def cost_of(llm: Any, model: str, provider: str, usage: Usage) -> Decimal | None:
    """What the tokens cost in US dollars; None where no price is known."""
    registered = _prices.get(model) or _prices.get(f"{provider}/{model}")
    if registered is not None:
        return registered.of(usage)
    cost_per_token = getattr(llm, "cost_per_token", None) or litellm().cost_per_token
    try:
        dollars = cost_per_token(
            model=model,
            custom_llm_provider=provider or None,
            prompt_tokens=usage.input_tokens,
            completion_tokens=usage.output_tokens,
            cache_read_input_tokens=usage.cached_tokens,
            cache_creation_input_tokens=usage.cache_write_tokens,
        )
    except Exception:
        # litellm raises for a model that is not in its map, in more than one class.
        return None
    return sum((Decimal(str(part)) for part in dollars), Decimal(0)).quantize(Decimal("1e-12"))


def count_tokens(llm: Any, model: str, *, messages: list[Message] | None = None, text: str | None = None) -> int:
    counter = getattr(llm, "token_counter", None) or litellm().token_counter
    return counter(model=model, messages=messages) if messages is not None else counter(model=model, text=text)


# Calls


class Call:
    """One call of a model: `chunks()` or `achunks()` makes it, `ended()` says how it went."""

    def __init__(self, request: ModelRequest):
        self.request = request
        self.llm = request.llm if request.llm is not None else litellm()
        self.model, self.provider = resolve(request.llm, request.model, request.provider)
        self.received = Received(request.taken_call_ids)
        self.started = time.perf_counter()
        self.first_token: float | None = None
        self.shown = False

    def chunks(self) -> Iterator[Chunk]:
        response = self.llm.completion(**self._keywords())
        if not self.request.stream:
            self.received.take(response)
            return
        try:
            for part in response:
                for chunk in self._chunks_of(part):
                    self.shown = True
                    yield chunk
        finally:
            _close(response)
        for call in self.received.tool_calls():
            self.shown = True
            yield Chunk(tool_call=call)

    async def achunks(self) -> AsyncIterator[Chunk]:
        response = await self.llm.acompletion(**self._keywords())
        if not self.request.stream:
            self.received.take(response)
            return
        try:
            async for part in response:
                for chunk in self._chunks_of(part):
                    self.shown = True
                    yield chunk
        finally:
            await _aclose(response)
        for call in self.received.tool_calls():
            self.shown = True
            yield Chunk(tool_call=call)

    @property
    def has_usage(self) -> bool:
        return self.received.usage is not None

    def ended(self, error: BaseException | None = None) -> Answer:
        """How the call ended; its usage is counted here where the provider sent none."""
        duration_ms = self._milliseconds(time.perf_counter())
        status = 200 if error is None else status_of(error)
        usage = self.received.usage or self._estimated(error, status)
        return Answer(
            reply=self.received.reply(self.model, self.provider, usage, self._cost(usage, error, status)),
            error=error,
            status_code=status,
            duration_ms=duration_ms,
            first_token_ms=None if self.first_token is None else self._milliseconds(self.first_token),
            streamed=self.request.stream,
            shown=self.shown,
            retryable=error is not None and is_retryable(error),
            retry_after=None if error is None else retry_after_of(error),
        )

    def _keywords(self) -> dict[str, Any]:
        request = self.request
        keywords = {**request.options, "model": request.model, "messages": request.messages, "max_retries": 0}
        if request.provider:
            keywords["custom_llm_provider"] = request.provider
        if request.stream:
            keywords |= {"stream": True, "stream_options": {"include_usage": True}}
        return keywords

    def _chunks_of(self, part: Any) -> list[Chunk]:
        chunks, is_token = self.received.add(part)
        if is_token and self.first_token is None:
            self.first_token = time.perf_counter()
        return chunks

    def _milliseconds(self, moment: float) -> int:
        return round((moment - self.started) * 1000)

    def _estimated(self, error: BaseException | None, status: int) -> Usage:
        if isinstance(error, Exception) and not self.received.has_output:
            return Usage()  # the provider refused, or was not reached
        text = self.received.everything_written()
        return Usage(
            input_tokens=count_tokens(self.llm, self.model, messages=self.request.messages),
            output_tokens=count_tokens(self.llm, self.model, text=text) if text else 0,
            estimated=True,
        )

    def _cost(self, usage: Usage, error: BaseException | None, status: int) -> Decimal | None:
        if self.received.cost is not None:
            return self.received.cost
        if usage == Usage():
            # An HTTP error is not billed. What became of a call whose connection broke, nobody knows.
            return Decimal(0) if error is not None and status >= 400 and status != 408 else None
        return cost_of(self.llm, self.model, self.provider, usage)


class Received:
    """What has come of a reply so far: the parts of a stream, put together as they would have come in one piece."""

    def __init__(self, taken_call_ids: frozenset[str] = frozenset()):
        self.taken_call_ids = taken_call_ids
        self.content: list[str] = []
        self.thinking: list[str] = []
        self.blocks: list[dict[str, Any]] = []
        self.calls: dict[int, dict[str, Any]] = {}
        self.fields: dict[str, Any] = {}
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.cost: Decimal | None = None
        self.request_id: str | None = None

    def take(self, response: Any) -> None:
        """A whole response."""
        self._take_envelope(response)
        choice = response.choices[0]
        self.finish_reason = getattr(choice, "finish_reason", None)
        self._add_delta(choice.message)

    def add(self, part: Any) -> tuple[list[Chunk], bool]:
        """A part of a stream: what there is to show of it, and whether the model has said anything in it."""
        self._take_envelope(part)
        choices = getattr(part, "choices", None)
        if not choices:
            return [], False
        self.finish_reason = getattr(choices[0], "finish_reason", None) or self.finish_reason
        content, thinking, had_calls = self._add_delta(choices[0].delta)
        chunks = [Chunk(thinking=thinking)] if thinking else []
        if content:
            chunks.append(Chunk(content=content))
        return chunks, bool(chunks) or had_calls

    def _take_envelope(self, response: Any) -> None:
        usage = getattr(response, "usage", None)
        if usage is not None:
            # Cumulative where a provider sends it more than once: the last one counts, never the sum.
            self.usage = parse_usage(usage)
            reported = getattr(usage, "cost", None)
            self.cost = Decimal(str(reported)) if reported is not None else self.cost
        self.request_id = self.request_id or getattr(response, "id", None)

    def _add_delta(self, delta: Any) -> tuple[str, str, bool]:
        content = getattr(delta, "content", None) or ""
        thinking = getattr(delta, "reasoning_content", None) or ""
        if content:
            self.content.append(content)
        if thinking:
            self.thinking.append(thinking)
        for block in getattr(delta, "thinking_blocks", None) or ():
            self._add_block(block)
        calls = getattr(delta, "tool_calls", None) or ()
        for position, call in enumerate(calls):
            self._add_call(position, call)
        for name, value in (getattr(delta, "provider_specific_fields", None) or {}).items():
            _merge(self.fields, name, value)
        return content, thinking, bool(calls)

    def _add_block(self, block: Any) -> None:
        block = dict(block)
        last = self.blocks[-1] if self.blocks else None
        if last and block.get("type") == last.get("type") == "thinking" and not last.get("signature"):
            last["thinking"] = (last.get("thinking") or "") + (block.get("thinking") or "")
            last["signature"] = block.get("signature")
        else:
            self.blocks.append(block)

    def _add_call(self, position: int, call: Any) -> None:
        index = getattr(call, "index", None)
        known = self.calls.setdefault(position if index is None else index, {"id": "", "name": "", "arguments": ""})
        known["id"] = known["id"] or getattr(call, "id", None) or ""
        known["name"] = known["name"] or getattr(call.function, "name", None) or ""
        known["arguments"] += getattr(call.function, "arguments", None) or ""
        for name, value in (getattr(call, "provider_specific_fields", None) or {}).items():
            _merge(known.setdefault("fields", {}), name, value)

    @property
    def has_output(self) -> bool:
        return bool(self.content or self.thinking or self.calls)

    def everything_written(self) -> str:
        arguments = (call["name"] + call["arguments"] for call in self.calls.values())
        return "".join([*self.thinking, *self.content, *arguments])

    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls, each with an id that no other call of the turn has."""
        taken = set(self.taken_call_ids)
        calls = []
        for index in sorted(self.calls):
            call = self.calls[index]
            call["id"] = _fresh_id(call["id"], taken)
            taken.add(call["id"])
            signature = call.get("fields", {}).get("thought_signature")
            calls.append(ToolCall(call["id"], call["name"], call["arguments"], signature))
        return tuple(calls)

    def reply(self, model: str, provider: str, usage: Usage, cost: Decimal | None) -> Reply:
        signatures = [block["signature"] for block in self.blocks if block.get("signature")]
        calls = self.tool_calls()
        return Reply(
            content="".join(self.content) or None,
            thinking="".join(self.thinking) or None,
            thinking_signature=signatures[-1] if signatures else None,
            tool_calls=calls,
            message=self._message(calls),
            usage=usage,
            cost=cost,
            finish_reason=self.finish_reason,
            model=model,
            provider=provider,
            provider_request_id=self.request_id,
        )

    def _message(self, calls: tuple[ToolCall, ...]) -> Message:
        """The assistant message as litellm wants it back."""
        message: Message = {"role": "assistant", "content": "".join(self.content) or None}
        if self.blocks:
            message["thinking_blocks"] = self.blocks
        elif self.thinking:
            message["reasoning_content"] = "".join(self.thinking)
        if calls:
            message["tool_calls"] = [
                render_tool_call(call, self.calls[index].get("fields"))
                for call, index in zip(calls, sorted(self.calls), strict=True)
            ]
        if self.fields:
            message["provider_specific_fields"] = self.fields
        return message


def render_tool_call(call: ToolCall, fields: Mapping[str, Any] | None) -> dict[str, Any]:
    rendered: dict[str, Any] = {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
    if fields:
        rendered["provider_specific_fields"] = dict(fields)
    return rendered


def parse_usage(usage: Any) -> Usage:
    """litellm's usage object, in which `prompt_tokens` includes what the provider's cache held."""
    prompt = getattr(usage, "prompt_tokens_details", None)
    completion = getattr(usage, "completion_tokens_details", None)

    def count(owner: Any, name: str) -> int:
        value = getattr(owner, name, None)
        return value if isinstance(value, int) and value > 0 else 0

    return Usage(
        input_tokens=count(usage, "prompt_tokens"),
        output_tokens=count(usage, "completion_tokens"),
        cached_tokens=count(prompt, "cached_tokens") or count(usage, "cache_read_input_tokens"),
        cache_write_tokens=count(prompt, "cache_creation_tokens") or count(usage, "cache_creation_input_tokens"),
        thinking_tokens=count(completion, "reasoning_tokens"),
    )


# What an error means

RETRYABLE = frozenset(
    "RateLimitError InternalServerError ServiceUnavailableError BadGatewayError APIConnectionError Timeout "
    "APIResponseValidationError MidStreamFallbackError".split()
)
FINAL = frozenset(
    "AuthenticationError BadRequestError BudgetExceededError ContentPolicyViolationError ContextWindowExceededError "
    "ImageFetchError InvalidRequestError JSONSchemaValidationError LiteLLMUnknownProvider MockException NotFoundError "
    "PermissionDeniedError RejectedRequestError UnprocessableEntityError UnsupportedParamsError APIError".split()
)


def is_retryable(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    if not isinstance(error, Exception) or "insufficient_quota" in str(error):
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & FINAL and not type(error).__name__ in RETRYABLE:
        return False
    if names & RETRYABLE or isinstance(error, ConnectionError | TimeoutError):
        return True
    status = getattr(error, "status_code", None)
    return isinstance(status, int) and (status in (408, 429) or status >= 500)


def status_of(error: BaseException) -> int:
    """The HTTP status: 499 where we hung up, 0 where there was none."""
    if not isinstance(error, Exception):
        return 499
    if any(cls.__name__ == "APIConnectionError" for cls in type(error).__mro__):
        return 0  # litellm says 500 here, which no server did
    status = getattr(error, "status_code", None)
    return status if isinstance(status, int) else 0


def retry_after_of(error: BaseException) -> float | None:
    """Seconds that the provider asked us to wait, by its Retry-After header (RFC 9110, 10.2.3)."""
    own = getattr(error, "retry_after", None)
    if own is not None:
        return float(own)
    for headers in (
        getattr(getattr(error, "response", None), "headers", None),
        getattr(error, "litellm_response_headers", None),
        getattr(error, "headers", None),
    ):
        value = headers.get("retry-after") if headers else None
        if value:
            return _seconds(value)
    return None


def _seconds(value: str) -> float | None:
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        return max((email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return None


def _fresh_id(wanted: str, taken: set[str]) -> str:
    if wanted and wanted not in taken:
        return wanted
    number = 2
    while f"{wanted or 'call'}_{number}" in taken:
        number += 1
    return f"{wanted or 'call'}_{number}"


def _merge(into: dict[str, Any], name: str, value: Any) -> None:
    """Add a piece of a provider's own field: lists grow, what is said again replaces what was said before."""
    if isinstance(value, list) and isinstance(into.get(name), list):
        into[name] = into[name] + value
    elif value is not None:
        into[name] = value


def _close(response: Any) -> None:
    close = getattr(response, "close", None)
    if close is not None:
        close()


async def _aclose(response: Any) -> None:
    close = getattr(response, "aclose", None)
    if close is not None:
        await close()

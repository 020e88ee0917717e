"""The only file that imports litellm: models, prices, and calls.

litellm is imported on the first call of a model: it takes seconds.
"""

import functools
import inspect
import os
import re
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from .attachments import WITHOUT_SOUND, without_images, without_sound
from .database import without_password
from .errors import InvalidValue, UnknownModel, UnreadableReply, meant
from .failures import (
    hung_up,
    is_retryable,
    redact,
    redacted,
    retry_after_of,
    secrets_of,
    status_of,
    unwrapped,
    was_never_sent,
)
from .received import Received
from .values import Answer, Chunk, Message, ModelRequest, Reply, Usage, storable, text_of


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
        api_base = self.defaults.get("api_base")
        return f"<LLM provider={self.provider!r} api_base={api_base and without_password(str(api_base))!r}>"

    def completion(self, **kwargs: Any) -> Any:
        return litellm().completion(**{**self.defaults, **kwargs})

    async def acompletion(self, **kwargs: Any) -> Any:
        return await litellm().acompletion(**{**self.defaults, **kwargs})

    def get_llm_provider(self, model: str, custom_llm_provider: str | None = None) -> Any:
        return litellm().get_llm_provider(model, custom_llm_provider=custom_llm_provider or self.provider)


def litellm() -> Any:
    # Keeps it off the network: litellm brings a price map and a list of headers along, and would look for newer ones.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    os.environ.setdefault("LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS", "True")
    import litellm

    litellm.suppress_debug_info = True  # it prints advice to stdout, where an application's own output goes
    return litellm


# Models


def check_model(llm: Any, model: str, provider: str | None) -> str:
    """The provider of the model. Raises `UnknownModel` where none is known, before anything is written."""
    _, found = resolve(llm, model, provider)
    names = _of_router(llm, "model_names", kind="group_set")
    if names and model not in names:
        raise UnknownModel(f"the router has no model {model!r}; it has {', '.join(sorted(names))}")
    return found


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
    name, found = _two_of(litellm().get_llm_provider, model, provider)
    known = [getattr(each, "value", each) for each in litellm().provider_list]
    if found not in known:
        right = meant(found, known)
        hint = f"; did you mean {right!r}?" if right else ""
        raise UnknownModel(f"litellm knows no provider {found!r}; it knows {', '.join(sorted(known))}{hint}")
    return name, found


def _two_of(get_llm_provider: Any, model: str, provider: str | None) -> tuple[str, str]:
    try:
        name, found, *_ = get_llm_provider(model, custom_llm_provider=provider)
    except Exception as error:
        raise UnknownModel(
            f"no provider is known for the model {model!r}; write it as provider/model (as in "
            '"anthropic/claude-sonnet-4-5") or give provider='
        ) from error
    return name, found


def _of_router(llm: Any, name: str, **kind: str) -> Any:
    """The models of a `litellm.Router`: its registry's, where it has one, for then it warns of its own attributes."""
    registry: Any = getattr(llm, "registry", None)
    if registry is None:
        return getattr(llm, name, None)
    return registry().names(**kind) if kind else registry().all()


def _is_router(llm: Any) -> bool:
    return callable(getattr(llm, "registry", None)) or hasattr(llm, "model_names")


def fallbacks_of(llm: Any, model: str) -> tuple[str, ...]:
    """What a router would fall back on by itself: the turn does so in its place, and each call leaves its row."""
    for models in _own_fallbacks(llm) or ():
        if chosen := models.get(model) or models.get("*"):
            return tuple(each for each in chosen if each != model)
    return ()


def _own_fallbacks(llm: Any) -> list[dict[str, list[str]]] | None:
    """A router's fallbacks, where they are no more than names; None where it has rules of its own for them."""
    if not _is_router(llm):
        return None
    settings: Any = llm.settings() if callable(getattr(llm, "settings", None)) else llm
    special = ("context_window_fallbacks", "content_policy_fallbacks")
    if any(getattr(settings, name, None) for name in special):
        return None
    fallbacks = getattr(settings, "fallbacks", None) or []
    are_names = all(isinstance(each, str) for models in fallbacks for chosen in models.values() for each in chosen)
    return fallbacks if are_names else None


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
        try:
            return Decimal(value) / 1_000_000
        except (ArithmeticError, TypeError, ValueError):
            raise InvalidValue(f'a price is US dollars per million tokens, as in "0.15", not {value!r}') from None

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
        return None  # litellm raises for a model that is not in its map, in more than one class
    cost = sum((Decimal(str(part)) for part in dollars), Decimal(0)).quantize(Decimal("1e-12"))
    return cost if cost or _is_priced(llm, model, provider) else None


def _is_priced(llm: Any, model: str, provider: str) -> bool:
    """Whether a price of nothing is one: litellm makes one up for some models that it does not know."""
    if hasattr(llm, "cost_per_token") and not hasattr(llm, "model_cost"):
        return True
    known = litellm().model_cost
    return model in known or f"{provider}/{model}" in known


def count_tokens(
    llm: Any,
    model: str,
    *,
    messages: list[Message] | None = None,
    text: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> int:
    """How many tokens they are, by the model's tokenizer; roughly, where that fails."""
    counter = getattr(llm, "token_counter", None) or litellm().token_counter
    more = {"tools": list(tools)} if tools else {}
    messages = messages and without_sound(messages)  # which litellm refuses to count
    try:
        if any(map(_is_unbroken, [text] if messages is None else _texts_in(messages))):
            raise ValueError("to count it would take minutes")
        if messages is None:
            return counter(model=model, text=text)
        return counter(model=model, messages=messages, **more)
    except Exception:
        return (
            len(str((messages, *tools)) if messages is not None else text or "") // 4 + 1
        )  # no row is lost for a figure


LONGEST_WORD = 20_000
"""Characters without a blank: the time that a tokenizer takes for them grows with their square."""


def _is_unbroken(text: Any) -> bool:
    return isinstance(text, str) and len(text) > LONGEST_WORD and max(map(len, text.split())) > LONGEST_WORD


def _texts_in(messages: list[Message]) -> Iterator[Any]:
    for message in messages:
        content = message.get("content")
        yield from (part.get("text") for part in content) if isinstance(content, list) else [content]
        yield from (call["function"]["arguments"] for call in message.get("tool_calls") or ())


def estimate(
    llm: Any,
    model: str,
    provider: str | None,
    messages: list[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    max_tokens: int | None = None,
) -> Decimal | None:
    """US dollars that a call costs at the least: its input, and max_tokens of output where that is set; None where the
    model has no known price."""
    name, found = resolve(llm, model, provider)
    counted = count_tokens(llm, name, messages=messages, tools=tools)
    return cost_of(llm, name, found, Usage(counted, max_tokens or 0))


def secrets_in(llm: Any, options: Mapping[str, Any]) -> Iterator[str]:
    """What must not be written down, in everything that a key may be in."""
    known: dict[str, Any] = {"options": dict(options), "environment": dict(os.environ)}
    return secrets_of(known | {"llm": getattr(llm, "defaults", None), "router": _of_router(llm, "model_list")})


# Calls


class Call:
    """One call of a model: `chunks()` or `achunks()` makes it, `ended()` says how it went."""

    _clock = staticmethod(time.perf_counter)  # kept here, the real one: where tests freeze time, threads may not agree

    def __init__(self, request: ModelRequest):
        self.request = request
        self.llm = request.llm if request.llm is not None else litellm()
        self.model, self.provider = resolve(request.llm, request.model, request.provider)
        self.received = self._nothing_yet()
        self.started = self._clock()
        self.stopped: float | None = None
        self.first_token: float | None = None
        self.shown = False
        self._lock = threading.Lock()
        self._is_over = False
        """Whether nobody waits for it any longer: what still comes changes nothing."""

    def chunks(self) -> Generator[Chunk]:
        with self._client() as client:
            with self.request.around():
                response = self.llm.completion(**self._keywords(), **client)
            if not self.request.stream:
                self._take(response)
                return
            with self._reading():
                parts = iter(response)
            try:
                for part in parts:
                    yield from self._chunks_of(part)
                    if self._is_over:
                        return  # nobody reads on: the provider is hung up on
            finally:
                self._finish(response)
                _close(response)
            self._check_finished(response)
            for call in self.received.tool_calls():
                self.shown = True
                yield Chunk(tool_call=call)

    async def achunks(self) -> AsyncGenerator[Chunk]:
        async with self._async_client() as client:
            with self.request.around():
                response = await self.llm.acompletion(**self._keywords(), **client)
            if not self.request.stream:
                self._take(response)
                return
            with self._reading():
                parts = aiter(response)
            try:
                async for part in parts:
                    for chunk in self._chunks_of(part):
                        yield chunk
            finally:
                self._finish(response)
                await _aclose(response)
            self._check_finished(response)
            for call in self.received.tool_calls():
                self.shown = True
                yield Chunk(tool_call=call)

    def so_far(self) -> tuple[str, str]:
        """(text, thinking) that have come of a stream."""
        return self.received.so_far()

    def unfinished(self) -> BaseException | None:
        """What ended the call, where it did not come to its end and nothing else says why."""
        return None if self.stopped else GeneratorExit()

    def ended(self, error: BaseException | None = None) -> Answer:
        """How the call ended; its usage is counted here where the provider sent none. Never raises."""
        if isinstance(error, Exception):
            redact(error, self._secrets())
        error = unwrapped(error) if error is not None else None
        with self._lock:
            self._is_over = True
        try:
            return self._ended(error)
        except Exception as problem:
            # What came makes no sense; that it came is on record all the same.
            usage = self.received.usage or Usage(estimated=True)
            error = error or self._unreadable(problem)
            return Answer(
                reply=Reply(model=self.model, provider=self.provider or "unknown", usage=usage),
                error=error,
                error_message=self._printable(error),
                status_code=status_of(error),
                streamed=self.request.stream,
                shown=self.shown,
            )
        except BaseException as signal:  # which came while the tokens were counted
            return self.ended(signal)

    def _ended(self, error: BaseException | None) -> Answer:
        status = 200 if error is None else status_of(error)
        usage = self.received.usage if error is None else None
        if usage is None or (usage.estimated and not (usage.input_tokens and usage.output_tokens)):
            usage = self._estimated(error)
        model, provider = self._answered_by(error) if not self.provider else (self.model, self.provider)
        model, provider = model or self.model, provider or "unknown"
        return Answer(
            reply=self.received.reply(model, provider, usage, self._cost(model, provider, usage, error, status)),
            error=error,
            error_message=None if error is None else self._printable(error),
            status_code=status,
            duration_ms=self._milliseconds(self.stopped or self._clock()),
            first_token_ms=None if self.first_token is None else self._milliseconds(self.first_token),
            streamed=self.request.stream,
            shown=self.shown,
            retryable=error is not None and is_retryable(error),
            retry_after=None if error is None else retry_after_of(error),
        )

    def _answered_by(self, error: BaseException | None) -> tuple[str | None, str | None]:
        """(model, provider) that a router took, by the provider's own names, as the reply or the error says."""
        model, provider = self.received.answered_by
        if error is not None and model is None:
            model, provider = getattr(error, "model", None), getattr(error, "llm_provider", None)
        if not model or not _is_router(self.llm):
            return model, provider
        try:
            return _resolved(model, provider)
        except UnknownModel:
            return model, provider

    def _keywords(self) -> dict[str, Any]:
        request = self.request
        keywords = {**request.options, "model": request.model, "max_retries": 0}
        if _is_router(self.llm):
            keywords["num_retries"] = 0  # whatever the router says of itself: a retry that it makes leaves no row
            if _own_fallbacks(self.llm) is not None:
                keywords["disable_fallbacks"] = True  # nor does a fallback, which the turn makes in its place
        if "thinking" in keywords:
            keywords |= self._thinking(keywords.pop("thinking"))
        keywords["messages"] = _for_provider(request.messages, self.provider)
        if request.provider:
            keywords["custom_llm_provider"] = request.provider
        if request.stream:
            keywords |= {"stream": True, "stream_options": {"include_usage": True}}
        return keywords

    def _thinking(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """The wish in the provider's words: some take an effort, some a number of tokens, some both."""
        if "type" in wanted:
            return {"thinking": dict(wanted)}  # the provider's own shape
        effort, budget = wanted.get("effort"), wanted.get("budget")
        # Gemini takes a level from its third version on, and litellm drops a budget that it is given there.
        takes_budget = "thinking" in self._supported() and not _GEMINI_3.match(self.model)
        if budget is not None and (takes_budget or (effort is None and "reasoning_effort" not in self._supported())):
            budgeted = {"thinking": {"type": "enabled", "budget_tokens": budget}}
            # Anthropic's later models take both, each for its own end; litellm knows which.
            return {**budgeted, "reasoning_effort": effort} if effort and self.provider == "anthropic" else budgeted
        return {"reasoning_effort": effort or _effort_of(budget)}

    def _supported(self) -> Sequence[str]:
        """The keywords that litellm translates for the model."""
        if self.request.llm is not None and not isinstance(self.request.llm, LLM):
            return ("thinking", "reasoning_effort")  # a router, or a model of a test's: it is told as it was said
        return litellm().get_supported_openai_params(self.model, self.provider) or ()

    def _printable(self, error: BaseException) -> str:
        return storable(redacted(text_of(error), self._secrets()))

    def _secrets(self) -> Iterator[str]:
        return secrets_in(self.llm, self.request.options)

    @contextmanager
    def _client(self) -> Generator[dict[str, Any]]:
        client = None
        if self._needs_client():
            from litellm.llms.custom_httpx.http_handler import HTTPHandler

            client = HTTPHandler(timeout=self.request.options["timeout"])
        try:
            yield {} if client is None else {"client": client}
        finally:
            self.stopped = self._clock()
            if client is not None:
                client.close()

    @asynccontextmanager
    async def _async_client(self) -> AsyncGenerator[dict[str, Any]]:
        client = None
        if self._needs_client():
            from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler

            client = AsyncHTTPHandler(timeout=self.request.options["timeout"])
        try:
            yield {} if client is None else {"client": client}
        finally:
            self.stopped = self._clock()
            if client is not None:
                await client.close()

    def _needs_client(self) -> bool:
        """litellm waits for ever for a stream of Gemini's, whatever timeout it is given: its HTTP client is told."""
        is_gemini = self.provider in ("gemini", "vertex_ai")
        return is_gemini and self.request.stream and self.request.options.get("timeout") is not None

    def _nothing_yet(self) -> Received:
        return Received(self.request.taken_call_ids, self.request.options.get("tools") or ())

    @contextmanager
    def _reading(self) -> Generator[None]:
        """Raise `UnreadableReply` for what makes no sense to us."""
        try:
            yield
        except Exception as problem:
            raise self._unreadable(problem) from problem

    def _unreadable(self, problem: Exception) -> UnreadableReply:
        about = f"{type(problem).__name__}: {text_of(problem)}"
        told = UnreadableReply(f"the reply of {self.model!r} cannot be read ({about}); what it cost is on record")
        told.__cause__ = problem
        return told

    def _take(self, response: Any) -> None:
        with self._lock:
            is_late = self._is_over
            if is_late:
                self.received = self._nothing_yet()
            with self._reading():
                self.received.take(response)
        if is_late and self.request.on_late is not None:
            self.request.on_late(self._ended(None))

    def _finish(self, response: Any) -> None:
        with self._lock, self._reading():
            if not self._is_over:
                self.received.finish(response)

    def _chunks_of(self, part: Any) -> list[Chunk]:
        with self._lock:
            try:
                chunks, is_token = ([], False) if self._is_over else self.received.add(part)
            except Exception as problem:
                raise self._unreadable(problem) from problem
        if is_token and self.first_token is None:
            self.first_token = self._clock()
        self.shown = self.shown or bool(chunks)
        return chunks

    def _check_finished(self, response: Any) -> None:
        """Raise where a stream just stopped: litellm makes up a finish reason then, and says nothing."""
        parts = getattr(response, "chunks", None)
        if not parts or self._is_over or self.provider not in ("openai", "anthropic", "azure"):
            return
        if not any(getattr(choice, "finish_reason", None) for part in parts for choice in part.choices):
            self.received.finish_reason = None
            raise litellm().APIConnectionError(
                message="the stream ended before the reply did", llm_provider=self.provider, model=self.model
            )

    def _milliseconds(self, moment: float) -> int:
        return round((moment - self.started) * 1000)

    def _estimated(self, error: BaseException | None) -> Usage:
        """The tokens of a call whose provider did not say, or did not come to say, all of them."""
        if error is not None and not hung_up(error) and not self.received.has_output:
            return self.received.usage or Usage()  # the provider refused, or was not reached
        text, said = self.received.everything_written(), self.received.usage or Usage()
        written = count_tokens(self.llm, self.model, text=text) if text else 0
        messages, tools = self.request.messages, self.request.options.get("tools") or ()
        return replace(
            said,
            input_tokens=said.input_tokens or count_tokens(self.llm, self.model, messages=messages, tools=tools),
            output_tokens=max(said.output_tokens, written),
            estimated=True,
        )

    def _cost(
        self, model: str, provider: str, usage: Usage, error: BaseException | None, status: int
    ) -> Decimal | None:
        if self.received.cost is not None:
            return self.received.cost
        if usage == Usage():
            if error is not None and was_never_sent(error):
                return Decimal(0)
            # An HTTP error is not billed. What became of a call whose connection broke, nobody knows.
            return Decimal(0) if error is not None and status >= 400 and status != 408 else None
        return cost_of(self.llm, model, provider, usage)


_GEMINI_3 = re.compile(r"gemini-([3-9]|\d\d)")


def _effort_of(budget: int | None) -> str:
    """The effort that litellm would make of such a budget, the other way round."""
    return "low" if budget is None or budget <= 1024 else "medium" if budget <= 2048 else "high"


def _for_provider(messages: list[Message], provider: str) -> list[Message]:
    """The messages as they may be sent: OpenAI refuses the fields that others need back; some take no sound."""
    if provider in WITHOUT_SOUND:
        return without_sound(messages)
    if provider not in ("openai", "azure"):
        return messages
    return [
        {name: value for name, value in without_images(message).items() if name not in UNKNOWN_TO_OPENAI}
        if message["role"] == "assistant"
        else message
        for message in messages
    ]


UNKNOWN_TO_OPENAI = ("thinking_blocks", "provider_specific_fields", "images")


def _close(response: Any) -> None:
    close = getattr(_connection_of(response), "close", None)
    if close is not None:
        close()


async def _aclose(response: Any) -> None:
    source = _connection_of(response)
    close = getattr(source, "aclose", None) or getattr(source, "close", None)
    if close is not None:
        closing = close()
        if inspect.isawaitable(closing):
            await closing
    if source is not response and hasattr(response, "aclose"):
        await response.aclose()


def _connection_of(response: Any) -> Any:
    """What must be closed for the provider to see that we hung up: litellm's own stream object does not pass it on."""
    if not hasattr(response, "completion_stream"):
        return response
    source = response.completion_stream
    return getattr(source, "streaming_response", source)

"""ScriptedLLM: a model that says what a test tells it to, in process, with no key, no network and no litellm.

>>> llm = ScriptedLLM("Hello!", Call("get_weather", city="London"), "It rains.")
>>> chat = create_chat(store, model="test", llm=llm)
"""

import asyncio
import base64
import copy
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

__all__ = ["Call", "ProviderError", "Say", "ScriptedLLM"]


class Call:
    """A tool call in a script: Call("get_weather", city="London"), or Call("get_weather", raw='{"city": ').

    call_id    default: "call_1", "call_2", … over the whole script
    raw        the arguments to the letter, where they are not valid JSON, or one of them is named as one of these
    signature  of the thought behind it, as Gemini sends one
    """

    def __init__(
        self,
        name: str,
        /,
        *,
        call_id: str | None = None,
        raw: str | None = None,
        signature: str | None = None,
        **arguments: Any,
    ):
        self.name = name
        self.call_id = call_id
        self.signature = signature
        self.arguments = json.dumps(arguments) if raw is None else raw


class ProviderError(Exception):
    """A provider's error in a script: ProviderError(429, "slow down", retry_after=1.5).

    429, 408 and 5xx are tried again, others are not, as with a real provider. status_code=None: the connection broke,
    which is tried again, too.
    """

    def __new__(cls, status_code: int | None = 500, *args: Any, **kwargs: Any) -> "ProviderError":
        return Exception.__new__(APIConnectionError if status_code is None else cls)

    def __init__(
        self, status_code: int | None = 500, message: str = "the provider failed", retry_after: float | None = None
    ):
        super().__init__(message)
        self.status_code = status_code
        self.retry_after = retry_after


class APIConnectionError(ProviderError):
    """What litellm, too, calls a connection that broke."""


@dataclass(frozen=True)
class Say:
    """One reply in a script.

    text, thinking, signature, calls
                     what the model says: text, thinking with its signature, tool calls
    images           pictures that it makes, each as bytes
    audio            sound that it makes; the text is then what is said in it
    input_tokens, output_tokens
                     default: the number of words that were sent and said
    usage            False: the provider does not say, and llm_orm counts the tokens itself
    cost             US dollars that the provider reports; default: by the price
    chunks           the pieces that a stream comes in; default: word by word
    error            raised after the text (in a stream: after its chunks)
    delay_s          seconds before the reply
    until            an Event to wait for before the reply (in a stream: after the first chunk)
    """

    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    calls: Sequence[Call] = ()
    images: Sequence[bytes] = ()
    audio: bytes | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    thinking_tokens: int = 0
    usage: bool = True
    cost: Decimal | str | None = None
    finish_reason: str | None = None
    chunks: Sequence[str] | None = None
    error: BaseException | None = None
    delay_s: float = 0.0
    until: threading.Event | None = field(default=None, compare=False)


Scripted = str | Say | Call | Sequence[Call] | BaseException | Callable[[dict[str, Any]], Any]


class ScriptedLLM:
    """What a chat takes as `llm=` in a test. Gives the replies of its script, in order.

    script    a string, a `Say`, a `Call` or a list of them (one round of tool calls), an exception to raise, or a
              function of the call's keywords that returns one of these
    provider  what the rows say
    input_cost_per_token, output_cost_per_token
              US dollars; default: the model has no known price, and its requests cost NULL

    requests  the keywords of every call so far, as they were: [{"model": …, "messages": […], …}, …]
    """

    def __init__(
        self,
        *script: Scripted,
        provider: str = "scripted",
        input_cost_per_token: Decimal | str | None = None,
        output_cost_per_token: Decimal | str | None = None,
    ):
        self.script: list[Scripted] = []
        self.provider = provider
        self.requests: list[dict[str, Any]] = []
        self._prices = input_cost_per_token, output_cost_per_token
        self._lock = threading.Lock()
        self._calls = 0
        self.add(*script)

    def __repr__(self) -> str:
        return f"<ScriptedLLM {len(self.script)} replies left>"

    def add(self, *script: Scripted) -> "ScriptedLLM":
        """Append to the script."""
        for scripted in script:
            _check_scripted(scripted)
        self.script += script
        return self

    def completion(self, **keywords: Any) -> Any:
        say = self._next(keywords)
        time.sleep(say.delay_s)
        if keywords.get("stream"):
            return self._stream(say, keywords)
        if say.until is not None:
            say.until.wait()
        return self._whole(say, keywords)

    async def acompletion(self, **keywords: Any) -> Any:
        say = self._next(keywords)
        await asyncio.sleep(say.delay_s)
        if keywords.get("stream"):
            return self._astream(say, keywords)
        if say.until is not None:
            await _event(say.until)
        return self._whole(say, keywords)

    # What llm_orm asks of a model's library besides

    def get_llm_provider(self, model: str, custom_llm_provider: str | None = None) -> tuple[str, str]:
        return model, custom_llm_provider or self.provider

    def token_counter(
        self,
        model: str,
        messages: list[dict[str, Any]] | None = None,
        text: str | None = None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> int:
        if text is not None:
            return _words(text)
        shown = sum(_words(message.get("content")) for message in messages or [])
        return shown + sum(_words(json.dumps(schema)) for schema in tools)

    def cost_per_token(self, *, prompt_tokens: int, completion_tokens: int, **_: Any) -> tuple[Decimal, Decimal]:
        for_input, for_output = self._prices
        if for_input is None or for_output is None:
            raise ValueError("the scripted model has no price")
        return prompt_tokens * Decimal(for_input), completion_tokens * Decimal(for_output)

    # How

    def _next(self, keywords: dict[str, Any]) -> Say:
        with self._lock:
            self.requests.append(copy.deepcopy(keywords))
            if not self.script:
                last = keywords["messages"][-1:]
                raise AssertionError(f"the script has no reply for call {len(self.requests)}, which ends in {last}")
            scripted = self.script.pop(0)
        if callable(scripted):
            scripted = scripted(keywords)
            _check_scripted(scripted)
        if isinstance(scripted, BaseException):
            raise scripted
        if isinstance(scripted, str):
            return Say(scripted)
        if isinstance(scripted, Call):
            return Say(calls=[scripted])
        return scripted if isinstance(scripted, Say) else Say(calls=list(scripted))

    def _whole(self, say: Say, keywords: dict[str, Any]) -> Any:
        if say.error is not None:
            raise say.error
        message = SimpleNamespace(content=say.text, reasoning_content=say.thinking, tool_calls=self._tool_calls(say))
        if say.images:
            message.images = [_image(image) for image in say.images]
        if say.audio is not None:
            message.content, message.audio = None, _audio(say.audio, say.text or "")
        if say.signature:
            message.thinking_blocks = [{"type": "thinking", "thinking": say.thinking, "signature": say.signature}]
        choice = SimpleNamespace(message=message, finish_reason=_finish_reason(say))
        return self._envelope(say, keywords, [choice], usage=True)

    def _parts(self, say: Say, keywords: dict[str, Any]) -> Iterator[Any]:
        def part(finish_reason: str | None = None, **delta: Any) -> Any:
            choice = SimpleNamespace(delta=SimpleNamespace(**delta), finish_reason=finish_reason)
            return self._envelope(say, keywords, [choice], usage=False)

        for piece in _pieces(say.thinking):
            blocks = [{"type": "thinking", "thinking": piece}] if say.signature else None
            yield part(reasoning_content=piece, thinking_blocks=blocks)
        if say.signature:
            yield part(thinking_blocks=[{"type": "thinking", "thinking": "", "signature": say.signature}])
        for piece in say.chunks if say.chunks is not None else _pieces(say.text):
            yield part(content=piece) if say.audio is None else part(audio=_audio(b"", piece))
        for start in range(0, len(say.audio or b""), 1024):
            yield part(audio=_audio((say.audio or b"")[start : start + 1024], ""))
        for image in say.images:
            yield part(images=[_image(image)])
        for index, call in enumerate(self._tool_calls(say) or ()):
            arguments, call.index, call.function.arguments = call.function.arguments, index, ""
            yield part(tool_calls=[call])
            for piece in (arguments[: len(arguments) // 2], arguments[len(arguments) // 2 :]):
                rest = SimpleNamespace(index=index, id=None, function=SimpleNamespace(name=None, arguments=piece))
                yield part(tool_calls=[rest])
        if say.error is not None:
            raise say.error
        yield part(finish_reason=_finish_reason(say))
        yield self._envelope(say, keywords, [], usage=True)

    def _stream(self, say: Say, keywords: dict[str, Any]) -> Iterator[Any]:
        for number, part in enumerate(self._parts(say, keywords)):
            if number == 1 and say.until is not None:
                say.until.wait()
            yield part

    async def _astream(self, say: Say, keywords: dict[str, Any]) -> AsyncIterator[Any]:
        for number, part in enumerate(self._parts(say, keywords)):
            if number == 1 and say.until is not None:
                await _event(say.until)
            yield part

    def _tool_calls(self, say: Say) -> list[Any] | None:
        calls = []
        for call in say.calls:
            self._calls += 1
            function = SimpleNamespace(name=call.name, arguments=call.arguments)
            made = SimpleNamespace(
                id=f"call_{self._calls}" if call.call_id is None else call.call_id, function=function
            )
            if call.signature:
                made.provider_specific_fields = {"thought_signature": call.signature}
            calls.append(made)
        return calls or None

    def _envelope(self, say: Say, keywords: dict[str, Any], choices: list[Any], *, usage: bool) -> Any:
        envelope = SimpleNamespace(id=f"scripted-{len(self.requests)}", model=keywords["model"], choices=choices)
        if usage and say.usage:
            envelope.usage = self._usage(say, keywords)
        return envelope

    def _usage(self, say: Say, keywords: dict[str, Any]) -> Any:
        counted = self.token_counter(keywords["model"], messages=keywords["messages"])
        written = " ".join([say.text or "", *(call.arguments for call in say.calls)])
        return SimpleNamespace(
            prompt_tokens=counted if say.input_tokens is None else say.input_tokens,
            completion_tokens=_words(written) if say.output_tokens is None else say.output_tokens,
            prompt_tokens_details=SimpleNamespace(
                cached_tokens=say.cached_tokens, cache_creation_tokens=say.cache_write_tokens
            ),
            completion_tokens_details=SimpleNamespace(reasoning_tokens=say.thinking_tokens),
            cost=say.cost,
        )


def _check_scripted(scripted: Any) -> None:
    rounds = scripted if isinstance(scripted, list | tuple) else ()
    is_round = bool(rounds) and all(isinstance(call, Call) for call in rounds)
    if not (is_round or isinstance(scripted, str | Say | Call | BaseException) or callable(scripted)):
        raise TypeError(
            f"a script takes strings, Say, Call, lists of Call, exceptions and functions that return one of these, "
            f"not {scripted!r}"
        )


def _finish_reason(say: Say) -> str:
    return say.finish_reason or ("tool_calls" if say.calls else "stop")


def _pieces(text: str | None) -> list[str]:
    return re.findall(r"\s*\S+\s*|^\s+$", text) if text else []


def _image(content: bytes) -> dict[str, Any]:
    encoded = base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def _audio(content: bytes, transcript: str) -> Any:
    return SimpleNamespace(id="audio_1", data=base64.b64encode(content).decode(), transcript=transcript)


def _words(content: Any) -> int:
    if isinstance(content, list):
        return sum(_words(part.get("text")) for part in content)
    return len(content.split()) if isinstance(content, str) else 0


async def _event(event: threading.Event) -> None:
    while not event.is_set():  # a thread that waits for it could not be cancelled
        await asyncio.sleep(0.005)

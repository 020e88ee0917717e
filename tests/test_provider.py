"""The scripted provider says over HTTP what the real litellm understands."""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from provider import Answer, Call, Provider

FORMATS = ("openai", "anthropic", "gemini")
QUESTION = [{"role": "user", "content": "What is the weather in London?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
WEATHER = Call("get_weather", {"city": "London"})
COUNTED = Answer("Rain", input_tokens=100, output_tokens=50, cached_tokens=30, cache_write_tokens=20, thinking_tokens=7)

Ask = Callable[..., Any]


def ask_plain(**kwargs: Any) -> Any:
    return litellm.completion(**kwargs)


def ask_plain_async(**kwargs: Any) -> Any:
    return asyncio.run(litellm.acompletion(**kwargs))


def ask_stream(**kwargs: Any) -> Any:
    chunks = list(litellm.completion(**kwargs, stream=True, stream_options={"include_usage": True}))
    return litellm.stream_chunk_builder(chunks)


def ask_stream_async(**kwargs: Any) -> Any:
    async def read() -> list[Any]:
        stream = await litellm.acompletion(**kwargs, stream=True, stream_options={"include_usage": True})
        return [chunk async for chunk in stream]

    return litellm.stream_chunk_builder(asyncio.run(read()))


WAYS: tuple[Ask, ...] = (ask_plain, ask_plain_async, ask_stream, ask_stream_async)


@pytest.fixture(scope="module", autouse=True)
def names_of_litellms(real_litellm) -> None:
    """Imported by who runs these tests, and not by all who collect them."""
    global litellm, MidStreamFallbackError
    import litellm
    from litellm.exceptions import MidStreamFallbackError


@pytest.fixture(params=FORMATS)
def wire(request, provider) -> dict[str, Any]:
    """What one format needs to be asked a question, once."""
    return {**getattr(provider, request.param)(), "messages": QUESTION, "max_retries": 0}


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def ask(request) -> Ask:
    return request.param


@pytest.fixture(params=(ask_stream, ask_stream_async), ids=lambda way: way.__name__)
def ask_streaming(request) -> Ask:
    return request.param


def test_text_arrives_whole(provider, wire, ask):
    provider.reply(Answer("Rain, and 5 °C", chunks=4))
    reply = ask(**wire)
    assert reply.choices[0].message.content == "Rain, and 5 °C"
    assert reply.choices[0].finish_reason == "stop"


def test_replies_come_in_the_order_they_were_scripted(provider, wire):
    provider.reply("one", "two")
    provider.otherwise = Answer("many")
    assert [ask_plain(**wire).choices[0].message.content for _ in range(4)] == ["one", "two", "many", "many"]


def test_a_request_nobody_scripted_is_refused(provider, wire):
    with pytest.raises(litellm.BadRequestError, match="scripted no reply"):
        ask_plain(**wire)


@pytest.mark.parametrize(("finish", "expected"), [("length", "length"), ("content_filter", "content_filter")])
def test_the_reason_for_the_end_is_told(provider, wire, ask, finish, expected):
    provider.reply(Answer("Rain", finish=finish))
    assert ask(**wire).choices[0].finish_reason == expected


def test_tool_calls_keep_name_arguments_and_order(provider, wire, ask):
    provider.reply(Answer("Let me look", tool_calls=[WEATHER, Call("get_weather", {"city": "Paris"}, id="call_2")]))
    reply = ask(**wire, tools=TOOLS)
    calls = reply.choices[0].message.tool_calls
    assert [(call.id, call.function.name) for call in calls] == [("call_1", "get_weather"), ("call_2", "get_weather")]
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "London"}, {"city": "Paris"}]
    assert reply.choices[0].finish_reason == "tool_calls"
    assert reply.choices[0].message.content == "Let me look"


def test_a_tool_call_without_arguments_parses(provider, wire, ask):
    provider.reply(Answer(tool_calls=[Call("get_weather", {})]))
    (call,) = ask(**wire, tools=TOOLS).choices[0].message.tool_calls
    assert json.loads(call.function.arguments or "{}") == {}


def test_thinking_arrives_beside_the_text(provider, wire, ask):
    provider.reply(Answer("Rain", thinking="It is London, so"))
    message = ask(**wire).choices[0].message
    assert (message.reasoning_content, message.content) == ("It is London, so", "Rain")


@pytest.mark.parametrize("ask", WAYS, ids=lambda way: way.__name__)
def test_anthropic_gets_its_signed_thinking_back_verbatim(provider, ask):
    provider.reply(
        Answer("Let me look", thinking="hmm", signature="c2ln", redacted_thinking="cmVk", tool_calls=[WEATHER]), "Rain"
    )
    wire = {**provider.anthropic(), "tools": TOOLS, "max_retries": 0}
    replay_tool_round(ask, wire)
    assert provider.requests[1].body["messages"][1]["content"] == [
        {"type": "thinking", "thinking": "hmm", "signature": "c2ln"},
        {"type": "redacted_thinking", "data": "cmVk"},
        {"type": "text", "text": "Let me look"},
        {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": "London"}},
    ]


@pytest.mark.parametrize("ask", WAYS, ids=lambda way: way.__name__)
def test_gemini_gets_its_thought_signature_back_verbatim(provider, ask):
    provider.reply(Answer(thinking="hmm", signature="c2ln", tool_calls=[WEATHER]), "Rain")
    replay_tool_round(ask, {**provider.gemini(), "tools": TOOLS, "max_retries": 0})
    call = {"name": "get_weather", "args": {"city": "London"}}
    assert {"function_call": call, "thoughtSignature": "c2ln"} in provider.requests[1].body["contents"][1]["parts"]


def replay_tool_round(ask: Ask, wire: dict[str, Any]) -> None:
    message = ask(**wire, messages=QUESTION).choices[0].message.model_dump(exclude_none=True)
    call_id = message["tool_calls"][0]["id"]
    result = {"role": "tool", "tool_call_id": call_id, "name": "get_weather", "content": "Rain"}
    ask_plain(**wire, messages=[*QUESTION, message, result])


def test_every_format_counts_the_whole_prompt_and_its_cached_part(provider, wire, ask):
    provider.reply(COUNTED)
    usage = ask(**wire).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (100, 50)
    assert usage.prompt_tokens_details.cached_tokens == 30


@pytest.mark.parametrize("ask", WAYS, ids=lambda way: way.__name__)
def test_anthropic_counts_cache_writes(provider, ask):
    provider.reply(COUNTED)
    usage = ask(**provider.anthropic(), messages=QUESTION, max_retries=0).usage
    assert usage.prompt_tokens_details.cache_creation_tokens == 20


@pytest.mark.parametrize("format", ["openai", "gemini"])
def test_thinking_tokens_are_counted_where_the_format_has_them(provider, format, ask):
    provider.reply(COUNTED)
    usage = ask(**getattr(provider, format)(), messages=QUESTION, max_retries=0).usage
    assert usage.completion_tokens_details.reasoning_tokens == 7


@pytest.mark.parametrize(("sent", "seen"), [(True, True), (False, False)])
def test_a_provider_can_keep_its_token_counts_to_itself(provider, sent, seen):
    provider.reply(Answer("Rain", usage=sent))
    stream = litellm.completion(
        **provider.openai(), messages=QUESTION, max_retries=0, stream=True, stream_options={"include_usage": True}
    )
    last = list(stream)[-1]
    assert last.usage is not None, "litellm counts for itself when the provider does not"
    assert any(getattr(chunk, "usage", None) for chunk in stream.chunks) is seen


def test_a_rate_limit_says_when_to_come_back(provider, wire, ask):
    provider.fail(429, "slow down", retry_after=0.01)
    with pytest.raises(litellm.RateLimitError, match="slow down") as caught:
        try:
            ask(**wire)
        except MidStreamFallbackError as error:
            raise error.original_exception from error
    assert caught.value.litellm_response_headers["retry-after"] == "0.01"
    assert len(provider.requests) == 1
    assert provider.billed()["input_tokens"] == 0
    assert provider.ledger[0].status == 429


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("byte", [0, 40])
def test_a_connection_lost_at_a_byte_is_an_error(provider, wire, ask, byte, reset):
    provider.fail_at("Rain all day", byte=byte, reset=reset)
    with pytest.raises((litellm.InternalServerError, litellm.APIConnectionError, MidStreamFallbackError)):
        ask(**wire)
    assert (provider.ledger[0].status, provider.ledger[0].complete) == (200, False)
    assert provider.billed()["output_tokens"] == 5


def test_a_connection_lost_between_events_keeps_what_came_before(provider, wire):
    provider.fail_at(Answer("Rain all day", chunks=12), chunk=8)
    text = ""
    with pytest.raises(MidStreamFallbackError):
        for chunk in litellm.completion(**wire, stream=True):
            text += chunk.choices[0].delta.content or ""
    assert "Rain all day".startswith(text)
    assert 0 < len(text) < len("Rain all day")
    assert provider.ledger[0].events_sent == 8


def test_a_request_can_be_dropped_without_a_word(provider, wire, ask):
    provider.drop()
    with pytest.raises((litellm.InternalServerError, litellm.APIConnectionError, MidStreamFallbackError)):
        ask(**wire)
    assert (provider.ledger[0].status, provider.billed()["input_tokens"]) == (None, 0)


def test_the_providers_own_error_in_mid_stream_is_an_error(provider, wire, ask_streaming):
    provider.stream_error(Answer("Rain all day", chunks=6), chunk=4, status=503, message="overloaded")
    with pytest.raises(MidStreamFallbackError, match="overloaded"):
        ask_streaming(**wire)
    assert provider.ledger[0].complete


def test_broken_json_in_mid_stream_reaches_the_reader(provider, ask_streaming):
    """With OpenAI's format only: in the two others litellm takes it for the end of the stream."""
    provider.broken_sse(Answer("Rain all day", chunks=6), chunk=4)
    with pytest.raises(MidStreamFallbackError):
        ask_streaming(**provider.openai(), messages=QUESTION, max_retries=0)


@pytest.mark.parametrize("format", ["openai", "anthropic"])
def test_a_stream_that_ends_early_in_good_order_shows_no_reason_for_its_end(provider, format):
    provider.end_early(Answer("Rain all day", chunks=6), chunk=5)
    stream = litellm.completion(**getattr(provider, format)(), messages=QUESTION, max_retries=0, stream=True)
    with suppress(MidStreamFallbackError):  # of a newer litellm; an older one makes a reason up
        assert list(stream)[-1].choices[0].finish_reason == "stop"
    assert not any(choice.finish_reason for chunk in stream.chunks for choice in chunk.choices)


def test_a_reply_hangs_until_it_is_released(provider, wire):
    async def ask_and_release() -> Any:
        asking = asyncio.create_task(litellm.acompletion(**wire))
        await asyncio.to_thread(provider.wait_until, lambda: len(provider.requests) == 1)
        assert not asking.done()
        provider.release()
        return await asking

    provider.hang("at last")
    assert asyncio.run(ask_and_release()).choices[0].message.content == "at last"


def test_a_cancelled_request_is_seen_to_hang_up(provider, wire):
    async def ask_and_cancel() -> None:
        asking = asyncio.create_task(litellm.acompletion(**wire))
        await asyncio.to_thread(provider.wait_until, lambda: len(provider.requests) == 1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.to_thread(provider.wait_until, lambda: provider.ledger[0].disconnected)

    provider.hang()
    asyncio.run(ask_and_cancel())
    assert provider.billed()["output_tokens"] == 0


def test_a_stream_hangs_where_the_test_wants_it(provider, wire):
    provider.hang(Answer("Rain all day", chunks=6), chunk=5)
    stream = litellm.completion(**wire, stream=True)
    first = next(stream).choices[0].delta.content or ""
    provider.wait_until(lambda: provider.ledger[0].events_sent == 5)
    assert not provider.ledger[0].complete
    provider.release()
    assert first + "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Rain all day"


def test_a_hanging_provider_shuts_down():
    with Provider() as provider:
        provider.hang()
        with pytest.raises(litellm.Timeout):
            ask_plain(**provider.openai(), messages=QUESTION, max_retries=0, timeout=0.05)


def test_the_ledger_adds_up_what_was_billed(provider):
    provider.reply(COUNTED, COUNTED, COUNTED)
    provider.fail(500)
    for format in FORMATS:
        ask_plain(**getattr(provider, format)(), messages=QUESTION, max_retries=0)
    with pytest.raises(litellm.InternalServerError):
        ask_plain(**provider.openai(), messages=QUESTION, max_retries=0)
    assert provider.billed() == {
        "requests": 4,
        "input_tokens": 300,
        "output_tokens": 150,
        "cached_tokens": 90,
        "cache_write_tokens": 60,
        "thinking_tokens": 21,
    }
    assert [(bill.format, bill.status, bill.complete) for bill in provider.ledger] == [
        ("openai", 200, True),
        ("anthropic", 200, True),
        ("gemini", 200, True),
        ("openai", 500, True),
    ]


def test_requests_are_kept_as_they_arrived(provider):
    provider.otherwise = Answer("ok")
    for format in FORMATS:
        ask_plain(**getattr(provider, format)(), messages=QUESTION, max_retries=0)
    assert [request.path for request in provider.requests] == [
        "/v1/chat/completions",
        "/v1/messages",
        "/v1beta/models/gemini-2.5-flash:generateContent",
    ]
    assert provider.requests[0].headers["authorization"] == "Bearer test-key"
    assert provider.requests[0].body["messages"] == QUESTION
    assert provider.requests[1].model == "claude-sonnet-4-5"


def test_a_kept_alive_connection_serves_the_next_request():
    with Provider(keep_alive=True) as provider:
        provider.reply("one", "two")
        wire = {**provider.openai(), "messages": QUESTION, "max_retries": 0}
        assert [ask_plain(**wire).choices[0].message.content for _ in range(2)] == ["one", "two"]

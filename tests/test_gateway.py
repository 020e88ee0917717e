"""Turns through the real litellm, over HTTP, in the wire formats of OpenAI, Anthropic and Gemini."""

import asyncio
import itertools
import json
import warnings
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from conftest import WAYS, Ask, rows
from provider import Answer, Call, Provider

from llm_orm import (
    LLM,
    Chat,
    InvalidValue,
    Retries,
    Store,
    UnknownModel,
    connect,
    create_chat,
    load_chat,
    register_price,
    tool,
)
from llm_orm.testing import Call as ScriptedCall
from llm_orm.testing import ProviderError, Say, ScriptedLLM
from llm_orm.values import ModelRequest

pytestmark = pytest.mark.usefixtures("real_litellm")

FORMATS = ("openai", "anthropic", "gemini")
STREAMED = ("ask_stream", "aask_stream")
AT_ONCE = Retries(attempts=2, first_wait_s=0)

WEATHER = Call("get_weather", {"city": "London"}, id="call_1", signature="c2lnbmVkIGNhbGw=")
THINKS_AND_CALLS = Answer(
    "Let me look.",
    thinking="The user wants the weather.",
    signature="c2lnbmF0dXJl",
    tool_calls=[WEATHER],
    input_tokens=120,
    output_tokens=40,
    cached_tokens=20,
    thinking_tokens=7,
    request_id="req_first",
)
ANSWERS = Answer("It is cold.", input_tokens=180, output_tokens=12, request_id="req_second")


@tool
def get_weather(city: str) -> dict:
    """Current weather in a city."""
    return {"city": city, "celsius": 3}


def look(where: str) -> str:
    """Look somewhere."""
    return f"looked at {len(where)} characters"


@pytest.fixture(params=FORMATS)
def wire(request: pytest.FixtureRequest) -> str:
    return request.param


def chat_on(store: Store, provider: Provider, wire: str, **options: Any) -> Chat:
    settings = getattr(provider, wire)()
    model = settings.pop("model")
    return create_chat(store, **{"model": model, "llm": LLM(**settings), "retries": AT_ONCE, **options})


def thinking_of(wire: str) -> dict[str, Any]:
    return {} if wire == "openai" else {"thinking": {"budget": 2000}}


def test_a_tool_round_leaves_rows_with_the_providers_figures(store: Store, provider: Provider, wire: str, ask: Ask):
    chat = chat_on(store, provider, wire, tools=[get_weather], **thinking_of(wire))
    provider.reply(THINKS_AND_CALLS, ANSWERS)

    reply = ask(chat, "How is the weather in London?")

    assert (reply.content, reply.input_tokens, reply.output_tokens, reply.cached_tokens) == ("It is cold.", 300, 52, 20)
    columns = ("provider", "round", "status_code", "finish_reason", "input_tokens", "output_tokens", "cached_tokens")
    assert rows(store, "request", *columns, "usage_estimated", "provider_request_id") == [
        (wire, 0, 200, "tool_calls", 120, 40, 20, False, "req_first"),
        (wire, 1, 200, "stop", 180, 12, 0, False, "req_second"),
    ]
    assert rows(store, "tool_call", "name", "arguments", "status", "result") == [
        ("get_weather", '{"city": "London"}', "completed", '{"city":"London","celsius":3}')
    ]


def test_the_four_ways_of_asking_leave_the_same_messages(sqlite_store: Store, provider: Provider, wire: str):
    dumps = []
    for ask in WAYS.values():
        chat = chat_on(sqlite_store, provider, wire, tools=[get_weather], **thinking_of(wire))
        provider.reply(THINKS_AND_CALLS, ANSWERS)
        reply = ask(chat, "How is the weather in London?")
        stored = chat.messages()[-1]
        assert stored.content_raw == reply.content_raw
        names = ("content", "content_raw", "thinking_text", "thinking_signature", "input_tokens", "output_tokens")
        requests = [(row.input_tokens, row.output_tokens, row.thinking_tokens, row.cost) for row in chat.requests()]
        dumps.append(([getattr(stored, name) for name in names], requests))

    assert all(dump == dumps[0] for dump in dumps)


EXPECTED_REPLAY: dict[str, Callable[[Any], Any]] = {
    "openai": lambda body: body["messages"][1:4],
    "anthropic": lambda body: body["messages"][1:3],
    "gemini": lambda body: body["contents"][1:3],
}


def test_a_tool_round_with_thinking_is_replayed_verbatim(sqlite_store: Store, provider: Provider, wire: str, ask: Ask):
    chat = chat_on(sqlite_store, provider, wire, tools=[get_weather], **thinking_of(wire))
    provider.reply(THINKS_AND_CALLS, ANSWERS, "Bye.")
    ask(chat, "How is the weather in London?")
    settings = getattr(provider, wire)()
    settings.pop("model")
    reloaded = load_chat(sqlite_store, chat.id, llm=LLM(**settings), tools=[get_weather], **thinking_of(wire))
    assert reloaded is not None

    ask(reloaded, "Thanks.")

    in_the_round, on_the_next_turn = (EXPECTED_REPLAY[wire](request.body) for request in provider.requests[1:3])
    assert on_the_next_turn[: len(in_the_round)] == in_the_round
    sent = str(on_the_next_turn)
    assert "London" in sent
    assert "celsius" in sent
    if wire == "anthropic":
        assert on_the_next_turn[0]["content"] == [
            {"type": "thinking", "thinking": "The user wants the weather.", "signature": "c2lnbmF0dXJl"},
            {"type": "text", "text": "Let me look."},
            {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": "London"}},
        ]
    if wire == "gemini":
        assert on_the_next_turn[0]["parts"][-1]["thoughtSignature"] == "c2lnbmVkIGNhbGw="


def test_redacted_thinking_goes_back_to_anthropic_as_it_came(store: Store, provider: Provider, ask: Ask):
    chat = chat_on(store, provider, "anthropic", thinking={"budget": 2000})
    provider.reply(Answer("Hm.", thinking="open", signature="c2ln", redacted_thinking="c2VjcmV0"), "Bye.")

    ask(chat, "Think.")
    ask(chat, "Thanks.")

    assert provider.requests[1].body["messages"][1]["content"] == [
        {"type": "thinking", "thinking": "open", "signature": "c2ln"},
        {"type": "redacted_thinking", "data": "c2VjcmV0"},
        {"type": "text", "text": "Hm."},
    ]


def test_streamed_thinking_is_stored_whole(store: Store, provider: Provider):
    chat = chat_on(store, provider, "anthropic", thinking={"budget": 2000})
    provider.reply(Answer("Done.", thinking="AAA BBB CCC", signature="c2ln", chunks=3))

    chunks = list(chat.ask_stream("Think."))

    message = chat.messages()[-1]
    assert (message.thinking_text, message.thinking_signature) == ("AAA BBB CCC", "c2ln")
    assert "".join(chunk.thinking for chunk in chunks) == "AAA BBB CCC"
    assert "".join(chunk.content for chunk in chunks) == "Done."


def test_another_providers_thinking_is_not_shown_to_a_model(store: Store, provider: Provider):
    chat = chat_on(store, provider, "anthropic", thinking={"budget": 2000}, tools=[get_weather])
    provider.reply(THINKS_AND_CALLS, ANSWERS, "Bye.")
    chat.ask("How is the weather?")
    settings = provider.openai()

    chat.ask("Thanks.", model=settings.pop("model"), llm=LLM(**settings), thinking=None)

    body = str(provider.requests[2].body)
    assert "thinking" not in body
    assert "c2lnbmF0dXJl" not in body
    assert "call_1" in body


def test_instructions_tools_and_settings_reach_the_provider(store: Store, provider: Provider, ask: Ask):
    chat = chat_on(
        store,
        provider,
        "openai",
        instructions="Be a pirate.",
        tools=[get_weather],
        temperature=0.5,
        max_tokens=99,
        headers={"X-Team": "blue"},
        params={"seed": 7},
    )
    provider.reply(Answer(tool_calls=[WEATHER]), "Arr.")

    ask(chat, "Hi.")

    for request in provider.requests:
        assert request.body["messages"][0] == {"role": "system", "content": "Be a pirate."}
        assert [request.body[name] for name in ("temperature", "max_tokens", "seed")] == [0.5, 99, 7]
        assert request.body["tools"][0]["function"]["name"] == "get_weather"
        assert request.headers["x-team"] == "blue"


# What a call costs


def test_cost_counts_cached_and_cache_write_tokens_and_is_never_negative(store: Store, provider: Provider, ask: Ask):
    chat = chat_on(store, provider, "anthropic")
    provider.reply(Answer("Hi.", input_tokens=5100, output_tokens=10, cached_tokens=4000, cache_write_tokens=1000))

    ask(chat, "Hi.")

    (row,) = chat.requests()
    assert (row.input_tokens, row.cached_tokens, row.cache_write_tokens) == (5100, 4000, 1000)
    # claude-sonnet-4-5: $3, $0.30 and $3.75 a million of input, $15 of output
    assert row.cost == Decimal("0.0003") + Decimal("0.0012") + Decimal("0.00375") + Decimal("0.00015")


@pytest.mark.parametrize(("wire", "model"), [("openai", "openai/gpt-unheard-of"), ("anthropic", "anthropic/claude-99")])
def test_the_cost_of_an_unknown_model_is_null_and_not_zero(store: Store, provider: Provider, wire: str, model: str):
    chat = chat_on(store, provider, wire, model=model)
    provider.reply("Hi.")

    chat.ask("Hi.")

    assert chat.requests()[0].cost is None
    assert (chat.stats().cost, chat.stats().unpriced_requests) == (0, 1)


def test_a_registered_price_is_exact_and_goes_before_the_price_map(store: Store, provider: Provider, ask: Ask):
    register_price("openai/our-model", input_per_million="0.15", output_per_million="0.60", cached_per_million="0.015")
    chat = chat_on(store, provider, "openai", model="openai/our-model")
    provider.reply(Answer("Hi.", input_tokens=1001, output_tokens=3, cached_tokens=1000))

    ask(chat, "Hi.")

    assert chat.requests()[0].cost == Decimal("0.00000015") + Decimal("0.000015") + Decimal("0.0000018")
    assert chat.stats().cost == Decimal("0.00001695")


@pytest.mark.parametrize("wrong", ["", "a lot", None])
def test_a_price_is_a_number(wrong: Any):
    with pytest.raises(ValueError, match="a price is US dollars per million tokens"):
        register_price("m", input_per_million=wrong, output_per_million="1")


def test_a_provider_that_is_misspelt_is_named_rightly(store: Store):
    with pytest.raises(UnknownModel, match=r"litellm knows no provider 'opnai'; .*; did you mean 'openai'\?"):
        create_chat(store, model="gpt-4o", provider="opnai").ask("Hello?")


def test_a_price_must_be_exact():
    with pytest.raises(ValueError, match="not a float"):
        register_price("m", input_per_million=0.15, output_per_million="1")  # type: ignore[arg-type]


def test_tokens_are_counted_here_where_a_stream_brings_none(store: Store, provider: Provider):
    chat = chat_on(store, provider, "openai")
    provider.reply(Answer("one two three four", usage=False))

    list(chat.ask_stream("Count."))

    (row,) = chat.requests()
    assert row.usage_estimated
    assert row.input_tokens > 0
    assert row.output_tokens >= 4
    assert row.cost is not None
    assert row.cost > 0


def test_tokens_are_counted_here_where_a_reply_brings_none(store: Store, provider: Provider):
    chat = chat_on(store, provider, "openai")
    provider.reply(Answer("one two three four", usage=False))

    chat.ask("Count.")

    (row,) = chat.requests()
    assert (row.usage_estimated, row.input_tokens > 0, row.output_tokens >= 4) == (True, True, True)


# What goes wrong


def test_a_call_that_may_pass_is_tried_again_and_each_attempt_is_a_row(
    sqlite_store: Store, provider: Provider, wire: str, ask: Ask
):
    chat = chat_on(sqlite_store, provider, wire, retries=Retries(attempts=3, first_wait_s=0))
    for status in (429, 500, 503):
        provider.fail(status, "come back later")
    provider.reply("Here I am.")

    assert ask(chat, "Hello?").content == "Here I am."

    assert rows(sqlite_store, "request", "attempt", "status_code", "cost") == [
        (1, 429, Decimal(0)),
        (2, 500, Decimal(0)),
        (3, 503, Decimal(0)),
        (4, 200, chat.requests()[-1].cost),
    ]
    assert all("come back later" in row.error_message for row in chat.requests()[:3])
    assert len(provider.ledger) == 4


def test_a_call_that_cannot_pass_is_made_once_and_raises_litellms_own_error(
    sqlite_store: Store, provider: Provider, wire: str, ask: Ask
):
    import litellm

    chat = chat_on(sqlite_store, provider, wire)
    final = [(400, "BadRequestError"), (401, "AuthenticationError"), (404, "NotFoundError")]
    for status, error in final:
        provider.fail(status, "no")
        with pytest.raises(getattr(litellm, error)):
            ask(chat, "Hello?")

    assert len(provider.ledger) == 3
    assert rows(sqlite_store, "request", "status_code", "error") == final
    assert rows(sqlite_store, "message", "role", "content") == [("user", "Hello?")] * 3


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited for, without waiting."""
    waited: list[float] = []

    async def asleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("llm_orm.aside.Interrupt.sleep", lambda self, seconds: waited.append(seconds))
    monkeypatch.setattr("llm_orm.play.asyncio.sleep", asleep)
    return waited


@pytest.mark.parametrize("way", ["ask", "ask_stream"])
def test_retry_after_is_honoured(sqlite_store: Store, provider: Provider, wire: str, way: str, waits: list[float]):
    chat = chat_on(sqlite_store, provider, wire, retries=Retries(attempts=2, first_wait_s=0.5))
    provider.fail(429, retry_after=7)
    provider.fail(500)
    provider.reply("Hi.")

    WAYS[way](chat, "Hello?")

    assert waits == [7.0, 1.0]


def test_a_provider_that_asks_for_too_long_a_wait_is_not_waited_for(
    store: Store, provider: Provider, waits: list[float]
):
    import litellm

    chat = chat_on(store, provider, "openai", retries=Retries(attempts=2, longest_wait_s=60))
    provider.fail(429, retry_after=3600)

    with pytest.raises(litellm.RateLimitError):
        chat.ask("Hello?")

    assert (waits, len(provider.ledger)) == ([], 1)


def test_a_lost_connection_is_tried_again_and_its_cost_is_unknown(
    sqlite_store: Store, provider: Provider, wire: str, ask: Ask
):
    chat = chat_on(sqlite_store, provider, wire)
    provider.drop()
    provider.reply("Hi.")

    assert ask(chat, "Hello?").content == "Hi."

    assert rows(sqlite_store, "request", "attempt", "status_code", "cost")[0] == (1, 0, None)
    assert chat.stats().unpriced_requests == 1


@pytest.mark.parametrize("way", STREAMED)
def test_a_stream_is_not_tried_again_once_something_was_shown(store: Store, provider: Provider, wire: str, way: str):
    import litellm

    chat = chat_on(store, provider, wire, on_error="keep")
    provider.fail_at(Answer("one two three four five six", chunks=6), chunk=5)

    with pytest.raises(litellm.APIConnectionError):
        WAYS[way](chat, "Count.")

    (row,) = chat.requests()
    assert (row.status_code, row.error, row.usage_estimated) == (0, "APIConnectionError", True)
    assert row.output_tokens > 0
    assert row.cost is not None
    kept = chat.messages()[-1]
    assert kept.status == "failed"
    assert kept.content
    assert "one two three four five six".startswith(kept.content)
    assert len(provider.ledger) == 1


@pytest.mark.parametrize("way", STREAMED)
@pytest.mark.parametrize("wire", ["openai", "anthropic"])
def test_a_stream_that_just_stops_is_not_taken_for_a_whole_reply(store: Store, provider: Provider, wire: str, way: str):
    import litellm

    chat = chat_on(store, provider, wire)
    provider.end_early(Answer("one two three four five six", chunks=6), chunk=5)

    with pytest.raises(litellm.APIConnectionError, match="ended before"):
        WAYS[way](chat, "Count.")

    assert rows(store, "message", "role") == [("user",)]
    assert chat.requests()[0].error == "APIConnectionError"


def test_a_timeout_ends_a_call_that_hangs(sqlite_store: Store, provider: Provider, wire: str, ask: Ask):
    import litellm

    chat = chat_on(sqlite_store, provider, wire, request_timeout=0.1, retries=0)
    provider.hang()

    with pytest.raises((litellm.Timeout, litellm.APIConnectionError)):
        ask(chat, "Hello?")

    (row,) = chat.requests()
    assert row.error in ("Timeout", "APIConnectionError")
    assert row.cost is None
    assert rows(sqlite_store, "message", "role") == [("user",)]


def test_leaving_a_stream_hangs_up_on_the_provider_and_records_what_was_spent(
    store: Store, provider: Provider, wire: str
):
    chat = chat_on(store, provider, wire)
    provider.hang(Answer("one two three four", chunks=4, input_tokens=30), chunk=4)

    with chat.ask_stream("Count.") as stream:
        next(stream)

    provider.wait_until(lambda: provider.ledger[0].disconnected)
    (row,) = chat.requests()
    assert (row.status_code, row.error, row.usage_estimated) == (499, "GeneratorExit", True)
    assert row.output_tokens > 0
    assert row.cost is not None
    assert rows(store, "message", "role") == [("user",)]


def test_cancelling_a_task_hangs_up_on_the_provider_and_records_what_was_spent(
    store: Store, provider: Provider, wire: str
):
    chat = chat_on(store, provider, wire)
    provider.hang(Answer("one two three four", chunks=4), chunk=4)
    provider.hang()

    async def run() -> None:
        shown = asyncio.Event()

        async def read() -> None:
            async for _ in chat.aask_stream("Count."):
                shown.set()

        streaming = asyncio.create_task(read())
        await shown.wait()
        streaming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await streaming
        asking = asyncio.create_task(chat.aask("Hello?"))
        await asyncio.to_thread(provider.wait_until, lambda: len(provider.requests) == 2)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(run())

    provider.wait_until(lambda: all(bill.disconnected for bill in provider.ledger))
    assert rows(store, "request", "status_code", "error") == [(499, "CancelledError")] * 2
    assert rows(store, "message", "role") == [("user",)] * 2


def test_the_providers_ledger_equals_the_sum_of_our_rows(sqlite_store: Store, provider: Provider, wire: str):
    """Mixed: successes, retries, tool rounds, failures; streamed and not, from threads and from asyncio."""
    counts = itertools.count(1)

    def answer(**more: Any) -> Answer:
        number = next(counts)
        figures = {"input_tokens": 100 + number, "output_tokens": 10 + number, "cached_tokens": number}
        return Answer(f"Reply {number}.", **figures, **more)

    for ask in WAYS.values():
        chat = chat_on(sqlite_store, provider, wire, tools=[get_weather])
        provider.reply(answer())
        ask(chat, "A plain turn.")
        provider.fail(429)
        provider.reply(answer())
        ask(chat, "A retried turn.")
        provider.reply(answer(tool_calls=[WEATHER]), answer(tool_calls=[WEATHER]), answer())
        ask(chat, "A turn with two rounds of tools.")
        provider.reply(answer(tool_calls=[WEATHER]))
        provider.fail(400)
        with pytest.raises(Exception, match="it failed"):
            ask(chat, "A turn that fails after a round that was paid.")
        provider.drop(times=3)
        with pytest.raises(Exception, match=r".") as lost:
            ask(chat, "A turn that never arrives.")
        assert lost.type.__module__.startswith("litellm")

    ours = rows(sqlite_store, "request", "input_tokens", "output_tokens", "cached_tokens", "usage_estimated")
    billed = provider.billed()
    assert len(ours) == billed["requests"] == 4 * 11
    assert sum(row[0] for row in ours) == billed["input_tokens"]
    assert sum(row[1] for row in ours) == billed["output_tokens"]
    assert sum(row[2] for row in ours) == billed["cached_tokens"]
    assert not any(row[3] for row in ours)


def test_an_aborted_stream_is_on_the_ledger_as_an_estimate(store: Store, provider: Provider, wire: str):
    chat = chat_on(store, provider, wire)
    provider.hang(Answer("one two three four", chunks=4, input_tokens=30, output_tokens=4), chunk=5)

    with chat.ask_stream("Count.") as stream:
        next(stream)

    assert len(provider.ledger) == len(chat.requests()) == 1
    (row,) = chat.requests()
    assert row.usage_estimated
    if wire != "openai":  # whose stream says only at its end what it read
        assert row.input_tokens == provider.billed()["input_tokens"]


# Models, keys and errors


def test_a_model_that_no_provider_is_known_for_is_refused_before_anything_is_written(store: Store, ask: Ask):
    chat = create_chat(store, model="no-such-model")

    with pytest.raises(UnknownModel, match=r"'no-such-model'.*provider/model"):
        ask(chat, "Hi.")

    assert rows(store, "message", "id") == []


def test_a_provider_may_be_named_apart_from_the_model(store: Store, provider: Provider, ask: Ask):
    settings = provider.openai()
    settings.pop("model")
    chat = create_chat(store, model="some-model", provider="openai", llm=LLM(**settings))
    provider.reply("Hi.")

    reply = ask(chat, "Hi.")

    assert (reply.model_id, reply.provider, provider.requests[0].model) == ("some-model", "openai", "some-model")


def test_a_router_says_which_of_its_models_answered(store: Store, provider: Provider, ask: Ask):
    import litellm

    settings = provider.openai()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        router = litellm.Router(model_list=[{"model_name": "fast", "litellm_params": settings}], num_retries=0)
    chat = create_chat(store, model="fast", llm=router, retries=AT_ONCE)
    provider.fail(500)
    provider.reply("Hi.")

    reply = ask(chat, "Hi.")

    assert (reply.content, reply.provider) == ("Hi.", "openai")
    assert "gpt-4o" in (reply.model_id or "")
    assert [row.status_code for row in chat.requests()][-1] == 200
    assert chat.requests()[-1].cost is not None
    with pytest.raises(UnknownModel, match="the router has no model 'slow'; it has fast"):
        chat.ask("Hi.", model="slow")


def test_every_error_class_of_litellm_is_known_to_be_final_or_not():
    import litellm

    from llm_orm.failures import FINAL, RETRYABLE

    judged_by_status = {"APIError", "OpenAIError"}
    names = {
        name
        for name, value in vars(litellm.exceptions).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert names - FINAL - RETRYABLE == judged_by_status
    assert not FINAL & RETRYABLE


@pytest.mark.parametrize("model", ["gpt-4o", "anthropic/claude-sonnet-4-5", "gemini/gemini-2.5-flash"])
def test_a_missing_key_is_reported_at_once_and_costs_nothing(
    sqlite_store: Store, ask: Ask, model: str, capfd: pytest.CaptureFixture[str], real_litellm: None
):
    chat = create_chat(sqlite_store, model=model)

    with pytest.raises(Exception, match=r"(?i)missing .*(key|credentials)"):
        ask(chat, "Hi.")

    assert rows(sqlite_store, "request", "attempt", "cost") == [(1, Decimal(0))]
    assert chat.requests()[0].status_code in (0, 401)
    assert capfd.readouterr().out == ""


def test_a_key_is_neither_printed_nor_stored(store: Store, provider: Provider, database_url: str):
    settings = {**provider.openai(), "api_key": "sk-canary-1234567890"}
    model = settings.pop("model")
    chat = create_chat(store, model=model, llm=LLM(**settings), headers={"Authorization": "Bearer canary-header"})
    provider.fail(401, "Incorrect API key provided: sk-canary-1234567890.")
    provider.reply("Hi.")

    with pytest.raises(Exception, match="Incorrect API key"):
        chat.ask("Hi.")
    chat.ask("Hi.")

    everything = str([list(record.select().dicts()) for record in store.records])
    assert "canary" not in everything
    assert "canary" not in repr(chat.options.llm) + repr(chat) + repr(chat.options)


def test_no_key_is_printed_of_an_address_a_request_or_a_value_of_the_wrong_kind(sqlite_url: str):
    with connect(sqlite_url) as store:
        llm = LLM(provider="openai", api_base="https://ada:canary-password@example.com/v1")
        assert repr(llm) == "<LLM provider='openai' api_base='https://ada:***@example.com/v1'>"
        for name, value in (("headers", [("x-key", "canary")]), ("headers", "canary"), ("params", [("k", "canary")])):
            with pytest.raises(InvalidValue, match=f"{name} given as (list|str): ") as raised:
                create_chat(store, model="m", **{name: value})
            assert "canary" not in str(raised.value)
    options = {"api_key": "canary", "extra_headers": {"x-key": "canary"}}
    request = ModelRequest(llm=None, model="m", provider=None, messages=[], options=options, stream=False)
    assert "canary" not in repr(request)


def test_a_provider_that_litellm_does_not_know_is_refused_before_anything_is_written(store: Store, ask: Ask):
    chat = create_chat(store, model="gpt-4o", provider="nonsense")

    with pytest.raises(UnknownModel, match="no provider 'nonsense'; it knows"):
        ask(chat, "Hi.")

    assert rows(store, "message", "id") == []


def test_another_model_at_load_is_not_called_at_the_stored_models_provider(store: Store, provider: Provider):
    chat = create_chat(store, model="claude-sonnet-4-5", provider="anthropic")
    settings = provider.openai()
    provider.reply("Hi.")

    loaded = load_chat(store, chat.id, model=settings.pop("model"), llm=LLM(**settings))

    assert loaded is not None
    assert loaded.ask("Hi.").provider == "openai"


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize("text", ["a NUL \x00 here", "half a character \ud800 here"])
def test_a_reply_that_no_database_can_hold_as_it_is_is_stored_as_json(store: Store, ask: Ask, text: str):
    script = [Say(f"Look: {text}", thinking=text, calls=[ScriptedCall("look", where=text)]), Say(text)]
    chat = create_chat(store, model="m", llm=ScriptedLLM(*script), tools=[look])

    reply = ask(chat, "Look.")

    assert json.loads(reply.content or "") == text
    assert chat.messages()[-1].content == reply.content
    assert chat.tool_calls()[0].result


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize("text", ["a NUL \x00 here", "half a character \ud800 here"])
def test_an_error_text_that_no_database_can_hold_does_not_cost_the_row(store: Store, ask: Ask, text: str):
    chat = create_chat(store, model="m", llm=ScriptedLLM(ProviderError(400, text)))

    with pytest.raises(ProviderError):
        ask(chat, "Hi.")

    assert json.loads(chat.requests()[0].error_message or "") == text

"""Where one model fails, another is asked; and the rows say which answered, and which did not."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from conftest import WAYS, Ask, rows
from provider import Answer, Provider
from provider import Call as CallOfProvider

from llm_orm import (
    Chat,
    Fallbacks,
    Halt,
    Retries,
    Store,
    ToolError,
    UnknownModel,
    create_chat,
    load_chat,
    tool,
)
from llm_orm.testing import APIConnectionError, Call, ProviderError, Say, ScriptedLLM

AT_ONCE = Retries(attempts=2, first_wait_s=0.0)
LONDON = Call("get_weather", city="London")


@tool
def get_weather(city: str) -> str:
    """Current weather in a city."""
    return f"rain in {city}"


def chat_with(store: Store, *script: Any, **options: Any) -> Chat:
    llm = ScriptedLLM(*script, input_cost_per_token="0.001", output_cost_per_token="0.001")
    return create_chat(store, **{"model": "first", "llm": llm, "tools": [get_weather], "retries": 0, **options})


def asked(chat: Chat) -> list[str]:
    return [request["model"] for request in chat.options.llm.requests]


TOLD = ("model", "attempt", "status_code", "error")


def test_the_rows_say_who_answered_and_who_failed(store: Store, ask: Ask):
    chat = chat_with(store, ProviderError(500), ProviderError(429), "Hi.").with_fallbacks("second", "third", "fourth")

    reply = ask(chat, "Hello")

    assert (reply.content, reply.model_id) == ("Hi.", "third")
    assert chat.messages()[-1].model_id == "third"
    assert rows(store, "request", *TOLD) == [
        ("first", 1, 500, "ProviderError"),
        ("second", 2, 429, "ProviderError"),
        ("third", 3, 200, None),
    ]
    assert asked(chat) == ["first", "second", "third"]


def test_a_model_is_tried_again_before_another_is_asked_and_attempts_are_counted_on(store: Store, ask: Ask):
    chat = chat_with(store, *[ProviderError(503)] * 3, ProviderError(500), "Hi.", retries=AT_ONCE, fallbacks="second")

    assert ask(chat, "Hello").model_id == "second"

    assert rows(store, "request", "model", "attempt", "status_code") == [
        ("first", 1, 503),
        ("first", 2, 503),
        ("first", 3, 503),
        ("second", 4, 500),
        ("second", 5, 200),
    ]


def test_where_all_fail_the_last_error_is_raised_and_all_are_on_record(store: Store, ask: Ask):
    errors = [ProviderError(500, "one"), ProviderError(503, "two"), ProviderError(401, "three")]
    chat = chat_with(store, *errors, fallbacks=["second", "third"])

    with pytest.raises(ProviderError) as raised:
        ask(chat, "Hello")

    assert raised.value is errors[-1]
    assert rows(store, "request", "model", "status_code", "error_message") == [
        ("first", 500, "one"),
        ("second", 503, "two"),
        ("third", 401, "three"),
    ]
    assert rows(store, "message", "role") == [("user",)]
    chat.options.llm.add("Here I am.")
    assert ask(chat, "Hello?").model_id == "first"


@pytest.mark.parametrize("status", [401, 402, 403, 404, 408, 429, 500, 529, None])
def test_another_model_is_asked_by_default_whatever_the_provider_says(store: Store, status: int | None):
    chat = chat_with(store, ProviderError(status), "Hi.", fallbacks="second")
    assert chat.ask("Hello").model_id == "second"
    assert rows(store, "request", "status_code") == [(status or 0,), (200,)]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_another_model_is_not_asked_by_default_what_the_first_says_is_wrong(store: Store, ask: Ask, status: int):
    chat = chat_with(store, ProviderError(status), fallbacks="second")
    with pytest.raises(ProviderError):
        ask(chat, "Hello")
    assert asked(chat) == ["first"]


class Overloaded(ProviderError):
    pass


@pytest.mark.parametrize(
    ("on", "error", "falls_back"),
    [
        (Overloaded, Overloaded(503), True),
        (ProviderError, Overloaded(503), True),
        ("Overloaded", Overloaded(503), True),
        ("ProviderError", Overloaded(400), True),
        (["RateLimitError", "APIConnectionError"], ProviderError(None), True),
        ((APIConnectionError,), ProviderError(None), True),
        (Overloaded, ProviderError(503), False),
        ("Overloaded", ProviderError(503), False),
        ((), ProviderError(503), False),
    ],
)
def test_on_says_which_errors_another_model_is_asked_for(store: Store, on: Any, error: Any, falls_back: bool):
    for way in ("ask", "aask_stream"):
        chat = chat_with(store, error, "Hi.").with_fallbacks("second", on=on)
        if falls_back:
            assert WAYS[way](chat, "Hello").model_id == "second"
        else:
            with pytest.raises(ProviderError):
                WAYS[way](chat, "Hello")
            assert asked(chat) == ["first"]


def test_on_is_a_keyword_too(store: Store, ask: Ask):
    chat = chat_with(store, ProviderError(400), "Hi.", fallbacks=Fallbacks(("second",), on="ProviderError"))  # type: ignore[arg-type]
    assert ask(chat, "Hello").model_id == "second"


def test_what_is_not_the_providers_is_no_reason_to_ask_another_model(store: Store, ask: Ask):
    def broken(messages: Any) -> None:
        raise RuntimeError("my hook broke")

    chat = chat_with(store, "Hi.", fallbacks="second").before_request(broken)
    with pytest.raises(RuntimeError):
        ask(chat, "Hello")
    assert asked(chat) == []


@pytest.mark.parametrize("way", ["ask_stream", "aask_stream"])
def test_another_model_is_not_asked_once_something_was_shown(store: Store, way: str):
    chat = chat_with(store, Say("one two", error=ProviderError(500)), fallbacks="second")
    with pytest.raises(ProviderError):
        WAYS[way](chat, "Count.")
    assert rows(store, "request", "model", "status_code", "output_tokens") == [("first", 500, 2)]


@pytest.mark.parametrize("way", ["ask_stream", "aask_stream"])
def test_another_model_is_asked_where_a_stream_broke_before_anything_was_shown(store: Store, way: str):
    chat = chat_with(store, Say("", error=ProviderError(500)), "Hi.", fallbacks="second")
    assert WAYS[way](chat, "Count.").model_id == "second"


@pytest.mark.parametrize("way", ["ask_stream", "aask_stream"])
def test_another_model_may_be_asked_in_a_later_round_of_a_stream(store: Store, way: str):
    script = [Say("Let me look.", calls=[LONDON]), ProviderError(500), "Rain."]
    chat = chat_with(store, *script, fallbacks="second")
    assert WAYS[way](chat, "Weather?").content == "Rain."
    assert rows(store, "request", "round", "model", "attempt", "status_code") == [
        (0, "first", 1, 200),
        (1, "first", 1, 500),
        (1, "second", 2, 200),
    ]


def test_the_one_that_answered_stays_for_the_rest_of_the_turn_and_no_longer(store: Store, ask: Ask):
    chat = chat_with(store, ProviderError(500), [LONDON], [LONDON], "Rain.", "Hi.", fallbacks=["second", "third"])

    ask(chat, "Weather?")
    ask(chat, "Hello")

    assert asked(chat) == ["first", "second", "second", "second", "first"]
    assert rows(store, "request", "round", "model", "attempt") == [
        (0, "first", 1),
        (0, "second", 2),
        (1, "second", 1),
        (2, "second", 1),
        (0, "first", 1),
    ]


def test_those_that_are_left_are_asked_in_a_later_round(store: Store, ask: Ask):
    script = [ProviderError(500), [LONDON], ProviderError(500), [LONDON], ProviderError(503)]
    chat = chat_with(store, *script, fallbacks=["second", "third"])
    with pytest.raises(ProviderError):
        ask(chat, "Weather?")
    assert asked(chat) == ["first", "second", "second", "third", "third"]


def test_a_fallback_of_no_known_provider_is_refused_before_anything_is_written(
    store: Store, ask: Ask, real_litellm: None
):
    chat = create_chat(store, model="openai/gpt-4o").with_fallbacks("anthropic/claude-sonnet-4-5", "no-such-model")
    with pytest.raises(UnknownModel, match="'no-such-model'"):
        ask(chat, "Hello")
    assert rows(store, "message", "id") == []


class TwoProviders(ScriptedLLM):
    """Models whose provider is in their name."""

    def get_llm_provider(self, model: str, custom_llm_provider: str | None = None) -> tuple[str, str]:
        return model.partition("/")[2], model.partition("/")[0]


def test_the_fallback_of_another_provider_gets_the_turns_rounds_without_the_first_ones_thinking(store: Store, ask: Ask):
    thinks = Say("Let me look.", thinking="Hm.", signature="sig-1", calls=[Call("get_weather", city="London")])
    llm = TwoProviders(thinks, ProviderError(500), Say(thinking="Ah.", signature="sig-2", calls=[LONDON]), "Rain.")
    chat = create_chat(store, model="one/m", llm=llm, tools=[get_weather], retries=0, fallbacks="two/n")

    reply = ask(chat, "Weather?")

    assert (reply.model_id, reply.provider) == ("n", "two")
    of_one, of_two = llm.requests[2]["messages"], llm.requests[3]["messages"]
    assert [each["role"] for each in of_one] == ["user", "assistant", "tool"]
    assert of_one[1]["tool_calls"][0]["id"] == of_one[2]["tool_call_id"]
    assert "thinking_blocks" in llm.requests[1]["messages"][1]
    assert "sig-1" not in str(of_one)
    assert of_one[1]["content"] == "Let me look."
    assert "sig-1" not in str(of_two)
    assert of_two[3]["thinking_blocks"][0]["signature"] == "sig-2"
    assert [(row.provider, row.model, row.round, row.status_code) for row in chat.requests()] == [
        ("one", "m", 0, 200),
        ("one", "m", 1, 500),
        ("two", "n", 1, 200),
        ("two", "n", 2, 200),
    ]


def test_a_turn_that_two_providers_answered_shows_neither_the_others_thinking_later(store: Store, ask: Ask):
    thinks = Say("Let me look.", thinking="Hm.", signature="sig-1", calls=[LONDON])
    llm = TwoProviders(thinks, ProviderError(500), "Rain.", "Bye.", "Bye.")
    chat = create_chat(store, model="one/m", llm=llm, tools=[get_weather], retries=0, fallbacks="two/n")
    ask(chat, "Weather?")

    ask(chat, "Bye.", model="two/n", fallbacks=None)
    again = load_chat(store, chat.id, model="two/n", llm=llm, tools=[get_weather])
    assert again is not None
    ask(again, "Bye.")

    for request in llm.requests[3:]:
        assert "sig-1" not in str(request["messages"])
        assert "rain in London" in str(request["messages"])


def test_a_turn_that_failed_at_the_second_provider_is_kept_with_the_first_ones_thinking_apart(store: Store, ask: Ask):
    thinks = Say("Let me look.", thinking="Hm.", signature="sig-1", calls=[LONDON])
    llm = TwoProviders(thinks, ProviderError(500), ProviderError(500), "Bye.", "Bye.")
    chat = create_chat(
        store, model="one/m", llm=llm, tools=[get_weather], retries=0, fallbacks="two/n", on_error="keep"
    )
    with pytest.raises(ProviderError):
        ask(chat, "Weather?")

    ask(chat, "Bye.", model="two/n")
    ask(chat, "Bye.", model="one/m")

    assert "sig-1" not in str(llm.requests[3])
    assert "rain in London" in str(llm.requests[3])
    assert "sig-1" in str(llm.requests[4])
    assert "written_by" not in str(llm.requests)


def test_a_turn_that_another_provider_takes_up_is_shown_without_the_first_ones_thinking(store: Store, ask: Ask):
    @tool(requires_approval=True)
    def cancel() -> str:
        return "cancelled"

    thinks = Say("Let me look.", thinking="Hm.", signature="sig-1", calls=[Call("cancel")])
    llm = TwoProviders(thinks, "Done.", "Bye.", "Bye.")
    chat = create_chat(store, model="one/m", llm=llm, tools=[cancel])
    ask(chat, "Cancel it.")
    chat.approve(chat.pending_approvals()[0])

    after_a_deploy = load_chat(store, chat.id, model="two/n", llm=llm, tools=[cancel])
    assert after_a_deploy is not None
    assert after_a_deploy.resume().content == "Done."
    ask(after_a_deploy, "Bye.")
    ask(chat, "Bye.")

    assert "sig-1" not in str(llm.requests[1]) + str(llm.requests[2])
    assert "sig-1" in str(llm.requests[3])
    assert all("'content': 'cancelled'" in str(request) for request in llm.requests[1:])


@pytest.mark.parametrize("ends", ["with a text", "with an error"])
def test_a_turn_that_another_provider_takes_up_and_says_nothing_in_is_still_the_first_ones(store: Store, ends: str):
    @tool(requires_approval=True)
    def cancel() -> Any:
        if ends == "with a text":
            return Halt("Cancelled.")
        raise ToolError("it was shipped", fatal=True)

    thinks = Say("Let me look.", thinking="Hm.", signature="sig-1", calls=[Call("cancel")])
    llm = TwoProviders(thinks, "Bye.", "Bye.")
    chat = create_chat(store, model="one/m", llm=llm, tools=[cancel], on_error="keep")
    chat.ask("Cancel it.")
    chat.approve(chat.pending_approvals()[0])

    after_a_deploy = load_chat(store, chat.id, model="two/n", llm=llm, tools=[cancel], on_error="keep")
    assert after_a_deploy is not None
    with nullcontext() if ends == "with a text" else pytest.raises(ToolError):
        after_a_deploy.resume()
    after_a_deploy.ask("Bye.")
    chat.ask("Bye.")

    assert "sig-1" not in str(llm.requests[1])
    assert "sig-1" in str(llm.requests[2])
    assert rows(store, "message", "provider")[1] == ("one",)


def test_openai_fails_and_anthropic_answers(
    sqlite_store: Store, ask: Ask, provider: Provider, other: Provider, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {
        "OPENAI_API_KEY": "key-of-openai",
        "OPENAI_BASE_URL": f"{provider.url}/v1",
        "ANTHROPIC_API_KEY": "key-of-anthropic",
        "ANTHROPIC_API_BASE": other.url,
    }.items():
        monkeypatch.setenv(name, value)
    weather = CallOfProvider("get_weather", {"city": "London"})
    provider.reply(Answer("Let me look.", tool_calls=[weather], input_tokens=50, output_tokens=9))
    provider.fail(503)
    other.reply(Answer("Rain.", thinking="Hm.", signature="c2ln", input_tokens=70, output_tokens=8))
    chat = create_chat(sqlite_store, model="openai/gpt-4o", tools=[get_weather], retries=0)
    chat.with_fallbacks("anthropic/claude-sonnet-4-5", on="ServiceUnavailableError")

    reply = ask(chat, "Weather?")

    assert (reply.content, reply.provider, reply.model_id) == ("Rain.", "anthropic", "claude-sonnet-4-5")
    assert rows(sqlite_store, "request", "provider", "model", "round", "attempt", "status_code", "input_tokens") == [
        ("openai", "gpt-4o", 0, 1, 200, 50),
        ("openai", "gpt-4o", 1, 1, 503, 0),
        ("anthropic", "claude-sonnet-4-5", 1, 2, 200, 70),
    ]
    assert len(provider.ledger) + len(other.ledger) == 3
    question, call, result = other.requests[0].body["messages"]
    assert question["content"] == [{"type": "text", "text": "Weather?"}] or question["content"] == "Weather?"
    assert call["content"][-1]["input"] == {"city": "London"}
    assert result["content"][0]["content"] == "rain in London"
    assert other.requests[0].headers["x-api-key"] == "key-of-anthropic"


# A router of litellm's


@pytest.fixture
def other() -> Iterator[Provider]:
    with Provider() as other:
        yield other


def router_of(*deployments: tuple[str, dict[str, str]], **settings: Any) -> Any:
    import litellm

    models = [{"model_name": name, "litellm_params": dict(given)} for name, given in deployments]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return litellm.Router(model_list=models, **settings)


def test_a_routers_own_retries_are_ours_and_each_call_of_two_deployments_has_its_row(
    sqlite_store: Store, ask: Ask, provider: Provider, other: Provider
):
    """Whatever it says of itself: it would make them without a word."""
    router = router_of(
        ("fast", {**provider.openai(), "num_retries": 2}),
        ("fast", {**other.anthropic(), "num_retries": 2}),
        num_retries=2,
        disable_cooldowns=True,
    )
    for each in (provider, other):
        each.fail(500, times=2)
        each.otherwise = Answer("Hi.")
    chat = create_chat(sqlite_store, model="fast", llm=router, retries=Retries(attempts=5, first_wait_s=0.0))

    reply = ask(chat, "Hello")

    assert reply.content == "Hi."
    made = rows(sqlite_store, "request", "provider", "model", "attempt", "status_code")
    assert [row[2] for row in made] == list(range(1, len(made) + 1))
    called = {"openai": ("gpt-4o", provider), "anthropic": ("claude-sonnet-4-5", other)}
    for name, (model, each) in called.items():
        assert [row[3] for row in made if row[:2] == (name, model)] == [bill.status for bill in each.ledger]
    assert sum(len(each.ledger) for each in (provider, other)) == len(made)
    (answered,) = [row for row in chat.requests() if row.status_code == 200]
    assert answered.cost is not None
    assert (reply.provider, reply.model_id) == (answered.provider, answered.model)


def test_a_routers_own_retries_are_not_made_where_we_make_none(
    sqlite_store: Store, ask: Ask, provider: Provider, other: Provider
):
    router = router_of(("fast", provider.openai()), ("fast", other.openai()), num_retries=3)
    provider.fail(500, times=5)
    other.fail(500, times=5)
    with pytest.raises(Exception, match="it failed"):
        ask(create_chat(sqlite_store, model="fast", llm=router, retries=0), "Hello")
    assert rows(sqlite_store, "request", "provider", "model", "status_code") == [("openai", "gpt-4o", 500)]
    assert len(provider.ledger) + len(other.ledger) == 1


def test_a_routers_own_fallbacks_are_made_by_the_turn_and_each_call_has_its_row(
    sqlite_store: Store, ask: Ask, provider: Provider, other: Provider
):
    router = router_of(
        ("fast", provider.openai()), ("slow", other.anthropic()), num_retries=0, fallbacks=[{"fast": ["slow"]}]
    )
    provider.fail(500)
    other.reply(Answer("Hi.", input_tokens=70, output_tokens=8))
    chat = create_chat(sqlite_store, model="fast", llm=router, retries=0)

    reply = ask(chat, "Hello")

    assert (reply.provider, reply.model_id) == ("anthropic", "claude-sonnet-4-5")
    made = rows(sqlite_store, "request", "provider", "model", "attempt", "status_code", "input_tokens")
    assert made == [("openai", "gpt-4o", 1, 500, 0), ("anthropic", "claude-sonnet-4-5", 2, 200, 70)]
    assert chat.requests()[-1].cost is not None
    assert (len(provider.ledger), len(other.ledger)) == (1, 1)


def test_fallbacks_that_are_named_go_before_a_routers_own(sqlite_store: Store, provider: Provider, other: Provider):
    router = router_of(
        *(("fast", provider.openai()), ("slow", other.anthropic()), ("slower", other.openai())),
        default_fallbacks=["slow"],
    )
    provider.fail(500)
    other.reply("Hi.")
    chat = create_chat(sqlite_store, model="fast", llm=router, retries=0).with_fallbacks("slower")
    assert chat.ask("Hello").model_id == "gpt-4o"
    assert [request.format for request in other.requests] == ["openai"]


def test_of_a_router_with_rules_of_its_own_the_row_says_who_answered_and_what_it_cost(
    sqlite_store: Store, ask: Ask, provider: Provider, other: Provider
):
    """The call that failed before is not on record: litellm says that there was one, and not what became of it."""
    router = router_of(
        *(("fast", provider.openai()), ("slow", other.anthropic())),
        num_retries=0,
        fallbacks=[{"fast": ["slow"]}],
        context_window_fallbacks=[{"fast": ["slow"]}],
    )
    provider.fail(500)
    other.reply(Answer("Hi.", input_tokens=70, output_tokens=8))
    chat = create_chat(sqlite_store, model="fast", llm=router, retries=0)

    reply = ask(chat, "Hello")

    assert (reply.provider, reply.model_id) == ("anthropic", "claude-sonnet-4-5")
    (row,) = chat.requests()
    assert (row.provider, row.model, row.status_code, row.input_tokens) == ("anthropic", "claude-sonnet-4-5", 200, 70)
    assert row.cost is not None
    assert (len(provider.ledger), len(other.ledger)) == (1, 1)


def test_our_fallbacks_from_one_of_a_routers_models_to_another_are_all_on_record(
    sqlite_store: Store, ask: Ask, provider: Provider, other: Provider
):
    router = router_of(("fast", provider.openai()), ("slow", other.anthropic()))
    provider.fail(500)
    other.reply(Answer("Hi."))
    chat = create_chat(sqlite_store, model="fast", llm=router, retries=0).with_fallbacks("slow")

    ask(chat, "Hello")

    assert rows(sqlite_store, "request", "provider", "model", "attempt", "status_code") == [
        ("openai", "gpt-4o", 1, 500),
        ("anthropic", "claude-sonnet-4-5", 2, 200),
    ]
    with pytest.raises(UnknownModel, match="the router has no model 'none'; it has fast, slow"):
        ask(chat, "Hello", fallbacks="none")

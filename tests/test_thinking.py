"""How much a model is to think, in each provider's words; and what it thought, stored and shown again as it was."""

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import WAYS, Ask, rows
from provider import Answer, Call, Provider

from llm_orm import LLM, Chat, Retries, Store, create_chat, load_chat, tool
from llm_orm.testing import Call as ScriptedCall
from llm_orm.testing import Say, ScriptedLLM

FORMATS = ("openai", "anthropic", "gemini")

WEATHER = Call("get_weather", {"city": "London"}, signature="c2lnbmVkIGNhbGw=")


@tool
def get_weather(city: str) -> dict:
    """Current weather in a city."""
    return {"city": city, "celsius": 3}


def wire_of(model: str) -> str:
    return model.partition("/")[0]


def chat_on(store: Store, provider: Provider, model: str, **options: Any) -> Chat:
    settings = getattr(provider, wire_of(model))()
    settings.pop("model")
    return create_chat(store, **{"model": model, "llm": LLM(**settings), "retries": 0, **options})


# What is asked for


GPT, CLAUDE, CLAUDE_46 = "openai/gpt-5", "anthropic/claude-sonnet-4-5", "anthropic/claude-opus-4-6"
GEMINI, GEMINI_3 = "gemini/gemini-2.5-flash", "gemini/gemini-3-pro-preview"


def budget(tokens: int) -> dict[str, Any]:
    return {"thinking": {"type": "enabled", "budget_tokens": tokens}}


def of_gemini(**wanted: Any) -> dict[str, Any]:
    return {"thinkingConfig": {"includeThoughts": True, **wanted}}


EFFORT, BUDGET, BOTH = {"effort": "low"}, {"budget": 1500}, {"effort": "low", "budget": 1500}


@pytest.mark.parametrize(
    ("model", "wanted", "arrives"),
    [
        (GPT, EFFORT, {"reasoning_effort": "low"}),
        (GPT, {"effort": "high"}, {"reasoning_effort": "high"}),
        (GPT, {"budget": 1000}, {"reasoning_effort": "low"}),
        (GPT, BUDGET, {"reasoning_effort": "medium"}),
        (GPT, {"budget": 9000}, {"reasoning_effort": "high"}),
        (GPT, BOTH, {"reasoning_effort": "low"}),
        (CLAUDE, EFFORT, budget(1024)),
        (CLAUDE, {"effort": "high"}, budget(4096)),
        (CLAUDE, BUDGET, budget(1500)),
        (CLAUDE, BOTH, budget(1500)),
        (CLAUDE_46, BUDGET, budget(1500)),
        (CLAUDE_46, BOTH, {**budget(1500), "output_config": {"effort": "low"}}),
        (GEMINI, EFFORT, of_gemini(thinkingBudget=1024)),
        (GEMINI, {"effort": "high"}, of_gemini(thinkingBudget=4096)),
        (GEMINI, BUDGET, of_gemini(thinkingBudget=1500)),
        (GEMINI, BOTH, of_gemini(thinkingBudget=1500)),
        (GEMINI_3, EFFORT, of_gemini(thinkingLevel="low")),
        (GEMINI_3, {"budget": 9000}, of_gemini(thinkingLevel="high")),
        (GEMINI_3, BOTH, of_gemini(thinkingLevel="low")),
    ],
)
def test_effort_and_budget_arrive_in_the_providers_words(
    sqlite_store: Store, provider: Provider, model: str, wanted: dict[str, Any], arrives: dict[str, Any]
):
    chat = chat_on(sqlite_store, provider, model, thinking=wanted)
    provider.reply("Hi.")

    chat.ask("Think.")

    body = provider.requests[0].body
    said = body.get("generationConfig", {}) if wire_of(model) == "gemini" else body
    names = ("reasoning_effort", "thinking", "output_config", "thinkingConfig")
    assert {name: said[name] for name in names if name in said} == arrives
    if "budget_tokens" in str(arrives):
        assert body["max_tokens"] > arrives["thinking"]["budget_tokens"]  # Anthropic refuses less


def test_a_providers_own_shape_of_thinking_goes_as_it_is(sqlite_store: Store, provider: Provider):
    own = {"type": "enabled", "budget_tokens": 3000}
    provider.reply("Hi.")
    chat_on(sqlite_store, provider, CLAUDE, thinking=own).ask("Think.")
    assert provider.requests[0].body["thinking"] == own


@pytest.mark.parametrize("model", ["openai/gpt-4o", "gemini/gemini-2.0-flash"])
def test_a_model_that_cannot_think_is_not_called_and_says_so(sqlite_store: Store, provider: Provider, model: str):
    import litellm

    chat = chat_on(sqlite_store, provider, model).with_effort("low")
    with pytest.raises(litellm.UnsupportedParamsError, match="reasoning_effort"):
        chat.ask("Think.")
    assert provider.ledger == []
    assert rows(sqlite_store, "request", "status_code", "cost") == [(400, 0)]


@pytest.mark.parametrize("wire", FORMATS)
def test_thinking_params_and_headers_are_asked_for_on_every_call_of_a_turn(
    sqlite_store: Store, provider: Provider, wire: str, ask: Ask
):
    """NodeLLM's C31: the calls that follow a tool's dropped them."""
    model = {"openai": GPT, "anthropic": CLAUDE, "gemini": GEMINI}[wire]
    chat = chat_on(sqlite_store, provider, model, tools=[get_weather], retries=Retries(attempts=1, first_wait_s=0))
    chat.with_effort("low").with_headers(**{"x-tenant": "t_1"}).with_params(user="u_1")
    provider.reply(Answer(tool_calls=[WEATHER]))
    provider.fail(500)
    provider.reply(Answer(tool_calls=[WEATHER]), "It is cold.")

    ask(chat, "Weather?", max_tokens=8000)

    assert len(provider.requests) == 4
    told = [
        {
            name: value
            for name, value in request.body.items()
            if name not in ("messages", "contents", "tools", "stream", "stream_options")
        }
        for request in provider.requests
    ]
    assert told[1:] == told[:1] * 3
    assert "low" in str(told[0]) or "1024" in str(told[0])
    assert [request.headers["x-tenant"] for request in provider.requests] == ["t_1"] * 4


# What it thought


SECRET = Answer(
    "Let me look.",
    thinking="The user wants the weather.",
    signature="c2lnbmF0dXJl",
    redacted_thinking="c2VjcmV0",
    tool_calls=[WEATHER],
)


def test_thinking_with_a_redacted_block_and_tools_goes_back_to_anthropic_in_order(
    store: Store, provider: Provider, ask: Ask
):
    chat = chat_on(store, provider, CLAUDE, tools=[get_weather], thinking=BUDGET)
    second = Answer(thinking="And tomorrow?", signature="c2Vjb25k", tool_calls=[Call("get_weather", {"city": "Paris"})])
    provider.reply(SECRET, second, "It is cold.", "Bye.")
    ask(chat, "Weather?")
    settings = provider.anthropic()
    settings.pop("model")
    again = load_chat(store, chat.id, llm=LLM(**settings), tools=[get_weather], thinking=BUDGET)
    assert again is not None

    ask(again, "Thanks.")

    first_round = [
        {"type": "thinking", "thinking": "The user wants the weather.", "signature": "c2lnbmF0dXJl"},
        {"type": "redacted_thinking", "data": "c2VjcmV0"},
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": "London"}},
    ]
    for request in provider.requests[1:]:
        assert request.body["messages"][1] == {"role": "assistant", "content": first_round}
    for request in provider.requests[2:]:
        thought, *_, call = request.body["messages"][3]["content"]
        assert thought == {"type": "thinking", "thinking": "And tomorrow?", "signature": "c2Vjb25k"}
        assert (call["type"], call["input"]) == ("tool_use", {"city": "Paris"})


BLOCKS = [
    {"type": "thinking", "thinking": "First this. ", "signature": "sig-1"},
    {"type": "thinking", "thinking": "Then that.", "signature": "sig-2"},
    {"type": "redacted_thinking", "data": "c2VjcmV0"},
]


class SeveralBlocks(ScriptedLLM):
    """Thinks in several blocks, as Anthropic's models do between tools of their own."""

    pieces: list[list[dict[str, Any]]]
    """The blocks that come with each piece of a streamed thought."""

    def _whole(self, say: Say, keywords: dict[str, Any]) -> Any:
        response = super()._whole(say, keywords)
        if say.thinking:
            response.choices[0].message.thinking_blocks = [dict(block) for block in BLOCKS]
        return response

    def _parts(self, say: Say, keywords: dict[str, Any]) -> Iterator[Any]:
        for part in super()._parts(say, keywords):
            if say.thinking and getattr(part.choices and part.choices[0].delta, "reasoning_content", None):
                part.choices[0].delta.thinking_blocks = self.pieces.pop(0)
            yield part


def test_several_blocks_of_thinking_stay_apart_streamed_or_not(store: Store, ask: Ask):
    look = ScriptedCall("get_weather", city="London")
    llm = SeveralBlocks(Say("Hm.", thinking="First this. Then that.", calls=[look]), "Cold.", "Bye.")
    llm.pieces = [
        [{"type": "thinking", "thinking": "First "}],
        [{"type": "thinking", "thinking": "this. "}, {"type": "thinking", "thinking": "", "signature": "sig-1"}],
        [{"type": "thinking", "thinking": "Then "}],
        [
            {"type": "thinking", "thinking": "that."},
            {"type": "thinking", "thinking": "", "signature": "sig-2"},
            {"type": "redacted_thinking", "data": "c2VjcmV0"},
        ],
    ]
    chat = create_chat(store, model="m", llm=llm, tools=[get_weather])
    ask(chat, "Weather?")
    again = load_chat(store, chat.id, llm=llm, tools=[get_weather])
    assert again is not None

    ask(again, "Thanks.")

    for request in llm.requests[1:]:
        assert request["messages"][1]["thinking_blocks"] == BLOCKS


@pytest.mark.parametrize("wire", FORMATS)
def test_streamed_thinking_is_stored_as_unstreamed(sqlite_store: Store, provider: Provider, wire: str):
    """NodeLLM's C15: "AAA BBB CCC" was stored as "CCCCCC"."""
    stored, shown = [], []
    model = {"openai": GPT, "anthropic": CLAUDE, "gemini": GEMINI}[wire]
    answer = Answer("Done.", thinking="AAA BBB CCC", signature="c2ln", thinking_tokens=4, output_tokens=9, chunks=3)
    for way, ask in WAYS.items():
        chat = chat_on(sqlite_store, provider, model, thinking=EFFORT)
        provider.reply(answer)
        if way == "ask_stream":
            shown = [chunk.thinking for chunk in chat.ask_stream("Think.")]
        else:
            ask(chat, "Think.")
        message = chat.messages()[-1]
        (request,) = chat.requests()
        names = ("content", "content_raw", "thinking_text", "thinking_signature", "thinking_tokens", "output_tokens")
        stored.append([*(getattr(message, name) for name in names), request.thinking_tokens])

    assert stored == stored[:1] * 4
    assert stored[0][2] == "".join(shown) == "AAA BBB CCC"
    assert stored[0][3] == (None if wire != "anthropic" else "c2ln")


def test_the_tokens_of_thinking_are_summed_over_the_rounds_and_kept_for_each(store: Store, ask: Ask):
    look = ScriptedCall("get_weather", city="London")
    llm = ScriptedLLM(Say(thinking="Hm.", thinking_tokens=5, calls=[look]), Say("Cold.", thinking_tokens=2))
    reply = ask(create_chat(store, model="m", llm=llm, tools=[get_weather]), "Weather?")
    assert reply.thinking_tokens == 7
    assert rows(store, "request", "round", "thinking_tokens") == [(0, 5), (1, 2)]


def test_thinking_without_a_signature_is_stored_and_shown_again(store: Store, ask: Ask):
    llm = ScriptedLLM(Say("Four.", thinking="Two and two."), "Bye.")
    chat = create_chat(store, model="m", llm=llm)
    reply = ask(chat, "Add.")
    assert (reply.thinking_text, reply.thinking_signature) == ("Two and two.", None)
    ask(chat, "Bye.")
    assert llm.requests[1]["messages"][1]["reasoning_content"] == "Two and two."

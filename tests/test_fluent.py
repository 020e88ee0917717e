"""What a chat asks with: said by a method, by a keyword of create_chat, load_chat or ask; and never in the middle of a
turn."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pydantic
import pytest
from conftest import WAYS, Ask, rows

from llm_orm import (
    Chat,
    Fallbacks,
    InvalidValue,
    Middleware,
    Retries,
    Store,
    connect,
    create_chat,
    load_chat,
    tool,
)
from llm_orm.testing import Call, ProviderError, ScriptedLLM

AT_ONCE = Retries(attempts=2, first_wait_s=0.0)
LONDON = Call("get_weather", city="London")


@tool
def get_weather(city: str) -> str:
    """Current weather in a city."""
    return f"rain in {city}"


@tool
def get_time() -> str:
    """The time."""
    return "noon"


class Number(pydantic.BaseModel):
    n: int


class Whisper(Middleware):
    """Adds a word to what the model is shown."""

    def __init__(self, word: str = "softly"):
        self.word = word

    def on_request(self, context: Any) -> None:
        context.messages.append({"role": "system", "content": self.word})


WHISPER = Whisper()

Said = tuple[Callable[[Chat], Any], dict[str, Any]]

OPTIONS: dict[str, Said] = {
    "model": (lambda chat: chat.with_model("other"), {"model": "other"}),
    "provider": (lambda chat: chat.with_provider("elsewhere"), {"provider": "elsewhere"}),
    "instructions": (lambda chat: chat.with_instructions("Be a pirate."), {"instructions": "Be a pirate."}),
    "system": (lambda chat: chat.system("Be a pirate."), {"instructions": "Be a pirate."}),
    "tool": (lambda chat: chat.with_tool(get_time), {"tools": [get_weather, get_time]}),
    "tools": (lambda chat: chat.with_tools(get_time, replace=True), {"tools": [get_time]}),
    "middlewares": (lambda chat: chat.use(WHISPER), {"middlewares": [WHISPER]}),
    "temperature": (lambda chat: chat.with_temperature(0.3), {"temperature": 0.3}),
    "params": (lambda chat: chat.with_params(seed=7), {"params": {"seed": 7}}),
    "headers": (lambda chat: chat.with_headers(**{"x-tenant": "t_1"}), {"headers": {"x-tenant": "t_1"}}),
    "thinking": (lambda chat: chat.with_thinking(budget=2000), {"thinking": {"budget": 2000}}),
    "effort": (lambda chat: chat.with_effort("low"), {"effort": "low"}),
    "schema": (lambda chat: chat.with_schema(Number), {"schema": Number}),
    "JSON schema": (
        lambda chat: chat.with_schema(Number.model_json_schema(), corrections=0),
        {"schema": Number.model_json_schema(), "corrections": 0},
    ),
    "tool choice": (lambda chat: chat.with_tool_choice("get_weather"), {"tool_choice": "get_weather"}),
    "fallbacks": (
        lambda chat: chat.with_fallbacks("second", on="ProviderError"),
        {"fallbacks": Fallbacks(("second",), on=("ProviderError",))},
    ),
}
"""What a method says, and the keywords that say the same."""

PLAIN = {"model": "first", "tools": [get_weather], "retries": 0}


@pytest.fixture
def memory() -> Iterator[Store]:
    """For what the database has no part in."""
    with connect("sqlite:///:memory:") as store:
        store.create_tables()
        yield store


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_the_same_by_method_and_as_keyword_of_create_load_and_ask(store: Store, ask: Ask, option: str):
    """NodeLLM's C1, C2 and C3: instructions were never sent, a schema crashed, tools went into the INSERT."""
    by_method, keywords = OPTIONS[option]

    def sent(how: Callable[[ScriptedLLM], None]) -> list[dict[str, Any]]:
        # A model that falls over, for the sake of those that have another.
        llm = ScriptedLLM(*([ProviderError(500)] if option == "fallbacks" else []), '{"n": 1}')
        how(llm)
        return llm.requests

    def with_method(llm: ScriptedLLM) -> None:
        chat = create_chat(store, llm=llm, **PLAIN)
        assert by_method(chat) is chat
        ask(chat, "Hi.")

    def loaded(llm: ScriptedLLM) -> None:
        chat = create_chat(store, model="first")
        again = load_chat(store, chat.id, llm=llm, **{**PLAIN, **keywords})
        assert again is not None
        ask(again, "Hi.")

    def plain(llm: ScriptedLLM) -> None:
        llm.script[:] = ["Hello."]
        ask(create_chat(store, llm=llm, **PLAIN), "Hi.")

    expected = sent(with_method)
    assert sent(lambda llm: ask(create_chat(store, llm=llm, **{**PLAIN, **keywords}), "Hi.")) == expected
    assert sent(loaded) == expected
    assert sent(lambda llm: ask(create_chat(store, llm=llm, **PLAIN), "Hi.", **keywords)) == expected
    assert sent(plain) != expected


def test_what_a_method_says_is_not_stored(store: Store, ask: Ask):
    llm = ScriptedLLM('{"n": 1}', "Hello.")
    chat = create_chat(store, llm=llm, instructions="Be brief.", metadata={"a": 1}, **PLAIN)
    columns = ("model", "provider", "instructions", "metadata")
    before = rows(store, "chat", *columns)
    for by_method, _ in (said for name, said in OPTIONS.items() if name != "tool choice"):
        by_method(chat)

    ask(chat, "Hi.")

    assert rows(store, "chat", *columns) == before == [("first", None, "Be brief.", {"a": 1})]
    again = load_chat(store, chat.id, llm=llm)
    assert again is not None
    ask(again, "Hi.")
    assert set(llm.requests[1]) - {"stream", "stream_options"} == {"model", "messages", "max_retries"}
    assert (llm.requests[1]["model"], llm.requests[1]["messages"][0]["content"]) == ("first", "Be brief.")


def test_a_keyword_of_ask_holds_for_that_turn_alone(store: Store, ask: Ask):
    llm = ScriptedLLM('{"n": 1}', "Hello.")
    chat = create_chat(store, llm=llm, **PLAIN)
    once = {name: value for _, keywords in OPTIONS.values() for name, value in keywords.items()}

    ask(chat, "Hi.", **{**once, "tools": [get_weather, get_time]})
    ask(chat, "Hi.")

    assert set(llm.requests[0]) - set(llm.requests[1]) == {
        "temperature",
        "custom_llm_provider",
        "seed",
        "extra_headers",
        "thinking",
        "response_format",
        "tool_choice",
    }
    assert llm.requests[1]["model"] == "first"
    assert [each["content"] for each in llm.requests[1]["messages"]] == ["Hi.", '{"n": 1}', "Hi."]


def test_methods_can_be_chained(store: Store, ask: Ask):
    llm = ScriptedLLM("Arr.")

    reply = ask(
        create_chat(store, llm=llm, model="first")
        .with_model("other", provider="elsewhere")
        .system("Be a pirate.")
        .with_tools(get_weather, get_time)
        .with_temperature(0.1)
        .with_params(seed=7)
        .with_headers(**{"x-tenant": "t_1"})
        .with_effort("high")
        .use(WHISPER)
        .before_request(lambda messages: [*messages, {"role": "system", "content": "loudly"}]),
        "Hi.",
    )

    (sent,) = llm.requests
    assert (reply.model_id, reply.provider, reply.content) == ("other", "elsewhere", "Arr.")
    assert [each["content"] for each in sent["messages"]] == ["Be a pirate.", "Hi.", "softly", "loudly"]
    assert [made["function"]["name"] for made in sent["tools"]] == ["get_weather", "get_time"]
    assert [sent[name] for name in ("temperature", "seed", "reasoning_effort")] == [0.1, 7, "high"]


# What is added, and what is put in the place of something


def instructions_of(chat: Chat) -> str | None:
    return chat.config.instructions


def test_instructions_are_added_on_a_line_of_their_own_or_put_in_the_place_of_others(memory: Store):
    chat = create_chat(memory, model="m", instructions="Be brief.")
    assert instructions_of(chat.with_instructions("Be kind.")) == "Be brief.\nBe kind."
    assert instructions_of(chat.system("Rhyme.")) == "Be brief.\nBe kind.\nRhyme."
    assert instructions_of(chat.with_instructions(None)) == "Be brief.\nBe kind.\nRhyme."
    assert instructions_of(chat.with_instructions("Be a pirate.", replace=True)) == "Be a pirate."
    assert instructions_of(chat.system(None, replace=True)) is None
    assert chat.instructions is None
    assert chat.record.instructions == "Be brief."


def test_another_model_is_not_called_at_the_first_ones_provider(store: Store, ask: Ask):
    llm = ScriptedLLM("One.", "Two.", "Three.")
    chat = create_chat(store, model="first", provider="elsewhere", llm=llm)

    assert ask(chat.with_model("second"), "Hi.").provider == "scripted"
    assert ask(chat.with_model("third", provider="here"), "Hi.").provider == "here"
    assert ask(chat.with_provider(None), "Hi.").provider == "scripted"
    assert [sent["model"] for sent in llm.requests] == ["second", "third", "third"]


def test_params_headers_and_thinking_are_added_to_those_that_are_there(memory: Store):
    chat = create_chat(memory, model="m", params={"seed": 1, "top_p": 1}, headers={"a": "1"}, thinking={"budget": 9})
    chat.with_params(seed=2).with_headers(b="2").with_thinking(effort="low")
    options = chat.options
    assert (options.params, options.headers) == ({"seed": 2, "top_p": 1}, {"a": "1", "b": "2"})
    assert options.thinking == {"budget": 9, "effort": "low"}


def test_an_effort_takes_the_place_of_a_providers_own_shape_of_thinking(memory: Store):
    own = {"type": "enabled", "budget_tokens": 2000}
    assert create_chat(memory, model="m", thinking=own).with_effort("low").options.thinking == {"effort": "low"}
    assert create_chat(memory, model="m", thinking=own, effort="low").options.thinking == {"effort": "low"}
    assert create_chat(memory, model="m", effort="low").with_thinking(budget=5).options.thinking == {
        "effort": "low",
        "budget": 5,
    }


def test_tools_are_added_or_put_in_the_place_of_others_and_none_twice(memory: Store):
    chat = create_chat(memory, model="m", tools=[get_weather])
    assert list(chat.with_tool(get_time).options.toolbox.by_name) == ["get_weather", "get_time"]
    with pytest.raises(InvalidValue, match="two tools are named 'get_time'"):
        chat.with_tools(get_time)
    assert list(chat.options.toolbox.by_name) == ["get_weather", "get_time"]
    assert list(chat.with_tools(get_time, replace=True).options.toolbox.by_name) == ["get_time"]
    assert list(chat.with_tools(replace=True).options.toolbox.by_name) == []


def test_middlewares_of_the_chat_are_added_behind_those_of_the_store(store: Store, ask: Ask):
    llm = ScriptedLLM("Hi.", "Hi.")
    store.use(Whisper("store"))
    chat = create_chat(store, model="m", llm=llm, middlewares=[Whisper("keyword")]).use(Whisper("one"), Whisper("two"))

    ask(chat, "Hi.")

    said = [each["content"] for each in llm.requests[0]["messages"]]
    assert said == ["Hi.", "store", "keyword", "one", "two"]


def test_a_schema_or_fallbacks_can_be_done_away_with(store: Store, ask: Ask):
    llm = ScriptedLLM(ProviderError(500))
    chat = create_chat(store, model="m", llm=llm, retries=0, schema=Number, fallbacks=["second"])
    chat.with_schema(None).with_fallbacks()

    with pytest.raises(ProviderError):
        ask(chat, "Hi.")

    assert len(llm.requests) == 1
    assert "response_format" not in llm.requests[0]


# What is refused


WRONG: dict[str, Callable[[Chat], Any]] = {
    "model must be a string": lambda chat: chat.with_model(5),  # type: ignore[arg-type]
    "provider must be a string": lambda chat: chat.with_provider(5),  # type: ignore[arg-type]
    "instructions must be a string": lambda chat: chat.with_instructions(5),  # type: ignore[arg-type]
    "temperature must be a number": lambda chat: chat.with_temperature("hot"),  # type: ignore[arg-type]
    "params must be keywords": lambda chat: chat.with_params(num_retries=3),
    "headers must be strings": lambda chat: chat.with_headers(tenant=1),  # type: ignore[arg-type]
    "needs effort=": lambda chat: chat.with_thinking(),
    "thinking must be": lambda chat: chat.with_thinking(budget="much"),  # type: ignore[arg-type]
    "thinking with 'effort'": lambda chat: chat.with_effort(3),  # type: ignore[arg-type]
    "corrections must be 0": lambda chat: chat.with_schema(Number, corrections=-1),
    "tool_choice must be": lambda chat: chat.with_tool_choice(""),
    "fallbacks must be names": lambda chat: chat.with_fallbacks(["one", "two"]),  # type: ignore[arg-type]
    "exception classes or their names": lambda chat: chat.with_fallbacks("one", on=429),
    "is not a tool": lambda chat: chat.with_tool("get_weather"),
    "is not a middleware": lambda chat: chat.use("CostGuard"),
    "needs a function": lambda chat: chat.before_request("print"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_value_is_refused_where_it_is_said_and_leaves_the_chat_as_it_was(memory: Store, message: str):
    chat = create_chat(memory, model="m", llm=ScriptedLLM("Hi."))
    before = chat.config
    with pytest.raises(InvalidValue, match=message):
        WRONG[message](chat)
    assert chat.config == before
    assert chat.ask("Hi.").content == "Hi."


@pytest.mark.parametrize("thinking", [{}, {"effort": 1}, {"budget": -1}, {"budget": True}, {"how": "hard"}, "low"])
def test_thinking_that_no_model_could_take_is_refused(memory: Store, thinking: Any):
    with pytest.raises(InvalidValue, match="thinking"):
        create_chat(memory, model="m", thinking=thinking)


def test_a_param_that_cannot_be_copied_is_passed_as_it_is(store: Store, ask: Ask):
    class Client:
        lock = threading.Lock()

        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("a client cannot be copied")

    client, got = Client(), []

    class Model(ScriptedLLM):
        def _next(self, keywords: dict[str, Any]) -> Any:
            got.append(keywords.pop("client"))
            return super()._next(keywords)

    ask(create_chat(store, model="m", llm=Model("Hi."), params={"client": client}), "Hi.")
    assert got == [client]


# A turn goes on as it began


def change_everything(chat: Chat) -> None:
    chat.with_model("other", provider="elsewhere").with_instructions("Be a pirate.", replace=True)
    chat.with_temperature(0.9).with_params(seed=9).with_headers(b="2").with_effort("high").with_schema(Number)
    chat.with_tools(get_time, replace=True).with_tool_choice("get_time").use(WHISPER)
    for name in ("before_request", "after_response", "on_new_message", "on_end_message", "on_tool_result"):
        getattr(chat, name)(fail)
    for name in ("on_tool_call_start", "on_tool_call_end", "on_tool_call_error"):
        getattr(chat, name)(fail)


class TooLate(Exception):
    pass


def fail(*_: Any) -> None:
    raise TooLate


BEGAN = {
    "model": "first",
    "temperature": 0.1,
    "seed": 1,
    "extra_headers": {"a": "1"},
    "reasoning_effort": "low",
}


def check_unchanged(llm: ScriptedLLM, chat: Chat, ask: Ask) -> None:
    """Every call went on as the first one began; and the next turn is another."""
    for sent in llm.requests:
        assert {name: sent[name] for name in BEGAN} == BEGAN
        assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
        assert [made["function"]["name"] for made in sent["tools"]] == [
            made["function"]["name"] for made in llm.requests[0]["tools"]
        ]
        assert not {"response_format", "tool_choice", "custom_llm_provider"} & set(sent)
    assert chat.messages()[-1].content == "Done."
    assert chat.model == "other"
    with pytest.raises(TooLate):
        ask(chat, "Again.")


def chat_that_changes(store: Store, llm: ScriptedLLM, *tools: Any) -> Chat:
    return create_chat(
        store,
        model="first",
        llm=llm,
        instructions="Be brief.",
        tools=[get_weather, *tools],
        temperature=0.1,
        params={"seed": 1},
        headers={"a": "1"},
        effort="low",
        retries=0,
    )


HOOKS = ("before_request", "after_response", "on_new_message", "on_tool_call_start", "on_tool_call_end")


@pytest.mark.parametrize("name", HOOKS)
def test_a_change_made_in_a_hook_does_not_touch_the_turn(store: Store, ask: Ask, name: str):
    llm = ScriptedLLM([LONDON, LONDON], [LONDON], "Done.")
    chat = chat_that_changes(store, llm)
    changed: list[bool] = []

    def change(*_: Any) -> None:
        if not changed:
            changed.append(True)
            change_everything(chat)

    getattr(chat, name)(change)
    ask(chat, "Weather?")
    check_unchanged(llm, chat, ask)


def test_a_change_made_in_a_tool_does_not_touch_the_turn(store: Store, ask: Ask):
    llm = ScriptedLLM([Call("change"), LONDON], [LONDON], "Done.")

    @tool
    def change() -> str:
        change_everything(chat)
        return "changed"

    chat = chat_that_changes(store, llm, change)
    ask(chat, "Change!")
    assert rows(store, "tool_call", "status") == [("completed",)] * 3
    check_unchanged(llm, chat, ask)


def test_a_change_made_on_another_thread_does_not_touch_the_turn(store: Store, ask: Ask):
    def model(keywords: dict[str, Any]) -> Any:
        thread = threading.Thread(target=change_everything, args=(chat,))
        thread.start()
        thread.join()
        return [LONDON]

    llm = ScriptedLLM(model, "Done.")
    chat = chat_that_changes(store, llm)
    ask(chat, "Weather?")
    check_unchanged(llm, chat, ask)


def test_a_change_made_between_two_chunks_does_not_touch_the_turn(store: Store):
    llm = ScriptedLLM([LONDON], [LONDON], "Done.")
    chat = chat_that_changes(store, llm)
    changed = False
    for _ in chat.ask_stream("Weather?"):
        if not changed:
            changed = True
            change_everything(chat)
    check_unchanged(llm, chat, WAYS["ask_stream"])


def test_a_fallback_that_is_taken_away_meanwhile_is_there_for_the_turn(store: Store, ask: Ask):
    def model(keywords: dict[str, Any]) -> Any:
        chat.with_fallbacks()
        return ProviderError(500)

    llm = ScriptedLLM(model, "Done.", ProviderError(500))
    chat = create_chat(store, model="first", llm=llm, fallbacks="second", retries=0)
    assert ask(chat, "Hi.").model_id == "second"
    with pytest.raises(ProviderError):
        ask(chat, "Again.")


def test_a_dict_of_the_callers_that_changes_in_a_turn_does_not_touch_it(store: Store, ask: Ask):
    params: dict[str, Any] = {"seed": 1, "extra_body": {"a": [1]}}
    headers, thinking = {"x-tenant": "t_1"}, {"effort": "low"}

    @tool
    def change() -> str:
        params["extra_body"]["a"].append(2)
        params.update(seed=2)
        headers.clear()
        thinking.update(effort="high")
        return "changed"

    llm = ScriptedLLM([Call("change")], "Done.")
    chat = create_chat(store, model="m", llm=llm, params=params, headers=headers, thinking=thinking, tools=[change])
    ask(chat, "Change!")
    for sent in llm.requests:
        assert (sent["seed"], sent["extra_body"], sent["reasoning_effort"]) == (1, {"a": [1]}, "low")
        assert sent["extra_headers"] == {"x-tenant": "t_1"}


# Which tool the model must call


def choices(llm: ScriptedLLM) -> list[Any]:
    return [sent.get("tool_choice") for sent in llm.requests]


BY_NAME = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize(("choice", "sent"), [("get_weather", BY_NAME), ("required", "required")])
def test_a_forced_choice_of_tool_holds_until_tools_have_run(store: Store, ask: Ask, choice: str, sent: Any):
    llm = ScriptedLLM(ProviderError(500), [LONDON], [LONDON], "Done.", "Hello.")
    chat = create_chat(store, model="m", llm=llm, tools=[get_weather], tool_choice=choice, retries=AT_ONCE)

    assert ask(chat, "Weather?").content == "Done."

    assert choices(llm) == [sent, sent, None, None]
    ask(chat, "And now?")
    assert choices(llm)[-1] == sent


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_choice_that_forces_nothing_is_sent_with_every_call(store: Store, ask: Ask, choice: str):
    llm = ScriptedLLM([LONDON], "Done.")
    ask(create_chat(store, model="m", llm=llm, tools=[get_weather]).with_tool_choice(choice), "Weather?")
    assert choices(llm) == [choice, choice]


@pytest.mark.parametrize(
    ("choice", "tools", "message"),
    [
        ("get_time", [get_weather], "tool_choice='get_time' names no tool of this chat; it has get_weather"),
        ("get_time", [], "it has none"),
        ("required", [], "tool_choice='required' needs tools"),
    ],
)
def test_a_choice_of_no_tool_there_is_is_refused_before_anything_is_written(
    store: Store, ask: Ask, choice: str, tools: list[Any], message: str
):
    chat = create_chat(store, model="m", llm=ScriptedLLM("Hi."), tools=tools, tool_choice=choice)
    with pytest.raises(InvalidValue, match=message):
        ask(chat, "Hi.")
    assert rows(store, "message", "role") == []
    assert ask(chat, "Hi.", tool_choice=None).content == "Hi."


def test_no_choice_is_sent_where_there_are_no_tools(store: Store, ask: Ask):
    """OpenAI refuses one."""
    llm = ScriptedLLM("Hi.")
    ask(create_chat(store, model="m", llm=llm, tool_choice="auto"), "Hi.")
    assert choices(llm) == [None]

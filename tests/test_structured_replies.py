"""Replies that are objects: what the model is told, what is stored, and what comes back."""

import itertools
import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Literal

import pydantic
import pytest
from conftest import WAYS, Ask, rows
from provider import Answer, Provider
from provider import Call as Called

from llm_orm import (
    CONTINUE,
    LLM,
    REPLACE,
    STOP,
    Agent,
    Chat,
    InvalidReply,
    InvalidValue,
    Middleware,
    Reply,
    SchemaSelfCorrection,
    StoppedByMiddleware,
    Store,
    TurnContext,
    create_agent_session,
    create_chat,
    load_agent_session,
    load_chat,
    tool,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM


class City(pydantic.BaseModel):
    name: str
    population: int


PARIS, WITHOUT = '{"name": "Paris", "population": 2102650}', '{"name": "Paris"}'
CITY = City(name="Paris", population=2102650)
TOLD = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "population": {"type": "integer"}},
    "required": ["name", "population"],
    "additionalProperties": False,
}
JSON_SCHEMA = {**TOLD, "title": "City"}

LONDON = Call("get_weather", city="London")


@tool
def get_weather(city: str) -> str:
    """Current weather in a city."""
    return f"rain in {city}"


def chat_with(store: Store, *script: Any, **options: Any) -> Chat:
    return create_chat(store, model="test", llm=ScriptedLLM(*script), **options)


def sent(chat: Chat, number: int = -1) -> list[tuple[str, Any]]:
    """What the model was shown on a call."""
    messages = chat.options.llm.requests[number]["messages"]
    return [(message["role"], message["content"]) for message in messages]


def formats(chat: Chat) -> list[Any]:
    """The name of the schema that each call was made with."""
    requests = chat.options.llm.requests
    return [request.get("response_format", {}).get("json_schema", {}).get("name") for request in requests]


# What a chat is given, and gives


def test_a_reply_is_an_instance_of_the_model_and_its_text_is_stored_as_it_came(store: Store, ask: Ask):
    """NodeLLM's C2: a chat with a schema crashed."""
    chat = chat_with(store, PARIS, schema=City)
    reply = ask(chat, "Which city?")
    assert reply.parsed == CITY
    assert reply.content == PARIS
    assert rows(store, "message", "role", "status", "content", "content_raw") == [
        ("user", "completed", "Which city?", None),
        ("assistant", "completed", PARIS, None),
    ]
    assert rows(store, "request", "correction_rounds") == [(None,)]


def test_the_model_is_told_the_schema_strictly(store: Store, ask: Ask):
    chat = chat_with(store, PARIS, schema=City)
    ask(chat, "Which city?")
    assert chat.options.llm.requests[0]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "City", "schema": TOLD, "strict": True},
    }


class Guide(Agent):
    model = "test"
    schema = City


def _loaded(store: Store, llm: Any) -> Chat:
    chat = load_chat(store, create_chat(store, model="test").id, llm=llm, schema=City)
    assert chat is not None
    return chat


def _loaded_session(store: Store, llm: Any) -> Chat:
    session = load_agent_session(store, Guide, create_agent_session(store, Guide).id, llm=llm)
    assert session is not None
    return session


PLACES: dict[str, Callable[[Store, Any], Chat]] = {
    "create_chat": lambda store, llm: create_chat(store, model="test", llm=llm, schema=City),
    "load_chat": _loaded,
    "with_schema": lambda store, llm: create_chat(store, model="test", llm=llm).with_schema(City),
    "agent": lambda store, llm: create_agent_session(store, Guide, llm=llm),
    "loaded agent": _loaded_session,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_schema_can_be_given_wherever_an_option_can(store: Store, ask: Ask, place: str):
    chat = PLACES[place](store, ScriptedLLM(WITHOUT, PARIS))
    assert ask(chat, "Which city?").parsed == CITY
    assert formats(chat) == ["City", "City"]
    assert chat.messages()[1].parsed == CITY


def test_a_schema_for_one_ask_is_gone_with_it(store: Store, ask: Ask):
    chat = chat_with(store, PARIS, "Hello!")
    assert ask(chat, "Which city?", schema=City).parsed == CITY
    assert ask(chat, "Hi").parsed is None
    assert formats(chat) == ["City", None]


def test_no_schema_for_one_ask_is_plain_text(store: Store, ask: Ask):
    chat = chat_with(store, PARIS, "Hello!", PARIS, schema=City)
    ask(chat, "Which city?")
    reply = ask(chat, "Hi", schema=None)
    assert (reply.content, reply.parsed) == ("Hello!", None)
    ask(chat, "And again?")
    assert formats(chat) == ["City", None, "City"]
    assert [message.parsed for message in chat.messages()] == [None, CITY, None, None, None, CITY]
    assert ask(chat_with(store, "Hello!", schema=City).with_schema(None), "Hi").content == "Hello!"


def test_a_stored_reply_is_an_instance_again_after_a_reload(store: Store, ask: Ask):
    chat = chat_with(store, "Hello!", PARIS)
    ask(chat, "Hi")
    ask(chat, "Which city?", schema=City)
    with_it, without = load_chat(store, chat.id, schema=City), load_chat(store, chat.id)
    assert with_it is not None
    assert without is not None
    assert [message.parsed for message in with_it.messages()] == [None, None, None, CITY]
    assert [message.parsed for message in without.messages()] == [None] * 4
    assert without.with_schema(JSON_SCHEMA).messages()[-1].parsed == json.loads(PARIS)


def test_what_the_user_says_is_never_taken_for_a_reply(store: Store, ask: Ask):
    chat = chat_with(store, PARIS, schema=City)
    ask(chat, PARIS)
    assert [message.parsed for message in chat.messages()] == [None, CITY]


@pytest.mark.parametrize(
    "given",
    [
        JSON_SCHEMA,
        {"name": "City", "schema": TOLD, "strict": True},
        {"type": "json_schema", "json_schema": {"name": "City", "schema": TOLD, "strict": True}},
    ],
    ids=["alone", "named", "response_format"],
)
def test_a_json_schema_gives_plain_json_and_is_held_to(store: Store, ask: Ask, given: dict[str, Any]):
    chat = chat_with(store, '{"name": "Paris", "population": "many"}', PARIS, schema=given)
    assert ask(chat, "Which city?").parsed == {"name": "Paris", "population": 2102650}
    assert "population: 'many' is not of type 'integer'" in sent(chat)[-1][1]
    assert chat.options.llm.requests[0]["response_format"]["json_schema"] == {
        "name": "City",
        "schema": TOLD,
        "strict": True,
    }


@pytest.mark.parametrize(
    ("schema", "said", "value"),
    [
        (list[City], f'{{"value": [{PARIS}]}}', [CITY]),
        (Literal["yes", "no"], '{"value": "no"}', "no"),
        (int, '{"value": 3}', 3),
        ({"type": "array", "items": {"type": "integer"}}, '{"value": [1, 2]}', [1, 2]),
    ],
    ids=["list", "literal", "int", "json schema"],
)
def test_what_is_no_object_is_asked_for_within_one(store: Store, ask: Ask, schema: Any, said: str, value: Any):
    chat = chat_with(store, '{"value": null}', said, schema=schema)
    reply = ask(chat, "Well?")
    assert (reply.parsed, reply.content) == (value, said)
    told = chat.options.llm.requests[0]["response_format"]["json_schema"]
    assert (told["schema"]["type"], list(told["schema"]["properties"])) == ("object", ["value"])
    assert load_chat(store, chat.id, schema=schema).messages()[1].parsed == value  # type: ignore[union-attr]


def test_json_in_a_fence_is_read_and_stored_as_it_came(store: Store, ask: Ask):
    fenced = f"```json\n{PARIS}\n```"
    reply = ask(chat_with(store, fenced, schema=City), "Which city?")
    assert (reply.parsed, reply.content) == (CITY, fenced)


def test_what_is_no_schema_is_refused_before_anything_is_written(store: Store):
    chat = chat_with(store, PARIS)
    for give in (
        lambda given: create_chat(store, model="test", schema=given),
        lambda given: chat.with_schema(given),
        lambda given: chat.ask("Which city?", schema=given),
    ):
        for given in (42, "City", {"type": "nonsense"}, lambda: City):
            with pytest.raises(InvalidValue, match="schema"):
                give(given)
    for corrections in (-1, "many", None):
        with pytest.raises(InvalidValue, match="corrections"):
            chat.ask("Which city?", schema=City, corrections=corrections)  # type: ignore[arg-type]
    assert rows(store, "chat", "id") == [(chat.id,)]
    assert rows(store, "message", "id") == []


# What does not match


def test_a_reply_that_does_not_match_is_corrected_and_is_not_history(store: Store, ask: Ask):
    """NodeLLM's C9: the model was never told what was wrong."""
    chat = chat_with(store, "Paris, I think.", WITHOUT, PARIS, PARIS, schema=City)
    reply = ask(chat, "Which city?")
    assert reply.parsed == CITY
    question, first, no_json, second, missing = sent(chat)
    assert question == ("user", "Which city?")
    assert (first, second) == (("assistant", "Paris, I think."), ("assistant", WITHOUT))
    wrong = "Your previous reply did not match the required JSON schema. "
    assert no_json[1].startswith(f"{wrong}the reply is not valid JSON")
    assert missing[1] == f"{wrong}population: Field required\n\nAnswer with the corrected JSON only."
    assert rows(store, "request", "round", "status_code", "error", "correction_rounds") == [
        (0, 200, None, None),
        (1, 200, None, 1),
        (2, 200, None, 2),
    ]
    assert formats(chat) == ["City"] * 3
    assert rows(store, "message", "role", "content", "content_raw") == [
        ("user", "Which city?", None),
        ("assistant", PARIS, None),
    ]
    assert reply.input_tokens == sum(row.input_tokens for row in chat.requests())

    ask(chat, "And now?")
    assert sent(chat) == [("user", "Which city?"), ("assistant", PARIS), ("user", "And now?")]


def test_past_the_last_correction_the_error_carries_the_raw_text(store: Store, ask: Ask):
    chat = chat_with(store, "No.", "Never.", Say(WITHOUT, cost="0.5", output_tokens=3), schema=City)
    expected = (
        r"the reply of 'test' does not match the schema 'City', after 2 corrections: population: Field required; "
        r"it is in \.text"
    )
    with pytest.raises(InvalidReply, match=expected) as raised:
        ask(chat, "Which city?")
    error = raised.value
    assert (error.text, error.problem) == (WITHOUT, "population: Field required")
    assert (error.reply.content, error.reply.usage.output_tokens, error.reply.cost) == (WITHOUT, 3, Decimal("0.5"))
    assert rows(store, "message", "role", "content") == [("user", "Which city?")]
    assert rows(store, "request", "status_code", "correction_rounds") == [(200, None), (200, 1), (200, 2)]
    assert chat.stats().cost == Decimal("0.5")

    chat.options.llm.add(PARIS)
    assert chat.retry().parsed == CITY


@pytest.mark.parametrize("corrections", [0, 1, 3])
def test_it_is_corrected_as_often_as_was_said(store: Store, ask: Ask, corrections: int):
    chat = chat_with(store, *["No."] * 9, schema=City, corrections=corrections)
    with pytest.raises(InvalidReply) as raised:
        ask(chat, "Which city?")
    assert raised.value.text == "No."
    assert rows(store, "request", "correction_rounds") == [(number or None,) for number in range(corrections + 1)]
    assert len(chat.options.llm.requests) == corrections + 1


def test_corrections_can_be_set_beside_the_schema_and_for_one_ask(store: Store, ask: Ask):
    chat = chat_with(store, "No.", "No.", PARIS).with_schema(City, corrections=0)
    with pytest.raises(InvalidReply):
        ask(chat, "Which city?")
    assert ask(chat, "Which city?", corrections=1).parsed == CITY


def test_an_invalid_reply_is_kept_as_a_failed_one_where_failures_are(store: Store, ask: Ask):
    chat = chat_with(store, WITHOUT, PARIS, schema=City, corrections=0, on_error="keep")
    with pytest.raises(InvalidReply):
        ask(chat, "Which city?")
    assert rows(store, "message", "role", "status", "content")[1:] == [("assistant", "failed", WITHOUT)]
    assert chat.messages()[1].parsed is None
    assert chat.retry().parsed == CITY
    assert rows(store, "message", "role", "status", "content")[1:] == [("assistant", "completed", PARIS)]


def test_an_invalid_reply_after_corrections_is_kept_as_it_was_last_said(store: Store, ask: Ask):
    chat = chat_with(store, "No.", WITHOUT, "Hello!", schema=City, corrections=1, on_error="keep")
    with pytest.raises(InvalidReply):
        ask(chat, "Which city?")
    assert rows(store, "message", "status", "content", "content_raw")[1:] == [("failed", WITHOUT, None)]
    ask(chat, "Hi", schema=None)
    assert sent(chat) == [("user", "Which city?"), ("assistant", WITHOUT), ("user", "Hi")]


def test_a_failed_reply_is_no_object_even_where_it_matches(store: Store, ask: Ask):
    class Stop(Middleware):
        def on_response(self, context: TurnContext, reply: Reply) -> Any:
            return STOP

    chat = chat_with(store, PARIS, schema=City, middlewares=[Stop()], on_error="keep")
    with pytest.raises(StoppedByMiddleware):
        ask(chat, "Which city?")
    (_, failed) = chat.messages()
    assert (failed.status, failed.content, failed.parsed) == ("failed", PARIS, None)


@pytest.mark.parametrize(
    "said", [Say(None), Say(PARIS[:20], finish_reason="length"), "null", "[]"], ids=["empty", "cut off", "null", "list"]
)
def test_whatever_else_is_said_is_corrected(store: Store, ask: Ask, said: Any):
    chat = chat_with(store, said, PARIS, schema=City)
    assert ask(chat, "Which city?").parsed == CITY
    assert sent(chat)[-1][0] == "user"
    assert all(content for _, content in sent(chat))  # no provider takes an empty message


def test_what_a_validator_of_the_model_says_reaches_the_model(store: Store, ask: Ask):
    class Capital(City):
        @pydantic.field_validator("name")
        @classmethod
        def is_a_capital(cls, name: str) -> str:
            if name != "Paris":
                raise ValueError(f"{name} is no capital")
            return name

    chat = chat_with(store, PARIS.replace("Paris", "Lyon"), PARIS, schema=Capital)
    assert ask(chat, "Which city?").parsed == Capital(name="Paris", population=2102650)
    assert "name: Value error, Lyon is no capital" in sent(chat)[-1][1]


def test_a_correction_of_ones_own_takes_the_place_of_the_chats(store: Store, ask: Ask):
    chat = chat_with(store, "No.", "No.", PARIS, schema=City, corrections=1, middlewares=[SchemaSelfCorrection(9)])
    assert ask(chat, "Which city?").parsed == CITY
    store.use(SchemaSelfCorrection(max_retries=1))
    with pytest.raises(InvalidReply):
        ask(chat_with(store, "No.", "No.", PARIS, schema=City), "Which city?")


def test_a_correction_is_made_whatever_other_middlewares_say(store: Store, ask: Ask):
    class Content(Middleware):
        def on_response(self, context: TurnContext, reply: Reply) -> Any:
            return CONTINUE

    store.use(Content())
    assert ask(chat_with(store, "No.", PARIS, schema=City, middlewares=[Content()]), "Which city?").parsed == CITY


def test_a_middleware_is_told_the_schema_and_of_each_attempt(store: Store, ask: Ask):
    heard: list[Any] = []

    class Listener(Middleware):
        def on_response(self, context: TurnContext, reply: Reply) -> None:
            heard.append((context.schema.name, context.correction_rounds, reply.content))

    ask(chat_with(store, "No.", PARIS, schema=City, middlewares=[Listener()]), "Which city?")
    assert heard == [("City", 0, "No."), ("City", 1, PARIS)]


def test_an_invalid_reply_can_be_replaced_by_a_text(store: Store, ask: Ask):
    class Sorry(Middleware):
        def on_error(self, context: TurnContext, error: Exception) -> REPLACE:
            assert isinstance(error, InvalidReply)
            return REPLACE(f"Sorry: {error.text}")

    reply = ask(chat_with(store, "No.", schema=City, corrections=0, middlewares=[Sorry()]), "Which city?")
    assert (reply.content, reply.parsed) == ("Sorry: No.", None)


def test_what_takes_a_replys_place_must_match_too(store: Store, ask: Ask):
    class Other(Middleware):
        def on_response(self, context: TurnContext, reply: Reply) -> REPLACE:
            return REPLACE(reply.content.replace("Paris", "Lyon") if context.round == 0 else "No.")  # type: ignore[union-attr]

    chat = chat_with(store, PARIS, schema=City, middlewares=[Other()])
    assert ask(chat, "Which city?").parsed == City(name="Lyon", population=2102650)
    chat = chat_with(store, PARIS, PARIS, schema=City, middlewares=[Other()], corrections=0)
    chat.after_response(lambda reply: Reply(content="Yes."))
    chat.use(SchemaSelfCorrection(1))
    with pytest.raises(InvalidReply, match="after 1 correction: ") as raised:
        ask(chat, "Which city?")
    assert raised.value.text == "No."


def test_a_failed_call_is_a_failed_call_and_no_correction(store: Store, ask: Ask):
    chat = chat_with(store, ProviderError(400), "No.", PARIS, schema=City, fallbacks="other")
    with pytest.raises(ProviderError):
        ask(chat, "Which city?")
    chat = chat_with(store, ProviderError(500), "No.", PARIS, schema=City, fallbacks="other", retries=0)
    assert ask(chat, "Which city?").parsed == CITY
    requests = [(row.model, row.status_code, row.correction_rounds) for row in chat.requests()]
    assert requests == [("test", 500, None), ("other", 200, None), ("other", 200, 1)]
    assert formats(chat) == ["City"] * 3


# In streams, with tools, after a wait


@pytest.mark.parametrize("way", ["ask_stream", "aask_stream"])
def test_a_stream_shows_each_attempt_and_says_where_the_next_one_begins(store: Store, way: str):
    chat = chat_with(store, "No idea.", PARIS, schema=City)
    if way == "aask_stream":
        assert WAYS[way](chat, "Which city?").parsed == CITY
        return
    stream = chat.ask_stream("Which city?")
    chunks = list(stream)
    assert [chunk.content for chunk in itertools.takewhile(lambda chunk: not chunk.restart, chunks)] == ["No ", "idea."]
    assert [chunk.restart for chunk in chunks].count(True) == 1
    last = [chunk.content for chunk in itertools.dropwhile(lambda chunk: not chunk.restart, chunks)]
    assert "".join(last) == PARIS
    assert stream.message is not None
    assert stream.message.parsed == CITY


def test_a_stream_that_stays_wrong_ends_in_the_same_error(store: Store):
    stream = chat_with(store, "No.", "Never.", schema=City, corrections=1).ask_stream("Which city?")
    with pytest.raises(InvalidReply) as raised:
        list(stream)
    assert raised.value.text == "Never."
    assert stream.message is None


def test_tools_are_used_first_and_the_last_word_is_the_object(store: Store, ask: Ask):
    script = [Say("Let me look.", calls=[LONDON]), WITHOUT, PARIS, "Bye."]
    chat = chat_with(store, *script, schema=City, tools=[get_weather])
    assert ask(chat, "Which city?").parsed == CITY
    assert formats(chat) == ["City"] * 3
    assert rows(store, "tool_call", "status", "result") == [("completed", "rain in London")]
    assert rows(store, "request", "correction_rounds") == [(None,), (None,), (1,)]
    ask(chat, "Thanks.", schema=None)
    assert sent(chat) == [
        ("user", "Which city?"),
        ("assistant", "Let me look."),
        ("tool", "rain in London"),
        ("assistant", PARIS),
        ("user", "Thanks."),
    ]


def test_a_corrected_model_may_use_tools_first(store: Store, ask: Ask):
    chat = chat_with(store, "No.", LONDON, PARIS, schema=City, tools=[get_weather])
    reply = ask(chat, "Which city?")
    assert reply.parsed == CITY
    assert "No." not in str(reply.content_raw)


def test_a_turn_that_waited_for_a_person_ends_in_the_object(store: Store, ask: Ask):
    @tool(requires_approval=True)
    def pay() -> str:
        return "paid"

    chat = chat_with(store, Call("pay"), WITHOUT, PARIS, schema=City, tools=[pay])
    waiting = ask(chat, "Which city?")
    assert (waiting.status, waiting.parsed) == ("pending", None)
    chat.approve(chat.pending_approvals()[0])
    assert chat.resume().parsed == CITY
    assert rows(store, "request", "correction_rounds") == [(None,), (None,), (1,)]


def test_a_reply_that_was_there_when_its_process_died_is_the_object_once_resumed(store: Store, ask: Ask):
    chat = chat_with(store, PARIS, schema=City)
    reply = ask(chat, "Which city?")
    message: Any = store.records.message
    with store.connection():
        message.update(status="pending").where(message.id == reply.id).execute()
    again = load_chat(store, chat.id, llm=ScriptedLLM(), model="test", schema=City)
    assert again is not None
    assert again.resume(stale_after=0).parsed == CITY


# On the wire


def chat_on(store: Store, provider: Provider, wire: str, **options: Any) -> Chat:
    settings = getattr(provider, wire)()
    model = options.pop("model", settings.pop("model"))
    settings.pop("model", None)
    return create_chat(store, model=model, llm=LLM(**settings), retries=0, schema=City, **options)


FORMATS: dict[str, Callable[[Any], Any]] = {
    "openai": lambda body: body["response_format"],
    "anthropic": lambda body: body["output_format"],
    "gemini": lambda body: body["generationConfig"],
}
EXPECTED: dict[str, Any] = {
    "openai": {"type": "json_schema", "json_schema": {"name": "City", "schema": TOLD, "strict": True}},
    "anthropic": {"type": "json_schema", "schema": TOLD},
    "gemini": {"response_mime_type": "application/json", "response_json_schema": TOLD},
}


@pytest.mark.parametrize("way", ["ask", "aask_stream"])
@pytest.mark.parametrize("wire", FORMATS)
def test_each_provider_is_asked_in_its_own_words_and_its_reply_is_read(
    store: Store, provider: Provider, wire: str, way: str
):
    chat = chat_on(store, provider, wire, tools=[get_weather])
    provider.reply(Answer(tool_calls=[Called("get_weather", {"city": "London"})]), WITHOUT, PARIS)
    assert WAYS[way](chat, "Which city?").parsed == CITY
    assert [FORMATS[wire](request.body) for request in provider.requests] == [EXPECTED[wire]] * 3
    assert all(request.body["tools"] for request in provider.requests)
    assert "population: Field required" in str(provider.requests[-1].body)

    provider.reply("Hello!")
    assert WAYS[way](chat, "Hi", schema=None).content == "Hello!"
    assert not {"response_format", "output_format", "generationConfig"} & provider.requests[-1].body.keys()


@pytest.mark.parametrize("way", ["ask", "ask_stream"])
def test_a_model_that_knows_of_no_schemas_is_given_a_tool_for_it_and_nobody_notices(
    store: Store, provider: Provider, way: str
):
    chat = chat_on(store, provider, "anthropic", model="anthropic/claude-3-7-sonnet-20250219")
    provider.reply(Answer(tool_calls=[Called("json_tool_call", json.loads(PARIS))]))
    reply = WAYS[way](chat, "Which city?")
    assert (reply.parsed, json.loads(reply.content), reply.content_raw) == (CITY, json.loads(PARIS), None)
    assert rows(store, "tool_call", "name") == []
    (request,) = provider.requests
    assert [made["name"] for made in request.body["tools"]] == ["json_tool_call"]

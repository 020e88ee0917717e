"""What a provider, or a library, sends that makes no sense: it is on record, and what it cost with it."""

import contextlib
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import WAYS, Ask, rows
from provider import Answer, Provider
from provider import Call as WireCall
from pydantic import BaseModel

from llm_orm import (
    LLM,
    Chat,
    Halt,
    LlmOrmError,
    Middleware,
    Reply,
    ReplyNotSaved,
    Store,
    UnreadableReply,
    create_chat,
    tool,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM


class OneReply(ScriptedLLM):
    """Answers with an object of the test's own, streamed in one part or whole."""

    def __init__(self, message: Any, **envelope: Any):
        super().__init__("")
        self.message = message
        self.usage = SimpleNamespace(prompt_tokens=1000, completion_tokens=50)
        self.fields = envelope

    def _whole(self, say: Any, keywords: dict[str, Any]) -> Any:
        choices = [] if self.message is None else [SimpleNamespace(message=self.message, finish_reason="stop")]
        return SimpleNamespace(id="r", model="m", choices=choices, **{"usage": self.usage, **self.fields})

    def _parts(self, say: Any, keywords: dict[str, Any]) -> Any:
        delta = [] if self.message is None else [SimpleNamespace(delta=self.message, finish_reason="stop")]
        yield SimpleNamespace(id="r", model="m", choices=delta, **{"usage": self.usage, **self.fields})


class InParts(ScriptedLLM):
    """Streams deltas of the test's own."""

    def __init__(self, *deltas: SimpleNamespace):
        super().__init__("")
        self.deltas = deltas

    def _parts(self, say: Any, keywords: dict[str, Any]) -> Any:
        for number, delta in enumerate(self.deltas, start=1):
            finish_reason = "stop" if number == len(self.deltas) else None
            yield SimpleNamespace(
                id="r", model="m", choices=[SimpleNamespace(delta=delta, finish_reason=finish_reason)]
            )


def fields(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(content="Hi.", provider_specific_fields=values)


def last_round(chat: Chat) -> dict[str, Any]:
    return (chat.messages()[-1].content_raw or {"rounds": [{}]})["rounds"][-1]


def test_a_reply_in_parts_is_stored_as_its_text(store: Store, ask: Ask):
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there."}]
    chat = create_chat(store, model="m", llm=OneReply(SimpleNamespace(content=parts)))

    assert ask(chat, "Hi.").content == "Hello there."


def test_thinking_that_is_no_text_is_stored_as_json(store: Store, ask: Ask):
    chat = create_chat(store, model="m", llm=OneReply(SimpleNamespace(content="Hi.", reasoning_content=5)))

    assert ask(chat, "Hi.").thinking_text == "5"

    assert rows(store, "request", "error", "input_tokens", "output_tokens") == [(None, 1000, 50)]


def test_the_usage_of_a_reply_without_choices_is_on_record(store: Store):
    chat = create_chat(store, model="m", llm=OneReply(None))

    chat.ask("Hi.")

    assert rows(store, "request", "input_tokens", "output_tokens", "usage_estimated") == [(1000, 50, False)]


@pytest.mark.parametrize(
    ("reported", "cost"),
    [("0.25", Decimal("0.25")), ({"total_cost": 0.008}, Decimal("0.008")), ({"input": 1}, None), ("nan", None)],
)
def test_a_cost_that_the_provider_reports_wins_whatever_its_shape(store: Store, ask: Ask, reported: Any, cost: Any):
    llm = OneReply(SimpleNamespace(content="Hi."))
    llm.usage.cost = reported
    chat = create_chat(store, model="m", llm=llm)

    ask(chat, "Hi.")

    assert rows(store, "request", "cost") == [(cost,)]


def test_a_retry_after_that_is_no_number_does_not_hide_the_error(store: Store, ask: Ask):
    error = ProviderError(429, "slow down")
    error.retry_after = "soon"  # type: ignore[assignment]
    chat = create_chat(store, model="m", llm=ScriptedLLM(error), retries=0)

    with pytest.raises(ProviderError, match="slow down"):
        ask(chat, "Hi.")

    assert rows(store, "request", "status_code") == [(429,)]


def test_a_keys_holder_is_searched_for_keys_however_deep(store: Store, ask: Ask):
    class Router(ScriptedLLM):
        model_list = [{"model_name": "m", "litellm_params": {"api_key": "my-private-gateway-key-42"}}]

    llm = Router(ProviderError(401, "bad key my-private-gateway-key-42 and body-secret-99"))
    chat = create_chat(store, model="m", llm=llm, params={"extra_body": {"auth_token": "body-secret-99"}})

    with pytest.raises(ProviderError):
        ask(chat, "Hi.")

    assert rows(store, "request", "error_message") == [("bad key *** and ***",)]


def test_an_emoji_that_came_in_two_halves_is_stored_whole(store: Store):
    chat = create_chat(store, model="m", llm=ScriptedLLM(Say(chunks=["line 1\nhi ", "\ud83d", "\ude00"])))

    list(chat.ask_stream("Hi."))

    assert chat.messages()[-1].content == "line 1\nhi \N{GRINNING FACE}"


def test_what_a_library_writes_into_the_tools_does_not_reach_the_next_call(store: Store, ask: Ask):
    def spoil(keywords: dict[str, Any]) -> str:
        keywords["tools"][0]["function"]["parameters"].clear()
        return "Hi."

    def look(where: str) -> str:
        """Look somewhere."""
        return where

    class Spoiling(ScriptedLLM):
        def completion(self, **keywords: Any) -> Any:
            response = super().completion(**keywords)
            spoil(keywords)
            return response

        async def acompletion(self, **keywords: Any) -> Any:
            response = await super().acompletion(**keywords)
            spoil(keywords)
            return response

    llm = Spoiling("One.", "Two.")
    chat = create_chat(store, model="m", llm=llm, tools=[look])

    ask(chat, "Hi.")
    ask(chat, "Hi.")

    first, second = (request["tools"][0]["function"]["parameters"] for request in llm.requests)
    assert first == second != {}


# What one version of litellm says, and another does not, or elsewhere


@pytest.mark.parametrize("said", [{"refusal": "No."}, {"provider_specific_fields": {"refusal": "No."}}])
def test_a_refusal_is_kept_wherever_litellm_puts_it(store: Store, ask: Ask, said: dict[str, Any]):
    chat = create_chat(store, model="m", llm=OneReply(SimpleNamespace(content=None, **said)))

    ask(chat, "Hi.")

    assert last_round(chat)["provider_specific_fields"] == {"refusal": "No."}


def test_a_refusal_that_comes_in_pieces_is_kept_whole(store: Store):
    chat = create_chat(store, model="m", llm=InParts(SimpleNamespace(refusal="Not "), SimpleNamespace(refusal="this.")))

    list(chat.ask_stream("Hi."))

    assert last_round(chat)["provider_specific_fields"] == {"refusal": "Not this."}


def test_where_a_thinking_block_stood_in_a_stream_is_not_stored(store: Store, ask: Ask):
    block = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
    chat = create_chat(
        store, model="m", llm=OneReply(SimpleNamespace(content="Hi.", thinking_blocks=[{**block, "index": 0}]))
    )

    ask(chat, "Hi.")

    assert last_round(chat)["thinking_blocks"] == [block]


def test_the_reason_for_the_end_is_no_field_of_the_message(store: Store, ask: Ask):
    chat = create_chat(store, model="m", llm=OneReply(fields(stop_reason="refusal", kept="yes")))

    ask(chat, "Hi.")

    assert last_round(chat)["provider_specific_fields"] == {"kept": "yes"}


def test_a_reply_with_calls_ended_for_them_whatever_its_stream_says(store: Store, ask: Ask):
    def look(where: str) -> str:
        """Look somewhere."""
        return where

    script = [Say(calls=[Call("look", where="up")], finish_reason="stop"), "Nothing."]
    chat = create_chat(store, model="m", llm=ScriptedLLM(*script), tools=[look])

    ask(chat, "Look.")

    assert rows(store, "request", "finish_reason") == [("tool_calls",), ("stop",)]


SUMMARY = {"type": "compaction", "content": "They met."}
OPENED = fields(compaction_blocks=[{**SUMMARY, "content": ""}], compaction_start={**SUMMARY, "content": ""})


@pytest.mark.parametrize("more", [{}, {"compaction_blocks": [SUMMARY]}], ids=["said once", "said twice"])
def test_a_compaction_that_was_streamed_is_stored_as_the_block_that_goes_back(store: Store, more: dict[str, Any]):
    summary = fields(compaction_delta={**SUMMARY, "type": "compaction_delta"}, **more)
    chat = create_chat(store, model="m", llm=InParts(OPENED, summary))

    list(chat.ask_stream("Hi."))

    assert last_round(chat)["provider_specific_fields"] == {"compaction_blocks": [SUMMARY]}


@pytest.mark.parametrize("second", [["one", "two"], ["two"]], ids=["from its beginning", "in pieces"])
def test_a_list_is_stored_once_however_its_stream_repeats_it(store: Store, second: list[str]):
    chat = create_chat(store, model="m", llm=InParts(fields(found=["one"]), fields(found=second)))

    list(chat.ask_stream("Hi."))

    assert last_round(chat)["provider_specific_fields"] == {"found": ["one", "two"]}


def test_an_object_among_the_fields_is_stored_as_its_values(store: Store, ask: Ask):
    class Search(BaseModel):
        query: str

    chat = create_chat(store, model="m", llm=OneReply(fields(searches=[Search(query="rain")])))

    ask(chat, "Hi.")

    assert last_round(chat)["provider_specific_fields"] == {"searches": [{"query": "rain"}]}


# What no database can hold, and what no provider takes back: each is stored in a form that loses nothing

NUL, HALF = "a NUL \x00 here", "half \ud83d a character"


class Odd(ScriptedLLM):
    """Answers once with an object of the test's own, whole or as the one part of a stream; then "Fine.", for ever."""

    get_llm_provider = None  # type: ignore[assignment]
    """As a router, which says in its reply who it was."""

    def __init__(self, message: Any = None, *, parts: Any = None, finish_reason: Any = "stop", **envelope: Any):
        super().__init__()
        self.message = SimpleNamespace(content="Hi.") if message is None and parts is None else message
        self.parts = parts
        self.finish_reason = finish_reason
        self.envelope = {
            "id": "r",
            "model": "m",
            "usage": SimpleNamespace(prompt_tokens=1000, completion_tokens=50),
            "_hidden_params": {"litellm_model_name": "m", "custom_llm_provider": "odd"},
            **envelope,
        }

    def _next(self, keywords: dict[str, Any]) -> Say:
        self.script = [Say("Fine.")]
        return super()._next(keywords)

    @property
    def _is_odd(self) -> bool:
        return len(self.requests) == 1

    def _whole(self, say: Say, keywords: dict[str, Any]) -> Any:
        if not self._is_odd:
            return super()._whole(say, keywords)
        choice = SimpleNamespace(message=self.message, finish_reason=self.finish_reason)
        return SimpleNamespace(**{"choices": [choice], **self.envelope})

    def _parts(self, say: Say, keywords: dict[str, Any]) -> Any:
        if not self._is_odd:
            yield from super()._parts(say, keywords)
            return
        for delta in self.parts or [self.message]:
            choice = SimpleNamespace(delta=delta, finish_reason=None)
            yield SimpleNamespace(id=self.envelope["id"], model="m", choices=[choice])
        end = SimpleNamespace(delta=SimpleNamespace(), finish_reason=self.finish_reason)
        yield SimpleNamespace(**{"choices": [end], **self.envelope})


def look(where: str = "up") -> str:
    """Look somewhere."""
    return f"Seen {where}."


def called(*calls: Any, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(content=None, tool_calls=[*calls], **more)


def a_call(call_id: Any = "call_1", name: Any = "look", arguments: Any = "{}", **more: Any) -> SimpleNamespace:
    return SimpleNamespace(id=call_id, function=SimpleNamespace(name=name, arguments=arguments), **more)


def is_well_formed(messages: list[dict[str, Any]]) -> bool:
    """Whether any provider takes them: text that can be sent, calls that can be read, each with its result."""
    json.dumps(messages, ensure_ascii=False, allow_nan=False).encode()
    open_calls: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            open_calls.remove(message["tool_call_id"])
            assert isinstance(message["content"], str)
            continue
        assert not open_calls
        assert message["content"] or message.get("tool_calls")
        for call in message.get("tool_calls") or ():
            assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", call["function"]["name"])
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
            assert call["id"]
            assert call["id"] not in open_calls
            open_calls.append(call["id"])
    return not open_calls


def check_that_all_is_on_record(store: Store, chat: Chat, llm: ScriptedLLM, ask: Ask) -> None:
    """The chat can be asked again, the model is then shown what it takes, and each call left its row."""
    assert ask(chat, "And now?").content == "Fine."
    assert is_well_formed(llm.requests[-1]["messages"])
    assert len(chat.requests()) == len(llm.requests)
    assert "pending" not in [message.status for message in chat.messages()]


def turns(store: Store, llm: Any, **options: Any) -> Iterator[tuple[Chat, ScriptedLLM, Ask]]:
    """A chat for each of two ways to ask it, with a model made for it."""
    for ask in (WAYS["ask"], WAYS["ask_stream"]):
        made = llm()
        yield create_chat(store, model="m", llm=made, **options), made, ask


def meant(text: str | None) -> Any:
    """What a text stands for that is stored as a JSON string."""
    return json.loads(text or "")


PLACES: dict[str, tuple[Callable[[str], Odd], Callable[[Chat], str | None]]] = {
    "its text": (lambda bad: Odd(SimpleNamespace(content=bad)), lambda chat: chat.messages()[1].content),
    "its thinking": (
        lambda bad: Odd(SimpleNamespace(content="Hi.", reasoning_content=bad)),
        lambda chat: chat.messages()[1].thinking_text,
    ),
    "a signature": (
        lambda bad: Odd(
            SimpleNamespace(content="Hi.", thinking_blocks=[{"type": "thinking", "thinking": "Hm", "signature": bad}])
        ),
        lambda chat: chat.messages()[1].thinking_signature,
    ),
    "the name of a call": (lambda bad: Odd(called(a_call(name=bad))), lambda chat: chat.tool_calls()[0].name),
    "the id of a call": (lambda bad: Odd(called(a_call(bad))), lambda chat: chat.tool_calls()[0].tool_call_id),
    "the arguments": (lambda bad: Odd(called(a_call(arguments=bad))), lambda chat: chat.tool_calls()[0].arguments),
    "the signature of a call": (
        lambda bad: Odd(called(a_call(provider_specific_fields={"thought_signature": bad}))),
        lambda chat: chat.tool_calls()[0].thought_signature,
    ),
    "the reason for its end": (lambda bad: Odd(finish_reason=bad), lambda chat: chat.requests()[0].finish_reason),
    "the id of the request": (lambda bad: Odd(id=bad), lambda chat: chat.requests()[0].provider_request_id),
    "the header of the request": (
        lambda bad: Odd(_hidden_params={"additional_headers": {"llm_provider-x-request-id": bad}}),
        lambda chat: chat.requests()[0].provider_request_id,
    ),
    "the name of the model": (
        lambda bad: Odd(_hidden_params={"litellm_model_name": bad, "custom_llm_provider": "odd"}),
        lambda chat: chat.requests()[0].model,
    ),
    "the name of the provider": (
        lambda bad: Odd(_hidden_params={"litellm_model_name": "m", "custom_llm_provider": bad}),
        lambda chat: chat.messages()[1].provider,
    ),
    "a field of the provider's": (
        lambda bad: Odd(fields(found={"deep": [bad]})),
        lambda chat: (chat.messages()[1].content_raw or {})["rounds"][0]["provider_specific_fields"]["found"]["deep"][
            0
        ],
    ),
    "the name of a field": (
        lambda bad: Odd(fields(**{bad: "found"})),
        lambda chat: next(iter((chat.messages()[1].content_raw or {})["rounds"][0]["provider_specific_fields"])),
    ),
}


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bad", [NUL, HALF], ids=["NUL", "half a character"])
def test_what_no_database_can_hold_is_stored_as_a_json_string_wherever_it_is(store: Store, place: str, bad: str):
    make, stored = PLACES[place]
    for chat, llm, ask in turns(store, lambda: make(bad), tools=[look]):
        if "header" in place and ask is WAYS["ask_stream"]:
            continue  # they are the stream's own, which this one has not
        ask(chat, "Hi.")

        assert meant(stored(chat)) == bad
        check_that_all_is_on_record(store, chat, llm, ask)


HALVES = ("One \ud83d", "\ude00 two")
WHOLE = "One \N{GRINNING FACE} two"


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize(
    ("parts", "stored"),
    [
        ([SimpleNamespace(content=half) for half in HALVES], lambda chat: chat.messages()[1].content),
        ([SimpleNamespace(reasoning_content=half) for half in HALVES], lambda chat: chat.messages()[1].thinking_text),
        (
            [called(a_call(arguments=half, index=0)) for half in HALVES],
            lambda chat: chat.tool_calls()[0].arguments,
        ),
        (
            [
                SimpleNamespace(thinking_blocks=[{"type": "thinking", "thinking": half, "signature": signature}])
                for half, signature in zip(HALVES, (None, "c2ln"), strict=True)
            ],
            lambda chat: (chat.messages()[1].content_raw or {})["rounds"][0]["thinking_blocks"][0]["thinking"],
        ),
        (
            [SimpleNamespace(refusal=half) for half in HALVES],
            lambda chat: (chat.messages()[1].content_raw or {})["rounds"][0]["provider_specific_fields"]["refusal"],
        ),
    ],
    ids=["text", "thinking", "arguments", "a block of thinking", "a refusal"],
)
def test_a_character_that_came_in_two_halves_is_whole_wherever_it_is(store: Store, parts: Any, stored: Any):
    llm = Odd(parts=parts)
    chat = create_chat(store, model="m", llm=llm, tools=[look])

    list(chat.ask_stream("Hi."))

    assert stored(chat) == WHOLE
    check_that_all_is_on_record(store, chat, llm, WAYS["ask_stream"])


# Arguments that are none


ARGUMENTS = {
    "cut off": '{"where": "u',
    "with text behind": '{"where": "up"} That is all.',
    "a list": '["up"]',
    "a string": '"up"',
    "a number": "5",
    "null": "null",
    "not a number": "NaN",
    "fenced": '```json\n{"where": "up"}\n```',
    "deep": "[" * 10_000,
    "deep and closed": '{"where": ' * 10_000 + "1" + "}" * 10_000,
    "with a number too long": '{"where": ' + "9" * 5_000 + "}",
    "with half a character": '{"where": "\\ud83d"}',
    "megabytes": '{"where": "' + "up " * 300_000,
}


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_are_none_are_told_to_the_model_and_kept_to_the_letter(store: Store, name: str):
    raw = ARGUMENTS[name]
    for chat, llm, ask in turns(store, lambda: Odd(called(a_call(arguments=raw))), tools=[look]):
        assert ask(chat, "Look.").content == "Fine."

        assert [(call.status, call.arguments) for call in chat.tool_calls()] == [("failed", raw)]
        assert (chat.tool_calls()[0].result or "").startswith("Invalid tool arguments: ")
        replayed = llm.requests[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]
        assert json.loads(replayed) == {"invalid": raw}
        check_that_all_is_on_record(store, chat, llm, ask)


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        ('{"where": "up", "where": "down"}', "Seen down."),
        ({"where": "up"}, "Seen up."),
        (None, "Seen up."),
        ("  ", "Seen up."),
    ],
    ids=["said twice", "an object", "missing", "blank"],
)
def test_arguments_that_can_be_understood_are(store: Store, arguments: Any, result: str):
    for chat, llm, ask in turns(store, lambda: Odd(called(a_call(arguments=arguments))), tools=[look]):
        ask(chat, "Look.")

        assert [call.result for call in chat.tool_calls()] == [result]
        check_that_all_is_on_record(store, chat, llm, ask)


def test_a_number_that_is_none_reaches_a_tool_that_takes_it_and_no_provider(store: Store):
    def half(of: float) -> float:
        return of / 2

    for chat, llm, ask in turns(store, lambda: Odd(called(a_call(name="half", arguments='{"of": NaN}'))), tools=[half]):
        ask(chat, "Halve it.")

        assert [(call.arguments, call.status) for call in chat.tool_calls()] == [('{"of": NaN}', "completed")]
        check_that_all_is_on_record(store, chat, llm, ask)


# Calls without what makes one


@pytest.mark.parametrize(
    ("name", "replayed"),
    [
        ("", "unnamed"),
        (None, "unnamed"),
        ("loook", "loook"),
        ("functions.look", "functions_look"),
        ('look"; DROP TABLE llm_chat; --', "look___DROP_TABLE_llm_chat__--"),
        ("it's", "it_s"),
        ("schau_über", "schau__ber"),
        ("x" * 200, "x" * 64),
        (5, "5"),
        ({"look": 1}, "__look___1_"),
    ],
)
def test_a_call_of_no_tool_is_told_to_the_model_under_a_name_that_its_provider_takes(
    store: Store, name: Any, replayed: str
):
    for chat, llm, ask in turns(store, lambda: Odd(called(a_call(name=name))), tools=[look]):
        ask(chat, "Look.")

        [call] = chat.tool_calls()
        assert call.status == "failed"
        assert (call.result or "").startswith(f"Model tried to call unavailable tool {call.name!r}.")
        assert call.name == (name if isinstance(name, str) else "" if name is None else json.dumps(name))
        assert llm.requests[1]["messages"][1]["tool_calls"][0]["function"]["name"] == replayed
        check_that_all_is_on_record(store, chat, llm, ask)


def test_a_tool_of_the_applications_own_keeps_its_name_whatever_it_is(store: Store):
    for chat, llm, ask in turns(
        store, lambda: Odd(called(a_call(name="shop.look"))), tools=[tool(name="shop.look")(look)]
    ):
        ask(chat, "Look.")

        assert [call.result for call in chat.tool_calls()] == ["Seen up."]
        assert llm.requests[1]["messages"][1]["tool_calls"][0]["function"]["name"] == "shop.look"


@pytest.mark.parametrize(
    ("ids", "stored"),
    [
        ([None, None, None], ["call_2", "call_3", "call_4"]),
        (["", "", "a"], ["call_2", "call_3", "a"]),
        (["a", "a", "a"], ["a", "a_2", "a_3"]),
        (["a_2", "a", "a"], ["a_2", "a", "a_3"]),
        ([7, {"id": 7}, 7.5], ["7", '{"id": 7}', "7.5"]),
        (["a", 'a"b', "a b"], ["a", 'a"b', "a b"]),
    ],
    ids=["missing", "empty", "the same", "the same, and one that is taken", "no text", "strange"],
)
def test_each_call_of_a_reply_has_an_id_of_its_own(store: Store, ids: Any, stored: list[str]):
    def message() -> Odd:
        calls = [a_call(each, arguments=json.dumps({"where": str(number)})) for number, each in enumerate(ids)]
        return Odd(called(*calls))

    for chat, llm, ask in turns(store, message, tools=[look]):
        if ask is WAYS["ask_stream"]:
            llm.parts = [
                called(SimpleNamespace(index=n, **vars(call))) for n, call in enumerate(llm.message.tool_calls)
            ]  # type: ignore[attr-defined]

        ask(chat, "Look.")

        assert [call.tool_call_id for call in chat.tool_calls()] == stored
        assert [call.result for call in chat.tool_calls()] == ["Seen 0.", "Seen 1.", "Seen 2."]
        check_that_all_is_on_record(store, chat, llm, ask)


def test_an_id_that_every_round_and_every_turn_uses_again_loses_no_result(store: Store):
    for ask in (WAYS["ask"], WAYS["ask_stream"]):
        script = [Call("look", call_id="same", where=str(number)) for number in range(4)]
        llm = ScriptedLLM(*script[:2], "Seen.", *script[2:], "Seen.", "Fine.")
        chat = create_chat(store, model="m", llm=llm, tools=[look])

        ask(chat, "Look.")
        ask(chat, "Look again.")

        assert [call.result for call in chat.tool_calls()] == [f"Seen {number}." for number in range(4)]
        assert [call.tool_call_id for call in chat.tool_calls()] == ["same", "same_2"] * 2
        check_that_all_is_on_record(store, chat, llm, ask)


@pytest.mark.parametrize(
    "function",
    [None, "look", {"name": "look", "arguments": "{}"}, SimpleNamespace(name="look")],
    ids=["none", "a word", "a dict", "no arguments"],
)
def test_a_call_of_any_shape_leaves_the_chat_usable(store: Store, function: Any):
    for chat, llm, ask in turns(store, lambda: Odd(called(SimpleNamespace(id="a", function=function))), tools=[look]):
        ask(chat, "Look.")

        assert len(chat.tool_calls()) == 1
        check_that_all_is_on_record(store, chat, llm, ask)


def many_calls(count: int, name: str = "look") -> Any:
    return called(*(a_call(f"c{number}", name, json.dumps({"where": str(number)})) for number in range(count)))


@pytest.mark.parametrize("count", [100, pytest.param(1_000, marks=pytest.mark.matrix)])
def test_calls_without_number_are_all_run_and_all_stored(store: Store, count: int):
    llm = Odd(many_calls(count))
    chat = create_chat(store, model="m", llm=llm, tools=[look], tool_concurrency=16)

    chat.ask("Look everywhere.")

    assert [call.result for call in chat.tool_calls()] == [f"Seen {number}." for number in range(count)]
    check_that_all_is_on_record(store, chat, llm, WAYS["ask"])


def test_more_calls_than_a_statement_takes_values_for_are_stored(store: Store):
    def stop(where: str) -> Halt:
        return Halt(where)

    llm = Odd(many_calls(3_000, "stop"))
    chat = create_chat(store, model="m", llm=llm, tools=[stop], tool_concurrency=1)
    with store.connection():
        if store.is_sqlite:  # as most builds of it have it
            store.database.connection().setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 32_766)

        assert chat.ask("Look everywhere.").content == "0"

    assert [call.status for call in chat.tool_calls()] == ["completed"] + ["rejected"] * 2_999
    check_that_all_is_on_record(store, chat, llm, WAYS["ask"])


# Streams whose pieces are out of order


def piece(index: Any = None, call_id: Any = None, name: Any = None, arguments: Any = None) -> SimpleNamespace:
    return called(
        SimpleNamespace(index=index, id=call_id, function=SimpleNamespace(name=name, arguments=arguments)),
    )


STREAMS = {
    "interleaved": [
        piece(0, "a", "look", '{"wh'),
        piece(1, "b", "look", '{"where"'),
        piece(0, None, None, 'ere": "1"}'),
        piece(1, None, None, ': "2"}'),
    ],
    "with a gap, and backwards": [piece(7, "a", "look", '{"where": "1"}'), piece(3, "b", "look", '{"where": "2"}')],
    "with no index": [
        piece(None, "a", "look", '{"where"'),
        piece(None, None, None, ': "1"}'),
        piece(None, "b", "look", '{"where": "2"}'),
    ],
    "with one index for all": [
        piece(0, "a", "look", '{"where": "1"}'),
        piece(0, "b", "look", '{"where"'),
        piece(0, None, None, ': "2"}'),
    ],
    "with one index and no ids": [piece(0, None, "look", '{"where": "1"}'), piece(0, None, "look", '{"where": "2"}')],
    "with an index that is none": [
        piece("x", "a", "look", '{"where": "1"}'),
        piece("x", "b", "look", '{"where": "2"}'),
    ],
    "the arguments first": [
        piece(0, "a", None, '{"where": "1"'),
        piece(1, None, None, '{"where": "2"}'),
        piece(1, "b", "look", None),
        piece(0, None, "look", "}"),
    ],
    "the name in every piece": [
        piece(0, "a", "look", '{"where"'),
        piece(0, "a", "look", ': "1"}'),
        piece(1, "b", "look", '{"where"'),
        piece(1, "b", "look", ': "2"}'),
    ],
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_pieces_of_two_calls_find_together_however_they_come(store: Store, name: str):
    llm = Odd(parts=STREAMS[name])
    chat = create_chat(store, model="m", llm=llm, tools=[look])

    list(chat.ask_stream("Look."))

    assert [call.result for call in chat.tool_calls()] == ["Seen 1.", "Seen 2."]
    check_that_all_is_on_record(store, chat, llm, WAYS["ask_stream"])


def test_a_reply_in_thousands_of_pieces_is_put_together_once(store: Store):
    """NodeLLM and others add each piece to what there is, which for many pieces takes the square of their number."""

    class Counted(str):
        added = 0

        def __add__(self, other: str) -> str:
            type(self).added += 1
            return Counted(str.__add__(self, other))

        def __radd__(self, other: str) -> str:
            type(self).added += 1
            return Counted(other + str(self))

    part, count = Counted("ab "), 1_000
    deltas = [
        *(SimpleNamespace(reasoning_content=part) for _ in range(count)),
        *(SimpleNamespace(thinking_blocks=[{"type": "thinking", "thinking": part}]) for _ in range(count)),
        *(SimpleNamespace(content=part) for _ in range(count)),
        *(SimpleNamespace(refusal=part) for _ in range(count)),
        piece(0, "a", "look", Counted('{"where": "')),
        *(piece(0, None, None, part) for _ in range(count)),
        piece(0, None, None, Counted('"}')),
    ]
    llm = Odd(parts=deltas)
    chat = create_chat(store, model="m", llm=llm, tools=[look])

    list(chat.ask_stream("Go on."))

    assert chat.tool_calls()[0].result == f"Seen {'ab ' * count}."
    assert Counted.added == 0
    check_that_all_is_on_record(store, chat, llm, WAYS["ask_stream"])


def test_megabytes_in_one_piece_are_stored_whole_and_shown_to_no_tokenizer(store: Store):
    """A tokenizer takes the square of the length of a word: megabytes of base64 would be counted for hours."""

    class Counting(Odd):
        longest = 0

        def token_counter(self, *arguments: Any, **keywords: Any) -> int:
            self.longest = max(self.longest, len(str(keywords)))
            return super().token_counter(*arguments, **keywords)

    text = "x" * 1_000_000
    for chat, llm, ask in turns(store, lambda: Counting(SimpleNamespace(content=text), usage=None)):
        assert ask(chat, "Hi.").content == text

        assert chat.messages()[1].content == text
        assert (chat.requests()[0].output_tokens, chat.requests()[0].usage_estimated) == (250_001, True)
        assert llm.longest < 1_000  # type: ignore[attr-defined]
        check_that_all_is_on_record(store, chat, llm, ask)


# Replies that say nothing, or not what they should


@pytest.mark.parametrize(
    ("message", "content"),
    [
        (SimpleNamespace(content=None), None),
        (SimpleNamespace(content=""), None),
        (SimpleNamespace(content=" \n"), " \n"),
        (SimpleNamespace(content=[]), None),
        (SimpleNamespace(), None),
        (SimpleNamespace(content=None, reasoning_content="Hm."), None),
        (SimpleNamespace(content="Hi.", tool_calls=[]), "Hi."),
        (SimpleNamespace(content={"text": "Hi."}), '{"text": "Hi."}'),
        (SimpleNamespace(content=5), "5"),
        (SimpleNamespace(content=b"\xff"), '"_w=="'),
        (SimpleNamespace(content=["Hi."]), '["Hi."]'),
        (SimpleNamespace(content=[{"type": "text", "text": None}, {"text": "Hi."}]), "Hi."),
        (SimpleNamespace(content="Hi.", thinking_blocks=None, images=None, audio=None), "Hi."),
    ],
)
def test_a_reply_that_says_little_or_oddly_is_stored_as_what_it_says(store: Store, message: Any, content: str | None):
    for chat, llm, ask in turns(store, lambda: Odd(message)):
        assert ask(chat, "Hi.").content == content

        assert [(each.status_code, each.input_tokens) for each in chat.requests()] == [(200, 1000)]
        check_that_all_is_on_record(store, chat, llm, ask)


@pytest.mark.parametrize("choices", [[], None], ids=["empty", "none"])
def test_a_reply_without_choices_is_an_empty_one(store: Store, choices: Any):
    for chat, llm, ask in turns(store, lambda: Odd(choices=choices)):
        ask(chat, "Hi.")

        request = chat.requests()[0]
        assert (request.status_code, request.input_tokens, request.output_tokens) == (200, 1000, 50)
        check_that_all_is_on_record(store, chat, llm, ask)


@pytest.mark.parametrize("finish_reason", ["eaten_by_a_dog", "", None, 5, {"reason": "stop"}])
def test_a_reason_for_the_end_that_nobody_knows_is_on_record(store: Store, finish_reason: Any):
    for chat, llm, ask in turns(store, lambda: Odd(finish_reason=finish_reason)):
        assert ask(chat, "Hi.").content == "Hi."

        said = finish_reason if isinstance(finish_reason, str | None) else json.dumps(finish_reason)
        assert (chat.requests()[0].finish_reason or None) == (said or None)
        check_that_all_is_on_record(store, chat, llm, ask)


class Unreadable:
    """What raises whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("do not touch")


@pytest.mark.parametrize(
    "message",
    [
        SimpleNamespace(content="Hi.", tool_calls=5),
        SimpleNamespace(content="Hi.", provider_specific_fields=["no", "mapping"]),
        SimpleNamespace(content="Hi.", thinking_blocks=["no block"]),
        Unreadable(),
    ],
    ids=["calls that are a number", "fields that are a list", "blocks that are words", "what raises"],
)
@pytest.mark.parametrize("on_error", ["rollback", "keep"])
def test_what_cannot_be_read_at_all_fails_clearly_and_is_on_record(store: Store, message: Any, on_error: Any):
    for chat, llm, ask in turns(store, lambda: Odd(message), on_error=on_error, retries=0):
        with pytest.raises(UnreadableReply, match="the reply of 'm' cannot be read"):
            ask(chat, "Hi.")

        [request] = chat.requests()
        assert (request.error, request.status_code) == ("UnreadableReply", 200)
        check_that_all_is_on_record(store, chat, llm, ask)


@pytest.mark.parametrize("response", [None, "Hi.", 5, {"choices": []}])
def test_what_is_no_response_leaves_the_chat_usable(store: Store, response: Any):
    class NoModel(Odd):
        def completion(self, **keywords: Any) -> Any:
            made = super().completion(**keywords)
            return response if self._is_odd else made

    for chat, llm, ask in turns(store, NoModel, retries=0):
        with contextlib.suppress(UnreadableReply):
            ask(chat, "Hi.")

        check_that_all_is_on_record(store, chat, llm, ask)


# Figures that are none


USAGES: dict[str, tuple[Any, tuple[int, int, bool]]] = {
    "missing": (None, (1, 1, True)),
    "empty": (SimpleNamespace(), (1, 1, True)),
    "negative": (SimpleNamespace(prompt_tokens=-5, completion_tokens=-1), (1, 1, True)),
    "without its input": (SimpleNamespace(completion_tokens=50), (1, 50, True)),
    "without its output": (SimpleNamespace(prompt_tokens=1000, completion_tokens=None), (1000, 1, True)),
    "as text": (SimpleNamespace(prompt_tokens="1000", completion_tokens="50"), (1000, 50, False)),
    "as words": (SimpleNamespace(prompt_tokens="many", completion_tokens="few"), (1, 1, True)),
    "as floats": (SimpleNamespace(prompt_tokens=1000.0, completion_tokens=50.0), (1000, 50, False)),
    "not a number": (SimpleNamespace(prompt_tokens=float("nan"), completion_tokens=float("inf")), (1, 1, True)),
    "larger than a column": (SimpleNamespace(prompt_tokens=2**31, completion_tokens=50), (1, 50, True)),
    "larger than anything": (SimpleNamespace(prompt_tokens=10**30, completion_tokens=10**5000), (1, 1, True)),
    "as lists": (SimpleNamespace(prompt_tokens=[1], completion_tokens={}), (1, 1, True)),
    "a mapping": ({"prompt_tokens": 1000, "completion_tokens": 50}, (1000, 50, False)),
    "a word": ("many", (1, 1, True)),
}


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize("name", USAGES)
def test_figures_that_make_no_sense_are_counted_here(store: Store, name: str):
    usage, expected = USAGES[name]
    for chat, llm, ask in turns(store, lambda: Odd(usage=usage)):
        ask(chat, "Hi.")

        request = chat.requests()[0]
        assert (request.input_tokens, request.output_tokens, request.usage_estimated) == expected
        assert (chat.messages()[1].input_tokens, chat.messages()[1].output_tokens) == expected[:2]
        check_that_all_is_on_record(store, chat, llm, ask)


def test_the_sum_of_two_figures_that_a_column_can_just_hold_is_as_much_as_it_can_hold(store: Store):
    most = 2**31 - 1
    calls = Say(calls=[Call("look")], input_tokens=most, output_tokens=1)
    chat = create_chat(store, model="m", llm=ScriptedLLM(calls, Say("Seen.", input_tokens=most)), tools=[look])

    chat.ask("Look.")

    assert chat.messages()[1].input_tokens == most
    assert chat.stats().input_tokens == 2 * most


def test_more_tokens_from_the_cache_than_there_were_cost_nothing_less_than_nothing(store: Store):
    details = SimpleNamespace(cached_tokens=5000, cache_creation_tokens=5000)
    usage = SimpleNamespace(prompt_tokens=1000, completion_tokens=50, prompt_tokens_details=details)
    for chat, llm, ask in turns(store, lambda: Odd(usage=usage)):
        ask(chat, "Hi.")

        request = chat.requests()[0]
        assert (request.input_tokens, request.cached_tokens, request.cache_write_tokens) == (1000, 5000, 5000)
        assert request.cost is None or request.cost >= 0
        check_that_all_is_on_record(store, chat, llm, ask)


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize(
    "cost", [-1, float("nan"), float("-inf"), "Infinity", 10**6, "1e400", 10**30, "free", [1], {"total_cost": -1}, True]
)
def test_a_cost_that_makes_no_sense_is_none(store: Store, cost: Any):
    usage = SimpleNamespace(prompt_tokens=1000, completion_tokens=50, cost=cost)
    for chat, llm, ask in turns(store, lambda: Odd(usage=usage)):
        ask(chat, "Hi.")

        assert chat.requests()[0].cost is None
        assert chat.stats().unpriced_requests == 1
        check_that_all_is_on_record(store, chat, llm, ask)


# Values that are no JSON


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (float("nan"), "nan"),
        ([float("-inf")], ["-inf"]),
        (10**30, hex(10**30)),
        pytest.param(10**5000, hex(10**5000), id="a number too long"),
        (Decimal("1.10"), "1.10"),
        (b"\xff", "_w=="),
        ({1: {2: "two"}}, {"1": {"2": "two"}}),
        ((1, (2,)), [1, [2]]),
        (SimpleNamespace(a=1), "namespace(a=1)"),
    ],
)
def test_a_field_that_is_no_json_is_stored_as_what_says_the_same(store: Store, value: Any, stored: Any):
    for chat, llm, ask in turns(store, lambda: Odd(fields(found=value))):
        ask(chat, "Hi.")

        assert (chat.messages()[1].content_raw or {})["rounds"][0]["provider_specific_fields"] == {"found": stored}
        check_that_all_is_on_record(store, chat, llm, ask)


# Errors that say nothing


class Mute(Exception):
    """An exception that cannot be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_an_error_that_cannot_be_printed_is_on_record(store: Store):
    for chat, llm, ask in turns(store, lambda: ScriptedLLM(Mute(), "Fine."), retries=0):
        with pytest.raises(Mute):
            ask(chat, "Hi.")

        assert [request.error_message for request in chat.requests()] == ["a Mute that cannot be printed"]
        check_that_all_is_on_record(store, chat, llm, ask)


def test_a_tool_whose_error_cannot_be_printed_is_told_to_the_model(store: Store):
    def fail() -> str:
        raise Mute()

    for chat, llm, ask in turns(store, lambda: ScriptedLLM(Call("fail"), "Seen.", "Fine."), tools=[fail]):
        ask(chat, "Go.")

        result = "Error executing tool 'fail': a Mute that cannot be printed"
        assert [call.result for call in chat.tool_calls()] == [result]
        check_that_all_is_on_record(store, chat, llm, ask)


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize("error", [ValueError(NUL), ValueError(HALF), Mute()], ids=["NUL", "half", "mute"])
def test_a_hook_whose_error_no_database_can_hold_costs_no_row(store: Store, error: Exception):
    def object_to_it(reply: Reply) -> None:
        raise error

    for chat, llm, ask in turns(store, lambda: ScriptedLLM(Call("look"), "Fine.", "Fine."), tools=[look]):
        chat.after_response(object_to_it)
        with pytest.raises(type(error)):
            ask(chat, "Hi.")

        assert [request.status_code for request in chat.requests()] == [200]
        chat._hooks.clear()
        check_that_all_is_on_record(store, chat, llm, ask)


@pytest.mark.parametrize("bad", [NUL, HALF], ids=["NUL", "half"])
def test_a_middleware_whose_error_no_database_can_hold_costs_no_row(store: Store, bad: str):
    class Refusing(Middleware):
        def stored_text(self, text: str) -> str:
            if text == "Hello.":
                raise ValueError(bad)
            return text

    for chat, llm, ask in turns(store, lambda: ScriptedLLM("Hello.", "Fine."), middlewares=[Refusing()]):
        with pytest.raises(ReplyNotSaved):
            ask(chat, "Hi.")

        [request] = chat.requests()
        assert (request.status_code, request.error) == (200, "ReplyNotSaved")
        assert bad in meant(request.error_message)
        check_that_all_is_on_record(store, chat, llm, ask)


@pytest.mark.parametrize("given", [[1, 2], [{"role": "user"}], [], None, "no", {"role": "user"}])
def test_what_a_hook_returns_in_the_place_of_messages_costs_no_row(store: Store, given: Any):
    for chat, llm, ask in turns(store, lambda: Odd(), retries=0):
        chat.before_request(lambda messages: given)
        with contextlib.suppress(Exception):
            ask(chat, "Hi.")

        chat._hooks.clear()
        check_that_all_is_on_record(store, chat, llm, ask)


@pytest.mark.parametrize("given", [5, "Hi.", None, [], Reply(content=NUL), Reply(content=5)])  # type: ignore[arg-type]
def test_what_a_hook_returns_in_the_place_of_a_reply_costs_no_row(store: Store, given: Any):
    for chat, llm, ask in turns(store, lambda: Odd(), on_error="keep"):
        chat.after_response(lambda reply: given)
        with contextlib.suppress(LlmOrmError):
            ask(chat, "Hi.")

        chat._hooks.clear()
        check_that_all_is_on_record(store, chat, llm, ask)


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize(
    "text", ["\N{GRINNING FACE}" * 100_000, "'; DROP TABLE llm_message; --", "\u2028\ufffe\x7f%s{}"]
)
def test_whatever_a_user_says_is_stored_and_sent_as_it_is(store: Store, text: str):
    for chat, llm, ask in turns(store, lambda: ScriptedLLM("Fine.", "Fine.")):
        ask(chat, text)

        assert chat.messages()[0].content == text
        assert llm.requests[0]["messages"] == [{"role": "user", "content": text}]
        check_that_all_is_on_record(store, chat, llm, ask)


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize(
    ("returned", "result"),
    [
        (lambda: (number for number in range(3)), "[0,1,2]"),
        (lambda: {"ab"}, '["ab"]'),
        (lambda: float("nan"), "NaN"),
        (lambda: object, "class"),
        (lambda: b"\xff" * 100_000, "____"),
        (lambda: ["x"] * 100_000, '"x"]'),
        (lambda: 10**5000, "0" * 5000),
    ],
    ids=["a generator", "a set", "no number", "a class", "bytes", "a long list", "a number too long"],
)
def test_whatever_a_tool_returns_is_told_to_the_model(store: Store, returned: Any, result: str):
    def give() -> Any:
        return returned()

    for chat, llm, ask in turns(store, lambda: ScriptedLLM(Call("give"), "Fine.", "Fine."), tools=[give]):
        ask(chat, "Give.")

        assert result in (chat.tool_calls()[0].result or "")
        check_that_all_is_on_record(store, chat, llm, ask)


# Through the real litellm, as it comes over the wire


def asked_through(store: Store, provider: Provider, wire: str, **options: Any) -> Iterator[tuple[Chat, Ask]]:
    settings = getattr(provider, wire)()
    llm = LLM(api_key=settings.pop("api_key"), api_base=settings.pop("api_base"))
    for ask in (WAYS["ask"], WAYS["ask_stream"]):
        yield create_chat(store, llm=llm, retries=0, **settings, **options), ask


def check_on_the_wire(chat: Chat, provider: Provider, ask: Ask) -> None:
    provider.reply("Fine.")
    assert ask(chat, "And now?").content == "Fine."
    assert sum(request.status_code == 200 for request in chat.requests()) == len(provider.requests)
    provider.requests.clear()


WIRES = ["openai", "anthropic", "gemini"]


@pytest.mark.parametrize(
    "raw", ['{"where": "u', '["up"]', '{"where": NaN}', '{"where": ' + "9" * 5000 + "}", "[" * 10_000]
)
@pytest.mark.parametrize("wire", ["openai", "anthropic"])
def test_litellm_sends_on_arguments_that_are_none(sqlite_store: Store, provider: Provider, wire: str, raw: str):
    """litellm itself refuses to send arguments that are no JSON back to Anthropic and to Gemini: the turn could not go
    on, nor could a chat that had kept them ever be asked again."""
    for chat, ask in asked_through(sqlite_store, provider, wire, tools=[look]):
        if ask is WAYS["ask"] and (wire == "anthropic" or len(raw) > 100):
            continue  # a whole reply of Anthropic's has an object here, and litellm cannot read all of OpenAI's
        provider.reply(Answer(tool_calls=[WireCall("look", {}, raw=raw)]), "Seen.")
        assert ask(chat, "Look.").content == "Seen."

        assert [(call.status, call.arguments) for call in chat.tool_calls()] == [("failed", raw)]
        check_on_the_wire(chat, provider, ask)
        gemini = provider.gemini()
        provider.reply("Fine.")
        llm = LLM(api_key=gemini["api_key"], api_base=gemini["api_base"])
        assert ask(chat, "And you?", model=gemini["model"], llm=llm).content == "Fine."
        provider.requests.clear()


@pytest.mark.parametrize("wire", WIRES)
def test_litellm_sends_on_the_name_of_a_tool_that_is_none(sqlite_store: Store, provider: Provider, wire: str):
    for chat, ask in asked_through(sqlite_store, provider, wire, tools=[look]):
        provider.reply(Answer(tool_calls=[WireCall("functions.look up", {}, id="call 1")]), "Seen.")
        assert ask(chat, "Look.").content == "Seen."

        assert [call.name for call in chat.tool_calls()] == ["functions.look up"]
        assert "functions_look_up" in json.dumps(provider.requests[-1].body)
        check_on_the_wire(chat, provider, ask)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("bad", [NUL, HALF], ids=["NUL", "half"])
def test_what_no_database_can_hold_comes_through_litellm_too(store: Store, provider: Provider, wire: str, bad: str):
    def spoil(data: Any) -> None:
        for name, value in [*(data.items() if isinstance(data, dict) else enumerate(data))]:
            if value == "bad":
                data[name] = bad
            elif isinstance(value, dict | list):
                spoil(value)

    for chat, ask in asked_through(store, provider, wire, tools=[look]):
        answer = Answer("bad", tool_calls=[WireCall("look", {"where": "bad"})], chunks=1)
        provider.reply_oddly(answer, spoil)
        provider.reply_oddly(Answer("bad", chunks=1), spoil)
        assert meant(ask(chat, "Look.").content) == bad

        check_on_the_wire(chat, provider, ask)


def changed(**paths: Any) -> Any:
    """Put values where the paths lead, where there is what they lead to: usage__prompt_tokens=-1."""

    def change(data: dict[str, Any]) -> None:
        for path, value in paths.items():
            *way, last = path.split("__")
            place: Any = data
            for step in way:
                place = (
                    place[int(step)]
                    if step.isdigit() and isinstance(place, list) and place
                    else (place.get(step) if isinstance(place, dict) else None)
                )
            if isinstance(place, dict) and last in place and place[last] is not None:
                place[last] = value

    return change


@pytest.mark.parametrize(
    ("wire", "change"),
    [
        ("openai", changed(choices__0__finish_reason="eaten_by_a_dog")),
        ("openai", changed(choices=[])),
        ("openai", changed(choices=None)),
        ("openai", changed(usage={"prompt_tokens": -1, "completion_tokens": -1, "total_tokens": -2})),
        ("openai", changed(usage={})),
        ("openai", changed(usage__prompt_tokens="10")),
        ("openai", changed(usage__prompt_tokens=10**30)),
        ("openai", changed(usage__completion_tokens=2.0)),
        ("openai", changed(id=None, model=None)),
        ("openai", changed(choices__0__message__content=["Hi."], choices__0__delta__content=["Hi."])),
        ("openai", changed(choices__0__message__content={}, choices__0__delta__content={})),
        ("openai", changed(choices__0__message=None, choices__0__delta=None)),
        ("anthropic", changed(stop_reason="eaten_by_a_dog", delta__stop_reason="eaten_by_a_dog")),
        ("anthropic", changed(content=[], type="ping")),
        ("anthropic", changed(usage__input_tokens=-1, message__usage__input_tokens=-1)),
        ("anthropic", changed(usage__input_tokens=10**30, message__usage__input_tokens=10**30)),
        ("anthropic", changed(content__0__text=None, delta__text=None)),
        ("gemini", changed(candidates__0__finishReason="EATEN_BY_A_DOG")),
        ("gemini", changed(candidates=[])),
        ("gemini", changed(candidates__0__content={})),
        ("gemini", changed(candidates__0__content__parts=[{}])),
        ("gemini", changed(usageMetadata={})),
        ("gemini", changed(usageMetadata__promptTokenCount=-1)),
        ("gemini", changed(usageMetadata__promptTokenCount=10**30)),
    ],
)
def test_an_answer_that_makes_no_sense_is_on_record_whatever_litellm_makes_of_it(
    sqlite_store: Store, provider: Provider, wire: str, change: Any
):
    for chat, ask in asked_through(sqlite_store, provider, wire):
        provider.reply_oddly(Answer("Hi.", chunks=1), change)
        try:
            ask(chat, "Hi.")
        except Exception as error:
            assert type(error).__module__.partition(".")[0] in ("litellm", "llm_orm")  # noqa: PT017

        assert len(chat.requests()) == 1
        provider.reply("Fine.")
        assert ask(chat, "And now?").content == "Fine."
        assert len(chat.requests()) == 2


REFUSALS = [
    ("openai", changed(choices__0__finish_reason="content_filter"), "content_filter"),
    ("anthropic", changed(stop_reason="refusal", delta__stop_reason="refusal"), "content_filter"),
    ("gemini", changed(candidates__0__finishReason="SAFETY"), "content_filter"),
]


@pytest.mark.parametrize(("wire", "change", "finish_reason"), REFUSALS, ids=[wire for wire, *_ in REFUSALS])
def test_a_reply_that_its_provider_broke_off_keeps_what_litellm_says_of_it_and_why_it_ended(
    sqlite_store: Store, provider: Provider, wire: str, change: Any, finish_reason: str
):
    for chat, ask in asked_through(sqlite_store, provider, wire):
        provider.reply_oddly("I can tell you only", change)
        kept = None if wire == "gemini" and ask is WAYS["ask"] else "I can tell you only"  # litellm throws it away
        assert ask(chat, "Tell me.").content == kept

        assert chat.requests()[0].finish_reason == finish_reason
        check_on_the_wire(chat, provider, ask)


def test_a_refusal_of_openais_is_kept_and_not_sent_back(sqlite_store: Store, provider: Provider):
    refusal = changed(choices__0__message__content=None, choices__0__delta__content=None)

    def refuse(data: dict[str, Any]) -> None:
        refusal(data)
        for choice in data["choices"]:
            said = choice.get("message") or choice.get("delta")
            if "role" in said:
                said["refusal"] = "I cannot help with that."

    for chat, ask in asked_through(sqlite_store, provider, "openai"):
        provider.reply_oddly(Answer("x", chunks=1), refuse)
        ask(chat, "Tell me.")

        assert last_round(chat)["provider_specific_fields"]["refusal"] == "I cannot help with that."
        check_on_the_wire(chat, provider, ask)

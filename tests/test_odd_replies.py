"""What a provider, or a library, sends that makes no sense: it is on record, and what it cost with it."""

from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Ask, rows
from pydantic import BaseModel

from llm_orm import Chat, Store, create_chat
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


def test_a_reply_that_cannot_be_read_leaves_its_request_row(store: Store, ask: Ask):
    chat = create_chat(store, model="m", llm=OneReply(SimpleNamespace(content="Hi.", reasoning_content=5)))

    with pytest.raises(TypeError):
        ask(chat, "Hi.")

    assert rows(store, "request", "error", "input_tokens", "output_tokens") == [("TypeError", 1000, 50)]
    assert rows(store, "message", "role") == [("user",)]


def test_the_usage_of_a_reply_without_choices_is_on_record(store: Store):
    chat = create_chat(store, model="m", llm=OneReply(None))

    with pytest.raises(IndexError):
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

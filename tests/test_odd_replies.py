"""What a provider, or a library, sends that makes no sense: it is on record, and what it cost with it."""

from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Ask, rows

from llm_orm import Store, create_chat
from llm_orm.testing import ProviderError, ScriptedLLM


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
    from llm_orm.testing import Say

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

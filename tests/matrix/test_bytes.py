"""A provider whose connection breaks after any byte of a stream, in three wire formats, through the real litellm."""

from collections.abc import Callable
from typing import Any

import pytest
from conftest import rows
from provider import Answer, Provider, anthropic, gemini, openai
from provider.script import Wanted

from llm_orm import LLM, Store, check, create_chat

TEXT = "It is cold, and the ☂ stays in."
WIRES: dict[str, Any] = {"openai": openai, "anthropic": anthropic, "gemini": gemini}
EVERY = [pytest.param(1, marks=pytest.mark.matrix, id="every byte"), pytest.param(67, id="some")]


@pytest.mark.parametrize("step", EVERY)
@pytest.mark.parametrize("wire", WIRES)
def test_a_stream_that_breaks_after_any_byte_leaves_its_row_and_a_chat_to_go_on_with(
    sqlite_store: Store, provider: Provider, wire: str, step: int, record_property: Callable[[str, Any], None]
):
    settings = getattr(provider, wire)()
    model, llm = settings.pop("model"), LLM(**settings)
    chat = create_chat(sqlite_store, model=model, llm=llm, retries=0, on_error="keep")
    answer, failed, raised = Answer(TEXT, input_tokens=20, output_tokens=9), 0, set()
    body = b"".join(WIRES[wire].render_events(answer, Wanted(model=model, stream=True)))
    for byte in range(0, len(body), step):
        provider.fail_at(answer, byte=byte)
        shown = ""
        try:
            for chunk in chat.ask_stream("Weather?", history=1):
                shown += chunk.content
        except Exception as error:
            failed += 1
            raised.add(type(error).__module__.partition(".")[0])
        request = rows(sqlite_store, "request", "error", "status_code")[-1]
        message = rows(sqlite_store, "message", "status", "content")[-1]
        assert (message[1] or "") == shown, byte
        assert TEXT.startswith(shown), byte
        assert (message[0] == "completed") == (request[0] is None), byte
        if shown != TEXT and wire != "gemini":  # whose streams say nothing of their end
            assert request[0] is not None, byte
    assert raised == {"litellm"}
    assert len(rows(sqlite_store, "request", "id")) == len(provider.ledger)
    assert check(sqlite_store) == []
    provider.reply("Still cold.")
    assert chat.ask("And now?").content == "Still cold."
    assert len(provider.ledger) == len(range(0, len(body), step)) + 1
    tried = {"matrix": "broken streams", "points": len(provider.ledger), "runs": failed, "violations": 0}
    record_property("matrix", {**tried, "seed": None})

"""A turn with a tool through the real litellm, streamed and not, on an installation without the dev extra."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from provider import Answer, Call, Provider

from llm_orm import LLM, connect, create_chat, tool


@tool
def get_weather(city: str) -> str:
    """Current weather in a city."""
    return f"3 degrees in {city}"


with Provider() as provider, connect("sqlite:///:memory:") as store:
    store.create_tables()
    keywords = provider.openai()
    model = keywords.pop("model")
    chat = create_chat(store, model=model, tools=[get_weather], llm=LLM(**keywords))
    for _ in range(2):
        provider.reply(Answer(tool_calls=[Call("get_weather", {"city": "London"})]))
        provider.reply("Cold.")
    assert chat.ask("How is the weather in London?").content == "Cold."
    assert "".join(chunk.content for chunk in chat.ask_stream("And now?")) == "Cold."
    assert [call.result for call in chat.tool_calls()] == ["3 degrees in London"] * 2
    print("a tool turn works on a plain install:", chat.stats())

"""What a test asks the provider to say, in no provider's format."""

import base64
import json
from dataclasses import dataclass
from typing import Any, Literal

Finish = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class Call:
    """A tool the model asks for. `signature` is sent by Gemini only, on the call itself.

    `raw` are arguments that are no JSON: OpenAI's format has them as text, Anthropic's in a stream, Gemini's never.
    """

    name: str
    arguments: dict[str, Any]
    id: str = "call_1"
    signature: str | None = None
    raw: str | None = None

    @property
    def arguments_json(self) -> str:
        return self.raw if self.raw is not None else json.dumps(self.arguments, ensure_ascii=False)


@dataclass(frozen=True)
class Answer:
    """One reply of the model, and what it is billed at.

    `input_tokens` counts the whole prompt, cache reads and writes included; `output_tokens` counts thinking too.
    `chunks` is how many pieces the text, the thinking and each call's arguments are streamed in. Without `usage`
    no token count is sent (Anthropic always sends one). OpenAI's format has no signature and no cache writes. Only
    Gemini's format has pictures, and sound, which OpenAI's has too: there the text is what is said in it.
    """

    text: str = ""
    thinking: str | None = None
    signature: str | None = None
    redacted_thinking: str | None = None
    tool_calls: tuple[Call, ...] | list[Call] = ()
    images: tuple[bytes, ...] | list[bytes] = ()
    audio: bytes | None = None
    input_tokens: int = 10
    output_tokens: int = 5
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    thinking_tokens: int = 0
    finish: Finish = "stop"
    chunks: int = 3
    usage: bool = True
    request_id: str = "req_1"

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for why the reply ended."""
        return "tool_calls" if self.tool_calls and self.finish == "stop" else self.finish

    def split(self, text: str) -> list[str]:
        """The text in at most `chunks` pieces, none of them empty."""
        size = max(1, -(-len(text) // self.chunks))
        return [text[start : start + size] for start in range(0, len(text), size)]


@dataclass(frozen=True)
class Wanted:
    """What a request asks of the wire, read from its path and body."""

    model: str
    stream: bool
    stream_usage: bool = True


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def sse(data: object, event: str | None = None) -> bytes:
    """One server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()

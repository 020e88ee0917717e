"""What travels between the files: frozen values with names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

Message = dict[str, Any]
"""One message as a model is shown it: {"role": "user", "content": "…"}, in the shape of OpenAI's chat API."""


def storable(text: str) -> str:
    """The text; as a JSON string where it has NUL or half a character, which no database can hold as text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # Two halves that came apart are one character.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        if any("\ud800" <= character <= "\udfff" for character in text):
            return json.dumps(text)
    return json.dumps(text, ensure_ascii=False) if "\x00" in text else text


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call. `input_tokens` includes cached and cache-write tokens, `output_tokens` includes thinking."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    thinking_tokens: int = 0
    estimated: bool = False
    """True where the provider sent no figures and the tokens were counted on this machine."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, as the model asked for it."""

    id: str
    name: str
    arguments: str
    """JSON, to the letter as the model wrote it; it may be invalid."""
    thought_signature: str | None = None

    @property
    def parsed_arguments(self) -> Any:
        """The arguments as Python values; raises `ValueError` where the model wrote invalid JSON."""
        return json.loads(self.arguments or "{}")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed reply. Only one of the fields says something."""

    content: str = ""
    thinking: str = ""
    tool_call: ToolCall | None = None
    """A tool call that the model has finished asking for; it runs next."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What one call of a model gave back, whole, or as far as it came."""

    content: str | None = None
    thinking: str | None = None
    thinking_signature: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    message: Message = field(default_factory=dict)
    """The assistant message to show the model on the next call, verbatim: thinking blocks, provider fields and all."""
    usage: Usage = Usage()
    cost: Decimal | None = None
    """US dollars; None where the model has no known price."""
    finish_reason: str | None = None
    model: str = ""
    provider: str = ""
    provider_request_id: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the text alone says everything there is to replay."""
        return set(self.message) <= {"role", "content"}


@dataclass(frozen=True, slots=True)
class Answer:
    """How one call of a model ended: a reply, or an error with what had been received until then."""

    reply: Reply
    error: BaseException | None = None
    error_message: str | None = None
    """The error's text, without keys and credentials."""
    status_code: int = 200
    duration_ms: int = 0
    first_token_ms: int | None = None
    streamed: bool = False
    shown: bool = False
    """Whether the reader of a stream has seen a piece of it: then it cannot be tried again."""
    retryable: bool = False
    retry_after: float | None = None
    """Seconds that the provider asked us to wait."""


@dataclass(frozen=True, slots=True)
class ToolOutcome:
    """How a tool call ended. `result` is the text that the model is shown."""

    call: ToolCall
    result: str
    status: Literal["completed", "failed", "rejected"] = "completed"
    error: str | None = None
    duration_ms: int = 0
    fatal: Exception | None = None
    """The exception that ends the turn, where the tool said so."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Sums over the requests of one chat, or of many. Money in US dollars, exact."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    thinking_tokens: int = 0
    cost: Decimal = Decimal(0)
    """What the priced requests cost; see `unpriced_requests` for what this leaves out."""
    requests: int = 0
    failed_requests: int = 0
    unpriced_requests: int = 0
    """Requests whose cost is unknown."""
    tool_calls: int = 0
    duration_ms: int = 0
    """Time spent waiting for models."""

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Retries:
    """How often, and after how long, a failed call of a model is tried again.

    attempts          how many more times a call is tried; 0 never
    first_wait_s      seconds before the first retry; doubled each time, unless the provider says Retry-After
    longest_wait_s    a provider that asks for a longer wait than this is not waited for
    """

    attempts: int = 2
    first_wait_s: float = 0.5
    longest_wait_s: float = 60.0

    def wait_before(self, attempt: int, asked_for: float | None) -> float | None:
        """Seconds to wait before retry number `attempt` (from 1), or None to give up."""
        if attempt > self.attempts:
            return None
        if asked_for is not None:
            return asked_for if asked_for <= self.longest_wait_s else None
        return min(self.first_wait_s * 2 ** (attempt - 1), self.longest_wait_s)


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """One call of a model, to be made by the gateway."""

    llm: Any
    model: str
    provider: str | None
    messages: list[Message]
    options: Mapping[str, Any]
    """Further keywords of `completion()`: tools, temperature, …"""
    stream: bool
    taken_call_ids: frozenset[str] = frozenset()
    """Ids of earlier tool calls of the turn; a provider that uses one again gets another for it."""

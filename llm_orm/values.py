"""What travels between the files: frozen values with names."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

Message = dict[str, Any]
"""One message as a model is shown it: {"role": "user", "content": "…"}, in the shape of OpenAI's chat API."""


def as_json(value: Any) -> Any:
    """JSON as SQLite (text) or PostgreSQL (already read) gave it."""
    return json.loads(value) if isinstance(value, str) else value


def as_uuid(value: Any) -> UUID:
    return value if isinstance(value, UUID) else UUID(value)


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


def text_of(error: BaseException) -> str:
    """What an error says; of one that cannot say it, what it is."""
    try:
        return str(error)
    except Exception:
        return f"a {type(error).__name__} that cannot be printed"


MOST_TOKENS = 2**31 - 1
"""What a column of tokens can hold."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call. `input_tokens` includes cached and cache-write tokens, `output_tokens` includes thinking."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    thinking_tokens: int = 0
    estimated: bool = False
    """True where the provider sent no figures, or not all, and the tokens were counted on this machine."""


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
    """A tool call that the model has finished asking for; it runs next, or waits for a person to approve it."""
    restart: bool = False
    """What was shown of this reply so far is taken back: it was corrected, or replaced, and begins anew."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that goes with a message: its content, or the address it is at."""

    media_type: str
    """"image/png", "application/pdf", …"""
    filename: str | None = None
    content: bytes | None = field(default=None, repr=False)
    """None where only the reference was kept."""
    url: str | None = None
    size: int = 0
    """Bytes; 0 where it was never read."""
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """What one call of a model gave back, whole, or as far as it came."""

    content: str | None = None
    thinking: str | None = None
    thinking_signature: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    message: Message = field(default_factory=dict)
    """The assistant message to show the model on the next call, verbatim: thinking blocks, provider fields and all.

    With "attachments", how many files the model made in it, which are shown in its place.
    """
    usage: Usage = Usage()
    cost: Decimal | None = None
    """US dollars; None where the model has no known price."""
    finish_reason: str | None = None
    model: str = ""
    provider: str = ""
    provider_request_id: str | None = None
    attachments: tuple[Attachment, ...] = ()
    """Pictures and sound that the model made."""

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
    exception: Exception | None = field(default=None, repr=False)
    """What the tool raised."""
    halts: bool = False
    """Whether the result is the turn's reply, and no further call of the model is made."""


@dataclass(frozen=True, slots=True)
class Halt:
    """What a tool returns to end the turn with its own text as the reply: no further call of the model is made.

    >>> return Halt("Your order is cancelled.")
    """

    text: str


@dataclass(frozen=True, slots=True)
class RETRY:
    """What a middleware returns to have it tried again.

    From on_response and on_error: the model is called again, with `message` as what the user says to its last reply.
    From on_tool_call_error: the tool is run once more.
    """

    message: str = ""


@dataclass(frozen=True, slots=True)
class REPLACE:
    """What a middleware returns to put something in the place of a reply, an error or a tool's result.

    response    the text; from on_response also a `Reply`
    """

    response: "str | Reply"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`CONTINUE` and `STOP`."""

    name: str

    def __repr__(self) -> str:
        return self.name


CONTINUE = Verdict("CONTINUE")
"""Go on as if nothing was said; from on_tool_call_error: go on even though the error is fatal."""

STOP = Verdict("STOP")
"""End the turn: with the error at hand, or with `StoppedByMiddleware`."""

Directive = RETRY | REPLACE | Verdict


@dataclass(frozen=True, slots=True)
class Fallbacks:
    """The models that are called where one fails for good.

    models    in order: "anthropic/claude-sonnet-4-5", …
    on        the errors that another model is asked for: exception classes, or their names; default: every error of a
              provider but those that say the request itself is wrong (400, 413, 422)
    """

    models: tuple[str, ...] = ()
    on: tuple[type[BaseException] | str, ...] | None = None


@dataclass
class TurnContext:
    """What a middleware is told of the turn that it is called in; one for the whole turn.

    messages      of the call that is about to be made; on_request may change it, or put another list in its place: what
                  the model sees is changed, what is stored is not
    model, provider
                  that are about to be called
    schema        what the reply must be, as an `llm_orm.structured.Schema`; None for text
    round         which call of the model this is, from 0
    correction_rounds
                  how often a middleware has sent the model back (RETRY) in this turn
    attempt       which try of that round, from 1
    spent         `Stats` of the chat so far, read before each call where a middleware has needs_spent = True; else None
    agent         the name that an agent's session is stored under; None for a plain chat
    stored        what the database keeps of a text, by the middlewares' stored_text
    duration_ms   of the last call
    state         for middlewares to keep things in until the turn ends
    """

    chat_id: Any
    turn_id: Any
    metadata: Any
    model: str
    provider: str
    streamed: bool
    options: Any
    schema: Any = None
    messages: list[Message] = field(default_factory=list)
    round: int = 0
    attempt: int = 1
    correction_rounds: int = 0
    agent: str | None = None
    stored: Callable[[str], str] = lambda text: text
    spent: "Stats | None" = None
    spent_in_turn: Decimal = Decimal(0)
    """US dollars, of the calls of this turn whose price is known."""
    duration_ms: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    estimate: Callable[[], Decimal | None] = lambda: None
    """US dollars that the call about to be made will cost at the least, counted here: its input, and max_tokens of
    output where that is set; None where the model has no known price."""


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
    options: Mapping[str, Any] = field(repr=False)
    """Further keywords of `completion()`: tools, temperature, …"""
    stream: bool
    taken_call_ids: frozenset[str] = frozenset()
    """Ids of earlier tool calls of the turn; a provider that uses one again gets another for it."""
    on_late: Callable[[Answer], None] | None = None
    """Called from another thread with the answer to a call that was given up before it came."""
    around: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext, repr=False)
    """What the request is sent within."""
    answers: list[Answer] = field(default_factory=list, repr=False)
    """How the call ended, once it has; the last counts."""

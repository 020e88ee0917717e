"""What can be set on a chat without being stored: when it is made or loaded, and for one turn."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypedDict
from uuid import UUID

from .attachments import MAX_FILE_BYTES
from .budgets import of_a_chat
from .errors import InvalidValue
from .middleware import SchemaSelfCorrection, check_middleware
from .structured import Schema
from .tools import Toolbox
from .transcript import History, json_copied
from .values import Fallbacks, Message, Retries

OURS = ("model", "messages", "stream", "tools", "max_retries", "num_retries", "fallbacks")
"""What llm_orm says to litellm's completion() itself: a retry made there would leave no row."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a chat calls its model. None of it is stored; `load_chat` takes it again.

    llm               what to call: anything with completion() and acompletion(); default: the store's, else litellm
    tools             functions, `Tool` classes or instances
    temperature       as the provider takes it
    max_tokens        of one reply
    thinking          {"effort": "low" | "medium" | "high"} or {"budget": tokens}, or both: whichever the provider takes
    effort            short for thinking={"effort": …}
    schema            what each reply must be: a pydantic model, or a JSON schema; `reply.parsed` is then an instance
    corrections       how often a reply that does not match the schema is sent back; past it: InvalidReply
    tool_choice       "auto", "none", "required", or the name of a tool; a forced choice holds until tools have run
    fallbacks         the models that are called where one fails: names, or a `Fallbacks`
    middlewares       `Middleware` objects, which come after those of the store; of one turn: after those of the chat
    budgets           `Budget` objects: what may be spent; of this chat, unless they say `by`. They come after those of
                      the store; of one turn: after those of the chat
    params            further keywords for litellm's completion()
    headers           extra HTTP headers
    request_timeout   seconds that one call of the model may take
    max_tool_calls    rounds of tool calls in one turn; past it: ToolRoundsExceeded
    tool_concurrency  calls of one round that run side by side
    retries           how often a failed call is tried again, or a `Retries`
    store_files       False: of the files that come with a message only name, size and address are kept
    max_file_bytes    that one of them may have
    history           the last n turns are sent, or what a function of the messages returns; default: all
    persistence       {"tool_calls": False, "requests": False} leaves those tables alone
    on_error          "rollback": a failed turn leaves the user's message only; "keep": also what was received
    wait              seconds to wait while another turn of the chat is running; 0: ChatBusy at once
    save_every        seconds after which what has come of a stream is written, for others to read, and for a process
                      that dies; default: it is written when it ends
    stale_after       seconds, 10 or more, without a sign of life after which a running turn counts as dead; 0: at once
    debug             say on stderr what happens
    """

    llm: Any = None
    tools: Any = ()
    temperature: float | None = None
    max_tokens: int | None = None
    thinking: Mapping[str, Any] | None = None
    effort: str | None = None
    schema: Any = None
    corrections: int = 2
    tool_choice: str | None = None
    fallbacks: Any = ()
    middlewares: Any = ()
    budgets: Any = ()
    params: Mapping[str, Any] = field(default_factory=dict, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    request_timeout: float | None = None
    max_tool_calls: int = 5
    tool_concurrency: int = 1
    retries: Retries | int = Retries()
    store_files: bool = True
    max_file_bytes: int = MAX_FILE_BYTES
    history: History = None
    persistence: Mapping[str, bool] = field(default_factory=dict)
    on_error: Literal["rollback", "keep"] = "rollback"
    wait: float = 0.0
    save_every: float | None = None
    stale_after: float = 60.0
    debug: bool = False
    toolbox: Toolbox = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check("tools", self.tools, "must be a list of functions and tools", _is_list)
        object.__setattr__(
            self, "toolbox", self.tools if isinstance(self.tools, Toolbox) else Toolbox(self.tools or ())
        )
        object.__setattr__(self, "tools", self.toolbox)  # which a change of other options takes over as it is
        _check("retries", self.retries, "must be a number of retries, 0 or more, or a Retries", _is_retries)
        if isinstance(self.retries, int):
            object.__setattr__(self, "retries", replace(Retries(), attempts=self.retries))
        _check("llm", self.llm, "must have completion() and acompletion(), as LLM(…) and litellm do", _is_llm)
        _check("temperature", self.temperature, "must be a number", lambda v: v is None or _is_number(v))
        _check("max_tokens", self.max_tokens, "must be 1 or more", lambda v: v is None or (_is_count(v) and v > 0))
        _check("request_timeout", self.request_timeout, "must be seconds", lambda v: v is None or _is_seconds(v))
        _check("headers", self.headers, "must be strings by name", _is_headers)
        _check("on_error", self.on_error, 'must be "rollback" or "keep"', lambda v: v in ("rollback", "keep"))
        _check("max_tool_calls", self.max_tool_calls, "must be 0 or more rounds", _is_count)
        _check("tool_concurrency", self.tool_concurrency, "must be 1 or more", lambda v: _is_count(v) and v > 0)
        _check("history", self.history, "must be a number of turns or a plain function", _is_history)
        _check("wait", self.wait, "must be seconds", _is_seconds)
        _check("save_every", self.save_every, "must be seconds", lambda v: v is None or _is_seconds(v))
        _check("stale_after", self.stale_after, "must be 0, or 10 seconds or more", _is_stale_after)
        _check("params", self.params, f"must be keywords of completion(), less {', '.join(OURS)}", _is_params)
        _check("persistence", self.persistence, 'takes "tool_calls" and "requests", True or False', _is_persistence)
        _check("effort", self.effort, 'must be "low", "medium" or "high"', lambda v: v is None or isinstance(v, str))
        _check("thinking", self.thinking, 'must be {"effort": …} or {"budget": tokens}', _is_thinking)
        if self.effort is not None:
            kept = {} if "type" in (self.thinking or {}) else self.thinking or {}
            object.__setattr__(self, "thinking", {**kept, "effort": self.effort})
            object.__setattr__(self, "effort", None)
        for name in ("params", "headers", "thinking", "persistence"):
            # The caller's own dict may change in the middle of a turn.
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else json_copied(dict(value)))
        _check("corrections", self.corrections, "must be 0 or more", _is_count)
        _check("tool_choice", self.tool_choice, 'must be "auto", "none", "required" or a tool\'s name', _is_name)
        _check("fallbacks", self.fallbacks, "must be names of models, or a Fallbacks", _is_fallbacks)
        object.__setattr__(self, "fallbacks", _fallbacks(self.fallbacks))
        _check("fallbacks", self.fallbacks.on, "are tried on exception classes or their names", _is_errors)
        _check("middlewares", self.middlewares, "must be a list of middlewares", _is_sequence)
        object.__setattr__(self, "middlewares", tuple(map(check_middleware, self.middlewares or ())))
        object.__setattr__(self, "budgets", of_a_chat(self.budgets or ()) if self.budgets != () else ())
        _check("store_files", self.store_files, "must be True or False", lambda v: isinstance(v, bool))
        _check("max_file_bytes", self.max_file_bytes, "must be 1 or more", lambda v: _is_count(v) and v > 0)
        if self.schema is not None:
            object.__setattr__(self, "schema", Schema.of(self.schema))

    def changed(self, **options: Any) -> "Options":
        return replace(self, **options) if options else self

    @property
    def stores_tool_calls(self) -> bool:
        return self.persistence.get("tool_calls", True)

    @property
    def stores_requests(self) -> bool:
        return self.persistence.get("requests", True)

    def all_middlewares(self, of_the_store: tuple[Any, ...]) -> tuple[Any, ...]:
        """Those of the store, those of the chat, and next to the model what corrects a reply by the schema."""
        chosen = (*of_the_store, *self.middlewares)
        corrected = any(isinstance(each, SchemaSelfCorrection) for each in chosen)
        if self.schema is None or not self.corrections or corrected:
            return chosen
        return (*chosen, SchemaSelfCorrection(self.corrections))

    def for_completion(self, *, after_tools: bool = False) -> dict[str, Any]:
        """The keywords that a call of `completion()` gets.

        after_tools    once tools have run in a turn, none is forced upon the model again: it would never come to an end
        """
        # Copies: litellm writes into schemas, and what it writes for one provider is wrong for another.
        keywords: dict[str, Any] = json_copied(dict(self.params))
        if self.toolbox.schemas:
            keywords["tools"] = json_copied(self.toolbox.schemas)
        is_forced = self.tool_choice not in (None, "auto", "none")
        if self.tool_choice and self.toolbox.schemas and not (after_tools and is_forced):
            keywords["tool_choice"] = _tool_choice(self.tool_choice)
        if self.schema is not None:
            keywords["response_format"] = self.schema.response_format
        if self.temperature is not None:
            keywords["temperature"] = self.temperature
        if self.max_tokens is not None:
            keywords["max_tokens"] = self.max_tokens
        if self.request_timeout is not None:
            keywords["timeout"] = self.request_timeout
        if self.headers:
            keywords["extra_headers"] = dict(self.headers)
        if self.thinking:
            keywords["thinking"] = dict(self.thinking)  # which the gateway puts into the provider's words
        return keywords


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may be called."""

    model: str
    provider: str | None
    answering_provider: str
    """The provider that will be called: the one named, or the one that the model belongs to."""

    @property
    def name(self) -> str:
        """The model's name without its provider's."""
        return self.model.removeprefix(f"{self.answering_provider}/")


Hooks = Mapping[str, tuple[Callable[..., Any], ...]]


@dataclass(frozen=True, slots=True)
class Setting:
    """All that a turn needs to know of its chat."""

    chat_id: UUID
    instructions: str | None
    metadata: Any
    candidates: tuple[Candidate, ...]
    """The model, and those that are called where it fails."""
    options: Options
    hooks: Hooks
    middlewares: tuple[Any, ...]
    llm: Any
    meter: Any = None
    """The budgets that the turn has to keep, as a `spending.Meter`; None where there are none."""
    estimate: Callable[[Candidate, list[Message]], Any] = lambda candidate, messages: None
    """US dollars that a call would cost at the least; None where the model has no known price."""
    redact: Callable[[BaseException], None] = lambda error: None
    """Takes the keys of the chat out of the texts of an error."""
    agent: str | None = None
    """The name that an agent's session is stored under."""


class TurnOptions(TypedDict, total=False):
    """What `ask` takes for one turn, for type checkers: `Options` but persistence and debug, three stored ones, and the
    inputs of a session."""

    inputs: Mapping[str, Any]
    model: str | None
    provider: str | None
    instructions: str | None
    llm: Any
    tools: Any
    temperature: float | None
    max_tokens: int | None
    thinking: Mapping[str, Any] | None
    effort: str | None
    schema: Any
    corrections: int
    tool_choice: str | None
    fallbacks: Any
    middlewares: Any
    budgets: Any
    params: Mapping[str, Any]
    headers: Mapping[str, str]
    request_timeout: float | None
    max_tool_calls: int
    tool_concurrency: int
    retries: Retries | int
    store_files: bool
    max_file_bytes: int
    history: History
    on_error: Literal["rollback", "keep"]
    wait: float
    save_every: float | None
    stale_after: float


NAMES = tuple(option.name for option in fields(Options) if option.init)


def _tool_choice(choice: str) -> Any:
    return choice if choice in ("auto", "none", "required") else {"type": "function", "function": {"name": choice}}


def _fallbacks(given: Any) -> Fallbacks:
    models: Any = given.models if isinstance(given, Fallbacks) else given
    on: Any = given.on if isinstance(given, Fallbacks) else None
    wanted = None if on is None else tuple(on) if isinstance(on, list | tuple | set | frozenset) else (on,)
    return Fallbacks((models,) if isinstance(models, str) else tuple(models or ()), wanted)


def _check(name: str, value: Any, rule: str, holds: Callable[[Any], bool]) -> None:
    if not holds(value):
        # What a mapping holds may be a key, which is not to be printed, and what should be one may be, too.
        shown = f" with {', '.join(map(repr, value))}" if isinstance(value, Mapping) and value else f"={value!r}"
        if name in ("headers", "params") and value is not None and not isinstance(value, Mapping):
            shown = f" given as {type(value).__name__}"
        raise InvalidValue(f"{name}{shown}: {name} {rule}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _is_stale_after(value: Any) -> bool:
    return _is_seconds(value) and (value == 0 or value >= 10)  # a living turn is heard of every five seconds


def _is_seconds(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_list(value: Any) -> bool:
    if isinstance(value, Toolbox):
        return True
    return value is None or (isinstance(value, Iterable) and not isinstance(value, str | Mapping))


def _is_sequence(value: Any) -> bool:
    return value is None or (isinstance(value, Iterable) and not isinstance(value, str | Mapping))


def _is_name(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(value))


def _is_fallbacks(value: Any) -> bool:
    given = value.models if isinstance(value, Fallbacks) else value
    models = (given,) if isinstance(given, str) else given or ()
    return isinstance(models, Iterable) and all(isinstance(model, str) and model for model in models)


def _is_errors(value: Any) -> bool:
    return value is None or all(
        (isinstance(each, str) and bool(each)) or (isinstance(each, type) and issubclass(each, BaseException))
        for each in value
    )


def _is_retries(value: Any) -> bool:
    return isinstance(value, Retries) or _is_count(value)


def _is_llm(value: Any) -> bool:
    return value is None or (callable(getattr(value, "completion", None)) and not isinstance(value, type))


def _is_headers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)


def _is_history(value: Any) -> bool:
    return value is None or _is_count(value) or (callable(value) and not inspect.iscoroutinefunction(value))


def _is_params(value: Any) -> bool:
    return isinstance(value, Mapping) and not set(value) & set(OURS)


def _is_persistence(value: Any) -> bool:
    names = {"tool_calls", "requests"}
    return isinstance(value, Mapping) and set(value) <= names and all(isinstance(v, bool) for v in value.values())


def _is_thinking(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, Mapping) or not value:
        return False
    effort, budget = value.get("effort"), value.get("budget")
    named = (effort is None or (isinstance(effort, str) and effort)) and (budget is None or _is_count(budget))
    return "type" in value or (bool(named) and set(value) <= {"effort", "budget"})

"""What can be set on a chat without being stored: when it is made or loaded, and for one turn."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypedDict

from .errors import InvalidValue
from .tools import Toolbox
from .transcript import History
from .values import Retries

OURS = ("model", "messages", "stream", "tools", "max_retries", "num_retries", "fallbacks")
"""What llm_orm says to litellm's completion() itself: a retry made there would leave no row."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a chat calls its model. None of it is stored; `load_chat` takes it again.

    llm               what to call: anything with completion() and acompletion(); default: the store's, else litellm
    tools             functions, `Tool` classes or instances
    temperature       as the provider takes it
    max_tokens        of one reply
    thinking          {"effort": "low" | "medium" | "high"} or {"budget": tokens}
    params            further keywords for litellm's completion()
    headers           extra HTTP headers
    request_timeout   seconds that one call of the model may take
    max_tool_calls    rounds of tool calls in one turn; past it: ToolRoundsExceeded
    tool_concurrency  calls of one round that run side by side
    retries           how often a failed call is tried again, or a `Retries`
    history           the last n turns are sent, or what a function of the messages returns; default: all
    persistence       {"tool_calls": False, "requests": False} leaves those tables alone
    on_error          "rollback": a failed turn leaves the user's message only; "keep": also what was received
    wait              seconds to wait while another turn of the chat is running; 0: ChatBusy at once
    stale_after       seconds, 10 or more, without a sign of life after which a running turn counts as dead; 0: at once
    debug             say on stderr what happens
    """

    llm: Any = None
    tools: Any = ()
    temperature: float | None = None
    max_tokens: int | None = None
    thinking: Mapping[str, Any] | None = None
    params: Mapping[str, Any] = field(default_factory=dict, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    request_timeout: float | None = None
    max_tool_calls: int = 5
    tool_concurrency: int = 1
    retries: Retries | int = Retries()
    history: History = None
    persistence: Mapping[str, bool] = field(default_factory=dict)
    on_error: Literal["rollback", "keep"] = "rollback"
    wait: float = 0.0
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
        _check("history", self.history, "must be a number of turns or a function", _is_history)
        _check("wait", self.wait, "must be seconds", _is_seconds)
        _check("stale_after", self.stale_after, "must be 0, or 10 seconds or more", _is_stale_after)
        _check("params", self.params, f"must be keywords of completion(), less {', '.join(OURS)}", _is_params)
        _check("persistence", self.persistence, 'takes "tool_calls" and "requests", True or False', _is_persistence)
        _check("thinking", self.thinking, 'must be {"effort": …} or {"budget": tokens}', _is_thinking)

    def changed(self, **options: Any) -> "Options":
        return replace(self, **options) if options else self

    @property
    def stores_tool_calls(self) -> bool:
        return self.persistence.get("tool_calls", True)

    @property
    def stores_requests(self) -> bool:
        return self.persistence.get("requests", True)

    def for_completion(self) -> dict[str, Any]:
        """The keywords that a call of `completion()` gets: the same on every round of a turn."""
        # Copies: litellm writes into schemas, and what it writes for one provider is wrong for another.
        keywords: dict[str, Any] = copy.deepcopy(dict(self.params))
        if self.toolbox.schemas:
            keywords["tools"] = copy.deepcopy(self.toolbox.schemas)
        if self.temperature is not None:
            keywords["temperature"] = self.temperature
        if self.max_tokens is not None:
            keywords["max_tokens"] = self.max_tokens
        if self.request_timeout is not None:
            keywords["timeout"] = self.request_timeout
        if self.headers:
            keywords["extra_headers"] = dict(self.headers)
        if self.thinking:
            keywords |= _thinking_keywords(self.thinking)
        return keywords


class TurnOptions(TypedDict, total=False):
    """What `ask` takes for one turn, for type checkers: `Options` but persistence and debug, and three stored ones."""

    model: str | None
    provider: str | None
    instructions: str | None
    llm: Any
    tools: Any
    temperature: float | None
    max_tokens: int | None
    thinking: Mapping[str, Any] | None
    params: Mapping[str, Any]
    headers: Mapping[str, str]
    request_timeout: float | None
    max_tool_calls: int
    tool_concurrency: int
    retries: Retries | int
    history: History
    on_error: Literal["rollback", "keep"]
    wait: float
    stale_after: float


NAMES = tuple(option.name for option in fields(Options) if option.init)


def _thinking_keywords(thinking: Mapping[str, Any]) -> dict[str, Any]:
    if "type" in thinking:  # the provider's own shape
        return {"thinking": dict(thinking)}
    keywords: dict[str, Any] = {}
    if "budget" in thinking:
        keywords["thinking"] = {"type": "enabled", "budget_tokens": thinking["budget"]}
    if "effort" in thinking:
        keywords["reasoning_effort"] = thinking["effort"]
    return keywords


def _check(name: str, value: Any, rule: str, holds: Callable[[Any], bool]) -> None:
    if not holds(value):
        # What a mapping holds may be a key, which is not to be printed.
        shown = f" with {', '.join(map(repr, value))}" if isinstance(value, Mapping) and value else f"={value!r}"
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


def _is_retries(value: Any) -> bool:
    return isinstance(value, Retries) or _is_count(value)


def _is_llm(value: Any) -> bool:
    return value is None or callable(getattr(value, "completion", None))


def _is_headers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)


def _is_history(value: Any) -> bool:
    return value is None or callable(value) or _is_count(value)


def _is_params(value: Any) -> bool:
    return isinstance(value, Mapping) and not set(value) & set(OURS)


def _is_persistence(value: Any) -> bool:
    names = {"tool_calls", "requests"}
    return isinstance(value, Mapping) and set(value) <= names and all(isinstance(v, bool) for v in value.values())


def _is_thinking(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, Mapping) and ("type" in value or (bool(value) and set(value) <= {"effort", "budget"}))

"""Function or class → tool: its JSON schema (by pydantic), and the checking and running of a call's arguments."""

import asyncio
import functools
import inspect
import json
import logging
import re
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_type_hints, overload
from uuid import UUID

import pydantic
import pydantic_core

from .errors import InvalidValue, ToolError, check_spelling
from .values import Halt, ToolCall, ToolOutcome, storable, text_of

log = logging.getLogger("llm_orm")


@dataclass(frozen=True, slots=True)
class ToolContext:
    """Where a tool is being called. Reaches every parameter that is annotated with it; the model never sees it."""

    chat_id: UUID
    tool_call_id: str
    metadata: Any
    """The chat's."""
    redact: Callable[[BaseException], None] = field(default=lambda error: None, repr=False, compare=False)
    """Takes the keys that the chat calls its model with out of the texts of an error."""
    around: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext, repr=False, compare=False)
    """What the call runs within, on its own thread or task."""


def _snake_case(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))


class Tool:
    """What a model may call: subclass it, or put `@tool` on a function.

    >>> class LookupOrder(Tool):
    ...     name = "lookup_order"
    ...     description = "Look up an order's status"
    ...
    ...     class Parameters(BaseModel):
    ...         order_id: str
    ...
    ...     def execute(self, order_id):
    ...         return {"status": "shipped"}

    name           what the model calls it; default: the class's name in snake_case
    description    when to use it; default: the docstring
    Parameters     a pydantic model of the arguments, whose fields `execute` gets as keywords; default: made of the
                   annotations of `execute`
    idempotent     whether it may run a second time when it is not known whether it ran
    requires_approval
                   whether the turn waits for a person before it runs: True, or a method that says so of the arguments
                   (a dict)
    execute        plain or async; returns a string, anything that pydantic can write as JSON, or a `Halt`
    """

    name: str = ""
    description: str = ""
    Parameters: ClassVar[type[pydantic.BaseModel]]
    idempotent: bool = False
    requires_approval: Any = False

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        known = ("Parameters", "idempotent", "requires_approval", "execute")
        check_spelling(f"the tool {cls.__name__}", cls.__dict__, known)
        cls.name = cls.__dict__.get("name") or _snake_case(cls.__name__)
        cls.description = cls.__dict__.get("description") or inspect.cleandoc(cls.__doc__ or "")

    execute: Callable[..., Any]

    @property
    def schema(self) -> dict[str, Any]:
        """What the model is told: {"type": "function", "function": {"name", "description", "parameters"}}."""
        schema = _without_titles(_quietly(self._parameters.model_json_schema))
        function = {"name": self.name, "description": self.description, "parameters": schema}
        return {"type": "function", "function": function}

    @functools.cached_property
    def _parameters(self) -> type[pydantic.BaseModel]:
        given: Any = getattr(self, "Parameters", None)
        if given is None:
            return _parameters_of(self.execute, self.name)
        if not (isinstance(given, type) and issubclass(given, pydantic.BaseModel)):
            raise InvalidValue(f"the Parameters of the tool {self.name!r} must be a pydantic model, not {given!r}")
        return given

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.execute)

    def __repr__(self) -> str:
        return f"<tool {self.name}>"


class FunctionTool(Tool):
    """A tool made of a function; still callable as the function."""

    def __init__(
        self,
        function: Callable[..., Any],
        name: str | None,
        description: str | None,
        idempotent: bool,
        requires_approval: bool | Callable[[dict[str, Any]], Any],
    ):
        self.execute = function
        self.requires_approval = requires_approval
        self.name = name or function.__name__
        self.description = description or inspect.getdoc(function) or ""
        self.idempotent = idempotent
        self.Parameters = _parameters_of(function, self.name)  # type: ignore[misc]
        self.__doc__ = function.__doc__
        self.__wrapped__ = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.execute(*args, **kwargs)


@overload
def tool(function: Callable[..., Any]) -> FunctionTool: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    idempotent: bool = False,
    requires_approval: bool | Callable[[dict[str, Any]], Any] = False,
) -> Callable[[Callable[..., Any]], FunctionTool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    description: str | None = None,
    idempotent: bool = False,
    requires_approval: bool | Callable[[dict[str, Any]], Any] = False,
) -> Any:
    """Make a tool of a typed function: its annotations become the schema, its docstring the description.

    >>> @tool
    ... def get_weather(city: str, unit: Literal["c", "f"] = "c") -> dict:
    ...     "Current weather in a city."

    idempotent           whether it may run a second time when it is not known whether it ran
    requires_approval    whether the turn waits for `chat.approve()` or `chat.deny()` before it runs: True, or a
                         function of the arguments (a dict) that says so

    A parameter annotated `ToolContext` gets the chat's id, the call's id and the chat's metadata.
    Raises `InvalidValue` for a function whose parameters pydantic cannot describe.
    """

    def make(function: Callable[..., Any]) -> FunctionTool:
        if not callable(function):
            raise InvalidValue(f"@tool goes on a function, not on {function!r}: its options are keywords, as in name=…")
        return FunctionTool(function, name, description, idempotent, requires_approval)

    return make(function) if function is not None else make


class Toolbox:
    """The tools of a chat, by name."""

    def __init__(self, tools: Iterable[Any] = ()):
        self.by_name: dict[str, Tool] = {}
        for given in tools:
            made = _as_tool(given)
            if made.name in self.by_name:
                raise InvalidValue(f"two tools are named {made.name!r}")
            self.by_name[made.name] = made
        self.schemas = [made.schema for made in self.by_name.values()]

    def async_tools(self) -> list[str]:
        return [name for name, made in self.by_name.items() if made.is_async]

    def approval_of(self, call: ToolCall) -> bool | Callable[[dict[str, Any]], Any]:
        """Whether a person must approve the call, or the function of the application that knows."""
        made = self.by_name.get(call.name)
        wanted = getattr(made, "requires_approval", False)
        return wanted if callable(wanted) else bool(wanted)

    @property
    def asks_for_approval(self) -> bool:
        return any(made.requires_approval for made in self.by_name.values())

    def is_idempotent(self, call: ToolCall) -> bool:
        made = self.by_name.get(call.name)
        return made is not None and made.idempotent

    def is_async(self, call: ToolCall) -> bool:
        made = self.by_name.get(call.name)
        return made is not None and made.is_async

    def arguments_of(self, call: ToolCall) -> dict[str, Any] | None:
        """The arguments as the tool gets them; None where the call cannot run, of which the model will be told."""
        try:
            return self._checked(call)[1]
        except Exception:
            return None

    def run(self, call: ToolCall, context: ToolContext) -> ToolOutcome:
        """Run a call on this thread. Whatever goes wrong in it becomes its outcome."""
        started = time.perf_counter()
        try:
            with context.around():
                made, keywords = self._prepare(call, context)
                result = made.execute(**keywords)
                return _outcome(call, result, started)
        except Exception as error:
            return self._failed(call, error, started, context)

    async def arun(self, call: ToolCall, context: ToolContext) -> ToolOutcome:
        """Run a call of an async tool."""
        started = time.perf_counter()
        try:
            with context.around():
                made, keywords = self._prepare(call, context)
                result = await made.execute(**keywords)
                return _outcome(call, result, started)
        except Exception as error:
            return self._failed(call, error, started, context)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Something that the tool waited for was cancelled, not the turn.
            return self._failed(call, RuntimeError(f"cancelled: {error}"), started, context)

    def _prepare(self, call: ToolCall, context: ToolContext) -> tuple[Tool, dict[str, Any]]:
        made, keywords = self._checked(call)
        for name in _context_parameters(made.execute):
            keywords[name] = context
        return made, keywords

    def _checked(self, call: ToolCall) -> tuple[Tool, dict[str, Any]]:
        made = self.by_name.get(call.name)
        if made is None:
            raise _Unavailable(
                f"Model tried to call unavailable tool {call.name!r}. Available tools: [{', '.join(self.by_name)}]."
            )
        try:
            checked = made._parameters.model_validate_json(call.arguments.strip() or "{}")
        except pydantic.ValidationError as error:
            raise _InvalidArguments(_complaint(error)) from error
        keywords = {name: getattr(checked, name) for name in type(checked).model_fields}
        keywords |= checked.model_extra or {}
        return made, keywords

    def _failed(self, call: ToolCall, error: Exception, started: float, context: ToolContext) -> ToolOutcome:
        context.redact(error)
        known, said = isinstance(error, (_Unavailable, _InvalidArguments, _NoResult)), text_of(error)
        fatal = _is_fatal(error)
        if not known and not isinstance(error, ToolError):
            told = "the turn ends with it" if fatal else "the model was told"
            log.warning("the tool %r failed, and %s: %s", call.name, told, said, exc_info=error)
        return ToolOutcome(
            call,
            result=storable(said if known else f"Error executing tool {call.name!r}: {said}"),
            status="failed",
            error=storable(said if known else f"{type(error).__name__}: {said}"),
            duration_ms=_milliseconds_since(started),
            fatal=error if fatal else None,
            exception=error,
        )


class _Unavailable(Exception):
    pass


class _InvalidArguments(Exception):
    pass


class _NoResult(Exception):
    pass


def _is_fatal(error: Exception) -> bool:
    """Whether it ends the turn: the tool said so, or it has no right to what it needs, which no model can mend."""
    if isinstance(error, ToolError):
        return error.fatal
    response = getattr(error, "response", None)
    statuses = (getattr(owner, name, None) for owner in (error, response) for name in ("status_code", "status"))
    return any(status in (401, 403) for status in statuses)


def _outcome(call: ToolCall, result: Any, started: float) -> ToolOutcome:
    halts = isinstance(result, Halt)
    text = _as_text(call, result.text if isinstance(result, Halt) else result)
    return ToolOutcome(call, text, duration_ms=_milliseconds_since(started), halts=halts)


def _as_text(call: ToolCall, result: Any) -> str:
    """The text that the model is shown: a string as it is, anything else as JSON."""
    if isinstance(result, str):
        return storable(result)
    if inspect.isawaitable(result):
        getattr(result, "close", lambda: None)()
        raise TypeError("it returned an awaitable: make it an async function, which aask() awaits")
    try:
        try:
            return pydantic_core.to_json(result, fallback=str).decode()
        except pydantic_core.PydanticSerializationError:  # bytes that are no text, half a character
            return json.dumps(pydantic_core.to_jsonable_python(result, fallback=str, bytes_mode="base64"))
    except Exception as error:
        # It did its work all the same: the model should not call it again for that.
        problem = f"its result cannot be written as JSON: {text_of(error)}"
        raise _NoResult(f"The tool {call.name!r} ran, but {problem}") from error


def _milliseconds_since(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)


def _complaint(error: pydantic.ValidationError) -> str:
    problems = (f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in error.errors(include_url=False))
    return f"Invalid tool arguments: {'; '.join(problems)}"


def _as_tool(given: Any) -> Tool:
    if inspect.isfunction(given) or inspect.ismethod(given):
        given = tool(given)
    elif isinstance(given, type) and issubclass(given, Tool):
        try:
            given = given()
        except TypeError as error:
            raise InvalidValue(f"the tool {given.name!r} cannot be made: {error}; give an instance of it") from error
    if not isinstance(given, Tool):
        hint = ", one by one" if isinstance(given, list | tuple) else ""
        raise InvalidValue(f"{given!r} is not a tool: give a function, or a subclass of llm_orm.Tool{hint}")
    if not callable(getattr(given, "execute", None)):
        raise InvalidValue(f"the tool {given.name!r} has no execute()")
    if not callable(given.requires_approval) and not isinstance(given.requires_approval, bool):
        raise InvalidValue(
            f"requires_approval of the tool {given.name!r} must be True, False or a function of the arguments, "
            f"not {given.requires_approval!r}"
        )
    if not _NAME.fullmatch(given.name):
        raise InvalidValue(f"{given.name!r} cannot be the name of a tool: give one of letters, digits, _ and -")
    return given


_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
"""What one provider or the other takes."""


def _parameters_of(function: Callable[..., Any], name: str) -> type[pydantic.BaseModel]:
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise InvalidValue(
            f"the annotations of the tool {name!r} cannot be read: {error}; the types that they name must be at the "
            "top of its module, and be there when the tool is made"
        ) from error
    fields: dict[str, Any] = {}
    for position, parameter in enumerate(inspect.signature(function).parameters.values()):
        unnamed = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY)
        if unnamed or parameter.name.startswith("_"):
            raise InvalidValue(f"the tool {name!r} takes {parameter}: give its parameters names that a model can use")
        if position == 0 and parameter.name in ("self", "cls") and parameter.name not in hints:
            raise InvalidValue(f"the tool {name!r} is a method: leave it plain, and give the bound one in tools=[…]")
        hint = hints.get(parameter.name, Any)
        if not _is_context(hint):
            fields[parameter.name] = (hint, ... if parameter.default is parameter.empty else parameter.default)
    try:
        model = _quietly(pydantic.create_model, name, **fields)
        _quietly(model.model_json_schema)
    except (pydantic.errors.PydanticUserError, NameError, TypeError) as error:
        problem = str(error).partition(". Set `arbitrary")[0].splitlines()[0]
        raise InvalidValue(f"the tool {name!r} has a parameter that cannot be described as JSON: {problem}") from error
    return model


def _context_parameters(function: Callable[..., Any]) -> list[str]:
    """The names of the parameters that get the context; whatever else the function needs may be out of reach."""
    try:
        hints = get_type_hints(function)
    except (NameError, AttributeError, TypeError, SyntaxError):
        hints = {}
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if _is_context(hints.get(parameter.name, parameter.annotation))
    ]


def _is_context(hint: Any) -> bool:
    if hint is ToolContext or hint == "ToolContext":
        return True
    wraps = typing.get_origin(hint) in (typing.Union, types.UnionType, typing.Annotated)
    return wraps and any(map(_is_context, typing.get_args(hint)))


def _quietly(describe: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Without pydantic's warnings of a field that hides a method, or a default that is not JSON: both are harmless."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return describe(*args, **kwargs)


def _without_titles(schema: Any) -> Any:
    """The schema less the titles that pydantic adds, which tell a model nothing and cost tokens."""
    if isinstance(schema, dict):
        return {
            key: {name: _without_titles(value) for name, value in item.items()}
            if key in ("properties", "$defs")
            else _without_titles(item)
            for key, item in schema.items()
            if not (key == "title" and isinstance(item, str))
        }
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    return schema

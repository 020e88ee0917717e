"""Function or class → tool: its JSON schema (by pydantic), and the checking and running of a call's arguments."""

import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_type_hints, overload
from uuid import UUID

import pydantic
import pydantic_core

from .errors import InvalidValue, ToolError
from .values import ToolCall, ToolOutcome


@dataclass(frozen=True, slots=True)
class ToolContext:
    """Where a tool is being called. Reaches every parameter that is annotated with it; the model never sees it."""

    chat_id: UUID
    tool_call_id: str
    metadata: Any
    """The chat's."""


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
    Parameters     a pydantic model of the arguments; `execute` gets its fields as keywords
    idempotent     whether it may run a second time when it is not known whether it ran
    execute        plain or async; returns a string, or anything that pydantic can write as JSON
    """

    name: str = ""
    description: str = ""
    Parameters: ClassVar[type[pydantic.BaseModel]]
    idempotent: bool = False

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.name = cls.__dict__.get("name") or _snake_case(cls.__name__)
        cls.description = cls.__dict__.get("description") or inspect.getdoc(cls) or ""

    execute: Callable[..., Any]

    @property
    def schema(self) -> dict[str, Any]:
        """What the model is told: {"type": "function", "function": {"name", "description", "parameters"}}."""
        parameters = getattr(self, "Parameters", None)
        schema = parameters.model_json_schema() if parameters else {"type": "object", "properties": {}}
        function = {"name": self.name, "description": self.description, "parameters": _without_titles(schema)}
        return {"type": "function", "function": function}

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.execute)

    def __repr__(self) -> str:
        return f"<tool {self.name}>"


class FunctionTool(Tool):
    """A tool made of a function; still callable as the function."""

    def __init__(self, function: Callable[..., Any], name: str | None, description: str | None, idempotent: bool):
        self.execute = function
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
    *, name: str | None = None, description: str | None = None, idempotent: bool = False
) -> Callable[[Callable[..., Any]], FunctionTool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    description: str | None = None,
    idempotent: bool = False,
) -> Any:
    """Make a tool of a typed function: its annotations become the schema, its docstring the description.

    >>> @tool
    ... def get_weather(city: str, unit: Literal["c", "f"] = "c") -> dict:
    ...     "Current weather in a city."

    A parameter annotated `ToolContext` gets the chat's id, the call's id and the chat's metadata.
    Raises `InvalidValue` for a function whose parameters pydantic cannot describe.
    """

    def make(function: Callable[..., Any]) -> FunctionTool:
        return FunctionTool(function, name, description, idempotent)

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

    def is_async(self, call: ToolCall) -> bool:
        made = self.by_name.get(call.name)
        return made is not None and made.is_async

    def run(self, call: ToolCall, context: ToolContext) -> ToolOutcome:
        """Run a call on this thread. Whatever goes wrong in it becomes its outcome."""
        started = time.perf_counter()
        try:
            made, keywords = self._prepare(call, context)
            result = made.execute(**keywords)
        except Exception as error:
            return self._failed(call, error, started)
        return _completed(call, result, started)

    async def arun(self, call: ToolCall, context: ToolContext) -> ToolOutcome:
        """Run a call of an async tool."""
        started = time.perf_counter()
        try:
            made, keywords = self._prepare(call, context)
            result = await made.execute(**keywords)
        except Exception as error:
            return self._failed(call, error, started)
        return _completed(call, result, started)

    def _prepare(self, call: ToolCall, context: ToolContext) -> tuple[Tool, dict[str, Any]]:
        made = self.by_name.get(call.name)
        if made is None:
            raise _Unavailable(
                f"Model tried to call unavailable tool {call.name!r}. Available tools: [{', '.join(self.by_name)}]."
            )
        keywords: dict[str, Any] = {}
        parameters = getattr(made, "Parameters", None)
        if parameters is not None:
            try:
                checked = parameters.model_validate_json(call.arguments or "{}")
            except pydantic.ValidationError as error:
                raise _InvalidArguments(_complaint(error)) from error
            keywords = {name: getattr(checked, name) for name in type(checked).model_fields}
            keywords |= checked.model_extra or {}
        for name in _context_parameters(made.execute):
            keywords[name] = context
        return made, keywords

    def _failed(self, call: ToolCall, error: Exception, started: float) -> ToolOutcome:
        known = isinstance(error, (_Unavailable, _InvalidArguments))
        return ToolOutcome(
            call,
            result=str(error) if known else f"Error executing tool {call.name!r}: {error}",
            status="failed",
            error=str(error) if known else f"{type(error).__name__}: {error}",
            duration_ms=_milliseconds_since(started),
            fatal=error if isinstance(error, ToolError) and error.fatal else None,
        )


class _Unavailable(Exception):
    pass


class _InvalidArguments(Exception):
    pass


def _completed(call: ToolCall, result: Any, started: float) -> ToolOutcome:
    return ToolOutcome(call, result=_as_text(result), duration_ms=_milliseconds_since(started))


def _as_text(result: Any) -> str:
    if isinstance(result, str):
        return result
    return pydantic_core.to_json(result, fallback=str).decode()


def _milliseconds_since(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)


def _complaint(error: pydantic.ValidationError) -> str:
    problems = (f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in error.errors(include_url=False))
    return f"Invalid tool arguments: {'; '.join(problems)}"


def _as_tool(given: Any) -> Tool:
    if isinstance(given, type) and issubclass(given, Tool):
        given = given()
    if isinstance(given, Tool):
        if not callable(getattr(given, "execute", None)):
            raise InvalidValue(f"the tool {given.name!r} has no execute()")
        return given
    if inspect.isfunction(given) or inspect.ismethod(given):
        return tool(given)
    raise InvalidValue(f"{given!r} is not a tool: give a function, or a subclass of llm_orm.Tool")


def _parameters_of(function: Callable[..., Any], name: str) -> type[pydantic.BaseModel]:
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise InvalidValue(f"the tool {name!r} takes {parameter}: give its parameters names that a model can use")
        hint = hints.get(parameter.name, Any)
        if hint is not ToolContext:
            fields[parameter.name] = (hint, ... if parameter.default is parameter.empty else parameter.default)
    try:
        model = pydantic.create_model(name, **fields)
        model.model_json_schema()
    except (pydantic.errors.PydanticUserError, NameError) as error:
        raise InvalidValue(f"the tool {name!r} has a parameter that cannot be described as JSON: {error}") from error
    return model


def _context_parameters(function: Callable[..., Any]) -> list[str]:
    try:
        hints: Mapping[str, Any] = get_type_hints(function)
    except (NameError, TypeError):
        return []
    return [name for name, hint in hints.items() if hint is ToolContext]


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

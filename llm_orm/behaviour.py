"""What an agent's class says, as what a chat asks with: config, hooks, middlewares."""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from .agent import OF_THE_CLASS, Agent
from .checks import OVERRIDES, check_overrides, options_of
from .config import Config
from .errors import InvalidValue
from .values import REPLACE, Reply, TurnContext

OF_THE_CHAT = {
    "on_tool_start": "on_tool_call_start",
    "on_tool_end": "on_tool_call_end",
    "on_tool_error": "on_tool_call_error",
    "on_complete": "on_end_message",
}
"""The hooks that a chat has too, by another name."""


class Behaviour:
    """What an agent's class says: what is plain is checked once, what depends on the inputs is asked anew each time.

    options    what this process says in the place of the class
    hooks      of the chat, by the chat's names
    middlewares
               what the chat has no hook for
    """

    def __init__(self, agent_class: type[Agent], options: Mapping[str, Any]):
        self.agent = _made(agent_class)
        self._options = options
        self.functions: dict[str, Callable[[dict[str, Any]], Any]] = {}
        plain: dict[str, Any] = {}
        for name in OF_THE_CLASS:
            said = _NOTHING if name in options else _declared(agent_class, name)
            if said is _NOTHING:
                continue
            said = _bound(said, self.agent)
            if name not in _CALLABLES and (inspect.isroutine(said) or isinstance(said, functools.partial)):
                _check_plain(name, self.agent, said)
                self.functions[name] = said
            else:
                plain[name] = said
        self.base = _with(Config(None, None, None, options_of(options)), plain)
        self.hooks = _hooks_of(self.agent)
        self.middlewares = _middlewares_of(self.agent)

    def config(self, inputs: dict[str, Any], names: Sequence[str] = OF_THE_CLASS) -> Config:
        """What it says for these inputs, of all that it says something of, or of these names alone."""
        return _with(self.base, {name: self._ask(name, inputs) for name in self.functions if name in names})

    def again(self) -> "Behaviour":
        """The same, of an agent of its own."""
        return Behaviour(type(self.agent), self._options)

    def _ask(self, name: str, inputs: dict[str, Any]) -> Any:
        try:
            return self.functions[name](inputs)
        except Exception as error:
            raise InvalidValue(
                f"the {name} of {self.agent!r} failed for the inputs {', '.join(map(str, inputs)) or '(none)'}: "
                f"{type(error).__name__}: {error}; inputs are the session's metadata and ask(…, inputs={{…}})"
            ) from error


_NOTHING = object()

_CALLABLES = ("llm", "history")
"""Options whose value may be a function itself."""


def _made(agent_class: type[Agent]) -> Agent:
    try:
        return agent_class()
    except TypeError as error:
        raise InvalidValue(
            f"the agent {agent_class.__name__} cannot be made: {error}; it is made of nothing"
        ) from error


def _declared(agent_class: type, name: str) -> Any:
    """What the class or a base of it says, as it was written: a function there is one of the inputs, not a method."""
    return next((base.__dict__[name] for base in agent_class.__mro__ if name in base.__dict__), _NOTHING)


def _bound(said: Any, agent: Agent) -> Any:
    """A method as what it is called with besides the agent."""
    if isinstance(said, staticmethod | classmethod):
        return said.__get__(agent, type(agent))
    if not inspect.isfunction(said):
        return said
    needed = [each for each in inspect.signature(said).parameters.values() if each.default is each.empty]
    positional = [each for each in needed if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return functools.partial(said, agent) if len(positional) > 1 else said


def _check_plain(name: str, agent: Agent, function: Callable[..., Any]) -> None:
    if inspect.iscoroutinefunction(function):
        raise InvalidValue(f"the {name} of {agent!r} is async: make it a plain function of the inputs")
    # One that takes something else is likely to be a tool, which is not to be called to find out.
    taken = next(iter(inspect.signature(function).parameters.values()), None)
    if (
        name == "tools"
        and taken is not None
        and taken.annotation is not taken.empty
        and not _is_inputs(taken.annotation)
    ):
        raise InvalidValue(
            f"the tools of {agent!r} are a function of {str(taken)!r}, not of the inputs: for a tool, write "
            f"tools = [{getattr(function, '__name__', 'it')}]"
        )


def _is_inputs(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return annotation.rpartition(".")[2].partition("[")[0] in ("dict", "Dict", "Mapping", "Any", "object")
    kind = typing.get_origin(annotation) or annotation
    return kind in (Any, object) or (isinstance(kind, type) and issubclass(kind, Mapping | dict))


def _with(config: Config, said: Mapping[str, Any]) -> Config:
    overrides = {name: said[name] for name in OVERRIDES if name in said}
    check_overrides(overrides)
    options = {name: value for name, value in said.items() if name not in OVERRIDES}
    return replace(config.with_options(**options), **overrides)


# An agent's hooks, as those of its chat, or as middlewares


def _hook(agent: Agent, name: str) -> Callable[..., Any] | None:
    """The agent's own hook of that name, where it does something."""
    function: Any = getattr(agent, name)
    if function is None or getattr(function, "__func__", None) is getattr(Agent, name):
        return None
    if not callable(function):
        raise InvalidValue(f"the {name} of {agent!r} must be a method, not {function!r}")
    return function


def _hooks_of(agent: Agent) -> dict[str, tuple[Callable[..., Any], ...]]:
    hooks = {chats: (function,) for own, chats in OF_THE_CHAT.items() if (function := _hook(agent, own))}
    thinking = _hook(agent, "on_thinking")
    return {**hooks, "after_response": (_on_thinking(thinking),)} if thinking else hooks


def _on_thinking(function: Callable[..., Any]) -> Callable[..., Any]:
    def after_response(reply: Reply) -> Any:
        return function(reply.thinking, reply) if reply.thinking else None

    return _async_as(after_response, function)


def _middlewares_of(agent: Agent) -> tuple[Any, ...]:
    start, rescues = _hook(agent, "on_start"), _rescues_of(agent)
    return (*([_starting(start)] if start else []), *([_rescuing(rescues)] if rescues else []))


def _starting(function: Callable[..., Any]) -> Any:
    """A middleware that calls the function before the first call of the model in a turn."""

    def on_request(context: TurnContext) -> Any:
        # That call is prepared again for a model that is fallen back on, and where a middleware sends the model back.
        if context.round == 0 and not context.state.get("agent has started"):
            context.state["agent has started"] = True
            return function(context.messages)

    return SimpleNamespace(on_request=_async_as(on_request, function))


def _rescuing(rescues: Sequence[Mapping[Any, Any]]) -> Any:
    """A middleware that puts a reply in the place of an exception."""

    def on_error(context: TurnContext, error: Exception) -> Any:
        rescue = _nearest(rescues, error)
        said = rescue(error) if callable(rescue) else rescue
        return _replaced_by_awaited(said) if inspect.isawaitable(said) else _replaced_by(said)

    return SimpleNamespace(on_error=_async_as(on_error, *(f for each in rescues for f in each.values())))


def _nearest(rescues: Sequence[Mapping[Any, Any]], error: Exception) -> Any:
    """By the exception's class or its name; what is nearest to it counts, and of its equals the agent's nearest."""
    for cls in type(error).__mro__:
        for declared in rescues:
            for key in (cls, cls.__name__):
                if key in declared:
                    return declared[key]
    return None


def _replaced_by(said: Any) -> REPLACE | None:
    return None if said is None else REPLACE(str(said))


async def _replaced_by_awaited(said: Any) -> REPLACE | None:
    return _replaced_by(await said)


def _rescues_of(agent: Agent) -> list[dict[Any, Any]]:
    """What the class declares, and each base of it."""
    declared = [base.__dict__["rescues"] for base in type(agent).__mro__ if base.__dict__.get("rescues")]
    for each in declared:
        if not isinstance(each, Mapping):
            raise InvalidValue(f"the rescues of {agent!r} must be a dict of exceptions and replies, not {each!r}")
        for key, value in each.items():
            is_class = isinstance(key, type) and issubclass(key, Exception)
            if not (is_class or isinstance(key, str)) or not (isinstance(value, str) or callable(value)):
                raise InvalidValue(
                    f"rescues has {key!r}: {value!r}; it takes an exception class or its name, and a text or a function"
                )
    return [{key: _bound(value, agent) for key, value in each.items()} for each in declared]


def _async_as(wrapper: Callable[..., Any], *functions: Any) -> Callable[..., Any]:
    """The wrapper; async where a function that it calls is, and by its name, so that a plain ask is refused in time."""
    first = next(filter(inspect.iscoroutinefunction, functions), None)
    if first is None:
        return wrapper

    @functools.wraps(first)
    async def awaiting(*arguments: Any) -> Any:
        result = wrapper(*arguments)
        return await result if inspect.isawaitable(result) else result

    return awaiting

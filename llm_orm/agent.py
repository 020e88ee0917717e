"""Agent: behaviour declared in code. AgentSession: an agent tied to a stored chat.

Code wins: what an agent is comes from its class, each time anew; what was said comes from the database, and so does the
metadata.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Self
from uuid import UUID

import peewee as pw

from .chat import Chat
from .checks import (
    OVERRIDES,
    as_key,
    check_keywords,
    check_overrides,
    check_storable,
    clear_about,
    columns_of,
    options_of,
    stored_metadata,
)
from .config import Config
from .errors import AgentMismatch, ChatGone, InvalidValue
from .history import fork
from .loading import find_chat
from .options import NAMES as OPTIONS
from .options import Options
from .records import LlmAgentSession, LlmChat, now, uuid7
from .store import Store, as_store
from .values import REPLACE, Reply, Stats, TurnContext

OF_THE_PROCESS = ("llm", "history", "persistence", "on_error", "wait", "stale_after", "store_files", "debug")
"""Options that say how this process works, not what the agent is: taken where a session is made or loaded."""

OF_THE_CLASS = (*OVERRIDES, *OPTIONS)

HOOKS = {
    "on_tool_start": "on_tool_call_start",
    "on_tool_end": "on_tool_call_end",
    "on_tool_error": "on_tool_call_error",
    "on_complete": "on_end_message",
}


class Agent:
    """How an agent behaves: subclass it, and set what `create_chat` takes as keywords.

    >>> class SupportAgent(Agent):
    ...     model = "gpt-4.1"
    ...     instructions = lambda inputs: f"You help {inputs['name']}. Be concise."
    ...     tools = [LookupOrder, cancel_order]

    model, provider, instructions, and every option of `Options`
                   a value; or a function of the inputs (a dict), asked anew on every turn. The inputs are the session's
                   metadata and what `ask(…, inputs={…})` gives for one turn
    agent_name     what the database calls it; default: the class's name. Not inherited: for a class that is renamed
    rescues        which exceptions become which reply: {"RateLimitError": "We are busy.", TimeoutError: function}, by
                   class or by name; a function gets the exception. Those of base classes hold too
    on_start(messages), on_thinking(thinking, reply), on_tool_start(call), on_tool_end(call, outcome),
    on_tool_error(call, error), on_complete(message)
                   methods to override, plain or async: before the first call of a turn; where the model thought; around
                   each tool call, the error one may return a directive as a middleware's does; with the stored reply

    A subclass inherits as Python says: of `params`, `headers`, `middlewares` it has its own or its base's, not both.
    """

    agent_name: str | None = None
    rescues: Mapping[Any, Any] = {}

    @classmethod
    def stored_name(cls) -> str:
        """What sessions of this class are stored as."""
        return cls.__dict__.get("agent_name") or cls.__name__

    def __repr__(self) -> str:
        return f"<agent {self.stored_name()}>"


_NOTHING = object()

_CALLABLES = ("llm", "history")
"""Options whose value may be a function itself."""


def _declared(cls: type, name: str) -> Any:
    """What the class or a base of it says, as it was written: a function there is one of the inputs, not a method."""
    return next((base.__dict__[name] for base in cls.__mro__ if name in base.__dict__), _NOTHING)


def define_agent(name: str, **declared: Any) -> type[Agent]:
    """An agent class, inline: define_agent("SupportAgent", model="gpt-4.1", instructions="…", on_complete=function).

    Raises `UnknownKeyword` for what no agent has.
    """
    if not isinstance(name, str) or not name.strip():
        raise InvalidValue(f"an agent needs a name, by which its sessions are found again; {name!r} is none")
    hooks = ("on_start", "on_thinking", *HOOKS)
    check_keywords("define_agent()", declared, (*OF_THE_CLASS, "rescues", *hooks))
    body = {key: staticmethod(value) if key in hooks else value for key, value in declared.items()}
    return type(name, (Agent,), {**body, "agent_name": name})


class _Behaviour:
    """What an agent's class says: what is plain is checked once, what depends on the inputs is asked anew each time.

    given    options that are this process's to say, and go before the class's
    """

    def __init__(self, agent: Agent, options: Options, given: Iterable[str]):
        self.agent = agent
        self.functions: dict[str, Callable[[Mapping[str, Any]], Any]] = {}
        plain: dict[str, Any] = {}
        for name in OF_THE_CLASS:
            value = _declared(type(agent), name)
            if isinstance(value, staticmethod | classmethod):
                value = value.__get__(agent, type(agent))
            if value is _NOTHING or name in given:
                continue
            if inspect.isroutine(value) and name not in _CALLABLES:
                takes_agent = inspect.isfunction(value) and len(inspect.signature(value).parameters) > 1
                self.functions[name] = functools.partial(value, agent) if takes_agent else value
            else:
                plain[name] = value
        self.base = _said(Config(None, None, None, options), plain)

    def config(self, inputs: Mapping[str, Any]) -> Config:
        return _said(self.base, {name: self._ask(name, inputs) for name in self.functions})

    def _ask(self, name: str, inputs: Mapping[str, Any]) -> Any:
        try:
            return self.functions[name](inputs)
        except Exception as error:
            raise InvalidValue(
                f"the {name} of {self.agent!r} failed for the inputs {', '.join(map(str, inputs)) or '(none)'}: "
                f"{type(error).__name__}: {error}; inputs are the session's metadata and ask(…, inputs={{…}})"
            ) from error


def _said(config: Config, said: Mapping[str, Any]) -> Config:
    overrides = {name: said[name] for name in OVERRIDES if name in said}
    check_overrides(overrides)
    options = {name: value for name, value in said.items() if name not in OVERRIDES}
    return replace(config.with_options(**options), **overrides)


class AgentSession(Chat):
    """A chat whose behaviour comes from an agent class. Made by `create_agent_session` and `load_agent_session`.

    id, chat_id, metadata, agent_class, agent, model_id, history, total_usage, and all of `Chat`
    """

    def __init__(
        self,
        store: Store,
        record: LlmChat,
        session: LlmAgentSession,
        agent_class: type[Agent],
        keywords: Mapping[str, Any],
    ):
        super().__init__(store, record, options_of(keywords))
        self.session = session
        self.agent = agent_class()
        self._keywords = keywords
        self._behaviour = _Behaviour(self.agent, self._options, keywords)
        self._hooks = _hooks_of(self.agent)
        self._middlewares = _middlewares_of(self.agent)

    def __repr__(self) -> str:
        return f"<AgentSession {self.id} of {self.agent_class}>"

    @property
    def id(self) -> UUID:
        return self.session.id

    @property
    def metadata(self) -> Any:
        return self.session.metadata

    @property
    def agent_class(self) -> str:
        """The name that the session is stored under."""
        return self.session.agent_class

    @property
    def model_id(self) -> str | None:
        """The model that the next turn asks."""
        return self.model

    @property
    def total_usage(self) -> Stats:
        """`stats()`, from the database."""
        return self.stats()

    def update_metadata(self, changes: Mapping[str, Any]) -> Self:
        """Merge into the metadata, key by key, in the database; what the agent makes of it holds at once."""
        if not isinstance(changes, Mapping):
            raise InvalidValue(f"metadata is changed by a dict, not by {type(changes).__name__}")
        changes = stored_metadata(dict(changes))
        record: Any = self.store.records.agent_session
        lock = {} if self.store.is_sqlite else {"for_update": True}
        with self.store.connection():
            with self.store.database.atomic("IMMEDIATE") if self.store.is_sqlite else self.store.database.atomic():
                query = record.select().where(record.id == self.id)
                session = (query.for_update() if lock else query).first()
                if session is None:
                    raise ChatGone(f"there is no session {self.id}: it was deleted")
                session.metadata = {**(session.metadata or {}), **changes}
                session.updated_at = now()
                session.save(only=[record.metadata, record.updated_at])
        self.session = session
        return self

    async def aupdate_metadata(self, changes: Mapping[str, Any]) -> Self:
        """`update_metadata`, from asyncio."""
        return await self.store.off_the_loop(self.update_metadata, changes)

    async def atotal_usage(self) -> Stats:
        """`total_usage`, from asyncio."""
        return await self.astats()

    def reload(self) -> Self:
        """Read the rows of the session and its chat again."""
        super().reload()
        record: Any = self.store.records.agent_session
        with self.store.connection():
            self.session = record.get_by_id(self.id)
        return self

    def fork(self, at: Any = None) -> "AgentSession":
        """A new session of the agent, with a copy of this one's history, as far as `at`, and of its metadata."""
        chat = fork(self.store, self.record, at, self.options.stores_tool_calls, session=self.session)
        record: Any = self.store.records.agent_session
        with self.store.connection():
            session = record.get(record.chat == chat.id)
        return AgentSession(self.store, chat, session, type(self.agent), self._keywords)

    # How

    def _base(self) -> Config:
        return self._of_chat(self._behaviour.config(self.metadata or {}))

    def _standing_base(self) -> Config:
        return self._of_chat(self._behaviour.base)

    def _config_for(self, options: dict[str, Any]) -> Config:
        inputs = options.pop("inputs", None)
        if not isinstance(inputs, Mapping | None):
            raise InvalidValue(f"inputs must be a dict, not {type(inputs).__name__}")
        return self._changed(self._of_chat(self._behaviour.config({**(self.metadata or {}), **(inputs or {})})))

    def _of_chat(self, config: Config) -> Config:
        # What create_agent_session was told stands in the chat's row; what the class says does not.
        stored = {name: getattr(self.record, name) for name in OVERRIDES if getattr(self.record, name) is not None}
        config = config.with_overrides(stored)
        if not self._middlewares:
            return config
        return config.with_options(middlewares=(*self._middlewares, *config.options.middlewares))


# The hooks of an agent are those of its chat


def _hooks_of(agent: Agent) -> dict[str, tuple[Callable[..., Any], ...]]:
    hooks = {chats: (getattr(agent, own),) for own, chats in HOOKS.items() if callable(getattr(agent, own, None))}
    thinking = getattr(agent, "on_thinking", None)
    return {**hooks, "after_response": (_on_thinking(thinking),)} if callable(thinking) else hooks


def _on_thinking(function: Callable[..., Any]) -> Callable[..., Any]:
    def told(reply: Reply) -> Any:
        return function(reply.thinking, reply) if reply.thinking else None

    async def told_async(reply: Reply) -> None:
        if reply.thinking:
            await function(reply.thinking, reply)

    return told_async if inspect.iscoroutinefunction(function) else told


def _middlewares_of(agent: Agent) -> tuple[Any, ...]:
    start, rescues = getattr(agent, "on_start", None), _rescues_of(type(agent))
    made: list[Any] = [_Start(start)] if callable(start) else []
    return (*made, _Rescue(rescues)) if rescues else tuple(made)


class _Start:
    """Calls a function before the first call of the model in a turn."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.on_request = self._aon_request if inspect.iscoroutinefunction(function) else self._on_request

    def _on_request(self, context: TurnContext) -> None:
        if self._is_first(context):
            self.function(context.messages)

    async def _aon_request(self, context: TurnContext) -> None:
        if self._is_first(context):
            await self.function(context.messages)

    def _is_first(self, context: TurnContext) -> bool:
        told = context.state.get("agent started", False)
        context.state["agent started"] = True
        return context.round == 0 and not told


class _Rescue:
    """Puts a reply in the place of an exception, by its class or the name of it: the nearest to it counts."""

    def __init__(self, rescues: Mapping[Any, Any]):
        self.rescues = rescues
        awaits = any(map(inspect.iscoroutinefunction, rescues.values()))
        self.on_error = self._aon_error if awaits else self._on_error

    def _on_error(self, context: TurnContext, error: Exception) -> REPLACE | None:
        handler = self._handler(error)
        text: Any = handler(error) if callable(handler) else handler
        return None if text is None else REPLACE(text)

    async def _aon_error(self, context: TurnContext, error: Exception) -> REPLACE | None:
        handler = self._handler(error)
        text: Any = handler(error) if callable(handler) else handler
        if inspect.isawaitable(text):
            text = await text
        return None if text is None else REPLACE(str(text))

    def _handler(self, error: Exception) -> Any:
        for cls in type(error).__mro__:
            for key in (cls, cls.__name__):
                if key in self.rescues:
                    return self.rescues[key]
        return None


def _rescues_of(cls: type[Agent]) -> dict[Any, Any]:
    merged: dict[Any, Any] = {}
    for base in reversed(cls.__mro__):
        merged |= base.__dict__.get("rescues", {})
    for key, value in merged.items():
        is_class = isinstance(key, type) and issubclass(key, Exception)
        if not (is_class or isinstance(key, str)) or not (isinstance(value, str) or callable(value)):
            raise InvalidValue(
                f"rescues has {key!r}: {value!r}; it takes an exception class or its name, and a text or a function"
            )
    return merged


# Making and loading


def create_agent_session(
    store: Store | pw.Database | str | None, agent_class: type[Agent], *, metadata: Any = None, **keywords: Any
) -> AgentSession:
    """A new session of the agent, with a chat of its own, both stored or neither.

    metadata    the session's inputs, a dict: {"user_id": "u_1", "name": "Ada"}
    keywords    model, provider, instructions: stored, and from then on in the place of what the class says; columns of
                the application; and options of this process: llm, history, persistence, on_error, wait, stale_after,
                store_files, debug

    Raises `InvalidValue` and `UnknownKeyword` before anything is written.
    """
    store = as_store(store)
    call = "create_agent_session()"
    _check_agent(agent_class)
    _refuse_options_of_the_class(call, keywords, (*OVERRIDES, *OF_THE_PROCESS))
    columns = columns_of(store, call, keywords, (*OVERRIDES, *OF_THE_PROCESS))
    overrides = {name: keywords[name] for name in OVERRIDES if name in keywords}
    check_overrides(overrides)
    if not isinstance(metadata, Mapping | None):
        raise InvalidValue(f"the metadata of a session must be a dict, which functions get as inputs, not {metadata!r}")
    kept = stored_metadata(metadata)
    ours = {name: value for name, value in keywords.items() if name in OF_THE_PROCESS}
    _Behaviour(agent_class(), options_of(ours), ours)  # what is wrong with the class is said before a row is written
    name = agent_class.stored_name()
    check_storable("the agent's name", name)
    with store.connection(), clear_about(call, columns):
        with store.database.atomic("IMMEDIATE") if store.is_sqlite else store.database.atomic():
            record = store.records.chat.create(id=uuid7(), **overrides, **columns)
            session = store.records.agent_session.create(id=uuid7(), agent_class=name, chat=record, metadata=kept)
    return AgentSession(store, record, session, agent_class, ours)


def load_agent_session(
    store: Store | pw.Database | str | None,
    agent_class: type[Agent],
    session_id: UUID | str | None,
    *,
    skip_class_validation: bool = False,
    **keywords: Any,
) -> AgentSession | None:
    """The stored session, with the behaviour that the class has today; None where there is none of that id.

    keywords    columns of the application, which must match; and options of this process, as for `create_agent_session`
    skip_class_validation
                load it although it was created for another agent

    Raises `AgentMismatch` where it was created for another agent.
    """
    store = as_store(store)
    call = "load_agent_session()"
    _check_agent(agent_class)
    _refuse_options_of_the_class(call, keywords, OF_THE_PROCESS)
    columns = columns_of(store, call, keywords, OF_THE_PROCESS)
    ours = {name: value for name, value in keywords.items() if name in OF_THE_PROCESS}
    key = as_key(session_id)
    if key is None:
        return None
    with store.connection():
        session = store.records.agent_session.get_or_none(store.records.agent_session.id == key)
    found = find_chat(store, call, session.chat_id, columns) if session is not None else None
    if session is None or found is None:
        return None
    name = agent_class.stored_name()
    if session.agent_class != name and not skip_class_validation:
        raise AgentMismatch(
            f'Agent class mismatch: Session "{session.id}" was created for "{session.agent_class}", but is being '
            f'loaded with "{name}". If the class was renamed, give it agent_name = "{session.agent_class}"; to load it '
            "all the same, skip_class_validation=True"
        )
    return AgentSession(store, found, session, agent_class, ours)


async def acreate_agent_session(
    store: Store | pw.Database | str | None, agent_class: type[Agent], **keywords: Any
) -> AgentSession:
    """`create_agent_session`, from asyncio."""
    store = as_store(store)
    return await store.off_the_loop(lambda: create_agent_session(store, agent_class, **keywords))


async def aload_agent_session(
    store: Store | pw.Database | str | None, agent_class: type[Agent], session_id: UUID | str | None, **keywords: Any
) -> AgentSession | None:
    """`load_agent_session`, from asyncio."""
    store = as_store(store)
    return await store.off_the_loop(lambda: load_agent_session(store, agent_class, session_id, **keywords))


def _check_agent(given: Any) -> None:
    if not (isinstance(given, type) and issubclass(given, Agent)):
        raise InvalidValue(f"{given!r} is not an agent class: subclass llm_orm.Agent, or define_agent(…)")


def _refuse_options_of_the_class(call: str, keywords: Mapping[str, Any], taken: tuple[str, ...]) -> None:
    for name in keywords:
        if name in OF_THE_CLASS and name not in taken:
            raise InvalidValue(
                f"{call} does not take {name!r}: code wins, so it is set on the agent's class; for one turn, "
                "give it to ask()"
            )

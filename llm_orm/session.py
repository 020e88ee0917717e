"""AgentSession: an agent tied to a stored chat; made and loaded here.

Code wins: what an agent is comes from its class, each time anew; what was said comes from the database, and so does the
metadata.
"""

from collections.abc import Mapping
from typing import Any, Self
from uuid import UUID

import peewee as pw

from .agent import OF_THE_CLASS, Agent, check_agent
from .behaviour import Behaviour
from .budgets import check_against
from .chat import Chat
from .checks import OVERRIDES, as_key, check_overrides, clear_about, columns_of, stored_metadata
from .config import Config
from .errors import AgentMismatch, ChatGone, InvalidValue
from .history import fork
from .loading import find_chat
from .records import LlmAgentSession, LlmChat, LlmMessage, now, uuid7
from .store import Store, as_store
from .values import Stats

OF_THE_PROCESS = (
    "llm",
    "history",
    "persistence",
    "on_error",
    "wait",
    "save_every",
    "stale_after",
    "store_files",
    "debug",
)
"""Options that say how this process works, not what the agent is: taken where a session is made or loaded."""


class AgentSession(Chat):
    """A chat whose behaviour comes from an agent class. Made by `create_agent_session` and `load_agent_session`.

    id, chat_id, metadata, agent_class, agent, model_id, history, total_usage, and all of `Chat`
    """

    _named = ("files", "key", "inputs")
    _no_model = 'The agent names no model: set model = "gpt-4o" on its class, or give ask(…, model=…)'

    def __init__(self, store: Store, record: LlmChat, session: LlmAgentSession, behaviour: Behaviour):
        super().__init__(store, record, behaviour.base.options)
        self.session = session
        self.agent = behaviour.agent
        self._behaviour = behaviour
        self._hooks = behaviour.hooks
        self._middlewares = behaviour.middlewares

    def __repr__(self) -> str:
        return f"<AgentSession {self.id} of {self.agent_class}>"

    @property
    def id(self) -> UUID:
        """The session's own; its chat has another, `chat_id`."""
        return self.session.id

    @property
    def metadata(self) -> Any:
        """The session's inputs; change them with `update_metadata`."""
        return self.session.metadata

    @property
    def agent_class(self) -> str:
        """The name that the session is stored under."""
        return self.session.agent_class

    @property
    def model(self) -> str | None:
        return self._config_of("model").model

    @property
    def provider(self) -> str | None:
        return self._config_of("provider").provider

    @property
    def instructions(self) -> str | None:
        return self._config_of("instructions").instructions

    @property
    def model_id(self) -> str | None:
        """The model that the next turn asks."""
        return self.model

    @property
    def total_usage(self) -> Stats:
        """`stats()`, from the database."""
        return self.stats()

    async def atotal_usage(self) -> Stats:
        """`total_usage`, from asyncio."""
        return await self.astats()

    def update_metadata(self, changes: Mapping[str, Any]) -> Self:
        """Merge into the metadata, key by key, in the database; what the agent makes of it holds at once.

        Raises `ChatGone` where the session was deleted.
        """
        if not isinstance(changes, Mapping):
            raise InvalidValue(f"metadata is changed by a dict, not by {type(changes).__name__}")
        changes = stored_metadata(dict(changes))
        record: Any = self.store.records.agent_session
        wanted = record.select().where(record.id == self.id)
        with self.store.transaction():
            # What another process merged in meanwhile stays: its row is read under the lock.
            session = (wanted if self.store.is_sqlite else wanted.for_update()).first()
            if session is None:
                raise self._gone()
            session.metadata = {**(session.metadata or {}), **changes}
            session.updated_at = now()
            session.save(only=[record.metadata, record.updated_at])
        self.session = session
        return self

    async def aupdate_metadata(self, changes: Mapping[str, Any]) -> Self:
        """`update_metadata`, from asyncio."""
        return await self.store.off_the_loop(self.update_metadata, changes)

    def reload(self) -> Self:
        """Read the rows of the session and its chat again."""
        super().reload()
        record: Any = self.store.records.agent_session
        with self.store.connection():
            session = record.get_or_none(record.id == self.id)
        if session is None:
            raise self._gone()
        self.session = session
        return self

    def fork(self, at: "LlmMessage | UUID | str | int | None" = None) -> "AgentSession":
        """A new session of the agent, with a copy of this one's history, as far as `at`, and of its metadata."""
        chat = fork(self.store, self.record, at, self.options.stores_tool_calls, session=self.session)
        record: Any = self.store.records.agent_session
        with self.store.connection():
            session = record.get(record.chat == chat.id)
        return AgentSession(self.store, chat, session, self._behaviour.again())._set_up_as(self)

    async def afork(self, at: "LlmMessage | UUID | str | int | None" = None) -> "AgentSession":
        """`fork`, from asyncio."""
        return await self.store.off_the_loop(self.fork, at)

    # How

    def _set_up_as(self, other: Chat) -> Self:
        super()._set_up_as(other)
        if isinstance(other, AgentSession):
            # The agent's own hooks come first, and each session has an agent of its own.
            own, others = self._behaviour.hooks, other._behaviour.hooks
            self._hooks = {
                name: (*own.get(name, ()), *functions[len(others.get(name, ())) :])
                for name, functions in other._hooks.items()
            }
        return self

    @property
    def _inputs(self) -> dict[str, Any]:
        return {**(self.metadata or {})}

    def _base(self) -> Config:
        return self._overridden(self._behaviour.config(self._inputs))

    def _standing_base(self) -> Config:
        return self._overridden(self._behaviour.base)

    def _config_of(self, name: str) -> Config:
        """The config as far as one name goes: what others depend on may come with a turn only."""
        return self._changed(self._overridden(self._behaviour.config(self._inputs, (name,))))

    def _config_for(self, options: dict[str, Any]) -> Config:
        inputs = options.pop("inputs", None)
        if not isinstance(inputs, Mapping | None):
            raise InvalidValue(f"inputs must be a dict, not {type(inputs).__name__}")
        return self._changed(self._overridden(self._behaviour.config({**self._inputs, **(inputs or {})})))

    def _overridden(self, config: Config) -> Config:
        # What create_agent_session was told stands in the chat's row; what the class says does not.
        stored = {name: getattr(self.record, name) for name in OVERRIDES}
        return config.with_overrides({name: value for name, value in stored.items() if value is not None})

    def _gone(self) -> ChatGone:
        return ChatGone(f"there is no session {self.id}: it was deleted")


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
    columns, behaviour = _understood(store, call, agent_class, keywords, (*OVERRIDES, *OF_THE_PROCESS), "metadata")
    overrides = {name: keywords[name] for name in OVERRIDES if name in keywords}
    check_overrides(overrides)
    if not isinstance(metadata, Mapping | None):
        raise InvalidValue(f"the metadata of a session must be a dict, which functions get as inputs, not {metadata!r}")
    kept, name = stored_metadata(metadata and dict(metadata)), agent_class.stored_name()
    with clear_about(call, columns), store.transaction():
        record = store.records.chat.create(id=uuid7(), **overrides, **columns)
        session = store.records.agent_session.create(id=uuid7(), agent_class=name, chat=record, metadata=kept)
    return AgentSession(store, record, session, behaviour)


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
    columns, behaviour = _understood(store, call, agent_class, keywords, OF_THE_PROCESS, "skip_class_validation")
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
    return AgentSession(store, found, session, behaviour)


async def acreate_agent_session(
    store: Store | pw.Database | str | None, agent_class: type[Agent], *, metadata: Any = None, **keywords: Any
) -> AgentSession:
    """`create_agent_session`, from asyncio."""
    store = as_store(store)
    return await store.off_the_loop(lambda: create_agent_session(store, agent_class, metadata=metadata, **keywords))


async def aload_agent_session(
    store: Store | pw.Database | str | None,
    agent_class: type[Agent],
    session_id: UUID | str | None,
    *,
    skip_class_validation: bool = False,
    **keywords: Any,
) -> AgentSession | None:
    """`load_agent_session`, from asyncio."""
    store = as_store(store)
    skip = skip_class_validation
    return await store.off_the_loop(
        lambda: load_agent_session(store, agent_class, session_id, skip_class_validation=skip, **keywords)
    )


def _understood(
    store: Store, call: str, agent_class: Any, keywords: Mapping[str, Any], known: tuple[str, ...], named: str
) -> tuple[dict[str, Any], Behaviour]:
    """The application's columns among the keywords, and how the agent behaves in this process."""
    check_agent(agent_class)
    for name in keywords:
        if name in OF_THE_CLASS and name not in known:
            raise InvalidValue(
                f"{call} does not take {name!r}: code wins, so it is set on the agent's class; for one turn, "
                "give it to ask()"
            )
    columns = columns_of(store, call, keywords, known, besides=(named,))
    ours = {name: value for name, value in keywords.items() if name in OF_THE_PROCESS}
    behaviour = Behaviour(agent_class, ours)
    check_against(store.records.chat, behaviour.base.options.budgets)
    return columns, behaviour

"""Agent: behaviour declared in code."""

from collections.abc import Mapping
from typing import Any

from .checks import OVERRIDES, check_keywords, check_storable
from .errors import InvalidValue, check_spelling
from .options import NAMES as OPTIONS
from .records import LlmMessage
from .values import Directive, Message, Reply, ToolCall, ToolOutcome

OF_THE_CLASS = (*OVERRIDES, *OPTIONS)


class Agent:
    """How an agent behaves: subclass it, and set what `create_chat` takes as keywords.

    >>> class SupportAgent(Agent):
    ...     model = "gpt-4.1"
    ...     instructions = lambda inputs: f"You help {inputs['name']}. Be concise."
    ...     tools = [LookupOrder, cancel_order]

    model, provider, instructions, and every option of `Options`
                   a value; or a plain function of the inputs (a dict), asked anew on every turn: a lambda, a method, a
                   static method. The inputs are the session's metadata and what `ask(…, inputs={…})` gives for one turn
    agent_name     what the database calls it; default: the class's name. Not inherited: for a class that is renamed
    rescues        which exceptions become which reply: {"RateLimitError": "We are busy.", TimeoutError: function}, by
                   class or by name; a function gets the exception, and None from it is no rescue. What is nearest to
                   the exception counts. Those of base classes hold too

    Its hooks are its methods, plain or async: on_start, on_thinking, on_tool_start, on_tool_end, on_tool_error,
    on_complete. They come before those that are put on a session. A subclass inherits as Python says: of `params`,
    `headers`, `middlewares` it has its own or its base's, not both.
    """

    agent_name: str | None = None
    rescues: Mapping[Any, Any] = {}

    model: Any
    provider: Any
    instructions: Any
    llm: Any
    tools: Any
    temperature: Any
    max_tokens: Any
    thinking: Any
    effort: Any
    schema: Any
    corrections: Any
    tool_choice: Any
    fallbacks: Any
    middlewares: Any
    budgets: Any
    params: Any
    headers: Any
    request_timeout: Any
    max_tool_calls: Any
    tool_concurrency: Any
    retries: Any
    store_files: Any
    max_file_bytes: Any
    history: Any
    persistence: Any
    on_error: Any
    wait: Any
    save_every: Any
    stale_after: Any
    debug: Any

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        known = (*OF_THE_CLASS, "agent_name", "rescues", *HOOKS)
        check_spelling(f"the agent {cls.__name__}", cls.__dict__, known)
        misplaced = [name for name in OF_A_CHAT if name in cls.__dict__]
        if misplaced:
            raise InvalidValue(
                f"the agent {cls.__name__} has {misplaced[0]!r}, which is a hook of chats: put it on the session, or "
                f"write one of {', '.join(HOOKS)}"
            )

    def on_start(self, messages: list[Message], /) -> Any:
        """Before the first call of the model in a turn, with what it will be shown."""

    def on_thinking(self, thinking: str, reply: Reply, /) -> Any:
        """After each reply that the model thought about."""

    def on_tool_start(self, call: ToolCall, /) -> Any:
        """Before each tool call, once its row is written."""

    def on_tool_end(self, call: ToolCall, outcome: ToolOutcome, /) -> Any:
        """After each tool call, however it ended, once its result is written."""

    def on_tool_error(self, call: ToolCall, error: Exception, /) -> Directive | Any | None:
        """After a tool call that failed; may return a directive, as a middleware's may."""

    def on_complete(self, message: LlmMessage, /) -> Any:
        """Once a turn has its reply, with the stored row."""

    @classmethod
    def stored_name(cls) -> str:
        """What sessions of this class are stored as."""
        return cls.__dict__.get("agent_name") or cls.__name__

    def __repr__(self) -> str:
        return f"<agent {self.stored_name()}>"


OF_A_CHAT = ("before_request", "after_response", "on_new_message", "on_end_message", "on_tool_result")

HOOKS = ("on_start", "on_thinking", "on_tool_start", "on_tool_end", "on_tool_error", "on_complete")


def define_agent(name: str, **declared: Any) -> type[Agent]:
    """An agent class, inline: define_agent("SupportAgent", model="gpt-4.1", instructions="…", on_complete=function).

    name    what its sessions are stored as; two agents of one name are one agent

    Raises `UnknownKeyword` for what no agent has, `InvalidValue` for a name that cannot be stored.
    """
    if not isinstance(name, str) or not name.strip():
        raise InvalidValue(f"an agent needs a name, by which its sessions are found again; {name!r} is none")
    check_storable("the agent's name", name)
    check_keywords("define_agent()", declared, (*OF_THE_CLASS, "rescues", *HOOKS))
    body = {key: staticmethod(value) if key in HOOKS else value for key, value in declared.items()}
    return type(name, (Agent,), body)


def check_agent(given: Any) -> None:
    if not (isinstance(given, type) and issubclass(given, Agent)):
        raise InvalidValue(f"{given!r} is not an agent class: subclass llm_orm.Agent, or define_agent(…)")
    name = given.stored_name()
    if not isinstance(name, str):
        raise InvalidValue(f"the agent_name of {given.__name__} must be a string, not {name!r}")
    check_storable("the agent's name", name)

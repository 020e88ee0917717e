"""The turns that are broken off: who says what in them, and how they are asked for."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llm_orm import (
    Agent,
    Chat,
    Chunk,
    Retries,
    Store,
    ToolContext,
    create_agent_session,
    create_chat,
    load_agent_session,
    load_chat,
    tool,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

from .ledger import Ledger
from .points import Points

QUESTION, NEXT = "What is the answer?", "And then?"
ANSWER, AFTERWARDS = "The answer is forty two.", "Then there is another."

Step = str | tuple[tuple[str, int], ...]
"""What the model says in one call: a text, or the tools that it asks for, each with its argument."""


@dataclass(frozen=True)
class Scenario:
    """A turn, and what leads to it.

    steps      what the model says to the question, call by call
    options    of the chat
    act        runs the turn, meeting a point at each chunk
    prepare    what has happened before, in another process
    """

    name: str
    act: Callable[[Chat, Points], Any]
    steps: tuple[Step, ...] = (ANSWER,)
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Chat], None] = lambda chat: None
    asks: bool = True
    """Whether it is the turn that writes the question."""
    fails_on: str | None = None
    """The model that answers with a 500."""
    fails_first: bool = False
    """Whether the first call of all fails with a 400."""
    has_hook: bool = False
    is_session: bool = False
    key: str | None = None
    """That the question is asked with."""
    is_async: bool = False

    @property
    def on_error(self) -> str:
        return self.options.get("on_error", "rollback")

    @property
    def is_streamed(self) -> bool:
        return "stream" in self.name


class Cast:
    """Who plays a scenario: the model, the tools, the hooks. Each writes down what it did."""

    on_stage: "Cast"
    """Those of this process: the tools are made once, before it forks, for that takes longer than a turn."""

    def __init__(self, scenario: Scenario, ledger: Ledger, points: Points):
        self.scenario, self.ledger, self.points = scenario, ledger, points
        self.llm = Provider(scenario, ledger, points)
        Cast.on_stage = self

    def options(self) -> dict[str, Any]:
        return {"llm": self.llm, "tools": self.tools(), "stale_after": 0, "retries": AT_ONCE, **self.scenario.options}

    def tools(self) -> list[Any]:
        names = {name for step in self.scenario.steps if isinstance(step, tuple) for name, _ in step}
        known = [note, pay, look_up_meanwhile if self.scenario.is_async else look_up]
        return [made for made in known if made.name in names]

    def make(self, store: Store) -> Chat:
        if self.scenario.is_session:
            return create_agent_session(store, self._agent(), **self._of_the_process())
        return self._with_hooks(create_chat(store, model="first", instructions="Be exact.", **self.options()))

    def load(self, store: Store, key: str) -> Chat:
        if self.scenario.is_session:
            loaded = load_agent_session(store, self._agent(), key, **self._of_the_process())
        else:
            loaded = load_chat(store, key, **self.options())
        assert loaded is not None, f"{key} is gone"
        return self._with_hooks(loaded)

    def _of_the_process(self) -> dict[str, Any]:
        return {"llm": self.llm, "stale_after": 0, "on_error": self.scenario.on_error}

    def _agent(self) -> type[Agent]:
        class Clerk(Agent):
            model = "first"
            instructions = "Be exact."
            tools = self.tools()
            retries = AT_ONCE

        return Clerk

    def _with_hooks(self, chat: Chat) -> Chat:
        if self.scenario.has_hook:

            @chat.after_response
            def look(reply: Any) -> None:
                self.points.meet("hook", "after_response")

        return chat


def work(name: str, n: int, context: ToolContext) -> str:
    cast, about = Cast.on_stage, {"name": name, "id": context.tool_call_id, "n": n}
    cast.ledger.write("tool", "began", **about)
    cast.points.meet("tool", f"{name} began")
    cast.ledger.write("tool", "finished", **about)
    return f"{name} {n} is done"


@tool
def note(n: int, context: ToolContext) -> str:
    """Not to be done twice."""
    return work("note", n, context)


@tool(requires_approval=True)
def pay(n: int, context: ToolContext) -> str:
    """Not to be done twice, nor unasked."""
    return work("pay", n, context)


@tool(idempotent=True)
def look_up(n: int, context: ToolContext) -> str:
    """May be done twice."""
    return work("look_up", n, context)


@tool(name="look_up", idempotent=True)
async def look_up_meanwhile(n: int, context: ToolContext) -> str:
    """May be done twice."""
    await asyncio.sleep(0)
    return work("look_up", n, context)


class Provider(ScriptedLLM):
    """Says what the scenario has for what it is shown, whichever process asks; and keeps its books."""

    def __init__(self, scenario: Scenario, ledger: Ledger, points: Points):
        super().__init__(*[self._reply] * 40)
        self.scenario, self.ledger, self.points = scenario, ledger, points
        self.call: dict[str, Any] = {}

    def completion(self, **keywords: Any) -> Any:
        response = super().completion(**keywords)
        if keywords.get("stream"):
            return self._kept(response)
        self._answered()
        return response

    async def acompletion(self, **keywords: Any) -> Any:
        response = await super().acompletion(**keywords)
        if keywords.get("stream"):
            return self._akept(response)
        self._answered()
        return response

    def _kept(self, parts: Iterator[Any]) -> Iterator[Any]:
        for part in parts:
            self._sends(part)
            yield part

    async def _akept(self, parts: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for part in parts:
            self._sends(part)
            yield part

    def _sends(self, part: Any) -> None:
        if hasattr(part, "usage"):
            self._answered()
        else:
            self.points.meet("part", "")

    def _answered(self) -> None:
        self.ledger.write("provider", "answered", **self.call)
        self.points.meet("answered", self.call["label"])

    def _reply(self, keywords: dict[str, Any]) -> Any:
        messages, model = keywords["messages"], keywords["model"]
        number = len(self.ledger.read("provider", "asked"))
        texts = [message["content"] for message in messages if message["role"] == "user"]
        said = texts[-1] if isinstance(texts[-1], str) else texts[-1][0]["text"]
        last = max(index for index, message in enumerate(messages) if message["role"] == "user")
        step = sum(1 for message in messages[last:] if message.get("tool_calls"))
        label = f"{said} {step}"
        tokens = {"input_tokens": 1000 + number, "output_tokens": 10 + number, "cost": f"0.{number + 1:03}"}
        self.call = {"call": number, "label": label, "model": model, **tokens}
        self.ledger.write("provider", "asked", **self.call, messages=messages)
        self.points.meet("asked", label)
        scenario = self.scenario
        if model == scenario.fails_on or (scenario.fails_first and number == 0):
            status = 400 if scenario.fails_first else 500
            self.ledger.write("provider", "failed", status=status, **self.call)
            return ProviderError(status)
        wanted = scenario.steps[step] if said == QUESTION else AFTERWARDS
        self.call |= {"text": None, "tools": []}
        if isinstance(wanted, str):
            self.call["text"] = wanted
            return Say(wanted, **tokens)
        calls = [Call(name, call_id=f"call_{number}_{index}", n=n) for index, (name, n) in enumerate(wanted)]
        self.call["tools"] = [call.call_id for call in calls]
        return Say(calls=calls, **tokens)


# How a turn is asked for


def ask(chat: Chat, points: Points) -> Any:
    return chat.ask(QUESTION)


def _reads(chunk: Chunk, points: Points) -> Any:
    Cast.on_stage.ledger.write("reader", "read", text=chunk.content)
    return points.meet("chunk", chunk.content or "call")


def ask_stream(chat: Chat, points: Points) -> Any:
    stream = chat.ask_stream(QUESTION)
    try:
        for chunk in stream:
            if _reads(chunk, points) == "drop":
                break
    except BaseException:
        stream.close()  # as `with` does, whatever still refers to it
        raise
    message = stream.message
    del stream
    gc.collect()
    return message


def aask(chat: Chat, points: Points) -> Any:
    return asyncio.run(_as_task(chat.aask(QUESTION), points))


def aask_stream(chat: Chat, points: Points) -> Any:
    async def read() -> Any:
        stream = chat.aask_stream(QUESTION)
        try:
            async for chunk in stream:
                if _reads(chunk, points) == "drop":
                    break
        except BaseException:
            await stream.aclose()
            raise
        message = stream.message
        del stream
        gc.collect()
        return message

    return asyncio.run(_as_task(read(), points))


async def _as_task(work: Any, points: Points) -> Any:
    points.task = asyncio.ensure_future(work)
    return await points.task


def ask_with_key(chat: Chat, points: Points) -> Any:
    return chat.ask(QUESTION, key="once")


def ask_with_file(chat: Chat, points: Points) -> Any:
    return chat.ask(QUESTION, files=[("notes.txt", b"forty two")])


def retry(chat: Chat, points: Points) -> Any:
    return chat.retry()


def approve_and_resume(chat: Chat, points: Points) -> Any:
    for call in chat.pending_approvals():
        chat.approve(call)
    return chat.resume()


# What has happened before


def failed(chat: Chat) -> None:
    try:
        chat.ask(QUESTION)
    except ProviderError:
        return
    raise AssertionError("it was to fail")


def parked(chat: Chat) -> None:
    assert chat.ask(QUESTION).status == "pending"


AT_ONCE = Retries(attempts=1, first_wait_s=0.0)
TWO_ROUNDS = ((("note", 1),), (("look_up", 2), ("note", 3)), ANSWER)
THREE_AT_ONCE = ((("note", 1), ("look_up", 2), ("note", 3)), ANSWER)
TO_APPROVE = ((("look_up", 1), ("pay", 2), ("note", 3)), ANSWER)

ALL = [
    Scenario("plain", ask),
    Scenario("streamed", ask_stream),
    Scenario("asyncio", aask, is_async=True),
    Scenario("asyncio, streamed", aask_stream, is_async=True),
    Scenario("two rounds", ask, TWO_ROUNDS),
    Scenario("two rounds, streamed", ask_stream, TWO_ROUNDS),
    Scenario("two rounds, asyncio", aask, TWO_ROUNDS, is_async=True),
    Scenario("tools one by one", ask, THREE_AT_ONCE),
    Scenario("tools side by side", ask, THREE_AT_ONCE, {"tool_concurrency": 2}),
    Scenario("tools side by side, asyncio", aask, THREE_AT_ONCE, {"tool_concurrency": 2}, is_async=True),
    Scenario("parking", ask, TO_APPROVE),
    Scenario("approved", approve_and_resume, TO_APPROVE, prepare=parked, asks=False),
    Scenario("fallback", ask, options={"fallbacks": ["second"]}, fails_on="first"),
    Scenario("kept", ask, TWO_ROUNDS, {"on_error": "keep"}),
    Scenario("kept, streamed", ask_stream, TWO_ROUNDS, {"on_error": "keep"}),
    Scenario("watched", ask, TWO_ROUNDS, has_hook=True),
    Scenario("with a file", ask_with_file),
    Scenario("with a key", ask_with_key, key="once"),
    Scenario("with a key, two rounds", ask_with_key, TWO_ROUNDS, key="once"),
    Scenario("saved, streamed", ask_stream, options={"save_every": 0}),
    Scenario("saved, streamed, asyncio", aask_stream, options={"save_every": 0}, is_async=True),
    Scenario("saved and kept, streamed", ask_stream, TWO_ROUNDS, {"save_every": 0, "on_error": "keep"}),
    Scenario("retried", retry, prepare=failed, asks=False, fails_first=True),
    Scenario("retried, kept", retry, TWO_ROUNDS, {"on_error": "keep"}, prepare=failed, asks=False, fails_first=True),
    Scenario("session", ask, TWO_ROUNDS, is_session=True),
]
BY_NAME = {scenario.name: scenario for scenario in ALL}

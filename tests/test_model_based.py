"""Whatever is done to a few chats, in whatever order: the database has what a simple model says it must have.

Hypothesis chooses what is done, and shrinks what goes wrong to the shortest way to it. A process of its own dies where
a process is to die.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llm_orm import (
    AwaitsApproval,
    Chat,
    ChatBusy,
    ChatGone,
    NothingToResume,
    NothingToRetry,
    ReplyNotSaved,
    Store,
    ToolError,
    TurnCancelled,
    connect,
    create_chat,
    load_chat,
    tool,
)
from llm_orm.soundness import check
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

INPUT, OUTPUT = 10, 5
"""Tokens of each call that ends well; a dollar each."""


@tool
def look(where: str = "up") -> str:
    return f"Seen {where}."


@tool
def fail() -> str:
    raise ValueError("it broke")


@tool
def stop() -> str:
    raise ToolError("no right to it", fatal=True)


@tool(requires_approval=True)
def send(what: str) -> str:
    return f"Sent {what}."


@tool
def die() -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("dead")


TOOLS = [look, fail, stop, send, die]


def a_model(*script: Any) -> ScriptedLLM:
    def priced(scripted: Any) -> Any:
        if isinstance(scripted, str):
            scripted = Say(scripted)
        if isinstance(scripted, Call):
            scripted = Say(calls=[scripted])
        is_usual = isinstance(scripted, Say) and scripted.error is None
        return Say(**{**vars(scripted), "input_tokens": INPUT, "output_tokens": OUTPUT}) if is_usual else scripted

    return ScriptedLLM(*map(priced, script), input_cost_per_token="1", output_cost_per_token="1")


# What the database must have


Shown = tuple[Any, ...]
"""("user", text), ("assistant", text, names of tools), ("tool", result)"""


@dataclass
class Row:
    """A message."""

    role: str
    content: str | None
    status: str = "completed"
    shown: list[Shown] = field(default_factory=list)
    """What it is to a model."""


def said(role: str, text: str) -> Row:
    return Row(role, text, shown=[(role, text) if role != "assistant" else (role, text, ())])


@dataclass
class Known:
    """A chat."""

    rows: list[Row] = field(default_factory=list)
    pending: str | None = None
    """What became of the turn that has not ended: "parked", "decided", or where its process died."""
    pending_shown: list[Shown] = field(default_factory=list)
    approved: bool = False
    keys: dict[str, str] = field(default_factory=dict)
    """What was said with a key."""

    @property
    def shown(self) -> list[Shown]:
        return [message for row in self.rows for message in row.shown]

    @property
    def is_dead(self) -> bool:
        return self.pending in DEATHS


USUAL = (200, None, INPUT, OUTPUT)
"""The request row of a call that ended well: (status, error, input tokens, output tokens)."""

DIED = (0, "ProcessDied", 0, 0)

LOOKED: list[Shown] = [("assistant", None, ("look",)), ("tool", "Seen up.")]


@dataclass(frozen=True)
class Kind:
    """A way that a turn may go."""

    script: Callable[[], list[Any]]
    rounds: tuple[Shown, ...] = ()
    """What comes before the last word."""
    requests: tuple[tuple[Any, ...], ...] = (USUAL,)
    error: type[Exception] | None = None
    text: str | None = "Fine."
    """The last word, or as far as it came."""


REFUSED = (400, "ProviderError", 0, 0)

KINDS = {
    "plain": Kind(lambda: ["Fine."]),
    "tools": Kind(lambda: [Call("look"), "Fine."], tuple(LOOKED), (USUAL, USUAL)),
    "a tool that fails": Kind(
        lambda: [Call("fail"), "Fine."],
        (("assistant", None, ("fail",)), ("tool", "Error executing tool 'fail': it broke")),
        (USUAL, USUAL),
    ),
    "a tool that ends it": Kind(
        lambda: [Call("stop")],
        (("assistant", None, ("stop",)), ("tool", "Error executing tool 'stop': no right to it")),
        error=ToolError,
        text=None,
    ),
    "a model that fails": Kind(lambda: [ProviderError(400)], requests=(REFUSED,), error=ProviderError, text=None),
    "a model that fails behind tools": Kind(
        lambda: [Call("look"), ProviderError(400)], tuple(LOOKED), (USUAL, REFUSED), ProviderError, None
    ),
    "an empty reply": Kind(lambda: [Say("")], text=None),
}

DEATHS = ("in the model", "in the stream", "in a tool", "behind a tool")


# A process that dies


class Dying:
    """A process that has forked before there was a thread in it, and forks one more for each turn that is to die."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, url: str, chat: Chat, text: str, death: str) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([url, str(chat.id), text, death]) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == f"{signal.SIGKILL.value}\n"

    def close(self) -> None:
        self.process.communicate()


def fork_and_die() -> None:
    for line in sys.stdin:
        child = os.fork()
        if not child:
            ask_and_die(*json.loads(line))
        status = os.waitpid(child, 0)[1]
        print(os.WTERMSIG(status), flush=True)


def ask_and_die(url: str, chat_id: str, text: str, death: str) -> None:
    def kill(keywords: Any = None) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    class InTheStream(ScriptedLLM):
        def _parts(self, say: Say, keywords: dict[str, Any]) -> Any:
            for number, part in enumerate(super()._parts(say, keywords)):
                if number == 1:
                    kill()
                yield part

    scripts = {"in the model": [kill], "in a tool": [Call("die")], "behind a tool": [Call("look"), kill]}
    llm = InTheStream("Half way.") if death == "in the stream" else a_model(*scripts[death])
    chat = load_chat(connect(url), chat_id, llm=llm, tools=TOOLS, stale_after=0)
    assert chat is not None
    if death == "in the stream":
        list(chat.ask_stream(text))
    chat.ask(text)
    os._exit(1)


@pytest.fixture
def leaves_no_files(tmp_path: Path) -> Iterator[None]:
    """What hypothesis writes down goes with the test."""
    set_hypothesis_home_dir(tmp_path)
    yield
    set_hypothesis_home_dir(None)


@pytest.fixture(scope="module")
def dying() -> Iterator[Dying]:
    dying = Dying()
    yield dying
    dying.close()


# What is done


class Machine(RuleBasedStateMachine):
    """Several chats in one database, each in the hands of two stores."""

    url: str
    dying: Dying

    def __init__(self) -> None:
        super().__init__()
        self.stores = [connect(self.url), connect(self.url)]
        self.chats: dict[Any, Known] = {}
        self.held: dict[tuple[Any, int], Chat] = {}
        self.ledger: dict[Any, tuple[Any, ...]] = {}
        self.numbers = itertools.count(1)

    @initialize()
    def begin(self) -> None:
        self.create()

    def teardown(self) -> None:
        for record in (self.stores[0].records.chat, self.stores[0].records.request):
            with self.stores[0].connection():
                record.delete().execute()
        for store in self.stores:
            store.close()

    # How

    def some(self, number: int) -> tuple[Any, Known]:
        chat_id = list(self.chats)[number % len(self.chats)]
        return chat_id, self.chats[chat_id]

    def hold(self, chat_id: Any, which: int) -> Chat:
        if (chat_id, which) not in self.held:
            chat = load_chat(self.stores[which], chat_id, tools=TOOLS)
            assert chat is not None
            self.held[chat_id, which] = chat
        return self.held[chat_id, which]

    def text(self) -> str:
        return f"What about {next(self.numbers)}?"

    def play(
        self,
        known: Known,
        act: Callable[..., Any],
        llm: ScriptedLLM,
        stream: bool,
        error: Any,
        *arguments: Any,
        **more: Any,
    ) -> Any:
        """Let a turn go its way to its end, or to its error."""
        with pytest.raises(error) if error else nullcontext():
            made = act(*arguments, llm=llm, retries=0, **more)
            if stream:
                for _ in made:
                    pass
                made = made.message
            return made
        return None

    def settle(self, known: Known, kind: Kind, on_error: str, *, before: tuple[Shown, ...] = ()) -> None:
        """What a turn leaves behind its question."""
        rounds = [*before, *kind.rounds]
        last = [("assistant", kind.text, ())] if kind.text else []
        if kind.error is None:
            known.rows.append(Row("assistant", kind.text, shown=[*rounds, *last]))
        elif on_error == "keep":
            known.rows.append(Row("assistant", kind.text, "failed", [*rounds, *last]))

    def end_dead(self, known: Known, keep: bool) -> list[tuple[Any, ...]]:
        """What becomes of a turn that died when somebody else has the chat; the request rows of it."""
        death, known.pending = known.pending, None
        if keep:
            shown = LOOKED if death == "behind a tool" else []
            known.rows.append(Row("assistant", None, "incomplete", [*shown]))
        return [] if death == "in a tool" else [DIED]

    def check(self, *expected: tuple[Any, ...]) -> None:
        """These request rows came, and no other; those before are as they were."""
        record: Any = self.stores[0].records.request
        with self.stores[0].connection():
            rows = list(record.select().order_by(record.created_at, record.id))
        now = {row.id: (row.status_code, row.error, row.input_tokens, row.output_tokens, row.cost) for row in rows}
        assert {key: now.get(key) for key in self.ledger} == self.ledger
        new = [values for key, values in now.items() if key not in self.ledger]
        assert len(new) == len(expected), (new, expected)
        for values, wanted in zip(sorted(new, key=str), sorted(expected, key=str), strict=True):
            assert all(want in (None, got) for got, want in zip(values, wanted, strict=False)), (values, wanted)
            usual = Decimal(values[2] + values[3])
            assert values[4] == (None if values[1] == "ProcessDied" else usual)
        self.ledger = now

    def check_shown(self, llm: ScriptedLLM, *expected: list[Shown]) -> None:
        """The model was shown the history as it must be, each time that it was called."""
        assert [[as_shown(message) for message in request["messages"]] for request in llm.requests] == list(expected)

    def rounds_shown(self, before: list[Shown], kind: Kind) -> list[list[Shown]]:
        shown = [before]
        if len(kind.requests) == 2:
            shown.append([*before, *kind.rounds])
        return shown

    numbers_of_chats = st.integers(0, 5)
    stores_of_two = st.integers(0, 1)
    errors = st.sampled_from(["rollback", "keep"])

    # Rules

    @precondition(lambda self: len(self.chats) < 4)
    @rule()
    def create(self) -> None:
        chat = create_chat(self.stores[0], model="m", tools=TOOLS)
        self.chats[chat.id] = Known()
        self.held[chat.id, 0] = chat

    @precondition(lambda self: self.chats)
    @rule(
        number=numbers_of_chats,
        which=stores_of_two,
        name=st.sampled_from(list(KINDS)),
        on_error=errors,
        stream=st.booleans(),
        patient=st.booleans(),
    )
    def ask(self, number: int, which: int, name: str, on_error: str, stream: bool, patient: bool) -> None:
        chat_id, known = self.some(number)
        kind, text, chat = KINDS[name], self.text(), self.hold(chat_id, which)
        llm, act = a_model(*kind.script()), chat.ask_stream if stream else chat.ask
        if known.pending and (patient or not known.is_dead):
            refused = ChatBusy if known.is_dead else AwaitsApproval
            self.play(known, act, llm, stream, refused, text)
            self.check_shown(llm)
            self.check()
            return
        ended = self.end_dead(known, on_error == "keep") if known.pending else []
        known.rows.append(said("user", text))
        before = known.shown
        reply = self.play(
            known, act, llm, stream, kind.error, text, on_error=on_error, stale_after=0 if ended or not patient else 60
        )
        self.settle(known, kind, on_error)
        self.check_shown(llm, *self.rounds_shown(before, kind))
        assert reply is None or reply.content == kind.text
        self.check(*ended, *kind.requests)

    @precondition(lambda self: self.chats)
    @rule(number=numbers_of_chats, which=stores_of_two, pieces=st.integers(1, 3), on_error=errors)
    def abandon(self, number: int, which: int, pieces: int, on_error: str) -> None:
        """Leave a stream in the middle of it."""
        chat_id, known = self.some(number)
        if known.pending:
            return
        llm, text = a_model(Say(chunks=["One ", "two ", "three ", "four."])), self.text()
        known.rows.append(said("user", text))
        before = known.shown
        stream = self.hold(chat_id, which).ask_stream(text, llm=llm, on_error=on_error)
        shown = "".join(next(stream).content for _ in range(pieces))
        stream.close()
        if on_error == "keep":
            known.rows.append(Row("assistant", shown, "incomplete", [("assistant", shown, ())]))
        self.check_shown(llm, before)
        self.check((499, "GeneratorExit", None, pieces))

    @precondition(lambda self: self.chats)
    @rule(number=numbers_of_chats, which=stores_of_two, on_error=errors)
    def stream_that_breaks(self, number: int, which: int, on_error: str) -> None:
        chat_id, known = self.some(number)
        if known.pending:
            return
        llm, text = a_model(Say(chunks=["Half ", "way."], error=ProviderError(500))), self.text()
        known.rows.append(said("user", text))
        before = known.shown
        self.play(known, self.hold(chat_id, which).ask_stream, llm, True, ProviderError, text, on_error=on_error)
        if on_error == "keep":
            known.rows.append(Row("assistant", "Half way.", "failed", [("assistant", "Half way.", ())]))
        self.check_shown(llm, before)
        self.check((500, "ProviderError", None, 2))

    @precondition(lambda self: self.chats)
    @rule(
        number=numbers_of_chats,
        which=stores_of_two,
        name=st.sampled_from(list(KINDS)),
        on_error=errors,
        stream=st.booleans(),
    )
    def retry(self, number: int, which: int, name: str, on_error: str, stream: bool) -> None:
        chat_id, known = self.some(number)
        chat, kind = self.hold(chat_id, which), KINDS[name]
        llm, act = a_model(*kind.script()), chat.retry_stream if stream else chat.retry
        if known.pending and not known.is_dead:
            self.play(known, act, llm, stream, AwaitsApproval)
            self.check()
            return
        ended = self.end_dead(known, on_error == "keep") if known.pending else []
        last = known.rows[-1] if known.rows else Row("system", None)
        replaced = [last] if last.role == "assistant" and last.status in ("failed", "incomplete") else []
        if last.role != "user" and not replaced:
            self.play(known, act, llm, stream, NothingToRetry)
            self.check()
            return
        rows = known.rows[:-1] if replaced else known.rows
        before = [message for row in rows for message in row.shown]
        self.play(known, act, llm, stream, kind.error, on_error=on_error, stale_after=0)
        known.rows = [*rows]
        if kind.error is not None and replaced and (on_error == "rollback" or not kind.rounds):
            known.rows += replaced
        else:
            self.settle(known, kind, on_error)
        self.check_shown(llm, *self.rounds_shown(before, kind))
        self.check(*ended, *kind.requests)

    @precondition(lambda self: self.chats)
    @rule(number=numbers_of_chats, which=stores_of_two)
    def park(self, number: int, which: int) -> None:
        """Ask for what a person must approve."""
        chat_id, known = self.some(number)
        if known.pending:
            return
        llm, text = a_model(Call("send", what="flowers")), self.text()
        known.rows.append(said("user", text))
        before = known.shown
        reply = self.hold(chat_id, which).ask(text, llm=llm)
        assert reply.status == "pending"
        known.pending, known.pending_shown = "parked", [("assistant", None, ("send",))]
        self.check_shown(llm, before)
        self.check(USUAL)

    @precondition(lambda self: any(known.pending == "parked" for known in self.chats.values()))
    @rule(which=stores_of_two, yes=st.booleans())
    def decide(self, which: int, yes: bool) -> None:
        chat_id, known = next((key, known) for key, known in self.chats.items() if known.pending == "parked")
        chat = self.hold(chat_id, which)
        self.play(known, chat.resume, a_model(), False, AwaitsApproval)
        [call] = chat.pending_approvals()
        if yes:
            chat.approve(call)
        else:
            chat.deny(call, "no")
        known.pending, known.approved = "decided", yes
        self.check()

    @precondition(lambda self: self.chats)
    @rule(
        number=numbers_of_chats,
        which=stores_of_two,
        name=st.sampled_from(list(KINDS)),
        on_error=errors,
        stream=st.booleans(),
    )
    def resume(self, number: int, which: int, name: str, on_error: str, stream: bool) -> None:
        chat_id, known = self.some(number)
        chat, kind = self.hold(chat_id, which), KINDS[name]
        llm, act = a_model(*kind.script()), chat.resume_stream if stream else chat.resume
        if known.pending is None or known.pending == "parked":
            self.play(known, act, llm, stream, NothingToResume if known.pending is None else AwaitsApproval)
            self.check()
            return
        died = [DIED] if known.pending in DEATHS and known.pending != "in a tool" else []
        rounds: tuple[Shown, ...] = ()
        if known.pending == "decided":
            told = "Sent flowers." if known.approved else "The user denied the send tool call. Reason: no"
            rounds = (*known.pending_shown, ("tool", told))
        elif known.pending == "behind a tool":
            rounds = tuple(LOOKED)
        elif known.pending == "in a tool":
            told = "The tool 'die' was interrupted while it ran. Whether it did its work is not known."
            rounds = (("assistant", None, ("die",)), ("tool", told))
        before = [*known.shown, *rounds]
        known.pending = None
        self.play(known, act, llm, stream, kind.error, on_error=on_error, stale_after=0)
        self.settle(known, kind, on_error, before=rounds)
        self.check_shown(llm, *self.rounds_shown(before, kind))
        self.check(*died, *kind.requests)

    @precondition(lambda self: self.chats)
    @rule(number=numbers_of_chats, death=st.sampled_from(DEATHS))
    def die(self, number: int, death: str) -> None:
        """Kill a process in the middle of a turn."""
        chat_id, known = self.some(number)
        if known.pending:
            return
        text = self.text()
        self.dying.ask(self.url, self.hold(chat_id, 0), text, death)
        known.rows.append(said("user", text))
        known.pending = death
        self.check(*[USUAL][: death in ("in a tool", "behind a tool")])

    @precondition(lambda self: any(known.pending in ("parked", "decided") for known in self.chats.values()))
    @rule(which=stores_of_two, on_error=errors)
    def cancel_parked(self, which: int, on_error: str) -> None:
        chat_id, known = next(
            (key, known) for key, known in self.chats.items() if known.pending in ("parked", "decided")
        )
        chat = load_chat(self.stores[which], chat_id, tools=TOOLS, on_error=on_error)
        assert chat is not None
        assert chat.cancel()
        if on_error == "keep":
            denied = known.pending == "decided" and not known.approved
            told = ("tool", "The user denied the send tool call. Reason: no")
            shown = [*known.pending_shown, told] if denied else []
            known.rows.append(Row("assistant", None, "incomplete", shown))
        known.pending = None
        self.check()

    @precondition(lambda self: self.chats)
    @rule(number=numbers_of_chats, which=stores_of_two, on_error=errors)
    def cancel(self, number: int, which: int, on_error: str) -> None:
        """Stop a turn while its model is waited for; what the model did cost is told when its answer comes."""
        chat_id, known = self.some(number)
        chat, text = self.hold(chat_id, which), self.text()
        if known.pending:
            return
        assert not chat.cancel()
        called, answers = threading.Event(), threading.Event()

        def model(keywords: dict[str, Any]) -> Say:
            called.set()
            answers.wait()
            return Say("Late.", input_tokens=INPUT, output_tokens=OUTPUT)

        llm = a_model(model)
        known.rows.append(said("user", text))
        before = known.shown
        ended: list[Any] = []
        asked = threading.Thread(
            target=lambda: ended.append(self.play(known, chat.ask, llm, False, TurnCancelled, text, on_error=on_error))
        )
        asked.start()
        called.wait()
        assert chat.cancel()
        asked.join()
        assert ended == [None]
        answers.set()
        eventually(lambda: [r.output_tokens for r in chat.requests() if r.id not in self.ledger] == [OUTPUT])
        if on_error == "keep":
            known.rows.append(Row("assistant", None, "incomplete"))
        self.check_shown(llm, before)
        self.check((499, "TurnCancelled", INPUT, OUTPUT))

    @precondition(lambda self: self.chats)
    @rule(number=numbers_of_chats, which=stores_of_two)
    def ask_while_another_does(self, number: int, which: int) -> None:
        """A second turn at once is refused, whoever wants it, and so is a message; a copy has what was before."""
        chat_id, known = self.some(number)
        if known.pending:
            return
        first, second, text = self.hold(chat_id, which), self.hold(chat_id, 1 - which), self.text()

        def model(keywords: dict[str, Any]) -> Say:
            for act in (second.ask, second.ask_stream, lambda text, **_: second.add_message("user", text)):
                self.play(known, act, a_model(), act == second.ask_stream, ChatBusy, "Me too?")
            self.copy(second, known)
            return Say("Fine.", input_tokens=INPUT, output_tokens=OUTPUT)

        llm = a_model(model)
        known.rows.append(said("user", text))
        before = known.shown
        first.ask(text, llm=llm)
        known.rows.append(said("assistant", "Fine."))
        self.check_shown(llm, before)
        self.check(USUAL)

    @precondition(lambda self: self.chats)
    @rule(number=numbers_of_chats)
    def race(self, number: int) -> None:
        """Two threads ask at once, in two stores, and wait for each other."""
        chat_id, known = self.some(number)
        if known.pending:
            return
        texts, start = [self.text(), self.text()], threading.Barrier(2)
        models = [a_model("Fine."), a_model("Fine.")]

        def ask(which: int) -> None:
            chat = self.hold(chat_id, which)
            start.wait()
            chat.ask(texts[which], llm=models[which], wait=30)

        threads = [threading.Thread(target=ask, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        spoken = [message.content for message in self.hold(chat_id, 0).messages()[len(known.rows) :: 2]]
        assert sorted(map(str, spoken)) == sorted(texts)
        for text in map(str, spoken):
            known.rows.append(said("user", text))
            self.check_shown(models[texts.index(text)], known.shown)
            known.rows.append(said("assistant", "Fine."))
        self.check(USUAL, USUAL)

    @precondition(lambda self: self.chats)
    @rule(number=numbers_of_chats, which=stores_of_two)
    def delete_while_asked(self, number: int, which: int) -> None:
        """The reply was paid for, and finds its chat gone."""
        chat_id, known = self.some(number)
        if known.pending:
            return
        first, second = self.hold(chat_id, which), self.hold(chat_id, 1 - which)

        def model(keywords: dict[str, Any]) -> Say:
            second.delete()
            return Say("Fine.", input_tokens=INPUT, output_tokens=OUTPUT)

        self.play(known, first.ask, a_model(model), False, ReplyNotSaved, self.text())
        self.forget(chat_id)
        self.check((200, None, INPUT, OUTPUT))

    @precondition(lambda self: self.chats)
    @rule(number=numbers_of_chats, which=stores_of_two)
    def delete(self, number: int, which: int) -> None:
        chat_id, known = self.some(number)
        chat = self.hold(chat_id, which)
        chat.delete()
        self.play(known, chat.ask, a_model(), False, ChatGone, "Still there?")
        self.forget(chat_id)
        self.check()

    def forget(self, chat_id: Any) -> None:
        del self.chats[chat_id]
        for which in (0, 1):
            self.held.pop((chat_id, which), None)
            assert load_chat(self.stores[which], chat_id) is None

    @precondition(lambda self: self.chats)
    @rule(number=numbers_of_chats, which=stores_of_two)
    def fork(self, number: int, which: int) -> None:
        chat_id, known = self.some(number)
        self.copy(self.hold(chat_id, which), known)
        self.check()

    def copy(self, chat: Chat, known: Known) -> None:
        if len(self.chats) < 4:
            copy = chat.fork()
            self.chats[copy.id] = Known(deepcopy(known.rows))

    @precondition(lambda self: self.chats)
    @rule(number=numbers_of_chats, which=stores_of_two, role=st.sampled_from(["user", "assistant", "system"]))
    def add_message(self, number: int, which: int, role: str) -> None:
        chat_id, known = self.some(number)
        text = self.text()
        act: Any = lambda **_: self.hold(chat_id, which).add_message(role, text)  # noqa: E731
        self.play(known, act, a_model(), False, ChatBusy if known.pending else None)
        if not known.pending:
            known.rows.append(said(role, text))
        self.check()

    @precondition(lambda self: self.chats)
    @rule(number=numbers_of_chats, which=stores_of_two, key=st.sampled_from(["a", "b"]))
    def ask_once(self, number: int, which: int, key: str) -> None:
        """The same key twice is one turn."""
        chat_id, known = self.some(number)
        if known.pending:
            return
        chat, is_new = self.hold(chat_id, which), key not in known.keys
        text = known.keys.setdefault(key, self.text())
        llm = a_model("Once.")
        if is_new:
            known.rows.append(said("user", text))
        before = known.shown
        assert chat.ask(text, llm=llm, key=key).content == "Once."
        if is_new:
            known.rows.append(said("assistant", "Once."))
        self.check_shown(llm, *[before][:is_new])
        self.check(*[USUAL][:is_new])

    @rule(which=stores_of_two, closes=st.booleans())
    def begin_anew(self, which: int, closes: bool) -> None:
        """Load everything again, from a store that was opened again."""
        if closes:
            self.stores[which].close()
            self.stores[which] = connect(self.url)
        self.held = {key: chat for key, chat in self.held.items() if key[1] != which}

    # What holds after each

    @invariant()
    def the_rows_are_as_the_model_says(self) -> None:
        for chat_id, known in self.chats.items():
            messages = self.hold(chat_id, 0).messages()
            assert [message.position for message in messages] == list(range(len(messages)))
            pending = [("assistant", None, "pending")] if known.pending else []
            wanted = [(row.role, row.content, row.status) for row in known.rows] + pending
            assert [(message.role, message.content, message.status) for message in messages] == wanted

    @invariant()
    def the_rows_fit_together(self) -> None:
        assert check(self.stores[1], stale_after=3600) == []

    @invariant()
    def what_was_spent_is_never_lost(self) -> None:
        for chat_id in self.chats:
            chat = self.hold(chat_id, 1)
            stats, requests = chat.stats(), chat.requests()
            assert {row.id for row in requests} <= set(self.ledger)
            assert stats.requests == len(requests)
            assert stats.cost == sum((row.cost for row in requests if row.cost is not None), Decimal(0))


def as_shown(message: dict[str, Any]) -> Shown:
    if message["role"] == "assistant":
        calls = message.get("tool_calls") or ()
        return "assistant", message["content"], tuple(call["function"]["name"] for call in calls)
    return message["role"], message["content"]


def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(2_000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it never came")


SIZES = {"few": (4, 12), "many": (300, 40)}


@pytest.mark.usefixtures("leaves_no_files")
@pytest.mark.parametrize("size", ["few", pytest.param("many", marks=pytest.mark.matrix)])
def test_whatever_is_done_in_whatever_order_the_database_has_what_it_must(
    store: Store, database_url: str, dying: Dying, size: str
) -> None:
    """No shorter a list of what was done than the one that is printed fails."""
    examples, steps = SIZES[size]
    machine = type("Machine", (Machine,), {"url": database_url, "dying": dying})
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    fork_and_die()

"""A month of traffic through the public API, and the ledger of what the providers billed for it, call by call.

The ledger is written by the providers: by the scripted one as it answers, by the one over HTTP from its own books. It
knows of no row of ours. October 2025 has the hour in which Berlin turns its clocks back.
"""

import asyncio
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from zoneinfo import ZoneInfo

from conftest import WAYS
from provider import Answer, Provider
from provider import Call as CallOnTheWire

from llm_orm import (
    LLM,
    Agent,
    Retries,
    Store,
    ToolError,
    connect,
    create_agent_session,
    create_chat,
    prune,
    recover,
    tool,
)
from llm_orm.gateway import Call as GatewayCall
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

FIRST = datetime(2025, 10, 1, tzinfo=UTC)
END = datetime(2025, 11, 1, tzinfo=UTC)
TURNED_BACK = datetime(2025, 10, 26, tzinfo=UTC)
"""At one o'clock in UTC, Berlin's clocks go from three to two."""

BERLIN = "Europe/Berlin"

TARIFF: dict[str, tuple[str, Decimal | None, Decimal | None]] = {
    "swift": ("acme", Decimal("0.00000015"), Decimal("0.0000006")),
    "sage": ("acme", Decimal("0.000003"), Decimal("0.000015")),
    "echo": ("bell", Decimal("0.00000333"), Decimal("0.00000777")),
    "stray": ("bell", None, None),
}
"""The provider of each model, and its dollars for a token of input, and of output."""

CACHED_AT = Decimal("0.1")
"""The share of its price that input costs which was read from the cache."""

PIECE_MS = 7
"""How long the provider over HTTP takes for a piece of its answer."""

USERS = ("u_1", "u_2", "u_3", "u_4", None)
PLANS = ("free", "pro", "team", None)


# The books


@dataclass(frozen=True)
class Bill:
    """One call of a model, as its provider has it; and whom it was made for, which the application knows."""

    at: datetime
    provider: str
    model: str
    chat: Any
    user_id: str | None
    plan: str | None
    agent_class: str | None
    status: int = 200
    error: str | None = None
    attempt: int = 1
    streamed: bool = False
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    thinking_tokens: int = 0
    cost: Decimal | None = Decimal(0)
    duration_ms: int = 0
    first_token_ms: int | None = None
    tool: str | None = None
    """Of a tool's call, which has the rest of the call that asked for it."""
    failed: bool = False


SUMMED = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "thinking_tokens", "duration_ms")


def nearest_rank(values: Iterable[int], percent: int) -> int | None:
    """The smallest of the values that so many of a hundred do not exceed."""
    ordered = sorted(values)
    return next((v for rank, v in enumerate(ordered, start=1) if 100 * rank >= percent * len(ordered)), None)


def times_of(durations: list[int]) -> dict[str, Any]:
    return {
        "duration_ms": sum(durations),
        "duration_avg_ms": round(sum(durations) / len(durations), 1) if durations else None,
        "duration_p50_ms": nearest_rank(durations, 50),
        "duration_p95_ms": nearest_rank(durations, 95),
        "duration_max_ms": max(durations, default=None),
    }


def sums_of(calls: list[Bill], tools: list[Bill]) -> dict[str, Any]:
    """Every measure of the calls of models, and of the tools that they asked for."""
    first_tokens = [bill.first_token_ms for bill in calls if bill.first_token_ms is not None]
    return {
        "requests": len(calls),
        "failed_requests": sum(bill.error is not None for bill in calls),
        "retried_requests": sum(bill.attempt > 1 for bill in calls),
        **{name: sum(getattr(bill, name) for bill in calls) for name in SUMMED},
        "total_tokens": sum(bill.input_tokens + bill.output_tokens for bill in calls),
        "cost": sum((bill.cost for bill in calls if bill.cost is not None), Decimal(0)),
        "unpriced_requests": sum(bill.cost is None for bill in calls),
        **times_of([bill.duration_ms for bill in calls]),
        "first_token_p50_ms": nearest_rank(first_tokens, 50),
        "first_token_p95_ms": nearest_rank(first_tokens, 95),
        "tool_calls": len(tools),
        "tool_failures": sum(bill.failed for bill in tools),
    }


def of_tools_alone(tools: list[Bill]) -> dict[str, Any]:
    counted = {"tool_calls": len(tools), "tool_failures": sum(bill.failed for bill in tools)}
    return {**counted, **times_of([bill.duration_ms for bill in tools])}


@dataclass
class Ledger:
    """What was billed."""

    calls: list[Bill] = field(default_factory=list)
    tools: list[Bill] = field(default_factory=list)

    def forget(self, chat: Any) -> None:
        """The chat was deleted: what its calls cost stays, whom it was for does not, nor do the calls of its tools."""
        unknown = {"chat": None, "user_id": None, "plan": None, "agent_class": None}
        self.calls = [replace(bill, **unknown) if bill.chat == chat else bill for bill in self.calls]
        self.tools = [bill for bill in self.tools if bill.chat != chat]

    def by(self, *names: str, tz: str = "UTC", of_tools: bool = False) -> dict[tuple[Any, ...], dict[str, Any]]:
        """{group: measures} of all groups in which something was."""
        groups: dict[tuple[Any, ...], tuple[list[Bill], list[Bill]]] = defaultdict(lambda: ([], []))
        for place, bills in enumerate((self.calls, self.tools)):
            for bill in bills:
                groups[tuple(named(bill, name, ZoneInfo(tz)) for name in names)][place].append(bill)
        if of_tools:
            return {key: of_tools_alone(tools) for key, (_, tools) in groups.items() if tools}
        return {key: sums_of(*found) for key, found in groups.items()}


def named(bill: Bill, name: str, tz: Any) -> Any:
    """What the bill is grouped under."""
    local = bill.at.astimezone(tz)
    midnight = local.replace(hour=0, minute=0, second=0, microsecond=0).date()
    match name:
        case "hour":
            return bill.at.replace(minute=0, second=0, microsecond=0)
        case "day":
            return midnight
        case "week":
            return midnight - timedelta(days=midnight.weekday())
        case "month":
            return midnight.replace(day=1)
        case "metadata.plan":
            return bill.plan
        case "source":
            return "chat"
        case _:
            return getattr(bill, name)


# The clock


class Clock:
    """The time of the month, which goes on when somebody works."""

    def __init__(self) -> None:
        self.now, self.worked_ms = FIRST, 0

    def __call__(self) -> float:
        return self.worked_ms / 1000

    def work(self, milliseconds: int) -> None:
        self.worked_ms += milliseconds
        self.now += timedelta(milliseconds=milliseconds)

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Put in the place of the real one, wherever llm_orm looks at it; in threads, too."""
        clock = self

        class Then(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return clock.now

            fromisoformat = staticmethod(datetime.fromisoformat)

        with (
            patch("llm_orm.records.datetime", Then),
            patch.object(GatewayCall, "_clock", staticmethod(clock)),
            patch("llm_orm.tools.time", SimpleNamespace(perf_counter=clock)),
        ):
            yield


# Who answers


@dataclass(frozen=True)
class Account:
    """Whom a chat is for."""

    chat: Any
    user_id: str | None = None
    plan: str | None = None
    agent_class: str | None = None


@dataclass(frozen=True)
class Plan:
    """One answer: what is said or raised, and how long it takes."""

    says: Any
    takes_ms: int
    first_ms: int
    attempt: int = 1
    hung_up: bool = False
    """Whether the reader goes after the first piece."""


class Vendor(ScriptedLLM):
    """Answers as it was planned, takes its time, and writes down what it bills."""

    def __init__(self, clock: Clock, ledger: Ledger):
        super().__init__()
        self.clock, self.ledger = clock, ledger
        self.plan = Plan("", 0, 0)
        self.account = Account(None)

    def get_llm_provider(self, model: str, custom_llm_provider: str | None = None) -> tuple[str, str]:
        return model, TARIFF[model][0]

    def cost_per_token(self, *, model: str = "", **tokens: Any) -> tuple[Decimal, Decimal]:
        if TARIFF[model][1] is None:
            raise ValueError(f"{model} has no price")
        return price(model, tokens["prompt_tokens"], tokens["cache_read_input_tokens"], 0), price(
            model, 0, 0, tokens["completion_tokens"]
        )

    def answers(self, account: Account, *plans: Plan) -> None:
        self.account, self.requests = account, []
        self.script = [self._played(plan) for plan in plans]

    def _played(self, plan: Plan) -> Callable[[dict[str, Any]], Any]:
        def play(keywords: dict[str, Any]) -> Any:
            self.plan = plan
            if isinstance(plan.says, ProviderError):
                self.clock.work(plan.takes_ms)
                status = plan.says.status_code
                cost = None if status is None else Decimal(0)
                self._bill(keywords, status=status or 0, error=type(plan.says).__name__, cost=cost)
            return plan.says

        return play

    def _whole(self, say: Say, keywords: dict[str, Any]) -> Any:
        self.clock.work(self.plan.takes_ms)
        self._bill_said(say, keywords)
        return super()._whole(say, keywords)

    def _parts(self, say: Say, keywords: dict[str, Any]) -> Iterator[Any]:
        first, *others = super()._parts(say, keywords)
        self.clock.work(self.plan.first_ms)
        if self.plan.hung_up:
            self._bill_hung_up(say, keywords)
        yield first
        self.clock.work(self.plan.takes_ms - self.plan.first_ms)
        self._bill_said(say, keywords, first_token_ms=self.plan.first_ms)
        yield from others

    def _bill_said(self, say: Say, keywords: dict[str, Any], **more: Any) -> None:
        tokens: dict[str, Any] = {
            name: getattr(say, name)
            for name in ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "thinking_tokens")
        }
        cost = Decimal(say.cost) if say.cost is not None else None
        if cost is None and TARIFF[keywords["model"]][1] is not None:
            cost = price(keywords["model"], say.input_tokens or 0, say.cached_tokens, say.output_tokens or 0)
        self._bill(keywords, **tokens, cost=cost, **more)
        for call in say.calls:
            self.ledger.tools.append(replace(self.ledger.calls[-1], tool=call.name, failed=call.name == "fail"))

    def _bill_hung_up(self, say: Say, keywords: dict[str, Any]) -> None:
        """The messages and tools that were read, and the one word that was said, by the vendor's own count."""
        read = self.token_counter("", messages=keywords["messages"], tools=keywords.get("tools"))
        cost = None if TARIFF[keywords["model"]][1] is None else price(keywords["model"], read, 0, 1)
        first = self.plan.first_ms
        self.plan = replace(self.plan, takes_ms=first)
        told = {"status": 499, "error": "GeneratorExit", "first_token_ms": first}
        self._bill(keywords, **told, input_tokens=read, output_tokens=1, cost=cost)

    def _bill(self, keywords: dict[str, Any], **facts: Any) -> None:
        bill = Bill(
            at=self.clock.now,
            provider=TARIFF[keywords["model"]][0],
            model=keywords["model"],
            **asdict(self.account),
            attempt=self.plan.attempt,
            streamed=bool(keywords.get("stream")),
            duration_ms=self.plan.takes_ms,
        )
        self.ledger.calls.append(replace(bill, **facts))


def price(model: str, read: int, cached: int, said: int) -> Decimal:
    _, of_input, of_output = TARIFF[model]
    assert of_input is not None
    assert of_output is not None
    return of_input * (read - cached) + of_input * CACHED_AT * cached + of_output * said


# The traffic


class Died(BaseException):
    """The process is gone: nothing that it would still do is done."""


class Month:
    """Makes the traffic, and has its ledger. The same seed makes the same month, on whatever database."""

    def __init__(self, store: Store, url: str, seed: int = 1):
        self.store, self.url, self.chance = store, url, random.Random(seed)
        self.clock, self.ledger = Clock(), Ledger()
        self.vendor = Vendor(self.clock, self.ledger)
        self.chats: list[tuple[Any, Account]] = []
        self.tools = {"look": 40, "fail": 15, "book": 250}

    def spend(self, turns: int, provider: Provider | None = None) -> Ledger:
        with self.clock.ticking():
            self._open_chats()
            if provider is not None:
                self._go_over_http(provider)
            kinds = [*KINDS, *self.chance.choices(list(KINDS), WEIGHTS, k=turns)]
            for at, kind in zip(self._moments(len(kinds)), kinds, strict=True):
                self.clock.now = at
                getattr(self, kind)()
            self.clock.now = END - timedelta(minutes=5)
            self._clear_up()
        return self.ledger

    def _moments(self, count: int) -> list[datetime]:
        """Times in the order of the month: at its ends, in the hours around the turn of the clocks, and anywhere."""
        edges = [FIRST, FIRST + timedelta(seconds=1), END - timedelta(minutes=30), END - timedelta(hours=1, minutes=30)]
        edges += [TURNED_BACK + timedelta(minutes=minutes) for minutes in (-121, -61, -1, 0, 30, 59, 60, 90, 120, 150)]
        edges += [TURNED_BACK + timedelta(hours=hours) for hours in (22.5, 23.5)]
        length = (END - FIRST).total_seconds() - 3600
        some = [FIRST + timedelta(seconds=self.chance.randrange(int(length))) for _ in range(count)]
        return sorted([*edges[:count], *some[len(edges) :]])

    def _open_chats(self) -> None:
        @tool
        def look(where: str = "up") -> str:
            self.clock.work(self.tools["look"])
            return f"Seen {where}."

        @tool
        def fail(why: str = "") -> str:
            self.clock.work(self.tools["fail"])
            raise ToolError("no")

        @tool
        def book(room: int) -> str:
            self.clock.work(self.tools["book"])
            return "booked"

        options: Any = {"llm": self.vendor, "tools": [look, fail, book], "retries": Retries(2, first_wait_s=0)}
        for number, (user, plan) in enumerate(itertools.product(USERS, PLANS)):
            model = list(TARIFF)[number % len(TARIFF)]
            metadata = {} if plan is None else {"plan": plan}
            chat = create_chat(self.store, model=model, user_id=user, metadata=metadata, **options)
            self.chats.append((chat, Account(chat.id, user, plan)))
        for name in ("Support", "Billing"):
            agent = type(name, (Agent,), {"model": "sage", "tools": options["tools"], "retries": options["retries"]})
            session = create_agent_session(self.store, agent, llm=self.vendor, user_id="u_1")
            self.chats.append((session, Account(session.chat_id, "u_1", None, name)))

    # A turn of each kind

    def _answer(self, *, attempt: int = 1, **more: Any) -> Plan:
        chance, read = self.chance, self.chance.randrange(20, 4000)
        says = Say(
            "one two three four",
            input_tokens=read,
            output_tokens=chance.randrange(5, 900),
            cached_tokens=chance.choice([0, 0, read // 2]),
            cache_write_tokens=chance.choice([0, 0, read // 4]),
            thinking_tokens=chance.choice([0, 0, 4]),
            **more,
        )
        first = chance.randrange(20, 600)
        return Plan(says, first + chance.randrange(50, 9000), first, attempt)

    def _failure(self, status: int | None, attempt: int = 1) -> Plan:
        return Plan(ProviderError(status), self.chance.randrange(10, 300), 0, attempt)

    def _ask(self, *plans: Plan, way: str | None = None, **options: Any) -> None:
        chat, account = self.chance.choice(self.chats)
        self.vendor.answers(account, *plans)
        with suppress(ProviderError):
            WAYS[way or self.chance.choice(list(WAYS))](chat, "How do you do, and what is it like?", **options)
        assert not self.vendor.script

    def plain(self) -> None:
        self._ask(self._answer())

    def priced_by_the_provider(self) -> None:
        self._ask(self._answer(cost=str(self.chance.randrange(1, 10**6) * Decimal("0.000000000001"))))

    def with_tools(self) -> None:
        calls = self.chance.choices([Call("look"), Call("fail"), Call("book", room=7)], k=self.chance.randrange(1, 3))
        before = len(self.ledger.tools)
        self._ask(self._answer(calls=calls), self._answer(), tool_concurrency=1)
        for number in range(before, len(self.ledger.tools)):
            bill = self.ledger.tools[number]
            self.ledger.tools[number] = replace(bill, duration_ms=self.tools[bill.tool or ""])

    def retried(self) -> None:
        status = self.chance.choice([429, 500, 503])
        self._ask(self._failure(status), self._answer(attempt=2))

    def never_arrived(self) -> None:
        self._ask(self._failure(None), self._failure(None, 2), self._failure(None, 3))

    def refused(self) -> None:
        self._ask(self._failure(self.chance.choice([400, 401, 404])))

    def throttled(self) -> None:
        self._ask(*(self._failure(429, attempt) for attempt in (1, 2, 3)))

    def fell_back(self) -> None:
        self._ask(self._failure(503), self._answer(attempt=2), retries=0, fallbacks=["echo"])

    def left(self) -> None:
        """A stream whose reader goes after the first word."""
        chat, account = self.chance.choice(self.chats)
        self.vendor.answers(account, replace(self._answer(), hung_up=True))
        if self.chance.random() < 0.5:
            with chat.ask_stream("Count for me!") as stream:
                next(stream)
            return

        async def read() -> None:
            async with chat.aask_stream("Count for me!") as stream:
                await anext(stream)

        asyncio.run(read())

    def died(self) -> None:
        """A process that dies while a model is called; another one finds its turn."""
        with connect(self.url) as dying:

            def die(*_: Any, **__: Any) -> Any:
                raise Died

            def model(keywords: dict[str, Any]) -> Any:
                dying.database.execute_sql = die  # type: ignore[method-assign]
                raise Died

            chat = create_chat(dying, model="swift", llm=self.vendor)
            self.vendor.script = [model]
            with suppress(Died):
                chat.ask("Are you there?")
        self.clock.work(3_600_000)
        recover(self.store, older_than=0)
        who = {"provider": "acme", "model": "swift", **asdict(Account(chat.id))}
        self.ledger.calls.append(Bill(self.clock.now, **who, status=0, error="ProcessDied", cost=None))

    def deleted(self) -> None:
        chat = create_chat(self.store, model="echo", llm=self.vendor, user_id="u_9")
        self.vendor.answers(Account(chat.id, "u_9"), self._answer())
        chat.ask("Goodbye.")
        chat.delete()
        self.ledger.forget(chat.id)

    def erased(self) -> None:
        chat = create_chat(self.store, model="swift", llm=self.vendor, user_id="u_9", metadata={"plan": "pro"})
        self.vendor.answers(Account(chat.id, "u_9", "pro"), self._answer())
        chat.ask("My name is Ada.")
        chat.erase()
        self.ledger.calls[-1] = replace(self.ledger.calls[-1], plan=None)  # what was written of the chat goes, too

    def _clear_up(self) -> None:
        """The chats of one user go; what they cost stays."""
        gone = [account.chat for _, account in self.chats if account.user_id == "u_4"]
        assert prune(self.store, 1, keep_requests=True, where={"user_id": "u_4"}).chats == len(gone)
        for chat in gone:
            self.ledger.forget(chat)

    # Over HTTP

    def _go_over_http(self, provider: Provider) -> None:
        """A turn with a tool, a failure and a retry in each wire format, through the real litellm."""
        import litellm

        for number, wire in enumerate(("openai", "anthropic", "gemini")):
            settings = getattr(provider, wire)()
            name = settings.pop("model")
            model = name.partition("/")[2]
            options: Any = {"llm": LLM(**settings), "tools": self.chats[0][0].options.tools}
            plan = {"plan": "pro"}
            chat = create_chat(
                self.store, model=name, user_id="u_2", metadata=plan, retries=Retries(1, first_wait_s=0), **options
            )
            account = Account(chat.id, "u_2", "pro")
            for way in WAYS:
                at = self.clock.now = FIRST + timedelta(days=3 * number, hours=5)
                before = len(provider.ledger)
                thought = 0 if wire == "anthropic" else 11  # which does not say how many of its tokens were thought
                tokens = {"input_tokens": 900 + number, "output_tokens": 70, "thinking_tokens": thought}
                said = Answer("one two", cached_tokens=300, **tokens)
                called = replace(said, text="", tool_calls=[CallOnTheWire("look", {"where": "up"})], output_tokens=33)
                provider.fail(429)
                took: list[list[Any]] = [[], self._says_slowly(provider, called), self._says_slowly(provider, said), []]
                provider.fail(400)
                WAYS[way](chat, "Over the wire?")
                with suppress(litellm.BadRequestError):
                    WAYS[way](chat, "And now?")
                for place, bill in enumerate(provider.ledger[before:]):
                    facts = self._facts(bill, litellm.model_cost[model])
                    took_ms = len(took[place]) * PIECE_MS
                    at += timedelta(milliseconds=took_ms + (self.tools["look"] if place == 2 else 0))
                    first = took_ms if bill.stream and took_ms else None
                    more = {"attempt": 1 + (place == 1), "streamed": bill.stream, "first_token_ms": first}
                    told = asdict(account)
                    self.ledger.calls.append(Bill(at, wire, model, **told, **facts, **more, duration_ms=took_ms))
                asked = self.ledger.calls[-3]
                self.ledger.tools.append(replace(asked, tool="look", duration_ms=self.tools["look"]))

    def _says_slowly(self, provider: Provider, answer: Answer) -> list[Any]:
        """Has each piece of the answer take its time; gives the list of those that were written."""
        pieces: list[Any] = []

        def write(piece: dict[str, Any]) -> None:
            pieces.append(piece)
            self.clock.work(PIECE_MS)

        provider.reply_oddly(answer, write)
        return pieces

    def _facts(self, bill: Any, tariff: Mapping[str, Any]) -> dict[str, Any]:
        """What the provider's books say of a call, at the price of its list."""
        errors = {200: None, 400: "BadRequestError", 429: "RateLimitError"}
        facts: dict[str, Any] = {"status": bill.status, "error": errors[bill.status]}
        if bill.status != 200:
            return facts

        def dollars(name: str) -> Decimal:
            return Decimal(str(tariff[name]))

        names = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "thinking_tokens")
        cost = dollars("input_cost_per_token") * (bill.input_tokens - bill.cached_tokens)
        cost += dollars("cache_read_input_token_cost") * bill.cached_tokens
        cost += dollars("output_cost_per_token") * bill.output_tokens
        return {**facts, **{name: getattr(bill, name) for name in names}, "cost": cost}


KINDS = {
    "plain": 40,
    "priced_by_the_provider": 6,
    "with_tools": 14,
    "retried": 8,
    "never_arrived": 2,
    "refused": 4,
    "throttled": 3,
    "fell_back": 5,
    "left": 6,
    "died": 1,
    "deleted": 2,
    "erased": 1,
}
"""The kinds of turns, and how often each of them comes in a hundred, or so."""

WEIGHTS = list(KINDS.values())

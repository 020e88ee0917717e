"""Thirty days of made-up traffic, the same at every run: what a dashboard has to show."""

import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from llm_orm import Store

FIRST = datetime(2026, 10, 1, tzinfo=UTC)
END = datetime(2026, 10, 31, tzinfo=UTC)

MODELS = {
    # model: provider, dollars of a million tokens in and out, how often it is asked, milliseconds
    "gpt-4o": ("openai", "2.5", "10", 30, 1800),
    "gpt-4o-mini": ("openai", "0.15", "0.6", 44, 900),
    "claude-sonnet-4-5": ("anthropic", "3", "15", 26, 2400),
    "gemini-2.5-flash": ("gemini", "0.3", "2.5", 16, 1100),
    "llama-3.3-70b": ("ollama", None, None, 8, 3100),
}
AGENTS = ("SupportAgent", "ResearchAgent", None)
TOOLS = {"search_orders": 180, "refund": 420, "web_search": 1300}
ERRORS = {"RateLimitError": 429, "Timeout": 408, "InternalServerError": 500, "APIConnectionError": 0}
QUESTIONS = {
    "Where is my order 1182?": "It left our warehouse yesterday. DHL brings it on Friday.",
    "Can I get a refund for the headphones?": "Yes. I have asked for $79.00 to be sent back to your card.",
    "Summarise the three papers that I attached": "All three find the same: sleep helps, coffee less than hoped.",
    "Write a friendly reminder for an unpaid invoice": "Dear Ms Lopez, a small reminder: invoice 88 is still open.",
    "Which of these contracts ends this year?": "Only the one with Acme, on December 1.",
    "Plan a week of meals without nuts": "Monday: lentil soup. Tuesday: pasta with peas. Wednesday: …",
}
MESSAGES = {
    "RateLimitError": "Rate limit reached for requests per minute: try again in 20 s",
    "Timeout": "The request took longer than 60 s",
    "InternalServerError": "The server had an error while processing the request",
    "APIConnectionError": "Connection error",
}
THOUGHTS = "They name an order. I should look it up before I say anything about the day."

XSS = (
    "<script>window.__pwned = 1; alert('pwned')</script>"
    '<img src=x onerror="window.__pwned = 2">'
    '<svg onload=window.__pwned=3><a href="javascript:window.__pwned=4">link</a></svg>'
    "</script></textarea></pre>{{ 7 * 7 }}{% raw %}${7*7}\u202eevil\u202c \"'><b>bold</b>"
)


def fill(store: Store, *, days: int = 30, per_day: int = 24, seed: int = 7) -> None:
    """Put traffic into the tables; days of it, which end with October 2026."""
    rng = random.Random(seed)
    made = _Made(store, rng)
    for day in range(days):
        at = END - timedelta(days=days - day)
        busy = per_day * (0.45 if at.weekday() > 4 else 1) * (0.75 + 0.6 * day / days)
        for _ in range(max(1, round(busy / 3))):
            made.chat(at + timedelta(seconds=rng.triangular(5 * 3600, 23 * 3600, 14 * 3600)))
    made.write()


class _Made:
    """Rows in the making."""

    def __init__(self, store: Store, rng: random.Random):
        self.store, self.rng = store, rng
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in store.records.__dataclass_fields__}
        self.count = 0

    def id(self) -> UUID:
        self.count += 1
        return UUID(int=(0x0190 << 112) | (0x7 << 76) | (0x8 << 60) | self.count)

    def add(self, record: str, **values: Any) -> UUID:
        key = self.id()
        self.rows[record].append({"id": key, **values})
        return key

    def chat(self, at: datetime, *, words: str | None = None, user: str | None = None) -> UUID:
        rng = self.rng
        model = rng.choices(list(MODELS), [each[3] for each in MODELS.values()])[0]
        agent = rng.choice(AGENTS)
        user = user or f"u_{min(int(rng.expovariate(0.35)), 14):02d}"
        plan = rng.choices(["free", "team", "enterprise"], [5, 3, 1])[0]
        chat = self.add(
            "chat",
            model=model,
            provider=MODELS[model][0],
            metadata={"plan": plan, "team": self.count % 12},
            instructions="Be brief and kind." if agent else None,
            user_id=user,
            created_at=at,
            updated_at=at,
        )
        if agent:
            self.add("agent_session", chat=chat, agent_class=agent, metadata={}, created_at=at, updated_at=at)
        for turn in range(rng.choice((1, 1, 2, 3))):
            at = self.turn(chat, model, turn, at, agent, words)
        self.rows["chat"][-1]["updated_at"] = at
        return chat

    def turn(self, chat: UUID, model: str, number: int, at: datetime, agent: Any, words: str | None) -> datetime:
        rng, (provider, *_) = self.rng, MODELS[model]
        said: Any = {"chat": chat, "created_at": at, "updated_at": at, "status": "completed"}
        question = words or rng.choice(list(QUESTIONS))
        turn = self.add("message", **said, position=2 * number, role="user", content=question, content_raw=None)
        answer = self.id()
        rounds, attempt, used = 0, 1, (0, 0)
        while rng.random() < (0.11 if at.day in (12, 13) else 0.04):  # two bad days
            at = self.request(chat, None, turn, model, at, attempt=attempt, fails=True)
            attempt += 1
        if agent and rng.random() < 0.6:
            at = self.request(chat, answer, turn, model, at, attempt=attempt, asks_tool=True)
            self.tool(chat, answer, turn, at)
            rounds, attempt = 1, 1
        at = self.request(chat, answer, turn, model, at, number=rounds, attempt=attempt)
        used = (self.rows["request"][-1]["input_tokens"], self.rows["request"][-1]["output_tokens"])
        self.rows["message"].append(
            {
                "id": answer,
                **said,
                "position": 2 * number + 1,
                "role": "assistant",
                "content": words or QUESTIONS[question],
                "thinking_text": THOUGHTS if provider == "anthropic" else None,
                "content_raw": None,
                "model_id": model,
                "provider": provider,
                "input_tokens": used[0],
                "output_tokens": used[1],
                "created_at": at,
                "updated_at": at,
            }
        )
        return at + timedelta(seconds=40)

    def request(
        self,
        chat: UUID,
        message: UUID | None,
        turn: UUID,
        model: str,
        at: datetime,
        *,
        number: int = 0,
        attempt: int = 1,
        fails: bool = False,
        asks_tool: bool = False,
    ) -> datetime:
        rng = self.rng
        provider, dear_in, dear_out, _, usual = MODELS[model]
        error = rng.choice(list(ERRORS)) if fails else None
        took = round(usual * rng.lognormvariate(0, 0.45))
        given, said = round(rng.lognormvariate(8.4, 0.7)), round(rng.lognormvariate(6.1, 0.6))
        if fails:
            given = said = 0
        cost = None if dear_in is None else (Decimal(dear_in) * given + Decimal(dear_out or 0) * said) / 10**6
        at += timedelta(milliseconds=took)
        self.add(
            "request",
            chat=chat,
            message=message,
            turn_id=turn,
            round=number,
            attempt=attempt,
            provider=provider,
            model=model,
            status_code=ERRORS[error] if error else 200,
            error=error,
            error_message=MESSAGES[error] if error else None,
            finish_reason=None if fails else "tool_calls" if asks_tool else "stop",
            duration_ms=took,
            first_token_ms=None if fails else took // 4,
            streamed=True,
            input_tokens=given,
            output_tokens=said,
            cached_tokens=given // 3 if rng.random() < 0.4 else 0,
            thinking_tokens=said // 2 if model.startswith("claude") else 0,
            cost=Decimal(0) if fails and cost is not None else cost,
            created_at=at,
        )
        return at

    def tool(self, chat: UUID, message: UUID, turn: UUID, at: datetime) -> None:
        rng = self.rng
        name = rng.choice(list(TOOLS))
        took, fails = round(TOOLS[name] * rng.lognormvariate(0, 0.5)), rng.random() < 0.07
        self.add(
            "tool_call",
            chat=chat,
            message=message,
            turn_id=turn,
            round=0,
            position=0,
            tool_call_id=f"call_{self.count}",
            name=name,
            arguments='{"order": 1182, "fields": ["status", "carrier"]}',
            result="the order is locked" if fails else '{"status": "sent", "carrier": "DHL", "days": 2}',
            status="failed" if fails else "completed",
            error="ToolError: the order is locked" if fails else None,
            duration_ms=took,
            created_at=at,
            finished_at=at + timedelta(milliseconds=took),
        )

    def write(self) -> None:
        # The messages that calls point at come first.
        with self.store.transaction():
            for name in ("chat", "agent_session", "message", "request", "tool_call", "attachment"):
                record: Any = getattr(self.store.records, name)
                names = {key for row in self.rows[name] for key in row}
                whole = [{each: row.get(each) for each in names} for row in self.rows[name]]
                for start in range(0, len(whole), 50):
                    record.insert_many(whole[start : start + 50]).execute()


def hostile(store: Store, at: datetime = END + timedelta(days=5)) -> UUID:
    """A chat that is full of what must be shown, not run; its id."""
    made = _Made(store, random.Random(1))
    made.count = 10**9
    chat = made.add(
        "chat",
        model=XSS,
        provider=XSS,
        instructions=XSS,
        metadata={"plan": XSS, XSS: XSS},
        user_id=XSS,
        created_at=at,
        updated_at=at,
    )
    made.add("agent_session", chat=chat, agent_class=XSS, metadata={XSS: XSS}, created_at=at, updated_at=at)
    said: Any = {"chat": chat, "created_at": at, "updated_at": at, "status": "completed", "content": XSS}
    turn = made.add("message", **said, position=0, role="user", content_raw={"attachments": 1})
    answer = made.add(
        "message", **said, position=1, role="assistant", content_raw=None, thinking_text=XSS, model_id=XSS, provider=XSS
    )
    made.add(
        "attachment",
        message=turn,
        position=0,
        media_type="text/html",
        filename=XSS,
        size=10,
        sha256="0" * 64,
        url="javascript:window.__pwned=5",
    )
    call: Any = {"chat": chat, "turn_id": turn, "round": 0, "created_at": at}
    for error in (XSS, None):
        made.add(
            "request",
            **call,
            message=answer,
            provider=XSS,
            model=XSS,
            status_code=0 if error else 200,
            error=error,
            error_message=error,
            duration_ms=5,
            cost=Decimal("0.5"),
            input_tokens=10,
        )
    made.add(
        "tool_call",
        **call,
        message=answer,
        position=0,
        tool_call_id="call",
        name=XSS,
        arguments=XSS,
        result=XSS,
        error=XSS,
        status="failed",
        duration_ms=5,
    )
    made.write()
    return chat

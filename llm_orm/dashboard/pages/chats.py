"""Chats: the list, what is found in them, and one of them as it happened."""

from typing import Any

from ...chronicle import Chronicle, chronicle
from ...listing import chats, title_of
from ...store import Store
from ..page import Page
from ..query import OWN, Query
from ..tables import Column, Table

TURNS_AT_ONCE = 50


def columns(store: Store) -> list[Column]:
    return [
        Column("title", "Chat"),
        Column("updated_at", "Last active", "time", "updated_at"),
        Column("agent_class", "Agent", sort="agent_class", minor=True),
        Column("model", "Model", sort="model"),
        *(Column(name, name, sort=name, minor=True) for name in own_names(store)),
        Column("status", "Status", "status"),
        Column("cost", "Cost", "dollars", "cost"),
        Column("unpriced_requests", "Unpriced", "number", "unpriced_requests", minor=True),
        Column("turns", "Turns", "number", "turns"),
        Column("messages", "Messages", "number", "messages", minor=True),
        Column("requests", "Requests", "number", "requests"),
        Column("failed_requests", "Failed", "number", "failed_requests"),
        Column("total_tokens", "Tokens", "number", "total_tokens"),
        Column("created_at", "Begun", "time", "created_at", minor=True),
        Column("id", "Id", "id"),
    ]


def own_names(store: Store) -> list[str]:
    return [name for name in store.chat_columns if name not in OWN]


def chats_page(store: Store, query: Query) -> Page:
    if query.text.strip():
        return search_page(store, query)
    order = query.order or "-updated_at"
    page: Any = {"order": order, "limit": query.limit + 1, "offset": query.offset}
    found = chats(store, where=query.of_chats(), **query.time, **page)
    rows = [{**line.as_dict(), **line.columns, "metadata": line.metadata} for line in found[: query.limit]]
    table = Table(
        "chats",
        "Chats",
        columns(store),
        [{**row, "title": row["title"] or "(nothing said)"} for row in rows],
        links={
            "title": lambda row: query.href(f"/chats/{row['id']}"),
            "agent_class": lambda row: (
                query.filtered("agent_class", row["agent_class"]) if row["agent_class"] else None
            ),
        },
        marks=lambda row: "failed" if row["status"] == "failed" else "",
        empty="No chat in this span of time.",
        note="Costs and tokens are those of the whole chat, also of what was before or after this span of time.",
    )
    return Page("Chats", "chats.html", {"chats": lambda: table}, lambda: {"has_more": len(found) > query.limit})


FOUND = ("created_at", "role", "name", "snippet", "rank", "chat_id", "message_id", "chat", "chat_updated_at")
"""What is told of a hit under these names, whatever the application calls its columns."""


def search_page(store: Store, query: Query) -> Page:
    """What was said that has these words, the best first."""
    from ...search import search

    page: Any = {"limit": query.limit + 1, "offset": query.offset, "since": query.since, "until": query.until}
    found = search(store, query.text, where=query.of_chats(), **page)
    shown = found[: query.limit]
    lines = {}
    if shown:
        of_found = {"id": list({each.chat_id for each in shown})}
        lines = {line.id: line for line in chats(store, where=of_found, limit=None)}
    rows = []
    for each in shown:
        line = lines.get(each.chat_id)  # None: it was deleted in between
        of_chat = {"chat": line and line.title, "chat_updated_at": line and line.updated_at}
        columns = {name: line and line.columns[name] for name in own_names(store)}
        rows.append({**columns, **each.as_dict(), **of_chat, "columns": columns})
    table = Table(
        "found",
        f"Found for “{query.text}”",
        [
            Column("created_at", "Time", "time"),
            Column("role", "Who"),
            Column("name", "Tool"),
            Column("snippet", "Text"),
            *(Column(name, name) for name in own_names(store) if name not in FOUND),
            Column("chat", "Chat"),
            Column("chat_updated_at", "Last active", "time"),
            Column("rank", "Rank"),
            Column("chat_id", "Id"),
            Column("message_id", "Message"),
        ],
        rows,
        empty="Nothing was found.",
    )
    pieces = [(row, hits_of(each.snippet, each.hits)) for row, each in zip(rows, shown, strict=True)]
    values = {"has_more": len(found) > query.limit, "pieces": pieces}
    return Page("Chats", "search.html", {"found": lambda: table}, lambda: values)


def hits_of(text: str, hits: Any) -> list[tuple[str, bool]]:
    """A text in pieces: what was looked for, and what is between."""
    pieces, place = [], 0
    for start, end in hits:
        pieces += [(text[place:start], False), (text[start:end], True)]
        place = end
    return [(piece, is_hit) for piece, is_hit in [*pieces, (text[place:], False)] if piece]


STEPS = (
    Column("turn", "Turn", "number"),
    Column("kind", "Kind"),
    Column("name", "Model or tool"),
    Column("status", "Status"),
    Column("error", "Error"),
    Column("created_at", "Time", "time"),
    Column("duration_ms", "Duration", "ms"),
    Column("first_token_ms", "First token", "ms"),
    Column("input_tokens", "Input", "number"),
    Column("output_tokens", "Output", "number"),
    Column("cost", "Cost", "money"),
    Column("text", "Text"),
)


def chat_page(store: Store, query: Query, chat_id: str) -> Page | None:
    """One chat as it happened; None where there is none."""
    told = chronicle(store, chat_id, last=TURNS_AT_ONCE, before=query.turns_before)
    if told is None:
        return None
    title = next((turn.question.text for turn in told.turns if turn.question and turn.question.text), None)
    name = title_of(title) or f"Chat {told.id}"
    rows = list(steps(told))
    slowest = max((row["duration_ms"] or 0 for row in rows), default=0)
    table = Table("steps", "Steps", STEPS, rows, empty="Nothing was said in this chat yet.")
    return Page(name, "chat.html", {"steps": lambda: table}, lambda: {"chat": told, "slowest": slowest}, has_time=False)


def steps(told: Chronicle) -> Any:
    """Every message, call of a model and call of a tool, in order, as rows of a table."""
    for number, turn in enumerate(told.turns, told.turns_before + 1):
        if turn.question:
            yield _said(number, turn.question)
        for step in turn.steps:
            yield _step(number, step)
        if turn.reply:
            yield _said(number, turn.reply)
    for step in told.besides:
        yield _step(None, step)


NOTHING = dict.fromkeys(column.name for column in STEPS)


def _said(turn: int, message: Any) -> dict[str, Any]:
    return {
        **NOTHING,
        "turn": turn,
        "kind": message.role,
        "name": message.model,
        "status": message.status,
        "created_at": message.created_at,
        "text": message.text,
    }


def _step(turn: int | None, step: Any) -> dict[str, Any]:
    found = {**NOTHING, "turn": turn, **{name: getattr(step, name) for name in NOTHING if hasattr(step, name)}}
    if step.kind == "tool":
        return {**found, "text": step.result}
    return {**found, "kind": "model call", "name": step.model, "status": step.status_code}

"""Rows → the messages a model is shown."""

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from uuid import UUID

from .values import Message

History = int | Callable[[list[Message]], list[Message]] | None
"""What of the earlier messages is sent: the last n turns, what a function leaves of them, or all."""


class Transcript:
    """The messages of one chat, kept between turns and brought up to date from the rows behind `position`."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, list[Message]]] = []

    @property
    def position(self) -> int:
        """The position of the last row that is in here, -1 where there is none."""
        return self._rows[-1][0] if self._rows else -1

    def rewind(self, position: int) -> None:
        """Forget the rows from a position on."""
        while self.position >= position:
            self._rows.pop()

    def add(self, rows: Iterable[tuple], results: Callable[[list[UUID]], Mapping[tuple[UUID, str], str]]) -> None:
        """Add rows (id, position, role, status, content, content_raw), in order; pending ones are left for later.

        results    looks up the results of tool calls, by (message id, tool call id)
        """
        settled = list(itertools.takewhile(lambda row: row[3] != "pending", rows))
        with_tools = [as_uuid(row[0]) for row in settled if row[5] and row[2] == "assistant"]
        known = results(with_tools) if with_tools else {}
        for row_id, position, role, _, content, raw in settled:
            if role == "assistant":
                messages = assistant_messages(as_uuid(row_id), content, as_json(raw), known)
            else:
                messages = [{"role": role, "content": content}] if content is not None else []
            self._rows.append((position, messages))

    def shown(self, instructions: str | None, history: History = None) -> list[Message]:
        """The messages for a call: fresh copies, the instructions first, the last user message always in."""
        everything = [message for _, messages in self._rows for message in messages]
        messages = [_copied(message) for message in limited(everything, history)]
        return [{"role": "system", "content": instructions}, *messages] if instructions else messages


def assistant_messages(
    message_id: UUID, content: str | None, raw: Any, results: Mapping[tuple[UUID, str], str]
) -> list[Message]:
    """What an assistant row stands for: its rounds with their tool results, or its text; never an empty message."""
    rounds = raw.get("rounds") if isinstance(raw, dict) else None
    if not rounds:
        return [{"role": "assistant", "content": content}] if content else []
    own_results = raw.get("results") or {}
    messages: list[Message] = []
    for message in rounds:
        calls = message.get("tool_calls") or []
        found = [results.get((message_id, call["id"]), own_results.get(call["id"])) for call in calls]
        if any(result is None for result in found):
            # The turn ended before its tools did. A call without its result is refused by every provider.
            if message.get("content"):
                messages.append({"role": "assistant", "content": message["content"]})
            continue
        if calls or message.get("content") or message.get("thinking_blocks"):
            messages.append(message)
        messages += tool_messages([call["id"] for call in calls], found)
    return messages


def tool_messages(ids: Iterable[str], results: Iterable[str | None]) -> list[Message]:
    pairs = zip(ids, results, strict=True)
    return [{"role": "tool", "tool_call_id": call_id, "content": result} for call_id, result in pairs]


def limited(messages: list[Message], history: History) -> list[Message]:
    """The messages that `history` lets through, with no tool round cut in two."""
    if history is None:
        return messages
    if callable(history):
        return whole_rounds(history([_copied(message) for message in messages]))
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    # The question itself, and the n turns before it.
    start = starts[-(history + 1)] if len(starts) > history else 0
    kept = {id(message) for message in messages[start:]}
    return [message for message in messages if id(message) in kept or message["role"] == "system"]


def whole_rounds(messages: list[Message]) -> list[Message]:
    """The messages less every tool call that lacks its result, and every result that lacks its call."""
    answered = {message.get("tool_call_id") for message in messages if message["role"] == "tool"}
    whole: list[Message] = []
    asked: set[str] = set()
    for message in messages:
        calls = {call["id"] for call in message.get("tool_calls") or []}
        if calls - answered or (message["role"] == "tool" and message.get("tool_call_id") not in asked):
            continue
        asked |= calls
        whole.append(message)
    return whole


def _copied(message: Message) -> Message:
    """A copy that the model's library may write into."""
    return dict(message) if len(message) == 2 else copy.deepcopy(message)


def as_json(value: Any) -> Any:
    """JSON as SQLite (text) or PostgreSQL (already read) gave it."""
    return json.loads(value) if isinstance(value, str) else value


def as_uuid(value: Any) -> UUID:
    return value if isinstance(value, UUID) else UUID(value)

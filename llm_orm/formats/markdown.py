"""A chronicle → a transcript to be read. What was said stands in fences that it cannot break out of."""

import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime, tzinfo
from decimal import Decimal
from typing import Any

from ..chronicle import Chronicle, ModelCall, ToolRun, Turn, TurnMessage
from ..values import Stats

WHO = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool"}


def as_markdown(chat: Chronicle, tz: tzinfo) -> str:
    """The whole chat, with times of the time zone."""
    return "\n".join(_chat(chat, tz)) + "\n"


def _chat(chat: Chronicle, tz: tzinfo) -> Iterator[str]:
    yield f"# Chat {chat.id}"
    yield ""
    named = {"Model": chat.model, "Provider": chat.provider, "Agent": chat.agent_class, **chat.columns}
    named |= {"Metadata": chat.metadata, "Inputs": chat.session_metadata}
    yield from (f"- {_inline(name)}: {_code(value)}" for name, value in named.items() if value is not None)
    yield f"- Begun: {_time(chat.created_at, tz)}"
    yield f"- {_sums(chat.stats)}"
    yield ""
    if chat.instructions:
        yield "## Instructions"
        yield ""
        yield from _fenced(chat.instructions)
    for turn in chat.turns:
        yield from _turn(turn, tz)
    if chat.besides:
        yield "## Calls whose question was deleted"
        yield ""
        for step in chat.besides:
            yield from _step(step, tz)


def _turn(turn: Turn, tz: tzinfo) -> Iterator[str]:
    if turn.question is not None:
        yield from _message(turn.question, tz)
    for step in turn.steps:
        yield from _step(step, tz)
    if turn.reply is not None:
        yield from _message(turn.reply, tz)
    if turn.question is not None and turn.status != "completed" and turn.question.role == "user":
        yield f"*This turn is {turn.status.replace('_', ' ')}.*"
        yield ""


def _message(message: TurnMessage, tz: tzinfo) -> Iterator[str]:
    about = [_time(message.created_at, tz)]
    about += [_code(message.model)] if message.model else []
    about += [message.status] if message.status != "completed" else []
    yield f"## {WHO.get(message.role, message.role)} ({', '.join(about)})"
    yield ""
    if message.thinking:
        yield "Thinking:"
        yield ""
        yield from _fenced(message.thinking)
    if message.text is not None:
        yield from _fenced(message.text)
    elif not message.files:
        yield "*Nothing: it was erased, or nothing has come yet.*"
        yield ""
    for file in message.files:
        name = _code(file.filename) if file.filename else "without a name"
        at = f", at {_code(file.url)}" if file.url else ""
        yield f"- File: {name} ({_code(file.media_type)}, {file.size} bytes){at}"
    if message.files:
        yield ""


def _step(step: ModelCall | ToolRun, tz: tzinfo) -> Iterator[str]:
    yield from _tool(step) if isinstance(step, ToolRun) else _call(step)


def _call(call: ModelCall) -> Iterator[str]:
    about = [f"{call.input_tokens} tokens in, {call.output_tokens} out", _dollars(call.cost)]
    about += [f"{call.duration_ms} ms"] if call.duration_ms is not None else []
    if call.id is not None:
        name = _code(call.model or "a model")
        problem = f"; failed with {_code(call.error)}, status {call.status_code}" if call.error else ""
        yield f"- Model {name}: {', '.join(about)}{problem}"
        yield ""
    if call.error_message:
        yield from _fenced(call.error_message)
    if call.is_reply:
        return
    for title, text in (("Thinking:", call.thinking), ("Said on the way:", call.text)):
        if text:
            yield title
            yield ""
            yield from _fenced(text)


def _tool(run: ToolRun) -> Iterator[str]:
    about = [run.status, *([run.approval] if run.approval else [])]
    about += [f"{run.duration_ms} ms"] if run.duration_ms is not None else []
    yield f"- Tool {_code(run.name)}: {', '.join(about)}"
    yield ""
    if run.arguments:
        yield from _fenced(run.arguments)
    if run.result is not None:
        yield "Result:"
        yield ""
        yield from _fenced(run.result)
    if run.error:
        yield "Error:"
        yield ""
        yield from _fenced(run.error)


def _fenced(text: str) -> Iterable[str]:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return (f"{fence}text", text, fence, "")


def _code(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = _inline(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * (longest + 1)
    return f"{ticks} {text} {ticks}" if longest or not text.strip() else f"{ticks}{text}{ticks}"


def _inline(text: str) -> str:
    return " ".join(text.split())


def _time(moment: datetime, tz: tzinfo) -> str:
    return moment.astimezone(tz).isoformat(" ", "seconds")


def _dollars(cost: Decimal | None) -> str:
    return "of unknown cost" if cost is None else f"${cost:f}"


def _sums(stats: Stats) -> str:
    unpriced = f", and {stats.unpriced_requests} of unknown cost" if stats.unpriced_requests else ""
    return f"Calls of models: {stats.requests}, {stats.total_tokens} tokens, ${stats.cost:f}{unpriced}"

"""`llm-orm show`: a chat as it happened."""

from collections.abc import Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .application import opened_with_its_columns, store_option
from .options import chat_named, database_options, json_option
from .output import is_terminal, print_json, printable, text

if TYPE_CHECKING:
    from llm_orm import Chronicle, ModelCall, ToolRun, Turn, TurnMessage

LINES = 6
"""How many lines are shown of what a tool was given, or gave."""

CHARACTERS = 600

THINKING = "thinking: "

STYLES = {
    "title": "bold",
    "turn": "dim",
    "user": "bold cyan",
    "assistant": "bold green",
    "system": "bold magenta",
    "tool": "yellow",
    "model": "blue",
    "thinking": "dim italic",
    "figures": "dim",
    "failed": "red",
}
"""How a line of a kind looks on a terminal."""


class Line(NamedTuple):
    text: str
    kind: str = ""
    indent: int = 0


@click.command()
@click.argument("chat")
@click.option("--last", type=click.IntRange(1), metavar="N", help="Only the last N turns.")
@click.option("--full", is_flag=True, help="All of what tools were given, and gave.")
@database_options
@store_option
@json_option
def show(chat: str, last: int | None, full: bool, as_json: bool, **database: Any) -> None:
    """Show a chat as it happened.

    CHAT is its id, or so much of the beginning that no other has it, of 6 characters at the least. Each turn with the
    calls of models and of tools, the thinking, what it cost and how long it took.
    """
    from llm_orm import chronicle

    with opened_with_its_columns(**database) as store:
        found = chronicle(store, chat_named(store, chat), last=last)
    if found is None:  # deleted at this moment
        raise click.ClickException(f"there is no chat {chat!r}")
    if as_json:
        print_json(found.as_dict())
    else:
        _print(_lines(found, full))


def _print(lines: Iterator[Line]) -> None:
    if not is_terminal():
        for line in lines:
            for part in printable(line.text).split("\n"):
                click.echo((" " * line.indent + part).rstrip())
        return
    import sys

    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    for line in lines:
        shown = Text(printable(line.text) or " ", STYLES.get(line.kind, ""))
        console.print(Padding(shown, (0, 0, 0, line.indent), expand=False))


def _lines(found: "Chronicle", full: bool) -> Iterator[Line]:
    yield Line(f"chat {found.id}", "title")
    yield from _heading(found)
    if found.turns_before:
        yield Line("")
        yield Line(f"… {_counted(found.turns_before, 'earlier turn')}", "turn")
    number = found.turns_before
    for turn in found.turns:
        number += turn.is_asked
        yield Line("")
        yield from _turn(turn, number if turn.is_asked else None, full)
    if found.besides:
        yield Line("")
        yield Line("calls of turns that are not there any longer", "turn")
        yield from _steps(found.besides, full)
    yield Line("")
    stats = found.stats
    counts = f"{_counted(stats.requests, 'request')}, {_counted(stats.tool_calls, 'tool call')}"
    yield Line(f"total: {counts} · {_figures(stats)}", "title")


def _heading(found: "Chronicle") -> Iterator[Line]:
    model = " ".join(filter(None, (found.model, found.provider and f"({found.provider})")))
    values = {"model": model, "agent": found.agent_class, "inputs": found.session_metadata, **found.columns}
    values |= {"metadata": found.metadata, "created": found.created_at, "updated": found.updated_at}
    values["instructions"] = found.instructions
    for name, value in values.items():
        if value not in (None, "", {}):
            yield Line(f"{name}: {text(value)}", "figures", 2)


def _turn(turn: "Turn", number: int | None, full: bool) -> Iterator[Line]:
    said = turn.question or turn.reply
    parts = [f"turn {number}"] if number is not None else []
    parts += [text(said.created_at)] if said else []
    yield Line(f"── {' · '.join([*parts, turn.status.replace('_', ' ')])}", "turn")
    if turn.question is not None:
        yield from _message(turn.question)
    yield from _steps(turn.steps, full)
    if turn.reply is not None:
        yield from _message(turn.reply)
    if turn.stats.requests:
        yield Line(_figures(turn.stats), "figures", 2)


def _message(said: "TurnMessage") -> Iterator[Line]:
    state = "" if said.status == "completed" else f" ({said.status})"
    yield Line(f"{said.role}{state}", said.role)
    if said.thinking:
        yield _thought(said.thinking, 2)
    if said.text is not None:
        yield Line(said.text, "", 2)
    elif not said.files and said.status == "completed":
        yield Line("(nothing is stored of what was said)", "figures", 2)
    for file in said.files:
        named = file.url or file.filename or "a file"
        size = f", {file.size:,} bytes" if file.size else ""
        yield Line(f"[{named}: {file.media_type}{size}]", "figures", 2)


def _steps(steps: Any, full: bool) -> Iterator[Line]:
    for step in steps:
        yield from _called(step) if step.kind == "model" else _ran(step, full)


def _called(call: "ModelCall") -> Iterator[Line]:
    yield Line(" · ".join(filter(None, _of_call(call))), "failed" if call.error else "model", 2)
    if call.error and call.error_message:
        yield Line(_cut(call.error_message, False), "failed", 4)
    if not call.is_reply:  # which comes below
        if call.thinking:
            yield _thought(call.thinking, 4)
        if call.text:
            yield Line(call.text, "", 4)


def _thought(thinking: str, indent: int) -> Line:
    # Without colours, only this tells it from what was said.
    return Line(THINKING + thinking.replace("\n", "\n" + " " * len(THINKING)), "thinking", indent)


def _of_call(call: "ModelCall") -> Iterator[str | None]:
    yield f"{call.model} ({call.provider})" if call.model else "a model"
    if call.id is None:
        return
    yield f"attempt {call.attempt}" if call.attempt > 1 else None
    yield f"{call.error} {call.status_code or ''}".rstrip() if call.error else None
    yield f"{call.input_tokens:,} → {call.output_tokens:,} tokens"
    yield "no price" if call.cost is None else _dollars(call.cost)
    yield _seconds(call.duration_ms)
    yield None if call.first_token_ms is None else f"first token {_seconds(call.first_token_ms)}"


def _ran(run: "ToolRun", full: bool) -> Iterator[Line]:
    waits = "waits for approval" if run.approval == "required" else run.approval
    state = None if run.status == "completed" else run.status
    yield Line(" · ".join(filter(None, (f"tool: {run.name}", state, waits, _seconds(run.duration_ms)))), "tool", 4)
    yield Line(f"→ {_cut(run.arguments, full)}", "", 6)
    if run.result is not None:
        yield Line(f"← {_cut(run.result, full)}", "failed" if run.status == "failed" else "", 6)
    if run.error and run.error != run.result:
        yield Line(f"error: {_cut(run.error, full)}", "failed", 6)


def _cut(text: str, full: bool) -> str:
    """So much of it as is shown, and how much is not."""
    if full:
        return text
    lines = text.split("\n")
    shown = "\n".join(lines[:LINES])[:CHARACTERS]
    left = len(text) - len(shown)
    return f"{shown}\n… {left:,} more characters: --full shows them" if left else shown


def _figures(stats: Any) -> str:
    unpriced = f"{stats.unpriced_requests} without a price" if stats.unpriced_requests else None
    parts = (_dollars(stats.cost), unpriced, f"{stats.total_tokens:,} tokens", _seconds(stats.duration_ms))
    return " · ".join(filter(None, parts))


def _dollars(cost: Decimal) -> str:
    return f"${text(cost)}"


def _seconds(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return f"{milliseconds} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")

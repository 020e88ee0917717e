"""How a chat is gone on with, once something has gone wrong in the middle of its turn."""

import asyncio
import traceback
from typing import Any

from llm_orm import Chat, Store, soundness
from llm_orm.recovery import recover

from .invariants import Rows, Story, violations
from .scenarios import NEXT, QUESTION, Cast

ALL = ("resume", "ask", "recover")


def survive(store: Store, cast: Cast, job: dict[str, Any]) -> list[dict[str, str]]:
    """Look at what a process left that was killed, and go on with it in one of the ways; what is wrong."""
    before, ledger = Rows.of(store, job["chat"]), cast.ledger.read()
    known: dict[str, Any] = {
        "scenario": cast.scenario,
        "before": before,
        "ledger_before": ledger,
        "is_committed": job["committed"],
        "deaths": 1,
    }
    at_rest = Story(rows=before, ledger=ledger, findings=findings_of(store, job["chat"]), **known)
    found = [{**each, "when": "at rest"} for each in violations(at_rest)]
    return found + gone_on(store, cast, job, **known)


def gone_on(store: Store, cast: Cast, job: dict[str, Any], **known: Any) -> list[dict[str, str]]:
    """Go on, and say what is wrong afterwards."""
    continuation, resumed = job["continuation"], []
    try:
        chat = cast.load(store, job["key"])
        go_on(store, chat, continuation, known["before"], resumed, cast.scenario.key)
    except Exception:
        problem = traceback.format_exc().strip().splitlines()
        return [{"promise": "the chat can be gone on with", "detail": " | ".join(problem[-3:]), "when": "after"}]
    story = Story(
        rows=Rows.of(store, job["chat"]),
        ledger=cast.ledger.read(),
        continuation=continuation,
        resumed=resumed,
        findings=findings_of(store, job["chat"]),
        **known,
    )
    return [{**each, "when": "after"} for each in violations(story)]


def findings_of(store: Store, chat_id: str) -> list[str]:
    return [f"{each.kind}: {each.detail}" for each in soundness.check(store, chat_id=chat_id)]


def go_on(
    store: Store, chat: Chat, continuation: str, before: Rows, resumed: list[dict[str, Any]], key: str | None
) -> None:
    if continuation == "resume":
        resume(chat, bool(before.pending), resumed)
    elif continuation == "recover":
        recover(store, older_than=0, chat_id=chat.chat_id)
    if continuation != "resume" and any(message["parked_at"] is not None for message in before.pending):
        chat.cancel()  # a turn that waits for a person is not dead: it is ended by hand
    if key is not None:  # whoever does not know whether it was answered sends it again
        message = _reply(chat, "ask", QUESTION, key=key)
        resumed.append({"status": message.status, "content": message.content})
    _reply(chat, "ask", NEXT)


def resume(chat: Chat, is_pending: bool, resumed: list[dict[str, Any]]) -> None:
    while is_pending:
        for call in chat.pending_approvals():
            chat.approve(call)
        message = _reply(chat, "resume")
        resumed.append({"status": message.status, "content": message.content})
        is_pending = message.status == "pending"


def _reply(chat: Chat, method: str, *arguments: Any, **options: Any) -> Any:
    """By the method, or where a tool is async by its twin."""
    if chat.options.toolbox.async_tools():
        return asyncio.run(getattr(chat, f"a{method}")(*arguments, **options))
    return getattr(chat, method)(*arguments, **options)

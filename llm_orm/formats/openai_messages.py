"""A chat as OpenAI's API and fine-tuning write it, {"messages": […]} ↔ the rows of a chat.

A reply with its tool calls, their results and the last word is one row of ours, so that the transcript shows the same
messages again.
"""

import base64
import binascii
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid5

from ..attachments import attachments_of
from ..checks import as_key
from ..errors import InvalidFile
from ..records import now
from ..values import Attachment, Message
from .interchange import NAMESPACE, Bad, Incoming, IncomingRow, Row

ROLES = ("system", "developer", "user", "assistant", "tool")


def chat_of_messages(line: dict[str, Any], where: str) -> Incoming:
    """The chat of a line; raises `Bad`."""
    messages = line.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Bad(where, 'it has no "messages": a list of objects')
    named = line.get("id")
    if named is not None and (isinstance(named, bool) or not isinstance(named, str | int)):
        raise Bad(where, f"its id is {str(named)[:60]!r}: it must be a text or a number")
    said = json.dumps(messages, sort_keys=True) if named is None else f"id:{named}"
    key = as_key(named) if isinstance(named, str) else None
    chat = _Chat(where, key or uuid5(NAMESPACE, f"openai:{said}"))
    for number, message in enumerate(messages):
        chat.add(number, message)
    chat.close()
    metadata = line.get("metadata") if isinstance(line.get("metadata"), dict) else {}
    metadata = {**(metadata or {}), **({"source_id": named} if named is not None and key is None else {})}
    model = line.get("model") if isinstance(line.get("model"), str) else None
    head = {"id": chat.id, "model": model, "instructions": chat.instructions, "metadata": metadata or None}
    head |= {"created_at": chat.time, "updated_at": chat.time}
    rows = [IncomingRow(where, "chat", head), *chat.rows()]
    return Incoming(where, chat.id, lambda: rows)


@dataclass
class _Answer:
    """A row of the assistant in the making."""

    id: UUID
    rounds: list[Message] = field(default_factory=list)
    calls: dict[str, Row] = field(default_factory=dict)

    @property
    def is_asking(self) -> bool:
        return bool(self.rounds[-1].get("tool_calls"))


class _Chat:
    def __init__(self, where: str, chat_id: UUID):
        self.where, self.id, self.time = where, chat_id, now()
        self.instructions: str | None = None
        self.messages: list[Row] = []
        self.files: list[Row] = []
        self.calls: list[Row] = []
        self.turn_id: UUID | None = None
        self.answer: _Answer | None = None

    def rows(self) -> Iterator[IncomingRow]:
        for table, rows in (("message", self.messages), ("attachment", self.files), ("tool_call", self.calls)):
            for row in rows:
                yield IncomingRow(self.where, table, row)

    def add(self, number: int, message: dict[str, Any]) -> None:
        role, where = message.get("role"), f"{self.where}, message {number}"
        if role not in ROLES:
            raise Bad(where, f"its role is {str(role)[:60]!r}: it is one of {', '.join(ROLES)}")
        if role == "assistant":
            self._add_round(where, message)
        elif role == "tool":
            self._add_result(where, message)
        else:
            self.close()
            text, files = _parts(where, message.get("content"))
            if role != "user":
                if files:
                    raise Bad(where, f"it is of the role {role!r}, and has files: only those of the user have")
                self._add_system(where, number, text)
            elif not text and not files:
                raise Bad(where, "the user says nothing in it")
            else:
                self.turn_id = self._add_message("user", text, {"attachments": len(files)} if files else None)
                self._add_files(files)

    def _add_system(self, where: str, number: int, text: str) -> None:
        if number == 0:
            self.instructions = text or None
        elif text:
            self._add_message("system", text, None)

    def _add_message(
        self, role: str, text: str | None, raw: Any, *, status: str = "completed", message_id: UUID | None = None
    ) -> UUID:
        position = len(self.messages)
        row: Row = {"id": message_id or self._made("message", position), "chat_id": self.id, "position": position}
        row |= {"role": role, "status": status, "content": text or None, "content_raw": raw}
        self.messages.append({**row, "created_at": self.time, "updated_at": self.time})
        return row["id"]

    def _add_files(self, files: list[Attachment]) -> None:
        names = ("media_type", "filename", "size", "sha256", "content", "url")
        for position, file in enumerate(files):
            row: Row = {"id": self._made("attachment", len(self.files)), "message_id": self.turn_id}
            row["position"] = position
            self.files.append(row | {name: getattr(file, name) for name in names})

    def _add_round(self, where: str, message: dict[str, Any]) -> None:
        if message.get("function_call"):
            raise Bad(where, "it has a function_call, of before there were tools: write tool_calls")
        text, files = _parts(where, message.get("content"))
        if files:
            raise Bad(where, "the assistant's message has files, which cannot be shown again")
        calls = [_call(where, call) for call in message.get("tool_calls") or ()]
        if not text and not calls:
            return
        said: Message = {"role": "assistant", "content": text or None}
        said |= {"name": message["name"]} if isinstance(message.get("name"), str) else {}
        said |= {"tool_calls": calls} if calls else {}
        answer = self.answer
        if answer is None or any(call["id"] in answer.calls for call in calls):
            self.close()
            answer = self.answer = _Answer(self._made("message", len(self.messages)))
        answer.rounds.append(said)
        for position, call in enumerate(calls):
            self._add_call(where, answer, position, call)
        if not calls:
            self.close()

    def _add_call(self, where: str, answer: _Answer, position: int, call: dict[str, Any]) -> None:
        if self.turn_id is None:
            raise Bad(where, "it calls tools before the user has said anything")
        if call["id"] in answer.calls:
            raise Bad(where, f"two of its tool calls have the id {call['id']!r}")
        row: Row = {"id": self._made("tool_call", len(self.calls) + len(answer.calls)), "chat_id": self.id}
        row |= {"message_id": answer.id, "turn_id": self.turn_id, "round": len(answer.rounds) - 1}
        row |= {"position": position, "tool_call_id": call["id"], "name": call["function"]["name"]}
        row |= {"arguments": call["function"]["arguments"], "result": None, "status": "completed", "error": None}
        answer.calls[call["id"]] = row | {"created_at": self.time, "finished_at": self.time}

    def _add_result(self, where: str, message: dict[str, Any]) -> None:
        call_id, answer = message.get("tool_call_id"), self.answer
        call = answer.calls.get(call_id) if answer is not None and isinstance(call_id, str) else None
        if call is None or call["result"] is not None:
            raise Bad(where, f"it is the result of {str(call_id)[:60]!r}, which no message right before it calls")
        text, files = _parts(where, message.get("content"))
        if files:
            raise Bad(where, "the result of a tool has files: it can only be text")
        call["result"] = text

    def close(self) -> None:
        """Write down the reply so far."""
        answer, self.answer = self.answer, None
        if answer is None:
            return
        is_plain = len(answer.rounds) == 1 and set(answer.rounds[0]) == {"role", "content"}
        raw = None if is_plain else {"rounds": answer.rounds}
        status = "incomplete" if answer.is_asking else "completed"
        self._add_message("assistant", answer.rounds[-1]["content"], raw, status=status, message_id=answer.id)
        for call in answer.calls.values():
            if call["result"] is None:
                call |= {"status": "failed", "error": "interrupted"}
            self.calls.append(call)

    def _made(self, table: str, number: int) -> UUID:
        return uuid5(self.id, f"{table}:{number}")


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(call.get("id"), str):
        raise Bad(where, 'a tool call is like {"id": "call_1", "type": "function", "function": {…}}')
    name, arguments = function.get("name"), function.get("arguments", "")
    arguments = json.dumps(arguments) if isinstance(arguments, dict) else arguments
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise Bad(where, 'the function of a tool call is like {"name": "search", "arguments": "{…}"}')
    return {"id": call["id"], "type": "function", "function": {"name": name, "arguments": arguments}}


def _parts(where: str, content: Any) -> tuple[str, list[Attachment]]:
    """The text of a message, and its files."""
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Bad(where, "its content is neither a text nor a list of parts")
    texts: list[str] = []
    files: list[Attachment] = []
    for part in content:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            continue
        try:
            files += _file(where, part)
        except (InvalidFile, binascii.Error) as error:
            raise Bad(where, str(error)) from error
    return "\n\n".join(texts), files


def _file(where: str, part: dict[str, Any]) -> tuple[Attachment, ...]:
    kind = part.get("type")
    given = part.get(kind) if isinstance(kind, str) else None
    given = {"url": given} if isinstance(given, str) else given
    if isinstance(given, dict):
        if kind == "image_url" and isinstance(given.get("url"), str):
            return _picture(given["url"])
        if kind == "input_audio" and isinstance(given.get("data"), str):
            return attachments_of((f"audio.{given.get('format')}", base64.b64decode(given["data"])))
        if kind == "file" and isinstance(given.get("file_data"), str):
            return attachments_of(Attachment("", given.get("filename"), url=given["file_data"]))
        if kind == "file" and str(given.get("file_id")).startswith(("http://", "https://")):
            return attachments_of(Attachment("application/pdf", url=given["file_id"]))
    raise Bad(where, f"a part of it, of the type {str(kind)[:60]!r}, is none that can be kept")


def _picture(url: str) -> tuple[Attachment, ...]:
    try:
        return attachments_of(url)
    except InvalidFile:
        if url.startswith("data:"):
            raise
        # That it is a picture is said; of which kind, only a provider who fetches it will see.
        return attachments_of(Attachment("image/jpeg", url=url))


# Rows of a chat → its line


def complete_turns(rows: Sequence[Row]) -> list[Row]:
    """The messages of the turns that were answered: what the user said last, with the replies that are complete.

    What was said before any question, and what the application said, stay.
    """
    kept: list[Row] = []
    turn: list[Row] = []
    for row in [*rows, None]:
        begins = row is None or (row["role"] == "user" and any(each["role"] == "assistant" for each in turn))
        if begins:
            kept += _complete(turn)
            turn = []
        if row is not None:
            turn.append(row)
    return kept


def _complete(turn: list[Row]) -> list[Row]:
    said = [row for row in turn if row["status"] == "completed" and not _is_erased(row)]
    is_asked = any(row["role"] == "user" for row in turn)
    is_answered = any(row["role"] == "assistant" for row in said) and any(row["role"] == "user" for row in said)
    return said if is_answered or not is_asked else [row for row in said if row["role"] == "system"]


def _is_erased(row: Row) -> bool:
    return row["content"] is None and row["content_raw"] is None


_FINE_TUNING = {
    "assistant": ("role", "content", "name", "tool_calls"),
    "tool": ("role", "tool_call_id", "content"),
}


def for_fine_tuning(message: Message) -> Message:
    """A message as the transcript shows it, with what fine-tuning takes of it alone."""
    names = _FINE_TUNING.get(message["role"], ("role", "content", "name"))
    plain = {name: message[name] for name in names if name in message}
    if plain.get("tool_calls"):
        plain["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": _function(call)} for call in plain["tool_calls"]
        ]
    else:
        plain.pop("tool_calls", None)
    return plain


def _function(call: Any) -> dict[str, Any]:
    function = call.get("function") or {}
    return {name: function.get(name) or "" for name in ("name", "arguments")}

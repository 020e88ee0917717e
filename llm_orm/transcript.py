"""Rows → the messages a model is shown."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from .attachments import message_content, with_files_made, without_images
from .errors import InvalidValue
from .values import Attachment, Message, as_json, as_uuid

History = int | Callable[[list[Message]], list[Message]] | None
"""What of the earlier messages is sent: the last n turns, what a function leaves of them, or all."""


class Transcript:
    """The messages of one chat, kept between turns and brought up to date from the rows behind `position`."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, str | None, list[Message]]] = []

    @property
    def position(self) -> int:
        """The position of the last row that is in here, -1 where there is none."""
        return self._rows[-1][0] if self._rows else -1

    def rewind(self, position: int) -> None:
        """Forget the rows from a position on."""
        while self.position >= position:
            self._rows.pop()

    def add(
        self,
        rows: Sequence[tuple],
        results: Callable[[list[UUID]], Mapping[tuple[UUID, str], str]],
        attachments: Callable[[list[UUID]], Mapping[UUID, list[Attachment]]] = lambda message_ids: {},
    ) -> None:
        """Add rows (id, position, role, status, content, content_raw, provider), in order; pending ones wait.

        They replace what was known from their first position on.

        results        looks up the results of tool calls, by (message id, tool call id)
        attachments    looks up the files of messages
        """
        self.rewind(rows[0][1])
        settled = [
            (as_uuid(row_id), position, role, content, as_json(raw), provider)
            for row_id, position, role, _, content, raw, provider in itertools.takewhile(_is_settled, rows)
        ]
        with_tools = [row_id for row_id, _, role, _, raw, _ in settled if raw and role == "assistant"]
        known = results(with_tools) if with_tools else {}
        with_files = [row_id for row_id, _, _, _, raw, _ in settled if isinstance(raw, dict) and raw.get("attachments")]
        files = attachments(with_files) if with_files else {}
        for row_id, position, role, content, raw, provider in settled:
            own = files.get(row_id, [])
            if role == "assistant":
                messages = assistant_messages(row_id, content, raw, known, own)
            elif content is None and not own:
                messages = []
            else:
                messages = [{"role": role, "content": message_content(content or "", own)}]
            self._rows.append((position, provider, messages))

    def shown(self, instructions: str | None, history: History = None, provider: str | None = None) -> list[Message]:
        """The messages for a call: fresh copies, the instructions first, the last user message always in.

        provider    who is called: what another provider wrote is shown without that provider's own fields
        """
        everything = self._as_shown_to(provider)
        # The last one is the question.
        chosen = [*limited(everything[:-1], history), *everything[-1:]]
        messages = [copied(message) for message in chosen]
        return [{"role": "system", "content": instructions}, *messages] if instructions else messages

    def asked(
        self,
        instructions: str | None,
        history: History,
        text: str,
        files: Sequence[Attachment] = (),
        provider: str | None = None,
    ) -> list[Message]:
        """What `shown` would be once this was said."""
        everything = self._as_shown_to(provider)
        system = [{"role": "system", "content": instructions}] if instructions else []
        question = [{"role": "user", "content": message_content(text, files)}] if text or files else []
        return [*system, *limited(everything, history), *question]

    def _as_shown_to(self, provider: str | None) -> list[Message]:
        everything: list[Message] = []
        for _, writer, messages in self._rows:
            if len(messages) == 1 and len(messages[0]) == 2:  # a role and a text are the same to everybody
                everything.append(messages[0])
            else:
                everything += [as_shown_to(provider, writer, message) for message in messages]
        return everything


def _is_settled(row: tuple) -> bool:
    return row[3] != "pending"


def assistant_messages(
    message_id: UUID,
    content: str | None,
    raw: Any,
    results: Mapping[tuple[UUID, str], str],
    files: Sequence[Attachment] = (),
) -> list[Message]:
    """What an assistant row stands for: its rounds with their tool results, or its text; never an empty message."""
    rounds = raw.get("rounds") if isinstance(raw, dict) else None
    if not rounds:
        return [{"role": "assistant", "content": content}] if content else []
    own_results = raw.get("results") or {}
    messages: list[Message] = []
    for message, made in zip(rounds, files_of_rounds(rounds, files), strict=True):
        message = with_files_made(message, made)
        calls = message.get("tool_calls") or []
        found = [results.get((message_id, call["id"]), own_results.get(call["id"])) for call in calls]
        if any(result is None for result in found):
            # The turn ended before its tools did. A call without its result is refused by every provider.
            if message.get("content"):
                messages.append({"role": "assistant", "content": message["content"]})
            continue
        if calls or message.get("content") or message.get("images"):
            messages.append(message)
        messages += tool_messages([call["id"] for call in calls], found)
    return messages


def files_of_rounds(rounds: Sequence[Message], files: Sequence[Attachment]) -> list[list[Attachment]]:
    """The files that the model made, by the round that it made them in."""
    left = iter(files)
    return [list(itertools.islice(left, message.get("attachments") or 0)) for message in rounds]


def tool_messages(ids: Iterable[str], results: Iterable[str | None]) -> list[Message]:
    pairs = zip(ids, results, strict=True)
    return [{"role": "tool", "tool_call_id": call_id, "content": result} for call_id, result in pairs]


def limited(messages: list[Message], history: History) -> list[Message]:
    """The earlier messages that `history` lets through, with no tool round cut in two."""
    if history is None:
        return messages
    if callable(history):
        chosen = history([copied(message) for message in messages])
        if not isinstance(chosen, Sequence) or not all(isinstance(each, Mapping) and "role" in each for each in chosen):
            raise InvalidValue(f"the history function must return a list of messages, not {str(chosen)[:80]!r}")
        return whole_rounds([*chosen])
    start, left = len(messages), history
    while start and left:
        start -= 1
        left -= messages[start]["role"] == "user"
    return [message for message in messages[:start] if message["role"] == "system"] + messages[start:]


def whole_rounds(messages: list[Message]) -> list[Message]:
    """The messages less every tool call whose results are not right behind it, and every result without its call."""
    whole: list[Message] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            continue
        results = list(itertools.takewhile(lambda following: following["role"] == "tool", messages[index + 1 :]))
        calls = {call["id"] for call in message.get("tool_calls") or []}
        if calls == {result["tool_call_id"] for result in results}:
            whole += [message, *results]
        elif not calls:
            whole.append(message)
    return whole


PROVIDER_FIELDS = ("thinking_blocks", "reasoning_content", "provider_specific_fields", "images")
"""Thinking and its signatures, and pictures of its own: no provider accepts another's."""


def as_shown_to(provider: str | None, writer: str | None, message: Message) -> Message:
    """The message as the provider takes it: of what another wrote, without that one's own fields."""
    if "written_by" in message:  # a round of a turn that another provider went on with
        message, writer = {**message}, message["written_by"]
        del message["written_by"]
    return message if not provider or not writer or writer == provider else _without_provider_fields(message)


def _without_provider_fields(message: Message) -> Message:
    if not message.get("tool_calls") and not any(name in message for name in PROVIDER_FIELDS):
        return message
    plain = {name: value for name, value in without_images(message).items() if name not in PROVIDER_FIELDS}
    if message.get("tool_calls"):
        plain["tool_calls"] = [
            {name: value for name, value in call.items() if name not in PROVIDER_FIELDS}
            for call in message["tool_calls"]
        ]
    return plain


def copied(message: Message) -> Message:
    """A copy that the model's library may write into."""
    is_plain = len(message) == 2 and not isinstance(message["content"], list)
    return dict(message) if is_plain else json_copied(message)


def json_copied(value: Any) -> Any:
    """As `copy.deepcopy`, of dicts and lists alone: several times faster, and it takes a client along as it is."""
    if isinstance(value, dict):
        return {name: json_copied(item) for name, item in value.items()}
    return [json_copied(item) for item in value] if isinstance(value, list) else value

"""What has come of a model's reply: litellm's responses and stream parts → a `Reply`."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any

import pydantic_core

from .attachments import MadeFiles
from .values import MOST_TOKENS, Chunk, Message, Reply, ToolCall, Usage, storable

REPEATED_FIELDS = ("thinking_blocks", "reasoning_content", "stop_reason", "compaction_start", "compaction_delta")
"""What litellm says twice: elsewhere in the reply, and among the provider's own fields."""


class Received:
    """What has come of a reply so far: the parts of a stream, put together as they would have come in one piece."""

    def __init__(self, taken_call_ids: frozenset[str] = frozenset(), tools: Iterable[Mapping[str, Any]] = ()):
        self.taken_call_ids = taken_call_ids
        self.tools = tools
        """What the model was told of the tools that it may call."""
        self.content: list[str] = []
        self.thinking: list[str] = []
        self.blocks: list[dict[str, Any]] = []
        """Of thinking, whose text is a list of pieces; and others, as they came."""
        self.calls: list[dict[str, Any]] = []
        """{"id", "name", "arguments": pieces, "fields"} in the order in which they began."""
        self._latest: dict[Any, dict[str, Any]] = {}
        """The last call of each index, and under None the last of all."""
        self.fields: dict[str, Any] = {}
        self.refusal: list[str] = []
        self.made = MadeFiles()
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.cost: Decimal | None = None
        self.request_id: str | None = None
        self.answered_by: tuple[str | None, str | None] = (None, None)
        """(model, provider), as a router says which of its models it took."""

    def take(self, response: Any) -> None:
        """A whole response; one without choices says nothing, as a stream without them."""
        self._take_envelope(response)
        self._take_headers(response)
        for choice in (getattr(response, "choices", None) or [])[:1]:
            self.finish_reason = getattr(choice, "finish_reason", None)
            self._add_delta(getattr(choice, "message", None), is_whole=True)

    def finish(self, stream: Any) -> None:
        """The end of a stream: what only the stream itself can tell."""
        self._take_headers(stream)
        parts = getattr(stream, "chunks", None)
        if parts is None:
            return
        # litellm counts tokens itself where a provider sends no usage, and does not say so.
        said = [usage for part in parts if (usage := getattr(part, "usage", None)) is not None]
        # Nor does it say that a cost is its own; only what came over the wire was the provider's.
        self.cost = _reported_cost(said[-1]) if said else None
        if not said and self.usage is not None:
            self.usage = replace(self.usage, estimated=True)
        elif said and self.usage is None:
            self.usage = parse_usage(said[-1])  # the stream was cut short: so far, and no further

    def add(self, part: Any) -> tuple[list[Chunk], bool]:
        """A part of a stream: what there is to show of it, and whether the model has said anything in it."""
        self._take_envelope(part)
        choices = getattr(part, "choices", None)
        if not choices:
            return [], False
        self.finish_reason = getattr(choices[0], "finish_reason", None) or self.finish_reason
        content, thinking, had_calls = self._add_delta(getattr(choices[0], "delta", None))
        chunks = [Chunk(thinking=thinking)] if thinking else []
        if content:
            chunks.append(Chunk(content=content))
        return chunks, bool(chunks) or had_calls

    def _take_envelope(self, response: Any) -> None:
        usage = getattr(response, "usage", None)
        if usage is not None:
            # Cumulative where a provider sends it more than once: the last one counts, never the sum.
            self.usage = parse_usage(usage)
            self.cost = _reported_cost(usage)
        self.request_id = self.request_id or getattr(response, "id", None)
        hidden = getattr(response, "_hidden_params", None) or {}
        self.answered_by = (
            hidden.get("litellm_model_name") or self.answered_by[0] or getattr(response, "model", None),
            hidden.get("custom_llm_provider") or self.answered_by[1],
        )

    def _take_headers(self, response: Any) -> None:
        headers = (getattr(response, "_hidden_params", None) or {}).get("additional_headers") or {}
        for name in ("llm_provider-x-request-id", "llm_provider-request-id"):
            if headers.get(name):
                self.request_id = headers[name]
                return

    def _add_delta(self, delta: Any, *, is_whole: bool = False) -> tuple[str, str, bool]:
        content = _text_of(getattr(delta, "content", None))
        thinking = _text_of(getattr(delta, "reasoning_content", None))
        if content:
            self.content.append(content)
        if thinking:
            self.thinking.append(thinking)
        for block in getattr(delta, "thinking_blocks", None) or ():
            self._add_block(block)
        calls = getattr(delta, "tool_calls", None) or ()
        for call in calls:
            self._add_call(call, is_whole)
        self._add_fields(getattr(delta, "provider_specific_fields", None) or {})
        refusal = getattr(delta, "refusal", None)  # some versions of litellm have it among the provider's own fields
        if refusal:
            self.refusal.append(_text_of(refusal))
        return content, thinking, self.made.add(delta) or bool(calls)

    def _add_fields(self, fields: Mapping[str, Any]) -> None:
        """The provider's own fields. A compaction's summary comes in one part; the block that opens it is empty."""
        blocks, summary = fields.get("compaction_blocks"), fields.get("compaction_delta")
        filled = [block for block in blocks or () if block.get("content")]
        if summary and not filled:
            filled = [{**summary, "type": "compaction"}]
        if filled:
            _merge(self.fields, "compaction_blocks", filled)
        for name, value in fields.items():
            if name not in (*REPEATED_FIELDS, "compaction_blocks"):
                _merge(self.fields, name, value)

    def _add_block(self, block: Any) -> None:
        # Where a block stands among those of a stream is no part of it: a whole reply does not say it.
        block = {name: value for name, value in dict(block).items() if name != "index"}
        last = self.blocks[-1] if self.blocks else None
        if last and block.get("type") == last.get("type") == "thinking" and not last.get("signature"):
            last["thinking"].append(_text_of(block.get("thinking")))
            last["signature"] = block.get("signature")
            return
        if block.get("type") == "thinking":
            block["thinking"] = [_text_of(block.get("thinking"))]
        self.blocks.append(block)

    def _add_call(self, call: Any, is_whole: bool) -> None:
        function = _field(call, "function")
        name, arguments = _text_of(_field(function, "name")), _text_of(_field(function, "arguments"))
        call_id, index = _text_of(_field(call, "id")), _field(call, "index")
        index = index if isinstance(index, int) else None
        known = self._latest.get(index)
        if is_whole or known is None or _begins_another(known, call_id, name):
            known = {"id": "", "name": "", "arguments": []}
            self.calls.append(known)
        self._latest |= {index: known, None: known}
        known["id"] = known["id"] or call_id
        known["name"] = known["name"] or name
        known["arguments"].append(arguments)
        for own, value in (_field(call, "provider_specific_fields") or {}).items():
            _merge(known.setdefault("fields", {}), own, value)

    @property
    def has_output(self) -> bool:
        return bool(self.content or self.thinking or self.calls or self.made.images or self.made.sound)

    def everything_written(self) -> str:
        arguments = (piece for call in self.calls for piece in (call["name"], *call["arguments"]))
        return "".join([*self.thinking, *self.content, *arguments])

    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls, each with an id that no other call of the turn has."""
        taken, numbers = set(self.taken_call_ids), Counter()
        calls = []
        for call in self.calls:
            call_id = _fresh_id(storable(call["id"]), taken, numbers)
            taken.add(call_id)
            signature = _storable_or_none(call.get("fields", {}).get("thought_signature"))
            arguments = storable("".join(call["arguments"]))
            calls.append(ToolCall(call_id, storable(call["name"]), arguments, signature))
        return tuple(calls)

    def reply(self, model: str, provider: str, usage: Usage, cost: Decimal | None) -> Reply:
        signatures = [block["signature"] for block in self.blocks if block.get("signature")]
        calls, made = self.tool_calls(), self.made.attachments()
        # Some providers end a reply with "stop" whatever is in it; litellm corrects that, of a stream not always.
        finish_reason = "tool_calls" if calls and self.finish_reason == "stop" else self.finish_reason
        return Reply(
            content=storable(self._text()) or None,
            thinking=storable("".join(self.thinking)) or None,
            thinking_signature=_storable_or_none(signatures[-1]) if signatures else None,
            tool_calls=calls,
            message=_storable_throughout(self._message(calls, len(made))),
            usage=usage,
            cost=cost,
            finish_reason=_storable_or_none(finish_reason),
            model=storable(_text_of(model)),
            provider=storable(_text_of(provider)),
            provider_request_id=_storable_or_none(self.request_id),
            attachments=tuple(made),
        )

    def so_far(self) -> tuple[str, str]:
        """(text, thinking)"""
        return storable(self._text()), storable("".join(self.thinking))

    def _text(self) -> str:
        """What the model said: written, or spoken."""
        return "".join(self.content) or self.made.transcript

    def _message(self, calls: tuple[ToolCall, ...], files: int) -> Message:
        """The assistant message as litellm wants it back, and how many files were made."""
        message: Message = {"role": "assistant", "content": self._text() or None}
        blocks = [
            {**block, "thinking": "".join(block["thinking"])} if block.get("type") == "thinking" else block
            for block in self.blocks
        ]
        signed = [block for block in blocks if block.get("type") != "thinking" or block.get("signature")]
        if signed:
            message["thinking_blocks"] = signed
        elif self.thinking:
            message["reasoning_content"] = "".join(self.thinking)
        if calls:
            message["tool_calls"] = [
                self._render_tool_call(call, known.get("fields")) for call, known in zip(calls, self.calls, strict=True)
            ]
        refusal = "".join(self.refusal)
        if self.fields or refusal:
            message["provider_specific_fields"] = {**self.fields, "refusal": refusal} if refusal else self.fields
        if files:
            message["attachments"] = files
        return message

    def _render_tool_call(self, call: ToolCall, fields: Mapping[str, Any] | None) -> dict[str, Any]:
        """The call as every provider takes it back. What the model really wrote is in the call's own row."""
        name, arguments = call.name, call.arguments
        if not _NAME.fullmatch(name) and all(tool["function"]["name"] != name for tool in self.tools):
            name = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64] or "unnamed"
        if not _is_object(arguments):
            arguments = json.dumps({"invalid": arguments}) if arguments.strip() else "{}"
        rendered: dict[str, Any] = {
            "id": call.id,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        if fields:
            rendered["provider_specific_fields"] = dict(fields)
        return rendered


_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""The names of tools that every provider takes."""


def _begins_another(known: Mapping[str, Any], call_id: str, name: str) -> bool:
    """Whether a piece begins a call of its own behind the one that is known, whatever its index."""
    if call_id and known["id"]:
        return call_id != known["id"]
    # Some providers give no ids, and the same index to all: each comes in one piece.
    return bool(name and known["name"] and not call_id) and _is_object("".join(known["arguments"]))


def _is_object(arguments: str) -> bool:
    """Whether they are what arguments must be, and any library can read and write: an object, nothing too large."""
    try:
        read = pydantic_core.from_json(arguments, allow_inf_nan=False)
        json.dumps(read, allow_nan=False)
    except (ValueError, TypeError):
        return False
    return isinstance(read, dict)


def _text_of(content: Any) -> str:
    """The text of a message, which some providers send in parts; JSON of what is no text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        return "".join(_text_of(part.get("text")) for part in content)
    return "" if content is None else json.dumps(_storable_throughout(content), ensure_ascii=False)


def _storable_or_none(value: Any) -> str | None:
    return None if value is None else storable(_text_of(value))


def _storable_throughout(value: Any) -> Any:
    """The value as JSON that any database takes: what JSON has no word for is text."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, Mapping):
        return {storable(str(name)): _storable_throughout(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_storable_throughout(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return value if abs(value) < 1 << 63 else hex(value)
    if value is None:
        return None
    return _storable_throughout(pydantic_core.to_jsonable_python(value, fallback=str, bytes_mode="base64"))


MOST_DOLLARS = Decimal(10) ** 6
"""What no call costs."""


def _reported_cost(usage: Any) -> Decimal | None:
    """What the provider says it charged: a number, or a mapping with its total; None where that makes no sense."""
    cost = getattr(usage, "cost", None)
    cost = cost.get("total_cost") if isinstance(cost, Mapping) else cost
    try:
        dollars = Decimal(str(cost))
    except InvalidOperation:
        return None
    return dollars if dollars.is_finite() and 0 <= dollars < MOST_DOLLARS else None


def parse_usage(usage: Any) -> Usage | None:
    """litellm's usage object, whose `prompt_tokens` include what the provider's cache held; None where it is empty."""
    prompt = _field(usage, "prompt_tokens_details")
    completion = _field(usage, "completion_tokens_details")

    def count(owner: Any, name: str) -> int:
        return _count_of(_field(owner, name))

    if not count(usage, "prompt_tokens") and not count(usage, "completion_tokens"):
        return None
    said = (_field(usage, "prompt_tokens"), _field(usage, "completion_tokens"))
    return Usage(
        input_tokens=count(usage, "prompt_tokens"),
        output_tokens=count(usage, "completion_tokens"),
        cached_tokens=count(prompt, "cached_tokens") or count(usage, "cache_read_input_tokens"),
        cache_write_tokens=count(prompt, "cache_creation_tokens") or count(usage, "cache_creation_input_tokens"),
        thinking_tokens=count(completion, "reasoning_tokens"),
        estimated=any(figure != 0 and not _count_of(figure) for figure in said),
    )


def _count_of(value: Any) -> int:
    """A number of tokens; 0 for what can be none, as if the provider had not said it."""
    try:
        counted = int(value) if isinstance(value, int | float | str) else 0
    except (ValueError, OverflowError):
        return 0
    return counted if 0 < counted <= MOST_TOKENS else 0


def _fresh_id(wanted: str, taken: set[str], numbers: Counter[str]) -> str:
    if wanted and wanted not in taken:
        return wanted
    stem = wanted or "call"
    numbers[stem] += 1
    while f"{stem}_{numbers[stem] + 1}" in taken:
        numbers[stem] += 1
    return f"{stem}_{numbers[stem] + 1}"


def _field(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)


def _merge(into: dict[str, Any], name: str, value: Any) -> None:
    """Add a piece of a provider's own field: lists grow, what is said again replaces what was said before."""
    known = into.get(name)
    if isinstance(value, list) and isinstance(known, list):
        # Some lists come in pieces, some from their beginning each time.
        known += value[len(known) :] if value[: len(known)] == known else value
    elif value is not None:
        into[name] = [*value] if isinstance(value, list) else value

"""What has come of a model's reply: litellm's responses and stream parts → a `Reply`."""

from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any

from .attachments import MadeFiles
from .values import Chunk, Message, Reply, ToolCall, Usage, storable

REPEATED_FIELDS = ("thinking_blocks", "reasoning_content", "stop_reason", "compaction_start", "compaction_delta")
"""What litellm says twice: elsewhere in the reply, and among the provider's own fields."""


class Received:
    """What has come of a reply so far: the parts of a stream, put together as they would have come in one piece."""

    def __init__(self, taken_call_ids: frozenset[str] = frozenset()):
        self.taken_call_ids = taken_call_ids
        self.content: list[str] = []
        self.thinking: list[str] = []
        self.blocks: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []
        self.fields: dict[str, Any] = {}
        self.made = MadeFiles()
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.cost: Decimal | None = None
        self.request_id: str | None = None
        self.answered_by: tuple[str | None, str | None] = (None, None)
        """(model, provider), as a router says which of its models it took."""

    def take(self, response: Any) -> None:
        """A whole response."""
        self._take_envelope(response)
        self._take_headers(response)
        choice = response.choices[0]
        self.finish_reason = getattr(choice, "finish_reason", None)
        self._add_delta(choice.message)

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
        content, thinking, had_calls = self._add_delta(choices[0].delta)
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

    def _add_delta(self, delta: Any) -> tuple[str, str, bool]:
        content = _text_of(getattr(delta, "content", None))
        thinking = getattr(delta, "reasoning_content", None) or ""
        if content:
            self.content.append(content)
        if thinking:
            self.thinking.append(thinking)
        for block in getattr(delta, "thinking_blocks", None) or ():
            self._add_block(block)
        calls = getattr(delta, "tool_calls", None) or ()
        for call in calls:
            self._add_call(call)
        self._add_fields(getattr(delta, "provider_specific_fields", None) or {})
        refusal = getattr(delta, "refusal", None)  # some versions of litellm have it among the provider's own fields
        if refusal:
            self.fields["refusal"] = self.fields.get("refusal", "") + refusal
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
            last["thinking"] = (last.get("thinking") or "") + (block.get("thinking") or "")
            last["signature"] = block.get("signature")
        else:
            self.blocks.append(block)

    def _add_call(self, call: Any) -> None:
        known = self._slot(getattr(call, "index", None), getattr(call, "id", None))
        known["name"] = known["name"] or getattr(call.function, "name", None) or ""
        known["arguments"] += getattr(call.function, "arguments", None) or ""
        for name, value in (getattr(call, "provider_specific_fields", None) or {}).items():
            _merge(known.setdefault("fields", {}), name, value)

    def _slot(self, index: int | None, call_id: str | None) -> dict[str, Any]:
        """Where a piece of a call goes: by its index, but a new id begins a new call, whatever its index."""
        matching = [known for known in self.calls if index is None or known["index"] == index]
        last = matching[-1] if matching else None
        if last is None or (call_id and last["id"] and call_id != last["id"]):
            last = {"index": index, "id": "", "name": "", "arguments": ""}
            self.calls.append(last)
        last["id"] = last["id"] or call_id or ""
        return last

    @property
    def has_output(self) -> bool:
        return bool(self.content or self.thinking or self.calls or self.made.images or self.made.sound)

    def everything_written(self) -> str:
        arguments = (call["name"] + call["arguments"] for call in self.calls)
        return "".join([*self.thinking, *self.content, *arguments])

    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls, each with an id that no other call of the turn has."""
        taken = set(self.taken_call_ids)
        calls = []
        for call in self.calls:
            call_id = _fresh_id(storable(call["id"]), taken)
            taken.add(call_id)
            signature = call.get("fields", {}).get("thought_signature")
            calls.append(ToolCall(call_id, storable(call["name"]), storable(call["arguments"]), signature))
        return tuple(calls)

    def reply(self, model: str, provider: str, usage: Usage, cost: Decimal | None) -> Reply:
        signatures = [block["signature"] for block in self.blocks if block.get("signature")]
        calls, made = self.tool_calls(), self.made.attachments()
        # Some providers end a reply with "stop" whatever is in it; litellm corrects that, of a stream not always.
        finish_reason = "tool_calls" if calls and self.finish_reason == "stop" else self.finish_reason
        return Reply(
            content=storable(self._text()) or None,
            thinking=storable("".join(self.thinking)) or None,
            thinking_signature=signatures[-1] if signatures else None,
            tool_calls=calls,
            message=_storable_throughout(self._message(calls, len(made))),
            usage=usage,
            cost=cost,
            finish_reason=finish_reason,
            model=model,
            provider=provider,
            provider_request_id=self.request_id,
            attachments=tuple(made),
        )

    def _text(self) -> str:
        """What the model said: written, or spoken."""
        return "".join(self.content) or self.made.transcript

    def _message(self, calls: tuple[ToolCall, ...], files: int) -> Message:
        """The assistant message as litellm wants it back, and how many files were made."""
        message: Message = {"role": "assistant", "content": self._text() or None}
        signed = [block for block in self.blocks if block.get("type") != "thinking" or block.get("signature")]
        if signed:
            message["thinking_blocks"] = signed
        elif self.thinking:
            message["reasoning_content"] = "".join(self.thinking)
        if calls:
            message["tool_calls"] = [
                render_tool_call(call, known.get("fields")) for call, known in zip(calls, self.calls, strict=True)
            ]
        if self.fields:
            message["provider_specific_fields"] = self.fields
        if files:
            message["attachments"] = files
        return message


def _text_of(content: Any) -> str:
    """The text of a message, which some providers send in parts."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return content or ""


def _storable_throughout(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, dict):
        return {name: _storable_throughout(item) for name, item in value.items()}
    if hasattr(value, "model_dump"):
        return _storable_throughout(value.model_dump(mode="json"))
    return [_storable_throughout(item) for item in value] if isinstance(value, list) else value


def render_tool_call(call: ToolCall, fields: Mapping[str, Any] | None) -> dict[str, Any]:
    rendered: dict[str, Any] = {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
    if fields:
        rendered["provider_specific_fields"] = dict(fields)
    return rendered


def _reported_cost(usage: Any) -> Decimal | None:
    """What the provider says it charged: a number, or a mapping with its total."""
    cost = getattr(usage, "cost", None)
    cost = cost.get("total_cost") if isinstance(cost, Mapping) else cost
    try:
        dollars = Decimal(str(cost))
    except InvalidOperation:
        return None
    return dollars if dollars.is_finite() else None


def parse_usage(usage: Any) -> Usage | None:
    """litellm's usage object, whose `prompt_tokens` include what the provider's cache held; None where it is empty."""
    prompt = getattr(usage, "prompt_tokens_details", None)
    completion = getattr(usage, "completion_tokens_details", None)

    def count(owner: Any, name: str) -> int:
        value = getattr(owner, name, None)
        return value if isinstance(value, int) and value > 0 else 0

    if not count(usage, "prompt_tokens") and not count(usage, "completion_tokens"):
        return None
    return Usage(
        input_tokens=count(usage, "prompt_tokens"),
        output_tokens=count(usage, "completion_tokens"),
        cached_tokens=count(prompt, "cached_tokens") or count(usage, "cache_read_input_tokens"),
        cache_write_tokens=count(prompt, "cache_creation_tokens") or count(usage, "cache_creation_input_tokens"),
        thinking_tokens=count(completion, "reasoning_tokens"),
    )


def _fresh_id(wanted: str, taken: set[str]) -> str:
    if wanted and wanted not in taken:
        return wanted
    number = 2
    while f"{wanted or 'call'}_{number}" in taken:
        number += 1
    return f"{wanted or 'call'}_{number}"


def _merge(into: dict[str, Any], name: str, value: Any) -> None:
    """Add a piece of a provider's own field: lists grow, what is said again replaces what was said before."""
    known = into.get(name)
    if isinstance(value, list) and isinstance(known, list):
        # Some lists come in pieces, some from their beginning each time.
        into[name] = value if value[: len(known)] == known else known + value
    elif value is not None:
        into[name] = value

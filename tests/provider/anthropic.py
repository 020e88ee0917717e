"""Anthropic's messages, as they travel."""

import json
from typing import Any

from .script import Answer, Wanted, sse

NAME = "anthropic"
REQUEST_ID_HEADER = "request-id"
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    529: "overloaded_error",
}
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}


def accepts(path: str) -> bool:
    return path.endswith("/v1/messages")


def parse_request(path: str, body: dict[str, Any]) -> Wanted:
    return Wanted(body.get("model", ""), bool(body.get("stream")))


def render_body(answer: Answer, wanted: Wanted) -> dict[str, Any]:
    stop_reason = STOP_REASONS[answer.finish_reason]
    usage = {**_input_usage(answer), "output_tokens": answer.output_tokens}
    return {**_message(answer, wanted), "content": _blocks(answer), "stop_reason": stop_reason, "usage": usage}


def render_events(answer: Answer, wanted: Wanted) -> list[bytes]:
    start = {**_message(answer, wanted), "usage": {**_input_usage(answer), "output_tokens": 1}}
    events = [_event("message_start", message=start), _event("ping")]
    for index, block in enumerate(_blocks(answer)):
        empty, deltas = _streamed_block(block, answer)
        events.append(_event("content_block_start", index=index, content_block=empty))
        events += [_event("content_block_delta", index=index, delta=delta) for delta in deltas]
        events.append(_event("content_block_stop", index=index))
    delta = {"stop_reason": STOP_REASONS[answer.finish_reason], "stop_sequence": None}
    events.append(_event("message_delta", delta=delta, usage={"output_tokens": answer.output_tokens}))
    return [*events, _event("message_stop")]


def render_error(status: int, message: str, retry_after: float | None = None) -> dict[str, Any]:
    kind = ERROR_TYPES.get(status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_error"}


def render_error_event(status: int, message: str) -> bytes:
    return sse(render_error(status, message), event="error")


def _event(event_name: str, **fields: Any) -> bytes:
    return sse({"type": event_name, **fields}, event=event_name)


def _message(answer: Answer, wanted: Wanted) -> dict[str, Any]:
    return {
        "id": f"msg_{answer.request_id}",
        "type": "message",
        "role": "assistant",
        "model": wanted.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _blocks(answer: Answer) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if answer.thinking is not None:
        blocks.append({"type": "thinking", "thinking": answer.thinking, "signature": answer.signature or ""})
    if answer.redacted_thinking is not None:
        blocks.append({"type": "redacted_thinking", "data": answer.redacted_thinking})
    if answer.text:
        blocks.append({"type": "text", "text": answer.text})
    for call in answer.tool_calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments})
    return blocks


def _streamed_block(block: dict[str, Any], answer: Answer) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The block as it opens, and the deltas that fill it."""
    match block["type"]:
        case "thinking":
            deltas = [{"type": "thinking_delta", "thinking": piece} for piece in answer.split(block["thinking"])]
            signed = {"type": "signature_delta", "signature": block["signature"]}
            return {**block, "thinking": "", "signature": ""}, [*deltas, signed]
        case "text":
            return {**block, "text": ""}, [
                {"type": "text_delta", "text": piece} for piece in answer.split(block["text"])
            ]
        case "tool_use":
            raws = {call.id: call.raw for call in answer.tool_calls}
            arguments = json.dumps(block["input"], ensure_ascii=False) if block["input"] else raws[block["id"]] or ""
            pieces = ["", *answer.split(arguments)]
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
        case _:
            return block, []


def _input_usage(answer: Answer) -> dict[str, Any]:
    return {
        "input_tokens": answer.input_tokens - answer.cached_tokens - answer.cache_write_tokens,
        "cache_creation_input_tokens": answer.cache_write_tokens,
        "cache_read_input_tokens": answer.cached_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": answer.cache_write_tokens,
            "ephemeral_1h_input_tokens": 0,
        },
        "service_tier": "standard",
    }

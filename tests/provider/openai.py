"""OpenAI's chat completions, as they travel."""

from typing import Any

from .script import Answer, Wanted, encoded, sse

NAME = "openai"
REQUEST_ID_HEADER = "x-request-id"
ERROR_TYPES = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_exceeded"}
CREATED = 1_700_000_000


def accepts(path: str) -> bool:
    return path.endswith("/chat/completions")


def parse_request(path: str, body: dict[str, Any]) -> Wanted:
    options = body.get("stream_options") or {}
    return Wanted(body.get("model", ""), bool(body.get("stream")), bool(options.get("include_usage")))


def render_body(answer: Answer, wanted: Wanted) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or None, "refusal": None}
    if answer.audio is not None:
        message |= {"content": None, "audio": {"id": "audio_1", "expires_at": CREATED, **_sound(answer)}}
    if answer.thinking:
        message["reasoning_content"] = answer.thinking
    if answer.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}
            for call in answer.tool_calls
        ]
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
    body = {**_envelope(answer, wanted, "chat.completion"), "choices": [choice]}
    return {**body, "usage": _usage(answer)} if answer.usage else body


def render_events(answer: Answer, wanted: Wanted) -> list[bytes]:
    envelope = _envelope(answer, wanted, "chat.completion.chunk")
    if wanted.stream_usage and answer.usage:
        envelope["usage"] = None

    def event(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return sse({**envelope, "choices": [choice]})

    opens_with_text = answer.text and answer.audio is None
    events = [event({"role": "assistant", "content": "" if opens_with_text else None, "refusal": None})]
    events += [event({"reasoning_content": piece}) for piece in answer.split(answer.thinking or "")]
    if answer.audio is None:
        events += [event({"content": piece}) for piece in answer.split(answer.text)]
    else:
        sound = _sound(answer)
        events += [event({"audio": {"id": "audio_1", "transcript": piece}}) for piece in answer.split(answer.text)]
        events += [event({"audio": {"data": piece}}) for piece in answer.split(sound["data"])]
    for index, call in enumerate(answer.tool_calls):
        function = {"name": call.name, "arguments": ""}
        events.append(
            event({"tool_calls": [{"index": index, "id": call.id, "type": "function", "function": function}]})
        )
        events += [
            event({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
            for piece in answer.split(call.arguments_json)
        ]
    events.append(event({}, answer.finish_reason))
    if wanted.stream_usage and answer.usage:
        events.append(sse({**envelope, "choices": [], "usage": _usage(answer)}))
    return [*events, b"data: [DONE]\n\n"]


def render_error(status: int, message: str, retry_after: float | None = None) -> dict[str, Any]:
    kind = ERROR_TYPES.get(status, "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": kind}}


def render_error_event(status: int, message: str) -> bytes:
    return sse(render_error(status, message))


def _envelope(answer: Answer, wanted: Wanted, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{answer.request_id}",
        "object": kind,
        "created": CREATED,
        "model": f"{wanted.model}-2024-08-06",
        "service_tier": "default",
        "system_fingerprint": "fp_test",
    }


def _sound(answer: Answer) -> dict[str, Any]:
    return {"data": encoded(answer.audio or b""), "transcript": answer.text}


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.input_tokens,
        "completion_tokens": answer.output_tokens,
        "total_tokens": answer.input_tokens + answer.output_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": answer.thinking_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }

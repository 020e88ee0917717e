"""Gemini's generateContent and streamGenerateContent, as they travel."""

from typing import Any

from .script import Answer, Wanted, encoded, sse

NAME = "gemini"
REQUEST_ID_HEADER = "x-request-id"
ERROR_STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}
FINISH_REASONS = {"stop": "STOP", "length": "MAX_TOKENS", "tool_calls": "STOP", "content_filter": "SAFETY"}


def accepts(path: str) -> bool:
    return path.endswith((":generateContent", ":streamGenerateContent"))


def parse_request(path: str, body: dict[str, Any]) -> Wanted:
    model, _, method = path.rpartition("/")[2].partition(":")
    return Wanted(model, method == "streamGenerateContent")


def render_body(answer: Answer, wanted: Wanted) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    if answer.thinking:
        parts.append({"text": answer.thinking, "thought": True})
    if answer.text:
        parts.append(_signed({"text": answer.text}, None if answer.tool_calls else answer.signature))
    return _chunk(answer, wanted, parts + _file_parts(answer) + _call_parts(answer), last=True)


def render_events(answer: Answer, wanted: Wanted) -> list[bytes]:
    parts = [{"text": piece, "thought": True} for piece in answer.split(answer.thinking or "")]
    parts += [{"text": piece} for piece in answer.split(answer.text)]
    parts += _file_parts(answer) + _call_parts(answer)
    last = _signed({"text": ""}, None if answer.tool_calls else answer.signature)
    chunks = [_chunk(answer, wanted, [part]) for part in parts] + [_chunk(answer, wanted, [last], last=True)]
    return [sse(chunk) for chunk in chunks]


def render_error(status: int, message: str, retry_after: float | None = None) -> dict[str, Any]:
    error: dict[str, Any] = {"code": status, "message": message, "status": ERROR_STATUSES.get(status, "UNKNOWN")}
    if retry_after is not None:
        delay = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{retry_after}s"}
        error["details"] = [delay]
    return {"error": error}


def render_error_event(status: int, message: str) -> bytes:
    return sse(render_error(status, message))


def _file_parts(answer: Answer) -> list[dict[str, Any]]:
    files = [("image/png", image) for image in answer.images]
    files += [("audio/L16;codec=pcm;rate=24000", answer.audio)] if answer.audio is not None else []
    return [{"inlineData": {"mimeType": media_type, "data": encoded(content)}} for media_type, content in files]


def _call_parts(answer: Answer) -> list[dict[str, Any]]:
    """Of several calls asked for at once only the first is signed, unless the script says otherwise."""
    return [
        _signed(
            {"functionCall": {"name": call.name, "args": call.arguments, "id": call.id}},
            call.signature or (answer.signature if index == 0 else None),
        )
        for index, call in enumerate(answer.tool_calls)
    ]


def _signed(part: dict[str, Any], signature: str | None) -> dict[str, Any]:
    return {**part, "thoughtSignature": signature} if signature else part


def _chunk(answer: Answer, wanted: Wanted, parts: list[dict[str, Any]], last: bool = False) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"parts": parts, "role": "model"}, "index": 0}
    if last:
        candidate["finishReason"] = FINISH_REASONS[answer.finish_reason]
    chunk = {"candidates": [candidate], "modelVersion": wanted.model, "responseId": answer.request_id}
    return {**chunk, "usageMetadata": _usage(answer, last)} if answer.usage else chunk


def _usage(answer: Answer, last: bool) -> dict[str, Any]:
    """Before the last chunk Gemini counts the prompt, and not yet what it generates."""
    usage: dict[str, Any] = {"promptTokenCount": answer.input_tokens, "totalTokenCount": answer.input_tokens}
    if last:
        usage["candidatesTokenCount"] = answer.output_tokens - answer.thinking_tokens
        usage["totalTokenCount"] += answer.output_tokens
    if last and answer.thinking_tokens:
        usage["thoughtsTokenCount"] = answer.thinking_tokens
    if answer.cached_tokens:
        usage["cachedContentTokenCount"] = answer.cached_tokens
    return usage

"""What a provider's error means: whether it may pass, how long to wait, what HTTP said.

litellm's classes are known by name, so that none of it needs litellm.
"""

import contextlib
import email.utils
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from .errors import TurnCancelled, UnreadableReply
from .values import text_of

RETRYABLE = frozenset(
    "RateLimitError InternalServerError ServiceUnavailableError BadGatewayError APIConnectionError Timeout "
    "APIResponseValidationError CallerCredentialRateLimitError MidStreamFallbackError".split()
)
FINAL = frozenset(
    "AuthenticationError BadRequestError BlockedPiiEntityError BudgetExceededError "
    "CallerCredentialAuthenticationError ContentPolicyViolationError ContextWindowExceededError "
    "EndpointNotSupportedByModelError GuardrailRaisedException ImageFetchError InvalidRequestError "
    "JSONSchemaValidationError LiteLLMUnknownProvider MalformedRequestFieldError MockException ModelNotMappedError "
    "ModifyResponseException NotFoundError PaymentRequiredError PermissionDeniedError RejectedRequestError "
    "SensitiveDataRouteException UnprocessableEntityError UnsupportedEndpointError UnsupportedParamsError "
    "VectorStoreSearchError".split()
)
"""litellm's classes. Those in neither set (APIError, OpenAIError) are judged by their status."""


def is_retryable(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    if not isinstance(error, Exception) or "insufficient_quota" in text_of(error) or was_never_sent(error):
        return False
    for name in (cls.__name__ for cls in type(error).__mro__):
        if name in RETRYABLE or name in FINAL:
            return name in RETRYABLE
    status = getattr(error, "status_code", None)
    if isinstance(status, int):
        return status in (408, 429) or status >= 500
    return isinstance(error, ConnectionError | TimeoutError) or lost_connection(error)


def unwrapped(error: BaseException) -> BaseException:
    """The error as it was raised, where litellm has wrapped it for its router."""
    original = getattr(error, "original_exception", None)
    return original if isinstance(original, Exception) else error


def hung_up(error: BaseException) -> bool:
    """Whether it was us who ended the call."""
    return not isinstance(error, Exception) or isinstance(error, TurnCancelled)


def status_of(error: BaseException) -> int:
    """The HTTP status: 499 where we hung up, 0 where there was none."""
    if hung_up(error):
        return 499
    if isinstance(error, UnreadableReply):
        return 200
    if type(error).__name__ != "Timeout" and (lost_connection(error) or was_never_sent(error)):
        return 0  # litellm says 500 here, which no server did
    status = getattr(error, "status_code", None)
    return status if isinstance(status, int) else 0


def was_never_sent(error: BaseException) -> bool:
    """Whether there was no key to send the call with; litellm takes that for a server's error, or for a broken line."""
    return _NO_KEY.search(text_of(error)) is not None


_NO_KEY = re.compile(r"missing (credentials|[\w ]{1,30} api key)|api_key client option must be set", re.IGNORECASE)


def lost_connection(error: BaseException | None) -> bool:
    """Whether the connection failed, as litellm, httpx or aiohttp say it anywhere in the chain of causes."""
    seen = set()
    while error is not None and id(error) not in seen:  # a chain may be a circle
        seen.add(id(error))
        names = {cls.__name__ for cls in type(error).__mro__}
        if names & {"APIConnectionError", "TransportError", "ClientConnectionError"}:
            return True
        error = error.__cause__ or error.__context__
    return False


def retry_after_of(error: BaseException) -> float | None:
    """Seconds that the provider asked us to wait, by its Retry-After header (RFC 9110, 10.2.3)."""
    own = getattr(error, "retry_after", None)
    if isinstance(own, int | float):
        return float(own)
    for headers in (
        getattr(getattr(error, "response", None), "headers", None),
        getattr(error, "litellm_response_headers", None),
        getattr(error, "headers", None),
    ):
        value = headers.get("retry-after") if headers else None
        if value:
            return _seconds(value)
    return None


def _seconds(value: str) -> float | None:
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        return max((email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return None


_SECRET_NAME = re.compile(r"key|token|secret|password|credential|authorization", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"\b(sk|pk|gsk|xai|key)-[\w*-]{8,}|\bAIza[\w-]{20,}|(?<=Bearer )[^\s'\"]+", re.IGNORECASE)


def secrets_of(settings: Any, is_secret: bool = False) -> Iterator[str]:
    """The values that must not be written down: of what is named like a key, and of every header, however deep."""
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            named = _SECRET_NAME.search(str(name)) is not None
            yield from secrets_of(value, is_secret or named or str(name) in ("headers", "extra_headers"))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from secrets_of(value, is_secret)
    elif is_secret and isinstance(settings, str) and len(settings) >= 8:
        yield settings


def redacted(text: str, secrets: Iterable[str]) -> str:
    """The text without the secrets, and without what looks like one."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return _SECRET_TEXT.sub("***", text)


def redact(error: BaseException | None, secrets: Iterable[str]) -> None:
    """Take the secrets out of the texts of an error, and of all that led to it: whoever catches it may print them."""
    known, seen, waiting = [*secrets], set(), [error]
    while waiting:
        one: Any = waiting.pop()
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        one.args = tuple(_redacted(part, known) for part in one.args)
        for name in ("message", "strerror", "__notes__"):
            text = getattr(one, name, None)
            if (clean := _redacted(text, known)) != text:
                with contextlib.suppress(AttributeError, TypeError):
                    setattr(one, name, clean)
        waiting += [one.__cause__, one.__context__, getattr(one, "original_exception", None)]
        waiting += getattr(one, "exceptions", None) or ()


def _redacted(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, list):
        return [_redacted(item, secrets) for item in value]
    return redacted(value, secrets) if isinstance(value, str) else value

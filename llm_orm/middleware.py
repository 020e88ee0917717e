"""What can be put around every call of a model and of a tool: the protocol, and the middlewares that come along."""

import inspect
import json
import logging
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from .errors import CostLimitExceeded, InvalidValue, check_spelling
from .structured import SchemaMismatch
from .values import RETRY, Answer, Directive, Message, Reply, ToolCall, ToolOutcome, TurnContext

log = logging.getLogger("llm_orm")

LOOKS_ON = ("on_turn_start", "around_call", "on_answer", "around_tool", "on_outcome", "on_turn_end")
"""Methods that have no say: they cost a turn no row, and what they raise is logged."""

METHODS = (
    "on_request",
    "on_response",
    "on_error",
    "on_tool_call_start",
    "on_tool_call_end",
    "on_tool_call_error",
    "stored_text",
    *LOOKS_ON,
)


class Middleware:
    """Subclass it and override what you need; plain or async, but for stored_text. Any object with one of these
    methods will do.

    Those of the store come before those of the chat. `on_request` and `on_tool_call_start` are called in this order,
    all others in reverse; the first directive that is returned counts (`RETRY`, `REPLACE`, `CONTINUE`, `STOP`, or None
    to say nothing). They run around the hooks of the chat, in `ask` and in `ask_stream` alike, after what was paid for
    has been written: none can lose a row by raising.

    Those from `on_turn_start` on look on, for traces and metrics: plain functions, called at once, also where a turn is
    broken off. Nothing that they return or raise changes the turn; what they raise is logged.

    needs_spent    whether `context.spent` is to be read from the database before each call
    """

    needs_spent: bool = False

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        check_spelling(f"the middleware {cls.__name__}", cls.__dict__, ("needs_spent", *METHODS))

    def on_request(self, context: TurnContext) -> Any:
        """Before each call of the model; may change `context.messages`, or raise to end the turn before the call."""

    def on_response(self, context: TurnContext, reply: Reply) -> Directive | Any | None:
        """After each reply of the model, those that ask for tools too (`reply.tool_calls`)."""

    def on_error(self, context: TurnContext, error: Exception) -> Directive | Any | None:
        """Once the turn is about to fail, retries and fallbacks included. REPLACE makes it a reply."""

    def on_tool_call_start(self, context: TurnContext, call: ToolCall) -> Any:
        """Before each tool call."""

    def on_tool_call_end(self, context: TurnContext, call: ToolCall, outcome: ToolOutcome) -> Any:
        """After each tool call, however it ended."""

    def on_tool_call_error(self, context: TurnContext, call: ToolCall, error: Exception) -> Directive | Any | None:
        """After a tool call that failed. RETRY runs it once more, STOP ends the turn, CONTINUE never does, REPLACE
        gives the model another result."""

    def stored_text(self, text: str) -> str:
        """What the database keeps of a text: of messages, and of tools' arguments and results."""
        return text

    def on_turn_start(self, context: TurnContext) -> None:
        """Before anything of the turn is read or written."""

    def around_call(self, context: TurnContext) -> AbstractContextManager[Any] | None:
        """What a request to a model is sent within, on the thread or task that sends it: each attempt of each round."""

    def on_answer(self, context: TurnContext, answer: Answer) -> None:
        """After each attempt, failed ones and those that were broken off too; what its row will say is settled."""

    def around_tool(self, context: TurnContext, call: ToolCall) -> AbstractContextManager[Any] | None:
        """What a tool call runs within, on its own thread or task."""

    def on_outcome(self, context: TurnContext, outcome: ToolOutcome) -> None:
        """After each run of a tool, once its result is written."""

    def on_turn_end(self, context: TurnContext, ended: Any) -> None:
        """Once the turn is over: with its message, or with the exception that ended it."""


def check_middleware(given: Any) -> Any:
    """The middleware itself; raises `InvalidValue` where it has none of the methods of one."""
    if isinstance(given, type) or not any(callable(getattr(given, name, None)) for name in METHODS):
        made = f"; make it one: {given.__name__}()" if isinstance(given, type) else ""
        raise InvalidValue(f"{given!r} is not a middleware: it needs one of {', '.join(METHODS)}{made}")
    for name in ("stored_text", *LOOKS_ON):
        if inspect.iscoroutinefunction(getattr(given, name, None)):
            raise InvalidValue(f"the {name} of {given!r} must be a plain function: nothing can await it there")
    return given


def methods_of(middlewares: tuple[Any, ...], name: str) -> list[Callable[..., Any]]:
    """The methods of that name which do something, in the order of the middlewares."""
    methods = (getattr(each, name, None) for each in middlewares)
    unset = getattr(Middleware, name)
    return [method for method in methods if callable(method) and getattr(method, "__func__", None) is not unset]


def stored(masks: Iterable[Callable[[str], Any]], text: Any) -> Any:
    """What the database keeps of a text, by the stored_text of each middleware; of None, nothing."""
    for mask in reversed([*masks]) if isinstance(text, str) else ():
        text = mask(text)
        if not isinstance(text, str):
            raise InvalidValue(f"a stored_text must return a text, not {type(text).__name__}: {mask!r}")
    return text


def tell(middlewares: tuple[Any, ...], name: str, *arguments: Any) -> None:
    """Tell those who look on."""
    for method in methods_of(middlewares, name):
        with _on_its_own(method):
            method(*arguments)


@contextmanager
def within(middlewares: tuple[Any, ...], name: str, *arguments: Any) -> Generator[None]:
    """Run the block within what those who look on put around it; they cannot swallow what it raises."""
    entered: list[tuple[Any, Any]] = []
    for method in methods_of(middlewares, name):
        with _on_its_own(method):
            manager = method(*arguments)
            if manager is not None:
                manager.__enter__()
                entered.append((method, manager))
    raised: tuple[Any, Any, Any] = (None, None, None)
    try:
        yield
    except BaseException as error:
        raised = type(error), error, error.__traceback__
        raise
    finally:
        for method, manager in reversed(entered):
            with _on_its_own(method):
                manager.__exit__(*raised)
        del raised


@contextmanager
def _on_its_own(method: Any) -> Generator[None]:
    try:
        yield
    except Exception as problem:
        log.warning("%r looks on at a turn and failed, which changes nothing: %s", method, problem, exc_info=problem)


class CostGuard(Middleware):
    """Ends a turn before the call of the model that would cost more than the limit.

    limit          US dollars, as a string, a `Decimal` or an int: money is exact
    per            "chat": all that the chat has cost; "turn": this turn alone
    on_exceeded    called with the `CostLimitExceeded` before it is raised; a plain function

    It holds no sums of its own, so that one guard serves many chats. What a call will cost is counted before it is
    made, of its input and of max_tokens where that is set; so set it, or the reply itself may go over. Calls of models
    without a known price count nothing.
    """

    def __init__(
        self,
        limit: str | Decimal | int,
        per: Literal["chat", "turn"] = "chat",
        on_exceeded: Callable[[CostLimitExceeded], Any] | None = None,
    ):
        if per not in ("chat", "turn"):
            raise InvalidValue(f'the limit of a CostGuard is per "chat" or per "turn", not {per!r}')
        if on_exceeded is not None and (not callable(on_exceeded) or inspect.iscoroutinefunction(on_exceeded)):
            raise InvalidValue(f"the on_exceeded of a CostGuard must be a plain function, not {on_exceeded!r}")
        self.limit = limit_in_dollars(limit, "a CostGuard")
        self.per = per
        self.on_exceeded = on_exceeded
        self.needs_spent = per == "chat"

    def on_request(self, context: TurnContext) -> None:
        spent, estimate = self._spent(context), context.estimate()
        if spent < self.limit if estimate is None else spent + estimate <= self.limit:
            return
        price = "has no known price" if estimate is None else f"costs {shown_dollars(estimate)} or more"
        error = CostLimitExceeded(
            f"the {self.per} has cost {shown_dollars(spent)} of its {shown_dollars(self.limit)}, and the next call, of "
            f"{context.model!r}, {price}: it was not made. Raise the limit of the CostGuard, or start another "
            f"{self.per}",
            limit=self.limit,
            spent=spent,
            estimate=estimate,
        )
        if self.on_exceeded is not None:
            self.on_exceeded(error)
        raise error

    def _spent(self, context: TurnContext) -> Decimal:
        if self.per == "turn":
            return context.spent_in_turn
        if context.spent is None:
            raise InvalidValue("a CostGuard within another middleware needs needs_spent = True there")
        return context.spent.cost


def shown_dollars(amount: Decimal) -> str:
    return f"${amount.normalize():f}"


def limit_in_dollars(given: Any, whose: str) -> Decimal:
    """A limit as it may be given; raises `InvalidValue`."""
    try:
        if isinstance(given, bool) or not isinstance(given, str | Decimal | int):
            raise InvalidOperation
        amount = Decimal(given)
        if not amount.is_finite() or amount <= 0:
            raise InvalidOperation
    except InvalidOperation:
        raise InvalidValue(
            f'the limit of {whose} must be US dollars, over 0, as a string, Decimal or int: "2.50", not {given!r}'
        ) from None
    return amount


class UsageLogger(Middleware):
    """Logs a line for each reply of a model, with its tokens, cost and time, and a warning for each turn that fails.

    logger    default: "llm_orm.usage"
    level     of the lines; failures are warnings
    prefix    what the lines begin with

    The same figures are fields of the log record (`extra`): chat_id, turn_id, model, provider, round, input_tokens,
    output_tokens, cached_tokens, thinking_tokens, cost (`Decimal`, None where unpriced), duration_ms. What was said is
    never logged, and of an error its class alone.
    """

    def __init__(self, logger: logging.Logger | None = None, level: int = logging.INFO, prefix: str = ""):
        if not isinstance(level, int):
            raise InvalidValue(f"the level of a UsageLogger is a number, as logging.INFO is, not {level!r}")
        if not callable(getattr(logger or logging, "log", None)):
            raise InvalidValue(f"the logger of a UsageLogger is a logging.Logger, not {logger!r}")
        self.logger = logger or logging.getLogger("llm_orm.usage")
        self.level = level
        self.prefix = prefix

    def on_response(self, context: TurnContext, reply: Reply) -> None:
        usage = reply.usage
        figures = {
            **_who(context, reply),
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cached_tokens": usage.cached_tokens,
            "thinking_tokens": usage.thinking_tokens,
            "cost": reply.cost,
            "duration_ms": context.duration_ms,
        }
        cost = "unpriced" if reply.cost is None else f"${reply.cost:f}"
        line = (
            "%(prefix)schat %(chat_id)s, call %(round)s of %(provider)s/%(model)s: %(input_tokens)s tokens in "
            "(%(cached_tokens)s cached), %(output_tokens)s out (%(thinking_tokens)s thinking), %(price)s, "
            "%(duration_ms)s ms"
        )
        self.logger.log(self.level, line, {**figures, "prefix": self.prefix, "price": cost}, extra=figures)

    def on_error(self, context: TurnContext, error: Exception) -> None:
        figures = {**_who(context), "error": type(error).__name__}
        line = "%(prefix)schat %(chat_id)s, call %(round)s of %(provider)s/%(model)s failed: %(error)s"
        self.logger.warning(line, {**figures, "prefix": self.prefix}, extra=figures)


def _who(context: TurnContext, reply: Reply | None = None) -> dict[str, Any]:
    return {
        "chat_id": context.chat_id,
        "turn_id": context.turn_id,
        "model": (reply and reply.model) or context.model,
        "provider": (reply and reply.provider) or context.provider,
        "round": context.round,
    }


class SchemaSelfCorrection(Middleware):
    """Sends a reply that does not match the schema back to the model, with what is wrong with it.

    max_retries    how often in one turn; past it the turn raises `InvalidReply`
    """

    def __init__(self, max_retries: int = 2):
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise InvalidValue(f"max_retries must be a whole number, 0 or more, not {max_retries!r}")
        self.max_retries = max_retries

    def on_response(self, context: TurnContext, reply: Reply) -> RETRY | None:
        if context.schema is None or reply.tool_calls or context.correction_rounds >= self.max_retries:
            return None
        try:
            context.schema.parse(reply.content or "")
        except SchemaMismatch as problem:
            return RETRY(
                f"Your previous reply did not match the required JSON schema. {problem}\n\n"
                "Answer with the corrected JSON only."
            )
        return None


Spans = Callable[[str], Iterable[tuple[int, int]]]
"""Finds something in a text: where each of it starts and ends."""


class PIIMask(Middleware):
    """Masks personal data in what the model is shown: e-mail addresses, phone numbers, card numbers, IBANs, US SSNs.

    mask        what is put in its place
    patterns    more to mask: {"order": r"ORD-\\d+"}; under the name of one of ours ("email", "phone", "card", "iban",
                "ssn") it takes its place, and None does away with it
    stored      whether the database keeps the masked text too; else it keeps what was said

    Card numbers and IBANs are masked where their check digits are right, phone numbers where they are written as one:
    with a + and the country, or as 555-123-4567. Names, addresses and IP addresses are not looked for. Nothing is
    changed in thinking, which is signed, and in data: URLs. JSON stays JSON.

    Tools get their arguments as the model wrote them. With `stored`, too, those of a call that has not ended are kept
    as they are, for whoever approves it, or goes on after a crash.
    """

    def __init__(
        self,
        mask: str = "[REDACTED]",
        patterns: Mapping[str, str | re.Pattern[str] | None] | None = None,
        stored: bool = False,
    ):
        if not isinstance(mask, str) or not mask:
            raise InvalidValue(f"the mask of a PIIMask must be some text, not {mask!r}")
        if not isinstance(stored, bool) or not isinstance(patterns, Mapping | None):
            raise InvalidValue(f'a PIIMask has patterns={{"name": r"…"}}, stored=True: not {patterns!r}, {stored!r}')
        self.mask = mask
        self.stored = stored
        given = {name: _finder(name, pattern) for name, pattern in (patterns or {}).items()}
        self.finders = [find for find in {**_PII, **given}.values() if find is not None]

    def on_request(self, context: TurnContext) -> None:
        context.messages = [self._in_message(message) for message in context.messages]

    def stored_text(self, text: str) -> str:
        return self._in_content(text) if self.stored else text

    def _in_message(self, message: Message) -> Message:
        masked = {**message, "content": self._in_content(message["content"])} if "content" in message else {**message}
        if masked.get("tool_calls"):
            masked["tool_calls"] = [self._in_call(call) for call in masked["tool_calls"]]
        return masked

    def _in_call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": self._in_content(function.get("arguments"))}}

    def _in_content(self, content: Any) -> Any:
        """A text masked, or the texts among the parts that a content may have."""
        if isinstance(content, list):
            return [
                {**part, "text": self._in_content(part["text"])}
                if isinstance(part, dict) and part.get("type") == "text" and "text" in part
                else part
                for part in content
            ]
        if not isinstance(content, str):
            return content
        return _LITERAL.sub(self._in_literal, content) if _is_json(content) else self._masked(content)

    def _in_literal(self, match: re.Match[str]) -> str:
        """A string of JSON masked inside its quotes; a number becomes a string."""
        literal = match[0]
        plain = json.loads(literal) if literal.startswith('"') else literal
        masked = self._masked(plain)
        if masked == plain:
            return literal
        return json.dumps(masked if literal.startswith('"') else self.mask)

    def _masked(self, text: str) -> str:
        parts = _DATA_URL.split(text)  # text, URL, text, …
        parts[::2] = map(self._masked_between, parts[::2])
        return "".join(parts)

    def _masked_between(self, text: str) -> str:
        # In pieces and until nothing is found, so that the mask itself is never masked, nor anything on a second time.
        pieces = text.split(self.mask)
        while True:
            cut = pieces
            for find in self.finders:
                cut = [part for piece in cut for part in _cut(piece, find)]
            if len(cut) == len(pieces):
                return self.mask.join(pieces)
            pieces = cut


def _cut(text: str, find: Spans) -> list[str]:
    """The text around what is found."""
    pieces, start = [], 0
    for found, end in find(text):
        pieces.append(text[start:found])
        start = end
    return [*pieces, text[start:]]


def _is_json(text: str) -> bool:
    if text.lstrip()[:1] not in '{["':
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


_LITERAL = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|-?\d[\d.eE+-]*')
_DATA_URL = re.compile(r"""(data:[\w.+-]+/[\w.+-]+(?:;[\w.=+-]+)*,[^\s"'<>)]*)""", re.IGNORECASE)


def _finder(name: Any, given: Any) -> Spans | None:
    if given is None:
        return None
    try:
        pattern = re.compile(given)
        pattern.search("")
    except (re.error, TypeError) as error:
        raise InvalidValue(
            f"the pattern {name!r} of a PIIMask is no regular expression of text: {given!r} ({error})"
        ) from error
    return _spans_of(pattern)


def _spans_of(pattern: re.Pattern[str], is_real: Callable[[str], bool] = bool) -> Spans:
    def spans(text: str) -> Iterable[tuple[int, int]]:
        position = 0
        while position <= len(text) and (match := pattern.search(text, position)):
            real = is_real(match[0])
            if real:
                yield match.span()
            position = match.end() if real else match.start() + 1

    return spans


def _is_card(text: str) -> bool:
    digits = [int(character) for character in text if character.isdigit()][::-1]
    return sum(digits[::2] + [digit * 2 - 9 * (digit > 4) for digit in digits[1::2]]) % 10 == 0


def _is_iban(text: str) -> bool:
    characters = text.replace(" ", "")
    return int("".join(str(int(each, 36)) for each in characters[4:] + characters[:4])) % 97 == 1


_LENGTHS = """
    AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 ES24
    FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32
    LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24
    RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30
"""
"""How long an IBAN of each country is."""
_IBANS = [rf"{each[:2]}\d\d(?: ?[A-Z\d]){{{int(each[2:]) - 4}}}" for each in _LENGTHS.split()]

_PII: dict[str, Spans] = {
    "email": _spans_of(re.compile(r"(?<![\w.%+-])[\w.%+-]+@(?:[\w-]+\.)+[^\W\d_][\w-]*\w")),
    "iban": _spans_of(
        re.compile(
            rf"(?<!\w)(?=[A-Z][A-Z]\d\d)(?:{'|'.join(_IBANS)})(?!\w)",
            re.ASCII | re.IGNORECASE,
        ),
        _is_iban,
    ),
    "card": _spans_of(
        re.compile(
            r"(?<![\w+])(?<!\d\.)"
            r"(?:[2-6]\d{12,18}|[2-6]\d{3}([ -])(?:\d{4}\1\d{4}\1\d{4}|\d{6}\1\d{4,5}))(?!\w)"
        ),
        _is_card,
    ),
    "ssn": _spans_of(re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])")),
    "phone": _spans_of(
        re.compile(
            r"(?<![\w+])\+[1-9](?:[ .()/-]{0,2}\d){8,14}(?!\d)"
            r"|(?<![\w.-])(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])\d{3}[ .-]\d{4}(?![\w-])"
        )
    ),
}

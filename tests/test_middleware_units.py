"""The bundled middlewares, one method at a time: what needs no turn around it."""

import json
import logging
import re
import time
from decimal import Decimal
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pydantic
import pytest

from llm_orm.errors import CostLimitExceeded, InvalidValue
from llm_orm.middleware import (
    LOOKS_ON,
    METHODS,
    CostGuard,
    Middleware,
    PIIMask,
    SchemaSelfCorrection,
    UsageLogger,
    check_middleware,
    methods_of,
)
from llm_orm.structured import Schema
from llm_orm.values import RETRY, Message, Reply, Stats, ToolCall, TurnContext, Usage

CHAT, TURN = UUID(int=1), UUID(int=2)


def a_context(**keywords: Any) -> TurnContext:
    told = {"chat_id": CHAT, "turn_id": TURN, "metadata": None, "model": "gpt-4o", "provider": "openai"}
    return TurnContext(**{**told, "streamed": False, "options": None, **keywords})


# The protocol


def test_a_middleware_has_one_of_the_methods() -> None:
    assert check_middleware(SimpleNamespace(on_request=print))
    for given in (CostGuard, object(), SimpleNamespace(on_request="no")):
        with pytest.raises(InvalidValue, match="is not a middleware: it needs one of on_request, "):
            check_middleware(given)
    with pytest.raises(InvalidValue, match=r"make it one: CostGuard\(\)"):
        check_middleware(CostGuard)


def test_a_method_that_is_nearly_one_of_a_middleware_s_is_refused_where_the_class_is_made() -> None:
    with pytest.raises(InvalidValue, match=r"the middleware Mask has 'on_reqest', .*: write 'on_request'"):
        type("Mask", (Middleware,), {"on_reqest": print})
    assert type("Mask", (Middleware,), {"on_request": print, "on_reload": print})


def test_bundled_middlewares_refuse_what_they_cannot_work_with() -> None:
    for wrong in ({"patterns": ["x"]}, {"stored": "yes"}):
        with pytest.raises(InvalidValue, match="a PIIMask has patterns="):
            PIIMask(**wrong)
    with pytest.raises(InvalidValue, match=r"the logger of a UsageLogger is a .*, not 'app'"):
        UsageLogger("app")  # type: ignore[arg-type]


def test_only_methods_that_were_written_are_called() -> None:
    guard, mask, correction, logger = CostGuard("1"), PIIMask(), SchemaSelfCorrection(), UsageLogger()
    bundled = (guard, mask, correction, logger, Middleware(), SimpleNamespace(on_error=print))
    assert {name: methods_of(bundled, name) for name in METHODS} == {
        "on_request": [guard.on_request, mask.on_request],
        "on_response": [correction.on_response, logger.on_response],
        "on_error": [logger.on_error, print],
        "on_tool_call_start": [],
        "on_tool_call_end": [],
        "on_tool_call_error": [],
        "stored_text": [mask.stored_text],
        **{name: [] for name in LOOKS_ON},
    }


# CostGuard


def spending(spent: str, estimate: str | None = None, *, in_turn: str = "0") -> TurnContext:
    expected = None if estimate is None else Decimal(estimate)
    stats = Stats(cost=Decimal(spent))
    return a_context(spent=stats, spent_in_turn=Decimal(in_turn), estimate=lambda: expected)


def test_a_guard_of_a_chat_counts_what_the_chat_has_cost() -> None:
    guard = CostGuard("1.00")
    assert guard.needs_spent
    guard.on_request(spending("0.90", "0.10", in_turn="5"))
    with pytest.raises(CostLimitExceeded) as caught:
        guard.on_request(spending("0.90", "0.1000001"))
    error = caught.value
    assert (error.limit, error.spent, error.estimate) == (Decimal("1.00"), Decimal("0.90"), Decimal("0.1000001"))
    assert str(error) == (
        "the chat has cost $0.9 of its $1, and the next call, of 'gpt-4o', costs $0.1000001 or more: it was not made. "
        "Raise the limit of the CostGuard, or start another chat"
    )


def test_a_guard_of_a_turn_counts_this_turn_alone() -> None:
    guard = CostGuard(Decimal(100), per="turn")
    assert not guard.needs_spent
    guard.on_request(a_context(spent_in_turn=Decimal("99.5"), estimate=lambda: Decimal("0.5")))
    with pytest.raises(CostLimitExceeded, match=r"the turn has cost \$99.5 of its \$100, .* or start another turn"):
        guard.on_request(a_context(spent_in_turn=Decimal("99.5"), estimate=lambda: Decimal("0.51")))


def test_a_call_without_a_known_price_is_stopped_once_the_limit_is_reached() -> None:
    guard = CostGuard(1)
    guard.on_request(spending("0.999999"))
    with pytest.raises(CostLimitExceeded, match=r"of 'gpt-4o', has no known price: it was not made") as caught:
        guard.on_request(spending("1"))
    assert caught.value.estimate is None


def test_a_guard_remembers_nothing_between_chats_and_attempts() -> None:
    guard = CostGuard("1")
    for _ in range(5):
        guard.on_request(spending("0.6", "0.4"))


def test_who_is_told_of_an_exceeded_limit_is_told_first() -> None:
    told: list[CostLimitExceeded] = []
    guard = CostGuard("1", on_exceeded=told.append)
    guard.on_request(spending("0", "1"))
    assert told == []
    with pytest.raises(CostLimitExceeded) as caught:
        guard.on_request(spending("0", "2"))
    assert told == [caught.value]

    def instead(error: CostLimitExceeded) -> None:
        raise PermissionError("upgrade your plan") from error

    with pytest.raises(PermissionError, match="upgrade"):
        CostGuard("1", on_exceeded=instead).on_request(spending("0", "2"))


def test_a_guard_without_the_sums_it_needs_says_so() -> None:
    with pytest.raises(InvalidValue, match="needs_spent = True"):
        CostGuard("1").on_request(a_context())


@pytest.mark.parametrize("limit", [1.5, 0, -1, "0", "-0.01", "abc", "", "NaN", "Infinity", True, None, "$5"])
def test_a_limit_is_exact_money(limit: Any) -> None:
    with pytest.raises(
        InvalidValue, match=re.escape(f'US dollars, over 0, as a string, Decimal or int: "2.50", not {limit!r}')
    ):
        CostGuard(limit)


def test_what_a_guard_cannot_use_is_refused() -> None:
    async def later(error: Exception) -> None: ...

    with pytest.raises(InvalidValue, match='per "chat" or per "turn", not \'user\''):
        CostGuard("1", per="user")  # type: ignore[arg-type]
    for given in (later, "print"):
        with pytest.raises(InvalidValue, match="must be a plain function"):
            CostGuard("1", on_exceeded=given)  # type: ignore[arg-type]


# PIIMask

MASK = "[REDACTED]"


@pytest.mark.parametrize(
    "personal",
    [
        *("bob@example.com", "jörg.müller+news@mail.example.co.uk", "x_1@sub-domain.example.museum"),
        *("+1 (555) 123-4567", "+491701234567", "+49 170 1234567", "+44 (0)20 7946 0958", "+33.1.42.68.53.00"),
        *("555-123-4567", "(212) 555-0100", "212.555.0100", "1-800-555-0199", "(212)555-0100"),
        *("4111111111111111", "4111 1111 1111 1111", "4111-1111-1111-1111", "378282246310005", "3782 822463 10005"),
        *("6304000000000000", "3056 930902 5904", "5555555555554444"),
        *("DE89370400440532013000", "DE89 3704 0044 0532 0130 00", "GB82 WEST 1234 5698 7654 32"),
        *("nl91abna0417164300", "FR14 2004 1010 0505 0001 3M02 606", "NO9386011117947"),
        *("123-45-6789",),
    ],
)
def test_personal_data_is_masked_wherever_it_stands(personal: str) -> None:
    mask = PIIMask(stored=True)
    for around in ("{}", "{}.", "({})", "it is {}, I think", "a:{}\nb", "4 {}, 123 Main St", "<{}>", '"{}"'):
        assert mask.stored_text(around.format(personal)) == around.format(MASK)


def test_numbers_beside_a_card_do_not_hide_it() -> None:
    text = "Since 2023 4111 1111 1111 1111 123 Main St, DE89 3704 0044 0532 0130 00 IS MY IBAN"
    assert PIIMask(stored=True).stored_text(text) == f"Since 2023 {MASK} 123 Main St, {MASK} IS MY IBAN"


@pytest.mark.parametrize(
    "text",
    [
        "Order 1234567890123456 of 2024-10-25 2024-10-26, 12:30:45 +0100, at 1729857600000",
        "4111111111111112 and 4111 1111 1111 1112: check digits are wrong, as in DE89 3704 0044 0532 0130 01",
        "0.4111111111111111, 3.14159, 331 002 651, 1,234,567,890, 5551234567, 10000-2000-3000",
        "550e8400-e29b-41d4-a716-446655440000 v1.2.3.4 192.168.1.1 978-0-306-40615-7 a4111111111111111",
        "@app.route pkg@1.2.3 x@y a @ b.com me@localhost C++11 +12345678901234567890",
        "000-12-3456 666-12-3456 900-12-3456 123-00-4567 123-45-0000 1-123-45-6789",
        "",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text: str) -> None:
    assert PIIMask(stored=True).stored_text(text) == text


@pytest.mark.parametrize("mask", [MASK, "x", "4111111111111111", "a@b.cc", "-", '"', "aa", "[mm]"])
def test_to_mask_twice_changes_nothing(mask: str) -> None:
    text = "bob@example.com,ann@example.com 4111111111111111555-123-4567 a@b.cc +4917012345678 555-123-4567-123-45-6789"
    middleware = PIIMask(mask, {"word": r"\bm\w+"}, stored=True)
    for given in (text, json.dumps({"to": text, "n": 4111111111111111}), f"mask {text} mask{mask}mask"):
        once = middleware.stored_text(given)
        assert once != given
        assert middleware.stored_text(once) == once


def test_every_text_that_the_model_is_shown_is_masked_and_nothing_else() -> None:
    thinking = [{"type": "thinking", "thinking": "bob@example.com", "signature": "a@b.com"}]
    call = {"id": "a@b.com", "type": "function", "function": {"name": "mail", "arguments": '{"to": "bob@example.com"}'}}
    picture = {"type": "image_url", "image_url": {"url": "https://example.com/a@b.com.png"}}
    signed = {"type": "redacted_thinking", "text": "bob@example.com"}
    messages: list[Message] = [
        {"role": "system", "content": "Support is at help@example.com"},
        {"role": "user", "content": [{"type": "text", "text": "I am bob@example.com"}, picture, signed]},
        {
            "role": "assistant",
            "content": None,
            "thinking_blocks": thinking,
            "reasoning_content": "bob@example.com",
            "tool_calls": [call],
        },
        {"role": "tool", "tool_call_id": "a@b.com", "content": "sent to bob@example.com"},
        {"role": "assistant", "content": "Done."},
    ]
    before = json.dumps(messages)
    context = a_context(messages=messages)
    PIIMask().on_request(context)
    assert json.dumps(messages) == before
    expected = json.loads(before)
    expected[0]["content"] = f"Support is at {MASK}"
    expected[1]["content"][0]["text"] = f"I am {MASK}"
    expected[2]["tool_calls"][0]["function"]["arguments"] = f'{{"to": "{MASK}"}}'
    expected[3]["content"] = f"sent to {MASK}"
    assert context.messages == expected


def test_a_data_url_is_never_touched() -> None:
    url = "data:image/png;base64,AA/4111111111111111/+14155550100200=="
    mask = PIIMask(stored=True)
    assert mask.stored_text(f"![a]({url}) bob@example.com {url}") == f"![a]({url}) {MASK} {url}"
    assert mask.stored_text(json.dumps({"u": url, "t": "a@b.com"})) == json.dumps({"u": url, "t": MASK})


def test_json_stays_json_to_the_letter_around_what_is_masked() -> None:
    given = (
        '{"to":"bob@example.com",  "n": [4111111111111111, -4111111111111111, 1.50, 1e3, true, null],'
        '"escaped":"\\u0062ob\\u0040example.com\\n555-123-4567 \\"é\\"", "é\\u00e9": "é\\u00e9", "a@b.com": {}}'
    )
    masked = PIIMask('a "b" \\', stored=True).stored_text(given)
    assert masked.startswith('{"to":"a \\"b\\" \\\\",  "n": [')
    assert "1.50, 1e3, true, null]" in masked
    assert '"é\\u00e9": "é\\u00e9"' in masked
    it = 'a "b" \\'
    assert json.loads(masked) == {
        "to": it,
        "n": [it, it, 1.5, 1000, True, None],
        "escaped": f'{it}\n{it} "é"',
        "éé": "éé",
        it: {},
    }
    assert PIIMask('"', stored=True).stored_text('"a@b.com"') == '"\\""'
    assert PIIMask(stored=True).stored_text('{"to": "a@b.com"') == f'{{"to": "{MASK}"'
    deep = "[" * 100_000
    assert PIIMask(stored=True).stored_text(deep + "a@b.com") == deep + MASK


def test_patterns_add_to_ours_take_their_place_or_do_away_with_them() -> None:
    text = "ORD-17 for bob@example.com or 555-123-4567"
    more = PIIMask(patterns={"order": r"ORD-\d+"}, stored=True)
    assert more.stored_text(text) == f"{MASK} for {MASK} or {MASK}"
    instead = PIIMask(patterns={"email": re.compile("BOB", re.IGNORECASE), "phone": None}, stored=True)
    assert instead.stored_text(text) == f"ORD-17 for {MASK}@example.com or 555-123-4567"
    grouped = PIIMask(patterns={"order": r"(ORD)-(\d+)|x*|$"}, stored=True)
    assert grouped.stored_text("an ORD-17 xx") == f"an {MASK} {MASK}"


def test_the_database_keeps_what_was_said_unless_told_otherwise() -> None:
    assert PIIMask().stored_text("bob@example.com") == "bob@example.com"
    assert PIIMask(stored=True).stored_text("bob@example.com") == MASK


def test_what_a_mask_cannot_use_is_refused() -> None:
    for mask in ("", None, 5):
        with pytest.raises(InvalidValue, match="the mask of a PIIMask must be some text"):
            PIIMask(mask)  # type: ignore[arg-type]
    for pattern in ("(", b"a", re.compile(b"a"), 5):
        with pytest.raises(InvalidValue, match="the pattern 'order' of a PIIMask is no regular expression of text"):
            PIIMask(patterns={"order": pattern})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "piece", ["x", "1", "a@", "4111 ", "+1 ", "DE89 3704 ", "(555) ", "a.", '\\"', ";a=b", "QUJD/+12"]
)
def test_a_long_text_is_read_once_and_not_over_and_over(piece: str) -> None:
    start = "data:a/b" if piece == ";a=b" else ""
    text = start + piece * (300_000 // len(piece))
    began = time.process_time()
    assert PIIMask(stored=True).stored_text(text) == text
    assert time.process_time() - began < 10  # were it to grow with the square of the length: a minute


# UsageLogger


REPLY = Reply(
    content="My key is sk-secret",
    usage=Usage(input_tokens=1200, output_tokens=34, cached_tokens=1000, thinking_tokens=5),
    cost=Decimal("0.00000150"),
    model="gpt-4o-2024",
    provider="azure",
)


def test_each_reply_is_a_line_with_its_figures(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llm_orm.usage")
    UsageLogger(prefix="[shop 5%] ").on_response(a_context(round=2, duration_ms=412), REPLY)
    [record] = caplog.records
    assert (record.name, record.levelno) == ("llm_orm.usage", logging.INFO)
    assert record.getMessage() == (
        f"[shop 5%] chat {CHAT}, call 2 of azure/gpt-4o-2024: 1200 tokens in (1000 cached), 34 out (5 thinking), "
        "$0.00000150, 412 ms"
    )
    figures = {
        "chat_id": CHAT,
        "turn_id": TURN,
        "model": "gpt-4o-2024",
        "provider": "azure",
        "round": 2,
        "input_tokens": 1200,
        "output_tokens": 34,
        "cached_tokens": 1000,
        "thinking_tokens": 5,
        "cost": Decimal("0.00000150"),
        "duration_ms": 412,
    }
    assert {name: value for name, value in vars(record).items() if name in figures} == figures


def test_a_reply_without_a_price_is_unpriced(caplog: pytest.LogCaptureFixture) -> None:
    UsageLogger(logging.getLogger("shop"), logging.WARNING).on_response(a_context(), Reply())
    [record] = caplog.records
    assert (record.name, record.levelno, vars(record)["cost"]) == ("shop", logging.WARNING, None)
    assert record.getMessage() == (
        f"chat {CHAT}, call 0 of openai/gpt-4o: 0 tokens in (0 cached), 0 out (0 thinking), unpriced, 0 ms"
    )


def test_of_an_error_the_class_alone_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    UsageLogger().on_error(a_context(round=1), TimeoutError("Bearer sk-secret: what Bob said"))
    [record] = caplog.records
    assert record.getMessage() == f"chat {CHAT}, call 1 of openai/gpt-4o failed: TimeoutError"
    assert (record.levelno, vars(record)["error"], record.exc_info) == (logging.WARNING, "TimeoutError", None)
    assert "secret" not in repr(vars(record))


def test_a_level_is_a_number() -> None:
    with pytest.raises(InvalidValue, match=r"as logging.INFO is, not 'INFO'"):
        UsageLogger(level="INFO")  # type: ignore[arg-type]


# SchemaSelfCorrection


class City(pydantic.BaseModel):
    name: str
    people: int


def test_a_reply_that_does_not_match_is_sent_back_with_what_is_wrong() -> None:
    context = a_context(schema=Schema.of(City))
    assert SchemaSelfCorrection().on_response(context, Reply(content='{"people": "many"}')) == RETRY(
        "Your previous reply did not match the required JSON schema. name: Field required; "
        "people: Input should be a valid integer, unable to parse string as an integer\n\n"
        "Answer with the corrected JSON only."
    )
    empty = SchemaSelfCorrection().on_response(context, Reply(content=None))
    assert isinstance(empty, RETRY)
    assert "the reply is not valid JSON" in empty.message


def test_it_is_sent_back_as_often_as_was_said() -> None:
    bad = Reply(content="Bonn")
    for most, rounds, expected in ((2, 1, True), (2, 2, False), (0, 0, False), (3, 2, True)):
        context = a_context(schema=Schema.of(City), correction_rounds=rounds)
        assert isinstance(SchemaSelfCorrection(most).on_response(context, bad), RETRY) is expected


def test_nothing_is_said_of_a_good_reply_of_tool_calls_and_without_a_schema() -> None:
    correction, context = SchemaSelfCorrection(), a_context(schema=Schema.of(City))
    assert correction.on_response(context, Reply(content='{"name": "Bonn", "people": 3}')) is None
    assert correction.on_response(context, Reply(content="Wait", tool_calls=(ToolCall("1", "ask", "{}"),))) is None
    assert correction.on_response(a_context(), Reply(content="Bonn")) is None


@pytest.mark.parametrize("given", [-1, 1.0, "2", None, True])
def test_a_number_of_retries_is_a_whole_number(given: Any) -> None:
    with pytest.raises(InvalidValue, match="max_retries must be a whole number"):
        SchemaSelfCorrection(given)

"""Values of columns ↔ JSON, without loss: money as text, times in ISO, bytes in base64."""

import base64
import binascii
import json
import math
import re
from collections.abc import Callable
from datetime import date, datetime, time
from decimal import Decimal, InvalidOperation
from typing import Any
from uuid import UUID

import peewee as pw

from ..records import MoneyField, TimeField


def as_json(value: Any) -> Any:
    """A value as JSON has it: money and other decimals as text, times in ISO, bytes in base64; JSON as it is."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return decimal_text(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float | dict | list) else str(value)


def decimal_text(value: Decimal) -> str:
    """All of its digits, without an exponent, and without zeros at the end: the same from both databases."""
    if not value.is_finite():
        return str(value)
    text = f"{value:f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) or "0"


def dumped(value: Any, *, in_order: bool = False) -> str:
    """JSON on one line; the keys sorted, so that the same rows are the same text whichever database they are in."""
    text = json.dumps(value, ensure_ascii=False, default=str, sort_keys=not in_order)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which only an escape can write
        return json.dumps(value, default=str, sort_keys=not in_order)
    return text.translate(_LINE_ENDS)


_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
"""Within a text they are no ends of a line, and some who read lines take them for that."""


# JSON → what a field takes


class NotOne(ValueError):
    """A value that is none of those that there are."""


def readers(record: Any) -> dict[str, Callable[[Any], Any]]:
    by_name = {each.column_name: _reader(each) for each in record._meta.sorted_fields}
    for name, check in record.checks:
        by_name[name] = _one_of(re.findall(r"'(\w+)'", check))
    if "content_raw" in by_name:
        by_name["content_raw"] = _object
        by_name["position"] = _position
    return by_name


def _reader(given: Any) -> Callable[[Any], Any]:
    """What makes a value of JSON one that the field takes; values of Python go through."""
    each = given.rel_field if isinstance(given, pw.ForeignKeyField) else given
    kinds: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
        (TimeField, _moment),
        (MoneyField, _dollars),
        (pw.UUIDField, lambda value: value if isinstance(value, UUID) else UUID(_of(str, value))),
        (pw.BooleanField, lambda value: _of(bool, value)),
        (pw.IntegerField, _whole),
        (pw.DecimalField, lambda value: Decimal(str(value))),
        ((pw.FloatField, pw.DoubleField), float),
        (pw.DateTimeField, lambda value: _read_as(datetime, value)),
        (pw.DateField, lambda value: _read_as(date, value)),
        (pw.TimeField, lambda value: _read_as(time, value)),
        (pw.BlobField, _bytes),
        (pw.JSONField, lambda value: value),
        ((pw.TextField, pw.CharField), lambda value: _of(str, value)),
    )
    for kind, read in kinds:
        if isinstance(each, kind):
            return read
    return lambda value: json.dumps(value) if isinstance(value, dict | list) else value


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _position(value: Any) -> int:
    if _whole(value) < 0:
        raise NotOne("the first is 0")
    return value


def _object(value: Any) -> dict[str, Any]:
    return _of(dict, value)


def _one_of(known: list[str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in known:
            raise NotOne(f"it is one of {', '.join(known)}")
        return value

    return read


def _moment(value: Any) -> datetime:
    read = _read_as(datetime, value)
    if read.tzinfo is None:
        raise NotOne("it needs a time zone, as in 2026-11-01T12:00:00+00:00")
    return read


def _read_as(kind: Any, value: Any) -> Any:
    return value if isinstance(value, kind) else kind.fromisoformat(_of(str, value))


def _dollars(value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise TypeError
    read = Decimal(str(value))
    if not read.is_finite():
        raise InvalidOperation
    return read


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(_of(str, value), validate=True)
    except binascii.Error as error:
        raise NotOne(f"it is no base64: {error}") from error

"""Which chats, and which span of time: what `where=`, `since=` and `until=` mean wherever they are taken."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Any
from uuid import UUID

import peewee as pw

from .checks import as_key, check_keywords, check_storable, clear_about
from .errors import InvalidValue
from .records import now
from .statements import Sql
from .store import Store

Where = Mapping[str, Any]
"""{"user_id": "u_1", "id": [one, another], "metadata.plan": "free"}: all of them hold; of several values, one does."""

Moment = datetime | date | timedelta | str
"""An aware time; a day, which is its first moment; a span of time, so long ago; or one of them as text: "2026-11-01",
"2026-11-01T12:00:00+01:00", "7d", "24h"."""

NAMED = ("id", "model", "provider", "agent_class")
"""What chats may be looked for by, besides the application's columns and "metadata.key"."""

METADATA = "metadata."


# Which chats


def chat_conditions(store: Store, call: str, where: Any, *, may_be_unset: bool = True) -> list[Any]:
    """What is true of the chats that are meant, of peewee; every name and value is looked at before anything is read.

    may_be_unset    whether None is a chat without such a key in its metadata: for who erases, it is more likely a slip

    Raises `InvalidValue` and `UnknownKeyword`, which name the call.
    """
    if not isinstance(where, Mapping) or not where:
        raise InvalidValue(f'{call} needs to be told which chats: where={{"user_id": "u_1"}}, not {where!r}')
    check_where(store, call, where, NAMED)
    own, record = store.chat_columns, store.records.chat
    conditions: list[Any] = []
    for name, given in where.items():
        values = values_of(given)
        if name.startswith(METADATA):
            alternatives = [_metadata_condition(store, name, value, may_be_unset) for value in values]
        elif name == "id":
            alternatives = [record.id.in_([chat_id(value) for value in values])]
        elif name == "agent_class":
            alternatives = [_has_agent(store, values)]
        else:
            field, known = getattr(record, name), [value for value in values if value is not None]
            alternatives = [field.in_(known)] if known else []
            alternatives += [field.is_null()] if len(known) < len(values) else []
        conditions.append(_any_of(alternatives))
    with clear_about(call, {name: value for name, value in where.items() if name in own}), store.connection():
        list(record.select(record.id).where(*conditions).limit(0))  # what no database can compare is refused here
    return conditions


def check_where(store: Store, call: str, where: Any, named: Sequence[str]) -> None:
    """Refuse what is not like {"user_id": "u_1", …}, with names that are among these, columns, or metadata.key."""
    if not isinstance(where, Mapping):
        raise InvalidValue(f'{call}: where is like {{"user_id": "u_1"}}, not {where!r}')
    own = store.chat_columns
    if not all(isinstance(name, str) for name in where):
        raise InvalidValue(f"{call}: where has names that are no strings: {where!r}")
    plain = {name: value for name, value in where.items() if not name.startswith(METADATA)}
    check_keywords(call, plain, (*named, "metadata.<key>", *own), columns=own)
    for name, given in where.items():
        values = values_of(given)
        if name == METADATA:
            raise InvalidValue(f'{call}: {METADATA!r} has no key behind it: write "metadata.plan"')
        for value in (name, *values):
            if isinstance(value, str):
                check_storable(f"where={name!r}", value)
        if not values:
            raise InvalidValue(f"{call}: where={name!r} has no value")


def values_of(given: Any) -> list[Any]:
    """The values that a name of `where` may have."""
    return list(given) if isinstance(given, list | tuple | set | frozenset) else [given]


def chat_id(given: Any) -> UUID:
    key = as_key(given)
    if key is None:
        raise InvalidValue(f"{given!r} is not the id of a chat")
    return key


def metadata_is(store: Store, name: str, value: Any, column: str = '"metadata"') -> tuple[str, tuple]:
    """What is true where "metadata.key" of a column has a value, as SQL and what goes into it."""
    key = name.removeprefix(METADATA)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number or isinstance(value, str | bool)):
        raise InvalidValue(f"where={name!r} is {value!r}: metadata is compared with a text, a number or a bool")
    if not store.is_sqlite:
        return f"({column} -> %s) = %s::jsonb", (key, json.dumps(value))
    kinds = "'integer', 'real'" if is_number else "'text'" if isinstance(value, str) else "'true', 'false'"
    return (
        f"EXISTS (SELECT 1 FROM {_entries(column)} "
        f"WHERE entry.key = ? AND entry.type IN ({kinds}) AND entry.value = ?)",
        (key, value),
    )


def metadata_json(store: Store, name: str, column: str = '"metadata"') -> tuple[str, tuple]:
    """The value of "metadata.key" of a column as JSON, as SQL; NULL for null, and where there is none."""
    key = name.removeprefix(METADATA)
    if not store.is_sqlite:
        return f"NULLIF(({column} -> %s)::text, 'null')", (key,)
    return (
        "(SELECT CASE entry.type WHEN 'text' THEN json_quote(entry.value) WHEN 'true' THEN 'true' "
        "WHEN 'false' THEN 'false' WHEN 'null' THEN NULL ELSE CAST(entry.value AS TEXT) END "
        f"FROM {_entries(column)} WHERE entry.key = ?)",
        (key,),
    )


def _entries(column: str) -> str:
    return f"json_each(CASE WHEN json_valid({column}) THEN {column} ELSE '{{}}' END) AS entry"


def _metadata_condition(store: Store, name: str, value: Any, may_be_unset: bool) -> Any:
    """What is true of a chat whose metadata has the value; or that of its agent's session, where its own has none."""
    chat, session = store.records.chat, store.records.agent_session
    text, params = metadata_json(store, name)
    is_unset = pw.SQL(f"{text} IS NULL", params)
    has_sessions = store.has_table(session)
    if value is None and may_be_unset:
        set_there = session.select(session.chat).where(pw.SQL(f"{text} IS NOT NULL", params))
        return is_unset & chat.id.not_in(set_there) if has_sessions else is_unset
    condition = pw.SQL(*metadata_is(store, name, value))
    there = session.select(session.chat).where(condition)
    return condition | (is_unset & chat.id.in_(there)) if has_sessions else condition


def _has_agent(store: Store, names: list[Any]) -> Any:
    chat, session = store.records.chat, store.records.agent_session
    known = [name for name in names if name is not None]
    alternatives = [chat.id.in_(session.select(session.chat).where(session.agent_class.in_(known)))] if known else []
    alternatives += [chat.id.not_in(session.select(session.chat))] if len(known) < len(names) else []
    return _any_of(alternatives)


def _any_of(conditions: Sequence[Any]) -> Any:
    """One of them: as a tree, for a chain of hundreds is too deep for Python, and for SQLite."""
    middle = len(conditions) // 2
    return (_any_of(conditions[:middle]) | _any_of(conditions[middle:])) if middle else conditions[0]


# Which span of time

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def moment(name: str, given: Any, tz: tzinfo = UTC) -> datetime | None:
    """What `since` or `until` was given as, in UTC; None for None. Days are days of the time zone.

    Raises `InvalidValue`.
    """
    if given is None:
        return None
    try:
        read = _read(given) if isinstance(given, str) else given
        if isinstance(read, timedelta):
            return now() - read
        if isinstance(read, datetime):
            if read.tzinfo is None and isinstance(given, datetime):
                raise InvalidValue(f"{name}={given!r} has no time zone: give it one, as datetime.now(UTC) has")
            return (read if read.tzinfo else read.replace(tzinfo=tz)).astimezone(UTC)
        if isinstance(read, date):
            return datetime.combine(read, time.min, tz).astimezone(UTC)
    except InvalidValue:
        raise
    except (ValueError, OverflowError):
        pass
    raise InvalidValue(
        f'{name}={given!r} is not a time: write "2026-11-01", "2026-11-01T12:00:00+01:00", "7d" or "24h"'
    )


def span(since: Any, until: Any, tz: tzinfo = UTC) -> tuple[datetime | None, datetime | None]:
    """(from this moment on, before this one), in UTC; None: without a bound. Raises `InvalidValue`."""
    first, end = moment("since", since, tz), moment("until", until, tz)
    if first is not None and end is not None and first >= end:
        raise InvalidValue(f"since={since!r} is not before until={until!r}: nothing is between them")
    return first, end


def _read(text: str) -> datetime | date | timedelta:
    ago = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([smhdw])\s*", text.lower())
    if ago:
        return timedelta(seconds=float(ago[1]) * SECONDS[ago[2]])
    text = text.strip()
    return date.fromisoformat(text) if re.fullmatch(r"\d{4}-\d\d-\d\d", text) else datetime.fromisoformat(text)


def within(store: Store, at: str, first: datetime | None, end: datetime | None) -> list[Sql]:
    """What is true of a column of times from a moment on, and before another; None: without a bound."""
    bounds = ((first, ">="), (end, "<"))
    return [
        Sql(f"{at} {sign} {store.database.param}", (stored_time(bound),)) for bound, sign in bounds if bound is not None
    ]


def stored_time(moment: datetime) -> str:
    """As a driver is given it; on SQLite, as the column holds it."""
    return moment.astimezone(UTC).isoformat(" ", "microseconds")

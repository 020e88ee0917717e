"""Sums over what was spent, made in the database."""

from decimal import Decimal
from typing import Any
from uuid import UUID

import peewee as pw

from .records import MoneyField, money
from .store import Store
from .values import Stats


def stats_of(
    store: Store, *, chat_id: UUID | None = None, message_id: UUID | None = None, tool_calls: bool = True
) -> Stats:
    """Sums over the requests of one chat, of one reply, or of all; one query."""
    request: Any = store.records.request
    tool_call: Any = store.records.tool_call
    fn, total = pw.fn, lambda column: pw.fn.COALESCE(pw.fn.SUM(column), 0)
    calls: Any = pw.Value(0)
    if tool_calls:
        calls = tool_call.select(fn.COUNT(tool_call.id))
        calls = calls.where(tool_call.chat == chat_id) if chat_id else calls
    query = request.select(
        total(request.input_tokens),
        total(request.output_tokens),
        total(request.input_tokens) + total(request.output_tokens),  # one row's may be more than an INTEGER holds
        total(request.cached_tokens),
        total(request.cache_write_tokens),
        total(request.thinking_tokens),
        total(summable(store, request.cost)).coerce(False),
        fn.COUNT(request.id),
        total(pw.Case(None, [(request.error.is_null(False), 1)], 0)),
        total(pw.Case(None, [(request.cost.is_null(), 1)], 0)),
        calls,
        total(request.duration_ms),
    )
    if chat_id:
        query = query.where(request.chat == chat_id)
    if message_id:
        query = query.where(request.message == message_id)
    store.pay()
    row = store.found(query.tuples())[0]
    counts = [value if index == 6 else int(value) for index, value in enumerate(row)]
    return Stats(**{**dict(zip(Stats.__slots__, counts, strict=True)), "cost": dollars(store, row[6])})


PLACES = -MoneyField.places.adjusted()


def summable(store: Store, cost: pw.Field) -> Any:
    # SQLite adds doubles up, with an error that grows with the rows; whole numbers of the last place add up exactly.
    return pw.fn.ROUND(cost * pw.Value(10**PLACES, converter=False)).cast("INTEGER") if store.is_sqlite else cost


def summed(store: Store, cost: str) -> str:
    """The SQL that adds costs up exactly; `dollars` reads what comes of it."""
    return f"SUM(CAST(ROUND({cost} * {10**PLACES}) AS INTEGER))" if store.is_sqlite else f"SUM({cost})"


def dollars(store: Store, total: Any) -> Decimal:
    """What a sum of costs comes to; 0 for that of none."""
    if total is None:
        return Decimal(0)
    return money(Decimal(total).scaleb(-PLACES) if store.is_sqlite else total)

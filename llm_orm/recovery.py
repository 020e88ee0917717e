"""Turns whose process died: found, and ended with all that they had said."""

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import peewee as pw

from .checks import as_key
from .errors import InvalidValue, WrongKey
from .middleware import methods_of, stored
from .records import now
from .stopped import age_of, end
from .store import Store, as_store

OLDER_THAN_S = 900.0


@dataclass(frozen=True, slots=True)
class Recovered:
    """A turn that gave no sign of life.

    outcome    "completed": its reply was there whole; "kept": what it had said stays, as incomplete; "removed": it had
               said nothing, and the user's message is left unanswered; None: a dry run, nothing was done
    silent_s   seconds since its last sign of life
    text       what it had said, if anything
    """

    chat_id: UUID
    message_id: UUID
    silent_s: float
    text: str | None = None
    outcome: str | None = None


def recover(
    store: "Store | pw.Database | str | None" = None,
    *,
    older_than: float = OLDER_THAN_S,
    chat_id: "UUID | str | None" = None,
    dry_run: bool = False,
) -> list[Recovered]:
    """End the turns whose process died, so that nothing is left pending; what each of them came to.

    older_than    seconds without a sign of life, 10 or more, after which a turn counts as dead; 0: at once
    chat_id       of this chat only

    What a middleware keeps from being stored is kept from it here, too, where the store has it (`connect(…,
    middlewares=)`), for those of a chat are not known here. Raises `WrongKey` where a turn cannot be read, once the
    others are ended.

    A turn that is alive, or waits for a person's approval, is left alone, and so is one that another process takes up
    at this moment. To go on with a turn rather than to end it, call `load_chat(…).resume()` before.
    """
    store = as_store(store)
    is_number = isinstance(older_than, int | float) and not isinstance(older_than, bool)
    if not is_number or not math.isfinite(older_than) or not (older_than == 0 or older_than >= 10):
        raise InvalidValue(f"older_than={older_than!r}: give 0, or 10 seconds or more: a turn is heard of every five")
    record: Any = store.records.message
    dead = [
        record.status == "pending",
        record.parked_at.is_null(),
        record.updated_at <= now() - timedelta(seconds=older_than),
    ]
    if chat_id is not None:
        key = as_key(chat_id)
        if key is None:
            raise InvalidValue(f"{chat_id!r} is not the id of a chat")
        dead.append(record.chat == key)
    # Sorted here: SQLite goes through all messages for an order, and else only through the few that are pending.
    found = store.found(record.select(record.id, record.created_at).where(*dead))
    ids = [row.id for row in sorted(found, key=lambda row: (row.created_at, row.id))]
    masks = methods_of(store.middlewares, "stored_text")
    tables = {
        "stores_tool_calls": store.has_table(store.records.tool_call),
        "stores_requests": store.has_table(store.records.request),
    }
    recovered, unreadable = [], []
    for message_id in ids:
        outcome = None
        try:
            for message in store.found(record.select().where(record.id == message_id, *dead)):
                if not dry_run:
                    kept = (lambda text: stored(masks, text)) if masks else None
                    outcome = end(store, message, keep=_has_said(message), kept=kept, **tables)
                    if outcome is None:
                        continue  # it was taken up at this moment
                silent_s = age_of(message.updated_at)
                recovered.append(Recovered(message.chat_id, message.id, silent_s, message.content, outcome))
        except WrongKey as error:  # the others are ended all the same
            unreadable.append(error)
    if unreadable:
        raise unreadable[0]
    return recovered


def _has_said(message: Any) -> bool:
    return bool(message.content or message.content_raw)

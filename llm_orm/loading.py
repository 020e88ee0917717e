"""Making and loading chats."""

from typing import Any
from uuid import UUID

import peewee as pw

from .budgets import check_against
from .chat import Chat
from .checks import (
    OVERRIDES,
    STORED,
    as_key,
    check_overrides,
    check_scalar,
    clear_about,
    columns_of,
    options_of,
    stored_metadata,
)
from .options import NAMES as OPTIONS
from .records import LlmChat, uuid7
from .store import Store, as_store


def create_chat(store: Store | pw.Database | str | None = None, **keywords: Any) -> Chat:
    """A new chat, stored.

    store       a Store, a peewee Database or a URL; None as in `connect`
    stored      model, provider, instructions, metadata (any JSON), and the application's own columns of the chat
    not stored  every option of `Options`: llm, tools, schema, temperature, thinking, middlewares, retries, …

    Raises `UnknownKeyword` for a keyword that is none of these, `InvalidValue` for a value that cannot be stored, both
    before anything is written.
    """
    store = as_store(store)
    columns = columns_of(store, "create_chat()", keywords, (*STORED, *OPTIONS))
    options = options_of(keywords)
    check_against(store.records.chat, options.budgets)
    stored = {name: keywords[name] for name in OVERRIDES if name in keywords}
    check_overrides(stored)
    stored["metadata"] = stored_metadata(keywords.get("metadata"))
    with store.connection(), clear_about("create_chat()", columns):
        record = store.records.chat.create(id=uuid7(), **stored, **columns)
    return Chat(store, record, options)


def load_chat(store: Store | pw.Database | str | None, chat_id: UUID | str | None, **keywords: Any) -> Chat | None:
    """The stored chat, or None where there is none of that id, or its columns are not as said.

    keywords    the options of `Options`, which are not stored; model, provider and instructions, in place of the stored
                ones for as long as this object lives; and columns of the application, which must match, so that one
                tenant cannot load another's chat: load_chat(store, chat_id, user_id="u_1")
    """
    store = as_store(store)
    columns = columns_of(store, "load_chat()", keywords, (*OVERRIDES, *OPTIONS))
    overrides = {name: keywords[name] for name in OVERRIDES if name in keywords}
    check_overrides(overrides)
    options = options_of(keywords)
    check_against(store.records.chat, options.budgets)
    found = find_chat(store, "load_chat()", as_key(chat_id), columns)
    return Chat(store, found, options, overrides) if found is not None else None


def find_chat(store: Store, call: str, key: UUID | None, columns: dict[str, Any]) -> LlmChat | None:
    """The chat's row, where its columns are as said."""
    for name, value in columns.items():
        check_scalar(call, name, value)
    if key is None:
        return None
    record = store.records.chat
    matches = [
        getattr(record, name).is_null() if value is None else getattr(record, name) == value
        for name, value in columns.items()
    ]
    with clear_about(call, columns):
        found = store.found(record.select().where(record.id == key, *matches))
    return found[0] if found else None


async def acreate_chat(store: Store | pw.Database | str | None = None, **keywords: Any) -> Chat:
    """`create_chat`, from asyncio."""
    store = as_store(store)
    return await store.off_the_loop(lambda: create_chat(store, **keywords))


async def aload_chat(
    store: Store | pw.Database | str | None, chat_id: UUID | str | None, **keywords: Any
) -> Chat | None:
    """`load_chat`, from asyncio."""
    store = as_store(store)
    return await store.off_the_loop(lambda: load_chat(store, chat_id, **keywords))

"""What requests and tool calls are grouped and filtered by, each as SQL.

The SQL is over these aliases: r a request, t a tool call, c the chat, s the agent's session. What is said of a tool
call by its request is of the one that asked for it.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import peewee as pw

from .errors import InvalidValue
from .filters import METADATA, Where, chat_id, check_where, metadata_is, metadata_json, values_of
from .statements import Sql
from .store import Store
from .values import as_uuid

OF_REQUESTS = ("provider", "model", "status", "error", "source", "streamed")
NAMED = (*OF_REQUESTS, "agent_class", "chat", "tool")
"""Dimensions besides the application's columns of the chat and "metadata.key"."""


@dataclass(frozen=True, slots=True)
class Dimension:
    name: str
    sql: Sql
    needs: str = ""
    """The aliases that must be joined, besides the one that is counted: "cs"."""
    read: Callable[[Any], Any] = lambda value: value
    """What the database gave → what the caller gets; never called with None."""
    write: Callable[[Any], Any] = lambda value: value
    """What the caller gave → what the driver is given."""

    def is_one_of(self, store: Store, values: list[Any]) -> Sql:
        """What is true where it has one of the values."""
        known = [value for value in values if value is not None]
        texts, params = [], []
        if known and self.name.startswith(METADATA):
            for value in known:
                text, more = _has_in_metadata(store, self.name, value)
                texts.append(text)
                params += more
        elif known:
            marks = ", ".join([store.database.param] * len(known))
            texts.append(f"{self.sql.text} IN ({marks})")
            params += [*self.sql.params, *map(self.write, known)]
        if len(known) < len(values):
            texts.append(f"{self.sql.text} IS NULL")
            params += self.sql.params
        return Sql(f"({' OR '.join(texts)})", tuple(params))


def dimension(store: Store, name: str, *, of_tools: bool = False, ours: Sequence[str] = NAMED) -> Dimension:
    """The dimension of a name that is known, of requests or of tool calls.

    A column of the application that is called as one of `ours` is not meant by it: what `metrics` and the dashboard ask
    for is the same in each store.
    """
    if name.startswith(METADATA):
        return Dimension(name, _metadata(store, name), "cs", json.loads)
    if name in store.chat_columns and name not in ours:
        field = getattr(store.records.chat, name)
        sql = Sql(f'c."{field.column_name}"')
        return Dimension(name, sql, "c", field.python_value, _plain(field.db_value))
    made = _NAMED[name]
    return replace(made, needs="r") if of_tools and name in OF_REQUESTS else made


def check_names(store: Store, call: str, names: Iterable[str], times: tuple[str, ...]) -> None:
    """Refuse what is no dimension; raises `InvalidValue` and `UnknownKeyword`."""
    known = (*times, *NAMED)
    check_where(store, call, dict.fromkeys(names), known)


def conditions(
    store: Store, call: str, where: Where | None, *, of_tools: bool = False, ours: Sequence[str] = NAMED
) -> tuple[list[Sql], set[str]]:
    """What `where` says, as SQL, and the aliases that it needs. Raises `InvalidValue` and `UnknownKeyword`."""
    check_where(store, call, {} if where is None else where, NAMED)
    found: list[Sql] = []
    needs: set[str] = set()
    for name, given in (where or {}).items():
        each = dimension(store, name, of_tools=of_tools, ours=ours)
        try:
            found.append(each.is_one_of(store, values_of(given)))
        except (TypeError, ValueError, OverflowError) as error:  # InvalidValue among them, of one value
            raise InvalidValue(f"{call}: where={name!r} cannot be {given!r}: {error}") from error
        needs |= set(each.needs)
    return found, needs


def own_columns(store: Store, where: Where | None) -> dict[str, Any]:
    """What `where` says of columns of the application, whose values only the database can judge."""
    return {name: value for name, value in (where or {}).items() if name in store.chat_columns}


def joins(store: Store, needs: set[str], *, of_tools: bool = False) -> str:
    """FROM with what is counted, and what is known of it."""
    records = store.records
    request, tool_call, chat, session = map(
        _table, (records.request, records.tool_call, records.chat, records.agent_session)
    )
    counted = "t" if of_tools else "r"
    text = f"{tool_call} t" if of_tools else f"{request} r"
    if "r" in needs and of_tools:
        text += (
            f" LEFT JOIN {request} r ON r.id = (SELECT asked.id FROM {request} asked WHERE asked.turn_id = t.turn_id "
            "AND asked.round = t.round AND asked.created_at <= t.created_at "
            "ORDER BY asked.created_at DESC, asked.attempt DESC LIMIT 1)"
        )
    if "c" in needs:
        text += f" LEFT JOIN {chat} c ON c.id = {counted}.chat_id"
    if "s" in needs:
        text += f" LEFT JOIN {session} s ON s.chat_id = {counted}.chat_id"
    return text


def _table(record: Any) -> str:
    return f'"{record._meta.table_name}"'


def _plain(db_value: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def write(value: Any) -> Any:
        is_expression = isinstance(value, pw.Node) and not isinstance(value, pw.Model)
        if is_expression or isinstance(value, dict | list):
            raise InvalidValue(f"a column is compared with one value, not {value!r}")
        return db_value(value)

    return write


OF_THE_CHAT, OF_THE_SESSION = 'c."metadata"', 's."metadata"'


def _metadata(store: Store, name: str) -> Sql:
    """The value as JSON: the chat's, or that of its agent's session, where the chat has none."""
    first, params = metadata_json(store, name, OF_THE_CHAT)
    second, more = metadata_json(store, name, OF_THE_SESSION)
    return Sql(f"COALESCE({first}, {second})", (*params, *more))


def _has_in_metadata(store: Store, name: str, value: Any) -> tuple[str, tuple]:
    here, params = metadata_is(store, name, value, OF_THE_CHAT)
    unset, more = metadata_json(store, name, OF_THE_CHAT)
    there, yet_more = metadata_is(store, name, value, OF_THE_SESSION)
    return f"({here} OR ({unset} IS NULL AND {there}))", (*params, *more, *yet_more)


def _status(given: Any) -> int:
    is_text = isinstance(given, str) and given.isascii() and given.isdecimal()
    if isinstance(given, bool) or not (is_text or isinstance(given, int)):
        raise InvalidValue(f"a status is one of HTTP, such as 429, not {given!r}")
    return int(given)


def _flag(given: Any) -> Any:
    words = {"true": True, "1": True, "false": False, "0": False}
    found = words.get(str(given).lower())
    if found is None:
        raise InvalidValue(f"streamed is true or false, not {given!r}")
    return found


def _text(given: Any) -> str:
    if not isinstance(given, str):
        raise InvalidValue(f"it is compared with a text, not {given!r}")
    return given


_NAMED: Mapping[str, Dimension] = {
    "provider": Dimension("provider", Sql("r.provider"), write=_text),
    "model": Dimension("model", Sql("r.model"), write=_text),
    "status": Dimension("status", Sql("r.status_code"), read=int, write=_status),
    "error": Dimension("error", Sql("r.error"), write=_text),
    "source": Dimension("source", Sql("r.source"), write=_text),
    "streamed": Dimension("streamed", Sql("r.streamed"), read=bool, write=_flag),
    "agent_class": Dimension("agent_class", Sql("s.agent_class"), "s", write=_text),
    "chat": Dimension("chat", Sql("c.id"), "c", as_uuid, lambda given: chat_id(given).hex),
    "tool": Dimension("tool", Sql("t.name"), write=_text),
}

"""A database of NodeLLM's, with Prisma's tables and camelCase columns → the rows of chats.

NodeLLM keeps one row for each reply, and its tool calls beside it without saying which call of the model asked for
them; there is no position, cost is 0 where it is unknown, and arguments may be encoded twice.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit
from uuid import UUID, uuid5

import peewee as pw

from ..checks import as_key
from ..errors import InvalidValue, UnknownKeyword
from ..statements import INTERRUPTED
from ..store import Store, connect
from ..values import MOST_TOKENS
from .interchange import NAMESPACE, Bad, Incoming, IncomingRow, Row, snapshot

TABLES = {
    "chat": "LlmChat",
    "message": "LlmMessage",
    "tool_call": "LlmToolCall",
    "request": "LlmRequest",
    "agent_session": "LlmAgentSession",
}

COLUMNS = {
    "chat": "id model provider instructions metadata createdAt updatedAt",
    "message": "id chatId role content contentRaw reasoning thinkingText thinkingSignature thinkingTokens inputTokens "
    "outputTokens modelId provider createdAt",
    "tool_call": "id messageId toolCallId name arguments thought thoughtSignature result createdAt",
    "request": "id chatId messageId provider model statusCode duration inputTokens outputTokens cost correctionRounds "
    "createdAt",
    "agent_session": "id agentClass chatId metadata createdAt updatedAt",
}

ROLES = ("user", "assistant", "system")

CHATS_AT_ONCE = 100

_PRISMAS = {"schema", "connection_limit", "pool_timeout", "pgbouncer", "statement_cache_size", "socket_timeout"}
"""Of a URL; libpq does not know them."""


def is_database(source: Any) -> bool:
    """Whether a source is a database: a URL of one, or a file of SQLite's."""
    if not isinstance(source, str | os.PathLike):
        return False
    if re.match(r"(postgres(ql)?|sqlite|file):", str(source)):
        return True
    try:
        with open(source, "rb") as file:
            return file.read(16) == b"SQLite format 3\0"
    except OSError:
        return False


@contextmanager
def nodellm(source: Any, tables: Mapping[str, str] | None, store: Store) -> Iterator["_Database"]:
    """The database for a block, to be read only; raises `InvalidValue` for what is none of NodeLLM's."""
    if not isinstance(source, str | os.PathLike):
        raise InvalidValue(f"source={source!r}: a database of NodeLLM's is named by its URL, or the path of its file")
    unknown = set(tables or ()) - set(TABLES)
    if unknown:
        raise UnknownKeyword(f"source_tables has {sorted(unknown)!r}; it takes {', '.join(TABLES)}")
    text = str(source)
    if re.match(r"postgres(ql)?:", text):
        with connect(_without_prismas(text), pool_size=1) as opened:
            yield _Database(opened, tables or {}, store)
        return
    path = Path(unquote(re.sub(r"^(sqlite:///|sqlite:|file:)", "", text).partition("?")[0]))
    if not path.is_file():
        raise InvalidValue(f"there is no database file {str(path)!r}")
    # So that reading it cannot change it.
    database = pw.SqliteDatabase(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True)
    with connect(database) as opened:
        yield _Database(opened, tables or {}, store)


def _without_prismas(url: str) -> str:
    parts = urlsplit(url)
    given = parse_qsl(parts.query)
    kept = [(name, value) for name, value in given if name not in _PRISMAS]
    schema = dict(given).get("schema")
    if schema:
        kept.append(("options", f"-csearch_path={schema}"))
    return urlunsplit(parts._replace(query=urlencode(kept, quote_via=quote)))


class _Database:
    """What a database of NodeLLM's says.

    left_out            assistant messages without any content, which were not brought along
    columns_left_out    columns that the store does not have
    """

    def __init__(self, opened: Store, names: Mapping[str, str], store: Store):
        self.opened, self.store = opened, store
        self.left_out = 0
        there = self._there()
        self.tables = {name: table for name in TABLES if (table := _found(there, names.get(name) or TABLES[name]))}
        columns = {name: self._columns(table) for name, table in self.tables.items()}
        if "chatId" not in columns.get("message", ()) or "createdAt" not in columns.get("chat", ()):
            raise InvalidValue(
                f"{opened!r} has no tables {TABLES['chat']} and {TABLES['message']} with NodeLLM's columns; it has "
                f"{', '.join(sorted(there)) or 'none'}. Name them with source_tables; what llm_orm wrote is read by "
                "export()"
            )
        other = {name: [each for each in own if each not in COLUMNS[name].split()] for name, own in columns.items()}
        fields: dict[str, Any] = {name: getattr(store.records.chat, name) for name in store.chat_columns}
        self.own = {
            each: fields[name] for each in other["chat"] for name in (each, _snake_case(each)) if name in fields
        }
        left_out = [(name, each) for name in other for each in other[name] if name != "chat" or each not in self.own]
        self.columns_left_out = tuple(f"{self.tables[name]}.{each}" for name, each in left_out)

    def count(self) -> int:
        return self._read(f"SELECT COUNT(*) AS many FROM {self._name('chat')}")[0]["many"]

    def chats(self) -> Iterator[Incoming]:
        """Chat by chat, each as it was at one moment."""
        last: list[Any] = []
        while True:
            where = f"WHERE id > {self._param}" if last else ""
            query = f"SELECT id FROM {self._name('chat')} {where} ORDER BY id LIMIT {CHATS_AT_ONCE}"
            ids = [row["id"] for row in self._read(query, *last)]
            for chat_id in ids:
                where = f"{self.tables['chat']} {chat_id}"
                try:
                    rows = self.opened.patiently(lambda chat_id=chat_id: self._rows(chat_id))
                    if rows is not None:
                        chat = _Chat(where, rows, self.own)
                        made = chat.rows()
                        self.left_out += chat.left_out
                        yield Incoming(where, chat.id, lambda made=made: made)
                except Bad as bad:
                    yield Incoming(where, problem=bad)
            if len(ids) < CHATS_AT_ONCE:
                return
            last = [ids[-1]]

    def _rows(self, chat_id: Any) -> dict[str, list[Row]] | None:
        with snapshot(self.opened):
            chats = self._of("chat", "id", chat_id)
            if not chats:
                return None  # deleted in this moment
            found = {name: self._of(name, '"chatId"', chat_id) for name in ("message", "request", "agent_session")}
            calls: list[Row] = []
            if "tool_call" in self.tables:
                ids = f'SELECT id FROM {self._name("message")} WHERE "chatId" = {self._param}'
                calls = self._read(f'SELECT * FROM {self._name("tool_call")} WHERE "messageId" IN ({ids})', chat_id)
        return {"chat": chats, "tool_call": calls, **found}

    def _of(self, name: str, column: str, value: Any) -> list[Row]:
        if name not in self.tables:
            return []
        return self._read(f"SELECT * FROM {self._name(name)} WHERE {column} = {self._param}", value)

    @property
    def _param(self) -> str:
        return self.opened.database.param

    def _name(self, name: str) -> str:
        return '"{}"'.format(self.tables[name].replace('"', '""'))

    def _there(self) -> list[str]:
        query = "SELECT tablename AS name FROM pg_tables WHERE schemaname = ANY(current_schemas(false))"
        if self.opened.is_sqlite:
            query = "SELECT name FROM sqlite_master WHERE type = 'table'"
        return [row["name"] for row in self._read(query)]

    def _columns(self, table: str) -> list[str]:
        name = table.replace('"', '""')
        with self.opened.connection():
            cursor = self.opened.database.execute_sql(f'SELECT * FROM "{name}" LIMIT 0')
            return [each[0] for each in cursor.description]

    def _read(self, query: str, *values: Any) -> list[Row]:
        given = [str(value) if isinstance(value, UUID) else value for value in values]

        def read() -> list[Row]:
            with self.opened.connection():
                cursor = self.opened.database.execute_sql(query, given)
                names = [each[0] for each in cursor.description]
                return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

        return self.opened.patiently(read)


def _found(there: Iterable[str], name: str) -> str | None:
    same = [each for each in there if each == name] or [each for each in there if each.lower() == name.lower()]
    return same[0] if same else None


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", name).lower()


class _Chat:
    def __init__(self, where: str, found: Mapping[str, list[Row]], own: Mapping[str, Any]):
        self.where, self.found, self.own = where, found, own
        self.given = found["chat"][0]
        self.id = _key("chat", self.given["id"])
        self.left_out = 0
        self.requests = sorted(found["request"], key=lambda row: (_time(row["createdAt"]), str(row["id"])))
        self.calls = sorted(found["tool_call"], key=lambda row: (_time(row["createdAt"]), str(row["id"])))

    def rows(self) -> list[IncomingRow]:
        rows = [IncomingRow(self.where, "chat", self._chat())]
        for given in self.found["agent_session"]:
            session = {"id": _key("session", given["id"]), "chat_id": self.id, "agent_class": given["agentClass"]}
            session |= {"metadata": _json(given.get("metadata"))} | _times(given)
            rows.append(IncomingRow(self._of("LlmAgentSession", given), "agent_session", session))
        messages: list[IncomingRow] = []
        calls: list[IncomingRow] = []
        requests: dict[Any, Row] = {}
        turn_id: UUID | None = None
        for given in sorted(self.found["message"], key=_in_order):
            where = self._of("LlmMessage", given)
            own_calls = [row for row in self.calls if row["messageId"] == given["id"]]
            own_requests = [row for row in self.requests if row.get("messageId") == given["id"]]
            if given["role"] not in ROLES:
                raise Bad(where, f"its role is {given['role']!r}: it is one of {', '.join(ROLES)}")
            is_empty = not (given.get("content") or given.get("thinkingText") or given.get("reasoning") or own_calls)
            if given["role"] == "assistant" and is_empty:
                self.left_out += 1
                continue
            if own_calls and turn_id is None:
                raise Bad(where, "it calls tools before the user has said anything")
            message = self._message(given, len(messages), own_calls, own_requests)
            messages.append(IncomingRow(where, "message", message))
            turn_id = message["id"] if given["role"] == "user" else turn_id
            times = [_time(row["createdAt"]) for row in own_requests]
            calls += self._tool_calls(own_calls, times, message["id"], turn_id)
            for number, row in enumerate(own_requests):
                thinking = (given.get("thinkingTokens") or 0) if row is own_requests[-1] else 0
                ties = {"message_id": message["id"], "turn_id": turn_id, "round": number}
                requests[row["id"]] = ties | {"thinking_tokens": _tokens(thinking)}
        rows += [*messages, *calls]
        for given in self.requests:
            rows.append(IncomingRow(self._of("LlmRequest", given), "request", self._request(given, requests)))
        return rows

    def _of(self, table: str, given: Row) -> str:
        return f"{table} {given['id']}"

    def _chat(self) -> Row:
        given, metadata = self.given, _json(self.given.get("metadata"))
        if as_key(given["id"]) is None and isinstance(metadata, dict | None):
            metadata = {**(metadata or {}), "nodellm_id": str(given["id"])}
        chat: Row = {"id": self.id, "metadata": metadata}
        chat |= {name: given.get(name) for name in ("model", "provider", "instructions")}
        return chat | _times(given) | {each.column_name: _own(each, given[name]) for name, each in self.own.items()}

    def _message(self, given: Row, position: int, calls: list[Row], requests: list[Row]) -> Row:
        message: Row = {"id": _key("message", given["id"]), "chat_id": self.id, "position": position}
        text, time = given.get("content") or None, _time(given["createdAt"])
        message |= {"role": given["role"], "status": "completed", "content": text, "content_raw": None}
        thinking = given.get("thinkingText") or given.get("reasoning") or None
        message |= {"thinking_text": thinking, "thinking_signature": given.get("thinkingSignature")}
        message |= {"model_id": given.get("modelId"), "provider": given.get("provider")}
        spent = {"input_tokens": given.get("inputTokens"), "output_tokens": given.get("outputTokens")}
        spent["thinking_tokens"] = given.get("thinkingTokens")
        if requests:
            # Of streams NodeLLM says 0 here; what was paid is what the requests say.
            spent["input_tokens"] = sum(row["inputTokens"] or 0 for row in requests)
            spent["output_tokens"] = sum(row["outputTokens"] or 0 for row in requests)
        message |= {name: None if many is None else _tokens(many) for name, many in spent.items()}
        if calls:
            times = [_time(row["createdAt"]) for row in requests]
            message["content_raw"] = {"rounds": _rounds(calls, times, text)}
        if given["role"] == "assistant" and text is None:
            message["status"] = "incomplete"
        return message | {"created_at": time, "updated_at": time}

    def _tool_calls(
        self, calls: list[Row], times: list[datetime], message_id: UUID, turn_id: UUID | None
    ) -> Iterator[IncomingRow]:
        for number, some in enumerate(_by_round(calls, times)):
            for position, given in enumerate(some):
                is_done = given.get("result") is not None
                call: Row = {"id": _key("tool_call", given["id"]), "chat_id": self.id, "message_id": message_id}
                call |= {"turn_id": turn_id, "round": number, "position": position}
                call |= {"tool_call_id": given["toolCallId"], "name": given["name"], "arguments": _arguments(given)}
                call |= {"thought": given.get("thought"), "thought_signature": given.get("thoughtSignature")}
                call |= {"result": given["result"] if is_done else INTERRUPTED}
                call |= {"status": "completed" if is_done else "failed", "error": None if is_done else "interrupted"}
                call |= {"created_at": _time(given["createdAt"]), "finished_at": _time(given["createdAt"])}
                yield IncomingRow(self._of("LlmToolCall", given), "tool_call", call)

    def _request(self, given: Row, known: Mapping[Any, Row]) -> Row:
        none = {"message_id": None, "turn_id": None, "round": 0, "thinking_tokens": 0}
        request: Row = {"id": _key("request", given["id"]), "chat_id": self.id} | known.get(given["id"], none)
        request |= {"provider": given["provider"], "model": given["model"], "status_code": given["statusCode"]}
        request["error"] = None if given["statusCode"] == 200 else "APIError"
        request |= {"duration_ms": _tokens(given["duration"]), "correction_rounds": given.get("correctionRounds")}
        request |= {"input_tokens": _tokens(given["inputTokens"]), "output_tokens": _tokens(given["outputTokens"])}
        cost = None if given.get("cost") is None else Decimal(str(given["cost"]))
        is_known = cost is not None and (cost > 0 or (cost == 0 and not request["input_tokens"]))
        return request | {"cost": cost if is_known else None, "created_at": _time(given["createdAt"])}


def _in_order(given: Row) -> tuple[datetime, bool, str]:
    # Of one millisecond, the question was written first.
    return _time(given["createdAt"]), given["role"] == "assistant", str(given["id"])


def _by_round(calls: list[Row], times: list[datetime]) -> list[list[Row]]:
    """The calls by the call of the model that asked for them: its request was written before they were."""
    rounds: dict[int, list[Row]] = {}
    for call in calls:
        made = _time(call["createdAt"])
        rounds.setdefault(sum(time <= made for time in times), []).append(call)
    return [rounds[number] for number in sorted(rounds)]


def _rounds(calls: list[Row], times: list[datetime], text: str | None) -> list[Row]:
    rounds: list[Row] = []
    for some in _by_round(calls, times):
        asked = [{"name": call["name"], "arguments": _arguments(call)} for call in some]
        tool_calls = [
            {"id": call["toolCallId"], "type": "function", "function": function}
            for call, function in zip(some, asked, strict=True)
        ]
        rounds.append({"role": "assistant", "content": None, "tool_calls": tool_calls})
    return [*rounds, {"role": "assistant", "content": text}] if text else rounds


def _arguments(call: Row) -> str:
    """JSON; what was encoded twice, once."""
    text = call["arguments"] or ""
    try:
        read = json.loads(text)
        if isinstance(read, str) and isinstance(json.loads(read), dict):
            return read
    except ValueError:
        pass  # as the model wrote it
    return text


# Values


def _key(kind: str, given: Any) -> UUID:
    return as_key(given) or uuid5(NAMESPACE, f"nodellm:{kind}:{given}")


def _times(given: Row) -> Row:
    made = _time(given["createdAt"])
    return {"created_at": made, "updated_at": _time(given["updatedAt"]) if given.get("updatedAt") else made}


def _time(given: Any) -> datetime:
    """Prisma's times: TIMESTAMP without a zone, in UTC; in SQLite milliseconds, or ISO."""
    try:
        if isinstance(given, str) and given.isdigit():
            given = int(given)
        if isinstance(given, int | float):
            return datetime.fromtimestamp(given / 1000, UTC)
        read = given if isinstance(given, datetime) else datetime.fromisoformat(given)
    except (TypeError, ValueError, OverflowError, OSError):
        raise Bad(None, f"{given!r} is not a time") from None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).astimezone(UTC)


def _json(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except ValueError:
        return given


def _tokens(given: Any) -> int:
    return min(max(given or 0, 0), MOST_TOKENS)


def _own(field: Any, given: Any) -> Any:
    """A value of the application's column, as the store's field of that name takes it."""
    if given is None:
        return None
    if isinstance(field, pw.BooleanField) and isinstance(given, int):
        return bool(given)
    if isinstance(field, pw.JSONField):
        return _json(given)
    if isinstance(field, pw.DateTimeField):
        return _time(given) if field.field_type == "TIMESTAMPTZ" else _time(given).replace(tzinfo=None)
    if isinstance(field, pw.DateField) and not isinstance(given, date):
        return _time(given).date()
    is_text = isinstance(field, pw.TextField | pw.CharField) and not isinstance(given, str | bytes | dict | list)
    return str(given) if is_text else given

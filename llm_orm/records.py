"""The tables, and what each column means.

The classes here are the one definition; `records_for` makes a store's own set of them, tied to its database, its table
names and the application's columns. Times are aware UTC, money is US dollars, JSON is JSONB on PostgreSQL.
"""

import copy
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Generic, TypeVar, overload
from uuid import UUID

import peewee as pw

from .encryption import MARKED, Cipher, is_token
from .errors import InvalidValue, WrongKey
from .words import SEARCHED, vector

T = TypeVar("T")


def uuid7() -> UUID:
    """A new key that sorts by time (RFC 9562, version 7)."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10))
    return UUID(int=(milliseconds << 80) | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62 | random & (1 << 62) - 1)


def now() -> datetime:
    return datetime.now(UTC)


class TimeField(pw.DateTimeField):
    """An aware time in UTC: TIMESTAMPTZ on PostgreSQL, ISO text of one width (which sorts) on SQLite."""

    field_type = "TIMESTAMPTZ"

    def db_value(self, value: Any) -> Any:
        if value is None:
            return None
        value = datetime.fromisoformat(value) if isinstance(value, str) else value
        if getattr(value, "tzinfo", None) is None:
            raise ValueError(f"{self.name} needs a time with a time zone, not {value!r}")
        return value.astimezone(UTC).isoformat(" ", "microseconds")

    def python_value(self, value: Any) -> Any:
        value = datetime.fromisoformat(value) if isinstance(value, str) else value
        return value.astimezone(UTC) if value else None


class MoneyField(pw.DecimalField):
    """US dollars to twelve places. SQLite keeps a double, which holds them exactly up to a thousand dollars."""

    places = Decimal("1e-12")

    def __init__(self, **kwargs: Any):
        super().__init__(max_digits=20, decimal_places=12, auto_round=True, **kwargs)

    def db_value(self, value: Any) -> Any:
        return None if value is None else format(Decimal(value).quantize(self.places), "f")

    def python_value(self, value: Any) -> Any:
        return None if value is None else money(value)


def money(value: Any) -> Decimal:
    """Dollars as the database gave them, exact and without trailing zeros."""
    exact = Decimal(str(value)).quantize(MoneyField.places).normalize()
    return exact.quantize(Decimal(1)) if exact == exact.to_integral() else exact


class BytesField(pw.BlobField):
    """Bytes, also where the driver gives a view of them."""

    def python_value(self, value: Any) -> Any:
        return None if value is None else bytes(value)


class JSONField(pw.JSONField):
    def __init__(self, **kwargs: Any):
        super().__init__(dumps=None, loads=None, **kwargs)


class Content:
    """A field of what was said: the database holds its values as the store's keys seal them.

    Whoever writes and reads through the field, or through `Statements`, has clear values in hand.
    """

    cipher = Cipher()
    model: Any
    column_name: str

    def sealed(self, value: Any) -> Any:
        """A value as the database is to hold it."""
        return self.cipher.seal(value)

    def unsealed(self, stored: Any) -> Any:
        """The value of what the driver gave, the same object where it is clear; raises `WrongKey`."""
        return self.opened(self.cipher.open, stored) if stored.startswith(MARKED) else stored

    def opened(self, how: Callable[[Any], Any], stored: Any) -> Any:
        try:
            return how(stored)
        except WrongKey as error:
            table = self.model._meta.table_name
            raise WrongKey(f"{table}.{self.column_name} {error}", table=table, column=self.column_name) from None


class TextContent(Content, pw.TextField):
    def db_value(self, value: Any) -> Any:
        value = super().db_value(value)
        return None if value is None else self.sealed(value)

    def python_value(self, value: Any) -> Any:
        value = super().python_value(value)
        return None if value is None else self.unsealed(value)


class JSONContent(Content, JSONField):
    """JSON, of which a token is a string."""

    def sealed(self, value: Any) -> Any:
        if self.cipher.is_on:
            return self.cipher.seal(json.dumps(value))
        return self.cipher.seal(value) if isinstance(value, str) else value

    def unsealed(self, stored: Any) -> Any:
        if type(stored) is not str:
            return stored
        if stored.startswith(f'"{MARKED}'):  # as SQLite gives a string
            stored = json.loads(stored)
        text = self.opened(self.cipher.open, stored)
        return json.loads(text) if is_token(stored) else text

    def db_value(self, value: Any) -> Any:
        return super().db_value(value if value is None or isinstance(value, pw.Node) else self.sealed(value))

    def python_value(self, value: Any) -> Any:
        return self.unsealed(super().python_value(value))

    def case_value(self, value: Any) -> Any:
        # Of `bulk_update`. peewee has no converter in it on PostgreSQL, and on SQLite the one above.
        is_value = isinstance(self.model._meta.database, pw.PostgresqlDatabase) and not isinstance(value, pw.Node)
        return super().case_value(self.sealed(value) if is_value and value is not None else value)


class BytesContent(Content, BytesField):
    def sealed(self, value: Any) -> Any:
        return self.cipher.seal_bytes(value)

    def unsealed(self, stored: Any) -> Any:
        return self.opened(self.cipher.open_bytes, bytes(stored))

    def db_value(self, value: Any) -> Any:
        if value is None or isinstance(value, pw.Node):
            return value
        return super().db_value(self.sealed(value.encode() if isinstance(value, str) else bytes(value)))

    def python_value(self, value: Any) -> Any:
        return None if value is None else self.unsealed(value)


def _refusing(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def search(self: Any, *values: Any) -> Any:
        if self.cipher.is_on and not all(value is None or isinstance(value, pw.Node) for value in values):
            raise InvalidValue(
                f"{self.model.__name__}.{self.name} is encrypted, and no two tokens are alike: the database cannot "
                "compare it; read the rows, and compare in Python"
            )
        return method(self, *values)

    search.__name__ = name
    return search


_SEARCHES = (
    "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __lshift__ __mod__ __pow__ __getitem__ in_ not_in like ilike regexp "
    "iregexp contains startswith endswith between path contained_by has_key has_keys has_any_keys append update"
).split()
"""What the database would answer wrongly of a token, without a word."""

for _field in (TextContent, JSONContent, BytesContent):
    for _name in _SEARCHES:
        if hasattr(_field, _name):
            setattr(_field, _name, _refusing(_name, getattr(_field, _name)))
    _field.__hash__ = pw.Field.__hash__  # type: ignore[method-assign]


class Column(Generic[T]):
    """What a type checker is told of a field: a field to query with on the class, a `T` on an instance."""

    @overload
    def __get__(self, instance: None, owner: Any) -> Any: ...
    @overload
    def __get__(self, instance: object, owner: Any) -> T: ...
    def __get__(self, instance: Any, owner: Any) -> Any: ...
    def __set__(self, instance: object, value: T) -> None: ...


def column(field: pw.Field) -> Any:
    return field


def one_of(name: str, values: tuple[str, ...]) -> tuple[str, str]:
    """A CHECK for `records_for` to name after the table."""
    return name, f"{name} IN ({', '.join(repr(value) for value in values)})"


class Record(pw.Model):
    checks: tuple[tuple[str, str], ...] = ()
    unique: tuple[tuple[str, ...], ...] = ()
    indexes: tuple[tuple[str, ...], ...] = ()

    class Meta:
        legacy_table_names = False


class LlmChat(Record):
    """One conversation. The application's own columns stand beside these."""

    id: Column[UUID] = column(pw.UUIDField(primary_key=True, default=uuid7))
    model: Column[str | None] = column(pw.TextField(null=True))
    provider: Column[str | None] = column(pw.TextField(null=True))
    instructions: Column[str | None] = column(TextContent(null=True))
    metadata: Column[Any] = column(JSONField(null=True))
    """Whatever JSON the application gave."""
    created_at: Column[datetime] = column(TimeField(default=now))
    updated_at: Column[datetime] = column(TimeField(default=now))

    indexes = (("created_at",), ("updated_at",))


class LlmMessage(Record):
    """What the user said, or what the assistant answered: one row each for every `ask`."""

    id: Column[UUID] = column(pw.UUIDField(primary_key=True, default=uuid7))
    chat: Column[Any] = column(pw.ForeignKeyField(LlmChat, on_delete="CASCADE", backref="messages", index=False))
    chat_id: Column[UUID]
    position: Column[int] = column(pw.IntegerField())
    """The order within the chat: never a time, never an id."""
    role: Column[str] = column(pw.TextField())
    status: Column[str] = column(pw.TextField(default="completed"))
    """pending: a turn is running; incomplete: it was stopped; failed: it ended in an error; else completed."""
    content: Column[str | None] = column(TextContent(null=True))
    content_raw: Column[Any] = column(JSONContent(null=True))
    """Of an assistant row that is more than text: {"rounds": [assistant message, …]}, as the model is to see them.

    Of a row with files, the user's or those that the model made: {"attachments": n}, how many rows of LlmAttachment it
    has; a round says in the same way how many of them it made.
    """
    thinking_text: Column[str | None] = column(TextContent(null=True))
    thinking_signature: Column[str | None] = column(TextContent(null=True))
    thinking_tokens: Column[int | None] = column(pw.IntegerField(null=True))
    input_tokens: Column[int | None] = column(pw.IntegerField(null=True))
    """Summed over the requests of the turn, as are the other tokens."""
    output_tokens: Column[int | None] = column(pw.IntegerField(null=True))
    cached_tokens: Column[int | None] = column(pw.IntegerField(null=True))
    model_id: Column[str | None] = column(pw.TextField(null=True))
    provider: Column[str | None] = column(pw.TextField(null=True))
    request_key: Column[str | None] = column(pw.TextField(null=True))
    created_at: Column[datetime] = column(TimeField(default=now))
    updated_at: Column[datetime] = column(TimeField(default=now))
    """Of a pending row: the last sign of life of the process that works on it."""
    parked_at: Column[datetime | None] = column(TimeField(null=True))
    """Of a pending row: when its turn was parked to wait for tool calls to be approved; NULL while the turn runs."""
    cancelled_at: Column[datetime | None] = column(TimeField(null=True))
    """Of a pending row: when somebody asked for the turn to be stopped."""
    owner: Column[UUID | None] = column(pw.UUIDField(null=True))
    """The turn that works on the row, or did so last: another one once it was taken up by another process."""

    reply_schema: Any = None
    """What a reply must be, as the chat that it was read from says: not a column."""

    @property
    def parsed(self) -> Any:
        """The reply as the chat's schema has it: an instance of its pydantic model, or JSON; None where it is none."""
        if self.reply_schema is None or self.role != "assistant" or self.status != "completed":
            return None
        try:
            return self.reply_schema.parse(self.content or "")
        except ValueError:
            return None  # said before there was a schema

    checks = (
        one_of("role", ("user", "assistant", "system", "tool")),
        one_of("status", ("pending", "completed", "incomplete", "failed")),
    )
    unique = (("chat", "position"), ("chat", "request_key"))
    indexes = (("created_at",),)


class LlmToolCall(Record):
    """One call of a tool by the model, and its result."""

    id: Column[UUID] = column(pw.UUIDField(primary_key=True, default=uuid7))
    chat: Column[Any] = column(pw.ForeignKeyField(LlmChat, on_delete="CASCADE", backref="tool_calls", index=False))
    chat_id: Column[UUID]
    message: Column[Any] = column(
        pw.ForeignKeyField(LlmMessage, on_delete="SET NULL", backref="tool_calls", null=True, index=False)
    )
    message_id: Column[UUID | None]
    """The assistant message; NULL once its turn was rolled back."""
    turn_id: Column[UUID] = column(pw.UUIDField())
    """The user message that opened the turn."""
    round: Column[int] = column(pw.IntegerField())
    """Which call of the model asked for it, from 0."""
    position: Column[int] = column(pw.IntegerField())
    """The order within the round, from 0."""
    tool_call_id: Column[str] = column(pw.TextField())
    name: Column[str] = column(pw.TextField())
    arguments: Column[str] = column(TextContent())
    """JSON, to the letter as the model wrote it."""
    thought: Column[str | None] = column(TextContent(null=True))
    thought_signature: Column[str | None] = column(TextContent(null=True))
    result: Column[str | None] = column(TextContent(null=True))
    """The text that the model is shown."""
    status: Column[str] = column(pw.TextField(default="pending"))
    """pending: asked for, not started; running: started; completed; failed; rejected: a person said no."""
    approval: Column[str | None] = column(pw.TextField(null=True))
    """required: a person must approve or deny it before it runs; approved; denied; NULL: it needs nobody's approval."""
    error: Column[str | None] = column(TextContent(null=True))
    duration_ms: Column[int | None] = column(pw.IntegerField(null=True))
    metadata: Column[Any] = column(JSONField(null=True))
    created_at: Column[datetime] = column(TimeField(default=now))
    finished_at: Column[datetime | None] = column(TimeField(null=True))

    checks = (
        one_of("status", ("pending", "running", "completed", "failed", "rejected")),
        one_of("approval", ("required", "approved", "denied")),
    )
    unique = (("message", "tool_call_id"),)
    indexes = (("chat", "turn_id"), ("created_at",))


class LlmRequest(Record):
    """One call that reached a provider: what it took and what it cost. Outlives its message and its chat."""

    id: Column[UUID] = column(pw.UUIDField(primary_key=True, default=uuid7))
    chat: Column[Any] = column(
        pw.ForeignKeyField(LlmChat, on_delete="SET NULL", backref="requests", null=True, index=False)
    )
    chat_id: Column[UUID | None]
    message: Column[Any] = column(
        pw.ForeignKeyField(LlmMessage, on_delete="SET NULL", backref="requests", null=True, index=True)
    )
    message_id: Column[UUID | None]
    turn_id: Column[UUID | None] = column(pw.UUIDField(null=True))
    source: Column[str] = column(pw.TextField(default="chat"))
    round: Column[int] = column(pw.IntegerField(default=0))
    attempt: Column[int] = column(pw.IntegerField(default=1))
    """1 for the first try of a round, 2 for its first retry, …"""
    provider: Column[str] = column(pw.TextField())
    model: Column[str] = column(pw.TextField())
    status_code: Column[int] = column(pw.IntegerField())
    """HTTP status; 499 where we hung up, 0 where the connection failed before there was one."""
    error: Column[str | None] = column(pw.TextField(null=True))
    """The class of the exception."""
    error_message: Column[str | None] = column(TextContent(null=True))
    finish_reason: Column[str | None] = column(pw.TextField(null=True))
    duration_ms: Column[int] = column(pw.IntegerField())
    first_token_ms: Column[int | None] = column(pw.IntegerField(null=True))
    streamed: Column[bool] = column(pw.BooleanField(default=False))
    input_tokens: Column[int] = column(pw.IntegerField(default=0))
    output_tokens: Column[int] = column(pw.IntegerField(default=0))
    cached_tokens: Column[int] = column(pw.IntegerField(default=0))
    cache_write_tokens: Column[int] = column(pw.IntegerField(default=0))
    thinking_tokens: Column[int] = column(pw.IntegerField(default=0))
    usage_estimated: Column[bool] = column(pw.BooleanField(default=False))
    """True where the provider sent no usage and the tokens were counted here."""
    cost: Column[Decimal | None] = column(MoneyField(null=True))
    """NULL: unknown. Never 0 for that."""
    correction_rounds: Column[int | None] = column(pw.IntegerField(null=True))
    """How often the turn had been sent back for correction when this call was made; NULL: never."""
    provider_request_id: Column[str | None] = column(pw.TextField(null=True))
    created_at: Column[datetime] = column(TimeField(default=now))

    checks = (one_of("source", ("chat", "response", "run")),)
    indexes = (("chat", "created_at"), ("created_at",), ("turn_id",))


class LlmAgentSession(Record):
    """Ties a class of agent to a chat."""

    id: Column[UUID] = column(pw.UUIDField(primary_key=True, default=uuid7))
    agent_class: Column[str] = column(pw.TextField())
    """The agent's name: its `agent_name`, else the name of its class."""
    chat: Column[Any] = column(pw.ForeignKeyField(LlmChat, on_delete="CASCADE", backref="agent_sessions", unique=True))
    chat_id: Column[UUID]
    metadata: Column[Any] = column(JSONField(null=True))
    """The session's inputs: {"customer": "c_1", …}."""
    created_at: Column[datetime] = column(TimeField(default=now))
    updated_at: Column[datetime] = column(TimeField(default=now))

    indexes = (("agent_class",), ("created_at",))


class LlmAttachment(Record):
    """A file that came with a message."""

    id: Column[UUID] = column(pw.UUIDField(primary_key=True, default=uuid7))
    message: Column[Any] = column(
        pw.ForeignKeyField(LlmMessage, on_delete="CASCADE", backref="attachments", index=False)
    )
    message_id: Column[UUID]
    position: Column[int] = column(pw.IntegerField())
    media_type: Column[str] = column(pw.TextField())
    filename: Column[str | None] = column(TextContent(null=True))
    size: Column[int] = column(pw.BigIntegerField())
    """Bytes."""
    sha256: Column[str] = column(TextContent())
    content: Column[bytes | None] = column(BytesContent(null=True))
    """NULL where store_files=False, and where only an address was given."""
    url: Column[str | None] = column(TextContent(null=True))
    """The address that was given in the place of the file."""

    unique = (("message", "position"),)


@dataclass(frozen=True)
class Records:
    """A store's own record classes, in the order in which their tables must be created."""

    chat: type[LlmChat]
    message: type[LlmMessage]
    tool_call: type[LlmToolCall]
    request: type[LlmRequest]
    agent_session: type[LlmAgentSession]
    attachment: type[LlmAttachment]

    def __iter__(self):
        return (getattr(self, field.name) for field in fields(self))

    @property
    def table_names(self) -> dict[str, str]:
        """{"chat": "llm_chat", …} as these records have them."""
        return {name: getattr(self, name)._meta.table_name for name in BASES}


BASES: dict[str, type[Record]] = {
    "chat": LlmChat,
    "message": LlmMessage,
    "tool_call": LlmToolCall,
    "request": LlmRequest,
    "agent_session": LlmAgentSession,
    "attachment": LlmAttachment,
}


def default_table_names(prefix: str = "") -> dict[str, str]:
    """{"chat": "llm_chat", "message": "llm_message", …}, each behind the prefix."""
    return {name: f"{prefix}llm_{name}" for name in BASES}


def records_for(
    database: pw.Database | None,
    table_names: Mapping[str, str],
    chat_fields: Mapping[str, pw.Field] | None = None,
    bases: Mapping[str, type[Record]] | None = None,
    cipher: Cipher | None = None,
) -> Records:
    """Record classes tied to one database and one set of table names.

    bases     the application's subclasses of the records, by name: {"chat": MyChat}; their columns are kept
    cipher    what seals their content; without one, nothing is sealed
    """
    made: dict[str, type[Record]] = {}
    by_base: dict[type[pw.Model], type[Record]] = {}
    for name, base in BASES.items():
        own = (bases or {}).get(name, base)
        # A field belongs to one table: what the application gave may serve another store too.
        columns: dict[str, Any] = copy.deepcopy(dict(chat_fields or {})) if name == "chat" else {}
        for field in own._meta.sorted_fields:  # type: ignore[attr-defined]
            if not isinstance(field, pw.ForeignKeyField):
                columns.setdefault(field.name, copy.copy(field))  # peewee's own deep copies take half of a connect()
            elif field.rel_model in by_base:
                columns[field.name] = _pointing_at(by_base[field.rel_model], field)
        made[name] = _tied(own, database, table_names[name], columns)
        _seal_with(cipher or Cipher(), made[name], base)
        by_base[base] = by_base[own] = made[name]
    return Records(**made)  # type: ignore[arg-type]


def _seal_with(cipher: Cipher, record: Any, base: Any) -> None:
    for name, field in base._meta.fields.items():
        own = record._meta.fields.get(name)
        if isinstance(own, Content):
            own.cipher = cipher
        elif own is not None and isinstance(field, Content) and cipher.is_on:
            raise InvalidValue(
                f"{record.__name__}.{name} is a field of yours, and would not be encrypted: leave it out"
            )


def _pointing_at(target: type[Record], field: pw.ForeignKeyField) -> pw.ForeignKeyField:
    copy = pw.ForeignKeyField(
        target,
        backref=field.backref,
        on_delete=field.on_delete,
        null=field.null,
        index=field.index,
        unique=field.unique,
        column_name=field.column_name,
    )
    copy._order, copy._sort_key = field._order, field._sort_key  # type: ignore[attr-defined]
    return copy


def _tied(own: type[Record], database: pw.Database | None, table: str, columns: dict[str, Any]) -> type[Record]:
    checks = [pw.Check(check, f"{table}_{name}_check") for name, check in own.checks]
    constraints = [*(own._meta.constraints or ()), *checks]  # type: ignore[attr-defined]
    meta = type("Meta", (), {"database": database, "table_name": table, "constraints": constraints})
    record: Any = type(own.__name__, (own,), {"Meta": meta, "__module__": own.__module__, **columns})
    for names, is_unique in [(names, True) for names in own.unique] + [(names, False) for names in own.indexes]:
        on = [record._meta.fields[name] for name in names]
        record.add_index(*on, unique=is_unique, name="_".join([table, *(field.column_name for field in on)]))
    if issubclass(own, LlmMessage):
        # What makes a chat take one turn at a time, across threads and processes.
        pending = f"{table}_one_pending"
        record.add_index(record.chat, unique=True, where=pw.SQL("status = 'pending'"), name=pending)
    searched = next((SEARCHED[name] for name in SEARCHED if issubclass(own, BASES[name])), None)
    if searched and isinstance(database, pw.PostgresqlDatabase):
        words, where = pw.SQL(vector(f'"{searched.column}"')), pw.SQL(searched.said())
        record._meta.indexes.append(pw.ModelIndex(record, [words], using="GIN", where=where, name=f"{table}_search"))
    return record

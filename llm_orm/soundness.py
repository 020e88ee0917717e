"""Whether the rows of a database fit together as turns leave them: a query for each thing that can be wrong."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import peewee as pw

from .checks import as_key
from .encryption import TOKEN
from .errors import ChatGone, InvalidValue, TablesMissing
from .records import TimeField, now
from .statements import Sql
from .stopped import DIED, MARKS
from .store import Store, as_store
from .values import MOST_TOKENS, as_uuid


@dataclass(frozen=True, slots=True)
class Finding:
    """A row that does not fit the others.

    kind       "positions", "stale", "tokens", …: one word for each thing that can be wrong
    table      its name in the database
    detail     a sentence: the row, what is wrong with it, what to do
    """

    kind: str
    table: str
    row_id: UUID | None
    chat_id: UUID | None
    detail: str


def check(
    store: Store | pw.Database | str | None,
    *,
    stale_after: float = 60.0,
    chat_id: UUID | str | None = None,
    limit: int = 1000,
) -> list[Finding]:
    """What is wrong in a database; an empty list where it is sound. It reads, and changes nothing.

    stale_after    seconds without a sign of life, after which a turn that is not parked counts as dead
    chat_id        of this chat only
    limit          so many findings at the most

    What holds for the rows of every turn, and is looked at:

    - The positions of a chat are 0, 1, 2, …, and one message at the most is pending: the last.
    - The tokens of a message that is completed or failed are the sums over its request rows, failed calls included, or
      as much as a column holds; where it has any: a chat with `persistence={"requests": False}` writes none, and copies
      and imports have none. A message whose turn was taken up after its process died has a request row with the error
      "ProcessDied", and may say less than its request rows. One that is incomplete may say anything: what a cancelled
      call did cost is written to its request row when it is known, and its turn has ended by then.
    - A tool call is "pending" or "running" while its message is pending, and has a result and a time when it has
      ended; only one that was interrupted has no result. It stands in the rounds of its message, and, where calls are
      stored at all, every call of the rounds has its row.
    - A message that is settled has as many files as its `content_raw` says, and a reply that is completed does not end
      with a request for tools.
    - What a row names is there, and is of the same chat.

    Content that is encrypted is not looked into: of such messages, rounds, files and the last word are taken on trust.
    It may run beside turns at work: each query sees whole transactions. Raises `ChatGone` where there is no chat of
    that id, and `TablesMissing`; those of tool calls and requests may be missing, where `persistence` leaves them out.
    """
    if not isinstance(stale_after, int | float) or not 0 <= stale_after < math.inf:
        raise InvalidValue(f"stale_after={stale_after!r}: stale_after must be seconds")
    if not isinstance(limit, int) or limit < 1:
        raise InvalidValue(f"limit={limit!r}: limit must be 1 or more findings")
    store = as_store(store)
    only = None if chat_id is None else _known(store, chat_id)
    words = _words(store, stale_after, only)
    there = {name for name in ("tool_call", "request") if store.has_table(getattr(store.records, name))}
    found: list[Finding] = []
    for rule in (*RULES, *_foreign_keys(store)):
        if rule.needs <= there and len(found) < limit:
            found += _found(store, rule, words, only, limit - len(found))
    return found


async def acheck(
    store: Store | pw.Database | str | None,
    *,
    stale_after: float = 60.0,
    chat_id: UUID | str | None = None,
    limit: int = 1000,
) -> list[Finding]:
    """`check`, from asyncio."""
    store = as_store(store)
    return await store.off_the_loop(lambda: check(store, stale_after=stale_after, chat_id=chat_id, limit=limit))


def counted(store: Store, chat_id: UUID | None = None) -> dict[str, int]:
    """How many rows were looked at, by the record's name: {"chat": 2, "message": 8, …}."""
    counts = {}
    for name in ("chat", "message", "tool_call", "request"):
        record: Any = getattr(store.records, name)
        query = record.select()
        if chat_id is not None:
            query = query.where((record.id if name == "chat" else record.chat) == chat_id)
        try:
            with store.connection():
                counts[name] = query.count()
        except TablesMissing:
            if name in ("chat", "message"):
                raise
    return counts


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that can be wrong.

    query     SELECT … AS row_id, … AS chat_id, and the facts for the sentence: of those rows alone that are wrong
    detail    the sentence; {row} and {chat} are the ids, {0}, {1}, … the facts
    needs     the tables that a store may be without
    """

    kind: str
    table: str
    query: str
    detail: str
    needs: frozenset[str] = frozenset()


CALLS = frozenset({"tool_call"})
REQUESTS = frozenset({"request"})
TOKENS = ("input_tokens", "output_tokens", "cached_tokens", "thinking_tokens")

RULES = (
    Rule(
        "positions",
        "message",
        "SELECT id AS row_id, chat_id, position, before FROM (SELECT id, chat_id, position, "
        "LAG(position, 1, -1) OVER (PARTITION BY chat_id ORDER BY position) AS before FROM {message}) AS numbered "
        "WHERE position <> before + 1",
        "message {row} is at position {0}, right behind {1} (a chat begins behind -1): a message between them was "
        "deleted, or two have one place; put it back, or number the messages of chat {chat} anew from 0",
    ),
    Rule(
        "pending",
        "message",
        "SELECT id AS row_id, chat_id, many FROM (SELECT id, chat_id, COUNT(*) OVER (PARTITION BY chat_id) AS many "
        "FROM {message} WHERE status = 'pending') AS pending WHERE many > 1",
        "message {row} is one of {0} pending messages of chat {chat}, which can have one: the index that forbids it is "
        'not there, see "llm-orm sync"; delete those of turns that are not at work',
    ),
    Rule(
        "pending",
        "message",
        "SELECT id AS row_id, chat_id, position FROM {message} AS m WHERE status = 'pending' AND EXISTS "
        "(SELECT 1 FROM {message} AS later WHERE later.chat_id = m.chat_id AND later.position > m.position)",
        "message {row}, at position {0}, is pending and others follow it: something else than a turn wrote behind it; "
        'end it with "llm-orm recover --older-than 60s", and look at what follows',
    ),
    Rule(
        "stale",
        "message",
        "SELECT id AS row_id, chat_id, updated_at FROM {message} "
        "WHERE status = 'pending' AND parked_at IS NULL AND updated_at < {cutoff}",
        "message {row} is pending, and its turn gave its last sign of life at {0}: its process died; go on with "
        'load_chat(…, "{chat}").resume(), or end it with "llm-orm recover --chat {chat} --older-than 60s"',
    ),
    Rule(
        "parked",
        "message",
        "SELECT id AS row_id, chat_id, parked_at FROM {message} AS m "
        "WHERE status = 'pending' AND parked_at IS NOT NULL AND NOT EXISTS "
        "(SELECT 1 FROM {tool_call} AS c WHERE c.message_id = m.id AND c.approval IS NOT NULL)",
        "message {row} waits since {0} for approval, and no call of it was ever to be approved: its tool-call rows are "
        'lost; go on with load_chat(…, "{chat}").resume(), or end it with .cancel()',
        CALLS,
    ),
    Rule(
        "approval",
        "tool_call",
        "SELECT c.id AS row_id, c.chat_id, c.name FROM {tool_call} AS c JOIN {message} AS m ON m.id = c.message_id "
        "WHERE c.approval = 'required' AND c.status = 'pending' AND m.status = 'pending' AND m.parked_at IS NULL",
        "tool call {row} ({0}) waits for approval in a turn that is not parked: nobody will go on once it is decided; "
        'end the turn with "llm-orm recover --chat {chat} --older-than 60s"',
        CALLS,
    ),
    Rule(
        "unfinished",
        "tool_call",
        "SELECT c.id AS row_id, c.chat_id, c.name, c.status, COALESCE(m.status, 'gone') "
        "FROM {tool_call} AS c LEFT JOIN {message} AS m ON m.id = c.message_id "
        "WHERE c.status IN ('pending', 'running') AND (m.id IS NULL OR m.status <> 'pending')",
        "tool call {row} ({0}) is {1}, and its message is {2}: nobody will finish it; if no tool runs, set its status "
        "to failed, its error to interrupted and finished_at to now",
        CALLS,
    ),
    Rule(
        "result",
        "tool_call",
        "SELECT c.id AS row_id, c.chat_id, c.name, c.status, CASE WHEN c.finished_at IS NULL THEN 'finished_at' ELSE "
        "'result' END FROM {tool_call} AS c LEFT JOIN {message} AS m ON m.id = c.message_id "
        "WHERE c.status IN ('completed', 'failed', 'rejected') AND (c.finished_at IS NULL OR (c.result IS NULL AND "
        "m.content_raw IS NOT NULL AND NOT (c.status = 'failed' AND {is_interrupted})))",
        "tool call {row} ({0}) is {1} and has no {2}: the model is not shown a round with a call that has no result; "
        "write it, or set the call's status to failed and its error to interrupted",
        CALLS,
    ),
    Rule(
        "rounds",
        "message",
        "SELECT said.id AS row_id, said.chat_id, said.call_id FROM {calls} AS said WHERE said.call_id IS NOT NULL AND "
        "said.keeps_no_results AND EXISTS (SELECT 1 FROM {tool_call} AS c WHERE c.message_id = said.id) AND NOT EXISTS "
        "(SELECT 1 FROM {tool_call} AS c WHERE c.message_id = said.id AND c.tool_call_id = said.call_id)",
        "message {row} says that the tool call {0!r} was asked for, and it has no row, as others of the message do: "
        "the row was deleted, and the model is no longer shown its round",
        CALLS,
    ),
    Rule(
        "rounds",
        "tool_call",
        "SELECT c.id AS row_id, c.chat_id, c.name, c.tool_call_id FROM {tool_call} AS c "
        "JOIN {message} AS m ON m.id = c.message_id "
        "WHERE ({is_object} OR (m.content_raw IS NULL AND m.content IS NOT NULL)) AND NOT EXISTS "
        "(SELECT 1 FROM {calls_of_m} WHERE {call_id} = c.tool_call_id)",
        "tool call {row} ({0}) is not among the rounds in its message's content_raw, where it would be {1!r}: no model "
        "is shown it; correct content_raw, or delete the call",
        CALLS,
    ),
    Rule(
        "chat",
        "tool_call",
        "SELECT c.id AS row_id, c.chat_id, c.name FROM {tool_call} AS c JOIN {message} AS m ON m.id = c.message_id "
        "WHERE c.chat_id <> m.chat_id",
        "tool call {row} ({0}) is of chat {chat}, and its message is of another: set its chat_id to the message's",
        CALLS,
    ),
    Rule(
        "chat",
        "request",
        "SELECT r.id AS row_id, r.chat_id, r.model FROM {request} AS r JOIN {message} AS m ON m.id = r.message_id "
        "WHERE r.chat_id <> m.chat_id",
        "request {row} ({0}) is of chat {chat}, and its message is of another: set its chat_id to the message's",
        REQUESTS,
    ),
    Rule(
        "turn",
        "tool_call",
        "SELECT c.id AS row_id, c.chat_id, c.name FROM {tool_call} AS c WHERE c.message_id IS NOT NULL AND NOT EXISTS "
        "(SELECT 1 FROM {message} AS q WHERE q.id = c.turn_id AND q.chat_id = c.chat_id AND q.role = 'user')",
        "tool call {row} ({0}) is of a turn whose question is not in chat {chat}: set its turn_id to the id of the "
        "user message that its message answers",
        CALLS,
    ),
    Rule(
        "tokens",
        "message",
        "SELECT m.id AS row_id, m.chat_id, {said_and_summed} FROM {message} AS m JOIN "
        "(SELECT message_id, {sums}, MAX(CASE WHEN error = '{died}' THEN 1 ELSE 0 END) AS died FROM {request} "
        "WHERE message_id IS NOT NULL{in_chat} GROUP BY message_id) AS r ON r.message_id = m.id "
        "WHERE m.status IN ('completed', 'failed') AND ({is_more} OR (r.died = 0 AND ({is_other})))",
        "message {row} has other tokens than its request rows together (input {0} and {1}; output {2} and {3}; "
        "cached {4} and {5}; thinking {6} and {7}): a request row was lost or changed; "
        "what was paid is what the request rows say",
        REQUESTS,
    ),
    Rule(
        "reply",
        "message",
        "SELECT m.id AS row_id, m.chat_id FROM {message} AS m "
        "WHERE m.role = 'assistant' AND m.status = 'completed' AND {asks_for_tools}",
        "message {row} is completed, and the last of its rounds asks for tools: its reply is missing; set its status "
        'to incomplete, and load_chat(…, "{chat}").retry() has the question answered',
    ),
    Rule(
        "marks",
        "message",
        "SELECT m.id AS row_id, m.chat_id, {mark} FROM {message} AS m "
        "WHERE m.status <> 'pending' AND {mark} IS NOT NULL",
        "message {row} is settled, and its content_raw has {0!r}, which only a pending one may have: remove it",
    ),
    Rule(
        "unreadable",
        "message",
        "SELECT m.id AS row_id, m.chat_id FROM {message} AS m WHERE NOT ({is_readable})",
        "message {row} has a content_raw that is no JSON object, and no token of one that is encrypted: its rounds "
        "and files cannot be shown to a model; correct it, or set it to NULL",
    ),
    Rule(
        "files",
        "message",
        "SELECT row_id, chat_id, said, kept FROM (SELECT m.id AS row_id, m.chat_id, {files_said} AS said, "
        "(SELECT COUNT(*) FROM {attachment} AS a WHERE a.message_id = m.id) AS kept FROM {message} AS m "
        "WHERE m.status <> 'pending' AND ({is_object} OR m.content_raw IS NULL)) AS counted WHERE said <> kept",
        "message {row} says in its content_raw that it has {0} files, and {1} rows of files name it: put them back, or "
        'correct "attachments" in content_raw',
    ),
    Rule(
        "request",
        "request",
        "SELECT id AS row_id, chat_id, status_code, COALESCE(CAST(cost AS TEXT), 'no cost') FROM {request} "
        "WHERE (error IS NULL AND status_code <> 200) OR cost < 0 OR duration_ms < 0 OR attempt < 1 OR round < 0 OR "
        "{is_negative}",
        "request {row} (status {0}, {1}) has a number below zero, or a status other than 200 and no error: something "
        "else than a turn wrote it; correct it",
        REQUESTS,
    ),
)


def _known(store: Store, chat_id: UUID | str) -> UUID:
    key = as_key(chat_id)
    if key is None:
        raise InvalidValue(f"chat_id={chat_id!r} is not the id of a chat")
    if not store.read(store.statements.chat_exists(key)):
        raise ChatGone(f"there is no chat {key} in {store!r}")
    return key


def _found(store: Store, rule: Rule, words: Mapping[str, str], only: UUID | None, limit: int) -> Iterator[Finding]:
    query, params = rule.query.format_map(words), () if only is None else (only.hex,)
    here = "" if only is None else f" WHERE found.chat_id = {store.statements.param}"
    statement = Sql(f"SELECT * FROM ({query}) AS found{here} ORDER BY found.row_id LIMIT {limit}", params)
    for row_id, chat_id, *facts in store.read(statement):
        row, chat = as_uuid(row_id), None if chat_id is None else as_uuid(chat_id)
        detail = rule.detail.format(*map(_said, facts), row=row, chat=chat)
        yield Finding(rule.kind, words[rule.table].strip('"'), row, chat, detail)


def _said(fact: Any) -> Any:
    return fact.astimezone(UTC).isoformat(" ", "microseconds") if isinstance(fact, datetime) else fact


def _foreign_keys(store: Store) -> Iterator[Rule]:
    """A rule for each of our foreign keys: what it names is there."""
    names = {record: name for name, record in vars(store.records).items()}
    for record, name in names.items():
        for field in record._meta.sorted_fields:  # type: ignore[attr-defined]
            if not isinstance(field, pw.ForeignKeyField) or field.rel_model not in names:
                continue
            column, target = f'o."{field.column_name}"', names[field.rel_model]
            chat = "CAST(NULL AS TEXT)" if name == "attachment" else "o.chat_id"
            yield Rule(
                "orphan",
                name,
                f"SELECT o.id AS row_id, {chat} AS chat_id, CAST({column} AS TEXT) AS named FROM {{{name}}} AS o "
                f"LEFT JOIN {{{target}}} AS t ON t.id = {column} WHERE {column} IS NOT NULL AND t.id IS NULL",
                f"{name} {{row}} names the {target} {{0}}, which is not there: it was deleted where foreign keys were "
                "not enforced, as by a tool for SQLite without PRAGMA foreign_keys = 1; "
                + (f"set its {field.column_name} to NULL" if field.null else "delete the row"),
                frozenset({name, target} & {"tool_call", "request"}),
            )


def _words(store: Store, stale_after: float, only: UUID | None) -> dict[str, str]:
    """What stands for the words in the queries."""
    try:
        cutoff = TimeField().db_value(now() - timedelta(seconds=stale_after))
    except OverflowError:
        cutoff = "0001-01-01 00:00:00+00:00"
    names = {name: f'"{record._meta.table_name}"' for name, record in vars(store.records).items()}
    said = [f"COALESCE(m.{name}, 0)" for name in TOKENS]
    words = {
        **names,
        "cutoff": f"'{cutoff}'",
        "died": DIED,
        "is_interrupted": f"(c.error IS NOT NULL AND (c.error = 'interrupted' OR {_is_token('c.error')}))",
        "in_chat": "" if only is None else f" AND chat_id = '{only.hex}'",
        "sums": ", ".join(
            f"CASE WHEN SUM({name}) > {MOST_TOKENS} THEN {MOST_TOKENS} ELSE SUM({name}) END AS {name}"
            for name in TOKENS
        ),
        "said_and_summed": ", ".join(f"{own}, r.{name}" for own, name in zip(said, TOKENS, strict=True)),
        "is_more": " OR ".join(f"{own} > r.{name}" for own, name in zip(said, TOKENS, strict=True)),
        "is_other": " OR ".join(f"{own} <> r.{name}" for own, name in zip(said, TOKENS, strict=True)),
        "is_negative": " OR ".join(f"{name} < 0" for name in (*TOKENS, "cache_write_tokens")),
    }
    words |= _sqlite() if store.is_sqlite else _postgresql()
    words["calls"] = (
        f"(SELECT m.id, m.chat_id, {words['call_id']} AS call_id, {words['keeps_no_results']} AS keeps_no_results "
        f"FROM {names['message']} AS m, {words['calls_of_m']})"
    )
    return words


def _is_token(text: str) -> str:
    return f"SUBSTR({text}, 1, {len(TOKEN)}) = '{TOKEN}'"


def _sqlite() -> dict[str, str]:
    """What is read from the content_raw of a message `m`. What is not JSON is an error to SQLite, so it is looked at
    first, in a CASE: of an AND, both sides may be."""
    token = _is_token("json_extract(m.content_raw, '$')")
    raw = "(CASE WHEN json_valid(m.content_raw) THEN m.content_raw ELSE '{}' END)"
    marks = " ".join(f"WHEN json_type({raw}, '$.{mark}') IS NOT NULL THEN '{mark}'" for mark in MARKS)
    return {
        "is_object": f"(json_type({raw}) = 'object' AND json_valid(m.content_raw))",
        "is_readable": "(CASE WHEN m.content_raw IS NULL THEN 1 WHEN NOT json_valid(m.content_raw) THEN 0 "
        f"ELSE json_type(m.content_raw) IN ('object', 'null') OR {token} END)",
        "calls_of_m": f"json_each({raw}, '$.rounds') AS said_round, json_each(CASE WHEN said_round.type = 'object' "
        "THEN said_round.value ELSE '{}' END, '$.tool_calls') AS said_call",
        "call_id": "(CASE WHEN said_call.type = 'object' THEN json_extract(said_call.value, '$.id') END)",
        "keeps_no_results": f"(json_type({raw}, '$.results') IS NULL)",
        "asks_for_tools": f"COALESCE(json_array_length({raw}, '$.rounds[#-1].tool_calls'), 0) > 0",
        "files_said": f"COALESCE(CAST(json_extract({raw}, '$.attachments') AS INTEGER), 0)",
        "mark": f"(CASE {marks} END)",
    }


def _postgresql() -> dict[str, str]:
    """What is read from the content_raw of a message `m`."""

    def listed(value: str) -> str:
        return f"(CASE WHEN jsonb_typeof({value}) = 'array' THEN {value} ELSE '[]' END)"

    token = _is_token("(m.content_raw #>> '{}')")
    marks = " ".join(f"WHEN m.content_raw -> '{mark}' IS NOT NULL THEN '{mark}'" for mark in MARKS)
    rounds = listed("m.content_raw -> 'rounds'")
    calls, last = listed("said_round -> 'tool_calls'"), listed("m.content_raw -> 'rounds' -> -1 -> 'tool_calls'")
    return {
        "is_object": "(COALESCE(jsonb_typeof(m.content_raw), 'null') = 'object')",
        "is_readable": f"(COALESCE(jsonb_typeof(m.content_raw), 'null') IN ('object', 'null') OR {token})",
        "calls_of_m": f"LATERAL jsonb_array_elements({rounds}) AS said_round, "
        f"LATERAL jsonb_array_elements({calls}) AS said_call",
        "call_id": "(said_call ->> 'id')",
        "keeps_no_results": "((m.content_raw -> 'results') IS NULL)",
        "asks_for_tools": f"jsonb_array_length({last}) > 0",
        "files_said": "(CASE WHEN jsonb_typeof(m.content_raw -> 'attachments') = 'number' "
        "THEN CAST(m.content_raw ->> 'attachments' AS INTEGER) ELSE 0 END)",
        "mark": f"(CASE {marks} END)",
    }

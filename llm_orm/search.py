"""Full text over what was said: the contents of messages, and the results of tool calls."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any
from uuid import UUID

import peewee as pw

from .errors import InvalidValue, WrongSetup
from .filters import Moment, Where, chat_conditions, span, within
from .statements import Sql
from .store import Store, as_store
from .values import as_uuid
from .views import stem_of
from .words import MOST_CHARACTERS, SEARCHED, SEPARATORS, rows_table, search_table, spaced, vector

LONGEST_TEXT = 500
"""Characters of what is searched for."""

RANKED = 200
"""How many hits PostgreSQL ranks: the newest. It reads a text anew to do so."""

AT_ONCE = 1000
"""How many texts are read together."""

SNIPPET = 160
"""Characters of a snippet, of which so many are before the first hit at the most:"""
BEFORE = 40
LONG_WORD = 20
"""It is cut where the snippet begins or ends, and shorter ones are left out there."""

AROUND = 1500
"""Of the text this much is looked at for the snippet, for some of it may be blank."""


@dataclass(frozen=True, slots=True)
class Found:
    """A message, or the result of a tool call, in which all that was searched for stands.

    message_id      of the message; of a tool call, the assistant's message, None where its turn was rolled back
    tool_call_id    the id of the row of the tool call; None for a message
    role            user, assistant, system, tool
    name            of the tool; None for a message
    snippet         some 160 characters around the first hit, on one line
    hits            where in the snippet what was searched for stands: ((12, 18), (40, 46))
    rank            more is better; not to be compared with that of another search
    """

    chat_id: UUID
    message_id: UUID | None
    tool_call_id: UUID | None
    role: str
    name: str | None
    snippet: str
    hits: tuple[tuple[int, int], ...]
    rank: float
    created_at: datetime

    def as_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def search(
    store: Store | pw.Database | str | None,
    text: str,
    *,
    where: Where | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    limit: int = 20,
    offset: int = 0,
) -> list[Found]:
    """The messages and the results of tools in which all words of the text stand, the best first, then the newest.

    text     refund order; "quoted phrase": next to each other; refu*: begins so. Case and punctuation do not matter,
             and no text of up to 500 characters is an error
    where    which chats: {"user_id": "u_1"}, as in `erase`; default: all
    since    said at this moment or later; `until`: before this one. As in `usage`
    limit    so many, after the first `offset`

    What a turn says that still runs is found when it has ended. Nothing is found for a text without a word in it.
    Raises `WrongSetup` where the store is encrypted, for the database holds no words then; `InvalidValue` and
    `UnknownKeyword`.
    """
    store = as_store(store)
    for name, number in (("limit", limit), ("offset", offset)):
        least = 1 if name == "limit" else 0
        if not isinstance(number, int) or isinstance(number, bool) or not least <= number < 2**31:
            raise InvalidValue(f"{name}={number!r}: {name} must be a whole number, {least} or more")
    if not isinstance(text, str):
        raise InvalidValue(f"search() takes a text, not {text!r}")
    if len(text) > LONGEST_TEXT:
        raise InvalidValue(f"search() takes a text of {LONGEST_TEXT} characters at the most, not one of {len(text)}")
    if store.is_encrypted:
        raise WrongSetup(
            "search() finds nothing in an encrypted store: what the database holds are tokens, and it has no words to "
            "look for; read the rows, and search in Python"
        )
    terms, conditions = terms_of(text), _Conditions(store, where, since, until)
    if not terms:
        return []
    found = store.read(_query(store, terms, conditions, limit, offset))
    contents, pattern = _contents(store, found), _pattern(terms)
    # What is gone by now was found for nothing.
    return [_found(store, row, contents[_key(row)], pattern) for row in found if _key(row) in contents]


async def asearch(
    store: Store | pw.Database | str | None,
    text: str,
    *,
    where: Where | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    limit: int = 20,
    offset: int = 0,
) -> list[Found]:
    """`search`, from asyncio."""
    store = as_store(store)
    return await store.off_the_loop(
        lambda: search(store, text, where=where, since=since, until=until, limit=limit, offset=offset)
    )


# What is searched for

_BETWEEN = rf"[\x00{SEPARATORS}\ud800-\udfff]"
_WITHIN = _BETWEEN.replace("[", "[^", 1)


@dataclass(frozen=True, slots=True)
class Term:
    """Words that stand next to each other; of the last, only the beginning where it `is_prefix`."""

    words: tuple[str, ...]
    is_prefix: bool = False


def terms_of(text: str) -> list[Term]:
    """What a text asks for: quoted phrases, and words. What punctuation joins stands together: foo-bar, a@b.com."""
    terms: dict[Term, None] = {}
    for quoted, plain in re.findall(r'"([^"]*)"?|([^\s"]+)', text):
        words = tuple(re.findall(rf"{_WITHIN}+", quoted or plain))
        if words:
            terms[Term(words, not quoted and plain.endswith("*"))] = None
    return list(terms)


def _pattern(terms: Sequence[Term]) -> re.Pattern[str]:
    texts = [
        rf"{_BETWEEN}+".join(map(re.escape, term.words)) + (rf"{_WITHIN}*" if term.is_prefix else "")
        # The longest first: of "foo" and "foo bar", both are there.
        for term in sorted(terms, key=lambda term: -sum(map(len, term.words)))
    ]
    return re.compile(rf"(?<!{_WITHIN})(?:{'|'.join(texts)})(?!{_WITHIN})", re.IGNORECASE)


# Where


class _Conditions:
    """What is true of the rows that are looked at, besides their words."""

    def __init__(self, store: Store, where: Any, since: Any, until: Any):
        texts, self.params = [], []
        if where is not None and where != {}:
            chat: Any = store.records.chat
            found, params = chat.select(chat.id).where(*chat_conditions(store, "search()", where)).sql()
            texts.append(f"said.chat_id IN ({found})")
            self.params += params
        for bound in within(store, "said.created_at", *span(since, until)):
            texts.append(bound.text)
            self.params += bound.params
        self.text = "".join(f" AND {text}" for text in texts)


_COLUMNS = {
    "message": "said.chat_id, said.id AS message_id, NULL AS call_id, said.role, NULL AS name, said.created_at",
    "tool_call": (
        "said.chat_id, said.message_id, said.id AS call_id, 'tool' AS role, said.name AS name, said.created_at"
    ),
}


def _query(store: Store, terms: Sequence[Term], conditions: _Conditions, limit: int, offset: int) -> Sql:
    """The ids of what is found: (chat_id, message_id, call_id, role, name, created_at, rank)."""
    kinds = ["message", *(["tool_call"] if store.has_table(store.records.tool_call) else [])]
    query = (_of_sqlite if store.is_sqlite else _of_postgresql)(store, kinds, terms, conditions)
    param = store.statements.param
    order = f"ORDER BY rank DESC, created_at DESC, message_id DESC, call_id DESC LIMIT {param} OFFSET {param}"
    return Sql(f"{query.text} {order}", (*query.params, limit, offset))


def _of_sqlite(store: Store, kinds: list[str], terms: Sequence[Term], conditions: _Conditions) -> Sql:
    names = store.records.table_names
    words, rows = search_table(stem_of(names)), rows_table(stem_of(names))
    match = " AND ".join(f'"{" ".join(term.words)}"' + " *" * term.is_prefix for term in terms)
    texts = [
        f'SELECT {_COLUMNS[kind]}, -entry.rank AS rank FROM "{words}" AS entry '
        f"JOIN \"{rows}\" AS place ON place.id = entry.rowid AND place.kind = '{kind}' "
        f'JOIN "{names[kind]}" AS said ON said.id = place.row_id '
        f"WHERE entry.words MATCH ? AND {SEARCHED[kind].said('said.')}{conditions.text}"
        for kind in kinds
    ]
    # It is a query of its own: "rank" is a word of FTS5's, too.
    return Sql(f"SELECT * FROM ({' UNION ALL '.join(texts)}) AS found", (match, *conditions.params) * len(kinds))


def _of_postgresql(store: Store, kinds: list[str], terms: Sequence[Term], conditions: _Conditions) -> Sql:
    names = store.records.table_names
    queries = [
        f"'{word}'" + ":*" * (term.is_prefix and word is term.words[-1]) for term in terms for word in term.words
    ]
    # The index knows of a long text's first 16,383 words where they stand, and of a word that is not all letters it may
    # know only parts; the text itself knows it all.
    phrases = [
        f"% {' '.join(term.words)}{'' if term.is_prefix else ' '}%"
        for term in terms
        if len(term.words) > 1 or not all(each.isalpha() or each.isdecimal() for each in "".join(term.words))
    ]
    texts, params = [], []
    for kind in kinds:
        column = f"said.{SEARCHED[kind].column}"
        stands = f" AND lower(' ' || {spaced(column)} || ' ') LIKE lower(%s)" * len(phrases)
        texts.append(
            f'SELECT {_COLUMNS[kind].replace("NULL AS call_id", "NULL::uuid AS call_id")} FROM "{names[kind]}" AS said '
            f"WHERE {vector(column)} @@ to_tsquery('simple', %s) AND {SEARCHED[kind].said('said.')}"
            f"{stands}{conditions.text}"
        )
        params += [" & ".join(queries), *phrases, *conditions.params]
    rank = [
        f"(SELECT ts_rank({vector(SEARCHED[kind].column)}, to_tsquery('simple', %s), 1) FROM \"{names[kind]}\" "
        f"WHERE id = found.{key})"
        for kind, key in (("message", "message_id"), ("tool_call", "call_id"))
        if kind in kinds
    ]
    ranks = rank[0] if len(rank) == 1 else f"CASE WHEN call_id IS NULL THEN {rank[0]} ELSE {rank[1]} END"
    newest = "row_number() OVER (ORDER BY created_at DESC, message_id DESC, call_id DESC)"
    return Sql(
        f"SELECT chat_id, message_id, call_id, role, name, created_at, "
        f"CASE WHEN place > {RANKED} THEN 0 ELSE {ranks} END AS rank "
        f"FROM (SELECT *, {newest} AS place FROM ({' UNION ALL '.join(texts)}) AS each) AS found",
        (*[" & ".join(queries)] * len(rank), *params),
    )


def _key(row: tuple[Any, ...]) -> Any:
    _, message_id, call_id, *_ = row
    return call_id or message_id


def _contents(store: Store, found: list[tuple[Any, ...]]) -> dict[Any, str]:
    """The texts of what was found, as far as they are in the index, by the id of the row."""
    contents: dict[Any, str] = {}
    for kind, searched in SEARCHED.items():
        record: Any = getattr(store.records, kind)
        keys = [_key(row) for row in found if (row[2] is None) == (kind == "message")]
        unsealed = getattr(record, searched.column).unsealed
        for some in (keys[start : start + AT_ONCE] for start in range(0, len(keys), AT_ONCE)):
            marks = ", ".join([store.statements.param] * len(some))
            text = (
                f'SELECT id, substr({searched.column}, 1, {MOST_CHARACTERS}) FROM "{record._meta.table_name}" '
                f"WHERE id IN ({marks}) AND {searched.said()}"
            )
            contents |= {key: unsealed(content) for key, content in store.read(Sql(text, tuple(some)))}
    return contents


def _found(store: Store, row: tuple[Any, ...], content: str, pattern: re.Pattern[str]) -> Found:
    chat_id, message_id, call_id, role, name, created_at, rank = row
    ids = as_uuid(chat_id), message_id and as_uuid(message_id), call_id and as_uuid(call_id)
    time = store.records.message.created_at.python_value(created_at)
    return Found(*ids, role, name, *snippet_of(content, pattern), float(rank), time)


# The snippet


def snippet_of(content: str, pattern: re.Pattern[str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A line around what is found first, and where in it everything stands that is found."""
    first = pattern.search(content)
    start = max(0, first.start() - AROUND) if first else 0
    near = " ".join(content[start : start + 3 * AROUND].split())
    first = pattern.search(near, 1 if start else 0)
    begin, end = _window(near, first)
    head = "…" if start or begin else ""
    tail = "…" if end < len(near) or start + 3 * AROUND < len(content) else ""
    hits = [
        (match.start() - begin + len(head), min(match.end(), end) - begin + len(head))
        for match in pattern.finditer(near, begin, len(near))
        if match.start() < end
    ]
    return f"{head}{near[begin:end]}{tail}", tuple(hits)


def _window(near: str, first: re.Match[str] | None) -> tuple[int, int]:
    """Whole words, where they are not too long for it."""
    begin = max(0, first.start() - BEFORE) if first else 0
    if first and begin:
        begin = 1 + near.find(" ", begin - 1, min(begin + LONG_WORD, first.start())) or begin
    end = min(len(near), begin + SNIPPET)
    if end < len(near):
        space = near.rfind(" ", max(end - LONG_WORD, first.end() if first else 0), end + 1)
        end = space if space > begin else end
    return begin, end

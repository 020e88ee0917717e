"""`llm-orm chats`: the chats, listed, filtered and searched."""

from typing import TYPE_CHECKING, Any

import click

from .application import opened_with_its_columns, store_option
from .options import csv_option, database_options, json_option, not_both, span_options, where_option
from .output import SHORTEST_CUT, columns_left, is_terminal, print_json, print_rows, shown_cost

if TYPE_CHECKING:
    from datetime import datetime, tzinfo
    from uuid import UUID

    from llm_orm import ChatLine, Store

SEARCHED_AT_ONCE = 100

SHORTEST_ID = 8
"""Characters of an id on a terminal, where that is enough to tell it from all others."""

IDS_AT_ONCE = 500

MOST_SHOWN = 1000
"""Of the chats of one search."""


@click.command()
@click.option("--search", "text", metavar="TEXT", help="Those in which this was said, the best match first.")
@where_option(
    "Which chats: user_id=u_1, model=gpt-4o, agent_class=Support, metadata.plan=free. Repeatable: all of them hold; of "
    "several values for one name, one does."
)
@span_options
@click.option(
    "--order",
    default="-updated_at",
    show_default=True,
    metavar="NAME",
    help="By updated_at, created_at, cost, requests, failed_requests, total_tokens, messages, turns, model, "
    'agent_class, or a column of yours; "-cost": the largest first.',
)
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, metavar="N", help="So many chats.")
@database_options
@store_option
@json_option
@csv_option
def chats(
    text: str | None,
    conditions: dict[str, list[Any]],
    since: str | None,
    until: str | None,
    tz: str,
    order: str,
    limit: int,
    as_json: bool,
    as_csv: bool,
    **database: Any,
) -> None:
    """List chats, those that were used last first.

    With --since and --until, those in which something was said in that time. See one of them with "llm-orm show ID".
    """
    from llm_orm import chats as chats_of
    from llm_orm.periods import zone

    not_both(as_json, as_csv)
    where = conditions or None
    with opened_with_its_columns(**database) as store:
        if text is None:
            lines = chats_of(store, where=where, since=since, until=until, order=order, limit=limit, tz=tz)
            snippets: list[str | None] | None = None
        else:
            from llm_orm.filters import span

            first, end = span(since, until, zone(tz))
            found = _found(store, text, min(limit, MOST_SHOWN), where=where, since=first, until=end)
            by_id = {}
            if found:
                by_id = {line.id: line for line in chats_of(store, where={"id": list(found)}, limit=None)}
            lines = [by_id[key] for key in found if key in by_id]
            snippets = [found[line.id] for line in lines]
        own = store.chat_columns
        if as_json or as_csv or not is_terminal():
            _print(lines, snippets, as_json=as_json, as_csv=as_csv)
        else:
            _draw(lines, own, snippets, _short_ids(store, [line.id for line in lines]), zone(tz))


def _found(store: "Store", text: str, limit: int, **which: Any) -> dict[Any, str]:
    """What was found in each of the chats that match best, by their ids."""
    from llm_orm import search

    found: dict[Any, str] = {}
    offset = 0
    while len(found) < limit:
        batch = search(store, text, limit=SEARCHED_AT_ONCE, offset=offset, **which)
        for each in batch:
            if len(found) < limit:
                found.setdefault(each.chat_id, each.snippet)
        offset += len(batch)
        if len(batch) < SEARCHED_AT_ONCE:
            break
    return found


def _print(lines: list["ChatLine"], snippets: list[str | None] | None, *, as_json: bool, as_csv: bool) -> None:
    more = _found_in(lines, snippets)
    if as_json:
        print_json([line.as_dict() | extra for line, extra in zip(lines, more, strict=True)])
    else:
        rows = [_flat(line) | extra for line, extra in zip(lines, more, strict=True)]
        print_rows(_names(rows) or FLAT, [list(row.values()) for row in rows], as_csv=as_csv)


def _found_in(lines: list["ChatLine"], snippets: list[str | None] | None) -> list[dict[str, str | None]]:
    return [{} if snippets is None else {"found": snippets[place]} for place in range(len(lines))]


FLAT = (
    "id title model provider agent_class metadata created_at updated_at status messages turns requests failed_requests "
    "unpriced_requests cost total_tokens"
).split()


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list(rows[0]) if rows else []


def _flat(line: "ChatLine") -> dict[str, Any]:
    return {name: getattr(line, name) for name in FLAT} | dict(line.columns)


def _draw(
    lines: list["ChatLine"], own: list[str], snippets: list[str | None] | None, ids: list[str], tz: "tzinfo"
) -> None:
    """What a terminal has room for."""
    own = [name for name in own if any(line.columns[name] is not None for line in lines)]
    rows = [
        {"id": key} | _short(line, own, lines, tz) | extra
        for key, line, extra in zip(ids, lines, _found_in(lines, snippets), strict=True)
    ]
    names = _names(rows)
    for name in ("turns", *reversed(own), MODEL, MODEL_OR_AGENT, "updated", *(["title"] if snippets else [])):
        if name in names and not _has_room(names, rows):
            names.remove(name)
    print_rows(names, [[row[name] for name in names] for row in rows], cut=CUT, whole=("id", "updated"))


CUT = ("title", "found")

MODEL, MODEL_OR_AGENT = "model", "agent or model"
"""An agent's chat need not say which model: its class does."""


def _has_room(names: list[str], rows: list[dict[str, Any]]) -> bool:
    """Whether each of the texts has so much of the terminal that it says something."""
    texts = [name for name in names if name in CUT]
    cells = [["" if name in texts else row[name] for name in names] for row in rows]
    return columns_left(names, cells) + sum(map(len, texts)) >= SHORTEST_CUT * len(texts)


def _short(line: "ChatLine", own: list[str], lines: list["ChatLine"], tz: "tzinfo") -> dict[str, Any]:
    shown: dict[str, Any] = {"updated": _time(line.updated_at.astimezone(tz)), "title": line.title}
    shown[MODEL_OR_AGENT if any(each.agent_class for each in lines) else MODEL] = line.agent_class or line.model
    shown |= {"turns": line.turns, "cost": shown_cost(line.cost, line.requests, line.unpriced_requests)}
    return shown | {name: line.columns[name] for name in own}


def _time(moment: "datetime") -> str:
    from llm_orm.records import now

    is_of_this_year = moment.year == now().astimezone(moment.tzinfo).year
    return f"{moment:%m-%d %H:%M}" if is_of_this_year else f"{moment:%Y-%m-%d}"


def _short_ids(store: "Store", keys: list["UUID"]) -> list[str]:
    """The beginnings of ids by which "llm-orm show" finds them, all of one length."""
    from llm_orm.values import as_uuid

    chat: Any = store.records.chat
    other = chat.alias("other")
    length = SHORTEST_ID
    for start in range(0, len(keys), IDS_AT_ONCE):
        before = other.select(other.id).where(other.id < chat.id).order_by(other.id.desc()).limit(1)
        after = other.select(other.id).where(other.id > chat.id).order_by(other.id).limit(1)
        query = chat.select(chat.id, before.alias("before"), after.alias("after"))
        for key, *neighbours in store.found(query.where(chat.id.in_(keys[start : start + IDS_AT_ONCE])).tuples()):
            for neighbour in neighbours:
                if neighbour is not None:
                    pairs = enumerate(zip(str(key), str(as_uuid(neighbour)), strict=True), start=1)
                    length = max(length, next(place for place, (ours, theirs) in pairs if ours != theirs))
    return [str(key)[:length] for key in keys]

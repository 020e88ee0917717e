"""`llm-orm chats`: the chats, listed, filtered and searched."""

from typing import TYPE_CHECKING, Any

import click

from .application import opened_with_its_columns, store_option
from .options import csv_option, database_options, json_option, not_both, span_options, where_option
from .output import is_terminal, print_json, print_rows

if TYPE_CHECKING:
    from llm_orm import ChatLine, Store

SEARCHED_AT_ONCE = 100

LENGTHS = (13, 18, 36)
"""Characters of an id: its time; with 12 bits of chance; all of it. "llm-orm show" takes the shorter ones for it."""

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

    not_both(as_json, as_csv)
    where = conditions or None
    with opened_with_its_columns(**database) as store:
        if text is None:
            lines = chats_of(store, where=where, since=since, until=until, order=order, limit=limit, tz=tz)
            snippets: list[str | None] | None = None
        else:
            from llm_orm.filters import span
            from llm_orm.periods import zone

            first, end = span(since, until, zone(tz))
            found = _found(store, text, min(limit, MOST_SHOWN), where=where, since=first, until=end)
            by_id = {}
            if found:
                by_id = {line.id: line for line in chats_of(store, where={"id": list(found)}, limit=None)}
            lines = [by_id[key] for key in found if key in by_id]
            snippets = [found[line.id] for line in lines]
        own = store.chat_columns
    _print(lines, own, snippets, as_json=as_json, as_csv=as_csv)


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


def _print(
    lines: list["ChatLine"], own: list[str], snippets: list[str | None] | None, *, as_json: bool, as_csv: bool
) -> None:
    more = [{} if snippets is None else {"found": snippets[place]} for place in range(len(lines))]
    if as_json:
        print_json([line.as_dict() | extra for line, extra in zip(lines, more, strict=True)])
    elif not as_csv and is_terminal():
        length = next(each for each in LENGTHS if len({str(line.id)[:each] for line in lines}) == len(lines))
        rows = [
            {"id": str(line.id)[:length]} | _short(line, own, lines) | extra
            for line, extra in zip(lines, more, strict=True)
        ]
        print_rows(_names(rows), [list(row.values()) for row in rows], cut=("title", "found"))
    else:
        rows = [_flat(line) | extra for line, extra in zip(lines, more, strict=True)]
        print_rows(_names(rows) or FLAT, [list(row.values()) for row in rows], as_csv=as_csv)


FLAT = (
    "id title model provider agent_class metadata created_at updated_at status messages turns requests failed_requests "
    "unpriced_requests cost total_tokens"
).split()


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list(rows[0]) if rows else []


def _flat(line: "ChatLine") -> dict[str, Any]:
    return {name: getattr(line, name) for name in FLAT} | dict(line.columns)


def _short(line: "ChatLine", own: list[str], lines: list["ChatLine"]) -> dict[str, Any]:
    """What a terminal has room for; columns of the application where any of the chats has a value there."""
    shown: dict[str, Any] = {"updated": f"{line.updated_at:%Y-%m-%d %H:%M}", "title": line.title, "model": line.model}
    shown |= {"turns": line.turns, "cost": line.cost}
    return shown | {name: line.columns[name] for name in own if any(each.columns[name] is not None for each in lines)}

"""What the address of a page asks for: a span of time, filters, what to break down by; and addresses of other pages
that keep them."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any
from urllib.parse import urlencode

from ..errors import InvalidValue, meant
from ..filters import METADATA, check_where, span
from ..periods import zone
from ..store import Store

RANGES = {"24h": timedelta(hours=24), "7d": timedelta(days=7), "30d": timedelta(days=30), "90d": timedelta(days=90)}
DEFAULT_RANGE = "7d"
LONGEST = timedelta(days=3700)
NONE = "(none)"
"""How a filter says NULL: agent_class=(none) are the requests of chats without an agent."""

FILTERS = ("provider", "model", "status", "error", "source", "agent_class", "chat", "tool", "streamed")
"""What requests may be looked for by, besides the application's columns and "metadata.key"."""

OF_CHATS = ("id", "model", "provider", "agent_class")

DROPPED = ("format", "table", "filter", "value", "key")
"""What an export is of, and what the form for one more filter says: not what is asked for."""

SAID = ("range", "since", "until", "tz", "by", "order", "limit", "offset", "q", "refresh", "table")
"""What an address may say besides filters."""

OWN = (*dict.fromkeys((*SAID, "before", *DROPPED)),)
"""Names in an address that are no filters."""

MOST_ROWS = 1000
REFRESH_S = (5, 10, 30, 60, 300)


@dataclass(frozen=True)
class Query:
    """What is asked for, checked.

    since, until    aware times; until is exclusive
    where           filters as usage() takes them
    pairs           the address's names and values, less what belongs to this one page
    """

    root: str
    path: str
    pairs: tuple[tuple[str, str], ...]
    range: str
    since: datetime
    until: datetime
    tz: tzinfo
    tz_name: str
    by: str | None
    where: Mapping[str, list[Any]]
    order: str | None
    limit: int
    offset: int
    text: str
    turns_before: int | None
    refresh: int | None
    format: str
    table: str | None

    @property
    def is_export(self) -> bool:
        return self.format != "html"

    @property
    def before(self) -> datetime:
        """When the period before this one, of the same length, began."""
        return self.since - (self.until - self.since)

    @property
    def period(self) -> str:
        """What time is divided into, so that a chart has some ten to a hundred bars."""
        length = self.until - self.since
        if length <= timedelta(hours=49):
            return "hour"
        return "day" if length <= timedelta(days=100) else "week" if length <= timedelta(days=740) else "month"

    @property
    def length(self) -> str:
        """The span in words."""
        if self.range in RANGES:
            return {"24h": "the last 24 hours"}.get(self.range, f"the last {self.range[:-1]} days")
        first, end = self.since.astimezone(self.tz), self.until.astimezone(self.tz)
        if first.time() == end.time() == end.min.time():  # whole days, of which the last is the one before the end
            days = dict.fromkeys(f"{day:%Y-%m-%d}" for day in (first, end - timedelta(days=1)))
            return " to ".join(days)
        return f"{self.local(first)} to {self.local(end)}"

    def local(self, moment: datetime) -> str:
        shown = moment.astimezone(self.tz)
        return f"{shown:%Y-%m-%d}" if shown.time() == shown.min.time() else f"{shown:%Y-%m-%d %H:%M}"

    @property
    def time(self) -> dict[str, Any]:
        """The span, as usage() and the lists take it."""
        return {"since": self.since, "until": self.until, "tz": self.tz}

    def filters(self) -> list[tuple[str, str]]:
        return [(name, value) for name, value in self.pairs if name not in OWN]

    def of_chats(self) -> dict[str, list[Any]] | None:
        """The filters that chats can be looked for by, as chats() takes them."""
        found = {("id" if name == "chat" else name): value for name, value in self.where.items() if is_of_chats(name)}
        return found or None

    def href(self, path: str | None = None, **changes: Any) -> str:
        """An address with everything that this one asks for, and these changes: None takes a name out."""
        kept = [pair for pair in self.pairs if pair[0] not in changes]
        if path is not None and path != self.path:
            kept = [pair for pair in kept if pair[0] not in ("order", "offset", "q", "limit", "by", "before")]
        for name, value in changes.items():
            values = value if isinstance(value, list) else [] if value is None else [value]
            kept += [(name, str(each)) for each in values]
        return self.root + (self.path if path is None else path) + (f"?{urlencode(kept)}" if kept else "")

    def filtered(self, name: str, value: Any, path: str | None = None) -> str:
        """The address with one filter set to one value, or to NULL."""
        return self.href(path, **{"offset": None, name: written(value)})

    def without(self, name: str, value: str) -> str:
        kept = [each for each_name, each in self.pairs if each_name == name and each != value]
        return self.href(None, **{"offset": None, name: kept})

    def export(self, kind: str, table: str, ignored: Sequence[str] = ()) -> str:
        """The address of a table, less what says nothing on its page."""
        path = {"/": "/overview"}.get(self.path, self.path)
        kept = [pair for pair in self.pairs if pair[0] not in ("refresh", "table", *ignored)]
        return f"{self.root}{path}.{kind}?{urlencode([*kept, ('table', table)])}"


def is_of_chats(name: str) -> bool:
    return name == "chat" or name in OF_CHATS or name not in FILTERS


def written(value: Any) -> str:
    """A value as an address has it."""
    return NONE if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def tidied(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The names and values less what a form sends that was left empty; its one more filter in its place.

    A key is one of the metadata, whatever else was chosen.
    """
    given = dict(pairs)
    kept = [(name, value) for name, value in pairs if value.strip() and name not in ("filter", "value", "key")]
    key, value = given.get("key", "").strip(), given.get("value", "").strip()
    name = f"{METADATA}{key}" if key else given.get("filter", "")
    if name and value:
        kept += [] if (name, value) in kept else [(name, value)]
    return kept


def query_of(
    store: Store,
    pairs: Iterable[tuple[str, str]],
    *,
    now: datetime,
    root: str = "",
    path: str = "/",
    format: str | None = None,
) -> Query:
    """What the names and values of an address ask for; raises `InvalidValue` that names what makes no sense.

    format    what the path says of it, if anything
    """
    pairs = tuple(pairs)
    once = _once(pairs)
    where = _where(store, [pair for pair in pairs if pair[0] not in OWN])
    tz_name = once.get("tz", "UTC")
    tz = zone(tz_name)
    name, since, until = _span(once, tz, now)
    by = once.get("by")
    if by is not None:
        _check_dimension(store, by)
    return Query(
        root=root,
        path=path,
        pairs=tuple(pair for pair in pairs if pair[0] not in DROPPED),
        range=name,
        since=since,
        until=until,
        tz=tz,
        tz_name=tz_name,
        by=by,
        where=where,
        order=once.get("order"),
        limit=_number("limit", once.get("limit", "50"), 1, MOST_ROWS),
        offset=_number("offset", once.get("offset", "0"), 0, 10**9),
        text=once.get("q", ""),
        turns_before=_number("before", once["before"], 0, 2**31 - 1) if "before" in once else None,
        refresh=_number("refresh", once["refresh"], 1, 86400) if "refresh" in once else None,
        format=format or _one_of("format", once.get("format", "html"), ("html", "csv", "json")),
        table=once.get("table"),
    )


def dimensions(store: Store) -> list[str]:
    """What can be broken down by, besides "metadata.key"."""
    return [*FILTERS, *(name for name in store.chat_columns if name not in (*FILTERS, *OWN))]


def _once(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in OWN:
            if name in found and found[name] != value:
                raise InvalidValue(f"{name!r} is there twice: {found[name]!r} and {value!r}")
            found[name] = value
    return found


def _where(store: Store, pairs: list[tuple[str, str]]) -> dict[str, list[Any]]:
    known = (*FILTERS, *store.chat_columns)
    where: dict[str, list[Any]] = {}
    for name, value in pairs:
        if name not in known and not (name.startswith(METADATA) and len(name) > len(METADATA)):
            right = meant(name, (*known, *OWN))
            hint = f": did you mean {right!r}?" if right else "."
            filters = ", ".join(dict.fromkeys(known))
            raise InvalidValue(
                f"there is no parameter {name!r}{hint} There are {', '.join(SAID)}; filters: {filters}, metadata.<key>"
            )
        where.setdefault(name, []).extend(_values(name, value))
    if where:
        check_where(store, "the address", where, FILTERS)
    return where


def _values(name: str, text: str) -> list[Any]:
    """What a filter's text stands for: metadata may be a text, or a number that looks like it."""
    if text == NONE:
        return [None]
    if name == "status":
        return [_number("status", text, 0, 999)]
    if name == "streamed":
        return [_one_of("streamed", text, ("true", "false")) == "true"]
    if name.startswith(METADATA) and re.fullmatch(r"true|false|-?\d{1,15}(\.\d{1,15})?", text):
        return [text, json.loads(text)] if re.fullmatch(r"true|false|-?(0|[1-9]\d*)(\.\d+)?", text) else [text]
    return [text]


def _span(given: Mapping[str, str], tz: tzinfo, now: datetime) -> tuple[str, datetime, datetime]:
    custom = "since" in given or "until" in given
    name = given.get("range", "custom" if custom else DEFAULT_RANGE)
    if name in RANGES and not custom:
        return name, now - RANGES[name], now
    if name != "custom":
        if name in RANGES:
            raise InvalidValue(f"range={name!r} and since or until: leave out one of them, or write range=custom")
        raise InvalidValue(f"range={name!r} is none of {', '.join(RANGES)} and custom")
    if "since" not in given:
        raise InvalidValue("range=custom needs since, as in since=2026-11-01; until is the moment after the last")
    since, until = span(given["since"], given.get("until"), tz)
    assert since is not None
    until = until or now
    if since >= until:
        raise InvalidValue(f"since={given['since']!r} is in the future: nothing is there yet")
    if until - since > LONGEST or since.year < 2000:
        raise InvalidValue(f"since={given['since']!r} is too long ago: the pages show ten years at most")
    return name, since.astimezone(UTC), until.astimezone(UTC)


def _check_dimension(store: Store, name: str) -> None:
    known = dimensions(store)
    if name not in known and not (name.startswith(METADATA) and len(name) > len(METADATA)):
        right = meant(name, known)
        hint = f": did you mean {right!r}?" if right else f". There are {', '.join(known)} and metadata.<key>"
        raise InvalidValue(f"there is no by={name!r}{hint}")


def _number(name: str, text: str, least: int, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text) or not least <= int(text) <= most:
        raise InvalidValue(f"{name}={text!r} is not a number from {least} to {most}")
    return int(text)


def _one_of(name: str, text: str, known: Sequence[str]) -> str:
    if text not in known:
        raise InvalidValue(f"{name}={text!r} is none of {', '.join(known)}")
    return text

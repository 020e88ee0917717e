"""A page before it is drawn: what is on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .query import Query
from .tables import Table


@dataclass(frozen=True)
class Page:
    """title       what it is called, also in the window's title
    template    what draws it
    tables      what is on it and can be had as CSV and JSON; the first is what an export is of that names none
    by          what it is broken down by; `choices` are what else it could be
    ignored     names of filters that say nothing here
    """

    title: str
    template: str
    tables: Sequence[Table] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    by: str | None = None
    choices: Sequence[str] = ()
    ignored: Sequence[str] = ()
    has_time: bool = True


def without(query: Query, *names: str) -> dict[str, list[Any]] | None:
    """The filters less those that say nothing on a page."""
    return {name: value for name, value in query.where.items() if name not in names} or None


def ignored(query: Query, *names: str) -> list[str]:
    return [name for name in query.where if name in names]

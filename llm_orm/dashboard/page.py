"""A page before it is drawn: what is on it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .tables import Table


@dataclass(frozen=True)
class Page:
    """title       what it is called, also in the window's title
    template    what draws it
    tables      what is on it and can be had as CSV and JSON, by name: each is made when it is asked for; the first is
                what an export is of that names none
    values      what else the template shows, made when the page is drawn
    by          what it is broken down by; `choices` are what else it could be, besides keys of the metadata. None: it
                is not broken down by what one likes
    """

    title: str
    template: str
    tables: Mapping[str, Callable[[], Table]] = field(default_factory=dict)
    values: Callable[[], Mapping[str, Any]] = dict
    by: str | None = None
    choices: Sequence[str] | None = None
    has_time: bool = True

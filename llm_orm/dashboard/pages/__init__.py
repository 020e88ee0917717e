"""The pages: each is a function of a store and a query that returns a `Page`."""

from collections.abc import Callable
from dataclasses import dataclass

from ...store import Store
from ..page import Page
from ..query import Query, is_of_chats
from .budgets import budgets_page
from .chats import chats_page
from .errors import errors_page
from .groups import agents_page, models_page, tools_page, users_page
from .overview import overview_page
from .requests import requests_page

Make = Callable[[Store, Query], Page]


@dataclass(frozen=True)
class Entry:
    """A page of the navigation.

    has      whether a filter says something there
    takes    which of by and q do
    """

    title: str
    make: Make
    has: Callable[[str], bool]
    takes: tuple[str, ...] = ()


def _of_requests(name: str) -> bool:
    return name != "tool"


def _of_tools(name: str) -> bool:
    return name not in ("error", "status", "streamed")


def _all(name: str) -> bool:
    return True


def _none(name: str) -> bool:
    return False


PAGES: dict[str, Entry] = {
    "/": Entry("Overview", overview_page, _of_requests, ("by",)),
    "/models": Entry("Models", models_page, _of_requests),
    "/users": Entry("Users", users_page, _of_requests, ("by",)),
    "/agents": Entry("Agents", agents_page, _of_requests),
    "/tools": Entry("Tools", tools_page, _of_tools),
    "/errors": Entry("Errors", errors_page, _of_requests),
    "/chats": Entry("Chats", chats_page, is_of_chats, ("q",)),
    "/requests": Entry("Requests", requests_page, _all),
    "/budgets": Entry("Budgets", budgets_page, _none),
}
"""By address, in the order of the navigation."""


def ignored(query: Query, entry: Entry | None) -> list[str]:
    """The names of an address that say nothing on a page; None is the page of a chat."""
    found = [name for name in query.where if entry is None or not entry.has(name)]
    given = (("by", query.by), ("q", query.text))
    return found + [name for name, value in given if value and (entry is None or name not in entry.takes)]


def where_it_says_something(name: str) -> str:
    """The pages that have a filter, or by, or q."""
    pages = PAGES.values()
    has = [each.title for each in pages if (name in each.takes if name in ("by", "q") else each.has(name))]
    return ", ".join(has)

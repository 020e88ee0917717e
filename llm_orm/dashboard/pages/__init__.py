"""The pages: each is a function of a store and a query that returns a `Page`."""

from collections.abc import Callable

from ...store import Store
from ..page import Page
from ..query import Query
from .budgets import budgets_page
from .chats import chats_page
from .errors import errors_page
from .groups import agents_page, models_page, tools_page, users_page
from .overview import overview_page
from .requests import requests_page

Make = Callable[[Store, Query], Page]

PAGES: dict[str, tuple[str, Make]] = {
    "/": ("Overview", overview_page),
    "/models": ("Models", models_page),
    "/users": ("Users", users_page),
    "/agents": ("Agents", agents_page),
    "/tools": ("Tools", tools_page),
    "/errors": ("Errors", errors_page),
    "/chats": ("Chats", chats_page),
    "/requests": ("Requests", requests_page),
    "/budgets": ("Budgets", budgets_page),
}
"""By address, in the order of the navigation: what it is called there, and what makes it."""

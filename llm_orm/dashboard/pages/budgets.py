"""Budgets: where each of the store's own stands now."""

from ...spending import budget_status
from ...store import Store
from ..page import Page
from ..query import Query
from ..tables import Column, Table

COLUMNS = (
    Column("budget", "Budget", wraps=True),
    Column("share", "Used", "share"),
    Column("state", "State", "status"),
    Column("who", "Who", "name", by="who", wraps=True),
    Column("spent", "Spent", "dollars"),
    Column("limit", "Limit", "dollars"),
    Column("remaining", "Left", "dollars"),
    Column("resets_at", "Resets", "time"),
)


def budgets_page(store: Store, query: Query) -> Page:
    """One row for each who has spent something of a budget, the highest share first."""
    return Page("Budgets", "budgets.html", {"budgets": lambda: budgets_table(store)}, has_time=False)


def budgets_table(store: Store) -> Table:
    rows = []
    for status in budget_status(store):
        state = (
            "spent" if status.is_exceeded else "near" if status.share >= min(status.budget.warn, default=1) else "ok"
        )
        rows.append({**status.as_dict(), "who": status.whom or None, "state": state})
    return Table(
        "budgets",
        "Budgets",
        COLUMNS,
        rows,
        marks=lambda row: "failed" if row["state"] == "spent" else "",
        empty="Nothing was spent yet."
        if store.budgets
        else "This store has no budgets: connect(…, budgets=[Budget(…)]), and start the dashboard with --store.",
    )

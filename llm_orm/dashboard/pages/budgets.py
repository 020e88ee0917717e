"""Budgets: where each of the store's own stands now."""

from ...spending import budget_status
from ...store import Store
from ..page import Page
from ..query import Query
from ..tables import Column, Table

COLUMNS = (
    Column("budget", "Budget"),
    Column("who", "Who"),
    Column("state", "State", "status"),
    Column("share", "Spent", "percent"),
    Column("spent", "Spent", "money"),
    Column("limit", "Limit", "dollars"),
    Column("remaining", "Left", "money"),
    Column("resets_at", "Resets", "time"),
)


def budgets_page(store: Store, query: Query) -> Page:
    """One row for each who has spent something of a budget, the highest share first."""
    rows = []
    for status in budget_status(store):
        state = (
            "spent" if status.is_exceeded else "near" if status.share >= min(status.budget.warn, default=1) else "ok"
        )
        rows.append({**status.as_dict(), "who": status.whom or None, "state": state})
    table = Table(
        "budgets",
        "Budgets",
        COLUMNS,
        rows,
        marks=lambda row: "failed" if row["state"] == "spent" else "",
        empty="Nothing was spent yet."
        if store.budgets
        else "This store has no budgets: connect(…, budgets=[Budget(…)]), and start the dashboard with --store.",
    )
    return Page("Budgets", "budgets.html", [table], has_time=False)

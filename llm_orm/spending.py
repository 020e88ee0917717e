"""What was spent of budgets, summed up in the database: before each call of a turn, and for whoever asks."""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import peewee as pw

from .budgets import NAMED, Budget, BudgetStatus, check_against, check_budgets
from .dimensions import Dimension, conditions, dimension, joins
from .errors import BudgetExceeded, ChatGone
from .filters import within
from .middleware import shown_dollars
from .options import Candidate
from .records import now
from .statements import Sql
from .store import Store, as_store
from .sums import dollars, summed

log = logging.getLogger("llm_orm")

OF_THE_CALL = ("model", "provider")
"""What a request says itself, and a turn knows before each call only."""

KNOWN = (*OF_THE_CALL, "chat")
"""What a turn need not look up to know of whose limit it spends."""

Told = tuple[Callable[..., Any], tuple[BudgetStatus, Decimal]]
"""A function of the application's that is to be called, and with what."""


Place = tuple[int, str | None]
"""(which of the budgets, which model or provider where it is by that)"""


class Meter:
    """The budgets that one turn has to keep: `look` before each call of a model, and at its end where it `is_due`."""

    def __init__(self, store: Store, chat_id: UUID, budgets: tuple[Budget, ...]):
        self.budgets = budgets
        self._store = store
        self._chat_id = chat_id
        self._who: list[dict[str, Any] | None] | None = None
        self._seen: dict[Place, tuple[datetime | None, Decimal]] = {}
        """When the period began that was looked at last, and what was spent in it then."""
        self._paid: dict[Candidate, None] = {}
        """The models that were paid for since the last look."""

    def paid(self, candidate: Candidate, cost: Decimal | None) -> None:
        """Take note of a call that has ended."""
        if cost:
            self._paid[candidate] = None

    @property
    def is_due(self) -> bool:
        """Whether a call was paid for since the last look, and may have reached a share that is to be told of."""
        return bool(self._paid) and any(
            spent < self.budgets[place].limit * max(self.budgets[place].warn, default=0)
            or (self.budgets[place].warn and since != _since(self.budgets[place]))
            for (place, _), (since, spent) in self._seen.items()
        )

    def look(self, candidate: Candidate) -> tuple[list[Told], BudgetExceeded | None]:
        """Whom to tell that a share was reached since the last look; and what keeps the model from being called.

        Raises `ChatGone` where a budget is by something of the chat, and that was deleted.
        """
        if self._who is None:
            self._who = self._read_who()
        due = self._due_of(candidate)
        looks = due | {place: who for each in self._paid for place, who in self._due_of(each).items()}
        if not looks:
            return [], None
        spent = [_Spent(self._store, self.budgets[place]) for place, _ in looks]
        sums = [each.of(who) for each, who in zip(spent, looks.values(), strict=True)]
        columns = ", ".join(f"({each.text})" for each in sums)
        found = self._store.read(Sql(f"SELECT {columns}", tuple(value for each in sums for value in each.params)))[0]
        statuses = {
            place: each.status(who, total)
            for (place, who), each, total in zip(looks.items(), spent, found, strict=True)
        }
        told = [each for place, status in statuses.items() for each in self._reached(place, status)]
        self._paid = {}
        return told, next((_exceeded(statuses[place], candidate) for place in due if statuses[place].is_exceeded), None)

    def _due_of(self, candidate: Candidate) -> dict[Place, dict[str, Any]]:
        """Of whose limits a call of the model spends."""
        called = {"model": candidate.name, "provider": candidate.answering_provider}
        return {
            (place, called.get(budget.by or "")): who | ({budget.by: called[budget.by]} if budget.by in called else {})
            for place, (budget, who) in enumerate(zip(self.budgets, self._who or (), strict=True))
            if who is not None and _holds(budget, called)
        }

    def _reached(self, place: Place, status: BudgetStatus) -> list[Told]:
        since = _since(status.budget)
        is_known = place in self._seen
        last_since, before = self._seen.get(place, (since, status.spent))
        if is_known and last_since != since:
            before = Decimal(0)  # what the last call cost may be all that is in the new period
        self._seen[place] = since, status.spent
        reached = [share for share in status.budget.warn if before < share * status.limit <= status.spent]
        tell = status.budget.on_warn
        if tell is not None:
            return [(_quietly(tell), (status, share)) for share in reached]
        for share in reached:
            log.warning("%s", _reaching(status, share))
        return []

    def _read_who(self) -> list[dict[str, Any] | None]:
        """Of whose limit the turn spends, for each budget, as the database has it; None: that is not about the chat."""
        columns: list[Sql] = []
        for budget in self.budgets:
            if budget.by is not None and budget.by not in KNOWN:
                columns.append(dimension(self._store, budget.by, ours=NAMED).sql)
            columns += _wheres(self._store, _of_the_chat(budget))[0]
        values = iter(self._read_chat(columns) if columns else ())
        found: list[dict[str, Any] | None] = []
        for budget in self.budgets:
            who = {}
            if budget.by is not None and budget.by not in OF_THE_CALL:
                who = {budget.by: self._chat_id.hex if budget.by == "chat" else next(values)}
            holds = [next(values) for _ in _of_the_chat(budget)]
            found.append(who if all(holds) else None)
        return found

    def _read_chat(self, columns: Sequence[Sql]) -> tuple[Any, ...]:
        records, param = self._store.records, self._store.database.param
        chat, session = (_table(record) for record in (records.chat, records.agent_session))
        rows = self._store.read(
            Sql(
                f"SELECT {', '.join(column.text for column in columns)} FROM {chat} c "
                f"LEFT JOIN {session} s ON s.chat_id = c.id WHERE c.id = {param}",
                (*(value for column in columns for value in column.params), self._chat_id.hex),
            )
        )
        if not rows:
            raise ChatGone(f"chat {self._chat_id} was deleted")
        return rows[0]


class _Spent:
    """What was spent of one budget in its current period, as SQL."""

    def __init__(self, store: Store, budget: Budget):
        self.store = store
        self.budget = budget
        self.since, self.resets_at = budget.period_at(now())
        self.dimension = None if budget.by is None else dimension(store, budget.by, ours=NAMED)
        if budget.by == "chat":
            self.dimension = replace(dimension(store, "chat"), sql=Sql("r.chat_id"), needs="")
        self.wheres, self.needs = _wheres(store, budget.where or {})
        if self.dimension is not None:
            self.needs |= set(self.dimension.needs)
        if self.needs or budget.by == "chat":
            self.wheres.append(Sql("r.chat_id IS NOT NULL"))  # nobody knows of a deleted chat whose it was
        self.wheres += within(store, "r.created_at", self.since, None)

    def of(self, who: Mapping[str, Any]) -> Sql:
        """The sum of one who has a limit of their own, by the value that the database has."""
        own = [] if self.dimension is None else [_is(self.store, self.dimension, who[self.dimension.name])]
        return self._select(summed(self.store, "r.cost"), [*self.wheres, *own])

    def of_each(self) -> Sql:
        """(who, the sum), of all who have spent; (the sum) where they share one limit."""
        total = summed(self.store, "r.cost")
        if self.dimension is None:
            return self._select(total, self.wheres)
        select = self._select(f"{self.dimension.sql.text}, {total}", self.wheres, self.dimension.sql.params)
        return Sql(f"{select.text} GROUP BY 1", select.params)

    def status(self, who: Mapping[str, Any], total: Any) -> BudgetStatus:
        named = {name: self._read(value) for name, value in who.items()}
        return BudgetStatus(self.budget, named, dollars(self.store, total), self.resets_at)

    def _read(self, value: Any) -> Any:
        return None if value is None or self.dimension is None else self.dimension.read(value)

    def _select(self, columns: str, wheres: Sequence[Sql], params: tuple = ()) -> Sql:
        text = f"SELECT {columns} FROM {joins(self.store, self.needs)}"
        text += f" WHERE {' AND '.join(each.text for each in wheres)}" if wheres else ""
        return Sql(text, (*params, *(value for each in wheres for value in each.params)))


def budget_status(
    store: Store | pw.Database | str | None, budgets: Iterable[Budget] | None = None
) -> list[BudgetStatus]:
    """Where the budgets of a store stand in their current periods, or others: one for each who has spent, the highest
    share first.

    A budget that is `by` nothing counts all, and is there also where nothing was spent. One query for each budget.
    """
    store = as_store(store)
    chosen = store.budgets if budgets is None else check_budgets(budgets)
    check_against(store.records.chat, chosen)
    store.pay()
    found: list[BudgetStatus] = []
    for budget in chosen:
        spent = _Spent(store, budget)
        for *key, total in store.read(spent.of_each()):
            status = spent.status(dict(zip([budget.by], key, strict=True)) if budget.by else {}, total)
            if status.spent or not budget.by:
                found.append(status)
    return sorted(found, key=lambda status: -status.share)


async def abudget_status(
    store: Store | pw.Database | str | None, budgets: Iterable[Budget] | None = None
) -> list[BudgetStatus]:
    """`budget_status`, from asyncio."""
    store = as_store(store)
    return await store.off_the_loop(budget_status, store, budgets)


def _since(budget: Budget) -> datetime | None:
    since, _ = budget.period_at(now())
    return since and since.astimezone(UTC)  # two times of one zone are compared as its clocks show them


def _exceeded(status: BudgetStatus, candidate: Candidate) -> BudgetExceeded:
    whom = f" of {status.whom}" if status.who else ""
    until = "It never resets: raise" if status.resets_at is None else f"It resets at {status.resets_at}; or raise"
    return BudgetExceeded(
        f"the budget {status.budget.label!r}{whom} is spent: {shown_dollars(status.spent)} of "
        f"{shown_dollars(status.limit)}, and the next call, of {candidate.model!r}, was not made. {until} the limit of "
        "the Budget",
        budget=status.budget,
        who=status.who,
        spent=status.spent,
        limit=status.limit,
        resets_at=status.resets_at,
    )


def _reaching(status: BudgetStatus, share: Decimal) -> str:
    whom = f" of {status.whom}" if status.who else ""
    return (
        f"the budget {status.budget.label!r}{whom} has reached {share:.0%}: {shown_dollars(status.spent)} of "
        f"{shown_dollars(status.limit)}"
    )


def _quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, of whose errors the turn hears nothing: what it tells of is paid for."""

    def told(status: BudgetStatus, share: Decimal) -> Any:
        try:
            result = function(status, share)
        except Exception as problem:
            return _failed(status, share, problem)
        return awaited(result, status, share) if inspect.isawaitable(result) else None

    async def awaited(result: Any, status: BudgetStatus, share: Decimal) -> None:
        try:
            await result
        except Exception as problem:
            _failed(status, share, problem)

    return told


def _failed(status: BudgetStatus, share: Decimal, problem: Exception) -> None:
    log.error("%s; on_warn failed: %s", _reaching(status, share), problem, exc_info=problem)


def _of_the_chat(budget: Budget) -> dict[str, tuple[Any, ...]]:
    """What the budget's `where` says of the chat."""
    return {name: values for name, values in (budget.where or {}).items() if name not in OF_THE_CALL}


def _wheres(store: Store, where: Mapping[str, tuple[Any, ...]]) -> tuple[list[Sql], set[str]]:
    return conditions(store, "a Budget", where, ours=NAMED)


def _holds(budget: Budget, called: Mapping[str, str]) -> bool:
    where = budget.where or {}
    return all(called[name] in where[name] for name in OF_THE_CALL if name in where)


def _is(store: Store, each: Dimension, value: Any) -> Sql:
    """What is true where a dimension has a value, as the database gave it."""
    if value is None:
        return Sql(f"{each.sql.text} IS NULL", each.sql.params)
    return Sql(f"{each.sql.text} = {store.database.param}", (*each.sql.params, value))


def _table(record: Any) -> str:
    return f'"{record._meta.table_name}"'

"""What may be spent in a period: a `Budget`, and where it stands. Whether it is kept is looked up in `spending.py`."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, tzinfo
from decimal import ROUND_FLOOR, Decimal, InvalidOperation
from typing import Any, Literal
from uuid import UUID

from .errors import InvalidValue, UnknownKeyword, meant
from .middleware import limit_in_dollars, shown_dollars
from .periods import PERIODS, period_of, zone
from .records import BASES, LlmChat

NAMED = ("chat", "model", "provider", "agent_class")
"""What a budget may be by, besides the application's columns of the chat and "metadata.key"."""

METADATA = "metadata."


@dataclass(frozen=True, init=False)
class Budget:
    """A limit to what is spent in a period, in the database, over all processes: `Budget("5.00", by="user_id")`.

    limit      US dollars, as a string, a `Decimal` or an int
    per        "hour", "day", "week" (from Monday), "month", or "total" for all time
    by         who has a limit of their own: "chat", "model", "provider", "agent_class", a column of yours on the chat,
               "metadata.key"; those without a value share one. None: one limit for all; of a chat's own budget, that
               chat
    where      counts these alone, by the same names: {"metadata.plan": "free", "model": ["gpt-4o", "gpt-4.1"]}
    tz         whose calendar the periods are of: "Europe/Berlin", or a tzinfo
    warn       shares of the limit, over 0 and up to 1, that are told of when they are reached
    on_warn    called with (`BudgetStatus`, share) then; may be async where one asks with `aask`. What it raises is
               logged, and changes nothing. Without one, a warning is logged
    name       what errors and lists call it

    Before each call of a model, retries, fallbacks and rounds of tools included, what is on record is summed up. The
    call is made while that is under the limit; else the turn raises `BudgetExceeded`. What is under way is not yet on
    record: with n calls under way at once, the spend ends below the limit plus the cost of these n calls. Calls without
    a known price count nothing. Requests of deleted chats count where neither `by` nor `where` is about the chat.

    on_warn is called at least once for each share that is reached, and twice where two calls reach it at once; but not
    where the turn that reaches it is broken off (a stream left early, a cancelled task, a process that dies).
    """

    limit: Decimal
    per: str
    by: str | None
    where: Mapping[str, tuple[Any, ...]] | None = field(hash=False)
    tz: str | tzinfo
    warn: tuple[Decimal, ...]
    on_warn: Callable[["BudgetStatus", Decimal], Any] | None
    name: str | None

    # What it is given is of other types than what it has.
    def __init__(
        self,
        limit: str | Decimal | int,
        per: Literal["hour", "day", "week", "month", "total"] = "day",
        *,
        by: str | None = None,
        where: Mapping[str, Any] | None = None,
        tz: str | tzinfo = "UTC",
        warn: Iterable[float | str | Decimal] = (Decimal("0.8"),),
        on_warn: Callable[["BudgetStatus", Decimal], Any] | None = None,
        name: str | None = None,
    ):
        if per not in PERIODS:
            raise InvalidValue(f"a Budget is per {', '.join(PERIODS)}, not {per!r}")
        if by is not None:
            _check_name("by", by)
        if on_warn is not None and not callable(on_warn):
            raise InvalidValue(f"the on_warn of a Budget must be a function, not {on_warn!r}")
        if name is not None and (not isinstance(name, str) or not name):
            raise InvalidValue(f"the name of a Budget must be some text, not {name!r}")
        zone(tz)
        values = {
            "limit": limit_in_dollars(limit, "a Budget"),
            "per": per,
            "by": by,
            "where": _where(where),
            "tz": tz,
            "warn": _shares(warn),
            "on_warn": on_warn,
            "name": name,
        }
        for attribute, value in values.items():
            object.__setattr__(self, attribute, value)

    @property
    def label(self) -> str:
        """Its name; else what it says: "$5 per day by user_id"."""
        if self.name:
            return self.name
        per = "in total" if self.per == "total" else f"per {self.per}"
        by = f" by {self.by}" if self.by else ""
        where = "".join(f", {name}={' or '.join(map(repr, each))}" for name, each in (self.where or {}).items())
        return f"{shown_dollars(self.limit)} {per}{by}{where}"

    @property
    def names(self) -> tuple[str, ...]:
        """What it is by and where, by name."""
        return (*([self.by] if self.by else []), *(self.where or ()))

    def period_at(self, moment: datetime) -> tuple[datetime | None, datetime | None]:
        """(since when it counts, when it resets); None: ever, never."""
        return period_of(self.per, moment, zone(self.tz))


@dataclass(frozen=True, slots=True)
class BudgetStatus:
    """Where a budget stands in its current period, for one of those who have a limit of their own.

    who          {"user_id": "u_1"}; {} where it counts all
    spent        US dollars, as `Decimal`, as is `limit`
    resets_at    when the next period begins, in the time zone of the budget; None: never
    """

    budget: Budget
    who: Mapping[str, Any]
    spent: Decimal
    resets_at: datetime | None

    @property
    def limit(self) -> Decimal:
        return self.budget.limit

    @property
    def remaining(self) -> Decimal:
        """What is left of it, not below 0."""
        return max(self.limit - self.spent, Decimal(0))

    @property
    def share(self) -> Decimal:
        """spent / limit: 1 and more where it is used up."""
        return self.spent / self.limit

    @property
    def is_exceeded(self) -> bool:
        """Whether the next call is refused."""
        return self.spent >= self.limit

    @property
    def whom(self) -> str:
        """`who`, to be read: "user_id='u_1'"."""
        shown = {name: str(value) if isinstance(value, UUID) else repr(value) for name, value in self.who.items()}
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    def as_dict(self) -> dict[str, Any]:
        """All of it by name; the budget by its label, and of the share four places."""
        return {
            "budget": self.budget.label,
            "who": dict(self.who),
            "spent": self.spent,
            "limit": self.limit,
            "remaining": self.remaining,
            "share": self.share.quantize(Decimal("0.0001"), ROUND_FLOOR),
            "resets_at": self.resets_at,
            "is_exceeded": self.is_exceeded,
        }


def check_budgets(given: Any) -> tuple[Budget, ...]:
    """Budgets as they are given; raises `InvalidValue` for what is none."""
    is_list = isinstance(given, Iterable) and not isinstance(given, str | Mapping)
    budgets: tuple[Any, ...] = tuple(given) if is_list else ()
    if not is_list or not all(isinstance(each, Budget) for each in budgets):
        raise InvalidValue(f'budgets must be a list of budgets, as [Budget("5.00", per="day")], not {given!r}')
    return budgets


def of_a_chat(given: Any) -> tuple[Budget, ...]:
    """Budgets as they are given to a chat: its own spend is what they count, unless they say `by`."""
    return tuple(each if each.by else replace(each, by="chat") for each in check_budgets(given))


def check_against(chat: type[LlmChat], budgets: Iterable[Budget]) -> None:
    """Refuse a budget by what the chats of a store do not have. Raises `UnknownKeyword` and `InvalidValue`."""
    fields: Any = chat._meta.fields  # type: ignore[attr-defined]
    own = [name for name in fields if name not in BASES["chat"]._meta.fields]  # type: ignore[attr-defined]
    for budget in budgets:
        for name in budget.names:
            if name in (*NAMED, *own) or name.startswith(METADATA):
                continue
            right = meant(name, (*NAMED, *own))
            raise UnknownKeyword(
                f"a Budget cannot be by {name!r}; it takes {', '.join((*NAMED, 'metadata.<key>'))}; columns of the "
                f"application: {', '.join(own) or 'none'}" + (f"; did you mean {right!r}?" if right else "")
            )
        for name, values in (budget.where or {}).items():
            for value in values if name in own else ():
                try:
                    fields[name].db_value(value)
                except (TypeError, ValueError, ArithmeticError) as error:
                    raise InvalidValue(f"the where of a Budget has {name}={value!r}: {error}") from error


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not name.removeprefix(METADATA) or "\0" in name:
        names = ", ".join(f'"{each}"' for each in NAMED)
        raise InvalidValue(f'the {what} of a Budget is {names}, a column of the chat or "metadata.key", not {name!r}')


def _where(given: Any) -> dict[str, tuple[Any, ...]] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping) or not given:
        raise InvalidValue(f'the where of a Budget is like {{"metadata.plan": "free"}}, not {given!r}')
    found = {}
    for name, value in given.items():
        _check_name("where", name)
        found[name] = tuple(value) if isinstance(value, list | tuple | set | frozenset) else (value,)
        if not found[name] or not all(_may_be(name, each) for each in found[name]):
            raise InvalidValue(f"the where of a Budget has {name}={value!r}: that is never so, or cannot be compared")
    return found


def _may_be(name: str, value: Any) -> bool:
    if name == "chat":
        return _is_id(value)
    if name in NAMED:
        return isinstance(value, str)
    if name.startswith(METADATA):
        return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
    return not isinstance(value, Mapping | list | tuple | set | frozenset)


def _is_id(value: Any) -> bool:
    try:
        return bool(UUID(str(value)))
    except ValueError:
        return False


def _shares(given: Any) -> tuple[Decimal, ...]:
    try:
        if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
            raise InvalidOperation
        shares = tuple(sorted({Decimal(str(each)) for each in given}))
        if not all(each.is_finite() and 0 < each <= 1 for each in shares):
            raise InvalidOperation
    except InvalidOperation:
        raise InvalidValue(
            f"the warn of a Budget is shares of its limit, over 0 and up to 1, as (0.5, 0.8), not {given!r}"
        ) from None
    return shares

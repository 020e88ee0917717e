"""The calendar's periods in a time zone: where one begins, and where the next does."""

from datetime import UTC, datetime, time, timedelta, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

from .errors import InvalidValue

TIMES = ("hour", "day", "week", "month")
PERIODS = (*TIMES, "total")

MOST_PERIODS = 10_000

Period = tuple[Any, datetime, datetime]
"""(what it is called, from this moment on, before this one): an hour is called by its beginning, the others by their
first day"""


def zone(tz: Any) -> tzinfo:
    """The time zone of a name, "Europe/Berlin"; raises `InvalidValue`."""
    if isinstance(tz, tzinfo):
        return tz
    try:
        return UTC if tz == "UTC" else ZoneInfo(tz)
    except (TypeError, ValueError, KeyError, OSError):  # ZoneInfoNotFoundError is a KeyError
        raise InvalidValue(f'tz={tz!r} is not a time zone: write "UTC", "Europe/Berlin" or a tzinfo') from None


def period_of(per: str, moment: datetime, tz: tzinfo) -> tuple[datetime | None, datetime | None]:
    """(its beginning, that of the next one), in the time zone; None: never. A week begins on Monday."""
    if per == "total":
        return None, None
    local = moment.astimezone(tz)
    if per == "hour":
        # Counted in UTC, for the hour that a clock is put back by is there twice.
        first = moment.astimezone(UTC) - timedelta(
            minutes=local.minute, seconds=local.second, microseconds=local.microsecond
        )
        return first.astimezone(tz), (first + timedelta(hours=1)).astimezone(tz)
    day = local.date()
    if per == "day":
        following = day + timedelta(days=1)
    elif per == "week":
        day -= timedelta(days=day.weekday())
        following = day + timedelta(days=7)
    else:
        day = day.replace(day=1)
        following = (day + timedelta(days=31)).replace(day=1)
    return datetime.combine(day, time.min, tz), datetime.combine(following, time.min, tz)


def periods_of(per: str, first: datetime, end: datetime, tz: tzinfo) -> list[Period]:
    """The periods that a span touches, in order and in UTC; the first and the last are cut at its ends.

    Raises `InvalidValue` where they are too many.
    """
    found: list[Period] = []
    moment = first
    while moment < end:
        if len(found) == MOST_PERIODS:
            raise InvalidValue(f"by {per!r} this span has more than {MOST_PERIODS:,} periods: take longer ones")
        start: Any
        stop: Any
        try:
            start, stop = period_of(per, moment, tz)
            following = stop.astimezone(UTC)
        except OverflowError:
            raise InvalidValue(f"by {per!r} this span ends with the year {end.year}: end it earlier") from None
        found.append((start if per == "hour" else start.date(), moment, min(following, end)))
        moment = following
    return found

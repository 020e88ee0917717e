"""How a value is shown to people."""
# ruff: noqa: RUF001

import json
from datetime import date, datetime, timedelta, tzinfo
from decimal import Decimal
from typing import Any

NOTHING = "–"


def dollars(value: Decimal | None, places: int = 4) -> str:
    if value is None:
        return NOTHING
    sign = "-" if value < 0 else ""
    return f"{sign}${abs(value):,.{places}f}"


def spend(value: Decimal | None) -> str:
    """Dollars of a card: cents where it is more than some, else what there is."""
    return dollars(value, 2 if value is not None and (value >= 1 or value == 0) else 4)


def known_cost(cost: Decimal | None, requests: int | None, unpriced: int | None) -> Decimal | None:
    """Dollars; None where no price is known of any of the requests."""
    return None if requests and unpriced and unpriced >= requests else cost


def unpriced(count: int | None) -> str:
    """What stands beside an amount that leaves some requests out."""
    return f"{count:,} unpriced" if count else ""


def exact(value: Decimal | None) -> str:
    return NOTHING if value is None else f"${value:,f}"


def number(value: Any) -> str:
    return NOTHING if value is None else f"{value:,}"


def compact(value: int | None) -> str:
    """A number in three or four digits: 1.24 M."""
    if value is None:
        return NOTHING
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if abs(value) >= size * 10 or (abs(value) >= size and size > 1000):
            scaled = value / size
            return f"{scaled:.{0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2}f} {unit}"
    return f"{value:,}"


def milliseconds(value: float | None) -> str:
    if value is None:
        return NOTHING
    if value < 1000:
        return f"{value:.0f} ms"
    if value < 60_000:
        return f"{value / 1000:.2f} s" if value < 10_000 else f"{value / 1000:.1f} s"
    minutes, seconds = divmod(round(value / 1000), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def ratio(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value * 100:.1f} %"


def size(value: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if value < 1000 or unit == "MB":
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value = value / 1000  # type: ignore[assignment]
    return NOTHING


def moment(value: datetime | None, tz: tzinfo, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    return NOTHING if value is None else f"{value.astimezone(tz):{form}}"


def period(value: Any, by: str, tz: tzinfo) -> str:
    """What a bar of a chart is called, short; of an hour, "Oct 28, 14:00"."""
    if isinstance(value, datetime):
        return f"{value.astimezone(tz):%b %-d, %H:%M}"
    if by == "month":
        return f"{value:%b %Y}"
    if by == "week":
        return f"{value:%b %-d} – {value + timedelta(days=6):%b %-d}"
    return f"{value:%b %-d}" if isinstance(value, date) else str(value)


def named(value: Any, by: str = "") -> str:
    """A value of a dimension."""
    if value is None:
        return {
            "agent_class": "no agent",
            "error": "no error",
            "tool": "no tool",
            "chat": "deleted chat",
            "who": "all",
        }.get(by, "not set")
    if isinstance(value, bool):
        return ("streamed" if value else "not streamed") if by == "streamed" else str(value).lower()
    if by == "status" and value in STATUSES:
        return f"{value} {STATUSES[value]}"
    return str(value)


STATUSES = {0: "no connection", 499: "we hung up"}

TITLES = {
    "provider": "Provider",
    "model": "Model",
    "status": "Status",
    "error": "Error",
    "source": "Source",
    "agent_class": "Agent",
    "chat": "Chat",
    "tool": "Tool",
    "streamed": "Streamed",
}


def title(name: str) -> str:
    """What a dimension is called."""
    return TITLES.get(name, name)


LONGEST = 50_000


def clipped(text: str) -> str:
    """A text as long as a page can bear."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}\n… and {len(text) - LONGEST:,} characters more"


def pretty(text: str | None) -> str:
    """JSON on as many lines as it takes to be read, anything else as it is."""
    try:
        found = json.loads(text or "")
    except ValueError:
        return text or ""
    if not isinstance(found, dict | list):
        return text or ""
    line = json.dumps(found, ensure_ascii=False)
    return line if len(line) <= 80 else json.dumps(found, ensure_ascii=False, indent=2)

"""What a chart draws: one value for each period and series. Its figures are those of usage()."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from . import shown

MOST_SERIES = 8


@dataclass(frozen=True)
class Series:
    """color    the name of a colour of the style sheet"""

    label: str
    color: str
    values: Sequence[Any]


@dataclass(frozen=True)
class Chart:
    """kind    bars, which stand on each other; or lines
    unit    money, number or ms
    hours   of bars that are hours: the day of each and its hour, as an axis has room for them
    """

    name: str
    title: str
    kind: str
    unit: str
    labels: Sequence[str]
    series: Sequence[Series]
    hours: Sequence[tuple[str, str]] = ()

    @property
    def is_empty(self) -> bool:
        return not any(value for series in self.series for value in series.values)

    def data(self) -> dict[str, Any]:
        """What the page's script reads. Pixels need no more digits than a double has."""
        return {
            "kind": self.kind,
            "unit": self.unit,
            "labels": list(self.labels),
            "hours": list(self.hours),
            "series": [
                {"label": each.label, "color": each.color, "values": [_drawn(value) for value in each.values]}
                for each in self.series
            ],
        }

    def shown(self, value: Any) -> str:
        if value is None:
            return shown.NOTHING
        return {"money": shown.dollars, "ms": shown.milliseconds}.get(self.unit, shown.number)(value)


def _drawn(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else value


def stacked(
    periods: Sequence[Any],
    rows: Sequence[Any],
    totals: Sequence[Any],
    keys: Sequence[Any],
    by: str,
    period: str,
    value: Callable[[Any], Any],
) -> list[Series]:
    """A series for each of the keys, and what is left of the total as "other"; a value that is not known is None."""
    found: dict[tuple[Any, Any], Any] = {(row[period], row[by]): value(row) for row in rows}
    series = [
        Series(shown.named(key, by), f"c{number}", [found.get((moment, key), 0) for moment in periods])
        for number, key in enumerate(keys, 1)
    ]
    named = [list(each.values) for each in series]
    rest = [(value(row) or 0) - _added(each[index] for each in named) for index, row in enumerate(totals)]
    return [*series, Series("other", "other", rest)] if any(rest) else series


def _added(values: Any) -> Any:
    total: Any = 0
    for each in values:
        total += each or 0
    return total


def sparkline(values: Sequence[Any], width: int = 120, height: int = 32) -> str:
    """The points of a line through the values, in a box of this size; nothing where there are fewer than two."""
    drawn = [float(value or 0) for value in values]
    if len(drawn) < 2 or not any(drawn):
        return ""
    most = max(drawn)
    step = width / (len(drawn) - 1)
    return " ".join(
        f"{index * step:.1f},{height - 2 - (height - 4) * value / most:.1f}" for index, value in enumerate(drawn)
    )


def change(now: Any, before: Any) -> Mapping[str, Any] | None:
    """How a figure compares with the one of the period before; None where there is nothing to compare with."""
    if now is None or before is None or not before:
        return None
    by = float(now) / float(before) - 1
    return {"by": by, "text": f"{abs(by) * 100:.0f} %" if abs(by) < 10 else f"{by + 1:.0f} times", "way": _way(by)}


def _way(by: float) -> str:
    return "same" if abs(by) < 0.005 else "up" if by > 0 else "down"

"""Values as lines of CSV, which a spreadsheet shows and does not run."""

import csv
import io
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from typing import Any

from .json_values import as_json, decimal_text, dumped

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a text begins with that a spreadsheet may compute; some take the wide forms, too."""


def defused(text: str) -> str:
    """The text; behind an apostrophe, where a spreadsheet would take it for a formula, and run it."""
    return f"'{text}" if text.lstrip(" ").startswith(FORMULA) else text


def csv_line(values: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(map(_cell, values))
    return line.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | Decimal):
        return decimal_text(value) if isinstance(value, Decimal) else str(value)
    if isinstance(value, datetime):
        return value.isoformat(" ")
    return defused(dumped(value) if isinstance(value, dict | list) else str(as_json(value)))

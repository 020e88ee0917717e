"""CSV: the one place that knows what a spreadsheet would run."""

import pytest

from llm_orm.formats.spreadsheet import csv_line, defused


@pytest.mark.parametrize(
    "text", ["=1", "+1", "-1", "@a", "\t=1", "\r=1", "\n=1", " =1", "\uff1d1", "\uff0b1", "\uff0d1"]
)
def test_a_text_that_would_be_run_stands_behind_an_apostrophe(text):
    assert defused(text) == f"'{text}"
    assert csv_line([text]).lstrip('"').startswith("'")


def test_other_texts_and_numbers_below_zero_are_as_they_are():
    assert defused("a = 1") == "a = 1"
    assert csv_line(["plain", -1, -1.5, None, True]) == "plain,-1,-1.5,,true\r\n"

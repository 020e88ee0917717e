"""How rows are printed."""

import io
import json
import pty
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from llm_orm_cli.output import print_rows, print_values

KEY = UUID("01a1f8c8-18bf-7346-8b7e-b94b1b67b901")
COLUMNS = ("id", "cost", "note", "at", "ok", "meta")
ROWS = [
    (KEY, Decimal("1E-10"), "one\ttwo\r\nthree", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), True, {"a": ["é"]}),
    (None, None, None, None, None, None),
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """drawn(print_rows, …): what this prints on a terminal 100 columns wide."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "100")

    def draw(function: Callable[..., None], *arguments: Any, **keywords: Any) -> str:
        ours, theirs = pty.openpty()
        with open(theirs, "w", encoding="utf-8") as terminal, redirect_stdout(terminal):
            function(*arguments, **keywords)
        with open(ours, "rb", buffering=0) as screen:
            return screen.read(10_000).decode()

    return draw


def test_piped_rows_are_lines_of_columns_between_tabs(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(COLUMNS, ROWS, title="things")
    assert capsys.readouterr().out.split("\n") == [
        "things",
        "id\tcost\tnote\tat\tok\tmeta",
        f'{KEY}\t0.0000000001\tone\\ttwo\\r\\nthree\t2026-01-02 03:04:05.000+00:00\ttrue\t{{"a": ["é"]}}',
        "\t\t\t\t\t",
        "",
    ]


def test_json_keeps_nulls_and_writes_money_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(COLUMNS, ROWS, as_json=True)
    first, second = json.loads(capsys.readouterr().out)
    assert first == {
        "id": str(KEY),
        "cost": "0.0000000001",
        "note": "one\ttwo\r\nthree",
        "at": "2026-01-02 03:04:05.000+00:00",
        "ok": True,
        "meta": {"a": ["é"]},
    }
    assert set(second.values()) == {None}


def test_no_rows_are_a_header_or_an_empty_list(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(["a", "b"], [])
    print_rows(["a", "b"], [], as_json=True)
    assert capsys.readouterr().out == "a\tb\n[]\n"


def test_a_terminal_gets_a_table_with_dashes_for_nulls(drawn: Callable[..., str]) -> None:
    screen = drawn(
        print_rows, ["name", "cost"], [("first", Decimal("0.00001")), ("[b]second[/b]", None)], title="things"
    )
    lines = [line.strip() for line in screen.splitlines() if line.strip()]
    assert lines[:2] == ["things", "name              cost"]
    assert set(lines[2]) == {"─"}
    assert lines[3:] == ["first          0.00001", "[b]second[/b]        \N{EN DASH}"]


def test_values_on_a_terminal_are_a_table_too(drawn: Callable[..., str]) -> None:
    screen = drawn(print_values, {"requests": 12, "cost": Decimal("0.5"), "model": None}, title="sums")
    lines = [line.split() for line in screen.splitlines()]
    assert [line for line in lines if line] == [["sums"], ["requests", "12"], ["cost", "0.5"], ["model", "\N{EN DASH}"]]


def test_a_long_text_is_folded_within_its_column(drawn: Callable[..., str]) -> None:
    screen = drawn(print_rows, ["text", "tokens"], [("x" * 300, 12)])
    assert max(map(len, screen.splitlines())) <= 100
    assert screen.count("x") == 300 + 1  # one in the header


def test_what_a_model_wrote_cannot_steer_the_terminal(drawn: Callable[..., str]) -> None:
    assert "\\x1b[2Jgone\\x07\\x9b1m" in drawn(print_rows, ["text"], [("\x1b[2Jgone\x07\x9b1m",)])


def test_piped_values_are_names_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    print_values({"requests": 12, "model": None}, title="sums")
    assert capsys.readouterr().out == "sums\nrequests\t12\nmodel\t\n"


def test_a_file_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", file := io.StringIO())
    print_values({"a": 1})
    assert file.getvalue() == "a\t1\n"

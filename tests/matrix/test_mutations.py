"""Bugs that are put into a copy of llm_orm: the matrices find each of them, and say what it breaks."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import llm_orm
from matrix.harness import Report, SqlitePlace, Zygote, crashes, faults
from matrix.scenarios import BY_NAME


@dataclass(frozen=True)
class Mutation:
    """A bug.

    changes     (file, what stands there, what is put in its place)
    run         the part of a matrix that meets it
    breaks      the promise that is then broken
    """

    name: str
    changes: tuple[tuple[str, str, str], ...]
    run: Callable[[SqlitePlace], Report]
    breaks: str


def killed(name: str, *kinds: str, way: str = "resume", behind: str = "answered") -> Callable[[SqlitePlace], Report]:
    """Kill the scenario's turn at the points of these kinds that come behind the first of another."""

    def choose(points: list[dict[str, Any]]) -> Sequence[Any]:
        first = next(point["number"] for point in points if point["kind"] == behind)
        return [(point, [way]) for point in points if point["number"] > first and point["kind"] in kinds]

    return lambda place: crashes(place, BY_NAME[name], choose)


def failing(name: str, fault: str, kind: str, label: str = "") -> Callable[[SqlitePlace], Report]:
    """Let a fault strike at the points of a kind."""

    def choose(pairs: list[Any]) -> Sequence[Any]:
        return [
            (pair, ["ask"])
            for pair in pairs
            if (pair[0]["kind"], pair[1].name) == (kind, fault) and pair[0]["label"].startswith(label)
        ]

    return lambda place: faults(place, BY_NAME[name], choose)


MUTATIONS = [
    Mutation(
        "the reply is written in two transactions",
        (
            (
                "rows.py",
                "rows = self.store.transact(*self.owed, *request, *self.unwritten, *statements)",
                "self.store.transact(*self.owed, *request) if request else None\n"
                "            rows = self.store.transact(*self.unwritten, *statements)",
            ),
        ),
        killed("plain", "before", "after"),
        "no finished call of the model is paid again",
    ),
    Mutation(
        "the request row is dropped when a turn is rolled back",
        (
            (
                "rows.py",
                "            self.record()\n        sql = self.store.statements\n        gone =",
                "            self.unrecorded = None\n        sql = self.store.statements\n        gone =",
            ),
        ),
        failing("plain", "Ctrl-C", "before", "INSERT request"),
        "every call that was made is on record",
    ),
    Mutation(
        "a tool's result is written with the next reply",
        (
            (
                "rows.py",
                "self.store.transact(*statements)\n        self.open_calls.pop(outcome.call.id, None)",
                "self.owed += statements\n        self.open_calls.pop(outcome.call.id, None)",
            ),
        ),
        killed("two rounds", "asked"),
        "a tool's result is on record before what comes next",
    ),
    Mutation(
        "the placeholder of a turn that failed stays",
        (("rows.py", "kept or [gone]", "kept or [sql.chat_exists(self.setting.chat_id)]"),),
        failing("plain", "provider refuses", "asked"),
        "a turn that failed is over",
    ),
    Mutation(
        "nobody writes that a tool starts",
        (("rows.py", "statements.append(sql.start_tool_calls(self.message_id, [following.id]))", "pass"),),
        killed("tools one by one", "tool", behind="tool"),
        "no tool is run twice that may not be",
    ),
    Mutation(
        "a tool that was interrupted is run again, whatever it does",
        (("turn.py", "if not toolbox.is_idempotent(call) or", "if"),),
        killed("two rounds", "tool"),
        "no tool is run twice that may not be",
    ),
    Mutation(
        "a call that a process died in leaves no row",
        (("stopped.py", "return [locked, _died(store, message, calls, mark)]", "return [locked]"),),
        killed("plain", "out", "in", way="ask", behind="asked"),
        "every call that was made is on record",
    ),
    Mutation(
        "what a dead turn had said is deleted",
        (("stopped.py", 'else "kept" if is_kept else "removed"', 'else "removed"'),),
        killed("kept", "asked", way="ask"),
        "what was kept is not lost",
    ),
]


@pytest.fixture
def mutated(tmp_path: Path) -> Iterator[Callable[[Mutation], SqlitePlace]]:
    zygotes = []

    def mutate(mutation: Mutation) -> SqlitePlace:
        package = tmp_path / "mutated"
        shutil.copytree(
            Path(llm_orm.__file__).parent, package / "llm_orm", ignore=shutil.ignore_patterns("__pycache__")
        )
        for name, before, after in mutation.changes:
            file = package / "llm_orm" / name
            text = file.read_text()
            assert text.count(before) == 1, (
                f"{name} has {before!r} {text.count(before)} times: change the mutation, too"
            )
            file.write_text(text.replace(before, after))
        zygotes.append(Zygote(package))
        return SqlitePlace(zygotes[-1], tmp_path / "places")

    yield mutate
    for zygote in zygotes:
        zygote.__exit__()


def found(mutation: Mutation, place: SqlitePlace) -> None:
    report = mutation.run(place)
    broken = {violation.promise for violation in report.violations}
    assert mutation.breaks in broken, f"{report}: {sorted(broken)}"


@pytest.mark.parametrize("mutation", MUTATIONS[:2], ids=lambda mutation: mutation.name)
def test_a_bug_that_loses_something_is_found(mutation: Mutation, mutated: Callable[[Mutation], SqlitePlace]):
    found(mutation, mutated(mutation))


@pytest.mark.matrix
@pytest.mark.parametrize("mutation", MUTATIONS[2:], ids=lambda mutation: mutation.name)
def test_every_bug_that_loses_something_is_found(mutation: Mutation, mutated: Callable[[Mutation], SqlitePlace]):
    found(mutation, mutated(mutation))

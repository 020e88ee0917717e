"""Runs scenarios with a process that dies at each of their points, and tells what was wrong afterwards."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from . import continuations
from .faults import ALL as ALL_FAULTS
from .scenarios import Scenario

TESTS = Path(__file__).parent.parent

SEED = int(os.environ.get("LLM_ORM_MATRIX_SEED", "4"))
"""What is chosen where not every point is tried."""

REPORT = os.environ.get("LLM_ORM_MATRIX_REPORT")
"""The file that figures are added to, a line of JSON for each scenario on each database."""


class Zygote:
    """The process that forks; `package` is the folder of another llm_orm than the installed one."""

    def __init__(self, package: Path | None = None):
        paths = [str(path) for path in (package, TESTS) if path is not None]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "matrix.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def do(self, what: str, **about: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": what, **about}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "failed" in answer:
            raise RuntimeError(f"{what} {about}\n{answer['failed']}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.communicate()


@dataclass(frozen=True)
class Turn:
    """A chat with all that leads to its turn, and where it is."""

    url: str
    key: str
    chat: str
    ledger: Path

    @property
    def about(self) -> dict[str, Any]:
        return {"url": self.url, "key": self.key, "chat": self.chat, "ledger": str(self.ledger)}


class SqlitePlace:
    """Turns in files of SQLite: made once for a scenario, and copied for each time that one is run."""

    name = "sqlite"

    def __init__(self, zygote: Zygote, folder: Path):
        self.zygote, self.folder = zygote, folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.count = 0
        self.empty = folder / "empty.db"
        zygote.do("create_tables", url=f"sqlite:///{self.empty}")
        self.made: dict[str, Turn] = {}

    def turn(self, scenario: Scenario) -> Turn:
        """One that has not begun yet."""
        if scenario.name not in self.made:
            self.made[scenario.name] = self._made(scenario)
        return self.copy(self.made[scenario.name])

    def _made(self, scenario: Scenario) -> Turn:
        path = self._path()
        shutil.copy(self.empty, path)
        url, ledger = f"sqlite:///{path}", path.with_suffix(".ledger")
        made = self.zygote.do("prepare", url=url, scenario=scenario.name, ledger=str(ledger))
        return Turn(url, made["key"], made["chat"], ledger)

    def copy(self, turn: Turn) -> Turn:
        """The same, as a process left it that was killed."""
        source, path = Path(turn.url.removeprefix("sqlite:///")), self._path()
        for ending in ("", "-wal"):
            if source.with_name(source.name + ending).exists():
                shutil.copy(source.with_name(source.name + ending), path.with_name(path.name + ending))
        shutil.copy(turn.ledger, path.with_suffix(".ledger"))
        return Turn(f"sqlite:///{path}", turn.key, turn.chat, path.with_suffix(".ledger"))

    def drop(self, turn: Turn) -> None:
        path = Path(turn.url.removeprefix("sqlite:///"))
        for ending in ("", "-wal", "-shm"):
            path.with_name(path.name + ending).unlink(missing_ok=True)
        turn.ledger.unlink(missing_ok=True)

    def _path(self) -> Path:
        self.count += 1
        return self.folder / f"{self.count}.db"


class PostgresPlace:
    """Turns in one schema of PostgreSQL: a chat for each time that one is run."""

    name = "postgresql"

    def __init__(self, zygote: Zygote, folder: Path, url: str):
        self.zygote, self.folder, self.url = zygote, folder, url
        self.folder.mkdir(parents=True, exist_ok=True)
        zygote.do("create_tables", url=url)

    def turn(self, scenario: Scenario) -> Turn:
        ledger = self.folder / f"{uuid.uuid4().hex}.ledger"
        made = self.zygote.do("prepare", url=self.url, scenario=scenario.name, ledger=str(ledger))
        return Turn(self.url, made["key"], made["chat"], ledger)

    def drop(self, turn: Turn) -> None:
        turn.ledger.unlink(missing_ok=True)

    def findings(self) -> list[str]:
        """What is wrong with the whole database."""
        return self.zygote.do("check", url=self.url)["findings"]


Place = SqlitePlace | PostgresPlace


@dataclass(frozen=True)
class Violation:
    scenario: str
    database: str
    point: str
    how: str
    """The continuation, or the fault."""
    when: str
    promise: str
    detail: str

    def __str__(self) -> str:
        where = f"{self.scenario} on {self.database}, {self.point}, {self.how}, {self.when}"
        return f"{where}: NOT {self.promise!r}: {self.detail}"


@dataclass
class Report:
    matrix: str
    database: str
    scenario: str
    points: int = 0
    """Distinct points of the scenario that something happened at."""
    runs: int = 0
    violations: list[Violation] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        figures = f"{self.points} points, {self.runs} {self.matrix}, {len(self.violations)} violations"
        return f"{self.matrix}: {self.scenario} on {self.database}: {figures}, {self.seconds:.1f} s"

    def written(self) -> "Report":
        """Add the figures to the file that $LLM_ORM_MATRIX_REPORT names."""
        if REPORT:
            with open(REPORT, "a") as file:
                file.write(json.dumps({**asdict(self), "violations": len(self.violations)}) + "\n")
        return self


def crashes(
    place: Place,
    scenario: Scenario,
    choose: Callable[[list[dict[str, Any]]], Sequence[tuple[dict[str, Any], Sequence[str]]]] | None = None,
) -> Report:
    """Kill the scenario's turn at each of its points, or at those chosen, and go on in each way."""
    report, started = Report("crashes", place.name, scenario.name), time.monotonic()
    zygote = place.zygote
    counted = place.turn(scenario)
    points = zygote.do("count", scenario=scenario.name, **counted.about)["points"]
    place.drop(counted)
    chosen = choose(points) if choose else [(point, continuations.ALL) for point in points]
    claimed = claim_of(points) if scenario.asks else None
    for point, ways in chosen:
        report.points += 1
        committed = None if claimed is None else point["number"] >= claimed
        for turn, way in _killed(place, scenario, point, ways):
            answer = zygote.do("survive", scenario=scenario.name, continuation=way, committed=committed, **turn.about)
            _note(report, point, way, answer)
            place.drop(turn)
    for detail in place.findings() if isinstance(place, PostgresPlace) else ():
        at = (scenario.name, place.name, "the end", "all of them", "after", "the whole database is sound")
        report.violations.append(Violation(*at, detail))
    report.seconds = time.monotonic() - started
    return report


def faults(place: Place, scenario: Scenario, choose: Callable[[list[Any]], Sequence[Any]] | None = None) -> Report:
    """Let each fault, or those that are chosen, strike at each point that it can, and go on."""
    report, started = Report("faults", place.name, scenario.name), time.monotonic()
    counted = place.turn(scenario)
    points = place.zygote.do("count", scenario=scenario.name, **counted.about)["points"]
    place.drop(counted)
    pairs = [
        (point, fault)
        for fault in ALL_FAULTS
        for point in points
        if point["kind"] in fault.strikes
        and place.name in fault.databases
        and fault.is_async in (None, scenario.is_async)
    ]
    chosen = choose(pairs) if choose else [(pair, [WAYS[index % 2]]) for index, pair in enumerate(pairs)]
    struck = set()
    for (point, fault), (way,) in chosen:
        struck.add(point["number"])
        turn = place.turn(scenario)
        about = {"scenario": scenario.name, "point": point, "fault": fault.name, "continuation": way, **turn.about}
        _note(report, point, f"{fault.name}, then {way}", place.zygote.do("fault", **about))
        place.drop(turn)
    report.points, report.seconds = len(struck), time.monotonic() - started
    return report


WAYS = ("resume", "ask")


def _note(report: Report, point: dict[str, Any], how: str, answer: dict[str, Any]) -> None:
    report.runs += 1
    found = answer.get("violations")
    if found is None:
        found = [{"promise": "it comes to an end", "detail": f"signal {answer['signal']}", "when": "after"}]
    label = f"{point['number']} {point['kind']} {point['label']}"
    report.violations += [
        Violation(report.scenario, report.database, label, how, each["when"], each["promise"], each["detail"])
        for each in found
    ]


def _killed(place: Place, scenario: Scenario, point: dict[str, Any], ways: Sequence[str]) -> Iterator[tuple[Turn, str]]:
    """A killed turn for each way of going on."""
    killed: Turn | None = None
    for way in ways:
        if killed is None or not isinstance(place, SqlitePlace):
            killed = place.turn(scenario)
            place.zygote.do("kill", scenario=scenario.name, point=point, **killed.about)
        if isinstance(place, SqlitePlace):
            yield place.copy(killed), way
        else:
            yield killed, way
    if killed is not None and isinstance(place, SqlitePlace):
        place.drop(killed)


def claim_of(points: list[dict[str, Any]]) -> int:
    """The number of the point from which on the question is written."""
    for point in points:
        if point["kind"] == "before" and point["label"].startswith("INSERT message"):
            first = point["number"]
            break
    ends = ("INSERT message", "COMMIT")
    # On SQLite with the COMMIT, on PostgreSQL with the statement, which is the whole transaction.
    is_sqlite = any(point["label"].startswith("BEGIN IMMEDIATE") for point in points)
    wanted = ends[is_sqlite]
    return next(
        point["number"]
        for point in points
        if point["number"] > first and point["kind"] == "after" and point["label"].startswith(wanted)
    )


def sample(seed: int, how_many: int, ways: Sequence[str] = continuations.ALL) -> Any:
    """Chooses so many of the points, spread over the turn, each with one way of going on."""
    chance = random.Random(seed)

    def choose(places: list[Any]) -> list[tuple[Any, list[str]]]:
        return [(place, [chance.choice(ways)]) for place in chance.sample(places, min(how_many, len(places)))]

    return choose

"""Prometheus: what `usage()` says, and where the turns stand, as metrics to be scraped.

The figures are those of the database, so that all processes count, and it does not matter which of them is scraped.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any

import peewee as pw

from .errors import InvalidValue, WrongSetup
from .options import Options
from .records import now
from .spending import budget_status
from .statements import Sql
from .store import Store, as_store
from .usage import UsageRow, usage

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector as Registered
except ImportError as error:
    raise WrongSetup('llm_orm.metrics needs prometheus_client: pip install "llm-orm[dashboard]"') from error

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

MAX_AGE_S = 15.0

STALE_AFTER_S = Options().stale_after

LATENCY_OF = timedelta(hours=1)

COUNTERS = {
    "requests": ("Calls of models, failed ones included.", ("provider", "model", "source", "status")),
    "failed_requests": ("Calls of models that failed.", ("provider", "model", "error")),
    "retried_requests": ("Calls of models that were a second try, or a further one.", ("provider", "model")),
    "tokens": (
        "Tokens; input has cached and cache_write among it, output has thinking.",
        ("provider", "model", "type"),
    ),
    "cost_dollars": ("US dollars, of the requests that have a price.", ("provider", "model")),
    "unpriced_requests": ("Calls of models whose cost is unknown.", ("provider", "model")),
    "request_seconds": ("Time spent waiting for models.", ("provider", "model")),
    "tool_calls": ("Tool calls that models asked for.", ("tool",)),
    "failed_tool_calls": ("Tool calls that failed.", ("tool",)),
}
"""Name, without "llm_orm_" and "_total" → (help, labels)."""

GAUGES = {
    "request_duration_seconds": (
        "How long calls of models took that ended within the last hour.",
        ("provider", "model", "quantile"),
    ),
    "first_token_seconds": (
        "How long streams of the last hour took to their first token.",
        ("provider", "model", "quantile"),
    ),
    "chats": ("Chats that there are.", ()),
    "turns": ("Turns that are not over: running, parked (they wait for approval), dead.", ("state",)),
    "budget_share": ("The highest share of a budget that is spent.", ("budget",)),
    "budget_exceeded": ("How many have spent a budget.", ("budget",)),
}

TOKENS = {
    "input": "input_tokens",
    "output": "output_tokens",
    "cached": "cached_tokens",
    "cache_write": "cache_write_tokens",
    "thinking": "thinking_tokens",
}

Series = tuple[str, tuple[str, ...]]
"""(name, values of its labels)."""


class Collector(Registered):
    """The metrics of a store, for a registry of your own: `REGISTRY.register(Collector(store))`.

    max_age    seconds for which what was counted is said again; 0: each scrape asks the database

    What is said equals `usage()` over all time. It never falls as long as the process lives, not even where rows are
    deleted; a process that is started after that begins with what is there, which Prometheus takes for a counter that
    was set back, and counts once more. `prune(keep_requests=True)` avoids that.

    Rows older than some hours are summed once, and only what came since is summed on each scrape: see `SETTLED`.
    """

    def __init__(self, store: "Store | pw.Database | str | None" = None, *, max_age: float = MAX_AGE_S):
        if isinstance(max_age, bool) or not isinstance(max_age, int | float) or not max_age >= 0:
            raise InvalidValue(f"max_age={max_age!r}: max_age must be seconds, 0 or more")
        self.store = as_store(store)
        self.max_age = max_age
        self._lock = threading.Lock()
        self._requests = _Running(self.store, OF_REQUESTS, SUMMED, SETTLED["requests"])
        self._tool_calls = _Running(self.store, ("tool",), OF_TOOLS, SETTLED["tool_calls"])
        self._counters = _NeverLess()
        self._said: list[Metric] = []
        self._said_at = -float("inf")

    def describe(self) -> Iterator[Metric]:
        """The metrics without figures, so that to register asks nothing of the database."""
        yield from self._families().values()

    def collect(self) -> Iterable[Metric]:
        """The metrics; raises `DatabaseUnavailable`, which fails the scrape."""
        with self._lock:
            if time.monotonic() >= self._said_at + self.max_age:
                self._said = self._metrics()
                self._said_at = time.monotonic()
            return self._said

    def _metrics(self) -> list[Metric]:
        families = self._families()
        for (name, labels), value in self._counters.of(self._counted()).items():
            families[name].add_metric(labels, float(value))
        for name, labels, value in self._measured():
            families[name].add_metric(labels, float(value))
        return [*families.values()]

    def _families(self) -> dict[str, Any]:
        counters = {
            name: CounterMetricFamily(f"llm_orm_{name}", text, labels=labels)
            for name, (text, labels) in COUNTERS.items()
        }
        gauges = {
            name: GaugeMetricFamily(f"llm_orm_{name}", text, labels=labels) for name, (text, labels) in GAUGES.items()
        }
        return counters | gauges

    def _counted(self) -> dict[Series, Any]:
        counted: dict[Series, Any] = defaultdict(int)
        for (provider, model, source, status, error), row in self._requests.sums().items():
            of = (provider, model)
            counted["requests", (*of, source, status)] += row["requests"]
            for kind, measure in TOKENS.items():
                counted["tokens", (*of, kind)] += row[measure]
            counted["cost_dollars", of] += row["cost"]
            counted["unpriced_requests", of] += row["unpriced_requests"]
            counted["retried_requests", of] += row["retried_requests"]
            counted["request_seconds", of] += row["duration_ms"] / 1000
            if error:
                counted["failed_requests", (*of, error)] += row["failed_requests"]
        for (tool,), row in self._tool_calls.sums().items():
            counted["tool_calls", (tool,)] += row["tool_calls"]
            counted["failed_tool_calls", (tool,)] += row["tool_failures"]
        return counted

    def _measured(self) -> Iterator[tuple[str, tuple[str, ...], Any]]:
        for row in usage(self.store, ("provider", "model"), since=LATENCY_OF, measures=PERCENTILES):
            for measure in PERCENTILES:
                name, quantile = PERCENTILES[measure]
                if row[measure] is not None:
                    yield name, (row["provider"], row["model"], quantile), row[measure] / 1000
        records, param = self.store.records, self.store.database.param
        yield "chats", (), self.store.read(Sql(f"SELECT COUNT(*) FROM {_table(records.chat)}", ()))[0][0]
        # As a literal, for which the index of what is pending is made.
        states = Sql(
            f"SELECT CASE WHEN parked_at IS NOT NULL THEN 'parked' WHEN updated_at <= {param} THEN 'dead' "
            f"ELSE 'running' END AS state, COUNT(*) FROM {_table(records.message)} WHERE status = 'pending' "
            "GROUP BY 1",
            ((now() - timedelta(seconds=STALE_AFTER_S)).isoformat(" ", "microseconds"),),
        )
        found = dict(self.store.read(states))
        for state in ("running", "parked", "dead"):
            yield "turns", (state,), found.get(state, 0)
        statuses = budget_status(self.store) if self.store.budgets else []
        for label in dict.fromkeys(each.budget.label for each in statuses):
            ours = [each for each in statuses if each.budget.label == label]
            yield "budget_share", (label,), max(each.share for each in ours)
            yield "budget_exceeded", (label,), sum(each.is_exceeded for each in ours)


def metrics_text(store: "Store | pw.Database | str | None" = None) -> bytes:
    """The metrics of the store as Prometheus reads them, of `CONTENT_TYPE`; at most `MAX_AGE_S` seconds old."""
    store = as_store(store)
    # Kept with the store: who asks time and again is told by the same, who never says less than before.
    registry = vars(store).get("_metrics_registry")
    if registry is None:
        registry = CollectorRegistry()
        registry.register(Collector(store))
        registry = vars(store).setdefault("_metrics_registry", registry)
    return generate_latest(registry)


OF_REQUESTS = ("provider", "model", "source", "status", "error")

SUMMED = (
    *("requests", "failed_requests", "retried_requests", *TOKENS.values()),
    *("cost", "unpriced_requests", "duration_ms"),
)

OF_TOOLS = ("tool_calls", "tool_failures")

PERCENTILES = {
    "duration_p50_ms": ("request_duration_seconds", "0.5"),
    "duration_p95_ms": ("request_duration_seconds", "0.95"),
    "first_token_p50_ms": ("first_token_seconds", "0.5"),
    "first_token_p95_ms": ("first_token_seconds", "0.95"),
}

SETTLED = {"requests": timedelta(hours=6), "tool_calls": timedelta(days=1)}
"""How old a row must be for nothing to come to it any more: a request row that is written late, the cost of a call that
was given up, the end of a tool call that waits for approval. What comes later all the same is counted once the process
is started anew."""


class _Running:
    """Sums of `usage()` over all time, of which the settled part is made once."""

    def __init__(self, store: Store, by: tuple[str, ...], measures: tuple[str, ...], settled_after: timedelta):
        self.store, self.by, self.measures, self.settled_after = store, by, measures, settled_after
        self.settled: dict[tuple[str, ...], dict[str, Any]] = {}
        self.until: datetime | None = None

    def sums(self) -> dict[tuple[str, ...], dict[str, Any]]:
        """{values of `by`, as text: {measure: sum}}."""
        until = (now() - self.settled_after).replace(minute=0, second=0, microsecond=0)
        if self.until is None or until > self.until:
            self.settled = self._with(self.settled, self._rows(self.until, until))
            self.until = until
        return self._with(self.settled, self._rows(self.until, None))

    def _rows(self, since: datetime | None, until: datetime | None) -> list[UsageRow]:
        return usage(self.store, self.by, since=since, until=until, measures=self.measures)

    def _with(self, sums: dict[tuple[str, ...], dict[str, Any]], rows: list[UsageRow]) -> Any:
        found = {key: {**each} for key, each in sums.items()}
        for row in rows:
            key = tuple("" if row[name] is None else str(row[name]) for name in self.by)
            each = found.setdefault(key, dict.fromkeys(self.measures, 0))
            for measure in self.measures:
                each[measure] += row[measure]
        return found


class _NeverLess:
    """Counters that go on from where they are when what they count is deleted."""

    def __init__(self) -> None:
        self.counted: dict[Series, Any] = {}
        self.gone: dict[Series, Any] = defaultdict(int)

    def of(self, counted: dict[Series, Any]) -> dict[Series, Any]:
        for series, before in self.counted.items():
            left = counted.setdefault(series, 0)
            if left < before:
                self.gone[series] += before - left
        self.counted = counted
        return {series: value + self.gone.get(series, 0) for series, value in counted.items()}


def _table(record: Any) -> str:
    return f'"{record._meta.table_name}"'

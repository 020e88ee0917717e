"""The views over the tables, for who reads the figures in SQL: Grafana, Metabase, a shell. And what creates and drops
what the database makes of the tables.

Both databases have the same columns. Every column is named: the application adds its own to a table, and drops them,
while the views are there. Costs are added up exactly, as `stats()` adds them.

The names begin as that of the request table does: `llm_request` makes `llm_usage_daily`, `shop_request` makes
`shop_usage_daily`; a table that is not called so lends its whole name: `calls` makes `calls_usage_daily`.
"""

from collections.abc import Mapping

import peewee as pw

from .words import Made, fill, search_objects

REQUEST = "_request"


def stem_of(names: Mapping[str, str]) -> str:
    """What the names of views begin with, and those of the tables of the search."""
    return names["request"].removesuffix(REQUEST) or names["request"]


def objects_of(names: Mapping[str, str], is_sqlite: bool) -> list[Made]:
    """What is made of the tables of these names, in the order in which it is created."""
    search = search_objects(stem_of(names), names) if is_sqlite else []
    return [*views_of(names, is_sqlite), *search]


def create_objects(database: pw.Database, names: Mapping[str, str]) -> None:
    """Create what is not there yet; what was said before is found, too."""
    is_sqlite = isinstance(database, pw.SqliteDatabase)
    objects = objects_of(names, is_sqlite)
    existing = _existing(database, objects)
    missing = [made for made in objects if made.name not in existing]
    for made in missing:
        database.execute_sql(made.create)
    if any(made.kind != "view" for made in missing):
        for statement in fill(stem_of(names), names):
            database.execute_sql(statement)


def drop_objects(database: pw.Database, names: Mapping[str, str]) -> None:
    """Drop what is there; PostgreSQL drops no table that a view needs."""
    is_sqlite = isinstance(database, pw.SqliteDatabase)
    for made in reversed(objects_of(names, is_sqlite)):
        kind = {"view": "VIEW", "trigger": "TRIGGER", "search table": "TABLE"}[made.kind]
        database.execute_sql(f'DROP {kind} IF EXISTS "{made.name}"')


def _existing(database: pw.Database, objects: list[Made]) -> set[str]:
    marks = ", ".join([database.param] * len(objects))
    query = f"SELECT name FROM sqlite_master WHERE name IN ({marks})"
    if not isinstance(database, pw.SqliteDatabase):
        query = f"SELECT name FROM unnest(ARRAY[{marks}]) AS name WHERE to_regclass(quote_ident(name)) IS NOT NULL"
    return {row[0] for row in database.execute_sql(query, [made.name for made in objects]).fetchall()}


def views_of(names: Mapping[str, str], is_sqlite: bool) -> list[Made]:
    """The views over the tables of these names."""
    stem = stem_of(names)
    texts = {
        "usage_daily": _usage("day", names, is_sqlite),
        "usage_hourly": _usage("hour", names, is_sqlite),
        "request_detail": _request_detail(names, is_sqlite),
        "tool_usage_daily": _tool_usage(names, is_sqlite),
        "chat_cost": _chat_cost(names, is_sqlite),
    }
    views = {f"{stem}_{ending}": text for ending, text in texts.items()}
    return [Made("view", name, name, f'CREATE VIEW "{name}" AS\n{text}') for name, text in views.items()]


_PERIODS = {
    ("day", True): "substr(created_at, 1, 10)",
    ("hour", True): "substr(created_at, 1, 13) || ':00:00+00:00'",
    ("day", False): "(created_at AT TIME ZONE 'UTC')::date",
    ("hour", False): "date_trunc('hour', created_at AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'",
}
"""Of a time in UTC, by whether it is SQLite's, which keeps the text."""


def _cost(is_sqlite: bool) -> str:
    # SQLite adds doubles up with an error that grows with the rows, and whole numbers exactly.
    total = "COALESCE(SUM(CAST(ROUND(cost * 1000000000000) AS INTEGER)), 0) / 1000000000000.0"
    return total if is_sqlite else "COALESCE(SUM(cost), 0)"


_SUMS = """\
    SUM(CASE WHEN error IS NULL THEN 0 ELSE 1 END) AS failed_requests,
    SUM(CASE WHEN attempt > 1 THEN 1 ELSE 0 END) AS retried_requests,
    SUM(input_tokens) AS input_tokens,
    SUM(output_tokens) AS output_tokens,
    SUM(cached_tokens) AS cached_tokens,
    SUM(cache_write_tokens) AS cache_write_tokens,
    SUM(thinking_tokens) AS thinking_tokens,
    {cost} AS cost,
    SUM(CASE WHEN cost IS NULL THEN 1 ELSE 0 END) AS unpriced_requests,
    SUM(duration_ms) AS duration_ms,
    MAX(duration_ms) AS duration_max_ms"""


def _usage(period: str, names: Mapping[str, str], is_sqlite: bool) -> str:
    return (
        f"SELECT\n    {_PERIODS[period, is_sqlite]} AS {period},\n"
        "    provider,\n    model,\n    source,\n    COUNT(*) AS requests,\n"
        f'{_SUMS.format(cost=_cost(is_sqlite))}\nFROM "{names["request"]}"\nGROUP BY 1, 2, 3, 4'
    )


def _chat_cost(names: Mapping[str, str], is_sqlite: bool) -> str:
    return (
        "SELECT\n    chat_id,\n    COUNT(DISTINCT turn_id) AS turns,\n    COUNT(*) AS requests,\n"
        f"{_SUMS.format(cost=_cost(is_sqlite))},\n"
        "    MIN(created_at) AS first_request_at,\n    MAX(created_at) AS last_request_at\n"
        f'FROM "{names["request"]}"\nGROUP BY chat_id'
    )


def _request_detail(names: Mapping[str, str], is_sqlite: bool) -> str:
    total = "request.input_tokens + request.output_tokens"
    if not is_sqlite:
        total = "request.input_tokens::bigint + request.output_tokens"  # the two may be more than an INTEGER holds
    columns = (
        "id created_at chat_id message_id turn_id source round attempt provider model status_code error finish_reason "
        "duration_ms first_token_ms streamed input_tokens output_tokens cached_tokens cache_write_tokens "
        "thinking_tokens usage_estimated cost correction_rounds"
    ).split()
    lines = [*(f"request.{column}" for column in columns), f"{total} AS total_tokens", "session.agent_class"]
    lines += ["request.error IS NOT NULL AS is_failed", "request.attempt > 1 AS is_retry"]
    lines += ["request.cost IS NULL AS is_unpriced"]
    return (
        "SELECT\n    " + ",\n    ".join(lines) + f'\nFROM "{names["request"]}" AS request\n'
        f'LEFT JOIN "{names["agent_session"]}" AS session ON session.chat_id = request.chat_id'
    )


def _tool_usage(names: Mapping[str, str], is_sqlite: bool) -> str:
    average = "AVG(duration_ms)" if is_sqlite else "AVG(duration_ms)::double precision"
    return (
        f"SELECT\n    {_PERIODS['day', is_sqlite]} AS day,\n    name,\n    COUNT(*) AS calls,\n"
        "    SUM(CASE WHEN status = 'failed' THEN 1 ELSE 0 END) AS failed,\n"
        f"    {average} AS duration_avg_ms,\n    MAX(duration_ms) AS duration_max_ms\n"
        f'FROM "{names["tool_call"]}"\nGROUP BY 1, 2'
    )

"""What the pages say, and how they can be asked."""

import csv
import io
import json
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

import peewee as pw
import pytest
from cryptography.fernet import Fernet
from dashboard_client import Elements, client_of
from dashboard_traffic import XSS, fill, hostile
from starlette.testclient import TestClient

from llm_orm import Budget, Store, connect, create_chat
from llm_orm.dashboard import create_app
from llm_orm.dashboard.shown import NOTHING
from llm_orm.listing import chats, requests
from llm_orm.usage import usage

SPAN = "since=2026-10-26&until=2026-10-31"
OF_SPAN: Any = {"since": date(2026, 10, 26), "until": date(2026, 10, 31)}
OCTOBER_26 = datetime(2026, 10, 26, tzinfo=UTC)

PAGES = ("/", "/models", "/users", "/agents", "/tools", "/errors", "/chats", "/requests", "/budgets")


def table(client: Any, path: str, query: str = SPAN, **more: str) -> list[dict[str, Any]]:
    answer = client.get(f"{path}.json?{query}" + (f"&{urlencode(more)}" if more else ""))
    assert answer.status_code == 200, answer.text
    return answer.json()


def plain(value: Any) -> Any:
    return f"{value:f}" if isinstance(value, Decimal) else value


@pytest.fixture
def dashboard(store: Store) -> Iterator[TestClient]:
    """A client of the dashboard of `store`, with six days of traffic until the end of October."""
    fill(store, days=6, per_day=9)
    with client_of(create_app(store)) as client:
        yield client


@pytest.fixture
def empty(store: Store) -> Iterator[TestClient]:
    with client_of(create_app(store)) as client:
        yield client


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Iterator[TestClient]:
    """A client of the dashboard of a store with the same traffic, for what no database has a part in."""
    path = tmp_path_factory.mktemp("seen") / "chats.db"
    with connect(f"sqlite:///{path}", chat_fields={"user_id": pw.TextField(null=True)}) as store:
        store.create_tables()
        fill(store, days=6, per_day=9)
        with client_of(create_app(store)) as client:
            client.store = store  # type: ignore[attr-defined]
            yield client


def page(client: TestClient, address: str) -> Elements:
    """What is on a page."""
    answer = client.get(address)
    assert answer.status_code == 200, answer.text
    return Elements(answer.text)


# Figures


def test_the_cards_are_what_usage_says_of_the_span_and_of_the_one_before(dashboard, store):
    span = "since=2026-10-29&until=2026-10-31"
    (now,) = usage(store, (), since="2026-10-29", until="2026-10-31")
    (before,) = usage(store, (), since="2026-10-27", until="2026-10-29")
    figures = {row["figure"]: row for row in table(dashboard, "/overview", f"{span}&table=summary")}
    for name in ("cost", "requests", "input_tokens", "output_tokens", "unpriced_requests", "duration_p95_ms"):
        assert figures[name]["value"] == plain(now[name])
    assert figures["requests"]["before"] == str(before.requests)
    assert figures["error_rate"]["value"] == now.failed_requests / now.requests
    assert now.cost > 0
    assert now.failed_requests > 0
    assert before.requests > 0

    text = Elements(dashboard.get(f"/?{span}").text).text
    assert f"Spend {now.cost:.4f}".replace("Spend ", "$") in text or f"${now.cost:.2f}" in text
    assert f"Requests {now.requests} " in text
    assert f"before: {before.requests} " in text


BROKEN_DOWN = [
    ("/overview", "", ("model",)),
    ("/overview", "&by=error", ("error",)),
    ("/models", "", ("provider", "model")),
    ("/users", "", ("user_id",)),
    ("/users", "&by=metadata.plan", ("metadata.plan",)),
    ("/agents", "&model=gpt-4o&model=gpt-4o-mini", ("agent_class",)),
    ("/tools", "", ("tool",)),
]


def test_a_table_has_the_rows_of_usage(dashboard, store):
    for path, query, by in BROKEN_DOWN:
        where = {"model": ["gpt-4o", "gpt-4o-mini"]} if "model=" in query else None
        rows = usage(store, by, where=where, **OF_SPAN)
        measures = ("tool_calls", "tool_failures") if by == ("tool",) else ("requests", "cost")
        key = [*by, *measures, "duration_p95_ms"]
        said = [str([row[name] for name in key]) for row in table(dashboard, path, SPAN + query)]
        assert sorted(said) == sorted(str([plain(row[name]) for name in key]) for row in rows)
        assert rows


def test_a_chart_stacks_what_there_was_with_the_rest_as_other(dashboard, store):
    charts = charts_of(page(dashboard, f"/?{SPAN}&by=metadata.team"))
    rows = usage(store, ("day",), **OF_SPAN)
    assert len(usage(store, ("metadata.team",), **OF_SPAN)) > 8
    for name, measure in (("spend", "cost"), ("requests", "requests")):
        chart = charts[name]
        assert [each["label"] for each in chart["series"]][-1] == "other"
        assert len(chart["series"]) == 9
        assert chart["labels"] == ["Oct 26", "Oct 27", "Oct 28", "Oct 29", "Oct 30"]
        drawn = [sum(each["values"][day] or 0 for each in chart["series"]) for day in range(5)]
        assert drawn == pytest.approx([float(row[measure]) for row in rows])
    assert charts["latency"]["series"][1]["values"] == [row.duration_p95_ms for row in rows]


def charts_of(elements: Elements) -> dict[str, Any]:
    names = [found["id"].removeprefix("chart-") for _, found in elements.found if "data-chart" in found]
    drawn = [text for text in elements.scripts if text.strip().startswith("{")]
    return dict(zip(names, map(json.loads, drawn), strict=True))


def test_a_day_is_one_of_the_time_zone(dashboard, store):
    span = "since=2026-10-28&until=2026-10-29"
    utc, tokyo = (table(dashboard, "/models", f"{span}&tz={tz}") for tz in ("UTC", "Asia/Tokyo"))
    expected = usage(store, ("provider", "model"), since="2026-10-28", until="2026-10-29", tz="Asia/Tokyo")
    assert sum(row["requests"] for row in tokyo) == sum(row.requests for row in expected)
    assert sum(row["requests"] for row in tokyo) != sum(row["requests"] for row in utc)


def test_what_deleted_chats_cost_is_still_there(dashboard, store):
    (before,) = usage(store, (), **OF_SPAN)
    with store.connection():
        store.records.chat.delete().execute()
    figures = {row["figure"]: row["value"] for row in table(dashboard, "/overview", f"{SPAN}&table=summary")}
    assert figures["cost"] == plain(before.cost)
    assert {row["chat_id"] for row in table(dashboard, "/requests")} == {None}


def test_errors_are_those_that_failed(dashboard, store):
    rows = {row.error: row.failed_requests for row in usage(store, "error", **OF_SPAN) if row.error}
    assert {row["error"]: row["failed_requests"] for row in table(dashboard, "/errors")} == rows
    failed = table(dashboard, "/errors", f"{SPAN}&table=failed")
    assert len(failed) == min(sum(rows.values()), 20)
    assert all(row["error"] for row in failed)
    by_model = table(dashboard, "/errors", f"{SPAN}&table=models")
    assert sum(row["failed_requests"] for row in by_model) == sum(rows.values())


def test_a_chat_is_shown_step_by_step(dashboard, store):
    line = next(each for each in chats(store, limit=None) if each.failed_requests and each.requests > 3)
    answer = Elements(dashboard.get(f"/chats/{line.id}").text)
    steps = table(dashboard, f"/chats/{line.id}", "")
    calls = [row for row in steps if row["kind"] == "model call"]
    assert len(calls) == line.requests
    assert sum(Decimal(row["cost"] or 0) for row in calls) == line.cost
    assert f"Cost ${line.cost:.4f} Requests {line.requests} Failed {line.failed_requests}" in answer.text
    assert [row["kind"] for row in steps][:2] == ["user", "model call"]
    assert answer.text.count("Turn ") == line.turns


def test_budgets_stand_where_they_stand(sqlite_store):
    fill(sqlite_store, days=2, per_day=3)
    (spent,) = usage(sqlite_store, ())
    limits = [Budget("5", "total", name="enough"), Budget("0.0001", "total", name="used up")]
    limits.append(Budget("0.0002", "total", by="user_id", where={"user_id": "u_00"}, name="theirs"))
    url, own = f"sqlite:///{sqlite_store.database.database}", {"user_id": pw.TextField(null=True)}
    with connect(url, budgets=limits, chat_fields=own) as store, client_of(create_app(store)) as client:
        rows = {row["budget"]: row for row in table(client, "/budgets", "")}
        states = {name: row["state"] for name, row in rows.items()}
        assert states == {"enough": "ok", "used up": "spent", "theirs": "spent"}
        assert rows["enough"]["spent"] == plain(spent.cost)
        elements = page(client, "/budgets")
        assert f"enough {spent.cost * 20:.1f} % ok all ${spent.cost:.4f} $5.0000" in elements.text
        assert "user_id='u_00'" in elements.text
        bars = [each["width"] for tag, each in elements.found if tag == "rect" and each["height"] == "4"]
        assert bars == [str(min(100, round(100 * Decimal(row["share"])))) for row in table(client, "/budgets", "")]
        over = [each for tag, each in elements.found if tag == "td" and "over" in (each["class"] or "")]
        assert len(over) == 2
        assert client.get("/budgets").text.count(">Spent<") == 1


def test_without_a_column_of_yours_the_page_says_how_to_have_one():
    with connect("sqlite:///:memory:") as store, client_of(create_app(store)) as client:
        store.create_tables()
        text = page(client, "/users").text
        assert "Give them some with connect(…, chat_fields=" in text
        assert "A key of the metadata Show" in text  # the control that it speaks of
        assert client.get("/users?by=metadata.plan").status_code == 200


def test_what_is_encrypted_is_shown_to_who_has_the_key(sqlite_store):
    url, key = f"sqlite:///{sqlite_store.database.database}", Fernet.generate_key()
    with connect(url, encrypt=key) as store, client_of(create_app(store)) as client:
        chat = create_chat(store, model="gpt-4o")
        chat.add_message("user", "What I said")
        assert "What I said" in page(client, f"/chats/{chat.id}").text
        answer = client.get("/chats?q=said")
        assert (answer.status_code, "encrypted store" in answer.text) == (503, True)
    with connect(url, encrypt=Fernet.generate_key()) as store, client_of(create_app(store)) as client:
        assert client.get(f"/chats/{chat.id}").status_code == 503
        assert client.get("/").status_code == 200


def test_a_very_long_text_is_cut_on_the_page(sqlite_store):
    chat = create_chat(sqlite_store, model="gpt-4o")
    chat.add_message("user", "x" * 60_000)
    text = page(client_of(create_app(sqlite_store)), f"/chats/{chat.id}").text
    assert "… and 10,000 characters more" in text
    assert f" {'x' * 79}… " in text  # its heading


def test_search_finds_what_was_said(dashboard, store):
    answer = dashboard.get(f"/chats?{SPAN}&q=headphones")
    assert "<mark>headphones</mark>" in answer.text
    found = table(dashboard, "/chats", f"{SPAN}&q=order+1182&limit=1000")
    with store.connection():
        message = store.records.message
        asked = message.select().where(message.content == "Where is my order 1182?", message.created_at >= OCTOBER_26)
        assert [row["role"] for row in found].count("user") == asked.count() > 0
    lines = {str(line.id): line for line in chats(store, limit=None)}
    for row in found:
        line = lines[row["chat_id"]]
        of_chat = (row["user_id"], row["chat"], row["chat_updated_at"])
        assert of_chat == (line.columns["user_id"], line.title, line.updated_at.isoformat())
    line = lines[found[0]["chat_id"]]
    said = f"{line.title} user_id {line.columns['user_id']} last active {line.updated_at:%Y-%m-%d %H:%M}"
    assert said in page(dashboard, f"/chats?{SPAN}&q=order+1182").text
    assert "Nothing was found" in dashboard.get(f"/chats?{SPAN}&q=zebra").text


# Every page


def test_every_page_answers_with_rows_and_without_script_in_it(seen):
    for path in PAGES:
        answer = seen.get(f"{path}?{SPAN}")
        assert answer.status_code == 200
        elements = Elements(answer.text)
        tags = [tag for tag, _ in elements.found]
        assert tags.count("h1") == tags.count("main") == tags.count("title") == 1
        assert elements.attributes("style") == []
        assert ("table" in tags) == (path != "/budgets")


def test_every_page_answers_where_nothing_was_asked_yet(empty):
    for path in PAGES:
        answer = empty.get(path)
        assert answer.status_code == 200, path
        assert empty.get(f"{path if path != '/' else '/overview'}.csv").text.count("\n") <= (11 if path == "/" else 1)
    assert "Nothing in this span of time." in empty.get("/models").text


def test_head_is_answered_as_get_is(sqlite_store):
    answer = client_of(create_app(sqlite_store)).head("/models")
    assert (answer.status_code, answer.text) == (200, "")


def test_a_filter_lets_through_what_has_its_value(dashboard, store):
    failed = next(line for line in requests(store, **OF_SPAN, limit=None) if line.error)
    for name, value, column in (
        ("model", "gpt-4o", "model"),
        ("provider", "openai", "provider"),
        ("status", failed.status_code, "status_code"),
        ("error", failed.error, "error"),
        ("agent_class", "SupportAgent", "agent_class"),
        ("agent_class", None, "agent_class"),
        ("streamed", True, None),
        ("source", "chat", None),
        ("user_id", "u_00", None),
        ("metadata.plan", "free", None),
        ("metadata.team", 3, None),
    ):
        asked = {name: "(none)" if value is None else str(value).lower() if value is True else str(value)}
        rows = table(dashboard, "/requests", f"{SPAN}&limit=1000", **asked)
        expected = requests(store, where={name: value}, **OF_SPAN, limit=None)
        assert [row["created_at"] for row in rows] == [line.created_at.isoformat() for line in expected]
        assert rows
        assert not column or {row[column] for row in rows} == {value}
        assert sum(row["requests"] for row in table(dashboard, "/models", **asked)) == len(expected)


def test_several_values_of_a_name_are_either(seen):
    rows = table(seen, "/models", f"{SPAN}&model=gpt-4o&model=llama-3.3-70b")
    assert {row["model"] for row in rows} == {"gpt-4o", "llama-3.3-70b"}


def test_links_keep_what_was_asked_for(seen):
    elements = page(seen, f"/?{SPAN}&tz=Europe/Berlin&by=user_id&model=gpt-4o")
    links = [link for link in elements.attributes("href") if "?" in link and "/static/" not in link]
    assert len(links) > 30
    assert all("tz=Europe%2FBerlin" in link for link in links)
    kept = [link for link in links if "model=gpt-4o" in link]
    assert [link for link in links if link not in kept] == [f"/?{SPAN}&tz=Europe%2FBerlin&by=user_id"]  # takes it off
    assert f"/requests?{SPAN}&tz=Europe%2FBerlin&model=gpt-4o" in links
    assert f"/?{SPAN}&tz=Europe%2FBerlin&by=user_id&model=gpt-4o&range=7d".replace(f"{SPAN}&", "") in links


def test_a_filter_that_says_nothing_on_a_page_is_shown_as_such(seen):
    assert "Tool is refund (not here)" in page(seen, f"/models?{SPAN}&tool=refund").text
    assert "(not here)" not in page(seen, f"/tools?{SPAN}&tool=refund").text
    links = page(seen, f"/models?{SPAN}&tool=refund").attributes("href")
    assert f"/models.csv?{SPAN}&table=models" in links  # as the page shows it, without


@pytest.mark.parametrize(
    ("address", "named", "pages"),
    [
        ("/models.json?tool=refund", "the filter 'tool'", "Tools, Requests"),
        ("/overview.csv?tool=refund", "the filter 'tool'", "Tools, Requests"),
        ("/models?tool=refund&format=csv", "the filter 'tool'", "Tools, Requests"),
        ("/chats.json?status=429", "the filter 'status'", "Overview, Models, Users, Agents, Errors, Requests"),
        ("/tools.json?error=Timeout", "the filter 'error'", "Overview, Models, Users, Agents, Errors, Requests"),
        (
            "/budgets.json?model=x",
            "the filter 'model'",
            "Overview, Models, Users, Agents, Tools, Errors, Chats, Requests",
        ),
        ("/models.json?by=user_id", "by", "Overview, Users"),
        ("/requests.json?q=order", "q", "Chats"),
    ],
)
def test_an_export_refuses_what_its_page_passes_over(seen, address, named, pages):
    answer = seen.get(address)
    assert answer.status_code == 400
    said = Elements(answer.text).text
    assert f"{named} says nothing about this table" in said
    assert f"The pages that have it: {pages}" in said
    assert seen.get(address.replace("/overview", "/").replace(".json", "").replace(".csv", "").split("&")[0]).is_success


def test_what_has_no_price_costs_what_is_not_known(seen):
    (row,) = (row for row in table(seen, "/models") if row["model"] == "llama-3.3-70b")
    assert (row["cost"], row["unpriced_requests"]) == ("0", row["requests"])
    unpriced, whole = f"{row['requests']} unpriced", usage(seen.store, (), **OF_SPAN)[0]
    models, overview = page(seen, f"/models?{SPAN}").text, page(seen, f"/?{SPAN}").text
    assert f"llama-3.3-70b {unpriced} {NOTHING} {row['requests']} " in models
    assert f"Total {unpriced} ${whole.cost:.4f} " in models
    assert re.search(rf"Spend \$[\d.]+ .*? {unpriced} Requests ", overview)
    of_it = page(seen, f"/?{SPAN}&model=llama-3.3-70b").text
    assert re.search(rf"Spend {NOTHING} before: [^ ]+ {unpriced} Requests ", of_it)
    assert f"Oct 30 {NOTHING} " in of_it  # the figures of the chart
    line = next(each for each in chats(seen.store, limit=None, **OF_SPAN) if each.unpriced_requests)
    theirs = f"{line.unpriced_requests} unpriced"
    assert f"{theirs} {NOTHING} " in page(seen, f"/chats?{SPAN}&chat={line.id}").text
    chat = page(seen, f"/chats/{line.id}").text
    assert f"Cost {NOTHING} {theirs} Requests {line.requests} " in chat
    assert "$" not in chat


def test_a_request_is_looked_for_by_a_tool_that_was_asked_for_in_it(seen):
    expected = requests(seen.store, where={"tool": "refund"}, **OF_SPAN, limit=None)
    found = table(seen, "/requests", f"{SPAN}&limit=1000&tool=refund")
    assert [row["created_at"] for row in found] == [line.created_at.isoformat() for line in expected]
    assert 0 < len(found) < len(requests(seen.store, **OF_SPAN, limit=None))


def test_what_has_no_value_is_a_group_of_its_own(seen):
    elements = page(seen, f"/users?{SPAN}&by=metadata.colour")
    assert [each["label"] for each in charts_of(elements)["spend"]["series"]] == ["not set"]
    (link,) = [each for each in elements.attributes("href") if "metadata.colour=" in each]
    assert link == f"/?{SPAN}&metadata.colour=%28none%29"
    whole = table(seen, "/models")
    assert table(seen, "/models", f"{SPAN}&metadata.colour=(none)") == whole
    assert table(seen, "/chats", f"{SPAN}&metadata.plan=(none)") == []


def test_an_export_asks_for_its_table_only(seen, monkeypatch):
    asked = []

    def counted(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments[1])
        return usage(*arguments, **options)

    for name in ("groups", "overview", "errors"):
        monkeypatch.setattr(f"llm_orm.dashboard.pages.{name}.usage", counted)
    for address, queries in (
        ("/models.json", [("provider", "model")]),
        ("/tools.csv", [("tool",)]),
        ("/overview.json", [("model",)]),
        ("/overview.json?table=time", [("day",)]),
        ("/errors.json?table=statuses", [("status",)]),
    ):
        asked.clear()
        assert seen.get(address).is_success
        assert asked == queries


def test_the_form_for_one_more_filter_leads_to_an_address_with_it(seen):
    for given, leads_to in (
        ("filter=model&value=gpt-4o&key=", "/models?model=gpt-4o"),
        ("tz=UTC&filter=metadata.&key=plan&value=free", "/models?tz=UTC&metadata.plan=free"),
        ("filter=provider&key=plan&value=free", "/models?metadata.plan=free"),
        ("refresh=&tz=UTC", "/models?tz=UTC"),
    ):
        answer = seen.get(f"/models?{given}")
        assert (answer.status_code, answer.headers["location"]) == (303, leads_to)


def test_lists_are_read_a_page_at_a_time(seen):
    count = len(requests(seen.store, **OF_SPAN, limit=None))
    first = table(seen, "/requests", f"{SPAN}&limit=30")
    second = table(seen, "/requests", f"{SPAN}&limit=30&offset=30")
    assert len(first) == 30
    assert not {row["created_at"] for row in first} & {row["created_at"] for row in second}
    assert "offset=30" in seen.get(f"/requests?{SPAN}&limit=30").text
    assert len(table(seen, "/requests", f"{SPAN}&limit=1000")) == count
    assert 'rel="next"' not in seen.get(f"/requests?{SPAN}&limit=1000").text


def test_rows_are_put_in_the_order_that_is_asked_for(seen):
    costs = [Decimal(row["cost"] or -1) for row in table(seen, "/requests", f"{SPAN}&order=-cost")]
    assert costs == sorted(costs, reverse=True)
    counts = [row["requests"] for row in table(seen, "/models", f"{SPAN}&order=requests")]
    assert counts == sorted(counts)
    assert 'aria-sort="ascending"' in seen.get(f"/models?{SPAN}&order=requests").text


# Exports


def test_csv_and_json_have_the_rows_of_the_table_on_the_page(seen):
    for path in ("/models", "/requests", "/chats", "/tools", "/errors"):
        answer = seen.get(f"{path}.csv?{SPAN}")
        assert answer.headers["content-type"].startswith("text/csv")
        rows, objects = list(csv.DictReader(io.StringIO(answer.text))), table(seen, path)
        assert len(rows) == len(objects) > 0
        for row, each in zip(rows, objects, strict=True):
            assert list(row) == list(each)
            assert {name: value or None for name, value in row.items()} == {
                name: None if value is None else str(value) for name, value in each.items()
            }
        assert seen.get(f"{path}?{SPAN}&format=csv").text == answer.text
        body = re.findall(r"<tbody>.*?</tbody>", seen.get(f"{path}?{SPAN}").text, re.DOTALL)
        assert len(rows) in [each.count("<tr") for each in body]


def test_money_is_a_string_in_json(seen):
    costs = {row["model"]: row["cost"] for row in table(seen, "/models")}
    assert costs["gpt-4o"] == f"{usage(seen.store, (), where={'model': 'gpt-4o'}, **OF_SPAN)[0].cost:f}"


def test_a_text_that_a_spreadsheet_would_compute_has_a_quote_before_it(store):
    names = ["=1+1", "+1", "-1", "@sum(a1)", "\t=1", " =1", "\uff1d1", "plain"]
    with store.connection():
        for name in names:
            store.records.request.create(model=name, provider="p", status_code=200, duration_ms=-5)
    with client_of(create_app(store)) as client:
        rows = list(csv.reader(io.StringIO(client.get("/requests.csv").text)))
    models = {row[2] for row in rows[1:]}
    assert models == {"'=1+1", "'+1", "'-1", "'@sum(a1)", "'\t=1", "' =1", "'\uff1d1", "plain"}
    assert {row[rows[0].index("duration_ms")] for row in rows[1:]} == {"-5"}  # a number is one


def test_a_table_that_is_not_there_is_named(seen):
    answer = seen.get("/models.json?table=nonsense")
    assert answer.status_code == 404
    assert answer.json() == {"error": "There is no table 'nonsense' here; there are models.", "status": 404}
    assert seen.get("/models.xml").status_code == 404


# What goes wrong


@pytest.mark.parametrize(
    ("address", "named"),
    [
        (
            "/?modell=gpt-4o",
            "there is no parameter 'modell': did you mean 'model'? There are range, since, until, ",
        ),
        ("/?ranges=7d", "did you mean 'range'?"),
        ("/?colour=red", "order, limit, offset, q, refresh, table; filters: provider, model, status, error, source, "),
        ("/?metadata.=x", "there is no parameter 'metadata.'"),
        ("/?range=9d", "range='9d' is none of 24h, 7d, 30d, 90d and custom"),
        ("/?range=custom", "needs since"),
        ("/?since=yesterday", "since='yesterday' is not a time"),
        ("/?since=2026-10-30&until=2026-10-29", "is not before until='2026-10-29'"),
        ("/?since=0001-01-01", "too long ago"),
        ("/?since=9999-01-01", "since='9999-01-01'"),
        ("/?tz=Mars/Olympus", "tz='Mars/Olympus' is not a time zone"),
        ("/?by=colour", "there is no by='colour'"),
        ("/?by=tool", "by='tool'"),
        ("/users?by=model", "by='model' is no column of yours"),
        ("/models?order=beauty", "'beauty'"),
        ("/requests?order=beauty", "'beauty'"),
        ("/requests?limit=0", "limit='0' is not a number from 1 to 1000"),
        ("/requests?offset=-1", "offset='-1'"),
        ("/requests?status=teapot", "status='teapot'"),
        ("/requests?streamed=maybe", "streamed='maybe'"),
        ("/requests?chat=nonsense", "'nonsense'"),
        ("/models?format=pdf", "format='pdf'"),
        ("/?refresh=0", "refresh='0'"),
        ("/?tz=UTC&tz=Europe/Berlin", "'tz' is there twice"),
        ("/?user_id=%00", "user_id"),
        ("/chats?q=" + "x" * 501, "500 characters"),
    ],
)
def test_an_address_that_makes_no_sense_is_refused_by_name(sqlite_store, address, named):
    answer = client_of(create_app(sqlite_store)).get(address)
    assert answer.status_code == 400
    text = Elements(answer.text).text
    assert named in text
    assert "Traceback" not in text


def test_a_chat_that_is_not_there_is_not_found(sqlite_store):
    empty = client_of(create_app(sqlite_store))
    for chat_id in ("01900000-0000-7000-8000-000000000000", "nonsense", "%3Cscript%3E"):
        answer = empty.get(f"/chats/{chat_id}")
        assert answer.status_code == 404
        assert "There is no chat" in Elements(answer.text).text
    assert empty.get("/nothing/here").status_code == 404


def test_a_database_without_tables_is_told_of(database_url):
    with connect(database_url) as store, client_of(create_app(store)) as client:
        answer = client.get("/")
        assert answer.status_code == 503
        assert 'Run "llm-orm migrate"' in Elements(answer.text).text


def test_a_database_that_is_gone_is_told_of_calmly():
    with connect("postgresql://nobody:secret@127.0.0.1:9/none") as store, client_of(create_app(store)) as client:
        answer = client.get("/models")
        assert answer.status_code == 503
        assert "The database does not answer" in Elements(answer.text).text
        assert "secret" not in answer.text
        assert client.get("/models.json").json()["status"] == 503


def test_an_error_of_our_own_making_shows_nothing_of_it(sqlite_store, monkeypatch):
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("internals")

    monkeypatch.setattr("llm_orm.dashboard.pages.groups.usage", broken)
    with client_of(create_app(sqlite_store), raise_server_exceptions=False) as client:
        answer = client.get("/models")
        assert answer.status_code == 500
        assert "internals" not in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]


# What was said is shown, not run


def test_a_hostile_chat_is_shown_and_is_nothing_but_text(store):
    chat_id = hostile(store)
    with client_of(create_app(store)) as client:
        span = "since=2026-11-01&until=2026-11-10"
        for path in (
            f"/chats/{chat_id}",
            "/chats",
            "/requests",
            "/errors",
            "/models",
            "/users",
            "/tools",
            "/agents",
            "/",
        ):
            answer = client.get(f"{path}?{span}")
            assert answer.status_code == 200
            elements = Elements(answer.text)
            assert "alert('pwned')" in elements.text
            assert {tag for tag, _ in elements.found}.isdisjoint({"img", "iframe", "object", "embed", "b>bold"})
            assert not [name for _, found in elements.found for name in found if name.startswith("on")]
            assert not [link for link in elements.attributes("href", "src", "action") if "javascript:" in link[:20]]
            scripts = [found for tag, found in elements.found if tag == "script"]
            assert all("src" in each or each["type"] == "application/json" for each in scripts)
            for text in elements.scripts:
                json.loads(text)
                assert "<" not in text
        assert "{{ 7 * 7 }}" in page(client, f"/chats/{chat_id}").text
        assert "${7*7}" in page(client, f"/chats/{chat_id}").text
        filtered = client.get("/", params={"user_id": XSS, "since": "2026-11-01", "until": "2026-11-10"})
        assert filtered.status_code == 200
        assert "<script>window" not in filtered.text
        assert "<script>window" not in client.get("/", params={XSS: XSS}).text


# Mounted


def test_mounted_in_another_application_it_links_to_itself(store):
    from starlette.applications import Starlette
    from starlette.routing import Mount

    hostile(store)
    app = Starlette(routes=[Mount("/admin/llm", create_app(store, token="a-token-of-some-length"))])
    client = client_of(app)
    client.headers["authorization"] = "Bearer a-token-of-some-length"
    (line,) = chats(store)
    for path in (*PAGES, f"/chats/{line.id}", "/?nonsense=1"):
        answer = client.get(f"/admin/llm{path}")
        links = Elements(answer.text).attributes("href", "src", "action")
        assert len(links) > 10
        assert [link for link in links if not link.startswith(("/admin/llm/", "#"))] == []
    assert client.get("/admin/llm/static/dashboard.css").status_code == 200
    assert client.get("/admin/llm/models?filter=model&value=x").headers["location"] == "/admin/llm/models?model=x"
    stranger = client_of(app).get("/admin/llm/models?model=x")
    assert stranger.headers["location"] == "/admin/llm/login?next=%2Fmodels%3Fmodel%3Dx"


def test_metrics_are_to_be_scraped(dashboard, store):
    text = dashboard.get("/metrics").text
    rows = usage(store, "model")
    total = sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("llm_orm_cost_dollars_total{"))
    assert total == pytest.approx(float(sum(row.cost for row in rows)))


def test_the_store_that_was_given_stays_open(store: Store):
    with client_of(create_app(store)) as client:
        client.get("/")
    assert chats(store) == []


def test_a_span_of_whole_days_is_called_by_its_first_and_its_last(seen):
    for address, words in (
        ("since=2026-10-26&until=2026-10-31", "2026-10-26 to 2026-10-30"),
        ("since=2026-10-26&until=2026-10-27", "2026-10-26<"),
        ("since=2026-10-26T12:00&until=2026-10-27", "2026-10-26 12:00 to 2026-10-27"),
    ):
        assert words in seen.get(f"/?{address}").text

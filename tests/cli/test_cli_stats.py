"""`llm-orm stats`."""

import csv
import io
import json
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from terminal import on_a_terminal

from llm_orm import Stats, Store, connect, create_chat, usage
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM
from llm_orm.usage import MEASURES
from llm_orm_cli import main
from llm_orm_cli.output import bars
from llm_orm_cli.stats import FIGURES

UNKNOWN = "\N{EN DASH}"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["stats", *arguments])


def shown(result: Result) -> dict[str, str]:
    assert result.exit_code == 0, result.output
    return dict(line.split("\t") for line in result.stdout.splitlines())


def spend(store: Store) -> tuple[str, str]:
    """Two chats: one that called a tool and then failed, one whose only call cost next to nothing."""
    price = {"input_cost_per_token": "0.001", "output_cost_per_token": "0.01"}
    say = {"input_tokens": 100, "output_tokens": 20}
    llm = ScriptedLLM(
        Say(calls=[Call("nap")], **say), Say("Done", cached_tokens=30, **say), ProviderError(400), **price
    )
    first = create_chat(store, model="test", llm=llm, tools=[nap])
    first.ask("Take a nap")
    with pytest.raises(ProviderError):
        first.ask("And again")
    second = create_chat(store, model="test", llm=ScriptedLLM(Say("Hi", cost="0.00000004", **say)))
    second.ask("Hello")
    return str(first.id), str(second.id)


def nap() -> str:
    """Sleep."""
    return "slept"


def test_one_chat_is_summed_up(store: Store, database_url: str) -> None:
    first, _ = spend(store)
    values = shown(run(first, "--database-url", database_url))
    assert set(FIGURES) == {*Stats.__slots__, *MEASURES}
    assert values.pop("duration_ms").isdigit()
    assert {name: values[name] for name in Stats.__slots__ if name != "duration_ms"} == {
        "input_tokens": "200",
        "output_tokens": "40",
        "total_tokens": "240",
        "cached_tokens": "30",
        "cache_write_tokens": "0",
        "thinking_tokens": "0",
        "cost": "0.6",
        "requests": "3",
        "failed_requests": "1",
        "unpriced_requests": "0",
        "tool_calls": "1",
    }


def test_all_chats_are_summed_up_with_those_that_were_deleted(store: Store, database_url: str) -> None:
    chat = create_chat(store, model="test", llm=ScriptedLLM("Hi"))
    chat.ask("Hello")
    chat.delete()
    spend(store)
    values = shown(run("--database-url", database_url))
    assert list(values) == FIGURES
    assert (values["requests"], values["unpriced_requests"], values["tool_calls"]) == ("5", "1", "1")
    assert values["cost"] == "0.60000004"


def test_a_small_cost_has_no_exponent(store: Store, database_url: str) -> None:
    _, second = spend(store)
    assert shown(run(second, "--database-url", database_url))["cost"] == "0.00000004"
    assert json.loads(run(second, "--json", "--database-url", database_url).stdout)["cost"] == "0.00000004"


def test_json_has_the_fields_of_stats(store: Store, database_url: str) -> None:
    first, _ = spend(store)
    found = json.loads(run(first, "--json", "--database-url", database_url).stdout)
    assert list(found) == FIGURES
    assert (found["requests"], found["cost"]) == (3, "0.6")


@pytest.mark.parametrize("chat_id", ["01a1f8c8-18bf-7346-8b7e-b94b1b67b901", "nonsense"])
def test_an_unknown_chat_is_an_error_that_names_it(store: Store, database_url: str, chat_id: str) -> None:
    result = run(chat_id, "--database-url", database_url)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert f"there is no chat '{chat_id}' in " in result.stderr


def test_missing_tables_are_an_error_that_says_what_to_run(database_url: str) -> None:
    with connect(database_url) as store, store.connection():
        pass
    result = run("--database-url", database_url)
    assert result.exit_code == 1
    assert 'run "llm-orm migrate"' in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_file_is_an_error_and_stays_missing(tmp_path: Path) -> None:
    result = run("--database-url", f"sqlite:///{tmp_path}/chats.db")
    assert result.exit_code == 1
    assert f"there is no database file '{tmp_path}/chats.db'" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_tables_of_other_names_are_found(database_url: str) -> None:
    with connect(database_url, table_prefix="app_", table_names={"request": "spent"}) as store:
        store.create_tables()
        create_chat(store, model="test", llm=ScriptedLLM("Hi")).ask("Hello")
    names = ["--table-prefix", "app_", "--table-name", "request=spent"]
    assert shown(run("--database-url", database_url, *names))["requests"] == "1"
    assert run("--database-url", database_url, *names[:2]).exit_code == 1


def test_the_store_may_be_the_one_of_the_application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop_of_stats.py").write_text(
        "from llm_orm import connect\nstore = connect('sqlite:///shop.db', table_prefix='shop_')\n"
    )
    monkeypatch.chdir(tmp_path)
    with connect("sqlite:///shop.db", table_prefix="shop_") as store:
        store.create_tables()
        create_chat(store, model="test", llm=ScriptedLLM("Hi")).ask("Hello")
    assert shown(run("--store", "shop_of_stats:store"))["requests"] == "1"


def test_the_database_is_the_one_that_connect_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answers = {"named.db": 3, "general.db": 2, "llm_orm.db": 1}
    for name, count in answers.items():
        with connect(f"sqlite:///{name}") as store:
            store.create_tables()
            for _ in range(count):
                create_chat(store, model="test", llm=ScriptedLLM("Hi")).ask("Hello")
    assert shown(run())["requests"] == "1"
    monkeypatch.setenv("DATABASE_URL", "sqlite:///general.db")
    assert shown(run())["requests"] == "2"
    monkeypatch.setenv("LLM_ORM_DATABASE_URL", "sqlite:///named.db")
    assert shown(run())["requests"] == "3"


# Groups


def spend_by_user(store: Store, *, days_ago: int = 0) -> None:
    """Of u_1 two requests of "dear" for $3, of u_2 one of "cheap" for $0.5 and one without a price; u_1 used a tool."""
    used: dict[str, Any] = {"input_tokens": 100, "output_tokens": 20}
    llm = ScriptedLLM(Say(calls=[Call("nap")], cost="1", **used), Say("Done", cost="2", **used))
    create_chat(store, model="dear", llm=llm, tools=[nap], user_id="u_1", metadata={"plan": "free"}).ask("Go")
    llm = ScriptedLLM(Say("Hi", cost="0.5", **used), Say("Ho", **used))
    chat = create_chat(store, model="cheap", llm=llm, user_id="u_2", metadata={"plan": 2})
    chat.ask("Hello")
    chat.ask("Again")
    if days_ago:
        time = datetime.now(UTC) - timedelta(days=days_ago)
        for record in (store.records.request, store.records.tool_call):
            with store.connection():
                record.update(created_at=time).execute()  # type: ignore[attr-defined]


def rows_of(result: Result, **how: Any) -> list[dict[str, str]]:
    assert result.exit_code == 0, result.output
    return list(csv.DictReader(io.StringIO(result.stdout), **how))


def test_groups_are_the_rows_of_usage(store: Store, database_url: str) -> None:
    spend_by_user(store)
    rows = rows_of(run("--by", "user_id,model", "--database-url", database_url), delimiter="\t")
    expected = usage(store, ("user_id", "model"))
    assert list(rows[0]) == ["user_id", "model", *FIGURES]
    assert [(row["user_id"], row["model"], row["requests"]) for row in rows] == [
        ("u_1", "dear", "2"),
        ("u_2", "cheap", "2"),
    ]
    assert [Decimal(row["cost"]) for row in rows] == [row.cost for row in expected] == [3, Decimal("0.5")]
    assert [row["unpriced_requests"] for row in rows] == ["0", "1"]


def test_csv_and_json_have_the_same_figures(store: Store, database_url: str) -> None:
    spend_by_user(store)
    arguments = ["--by", "model", "--by", "user_id", "--database-url", database_url]
    as_csv, as_json = rows_of(run(*arguments, "--csv")), json.loads(run(*arguments, "--json").stdout)
    assert [list(row) for row in as_json] == [["model", "user_id", *FIGURES]] * 2
    assert [row["cost"] for row in as_csv] == [row["cost"] for row in as_json] == ["3", "0.5"]
    assert [row["first_token_p50_ms"] for row in as_csv] == ["", ""]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("--by model --where user_id=u_1", {"dear": "3"}),
        ("--by model --where user_id=u_1 --where user_id=u_2", {"dear": "3", "cheap": "0.5"}),
        ("--by model --where metadata.plan=2", {"cheap": "0.5"}),
        ("--by user_id --where agent_class=(none)", {"u_1": "3", "u_2": "0.5"}),
        ("--by user_id --where metadata.visits=(none) --where user_id=u_1", {"u_1": "3"}),
        ("--by model --where model=cheap --where status=200 --where streamed=false", {"cheap": "0.5"}),
        ("--by user_id --top 1", {"u_1": "3"}),
        ("--by user_id --order cost --top 1", {"u_2": "0.5"}),
        ("--by user_id --since 7d", {"u_1": "3", "u_2": "0.5"}),
        ("--by user_id --until 7d", {}),
        ("--by metadata.plan", {"free": "3", "2": "0.5"}),
    ],
)
def test_groups_are_filtered_ordered_and_cut(
    store: Store, database_url: str, arguments: str, shown: dict[str, str]
) -> None:
    spend_by_user(store)
    rows = rows_of(run(*arguments.split(), "--database-url", database_url), delimiter="\t")
    assert {next(iter(row.values())): row["cost"] for row in rows} == shown


def test_days_are_those_of_the_time_zone(store: Store, database_url: str) -> None:
    spend_by_user(store)
    time = datetime(2026, 11, 1, 23, 30, tzinfo=UTC)
    with store.connection():
        store.records.request.update(created_at=time).execute()  # type: ignore[attr-defined]
    span = ["--since", "2026-11-01", "--until", "2026-11-03", "--columns", "requests,cost"]
    utc = run("--by", "day", *span, "--database-url", database_url)
    berlin = run("--by", "day", *span, "--tz", "Europe/Berlin", "--database-url", database_url)
    assert utc.stdout == "day\trequests\tcost\n2026-11-01\t4\t3.5\n2026-11-02\t0\t0\n"
    assert berlin.stdout == "day\trequests\tcost\n2026-11-01\t0\t0\n2026-11-02\t4\t3.5\n"


def test_a_total_of_some_requests_has_what_usage_says(store: Store, database_url: str) -> None:
    spend_by_user(store, days_ago=10)
    create_chat(store, model="dear", llm=ScriptedLLM(Say("Hi", cost="8")), user_id="u_1").ask("Hello")
    values = shown(run("--since", "7d", "--database-url", database_url))
    assert list(values) == FIGURES
    assert (values["requests"], values["cost"]) == ("1", "8")
    assert shown(run("--where", "user_id=u_1", "--columns", "cost", "--database-url", database_url)) == {"cost": "11"}
    total = rows_of(run("--csv", "--database-url", database_url))
    assert [(row["requests"], row["cost"]) for row in total] == [("5", "11.5")]


def test_one_chat_by_model_and_by_the_beginning_of_its_id(store: Store, database_url: str) -> None:
    first, second = spend(store)
    (row,) = rows_of(run(first, "--by", "model", "--database-url", database_url), delimiter="\t")
    assert (row["model"], row["requests"], row["cost"]) == ("test", "3", "0.6")
    assert shown(run(second[:23], "--database-url", database_url))["requests"] == "1"


def test_tools_are_counted_where_it_is_by_tool(store: Store, database_url: str) -> None:
    spend_by_user(store)
    (row,) = rows_of(run("--by", "tool", "--database-url", database_url), delimiter="\t")
    assert (row["tool"], row["tool_calls"], row["tool_failures"], row["requests"]) == ("nap", "1", "0", "")
    screen = on_a_terminal("stats", "--by", "tool", "--database-url", database_url)
    assert screen.split()[:6] == ["tool", "tool", "calls", "avg", "ms", "p95"]


def test_a_terminal_has_a_bar_for_each_group(store: Store, database_url: str) -> None:
    spend_by_user(store)
    screen = on_a_terminal("stats", "--by", "user_id", "--database-url", database_url, columns=90)
    lines = [line.split() for line in screen.splitlines() if line.strip()]
    assert lines[0] == "user_id requests tokens in tokens out cost unpriced p95 ms".split()
    assert [line[:5] for line in lines[2:]] == [["u_1", "2", "200", "40", "3.00"], ["u_2", "2", "200", "40", "0.50"]]
    long, short = (line[-1] for line in lines[2:])
    assert set(long) == {"█"}
    assert len(long) > 4 * len(short) > 0
    assert max(map(len, screen.splitlines())) <= 90


def test_a_terminal_says_where_a_cost_is_unknown(store: Store, database_url: str) -> None:
    spend_by_user(store)
    create_chat(store, model="new", llm=ScriptedLLM("Hi"), user_id="u_3").ask("Hello")
    where = ["--database-url", database_url]
    lines = [line.split() for line in on_a_terminal("stats", "--by", "user_id", *where).splitlines()[3:] if line]
    assert [(line[0], line[4], line[5]) for line in lines if line] == [
        ("u_1", "3.00", "0"), ("u_2", "0.50", "1"), ("u_3", UNKNOWN, "1"),
    ]  # fmt: skip
    screen = on_a_terminal("stats", "--by", "user_id", "--columns", "cost", *where)
    assert [line.split("█")[0].split() for line in screen.splitlines()[3:6]] == [
        ["u_1", "3.00"], ["u_2", "0.50", "+1", "unpriced"], ["u_3", UNKNOWN],
    ]  # fmt: skip
    total = on_a_terminal("stats", "--where", "user_id=u_3", *where)
    assert re.search(f"cost +{UNKNOWN} *\n", total)
    rows = rows_of(run("--by", "user_id", *where), delimiter="\t")
    assert [(row["cost"], row["unpriced_requests"]) for row in rows] == [("3", "0"), ("0.5", "1"), ("0", "1")]


def test_all_totals_have_the_same_figures(store: Store, database_url: str) -> None:
    first, _ = spend(store)
    asked = ([], [first], ["--since", "7d"], ["--where", "model=test"], ["--where", "model=nobody"])
    shapes = [list(shown(run(*arguments, "--database-url", database_url))) for arguments in asked]
    assert shapes == [FIGURES] * len(asked)
    columns = run("--where", "model=test", "--columns", "total_tokens", "--database-url", database_url)
    assert shown(columns) == {"total_tokens": "360"}


def test_words_of_json_are_found_in_any_case(store: Store, database_url: str) -> None:
    chats = [create_chat(store, model="test", llm=ScriptedLLM("Hi"), metadata={"vip": vip}) for vip in (True, "True")]
    for chat in chats:
        chat.ask("Hello")
    for given, count in (("True", "2"), ("true", "1"), ("FALSE", "0")):
        assert shown(run("--where", f"metadata.vip={given}", "--database-url", database_url))["requests"] == count


def test_bars_are_of_requests_where_nothing_has_a_price(store: Store, database_url: str) -> None:
    for model, count in (("often", 4), ("seldom", 1)):
        chat = create_chat(store, model=model, llm=ScriptedLLM(*["Hi"] * count))
        for _ in range(count):
            chat.ask("Hello")
    screen = on_a_terminal("stats", "--by", "model", "--database-url", database_url)
    often, seldom = (line.count("█") for line in screen.splitlines() if "often" in line or "seldom" in line)
    assert often == 4 * seldom > 0


def test_a_narrow_terminal_gives_up_figures_for_the_rest(store: Store, database_url: str) -> None:
    spend_by_user(store)
    screen = on_a_terminal("stats", "--by", "day,model", "--database-url", database_url, columns=60)
    assert max(map(len, screen.splitlines())) <= 60
    assert screen.split()[:4] == ["day", "model", "requests", "cost"]
    assert "█" in screen


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([8, 4, 0], ["████", "██", ""]),
        ([Decimal(32), Decimal(1), Decimal("0.001")], ["████", "▏", "▏"]),
        ([0, 0], ["", ""]),
        ([], []),
    ],
)
def test_a_bar_is_as_long_as_its_share(values: list[Any], drawn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, expected in (("utf-8", drawn), ("ascii", ["#" * bar.count("█") for bar in drawn])):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert bars(values, 4) == expected


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--json", "--csv"], 2, "--json or --csv, not both"),
        (["--top", "3"], 2, "--order and --top are for the rows of --by"),
        (["--by", "model", "--top", "0"], 2, "0 is not in the range"),
        (["--by", "nonsense"], 1, "does not know 'nonsense'"),
        (["--by", "day,hour"], 1, "group by one of"),
        (["--by", "model", "--order", "nonsense"], 1, "order='nonsense'"),
        (["--by", "model", "--columns", "nonsense"], 1, "nonsense"),
        (["--since", "yesterday"], 1, "since='yesterday' is not a time"),
        (["--since", "2026-11-02", "--until", "2026-11-01"], 1, "is not before until="),
        (["--by", "day", "--tz", "Nowhere/At_all"], 1, "is not a time zone"),
        (["--where", "status=many"], 1, "a status is one of HTTP, such as 429, not 'many'"),
        (["--tz", "Europe/Berln"], 1, "tz='Europe/Berln' is not a time zone"),
        (["--by", "modle"], 1, "did you mean 'model'?"),
    ],
    ids=str,
)
def test_a_wrong_call_says_what_is_wrong(
    sqlite_store: Store, sqlite_url: str, arguments: list[str], code: int, complaint: str
) -> None:
    result = run(*arguments, "--database-url", sqlite_url)
    assert (result.exit_code, result.stdout) == (code, "")
    assert complaint in " ".join(result.stderr.split())

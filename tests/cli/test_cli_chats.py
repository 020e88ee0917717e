"""`llm-orm chats`."""

import csv
import io
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import peewee as pw
import pytest
from click.testing import CliRunner, Result
from cryptography.fernet import Fernet
from terminal import on_a_terminal

from llm_orm import Agent, ChatLine, Store, chats, connect, create_agent_session, create_chat
from llm_orm.testing import Say, ScriptedLLM
from llm_orm_cli import main

UNKNOWN = "\N{EN DASH}"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["chats", *arguments])


def rows_of(result: Result) -> list[dict[str, str]]:
    assert result.exit_code == 0, result.output
    return list(csv.DictReader(io.StringIO(result.stdout), delimiter="\t", quoting=csv.QUOTE_NONE))


def fill(store: Store) -> list[str]:
    """Two chats: of u_1, about an order; of u_2, about the weather."""
    llm = ScriptedLLM(Say("It is on its way.", cost="0.5"), Say("It rains.", cost="2"), Say("It snows.", cost="1"))
    first = create_chat(store, model="test", llm=llm, user_id="u_1", metadata={"plan": "free"})
    first.ask("Where is my order?")
    second = create_chat(store, model="other", llm=llm, user_id="u_2")
    second.ask("How is the weather?")
    second.ask("And tomorrow?")
    return [str(first.id), str(second.id)]


def test_chats_are_listed_with_all_that_is_known_of_them(store: Store, database_url: str) -> None:
    ids = fill(store)
    rows = rows_of(run("--database-url", database_url))
    assert [row["id"] for row in rows] == ids[::-1]
    assert list(rows[0]) == [*(name for name in ChatLine.__slots__ if name != "columns"), "user_id"]
    assert (rows[1]["title"], rows[1]["cost"], rows[1]["turns"], rows[1]["user_id"]) == (
        "Where is my order?", "0.5", "1", "u_1",
    )  # fmt: skip
    assert rows[1]["metadata"] == '{"plan": "free"}'


def test_json_is_what_python_gets(store: Store, database_url: str) -> None:
    fill(store)
    found = json.loads(run("--json", "--database-url", database_url).stdout)
    assert [line["columns"] for line in found] == [{"user_id": "u_2"}, {"user_id": "u_1"}]
    assert [list(line) for line in found] == [list(ChatLine.__slots__)] * 2
    assert [line["cost"] for line in found] == [str(line.cost) for line in chats(store)]


@pytest.mark.parametrize(
    ("arguments", "places"),
    [
        ("--where user_id=u_1", [0]),
        ("--where user_id=u_1 --where user_id=u_2", [1, 0]),
        ("--where metadata.plan=free --where model=test", [0]),
        ("--order cost", [0, 1]),
        ("--order -turns --limit 1", [1]),
        ("--since 1h", [1, 0]),
        ("--until 2020-01-01", []),
        ("--where user_id=(none)", []),
        ("--where user_id=u_2 --where agent_class=(none)", [1]),
        ("--since 2020-01-01 --until 2020-02-01 --tz Europe/Berlin", []),
    ],
)
def test_chats_are_filtered_and_ordered(store: Store, database_url: str, arguments: str, places: list[int]) -> None:
    ids = fill(store)
    rows = rows_of(run(*arguments.split(), "--database-url", database_url))
    assert [ids.index(row["id"]) for row in rows] == places


def test_no_chats_are_a_header(store: Store, database_url: str) -> None:
    assert run("--database-url", database_url).stdout.startswith("id\ttitle\tmodel\t")
    assert run("--csv", "--database-url", database_url).stdout.startswith("id,title,model,")
    assert run("--json", "--database-url", database_url).stdout == "[]\n"


def test_a_search_shows_what_was_found_the_best_first(store: Store, database_url: str) -> None:
    ids = fill(store)
    (row,) = rows_of(run("--search", "weather", "--database-url", database_url))
    assert (row["id"], row["found"], row["title"]) == (ids[1], "How is the weather?", "How is the weather?")
    assert rows_of(run("--search", "weather", "--where", "user_id=u_1", "--database-url", database_url)) == []
    for span in (["--until", "7d"], ["--since", "2020-01-01", "--until", "2020-02-01"]):
        assert rows_of(run("--search", "weather", *span, "--database-url", database_url)) == []
    both = json.loads(run("--search", "it", "--json", "--database-url", database_url).stdout)
    assert {line["id"] for line in both} == set(ids)
    assert len(json.loads(run("--search", "it", "--limit", "1", "--json", "--database-url", database_url).stdout)) == 1


def test_a_spreadsheet_is_given_no_formula(store: Store, database_url: str) -> None:
    for said in ("=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\uff1d1", 'a, "b"'):
        create_chat(store, model="test", llm=ScriptedLLM("Hi"), user_id="\t=1").ask(said)
    text = run("--csv", "--order", "created_at", "--database-url", database_url).stdout
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["title"] for row in rows] == ["'=HYPERLINK(1)", "'+1", "'-1", "'@SUM(1)", "'\uff1d1", 'a, "b"']
    assert {row["user_id"] for row in rows} == {"'\t=1"}


def test_a_terminal_is_shown_as_much_as_it_has_room_for(store: Store, database_url: str) -> None:
    ids = fill(store)
    create_chat(store, model="test", llm=ScriptedLLM("Hi")).ask("[red]\x1b[2J\u202e" + "long " * 50)
    for columns in (80, 120):
        screen = on_a_terminal("chats", "--database-url", database_url, columns=columns)
        lines = [line.split() for line in screen.splitlines() if line.strip()]
        assert lines[0] == ["id", "updated", "title", "model", "turns", "cost", "user_id"]
        assert max(map(len, screen.splitlines())) <= columns
        assert [key for line in lines[3:] for key in ids if key.startswith(line[0])] == ids[::-1]
        assert "[red]" in screen
        assert "…" in screen
        assert "\x1b" not in screen
        assert "\u202e" not in screen


def test_ids_on_a_terminal_are_whole_and_tell_a_chat_from_all_others(store: Store, database_url: str) -> None:
    chat: Any = store.records.chat
    message: Any = store.records.message
    ids = [f"01a1f8c8-18bf-7346-8b7e-{end}b94b1b67b90" for end in "def"]
    with store.connection():
        for place, key in enumerate(ids):
            chat.insert(id=UUID(key), model="a-model-of-some-length", user_id=f"somebody{place}@example.com").execute()
            message.insert(chat=key, position=0, role="user", content="long " * 20).execute()
    create_chat(store, model="test", llm=ScriptedLLM("Hi"), user_id="u_2").ask("long " * 50)
    options = ["--where", "model=a-model-of-some-length", "--limit", "2", "--order", "created_at"]
    for columns in (40, 60, 80, 120):
        screen = on_a_terminal("chats", *options, "--database-url", database_url, columns=columns)
        shown = [line.split()[0] for line in screen.splitlines() if line.strip().startswith("01a1f8c8")]
        assert shown == [key[:25] for key in ids[:2]]
    of_the_other = on_a_terminal("chats", "--where", "user_id=u_2", "--database-url", database_url, columns=80)
    shown = of_the_other.splitlines()[3].split()[0]
    assert len(shown) == 8
    found = CliRunner().invoke(main, ["show", shown, "--database-url", database_url])
    assert found.exit_code == 0, found.output


def test_a_search_on_a_narrow_terminal_takes_a_line_for_each_chat(store: Store, database_url: str) -> None:
    fill(store)
    create_chat(store, model="gpt-4o-2026-11-20", llm=ScriptedLLM("Hi"), user_id="u_3").ask("how it is " * 9)
    for columns in (40, 60, 80):
        screen = on_a_terminal("chats", "--search", "is", "--database-url", database_url, columns=columns)
        lines = [line for line in screen.splitlines() if line.strip()]
        assert len(lines) == 2 + 3
        assert "found" in lines[0]
        assert max(map(len, lines)) <= columns


def test_times_on_a_terminal_are_short_and_of_the_time_zone(store: Store, database_url: str) -> None:
    chat = create_chat(store, model="test", llm=ScriptedLLM("Hi"))
    chat.ask("Hello")
    record: Any = store.records.chat
    this_year = datetime.now(UTC).year
    for year, shown in ((this_year, "11-02 00:30"), (this_year - 1, f"{this_year - 1}-11-02")):
        with store.connection():
            record.update(updated_at=datetime(year, 11, 1, 23, 30, tzinfo=UTC)).execute()
        screen = on_a_terminal("chats", "--tz", "Europe/Berlin", "--database-url", database_url)
        assert f"  {shown}  " in screen


def test_a_terminal_says_which_agent_and_where_a_cost_is_unknown(store: Store, database_url: str) -> None:
    class Support(Agent):
        model = "test"

    create_agent_session(store, Support, llm=ScriptedLLM("Hi")).ask("Hello agent")
    llm = ScriptedLLM(Say("Hi", cost="0.12"), "Hi", Say("Hi", cost="0"))
    create_chat(store, model="other", llm=llm).ask("Hello chat")
    chat = create_chat(store, model="free", llm=ScriptedLLM(Say("Hi", cost="0.25"), "Hi"))
    chat.ask("Hello both")
    chat.ask("Again")
    screen = on_a_terminal("chats", "--order", "created_at", "--database-url", database_url)
    lines = [re.split("  +", line.strip()) for line in screen.splitlines() if line.strip()]
    assert lines[0][2:] == ["title", "agent or model", "turns", "cost"]
    assert [line[2:] for line in lines[2:]] == [
        ["Hello agent", "Support", "1", UNKNOWN],
        ["Hello chat", "other", "1", "0.12"],
        ["Hello both", "free", "2", "0.25 +1 unpriced"],
    ]
    rows = rows_of(run("--order", "created_at", "--database-url", database_url))
    assert [(row["cost"], row["unpriced_requests"]) for row in rows] == [("0", "1"), ("0.12", "0"), ("0.25", "1")]


def test_titles_of_an_encrypted_store_are_clear(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = Fernet.generate_key().decode()
    with connect(sqlite_url, encrypt=key, chat_fields={"user_id": pw.TextField(null=True)}) as store:
        store.create_tables()
        fill(store)
    monkeypatch.setenv("LLM_ORM_ENCRYPTION_KEYS", key)
    rows = rows_of(run("--where", "user_id=u_1", "--database-url", sqlite_url))
    assert [row["title"] for row in rows] == ["Where is my order?"]


def test_the_store_may_be_the_one_of_the_application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop_of_chats.py").write_text(
        "import peewee, llm_orm\nfields = {'user_id': peewee.TextField(null=True)}\n"
        "store = llm_orm.connect('sqlite:///shop.db', table_prefix='shop_', chat_fields=fields)\n"
    )
    monkeypatch.chdir(tmp_path)
    fields = {"user_id": pw.TextField(null=True)}
    with connect("sqlite:///shop.db", table_prefix="shop_", chat_fields=fields) as store:
        store.create_tables()
        fill(store)
    for named in (
        ["--store", "shop_of_chats:store"],
        ["--table-prefix", "shop_", "--database-url", "sqlite:///shop.db"],
    ):
        assert [row["user_id"] for row in rows_of(run(*named))] == ["u_2", "u_1"]


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--json", "--csv"], 2, "--json or --csv, not both"),
        (["--limit", "0"], 2, "0 is not in the range"),
        (["--where", "user_id"], 2, "'user_id' is not NAME=VALUE"),
        (["--where", "nonsense=1"], 1, "does not know 'nonsense'"),
        (["--order", "nonsense"], 1, "cannot order by 'nonsense'"),
        (["--since", "yesterday"], 1, "since='yesterday' is not a time"),
        (["--since", "7d", "--tz", "Nowhere/At_all"], 1, "is not a time zone"),
    ],
    ids=str,
)
def test_a_wrong_call_says_what_is_wrong(
    sqlite_store: Store, sqlite_url: str, arguments: list[str], code: int, complaint: str
) -> None:
    result = run(*arguments, "--database-url", sqlite_url)
    assert (result.exit_code, result.stdout) == (code, "")
    assert complaint in " ".join(result.stderr.split())

"""`llm-orm budgets`."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from terminal import on_a_terminal

from llm_orm import Store, connect, create_chat
from llm_orm.testing import Say, ScriptedLLM
from llm_orm_cli import main

HEAD = ["budget", "who", "spent", "limit", "remaining", "share", "resets_at"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["budgets", *arguments])


def spend(store: Store, user_id: str, cost: str) -> None:
    create_chat(store, model="test", user_id=user_id, llm=ScriptedLLM(Say("Hi.", cost=cost))).ask("Hi")


def test_a_budget_that_is_given_shows_where_each_stands(store: Store, database_url: str) -> None:
    spend(store, "u_1", "1.999")
    spend(store, "u_2", "0.5")
    result = run("--limit", "2.00", "--per", "total", "--by", "user_id", "--database-url", database_url)
    assert result.exit_code == 0, result.output
    assert [line.split("\t") for line in result.stdout.splitlines()] == [
        HEAD,
        ["$2 in total by user_id", "user_id='u_1'", "1.999", "2.00", "0.001", "99%", ""],
        ["$2 in total by user_id", "user_id='u_2'", "0.5", "2.00", "1.50", "25%", ""],
    ]


def test_one_that_is_used_up_exits_with_1_and_json_has_all_of_it(store: Store, database_url: str) -> None:
    spend(store, "u_1", "3")
    result = run("--limit", "2", "--json", "--database-url", database_url)
    assert result.exit_code == 1
    (found,) = json.loads(result.stdout)
    resets_at = found.pop("resets_at")
    assert resets_at.endswith(" 00:00:00.000+00:00")
    assert found == {
        "budget": "$2 per day",
        "who": {},
        "spent": "3",
        "limit": "2",
        "remaining": "0",
        "share": "1.5000",
        "is_exceeded": True,
    }


def test_the_budgets_are_those_of_the_applications_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop_of_budgets.py").write_text(
        "from llm_orm import Budget, connect\n"
        "store = connect('sqlite:///shop.db', budgets=[Budget('5.00', name='the shop')])\n"
        "without = connect('sqlite:///shop.db')\n"
    )
    monkeypatch.chdir(tmp_path)
    with connect("sqlite:///shop.db") as store:
        store.create_tables()
        create_chat(store, model="test", llm=ScriptedLLM(Say("Hi.", cost="1"))).ask("Hi")
    result = run("--store", "shop_of_budgets:store")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].startswith("the shop\tall\t1\t5.00\t4.00\t20%\t")
    without = run("--store", "shop_of_budgets:without")
    assert without.exit_code == 1
    assert "the store has no budgets: connect(…, budgets=[…]), or give one with --limit" in without.stderr


def test_a_terminal_shows_the_share_as_a_bar_and_when_it_ends(store: Store, database_url: str) -> None:
    for user_id, cost in (("somebody@example.com", "1"), ("u_2", "0.5"), ("u_3", "0.1")):
        spend(store, user_id, cost)
    options = ["--limit", "2", "--per", "month", "--by", "user_id", "--tz", "Etc/GMT-1", "--database-url", database_url]
    for columns in (80, 100, 160):
        screen = on_a_terminal("budgets", *options, "--top", "2", columns=columns)
        lines = [line.rstrip() for line in screen.splitlines() if line.strip()]
        assert len(lines) == 5
        assert max(map(len, lines)) <= columns
        assert lines[0].startswith("$2 per month by user_id")
        for line, share in zip(lines[3:], ("50%", "25%"), strict=True):
            assert re.search(rf" {share}  20\d\d-\d\d-01 00:00 \+01  ", line)
        assert lines[3].count("█") == 2 * lines[4].count("█") + ("▌" in lines[4]) > 0
    assert lines[3].count("█") == 10  # half of what a whole limit has
    assert "never" in on_a_terminal("budgets", "--limit", "2", "--per", "total", "--database-url", database_url)


def test_the_first_are_those_with_the_highest_share(store: Store, database_url: str) -> None:
    spend(store, "u_1", "3")
    spend(store, "u_2", "0.5")
    options = ["--limit", "2", "--by", "user_id", "--top", "1", "--database-url", database_url]
    assert [line.split("\t")[1] for line in run(*options).stdout.splitlines()] == ["who", "user_id='u_1'"]
    assert len(json.loads(run(*options, "--json").stdout)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say which budgets: --store MODULE:NAME, or --limit"),
        (("--limit", "much"), "the limit of a Budget must be US dollars"),
        (("--limit", "1", "--tz", "Berlin"), "tz='Berlin' is not a time zone"),
        (("--limit", "1", "--per", "year"), "is not one of"),
    ],
)
def test_a_wrong_call_is_refused(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_column_that_is_not_there_is_named(store: Store, database_url: str) -> None:
    result = run("--limit", "1", "--by", "usr_id", "--database-url", database_url)
    assert result.exit_code == 1
    assert "a Budget cannot be by 'usr_id'" in result.stderr

"""`llm-orm stats`."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llm_orm import Stats, Store, connect, create_chat
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM
from llm_orm_cli import main


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
    assert values.pop("duration_ms").isdigit()
    assert values == {
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
    assert list(values) == list(Stats.__slots__)
    assert (values["requests"], values["unpriced_requests"], values["tool_calls"]) == ("5", "1", "1")
    assert values["cost"] == "0.60000004"


def test_a_small_cost_has_no_exponent(store: Store, database_url: str) -> None:
    _, second = spend(store)
    assert shown(run(second, "--database-url", database_url))["cost"] == "0.00000004"
    assert json.loads(run(second, "--json", "--database-url", database_url).stdout)["cost"] == "0.00000004"


def test_json_has_the_fields_of_stats(store: Store, database_url: str) -> None:
    first, _ = spend(store)
    found = json.loads(run(first, "--json", "--database-url", database_url).stdout)
    assert list(found) == list(Stats.__slots__)
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

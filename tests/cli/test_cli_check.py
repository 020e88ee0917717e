"""`llm-orm check`."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.fernet import Fernet

from llm_orm import Chat, Store, check, connect, create_chat
from llm_orm.testing import Call, ScriptedLLM
from llm_orm_cli import main
from llm_orm_cli import output as printing

COLUMNS = ["kind", "table", "row_id", "chat_id", "detail"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["check", *arguments])


def look() -> str:
    """Look."""
    return "there"


def a_chat(store: Store) -> Chat:
    chat = create_chat(store, model="test", llm=ScriptedLLM(Call("look"), "Done."), tools=[look])
    chat.ask("Look")
    return chat


def damage(store: Store, chat: Chat, **values: Any) -> None:
    """Change the chat's reply, as something else than llm_orm does."""
    message: Any = store.records.message
    with store.connection():
        message.update(values).where(message.chat == chat.id, message.role == "assistant").execute()


def test_a_sound_database_says_what_was_looked_at(store: Store, database_url: str) -> None:
    chat = a_chat(store)
    a_chat(store)
    result = run("--database-url", database_url)
    assert result.stdout == "sound: 2 chats, 4 messages, 2 tool calls, 4 requests\n"
    assert (result.exit_code, result.stderr) == (0, "")
    of_one = run("--chat", str(chat.id), "--database-url", database_url)
    assert of_one.stdout == "sound: 1 chat, 2 messages, 1 tool call, 2 requests\n"
    as_json = run("--json", "--database-url", database_url)
    assert (as_json.exit_code, json.loads(as_json.stdout)) == (0, [])


def test_what_is_wrong_is_one_line_each_and_exits_with_1(store: Store, database_url: str) -> None:
    chat = a_chat(store)
    damage(store, chat, position=7, input_tokens=10**6)
    result = run("--database-url", database_url)
    assert (result.exit_code, result.stderr) == (1, "")
    names, *lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert names == COLUMNS
    assert [line[0] for line in lines] == ["positions", "tokens"]
    assert [line[4] for line in lines] == [finding.detail for finding in check(store)]


def test_json_has_the_fields_of_findings(store: Store, database_url: str) -> None:
    chat = a_chat(store)
    damage(store, chat, position=7)
    result = run("--json", "--database-url", database_url)
    (found,) = json.loads(result.stdout)
    (finding,) = check(store)
    assert result.exit_code == 1
    assert found == {name: str(getattr(finding, name)) for name in COLUMNS}


def test_a_terminal_gets_a_table(store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(store, a_chat(store), position=7)
    monkeypatch.setattr(printing, "is_terminal", lambda: True)
    result = run("--database-url", database_url)
    assert result.exit_code == 1
    assert "kind" in result.stdout
    assert "───" in result.stdout
    assert "\t" not in result.stdout


def test_other_chats_are_left_out(store: Store, database_url: str) -> None:
    chat, other = a_chat(store), a_chat(store)
    damage(store, chat, position=7)
    assert run("--chat", str(other.id), "--database-url", database_url).exit_code == 0
    assert run("--chat", str(chat.id)[:25], "--database-url", database_url).exit_code == 1


def test_a_turn_is_stale_once_it_is_older_than_was_said(store: Store, database_url: str) -> None:
    chat = a_chat(store)
    seen = datetime.now(UTC) - timedelta(minutes=3)
    with store.connection():
        create = store.records.message.create
        create(chat=chat.id, position=2, role="assistant", status="pending", updated_at=seen)
    for older_than, exit_code in {"2m": 1, "90": 1, "200s": 0, "0.5h": 0, "1d": 0}.items():
        result = run("--older-than", older_than, "--database-url", database_url)
        assert result.exit_code == exit_code, older_than
    found = run("--database-url", database_url).stdout
    assert f'llm-orm recover --chat {chat.id} --older-than 60s"' in found


def test_a_chat_of_a_store_with_keys_can_be_looked_at_without_them(database_url: str) -> None:
    with connect(database_url, encrypt=Fernet.generate_key()) as store:
        store.create_tables()
        chat = create_chat(store, model="test", instructions="Be kind.", llm=ScriptedLLM("Hello!"))
        chat.ask("Hi")
    result = run("--chat", str(chat.id), "--database-url", database_url)
    assert result.stdout == "sound: 1 chat, 2 messages, 0 tool calls, 1 request\n"


@pytest.mark.parametrize("duration", ["soon", "5x", "-5", "1e3", "", "15 minutes", "99999d"])
def test_what_is_no_duration_is_a_wrong_call(duration: str) -> None:
    result = run("--older-than", duration)
    assert result.exit_code == 2
    problem = "is longer than a hundred years" if duration == "99999d" else "is no duration: write 90, 90s, 15m, 2h or"
    assert f"{duration!r} {problem}" in result.stderr


def test_a_chat_that_is_not_there_is_an_error_that_names_it(store: Store, database_url: str) -> None:
    result = run("--chat", "nonsense", "--database-url", database_url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "there is no chat 'nonsense' in " in result.stderr


def test_missing_tables_are_an_error_and_no_finding(database_url: str) -> None:
    with connect(database_url) as store, store.connection():
        pass
    result = run("--database-url", database_url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert 'run "llm-orm migrate"' in result.stderr


def test_what_a_chat_without_rows_of_calls_and_requests_has_is_counted(database_url: str) -> None:
    with connect(database_url) as store:
        store.create_tables()
        with store.connection():
            store.database.drop_tables([store.records.tool_call, store.records.request], cascade=not store.is_sqlite)
    assert run("--database-url", database_url).stdout == "sound: 0 chats, 0 messages\n"


def test_a_long_list_is_cut_and_says_so(store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import llm_orm_cli.check

    monkeypatch.setattr(llm_orm_cli.check, "MOST", 2)
    for _ in range(3):
        damage(store, a_chat(store), position=7)
    result = run("--database-url", database_url)
    assert len(result.stdout.splitlines()) == 3
    assert result.stderr == "there may be more: these are the first 2\n"


def test_the_store_may_be_the_one_of_the_application(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from llm_orm import connect\nstore = connect('sqlite:///shop.db', table_prefix='shop_')\n"
    (tmp_path / "shop_of_check.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with connect("sqlite:///shop.db", table_prefix="shop_") as store:
        store.create_tables()
        damage(store, a_chat(store), position=7)
    result = run("--store", "shop_of_check:store")
    assert result.exit_code == 1
    assert "\tshop_llm_message\t" in result.stdout

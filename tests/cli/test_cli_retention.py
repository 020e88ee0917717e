"""`llm-orm erase` and `llm-orm prune`."""

import json
import os
import pty
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from freezegun import freeze_time

from llm_orm import Chat, Store, connect, create_chat, load_chat
from llm_orm.testing import Say, ScriptedLLM
from llm_orm_cli import main

LLM_ORM = [sys.executable, "-c", "from llm_orm_cli import main; main()"]


def run(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--database-url", url])


def shown(result: Result) -> dict[str, str]:
    assert result.exit_code == 0, result.output
    return dict(line.split("\t") for line in result.stdout.splitlines())


def say(store: Store, **columns: Any) -> Chat:
    chat = create_chat(store, model="test", llm=ScriptedLLM("Hi, Ada."), **columns)
    chat.ask("I am Ada.")
    return chat


def said(chat: Chat) -> list[str | None]:
    return [message.content for message in chat.messages()]


# erase


def test_the_chats_of_a_user_are_erased_by_a_column_that_is_found_in_the_table(store, database_url):
    mine, other = say(store, user_id="u_1"), say(store, user_id="u_2")
    dry = shown(run(database_url, "erase", "--where", "user_id=u_1", "--dry-run"))
    assert said(mine) == ["I am Ada.", "Hi, Ada."]
    done = shown(run(database_url, "erase", "--where", "user_id=u_1", "--yes"))
    counted = {"chats": "1", "messages": "2", "tool_calls": "0", "requests": "1", "attachments": "0"}
    assert dry == done == {**counted, "busy": "[]", "is_still_in_log": "false"}
    assert (said(mine), said(other)) == ([None, None], ["I am Ada.", "Hi, Ada."])


def test_chats_are_named_by_id_metadata_and_several_values(store, database_url):
    chats = [say(store, metadata={"plan": plan, "visits": visits}) for plan, visits in (("free", 7), ("gold", "7"))]
    run(database_url, "erase", "--chat", str(chats[1].id), "--where", "metadata.plan=free", "--yes")
    assert said(chats[1]) == ["I am Ada.", "Hi, Ada."]  # both must hold
    found = json.loads(run(database_url, "erase", "--where", "metadata.visits=7", "--dry-run", "--json").stdout)
    assert (found["chats"], found["busy"]) == (2, [])
    arguments = [argument for chat in chats for argument in ("--chat", str(chat.id))]
    assert shown(run(database_url, "erase", *arguments, "--yes"))["chats"] == "2"
    assert [said(chat) for chat in chats] == [[None, None]] * 2


def test_the_beginning_of_an_id_will_do(store, database_url):
    chat, other = say(store), say(store)
    beginning = str(chat.id)[:25]
    assert not str(other.id).startswith(beginning)
    assert shown(run(database_url, "erase", "--chat", beginning, "--yes"))["chats"] == "1"
    assert (said(chat), said(other)) == ([None, None], ["I am Ada.", "Hi, Ada."])
    with freeze_time(datetime.now(UTC) + timedelta(days=2)):
        assert shown(run(database_url, "prune", "--older-than", "1d", "--chat", beginning, "--yes"))["chats"] == "1"
    refused = run(database_url, "erase", "--chat", beginning, "--yes")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert f"there is no chat {beginning!r}" in refused.stderr


def test_chats_without_a_value_are_named_by_none(store, database_url):
    chats = [say(store, user_id=user_id) for user_id in ("u_1", None)]
    assert shown(run(database_url, "erase", "--where", "user_id=(none)", "--yes"))["chats"] == "1"
    assert [said(chat)[0] for chat in chats] == ["I am Ada.", None]


def test_a_column_of_the_application_is_emptied_where_it_is_named(store, database_url):
    chat = say(store, user_id="u_1")
    shown(run(database_url, "erase", "--where", "user_id=u_1", "--column", "user_id", "--yes"))
    assert chat.reload().record.user_id is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["erase", "--yes"], 2, "say which chats: --where user_id=u_1, or --chat ID"),
        (["erase", "--where", "user_id"], 2, "'user_id' is not NAME=VALUE"),
        (["erase", "--where", "=u_1"], 2, "'=u_1' is not NAME=VALUE"),
        (["erase", "--where", "user=u_1", "--yes"], 1, "erase() does not know 'user'"),
        (["erase", "--chat", "nonsense", "--yes"], 1, "there is no chat 'nonsense' in "),
        (["erase", "--where", "user_id=u_1", "--column", "model", "--yes"], 1, "not 'model'"),
        (["erase", "--where", "user_id=u_1"], 2, "nobody is there to be asked: give --yes, or --dry-run"),
        (["prune"], 2, "Missing option '--older-than'"),
        (["prune", "--older-than", "soon"], 2, "is no duration"),
        (["prune", "--older-than", "0d", "--yes"], 1, "more than 0"),
        (["prune", "--older-than", "1s"], 2, "nobody is there to be asked: give --yes, or --dry-run"),
    ],
)
def test_what_is_not_clear_is_refused_and_nothing_is_changed(store, database_url, arguments, code, complaint):
    chat = say(store, user_id="u_1")
    result = run(database_url, *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert complaint in result.stderr
    assert said(chat) == ["I am Ada.", "Hi, Ada."]


@pytest.mark.parametrize(("answer", "left"), [("n", ["I am Ada.", "Hi, Ada."]), ("y", [None, None])])
def test_a_person_at_a_terminal_is_asked_first(tmp_path, answer, left):
    url = f"sqlite:///{tmp_path}/chats.db"
    with connect(url) as store:
        store.create_tables()
        chat = say(store)
        ours, theirs = pty.openpty()
        os.write(ours, f"{answer}\n".encode())
        command = [*LLM_ORM, "erase", "--chat", str(chat.id), "--database-url", url]
        done = subprocess.run(command, stdin=theirs, capture_output=True, text=True)
        os.close(ours)
        os.close(theirs)
        question = (
            "Erase for good what was said (chats: 1, messages: 2, tool calls: 0, requests: 1, attachments: 0)? [y/N]"
        )
        assert question in done.stderr
        assert done.returncode == (0 if answer == "y" else 1)
        assert said(chat) == left


def test_busy_chats_are_listed_and_it_exits_with_1(store, database_url):
    release = threading.Event()
    busy = create_chat(store, model="test", llm=ScriptedLLM(Say("Done.", until=release)), user_id="u_1")
    other = say(store, user_id="u_1")
    thread = threading.Thread(target=busy.ask, args=("Hello?",))
    thread.start()
    while not busy.options.llm.requests:
        pass
    result = run(database_url, "erase", "--where", "user_id=u_1", "--yes", "--json")
    release.set()
    thread.join()
    assert result.exit_code == 1
    assert json.loads(result.stdout)["busy"] == [str(busy.id)]
    assert (said(other), said(busy)) == ([None, None], ["Hello?", "Done."])


def test_the_store_may_be_the_one_of_the_application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop_of_erase.py").write_text(
        "import peewee\nfrom llm_orm import connect\n"
        "fields = {'number': peewee.IntegerField(null=True, column_name='customer_no')}\n"
        "store = connect('sqlite:///shop.db', table_prefix='shop_', chat_fields=fields)\nstore.create_tables()\n"
    )
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    dry = runner.invoke(main, ["erase", "--store", "shop_of_erase:store", "--where", "number=7", "--dry-run"])
    assert shown(dry)["chats"] == "0"
    names = ["--database-url", "sqlite:///shop.db", "--table-prefix", "shop_"]
    assert shown(runner.invoke(main, ["erase", *names, "--where", "customer_no=7", "--dry-run"]))["chats"] == "0"
    assert runner.invoke(main, ["prune", *names, "--older-than", "1s", "--where", "nope=7", "--yes"]).exit_code == 1


# prune


@pytest.mark.parametrize(("options", "left"), [([], 1), (["--keep-requests"], 2)])
def test_old_chats_are_pruned(store, database_url, options, left):
    with freeze_time(datetime.now(UTC) - timedelta(days=91)):
        old = say(store, user_id="u_1")
    new = say(store, user_id="u_1")
    dry = shown(run(database_url, "prune", "--older-than", "90d", *options, "--dry-run"))
    assert len(old.messages()) == 2
    assert shown(run(database_url, "prune", "--older-than", "90d", *options, "--yes")) == dry
    assert (dry["chats"], dry["messages"], dry["requests"]) == ("1", "2", str(2 - left))
    assert load_chat(store, old.id) is None
    assert len(new.messages()) == 2
    with store.connection():
        assert store.records.request.select().count() == left


def test_only_some_old_chats_may_be_pruned(store, database_url):
    with freeze_time(datetime.now(UTC) - timedelta(days=2)):
        chats = [say(store, user_id=user) for user in ("u_1", "u_2")]
    arguments = ["--older-than", "36h", "--where", "user_id=u_2", "--yes", "--json"]
    found = json.loads(run(database_url, "prune", *arguments).stdout)
    assert (found["chats"], found["requests"]) == (1, 1)
    assert [load_chat(store, chat.id) is None for chat in chats] == [False, True]

"""`llm-orm export` and `llm-orm import`."""

import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llm_orm import Store, check, connect, create_chat, export_lines, load_chat
from llm_orm.testing import ProviderError, ScriptedLLM
from llm_orm_cli import main

LLM_ORM = [sys.executable, "-c", "from llm_orm_cli import main; main()"]


def run(url: str, *arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, [*arguments, "--database-url", url], input=stdin)


def shown(result: Result) -> dict[str, str]:
    return dict(line.split("\t") for line in result.stdout.splitlines())


def say(store: Store, **columns: Any) -> Any:
    chat = create_chat(store, model="test", llm=ScriptedLLM("Hi, Ada.", ProviderError(400)), **columns)
    chat.ask("I am Ada.")
    return chat


def test_what_is_exported_is_imported_into_another_database(store, database_url, tmp_path):
    say(store, user_id="u_1")
    say(store, user_id="u_2")
    path = tmp_path / "out.jsonl"
    done = run(database_url, "export", str(path), "--where", "user_id=u_1")
    assert (done.exit_code, shown(done)["chats"], shown(done)["messages"]) == (0, "1", "2")
    other = f"sqlite:///{tmp_path}/other.db"
    with connect(other, chat_fields={"user_id": store.records.chat.user_id.__class__(null=True)}) as target:
        target.create_tables()
        dry = run(other, "import", str(path), "--dry-run", "--json")
        assert target.records.chat.select().count() == 0
        came = run(other, "import", str(path), "--json")
        assert json.loads(dry.stdout) == json.loads(came.stdout)
        assert json.loads(came.stdout)["messages"] == 2
        assert list(export_lines(target))[1:] == path.read_text().splitlines(keepends=True)[1:]
        assert check(target) == []
    assert shown(run(other, "import", str(path))) | {"already_there": "1", "chats": "0"} == shown(
        run(other, "import", str(path))
    )


def test_standard_output_and_input_will_do(sqlite_store, sqlite_url):
    chat = say(sqlite_store)
    out = run(sqlite_url, "export", "-").stdout_bytes
    assert out.decode().splitlines()[1:] == "".join(export_lines(sqlite_store)).splitlines()[1:]
    load_chat(sqlite_store, chat.id).delete()
    came = run(sqlite_url, "import", "-", stdin=out)
    assert (came.exit_code, shown(came)["chats"]) == (0, "1")
    assert load_chat(sqlite_store, chat.id).stats().requests == 1


@pytest.mark.parametrize(
    ("name", "arguments", "begins"),
    [
        ("a.md", [], "# Chat "),
        ("a.csv", [], "id,chat_id,"),
        ("a.txt", ["--format", "openai"], '{"messages": '),
        ("a", [], '{"llm_orm": 1'),
    ],
)
def test_the_format_is_as_the_file_is_named_or_as_is_said(sqlite_store, sqlite_url, tmp_path, name, arguments, begins):
    say(sqlite_store)
    assert run(sqlite_url, "export", str(tmp_path / name), *arguments).exit_code == 0
    assert (tmp_path / name).read_text().startswith(begins)


def test_requests_of_a_chat_are_chosen_by_its_id(sqlite_store, sqlite_url, tmp_path):
    chat, _ = say(sqlite_store), say(sqlite_store)
    with pytest.raises(ProviderError):
        chat.ask("Again.")
    for number, arguments in enumerate((["--chat", str(chat.id)], ["--where", "status=400"], ["--since", "1h"])):
        path = tmp_path / f"{number}.csv"
        done = run(sqlite_url, "export", str(path), *arguments)
        assert shown(done)["requests"] == ["2", "1", "3"][number]
    done = run(sqlite_url, "export", str(tmp_path / "one.jsonl"), "--chat", str(chat.id)[:25])
    assert (shown(done)["chats"], shown(done)["requests"]) == ("1", "2")


def test_a_file_that_is_there_is_kept_without_force(sqlite_store, sqlite_url, tmp_path):
    say(sqlite_store)
    path = tmp_path / "out.jsonl"
    path.write_text("mine")
    refused = run(sqlite_url, "export", str(path))
    assert (refused.exit_code, path.read_text()) == (1, "mine")
    assert f"{str(path)!r} is there already: name another, or replace it with --force" in refused.stderr
    assert run(sqlite_url, "export", str(path), "--force").exit_code == 0
    assert path.read_text() != "mine"


def test_columns_that_are_missing_are_made_as_the_message_says(sqlite_store, sqlite_url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    say(sqlite_store, user_id="u_1")
    run(sqlite_url, "export", "out.jsonl")
    assert run("sqlite:///plain.db", "migrate").exit_code == 0
    refused = run("sqlite:///plain.db", "import", "out.jsonl")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "chat.user_id; " in refused.stderr
    assert "llm-orm migrate --store MODULE:NAME, then import with that --store" in refused.stderr
    (tmp_path / "shop_of_import.py").write_text(
        "import llm_orm, peewee\n"
        "store = llm_orm.connect('sqlite:///own.db', chat_fields={'user_id': peewee.TextField(null=True)})\n"
    )
    for command in ("migrate", "import out.jsonl"):
        done = CliRunner().invoke(main, [*command.split(), "--store", "shop_of_import:store"])
        assert done.exit_code == 0, done.output
    assert shown(done)["chats"] == "1"


def test_what_was_skipped_is_said_and_it_exits_with_1(sqlite_store, sqlite_url, tmp_path):
    hello = json.dumps({"messages": [{"role": "user", "content": "Hello."}]})
    path = tmp_path / "in.jsonl"
    path.write_text(hello + "\n" + '{"messages": "\x1b[31m"}\n' * 30)
    done = run(sqlite_url, "import", str(path))
    assert (done.exit_code, shown(done)["chats"], shown(done)["skipped"]) == (1, "1", "30")
    assert "skipped: line 2: it is not JSON" in done.stderr
    assert "\x1b" not in done.stderr
    assert "and 10 more; --json has the first 1000" in done.stderr
    assert json.loads(run(sqlite_url, "import", str(path), "--json").stdout)["skipped_in_all"] == 30


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["import", "nowhere.jsonl"], 1, "cannot read 'nowhere.jsonl'"),
        (["import", "x", "--source-table", "chat"], 2, "'chat' is not NAME=TABLE"),
        (["export"], 2, "Missing argument 'FILE'"),
        (["export", "x", "--where", "user=u_1"], 1, "export() does not know 'user'"),
        (["export", "x", "--format", "pdf"], 2, "'pdf' is not one of"),
    ],
)
def test_what_is_not_clear_is_refused(sqlite_store, sqlite_url, tmp_path, monkeypatch, arguments, code, complaint):
    monkeypatch.chdir(tmp_path)
    done = run(sqlite_url, *arguments)
    assert (done.exit_code, complaint in done.stderr, Path("x").exists()) == (code, True, False)


def test_a_bar_is_drawn_on_a_terminal(sqlite_store, sqlite_url, tmp_path):
    say(sqlite_store)
    ours, theirs = pty.openpty()
    drawn: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(ours, 4096):
                drawn.append(piece)
        except OSError:
            pass  # the other end was closed

    reader = threading.Thread(target=read)
    reader.start()
    command = [*LLM_ORM, "export", str(tmp_path / "out.jsonl"), "--database-url", sqlite_url]
    done = subprocess.run(command, stderr=theirs, capture_output=False, stdout=subprocess.PIPE, text=True)
    os.close(theirs)
    reader.join(10)
    os.close(ours)
    assert (done.returncode, "chats" in b"".join(drawn).decode()) == (0, True)
    assert "1/1" in b"".join(drawn).decode()

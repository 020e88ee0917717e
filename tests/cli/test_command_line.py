"""What every command has in common: what it imports, how it fails, where its output may go."""

import importlib.metadata
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import llm_orm
from llm_orm import Store, create_chat
from llm_orm.records import BASES
from llm_orm.testing import ScriptedLLM
from llm_orm_cli import main
from llm_orm_cli.options import TABLES

COMMANDS = (
    "budgets chats check dashboard demo erase export import init metrics migrate prune recover rotate show stats sync"
).split()
LLM_ORM = [sys.executable, "-c", "from llm_orm_cli import main; main()"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def modules_after(code: str) -> set[str]:
    """Those of the heavy modules that are loaded once the code has run in a new process."""
    heavy = ("litellm", "peewee", "psycopg2", "rich", "pydantic", "sqlite3")
    script = f"import sys\n{code}\nprint('', *[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.fixture
def url(tmp_path: Path) -> str:
    """The URL of a database in which one chat has asked one thing."""
    url = f"sqlite:///{tmp_path}/chats.db"
    with llm_orm.connect(url) as store:
        store.create_tables()
        create_chat(store, model="test", llm=ScriptedLLM("Hello!")).ask("Hi")
    return url


def test_help_imports_nothing_heavy() -> None:
    calls = "\n".join(
        f"main({[*command, '--help']}, standalone_mode=False)" for command in ([], *([name] for name in COMMANDS))
    )
    assert modules_after(f"from llm_orm_cli import main\n{calls}") == set()


def test_neither_llm_orm_nor_the_offline_demo_imports_litellm(tmp_path: Path) -> None:
    demo = f"main(['demo', '--database-url', 'sqlite:///{tmp_path}/demo.db'], standalone_mode=False)"
    assert "litellm" not in modules_after(f"import llm_orm\nfrom llm_orm_cli import main\n{demo}")


def test_help_lists_every_command_with_what_it_does() -> None:
    result = run("--help")
    lines = result.stdout.partition("Commands:")[2].strip().splitlines()
    assert result.exit_code == 0
    assert [line.split()[0] for line in lines] == COMMANDS
    assert all(len(line.split()) > 2 for line in lines)


def test_a_command_is_named_as_it_is_called() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="llm-orm")
    assert script.load() is main
    assert "Usage: llm-orm stats [OPTIONS] [CHAT_ID]" in run("stats", "--help").stdout


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout == f"llm-orm, version {importlib.metadata.version('llm-orm')}\n"


@pytest.mark.parametrize(
    "arguments",
    [["nope"], ["stats", "--nope"], ["stats", "a", "b"], ["stats", "--table-name", "chat"], ["demo", "--model"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert result.stdout == ""


def test_a_table_name_of_an_unknown_table_lists_the_known_ones() -> None:
    result = run("stats", "--table-name", "chats=my_chats")
    assert result.exit_code == 2
    assert f"'chats=my_chats' is not NAME=TABLE, with a NAME of {', '.join(BASES)}" in result.stderr
    assert tuple(BASES) == TABLES


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("mysql://me:secret@host/db", "names no database"),
        ("postgresql://me:secret@localhost:1/db", "did not answer"),
        ("postgresql://me:secret@[host/db", "cannot be opened"),
        ("postgresql://me:secret@localhost/db?no=1", "cannot be opened"),
        ("postgresql://me:sec@ret@localhost/db", "the password has a character"),
        ("sqlite:///no/such/folder.db", "there is no folder"),
        ("sqlite:///:memory:", "no such table"),
    ],
)
def test_an_error_is_one_line_without_the_password(url: str, complaint: str) -> None:
    result = run("stats", "--database-url", url)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert complaint in result.stderr
    assert "secret" not in result.stderr
    assert "sec@ret" not in result.stderr


def test_a_file_that_is_no_database_is_an_error_of_one_line(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("Not a database at all. " * 100)
    result = run("stats", "--database-url", f"sqlite:///{notes}")
    assert result.exit_code == 1
    assert result.stderr == f"Error: sqlite:///{notes} cannot be opened: file is not a database\n"


def test_a_bug_is_not_mistaken_for_an_error_of_the_user(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(Store, "connection", None)
    result = run("stats", "--database-url", url)
    assert isinstance(result.exception, TypeError)


def test_a_reader_that_left_is_met_with_silence(url: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*LLM_ORM, "stats", "--database-url", url], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 1


def test_a_table_is_drawn_on_a_terminal_only(url: str) -> None:
    command = [*LLM_ORM, "stats", "--database-url", url]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    subprocess.run(command, stdout=theirs, check=True, env=environment)
    os.close(theirs)
    drawn = os.read(ours, 10_000).decode()
    os.close(ours)
    piped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r" requests +1 \r\n", drawn)
    assert "\nrequests\t1\n" in piped
    assert " " not in piped


def test_a_stream_that_cannot_show_a_character_shows_another() -> None:
    script = "from llm_orm_cli import main; main(['demo', '--help'], standalone_mode=False); print('\\N{SNOWMAN}')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, env=environment)
    assert done.stdout.endswith(b"?\n")


def test_json_can_be_read_by_a_program(url: str) -> None:
    assert json.loads(run("stats", "--json", "--database-url", url).stdout)["requests"] == 1

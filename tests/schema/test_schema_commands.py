"""`llm-orm init`, `migrate` and `sync`: what they print, and how they exit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click.testing
import peewee as pw
import pytest

from llm_orm import connect
from llm_orm_cli import main
from llm_orm_schema.compare import differences
from llm_orm_schema.ddl import script
from llm_orm_schema.migrate import MIGRATIONS, pending

ALL = sorted({path.name.partition(".")[0] for path in MIGRATIONS.iterdir()})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command is called in."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, arguments, prog_name="llm-orm")


def lines(result: click.testing.Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


# init


def test_init_writes_the_sql_to_a_file(folder: Path):
    assert lines(run("init", "--dialect", "postgresql")) == ["wrote llm_orm_schema.sql"]

    assert (folder / "llm_orm_schema.sql").read_text() == script("postgresql")


def test_init_takes_names_and_a_place(folder: Path):
    run("init", "--table-prefix", "app_", "--table-name", "chat=assistant_chat", "--output", "schema.sql")

    assert (folder / "schema.sql").read_text() == script("sqlite", "app_", {"chat": "assistant_chat"})


@pytest.mark.parametrize("variable", ["LLM_ORM_DATABASE_URL", "DATABASE_URL"])
def test_init_speaks_the_dialect_of_the_database_that_is_set(variable: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, "postgresql://host/name")

    assert run("init", "--stdout").stdout == script("postgresql")


def test_init_prints_nothing_but_sql_to_stdout(folder: Path):
    result = run("init", "--stdout", "--models", "models.py")

    assert result.stdout == script("sqlite")
    assert result.stderr == "wrote models.py\n"


def test_init_does_not_overwrite_unless_forced(folder: Path):
    (folder / "llm_orm_schema.sql").write_text("mine")

    refused = run("init", "--models", "models.py", "--output", "llm_orm_schema.sql")

    assert refused.exit_code == 1
    assert refused.stderr == "Error: llm_orm_schema.sql is there already: --force overwrites it\n"
    assert [path.name for path in folder.iterdir()] == ["llm_orm_schema.sql"]
    assert lines(run("init", "--force")) == ["wrote llm_orm_schema.sql"]
    assert (folder / "llm_orm_schema.sql").read_text() == script("sqlite")


def test_init_writes_models_without_sql(folder: Path):
    assert lines(run("init", "--models", "models.py", "--table-prefix", "app_")) == ["wrote models.py"]

    assert [path.name for path in folder.iterdir()] == ["models.py"]
    assert 'table_name = "app_llm_chat"' in (folder / "models.py").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--dialect", "mysql"], 2, "'mysql' is not one of"),
        (["--stdout", "--output", "x.sql"], 2, "--output or --stdout"),
        (["--table-name", "assistant_chat"], 2, "is not NAME=TABLE"),
        (["--table-name", "chat=two words"], 1, "'two words' cannot be the name"),
        (["--output", "no/such/folder.sql"], 1, "no/such/folder.sql cannot be written: No such file"),
    ],
)
def test_init_says_what_was_wrong(arguments: list[str], code: int, message: str):
    result = run("init", *arguments)

    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr


# migrate


def test_migrate_creates_the_tables_and_says_when_there_is_nothing_to_do(database_url: str):
    assert lines(run("migrate", "--database-url", database_url)) == [f"applied {name}" for name in ALL]

    again = run("migrate", "--database-url", database_url)
    assert lines(again)[0].startswith("nothing to apply to <Store ")
    assert again.stderr == ""
    with connect(database_url) as store:
        assert differences(store) == []


def test_migrate_lists_what_is_applied_and_pending(database_url: str):
    with connect(database_url) as store, store.connection():
        pass  # SQLite needs a file to look into
    options = ["--database-url", database_url, "--table-prefix", "app_"]

    assert lines(run("migrate", "--list", *options))[1:] == [f"{name}\tpending\t" for name in ALL]
    run("migrate", *options)
    listed = json.loads(run("migrate", "--list", "--json", *options).stdout)
    assert [(row["migration"], row["state"]) for row in listed] == [(name, "applied") for name in ALL]


def test_migrate_prints_the_sql_and_changes_nothing(database_url: str):
    with connect(database_url) as store:
        with store.connection():
            pass  # SQLite needs a file to look into
        printed = run("migrate", "--sql", "--database-url", database_url)

        assert 'CREATE TABLE "llm_chat"' in printed.stdout
        assert f"-- {ALL[0]}\nBEGIN;" in printed.stdout
        assert pending(store) == ALL


def test_migrate_prints_json(sqlite_url: str):
    assert json.loads(run("migrate", "--json", "--database-url", sqlite_url).stdout) == ALL
    assert json.loads(run("migrate", "--json", "--database-url", sqlite_url).stdout) == []


def test_migrate_points_at_what_it_cannot_mend(sqlite_url: str):
    run("migrate", "--database-url", sqlite_url)
    with connect(sqlite_url) as store, store.connection():
        store.database.execute_sql("DROP INDEX llm_message_one_pending")

    result = run("migrate", "--database-url", sqlite_url)

    assert (result.exit_code, result.stderr) == (0, '1 difference left: see "llm-orm sync"\n')


def test_migrate_adds_the_columns_of_the_application_s_store(folder: Path, database_url: str):
    (folder / "shop_database.py").write_text(
        "from llm_orm import connect\n"
        "from peewee import TextField\n"
        f"def store(): return connect({database_url!r}, chat_fields={{'shop': TextField(null=True, index=True)}})\n"
    )
    try:
        done = lines(run("migrate", "--store", "shop_database:store"))
        checked = lines(run("sync", "--store", "shop_database:store"))
    finally:
        sys.modules.pop("shop_database", None)

    assert done == [*(f"applied {name}" for name in ALL), "applied index llm_chat_shop"]
    assert checked[0].endswith("is in sync with the records")
    with connect(database_url, chat_fields={"shop": pw.TextField(null=True, index=True)}) as store:
        assert differences(store) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--sql", "--list"], 2, "--sql goes with neither"),
        (["--store", "shop"], 2, "'shop' is not MODULE:NAME"),
        (["--store", "no_such_shop:store"], 1, "--store no_such_shop:store: ModuleNotFoundError: No module named"),
        (["--store", "json:nothing"], 1, "has no attribute 'nothing'"),
        (["--store", "sys:path"], 1, "is not a Store"),
        (["--store", "sys:path", "--database-url", "sqlite:///x.db"], 2, "--store says which database"),
        (["--database-url", "mysql://host/name"], 1, "names no database"),
        (["--database-url", "postgresql://user:hush@localhost:1/name"], 1, "did not answer"),
    ],
)
def test_migrate_says_what_was_wrong(folder: Path, arguments: list[str], code: int, message: str):
    result = run("migrate", *arguments)

    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert "hush" not in result.stderr
    assert code == 2 or result.stderr.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_migrate_refuses_tables_that_are_not_whole_in_one_line(sqlite_url: str):
    with connect(sqlite_url) as store, store.connection():
        store.database.create_tables([store.records.chat])

    result = run("migrate", "--database-url", sqlite_url)

    assert (result.exit_code, result.stdout) == (1, "")
    assert "table llm_message is missing" in result.stderr
    assert result.stderr.count("\n") == 1


# sync


def test_sync_says_that_all_is_well(database_url: str):
    run("migrate", "--database-url", database_url)

    (line,) = lines(run("sync", "--database-url", database_url))

    assert line.endswith("is in sync with the records")
    assert run("sync", "--json", "--database-url", database_url).stdout == "[]\n"


def test_sync_names_what_is_missing_and_exits_with_1(database_url: str):
    run("migrate", "--database-url", database_url)
    with connect(database_url) as store, store.connection():
        store.database.execute_sql("DROP INDEX llm_message_one_pending")
        store.database.execute_sql("DROP TABLE llm_attachment")

    result = run("sync", "--database-url", database_url)

    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout.splitlines() == [
        "index llm_message_one_pending on llm_message UNIQUE (chat_id) WHERE status = 'pending' is missing"
        if database_url.startswith("sqlite")
        else "index llm_message_one_pending on llm_message UNIQUE (chat_id) WHERE status = 'pending'::text is missing",
        "table llm_attachment is missing",
    ]


def test_sync_prints_json(sqlite_url: str):
    with connect(sqlite_url) as store, store.connection():
        store.database.create_tables([store.records.chat])

    result = run("sync", "--json", "--database-url", sqlite_url)

    assert result.exit_code == 1
    assert json.loads(result.stdout)[0] == {
        "kind": "missing table",
        "table": "llm_message",
        "name": "llm_message",
        "message": "table llm_message is missing",
    }


def test_sync_makes_no_file(folder: Path):
    result = run("sync")

    assert (result.exit_code, result.stdout) == (1, "")
    assert "there is no database file 'llm_orm.db'" in result.stderr
    assert list(folder.iterdir()) == []


# As processes


COMMAND = [sys.executable, "-c", "from llm_orm_cli import main; main(prog_name='llm-orm')"]


def test_two_processes_migrate_at_once(database_url: str):
    environment = {**os.environ, "LLM_ORM_DATABASE_URL": database_url, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen([*COMMAND, "migrate"], stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)
    ]
    printed = [process.communicate()[0] for process in running]

    assert [process.returncode for process in running] == [0, 0]
    # They may take turns: each migration is a step of its own.
    done = [line for text in printed for line in text.splitlines() if line.startswith("applied")]
    assert sorted(done) == [f"applied {name}" for name in ALL]


@pytest.mark.parametrize("command", ["init", "migrate", "sync"])
def test_help_imports_nothing_heavy(command: str):
    code = (
        "import sys; from llm_orm_cli import main\n"
        f"try: main(['{command}', '--help'], prog_name='llm-orm')\n"
        "finally: print(sorted({'litellm', 'peewee', 'psycopg2', 'llm_orm'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)

    assert f"Usage: llm-orm {command}" in printed.stdout
    assert printed.stdout.endswith("[]\n")


def test_a_store_function_that_fails_is_an_error_of_one_line(folder: Path):
    result = run("migrate", "--store", "json:dumps")

    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "--store json:dumps: TypeError: dumps() missing" in result.stderr


def test_a_first_migration_can_be_looked_at_before_there_is_a_database(folder: Path):
    listed = run("migrate", "--list")
    printed = run("migrate", "--sql")

    assert (listed.exit_code, printed.exit_code) == (0, 0)
    assert "pending" in listed.stdout
    assert "CREATE TABLE" in printed.stdout

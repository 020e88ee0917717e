"""The SQL and the models that are made from the records."""

import runpy
from pathlib import Path

import peewee as pw
import pytest

from llm_orm import InvalidValue, LlmMessage, Store, UnknownKeyword, connect, create_chat
from llm_orm.testing import ScriptedLLM
from llm_orm_schema.catalog import read_tables
from llm_orm_schema.compare import differences
from llm_orm_schema.ddl import ddl, dialect_of, generated_files, table_names_of
from llm_orm_schema.migrate import migrate
from llm_orm_schema.models import models_source


@pytest.mark.parametrize("path", generated_files(), ids=lambda path: path.name)
def test_the_sql_files_are_what_the_records_say(path: Path):
    assert path.read_text() == generated_files()[path], "the records changed: run python -m llm_orm_schema.ddl"


def test_the_sql_creates_what_create_tables_creates(store: Store):
    names = table_names_of(store.records).values()
    with store.connection():
        created = read_tables(store.database, names)
        store.drop_tables()
        for statement in ddl(dialect_of(store.database), chat_fields={"user_id": pw.TextField(null=True, index=True)}):
            store.database.execute_sql(statement)

        assert read_tables(store.database, names) == created


def test_the_sql_takes_the_names_of_the_application():
    sql = "\n".join(ddl("postgresql", "app_", {"chat": "assistant_chat"}))

    assert 'CREATE TABLE "assistant_chat"' in sql
    assert 'CREATE UNIQUE INDEX "app_llm_message_one_pending" ON "app_llm_message"' in sql
    assert 'REFERENCES "assistant_chat" ("id") ON DELETE CASCADE' in sql
    assert '"llm_' not in sql


def test_a_table_that_is_not_ours_cannot_be_named():
    with pytest.raises(UnknownKeyword, match="conversation"):
        ddl("sqlite", table_names={"conversation": "c"})


def test_the_models_can_be_given_columns_and_used(database_url: str, tmp_path: Path):
    place = '        table_name = "app_llm_{}"\n'
    source = "import peewee as pw\n" + models_source("app_")
    columns = {
        "chat": "user_id = pw.TextField(index=True)",
        "message": "stars = pw.IntegerField(constraints=[pw.SQL('DEFAULT 5')])",
    }
    for name, column in columns.items():
        source = source.replace(place.format(name), f"{place.format(name)}\n    {column}\n")
    (tmp_path / "models.py").write_text(source)
    models = runpy.run_path(str(tmp_path / "models.py"))["MODELS"]

    with connect(database_url, models=models, llm=ScriptedLLM("Hello!")) as store:
        migrate(store)
        chat = create_chat(store, model="test", user_id="u_1")
        chat.ask("Hi")

        assert differences(store) == []
        with store.connection():
            assert [row.user_id for row in store.records.chat.select()] == ["u_1"]
            assert {(row.content, row.stars) for row in store.records.message.select()} == {("Hi", 5), ("Hello!", 5)}


def test_a_column_that_a_turn_has_no_value_for_is_refused():
    class Message(LlmMessage):
        stars = pw.IntegerField(default=5)

    with pytest.raises(InvalidValue, match=r"Message\.stars must be null=True"):
        connect("sqlite:///:memory:", models=[Message])

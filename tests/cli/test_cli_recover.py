"""`llm-orm recover`."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner, Result
from conftest import rows

from llm_orm import Store, check, connect, create_chat
from llm_orm.testing import ScriptedLLM
from llm_orm_cli import main
from llm_orm_cli import output as printing

COLUMNS = ["chat_id", "message_id", "silent_s", "text", "outcome"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["recover", *arguments])


def shown(result: Result) -> list[dict[str, str]]:
    assert result.exit_code == 0, result.output
    names, *lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert names == COLUMNS
    return [dict(zip(names, line, strict=True)) for line in lines]


def a_dead_turn(store: Store, minutes: float = 20, **values: Any) -> UUID:
    """A chat whose second turn gave its last sign of life so long ago; its id."""
    chat = create_chat(store, model="test", llm=ScriptedLLM("Hello!"))
    chat.ask("Hi")
    seen = datetime.now(UTC) - timedelta(minutes=minutes)
    pending = {"role": "assistant", "status": "pending", "model_id": "test", "provider": "scripted"}
    with store.connection():
        create = store.records.message.create
        create(chat=chat.id, position=2, role="user", content="And now?", created_at=seen)
        create(chat=chat.id, position=3, created_at=seen, updated_at=seen, **(pending | values))
    return chat.id


def test_a_turn_that_said_nothing_is_removed_and_its_question_stays(store: Store, database_url: str) -> None:
    chat_id = a_dead_turn(store)
    (turn,) = shown(run("--database-url", database_url))
    assert UUID(turn["chat_id"]) == chat_id
    assert 1200 <= int(turn["silent_s"]) < 1300
    assert (turn["outcome"], turn["text"]) == ("removed", "")
    assert rows(store, "message", "content", "status")[2:] == [("And now?", "completed")]
    assert check(store) == []


def test_a_reply_that_was_there_whole_is_completed(store: Store, database_url: str) -> None:
    a_dead_turn(store, content="I was done.")
    (turn,) = shown(run("--database-url", database_url))
    assert (turn["outcome"], turn["text"]) == ("completed", "I was done.")
    assert rows(store, "message", "content", "status")[3:] == [("I was done.", "completed")]


def test_a_dry_run_shows_the_turns_and_changes_nothing(store: Store, database_url: str) -> None:
    chat_id = a_dead_turn(store, content="I was done.")
    before = rows(store, "message", "id", "status", "updated_at")
    (turn,) = shown(run("--dry-run", "--database-url", database_url))
    assert (UUID(turn["chat_id"]), turn["outcome"]) == (chat_id, "")
    assert rows(store, "message", "id", "status", "updated_at") == before


def test_turns_that_are_younger_than_was_said_are_left_alone(store: Store, database_url: str) -> None:
    a_dead_turn(store, minutes=5)
    result = run("--database-url", database_url)
    assert (result.exit_code, result.stdout) == (0, "nothing to recover: no turn has been silent for 900 s\n")
    assert run("--older-than", "6m", "--database-url", database_url).stdout.startswith("nothing to recover")
    assert len(shown(run("--older-than", "4m", "--database-url", database_url))) == 1


def test_turns_of_other_chats_are_left_alone(store: Store, database_url: str) -> None:
    first, second = a_dead_turn(store), a_dead_turn(store)
    assert [
        UUID(turn["chat_id"]) for turn in shown(run("--chat", str(first)[:25], "--database-url", database_url))
    ] == [first]
    assert [UUID(turn["chat_id"]) for turn in shown(run("--database-url", database_url))] == [second]


def test_json_has_all_that_it_had_said(store: Store, database_url: str) -> None:
    said = "I was done. " * 20
    a_dead_turn(store, content=said)
    (turn,) = json.loads(run("--json", "--dry-run", "--database-url", database_url).stdout)
    assert list(turn) == COLUMNS
    assert (turn["text"], turn["outcome"]) == (said, None)
    assert turn["silent_s"] >= 1200
    (cut,) = shown(run("--dry-run", "--database-url", database_url))
    assert cut["text"] == said[:59] + "…"
    run("--database-url", database_url)
    assert json.loads(run("--json", "--database-url", database_url).stdout) == []


def test_a_terminal_gets_a_table(store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a_dead_turn(store)
    monkeypatch.setattr(printing, "is_terminal", lambda: True)
    result = run("--database-url", database_url)
    assert result.exit_code == 0
    assert "───" in result.stdout


@pytest.mark.parametrize("duration", ["soon", "-5", "5 weeks"])
def test_what_is_no_duration_is_a_wrong_call(duration: str) -> None:
    result = run("--older-than", duration)
    assert result.exit_code == 2
    assert "is no duration" in result.stderr


def test_turns_that_may_be_alive_are_no_turns_to_end(store: Store, database_url: str) -> None:
    result = run("--older-than", "5s", "--database-url", database_url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Invalid value for --older-than: older_than=5.0" in result.stderr


def test_a_chat_that_is_not_there_is_an_error_that_names_it(store: Store, database_url: str) -> None:
    a_dead_turn(store)
    result = run("--chat", "nonsense", "--database-url", database_url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "there is no chat 'nonsense' in " in result.stderr


def test_missing_tables_are_an_error_that_says_what_to_run(database_url: str) -> None:
    with connect(database_url) as store, store.connection():
        pass
    result = run("--database-url", database_url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert 'run "llm-orm migrate"' in result.stderr

"""`llm-orm demo`: the story it tells is the one that the rows tell."""

import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner, Result
from provider import Answer, Call, Provider

from llm_orm import Chat, connect, load_chat
from llm_orm_cli import main

# litellm's own, on import-time models and at the end of a stream.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*using the `ReadOnly` qualifier:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the 'model_.*fields' attribute:DeprecationWarning"),
]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["demo", *arguments])


def stored_chat(result: Result, url: str) -> Chat:
    chat_id = re.search(r"Chat: +(\S+)", result.stdout)
    chat = load_chat(connect(url), chat_id and chat_id[1])
    assert chat is not None
    return chat


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch, real_litellm: None) -> Iterator[Provider]:
    """What gpt-4o is in this test."""
    with Provider() as provider:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        monkeypatch.setenv("OPENAI_API_BASE", f"{provider.url}/v1")
        yield provider


def test_the_demo_runs_offline_and_says_where_its_rows_are(temporary_folder: Path) -> None:
    result = run()
    (file,) = temporary_folder.glob("llm-orm-demo-*/demo.db")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert f"Database: sqlite:///{file}\n" in result.stdout
    assert result.stdout.endswith(f"--database-url sqlite:///{file}\n")


def test_its_rows_are_those_of_four_turns_the_last_rolled_back(database_url: str) -> None:
    result = run("--database-url", database_url)
    chat = stored_chat(result, database_url)
    assert [(message.role, message.status) for message in chat.messages()] == [
        ("user", "completed"),
        ("assistant", "completed"),
        ("user", "completed"),
        ("assistant", "completed"),
        ("user", "completed"),
        ("assistant", "completed"),
        ("user", "completed"),
    ]
    requests = chat.requests()
    assert [(request.status_code, request.error, request.streamed) for request in requests] == [
        (200, None, False),
        (200, None, True),
        (200, None, False),
        (200, None, False),
        (503, "ProviderError", False),
    ]
    assert [(call.name, call.status) for call in chat.tool_calls()] == [("get_weather", "completed")]
    assert all(request.cost for request in requests[:4])


def test_each_step_says_what_happened_in_the_database(database_url: str) -> None:
    result = run("--database-url", database_url)
    told = " ".join(result.stdout.split())
    chat = stored_chat(result, database_url)
    steps = ["1. A plain turn", "2. A streamed turn", "3. A turn with a tool", "4. A turn that fails"]
    places = [told.index(step) for step in [*steps, "What is in the database now"]]
    assert places == sorted(places)
    first = chat.requests()[0]
    assert f"({first.input_tokens} tokens in, {first.output_tokens} out, {first.duration_ms} ms, $0.000085)" in told
    assert 'there already, with the status "pending"; now it says "completed"' in told
    assert 'Model: (calls get_weather with {"city": "Paris"})' in told
    assert 'Tool: {"city":"Paris","sky":"clear","celsius":21} Model: The sky over Paris is clear, at 21' in told
    assert "ProviderError: the provider is overloaded" in told


def test_it_shows_every_row_and_the_sums(database_url: str) -> None:
    result = run("--database-url", database_url)
    chat = stored_chat(result, database_url)
    shown = result.stdout.partition("What is in the database now")[2].splitlines()
    for message in chat.messages():
        assert any(line.startswith(f"{message.position}\t{message.role}\t{message.content}\t") for line in shown)
    for request in chat.requests():
        assert any(line.startswith(f"{request.status_code}\t") and line.endswith(f"\t{request.cost}") for line in shown)
    for name, value in chat.stats().as_dict().items():
        assert f"{name}\t{value}" in shown


def test_a_second_demo_is_a_second_chat_of_the_database(database_url: str) -> None:
    first, second = (stored_chat(run("--database-url", database_url), database_url) for _ in range(2))
    assert first.id != second.id
    assert len(first.messages()) == len(second.messages()) == 7


def test_the_database_of_the_environment_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_ORM_DATABASE_URL", f"sqlite:///{tmp_path}/mine.db")
    assert run().exit_code == 0
    assert not (tmp_path / "mine.db").exists()


def test_the_password_of_a_database_is_not_printed(postgres_url: str) -> None:
    password = urlsplit(postgres_url).password
    url = postgres_url if password else f"{postgres_url}&password=secret"
    result = run("--database-url", url)
    assert result.exit_code == 0
    assert "Database: postgresql://" in result.stdout
    assert (password or "secret") not in result.output


def test_a_real_provider_answers_the_first_three_turns(sqlite_url: str, provider: Provider) -> None:
    provider.reply("Paris.", "Once upon a time.", Answer(tool_calls=[Call("get_weather", {"city": "Paris"})]), "Fine.")
    result = run("--model", "gpt-4o", "--database-url", sqlite_url)
    chat = stored_chat(result, sqlite_url)
    assert result.exit_code == 0
    replies = ["Paris.", "Once upon a time.", "Fine."]
    assert [message.content for message in chat.messages() if message.role == "assistant"] == replies
    assert all(f"Model: {reply}" in result.stdout for reply in replies)
    assert [(request.status_code, request.provider) for request in chat.requests()] == [(200, "openai")] * 4
    assert "A turn that fails" not in result.stdout


def test_a_model_that_needs_no_tool_is_told_of(sqlite_url: str, provider: Provider) -> None:
    provider.otherwise = Answer("I do not know.")
    result = run("--model", "gpt-4o", "--database-url", sqlite_url)
    assert result.exit_code == 0
    assert "chose to answer without the tool" in result.stdout


def test_a_provider_that_refuses_is_an_error_of_one_line(sqlite_url: str, provider: Provider) -> None:
    provider.reply("Paris.")
    provider.fail(401, "that key is wrong")
    result = run("--model", "gpt-4o", "--database-url", sqlite_url)
    chat = stored_chat(result, sqlite_url)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "AuthenticationError" in result.stderr
    assert "that key is wrong" in result.stderr
    assert "litellm.turn_on_debug" not in result.stdout
    assert "sk-secret" not in result.output
    assert [message.role for message in chat.messages()] == ["user", "assistant", "user"]
    assert [request.status_code for request in chat.requests()] == [200, 401]


def test_an_unknown_model_is_an_error_of_one_line(sqlite_url: str, real_litellm: None) -> None:
    result = run("--model", "nonsense", "--database-url", sqlite_url)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no provider is known for the model 'nonsense'")
    assert result.stderr.count("\n") == 1


def test_ctrl_c_ends_the_turn_in_good_order(sqlite_url: str, provider: Provider) -> None:
    provider.hang()

    def interrupt() -> None:
        provider.wait_until(lambda: bool(provider.requests))
        os.kill(os.getpid(), signal.SIGINT)

    waiting = threading.Thread(target=interrupt)
    waiting.start()
    result = run("--model", "gpt-4o", "--database-url", sqlite_url)
    waiting.join()
    chat = stored_chat(result, sqlite_url)
    assert result.exit_code == 1
    assert result.stderr.split() == ["Aborted!"]
    assert [message.role for message in chat.messages()] == ["user"]
    assert [request.status_code for request in chat.requests()] == [499]

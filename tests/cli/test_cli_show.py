"""`llm-orm show`."""

import json
import re
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner, Result
from cryptography.fernet import Fernet
from terminal import on_a_terminal

from llm_orm import Chat, Retries, Store, ToolError, connect, create_chat
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM
from llm_orm_cli import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["show", *arguments])


def shown(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def look_up(order: str) -> str:
    return f"{order}: shipped\n" * 20


def refuse() -> str:
    raise ToolError("not today", fatal=True)


def talk(store: Store) -> Chat:
    """A turn with a retry, a tool and thinking, and a turn that was rolled back."""
    llm = ScriptedLLM(
        ProviderError(503, "overloaded"),
        Say(
            "I look.",
            thinking="An order.\nWhat of it?",
            calls=[Call("look_up", order="A1")],
            cost="0.5",
            input_tokens=1000,
            output_tokens=5,
        ),
        Say("It was shipped.", thinking="Good news.", cost="0.25", input_tokens=10, output_tokens=5),
        Say(calls=[Call("refuse")], input_tokens=50, output_tokens=2),
    )
    tools = [look_up, refuse]
    chat = create_chat(store, model="test", llm=llm, tools=tools, user_id="u_1", retries=Retries(1, first_wait_s=0))
    chat.add_message("system", "Be brief.")
    chat.ask("Where is it?", files=[("order.txt", b"A1")])
    with pytest.raises(ToolError):
        chat.ask("Cancel it")
    return chat


def without_times(text: str) -> list[str]:
    """Lines less what no two runs have in common."""
    text = re.sub(
        r"( · )?\b(20\d\d-\S+ \S+|[\d.]+ m?s\b)( · )?", lambda found: " · " if found[1] and found[3] else "", text
    )
    return [line for line in text.splitlines() if line and not line.startswith(("chat ", "  created", "  updated"))]


def test_a_transcript_tells_what_was_said_done_and_spent(store: Store, database_url: str) -> None:
    chat = talk(store)
    text = shown(str(chat.id), "--database-url", database_url)
    assert text.startswith(f"chat {chat.id}\n  model: test\n  user_id: u_1\n")
    assert without_times(text)[2:] == [
        "── completed",
        "system",
        "  Be brief.",
        "── turn 1 · completed",
        "user",
        "  Where is it?",
        "  [order.txt: text/plain, 2 bytes]",
        "  test (scripted) · ProviderError 503 · 0 → 0 tokens · $0",
        "    overloaded",
        "  test (scripted) · attempt 2 · 1,000 → 5 tokens · $0.5",
        "    thinking: An order.",
        "              What of it?",
        "    I look.",
        "    tool: look_up",
        '      → {"order": "A1"}',
        "      ← A1: shipped",
        *["      A1: shipped"] * 5,
        "      … 169 more characters: --full shows them",
        "  test (scripted) · 10 → 5 tokens · $0.25",
        "assistant",
        "  thinking: Good news.",
        "  It was shipped.",
        "  $0.75 · 1,020 tokens",
        "── turn 2 · rolled back",
        "user",
        "  Cancel it",
        "  test (scripted) · 50 → 2 tokens · no price",
        "    tool: refuse · failed",
        "      → {}",
        "      ← Error executing tool 'refuse': not today",
        "      error: ToolError: not today",
        "  $0 · 1 without a price · 52 tokens",
        "total: 4 requests, 2 tool calls · $0.75 · 1 without a price · 1,072 tokens",
    ]


def test_all_of_a_result_is_shown_where_it_is_wanted(store: Store, database_url: str) -> None:
    chat = talk(store)
    text = shown(str(chat.id), "--full", "--database-url", database_url)
    assert text.count("A1: shipped") == 20
    assert "--full" not in text


def test_the_last_turns_are_numbered_as_in_the_whole(store: Store, database_url: str) -> None:
    text = shown(str(talk(store).id), "--last", "1", "--database-url", database_url)
    assert "… 1 earlier turn\n" in text
    assert "── turn 2 · " in text
    assert "Where is it?" not in text
    assert "total: 4 requests" in text


def test_json_is_the_chronicle(store: Store, database_url: str) -> None:
    chat = talk(store)
    found = json.loads(shown(str(chat.id), "--json", "--database-url", database_url))
    assert (found["id"], found["columns"], found["stats"]["cost"]) == (str(chat.id), {"user_id": "u_1"}, "0.75")
    assert [turn["status"] for turn in found["turns"]] == ["completed", "completed", "rolled_back"]


HOSTILE = "\x1b[2J\x1b]0;gone\x07\x9b1m\r[red]no[/red] :skull: \u202e\x00"[:-1]


def hostile(store: Store) -> Chat:
    """A chat that has what steers a terminal wherever a text can be."""

    def echo(text: str) -> str:
        return text

    llm = ScriptedLLM(
        Say(HOSTILE, thinking=HOSTILE, calls=[Call("echo", text=HOSTILE)]),
        Say(HOSTILE, thinking=HOSTILE),
        ProviderError(400, HOSTILE),
    )
    own = {"user_id": HOSTILE, "instructions": HOSTILE, "metadata": {HOSTILE: HOSTILE}}
    chat = create_chat(store, model="test", llm=llm, tools=[echo], **own)
    chat.ask(HOSTILE, files=[(f"{HOSTILE}.txt", b"1")])
    with pytest.raises(ProviderError):
        chat.ask("Again")
    return chat


def test_nothing_that_was_said_can_steer_the_terminal(store: Store, database_url: str) -> None:
    chat = hostile(store)
    for text in (
        shown(str(chat.id), "--database-url", database_url),
        on_a_terminal("show", str(chat.id), "--database-url", database_url, columns=200),
    ):
        assert not set(text) & {"\x1b", "\x07", "\x9b", "\r", "\u202e"}
        assert text.count("[red]no[/red] :skull:") >= 8
        assert "\\x1b[2J" in text
        assert "\\u202e" in text


def test_a_terminal_shows_the_same_as_a_pipe(store: Store, database_url: str) -> None:
    arguments = (str(talk(store).id), "--database-url", database_url)
    drawn = on_a_terminal("show", *arguments, columns=200)
    assert [line.rstrip() for line in drawn.splitlines()] == shown(*arguments).splitlines()
    narrow = on_a_terminal("show", *arguments, columns=40)
    assert max(map(len, narrow.splitlines())) <= 40


def test_an_erased_chat_says_that_nothing_is_stored(store: Store, database_url: str) -> None:
    chat = talk(store)
    chat.erase()
    text = shown(str(chat.id), "--database-url", database_url)
    assert "(nothing is stored of what was said)" in text
    assert "total: 4 requests, 2 tool calls · $0.75 " in text


def test_calls_without_a_turn_are_shown_behind_the_turns(store: Store, database_url: str) -> None:
    chat = talk(store)
    message: Any = store.records.message
    with store.connection():
        message.delete().where(message.position > 0).execute()
    text = shown(str(chat.id), "--database-url", database_url)
    assert "\ncalls of turns that are not there any longer\n" in text
    assert "    tool: look_up" in text


def test_the_beginning_of_an_id_will_do_where_no_other_has_it(store: Store, database_url: str) -> None:
    ids = [UUID("01a1f8c8-18bf-7346-8b7e-b94b1b67b901"), UUID("01a1f8c8-18bf-7346-8b7e-ffffffffffff")]
    chat: Any = store.records.chat
    with store.connection():
        for key in ids:
            chat.insert(id=key, model="test").execute()
    for beginning in ("01a1f8c8-18bf-7346-8b7e-b", "01A1F8C818BF73468B7Eb9", str(ids[0]), ids[0].hex):
        assert shown(beginning, "--database-url", database_url).startswith(f"chat {ids[0]}\n")
    assert shown("01a1f8c8-18bf-7346-8b7e-f", "--database-url", database_url).startswith(f"chat {ids[1]}\n")
    result = run("01a1f8", "--database-url", database_url)
    assert result.exit_code == 1
    assert f"'01a1f8' is the beginning of more than one chat's id: {ids[0]}, {ids[1]}\n" in result.stderr


def test_a_chat_that_is_not_there_is_an_error_that_names_it(sqlite_store: Store, sqlite_url: str) -> None:
    chat: Any = sqlite_store.records.chat
    with sqlite_store.connection():
        chat.insert(id=UUID("01a1f8c8-18bf-7346-8b7e-b94b1b67b901")).execute()
    for given in ("01a1f", "01a1f8c9", "nonsense", "%", "01a1f8c8-18bf-7346-8b7e-b94b1b67b902"):
        result = run(given, "--database-url", sqlite_url)
        assert (result.exit_code, result.stdout) == (1, "")
        assert f"there is no chat {given!r} in " in result.stderr
        assert result.stderr.endswith(">: give at least 6 characters of its id\n") == (given == "01a1f")


def test_an_encrypted_chat_is_shown_with_its_keys_only(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = Fernet.generate_key().decode()
    with connect(sqlite_url, encrypt=key) as store:
        store.create_tables()
        chat = create_chat(store, model="test", llm=ScriptedLLM("A secret."))
        chat.ask("Tell me")
    result = run(str(chat.id), "--database-url", sqlite_url)
    assert result.exit_code == 1
    assert "A secret" not in result.output
    monkeypatch.setenv("LLM_ORM_ENCRYPTION_KEYS", key)
    assert "  A secret.\n" in shown(str(chat.id), "--database-url", sqlite_url)

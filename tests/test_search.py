"""What is found of what was said: the same on both databases, and current after whatever was written."""

import asyncio
import importlib
import random
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from cryptography.fernet import Fernet
from freezegun import freeze_time

from llm_orm import (
    Chat,
    Found,
    InvalidValue,
    Store,
    TablesMissing,
    UnknownKeyword,
    WrongSetup,
    asearch,
    connect,
    create_chat,
    erase,
    prune,
    search,
    tool,
)
from llm_orm.records import uuid7
from llm_orm.testing import Call, ProviderError, ScriptedLLM
from llm_orm.words import MOST_CHARACTERS


@tool
def look_up(name: str) -> str:
    """Look something up."""
    return f"The zebra of {name} lives at /home/foo-bar, a@b.com"


def a_chat(store: Store, *script: Any, **keywords: Any) -> Chat:
    return create_chat(store, model="test", llm=ScriptedLLM(*script), tools=[look_up], **keywords)


def said(store: Store, *texts: str, **keywords: Any) -> Chat:
    """A chat with messages."""
    chat = a_chat(store, **keywords)
    for text in texts:
        chat.add_message("user", text)
    return chat


def found(store: Store, text: str, **keywords: Any) -> list[str]:
    """The beginnings of what is found."""
    return [each.snippet[:12] for each in search(store, text, **keywords)]


def run(store: Store, statement: str, *params: Any) -> list[Any]:
    with store.connection():
        cursor = store.database.execute_sql(statement.replace("?", store.database.param), params)
        return cursor.fetchall() if cursor.description else []


# What is found


def test_messages_and_results_of_tools_are_found(store: Store) -> None:
    chat = a_chat(store, Call("look_up", name="Oz"), "It is striped.", instructions="zebra zebra")
    chat.ask("Where is my animal?")
    user, assistant = chat.messages()

    (result,) = search(store, "zebra")
    (answer,) = search(store, "striped")
    (question,) = search(store, "animal")

    assert (result.role, result.name, result.message_id, result.chat_id) == ("tool", "look_up", assistant.id, chat.id)
    assert [result.tool_call_id] == [UUID(str(row[0])) for row in run(store, "SELECT id FROM llm_tool_call")]
    assert (answer.role, answer.name, answer.message_id, answer.tool_call_id) == ("assistant", None, assistant.id, None)
    assert (question.role, question.message_id, question.created_at) == ("user", user.id, user.created_at)
    assert question.snippet == "Where is my animal?"
    assert question.as_dict()["hits"] == ((12, 18),)
    assert found(store, "Oz") == ["The zebra of"]  # of the result, not of the arguments
    assert asyncio.run(asearch(store, "striped")) == [answer]


HEARD = "Your REFUND of 5.00 € — “done”, foo-bar; ÉCOLE नमस्ते, see C:\\temp\\x_y.txt or https://example.com/a?b=c"

HITS = [
    "refund",
    "Refund YOUR",
    "refu*",
    "école",
    "नमस्ते",
    "done",
    "5.00",
    '"refund of"',
    '"5 00"',
    "foo",
    "foo-bar",
    "foo-b*",
    "FOO_BAR",
    "example.com/a",
    "https://example.com/a?b=c",
    "txt",
    "temp\\x_y",
    '"or https" refund',
    '"refund of',
    "refund !!!",
    "refund refund",
]
MISSES = [
    "fund",
    "refun",
    "refund money",
    '"of refund"',
    "bar-foo",
    "ecole",
    '"refu* of"',
    "foob*",
    "*",
    "",
    "!!!",
    '"',
    '""',
    "\x00",
    "\ud800",
    "NOT refund",
    "refund OR money",
    "refund NEAR done",
    "words:refund",
    "'; DROP TABLE llm_message; --",
    '" OR 1=1',
    "refund & ! | ( ) <-> :* \\ '' %s %(x)s ?",
    "(((",
    "-refund^2+{}[]",
    " ".join(f"w{number}" for number in range(100)),
    "a" * 500,
]


def test_all_words_are_there_and_nothing_is_an_error(store: Store) -> None:
    said(store, HEARD, "Something else, of which OR and NEAR are a part")

    assert {text: len(search(store, text)) for text in HITS} == dict.fromkeys(HITS, 1)
    assert {text: found(store, text) for text in MISSES} == {text: [] for text in MISSES}
    assert run(store, "SELECT COUNT(*) FROM llm_message") == [(2,)]


LETTERS = ["a", "B", "é", "É", "ж", "1", "9", "東", "京", "ñ"]
BETWEEN = [" ", "  ", "\n", "-", "_", ".", ",", "'", '"', "“", "…", "@", "/", ":", "—", "、", "🗼", "€", "<", ">", "&"]


def made_up(dice: random.Random, words: int) -> str:
    word = lambda: "".join(dice.choices(LETTERS, k=dice.randint(1, 2)))  # noqa: E731
    return "".join(word() + "".join(dice.choices(BETWEEN, k=dice.randint(1, 2))) for _ in range(words))


def words_of(text: str) -> str:
    return f" {' '.join(re.findall('[^' + ''.join(map(re.escape, BETWEEN)) + ']+', text.lower()))} "


def test_both_databases_find_what_a_reader_finds(store: Store) -> None:
    dice = random.Random(4711)
    texts = [made_up(dice, 5) for _ in range(40)]
    said(store, *texts)
    for _ in range(40):
        wanted = dice.choice(texts).replace('"', " ") if dice.random() < 0.2 else made_up(dice, 1).replace('"', " ")
        phrase, is_prefix = words_of(wanted), dice.random() < 0.3
        looked_for = phrase[:-1] if is_prefix else phrase
        expected = sorted(text for text in texts if phrase.strip() and looked_for in words_of(text))
        asked = f"{phrase.strip().replace(' ', '-')}*" if is_prefix else f'"{wanted}"'

        ids = [each.message_id for each in search(store, asked, limit=100)]

        with store.connection():
            message = store.records.message
            assert sorted(row.content for row in message.select().where(message.id.in_(ids))) == expected, asked


def test_the_best_come_first_and_among_equals_the_newest(store: Store) -> None:
    other = [f"nothing of it {number}" for number in range(6)]
    said(store, "an apple once, in a text that is long and of other things", "apple apple", *other)
    said(store, "one pear", "two pear", "six pear")

    assert found(store, "apple") == ["apple apple", "an apple onc"]
    assert found(store, "pear") == ["six pear", "two pear", "one pear"]
    assert found(store, "pear", limit=2) == ["six pear", "two pear"]
    assert found(store, "pear", limit=2, offset=2) == ["one pear"]
    assert [each.rank for each in search(store, "apple")] == sorted(
        (each.rank for each in search(store, "apple")), reverse=True
    )


def test_of_many_more_hits_than_are_ranked_each_is_found_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("llm_orm.search"), "RANKED", 3)
    said(store, *(f"plum {number}" for number in range(9)))

    pages = [found(store, "plum", limit=4, offset=offset) for offset in (0, 4, 8)]

    assert [len(page) for page in pages] == [4, 4, 1]
    assert [each for page in pages for each in page] == [f"plum {number}" for number in reversed(range(9))]


def test_chats_and_times_can_be_chosen(store: Store) -> None:
    with freeze_time("2026-11-01 12:00", real_asyncio=True):
        chat = said(store, "apple in November", user_id="u_1", metadata={"plan": "free"})
    with freeze_time("2026-12-01 12:00", real_asyncio=True):
        said(store, "apple in December", user_id="u_2", metadata={"plan": "paid"})

    assert found(store, "apple", where={"user_id": "u_1"}) == ["apple in Nov"]
    assert found(store, "apple", where={"metadata.plan": "paid"}) == ["apple in Dec"]
    assert found(store, "apple", where={"id": chat.id, "user_id": "u_2"}) == []
    assert found(store, "apple", since="2026-12-01") == ["apple in Dec"]
    assert found(store, "apple", until=datetime(2026, 11, 2, tzinfo=UTC)) == ["apple in Nov"]
    assert found(store, "apple", since="2026-11-01T12:00:00+00:00", until="2026-12-01T12:00:00+00:00") == [
        "apple in Nov"
    ]


def test_a_word_ends_where_the_punctuation_of_its_script_stands(store: Store) -> None:
    words = ["किताब।", "كتاب،", "գիրք՞", "ספר־", "ကြောင်။", "ドラマ・", "λόγος·"]
    said(store, *(f"x {word}y" for word in words))

    for word in words:
        assert [each.hits for each in search(store, word[:-1])] == [((2, 1 + len(word)),)], word


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"text": 5}, InvalidValue, "search() takes a text, not 5"),
        ({"text": "a" * 501}, InvalidValue, "500 characters at the most, not one of 501"),
        ({"limit": 0}, InvalidValue, "limit=0: limit must be a whole number, 1 or more"),
        ({"offset": -1}, InvalidValue, "offset=-1: offset must be a whole number, 0 or more"),
        ({"offset": True}, InvalidValue, "offset=True"),
        ({"where": {"colour": "red"}}, UnknownKeyword, "colour"),
        ({"where": []}, InvalidValue, "where="),
        ({"since": "yesterday"}, InvalidValue, "since='yesterday'"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    sqlite_store: Store, keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        search(sqlite_store, **{"text": "apple", **keywords})


# The snippet


def snippet(store: Store, content: str, text: str) -> Found:
    said(store, content)
    (found, *_) = search(store, text, limit=1)
    assert len(found.snippet) <= 164
    return found


def test_a_snippet_is_a_line_around_the_first_hit(sqlite_store: Store) -> None:
    content = "before " * 100 + "\n\n the\tapple  and the pear, " + "after " * 100 + "apple"
    found = snippet(sqlite_store, content, "pear appl*")

    assert found.snippet.startswith("…before ")
    assert found.snippet.endswith(" after…")
    assert [found.snippet[start:end] for start, end in found.hits] == ["apple", "pear"]


@pytest.mark.parametrize(
    ("content", "text", "line"),
    [
        ("apple", "apple", "[apple]"),
        ("an Apple, a pineapple, apples; APPLE", "apple", "an [Apple], a pineapple, apples; [APPLE]"),
        ("foo bar foo bar", 'foo "foo bar"', "[foo bar] [foo bar]"),
        ("<b>apple</b>\x0b &amp;", "apple", "<b>[apple]</b> &amp;"),
        ("x" * 300 + " apple " + "y" * 300, "apple", "…" + "x" * 39 + " [apple] " + "y" * 114 + "…"),
        (" " * 5000 + "apple" + " " * 5000, "apple", "…[apple]…"),
        ("a " * 3000 + "apple", "apple", "…" + "a " * 20 + "[apple]"),
        ("w" * 400 + " end", "w*", "[" + "w" * 160 + "]…"),
    ],
)
def test_a_snippet_says_where_the_hits_are(sqlite_store: Store, content: str, text: str, line: str) -> None:
    found = snippet(sqlite_store, content, text)
    marked, last = "", 0
    for start, end in found.hits:
        marked += f"{found.snippet[last:start]}[{found.snippet[start:end]}]"
        last = end

    assert marked + found.snippet[last:] == line


# Kept current


def test_what_a_running_turn_says_is_found_when_it_has_ended(store: Store) -> None:
    during: list[list[str]] = []

    @tool
    def peek() -> str:
        """Look what is found."""
        run(store, "UPDATE llm_message SET content = 'half an answer' WHERE status = 'pending'")
        during.append(found(store, "question") + found(store, "answer"))
        return "peeked"

    chat = create_chat(store, model="test", llm=ScriptedLLM(Call("peek"), "A whole answer."), tools=[peek])
    chat.ask("A question?")

    assert during == [["A question?"]]
    assert found(store, "answer") == ["A whole answ"]
    assert found(store, "half") == []
    assert found(store, "peeked") == ["peeked"]


def test_a_turn_that_is_rolled_back_leaves_the_question_and_the_results(store: Store) -> None:
    chat = a_chat(store, Call("look_up", name="Oz"), ProviderError(400, "no"))
    with pytest.raises(ProviderError):
        chat.ask("A question?")

    assert found(store, "question") == ["A question?"]
    (result,) = search(store, "zebra")
    assert result.message_id is None


def test_what_is_changed_erased_or_deleted_is_not_found_any_more(store: Store) -> None:
    chat, other = a_chat(store, Call("look_up", name="Oz"), "An apple."), said(store, "apple and zebra")
    chat.ask("apple?")
    run(store, "UPDATE llm_message SET content = 'A pear.' WHERE content = 'An apple.'")
    assert sorted(found(store, "apple")) == ["apple and ze", "apple?"]
    assert found(store, "pear") == ["A pear."]

    chat.erase()
    assert found(store, "apple") == found(store, "zebra") == ["apple and ze"]
    assert found(store, "pear") == []

    other.delete()
    assert found(store, "apple") == []


def test_rows_that_are_deleted_with_their_chat_take_their_words_along(store: Store) -> None:
    chat = a_chat(store, Call("look_up", name="Oz"), "An apple.")
    chat.ask("apple?")
    run(store, "DELETE FROM llm_chat")
    assert found(store, "apple") == found(store, "zebra") == []
    if store.is_sqlite:
        assert run(store, "SELECT COUNT(*) FROM llm_search_row") == [(0,)]


def test_what_is_rolled_back_was_never_there(store: Store) -> None:
    chat = said(store, "apple")
    with pytest.raises(ZeroDivisionError), store.transaction():
        chat.add_message("user", "pear")
        run(store, "DELETE FROM llm_message WHERE content = 'apple'")
        raise ZeroDivisionError

    assert (found(store, "apple"), found(store, "pear")) == (["apple"], [])


def test_plain_sql_is_found_whatever_its_conflicts_do(store: Store) -> None:
    chat = said(store, "apple")
    key, at = uuid7().hex, datetime.now(UTC).isoformat(" ", "microseconds")
    columns = "(id, chat_id, position, role, status, content, created_at, updated_at)"
    insert = f"INSERT INTO llm_message {columns} VALUES (?, ?, ?, 'user', 'completed', ?, ?, ?)"

    def write(position: int, content: str, ending: str = "", begin: str = "INSERT INTO") -> None:
        run(store, insert.replace("INSERT INTO", begin) + ending, key, chat.id.hex, position, content, at, at)

    write(7, "plum one")
    write(7, "plum two", " ON CONFLICT DO NOTHING")
    write(7, "plum two", " ON CONFLICT (id) DO NOTHING")
    assert (found(store, "plum"), found(store, "two")) == (["plum one"], [])

    write(8, "plum three", " ON CONFLICT (id) DO UPDATE SET content = excluded.content")
    assert (found(store, "plum"), found(store, "one")) == (["plum three"], [])
    if store.is_sqlite:
        write(9, "plum four", begin="INSERT OR IGNORE INTO")
        assert found(store, "plum") == ["plum three"]
        write(9, "plum five", begin="INSERT OR REPLACE INTO")
        assert (found(store, "plum"), found(store, "three")) == (["plum five"], [])
        write(9, "plum six", begin="INSERT OR REPLACE INTO")
        run(store, "DELETE FROM llm_message WHERE id = ?", key)
        write(9, "plum seven")
        write(10, "plum", " ON CONFLICT (id) DO UPDATE SET content = excluded.content")
        assert (found(store, "plum"), found(store, "three")) == (["plum"], [])
    another = uuid7().hex
    run(store, "UPDATE llm_message SET id = ? WHERE id = ?", another, key)
    assert [str(each.message_id) for each in search(store, "plum")] == [str(UUID(another))]
    run(store, "DELETE FROM llm_message WHERE id = ?", another)
    assert found(store, "plum") == []


def test_whatever_happens_to_rows_the_words_are_theirs(store: Store) -> None:
    dice, words = random.Random(12), ["apple", "pear", "plum", "cherry", "fig"]
    chat = said(store, *(f"{dice.choice(words)} {dice.choice(words)}" for _ in range(20)))

    def content() -> str | None:
        return dice.choice([None, "", "enc:v1:fig", " ".join(dice.choices(words, k=3))])

    for _ in range(60):
        (key,) = dice.choice(run(store, "SELECT id FROM llm_message"))
        status = dice.choice(["completed", "failed", "incomplete"])
        (act,) = dice.choices(["update", "status", "delete", "add"], [4, 2, 1, 1])
        if act == "update":
            run(store, "UPDATE llm_message SET content = ?, status = ? WHERE id = ?", content(), status, key)
        elif act == "status":
            run(store, "UPDATE llm_message SET status = 'completed' WHERE status = 'pending'")
            run(store, "UPDATE llm_message SET status = 'pending' WHERE id = ?", key)
        elif act == "delete":
            run(store, "DELETE FROM llm_message WHERE id = ?", key)
        else:
            run(store, "UPDATE llm_message SET status = 'completed' WHERE status = 'pending'")
            chat.add_message("user", " ".join(dice.choices(words, k=2)))

    check_words(store, words)
    if store.is_sqlite:
        run(store, "INSERT INTO llm_search (llm_search) VALUES ('integrity-check')")
        run(store, "DELETE FROM llm_message WHERE position < 5")
        run(store, "VACUUM")
        check_words(store, words)


def check_words(store: Store, words: list[str]) -> None:
    rows = run(store, "SELECT id, content, status FROM llm_message")
    for word in words:
        expected = {
            UUID(str(key))
            for key, text, status in rows
            if word in re.findall(r"\w+", text or "") and status != "pending" and not text.startswith("enc:v1:")
        }
        assert {each.message_id for each in search(store, word, limit=100)} == expected, word


def test_stores_in_one_database_find_their_own(database_url: str) -> None:
    with connect(database_url) as one, connect(one.database, table_prefix="app_") as two:
        one.create_tables()
        two.create_tables()
        said(one, "apple one")
        said(two, "apple two")

        assert (found(one, "apple"), found(two, "apple")) == (["apple one"], ["apple two"])
        one.drop_tables()
        assert found(two, "apple") == ["apple two"]
        with pytest.raises(TablesMissing):
            search(one, "apple")


def test_without_a_table_of_tool_calls_messages_are_found(database_url: str) -> None:
    with connect(database_url) as store:
        store.create_tables()
        with store.connection():
            store.database.drop_tables([store.records.tool_call], cascade=not store.is_sqlite)
        said(store, "apple")

        assert found(store, "apple") == ["apple"]


def test_of_a_word_that_postgresql_knows_parts_of_the_whole_is_there(postgres_url: str) -> None:
    with connect(postgres_url) as store:
        store.create_tables()
        said(store, "a part of it", "the \U00039099part", "9 m of it", "9 m² of it")

        assert found(store, "\U00039099part") == ["the \U00039099part"]
        assert found(store, "m²") == ["9 m² of it"]


def test_the_index_of_postgresql_is_used(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(postgres_url) as store:
        store.create_tables()
        said(store, "apple pie")
        asked: list[Any] = []
        read = store.read
        monkeypatch.setattr(store, "read", lambda statement: asked.append(statement) or read(statement))
        search(store, '"apple pie" app*')
        (query,) = [statement for statement in asked if "ts_rank" in statement.text]
        with store.connection():
            store.database.execute_sql("SET enable_seqscan = off")
            plan = store.database.execute_sql(f"EXPLAIN {query.text}", query.params).fetchall()

    assert "llm_message_search" in str(plan)
    assert "llm_tool_call_search" in str(plan)


# What must be written, whatever search makes of it


def distinct_words(characters: int) -> str:
    """Each of one character of four bytes or two, as no text has more of them."""
    dice = random.Random(7)
    letters = [chr(code) for code in range(0x20000, 0x2A000)]
    words = ["".join(dice.choices(letters, k=dice.choice((1, 2)))) for _ in range(characters // 2)]
    return " ".join(words)[:characters]


@pytest.mark.parametrize("characters", [MOST_CHARACTERS + 50_000, pytest.param(7_000_000, marks=pytest.mark.matrix)])
def test_a_text_that_is_too_long_for_the_index_is_kept(database_url: str, characters: int) -> None:
    text = "apple " + distinct_words(characters) + " pear"
    with connect(database_url) as store:
        store.create_tables()
        chat = a_chat(store, text)

        assert chat.ask("A long one, please.").content == text
        assert found(store, "apple")[0].startswith("apple ")
        assert found(store, "pear") == []  # so far nobody looks


@pytest.mark.parametrize(
    "text", ["x" * 3_000_000, "é" * 5000 + " apple", "apple\n" * 50_000, "\u0301" * 3000, "🗼" * 9000]
)
def test_an_odd_text_is_kept(store: Store, text: str) -> None:
    assert a_chat(store, text).ask("Go").content == text
    assert bool(search(store, "apple")) == ("apple" in text)


def test_a_phrase_far_into_a_text_is_found(store: Store) -> None:
    said(store, "word " * 20_000 + "one two three " + "word " * 10)

    assert [len(search(store, text)) for text in ('"two three"', '"one two" thr*', '"one three"')] == [1, 1, 0]


# Content that is encrypted, and content that is gone


def test_an_encrypted_store_says_why_it_finds_nothing(database_url: str) -> None:
    key = Fernet.generate_key()
    with connect(database_url, encrypt=key) as store, connect(store.database) as clear:
        store.create_tables()
        chat = a_chat(store, Call("look_up", name="Oz"), "An apple.")
        chat.ask("apple?")
        (token,) = run(store, "SELECT content FROM llm_message WHERE role = 'user'")[0]

        with pytest.raises(WrongSetup, match="encrypted"):
            search(store, "apple")
        assert found(clear, token[-12:]) == found(clear, "enc") == []

        store.rotate_keys(decrypt=True)
        assert sorted(found(clear, "apple")) == ["An apple.", "apple?"]
        assert found(clear, "zebra") == ["The zebra of"]

        store.rotate_keys()
        assert found(clear, "apple") == found(clear, "zebra") == []
        if store.is_sqlite:
            assert run(store, "SELECT COUNT(*) FROM llm_search_row") == [(0,)]


@pytest.mark.parametrize("way", ["erase", "prune"])
def test_the_files_of_sqlite_have_no_word_of_it_left(tmp_path: Path, way: str) -> None:
    def left() -> int:
        return sum(path.read_bytes().count(b"canary") for path in tmp_path.glob("chats.db*"))

    with connect(f"sqlite:///{tmp_path}/chats.db") as store:
        store.create_tables()
        for number in range(30):
            said(store, f"canary{number} of many", f"other{number}")
        a_chat(store, Call("look_up", name="canary"), "canaries").ask("canary?")
        assert left() > 30
        ids = [each.chat_id for each in search(store, "canar*", limit=100)]
        kept = said(store, "other words stay")
        if way == "erase":
            assert not erase(store, {"id": ids}).is_still_in_log
        else:
            run(store, "UPDATE llm_chat SET updated_at = ? WHERE id = ?", _in_a_year(), kept.id.hex)
            assert prune(store, 1e-6).chats == 31

        assert left() == 0
        assert found(store, "other words") == ["other words "]
        run(store, "INSERT INTO llm_search (llm_search) VALUES ('integrity-check')")
        assert run(store, "PRAGMA integrity_check") == [("ok",)]


def _in_a_year() -> str:
    return (datetime.now(UTC) + timedelta(days=365)).isoformat(" ", "microseconds")

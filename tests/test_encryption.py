"""Content at rest: connect(…, encrypt=KEY)."""

import copy
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peewee as pw
import pytest
from click.testing import CliRunner
from conftest import CHAT_FIELDS, rows
from cryptography.fernet import Fernet

from llm_orm import (
    RETRY,
    Agent,
    InvalidValue,
    Middleware,
    PIIMask,
    Store,
    WrongKey,
    WrongSetup,
    connect,
    create_agent_session,
    create_chat,
    load_agent_session,
    load_chat,
    tool,
)
from llm_orm.records import BASES, Content, JSONField
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM
from llm_orm_cli import main

KEY, OLDER, LOST = (Fernet.generate_key() for _ in range(3))
CANARY = "the-canary-sings"

Open = Callable[..., Store]


@pytest.fixture
def opened(store: Store, database_url: str) -> Iterator[Open]:
    """opened(encrypt=…) → a store of the same tables."""
    made: list[Store] = []

    def open_store(**keywords: Any) -> Store:
        made.append(connect(database_url, chat_fields=CHAT_FIELDS, **keywords))
        return made[-1]

    yield open_store
    for each in made:
        each.close()


def places(store: Store, text: str) -> list[str]:
    """Where in the database the text is to be read, as somebody would find it who has the files of it."""
    with store.connection():
        if store.is_sqlite:
            path = Path(store.database.database)
            files = [each for each in path.parent.glob(f"{path.name}*") if text.encode() in each.read_bytes()]
            return [each.name for each in files]
        found = []
        for record in store.records:
            table = record._meta.table_name
            lines = store.database.execute_sql(f'SELECT CAST(t AS TEXT) FROM "{table}" t').fetchall()
            found += [table for (line,) in lines if text in line or text.encode().hex() in line]
        return found


def stored(store: Store, record: str, column: str) -> list[Any]:
    """The cells of a column, as the database has them."""
    table = getattr(store.records, record)._meta.table_name
    with store.connection():
        found = store.database.execute_sql(f'SELECT CAST("{column}" AS TEXT) FROM "{table}" ORDER BY id').fetchall()
    return [value for (value,) in found]


def look_up(name: str) -> str:
    """Look somebody up."""
    if name == "nobody":
        raise ValueError(f"{CANARY}: nobody")
    return f"{CANARY}, {name}"


@tool(requires_approval=True)
def write_to(name: str) -> str:
    """Write to somebody."""
    return f"{CANARY} was written to"


class Helper(Agent):
    model = "test"
    instructions = f"Help, {CANARY}."


class SaysNo(Middleware):
    def on_response(self, context, reply):
        return RETRY(f"Not so, {CANARY}") if reply.tool_calls else None


def run_every_kind_of_turn(store: Store, tmp_path: Path) -> ScriptedLLM:
    """Turns that write every column of content, with the canary in each of them; the model, which they are shown to."""
    llm = ScriptedLLM()
    chat = create_chat(
        store, model="test", llm=llm, instructions=f"Be brief, {CANARY}.", tools=[look_up, write_to], user_id="u_1"
    )
    letter = tmp_path / f"{CANARY}.txt"
    letter.write_text(f"Dear {CANARY}")
    llm.add([Call("look_up", name=CANARY), Call("look_up", name="nobody", signature=CANARY)], f"It is {CANARY}.")
    chat.ask(f"Who is {CANARY}?", files=[letter, f"https://host/{CANARY}.png"])
    llm.add(
        Say(
            f"I think, {CANARY}.",
            thinking=f"Hm, {CANARY}",
            signature=CANARY,
            images=[b"\x89PNG\r\n\x1a\n" + CANARY.encode()],
        )
    )
    for _ in chat.ask_stream(f"And {CANARY}?"):
        pass
    llm.add([Call("write_to", name=CANARY), Call("write_to", name=CANARY)], f"Done, {CANARY}.")
    assert chat.ask(f"Write to {CANARY}").status == "pending"
    first, second = chat.pending_approvals()
    chat.approve(first)
    chat.deny(second, f"not {CANARY}")
    chat = load_chat(store, chat.id, llm=llm, tools=[look_up, write_to])
    assert chat is not None
    assert chat.resume().content == f"Done, {CANARY}."
    llm.add(ProviderError(400, f"I do not like {CANARY}"), f"Again, {CANARY}.")
    with pytest.raises(ProviderError):
        chat.ask(f"Try {CANARY}")
    chat.retry()
    llm.add(Say(f"Broken {CANARY}", error=ProviderError(400, f"not {CANARY}")), f"Mended {CANARY}.")
    with pytest.raises(ProviderError):
        list(chat.ask_stream("Keep it", on_error="keep"))
    chat.retry()
    chat.add_message("assistant", f"By the way, {CANARY}.", None)
    chat.with_instructions(f"Be long, {CANARY}.")
    llm.add(Call("look_up", name=CANARY), f"No rows, {CANARY}.")
    few = create_chat(store, model="test", llm=llm, tools=[look_up], persistence={"tool_calls": False})
    few.ask(f"Who is {CANARY}?")
    llm.add(Call("look_up", name=CANARY), f"Sent back, {CANARY}.")
    create_chat(store, model="test", llm=llm, tools=[look_up], middlewares=[SaysNo()]).ask(f"Who is {CANARY}?")
    llm.add(f"Masked, {CANARY}, ada@example.com.")
    create_chat(store, model="test", llm=llm, middlewares=[PIIMask(stored=True)]).ask(f"bob@example.com {CANARY}")
    llm.add(f"Here, {CANARY}.")
    session = create_agent_session(store, Helper, llm=llm)
    session.ask(f"Hi, {CANARY}")
    llm.add("The last word.", "The last word.")
    again = load_agent_session(store, Helper, session.id, llm=llm)
    assert again is not None
    again.ask("And now?")
    copy_of_it = chat.fork()
    copy_of_it._options = chat._options
    copy_of_it.ask("And here?")
    return llm


def shown(llm: ScriptedLLM) -> str:
    """What the model was shown last, as text."""
    return json.dumps(llm.requests[-1]["messages"])


def test_what_was_said_is_nowhere_in_the_database(opened, tmp_path):
    encrypted = opened(encrypt=KEY)
    llm = run_every_kind_of_turn(encrypted, tmp_path)
    assert places(encrypted, CANARY) == []
    assert shown(llm).count(CANARY) > 20
    assert "enc:v" not in str(llm.requests)


def test_without_a_key_it_is_and_the_model_is_shown_the_same(store, opened, tmp_path):
    clear = run_every_kind_of_turn(store, tmp_path)
    assert places(store, CANARY)
    encrypted = run_every_kind_of_turn(opened(encrypt=KEY), tmp_path)
    assert [each["messages"] for each in encrypted.requests] == [each["messages"] for each in clear.requests]


@pytest.mark.parametrize("record", BASES)
def test_every_column_is_content_or_known_to_be_clear(record):
    clear = {
        "chat": "model provider metadata",
        "message": "role status model_id provider request_key",
        "tool_call": "tool_call_id name status approval metadata",
        "request": "source provider model error finish_reason provider_request_id",
        "agent_session": "agent_class metadata",
        "attachment": "media_type",
    }
    of_text = [
        field.name
        for field in BASES[record]._meta.sorted_fields
        if isinstance(field, pw.TextField | JSONField | pw.BlobField) and not isinstance(field, Content)
    ]
    assert of_text == clear[record].split()


def test_records_give_and_take_clear_values(opened):
    encrypted = opened(encrypt=KEY)
    message: Any = encrypted.records.message
    chat = create_chat(encrypted, model="test", llm=ScriptedLLM("Hello!"), instructions="Be brief.")
    chat.ask("Hi", files=[("a.txt", b"abc")])
    with encrypted.connection():
        said = message.get(message.role == "user")
        said.content, said.content_raw = "Hey", {"attachments": 1, "mine": ["ä", None]}
        said.save()
        message.update(content="Bye").where(message.role == "assistant").execute()
        reply = message.get(message.role == "assistant")
        reply.content_raw = {"rounds": []}
        message.bulk_update([reply], [message.content_raw])
        file = encrypted.records.attachment.get()
    assert rows(encrypted, "message", "content", "content_raw") == [
        ("Hey", {"attachments": 1, "mine": ["ä", None]}),
        ("Bye", {"rounds": []}),
    ]
    assert (file.filename, file.content, file.size) == ("a.txt", b"abc", 3)
    for column in ("content", "content_raw"):
        assert all(value.strip('"').startswith("enc:v1:gAAAA") for value in stored(encrypted, "message", column))


def test_what_is_encrypted_cannot_be_searched_for_and_says_so(store, opened):
    message: Any = opened(encrypt=KEY).records.message
    for search in (
        lambda: message.content == "Hi",
        lambda: message.content.contains("Hi"),
        lambda: message.content.in_(["Hi"]),
        lambda: message.content_raw["attachments"] == 1,
    ):
        with pytest.raises(InvalidValue, match=r"LlmMessage\.content\w* is encrypted, .* compare in Python"):
            search()
    create_chat(opened(encrypt=KEY)).add_message("user", "Hi")
    plain: Any = store.records.message
    with store.connection():
        assert message.select().where(message.content.is_null(), message.content_raw == None).count() == 0  # noqa: E711
        assert message.select(message.id).where(message.content != None).count() == 1  # noqa: E711
        assert plain.select(plain.id).where(plain.content == "Hi").count() == 0


LOOKS_LIKE_IT = ["enc:v1:gAAAAABm", "enc:v0:hello", "enc:v0:enc:v1:gAAAA", "enc:", "gAAAAABm"]


def test_text_that_looks_like_a_token_is_text(store, opened):
    llm = ScriptedLLM("enc:v1:gAAAAAB", *LOOKS_LIKE_IT)
    chat = create_chat(store, model="test", llm=llm)
    chat.add_message("system", "enc:v1:gAAAAABmw")
    for text in LOOKS_LIKE_IT:
        chat.ask(text, files=[("a.txt", text.encode())])
    for reader in (store, opened(encrypt=KEY)):
        again = load_chat(reader, chat.id, llm=ScriptedLLM("Yes."), model="test")
        assert again is not None
        assert [m["content"][0]["text"] for m in again.history if m["role"] == "user"] == LOOKS_LIKE_IT
        assert [m.content for m in again.messages()][2::2] == ["enc:v1:gAAAAAB", *LOOKS_LIKE_IT[:-1]]
        assert [file.content for file in again.attachments()] == [text.encode() for text in LOOKS_LIKE_IT]
    record: Any = store.records.message
    with store.connection():
        for value in ("enc:v1:gAAAA", "enc:v0:enc:v", ["enc:v1:gAAAA"]):
            record.update(content_raw=value).where(record.role == "system").execute()
            assert record.get(record.role == "system").content_raw == value
        record.update(content_raw=None).where(record.role == "system").execute()
    written_before = "enc:v2, as they say"
    with store.connection():
        table = store.records.message._meta.table_name
        store.database.execute_sql(f"UPDATE {table} SET content = '{written_before}' WHERE role = 'system'")
    assert chat.messages()[0].content == written_before


def test_rows_from_before_it_was_switched_on_are_read_on(store, opened):
    chat = create_chat(store, model="test", llm=ScriptedLLM(Call("look_up", name="Ada"), "Hello!"), tools=[look_up])
    chat.ask("Hi")
    llm = ScriptedLLM("Good.")
    encrypted = opened(encrypt=KEY)
    again = load_chat(encrypted, chat.id, llm=llm, tools=[look_up])
    assert again is not None
    again.ask("How are you?")
    assert [m["content"] for m in llm.requests[0]["messages"]] == [
        "Hi",
        None,
        f"{CANARY}, Ada",
        "Hello!",
        "How are you?",
    ]
    assert sorted(text[:7] for text in stored(encrypted, "message", "content")) == ["Hello!", "Hi", *["enc:v1:"] * 2]


# The wrong key, or none


@pytest.mark.parametrize("keys", [None, LOST, [LOST, OLDER]], ids=["none", "another", "two others"])
def test_history_that_cannot_be_read_is_an_error_before_the_model_is_called(opened, ask, keys):
    chat = create_chat(opened(encrypt=KEY), model="test", llm=ScriptedLLM("Hello!"))
    first = chat.ask("Hi")
    other = opened(encrypt=keys)
    llm = ScriptedLLM("Never said.")
    with pytest.raises(
        WrongKey, match=r"^llm_message\.content of id [0-9a-f-]{36} (is encrypted|cannot be opened)"
    ) as caught:
        ask(load_chat(other, chat.id, llm=llm), "And now?")
    said = chat.messages()
    assert (caught.value.table, caught.value.column, caught.value.row) == ("llm_message", "content", said[0].id)
    assert ("this store has no key" if keys is None else " UTC with another, or changed since") in str(caught.value)
    assert llm.requests == []
    assert [message.id for message in said] == [said[0].id, first.id]
    for read in (lambda: load_chat(other, chat.id).messages(), lambda: load_chat(other, chat.id).history):
        with pytest.raises(WrongKey):
            read()


def test_a_turn_that_waits_goes_on_waiting_where_the_history_cannot_be_read(opened):
    chat = create_chat(opened(encrypt=OLDER), model="test", llm=ScriptedLLM("Hello!"))
    chat.ask("Hi")
    both = opened(encrypt=[KEY, OLDER])
    llm = ScriptedLLM(Call("write_to", name="Ada"), "Done.")
    parked = load_chat(both, chat.id, llm=llm, tools=[write_to])
    assert parked is not None
    parked.approve(parked.ask("Write").tool_calls[0])
    only = load_chat(opened(encrypt=KEY), chat.id, llm=llm, tools=[write_to])
    assert only is not None
    with pytest.raises(WrongKey):
        only.resume()
    assert parked.messages()[-1].parked_at is not None
    assert parked.resume().content == "Done."


def test_instructions_and_files_that_cannot_be_read_are_an_error(opened):
    encrypted = opened(encrypt=KEY)
    chat = create_chat(encrypted, model="test", instructions="Be brief.")
    chat.add_message("user", "See", [("a.txt", b"abc")])
    other = opened(encrypt=LOST)
    with pytest.raises(WrongKey, match=r"llm_chat\.instructions cannot be opened with the key of this store"):
        load_chat(other, chat.id)
    with other.connection(), pytest.raises(WrongKey, match=r"llm_attachment\.\w+ cannot"):
        other.records.attachment.get()


@pytest.mark.parametrize(
    "keys", ["", b"", [], "no key", [KEY, "zweiter"], 7, [None], {KEY: 1}], ids=lambda keys: type(keys).__name__
)
def test_what_is_no_key_is_refused_and_not_shown(keys):
    with pytest.raises(InvalidValue, match="encrypt=") as caught:
        connect("sqlite:///:memory:", encrypt=keys)
    told = "".join(traceback.format_exception(caught.value))
    assert not any(secret in told for secret in ("no key'", "zweiter", KEY.decode()))


def test_keys_are_in_no_repr(opened):
    encrypted = opened(encrypt=[KEY, OLDER])
    field = encrypted.records.message.content
    shown = repr([encrypted, vars(encrypted), field, vars(field), field.cipher, vars(field.cipher)])
    assert not any(key.decode() in shown or str(key) in shown for key in (KEY, OLDER))
    assert copy.deepcopy(field).cipher is field.cipher


def test_without_the_package_it_says_which_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.fernet", None)
    with pytest.raises(WrongSetup, match=r'pip install "llm-orm\[encrypt\]"'):
        connect("sqlite:///:memory:", encrypt=KEY)


def test_a_column_of_ours_that_the_application_declares_anew_is_refused():
    class Mine(BASES["message"]):
        content = pw.TextField(null=True)

    connect("sqlite:///:memory:", models=[Mine]).close()
    with pytest.raises(InvalidValue, match=r"Mine\.content is a field of yours"):
        connect("sqlite:///:memory:", models=[Mine], encrypt=KEY)


# Rotation


def counted(found: list[Any]) -> dict[str, tuple[int, int, int]]:
    return {each.table: (each.rows, each.changed, len(each.unreadable)) for each in found if each.rows}


def test_rotation_encrypts_everything_with_the_first_key(store, opened, tmp_path):
    run_every_kind_of_turn(store, tmp_path)
    run_every_kind_of_turn(opened(encrypt=OLDER), tmp_path)
    rotating = opened(encrypt=[KEY, OLDER])
    planned = rotating.rotate_keys(check=True)
    done = rotating.rotate_keys()
    assert planned == done
    assert counted(done)["llm_attachment"] == (12, 12, 0)
    assert counted(rotating.rotate_keys())["llm_attachment"] == (12, 0, 0)
    assert sum(each.changed for each in rotating.rotate_keys(check=True)) == 0
    alone = opened(encrypt=KEY)
    assert sum(len(each.unreadable) for each in alone.rotate_keys(check=True)) == 0
    cells = [(each, f.name) for each in BASES for f in BASES[each]._meta.sorted_fields if isinstance(f, Content)]
    for record, column in cells:
        if (record, column) != ("attachment", "content"):
            assert {(v or "enc:v1:").strip('"')[:7] for v in stored(alone, record, column)} == {"enc:v1:"}
    with store.connection():
        if store.is_sqlite:
            store.database.execute_sql("VACUUM")
            store.database.execute_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    assert places(alone, CANARY) == []


def test_all_can_be_made_clear_again(store, opened, tmp_path):
    encrypted = opened(encrypt=KEY)
    run_every_kind_of_turn(encrypted, tmp_path)
    chats = [row[0] for row in rows(encrypted, "chat", "id")]
    before = [load_chat(encrypted, chat_id).history for chat_id in chats]
    encrypted.rotate_keys(decrypt=True)
    assert [load_chat(store, chat_id).history for chat_id in chats] == before
    assert places(store, CANARY)
    assert "enc:v" not in str(stored(store, "message", "content_raw"))


def test_rows_that_no_key_opens_are_listed_and_left(opened):
    lost = create_chat(opened(encrypt=LOST), model="test", instructions="Gone.").add_message("user", "Gone")
    kept = create_chat(opened(encrypt=OLDER), model="test").add_message("user", "Kept")
    found = {each.table: each for each in opened(encrypt=[KEY, OLDER]).rotate_keys()}
    assert found["llm_message"].unreadable == (lost.id,)
    assert (found["llm_message"].changed, found["llm_chat"].unreadable) == (1, (lost.chat_id,))
    assert opened(encrypt=KEY).records.message.get_by_id(kept.id).content == "Kept"
    assert opened(encrypt=LOST).records.message.get_by_id(lost.id).content == "Gone"


def test_what_a_turn_writes_during_a_rotation_is_not_overwritten(opened):
    chat = create_chat(opened(encrypt=OLDER), model="test")
    changed, deleted, _ = (chat.add_message("user", text) for text in ("One", "Two", "Three"))
    rotating, turns = opened(encrypt=[KEY, OLDER]), opened(encrypt=OLDER)
    read, seen = rotating.read, []

    def read_and_write(statement: Any) -> Any:
        found = read(statement)
        if "llm_message" in statement.text and not seen:
            seen.append(statement)
            message: Any = turns.records.message
            with turns.connection():
                message.update(content="Won").where(message.id == changed.id).execute()
                message.delete().where(message.id == deleted.id).execute()
        return found

    rotating.read = read_and_write  # type: ignore[method-assign]
    assert counted(rotating.rotate_keys())["llm_message"] == (3, 2, 0)
    assert [message.content for message in load_chat(opened(encrypt=KEY), chat.id).messages()] == ["Won", "Three"]


def test_a_row_that_another_holds_locked_is_written_when_it_is_free(opened):
    chat = create_chat(opened(encrypt=OLDER), model="test")
    held, _ = (chat.add_message("user", text) for text in ("Held", "Free"))
    rotating, holder = opened(encrypt=[KEY, OLDER]), opened(encrypt=OLDER)
    if rotating.is_sqlite:
        assert counted(rotating.rotate_keys())["llm_message"] == (2, 2, 0)
        return
    transact, tries, held_by_other = rotating.transact, [], ExitStack()

    def transact_when_free(*statements: Any) -> Any:
        tries.append(statements)
        held_by_other.close()
        return transact(*statements)

    rotating.transact = transact_when_free  # type: ignore[method-assign]
    message: Any = holder.records.message
    held_by_other.enter_context(holder.transaction())
    message.update(content="Kept").where(message.id == held.id).execute()
    assert counted(rotating.rotate_keys())["llm_message"] == (2, 2, 0)
    assert len(tries) == 2  # the first found it changed
    said = load_chat(opened(encrypt=KEY), chat.id).messages()
    assert [message.content for message in said] == ["Kept", "Free"]


def test_rotation_needs_keys(store):
    with pytest.raises(WrongSetup, match=r"rotate_keys\(\) needs the keys"):
        store.rotate_keys()


def test_the_command_rotates_with_the_keys_of_the_environment(opened, database_url, monkeypatch):
    create_chat(opened(encrypt=OLDER), model="test").add_message("user", "Hi")
    run = lambda *words: CliRunner().invoke(main, ["rotate", *words, "--database-url", database_url])  # noqa: E731
    monkeypatch.setenv("LLM_ORM_ENCRYPTION_KEYS", f"{KEY.decode()}, {OLDER.decode()}")
    checked, done = run("--check", "--json"), run()
    assert (checked.exit_code, done.exit_code) == (0, 0), done.output
    found = {each["table"]: each for each in json.loads(checked.stdout)}
    assert found["llm_message"] == {"table": "llm_message", "rows": 1, "to_change": 1, "unreadable": 0, "ids": None}
    assert "llm_message\t1\t1\t0\t\n" in done.stdout
    monkeypatch.setenv("LLM_ORM_ENCRYPTION_KEYS", LOST.decode())
    lost = run("--check")
    assert lost.exit_code == 1
    assert str(opened(encrypt=KEY).records.message.get().id) in lost.stdout
    monkeypatch.delenv("LLM_ORM_ENCRYPTION_KEYS")
    assert "needs the keys of the content" in run().output

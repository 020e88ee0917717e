"""The same request twice, and a stream that is kept on the way."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from conftest import rows
from freezegun import freeze_time

from llm_orm import ChatBusy, InvalidValue, NothingToRetry, create_chat, load_chat, recover, tool
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM


def chat_with(store, *script, **options):
    return create_chat(store, model="gpt-4o", llm=ScriptedLLM(*script), retries=0, **options)


def again(chat, *script, **options):
    """The same chat, as another process loads it."""
    loaded = load_chat(chat.store, chat.chat_id, llm=ScriptedLLM(*script), retries=0, **options)
    assert loaded is not None
    return loaded


def messages(store):
    return rows(store, "message", "role", "status", "content", "request_key")


# The same key


def test_what_was_answered_is_not_asked_again(store, ask):
    chat = chat_with(store, "Paris.")
    first = ask(chat, "Capital?", key="k_1")
    other = again(chat)
    assert ask(other, "Capital?", key="k_1").id == first.id
    assert len(chat.options.llm.requests) == 1
    assert other.options.llm.requests == []
    assert messages(store) == [("user", "completed", "Capital?", "k_1"), ("assistant", "completed", "Paris.", None)]
    assert len(rows(store, "request", "id")) == 1


def test_a_stream_of_what_was_answered_shows_all_of_it(store):
    chat = chat_with(store, "Paris.")
    message = chat.ask("Capital?", key="k_1")
    stream = chat.ask_stream("Capital?", key="k_1")
    assert [chunk.content for chunk in stream] == ["Paris."]
    assert stream.message is not None
    assert stream.message.id == message.id


def test_what_was_said_later_does_not_change_what_a_key_stands_for(store, ask):
    chat = chat_with(store, "One.", "Two.")
    first = ask(chat, "1?", key="k_1")
    second = ask(chat, "2?", key="k_2")
    assert ask(chat, "1?", key="k_1").id == first.id
    assert ask(chat, "2?", key="k_2").id == second.id


def test_the_same_key_is_another_request_in_another_chat(store):
    assert chat_with(store, "One.").ask("Hi", key="k").content == "One."
    assert chat_with(store, "Two.").ask("Hi", key="k").content == "Two."


def test_messages_without_a_key_are_asked_each_time(store):
    chat = chat_with(store, "One.", "Two.")
    assert [chat.ask("Hi").content, chat.ask("Hi").content] == ["One.", "Two."]


@pytest.mark.parametrize("on_error", ["rollback", "keep"])
def test_the_key_of_a_failed_turn_may_be_asked_again(store, ask, on_error):
    chat = chat_with(store, ProviderError(500), "Paris.", on_error=on_error)
    with pytest.raises(Exception, match="the provider failed"):
        ask(chat, "Capital?", key="k_1")
    reply = ask(chat, "Capital?", key="k_1")
    assert messages(store) == [("user", "completed", "Capital?", "k_1"), ("assistant", "completed", "Paris.", None)]
    assert ask(again(chat), "Capital?", key="k_1").id == reply.id
    assert rows(store, "request", "status_code") == [(500,), (200,)]


@pytest.mark.parametrize("on_error", ["rollback", "keep"])
def test_a_key_whose_message_the_chat_has_left_behind_is_asked_at_its_end(store, on_error):
    chat = chat_with(store, ProviderError(500), "Two.", "One.", on_error=on_error)
    with pytest.raises(Exception, match="the provider failed"):
        chat.ask("1?", key="k_1")
    chat.ask("2?")
    reply = chat.ask("1?", key="k_1")
    assert reply.content == "One."
    assert [(role, content, key) for role, _, content, key in messages(store) if role == "user"] == [
        ("user", "1?", None),
        ("user", "2?", None),
        ("user", "1?", "k_1"),
    ]
    assert chat.ask("1?", key="k_1").id == reply.id


def test_a_retry_answers_the_message_of_a_key(store):
    chat = chat_with(store, ProviderError(500), "Paris.")
    with pytest.raises(Exception, match="the provider failed"):
        chat.ask("Capital?", key="k_1")
    reply = chat.retry()
    assert chat.ask("Capital?", key="k_1").id == reply.id


def test_a_key_stands_for_one_message(store):
    chat = chat_with(store, "Paris.")
    chat.ask("Capital?", key="k_1")
    with pytest.raises(InvalidValue, match=r"key='k_1' .* another message before"):
        chat.ask("Largest town?", key="k_1")
    assert len(messages(store)) == 2


PICTURES = [("a.png", b"\x89PNG\r\n\x1a\n" + bytes([number])) for number in range(2)]


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize(
    ("text", "files"),
    [("What is it?", PICTURES[1]), ("What is it?", PICTURES), ("What is it?", None), ("Really?", PICTURES[0])],
)
@pytest.mark.parametrize("first", ["What is it?", ""])
def test_a_key_stands_for_one_message_and_its_files(store, first, text, files):
    chat = chat_with(store, "A cat.")
    reply = chat.ask(first, files=[PICTURES[0]], key="k_1")
    assert chat.ask(first, files=[PICTURES[0]], key="k_1").id == reply.id
    with pytest.raises(InvalidValue, match=r"key='k_1' .* another message before"):
        chat.ask(text, files=files, key="k_1")
    assert len(messages(store)) == 2


@pytest.mark.parametrize("key", ["", " ", 7, "k" * 256, "a\x00b", b"k"])
def test_what_cannot_be_a_key_is_refused_before_anything_is_written(store, key):
    chat = chat_with(store, "Paris.")
    with pytest.raises(InvalidValue, match="key"):
        chat.ask("Capital?", key=key)
    assert messages(store) == []


def test_two_at_once_with_one_key_make_one_call_and_get_one_answer(store, ask):
    asked, release = threading.Event(), threading.Event()

    def model(_):
        asked.set()
        assert release.wait(20)
        return Say("Paris.")

    chat = chat_with(store, model)
    other = again(chat)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(ask, chat, "Capital?", key="k_1")
        assert asked.wait(20)
        with pytest.raises(ChatBusy):
            ask(other, "Capital?", key="k_1")
        waiting = ThreadPoolExecutor(1)
        second = waiting.submit(ask, other, "Capital?", key="k_1", wait=20)
        release.set()
        assert first.result().id == second.result().id
        waiting.shutdown()
    assert other.options.llm.requests == []
    assert len(messages(store)) == 2


def test_a_key_of_a_turn_whose_process_died_goes_on_where_it_stopped(store, ask):
    ran = []

    @tool
    def look(city: str) -> str:
        ran.append(city)
        return f"rain in {city}"

    def dies(_):
        raise SystemExit  # which nothing here keeps from leaving its turn as it is

    chat = chat_with(store, Call("look", city="Rome"), dies, tools=[look])
    with stays_pending(store):
        with pytest.raises(SystemExit):
            chat.ask("Weather?", key="k_1")
    assert [row[1] for row in messages(store)] == ["completed", "pending"]
    other = again(chat, "Rain.", tools=[look])
    with pytest.raises(ChatBusy):
        ask(other, "Weather?", key="k_1")
    reply = ask(other, "Weather?", key="k_1", stale_after=0)
    assert reply.content == "Rain."
    assert ran == ["Rome"]
    assert len(other.options.llm.requests) == 1
    assert messages(store) == [("user", "completed", "Weather?", "k_1"), ("assistant", "completed", "Rain.", None)]


@pytest.mark.parametrize("other_does", ["answers", "recovers"])
def test_a_dead_turn_that_another_ends_at_this_moment_is_not_a_busy_chat(store, other_does):
    def dies(_):
        raise SystemExit

    chat = chat_with(store, dies)
    with stays_pending(store), pytest.raises(SystemExit):
        chat.ask("Weather?", key="k_1")
    one, other = again(chat, "One."), again(chat, "Other.")
    found, looks = store.found, []

    def before_it_is_taken(query):
        looks.append(query)
        if len(looks) == 4:  # the turn, the message of the key, what follows it: it is dead; and the turn once more
            other.resume(stale_after=0) if other_does == "answers" else recover(store, older_than=0)
        return found(query)

    store.found = before_it_is_taken
    said = one.ask("Weather?", key="k_1", stale_after=0).content
    assert said == {"answers": "Other.", "recovers": "One."}[other_does]
    assert [row[:3] for row in messages(store)] == [("user", "completed", "Weather?"), ("assistant", "completed", said)]


def stays_pending(store):
    """What a process that dies does not do, is not done: its turn is not given up."""
    from unittest.mock import patch

    from llm_orm.rows import Rows

    return patch.object(Rows, "give_up", lambda self, error: None)


def test_a_key_of_a_turn_that_waits_for_a_person_returns_what_waits(store):
    @tool(requires_approval=True)
    def pay(amount: int) -> str:
        return "paid"

    chat = chat_with(store, Call("pay", amount=5), "Paid.", tools=[pay])
    waiting = chat.ask("Pay", key="k_1")
    assert waiting.status == "pending"
    assert chat.ask("Pay", key="k_1").id == waiting.id
    chat.approve(chat.pending_approvals()[0])
    assert chat.resume().content == "Paid."
    assert chat.ask("Pay", key="k_1").content == "Paid."


# save_every


def test_a_stream_is_kept_on_the_way(store):
    """A page that polls sees what has come, and so does whoever finds the turn dead."""
    seen = []
    with freeze_time(datetime.now(UTC), real_asyncio=True) as time:
        chat = chat_with(store, Say("One two three four.", chunks=["One ", "two ", "three ", "four."]), save_every=2)
        for _ in chat.ask_stream("Count"):
            seen.append(messages(store)[1][1:3])
            time.tick(timedelta(seconds=1))
    assert seen == [("pending", None), ("pending", None), ("pending", "One two three "), ("pending", "One two three ")]
    assert messages(store)[1][1:3] == ("completed", "One two three four.")
    assert rows(store, "message", "content_raw")[1] == (None,)


# Two retries


@pytest.mark.parametrize("key", [None, "k_1"])
def test_two_retries_at_one_moment_answer_once(store, key):
    chat = chat_with(store, ProviderError(400), on_error="keep")
    with pytest.raises(ProviderError):
        chat.ask("Hi", key=key)
    one, other = (again(chat, text, on_error="keep") for text in ("One.", "Other."))
    read, found, done = store.read, store.found, []

    def before_it_is_written(look, query):
        seen = look(query)
        if not done and (key or "status <> " in query.text):
            done.append(1)
            other.retry()
        return seen

    store.read = lambda sql: before_it_is_written(read, sql) if key is None else read(sql)
    store.found = lambda query: before_it_is_written(found, query) if key and "LIMIT" in str(query) else found(query)
    if key is None:
        with pytest.raises(NothingToRetry):
            one.retry()
    else:
        assert one.ask("Hi", key=key).content == "Other."
    assert [row[:3] for row in messages(store)] == [("user", "completed", "Hi"), ("assistant", "completed", "Other.")]


def test_a_retry_whose_place_was_taken_meanwhile_keeps_the_one_that_it_has(store):
    def model(_):
        with store.connection():
            message = store.records.message
            message.delete().where(message.status == "failed").execute()
            message.create(chat=chat.id, position=1, role="assistant", content="Other.")
        return "One."

    chat = chat_with(store, ProviderError(400), model, on_error="keep")
    with pytest.raises(ProviderError):
        chat.ask("Hi")
    assert chat.retry().content == "One."
    assert rows(store, "message", "position", "content") == [(0, "Hi"), (1, "Other."), (2, "One.")]

"""Files that come with a message, and files that a model makes: stored, and shown again on every later turn."""

import asyncio
import base64
import hashlib
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import WAYS, Ask, rows
from provider import Answer, Provider
from provider import Call as ProviderCall

from llm_orm import (
    LLM,
    REPLACE,
    RETRY,
    Agent,
    Chat,
    EmptyMessage,
    Fallbacks,
    InvalidFile,
    InvalidValue,
    PIIMask,
    Retries,
    Store,
    connect,
    create_agent_session,
    create_chat,
    load_agent_session,
    load_chat,
    tool,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

PNG = b"\x89PNG\r\n\x1a\n\x00\x00a cat"
BLUE = b"\x89PNG\r\n\x1a\n\x00\x00a blue cat"
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF"
PDF = b"%PDF-1.7\n\x00"
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(range(256)) * 10
NOTES = b"# Notes\n\nBuy milk."
URL = "https://files.test/pictures/dog.png"
NO_RETRY = Retries(attempts=0)


@tool
def look(where: str) -> str:
    """Look somewhere."""
    return f"looked {where}"


@tool(requires_approval=True)
def send(to: str) -> str:
    """Send it."""
    return f"sent to {to}"


def data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


PICTURE = picture(data_url("image/png", PNG))
PICTURES = [PICTURE]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def new_chat(store: Store, *script: Any, **options: Any) -> Chat:
    return create_chat(store, **{"model": "test", "llm": ScriptedLLM(*script), "retries": NO_RETRY, **options})


def shown(chat: Chat) -> list[dict[str, Any]]:
    """What the model was shown last."""
    return chat.options.llm.requests[-1]["messages"]


def counted(store: Store) -> dict[str, int]:
    with store.connection():
        return {name: getattr(store.records, name).select().count() for name in ("message", "attachment", "request")}


def files_of(store: Store) -> list[tuple[Any, ...]]:
    with store.connection():
        message, file = store.records.message, store.records.attachment
        query = file.select(message.role, file.position, file.media_type, file.filename, file.content, file.url)
        return [
            (*values, None if content is None else bytes(content), url)
            for *values, content, url in query.join(message).order_by(message.position, file.position).tuples()
        ]


# What comes with a message


def test_files_given_in_every_way_are_stored_with_the_message(store: Store, ask: Ask, tmp_path: Path):
    path = tmp_path / "cat.png"
    path.write_bytes(PNG)
    file = io.BytesIO(JPEG)
    file.name = "photo.jpg"
    chat = new_chat(store, "A cat.")

    ask(chat, "What is it?", files=[path, PDF, URL, ("notes.md", NOTES), file])

    assert files_of(store) == [
        ("user", 0, "image/png", "cat.png", PNG, None),
        ("user", 1, "application/pdf", None, PDF, None),
        ("user", 2, "image/png", "dog.png", None, URL),
        ("user", 3, "text/markdown", "notes.md", NOTES, None),
        ("user", 4, "image/jpeg", "photo.jpg", JPEG, None),
    ]
    hashes = [hashlib.sha256(content).hexdigest() for content in (PNG, PDF, NOTES, JPEG)]
    stored = [(row.size, row.sha256) for row in chat.attachments()]
    sizes = [len(content) for content in (PNG, PDF, NOTES, JPEG)]
    assert stored == [*zip(sizes[:2], hashes[:2], strict=True), (0, ""), *zip(sizes[2:], hashes[2:], strict=True)]
    assert rows(store, "message", "role", "content", "content_raw") == [
        ("user", "What is it?", {"attachments": 5}),
        ("assistant", "A cat.", None),
    ]
    assert shown(chat) == [
        user(
            [
                text("What is it?"),
                PICTURE,
                {"type": "file", "file": {"filename": "file.pdf", "file_data": data_url("application/pdf", PDF)}},
                picture(URL),
                text("File 'notes.md' (text/markdown):\n\n# Notes\n\nBuy milk."),
                picture(data_url("image/jpeg", JPEG)),
            ]
        )
    ]


def test_one_file_needs_no_list(store: Store, ask: Ask):
    chat = new_chat(store, "A cat.")
    ask(chat, "What is it?", files=PNG)
    assert shown(chat) == [user([text("What is it?"), PICTURE])]


def test_later_turns_see_the_files_as_the_first_one_did(store: Store, database_url: str, ask: Ask):
    """NodeLLM keeps no attachments: after a reload the model sees a question about nothing."""
    chat = new_chat(store, "A cat.", "Sure.")
    ask(chat, "What is it?", files=[PNG, ("notes.md", NOTES)])
    first = shown(chat)
    ask(chat, "Sure?")
    assert shown(chat) == [*first, said("A cat."), user("Sure?")]

    with connect(database_url) as other:
        again = load_chat(other, chat.id, llm=ScriptedLLM("Yes."))
        assert again is not None
        ask(again, "Really?")
        assert shown(again) == [*shown(chat), said("Sure."), user("Really?")]


def test_the_history_has_the_files(store: Store):
    chat = new_chat(store, "A cat.")
    chat.ask("What is it?", files=PNG)
    assert chat.history == [user([text("What is it?"), PICTURE]), said("A cat.")]


def test_the_files_are_written_in_the_transaction_of_the_message(store: Store, ask: Ask):
    with forbidden(store, "llm_attachment", at="INSERT"):
        chat = new_chat(store)
        with pytest.raises(Exception, match="forbidden"):
            ask(chat, "What is it?", files=PNG)

    assert counted(store) == {"message": 0, "attachment": 0, "request": 0}
    assert chat.options.llm.requests == []


class forbidden:
    """A trigger of the database's own that lets no row be written."""

    def __init__(self, store: Store, table: str, at: str):
        self.store, self.table, self.at = store, table, at

    def __enter__(self) -> None:
        with self.store.connection():
            run = self.store.database.execute_sql
            if self.store.is_sqlite:
                says = "BEGIN SELECT RAISE(ABORT, 'forbidden'); END"
                run(f"CREATE TRIGGER forbid BEFORE {self.at} ON {self.table} {says}")
                return
            run("CREATE FUNCTION forbid() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'forbidden'; END $$")
            run(f"CREATE TRIGGER forbid BEFORE {self.at} ON {self.table} FOR EACH ROW EXECUTE FUNCTION forbid()")

    def __exit__(self, *exc: object) -> None:
        with self.store.connection():
            if self.store.is_sqlite:
                self.store.database.execute_sql("DROP TRIGGER forbid")
            else:
                self.store.database.execute_sql("DROP FUNCTION forbid CASCADE")


def test_the_text_may_be_empty_where_there_are_files(store: Store, ask: Ask):
    chat = new_chat(store, "A cat.", "Yes.")
    ask(chat, " \n", files=PNG)
    ask(chat, "Sure?")

    assert rows(store, "message", "content", "content_raw")[0] == (None, {"attachments": 1})
    assert shown(chat) == [user(PICTURES), said("A cat."), user("Sure?")]


@pytest.mark.parametrize("files", [None, [], ()])
def test_without_files_a_message_has_a_text(store: Store, ask: Ask, files: Any):
    chat = new_chat(store, "Hello.")
    with pytest.raises(EmptyMessage):
        ask(chat, "", files=files)
    ask(chat, "Hi", files=files)
    assert rows(store, "message", "content", "content_raw") == [("Hi", None), ("Hello.", None)]


REFUSED: dict[str, tuple[Any, str]] = {
    "too large": (b"x" * 101, "is too large"),
    "a bad type": (("a.zip", b"PK\x03\x04\x00\xff"), "application/zip, which no model takes"),
    "missing": ("none.png", "there is no file 'none.png'"),
    "empty": (b"", "is empty"),
    "a good one and a bad one": ([PNG, b""], "is empty"),
    "no file": (7, r"cannot send 7 \(int\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_sent_is_refused_before_anything_is_written(store: Store, ask: Ask, case: str):
    files, message = REFUSED[case]
    chat = new_chat(store, "One.", max_file_bytes=100)
    ask(chat, "1?", files=PNG)
    before = counted(store)

    with pytest.raises(InvalidFile, match=message):
        ask(chat, "2?", files=files)

    assert counted(store) == before
    assert len(chat.options.llm.requests) == 1


def test_the_limit_of_a_file_can_be_another_for_one_turn(store: Store, ask: Ask):
    chat = new_chat(store, "One.", max_file_bytes=5)
    ask(chat, "1?", files=b"123456", max_file_bytes=6)
    with pytest.raises(InvalidFile, match="too large"):
        ask(chat, "2?", files=b"123456")
    with pytest.raises(InvalidValue, match="max_file_bytes='6': max_file_bytes must be 1 or more"):
        ask(chat, "2?", files=b"123456", max_file_bytes="6")


def test_a_failed_turn_keeps_its_files_and_retry_sends_them_again(store: Store, ask: Ask):
    chat = new_chat(store, ProviderError(400), ProviderError(400), "A cat.")
    with pytest.raises(ProviderError):
        ask(chat, "What is it?", files=PNG)
    assert counted(store) == {"message": 1, "attachment": 1, "request": 1}
    with pytest.raises(ProviderError):
        chat.retry()
    again = load_chat(store, chat.id, llm=chat.options.llm)
    assert again is not None

    again.retry()

    first, second, third = (request["messages"] for request in chat.options.llm.requests)
    assert first == second == third == [user([text("What is it?"), PICTURE])]
    assert counted(store)["attachment"] == 1


def test_history_leaves_earlier_files_out_and_never_the_questions_own(store: Store, ask: Ask):
    chat = new_chat(store, "A cat.", "A dog.", "Both.")
    ask(chat, "What is it?", files=PNG)
    ask(chat, "And this?", files=URL, history=0)
    assert shown(chat) == [user([text("And this?"), picture(URL)])]
    ask(chat, "Which?", history=1)
    assert shown(chat) == [user([text("And this?"), picture(URL)]), said("A dog."), user("Which?")]


def test_a_history_function_gets_copies_of_the_files(store: Store):
    chat = new_chat(store, "A cat.", "Yes.", "Yes.")
    chat.ask("What is it?", files=PNG)

    def spoil(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        messages[0]["content"].clear()
        return messages

    chat.ask("Sure?", history=spoil)
    assert shown(chat)[0] == user([])
    chat.ask("Sure?")
    assert shown(chat)[0] == user([text("What is it?"), PICTURE])


def test_files_that_are_not_to_be_stored_are_seen_on_their_own_turn_and_told_of_later(store: Store, ask: Ask):
    chat = new_chat(store, Call("look", where="up"), "A cat.", "Yes.", "Yes.", store_files=False, tools=[look])
    ask(chat, "What is it?", files=[PNG, ("notes.md", NOTES), URL])
    question = user([text("What is it?"), PICTURE, text("File 'notes.md' (text/markdown):\n\n# Notes\n\nBuy milk.")])
    question["content"].append(picture(URL))
    assert [request["messages"][0] for request in chat.options.llm.requests] == [question, question]
    assert [row[2:] for row in files_of(store)] == [
        ("image/png", None, None, None),
        ("text/markdown", "notes.md", None, None),
        ("image/png", "dog.png", None, URL),
    ]
    assert [(row.size, row.sha256) for row in chat.attachments()][:2] == [
        (len(content), hashlib.sha256(content).hexdigest()) for content in (PNG, NOTES)
    ]

    ask(chat, "Sure?")
    note = f"[File without a name (image/png, {len(PNG)} bytes) came with this message; its content was not kept.]"
    told = f"[File 'notes.md' (text/markdown, {len(NOTES)} bytes) came with this message; its content was not kept.]"
    assert shown(chat)[0] == user([text("What is it?"), text(note), text(told), picture(URL)])
    again = load_chat(store, chat.id, llm=ScriptedLLM("Yes."))
    assert again is not None
    ask(again, "Really?")
    assert shown(again)[0] == shown(chat)[0]


def test_files_go_with_their_message_and_with_their_chat(store: Store):
    chat = new_chat(store, "A cat.", Say("Here.", images=[BLUE]), "A dog.")
    chat.ask("What is it?", files=PNG)
    chat.ask("Make it blue.")
    with store.connection():
        store.records.message.delete().where(store.records.message.position == 0).execute()
    assert [row[4] for row in files_of(store)] == [BLUE]

    chat.delete()

    assert counted(store) == {"message": 0, "attachment": 0, "request": 2}


def test_attachments_reads_the_files_of_the_chat_or_of_a_message(store: Store):
    chat = new_chat(store, "A cat.", Say("Here.", images=[BLUE]))
    other = new_chat(store, "A dog.")
    other.ask("What is it?", files=URL)
    chat.ask("What is it?", files=[PNG, PDF])
    reply = chat.ask("Make it blue.", files=JPEG)
    question = chat.messages()[2]

    assert [row.content for row in chat.attachments()] == [PNG, PDF, JPEG, BLUE]
    assert [row.content for row in chat.attachments(question)] == [JPEG]
    assert [row.content for row in chat.attachments(reply.id)] == [BLUE]
    assert [row.content for row in chat.attachments(str(reply.id))] == [BLUE]
    assert chat.attachments(other.messages()[0]) == []
    assert [row.filename for row in asyncio.run(chat.aattachments(reply))] == ["image_1.png"]
    assert len(asyncio.run(chat.aattachments())) == 4


def test_without_rows_for_requests_and_tool_calls_files_are_kept_all_the_same(store: Store, ask: Ask):
    nothing = {"requests": False, "tool_calls": False}
    script = Call("look", where="up"), Say("Here.", images=[BLUE]), "Yes."
    chat = new_chat(store, *script, persistence=nothing, tools=[look])
    ask(chat, "Make it blue.", files=PNG)
    assert [row[4] for row in files_of(store)] == [PNG, BLUE]
    ask(chat, "Sure?")
    assert shown(chat)[0] == user([text("Make it blue."), PICTURE])
    assert shown(chat)[3] == said("Here.", images=[picture(data_url("image/png", BLUE))])
    assert counted(store)["request"] == 0


def test_tables_of_other_names_have_files_too(database_url: str):
    with connect(database_url, table_prefix="app_", table_names={"attachment": "app_file"}) as store:
        store.create_tables()
        chat = new_chat(store, "A cat.", "Yes.")
        chat.ask("What is it?", files=PNG)
        chat.fork().ask("Sure?", llm=(llm := ScriptedLLM("Yes.")))
        assert llm.requests[0]["messages"][0] == user([text("What is it?"), PICTURE])
        store.drop_tables()


class Painter(Agent):
    model = "test"
    instructions = "Paint."


def test_a_session_takes_files_and_shows_them_after_a_deploy(store: Store, ask: Ask):
    llm = ScriptedLLM(Say("Here.", images=[BLUE]), "Yes.")
    session = create_agent_session(store, Painter, llm=llm)
    ask(session, "Make it blue.", files=PNG)
    again = load_agent_session(store, Painter, session.id, llm=llm)
    assert again is not None
    ask(again, "Sure?")
    assert llm.requests[-1]["messages"] == [
        {"role": "system", "content": "Paint."},
        user([text("Make it blue."), PICTURE]),
        said("Here.", images=[picture(data_url("image/png", BLUE))]),
        user("Sure?"),
    ]


# Masks


def test_a_mask_that_holds_for_the_database_holds_for_texts_that_come_as_files(store: Store, ask: Ask):
    chat = new_chat(store, "Fine.", "Yes.", middlewares=[PIIMask(stored=True)])
    ask(chat, "Write to ada@example.com", files=[("ada@example.com.txt", b"bob@example.com wrote"), PNG])

    assert [row[2:5] for row in files_of(store)] == [
        ("text/plain", "[REDACTED]", b"[REDACTED] wrote"),
        ("image/png", None, PNG),
    ]
    kept = chat.attachments()[0]
    assert (kept.size, kept.sha256) == (16, hashlib.sha256(b"[REDACTED] wrote").hexdigest())
    ask(chat, "Sure?")
    first, second = (request["messages"][0]["content"] for request in chat.options.llm.requests)
    assert first[0] == second[0] == text("Write to [REDACTED]")
    assert first[1]["text"].endswith("\n\n[REDACTED] wrote")
    assert "example" not in json.dumps([first, second])
    assert first[2] == second[2] == PICTURE


def test_a_mask_of_what_the_model_sees_leaves_the_stored_file_alone(store: Store):
    chat = new_chat(store, "Fine.", middlewares=[PIIMask()])
    chat.ask("Hi", files=("a.txt", b"bob@example.com wrote"))
    assert files_of(store)[0][4] == b"bob@example.com wrote"
    assert "example" not in json.dumps(shown(chat))


# What a provider takes


def test_sound_for_a_provider_that_takes_none_is_refused_before_anything_is_written(store: Store, ask: Ask):
    chat = new_chat(store, llm=ScriptedLLM(provider="anthropic"))
    with pytest.raises(InvalidFile, match="a file without a name is audio/wav, and anthropic takes no sound"):
        ask(chat, "What is it?", files=[PNG, WAV])
    assert counted(store) == {"message": 0, "attachment": 0, "request": 0}


def test_sound_is_refused_where_a_fallback_would_not_hear_it(store: Store, ask: Ask, real_litellm: None):
    chat = create_chat(store, model="openai/gpt-4o", fallbacks=["anthropic/claude-sonnet-4-5"], llm=LLM(api_key="k"))
    with pytest.raises(InvalidFile, match="anthropic takes no sound"):
        ask(chat, "What is it?", files=WAV)
    assert counted(store)["message"] == 0


def test_a_fallback_is_shown_the_files(store: Store, ask: Ask):
    fallbacks = Fallbacks(("other",), on=(ProviderError,))
    chat = new_chat(store, ProviderError(400), "A cat.", fallbacks=fallbacks, store_files=False)
    ask(chat, "What is it?", files=PNG)
    first, second = chat.options.llm.requests
    assert (first["model"], second["model"]) == ("test", "other")
    assert first["messages"] == second["messages"] == [user([text("What is it?"), PICTURE])]


# What a model makes


DRAWN = Say("Here they are.", images=[PNG, JPEG])


def test_pictures_that_a_model_makes_are_stored_with_its_reply(store: Store, ask: Ask):
    chat = new_chat(store, DRAWN)
    reply = ask(chat, "Draw a cat.")

    assert reply.content_raw["attachments"] == 2
    assert rows(store, "message", "content", "content_raw")[1] == ("Here they are.", reply.content_raw)
    assert files_of(store) == [
        ("assistant", 0, "image/png", "image_1.png", PNG, None),
        ("assistant", 1, "image/jpeg", "image_2.jpg", JPEG, None),
    ]


def test_the_model_is_shown_its_pictures_again(store: Store, ask: Ask):
    chat = new_chat(store, DRAWN, "Done.")
    ask(chat, "Draw a cat.")
    ask(chat, "Bluer.")
    images = [PICTURE, picture(data_url("image/png", JPEG).replace("image/png", "image/jpeg"))]
    expected = [user("Draw a cat."), said("Here they are.", images=images), user("Bluer.")]
    assert shown(chat) == expected
    again = load_chat(store, chat.id, llm=ScriptedLLM("Done."))
    assert again is not None
    ask(again, "Bluer still.")
    assert shown(again) == [*expected, said("Done."), user("Bluer still.")]


def test_a_reply_of_pictures_alone_is_part_of_the_history(store: Store, ask: Ask):
    chat = new_chat(store, Say(images=[PNG]), "Done.")
    reply = ask(chat, "Draw a cat.")
    assert (reply.content, reply.status) == (None, "completed")
    ask(chat, "Bluer.")
    assert shown(chat) == [user("Draw a cat."), said(None, images=PICTURES), user("Bluer.")]


def test_another_provider_is_shown_words_in_the_place_of_pictures_alone(store: Store, ask: Ask):
    chat = new_chat(store, Say(images=[PNG]), DRAWN)
    ask(chat, "Draw a cat.")
    ask(chat, "Another.")
    ask(chat, "Bluer.", llm=(other := ScriptedLLM("Done.", provider="other")))
    assert other.requests[0]["messages"] == [
        user("Draw a cat."),
        said("[A picture came with this message; it cannot be shown to this model.]"),
        user("Another."),
        said("Here they are."),
        user("Bluer."),
    ]


def test_openai_which_takes_no_pictures_back_is_told_of_its_own(store: Store, ask: Ask):
    chat = new_chat(store, llm=ScriptedLLM(Say(images=[PNG]), DRAWN, "Done.", provider="openai"))
    ask(chat, "Draw a cat.")
    ask(chat, "Another.")
    ask(chat, "Bluer.")
    assert [message["content"] for message in shown(chat)[1::2]] == [
        "[A picture came with this message; it cannot be shown to this model.]",
        "Here they are.",
    ]
    assert "images" not in json.dumps(shown(chat))


def test_pictures_of_a_round_with_tools_stay_in_their_round(store: Store, ask: Ask):
    script = Say("Like this?", images=[PNG], calls=[Call("look", where="up")]), Say(images=[BLUE]), "Done."
    chat = new_chat(store, *script, tools=[look])
    ask(chat, "Draw a cat.")
    within = shown(chat)
    assert within[1]["images"] == PICTURES
    ask(chat, "Bluer.")
    expected = [*within, said(None, images=[picture(data_url("image/png", BLUE))]), user("Bluer.")]
    assert shown(chat) == expected
    again = load_chat(store, chat.id, llm=ScriptedLLM("Done."))
    assert again is not None
    ask(again, "Bluer still.")
    assert shown(again)[:-2] == expected


def test_a_turn_that_is_taken_up_again_shows_files_and_pictures_as_they_were(store: Store, database_url: str, ask: Ask):
    chat = new_chat(store, Say("Like this?", images=[BLUE], calls=[Call("send", to="Ada")]), tools=[send])
    parked = ask(chat, "Make it blue.", files=PNG)
    assert parked.status == "pending"
    chat.approve(chat.pending_approvals()[0])

    with connect(database_url) as other:
        again = load_chat(other, chat.id, llm=ScriptedLLM("Done.", "Yes."), tools=[send])
        assert again is not None
        again.resume()
        resumed = shown(again)
        assert resumed[0] == user([text("Make it blue."), PICTURE])
        assert resumed[1]["images"] == [picture(data_url("image/png", BLUE))]
        assert "attachments" not in resumed[1]
        ask(again, "Sure?")
        assert shown(again) == [*resumed, said("Done."), user("Sure?")]


def test_sound_that_a_model_makes_is_stored_and_what_is_said_in_it_is_the_reply(store: Store, ask: Ask):
    chat = new_chat(store, Say("Meow, says the cat.", audio=WAV), "Yes.")
    reply = ask(chat, "Speak.")
    assert (reply.content, reply.content_raw["attachments"]) == ("Meow, says the cat.", 1)
    assert files_of(store) == [("assistant", 0, "audio/wav", "audio_1.wav", WAV, None)]
    ask(chat, "Sure?")
    assert shown(chat) == [user("Speak."), said("Meow, says the cat."), user("Sure?")]


def test_sound_without_words_is_told_of(store: Store, ask: Ask):
    chat = new_chat(store, Say(audio=WAV), "Yes.")
    assert ask(chat, "Hum.").content is None
    ask(chat, "Sure?")
    note = "[A sound file came with this message; it cannot be shown to this model.]"
    assert shown(chat) == [user("Hum."), said(note), user("Sure?")]


def test_what_a_model_makes_is_kept_where_files_are_not(store: Store):
    """Nowhere else could an application get it from."""
    chat = new_chat(store, DRAWN, store_files=False)
    chat.ask("Make it blue.", files=BLUE)
    assert [row[4] for row in files_of(store)] == [None, PNG, JPEG]


def test_a_reply_that_is_rolled_back_leaves_no_files(store: Store, ask: Ask):
    chat = new_chat(store, Say("Like this?", images=[PNG], calls=[Call("look", where="up")]), ProviderError(400))
    with pytest.raises(ProviderError):
        ask(chat, "Draw a cat.", tools=[look])
    assert counted(store) == {"message": 1, "attachment": 0, "request": 2}


@pytest.mark.parametrize("way", ["ask_stream", "aask_stream"])
def test_pictures_of_a_broken_reply_are_kept_where_it_is(store: Store, way: str):
    broken = Say("Here", images=[PNG], error=ProviderError(400))
    chat = new_chat(store, broken, "Done.", on_error="keep")
    with pytest.raises(ProviderError):
        WAYS[way](chat, "Draw a cat.")
    assert rows(store, "message", "status", "content")[1] == ("failed", "Here")
    assert [row[4] for row in files_of(store)] == [PNG]
    chat.ask("Go on.")
    assert shown(chat)[1] == said("Here", images=PICTURES)
    chat.options.llm.add(Say(images=[BLUE], error=ProviderError(400)), "Whole.")
    with pytest.raises(ProviderError):
        WAYS[way](chat, "Another.")
    assert [row[4] for row in files_of(store)] == [PNG, BLUE]
    chat.retry()
    assert [row[4] for row in files_of(store)] == [PNG]


class Critic:
    """Says once what it is told to say."""

    def __init__(self, directive: Any):
        self.directive = directive

    def on_response(self, context: Any, reply: Any) -> Any:
        directive, self.directive = self.directive, None
        return directive


def test_pictures_of_a_reply_that_was_sent_back_are_not_kept(store: Store, ask: Ask):
    chat = new_chat(store, DRAWN, Say("Bluer.", images=[BLUE]), "Yes.", middlewares=[Critic(RETRY("Bluer, please."))])
    ask(chat, "Draw a cat.")
    assert [row[1:5] for row in files_of(store)] == [(0, "image/png", "image_1.png", BLUE)]
    assert chat.messages()[1].content_raw["attachments"] == 1
    ask(chat, "Sure?")
    assert shown(chat)[1] == said("Bluer.", images=[picture(data_url("image/png", BLUE))])


def test_pictures_of_a_reply_that_was_replaced_are_not_kept(store: Store, ask: Ask):
    chat = new_chat(store, DRAWN, "Yes.", middlewares=[Critic(REPLACE("No cats."))])
    ask(chat, "Draw a cat.")
    assert files_of(store) == []
    ask(chat, "Sure?")
    assert shown(chat)[1] == said("No cats.")


def test_a_hook_that_changes_the_text_alone_leaves_the_pictures(store: Store, ask: Ask):
    chat = new_chat(store, DRAWN, "Yes.").after_response(lambda reply: replace(reply, content=reply.content.upper()))
    ask(chat, "Draw a cat.")
    assert [row[4] for row in files_of(store)] == [PNG, JPEG]
    ask(chat, "Sure?")
    assert shown(chat)[1]["content"] == "HERE THEY ARE."
    assert len(shown(chat)[1]["images"]) == 2


# On the wire


def on_the_wire(provider: Provider, wire: str) -> dict[str, Any]:
    """Keywords of a chat."""
    settings = getattr(provider, wire)()
    return {"model": settings.pop("model"), "llm": LLM(**settings), "retries": NO_RETRY}


def conversation(body: dict[str, Any]) -> list[Any]:
    return body["contents"] if "contents" in body else body["messages"]


@pytest.mark.parametrize("way", ["ask", "aask_stream"])
@pytest.mark.parametrize("wire", ["openai", "anthropic", "gemini"])
def test_the_bodies_of_later_turns_begin_with_those_of_earlier_ones(
    sqlite_store: Store, provider: Provider, wire: str, way: str
):
    ask = WAYS[way]
    settings = on_the_wire(provider, wire)
    chat = create_chat(sqlite_store, **settings, tools=[look])
    called = Answer("Let me look.", tool_calls=[ProviderCall("look", {"where": "up"}, signature="c2ln")])
    provider.reply(called, "A cat.", "Yes.", "Yes!")
    sound = [] if wire == "anthropic" else [WAV]
    ask(chat, "What is it?", files=[PNG, PDF, ("notes.md", NOTES), *sound])
    ask(chat, "Sure?")
    again = load_chat(sqlite_store, chat.id, **settings, tools=[look])
    assert again is not None
    ask(again, "Really?")

    bodies = [conversation(request.body) for request in provider.requests]
    for earlier, later in itertools.pairwise(bodies):
        assert later[: len(earlier)] == earlier
    assert base64.b64encode(PNG).decode() in json.dumps(bodies[0])
    assert len({json.dumps(body[0]) for body in bodies}) == 1


def test_streamed_or_not_a_model_leaves_the_same_files(sqlite_store: Store, provider: Provider):
    left = []
    for ask in WAYS.values():
        chat = create_chat(sqlite_store, **on_the_wire(provider, "gemini"))
        provider.reply(Answer("Here.", images=[PNG, BLUE]))
        reply = ask(chat, "Draw a cat.")
        files = [(row.position, row.media_type, row.filename, row.content) for row in chat.attachments(reply)]
        left.append((reply.content, reply.content_raw, files))
    assert left[0][2] == [(0, "image/png", "image_1.png", PNG), (1, "image/png", "image_2.png", BLUE)]
    assert left == left[:1] * 4


def test_spoken_replies_of_openais_leave_the_same_files_streamed_or_not(sqlite_store: Store, provider: Provider):
    left = []
    for ask in WAYS.values():
        chat = create_chat(sqlite_store, **on_the_wire(provider, "openai"))
        provider.reply(Answer("Meow.", audio=WAV), "Yes.")
        reply = ask(chat, "Speak.")
        files = [(row.media_type, row.filename, row.content) for row in chat.attachments(reply)]
        left.append((reply.content, reply.content_raw, files))
        ask(chat, "Sure?")
        spoken = conversation(provider.requests[-1].body)[1]
        assert (spoken["role"], spoken["content"], "images" in spoken) == ("assistant", "Meow.", False)
    assert left[0][0] == "Meow."
    assert left[0][2] == [("audio/wav", "audio_1.wav", WAV)]
    assert left == left[:1] * 4


@pytest.mark.parametrize("way", ["ask", "aask_stream"])
def test_gemini_is_shown_its_pictures_again_and_others_are_not(sqlite_store: Store, provider: Provider, way: str):
    ask = WAYS[way]
    chat = create_chat(sqlite_store, **on_the_wire(provider, "gemini"))
    provider.reply(Answer("Here.", images=[PNG]), Answer(images=[BLUE]), "Yes.", "Yes.", "Yes.")
    ask(chat, "Draw a cat.")
    ask(chat, "In blue.")
    ask(chat, "Sure?")
    first, second = conversation(provider.requests[-1].body)[1::2]
    inline = {"mime_type": "image/png", "data": base64.b64encode(PNG).decode()}
    assert first["parts"] == [{"text": "Here."}, {"inline_data": inline}]
    assert [list(part) for part in second["parts"]] == [["inline_data"]]

    for wire in ("openai", "anthropic"):
        other = load_chat(sqlite_store, chat.id, **on_the_wire(provider, wire))
        assert other is not None
        ask(other, "And you?")
        body = json.dumps(conversation(provider.requests[-1].body))
        assert base64.b64encode(PNG).decode() not in body
        assert "[A picture came with this message; it cannot be shown to this model.]" in body


def test_anthropic_is_told_of_sound_that_another_heard(sqlite_store: Store, provider: Provider):
    chat = create_chat(sqlite_store, **on_the_wire(provider, "openai"))
    provider.reply("A cat.", "I cannot hear it.")
    chat.ask("What is it?", files=WAV)
    other = load_chat(sqlite_store, chat.id, **on_the_wire(provider, "anthropic"))
    assert other is not None
    other.ask("And you?")
    heard = conversation(provider.requests[-1].body)[0]["content"]
    note = "[A sound file came with this message; it cannot be shown to this model.]"
    assert [part["text"] for part in heard] == ["What is it?", note]

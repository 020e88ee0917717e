"""Files: read and checked, as parts of a message on the wires of three providers, and back from what a model made."""

import asyncio
import base64
import hashlib
import io
import json
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from provider import Answer, Provider
from provider import gemini as gemini_wire
from provider import openai as openai_wire
from provider.script import sse

from llm_orm import LLM
from llm_orm.attachments import (
    MadeFiles,
    attachments_of,
    check_taken,
    for_provider,
    message_content,
    parts_of,
    reference_only,
    replayed_images,
)
from llm_orm.errors import InvalidFile
from llm_orm.values import Attachment

PNG = b"\x89PNG\r\n\x1a\n\x00\x00"
PDF = b"%PDF-1.7\n\x00"
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt "
MP3 = b"ID3\x04\x00\x00"
SAMPLES = {
    "image/png": PNG,
    "image/jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "image/gif": b"GIF89a\x01\x00",
    "image/webp": b"RIFF\x24\n\x00\x00WEBPVP8 ",
    "image/heic": b"\x00\x00\x00\x18ftypheic",
    "application/pdf": PDF,
    "audio/wav": WAV,
    "audio/mpeg": MP3,
    "audio/ogg": b"OggS\x00\x02",
    "audio/flac": b"fLaC\x00\x00",
    "audio/mp4": b"\x00\x00\x00\x1cftypM4A ",
    "audio/aac": b"\xff\xf1\x50\x80",
}


def made_by_model(message: Any) -> list[Attachment]:
    """Pictures and sound in a reply of litellm's; never raises."""
    made = MadeFiles()
    made.add(message)
    return made.attachments()


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hosts other than this one that were looked for, and not found."""
    monkeypatch.setenv("LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS", "True")
    hosts: list[str] = []
    find = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host == "127.0.0.1":
            return find(host, *args, **kwargs)
        hosts.append(host)
        raise socket.gaierror(f"no network: {host}")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return hosts


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{encoded(content)}"


def only(files: Any, **limits: Any) -> Attachment:
    (attachment,) = attachments_of(files, **limits)
    return attachment


# What a caller gives


@pytest.mark.parametrize("media_type", SAMPLES)
def test_the_content_says_what_a_file_is_whatever_its_name_says(media_type: str):
    assert only(SAMPLES[media_type]).media_type == media_type
    assert only(("notes.txt", SAMPLES[media_type])).media_type == media_type
    assert only(Attachment("image/png", content=SAMPLES[media_type])).media_type == media_type


@pytest.mark.parametrize("start", [b"\xff\xfb\x90\x64", b"\xff\xf3\x40\xc0", b"\xff\xe3\x18\xc4"])
def test_an_mp3_without_tags_is_one(start: bytes):
    assert only(start).media_type == "audio/mpeg"


@pytest.mark.parametrize(
    ("name", "content", "media_type"),
    [
        ("song.MP3", b"\x00\x01 no signature", "audio/mpeg"),
        ("scan.pdf", b"\x00 %PDF-1.7", "application/pdf"),
        ("notes.md", b"# Notes", "text/markdown"),
        ("table.csv", b"a,b", "text/csv"),
        ("data.json", b"{}", "application/json"),
        ("drawing.svg", b"<svg/>", "image/svg+xml"),
        ("program.ts", b"let a = 1", "text/plain"),
        ("film.mp4", b"not a film", "text/plain"),
        ("song.mp3", b"no signature", "audio/mpeg"),
        ("data.csv.gz", b"not packed", "text/plain"),
        ("README", b"\xef\xbb\xbfHello", "text/plain"),
        ("greeting.xyz123", "Grüße".encode(), "text/plain"),
        (None, b"ID3 is a format, GIF another", "text/plain"),
    ],
)
def test_a_file_without_a_signature_is_what_its_name_says_or_text(name: str | None, content: bytes, media_type: str):
    assert only(content if name is None else (name, content)).media_type == media_type


class Upload:
    """As web frameworks hand them over."""

    filename = "cat.png"

    async def read(self, size: int = -1) -> bytes:
        return PNG


def named(name: str, stream: Any) -> Any:
    stream.name = name
    return stream


GIVEN: dict[str, Callable[[Path], Any]] = {
    "a path": lambda path: path,
    "a path as text": str,
    "a list of paths": lambda path: [str(path)],
    "a generator": lambda path: (each for each in [path]),
    "a name and bytes": lambda path: ("cat.png", path.read_bytes()),
    "an open file": lambda path: named(f"{path.parent}/cat.png", io.BytesIO(path.read_bytes())),
    "an attachment": lambda path: Attachment("", "cat.png", path.read_bytes()),
    "a data: URL in an attachment": lambda path: Attachment("", "cat.png", url=data_url("", path.read_bytes())),
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_file_can_be_given_in_many_ways(tmp_path: Path, given: str):
    path = tmp_path / "cat.png"
    path.write_bytes(PNG)

    attachments = attachments_of(GIVEN[given](path))

    assert attachments == (
        Attachment("image/png", "cat.png", PNG, size=len(PNG), sha256=hashlib.sha256(PNG).hexdigest()),
    )


@pytest.mark.parametrize("given", [PNG, bytearray(PNG), memoryview(PNG), io.BytesIO(PNG), data_url("image/png", PNG)])
def test_a_file_needs_no_name(given: Any):
    assert (only(given).content, only([PNG]).filename) == (PNG, None)


def test_a_tuple_of_two_is_two_files_unless_it_is_a_name_and_bytes(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"Hello")
    path = str(tmp_path / "a.txt")

    assert [each.content for each in attachments_of((PNG, PDF))] == [PNG, PDF]
    assert [each.content for each in attachments_of((path, path))] == [b"Hello", b"Hello"]
    assert [each.content for each in attachments_of((path, PNG, PDF))] == [b"Hello", PNG, PDF]
    assert [each.content for each in attachments_of((path, PNG))] == [PNG]


def test_an_attachment_is_taken_at_its_word_where_its_content_says_nothing():
    raw = b"\x00\x01"
    assert only(Attachment("Audio/MPEG; codecs=mp3", "a.png", raw)).media_type == "audio/mpeg"
    assert only(Attachment("application/octet-stream", content=b"Hello")).media_type == "text/plain"
    assert only(Attachment("text/csv", url="data:text/plain,a")).media_type == "text/csv"
    assert only("data:text/html,a").media_type == "text/html"


def test_an_attachment_keeps_its_address_beside_its_content():
    given = Attachment("image/png", content=PNG, url="https://files.test/cat.png")
    assert (only(given).content, only(given).url) == (PNG, given.url)
    assert only(Attachment("", content=MP3, url=data_url("image/png", PNG))).content == MP3


def test_no_files_are_none():
    assert attachments_of(None) == attachments_of([]) == ()


def test_files_keep_their_order():
    attachments = attachments_of([PNG, ("notes.txt", b"Hello"), "https://files.test/a.pdf", PDF])

    assert [each.media_type for each in attachments] == [
        "image/png",
        "text/plain",
        "application/pdf",
        "application/pdf",
    ]


def test_an_open_file_is_read_from_where_it_stands_and_left_open(tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_bytes(b"one\ntwo\n")
    with path.open("rb") as binary, path.open(encoding="utf-8") as text:
        binary.readline()
        text.readline()

        assert [each.content for each in attachments_of([binary, text])] == [b"two\n", b"two\n"]
        assert [each.filename for each in attachments_of([io.BytesIO(b"x")])] == [None]
        assert not binary.closed
        assert not text.closed


def test_a_file_that_gives_little_at_a_time_is_read_to_its_end():
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(1)

    assert only(Slow(b"Hello")).content == b"Hello"
    with pytest.raises(InvalidFile, match="more than"):
        attachments_of(Slow(b"Hello"), max_bytes=4)


def test_a_temporary_file_has_a_number_for_a_name():
    with tempfile.TemporaryFile() as file:
        file.write(b"Hello")
        file.seek(0)
        assert only(file).filename is None


@pytest.mark.parametrize(
    ("url", "media_type", "filename"),
    [
        ("https://files.test/pictures/cat.png?width=20#top", "image/png", "cat.png"),
        ("HTTP://files.test/my%20cat.JPEG", "image/jpeg", "my cat.JPEG"),
        ("https://files.test/report.pdf", "application/pdf", "report.pdf"),
    ],
)
def test_an_address_is_kept_and_not_fetched(url: str, media_type: str, filename: str, looked_up: list[str]):
    assert only(url) == Attachment(media_type, filename, url=url)
    assert looked_up == []


def test_an_address_that_does_not_say_what_is_there_can_be_told():
    url = "https://files.test/picture?id=7"
    with pytest.raises(InvalidFile, match=r"picture\?id=7.*Attachment\(media_type="):
        attachments_of(url)

    assert only(Attachment("image/jpg", url=url)) == Attachment("image/jpeg", "picture", url=url)
    assert only(Attachment("", "cat.png", url=url)) == Attachment("image/png", "cat.png", url=url)
    assert only(Attachment("image/png", url="https://files.test/")).filename is None


@pytest.mark.parametrize(
    ("url", "media_type", "content"),
    [
        ("data:text/plain;charset=utf-8,Gr%C3%BC%C3%9Fe", "text/plain", "Grüße".encode()),
        ("data:,Hello", "text/plain", b"Hello"),
        ("DATA:audio/x-made-up;BASE64," + encoded(WAV), "audio/wav", WAV),
        ("data:image/png;base64," + encoded(PNG).rstrip("=").replace("g", "%67"), "image/png", PNG),
    ],
)
def test_a_data_url_is_decoded(url: str, media_type: str, content: bytes):
    assert (only(url).media_type, only(url).content, only(url).url) == (media_type, content, None)


def test_a_name_that_no_database_holds_is_made_storable(tmp_path: Path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    Path(os.fsdecode(path)).write_bytes(b"Hello")

    assert only(os.fsdecode(path)).filename == '"caf\\udce9.txt"'
    assert only(("a\x00b.txt", b"Hello")).filename == '"a\\u0000b.txt"'


def closed() -> io.BytesIO:
    file = io.BytesIO(b"Hello")
    file.close()
    return file


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda folder: folder / "none.png", r"there is no file '.*none\.png'"),
    "a folder": (lambda folder: str(folder), r"'.*' is a folder"),
    "a pipe": (lambda folder: os.mkfifo(folder / "pipe") or folder / "pipe", r"'.*pipe' is not a file"),
    "no path": (lambda folder: "a\x00b", r"cannot read 'a\\x00b': embedded null byte"),
    "a long text": (lambda folder: "What is this? " * 500, r"cannot read 'What.*….*': File name too long"),
    "empty": (lambda folder: ("empty.txt", b""), r"'empty\.txt' is empty"),
    "empty, without a name": (lambda folder: [PNG, b""], r"a file without a name is empty"),
    "packed": (lambda folder: ("a.zip", b"PK\x03\x04\x00\xff"), r"'a\.zip' is application/zip.*PNG.*PDF.*WAV.*UTF-8"),
    "a film": (lambda folder: ("a.mp4", b"\x00\x00\x00\x18ftypmp42"), r"'a\.mp4' is video/mp4, which no model takes"),
    "anything": (lambda folder: b"\x00\xff", r"a file without a name is application/octet-stream"),
    "Latin-1": (lambda folder: ("a.txt", "Grüße".encode("latin-1")), r"'a\.txt' \(text/plain\) is not in UTF-8"),
    "text with NUL": (lambda folder: ("a.csv", b"a\x00b"), r"'a\.csv' \(text/csv\) is not in UTF-8"),
    "a closed file": (lambda folder: closed(), "cannot read a file without a name: .*closed"),
    "an upload": (lambda folder: Upload(), r"async: give \(filename, await file\.read\(\)\)"),
    "no file": (lambda folder: [None], r"cannot send None \(NoneType\): a file is given as"),
    "a tuple of tuples": (lambda folder: [("a.png", "b.png")], r"cannot send \('a\.png', 'b\.png'\) \(tuple\)"),
    "a number": (lambda folder: 7, r"cannot send 7 \(int\)"),
    "sound by address": (lambda folder: "https://files.test/a.mp3", r"a\.mp3' is audio/mpeg: by address, only"),
    "text by address": (lambda folder: "https://files.test/a.html", r"a\.html' is text/html: by address, only"),
    "no address": (lambda folder: "https://[files.test/a.png", "is no valid address"),
    "a broken data: URL": (lambda folder: "data:image/png;base64,a", r"'data:.*' is no valid data: URL"),
    "half a data: URL": (lambda folder: "data:image/png", r"'data:image/png' is no valid data: URL"),
    "nothing": (lambda folder: Attachment("image/png", "a.png"), r"'a\.png' has neither content nor an address"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sent_is_named(tmp_path: Path, case: str):
    files, message = REFUSED[case]
    with pytest.raises(InvalidFile, match=message):
        attachments_of(files(tmp_path))


def test_a_file_opened_to_write_is_refused(tmp_path: Path):
    with (tmp_path / "out.txt").open("wb") as file, pytest.raises(InvalidFile, match=r"cannot read 'out\.txt': read"):
        attachments_of(file)


def test_a_text_file_in_another_encoding_is_refused(tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_bytes("Grüße".encode("latin-1"))
    with path.open(encoding="utf-8") as file, pytest.raises(InvalidFile, match=r"cannot read 'notes\.txt': 'utf-8'"):
        attachments_of(file)
    with path.open(encoding="latin-1") as file:
        assert only(file).content == "Grüße".encode()
    with (
        path.open(encoding="utf-8", errors="surrogateescape") as file,
        pytest.raises(InvalidFile, match="not in UTF-8"),
    ):
        attachments_of(file)


def test_a_read_that_gives_no_bytes_is_refused():
    class Odd:
        def read(self, size: int) -> int:
            return 7

    with pytest.raises(InvalidFile, match=r"its read\(\) gave 7"):
        attachments_of(Odd())


@pytest.mark.parametrize("given", ["a path", "a name and bytes", "an open file", "an attachment"])
def test_a_file_has_a_size_limit_which_it_may_reach(tmp_path: Path, given: str):
    path = tmp_path / "cat.png"
    path.write_bytes(PNG + bytes(2 * 1024 * 1024 - len(PNG)))
    assert only(GIVEN[given](path), max_bytes=2 * 1024 * 1024).size == 2 * 1024 * 1024

    with pytest.raises(
        InvalidFile, match=r"cat\.png' is too large: it has (more than 1\.5|2) MB, and 1\.5 MB are the limit; make it"
    ):
        attachments_of(GIVEN[given](path), max_bytes=1536 * 1024)


def test_without_saying_so_the_limit_is_twenty_megabytes():
    with pytest.raises(InvalidFile, match=r"20\.01 MB, and 20 MB are the limit"):
        attachments_of(bytes(20 * 1024 * 1024 + 1))


# What a model is shown


FORMATS = ("openai", "anthropic", "gemini")


def sent(provider: Provider, wire: str, messages: list[Any], ask: str = "completion") -> list[Any]:
    """The parts of the first message, as they came over the wire."""
    provider.reply("ok")
    settings = getattr(provider, wire)()
    llm, keywords = LLM(**{k: v for k, v in settings.items() if k != "model"}), {"max_retries": 0, "messages": messages}
    if ask == "completion":
        llm.completion(model=settings["model"], **keywords)
    else:
        asyncio.run(llm.acompletion(model=settings["model"], **keywords))
    body = provider.requests[-1].body
    message = body["contents" if wire == "gemini" else "messages"][-1]
    return message["parts" if wire == "gemini" else "content"]


def asked(*files: Any, text: str = "What is it?") -> list[Any]:
    return [{"role": "user", "content": message_content(text, attachments_of(list(files)))}]


ON_THE_WIRE: dict[str, tuple[Any, dict[str, Any]]] = {
    "a picture": (
        ("cat.png", PNG),
        {
            "openai": {"type": "image_url", "image_url": {"url": data_url("image/png", PNG)}},
            "anthropic": {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": encoded(PNG)},
            },
            "gemini": {"inline_data": {"mime_type": "image/png", "data": encoded(PNG)}},
        },
    ),
    "a picture's address": (
        "https://files.test/cat.png",
        {
            "openai": {"type": "image_url", "image_url": {"url": "https://files.test/cat.png"}},
            "anthropic": {"type": "image", "source": {"type": "url", "url": "https://files.test/cat.png"}},
        },
    ),
    "a PDF": (
        ("report.pdf", PDF),
        {
            "openai": {
                "type": "file",
                "file": {"filename": "report.pdf", "file_data": data_url("application/pdf", PDF)},
            },
            "anthropic": {
                "type": "document",
                "source": {"type": "base64", "media_type": "application/pdf", "data": encoded(PDF)},
            },
            "gemini": {"inline_data": {"mime_type": "application/pdf", "data": encoded(PDF)}},
        },
    ),
    "a PDF without a name": (
        PDF,
        {"openai": {"type": "file", "file": {"filename": "file.pdf", "file_data": data_url("application/pdf", PDF)}}},
    ),
    "a PDF's address": (
        "https://files.test/report.pdf",
        {"anthropic": {"type": "document", "source": {"type": "url", "url": "https://files.test/report.pdf"}}},
    ),
    "WAV": (
        WAV,
        {
            "openai": {"type": "input_audio", "input_audio": {"data": encoded(WAV), "format": "wav"}},
            "gemini": {"inline_data": {"mime_type": "audio/wav", "data": encoded(WAV)}},
        },
    ),
    "MP3": (
        MP3,
        {
            "openai": {"type": "input_audio", "input_audio": {"data": encoded(MP3), "format": "mp3"}},
            "gemini": {"inline_data": {"mime_type": "audio/mp3", "data": encoded(MP3)}},
        },
    ),
    "text": (
        ("notes.md", b"\xef\xbb\xbf# Notes"),
        {
            "openai": {"type": "text", "text": "File 'notes.md' (text/markdown):\n\n# Notes"},
            "anthropic": {"type": "text", "text": "File 'notes.md' (text/markdown):\n\n# Notes"},
            "gemini": {"text": "File 'notes.md' (text/markdown):\n\n# Notes"},
        },
    ),
}


@pytest.mark.parametrize("ask", ["completion", "acompletion"])
@pytest.mark.parametrize(
    ("case", "wire"), [(case, wire) for case, (_, expected) in ON_THE_WIRE.items() for wire in expected]
)
def test_a_file_reaches_the_provider(provider: Provider, looked_up: list[str], case: str, wire: str, ask: str):
    given, expected = ON_THE_WIRE[case]

    question, part = sent(provider, wire, asked(given), ask)

    assert question["text"] == "What is it?"
    assert part == expected[wire]
    assert looked_up == []


@pytest.mark.parametrize(
    ("wire", "url"),
    [
        ("openai", "https://files.test/report.pdf"),
        ("gemini", "https://files.test/cat.png"),
        ("anthropic", "http://files.test/cat.png"),
    ],
)
def test_where_a_provider_takes_no_address_litellm_fetches_it_itself(
    provider: Provider, looked_up: list[str], wire: str, url: str
):
    with pytest.raises(Exception, match=r"files\.test"):
        sent(provider, wire, asked(url))

    assert set(looked_up) == {"files.test"}
    assert provider.requests == []


def test_a_message_without_files_is_its_text():
    assert message_content("Hello", ()) == "Hello"


def test_a_message_without_text_is_its_files():
    attachments = attachments_of(PNG)

    assert message_content("", attachments) == parts_of(attachments)
    assert message_content("Look", attachments) == [{"type": "text", "text": "Look"}, *parts_of(attachments)]


def test_text_needs_no_name_and_its_name_cannot_pass_for_text():
    assert parts_of(attachments_of(b"Hello")) == [{"type": "text", "text": "File (text/plain):\n\nHello"}]
    (part,) = parts_of(attachments_of(("a'):\nb.txt", b"Hello")))
    assert part["text"].partition("\n\n")[0] == 'File "a\'):\\nb.txt" (text/plain):'


@pytest.mark.parametrize("media_type", [*SAMPLES, "text/plain"])
def test_of_a_file_that_was_not_kept_the_model_is_told(media_type: str):
    content = SAMPLES.get(media_type, b"Hello")
    kept = reference_only(only(("a file", content)))

    assert (kept.content, kept.filename, kept.media_type, kept.size) == (None, "a file", media_type, len(content))
    assert kept.sha256 == hashlib.sha256(content).hexdigest()
    told = f"[File 'a file' ({media_type}, {len(content)} bytes) came with this message; its content was not kept.]"
    assert parts_of([kept]) == [{"type": "text", "text": told}]


def test_a_reference_to_an_address_is_still_shown():
    attachment = only("https://files.test/cat.png")

    assert reference_only(attachment) == attachment
    assert parts_of([attachment]) == [{"type": "image_url", "image_url": {"url": "https://files.test/cat.png"}}]


@pytest.mark.parametrize(
    ("attachment", "why"),
    [
        (Attachment("audio/pcm", content=b"\x00\x00", size=2), "it cannot be shown"),
        (Attachment("application/octet-stream", content=b"??", size=2), "it cannot be shown"),
        (Attachment("audio/wav", url="https://files.test/a.wav", size=2), "its content was not kept"),
    ],
)
def test_what_no_model_takes_is_told_in_words(attachment: Attachment, why: str):
    (told,) = parts_of([attachment])

    assert told["text"] == f"[File without a name ({attachment.media_type}, 2 bytes) came with this message; {why}.]"


def test_anthropic_is_told_of_sound_which_litellm_would_leave_out(provider: Provider):
    messages = asked(("song.mp3", MP3), PNG)
    messages[0]["content"] = for_provider(messages[0]["content"], "anthropic")

    question, sound, picture = sent(provider, "anthropic", messages)

    assert "sound file came with this message" in sound["text"]
    assert (question["type"], picture["type"]) == ("text", "image")


def test_others_are_shown_what_there_is():
    content = asked(MP3)[0]["content"]

    assert for_provider(content, "gemini") == content
    assert for_provider("Hello", "anthropic") == "Hello"


def test_sound_for_a_provider_without_any_is_refused():
    attachments = attachments_of([PNG, ("song.mp3", MP3)])
    check_taken(attachments, "openai")
    check_taken(attachments[:1], "anthropic")

    with pytest.raises(InvalidFile, match=r"'song\.mp3' is audio/mpeg, and anthropic takes no sound"):
        check_taken(attachments, "anthropic")


# What a model made


def replies(provider: Provider, wire: str, stream: bool) -> list[Any]:
    """litellm's message, or the deltas of its stream."""
    settings = getattr(provider, wire)()
    llm = LLM(**{name: value for name, value in settings.items() if name != "model"})
    messages = [{"role": "user", "content": "Draw a cat."}]
    response = llm.completion(model=settings["model"], messages=messages, stream=stream, max_retries=0)
    return [part.choices[0].delta for part in response] if stream else [response.choices[0].message]


@pytest.mark.parametrize("stream", [False, True])
def test_pictures_of_geminis_are_collected(provider: Provider, monkeypatch: pytest.MonkeyPatch, stream: bool):
    jpeg = SAMPLES["image/jpeg"]
    pictures = [
        {"inlineData": {"mimeType": "image/png", "data": encoded(PNG)}},
        {"inlineData": {"mimeType": "image/png", "data": encoded(jpeg)}},
    ]
    monkeypatch.setattr(gemini_wire, "_call_parts", lambda answer: pictures)
    provider.reply(Answer("Here they are."))

    made = MadeFiles()
    had_files = [made.add(each) for each in replies(provider, "gemini", stream)]

    assert any(had_files)
    assert not stream or not all(had_files)
    png, jpg = made.attachments()
    assert (png.media_type, png.filename, png.content) == ("image/png", "image_1.png", PNG)
    assert (jpg.media_type, jpg.filename, jpg.content) == ("image/jpeg", "image_2.jpg", jpeg)
    assert (png.size, png.sha256) == (len(PNG), hashlib.sha256(PNG).hexdigest())


def test_sound_of_geminis_is_collected(provider: Provider, monkeypatch: pytest.MonkeyPatch):
    sound = [{"inlineData": {"mimeType": "audio/L16;rate=24000", "data": encoded(b"\x01\x00\x02\x00")}}]
    monkeypatch.setattr(gemini_wire, "_call_parts", lambda answer: sound)
    provider.reply(Answer())

    (attachment,) = made_by_model(replies(provider, "gemini", stream=False)[0])

    assert (attachment.media_type, attachment.filename) == ("audio/pcm", "audio_1.pcm")
    assert attachment.content == b"\x01\x00\x02\x00"


def test_sound_in_a_stream_of_openais_is_put_together(provider: Provider, monkeypatch: pytest.MonkeyPatch):
    spoken = [{"data": encoded(WAV[:5])}, {"transcript": "Me"}, {"data": encoded(WAV[5:])}, {"transcript": "ow"}]

    def render(answer: Any, wanted: Any) -> list[bytes]:
        deltas = [{"audio": {"id": "audio_1", **piece}} for piece in spoken]
        envelope = openai_wire._envelope(answer, wanted, "chat.completion.chunk")
        chunks = [{**envelope, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        last = {**envelope, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        return [*map(sse, [*chunks, last]), b"data: [DONE]\n\n"]

    monkeypatch.setattr(openai_wire, "render_events", render)
    provider.reply(Answer())

    made = MadeFiles()
    for each in replies(provider, "openai", stream=True):
        made.add(each)

    (attachment,) = made.attachments()
    assert (attachment.media_type, attachment.filename, attachment.content) == ("audio/wav", "audio_1.wav", WAV)
    assert made.transcript == "Meow"


class Said:
    """A message, or a delta, with these attributes and no others."""

    def __init__(self, **attributes: Any):
        self.__dict__ |= attributes


def test_sound_and_pictures_in_one_message():
    image = {"type": "image_url", "image_url": {"url": data_url("image/png", PNG)}}
    message = Said(content="Look", images=[image], audio=Said(id="audio_1", data=encoded(MP3), transcript="Look"))

    assert [each.filename for each in made_by_model(message)] == ["image_1.png", "audio_1.mp3"]


@pytest.mark.parametrize(
    "message",
    [
        Said(),
        Said(images=None, audio=None),
        Said(images=[], audio={}),
        Said(audio={"data": 7}),
        Said(audio={"data": "", "expires_at": 7}),
        None,
        "text",
    ],
)
def test_a_message_without_files_has_none(message: Any):
    assert made_by_model(message) == []


def test_base64_cut_into_pieces_anywhere_is_put_together():
    text = encoded(WAV)
    made = MadeFiles()
    for start in range(0, len(text), 6):
        made.add(Said(audio={"data": text[start : start + 6]}))

    assert [each.content for each in made.attachments()] == [WAV]


def test_a_picture_is_of_the_type_that_is_said_where_its_content_says_nothing():
    urls = [data_url("image/avif", b"\x00"), data_url("", b"\x00")]

    made = made_by_model(Said(images=[{"url": url} for url in urls]))

    assert [(each.media_type, each.filename, each.content) for each in made] == [
        ("image/avif", "image_1", b"\x00"),
        ("application/octet-stream", "image_2", b"\x00"),
    ]


def test_a_picture_by_address_keeps_it():
    item = {"image_url": {"url": "https://files.test/cat.png?key=1"}}

    assert made_by_model(Said(images=[item])) == [
        Attachment("image/png", "image_1", url="https://files.test/cat.png?key=1")
    ]
    (unknown,) = made_by_model(Said(images=["https://files.test/7"]))
    assert (unknown.media_type, unknown.url) == ("image/*", "https://files.test/7")
    assert replayed_images([unknown]) == [{"type": "image_url", "image_url": {"url": "https://files.test/7"}}]


@pytest.mark.parametrize(
    ("images", "kept"),
    [
        ([{"image_url": {"url": "data:image/png;base64,???"}}], "data:image/png;base64,???"),
        ([{"image_url": "iVBORw0KGgo"}], "iVBORw0KGgo"),
        ("no list, no address", "no list, no address"),
        ([Said(image_url=Said(url="odd"))], "odd"),
        ([{"b64_json": "AAAA"}], "{'b64_json': 'AAAA'}"),
        ([None, 7], "7"),
        (["\ud800"], "\ud800"),
    ],
)
def test_what_is_no_picture_is_kept_as_it_came(images: Any, kept: str):
    (attachment,) = made_by_model(Said(images=images))

    assert attachment.content == kept.encode(errors="surrogatepass")
    assert (attachment.media_type, attachment.filename) == ("application/octet-stream", "image_1")
    assert replayed_images([attachment]) == []


@pytest.mark.parametrize("audio", ["???", {"data": "???"}, Said(data="???", transcript=7)])
def test_what_is_no_sound_is_kept_as_it_came(audio: Any):
    (attachment,) = made_by_model(Said(audio=audio))

    assert (attachment.media_type, attachment.filename, attachment.content) == (
        "application/octet-stream",
        "audio_1",
        b"???",
    )


def test_pictures_go_back_to_gemini(provider: Provider):
    made = made_by_model(
        Said(images=[{"image_url": {"url": data_url("image/png", PNG)}}], audio={"data": encoded(MP3)})
    )
    drawn = {"role": "assistant", "content": "Here it is.", "images": replayed_images(made)}
    messages = [{"role": "user", "content": "Draw a cat."}, drawn, {"role": "user", "content": "In blue, please."}]

    sent(provider, "gemini", messages)

    assert provider.requests[0].body["contents"][1]["parts"] == [
        {"text": "Here it is."},
        {"inline_data": {"mime_type": "image/png", "data": encoded(PNG)}},
    ]
    assert json.dumps(replayed_images(made)).count("base64") == 1
    assert replayed_images(map(reference_only, made)) == []

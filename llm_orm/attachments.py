"""Files: what a caller gives ↔ `Attachment`; `Attachment` → parts of a message; what a model made → `Attachment`."""

import base64
import binascii
import hashlib
import inspect
import math
import mimetypes
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from .errors import InvalidFile
from .values import Attachment, Message, storable

MAX_FILE_BYTES = 20 * 1024 * 1024
"""27 MB as base64, about what a request may have. A provider's own limit can be lower: that is its error to raise."""

FORMATS = (
    ("image/png", "png", rb"\x89PNG\r\n\x1a\n"),
    ("image/jpeg", "jpg", rb"\xff\xd8\xff"),
    ("image/gif", "gif", rb"GIF8[79]a"),
    ("image/webp", "webp", rb"RIFF....WEBP"),
    ("image/heic", "heic", rb"....ftyp(hei[cmsx]|hevc|mif1)"),
    ("application/pdf", "pdf", rb"%PDF-"),
    ("audio/wav", "wav", rb"RIFF....WAVE"),
    ("audio/mpeg", "mp3", rb"ID3[\x02-\x04]|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]"),
    ("audio/ogg", "ogg", rb"OggS\x00"),
    ("audio/flac", "flac", rb"fLaC[\x00\x80]"),
    ("audio/mp4", "m4a", rb"....ftypM4[ABP]"),
    ("audio/aac", "aac", rb"\xff[\xf0\xf1\xf8\xf9]"),
)
"""What some model takes, text aside: type; extension, and of sound the part's "format"; how the content begins."""

TAKEN = {media_type: extension for media_type, extension, _ in FORMATS}
TAKEN_IN_WORDS = "images (PNG, JPEG, GIF, WebP, HEIC), PDF, sound (WAV, MP3, OGG, FLAC, M4A, AAC) and text in UTF-8"

UNKNOWN = "application/octet-stream"

PCM = "audio/pcm"
"""Sound without a header, which is how models stream it: 24 kHz, mono, 16 bits, little-endian."""

WITHOUT_SOUND = ("anthropic",)
"""Providers whose format has none: litellm leaves it out of the request without a word."""

# One of our own does not read the types that this machine happens to know.
_types = mimetypes.MimeTypes()
for _media_type, _extension in [*TAKEN.items(), ("text/markdown", "md")]:
    _types.add_type(_media_type, f".{_extension}")


# What a caller gives


def attachments_of(files: Any, *, max_bytes: int = MAX_FILE_BYTES) -> tuple[Attachment, ...]:
    """The files that go with a message, read and checked; raises `InvalidFile` for what cannot be sent.

    files    one or several of: a path; an address (http, https), which is not fetched; a data: URL; bytes;
             (filename, bytes); an open file, which is read from where it stands and left open; an `Attachment`
    """
    if files is None:
        return ()
    items = [files] if _is_one(files) or not isinstance(files, Iterable) else files
    return tuple(_attachment_of(item, max_bytes) for item in items)


def reference_only(attachment: Attachment) -> Attachment:
    """The attachment without its content: name, type, size, hash and address."""
    return replace(attachment, content=None)


def reworded(attachment: Attachment, change: Callable[[str], str]) -> Attachment:
    """The attachment with its name and, where it is text, its content changed."""
    name = change(attachment.filename) if attachment.filename else None
    is_text = attachment.content is not None and attachment.media_type not in TAKEN
    text = _text_of(attachment.content) if attachment.content and is_text else None
    if text is None or change(text) == text:
        return replace(attachment, filename=name)
    return _stored(attachment.media_type, change(text).encode(), name, attachment.url)


def check_taken(attachments: Iterable[Attachment], provider: str) -> None:
    """Raise `InvalidFile` for what the provider's format has no place for: litellm would leave it out in silence."""
    for attachment in attachments:
        if provider in WITHOUT_SOUND and attachment.media_type.startswith("audio/"):
            name = _named(attachment.filename)
            raise InvalidFile(f"{name} is {attachment.media_type}, and {provider} takes no sound: ask another model")


def _is_one(files: Any) -> bool:
    is_named = isinstance(files, tuple) and len(files) == 2 and isinstance(files[1], (bytes, bytearray, memoryview))
    known = (str, os.PathLike, bytes, bytearray, memoryview, Attachment)
    return isinstance(files, known) or hasattr(files, "read") or (is_named and isinstance(files[0], str))


def _attachment_of(item: Any, max_bytes: int) -> Attachment:
    if isinstance(item, str) and (_is_address(item) or _is_data_url(item)):
        item = Attachment("", url=item)
    if isinstance(item, Attachment):
        return _completed(item, max_bytes)
    if isinstance(item, (bytes, bytearray, memoryview)):
        return _checked(bytes(item), None, "", max_bytes)
    if isinstance(item, tuple) and _is_one(item):
        return _checked(bytes(item[1]), item[0], "", max_bytes)
    if isinstance(item, (str, os.PathLike)):
        return _checked(_read_path(item, max_bytes), os.path.basename(os.fsdecode(item)), "", max_bytes)
    if hasattr(item, "read"):
        given = getattr(item, "name", None)
        name = os.path.basename(given) if isinstance(given, str) else None
        return _checked(_read(item, _named(name), max_bytes), name, "", max_bytes)
    raise InvalidFile(
        f"cannot send {_shown(item)} ({type(item).__name__}): a file is given as a path, an address, bytes, "
        "(filename, bytes), an open file, or an Attachment"
    )


def _completed(given: Attachment, max_bytes: int) -> Attachment:
    media_type, content, url = _plain(given.media_type), given.content, given.url
    if content is None and url and _is_data_url(url):
        try:
            declared, content = _decoded(url)
        except ValueError as error:
            raise InvalidFile(f"{_shown(url)} is no valid data: URL: {error}") from error
        media_type, url = media_type or declared, None
    if content is not None:
        return _checked(bytes(content), given.filename, media_type, max_bytes, url)
    if not url:
        raise InvalidFile(f"{_named(given.filename)} has neither content nor an address")
    return _at_address(url, given.filename, media_type)


def _at_address(url: str, name: str | None, media_type: str) -> Attachment:
    try:
        name = name or unquote(urlsplit(url).path).rpartition("/")[2]
    except ValueError as error:
        raise InvalidFile(f"{_shown(url)} is no valid address: {error}") from error
    media_type = media_type or _type_by_name(name)
    if not media_type:
        raise InvalidFile(
            f"the address {_shown(url)} does not say what is there: "
            'give Attachment(media_type="image/png", url=…), or the content'
        )
    if media_type not in TAKEN or media_type.startswith("audio/"):
        raise InvalidFile(f"{_shown(url)} is {media_type}: by address, only images and PDF are taken; give the content")
    return Attachment(media_type, storable(name) if name else None, url=url)


def _checked(content: bytes, name: str | None, declared: str, max_bytes: int, url: str | None = None) -> Attachment:
    shown = _named(name)
    if len(content) > max_bytes:
        raise _too_large(shown, len(content), max_bytes)
    if not content:
        raise InvalidFile(f"{shown} is empty")
    media_type = _type_of(content, name, declared)
    if media_type not in TAKEN and _text_of(content) is None:
        if media_type.startswith("text/"):
            raise InvalidFile(f"{shown} ({media_type}) is not in UTF-8: convert it first")
        raise InvalidFile(f"{shown} is {media_type}, which no model takes; taken are {TAKEN_IN_WORDS}")
    return _stored(media_type, content, name, url)


def _stored(media_type: str, content: bytes, name: str | None, url: str | None = None) -> Attachment:
    sha256 = hashlib.sha256(content).hexdigest()
    return Attachment(media_type, storable(name) if name else None, content, url, len(content), sha256)


def _read_path(path: Any, max_bytes: int) -> bytes:
    shown = _shown(os.fsdecode(path))
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidFile(f"{shown} is {'a folder' if stat.S_ISDIR(status.st_mode) else 'not a file'}")
        if status.st_size > max_bytes:
            raise _too_large(shown, status.st_size, max_bytes)
        with open(path, "rb") as file:
            return file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise InvalidFile(f"there is no file {shown}") from error
    except InvalidFile:
        raise
    except (OSError, ValueError) as error:
        raise InvalidFile(f"cannot read {shown}: {getattr(error, 'strerror', None) or error}") from error


def _read(file: Any, shown: str, max_bytes: int) -> bytes:
    content = bytearray()
    while len(content) <= max_bytes:
        try:
            piece = file.read(max_bytes + 1 - len(content))
        except (OSError, ValueError) as error:
            raise InvalidFile(f"cannot read {shown}: {error}") from error
        if inspect.iscoroutine(piece):
            piece.close()
            raise InvalidFile(f"cannot read {shown}, whose read() is async: give (filename, await file.read())")
        if not isinstance(piece, (bytes, bytearray, str)):
            raise InvalidFile(f"cannot read {shown}: its read() gave {_shown(piece)}")
        if not piece:
            return bytes(content)
        content += piece.encode(errors="surrogatepass") if isinstance(piece, str) else piece
    raise _too_large(shown, None, max_bytes)


def _too_large(shown: str, size: int | None, max_bytes: int) -> InvalidFile:
    has = f"more than {_megabytes(max_bytes)}" if size is None else _megabytes(size)
    return InvalidFile(
        f"{shown} is too large: it has {has}, and {_megabytes(max_bytes)} are the limit; "
        "make it smaller, or give its address (https://…)"
    )


def _megabytes(size: int) -> str:
    return f"{math.ceil(size * 100 / 1024**2) / 100:g} MB"


def _named(name: str | None) -> str:
    return _shown(name) if name else "a file without a name"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]}…{text[-40:]}"


# Types


def _type_of(content: bytes, name: str | None, declared: str = "") -> str:
    """The content's own signature, else what is said of it, else what its name says, else text where it is some."""
    said = _signature_of(content) or declared or _type_by_name(name)
    if said in TAKEN or _text_of(content) is None:
        return said or UNKNOWN
    # An extension means more than one thing: "x.ts" is a film, or a program.
    return said if said and not said.startswith(("audio/", "video/")) and said != UNKNOWN else "text/plain"


def _signature_of(content: bytes) -> str:
    return next((media_type for media_type, _, start in FORMATS if re.match(start, content, re.DOTALL)), "")


def _type_by_name(name: str | None) -> str:
    media_type, compression = _types.guess_type(name.lower(), strict=False) if name else (None, None)
    return media_type if media_type and not compression else ""


def _is_address(text: str) -> bool:
    return text[:8].lower().startswith(("http://", "https://"))


def _is_data_url(text: str) -> bool:
    return text[:5].lower() == "data:"


def _plain(media_type: str) -> str:
    """The type without its parameters: "text/plain;charset=utf-8" → "text/plain"."""
    plain = media_type.partition(";")[0].strip().lower()
    return "image/jpeg" if plain == "image/jpg" else plain


def _text_of(content: bytes) -> str | None:
    """The content as text; None where it is not in UTF-8."""
    try:
        return None if b"\x00" in content else content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _decoded(data_url: str) -> tuple[str, bytes]:
    """(type, content) of a data: URL; raises `ValueError`."""
    header, comma, data = data_url[5:].partition(",")
    if not comma or not _is_data_url(data_url):
        raise ValueError("it is not data:<type>;base64,<data>")
    is_base64 = header.lower().endswith(";base64")
    return _plain(header), _from_base64(unquote(data)) if is_base64 else unquote_to_bytes(data)


def _from_base64(text: str) -> bytes:
    compact = "".join(text.split()).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error


# What a model is shown


def message_content(text: str, attachments: Sequence[Attachment]) -> str | list[dict[str, Any]]:
    """The content of a message: its text, then its files."""
    if not attachments:
        return text
    return [*([{"type": "text", "text": text}] if text else []), *parts_of(attachments)]


def parts_of(attachments: Iterable[Attachment]) -> list[dict[str, Any]]:
    """The files as parts of a message, in the shape of OpenAI's chat API, which litellm translates for the others."""
    return [_part_of(attachment) for attachment in attachments]


def with_files_made(message: Message, attachments: Sequence[Attachment]) -> Message:
    """The model's message as it is shown again, from the one that is stored: {…, "attachments": how many it made}."""
    shown = {name: value for name, value in message.items() if name != "attachments"}
    images = replayed_images(attachments)
    if images:
        return {**shown, "images": images}
    is_empty = attachments and not shown.get("content") and not shown.get("tool_calls")
    return {**shown, "content": _NOTE.format("A sound file")} if is_empty else shown


def without_images(message: Message) -> Message:
    """The message less the pictures that the model made; words in their place, where it is nothing else."""
    shown = {name: value for name, value in message.items() if name != "images"}
    is_empty = "images" in message and not shown.get("content") and not shown.get("tool_calls")
    return {**shown, "content": _NOTE.format("A picture")} if is_empty else shown


def replayed_images(attachments: Iterable[Attachment]) -> list[dict[str, Any]]:
    """The pictures that a model made, as `images` of its message, which litellm gives back to Gemini."""
    return [
        {"type": "image_url", "image_url": {"url": _url_of(attachment)}}
        for attachment in attachments
        if attachment.media_type.startswith("image/") and (attachment.content or attachment.url)
    ]


_NOTE = "[{} came with this message; it cannot be shown to this model.]"


def for_provider(content: Any, provider: str) -> Any:
    """The content of a message, with words in the place of what the provider's format has no place for."""
    return _in_words(content) if provider in WITHOUT_SOUND and isinstance(content, list) else content


def without_sound(messages: list[Message]) -> list[Message]:
    """The messages with words in the place of sound."""
    return [
        {**message, "content": _in_words(message["content"])} if isinstance(message.get("content"), list) else message
        for message in messages
    ]


def _in_words(content: list[Any]) -> list[Any]:
    note = {"type": "text", "text": _NOTE.format("A sound file")}
    return [dict(note) if part.get("type") == "input_audio" else part for part in content]


def _part_of(attachment: Attachment) -> dict[str, Any]:
    media_type, content = attachment.media_type, attachment.content
    if media_type in TAKEN and (content or attachment.url):
        if media_type.startswith("image/"):
            return {"type": "image_url", "image_url": {"url": _url_of(attachment)}}
        if media_type == "application/pdf" and content:
            name = attachment.filename or "file.pdf"
            return {"type": "file", "file": {"filename": name, "file_data": _url_of(attachment)}}
        if media_type == "application/pdf":
            # With "format", litellm would take the address for the id of a file at Anthropic.
            return {"type": "file", "file": {"file_id": attachment.url}}
        if content:
            data = base64.b64encode(content).decode()
            return {"type": "input_audio", "input_audio": {"data": data, "format": TAKEN[media_type]}}
    text = _text_of(content) if content else None
    if text is not None and media_type not in (UNKNOWN, PCM):
        name = f" {attachment.filename!r}" if attachment.filename else ""
        return {"type": "text", "text": f"File{name} ({media_type}):\n\n{text}"}
    name = repr(attachment.filename) if attachment.filename else "without a name"
    about = f"File {name} ({media_type}, {attachment.size} bytes) came with this message"
    why = "its content was not kept" if content is None else "it cannot be shown"
    return {"type": "text", "text": f"[{about}; {why}.]"}


def _url_of(attachment: Attachment) -> str | None:
    if not attachment.content:
        return attachment.url
    return f"data:{attachment.media_type};base64,{base64.b64encode(attachment.content).decode()}"


# What a model made


class MadeFiles:
    """Pictures and sound of one reply, collected from litellm's message, or from the deltas of its stream."""

    def __init__(self) -> None:
        self.images: list[Any] = []
        self.sound: list[str] = []
        """Pieces of base64; a reply has one sound, whose id some providers give anew with each piece."""
        self.spoken: list[str] = []

    def add(self, delta: Any) -> bool:
        """Take what is in it; says whether there was anything."""
        images, audio = getattr(delta, "images", None), getattr(delta, "audio", None)
        if not images and not audio:
            return False
        if images:
            self.images += images if isinstance(images, (list, tuple)) else [images]
        if audio:
            data = audio if isinstance(audio, str) else _field(audio, "data")
            spoken = _field(audio, "transcript")
            self.sound += [data] if isinstance(data, str) and data else []
            self.spoken += [spoken] if isinstance(spoken, str) else []
        return True

    @property
    def transcript(self) -> str:
        """What the sound says; "" where the provider does not tell."""
        return "".join(self.spoken)

    def attachments(self) -> list[Attachment]:
        """Each with a name made up; what cannot be decoded is kept as it came."""
        pictures = [_picture(item, number) for number, item in enumerate(filter(None, self.images), start=1)]
        return [*pictures, *([_sound(self.sound)] if self.sound else [])]


def _picture(item: Any, number: int) -> Attachment:
    image_url = _field(item, "image_url") or item
    url = image_url if isinstance(image_url, str) else _field(image_url, "url")
    url = url if isinstance(url, str) else str(item)
    if _is_address(url):
        media_type = _type_by_name(url.partition("?")[0].rpartition("/")[2]) or "image/*"
        return Attachment(media_type, f"image_{number}", url=storable(url))
    try:
        declared, content = _decoded(url)
    except ValueError:
        return _made("image", number, UNKNOWN, url.encode(errors="surrogatepass"))
    return _made("image", number, _signature_of(content) or declared or UNKNOWN, content)


def _sound(pieces: list[str]) -> Attachment:
    whole = "".join(pieces)
    try:
        # Each piece is encoded in its own right, unless it is a piece of one long text.
        own = all(len(piece) % 4 == 0 for piece in pieces)
        content = b"".join(map(_from_base64, pieces)) if own else _from_base64(whole)
    except ValueError:
        return _made("audio", 1, UNKNOWN, whole.encode(errors="surrogatepass"))
    return _made("audio", 1, _signature_of(content) or PCM, content)


def _made(kind: str, number: int, media_type: str, content: bytes) -> Attachment:
    extension = "pcm" if media_type == PCM else TAKEN.get(media_type)
    return _stored(media_type, content, f"{kind}_{number}" + (f".{extension}" if extension else ""))


def _field(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)

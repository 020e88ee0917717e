"""What is refused before anything is written: keywords and values that no chat can be made or asked with."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import peewee as pw

from .errors import EmptyMessage, InvalidValue, LlmOrmError, NoModel, UnknownKeyword, meant
from .options import NAMES as OPTIONS
from .options import Options
from .store import Store

OVERRIDES = ("model", "provider", "instructions")
STORED = (*OVERRIDES, "metadata")
LONGEST_KEY = 255
OF_ONE_TURN = tuple(name for name in OPTIONS if name not in ("persistence", "debug"))


def options_of(keywords: Mapping[str, Any]) -> Options:
    return Options(**{name: value for name, value in keywords.items() if name in OPTIONS})


def columns_of(
    store: Store, call: str, keywords: Mapping[str, Any], known: tuple[str, ...], besides: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The application's own columns among the keywords; raises `UnknownKeyword` for what is neither."""
    own = store.chat_columns
    for name in own:
        if name in (*OPTIONS, "store", "chat_id"):
            raise InvalidValue(f"the column {name!r} of the chat has the name of a keyword of {call}: choose another")
    check_keywords(call, keywords, (*known, *own), columns=own, besides=besides)
    return {name: value for name, value in keywords.items() if name in own}


def check_keywords(
    call: str,
    given: Mapping[str, Any],
    known: tuple[str, ...],
    columns: list[str] | None = None,
    besides: tuple[str, ...] = (),
) -> None:
    """Raise `UnknownKeyword` for what is not known; `besides` are the parameters that the call's signature names."""
    for name in given:
        if name not in known:
            own = "" if columns is None else f"; columns of the application: {', '.join(columns) or 'none'}"
            taken = [each for each in (*known, *besides) if each != name]
            options = ", ".join(each for each in taken if each not in (columns or ()))
            right = meant(name, taken)
            hint = f"; did you mean {right!r}?" if right else ""
            raise UnknownKeyword(f"{call} does not know {name!r}; it takes {options}{own}{hint}")


@contextmanager
def clear_about(call: str, columns: dict[str, Any]) -> Iterator[None]:
    """Say of a value of the application's columns that the database refuses it."""
    for name, value in columns.items():
        if isinstance(value, str):
            check_storable(name, value)
    try:
        yield
    except (pw.IntegrityError, pw.DataError, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, LlmOrmError):
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in columns.items()) or "none"
        problem = str(error).partition("\n")[0]
        raise InvalidValue(f"{call}: {problem}; the columns of the application that were given: {given}") from error


def check_scalar(call: str, name: str, value: Any) -> None:
    """Refuse what a column cannot be compared with: a list or an expression would find another tenant's rows."""
    is_expression = isinstance(value, pw.Node) and not isinstance(value, pw.Model)
    if is_expression or isinstance(value, list | tuple | set | frozenset | dict):
        raise InvalidValue(f"{call}: {name} must be one value, not {type(value).__name__}")


def said_text(text: Any, *, may_be_empty: bool = False) -> str:
    if not isinstance(text, str):
        raise InvalidValue(f"a message must be a string, not {type(text).__name__}")
    if not text.strip() and not may_be_empty:
        raise EmptyMessage(f"the message is empty ({text!r}): say something")
    check_storable("the message", text)
    return text if text.strip() else ""


def check_request_key(key: Any) -> None:
    if key is None:
        return
    if not isinstance(key, str) or not key.strip() or len(key) > LONGEST_KEY:
        shown = f"{key[:20]!r}… ({len(key)} characters)" if isinstance(key, str) and len(key) > 40 else repr(key)
        raise InvalidValue(f"key={shown}: a key is a string of 1 to {LONGEST_KEY} characters")
    check_storable("the key", key)


def check_overrides(values: Mapping[str, Any]) -> None:
    for name in OVERRIDES:
        value = values.get(name)
        if value is not None and not isinstance(value, str):
            raise InvalidValue(f"{name} must be a string, not {type(value).__name__}")
        if name == "model" and value is not None and not value.strip():
            raise NoModel(f"model={value!r} names no model: leave it out, or name one")
        check_storable(name, value or "")


def stored_metadata(metadata: Any) -> Any:
    """The metadata as the database will give it back: keys are strings, tuples are lists."""
    try:
        text = json.dumps(metadata, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValue(f"metadata cannot be written as JSON: {error}") from error
    # Within JSON a NUL is written as an escape, and a backslash as two.
    check_storable("metadata", re.sub(r"(?<!\\)((?:\\\\)*)\\u0000", "\\1\0", text))
    return json.loads(text)


def check_storable(what: str, text: str) -> None:
    if "\x00" in text:
        raise InvalidValue(f"{what} has a NUL character, which a database cannot hold as text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidValue(f"{what} has half a character (a lone surrogate) at {error.start}") from error


def as_key(given: Any) -> UUID | None:
    if isinstance(given, UUID):
        return given
    try:
        return UUID(str(given))
    except ValueError:
        return None

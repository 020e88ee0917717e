"""Chat: what an application holds in its hand."""

import json
import logging
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, Unpack
from uuid import UUID

import peewee as pw

from . import gateway
from .errors import AsyncTool, ChatGone, EmptyMessage, InvalidValue, NoModel, UnknownKeyword
from .options import NAMES as OPTIONS
from .options import Options, TurnOptions
from .play import Outcome, aplay, play
from .records import LlmChat, LlmMessage, LlmRequest, LlmToolCall, uuid7
from .store import Store, as_store
from .transcript import Transcript
from .turn import Setting, Turn
from .usage import stats_of
from .values import Chunk, Stats

OVERRIDES = ("model", "provider", "instructions")
STORED = (*OVERRIDES, "metadata")
OF_ONE_TURN = tuple(name for name in OPTIONS if name not in ("persistence", "debug"))


class Chat:
    """A stored conversation. Made by `create_chat` and `load_chat`.

    id, model, provider, instructions, metadata, record
    """

    def __init__(self, store: Store, record: LlmChat, options: Options, **overrides: str | None):
        self.store = store
        self.record = record
        self.options = options
        self._overrides = overrides
        self._hooks: dict[str, tuple[Callable[..., Any], ...]] = {}
        self._transcript = Transcript()
        if options.debug:
            _log_to_stderr()

    def __repr__(self) -> str:
        return f"<Chat {self.id} model={self.model!r}>"

    @property
    def id(self) -> UUID:
        return self.record.id

    @property
    def model(self) -> str | None:
        return self._overrides.get("model", self.record.model)

    @property
    def provider(self) -> str | None:
        # Another model may be another provider's.
        return self._overrides.get("provider", None if "model" in self._overrides else self.record.provider)

    @property
    def instructions(self) -> str | None:
        return self._overrides.get("instructions", self.record.instructions)

    @property
    def metadata(self) -> Any:
        return self.record.metadata

    # Asking

    def ask(self, text: str, **options: Unpack[TurnOptions]) -> LlmMessage:
        """Say something and get the stored reply.

        options    any of `Options` but persistence and debug, and model, provider, instructions: for this turn

        A failed call raises the provider's own exception (litellm's class); the user's message stays, and by `on_error`
        what was received is rolled back or kept. Raises `ChatBusy` while another turn of the chat runs, `WrongCall` for
        what cannot work before anything is written, `TurnFailed` where a turn ends for a reason of ours.
        """
        return self._play(_said(text), options)

    def ask_stream(self, text: str, **options: Unpack[TurnOptions]) -> "Stream":
        """Say something and read the reply as it comes; the stored message is in `.message` afterwards.

        Nothing happens before the first chunk is read. A stream that is left early is rolled back or kept (`on_error`),
        and what was received of it is on record as spent.
        """
        turn, outcome = self._turn(_said(text), options, stream=True), Outcome()
        return Stream(play(turn, outcome), outcome)

    async def aask(self, text: str, **options: Unpack[TurnOptions]) -> LlmMessage:
        """`ask`, from asyncio."""
        return await self._aplay(_said(text), options)

    def aask_stream(self, text: str, **options: Unpack[TurnOptions]) -> "AsyncStream":
        """`ask_stream`, from asyncio: `async for chunk in chat.aask_stream(…)`."""
        turn, outcome = self._turn(_said(text), options, stream=True, may_await=True), Outcome()
        return AsyncStream(aplay(turn, outcome), outcome)

    def retry(self, **options: Unpack[TurnOptions]) -> LlmMessage:
        """Answer the last user message that was left without a reply, without writing it again.

        A failed answer to it that was kept gives way to the new one. Raises `NothingToRetry`.
        """
        return self._play(None, options)

    def retry_stream(self, **options: Unpack[TurnOptions]) -> "Stream":
        """`retry`, read as it comes."""
        turn, outcome = self._turn(None, options, stream=True), Outcome()
        return Stream(play(turn, outcome), outcome)

    async def aretry(self, **options: Unpack[TurnOptions]) -> LlmMessage:
        """`retry`, from asyncio."""
        return await self._aplay(None, options)

    def aretry_stream(self, **options: Unpack[TurnOptions]) -> "AsyncStream":
        """`retry_stream`, from asyncio."""
        turn, outcome = self._turn(None, options, stream=True, may_await=True), Outcome()
        return AsyncStream(aplay(turn, outcome), outcome)

    # Hooks, called in the order in which they were added; none of them can keep a row from being written

    def before_request(self, function: Callable[[list[dict[str, Any]]], Any]) -> Self:
        """Call `function(messages)` before each call of the model."""
        return self._hook("before_request", function)

    def after_response(self, function: Callable[..., Any]) -> Self:
        """Call `function(reply)` after each call of the model, once its rows are written. Gets an `llm_orm.Reply`."""
        return self._hook("after_response", function)

    def on_tool_call_start(self, function: Callable[..., Any]) -> Self:
        """Call `function(call)` before each tool call, once its row is written. Gets an `llm_orm.ToolCall`."""
        return self._hook("on_tool_call_start", function)

    def on_tool_call_end(self, function: Callable[..., Any]) -> Self:
        """Call `function(call, outcome)` after each tool call, once its result is written."""
        return self._hook("on_tool_call_end", function)

    def _hook(self, name: str, function: Callable[..., Any]) -> Self:
        self._hooks[name] = (*self._hooks.get(name, ()), function)
        return self

    # Reading

    def messages(self) -> list[LlmMessage]:
        """Every message of the chat, in order; a reply in the making has status "pending"."""
        message = self.store.records.message
        with self.store.connection():
            return list(message.select().where(message.chat == self.id).order_by(message.position))

    def tool_calls(self) -> list[LlmToolCall]:
        """Every tool call of the chat, those of rolled-back turns too, in the order in which they were asked for."""
        return self._of_turns(self.store.records.tool_call, "round", "position")

    def requests(self) -> list[LlmRequest]:
        """Every call of a model for this chat, failed ones too, in the order in which they ended."""
        return self._of_turns(self.store.records.request, "round", "attempt")

    def stats(self) -> Stats:
        """Tokens, cost, requests, tool calls and time, summed up in the database."""
        self._check_stores_requests()
        return stats_of(self.store, chat_id=self.id, tool_calls=self.options.stores_tool_calls)

    def delete(self) -> None:
        """Delete the chat with its messages and tool calls. Its request rows stay: what was spent was spent."""
        with self.store.connection():
            self.store.records.chat.delete().where(self.store.records.chat.id == self.id).execute()
        self._transcript = Transcript()

    def reload(self) -> Self:
        """Read the chat's row again, and all of its history on the next turn. For when other code changed them."""
        with self.store.connection():
            record = self.store.records.chat.get_or_none(self.store.records.chat.id == self.id)
        if record is None:
            raise ChatGone(f"there is no chat {self.id}: it was deleted")
        self.record, self._transcript = record, Transcript()
        return self

    async def amessages(self) -> list[LlmMessage]:
        """`messages`, from asyncio."""
        return await self.store.off_the_loop(self.messages)

    async def atool_calls(self) -> list[LlmToolCall]:
        """`tool_calls`, from asyncio."""
        return await self.store.off_the_loop(self.tool_calls)

    async def arequests(self) -> list[LlmRequest]:
        """`requests`, from asyncio."""
        return await self.store.off_the_loop(self.requests)

    async def astats(self) -> Stats:
        """`stats`, from asyncio."""
        return await self.store.off_the_loop(self.stats)

    async def adelete(self) -> None:
        """`delete`, from asyncio."""
        await self.store.off_the_loop(self.delete)

    async def areload(self) -> Self:
        """`reload`, from asyncio."""
        return await self.store.off_the_loop(self.reload)

    # How

    def _play(self, text: str | None, options: TurnOptions) -> LlmMessage:
        outcome = Outcome()
        for _ in play(self._turn(text, options), outcome):
            pass  # only a stream yields chunks
        assert outcome.message is not None
        return outcome.message

    async def _aplay(self, text: str | None, options: TurnOptions) -> LlmMessage:
        outcome = Outcome()
        async for _ in aplay(self._turn(text, options, may_await=True), outcome):
            pass
        assert outcome.message is not None
        return outcome.message

    def _turn(self, text: str | None, options: TurnOptions, *, stream: bool = False, may_await: bool = False) -> Turn:
        """A turn that can work, as far as this can be known before anything is written."""
        setting = self._setting(options)
        if not may_await and (names := setting.options.toolbox.async_tools()):
            raise AsyncTool(f"the tool {names[0]!r} is async: use aask() or aask_stream(), or make it a plain function")
        return Turn(self.store, setting, self._transcript, text, stream=stream)

    def _setting(self, options: TurnOptions) -> Setting:
        _check_keywords("ask()", options, (*OF_ONE_TURN, *OVERRIDES))
        _check_overrides(options)
        ours = {name: value for name, value in options.items() if name in OF_ONE_TURN}
        chosen = self.options.changed(**ours)
        model = options.get("model", self.model)
        if not model:
            raise NoModel()
        provider = options.get("provider", None if "model" in options else self.provider)
        llm = chosen.llm if chosen.llm is not None else self.store.llm
        return Setting(
            chat_id=self.id,
            model=model,
            provider=provider,
            instructions=options.get("instructions", self.instructions),
            metadata=self.metadata,
            options=chosen,
            hooks=self._hooks,
            llm=llm,
            answering_provider=gateway.check_model(llm, model, provider),
        )

    def _of_turns(self, record: Any, *order: str) -> list[Any]:
        """Rows in the order of their turns; time tells apart only the tries of one turn."""
        message: Any = self.store.records.message
        rows = record.select().join(message, pw.JOIN.LEFT_OUTER, on=(message.id == record.turn_id))
        with self.store.connection():
            by = (message.position.asc(nulls="first"), record.created_at, *(getattr(record, name) for name in order))
            return list(rows.where(record.chat == self.id).order_by(*by))

    def _check_stores_requests(self) -> None:
        if not self.options.stores_requests:
            raise InvalidValue(
                'stats() sums up request rows, and this chat writes none: persistence={"requests": False}'
            )


class Stream:
    """The chunks of a reply as they come. `message` is the stored reply, once the stream has ended.

    Leaving it early, or `close()`, ends the turn; as a context manager it closes itself.
    """

    def __init__(self, chunks: Generator[Chunk], outcome: Outcome):
        self._chunks = chunks
        self._outcome = outcome

    @property
    def message(self) -> LlmMessage | None:
        return self._outcome.message

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncStream:
    """`Stream`, from asyncio: `async for`, `async with`, `aclose()`."""

    def __init__(self, chunks: AsyncGenerator[Chunk], outcome: Outcome):
        self._chunks = chunks
        self._outcome = outcome

    @property
    def message(self) -> LlmMessage | None:
        return self._outcome.message

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


def create_chat(store: Store | pw.Database | str | None = None, **keywords: Any) -> Chat:
    """A new chat, stored.

    store       a Store, a peewee Database or a URL; None as in `connect`
    stored      model, provider, instructions, metadata (any JSON), and the application's own columns of the chat
    not stored  the options of `Options`: llm, tools, temperature, max_tokens, thinking, params, headers,
                request_timeout, max_tool_calls, tool_concurrency, retries, history, persistence, on_error, wait,
                stale_after, debug

    Raises `UnknownKeyword` for a keyword that is none of these, `InvalidValue` for a value that cannot be stored, both
    before anything is written.
    """
    store = as_store(store)
    columns = _columns(store, "create_chat()", keywords, (*STORED, *OPTIONS))
    options = _options(keywords)
    stored = {name: keywords[name] for name in OVERRIDES if name in keywords}
    _check_overrides(stored)
    stored["metadata"] = _as_stored(keywords.get("metadata"))
    with store.connection(), _clear_about("create_chat()", columns):
        record = store.records.chat.create(id=uuid7(), **stored, **columns)
    return Chat(store, record, options)


def load_chat(store: Store | pw.Database | str | None, chat_id: UUID | str | None, **keywords: Any) -> Chat | None:
    """The stored chat, or None where there is none of that id, or its columns are not as said.

    keywords    the options of `Options`, which are not stored; model, provider and instructions, in place of the stored
                ones for as long as this object lives; and columns of the application, which must match, so that one
                tenant cannot load another's chat: load_chat(store, chat_id, user_id="u_1")
    """
    store = as_store(store)
    columns = _columns(store, "load_chat()", keywords, (*OVERRIDES, *OPTIONS))
    overrides = {name: keywords[name] for name in OVERRIDES if name in keywords}
    _check_overrides(overrides)
    options = _options(keywords)
    key = _as_key(chat_id)
    if key is None:
        return None
    record = store.records.chat
    matches = [
        getattr(record, name).is_null() if value is None else getattr(record, name) == value
        for name, value in columns.items()
    ]
    with store.connection(), _clear_about("load_chat()", columns):
        found = record.get_or_none(record.id == key, *matches)
    return Chat(store, found, options, **overrides) if found is not None else None


async def acreate_chat(store: Store | pw.Database | str | None = None, **keywords: Any) -> Chat:
    """`create_chat`, from asyncio."""
    store = as_store(store)
    return await store.off_the_loop(lambda: create_chat(store, **keywords))


async def aload_chat(
    store: Store | pw.Database | str | None, chat_id: UUID | str | None, **keywords: Any
) -> Chat | None:
    """`load_chat`, from asyncio."""
    store = as_store(store)
    return await store.off_the_loop(lambda: load_chat(store, chat_id, **keywords))


def _options(keywords: dict[str, Any]) -> Options:
    return Options(**{name: value for name, value in keywords.items() if name in OPTIONS})


def _columns(store: Store, call: str, keywords: dict[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    own = store.chat_columns
    for name in own:
        if name in (*OPTIONS, "store", "chat_id"):
            raise InvalidValue(f"the column {name!r} of the chat has the name of a keyword of {call}: choose another")
    _check_keywords(call, keywords, (*known, *own), columns=own)
    return {name: value for name, value in keywords.items() if name in own}


def _check_keywords(
    call: str, given: Mapping[str, Any], known: tuple[str, ...], columns: list[str] | None = None
) -> None:
    for name in given:
        if name not in known:
            own = "" if columns is None else f"; columns of the application: {', '.join(columns) or 'none'}"
            options = ", ".join(name for name in known if name not in (columns or ()))
            raise UnknownKeyword(f"{call} does not know {name!r}; it takes {options}{own}")


@contextmanager
def _clear_about(call: str, columns: dict[str, Any]) -> Iterator[None]:
    """Say of a value of the application's columns that the database refuses it."""
    for name, value in columns.items():
        if isinstance(value, str):
            _check_storable(name, value)
    try:
        yield
    except (pw.IntegrityError, pw.DataError, OverflowError, TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in columns.items()) or "none"
        problem = str(error).partition("\n")[0]
        raise InvalidValue(f"{call}: {problem}; the columns of the application that were given: {given}") from error


def _said(text: Any) -> str:
    if not isinstance(text, str):
        raise InvalidValue(f"a message must be a string, not {type(text).__name__}")
    if not text.strip():
        raise EmptyMessage(f"the message is empty ({text!r}): say something")
    _check_storable("the message", text)
    return text


def _check_overrides(values: Mapping[str, Any]) -> None:
    for name in OVERRIDES:
        value = values.get(name)
        if value is not None and not isinstance(value, str):
            raise InvalidValue(f"{name} must be a string, not {type(value).__name__}")
        _check_storable(name, value or "")


def _as_stored(metadata: Any) -> Any:
    """The metadata as the database will give it back: keys are strings, tuples are lists."""
    try:
        text = json.dumps(metadata, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValue(f"metadata cannot be written as JSON: {error}") from error
    # Within JSON a NUL is written as an escape, and a backslash as two.
    _check_storable("metadata", re.sub(r"(?<!\\)((?:\\\\)*)\\u0000", "\\1\0", text))
    return json.loads(text)


def _check_storable(what: str, text: str) -> None:
    if "\x00" in text:
        raise InvalidValue(f"{what} has a NUL character, which a database cannot hold as text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidValue(f"{what} has half a character (a lone surrogate) at {error.start}") from error


def _as_key(chat_id: Any) -> UUID | None:
    if isinstance(chat_id, UUID):
        return chat_id
    try:
        return UUID(str(chat_id))
    except ValueError:
        return None


def _log_to_stderr() -> None:
    log = logging.getLogger("llm_orm")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("llm_orm: %(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.DEBUG)

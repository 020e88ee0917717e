"""Chat: what an application holds in its hand."""

import inspect
import logging
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, Self, Unpack
from uuid import UUID

import peewee as pw

from . import gateway
from .approval import approve, cancel, deny, pending_approvals
from .attachments import attachments_of, check_taken, reworded
from .budgets import check_against
from .checks import OF_ONE_TURN, OVERRIDES, as_key, check_keywords, check_overrides, check_request_key, said_text
from .claim import Said, Start, Unanswered, Unfinished
from .config import Config, Configurable
from .errors import AsyncTool, ChatGone, InvalidValue, NoModel
from .failures import redact
from .history import add_message, fork
from .middleware import METHODS, methods_of, stored
from .options import Candidate, Options, Setting, TurnOptions
from .play import Outcome, aplay, play
from .records import LlmAttachment, LlmChat, LlmMessage, LlmRequest, LlmToolCall
from .retention import Erased, erase_chat
from .rows import Rows
from .spending import Meter
from .store import Store
from .sums import stats_of
from .transcript import Transcript
from .turn import Turn
from .values import Chunk, Message, Stats


class Chat(Configurable):
    """A stored conversation. Made by `create_chat` and `load_chat`.

    id, chat_id, model, provider, instructions, metadata, options, record
    """

    _middlewares: tuple[Any, ...] = ()
    """What stands between those of the store and its own, and what no option can do away with."""

    _named: tuple[str, ...] = ("files", "key")
    """What `ask` takes besides options."""

    _no_model: str | None = None
    """What `NoModel` says in its place."""

    def __init__(self, store: Store, record: LlmChat, options: Options, overrides: Mapping[str, Any] | None = None):
        self.store = store
        self.record = record
        self._options = options
        self._hooks: dict[str, tuple[Callable[..., Any], ...]] = {}
        self._transcript = Transcript()
        if overrides:
            given = dict(overrides)
            self._changes = (lambda config: config.with_overrides(given),)
        if options.debug:
            _log_to_stderr()

    def __repr__(self) -> str:
        return f"<Chat {self.id} model={self.model!r}>"

    @property
    def id(self) -> UUID:
        return self.record.id

    @property
    def chat_id(self) -> UUID:
        """The same as `id`; of a session, whose `id` is its own, that of its chat."""
        return self.record.id

    @property
    def model(self) -> str | None:
        return self.config.model

    @property
    def provider(self) -> str | None:
        return self.config.provider

    @property
    def instructions(self) -> str | None:
        return self.config.instructions

    @property
    def metadata(self) -> Any:
        return self.record.metadata

    @property
    def options(self) -> Options:
        """What is set besides model, provider and instructions, and holds until it is set anew."""
        return self.standing.options

    # Asking

    def ask(
        self, text: str, files: Any = None, *, key: str | None = None, **options: Unpack[TurnOptions]
    ) -> LlmMessage:
        """Say something and get the stored reply.

        files      what goes with it: paths, addresses, bytes, (filename, bytes), open files; images, PDF, sound, text
        key        makes it safe to send again: what was answered in this chat with the same key is returned as it is
                   stored, without a call; what was not is answered now, and goes on where its process died
        options    any of `Options` but persistence and debug, and model, provider, instructions: for this turn

        A failed call raises the provider's own exception (litellm's class); the user's message stays, and by `on_error`
        what was received is rolled back or kept. Raises `ChatBusy` while another turn of the chat runs, `WrongCall` for
        what cannot work before anything is written, `TurnFailed` where a turn ends for a reason of ours. Where a tool
        waits for a person's approval, the message has status "pending": see `pending_approvals`.
        """
        return self._play(self._said(text, files, key, options), options)

    def ask_stream(
        self, text: str, files: Any = None, *, key: str | None = None, **options: Unpack[TurnOptions]
    ) -> "Stream":
        """Say something and read the reply as it comes; the stored message is in `.message` afterwards.

        Nothing happens before the first chunk is read. A stream that is left early is rolled back or kept (`on_error`),
        and what was received of it is on record as spent.
        """
        return self._stream(self._said(text, files, key, options), options)

    async def aask(
        self, text: str, files: Any = None, *, key: str | None = None, **options: Unpack[TurnOptions]
    ) -> LlmMessage:
        """`ask`, from asyncio."""
        return await self._aplay(self._said(text, files, key, options), options)

    def aask_stream(
        self, text: str, files: Any = None, *, key: str | None = None, **options: Unpack[TurnOptions]
    ) -> "AsyncStream":
        """`ask_stream`, from asyncio: `async for chunk in chat.aask_stream(…)`."""
        return self._astream(self._said(text, files, key, options), options)

    def retry(self, **options: Unpack[TurnOptions]) -> LlmMessage:
        """Answer the last user message that was left without a reply, without writing it again.

        A failed answer to it that was kept gives way to the new one. Raises `NothingToRetry`.
        """
        return self._play(Unanswered(), options)

    def retry_stream(self, **options: Unpack[TurnOptions]) -> "Stream":
        """`retry`, read as it comes."""
        return self._stream(Unanswered(), options)

    async def aretry(self, **options: Unpack[TurnOptions]) -> LlmMessage:
        """`retry`, from asyncio."""
        return await self._aplay(Unanswered(), options)

    def aretry_stream(self, **options: Unpack[TurnOptions]) -> "AsyncStream":
        """`retry_stream`, from asyncio."""
        return self._astream(Unanswered(), options)

    def resume(self, **options: Unpack[TurnOptions]) -> LlmMessage:
        """Go on with a turn that waits for tool calls to be approved, once they are, or whose process died.

        Whatever it did is not done again: no finished call of the model or of a tool is made twice. A tool that was
        running when its process died is run again only if it is idempotent; else the model is told that nobody knows.
        Raises `NothingToResume`, `AwaitsApproval` while a call is not decided, `ChatBusy` while the turn is alive.
        """
        return self._play(Unfinished(), options)

    def resume_stream(self, **options: Unpack[TurnOptions]) -> "Stream":
        """`resume`, read as it comes."""
        return self._stream(Unfinished(), options)

    async def aresume(self, **options: Unpack[TurnOptions]) -> LlmMessage:
        """`resume`, from asyncio."""
        return await self._aplay(Unfinished(), options)

    def aresume_stream(self, **options: Unpack[TurnOptions]) -> "AsyncStream":
        """`resume_stream`, from asyncio."""
        return self._astream(Unfinished(), options)

    def count_tokens(self, text: str = "", files: Any = None, **options: Unpack[TurnOptions]) -> int:
        """How many tokens `ask(text)` would send: instructions, tools, history and text. Counted here, by the model's
        tokenizer where litellm knows it, so roughly; files other than text count little."""
        chosen = dict(options)
        given = attachments_of(files, max_bytes=self._options_for(chosen).max_file_bytes)
        start = Said(said_text(text, may_be_empty=True), given)
        setting = self._setting(chosen)
        rows = Rows(self.store, setting)
        unread = self.store.read(self.store.statements.messages_after(self.chat_id, -1))
        transcript = Transcript()
        if unread:
            transcript.add(unread, rows.tool_results, rows.files)
        first = setting.candidates[0]
        messages = transcript.asked(
            setting.instructions, setting.options.history, start.text, start.files, first.answering_provider
        )
        return gateway.count_tokens(setting.llm, first.model, messages=messages, tools=setting.options.toolbox.schemas)

    # A person's say

    def pending_approvals(self) -> list[LlmToolCall]:
        """The tool calls that wait for `approve` or `deny`, in order."""
        return pending_approvals(self.store, self.chat_id)

    def approve(self, call: "LlmToolCall | UUID | str") -> LlmToolCall:
        """Let a tool call run, on the next `resume()`. Raises `InvalidValue` where it does not wait for that."""
        return approve(self.store, self.chat_id, call)

    def deny(self, call: "LlmToolCall | UUID | str", reason: str | None = None) -> LlmToolCall:
        """Keep a tool call from running; the model is told so, and why. Raises `InvalidValue` as `approve` does."""
        return deny(self.store, self.chat_id, call, self._kept(reason))

    def cancel(self) -> bool:
        """Stop the chat's running turn, from any thread or process; whether there was one.

        It ends within a second, by `on_error`, and its caller gets `TurnCancelled`; a plain tool that runs
        alone in `ask` is let finish first, others run on unheard. A turn that waits for approval ends at once.
        """
        return cancel(self.store, self.chat_id, self.options, self._kept)

    # The history

    def add_message(self, role: str, content: str, files: Any = None) -> LlmMessage:
        """Write a message that no model was asked about: imported history, or something the system says.

        role    "user", "assistant" or "system"

        Raises `ChatBusy` while a turn runs.
        """
        given = attachments_of(files, max_bytes=self.options.max_file_bytes)
        said = [reworded(file, self._kept) for file in given]
        text = self._kept(content)
        return add_message(self.store, self.chat_id, role, text, said, keeps_files=self.options.store_files)

    def fork(self, at: "LlmMessage | UUID | str | int | None" = None) -> "Chat":
        """A new chat with a copy of this one's history, as far as `at`: a message, its id or position; default: all.

        Tool calls and files come along. What it cost stays with this chat: the copy has no requests, and no tokens.
        """
        record = fork(self.store, self.record, at, self.options.stores_tool_calls)
        return Chat(self.store, record, self._options)._set_up_as(self)

    # Reading

    def messages(self) -> list[LlmMessage]:
        """Every message of the chat, in order; a reply in the making has status "pending"."""
        message, schema = self.store.records.message, self.options.schema
        rows = self.store.found(message.select().where(message.chat == self.chat_id).order_by(message.position))
        for row in rows:
            row.reply_schema = schema
        return rows

    def attachments(self, message: "LlmMessage | UUID | str | None" = None) -> list[LlmAttachment]:
        """The files of a message, or of all of the chat, in order."""
        record: Any = self.store.records.attachment
        messages: Any = self.store.records.message
        rows = record.select().join(messages).where(messages.chat == self.chat_id)
        if message is not None:
            rows = rows.where(record.message == (message.id if isinstance(message, LlmMessage) else as_key(message)))
        return self.store.found(rows.order_by(messages.position, record.position))

    def tool_calls(self) -> list[LlmToolCall]:
        """Every tool call of the chat, those of rolled-back turns too, in the order in which they were asked for."""
        return self._of_turns(self.store.records.tool_call, "round", "position")

    def requests(self) -> list[LlmRequest]:
        """Every call of a model for this chat, failed ones too, in the order in which they ended."""
        return self._of_turns(self.store.records.request, "round", "attempt")

    def stats(self) -> Stats:
        """Tokens, cost, requests, tool calls and time, summed up in the database."""
        options = self.options
        if not options.stores_requests:
            raise InvalidValue(
                'stats() sums up request rows, and this chat writes none: persistence={"requests": False}'
            )
        return stats_of(self.store, chat_id=self.chat_id, tool_calls=options.stores_tool_calls)

    @property
    def history(self) -> list[Message]:
        """The messages of the chat as a model is shown them, without the instructions; read from the database."""
        rows = Rows(self.store, self._setting({}, checks_model=False))
        unread = self.store.read(self.store.statements.messages_after(self.chat_id, -1))
        transcript = Transcript()
        if unread:
            transcript.add(unread, rows.tool_results, rows.files)
        return transcript.shown(None)

    def delete(self) -> None:
        """Delete the chat with its messages and tool calls. Its request rows stay: what was spent was spent."""
        with self.store.connection():
            self.store.records.chat.delete().where(self.store.records.chat.id == self.chat_id).execute()
        self._transcript = Transcript()

    def erase(self, columns: Iterable[str] = ()) -> Erased:
        """Do away with what was said in the chat, for good; what it cost stays.

        Gone are texts, thinking, files, tools' arguments and results, instructions, metadata, the texts of errors, and
        the ids by which the provider knows its requests. Roles, tokens, costs, times, and the names of models and tools
        stay, and so do your own columns, but for those that are named here. A turn that waits for approval, or whose
        process died, is ended. The chat goes on with an empty history. Raises `ChatBusy` while a turn runs.
        """
        erased = erase_chat(self.store, self.chat_id, columns, self.options.stale_after)
        self.reload()
        return erased

    def reload(self) -> Self:
        """Read the chat's row again, and all of its history on the next turn. For when other code changed them."""
        with self.store.connection():
            record = self.store.records.chat.get_or_none(self.store.records.chat.id == self.chat_id)
        if record is None:
            raise ChatGone(f"there is no chat {self.chat_id}: it was deleted")
        self.record, self._transcript = record, Transcript()
        return self

    # The same from asyncio

    async def acount_tokens(self, text: str = "", files: Any = None, **options: Unpack[TurnOptions]) -> int:
        """`count_tokens`, from asyncio."""
        return await self.store.off_the_loop(lambda: self.count_tokens(text, files, **options))

    async def apending_approvals(self) -> list[LlmToolCall]:
        """`pending_approvals`, from asyncio."""
        return await self.store.off_the_loop(self.pending_approvals)

    async def aapprove(self, call: "LlmToolCall | UUID | str") -> LlmToolCall:
        """`approve`, from asyncio."""
        return await self.store.off_the_loop(self.approve, call)

    async def adeny(self, call: "LlmToolCall | UUID | str", reason: str | None = None) -> LlmToolCall:
        """`deny`, from asyncio."""
        return await self.store.off_the_loop(self.deny, call, reason)

    async def acancel(self) -> bool:
        """`cancel`, from asyncio."""
        return await self.store.off_the_loop(self.cancel)

    async def aadd_message(self, role: str, content: str, files: Any = None) -> LlmMessage:
        """`add_message`, from asyncio."""
        return await self.store.off_the_loop(self.add_message, role, content, files)

    async def afork(self, at: "LlmMessage | UUID | str | int | None" = None) -> "Chat":
        """`fork`, from asyncio."""
        return await self.store.off_the_loop(self.fork, at)

    async def amessages(self) -> list[LlmMessage]:
        """`messages`, from asyncio."""
        return await self.store.off_the_loop(self.messages)

    async def aattachments(self, message: "LlmMessage | UUID | str | None" = None) -> list[LlmAttachment]:
        """`attachments`, from asyncio."""
        return await self.store.off_the_loop(self.attachments, message)

    async def atool_calls(self) -> list[LlmToolCall]:
        """`tool_calls`, from asyncio."""
        return await self.store.off_the_loop(self.tool_calls)

    async def arequests(self) -> list[LlmRequest]:
        """`requests`, from asyncio."""
        return await self.store.off_the_loop(self.requests)

    async def astats(self) -> Stats:
        """`stats`, from asyncio."""
        return await self.store.off_the_loop(self.stats)

    async def ahistory(self) -> list[Message]:
        """`history`, from asyncio."""
        return await self.store.off_the_loop(lambda: self.history)

    async def adelete(self) -> None:
        """`delete`, from asyncio."""
        await self.store.off_the_loop(self.delete)

    async def aerase(self, columns: Iterable[str] = ()) -> Erased:
        """`erase`, from asyncio."""
        return await self.store.off_the_loop(self.erase, columns)

    async def areload(self) -> Self:
        """`reload`, from asyncio."""
        return await self.store.off_the_loop(self.reload)

    # How

    def _base(self) -> Config:
        record = self.record
        return Config(record.model, record.provider, record.instructions, self._options)

    def _config_for(self, options: dict[str, Any]) -> Config:
        """What one turn asks with; takes out of the options what is not one."""
        return self.config

    def _kept(self, text: Any) -> Any:
        """A text as the middlewares let it be stored."""
        return stored(methods_of(self.options.all_middlewares(self.store.middlewares), "stored_text"), text)

    def _set_up_as(self, other: "Chat") -> Self:
        self._changes, self._hooks = other._changes, other._hooks
        return self

    def _said(self, text: str, files: Any, key: str | None, options: Mapping[str, Any]) -> Said:
        check_request_key(key)
        if files is None:
            return Said(said_text(text), key=key)
        attached = attachments_of(files, max_bytes=self._options_for(options).max_file_bytes)
        return Said(said_text(text, may_be_empty=bool(attached)), attached, key)

    def _play(self, start: Start, options: TurnOptions) -> LlmMessage:
        outcome = Outcome()
        for _ in play(self._turn(start, options), outcome):
            pass  # only a stream yields chunks
        assert outcome.message is not None
        return outcome.message

    async def _aplay(self, start: Start, options: TurnOptions) -> LlmMessage:
        outcome = Outcome()
        async for _ in aplay(self._turn(start, options, may_await=True), outcome):
            pass
        assert outcome.message is not None
        return outcome.message

    def _stream(self, start: Start, options: TurnOptions) -> "Stream":
        turn, outcome = self._turn(start, options, stream=True), Outcome()
        return Stream(play(turn, outcome), outcome, self.store)

    def _astream(self, start: Start, options: TurnOptions) -> "AsyncStream":
        turn, outcome = self._turn(start, options, stream=True, may_await=True), Outcome()
        return AsyncStream(aplay(turn, outcome), outcome)

    def _turn(self, start: Start, options: TurnOptions, *, stream: bool = False, may_await: bool = False) -> Turn:
        """A turn that can work, as far as this can be known before anything is written."""
        setting = self._setting(dict(options))
        toolbox = setting.options.toolbox
        if not may_await:
            _check_nothing_is_async(setting)
        if toolbox.asks_for_approval and not setting.options.stores_tool_calls:
            raise InvalidValue(
                'a tool that requires approval needs its row: this chat has persistence={"tool_calls": False}'
            )
        if not setting.options.stores_requests and any(getattr(m, "needs_spent", False) for m in setting.middlewares):
            raise InvalidValue(
                'context.spent sums up request rows, and this chat writes none: persistence={"requests": False}'
            )
        if setting.meter is not None and not setting.options.stores_requests:
            raise InvalidValue('budgets sum up request rows; this chat writes none: persistence={"requests": False}')
        choice = setting.options.tool_choice
        known = ("required", *toolbox.by_name) if toolbox.by_name else ()
        if choice not in (None, "auto", "none", *known):
            needed = "needs tools" if choice == "required" else "names no tool of this chat"
            raise InvalidValue(f"tool_choice={choice!r} {needed}; it has {', '.join(toolbox.by_name) or 'none'}")
        if isinstance(start, Said):
            for candidate in setting.candidates:
                check_taken(start.files, candidate.answering_provider)
        return Turn(self.store, setting, self._transcript, start, stream=stream)

    def _setting(self, options: dict[str, Any], *, checks_model: bool = True) -> Setting:
        config = self._config_for(options) if checks_model else self.standing
        check_keywords("ask()", options, (*OF_ONE_TURN, *OVERRIDES), besides=self._named)
        check_overrides(options)
        if options.get("model", "") is None:
            raise InvalidValue("model=None: name a model, or leave it out for the chat's own")
        config = config.with_overrides({name: options[name] for name in OVERRIDES if name in options})
        before, kept = config.options.middlewares, config.options.budgets
        config = config.with_options(**{name: value for name, value in options.items() if name in OF_ONE_TURN})
        if "middlewares" in options:  # a turn's own come after the chat's, whose mask or guard holds
            config = config.with_options(middlewares=(*before, *config.options.middlewares))
        if "budgets" in options:  # nor can a turn do away with the chat's
            config = config.with_options(budgets=(*kept, *config.options.budgets))
        chosen = config.options
        llm = chosen.llm if chosen.llm is not None else self.store.llm
        fallbacks = chosen.fallbacks.models or (gateway.fallbacks_of(llm, config.model) if config.model else ())
        named = [(config.model, config.provider), *((model, None) for model in fallbacks)]
        candidates = []
        for model, provider in named if checks_model else ():
            if not model:
                raise NoModel(self._no_model)
            candidates.append(Candidate(model, provider, gateway.check_model(llm, model, provider)))
        return Setting(
            chat_id=self.chat_id,
            instructions=config.instructions,
            metadata=self.metadata,
            candidates=tuple(candidates),
            options=chosen,
            hooks=self._hooks,
            middlewares=chosen.all_middlewares((*self.store.middlewares, *self._middlewares)),
            llm=llm,
            meter=self._meter(chosen),
            estimate=lambda candidate, messages: gateway.estimate(
                llm, candidate.model, candidate.provider, messages, chosen.toolbox.schemas, chosen.max_tokens
            ),
            redact=lambda error: redact(error, gateway.secrets_in(llm, chosen.for_completion())),
            agent=getattr(self, "agent_class", None),
        )

    def _meter(self, options: Options) -> Meter | None:
        if not self.store.budgets and not options.budgets:
            return None
        check_against(self.store.records.chat, options.budgets)
        return Meter(self.store, self.chat_id, (*self.store.budgets, *options.budgets))

    def _options_for(self, options: Mapping[str, Any]) -> Options:
        known = {name: value for name, value in options.items() if name in OF_ONE_TURN}
        return self.options.changed(**known)

    def _of_turns(self, record: Any, *order: str) -> list[Any]:
        """Rows in the order of their turns; time tells apart only the tries of one turn."""
        message: Any = self.store.records.message
        rows = record.select().join(message, pw.JOIN.LEFT_OUTER, on=(message.id == record.turn_id))
        by = (message.position.asc(nulls="first"), record.created_at, *(getattr(record, name) for name in order))
        return self.store.found(rows.where(record.chat == self.chat_id).order_by(*by))


def _check_nothing_is_async(setting: Setting) -> None:
    """Raise `AsyncTool` for what a plain ask could not await, before anything is paid for."""
    toolbox = setting.options.toolbox
    if names := toolbox.async_tools():
        raise AsyncTool(f"the tool {names[0]!r} is async: use aask() or aask_stream(), or make it a plain function")
    hooks = [(f"the hook {name}", function) for name, functions in setting.hooks.items() for function in functions]
    for name in METHODS:
        hooks += [(f"{name} of a middleware", method) for method in methods_of(setting.middlewares, name)]
    if setting.meter is not None:
        hooks += [("the on_warn of a budget", budget.on_warn) for budget in setting.meter.budgets]
    hooks += [(f"requires_approval of {made!r}", made.requires_approval) for made in toolbox.by_name.values()]
    for what, function in hooks:
        if inspect.iscoroutinefunction(function):
            raise AsyncTool(f"{what} ({function!r}) is async: use aask() or aask_stream(), or make it a plain function")


class Stream:
    """The chunks of a reply as they come. `message` is the stored reply, once the stream has ended.

    Leaving it early, or `close()`, ends the turn; as a context manager it closes itself.
    """

    def __init__(self, chunks: Generator[Chunk], outcome: Outcome, store: Store):
        self._chunks = chunks
        self._outcome = outcome
        self._store = store

    @property
    def message(self) -> LlmMessage | None:
        return self._outcome.message

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        self._store.check_outside_transaction()  # which the turn's next rows would be a part of
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


def _log_to_stderr() -> None:
    log = logging.getLogger("llm_orm")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("llm_orm: %(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.DEBUG)

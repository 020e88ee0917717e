"""One turn of a chat, in order, as a generator.

`Turn.run()` reads and writes the database itself, in short steps, and *yields* what has to happen outside of it:
`CallModel`, `RunTools`, `CallHook`, `Show`, `Wait`. `play.py` performs what is yielded and sends back how it went. No
transaction is open across a yield, and the rows alone say what is to be done next.
"""

import functools
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from .attachments import message_content, with_files_made
from .claim import Claim, Progress, Said, Start, Wait
from .errors import (
    ChatGone,
    CorrectionsExceeded,
    InvalidReply,
    InvalidValue,
    ReplyNotSaved,
    StoppedByMiddleware,
    ToolRoundsExceeded,
    TurnCancelled,
)
from .middleware import methods_of, stored, tell, within
from .options import Candidate, Setting
from .records import LlmMessage
from .rows import Attempt, Rows
from .store import Store
from .tools import ToolContext
from .transcript import Transcript, as_shown_to, copied, files_of_rounds
from .values import (
    CONTINUE,
    REPLACE,
    RETRY,
    STOP,
    Answer,
    Chunk,
    Directive,
    Message,
    ModelRequest,
    Reply,
    ToolCall,
    ToolOutcome,
    TurnContext,
    Verdict,
)

log = logging.getLogger("llm_orm")

MOST_CORRECTIONS = 20
"""How often middlewares may send the model back in one turn: a bound for those that have none of their own."""


@dataclass(frozen=True, slots=True)
class CallModel:
    """The answer is in `request.answers` then, also where the call failed or was given up."""

    request: ModelRequest


@dataclass(frozen=True, slots=True)
class RunTools:
    """Starts those of the calls that are not running yet; sends back the first `ToolOutcome` there is."""

    calls: tuple[tuple[ToolCall, ToolContext], ...]


@dataclass(frozen=True, slots=True)
class CallHook:
    """Calls a function of the application; sends back what it returned."""

    function: Callable[..., Any]
    arguments: tuple


@dataclass(frozen=True, slots=True)
class Show:
    """Shows the reader of a stream a chunk that no model sent."""

    chunk: Chunk


Effect = CallModel | RunTools | CallHook | Show | Wait
Flow = Generator[Effect, Any, LlmMessage]


@dataclass
class Turn:
    """A turn in progress."""

    store: Store
    setting: Setting
    transcript: Transcript
    start: Start
    stream: bool = False
    stop: Callable[[], None] = lambda: None
    """What makes the turn end, called from another thread; whoever performs it says how."""

    number: int = 0
    """Which call of the model comes next, from 0."""
    tool_rounds: int = 0
    failed_call: BaseException | None = None
    """The error of a call of the model that failed for good."""
    candidate: Candidate = field(init=False)
    """The model that is called; another one once it has failed for good."""
    said: list[tuple[str, Message]] = field(default_factory=list)
    """What came after the question, each with the provider who wrote it."""
    messages: list[Message] = field(default_factory=list)
    """What the model is shown: the history, the question, and what came after it."""
    call_ids: set[str] = field(default_factory=set)
    _saved_at: float = 0.0

    def __post_init__(self) -> None:
        self.rows = Rows(self.store, self.setting)
        self.candidate = self.setting.candidates[0]
        self.context = TurnContext(
            chat_id=self.setting.chat_id,
            turn_id=self.rows.turn_id,
            metadata=self.setting.metadata,
            model=self.candidate.model,
            provider=self.candidate.answering_provider,
            streamed=self.stream,
            options=self.setting.options,
            schema=self.setting.options.schema,
            agent=self.setting.agent,
            stored=functools.partial(stored, methods_of(self.setting.middlewares, "stored_text")),
        )

    def run(self) -> Flow:
        """The turn; those who look on are told of its beginning, and of its end, whatever that is."""
        self._tell("on_turn_start")
        try:
            message = yield from self._run()
        except BaseException as error:
            self._tell("on_turn_end", error)
            raise
        self._tell("on_turn_end", message)
        return message

    def _run(self) -> Flow:
        claim = Claim(self.rows, self.start, self.transcript.position)
        self.store.pay()
        unread = yield from claim.take()
        if claim.before.answer is not None:
            return (yield from self._answered(claim.before.answer))
        try:
            self._read(unread)
            with self.store.heart.beating(self.rows.message_id, self.stop):
                message = yield from self._answer(claim.progress)
        except BaseException as error:
            if not self.rows.is_settled:
                self.rows.give_up(error)
                self._log("gave up: %s", type(error).__name__)
            if isinstance(error, Exception):
                yield from self._tell_of_budgets()
            raise
        yield from self._tell_of_budgets()
        return message

    def _answered(self, message: LlmMessage) -> Flow:
        """What was answered before: nothing is asked, and nothing written."""
        message.reply_schema = self.setting.options.schema
        self.rows.is_settled = True
        self._log("was answered before: %s", message.id)
        if message.content:
            yield Show(Chunk(content=message.content))
        return message

    def _read(self, rows: list[tuple]) -> None:
        turn = self.rows
        if len(rows) < 2 or rows[-2][0] not in (turn.turn_id, turn.turn_id.hex):
            # The transcript knows the question already, or messages that were deleted since.
            rows = self.store.read(self.store.statements.messages_after(self.setting.chat_id, -1))
        if turn.replaces:
            rows = [row for row in rows if row[0] not in (turn.replaces[0], turn.replaces[0].hex)]
        turn.position = rows[-1][1]
        self.context.turn_id = turn.turn_id
        self.transcript.add(rows, turn.tool_results, turn.files)
        self._compose()
        self._log("opened at position %d, %d messages", turn.position, len(self.messages))

    def save_partly(self, text: str, thinking: str) -> None:
        """Write what has come of a stream so far, where it is time to; a driver says so of each chunk."""
        self._saved_at = time.monotonic()
        self.rows.save_partly(text, thinking)

    @property
    def is_save_due(self) -> bool:
        every = self.setting.options.save_every
        return every is not None and self.stream and time.monotonic() >= self._saved_at + every

    def _compose(self) -> None:
        """Put together what the model that is called next is shown."""
        setting, provider = self.setting, self.candidate.answering_provider
        self.messages = self.transcript.shown(setting.instructions, setting.options.history, provider)
        if isinstance(self.start, Said) and (self.start.files or setting.middlewares):
            # The model gets what was said, also where less of it is kept.
            content = message_content(self.start.text, self.start.files)
            self.messages[-1] = {**self.messages[-1], "content": content}
        self.messages += [copied(as_shown_to(provider, writer, message)) for writer, message in self.said]

    def _say(self, *messages: Message, writer: str = "") -> None:
        """Add to what the model is shown on its next call."""
        provider = self.candidate.answering_provider
        self.said += [(writer or provider, message) for message in messages]
        self.messages += [copied(as_shown_to(provider, writer, message)) for message in messages]

    # The conversation with the model: rounds of calls and tools, to the last word

    def _answer(self, progress: Progress | None) -> Flow:
        """The conversation, tried again or ended well where a middleware says so of what went wrong in it."""
        while True:
            try:
                done = None if progress is None else (yield from self._go_on(progress))
                return done if done is not None else (yield from self._converse())
            except Exception as error:
                if self.rows.is_settled or isinstance(error, TurnCancelled | ReplyNotSaved | ChatGone):
                    raise
                directive = yield from self._directive("on_error", error)
                if isinstance(directive, REPLACE):
                    said = self.rows.received is not None
                    return (yield from self._end_with(_reply_of(directive), taking_back=said))
                if not isinstance(directive, RETRY) or error is not self.failed_call:
                    raise
                yield from self._send_back(directive.message, self.rows.received)
                progress, self.number = None, self.number + 1

    def _converse(self) -> Flow:
        while True:
            reply = yield from self._ask_model()
            number, self.number = self.number, self.number + 1
            if reply.tool_calls:
                done = yield from self._use_tools(reply, number)
            else:
                done = yield from self._last_word(reply)
            if done is not None:
                return done

    def _last_word(self, reply: Reply, *, is_saved: bool = False) -> Generator[Effect, Any, LlmMessage | None]:
        """Make a reply that asks for nothing the turn's; None where the model was sent back."""
        if self._is_watched:
            if not is_saved:
                self.rows.save(reply, (), self.number, 0)
            try:
                reviewed, directive = yield from self._review(reply)
            except BaseException:
                self.rows.finish(reply)  # a reply that was complete stays
                raise
            if isinstance(directive, RETRY):
                self.rows.save_sent_back(self.number)
                yield from self._send_back(directive.message, reply)
                return None
            self._check_not_stopped(directive)
            if reviewed is not reply:
                self._check_schema(reviewed)
                return (yield from self._end_with(reviewed, taking_back=True))
        self._check_schema(reply)
        message = self.rows.finish(reply)
        yield from self._call_hooks("on_end_message", message)
        return message

    def _use_tools(self, reply: Reply, number: int) -> Generator[Effect, Any, LlmMessage | None]:
        """Run what the model asks for; the message, where the turn ends with it."""
        calls = reply.tool_calls
        limit = self.setting.options.max_tool_calls
        if self.tool_rounds == limit:
            self.rows.record()
            yield from self._review(reply)
            raise ToolRoundsExceeded(
                f"the model asked for tools {limit + 1} times in one turn; max_tool_calls={limit} allows {limit}"
            )
        self.tool_rounds += 1
        at_once = 0 if self._is_watched or self._may_stand_in_the_way else self.setting.options.tool_concurrency
        self.rows.save(reply, calls, number, at_once)
        self._say(with_files_made(reply.message, reply.attachments), writer=reply.provider)
        self.call_ids |= {call.id for call in calls}
        return (yield from self._run_unless_told(reply, already_started=at_once))

    def _run_unless_told(self, reply: Reply, already_started: int = 0) -> Generator[Effect, Any, LlmMessage | None]:
        """Run what a reply asks for, where those who look at it have nothing against it."""
        calls = reply.tool_calls
        if self._is_watched:
            reviewed, directive = yield from self._review(reply)
            if isinstance(directive, RETRY):
                self.rows.reject(calls, directive.message or "Not run.", "a middleware sent the model back")
                self._correct()
                self._say_results(calls)
                return None
            self._check_not_stopped(directive)
            if reviewed is not reply:
                self.rows.reject(calls, "Not run.", "a middleware put another reply in its place")
                self._check_schema(reviewed)
                return (yield from self._end_with(reviewed, taking_back=True))
        return (yield from self._run_round(calls, already_started=already_started))

    def _run_round(
        self, calls: Sequence[ToolCall], approved: frozenset[str] = frozenset(), already_started: int = 0
    ) -> Generator[Effect, Any, LlmMessage | None]:
        """Run the calls of a round that have no result yet; the message, where the turn ends or waits with it."""
        awaiting, runnable = [], []
        for call in calls:
            if call.id not in self.rows.results:
                waits = call.id not in approved and (yield from self._needs_approval(call))
                (awaiting if waits else runnable).append(call)
        text = yield from self._run_tools(runnable, already_started)
        if text is not None:
            self.rows.reject(awaiting, "Not run: another tool ended the turn.", "skipped")
            return (yield from self._end_with(Reply(content=text)))
        if awaiting:
            self._log("parked: %d tool calls wait for approval", len(awaiting))
            return self.rows.park(awaiting)
        self._say_results(calls)
        return None

    def _needs_approval(self, call: ToolCall) -> Generator[Effect, Any, bool]:
        toolbox = self.setting.options.toolbox
        wanted = toolbox.approval_of(call)
        arguments = toolbox.arguments_of(call) if wanted else None
        if arguments is None:
            return False  # it needs nobody's, or cannot run
        return bool((yield CallHook(wanted, (arguments,)))) if callable(wanted) else True

    def _go_on(self, progress: Progress) -> Generator[Effect, Any, LlmMessage | None]:
        """Take up a turn where it stopped: finish the tool calls of its last round."""
        rows = self.rows
        self.tool_rounds, self.call_ids = progress.rounds, set(progress.call_ids)
        self.number = progress.next_round
        if self.setting.middlewares:
            self.context.spent_in_turn = rows.spent_in_turn()
        files = rows.files([rows.message_id]).get(rows.message_id, []) if rows.attachments else []
        for message, made in zip(rows.rounds, files_of_rounds(rows.rounds, files), strict=True):
            if progress.last_word is None or message is not rows.rounds[-1]:
                self._say(with_files_made(message, made), writer=progress.provider)
            if message is not rows.rounds[-1]:
                self._say_results([ToolCall(call["id"], "", "") for call in message.get("tool_calls") or ()])
        if progress.last_word is not None:
            rows.received = progress.last_word
            return (yield from self._last_word(progress.last_word, is_saved=True))
        if progress.unseen is not None:
            rows.received = progress.unseen
            return (yield from self._run_unless_told(progress.unseen))
        unknown = [call for call in progress.calls if call.id in progress.interrupted]
        toolbox = self.setting.options.toolbox
        for call in unknown:
            if not toolbox.is_idempotent(call) or not rows.has_arguments_of(call):
                result = f"The tool {call.name!r} was interrupted while it ran. Whether it did its work is not known."
                rows.save_outcome(ToolOutcome(call, result, status="failed", error="interrupted"))
        if not progress.calls:
            return None
        return (yield from self._run_round(progress.calls, approved=progress.approved))

    # A call of the model

    def _ask_model(self) -> Generator[Effect, Any, Reply]:
        """A reply, by the first of the models that gives one. Every attempt leaves its request row."""
        number = 0
        for following in (*self._remaining(), None):
            messages = yield from self._prepared()
            answer, number = yield from self._try(messages, number)
            if answer.error is None:
                return answer.reply
            if following is None or not self._falls_back(answer):
                self.failed_call = answer.error
                raise answer.error
            self.candidate = following
            self._compose()
        raise AssertionError("unreachable")

    def _try(self, messages: list[Message], number: int) -> Generator[Effect, Any, tuple[Answer, int]]:
        """How a model answered, tried again while that may help; and the number of the last attempt."""
        for tries in itertools.count(1):
            answer = yield from self._call_model(messages, number + tries)
            if answer.error is not None:
                self.rows.record()
                wait = self._wait_before_retry(answer, tries)
                if wait is not None:
                    yield Wait(wait)
                    continue
            return answer, number + tries
        raise AssertionError("unreachable")

    def _call_model(self, messages: list[Message], number: int) -> Generator[Effect, Any, Answer]:
        if self._hooks("before_request"):
            messages = [copied(message) for message in messages]  # what is changed for one attempt is not for the next
        for hook in self._hooks("before_request"):
            changed = yield CallHook(hook, (messages,))
            messages = changed if isinstance(changed, list) else messages
        if self._hooks("on_new_message"):
            yield from self._call_hooks("on_new_message", self.rows.stored_placeholder())
        yield from self._check_budgets()
        self._saved_at = time.monotonic()
        corrections = self.context.correction_rounds or None
        self.context.messages, self.context.attempt = messages, number
        request = ModelRequest(
            llm=self.setting.llm,
            model=self.candidate.model,
            provider=self.candidate.provider,
            messages=messages,
            options=self.setting.options.for_completion(after_tools=self.tool_rounds > 0),
            stream=self.stream,
            taken_call_ids=frozenset(self.call_ids),
            on_late=self.rows.expect_late(),
            around=self._around("around_call"),
        )
        try:
            yield CallModel(request)
        finally:  # also where a signal comes as the turn is about to be told
            for answer in request.answers[-1:]:
                self.rows.ended(Attempt(answer, self.number, number, corrections))
                self._tell("on_answer", answer)
        answer = request.answers[-1]
        self._log("round %d, attempt %d: %s", self.number, number, answer.status_code)
        self.context.duration_ms = answer.duration_ms
        self.context.spent_in_turn += answer.reply.cost or 0
        if self.setting.meter is not None:
            self.setting.meter.paid(self.candidate, answer.reply.cost)
        return answer

    def _check_budgets(self) -> Generator[Effect, Any, None]:
        """Raise `BudgetExceeded` where one is spent, as far as that is on record at this moment."""
        if self.setting.meter is not None:
            reached, exceeded = self.setting.meter.look(self.candidate)
            for function, arguments in reached:
                yield CallHook(function, arguments)
            if exceeded is not None:
                raise exceeded

    def _tell_of_budgets(self) -> Generator[Effect, Any, None]:
        """Once the turn is over: tell of what its last calls have reached. Nothing that goes wrong here undoes it."""
        if self.setting.meter is None or not self.setting.meter.is_due:
            return
        self.rows.is_settled = True  # nobody can stop it any more
        try:
            reached, _ = self.setting.meter.look(self.candidate)
        except Exception as problem:
            log.warning("what is left of the budgets could not be read: %s", problem)
            return
        for function, arguments in reached:
            yield CallHook(function, arguments)

    def _prepared(self) -> Generator[Effect, Any, list[Message]]:
        """What the model is to be shown, as the middlewares leave it."""
        middlewares = self.setting.middlewares
        if not middlewares:
            return self.messages
        messages = [copied(message) for message in self.messages]
        context, candidate = self.context, self.candidate
        context.model, context.provider = candidate.model, candidate.answering_provider
        context.messages, context.round = messages, self.number
        context.estimate = lambda: self.setting.estimate(candidate, context.messages)
        if any(getattr(each, "needs_spent", False) for each in middlewares):
            context.spent = self.rows.spent()
        for method in methods_of(middlewares, "on_request"):
            said = yield CallHook(method, (context,))
            if said is RETRY or isinstance(said, RETRY | REPLACE | Verdict):
                raise InvalidValue(f"on_request returned {said!r}, and decides nothing: to end the turn there, raise")
        return context.messages

    def _remaining(self) -> tuple[Candidate, ...]:
        candidates = self.setting.candidates
        return candidates[candidates.index(self.candidate) + 1 :]

    def _wait_before_retry(self, answer: Answer, tries: int) -> float | None:
        if not answer.retryable or answer.shown:
            return None
        return self.setting.options.retries.wait_before(tries, answer.retry_after)  # type: ignore[union-attr]

    def _falls_back(self, answer: Answer) -> bool:
        """Whether another model is asked for what this one failed to give."""
        error, on = answer.error, self.setting.options.fallbacks.on
        if answer.shown or not isinstance(error, Exception) or isinstance(error, TurnCancelled):
            return False
        if on is None:
            return answer.status_code not in (400, 413, 422)
        names = {cls.__name__ for cls in type(error).__mro__}
        return any(wanted in names if isinstance(wanted, str) else isinstance(error, wanted) for wanted in on)

    # What middlewares and hooks say of a reply

    @property
    def _is_watched(self) -> bool:
        """Whether somebody looks at a reply, who may send the model back or raise: its rows are written before."""
        return bool(self._hooks("after_response") or methods_of(self.setting.middlewares, "on_response"))

    def _review(self, reply: Reply) -> Generator[Effect, Any, tuple[Reply, Directive | None]]:
        """The reply as hooks and middlewares leave it, and what is to be done with it."""
        reviewed = reply
        for hook in self._hooks("after_response"):
            changed = yield CallHook(hook, (reviewed,))
            reviewed = changed if isinstance(changed, Reply) else reviewed
        directive = yield from self._directive("on_response", reviewed)
        if isinstance(directive, REPLACE):
            reviewed = _reply_of(directive)
        if reviewed is not reply and reviewed.tool_calls:
            raise InvalidValue("a reply that is put in the place of another cannot ask for tools: give it none")
        return reviewed, directive

    def _directive(self, name: str, *arguments: Any) -> Generator[Effect, Any, Directive | None]:
        """What the first of the middlewares says, from the last to the first; each of them is told."""
        chosen = None
        for method in reversed(methods_of(self.setting.middlewares, name)):
            said = yield CallHook(method, (self.context, *arguments))
            said = RETRY() if said is RETRY else said  # as CONTINUE and STOP are returned
            if chosen is None and isinstance(said, RETRY | REPLACE | Verdict):
                chosen = said
        return chosen

    def _check_not_stopped(self, directive: Directive | None) -> None:
        if directive == STOP:
            raise StoppedByMiddleware(
                f"a middleware stopped the turn of chat {self.setting.chat_id} after a reply of "
                f"{self.candidate.model!r}; its request is on record"
            )

    def _check_schema(self, reply: Reply) -> None:
        schema = self.setting.options.schema
        if schema is None:
            return
        try:
            schema.parse(reply.content or "")
        except ValueError as problem:
            self.rows.record()
            raise InvalidReply(
                f"the reply of {reply.model!r} does not match the schema {schema.name!r}"
                f"{self._corrected()}: {problem}; it is in .text, whole",
                text=reply.content or "",
                problem=str(problem),
                reply=reply,
            ) from problem

    def _corrected(self) -> str:
        times = self.context.correction_rounds
        return f", after {times} correction{'s' if times > 1 else ''}" if times else ""

    def _send_back(self, message: str, reply: Reply | None) -> Generator[Effect, Any, None]:
        """Have the model say it again; what it said is not part of the history."""
        self._correct()
        if message:
            if reply is not None and reply.content:
                self._say({"role": "assistant", "content": reply.content})
            self._say({"role": "user", "content": message})
        self.rows.take_back()
        if reply is not None:
            self.rows.received = Reply(model=reply.model, provider=reply.provider)
        if reply is not None and (reply.content or reply.thinking):
            yield Show(Chunk(restart=True))

    def _correct(self) -> None:
        self.context.correction_rounds += 1
        if self.context.correction_rounds > MOST_CORRECTIONS:
            raise CorrectionsExceeded(
                f"middlewares sent the model back {self.context.correction_rounds} times in one turn of chat "
                f"{self.setting.chat_id}: bound what you return RETRY for, by context.correction_rounds"
            )

    def _end_with(self, reply: Reply, *, taking_back: bool = False) -> Generator[Effect, Any, LlmMessage]:
        """End the turn with what the model did not say: a tool's text, or what a middleware or a hook put there."""
        if not isinstance(reply.content, str | None):
            raise InvalidValue(f"a reply that is put in the place of another must be text, not {reply.content!r}")
        if taking_back:
            self.rows.take_back()
        message = self.rows.end_with(reply)
        if taking_back:
            yield Show(Chunk(restart=True))
        if reply.content:
            yield Show(Chunk(content=reply.content))
        yield from self._call_hooks("on_end_message", message)
        return message

    # Tools

    def _run_tools(self, calls: Sequence[ToolCall], already_started: int) -> Generator[Effect, Any, str | None]:
        """Run calls, so many side by side; each is marked as it starts, and its result written as it ends.

        The text of a tool that halts the turn.
        """
        at_once = self.setting.options.tool_concurrency
        first, waiting = list(calls[:at_once]), deque(calls[at_once:])
        if not already_started:
            self.rows.start(first)
        running: list[ToolCall] = []
        for call in first:
            yield from self._tell_start(call)
            running.append(call)
        failure: Exception | None = None
        halt: str | None = None
        tried: set[str] = set()
        while running:
            outcome: ToolOutcome = yield RunTools(tuple((call, self._context(call)) for call in running))
            running.remove(outcome.call)
            watched = outcome.status == "failed" and self._watches_tool_errors
            goes_on = failure is None and halt is None and outcome.fatal is None and not outcome.halts and not watched
            following = waiting.popleft() if waiting and goes_on else None
            self.rows.save_outcome(outcome, following)
            self._tell("on_outcome", outcome)
            self._log("tool %s %s", outcome.call.name, outcome.status)
            try:
                if watched:
                    outcome, again = yield from self._judge(outcome, tried)
                    if again:
                        running.append(outcome.call)
                        continue
                failure = failure or outcome.fatal
                halt = outcome.result if outcome.halts and halt is None else halt
                yield from self._tell_end(outcome)
                if following is None and waiting and failure is None and halt is None:
                    following = waiting.popleft()
                    self.rows.start([following])
                if following is not None:
                    yield from self._tell_start(following)
                    running.append(following)
            except Exception as error:
                # What runs side by side has its effects: its result is waited for, and written, before the turn ends.
                failure = failure or error
        if failure is not None:
            raise failure
        if halt is not None:
            self.rows.reject(list(waiting), "Not run: another tool ended the turn.", "skipped")
        return halt

    def _judge(self, outcome: ToolOutcome, tried: set[str]) -> Generator[Effect, Any, tuple[ToolOutcome, bool]]:
        """A failed call as middlewares and hooks leave it, and whether it is to be run once more."""
        call, error = outcome.call, outcome.exception
        directive = yield from self._directive("on_tool_call_error", call, error)
        for hook in self._hooks("on_tool_call_error"):
            said = yield CallHook(hook, (call, error))
            if directive is None and isinstance(said, RETRY | REPLACE | Verdict):
                directive = said
        if isinstance(directive, RETRY) and call.id not in tried:
            tried.add(call.id)
            self.rows.start([call])
            return outcome, True
        if directive == STOP:
            return replace(outcome, fatal=outcome.fatal or error), False
        if directive == CONTINUE:
            return replace(outcome, fatal=None), False
        if isinstance(directive, REPLACE):
            outcome = replace(outcome, result=_reply_of(directive).content or "", fatal=None)
            self.rows.save_outcome(outcome)
        return outcome, False

    def _say_results(self, calls: Sequence[ToolCall]) -> None:
        results = self.rows.results
        self._say(*({"role": "tool", "tool_call_id": call.id, "content": results[call.id]} for call in calls))

    def _tell_start(self, call: ToolCall) -> Generator[Effect, Any, None]:
        for method in methods_of(self.setting.middlewares, "on_tool_call_start"):
            yield CallHook(method, (self.context, call))
        yield from self._call_hooks("on_tool_call_start", call)

    def _tell_end(self, outcome: ToolOutcome) -> Generator[Effect, Any, None]:
        yield from self._call_hooks("on_tool_call_end", outcome.call, outcome)
        for method in reversed(methods_of(self.setting.middlewares, "on_tool_call_end")):
            yield CallHook(method, (self.context, outcome.call, outcome))
        yield from self._call_hooks("on_tool_result", outcome.result)

    @property
    def _watches_tool_errors(self) -> bool:
        return bool(self._hooks("on_tool_call_error") or methods_of(self.setting.middlewares, "on_tool_call_error"))

    @property
    def _may_stand_in_the_way(self) -> bool:
        """Whether something may keep a tool from starting once its row is written."""
        return self.setting.options.toolbox.asks_for_approval

    def _context(self, call: ToolCall) -> ToolContext:
        around = self._around("around_tool", call)
        return ToolContext(self.setting.chat_id, call.id, self.setting.metadata, self.setting.redact, around)

    # Hooks

    def _hooks(self, name: str) -> tuple[Callable[..., Any], ...]:
        return self.setting.hooks.get(name, ())

    def _call_hooks(self, name: str, *arguments: Any) -> Generator[Effect, Any, None]:
        for function in self._hooks(name):
            yield CallHook(function, arguments)

    def _tell(self, name: str, *arguments: Any) -> None:
        tell(self.setting.middlewares, name, self.context, *arguments)

    def _around(self, name: str, *arguments: Any) -> Callable[[], Any]:
        if not methods_of(self.setting.middlewares, name):
            return nullcontext
        return functools.partial(within, self.setting.middlewares, name, self.context, *arguments)

    def _log(self, text: str, *values: Any) -> None:
        if log.isEnabledFor(logging.DEBUG):
            log.debug(f"chat {self.setting.chat_id}: {text}", *values)


def _reply_of(directive: REPLACE) -> Reply:
    response = directive.response
    return response if isinstance(response, Reply) else Reply(content=response)

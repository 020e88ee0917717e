"""Perform a turn: `play` on this thread, `aplay` on the event loop.

Both yield the chunks of a stream as they come; the stored message is in `outcome` at the end. They know how to call a
model, a tool and a hook, how to stop waiting for one, and nothing about the order of a turn.
"""

import asyncio
import contextvars
import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from .aside import Aside, Interrupt
from .claim import Wait
from .errors import AsyncTool, TurnCancelled
from .gateway import Call
from .options import Options
from .records import LlmMessage
from .tools import ToolContext
from .turn import CallHook, CallModel, Effect, Flow, RunTools, Show, Turn
from .values import Chunk, ToolCall, ToolOutcome

T = TypeVar("T")


@dataclass
class Outcome:
    message: LlmMessage | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """Where a flow stands: at an effect, at its result, or at the error that ended it."""

    effect: Effect | None = None
    result: LlmMessage | None = None
    error: BaseException | None = None


def advance(flow: Flow, value: Any = None, error: BaseException | None = None, call: Call | None = None) -> Step:
    """Let the flow do its next piece of database work; how a call of a model ended it is told in the same breath."""
    try:
        if call is not None:
            value, error = call.ended(error), None
            call.request.answers.append(value)
        return Step(effect=flow.throw(error) if error is not None else flow.send(value))
    except StopIteration as stop:
        return Step(result=stop.value)
    except BaseException as ending:
        if call is not None and inspect.getgeneratorstate(flow) == inspect.GEN_SUSPENDED and not call.request.answers:
            return advance(flow, None, ending, call)  # a signal, which came before the flow could be told
        return Step(error=ending)


def play(turn: Turn, outcome: Outcome) -> Generator[Chunk]:
    turn.store.check_outside_transaction()
    interrupt = Interrupt()
    turn.stop = interrupt.set
    flow, tools = turn.run(), _Threads(turn.setting.options, interrupt)
    call, error = None, None
    try:
        step = advance(flow)
        while step.effect is not None:
            value, error, call = None, None, None
            match step.effect:
                case CallModel(request):
                    try:
                        with Aside(interrupt) as aside:
                            call = Call(request)  # which is on record from here on
                            for chunk in aside.items_of(call.chunks()):
                                if turn.is_save_due:
                                    turn.save_partly(*call.so_far())
                                yield chunk
                    except BaseException as problem:
                        error = problem
                case Show(chunk):
                    if turn.stream:
                        yield chunk
                case effect:
                    try:
                        if not turn.rows.is_settled:
                            interrupt.check()
                        value = _perform(effect, tools, interrupt)
                    except BaseException as problem:
                        error = problem
            step, call = advance(flow, value, error, call), None
        if step.error is not None:
            raise step.error
        outcome.message = step.result
    finally:
        if call is not None:  # a signal came between the reply and its row
            advance(flow, None, error or call.unfinished(), call)
        flow.close()
        tools.close()


def _perform(effect: RunTools | CallHook | Wait, tools: "_Threads", interrupt: Interrupt) -> Any:
    match effect:
        case RunTools():
            return tools.first_of(effect)
        case CallHook(function, arguments):
            result = function(*arguments)
            if inspect.isawaitable(result):
                getattr(result, "close", lambda: None)()
                raise AsyncTool(f"the hook {function!r} is async: use aask() or aask_stream()")
            return result
        case Wait(seconds):
            interrupt.sleep(seconds)


class _Threads:
    """Tool calls on this thread where one runs alone, else side by side on threads."""

    def __init__(self, options: Options, interrupt: Interrupt):
        self.toolbox = options.toolbox
        self.at_once = options.tool_concurrency
        self.interrupt = interrupt
        self.executor: ThreadPoolExecutor | None = None
        self.running: dict[str, Future[ToolOutcome]] = {}
        self.is_closed = False

    def first_of(self, effect: RunTools) -> ToolOutcome:
        if len(effect.calls) == 1 and not self.running:
            call, context = effect.calls[0]
            return self.toolbox.run(call, context)
        if self.executor is None:
            self.executor = ThreadPoolExecutor(self.at_once, thread_name_prefix="llm_orm tool")
        for call, context in effect.calls:
            if call.id not in self.running:
                run = contextvars.copy_context().run
                self.running[call.id] = self.executor.submit(run, self._run, call, context)
        futures: list[Future[Any]] = [*self.running.values(), self.interrupt.future]
        wait_for(futures, return_when=FIRST_COMPLETED)
        for call, _ in effect.calls:
            if self.running[call.id].done():
                return self.running.pop(call.id).result()
        raise TurnCancelled()

    def _run(self, call: ToolCall, context: ToolContext) -> ToolOutcome:
        """Run a call on a thread, unless the turn was broken off before the thread came to it."""
        if self.is_closed:
            raise TurnCancelled()
        return self.toolbox.run(call, context)

    def close(self) -> None:
        self.is_closed = True
        if self.executor is not None:
            # A tool that still runs when its turn was broken off cannot be stopped, and is not waited for.
            self.executor.shutdown(wait=not self.running, cancel_futures=True)


class _AsyncInterrupt:
    """What makes a task stop waiting; `set` is called from any thread."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.is_set = False
        self.scope: asyncio.Timeout | None = None

    def set(self) -> None:
        try:
            if _running_loop() is self.loop:
                self._set()
            else:
                self.loop.call_soon_threadsafe(self._set)
        except RuntimeError:
            pass  # the loop is closed, and its tasks with it

    def _set(self) -> None:
        if self.is_set:
            return  # told twice: what is being stopped cannot be told again
        self.is_set = True
        if self.scope is not None:
            self.scope.reschedule(self.loop.time())

    def check(self) -> None:
        if self.is_set:
            raise TurnCancelled()

    async def wait(self, start: Callable[[], Awaitable[T]]) -> T:
        """What is waited for; raises `TurnCancelled` once the interrupt is set."""
        self.check()
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self.scope = scope
                return await start()
        except TimeoutError:
            if scope.expired():
                raise TurnCancelled() from None
            raise
        finally:
            self.scope = None


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def aplay(turn: Turn, outcome: Outcome) -> AsyncGenerator[Chunk]:
    turn.store.check_outside_transaction()
    interrupt = _AsyncInterrupt()
    turn.stop = interrupt.set
    flow, tools = turn.run(), _Tasks(turn.setting.options)
    off_the_loop = turn.store.off_the_loop
    call, error = None, None
    try:
        step = await off_the_loop(advance, flow)
        while step.effect is not None:
            value, error, call = None, None, None
            match step.effect:
                case CallModel(request):
                    try:
                        interrupt.check()
                        call = Call(request)  # which is on record from here on
                        async with aclosing(call.achunks()) as chunks:
                            while True:
                                try:
                                    chunk = await interrupt.wait(functools.partial(anext, chunks))
                                except StopAsyncIteration:
                                    break
                                if turn.is_save_due:
                                    await off_the_loop(turn.save_partly, *call.so_far())
                                yield chunk
                    except BaseException as problem:
                        error = problem
                case Show(chunk):
                    if turn.stream:
                        yield chunk
                case effect:
                    try:
                        value = await _aperform(effect, tools, interrupt, turn.rows.is_settled)
                    except BaseException as problem:
                        error = problem
            told, call = call, None
            step = await off_the_loop(advance, flow, value, error, told)
        if step.error is not None:
            raise step.error
        outcome.message = step.result
    finally:
        try:
            if call is not None:
                await off_the_loop(advance, flow, None, error or call.unfinished(), call)
            if inspect.getgeneratorstate(flow) != inspect.GEN_CLOSED:
                await off_the_loop(flow.close)
        finally:
            await tools.close()


async def _aperform(
    effect: RunTools | CallHook | Wait, tools: "_Tasks", interrupt: _AsyncInterrupt, is_settled: bool
) -> Any:
    match effect:
        case RunTools():
            return await interrupt.wait(lambda: tools.first_of(effect))
        case CallHook(function, arguments):
            if not is_settled:
                interrupt.check()
            result = function(*arguments)
            if not inspect.isawaitable(result):
                return result
            return await result if is_settled else await interrupt.wait(lambda: result)
        case Wait(seconds):
            await interrupt.wait(lambda: asyncio.sleep(seconds))


class _Tasks:
    """Tool calls as tasks: async ones on the loop, plain ones on threads."""

    def __init__(self, options: Options):
        self.toolbox = options.toolbox
        self.at_once = options.tool_concurrency
        self.executor: ThreadPoolExecutor | None = None
        self.running: dict[str, asyncio.Future[ToolOutcome]] = {}
        self.is_closed = False

    def _start(self, call: ToolCall, context: ToolContext) -> asyncio.Future[ToolOutcome]:
        if self.toolbox.is_async(call):
            return asyncio.ensure_future(self.toolbox.arun(call, context))
        if self.executor is None:
            self.executor = ThreadPoolExecutor(self.at_once, thread_name_prefix="llm_orm tool")
        here = contextvars.copy_context()
        run = functools.partial(self._run, call, context)
        return asyncio.get_running_loop().run_in_executor(self.executor, lambda: here.run(run))

    def _run(self, call: ToolCall, context: ToolContext) -> ToolOutcome:
        """As that of `_Threads`."""
        if self.is_closed:
            raise TurnCancelled()
        return self.toolbox.run(call, context)

    async def first_of(self, effect: RunTools) -> ToolOutcome:
        for call, context in effect.calls:
            if call.id not in self.running:
                self.running[call.id] = self._start(call, context)
        await asyncio.wait(self.running.values(), return_when=asyncio.FIRST_COMPLETED)
        for call, _ in effect.calls:
            if self.running[call.id].done():
                return self.running.pop(call.id).result()
        raise AssertionError("unreachable")

    async def close(self) -> None:
        self.is_closed = True
        for task in self.running.values():
            task.cancel()
        try:
            if self.running:
                await asyncio.wait(self.running.values())
        finally:
            if self.executor is not None:
                self.executor.shutdown(wait=not self.running, cancel_futures=True)

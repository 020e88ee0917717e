"""Perform a turn: `play` on this thread, `aplay` on the event loop.

Both yield the chunks of a stream as they come; the stored message is in `outcome` at the end. They know how to call a
model, a tool and a hook, and nothing about the order of a turn.
"""

import asyncio
import contextvars
import inspect
import time
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any

from .errors import AsyncTool
from .gateway import Call
from .records import LlmMessage
from .tools import Toolbox
from .turn import CallHook, CallModel, Effect, Flow, RunTools, Turn, Wait
from .values import Chunk, ToolOutcome


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
        return Step(effect=flow.throw(error) if error is not None else flow.send(value))
    except StopIteration as stop:
        return Step(result=stop.value)
    except BaseException as ending:
        return Step(error=ending)


def play(turn: Turn, outcome: Outcome) -> Generator[Chunk]:
    turn.store.check_outside_transaction()
    flow, tools = turn.run(), _Threads(turn.setting.options.toolbox)
    try:
        step = advance(flow)
        while step.effect is not None:
            value, error, call = None, None, None
            match step.effect:
                case CallModel(request):
                    call = Call(request)
                    try:
                        with closing(call.chunks()) as chunks:
                            yield from chunks
                    except BaseException as problem:
                        error = problem
                case effect:
                    try:
                        value = _perform(effect, tools)
                    except BaseException as problem:
                        error = problem
            step = advance(flow, value, error, call)
        if step.error is not None:
            raise step.error
        outcome.message = step.result
    finally:
        flow.close()
        tools.close()


def _perform(effect: RunTools | CallHook | Wait, tools: "_Threads") -> Any:
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
            time.sleep(seconds)


class _Threads:
    """Tool calls on this thread where one runs alone, else side by side on threads."""

    def __init__(self, toolbox: Toolbox):
        self.toolbox = toolbox
        self.executor: ThreadPoolExecutor | None = None
        self.running: dict[str, Future[ToolOutcome]] = {}

    def first_of(self, effect: RunTools) -> ToolOutcome:
        if len(effect.calls) == 1 and not self.running:
            call, context = effect.calls[0]
            return self.toolbox.run(call, context)
        if self.executor is None:
            self.executor = ThreadPoolExecutor(thread_name_prefix="llm_orm tool")
        for call, context in effect.calls:
            if call.id not in self.running:
                run = contextvars.copy_context().run
                self.running[call.id] = self.executor.submit(run, self.toolbox.run, call, context)
        wait_for(self.running.values(), return_when=FIRST_COMPLETED)
        for call, _ in effect.calls:
            if self.running[call.id].done():
                return self.running.pop(call.id).result()
        raise AssertionError("unreachable")

    def close(self) -> None:
        if self.executor is not None:
            # A tool that still runs when its turn was broken off cannot be stopped, and is not waited for.
            self.executor.shutdown(wait=not self.running, cancel_futures=True)


async def aplay(turn: Turn, outcome: Outcome) -> AsyncGenerator[Chunk]:
    turn.store.check_outside_transaction()
    flow, tools = turn.run(), _Tasks(turn.setting.options.toolbox)
    off_the_loop = turn.store.off_the_loop
    try:
        step = await off_the_loop(advance, flow)
        while step.effect is not None:
            value, error, call = None, None, None
            match step.effect:
                case CallModel(request):
                    call = Call(request)
                    try:
                        async with aclosing(call.achunks()) as chunks:
                            async for chunk in chunks:
                                yield chunk
                    except BaseException as problem:
                        error = problem
                    else:
                        if call.has_usage:  # else its tokens are counted, which takes a while: off the loop
                            value, call = call.ended(), None
                case effect:
                    try:
                        value = await _aperform(effect, tools)
                    except BaseException as problem:
                        error = problem
            step = await off_the_loop(advance, flow, value, error, call)
        if step.error is not None:
            raise step.error
        outcome.message = step.result
    finally:
        try:
            if inspect.getgeneratorstate(flow) != inspect.GEN_CLOSED:
                await off_the_loop(flow.close)
        finally:
            await tools.close()


async def _aperform(effect: RunTools | CallHook | Wait, tools: "_Tasks") -> Any:
    match effect:
        case RunTools():
            return await tools.first_of(effect)
        case CallHook(function, arguments):
            result = function(*arguments)
            return await result if inspect.isawaitable(result) else result
        case Wait(seconds):
            await asyncio.sleep(seconds)


class _Tasks:
    """Tool calls as tasks: async ones on the loop, plain ones on threads."""

    def __init__(self, toolbox: Toolbox):
        self.toolbox = toolbox
        self.running: dict[str, asyncio.Task[ToolOutcome]] = {}

    async def first_of(self, effect: RunTools) -> ToolOutcome:
        for call, context in effect.calls:
            if call.id not in self.running:
                if self.toolbox.is_async(call):
                    work = self.toolbox.arun(call, context)
                else:
                    work = asyncio.to_thread(self.toolbox.run, call, context)
                self.running[call.id] = asyncio.ensure_future(work)
        await asyncio.wait(self.running.values(), return_when=asyncio.FIRST_COMPLETED)
        for call, _ in effect.calls:
            if self.running[call.id].done():
                return self.running.pop(call.id).result()
        raise AssertionError("unreachable")

    async def close(self) -> None:
        for task in self.running.values():
            task.cancel()
        if self.running:
            await asyncio.wait(self.running.values())

"""Runs a generator on another thread, step by step, so that whoever waits for its next item can be told to stop.

A thread that waits for a provider cannot be interrupted; one that waits for another thread can.
"""

import contextvars
import functools
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, InvalidStateError
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from .errors import TurnCancelled

T = TypeVar("T")

log = logging.getLogger("llm_orm")

_STOPPED, _END = object(), object()

LOOK_EVERY_S = 0.5
"""How often a thread that waits looks whether Python has a signal for it."""


class Interrupt:
    """What makes a thread stop waiting; `set` is called from another one."""

    def __init__(self) -> None:
        self.future: Future[None] = Future()
        """Done once somebody wants the turn to end."""
        self.listener: SimpleQueue[Any] | None = None

    def set(self) -> None:
        try:
            self.future.set_result(None)
        except InvalidStateError:
            return  # told twice
        listener = self.listener  # which whoever waits may take away at this moment
        if listener is not None:
            listener.put(_STOPPED)

    def check(self) -> None:
        if self.future.done():
            raise TurnCancelled()

    def sleep(self, seconds: float) -> None:
        try:
            self.future.result(timeout=seconds)
        except TimeoutError:
            return
        raise TurnCancelled()


class Aside(Generic[T]):
    """The items of a generator. Left early, it closes the generator; at once, where that waits for nothing.

    To enter it raises `TurnCancelled` where the interrupt is set already; from then on its generator does begin.
    """

    def __init__(self, interrupt: Interrupt):
        self._generator: Generator[T] | None = None
        self._next: Callable[[], Any] = lambda: _END
        self._interrupt = interrupt
        self._results: SimpleQueue[Any] = SimpleQueue()
        self._run = contextvars.copy_context().run
        self._has_begun = False
        self._is_waiting = False

    def __enter__(self) -> "Aside[T]":
        self._interrupt.listener = self._results
        self._interrupt.check()
        self._worker = _worker()
        return self

    def items_of(self, generator: Generator[T]) -> Iterator[T]:
        self._generator, self._next = generator, functools.partial(next, generator, _END)
        return self

    def __exit__(self, *exc: object) -> None:
        self._interrupt.listener = None
        self._results = SimpleQueue()  # what was said in the old one does not keep it from closing
        generator = self._generator
        try:
            if generator is None or inspect.getgeneratorstate(generator) == inspect.GEN_CLOSED:
                return
            if self._is_waiting:
                # It closes once what it waits for comes, or fails to.
                self._worker.tasks.put(lambda: self._close_quietly(generator))
            else:
                self._step(generator.close)
        finally:
            self._worker.tasks.put(self._worker.rest)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._has_begun:
            self._interrupt.check()  # before it waits for the next one, and can be closed at once
        self._has_begun = True
        item = self._step(self._next)
        if item is _END:
            raise StopIteration
        return item

    def _step(self, function: Callable[[], Any]) -> Any:
        def task() -> None:
            try:
                self._results.put((self._run(function), None))
            except BaseException as error:
                self._results.put((None, error))

        if sys.is_finalizing():
            return self._run(function)  # Python ends, and its daemon threads run no more
        self._is_waiting = True
        self._worker.tasks.put(task)
        result = self._result()
        if result is _STOPPED:
            raise TurnCancelled()
        self._is_waiting = False
        value, error = result
        if error is not None:
            raise error
        return value

    def _result(self) -> Any:
        while True:
            try:
                return self._results.get(timeout=LOOK_EVERY_S)
            except Empty:
                continue  # a Ctrl-C that came right before this wait, or on Windows in it, is heard of now

    def _close_quietly(self, generator: Generator[T]) -> None:
        try:
            self._run(generator.close)
        except BaseException as error:
            log.debug("what was no longer waited for failed: %r", error)


class _Worker:
    """A thread that runs what it is given, one after the other."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._run, name="llm_orm model", daemon=True).start()

    def _run(self) -> None:
        while True:
            self.tasks.get()()

    def rest(self) -> None:
        _idle.append(self)


_idle: list[_Worker] = []
if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_idle.clear)  # threads do not live on in a forked process


def _worker() -> _Worker:
    try:
        return _idle.pop()
    except IndexError:
        return _Worker()

"""What goes on beside the turns of a process: they are said to be alive, and told when somebody wants them stopped."""

import logging
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from uuid import UUID

BEAT_EVERY_S = 5.0
LOOK_EVERY_S = 0.5

log = logging.getLogger("llm_orm")


class Heart:
    """A thread for the turns in progress; short turns never get to see it.

    beat         called with their message ids every five seconds: writes down that they are alive
    cancelled    called with their message ids twice a second: returns those that are to be stopped
    """

    def __init__(
        self,
        beat: Callable[[list[UUID]], None],
        cancelled: Callable[[list[UUID]], Collection[UUID]] = lambda message_ids: (),
        every_s: float = BEAT_EVERY_S,
        look_every_s: float = LOOK_EVERY_S,
    ):
        self._beat = beat
        self._cancelled = cancelled
        self._every_s = every_s
        self._look_every_s = min(look_every_s, every_s)
        self.reset()
        _hearts.add(self)

    def reset(self) -> None:
        """Begin anew, with no turn: in a forked process there is no thread, and the turns are the parent's."""
        self._turns: dict[UUID, Callable[[], None]] = {}
        self._busy = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @contextmanager
    def beating(self, message_id: UUID, stop: Callable[[], None] = lambda: None) -> Iterator[None]:
        """For as long as a turn runs. `stop` is called, from another thread, where somebody wants it to end."""
        self._turns[message_id] = stop
        self._busy.set()
        if self._thread is None:
            self._start()
        try:
            yield
        finally:
            self._turns.pop(message_id, None)

    def cancel(self, message_id: UUID) -> None:
        """Tell a turn of this process at once, rather than when it is looked for."""
        stop = self._turns.get(message_id)
        if stop is not None:
            stop()

    def stop(self) -> None:
        self._stopped.set()
        self._busy.set()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="llm_orm heart", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        silent_s = 0.0
        while self._busy.wait() and not self._stopped.wait(self._look_every_s):
            turns = list(self._turns)
            if not turns:
                self._busy.clear()
                if self._turns:  # one began in this moment
                    self._busy.set()
                continue
            silent_s += self._look_every_s
            self._look(turns)
            if silent_s >= self._every_s:
                silent_s = 0.0
                self._say_alive(turns)

    def _look(self, turns: list[UUID]) -> None:
        try:
            cancelled = self._cancelled(turns)
        except Exception as error:
            log.debug("could not ask whether %d turns are to be stopped: %s", len(turns), error)
            return
        for message_id in cancelled:
            self.cancel(message_id)

    def _say_alive(self, turns: list[UUID]) -> None:
        try:
            self._beat(turns)
        except Exception as error:
            # A missed beat harms nobody, and the next may succeed: the turns themselves report a dead database.
            log.warning("could not tell the database that %d turns are alive: %s", len(turns), error)


_hearts: "weakref.WeakSet[Heart]" = weakref.WeakSet()


def _reset_all() -> None:
    for heart in list(_hearts):
        heart.reset()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_reset_all)

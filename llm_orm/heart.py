"""Signs of life: tells the database, now and then, which turns this process is still working on."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

BEAT_EVERY_S = 5.0

log = logging.getLogger("llm_orm")


class Heart:
    """Calls `beat(message_ids)` every five seconds for the turns in progress; short turns never get there."""

    def __init__(self, beat: Callable[[list[Any]], None], every_s: float = BEAT_EVERY_S):
        self._beat = beat
        self._every_s = every_s
        self._turns: set[UUID] = set()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @contextmanager
    def beating(self, message_id: UUID) -> Iterator[None]:
        self._turns.add(message_id)
        if self._thread is None or not self._thread.is_alive():  # it does not live on in a forked process
            self._start()
        try:
            yield
        finally:
            self._turns.discard(message_id)

    def stop(self) -> None:
        self._stopped.set()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="llm_orm heart", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            turns = list(self._turns)
            if not turns:
                continue
            try:
                self._beat(turns)
            except Exception as error:
                # A missed beat harms nobody, and the next may succeed: the turns themselves report a dead database.
                log.warning("could not tell the database that %d turns are alive: %s", len(turns), error)

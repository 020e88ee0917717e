"""The HTTP server: takes a request, plays the next step of the script, writes down what it billed."""

import json
import os
import selectors
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Protocol

from . import anthropic, gemini, openai
from .script import Answer, Wanted

Trouble = Literal["close", "reset", "hang", "end", "broken", "error"]


class WireFormat(Protocol):
    """What each wire format's module knows."""

    @property
    def NAME(self) -> str: ...
    @property
    def REQUEST_ID_HEADER(self) -> str: ...
    def accepts(self, path: str) -> bool: ...
    def parse_request(self, path: str, body: dict[str, Any]) -> Wanted: ...
    def render_body(self, answer: Answer, wanted: Wanted) -> dict[str, Any]: ...
    def render_events(self, answer: Answer, wanted: Wanted) -> list[bytes]: ...
    def render_error(self, status: int, message: str, retry_after: float | None = None) -> dict[str, Any]: ...
    def render_error_event(self, status: int, message: str) -> bytes: ...


WIRE_FORMATS: tuple[WireFormat, ...] = (openai, anthropic, gemini)


@dataclass(frozen=True)
class Request:
    """A request as it arrived. Header names are in lower case."""

    format: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    model: str
    stream: bool


@dataclass
class Bill:
    """What one request cost. A reply is billed in full once its headers are sent, received or not.

    `status` is None until a status line is sent. `complete` says that every byte was handed to the socket,
    `events_sent` how many events of a stream were, `disconnected` that the client was seen to hang up.
    """

    format: str
    model: str
    stream: bool
    status: int | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    thinking_tokens: int = 0
    events_sent: int = 0
    complete: bool = False
    disconnected: bool = False

    def charge(self, answer: Answer) -> None:
        self.input_tokens = answer.input_tokens
        self.output_tokens = answer.output_tokens
        self.cached_tokens = answer.cached_tokens
        self.cache_write_tokens = answer.cache_write_tokens
        self.thinking_tokens = answer.thinking_tokens


class Gate:
    """Shut until opened; a client that hangs up while waiting at it is noticed."""

    def __init__(self) -> None:
        self._inside, self._outside = socket.socketpair()

    def open(self) -> None:
        self._outside.close()

    def opens_before_hangup(self, connection: socket.socket) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._inside, selectors.EVENT_READ)
            selector.register(connection, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select()]
        return self._inside in ready

    def close(self) -> None:
        self._outside.close()
        self._inside.close()


@dataclass(frozen=True)
class Step:
    """What happens to one request: an answer or an error, and where it goes wrong on the way."""

    answer: Answer = field(default_factory=Answer)
    status: int = 200
    message: str = ""
    retry_after: float | None = None
    headers: dict[str, str] = field(default_factory=dict)
    trouble: Trouble | None = None
    chunk: int | None = None
    byte: int | None = None
    gate: Gate | None = None
    change: Callable[[dict[str, Any]], None] | None = None

    @property
    def before_headers(self) -> bool:
        return self.trouble is not None and self.chunk is None and self.byte is None

    def render(self, wire: WireFormat, wanted: Wanted) -> tuple[list[bytes], list[bytes] | None]:
        """The body in pieces: what is sent before the connection is in trouble, and what if it survives."""
        pieces = wire.render_events(self.answer, wanted)
        if not wanted.stream:
            pieces = [_json(wire.render_body(self.answer, wanted))]
        if self.change is not None:
            pieces = [_changed(piece, self.change) for piece in pieces]
        if self.trouble is None or self.before_headers:
            return pieces, None
        before, after = self._divide(pieces, wanted.stream)
        if self.trouble == "error":
            return [*before, wire.render_error_event(self.status, self.message)], None
        if self.trouble == "broken" and wanted.stream:
            return [*before, b'data: {"broken\n\n', *after], None
        if self.trouble in ("broken", "end"):
            return before, None
        return before, after

    def _divide(self, pieces: list[bytes], stream: bool) -> tuple[list[bytes], list[bytes]]:
        """A body that is not streamed has no events to count: its trouble comes in the middle."""
        if stream and self.byte is None:
            return pieces[: self.chunk], pieces[self.chunk :]
        body = b"".join(pieces)
        at = len(body) // 2 if self.byte is None else self.byte
        return [body[:at]], [body[at:]]


class Provider:
    """A scripted provider. Steps are played in order, one a request; `otherwise` answers when none is left.

    with Provider() as provider:
        provider.reply("Hello")
        litellm.completion(**provider.openai(), messages=[...], max_retries=0)
    """

    def __init__(self, *, keep_alive: bool = False) -> None:
        self.requests: list[Request] = []
        self.ledger: list[Bill] = []
        self.otherwise: Answer | None = None
        self.keep_alive = keep_alive
        self._steps: deque[Step] = deque()
        self._gates: list[Gate] = []
        self._changed = threading.Condition(threading.RLock())
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="provider")
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Provider":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()
        for gate in self._gates:
            gate.close()
        if self._server.crashes:
            raise self._server.crashes[0]

    # What a test gives to litellm.

    def openai(self) -> dict[str, str]:
        return {"model": "openai/gpt-4o", "api_base": f"{self.url}/v1", "api_key": "test-key"}

    def anthropic(self) -> dict[str, str]:
        return {"model": "anthropic/claude-sonnet-4-5", "api_base": self.url, "api_key": "test-key"}

    def gemini(self) -> dict[str, str]:
        return {"model": "gemini/gemini-2.5-flash", "api_base": f"{self.url}/v1beta", "api_key": "test-key"}

    # What a test scripts.

    def reply(self, *answers: Answer | str) -> None:
        """Answers well, once for each."""
        for answer in answers:
            self._queue(Step(_answer(answer)))

    def reply_oddly(self, answer: Answer | str, change: Callable[[dict[str, Any]], None]) -> None:
        """Answers with what is no good answer: the body, or each event of the stream, as `change` leaves it."""
        self._queue(Step(_answer(answer), change=change))

    def fail(
        self,
        status: int,
        message: str = "it failed",
        *,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
        times: int = 1,
    ) -> None:
        """Answers with an HTTP error."""
        for _ in range(times):
            self._queue(Step(status=status, message=message, retry_after=retry_after, headers=headers or {}))

    def drop(self, *, times: int = 1) -> None:
        """Takes the request and closes the connection without a word."""
        for _ in range(times):
            self._queue(Step(trouble="close"))

    def fail_at(
        self, answer: Answer | str, *, byte: int | None = None, chunk: int | None = None, reset: bool = False
    ) -> None:
        """Drops the connection after so many bytes of the body, or events of the stream; `reset` sends a TCP RST."""
        self._queue(Step(_answer(answer), trouble="reset" if reset else "close", byte=byte, chunk=chunk))

    def end_early(self, answer: Answer | str, *, chunk: int) -> None:
        """Ends the stream in good order after so many events, without the rest; unstreamed, half a body."""
        self._queue(Step(_answer(answer), trouble="end", chunk=chunk))

    def broken_sse(self, answer: Answer | str, *, chunk: int = 2) -> None:
        """Sends an event that is no JSON after so many good ones, then the rest; unstreamed, a body that is no JSON."""
        self._queue(Step(_answer(answer), trouble="broken", chunk=chunk))

    def stream_error(
        self, answer: Answer | str, *, chunk: int = 2, status: int = 529, message: str = "overloaded"
    ) -> None:
        """Sends the provider's own error event after so many good ones, and ends; unstreamed, an HTTP error."""
        self._queue(Step(_answer(answer), status=status, message=message, trouble="error", chunk=chunk))

    def hang(self, answer: Answer | str = "late", *, chunk: int | None = None) -> None:
        """Says nothing, or nothing after so many events, until `release()`; then goes on with the answer."""
        gate = Gate()
        self._gates.append(gate)
        self._queue(Step(_answer(answer), trouble="hang", chunk=chunk, gate=gate))

    def release(self) -> None:
        """Lets go on what hangs, and what was scripted to and has not been reached."""
        for gate in self._gates:
            gate.open()

    # What a test looks at.

    def billed(self) -> dict[str, int]:
        """The ledger, summed: {"requests": 2, "input_tokens": 20, ...}."""
        columns = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "thinking_tokens")
        sums = {column: sum(getattr(bill, column) for bill in self.ledger) for column in columns}
        return {"requests": len(self.ledger), **sums}

    def wait_until(self, condition: Callable[[], bool], timeout: float = 5) -> None:
        """Returns once the books say so: `provider.wait_until(lambda: provider.ledger[0].disconnected)`."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                raise TimeoutError(f"the provider waited {timeout} s in vain; ledger: {self.ledger}")

    def _queue(self, step: Step) -> None:
        with self._changed:
            self._steps.append(step)

    def take(self, request: Request) -> tuple[Step, Bill]:
        """The step for this request, which is in the books from now on."""
        with self._changed:
            bill = Bill(request.format, request.model, request.stream)
            self.requests.append(request)
            self.ledger.append(bill)
            self._changed.notify_all()
            if self._steps:
                return self._steps.popleft(), bill
            if self.otherwise is not None:
                return Step(self.otherwise), bill
            return Step(status=400, message="the test scripted no reply for this request"), bill

    def note(self, bill: Bill, **facts: Any) -> None:
        with self._changed:
            for name, value in facts.items():
                setattr(bill, name, value)
            self._changed.notify_all()


def _answer(answer: Answer | str) -> Answer:
    return Answer(text=answer) if isinstance(answer, str) else answer


def _changed(piece: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The body, or the event, with its JSON changed."""
    head, mark, text = piece.rpartition(b"data: ")
    if text.startswith(b"[DONE]"):
        return piece
    data = json.loads(text)
    change(data)
    return head + mark + json.dumps(data).encode() + (b"\n\n" if mark else b"")


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.crashes: list[BaseException] = []
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Ends the connections that a client keeps open for a next request."""
        for connection in list(self._connections):
            with suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):
            self.crashes.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def provider(self) -> Provider:
        assert isinstance(self.server, _Server)
        return self.server.provider

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
        wire = next((wire for wire in WIRE_FORMATS if wire.accepts(path)), None)
        if wire is None:
            self.send_error(404, f"no wire format of ours is spoken at {path}")
            return
        wanted = wire.parse_request(path, body)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(wire.NAME, self.path, headers, body, wanted.model, wanted.stream)
        step, bill = self.provider.take(request)
        try:
            self._play(step, bill, wire, wanted)
        except ConnectionError:
            self.provider.note(bill, complete=False, disconnected=True)
            self.close_connection = True

    def _play(self, step: Step, bill: Bill, wire: WireFormat, wanted: Wanted) -> None:
        if step.before_headers and not self._survives(step, bill):
            return
        if step.status != 200 and not (step.trouble == "error" and wanted.stream):
            self._send_error_reply(step, bill, wire)
            return
        before, after = step.render(wire, wanted)
        bill.charge(step.answer)
        length = None if wanted.stream else len(b"".join(before + (after or [])))
        self._send_headers(200, bill, {wire.REQUEST_ID_HEADER: step.answer.request_id}, length)
        self._send(before, bill, wanted.stream, last=after is None)
        if after is not None and self._survives(step, bill):
            self._send(after, bill, wanted.stream, last=True)

    def _survives(self, step: Step, bill: Bill) -> bool:
        """Lives through the step's trouble; whether the reply goes on after it."""
        if step.gate is not None:
            if step.gate.opens_before_hangup(self.connection):
                return True
            self.provider.note(bill, disconnected=True)
        self.close_connection = True
        if step.trouble == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        return False

    def _send_error_reply(self, step: Step, bill: Bill, wire: WireFormat) -> None:
        body = _json(wire.render_error(step.status, step.message, step.retry_after))
        headers = {wire.REQUEST_ID_HEADER: "req_error", **step.headers}
        if step.retry_after is not None:
            headers["retry-after"] = str(step.retry_after)
        self._send_headers(step.status, bill, headers, len(body))
        self._send([body], bill, stream=False, last=True)

    def _send_headers(self, status: int, bill: Bill, headers: dict[str, str], length: int | None) -> None:
        """Headers of a body of so many bytes, or of a stream of events."""
        self.send_response(status)
        if length is None:
            headers = {"content-type": "text/event-stream", "transfer-encoding": "chunked", **headers}
        else:
            headers = {"content-type": "application/json", "content-length": str(length), **headers}
        if not self.provider.keep_alive:
            headers["connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.provider.note(bill, status=status)
        self.end_headers()

    def _send(self, pieces: list[bytes], bill: Bill, stream: bool, last: bool) -> None:
        """Hands pieces to the socket. The books are written first: the client may look at them the moment it reads."""
        note = self.provider.note
        for index, piece in enumerate(pieces):
            if stream:
                note(bill, events_sent=bill.events_sent + 1)
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b"")
            else:
                note(bill, complete=last and index == len(pieces) - 1)
                self.wfile.write(piece)
        if stream and last:
            note(bill, complete=True)
            self.wfile.write(b"0\r\n\r\n")


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()

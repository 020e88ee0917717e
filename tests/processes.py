"""Processes that run a program, forked from one that has imported us: that takes longer than most of them live."""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading


class Process:
    """A process of its own that runs a program; its standard error is ours.

    stdin, stdout  text, to talk with it
    """

    def __init__(self, program: str, *arguments: str):
        (their_stdin, stdin), (stdout, their_stdout), (self._ended, status) = os.pipe(), os.pipe(), os.pipe()
        given = json.dumps([program, arguments, os.getcwd(), dict(os.environ)]).encode()
        theirs = [their_stdin, their_stdout, 2, status]
        self.pid = _mother().fork(given, theirs)
        for end in (their_stdin, their_stdout, status):
            os.close(end)
        self.stdin, self.stdout = os.fdopen(stdin, "w"), os.fdopen(stdout)
        self.returncode: int | None = None

    def wait(self, timeout: float = 60) -> int:
        """Its exit code, once it has ended; -9 where it was killed."""
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} has not ended after {timeout} s")
            self.returncode = int(os.read(self._ended, 100))
        return self.returncode

    def kill(self) -> None:
        """End it as a power cut would, if it has not ended."""
        if self.returncode is None:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.wait()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        os.close(self._ended)
        self.stdout.close()
        try:
            self.stdin.close()
        except BrokenPipeError:
            pass


def run(program: str, *arguments: str, timeout: float = 60) -> str:
    """What a process with the program prints; it must end, and well."""
    with Process(program, *arguments) as process:
        too_late = threading.Timer(timeout, os.kill, (process.pid, signal.SIGKILL))
        too_late.start()
        try:
            process.stdin.close()
            printed = process.stdout.read()
        finally:
            too_late.cancel()
        assert process.wait() == 0
    return printed


class Mother:
    """The process that has imported us, and does nothing but fork."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen([sys.executable, "-W", "error", __file__], stdin=theirs)
        self.socket = ours
        self.lock = threading.Lock()

    def fork(self, given: bytes, descriptors: list[int]) -> int:
        with self.lock:
            socket.send_fds(self.socket, [given], descriptors)
            return int(self.socket.recv(100))

    def end(self) -> None:
        self.socket.close()
        self.process.wait()


_mothers: list[Mother] = []


def _mother() -> Mother:
    if not _mothers:
        _mothers.append(Mother())
        atexit.register(_mothers[0].end)
    return _mothers[0]


def _serve() -> str:
    """In the mother: fork for whoever asks. In a child: the program that it is to run."""
    import llm_orm.testing  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the nurses
    with socket.socket(fileno=os.dup(0)) as asked:
        while True:
            given, descriptors, _, _ = socket.recv_fds(asked, 1_000_000, 4)
            if not given:
                os._exit(0)
            if not os.fork():
                break
            for descriptor in descriptors:
                os.close(descriptor)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        *standard, status = descriptors
        for number, descriptor in enumerate(standard):
            os.dup2(descriptor, number)
            os.close(descriptor)
        pid = os.fork()
        if pid:
            _nurse(pid, asked, status)
    os.close(status)
    program, sys.argv[1:], folder, environment = json.loads(given)
    sys.path[0] = ""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return program


def _nurse(pid: int, asked: socket.socket, status: int) -> None:
    asked.send(str(pid).encode())
    for standard in range(2):
        os.close(standard)
    _, ended = os.waitpid(pid, 0)
    os.write(status, str(os.waitstatus_to_exitcode(ended)).encode())
    os._exit(0)


if __name__ == "__main__":
    exec(compile(_serve(), "<program>", "exec"), {"__name__": "__main__"})

"""What a command prints on a terminal."""

import os
import pty
import re
import threading
from contextlib import redirect_stdout

import pytest

from llm_orm_cli import main


def on_a_terminal(*arguments: str, columns: int = 100, encoding: str = "utf-8") -> str:
    """What `llm-orm …` draws on a terminal of so many columns, without its styles."""
    ours, theirs = pty.openpty()
    read: list[bytes] = []

    def collect() -> None:
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # nobody has it open for writing any longer
                return
            if not piece:
                return
            read.append(piece)

    reader = threading.Thread(target=collect)
    reader.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TERM", "xterm")
            patch.setenv("COLUMNS", str(columns))
            with open(theirs, "w", encoding=encoding) as terminal, redirect_stdout(terminal):
                main(list(arguments), prog_name="llm-orm", standalone_mode=False)
    finally:
        reader.join()
        os.close(ours)
    return STYLES.sub("", b"".join(read).decode(encoding)).replace("\r\n", "\n")


STYLES = re.compile(r"\x1b\[[0-9;]*m")

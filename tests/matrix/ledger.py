"""What the provider and the tools did, in a file of their own: it outlives the process that they were called from."""

import json
import os
from pathlib import Path
from typing import Any


class Ledger:
    """Lines of JSON, each written in one go: {"who": "provider", "did": "answered", "call": 3, …}."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.touch()

    def write(self, who: str, did: str, **what: Any) -> None:
        line = json.dumps({"who": who, "did": did, "process": os.getpid(), **what}) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def read(self, who: str | None = None, did: str | None = None) -> list[dict[str, Any]]:
        entries = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [entry for entry in entries if who in (None, entry["who"]) and did in (None, entry["did"])]

"""A dashboard asked over HTTP, and its pages as a browser would read them."""

import re
from html.parser import HTMLParser
from typing import Any

from starlette.testclient import TestClient

HTML = {"accept": "text/html"}
LOCAL = "http://127.0.0.1:8377"


class Elements(HTMLParser):
    """What a browser would make of a page: its elements, and the text in each."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in_script = tag == "script"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        (self.scripts if self._in_script else self.texts).append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def attributes(self, *names: str) -> list[str]:
        return [found[name] or "" for _, found in self.found for name in names if name in found]


def client_of(app: Any, **options: Any) -> TestClient:
    return TestClient(app, base_url=LOCAL, headers=HTML, follow_redirects=False, **options)

"""create_app(store) → an ASGI application: the pages, their exports, the login, and what is said when it goes wrong."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

import jinja2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from ..errors import DatabaseUnavailable, InvalidValue, LlmOrmError, StoreClosed, TablesMissing, WrongCall
from ..records import now
from ..store import Store
from . import shown, tables
from .access import HEADERS, Access, Guard, forget_cookie, is_within, not_kept, secure_cookie
from .page import Page
from .pages import PAGES, Entry, Make, ignored, where_it_says_something
from .pages.chats import chat_page
from .query import FILTERS, NONE, RANGES, REFRESH_S, Query, query_of, tidied
from .tables import Table

FOLDER = Path(__file__).parent
THEME = "llm_orm_theme"
LONGEST_FORM = 4096


def create_app(
    store: Store, *, token: str | None = None, hosts: Sequence[str] | str | None = None, title: str = "llm-orm"
) -> Starlette:
    """The dashboard of a store, as an ASGI application of its own, or to be mounted in another: it only reads.

    token    what people log in with, and scripts send as `Authorization: Bearer …`; at least 16 characters. None: who
             can reach it may read it, so that it answers to localhost only, unless `hosts` says otherwise
    hosts    the names it may be asked for under, without port: ["llm.example.com"]; "*" for any, where the application
             around it looks who asks
    title    what is written at the top

        app = create_app(connect("postgresql://…"), token=os.environ["LLM_ORM_DASHBOARD_TOKEN"])
        application.mount("/llm", app)      # Starlette, FastAPI

    Raises `InvalidValue`.
    """
    access = Access(token, hosts)
    return _Dashboard(store, access, title).app()


class _Dashboard:
    def __init__(self, store: Store, access: Access, title: str):
        self.store, self.access, self.title = store, access, title

    def app(self) -> Starlette:
        routes: list[Any] = [
            Mount("/static", StaticFiles(directory=FOLDER / "static")),
            Route("/login", self.login, methods=["GET", "POST"]),
            Route("/logout", self.logout, methods=["POST"]),
            Route("/metrics", self.metrics),
        ]
        for path, entry in PAGES.items():
            name = {"/": "/overview"}.get(path, path)
            routes += [Route(path, self.page(path, entry)), Route(f"{name}.{{format}}", self.page(path, entry))]
        routes += [Route("/chats/{chat_id}.{format}", self.chat), Route("/chats/{chat_id}", self.chat)]
        return Starlette(
            routes=routes,
            middleware=[Middleware(Guard, access=self.access)],
            exception_handlers={
                HTTPException: self.no_page,
                LlmOrmError: self.problem,
                Exception: self.failure,
            },
        )

    # Pages

    def page(self, path: str, entry: Entry) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            return await self.answer(request, path, entry.make, entry)

        return answer

    async def chat(self, request: Request) -> Response:
        chat_id = request.path_params["chat_id"]

        def make(store: Store, query: Query) -> Page:
            page = chat_page(store, query, chat_id)
            if page is None:
                raise HTTPException(404, f"There is no chat {chat_id}: it was deleted, or it never was.")
            return page

        return await self.answer(request, f"/chats/{chat_id}", make, None)

    async def answer(self, request: Request, path: str, make: Make, entry: Entry | None) -> Response:
        root = request.scope.get("root_path", "")
        pairs = request.query_params.multi_items()
        tidy = tidied(pairs)
        if tidy != pairs:
            target = root + path if "format" not in request.path_params else request.scope["path"]
            return RedirectResponse(target + (f"?{urlencode(tidy)}" if tidy else ""), 303)
        return await self.store.off_the_loop(self._made, request, pairs, root, path, make, entry)

    def _made(self, request: Request, pairs: Any, root: str, path: str, make: Make, entry: Entry | None) -> Response:
        kind = request.path_params.get("format")
        if kind not in (None, "csv", "json"):
            raise HTTPException(404, "There is no such page; tables are to be had as .csv and .json.")
        query = query_of(self.store, pairs, now=now(), root=root, path=path, format=kind)
        passed_over = ignored(query, entry)
        if passed_over and query.is_export:  # a page shows that it says nothing; a table cannot
            raise InvalidValue(_says_nothing(passed_over[0]))
        query = replace(query, where={name: each for name, each in query.where.items() if name not in passed_over})
        if query.is_export:
            return _exported(self.store.patiently(lambda: self._exported(query, make)), query)
        page, tables, values = self.store.patiently(lambda: self._read(query, make))
        shown_too: Any = {"title": page.title, "tables": tables, "values": values, "ignored": passed_over}
        return HTMLResponse(self.drawn(request, page.template, page=page, query=query, **shown_too))

    def _read(self, query: Query, make: Make) -> tuple[Page, list[Table], Mapping[str, Any]]:
        with self.store.connection():
            page = make(self.store, query)
            return page, [table() for table in page.tables.values()], page.values()

    def _exported(self, query: Query, make: Make) -> Table:
        """The one table that is asked for."""
        with self.store.connection():
            found = make(self.store, query).tables
            name = query.table or next(iter(found), "")
            if name not in found:
                raise HTTPException(404, f"There is no table {name!r} here; there are {', '.join(found) or 'none'}.")
            return found[name]()

    def drawn(self, request: Request, template: str, **values: Any) -> str:
        theme = request.cookies.get(THEME)
        root = request.scope.get("root_path", "")
        return (
            _templates()
            .get_template(template)
            .render(
                {
                    "root": root,
                    "nav": [(path, entry.title) for path, entry in PAGES.items()],
                    "site": self.title,
                    "theme": theme if theme in ("light", "dark") else None,
                    "version": _version(),
                    "has_login": self.access.token is not None,
                    "filter_names": [*FILTERS, *self.store.chat_columns],
                    "now": now(),
                    **values,
                }
            )
        )

    async def metrics(self, request: Request) -> Response:
        from ..metrics import CONTENT_TYPE, metrics_text  # of a package of its own, which may not be there

        return Response(await self.store.off_the_loop(metrics_text, self.store), headers={"Content-Type": CONTENT_TYPE})

    # Login

    async def login(self, request: Request) -> Response:
        root = request.scope.get("root_path", "")
        if self.access.token is None:
            return RedirectResponse(f"{root}/", 303)
        target = request.query_params.get("next", "/")
        target = target if is_within(target) else "/"
        wrong = None
        if request.method == "POST":
            if self.access.is_token(await _token_in(request)):
                back = urlencode({"next": target, "done": 1})
                answer = RedirectResponse(f"{root}/login?{back}", 303)  # which looks whether the browser kept it
                secure_cookie(answer, self.access, request.scope)
                return answer
            wrong = "That is not the token of this dashboard."
        elif self.access.admits(request.headers):
            return RedirectResponse(root + target, 303)
        elif "done" in request.query_params:
            wrong = not_kept(request.scope)
        page = self.drawn(request, "login.html", title="Log in", target=target, wrong=wrong)
        return HTMLResponse(page, 401 if wrong else 200)

    async def logout(self, request: Request) -> Response:
        answer = RedirectResponse(f"{request.scope.get('root_path', '')}/login", 303)
        forget_cookie(answer, self.access, request.scope)
        return answer

    # What went wrong

    async def problem(self, request: Request, error: Exception) -> Response:
        status, what, advice = _told(error)
        return self.told(request, status, what, str(error), advice)

    async def no_page(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = "There is no such page" if error.status_code == 404 else error.detail
        detail = error.detail if error.detail != "Not Found" else "The address leads nowhere."
        return self.told(request, error.status_code, what, detail, "", error.headers)

    async def failure(self, request: Request, error: Exception) -> Response:
        # What it was is for the log of the server, which gets the exception behind this answer.
        return self.told(request, 500, "This page could not be made", "The log of the server says why.", "")

    def told(
        self,
        request: Request,
        status: int,
        what: str,
        detail: str,
        advice: str,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        accepts = request.headers.get("accept", "*/*")
        is_of_data = request.scope["path"].endswith((".csv", ".json", "/metrics"))
        if ("text/html" in accepts or accepts == "*/*") and not is_of_data:
            page = self.drawn(request, "problem.html", title=what, status=status, detail=_short(detail), advice=advice)
            return HTMLResponse(page, status, headers={**HEADERS, **(headers or {})})
        body = json.dumps({"error": _short(detail), "status": status})
        return Response(body, status, media_type="application/json", headers={**HEADERS, **(headers or {})})


def _told(error: Exception) -> tuple[int, str, str]:
    """(status, what went wrong, what to do) for an error of ours."""
    if isinstance(error, WrongCall):
        return 400, "The address asks for something that is not there", "Change the address, or begin anew."
    if isinstance(error, TablesMissing):
        return 503, "The tables are not there yet", 'Run "llm-orm migrate", then load this page again.'
    if isinstance(error, DatabaseUnavailable | StoreClosed):
        return 503, "The database does not answer", "Nothing is lost. Load this page again in a moment."
    return 503, "This page cannot be shown", "The setup has to be changed first."


LONGEST_DETAIL = 600


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_DETAIL else f"{text[:LONGEST_DETAIL]}…"


def _says_nothing(name: str) -> str:
    what, pages = name if name in ("by", "q") else f"the filter {name!r}", where_it_says_something(name)
    return f"{what} says nothing about this table: leave it out. The pages that have it: {pages}"


def _exported(table: Table, query: Query) -> Response:
    if query.format == "json":
        return Response(table.as_json(), media_type="application/json")
    headers = {"Content-Disposition": f'attachment; filename="llm-orm-{table.name}.csv"'}
    return Response(table.as_csv(), media_type="text/csv; charset=utf-8", headers=headers)


async def _token_in(request: Request) -> str:
    """What was written into the form; no more of it is read than a form may have."""
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > LONGEST_FORM:
                return ""
    except ClientDisconnect:
        return ""
    return parse_qs(body.decode("ascii", "replace")).get("token", [""])[0].strip()


def _path(address: str) -> str:
    """An address without what it asks for."""
    return address.partition("?")[0]


def _pretty_json(value: Any) -> str:
    return shown.pretty(json.dumps(value, ensure_ascii=False, default=str))


def _known(stats: Any) -> Any:
    return shown.known_cost(stats.cost, stats.requests, stats.unpriced_requests)


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


@functools.cache
def _templates() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(path=_path, pretty_json=_pretty_json, capitalize_first=_capitalized)
    made.globals.update(
        shown=shown,
        cell=tables.cell,
        priced=tables.priced,
        beside=tables.beside,
        known=_known,
        ranges=RANGES,
        refreshes=REFRESH_S,
        none=NONE,
    )
    return made


@functools.cache
def _version() -> str:
    """What changes when one of the static files does: a browser may keep what it has under the same."""
    digest = hashlib.sha256()
    for path in sorted((FOLDER / "static").rglob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]

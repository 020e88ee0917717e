"""Who may look: the names a request may come under, the token, the cookie after login, the headers of every answer."""

import hashlib
import hmac
import re
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import InvalidValue

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
COOKIE = "llm_orm_dashboard"
LOGIN_LASTS_S = 7 * 86400
SHORTEST_TOKEN = 16

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

KEPT = {"Cache-Control": "public, max-age=31536000, immutable"}
"""Of the static files, whose addresses change with what is in them."""

OPEN = ("/login", "/static/")
"""What can be had without a login."""


class Access:
    """Whoever knows the token, or has logged in with it; everybody where there is none.

    hosts    the names that requests may come under; without a token only those of this machine, so that no page of
             another site can read the dashboard under a name of its own; "*" for any
    """

    def __init__(self, token: str | None, hosts: Sequence[str] | str | None):
        if token is not None and (not isinstance(token, str) or len(token) < SHORTEST_TOKEN):
            raise InvalidValue(
                f"a token of the dashboard has at least {SHORTEST_TOKEN} characters, or others will guess it: "
                "secrets.token_urlsafe() makes one"
            )
        self.token = token
        # One for each token: a browser has the cookies of a host in common for all its ports.
        self.cookie_name = f"{COOKIE}_{self._proof('name')[:8]}"
        hosts = (("*",) if token else LOOPBACK) if hosts is None else (hosts,) if isinstance(hosts, str) else hosts
        self.hosts = frozenset(host.lower() for host in hosts)

    def is_token(self, given: str) -> bool:
        """Whether it is the token; what it takes to say so does not depend on where they differ."""
        return self.token is not None and hmac.compare_digest(_digest(given), _digest(self.token))

    def cookie(self) -> str:
        """What is kept by the browser of somebody who has logged in: when that ends, and a proof that it was us."""
        ends = str(int(time.time()) + LOGIN_LASTS_S)
        return f"{ends}.{self._proof(ends)}"

    def is_cookie(self, given: str) -> bool:
        ends, _, proof = given.partition(".")
        is_ours = self.token is not None and hmac.compare_digest(_digest(proof), _digest(self._proof(ends)))
        return is_ours and ends.isdecimal() and int(ends) > time.time()

    def _proof(self, ends: str) -> str:
        key = (self.token or "").encode()
        return hmac.new(key, f"llm-orm dashboard until {ends}".encode(), hashlib.sha256).hexdigest()

    def admits(self, headers: Headers) -> bool:
        if self.token is None:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self.is_token(given.strip())
        return any(self.is_cookie(each) for each in self._cookies_in(headers))

    def _cookies_in(self, headers: Headers) -> list[str]:
        """All of the name: there may be one of this path and one of a path above it, in any order."""
        pairs = [pair.partition("=") for line in headers.getlist("cookie") for pair in line.split(";")]
        return [value.strip().strip('"') for name, _, value in pairs if name.strip() == self.cookie_name]

    def knows(self, headers: Headers) -> bool:
        """Whether a request came under a name that is ours."""
        host = re.sub(r":\d*$", "", headers.get("host", "").strip().lower())
        return "*" in self.hosts or host in self.hosts


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


class Guard:
    """An ASGI application behind an `Access`."""

    def __init__(self, app: ASGIApp, access: Access):
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        is_static = path_in(scope).startswith("/static/")  # before it is routed, which changes the scope

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                is_kept = is_static and message["status"] in (200, 304)
                for name, value in (HEADERS | KEPT if is_kept else HEADERS).items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope, Headers(scope=scope))
        await (refusal or self.app)(scope, receive, send_safely)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        path = path_in(scope)
        if not self.access.knows(headers):
            return PlainTextResponse(UNKNOWN_HOST.format(host=headers.get("host", "")), 400)
        if scope["method"] not in ("GET", "HEAD") and (scope["method"], path) not in (
            ("POST", "/login"),
            ("POST", "/logout"),
        ):
            return PlainTextResponse("The dashboard only reads.\n", 405, {"Allow": "GET, HEAD"})
        if path.startswith(OPEN) or self.access.admits(headers):
            return None
        if wants_page(scope, headers):
            asked = path + (f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else "")
            login = f"{scope.get('root_path', '')}/login"
            return RedirectResponse(login if asked == "/" else f"{login}?{urlencode({'next': asked})}", 303)
        return _unknown(headers)


def _unknown(headers: Headers) -> Response:
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and given.strip():
        challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
        return PlainTextResponse("The Bearer token is not the token of this dashboard.\n", 401, challenge)
    sent = f" There came an Authorization of another kind, {kind[:20]!r}." if kind and kind.lower() != "bearer" else ""
    text = f"Needs the token of the dashboard: Authorization: Bearer …{sent}\n"
    return PlainTextResponse(text, 401, {"WWW-Authenticate": "Bearer"})


UNKNOWN_HOST = (
    "The dashboard is not asked for under the name {host!r}: without a token it answers to localhost only. "
    "Give create_app() a token=…, or name its hosts=[…].\n"
)


def path_in(scope: Scope) -> str:
    """The path of a request within the dashboard, wherever that is mounted."""
    path, root = scope["path"], scope.get("root_path", "")
    return (path[len(root) :] if root and path.startswith(root) else path) or "/"


def wants_page(scope: Scope, headers: Headers) -> bool:
    """Whether it is a person who asks, and not a script: a browser says that it takes HTML."""
    return "authorization" not in headers and "text/html" in headers.get("accept", "")


def is_within(path: str) -> bool:
    """Whether a path that came with a request leads to us, and not to another site."""
    return re.fullmatch(r"/(?![/\\])[^\\\x00-\x20\x7f]*", path) is not None


def secure_cookie(response: Response, access: Access, scope: Any) -> None:
    """Log the browser in."""
    response.set_cookie(access.cookie_name, access.cookie(), max_age=LOGIN_LASTS_S, **_attributes(scope))


def forget_cookie(response: Response, access: Access, scope: Any) -> None:
    response.delete_cookie(access.cookie_name, **_attributes(scope))


def not_kept(scope: Any) -> str:
    """What is said to who logged in, and came back without the cookie."""
    cookie = _attributes(scope)
    over = ", over HTTPS only" if cookie["secure"] else ""
    return (
        "The token is right, but the browser did not send the login back. That is a cookie for the path "
        f"{cookie['path']}{over}: allow cookies here, and ask for the dashboard at an address that this fits."
    )


def _attributes(scope: Any) -> dict[str, Any]:
    return {
        "path": scope.get("root_path", "") or "/",
        "secure": scope.get("scheme") == "https",
        "httponly": True,
        "samesite": "strict",
    }

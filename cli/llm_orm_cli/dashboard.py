"""`llm-orm dashboard`: the page in the browser."""

import re
import sys
from typing import Any

import click

from .application import opened_with_its_columns, store_option
from .options import database_options

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _path(context: click.Context, option: click.Parameter, value: str) -> str:
    """The path as a mount has it: with a slash before it, and none behind."""
    path = value.strip("/")
    if not re.fullmatch(r"[\w.~/-]*", path, re.ASCII):
        raise click.BadParameter(f"{value!r} is not a path of letters, digits and slashes, such as /llm")
    return f"/{path}" if path else ""


@click.command()
@database_options
@store_option
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="The address to listen at; another one needs a token."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8377, show_default=True, help="0: any that is free.")
@click.option(
    "--token",
    envvar="LLM_ORM_DASHBOARD_TOKEN",
    help='What to log in with; default: $LLM_ORM_DASHBOARD_TOKEN, which a list of processes does not show. "auto" '
    "makes one up and prints it.",
)
@click.option(
    "--hostname",
    "hostnames",
    metavar="NAME",
    multiple=True,
    help="A name that it may be asked for under, such as llm.example.com behind a proxy; repeatable. Default: this "
    "machine's own without a token, any with one.",
)
@click.option(
    "--root-path",
    default="",
    metavar="PATH",
    callback=_path,
    help="The path to serve it under, as behind a proxy: /llm, for instance.",
)
@click.option("--no-open", is_flag=True, help="Do not open a browser.")
def dashboard(
    host: str, port: int, token: str | None, hostnames: tuple[str, ...], root_path: str, no_open: bool, **store: Any
) -> None:
    """Show spend, latency, errors and chats in the browser.

    Reads the database and changes nothing. Listens to this machine only, unless --host says otherwise, which needs a
    token. Ends with Ctrl-C.
    """
    from llm_orm.dashboard import create_app

    if host not in LOOPBACK and not token:
        raise click.UsageError(
            f"--host {host} lets others in, who would read every chat: give a --token, or set "
            "$LLM_ORM_DASHBOARD_TOKEN; --token auto makes one up"
        )
    is_made_up = token == "auto"
    if is_made_up:
        import secrets

        token = secrets.token_urlsafe(24)
    with opened_with_its_columns(**store) as opened_store:
        app = create_app(opened_store, token=token, hosts=hostnames or None)
        _serve(app, host, port, root_path, token if is_made_up else None, opens=not no_open)


def _serve(app: Any, host: str, port: int, root_path: str, token: str | None, *, opens: bool) -> None:
    try:
        import uvicorn
    except ImportError as error:
        raise click.ClickException('needs uvicorn: pip install "llm-orm[dashboard]"') from error

    import socket

    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise click.ClickException(f"cannot listen at {host}:{port}: {error.strerror}; --port names another") from error
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}{root_path}/"
    click.echo(f"The dashboard is at {address} (Ctrl-C ends it)")
    if token:
        click.echo(f"Log in with the token {token}")
    if opens and sys.stdout.isatty():
        click.launch(address)
    if root_path:
        from starlette.routing import Mount, Router

        app = Router([Mount(root_path, app)])
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        pass  # it has ended what was under way

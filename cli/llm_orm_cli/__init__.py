"""The command `llm-orm`. Each command is a module of its name here, which is imported when it is needed."""

import importlib
import keyword
import sys
from typing import Any

import click

COMMANDS = (
    "budgets",
    "chats",
    "check",
    "dashboard",
    "demo",
    "erase",
    "export",
    "import",
    "init",
    "metrics",
    "migrate",
    "prune",
    "recover",
    "rotate",
    "show",
    "stats",
    "sync",
)


class Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        return getattr(importlib.import_module(f"{__name__}.{name}"), name)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if hasattr(sys.stdout, "reconfigure"):
            # A terminal that cannot show a character shows another, in place of a traceback.
            sys.stdout.reconfigure(errors="replace")  # type: ignore[attr-defined]
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            from llm_orm.errors import LlmOrmError

            if isinstance(error, LlmOrmError):
                raise click.ClickException(" ".join(str(error).split())) from error
            raise


@click.group(
    cls=Commands, name="llm-orm", context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="llm-orm", prog_name="llm-orm")
def main() -> None:
    """Chats, messages, tool calls and their costs, in your own database."""

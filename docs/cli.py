"""Writes the reference part of docs/cli.md from the help texts of the commands: python docs/cli.py"""

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from llm_orm_cli import main

PAGE = Path(__file__).with_name("cli.md")
MARK = "<!-- What follows is written by `python docs/cli.py`. -->\n"


def page() -> str:
    """The whole page: what people wrote, and below the mark what the commands say of themselves."""
    written, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    return f"{written}{MARK}\n{reference()}"


def reference() -> str:
    top = main.make_context("llm-orm", [], resilient_parsing=True)
    commands = [main.get_command(top, name) for name in main.list_commands(top)]
    parts = ["## Reference", *_described(main, top)]
    for command in commands:
        assert command is not None
        parts += [f"### llm-orm {command.name}", *_described(command, click.Context(command, top, command.name))]
    return "\n\n".join(parts) + "\n"


def _described(command: click.Command, context: click.Context) -> Iterator[str]:
    yield "```text\n" + " ".join([context.command_path, *command.collect_usage_pieces(context)]) + "\n```"
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        # click's mark of a paragraph that keeps its lines
        yield f"```text\n{paragraph[2:]}\n```" if paragraph.startswith("\b\n") else paragraph
    options = [option for option in command.params if isinstance(option, click.Option)]
    records = [option.get_help_record(context) for option in options]
    yield "\n".join(f"- `{names}`: {' '.join(text.split())}" for names, text in filter(None, records))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""`llm-orm init`: the schema, as SQL or as models, for the application to keep."""

import os
from pathlib import Path

import click

from .options import table_options

DEFAULT_FILE = Path("llm_orm_schema.sql")


@click.command()
@click.option(
    "--dialect",
    type=click.Choice(["sqlite", "postgresql"]),
    help="The kind of database.",
    show_default="that of $LLM_ORM_DATABASE_URL or $DATABASE_URL, else sqlite",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write the SQL to.",
    show_default=str(DEFAULT_FILE),
)
@click.option("--stdout", "to_stdout", is_flag=True, help="Print the SQL in place of writing it.")
@click.option(
    "--models",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write Peewee models that you may extend with columns to this file. SQL only comes with --output or --stdout.",
)
@table_options
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
def init(
    dialect: str | None,
    output: Path | None,
    to_stdout: bool,
    models: Path | None,
    table_prefix: str,
    table_names: dict[str, str],
    force: bool,
) -> None:
    """Write the schema, as SQL to run or as Peewee models to own.

    Needs no database. "llm-orm migrate" creates the same tables, and takes over from tables that this SQL made.
    """
    from llm_orm_schema.ddl import script
    from llm_orm_schema.models import models_source

    if output and to_stdout:
        raise click.UsageError("give --output or --stdout, not both")
    sql = script(dialect or _likely_dialect(), table_prefix, table_names)  # type: ignore[arg-type]
    files: dict[Path, str] = {}
    if models:
        files[models] = models_source(table_prefix, table_names)
    if output or not (to_stdout or models):
        files[output or DEFAULT_FILE] = sql
    _write(files, force)
    if to_stdout:
        click.echo(sql, nl=False)
    for path in files:
        click.echo(f"wrote {path}", err=to_stdout)


def _likely_dialect() -> str:
    url = os.environ.get("LLM_ORM_DATABASE_URL") or os.environ.get("DATABASE_URL") or ""
    return "postgresql" if url.startswith("postgres") else "sqlite"


def _write(files: dict[Path, str], force: bool) -> None:
    for path in files:
        if path.exists() and not force:
            raise click.ClickException(f"{path} is there already: --force overwrites it")
    for path, text in files.items():
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise click.ClickException(f"{path} cannot be written: {error.strerror}") from error

"""`llm-orm metrics`: what Prometheus would scrape."""

from typing import Any

import click

from .application import opened, store_option
from .options import database_options


@click.command()
@database_options
@store_option
def metrics(**store: Any) -> None:
    """Print the metrics as Prometheus reads them.

    Requests, tokens, costs and tool calls of all time, how long requests of the last hour took, and the turns that are
    not over. The dashboard serves the same under /metrics.
    """
    from llm_orm.metrics import metrics_text

    with opened(**store) as opened_store:
        click.echo(metrics_text(opened_store), nl=False)

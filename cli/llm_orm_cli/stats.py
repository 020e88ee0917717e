"""`llm-orm stats`: what was spent."""

from typing import Any

import click

from .application import opened, store_option
from .options import database_options, json_option
from .output import print_values


@click.command()
@click.argument("chat_id", required=False)
@database_options
@store_option
@json_option
def stats(chat_id: str | None, as_json: bool, **database: Any) -> None:
    """Sum up tokens, cost and time.

    Of the chat CHAT_ID, or of all chats, deleted ones included. Cost is in US dollars, and leaves out the
    unpriced requests; duration is the time spent waiting for models.
    """
    from llm_orm import load_chat
    from llm_orm.sums import stats_of

    with opened(**database) as store:
        if chat_id is None:
            found = stats_of(store)
        elif chat := load_chat(store, chat_id):
            found = chat.stats()
        else:
            raise click.ClickException(f"there is no chat {chat_id!r} in {store!r}")
    print_values(found.as_dict(), as_json=as_json)

"""`llm-orm demo`: four turns of a chat, told as a story, and the rows that they leave."""

import json
import shlex
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from .output import print_rows, print_values, printable, text

if TYPE_CHECKING:
    from llm_orm import Chat, LlmRequest, Tool
    from llm_orm.testing import ScriptedLLM

CAPITAL = "What is the capital of France?"
STORY = "Tell me its story, in one sentence."
WEATHER = "How is the weather there?"
THANKS = "Thank you! Where should I have dinner?"

SHOWN = {
    "message": ("position", "role", "content", "input_tokens", "output_tokens"),
    "tool_call": ("name", "arguments", "status", "result", "duration_ms"),
    "request": ("status_code", "error", "streamed", "input_tokens", "output_tokens", "cost"),
}


@click.command()
@click.option("--model", metavar="MODEL", help="Ask a real provider, as in gpt-4o or anthropic/claude-sonnet-4-5.")
@click.option(
    "--database-url",
    metavar="URL",
    help="Where the rows go: sqlite:///file.db or postgresql://user:password@host/name; default: a new SQLite file in "
    "a temporary folder.",
)
def demo(model: str | None, database_url: str | None) -> None:
    """Run four turns of a chat and show the rows they leave.

    A plain turn, a streamed one, one with a tool, and one that fails; on a scripted model, which needs no key and no
    network. With --model the first three run on a real provider, whose key is read from the environment.
    """
    from llm_orm import connect, create_chat, gateway
    from llm_orm.database import without_password

    url = database_url or f"sqlite:///{quote(tempfile.mkdtemp(prefix='llm-orm-demo-'))}/demo.db"
    with connect(url, llm=None if model else _script()) as store:
        store.create_tables()
        chat = create_chat(
            store, model=model or "scripted-model", instructions="Answer in one sentence.", tools=[_weather_tool()]
        )
        _tell("llm_orm writes every turn of a conversation with a language model to your own database.")
        click.echo(f"Model:    {model or 'scripted: no key, no network, no bill (--model gpt-4o asks a real one)'}")
        click.echo(f"Database: {without_password(url)}")
        click.echo(f"Chat:     {chat.id}\n")
        if model:
            # It would print advice between the lines of the story.
            gateway.litellm().suppress_debug_info = True
        _plain_turn(chat)
        _streamed_turn(chat)
        _tool_turn(chat)
        if not model:
            _failed_turn(chat)
        _show(chat)
        _tell("These are plain tables, yours to query. What they say is there on the command line and in the browser:")
        place = f"--database-url {shlex.quote(without_password(url))}"
        click.echo(f"    llm-orm stats {chat.id} {place}")
        click.echo(f"    llm-orm show {chat.id} {place}")
        click.echo(f"    llm-orm dashboard {place}")


def _plain_turn(chat: "Chat") -> None:
    _title("1. A plain turn", f'reply = chat.ask("{CAPITAL}")')
    with _failure_told(chat):
        reply = chat.ask(CAPITAL)
    _says(reply.content)
    _tell(f"""Three kinds of rows were written: your message; the reply; and a request, which is the record of one call
        of the model ({_took(chat.requests()[-1])}).""")


def _streamed_turn(chat: "Chat") -> None:
    _title("2. A streamed turn", f'for chunk in chat.ask_stream("{STORY}"):', '    print(chunk.content, end="")')
    meanwhile = ""
    with _failure_told(chat), chat.ask_stream(STORY) as stream:
        for chunk in stream:
            click.echo(printable(chunk.content) if meanwhile else f"Model: {printable(chunk.content)}", nl=False)
            meanwhile = meanwhile or chat.messages()[-1].status
    click.echo("\n")
    _tell(f"""The same rows again. While the words came in, the reply's row was there already, with the status
        "{meanwhile}"; now it says "{chat.messages()[-1].status}". Should this process die in the middle, the rows alone
        say where the chat stands.""")


def _tool_turn(chat: "Chat") -> None:
    _title(
        "3. A turn with a tool",
        "@tool",
        "def get_weather(city: str) -> dict: ...",
        "",
        f'chat.ask("{WEATHER}")      # of a chat made with tools=[get_weather]',
    )
    with _failure_told(chat):
        reply = chat.ask(WEATHER)
    calls = [call for call in chat.tool_calls() if call.message_id == reply.id]
    for call in calls:
        _says(f"(calls {call.name} with {call.arguments})", end="")
        click.echo(f"Tool:  {printable(call.result or '')}")
    _says(reply.content)
    if not calls:
        _tell("This model chose to answer without the tool, so this turn left the same rows as the first.")
        return
    requests = [request for request in chat.requests() if request.message_id == reply.id]
    _tell(f"""Still one message and one reply, and a row for each tool call: what the model asked for, what the tool
        answered, how long it took. The model was called {len(requests)} times: once to ask for the tool, and again with
        its result, so there are {len(requests)} requests. The reply's row has the tokens of all of them.""")


def _failed_turn(chat: "Chat") -> None:
    from llm_orm.testing import ProviderError

    _title("4. A turn that fails", f'chat.ask("{THANKS}")')
    try:
        chat.ask(THANKS, retries=0)
    except ProviderError as error:
        click.echo(f"{type(error).__name__}: {error}\n")
    last, request = chat.messages()[-1], chat.requests()[-1]
    _tell(f"""The provider's own exception reached the caller, and the turn was rolled back: the unfinished reply is
        gone. The {last.role}'s message is kept, so that chat.retry() can answer it later. The request is kept too, with
        the status {request.status_code} and the error: a failed call may cost money, and no call is ever lost.""")


def _show(chat: "Chat") -> None:
    _title("What is in the database now")
    records, rows = (
        chat.store.records,
        {
            "message": chat.messages(),
            "tool_call": chat.tool_calls(),
            "request": chat.requests(),
        },
    )
    for name, columns in SHOWN.items():
        table = getattr(records, name)._meta.table_name
        print_rows(columns, [[getattr(row, column) for column in columns] for row in rows[name]], title=table)
        click.echo()
    print_values(chat.stats().as_dict(), title="chat.stats()")
    click.echo()


@contextmanager
def _failure_told(chat: "Chat") -> Iterator[None]:
    """Say in one line that a call of a real provider failed; its request row tells that it was the call."""
    try:
        yield
    except Exception as error:
        requests = chat.requests()
        if not requests or requests[-1].error != type(error).__name__:
            raise
        reason = " ".join(str(error).split())
        raise click.ClickException(
            f"the call failed ({type(error).__name__}): {reason}; your message and the request row are kept"
        ) from error


def _took(request: "LlmRequest") -> str:
    cost = "a cost that is not known" if request.cost is None else f"${text(request.cost)}"
    return f"{request.input_tokens} tokens in, {request.output_tokens} out, {request.duration_ms} ms, {cost}"


def _title(title: str, *code: str) -> None:
    click.secho(title, bold=True)
    for line in ("", *code, *([""] if code else [])):
        click.echo(f"    {line}" if line else "")


def _says(words: str | None, end: str = "\n") -> None:
    click.echo(f"Model: {printable(words or '')}{end}")


def _tell(paragraph: str) -> None:
    click.echo(textwrap.fill(" ".join(paragraph.split()), 92) + "\n")


def _weather_tool() -> "Tool":
    from llm_orm import tool

    @tool
    def get_weather(city: str) -> dict:
        """The weather in a city, now."""
        return {"city": city, "sky": "clear", "celsius": 21}

    return get_weather


def _script() -> "ScriptedLLM":
    """A model that says what the demo needs, at the price of a real one."""
    from llm_orm.testing import Call, ProviderError, ScriptedLLM

    def weather(keywords: dict[str, Any]) -> str:
        found = json.loads(keywords["messages"][-1]["content"])
        return f"The sky over {found['city']} is {found['sky']}, at {found['celsius']} degrees."

    return ScriptedLLM(
        "The capital of France is Paris.",
        "A village on an island in the Seine grew, in two thousand years, into a city of two million.",
        Call("get_weather", city="Paris"),
        weather,
        ProviderError(503, "the provider is overloaded"),
        input_cost_per_token="0.0000025",
        output_cost_per_token="0.00001",
    )

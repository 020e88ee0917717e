"""One turn: its order, its transactions, its rows, whichever way it is asked and on whichever database."""

import asyncio
import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg2.extensions
import pytest
from conftest import WAYS, Ask, rows
from freezegun import freeze_time

from llm_orm import (
    AsyncTool,
    Chat,
    ChatBusy,
    Retries,
    Store,
    ToolContext,
    ToolError,
    ToolRoundsExceeded,
    connect,
    create_chat,
    load_chat,
    tool,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

AT_ONCE = Retries(attempts=2, first_wait_s=0.0)


@tool
def get_weather(city: str) -> str:
    """Current weather in a city."""
    return f"rain in {city}"


@tool
def fail(city: str = "") -> str:
    raise ValueError(f"no such place: {city}")


@tool
def stop(city: str = "") -> str:
    raise ToolError("the order is locked", fatal=True)


LONDON, PARIS = Call("get_weather", city="London"), Call("get_weather", city="Paris")
THINKING = Say("Rain.", thinking="Let me think.", signature="sig-1", thinking_tokens=3, input_tokens=9, output_tokens=5)


def chat_with(store: Store, *script: Any, **options: Any) -> Chat:
    return create_chat(store, model="test", llm=ScriptedLLM(*script), **options)


class Statements(logging.Handler):
    """What peewee sends to the database, a list of statements for each transaction."""

    def __init__(self) -> None:
        super().__init__()
        self.transactions: list[list[str]] = []
        self.is_inside = False

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "peewee" or record.threadName == "llm_orm heart":
            return  # the pool has its say too, and the heart looks in where a turn takes long
        sql = record.msg[0]
        if sql == "COMMIT":
            self.is_inside = False
        elif sql == "BEGIN IMMEDIATE":
            self.transactions.append([])
            self.is_inside = True
        elif self.is_inside:
            self.transactions[-1].append(sql)
        else:
            self.transactions.append(sql.split(";\n"))


@pytest.fixture
def statements():
    log, handler = logging.getLogger("peewee"), Statements()
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield handler
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)


# Order


def test_a_plain_turn_costs_two_transactions(store, ask, statements):
    chat = chat_with(store, "Paris.")
    statements.transactions.clear()
    ask(chat, "What is the capital of France?")
    heads = [[" ".join(sql.split()[:3]) for sql in transaction] for transaction in statements.transactions]
    assert heads == [
        ['INSERT INTO "llm_message"', 'INSERT INTO "llm_message"', "SELECT id, position,"],
        ['INSERT INTO "llm_request"', 'UPDATE "llm_chat" SET', 'UPDATE "llm_message" SET'],
    ]


def test_a_tool_round_costs_a_transaction_and_one_for_each_result(store, ask, statements):
    chat = chat_with(store, [LONDON, PARIS], "Rain.", tools=[get_weather])
    statements.transactions.clear()
    ask(chat, "How is the weather?")
    assert len(statements.transactions) == 2 + 1 + 2


def test_question_and_placeholder_are_there_before_the_model_is_called(store, database_url, ask):
    with connect(database_url) as other:
        seen: list[Any] = []

        def model(keywords: dict[str, Any]) -> str:
            seen.append(rows(other, "message", "role", "status", "content", "position"))
            return "Paris."

        ask(chat_with(store, model), "What is the capital of France?")
    assert seen == [
        [("user", "completed", "What is the capital of France?", 0), ("assistant", "pending", None, 1)],
    ]
    assert rows(store, "message", "status", "content")[1] == ("completed", "Paris.")


def test_the_request_of_a_round_is_written_before_its_tools_run(store, database_url, ask):
    with connect(database_url) as other:
        seen: list[Any] = []

        @tool
        def look() -> str:
            seen.append(rows(other, "request", "round", "finish_reason"))
            seen.append(rows(other, "tool_call", "name", "status", "result"))
            seen.append(rows(other, "message", "status", "content")[1])
            return "seen"

        ask(chat_with(store, Say("Let me look.", calls=[Call("look"), Call("look")]), "Done.", tools=[look]), "Look!")
    assert seen == [
        [(0, "tool_calls")],
        [("look", "running", None), ("look", "pending", None)],
        ("pending", "Let me look."),
        [(0, "tool_calls")],
        [("look", "completed", "seen"), ("look", "running", None)],
        ("pending", "Let me look."),
    ]


def test_a_tools_result_is_on_record_before_the_model_is_called_again(store, database_url, ask):
    with connect(database_url) as other:
        seen: list[Any] = []

        def model(keywords: dict[str, Any]) -> str:
            seen.extend(rows(other, "tool_call", "status", "result", "error"))
            return "Done."

        ask(chat_with(store, [LONDON, Call("fail")], model, tools=[get_weather, fail]), "Weather?")
    assert seen == [
        ("completed", "rain in London", None),
        ("failed", "Error executing tool 'fail': no such place: ", "ValueError: no such place: "),
    ]


def test_a_reply_is_the_stored_row_column_by_column(store, ask):
    chat = chat_with(store, [LONDON], THINKING, tools=[get_weather])
    reply = ask(chat, "How is the weather?")
    stored = chat.messages()[-1]
    assert {name: reply.__data__.get(name) for name in stored.__data__} == stored.__data__


def test_a_turn_of_several_rounds_sums_its_tokens_and_keeps_a_request_for_each(store, ask):
    first = Say(calls=[LONDON], input_tokens=10, output_tokens=5, cached_tokens=4, thinking_tokens=1)
    last = Say("Rain.", input_tokens=20, output_tokens=6, cached_tokens=8, thinking_tokens=2)
    reply = ask(chat_with(store, first, last, tools=[get_weather]), "How is the weather?")
    counted = "input_tokens", "output_tokens", "cached_tokens", "thinking_tokens"
    assert tuple(getattr(reply, name) for name in counted) == (30, 11, 12, 3)
    assert rows(store, "request", "round", "attempt", *counted) == [(0, 1, 10, 5, 4, 1), (1, 1, 20, 6, 8, 2)]


def test_a_chat_of_several_turns_is_in_order_of_position_when_all_times_are_the_same(store, ask):
    chat = chat_with(store, *(f"answer {number}" for number in range(4)))
    with freeze_time("2030-01-01", real_asyncio=True):
        for number in range(4):
            ask(chat, f"question {number}")
    said = [f"{kind} {number}" for number in range(4) for kind in ("question", "answer")]
    assert [(message.position, message.content) for message in chat.messages()] == list(enumerate(said))
    assert len({message.created_at for message in chat.messages()}) == 1


def test_a_chat_is_in_order_of_position_when_the_clock_runs_backwards(store, ask):
    llm = ScriptedLLM("one", "two", "three")
    chat = create_chat(store, model="test", llm=llm)
    for hour in (3, 2, 1):
        with freeze_time(datetime(2030, 1, 1, hour, tzinfo=UTC), real_asyncio=True):
            ask(chat, f"{hour} o'clock")
    assert [message.content for message in chat.messages()][::2] == ["3 o'clock", "2 o'clock", "1 o'clock"]
    sent = llm.requests[-1]["messages"]
    assert [message["content"] for message in sent] == ["3 o'clock", "one", "2 o'clock", "two", "1 o'clock"]


# The same rows, whichever way


def plain_turn(store: Store, ask: Ask) -> Chat:
    chat = chat_with(store, Say("Hello!", cost="0.00125"), "And to you.", instructions="Be brief.")
    ask(chat, "Hi")
    ask(chat, "A good day")
    return chat


def tool_turn(store: Store, ask: Ask) -> Chat:
    script = Say("Let me look.", calls=[LONDON, Call("fail", city="Atlantis")]), [PARIS, Call("unknown")], "Rain."
    chat = chat_with(store, *script, tools=[get_weather, fail])
    ask(chat, "How is the weather?")
    return chat


def thinking_turn(store: Store, ask: Ask) -> Chat:
    signed = Say("Hm.", thinking="I should look.", signature="sig-0", calls=[LONDON], thinking_tokens=7)
    chat = chat_with(store, signed, THINKING, Say("Yes.", thinking="Unsigned."), tools=[get_weather])
    ask(chat, "How is the weather?")
    ask(chat, "Sure?")
    return chat


def failing_turn(store: Store, ask: Ask) -> Chat:
    chat = chat_with(store, [LONDON], ProviderError(400, "no"), "Rain.", tools=[get_weather])
    with pytest.raises(ProviderError):
        ask(chat, "How is the weather?")
    ask(chat, "And now?")
    return chat


def kept_failing_turn(store: Store, ask: Ask) -> Chat:
    script = Say("Looking.", calls=[LONDON]), ProviderError(400, "no"), "Rain."
    chat = chat_with(store, *script, tools=[get_weather], on_error="keep")
    with pytest.raises(ProviderError):
        ask(chat, "How is the weather?")
    ask(chat, "And now?")
    return chat


def fatal_turn(store: Store, ask: Ask) -> Chat:
    chat = chat_with(store, [LONDON, Call("stop"), PARIS], tools=[get_weather, stop], on_error="keep")
    with pytest.raises(ToolError):
        ask(chat, "How is the weather?")
    return chat


def endless_turn(store: Store, ask: Ask) -> Chat:
    chat = chat_with(store, [LONDON], [PARIS], tools=[get_weather], max_tool_calls=1)
    with pytest.raises(ToolRoundsExceeded):
        ask(chat, "How is the weather?")
    return chat


def retried_turn(store: Store, ask: Ask) -> Chat:
    script = ProviderError(503), [LONDON], ProviderError(429, "slow", retry_after=0), ConnectionError("reset"), "Rain."
    chat = chat_with(store, *script, tools=[get_weather], retries=AT_ONCE)
    ask(chat, "How is the weather?")
    return chat


SCENARIOS = [
    plain_turn,
    tool_turn,
    thinking_turn,
    failing_turn,
    kept_failing_turn,
    fatal_turn,
    endless_turn,
    retried_turn,
]
OF_THE_WAY = ("streamed", "first_token_ms", "duration_ms")


def cells(store: Store) -> dict[str, list[dict[str, Any]]]:
    """Every cell of the database, with names for ids and times; less what tells the ways to ask apart."""
    names: dict[Any, str] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, UUID):
            return names.setdefault(value, f"id {len(names)}")
        return "a time" if isinstance(value, datetime) else value

    tables = {}
    for table in ("chat", "message", "tool_call", "request"):
        columns = [name for name in getattr(store.records, table)._meta.fields if name not in OF_THE_WAY]
        found = rows(store, table, *columns)
        tables[table] = [dict(zip(columns, map(plain, row), strict=True)) for row in found]
    return tables


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_four_ways_and_two_databases_leave_the_same_cells(scenario, sqlite_url, postgres_url):
    found: dict[tuple[str, str], Any] = {}
    for url in (sqlite_url, postgres_url):
        with connect(url) as store:
            store.create_tables()
            for way, ask in WAYS.items():
                scenario(store, ask)
                found[url.partition(":")[0], way] = cells(store)
                assert {row[0] for row in rows(store, "request", "streamed")} == {way.endswith("stream")}
                with store.connection():
                    for record in reversed(list(store.records)):
                        record.delete().execute()
    expected = found["sqlite", "ask"]
    assert expected["message"]
    assert expected["request"]
    assert {key: tables for key, tables in found.items() if tables != expected} == {}


def test_streaming_alone_tells_when_the_first_token_came(store, ask, request):
    ask(chat_with(store, "Hello!"), "Hi")
    ((streamed, first_token_ms, duration_ms),) = rows(store, "request", "streamed", "first_token_ms", "duration_ms")
    assert streamed == (first_token_ms is not None)
    assert duration_ms >= (first_token_ms or 0)


def test_a_streams_tokens_are_those_that_the_provider_counted(store, ask):
    """NodeLLM's C13 and C10: the usage that comes behind the last chunk is not lost, nor is the time taken."""
    reply = ask(chat_with(store, Say("Hi", input_tokens=1000, output_tokens=50, delay_s=0.002)), "Hello")
    assert (reply.input_tokens, reply.output_tokens) == (1000, 50)
    ((input_tokens, output_tokens, estimated, duration_ms),) = rows(
        store, "request", "input_tokens", "output_tokens", "usage_estimated", "duration_ms"
    )
    assert (input_tokens, output_tokens, estimated) == (1000, 50, False)
    assert duration_ms >= 2


def test_thinking_that_comes_in_pieces_is_put_together_in_order(store, ask):
    """NodeLLM's C15: "AAA BBB CCC" came out as "CCCCCC"."""
    reply = ask(chat_with(store, Say("So.", thinking="AAA BBB CCC", signature="sig")), "Think!")
    assert (reply.thinking_text, reply.thinking_signature, reply.content) == ("AAA BBB CCC", "sig", "So.")


def test_arguments_are_stored_once_encoded_to_the_letter(store, ask):
    """NodeLLM's C26: arguments were encoded twice."""
    ask(chat_with(store, Call("get_weather", raw='{"city":  "London"}'), "Rain.", tools=[get_weather]), "Weather?")
    assert rows(store, "tool_call", "arguments", "result") == [('{"city":  "London"}', "rain in London")]


def test_two_turns_that_use_one_call_id_keep_their_own_results(store, ask):
    """RubyLLM's C43: ids of tool calls are unique within a request only."""
    script = (
        [Call("get_weather", call_id="a", city="London")],
        "Rain.",
        [Call("get_weather", call_id="a", city="Rome")],
        "Sun.",
    )
    chat = chat_with(store, *script, tools=[get_weather])
    ask(chat, "London?")
    ask(chat, "Rome?")
    assert rows(store, "tool_call", "tool_call_id", "result") == [("a", "rain in London"), ("a", "rain in Rome")]


def test_rounds_that_use_one_call_id_keep_their_own_results(store, ask):
    script = [Call("get_weather", call_id="a", city="London")], [Call("get_weather", call_id="a", city="Rome")], "Rain."
    ask(chat_with(store, *script, tools=[get_weather]), "London and Rome?")
    assert rows(store, "tool_call", "round", "result") == [(0, "rain in London"), (1, "rain in Rome")]
    assert len({row[0] for row in rows(store, "tool_call", "tool_call_id")}) == 2


# Nothing is held while we wait


def held(store: Store) -> dict[str, Any]:
    """What of the database is in use: connections out of the pool, this thread's connection, open transactions."""
    database: Any = store.database
    idle = [entry[-1] for entry in database._connections]
    if database.__class__.__name__ == "PooledSqliteDatabase":
        open_transactions = sum(connection.in_transaction for connection in idle)
    else:
        status = psycopg2.extensions.TRANSACTION_STATUS_IDLE
        open_transactions = sum(connection.info.transaction_status != status for connection in idle)
    return {"in use": len(database._in_use), "open": not database.is_closed(), "transactions": open_transactions}


NOTHING = {"in use": 0, "open": False, "transactions": 0}


def test_nothing_of_the_database_is_held_while_a_model_a_tool_or_a_hook_is_waited_for(store, ask):
    seen: list[Any] = []

    def look(*_: Any) -> None:
        seen.append(held(store))

    @tool
    def wait() -> str:
        look()
        return "waited"

    def model(reply: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda keywords: look() or reply

    chat = chat_with(store, model(ProviderError(503)), model(Call("wait")), model("Done."), tools=[wait])
    for hook in (chat.before_request, chat.after_response, chat.on_tool_call_start, chat.on_tool_call_end):
        hook(look)
    ask(chat, "Wait!", retries=AT_ONCE)
    assert len(seen) == 3 + 1 + 3 + 2 + 2
    assert seen == [NOTHING] * len(seen)


def test_nothing_of_the_database_is_held_while_a_reader_of_a_stream_takes_its_time(store):
    chat = chat_with(store, [LONDON], "one two three", tools=[get_weather])
    seen = [held(store) for _ in chat.ask_stream("Count!")]

    async def read() -> None:
        async for _ in chat.aask_stream("Count!", llm=ScriptedLLM([LONDON], "one two three")):
            seen.append(held(store))

    asyncio.run(read())
    assert seen == [NOTHING] * 8


# Tools


def test_max_tool_calls_counts_rounds_and_allows_one_call_more(store, ask):
    """NodeLLM's B4: with N=2 `ask` made three calls of the model, a stream two."""
    for rounds in range(3):
        llm = ScriptedLLM(*[[LONDON, PARIS]] * rounds, "Rain.")
        reply = ask(create_chat(store, model="test", llm=llm, tools=[get_weather], max_tool_calls=rounds), "Weather?")
        assert (reply.content, len(llm.requests)) == ("Rain.", rounds + 1)


def test_a_model_that_keeps_asking_for_tools_is_stopped_and_every_call_stays_on_record(store, ask):
    llm = ScriptedLLM(*[[LONDON]] * 3, input_cost_per_token="0.001", output_cost_per_token="0.002")
    chat = create_chat(store, model="test", llm=llm, tools=[get_weather], max_tool_calls=2)
    with pytest.raises(ToolRoundsExceeded, match="max_tool_calls=2"):
        ask(chat, "Weather?")
    assert len(llm.requests) == 3
    assert rows(store, "message", "role") == [("user",)]
    assert rows(store, "request", "round", "status_code", "message") == [(0, 200, None), (1, 200, None), (2, 200, None)]
    assert rows(store, "tool_call", "round", "status") == [(0, "completed"), (1, "completed")]
    assert chat.stats().cost > 0


def test_tools_of_one_round_run_side_by_side_and_answer_in_the_order_asked_for(store, ask):
    together = threading.Barrier(3, timeout=10)
    ended = {number: threading.Event() for number in range(3)}

    @tool
    def meet(number: int) -> str:
        together.wait()
        if number < 2:
            ended[number + 1].wait(10)
        return f"number {number}"

    llm = ScriptedLLM([Call("meet", number=number) for number in range(3)], "Met.")
    chat = create_chat(store, model="test", llm=llm, tools=[meet], tool_concurrency=3)
    chat.on_tool_call_end(lambda call, outcome: ended[call.parsed_arguments["number"]].set())
    ask(chat, "Meet!")
    results = [message["content"] for message in llm.requests[-1]["messages"] if message["role"] == "tool"]
    assert results == ["number 0", "number 1", "number 2"]
    assert rows(store, "tool_call", "position", "result") == list(enumerate(results))
    finished = [row[0] for row in rows(store, "tool_call", "finished_at")]
    assert finished == sorted(finished, reverse=True)


def test_no_more_tools_run_at_once_than_allowed_and_waiting_ones_are_pending(store, ask):
    running, most, seen = set(), [], []
    lock = threading.Lock()

    @tool
    def work(number: int) -> str:
        with lock:
            running.add(number)
            most.append(len(running))
            if number == 0:
                seen.extend(rows(store, "tool_call", "status"))
        with lock:
            running.remove(number)
        return "done"

    chat = chat_with(store, [Call("work", number=number) for number in range(5)], "Done.", tools=[work])
    ask(chat, "Work!", tool_concurrency=2)
    assert max(most) <= 2
    assert seen == [("running",)] * 2 + [("pending",)] * 3
    assert rows(store, "tool_call", "status") == [("completed",)] * 5


def test_async_tools_run_side_by_side_on_the_loop(store):
    async def main() -> Any:
        arrived, everyone = [], asyncio.Event()

        @tool
        async def meet(number: int) -> str:
            arrived.append(number)
            if len(arrived) == 3:
                everyone.set()
            await everyone.wait()
            return f"number {number}"

        calls = [Call("meet", number=number) for number in range(3)]
        chat = chat_with(store, calls, "Met.", tools=[meet], tool_concurrency=3)
        return await asyncio.wait_for(chat.aask("Meet!"), 10)

    assert asyncio.run(main()).content == "Met."
    assert rows(store, "tool_call", "result") == [("number 0",), ("number 1",), ("number 2",)]


@pytest.mark.parametrize("way", ["ask", "ask_stream"])
def test_an_async_tool_in_a_plain_ask_is_an_error_before_anything_is_written(store, way):
    @tool
    async def later() -> str:
        return "later"

    with pytest.raises(AsyncTool, match="'later' is async: use aask"):
        WAYS[way](chat_with(store, "Hi", tools=[later]), "Hello")
    assert rows(store, "message", "role") == []


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_fatal_tool_error_ends_the_turn_with_its_siblings_on_record(store, ask, concurrency):
    chat = chat_with(store, [LONDON, Call("stop"), PARIS, PARIS], tools=[get_weather, stop])
    with pytest.raises(ToolError, match="the order is locked"):
        ask(chat, "Weather?", tool_concurrency=concurrency)
    found = rows(store, "tool_call", "status", "error")
    assert found[:2] == [("completed", None), ("failed", "ToolError: the order is locked")]
    # Where two run at once, the third may have started before the second ended.
    assert found[2] in (
        [("failed", "interrupted")] if concurrency == 1 else [("failed", "interrupted"), ("completed", None)]
    )
    assert found[3] == ("failed", "interrupted")
    assert rows(store, "message", "role") == [("user",)]
    assert len(rows(store, "request", "id")) == 1


def test_a_tool_that_asks_its_own_chat_is_told_that_it_is_busy(store, ask):
    @tool
    def recurse(context: ToolContext) -> str:
        chat = load_chat(store, context.chat_id, model="test", llm=ScriptedLLM("never"))
        assert chat is not None
        return chat.ask("Me again").content

    chat = chat_with(store, Call("recurse"), "Done.", tools=[recurse])
    assert ask(chat, "Recurse!").content == "Done."
    ((status, error),) = rows(store, "tool_call", "status", "error")
    assert status == "failed"
    assert error.startswith(f"ChatBusy: chat {chat.id} is busy")
    assert rows(store, "message", "role") == [("user",), ("assistant",)]


def test_a_tool_that_asks_through_the_same_chat_object_leaves_its_turn_whole(store, ask):
    chats: list[Chat] = []

    @tool
    def recurse() -> str:
        return chats[0].ask("Me again").content

    chats.append(chat_with(store, Call("recurse"), "Done.", "Still here.", tools=[recurse]))
    assert ask(chats[0], "Recurse!").content == "Done."
    assert ask(chats[0], "Still there?").content == "Still here."
    assert rows(store, "message", "position", "content") == [
        (0, "Recurse!"),
        (1, "Done."),
        (2, "Still there?"),
        (3, "Still here."),
    ]


def test_a_tool_can_ask_another_chat(store, ask):
    other = chat_with(store, "It is 42.")

    @tool
    def consult(question: str) -> str:
        return other.ask(question).content

    ask(chat_with(store, Call("consult", question="What is it?"), "42.", tools=[consult]), "Consult!")
    assert rows(store, "tool_call", "status", "result") == [("completed", "It is 42.")]
    assert [message.content for message in other.messages()] == ["What is it?", "It is 42."]


def test_an_async_tool_can_ask_another_chat(store):
    other = chat_with(store, "It is 42.")

    @tool
    async def consult() -> str:
        return (await other.aask("What is it?")).content

    chat = chat_with(store, Call("consult"), "42.", tools=[consult])
    assert asyncio.run(chat.aask("Consult!")).content == "42."
    assert rows(store, "tool_call", "status", "result") == [("completed", "It is 42.")]


def test_every_round_of_a_turn_is_asked_with_the_same_keywords(store, ask):
    """NodeLLM's C31: thinking and headers were sent on the first call only."""
    llm = ScriptedLLM([LONDON], [PARIS], "Rain.")
    chat = create_chat(store, model="test", llm=llm, tools=[get_weather], temperature=0.3, thinking={"effort": "low"})
    ask(chat, "Weather?", headers={"x-tenant": "t_1"}, max_tokens=50, params={"seed": 1}, request_timeout=9)
    keywords = [{name: value for name, value in sent.items() if name != "messages"} for sent in llm.requests]
    assert len(keywords) == 3
    assert keywords[1] == keywords[2] == keywords[0]
    assert keywords[0]["extra_headers"] == {"x-tenant": "t_1"}
    assert keywords[0]["reasoning_effort"] == "low"
    assert keywords[0]["temperature"] == 0.3
    assert [made["function"]["name"] for made in keywords[0]["tools"]] == ["get_weather"]


# Hooks


HOOKS = ("before_request", "after_response", "on_tool_call_start", "on_tool_call_end")


def test_hooks_are_additive_and_called_in_order(store, ask):
    """NodeLLM's C18: the last one set was the only one called, and switched persistence off."""
    called: list[str] = []
    chat = chat_with(store, [LONDON], "Rain.", tools=[get_weather])
    for name in HOOKS:
        for number in (1, 2):
            getattr(chat, name)(lambda *_, said=f"{name} {number}": called.append(said))
    ask(chat, "Weather?")
    rounds = ["before_request", "after_response", "on_tool_call_start", "on_tool_call_end"]
    expected = [*rounds, "before_request", "after_response"]
    assert called == [f"{name} {number}" for name in expected for number in (1, 2)]
    assert len(rows(store, "request", "id")) == 2
    assert rows(store, "tool_call", "status") == [("completed",)]


def test_a_hook_gets_what_its_row_says(store, ask):
    got: dict[str, Any] = {}
    chat = chat_with(store, [LONDON], "Rain.", tools=[get_weather], instructions="Be brief.")
    chat.before_request(lambda messages: got.setdefault("messages", list(messages)))
    chat.on_tool_call_start(lambda call: got.setdefault("started", (call.name, call.parsed_arguments)))
    chat.on_tool_call_end(lambda call, outcome: got.setdefault("ended", (call.id, outcome.status, outcome.result)))
    chat.after_response(lambda reply: got.update(reply=reply.content))
    ask(chat, "Weather?")
    assert got == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}],
        "started": ("get_weather", {"city": "London"}),
        "ended": ("call_1", "completed", "rain in London"),
        "reply": "Rain.",
    }


@pytest.mark.parametrize("name", HOOKS)
def test_a_raising_hook_ends_the_turn_and_loses_no_row(store, ask, name):
    problem = RuntimeError("my hook broke")

    def broken(*_: Any) -> None:
        raise problem

    chat = chat_with(store, [LONDON, PARIS], "Rain.", tools=[get_weather])
    getattr(chat, name)(broken)
    with pytest.raises(RuntimeError) as raised:
        ask(chat, "Weather?")
    assert raised.value is problem
    assert rows(store, "message", "role") == [("user",)]
    billed = [] if name == "before_request" else [(200, 1)]
    assert rows(store, "request", "status_code", "input_tokens") == billed
    expected = {
        "before_request": [],
        "after_response": [("failed", "interrupted")] * 2,
        "on_tool_call_start": [("failed", "interrupted")] * 2,
        "on_tool_call_end": [("completed", None), ("failed", "interrupted")],
    }
    assert rows(store, "tool_call", "status", "error") == expected[name]
    assert ask(chat_again(chat), "Again?").content == "Still here."


def chat_again(chat: Chat) -> Chat:
    """The same chat, without its hooks."""
    again = load_chat(chat.store, chat.id, llm=ScriptedLLM("Still here."))
    assert again is not None
    return again


def test_after_response_that_raises_behind_the_last_reply_leaves_it_stored(store, ask, statements):
    """NodeLLM's C34: the reply and its request row were lost."""
    chat = chat_with(store, "Hello!")

    @chat.after_response
    def broken(reply: Any) -> None:
        raise RuntimeError("my hook broke")

    statements.transactions.clear()
    with pytest.raises(RuntimeError, match="my hook broke"):
        ask(chat, "Hi")
    assert len(statements.transactions) == 3  # the claim, the request, the reply for good
    assert rows(store, "message", "role", "status", "content")[1] == ("assistant", "completed", "Hello!")
    assert rows(store, "request", "status_code", "error") == [(200, None)]


def test_after_response_hears_of_the_reply_that_was_one_round_too_many(store, ask):
    heard: list[Any] = []
    chat = chat_with(store, [LONDON], tools=[get_weather], max_tool_calls=0)
    chat.after_response(lambda reply: heard.append(reply.usage.input_tokens))
    with pytest.raises(ToolRoundsExceeded):
        ask(chat, "Weather today?")
    assert heard == [2]


def test_a_raising_hook_waits_for_the_tools_that_run_beside_it_and_keeps_their_results(store, ask):
    release = threading.Event()

    @tool
    def slow() -> str:
        release.wait(10)
        return "slow but sure"

    chat = chat_with(store, [LONDON, Call("slow"), PARIS], tools=[get_weather, slow], tool_concurrency=2)

    @chat.on_tool_call_end
    def broken(call: Any, outcome: Any) -> None:
        release.set()
        raise RuntimeError(f"broken at {call.name}")

    with pytest.raises(RuntimeError, match="broken at get_weather"):
        ask(chat, "Weather?")
    assert rows(store, "tool_call", "status", "result", "error") == [
        ("completed", "rain in London", None),
        ("completed", "slow but sure", None),
        ("failed", None, "interrupted"),
    ]


@pytest.mark.parametrize("way", ["aask", "aask_stream"])
def test_async_hooks_are_awaited(store, way):
    called: list[str] = []
    chat = chat_with(store, [LONDON], "Rain.", tools=[get_weather])
    for name in HOOKS:

        async def hook(*_: Any, name: str = name) -> None:
            await asyncio.sleep(0)
            called.append(name)

        getattr(chat, name)(hook)
    WAYS[way](chat, "Weather?")
    assert called == [*HOOKS, "before_request", "after_response"]


@pytest.mark.parametrize("way", ["ask", "ask_stream"])
def test_an_async_hook_in_a_plain_ask_is_a_clear_error(store, way):
    async def hook(messages: Any) -> None:
        pass

    chat = chat_with(store, "Hi").before_request(hook)
    with pytest.raises(AsyncTool, match=r"hook before_request .*is async: use aask"):
        WAYS[way](chat, "Hello")
    assert rows(store, "message", "role") == []


def test_what_a_hook_does_to_the_messages_is_not_stored(store, ask):
    llm = ScriptedLLM("Hello!", "Hello again!")
    chat = create_chat(store, model="test", llm=llm)
    chat.before_request(lambda messages: messages[-1].update(content="***"))
    ask(chat, "my password is 1234")
    ask(chat, "and again")
    assert [message["content"] for message in llm.requests[1]["messages"]] == ["my password is 1234", "Hello!", "***"]
    assert rows(store, "message", "content")[0] == ("my password is 1234",)


def test_the_times_of_a_turn_are_aware_and_in_order(store, ask):
    before = datetime.now(UTC) - timedelta(seconds=1)
    chat = chat_with(store, "Hello!")
    reply = ask(chat, "Hi")
    assert before < reply.created_at <= reply.updated_at < datetime.now(UTC) + timedelta(seconds=1)
    assert reply.created_at.tzinfo is UTC
    assert chat.reload().record.updated_at >= reply.created_at


def test_a_busy_chat_is_free_again_when_its_turn_has_ended(store, ask):
    chats: list[Chat] = []

    def model(keywords: dict[str, Any]) -> str:
        with pytest.raises(ChatBusy):
            chats[0].ask("Me too")
        return "First."

    chats.append(chat_with(store, model, "Second."))
    ask(chats[0], "One")
    assert ask(chats[0], "Two").content == "Second."

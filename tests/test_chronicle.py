"""chronicle(): a chat as it happened, put together from its rows."""

import asyncio
import json
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from cryptography.fernet import Fernet

from llm_orm import (
    REPLACE,
    RETRY,
    Agent,
    Chat,
    Chronicle,
    Halt,
    InvalidValue,
    Middleware,
    ModelCall,
    Retries,
    Store,
    ToolError,
    ToolRun,
    achronicle,
    chronicle,
    connect,
    create_agent_session,
    create_chat,
    tool,
)
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

AT_ONCE = Retries(2, first_wait_s=0)


def echo(text: str) -> str:
    return text


def refuse() -> str:
    raise ToolError("no", fatal=True)


def a_chat(store: Store, *script: Any, **keywords: Any) -> Chat:
    return create_chat(store, **{"model": "test", "llm": ScriptedLLM(*script), "tools": [echo, refuse], **keywords})


def told(chat: Any, **options: Any) -> Chronicle:
    store = chat.store if isinstance(chat, Chat) else chat.chat.store
    found = chronicle(store, chat.id if isinstance(chat, Chat) else chat.chat.id, **options)
    assert found is not None
    return found


def in_short(steps: Any) -> list[Any]:
    """What was said in each call of a model, or its error; name and result of each tool."""
    return [step.error or step.text if step.kind == "model" else (step.name, step.result) for step in steps]


def assert_sums(found: Chronicle) -> None:
    """The turns, and what is besides, come to what the chat came to."""
    besides = [step for step in found.besides if isinstance(step, ModelCall)]
    cost = sum((turn.cost for turn in found.turns), Decimal(0)) + sum((call.cost or 0 for call in besides), Decimal(0))
    assert cost == found.stats.cost
    for name in ("requests", "failed_requests", "unpriced_requests", "total_tokens", "thinking_tokens", "tool_calls"):
        lost = {"requests": len(besides), "unpriced_requests": sum(call.cost is None for call in besides)}
        lost["total_tokens"] = sum(call.input_tokens + call.output_tokens for call in besides)
        lost["tool_calls"] = len(found.besides) - len(besides)
        lost["failed_requests"] = sum(call.error is not None for call in besides)
        lost["thinking_tokens"] = sum(call.thinking_tokens for call in besides)
        assert sum(getattr(turn.stats, name) for turn in found.turns) + lost[name] == getattr(found.stats, name), name


def test_a_turn_is_told_in_the_order_in_which_it_happened(store: Store) -> None:
    script = (
        Say("I look.", thinking="Hm.", calls=[Call("echo", text="a"), Call("echo", text="b")], cost="0.5"),
        ProviderError(503, "down"),
        Say("Again.", calls=[Call("echo", text="c")], cost="0.25", input_tokens=10, output_tokens=5),
        Say("Done.", thinking="So.", cost="0.125"),
    )
    chat = a_chat(store, *script, retries=AT_ONCE, instructions="Be brief.", metadata={"plan": "free"}, user_id="u_1")
    chat.ask("Hello", files=[("notes.txt", b"12345")])
    found = told(chat)
    (turn,) = found.turns
    assert (found.id, found.model, found.instructions, found.metadata) == (
        chat.id,
        "test",
        "Be brief.",
        {"plan": "free"},
    )
    assert found.columns == {"user_id": "u_1"}
    assert (turn.status, turn.is_asked, turn.position, turn.cost) == ("completed", True, 0, Decimal("0.875"))
    assert turn.question is not None
    assert turn.reply is not None
    assert (turn.question.role, turn.question.text) == ("user", "Hello")
    (file,) = turn.question.files
    assert (file.filename, file.media_type, file.size) == ("notes.txt", "text/plain", 5)
    assert (turn.reply.text, turn.reply.thinking, turn.reply.model) == ("Done.", "So.", "test")
    assert in_short(turn.steps) == [
        "I look.", ("echo", "a"), ("echo", "b"), "ProviderError", "Again.", ("echo", "c"), "Done.",
    ]  # fmt: skip
    first, a, _, failed, again, _, last = turn.steps
    assert isinstance(first, ModelCall)
    assert isinstance(again, ModelCall)
    assert isinstance(last, ModelCall)
    assert isinstance(failed, ModelCall)
    assert isinstance(a, ToolRun)
    assert (first.thinking, first.is_reply, first.cost, first.provider) == ("Hm.", False, Decimal("0.5"), "scripted")
    assert (failed.status_code, failed.error_message, failed.cost) == (503, "down", Decimal(0))
    assert (again.round, again.attempt, again.input_tokens, again.output_tokens) == (1, 2, 10, 5)
    assert (last.is_reply, last.thinking) == (True, "So.")
    assert (a.arguments, a.status, a.error) == ('{"text": "a"}', "completed", None)
    assert a.duration_ms is not None
    assert_sums(found)


def test_what_a_clock_cannot_order_rounds_do(store: Store) -> None:
    script = (
        ProviderError(429, "slow down"),
        Say("I look.", calls=[Call("echo", text="a")]),
        ProviderError(503, "down"),
        Say("Again.", calls=[Call("echo", text="b")]),
        "Done.",
    )
    chat = a_chat(store, *script, retries=AT_ONCE)
    chat.ask("Hello")
    expected = ["ProviderError", "I look.", ("echo", "a"), "ProviderError", "Again.", ("echo", "b"), "Done."]
    requests: Any = store.records.request
    for seconds_per_round in (0, -1):  # a clock that stands, and one that is put back
        for row in store.found(requests.select()):
            for record in (requests, store.records.tool_call):
                moment = chat.record.created_at + timedelta(seconds=seconds_per_round * row.round)
                with store.connection():
                    record.update(created_at=moment).where(record.round == row.round).execute()
        (turn,) = told(chat).turns
        assert in_short(turn.steps) == expected
        assert [step.attempt for step in turn.steps if isinstance(step, ModelCall)] == [1, 2, 1, 2, 1]


def test_it_asks_each_table_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = a_chat(store, *[Say(calls=[Call("echo", text="a")]), "Done."] * 4)
    for _ in range(4):
        chat.ask("Go", files=[("notes.txt", b"1")])
    asked: list[str] = []
    execute = store.database.execute_sql
    monkeypatch.setattr(
        store.database, "execute_sql", lambda sql, *rest, **more: (asked.append(sql), execute(sql, *rest, **more))[1]
    )
    assert len(told(chat).turns) == 4
    for table in ("llm_chat", "llm_message", "llm_tool_call", "llm_agent_session", "llm_attachment"):
        assert sum(f'FROM "{table}" AS "t1"' in sql for sql in asked) == 1, table
    assert sum('FROM "llm_request" AS "t1"' in sql for sql in asked) == 2  # its rows, and the sums over them


def test_a_turn_that_was_rolled_back_keeps_what_it_did(store: Store) -> None:
    chat = a_chat(store, Say(calls=[Call("refuse")], cost="1"))
    with pytest.raises(ToolError):
        chat.ask("Go")
    found = told(chat)
    (turn,) = found.turns
    assert (turn.status, turn.reply, turn.cost) == ("rolled_back", None, 1)
    assert in_short(turn.steps) == [None, ("refuse", "Error executing tool 'refuse': no")]
    assert_sums(found)


def test_what_each_of_several_tries_did_stands_behind_its_own_call(store: Store) -> None:
    def fail(number: int) -> str:
        raise ToolError(str(number), fatal=True)

    chat = a_chat(
        store, *[Say(calls=[Call("fail", number=number)], cost=str(number)) for number in (1, 2)], tools=[fail]
    )
    for again in (lambda: chat.ask("Go"), chat.retry):
        with pytest.raises(ToolError):
            again()
    (turn,) = told(chat).turns
    assert [step.cost if isinstance(step, ModelCall) else step.arguments for step in turn.steps] == [
        1, '{"number": 1}', 2, '{"number": 2}',
    ]  # fmt: skip


def test_tries_of_one_turn_stand_one_behind_the_other(store: Store) -> None:
    chat = a_chat(store, Say(calls=[Call("refuse")], cost="1"), Say(calls=[Call("echo", text="a")], cost="2"), "Done.")
    with pytest.raises(ToolError):
        chat.ask("Go")
    chat.retry()
    found = told(chat)
    (turn,) = found.turns
    assert [step.name if isinstance(step, ToolRun) else step.round for step in turn.steps] == [
        0,
        "refuse",
        0,
        "echo",
        1,
    ]
    assert (turn.status, turn.cost, turn.unpriced_requests) == ("completed", 3, 1)
    assert_sums(found)


@pytest.mark.parametrize(("on_error", "status"), [("keep", "failed"), ("rollback", "rolled_back")])
def test_a_turn_that_failed_has_its_status(store: Store, on_error: str, status: str) -> None:
    chat = a_chat(store, Say(calls=[Call("echo", text="a")]), ProviderError(400, "no"), on_error=on_error)
    with pytest.raises(ProviderError):
        chat.ask("Go")
    (turn,) = told(chat).turns
    assert turn.status == status
    assert in_short(turn.steps) == [None, ("echo", "a"), "ProviderError"]


def test_a_turn_that_waits_for_approval_is_parked(store: Store) -> None:
    @tool(requires_approval=True)
    def pay(amount: int) -> str:
        return f"paid {amount}"

    chat = a_chat(store, Say("May I?", calls=[Call("pay", amount=5)]), "Paid.", tools=[pay])
    chat.ask("Pay")
    (turn,) = told(chat).turns
    call, run = turn.steps
    assert isinstance(run, ToolRun)
    assert (turn.status, in_short([call])) == ("parked", ["May I?"])
    assert (run.status, run.approval, run.result) == ("pending", "required", None)
    chat.approve(chat.pending_approvals()[0])
    chat.resume()
    (turn,) = told(chat).turns
    assert (turn.status, in_short(turn.steps)) == ("completed", ["May I?", ("pay", "paid 5"), "Paid."])


def test_messages_that_no_turn_made_are_there(store: Store) -> None:
    chat = a_chat(store, "Hello!")
    chat.add_message("system", "Be kind.")
    chat.add_message("assistant", "Welcome.")
    chat.ask("Hi")
    chat.add_message("assistant", "PS.")
    chat.add_message("user", "Are you there?")
    turns = told(chat).turns
    said = [(turn.question and turn.question.text, turn.reply and turn.reply.text, turn.status) for turn in turns]
    assert said == [
        ("Be kind.", None, "completed"),
        (None, "Welcome.", "completed"),
        ("Hi", "Hello!", "completed"),
        (None, "PS.", "completed"),
        ("Are you there?", None, "unanswered"),
    ]
    assert [turn.is_asked for turn in turns] == [False, False, True, False, True]
    assert [turn.position for turn in turns] == [0, 1, 2, 4, 5]


def test_a_copy_of_a_chat_tells_what_was_said_and_costs_nothing(store: Store) -> None:
    chat = a_chat(store, Say("I look.", thinking="Hm.", calls=[Call("echo", text="a")], cost="1"), "Done.")
    chat.ask("Go")
    found = told(chat.fork())
    (turn,) = found.turns
    call, run = turn.steps
    assert isinstance(call, ModelCall)
    assert isinstance(run, ToolRun)
    assert (call.id, call.text, call.thinking, call.cost, call.duration_ms) == (None, "I look.", "Hm.", None, None)
    assert (run.name, run.result, turn.reply and turn.reply.text) == ("echo", "a", "Done.")
    assert (turn.cost, turn.stats.requests, turn.unpriced_requests) == (0, 0, 0)
    assert_sums(found)


@pytest.mark.parametrize("reason", ["tool_calls", "length"])
@pytest.mark.parametrize("off", [("tool_calls",), ("requests",), ("tool_calls", "requests")], ids=" ".join)
def test_what_is_not_persisted_is_told_as_far_as_the_messages_know(
    sqlite_url: str, off: tuple[str, ...], reason: str
) -> None:
    with connect(sqlite_url) as store:
        store.create_tables()
        for name in off:
            getattr(store.records, name.removesuffix("s")).drop_table()
        store.records.agent_session.drop_table()
        asking = Say("I look.", calls=[Call("echo", text="a")], cost="1", finish_reason=reason)
        chat = a_chat(store, asking, Say("Done.", cost="2"), persistence=dict.fromkeys(off, False))
        chat.ask("Go")
        found = told(chat)
    (turn,) = found.turns
    assert in_short(turn.steps)[:2] == ["I look.", ("echo", "a")]
    assert turn.reply is not None
    assert turn.reply.text == "Done."
    assert turn.cost == found.stats.cost == (0 if "requests" in off else 3)
    assert in_short(turn.steps)[2:] == ([] if "requests" in off else ["Done."])
    assert turn.stats.tool_calls == found.stats.tool_calls == (0 if "tool_calls" in off else 1)


def test_an_erased_chat_tells_what_it_cost(store: Store) -> None:
    chat = a_chat(store, Say("I look.", calls=[Call("echo", text="a")], cost="1"), Say("Done.", cost="2"))
    chat.ask("Go")
    chat.erase()
    found = told(chat)
    (turn,) = found.turns
    assert in_short(turn.steps) == [None, ("echo", None), None]
    assert turn.question is not None
    assert turn.question.text is None
    assert (turn.reply and turn.reply.text, turn.cost) == (None, 3)
    assert_sums(found)


def test_calls_of_a_turn_whose_question_was_deleted_are_besides(store: Store) -> None:
    chat = a_chat(store, Say(calls=[Call("echo", text="a")], cost="1"), Say("Done.", cost="2"), Say("Yes.", cost="4"))
    chat.ask("Go")
    chat.ask("There?")
    message: Any = store.records.message
    with store.connection():
        message.delete().where(message.position < 2).execute()
    for found in (told(chat), told(chat, last=1)):
        assert [turn.cost for turn in found.turns] == [4]
        assert in_short(found.besides) == [None, ("echo", "a"), None]
        assert_sums(found)


def test_a_reply_whose_question_was_deleted_stands_alone(store: Store) -> None:
    chat = a_chat(
        store, ProviderError(400, "no"), Say(calls=[Call("echo", text="a")], cost="1"), Say("Done.", cost="2")
    )
    with pytest.raises(ProviderError):
        chat.ask("First")
    chat.ask("Second")
    message: Any = store.records.message
    with store.connection():
        message.delete().where(message.position == 1).execute()
    found = told(chat)
    first, alone = found.turns
    assert (first.status, in_short(first.steps)) == ("rolled_back", ["ProviderError"])
    assert (alone.question, alone.status, alone.cost) == (None, "completed", 3)
    assert in_short(alone.steps) == [None, ("echo", "a"), "Done."]
    assert_sums(found)


def test_a_request_that_is_owed_is_told(store: Store) -> None:
    chat = a_chat(store, Say("Hi", cost="1"))
    chat.ask("Hello")
    record: Any = store.records.request
    (row,) = store.found(record.select().dicts())
    with store.connection():
        record.delete().execute()
    columns = {field.column_name: row[field.name] for field in record._meta.sorted_fields}
    store.owe(store.statements.insert(record, columns))
    found = told(chat)
    assert found.turns[0].cost == found.stats.cost == 1


def test_what_a_model_was_sent_back_for_is_not_taken_for_its_reply(store: Store) -> None:
    class Twice(Middleware):
        def on_response(self, context: Any, reply: Any) -> Any:
            return RETRY("Once more.") if reply.content == "Bad." else None

    chat = a_chat(store, "Bad.", Say(calls=[Call("echo", text="a")]), "Good.", middlewares=[Twice()])
    chat.ask("Go")
    (turn,) = told(chat).turns
    assert in_short(turn.steps) == [None, None, ("echo", "a"), "Good."]
    assert [step.is_reply for step in turn.steps if isinstance(step, ModelCall)] == [False, False, True]


def test_words_that_no_model_said_are_those_of_no_call(store: Store) -> None:
    class Instead(Middleware):
        def on_response(self, context: Any, reply: Any) -> Any:
            return REPLACE("Ours.") if reply.content == "Theirs." else None

    def end(text: str) -> Any:
        return Halt(text)

    chat = a_chat(store, "Theirs.", Say("I end it.", calls=[Call("end", text="The end.")]), tools=[end])
    chat.use(Instead())
    chat.ask("Go")
    chat.ask("Go on")
    replaced, halted = told(chat).turns
    assert (replaced.reply and replaced.reply.text, in_short(replaced.steps)) == ("Ours.", [None])
    assert halted.reply is not None
    assert halted.reply.text == "The end."
    assert in_short(halted.steps) == ["I end it.", ("end", "The end.")]


def test_a_picture_that_a_model_made_is_a_file_of_its_reply(store: Store) -> None:
    picture = b"\x89PNG\r\n\x1a\n" + b"0" * 20
    chat = a_chat(store, Say("Here.", images=[picture]))
    chat.ask("Draw")
    (turn,) = told(chat).turns
    assert turn.reply is not None
    assert [(file.media_type, file.size) for file in turn.reply.files] == [("image/png", 28)]


def test_the_last_turns_can_be_read_a_page_at_a_time(store: Store) -> None:
    chat = a_chat(store, *[Say(str(number), cost="1") for number in range(5)])
    for number in range(5):
        chat.ask(f"{number}?")
    last = told(chat, last=2)
    assert [turn.question and turn.question.text for turn in last.turns] == ["3?", "4?"]
    assert (last.turns_before, last.besides, last.stats.cost, last.turns[0].cost) == (3, (), 5, 1)
    before = told(chat, last=2, before=last.turns[0].position)
    assert [turn.question and turn.question.text for turn in before.turns] == ["1?", "2?"]
    assert (before.turns_before, before.besides, before.turns[0].cost) == (1, (), 1)
    first = told(chat, last=9, before=before.turns[0].position)
    assert ([turn.cost for turn in first.turns], first.turns_before) == ([1], 0)


@pytest.mark.parametrize(
    "options", [{"last": 0}, {"last": True}, {"last": "2"}, {"before": -1}, {"before": 2.5}], ids=str
)
def test_a_page_of_no_whole_number_is_refused(sqlite_store: Store, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match="is not a whole number from"):
        chronicle(sqlite_store, a_chat(sqlite_store).id, **options)


def test_a_session_tells_its_agent_and_inputs(store: Store) -> None:
    class Support(Agent):
        model = "test"

    session = create_agent_session(store, Support, llm=ScriptedLLM("Hi!"), metadata={"customer": "c_1"})
    session.ask("Hello")
    found = chronicle(store, session.chat_id)
    assert found is not None
    assert (found.agent_class, found.session_metadata) == ("Support", {"customer": "c_1"})


def test_encrypted_content_is_clear(database_url: str) -> None:
    with connect(database_url, encrypt=Fernet.generate_key()) as store:
        store.create_tables()
        script = (Say("I look.", thinking="Hm.", calls=[Call("echo", text="a")]), ProviderError(400, "no"))
        chat = a_chat(store, *script, on_error="keep", instructions="Be brief.")
        with pytest.raises(ProviderError):
            chat.ask("Go", files=[("notes.txt", b"1")])
        found = told(chat)
    (turn,) = found.turns
    assert found.instructions == "Be brief."
    assert turn.question is not None
    assert turn.question.text == "Go"
    assert [file.filename for file in turn.question.files] == ["notes.txt"]
    call, run, failed = turn.steps
    assert (call.text, call.thinking, run.arguments, run.result) == ("I look.", "Hm.", '{"text": "a"}', "a")  # type: ignore[union-attr]
    assert isinstance(failed, ModelCall)
    assert failed.error_message == "no"


@pytest.mark.parametrize("given", ["nonsense", None, "01a1f8c8-18bf-7346-8b7e-b94b1b67b901"])
def test_a_chat_that_is_not_there_is_none(sqlite_store: Store, given: Any) -> None:
    assert chronicle(sqlite_store, given) is None


def test_it_reads_the_same_from_asyncio_and_as_json(store: Store) -> None:
    chat = a_chat(store, Say("I look.", calls=[Call("echo", text="a")], cost="0.5"), "Done.")
    chat.ask("Go")
    found = asyncio.run(achronicle(store, str(chat.id)))
    assert found is not None
    assert found == told(chat)
    read = json.loads(json.dumps(found.as_dict(), default=str))
    assert [step["kind"] for step in read["turns"][0]["steps"]] == ["model", "tool", "model"]
    assert read["turns"][0]["stats"]["cost"] == "0.5"
    assert read["turns"][0]["question"]["text"] == "Go"


def test_a_turn_that_another_process_took_up_again_is_one_story(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(keywords: Any) -> str:
        raise KeyboardInterrupt

    chat = a_chat(store, Say("One.", calls=[Call("echo", text="a")], cost="1"), stop)
    message: Any = store.records.message
    with monkeypatch.context() as patch:
        patch.setattr("llm_orm.rows.Rows.give_up", lambda self, error: None)  # as where the process dies
        with pytest.raises(KeyboardInterrupt):
            chat.ask("Go")
    with store.connection():
        message.update(updated_at=message.get().updated_at - timedelta(hours=1)).execute()
    assert told(chat).turns[0].status == "pending"
    chat.resume(llm=ScriptedLLM(Say("Two.", cost="2")))
    found = told(chat)
    (turn,) = found.turns
    assert in_short(turn.steps) == ["One.", ("echo", "a"), "KeyboardInterrupt", "ProcessDied", "Two."]
    assert turn.status == "completed"
    assert_sums(found)

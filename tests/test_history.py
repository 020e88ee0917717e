"""What the model is shown of the turns before: all of it, verbatim, rebuilt from rows."""

import threading
from typing import Any

import pytest
from conftest import WAYS, Ask, rows

from llm_orm import Chat, Store, connect, create_chat, load_chat, tool
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

LONDON = Call("get_weather", call_id="call_london", signature="gemini-1", city="London")
PARIS = Call("get_weather", call_id="call_paris", city="Paris")
THOUGHT = Say("Let me look.", thinking="Two cities.", signature="sig-0", calls=[LONDON, PARIS])

ROUND = [
    {
        "role": "assistant",
        "content": "Let me look.",
        "thinking_blocks": [{"type": "thinking", "thinking": "Two cities.", "signature": "sig-0"}],
        "tool_calls": [
            {
                "id": "call_london",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "London"}'},
                "provider_specific_fields": {"thought_signature": "gemini-1"},
            },
            {
                "id": "call_paris",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
            },
        ],
    },
    {"role": "tool", "tool_call_id": "call_london", "content": "rain in London"},
    {"role": "tool", "tool_call_id": "call_paris", "content": "rain in Paris"},
]
LAST = {
    "role": "assistant",
    "content": "Rain.",
    "thinking_blocks": [{"type": "thinking", "thinking": "Both the same.", "signature": "sig-1"}],
}
FIRST_TURN = [{"role": "user", "content": "Weather?"}, *ROUND, LAST]


@pytest.fixture(params=["ask", "aask_stream"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Two of the four ways: all of them read history in one place."""
    return WAYS[request.param]


@tool
def get_weather(city: str) -> str:
    return f"rain in {city}"


def first_turn(store: Store, ask: Ask, *more: Any, **options: Any) -> Chat:
    script = THOUGHT, Say("Rain.", thinking="Both the same.", signature="sig-1"), *more
    chat = create_chat(store, model="test", llm=ScriptedLLM(*script), tools=[get_weather], **options)
    ask(chat, "Weather?")
    return chat


def shown(chat: Chat) -> list[dict[str, Any]]:
    return chat.options.llm.requests[-1]["messages"]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_the_next_turn_sees_rounds_results_and_thinking_verbatim(store, ask):
    """NodeLLM's C11: the next turn saw user, assistant, user; calls, results and thinking were gone."""
    chat = first_turn(store, ask, "Yes.")
    ask(chat, "Sure?")
    assert shown(chat) == [*FIRST_TURN, user("Sure?")]


def test_a_chat_that_is_loaded_in_another_process_sees_the_same(store, database_url, ask):
    chat = first_turn(store, ask)
    with connect(database_url) as other:
        again = load_chat(other, chat.id, llm=ScriptedLLM("Yes.", "Yes!"))
        ask(again, "Sure?")
        assert shown(again) == [*FIRST_TURN, user("Sure?")]
        ask(again, "Really?")
        assert shown(again) == [*FIRST_TURN, user("Sure?"), said("Yes."), user("Really?")]


def test_the_model_sees_within_a_turn_what_the_next_turn_sees_of_it(store, ask):
    chat = first_turn(store, ask, "Yes.")
    within = shown(chat)
    ask(chat, "Sure?")
    assert shown(chat)[: len(within)] == within


def test_without_a_table_of_tool_calls_the_results_are_seen_all_the_same(store, ask):
    with store.connection():
        store.database.drop_tables([store.records.tool_call], cascade=not store.is_sqlite)
    chat = first_turn(store, ask, persistence={"tool_calls": False})
    again = load_chat(store, chat.id, llm=ScriptedLLM("Yes."), persistence={"tool_calls": False})
    ask(again, "Sure?")
    assert shown(again) == [*FIRST_TURN, user("Sure?")]


def test_the_instructions_come_first_and_are_those_of_now(store, ask):
    llm = ScriptedLLM("One.", "Two.", "Three.")
    chat = create_chat(store, model="test", llm=llm, instructions="Be brief.")
    ask(chat, "1?")
    ask(chat, "2?", instructions="Be long.")
    ask(load_chat(store, chat.id, llm=llm, instructions=None), "3?")
    assert [request["messages"][0] for request in llm.requests] == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be long."},
        user("1?"),
    ]


def test_what_another_holder_of_the_chat_wrote_is_seen(store, database_url, ask):
    mine = create_chat(store, model="test", llm=ScriptedLLM("One.", "Three.", "Five."))
    with connect(database_url) as other:
        theirs = load_chat(other, mine.id, llm=ScriptedLLM("Two.", "Four."))
        for number, chat in enumerate((mine, theirs, mine, theirs, mine), 1):
            ask(chat, f"{number}?")
    answers = ["One.", "Two.", "Three.", "Four."]
    expected = [message for number, text in enumerate(answers, 1) for message in (user(f"{number}?"), said(text))]
    assert shown(mine) == [*expected, user("5?")]


def test_two_threads_that_share_a_chat_see_every_turn_once(store):
    llm = ScriptedLLM(*["Fine."] * 20, "Done.")
    chat = create_chat(store, model="test", llm=llm, wait=60)

    def work() -> None:
        for _ in range(5):
            chat.ask("How are you?")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chat.ask("Last?")
    assert shown(chat) == [*[user("How are you?"), said("Fine.")] * 20, user("Last?")]


def test_a_question_without_an_answer_is_shown_and_a_pending_answer_is_not(store, ask):
    chat = create_chat(store, model="test", llm=ScriptedLLM(ProviderError(400), "Here."))
    with pytest.raises(ProviderError):
        ask(chat, "Hello?")
    ask(chat, "Anybody?")
    assert shown(chat) == [user("Hello?"), user("Anybody?")]


def test_messages_that_the_application_wrote_itself_are_shown(store, ask):
    chat = create_chat(store, model="test", llm=ScriptedLLM("Blue."))
    with store.connection():
        for position, (role, content) in enumerate([("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!")]):
            store.records.message.create(chat=chat.id, position=position, role=role, content=content)
    ask(chat, "Which colour?")
    assert shown(chat) == [
        {"role": "system", "content": "Be kind."},
        user("Hi"),
        said("Hello!"),
        user("Which colour?"),
    ]


def test_reload_reads_what_was_changed_by_hand(store, ask):
    chat = create_chat(store, model="test", llm=ScriptedLLM("One.", "Two."))
    ask(chat, "1?")
    with store.connection():
        message = store.records.message
        message.update(content="Edited.").where(message.role == "assistant").execute()
    ask(chat.reload(), "2?")
    assert shown(chat) == [user("1?"), said("Edited."), user("2?")]


@pytest.mark.parametrize("deleted", [1, 2, 3])
def test_a_question_is_shown_where_the_last_messages_were_deleted(store, ask, deleted):
    chat = create_chat(store, model="test", llm=ScriptedLLM("One.", "Two.", "Three."))
    ask(chat, "1?")
    ask(chat, "2?")
    delete_last(store, deleted)
    ask(chat, "3?")
    before = [user("1?"), said("One."), user("2?")][: 4 - deleted]
    assert shown(chat) == [*before, user("3?")]


def test_an_answer_that_was_deleted_can_be_given_anew(store):
    chat = create_chat(store, model="test", llm=ScriptedLLM("One.", "Two.", "Other."))
    chat.ask("1?")
    chat.ask("2?")
    delete_last(store, 1)
    chat.retry()
    assert shown(chat) == [user("1?"), said("One."), user("2?")]
    assert rows(store, "message", "content") == [("1?",), ("One.",), ("2?",), ("Other.",)]


def delete_last(store: Store, number: int) -> None:
    with store.connection():
        record = store.records.message
        last = [message.id for message in record.select().order_by(record.position.desc()).limit(number)]
        record.delete().where(record.id.in_(last)).execute()


def test_a_tool_call_whose_result_was_deleted_is_shown_as_its_text(store, ask):
    chat = first_turn(store, ask, "Yes.")
    with store.connection():
        record = store.records.tool_call
        record.delete().where(record.tool_call_id == "call_paris").execute()
    ask(chat.reload(), "Sure?")
    assert shown(chat) == [user("Weather?"), said("Let me look."), LAST, user("Sure?")]


# history=


def three_turns(store: Store) -> Chat:
    chat = first_turn(store, lambda chat, text: chat.ask(text), "Two.", "Three.")
    chat.ask("2?")
    chat.ask("3?")
    return chat


@pytest.mark.parametrize(("turns", "start"), [(0, 9), (1, 7), (2, 5), (3, 0), (4, 0), (99, 0)])
def test_history_sends_the_question_and_so_many_turns_before_it(store, turns, start):
    chat = three_turns(store)
    everything = [*FIRST_TURN, user("2?"), said("Two."), user("3?"), said("Three."), user("4?")]
    chat.ask("4?", history=turns, llm=(llm := ScriptedLLM("Four.")))
    assert llm.requests[0]["messages"] == everything[start:]


def test_history_leaves_the_database_and_the_next_turn_alone(store, ask):
    chat = three_turns(store)
    before = rows(store, "message", "position", "content", "content_raw")
    ask(chat, "4?", history=0, llm=ScriptedLLM("Four."))
    assert rows(store, "message", "position", "content", "content_raw")[: len(before)] == before
    chat.ask("5?", llm=(llm := ScriptedLLM("Five.")))
    assert len(llm.requests[0]["messages"]) == 12


def test_the_instructions_are_sent_whatever_the_history(store, ask):
    chat = create_chat(store, model="test", llm=ScriptedLLM("One.", "Two."), instructions="Be brief.", history=0)
    ask(chat, "1?")
    ask(chat, "2?")
    assert shown(chat) == [{"role": "system", "content": "Be brief."}, user("2?")]


def test_the_rounds_of_the_turn_itself_are_sent_whatever_the_history(store, ask):
    chat = three_turns(store)
    ask(chat, "4?", history=0, llm=(llm := ScriptedLLM(Call("get_weather", city="Rome"), "Sun.")))
    assert [message["role"] for message in llm.requests[1]["messages"]] == ["user", "assistant", "tool"]


def test_a_history_function_gets_copies_of_what_came_before_and_the_question_is_always_sent(store, ask):
    chat = first_turn(store, ask, "Two.", "Three.")
    got: list[Any] = []

    def nothing(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        got.extend(messages)
        for message in messages:
            message.clear()
        return []

    ask(chat, "2?", history=nothing)
    assert shown(chat) == [user("2?")]
    assert len(got) == len(FIRST_TURN)
    ask(chat, "3?")
    assert shown(chat) == [*FIRST_TURN, user("2?"), said("Two."), user("3?")]


@pytest.mark.parametrize("number", range(1, 6))
def test_a_history_function_cannot_cut_a_tool_round_in_two(store, number):
    chat = three_turns(store)
    for cut in (
        lambda messages: messages[number:],
        lambda messages: messages[:-number],
        lambda messages: messages[::2],
    ):
        chat.ask("4?", history=cut, llm=(llm := ScriptedLLM("Four.")))
        sent = llm.requests[0]["messages"]
        called = [call["id"] for message in sent for call in message.get("tool_calls") or ()]
        assert called == [message["tool_call_id"] for message in sent if message["role"] == "tool"]


def test_a_history_function_cannot_lend_a_result_to_another_turns_call_of_the_same_id(store):
    again = Call("get_weather", call_id="call_1", city="Rome")
    llm = ScriptedLLM(Call("get_weather", call_id="call_1", city="London"), "Rain.", again, "Sun.", "Yes.")
    chat = create_chat(store, model="test", llm=llm, tools=[get_weather])
    chat.ask("London?")
    chat.ask("Rome?")
    # Drops the result of the first call, and the call of the second result.
    chat.ask("Sure?", history=lambda messages: [m for at, m in enumerate(messages) if at not in (2, 5)])
    assert shown(chat) == [user("London?"), said("Rain."), user("Rome?"), said("Sun."), user("Sure?")]


def test_a_history_function_may_write_a_summary(store, ask):
    chat = first_turn(store, ask, "Yes.")
    summary = {"role": "system", "content": "They spoke of rain."}
    ask(chat, "Sure?", history=lambda messages: [summary])
    assert shown(chat) == [summary, user("Sure?")]

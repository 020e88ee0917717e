"""ScriptedLLM, for our users' tests: it says what its docstrings say it does."""

import asyncio
import subprocess
import sys
import threading
import time
from decimal import Decimal
from typing import Any

import pytest
from conftest import Ask

from llm_orm import Chat, Chunk, Store, connect, create_chat
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM


def get_weather(city: str, unit: str = "c") -> str:
    return f"rain in {city}, in {unit}"


@pytest.fixture
def memory() -> Any:
    with connect("sqlite:///:memory:") as store:
        store.create_tables()
        yield store


def a_chat(store: Store, llm: ScriptedLLM, **keywords: Any) -> Chat:
    return create_chat(store, model="test", llm=llm, **keywords)


def test_the_example_of_its_docstring_works(memory: Store, ask: Ask) -> None:
    llm = ScriptedLLM("Hello!", Call("get_weather", city="London"), "It rains.")
    chat = create_chat(memory, model="test", llm=llm, tools=[get_weather])
    assert ask(chat, "Hi").content == "Hello!"
    assert ask(chat, "How is the weather?").content == "It rains."
    assert chat.tool_calls()[0].result == "rain in London, in c"
    assert repr(llm) == "<ScriptedLLM 0 replies left>"


# The script


def test_replies_come_in_order_and_more_may_be_added(memory: Store, ask: Ask) -> None:
    llm = ScriptedLLM("One.", "Two.")
    chat = a_chat(memory, llm)
    assert llm.add("Three.", Say("Four.")) is llm
    assert [ask(chat, "Hi").content for _ in range(4)] == ["One.", "Two.", "Three.", "Four."]


def test_a_script_that_is_used_up_fails_the_test_with_what_was_asked(memory: Store, ask: Ask) -> None:
    chat = a_chat(memory, ScriptedLLM("One."))
    ask(chat, "Hi")
    with pytest.raises(AssertionError) as caught:
        ask(chat, "And now?")
    assert str(caught.value).startswith("the script has no reply for call 2, which ends in [{'role': 'user', ")
    assert "And now?" in str(caught.value)
    assert [message.content for message in chat.messages()] == ["Hi", "One.", "And now?"]


def test_a_list_of_calls_is_one_round(memory: Store, ask: Ask) -> None:
    script = [Call("get_weather", city="York"), Call("get_weather", city="Bath", unit="f")], "Rain, rain."
    chat = a_chat(memory, ScriptedLLM(*script), tools=[get_weather])
    ask(chat, "Weather?")
    assert [(call.round, call.position, call.tool_call_id, call.result) for call in chat.tool_calls()] == [
        (0, 0, "call_1", "rain in York, in c"),
        (0, 1, "call_2", "rain in Bath, in f"),
    ]


def test_ids_of_calls_count_over_the_whole_script_unless_given(memory: Store, ask: Ask) -> None:
    script = (
        Call("get_weather", city="a"),
        Call("get_weather", city="b", call_id="mine"),
        Call("get_weather", city="c"),
        ".",
    )
    chat = a_chat(memory, ScriptedLLM(*script), tools=[get_weather])
    ask(chat, "Weather?")
    assert [call.tool_call_id for call in chat.tool_calls()] == ["call_1", "mine", "call_3"]


def test_raw_arguments_are_sent_to_the_letter(memory: Store, ask: Ask) -> None:
    chat = a_chat(memory, ScriptedLLM(Call("get_weather", raw='{"city": "Lon'), "Sorry."), tools=[get_weather])
    ask(chat, "Weather?")
    assert [(call.arguments, call.status) for call in chat.tool_calls()] == [('{"city": "Lon', "failed")]


def test_a_parameter_of_a_tool_may_be_called_name(memory: Store) -> None:
    def greet(name: str) -> str:
        return f"Hello, {name}"

    chat = a_chat(memory, ScriptedLLM(Call("greet", name="Ada"), "Done."), tools=[greet])
    chat.ask("Go")
    assert chat.tool_calls()[0].result == "Hello, Ada"


def test_an_exception_is_raised(memory: Store, ask: Ask) -> None:
    problem = RuntimeError("out of order")
    chat = a_chat(memory, ScriptedLLM(problem))
    with pytest.raises(RuntimeError, match="out of order") as caught:
        ask(chat, "Hi")
    assert caught.value is problem
    assert [request.error for request in chat.requests()] == ["RuntimeError"]


@pytest.mark.parametrize(
    ("status_code", "attempts"), [(429, 2), (408, 2), (500, 2), (503, 2), (None, 2), (400, 1), (401, 1)]
)
def test_a_providers_error_is_tried_again_where_a_real_one_would_be(
    memory: Store, status_code: int | None, attempts: int
) -> None:
    llm = ScriptedLLM(ProviderError(status_code, "no", retry_after=0), "Hello!")
    chat = a_chat(memory, llm)
    if attempts == 2:
        assert chat.ask("Hi").content == "Hello!"
    else:
        with pytest.raises(ProviderError, match="no"):
            chat.ask("Hi")
    assert [request.status_code for request in chat.requests()] == [status_code or 0, 200][:attempts]
    assert [request.error_message for request in chat.requests()] == ["no", None][:attempts]


def test_a_function_gets_the_keywords_and_says_what_comes(memory: Store, ask: Ask) -> None:
    def answer(keywords: dict[str, Any]) -> Any:
        last = keywords["messages"][-1]
        if last["role"] == "tool":
            return f"{keywords['model']}: {last['content']}"
        return [Call("get_weather", city=last["content"])] if last["content"] != "fail" else ProviderError(400)

    chat = a_chat(memory, ScriptedLLM(*[answer] * 3), tools=[get_weather])
    assert ask(chat, "Rome").content == "test: rain in Rome, in c"
    with pytest.raises(ProviderError):
        ask(chat, "fail")


@pytest.mark.parametrize("scripted", [5, None, [], ["text"], [Say("x")], {"content": "x"}])
def test_what_cannot_be_scripted_is_refused_at_once(memory: Store, scripted: Any) -> None:
    for act in (lambda: ScriptedLLM("Hi", scripted), lambda: ScriptedLLM().add(scripted)):
        with pytest.raises(TypeError, match="a script takes strings, Say, Call, lists of Call"):
            act()
    with pytest.raises(TypeError, match="a script takes strings"):
        a_chat(memory, ScriptedLLM(lambda keywords: scripted)).ask("Hi")


# What is said


def test_everything_that_is_said_is_stored(memory: Store, ask: Ask) -> None:
    say = Say(
        "It rains.",
        thinking="Let me see.",
        signature="sig",
        input_tokens=100,
        output_tokens=50,
        cached_tokens=40,
        cache_write_tokens=30,
        thinking_tokens=20,
        cost="0.125",
        finish_reason="length",
    )
    chat = a_chat(memory, ScriptedLLM(say))
    message = ask(chat, "Weather?")
    assert (message.content, message.thinking_text, message.thinking_signature) == ("It rains.", "Let me see.", "sig")
    [request] = chat.requests()
    assert (request.input_tokens, request.output_tokens, request.cached_tokens) == (100, 50, 40)
    assert (request.cache_write_tokens, request.thinking_tokens) == (30, 20)
    assert (request.cost, request.finish_reason, request.provider) == (Decimal("0.125"), "length", "scripted")
    assert not request.usage_estimated


def test_tokens_are_words_unless_they_are_given(memory: Store, ask: Ask) -> None:
    chat = a_chat(memory, ScriptedLLM("one two three", Say("one two", output_tokens=0)), instructions="be brief")
    ask(chat, "how are you today")
    assert [(request.input_tokens, request.output_tokens) for request in chat.requests()] == [(6, 3)]
    ask(chat, "fine")
    assert chat.requests()[1].output_tokens == 0


def test_without_usage_the_tokens_are_counted_here(memory: Store, ask: Ask) -> None:
    chat = a_chat(memory, ScriptedLLM(Say("one two three", usage=False)))
    message = ask(chat, "how are you")
    [request] = chat.requests()
    assert (request.input_tokens, request.output_tokens, request.usage_estimated) == (3, 3, True)
    assert (message.input_tokens, message.output_tokens) == (3, 3)


def test_a_price_gives_every_request_its_cost(memory: Store, ask: Ask) -> None:
    llm = ScriptedLLM("one two", input_cost_per_token="0.01", output_cost_per_token=Decimal("0.1"), provider="acme")
    chat = a_chat(memory, llm)
    ask(chat, "a b c")
    assert [(request.cost, request.provider) for request in chat.requests()] == [(Decimal("0.23"), "acme")]


def test_without_a_price_the_cost_is_unknown(memory: Store, ask: Ask) -> None:
    chat = a_chat(memory, ScriptedLLM("Hello!"))
    ask(chat, "Hi")
    assert [request.cost for request in chat.requests()] == [None]


# Streams


def chunks(chat: Chat, text: str = "Hi", **options: Any) -> list[Chunk]:
    return list(chat.ask_stream(text, **options))


def test_a_stream_comes_word_by_word_or_as_it_is_told(memory: Store) -> None:
    texts = ["It  rains\nin London. ", " leading", "\n", "one"]
    chat = a_chat(memory, ScriptedLLM(*texts, Say("ignored", chunks=["a", "", "bc", " "])))
    streamed = [[chunk.content for chunk in chunks(chat)] for _ in range(5)]
    assert streamed == [["It  ", "rains\n", "in ", "London. "], [" leading"], ["\n"], ["one"], ["a", "bc", " "]]
    assert [message.content for message in chat.messages()[1::2]] == [*texts, "abc "]


def test_a_stream_shows_thinking_before_text_and_calls_at_the_end(memory: Store) -> None:
    say = Say("Let me look.", thinking="Hm, hm.", signature="sig", calls=[Call("get_weather", city="Rome")])
    chat = a_chat(memory, ScriptedLLM(say, "Rain."), tools=[get_weather])
    shown = chunks(chat)
    assert [chunk.thinking for chunk in shown[:2]] == ["Hm, ", "hm."]
    assert "".join(chunk.content for chunk in shown) == "Let me look.Rain."
    [call] = [chunk.tool_call for chunk in shown if chunk.tool_call]
    assert (call.name, call.parsed_arguments) == ("get_weather", {"city": "Rome"})


def test_an_error_comes_after_the_text_of_a_stream(memory: Store) -> None:
    chat = a_chat(memory, ScriptedLLM(Say("It rains", error=ProviderError(500, "cut off"))))
    seen = []
    with pytest.raises(ProviderError, match="cut off"):
        for chunk in chat.ask_stream("Hi"):
            seen.append(chunk.content)
    assert seen == ["It ", "rains"]
    assert [(request.status_code, request.streamed) for request in chat.requests()] == [(500, True)]


def test_an_error_of_a_reply_that_is_not_streamed_is_raised_instead(memory: Store) -> None:
    chat = a_chat(memory, ScriptedLLM(Say("It rains", error=ProviderError(400, "cut off"))))
    with pytest.raises(ProviderError, match="cut off"):
        chat.ask("Hi")


# Time


def test_a_reply_can_be_held_back_until_the_test_says_so(memory: Store) -> None:
    until = threading.Event()
    chat = a_chat(memory, ScriptedLLM(Say("Now.", until=until), Say("One two.", until=until)))
    asking = threading.Thread(target=chat.ask, args=("Hi",))
    asking.start()
    until.set()
    asking.join(10)
    assert chat.messages()[-1].content == "Now."

    until.clear()
    stream = chat.ask_stream("Hi")
    assert next(stream).content == "One "
    until.set()
    assert [chunk.content for chunk in stream] == ["two."]


def test_a_reply_can_be_held_back_from_asyncio(memory: Store) -> None:
    async def act() -> tuple[str | None, list[str]]:
        until = threading.Event()
        chat = a_chat(memory, ScriptedLLM(Say("Now.", until=until), Say("One two.", until=until)))
        asking = asyncio.create_task(chat.aask("Hi"))
        done, _ = await asyncio.wait([asking], timeout=0.02)
        assert not done
        until.set()
        answer = (await asking).content
        until.clear()
        stream = chat.aask_stream("Hi")
        first = (await anext(stream)).content
        until.set()
        return answer, [first, *[chunk.content async for chunk in stream]]

    assert asyncio.run(act()) == ("Now.", ["One ", "two."])


def test_a_reply_can_take_its_time(memory: Store) -> None:
    chat = a_chat(memory, ScriptedLLM(*[Say("Slow.", delay_s=0.02)] * 2))
    started = time.perf_counter()
    chat.ask("Hi")
    asyncio.run(chat.aask("Hi"))
    assert time.perf_counter() - started >= 0.04
    assert all(request.duration_ms >= 19 for request in chat.requests())


# What it was sent


def test_requests_are_kept_as_they_were_sent(memory: Store, ask: Ask) -> None:
    llm = ScriptedLLM(Call("get_weather", city="Rome"), "Rain.", "Bye.")
    chat = a_chat(
        memory, llm, tools=[get_weather], instructions="Be brief.", temperature=0.5, params={"seed": 1}, max_tokens=9
    )
    ask(chat, "Weather?")
    ask(chat, "Bye")
    first, second, third = llm.requests
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
    ]
    assert [len(request["messages"]) for request in (first, second, third)] == [2, 4, 6]
    assert (first["model"], first["temperature"], first["max_tokens"], first["seed"]) == ("test", 0.5, 9, 1)
    assert first["tools"][0]["function"]["name"] == "get_weather"


def test_what_a_script_does_to_the_keywords_does_not_change_the_record(memory: Store) -> None:
    def vandal(keywords: dict[str, Any]) -> str:
        keywords["messages"][0]["content"] = "changed"
        keywords["messages"].clear()
        return "Done."

    llm = ScriptedLLM(vandal)
    a_chat(memory, llm).ask("Hi")
    assert llm.requests[0]["messages"] == [{"role": "user", "content": "Hi"}]


def test_one_script_may_serve_many_threads(memory: Store) -> None:
    llm = ScriptedLLM(*(f"Reply {number}." for number in range(20)))
    chats = [a_chat(memory, llm) for _ in range(20)]
    threads = [threading.Thread(target=chat.ask, args=("Hi",)) for chat in chats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    answers = {chat.messages()[1].content for chat in chats}
    assert answers == {f"Reply {number}." for number in range(20)}
    assert len(llm.requests) == 20


def test_it_needs_no_litellm() -> None:
    program = """
import sys
from llm_orm import connect, create_chat
from llm_orm.testing import ScriptedLLM, Say
store = connect("sqlite:///:memory:")
store.create_tables()
chat = create_chat(store, model="test", llm=ScriptedLLM("Hello!", Say("Bye.", usage=False)))
chat.ask("Hi")
for chunk in chat.ask_stream("Bye"):
    pass
assert chat.stats().requests == 2
assert not [name for name in sys.modules if name.split(".")[0] in ("litellm", "openai", "httpx")]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)

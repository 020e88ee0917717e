"""Agents and sessions: code wins over what is stored, inputs, hooks, rescues; and that a session is a chat."""

import asyncio
import functools
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pydantic
import pytest
from conftest import WAYS, rows
from freezegun import freeze_time

from llm_orm import (
    REPLACE,
    RETRY,
    Agent,
    AgentMismatch,
    AgentSession,
    AsyncTool,
    Budget,
    Chat,
    ChatBusy,
    ChatGone,
    InvalidReply,
    InvalidValue,
    LlmOrmError,
    Middleware,
    NothingToRetry,
    ReplyNotSaved,
    Stats,
    Store,
    Tool,
    ToolContext,
    ToolError,
    ToolRoundsExceeded,
    TurnCancelled,
    UnknownKeyword,
    acreate_agent_session,
    aload_agent_session,
    connect,
    create_agent_session,
    create_chat,
    define_agent,
    load_agent_session,
    load_chat,
    tool,
)
from llm_orm.agent import HOOKS, OF_THE_CLASS
from llm_orm.testing import Call, ProviderError, Say, ScriptedLLM

ADA = {"user_id": "u_1", "name": "Ada"}
LONDON = Call("get_weather", city="London")


@tool
def get_weather(city: str) -> str:
    """Current weather in a city."""
    return f"rain in {city}"


@tool
def fail() -> str:
    raise ValueError("no such place")


@tool(requires_approval=True)
def refund(order_id: str) -> str:
    return f"{order_id} is refunded"


class LookupOrder(Tool):
    """Look up an order."""

    def execute(self, order_id: str) -> dict[str, str]:
        return {order_id: "shipped"}


class Support(Agent):
    model = "gpt-4.1"
    instructions = lambda inputs: f"You help {inputs['name']}. Be concise."  # noqa: E731
    tools = [LookupOrder, get_weather]


class Plain(Agent):
    model = "test"


def session_of(store: Store, agent: type[Agent], *script: Any, metadata: Any = ADA, **keywords: Any) -> AgentSession:
    return create_agent_session(store, agent, metadata=metadata, llm=ScriptedLLM(*script), **keywords)


def loaded(session: AgentSession, agent: type[Agent], *script: Any, **keywords: Any) -> AgentSession:
    """The session as another process has it."""
    found = load_agent_session(session.store, agent, session.id, llm=ScriptedLLM(*script), **keywords)
    assert found is not None
    return found


def requests(session: AgentSession) -> list[dict[str, Any]]:
    """The keywords of every call of the model."""
    return session.options.llm.requests


def sent(session: AgentSession) -> list[tuple[str, Any]]:
    """What the model was shown on its last call: (role, content)."""
    return [(message["role"], message["content"]) for message in requests(session)[-1]["messages"]]


def offered(keywords: dict[str, Any]) -> list[str]:
    """The names of the tools that a call of the model came with."""
    return [each["function"]["name"] for each in keywords.get("tools", ())]


# A session is a chat


def test_a_session_is_a_chat_with_a_row_of_its_own(store):
    session = session_of(store, Support)
    assert isinstance(session, Chat)
    assert rows(store, "chat", "id", "model", "instructions", "metadata") == [(session.chat_id, None, None, None)]
    assert rows(store, "agent_session", "id", "chat", "agent_class", "metadata") == [
        (session.id, session.chat_id, "Support", ADA)
    ]
    assert session.id != session.chat_id
    assert session.metadata == ADA
    assert session.agent_class == "Support"
    assert isinstance(session.agent, Support)
    assert repr(session) == f"<AgentSession {session.id} of Support>"


def test_a_session_says_what_it_asks_with(store):
    session = session_of(store, Support)
    assert (session.model, session.model_id, session.provider) == ("gpt-4.1", "gpt-4.1", None)
    assert session.instructions == "You help Ada. Be concise."
    assert list(session.options.toolbox.by_name) == ["lookup_order", "get_weather"]


def test_a_session_asks_as_its_agent_says(store, ask):
    session = session_of(store, Support, Call("lookup_order", order_id="789"), "It is on its way.")
    assert ask(session, "Where is my order #789?").content == "It is on its way."
    first, last = requests(session)
    assert (first["model"], offered(first)) == ("gpt-4.1", ["lookup_order", "get_weather"])
    assert [message["content"] for message in last["messages"]] == [
        "You help Ada. Be concise.",
        "Where is my order #789?",
        None,
        '{"789":"shipped"}',
    ]


def test_the_chat_of_a_session_can_be_read_as_any_other(store, ask):
    session = session_of(store, Support, "Hello!")
    ask(session, "Hi")
    chat = load_chat(store, session.chat_id)
    assert chat is not None
    assert [message.content for message in chat.messages()] == ["Hi", "Hello!"]
    assert chat.stats() == session.stats()


Does = Callable[[AgentSession], Any]


def read(stream: Any) -> str:
    return "".join(chunk.content for chunk in stream)


async def aread(stream: Any) -> str:
    return "".join([chunk.content async for chunk in stream])


def text_of(asked: Any) -> str:
    """The reply of a coroutine that asks."""
    return asyncio.run(asked).content


def unanswered(session: AgentSession) -> AgentSession:
    session.options.llm.add(ProviderError(400), "Hello!")
    with pytest.raises(ProviderError):
        session.ask("Hi")
    return session


def parked(session: AgentSession) -> AgentSession:
    session.options.llm.add(Call("refund", order_id="789"), "Done.")
    assert session.with_tool(refund).ask("Refund!").status == "pending"
    return session


def approved(session: AgentSession) -> AgentSession:
    parked(session).approve(session.pending_approvals()[0])
    return session


def waiting(session: AgentSession) -> str:
    return parked(session).pending_approvals()[0].tool_call_id


def talked(session: AgentSession) -> AgentSession:
    session.options.llm.add(LONDON, "Rain.")
    session.ask("Weather?")
    return session


def says(session: AgentSession) -> AgentSession:
    session.options.llm.add("Hello!")
    return session


def next_call(session: AgentSession, **options: Any) -> dict[str, Any]:
    says(session).ask("Hi", **options)
    return requests(session)[-1]


def heard(session: AgentSession, hook: str) -> int:
    """How often a hook is called in a turn with a tool that fails and one that does not."""
    calls: list[Any] = []
    assert getattr(session, hook)(lambda *arguments: calls.append(arguments)) is session
    session.options.llm.add([LONDON, Call("fail")], "Rain.")
    session.with_tool(fail).ask("Weather?")
    return len(calls)


class City(pydantic.BaseModel):
    city: str


class Note(Middleware):
    """Adds its name to a list whenever a model is called."""

    def __init__(self, name: str, seen: list[str]):
        self.name, self.seen = name, seen

    def on_request(self, context: Any) -> None:
        self.seen.append(self.name)


def used(session: AgentSession) -> list[str]:
    seen: list[str] = []
    next_call(session.use(Note("mine", seen)))
    return seen


def schema_of(session: AgentSession) -> Any:
    session.options.llm.add('{"city": "Paris"}')
    return session.with_schema(City).ask("Where?").parsed


def falls_back(session: AgentSession) -> Any:
    session.options.llm.add(ProviderError(404), "From the other.")
    return session.with_fallbacks("other").ask("Hi").model_id


SYSTEM = "You help Ada. Be concise."
EVERYTHING: dict[str, tuple[Does, Any]] = {
    "ask": (lambda s: says(s).ask("Hi").content, "Hello!"),
    "ask_stream": (lambda s: read(says(s).ask_stream("Hi")), "Hello!"),
    "aask": (lambda s: text_of(says(s).aask("Hi")), "Hello!"),
    "aask_stream": (lambda s: asyncio.run(aread(says(s).aask_stream("Hi"))), "Hello!"),
    "retry": (lambda s: unanswered(s).retry().content, "Hello!"),
    "retry_stream": (lambda s: read(unanswered(s).retry_stream()), "Hello!"),
    "aretry": (lambda s: text_of(unanswered(s).aretry()), "Hello!"),
    "aretry_stream": (lambda s: asyncio.run(aread(unanswered(s).aretry_stream())), "Hello!"),
    "resume": (lambda s: approved(s).resume().content, "Done."),
    "resume_stream": (lambda s: read(approved(s).resume_stream()), "Done."),
    "aresume": (lambda s: text_of(approved(s).aresume()), "Done."),
    "aresume_stream": (lambda s: asyncio.run(aread(approved(s).aresume_stream())), "Done."),
    "count_tokens": (lambda s: s.count_tokens("one two") - s.count_tokens("one"), 1),
    "acount_tokens": (lambda s: asyncio.run(s.acount_tokens("one two")) - s.count_tokens("one"), 1),
    "pending_approvals": (lambda s: [call.name for call in parked(s).pending_approvals()], ["refund"]),
    "apending_approvals": (lambda s: [c.name for c in asyncio.run(parked(s).apending_approvals())], ["refund"]),
    "approve": (lambda s: s.approve(waiting(s)).approval, "approved"),
    "aapprove": (lambda s: asyncio.run(s.aapprove(waiting(s))).approval, "approved"),
    "deny": (lambda s: s.deny(waiting(s), "too late").result, "The user denied the refund tool call. Reason: too late"),
    "adeny": (lambda s: asyncio.run(s.adeny(waiting(s))).result, "The user denied the refund tool call."),
    "cancel": (lambda s: parked(s).cancel(), True),
    "acancel": (lambda s: asyncio.run(parked(s).acancel()), True),
    "add_message": (lambda s: s.add_message("system", "It is late.").content, "It is late."),
    "aadd_message": (lambda s: asyncio.run(s.aadd_message("user", "Late?")).content, "Late?"),
    "fork": (lambda s: [message.content for message in talked(s).fork().messages()], ["Weather?", "Rain."]),
    "afork": (lambda s: [m.content for m in asyncio.run(talked(s).afork(at=0)).messages()], ["Weather?"]),
    "messages": (lambda s: [message.content for message in talked(s).messages()], ["Weather?", "Rain."]),
    "amessages": (lambda s: [m.content for m in asyncio.run(talked(s).amessages())], ["Weather?", "Rain."]),
    "attachments": (lambda s: talked(s).attachments(), []),
    "aattachments": (lambda s: asyncio.run(talked(s).aattachments()), []),
    "tool_calls": (lambda s: [call.result for call in talked(s).tool_calls()], ["rain in London"]),
    "atool_calls": (lambda s: [c.result for c in asyncio.run(talked(s).atool_calls())], ["rain in London"]),
    "requests": (lambda s: [request.round for request in talked(s).requests()], [0, 1]),
    "arequests": (lambda s: [r.round for r in asyncio.run(talked(s).arequests())], [0, 1]),
    "stats": (lambda s: talked(s).stats().requests, 2),
    "astats": (lambda s: asyncio.run(talked(s).astats()).requests, 2),
    "ahistory": (lambda s: asyncio.run(talked(s).ahistory())[-1]["content"], "Rain."),
    "erase": (lambda s: talked(s).erase().messages, 2),
    "aerase": (lambda s: asyncio.run(talked(s).aerase()).messages, 2),
    "delete": (lambda s: (s.delete(), rows(s.store, "agent_session", "id"))[1], []),
    "adelete": (lambda s: (asyncio.run(s.adelete()), rows(s.store, "chat", "id"))[1], []),
    "reload": (lambda s: s.reload() is s, True),
    "areload": (lambda s: asyncio.run(s.areload()) is s, True),
    "with_model": (lambda s: next_call(s.with_model("other"))["model"], "other"),
    "with_provider": (lambda s: next_call(s.with_provider("azure"))["custom_llm_provider"], "azure"),
    "with_instructions": (
        lambda s: next_call(s.with_instructions("In French."))["messages"][0]["content"],
        f"{SYSTEM}\nIn French.",
    ),
    "system": (lambda s: next_call(s.system("Sing.", replace=True))["messages"][0]["content"], "Sing."),
    "with_temperature": (lambda s: next_call(s.with_temperature(0.5))["temperature"], 0.5),
    "with_params": (lambda s: next_call(s.with_params(seed=7))["seed"], 7),
    "with_headers": (lambda s: next_call(s.with_headers(**{"x-a": "1"}))["extra_headers"], {"x-a": "1"}),
    "with_thinking": (lambda s: next_call(s.with_thinking(effort="low"))["reasoning_effort"], "low"),
    "with_effort": (lambda s: next_call(s.with_effort("high"))["reasoning_effort"], "high"),
    "with_schema": (schema_of, City(city="Paris")),
    "with_fallbacks": (falls_back, "other"),
    "with_tool": (lambda s: offered(next_call(s.with_tool(fail)))[-1], "fail"),
    "with_tools": (lambda s: offered(next_call(s.with_tools(fail, replace=True))), ["fail"]),
    "with_tool_choice": (lambda s: next_call(s.with_tool_choice("none"))["tool_choice"], "none"),
    "use": (used, ["mine"]),
    "with_budgets": (lambda s: [each.by for each in s.with_budgets(Budget(1)).options.budgets], ["chat"]),
    "before_request": (lambda s: heard(s, "before_request"), 2),
    "after_response": (lambda s: heard(s, "after_response"), 2),
    "on_new_message": (lambda s: heard(s, "on_new_message"), 2),
    "on_end_message": (lambda s: heard(s, "on_end_message"), 1),
    "on_tool_call_start": (lambda s: heard(s, "on_tool_call_start"), 2),
    "on_tool_call_end": (lambda s: heard(s, "on_tool_call_end"), 2),
    "on_tool_result": (lambda s: heard(s, "on_tool_result"), 2),
    "on_tool_call_error": (lambda s: heard(s, "on_tool_call_error"), 1),
}


def test_every_method_of_a_chat_is_tried_on_a_session():
    methods = {name for name in dir(Chat) if not name.startswith("_") and callable(getattr(Chat, name))}
    assert set(EVERYTHING) == methods


@pytest.mark.parametrize("method", list(EVERYTHING))
def test_every_method_of_a_chat_works_on_a_session(store, method):
    does, expected = EVERYTHING[method]
    assert does(session_of(store, Support)) == expected


@pytest.mark.parametrize("method", list(EVERYTHING))
def test_every_method_of_a_chat_works_on_a_session_that_was_loaded(sqlite_store, method):
    does, expected = EVERYTHING[method]
    assert does(loaded(session_of(sqlite_store, Support), Support)) == expected


def test_what_a_session_used_is_read_from_the_database_right_after_a_reload(store, ask):
    """NodeLLM's C25: totalUsage was 0 after a load."""
    script = Say(calls=[LONDON], cost="0.25", input_tokens=9, output_tokens=2), Say("Rain.", cost="0.5", input_tokens=4)
    session = session_of(store, Support, *script)
    ask(session, "Weather?")
    found = loaded(session, Support)
    used = found.total_usage
    assert isinstance(used, Stats)
    assert used == found.stats() == session.total_usage == asyncio.run(found.atotal_usage())
    assert (used.cost, used.input_tokens, used.requests) == (Decimal("0.75"), 13, 2)


def test_the_history_of_a_session_is_what_a_model_is_shown(store, ask):
    session = session_of(store, Support, LONDON, "Rain.")
    ask(session, "Weather?")
    history = loaded(session, Support).history
    assert [message["role"] for message in history] == ["user", "assistant", "tool", "assistant"]
    assert history == asyncio.run(session.ahistory())


def test_a_turn_of_a_session_leaves_the_rows_of_a_chats_turn_column_by_column(store, ask):
    """NodeLLM's C25, C26 and C15: sessions left content_raw, model, provider, thoughts and thinking out."""
    thinking = {"thinking": "AAA BBB CCC", "signature": "sig", "thinking_tokens": 3}
    call = Call("get_weather", call_id="call_1", city="London", signature="thought")
    columns = {
        "message": "position role status content content_raw thinking_text thinking_signature thinking_tokens "
        "input_tokens output_tokens cached_tokens model_id provider",
        "tool_call": "tool_call_id name arguments thought thought_signature result status error",
        "request": "round attempt provider model status_code finish_reason streamed cost",
    }
    agent = define_agent("Weather", model="test", tools=[get_weather])
    makers: list[Callable[[Any], Chat]] = [
        lambda llm: create_chat(store, model="test", tools=[get_weather], llm=llm),
        lambda llm: create_agent_session(store, agent, llm=llm),
    ]
    left = []
    for make in makers:
        chat = make(ScriptedLLM(Say("Looking.", calls=[call], **thinking), Say("Rain.", **thinking)))
        ask(chat, "Weather?")
        left.append({table: rows(store, table, *names.split()) for table, names in columns.items()})
        chat.delete()
        with store.connection():
            store.records.request.delete().execute()
    assert left[0] == left[1]
    reply = dict(zip(columns["message"].split(), left[1]["message"][1], strict=True))
    assert (reply["thinking_text"], reply["model_id"], reply["provider"]) == ("AAA BBB CCC", "test", "scripted")
    made = dict(zip(columns["tool_call"].split(), left[1]["tool_call"][0], strict=True))
    assert (json.loads(made["arguments"]), made["thought_signature"]) == ({"city": "London"}, "thought")


def test_two_rounds_may_use_one_id_for_their_tool_calls(store, ask):
    """RubyLLM's C43: tool_call_id was unique over all chats, and a provider that reused one lost the paid reply."""
    call = Call("get_weather", call_id="same", city="London")
    for _ in range(2):
        session = session_of(store, Support, call, call, "Rain.", call, "Rain again.")
        assert ask(session, "Weather?").content == "Rain."
        assert ask(session, "And now?").content == "Rain again."
        assert [made.result for made in session.tool_calls()] == ["rain in London"] * 3


def test_what_a_session_does_not_store_of_a_turn_is_said_where_it_is_made(store, ask):
    """NodeLLM's C25: sessions ignored the toggles."""
    session = session_of(store, Support, LONDON, "Rain.", persistence={"tool_calls": False, "requests": False})
    assert ask(session, "Weather?").content == "Rain."
    assert rows(store, "tool_call", "id") == rows(store, "request", "id") == []


@pytest.mark.parametrize("kept", ["rollback", "keep"])
def test_options_of_the_process_are_taken_where_a_session_is_made_and_where_it_is_loaded(store, kept):
    session = session_of(store, Plain, ProviderError(400), on_error=kept)
    with pytest.raises(ProviderError):
        session.ask("Hi")
    again = loaded(session, Plain, ProviderError(400), on_error=kept, wait=0.5, stale_after=30, history=1)
    with pytest.raises(ProviderError):
        again.ask("Hi")
    statuses = [row[0] for row in rows(store, "message", "status")]
    assert statuses == (["completed", "failed"] if kept == "keep" else ["completed"]) * 2
    assert (again.options.wait, again.options.stale_after, again.options.history) == (0.5, 30, 1)


def test_an_option_of_the_process_goes_before_what_the_class_says(store, ask):
    class Careful(Plain):
        on_error = "keep"
        llm = ScriptedLLM("From the class.")

    assert ask(create_agent_session(store, Careful), "Hi").content == "From the class."
    assert create_agent_session(store, Careful).options.on_error == "keep"
    session = session_of(store, Careful, "From the process.", on_error="rollback")
    assert ask(session, "Hi").content == "From the process."
    assert session.options.on_error == "rollback"


# Metadata


def test_metadata_is_merged_key_by_key_stored_and_holds_at_once(store, ask):
    session = session_of(store, Support, "Hello!", metadata={"name": "Ada", "plan": {"seats": 3, "trial": True}})
    with freeze_time(datetime.now(UTC) + timedelta(hours=1)):
        assert session.update_metadata({"name": "Bob", "plan": {"seats": 4}}) is session
    assert session.metadata == {"name": "Bob", "plan": {"seats": 4}}
    assert session.instructions == "You help Bob. Be concise."
    ask(session, "Hi")
    assert sent(session)[0] == ("system", "You help Bob. Be concise.")
    assert loaded(session, Support).metadata == {"name": "Bob", "plan": {"seats": 4}}
    created_at, updated_at = rows(store, "agent_session", "created_at", "updated_at")[0]
    assert updated_at - created_at > timedelta(minutes=59)


def test_metadata_is_merged_from_asyncio_too(store):
    session = session_of(store, Support)
    assert asyncio.run(session.aupdate_metadata({"name": "Bob"})) is session
    assert loaded(session, Support).metadata == {**ADA, "name": "Bob"}


def test_a_session_without_metadata_gets_some(store):
    session = session_of(store, Plain, metadata=None)
    assert session.metadata is None
    assert session.update_metadata({"name": "Ada"}).metadata == {"name": "Ada"}


def test_a_merge_keeps_what_another_process_merged_in_meanwhile(store):
    session = session_of(store, Support)
    other = loaded(session, Support)
    session.update_metadata({"a": 1})
    assert other.update_metadata({"b": 2}).metadata == {**ADA, "a": 1, "b": 2}
    assert session.metadata == {**ADA, "a": 1}
    assert session.reload().metadata == {**ADA, "a": 1, "b": 2}


def test_merges_at_the_same_moment_do_not_lose_each_other(store, database_url):
    session, together = session_of(store, Plain, metadata={}), threading.Barrier(2, timeout=20)

    def merge(who: str) -> None:
        with connect(database_url, chat_fields={}) as other:
            mine = load_agent_session(other, Plain, session.id)
            assert mine is not None
            for number in range(15):
                together.wait()
                mine.update_metadata({f"{who}{number}": number})

    with ThreadPoolExecutor() as threads:
        list(threads.map(merge, "ab"))
    assert session.reload().metadata == {f"{who}{number}": number for who in "ab" for number in range(15)}


@pytest.mark.parametrize("changes", [None, "name", [("name", "Bob")], {"name": object()}, {"name": "\0"}])
def test_metadata_that_cannot_be_merged_is_refused_before_anything_is_written(store, changes):
    session = session_of(store, Support)
    with pytest.raises(InvalidValue, match="metadata"):
        session.update_metadata(changes)
    assert session.metadata == loaded(session, Support).metadata == ADA


@pytest.mark.parametrize("metadata", ["Ada", ["Ada"], 5, {"name": object()}])
def test_metadata_that_is_no_dict_is_refused_where_a_session_is_made(store, metadata):
    with pytest.raises(InvalidValue, match="metadata"):
        session_of(store, Support, metadata=metadata)
    assert rows(store, "chat", "id") == rows(store, "agent_session", "id") == []


def test_metadata_that_an_application_changes_in_place_is_stored_by_no_one(store):
    given = {"name": "Ada"}
    session = session_of(store, Support, metadata=given)
    given["name"] = "Bob"
    assert session.instructions == "You help Ada. Be concise."


def test_a_tool_gets_the_metadata_of_the_session(store, ask):
    @tool
    def who(context: ToolContext) -> str:
        return f"{context.metadata['name']} in {context.chat_id}"

    session = session_of(store, define_agent("Who", model="test", tools=[who]), Call("who"), "Ada.")
    ask(session, "Who am I?")
    assert session.tool_calls()[0].result == f"Ada in {session.chat_id}"


# The end of a session


def test_deleting_a_session_deletes_its_chat_and_keeps_what_was_spent(store, ask):
    session = session_of(store, Support, LONDON, Say("Rain.", cost="0.5"))
    ask(session, "Weather?")
    session.delete()
    assert [rows(store, table, "id") for table in ("agent_session", "chat", "message", "tool_call")] == [[]] * 4
    assert rows(store, "request", "chat", "cost") == [(None, None), (None, Decimal("0.5"))]
    assert load_agent_session(store, Support, session.id) is None


def test_a_session_that_was_deleted_says_so(store):
    session = session_of(store, Support, "never")
    loaded(session, Support).delete()
    for act in (lambda: session.update_metadata({"a": 1}), session.reload, lambda: session.ask("Hi")):
        with pytest.raises(ChatGone, match="it was deleted"):
            act()


def test_a_session_whose_row_alone_was_deleted_says_so(store):
    session = session_of(store, Support)
    with store.connection():
        store.records.agent_session.delete().execute()
    for act in (lambda: session.update_metadata({"a": 1}), session.reload):
        with pytest.raises(ChatGone, match=f"there is no session {session.id}"):
            act()
    assert session.metadata == ADA


def test_a_tool_in_the_place_of_a_list_of_tools_is_refused_and_not_run(store):
    ran: list[int] = []

    def refund(cents: int) -> str:
        """Pay the customer back."""
        ran.append(cents)
        return "refunded"

    class Careless(Agent):
        model = "test"
        tools = refund

    with pytest.raises(
        InvalidValue, match=r"tools of <agent Careless> are a function of 'cents: int'.* tools = \[refund\]"
    ):
        create_agent_session(store, Careless)
    assert ran == []
    assert rows(store, "chat", "id") == []


def test_a_hook_of_chats_is_refused_on_an_agent():
    with pytest.raises(InvalidValue, match=r"Hooked has 'after_response', which is a hook of chats"):

        class Hooked(Agent):
            def after_response(self, reply: Any) -> None:
                pass


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize("key", [None, "", "no-such-id", UUID(int=7), str(UUID(int=7))])
def test_a_session_that_is_not_there_is_none(store, key):
    session_of(store, Support)
    assert load_agent_session(store, Support, key) is None
    assert asyncio.run(aload_agent_session(store, Support, key)) is None


def test_a_session_is_loaded_by_its_own_id_and_not_by_its_chats(store):
    session = session_of(store, Support)
    assert load_agent_session(store, Support, session.chat_id) is None
    found = load_agent_session(store, Support, str(session.id))
    assert found is not None
    assert (found.id, found.chat_id) == (session.id, session.chat_id)


def test_sessions_are_made_and_loaded_from_asyncio(store):
    async def main() -> None:
        session = await acreate_agent_session(store, Support, metadata=ADA, user_id="u_1", llm=ScriptedLLM("Hello!"))
        assert (await session.aask("Hi")).content == "Hello!"
        found = await aload_agent_session(store, Support, session.id, user_id="u_1")
        assert found is not None
        assert (await found.ahistory())[-1]["content"] == "Hello!"
        assert await aload_agent_session(store, Support, session.id, user_id="u_2") is None
        with pytest.raises(AgentMismatch):
            await aload_agent_session(store, Plain, session.id)
        assert await aload_agent_session(store, Plain, session.id, skip_class_validation=True) is not None

    asyncio.run(main())


# Both or neither


def test_a_session_that_cannot_be_written_leaves_no_chat(store, database_url):
    """NodeLLM's C25: two INSERTs without a transaction; where the second failed, a chat was left behind."""
    with connect(database_url) as other:
        rename = "ALTER TABLE {} RENAME TO {}"
        other.database.execute_sql(rename.format("llm_agent_session", "elsewhere"))
        with pytest.raises(LlmOrmError):
            session_of(store, Support)
        assert rows(store, "chat", "id") == []
        other.database.execute_sql(rename.format("elsewhere", "llm_agent_session"))
    session_of(store, Support)
    assert len(rows(store, "chat", "id")) == len(rows(store, "agent_session", "id")) == 1


def test_tenants_cannot_load_each_others_sessions(store):
    session = session_of(store, Support, user_id="u_1")
    assert rows(store, "chat", "user_id") == [("u_1",)]
    assert load_agent_session(store, Support, session.id, user_id="u_1") is not None
    assert load_agent_session(store, Support, session.id, user_id="u_2") is None
    assert load_agent_session(store, Support, session.id, user_id=None) is None
    # Another tenant learns nothing, not even for which agent it was made.
    assert load_agent_session(store, Plain, session.id, user_id="u_2") is None


@pytest.mark.parametrize("make", [create_agent_session, lambda *a, **k: load_agent_session(*a, uuid4(), **k)])
def test_a_keyword_that_nobody_knows_is_refused_before_anything_is_written(store, make):
    with pytest.raises(UnknownKeyword, match=r"does not know 'tenant_id'; .* columns of the application: user_id"):
        make(store, Support, tenant_id="t_1")
    assert rows(store, "chat", "id") == []


def test_a_value_that_a_column_cannot_hold_is_refused_and_nothing_is_written(store):
    with pytest.raises(InvalidValue, match="user_id"):
        session_of(store, Support, user_id="\0")
    assert rows(store, "chat", "id") == rows(store, "agent_session", "id") == []


# Code wins


Seen = Callable[[dict[str, Any]], Any]


def system_of(keywords: dict[str, Any]) -> Any:
    return next((message["content"] for message in keywords["messages"] if message["role"] == "system"), None)


def schema_name(keywords: dict[str, Any]) -> Any:
    return keywords.get("response_format", {}).get("json_schema", {}).get("name")


CODE: dict[str, tuple[Any, Any, Seen, Any, Any]] = {
    "model": ("old", "new", lambda sent: sent["model"], "old", "new"),
    "provider": ("azure", "bedrock", lambda sent: sent["custom_llm_provider"], "azure", "bedrock"),
    "instructions": ("Be old.", "Be new.", system_of, "Be old.", "Be new."),
    "tools": ([get_weather], [fail, LookupOrder], offered, ["get_weather"], ["fail", "lookup_order"]),
    "schema": (City, {"title": "Town", "type": "object"}, schema_name, "City", "Town"),
    "temperature": (0.1, 0.9, lambda sent: sent["temperature"], 0.1, 0.9),
    "thinking": ({"effort": "low"}, {"effort": "high"}, lambda sent: sent["reasoning_effort"], "low", "high"),
    "effort": ("low", "high", lambda sent: sent["reasoning_effort"], "low", "high"),
    "params": ({"seed": 1}, {"top_p": 0.5}, lambda sent: (sent.get("seed"), sent.get("top_p")), (1, None), (None, 0.5)),
    "headers": ({"x-v": "1"}, {"x-v": "2"}, lambda sent: sent["extra_headers"], {"x-v": "1"}, {"x-v": "2"}),
    "tool_choice": ("auto", "none", lambda sent: sent["tool_choice"], "auto", "none"),
    "max_tokens": (10, 20, lambda sent: sent["max_tokens"], 10, 20),
    "request_timeout": (10.0, 20.0, lambda sent: sent["timeout"], 10.0, 20.0),
}

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "a lambda": lambda value: lambda inputs: value,
    "a method": lambda value: lambda self, inputs: value,
    "a static method": lambda value: staticmethod(lambda inputs: value),
    "a class method": lambda value: classmethod(lambda cls, inputs: value),
    "a function with defaults": lambda value: lambda inputs, now=0, *, zone=1: (value, None)[now != 0],
    "a partial": lambda value: functools.partial(lambda who, inputs: value, "me"),
}


@pytest.mark.parametrize("option", list(CODE))
def test_what_the_class_says_today_wins_over_what_it_said_when_the_session_was_made(store, option):
    check_code_wins(store, option, lambda value: value)


@pytest.mark.parametrize("declared", list(FUNCTIONS))
@pytest.mark.parametrize("option", list(CODE))
def test_what_a_function_of_the_class_says_today_wins_too(sqlite_store, option, declared):
    check_code_wins(sqlite_store, option, FUNCTIONS[declared])


def check_code_wins(store: Store, option: str, declared: Callable[[Any], Any]) -> None:
    old, new, seen, expected_old, expected_new = CODE[option]
    tools = [get_weather] if option == "tool_choice" else []
    one, other = (type("Support", (Plain,), {"tools": tools, option: declared(value)}) for value in (old, new))
    session = session_of(store, one, '{"city": "Paris"}')
    session.ask("Hi")
    assert seen(requests(session)[-1]) == expected_old
    after = loaded(session, other, '{"city": "Paris"}')
    after.ask("Still there?")
    assert seen(requests(after)[-1]) == expected_new
    assert ("user", "Hi") in sent(after)


def test_limits_of_the_class_hold(store, ask):
    class Limited(Plain):
        tools = [get_weather]
        max_tool_calls = 1

    with pytest.raises(ToolRoundsExceeded, match="max_tool_calls=1"):
        ask(session_of(store, Limited, LONDON, LONDON), "Weather?")


def test_limits_as_functions_of_the_inputs_hold_too(store, ask):
    class Limited(Plain):
        tools = [get_weather]
        max_tool_calls = lambda inputs: inputs["limit"]  # noqa: E731

    session = session_of(store, Limited, LONDON, LONDON, "Rain.", metadata={"limit": 1})
    with pytest.raises(ToolRoundsExceeded):
        ask(session, "Weather?")
    session.update_metadata({"limit": 2}).options.llm.add(LONDON, "Rain.")
    assert ask(session, "Weather?").content == "Rain."


def test_middlewares_of_the_class_come_after_the_stores_and_before_the_sessions(database_url, ask):
    seen: list[str] = []
    with connect(database_url, middlewares=[Note("store", seen)]) as store:
        store.create_tables()

        class Watched(Plain):
            middlewares = [Note("class", seen)]

        session = session_of(store, Watched, "Hello!").use(Note("session", seen))
        ask(session, "Hi")
        assert seen == ["store", "class", "session"]


def test_retries_corrections_and_fallbacks_of_the_class_hold(store, ask):
    class Stubborn(Plain):
        schema = City
        corrections = 1
        retries = 0
        fallbacks = ["other"]

    session = session_of(store, Stubborn, ProviderError(503), "no JSON", "still none")
    with pytest.raises(InvalidReply):
        ask(session, "Where?")
    assert [call["model"] for call in requests(session)] == ["test", "other", "other"]


def test_the_reply_of_a_session_is_an_instance_of_its_schema_after_a_reload_too(store, ask):
    class Where(Plain):
        schema = City

    session = session_of(store, Where, '{"city": "Paris"}')
    assert ask(session, "Where?").parsed == City(city="Paris")
    assert loaded(session, Where).messages()[-1].parsed == City(city="Paris")


def test_the_provider_of_the_class_and_the_one_that_is_given_are_called(store, ask):
    """NodeLLM's C20: both were ignored; the row said openai, and another was called."""

    class Hosted(Plain):
        provider = "azure"

    session = session_of(store, Hosted, "Hello!")
    assert ask(session, "Hi").provider == "azure"
    given = session_of(store, Hosted, "Hello!", provider="bedrock")
    assert ask(given, "Hi").provider == "bedrock"
    assert [call["custom_llm_provider"] for call in requests(session) + requests(given)] == ["azure", "bedrock"]
    assert rows(store, "request", "provider") == [("azure",), ("bedrock",)]


@pytest.mark.parametrize("name", ["model", "provider", "instructions"])
def test_what_create_is_told_is_stored_and_honoured_on_load(store, ask, name):
    """NodeLLM's C22: overrides were written by halves, and never read."""

    class Old(Agent):
        model, provider, instructions = "old", "azure", "Be old."

    given = {"model": "mine", "provider": "mine", "instructions": "Be mine."}[name]
    session = session_of(store, Old, "Hello!", **{name: given})
    assert rows(store, "chat", name) == [(given,)]
    ask(session, "Hi")
    after = loaded(session, Old, "Hello again!")
    assert getattr(after, name) == getattr(session, name) == given
    ask(after, "Hi again")
    for keywords in (*requests(session), *requests(after)):
        assert {
            "model": keywords["model"],
            "provider": keywords.get("custom_llm_provider"),
            "instructions": system_of(keywords),
        }[name] == given


def test_a_model_that_is_given_is_not_called_at_the_provider_of_the_class(store):
    class Hosted(Plain):
        provider = "azure"

    assert session_of(store, Hosted, model="claude").provider is None
    assert session_of(store, Hosted, model="claude", provider="bedrock").provider == "bedrock"


@pytest.mark.parametrize(
    "option",
    [
        name
        for name in OF_THE_CLASS
        if name
        not in (
            "model",
            "provider",
            "instructions",
            *"llm history persistence on_error wait save_every stale_after store_files debug".split(),
        )
    ],
)
def test_every_other_option_is_the_classs_to_say(store, option):
    for make in (session_of, lambda *a, **k: load_agent_session(*a, uuid4(), **k)):
        with pytest.raises(InvalidValue, match=rf"does not take '{option}': code wins"):
            make(store, Support, **{option: None})
    assert rows(store, "chat", "id") == []


@pytest.mark.parametrize("name", ["model", "provider", "instructions"])
def test_a_load_takes_no_overrides(store, name):
    session = session_of(store, Support)
    with pytest.raises(InvalidValue, match=f"load_agent_session.. does not take '{name}': code wins"):
        load_agent_session(store, Support, session.id, **{name: "mine"})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model", 5),
        ("temperature", "hot"),
        ("tools", "get_weather"),
        ("tools", [5]),
        ("middlewares", [5]),
        ("on_error", "shrug"),
        ("params", {"model": "mine"}),
        ("rescues", "Sorry."),
        ("rescues", {5: "Sorry."}),
        ("rescues", {"Timeout": 5}),
        ("rescues", {KeyboardInterrupt: "Sorry."}),
        ("on_start", "Hello!"),
        ("on_complete", 5),
        ("agent_name", 5),
        ("agent_name", "\0"),
    ],
)
def test_what_is_wrong_with_a_class_is_said_before_anything_is_written(store, option, value):
    wrong = type("Wrong", (Plain,), {option: value})
    with pytest.raises(InvalidValue):
        session_of(store, wrong)
    assert rows(store, "chat", "id") == []
    session = session_of(store, Plain)
    with pytest.raises(InvalidValue):
        load_agent_session(store, wrong, session.id, skip_class_validation=True)


@pytest.mark.parametrize("given", [None, "Support", Support(), Chat, object])
def test_what_is_no_agent_class_is_refused(store, given):
    with pytest.raises(InvalidValue, match=r"is not an agent class: subclass llm_orm\.Agent"):
        create_agent_session(store, given)
    with pytest.raises(InvalidValue, match="is not an agent class"):
        load_agent_session(store, given, uuid4())


def test_an_agent_that_needs_arguments_is_refused(store):
    class Needy(Plain):
        def __init__(self, key: str):
            self.key = key

    with pytest.raises(InvalidValue, match="the agent Needy cannot be made"):
        session_of(store, Needy)


# Functions of the inputs


def test_a_function_of_the_inputs_gets_the_metadata_and_the_turns_own_which_win(store, ask):
    seen: list[dict[str, Any]] = []

    class Greeter(Plain):
        def instructions(self, inputs: dict[str, Any]) -> str:
            assert isinstance(self, Greeter)
            seen.append(inputs)
            return f"You help {inputs['name']}."

    session = session_of(store, Greeter, "Hello!", metadata={"name": "Ada", "page": 1})
    ask(session, "Hi", inputs={"name": "Bob", "mood": "good"})
    assert seen == [{"name": "Bob", "page": 1, "mood": "good"}]
    assert sent(session)[0] == ("system", "You help Bob.")


def test_the_inputs_of_a_turn_hold_for_this_turn_and_are_not_stored(store, ask):
    """NodeLLM's B7: they stayed applied until something else resolved them."""
    session = session_of(store, Support, "Hello!", "Hello!")
    ask(session, "Hi", inputs={"name": "Bob"})
    assert session.instructions == "You help Ada. Be concise."
    assert session.metadata == ADA == loaded(session, Support).metadata
    ask(session, "Hi again")
    assert [call["messages"][0]["content"] for call in requests(session)] == [
        "You help Bob. Be concise.",
        "You help Ada. Be concise.",
    ]


def test_a_function_of_the_inputs_is_asked_anew_on_every_turn(store, ask):
    asked: list[int] = []

    class Counting(Plain):
        @staticmethod
        def instructions(inputs: dict[str, Any]) -> str:
            asked.append(1)
            return f"Turn {len(asked)}."

        @classmethod
        def tools(cls, inputs: dict[str, Any]) -> list[Any]:
            assert cls is Counting
            return [get_weather] if len(asked) > 1 else []

    session = session_of(store, Counting, "One.", "Two.")
    assert asked == []
    ask(session, "Hi")
    ask(session, "Hi")
    one, two = requests(session)
    assert (system_of(one), offered(one)) == ("Turn 1.", [])
    assert (system_of(two), offered(two)) == ("Turn 2.", ["get_weather"])


@pytest.mark.parametrize("option", ["model", "instructions", "tools", "temperature", "schema", "headers"])
def test_a_function_that_fails_is_a_clear_error_before_anything_is_written(store, ask, option):
    broken = type("Broken", (Plain,), {option: lambda inputs: inputs["city"]})
    session = session_of(store, broken, "never")
    with pytest.raises(InvalidValue) as raised:
        ask(session, "Hi")
    assert str(raised.value) == (
        f"the {option} of <agent Broken> failed for the inputs user_id, name: KeyError: 'city'; inputs are the "
        "session's metadata and ask(…, inputs={…})"
    )
    assert isinstance(raised.value.__cause__, KeyError)
    assert rows(store, "message", "id") == rows(store, "request", "id") == []


@pytest.mark.parametrize(("option", "given"), [("instructions", 5), ("tools", "x"), ("temperature", "hot")])
def test_a_function_that_says_something_wrong_is_a_clear_error_before_anything_is_written(store, ask, option, given):
    session = session_of(store, type("Wrong", (Plain,), {option: lambda inputs: given}), "never")
    with pytest.raises(InvalidValue, match=option):
        ask(session, "Hi")
    assert rows(store, "message", "id") == []


def test_a_function_of_the_inputs_that_is_async_is_refused_where_a_session_is_made(store):
    class Slow(Plain):
        async def instructions(self, inputs: dict[str, Any]) -> str:
            return "never"

    with pytest.raises(InvalidValue, match="the instructions of <agent Slow> is async: make it a plain function"):
        session_of(store, Slow)
    assert rows(store, "chat", "id") == []


@pytest.mark.parametrize("inputs", ["Ada", ["Ada"], 5])
def test_inputs_that_are_no_dict_are_refused(store, ask, inputs):
    with pytest.raises(InvalidValue, match="inputs must be a dict"):
        ask(session_of(store, Support, "never"), "Hi", inputs=inputs)
    assert rows(store, "message", "id") == []


def test_a_chat_takes_no_inputs(store, ask):
    with pytest.raises(UnknownKeyword, match="does not know 'inputs'"):
        ask(create_chat(store, model="test", llm=ScriptedLLM("never")), "Hi", inputs={})


class ByPage(Agent):
    """What only a turn can say is needed by one of its functions."""

    model = lambda inputs: f"model of {inputs['name']}"  # noqa: E731
    instructions = lambda inputs: f"They look at page {inputs['page']}."  # noqa: E731
    tools = [get_weather]


def test_what_needs_the_inputs_of_a_turn_is_in_the_way_of_nothing_else(store, ask):
    session = session_of(store, ByPage, "Hello!")
    ask(session, "Hi", inputs={"page": 7})
    assert (session.model, session.model_id, session.provider) == ("model of Ada", "model of Ada", None)
    assert [message["content"] for message in session.history] == ["Hi", "Hello!"]
    assert session.total_usage.requests == 1
    assert [message.content for message in session.messages()] == ["Hi", "Hello!"]
    assert session.fork().messages()[-1].content == "Hello!"
    assert session.cancel() is False
    session.with_temperature(0.5).update_metadata({"a": 1}).reload()
    with pytest.raises(InvalidValue, match="the instructions of <agent ByPage> failed"):
        session.instructions


def test_inputs_come_with_every_way_into_a_turn(store):
    session = session_of(store, ByPage, ProviderError(400), "Hello!", metadata={"name": "Ada"})
    with pytest.raises(ProviderError):
        session.ask("Hi", inputs={"page": 1})
    assert session.retry(inputs={"page": 2}).content == "Hello!"
    assert system_of(requests(session)[-1]) == "They look at page 2."
    session.options.llm.add(Call("refund", order_id="789"), "Done.")
    session.with_tool(refund).ask("Refund!", inputs={"page": 3})
    session.approve(session.pending_approvals()[0])
    with pytest.raises(InvalidValue, match="'page'"):
        session.resume()
    assert session.resume(inputs={"page": 4}).content == "Done."
    assert system_of(requests(session)[-1]) == "They look at page 4."
    with pytest.raises(InvalidValue, match="'page'"):
        session.count_tokens("Hi")
    assert session.count_tokens("Hi", inputs={"page": 4}) > 0


# What is set on a session


def test_what_is_set_on_a_session_survives_its_turns(store, ask):
    """NodeLLM's C19: withTool and withInstructions were wiped by the next ask, where the class had its own."""
    session = session_of(store, Support, "One.", "Two.", "Three.")
    session.with_tool(fail).with_instructions("In French.").with_temperature(0.5)
    ask(session, "Hi")
    ask(session, "Hi", inputs={"name": "Bob"})
    session.update_metadata({"name": "Cy"})
    ask(session, "Hi")
    assert [system_of(call) for call in requests(session)] == [
        f"You help {name}. Be concise.\nIn French." for name in ("Ada", "Bob", "Cy")
    ]
    assert [offered(call) for call in requests(session)] == [["lookup_order", "get_weather", "fail"]] * 3
    assert {call["temperature"] for call in requests(session)} == {0.5}
    assert [offered(next_call(loaded(session, Support)))] == [["lookup_order", "get_weather"]]


def test_what_a_turn_is_told_goes_before_all_else_and_holds_for_that_turn(store, ask):
    session = session_of(store, Support, "One.", "Two.", model="stored").with_temperature(0.5)
    ask(session, "Hi", model="mine", temperature=0.9, instructions="Sing.", tools=[])
    ask(session, "Hi")
    seen = [(c["model"], c["temperature"], system_of(c), len(offered(c))) for c in requests(session)]
    assert seen == [("mine", 0.9, "Sing.", 0), ("stored", 0.5, "You help Ada. Be concise.", 2)]


def test_a_fork_of_a_session_is_a_session_of_the_agent(store, ask):
    session = session_of(store, Support, LONDON, "Rain.", "It stopped.", "Rain again.", user_id="u_1", model="mine")
    ask(session, "Weather?")
    other = session.fork()
    assert isinstance(other, AgentSession)
    assert {session.id, session.chat_id}.isdisjoint({other.id, other.chat_id})
    assert (other.metadata, other.agent_class, other.model) == (ADA, "Support", "mine")
    assert other.agent is not session.agent
    other.update_metadata({"name": "Bob"})
    ask(session, "Now?")
    ask(other, "Elsewhere?")
    assert [role for role, _ in sent(other)] == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert sent(other)[0] == ("system", "You help Bob. Be concise.")
    assert session.reload().metadata == ADA
    assert load_agent_session(store, Support, other.id, user_id="u_1") is not None
    assert other.total_usage.requests == 1


# Which agent


def test_a_session_of_another_agent_is_refused_by_a_message_that_names_both(store):
    session = session_of(store, Support)
    with pytest.raises(AgentMismatch) as raised:
        load_agent_session(store, Plain, session.id)
    assert str(raised.value) == (
        f'Agent class mismatch: Session "{session.id}" was created for "Support", but is being loaded with "Plain". If '
        'the class was renamed, give it agent_name = "Support"; to load it all the same, skip_class_validation=True'
    )


def test_a_session_is_handed_to_another_agent_where_this_is_asked_for(store, ask):
    session = session_of(store, Support, "Hello!")
    ask(session, "Hi")
    other = loaded(session, Plain, "I am plain.", skip_class_validation=True)
    assert (other.agent_class, type(other.agent)) == ("Support", Plain)
    ask(other, "And now?")
    assert sent(other) == [("user", "Hi"), ("assistant", "Hello!"), ("user", "And now?")]


def test_a_class_that_was_renamed_goes_by_its_old_name(store):
    session = session_of(store, Support)

    class CustomerSupport(Support):
        agent_name = "Support"

    assert loaded(session, CustomerSupport).agent_class == "Support"
    assert session_of(store, CustomerSupport).agent_class == "Support"
    assert session_of(store, type("Below", (CustomerSupport,), {})).agent_class == "Below"


def test_agents_that_are_defined_inline_are_told_apart(store, ask):
    """NodeLLM's C21: every agent of defineAgent had the class name "", so that any could load any."""
    one, other = (define_agent(name, model="test", instructions=f"Be {name}.") for name in ("one", "other"))
    session = session_of(store, one, "Hello!")
    assert rows(store, "agent_session", "agent_class") == [("one",)]
    with pytest.raises(AgentMismatch, match='created for "one", but is being loaded with "other"'):
        load_agent_session(store, other, session.id)
    assert ask(loaded(session, one, "Hello!"), "Hi").content == "Hello!"


def test_an_agent_that_is_defined_inline_has_functions_hooks_and_rescues(store, ask):
    seen: list[Any] = []
    agent = define_agent(
        "Inline",
        model="test",
        instructions=lambda inputs: f"You help {inputs['name']}.",
        rescues={ProviderError: "Sorry."},
        on_start=lambda messages: seen.append(messages[0]["content"]),
        on_complete=lambda message: seen.append(message.content),
    )
    assert ask(session_of(store, agent, ProviderError(400)), "Hi").content == "Sorry."
    assert seen == ["You help Ada.", "Sorry."]
    assert repr(agent()) == "<agent Inline>"


@pytest.mark.parametrize("name", [None, "", "  ", 5, "\0"])
def test_an_agent_that_is_defined_inline_needs_a_name(name):
    with pytest.raises(InvalidValue, match=r"agent.* name"):
        define_agent(name)


def test_what_no_agent_has_is_refused_where_one_is_defined_inline():
    with pytest.raises(UnknownKeyword, match=r"define_agent\(\) does not know 'tool'; it takes model"):
        define_agent("Inline", tool=get_weather)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("instruction", "instructions"),
        ("tool", "tools"),
        ("temprature", "temperature"),
        ("maxTokens", "max_tokens"),
        ("on_compelte", "on_complete"),
    ],
)
def test_an_attribute_that_is_nearly_one_of_an_agents_is_refused_where_the_class_is_made(misspelt, meant):
    with pytest.raises(InvalidValue, match=f"the agent Bot has '{misspelt}', .*: write '{meant}'"):
        type("Bot", (Agent,), {"model": "test", misspelt: "…"})


def test_an_agent_may_have_attributes_of_its_own():
    body = {"model": "test", "company": "ACME", "_tool": 1, "greet": lambda self: "Hi", "prompt": "…", "timeout": 3}
    assert type("Bot", (Agent,), body).company == "ACME"


# Inheritance


def test_an_agent_inherits_as_python_says(store, ask):
    class Base(Agent):
        model = "base"
        temperature = 0.1
        headers = {"x-a": "1"}
        tools = [get_weather]

        def instructions(self, inputs: dict[str, Any]) -> str:
            return f"You help {inputs['name']}."

    class Mixin:
        temperature = 0.5

    class Polite(Mixin, Base):
        headers = {"x-b": "2"}
        tools = [*Base.tools, fail]

        def instructions(self, inputs: dict[str, Any]) -> str:
            return f"{super().instructions(inputs)} Be polite."

    session = session_of(store, Polite, "Hello!")
    ask(session, "Hi")
    keywords = requests(session)[-1]
    assert (keywords["model"], keywords["temperature"], keywords["extra_headers"]) == ("base", 0.5, {"x-b": "2"})
    assert system_of(keywords) == "You help Ada. Be polite."
    assert offered(keywords) == ["get_weather", "fail"]
    assert session.agent_class == "Polite"


def test_hooks_and_rescues_are_inherited_and_a_subclass_may_call_its_bases(store, ask):
    seen: list[str] = []

    class Base(Plain):
        rescues = {ProviderError: "Base is sorry.", "ToolRoundsExceeded": "Base is tired."}

        def on_start(self, messages: Any) -> None:
            seen.append("base starts")

        def on_complete(self, message: Any) -> None:
            seen.append("base completes")

    class Below(Base):
        rescues = {"ProviderError": "Below is sorry."}
        tools = [get_weather]
        max_tool_calls = 0

        def on_start(self, messages: Any) -> None:
            super().on_start(messages)
            seen.append("below starts")

    session = session_of(store, Below, ProviderError(400), LONDON)
    assert ask(session, "Hi").content == "Below is sorry."
    assert seen == ["base starts", "below starts", "base completes"]
    assert ask(session, "Weather?").content == "Base is tired."


def test_a_subclass_may_do_without_a_hook_of_its_base(store, ask):
    class Base(Plain):
        def on_complete(self, message: Any) -> None:
            raise RuntimeError("of the base")

    class Below(Base):
        on_complete = None  # type: ignore[assignment]

    assert ask(session_of(store, Below, "Hello!"), "Hi").content == "Hello!"


# Hooks of the class


def watching(seen: list[Any], is_async: bool = False) -> type[Agent]:
    """An agent with tools, of which each hook says that it was called."""

    def hook(name: str) -> Any:
        def told(self: Agent, *arguments: Any) -> None:
            seen.append((name, *arguments))

        async def told_in_async(self: Agent, *arguments: Any) -> None:
            await asyncio.sleep(0)
            told(self, *arguments)

        return told_in_async if is_async else told

    return type("Watching", (Plain,), {"tools": [get_weather, fail], **{name: hook(name) for name in HOOKS}})


STORY = Say("Let me look.", thinking="Hm, hm.", calls=[LONDON, Call("fail")]), Say("Rain.", thinking="Aha.")


def check_story(seen: list[Any], session: AgentSession, reply: Any) -> None:
    assert [name for name, *_ in seen] == [
        "on_start",
        "on_thinking",
        "on_tool_start",
        "on_tool_end",
        "on_tool_start",
        "on_tool_error",
        "on_tool_end",
        "on_thinking",
        "on_complete",
    ]
    given = [arguments for _, *arguments in seen]
    assert [message["content"] for message in given[0][0]] == ["Weather?"]
    assert [(thinking, said.content) for thinking, said in (given[1], given[7])] == [
        ("Hm, hm.", "Let me look."),
        ("Aha.", "Rain."),
    ]
    assert (given[2][0].name, given[3][1].result) == ("get_weather", "rain in London")
    assert (given[5][0].name, str(given[5][1]), given[6][1].status) == ("fail", "no such place", "failed")
    assert given[8] == [reply]
    assert [call.status for call in session.tool_calls()] == ["completed", "failed"]
    assert len(session.requests()) == 2


def test_the_hooks_of_a_class_are_called_and_keep_nothing_from_being_written(store, ask):
    """NodeLLM's C18: onToolStart and onToolEnd were silent in a session, and a hook on its agent turned rows off."""
    seen: list[Any] = []
    session = session_of(store, watching(seen), *STORY)
    check_story(seen, session, ask(session, "Weather?"))


@pytest.mark.parametrize("way", ["aask", "aask_stream"])
def test_async_hooks_of_a_class_are_awaited(store, way):
    seen: list[Any] = []
    session = session_of(store, watching(seen, is_async=True), *STORY)
    check_story(seen, session, WAYS[way](session, "Weather?"))


@pytest.mark.parametrize("way", ["ask", "ask_stream"])
@pytest.mark.parametrize("hook", HOOKS)
def test_an_async_hook_of_a_class_is_refused_in_a_plain_ask_before_anything_is_written(store, way, hook):
    async def told(self: Agent, *arguments: Any) -> None:
        pass

    session = session_of(store, type("Slow", (Plain,), {hook: told}), "never")
    with pytest.raises(AsyncTool, match=r"told.* is async: use aask"):
        WAYS[way](session, "Hi")
    assert rows(store, "message", "id") == rows(store, "request", "id") == []


def test_the_hooks_of_a_class_and_of_its_session_add_up_in_order(store, ask):
    seen: list[Any] = []
    session = session_of(store, watching(seen), *STORY)
    session.on_tool_call_start(lambda call: seen.append(("mine: start", call)))
    session.on_tool_call_end(lambda call, outcome: seen.append(("mine: end", call)))
    session.on_tool_call_error(lambda call, error: seen.append(("mine: error", call)))
    session.on_end_message(lambda message: seen.append(("mine: complete", message)))
    session.after_response(lambda reply: seen.append(("mine: response", reply)))
    ask(session, "Weather?")
    names = [name for name, *_ in seen]
    for own, mine in {
        "on_tool_start": "mine: start",
        "on_tool_end": "mine: end",
        "on_tool_error": "mine: error",
        "on_complete": "mine: complete",
        "on_thinking": "mine: response",
    }.items():
        assert names[names.index(own) + 1] == mine
        assert names.count(own) == names.count(mine)
    assert len(session.tool_calls()) == len(session.requests()) == 2


def test_the_middlewares_of_a_turn_do_not_do_away_with_the_agents_hooks_and_rescues(store, ask):
    """NodeLLM's C18: a beforeRequest of the user's killed onStart."""
    seen: list[Any] = []

    class Robust(Plain):
        rescues = {ProviderError: "Sorry."}

        def on_start(self, messages: Any) -> None:
            seen.append("started")

    session = session_of(store, Robust, ProviderError(400)).before_request(lambda messages: None)
    assert ask(session, "Hi", middlewares=[Note("mine", seen)]).content == "Sorry."
    assert seen == ["started", "mine"]


def test_a_turn_starts_once_however_often_the_model_is_called(store, ask):
    seen: list[Any] = []

    class Starting(Plain):
        tools = [get_weather]
        fallbacks = ["other"]

        def on_start(self, messages: Any) -> None:
            seen.append(messages[-1]["content"])

    class Again(Middleware):
        def on_error(self, context: Any, error: Exception) -> Any:
            return RETRY()

    script = ProviderError(404), ProviderError(404), LONDON, "Rain.", "Sun."
    session = session_of(store, Starting, *script).use(Again())
    ask(session, "Weather?", retries=0)
    assert seen == ["Weather?"]
    ask(session, "And now?")
    assert seen == ["Weather?", "And now?"]


def test_a_turn_that_is_resumed_has_started_before(store):
    seen: list[Any] = []

    class Starting(Plain):
        def on_start(self, messages: Any) -> None:
            seen.append("started")

    approved(session_of(store, Starting)).resume()
    assert seen == ["started"]


def test_where_the_model_did_not_think_nobody_is_told(store, ask):
    seen: list[Any] = []
    session = session_of(store, watching(seen), "Hello!")
    ask(session, "Hi")
    assert [name for name, *_ in seen] == ["on_start", "on_complete"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_of_a_class_that_raises_ends_the_turn_and_loses_no_paid_call(store, ask, hook):
    def broken(self: Agent, *arguments: Any) -> None:
        raise RuntimeError(f"{hook} broke")

    agent = type("Broken", (Plain,), {"tools": [get_weather, fail], hook: broken})
    session = session_of(store, agent, *(Say(s.text, s.thinking, calls=s.calls, cost="0.5") for s in STORY))
    with pytest.raises(RuntimeError, match=f"{hook} broke"):
        ask(session, "Weather?")
    assert [request.status_code for request in session.requests()] == [200] * len(requests(session))
    assert session.total_usage.cost == Decimal("0.5") * len(requests(session))
    assert "pending" not in {row[0] for row in rows(store, "message", "status")}


def test_a_hook_on_the_error_of_a_tool_may_say_how_to_go_on(store, ask):
    class Mending(Plain):
        tools = [fail]

        def on_tool_error(self, call: Any, error: Exception) -> Any:
            return REPLACE(f"sunny, says nobody: {error}")

    session = session_of(store, Mending, Call("fail"), "Sun.")
    ask(session, "Weather?")
    assert sent(session)[-1] == ("tool", "sunny, says nobody: no such place")


# Rescues


class Limit(Exception):
    """A provider's own, as far as a script can be one."""


class RateLimit(Limit):
    pass


def test_an_exception_is_rescued_by_its_class(store, ask):
    class Calm(Plain):
        rescues = {Limit: "We are busy."}

    session = session_of(store, Calm, RateLimit("slow down"), "Hello!")
    reply = ask(session, "Hi")
    assert (reply.content, reply.status, reply.role) == ("We are busy.", "completed", "assistant")
    ask(session, "Now?")
    assert sent(session) == [("user", "Hi"), ("assistant", "We are busy."), ("user", "Now?")]


def test_an_exception_is_rescued_by_its_name_or_that_of_its_base(store, ask):
    class Calm(Plain):
        rescues = {"Limit": "We are busy."}

    assert ask(session_of(store, Calm, RateLimit("slow down")), "Hi").content == "We are busy."


@pytest.mark.parametrize("declared", [[Exception, "RateLimit", Limit], [Limit, Exception, RateLimit]])
def test_the_rescue_that_is_nearest_to_the_exception_counts_in_whatever_order(store, ask, declared):
    rescues = {key: f"for {getattr(key, '__name__', key)}" for key in declared}
    session = session_of(store, type("Calm", (Plain,), {"rescues": rescues}), RateLimit("slow down"))
    assert ask(session, "Hi").content == "for RateLimit"


def test_an_exception_that_is_near_to_no_rescue_is_raised(store, ask):
    class Calm(Plain):
        rescues = {Limit: "We are busy.", "TimeoutError": "Too slow."}

    error = ProviderError(400)
    with pytest.raises(ProviderError) as raised:
        ask(session_of(store, Calm, error), "Hi")
    assert raised.value is error


def test_a_function_that_rescues_gets_the_exception_and_may_decline(store, ask):
    class Calm(Plain):
        name = "Calm"
        retries = 0

        def apologise(self, error: Exception) -> str:
            return f"{self.name} is sorry: {error}"

        rescues = {RateLimit: apologise, Limit: lambda error: None, TimeoutError: lambda error: f"Too slow: {error}."}

    assert ask(session_of(store, Calm, TimeoutError("9 s")), "Hi").content == "Too slow: 9 s."
    assert ask(session_of(store, Calm, RateLimit("429")), "Hi").content == "Calm is sorry: 429"
    with pytest.raises(Limit):
        ask(session_of(store, Calm, Limit("no")), "Hi")


@pytest.mark.parametrize("way", ["aask", "aask_stream"])
def test_an_async_function_rescues_in_async(store, way):
    async def apologise(error: Exception) -> str:
        await asyncio.sleep(0)
        return f"Sorry: {error}"

    agent = define_agent("Calm", model="test", rescues={Limit: apologise, ValueError: "A text."})
    assert WAYS[way](session_of(store, agent, RateLimit("429")), "Hi").content == "Sorry: 429"
    assert WAYS[way](session_of(store, agent, ValueError("no")), "Hi").content == "A text."


@pytest.mark.parametrize("way", ["ask", "ask_stream"])
def test_an_async_function_that_rescues_is_refused_in_a_plain_ask_before_anything_is_written(store, way):
    async def apologise(error: Exception) -> str:
        return "never"

    session = session_of(store, define_agent("Calm", model="test", rescues={Limit: apologise}), "never")
    with pytest.raises(AsyncTool, match="apologise"):
        WAYS[way](session, "Hi")
    assert rows(store, "message", "id") == []


def test_the_failed_calls_of_a_turn_that_was_rescued_stay_on_record(store, ask):
    class Calm(Plain):
        tools = [get_weather]
        retries = 0
        rescues = {ProviderError: "Try again later."}

    session = session_of(store, Calm, Say(calls=[LONDON], cost="0.25"), ProviderError(503, "busy"))
    reply = ask(session, "Weather?")
    assert reply.content == "Try again later."
    assert rows(store, "request", "status_code", "error", "error_message", "message") == [
        (200, None, None, reply.id),
        (503, "ProviderError", "busy", reply.id),
    ]
    assert session.total_usage.cost == Decimal("0.25")
    assert [call.status for call in session.tool_calls()] == ["completed"]


def test_what_a_tool_or_a_limit_ends_a_turn_with_is_rescued_too(store, ask):
    @tool
    def lock() -> str:
        raise ToolError("the order is locked", fatal=True)

    class Calm(Plain):
        tools = [lock, get_weather]
        rescues = {"ToolError": "It is locked.", ToolRoundsExceeded: "I gave up."}

    session = session_of(store, Calm, Call("lock"), "Fine.", LONDON, LONDON)
    assert ask(session, "Cancel!").content == "It is locked."
    assert ask(session, "Hi").content == "Fine."
    shown = [message["role"] for message in requests(session)[-1]["messages"]]
    assert shown == ["user", "assistant", "tool", "assistant", "user"]
    assert ask(session, "Weather?", max_tool_calls=1).content == "I gave up."


def test_a_stream_that_is_rescued_shows_the_reply_in_the_place_of_what_was_shown(store):
    agent = define_agent("Calm", model="test", rescues={ProviderError: "Sorry."})
    session = session_of(store, agent, Say("one two", error=ProviderError(503)))
    shown = [(chunk.content, chunk.restart) for chunk in session.ask_stream("Count!")]
    assert shown == [("one ", False), ("two", False), ("", True), ("Sorry.", False)]
    assert [message.content for message in session.messages()] == ["Count!", "Sorry."]


def test_a_reply_that_could_not_be_written_is_never_rescued(store, database_url, ask):
    """Whatever would be put in its place could be written."""
    agent = define_agent("Calm", model="test", rescues={Exception: "never", "ReplyNotSaved": "never"})
    session = session_of(store, agent, Say("Hello!", cost="0.5"))
    with connect(database_url) as other:
        refuse(other, "Hello!")
        with pytest.raises(ReplyNotSaved) as raised:
            ask(session, "Hi")
    assert raised.value.reply.content == "Hello!"
    assert rows(store, "message", "content") == [("Hi",)]
    assert rows(store, "request", "status_code", "cost") == [(200, Decimal("0.5"))]


def refuse(store: Store, text: str) -> None:
    """A trigger of the database's own that lets no message say this."""
    if store.is_sqlite:
        store.database.execute_sql(
            f"CREATE TRIGGER refuse BEFORE UPDATE ON llm_message WHEN NEW.content = '{text}' "
            "BEGIN SELECT RAISE(ABORT, 'refused'); END"
        )
    else:
        store.database.execute_sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$"
        )
        store.database.execute_sql(
            f"CREATE TRIGGER refuse BEFORE UPDATE ON llm_message FOR EACH ROW WHEN (NEW.content = '{text}') "
            "EXECUTE FUNCTION refuse()"
        )


def test_what_ends_a_turn_on_purpose_or_before_it_began_is_not_rescued(store):
    agent = define_agent("Calm", model="test", rescues={Exception: "never"})
    sessions: list[AgentSession] = []

    def model(keywords: dict[str, Any]) -> str:
        with pytest.raises(ChatBusy):
            loaded(sessions[0], agent, "never").ask("Me too")
        assert sessions[0].cancel()
        return "never"

    sessions.append(session_of(store, agent, model))
    with pytest.raises(TurnCancelled):
        sessions[0].ask("Hi")
    with pytest.raises(NothingToRetry):
        session_of(store, agent).retry()


# Turns that fail, and turns at the same time


def test_after_a_turn_that_failed_the_model_is_shown_what_the_database_has(store, ask):
    """NodeLLM's C23: memory kept the messages of a failed turn, two tool calls with one result among them."""

    @tool
    def lock() -> str:
        raise ToolError("the order is locked", fatal=True)

    session = session_of(
        store, define_agent("Locking", model="test", tools=[get_weather, lock]), [LONDON, Call("lock")]
    )
    with pytest.raises(ToolError):
        ask(session, "Cancel!")
    session.options.llm.add("Hello!")
    ask(session, "Hi")
    expected = [("user", "Cancel!"), ("user", "Hi")]
    assert sent(session) == expected
    after = loaded(session, type(session.agent), "Hello again!")
    ask(after, "Again")
    assert sent(after) == [*expected, ("assistant", "Hello!"), ("user", "Again")]


def test_of_two_asks_at_once_on_one_session_each_has_its_own_rows(store):
    """NodeLLM's C24: all request and tool rows went to the later of two messages."""
    session = session_of(store, Support, metadata=ADA)
    asked = threading.Event()

    def first(keywords: dict[str, Any]) -> Call:
        asked.set()
        return LONDON

    session.options.llm.add(first, "Rain.", Call("get_weather", city="Paris"), "Sun.")
    with ThreadPoolExecutor() as threads:
        one = threads.submit(session.ask, "London?")
        assert asked.wait(20)
        other = threads.submit(session.ask, "Paris?", wait=30)
        replies = [one.result(), other.result()]
    assert [message.content for message in session.messages()] == ["London?", "Rain.", "Paris?", "Sun."]
    for reply, city in zip(replies, ("London", "Paris"), strict=True):
        assert [call.result for call in session.tool_calls() if call.message_id == reply.id] == [f"rain in {city}"]
        assert len([request for request in session.requests() if request.message_id == reply.id]) == 2


def test_two_holders_of_a_session_take_turns(store, ask):
    """NodeLLM's C24: each saw the other's empty placeholder."""
    sessions: list[AgentSession] = []

    def model(keywords: dict[str, Any]) -> str:
        with pytest.raises(ChatBusy):
            loaded(sessions[0], Support, "never").ask("Me too")
        return "First."

    sessions.append(session_of(store, Support, model))
    ask(sessions[0], "One")
    second = loaded(sessions[0], Support, "Second.")
    ask(second, "Two")
    assert [content for _, content in sent(second)][1:] == ["One", "First.", "Two"]


# For those who write agents


def test_an_agent_has_an_attribute_for_every_option_so_that_editors_know_them():
    assert set(Agent.__annotations__) == {*OF_THE_CLASS, "agent_name", "rescues"}
    assert {name for name in vars(Agent) if name.startswith("on_")} == set(HOOKS)


def test_every_method_of_a_session_says_what_it_does():
    named = {"model", "provider", "instructions"}  # as those of a chat
    for owner in (AgentSession, Agent):
        for name, member in vars(owner).items():
            member = member.fget if isinstance(member, property) else member
            if not name.startswith("_") and callable(member) and name not in named:
                assert member.__doc__, name

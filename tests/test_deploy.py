"""A deploy, end to end: a process makes a session with one version of an agent, and another goes on with the next."""

import json
from decimal import Decimal
from typing import Any

import processes
from conftest import rows
from processes import Process

from llm_orm import Store, create_agent_session, define_agent

V1 = """
import json, sys
from llm_orm import Agent, connect, create_agent_session, load_agent_session, tool
from llm_orm.testing import Call, Say, ScriptedLLM

PRICE = dict(input_cost_per_token="0.000001", output_cost_per_token="0.000004")

@tool
def lookup_order(order_id: str) -> str:
    return f"order {order_id} is shipped"

@tool(requires_approval=True)
def refund(order_id: str) -> str:
    return f"{order_id} is refunded by the first version"

class SupportAgent(Agent):
    model = "model-1"
    instructions = lambda inputs: f"You help {inputs['name']}."
    temperature = 0.1
    tools = [lookup_order, refund]
"""

V2 = """
import json, sys
from llm_orm import Agent, connect, load_agent_session, tool
from llm_orm.testing import Call, Say, ScriptedLLM

PRICE = dict(input_cost_per_token="0.000003", output_cost_per_token="0.000015")

@tool
def track_parcel(order_id: str) -> str:
    return f"the parcel of {order_id} is in Lyon"

@tool
def refund(order_id: str) -> str:
    return f"{order_id} is refunded by the second version"

class Concierge(Agent):
    agent_name = "SupportAgent"
    model = "model-2"
    instructions = lambda inputs: f"Assist {inputs['name']} in {inputs['language']}."
    thinking = {"effort": "high"}
    tools = [track_parcel, refund]
"""

READ = """
def shown(keywords):
    return {
        "model": keywords["model"],
        "temperature": keywords.get("temperature"),
        "effort": keywords.get("reasoning_effort"),
        "tools": [tool["function"]["name"] for tool in keywords["tools"]],
        "messages": [(message["role"], message["content"]) for message in keywords["messages"]],
        "calls": [call["function"]["name"] for m in keywords["messages"] for call in m.get("tool_calls") or ()],
    }

def done(session, **more):
    seen = [shown(each) for each in session.options.llm.requests]
    print(json.dumps({"id": str(session.id), "seen": seen, **more}), flush=True)
"""

CREATE = """
store = connect(sys.argv[1])
llm = ScriptedLLM(
    Say("Let me see.", calls=[Call("lookup_order", order_id="789")], input_tokens=100, output_tokens=10),
    Say("It is shipped.", input_tokens=150, output_tokens=20),
    **PRICE,
)
session = create_agent_session(store, SupportAgent, metadata={"name": "Ada", "language": "French"}, llm=llm)
reply = session.ask("Where is my order #789?")
done(session, reply=reply.content)
"""

GO_ON = """
store = connect(sys.argv[1])
llm = ScriptedLLM(
    Say(calls=[Call("track_parcel", order_id="789")], input_tokens=300, output_tokens=30),
    Say("In Lyon.", input_tokens=350, output_tokens=5),
    Say("By train.", input_tokens=400, output_tokens=7),
    **PRICE,
)
session = load_agent_session(store, Concierge, sys.argv[2], llm=llm)
reply = session.ask("And where is it now?")
text = "".join(chunk.content for chunk in session.ask_stream("How does it travel?"))
used = session.total_usage
done(
    session, reply=reply.content, text=text, model_id=session.model_id, instructions=session.instructions,
    cost=str(used.cost), requests=used.requests,
)
"""


def run(program: str, *arguments: str) -> Any:
    """What a process with the program says in the end."""
    return json.loads(processes.run(program, *arguments))


def costs_by_model(store: Store) -> dict[str, Decimal]:
    """What each model has cost, summed from the rows of its requests; nobody knows it of one that died."""
    costs: dict[str, Decimal] = {}
    for model, cost in rows(store, "request", "model", "cost"):
        costs[model] = costs.get(model, Decimal(0)) + (cost or 0)
    return costs


def test_a_session_goes_on_with_the_next_version_of_its_agent(store, database_url):
    before = run(V1 + READ + CREATE, database_url)
    assert before["reply"] == "It is shipped."
    assert [each["model"] for each in before["seen"]] == ["model-1", "model-1"]
    assert before["seen"][0]["messages"][0] == ["system", "You help Ada."]

    after = run(V2 + READ + GO_ON, database_url, before["id"])
    assert (after["reply"], after["text"]) == ("In Lyon.", "By train.")
    assert (after["model_id"], after["instructions"]) == ("model-2", "Assist Ada in French.")
    first, _, last = after["seen"]
    for seen in after["seen"]:
        # None of it is the first version's: the class says what an agent is.
        configuration = seen["model"], seen["temperature"], seen["effort"], seen["tools"]
        assert configuration == ("model-2", None, "high", ["track_parcel", "refund"])
    assert first["messages"] == [
        ["system", "Assist Ada in French."],
        ["user", "Where is my order #789?"],
        ["assistant", "Let me see."],
        ["tool", "order 789 is shipped"],
        ["assistant", "It is shipped."],
        ["user", "And where is it now?"],
    ]
    assert last["messages"][6:] == [
        ["assistant", None],
        ["tool", "the parcel of 789 is in Lyon"],
        ["assistant", "In Lyon."],
        ["user", "How does it travel?"],
    ]
    assert last["calls"] == ["lookup_order", "track_parcel"]

    costs = costs_by_model(store)
    assert costs == {
        "model-1": 250 * Decimal("0.000001") + 30 * Decimal("0.000004"),
        "model-2": 1050 * Decimal("0.000003") + 42 * Decimal("0.000015"),
    }
    assert (Decimal(after["cost"]), after["requests"]) == (sum(costs.values()), 5)
    assert [row[0] for row in rows(store, "message", "model_id")] == [None, "model-1", None, "model-2", None, "model-2"]
    assert rows(store, "agent_session", "agent_class") == [("SupportAgent",)]


PARK = """
session = create_agent_session(
    connect(sys.argv[1]), SupportAgent, metadata={"name": "Ada", "language": "French"},
    llm=ScriptedLLM(Say(calls=[Call("refund", order_id="789")], input_tokens=100, output_tokens=10), **PRICE),
)
reply = session.ask("I want my money back.")
done(session, status=reply.status)
"""

RESUME = """
llm = ScriptedLLM(Say("Done.", input_tokens=200, output_tokens=2), **PRICE)
session = load_agent_session(connect(sys.argv[1]), Concierge, sys.argv[2], llm=llm)
call, = session.pending_approvals()
session.approve(call)
reply = session.resume()
done(session, reply=reply.content, model=reply.model_id)
"""


def test_a_turn_that_waits_for_approval_is_finished_by_the_next_version(store, database_url):
    before = run(V1 + READ + PARK, database_url)
    assert before["status"] == "pending"
    after = run(V2 + READ + RESUME, database_url, before["id"])
    assert (after["reply"], after["model"]) == ("Done.", "model-2")
    assert after["seen"][0]["messages"] == [
        ["system", "Assist Ada in French."],
        ["user", "I want my money back."],
        ["assistant", None],
        ["tool", "789 is refunded by the second version"],
    ]
    assert costs_by_model(store) == {"model-1": Decimal("0.00014"), "model-2": Decimal("0.00063")}


DIE = """
import os
def die(keywords):
    print(json.dumps({"id": str(session.id)}), flush=True)
    os._exit(0)

session = create_agent_session(
    connect(sys.argv[1]), SupportAgent, metadata={"name": "Ada", "language": "French"},
    llm=ScriptedLLM(
        Say(calls=[Call("lookup_order", order_id="789")], input_tokens=100, output_tokens=10), die, **PRICE
    ),
)
session.ask("Where is my order #789?")
"""

TAKE_UP = """
llm = ScriptedLLM(Say("It is shipped.", input_tokens=200, output_tokens=2), **PRICE)
session = load_agent_session(connect(sys.argv[1]), Concierge, sys.argv[2], llm=llm, stale_after=0)
reply = session.resume()
done(session, reply=reply.content)
"""


def test_a_turn_whose_process_was_replaced_in_the_middle_is_finished_by_the_next_version(store, database_url):
    before = run(V1 + READ + DIE, database_url)
    after = run(V2 + READ + TAKE_UP, database_url, before["id"])
    assert after["reply"] == "It is shipped."
    assert after["seen"][0]["messages"] == [
        ["system", "Assist Ada in French."],
        ["user", "Where is my order #789?"],
        ["assistant", None],
        ["tool", "order 789 is shipped"],
    ]
    assert costs_by_model(store) == {"model-1": Decimal("0.00014"), "model-2": Decimal("0.00063")}
    assert [row[0] for row in rows(store, "tool_call", "status")] == ["completed"]


MERGE = """
import threading
session = load_agent_session(connect(sys.argv[1]), SupportAgent, sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    session.update_metadata({f"{sys.argv[3]}{number}": number})
"""


def test_what_two_processes_merge_into_the_metadata_is_all_there(store, database_url):
    session = create_agent_session(store, define_agent("SupportAgent", model="test"), metadata={"name": "Ada"})
    given = V1 + MERGE, database_url, str(session.id)
    with Process(*given, "a") as a, Process(*given, "b") as b:
        assert [process.stdout.readline().strip() for process in (a, b)] == ["ready", "ready"]
        for process in (a, b):
            process.stdin.write("\n")
            process.stdin.flush()
        assert [process.wait() for process in (a, b)] == [0, 0]
    expected = {f"{who}{number}": number for who in "ab" for number in range(20)}
    assert session.reload().metadata == {"name": "Ada", **expected}


LACKING = """
from llm_orm import InvalidValue

class Lacking(Concierge):
    agent_name = "SupportAgent"
    tools = [track_parcel]

llm = ScriptedLLM("never")
session = load_agent_session(connect(sys.argv[1]), Lacking, sys.argv[2], llm=llm)
session.approve(session.pending_approvals()[0])
try:
    session.resume()
except InvalidValue as error:
    print(json.dumps(str(error)))
"""


def test_a_version_without_the_tool_that_was_approved_says_so_and_leaves_the_turn_to_one_that_has_it(
    store, database_url
):
    before = run(V1 + READ + PARK, database_url)
    assert "this chat has no tool of that name" in run(V2 + LACKING, database_url, before["id"])
    assert rows(store, "tool_call", "status", "approval") == [("pending", "approved")]
    resume = RESUME.replace("call, = session.pending_approvals()\nsession.approve(call)\n", "")
    assert run(V2 + READ + resume, database_url, before["id"])["reply"] == "Done."

"""Tools: what the model is told of them, how its arguments are checked, and what it is shown of their results."""

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Optional
from uuid import UUID

import postponed_annotations
import pydantic
import pytest
from conftest import WAYS, Ask, rows
from pydantic import BaseModel, Field

from llm_orm import InvalidValue, Store, Tool, ToolContext, ToolError, connect, create_chat, load_chat, tool
from llm_orm.testing import Call, Say, ScriptedLLM


@pytest.fixture
def memory() -> Iterator[Store]:
    """For what is refused before any database is asked."""
    with connect("sqlite:///:memory:") as store:
        store.create_tables()
        yield store


def the_result(store: Store, call: Call, *tools: Any, ask: Ask = WAYS["ask"]) -> str:
    """What the model is shown of a call's result, in a turn that goes on to its end."""
    llm = ScriptedLLM(call, "Done.")
    chat = create_chat(store, model="test", llm=llm, tools=tools)
    assert ask(chat, "Go").content == "Done."
    [row] = chat.tool_calls()
    shown = llm.requests[1]["messages"][-1]
    assert shown == {"role": "tool", "tool_call_id": "call_1", "content": row.result}
    again = ScriptedLLM("Again.")
    loaded = load_chat(store, chat.id, llm=again)
    assert loaded is not None
    loaded.ask("Again")
    assert again.requests[0]["messages"][2] == shown
    return shown["content"]


def parameters(given: Any) -> dict[str, Any]:
    return tool(given).schema["function"]["parameters"]


# What the model is told


def test_a_typed_function_becomes_a_schema() -> None:
    class Place(BaseModel):
        city: str = Field(description="Its English name")
        country: str | None = None

    @tool
    def forecast(
        place: Place,
        days: Annotated[int, Field(description="How many", ge=1, le=14)],
        unit: Literal["c", "f"] = "c",
        hours: list[int] | None = None,
        note: Optional[str] = None,  # noqa: UP045
    ) -> dict:
        """Weather of the coming days.

        In one place.
        """
        return {}

    assert forecast.schema == {
        "type": "function",
        "function": {
            "name": "forecast",
            "description": "Weather of the coming days.\n\nIn one place.",
            "parameters": {
                "type": "object",
                "required": ["place", "days"],
                "properties": {
                    "place": {"$ref": "#/$defs/Place"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 14, "description": "How many"},
                    "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
                    "hours": {
                        "anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}],
                        "default": None,
                    },
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
                },
                "$defs": {
                    "Place": {
                        "type": "object",
                        "required": ["city"],
                        "properties": {
                            "city": {"type": "string", "description": "Its English name"},
                            "country": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
                        },
                    }
                },
            },
        },
    }


def test_the_schema_is_what_the_model_gets(store: Store, ask: Ask) -> None:
    def lookup(order_id: str) -> str:
        """Look it up."""
        return order_id

    llm = ScriptedLLM("Hello!")
    ask(create_chat(store, model="test", llm=llm, tools=[lookup]), "Hi")
    assert llm.requests[0]["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "lookup",
                "description": "Look it up.",
                "parameters": {
                    "type": "object",
                    "properties": {"order_id": {"type": "string"}},
                    "required": ["order_id"],
                },
            },
        }
    ]


def test_a_parameter_that_is_called_title_stays_in_the_schema() -> None:
    def publish(title: str, properties: str) -> None: ...

    assert set(parameters(publish)["properties"]) == {"title", "properties"}


def test_a_parameter_may_have_the_name_of_a_method_of_pydantic(store: Store) -> None:
    def query(schema: str, json: bool, copy: int = 1, model_id: str = "m") -> str:
        return f"{schema} {json} {copy} {model_id}"

    assert list(parameters(query)["properties"]) == ["schema", "json", "copy", "model_id"]
    llm = ScriptedLLM(Call("query", schema="public", json=True), "Done.")
    chat = create_chat(store, model="test", llm=llm, tools=[query])
    chat.ask("Go")
    assert chat.tool_calls()[0].result == "public True 1 m"


def test_a_default_that_is_no_json_is_used_and_not_told(store: Store) -> None:
    nothing = object()

    def find(text: str, among: Any = nothing) -> bool:
        return among is nothing

    assert parameters(find)["properties"]["among"] == {}
    chat = create_chat(store, model="test", llm=ScriptedLLM(Call("find", text="x"), "Done."), tools=[find])
    chat.ask("Go")
    assert chat.tool_calls()[0].result == "true"


def test_a_function_without_parameters_is_a_tool() -> None:
    def ping() -> str:
        return "pong"

    assert tool(ping).schema["function"] == {
        "name": "ping",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    }


def test_a_decorator_may_name_and_describe_the_tool() -> None:
    @tool(name="get_weather", description="Weather, now.", idempotent=True)
    def weather(city: str) -> str:
        """Not this."""
        return f"rain in {city}"

    function = weather.schema["function"]
    assert (function["name"], function["description"], weather.idempotent) == ("get_weather", "Weather, now.", True)
    assert weather("London") == weather(city="London") == "rain in London"
    assert repr(weather) == "<tool get_weather>"


class LookupOrder(Tool):
    """Look up an order's status."""

    class Parameters(BaseModel):
        order_id: str = Field(description="As in the e-mail")
        full: bool = False

    def execute(self, order_id: str, full: bool) -> dict[str, Any]:
        return {"order": order_id, "full": full}


class Counter(Tool):
    name = "count"
    description = "Count on."

    def __init__(self, start: int):
        self.value = start

    def execute(self, by: int = 1, context: ToolContext | None = None) -> int:
        self.value += by
        return self.value


def test_a_class_becomes_a_schema() -> None:
    assert LookupOrder().schema["function"] == {
        "name": "lookup_order",
        "description": "Look up an order's status.",
        "parameters": {
            "type": "object",
            "properties": {
                "order_id": {"type": "string", "description": "As in the e-mail"},
                "full": {"type": "boolean", "default": False},
            },
            "required": ["order_id"],
        },
    }


def test_a_class_without_parameters_takes_those_of_execute() -> None:
    assert Counter(0).schema["function"] == {
        "name": "count",
        "description": "Count on.",
        "parameters": {"type": "object", "properties": {"by": {"type": "integer", "default": 1}}},
    }


def test_a_class_that_says_nothing_of_itself_has_no_description() -> None:
    class Quiet(Tool):
        def execute(self) -> str:
            return ""

    assert Quiet().schema["function"]["description"] == ""


def test_a_tool_may_be_given_as_a_class_or_as_an_instance_with_state(store: Store, ask: Ask) -> None:
    counter, lookup = Counter(40), Call("lookup_order", order_id="o_1")
    assert the_result(store, lookup, LookupOrder, ask=ask) == '{"order":"o_1","full":false}'
    assert the_result(store, Call("count", by=2), counter, ask=ask) == "42"
    assert counter.value == 42


def test_a_bound_method_is_a_tool(store: Store) -> None:
    class Shop:
        stock = 7

        def in_stock(self, *, item: str, at_least: int = 1) -> bool:
            """Whether there is enough."""
            return self.stock >= at_least

    shop = Shop()
    chat = create_chat(store, model="test", tools=[shop.in_stock])
    chat.ask("Go", llm=ScriptedLLM(Call("in_stock", item="book", at_least=8), "No."))
    chat.ask("Go", llm=ScriptedLLM(Call("in_stock", item="book"), "Yes."))
    assert [call.result for call in chat.tool_calls()] == ["false", "true"]


def test_tools_may_come_from_a_generator_and_stay_for_every_turn(store: Store) -> None:
    def echo(text: str) -> str:
        return text

    llm = ScriptedLLM("One.", "Two.")
    chat = create_chat(store, model="test", llm=llm, tools=(made for made in [echo]))
    chat.ask("Hi")
    chat.ask("Hi", temperature=0.5)
    assert [len(request["tools"]) for request in llm.requests] == [1, 1]


# Annotations


def test_postponed_annotations_are_read(store: Store) -> None:
    travel = Call("travel", place={"city": "York"}, by="train")
    assert the_result(store, travel, postponed_annotations.travel) == "York, GB by train in call_1"
    schema = postponed_annotations.travel.schema["function"]["parameters"]
    assert list(schema["properties"]) == ["place", "by"]
    assert schema["properties"]["by"] == {"type": "string", "enum": ["train", "ship"], "description": "How"}


def test_the_context_comes_even_where_another_annotation_cannot_be_read(store: Store) -> None:
    assert the_result(store, Call("pay", amount=3), postponed_annotations.Pay) == "3 in call_1"


def test_an_annotation_that_names_nothing_is_refused() -> None:
    with pytest.raises(InvalidValue, match="annotations of the tool 'unknown' cannot be read: name 'Decimal' is not"):
        tool(postponed_annotations.unknown)


# What is no tool


def with_stars(*names: str) -> None: ...
def with_keywords(**names: str) -> None: ...
def by_position(name: str, /) -> None: ...
def with_underscore(_name: str) -> None: ...
def with_self(self, name: str) -> None: ...  # type: ignore[no-untyped-def]


class Unfinished(Tool):
    pass


class Needy(Tool):
    def __init__(self, database: Any): ...
    def execute(self) -> None: ...


class Untyped(Tool):
    Parameters = {"type": "object"}  # type: ignore[assignment]

    def execute(self) -> None: ...


def undescribable(thing: json.JSONEncoder) -> None: ...


def lookup_nothing() -> None: ...


def test_a_tool_s_options_are_keywords() -> None:
    with pytest.raises(InvalidValue, match="@tool goes on a function, not on 'forecast'"):
        tool("forecast")  # type: ignore[call-overload]


@pytest.mark.parametrize("misspelt", ["requires_approvl", "requiresApproval", "parameters", "idempotant"])
def test_an_attribute_that_is_nearly_one_of_a_tool_s_is_refused_where_the_class_is_made(misspelt: str) -> None:
    with pytest.raises(InvalidValue, match=f"the tool Pay has '{misspelt}', which means nothing to llm_orm: write "):
        type("Pay", (Tool,), {misspelt: True, "execute": lambda self: None})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "5 is not a tool: give a function, or a subclass of llm_orm.Tool"),
        ("lookup", "'lookup' is not a tool"),
        (len, "<built-in function len> is not a tool"),
        ({"type": "function"}, "is not a tool"),
        (BaseModel, "is not a tool"),
        ([with_self], "give a function, or a subclass of llm_orm.Tool, one by one"),
        (tool(requires_approval="no")(lookup_nothing), "requires_approval of the tool 'lookup_nothing' must be True, "),
        (lambda city: city, "'<lambda>' cannot be the name of a tool: give one of letters, digits, _ and -"),
        (Unfinished, "the tool 'unfinished' has no execute()"),
        (Needy, "the tool 'needy' cannot be made: "),
        (Untyped, "the Parameters of the tool 'untyped' must be a pydantic model, not {'type': 'object'}"),
        (with_stars, "the tool 'with_stars' takes *names: str: give its parameters names that a model can use"),
        (with_keywords, "the tool 'with_keywords' takes **names"),
        (by_position, "the tool 'by_position' takes name: str"),
        (with_underscore, "the tool 'with_underscore' takes _name: str"),
        (with_self, "the tool 'with_self' is a method: leave it plain, and give the bound one in tools=[…]"),
        (undescribable, "the tool 'undescribable' has a parameter that cannot be described as JSON: Unable to"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_by_name(memory: Store, given: Any, message: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        create_chat(memory, model="test", tools=[given])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert rows(memory, "chat", "id") == []


@pytest.mark.parametrize("tools", [LookupOrder, "lookup", 5, {"lookup": LookupOrder}, by_position])
def test_tools_must_be_a_list(memory: Store, tools: Any) -> None:
    with pytest.raises(InvalidValue, match="tools must be a list of functions and tools"):
        create_chat(memory, model="test", tools=tools)


def test_two_tools_of_one_name_are_refused(memory: Store) -> None:
    with pytest.raises(InvalidValue, match="two tools are named 'lookup_order'"):
        create_chat(memory, model="test", tools=[LookupOrder, LookupOrder()])


# Arguments


def take(count: int, names: list[str], *, when: date = date(2026, 1, 1)) -> str:
    return f"{count!r} {names!r} {when!r}"


def test_arguments_are_checked_and_converted(store: Store) -> None:
    call = Call("take", count="3", names=["a"], when="2026-02-03")
    assert the_result(store, call, take) == "3 ['a'] datetime.date(2026, 2, 3)"


def test_what_the_model_leaves_out_has_its_default(store: Store) -> None:
    assert the_result(store, Call("take", count=1, names=[]), take) == "1 [] datetime.date(2026, 1, 1)"


def test_what_the_model_invents_is_left_out(store: Store) -> None:
    call = Call("take", count=1, names=[], colour="red", context={"chat_id": "x"})
    assert the_result(store, call, take) == "1 [] datetime.date(2026, 1, 1)"


def test_a_nested_model_reaches_the_function_as_one(store: Store) -> None:
    class Place(BaseModel):
        city: str

    def visit(place: Place) -> str:
        return f"{type(place).__name__} {place.city}"

    chat = create_chat(
        store, model="test", llm=ScriptedLLM(Call("visit", place={"city": "York"}), "Done."), tools=[visit]
    )
    chat.ask("Go")
    assert chat.tool_calls()[0].result == "Place York"


@pytest.mark.parametrize("raw", ["", "{}", " {} "])
def test_no_arguments_may_be_written_in_many_ways(store: Store, raw: str) -> None:
    def ping() -> str:
        return "pong"

    chat = create_chat(store, model="test", llm=ScriptedLLM(Call("ping", raw=raw), "Done."), tools=[ping])
    chat.ask("Go")
    assert [(call.arguments, call.result) for call in chat.tool_calls()] == [(raw, "pong")]


# What goes wrong is told to the model, and the turn goes on


def broken(count: int) -> str:
    raise KeyError(f"no row {count}")


def refusing(count: int) -> str:
    raise ToolError("the order is locked")


@pytest.mark.parametrize(
    ("call", "result", "error"),
    [
        (
            Call("broken", count="many"),
            "Invalid tool arguments: count: Input should be a valid integer, unable to parse string as an integer",
            None,
        ),
        (Call("broken"), "Invalid tool arguments: count: Field required", None),
        (Call("broken", raw='{"count": '), "Invalid tool arguments: arguments: Invalid JSON: EOF while parsing", None),
        (Call("broken", raw="[1]"), "Invalid tool arguments: arguments: Input should be an object", None),
        (
            Call("brocken", count=1),
            "Model tried to call unavailable tool 'brocken'. Available tools: [broken, refusing].",
            None,
        ),
        (Call("broken", count=1), "Error executing tool 'broken': 'no row 1'", "KeyError: 'no row 1'"),
        (
            Call("refusing", count=1),
            "Error executing tool 'refusing': the order is locked",
            "ToolError: the order is locked",
        ),
    ],
)
def test_what_goes_wrong_with_a_tool_is_told_to_the_model(
    store: Store, call: Call, result: str, error: str | None
) -> None:
    assert the_result(store, call, broken, refusing).startswith(result)
    [(status, told, noted, duration, finished)] = rows(
        store, "tool_call", "status", "result", "error", "duration_ms", "finished_at"
    )
    assert status == "failed"
    assert noted == (error or told)
    assert duration >= 0
    assert finished is not None


def test_a_tool_call_without_any_tools_is_told_so(store: Store) -> None:
    result = the_result(store, Call("lookup"))
    assert result == "Model tried to call unavailable tool 'lookup'. Available tools: []."


def test_every_problem_of_the_arguments_is_told(store: Store) -> None:
    chat = create_chat(
        store, model="test", llm=ScriptedLLM(Call("take", count="x", names=[1], when="soon"), "Done."), tools=[take]
    )
    chat.ask("Go")
    result = chat.tool_calls()[0].result
    assert result is not None
    assert [f"{name}: " in result for name in ("count", "names.0", "when")] == [True] * 3
    assert "pydantic.dev" not in result


def test_a_fatal_error_of_a_tool_ends_the_turn(store: Store, ask: Ask) -> None:
    def charge(amount: int) -> str:
        raise ToolError("the card is stolen", fatal=True)

    llm = ScriptedLLM(Say("Charging.", calls=[Call("charge", amount=5)]), "Never said.")
    chat = create_chat(store, model="test", llm=llm, tools=[charge])
    with pytest.raises(ToolError, match="the card is stolen") as caught:
        ask(chat, "Go")
    assert caught.value.fatal
    assert len(llm.requests) == 1
    assert rows(store, "message", "role", "content") == [("user", "Go")]
    assert rows(store, "tool_call", "status", "error") == [("failed", "ToolError: the card is stolen")]
    assert len(chat.requests()) == 1


# Context


def test_the_context_reaches_every_tool_that_asks_for_it(store: Store, ask: Ask) -> None:
    seen: list[ToolContext | None] = []

    def direct(context: ToolContext, text: str) -> str:
        seen.append(context)
        return text

    def optional(text: str, where: ToolContext | None = None) -> str:
        seen.append(where)
        return text

    def annotated(text: str, *, where: Annotated[ToolContext, "here"]) -> str:
        seen.append(where)
        return text

    class OfAClass(Tool):
        class Parameters(BaseModel):
            text: str

        def execute(self, context: ToolContext, text: str) -> str:
            seen.append(context)
            return text

    names = ["direct", "optional", "annotated", "of_a_class"]
    llm = ScriptedLLM([Call(name, text="x") for name in names], "Done.")
    chat = create_chat(
        store, model="test", llm=llm, tools=[direct, optional, annotated, OfAClass], metadata={"customer": "c_1"}
    )
    ask(chat, "Go")
    assert [call.result for call in chat.tool_calls()] == ["x"] * 4
    assert seen == [ToolContext(chat.id, f"call_{number}", {"customer": "c_1"}) for number in (1, 2, 3, 4)]
    for told in llm.requests[0]["tools"]:
        assert list(told["function"]["parameters"]["properties"]) == ["text"]


# Results


class Colour(Enum):
    RED = "red"


class Order(BaseModel):
    id: int
    price: Decimal


@dataclasses.dataclass
class Point:
    x: int
    y: int


class Odd:
    def __str__(self) -> str:
        return "an odd thing"


RESULTS: list[tuple[Any, str]] = [
    ("plain text", "plain text"),
    ("", ""),
    ('{"already": "json"}', '{"already": "json"}'),
    (None, "null"),
    (True, "true"),
    (1.5, "1.5"),
    ({"a": [1, "ü", None]}, '{"a":[1,"ü",null]}'),
    ([], "[]"),
    ((1, 2), "[1,2]"),
    (Order(id=1, price=Decimal("9.90")), '{"id":1,"price":"9.90"}'),
    ([Order(id=1, price=Decimal(1))], '[{"id":1,"price":"1"}]'),
    (Point(1, 2), '{"x":1,"y":2}'),
    (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), '"2026-01-02T03:04:05Z"'),
    (date(2026, 1, 2), '"2026-01-02"'),
    (UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
    (Decimal("1.10"), '"1.10"'),
    (Colour.RED, '"red"'),
    (b"bytes of text", '"bytes of text"'),
    (b"\xff\x00", '"_wA="'),
    ({"image": b"\xff\x00"}, '{"image": "_wA="}'),
    (Odd(), '"an odd thing"'),
    ({"thing": Odd()}, '{"thing":"an odd thing"}'),
    (SimpleNamespace(a=1), '"namespace(a=1)"'),
    ("NUL \x00 and ü", '"NUL \\u0000 and ü"'),
    ({"nul": "\x00"}, '{"nul":"\\u0000"}'),
    ("half \ud83d a character", '"half \\ud83d a character"'),
    ({"half": "\ud83d"}, '{"half": "\\ud83d"}'),
]


def test_a_result_is_shown_as_text_and_loses_nothing(store: Store) -> None:
    def give(number: int) -> Any:
        return RESULTS[number][0]

    llm = ScriptedLLM([Call("give", number=number) for number in range(len(RESULTS))], "Done.")
    chat = create_chat(store, model="test", llm=llm, tools=[give])
    chat.ask("Go")
    shown = [message["content"] for message in llm.requests[1]["messages"] if message["role"] == "tool"]
    assert shown == [text for _, text in RESULTS]
    assert rows(store, "tool_call", "result", "status", "error") == [(text, "completed", None) for text in shown]
    for (returned, _), text in zip(RESULTS, shown, strict=True):
        if isinstance(returned, str) and returned != text:
            assert json.loads(text) == returned


@pytest.mark.each_form_on_both_databases
@pytest.mark.parametrize("persistence", [{}, {"tool_calls": False, "requests": False}])
def test_no_text_of_a_tool_can_lose_the_turn(store: Store, ask: Ask, persistence: dict[str, bool]) -> None:
    def fail() -> str:
        raise ValueError("NUL \x00, half \ud83d")

    def give() -> str:
        return "NUL \x00"

    llm = ScriptedLLM([Call("fail"), Call("give")], "Done.")
    chat = create_chat(store, model="test", llm=llm, tools=[fail, give], persistence=persistence)
    assert ask(chat, "Go").content == "Done."
    results = [message["content"] for message in llm.requests[1]["messages"] if message["role"] == "tool"]
    assert [json.loads(result) for result in results] == [
        "Error executing tool 'fail': NUL \x00, half \ud83d",
        "NUL \x00",
    ]


@pytest.mark.parametrize("make", ["a circle", "no text"])
def test_a_result_that_cannot_be_written_is_told_as_such(store: Store, make: str) -> None:
    class Mute:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    def give() -> Any:
        circle: list[Any] = []
        circle.append(circle)
        return circle if make == "a circle" else Mute()

    result = the_result(store, Call("give"), give)
    assert result.startswith("The tool 'give' ran, but its result cannot be written as JSON: ")
    assert rows(store, "tool_call", "status") == [("failed",)]


def test_a_huge_result_is_kept_whole(store: Store) -> None:
    def read() -> str:
        return "ü" * 1_000_000

    assert the_result(store, Call("read"), read) == "ü" * 1_000_000


def test_a_plain_function_that_returns_an_awaitable_says_so(store: Store) -> None:
    async def work() -> str:
        return "never"

    def start() -> Any:
        return work()

    result = the_result(store, Call("start"), start)
    assert result.startswith("Error executing tool 'start': it returned an awaitable: make it an async function")


# async


async def later(text: str, context: ToolContext) -> str:
    """Say it later."""
    await asyncio.sleep(0)
    if text == "fail":
        raise ValueError("not today")
    return f"{text} in {context.tool_call_id}"


class Later(Tool):
    class Parameters(BaseModel):
        text: str

    async def execute(self, text: str) -> dict[str, str]:
        await asyncio.sleep(0)
        return {"text": text}


def test_async_tools_run_in_aask(store: Store) -> None:
    llm = ScriptedLLM(
        [Call("later", text="x"), Call("later", text="fail"), Call("later"), Call("other", text="y")], "Done."
    )
    other = Later()
    other.name = "other"
    chat = create_chat(store, model="test", llm=llm, tools=[later, other])
    assert asyncio.run(chat.aask("Go")).content == "Done."
    assert [(call.status, call.result) for call in chat.tool_calls()] == [
        ("completed", "x in call_1"),
        ("failed", "Error executing tool 'later': not today"),
        ("failed", "Invalid tool arguments: text: Field required"),
        ("completed", '{"text":"y"}'),
    ]


def test_a_validation_error_of_the_tools_own_is_no_fault_of_the_arguments(store: Store) -> None:
    def parse(text: str) -> int:
        return pydantic.TypeAdapter(int).validate_json(text)

    chat = create_chat(store, model="test", llm=ScriptedLLM(Call("parse", text="x"), "Done."), tools=[parse])
    chat.ask("Go")
    assert (chat.tool_calls()[0].result or "").startswith("Error executing tool 'parse': 1 validation error for int")

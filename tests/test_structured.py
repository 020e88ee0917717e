"""Schemas of replies: what the model is told, which replies are taken, and what is said of the others."""

import copy
import dataclasses
import enum
import warnings
from decimal import Decimal
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field, RootModel, ValidationError, create_model, field_validator, model_validator
from typing_extensions import TypedDict

from llm_orm import InvalidValue, Tool
from llm_orm.structured import Schema, SchemaMismatch


class Item(BaseModel):
    """One line of an order."""

    name: str
    price: Decimal = Field(description="In euros", ge=0)
    tags: list[str] = []


class Node(BaseModel):
    name: str
    children: list["Node"] = []
    parent: "Node | None" = None


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"]


class Color(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Options(TypedDict, total=False):
    size: int


class Chain(TypedDict, total=False):
    following: "Chain"


CITY = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "people": {"type": "integer", "default": 0}},
    "required": ["name"],
}


def wrapping(schema: dict[str, Any], **definitions: Any) -> dict[str, Any]:
    value = {"value": schema}
    top = {"type": "object", "properties": value, "required": ["value"], "additionalProperties": False}
    return top | definitions


def complaint(schema: Any, text: str) -> str:
    with pytest.raises(SchemaMismatch) as caught:
        Schema.of(schema).parse(text)
    return str(caught.value)


# What the model is told


def test_a_model_is_told_in_the_strict_subset() -> None:
    class Order(BaseModel):
        title: str
        items: list[Cat]
        note: str | None = None

    schema = Schema.of(Order)
    assert (schema.name, schema.strict) == ("Order", True)
    cat = {
        "type": "object",
        "properties": {"kind": {"type": "string", "const": "cat"}, "lives": {"type": "integer"}},
        "required": ["kind", "lives"],
        "additionalProperties": False,
    }
    assert schema.json_schema == {
        "type": "object",
        "properties": {
            "title": {"type": "string"},
            "items": {"type": "array", "items": {"$ref": "#/$defs/Cat"}},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["title", "items", "note"],
        "additionalProperties": False,
        "$defs": {"Cat": cat},
    }


def test_a_response_format_is_a_copy_of_its_own() -> None:
    schema = Schema.of(Cat)
    expected = copy.deepcopy(schema.json_schema)
    schema.response_format["json_schema"]["schema"]["properties"].clear()
    assert schema.response_format == {
        "type": "json_schema",
        "json_schema": {"name": "Cat", "schema": expected, "strict": True},
    }


def test_descriptions_are_told_and_stand_beside_a_reference() -> None:
    class Pair(BaseModel):
        first: Item = Field(description="The better one")

    told = Schema.of(Pair).json_schema
    assert told["properties"]["first"] == {"description": "The better one", "anyOf": [{"$ref": "#/$defs/Item"}]}
    assert told["$defs"]["Item"]["description"] == "One line of an order."
    assert told["$defs"]["Item"]["properties"]["price"]["description"] == "In euros"


def test_a_recursive_model_is_an_object_at_the_top() -> None:
    schema = Schema.of(Node)
    assert schema.strict
    assert schema.json_schema["type"] == "object"
    assert schema.json_schema["properties"]["children"] == {"type": "array", "items": {"$ref": "#/$defs/Node"}}
    assert "$ref" not in schema.json_schema
    tree = '{"name": "a", "children": [{"name": "b", "children": [], "parent": null}], "parent": null}'
    jsonschema.validate(Schema.of({"type": "object"}).parse(tree), schema.json_schema)
    assert schema.parse(tree) == Node(name="a", children=[Node(name="b")])


@pytest.mark.parametrize(
    ("given", "told", "text", "value"),
    [
        (int, {"type": "integer"}, "3", 3),
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}, '"b"', "b"),
        (list[str], {"type": "array", "items": {"type": "string"}}, '["a"]', ["a"]),
        (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
        ({"type": "array", "items": {"type": "number"}}, {"type": "array", "items": {"type": "number"}}, "[1]", [1]),
        ({"type": ["string", "null"]}, {"type": ["string", "null"]}, "null", None),
    ],
)
def test_what_is_no_object_is_asked_for_within_one(given: Any, told: Any, text: str, value: Any) -> None:
    schema = Schema.of(given)
    assert schema.json_schema == wrapping(told)
    assert schema.parse(f'{{"value": {text}}}') == value
    with pytest.raises(SchemaMismatch, match="value"):
        schema.parse("{}")
    with pytest.raises(SchemaMismatch, match=r"value|object"):
        schema.parse(text)


def test_types_are_read_as_themselves() -> None:
    class Numbers(RootModel[list[int]]):
        pass

    assert Schema.of(list[Item]).parse('{"value": [{"name": "a", "price": "1.10"}]}') == [
        Item(name="a", price=Decimal("1.10"))
    ]
    assert Schema.of(Numbers).parse('{"value": [1]}') == Numbers([1])
    assert Schema.of(Point).parse('{"x": 1}') == Point(1)
    assert Schema.of(Options).parse('{"size": 2}') == {"size": 2}
    assert Schema.of(Color).parse('{"value": "red"}') is Color.RED
    assert Schema.of(dict[str, int]).parse('{"a": 1}') == {"a": 1}


def test_tagged_unions_are_told_in_the_strict_subset() -> None:
    schema = Schema.of(Annotated[Cat | Dog, Field(discriminator="kind")])
    assert schema.strict
    assert schema.json_schema["properties"]["value"] == {"anyOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]}
    assert schema.parse('{"value": {"kind": "dog"}}') == Dog(kind="dog")


@pytest.mark.parametrize(
    "hint",
    [
        dict[str, int],
        dict,
        Any,
        tuple[int, str],
        set[int],
        Annotated[str, Field(min_length=1)],
        Annotated[str, Field(json_schema_extra={"pattern": "^(?!a)"})],
        Annotated[str, Field(json_schema_extra={"format": "uri"})],
        Annotated[str, Field(json_schema_extra={"not": {"const": "x"}})],
        Annotated[list, Field(max_length=3)],
        Annotated[Cat | Dog, Field(json_schema_extra={"oneOf": []})],
    ],
)
def test_what_has_no_strict_form_is_told_as_it_is(hint: Any) -> None:
    model: Any = create_model("Told", field=(hint, ...), other=(int, 3))
    schema = Schema.of(model)
    assert not schema.strict
    assert not schema.response_format["json_schema"]["strict"]
    assert schema.json_schema["required"] == ["field"]
    assert schema.json_schema["properties"]["other"] == {"type": "integer", "default": 3}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {}},
        {**CITY, "additionalProperties": True},
        {**CITY, "additionalProperties": {"type": "string"}},
        {**CITY, "patternProperties": {"^x": {"type": "string"}}},
        {**CITY, "required": ["name", "mayor"]},
        {**CITY, "anyOf": [{**CITY, "additionalProperties": False}]},
        {**CITY, "allOf": [{"required": ["people"]}]},
        {"type": "object", "properties": {"a": {"enum": [1, 2]}}},
        {"type": "object", "properties": {"a": {"type": "array"}}},
        {"type": "object", "properties": {"a": True}},
        {"type": "object", "properties": {"a": {"type": "string", "properties": {}}}},
        {"type": "object", "properties": {"a": {"oneOf": [{"type": "string"}, {"type": "null"}]}}},
        {
            "type": "object",
            "properties": {"a": {"oneOf": [{"type": "null"}], "anyOf": [{"type": "null"}], "discriminator": {}}},
        },
        {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#/properties/b"}, {"type": "null"}]}, "b": CITY}},
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/b", "anyOf": [{"type": "string"}]}},
            "$defs": {"b": {"type": "string"}},
        },
        {**CITY, "schema": {"type": "string"}},
    ],
)
def test_a_json_schema_without_a_strict_form_is_told_to_the_letter(schema: dict[str, Any]) -> None:
    made = Schema.of(schema)
    assert (made.json_schema, made.strict) == (schema, False)


def test_a_type_that_would_have_to_contain_itself_for_ever_is_not_strict() -> None:
    assert not Schema.of(Chain).strict
    assert not Schema.of({"type": "object", "properties": {"next": {"$ref": "#"}}}).strict
    either = {"anyOf": [{"$ref": "#"}, {"type": "null"}]}
    assert Schema.of({"type": "object", "properties": {"next": either}}).strict
    assert not Schema.of({"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}]}}}).strict


def test_a_json_schema_is_told_strictly_and_checked_as_it_was_given() -> None:
    given = {**copy.deepcopy(CITY), "title": "A city", "examples": [{"name": "Bonn"}]}
    schema = Schema.of(given)
    given["properties"].clear()
    assert schema.strict
    assert schema.json_schema == {
        "type": "object",
        "properties": {"name": {"type": "string"}, "people": {"type": "integer"}},
        "required": ["name", "people"],
        "additionalProperties": False,
    }
    assert schema.parse('{"name": "Bonn", "river": "Rhine"}') == {"name": "Bonn", "river": "Rhine"}
    assert complaint(schema, '{"people": "many"}') == (
        "people: 'many' is not of type 'integer'; the reply: 'name' is a required property"
    )


def test_properties_named_like_keywords_are_properties() -> None:
    fields = {name: {"type": "string"} for name in ("title", "default", "$ref", "examples", "properties", "items")}
    schema = Schema.of({"type": "object", "properties": fields})
    assert (schema.json_schema["properties"], schema.strict) == (fields, True)

    class Book(BaseModel):
        title: str
        default: int = 1

    assert Schema.of(Book).json_schema["properties"] == {"title": {"type": "string"}, "default": {"type": "integer"}}


@pytest.mark.parametrize(
    "given",
    [
        {"name": "city", "schema": CITY, "strict": True, "description": "Where"},
        {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "description": "Where"}},
        {"type": "json_schema", "name": "city", "schema": CITY, "description": "Where"},
    ],
)
def test_a_json_schema_may_come_with_its_name(given: dict[str, Any]) -> None:
    body = Schema.of(given).response_format["json_schema"]
    assert (body["name"], body["strict"], body["description"]) == ("city", True, "Where")
    assert body["schema"]["required"] == ["name", "people"]


def test_strict_is_what_the_given_one_says() -> None:
    loose = Schema.of({"name": "city", "schema": CITY, "strict": False})
    assert (loose.strict, loose.json_schema) == (False, CITY)
    insisted = {**CITY, "minProperties": 1}
    strict = Schema.of({"name": "city", "schema": insisted, "strict": True})
    assert (strict.strict, strict.json_schema) == (True, insisted)


def test_a_schema_is_its_own_schema_and_has_a_name_that_providers_take() -> None:
    schema = Schema.of(Cat)
    assert Schema.of(schema) is schema
    assert {schema: "hashable"}[schema]
    generic: Any = create_model("Page[Item, 2]", a=(int, ...))
    assert Schema.of(generic).name == "Page_Item_2"
    assert Schema.of({**CITY, "title": "A city, and its people" + "!" * 80}).name == "A_city_and_its_people"
    assert len(Schema.of({**CITY, "title": "x" * 80}).name) == 64
    assert Schema.of(CITY).name == Schema.of(list[int]).name == Schema.of({**CITY, "title": "日本"}).name == "reply"


def test_what_is_wrapped_keeps_what_it_refers_to() -> None:
    tree = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "array",
        "items": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#"}]},
        "$defs": {"leaf": {"type": "integer"}},
    }
    schema = Schema.of(tree)
    items = {"anyOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#/properties/value"}]}
    told = wrapping({"type": "array", "items": items}, **{"$defs": {"leaf": {"type": "integer"}}})
    assert schema.json_schema == told
    jsonschema.Draft202012Validator(told).validate({"value": [1, [2, [3]]]})
    assert schema.parse('{"value": [1, [2, [3]]]}') == [1, [2, [3]]]
    assert complaint(tree, '{"value": [1, ["x"]]}').startswith("value.1")


def test_a_json_schema_whose_top_is_a_reference_is_told_as_an_object() -> None:
    city = {"$ref": "#/definitions/city", "definitions": {"city": CITY}}
    told = Schema.of(city).json_schema
    assert told["type"] == "object"
    assert told["required"] == ["name", "people"]
    assert "$ref" not in told
    untyped = Schema.of({"properties": CITY["properties"], "minProperties": 1}).json_schema
    assert untyped == {"type": "object", "properties": CITY["properties"], "minProperties": 1}
    both = {"$ref": "#/$defs/a", "minProperties": 1, "$defs": {"a": CITY}}
    assert Schema.of(both).json_schema["required"] == ["value"]


def test_an_older_draft_is_checked_by_its_own_rules() -> None:
    draft_4 = {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "exclusiveMinimum": True}},
    }
    assert Schema.of(draft_4).parse('{"a": 1}') == {"a": 1}
    assert "a: 0 is less than or equal to" in complaint(draft_4, '{"a": 0}')
    with pytest.raises(InvalidValue, match=r"exclusiveMinimum: True is not of type 'number'"):
        Schema.of({**draft_4, "$schema": "https://json-schema.org/draft/2020-12/schema"})


def test_what_pydantic_warns_of_is_kept_from_the_caller() -> None:
    class Odd(BaseModel):
        when: Any = Field(default=object())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Schema.of(Odd).json_schema["properties"] == {"when": {}}


# What is no schema


@pytest.mark.parametrize(
    "given", [None, "int", 5, True, [Cat], (Cat,), Cat(kind="cat"), print, lambda x: x, b"{}", Tool, ValidationError]
)
def test_what_is_no_schema_is_refused_by_name(given: Any) -> None:
    with pytest.raises(InvalidValue) as caught:
        Schema.of(given)
    assert str(caught.value).startswith(f"{given!r} is no schema: give a pydantic model, a type that pydantic can")
    assert "arbitrary_types_allowed" not in str(caught.value)


def test_a_model_that_is_not_whole_yet_is_refused() -> None:
    class Unfinished(BaseModel):
        part: "Nowhere"  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(InvalidValue, match=r"Unfinished'> is no schema: .*not fully defined"):
        Schema.of(Unfinished)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "says nothing: {} has neither"),
        ({"city": "string"}, r"says nothing: {'city': 'string'} has neither"),
        ({"type": "city"}, "invalid at type: 'city' is not"),
        ({"type": "json_object"}, "invalid at type: 'json_object' is not"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "invalid at type: 'json_schema' is not"),
        ({"type": "object", "properties": {"a": {"type": "text"}}}, "invalid at properties.a.type: 'text'"),
        ({"type": "object", "properties": {"a": str}}, "cannot be written as JSON: Object of type type"),
        ({"type": "number", "maximum": float("inf")}, "cannot be written as JSON: Out of range"),
        ({"type": "string", "pattern": "["}, r"invalid at pattern: '\[' is not a 'regex'"),
        ({"type": "array", "items": {"$ref": "#/$defs/x"}}, r"refers to '#/\$defs/x', which is not in it"),
        ({"type": "array", "items": {"$dynamicRef": "#x"}}, "refers to '#x', which is not in it"),
        ({"$ref": "https://example.com/x.json"}, "refers to 'https://example.com/x.json', which is not in it"),
        ({"type": "object", "$schema": "https://example.com/x"}, "not known: .* 'https://example.com/x'"),
        ({"name": "a city", "schema": CITY}, "'a city' cannot be the name of a schema: give letters"),
        ({"name": "x" * 65, "schema": CITY}, "cannot be the name of a schema: give letters"),
        ({"name": 5, "schema": CITY}, "5 cannot be the name of a schema: give letters"),
    ],
)
def test_an_invalid_json_schema_is_refused_with_the_place(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidValue, match=problem):
        Schema.of(given)


def test_a_json_schema_without_end_is_refused() -> None:
    endless: dict[str, Any] = {"type": "object"}
    endless["properties"] = {"a": endless}
    with pytest.raises(InvalidValue, match="cannot be written as JSON: Circular"):
        Schema.of(endless)
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(100_000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InvalidValue, match="cannot be written as JSON: maximum recursion"):
        Schema.of(deep)


def test_a_reference_within_an_example_is_no_reference() -> None:
    schema = Schema.of({"type": "object", "properties": {"a": {"type": "string", "default": {"$ref": "#/nowhere"}}}})
    assert schema.parse('{"a": "b"}') == {"a": "b"}


# Reading a reply


@pytest.mark.parametrize("schema", [Cat, {"type": "object", "properties": {"kind": {"const": "cat"}}}])
@pytest.mark.parametrize(
    "wrapped",
    ["{}", " \n{}\n ", "```json\n{}\n```", "```\n{}\n```", "\n```JSON\r\n{}\r\n```\n", "```json{}```"],
)
def test_space_and_a_fence_around_the_json_are_let_through(schema: Any, wrapped: str) -> None:
    read = Schema.of(schema).parse(wrapped.replace("{}", '{"kind": "cat", "lives": 7}'))
    assert (read if isinstance(read, dict) else read.model_dump()) == {"kind": "cat", "lives": 7}


def test_a_fence_within_the_json_is_text() -> None:
    assert Schema.of(CITY).parse('```json\n{"name": "```a```"}\n```') == {"name": "```a```"}


@pytest.mark.parametrize("schema", [Cat, CITY])
@pytest.mark.parametrize(
    "text",
    [
        *("", "  ", "```", "``````", "Meow.", '{"kind": "cat"', "{'kind': 'cat'}", '{"lives": NaN}', "[" * 5000),
        *('Here it is: {"kind": "cat"}', '{"kind": "cat"} I hope it helps.', '```json\n{"kind": "cat"}', '"\\ud800"'),
    ],
)
def test_a_reply_that_is_no_json_is_said_to_be_none(schema: Any, text: str) -> None:
    assert complaint(schema, text).startswith("the reply is not valid JSON: ")


def test_each_problem_is_said_with_its_place() -> None:
    assert complaint(Item, '{"price": -1, "tags": [1, "x", 2]}') == (
        "name: Field required; price: Input should be greater than or equal to 0; "
        "tags.0: Input should be a valid string; tags.2: Input should be a valid string"
    )
    assert complaint(Item, "[]") == "the reply: Input should be an object"
    assert complaint(CITY, "[]") == "the reply: [] is not of type 'object'"
    assert complaint(list[Item], '{"value": [{"name": 1, "price": 1}]}') == (
        "value.0.name: Input should be a valid string"
    )
    optional = {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}
    assert complaint(optional, '{"a": 5}') == "a: 5 is not of type 'string', or 5 is not of type 'null'"
    nested = {"type": "object", "properties": {"a": {"anyOf": [CITY, {"type": "null"}]}}}
    assert complaint(nested, '{"a": {"name": 1}}') == "a.name: 1 is not of type 'string'"


def test_a_complaint_has_an_end() -> None:
    many = complaint(list[int], f'{{"value": [{", ".join(["null"] * 1000)}]}}')
    assert many.count(";") == 19
    long = complaint({"type": "object", "properties": {"a": {"type": "integer"}}}, f'{{"a": "{"x" * 10_000}"}}')
    assert len(long) < 400


def test_what_a_validator_says_reaches_the_model() -> None:
    class Range(BaseModel):
        low: int
        high: int

        @field_validator("low")
        @classmethod
        def small(cls, low: int) -> int:
            return {1: 1, 2: 2}[low]

        @model_validator(mode="after")
        def ordered(self) -> "Range":
            if self.low > self.high:
                raise ValueError("low is above high")
            return self

    assert complaint(Range, '{"low": 2, "high": 1}') == "the reply: Value error, low is above high"
    assert complaint(Range, '{"low": 3, "high": 1}') == "the reply was refused: KeyError: 3"


def test_a_reply_nested_past_measure_is_refused_and_not_an_error() -> None:
    deep = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}}}
    schema = Schema.of(deep)
    assert schema.parse('{"a":' * 50 + "{}" + "}" * 50)

    def from_far_down(frames: int) -> None:
        if frames:
            return from_far_down(frames - 1)
        schema.parse('{"a":' * 150 + "{}" + "}" * 150)
        return None

    with pytest.raises(SchemaMismatch, match="RecursionError"):
        from_far_down(700)

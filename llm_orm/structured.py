"""What a reply must be: a type or a JSON schema → what the model is told; and the reading of what it answers."""

import copy
import inspect
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pydantic
import pydantic_core

from .errors import InvalidValue

Read = Callable[[str], Any]
"""Reads a reply's JSON; raises `SchemaMismatch`."""


class SchemaMismatch(ValueError):
    """The reply is not what the schema asks for; its text says where and why, for a model to act on"""


@dataclass(frozen=True, slots=True, eq=False)
class Schema:
    """What a reply must be; made by `Schema.of`.

    name           what the provider is told it is called
    json_schema    what the model is told; always an object at the top: what is none is asked for as {"value": …}
    strict         whether json_schema is in the subset that OpenAI holds the model to
    description    what it is for, where that was said
    """

    name: str
    json_schema: dict[str, Any]
    strict: bool
    read: Read = field(repr=False)
    description: str | None = None

    @classmethod
    def of(cls, given: Any) -> "Schema":
        """The schema of a pydantic model, of any type that pydantic can describe, or of a JSON schema.

        A JSON schema may come alone, as {"name": …, "schema": …, "strict": …}, or as a whole response_format.
        Raises `InvalidValue` for anything else.
        """
        if isinstance(given, Schema):
            return given
        return _of_json_schema(given) if isinstance(given, dict) else _of_type(given)

    @property
    def response_format(self) -> dict[str, Any]:
        """{"type": "json_schema", "json_schema": {"name", "schema", "strict"}}, to be changed as one likes."""
        about = {"description": self.description} if self.description else {}
        body = {"name": self.name, **about, "schema": copy.deepcopy(self.json_schema), "strict": self.strict}
        return {"type": "json_schema", "json_schema": body}

    def parse(self, text: str) -> Any:
        """The reply as the type that was given, or as plain JSON values; raises `SchemaMismatch`."""
        text = _unfenced(text)
        try:
            pydantic_core.from_json(text, allow_inf_nan=False)
        except ValueError as error:
            raise SchemaMismatch(f"the reply is not valid JSON: {error}") from error
        try:
            return self.read(text)
        except SchemaMismatch:
            raise
        except Exception as error:  # a validator may raise anything, and this reply was paid for
            raise SchemaMismatch(f"the reply was refused: {type(error).__name__}: {error}") from error


def _unfenced(text: str) -> str:
    """The text less the Markdown fence that models like to put around JSON."""
    text = text.strip()
    if not (text.startswith("```") and text.endswith("```")):
        return text
    text = text[3:-3]
    return (text[4:] if text[:4].lower() == "json" else text).strip()


MOST_PROBLEMS = 20
LONGEST_PROBLEM = 300


def _complaint(problems: Iterable[tuple[Iterable[Any], str]]) -> str:
    """Each problem with its place: "items.0.price: Input should be a valid number; name: Field required"."""
    shown = [
        f"{'.'.join(map(str, path)) or 'the reply'}: {_cut(message)}"
        for path, message in itertools.islice(problems, MOST_PROBLEMS)
    ]
    return "; ".join(shown)


def _cut(message: str) -> str:
    return message if len(message) <= LONGEST_PROBLEM else f"{message[:LONGEST_PROBLEM]}…"


# Of a type


def _of_type(given: Any) -> Schema:
    if given is None or isinstance(given, str) or inspect.isroutine(given):  # pydantic would describe these
        raise InvalidValue(_no_schema(given))
    name = _as_name(given.__name__) if isinstance(given, type) else "reply"
    wrapped = False
    try:
        adapter, described = _described(given)
        if described.get("type") != "object":
            wrapped = True
            adapter, described = _described(pydantic.create_model(name, value=(given, ...)))
    except (pydantic.errors.PydanticUserError, NameError, TypeError) as error:
        problem = str(error).partition(". Set `arbitrary")[0].partition("\n")[0]
        raise InvalidValue(f"{_no_schema(given)} ({problem})") from error

    def read(text: str) -> Any:
        try:
            value = adapter.validate_json(text)
        except pydantic.ValidationError as error:
            raise SchemaMismatch(_complaint((e["loc"], e["msg"]) for e in error.errors(include_url=False))) from error
        return value.value if wrapped else value

    strict = _strict_form(described)
    return Schema(name, strict or described, strict is not None, read)


def _no_schema(given: Any) -> str:
    return (
        f"{given!r} is no schema: give a pydantic model, a type that pydantic can describe (a dataclass, a TypedDict, "
        "list[Item], …), or a JSON schema as a dict"
    )


def _described(given: Any) -> tuple[pydantic.TypeAdapter[Any], dict[str, Any]]:
    with warnings.catch_warnings():
        # Of a default that is not JSON, or a field that hides a method: both are harmless.
        warnings.simplefilter("ignore", UserWarning)
        adapter = pydantic.TypeAdapter(given)
        return adapter, _with_its_root(_untitled(adapter.json_schema()))


def _untitled(schema: Any) -> Any:
    """The schema less the titles that pydantic adds, which tell a model nothing and cost tokens."""
    changed = _rebuilt(schema, _untitled)
    return {key: value for key, value in changed.items() if key != "title"} if isinstance(changed, dict) else changed


# Of a JSON schema


def _of_json_schema(given: dict[str, Any]) -> Schema:
    about = _about(given)
    schema, name = _checked(about["schema"]), about.get("name")
    if name is None:
        name = _as_name(schema.get("title", ""))
    elif not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise InvalidValue(f"{name!r} cannot be the name of a schema: give letters, digits, _ and -, at most 64")
    told = _with_its_root(schema)
    if "type" not in told and "properties" in told:
        told = {"type": "object", **told}
    wrapped = told.get("type") != "object"
    if wrapped:
        told = _wrapped(schema)
    strict = None if about.get("strict") is False else _strict_form(told)
    is_strict = strict is not None or about.get("strict") is True
    return Schema(name, strict or told, is_strict, _reader(schema, wrapped), about.get("description"))


def _about(given: dict[str, Any]) -> dict[str, Any]:
    """{"schema": …} of what was given, with "name", "strict" and "description" where it says them."""
    about = given
    if given.get("type") == "json_schema":  # a response_format
        inner = given.get("json_schema")
        about = inner if isinstance(inner, dict) else {key: value for key, value in given.items() if key != "type"}
    known = about.keys() <= {"name", "schema", "strict", "description"}
    return about if known and isinstance(about.get("schema"), dict) else {"schema": given}


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """A copy of a JSON schema; raises `InvalidValue` where it is none."""
    # It takes a while to import, and most schemas are types.
    import jsonschema

    try:
        schema = json.loads(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValue(f"the schema cannot be written as JSON: {error}; a JSON schema is plain JSON") from error
    validator = _validator_class(schema)
    try:
        validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        where = ".".join(map(str, error.absolute_path)) or "its top"
        raise InvalidValue(f"the JSON schema is invalid at {where}: {_cut(error.message)}") from error
    if not schema.keys() & validator.VALIDATORS.keys():
        raise InvalidValue(f'the JSON schema says nothing: {_cut(repr(given))} has neither "type" nor "properties"')
    _check_references(schema)
    return schema


def _validator_class(schema: dict[str, Any]) -> Any:
    import jsonschema.validators

    found = jsonschema.validators.validator_for(schema, default=None)  # pyright: ignore[reportArgumentType]
    if found is None and "$schema" in schema:
        raise InvalidValue(f"the JSON schema is of a kind that is not known: $schema is {schema['$schema']!r}")
    return found or jsonschema.Draft202012Validator


def _check_references(schema: dict[str, Any]) -> None:
    """Whatever is referred to must be here: jsonschema would ask the network for the rest, once it reads a reply."""
    import referencing.exceptions
    import referencing.jsonschema
    from jsonschema_specifications import REGISTRY

    root = referencing.Resource.from_contents(schema, default_specification=referencing.jsonschema.DRAFT202012)
    resolver = REGISTRY.resolver_with_root(root)

    def check(part: Any) -> Any:
        references = [part.get("$ref"), part.get("$dynamicRef")] if isinstance(part, dict) else []
        for reference in references:
            try:
                if isinstance(reference, str):
                    resolver.lookup(reference)
            except (referencing.exceptions.Unresolvable, ValueError) as error:
                raise InvalidValue(f"the JSON schema refers to {reference!r}, which is not in it") from error
        return _rebuilt(part, check)

    check(schema)


def _reader(schema: dict[str, Any], wrapped: bool) -> Read:
    import jsonschema.exceptions

    validator = _validator_class(schema)(schema)

    def problems(value: Any) -> Iterable[tuple[Iterable[Any], str]]:
        for error in validator.iter_errors(value):
            # Of an anyOf: the branch that came closest, or else what each of them says.
            nearest = jsonschema.exceptions.best_match([error]) or error
            message = ", or ".join(each.message for each in nearest.context or ()) or nearest.message
            yield (["value"] if wrapped else []) + list(nearest.absolute_path), message

    def read(text: str) -> Any:
        value = pydantic_core.from_json(text)
        if wrapped:
            if not (isinstance(value, dict) and "value" in value):
                raise SchemaMismatch('the reply must be an object {"value": …}')
            value = value["value"]
        complaint = _complaint(problems(value))
        if complaint:
            raise SchemaMismatch(complaint)
        return value

    return read


_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _as_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_")[:64] or "reply"


# The shape of a JSON schema


_BY_NAME = {"properties", "$defs", "definitions", "patternProperties", "dependentSchemas"}
_IN_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems", "items"}
_ALONE = {
    *("items", "additionalItems", "contains", "unevaluatedItems"),
    *("additionalProperties", "propertyNames", "unevaluatedProperties"),
    *("not", "if", "then", "else", "contentSchema"),
}
_DEFINITIONS = ("$defs", "definitions")
_TO_DEFINITIONS = tuple(f"#/{place}/" for place in _DEFINITIONS)


def _rebuilt(schema: Any, change: Callable[[Any], Any]) -> Any:
    """The schema with each schema directly inside of it changed; what only looks like one (a default) is not."""
    if not isinstance(schema, dict):
        return schema

    def rebuilt(key: str, value: Any) -> Any:
        if key in _BY_NAME and isinstance(value, dict):
            return {name: change(item) for name, item in value.items()}
        if key in _IN_LISTS and isinstance(value, list):
            return [change(item) for item in value]
        return change(value) if key in _ALONE else value

    return {key: rebuilt(key, value) for key, value in schema.items()}


def _target(root: dict[str, Any], reference: str) -> Any:
    """The definition that is referred to; None for what is elsewhere."""
    for place in _DEFINITIONS:
        if reference.startswith(f"#/{place}/"):
            return root.get(place, {}).get(reference.removeprefix(f"#/{place}/"))
    return None


def _with_its_root(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with what stands at its top written out there: a recursive type is described by a reference."""
    rest = {key: value for key, value in schema.items() if key != "$ref"}
    target = _target(rest, schema.get("$ref", ""))
    if target is None or not rest.keys() <= {*_DEFINITIONS, "$schema", "title", "description"}:
        return schema
    return {**target, **rest}


def _wrapped(schema: dict[str, Any]) -> dict[str, Any]:
    """{"value": …} of the schema, its definitions at the top."""

    def moved(part: Any) -> Any:
        changed = _rebuilt(part, moved)
        reference = changed.get("$ref") if isinstance(changed, dict) else None
        if isinstance(reference, str) and re.match("#(/|$)", reference) and not reference.startswith(_TO_DEFINITIONS):
            changed["$ref"] = f"#/properties/value{reference[1:]}"
        return changed

    inner = moved(schema)
    definitions = {place: inner.pop(place) for place in _DEFINITIONS if place in inner}
    for key in ("$schema", "$id"):
        inner.pop(key, None)
    top = {"type": "object", "properties": {"value": inner}, "required": ["value"], "additionalProperties": False}
    return top | definitions


# The strict subset of OpenAI's


_TAKEN = {
    *("type", "enum", "const", "anyOf", "$ref", "$defs", "definitions", "description"),
    *("properties", "required", "additionalProperties", "items", "minItems", "maxItems"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "pattern", "format"),
}
_NEEDLESS = {
    *("$schema", "$id", "$comment", "title", "default", "examples"),
    *("deprecated", "readOnly", "writeOnly", "discriminator"),
}
"""What says nothing about which replies are valid, and is refused."""
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}
_LOOKS_AROUND = re.compile(r"\(\?<?[=!]")


class _NotStrict(Exception):
    pass


def _strict_form(schema: dict[str, Any]) -> dict[str, Any] | None:
    """What accepts the same replies or fewer, in the strict subset; None where there is no such schema."""
    try:
        strict = _strict(schema)
    except _NotStrict:
        return None
    return strict if "anyOf" not in strict and _can_end(strict, strict, frozenset()) else None


def _strict(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise _NotStrict
    kept = {key: value for key, value in schema.items() if key not in _NEEDLESS}
    if "discriminator" in schema and "oneOf" in kept and "anyOf" not in kept:
        kept["anyOf"] = kept.pop("oneOf")  # its tag makes sure that it is one
    types = kept.get("type", [])
    types = types if isinstance(types, list) else [types]
    if not _is_taken(kept, types):
        raise _NotStrict
    closed = {"required": _all_properties(kept), "additionalProperties": False} if "object" in types else {}
    kept.pop("additionalProperties", None)
    kept = _rebuilt(kept, _strict) | closed
    if "$ref" in kept and len(kept) > 1:
        if "anyOf" in kept:
            raise _NotStrict
        kept["anyOf"] = [{"$ref": kept.pop("$ref")}]  # a reference must stand alone, an anyOf need not
    return kept


def _is_taken(schema: dict[str, Any], types: list[str]) -> bool:
    reference = schema.get("$ref", "#")
    return (
        schema.keys() <= _TAKEN
        and bool(schema.keys() & {"type", "anyOf", "$ref"})
        and ("object" in types or not schema.keys() & {"properties", "required", "additionalProperties"})
        and ("array" not in types or isinstance(schema.get("items"), dict))
        and schema.get("format", "date") in _FORMATS
        and not _LOOKS_AROUND.search(schema.get("pattern", ""))
        and (reference == "#" or reference.startswith(_TO_DEFINITIONS))
    )


def _all_properties(schema: dict[str, Any]) -> list[str]:
    properties = schema.get("properties") or {}
    is_open = schema.get("additionalProperties", False) is not False
    if not properties or is_open or not set(schema.get("required", ())) <= properties.keys():
        raise _NotStrict
    return list(properties)


def _can_end(schema: dict[str, Any], root: dict[str, Any], entered: frozenset[str]) -> bool:
    """Whether a reply to it is finite: a type that must contain itself, now that all is required, is not."""
    if "$ref" in schema:
        reference = schema["$ref"]
        target = _target(root, reference)
        return reference not in entered and target is not None and _can_end(target, root, entered | {reference})
    if "anyOf" in schema and not any(_can_end(branch, root, entered) for branch in schema["anyOf"]):
        return False
    is_object = schema.get("type") == "object"
    return not is_object or all(_can_end(each, root, entered) for each in schema["properties"].values())

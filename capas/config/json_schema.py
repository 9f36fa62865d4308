"""Convert the schema to JSON Schema, for completion in editors, and search its tree of keys."""

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from capas.config.schema import GROUPS, Group


def leaves_schema(
    key: str, groups: Mapping[str, type[Group]] = GROUPS
) -> tuple[str, str, list[str]] | None:
    """Return where a dotted key leaves the schema: the path so far, the next name, and the existing names.

    None if the schema has the key, or takes any name there.
    """
    parts = key.split(".")
    children: list[tuple[str | None, Any]] = [*groups.items(), ("seed", int)]
    for number, part in enumerate(parts):
        matches = [kind for name, kind in children if name in (part, None)]
        if not matches:
            return ".".join(parts[:number]), part, [name for name, _ in children if name]
        children = [child for kind in matches for child in _children(kind)]
    return None


def _children(annotation: Any) -> Iterator[tuple[str | None, Any]]:
    """Yield name and type of every key below a value; the name None stands for any name."""
    arguments = get_args(annotation)
    match get_origin(annotation):
        case kind if kind is Annotated:
            yield from _children(arguments[0])
        case kind if kind in (Union, UnionType):
            for member in arguments:
                yield from _children(member)
        case kind if kind is list:
            yield None, arguments[0]
        case kind if kind is dict:
            literal = get_origin(arguments[0]) is Literal
            for name in get_args(arguments[0]) if literal else (None,):
                yield name, arguments[1]
        case _ if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from ((n, field.annotation) for n, field in annotation.model_fields.items())


def group_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema of a file in conf/<name>/, for completion in editors.

    It requires no key: a file may leave keys to the `_base` of its group.
    """
    schema = GROUPS[name].model_json_schema()
    schema.pop("required", None)
    schema["properties"]["defaults"] = {"type": "array", "description": "Hydra defaults list"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

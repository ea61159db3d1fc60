"""Reading a document by its model, and in one sentence what is wrong with it, by the innermost key (pure).

msgspec names a place but no key of a table, and its errors are texts. So what a model refuses is read once more, part by
part: the innermost part that its own model refuses is the one that is wrong, and its sentence is made here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from msgspec import Meta, Struct, ValidationError, convert

from changeover.errors import SpecError
from changeover.spec.document import NOT_CARRIED

TAG = Annotated[str, Meta(description='"postgres" or "delta"')]
"""The model of the key by which a section is chosen."""


def read(path: str, model: Any, given: Any, where: str = "") -> Any:
    """Return what a model makes of a value. Raises SpecError, which names the innermost part that its own model refuses."""
    try:
        return convert(given, model)
    except ValidationError as error:
        for key, part_model, part in _parts(model, given):
            read(path, part_model, part, (where + key).removeprefix("."))
        message, _, below = str(error).partition(" - at `$")
        field = message.split("`")[1] if message.startswith("Object") else below.removeprefix(".").removesuffix("`")
        where = f"{where}.{field}".strip(".")
        raise SpecError(
            path, where, NOT_CARRIED.get(where) or _problem(model, given[field] if below else given, message, field)
        ) from error


def _problem(model: Any, given: Any, message: str, field: str) -> str:
    """Return in a sentence what a model has against a value.

    `message` is what msgspec says, of the value or of its key `field`.
    """
    if message.startswith("Object missing"):
        description = _meta(_fields(model).get(field, TAG), "description")
        return f"is missing: {description[0].lower()}{description[1:].partition('.')[0]}" if description else "is missing"
    if message.startswith("Object contains unknown"):
        near = difflib.get_close_matches(field, _fields(model), n=1)
        return "unknown key: " + (f"did you mean {near[0]}?" if near else f"known here: {', '.join(_fields(model))}")
    if message.startswith("Expected `object"):
        return "must be a section"
    if message.startswith("Expected `str") and ", got" in message:
        return f"must be a string, not {type(given).__name__}"
    if given == "" and "length" in message:
        return "is empty"
    extra = _meta(model, "extra")
    return str(extra["problem"]).format(given) if extra else message


def _parts(model: Any, given: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the parts of a value that its model knows, each with its key and its own model."""
    model = model.__origin__ if get_origin(model) is Annotated else model
    origin, models = get_origin(model), get_args(model)
    if origin in (list, tuple) and isinstance(given, list):
        yield from ((f"[{index}]", models[0], part) for index, part in enumerate(given))
    elif origin is dict and isinstance(given, dict):
        for key, part in given.items():
            yield from ((f".{key}", models[0], key), (f".{key}", models[1], part))
    elif origin in (Union, UnionType):
        kind = given.get("kind") if isinstance(given, dict) else None
        yield from (
            ("", one, given) for one in models if getattr(getattr(one, "__struct_config__", None), "tag", None) in (None, kind)
        )
    elif isinstance(given, dict):
        yield from ((f".{key}", part, given[key]) for key, part in _fields(model).items() if key in given)


def _fields(model: Any) -> dict[str, Any]:
    """Return the keys of a section, each with its model; none of what is no section."""
    if not (isinstance(model, type) and issubclass(model, Struct)):
        return {}
    tag = model.__struct_config__.tag_field
    return {**({tag: TAG} if tag else {}), **get_type_hints(model, include_extras=True)}


def _meta(model: Any, name: str) -> Any:
    """Return what a model's outermost annotation says under a name, or nothing."""
    return next((value for meta in reversed(getattr(model, "__metadata__", ())) if (value := getattr(meta, name))), None)

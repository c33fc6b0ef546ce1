"""Settings are checked where they are made: one typed reading for every config dataclass.

What is surely meant is taken ("4" and 4.0 for a whole number, "false" for no, "5e-4", which YAML reads as a text, for a
number); all else is refused in words. The types are those of the fields: `Literal` for choices, `X | None` for what may
be left out.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ildlab.errors import IldlabError

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    dict: "a mapping",
    NoneType: "None",
}


def read_fields(config: Any, error: type[IldlabError]) -> None:
    """Read every field of a dataclass instance as its type; for its `__post_init__`.

    Raises
    ------
    error
        A value is of another type, or no choice of its `Literal`; the message names field, value and what it takes.
    """
    for name, reader in _readers(type(config)).items():
        value = getattr(config, name)
        if not isinstance(value, (str, bytes)) and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
            value = value.item()  # a number of numpy's
        hint = get_type_hints(type(config))[name]
        try:
            if isinstance(value, bool) and not _takes_bool(hint):
                raise ValueError("True is no number")
            object.__setattr__(config, name, reader.validate_python(value))
        except ValueError as problem:  # pydantic's ValidationError is one
            raise error(f"{name}={value!r}: it must be {in_words(hint)}.") from problem


def known_fields(cls: type, values: dict[str, Any], error: type[IldlabError]) -> dict[str, Any]:
    """Return `values`, where each is a field of the dataclass.

    Raises
    ------
    error
        Some are not; the message lists those that there are.
    """
    names = [f.name for f in fields(cls) if f.init]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise error(f"{cls.__name__} has no {', '.join(map(repr, unknown))}. It has: {', '.join(names)}.")
    return values


def _takes_bool(hint: Any) -> bool:
    return hint in (bool, Any) or any(_takes_bool(each) or each in (True, False) for each in get_args(hint))


def in_words(hint: Any) -> str:
    """A type as a person would say it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin in (Union, UnionType):
        return " or ".join(in_words(each) for each in inner)
    if origin in (list, tuple) or hint in (list, tuple) or (origin and issubclass(origin, (list, tuple))):
        return "a list"
    return _WORDS.get(origin or hint, getattr(hint, "__name__", str(hint)))


@cache
def _readers(cls: type) -> dict[str, Any]:
    from pydantic import TypeAdapter

    hints = get_type_hints(cls)
    return {f.name: TypeAdapter(hints[f.name]) for f in fields(cls) if f.init}

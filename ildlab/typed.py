"""Settings are checked where they are made: one typed reading for config dataclasses and for a notebook's parameters.

What is surely meant is taken: "4" and 4.0 for a whole number, "false" for no, "5e-4", which YAML reads as a text, for a
number, a whole number or a path for a text, '{"tokens": 128}' for a mapping, "None" and "" for nothing. All else is refused
in words. The types are those of the fields: `Literal` for choices, `X | None` for what may be left out.
"""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Callable
from dataclasses import fields
from functools import cache, wraps
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ildlab.errors import IldlabError, ParameterError

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    dict: "a mapping",
    NoneType: "None",
}
_MANY = {dict, list, tuple}
_READ = {*_WORDS, *_MANY, Literal}

F = TypeVar("F", bound=Callable[..., Any])


def read_fields(config: Any, error: type[IldlabError]) -> None:
    """Read every field of a dataclass instance as its type; for its `__post_init__`.

    Raises
    ------
    error
        A value is of another type, or no choice of its `Literal`; the message names field, value and what it takes.
    """
    for name, hint in _hints(type(config)).items():
        object.__setattr__(config, name, _read(name, getattr(config, name), hint, error))


def known_fields(cls: type, values: dict[str, Any], error: type[IldlabError]) -> dict[str, Any]:
    """Return `values`, where each is a field of the dataclass.

    Raises
    ------
    error
        Some are not; the message lists those that there are.
    """
    unknown = sorted(map(repr, set(values) - set(_hints(cls))))
    if unknown:
        raise error(f"{cls.__name__} has no {', '.join(unknown)}. It has: {', '.join(_hints(cls))}.")
    return values


def read_values(cls: type, values: dict[str, Any], error: type[IldlabError]) -> dict[str, Any]:
    """Return `values` for some fields of a dataclass, each read as its type; raises as `known_fields` and `read_fields`."""
    return {
        name: _read(name, value, _hints(cls)[name], error) for name, value in known_fields(cls, values, error).items()
    }


def read_parameters(namespace: dict[str, Any]) -> None:
    """Read every annotated name of a namespace as its type, in place: a notebook's parameters, by `read_parameters(globals())`.

    papermill puts in what a command line says: `-p race false` is the text "false", which is true.

    Raises
    ------
    ParameterError
        A value is of another type, or an empty text where there is no going without; the message names parameter, value
        and what it takes. Nothing is changed then.
    """
    annotated = SimpleNamespace(__annotations__=namespace.get("__annotations__", {}))
    hints = get_type_hints(annotated, vars(typing) | namespace)
    if not hints:
        raise ParameterError("There are no parameters to read: annotate them, such as `seed: int = 0`.")
    given = {name: namespace[name] for name in hints if name in namespace}
    found = {name: _read(name, value, hints[name], ParameterError) for name, value in given.items()}
    for name, value in found.items():
        if isinstance(value, str) and not value.strip():
            raise ParameterError(f"{name}={given[name]!r}: it must not be empty.")
    namespace.update(found)


def reading(error: type[IldlabError]) -> Callable[[F], F]:
    """Read a function's arguments as `read_fields` reads fields, before it runs; those of ildlab's own types must be such."""

    def decorate(function: F) -> F:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(function).bind(*args, **kwargs)
            for name, hint in _arguments(function).items():
                value = bound.arguments.get(name)
                if name not in bound.arguments:
                    continue
                if _kinds(hint) <= _READ:
                    bound.arguments[name] = _read(name, value, hint, error)
                elif not isinstance(value, tuple(_kinds(hint))):
                    raise error(f"{name} is a {type(value).__name__}: it must be a {in_words(hint)}.")
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def at_least_one(error: type[IldlabError], **values: int) -> None:
    """Raise `error` where a number is below 1."""
    for name, value in values.items():
        if value < 1:
            raise error(f"{name}={value}: it must be at least 1.")


def _read(name: str, value: Any, hint: Any, error: type[IldlabError]) -> Any:
    try:
        meant = _meant(value, _kinds(hint))
        if isinstance(meant, bool) and not _takes_bool(hint):
            raise ValueError("True is no number")
        return _reader(hint).validate_python(meant)
    except (ValueError, yaml.YAMLError) as problem:  # pydantic's ValidationError is a ValueError
        raise error(f"{name}={value!r}: it must be {in_words(hint)}.") from problem


def _meant(value: Any, kinds: set[Any]) -> Any:
    """A value as a type of these kinds would have it, where it came by a way that knows no types."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif not isinstance(value, (str, bytes)) and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()  # a number of numpy's
    if isinstance(value, str):
        nothing = value.strip().lower() in ("", "none", "null")
        if nothing and (NoneType in kinds or kinds <= _MANY):
            value = None
        elif kinds & _MANY and (str not in kinds or value.lstrip()[:1] in ("[", "{")):
            value = yaml.safe_load(value)  # and so JSON
    if value is None and len(kinds) == 1 and kinds <= _MANY:
        return next(iter(kinds))()
    if isinstance(value, int) and not isinstance(value, bool) and kinds <= {str, NoneType}:
        return str(value)  # not of 1e3 or 3.10, which were written otherwise
    return value


def _kinds(hint: Any) -> set[Any]:
    """The plain types of a hint: {str, tuple} of `str | tuple[int, ...]`."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return set().union(*map(_kinds, get_args(hint)))
    return {origin or hint}


def _takes_bool(hint: Any) -> bool:
    return hint in (bool, Any) or any(_takes_bool(each) or each in (True, False) for each in get_args(hint))


def in_words(hint: Any) -> str:
    """A type as a person would say it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin in (Union, UnionType):
        return " or ".join(in_words(each) for each in inner)
    if (origin or hint) in (list, tuple):
        return "a list"
    return _WORDS.get(origin or hint, getattr(hint, "__name__", str(hint)))


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


@cache
def _arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments whose hints say what they take: plain types, or classes of ildlab."""
    kinds = {name: _kinds(hint) for name, hint in get_type_hints(function).items()}
    many = [
        p.name for p in inspect.signature(function).parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    ours = {n for n, ks in kinds.items() if all(k in _READ or k.__module__.startswith("ildlab.") for k in ks)}
    return {n: hint for n, hint in get_type_hints(function).items() if n in ours - {*many, "return"}}


@cache
def _reader(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    # What is not finite would be found out by the journal, which cannot hold it, when the work is done.
    return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))

"""What is surely meant is taken, all else refused in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import pytest

from ildlab.errors import MeasureError, ParameterError
from ildlab.typed import in_words, known_fields, read_fields, read_parameters, read_values


@dataclass(frozen=True)
class Settings:
    count: int = 1
    rate: float = 0.5
    race: bool = False
    kind: Literal["all", "last"] = "all"
    limit: int | None = None
    scope: str | list[int] = "all"
    more: dict[str, Any] = field(default_factory=dict)
    folder: str = "runs"
    suite: str | None = None
    layers: list[int] = field(default_factory=list)

    def __post_init__(self):
        read_fields(self, MeasureError)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"count": "4"}, 4),
        ({"count": 4.0}, 4),
        ({"count": np.int64(3)}, 3),
        ({"rate": "5e-4"}, 5e-4),
        ({"rate": 1}, 1.0),
        ({"race": "false"}, False),
        ({"race": "true"}, True),
        ({"kind": "last"}, "last"),
        ({"limit": None}, None),
        ({"limit": "7"}, 7),
        ({"scope": [1, 2]}, [1, 2]),
        ({"scope": "all"}, "all"),
        ({"more": {"a": 1}}, {"a": 1}),
        ({"count": "32.0"}, 32),
        ({"race": "no"}, False),
        ({"race": 0}, False),
        ({"limit": "None"}, None),
        ({"limit": ""}, None),
        ({"suite": "null"}, None),
        ({"scope": "[1, 2]"}, [1, 2]),
        ({"layers": "[1, '2']"}, [1, 2]),
        ({"more": '{"a": 1}'}, {"a": 1}),
        ({"more": None}, {}),
        ({"more": "none"}, {}),
        ({"folder": 20240501}, "20240501"),
        ({"folder": Path("runs/a")}, str(Path("runs/a"))),
        ({"folder": "none"}, "none"),
    ],
)
def test_what_is_surely_meant_is_taken(given, wanted):
    (found,) = (getattr(Settings(**given), name) for name in given)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"count": 4.5}, "count=4.5: it must be a whole number"),
        ({"count": "four"}, "a whole number"),
        ({"count": True}, "a whole number"),
        ({"limit": False}, "a whole number or None"),
        ({"count": None}, "a whole number"),
        ({"rate": "fast"}, "a number"),
        ({"race": "maybe"}, "True or False"),
        ({"race": None}, "True or False"),
        ({"kind": "first"}, "one of 'all', 'last'"),
        ({"limit": "x"}, "a whole number or None"),
        ({"scope": 3.5}, "a text or a list"),
        ({"more": [1]}, "a mapping"),
        ({"more": "[1]"}, "a mapping"),
        ({"more": "{a: b: c}"}, "a mapping"),
        ({"layers": "1"}, "a list"),
        ({"rate": "nan"}, "a number"),
        ({"rate": float("inf")}, "a number"),
        ({"folder": 3.10}, "folder=3.1: it must be a text"),
        ({"folder": True}, "a text"),
        ({"folder": None}, "a text"),
    ],
)
def test_all_else_is_refused_in_words(given, words):
    with pytest.raises(MeasureError, match=words):
        Settings(**given)


def test_names_that_are_no_fields():
    assert known_fields(Settings, {"count": 1}, MeasureError) == {"count": 1}
    with pytest.raises(MeasureError, match="Settings has no 'cout'. It has: count, rate"):
        known_fields(Settings, {"cout": 1}, MeasureError)
    with pytest.raises(MeasureError, match="no 'cout', 1"):
        known_fields(Settings, {"cout": 1, 1: 2}, MeasureError)
    assert in_words(int | None) == "a whole number or None"
    assert read_values(Settings, {"count": "4"}, MeasureError) == {"count": 4}


@pytest.mark.parametrize(
    "told", [lambda hint: hint, lambda hint: hint.__name__ if isinstance(hint, type) else "Optional[int]"]
)
def test_the_parameters_of_a_notebook(told):
    """As objects, and as texts, which `from __future__ import annotations` makes of them."""
    hints = {"race": bool, "limit": Optional[int], "folder": str, "later": int}  # noqa: UP045
    given = {"race": "false", "limit": "", "folder": 20240501, "other": "x"}
    namespace = {"__annotations__": {name: told(hint) for name, hint in hints.items()}, **given}
    read_parameters(namespace)
    assert {name: namespace[name] for name in given} == {
        "race": False, "limit": None, "folder": "20240501", "other": "x",
    }  # fmt: skip
    namespace |= {"race": "true", "limit": "many"}
    with pytest.raises(ParameterError, match="limit='many': it must be a whole number or None"):
        read_parameters(namespace)
    assert namespace["race"] == "true"  # all or nothing
    with pytest.raises(ParameterError, match="folder=' ': it must not be empty"):
        read_parameters(namespace | {"limit": 1, "folder": " "})
    with pytest.raises(ParameterError, match="annotate them"):
        read_parameters({"race": "false"})

"""What is surely meant is taken, all else refused in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest

from ildlab.errors import MeasureError
from ildlab.typed import in_words, known_fields, read_fields


@dataclass(frozen=True)
class Settings:
    count: int = 1
    rate: float = 0.5
    race: bool = False
    kind: Literal["all", "last"] = "all"
    limit: int | None = None
    scope: str | list[int] = "all"
    more: dict[str, Any] = field(default_factory=dict)

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
    ],
)
def test_all_else_is_refused_in_words(given, words):
    with pytest.raises(MeasureError, match=words):
        Settings(**given)


def test_names_that_are_no_fields():
    assert known_fields(Settings, {"count": 1}, MeasureError) == {"count": 1}
    with pytest.raises(MeasureError, match="Settings has no 'cout'. It has: count, rate"):
        known_fields(Settings, {"cout": 1}, MeasureError)
    assert in_words(int | None) == "a whole number or None"

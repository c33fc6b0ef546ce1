"""What a machine with a GPU may lack: `fill_in()` puts stand-ins where lazy_loader or pydantic is not installed.

With them, `benchmarks/gpu.py` and `tests/test_gpu.py` need torch, transformers, safetensors, pandas, numpy, scipy,
filelock, pyyaml and tqdm alone. Where the packages are there, nothing is done.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
import typing


def fill_in() -> None:
    """Register what is missing, before `ildlab` is imported."""
    if not there("lazy_loader"):
        module = types.ModuleType("lazy_loader")
        module.attach = attach
        sys.modules["lazy_loader"] = module
    if not there("pydantic"):
        module = types.ModuleType("pydantic")
        module.ConfigDict, module.TypeAdapter = dict, TypeAdapter
        sys.modules["pydantic"] = module


def there(name: str) -> bool:
    """Tell whether a package can be imported here."""
    if name in sys.modules:
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def attach(package: str, submodules=(), submod_attrs=None):
    """Return a package's `__getattr__`, `__dir__` and `__all__` (PEP 562), as lazy_loader does."""
    home = {name: module for module, names in (submod_attrs or {}).items() for name in names}
    known = sorted({*submodules, *home})

    def get(name: str):
        if name in home:
            return getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: known, known


class TypeAdapter:
    """Reads a value as a type: exactly, but that a whole number may stand for a float, and a list for a tuple."""

    def __init__(self, hint, config=None):
        self.hint = hint

    def validate_python(self, value):
        """The value; ValueError where it is of another type."""
        return _read(value, self.hint)


def _read(value, hint):
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return value
    if origin is typing.Literal:
        if any(value is one or (type(value) is type(one) and value == one) for one in inner):
            return value
    elif origin in (typing.Union, types.UnionType):
        for one in inner:
            try:
                return _read(value, one)
            except ValueError:
                continue  # another of the union may take it; where none does, it is refused below
    elif origin in (list, tuple) and isinstance(value, (list, tuple)):
        return origin(_read(each, inner[0]) for each in value)
    elif origin is dict and isinstance(value, dict):
        return {_read(k, inner[0]): _read(v, inner[1]) for k, v in value.items()}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    elif hint in (None, type(None)) and value is None:
        return None
    elif origin is None and hint is not float and isinstance(hint, type):
        if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
            return value
    raise ValueError(f"{value!r} is no {hint}")

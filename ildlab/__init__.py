"""ildlab: take layers out of a language model, one by one, and heal it by distillation.

`import ildlab` is light: each public name is loaded with its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

__version__ = "0.1.0"

# Public name -> the module that defines it. A module name alone (ildlab.plots) works as well, so no
# public name may equal a module's: which one `ildlab.x` is would depend on what was imported first.
_PUBLIC = {
    "IldlabError": "errors",
    "Progress": "progress",
    "drive": "progress",
    "load_model": "models",
    "LoadedModel": "models",
    "LayerStack": "stack",
    "load_text": "text",
    "TextBlocks": "text",
    "measure": "scores",
    "LayerScores": "scores",
    "DistillConfig": "distill",
    "PruningSession": "session",
}
__all__ = ["__version__"]
__all__ += list(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})

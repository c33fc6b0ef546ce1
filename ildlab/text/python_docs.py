"""Prose that every install has: Python's help topics and the docstrings of well-documented packages.

No package is imported: files are parsed, so nothing of theirs runs.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from ildlab.progress import Progress, Work

# Packages that every install of ildlab has and whose docstrings are prose. The list is fixed, so that
# the text depends on the pinned versions and not on what else happens to be installed.
_PACKAGES = (
    "IPython accelerate click huggingface_hub jinja2 matplotlib mpmath networkx numpy pandas requests "
    "scipy seaborn sympy torch tornado tqdm traitlets transformers"
)
# `models`: transformers repeats the same docstring for each of some hundred architectures.
_SKIPPED_FOLDERS = set("__pycache__ _vendor idlelib lib2to3 models site-packages test testing tests".split())
_MIN_DOCSTRING = 200  # characters: shorter ones are labels rather than text
_QUOTES = (b'"""', b"'''")


def python_docs_key() -> str:
    """Return a fingerprint of Python's version and of those of the packages read."""
    versions = [f"python {platform.python_version()}"]
    for package in _PACKAGES.split():
        try:
            # Without the local part: torch 2.13.0+cpu and 2.13.0+cu128 document the same.
            versions.append(f"{package} {metadata.version(package).partition('+')[0]}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} -")
    rules = f"{_MIN_DOCSTRING} {sorted(_SKIPPED_FOLDERS)}"
    return "python-docs-" + hashlib.sha256("\n".join([*versions, rules]).encode()).hexdigest()[:16]


def read_python_docs() -> Work[list[str]]:
    """Return every help topic and long docstring, in no particular order and with repetitions."""
    from pydoc_data.topics import topics

    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for package in _PACKAGES.split():
        spec = find_spec(package)
        roots += [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for root in roots for file in _python_files(root))
    found = list(topics.values())
    for done, file in enumerate(files):
        if done % 100 == 0:
            yield Progress(done, len(files), f"{len(found)} documents")
        found += _docstrings(file)
    return found


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _docstrings(file: Path) -> Iterator[str]:
    source = file.read_bytes()
    # Parsing is what takes time: skip files in which nothing between triple quotes is long enough.
    if not any(len(text) >= _MIN_DOCSTRING for mark in _QUOTES for text in source.split(mark)[1::2]):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            todo: list[ast.AST] = [ast.parse(source)]
    except (SyntaxError, ValueError, RecursionError):
        return  # a template or a file for another Python: not documentation that we could read
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _MIN_DOCSTRING:
                yield inspect.cleandoc(text)
        todo += [child for child in getattr(node, "body", []) if isinstance(child, ast.stmt)]

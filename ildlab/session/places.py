"""Where the teacher, texts and suites of a run lie, told so that it goes on from any folder, and when its own was moved.

A local file or folder is named by its whole path, or from the run folder (`{run}/mine.txt`) where it lies in it; what
ships and what the Hub has keeps its name. A name may stand in a sum of texts (`mix*3+mine.txt`) or a suite's (`file:`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ildlab.errors import SessionError
from ildlab.model.bundled import BUNDLED
from ildlab.text.mix import ALSO
from ildlab.text.sources import SHIPPED, exists

RUN = "{run}"  # the run folder, in its config.json
_SHIPPED = {BUNDLED, "mix", *ALSO, *SHIPPED}
_BETWEEN = re.compile(r"(\s*(?:\*[\d.]+\s*)?\+\s*|\s*\*[\d.]+\s*$)")  # the names of a sum, as `summands` reads it
_KIND = re.compile(r"(?i)(.+\.jsonl(?:\.gz)?)(:[^:/]+)?")

Place = Callable[[str], str]  # one name to another


def placed(config: Any, place: Place) -> Any:
    """A `SessionConfig` with each name of a teacher, text or suite put through `place`."""
    texts = {name: in_text(getattr(config, name), place) for name in ("text", "train_text", "eval_text")}
    measure = dict(config.measure)
    if isinstance(measure.get("suite"), str):
        measure["suite"] = in_suite(measure["suite"], place)
    return replace(
        config, teacher=place(config.teacher), suite=in_suite(config.suite, place), measure=measure, **texts
    )


def in_text(text: str | None, place: Place) -> str | None:
    """A text with each name in it put through `place`; SessionError where a sum could not be told apart any more."""
    if text is None or exists(Path(text).expanduser()):
        return text and place(text)
    parts = _BETWEEN.split(text)
    parts[::2] = names = [place(name.strip()) for name in parts[::2]]
    odd = [name for name in names if len(parts) > 1 and _BETWEEN.search(name)]
    if odd:
        raise SessionError(f"text {text!r}: a sum cannot name {odd[0]!r}, for its + or *. Give it by another path.")
    return "".join(parts)


def in_suite(suite: str | None, place: Place) -> str | None:
    """A suite with each file in it put through `place`; SessionError where a list could not be told apart any more."""
    if suite is None:
        return None
    name, rows = re.fullmatch(r"(.*?)(@\d+)?", suite, re.DOTALL).groups(default="")
    prefix, mark, listed = name.partition("file:")
    if mark and not prefix:
        alone = exists(Path(listed).expanduser())
        files = [place(file) for file in ([listed] if alone else map(str.strip, listed.split(",")))]
        if len(files) > 1 and any("," in file for file in files):
            raise SessionError(
                f"suite {suite!r}: a list cannot name a path with a comma: {files}. Give it by another."
            )
        return f"file:{','.join(files)}{rows}"
    return place(name) + rows if Path(name).suffix in (".yaml", ".yml") else suite


def whole(name: str) -> str:
    """The whole path of a local file or folder; any other name as it is."""
    path, kind = _parts(name)
    there = name not in _SHIPPED and path and exists(Path(path).expanduser())
    return os.path.abspath(os.path.expanduser(path)) + kind if there else name


def from_run(folder: str | Path) -> Place:
    """Names a path in the run folder from there."""
    inside = os.path.join(os.path.abspath(os.path.expanduser(folder)), "")
    return lambda name: f"{RUN}/{name[len(inside) :]}" if name.startswith(inside) else name


def short(name: str) -> str:
    """The last part of a whole path, which says nothing of the machine; any other name as it is."""
    return os.path.basename(name.rstrip("/\\")) if os.path.isabs(name) else name


def paths_in(value: str | None, within: Callable[[str | None, Place], Any]) -> list[str]:
    """The whole paths in a text (`within` is `in_text`) or a suite (`in_suite`)."""
    found: list[str] = []
    within(value, lambda name: found.append(_parts(name)[0]) or name)
    return [path for path in found if os.path.isabs(path)]


def gone(text: str) -> bool:
    """Whether a text, or a teacher, names a whole path where nothing lies."""
    return any(not exists(Path(path)) for path in paths_in(text, in_text))


def _parts(name: str) -> tuple[str, str]:
    """A name's path and `:kind`, where it is a file of rows."""
    match = _KIND.fullmatch(name)
    return (match[1], match[2] or "") if match else (name, "")

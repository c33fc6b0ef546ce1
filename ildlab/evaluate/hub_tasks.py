"""Rows of tasks from data sets on the Hugging Face Hub, through `datasets`.

A task of a suite file says where they lie and how a row is made:

    hub: {path: owner/name, name: config, split: test, shots_split: dev, revision: main}
    fields: {query: "{question}\\nAnswer:", choices: [A, B], gold: answer}

A field is a template in the data set's columns (`{column}`, `{column[key]}`; a list of texts is joined by
spaces), `gold` the name of a column. With `names:`, a list of configs, each config is a group: its
examples take their few-shot examples from it alone; `{topic}` is its name with spaces.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ildlab.errors import SuiteError, first_line
from ildlab.evaluate.tasks import check_row

PARQUET = "refs/convert/parquet"  # where the Hub keeps a data set as Parquet, whatever script makes it on main


def load_rows(spec: dict[str, Any], where: str, hub_root: str | Path | None) -> tuple[list[dict], list[dict]]:
    """Load the rows and the few-shot rows of one task.

    Parameters
    ----------
    spec : dict
        The task in the suite file.
    where : str
        Names the task in errors.
    hub_root : path or None
        Folder with local copies of data sets, in place of the Hub.

    Raises
    ------
    SuiteError
        A setting is missing, the data set is out of reach, or a row cannot be made of it.
    """
    hub, fields = spec["hub"], spec.get("fields")
    for name, place in (("path", hub), ("split", hub)):
        if name not in place:
            raise SuiteError(f"{where}: `hub:` needs `{name}:`.")
    if "kind" not in spec or not isinstance(fields, dict):
        raise SuiteError(f"{where}: a task from the Hub needs `kind:` and `fields:`.")
    groups = hub.get("names") or [hub.get("name")]
    rows, shots = [], []
    for group in groups:
        for split, into in ((hub["split"], rows), (hub.get("shots_split"), shots)):
            if split is not None:
                found = _load(hub, group, split, where, hub_root)
                into.append([_row(spec, raw, group, f"{where}, {split} row {n}") for n, raw in enumerate(found, 1)])
    # In turns, so that the first n rows are of all groups.
    return [row for turn in zip_longest(*rows) for row in turn if row is not None], sum(shots, [])


def _load(hub: dict, config: str | None, split: str, where: str, hub_root) -> Iterable[dict]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SuiteError(f"{where}: tasks from the Hub need datasets: pip install 'ildlab[eval]'.") from error
    path = hub["path"]
    if hub_root is not None:
        if not (Path(hub_root) / path).is_dir():
            raise SuiteError(f"{where}: {path} is not in {hub_root}. Copy the data set there (as owner/name).")
        path = str(Path(hub_root) / path)
    try:
        if hub.get("revision") == PARQUET:
            # The Hub makes this branch: folders config/split of Parquet files, no card that would name them.
            root = path if hub_root is not None else f"hf://datasets/{path}@{PARQUET.replace('/', '%2F')}"
            files = {split: f"{root}/{config or 'default'}/{split}/*.parquet"}
            return load_dataset("parquet", data_files=files, split=split)
        revision = {"revision": hub["revision"]} if "revision" in hub and hub_root is None else {}
        return load_dataset(path, config, split=split, **revision)
    except Exception as error:  # datasets lets through errors of fsspec, httpx, pyarrow and its own
        branch = f"--revision {hub['revision']} " if "revision" in hub else ""
        raise SuiteError(
            f"{where}: the data set {hub['path']}{f' ({config})' if config else ''} could not be loaded: "
            f"{first_line(error)}\nWithout network access download it elsewhere "
            f"(`hf download --repo-type dataset {branch}{hub['path']} --local-dir FOLDER/{hub['path']}`) and pass "
            "hub_root=FOLDER (or set ILDLAB_HUB_ROOT=FOLDER); a gated data set needs `hf auth login`."
        ) from error


def _row(spec: dict, raw: dict, group: str | None, where: str) -> dict:
    columns = {key: _joined(value) for key, value in raw.items()}
    columns["topic"] = (group or "").replace("_", " ")
    row = {}
    for name, template in spec["fields"].items():
        try:
            if name == "gold":
                row[name] = _gold(raw[template], row.get("choices") or row.get("context_options") or [])
            elif isinstance(template, list):
                row[name] = [str(part).format(**columns) for part in template]
            else:
                row[name] = str(template).format(**columns)
        except (KeyError, IndexError, ValueError) as error:
            raise SuiteError(
                f"{where}: the field {name!r} cannot be made: {error!r}. The columns are: {', '.join(raw)}."
            ) from error
    if group is not None:
        row["group"] = group
    return check_row(spec["kind"], row, where)


def _joined(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return _Texts(value)
    return value


class _Texts(list):
    """A list of texts: joined by spaces when it is formatted, and still indexable in a template."""

    def __format__(self, spec: str) -> str:
        return " ".join(self)


def _gold(value: Any, choices: list[str]) -> int:
    """Index of the right choice, given as an index or as the choice itself."""
    if isinstance(value, str):
        return int(value) if value not in choices and value.isdigit() else choices.index(value)
    return int(value)

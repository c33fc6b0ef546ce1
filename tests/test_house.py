"""The house: imports run down only, in no circle; a file is short, and says one thing."""

from __future__ import annotations

import ast
import json
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ildlab"
FLOORS = (
    {"errors", "progress", "stats", "drawing"},
    {"files", "limits", "typed"},
    {"model", "text"},
    {"evaluate", "distill"},
    {"importance"},
    {"session", "doctor"},
    {"widgets", "grid"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(("ildlab", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def room(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """Modules of ildlab that a file imports, wherever in it: in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: imports are absolute"
            if node.module.partition(".")[0] == "ildlab":
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= whole if whole <= set(MODULES) else {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "ildlab"}
    return found


ARROWS = {module: imports(path) for module, path in MODULES.items()}


def test_the_library_imports_modules_and_no_package():
    """What a package hands on is for people: an arrow that goes through it could hide a circle."""
    loose = [f"{module} -> {target}" for module, targets in ARROWS.items() for target in targets - set(MODULES)]
    assert [arrow for arrow in loose if not arrow.endswith(("-> ildlab", "-> ildlab.plots"))] == []
    # The version, and the figures, which are taken as one palette.
    assert {module for module, targets in ARROWS.items() if "ildlab.plots" in targets} <= {
        m for m in MODULES if room(m) == "widgets"
    }


def test_no_arrow_runs_up_or_sideways():
    wrong = []
    for module, targets in ARROWS.items():
        for target in targets & set(MODULES):
            here, there = room(module), room(target)
            if here == there:
                continue
            if here == "plots":  # a leaf: it draws what it is given
                fine = FLOOR.get(there, 9) < 2
            elif there == "plots":
                fine = here == "widgets"
            else:
                fine = FLOOR[there] < FLOOR[here]
            if not fine:
                wrong.append(f"{module} -> {target}")
    assert wrong == []


def test_no_circle():
    left = {module: targets & set(MODULES) for module, targets in ARROWS.items()}
    while free := {module for module, targets in left.items() if not targets & set(left)}:
        left = {module: targets for module, targets in left.items() if module not in free}
    assert left == {}


def test_only_widgets_import_widgets_and_only_figures_draw():
    for module, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert "ipywidgets" not in text or room(module) == "widgets", module
        assert (
            "import matplotlib" not in text and "from matplotlib" not in text or room(module) in ("plots", "widgets")
        ), module


def test_notebooks_import_rooms_and_no_deeper():
    rooms = {"ildlab"} | {f"ildlab.{each.name}" for each in PACKAGE.iterdir() if (each / "__init__.py").is_file()}
    for path in sorted((PACKAGE.parent / "notebooks").rglob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "code":
                continue
            code = "".join(cell["source"])
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "ildlab":
                    assert node.module in rooms, f"{path.name}: {ast.unparse(node)}"


def test_files_and_functions_are_short():
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: count for module, count in lines.items() if count > 350} == {}
    long = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                if body and (count := body[-1].end_lineno - body[0].lineno + 1) > 60:
                    long.append(f"{module}.{node.name}: {count}")
    assert long == []


def test_the_library_is_thin():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py"))
    assert lines <= 16_600


def test_each_room_says_what_happens_inside():
    for init in PACKAGE.rglob("__init__.py"):
        doc = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))
        assert doc and len(doc.splitlines()) >= 3, init

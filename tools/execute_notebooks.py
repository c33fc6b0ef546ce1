"""Execute notebooks in place as they are committed: real outputs, no widget state, no run left over.

    python tools/execute_notebooks.py notebooks/01_step_through_pruning.ipynb ...
    python tools/execute_notebooks.py notebooks/batch/compare_methods.ipynb --folder /tmp/compare

With `--folder` they run there, and their runs stay: a long one that was stopped goes on where it stood.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import tempfile
from contextlib import nullcontext
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image


def execute(path: Path, folder: Path | None = None) -> None:
    """Run a notebook in a folder (an empty one), strip what belongs to one machine or session, write it back."""
    notebook = nbformat.read(path, 4)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as where:
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(where)}}).execute()
        text = nbformat.writes(notebook).replace(f"{Path(where).resolve()}/", "")  # no path of this machine
        notebook = nbformat.reads(text, 4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            # A live widget cannot be shown again: its static form stands beside it.
            cell.outputs = [o for o in cell.outputs if not is_only_widget(o)]
            cell.outputs = joined(cell.outputs)
            for output in cell.outputs:
                if "\r" in output.get("text", ""):  # bars, drawn over and over
                    output["text"] = re.sub(r"[^\n]*\r", "", output["text"])
                data = output.get("data", {})
                if "text/html" in data:
                    data["text/html"] = PNG.sub(lambda m: m[1] + smaller(m[2]), data["text/html"])
            cell.outputs = [o for o in cell.outputs if o.get("text", "x").strip()]
    nbformat.write(notebook, path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


PNG = re.compile(r"(data:image/png;base64,)([A-Za-z0-9+/=]+)")


def smaller(encoded: str) -> str:
    """Recode a PNG with a palette of 256 colours: enough for figures, at a third of the size."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA")
    buffer = io.BytesIO()
    image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def joined(outputs: list) -> list:
    """Outputs with what was written to one stream in several pieces as one: a bar is drawn over piece by piece."""
    whole: list = []
    for output in outputs:
        if whole and output.get("name", "") == whole[-1].get("name") and output.output_type == "stream":
            whole[-1]["text"] += output["text"]
        else:
            whole.append(output)
    return whole


def is_only_widget(output) -> bool:
    """Tell whether an output is a widget with nothing but its plain text beside it."""
    kinds = set(output.get("data", {}))
    return "application/vnd.jupyter.widget-view+json" in kinds and kinds <= {
        "application/vnd.jupyter.widget-view+json",
        "text/plain",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", type=Path, nargs="+")
    parser.add_argument("--folder", type=Path, help="where they run; by default each in an empty folder")
    args = parser.parse_args()
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.notebooks:
        execute(name, args.folder)

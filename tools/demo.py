"""The main job in one command: `python tools/demo.py` (or `make demo`).

Runs `notebooks/batch/iterate.ipynb` on the bundled model through papermill with the preset `demo`,
with live progress, and leaves a report (notebook and HTML), a journal and a checkpoint.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from ildlab import errors
from ildlab.errors import IldlabError
from ildlab.grid.points import read_as
from ildlab.session.report import write_report


def notebooks_dir() -> Path:
    """Folder of the notebooks, in a checkout."""
    folder = Path(__file__).resolve().parent.parent / "notebooks"
    if not (folder / "batch" / "iterate.ipynb").is_file():
        raise IldlabError(f"There are no notebooks at {folder}: run the demo from a checkout of the repository.")
    return folder


def run_folder(base: Path) -> Path:
    """The demo's folder: one that a stopped demo left unfinished, else a new one."""
    number = 1
    while True:
        folder = base.with_name(f"{base.name}-{number}")
        if not folder.exists() or not (folder / "report.html").exists():
            return folder
        number += 1


def main(arguments: list[str] | None = None) -> Path:
    """Run the demo. Arguments `name=value` override parameters of the notebook; `preset=NAME` takes another preset."""
    import papermill
    import yaml

    batch = notebooks_dir() / "batch"
    arguments = sys.argv[1:] if arguments is None else arguments
    unclear = [argument for argument in arguments if "=" not in argument]
    if unclear:
        raise IldlabError(f"{unclear[0]!r}: give parameters as name=value, such as target_layers=28 or preset=demo.")
    given = dict(argument.split("=", 1) for argument in arguments)
    preset = batch / "presets" / f"{given.pop('preset', 'demo')}.yaml"
    if not preset.is_file():
        known = ", ".join(sorted(path.stem for path in preset.parent.glob("*.yaml")))
        raise IldlabError(f"There is no preset {preset.stem!r}; there are: {known}.")
    known = papermill.inspect_notebook(batch / "iterate.ipynb")
    own = yaml.safe_load(preset.read_text(encoding="utf-8"))
    if "text" in given:  # whoever brings a text distills on it, unless she names another for that
        own.pop("train_text", None)
    parameters = read_as(known, own | given)
    folder = Path(parameters.get("run_folder") or run_folder(Path("runs") / preset.stem)).expanduser().resolve()
    # The report is written beside the run: papermill needs its folder before the session makes it.
    reports = folder.with_name(folder.name + "-report")
    reports.mkdir(parents=True, exist_ok=True)
    parameters["run_folder"] = str(folder)

    # papermill logs the notebook's own lines as they come.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("papermill").setLevel(logging.WARNING)
    logging.getLogger("papermill.notebook").setLevel(logging.INFO)
    start = time.perf_counter()
    report = reports / "report.ipynb"
    try:
        papermill.execute_notebook(
            batch / "iterate.ipynb",
            report,
            parameters=parameters,
            log_output=True,
            progress_bar=False,
            kernel_name="python3",
            # Else its first line warns of its transport, and its last may tell of the interrupt that ends it as an error.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
        )
    except papermill.PapermillExecutionError as error:
        if not hasattr(errors, error.ename):
            raise
        raise IldlabError(error.evalue) from error
    page = write_report(folder, report)
    report = report.rename(folder / "report.ipynb")
    reports.rmdir()
    checkpoint = next(iter(sorted(folder.glob("checkpoint-*-layers"))), None)
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")
    for what, where in (
        ("report", page),
        ("report notebook", report),
        ("journal", folder / "journal.jsonl"),
        ("checkpoint", checkpoint),
    ):
        print(f"{what:16} {where}")
    return folder


if __name__ == "__main__":
    try:
        main()
    except IldlabError as error:
        sys.exit(str(error))

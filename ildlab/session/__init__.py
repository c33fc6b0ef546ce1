"""A run: its folder and journal, what is done in it, the loop, and the checkpoint that comes out.

`config` says what a run is of, and `places` where that lies; `journal` keeps every step on disk (`steps`); `run` holds teacher,
student and journal together; `opening` begins one, or goes on with it.
On a `Run` act `actions` (measure, remove, distill, evaluate, undo) and `loop`, which chains them; `tables`,
`story`, `picture`, `forecast` and `diagnosis` read the journal, `standing` a distillation that was interrupted; `export` writes the student, and `doctor` proves it. `session` is the face of all that,
`whatif` tries layers off, `methods` compares whole runs, `report` makes pages of them, `scaling` counts what one would
cost on a model of any size.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "session": ["PruningSession"],
        "config": ["SessionConfig"],
        "loop": ["RunSettings"],
        "tables": ["history_table", "losses_table", "scored_models", "task_table"],
        "whatif": ["WhatIf", "what_if_steps"],
        "diagnosis": ["diagnose"],
        "scaling": ["Cost", "ModelShape", "distilling", "measuring", "memory"],
        "report": ["Lead", "write_index", "write_report"],
        "methods": ["METHODS", "Method", "compare_steps", "published_curves", "task_columns"],
    },
)

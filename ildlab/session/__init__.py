"""A run: its folder and journal, what is done in it, the loop, and the checkpoint that comes out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "session": ["PruningSession"],
        "config": ["SessionConfig"],
        "loop": ["RunSettings"],
        "tables": ["history_table", "losses_table", "task_table"],
        "whatif": ["WhatIf", "what_if_steps"],
        "diagnosis": ["diagnose"],
        "methods": ["METHODS", "compare_steps", "published_curves", "task_columns"],
    },
)

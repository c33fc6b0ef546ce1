"""A student learns from its teacher.

`config` says what to distill with and which layers train; `step` makes a batch's loss out of `losses` (or `fused`);
`train` takes the optimizer's steps.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["DistillConfig", "DistillResult", "match_points", "resolve_scope"],
        "train": ["distill", "distill_steps"],
        "losses": ["Divergence", "divergence", "hidden_distance"],
        "step": ["Counts", "DistillStep"],
    },
)

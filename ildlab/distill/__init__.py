"""A student learns from its teacher.

`config` says what to distill with, `scope` which layers train and where hidden states are matched; `batches` what each
step trains on. `step` runs both models on it (`bottoms`: what is frozen below runs once) and makes the loss out of
`losses`, the head `fused` with the divergence; `masters` are the fp32 weights that the optimizer changes. `plan` is
all that is settled before, `train` the loop of these steps, `checkpoint` what it resumes from, `processes` the same loop on several GPUs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["DistillConfig", "DistillResult"],
        "scope": ["match_points", "resolve_scope"],
        "train": ["distill", "distill_steps"],
        "losses": ["Divergence", "divergence", "hidden_distance"],
        "batches": ["Counts"],
        "step": ["DistillStep"],
    },
)

"""Figures: data frames and scores in, a matplotlib Axes out.

`canvas` is what all share; `scores` draws importance, `states` hidden states, `curves` losses and quality.
"""

import lazy_loader

_CANVAS = "COLOURS TEXT contrast ink_on token_label legend new_axes save show style to_html to_png to_svg"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "canvas": _CANVAS.split(),
        "scores": ["importance", "importance_by_iteration", "rank_flow", "metric_scatter", "profile_beside"],
        "states": ["redundancy_heatmap", "block_triangle", "drift_by_layer", "token_drift_map", "logit_lens_map"],
        "curves": ["loss_curves", "quality", "methods", "task_panels", "branches"],
    },
)

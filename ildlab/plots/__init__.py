"""Figures: `LayerScores` and data frames in, a matplotlib Axes out.

What is known of every layer goes to `layers` (the stack as a picture of its own), scores to `scores` (importance), hidden
states to `states`, a run's tables to `curves` (losses, quality), a grid's to `facets`; these draw on a `canvas`, which also
takes the figure out, as a picture in a notebook or a file.
"""

import lazy_loader

_CANVAS = "COLOURS TEXT cells contrast heatmap in_cell ink_on larger token_label legend new_axes new_figure save show to_html to_png"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "canvas": _CANVAS.split(),
        "layers": ["stack"],
        "scores": "importance importance_by_iteration importance_by_kind metric_scatter profile_beside profiles".split(),
        "states": ["redundancy_heatmap", "block_triangle", "drift_by_layer", "token_drift_map", "logit_lens_map"],
        "curves": ["loss_curves", "quality", "task_bars", "methods", "task_panels", "branches"],
        "facets": ["grid"],
    },
)

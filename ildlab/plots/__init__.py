"""Figures: data frames and scores in, a matplotlib Axes out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "canvas": [
            "COLOURS",
            "TEXT",
            "contrast",
            "ink_on",
            "token_label",
            "legend",
            "new_axes",
            "save",
            "show",
            "style",
            "to_html",
            "to_png",
            "to_svg",
        ],
        "scores": ["importance", "importance_by_iteration", "loss_curves", "quality"],
        "states": ["redundancy_heatmap", "block_triangle", "drift_by_layer", "token_drift_map", "logit_lens_map"],
        "ranks": ["rank_flow", "metric_scatter", "profile_beside"],
        "suites": ["methods", "task_panels", "branches"],
    },
)

"""Many notebooks at once: a grid of parameters, a papermill execution a point, on dask.distributed.

`points` reads a grid as what its notebook takes, and lays out a folder a point; `work` is what a worker does with one of
them; `run` puts them on workers, of this machine or of any cluster; `frame` reads what came out.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"run": ["run_grid", "run_grid_steps"], "frame": ["load_grid"]}
)

"""The stack as a picture, in plain Python: nothing here needs a browser, a kernel or a plotting library.

`columns` tells from scores what is to be seen of each layer; `stack` writes it as SVG. Scores, stacks and sessions show
themselves with it, and the stepper shows the same picture live.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"columns": ["Column", "Row", "columns_of"], "stack": ["Picture"]}
)

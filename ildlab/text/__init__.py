"""Documents become blocks of tokens.

`sources` finds documents (files, Hub data sets, Python's docs, the teacher's samples) and splits them; `blocks`
tokenises them and packs them into rows of equal length.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"blocks": ["TextBlocks", "load_text"], "sources": ["find_documents"], "sampling": ["sample_steps"]},
)

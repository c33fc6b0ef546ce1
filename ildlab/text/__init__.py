"""Documents become blocks of tokens, and blocks become rows.

`sources` finds documents (files, Hub data sets, Python's docs by way of `python_docs`, the teacher's samples) and
keeps the splits apart, `tables` chooses the column of those that are rows; `stream` packs their tokens end to end,
`blocks` cuts the stream into blocks of one length, each opened as the tokenizer opens a text; `rows` is how all that
measures, trains or evaluates reads them (and a bare tensor, or a mapping with a mask). `mix` adds up sources by
weights, and reads rows that say where they are scored; `teacher_text` makes such rows of any teacher.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "sources": ["find_documents"],
        "blocks": ["TextBlocks", "load_text"],
        "rows": ["Rows"],
        "teacher_text": ["make_mix", "mix_steps"],
    },
)

"""A causal LM as a stack of decoder layers.

`load` brings in a model and its tokenizer; `stack` finds the decoder layers (`find`), captures what the model hands
to each (`capture`), replays, skips and removes them (`config_cut`); `shared` runs student and teacher together, and
`head` makes log-probabilities, NLL and KL of what comes out. `generate` goes on with a text.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "bundled": ["prepare_bundled"],
        "load": ["LoadedModel", "load_model"],
        "generate": ["greedy"],
        "capture": ["Trunk"],
        "stack": ["LayerStack"],
        "shared": ["both_final", "shared_prefix"],
    },
)

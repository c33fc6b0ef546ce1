"""How much each layer matters, and how sure that is.

`measure` chooses between metrics of one pass, the sweep without each layer, and a suite's tasks; `scores` is the
record that they return. `hidden_states` compares hidden states across layers and models.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "scores": ["LayerScores", "measure", "measure_steps", "options_of"],
        "agreement": ["Comparison", "rank_agreement"],
        "hidden_states": ["block_distances", "drift", "logit_lens", "redundancy", "token_drift"],
    },
)

"""How much each layer matters, and how sure that is.

`measure` (dispatch) checks the options (config) and hands on to one of three: one_pass reads hidden states, ablation
the NLL or KL without each layer, task a suite's aggregate; the last two go down the trunk-shared sweep and may race.
Values come in batch by batch (samples) and end in `LayerScores` (scores). Beside them, agreement compares
rankings, and hidden_states (cka) compares hidden states across layers and models.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "scores": ["LayerScores"],
        "dispatch": ["measure", "measure_steps"],
        "config": ["MeasureConfig", "options_of"],
        "agreement": ["rank_agreement", "rank_correlation", "redundant_depth"],
        "hidden_states": [
            "block_distances",
            *(
                f"{name}{form}"
                for name in ("drift", "logit_lens", "redundancy", "token_drift")
                for form in ("", "_steps")
            ),
        ],
    },
)

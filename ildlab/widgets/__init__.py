"""What a person clicks, and what they then see: every action is a call of `PruningSession`.

`stepper` shows the `controls` and the `strip` of layers; a click becomes a job of the `worker`, whose progress and end
come back in `words`, on the strip, and as `figures`; `kinds` chooses the kind of text that these show. `explorer` is a strip with figures of a model that nobody prunes.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"stepper": ["Stepper", "step_through"], "explorer": ["Explorer"]}
)

"""What a person clicks: the stepper and the explorer. Every action is a call of `PruningSession`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"stepper": ["Stepper"], "explorer": ["Explorer"]}
)

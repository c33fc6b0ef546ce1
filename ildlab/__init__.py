"""ildlab: take layers out of a language model, one by one, and heal it by distillation.

`import ildlab` is light: each public name is loaded with its module when it is first used.
"""

import lazy_loader

__version__ = "0.1.0"

# No public name may equal a module's: which one `ildlab.x` is would depend on what was imported first.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "errors",
        "progress",
        "files",
        "stats",
        "model",
        "text",
        "evaluate",
        "distill",
        "importance",
        "session",
        "grid",
        "plots",
        "widgets",
    ],
    submod_attrs={
        "errors": ["IldlabError"],
        "progress": ["Progress", "drive", "lines"],
        "files": ["data_dir"],
        "typed": ["read_parameters"],
        "model.load": ["LoadedModel", "load_model"],
        "model.stack": ["LayerStack"],
        "text.blocks": ["TextBlocks", "load_text"],
        "importance.scores": ["LayerScores"],
        "importance.dispatch": ["measure"],
        "distill.config": ["DistillConfig"],
        "session.session": ["PruningSession"],
    },
)

"""What a student is worth.

`text_quality` gives perplexity and KL on text; `suites` reads tasks and scores them; `results` puts intervals to
them; `record` holds it all beside the teacher.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "text_quality": ["evaluate", "evaluate_steps"],
        "record": ["Evaluation"],
        "suites": ["Suite", "load_suite", "score_suite", "suite_steps"],
        "results": ["SuiteResult", "TaskResult", "quality_loss"],
    },
)

"""What a student is worth, beside its teacher.

On text, `text_quality` gives perplexity, KL and agreement, and `speed` times generation. On tasks, `suites` reads
rows (`tasks`), lays out their requests (`plan`), packs what these share into rows (`packing`) and scores them
(`loglikelihood`); `lm_eval` runs lm-eval's own. `results` puts intervals to scores, and `record` holds it all.
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

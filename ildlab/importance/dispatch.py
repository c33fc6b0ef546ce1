"""`measure`: one call for every metric."""

from __future__ import annotations

from typing import Any

from ildlab.errors import MeasureError
from ildlab.importance.ablation import ablation_steps
from ildlab.importance.config import ONE_PASS, check_options
from ildlab.importance.one_pass import one_pass_steps
from ildlab.importance.scores import LayerScores
from ildlab.importance.task import task_steps
from ildlab.limits import check_input
from ildlab.model.stack import LayerStack
from ildlab.progress import Work, blocking
from ildlab.text.rows import Rows
from ildlab.typed import reading


@reading(MeasureError)
def measure_steps(
    student: LayerStack,
    blocks: Any,
    metric: str = "block_influence",
    teacher: LayerStack | None = None,
    *,
    tokenizer: Any = None,
    **options: Any,
) -> Work[LayerScores]:
    """Score how important each layer of the student is; the student is left as it was.

    Of the generator (`measure_steps`), `Progress.partial` is the scores so far; it may be closed at any time.

    Parameters
    ----------
    blocks : TextBlocks, int Tensor [N, T], or mapping with `input_ids` and `attention_mask`
        Tokens to score on; each row is one sequence. "magnitude" and "task" read none.
    teacher, tokenizer : optional
        The teacher's LayerStack for "kl"; the student's tokenizer for "task".
    metric, **options
        `MeasureConfig` has them all: race, positions, batch_size, seed, confidence, suite, ...

    Raises
    ------
    MeasureError
        Bad options, a missing teacher, suite or tokenizer, fewer than 2 sequences, or a score that is not finite.
    ModelError
        Sequences are longer than the model's window, or hold a token that its embedding lacks.
    """
    config = check_options(metric, options)
    if metric == "task":
        if config.suite is None:
            raise MeasureError("The metric 'task' needs a suite: give suite= (and tokenizer=).")
        if tokenizer is None:
            raise MeasureError("The metric 'task' needs the tokenizer: pass tokenizer=loaded.tokenizer.")
        if teacher is not None:
            raise MeasureError("teacher=: 'task' compares the student with itself. Leave it out, or measure 'kl'.")
        return (yield from task_steps(student, config, tokenizer))
    if tokenizer is not None:
        raise MeasureError(f"tokenizer=: {metric!r} reads blocks of tokens, not text. Leave it out.")
    if metric == "kl" and teacher is None:
        raise MeasureError("The metric 'kl' compares with the teacher: give teacher=.")
    rows = None if metric == "magnitude" else Rows.of(blocks)
    if rows is not None and len(rows.tokens) < 2:
        raise MeasureError("1 sequence: an interval needs at least 2. Give more text, or shorter blocks.")
    if rows is not None:
        check_input(student.model, rows.tokens)
    if metric in ONE_PASS:
        return (yield from one_pass_steps(student, rows, config))
    return (yield from ablation_steps(student, rows, config, teacher))


measure = blocking(measure_steps)

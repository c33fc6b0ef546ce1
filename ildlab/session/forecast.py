"""What the next phase of the loop will cost, told from what the journal says that it cost before."""

from __future__ import annotations

from typing import Any

from ildlab.importance.config import ONE_PASS

LOCAL = 0.2  # of the cost of a token is that of one in the local stage


def forecast(
    session: Any, phase: str, metric: str = "", suite: str | None = None, tokens: float | None = None
) -> float | None:
    """Seconds that a phase will take, by the last time it was done in this run; None where it was not."""
    action = {"evaluate removal": "evaluate"}.get(phase, phase)
    past = [step for step in session.steps if step.action == action and step.whole]
    layers = len(session.student)
    if phase == "measure":
        past = [step for step in past if step.args["metric"] == metric and not step.args.get("layers")]
    elif phase == "evaluate":
        past = [step for step in past if step.args["suite"] == suite]
    elif phase == "evaluate removal":
        past = [step for step in past if step.args["suite"] is None]
    if not past:
        return None
    last = past[-1]
    if phase == "measure":
        # One pass grows with the layers; without each in turn, with their square.
        return last.seconds * (layers / len(last.layer_ids)) ** (1 if metric in ONE_PASS else 2)
    if phase == "distill" and tokens:
        return last.seconds * tokens / max(1, tokens_of(last.args["config"], session.config.train_tokens))
    return last.seconds


def tokens_of(config: dict[str, Any], whole: int) -> float:
    """Tokens of a distillation, those of the local stage by what they cost."""
    local = config.get("local_tokens", 0)
    return (config["tokens"] or whole) + LOCAL * (whole if local is None else local)


def iteration(session: Any, metric: str, suite: str | None) -> float | None:
    """Seconds of a whole iteration, where every phase of it was done before."""
    parts = [
        forecast(session, phase, metric, suite) for phase in ("measure", "evaluate removal", "distill", "evaluate")
    ]
    return None if None in parts else sum(parts)

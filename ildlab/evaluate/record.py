"""What was measured of a student beside its teacher: a record that shows and stores itself."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pandas as pd

from ildlab.errors import SuiteError
from ildlab.evaluate.results import Estimate, SuiteResult, html_table, quality_loss

_SUITES = ("suite", "teacher_suite", "canaries", "teacher_canaries")


@dataclass
class Evaluation:
    """What was measured of a student, beside its teacher.

    Attributes
    ----------
    perplexity, teacher_perplexity : float
        exp of the mean negative log-likelihood of each next token of the text.
    kl : float
        KL(teacher || student) in nats per token.
    kl_low, kl_high : float
        95% bootstrap interval of `kl` over blocks (equal to it where there is one block).
    agreement : float
        Share of tokens where both have the same most likely next token.
    tokens : int
        Next-token positions scored.
    text : dict
        Source, split and fingerprint of the text.
    layers, teacher_layers, parameters, teacher_parameters, bytes, teacher_bytes : int
        Sizes; tied weights count once.
    tokens_per_second, teacher_tokens_per_second : float or None
        Greedy generation of one sequence with the KV cache, both measured in turns.
    suite, teacher_suite : SuiteResult or None
        Scores on tasks.
    canaries, teacher_canaries : SuiteResult or None
        Scores on cheap probes: copying, one-digit arithmetic, closing brackets.
    seconds : float
        Wall-clock time of the evaluation.
    """

    perplexity: float
    teacher_perplexity: float
    kl: float
    kl_low: float
    kl_high: float
    agreement: float
    tokens: int
    text: dict[str, Any]
    layers: int
    teacher_layers: int
    parameters: int
    teacher_parameters: int
    bytes: int
    teacher_bytes: int
    tokens_per_second: float | None = None
    teacher_tokens_per_second: float | None = None
    suite: SuiteResult | None = None
    teacher_suite: SuiteResult | None = None
    canaries: SuiteResult | None = None
    teacher_canaries: SuiteResult | None = None
    seconds: float = 0.0

    @property
    def speed_ratio(self) -> float | None:
        """Generation speed of the student over the teacher's; None where it was not measured."""
        if not self.tokens_per_second or not self.teacher_tokens_per_second:
            return None
        return self.tokens_per_second / self.teacher_tokens_per_second

    @property
    def aggregate(self) -> float | None:
        """Mean of the suite's normalised scores; None without a suite."""
        return None if self.suite is None else self.suite.aggregate

    @property
    def quality_loss(self) -> float | None:
        """1 - student/teacher aggregate, as in the paper; None without a suite."""
        return None if self.suite is None else self.quality_loss_estimate().value

    @property
    def loss(self) -> float:
        """Share of quality lost: `quality_loss`, or without a suite 1 - teacher's perplexity / student's."""
        return 1 - self.teacher_perplexity / self.perplexity if self.suite is None else self.quality_loss

    def quality_loss_estimate(self, *, corrected: bool = False) -> Estimate:
        """Quality loss with its bootstrap interval; `corrected` for chance or as in the paper."""
        if self.suite is None:
            raise SuiteError("This evaluation has no suite, and so no quality loss: evaluate with suite='mini7'.")
        return quality_loss(self.suite, self.teacher_suite, corrected=corrected)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values, that `from_dict` reads back."""
        out = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in _SUITES:
            out[name] = None if out[name] is None else out[name].to_dict()
        return out

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Evaluation:
        """Rebuild an evaluation from `to_dict`; keys that it does not know are left out."""
        known = {field.name for field in fields(cls)}
        values = {k: v for k, v in record.items() if k in known}
        for name in _SUITES:
            if values.get(name) is not None:
                values[name] = SuiteResult.from_dict(values[name])
        return cls(**values)

    def teacher_record(self) -> dict[str, Any]:
        """Return the teacher's scores, to pass to the next evaluation as `teacher_record`."""
        record = self.to_dict()
        return {name: record[name] for name in ("teacher_suite", "teacher_canaries")}

    def summary(self) -> list[tuple[str, str, str]]:
        """Rows (what, student, teacher) for a table."""
        rows = [
            ("layers", f"{self.layers}", f"{self.teacher_layers}"),
            ("parameters", f"{self.parameters / 1e6:,.1f} M", f"{self.teacher_parameters / 1e6:,.1f} M"),
            ("size", f"{self.bytes / 2**20:,.0f} MiB", f"{self.teacher_bytes / 2**20:,.0f} MiB"),
            ("perplexity", f"{self.perplexity:,.3f}", f"{self.teacher_perplexity:,.3f}"),
            ("KL(teacher ‖ student) per token", f"{self.kl:.4f} [{self.kl_low:.4f}, {self.kl_high:.4f}]", "0"),
            ("same top token as the teacher", f"{self.agreement:.1%}", "100%"),
        ]
        if self.speed_ratio is not None:
            mine = f"{self.tokens_per_second:.1f}/s ({self.speed_ratio:.2f} ×)"
            rows.append(("tokens generated", mine, f"{self.teacher_tokens_per_second:.1f}/s"))
        for mine, theirs in ((self.suite, self.teacher_suite), (self.canaries, self.teacher_canaries)):
            if mine is None:
                continue
            rows.append((f"{mine.name}: aggregate", str(mine.interval()), str(theirs.interval())))
            rows += [(f"{mine.name}: note", note, "") for note in mine.notes]
            for name, task in mine.tasks.items():
                rows.append((f"{mine.name}: {name}", f"{task.score:.3f}", f"{theirs.tasks[name].score:.3f}"))
        for form in (False, True) if self.suite is not None else ():
            found = self.quality_loss_estimate(corrected=form)
            label = "quality loss, corrected for chance" if form else "quality loss"
            rows.append((label, f"{found.value:+.1%} [{found.low:+.1%}, {found.high:+.1%}]", ""))
        return rows

    @property
    def table(self) -> pd.DataFrame:
        """`summary` as a table."""
        return pd.DataFrame(self.summary(), columns=["", "student", "teacher"]).set_index("")

    def __str__(self) -> str:
        return self.table.to_string(index_names=False)

    def _repr_html_(self) -> str:
        where = f"{self.tokens:,} tokens of {self.text.get('source') or 'a tensor of blocks'}"
        return html_table(self.table, "Evaluation", f"{where}, {self.seconds:.0f} s")

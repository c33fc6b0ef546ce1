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
    """What was measured of a student, beside its teacher."""

    perplexity: float  # exp of the mean negative log-likelihood of each next token of the text
    teacher_perplexity: float
    kl: float  # KL(teacher || student) in nats per token
    kl_low: float  # its 95% bootstrap interval over blocks (equal to it where there is one block)
    kl_high: float
    agreement: float  # share of tokens where both have the same most likely next token
    tokens: int  # next-token positions scored
    text: dict[str, Any]  # source, split and fingerprint
    layers: int
    teacher_layers: int
    parameters: int  # tied weights count once
    teacher_parameters: int
    bytes: int
    teacher_bytes: int
    tokens_per_second: float | None = None  # greedy, one sequence, with the KV cache; both timed in turns
    teacher_tokens_per_second: float | None = None
    suite: SuiteResult | None = None
    teacher_suite: SuiteResult | None = None
    canaries: SuiteResult | None = None  # cheap probes: copying, one-digit arithmetic, closing brackets
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
    def loss(self) -> float:
        """Share of quality lost, as in the paper; without a suite 1 - teacher's perplexity / student's."""
        return 1 - self.teacher_perplexity / self.perplexity if self.suite is None else self.quality_loss

    @property
    def quality_loss(self) -> float | None:
        """1 - student's aggregate / teacher's, as in the paper; None without a suite."""
        return None if self.suite is None else self.quality_loss_estimate().value

    def quality_loss_estimate(self, *, corrected: bool = False) -> Estimate:
        """Quality loss with its bootstrap interval; `corrected` for chance or as in the paper."""
        if self.suite is None:
            raise SuiteError("This evaluation has no suite, and so no quality loss: evaluate with suite='mini7'.")
        return quality_loss(self.suite, self.teacher_suite, corrected=corrected)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values, that `from_dict` reads back."""
        out = {field.name: getattr(self, field.name) for field in fields(self)}
        return out | {name: out[name].to_dict() for name in _SUITES if out[name] is not None}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Evaluation:
        """Rebuild an evaluation from `to_dict`; keys that it does not know are left out."""
        values = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        return cls(**values | {name: SuiteResult.from_dict(values[name]) for name in _SUITES if values.get(name)})

    def teacher_record(self) -> dict[str, Any]:
        """Return the teacher's scores, to pass to the next evaluation as `teacher_record`."""
        return {name: value for name, value in self.to_dict().items() if name in ("teacher_suite", "teacher_canaries")}

    @property
    def table(self) -> pd.DataFrame:
        """Rows (what, student, teacher), as text."""
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
            if mine is not None:
                rows.append((f"{mine.name}: aggregate", str(mine.interval()), str(theirs.interval())))
                rows += [(f"{mine.name}: note", note, "") for note in mine.notes]
                both = [(name, task.score, theirs.tasks[name].score) for name, task in mine.tasks.items()]
                rows += [(f"{mine.name}: {name}", f"{a:.3f}", f"{b:.3f}") for name, a, b in both]
        if self.suite is not None:
            for label, form in (("quality loss", False), ("quality loss, corrected for chance", True)):
                found = self.quality_loss_estimate(corrected=form)
                rows.append((label, f"{found.value:+.1%} [{found.low:+.1%}, {found.high:+.1%}]", ""))
        return pd.DataFrame(rows, columns=["", "student", "teacher"]).set_index("")

    def __str__(self) -> str:
        return self.table.to_string(index_names=False)

    def _repr_html_(self) -> str:
        where = f"{self.tokens:,} tokens of {self.text.get('source') or 'a tensor of blocks'}"
        return html_table(self.table, "Evaluation", f"{where}, {self.seconds:.0f} s")

"""The stack as a picture: layers as columns in one row at any width, written as SVG in plain Python.

One renderer for all: what a kernel shows live, and what a page without one keeps, are the same text. Places are in per
cent of the width and sizes in pixels, so that 30 or 80 columns stand in one row and letters keep their size. Colours
reach 3:1 on white and on black, letters are in the page's own ink, and nothing is told by colour alone.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ildlab.drawing.columns import Column, Row

LEFT, WIDE = 7.5, 92.0  # per cent: where columns begin, and how far they reach
TOP, PLOT = 36, 150  # pixels: the lanes of signs, and the columns below them
DECADES = 3  # of the axis at most: what lies lower stands on its floor
RAMP = ("#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838")  # cividis: the same to colour-blind eyes
SIGNS = {"suggested": "▼", "tied": "≈", "removed": "×", "off": "○", "trained": "*"}
LEGEND = {
    "kept": "score, with its interval",
    "suggested": "▼ to be removed next",
    "tied": "≈ tied with it",
    "dropped": "left the race early, on so many sequences",
    "unscored": "not scored this time",
    "removed": "× removed",
    "off": "○ switched off",
    "trained": "* trained",
    "trains": "pulsing: trains now, with its distance to the teacher",
}
ROWS = "each row: an iteration, its scores from dark (could be spared) to light (vital), × what it removed"
CSS = """.ild{container-type:inline-size;width:100%;max-width:1800px;font:calc(12px*var(--s))/1.45 system-ui,sans-serif;
 color:var(--jp-ui-font-color1,var(--vscode-foreground,inherit))}
.ild svg{display:block;width:100%;overflow:visible}.ild text{fill:currentColor;font-size:calc(11px*var(--s))}
.ild .mid{text-anchor:middle}.ild .end{text-anchor:end}.ild .bold{font-weight:700}
.ild .grid{stroke:currentColor;stroke-opacity:.18}.ild .axis{stroke:#858585}
.ild .whisker{stroke:currentColor;stroke-width:calc(1.3px*var(--s));stroke-opacity:.8}
.ild .bar{transition:y .25s,height .25s;stroke:none}.ild .hit{fill:transparent}
.ild .kept .bar{fill:#0072B2}.ild .suggested .bar{fill:#D55E00;stroke:currentColor;stroke-width:1.5}
.ild .tied .bar,.ild .dropped .bar,.ild .off .bar{stroke-width:1.5}
.ild .tied .bar{stroke:#D55E00}.ild .dropped .bar{fill:#858585;fill-opacity:.35;stroke:#858585}
.ild .dropped .whisker{stroke-opacity:.35}.ild .unscored .bar{fill:#858585;fill-opacity:.35}.ild .off .bar{fill:none;stroke:currentColor;stroke-dasharray:3 3}
.ild .foot,.ild .key .trains .bar{fill:#009E73}.ild .lead{stroke:#D55E00;stroke-dasharray:2 3}.ild .off .id{text-decoration:line-through}
.ild .glow{fill:#D55E00;fill-opacity:.16}.ild .trains .bar{animation:ild 1.8s ease-in-out infinite}
@keyframes ild{50%{opacity:.45}}.ild .stale .cols{opacity:.5}.ild .undone{opacity:.45}.ild .cut{fill:none;stroke:#D55E00;stroke-width:1.5}
.ild figcaption,.ild .key{display:flex;flex-wrap:wrap;gap:0 1.2em;align-items:baseline}
.ild .key svg{display:inline-block;width:1em;height:1em;vertical-align:-.1em;margin-right:.35em}
@media (prefers-reduced-motion:reduce){.ild .bar{transition:none}.ild .trains .bar{animation:none;stroke:#009E73;stroke-width:3}}"""


@dataclass(frozen=True)
class Picture:
    """The stack, drawn by `html`: columns of scores, and the run's iterations below them."""

    columns: Sequence[Column]
    title: str = ""
    unit: str = ""  # of the scores, with the metric's name
    stale: str = ""  # since when the scores are no longer today's, in words; they are then dimmed
    probability: float | None = None  # that the suggested layer is the least important one
    rows: Sequence[Row] = ()

    def html(self, theme: str = "") -> str:
        """The picture as HTML without a script; `theme="lecture"` for the back of a room."""
        count = len(self.columns)
        name = f"p{zlib.crc32(repr(self.columns).encode()):08x}"  # the same picture is the same text
        frame = Frame(Axis.of(self.columns), WIDE / max(1, count), 1.6 if theme == "lecture" else 1.0, name)
        told = [f"<b>{escape(self.title)}</b>", escape(self.unit), escape(frame.axis.words)]
        told.append(f"<b>{escape(self.stale)}</b>")
        caption = "".join(f"<span>{words}</span>" for words in told if words not in ("", "<b></b>"))
        inner = f"<figcaption>{caption}</figcaption>{self._columns(frame)}{self._rows(frame)}{self._key(name)}"
        figure = f'<figure class="{"stale" * bool(self.stale)}" style="margin:0">{inner}</figure>'
        style = f"<style>{CSS}{_thinning(count, frame.s)}</style>"
        return f'<div class="ild n{count}" style="--s:{frame.s:g}">{style}{figure}</div>'

    def _columns(self, frame: Frame) -> str:
        body = "".join(_column(c, i, frame, self.probability) for i, c in enumerate(self.columns))
        said = f'role="list" aria-label="{escape(self.title or "layers", quote=True)}"'
        marks = f'{_pattern(frame.name)}{"".join(frame.axis.ticks(frame.s))}<g class="cols">{body}</g>'
        return f'<svg class="columns" height="{frame.base + 24 * frame.s:g}" {said}>{marks}</svg>'

    def _rows(self, frame: Frame) -> str:
        """A thin row an iteration, aligned with the columns; what was removed by then is cut out."""
        if not self.rows:
            return ""
        place = {c.layer_id: i for i, c in enumerate(self.columns)}
        out = "".join(_row(row, number, place, frame) for number, row in enumerate(self.rows))
        height = round((14 * len(self.rows) + 2) * frame.s)
        said = "one row an iteration, the first on top"
        return f'<svg class="rows" height="{height}" role="list" aria-label="{said}">{out}</svg>'

    def _key(self, name: str) -> str:
        """What colours and signs mean, of those that there are."""
        states = {c.state for c in self.columns if c.score is not None or c.state in ("unscored", "removed")}
        for mark in ("off", "trained", "trains"):
            states |= {mark for c in self.columns if getattr(c, mark)}
        fills = {"removed": f' fill="url(#{name}x)"', "tied": f' fill="url(#{name})"'}
        words = []
        for state in [state for state in LEGEND if state in states]:
            box = f'<rect class="bar" x="1" y="1" width="10" height="10"{fills.get(state, "")}/>'
            box = '<rect class="foot" y="8" width="12" height="4"/>' if state == "trained" else box
            words.append(f'<span class="{state}"><svg viewBox="0 0 12 12" aria-hidden="true">{box}</svg>')
            words.append(f"{LEGEND[state]}</span>")
        words += [f"<span>{ROWS}</span>"] * bool(self.rows)
        return f'<div class="key">{"".join(words)}</div>'


@dataclass(frozen=True)
class Frame:
    """Where columns stand: the axis, the width of one in per cent, pixels to a pixel, and a name for the patterns."""

    axis: Axis
    pitch: float
    s: float
    name: str

    @property
    def base(self) -> float:
        """Foot of the columns, in pixels from the top."""
        return (TOP + self.axis.height) * self.s

    def x(self, place: int, part: float = 0.0) -> float:
        """Per cent from the left to a part of a column."""
        return LEFT + (place + part) * self.pitch


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis with a floor: scores at or below it, 0 and less included, stand on it as stubs."""

    floor: float = 0.0
    top: float = 0.0
    clipped: bool = False  # whether there are such scores

    @classmethod
    def of(cls, columns: Sequence[Column]) -> Axis:
        """The axis that shows these; an empty one where there is no score above 0."""
        ends = [v for c in columns for v in (c.score, c.high) if c.score is not None and v is not None]
        ends = [v for v in ends if math.isfinite(v) and v > 0]
        if not ends:
            return cls(clipped=any(c.score is not None for c in columns))
        scores = [c.score for c in columns if c.score is not None and math.isfinite(c.score)]
        above = [v for v in scores if v > max(ends) / 10**DECADES] or ends
        floor = _round_down(min(above) / 1.3)
        return cls(floor, max(ends) * 1.05, any(not c.score > floor for c in columns if c.score is not None))

    def __bool__(self) -> bool:
        return self.top > 0

    @property
    def height(self) -> int:
        """Pixels of the plot: without scores the stack alone is drawn, low."""
        return PLOT if self or self.clipped else 30

    @property
    def words(self) -> str:
        """What has to be known to read it."""
        if not self:
            return "no score is above 0" if self.clipped else ""
        below = "; scores at or below that, 0 and less included, are stubs" if self.clipped else ""
        return f"log axis from {self.floor:g}{below}"

    def y(self, value: float) -> float:
        """Height above the floor, in pixels."""
        if not self or not value > self.floor:
            return 3.0
        return 3 + (self.height - 3) * math.log(min(value, self.top) / self.floor) / math.log(self.top / self.floor)

    def ticks(self, scale: float) -> Iterable[str]:
        """Lines across the plot, with their values."""
        base = (TOP + self.height) * scale
        yield f'<line class="axis" x1="{LEFT}%" x2="{LEFT + WIDE}%" y1="{base:g}" y2="{base:g}"/>'
        if not self:
            return
        first, last = math.floor(math.log10(self.floor)), math.ceil(math.log10(self.top))
        steps = (1, 2, 5) if math.log10(self.top / self.floor) < 1.5 else (1,)
        values = [m * 10.0**e for e in range(first, last + 1) for m in steps]
        for value in [v for v in values if self.floor * 1.15 < v <= self.top]:
            y = base - self.y(value) * scale
            yield f'<line class="grid" x1="{LEFT}%" x2="{LEFT + WIDE}%" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text class="end" x="{LEFT - 0.6}%" y="{y + 4 * scale:.1f}">{value:g}</text>'
        yield f'<text class="end" x="{LEFT - 0.6}%" y="{base + 4 * scale:.1f}">{"≤" * self.clipped}{self.floor:g}</text>'


def _column(c: Column, i: int, frame: Frame, probability: float | None) -> str:
    axis, s, base = frame.axis, frame.s, frame.base
    x, left, middle, width = frame.x(i), frame.x(i, 0.14), frame.x(i, 0.5), 0.72 * frame.pitch
    here, known = c.state != "removed", c.score is not None
    state = "off" if c.off and here else c.state
    h = (axis.y(c.score) if known else 4.0 if state == "unscored" else 12.0 if here else axis.height) * s
    out = [
        f"<title>{escape(c.words or f'layer {c.layer_id}')}</title>",
        _rect("hit", x, 19 * s, frame.pitch, base + 2 * s),
    ]
    if state == "suggested":
        out.append(_rect("glow", x, 20 * s, frame.pitch, base - 20 * s))
    pattern = {"tied": frame.name, "removed": f"{frame.name}x"}.get(state)
    out.append(_rect("bar", left, base - h, width, h, f"url(#{pattern})" if pattern else ""))
    top = base - h
    if known and c.low is not None and c.high is not None and c.high > c.low:
        low, top = base - axis.y(c.low) * s, base - axis.y(c.high) * s
        out.append(_line("whisker", middle, low, top))
        out += [_line("whisker", middle, y, y, 0.18 * frame.pitch) for y in (low, top)]
    if c.trained and here:
        out.append(_rect("foot", left, base + 1, width, 4 * s))
    if c.drift is not None:
        out.append(_text(f"{c.drift:.2g}", middle, 14 * s, "mid k1"))
    sign = str(c.n) if state == "dropped" else SIGNS.get(state, "")
    if sign:
        out.append(_text(sign, middle, 31 * s, f"mid {'k1' if state == 'dropped' else 'bold'}"))
    if state == "suggested":
        out.append(_line("lead", middle, 35 * s, top - 3))
        told = f"layer {c.layer_id}" + (f" · P {probability:.2f}" if probability is not None else "")
        out.append(_text(told, middle, 14 * s, ("end" if middle > 90 else "mid" if middle > 16 else "") + " bold"))
    often = "k10" if c.layer_id % 10 == 0 else "k5" if c.layer_id % 5 == 0 else "k1"
    look = f"mid id {often}{' bold' * (state == 'suggested')}"
    out.append(_text(f"{c.layer_id}{'*' * c.trained}", middle, base + 17 * s, look))
    return f'<g class="col {state}{" trains" * c.trains}" data-id="{c.layer_id}" role="listitem">{"".join(out)}</g>'


def _row(row: Row, number: int, place: dict[int, int], frame: Frame) -> str:
    s, width = frame.s, 0.94 * frame.pitch
    values = [v for v in row.scores.values() if v > 0]
    top = max(values, default=1.0)
    floor = max(min(values, default=0.1), top / 10**DECADES)
    span = math.log(top / floor) or 1.0
    y, cells = (14 * number + 3) * s, []
    for layer_id, value in row.scores.items():
        fill = "#858585" if math.isnan(value) else _ramp(math.log(max(value, floor) / floor) / span)
        cells.append(_rect("", frame.x(place[layer_id]), y, width, 10 * s, fill))
    at = frame.x(place[row.removed])
    cells.append(_rect("cut", at, y, width, 10 * s))
    cells.append(_text("×", at + width / 2, y + 9 * s, "mid bold"))
    label = _text(f"{'↶ ' * row.undone}−{row.removed}", LEFT - 0.6, y + 9 * s, "end")
    out = f"<title>{escape(row.words)}</title>{label}{''.join(cells)}"
    return f'<g class="row{" undone" * row.undone}" data-step="{row.step}" role="listitem">{out}</g>'


def _rect(look: str, x: float, y: float, width: float, height: float, fill: str = "") -> str:
    fill = f' fill="{fill}"' if fill else ""
    name = f' class="{look}"' if look else ""
    return f'<rect{name} x="{x:.2f}%" y="{y:.1f}" width="{width:.2f}%" height="{height:.1f}"{fill}/>'


def _text(words: str, x: float, y: float, look: str) -> str:
    return f'<text class="{look.strip()}" x="{x:.2f}%" y="{y:.1f}">{escape(words)}</text>'


def _line(look: str, x: float, y1: float, y2: float, half: float = 0.0) -> str:
    return f'<line class="{look}" x1="{x - half:.2f}%" x2="{x + half:.2f}%" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _ramp(part: float) -> str:
    """Colour of a share from 0 to 1 of the ramp."""
    at = min(max(part, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(at), len(RAMP) - 2)
    mixed = (
        round(int(a, 16) + (int(b, 16) - int(a, 16)) * (at - low))
        for a, b in ((RAMP[low][k : k + 2], RAMP[low + 1][k : k + 2]) for k in (1, 3, 5))
    )
    return "#" + "".join(f"{each:02x}" for each in mixed)


def _round_down(value: float) -> float:
    """The next lower of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return float(f"{max(m for m in (1, 2, 5) if m * power <= value * (1 + 1e-9)) * power:.3g}")


def _pattern(name: str) -> str:
    """Stripes of the tied, and the hatch of the removed."""
    box = 'patternUnits="userSpaceOnUse" width="6" height="6" patternTransform="rotate(45)"'
    return (
        f'<defs><pattern id="{name}" {box}><rect width="3" height="6" fill="#D55E00"/></pattern>'
        f'<pattern id="{name}x" {box}><rect width="1.5" height="6" fill="#858585" fill-opacity=".55"/></pattern></defs>'
    )


def _thinning(count: int, scale: float) -> str:
    """CSS that leaves out layer ids where they would touch: below a width every fifth, below another every tenth stays."""
    rules = []
    for kind, every in (("k1", 1), ("k5", 5)):
        width = round(19 * scale * count / every / (WIDE / 100))
        rules.append(f"@container (max-width:{width}px){{.n{count} .{kind}{{display:none}}}}")
    return "".join(rules)

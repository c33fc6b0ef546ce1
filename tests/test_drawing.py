"""The picture of the stack: one row at any width, a log axis with a floor, states by hue, sign and pattern."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ildlab.drawing.columns import Column, Row, columns_of
from ildlab.drawing.stack import Axis, Picture
from ildlab.importance.scores import LayerScores
from ildlab.plots.canvas import contrast


def race() -> LayerScores:
    """Of six layers 0 is vital and left the race after two sequences, 3 is the least, 4 cannot be told from it."""
    x = np.array([[9.0, 1.0, 2.0, 0.10, 0.11, 1.0], [8.0, 1.1, 2.1, 0.12, 0.11, 1.2], [np.nan, 1, 2, 0.11, 0.12, 1]])
    return LayerScores.from_samples("kl", "a text", range(6), x, np.ones(3), details={"dropped": {"0": 2}})


def states(html: str) -> dict[int, str]:
    return {int(i): look for look, i in re.findall(r'<g class="col ([\w ]+)" data-id="(\d+)"', html)}


def test_every_layer_has_a_column_in_one_row_at_any_width():
    for count in (1, 30, 80):
        html = Picture(columns_of(range(count))).html()
        assert list(states(html)) == list(range(count))
        ends = [
            float(x) + float(w) for x, w in re.findall(r'class="hit" x="([\d.]+)%" y="19.0" width="([\d.]+)%"', html)
        ]
        assert len(ends) == count and ends == sorted(ends) and ends[-1] <= 100
        assert "viewBox" not in html.partition('class="columns"')[2].partition("</svg>")[0]  # letters keep their size
    assert html.count("@container") == 2  # where ids would touch, every fifth or tenth stays


def test_states_are_told_by_more_than_colour():
    columns = columns_of(range(7), race(), here=range(6), trained=[5], off=[1])
    html = Picture(columns, probability=0.6).html()
    assert states(html) == dict(enumerate("dropped off kept suggested tied kept removed".split()))
    said = dict(enumerate(re.findall(r"<title>(.*?)</title>", html)))
    assert said[3].startswith("layer 3; depth 4 of 6; kl 0.11 [") and "number 1 of 6" in said[3]
    assert "to be removed next" in said[3] and "tied with the least important" in said[4]
    assert "n=2; number 6 of 6" in said[0] and "left the race early" in said[0] and "tied" not in said[0]
    assert "trained" in said[5] and "switched off" in said[1] and said[6] == "layer 6 (removed)"
    assert "layer 3 · P 0.60" in html and html.count('class="glow"') == 1
    for sign in (">▼<", ">≈<", ">×<", ">○<", ">5*<", ">2<"):  # of the dropped: on how many sequences
        assert sign in html, sign
    name = re.search(r'pattern id="(\w+)"', html)[1]
    assert f'fill="url(#{name})"' in html and f'fill="url(#{name}x)"' in html


def test_earlier_scores_suggest_nothing_and_are_dimmed():
    html = Picture(columns_of(range(6), race(), current=False), stale="from step 2").html()
    assert set(states(html).values()) == {"dropped", "kept"} and "from step 2" in html and 'class="stale"' in html


def test_the_axis_is_logarithmic_and_says_where_it_begins():
    axis = Axis.of([Column(i, score=s) for i, s in enumerate((10.0, 1.0, 0.1, -0.3, 0.0, float("nan")))])
    assert axis.floor == 0.05 and axis.clipped
    steps = np.diff([axis.y(v) for v in (0.1, 1.0, 10.0)])
    assert steps[0] == pytest.approx(steps[1])
    assert axis.y(-0.3) == axis.y(0.0) == axis.y(float("nan")) == axis.y(0.05) == 3 < axis.y(0.1)
    assert "from 0.05; scores at or below that, 0 and less included, are stubs" in axis.words
    # One score next to nothing does not stretch the axis: it stands on the floor.
    assert Axis.of([Column(0, score=1.0), Column(1, score=1e-9)]).floor > 1e-3
    whole = Axis.of([Column(0, score=1.0), Column(1, score=0.5)])
    assert not whole.clipped and "stubs" not in whole.words
    assert not Axis.of([Column(0, score=-1.0)]) and "no score is above 0" in Axis.of([Column(0, score=-1.0)]).words


def test_rows_are_aligned_with_the_columns_and_cut_out():
    rows = [
        Row(3, {i: float(i + 1) for i in range(6)}, 2, "step 3"),
        Row(5, dict.fromkeys((0, 1, 3), 1.0), 1, "<5>", True),
    ]
    html = Picture(columns_of(range(6)), rows=rows).html()
    first, second = html.split('<g class="row')[1:]
    hits = re.findall(r'class="hit" x="([\d.]+)%"', html)
    assert re.findall(r'<rect x="([\d.]+)%"', first) == hits
    assert re.findall(r'<rect x="([\d.]+)%"', second) == [hits[i] for i in (0, 1, 3)]
    assert 'data-step="3"' in first and f'class="cut" x="{hits[2]}%"' in first and "−2" in first
    assert second.startswith(" undone") and "&lt;5&gt;" in second
    colours = re.findall(r'fill="(#\w+)"', first)
    assert colours[0] == "#00224e" and colours[-1] == "#fee838" and len(set(colours)) == 6


def test_the_same_picture_is_the_same_text_and_lecture_is_larger():
    one, two = (Picture(columns_of(range(6), race()), "<b>").html() for _ in range(2))
    assert one == two and "&lt;b&gt;" in one and "<b><b>" not in one
    assert "--s:1.6" in Picture(columns_of(range(6))).html("lecture")


def test_colours_pass_three_to_one_on_both_grounds():
    html = Picture(columns_of(range(6), race())).html()
    for colour in {"#0072B2", "#D55E00", "#009E73", "#858585"}:
        assert colour in html
        for ground in ("#ffffff", "#111111"):
            assert contrast(colour, ground) >= 3, (colour, ground)


def test_layers_that_train_pulse_with_their_drift():
    html = Picture([Column(0), Column(1, trains=True, drift=0.123)]).html()
    assert states(html) == {0: "kept", 1: "kept trains"} and ">0.12<" in html
    assert "prefers-reduced-motion" in html


def test_scores_show_themselves_with_it():
    html = race()._repr_html_()
    assert states(html)[3] == "suggested" and "the numbers" in html

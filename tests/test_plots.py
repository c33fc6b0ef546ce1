"""Figures: what they draw is right, no pyplot, AA contrast in both themes, nothing told by colour alone."""

import dataclasses
import io
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ildlab import plots
from ildlab.evaluate.results import SuiteResult, TaskResult
from ildlab.importance.scores import LayerScores
from ildlab.plots import canvas

LIGHT, DARK = "#ffffff", "#111111"  # JupyterLab's --jp-layout-color0 in its two themes


def brightened(colour: str) -> tuple[float, ...]:
    """What CSS filter brightness() makes of a colour."""
    from matplotlib.colors import to_rgb

    return tuple(min(1.0, c * canvas.DARK_BRIGHTNESS) for c in to_rgb(colour))


def without(scores, *layer_ids):
    """The scores of a student that lacks these layers."""
    return dataclasses.replace(scores, table=scores.table.drop([*layer_ids]))


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    values = np.r_[0.95, 0.3, rng.uniform(0.02, 0.09, 8)]
    exact = LayerScores.exact("block_influence", "a text", range(10), values)
    return dataclasses.replace(exact, table=exact.table.assign(ci_low=values * 0.9, ci_high=values * 1.1, n=16))


def test_contrast_is_wcags():
    assert plots.contrast("#000", "#fff") == pytest.approx(21)
    assert plots.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the known near miss


def test_text_passes_aa_in_both_themes():
    assert plots.contrast(canvas.TEXT, LIGHT) >= 4.5
    assert plots.contrast(brightened(canvas.TEXT), DARK) >= 4.5
    # Where no style sheet applies (a dark GitHub page), still far above what marks need.
    assert plots.contrast(canvas.TEXT, DARK) >= 3.5


def test_marks_pass_three_to_one_in_both_themes():
    for colour in (*canvas.COLOURS, canvas.LINE):
        assert plots.contrast(colour, LIGHT) >= 3, colour
        assert plots.contrast(brightened(colour), DARK) >= 3, colour


def test_every_text_of_a_figure_is_in_the_tested_grey(scores):
    from matplotlib.colors import to_hex
    from matplotlib.text import Text

    ax = plots.importance(scores, tied=[4])
    ax.figure.draw_without_rendering()
    for text in ax.figure.findobj(Text):
        if text.get_text() and text.get_visible():
            assert to_hex(text.get_color()) == canvas.TEXT, text.get_text()


def test_importance_draws_the_scores_and_marks_the_least(scores):
    ax = plots.importance(scores, tied=[7])
    heights = [p.get_height() for p in ax.patches[:10]]
    assert heights == pytest.approx(scores.table["score"].tolist())
    least = scores.least_important
    assert ax.patches[least].get_hatch() and not ax.patches[(least + 1) % 10].get_hatch()
    texts = [t.get_text() for t in ax.texts]
    assert f"▼ {least}" in texts and "≈" in texts
    assert ax.get_xlabel() == "layer id" and "cosine" in ax.get_ylabel()
    assert ax.get_yscale() == "log"
    # A bar stands on something: the axis begins there, and says so.
    assert ax.get_ylim()[0] == 0.01 and ax.get_ylabel().endswith("log from 0.01")


def test_importance_takes_the_axes_given_and_hatches_what_is_gone(scores):
    figure = Figure()
    mine = figure.add_subplot()
    ax = plots.importance(without(scores, 4), chosen=9, ax=mine, removed=[11])
    assert ax is mine
    hatched = [p for p in ax.patches if p.get_hatch() == "xxx"]
    assert len(hatched) == 3  # 4 between the scored ones, 10 and 11 above them
    assert "▼ 9" in [t.get_text() for t in ax.texts]


def test_importance_with_negative_scores_is_linear():
    ax = plots.importance(LayerScores.exact("nll", "a text", range(3), [0.5, -0.01, 0.2]))
    assert ax.get_yscale() == "linear" and "nats/token" in ax.get_ylabel()


def test_no_scores_is_an_error_in_words():
    with pytest.raises(ValueError, match="measure first"):
        plots.importance_by_iteration([], [])


def test_importance_by_iteration_keeps_layer_ids(scores):
    runs = [scores, without(scores, 5), without(scores, 5, 9)]
    ax = plots.importance_by_iteration(runs, [5, 9])
    grid = ax.images[0].get_array()
    assert grid.shape == (3, 10)
    assert grid.mask.nonzero()[0].tolist() == [1, 2, 2] and grid.mask.nonzero()[1].tolist() == [5, 5, 9]
    assert len([p for p in ax.patches if p.get_hatch()]) == 3
    assert [t.get_position() for t in ax.texts] == [(5, 0), (9, 1)]


def test_a_layer_that_was_not_scored_is_not_drawn_as_removed(scores):
    """Layer 5 is gone; 4 and 9 are there, and were not on the shortlist."""
    short = dataclasses.replace(without(scores, 4, 5, 9), details={"unscored": [4, 9]})
    ax = plots.importance(short)
    assert len([p for p in ax.patches if p.get_hatch() == "xxx"]) == 1 and ax.get_xlim()[1] > 9
    assert "no bar: not scored" in [t.get_text() for t in ax.get_legend().get_texts()]
    picture = short.picture()
    assert {c.layer_id: c.state for c in picture.columns if c.state in ("removed", "unscored")} == {
        4: "unscored",
        5: "removed",
        9: "unscored",
    }
    assert "not scored this time" in picture.html() and "not scored this time" in picture.columns[4].words
    ax = plots.importance_by_iteration([scores, short], [5])
    marks = {p.get_hatch(): p.get_xy()[0] + 0.5 for p in ax.patches if p.get_hatch() == "xxxx"}
    assert marks == {"xxxx": 5} and sum(p.get_hatch() == ".." for p in ax.patches) == 2
    assert "dotted: not scored" in ax.get_xlabel()


@pytest.fixture
def kinds():
    """Of two kinds, layer 3 gone: prose (8 nats, least: 2) and copies (a hundredth of it, least: 5)."""
    x = np.array([[8.0, 9.0, 4.0, 8.0, 8.0], [10.0, 9.0, 4.0, 8.0, 8.0], [0.06, 0.08, 0.12, 1.6, 0.04]])
    ids, of = [0, 1, 2, 4, 5], ["prose", "prose", "copies"]
    return LayerScores.from_samples("kl", "a mix", ids, x, np.ones(3), kinds=of)


def test_importance_by_kind_is_each_kinds_own_over_its_median(kinds):
    ax = plots.importance_by_kind(kinds)
    grid = ax.images[0].get_array()
    assert grid.shape == (2, 6) and [t.get_text() for t in ax.get_yticklabels()] == ["prose", "copies"]
    assert np.argwhere(np.ma.getmaskarray(grid)).tolist() == [[0, 3], [1, 3]]
    assert len([p for p in ax.patches if p.get_hatch()]) == 2
    for row, kind in enumerate(("prose", "copies")):
        alone = kinds.of_kind(kind).table["score"]
        assert grid[row].compressed() == pytest.approx(alone.to_numpy() / alone.median())
    assert [(t.get_text(), t.get_position()) for t in ax.texts] == [("▼", (2, 0)), ("▼", (5, 1))]
    assert isinstance(ax.images[0].norm, LogNorm)  # copies range from 0.5 to 20 of their median
    figure = Figure()
    mine = figure.add_subplot()
    assert plots.importance_by_kind(kinds, mine) is mine


def test_a_kind_is_plain_text_whatever_it_is_called():
    x, of = [[1.0, 2.0, 4.0], [1.0, 2.0, 3.0]], ["$\\alpha$", r"$\no{$"]
    ax = plots.importance_by_kind(LayerScores.from_samples("kl", "a mix", range(3), x, np.ones(2), kinds=of))
    plots.to_png(ax)
    assert [t.get_text() for t in ax.get_yticklabels()] == of


def test_scores_of_one_kind_have_no_kinds_to_draw(scores):
    with pytest.raises(ValueError, match="no kinds of text"):
        plots.importance_by_kind(scores)


def test_the_unit_of_several_kinds_is_no_nats(kinds):
    unit = "kl, of each kind's median layer"
    assert plots.importance(kinds).get_ylabel().startswith(unit)
    assert "nats/token" in plots.importance(kinds.of_kind("copies")).get_ylabel()
    pair = plots.metric_scatter(kinds, kinds.of_kind("prose"))
    assert pair.get_xlabel() == unit and "nats/token" in pair.get_ylabel()


def test_loss_curves_keeps_kl_and_mse_apart():
    steps = np.arange(1, 41)
    history = pd.DataFrame(
        {
            "step": steps,
            "kl": np.exp(-steps / 9.0),
            "hidden": 11.0 / steps,
            "hidden_4": 2.0 / steps,
            "hidden_9": 9.0 / steps,
        }
    )
    left = plots.loss_curves(history)
    right = left.figure.axes[1]
    assert "KL" in left.get_ylabel() and "hidden" in right.get_ylabel()
    assert left.lines[0].get_ydata() == pytest.approx(history["kl"])
    assert {line.get_label() for line in right.lines if line.get_linewidth() > 1} == {"hidden 4", "hidden 9"}
    assert {line.get_linestyle() for line in right.lines} >= {"-", "--"}
    many = {f"hidden_{i}": np.full(40, float(i)) for i in range(1, 8)}
    drawn = plots.loss_curves(pd.DataFrame({"step": steps, "kl": history["kl"], **many})).figure.axes[1]
    looks = {
        (line.get_color(), line.get_linestyle(), line.get_label()) for line in drawn.lines if line.get_linewidth() > 1
    }
    assert len(looks) == len(many) and len({look[:2] for look in looks}) == len(many)
    one = plots.loss_curves(pd.DataFrame({"step": [1], "kl": [2.0]}))
    assert "not part" in one.figure.axes[1].texts[0].get_text()


def test_quality_is_that_before_and_after_distillation():
    table = pd.DataFrame(
        {
            "n_removed": [0, 1, 2, 3],
            "parameters": [134e6, 131e6, 127e6, None],
            "perplexity": [43.0, 45.0, 49.0, np.nan],
            "perplexity_pruned": [np.nan, 50.0, 52.0, 60.0],
            "perplexity_undistilled": [np.nan, 50.0, 58.0, np.nan],
        }
    )
    ax = plots.quality(table)
    before, after, teacher = ax.lines
    assert before.get_ydata().tolist() == [43, 50, 58, 60] and after.get_ydata().tolist() == [43, 45, 49]
    assert before.get_linestyle() != after.get_linestyle() and before.get_marker() != after.get_marker()
    assert teacher.get_ydata()[0] == 43
    assert ax.figure.axes == [ax] and not ax.patches  # parameters drown nothing: they stand below
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0\n134 M", "1\n131 M", "2\n127 M", "3"]
    # A history whose iterations were never evaluated after a distillation, nor its teacher.
    (pruned,) = plots.quality(table.assign(perplexity=np.nan)).lines
    assert pruned.get_ydata().tolist() == [50, 58, 60]


def test_task_bars_tell_which_changes_are_sure():
    def suite(same, worse):
        values = {"same": same, "worse": worse}
        tasks = {n: TaskResult(n, "choice", "accuracy", v, chance=0.5) for n, v in values.items()}
        return SuiteResult("two tasks", "x", tasks)

    half, most = [1.0, 0.0] * 20, [1.0] * 38 + [0.0] * 2
    ax = plots.task_bars({"teacher": suite(half, most), "pruned": suite(half, half), "student": suite(half, most)})
    assert [round(p.get_height(), 3) for p in ax.patches] == [0.5, 0.95, 0.5, 0.5, 0.5, 0.95]
    assert [t.get_text() for t in ax.texts] == ["+0.00○", "-0.45●", "+0.00○", "+0.00○"]
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"teacher", "pruned", "student"}
    assert len({p.get_hatch() for p in ax.patches}) == 3


def test_cells_lie_where_the_heatmap_is(kinds):
    ax = plots.importance_by_kind(kinds)
    found = plots.cells(ax, [["a"] * 6, ["b"] * 6])
    assert found["tips"] == [["a"] * 6, ["b"] * 6]  # its first row is on top
    left, top, right, bottom = found["box"]
    assert 0 < left < right < 1 and 0 < top < bottom < 1
    matrix = pd.DataFrame(np.eye(3) + 1, index=[0, 1, "out"], columns=[0, 1, "out"])
    assert plots.cells(plots.redundancy_heatmap(matrix), [["a"], ["b"], ["c"]])["tips"][0] == ["c"]


def test_a_lecture_has_larger_letters_and_lines(scores):
    sizes = []
    for theme in ("", "lecture"):
        ax = plots.importance(scores)
        plots.show(ax, "words", theme)
        sizes.append((ax.yaxis.label.get_size(), ax.figure.get_figwidth()))
    assert sizes[1][0] > 1.4 * sizes[0][0] and sizes[1][1] > sizes[0][1]
    assert "--s:1.6" in plots.stack(scores, theme="lecture")._repr_html_()


def test_the_stack_of_a_table_by_layer():
    table = pd.DataFrame({"drift": [0.0, 0.2, 0.1], "ci_low": 0.0, "ci_high": 0.3}, index=pd.Index([0, 2, "out"]))
    page = plots.stack(table, "Drift", unit="1 − cosine")._repr_html_()
    assert "<title>layer 1 (removed)" in page and "<title>layer 2; drift 0.2 [0, 0.3]" in page and "1 − cosine" in page


def test_png_is_transparent_and_twice_the_size(scores):
    from PIL import Image

    ax = plots.importance(scores)
    with Image.open(io.BytesIO(plots.to_png(ax))) as image:
        assert image.mode == "RGBA" and image.getpixel((0, 0))[3] == 0
        assert image.width == round(ax.figure.get_figwidth() * 200)


def test_html_escapes_the_alternative_text(scores):
    out = plots.to_html(plots.importance(scores), 'say "<b>hi</b>" & go')
    assert "&quot;&lt;b&gt;hi&lt;/b&gt;&quot; &amp; go" in out and "<b>" not in out


def test_save_writes_png_and_svg(tmp_path, scores):
    ax = plots.importance(scores)
    assert plots.save(ax, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in plots.save(ax, tmp_path / "a.svg").read_text()
    with pytest.raises(ValueError, match="png"):
        plots.save(ax, tmp_path / "a.bmp")


def test_pyplot_is_never_loaded():
    code = (
        "import sys\nfrom ildlab import plots\nfrom ildlab.importance.scores import LayerScores\n"
        "plots.to_png(plots.importance(LayerScores.exact('nll', 'a text', [0, 1], [1.0, 2.0])))\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Figures of hidden states and of rankings draw their data, label it, and tell nothing by colour alone."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from ildlab import plots
from ildlab.importance.scores import LayerScores
from ildlab.plots import canvas

L = 6
LABELS = pd.Index([*range(L), "out"], dtype=object)
TOKENS = ["$x$", " <b>", "\n", "héé"]


def matrix(seed=0):
    m = np.random.default_rng(seed).uniform(0.1, 0.9, (L + 1, L + 1))
    return pd.DataFrame((m + m.T) / 2, index=LABELS, columns=LABELS)


def triangle():
    full = np.random.default_rng(1).uniform(0.1, 0.9, (L, L))
    full[np.add.outer(np.arange(L), np.arange(L)) >= L] = np.nan
    return pd.DataFrame(full, index=range(1, L + 1), columns=range(L))


def drifted(factor=1.0, gone=(3,)):
    keep = [i for i in LABELS if i not in gone]
    values = np.array([0.0 if i != "out" and i <= min(gone) else 0.2 for i in keep]) * factor
    return pd.DataFrame(
        {"drift": values, "ci_low": values * 0.9, "ci_high": values * 1.1, "n": 8}, index=pd.Index(keep)
    )


def by_token():
    values = np.random.default_rng(2).uniform(0.1, 0.5, (L + 1, len(TOKENS)))
    values[:3] = 0
    table = pd.DataFrame(values, index=LABELS)
    table.attrs["tokens"] = TOKENS
    return table


def lens():
    rows = [
        {
            "model": who,
            "layer": layer,
            "position": t,
            "token": token,
            # The student's last layer is right about every next token, the others never are.
            "top": [TOKENS[(t + 1) % len(TOKENS)] if layer == "out" else "$wrong$", "other"],
            "entropy": 0.5 * t + (who == "teacher"),
        }
        for who in ("student", "teacher")
        for layer in LABELS
        for t, token in enumerate(TOKENS)
    ]
    return pd.DataFrame(rows)


def scores(values, metric="block_influence", layer_ids=None):
    return LayerScores.exact(metric, "a text", layer_ids or range(len(values)), values)


PUBLISHED = pd.DataFrame({"layer_id": range(9), "block_influence": [0.9, *np.linspace(0.05, 0.1, 7), 0.2]})
FIGURES = {
    "redundancy_heatmap": lambda ax: plots.redundancy_heatmap(matrix(), "cka", ax=ax),
    "block_triangle": lambda ax: plots.block_triangle(triangle(), ax=ax),
    "drift_by_layer": lambda ax: plots.drift_by_layer(drifted(0.5), drifted(), ax=ax),
    "token_drift_map": lambda ax: plots.token_drift_map(by_token(), ax=ax),
    "logit_lens_map": lambda ax: plots.logit_lens_map(lens(), ax=ax),
    "metric_scatter": lambda ax: plots.metric_scatter(scores([3, 1, 2]), scores([1, 2, 3], "nll"), ax=ax),
    "profile_beside": lambda ax: plots.profile_beside(scores([0.5, 0.1, 0.2]), PUBLISHED, ax=ax),
    "profiles": lambda ax: plots.profiles({"a": scores([3, 1, 2]), "b": scores([4, 1, 2, 2])}, "KL", ax=ax),
}


@pytest.mark.parametrize("name", FIGURES)
def test_it_draws_on_the_axes_given_or_its_own_and_labels_both(name):
    mine = Figure(figsize=(7, 5), layout="constrained").add_subplot()
    for ax in (FIGURES[name](mine), FIGURES[name](None)):
        assert ax.get_xlabel() and ax.get_ylabel()
        assert len(plots.to_png(ax)) > 3000
    assert FIGURES[name](mine) is mine


@pytest.mark.parametrize("name", FIGURES)
def test_every_text_reads_on_its_ground(name):
    ax = FIGURES[name](None)
    ax.figure.draw_without_rendering()
    in_cells = {t for t in ax.texts if t.get_color() in ("#000000", "#ffffff")}
    for text in ax.figure.findobj(Text):
        if text.get_text() and text.get_visible() and text not in in_cells:
            assert to_hex(text.get_color()) == canvas.TEXT, text.get_text()
    if in_cells:
        image = ax.images[0]
        grid = image.get_array()
        for text in in_cells:
            x, y = text.get_position()
            ground = image.cmap(image.norm(grid[int(y), int(x)]))
            assert plots.contrast(text.get_color(), ground) >= 4.5


def test_redundancy_has_numbers_in_few_cells():
    ax = plots.redundancy_heatmap(matrix(), "angular")
    assert len(ax.texts) == (L + 1) ** 2
    assert ax.texts[1].get_text() == f"{matrix().iloc[0, 1]:.2f}"
    assert [t.get_text() for t in ax.get_xticklabels()][-1] == "out"
    assert "π" in ax.figure.axes[-1].get_ylabel()


def test_many_layers_still_end_in_out():
    labels = [*range(31), "out"]
    ax = plots.redundancy_heatmap(pd.DataFrame(np.eye(32) + 1, index=labels, columns=labels))
    shown = [t.get_text() for t in ax.get_yticklabels()]
    assert shown[-1] == "out" and len(shown) <= 20 and not ax.texts


def test_the_least_of_each_row_of_the_triangle_is_marked():
    ax = plots.block_triangle(triangle())
    marks = ax.collections[0].get_offsets()
    assert marks[:, 1].tolist() == list(range(L))
    assert marks[:, 0].tolist() == np.nanargmin(triangle(), axis=1).tolist()


def test_drift_has_two_dashes_and_hatches_the_gap():
    ax = plots.drift_by_layer(drifted(0.5), drifted())
    before, after = ax.lines
    assert before.get_linestyle() != after.get_linestyle() and before.get_marker() != after.get_marker()
    assert after.get_xdata().tolist() == [0, 1, 2, 4, 5, 6]
    assert after.get_ydata().max() == pytest.approx(0.1)
    assert [p.get_x() + 0.4 for p in ax.patches if p.get_hatch()] == pytest.approx([3])
    assert len(plots.drift_by_layer(drifted()).lines) == 1
    # The last layer removed: its id is known only from `removed`.
    ax = plots.drift_by_layer(drifted(gone=(5,)), removed=[5])
    assert ax.lines[0].get_xdata().tolist() == [0, 1, 2, 3, 4, 6]


def test_token_map_labels_tokens_literally_and_hatches_what_did_not_move():
    ax = plots.token_drift_map(by_token())
    labels = ax.get_xticklabels()
    assert [t.get_text() for t in labels] == ["$x$", "␣<b>", "⏎", "héé"]
    assert not any(t.get_parse_math() for t in labels)
    assert sum(bool(p.get_hatch()) for p in ax.patches) == 3 * len(TOKENS)
    assert ax.images[0].get_array().shape == (L + 1, len(TOKENS))
    assert len(plots.to_png(plots.token_drift_map(by_token() * 0))) > 3000  # a student that is the teacher


def test_a_sink_does_not_stretch_the_colours_of_the_token_map():
    table = by_token()
    table.iloc[3:, 0] = 1e-6  # the first token hardly moves
    norm = plots.token_drift_map(table).images[0].norm
    rest = table.iloc[3:, 1:].to_numpy()
    assert norm.vmin == pytest.approx(rest.min()) and norm.vmax == pytest.approx(rest.max())
    table.iloc[4, 2] = 1e-8  # nor does any other stretch them beyond two decades
    assert plots.token_drift_map(table).images[0].norm.vmin == pytest.approx(table.to_numpy().max() / 100)


def test_lens_writes_the_top_token_and_frames_the_right_ones():
    ax = plots.logit_lens_map(lens(), layers=[0, 2, "out"], most=5)
    assert len(ax.texts) == 3 * len(TOKENS)
    assert ax.texts[0].get_text() == "$wrong$" and not ax.texts[0].get_parse_math()
    framed = [p for p in ax.patches if isinstance(p, Rectangle)]
    assert len(framed) == len(TOKENS) - 1  # of the last token nobody knows what follows
    assert {round(p.get_y() + 0.42) for p in framed} == {2}
    assert ax.images[0].norm.vmax == 5
    assert float(plots.logit_lens_map(lens(), "teacher").images[0].get_array()[0, 0]) == 1
    with pytest.raises(ValueError, match="teacher"):
        plots.logit_lens_map(lens().query("model == 'student'"), "teacher")


def test_scatter_gives_spearman_ids_and_marks_the_least():
    a, b = scores([0.1, 0.2, 0.3, 0.4]), scores([2.0, 1.0, 3.0, 4.0], "nll")
    ax = plots.metric_scatter(a, b)
    texts = [t.get_text() for t in ax.texts]
    assert texts[:4] == ["0", "1", "2", "3"] and "ρ = 0.80" in texts[4]
    assert sorted(ax.collections[1].get_offsets()[:, 0].tolist()) == [0.1, 0.2]
    assert "cosine" in ax.get_xlabel() and "NLL" in ax.get_ylabel()
    with pytest.raises(ValueError, match="fewer than 2"):
        plots.metric_scatter(a, scores([2.0, 1.0], "nll", [7, 8]))


def test_profiles_of_any_number_of_models():
    own = {f"m{k}": scores([4.0, 2.0, 1.0, 3.0], layer_ids=[0, 1, 5, 7]) for k in range(5)}
    ax = plots.profiles(own | {"published": pd.Series([1.0, 3.0, 5.0])}, "Block Influence")
    looks = {(line.get_color(), line.get_marker()) for line in ax.lines[:6]}
    assert len(looks) == 6 and ax.lines[0].get_ydata().tolist() == [1.6, 0.8, 0.4, 1.2]
    assert ax.lines[0].get_xdata().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [t.get_text() for t in ax.texts] == ["least: 5"] * 5 + ["least: 0"]


def test_profiles_lie_on_relative_depth():
    ax = plots.profile_beside(scores([0.5, 0.1, 0.2]), PUBLISHED)
    own, theirs = ax.lines
    assert own.get_xdata().tolist() == [0, 0.5, 1] and theirs.get_xdata()[-1] == 1
    assert own.get_marker() != theirs.get_marker()
    assert [t.get_text() for t in ax.texts] == ["least: 1", "least: 1"]

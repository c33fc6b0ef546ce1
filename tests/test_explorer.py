"""The explorer of the teaching notebooks, without a browser."""

from __future__ import annotations

import pytest
import torch

from ildlab.model.load import load_model
from ildlab.text.blocks import load_text
from ildlab.widgets.explorer import VIEWS, Explorer


@pytest.fixture
def explorer(tiny_folder, text_file):
    loaded = load_model(str(tiny_folder), dtype="float32", device="cpu")
    text = load_text(str(text_file), loaded.tokenizer, block=32, tokens=4 * 32)
    return Explorer(loaded, text, sentence="import os")


def test_metric_figure_sentence_and_layer(explorer):
    before = {p: t.clone() for p, t in explorer.layers.model.named_parameters()}
    seen = set()
    for metric in explorer.metric.options:
        explorer.metric.value = metric
        least = explorer.scores.least_important
        assert f"Importance by {metric}" in explorer.stack.picture
        assert f'class="col suggested" data-id="{least}"' in explorer.stack.picture
        assert explorer.stack.selected == [least] and f"by {metric}" in explorer.stack.status
        seen.add(explorer.stack.picture)
    assert len(seen) == len(explorer.metric.options)
    for kind in VIEWS:
        explorer.kind.value = kind
        assert 'alt="' in explorer.figure.html and len(explorer.figure.cells["tips"]) == 7
    lens = explorer.figure.html
    explorer.sentence.value = "def f(x): return x"
    assert explorer.figure.html != lens
    assert all(torch.equal(before[p], t) for p, t in explorer.layers.model.named_parameters())


def test_an_error_is_words_in_place_of_the_figure(explorer):
    explorer.kind.value = "logit lens"
    explorer.sentence.value = ""
    assert 'role="status"' in explorer.figure.html and "<img" not in explorer.figure.html
    assert explorer.figure.cells == {}
    explorer.sentence.value = "back again"
    assert "<img" in explorer.figure.html and 'role="status"' not in explorer.figure.html


def test_it_shows_itself_without_a_kernel(explorer):
    page = explorer._repr_html_()
    assert 'alt="' in page and '<svg class="columns"' in page


def test_a_lecture_is_larger(explorer, tiny_folder, text_file):
    loaded = load_model(str(tiny_folder), dtype="float32", device="cpu")
    text = load_text(str(text_file), loaded.tokenizer, block=32, tokens=4 * 32)
    other = Explorer(loaded, text, sentence="import os", theme="lecture")
    assert "--s:1.6" in other.stack.picture and "--s:1.6" not in explorer.stack.picture

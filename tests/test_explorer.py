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
    first = explorer.figure.value
    assert 'alt="block_influence of each layer' in first
    before = {p: t.clone() for p, t in explorer.stack.model.named_parameters()}
    seen = {first}
    for metric in explorer.metric.options:
        explorer.metric.value = metric
        assert f'alt="{metric} of each layer' in explorer.figure.value
        least = explorer.scores.least_important
        assert "▼" in explorer.strip.cells[least].description
        seen.add(explorer.figure.value)
    assert len(seen) == len(explorer.metric.options)
    for kind in VIEWS:
        explorer.kind.value = kind
        assert 'alt="' in explorer.figure.value and explorer.status.value == ""
    lens = explorer.figure.value
    explorer.sentence.value = "def f(x): return x"
    assert explorer.figure.value != lens
    explorer.strip.cells[3].click()
    assert "Layer 3:" in explorer.about.value and "of 6 from the least important" in explorer.about.value
    assert all(torch.equal(before[p], t) for p, t in explorer.stack.model.named_parameters())


def test_an_error_is_words_and_the_figure_stays(explorer):
    explorer.kind.value = "logit lens"
    figure = explorer.figure.value
    explorer.sentence.value = ""
    assert 'role="status"' in explorer.status.value and explorer.figure.value == figure
    explorer.sentence.value = "back again"
    assert explorer.status.value == "" and explorer.figure.value != figure


def test_it_shows_a_figure_without_a_kernel(explorer):
    assert 'alt="' in explorer._repr_html_()

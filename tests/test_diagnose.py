"""Failure signatures from an iteration table."""

from __future__ import annotations

import json

import pandas as pd

from ildlab.session import diagnosis
from ildlab.session.diagnosis import diagnose
from ildlab.session.session import PruningSession

NAN = float("nan")


def table(**columns):
    length = len(next(iter(columns.values())))
    return pd.DataFrame({"n_removed": range(length), "layer_id": [NAN, *range(20, 20 + length - 1)], **columns})


def names(found):
    return [(f.signature, f.n_removed) for f in found]


def test_a_healthy_run_has_no_findings():
    healthy = table(kl=[NAN, 0.1, 0.15, 0.2, 0.25], kl_pruned=[NAN, 0.3, 0.3, 0.4, 0.5], aggregate=[0.6] * 5)
    assert diagnose(healthy) == []
    assert diagnose(healthy.iloc[:1]) == []


def test_pruning_without_distillation(monkeypatch):
    rows = table(aggregate=[0.6, 0.54, 0.48, 0.42, 0.36, 0.29], kl_pruned=[NAN, 0.3, 0.6, 0.9, 1.2, 1.5])
    assert names(diagnose(rows)) == [("pruning without distillation", 5)]
    # The same figures after distillation are another matter, and three removals are too few to call it that.
    assert "pruning without distillation" not in {f.signature for f in diagnose(rows.assign(kl=rows.kl_pruned * 0.9))}
    # As a session's history has it: a student that was never distilled has an aggregate "as pruned".
    seen = diagnose(rows.rename(columns={"aggregate": "aggregate_pruned"}))
    assert names(seen) == [("pruning without distillation", 5)]
    monkeypatch.setattr(diagnosis, "AGGREGATE_FLOOR", 0.2)
    assert diagnose(rows) == []


def test_essential_layer_by_aggregate_and_by_kl():
    found = diagnose(table(aggregate=[0.6, 0.58, 0.4], kl=[NAN, 0.1, 0.3]))
    assert names(found) == [("essential layer", 2)]
    assert "layer 21" in found[0].seen
    assert names(diagnose(table(kl_pruned=[NAN, 0.2, 1.5], kl=[NAN, 0.1, 0.5]))) == [("essential layer", 2)]
    # Drops add up over removals; none of these is sharp alone.
    assert diagnose(table(aggregate=[0.6, 0.54, 0.48, 0.42])) == []


def test_no_recovery(monkeypatch):
    rows = table(kl_pruned=[NAN, 0.4, 0.6], kl=[NAN, 0.2, 0.58])
    found = diagnose(rows)
    assert names(found) == [("no recovery", 2)]
    assert "5%" in found[0].seen  # (0.60 - 0.58) / (0.60 - 0.20)
    monkeypatch.setattr(diagnosis, "RECOVERY", 0.01)
    assert diagnose(rows) == []


def test_a_session_that_never_distills_is_told_so(tmp_path, tiny_folder, text_file, monkeypatch):
    tasks = tmp_path / "tasks.jsonl"
    rows = [{"query": f"number {i} is", "choices": [f" {i}", f" {i + 1}"], "gold": i % 2} for i in range(8)]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    session = PruningSession.create(
        tmp_path / "run",
        str(tiny_folder),
        dtype="float32",
        text=str(text_file),
        block=32,
        calibration_tokens=64,
        train_tokens=64,
        eval_tokens=64,
        suite=f"file:{tasks}",
    )
    session.evaluate(speed=False)
    for layer_id in (1, 2, 3, 4):
        session.remove(layer_id)
        session.evaluate(speed=False)
    last = session.history().iloc[-1]
    assert last["aggregate_pruned"] == last["aggregate_pruned"] and last["aggregate"] != last["aggregate"]
    # No model scores above 1: whatever the random one scores counts as collapse here.
    monkeypatch.setattr(diagnosis, "AGGREGATE_FLOOR", 1.01)
    monkeypatch.setattr(diagnosis, "SHARP_DROP", 9.0)
    found = diagnose(session)
    assert names(found) == [("pruning without distillation", 4)]
    session.append(
        "failed", result={"error": "\nThe loss is not finite\nat step 3"}
    )  # a message that begins with no words
    assert diagnose(session)[-1].seen == "The loss is not finite"
    session.close()

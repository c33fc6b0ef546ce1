"""Bad input over the whole public API: a typed error that says what was wrong and what was expected, and nothing changed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from ildlab import plots
from ildlab.distill.config import DistillConfig
from ildlab.distill.train import distill
from ildlab.errors import IldlabError
from ildlab.evaluate.suites import load_suite, score_suite
from ildlab.evaluate.text_quality import evaluate
from ildlab.importance.agreement import rank_agreement
from ildlab.importance.dispatch import measure
from ildlab.importance.hidden_states import drift, logit_lens, redundancy, token_drift
from ildlab.model.load import load_model
from ildlab.model.stack import LayerStack
from ildlab.session.config import SessionConfig
from ildlab.session.loop import RunSettings
from ildlab.session.methods import compare_steps
from ildlab.session.session import PruningSession
from ildlab.session.whatif import what_if_steps
from ildlab.text.blocks import load_text


@pytest.fixture(scope="module")
def place(tmp_path_factory, loaded_tiny, small_settings, short_text):
    """A session, stacks, blocks and files of all kinds, that every bad input finds as the one before left them."""
    folder = tmp_path_factory.mktemp("bad")
    session = PruningSession.create(folder / "run", loaded_tiny, **small_settings)
    session.measure()
    session.remove(2)
    teacher = LayerStack(loaded_tiny.model)
    student = teacher.share(without=[2])
    for name, content in {
        "empty.txt": b"",
        "latin1.txt": "caf\xe9 na\xefve ".encode("latin-1") * 500,
        "broken.jsonl": b'{"text": "one"}\n{"text": \n',
        "columns.jsonl": b'{"a": "one", "b": "two"}\n' * 50,
        "suite.jsonl": b'{"question": "?"}\n',
        "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 10,
        "table.parquet": b"PAR1 and nothing that follows",
        "text.jsonl.gz": b"\x1f\x8b\x08 no gzip",
        "cut.gguf": b"GGUF\x03\x00\x00\x00",
        "no.gguf": b"hello",
    }.items():
        (folder / name).write_bytes(content)
    for name, content in {"empty": {}, "json": {"config.json": "{"}, "none": {"config.json": "{}"}}.items():
        (folder / name).mkdir()
        for file, text in content.items():
            (folder / name / file).write_text(text)
    (folder / "pickle").mkdir()
    (folder / "pickle" / "config.json").write_text(Path(loaded_tiny.name, "config.json").read_text())
    torch.save({"a": torch.ones(2)}, folder / "pickle" / "pytorch_model.bin")
    blocks = load_text(short_text, loaded_tiny.tokenizer, block=16, tokens=64)
    found = {"loaded": loaded_tiny, "tokenizer": loaded_tiny.tokenizer, "blocks": blocks, "text": str(short_text)}
    found |= {"settings": small_settings, "scores": session.latest_scores}
    yield SimpleNamespace(folder=folder, session=session, teacher=teacher, student=student, **found)
    session.close()


def state(place) -> list:
    """All that may not change: files, weights, layers."""
    files = {str(f): f.read_bytes() for f in sorted(place.folder.rglob("*")) if f.is_file()}
    stacks = (place.session.student, place.session.teacher, place.student, place.teacher)
    weights = [hashlib.sha256(b"".join(p.numpy().tobytes() for p in s.model.parameters())).digest() for s in stacks]
    shown = [(s.layer_ids, str(s.config), len(s.model._forward_hooks)) for s in stacks]
    grads = [any(p.requires_grad or p.grad is not None for p in s.model.parameters()) for s in stacks]
    return [files, weights, shown, grads, len(place.session.steps), place.session.journal.writable]


def model(p, name, **kwargs):
    return load_model(p.folder / name, **kwargs)


def text(p, source=None, **kwargs):
    return load_text(p.text if source is None else source, p.tokenizer, **{"block": 16, "tokens": 64, **kwargs})


def create(p, folder="new", teacher=None, **changes):
    teacher = p.loaded if teacher is None else teacher
    return PruningSession.create(p.folder / folder, teacher, **{**p.settings, **changes})


def learn(p, **changes):
    return distill(p.student, p.teacher, p.blocks, DistillConfig(**{"batch_size": 2, **changes}), gap=2)


# Name of the case: what is called, and words that the message must have.
BAD = {
    # ---- a model
    "model nowhere": (lambda p: load_model("no-such-model"), "Unknown model 'no-such-model'. Use .* folder"),
    "model no folder": (lambda p: model(p, "nowhere"), "no model folder"),
    "model empty folder": (lambda p: model(p, "empty"), "holds no config.json"),
    "model empty name": (lambda p: load_model(""), "name|model"),
    "model None": (lambda p: load_model(None), "None"),
    "model int": (lambda p: load_model(3), "'3'"),
    "model config no JSON": (lambda p: model(p, "json"), "no .safetensors|config"),
    "model pickle": (lambda p: model(p, "pickle"), "reads no pickled weights"),
    "model a file": (lambda p: model(p, "empty.txt"), "no model folder"),
    "gguf nowhere": (lambda p: model(p, "nowhere.gguf"), "no file"),
    "gguf cut": (lambda p: model(p, "cut.gguf"), "cut.gguf"),
    "gguf none": (lambda p: model(p, "no.gguf"), "no.gguf"),
    "dtype unknown": (lambda p: load_model(p.loaded.name, dtype="float31"), "'float31' is not a dtype.*'bfloat16'"),
    "dtype int": (lambda p: load_model(p.loaded.name, dtype="int8"), "not a dtype"),
    "dtype number": (lambda p: load_model(p.loaded.name, dtype=16), "not a dtype"),
    "device unknown": (lambda p: load_model(p.loaded.name, device="tpu9"), "not a device.*'cpu'"),
    "device number": (lambda p: load_model(p.loaded.name, device=1.5), "not a device"),
    "device none here": (lambda p: load_model(p.loaded.name, device="cuda:7"), "CUDA|cuda"),
    "load option unknown": (lambda p: load_model(p.loaded.name, layers=3), "layers"),
    "device map unknown": (lambda p: load_model(p.loaded.name, device_map="everywhere"), "everywhere|device_map"),
    # ---- a stack
    "stack of no model": (lambda p: LayerStack("model"), "give a causal LM"),
    "stack of no LM": (lambda p: LayerStack(torch.nn.Linear(2, 2)), "Linear"),
    "stack too few ids": (lambda p: LayerStack(p.loaded.model, [1, 2]), "6 decoder layers, but 2 layer ids"),
    "stack twice an id": (lambda p: LayerStack(p.loaded.model, [0, 0, 1, 2, 3, 4]), "layer ids"),
    "stack position": (lambda p: p.student.position(2), "Layer 2 is not in the student"),
    "stack without none such": (lambda p: p.student.without([9]).__enter__(), "Layer 9 is not in the student"),
    "stack without all": (lambda p: p.student.without(p.student.layer_ids).__enter__(), "leave at least one"),
    "stack without a word": (lambda p: p.student.without("all").__enter__(), "Layer '?[al]'? is not"),
    "stack remove none such": (lambda p: p.student.remove("x"), "Layer '?x'? is not"),
    "stack remove float": (lambda p: p.student.remove(0.5), "Layer 0.5 is not"),
    "stack own none such": (lambda p: p.student.own([2]), "Layer 2 is not"),
    "stack share without none such": (lambda p: p.teacher.share(without=[7]), "Layer 7 is not"),
    "stack ids beyond": (lambda p: p.student.hidden_states(torch.full((1, 4), 5000)), "no row in the model's embedding"),
    "stack ids negative": (lambda p: p.student.hidden_states(torch.full((1, 4), -1)), "id -1"),
    "stack too long": (lambda p: p.student.hidden_states(torch.ones(1, 300, dtype=torch.long)), "window is 256"),
    # ---- a text
    "text nowhere": (lambda p: text(p, p.folder / "nowhere.txt"), "nowhere.txt"),
    "text empty": (lambda p: text(p, p.folder / "empty.txt"), "empty"),
    "text latin1": (lambda p: text(p, p.folder / "latin1.txt"), "not UTF-8.*iconv"),
    "text broken rows": (lambda p: text(p, p.folder / "broken.jsonl"), "broken.jsonl .*row 2"),
    "text which column": (lambda p: text(p, p.folder / "columns.jsonl"), "text_column|column"),
    "text no column": (lambda p: text(p, p.folder / "columns.jsonl", text_column="c"), "'c'"),
    "text picture": (lambda p: text(p, p.folder / "picture.png"), "picture.png"),
    "text no parquet": (lambda p: text(p, p.folder / "table.parquet"), "table.parquet"),
    "text no gzip": (lambda p: text(p, p.folder / "text.jsonl.gz"), "text.jsonl.gz"),
    "text empty folder": (lambda p: text(p, p.folder / "empty"), "empty"),
    "text no name": (lambda p: text(p, ""), "text|source"),
    "text None": (lambda p: load_text(None, p.tokenizer), "None"),
    "text number": (lambda p: text(p, 7), "int"),
    "text empty list": (lambda p: text(p, []), "empty|no document"),
    "text list of numbers": (lambda p: text(p, [1, 2]), "1|texts|str"),
    "text mix weight": (lambda p: text(p, "mix*0+python-docs"), "weight|\\*0"),
    "text split": (lambda p: text(p, split="test"), "no split 'test'.*train"),
    "text split None": (lambda p: text(p, split=None), "split=None: it must be a text"),
    "text block 1": (lambda p: text(p, block=1), "block=1: .*at least 2"),
    "text block word": (lambda p: text(p, block="many"), "block='many': it must be a whole number"),
    "text block half": (lambda p: text(p, block=16.5), "block=16.5: it must be a whole number"),
    "text tokens few": (lambda p: text(p, tokens=3), "tokens=3 do not fill one block of 16"),
    "text tokens word": (lambda p: text(p, tokens="all"), "tokens='all': it must be a whole number"),
    "text seed word": (lambda p: text(p, seed="x"), "seed='x': it must be a whole number"),
    "text too short": (lambda p: text(p, ["one two"], block=128, tokens=None), "empty|too short"),
    "text column number": (lambda p: text(p, p.folder / "columns.jsonl", text_column=3), "no column '?3"),
    "text no tokenizer": (lambda p: load_text(p.text, None), "tokenizer"),
    # ---- measure
    "measure metric": (lambda p: measure(p.student, p.blocks, "magic"), "no metric 'magic'. Choose one of: block_influence"),
    "measure metric None": (lambda p: measure(p.student, p.blocks, None), "metric=None: it must be a text"),
    "measure metric list": (lambda p: measure(p.student, p.blocks, ["kl"]), "metric=\\['kl'\\]: it must be a text"),
    "measure option": (lambda p: measure(p.student, p.blocks, "nll", rase=True), "no option 'rase'. It has: .*race"),
    "measure other metric's": (lambda p: measure(p.student, p.blocks, "mse", race=True), "no option 'race'"),
    "measure race word": (lambda p: measure(p.student, p.blocks, "nll", race="maybe"), "race='maybe': it must be True or False"),
    "measure positions": (lambda p: measure(p.student, p.blocks, "nll", positions=0), "positions=0: it must be at least 1"),
    "measure layer": (lambda p: measure(p.student, p.blocks, "nll", layers=[0, 77]), "77"),
    "measure one layer": (lambda p: measure(p.student, p.blocks, "nll", layers=[1, 1]), "layers=.*at least two"),
    "measure layers of one pass": (lambda p: measure(p.student, p.blocks, layers=[0, 1]), "no option 'layers'"),
    "measure medians": (lambda p: measure(p.student, p.blocks, "nll", medians={"prose": 0}), "'prose' is 0.*above 0"),
    "measure batch": (lambda p: measure(p.student, p.blocks, batch_size=-2), "batch_size=-2: it must be at least 1"),
    "measure batch word": (lambda p: measure(p.student, p.blocks, batch_size="big"), "batch_size='big'"),
    "measure confidence": (lambda p: measure(p.student, p.blocks, confidence=95), "confidence=95.*from 0.5"),
    "measure tie": (lambda p: measure(p.student, p.blocks, "nll", tie=-1), "tie=-1"),
    "measure tie nan": (lambda p: measure(p.student, p.blocks, "nll", tie=float("nan")), "tie=nan"),
    "measure seed": (lambda p: measure(p.student, p.blocks, seed=-1), "seed=-1"),
    "measure memory": (lambda p: measure(p.student, p.blocks, max_branch_bytes=0), "max_branch_bytes=0"),
    "measure no teacher": (lambda p: measure(p.student, p.blocks, "kl"), "give teacher="),
    "measure no suite": (lambda p: measure(p.student, None, "task", tokenizer=p.tokenizer), "needs a suite"),
    "measure no tokenizer": (lambda p: measure(p.student, None, "task", suite="mini7"), "needs the tokenizer"),
    "measure suite unknown": (lambda p: measure(p.student, None, "task", suite="mini77", tokenizer=p.tokenizer), "no suite 'mini77'"),
    "measure limit": (lambda p: measure(p.student, None, "task", suite="mini7", limit=0, tokenizer=p.tokenizer), "limit=0"),
    "measure tokenizer": (lambda p: measure(p.student, p.blocks, "nll", tokenizer=p.tokenizer), "tokenizer="),
    "measure no blocks": (lambda p: measure(p.student, None), "None|blocks"),
    "measure text": (lambda p: measure(p.student, "some text"), "str|text|blocks"),
    "measure one row": (lambda p: measure(p.student, p.blocks.tokens[:1]), "1 sequence"),
    "measure floats": (lambda p: measure(p.student, torch.rand(4, 8)), "int|float"),
    "measure one dim": (lambda p: measure(p.student, torch.ones(8, dtype=torch.long)), "\\[N, T\\]|shape"),
    "measure mask": (lambda p: measure(p.student, {"input_ids": torch.ones(4, 8, dtype=torch.long), "attention_mask": torch.ones(4, 7)}), "mask"),
    "measure mask of none": (lambda p: measure(p.student, {"input_ids": torch.ones(4, 8, dtype=torch.long), "attention_mask": torch.zeros(4, 8)}, "nll"), "token"),
    "measure no stack": (lambda p: measure(p.loaded.model, p.blocks), "student is a LlamaForCausalLM: it must be a LayerStack"),
    "measure ids beyond": (lambda p: measure(p.student, torch.full((4, 8), 999)), "no row in the model's embedding"),
    # ---- hidden states
    "drift kind": (lambda p: drift(p.student, p.teacher, p.blocks, "euclid"), "euclid"),
    "redundancy kind": (lambda p: redundancy(p.student, p.blocks, "euclid"), "euclid"),
    "lens top": (lambda p: logit_lens(p.student, "def f", p.tokenizer, top=0), "top=0"),
    "lens no text": (lambda p: logit_lens(p.student, "", p.tokenizer), "empty|token"),
    "token drift no text": (lambda p: token_drift(p.student, p.teacher, "", p.tokenizer), "empty|token"),
    "token drift no tokenizer": (lambda p: token_drift(p.student, p.teacher, "def f"), "tokenizer"),
    "agreement of one": (lambda p: rank_agreement({"a": p.scores}), "two|2"),
    "agreement k": (lambda p: rank_agreement({"a": p.scores, "b": p.scores}, k=0), "k=0"),
    # ---- distill
    "distill scope": (lambda p: learn(p, scope="windw(2)"), "scope='windw\\(2\\)': choose"),
    "distill scope window": (lambda p: learn(p, scope="window(0)"), "window\\(0\\)"),
    "distill scope ids": (lambda p: learn(p, scope=(2,)), "2"),
    "distill scope no ids": (lambda p: learn(p, scope=()), "scope"),
    "distill divergence": (lambda p: learn(p, divergence="kl"), "divergence='kl': it must be one of 'forward_kl'"),
    "distill temperature": (lambda p: learn(p, temperature=0), "temperature"),
    "distill weight": (lambda p: learn(p, kl_weight=-1), "kl_weight=-1.*negative"),
    "distill weights": (lambda p: learn(p, kl_weight=0, hidden_weight=0), "nothing to learn from"),
    "distill rate": (lambda p: learn(p, learning_rate=0), "learning_rate=0.*above 0"),
    "distill rate nan": (lambda p: learn(p, learning_rate=float("nan")), "learning_rate=nan"),
    "distill rate word": (lambda p: learn(p, learning_rate="fast"), "learning_rate='fast': it must be a number"),
    "distill schedule": (lambda p: learn(p, schedule="cosin"), "schedule='cosin'.*'cosine'"),
    "distill warmup": (lambda p: learn(p, warmup=2), "warmup=2.*from 0 to 1"),
    "distill clip": (lambda p: learn(p, clip=0), "clip=0"),
    "distill batch": (lambda p: learn(p, batch_size=0), "batch_size=0"),
    "distill micro": (lambda p: learn(p, micro_batch=0), "micro_batch=0"),
    "distill tokens": (lambda p: learn(p, tokens=1.5), "tokens=1.5: it must be a whole number"),
    "distill local": (lambda p: learn(p, local_tokens=-1), "local_tokens=-1"),
    "distill positions": (lambda p: learn(p, kl_positions=0), "kl_positions=0"),
    "distill checkpoint": (lambda p: learn(p, checkpoint_every=0), "checkpoint_every=0"),
    "distill paper": (lambda p: learn(p, reduction="paper", temperature=2), "to the letter"),
    "distill bool": (lambda p: learn(p, tokens=True), "tokens=True"),
    "distill same model": (lambda p: distill(p.teacher, p.teacher, p.blocks, gap=2), "same model"),
    "distill no gap": (lambda p: distill(p.student, p.teacher, p.blocks), "gap"),
    "distill gap there": (lambda p: distill(p.student, p.teacher, p.blocks, gap=3), "3"),
    "distill gap word": (lambda p: distill(p.student, p.teacher, p.blocks, gap="two"), "gap='two': it must be"),
    "distill config dict": (lambda p: distill(p.student, p.teacher, p.blocks, {"tokens": 4}, gap=2), "config is a dict: it must be a DistillConfig"),
    "distill no text": (lambda p: distill(p.student, p.teacher, None, gap=2), "None|blocks"),
    # ---- evaluate, suites
    "evaluate no text": (lambda p: evaluate(p.student, p.teacher, None), "None|blocks"),
    "evaluate one token": (lambda p: evaluate(p.student, p.teacher, torch.ones(2, 1, dtype=torch.long)), "one token|2 tokens|token"),
    "evaluate batch": (lambda p: evaluate(p.student, p.teacher, p.blocks, batch_size=0), "batch_size=0"),
    "evaluate batch word": (lambda p: evaluate(p.student, p.teacher, p.blocks, batch_size="x"), "batch_size='x'"),
    "evaluate suite": (lambda p: evaluate(p.student, p.teacher, p.blocks, suite="mini77", tokenizer=p.tokenizer), "no suite 'mini77'"),
    "evaluate no tokenizer": (lambda p: evaluate(p.student, p.teacher, p.blocks, suite="mini7"), "needs the tokenizer"),
    "suite unknown": (lambda p: load_suite("mini77"), "no suite 'mini77'"),
    "suite None": (lambda p: load_suite(None), "None"),
    "suite number": (lambda p: load_suite(7), "not int"),
    "suite empty": (lambda p: load_suite(""), "suite"),
    "suite no file": (lambda p: load_suite(f"file:{p.folder}/nowhere.jsonl"), "nowhere.jsonl"),
    "suite rows": (lambda p: load_suite(f"file:{p.folder}/suite.jsonl"), "suite.jsonl"),
    "suite @": (lambda p: load_suite("mini7@0"), "0"),
    "suite @ word": (lambda p: load_suite("mini7@few"), "mini7@few"),
    "suite limit": (lambda p: load_suite("mini7", limit=-1), "limit=-1"),
    "suite limit word": (lambda p: load_suite("mini7", limit="few"), "limit='few'"),
    "score suite": (lambda p: score_suite(p.student, None, "mini7@2"), "tokenizer"),
    # ---- create, open
    "create no name": (lambda p: PruningSession.create("", p.loaded), "no name"),
    "create None": (lambda p: PruningSession.create(None, p.loaded), "None"),
    "create nobody": (lambda p: PruningSession.create("~nobody-of-that-name/run", p.loaded), "nobody-of-that-name"),
    "create NUL": (lambda p: PruningSession.create("run\0", p.loaded), "run"),
    "create there": (lambda p: create(p, "run"), "already holds a run"),
    "create in use": (lambda p: create(p, "pickle"), "choose another folder"),
    "create on a file": (lambda p: create(p, "empty.txt"), "not an empty folder"),
    "create in a file": (lambda p: create(p, "empty.txt/run"), "empty.txt"),
    "create teacher": (lambda p: create(p, teacher="no-such-model"), "Unknown model"),
    "create teacher None": (lambda p: PruningSession.create(p.folder / "new", None), "None"),
    "create setting": (lambda p: create(p, layers=3), "has no 'layers'"),
    "create block": (lambda p: create(p, block=1), "block=1|at least 2"),
    "create block window": (lambda p: create(p, block=1024, calibration_tokens=4096, train_tokens=4096, eval_tokens=4096), "window is 256"),
    "create tokens": (lambda p: create(p, train_tokens=10), "train_tokens is 10: give at least"),
    "create tokens word": (lambda p: create(p, eval_tokens="many"), "eval_tokens='many'"),
    "create metric": (lambda p: create(p, metric="magic"), "no metric 'magic'"),
    "create measure": (lambda p: create(p, measure={"rase": True}), "no option 'rase'"),
    "create measure of some layers": (lambda p: create(p, measure={"layers": [1, 2]}), "shortlist"),
    "create measure word": (lambda p: create(p, measure="race"), "measure='race': it must be a mapping"),
    "create distill": (lambda p: create(p, distill={"scope": "al"}), "scope='al'"),
    "create distill list": (lambda p: create(p, distill=[1]), "distill=\\[1\\]: it must be a mapping"),
    "create distill ids": (lambda p: create(p, distill={"scope": [11]}), "no layers \\[11\\]"),
    "create suite": (lambda p: create(p, suite="mini77"), "no suite 'mini77'"),
    "create task": (lambda p: create(p, metric="task"), "needs a suite"),
    "create seed": (lambda p: create(p, seed=-1), "seed=-1"),
    "create seed word": (lambda p: create(p, seed="one"), "seed='one'"),
    "create dtype": (lambda p: create(p, weights_dtype="int8"), "weights_dtype='int8'"),
    "create processes": (lambda p: create(p, processes=0), "processes=0"),
    "create processes uneven": (lambda p: create(p, processes=3), "share batch_size=2 evenly"),
    "create text": (lambda p: create(p, text="nowhere.txt"), "nowhere.txt"),
    "create text empty": (lambda p: create(p, text=" "), "text=' '"),
    "create eval text": (lambda p: create(p, eval_text=str(p.folder / "nowhere.txt")), "nowhere.txt"),
    "create column": (lambda p: create(p, text=str(p.folder / "columns.jsonl"), text_column="c"), "'c'"),
    "open nowhere": (lambda p: PruningSession.open(p.folder / "nowhere"), "holds no run"),
    "open empty": (lambda p: PruningSession.open(p.folder / "empty"), "holds no run"),
    "open no run": (lambda p: PruningSession.open(p.folder / "none"), "config.json"),
    "open no JSON": (lambda p: PruningSession.open(p.folder / "json"), "not JSON"),
    "open a file": (lambda p: PruningSession.open(p.folder / "empty.txt"), "holds no run"),
    "open None": (lambda p: PruningSession.open(None), "None"),
    "settings teacher": (lambda p: SessionConfig.of("", {}), "teacher=''"),
    "settings max_loss": (lambda p: RunSettings(max_loss=1.5), "max_loss=1.5"),
    "settings target": (lambda p: RunSettings(target_layers="few"), "target_layers='few'"),
    "settings final": (lambda p: RunSettings(4, final={"scop": 1}), "scop"),
    # ---- a session
    "session measure": (lambda p: p.session.measure("magic"), "no metric 'magic'"),
    "session measure option": (lambda p: p.session.measure(positions=-1), "positions=-1"),
    "session remove gone": (lambda p: p.session.remove(2), "Layer 2 is not in the student"),
    "session remove unmeasured": (lambda p: p.session.remove(), "measure\\(\\) first"),
    "session remove word": (lambda p: p.session.remove("third"), "layer_id='third': it must be a whole number"),
    "session remove float": (lambda p: p.session.remove(3.7), "layer_id=3.7: it must be a whole number"),
    "session remove bool": (lambda p: p.session.remove(True), "layer_id=True: it must be a whole number"),
    "session remove list": (lambda p: p.session.remove([3]), "layer_id=\\[3\\]: it must be a whole number"),
    "session undo none such": (lambda p: p.session.undo(to=99), "no step 99"),
    "session undo negative": (lambda p: p.session.undo(to=-1), "no step -1"),
    "session undo word": (lambda p: p.session.undo(to="first"), "to='first': it must be a whole number"),
    "session undo float": (lambda p: p.session.undo(to=0.5), "to=0.5: it must be a whole number"),
    "session student at": (lambda p: p.session.student_at(99), "no step 99"),
    "session scores at": (lambda p: p.session.scores_at(0), "not a measure"),
    "session branch there": (lambda p: p.session.branch(p.session.folder), "already holds a run"),
    "session branch step": (lambda p: p.session.branch(p.folder / "new", 99), "no step 99"),
    "session branch word": (lambda p: p.session.branch(p.folder / "new", "last"), "step='last': it must be a whole number"),
    "session branch no name": (lambda p: p.session.branch(""), "'' cannot be a path .it is empty"),
    "session distill": (lambda p: p.session.distill(scope="everything"), "scope='everything'"),
    "session distill field": (lambda p: p.session.distill(rate=1), "no 'rate'"),
    "session distill config": (lambda p: p.session.distill({"tokens": "x"}), "config is a dict: it must be a DistillConfig"),
    "session distill gap": (lambda p: p.session.distill(gap=[3]), "gap=\\[3\\]"),
    "session distill gap number": (lambda p: p.session.distill(gap=3), "gap=3: it must be a list"),
    "session distill processes": (lambda p: p.session.distill(processes=0), "processes=0"),
    "session distill processes word": (lambda p: p.session.distill(processes="two"), "processes='two'"),
    "session distill text": (lambda p: p.session.distill(text="nowhere.txt"), "nowhere.txt"),
    "session evaluate": (lambda p: p.session.evaluate("mini77"), "no suite 'mini77'"),
    "session evaluate batch": (lambda p: p.session.evaluate(batch_size=0), "batch_size=0"),
    "session export in use": (lambda p: p.session.export(p.folder / "pickle"), "not an empty folder"),
    "session export on a file": (lambda p: p.session.export(p.folder / "empty.txt"), "not an empty folder"),
    "session export in a file": (lambda p: p.session.export(p.folder / "empty.txt" / "out"), "empty.txt"),
    "session export no name": (lambda p: p.session.export(""), "'' cannot be a path .it is empty"),
    "session export None": (lambda p: p.session.export(None), "None"),
    "session run": (lambda p: p.session.run(), "when to stop"),
    "session run up": (lambda p: p.session.run(9), "target_layers is 9"),
    "session run zero": (lambda p: p.session.run(0), "target_layers is 0"),
    "session run word": (lambda p: p.session.run("four"), "target_layers='four'"),
    "session run loss": (lambda p: p.session.run(max_loss=0), "max_loss=0"),
    "session run suite": (lambda p: p.session.run(3, suite="mini77"), "no suite 'mini77'"),
    "session run final": (lambda p: p.session.run(3, final={"tokens": -1}), "tokens=-1"),
    "session history word": (lambda p: p.session.history("x"), "no step 'x'"),
    "session history": (lambda p: p.session.history(99), "no step 99"),
    "session generate nothing": (lambda p: p.session.generate(""), "empty"),
    "session generate long": (lambda p: p.session.generate("def " * 300), "window of 256"),
    "session generate tokens": (lambda p: p.session.generate("def", tokens=0), "tokens=0"),
    "session generate who": (lambda p: p.session.generate("def", who="nobody"), "who='nobody': it must be one of 'student', 'teacher'"),
    "session text split": (lambda p: p.session.text("test"), "split='test': it must be one of 'calibration'"),
    "what if nothing": (lambda p: [*what_if_steps(p.session, "")], "empty"),
    "what if off": (lambda p: [*what_if_steps(p.session, "def", [2])], "Layer 2 is not"),
    "what if all off": (lambda p: [*what_if_steps(p.session, "def", p.session.student.layer_ids)], "leave at least one"),
    "what if tokens": (lambda p: [*what_if_steps(p.session, "def", tokens=0)], "tokens=0"),
    "what if blocks": (lambda p: [*what_if_steps(p.session, "def", blocks=0)], "blocks=0"),
    "compare methods": (lambda p: [*compare_steps(p.folder / "new", p.loaded, methods=["best"])], "best"),
    # ---- plots
    "plot chosen": (lambda p: plots.importance(p.scores, 99), "chosen=99: these scores are of layers"),
    "plot no scores": (lambda p: plots.importance(None), "measure first"),
    "plot kind": (lambda p: p.scores.of_kind("prose"), "prose"),
    "plot metrics of others": (lambda p: plots.metric_scatter(p.scores, None), "measure first"),
    "plot iterations": (lambda p: plots.importance_by_iteration([p.scores], [1, 2, 3]), "3 removed layers for 1 iterations"),
    "plot lens who": (lambda p: plots.logit_lens_map(logit_lens(p.student, "def f", p.tokenizer), who="nobody"), "nobody"),
    "plot heat kind": (lambda p: plots.redundancy_heatmap(pd.DataFrame()), "empty"),
    "plot no losses": (lambda p: plots.loss_curves(pd.DataFrame()), "no 'step', 'kl': give a session's losses"),
    "plot no quality": (lambda p: plots.quality(pd.DataFrame()), "no 'n_removed'.*history"),
    "plot save where": (lambda p: plots.save(plots.importance(p.scores), p.folder / "empty.txt" / "a.png"), "empty.txt"),
    "plot save kind": (lambda p: plots.save(plots.importance(p.scores), p.folder / "a.doc"), "doc"),
    "plot theme": (lambda p: plots.stack(p.scores, theme="pink"), "pink"),
    "plot stack of none": (lambda p: plots.stack(None), "NoneType.*measure first"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_words_and_changes_nothing(place, name):
    call, words = BAD[name]
    before = state(place)
    with pytest.raises(IldlabError, match=f"(?s){words}"):
        call(place)
    assert state(place) == before

"""What others made is data: no code of a checkpoint runs, nothing is unpickled, names and texts stay text in the browser."""

from __future__ import annotations

import ast
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from ildlab import plots
from ildlab.errors import IldlabError, ModelError
from ildlab.model.load import LoadedModel, load_model
from ildlab.session.picture import picture_of
from ildlab.session.session import PruningSession
from ildlab.session.story import header_html
from ildlab.session.tables import history_html
from ildlab.session.whatif import WhatIf, what_if_steps

ROOT = Path(__file__).parent.parent

# ---- code --------------------------------------------------------------------------------------------------

EVIL = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
"""


@pytest.fixture
def evil(tiny_folder, tmp_path):
    """A checkpoint that brings code for its config, its model and its tokenizer, which leaves a mark when it runs."""
    folder, marker = tmp_path / "evil", tmp_path / "ran"
    shutil.copytree(tiny_folder, folder)
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    for file, mapped in {
        "config.json": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
    }.items():
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {"auto_map": mapped}))
    return folder, marker


def test_code_that_comes_with_a_known_model_is_not_run(evil):
    folder, marker = evil
    assert type(load_model(folder).model).__module__.startswith("transformers.")
    assert not marker.exists()


def test_a_model_that_needs_its_own_code_is_refused(evil):
    folder, marker = evil
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"model_type": "evil"}))
    with pytest.raises(ModelError, match="evil"):
        load_model(folder)
    assert not marker.exists()


@pytest.mark.parametrize("option", ["trust_remote_code", "use_safetensors"])
def test_nobody_can_ask_for_it(evil, option):
    folder, marker = evil
    with pytest.raises(ModelError, match=f"{option}.*never"):
        load_model(folder, **{option: option == "trust_remote_code"})
    assert not marker.exists()


def test_the_library_unpickles_and_evaluates_nothing():
    """One exception: several processes hand on their own task, in a folder that only this user can read."""
    found = []
    for path in sorted((ROOT / "ildlab").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [
                    (path.name, name) for name in names if name.split(".")[0] in ("pickle", "dill", "cloudpickle")
                ]
            elif isinstance(node, ast.Call):
                call, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                odd = call in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "pd.read_pickle", "os.system")
                odd |= options.get("shell") == "True" or options.get("allow_pickle") == "True"
                odd |= options.get("trust_remote_code", "False") != "False" or options.get("weights_only") == "False"
                found += [(path.name, call)] * odd
    assert found == [("processes.py", "torch.load")]


def test_jupyter_stays_on_this_machine_behind_its_token():
    """JupyterLab listens to localhost alone and asks for a token, unless it is told otherwise."""
    (started,) = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if "jupyterlab" in line and "-m" in line
    ]
    assert not [word for word in ("ip=", "token", "password", "allow", "0.0.0.0") if word in started]


# ---- the browser -------------------------------------------------------------------------------------------

NAME = "\"><img src=x onerror=evil()>' onload='evil()"


class Page(HTMLParser):
    """Notes what a browser would see in a page of names and texts that want to be more than that."""

    def __init__(self, page: str):
        super().__init__()
        self.odd, self.texts = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.odd += [tag] * (tag in ("script", "iframe") or (tag == "img" and ("src", "x") in attrs))
        self.odd += [name for name, _ in attrs if name.startswith("on")]
        self.texts += [value or "" for _, value in attrs]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def told(self) -> str:
        return " ".join(self.texts)


@pytest.fixture(scope="module")
def named(tmp_path_factory, loaded_tiny, short_text, small_settings):
    """A run whose folder, teacher, text and suite are all called so."""
    folder = tmp_path_factory.mktemp("names")
    shutil.copyfile(short_text, folder / f"{NAME}.txt")
    rows = [{"query": f"{NAME} {n}", "choices": [f"a {NAME}", "b"], "gold": n % 2} for n in range(4)]
    (folder / f"{NAME}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = LoadedModel(loaded_tiny.model, loaded_tiny.tokenizer, NAME)
    changes = {"text": str(folder / f"{NAME}.txt"), "suite": f"file:{folder}/{NAME}.jsonl"}
    session = PruningSession.create(folder / NAME, teacher, **{**small_settings, **changes})
    session.measure()
    session.remove(2)
    result = session.distill()
    found = session.evaluate(canaries=False, speed=False)
    *_, _ = work = [*_driven(what_if_steps(session, NAME, [3], tokens=3))]
    yield {
        "session": session._repr_html_(),
        "header": header_html(session),
        "history": history_html(session),
        "picture": picture_of(session.journal, kind=NAME).html(),
        "scores": session.latest_scores._repr_html_(),
        "result": result._repr_html_(),
        "evaluation": found._repr_html_(),
        "suite": found.suite._repr_html_(),
        "stack": session.student._repr_html_(),
        "what if": work[-1]._repr_html_(),
        "what if tokens": WhatIf(NAME, (3,), NAME, NAME, 1.0, 1.0, 0.0, (NAME, "a"), (0.1, 0.2), ("b",))._repr_html_(),
        "plot": plots.to_html(plots.importance(session.latest_scores), NAME),
        "plot of the stack": plots.stack(session.latest_scores, NAME, unit=NAME)._repr_html_(),
    }
    session.close()


def _driven(work):
    try:
        while True:
            yield next(work)
    except StopIteration as stop:
        yield stop.value


SAYS_IT = (
    "session",
    "header",
    "scores",
    "evaluation",
    "suite",
    "what if",
    "what if tokens",
    "plot",
    "plot of the stack",
)


@pytest.mark.parametrize("name", [*SAYS_IT, "history", "picture", "result", "stack"])
def test_names_and_texts_stay_text_in_the_browser(named, name):
    page = Page(named[name])
    assert page.odd == []
    assert ("img src=x" in page.told) == (name in SAYS_IT)  # as text


# ---- paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "~/.ssh/id_rsa"])
def test_a_config_of_others_reads_nothing_as_a_model_or_text_but_what_is_one(small_run, name, tmp_path):
    """A run folder of others may name any path: it is opened to be read as a checkpoint or a text, and nothing else."""
    session = small_run()
    session.close()
    file = session.folder / "config.json"
    config = json.loads(file.read_text())
    config["teacher"] = config["settings"]["teacher"] = name
    file.write_text(json.dumps(config))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(IldlabError):
        PruningSession.open(session.folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_holds_no_more_than_tensors_and_text(small_run, tmp_path):
    session = small_run()
    session.remove(2)
    path = session.export(tmp_path / "out")
    kinds = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert kinds <= {".safetensors", ".json", ".md", ".jinja", ".txt"}
    assert not any(torch.is_tensor(value) for value in json.loads((path / "config.json").read_text()).values())

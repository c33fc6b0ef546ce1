"""What goes into a model: prompts that are opened and never ended, ids that it has, sequences that its window holds."""

from __future__ import annotations

import copy
import re
import shutil

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from ildlab import LayerStack, PruningSession, load_model, load_text, measure
from ildlab.distill import DistillConfig, distill
from ildlab.errors import ModelError, UnsupportedModelError
from ildlab.evaluate import evaluate, score_suite
from ildlab.evaluate.loglikelihood import encode, window
from ildlab.evaluate.suites import Suite
from ildlab.evaluate.tasks import Task
from ildlab.importance import drift, logit_lens, redundancy, token_drift
from ildlab.limits import model_window
from ildlab.model.generate import greedy
from ildlab.model.load import LoadedModel
from ildlab.progress import drive
from ildlab.session.doctor import examine
from ildlab.session.whatif import what_if_steps
from ildlab.text.blocks import encode_prompts, opening_ids
from ildlab.text.teacher_text import continued

SIZES = "calibration_tokens", "train_tokens", "eval_tokens"
PROMPT = "One must be careful with"
ROWS = [
    {"query": "A list is", "choices": ["a", "mutable", "the"], "gold": 0},
    {"query": "A set", "choices": ["x", "y"], "gold": 1},
]
COPIES = [{"context": "one two one", "continuation": "two"}]
SUITE = Suite("s", (Task("choices", "multiple_choice", tuple(ROWS), fewshot=1), Task("copies", "copy", tuple(COPIES))))


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)  # 300 tokens; puts nothing before a text or after it


@pytest.fixture(scope="module")
def model(tiny):
    return tiny(4, vocab=320)


@pytest.fixture(scope="module")
def student(model):
    return LayerStack(model).share(without=[1])


def made(tokenizer, template: str):
    """The same tokenizer with a post-processor."""
    other = copy.deepcopy(tokenizer)
    marks = [(mark, other.convert_tokens_to_ids(mark)) for mark in ("<s>", "</s>")]
    other.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=marks)
    return other


@pytest.fixture(scope="module", params=["$A </s>", "<s> $A </s>"])
def pair(request, tokenizer):
    """A tokenizer that ends each text, and the same without that."""
    ending, plain = made(tokenizer, request.param), made(tokenizer, request.param.removesuffix(" </s>"))
    assert ending(PROMPT)["input_ids"] == [*plain(PROMPT)["input_ids"], ending.eos_token_id]
    return ending, plain


# ---- contexts and prompts are never ended ------------------------------------------------------------


def test_prompts_are_opened_and_never_ended(pair):
    ending, plain = pair
    texts = [PROMPT, "", "<s> already", "x"]
    bos = list(opening_ids(plain))
    assert encode_prompts(ending, texts) == encode_prompts(plain, texts)
    assert encode_prompts(ending, [PROMPT]) == [plain(PROMPT)["input_ids"]] and encode_prompts(ending, [""]) == [bos]
    assert encode_prompts(ending, ["<s> already"])[0].count(ending.bos_token_id) == 1


def test_log_likelihoods_are_those_without_the_end(pair, student):
    ending, plain = pair
    asked = [(PROMPT, " that"), (PROMPT, " x"), ("a b ", "c"), ("", "Yes"), ("<s>One", " two")]
    assert encode(ending, asked, 64) == encode(plain, asked, 64)
    assert all(one.context[-1] != ending.eos_token_id for one in encode(ending, asked[:3], 64))
    want, got = score_suite(student, plain, SUITE), score_suite(student, ending, SUITE)
    assert {name: task.values for name, task in got.tasks.items()} == {
        name: t.values for name, t in want.tasks.items()
    }
    scores = [measure(student, None, "task", suite=SUITE, tokenizer=each, show=False).table.score for each in pair]
    np.testing.assert_array_equal(*scores)


def test_lm_eval_has_the_same_contexts(pair, student):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from ildlab.evaluate.lm_eval import HFLM, _Model

    ending, plain = (copy.deepcopy(each) for each in pair)
    mine = _Model(student.model, tokenizer=ending, batch_size=2)
    theirs = HFLM(student.model, tokenizer=plain, batch_size=2)
    for kind, asked in {
        "loglikelihood": [(PROMPT, " that"), (PROMPT, " x"), ("", "Yes"), ("<s>One", " two")],
        "loglikelihood_rolling": [("A whole text. " * 30,), ("x",)],
        # The first is longer than what the window leaves.
        "generate_until": [(PROMPT * 20, {"max_gen_toks": 5}), (PROMPT, {"max_gen_toks": 5})],
    }.items():
        requests = [Instance(kind, {}, args, index) for index, args in enumerate(asked)]
        assert getattr(mine, kind)(requests, disable_tqdm=True) == getattr(theirs, kind)(requests, disable_tqdm=True)


def begun(folder, model, tokenizer, text_file, **settings):
    sizes = {"block": 16, "calibration_tokens": 64, "eval_tokens": 64, "train_tokens": 64}
    loaded = LoadedModel(model, tokenizer, "tiny")
    return PruningSession.create(folder, loaded, metric="nll", **{"text": str(text_file)} | sizes | settings)


def test_sessions_and_lenses_prompt_the_same(pair, model, tmp_path, text_file):
    ended, plain = (begun(tmp_path / str(n), model, each, text_file) for n, each in enumerate(pair))
    assert torch.equal(ended.text("calibration").tokens, plain.text("calibration").tokens)
    found = []
    for session in (ended, plain):
        session.remove(1)
        about = session.student, session.teacher
        lens = logit_lens(session.student, PROMPT, session.tokenizer, teacher=session.teacher)
        away = token_drift(*about, PROMPT, session.tokenizer)
        out = session.export(tmp_path / f"{session.folder.name}-out")
        verdict = examine(out, session.student, session.tokenizer)
        tried = drive(what_if_steps(session, PROMPT, [2], tokens=8), show=False)
        found.append([session.generate(PROMPT, tokens=8), tried, lens.to_dict(), away.to_dict(), away.attrs, verdict])
    for one, other in zip(*found, strict=True):
        assert repr(one) == repr(other)
    assert found[0][4]["tokens"][-1] != "</s>"


# ---- sequences that the window holds -----------------------------------------------------------------


def learned(window: int = 32):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=16, n_layer=4, n_head=2, n_positions=window, eos_token_id=2)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_text_beyond_the_window_is_refused_by_all(positions, tiny, tokenizer, text_file, tmp_path):
    model, limit = (learned(), 32) if positions == "learned" else (tiny(4, vocab=320), 256)
    teacher = LayerStack(model)
    student = teacher.share(without=[1])
    long, fits = (torch.randint(3, 320, (2, limit + more), generator=torch.manual_seed(0)) for more in (1, 0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for act in (
        lambda blocks: measure(student, blocks, "nll", show=False),
        lambda blocks: measure(student, blocks, "kl", teacher, race=True, show=False),
        lambda blocks: evaluate(student, teacher, blocks, show=False),
        lambda blocks: distill(student, teacher, blocks, DistillConfig(scope="all", tokens=64), gap=1, show=False),
        lambda blocks: drift(student, teacher, blocks, show=False),
        lambda blocks: redundancy(student, blocks, show=False),
        lambda blocks: token_drift(student, teacher, blocks[0]),
        lambda blocks: student.final(blocks),
    ):
        with pytest.raises(ModelError, match=rf"{limit + 1} tokens.*window is {limit}"):
            act(long)
        act(fits)
    with pytest.raises(ModelError, match=f"block={limit} at most"):
        begun(tmp_path / "run", model, tokenizer, text_file, block=limit + 1, **dict.fromkeys(SIZES, 2 * limit + 2))
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_generation_beyond_the_window_is_refused_in_words(positions, tiny, tokenizer, text_file, tmp_path):
    model, limit = learned() if positions == "learned" else tiny(4, vocab=320), 32
    model.config.max_position_embeddings = limit
    session = begun(tmp_path / "run", model, tokenizer, text_file)
    (ids,) = encode_prompts(tokenizer, [PROMPT])
    room = limit - len(ids)
    words = rf"{len(ids)} tokens and {room + 1} new ones are {limit + 1}, .* window of {limit}"
    for ask in (
        lambda new: greedy(model, torch.tensor([ids]), tokens=new),
        lambda new: session.generate(PROMPT, who="teacher", tokens=new),
        lambda new: drive(what_if_steps(session, PROMPT, [1], tokens=new), show=False),
        lambda new: continued(model, tokenizer, [ids, [3]], new, 0),
    ):
        with pytest.raises(ModelError, match=words):
            ask(room + 1)
        ask(room)
    session.generate(PROMPT, tokens=2)  # nothing is held


def test_what_ildlab_generates_by_itself_fits_a_short_window(tokenizer, text_file, tmp_path):
    session = begun(tmp_path / "run", learned(), tokenizer, text_file)  # the probe alone has more than 32 tokens
    session.remove(1)
    assert session.evaluate(canaries=False, show=False).tokens_per_second > 0
    assert session.export(tmp_path / "out").is_dir()


def test_a_sliding_window_is_no_limit_and_some_have_none(tokenizer):
    from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 320, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0}
    more = {"intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 4, "max_position_embeddings": 40}
    sliding = LayerStack(MistralForCausalLM(MistralConfig(**sizes, **more)).eval())
    free = LayerStack(BloomForCausalLM(BloomConfig(**sizes)).eval())
    assert (model_window(sliding.model), model_window(free.model)) == (40, None)
    ids = torch.full((1, 40), 7)
    assert sliding.final(ids).shape == (1, 40, 32) and free.final(ids.repeat(1, 20)).shape == (1, 800, 32)
    assert window(sliding, tokenizer) == 40 and window(free, tokenizer) == 2048  # lm-eval's default, to cut contexts


# ---- tokens that the embedding has ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger(tiny_folder):
    """The tokenizer with tokens that were added and never learned: ids 300 to 324, where the embedding has 320 rows."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens([f"<new{number}>" for number in range(25)])
    tokenizer.pad_token = "<new24>"
    return tokenizer


def test_tokens_beyond_the_embedding_are_refused_where_they_occur(larger, tiny_folder, text_file, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    larger.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match=r"5 tokens, from id 320 \('<new20>'\) on"):
        loaded = load_model(tmp_path / "model", dtype="float32")
    session = begun(tmp_path / "run", loaded.model, loaded.tokenizer, text_file)
    session.measure(show=False)
    session.remove(1)
    session.distill(tokens=64, local_tokens=0, batch_size=2, show=False)
    session.evaluate(show=False, suite=None)
    odd = text_file.read_text(encoding="utf-8").replace("the", "<new21>")
    (tmp_path / "odd.txt").write_text(odd, encoding="utf-8")
    known = re.escape("321 ('<new21>')") + ".*0 to 319"
    with pytest.raises(ModelError, match=known):
        begun(tmp_path / "second", loaded.model, larger, tmp_path / "odd.txt", calibration_tokens=1024)
    assert not (tmp_path / "second").exists()
    steps = len(session.steps)
    for act in (
        lambda: session.distill(text=str(tmp_path / "odd.txt"), tokens=1024, show=False),
        lambda: session.generate("Say <new21>"),
        lambda: drive(what_if_steps(session, "Say <new21>"), show=False),
        lambda: logit_lens(session.student, "Say <new21>", session.tokenizer),
        lambda: token_drift(session.student, session.teacher, "Say <new21>", session.tokenizer),
        lambda: continued(session.teacher.model, larger, [[5, 321]], 2, 0),
        lambda: score_suite(session.student, larger, odd_suite("Say", "<new21>")),  # as a target alone
        lambda: measure(session.student, None, "task", suite=odd_suite("<new21>", "x"), tokenizer=larger, show=False),
    ):
        with pytest.raises(ModelError, match=known):
            act()
    assert len(session.steps) == steps
    blocks = load_text(str(tmp_path / "odd.txt"), larger, block=16, tokens=1024)
    about = session.student, session.teacher
    for act in (
        lambda: measure(session.student, blocks, "nll", show=False),
        lambda: evaluate(*about, blocks, show=False),
        lambda: distill(*about, blocks, gap=1, show=False),
        lambda: drift(*about, blocks, show=False),
        lambda: redundancy(session.student, blocks, show=False),
        lambda: session.student.final(blocks.tokens),
        lambda: greedy(session.student.model, torch.tensor([[321]])),
    ):
        with pytest.raises(ModelError, match="321 has no row.*0 to 319"):
            act()
    with pytest.raises(ModelError, match="-100"):
        session.student.final(torch.tensor([[5, -100]]))


def odd_suite(context, continuation):
    return Suite("odd", (Task("odd", "cloze", ({"context": context, "continuation": continuation},)),))


def test_lm_eval_pads_with_a_token_that_the_model_has(larger, student, tmp_path):
    pytest.importorskip("lm_eval")
    import json

    from ildlab.evaluate.suites import load_suite

    def scored(questions):
        rows = [json.dumps({"q": question, "a": "x"}) for question in questions]
        (tmp_path / "says.jsonl").write_text("\n".join(rows))
        (tmp_path / "says.yaml").write_text(
            f"task: says\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'says.jsonl'}}}}}\n"
            "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
            "generation_kwargs: {until: [], max_gen_toks: 2, do_sample: false}\n"
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        )
        return score_suite(student, larger, load_suite(tmp_path / "says.yaml"))

    assert scored(["One", "One must be careful with"]).tasks["says"].n == 2
    with pytest.raises(ModelError, match=re.escape("321 ('<new21>')")):
        scored(["One <new21>", "x"])


# ---- why a stack was not proven --------------------------------------------------------------------------


def poisoned(model, value):
    with torch.no_grad():
        model.transformer.h[2].mlp.c_fc.weight[0, 0] = value
    return model


def overflowing():
    model = learned().half()
    with torch.no_grad():
        for parameter in model.transformer.h[1].mlp.parameters():
            parameter.fill_(6e4)
    return model


def skipping():
    sizes = {"vocab_size": 61, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 4}
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=6, layerdrop=0.9, dropout=0.0)).train()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: learned().train(), r"GPT2LMHeadModel is in training mode.*model\.eval\(\)"),
        (skipping, r"OPTForCausalLM is in training mode.*model\.eval\(\)"),
        (overflowing, r"not finite.*overflow in float16\. Load it in bfloat16 or float32"),
        (
            lambda: poisoned(learned(), float("nan")),
            r"weights that are not finite.*transformer\.h\.2\.mlp\.c_fc\.weight",
        ),
        (lambda: poisoned(learned().half(), float("inf")), r"not finite.* in float16, such as transformer\.h\.2\.mlp"),
        (lambda: poisoned(learned(), 1e38), r"values overflow in float32\. Check its config"),
    ],
)
def test_a_stack_that_is_not_proven_says_why(make, words):
    with pytest.raises(UnsupportedModelError, match=words) as told:
        LayerStack(make())
    assert "carries state" not in str(told.value)

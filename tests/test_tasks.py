"""Task kinds, token trees and log-likelihoods, against plain runs and fp64 oracles."""

import json

import numpy as np
import pytest
import torch

from ildlab import measure
from ildlab.errors import MeasureError, SuiteError
from ildlab.evaluate.loglikelihood import Outcomes, encode, largest_tree, score_steps
from ildlab.evaluate.packing import Encoded, make_batches
from ildlab.evaluate.suites import Suite, score_suite
from ildlab.evaluate.tasks import Task, check_row, example_scores, pairs, read_jsonl, requests
from ildlab.model.stack import LayerStack
from ildlab.progress import drive

ROWS = [
    {"query": "The sky is", "choices": ["blue", "made of old bricks", "loud"], "gold": 0},
    {"query": "Two and two make", "choices": ["four", "nine"], "gold": 0},
    {"query": "", "choices": ["She walks home.", "She walk home."], "gold": 0},
]


@pytest.fixture(scope="module")
def stack(tiny, teacher):
    return LayerStack(tiny(4, vocab=len(teacher.tokenizer), dtype=torch.float64))


def oracle(stack, one: Encoded) -> tuple[float, int]:
    """Plain run of one request in fp64: log-likelihood and leading tokens that are greedy."""
    ids = torch.tensor([one.context + one.continuation])
    logp = torch.log_softmax(stack.model(input_ids=ids[:, :-1], use_cache=False).logits.double(), -1)[0]
    logp = logp[len(one.context) - 1 :]
    target = torch.tensor(one.continuation)
    hit = (logp.argmax(-1) == target).long().cumprod(0).sum()
    return float(logp.gather(1, target[:, None]).sum()), int(hit)


def test_trees_give_the_log_likelihoods_of_plain_runs(stack, teacher, monkeypatch):
    task = Task("t", "multiple_choice", tuple(ROWS), fewshot=1)
    encoded, owner = requests(task, teacher.tokenizer, 256)
    assert largest_tree(stack) > 0
    monkeypatch.setattr("ildlab.evaluate.loglikelihood.batch_tokens", lambda stack: 64)
    outcomes = drive(score_steps(stack, encoded, owner))
    for one, ll, matched in zip(encoded, outcomes.loglikelihood, outcomes.matched):
        want, hit = oracle(stack, one)
        assert abs(ll - want) < 1e-5
        assert matched == hit


def test_shared_tokens_are_run_once(teacher):
    task = Task("t", "multiple_choice", tuple(ROWS[:1]))
    encoded, owner = requests(task, teacher.tokenizer, 256)
    (batch,) = make_batches(encoded, owner, largest_tree=1000)
    context = len(encoded[0].context)
    assert batch.tokens == context + sum(len(e.continuation) - 1 for e in encoded)
    # The head: once after the context for the first token of every choice, then at each further token.
    assert len(batch.head) == 1 + sum(len(e.continuation) - 1 for e in encoded)


def test_examples_with_a_common_prompt_share_a_row():
    prompt = tuple(range(100, 180))
    encoded = [Encoded(prompt + (n,), (5, 6)) for n in range(4)]
    batches = make_batches(encoded, range(4), largest_tree=1000)
    assert [b.inputs["input_ids"].shape for b in batches] == [(1, 80 + 4 * 2)]


def test_a_model_that_takes_no_trees_gets_plain_rows(stack, teacher, monkeypatch):
    import ildlab.evaluate.loglikelihood as module

    encoded, owner = requests(Task("t", "multiple_choice", tuple(ROWS)), teacher.tokenizer, 256)
    trees = drive(score_steps(stack, encoded, owner))
    monkeypatch.setattr(module, "largest_tree", lambda stack: 0)
    plain = drive(score_steps(stack, encoded, owner))
    np.testing.assert_allclose(plain.loglikelihood, trees.loglikelihood, atol=1e-6)


def test_alibi_model_is_found_out(teacher):
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=len(teacher.tokenizer), hidden_size=32, n_layer=2, n_head=4))
    bloom = LayerStack(model.eval().requires_grad_(False))
    assert largest_tree(bloom) == 0
    encoded, owner = requests(Task("t", "multiple_choice", tuple(ROWS)), teacher.tokenizer, 256)
    outcomes = drive(score_steps(bloom, encoded, owner))
    assert abs(outcomes.loglikelihood[1] - oracle(bloom, encoded[1])[0]) < 1e-3


# By default its state is that of a model of a billion parameters.
SMALL = {
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    }
}


def family(name: str, dtype: torch.dtype) -> LayerStack:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        name,
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        **SMALL.get(name, {}),
    )
    torch.manual_seed(0)
    return LayerStack(AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False))


@pytest.mark.parametrize("name", ["falcon_h1", "jamba", "qwen2", "gemma3_text"])
def test_trees_are_used_only_where_they_are_exact(name):
    stack = family(name, torch.float32)
    # A state that runs along the row sees every token before it, masked or not.
    assert (largest_tree(stack) == 0) == (name in ("falcon_h1", "jamba"))
    encoded = [Encoded(tuple(range(10, 22)), (30 + i, 40 + i, 50)) for i in range(4)]
    outcomes = drive(score_steps(stack, encoded, [0] * 4))
    for one, ll in zip(encoded, outcomes.loglikelihood):
        assert ll == pytest.approx(oracle(stack, one)[0], abs=2e-5)


def test_encoding_moves_spaces_and_stands_for_an_empty_context(teacher):
    tokenizer = teacher.tokenizer
    spaced, plain, empty = encode(tokenizer, [("The sky is ", "blue"), ("The sky is", " blue"), ("", "Blue")], 64)
    assert spaced == plain
    assert empty.context == (tokenizer.bos_token_id,)
    assert tokenizer.decode(empty.continuation) == "Blue"


def test_long_contexts_are_cut_from_the_left_and_counted(teacher):
    (one,) = encode(teacher.tokenizer, [("word " * 50, "end")], 16)
    assert one.truncated
    assert len(one.context) + len(one.continuation) == 17
    with pytest.raises(SuiteError, match="window of 4"):
        encode(teacher.tokenizer, [("a", " word" * 9)], 4)


def test_rows_longer_than_the_largest_tree_have_batches_of_their_own():
    long = [Encoded(tuple(range(5, 35)), (3,))]
    choices = [Encoded(tuple(range(40, 50)), (k, k + 1)) for k in (1, 2)]
    for batch in make_batches([*long, *choices], [0, 1, 1], largest_tree=16):
        assert ("attention_mask" in batch.inputs) == (batch.inputs["input_ids"].shape[1] <= 16)


def test_sliding_windows_hold_for_rows_of_any_length(teacher):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    stack = LayerStack(Gemma3ForCausalLM(config).eval().requires_grad_(False))
    long = [Encoded(tuple(range(5, 45)), (3, 4))]
    choices = [Encoded(tuple(range(60, 68)), (k, k + 1)) for k in (1, 2)]
    outcomes = drive(score_steps(stack, [*long, *choices], [0, 1, 1]))
    for one, ll in zip([*long, *choices], outcomes.loglikelihood):
        assert oracle(stack, one)[0] == pytest.approx(ll, abs=1e-4)


def test_scores_of_every_kind():
    rows = ({"query": "q", "choices": ["aaaa", "b"], "gold": 0}, {"query": "q", "choices": ["c", "d"], "gold": 1})
    outcomes = Outcomes(np.array([-3.0, -1.0, -2.0, -1.0]), np.array([0, 1, 0, 1]), np.array([2, 1, 1, 1]))
    for normalise, want in (("raw", [0, 1]), ("bytes", [1, 1])):
        choice = Task("c", "multiple_choice", rows, normalise=normalise)
        assert example_scores(choice, [0, 0, 1, 1], outcomes).tolist() == want
        assert choice.measure == f"accuracy_{normalise}"
    plain = ({"context": "x", "continuation": "y z"},) * 2
    outcomes = Outcomes(np.array([-2.0, -2.0]), np.array([1, 4]), np.array([4, 4]))
    for kind, name, want in (("copy", "prefix", [0.25, 1]), ("cloze", "exact", [0, 1])):
        task = Task("k", kind, plain)
        assert example_scores(task, [0, 1], outcomes).tolist() == want and task.measure == name


def test_few_shot_prompts_leave_out_the_row_itself():
    task = Task("t", "multiple_choice", tuple(ROWS[:2]), fewshot=1)
    context, continuation = pairs(task, 0)[0]
    assert context == "Two and two make four\n\nThe sky is" and continuation == " blue"
    assert pairs(task, 1)[0][0] == "The sky is blue\n\nTwo and two make"
    options = {"context_options": ["Ann", "Bob"], "continuation": "left.", "gold": 1}
    other = {"context_options": ["Cleo", "Dan"], "continuation": "sat.", "gold": 0}
    pair = Task("p", "multiple_choice", (options, other), fewshot=1)
    assert pairs(pair, 0)[0] == ("Cleo sat.\n\nAnn", " left.")
    # A copy of the row holds its answer as well.
    copies = tuple(dict(row) for row in (options, other))
    assert pairs(Task("p", "multiple_choice", (options, other), fewshot=1, shots=copies), 0)[0][0].startswith("Cleo")
    with pytest.raises(SuiteError, match="only 0 examples"):
        Task("p", "multiple_choice", (options, dict(options)), fewshot=1)


def test_rows_are_compared_only_for_few_shot_examples(teacher):
    compared = []

    class Row(dict):
        def __ne__(self, other):
            compared.append(other)
            return dict.__ne__(self, other)

        __hash__ = None

    rows = tuple(Row(query=f"{n} and one make", choices=["a", "b"], gold=0) for n in range(40))
    requests(Task("t", "multiple_choice", rows), teacher.tokenizer, 256)
    assert not compared
    requests(Task("t", "multiple_choice", rows, fewshot=2), teacher.tokenizer, 256)
    assert len(compared) <= 40 * 2 * 3  # each of two prompts a row: until two others are found


def test_broken_logits_are_an_error_and_no_answer(stack, teacher):
    broken = stack.share()
    broken.own([1])
    with torch.no_grad():
        for parameter in broken.layers[1].parameters():
            parameter.fill_(float("nan"))
    suite = Suite("s", (Task("t", "multiple_choice", tuple(ROWS)),))
    with pytest.raises(SuiteError, match="not a finite number"):
        score_suite(broken, teacher.tokenizer, suite)
    with pytest.raises(MeasureError, match="not finite"):
        measure(broken, None, "task", suite=suite, tokenizer=teacher.tokenizer)


@pytest.mark.parametrize("name", ["falcon_h1", "jamba", "qwen2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trees_are_judged_in_bf16_as_in_fp32(name, dtype):
    stack = family(name, dtype)
    assert (largest_tree(stack) == 0) == (name in ("falcon_h1", "jamba"))


def test_gpt_neo_windows_hold_for_branches(teacher):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=128,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=24,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    stack = LayerStack(GPTNeoForCausalLM(config).eval().requires_grad_(False))
    # As columns of one row, the last choice would be out of the local layer's sight of its context.
    choices = [Encoded(tuple(range(60, 70)), tuple(range(k, k + 8))) for k in (1, 20, 40)]
    outcomes = drive(score_steps(stack, choices, [0, 0, 0]))
    for one, ll in zip(choices, outcomes.loglikelihood):
        assert oracle(stack, one)[0] == pytest.approx(ll, abs=1e-4)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"query": "q", "choices": ["a", "b"]}, "'gold' is missing"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "gold is 2, but there are 2 choices"),
        ({"query": "q", "choices": ["a", " "], "gold": 0}, r"choices\[1\] is empty"),
        ({"query": "q", "choices": ["a"], "gold": 0}, "too few"),
        ({"query": "q", "choices": "ab", "gold": 0}, "must be list"),
        ([], "JSON object"),
    ],
)
def test_bad_rows_name_where_they_stand(row, message):
    with pytest.raises(SuiteError, match=f"rows line 3: .*{message}"):
        check_row(row, "rows line 3", "multiple_choice")


def test_bad_files_name_file_and_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n\n{broken\n")
    with pytest.raises(SuiteError, match="rows.jsonl line 3: not JSON"):
        read_jsonl(file)
    file.write_text("\n")
    with pytest.raises(SuiteError, match="no examples"):
        read_jsonl(file)
    file.write_text(json.dumps({**ROWS[0], "query": "a line\u2028 another"}, ensure_ascii=False) + "\n{broken\n")
    with pytest.raises(SuiteError, match="rows.jsonl line 2: not JSON"):  # the first is one row
        read_jsonl(file)
    with pytest.raises(SuiteError, match="cannot be read"):
        read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(SuiteError, match="no known kind"):
        check_row({"question": 1}, "rows.jsonl line 1")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "quiz"}, "'t': kind='quiz': it must be one of 'multiple_choice', 'cloze', 'copy'"),
        ({"normalise": "words"}, "normalise='words': it must be one of 'raw', 'bytes'"),
        ({"chance": 1.0}, "not a share"),
        ({"rows": ()}, "no rows"),
        ({"fewshot": 3}, "only 2 examples"),
    ],
)
def test_bad_tasks_say_what_is_wrong(changes, message):
    with pytest.raises(SuiteError, match=message):
        Task(**{"name": "t", "kind": "multiple_choice", "rows": tuple(ROWS), **changes})

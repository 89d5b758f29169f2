"""Scores of lm-evaluation-harness by our sampler and log-probabilities are those by transformers."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval", reason="needs requirements/lm_eval.txt")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from tokenizers import Tokenizer, decoders, models, trainers  # noqa: E402
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402

from evals import lm_eval as command  # noqa: E402
from evals.harness import Adapter  # noqa: E402
from infer.models import load  # noqa: E402

pytestmark = pytest.mark.parity

WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five", "six", "seven"]
ROWS = [
    {"question": f"Which word comes after {a} and {b}?", "options": [f"{c}", f"{c} {a}", b], "answer": i % 3}
    for i, (a, b, c) in enumerate(zip(WORDS, WORDS[1:], WORDS[2:]))
]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS, validation: ROWS}}
test_split: test
num_fewshot: 3
fewshot_split: validation
"""
TASKS = {
    "choose": COMMON + """
task: choose
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{options}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "write": COMMON + """
task: write
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{options[answer]}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "read": COMMON.replace("num_fewshot: 3", "num_fewshot: 0") + """
task: read
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{options}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of transformers with a tokenizer, and task files on local rows."""
    path = tmp_path_factory.mktemp("harness")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=sorted(ByteLevel.alphabet()), special_tokens=special)
    core.train_from_iterator([json.dumps(row) for row in ROWS], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[0])
    tokenizer.save_pretrained(path / "model")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=512, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(path / "model")
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (path / "tasks").mkdir()
    for name, text in TASKS.items():
        (path / f"tasks/{name}.yaml").write_text(text.replace("ROWS", str(path / "rows.jsonl")))
    return path


def test_scores_are_those_of_transformers(folder):
    def scored(model):
        tasks = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        return lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0)

    lm = load(folder / "model")
    ours = scored(Adapter(lm))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    theirs = scored(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3))
    for name in TASKS:
        for key, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][key] == pytest.approx(value, rel=1e-4), (name, key)
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            for a, b in zip(mine["resps"], other["resps"], strict=True):
                close = a == b if name == "write" else a[0] == pytest.approx(b[0], rel=1e-4)
                assert close, (name, a, b)
    assert len({s["resps"][0][0] for s in ours["samples"]["write"]}) > 2
    whole = sum(len(lm.encode(a)) for s in ours["samples"]["choose"] for a in (s["arguments"][0][0],))
    assert lm.prefixes.computed < whole * 3  # options, and what questions share, are not read three times over


def test_the_command(folder, capsys, tmp_path):
    argv = [f"--model={folder / 'model'}", f"--include={folder / 'tasks'}", f"--out={tmp_path / 'out.json'}"]
    assert command.main([*argv, "--tasks=choose", "--limit=4"]) == 0
    assert "acc_norm" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["n-shot"] == {"choose": 3}
    assert command.main([*argv, "--tasks=nothing"]) == 2
    assert "no task 'nothing'" in capsys.readouterr().err
